/*
 * Virtio devices whose backend is another process, by the vhost-user protocol: disks, network cards, file systems.
 *
 * The guest sees a device of ours like any other: registers, queues, resets and interrupts are this program's. Only
 * chains of buffers go to the backend (vhost_ring.h), which has guest memory mapped. It can do to the guest
 * whatever it wants, therefore, and nothing to this program.
 *
 * Should the backend go away, that is logged, and it is called again each second. A disk's requests wait
 * meanwhile, those included that it had begun; a network card has no link; a file system's requests fail, as its
 * state went with the backend, until the guest mounts it anew.
 */
#ifndef DOPPEL_DEVICE_VIRTIO_VHOST_USER_H
#define DOPPEL_DEVICE_VIRTIO_VHOST_USER_H

#include "device/virtio/virtio.h"

enum vhost_user_kind { VHOST_USER_BLK, VHOST_USER_NET, VHOST_USER_FS };

struct vhost_user_config {
    enum vhost_user_kind kind;
    const char *path; /* of the backend's socket; outlives the device */
    unsigned queues;  /* of a disk: at most */
    const u8 *mac;    /* of a network card */
    const char *tag;  /* of a file system: 1 to 36 bytes */
};

/*
 * The device, on the bus at a place (pci.h). The backend must be there; guest memory must be in a file (memory_use_file).
 * NULL with err set.
 */
struct virtio *vhost_user_create(const struct device_env *env, const struct vhost_user_config *cfg,
                                 struct pci_host *host, u16 place, struct error *err);

#endif
