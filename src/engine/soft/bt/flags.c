/*
 * Flags from recipes: what an instruction made of registers that haven't changed since.
 */
#include "engine/soft/bt/bt.h"

#include "engine/soft/flags.h"

#define COMPUTE(bits, insn, x, y)                                                                  \
    ({                                                                                             \
        u##bits x_ = (u##bits)(x);                                                                 \
        u16 f_;                                                                                    \
                                                                                                   \
        __asm__(insn " %2, %1\n\tlahf\n\tseto %%al"                                                \
                : "=&a"(f_), "+r"(x_)                                                              \
                : "r"((u##bits)(y))                                                                \
                : "cc");                                                                           \
        f_;                                                                                        \
    })
#define SHIFT(bits, insn, x, count)                                                                \
    ({                                                                                             \
        u##bits x_ = (u##bits)(x);                                                                 \
        u16 f_;                                                                                    \
                                                                                                   \
        __asm__(insn " %%cl, %1\n\tlahf\n\tseto %%al"                                              \
                : "=&a"(f_), "+r"(x_)                                                              \
                : "c"((u8)(count))                                                                 \
                : "cc");                                                                           \
        f_;                                                                                        \
    })
#define SHIFT_BY_SIZE(insn, x, count)                                                              \
    (r->size == 8 ? SHIFT(64, insn "q", x, count) : SHIFT(32, insn "l", x, count))
#define BY_SIZE(insn, x, y)                                                                        \
    (r->size == 8   ? COMPUTE(64, insn "q", x, y)                                                  \
     : r->size == 4 ? COMPUTE(32, insn "l", x, y)                                                  \
     : r->size == 2 ? COMPUTE(16, insn "w", x, y)                                                  \
                    : COMPUTE(8, insn "b", x, y))

u32 bt_recipe_flags(const struct soft_vcpu *v, const struct bt_recipe *r)
{
    u64 a = r->a == NO_REG ? v->bt_shared.flag_source : v->cpu.gpr[r->a],
        b = r->b == NO_REG ? (u64)(s64)r->imm : v->cpu.gpr[r->b];

    switch (r->kind) {
    case RECIPE_CMP:
        return BY_SIZE("cmp", a, b);
    case RECIPE_TEST:
        return BY_SIZE("test", a, b);
    case RECIPE_ADD:
        return BY_SIZE("add", a - b, b);
    case RECIPE_SUB:
        return BY_SIZE("cmp", a + b, b);
    case RECIPE_NEG:
        return BY_SIZE("cmp", 0, 0 - a);
    case RECIPE_SHL:
        return SHIFT_BY_SIZE("shl", a, r->imm);
    case RECIPE_SHR:
        return SHIFT_BY_SIZE("shr", a, r->imm);
    case RECIPE_SAR:
        return SHIFT_BY_SIZE("sar", a, r->imm);
    default: /* RECIPE_LOGIC */
        return BY_SIZE("test", a, a);
    }
}
