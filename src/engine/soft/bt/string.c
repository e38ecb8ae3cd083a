/*
 * String instructions of translated code, with and without REP: what they do while nothing comes in between, a
 * page at a time. What does (the direction flag, an element across two pages, what
 * bt_tlb_fill refuses) is the interpreter's, with RSI, RDI and RCX at the element that it begins with.
 * Compiled without vector instructions.
 */
#include "engine/soft/bt/bt.h"

#include "engine/soft/flags.h"
#include "engine/soft/mmu.h"

/* The host address of what is at lin in its page, or NULL. */
static u8 *pointer(struct soft_vcpu *v, gva_t lin, bool write)
{
    const struct tlb_entry *e = tlb_slot(v->tlb, lin);
    gva_t page = lin & ~(GUEST_PAGE_SIZE - 1);

    if ((write ? e->write_tag : e->read_tag) != page && !bt_tlb_fill(v, lin, write))
        return NULL;
    return (u8 *)(uintptr_t)(e->host + (lin - page));
}

static u64 left_in_page(gva_t lin, unsigned size)
{
    return (GUEST_PAGE_SIZE - (lin & (GUEST_PAGE_SIZE - 1))) / size;
}

/* The element's own size counts where source and destination overlap; bytes go fastest. */
static void copy(u8 *to, const u8 *from, u64 n, unsigned size)
{
    if ((u64)(to - from) >= n * size) {
        n *= size;
        size = 1;
    }
    switch (size) {
    case 1:
        __asm__ volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(n) : : "memory");
        break;
    case 2:
        __asm__ volatile("rep movsw" : "+D"(to), "+S"(from), "+c"(n) : : "memory");
        break;
    case 4:
        __asm__ volatile("rep movsl" : "+D"(to), "+S"(from), "+c"(n) : : "memory");
        break;
    default:
        __asm__ volatile("rep movsq" : "+D"(to), "+S"(from), "+c"(n) : : "memory");
        break;
    }
}

static void fill(u8 *to, u64 value, u64 n, unsigned size)
{
    switch (size) {
    case 1:
        __asm__ volatile("rep stosb" : "+D"(to), "+c"(n) : "a"(value) : "memory");
        break;
    case 2:
        __asm__ volatile("rep stosw" : "+D"(to), "+c"(n) : "a"(value) : "memory");
        break;
    case 4:
        __asm__ volatile("rep stosl" : "+D"(to), "+c"(n) : "a"(value) : "memory");
        break;
    default:
        __asm__ volatile("rep stosq" : "+D"(to), "+c"(n) : "a"(value) : "memory");
        break;
    }
}

static void load_accumulator(struct soft_vcpu *v, const u8 *from, unsigned size)
{
    u64 value = 0;

    memcpy(&value, from, size);
    if (size < 4)
        memcpy(&v->cpu.gpr[RAX], &value, size);
    else
        v->cpu.gpr[RAX] = value;
}

/* With the flags of the last element's comparison in *flags; returns how many elements are left. */
#define COMPARE_RUN(prefix, suffix)                                                                \
    __asm__ volatile(prefix " cmps" suffix ASM_SAVE_FLAGS                                          \
                     : "+S"(a), "+D"(b), "+c"(n), "=a"(*flags)                                     \
                     :                                                                             \
                     : "memory", "cc")
#define SCAN_RUN(prefix, suffix)                                                                   \
    __asm__ volatile(prefix " scas" suffix ASM_SAVE_FLAGS                                          \
                     : "+D"(b), "+c"(n), "=a"(*flags)                                              \
                     : "a"(value)                                                                  \
                     : "memory", "cc")
#define BY_SIZE(run, prefix)                                                                       \
    do {                                                                                           \
        switch (s->size) {                                                                         \
        case 1:                                                                                    \
            run(prefix, "b");                                                                      \
            break;                                                                                 \
        case 2:                                                                                    \
            run(prefix, "w");                                                                      \
            break;                                                                                 \
        case 4:                                                                                    \
            run(prefix, "l");                                                                      \
            break;                                                                                 \
        default:                                                                                   \
            run(prefix, "q");                                                                      \
            break;                                                                                 \
        }                                                                                          \
    } while (0)

static u64 compare(const struct bt_string *s, const u8 *a, const u8 *b, u64 n, u64 *flags)
{
    if (s->until_equal)
        BY_SIZE(COMPARE_RUN, "repne");
    else
        BY_SIZE(COMPARE_RUN, "repe");
    return n;
}

static u64 scan(const struct bt_string *s, u64 value, const u8 *b, u64 n, u64 *flags)
{
    if (s->until_equal)
        BY_SIZE(SCAN_RUN, "repne");
    else
        BY_SIZE(SCAN_RUN, "repe");
    return n;
}

/* SCAS, and CMPS with a source: up to n elements. Returns how many. */
static u64 compare_elements(struct soft_vcpu *v, const struct bt_string *s, const u8 *source,
                            const u8 *destination, u64 n)
{
    u64 flags, left;

    left = s->op == STRING_SCAN ? scan(s, v->cpu.gpr[RAX], destination, n, &flags)
                                : compare(s, source, destination, n, &flags);
    v->aflags = (u16)flags;
    return n - left;
}

/* Up to `count` elements within the pages they begin in. Returns how many; 0: none. */
static u64 run(struct soft_vcpu *v, const struct bt_string *s, u64 count, u64 mask)
{
    u64 *gpr = v->cpu.gpr, n = count;
    gva_t from = gpr[RSI] & mask, to = gpr[RDI] & mask;
    u8 *source = NULL, *destination = NULL;

    if (string_has_source(s)) {
        n = MIN(n, left_in_page(from, s->size));
        source = n ? pointer(v, from, false) : NULL;
        if (!source)
            return 0;
    }
    if (string_has_destination(s)) {
        n = MIN(n, left_in_page(to, s->size));
        destination = n ? pointer(v, to, !string_compares(s)) : NULL;
        if (!destination)
            return 0;
    }
    switch (s->op) {
    case STRING_MOVE:
        copy(destination, source, n, s->size);
        break;
    case STRING_STORE:
        fill(destination, gpr[RAX], n, s->size);
        break;
    case STRING_LOAD:
        load_accumulator(v, source + (n - 1) * s->size, s->size);
        break;
    default:
        n = compare_elements(v, s, source, destination, n);
        break;
    }
    if (source)
        gpr[RSI] = (from + n * s->size) & mask;
    if (destination)
        gpr[RDI] = (to + n * s->size) & mask;
    return n;
}

/* Whether the last comparison ended it. */
static bool is_over(const struct soft_vcpu *v, const struct bt_string *s)
{
    return string_compares(s) && !(v->aflags & AFLAG_ZF) != s->until_equal;
}

bool bt_string(struct soft_vcpu *v, const struct bt_string *s)
{
    u64 mask = v->bt_mode & BT_MODE_CODE32 ? UINT32_MAX : UINT64_MAX, count, n;

    if (v->cpu.rflags & EFLAGS_DF)
        return false;
    if (!s->repeated)
        return run(v, s, 1, mask);
    while ((count = v->cpu.gpr[RCX] & mask) != 0) {
        n = run(v, s, count, mask);
        if (!n)
            return false;
        v->cpu.gpr[RCX] = count - n;
        if (is_over(v, s))
            return true;
        if (count > n && atomic_load_explicit(&v->attention, memory_order_relaxed)) {
            v->repeat_icount = v->icount;
            return false;
        }
    }
    return true;
}
