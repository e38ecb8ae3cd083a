/*
 * virtio-rng: randomness of the host's. VIRTIO 1.2, 5.4.
 */
#ifndef DOPPEL_DEVICE_VIRTIO_RNG_H
#define DOPPEL_DEVICE_VIRTIO_RNG_H

#include "device/virtio/virtio.h"

/* The device, on the bus at devfn. NULL with err set. */
struct virtio *virtio_rng_create(const struct device_env *env, struct pci_host *host, u8 devfn,
                                 struct error *err);

#endif
