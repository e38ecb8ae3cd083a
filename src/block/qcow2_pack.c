/*
 * Compressed clusters: raw deflate with a window of 4 KiB, or zstd frames, one a cluster. They lie in the file at any
 * byte, one behind the other, and each counts as a user of every host cluster that it touches.
 */
#include "block/qcow2.h"

#include <errno.h>
#include <string.h>
#include <zlib.h>
#include <zstd.h>
#include <zstd_errors.h>

#define ZLIB_WINDOW_BITS (-12) /* negative: without a header */
#define ZLIB_MEMORY 9

/* ---- unpacking ---- */

static int unpack_zlib(u8 *out, u64 out_len, u8 *in, u64 in_len)
{
    z_stream z = {
        .next_in = in, .avail_in = (uInt)in_len, .next_out = out, .avail_out = (uInt)out_len};
    int ret;

    if (inflateInit2(&z, ZLIB_WINDOW_BITS) != Z_OK)
        return -ENOMEM;
    ret = inflate(&z, Z_FINISH);
    inflateEnd(&z);
    /* The length is that of sectors: there may be more behind the end of the stream. */
    return (ret == Z_STREAM_END || ret == Z_BUF_ERROR) && z.avail_out == 0 ? 0 : -EIO;
}

static int unpack_zstd(u8 *out, u64 out_len, const u8 *in, u64 in_len)
{
    ZSTD_DCtx *ctx = ZSTD_createDCtx();
    ZSTD_inBuffer from = {in, in_len, 0};
    ZSTD_outBuffer to = {out, out_len, 0};
    size_t left = 1;

    if (!ctx)
        return -ENOMEM;
    while (left && to.pos < to.size && from.pos < from.size) {
        left = ZSTD_decompressStream(ctx, &to, &from);
        if (ZSTD_isError(left))
            break;
    }
    ZSTD_freeDCtx(ctx);
    return !ZSTD_isError(left) && to.pos == to.size ? 0 : -EIO;
}

int qcow2_unpack(struct qcow2 *q, u64 entry)
{
    u64 offset, len;
    int ret;

    qcow2_compressed_range(q, entry, &offset, &len);
    if (len > q->cluster_size + DISK_SECTOR)
        len = q->cluster_size + DISK_SECTOR;
    ret = file_read(&q->im.file, offset, q->packed_buffer, len);
    if (ret)
        return ret;
    if (q->compression == QCOW2_ZSTD)
        return unpack_zstd(q->cluster_buffer, q->cluster_size, q->packed_buffer, len);
    return unpack_zlib(q->cluster_buffer, q->cluster_size, q->packed_buffer, len);
}

/* ---- packing ---- */

/* Each returns 0 with *len set, which stays `room` or below; -E2BIG: it doesn't fit. */
static int pack_zlib(u8 *out, u64 room, const u8 *in, u64 in_len, u64 *len)
{
    z_stream z = {
        .next_in = (u8 *)in, .avail_in = (uInt)in_len, .next_out = out, .avail_out = (uInt)room};
    int ret;

    if (deflateInit2(&z, Z_DEFAULT_COMPRESSION, Z_DEFLATED, ZLIB_WINDOW_BITS, ZLIB_MEMORY,
                     Z_DEFAULT_STRATEGY) != Z_OK)
        return -ENOMEM;
    ret = deflate(&z, Z_FINISH);
    deflateEnd(&z);
    *len = room - z.avail_out;
    return ret == Z_STREAM_END ? 0 : -E2BIG;
}

static int pack_zstd(u8 *out, u64 room, const u8 *in, u64 in_len, u64 *len)
{
    *len = ZSTD_compress(out, room, in, in_len, ZSTD_CLEVEL_DEFAULT);
    if (!ZSTD_isError(*len))
        return 0;
    return ZSTD_getErrorCode(*len) == ZSTD_error_dstSize_tooSmall ? -E2BIG : -ENOMEM;
}

/* One more user of a cluster that is in use. */
static int share(struct qcow2 *q, u64 offset)
{
    u64 count;
    int ret = qcow2_refcount_get(q, offset >> q->cluster_bits, &count);

    return ret ? ret : qcow2_refcount_set(q, offset >> q->cluster_bits, count + 1);
}

/* Room for `len` bytes, less than a cluster: behind what was packed last, as far as that can be. */
static int place(struct qcow2 *q, u64 len, u64 *offset)
{
    u64 used = qcow2_in_cluster(q, q->packed_end), room = used ? q->cluster_size - used : 0, next;
    int ret;

    *offset = q->packed_end;
    if (len <= room)
        return share(q, *offset);
    ret = qcow2_alloc(q, 1, &next);
    if (ret)
        return ret;
    if (!room || next != q->packed_end + room) {
        *offset = next;
        return 0;
    }
    ret = share(q, *offset);
    if (ret)
        qcow2_unalloc(q, next, 1);
    return ret;
}

/* Points the guest's cluster at what was packed. */
static int link_packed(struct qcow2 *q, u64 guest, u64 offset, u64 len)
{
    unsigned bits = 62 - (q->cluster_bits - 8);
    u64 sectors = (offset + len - 1) / DISK_SECTOR - offset / DISK_SECTOR;
    u32 i = qcow2_l2_index(q, guest);
    struct qcow2_table *t;
    int ret = qcow2_l2_get_writable(q, qcow2_l1_index(q, guest), &t);

    if (!ret && offset + len > BIT(bits))
        ret = -EFBIG;
    if (!ret)
        ret = qcow2_free_entry(q, qcow2_l2_entry(t, i));
    if (!ret)
        qcow2_l2_set(t, i, QCOW2_COMPRESSED | sectors << bits | offset);
    return ret;
}

int qcow2_pack(struct qcow2 *q, u64 guest, const u8 *data, bool *packed)
{
    u64 len = 0, offset, padding;
    int ret;

    ret = (q->compression == QCOW2_ZSTD ? pack_zstd : pack_zlib)(
        q->packed_buffer, q->cluster_size - 1, data, q->cluster_size, &len);
    *packed = ret != -E2BIG;
    if (ret)
        return *packed ? ret : 0;
    ret = place(q, len, &offset);
    if (ret)
        return ret;
    /* A reader takes whole sectors. */
    padding = -(offset + len) % DISK_SECTOR;
    memset(q->packed_buffer + len, 0, padding);
    ret = file_write(&q->im.file, offset, q->packed_buffer, len + padding);
    if (!ret)
        ret = link_packed(q, guest, offset, len);
    if (ret) {
        qcow2_free_later(q, offset, len);
        return ret;
    }
    q->packed_end = offset + len;
    return 0;
}
