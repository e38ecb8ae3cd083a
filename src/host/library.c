#include "host/library.h"

#include <dlfcn.h>
#include <errno.h>

int library_load(const char *soname, const struct library_symbol *symbols, size_t count,
                 struct error *err)
{
    void *library = dlopen(soname, RTLD_NOW | RTLD_LOCAL);

    if (!library)
        return error_host(err, ENOENT, "this needs a library: %s", dlerror());
    for (size_t i = 0; i < count; i++) {
        *symbols[i].address = dlsym(library, symbols[i].name);
        if (!*symbols[i].address)
            return error_host(err, ENOENT, "a library is too old: %s", dlerror());
    }
    return 0;
}
