#include "block/convert.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define CHUNK MIB(1)

static bool is_zero(const u8 *p, u64 len)
{
    return !len || (!p[0] && !memcmp(p, p + 1, len - 1));
}

/* One piece that is there as data: zeroes in it are found. */
static int copy_data(struct disk *from, struct disk *to, u64 at, u64 len, bool keep_zeroes, u8 *buf,
                     struct error *err)
{
    int ret = disk_read(from, at, buf, len);

    if (ret)
        return error_host(err, -ret, "%s: cannot read at %llu", from->file.path,
                          (unsigned long long)at);
    /* A file that ends within a sector: the disk has all of it. */
    memset(buf + len, 0, DISK_SECTOR);
    len = MIN((len + DISK_SECTOR - 1) & ~(u64)(DISK_SECTOR - 1), to->size - at);
    /* As fine as clusters are, so that they need not be allocated. */
    for (u64 done = 0, here; done < len; done += here) {
        here = MIN(len - done, KIB(64) - (at + done) % KIB(64));
        if (!is_zero(buf + done, here))
            ret = disk_write(to, at + done, buf + done, here);
        else if (keep_zeroes)
            ret = to->ops->zero(to, at + done, here, true);
        if (ret)
            return error_host(err, -ret, "%s: cannot write at %llu", to->file.path,
                              (unsigned long long)(at + done));
    }
    return 0;
}

static int copy_zeroes(struct disk *to, u64 at, u64 len, struct error *err)
{
    int ret = to->ops->zero(to, at, len, true);

    return ret ? error_host(err, -ret, "%s: cannot write at %llu", to->file.path,
                            (unsigned long long)at)
               : 0;
}

/* How [at, *end) is to be copied. Only the topmost image is asked: what it lacks is read. */
static int piece_status(struct disk *from, u64 at, u64 *end, enum disk_status *status,
                        struct error *err)
{
    int ret = from->ops->status(from, at, end, status);

    if (ret)
        return error_host(err, -ret, "%s: cannot read at %llu", from->file.path,
                          (unsigned long long)at);
    if (*status == DISK_ABSENT && !from->backing)
        *status = DISK_ZERO;
    return 0;
}

/* One cluster of the new image, as a whole. */
static int pack_cluster(struct disk *from, struct disk *to, u64 at, bool keep_zeroes, u8 *buf,
                        struct error *err)
{
    u64 len = MIN(to->cluster_size, from->size - at);
    int ret = disk_read(from, at, buf, len);

    if (ret)
        return error_host(err, -ret, "%s: cannot read at %llu", from->file.path,
                          (unsigned long long)at);
    memset(buf + len, 0, to->cluster_size - len);
    if (is_zero(buf, len))
        return keep_zeroes ? copy_zeroes(to, at, MIN(to->cluster_size, to->size - at), err) : 0;
    ret = to->ops->write_packed(to, at, buf);
    return ret ? error_host(err, -ret, "%s: cannot write at %llu", to->file.path,
                            (unsigned long long)at)
               : 0;
}

struct copy {
    struct disk *from, *to;
    bool has_backing, pack;
    u8 *buf;
};

/* Copies [at, *end) or less, which *end then says. */
static int copy_piece(const struct copy *c, u64 at, u64 *end, struct error *err)
{
    u64 cluster = c->pack ? c->to->cluster_size : 0;
    enum disk_status status;
    int ret = piece_status(c->from, at, end, &status, err);

    if (ret)
        return ret;
    /* Whole clusters can be skipped; of what is only in part zero, all is read. */
    if (c->pack && *end < c->from->size)
        *end = *end / cluster * cluster;
    if (c->pack && (status != DISK_ZERO || *end <= at)) {
        *end = MIN(at + cluster, c->from->size);
        return pack_cluster(c->from, c->to, at, c->has_backing, c->buf, err);
    }
    if (status == DISK_ZERO)
        return c->has_backing ? copy_zeroes(c->to, at, *end - at, err) : 0;
    *end = MIN(*end, at + CHUNK);
    return copy_data(c->from, c->to, at, *end - at, c->has_backing, c->buf, err);
}

int disk_copy(struct disk *from, struct disk *to, bool has_backing, bool pack,
              disk_progress *progress, void *opaque, struct error *err)
{
    struct copy c = {.from = from, .to = to, .has_backing = has_backing, .pack = pack};
    u64 total = from->size, at = 0;
    int ret;

    c.buf = malloc(MAX(CHUNK, to->cluster_size) + DISK_SECTOR);
    ret = c.buf ? 0 : error_host(err, ENOMEM, "convert");
    while (at < total && !ret) {
        u64 end = MIN(at + MIB(256), total);

        ret = copy_piece(&c, at, &end, err);
        at = end;
        progress(opaque, at, total);
    }
    if (!ret) {
        ret = to->ops->flush(to);
        if (ret)
            error_host(err, -ret, "%s", to->file.path);
    }
    progress(opaque, total, total);
    free(c.buf);
    return ret;
}

/* ---- commit ---- */

static int commit_pieces(struct disk *top, struct disk *base, disk_progress *progress, void *opaque,
                         struct error *err)
{
    u64 at = 0;
    u8 *buf = malloc(CHUNK + DISK_SECTOR);
    int ret = buf ? 0 : error_host(err, ENOMEM, "commit");

    while (at < top->size && !ret) {
        enum disk_status status;
        u64 end = MIN(at + CHUNK, top->size);

        ret = top->ops->status(top, at, &end, &status);
        if (ret)
            ret = error_host(err, -ret, "%s: cannot read at %llu", top->file.path,
                             (unsigned long long)at);
        else if (status == DISK_ZERO)
            ret = copy_zeroes(base, at, end - at, err);
        else if (status == DISK_DATA)
            ret = copy_data(top, base, at, end - at, true, buf, err);
        at = end;
        progress(opaque, at, top->size);
    }
    if (!ret) {
        ret = base->ops->flush(base);
        if (ret)
            error_host(err, -ret, "%s", base->file.path);
    }
    free(buf);
    return ret;
}

/* The backing file for writing. Its image is open for reading already, which is in the way: it goes first. */
static struct disk *reopen_backing(struct disk *top, struct error *err)
{
    struct disk_options options = {.format = top->backing->ops->format};
    char *path = strdup(top->backing->file.path);
    struct disk *base;

    if (!path) {
        error_host(err, ENOMEM, "commit");
        return NULL;
    }
    disk_close(top->backing);
    top->backing = NULL;
    base = disk_open(path, &options, err);
    free(path);
    return base;
}

int disk_commit(const char *path, const char *format, disk_progress *progress, void *opaque,
                struct error *err)
{
    struct disk_options options = {.format = format};
    struct disk *top = disk_open(path, &options, err), *base;
    int ret = 0, closed;

    if (!top)
        return -EINVAL;
    if (!top->backing) {
        disk_close(top);
        return error_input(err, "%s: has no backing file to commit to", path);
    }
    base = reopen_backing(top, err);
    if (!base) {
        disk_close(top);
        return -EINVAL;
    }
    if (top->size > base->size)
        ret = base->ops->resize(base, top->size, err);
    if (!ret)
        ret = commit_pieces(top, base, progress, opaque, err);
    closed = disk_close(base);
    if (!ret && closed)
        ret = error_host(err, -closed, "%s: cannot write its backing file", path);
    if (!ret) {
        ret = top->ops->empty(top);
        if (ret)
            error_host(err, -ret, "%s: its data is in its backing file, but cannot be removed here",
                       path);
    }
    closed = disk_close(top);
    if (!ret && closed)
        ret = error_host(err, -closed, "%s", path);
    return ret;
}
