/*
 * virtio-balloon: memory that the guest gives back. VIRTIO 1.2, 5.5, with the statistics queue, deflation when
 * the guest runs out of memory, and free page reporting. Pages that it gives are the host's at once, and read as
 * zeroes when the guest takes them again.
 */
#ifndef DOPPEL_DEVICE_VIRTIO_BALLOON_H
#define DOPPEL_DEVICE_VIRTIO_BALLOON_H

#include "device/virtio/virtio.h"

#define BALLOON_STATS 10 /* tags of 5.5.6.3, by number */

struct virtio_balloon;

struct balloon_stats {
    u64 value[BALLOON_STATS];
    u32 known; /* bits of those that the guest told */
};

/* The device, on the bus at devfn. NULL with err set. */
struct virtio_balloon *virtio_balloon_create(const struct device_env *env, struct pci_host *host,
                                             u8 devfn, struct error *err);
struct virtio *virtio_balloon_virtio(struct virtio_balloon *b);

/* How much memory the guest is asked to give, in bytes. Any thread. */
void virtio_balloon_set_target(struct virtio_balloon *b, u64 bytes);
/* How much it says that it gave. */
u64 virtio_balloon_actual(struct virtio_balloon *b);
/* What the guest told last; and asks for news, which come some time later. */
void virtio_balloon_stats(struct virtio_balloon *b, struct balloon_stats *out);

#endif
