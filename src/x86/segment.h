/*
 * Segment registers and descriptors (Intel SDM vol. 3, 3.4 and 3.5).
 *
 * A loaded segment keeps its attributes in the descriptor's own layout (bits 8 to 23 of the high
 * dword, shifted down by 8), as VMX and KVM do.
 */
#ifndef DOPPEL_X86_SEGMENT_H
#define DOPPEL_X86_SEGMENT_H

#include "host/types.h"

#define SEG_ATTR_TYPE 0x000fu
#define SEG_ATTR_ACCESSED 0x0001u /* code and data */
#define SEG_ATTR_WRITABLE 0x0002u /* data; for code: readable */
#define SEG_ATTR_DOWN 0x0004u     /* data: expand-down; for code: conforming */
#define SEG_ATTR_CODE 0x0008u
#define SEG_ATTR_S 0x0010u /* code or data, not system */
#define SEG_ATTR_DPL 0x0060u
#define SEG_ATTR_DPL_SHIFT 5
#define SEG_ATTR_P 0x0080u
#define SEG_ATTR_AVL 0x1000u
#define SEG_ATTR_L 0x2000u
#define SEG_ATTR_DB 0x4000u
#define SEG_ATTR_G 0x8000u
#define SEG_ATTR_UNUSABLE 0x10000u /* loaded with a null selector: any use faults */

enum system_segment_type {
    SYSSEG_TSS16_AVAIL = 1,
    SYSSEG_LDT = 2,
    SYSSEG_TSS16_BUSY = 3,
    SYSSEG_CALLGATE16 = 4,
    SYSSEG_TASKGATE = 5,
    SYSSEG_INTGATE16 = 6,
    SYSSEG_TRAPGATE16 = 7,
    SYSSEG_TSS32_AVAIL = 9,
    SYSSEG_TSS32_BUSY = 11,
    SYSSEG_CALLGATE32 = 12,
    SYSSEG_INTGATE32 = 14,
    SYSSEG_TRAPGATE32 = 15,
};

struct segment {
    u64 base;
    u32 limit; /* in bytes, granularity applied */
    u32 attr;  /* SEG_ATTR_* */
    u16 selector;
    u16 pad;
};

struct descriptor_table {
    u64 base;
    u32 limit;
    u32 pad;
};

static inline unsigned segment_dpl(const struct segment *s)
{
    return (s->attr & SEG_ATTR_DPL) >> SEG_ATTR_DPL_SHIFT;
}

/* The fields of an 8-byte descriptor. */
static inline u32 descriptor_base(u64 d)
{
    return (u32)((d >> 16) & 0xffffff) | ((u32)(d >> 56) << 24);
}
static inline u32 descriptor_attr(u64 d)
{
    return (u32)(d >> 40) & 0xf0ff;
}
static inline u32 descriptor_limit(u64 d)
{
    u32 limit = (u32)(d & 0xffff) | ((u32)(d >> 32) & 0xf0000);

    return d & BIT(55) ? (limit << 12) | 0xfff : limit;
}

#endif
