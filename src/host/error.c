#include "host/error.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

/* Names come from users and from images: what they hold must not end the line, or steer the terminal. */
static void set_text(struct error *err, const char *fmt, va_list args)
{
    vsnprintf(err->text, sizeof(err->text), fmt, args);
    for (char *c = err->text; *c; c++) {
        if ((unsigned char)*c < ' ' || *c == 0x7f)
            *c = '?';
    }
}

int error_input(struct error *err, const char *fmt, ...)
{
    va_list args;

    err->class = ERROR_INPUT;
    va_start(args, fmt);
    set_text(err, fmt, args);
    va_end(args);
    return -EINVAL;
}

int error_host(struct error *err, int errnum, const char *fmt, ...)
{
    va_list args;
    size_t used;

    err->class = ERROR_HOST;
    va_start(args, fmt);
    set_text(err, fmt, args);
    va_end(args);
    used = strlen(err->text);
    snprintf(err->text + used, sizeof(err->text) - used, ": %s", strerror(errnum));
    return -errnum;
}

void error_prefix(struct error *err, const char *fmt, ...)
{
    char old[sizeof(err->text)];
    va_list args;
    size_t used;

    memcpy(old, err->text, sizeof(old));
    va_start(args, fmt);
    set_text(err, fmt, args);
    va_end(args);
    used = strlen(err->text);
    snprintf(err->text + used, sizeof(err->text) - used, ": %s", old);
}
