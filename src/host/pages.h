/*
 * Large arrays: zeroed memory of the host's, which costs nothing until it is touched.
 */
#ifndef DOPPEL_HOST_PAGES_H
#define DOPPEL_HOST_PAGES_H

#include <stddef.h>

/* `size` bytes of zeroes, for pages_free. NULL, and errno: there is no address space. */
void *pages_alloc(size_t size);
/* The same, on huge pages where the host has some: for what is looked up all over, or filled in order. */
void *pages_alloc_huge(size_t size);
/* For the first `size` bytes of what pages_alloc returned, where the rest is used here and there only. */
void pages_want_huge(void *pages, size_t size);
/* NULL is nothing. */
void pages_free(void *pages, size_t size);

#endif
