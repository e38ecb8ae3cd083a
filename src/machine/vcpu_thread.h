/*
 * A vCPU's thread: runs the engine, handles the reasons to leave it, and parks when it is told.
 *
 * A thread is running or parked. Requests come from any thread and take effect when the engine leaves
 * the guest, within a millisecond; only a parked vCPU's state may be read or set by others.
 */
#ifndef DOPPEL_MACHINE_VCPU_THREAD_H
#define DOPPEL_MACHINE_VCPU_THREAD_H

#include "engine/engine.h"

#include <pthread.h>
#include <stdatomic.h>

struct vcpu_thread {
    const struct engine_ops *ops;
    struct vcpu *vcpu;
    unsigned index;
    /*
     * The guest can't go on: VCPU_EXIT_SHUTDOWN or VCPU_EXIT_ERROR, with `exit` valid during the call.
     * On the vCPU's thread, which parks itself afterwards.
     */
    void (*stopped)(void *opaque, const struct vcpu_exit *exit);
    void *opaque;

    pthread_t thread;
    pthread_mutex_t lock; /* guards parked, and changes of want */
    pthread_cond_t changed;
    _Atomic unsigned want; /* enum vcpu_want */
    bool parked;
    u64 started_ns; /* host clock at the first resume; 0 before */
    u64 exits[VCPU_EXIT_REASONS];
};

enum vcpu_want { VCPU_WANT_PARK, VCPU_WANT_RUN, VCPU_WANT_QUIT };

/* Creates the vCPU and its thread, parked. `stopped` and `opaque` are as above. */
int vcpu_thread_create(struct vcpu_thread *t, const struct engine_ops *ops, struct engine *engine,
                       unsigned index, void (*stopped)(void *opaque, const struct vcpu_exit *exit),
                       void *opaque, struct error *err);
/* Stops the thread wherever it is, and destroys the vCPU. Not from the thread itself. */
void vcpu_thread_destroy(struct vcpu_thread *t);

/*
 * park: any thread. It only asks, so that several can be asked at once; wait_parked then waits. The last
 * two are for the thread that owns the machine.
 */
void vcpu_thread_park(struct vcpu_thread *t);
void vcpu_thread_wait_parked(struct vcpu_thread *t);
void vcpu_thread_resume(struct vcpu_thread *t);

#endif
