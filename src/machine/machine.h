/*
 * The machine: memory, clock, buses, board, engine and vCPUs as one, and its life.
 *
 * Threads: one a vCPU, and the event loop's, which is the one that calls machine_run. All functions
 * here are for that thread, but for machine_quit. What a guest asks of the machine (power off,
 * reset) is noted on whatever thread it arrives, stops the vCPUs at once, and is done on the loop's.
 */
#ifndef DOPPEL_MACHINE_MACHINE_H
#define DOPPEL_MACHINE_MACHINE_H

#include "engine/engine.h"
#include "host/error.h"
#include "host/event_loop.h"
#include "host/processors.h"
#include "machine/cards.h"
#include "machine/firmware.h"

struct chardev;
struct machine;
struct i8042;
struct vga;
struct virtio_balloon;
struct state_reader;
struct state_writer;

/* Strings and the stream are borrowed, and must outlive the machine. */
struct machine_config {
    const struct engine_ops *engine;
    struct engine_checks checks;
    struct perf_map *perf_map; /* as in struct engine_config */
    const char *cpu;           /* name of the CPUID model */
    bool nested;               /* it offers the host's virtualisation */
    u64 memory;                /* bytes */
    struct memory_options memory_options;
    unsigned cpus;
    struct processor_list pin;               /* where they run on the host */
    u32 pv_off;                              /* as in struct engine_config */
    struct cpu_topology topology;            /* of the cpus; all 0: cores of one socket */
    const char *kernel, *initrd, *cmdline;   /* as in struct loader_request */
    struct firmware_config firmware;         /* in place of a kernel */
    struct chardev *serial;                  /* what COM1 is connected to, or NULL */
    const struct machine_disks *disks;       /* NULL: none */
    const struct machine_consoles *consoles; /* NULL: none */
    const struct machine_nets *nets;         /* NULL: none */
    const struct machine_pmems *pmems;       /* NULL: none */
    const struct machine_shares *shares;     /* NULL: none */
    bool shares_memory;                      /* with backends in other processes (vhost-user) */
    u16 debug_exit_port;                     /* 0: none */
    bool no_reboot;                          /* a reset ends the machine */
    unsigned slots; /* for cards that come and go; MACHINE_SLOTS_MAX at most */
    /* The card in a slot (from 0) is gone, and what it worked with is free. May be NULL. */
    void (*card_gone)(void *opaque, unsigned slot);
    void *opaque;
};

enum machine_end_reason {
    MACHINE_END_NONE,
    MACHINE_END_POWER_OFF,
    MACHINE_END_RESET, /* under no_reboot */
    MACHINE_END_TRIPLE_FAULT,
    MACHINE_END_DEBUG_EXIT, /* value: the exit status */
    MACHINE_END_QUIT,       /* machine_quit */
    MACHINE_END_ERROR,      /* error says why */
};

struct machine_end {
    enum machine_end_reason reason;
    u32 value;
    struct error error;
};

struct machine_stats {
    u64 first_instruction_ns;     /* host clock; 0: none was run */
    u64 first_instruction_cpu_ns; /* the process's CPU time until then */
    u64 guest_resident;           /* bytes of guest memory in the host's RAM */
    u64 resets;
    u64 exits[VCPU_EXIT_REASONS]; /* of all vCPUs; read when they are parked */
    struct engine_stats engine;
};

/* A machine at power-on with its kernel loaded, not started. The loop must outlive it. */
struct machine *machine_create(const struct machine_config *config, struct event_loop *loop,
                               struct error *err);
/* Stops it where it is. */
void machine_destroy(struct machine *m);

/* Runs the event loop, from machine_start on, until the machine ends; the vCPUs are parked then. */
void machine_run(struct machine *m, struct machine_end *end);

/* Starts or goes on: the clock and all vCPUs. A machine that has ended stays as it is. */
void machine_start(struct machine *m);
/* Stops all vCPUs, devices, and then the clock. Returns when they have stopped. */
void machine_pause(struct machine *m);
/*
 * What the reset button does: processors and devices to their power-on state, the kernel loaded
 * afresh. Memory keeps what the loader doesn't write. A paused machine stays paused.
 */
int machine_reset(struct machine *m, struct error *err);

/*
 * Puts a card into a slot, paused or not; the guest is told. What disk and net point to is borrowed until card_gone.
 * -EINVAL with err set when there is no such slot or it is taken, else what creating it came to.
 */
int machine_plug_disk(struct machine *m, unsigned slot, const struct machine_disk *disk,
                      struct error *err);
int machine_plug_net(struct machine *m, unsigned slot, struct net_backend *net, struct error *err);
/*
 * Asks the guest to let the card go: card_gone is called when it did, at any time later. It may never do so: with
 * `force` the card is taken at once, which for the guest is a card that was pulled out. 0, -EINVAL for an empty
 * slot, -EBUSY while the guest is at work on it.
 */
int machine_unplug(struct machine *m, unsigned slot, bool force, struct error *err);

/*
 * The whole state of a paused machine: clock, memory, devices, processors. -EBUSY while the guest's
 * request for a reset or its end waits to be done.
 */
int machine_save(struct machine *m, struct state_writer *w, struct error *err);
/*
 * Puts a saved state in the place of a paused machine's own. The machine must be of the same kind:
 * memory, processors and their model. When that is not so, the machine is as it was; when the state
 * turns out damaged later on, the machine ends: it can't be started, and machine_run returns the error.
 */
int machine_load(struct machine *m, struct state_reader *r, struct error *err);
/* The name of the first thing in which the states of two paused machines differ, in buf, or NULL. */
const char *machine_compare(struct machine *a, struct machine *b, char *buf, size_t buflen);

/* The screen (NULL: there is none), and the keyboard with its mouse. May be used at any time until machine_destroy. */
struct vga *machine_vga(struct machine *m);
struct i8042 *machine_keyboard(struct machine *m);
/* The balloon, which every machine has. May be used until machine_destroy, too. */
struct virtio_balloon *machine_balloon(struct machine *m);

/* Ends machine_run with MACHINE_END_QUIT. Any thread. */
void machine_quit(struct machine *m);

void machine_stats(struct machine *m, struct machine_stats *out);

#endif
