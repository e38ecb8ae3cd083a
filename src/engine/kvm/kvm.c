/*
 * The KVM engine: its side of the engine contract (engine/engine.h).
 */
#include "engine/kvm/kvm.h"
#include "host/log.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

/* Machine checks: IA32_MCG_CAP as x86/msr.def says it, four banks and IA32_MCG_CTL. */
#define MCG_CAP 0x104

#define FEATURE_CONTROL_VMX BIT(2) /* outside of SMX (SDM vol. 4, table 2-2) */

/* --- Memory --- */

static bool same_slot(const struct memory_slot *a, const struct memory_slot *b)
{
    return a->gpa == b->gpa && a->size == b->size && a->host == b->host && a->flags == b->flags;
}

static int set_region(struct kvm_engine *e, unsigned n, const struct memory_slot *slot, u64 size,
                      struct error *err)
{
    struct kvm_userspace_memory_region region = {
        .slot = n,
        .guest_phys_addr = slot->gpa,
        .memory_size = size,
        .userspace_addr = (u64)(uintptr_t)slot->host,
    };

    if (slot->flags & MEMORY_ROM)
        region.flags = KVM_MEM_READONLY;
    else if (atomic_load(&e->dirty_logging))
        region.flags = KVM_MEM_LOG_DIRTY_PAGES;
    if (ioctl(e->vm, KVM_SET_USER_MEMORY_REGION, &region) < 0)
        return error_host(err, errno, "KVM refuses guest memory at 0x%llx",
                          (unsigned long long)slot->gpa);
    return 0;
}

static bool is_wanted(const struct guest_memory *memory, const struct memory_slot *slot)
{
    for (unsigned i = 0; i < memory->nslots; i++) {
        if (same_slot(&memory->slots[i], slot))
            return true;
    }
    return false;
}

/* The kernel's slot for this piece: the one that has it, else a free one. */
static unsigned place_of(const struct kvm_engine *e, const struct memory_slot *slot)
{
    unsigned unused = 0;

    for (unsigned n = MEMORY_MAX_SLOTS; n-- > 0;) {
        if (!e->slots[n].slot.size)
            unused = n;
        else if (same_slot(&e->slots[n].slot, slot))
            return n;
    }
    return unused;
}

int kvm_memory_sync(struct kvm_engine *e, struct error *err)
{
    const struct guest_memory *memory = e->config.memory;
    int ret = 0;

    /* What goes makes room for what comes. */
    for (unsigned n = 0; !ret && n < MEMORY_MAX_SLOTS; n++) {
        struct kvm_slot *s = &e->slots[n];

        if (!s->slot.size || is_wanted(memory, &s->slot))
            continue;
        ret = set_region(e, n, &s->slot, 0, err);
        kvm_dirty_free(s);
        s->slot = (struct memory_slot){0};
    }
    for (unsigned i = 0; !ret && i < memory->nslots; i++) {
        unsigned n = place_of(e, &memory->slots[i]);

        ret = set_region(e, n, &memory->slots[i], memory->slots[i].size, err);
        if (!ret)
            e->slots[n].slot = memory->slots[i];
    }
    return ret;
}

static void engine_memory_changed(struct engine *engine)
{
    struct error err;

    if (kvm_memory_sync(kvm_engine_of(engine), &err))
        log_error("%s", err.text);
}

static void engine_memory_written(struct engine *engine, gpa_t gpa, u64 len)
{
    struct kvm_engine *e = kvm_engine_of(engine);

    if (unlikely(atomic_load(&e->dirty_logging)))
        kvm_dirty_mark(e, gpa, len);
}

/* --- Doorbells: the kernel signals their eventfds, and the guest doesn't leave --- */

static void doorbell_changed(void *opaque, u64 addr, int fd, bool there)
{
    struct kvm_engine *e = opaque;
    struct kvm_ioeventfd doorbell = {
        .addr = addr,
        .len = 0, /* writes of any size */
        .fd = fd,
        .flags = there ? 0 : KVM_IOEVENTFD_FLAG_DEASSIGN,
    };

    /* Without it the guest's writes go the ordinary way. */
    if (ioctl(e->vm, KVM_IOEVENTFD, &doorbell) < 0)
        log_once(LOG_WARN, "kvm: no doorbell at %#llx: %s", (unsigned long long)addr,
                 strerror(errno));
}

/* --- Life --- */

static int engine_probe(struct error *err)
{
    int dev = kvm_host_open(err);

    if (dev < 0)
        return dev;
    close(dev);
    return 0;
}

static void engine_destroy(struct engine *engine)
{
    struct kvm_engine *e = kvm_engine_of(engine);

    io_bus_listen(e->config.mmio, (struct io_listener){0});
    for (unsigned n = 0; n < MEMORY_MAX_SLOTS; n++)
        kvm_dirty_free(&e->slots[n]);
    if (e->vm >= 0)
        close(e->vm);
    if (e->dev >= 0)
        close(e->dev);
    pthread_mutex_destroy(&e->time_lock);
    kvm_irq_fini(e);
    pthread_mutex_destroy(&e->dirty_lock);
    free(e);
}

/* Guests get paravirtual features by what their CPUID says only; kernels before 5.10 gave them all. */
static void enforce_pv_cpuid(int vcpu)
{
    struct kvm_enable_cap cap = {.cap = KVM_CAP_ENFORCE_PV_FEATURE_CPUID, .args = {1}};

    (void)ioctl(vcpu, KVM_ENABLE_CAP, &cap);
}

/* XSAVE components that the guest may use and this host can load. */
static u64 find_xcr0(const struct cpuid_model *model)
{
    const u64 known = XCR0_X87 | XCR0_SSE | XCR0_AVX | XCR0_AVX512 | XCR0_PKRU;
    struct cpuid_regs r;

    cpuid_host(0xd, 0, &r);
    return known & cpuid_model_xcr0(model) & (r.eax | (u64)r.edx << 32);
}

static int open_vm(struct kvm_engine *e, struct error *err)
{
    int size;

    e->dev = kvm_host_open(err);
    if (e->dev < 0)
        return e->dev;
    e->vm = kvm_host_create_vm(e->dev, err);
    if (e->vm < 0)
        return e->vm;
    size = ioctl(e->dev, KVM_GET_VCPU_MMAP_SIZE, 0);
    if (size < (int)sizeof(struct kvm_run))
        return error_host(err, size < 0 ? errno : EIO, "KVM_GET_VCPU_MMAP_SIZE");
    e->run_size = (size_t)size;
    e->pv_features = kvm_cpuid_pv_features(e->dev) & ~e->config.pv_off;
    kvm_dirty_init(e);
    return kvm_memory_sync(e, err);
}

static struct engine *engine_create(const struct engine_config *config, struct error *err)
{
    struct kvm_engine *e = calloc(1, sizeof(*e));

    if (!e) {
        error_host(err, ENOMEM, "can't make the KVM engine");
        return NULL;
    }
    e->config = *config;
    e->tsc_hz = cpuid_model_tsc_hz(config->cpuid);
    e->xcr0 = find_xcr0(config->cpuid);
    e->dev = e->vm = -1;
    pthread_mutex_init(&e->dirty_lock, NULL);
    pthread_mutex_init(&e->time_lock, NULL);
    if (kvm_irq_init(e, err) || kvm_run_init(err) || open_vm(e, err)) {
        engine_destroy((struct engine *)e);
        return NULL;
    }
    io_bus_listen(config->mmio, (struct io_listener){doorbell_changed, e});
    return (struct engine *)e;
}

/* --- vCPUs --- */

static void engine_vcpu_destroy(struct vcpu *vcpu)
{
    struct kvm_vcpu *v = kvm_vcpu_of(vcpu);

    atomic_store(&v->engine->vcpus[v->index], NULL);
    kvm_dirty_unmap_ring(v);
    if (v->run)
        munmap(v->run, v->engine->run_size);
    if (v->fd >= 0)
        close(v->fd);
    free(v);
}

/* Virtualisation isn't locked away where the model has it. */
static void offer_nested(const struct cpuid_model *model, struct cpu_msrs *msr)
{
    if (cpuid_model_has(model, FEATURE_VMX))
        msr->feature_control |= FEATURE_CONTROL_VMX;
    if (cpuid_model_has(model, FEATURE_SVM))
        msr->vm_cr = 0;
}

static int reset_state(struct kvm_vcpu *v, struct error *err)
{
    const struct cpuid_dynamic d = {.index = v->index};
    struct lapic_state apic;
    struct cpuid_regs r;
    struct cpu cpu;

    cpu_reset(&cpu, v->index);
    cpuid_model_query(v->engine->config.cpuid, &d, 1, 0, &r);
    offer_nested(v->engine->config.cpuid, &cpu.msr);
    cpu.gpr[RDX] = r.eax; /* the signature (SDM vol. 3, table 9-1) */
    kvm_lapic_reset(cpuid_model_apic_id(v->engine->config.cpuid, v->index), &apic);
    return kvm_state_set(v, &cpu, &apic, err);
}

static void engine_vcpu_reset(struct vcpu *vcpu)
{
    struct error err;

    if (reset_state(kvm_vcpu_of(vcpu), &err))
        log_error("reset: %s", err.text);
}

static int open_vcpu(struct kvm_vcpu *v, struct error *err)
{
    struct kvm_engine *e = v->engine;
    u64 mcg_cap = MCG_CAP;
    void *run;
    int ret;

    v->fd = ioctl(e->vm, KVM_CREATE_VCPU,
                  (unsigned long)cpuid_model_apic_id(e->config.cpuid, v->index));
    if (v->fd < 0)
        return error_host(err, errno, "KVM cannot create vCPU %u", v->index);
    run = mmap(NULL, e->run_size, PROT_READ | PROT_WRITE, MAP_SHARED, v->fd, 0);
    if (run == MAP_FAILED)
        return error_host(err, errno, "cannot map vCPU %u", v->index);
    v->run = run;
    if (ioctl(v->fd, KVM_X86_SETUP_MCE, &mcg_cap) < 0)
        return error_host(err, errno, "vCPU %u: KVM_X86_SETUP_MCE", v->index);
    enforce_pv_cpuid(v->fd);
    ret = kvm_time_check(v->fd, err);
    if (!ret)
        ret = kvm_dirty_map_ring(v, err);
    if (!ret)
        ret = kvm_cpuid_set(v, err);
    if (!ret)
        ret = kvm_msr_find(v, err);
    return ret ? ret : reset_state(v, err);
}

static struct vcpu *engine_vcpu_create(struct engine *engine, unsigned index, struct error *err)
{
    struct kvm_engine *e = kvm_engine_of(engine);
    struct kvm_vcpu *v = index < ARRAY_SIZE(e->vcpus) ? calloc(1, sizeof(*v)) : NULL;

    if (!v) {
        error_host(err, ENOMEM, "can't make vCPU %u", index);
        return NULL;
    }
    v->engine = e;
    v->index = index;
    v->fd = -1;
    if (open_vcpu(v, err)) {
        engine_vcpu_destroy((struct vcpu *)v);
        return NULL;
    }
    e->nvcpus = MAX(e->nvcpus, index + 1);
    atomic_store(&e->vcpus[index], v);
    return (struct vcpu *)v;
}

static void engine_vcpu_run(struct vcpu *vcpu, struct vcpu_exit *exit)
{
    kvm_run(kvm_vcpu_of(vcpu), exit);
}

static void engine_vcpu_kick(struct vcpu *vcpu)
{
    struct kvm_vcpu *v = kvm_vcpu_of(vcpu);

    atomic_store(&v->kicked, true);
    kvm_attend(v);
}

/*
 * A kernel that gave the state once gives it always; the contract has no error here. What is left
 * then is the state after reset, and the log says so.
 */
static void engine_get_state(struct vcpu *vcpu, struct cpu *cpu, struct lapic_state *apic)
{
    struct kvm_vcpu *v = kvm_vcpu_of(vcpu);
    struct error err;

    if (kvm_state_get(v, cpu, apic, &err)) {
        log_error("%s", err.text);
        cpu_reset(cpu, v->index);
        kvm_lapic_reset(cpuid_model_apic_id(v->engine->config.cpuid, v->index), apic);
    }
}

/* --- Interrupts --- */

static void engine_deliver_msi(struct engine *engine, u64 address, u32 data)
{
    kvm_irq_deliver(kvm_engine_of(engine), address, data);
}

static int engine_msi_bind(struct engine *engine, int fd, u64 address, u32 data)
{
    return kvm_irq_bind(kvm_engine_of(engine), fd, address, data);
}

static void engine_msi_unbind(struct engine *engine, int fd)
{
    kvm_irq_unbind(kvm_engine_of(engine), fd);
}

static void engine_set_extint(struct engine *engine, bool level)
{
    kvm_irq_set_extint(kvm_engine_of(engine), level);
}

static void engine_inject_nmi(struct vcpu *vcpu)
{
    struct kvm_vcpu *v = kvm_vcpu_of(vcpu);

    atomic_store(&v->nmi, true);
    kvm_attend(v);
}

static int engine_set_state(struct vcpu *vcpu, const struct cpu *cpu,
                            const struct lapic_state *apic, struct error *err)
{
    struct kvm_vcpu *v = kvm_vcpu_of(vcpu);
    int ret = kvm_state_set(v, cpu, apic, err);

    if (!ret)
        kvm_irq_note_in_service(v, apic);
    return ret;
}

/* --- Dirty log, statistics --- */

static int engine_dirty_log_start(struct engine *engine, struct error *err)
{
    return kvm_dirty_start(kvm_engine_of(engine), err);
}

static void engine_dirty_log_stop(struct engine *engine)
{
    kvm_dirty_stop(kvm_engine_of(engine));
}

static int engine_dirty_log_read(struct engine *engine, const struct memory_slot *slot, u64 *bitmap,
                                 size_t words)
{
    return kvm_dirty_read(kvm_engine_of(engine), slot, bitmap, words);
}

static void engine_stats(struct engine *engine, struct engine_stats *out)
{
    struct kvm_engine *e = kvm_engine_of(engine);
    struct kvm_exit_count sum[KVM_CLASSES] = {0};

    for (unsigned i = 0; i < e->nvcpus; i++) {
        const struct kvm_vcpu *v = atomic_load(&e->vcpus[i]);

        for (unsigned c = 0; v && c < KVM_CLASSES; c++) {
            sum[c].count += v->counts[c].count;
            sum[c].ticks += v->counts[c].ticks;
        }
    }
    *out = (struct engine_stats){
        .exits_port = sum[KVM_CLASS_PORT].count,
        .exits_mmio = sum[KVM_CLASS_MMIO].count,
        .exits_irq_window = sum[KVM_CLASS_IRQ_WINDOW].count,
        .exits_eoi = sum[KVM_CLASS_EOI].count,
        .exits_msr = sum[KVM_CLASS_MSR].count,
        .exits_dirty_ring = sum[KVM_CLASS_DIRTY_RING].count,
        .exits_signal = sum[KVM_CLASS_KICK].count,
        .irqfds = kvm_irq_bound(e),
        .ns_port = clock_ticks_to_ns(sum[KVM_CLASS_PORT].ticks, e->tsc_hz),
        .ns_mmio = clock_ticks_to_ns(sum[KVM_CLASS_MMIO].ticks, e->tsc_hz),
        .ns_irq_window = clock_ticks_to_ns(sum[KVM_CLASS_IRQ_WINDOW].ticks, e->tsc_hz),
        .ns_eoi = clock_ticks_to_ns(sum[KVM_CLASS_EOI].ticks, e->tsc_hz),
        .ns_msr = clock_ticks_to_ns(sum[KVM_CLASS_MSR].ticks, e->tsc_hz),
        .ns_dirty_ring = clock_ticks_to_ns(sum[KVM_CLASS_DIRTY_RING].ticks, e->tsc_hz),
        .ns_signal = clock_ticks_to_ns(sum[KVM_CLASS_KICK].ticks, e->tsc_hz),
    };
}

const struct engine_ops engine_kvm = {
    .name = "kvm",
    .native = true,
    .probe = engine_probe,
    .trial = kvm_trial,
    .max_cpus = kvm_host_max_vcpus,
    .cpuid_support = kvm_cpuid_support,
    .create = engine_create,
    .destroy = engine_destroy,
    .vcpu_create = engine_vcpu_create,
    .vcpu_destroy = engine_vcpu_destroy,
    .vcpu_run = engine_vcpu_run,
    .vcpu_kick = engine_vcpu_kick,
    .vcpu_get_state = engine_get_state,
    .vcpu_set_state = engine_set_state,
    .vcpu_reset = engine_vcpu_reset,
    .deliver_msi = engine_deliver_msi,
    .msi_bind = engine_msi_bind,
    .msi_unbind = engine_msi_unbind,
    .set_extint = engine_set_extint,
    .inject_nmi = engine_inject_nmi,
    .memory_written = engine_memory_written,
    .memory_changed = engine_memory_changed,
    .dirty_log_start = engine_dirty_log_start,
    .dirty_log_stop = engine_dirty_log_stop,
    .dirty_log_read = engine_dirty_log_read,
    .stats = engine_stats,
};
