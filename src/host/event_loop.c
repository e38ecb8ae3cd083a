/*
 * The loop's thread waits in epoll_wait for three kinds of things: the caller's file descriptors, one
 * timerfd that stands for all timers, and one eventfd by which other threads wake it (posts, stop).
 *
 * Invariants, all under loop->lock:
 *  1. An epoll event carries (fd, serial), never a pointer. The table `fds` says which watch, if any,
 *     owns that pair now, so an event that was fetched before its watch went away finds nothing.
 *  2. `running` is the watch or timer whose callback is on the loop's thread now. Who takes one away
 *     from another thread waits until it isn't that one.
 *  3. The timerfd is never set later than the earliest armed timer. It may be set earlier: a timer
 *     that was cancelled or moved back costs one wake-up for nothing, not a system call each time.
 *
 * Timers are a pairing heap (Fredman, Sedgewick, Sleator, Tarjan: "The pairing heap: a new form of
 * self-adjusting heap", Algorithmica 1, 1986) threaded through the timers themselves, so that arming
 * one can't fail.
 */
#include "host/event_loop.h"

#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

#define NEVER UINT64_MAX

struct post {
    struct post *next;
    void (*fn)(void *opaque);
    void *opaque;
};

struct fd_entry {
    struct fd_watch *watch; /* NULL: not watched, or paused */
    u32 serial;             /* changes whenever the fd is handed to epoll anew */
};

struct event_loop {
    int epoll_fd, timer_fd, wake_fd;
    pthread_mutex_t lock;
    pthread_cond_t callback_done;
    unsigned waiters;    /* threads that wait for callback_done */
    const void *running; /* the watch or timer whose callback runs */
    pthread_t thread;    /* valid while in_run */
    bool in_run;
    bool stop;
    struct fd_entry *fds;
    size_t nfds;
    struct host_timer *timers; /* root of the heap */
    u64 timer_fd_deadline;     /* NEVER: not set, or expired */
    u64 round;                 /* when the timers were last looked at */
    struct post *posts, **posts_end;
};

u64 host_clock_ns(void)
{
    struct timespec ts;

    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (u64)ts.tv_sec * NS_PER_SEC + (u64)ts.tv_nsec;
}

static u64 event_key(int fd, u32 serial)
{
    return (u64)serial << 32 | (u32)fd;
}

static int epoll_change(struct event_loop *loop, int op, int fd, u32 events)
{
    struct epoll_event event = {.events = events};

    event.data.u64 = event_key(fd, (size_t)fd < loop->nfds ? loop->fds[fd].serial : 0);
    return epoll_ctl(loop->epoll_fd, op, fd, &event) < 0 ? -errno : 0;
}

struct event_loop *event_loop_create(struct error *err)
{
    struct event_loop *loop = calloc(1, sizeof(*loop));

    if (!loop) {
        error_host(err, ENOMEM, "event loop");
        return NULL;
    }
    pthread_mutex_init(&loop->lock, NULL);
    pthread_cond_init(&loop->callback_done, NULL);
    loop->posts_end = &loop->posts;
    loop->timer_fd_deadline = NEVER;
    loop->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    loop->timer_fd = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK);
    loop->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (loop->epoll_fd < 0 || loop->timer_fd < 0 || loop->wake_fd < 0 ||
        epoll_change(loop, EPOLL_CTL_ADD, loop->timer_fd, EPOLLIN) < 0 ||
        epoll_change(loop, EPOLL_CTL_ADD, loop->wake_fd, EPOLLIN) < 0) {
        error_host(err, errno, "event loop");
        event_loop_destroy(loop);
        return NULL;
    }
    return loop;
}

void event_loop_destroy(struct event_loop *loop)
{
    if (!loop)
        return;
    while (loop->posts) {
        struct post *post = loop->posts;

        loop->posts = post->next;
        free(post);
    }
    if (loop->epoll_fd >= 0)
        close(loop->epoll_fd);
    if (loop->timer_fd >= 0)
        close(loop->timer_fd);
    if (loop->wake_fd >= 0)
        close(loop->wake_fd);
    pthread_cond_destroy(&loop->callback_done);
    pthread_mutex_destroy(&loop->lock);
    free(loop->fds);
    free(loop);
}

static bool on_loop_thread(const struct event_loop *loop)
{
    return loop->in_run && pthread_equal(loop->thread, pthread_self());
}

static void wake(struct event_loop *loop)
{
    eventfd_write(loop->wake_fd, 1);
}

/* Waits until the callback of `object` is not running. Called and returns with the lock held. */
static void wait_for_callback(struct event_loop *loop, const void *object)
{
    if (on_loop_thread(loop))
        return;
    loop->waiters++;
    while (loop->running == object)
        pthread_cond_wait(&loop->callback_done, &loop->lock);
    loop->waiters--;
}

/* Brackets a callback: called with the lock held, which is free in between. */
static void callback_begin(struct event_loop *loop, const void *object)
{
    loop->running = object;
    pthread_mutex_unlock(&loop->lock);
}

static void callback_end(struct event_loop *loop)
{
    pthread_mutex_lock(&loop->lock);
    loop->running = NULL;
    if (loop->waiters)
        pthread_cond_broadcast(&loop->callback_done);
}

int event_loop_post(struct event_loop *loop, void (*fn)(void *opaque), void *opaque)
{
    struct post *post = malloc(sizeof(*post));

    if (!post)
        return -ENOMEM;
    *post = (struct post){.fn = fn, .opaque = opaque};
    pthread_mutex_lock(&loop->lock);
    *loop->posts_end = post;
    loop->posts_end = &post->next;
    pthread_mutex_unlock(&loop->lock);
    wake(loop);
    return 0;
}

void event_loop_stop(struct event_loop *loop)
{
    pthread_mutex_lock(&loop->lock);
    loop->stop = true;
    pthread_mutex_unlock(&loop->lock);
    wake(loop);
}

/* ---- file descriptors ---- */

static int fd_entry_reserve(struct event_loop *loop, int fd)
{
    size_t wanted = MAX((size_t)fd + 1, loop->nfds * 2);
    struct fd_entry *fds;

    if ((size_t)fd < loop->nfds)
        return 0;
    fds = realloc(loop->fds, wanted * sizeof(*fds));
    if (!fds)
        return -ENOMEM;
    for (size_t i = loop->nfds; i < wanted; i++)
        fds[i] = (struct fd_entry){0};
    loop->fds = fds;
    loop->nfds = wanted;
    return 0;
}

static int fd_resume(struct event_loop *loop, struct fd_watch *w)
{
    int ret;

    loop->fds[w->fd].serial++;
    ret = epoll_change(loop, EPOLL_CTL_ADD, w->fd, w->events);
    if (ret == 0)
        loop->fds[w->fd].watch = w;
    return ret;
}

static void fd_pause(struct event_loop *loop, struct fd_watch *w)
{
    if (loop->fds[w->fd].watch != w)
        return;
    epoll_change(loop, EPOLL_CTL_DEL, w->fd, 0);
    loop->fds[w->fd].watch = NULL;
}

int event_loop_watch(struct event_loop *loop, struct fd_watch *w)
{
    int ret;

    if (w->fd < 0)
        return -EBADF;
    pthread_mutex_lock(&loop->lock);
    ret = fd_entry_reserve(loop, w->fd);
    if (ret == 0)
        ret = loop->fds[w->fd].watch ? -EEXIST : w->events ? fd_resume(loop, w) : 0;
    if (ret == 0)
        w->active = true;
    pthread_mutex_unlock(&loop->lock);
    return ret;
}

int event_loop_watch_events(struct event_loop *loop, struct fd_watch *w, u32 events)
{
    int ret = 0;

    pthread_mutex_lock(&loop->lock);
    if (!w->active) {
        ret = -ENOENT;
    } else if (events != w->events) {
        w->events = events;
        if (!events)
            fd_pause(loop, w);
        else if (loop->fds[w->fd].watch == w)
            ret = epoll_change(loop, EPOLL_CTL_MOD, w->fd, events);
        else
            ret = fd_resume(loop, w);
    }
    pthread_mutex_unlock(&loop->lock);
    return ret;
}

void event_loop_unwatch(struct event_loop *loop, struct fd_watch *w)
{
    pthread_mutex_lock(&loop->lock);
    if (w->active) {
        fd_pause(loop, w);
        w->active = false;
    }
    wait_for_callback(loop, w);
    pthread_mutex_unlock(&loop->lock);
}

/* Called and returns with the lock held. */
static void dispatch_fd(struct event_loop *loop, const struct epoll_event *event)
{
    int fd = (int)(u32)event->data.u64;
    struct fd_watch *w;
    u32 ready;

    if ((size_t)fd >= loop->nfds || event->data.u64 != event_key(fd, loop->fds[fd].serial))
        return;
    w = loop->fds[fd].watch;
    if (!w)
        return;
    ready = event->events & (w->events | EPOLLERR | EPOLLHUP);
    if (!ready)
        return;
    callback_begin(loop, w);
    w->ready(w->opaque, ready);
    callback_end(loop);
}

/* ---- timers ---- */

/* Makes the later of two roots the first child of the other; either may be NULL. */
static struct host_timer *heap_meld(struct host_timer *a, struct host_timer *b)
{
    if (!a || !b)
        return a ? a : b;
    if (b->deadline < a->deadline) {
        struct host_timer *later = a;

        a = b;
        b = later;
    }
    b->prev = a;
    b->next = a->child;
    if (b->next)
        b->next->prev = b;
    a->child = b;
    return a;
}

/* Melds a list of siblings into one heap: pairs from left to right, then the pairs right to left. */
static struct host_timer *heap_meld_siblings(struct host_timer *first)
{
    struct host_timer *pairs = NULL, *root = NULL;

    while (first) {
        struct host_timer *a = first, *b = a->next, *pair;

        first = b ? b->next : NULL;
        a->next = a->prev = NULL;
        if (b)
            b->next = b->prev = NULL;
        pair = heap_meld(a, b);
        pair->next = pairs;
        pairs = pair;
    }
    while (pairs) {
        struct host_timer *pair = pairs;

        pairs = pair->next;
        pair->next = NULL;
        root = heap_meld(root, pair);
    }
    return root;
}

static void heap_insert(struct event_loop *loop, struct host_timer *t)
{
    t->child = t->next = t->prev = NULL;
    t->armed = true;
    loop->timers = heap_meld(loop->timers, t);
}

static void heap_remove(struct event_loop *loop, struct host_timer *t)
{
    struct host_timer *orphans = heap_meld_siblings(t->child);

    t->armed = false;
    if (t == loop->timers) {
        loop->timers = orphans;
        return;
    }
    /* prev is the left sibling, or the parent of a first child. */
    if (t->prev->child == t)
        t->prev->child = t->next;
    else
        t->prev->next = t->next;
    if (t->next)
        t->next->prev = t->prev;
    loop->timers = heap_meld(loop->timers, orphans);
}

/* Keeps invariant 3. */
static void timer_fd_update(struct event_loop *loop)
{
    struct itimerspec when = {0};
    u64 deadline;

    if (!loop->timers || loop->timers->deadline >= loop->timer_fd_deadline)
        return;
    deadline = MAX(loop->timers->deadline, 1); /* 0 would turn it off */
    when.it_value.tv_sec = (time_t)(deadline / NS_PER_SEC);
    when.it_value.tv_nsec = (long)(deadline % NS_PER_SEC);
    timerfd_settime(loop->timer_fd, TFD_TIMER_ABSTIME, &when, NULL);
    loop->timer_fd_deadline = loop->timers->deadline;
}

void event_loop_timer_arm(struct event_loop *loop, struct host_timer *t, u64 deadline_ns)
{
    pthread_mutex_lock(&loop->lock);
    if (t->removing) {
        pthread_mutex_unlock(&loop->lock);
        return;
    }
    if (t->armed)
        heap_remove(loop, t);
    /* One that is late already waits for the next round: descriptors get their turn in between. */
    t->deadline = MAX(deadline_ns, loop->round + 1);
    heap_insert(loop, t);
    /* The loop's own thread does it once, before it waits. */
    if (!on_loop_thread(loop))
        timer_fd_update(loop);
    pthread_mutex_unlock(&loop->lock);
}

void event_loop_timer_cancel(struct event_loop *loop, struct host_timer *t)
{
    pthread_mutex_lock(&loop->lock);
    if (t->armed)
        heap_remove(loop, t);
    pthread_mutex_unlock(&loop->lock);
}

void event_loop_timer_remove(struct event_loop *loop, struct host_timer *t)
{
    pthread_mutex_lock(&loop->lock);
    if (t->armed)
        heap_remove(loop, t);
    /* The callback that this waits for may want to arm it again. */
    t->removing = true;
    wait_for_callback(loop, t);
    t->removing = false;
    pthread_mutex_unlock(&loop->lock);
}

/* Fires what is due at one moment. Called and returns with the lock held. */
static void dispatch_timers(struct event_loop *loop)
{
    if (!loop->timers)
        return;
    loop->round = host_clock_ns();
    while (loop->timers && loop->timers->deadline <= loop->round && !loop->stop) {
        struct host_timer *t = loop->timers;

        heap_remove(loop, t);
        callback_begin(loop, t);
        t->fire(t->opaque);
        callback_end(loop);
    }
}

/* ---- the loop ---- */

/* Called and returns with the lock held. */
static void dispatch_posts(struct event_loop *loop)
{
    struct post *post = loop->posts;

    loop->posts = NULL;
    loop->posts_end = &loop->posts;
    while (post) {
        struct post *next = post->next;

        callback_begin(loop, post);
        post->fn(post->opaque);
        callback_end(loop);
        free(post);
        post = next;
    }
}

/* Called and returns with the lock held. */
static void dispatch_event(struct event_loop *loop, const struct epoll_event *event)
{
    u64 count;

    /* Their serials are 0, which no watch has. A read that finds nothing was a wake-up for nothing. */
    if (event->data.u64 == event_key(loop->timer_fd, 0)) {
        if (read(loop->timer_fd, &count, sizeof(count)) == sizeof(count))
            loop->timer_fd_deadline = NEVER;
    } else if (event->data.u64 == event_key(loop->wake_fd, 0)) {
        eventfd_read(loop->wake_fd, &count);
    } else {
        dispatch_fd(loop, event);
    }
}

void event_loop_run(struct event_loop *loop)
{
    struct epoll_event events[16];

    pthread_mutex_lock(&loop->lock);
    loop->thread = pthread_self();
    loop->in_run = true;
    while (!loop->stop) {
        int n;

        timer_fd_update(loop);
        pthread_mutex_unlock(&loop->lock);
        n = epoll_wait(loop->epoll_fd, events, ARRAY_SIZE(events), -1);
        pthread_mutex_lock(&loop->lock);
        for (int i = 0; i < n && !loop->stop; i++)
            dispatch_event(loop, &events[i]);
        dispatch_timers(loop);
        dispatch_posts(loop);
    }
    loop->stop = false;
    loop->in_run = false;
    pthread_mutex_unlock(&loop->lock);
}
