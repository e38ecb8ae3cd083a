/*
 * Debug registers, breakpoints and single step (Intel SDM vol. 3, chapter 17).
 *
 * Three kinds of #DB come about in three places. Instruction breakpoints are faults: the run loop asks
 * before each instruction. Data and I/O breakpoints and single step are traps: the accesses note their
 * matches in cpu.db_pending, and the run loop takes the trap behind the instruction. The general-detect
 * fault (DR7.GD) is raised by the MOV itself.
 */
#include "engine/soft/debug.h"

#include "engine/soft/descriptor.h"
#include "engine/soft/system.h"

enum { BREAK_EXECUTE, BREAK_WRITE, BREAK_IO, BREAK_ACCESS };

#define DR6_WRITABLE (DR6_BT | DR6_BS | DR6_BD | 0xf)
#define DR7_WRITABLE (0xffff0000ULL | DR7_GD | 0x3ff)

static bool breakpoint_enabled(const struct soft_vcpu *v, unsigned n)
{
    return (v->cpu.dr[7] >> (2 * n)) & 3;
}

/* R/W field of breakpoint n. With CR4.DE clear the encoding of I/O breakpoints is undefined: off. */
static unsigned breakpoint_kind(const struct soft_vcpu *v, unsigned n)
{
    return (v->cpu.dr[7] >> (16 + 4 * n)) & 3;
}

static unsigned breakpoint_length(const struct soft_vcpu *v, unsigned n)
{
    static const u8 lengths[] = {1, 2, 8, 4};

    return lengths[(v->cpu.dr[7] >> (18 + 4 * n)) & 3];
}

/* Whether [at, at + n) touches the breakpoint's bytes: its address is aligned to its length (17.2.5). */
static bool breakpoint_touched(const struct soft_vcpu *v, unsigned b, u64 at, size_t n)
{
    u64 length = breakpoint_length(v, b), from = v->cpu.dr[b] & ~(length - 1);

    return at < from + length && from < at + n;
}

bool soft_code_breakpoints_enabled(const struct soft_vcpu *v)
{
    for (unsigned b = 0; b < 4; b++)
        if (breakpoint_enabled(v, b) && breakpoint_kind(v, b) == BREAK_EXECUTE)
            return true;
    return false;
}

bool soft_data_breakpoints_enabled(const struct soft_vcpu *v)
{
    for (unsigned b = 0; b < 4; b++) {
        unsigned kind = breakpoint_kind(v, b);

        if (breakpoint_enabled(v, b) && (kind == BREAK_WRITE || kind == BREAK_ACCESS))
            return true;
    }
    return false;
}

/* DR6.B0 to B3 also show breakpoints that match without being enabled, once one that is enabled does. */
bool soft_code_breakpoint(struct soft_vcpu *v)
{
    gva_t lin = v->seg_base[SEG_CS] + v->cpu.gpr[GPR_RIP];
    bool hit = false;
    u64 matches = 0;

    if (v->cpu.rflags & EFLAGS_RF || soft_inside_repeated(v))
        return false;
    if (!soft_code64(v))
        lin = (u32)lin;
    for (unsigned b = 0; b < 4; b++) {
        if (breakpoint_kind(v, b) != BREAK_EXECUTE || v->cpu.dr[b] != lin)
            continue;
        matches |= BIT(b);
        hit |= breakpoint_enabled(v, b);
    }
    if (hit)
        v->cpu.dr[6] = (v->cpu.dr[6] & ~0xfULL) | matches;
    return hit;
}

void soft_data_access(struct soft_vcpu *v, gva_t lin, size_t n, unsigned access)
{
    for (unsigned b = 0; b < 4; b++) {
        unsigned kind = breakpoint_kind(v, b);

        if (!breakpoint_enabled(v, b) || !breakpoint_touched(v, b, lin, n))
            continue;
        if (kind == BREAK_ACCESS || (kind == BREAK_WRITE && (access & ACCESS_WRITE)))
            v->cpu.db_pending |= BIT(b);
    }
    if (v->cpu.db_pending)
        atomic_fetch_or(&v->attention, ATTN_SHADOW);
}

void soft_io_access(struct soft_vcpu *v, u16 port, unsigned size)
{
    if (likely(!(v->cpu.dr[7] & 0xff)) || !(v->cpu.cr4 & CR4_DE))
        return;
    for (unsigned b = 0; b < 4; b++)
        if (breakpoint_enabled(v, b) && breakpoint_kind(v, b) == BREAK_IO &&
            breakpoint_touched(v, b, port, size))
            v->cpu.db_pending |= BIT(b);
    if (v->cpu.db_pending)
        atomic_fetch_or(&v->attention, ATTN_SHADOW);
}

void soft_debug_trap(struct soft_vcpu *v)
{
    u64 why = v->cpu.db_pending;

    v->cpu.db_pending = 0;
    v->cpu.activity = CPU_RUNNING; /* HLT (vol. 2A) */
    v->cpu.dr[6] = (v->cpu.dr[6] & ~0xfULL) | why;
    soft_deliver(v, EXC_DB, CPU_EVENT_EXCEPTION, false, 0);
}

/*
 * What MOV from and to a debug register checks: #GP(0), then #UD, then the general-detect fault, which
 * pushes RF set as all faults but instruction breakpoints do (17.2.2, 17.2.4, 17.3.1.3). Returns the
 * register's number with DR4 and DR5 resolved.
 */
static unsigned debug_register(struct soft_vcpu *v, const struct insn *i)
{
    unsigned n = i->reg;

    if (n > 7)
        soft_raise(v, EXC_UD);
    soft_require_cpl0(v);
    if ((n == 4 || n == 5) && (v->cpu.cr4 & CR4_DE))
        soft_raise(v, EXC_UD);
    if (v->cpu.dr[7] & DR7_GD) {
        v->cpu.dr[6] |= DR6_BD;
        v->cpu.rflags |= EFLAGS_RF;
        soft_raise(v, EXC_DB);
    }
    return n == 4 || n == 5 ? n + 2 : n;
}

/* MOV r32/r64, DRn (vol. 2B, MOV). */
void op_mov_from_dr(struct soft_vcpu *v, const struct insn *i)
{
    u64 value = v->cpu.dr[debug_register(v, i)];

    v->cpu.gpr[i->rm] = soft_code64(v) ? value : (u32)value;
}

/* MOV DRn, r32/r64 (vol. 2B, MOV; reserved bits: vol. 3, 17.2.3, 17.2.4, 17.2.6). */
void op_mov_to_dr(struct soft_vcpu *v, const struct insn *i)
{
    unsigned n = debug_register(v, i);
    u64 value = soft_code64(v) ? v->cpu.gpr[i->rm] : (u32)v->cpu.gpr[i->rm];

    if (n >= 6 && value >> 32)
        soft_raise_error(v, EXC_GP, 0);
    if (n == 6)
        value = (value & DR6_WRITABLE) | DR6_FIXED;
    else if (n == 7)
        value = (value & DR7_WRITABLE) | DR7_FIXED;
    v->cpu.dr[n] = value;
    soft_mode_changed(v);
    /* Data breakpoints trap behind the very instruction: one at a time from now on. */
    if (v->data_breakpoints)
        atomic_fetch_or(&v->attention, ATTN_SHADOW);
}
