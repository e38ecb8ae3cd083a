/*
 * Owners and set-user-ID bits that the guest wants to see, and the host's file doesn't have.
 *
 * A process without privileges can't give a file away, yet a guest's root unpacks archives, and its users make files
 * of their own. And a file with a set-user-ID bit, which the guest fills, would run as this process's user on
 * the host. So both are kept in an extended attribute of the file, which the guest can't reach otherwise, in
 * decimal and octal: "UID GID BITS". It counts only on files of this process's own user, for whoever may write to
 * others could make the guest believe that root made them.
 *
 * Symbolic links, FIFOs and sockets have no such attributes: they are this user's for the guest, too.
 */
#define _GNU_SOURCE

#include "share/internal.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/xattr.h>
#include <unistd.h>

#define MARK_PREFIX "user.doppel."
#define MARK MARK_PREFIX "owner"
#define MARK_SIZE 64

struct mark {
    u32 uid, gid;
    u32 bits; /* of the mode */
};

bool mark_is_name(const char *xattr)
{
    return !strncmp(xattr, MARK_PREFIX, strlen(MARK_PREFIX));
}

/* Bits that files of this type don't get on the host. A directory's S_ISGID is harmless. */
static u32 kept_bits(u32 mode)
{
    return S_ISREG(mode) ? S_ISUID | S_ISGID : S_ISUID;
}

static bool can_have_mark(const struct statx *st)
{
    return (S_ISREG(st->stx_mode) || S_ISDIR(st->stx_mode)) && st->stx_uid == geteuid();
}

static bool mark_read(int fd, struct mark *m)
{
    char path[PROC_PATH_SIZE], text[MARK_SIZE + 1];
    ssize_t len;

    proc_path(fd, path);
    len = getxattr(path, MARK, text, MARK_SIZE);
    if (len <= 0)
        return false;
    text[len] = '\0';
    return sscanf(text, "%u %u %o", &m->uid, &m->gid, &m->bits) == 3;
}

void mark_apply(int fd, struct statx *st)
{
    struct mark m;

    if (!can_have_mark(st) || !mark_read(fd, &m))
        return;
    st->stx_uid = m.uid;
    st->stx_gid = m.gid;
    st->stx_mode |= m.bits & kept_bits(st->stx_mode);
}

/* Writes the mark, or takes it away when the file shows the same by itself. */
static int mark_write(const char *path, const struct statx *st, const struct mark *m)
{
    char text[MARK_SIZE];
    int len = snprintf(text, sizeof(text), "%u %u %o", m->uid, m->gid, m->bits);

    if (m->uid == st->stx_uid && m->gid == st->stx_gid && !m->bits)
        return removexattr(path, MARK) < 0 && errno != ENODATA && errno != EOPNOTSUPP ? -errno : 0;
    return setxattr(path, MARK, text, (size_t)len, 0) < 0 ? -errno : 0;
}

static int set_mode(const char *path, const struct statx *st, u32 mode)
{
    if ((st->stx_mode & SHARE_MODE_BITS) == mode)
        return 0;
    return chmod(path, mode) < 0 ? -errno : 0;
}

int mark_set(int fd, const struct wish *w)
{
    struct statx host, told;
    char path[PROC_PATH_SIZE];
    struct mark m;
    u32 mode;
    int ret = stat_fd(fd, &host);

    if (ret)
        return ret;
    told = host;
    mark_apply(fd, &told);
    mode = w->has_mode ? w->mode : told.stx_mode & SHARE_MODE_BITS;
    m = (struct mark){
        .uid = w->has_uid ? w->uid : told.stx_uid,
        .gid = w->has_gid ? w->gid : told.stx_gid,
        .bits = mode & kept_bits(host.stx_mode),
    };
    proc_path(fd, path);
    if (w->has_mode)
        ret = set_mode(path, &host, mode & ~m.bits);
    if (ret)
        return ret;
    if (m.uid == told.stx_uid && m.gid == told.stx_gid &&
        m.bits == (told.stx_mode & kept_bits(host.stx_mode)))
        return 0;
    if (can_have_mark(&host))
        return mark_write(path, &host, &m);
    /* Nobody misses the owner of a link; elsewhere it decides who may do what. */
    return S_ISLNK(host.stx_mode) ? 0 : -EPERM;
}

int mark_drop_set_id(int fd)
{
    struct wish w = {.has_mode = true};
    struct statx st;
    int ret = stat_for_guest(fd, &st);

    if (ret || !S_ISREG(st.stx_mode) || !(st.stx_mode & (S_ISUID | S_ISGID)))
        return ret;
    w.mode = st.stx_mode & SHARE_MODE_BITS & ~S_ISUID;
    /* Without the group's execute bit S_ISGID meant mandatory locks. */
    if (w.mode & S_IXGRP)
        w.mode &= ~S_ISGID;
    return mark_set(fd, &w);
}
