/*
 * Each side tells what it has done by an eventfd in the loop: the kernel for the ring, threads for the pool.
 *
 * Transfers are gathered while the loop calls back, and submitted together at the end of its round, by a timer that is
 * due at once. What was done within that system call, as what the host has in its cache is, is taken with it: its
 * event in the eventfd comes for nothing.
 *
 * A transfer that the ring did not do whole (a short one, at the end of the file; a kind of file that it can't)
 * is done again from its start by a thread, which does whole transfers: rare, and the same bytes.
 *
 * The ring is entered by this thread alone. What doesn't fit it goes to the pool.
 */
#define _GNU_SOURCE /* pthread_setname_np */

#include "block/aio.h"

#include "host/log.h"

#include <errno.h>
#include <liburing.h>
#include <poll.h>
#include <pthread.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#define RING_ENTRIES 256
#define POOL_THREADS 4

struct work_list {
    struct aio_work *first, **end;
};

struct aio {
    struct event_loop *loop;

    bool uring;
    struct io_uring ring;
    int ring_fd; /* eventfd */
    struct fd_watch ring_watch;
    struct host_timer round_end;

    int pool_fd; /* eventfd */
    struct fd_watch pool_watch;
    pthread_mutex_t lock; /* what follows */
    pthread_cond_t wake;
    struct work_list todo, finished;
    pthread_t threads[POOL_THREADS];
    unsigned nthreads, idle;
    bool quit;
};

static void list_init(struct work_list *l)
{
    l->first = NULL;
    l->end = &l->first;
}

static void list_add(struct work_list *l, struct aio_work *w)
{
    w->next = NULL;
    *l->end = w;
    l->end = &w->next;
}

static struct aio_work *list_take(struct work_list *l)
{
    struct aio_work *w = l->first;

    if (w) {
        l->first = w->next;
        if (!l->first)
            l->end = &l->first;
    }
    return w;
}

/* ---- the pool ---- */

static void *pool_thread(void *opaque)
{
    struct aio *a = opaque;
    u64 one = 1;

    pthread_mutex_lock(&a->lock);
    while (!a->quit) {
        struct aio_work *w = list_take(&a->todo);

        if (!w) {
            a->idle++;
            pthread_cond_wait(&a->wake, &a->lock);
            a->idle--;
            continue;
        }
        pthread_mutex_unlock(&a->lock);
        w->result = w->run(w);
        pthread_mutex_lock(&a->lock);
        list_add(&a->finished, w);
        if (write(a->pool_fd, &one, sizeof(one)) < 0)
            log_once(LOG_WARN, "block: cannot wake the event loop");
    }
    pthread_mutex_unlock(&a->lock);
    return NULL;
}

/* The lock is held. One thread more when all are busy; without any the work would wait for ever. */
static void ensure_thread(struct aio *a)
{
    if (a->idle || a->nthreads == POOL_THREADS)
        return;
    if (pthread_create(&a->threads[a->nthreads], NULL, pool_thread, a)) {
        log_once(LOG_WARN, "block: cannot start a thread");
        return;
    }
    pthread_setname_np(a->threads[a->nthreads++], "block");
}

void aio_run(struct aio *a, struct aio_work *w)
{
    bool alone;

    pthread_mutex_lock(&a->lock);
    ensure_thread(a);
    alone = a->nthreads == 0;
    if (!alone)
        list_add(&a->todo, w);
    pthread_cond_signal(&a->wake);
    pthread_mutex_unlock(&a->lock);
    if (!alone)
        return;
    /* A host without room for a thread: slow, but it goes on. */
    w->result = w->run(w);
    pthread_mutex_lock(&a->lock);
    list_add(&a->finished, w);
    pthread_mutex_unlock(&a->lock);
    eventfd_write(a->pool_fd, 1);
}

static void pool_ready(void *opaque, u32 events)
{
    struct aio *a = opaque;
    struct aio_work *w;
    u64 count;

    if (read(a->pool_fd, &count, sizeof(count)) < 0)
        return;
    for (;;) {
        pthread_mutex_lock(&a->lock);
        w = list_take(&a->finished);
        pthread_mutex_unlock(&a->lock);
        if (!w)
            return;
        w->done(w, w->result);
    }
}

static int run_transfer(struct aio_work *w)
{
    return w->write ? file_writev(w->file, w->offset, w->iov, w->n)
                    : file_readv(w->file, w->offset, w->iov, w->n);
}

/* ---- the ring ---- */

void aio_transfer(struct aio *a, struct aio_work *w)
{
    struct io_uring_sqe *sqe = a->uring ? io_uring_get_sqe(&a->ring) : NULL;

    w->run = run_transfer;
    if (!sqe) {
        aio_run(a, w);
        return;
    }
    if (w->write)
        io_uring_prep_writev(sqe, w->file->fd, w->iov, w->n, w->offset);
    else
        io_uring_prep_readv(sqe, w->file->fd, w->iov, w->n, w->offset);
    io_uring_sqe_set_data(sqe, w);
    if (io_uring_sq_ready(&a->ring) == 1)
        event_loop_timer_arm(a->loop, &a->round_end, 0);
}

static void ring_done(struct aio *a, struct aio_work *w, int result)
{
    if (result >= 0 && (u64)result == w->len)
        w->done(w, 0);
    else
        aio_run(a, w);
}

static void take_completions(struct aio *a)
{
    struct io_uring_cqe *cqe;

    while (io_uring_peek_cqe(&a->ring, &cqe) == 0) {
        struct aio_work *w = io_uring_cqe_get_data(cqe);
        int result = cqe->res;

        io_uring_cqe_seen(&a->ring, cqe);
        ring_done(a, w, result);
    }
}

/* What was done may have been waited for by more. */
static void submit_gathered(void *opaque)
{
    struct aio *a = opaque;

    while (io_uring_sq_ready(&a->ring)) {
        /* It takes none only when the kernel is short of memory. */
        if (io_uring_submit(&a->ring) <= 0) {
            struct pollfd p = {.fd = a->ring_fd, .events = POLLIN};

            poll(&p, 1, 1);
        }
        take_completions(a);
    }
}

static void ring_ready(void *opaque, u32 events)
{
    struct aio *a = opaque;
    u64 count;

    if (read(a->ring_fd, &count, sizeof(count)) == sizeof(count))
        take_completions(a);
}

void aio_wait(struct aio *a)
{
    struct pollfd fds[] = {{.fd = a->pool_fd, .events = POLLIN},
                           {.fd = a->uring ? a->ring_fd : -1, .events = POLLIN}};

    if (a->uring && io_uring_sq_ready(&a->ring)) {
        submit_gathered(a);
        return;
    }
    if (poll(fds, ARRAY_SIZE(fds), -1) < 0)
        return;
    if (fds[0].revents)
        pool_ready(a, EPOLLIN);
    if (fds[1].revents)
        ring_ready(a, EPOLLIN);
}

/* ---- life ---- */

static int watch(struct aio *a, struct fd_watch *w, int *fd,
                 void (*ready)(void *opaque, u32 events))
{
    *fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (*fd < 0)
        return -errno;
    *w = (struct fd_watch){.fd = *fd, .events = EPOLLIN, .ready = ready, .opaque = a};
    return event_loop_watch(a->loop, w);
}

static void unwatch(struct aio *a, struct fd_watch *w, int fd)
{
    if (w->active)
        event_loop_unwatch(a->loop, w);
    if (fd >= 0)
        close(fd);
}

/* Where the kernel has no io_uring, or forbids it, the pool does it. */
static int open_ring(struct aio *a)
{
    int ret = io_uring_queue_init(RING_ENTRIES, &a->ring, 0);

    if (ret) {
        log_debug("block: no io_uring here (%d), threads do the work", -ret);
        return 0;
    }
    a->uring = true;
    a->round_end = (struct host_timer){.fire = submit_gathered, .opaque = a};
    ret = watch(a, &a->ring_watch, &a->ring_fd, ring_ready);
    return ret ? ret : io_uring_register_eventfd(&a->ring, a->ring_fd);
}

struct aio *aio_create(struct event_loop *loop, bool pool_only, struct error *err)
{
    struct aio *a = calloc(1, sizeof(*a));
    int ret;

    if (!a) {
        error_host(err, ENOMEM, "block");
        return NULL;
    }
    a->loop = loop;
    a->ring_fd = a->pool_fd = -1;
    list_init(&a->todo);
    list_init(&a->finished);
    pthread_mutex_init(&a->lock, NULL);
    pthread_cond_init(&a->wake, NULL);
    ret = watch(a, &a->pool_watch, &a->pool_fd, pool_ready);
    if (!ret && !pool_only)
        ret = open_ring(a);
    if (ret) {
        error_host(err, -ret, "cannot set up disk input and output");
        aio_destroy(a);
        return NULL;
    }
    return a;
}

void aio_destroy(struct aio *a)
{
    if (!a)
        return;
    pthread_mutex_lock(&a->lock);
    a->quit = true;
    pthread_cond_broadcast(&a->wake);
    pthread_mutex_unlock(&a->lock);
    for (unsigned i = 0; i < a->nthreads; i++)
        pthread_join(a->threads[i], NULL);
    unwatch(a, &a->ring_watch, a->ring_fd);
    unwatch(a, &a->pool_watch, a->pool_fd);
    if (a->uring) {
        event_loop_timer_remove(a->loop, &a->round_end);
        io_uring_queue_exit(&a->ring);
    }
    pthread_cond_destroy(&a->wake);
    pthread_mutex_destroy(&a->lock);
    free(a);
}

bool aio_has_uring(const struct aio *a)
{
    return a->uring;
}
