/*
 * Names in directories: looked up, made, moved and taken away. Each is one component (server.c), in a directory that
 * the guest knows.
 */
#define _GNU_SOURCE /* O_PATH, renameat2 */

#include "share/internal.h"

#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define VALID_SECONDS_ABSENT 1 /* how long the guest believes that there is no such file */

int op_lookup(struct call *c)
{
    struct fuse_entry_out *out = call_reply(c, sizeof(*out));
    struct node *parent;
    int fd, ret;

    if (!out)
        return -EINVAL;
    ret = node_get(c->share, c->header.nodeid, &parent);
    if (ret)
        return ret;
    fd = open_name(parent, c->names[0]);
    if (fd >= 0)
        ret = enter(c->share, parent, c->names[0], fd, out, NULL);
    else if (fd == -ENOENT)
        out->entry_valid = VALID_SECONDS_ABSENT;
    else
        ret = fd;
    node_put(c->share, parent);
    return ret ? ret : (int)sizeof(*out);
}

/*
 * What the guest made is to have the mode that it asked for, whatever this process's umask, and belongs to the guest's
 * user for the guest. A group that came from the directory stays. Where the owner can't be noted the file is there
 * all the same.
 */
static void own(const struct call *c, int fd, u32 mode)
{
    struct wish w = {.has_uid = true, .has_mode = true, .uid = c->header.uid, .gid = c->header.gid};
    struct statx st;

    if (stat_fd(fd, &st))
        return;
    w.has_gid = st.stx_gid == getegid();
    w.mode = mode & SHARE_MODE_BITS;
    if (S_ISDIR(st.stx_mode))
        w.mode |= st.stx_mode & S_ISGID;
    mark_set(fd, &w);
}

/* The answer about a name that was made in the directory c is about. */
static int answer_made(struct call *c, struct node *parent, const char *name, u32 mode, bool owned)
{
    struct fuse_entry_out *out = call_reply(c, sizeof(*out));
    int fd = open_name(parent, name), ret;

    if (fd < 0)
        return fd;
    if (!out) {
        close(fd);
        return -EINVAL;
    }
    if (owned)
        own(c, fd, mode);
    ret = enter(c->share, parent, name, fd, out, NULL);
    return ret ? ret : (int)sizeof(*out);
}

int op_mknod(struct call *c)
{
    const struct fuse_mknod_in *in = (const void *)c->args;
    u32 type = in->mode & S_IFMT, mode = in->mode;
    struct node *parent;
    int ret;

    if (type != S_IFREG && type != S_IFIFO && type != S_IFSOCK)
        return -EPERM;
    ret = node_get(c->share, c->header.nodeid, &parent);
    if (ret)
        return ret;
    if (mknodat(parent->fd, c->names[0], type | (mode & ACCESSPERMS), 0) < 0)
        ret = -errno;
    else
        ret = answer_made(c, parent, c->names[0], mode, true);
    node_put(c->share, parent);
    return ret;
}

int op_mkdir(struct call *c)
{
    const struct fuse_mkdir_in *in = (const void *)c->args;
    u32 mode = in->mode;
    struct node *parent;
    int ret = node_get(c->share, c->header.nodeid, &parent);

    if (ret)
        return ret;
    if (mkdirat(parent->fd, c->names[0], mode & ACCESSPERMS) < 0)
        ret = -errno;
    else
        ret = answer_made(c, parent, c->names[0], mode, true);
    node_put(c->share, parent);
    return ret;
}

/* Names are the link's and, whatever that is, its target. */
int op_symlink(struct call *c)
{
    struct node *parent;
    int ret = node_get(c->share, c->header.nodeid, &parent);

    if (ret)
        return ret;
    if (symlinkat(c->names[1], parent->fd, c->names[0]) < 0)
        ret = -errno;
    else
        ret = answer_made(c, parent, c->names[0], 0, false);
    node_put(c->share, parent);
    return ret;
}

int op_link(struct call *c)
{
    const struct fuse_link_in *in = (const void *)c->args;
    char path[PROC_PATH_SIZE];
    struct node *parent, *n;
    int ret = node_get(c->share, in->oldnodeid, &n);

    if (ret)
        return ret;
    ret = node_get(c->share, c->header.nodeid, &parent);
    if (ret) {
        node_put(c->share, n);
        return ret;
    }
    proc_path(n->fd, path);
    if (linkat(AT_FDCWD, path, parent->fd, c->names[0], AT_SYMLINK_FOLLOW) < 0)
        ret = -errno;
    else
        ret = answer_made(c, parent, c->names[0], 0, false);
    node_put(c->share, parent);
    node_put(c->share, n);
    return ret;
}

static int remove_name(struct call *c, int flags)
{
    struct node *parent;
    int ret = node_get(c->share, c->header.nodeid, &parent);

    if (ret)
        return ret;
    if (unlinkat(parent->fd, c->names[0], flags) < 0)
        ret = -errno;
    node_put(c->share, parent);
    return ret;
}

int op_unlink(struct call *c)
{
    return remove_name(c, 0);
}

int op_rmdir(struct call *c)
{
    return remove_name(c, AT_REMOVEDIR);
}

static int move(struct call *c, u64 to_id, unsigned flags)
{
    struct node *from, *to;
    int ret;

    if (flags & ~(RENAME_NOREPLACE | RENAME_EXCHANGE))
        return -EINVAL;
    ret = node_get(c->share, c->header.nodeid, &from);
    if (ret)
        return ret;
    ret = node_get(c->share, to_id, &to);
    if (!ret) {
        if (renameat2(from->fd, c->names[0], to->fd, c->names[1], flags) < 0)
            ret = -errno;
        else
            node_moved(c->share, to, c->names[1]);
        if (!ret && (flags & RENAME_EXCHANGE))
            node_moved(c->share, from, c->names[0]);
        node_put(c->share, to);
    }
    node_put(c->share, from);
    return ret;
}

int op_rename(struct call *c)
{
    const struct fuse_rename_in *in = (const void *)c->args;

    return move(c, in->newdir, 0);
}

int op_rename2(struct call *c)
{
    const struct fuse_rename2_in *in = (const void *)c->args;

    return move(c, in->newdir, in->flags);
}

/*
 * A file made and opened at once. One that the host has put there in the meantime is opened like any other, for it
 * might be anything.
 */
static int create_or_open(struct call *c, struct node *parent, const struct fuse_create_in *in,
                          struct fuse_entry_out *entry, struct node **n)
{
    int flags = (int)in->flags, fd, path_fd, ret;
    char path[PROC_PATH_SIZE];

    fd = openat(parent->fd, c->names[0],
                (flags & (O_ACCMODE | O_APPEND | O_SYNC)) | O_CREAT | O_EXCL | O_NOFOLLOW |
                    O_CLOEXEC,
                in->mode & ACCESSPERMS);
    if (fd < 0 && (errno != EEXIST || (flags & O_EXCL)))
        return -errno;
    if (fd < 0) {
        path_fd = open_name(parent, c->names[0]);
    } else {
        proc_path(fd, path);
        path_fd = open(path, O_PATH | O_CLOEXEC);
        if (path_fd >= 0)
            own(c, path_fd, in->mode);
        else
            path_fd = -errno;
    }
    ret = path_fd < 0 ? path_fd : enter(c->share, parent, c->names[0], path_fd, entry, n);
    if (ret) {
        if (fd >= 0)
            close(fd);
        return ret;
    }
    return fd >= 0 ? fd : open_node(*n, flags);
}

/* The guest never learns of an inode whose answer failed, so it doesn't forget it either. */
static void undo_enter(struct share *s, struct node *n)
{
    node_forget(s, n->id, 1);
    node_put(s, n);
}

int op_create(struct call *c)
{
    struct {
        struct fuse_entry_out entry;
        struct fuse_open_out open;
    } *out = call_reply(c, sizeof(*out));
    struct node *parent, *n = NULL;
    struct fuse_create_in in;
    int fd, ret;

    if (!out)
        return -EINVAL;
    memcpy(&in, c->args, sizeof(in));
    ret = node_get(c->share, c->header.nodeid, &parent);
    if (ret)
        return ret;
    fd = create_or_open(c, parent, &in, &out->entry, &n);
    ret = fd < 0 ? fd : open_answer(c->share, n, fd, &out->open);
    if (ret && n)
        undo_enter(c->share, n);
    node_put(c->share, parent);
    return ret ? ret : (int)sizeof(*out);
}

int op_readlink(struct call *c)
{
    char target[PATH_MAX];
    struct node *n;
    ssize_t len;
    void *reply;
    int ret = node_get(c->share, c->header.nodeid, &n);

    if (ret)
        return ret;
    len = readlinkat(n->fd, "", target, sizeof(target));
    ret = len < 0 ? -errno : (int)len;
    node_put(c->share, n);
    if (ret < 0)
        return ret;
    reply = call_reply(c, (size_t)len);
    if (!reply)
        return -ERANGE;
    memcpy(reply, target, (size_t)len);
    return ret;
}
