#define _GNU_SOURCE /* pthread_setname_np */
#include "machine/vcpu_thread.h"

#include "host/event_loop.h"
#include "host/log.h"

#include <errno.h>
#include <stdio.h>

/* What VMCALL answers where no hypercall interface is offered, as a guest of KVM knows it. */
#define HYPERCALL_ENOSYS (-1000LL)

enum verdict { VCPU_CONTINUE, VCPU_STOP };

static void want(struct vcpu_thread *t, enum vcpu_want what)
{
    pthread_mutex_lock(&t->lock);
    if (atomic_load(&t->want) != VCPU_WANT_QUIT)
        atomic_store(&t->want, what);
    pthread_cond_broadcast(&t->changed);
    pthread_mutex_unlock(&t->lock);
}

static enum verdict handle_kicked(struct vcpu_thread *t, const struct vcpu_exit *exit)
{
    return VCPU_CONTINUE;
}

/*
 * HLT with interrupts off: the end of what this processor does, until the machine is reset. A guest
 * that has said "System halted" waits here, and costs nothing.
 */
static enum verdict handle_halt(struct vcpu_thread *t, const struct vcpu_exit *exit)
{
    log_once(LOG_INFO, "cpu %u halted with interrupts off", t->index);
    pthread_mutex_lock(&t->lock);
    while (atomic_load(&t->want) == VCPU_WANT_RUN)
        pthread_cond_wait(&t->changed, &t->lock);
    pthread_mutex_unlock(&t->lock);
    return VCPU_CONTINUE;
}

static enum verdict handle_stop(struct vcpu_thread *t, const struct vcpu_exit *exit)
{
    t->stopped(t->opaque, exit);
    return VCPU_STOP;
}

static enum verdict handle_hypercall(struct vcpu_thread *t, const struct vcpu_exit *exit)
{
    struct lapic_state apic;
    struct vcpu_exit failed;
    struct cpu cpu;

    t->ops->vcpu_get_state(t->vcpu, &cpu, &apic);
    cpu.gpr[RAX] = (u64)HYPERCALL_ENOSYS;
    failed.reason = VCPU_EXIT_ERROR;
    if (t->ops->vcpu_set_state(t->vcpu, &cpu, &apic, &failed.error))
        return handle_stop(t, &failed);
    return VCPU_CONTINUE;
}

/* No debugger sets breakpoints, so an engine that reports one is out of order. */
static enum verdict handle_debug(struct vcpu_thread *t, const struct vcpu_exit *exit)
{
    struct vcpu_exit failed = {.reason = VCPU_EXIT_ERROR};

    error_host(&failed.error, EPROTO, "engine %s: breakpoint without a debugger", t->ops->name);
    return handle_stop(t, &failed);
}

static enum verdict (*const handlers[VCPU_EXIT_REASONS])(struct vcpu_thread *t,
                                                         const struct vcpu_exit *exit) = {
    [VCPU_EXIT_KICKED] = handle_kicked, [VCPU_EXIT_HALT] = handle_halt,
    [VCPU_EXIT_SHUTDOWN] = handle_stop, [VCPU_EXIT_HYPERCALL] = handle_hypercall,
    [VCPU_EXIT_DEBUG] = handle_debug,   [VCPU_EXIT_ERROR] = handle_stop,
};

/* Parks while that is wanted. False when the thread is to end. */
static bool attend(struct vcpu_thread *t)
{
    if (likely(atomic_load(&t->want) == VCPU_WANT_RUN))
        return true;
    pthread_mutex_lock(&t->lock);
    t->parked = true;
    pthread_cond_broadcast(&t->changed);
    while (atomic_load(&t->want) == VCPU_WANT_PARK)
        pthread_cond_wait(&t->changed, &t->lock);
    t->parked = false;
    pthread_mutex_unlock(&t->lock);
    return atomic_load(&t->want) != VCPU_WANT_QUIT;
}

static void *vcpu_thread_main(void *opaque)
{
    struct vcpu_thread *t = opaque;
    struct vcpu_exit exit;

    while (attend(t)) {
        t->ops->vcpu_run(t->vcpu, &exit);
        t->exits[exit.reason]++;
        if (handlers[exit.reason](t, &exit) == VCPU_STOP)
            want(t, VCPU_WANT_PARK);
    }
    return NULL;
}

int vcpu_thread_create(struct vcpu_thread *t, const struct engine_ops *ops, struct engine *engine,
                       unsigned index, void (*stopped)(void *opaque, const struct vcpu_exit *exit),
                       void *opaque, struct error *err)
{
    char name[16];
    int ret;

    *t = (struct vcpu_thread){
        .ops = ops, .index = index, .stopped = stopped, .opaque = opaque, .want = VCPU_WANT_PARK};
    t->vcpu = ops->vcpu_create(engine, index, err);
    if (!t->vcpu)
        return err->class == ERROR_INPUT ? -EINVAL : -EIO;
    pthread_mutex_init(&t->lock, NULL);
    pthread_cond_init(&t->changed, NULL);
    ret = pthread_create(&t->thread, NULL, vcpu_thread_main, t);
    if (ret) {
        pthread_cond_destroy(&t->changed);
        pthread_mutex_destroy(&t->lock);
        ops->vcpu_destroy(t->vcpu);
        return error_host(err, ret, "cannot create a thread for cpu %u", index);
    }
    snprintf(name, sizeof(name), "cpu-%u", index);
    pthread_setname_np(t->thread, name);
    return 0;
}

void vcpu_thread_destroy(struct vcpu_thread *t)
{
    want(t, VCPU_WANT_QUIT);
    t->ops->vcpu_kick(t->vcpu);
    pthread_join(t->thread, NULL);
    pthread_cond_destroy(&t->changed);
    pthread_mutex_destroy(&t->lock);
    t->ops->vcpu_destroy(t->vcpu);
}

void vcpu_thread_park(struct vcpu_thread *t)
{
    want(t, VCPU_WANT_PARK);
    t->ops->vcpu_kick(t->vcpu);
}

void vcpu_thread_wait_parked(struct vcpu_thread *t)
{
    pthread_mutex_lock(&t->lock);
    while (!t->parked)
        pthread_cond_wait(&t->changed, &t->lock);
    pthread_mutex_unlock(&t->lock);
}

void vcpu_thread_resume(struct vcpu_thread *t)
{
    if (!t->started_ns)
        t->started_ns = host_clock_ns();
    want(t, VCPU_WANT_RUN);
}
