/*
 * virtio-blk: a disk. VIRTIO 1.2, 5.2.
 */
#ifndef DOPPEL_DEVICE_VIRTIO_BLK_H
#define DOPPEL_DEVICE_VIRTIO_BLK_H

#include "block/block.h"
#include "device/virtio/virtio.h"

#define VIRTIO_BLK_SERIAL_SIZE 20

struct virtio_blk_config {
    struct block_backend *backend; /* borrowed; outlives the device */
    const char *serial;            /* up to 20 characters; NULL: none */
    unsigned queues;
};

/* The device, on the bus at a place (pci.h). NULL with err set. */
struct virtio *virtio_blk_create(const struct device_env *env, const struct virtio_blk_config *cfg,
                                 struct pci_host *host, u16 place, struct error *err);

#endif
