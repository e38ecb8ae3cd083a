/*
 * Errors that travel back to the user: a class that decides the exit status, and one line of text
 * that says what, where and how to mend it. Control characters in it become '?'.
 *
 * A function that can fail returns 0 or a negative errno and takes a `struct error *` last. Only the
 * place that knows the reason writes the text; callers pass the error on or put a prefix before it.
 */
#ifndef DOPPEL_HOST_ERROR_H
#define DOPPEL_HOST_ERROR_H

#include "host/types.h"

enum error_class {
    ERROR_NONE = 0,
    ERROR_HOST = 1,  /* the host failed us: exit status 1 */
    ERROR_INPUT = 2, /* what the user gave is wrong: exit status 2 */
};

struct error {
    enum error_class class;
    char text[512];
};

/* Sets a user's error; returns -EINVAL. */
int error_input(struct error *err, const char *fmt, ...) PRINTF_LIKE(2, 3);

/* Sets a host failure; errnum is a positive errno whose strerror is appended; returns -errnum. */
int error_host(struct error *err, int errnum, const char *fmt, ...) PRINTF_LIKE(3, 4);

/* Puts "prefix: " before the text already set. */
void error_prefix(struct error *err, const char *fmt, ...) PRINTF_LIKE(2, 3);

#endif
