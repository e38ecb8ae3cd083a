/*
 * A NOR flash chip with the Intel command set (CFI 0001), as firmware has it for its variables: bytes that are
 * read as memory, and programmed and erased by commands. What the guest changes goes to a file at once.
 */
#ifndef DOPPEL_DEVICE_PFLASH_H
#define DOPPEL_DEVICE_PFLASH_H

#include "device/device.h"

#define PFLASH_MAX MIB(1)
#define PFLASH_BLOCK 4096U

struct pflash;

struct pflash_config {
    gpa_t base;
    const u8 *data; /* what is in it: copied */
    u32 size;       /* of whole blocks, PFLASH_MAX at most */
    int fd;         /* the file that holds the same, borrowed; -1: none */
};

struct pflash *pflash_create(const struct device_env *env, const struct pflash_config *cfg,
                             struct error *err);
struct device *pflash_device(struct pflash *p);

#endif
