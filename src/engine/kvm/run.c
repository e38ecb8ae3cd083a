/*
 * The run loop.
 *
 * Whoever wants something of a vCPU notes it in the vCPU (kicked, nmi) or the engine (extint), sets
 * run->immediate_exit, and sends a signal when a thread is inside. KVM_RUN looks at immediate_exit
 * as it begins, and the signal ends it when it is under way, so no request is slept over:
 *
 *  1. A request is noted before immediate_exit is set, and that before `inside` is read.
 *  2. The vCPU's thread sets `inside` before it calls KVM_RUN, and clears immediate_exit before it
 *     reads the requests.
 *
 * An exit for I/O is complete only when KVM_RUN is called again: so the loop always calls it after
 * one, with immediate_exit set when it is time to leave, and leaves on EINTR only.
 *
 * An end of interrupt is reported only as KVM is about to enter the guest, and is no part of the state
 * that KVM tells. So before the vCPU is left, KVM is brought to just that point: collect_owed().
 *
 * The 8259's interrupts: KVM says when the vCPU could take one (ready_for_interrupt_injection, which
 * heeds LINT0 too), then the vector is fetched from the PIC and given to KVM for the next entry;
 * until then an exit is asked for (request_interrupt_window).
 */
#include "engine/kvm/kvm.h"

#include <errno.h>
#include <string.h>
#include <sys/ioctl.h>
#include <x86intrin.h>

#define KERNEL_SIGSET_SIZE 8 /* a set of 64 signals, the first bytes of a sigset_t */

enum verdict { GO_ON, LEAVE };

/* --- Requests --- */

static void kick_handler(int signal)
{
}

static int init_result;

static void install_handler(void)
{
    struct sigaction action = {.sa_handler = kick_handler}; /* no SA_RESTART */

    sigemptyset(&action.sa_mask);
    init_result = sigaction(KVM_KICK_SIGNAL, &action, NULL) ? errno : 0;
}

int kvm_run_init(struct error *err)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;

    pthread_once(&once, install_handler);
    return init_result ? error_host(err, init_result, "cannot install a signal handler") : 0;
}

void kvm_attend(struct kvm_vcpu *v)
{
    __atomic_store_n(&v->run->immediate_exit, 1, __ATOMIC_SEQ_CST);
    if (atomic_load(&v->inside))
        pthread_kill(v->thread, KVM_KICK_SIGNAL);
}

/* Fetches the PIC's vector and leaves it with KVM. */
static void queue_extint(struct kvm_vcpu *v)
{
    const struct engine_machine_ops *machine = &v->engine->config.machine;
    int vector = machine->ack_extint(machine->machine);
    struct kvm_interrupt irq = {.irq = (u32)vector};
    struct kvm_regs regs;

    if (vector < 0 || ioctl(v->fd, KVM_GET_REGS, &regs) < 0 ||
        ioctl(v->fd, KVM_INTERRUPT, &irq) < 0)
        return;
    v->extint.queued = true;
    v->extint.vector = (u8)vector;
    v->extint.rip = regs.rip;
    v->extint.rsp = regs.rsp;
}

/*
 * After KVM_RUN: the vector has been delivered, unless KVM never came to enter the guest. Then the
 * guest stands where it stood.
 */
static void settle_extint(struct kvm_vcpu *v, bool interrupted)
{
    struct kvm_vcpu_events events;
    struct kvm_regs regs;

    if (interrupted && ioctl(v->fd, KVM_GET_REGS, &regs) == 0 && regs.rip == v->extint.rip &&
        regs.rsp == v->extint.rsp && ioctl(v->fd, KVM_GET_VCPU_EVENTS, &events) == 0 &&
        !events.interrupt.injected)
        return;
    v->extint.queued = false;
}

/* What is to be done before the guest runs. */
static void prepare(struct kvm_vcpu *v)
{
    if (unlikely(atomic_load(&v->nmi)) && atomic_exchange(&v->nmi, false))
        ioctl(v->fd, KVM_NMI);
    v->run->request_interrupt_window = 0;
    if (likely(!atomic_load(&v->engine->extint)))
        return;
    if (v->run->ready_for_interrupt_injection && !v->extint.queued)
        queue_extint(v);
    v->run->request_interrupt_window = atomic_load(&v->engine->extint);
}

/* --- Exits --- */

static enum verdict fail(struct vcpu_exit *exit)
{
    exit->reason = VCPU_EXIT_ERROR;
    return LEAVE;
}

static enum verdict handle_io(struct kvm_vcpu *v, struct vcpu_exit *exit)
{
    struct io_bus *ports = v->engine->config.ports;
    struct kvm_run *run = v->run;
    u8 *data = (u8 *)run + run->io.data_offset;
    unsigned size = run->io.size;

    for (u32 i = 0; i < run->io.count; i++, data += size) {
        u64 value = 0;

        if (run->io.direction == KVM_EXIT_IO_OUT) {
            memcpy(&value, data, size);
            io_bus_write(ports, run->io.port, value, size);
        } else {
            value = io_bus_read(ports, run->io.port, size);
            memcpy(data, &value, size);
        }
    }
    return GO_ON;
}

/* An access across a page's end comes in two pieces, of any length: the bus takes powers of two. */
static enum verdict handle_mmio(struct kvm_vcpu *v, struct vcpu_exit *exit)
{
    struct io_bus *mmio = v->engine->config.mmio;
    struct kvm_run *run = v->run;
    unsigned len = MIN(run->mmio.len, 8u), size;

    for (unsigned at = 0; at < len; at += size) {
        u64 addr = run->mmio.phys_addr + at, value = 0;

        size = 1u << (31 - __builtin_clz(len - at));
        if (run->mmio.is_write) {
            memcpy(&value, run->mmio.data + at, size);
            io_bus_write(mmio, addr, value, size);
        } else {
            value = io_bus_read(mmio, addr, size);
            memcpy(run->mmio.data + at, &value, size);
        }
    }
    return GO_ON;
}

static enum verdict handle_irq_window(struct kvm_vcpu *v, struct vcpu_exit *exit)
{
    return GO_ON; /* prepare() sees that the vCPU is ready */
}

static enum verdict handle_eoi(struct kvm_vcpu *v, struct vcpu_exit *exit)
{
    const struct engine_machine_ops *machine = &v->engine->config.machine;

    machine->eoi_broadcast(machine->machine, v->run->eoi.vector);
    return GO_ON;
}

static enum verdict handle_msr(struct kvm_vcpu *v, struct vcpu_exit *exit)
{
    kvm_msr_exit(v);
    return GO_ON;
}

static enum verdict handle_ring_full(struct kvm_vcpu *v, struct vcpu_exit *exit)
{
    kvm_dirty_ring_full(v);
    return GO_ON;
}

static enum verdict handle_shutdown(struct kvm_vcpu *v, struct vcpu_exit *exit)
{
    exit->reason = VCPU_EXIT_SHUTDOWN;
    return LEAVE;
}

static enum verdict handle_fail_entry(struct kvm_vcpu *v, struct vcpu_exit *exit)
{
    error_host(&exit->error, EIO, "vCPU %u: the processor refuses the guest's state (reason %#llx)",
               v->index, (unsigned long long)v->run->fail_entry.hardware_entry_failure_reason);
    return fail(exit);
}

static enum verdict handle_internal(struct kvm_vcpu *v, struct vcpu_exit *exit)
{
    struct kvm_regs regs = {0};

    (void)ioctl(v->fd, KVM_GET_REGS, &regs); /* for the message only */
    error_host(&exit->error, EIO, "vCPU %u: KVM gave up at RIP %#llx (suberror %u%s)", v->index,
               (unsigned long long)regs.rip, v->run->internal.suberror,
               v->run->internal.suberror == KVM_INTERNAL_ERROR_EMULATION
                   ? ": an instruction that it can't emulate"
                   : "");
    return fail(exit);
}

static const struct exit_handler {
    enum verdict (*handle)(struct kvm_vcpu *v, struct vcpu_exit *exit);
    enum kvm_exit_class class; /* KVM_CLASSES: not counted */
} handlers[] = {
    [KVM_EXIT_IO] = {handle_io, KVM_CLASS_PORT},
    [KVM_EXIT_MMIO] = {handle_mmio, KVM_CLASS_MMIO},
    [KVM_EXIT_IRQ_WINDOW_OPEN] = {handle_irq_window, KVM_CLASS_IRQ_WINDOW},
    [KVM_EXIT_IOAPIC_EOI] = {handle_eoi, KVM_CLASS_EOI},
    [KVM_EXIT_X86_RDMSR] = {handle_msr, KVM_CLASS_MSR},
    [KVM_EXIT_X86_WRMSR] = {handle_msr, KVM_CLASS_MSR},
    [KVM_EXIT_DIRTY_RING_FULL] = {handle_ring_full, KVM_CLASS_DIRTY_RING},
    [KVM_EXIT_SHUTDOWN] = {handle_shutdown, KVM_CLASSES},
    [KVM_EXIT_FAIL_ENTRY] = {handle_fail_entry, KVM_CLASSES},
    [KVM_EXIT_INTERNAL_ERROR] = {handle_internal, KVM_CLASSES},
};

static void count(struct kvm_vcpu *v, enum kvm_exit_class class, u64 begin)
{
    if (class == KVM_CLASSES)
        return;
    v->counts[class].count++;
    v->counts[class].ticks += __rdtsc() - begin;
}

static enum verdict dispatch(struct kvm_vcpu *v, struct vcpu_exit *exit, u64 begin)
{
    u32 reason = v->run->exit_reason;
    enum verdict verdict;

    if (reason >= ARRAY_SIZE(handlers) || !handlers[reason].handle) {
        error_host(&exit->error, EPROTO, "vCPU %u: KVM exit reason %u is unknown", v->index,
                   reason);
        return fail(exit);
    }
    verdict = handlers[reason].handle(v, exit);
    count(v, handlers[reason].class, begin);
    return verdict;
}

/*
 * Calls KVM_RUN until it has nothing more to report, without the guest running: a signal is pending
 * that KVM_RUN alone doesn't block. immediate_exit wouldn't do: it ends KVM_RUN before KVM looks at
 * what is to be reported; of a signal it takes notice after that, just before it enters the guest.
 */
static enum verdict run_without_entry(struct kvm_vcpu *v, struct vcpu_exit *exit)
{
    enum verdict verdict = GO_ON;

    v->run->request_interrupt_window = 0;
    while (verdict == GO_ON) {
        int ret;

        __atomic_store_n(&v->run->immediate_exit, 0, __ATOMIC_SEQ_CST);
        ret = ioctl(v->fd, KVM_RUN, 0);
        if (unlikely(v->extint.queued))
            settle_extint(v, true);
        if (ret == 0)
            verdict = dispatch(v, exit, __rdtsc());
        else if (!__atomic_load_n(&v->run->immediate_exit, __ATOMIC_SEQ_CST))
            break;
    }
    return verdict;
}

/* The reports that KVM owes are made before the vCPU is left. LEAVE: one of them ended the guest's run. */
static enum verdict collect_owed(struct kvm_vcpu *v, struct vcpu_exit *exit)
{
    union {
        struct kvm_signal_mask head;
        u8 room[sizeof(struct kvm_signal_mask) + KERNEL_SIGSET_SIZE];
    } inside = {.head.len = KERNEL_SIGSET_SIZE};
    enum verdict verdict = GO_ON;
    sigset_t kick, outside;

    sigemptyset(&kick);
    sigaddset(&kick, KVM_KICK_SIGNAL);
    pthread_sigmask(SIG_BLOCK, &kick, &outside);
    memcpy(inside.head.sigset, &outside, KERNEL_SIGSET_SIZE);
    pthread_kill(pthread_self(), KVM_KICK_SIGNAL);
    if (ioctl(v->fd, KVM_SET_SIGNAL_MASK, &inside) == 0) {
        verdict = run_without_entry(v, exit);
        ioctl(v->fd, KVM_SET_SIGNAL_MASK, NULL);
    }
    pthread_sigmask(SIG_SETMASK, &outside, NULL);
    return verdict;
}

/* KVM_RUN failed with `error`. */
static enum verdict interrupted(struct kvm_vcpu *v, struct vcpu_exit *exit, int error, u64 begin)
{
    if (error == EINTR) {
        __atomic_store_n(&v->run->immediate_exit, 0, __ATOMIC_SEQ_CST);
        count(v, KVM_CLASS_KICK, begin);
        if (!atomic_load(&v->kicked))
            return GO_ON;
        if (collect_owed(v, exit) == LEAVE) { /* the kick is for the next time */
            __atomic_store_n(&v->run->immediate_exit, 1, __ATOMIC_SEQ_CST);
            return LEAVE;
        }
        atomic_store(&v->kicked, false);
        exit->reason = VCPU_EXIT_KICKED;
        return LEAVE;
    }
    if (error == EAGAIN) /* it was woken from waiting for INIT */
        return GO_ON;
    error_host(&exit->error, error, "vCPU %u: KVM_RUN", v->index);
    return fail(exit);
}

void kvm_run(struct kvm_vcpu *v, struct vcpu_exit *exit)
{
    enum verdict verdict = GO_ON;

    v->thread = pthread_self();
    atomic_store(&v->inside, true);
    if (kvm_time_enter(v, &exit->error))
        verdict = fail(exit);
    while (verdict == GO_ON) {
        int ret, error;
        u64 begin;

        prepare(v);
        ret = ioctl(v->fd, KVM_RUN, 0);
        error = errno;
        begin = __rdtsc();
        if (unlikely(v->extint.queued))
            settle_extint(v, ret < 0);
        verdict = ret < 0 ? interrupted(v, exit, error, begin) : dispatch(v, exit, begin);
    }
    kvm_time_leave(v);
    atomic_store(&v->inside, false);
}
