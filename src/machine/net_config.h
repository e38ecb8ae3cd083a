/*
 * The machine's network cards and vsock, as those who build it hand them down.
 */
#ifndef DOPPEL_MACHINE_NET_CONFIG_H
#define DOPPEL_MACHINE_NET_CONFIG_H

#include "host/types.h"

#define MACHINE_NETS_MAX 8

struct net_backend;
struct vsock;

struct machine_nets {
    struct net_backend *backend[MACHINE_NETS_MAX];
    unsigned count;
    struct vsock *vsock; /* NULL: none */
};

#endif
