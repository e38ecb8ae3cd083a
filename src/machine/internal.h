/*
 * What the files that make up the machine share: machine.c, its life, and machine_state.c, its state.
 */
#ifndef DOPPEL_MACHINE_INTERNAL_H
#define DOPPEL_MACHINE_INTERNAL_H

#include "bus/clock.h"
#include "bus/io.h"
#include "bus/memory.h"
#include "machine/board.h"
#include "machine/firmware.h"
#include "machine/loader.h"
#include "machine/machine.h"
#include "machine/memory_map.h"
#include "machine/vcpu_thread.h"
#include "x86/cpuid.h"

struct machine {
    struct machine_config config;
    const struct engine_ops *ops; /* config.engine */
    struct event_loop *loop;

    struct vm_clock *clock;
    struct cpuid_model *cpuid;
    struct guest_memory memory;
    struct e820_map e820;
    struct firmware firmware; /* when the configuration names one */
    struct io_bus *ports, *mmio;
    struct engine *engine;
    struct board *board;
    struct vcpu_thread *cpus;
    unsigned ncpus; /* created so far */
    bool running;
    u64 resets;
    u64 started_cpu_ns; /* the process's CPU time at the first start; 0: there was none */

    /* What is asked of the machine: noted on any thread under the lock, done on the loop's. */
    pthread_mutex_t request_lock;
    bool reset_requested, pause_requested;
    bool update_requested;  /* board_update */
    struct machine_end end; /* the first reason wins */
    int request_fd;         /* eventfd that wakes the loop */
    struct fd_watch request_watch;
};

/* Whether the guest or the user asked for the end or a reset, and it is not done yet. */
bool machine_has_request(struct machine *m);
/* Has the engine see what the board says of ROM and RAM. No vCPU may run. */
void machine_update_memory(struct machine *m);
/* Ends the machine with MACHINE_END_ERROR: it will not run again. */
void machine_fail(struct machine *m, const struct error *err);

#endif
