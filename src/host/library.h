/*
 * Shared libraries that few machines need, loaded when one does. Each that is linked costs every start the time and the
 * memory of its relocations, and of those of all the libraries that it needs.
 *
 *     #define FUNCTIONS(X) X(foo_open) X(foo_close)
 *     static struct {
 *     #define MEMBER(name) __typeof__(name) *name;
 *         FUNCTIONS(MEMBER)
 *     } foo;
 *     static const struct library_symbol symbols[] = {
 *     #define SYMBOL(name) {#name, (void **)&foo.name},
 *         FUNCTIONS(SYMBOL)
 *     };
 *     library_load("libfoo.so.1", symbols, ARRAY_SIZE(symbols), err)
 */
#ifndef DOPPEL_HOST_LIBRARY_H
#define DOPPEL_HOST_LIBRARY_H

#include "host/error.h"

#include <stddef.h>

struct library_symbol {
    const char *name;
    void **address; /* of a pointer to the function or variable, which is set */
};

/*
 * Finds all of these in the library of this soname, which then stays loaded. 0, or -errno with err set. Not from two
 * threads for the same symbols.
 */
int library_load(const char *soname, const struct library_symbol *symbols, size_t count,
                 struct error *err);

#endif
