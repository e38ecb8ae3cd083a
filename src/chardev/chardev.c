#include "chardev/chardev.h"

#include "chardev/internal.h"

#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

/* ---- rings ---- */

size_t ring_put(struct ring *ring, const u8 *buf, size_t len)
{
    size_t end = (ring->start + ring->used) % RING_SIZE;
    size_t n = MIN(len, ring_room(ring));
    size_t before_wrap = MIN(n, RING_SIZE - end);

    memcpy(ring->data + end, buf, before_wrap);
    memcpy(ring->data, buf + before_wrap, n - before_wrap);
    ring->used += n;
    return n;
}

size_t ring_peek(const struct ring *ring, const u8 **first)
{
    *first = ring->data + ring->start;
    return MIN(ring->used, RING_SIZE - ring->start);
}

void ring_drop(struct ring *ring, size_t n)
{
    ring->start = (ring->start + n) % RING_SIZE;
    ring->used -= n;
}

/* ---- the device's side ---- */

size_t chardev_write(struct chardev *chr, const u8 *buf, size_t len)
{
    size_t n = len;

    pthread_mutex_lock(&chr->lock);
    if (!chr->drop_output) {
        bool was_empty = !chr->out.used;

        n = ring_put(&chr->out, buf, len);
        if (n < len)
            chr->starved = true;
        if (was_empty && n && chr->backend->rings_changed)
            chr->backend->rings_changed(chr);
    }
    pthread_mutex_unlock(&chr->lock);
    return n;
}

void chardev_accept_input(struct chardev *chr)
{
    pthread_mutex_lock(&chr->lock);
    if (chr->in.used)
        chardev_schedule_work(chr);
    pthread_mutex_unlock(&chr->lock);
}

/* Gives the device input, as long as there is some and it takes it. */
static void deliver_input(struct chardev *chr, const struct chardev_handlers *device)
{
    u8 buf[256];
    size_t taken;

    do {
        size_t n = device->can_receive(device->opaque);
        const u8 *first;

        pthread_mutex_lock(&chr->lock);
        /* A break that came meanwhile goes before the input that came with it: in the next round. */
        n = chr->send_break ? 0 : MIN(MIN(ring_peek(&chr->in, &first), sizeof(buf)), n);
        memcpy(buf, first, n);
        pthread_mutex_unlock(&chr->lock);

        taken = n ? device->receive(device->opaque, buf, n) : 0;

        /* Nobody else drops from the ring. */
        pthread_mutex_lock(&chr->lock);
        ring_drop(&chr->in, taken);
        if (taken && chr->backend->rings_changed)
            chr->backend->rings_changed(chr);
        pthread_mutex_unlock(&chr->lock);
    } while (taken);
}

/* Below this much in `out`, a device that waits for room is told. */
#define LOW_WATER (RING_SIZE / 2)

/* On the event loop's thread: calls back whoever is due. */
static void do_work(void *opaque)
{
    struct chardev *chr = opaque;
    struct chardev_handlers device;
    bool attached, quit, writable, send_break;

    pthread_mutex_lock(&chr->lock);
    device = chr->handlers;
    attached = chr->attached;
    quit = chr->quit;
    chr->quit = false;
    writable = attached && chr->starved && chr->out.used <= LOW_WATER;
    if (writable)
        chr->starved = false;
    send_break = attached && chr->send_break;
    chr->send_break = false;
    pthread_mutex_unlock(&chr->lock);

    if (quit && chr->owner.quit)
        chr->owner.quit(chr->owner.opaque);
    if (writable)
        device.writable(device.opaque);
    /* Before the input: the SysRq key that is meant may have been read along with the break. */
    if (send_break)
        device.receive_break(device.opaque);
    if (attached)
        deliver_input(chr, &device);
}

void chardev_attach(struct chardev *chr, const struct chardev_handlers *handlers)
{
    pthread_mutex_lock(&chr->lock);
    chr->attached = handlers != NULL;
    chr->handlers = handlers ? *handlers : (struct chardev_handlers){0};
    pthread_mutex_unlock(&chr->lock);
    /* The old device's handlers may be running; after this they aren't. */
    event_loop_timer_remove(chr->loop, &chr->work);
    event_loop_timer_arm(chr->loop, &chr->work, 0);
}

/* ---- for backends ---- */

void chardev_schedule_work(struct chardev *chr)
{
    event_loop_timer_arm(chr->loop, &chr->work, 0);
}

void chardev_output_done(struct chardev *chr, size_t n)
{
    ring_drop(&chr->out, n);
    if (chr->starved && chr->out.used <= LOW_WATER)
        chardev_schedule_work(chr);
}

void chardev_drop_output(struct chardev *chr, bool drop)
{
    chr->drop_output = drop;
    if (drop)
        chardev_output_done(chr, chr->out.used);
}

int chardev_thread_start(pthread_t *thread, void *(*fn)(void *), void *arg)
{
    sigset_t all, old;
    int ret;

    /* Signals are for the main thread; SIGPIPE, blocked, becomes EPIPE. */
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old);
    ret = pthread_create(thread, NULL, fn, arg);
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    return -ret;
}

struct chardev *chardev_new(size_t size, const struct chardev_backend *backend,
                            struct event_loop *loop)
{
    struct chardev *chr = calloc(1, size);
    pthread_condattr_t monotonic;

    if (!chr)
        return NULL;
    chr->backend = backend;
    chr->loop = loop;
    pthread_mutex_init(&chr->lock, NULL);
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_cond_init(&chr->changed, &monotonic);
    pthread_condattr_destroy(&monotonic);
    chr->work = (struct host_timer){.fire = do_work, .opaque = chr};
    return chr;
}

void chardev_free(struct chardev *chr)
{
    event_loop_timer_remove(chr->loop, &chr->work);
    pthread_cond_destroy(&chr->changed);
    pthread_mutex_destroy(&chr->lock);
    free(chr);
}

/* ---- opening and closing ---- */

static void none_close(struct chardev *chr)
{
}

static const struct chardev_backend none_backend = {.close = none_close};

static struct chardev *open_none(struct event_loop *loop, struct error *err)
{
    struct chardev *chr = chardev_new(sizeof(*chr), &none_backend, loop);

    if (chr)
        chr->drop_output = true;
    else
        error_host(err, ENOMEM, "character stream");
    return chr;
}

struct chardev *chardev_open(const char *spec, struct event_loop *loop,
                             const struct chardev_owner *owner, struct error *err)
{
    static const char socket_prefix[] = "socket=";
    struct chardev *chr;

    if (strcmp(spec, "none") == 0)
        chr = open_none(loop, err);
    else if (strcmp(spec, "stdio") == 0)
        chr = chardev_stdio_open(loop, err);
    else if (strncmp(spec, socket_prefix, strlen(socket_prefix)) == 0)
        chr = chardev_socket_open(loop, spec + strlen(socket_prefix), err);
    else
        chr = chardev_file_open(loop, spec, err);
    if (chr && owner) {
        pthread_mutex_lock(&chr->lock);
        chr->owner = *owner;
        pthread_mutex_unlock(&chr->lock);
    }
    return chr;
}

void chardev_close(struct chardev *chr)
{
    if (!chr)
        return;
    chardev_attach(chr, NULL);
    chr->backend->close(chr);
    chardev_free(chr);
}
