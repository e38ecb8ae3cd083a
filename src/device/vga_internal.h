/*
 * What the files of the VGA share: its registers, by the names of the IBM VGA (as in Intel's "Open Source HD
 * Graphics Programmer's Reference Manual", volume 1 part 3), and its memory.
 */
#ifndef DOPPEL_DEVICE_VGA_INTERNAL_H
#define DOPPEL_DEVICE_VGA_INTERNAL_H

#include "device/vga.h"

#define VGA_MEMORY MIB(8)

enum { SR_RESET, SR_CLOCK, SR_PLANE_MASK, SR_FONT, SR_MEMORY_MODE, SR_COUNT = 8 };
#define SR_CLOCK_8_DOTS 0x01
#define SR_CLOCK_SCREEN_OFF 0x20
#define SR_MEMORY_ODD_EVEN_OFF 0x04
#define SR_MEMORY_CHAIN_4 0x08

enum {
    GR_SET_RESET,
    GR_ENABLE_SET_RESET,
    GR_COMPARE,
    GR_ROTATE,
    GR_READ_MAP,
    GR_MODE,
    GR_MISC,
    GR_DONT_CARE,
    GR_BIT_MASK,
    GR_COUNT = 16
};
#define GR_MODE_WRITE 0x03
#define GR_MODE_READ_1 0x08
#define GR_MODE_ODD_EVEN 0x10
#define GR_MODE_SHIFT 5 /* two bits: how bytes become pixels */
#define GR_MISC_GRAPHICS 0x01
#define GR_MISC_MAP_SHIFT 2

enum { AR_MODE = 16, AR_OVERSCAN, AR_PLANE_ENABLE, AR_PANNING, AR_COLOR_SELECT, AR_COUNT = 32 };
#define AR_MODE_GRAPHICS 0x01
#define AR_MODE_LINE_GRAPHICS 0x04
#define AR_MODE_BLINK 0x08
#define AR_MODE_P54_SELECT 0x80
#define AR_INDEX_SCREEN_ON 0x20

enum {
    CR_H_DISPLAY_END = 0x01,
    CR_OVERFLOW = 0x07,
    CR_MAX_SCAN_LINE = 0x09,
    CR_CURSOR_START = 0x0a,
    CR_CURSOR_END = 0x0b,
    CR_START_HIGH = 0x0c,
    CR_START_LOW = 0x0d,
    CR_CURSOR_HIGH = 0x0e,
    CR_CURSOR_LOW = 0x0f,
    CR_V_RETRACE_END = 0x11,
    CR_V_DISPLAY_END = 0x12,
    CR_OFFSET = 0x13,
    CR_MODE = 0x17,
    CR_COUNT = 0x20
};
#define CR_MAX_SCAN_DOUBLE 0x80
#define CR_CURSOR_OFF 0x20
#define CR_PROTECT 0x80 /* of CR_V_RETRACE_END */

/* VBE DISPI registers: Bochs, "VBE Display API". */
enum {
    VBE_ID,
    VBE_XRES,
    VBE_YRES,
    VBE_BPP,
    VBE_ENABLE,
    VBE_BANK,
    VBE_VIRT_WIDTH,
    VBE_VIRT_HEIGHT,
    VBE_X_OFFSET,
    VBE_Y_OFFSET,
    VBE_MEMORY_64K,
    VBE_COUNT
};
#define VBE_ENABLED 0x01
#define VBE_GETCAPS 0x02
#define VBE_8BIT_DAC 0x20
#define VBE_NOCLEARMEM 0x80
#define VBE_MAX_XRES 2560
#define VBE_MAX_YRES 1600
#define VBE_MAX_BPP 32

struct vga {
    struct pci_device pci;
    struct device_env env;
    struct io_range ports, mono_ports, vbe_ports, window;
    bool vbe_ports_added, window_added, ports_added, mono_ports_added;
    u64 changes; /* counts what may have changed the screen */

    /* From here to the end: power_on clears it, and it is what a view copies. */
    u8 misc, feature;
    u8 sr_index, gr_index, cr_index, ar_index;
    bool ar_data; /* the flip-flop: the next write to 0x3c0 is data */
    u8 sr[SR_COUNT], gr[GR_COUNT], cr[CR_COUNT], ar[AR_COUNT];
    u8 pel_mask, dac_state, dac_read, dac_write, dac_part;
    u8 dac_cache[3];
    u8 palette[256][3];
    u32 latch; /* a byte each plane */
    u16 vbe_index;
    u16 vbe[VBE_COUNT];
    u8 memory[VGA_MEMORY]; /* plane p's byte n at 4 * n + p */
};

static inline u64 vga_vbe_bytes_per_line(u64 width, u16 bpp)
{
    return bpp == 15 ? width * 2 : width * bpp / 8;
}

static inline bool vga_vbe_enabled(const struct vga *vga)
{
    return vga->vbe[VBE_ENABLE] & VBE_ENABLED;
}

#endif
