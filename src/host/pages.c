#include "host/pages.h"

#include <sys/mman.h>

void *pages_alloc(size_t size)
{
    void *p = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
                   -1, 0);

    return p == MAP_FAILED ? NULL : p;
}

void *pages_alloc_huge(size_t size)
{
    void *p = pages_alloc(size);

    if (p)
        pages_want_huge(p, size);
    return p;
}

void pages_want_huge(void *pages, size_t size)
{
    madvise(pages, size, MADV_HUGEPAGE);
}

void pages_free(void *pages, size_t size)
{
    if (pages)
        munmap(pages, size);
}
