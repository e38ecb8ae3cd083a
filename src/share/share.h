/*
 * A directory of the host's that a guest mounts: a server of the FUSE protocol, as virtio-fs carries it (VIRTIO 1.2,
 * 5.11; linux/fuse.h is the protocol's specification).
 *
 * It needs no daemon and no root, and it does what the user whom this process belongs to may do, no more:
 *
 * 1. The guest names an inode by a number that it was given for it, and a file in a directory by one name, which is
 *    neither empty, "." nor "..", nor has it a slash. No link is ever followed here; the guest's kernel does that,
 *    within what it mounted. So nothing outside the directory can be named.
 * 2. Only regular files and directories are opened. A FIFO or socket is the guest's own, and a device can't be made.
 * 3. What the guest makes belongs to this process's user. Another owner that the guest wants is noted beside
 *    the file (mark.c), and so are set-user-ID bits: no file gets those on the host.
 * 4. Inodes that the guest knows, descriptors, open files and the length of each message are bounded.
 *
 * Locks (flock, fcntl) hold within the guest. What the host changes, the guest sees within a second, or when it
 * opens the file.
 */
#ifndef DOPPEL_SHARE_SHARE_H
#define DOPPEL_SHARE_SHARE_H

#include "host/error.h"
#include "host/types.h"

#include <sys/uio.h>

struct share;

struct share_config {
    const char *path; /* of the directory */
    bool read_only;
};

/* NULL with err set. */
struct share *share_open(const struct share_config *config, struct error *err);
/* Nothing may be under way. NULL is fine. */
void share_close(struct share *s);

/* A message of the guest's and the room for its answer, both in guest memory that changes at any time. */
struct share_request {
    const struct iovec *in;
    unsigned nin;
    const struct iovec *out;
    unsigned nout;
};

/*
 * Does what a message asks for, and blocks meanwhile; on any thread, several at once. Returns how many bytes of
 * `out` it wrote; 0 for what has no answer.
 */
size_t share_serve(struct share *s, const struct share_request *r);

/* How many inodes a guest may know: each costs it about a KiB, so this is its memory's size in KiB. */
void share_set_inodes_max(struct share *s, u64 n);
/* Whether a guest has it mounted: numbers of inodes and open files that another process knows nothing of. */
bool share_is_mounted(struct share *s);

#endif
