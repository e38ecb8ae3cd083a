/*
 * virtio-balloon: memory that the guest gives back. VIRTIO 1.2, 5.5, with the statistics queue, deflation when
 * the guest runs out of memory, free page reporting and hinting. Pages that it gives or reports are the host's at
 * once, and read as zeroes when the guest takes them again; what is hinted stays as it is.
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

/*
 * A round of hints: which memory the guest doesn't use, at the time when it says so. It may use it again before the
 * hint is seen, so a hint holds only for pages that the dirty log, begun before the round, has no write to. All are
 * called on the loop's thread or a vCPU's with the device's lock held, and call nothing of the device's.
 */
struct balloon_hints {
    void (*free)(void *opaque, gpa_t gpa, u64 len); /* not of whole pages necessarily */
    void (*done)(void *opaque); /* once: the guest said all, or was reset in the midst of it */
    void *opaque;
};
/* Asks for a round. False: the guest has no driver that knows of hints, or is at one already. Any thread. */
bool virtio_balloon_hint(struct virtio_balloon *b, const struct balloon_hints *hints);

#endif
