/*
 * A character stream between a device (a serial port, a console) and the world: the terminal, a file, a
 * socket.
 *
 * Output: chardev_write takes what its buffer holds, without blocking and without losing a character;
 * when it takes less than all, `writable` is called once there is room again. Input: the stream gives
 * no more than `can_receive` asks for and then waits for chardev_accept_input.
 *
 * Locking: handlers run on the event loop's thread with no lock of the stream held, never from within
 * a chardev function; so the functions below may be called from any thread with the device's lock
 * held, and a handler takes that lock itself. (All but chardev_close, which waits for running
 * handlers.)
 */
#ifndef DOPPEL_CHARDEV_CHARDEV_H
#define DOPPEL_CHARDEV_CHARDEV_H

#include "host/error.h"
#include "host/event_loop.h"
#include "host/types.h"

struct chardev;

struct chardev_handlers {
    /* How many characters the device can take now; 0: none until chardev_accept_input. */
    size_t (*can_receive)(void *opaque);
    /*
     * Input; len is at most what can_receive returned just before. Returns how many it took: the guest
     * may have changed its mind since. After fewer than len: chardev_accept_input follows.
     */
    size_t (*receive)(void *opaque, const u8 *buf, size_t len);
    /* There is room again after a chardev_write that took less than all. */
    void (*writable)(void *opaque);
    /* The user sent a break (Ctrl-A b), for Linux the SysRq key of its serial console. */
    void (*receive_break)(void *opaque);
    void *opaque;
};

/* What the stream asks of its owner. */
struct chardev_owner {
    /* The user asked by Ctrl-A x to end the VM. On the event loop's thread. May be NULL. */
    void (*quit)(void *opaque);
    void *opaque;
};

/*
 * Opens a stream by its spec:
 *     stdio          this process's stdin and stdout; a terminal becomes raw until the stream closes
 *     FILE           output into a file (created, or cut to 0 bytes); no input
 *     socket=PATH    a listening Unix socket, for one client at a time; what is written while there
 *                    is no client is dropped
 *     none           output is dropped; no input
 * The loop must outlive the stream. NULL with err set when that fails.
 */
struct chardev *chardev_open(const char *spec, struct event_loop *loop,
                             const struct chardev_owner *owner, struct error *err);

/*
 * Writes out what is buffered (for at most two seconds, should the other side not read), restores the
 * terminal, removes the socket, and frees the stream. After it returns no handler runs. NULL is fine.
 */
void chardev_close(struct chardev *chr);

/* Attaches the device; NULL detaches it: after that returns no handler runs (not from a handler). */
void chardev_attach(struct chardev *chr, const struct chardev_handlers *handlers);

/* Takes up to len characters; returns how many. Fewer than len: `writable` will be called. */
size_t chardev_write(struct chardev *chr, const u8 *buf, size_t len);

/* The device can take input again: the loop asks can_receive soon. */
void chardev_accept_input(struct chardev *chr);

#endif
