/*
 * CRC-32 (ISO/IEC 13239, polynomial 0x04c11db7, bits reflected): two dependent loads a byte.
 */
#include "bench.h"

static u32 table[256];

u32 crc32(const void *data, size_t size)
{
    const u8 *at = data;
    u32 crc = ~0u;

    if (!table[1]) {
        for (u32 i = 0; i < 256; i++) {
            u32 c = i;

            for (int bit = 0; bit < 8; bit++)
                c = c & 1 ? 0xedb88320u ^ c >> 1 : c >> 1;
            table[i] = c;
        }
    }
    while (size--)
        crc = table[(u8)(crc ^ *at++)] ^ crc >> 8;
    return ~crc;
}
