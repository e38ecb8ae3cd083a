/*
 * A folder of its own for a test's files: folder_make and folder_remove as set-up and tear-down of the group.
 */
#ifndef DOPPEL_TESTS_UNIT_FOLDER_H
#define DOPPEL_TESTS_UNIT_FOLDER_H

#include <stdio.h>
#include <stdlib.h>

static char folder[] = "/tmp/doppel-test-XXXXXX";

static inline int folder_make(void **state)
{
    (void)state;
    return mkdtemp(folder) ? 0 : -1;
}
static inline int folder_remove(void **state)
{
    char command[64];

    (void)state;
    snprintf(command, sizeof(command), "rm -r %s", folder);
    return system(command);
}

#endif
