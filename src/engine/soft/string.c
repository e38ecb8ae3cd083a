/*
 * String instructions, with and without REP.
 *
 * A repeated one runs in chunks: as many elements as lie in one page at both ends go at memory speed,
 * the rest one by one. RSI, RDI and RCX are exact whenever a fault can be raised. After CHUNK_BYTES, or
 * when something wants attention, or when single-stepping, the instruction is left with RIP still on it
 * and goes on when it is run again (SDM vol. 2B, REP).
 */
#include "engine/soft/integer.h"
#include "engine/soft/operand.h"

#define CHUNK_BYTES 65536u

static inline gva_t string_linear(struct soft_vcpu *v, const struct insn *i, unsigned seg,
                                  u64 offset, unsigned size, unsigned access)
{
    if (likely(i->address == ADDRESS_FLAT))
        return offset + v->seg_base[seg];
    v->cur = i;
    return soft_linear(v, seg, offset, size, access);
}
static inline gva_t source(struct soft_vcpu *v, const struct insn *i, unsigned size)
{
    return string_linear(v, i, i->seg, reg_get_asize(v, RSI, i->asize), size, ACCESS_READ);
}
static inline gva_t destination(struct soft_vcpu *v, const struct insn *i, unsigned size,
                                unsigned access)
{
    return string_linear(v, i, SEG_ES, reg_get_asize(v, RDI, i->asize), size, access);
}

static inline void advance(struct soft_vcpu *v, const struct insn *i, unsigned r, s64 by)
{
    reg_set_asize(v, r, v->cpu.gpr[r] + (u64)by, i->asize);
}
static inline s64 step_of(const struct soft_vcpu *v, unsigned size)
{
    return v->cpu.rflags & EFLAGS_DF ? -(s64)size : (s64)size;
}

/* The loop must be left now, RIP on the instruction, to be run again. */
static inline bool interrupted(const struct soft_vcpu *v, u64 bytes_done)
{
    return bytes_done >= CHUNK_BYTES || (v->mode & MODE_SINGLE) ||
           atomic_load_explicit(&v->attention, memory_order_relaxed);
}

static void stay(struct soft_vcpu *v, const struct insn *i)
{
    v->poll = 0; /* a chunk takes as long as many blocks */
    v->cur = i;
    soft_leave_repeated(v);
}

/* Elements of `size` from lin to the end of its page, at most `count`. */
static inline u64 elements_in_page(gva_t lin, unsigned size, u64 count)
{
    return MIN((GUEST_PAGE_SIZE - (lin & (GUEST_PAGE_SIZE - 1))) / size, count);
}

/* Copies as many elements as can be copied at once, forwards and flat only; 0: take the slow way. */
static u64 copy_run(struct soft_vcpu *v, const struct insn *i, unsigned size, u64 count)
{
    gva_t from, to;
    u64 n, distance;
    const u8 *src;
    u8 *dst;

    if (i->address != ADDRESS_FLAT || (v->cpu.rflags & EFLAGS_DF) || count < 4)
        return 0;
    from = source(v, i, size);
    to = destination(v, i, size, ACCESS_WRITE);
    n = elements_in_page(to, size, elements_in_page(from, size, count));
    if (n < 4)
        return 0;
    v->cur = i;
    src = soft_pointer(v, from, n * size, ACCESS_READ);
    dst = src ? soft_pointer(v, to, n * size, ACCESS_WRITE) : NULL;
    if (!dst)
        return 0;
    /* A destination just behind the source repeats what was copied: memcpy would not. */
    distance = (u64)(dst - src);
    if (distance < n * size && distance != 0)
        for (u64 k = 0; k < n * size; k += size)
            memmove(dst + k, src + k, size);
    else
        memmove(dst, src, n * size);
    return n;
}

/* Stores as many elements as can be stored at once; 0: take the slow way. */
static u64 fill_run(struct soft_vcpu *v, const struct insn *i, unsigned size, u64 count)
{
    u64 n, value = v->cpu.gpr[RAX];
    gva_t to;
    u8 *dst;

    if (i->address != ADDRESS_FLAT || (v->cpu.rflags & EFLAGS_DF) || count < 4)
        return 0;
    to = destination(v, i, size, ACCESS_WRITE);
    n = elements_in_page(to, size, count);
    if (n < 4)
        return 0;
    v->cur = i;
    dst = soft_pointer(v, to, n * size, ACCESS_WRITE);
    if (!dst)
        return 0;
    if (size == 1 || value == 0)
        memset(dst, (int)value, n * size);
    else
        for (u64 k = 0; k < n * size; k += size)
            memcpy(dst + k, &value, size);
    return n;
}

#define REPEAT(i) ((i)->flags & (INSN_REP | INSN_REPNE))

#define STRING(bits)                                                                               \
    static inline void movs_one##bits(struct soft_vcpu *v, const struct insn *i, s64 step)         \
    {                                                                                              \
        u##bits value = mem_load##bits(v, i, source(v, i, (bits) / 8));                            \
                                                                                                   \
        mem_store##bits(v, i, destination(v, i, (bits) / 8, ACCESS_WRITE), value);                 \
        advance(v, i, RSI, step);                                                                  \
        advance(v, i, RDI, step);                                                                  \
    }                                                                                              \
    static inline void stos_one##bits(struct soft_vcpu *v, const struct insn *i, s64 step)         \
    {                                                                                              \
        mem_store##bits(v, i, destination(v, i, (bits) / 8, ACCESS_WRITE),                         \
                        (u##bits)v->cpu.gpr[RAX]);                                                 \
        advance(v, i, RDI, step);                                                                  \
    }                                                                                              \
    static inline void lods_one##bits(struct soft_vcpu *v, const struct insn *i, s64 step)         \
    {                                                                                              \
        u##bits value = mem_load##bits(v, i, source(v, i, (bits) / 8));                            \
                                                                                                   \
        if ((bits) == 8)                                                                           \
            reg_set8(v, 0, (u8)value);                                                             \
        else                                                                                       \
            reg_set##bits(v, RAX, value);                                                          \
        advance(v, i, RSI, step);                                                                  \
    }                                                                                              \
    static inline void compare##bits(struct soft_vcpu *v, u##bits a, u##bits b)                    \
    {                                                                                              \
        u16 f;                                                                                     \
                                                                                                   \
        __asm__("cmp %[b], %[a]" ASM_SAVE_FLAGS : "=&a"(f) : [a] "q"(a), [b] "q"(b) : "cc");       \
        v->aflags = f;                                                                             \
    }                                                                                              \
    static inline void scas_one##bits(struct soft_vcpu *v, const struct insn *i, s64 step)         \
    {                                                                                              \
        u##bits b = mem_load##bits(v, i, destination(v, i, (bits) / 8, ACCESS_READ));              \
                                                                                                   \
        compare##bits(v, (u##bits)v->cpu.gpr[RAX], b);                                             \
        advance(v, i, RDI, step);                                                                  \
    }                                                                                              \
    static inline void cmps_one##bits(struct soft_vcpu *v, const struct insn *i, s64 step)         \
    {                                                                                              \
        u##bits a = mem_load##bits(v, i, source(v, i, (bits) / 8));                                \
        u##bits b = mem_load##bits(v, i, destination(v, i, (bits) / 8, ACCESS_READ));              \
                                                                                                   \
        compare##bits(v, a, b);                                                                    \
        advance(v, i, RSI, step);                                                                  \
        advance(v, i, RDI, step);                                                                  \
    }                                                                                              \
    STRING_MOVE(movs, bits, copy_run(v, i, (bits) / 8, count), advance(v, i, RSI, (s64)n *step))   \
    STRING_MOVE(stos, bits, fill_run(v, i, (bits) / 8, count), (void)0)                            \
    STRING_MOVE(lods, bits, 0, (void)0)                                                            \
    STRING_COMPARE(scas, bits)                                                                     \
    STRING_COMPARE(cmps, bits)

/* `run` does n elements at once; `also` moves RSI for those that have a source. */
#define STRING_MOVE(name, bits, run, also)                                                         \
    static void name##bits(struct soft_vcpu *v, const struct insn *i)                              \
    {                                                                                              \
        s64 step = step_of(v, (bits) / 8);                                                         \
        u64 count, done = 0;                                                                       \
                                                                                                   \
        if (!REPEAT(i)) {                                                                          \
            name##_one##bits(v, i, step);                                                          \
            NEXT(v, i);                                                                            \
        }                                                                                          \
        while ((count = reg_get_asize(v, RCX, i->asize)) != 0) {                                   \
            u64 n;                                                                                 \
                                                                                                   \
            if (done && interrupted(v, done)) {                                                    \
                stay(v, i);                                                                        \
                return;                                                                            \
            }                                                                                      \
            n = v->mode & MODE_SINGLE ? 0 : (run);                                                 \
            if (n) {                                                                               \
                if (#name[0] != 'l')                                                               \
                    advance(v, i, RDI, (s64)n *step);                                              \
                also;                                                                              \
            } else {                                                                               \
                name##_one##bits(v, i, step);                                                      \
                n = 1;                                                                             \
            }                                                                                      \
            reg_set_asize(v, RCX, count - n, i->asize);                                            \
            done += n * ((bits) / 8);                                                              \
        }                                                                                          \
        NEXT(v, i);                                                                                \
    }

#define STRING_COMPARE(name, bits)                                                                 \
    static void name##bits(struct soft_vcpu *v, const struct insn *i)                              \
    {                                                                                              \
        s64 step = step_of(v, (bits) / 8);                                                         \
        u32 stop_at = i->flags & INSN_REPNE ? AFLAG_ZF : 0;                                        \
        u64 count, done = 0;                                                                       \
                                                                                                   \
        if (!REPEAT(i)) {                                                                          \
            name##_one##bits(v, i, step);                                                          \
            NEXT(v, i);                                                                            \
        }                                                                                          \
        while ((count = reg_get_asize(v, RCX, i->asize)) != 0) {                                   \
            if (done && interrupted(v, done)) {                                                    \
                stay(v, i);                                                                        \
                return;                                                                            \
            }                                                                                      \
            name##_one##bits(v, i, step);                                                          \
            reg_set_asize(v, RCX, count - 1, i->asize);                                            \
            if ((v->aflags & AFLAG_ZF) == stop_at)                                                 \
                break;                                                                             \
            done += (bits) / 8;                                                                    \
        }                                                                                          \
        NEXT(v, i);                                                                                \
    }

STRING(8)
STRING(16)
STRING(32)
STRING(64)

#define SIZES(name)                                                                                \
    {                                                                                              \
        name##8, name##16, name##32, name##64                                                      \
    }
insn_fn *const movs_fns[4] = SIZES(movs);
insn_fn *const stos_fns[4] = SIZES(stos);
insn_fn *const lods_fns[4] = SIZES(lods);
insn_fn *const scas_fns[4] = SIZES(scas);
insn_fn *const cmps_fns[4] = SIZES(cmps);
