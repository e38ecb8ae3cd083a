/*
 * virtio-fs: a file system of the host's. VIRTIO 1.2, 5.11.
 */
#ifndef DOPPEL_DEVICE_VIRTIO_FS_H
#define DOPPEL_DEVICE_VIRTIO_FS_H

#include "device/virtio/virtio.h"
#include "share/share.h"

#define VIRTIO_FS_TAG_SIZE 36

/*
 * The device, on the bus at devfn, that serves a directory (borrowed) under a tag of 1 to VIRTIO_FS_TAG_SIZE bytes.
 * NULL with err set.
 */
struct virtio *virtio_fs_create(const struct device_env *env, struct share *share, const char *tag,
                                struct pci_host *host, u8 devfn, struct error *err);

#endif
