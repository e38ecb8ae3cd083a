#include "machine/decompress.h"

#include <errno.h>
#include <limits.h>
#include <lz4.h>
#include <lzma.h>
#include <string.h>
#include <zlib.h>
#include <zstd.h>

/* Linux packs with dictionaries of up to 128 MiB; a hostile header asks for no more than this. */
#define LZMA_MEMORY_LIMIT MIB(256)

/* lz4's legacy frame: a magic number, then blocks, each after its packed size, of at most 8 MiB
 * unpacked (doc/lz4_Frame_format.md of lz4, "Legacy frame"). */
#define LZ4_LEGACY_BLOCK MIB(8)

#define TRAILER 4u /* bytes of unpacked size */

static u32 get_u32(const u8 *p)
{
    u32 v;

    memcpy(&v, p, sizeof(v));
    return v;
}

static int unpack_gzip(const u8 *in, size_t in_len, u8 *out, size_t out_len)
{
    z_stream z = {
        .next_in = (u8 *)in,
        .avail_in = (uInt)in_len,
        .next_out = out,
        .avail_out = (uInt)out_len,
    };
    int ret;

    if (inflateInit2(&z, 16 + MAX_WBITS) != Z_OK)
        return -ENOMEM;
    ret = inflate(&z, Z_FINISH);
    inflateEnd(&z);
    return ret == Z_STREAM_END && z.total_out == out_len ? 0 : -EINVAL;
}

static int unpack_lzma(const u8 *in, size_t in_len, u8 *out, size_t out_len)
{
    lzma_stream s = LZMA_STREAM_INIT;
    lzma_ret ret;

    if (lzma_auto_decoder(&s, LZMA_MEMORY_LIMIT, 0) != LZMA_OK)
        return -ENOMEM;
    s.next_in = in;
    s.avail_in = in_len;
    s.next_out = out;
    s.avail_out = out_len;
    do
        ret = lzma_code(&s, LZMA_FINISH);
    while (ret == LZMA_OK);
    lzma_end(&s);
    return ret == LZMA_STREAM_END && s.total_out == out_len ? 0 : -EINVAL;
}

static int unpack_zstd(const u8 *in, size_t in_len, u8 *out, size_t out_len)
{
    return ZSTD_decompress(out, out_len, in, in_len) == out_len ? 0 : -EINVAL;
}

static int unpack_lz4(const u8 *in, size_t in_len, u8 *out, size_t out_len)
{
    const u8 *end = in + in_len;

    for (in += 4; (size_t)(end - in) >= 4;) {
        u32 packed = get_u32(in);
        int n;

        in += 4;
        if (packed > (size_t)(end - in) || packed > INT_MAX)
            return -EINVAL;
        n = LZ4_decompress_safe((const char *)in, (char *)out, (int)packed,
                                (int)MIN(out_len, LZ4_LEGACY_BLOCK));
        if (n < 0)
            return -EINVAL;
        in += packed;
        out += n;
        out_len -= (size_t)n;
    }
    return in == end && !out_len ? 0 : -EINVAL;
}

static const struct format {
    const char *name;
    u8 magic[6], magic_len;
    bool appended; /* the unpacked size follows the stream and is not part of it */
    int (*unpack)(const u8 *in, size_t in_len, u8 *out, size_t out_len);
} formats[] = {
    {"gzip", {0x1f, 0x8b}, 2, false, unpack_gzip},
    {"xz", {0xfd, '7', 'z', 'X', 'Z', 0}, 6, true, unpack_lzma},
    {"lzma", {0x5d, 0, 0}, 3, true, unpack_lzma},
    {"zstd", {0x28, 0xb5, 0x2f, 0xfd}, 4, true, unpack_zstd},
    {"lz4", {0x02, 0x21, 0x4c, 0x18}, 4, true, unpack_lz4},
    {"bzip2", {'B', 'Z', 'h'}, 3, true, NULL},
    {"lzo", {0x89, 'L', 'Z', 'O'}, 4, true, NULL},
};

static const struct format *find_format(const u8 *payload, size_t len)
{
    for (size_t i = 0; i < ARRAY_SIZE(formats); i++)
        if (len >= formats[i].magic_len && !memcmp(payload, formats[i].magic, formats[i].magic_len))
            return &formats[i];
    return NULL;
}

u32 decompress_size(const u8 *payload, size_t len)
{
    return len < TRAILER ? 0 : get_u32(payload + len - TRAILER);
}

const char *decompress_format(const u8 *payload, size_t len)
{
    const struct format *f = find_format(payload, len);

    return f ? f->name : NULL;
}

int decompress(const u8 *payload, size_t len, u8 *out, size_t out_len)
{
    const struct format *f = find_format(payload, len);

    if (!f || !f->unpack)
        return -EOPNOTSUPP;
    /* zlib counts in 32 bits; no payload is that large. */
    if (len > UINT32_MAX || out_len > UINT32_MAX || len < f->magic_len + TRAILER)
        return -EINVAL;
    return f->unpack(payload, f->appended ? len - TRAILER : len, out, out_len);
}
