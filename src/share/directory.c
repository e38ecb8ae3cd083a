/*
 * Contents of directories. The position that a guest asks for is the host's own: the d_off of the entry before.
 */
#define _GNU_SOURCE /* getdents64 */

#include "share/internal.h"

#include <dirent.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define LIST_MAX KIB(64) /* of one answer */
#define ENTRIES_SIZE KIB(8)

struct listing {
    struct call *call;
    struct node *dir;
    bool plus; /* each entry with what a lookup would tell */
    u8 *out;
    size_t size, used;
};

int op_opendir(struct call *c)
{
    struct fuse_open_out *out = call_reply(c, sizeof(*out));
    struct node *n;
    int fd, ret;

    if (!out)
        return -EINVAL;
    ret = node_get(c->share, c->header.nodeid, &n);
    if (ret)
        return ret;
    fd = n->key.type == S_IFDIR ? open_node(n, O_RDONLY) : -ENOTDIR;
    ret = fd < 0 ? fd : open_answer(c->share, n, fd, out);
    if (ret)
        node_put(c->share, n);
    return ret ? ret : (int)sizeof(*out);
}

static bool is_dot(const char *name)
{
    return name[0] == '.' && (!name[1] || (name[1] == '.' && !name[2]));
}

/* One that is gone meanwhile, or can't be told of, is a name without an inode: the guest looks it up if it wants. */
static void look_up(struct listing *l, const char *name, struct fuse_entry_out *out)
{
    int fd = is_dot(name) ? -1 : open_name(l->dir, name);

    if (fd >= 0 && enter(l->call->share, l->dir, name, fd, out, NULL))
        *out = (struct fuse_entry_out){0};
}

/* Whether there was room for it. */
static bool list_entry(struct listing *l, const struct dirent64 *d)
{
    size_t name_len = strlen(d->d_name), entry_size = l->plus ? sizeof(struct fuse_entry_out) : 0;
    size_t size = entry_size + FUSE_DIRENT_ALIGN(FUSE_NAME_OFFSET + name_len);
    u8 *at = l->out + l->used;
    struct fuse_dirent entry = {
        .ino = d->d_ino,
        .off = (u64)d->d_off,
        .namelen = (u32)name_len,
        .type = d->d_type,
    };

    if (size > l->size - l->used)
        return false;
    if (l->plus)
        look_up(l, d->d_name, (struct fuse_entry_out *)at);
    memcpy(at + entry_size, &entry, FUSE_NAME_OFFSET);
    memcpy(at + entry_size + FUSE_NAME_OFFSET, d->d_name, name_len);
    l->used += size;
    return true;
}

/* Fills the listing from a position on. The handle's lock is held, for the position is the descriptor's. */
static int fill(struct listing *l, int fd, u64 from)
{
    u8 entries[ENTRIES_SIZE] __attribute__((aligned(8)));

    if (lseek(fd, (off_t)from, SEEK_SET) < 0)
        return -errno;
    for (;;) {
        ssize_t len = getdents64(fd, entries, sizeof(entries));

        if (len < 0)
            return -errno;
        if (!len)
            return 0;
        for (ssize_t at = 0; at < len;) {
            const struct dirent64 *d = (const void *)(entries + at);

            if (!list_entry(l, d))
                return 0;
            at += d->d_reclen;
        }
    }
}

static int list(struct call *c, bool plus)
{
    struct listing l = {.call = c, .plus = plus};
    struct fuse_read_in in;
    struct handle *h;
    int ret;

    memcpy(&in, c->args, sizeof(in));
    ret = handle_get(c->share, in.fh, true, &h);
    if (ret)
        return ret;
    l.dir = h->node;
    l.size = MIN(MIN(in.size, c->room), LIST_MAX);
    l.out = call_reply(c, l.size);
    if (l.out) {
        pthread_mutex_lock(&h->position);
        ret = fill(&l, h->fd, in.offset);
        pthread_mutex_unlock(&h->position);
        /* What was entered has to reach the guest, which counts it. */
        if (ret && l.used)
            ret = 0;
    } else {
        ret = -ENOMEM;
    }
    handle_put(c->share, h);
    return ret ? ret : (int)l.used;
}

int op_readdir(struct call *c)
{
    return list(c, false);
}

int op_readdirplus(struct call *c)
{
    return list(c, true);
}
