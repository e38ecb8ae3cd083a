/*
 * Hardware exceptions inside generated code: the signal side.
 *
 * The handler reads a table of regions without a lock: an entry is published by storing its start
 * last, and withdrawn by clearing its start first. It runs on the thread's own stack: generated
 * code is a leaf that was called from C, so there is room. Signals sent by kill() are never taken
 * for exceptions.
 */
#define _GNU_SOURCE
#include "host/trap.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <string.h>
#include <ucontext.h>

#define MAX_REGIONS 256

/* #DE, #UD, #GP, #MF, #XM: what an instruction can raise by itself. A page fault (14) is a bug of ours, if no
 * handler knows better. */
#define GUEST_VECTORS (BIT(0) | BIT(6) | BIT(13) | BIT(16) | BIT(19))
#define HANDLED_VECTORS (GUEST_VECTORS | BIT(14))

static struct region {
    _Atomic uintptr_t start;
    uintptr_t size, landing;
    trap_handler *handler; /* NULL: resume at landing */
    void *opaque;
} regions[MAX_REGIONS];

static const int signals[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL};
static struct sigaction previous[ARRAY_SIZE(signals)];
static pthread_mutex_t regions_lock = PTHREAD_MUTEX_INITIALIZER;
static bool installed;

static const struct region *find(uintptr_t ip)
{
    for (unsigned n = 0; n < MAX_REGIONS; n++) {
        uintptr_t start = atomic_load_explicit(&regions[n].start, memory_order_acquire);

        if (start && ip - start < regions[n].size)
            return &regions[n];
    }
    return NULL;
}

/* Not ours: the instruction (or the sender's signal) meets the handler that was there before. */
static void pass_on(int sig, const siginfo_t *info)
{
    for (unsigned n = 0; n < ARRAY_SIZE(signals); n++) {
        if (signals[n] == sig)
            sigaction(sig, &previous[n], NULL);
    }
    if (info->si_code <= 0)
        raise(sig);
}

static void on_exception(int sig, siginfo_t *info, void *context)
{
    greg_t *regs = ((ucontext_t *)context)->uc_mcontext.gregs;
    const struct region *r = find((uintptr_t)regs[REG_RIP]);

    if (!r || info->si_code <= 0 ||
        !((r->handler ? HANDLED_VECTORS : GUEST_VECTORS) & BIT(regs[REG_TRAPNO]))) {
        pass_on(sig, info);
        return;
    }
    if (r->handler) {
        if (!r->handler(r->opaque, context))
            pass_on(sig, info);
        return;
    }
    regs[REG_RAX] = regs[REG_TRAPNO];
    regs[REG_RIP] = (greg_t)r->landing;
}

static int install(struct error *err)
{
    struct sigaction action;

    memset(&action, 0, sizeof(action));
    action.sa_sigaction = on_exception;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigemptyset(&action.sa_mask);
    for (unsigned n = 0; n < ARRAY_SIZE(signals); n++) {
        if (sigaction(signals[n], &action, &previous[n]) != 0)
            return error_host(err, errno, "installing a signal handler");
    }
    installed = true;
    return 0;
}

static int add_region(const void *start, const struct region *region, struct error *err)
{
    int ret = 0;

    pthread_mutex_lock(&regions_lock);
    if (!installed)
        ret = install(err);
    if (ret == 0) {
        unsigned n = 0;

        while (n < MAX_REGIONS && atomic_load(&regions[n].start))
            n++;
        if (n < MAX_REGIONS) {
            regions[n].size = region->size;
            regions[n].landing = region->landing;
            regions[n].handler = region->handler;
            regions[n].opaque = region->opaque;
            atomic_store_explicit(&regions[n].start, (uintptr_t)start, memory_order_release);
        } else {
            ret = error_host(err, ENOSPC, "guarding generated code");
        }
    }
    pthread_mutex_unlock(&regions_lock);
    return ret;
}

int trap_region_add(const void *start, size_t size, const void *landing, struct error *err)
{
    struct region region = {.size = size, .landing = (uintptr_t)landing};

    return add_region(start, &region, err);
}

int trap_region_add_handler(const void *start, size_t size, trap_handler *handler, void *opaque,
                            struct error *err)
{
    struct region region = {.size = size, .handler = handler, .opaque = opaque};

    return add_region(start, &region, err);
}

void trap_region_remove(const void *start)
{
    pthread_mutex_lock(&regions_lock);
    for (unsigned n = 0; n < MAX_REGIONS; n++) {
        if (atomic_load(&regions[n].start) == (uintptr_t)start)
            atomic_store(&regions[n].start, 0);
    }
    pthread_mutex_unlock(&regions_lock);
}
