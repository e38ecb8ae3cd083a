/*
 * Making translated code stop: for interrupts and whatever else wants the vCPU's attention, and for
 * exceptions of the host.
 *
 * Translated code looks for nothing, so it has to be brought to leave. A signal comes to the vCPU's
 * thread; its handler finds the block that runs, makes all of its direct exits lead to their stubs, and
 * changes jump_key so that the jump cache has nothing. So the code leaves at the end of its block, at an
 * instruction's boundary, and bt_run mends both (bt_relink).
 *
 * No moment is missed:
 *  1. pc in a block: as told. In the last instructions of a jump by the cache, after its comparison: the
 *     handler goes to the way out by itself; RIP is stored already.
 *  2. bt_run has set `armed` and is about to enter: the block to be entered is treated as well. bt_run
 *     looks at v->attention after it set `armed`.
 *  3. In C: v->attention is looked at before the next entry.
 *
 * The sender sets v->attention first, then looks at `running`; bt_run sets `running`, then looks at
 * v->attention. A timer of the thread's own sends the same signal when the APIC timer is due.
 */
#define _GNU_SOURCE
#include "engine/soft/bt/bt.h"

#include "engine/soft/bt/asm.h"
#include "engine/soft/flags.h"
#include "host/pages.h"
#include "host/trap.h"

#include <asm/prctl.h>
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#define KICK_SIGNAL (SIGRTMIN + 2)
#define SIGNAL_STACK KIB(64)
#ifndef SS_AUTODISARM
#define SS_AUTODISARM (1u << 31)
#endif

static _Thread_local struct soft_vcpu *current;

/* --- The handler --- */

static void undo_exits(struct bt *bt, struct bt_block *b)
{
    if (!b)
        return;
    for (u32 n = 0; n < bt->nunlinked; n++)
        if (bt->unlinked[n] == b)
            return;
    if (bt->nunlinked == BT_UNLINKED)
        return; /* the code left already, or is about to: these are the blocks it could be in */
    bt->unlinked[bt->nunlinked] = b;
    bt->nunlinked = bt->nunlinked + 1;
    for (u32 n = b->start.exits; n < b->start.exits + b->nexits; n++)
        if (bt->exits[n].to)
            bt_exit_detach(bt, &bt->exits[n]);
}

/* jmp gs:[S2 * 4 + jump's code], as put_jump emits it */
static bool is_cached_jump(const u8 *pc)
{
    static const u8 jump[] = {0x65, 0x42, 0xff, 0x24, 0xbd};

    return memcmp(pc, jump, sizeof(jump)) == 0;
}

static void on_kick(int sig, siginfo_t *info, void *context)
{
    greg_t *regs = ((ucontext_t *)context)->uc_mcontext.gregs;
    const u8 *pc = (const u8 *)regs[REG_RIP];
    struct soft_vcpu *v = current;
    struct bt_block *b;
    struct bt *bt;

    if (!v)
        return;
    bt = v->bt;
    /* The next to kick sends a signal again: this one may be of a kick that was seen to long ago, and the
     * code goes on when it has left. */
    atomic_store(&bt->kicked, false);
    if (info->si_code == SI_TIMER)
        atomic_fetch_or(&v->attention, ATTN_TIMER);
    b = bt_block_at(bt, pc);
    if (!b && !bt->armed)
        return;
    v->bt_shared.jump_key = JUMP_KEY_NONE;
    undo_exits(bt, b);
    if (bt->armed)
        undo_exits(bt, bt_block_at(bt, v->bt_shared.entry));
    if (b && (is_cached_jump(pc) || (pc[0] == 0x0f && pc[1] == 0x85 && is_cached_jump(pc + 6) &&
                                     (regs[REG_EFL] & EFLAGS_ZF))))
        regs[REG_RIP] = (greg_t)bt_run_at(bt, bt->glue[BT_JUMP]);
}

void bt_relink(struct soft_vcpu *v)
{
    struct bt *bt = v->bt;

    for (u32 k = 0; k < bt->nunlinked; k++) {
        const struct bt_block *b = bt->unlinked[k];

        for (u32 n = b->start.exits; n < b->start.exits + b->nexits; n++)
            if (bt->exits[n].to)
                bt_exit_attach(bt, &bt->exits[n]);
    }
    bt->nunlinked = 0;
    bt_update_key(v);
}

/* --- Exceptions of the host --- */

/*
 * At an instruction that may raise them by itself, or by its access: leave, with everything as it was before
 * it. v->bt_shared.linear is the address of a page fault, and 0 for all others.
 */
static bool on_exception(void *opaque, void *context)
{
    greg_t *regs = ((ucontext_t *)context)->uc_mcontext.gregs;
    struct soft_vcpu *v = opaque;
    struct bt *bt = v->bt;
    const u8 *pc = (const u8 *)regs[REG_RIP];
    const struct bt_block *b = bt_block_at(bt, pc);

    if (!b || v != current)
        return false;
    for (u32 n = b->start.points; n < b->start.points + b->npoints; n++) {
        const struct bt_point *point = &bt->points[n];

        if (bt_run_at(bt, point->at) != pc)
            continue;
        if (point->flags == SITE_FLAGS_HOST)
            v->aflags = aflags_from_eflags((u64)regs[REG_EFL]);
        v->bt_shared.site = n;
        if (bt_is_placed(b->mode))
            v->bt_shared.ip_page = b->page;
        v->bt_shared.linear = regs[REG_TRAPNO] == EXC_PF ? (u64)regs[REG_CR2] : 0;
        regs[REG_RIP] = (greg_t)bt_run_at(bt, b->fault);
        return true;
    }
    return false;
}

/* --- Sending --- */

void bt_kick(struct soft_vcpu *v)
{
    struct bt *bt = v->bt;

    if (atomic_load(&bt->running) && !pthread_equal(bt->thread, pthread_self()) &&
        !atomic_exchange(&bt->kicked, true))
        pthread_kill(bt->thread, KICK_SIGNAL);
}

void bt_set_deadline(struct soft_vcpu *v, u64 deadline)
{
    struct itimerspec at = {0};
    u64 host;

    if (deadline == UINT64_MAX || !atomic_load_explicit(&v->bt->running, memory_order_relaxed))
        return; /* one that fires in vain does no harm */
    host = vm_clock_to_host(v->engine->config.clock, deadline);
    if (v->bt->timer_at && host >= v->bt->timer_at)
        return; /* the earlier signal will have it set anew */
    v->bt->timer_at = MAX(host, 1);
    at.it_value.tv_sec = (time_t)(host / NS_PER_SEC);
    at.it_value.tv_nsec = (long)(host % NS_PER_SEC);
    timer_settime(v->bt->timer, TIMER_ABSTIME, &at, NULL);
}

/* --- Life --- */

static int install_handler(struct error *err)
{
    static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
    static bool installed;
    struct sigaction action = {.sa_sigaction = on_kick,
                               .sa_flags = SA_SIGINFO | SA_ONSTACK | SA_RESTART};
    int ret = 0;

    pthread_mutex_lock(&lock);
    sigemptyset(&action.sa_mask);
    if (!installed && sigaction(KICK_SIGNAL, &action, NULL) != 0)
        ret = error_host(err, errno, "installing a signal handler");
    else
        installed = true;
    pthread_mutex_unlock(&lock);
    return ret;
}

int bt_kick_create(struct soft_vcpu *v, struct error *err)
{
    int ret = install_handler(err);

    if (ret)
        return ret;
    v->bt->signal_stack = pages_alloc(SIGNAL_STACK);
    if (!v->bt->signal_stack)
        return error_host(err, ENOMEM, "a stack for signals");
    return trap_region_add_handler(v->bt->executable, BT_CODE_SIZE, on_exception, v, err);
}

void bt_kick_destroy(struct soft_vcpu *v)
{
    trap_region_remove(v->bt->executable);
    pages_free(v->bt->signal_stack, SIGNAL_STACK);
}

void bt_thread_begin(struct soft_vcpu *v)
{
    struct bt *bt = v->bt;
    stack_t stack = {
        .ss_sp = bt->signal_stack, .ss_size = SIGNAL_STACK, .ss_flags = (int)SS_AUTODISARM};
    struct sigevent event = {.sigev_notify = SIGEV_THREAD_ID, .sigev_signo = KICK_SIGNAL};
    stack_t old;
    sigset_t set;

    syscall(SYS_arch_prctl, ARCH_SET_GS, v);
    sigaltstack(&stack, &old);
    bt->old_stack.sp = old.ss_sp;
    bt->old_stack.size = old.ss_size;
    bt->old_stack.flags = old.ss_flags;
    bt->thread = pthread_self();
    event._sigev_un._tid = (pid_t)syscall(SYS_gettid);
    bt->timer_at = 0;
    timer_create(CLOCK_MONOTONIC, &event, &bt->timer);
    sigemptyset(&set);
    sigaddset(&set, KICK_SIGNAL);
    pthread_sigmask(SIG_UNBLOCK, &set, NULL);
    current = v;
}

void bt_thread_end(struct soft_vcpu *v)
{
    struct bt *bt = v->bt;
    stack_t old = {
        .ss_sp = bt->old_stack.sp, .ss_size = bt->old_stack.size, .ss_flags = bt->old_stack.flags};

    atomic_store(&bt->running, false);
    timer_delete(bt->timer);
    current = NULL;
    sigaltstack(&old, NULL);
}
