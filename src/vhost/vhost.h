/*
 * The front-end's side of the vhost-user protocol (QEMU's docs/interop/vhost-user.rst): the connection to a process
 * that is a device's backend. It gets guest memory by file descriptor, and queues with an eventfd each way.
 *
 * The backend is a peer, not a part of this program: it may answer nonsense, late, or never. An answer is bounded in
 * length and time and is checked; what it sends beside answers isn't looked at.
 */
#ifndef DOPPEL_VHOST_VHOST_H
#define DOPPEL_VHOST_VHOST_H

#include "bus/memory.h"
#include "host/error.h"
#include "host/types.h"

#define VHOST_CONFIG_MAX 256 /* bytes of a device's configuration */
#define VHOST_REGIONS_MAX 8  /* that every backend can take */

#define VHOST_F_PROTOCOL_FEATURES BIT(30) /* among a device's feature bits */

struct vhost_link {
    const char *path; /* of the backend's socket */
    int fd;           /* -1: not connected */
    /* What the backend said. */
    u64 features;
    u64 protocol_features;
    unsigned queues; /* of a device with several; 1 when it doesn't say */
    u8 config[VHOST_CONFIG_MAX];
    unsigned config_size; /* 0: it has none to tell */
};

/* Memory that the backend is given. It knows each byte by its guest-physical address only, for rings, too. */
struct vhost_region {
    gpa_t gpa;
    u64 size;
    int fd;
    u64 fd_offset;
};

struct vhost_ring {
    u16 size;
    u16 base;                   /* the index of the first entry that it will find available */
    gpa_t desc, driver, device; /* as in VIRTIO 1.2, 2.7 */
    int kick_fd, call_fd;       /* eventfds: there is work, work was done */
};

/*
 * Connects, and asks what the backend is: it must have `config_size` bytes of configuration, unless that is 0. Blocks for some
 * seconds at most. 0, or -errno with err set and nothing connected.
 */
int vhost_connect(struct vhost_link *l, unsigned config_size, struct error *err);
void vhost_disconnect(struct vhost_link *l);

/* These send and don't wait: 0, or -errno when the backend is gone or takes nothing any more. */
int vhost_set_features(struct vhost_link *l, u64 features);
int vhost_set_memory(struct vhost_link *l, const struct vhost_region *regions, unsigned n);
int vhost_start_ring(struct vhost_link *l, unsigned index, const struct vhost_ring *r);
int vhost_write_config(struct vhost_link *l, u32 offset, const void *data, u32 len);
/* After this returns 0 the backend does nothing with the ring any more. Blocks for some seconds at most. */
int vhost_stop_ring(struct vhost_link *l, unsigned index);

/*
 * The guest's RAM as regions: slots that lie in one piece of its file are one. The user's files (MEMORY_FILE) are not
 * handed out. Returns how many, the largest first.
 */
unsigned vhost_memory_regions(const struct guest_memory *m, struct vhost_region *regions,
                              unsigned max);

#endif
