/*
 * Virtqueues: how a driver hands buffers to a device and gets them back. Virtual I/O Device (VIRTIO) 1.2,
 * 2.7 (split) and 2.8 (packed).
 *
 * The driver is hostile: everything in the rings may be nonsense and may change at any time. A descriptor
 * is copied once and then judged; a chain is bounded in its number of descriptors; each buffer is checked
 * to be guest memory before anyone sees it. What doesn't hold ends in -EPROTO: the device then needs a
 * reset (2.1.1). Buffers are host pointers, and their contents are the guest's to change under way:
 * who acts on a header copies it first (virtq_chain_read).
 *
 * The caller holds the device's lock.
 */
#ifndef DOPPEL_DEVICE_VIRTIO_QUEUE_H
#define DOPPEL_DEVICE_VIRTIO_QUEUE_H

#include "bus/memory.h"
#include "host/types.h"
#include "state/fields.h"

#include <sys/uio.h>

#define VIRTQ_SIZE_MAX 256 /* entries; what we offer */
/* Buffers of a chain. A buffer that reaches from one memory slot into the next counts twice. */
#define VIRTQ_SEGMENTS_MAX (VIRTQ_SIZE_MAX + 8)

struct virtq {
    /* Set by the driver through the transport. */
    u16 size;
    u16 vector;
    bool enabled;
    bool packed, event_idx; /* negotiated; constant while enabled */
    gpa_t desc, driver, device;

    /* Where the device is. The wrap counters are those of packed rings. */
    u16 next_avail, next_used;
    bool avail_wrap, used_wrap;
    u16 unsignalled; /* used entries since the driver was last considered for an interrupt */
    /* Used entries that the driver isn't to see yet; packed: what will show them, the flags of the first. */
    u16 held, held_flags;
    gpa_t held_entry;
};

extern const struct state_desc virtq_state;

struct virtq_segment {
    gpa_t gpa;
    u8 *host;
    u32 len;
};

/* A chain of buffers, taken from the queue: first what the device reads, then what it writes. */
struct virtq_chain {
    u16 id;
    u16 ndesc;       /* entries of the ring that it takes (packed) */
    unsigned nread;  /* segments */
    unsigned nwrite; /* segments after those */
    u64 read_len, write_len;
    struct virtq_segment segments[VIRTQ_SEGMENTS_MAX];
};

void virtq_reset(struct virtq *q);
/* The driver enables it: 0, or -EPROTO when size or addresses are impossible. */
int virtq_enable(struct virtq *q, const struct guest_memory *m);

/* Takes the next chain: 1, 0 when there is none, -EPROTO for nonsense. */
int virtq_pop(struct virtq *q, const struct guest_memory *m, struct virtq_chain *chain);
/* Takes the last pop back: the chain will be popped again. */
void virtq_unpop(struct virtq *q, const struct virtq_chain *chain);
/*
 * Gives a chain back, `written` bytes of its writable buffers filled (from the first on). 0 or -EPROTO.
 */
int virtq_push(struct virtq *q, const struct guest_memory *m, const struct virtq_chain *chain,
               u32 written);
/* The same, but the driver sees it with the next virtq_push, and all at once: virtio 1.2, 5.1.6.4. */
int virtq_push_held(struct virtq *q, const struct guest_memory *m, const struct virtq_chain *chain,
                    u32 written);
/* After pushes: whether the driver wants an interrupt for them. */
bool virtq_should_signal(struct virtq *q, const struct guest_memory *m);
/*
 * Asks the driver to tell about new chains, or not to: advice. After turning it on, look once more whether
 * there is one (virtq_pop), for it may have come before the driver saw this.
 */
void virtq_set_notify(struct virtq *q, const struct guest_memory *m, bool on);

/* Copies from what the device reads, to what it writes: bytes copied, fewer at the end of the chain. */
size_t virtq_chain_read(const struct virtq_chain *chain, u64 offset, void *buf, size_t len);
size_t virtq_chain_write(const struct virtq_chain *chain, u64 offset, const void *buf, size_t len);
/*
 * A part of the read (or written) buffers as host addresses: [offset, offset + len) must lie within them.
 * Returns the number of iovecs, at most VIRTQ_SEGMENTS_MAX.
 */
unsigned virtq_chain_iov(const struct virtq_chain *chain, bool write, u64 offset, u64 len,
                         struct iovec *iov);

#endif
