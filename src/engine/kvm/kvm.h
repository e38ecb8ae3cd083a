/*
 * What the files of the KVM engine share.
 *
 *     host.c    /dev/kvm and its capabilities     msr.c    model-specific registers
 *     trial.c   the guest that `auto` tries       lapic.c  the local APIC's two forms
 *     cpuid.c   CPUID, offered and given          time.c   TSC, kvmclock, the APIC timer in a pause
 *     state.c   struct cpu, to KVM and back       dirty.c  the dirty log
 *     run.c     the run loop                      irq.c    messages, irqfds, which EOIs are told
 *     kvm.c     the engine contract; memory
 */
#ifndef DOPPEL_ENGINE_KVM_KVM_H
#define DOPPEL_ENGINE_KVM_KVM_H

#include "engine/engine.h"

#include <linux/kvm.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>

/* Wakes a vCPU's thread from KVM_RUN; the handler does nothing. */
#define KVM_KICK_SIGNAL (SIGRTMIN + 1)

/* GSIs set aside for level-triggered messages, and for eventfds that send messages; see irq.c. */
#define KVM_LEVEL_ROUTES 64
#define KVM_IRQFDS 512

#define KVM_MAX_MSRS 128

enum kvm_exit_class {
    KVM_CLASS_PORT,
    KVM_CLASS_MMIO,
    KVM_CLASS_IRQ_WINDOW,
    KVM_CLASS_EOI,
    KVM_CLASS_MSR,
    KVM_CLASS_DIRTY_RING,
    KVM_CLASS_KICK,
    KVM_CLASSES,
};

struct kvm_exit_count {
    u64 count, ticks; /* host TSC from KVM_RUN's return to its next call */
};

struct kvm_vcpu;

/* A slot as it was given to the kernel, and our own half of its dirty log. */
struct kvm_slot {
    struct memory_slot slot; /* size 0: free */
    _Atomic u64 *dirty;      /* what the VMM wrote, and what rings said; NULL: no log was started */
};

struct kvm_level_route {
    u64 address;
    u32 data;
    u64 used; /* engine->route_clock when it last delivered; 0: free */
};

struct kvm_irqfd_route {
    bool used;
    int fd;
    u32 data;
    u64 address;
};

struct kvm_engine {
    struct engine_config config;
    int dev, vm; /* /dev/kvm, the VM */
    size_t run_size;
    u64 tsc_hz;
    u32 pv_features;  /* of KVM's own, those offered to the guest (CPUID leaf 0x40000001, EAX) */
    u64 xcr0;         /* components that KVM can load */
    u32 ring_entries; /* dirty ring: of each vCPU; 0: the kernel has bitmaps only */

    struct kvm_slot slots[MEMORY_MAX_SLOTS];
    _Atomic bool dirty_logging;
    pthread_mutex_t dirty_lock; /* harvest of the rings */

    pthread_mutex_t route_lock;
    struct kvm_level_route routes[KVM_LEVEL_ROUTES];
    u64 route_clock;
    struct kvm_irqfd_route irqfds[KVM_IRQFDS];
    struct kvm_irq_routing *route_table; /* room for what give_routes tells the kernel */

    _Atomic bool extint;

    /* Time; see time.c. */
    pthread_mutex_t time_lock;
    u64 origin_ns;     /* host ns at which the VM clock read 0; 0: it never ran here */
    u64 tsc_origin;    /* host TSC - this = VM TSC */
    _Atomic u64 drift; /* VM TSC by the host's TSC, less VM TSC by the VM clock */

    unsigned nmsrs; /* the MSRs that this kernel keeps for a guest */
    u32 msrs[KVM_MAX_MSRS];

    struct kvm_vcpu *_Atomic vcpus[256];
    unsigned nvcpus;
};

struct kvm_vcpu {
    struct kvm_engine *engine;
    unsigned index;
    int fd;
    struct kvm_run *run;
    struct kvm_dirty_gfn *ring; /* NULL: none */
    u32 ring_next;

    /* Requests from other threads; see run.c. */
    _Atomic bool kicked;
    _Atomic bool nmi;
    _Atomic bool inside; /* in vcpu_run: `thread` is who runs it */
    pthread_t thread;

    /* An ExtINT vector that KVM holds for the next entry, and where the guest stood. */
    struct {
        bool queued;
        u8 vector;
        u64 rip, rsp;
    } extint;

    /* Time; see time.c. */
    u64 origin_ns;  /* of the engine, when the TSC was last set; 0: it is to be set */
    u64 tsc_offset; /* to be set, when origin_ns is 0 */
    /* From the last leave, or as set since: the APIC, IA32_TSC_DEADLINE, and the VM ns then. */
    struct kvm_lapic_state left_apic;
    u64 left_deadline;
    u64 left_ns;

    struct kvm_exit_count counts[KVM_CLASSES];
};

static inline struct kvm_engine *kvm_engine_of(struct engine *e)
{
    return (struct kvm_engine *)e;
}
static inline struct kvm_vcpu *kvm_vcpu_of(struct vcpu *v)
{
    return (struct kvm_vcpu *)v;
}

/* --- host.c --- */

/* Opens /dev/kvm and checks all that the engine needs of it. The fd, or -errno with err set. */
int kvm_host_open(struct error *err);
/* The most vCPUs that this host's KVM gives a VM; 1 when there is no KVM. */
unsigned kvm_host_max_vcpus(void);
/* What KVM_CHECK_EXTENSION says of `cap` on fd (the device or a VM): 0 or less when it isn't there. */
int kvm_host_cap(int fd, unsigned cap);
/* Creates a VM with the kernel's local APICs. The fd, or -errno with err set. */
int kvm_host_create_vm(int dev, struct error *err);

/* --- trial.c --- */

/* Runs the trial guest: 0 when KVM ran it correctly and at the processor's speed. */
int kvm_trial(struct error *err);

/* --- cpuid.c --- */

void kvm_cpuid_support(struct cpuid_support *out);
/* KVM's paravirtual features for the guest, as CPUID leaf 0x40000001 shows them in EAX. */
u32 kvm_cpuid_pv_features(int dev);
/* Gives the vCPU its CPUID by the model. */
int kvm_cpuid_set(struct kvm_vcpu *v, struct error *err);
/* Where XSAVE component i lies in KVM's image; false: this host has none. */
bool kvm_xsave_place(unsigned i, u32 *offset, u32 *size);

/* --- msr.c --- */

/* Finds which MSRs this kernel keeps; once an engine, on its first vCPU. */
int kvm_msr_find(struct kvm_vcpu *v, struct error *err);
int kvm_msr_get(struct kvm_vcpu *v, struct cpu_msrs *out, struct error *err);
int kvm_msr_set(struct kvm_vcpu *v, const struct cpu_msrs *in, struct error *err);
/* One MSR. 0, or -errno when KVM refuses. */
int kvm_msr_read(struct kvm_vcpu *v, u32 number, u64 *value);
int kvm_msr_write(struct kvm_vcpu *v, u32 number, u64 value);
/* The guest's access to an MSR that KVM doesn't know: fills run->msr. */
void kvm_msr_exit(struct kvm_vcpu *v);

/* --- lapic.c --- */

/* The APIC's registers at VM time `now`, which is when KVM gave them. */
void kvm_lapic_to_state(const struct kvm_lapic_state *in, u64 base, u64 deadline, u64 now,
                        struct lapic_state *out);
void kvm_lapic_from_state(const struct lapic_state *in, u64 now, struct kvm_lapic_state *out);
/* The state after RESET; the processor with APIC ID 0 is the first. */
void kvm_lapic_reset(u32 id, struct lapic_state *out);
/* A register by its MMIO offset. */
u32 kvm_lapic_reg(const struct kvm_lapic_state *s, unsigned offset);
void kvm_lapic_set_reg(struct kvm_lapic_state *s, unsigned offset, u32 value);

/* --- state.c --- */

int kvm_state_get(struct kvm_vcpu *v, struct cpu *cpu, struct lapic_state *apic, struct error *err);
int kvm_state_set(struct kvm_vcpu *v, const struct cpu *cpu, const struct lapic_state *apic,
                  struct error *err);

/* --- time.c --- */

/* Before the vCPU runs, and after: what a pause may not change. 0 or -errno, err set. */
int kvm_time_enter(struct kvm_vcpu *v, struct error *err);
void kvm_time_leave(struct kvm_vcpu *v);
int kvm_time_get_apic(struct kvm_vcpu *v, struct kvm_lapic_state *apic, struct error *err);
/* struct cpu's tsc_offset: what it is; what it shall be when the vCPU runs next. */
u64 kvm_time_tsc_offset(struct kvm_vcpu *v);
void kvm_time_set_tsc_offset(struct kvm_vcpu *v, u64 offset);
/* 0 when KVM lets us set a vCPU's TSC offset. */
int kvm_time_check(int vcpu, struct error *err);

/* --- run.c --- */

/* Makes KVM_RUN return soon, to look at the requests. Any thread. */
void kvm_attend(struct kvm_vcpu *v);
void kvm_run(struct kvm_vcpu *v, struct vcpu_exit *exit);
/* Once a process: the handler of KVM_KICK_SIGNAL. */
int kvm_run_init(struct error *err);

/* --- irq.c: any thread, device locks held --- */

/* 0 or -errno with err set; kvm_irq_fini is to be called in either case. */
int kvm_irq_init(struct kvm_engine *e, struct error *err);
void kvm_irq_fini(struct kvm_engine *e);
/* The engine contract's deliver_msi, msi_bind, msi_unbind and set_extint. */
void kvm_irq_deliver(struct kvm_engine *e, u64 address, u32 data);
int kvm_irq_bind(struct kvm_engine *e, int fd, u64 address, u32 data);
void kvm_irq_unbind(struct kvm_engine *e, int fd);
void kvm_irq_set_extint(struct kvm_engine *e, bool level);
/* How many eventfds are bound. */
unsigned kvm_irq_bound(struct kvm_engine *e);
/*
 * Level-triggered interrupts that a state brings along were sent to another engine: the kernel is to report
 * their EOIs all the same, and for that it suffices to know their vectors.
 */
void kvm_irq_note_in_service(struct kvm_vcpu *v, const struct lapic_state *apic);

/* --- kvm.c --- */

/* Gives the kernel the slots of the guest's memory as they are now. */
int kvm_memory_sync(struct kvm_engine *e, struct error *err);

/* --- dirty.c --- */

/* Turns the rings on, where the kernel has them; before there is a vCPU. */
void kvm_dirty_init(struct kvm_engine *e);
int kvm_dirty_map_ring(struct kvm_vcpu *v, struct error *err);
void kvm_dirty_unmap_ring(struct kvm_vcpu *v);
/* The ring is full: empties it. On the vCPU's thread. */
void kvm_dirty_ring_full(struct kvm_vcpu *v);
void kvm_dirty_mark(struct kvm_engine *e, gpa_t gpa, u64 len);
int kvm_dirty_start(struct kvm_engine *e, struct error *err);
void kvm_dirty_stop(struct kvm_engine *e);
int kvm_dirty_read(struct kvm_engine *e, const struct memory_slot *slot, u64 *bitmap, size_t words);
void kvm_dirty_free(struct kvm_slot *slot);

#endif
