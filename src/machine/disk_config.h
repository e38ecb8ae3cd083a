/*
 * A disk of the machine, as those who build it hand it down.
 */
#ifndef DOPPEL_MACHINE_DISK_CONFIG_H
#define DOPPEL_MACHINE_DISK_CONFIG_H

#include "host/types.h"

#define MACHINE_DISKS_MAX 16

struct block_backend;

struct machine_disk {
    struct block_backend *backend;
    const char *serial; /* NULL: none */
    bool stop_on_error; /* werror=stop */
};

struct machine_disks {
    struct machine_disk disk[MACHINE_DISKS_MAX];
    unsigned count;
};

#endif
