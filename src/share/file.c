/*
 * Contents of files.
 */
#define _GNU_SOURCE /* fallocate, copy_file_range, SEEK_DATA */

#include "share/internal.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

/* What a guest may choose of how a file is opened. */
#define OPEN_FLAGS (O_ACCMODE | O_APPEND | O_TRUNC | O_SYNC)
#define COPY_MAX MIB(64) /* at a time; the guest asks again */

int open_node(const struct node *n, int flags)
{
    char path[PROC_PATH_SIZE];
    int fd;

    if (n->key.type != S_IFREG && n->key.type != S_IFDIR)
        return -EINVAL;
    proc_path(n->fd, path);
    if (n->key.type == S_IFDIR)
        flags = O_RDONLY | O_DIRECTORY;
    fd = open(path, (flags & (OPEN_FLAGS | O_DIRECTORY)) | O_CLOEXEC | O_NOCTTY);
    return fd < 0 ? -errno : fd;
}

/* Changes when the contents do, as far as times tell. */
static u64 contents_state(const struct statx *st)
{
    u64 hash = st->stx_size;

    hash = (hash ^ (u64)st->stx_mtime.tv_sec) * 0x9e3779b97f4a7c15ULL + st->stx_mtime.tv_nsec;
    hash = (hash ^ (u64)st->stx_ctime.tv_sec) * 0x9e3779b97f4a7c15ULL + st->stx_ctime.tv_nsec;
    return hash | 1;
}

/* Whether what the guest has cached of a file since it opened it last is still what the file holds. */
static bool is_unchanged(struct share *s, struct node *n)
{
    struct statx st;
    bool same;
    u64 state;

    if (stat_fd(n->fd, &st))
        return false;
    state = contents_state(&st);
    pthread_mutex_lock(&s->lock);
    same = n->opened_state == state;
    n->opened_state = state;
    pthread_mutex_unlock(&s->lock);
    return same;
}

int open_answer(struct share *s, struct node *n, int fd, struct fuse_open_out *out)
{
    bool directory = n->key.type == S_IFDIR;
    int ret = handle_create(s, n, fd, directory, &out->fh);

    if (ret) {
        close(fd);
        return ret;
    }
    if (!directory && is_unchanged(s, n))
        out->open_flags = FOPEN_KEEP_CACHE;
    return 0;
}

int op_open(struct call *c)
{
    const struct fuse_open_in *in = (const void *)c->args;
    struct fuse_open_out *out = call_reply(c, sizeof(*out));
    int flags = (int)in->flags, fd, ret;
    struct node *n;

    if (!out)
        return -EINVAL;
    if (c->share->read_only && ((flags & O_ACCMODE) != O_RDONLY || (flags & O_TRUNC)))
        return -EROFS;
    ret = node_get(c->share, c->header.nodeid, &n);
    if (ret)
        return ret;
    if (n->key.type != S_IFREG)
        ret = -EINVAL;
    else if (in->open_flags & FUSE_OPEN_KILL_SUIDGID)
        ret = mark_drop_set_id(n->fd);
    fd = ret ? ret : open_node(n, flags);
    ret = fd < 0 ? fd : open_answer(c->share, n, fd, out);
    if (ret)
        node_put(c->share, n);
    return ret ? ret : (int)sizeof(*out);
}

/* Straight into the guest's buffers. */
int op_read(struct call *c)
{
    struct fuse_read_in in;
    struct iovec iov[SHARE_IOV_MAX];
    struct handle *h;
    ssize_t done;
    unsigned n;
    int ret;

    memcpy(&in, c->args, sizeof(in));
    ret = handle_get(c->share, in.fh, false, &h);
    if (ret)
        return ret;
    n = call_iov_out(c, sizeof(struct fuse_out_header), MIN(in.size, c->room), iov);
    done = preadv(h->fd, iov, (int)n, (off_t)in.offset);
    ret = done < 0 ? -errno : (int)done;
    handle_put(c->share, h);
    c->in_place = true;
    return ret;
}

int op_write(struct call *c)
{
    struct fuse_write_out *out = call_reply(c, sizeof(*out));
    struct fuse_write_in in;
    struct iovec iov[SHARE_IOV_MAX];
    struct handle *h;
    ssize_t done;
    unsigned n;
    int ret;

    if (!out)
        return -EINVAL;
    memcpy(&in, c->args, sizeof(in));
    if (in.size > c->header.len - sizeof(c->header) - sizeof(in))
        return -EINVAL;
    ret = handle_get(c->share, in.fh, false, &h);
    if (ret)
        return ret;
    if (in.write_flags & FUSE_WRITE_KILL_SUIDGID)
        ret = mark_drop_set_id(h->node->fd);
    if (!ret) {
        n = call_iov_in(c, sizeof(c->header) + sizeof(in), in.size, iov);
        done = pwritev(h->fd, iov, (int)n, (off_t)in.offset);
        ret = done < 0 ? -errno : (int)sizeof(*out);
        out->size = done < 0 ? 0 : (u32)done;
    }
    handle_put(c->share, h);
    return ret;
}

int op_release(struct call *c)
{
    const struct fuse_release_in *in = (const void *)c->args;

    return handle_release(c->share, in->fh);
}

int op_fsync(struct call *c)
{
    const struct fuse_fsync_in *in = (const void *)c->args;
    bool data_only = in->fsync_flags & FUSE_FSYNC_FDATASYNC;
    struct handle *h;
    int ret = handle_get(c->share, in->fh, c->header.opcode == FUSE_FSYNCDIR, &h);

    if (ret)
        return ret;
    if ((data_only ? fdatasync(h->fd) : fsync(h->fd)) < 0)
        ret = -errno;
    handle_put(c->share, h);
    return ret;
}

int op_fallocate(struct call *c)
{
    struct fuse_fallocate_in in;
    struct handle *h;
    int ret;

    memcpy(&in, c->args, sizeof(in));
    ret = handle_get(c->share, in.fh, false, &h);
    if (ret)
        return ret;
    if (fallocate(h->fd, (int)in.mode, (off_t)in.offset, (off_t)in.length) < 0)
        ret = -errno;
    if (!ret)
        ret = mark_drop_set_id(h->node->fd);
    handle_put(c->share, h);
    return ret;
}

/* For holes only: the guest knows the other positions itself. Nobody else uses the descriptor's position. */
int op_lseek(struct call *c)
{
    struct fuse_lseek_out *out = call_reply(c, sizeof(*out));
    struct fuse_lseek_in in;
    struct handle *h;
    off_t at;
    int ret;

    if (!out)
        return -EINVAL;
    memcpy(&in, c->args, sizeof(in));
    if (in.whence != SEEK_DATA && in.whence != SEEK_HOLE)
        return -EINVAL;
    ret = handle_get(c->share, in.fh, false, &h);
    if (ret)
        return ret;
    at = lseek(h->fd, (off_t)in.offset, (int)in.whence);
    ret = at < 0 ? -errno : (int)sizeof(*out);
    out->offset = (u64)at;
    handle_put(c->share, h);
    return ret;
}

int op_copy_file_range(struct call *c)
{
    struct fuse_write_out *out = call_reply(c, sizeof(*out));
    struct fuse_copy_file_range_in in;
    struct handle *from, *to;
    off_t in_at, out_at;
    ssize_t done;
    int ret;

    if (!out)
        return -EINVAL;
    memcpy(&in, c->args, sizeof(in));
    ret = handle_get(c->share, in.fh_in, false, &from);
    if (ret)
        return ret;
    ret = handle_get(c->share, in.fh_out, false, &to);
    if (!ret) {
        in_at = (off_t)in.off_in;
        out_at = (off_t)in.off_out;
        done = copy_file_range(from->fd, &in_at, to->fd, &out_at, MIN(in.len, COPY_MAX), 0);
        ret = done < 0 ? -errno : mark_drop_set_id(to->node->fd);
        out->size = done < 0 ? 0 : (u32)done;
        handle_put(c->share, to);
    }
    handle_put(c->share, from);
    return ret ? ret : (int)sizeof(*out);
}
