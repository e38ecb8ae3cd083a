/*
 * virtio-pmem: a file as memory of the guest's. VIRTIO 1.2, 5.19. The memory is a slot that the machine has already;
 * the device tells where it is, and has what the guest wrote there brought to the medium when the guest asks.
 */
#ifndef DOPPEL_DEVICE_VIRTIO_PMEM_H
#define DOPPEL_DEVICE_VIRTIO_PMEM_H

#include "block/block.h"
#include "device/virtio/virtio.h"

struct virtio_pmem_config {
    struct block_backend *backend; /* of the file, for flushes; borrowed */
    gpa_t start;
    u64 size; /* bytes */
};

/* The device, on the bus at a place (pci.h). NULL with err set. */
struct virtio *virtio_pmem_create(const struct device_env *env,
                                  const struct virtio_pmem_config *cfg, struct pci_host *host,
                                  u16 place, struct error *err);

#endif
