/* The oracle test: the native side (native.c), seen from the test's own process. */
#ifndef DOPPEL_TESTS_CPU_NATIVE_LINK_H
#define DOPPEL_TESTS_CPU_NATIVE_LINK_H

#include "case.h"

#include <sys/types.h>

struct native_link {
    const char *program;
    struct shared *shared;
    int fd; /* of shared */
    pid_t pid;
};

/* Makes the shared memory and starts the program. read_only: the window's page that can't be written.
 * 0, or -errno. */
int native_open(struct native_link *l, const char *program, const u8 read_only[PAGE]);
void native_close(struct native_link *l);

/* Has shared->cases run, the first `count` of them, while the caller goes on. */
void native_begin(struct native_link *l, u32 count);
/* Waits until they are done. A case that ended the program is lost, the others have their outcomes. */
void native_finish(struct native_link *l, u32 count);

#endif
