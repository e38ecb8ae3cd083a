/*
 * The VGA's registers and its windows into video memory.
 *
 * Memory is four planes, kept interleaved: the planes' bytes n are one 32-bit word. What the processor sees at
 * 0xa0000 to 0xbffff goes through the sequencer's and the graphics controller's modes: chained (a byte is a pixel, so
 * the interleaved memory is linear), odd/even (text: characters in plane 0, attributes in plane 1), or planar
 * with latches, masks and write modes. While VBE DISPI is enabled, the window is a bank of 64 KiB of linear memory.
 *
 * A monitor is never told its timing: only what can be seen is kept, and retrace is reckoned from the clock.
 */
#include "device/vga.h"

#include "device/vga_internal.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define VGA_VENDOR 0x1234
#define VGA_DEVICE 0x1111

#define PORT_VGA 0x3c0 /* to 0x3df, but for 0x3d0 to 0x3d3 that nobody needs */
#define PORT_VGA_COUNT 0x20
#define PORT_VGA_MONO 0x3b4 /* to 0x3ba */
#define PORT_VGA_MONO_COUNT 7
#define PORT_VBE 0x1ce /* index; data one further on, 16 bits each */
#define PORT_VBE_COUNT 3

#define WINDOW_BASE 0xa0000
#define WINDOW_SIZE 0x20000

#define MISC_COLOR 0x01 /* CRTC at 0x3d4, not 0x3b4 */

#define FRAME_NS 16683350ULL /* 59.94 Hz */
#define V_RETRACE_NS 63555ULL
#define V_BLANK_NS 1430000ULL
#define LINE_NS 31778ULL
#define H_BLANK_NS 6356ULL
#define ST01_BLANK 0x01
#define ST01_V_RETRACE 0x08

#define BAR_FRAMEBUFFER 0
#define BAR_REGISTERS 2
#define REGISTERS_SIZE 0x1000
#define REGISTERS_VGA 0x400 /* ports 0x3c0 on, then the DISPI registers: Bochs, bochs-display */
#define REGISTERS_VBE 0x500

/* ---- attribute controller ---- */

static void write_attribute(struct vga *vga, u8 value)
{
    unsigned index = vga->ar_index & 0x1f;

    if (!vga->ar_data)
        vga->ar_index = value & 0x3f;
    else if (index < AR_MODE)
        vga->ar[index] = value & 0x3f;
    else if (index <= AR_COLOR_SELECT)
        vga->ar[index] = value;
    vga->ar_data = !vga->ar_data;
}

/* ---- DAC ---- */

static u8 dac_scale(const struct vga *vga)
{
    return vga->vbe[VBE_ENABLE] & VBE_8BIT_DAC ? 0xff : 0x3f;
}

static u8 read_dac(struct vga *vga)
{
    u8 value = vga->palette[vga->dac_read][vga->dac_part];

    if (++vga->dac_part == 3) {
        vga->dac_part = 0;
        vga->dac_read++;
    }
    return value;
}

static void write_dac(struct vga *vga, u8 value)
{
    vga->dac_cache[vga->dac_part] = value & dac_scale(vga);
    if (++vga->dac_part < 3)
        return;
    memcpy(vga->palette[vga->dac_write++], vga->dac_cache, 3);
    vga->dac_part = 0;
}

/* ---- CRT controller ---- */

static void write_crtc(struct vga *vga, u8 value)
{
    unsigned index = vga->cr_index;

    if (index >= CR_COUNT)
        return;
    if (index <= CR_OVERFLOW && (vga->cr[CR_V_RETRACE_END] & CR_PROTECT)) {
        if (index == CR_OVERFLOW) /* the line compare bit isn't protected */
            vga->cr[index] = (vga->cr[index] & ~0x10) | (value & 0x10);
        return;
    }
    vga->cr[index] = value;
}

static u8 input_status_1(struct vga *vga)
{
    u64 at = vm_clock_now(vga->env.clock) % FRAME_NS;
    bool v_blank = at >= FRAME_NS - V_BLANK_NS;
    bool v_retrace = v_blank && at - (FRAME_NS - V_BLANK_NS) < V_RETRACE_NS;
    bool h_blank = at % LINE_NS >= LINE_NS - H_BLANK_NS;

    vga->ar_data = false;
    return (v_blank || h_blank ? ST01_BLANK : 0) | (v_retrace ? ST01_V_RETRACE : 0);
}

/* ---- ports ---- */

/* 0x3b4 to 0x3ba and 0x3d4 to 0x3da are the same registers; misc says which of them answer. */
static bool crtc_answers(const struct vga *vga, u16 port)
{
    return (port >= 0x3d0) == ((vga->misc & MISC_COLOR) != 0);
}

static u8 read_crtc_port(struct vga *vga, u16 port)
{
    if (!crtc_answers(vga, port))
        return 0xff;
    switch (port & 0xf) {
    case 0x4:
        return vga->cr_index;
    case 0x5:
        return vga->cr_index < CR_COUNT ? vga->cr[vga->cr_index] : 0xff;
    case 0xa:
        return input_status_1(vga);
    default:
        return 0xff;
    }
}

static u8 read_port(struct vga *vga, u16 port)
{
    switch (port) {
    case 0x3c0:
        return vga->ar_index;
    case 0x3c1:
        return vga->ar[vga->ar_index & 0x1f];
    case 0x3c2: /* input status 0: the monitor is there */
        return 0x10;
    case 0x3c4:
        return vga->sr_index;
    case 0x3c5:
        return vga->sr[vga->sr_index & (SR_COUNT - 1)];
    case 0x3c6:
        return vga->pel_mask;
    case 0x3c7:
        return vga->dac_state;
    case 0x3c8:
        return vga->dac_write;
    case 0x3c9:
        return read_dac(vga);
    case 0x3ca:
        return vga->feature;
    case 0x3cc:
        return vga->misc;
    case 0x3ce:
        return vga->gr_index;
    case 0x3cf:
        return vga->gr[vga->gr_index & (GR_COUNT - 1)];
    default:
        return port < PORT_VGA || port >= 0x3d0 ? read_crtc_port(vga, port) : 0xff;
    }
}

static void write_crtc_port(struct vga *vga, u16 port, u8 value)
{
    if (!crtc_answers(vga, port))
        return;
    switch (port & 0xf) {
    case 0x4:
        vga->cr_index = value;
        break;
    case 0x5:
        write_crtc(vga, value);
        break;
    case 0xa:
        vga->feature = value;
        break;
    default:
        break;
    }
}

static void write_port(struct vga *vga, u16 port, u8 value)
{
    static const u8 sr_mask[SR_COUNT] = {0x03, 0x3d, 0x0f, 0x3f, 0x0e};
    static const u8 gr_mask[GR_COUNT] = {0x0f, 0x0f, 0x0f, 0x1f, 0x03, 0x7b, 0x0f, 0x0f, 0xff};

    switch (port) {
    case 0x3c0:
        write_attribute(vga, value);
        break;
    case 0x3c2:
        vga->misc = value & ~0x10;
        break;
    case 0x3c4:
        vga->sr_index = value & (SR_COUNT - 1);
        break;
    case 0x3c5:
        vga->sr[vga->sr_index & (SR_COUNT - 1)] = value & sr_mask[vga->sr_index & (SR_COUNT - 1)];
        break;
    case 0x3c6:
        vga->pel_mask = value;
        break;
    case 0x3c7:
        vga->dac_read = value;
        vga->dac_part = 0;
        vga->dac_state = 3;
        break;
    case 0x3c8:
        vga->dac_write = value;
        vga->dac_part = 0;
        vga->dac_state = 0;
        break;
    case 0x3c9:
        write_dac(vga, value);
        break;
    case 0x3ce:
        vga->gr_index = value & (GR_COUNT - 1);
        break;
    case 0x3cf:
        vga->gr[vga->gr_index & (GR_COUNT - 1)] = value & gr_mask[vga->gr_index & (GR_COUNT - 1)];
        break;
    default:
        if (port < PORT_VGA || port >= 0x3d0)
            write_crtc_port(vga, port, value);
        break;
    }
}

static u8 guest_reads(struct vga *vga, u16 port)
{
    u8 value;

    device_lock(&vga->pci.dev);
    value = read_port(vga, port);
    device_unlock(&vga->pci.dev);
    return value;
}

static void guest_writes(struct vga *vga, u16 port, u8 value)
{
    device_lock(&vga->pci.dev);
    write_port(vga, port, value);
    vga->changes++;
    device_unlock(&vga->pci.dev);
}

/* Accesses of 16 bits, such as an index with its data, come as two of 8. */
static u64 ports_read(void *opaque, u64 offset, unsigned size)
{
    return guest_reads(opaque, (u16)(PORT_VGA + offset));
}
static void ports_write(void *opaque, u64 offset, u64 value, unsigned size)
{
    guest_writes(opaque, (u16)(PORT_VGA + offset), (u8)value);
}
static u64 mono_read(void *opaque, u64 offset, unsigned size)
{
    return guest_reads(opaque, (u16)(PORT_VGA_MONO + offset));
}
static void mono_write(void *opaque, u64 offset, u64 value, unsigned size)
{
    guest_writes(opaque, (u16)(PORT_VGA_MONO + offset), (u8)value);
}

static const struct io_ops ports_ops = {ports_read, ports_write, 1};
static const struct io_ops mono_ops = {mono_read, mono_write, 1};

/* ---- VBE DISPI ---- */

static const u16 vbe_max[VBE_COUNT] = {
    [VBE_XRES] = VBE_MAX_XRES, [VBE_YRES] = VBE_MAX_YRES, [VBE_BPP] = VBE_MAX_BPP};

static u16 vbe_read(const struct vga *vga, unsigned index)
{
    if (index >= VBE_COUNT)
        return 0;
    if ((vga->vbe[VBE_ENABLE] & VBE_GETCAPS) && vbe_max[index])
        return vbe_max[index];
    return vga->vbe[index];
}

/* What was asked for becomes what fits the memory: virtual size and offsets last. */
static void vbe_fix(struct vga *vga)
{
    u16 *vbe = vga->vbe;
    u64 line;

    if (vbe[VBE_BPP] != 8 && vbe[VBE_BPP] != 15 && vbe[VBE_BPP] != 16 && vbe[VBE_BPP] != 24 &&
        vbe[VBE_BPP] != 32)
        vbe[VBE_BPP] = 8;
    vbe[VBE_XRES] = MAX(8, MIN(vbe[VBE_XRES] & ~7U, VBE_MAX_XRES));
    vbe[VBE_YRES] = MAX(1, MIN(vbe[VBE_YRES], VBE_MAX_YRES));
    vbe[VBE_VIRT_WIDTH] = MAX(vbe[VBE_XRES], MIN(vbe[VBE_VIRT_WIDTH] & ~7U, 8192U));
    line = vga_vbe_bytes_per_line(vbe[VBE_VIRT_WIDTH], vbe[VBE_BPP]);
    if (line * vbe[VBE_YRES] > VGA_MEMORY) {
        vbe[VBE_VIRT_WIDTH] = vbe[VBE_XRES];
        line = vga_vbe_bytes_per_line(vbe[VBE_VIRT_WIDTH], vbe[VBE_BPP]);
        vbe[VBE_YRES] = MIN(vbe[VBE_YRES], VGA_MEMORY / line);
    }
    vbe[VBE_VIRT_HEIGHT] = MIN(VGA_MEMORY / line, 0xffffU);
    vbe[VBE_X_OFFSET] = MIN(vbe[VBE_X_OFFSET], vbe[VBE_VIRT_WIDTH] - vbe[VBE_XRES]);
    vbe[VBE_Y_OFFSET] = MIN(vbe[VBE_Y_OFFSET], vbe[VBE_VIRT_HEIGHT] - vbe[VBE_YRES]);
}

static void vbe_enable(struct vga *vga, u16 value)
{
    bool was = vga_vbe_enabled(vga);

    if ((value ^ vga->vbe[VBE_ENABLE]) & VBE_8BIT_DAC) {
        for (unsigned i = 0; i < 256 * 3; i++) {
            u8 *c = &vga->palette[i / 3][i % 3];

            *c = value & VBE_8BIT_DAC ? *c << 2 : *c >> 2;
        }
    }
    vga->vbe[VBE_ENABLE] = value;
    if (!(value & VBE_ENABLED) || was)
        return;
    vga->vbe[VBE_VIRT_WIDTH] = vga->vbe[VBE_XRES];
    vga->vbe[VBE_X_OFFSET] = vga->vbe[VBE_Y_OFFSET] = 0;
    vbe_fix(vga);
    if (!(value & VBE_NOCLEARMEM))
        memset(vga->memory, 0,
               vga_vbe_bytes_per_line(vga->vbe[VBE_VIRT_WIDTH], vga->vbe[VBE_BPP]) *
                   vga->vbe[VBE_YRES]);
}

static void vbe_write(struct vga *vga, unsigned index, u16 value)
{
    switch (index) {
    case VBE_ID:
        if (value >= 0xb0c0 && value <= 0xb0c5)
            vga->vbe[VBE_ID] = value;
        break;
    case VBE_XRES:
    case VBE_YRES:
    case VBE_BPP:
    case VBE_VIRT_WIDTH:
    case VBE_X_OFFSET:
    case VBE_Y_OFFSET:
        vga->vbe[index] = value;
        vbe_fix(vga);
        break;
    case VBE_BANK:
        vga->vbe[index] = value & (VGA_MEMORY / KIB(64) - 1);
        break;
    case VBE_ENABLE:
        vbe_enable(vga, value);
        break;
    default:
        break;
    }
}

static u64 vbe_ports_read(void *opaque, u64 offset, unsigned size)
{
    struct vga *vga = opaque;
    u64 value = UINT64_MAX;

    device_lock(&vga->pci.dev);
    if (offset == 0)
        value = vga->vbe_index;
    else if (offset == 1)
        value = vbe_read(vga, vga->vbe_index);
    device_unlock(&vga->pci.dev);
    return value;
}

static void vbe_ports_write(void *opaque, u64 offset, u64 value, unsigned size)
{
    struct vga *vga = opaque;

    device_lock(&vga->pci.dev);
    if (offset == 0 && size == 2)
        vga->vbe_index = (u16)value;
    else if (offset == 1 && size == 2)
        vbe_write(vga, vga->vbe_index, (u16)value);
    vga->changes++;
    device_unlock(&vga->pci.dev);
}

static const struct io_ops vbe_ops = {vbe_ports_read, vbe_ports_write, 2};

/* ---- the window at 0xa0000 ---- */

/* The offset into the part that GR_MISC maps; false outside of it. */
static bool window_offset(const struct vga *vga, u64 at, u64 *offset)
{
    static const struct {
        u32 base, size;
    } maps[] = {{0, 0x20000}, {0, 0x10000}, {0x10000, 0x8000}, {0x18000, 0x8000}};
    unsigned map = vga->gr[GR_MISC] >> GR_MISC_MAP_SHIFT & 3;

    *offset = at - maps[map].base;
    return at >= maps[map].base && *offset < maps[map].size;
}

static u32 spread(u8 planes)
{
    return (planes & 1 ? 0xffU : 0) | (planes & 2 ? 0xff00U : 0) | (planes & 4 ? 0xff0000U : 0) |
           (planes & 8 ? 0xff000000U : 0);
}

static u32 replicate(u8 byte)
{
    return byte * 0x01010101U;
}

static u32 load_word(const struct vga *vga, u64 n)
{
    u32 word;

    memcpy(&word, vga->memory + 4 * (n & (VGA_MEMORY / 4 - 1)), sizeof(word));
    return word;
}

static bool is_linear(const struct vga *vga)
{
    return vga_vbe_enabled(vga) || (vga->sr[SR_MEMORY_MODE] & SR_MEMORY_CHAIN_4);
}

static u8 *linear_byte(struct vga *vga, u64 offset)
{
    u64 bank = vga_vbe_enabled(vga) ? (u64)vga->vbe[VBE_BANK] << 16 : 0;

    return &vga->memory[(bank + offset) & (VGA_MEMORY - 1)];
}

static u8 window_read_byte(struct vga *vga, u64 at)
{
    u64 offset;

    if (!window_offset(vga, at, &offset))
        return 0xff;
    if (is_linear(vga))
        return *linear_byte(vga, offset);
    if (vga->gr[GR_MODE] & GR_MODE_ODD_EVEN) {
        unsigned plane = (vga->gr[GR_READ_MAP] & 2) | (offset & 1);

        return (u8)(load_word(vga, offset >> 1) >> 8 * plane);
    }
    vga->latch = load_word(vga, offset);
    if (!(vga->gr[GR_MODE] & GR_MODE_READ_1))
        return (u8)(vga->latch >> 8 * (vga->gr[GR_READ_MAP] & 3));
    /* Read mode 1: a 1 where the planes that count have the colour compared with. */
    u32 differ = (vga->latch ^ spread(vga->gr[GR_COMPARE])) & spread(vga->gr[GR_DONT_CARE]);

    differ |= differ >> 16;
    differ |= differ >> 8;
    return (u8)~differ;
}

static u8 rotate_right(u8 value, unsigned n)
{
    return (u8)(value >> n | value << (8 - n));
}

static u32 planar_value(const struct vga *vga, u8 value)
{
    u8 rotated = rotate_right(value, vga->gr[GR_ROTATE] & 7);
    u32 bits = replicate(rotated), mask = replicate(vga->gr[GR_BIT_MASK]);
    u32 set = spread(vga->gr[GR_SET_RESET]), enabled = spread(vga->gr[GR_ENABLE_SET_RESET]);

    switch (vga->gr[GR_MODE] & GR_MODE_WRITE) {
    case 1:
        return vga->latch;
    case 0:
        bits = (bits & ~enabled) | (set & enabled);
        break;
    case 2:
        bits = spread(value & 15);
        break;
    case 3:
        mask &= bits;
        bits = set;
        break;
    default:
        break;
    }
    switch (vga->gr[GR_ROTATE] >> 3 & 3) {
    case 1:
        bits &= vga->latch;
        break;
    case 2:
        bits |= vga->latch;
        break;
    case 3:
        bits ^= vga->latch;
        break;
    default:
        break;
    }
    return (bits & mask) | (vga->latch & ~mask);
}

static void store_planes(struct vga *vga, u64 n, u32 value, u8 planes)
{
    u32 mask = spread(planes & vga->sr[SR_PLANE_MASK]);
    u32 word = (load_word(vga, n) & ~mask) | (value & mask);

    memcpy(vga->memory + 4 * (n & (VGA_MEMORY / 4 - 1)), &word, sizeof(word));
}

static void window_write_byte(struct vga *vga, u64 at, u8 value)
{
    u64 offset;

    if (!window_offset(vga, at, &offset))
        return;
    if (vga_vbe_enabled(vga))
        *linear_byte(vga, offset) = value;
    else if (vga->sr[SR_MEMORY_MODE] & SR_MEMORY_CHAIN_4)
        store_planes(vga, offset >> 2, replicate(value), 1U << (offset & 3));
    else if (!(vga->sr[SR_MEMORY_MODE] & SR_MEMORY_ODD_EVEN_OFF))
        store_planes(vga, offset >> 1, replicate(value), offset & 1 ? 0xa : 0x5);
    else
        store_planes(vga, offset, planar_value(vga, value), 0xf);
}

static u64 window_read(void *opaque, u64 offset, unsigned size)
{
    struct vga *vga = opaque;
    u64 value = 0;

    device_lock(&vga->pci.dev);
    for (unsigned i = 0; i < size; i++)
        value |= (u64)window_read_byte(vga, offset + i) << 8 * i;
    device_unlock(&vga->pci.dev);
    return value;
}

static void window_write(void *opaque, u64 offset, u64 value, unsigned size)
{
    struct vga *vga = opaque;

    device_lock(&vga->pci.dev);
    for (unsigned i = 0; i < size; i++)
        window_write_byte(vga, offset + i, (u8)(value >> 8 * i));
    vga->changes++;
    device_unlock(&vga->pci.dev);
}

static const struct io_ops window_ops = {window_read, window_write, 8};

/* ---- BARs ---- */

static u64 framebuffer_read(void *opaque, u64 offset, unsigned size)
{
    struct vga *vga = opaque;
    u64 value = 0;

    device_lock(&vga->pci.dev);
    memcpy(&value, vga->memory + offset, MIN(size, VGA_MEMORY - offset));
    device_unlock(&vga->pci.dev);
    return value;
}

static void framebuffer_write(void *opaque, u64 offset, u64 value, unsigned size)
{
    struct vga *vga = opaque;

    device_lock(&vga->pci.dev);
    memcpy(vga->memory + offset, &value, MIN(size, VGA_MEMORY - offset));
    vga->changes++;
    device_unlock(&vga->pci.dev);
}

static u64 registers_read(void *opaque, u64 offset, unsigned size)
{
    struct vga *vga = opaque;
    u64 value = 0;

    device_lock(&vga->pci.dev);
    if (offset >= REGISTERS_VBE && offset + size <= REGISTERS_VBE + 2 * VBE_COUNT) {
        value = vbe_read(vga, (offset - REGISTERS_VBE) / 2) >> 8 * (offset & 1);
    } else if (offset >= REGISTERS_VGA && offset + size <= REGISTERS_VGA + PORT_VGA_COUNT) {
        for (unsigned i = 0; i < size; i++)
            value |= (u64)read_port(vga, PORT_VGA + (offset - REGISTERS_VGA) + i) << 8 * i;
    }
    device_unlock(&vga->pci.dev);
    return value;
}

static void registers_write(void *opaque, u64 offset, u64 value, unsigned size)
{
    struct vga *vga = opaque;

    device_lock(&vga->pci.dev);
    if (offset >= REGISTERS_VBE && offset + size <= REGISTERS_VBE + 2 * VBE_COUNT) {
        if (size == 2 && !(offset & 1))
            vbe_write(vga, (offset - REGISTERS_VBE) / 2, (u16)value);
    } else if (offset >= REGISTERS_VGA && offset + size <= REGISTERS_VGA + PORT_VGA_COUNT) {
        for (unsigned i = 0; i < size; i++)
            write_port(vga, PORT_VGA + (offset - REGISTERS_VGA) + i, (u8)(value >> 8 * i));
    }
    vga->changes++;
    device_unlock(&vga->pci.dev);
}

static const struct io_ops framebuffer_ops = {framebuffer_read, framebuffer_write, 8};
static const struct io_ops registers_ops = {registers_read, registers_write, 2};

/* ---- the device ---- */

static void power_on(struct vga *vga)
{
    memset(&vga->misc, 0, offsetof(struct vga, memory) - offsetof(struct vga, misc));
    memset(vga->memory, 0, sizeof(vga->memory));
    vga->misc = MISC_COLOR;
    vga->pel_mask = 0xff;
    vga->vbe[VBE_ID] = 0xb0c5;
    vga->vbe[VBE_MEMORY_64K] = VGA_MEMORY / KIB(64);
    vbe_fix(vga);
}

static void vga_reset(struct device *dev)
{
    struct vga *vga = container_of(dev, struct vga, pci.dev);

    device_lock(dev);
    power_on(vga);
    vga->changes++;
    device_unlock(dev);
    pci_device_reset(&vga->pci);
}

static void vga_destroy(struct device *dev)
{
    struct vga *vga = container_of(dev, struct vga, pci.dev);

    if (vga->ports_added)
        io_bus_remove(vga->env.ports, &vga->ports);
    if (vga->mono_ports_added)
        io_bus_remove(vga->env.ports, &vga->mono_ports);
    if (vga->vbe_ports_added)
        io_bus_remove(vga->env.ports, &vga->vbe_ports);
    if (vga->window_added)
        io_bus_remove(vga->env.mmio, &vga->window);
    pci_device_fini(&vga->pci);
    free(vga);
}

static int vga_loaded(void *obj, struct error *err)
{
    struct vga *vga = obj;
    u16 vbe[VBE_COUNT];

    memcpy(vbe, vga->vbe, sizeof(vbe));
    vbe_fix(vga);
    if (memcmp(vbe, vga->vbe, sizeof(vbe)) != 0 || vbe[VBE_BANK] >= VGA_MEMORY / KIB(64) ||
        vbe[VBE_MEMORY_64K] != VGA_MEMORY / KIB(64) || vga->dac_part > 2)
        return error_input(err, "vga: the saved registers are impossible");
    vga->changes++;
    return 0;
}

static const struct state_field vga_fields[] = {
    STATE_STRUCTS(struct vga, pci, &pci_device_state),
    STATE_HOST(struct vga, env),
    STATE_HOST(struct vga, ports),
    STATE_HOST(struct vga, mono_ports),
    STATE_HOST(struct vga, vbe_ports),
    STATE_HOST(struct vga, window),
    STATE_HOST(struct vga, vbe_ports_added),
    STATE_HOST(struct vga, window_added),
    STATE_HOST(struct vga, ports_added),
    STATE_HOST(struct vga, mono_ports_added),
    STATE_HOST(struct vga, changes),
    STATE_FIELD(struct vga, misc),
    STATE_FIELD(struct vga, feature),
    STATE_FIELD(struct vga, sr_index),
    STATE_FIELD(struct vga, gr_index),
    STATE_FIELD(struct vga, cr_index),
    STATE_FIELD(struct vga, ar_index),
    STATE_FIELD(struct vga, ar_data),
    STATE_FIELD(struct vga, sr),
    STATE_FIELD(struct vga, gr),
    STATE_FIELD(struct vga, cr),
    STATE_FIELD(struct vga, ar),
    STATE_FIELD(struct vga, pel_mask),
    STATE_FIELD(struct vga, dac_state),
    STATE_FIELD(struct vga, dac_read),
    STATE_FIELD(struct vga, dac_write),
    STATE_FIELD(struct vga, dac_part),
    STATE_FIELD(struct vga, dac_cache),
    STATE_FIELD(struct vga, palette),
    STATE_FIELD(struct vga, latch),
    STATE_FIELD(struct vga, vbe_index),
    STATE_FIELD(struct vga, vbe),
    STATE_BYTES(struct vga, memory),
};
static const struct state_desc vga_state = {
    .name = "vga",
    .version = 1,
    .struct_size = sizeof(struct vga),
    .fields = vga_fields,
    .nfields = ARRAY_SIZE(vga_fields),
    .loaded = vga_loaded,
};

static const struct pci_device_ops vga_ops = {
    .dev = {.reset = vga_reset, .destroy = vga_destroy},
};

/* 0 or -errno; what was added is noted for vga_destroy. */
static int add_ranges(struct vga *vga, struct error *err)
{
    const struct device_env *env = &vga->env;

    vga->ports = (struct io_range){"vga", PORT_VGA, PORT_VGA_COUNT, &ports_ops, vga};
    vga->mono_ports =
        (struct io_range){"vga mono", PORT_VGA_MONO, PORT_VGA_MONO_COUNT, &mono_ops, vga};
    vga->vbe_ports = (struct io_range){"vga vbe", PORT_VBE, PORT_VBE_COUNT, &vbe_ops, vga};
    vga->window = (struct io_range){"vga window", WINDOW_BASE, WINDOW_SIZE, &window_ops, vga};
    vga->ports_added = io_bus_add(env->ports, &vga->ports, err) == 0;
    if (!vga->ports_added)
        return -EEXIST;
    vga->mono_ports_added = io_bus_add(env->ports, &vga->mono_ports, err) == 0;
    if (!vga->mono_ports_added)
        return -EEXIST;
    vga->vbe_ports_added = io_bus_add(env->ports, &vga->vbe_ports, err) == 0;
    if (!vga->vbe_ports_added)
        return -EEXIST;
    vga->window_added = io_bus_add(env->mmio, &vga->window, err) == 0;
    return vga->window_added ? 0 : -EEXIST;
}

struct vga *vga_create(const struct device_env *env, const struct vga_config *cfg,
                       struct pci_host *host, u8 devfn, struct error *err)
{
    static const struct pci_identity identity = {
        .vendor = VGA_VENDOR,
        .device = VGA_DEVICE,
        .class = PCI_CLASS_DISPLAY_VGA,
        .revision = 2,
        .subsystem_vendor = PCI_HOST_SUBSYSTEM_VENDOR,
        .subsystem = PCI_HOST_SUBSYSTEM,
    };
    struct vga *vga = calloc(1, sizeof(*vga));

    if (!vga) {
        error_host(err, ENOMEM, "vga");
        return NULL;
    }
    vga->env = *env;
    pci_device_init(&vga->pci, "vga", &vga_ops, &vga_state, &identity);
    pci_config_allow32(&vga->pci, PCI_COMMAND, PCI_COMMAND_IO);
    pci_add_bar(&vga->pci, BAR_FRAMEBUFFER, PCI_BAR_MEM32_PREFETCH, VGA_MEMORY, &framebuffer_ops,
                vga);
    pci_add_bar(&vga->pci, BAR_REGISTERS, PCI_BAR_MEM32, REGISTERS_SIZE, &registers_ops, vga);
    if (cfg->rom)
        pci_add_rom(&vga->pci, cfg->rom, cfg->rom_size);
    power_on(vga);
    if (pci_host_add(host, &vga->pci, devfn, err) < 0 || add_ranges(vga, err) < 0) {
        vga_destroy(&vga->pci.dev);
        return NULL;
    }
    return vga;
}

struct device *vga_device(struct vga *vga)
{
    return &vga->pci.dev;
}
