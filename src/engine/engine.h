/*
 * The engine contract: one interface under which kvm, bt and interp run the same machine.
 *
 * An engine runs vCPUs on threads that the machine makes: vcpu_run is called on the vCPU's own thread and
 * returns when the vCPU must leave. Accesses to ports and MMIO go to the machine's buses; the engine
 * knows the buses, not who answers. The local APICs are the engine's; all other interrupt controllers
 * are the machine's, and speak to the engine by deliver_msi and set_extint.
 *
 * Threads: vcpu_run, vcpu_get_state and vcpu_set_state belong to the vCPU's thread, or to any one thread
 * while the vCPU is not running. vcpu_kick, deliver_msi, msi_bind, msi_unbind, set_extint, inject_nmi and
 * memory_written may be called from any thread, with device locks held.
 */
#ifndef DOPPEL_ENGINE_ENGINE_H
#define DOPPEL_ENGINE_ENGINE_H

#include "bus/clock.h"
#include "bus/io.h"
#include "bus/memory.h"
#include "host/error.h"
#include "host/types.h"
#include "x86/cpu.h"
#include "x86/cpuid.h"
#include "x86/lapic.h"

struct engine;
struct perf_map;
struct vcpu;

enum vcpu_exit_reason {
    VCPU_EXIT_KICKED,   /* vcpu_kick was called */
    VCPU_EXIT_HALT,     /* HLT with interrupts off and none that could wake it but NMI, INIT, SMI */
    VCPU_EXIT_SHUTDOWN, /* triple fault */
    VCPU_EXIT_HYPERCALL, /* VMCALL or VMMCALL (the engine skips it; the machine sets RAX) */
    VCPU_EXIT_DEBUG,     /* a debugger's breakpoint */
    VCPU_EXIT_ERROR,     /* the engine can't go on: text in vcpu_exit.error */
    VCPU_EXIT_REASONS,
};

struct vcpu_exit {
    enum vcpu_exit_reason reason;
    struct error error;
};

/* How the engine reaches interrupt controllers beyond the local APIC, and the rest of the machine. */
struct engine_machine_ops {
    /* INTA cycle: the vector from the 8259 pair, when the ExtINT line is up (-1: spurious, none). */
    int (*ack_extint)(void *machine);
    /* EOI broadcast of a level-triggered vector to the IOAPICs. */
    void (*eoi_broadcast)(void *machine, u8 vector);
    void *machine;
};

/* What may follow the name in --engine: bt[,verify][,seed=N]. */
struct engine_checks {
    bool verify; /* run in lockstep with the interpreter */
    u64 seed;    /* of the translator's free choices, for tests; 0: the best ones */
};

struct engine_config {
    struct guest_memory *memory; /* slots may be added later: memory_changed */
    struct io_bus *ports, *mmio;
    struct vm_clock *clock;
    struct engine_machine_ops machine;
    const struct cpuid_model *cpuid;
    unsigned ncpus;
    unsigned host_cpus; /* processors of the host that the vCPUs may run on */
    struct engine_checks checks;
    u32 pv_off; /* of KVM's paravirtual features, bits of EAX in CPUID leaf 0x40000001: not offered */
    struct perf_map *perf_map; /* bt: where translated code is told to perf; NULL: nowhere */
};

struct engine_stats {
    u64 instructions; /* interp: guest instructions; 0 where unknown */
    u64 exits_port, exits_mmio, exits_halt, exits_irq_window, exits_exception, exits_interrupt;
    u64 exits_eoi, exits_msr, exits_dirty_ring, exits_signal; /* kvm */
    u64 irqfds; /* kvm: eventfds that send a message, now */
    /* kvm: what they took in this process, from exit to entry. */
    u64 ns_port, ns_mmio, ns_irq_window, ns_eoi, ns_msr, ns_dirty_ring, ns_signal;
    u64 blocks_decoded, blocks_translated, cache_bytes, tlb_misses, tlb_flushes, smc_invalidations;
    u64 blocks_adopted; /* bt: copied from another vCPU's translation */
    u64 blocks_evicted; /* bt: that made room for others */
    u64 direct_mappings,
        direct_faults; /* bt: made at the guest's own addresses; met by accesses there */
    u64 spins;         /* times that a vCPU which spun gave way (soft) */
};

struct engine_ops {
    const char *name;
    bool native; /* guest code runs as fast as the VMM's: what it can do for itself is left to it */
    bool maps_memory; /* guest memory is to be in a file, which the engine maps at further places */

    /* 0 when this host can run it; else an error whose text says why not. */
    int (*probe)(struct error *err);
    /*
     * Runs a small guest for some milliseconds: 0 when it ran as it should, else an error whose text
     * says how not. For `auto`, after probe. NULL: an engine that can be trusted.
     */
    int (*trial)(struct error *err);
    /* The most vCPUs that a machine can have; NULL: one. */
    unsigned (*max_cpus)(void);
    /* The CPUID features that it can offer on this host. */
    void (*cpuid_support)(struct cpuid_support *out);
    struct engine *(*create)(const struct engine_config *config, struct error *err);
    void (*destroy)(struct engine *e);

    struct vcpu *(*vcpu_create)(struct engine *e, unsigned index, struct error *err);
    void (*vcpu_destroy)(struct vcpu *v);
    /* Runs guest code until an exit; fills *exit. HLT with interrupts on sleeps inside. */
    void (*vcpu_run)(struct vcpu *v, struct vcpu_exit *exit);
    /* Makes vcpu_run return VCPU_EXIT_KICKED soon (within 1 ms), once per call at least. */
    void (*vcpu_kick)(struct vcpu *v);

    /* The whole architectural state, the local APIC's too. */
    void (*vcpu_get_state)(struct vcpu *v, struct cpu *cpu, struct lapic_state *apic);
    int (*vcpu_set_state)(struct vcpu *v, const struct cpu *cpu, const struct lapic_state *apic,
                          struct error *err);
    /* Power-on or machine reset. */
    void (*vcpu_reset)(struct vcpu *v);

    void (*deliver_msi)(struct engine *e, u64 address, u32 data);
    /*
     * From now on a signal of the eventfd sends this message, in place of the one that it was bound to.
     * 0, or -errno when there is no room, or the message isn't such: it is to be delivered then. NULL where
     * the engine has no such thing. The eventfd stays the caller's, and open until it is unbound.
     */
    int (*msi_bind)(struct engine *e, int fd, u64 address, u32 data);
    void (*msi_unbind)(struct engine *e, int fd);
    /* The 8259 pair's INTR output, wired to every LINT0. */
    void (*set_extint)(struct engine *e, bool level);
    /* The A20 gate: off, address bit 20 reads as zero. NULL where the engine can't do that. */
    void (*set_a20)(struct engine *e, bool on);
    /* NMI to one vCPU. */
    void (*inject_nmi)(struct vcpu *v);

    /* Somebody else wrote guest memory: drop code decoded from there, mark it dirty. */
    void (*memory_written)(struct engine *e, gpa_t gpa, u64 len);
    /* The slot list or a slot's flags changed; all vCPUs are stopped. */
    void (*memory_changed)(struct engine *e);

    /* Dirty log: pages written since the last read, one bit a page from the slot's start. */
    int (*dirty_log_start)(struct engine *e, struct error *err);
    void (*dirty_log_stop)(struct engine *e);
    int (*dirty_log_read)(struct engine *e, const struct memory_slot *slot, u64 *bitmap,
                          size_t words);

    void (*stats)(struct engine *e, struct engine_stats *out);
};

/* All engines of this build, best first; ends with NULL. */
extern const struct engine_ops *const engines[];
extern const struct engine_ops engine_interp, engine_bt, engine_kvm;

/* `name` as in --engine ("auto", "interp", ...); on failure NULL, and err says what is to be had. */
const struct engine_ops *engine_choose(const char *name, struct engine_checks *checks,
                                       struct error *err);

#endif
