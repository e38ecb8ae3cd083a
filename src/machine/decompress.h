/*
 * Unpacks the payload of a Linux bzImage on the host: gzip, xz, lzma, zstd and lz4's legacy frame.
 */
#ifndef DOPPEL_MACHINE_DECOMPRESS_H
#define DOPPEL_MACHINE_DECOMPRESS_H

#include "host/types.h"

/*
 * How many bytes the payload unpacks to, by its last four bytes: gzip's own ISIZE, and what the
 * kernel's build appends for the other formats. 0 when it is too short to say.
 */
u32 decompress_size(const u8 *payload, size_t len);

/* The format's name by its first bytes, or NULL. */
const char *decompress_format(const u8 *payload, size_t len);

/*
 * Unpacks to exactly out_len bytes, which is what decompress_size said. 0; -EINVAL when the data is
 * damaged; -EOPNOTSUPP when the format is not one of those above; -ENOMEM.
 */
int decompress(const u8 *payload, size_t len, u8 *out, size_t out_len);

#endif
