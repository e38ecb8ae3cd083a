/*
 * virtio-net: a network card. VIRTIO 1.2, 5.1.
 */
#ifndef DOPPEL_DEVICE_VIRTIO_NET_H
#define DOPPEL_DEVICE_VIRTIO_NET_H

#include "device/virtio/virtio.h"
#include "net/net.h"

struct virtio_net_config {
    struct net_backend *backend; /* borrowed */
    const u8 *rom;               /* borrowed: an expansion ROM, for firmware; NULL: none */
    u32 rom_size;
};

/* The device, on the bus at a place (pci.h), attached to its backend. NULL with err set. */
struct virtio *virtio_net_create(const struct device_env *env, const struct virtio_net_config *cfg,
                                 struct pci_host *host, u16 place, struct error *err);

#endif
