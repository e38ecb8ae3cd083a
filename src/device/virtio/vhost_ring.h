/*
 * A queue between this program and a vhost-user backend: a split virtqueue (VIRTIO 1.2, 2.7) of which we are the
 * driver.
 *
 * The guest's queues stay between the guest and us. Its chains are handed on by a ring of our own, in memory that
 * only the backend shares, with the guest's buffers in the descriptors; the data isn't copied. So
 * what the backend does to rings is checked before the guest sees any of it, what it wrote to the guest's
 * buffers is told to the engine before the guest can know that it is there, and when the backend dies, what it
 * had is known and can be given to the next one.
 *
 * The caller holds the device's lock.
 */
#ifndef DOPPEL_DEVICE_VIRTIO_VHOST_RING_H
#define DOPPEL_DEVICE_VIRTIO_VHOST_RING_H

#include "device/virtio/queue.h"
#include "vhost/vhost.h"

#define VHOST_RING_SIZE 256        /* entries; that much every backend takes */
#define VHOST_RING_BYTES KIB(1088) /* of the memory that it lies in */

struct vhost_ring_entry {      /* by the number of its first descriptor */
    struct virtq_chain *chain; /* NULL: not in use */
    u16 ndesc;
    u64 order; /* when it was popped from the guest's queue */
};

struct vhost_shadow {
    u8 *host;  /* VHOST_RING_BYTES, zeroed */
    gpa_t gpa; /* where the backend has them */
    bool indirect;
    /* Ours alone: nothing is ever read back from descriptors. */
    u16 next_avail, next_used;
    u16 first_free, nfree;
    u16 next_free[VHOST_RING_SIZE];
    u64 pushed;
    struct vhost_ring_entry entries[VHOST_RING_SIZE];
};

/* Anew and empty. `indirect`: the backend takes tables of descriptors. */
void vhost_shadow_reset(struct vhost_shadow *s, bool indirect);
/* Where its parts are, for vhost_start_ring; the backend begins with what it holds. */
void vhost_shadow_describe(const struct vhost_shadow *s, struct vhost_ring *r);

/* Hands a chain to the backend: false when there is no room. */
bool vhost_shadow_push(struct vhost_shadow *s, struct virtq_chain *chain);
/* Whether no room could ever be enough for a chain. */
bool vhost_shadow_is_too_long(const struct vhost_shadow *s, const struct virtq_chain *chain);
/* After pushes: whether the backend wants a kick for them. */
bool vhost_shadow_wants_kick(const struct vhost_shadow *s);
/*
 * A chain that the backend is done with, and how many bytes it says that it wrote: 1, 0 when there is none, -EPROTO
 * when it gave back what it doesn't have.
 */
int vhost_shadow_take(struct vhost_shadow *s, struct virtq_chain **chain, u32 *written);
/*
 * Of a backend that has stopped or is gone: the chain that was pushed last of those that it still has, or NULL. *last:
 * nothing was pushed after it.
 */
struct virtq_chain *vhost_shadow_take_back(struct vhost_shadow *s, bool *last);

#endif
