/*
 * What the kinds of streams share: two rings between the device's side and the other side.
 *
 * The device's side is in chardev.c: chardev_write fills `out`, and `work`, on the event loop's thread,
 * empties `in` into the device. The other side, a backend, empties `out` and fills `in`, from a thread
 * of its own (stdio, file) or from the event loop (socket).
 *
 * Everything in struct chardev is under its lock, which is taken with a device's lock held, and before
 * the event loop's own.
 */
#ifndef DOPPEL_CHARDEV_INTERNAL_H
#define DOPPEL_CHARDEV_INTERNAL_H

#include "chardev/chardev.h"

#include <pthread.h>

#define RING_SIZE 32768u
#define CHARDEV_FLUSH_SECONDS 2

struct ring {
    u8 data[RING_SIZE];
    size_t start, used;
};

/* Appends what fits of len bytes; returns how many. */
size_t ring_put(struct ring *ring, const u8 *buf, size_t len);
/* The first bytes, as far as they lie in one piece; returns how many. */
size_t ring_peek(const struct ring *ring, const u8 **first);
/* Drops the first n bytes; n is at most ring->used. */
void ring_drop(struct ring *ring, size_t n);

static inline size_t ring_room(const struct ring *ring)
{
    return RING_SIZE - ring->used;
}

/* A backend's operations. The lock is held in all but `close`. */
struct chardev_backend {
    /* Something is in `out`, or room is in `in` again. May be NULL. */
    void (*rings_changed)(struct chardev *chr);
    /* Writes `out` out, stops threads and watches, and gives back what the backend holds. */
    void (*close)(struct chardev *chr);
};

struct chardev {
    const struct chardev_backend *backend;
    struct event_loop *loop;
    struct chardev_owner owner;
    pthread_mutex_t lock;
    pthread_cond_t changed; /* for a backend's threads: rings, `closing`. CLOCK_MONOTONIC */
    struct chardev_handlers handlers;
    bool attached;
    struct ring out, in;
    bool drop_output; /* nobody is there to take it */
    bool starved;     /* chardev_write took less than all: `writable` is due */
    bool quit;        /* the owner's quit is due */
    bool send_break;  /* the device's receive_break is due */
    bool closing;
    struct host_timer work;
};

/* Allocates a backend's struct of `size` bytes, whose first member is a struct chardev. NULL: ENOMEM. */
struct chardev *chardev_new(size_t size, const struct chardev_backend *backend,
                            struct event_loop *loop);
/* Frees one that has no backend at work any more. */
void chardev_free(struct chardev *chr);

/* `in` has got something, the owner must be told to quit, ...: the loop looks soon. Lock held. */
void chardev_schedule_work(struct chardev *chr);
/* Drops n bytes from `out`, as they have gone out. Lock held. */
void chardev_output_done(struct chardev *chr, size_t n);
/* From now on output is dropped (or not any more), and what is buffered goes. Lock held. */
void chardev_drop_output(struct chardev *chr, bool drop);

/* Starts a thread with all signals blocked. 0 or a negative errno. */
int chardev_thread_start(pthread_t *thread, void *(*fn)(void *), void *arg);

/*
 * A thread that writes `out` to a descriptor with blocking writes, for descriptors that epoll can't wait
 * for, or that must not become non-blocking as other processes share them.
 */
struct chardev_writer {
    struct chardev *chr;
    pthread_t thread;
    int fd;
    const char *name; /* for messages; must outlive the writer */
    bool done;        /* the thread is at its end */
};

int chardev_writer_start(struct chardev_writer *w, struct chardev *chr, int fd, const char *name,
                         struct error *err);
/* Waits until `out` is written, for CHARDEV_FLUSH_SECONDS at most, and ends the thread. Sets closing. */
void chardev_writer_stop(struct chardev_writer *w);

struct chardev *chardev_stdio_open(struct event_loop *loop, struct error *err);
struct chardev *chardev_file_open(struct event_loop *loop, const char *path, struct error *err);
struct chardev *chardev_socket_open(struct event_loop *loop, const char *path, struct error *err);

#endif
