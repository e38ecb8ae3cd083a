/*
 * A kick: any thread asks the event loop's to look after something soon.
 */
#ifndef DOPPEL_HOST_LOOP_KICK_H
#define DOPPEL_HOST_LOOP_KICK_H

#include "host/event_loop.h"

struct loop_kick {
    struct event_loop *loop; /* NULL: not open */
    void (*ready)(void *opaque);
    void *opaque;
    struct fd_watch watch;
};

/*
 * In a zeroed struct: ready(opaque) runs on the loop's thread after one or more kicks. 0, or -errno with err
 * set and nothing to undo; `name` is whose it is, for the message.
 */
int loop_kick_open(struct loop_kick *k, struct event_loop *loop, void (*ready)(void *opaque),
                   void *opaque, const char *name, struct error *err);
/* After it, ready is not running and won't run. One that isn't open is fine. */
void loop_kick_close(struct loop_kick *k);
/* Any thread. */
void loop_kick_send(struct loop_kick *k);
/* Its eventfd, for the kernel to signal. */
static inline int loop_kick_fd(const struct loop_kick *k)
{
    return k->watch.fd;
}

#endif
