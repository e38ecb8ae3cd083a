/*
 * String instructions of translated code: what MOVS, STOS (with and without REP) and LODS do while nothing
 * comes in between, a page at a time. What does (the direction flag, an element across two pages, what
 * bt_tlb_fill refuses) is the interpreter's, with RSI, RDI and RCX at the element that it begins with.
 * Compiled without vector instructions.
 */
#include "engine/soft/bt/bt.h"

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

/* Up to `count` elements within the pages they begin in. Returns how many; 0: none. */
static u64 run(struct soft_vcpu *v, const struct bt_string *s, u64 count, u64 mask)
{
    u64 *gpr = v->cpu.gpr, n = count;
    gva_t from = gpr[RSI] & mask, to = gpr[RDI] & mask;
    u8 *source = NULL, *destination = NULL;

    if (s->source) {
        n = MIN(n, left_in_page(from, s->size));
        source = n ? pointer(v, from, false) : NULL;
        if (!source)
            return 0;
    }
    if (s->destination) {
        n = MIN(n, left_in_page(to, s->size));
        destination = n ? pointer(v, to, true) : NULL;
        if (!destination)
            return 0;
    }
    if (!destination)
        load_accumulator(v, source, s->size);
    else if (source)
        copy(destination, source, n, s->size);
    else
        fill(destination, gpr[RAX], n, s->size);
    if (source)
        gpr[RSI] = (from + n * s->size) & mask;
    if (destination)
        gpr[RDI] = (to + n * s->size) & mask;
    return n;
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
        if (count > n && atomic_load_explicit(&v->attention, memory_order_relaxed)) {
            v->repeat_icount = v->icount;
            return false;
        }
    }
    return true;
}
