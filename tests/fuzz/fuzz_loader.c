/*
 * Any file as a kernel: it is loaded, or refused with an input error of one line, and never writes
 * outside of guest memory. The input's first byte chooses; the rest is the file.
 */
#define _GNU_SOURCE /* memfd_create */
#include "host/log.h"
#include "machine/decompress.h"
#include "machine/layout.h"
#include "machine/loader.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define MEMORY_SIZE MIB(32)
#define UNPACKED_MAX MIB(1)

enum {
    OPTION_INITRD = 1,  /* the file is its own initrd, or module, as well */
    OPTION_PAYLOAD = 2, /* the file is a bare payload: unpack it */
};

static struct guest_memory memory;
static struct e820_map e820 = {
    .entries = {{0, LAYOUT_EBDA_BASE, E820_RAM},
                {LAYOUT_ACPI_BASE, LAYOUT_ACPI_END - LAYOUT_ACPI_BASE, E820_RESERVED},
                {MIB(1), MEMORY_SIZE - MIB(1), E820_RAM}},
    .count = 3,
};

int LLVMFuzzerInitialize(int *argc, char ***argv)
{
    struct error err;

    log_set_level(LOG_ERROR);
    if (memory_add_slot(&memory, 0, LAYOUT_VGA_BASE, 0, &err) ||
        memory_add_slot(&memory, MIB(1), MEMORY_SIZE - MIB(1), 0, &err))
        abort();
    return 0;
}

static void unpack(const u8 *data, size_t size)
{
    u32 unpacked = decompress_size(data, size);
    u8 *out;

    if (!unpacked || unpacked > UNPACKED_MAX)
        return;
    out = malloc(unpacked);
    decompress(data, size, out, unpacked);
    free(out);
}

static void load(const u8 *data, size_t size, bool initrd)
{
    struct loader_request req = {.cmdline = "quiet", .e820 = &e820, .memory = &memory};
    int fd = memfd_create("kernel", MFD_CLOEXEC);
    struct error err = {0};
    static struct cpu cpu;
    char path[32];

    if (fd < 0 || write(fd, data, size) != (ssize_t)size)
        abort();
    snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
    req.kernel = path;
    req.initrd = initrd ? path : NULL;
    if (loader_load(&req, &cpu, &err)) {
        if (err.class != ERROR_INPUT || !err.text[0] || strchr(err.text, '\n'))
            abort();
    } else if (!memory_host(&memory, cpu.gpr[GPR_RIP], 1)) {
        abort();
    }
    close(fd);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    if (!size)
        return 0;
    if (data[0] & OPTION_PAYLOAD)
        unpack(data + 1, size - 1);
    else
        load(data + 1, size - 1, data[0] & OPTION_INITRD);
    return 0;
}
