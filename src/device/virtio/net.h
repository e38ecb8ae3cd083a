/*
 * virtio-net: a network card. VIRTIO 1.2, 5.1.
 */
#ifndef DOPPEL_DEVICE_VIRTIO_NET_H
#define DOPPEL_DEVICE_VIRTIO_NET_H

#include "device/virtio/virtio.h"
#include "net/net.h"

/* The device, on the bus at a place (pci.h), attached to a backend (borrowed). NULL with err set. */
struct virtio *virtio_net_create(const struct device_env *env, struct net_backend *backend,
                                 struct pci_host *host, u16 place, struct error *err);

#endif
