/*
 * A shared directory and a guest's side of its protocol: messages in pieces, as rings have them, and their answers.
 * The directory has a file beside it that nobody may reach.
 */
#ifndef DOPPEL_TESTS_SHARE_RIG_H
#define DOPPEL_TESTS_SHARE_RIG_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE /* nftw, SEEK_HOLE */
#endif

#include "share/internal.h"

#include <errno.h>
#include <ftw.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define SHARE_RIG_ROOM 8192

struct share_rig {
    char base[64], dir[80]; /* dir is base/shared; base/secret lies beside it */
    struct share *share;
    u64 unique;
    /* The last answer. */
    struct fuse_out_header header;
    size_t len; /* of what follows */
    u8 answer[SHARE_RIG_ROOM] __attribute__((aligned(8)));
};

/* The host's path of a name in the directory, until the next call. */
static inline const char *share_rig_path(const struct share_rig *r, const char *name)
{
    static _Thread_local char path[512];

    snprintf(path, sizeof(path), "%s/%s", r->dir, name);
    return path;
}

static inline void share_rig_put(const char *path, const char *text)
{
    FILE *f = fopen(path, "we");

    if (!f || fputs(text, f) < 0 || fclose(f) != 0)
        abort();
}

/* A message of a header and three pieces, the last two of which may be NULL; negative errno or 0. */
static inline int share_rig_call(struct share_rig *r, u32 opcode, u64 node, const void *args,
                                 size_t args_len, const void *data, size_t data_len)
{
    struct fuse_in_header h = {
        .len = (u32)(sizeof(h) + args_len + data_len),
        .opcode = opcode,
        .unique = ++r->unique,
        .nodeid = node,
        .uid = geteuid(),
        .gid = getegid(),
    };
    struct iovec in[] = {{&h, sizeof(h)}, {(void *)args, args_len}, {(void *)data, data_len}};
    struct iovec out[] = {
        {&r->header, sizeof(r->header)}, {r->answer, 100}, {r->answer + 100, SHARE_RIG_ROOM - 100}};
    struct share_request request = {in, ARRAY_SIZE(in), out, ARRAY_SIZE(out)};
    size_t written;

    r->header = (struct fuse_out_header){0};
    written = share_serve(r->share, &request);
    r->len = written < sizeof(r->header) ? 0 : written - sizeof(r->header);
    return r->header.error;
}

/* An operation on a name: a struct, then the name. */
static inline int share_rig_name(struct share_rig *r, u32 opcode, u64 node, const void *args,
                                 size_t args_len, const char *name)
{
    return share_rig_call(r, opcode, node, args, args_len, name, strlen(name) + 1);
}

static inline int share_rig_init(struct share_rig *r)
{
    struct fuse_init_in in = {.major = FUSE_KERNEL_VERSION, .minor = 38, .flags = ~0U};

    return share_rig_call(r, FUSE_INIT, 0, &in, sizeof(in), NULL, 0);
}

static inline struct share_rig *share_rig_create(bool read_only)
{
    struct share_rig *r = calloc(1, sizeof(*r));
    struct share_config config = {.path = r->dir, .read_only = read_only};
    char secret[80];
    struct error err;

    strcpy(r->base, "/tmp/doppel-share.XXXXXX");
    if (!mkdtemp(r->base))
        abort();
    snprintf(r->dir, sizeof(r->dir), "%s/shared", r->base);
    snprintf(secret, sizeof(secret), "%s/secret", r->base);
    share_rig_put(secret, "secret");
    if (mkdir(r->dir, 0755) < 0)
        abort();
    share_rig_put(share_rig_path(r, "file"), "contents");
    r->share = share_open(&config, &err);
    if (!r->share)
        abort();
    return r;
}

static inline int share_rig_remove(const char *path, const struct stat *st, int type,
                                   struct FTW *where)
{
    return remove(path);
}

static inline void share_rig_destroy(struct share_rig *r)
{
    share_close(r->share);
    nftw(r->base, share_rig_remove, 16, FTW_DEPTH | FTW_PHYS);
    free(r);
}

/* The node that a name leads to, or a negative errno. */
static inline s64 share_rig_lookup(struct share_rig *r, u64 node, const char *name)
{
    const struct fuse_entry_out *entry = (const void *)r->answer;
    int ret = share_rig_name(r, FUSE_LOOKUP, node, NULL, 0, name);

    if (ret)
        return ret;
    return entry->nodeid ? (s64)entry->nodeid : -ENOENT;
}

/* A handle, or a negative errno. */
static inline s64 share_rig_open(struct share_rig *r, u64 node, u32 opcode, u32 flags)
{
    struct fuse_open_in in = {.flags = flags};
    const struct fuse_open_out *out = (const void *)r->answer;
    int ret = share_rig_call(r, opcode, node, &in, sizeof(in), NULL, 0);

    return ret ? ret : (s64)out->fh;
}

static inline int share_rig_release(struct share_rig *r, u64 handle)
{
    struct fuse_release_in in = {.fh = handle};

    return share_rig_call(r, FUSE_RELEASE, 0, &in, sizeof(in), NULL, 0);
}

static inline int share_rig_read(struct share_rig *r, u64 handle, u64 offset, u32 size)
{
    struct fuse_read_in in = {.fh = handle, .offset = offset, .size = size};

    return share_rig_call(r, FUSE_READ, 0, &in, sizeof(in), NULL, 0);
}

static inline int share_rig_write(struct share_rig *r, u64 handle, u64 offset, const void *data,
                                  u32 size)
{
    struct fuse_write_in in = {.fh = handle, .offset = offset, .size = size};

    return share_rig_call(r, FUSE_WRITE, 0, &in, sizeof(in), data, size);
}

#endif
