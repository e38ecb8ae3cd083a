/*
 * virtio-vsock: streams between the guest and the host, without a network. VIRTIO 1.2, 5.10.
 */
#ifndef DOPPEL_DEVICE_VIRTIO_VSOCK_H
#define DOPPEL_DEVICE_VIRTIO_VSOCK_H

#include "device/virtio/virtio.h"
#include "net/vsock.h"

/* The device, on the bus at devfn; the host's side is borrowed. NULL with err set. */
struct virtio *virtio_vsock_create(const struct device_env *env, struct vsock *host_side,
                                   struct pci_host *host, u8 devfn, struct error *err);

#endif
