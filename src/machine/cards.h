/*
 * Disks, console ports, networks and shared directories of the machine, as those who build it hand them down.
 */
#ifndef DOPPEL_MACHINE_CARDS_H
#define DOPPEL_MACHINE_CARDS_H

#include "host/types.h"

#define MACHINE_DISKS_MAX 16

struct block_backend;

enum machine_disk_bus {
    MACHINE_DISK_VIRTIO, /* a device of its own */
    MACHINE_DISK_IDE,    /* a drive of the one IDE controller */
    MACHINE_DISK_NVME,   /* a namespace of the controller that those of its serial number share */
};

struct machine_disk {
    struct block_backend *backend; /* NULL: vhost_user */
    const char *vhost_user;        /* the socket of a backend in another process */
    const char *serial;            /* NULL: none */
    bool stop_on_error;            /* werror=stop */
    enum machine_disk_bus bus;
    bool cdrom; /* on IDE only */
};

struct machine_disks {
    struct machine_disk disk[MACHINE_DISKS_MAX];
    unsigned count;
};

#define MACHINE_PMEMS_MAX 4

/* Files that the guest has as memory: raw images. */
struct machine_pmems {
    struct block_backend *backend[MACHINE_PMEMS_MAX];
    unsigned count;
};

#define MACHINE_SLOTS_MAX 8 /* for cards that come and go */

#define MACHINE_CONSOLES_MAX 16

struct chardev;

struct machine_consoles {
    struct {
        struct chardev *chr;
        const char *name; /* NULL: a console, else a port of that name */
    } port[MACHINE_CONSOLES_MAX];
    unsigned count;
};

#define MACHINE_NETS_MAX 8

struct net_backend;
struct vsock;

struct machine_nets {
    struct net_backend *backend[MACHINE_NETS_MAX];
    unsigned count;
    struct vsock *vsock; /* NULL: none */
};

#define MACHINE_SHARES_MAX 8

struct share;

struct machine_share {
    struct share *share;    /* NULL: vhost_user */
    const char *vhost_user; /* the socket of a backend in another process */
    const char *tag;
};

struct machine_shares {
    struct machine_share dir[MACHINE_SHARES_MAX];
    unsigned count;
};

#endif
