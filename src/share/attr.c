/*
 * What a guest asks about an inode, and changes of it: attributes, extended attributes, the file system's sizes.
 */
#define _GNU_SOURCE /* statx, AT_EMPTY_PATH */

#include "share/internal.h"

#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/statfs.h>
#include <sys/xattr.h>
#include <unistd.h>

#include <linux/limits.h>
#include <linux/xattr.h>

/* How long the guest believes what it was told, in seconds. */
#define VALID_SECONDS 1

void proc_path(int fd, char path[PROC_PATH_SIZE])
{
    snprintf(path, PROC_PATH_SIZE, "/proc/self/fd/%d", fd);
}

int stat_fd(int fd, struct statx *st)
{
    return statx(fd, "", AT_EMPTY_PATH, STATX_BASIC_STATS | STATX_BTIME, st) < 0 ? -errno : 0;
}

int stat_for_guest(int fd, struct statx *st)
{
    int ret = stat_fd(fd, st);

    if (!ret)
        mark_apply(fd, st);
    return ret;
}

/* A device's number in 32 bits, as Linux has it in file systems. */
static u32 encode_device(u32 major, u32 minor)
{
    return (minor & 0xff) | major << 8 | (minor & ~0xffU) << 12;
}

void fill_attr(const struct share *s, const struct statx *st, struct fuse_attr *attr)
{
    u64 dev = (u64)st->stx_dev_major << 32 | st->stx_dev_minor;

    *attr = (struct fuse_attr){
        /* What is mounted below the directory has inode numbers of its own. */
        .ino = st->stx_ino ^ (dev == s->dev ? 0 : dev * 0x9e3779b97f4a7c15ULL),
        .size = st->stx_size,
        .blocks = st->stx_blocks,
        .atime = (u64)st->stx_atime.tv_sec,
        .mtime = (u64)st->stx_mtime.tv_sec,
        .ctime = (u64)st->stx_ctime.tv_sec,
        .atimensec = st->stx_atime.tv_nsec,
        .mtimensec = st->stx_mtime.tv_nsec,
        .ctimensec = st->stx_ctime.tv_nsec,
        .mode = st->stx_mode,
        .nlink = st->stx_nlink,
        .uid = st->stx_uid,
        .gid = st->stx_gid,
        .rdev = encode_device(st->stx_rdev_major, st->stx_rdev_minor),
        .blksize = st->stx_blksize,
    };
}

int enter(struct share *s, struct node *parent, const char *name, int fd,
          struct fuse_entry_out *out, struct node **node)
{
    struct node *n;
    struct statx st;
    int ret = stat_for_guest(fd, &st);

    if (ret) {
        close(fd);
        return ret;
    }
    fill_attr(s, &st, &out->attr);
    ret = node_found(s, parent, name, fd, &st, &n);
    if (ret)
        return ret;
    out->nodeid = n->id;
    out->entry_valid = out->attr_valid = VALID_SECONDS;
    if (node)
        *node = n;
    else
        node_put(s, n);
    return 0;
}

static int answer_attr(struct call *c, const struct node *n)
{
    struct fuse_attr_out *out = call_reply(c, sizeof(*out));
    struct statx st;
    int ret;

    if (!out)
        return -EINVAL;
    ret = stat_for_guest(n->fd, &st);
    if (ret)
        return ret;
    fill_attr(c->share, &st, &out->attr);
    out->attr_valid = VALID_SECONDS;
    return sizeof(*out);
}

int op_getattr(struct call *c)
{
    struct node *n;
    int ret = node_get(c->share, c->header.nodeid, &n);

    if (ret)
        return ret;
    ret = answer_attr(c, n);
    node_put(c->share, n);
    return ret;
}

static int set_size(struct call *c, const struct node *n, const struct fuse_setattr_in *in)
{
    struct handle *h;
    int fd, ret;

    if (n->key.type != S_IFREG || in->size > INT64_MAX)
        return -EINVAL;
    if (in->valid & FATTR_FH) {
        ret = handle_get(c->share, in->fh, false, &h);
        if (ret)
            return ret;
        ret = ftruncate(h->fd, (off_t)in->size) < 0 ? -errno : 0;
        handle_put(c->share, h);
        return ret;
    }
    fd = open_node(n, O_WRONLY);
    if (fd < 0)
        return fd;
    ret = ftruncate(fd, (off_t)in->size) < 0 ? -errno : 0;
    close(fd);
    return ret;
}

static int set_owner_and_mode(const struct node *n, const struct fuse_setattr_in *in)
{
    struct wish w = {
        .has_uid = in->valid & FATTR_UID,
        .has_gid = in->valid & FATTR_GID,
        .has_mode = in->valid & FATTR_MODE,
        .uid = in->uid,
        .gid = in->gid,
        .mode = in->mode & SHARE_MODE_BITS,
    };
    bool drop = (in->valid & FATTR_KILL_SUIDGID) ||
                ((in->valid & (FATTR_UID | FATTR_GID)) && !(in->valid & FATTR_MODE));
    int ret = 0;

    if (w.has_uid || w.has_gid || w.has_mode)
        ret = mark_set(n->fd, &w);
    return !ret && drop ? mark_drop_set_id(n->fd) : ret;
}

static struct timespec wanted_time(const struct fuse_setattr_in *in, u32 set, u32 now, u64 seconds,
                                   u32 nanoseconds)
{
    if (!(in->valid & set))
        return (struct timespec){.tv_nsec = UTIME_OMIT};
    if (in->valid & now)
        return (struct timespec){.tv_nsec = UTIME_NOW};
    /* Anything but a number of nanoseconds would have a meaning of its own. */
    return (struct timespec){.tv_sec = (time_t)seconds, .tv_nsec = nanoseconds % NS_PER_SEC};
}

static int set_times(const struct node *n, const struct fuse_setattr_in *in)
{
    struct timespec times[] = {
        wanted_time(in, FATTR_ATIME, FATTR_ATIME_NOW, in->atime, in->atimensec),
        wanted_time(in, FATTR_MTIME, FATTR_MTIME_NOW, in->mtime, in->mtimensec),
    };

    return utimensat(n->fd, "", times, AT_EMPTY_PATH) < 0 ? -errno : 0;
}

int op_setattr(struct call *c)
{
    struct fuse_setattr_in in;
    struct node *n;
    int ret = node_get(c->share, c->header.nodeid, &n);

    if (ret)
        return ret;
    memcpy(&in, c->args, sizeof(in));
    /* Times last: the others change them. */
    if (in.valid & FATTR_SIZE)
        ret = set_size(c, n, &in);
    if (!ret && (in.valid & (FATTR_MODE | FATTR_UID | FATTR_GID | FATTR_KILL_SUIDGID)))
        ret = set_owner_and_mode(n, &in);
    if (!ret && (in.valid & (FATTR_ATIME | FATTR_MTIME)))
        ret = set_times(n, &in);
    if (!ret)
        ret = answer_attr(c, n);
    node_put(c->share, n);
    return ret;
}

int op_statfs(struct call *c)
{
    struct fuse_statfs_out *out = call_reply(c, sizeof(*out));
    struct statfs st;
    struct node *n;
    int ret;

    if (!out)
        return -EINVAL;
    ret = node_get(c->share, c->header.nodeid, &n);
    if (ret)
        return ret;
    ret = fstatfs(n->fd, &st) < 0 ? -errno : 0;
    node_put(c->share, n);
    if (ret)
        return ret;
    out->st = (struct fuse_kstatfs){
        .blocks = st.f_blocks,
        .bfree = st.f_bfree,
        .bavail = st.f_bavail,
        .files = st.f_files,
        .ffree = st.f_ffree,
        .bsize = (u32)st.f_bsize,
        .namelen = (u32)MIN(st.f_namelen, SHARE_NAME_MAX),
        .frsize = (u32)st.f_frsize,
    };
    return sizeof(*out);
}

/* ---- extended attributes: the user's ---- */

/* The others are privileges (security, trusted), or would be taken for the host's users (ACLs). */
static bool is_shared(const char *name)
{
    return !strncmp(name, XATTR_USER_PREFIX, XATTR_USER_PREFIX_LEN) && !mark_is_name(name);
}

/* Pins the inode and says by which path it is reached. */
static int get_path(struct call *c, struct node **n, char path[PROC_PATH_SIZE])
{
    int ret = node_get(c->share, c->header.nodeid, n);

    if (!ret)
        proc_path((*n)->fd, path);
    return ret;
}

/* For a size of 0 the answer is how long it would be. */
static int answer_xattr(struct call *c, const char *value, ssize_t len, u32 size)
{
    struct fuse_getxattr_out *out;
    void *reply;

    if (size) {
        if ((size_t)len > size)
            return -ERANGE;
        reply = call_reply(c, (size_t)len);
        if (!reply)
            return -ERANGE;
        memcpy(reply, value, (size_t)len);
        return (int)len;
    }
    out = call_reply(c, sizeof(*out));
    if (!out)
        return -EINVAL;
    out->size = (u32)len;
    return sizeof(*out);
}

int op_getxattr(struct call *c)
{
    const struct fuse_getxattr_in *in = (const void *)c->args;
    char path[PROC_PATH_SIZE], *value;
    struct node *n;
    ssize_t len;
    int ret;

    if (!is_shared(c->names[0]))
        return -EOPNOTSUPP;
    value = malloc(XATTR_SIZE_MAX);
    if (!value)
        return -ENOMEM;
    ret = get_path(c, &n, path);
    if (!ret) {
        len = getxattr(path, c->names[0], value, XATTR_SIZE_MAX);
        ret = len < 0 ? -errno : answer_xattr(c, value, len, in->size);
        node_put(c->share, n);
    }
    free(value);
    return ret;
}

/* Takes the names out of a list that the guest doesn't get; returns what is left of its length. */
static ssize_t filter_names(char *list, ssize_t len)
{
    ssize_t kept = 0;

    for (ssize_t at = 0; at < len;) {
        ssize_t size = (ssize_t)strlen(list + at) + 1;

        if (is_shared(list + at)) {
            memmove(list + kept, list + at, (size_t)size);
            kept += size;
        }
        at += size;
    }
    return kept;
}

int op_listxattr(struct call *c)
{
    const struct fuse_getxattr_in *in = (const void *)c->args;
    char path[PROC_PATH_SIZE], *list = calloc(1, XATTR_LIST_MAX + 1);
    struct node *n;
    ssize_t len;
    int ret;

    if (!list)
        return -ENOMEM;
    ret = get_path(c, &n, path);
    if (!ret) {
        len = listxattr(path, list, XATTR_LIST_MAX);
        ret = len < 0 ? -errno : answer_xattr(c, list, filter_names(list, len), in->size);
        node_put(c->share, n);
    }
    free(list);
    return ret;
}

int op_setxattr(struct call *c)
{
    const struct fuse_setxattr_in *in = (const void *)c->args; /* as of before FUSE_SETXATTR_EXT */
    char path[PROC_PATH_SIZE];
    struct node *n;
    int ret;

    if (!is_shared(c->names[0]))
        return -EOPNOTSUPP;
    if (in->size > c->args_len - c->data_at)
        return -EINVAL;
    ret = get_path(c, &n, path);
    if (ret)
        return ret;
    if (setxattr(path, c->names[0], c->args + c->data_at, in->size, (int)in->flags) < 0)
        ret = -errno;
    node_put(c->share, n);
    return ret;
}

int op_removexattr(struct call *c)
{
    char path[PROC_PATH_SIZE];
    struct node *n;
    int ret;

    if (!is_shared(c->names[0]))
        return -EOPNOTSUPP;
    ret = get_path(c, &n, path);
    if (ret)
        return ret;
    if (removexattr(path, c->names[0]) < 0)
        ret = -errno;
    node_put(c->share, n);
    return ret;
}
