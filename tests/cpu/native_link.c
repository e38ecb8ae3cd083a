/*
 * The native side's process, and the memory that is shared with it.
 */
#define _GNU_SOURCE
#include "native_link.h"

#include <errno.h>
#include <linux/futex.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define NATIVE_SECONDS 3

static int start(struct native_link *l)
{
    char fd[16];

    snprintf(fd, sizeof(fd), "%d", l->fd);
    l->pid = fork();
    if (l->pid < 0)
        return -errno;
    if (l->pid == 0) {
        execl(l->program, l->program, fd, (char *)NULL);
        _exit(127);
    }
    return 0;
}

int native_open(struct native_link *l, const char *program, const u8 read_only[PAGE])
{
    *l = (struct native_link){.program = program};
    l->fd = memfd_create("oracle", 0);
    if (l->fd < 0 || ftruncate(l->fd, sizeof(*l->shared)) < 0)
        return -errno;
    l->shared = mmap(NULL, sizeof(*l->shared), PROT_READ | PROT_WRITE, MAP_SHARED, l->fd, 0);
    if (l->shared == MAP_FAILED)
        return -errno;
    memcpy(l->shared->read_only, read_only, PAGE);
    return start(l);
}

void native_close(struct native_link *l)
{
    kill(l->pid, SIGKILL);
    waitpid(l->pid, NULL, 0);
    munmap(l->shared, sizeof(*l->shared));
    close(l->fd);
}

void native_begin(struct native_link *l, u32 count)
{
    struct shared *shared = l->shared;

    for (u32 n = 0; n < count; n++)
        shared->outcomes[n].lost = true;
    shared->count = count;
    __atomic_store_n(&shared->command, NATIVE_RUN, __ATOMIC_RELEASE);
    syscall(SYS_futex, &shared->command, FUTEX_WAKE, 1, NULL, NULL, 0);
}

/* Waits for the batch; false when the program died or hung. */
static bool wait_idle(struct native_link *l)
{
    time_t give_up = time(NULL) + NATIVE_SECONDS;

    while (__atomic_load_n(&l->shared->command, __ATOMIC_ACQUIRE) != NATIVE_IDLE) {
        struct timespec wait = {.tv_nsec = 100000000};

        syscall(SYS_futex, &l->shared->command, FUTEX_WAIT, NATIVE_RUN, &wait, NULL, 0);
        if (waitpid(l->pid, NULL, WNOHANG) == l->pid)
            return false;
        if (time(NULL) > give_up) {
            kill(l->pid, SIGKILL);
            waitpid(l->pid, NULL, 0);
            return false;
        }
    }
    return true;
}

void native_finish(struct native_link *l, u32 count)
{
    struct shared *shared = l->shared;

    while (!wait_idle(l)) {
        u32 lost = shared->running, left = count - lost - 1;
        struct test_case *rest = calloc(BATCH, sizeof(*rest));
        struct outcome *done = calloc(BATCH, sizeof(*done));

        shared->command = NATIVE_IDLE;
        if (!rest || !done || start(l) < 0)
            abort();
        /* The cases behind it move to the front, are run, and go back. */
        memcpy(rest, shared->cases, BATCH * sizeof(*rest));
        memcpy(done, shared->outcomes, BATCH * sizeof(*done));
        memmove(shared->cases, shared->cases + lost + 1, left * sizeof(*rest));
        native_begin(l, left);
        native_finish(l, left);
        memcpy(done + lost + 1, shared->outcomes, left * sizeof(*done));
        memcpy(shared->cases, rest, BATCH * sizeof(*rest));
        memcpy(shared->outcomes, done, BATCH * sizeof(*done));
        free(rest);
        free(done);
        return;
    }
}
