/*
 * The event loop: one thread that waits in epoll for file descriptors and timers.
 *
 * Lifetime: timers and watches are owned by the caller, embedded in its structs, and must be
 * removed before their memory goes. Callbacks run on the loop's thread with no lock of the loop held.
 * Timers and watches start out zeroed but for the members that the caller sets.
 * Everything but event_loop_run may be called from any thread.
 */
#ifndef DOPPEL_HOST_EVENT_LOOP_H
#define DOPPEL_HOST_EVENT_LOOP_H

#include "host/error.h"
#include "host/types.h"

struct event_loop;

/* NULL with err set when the host is out of file descriptors or memory. */
struct event_loop *event_loop_create(struct error *err);
/* Not while it runs. What was posted and has not run is forgotten. NULL is fine. */
void event_loop_destroy(struct event_loop *loop);

/* Runs until event_loop_stop; returns at once when stop was called before. May run again then. */
void event_loop_run(struct event_loop *loop);
void event_loop_stop(struct event_loop *loop);

/* Runs fn(opaque) on the loop's thread soon. Returns 0 or -ENOMEM. */
int event_loop_post(struct event_loop *loop, void (*fn)(void *opaque), void *opaque);

struct fd_watch {
    int fd;
    u32 events; /* EPOLLIN | EPOLLOUT */
    void (*ready)(void *opaque, u32 events);
    void *opaque;
    /* the loop's own */
    bool active;
};

/*
 * Watches w->fd for w->events (level-triggered). Returns 0 or -errno: -EEXIST when the fd is watched
 * already, -EPERM when it is of a kind that epoll can't wait for (a regular file).
 */
int event_loop_watch(struct event_loop *loop, struct fd_watch *w);
/* Changes the events of an active watch; 0 pauses it (hang-ups and errors, too). 0 or -errno. */
int event_loop_watch_events(struct event_loop *loop, struct fd_watch *w, u32 events);
/* After this returns, w->ready is not running and won't run (safe from within it too). */
void event_loop_unwatch(struct event_loop *loop, struct fd_watch *w);

/* A one-shot timer on the host's CLOCK_MONOTONIC, in nanoseconds. */
struct host_timer {
    void (*fire)(void *opaque);
    void *opaque;
    /* the loop's own: a node of its pairing heap */
    u64 deadline;
    struct host_timer *child, *next, *prev;
    bool armed, removing;
};

/* Arms or moves a timer; a deadline in the past fires soon. Never fires before the deadline. */
void event_loop_timer_arm(struct event_loop *loop, struct host_timer *t, u64 deadline_ns);
/* After this the timer is not armed; its callback may still be running on the loop's thread. */
void event_loop_timer_cancel(struct event_loop *loop, struct host_timer *t);
/* Cancels, and after it returns the callback isn't running either (safe from within it too). */
void event_loop_timer_remove(struct event_loop *loop, struct host_timer *t);

/* CLOCK_MONOTONIC in nanoseconds. */
u64 host_clock_ns(void);

#endif
