/*
 * The run loop: attention, then a block, and again.
 *
 * Everything that can divert the processor between two instructions sets a bit of v->attention: interrupts,
 * NMI, INIT, kicks, posted work, and the vCPU's own wish for a careful step. The loop looks at that word
 * once a block and at the APIC timer's deadline once in POLL_BLOCKS blocks, so that nobody has to
 * interrupt this thread.
 *
 * A careful step runs a block of one instruction and does what is due around it: breakpoints, the
 * single-step trap, the interrupt shadows of STI and MOV SS, the clearing of RF. Events are taken in the
 * order of SDM vol. 3, table 6-2.
 *
 * A guest fault unwinds (longjmp) to soft_run, which delivers it; a fault during delivery comes the same
 * way and is combined with the first to a double or triple fault.
 */
#include "engine/soft/run.h"

#include "engine/soft/block.h"
#include "engine/soft/bt/bt.h"
#include "engine/soft/debug.h"
#include "engine/soft/exception.h"
#include "engine/soft/flags.h"
#include "engine/soft/host_exec.h"
#include "engine/soft/lapic.h"
#include "engine/soft/mmu.h"
#include "engine/soft/posts.h"
#include "engine/soft/pv.h"
#include "engine/soft/system.h"
#include "engine/soft/wait.h"

#define POLL_BLOCKS 256

static u64 now(const struct soft_vcpu *v)
{
    return vm_clock_now(v->engine->config.clock);
}

static void leave(struct soft_vcpu *v, enum vcpu_exit_reason reason)
{
    v->exit->reason = reason;
    v->leave = true;
}

/* --- Attention --- */

void soft_attend(struct soft_vcpu *v, u32 bits)
{
    atomic_fetch_or(&v->attention, bits);
    if (atomic_load(&v->waiting))
        soft_wake(v);
    if (v->bt)
        bt_kick(v);
}

/* What others ask for, and the A20 gate. Between blocks. */
static void attend_posts(struct soft_vcpu *v)
{
    gpa_t a20 = atomic_load(&v->engine->a20) ? UINT64_MAX : ~BIT(20);

    soft_take_posts(v);
    if (a20 != v->a20_mask) {
        v->a20_mask = a20;
        soft_tlb_flush(v);
    }
}

/* --- Events --- */

void soft_update_deadline(struct soft_vcpu *v)
{
    v->timer_deadline = lapic_next_deadline(v->lapic);
    if (v->bt)
        bt_set_deadline(v, v->timer_deadline);
}

/* What is looked at once in a while. Between blocks. */
static void poll(struct soft_vcpu *v)
{
    u64 time;

    v->poll = POLL_BLOCKS;
    if (unlikely(host_exec_full(v))) {
        block_cache_flush(v);
        host_exec_restart(v);
    }
    if (v->timer_deadline == UINT64_MAX)
        return;
    time = now(v);
    if (time >= v->timer_deadline) {
        pv_update_steal(v);
        lapic_timer_expire(v->lapic, time);
        soft_update_deadline(v);
    }
}

void soft_set_signature(struct soft_vcpu *v)
{
    struct cpuid_dynamic dynamic = {.index = v->index};
    struct cpuid_regs regs;

    cpuid_model_query(v->cpuid, &dynamic, 1, 0, &regs);
    v->cpu.gpr[RDX] = regs.eax;
}

/* INIT and start-up IPI (SDM vol. 3, 8.4). */
static void take_init(struct soft_vcpu *v)
{
    cpu_init(&v->cpu);
    v->cpu.msr.kvm_pv_eoi = 0;
    soft_set_signature(v);
    lapic_init(v->lapic);
    v->aflags = aflags_from_eflags(v->cpu.rflags);
    soft_tlb_flush(v);
    soft_mode_changed(v);
}
static void take_sipi(struct soft_vcpu *v)
{
    if (v->cpu.activity != CPU_WAIT_FOR_SIPI)
        return;
    cpu_sipi(&v->cpu, atomic_load(&v->sipi_vector));
    soft_mode_changed(v);
    atomic_fetch_or(&v->attention, ATTN_INTERRUPT);
}

static bool take_nmi(struct soft_vcpu *v)
{
    struct cpu *cpu = &v->cpu;

    if (!cpu->nmi_pending || cpu->nmi_blocked || cpu->shadow_ss)
        return false;
    cpu->nmi_pending = false;
    cpu->nmi_blocked = true;
    cpu->activity = CPU_RUNNING;
    v->stats.exits_interrupt++;
    soft_deliver(v, EXC_NMI, CPU_EVENT_NMI, false, 0);
    return true;
}

static bool take_interrupt(struct soft_vcpu *v)
{
    struct engine_machine_ops *machine = &v->engine->config.machine;
    struct cpu *cpu = &v->cpu;
    bool extint = lapic_has_extint(v->lapic);
    int vector = -1;

    lapic_sync_eoi(v->lapic);
    if (!extint && !lapic_has_interrupt(v->lapic)) {
        v->irq_waiting = false;
        return false;
    }
    if (!(cpu->rflags & EFLAGS_IF) || cpu->shadow_sti || cpu->shadow_ss) {
        v->irq_waiting = true;
        return false;
    }
    v->irq_waiting = false;
    if (extint) {
        lapic_ack_extint(v->lapic);
        vector = machine->ack_extint(machine->machine);
    }
    if (vector < 0 && lapic_has_interrupt(v->lapic)) {
        vector = lapic_ack(v->lapic);
        pv_offer_eoi(v);
    }
    /* There may be another behind it. */
    atomic_fetch_or(&v->attention, ATTN_INTERRUPT);
    if (vector < 0)
        return false;
    cpu->activity = CPU_RUNNING;
    v->stats.exits_interrupt++;
    soft_deliver(v, (u8)vector, CPU_EVENT_EXTERNAL, false, 0);
    return true;
}

static bool careful_needed(const struct soft_vcpu *v)
{
    const struct cpu *cpu = &v->cpu;

    return (cpu->rflags & (EFLAGS_TF | EFLAGS_RF)) || cpu->shadow_sti || cpu->shadow_ss ||
           cpu->db_pending || v->data_breakpoints || soft_code_breakpoints_enabled(v);
}

/* Looks at everything that called for attention. */
static void attend(struct soft_vcpu *v)
{
    u32 bits = atomic_exchange(&v->attention, 0);

    v->cur = &insn_none;
    if (bits & ATTN_TIMER) {
        v->bt->timer_at = 0;
        if (v->timer_deadline != UINT64_MAX)
            bt_set_deadline(v, v->timer_deadline);
        poll(v);
    }
    if (bits & ATTN_POSTS)
        attend_posts(v);
    if (bits & ATTN_KICK)
        leave(v, VCPU_EXIT_KICKED);
    if (bits & ATTN_NMI)
        v->cpu.nmi_pending = true;
    if (bits & ATTN_INIT)
        take_init(v);
    if (bits & ATTN_SIPI)
        take_sipi(v);
    if (bits & ATTN_UNHALT)
        v->unhalted = true;
    if (v->unhalted && v->cpu.activity == CPU_HALTED) {
        v->unhalted = false;
        v->cpu.activity = CPU_RUNNING;
    }
    /* Who waits for a start-up IPI takes no interrupt, and looks for them when it starts. */
    if (v->cpu.activity != CPU_RUNNING && v->cpu.activity != CPU_HALTED)
        return;
    /* What follows may unwind: put back what is not looked at yet. */
    atomic_fetch_or(&v->attention, bits & ATTN_INTERRUPT);
    if (careful_needed(v))
        atomic_fetch_or(&v->attention, ATTN_SHADOW);
    if (v->cpu.db_pending && !v->cpu.shadow_ss) { /* of I/O or SYSRET, in an undisturbed block */
        soft_debug_trap(v);
        return;
    }
    if (take_nmi(v))
        return;
    if (bits & (ATTN_INTERRUPT | ATTN_SHADOW)) {
        atomic_fetch_and(&v->attention, ~ATTN_INTERRUPT);
        take_interrupt(v);
    }
}

/* --- Running --- */

void soft_run_block(struct soft_vcpu *v, struct block *b)
{
    v->block = b;
    v->icount += b->count;
    b->insns[0].fn(v, &b->insns[0]);
}

/* Runs blocks until something calls for attention or the poll is due. */
static void run_undisturbed(struct soft_vcpu *v)
{
    while (v->poll && likely(!atomic_load_explicit(&v->attention, memory_order_relaxed))) {
        v->poll--;
        soft_run_block(v, block_cache_find(v));
    }
}

/* Those that enter a handler with TF clear: no single-step trap follows them. SYSCALL and SYSRET ask for
 * theirs by the flags that they load. */
static bool suppresses_step(const struct soft_vcpu *v, const struct insn *i)
{
    return i->run == op_int || i->run == op_int3 || i->run == op_int1 || i->run == op_syscall ||
           i->run == op_sysret || (i->run == op_into && (v->aflags & AFLAG_OF));
}

static void careful_step(struct soft_vcpu *v)
{
    struct cpu *cpu = &v->cpu;
    bool step = cpu->rflags & EFLAGS_TF;

    v->cur = &insn_none;
    if (!cpu->shadow_ss && soft_code_breakpoint(v)) {
        soft_deliver(v, EXC_DB, CPU_EVENT_EXCEPTION, false, 0);
        return;
    }
    cpu->rflags &= ~EFLAGS_RF;
    cpu->shadow_sti = cpu->shadow_ss = false;
    v->mode |= MODE_SINGLE;
    soft_run_block(v, block_cache_find(v));
    v->mode &= ~MODE_SINGLE;
    v->cur = &insn_none;
    if (careful_needed(v))
        atomic_fetch_or(&v->attention, ATTN_SHADOW);
    else
        atomic_fetch_and(&v->attention, ~ATTN_SHADOW);
    if (v->irq_waiting)
        atomic_fetch_or(&v->attention, ATTN_INTERRUPT);
    if (cpu->shadow_ss)
        return; /* what is due waits for the next instruction */
    if (step && !suppresses_step(v, &v->block->insns[0]))
        cpu->db_pending |= DR6_BS;
    if (cpu->db_pending)
        soft_debug_trap(v);
}

/* A guest fault came back by unwinding: deliver it, or what it makes with the one before. */
static void deliver_raised(struct soft_vcpu *v)
{
    struct cpu *cpu = &v->cpu;
    int vector = v->raised.vector;
    bool has_error = v->raised.has_error;
    u32 error = v->raised.error;

    v->stats.exits_exception++;
    v->cur = &insn_none;
    soft_vectors_sync(v);
    if (v->bt)
        v->bt->interp_next = false;
    cpu->shadow_sti = cpu->shadow_ss = false;
    soft_mode_changed(v);
    if (cpu->event_pending) {
        vector = soft_combine(cpu->event_vector, cpu->event_type, v->raised.vector);
        cpu->event_pending = false;
        if (vector < 0) {
            cpu->activity = CPU_SHUTDOWN;
            leave(v, VCPU_EXIT_SHUTDOWN);
            return;
        }
        if (vector == EXC_DF) {
            has_error = true;
            error = 0;
        }
    }
    soft_deliver(v, (u8)vector, CPU_EVENT_EXCEPTION, has_error, error);
}

/* Instructions of the block that the fault kept from running were counted too. */
static void uncount_rest(struct soft_vcpu *v)
{
    const struct block *b = v->block;

    if (b && v->cur >= b->insns && v->cur < b->insns + b->count)
        v->icount -= (u64)(b->insns + b->count - v->cur);
}

static void sleep_or_stop(struct soft_vcpu *v)
{
    if (v->cpu.activity == CPU_SHUTDOWN) {
        leave(v, VCPU_EXIT_SHUTDOWN);
        return;
    }
    v->stats.exits_halt++;
    if (v->bt)
        atomic_store(&v->bt->running, false);
    if (soft_wakes_late(v))
        pv_begin_sleep(v);
    soft_wait_for_attention(v);
    pv_end_sleep(v);
    v->poll = 0;
    poll(v);
}

void soft_run(struct soft_vcpu *v)
{
    v->leave = false;
    v->cur = &insn_none;
    soft_posts_end_sleep(v);
    attend_posts(v);
    soft_mode_changed(v);
    atomic_fetch_or(&v->attention, ATTN_INTERRUPT);
    soft_update_deadline(v);
    if (_setjmp(v->unwind)) {
        uncount_rest(v);
        deliver_raised(v);
    } else if (v->cpu.event_pending) { /* a restored state: the delivery begins anew */
        v->cpu.event_pending = false;
        soft_deliver(v, v->cpu.event_vector, v->cpu.event_type, v->cpu.event_has_error,
                     v->cpu.event_error);
    }
    while (!v->leave) {
        if (v->bt)
            bt_run(v);
        else
            run_undisturbed(v);
        soft_vectors_sync(v); /* what follows is compiled to use them */
        if (v->poll == 0)
            poll(v);
        attend(v);
        if (v->leave)
            break;
        if (v->cpu.activity != CPU_RUNNING)
            sleep_or_stop(v);
        else if (atomic_load_explicit(&v->attention, memory_order_relaxed) & ATTN_SHADOW)
            careful_step(v);
    }
    if (soft_inside_repeated(v))
        v->cpu.rflags |= EFLAGS_RF; /* for whoever goes on from the saved state */
    soft_vectors_sync(v);
    soft_fpu_sync(v);
    lapic_sync_eoi(v->lapic); /* memory may be saved before the processor is */
    soft_posts_begin_sleep(v);
}
