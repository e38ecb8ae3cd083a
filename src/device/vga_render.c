/*
 * What a VGA's screen shows, as pixels and as text.
 *
 * Characters are drawn with the font that the guest has put into plane 2. What blinks is shown, the cursor too.
 */
#include "device/vga_internal.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define MAX_WIDTH 2560
#define MAX_HEIGHT 2048
#define FONT_HEIGHT 32 /* bytes that each character of a font takes in plane 2 */

struct text_mode {
    unsigned columns, rows, char_width, char_height;
    u32 start, pitch; /* in characters */
    u32 cursor;
};

static unsigned display_lines(const struct vga *vga)
{
    u8 overflow = vga->cr[CR_OVERFLOW];

    return (vga->cr[CR_V_DISPLAY_END] | (overflow & 0x02) << 7 | (overflow & 0x40) << 3) + 1;
}

static u32 start_address(const struct vga *vga)
{
    return vga->cr[CR_START_HIGH] << 8 | vga->cr[CR_START_LOW];
}

static bool is_text(const struct vga *vga)
{
    return !vga_vbe_enabled(vga) && !(vga->gr[GR_MISC] & GR_MISC_GRAPHICS);
}

static void get_text_mode(const struct vga *vga, struct text_mode *t)
{
    t->char_height = (vga->cr[CR_MAX_SCAN_LINE] & 0x1f) + 1;
    t->char_width = vga->sr[SR_CLOCK] & SR_CLOCK_8_DOTS ? 8 : 9;
    t->columns = vga->cr[CR_H_DISPLAY_END] + 1;
    t->rows = MAX(1, display_lines(vga) / t->char_height);
    t->start = start_address(vga);
    t->pitch = vga->cr[CR_OFFSET] * 2U;
    t->cursor = vga->cr[CR_CURSOR_HIGH] << 8 | vga->cr[CR_CURSOR_LOW];
}

static const u8 *cell_at(const struct vga *vga, u32 n)
{
    return &vga->memory[4 * (n & 0xffff)];
}

/* A colour of the DAC; its parts have 6 bits, or 8 by VBE. */
static u32 dac_color(const struct vga *vga, u8 index)
{
    const u8 *c = vga->palette[index & vga->pel_mask];
    bool wide = vga->vbe[VBE_ENABLE] & VBE_8BIT_DAC;
    u32 rgb = 0;

    for (unsigned i = 0; i < 3; i++)
        rgb = rgb << 8 | (wide ? c[i] : (u32)(c[i] << 2 | c[i] >> 4));
    return rgb;
}

/* One of the attribute controller's 16 colours. */
static u32 attribute_color(const struct vga *vga, unsigned index)
{
    u8 color = vga->ar[index & vga->ar[AR_PLANE_ENABLE] & 15];
    u8 select = vga->ar[AR_COLOR_SELECT];

    if (vga->ar[AR_MODE] & AR_MODE_P54_SELECT)
        color = (color & 0x0f) | (select & 3) << 4;
    return dac_color(vga, (color & 0x3f) | (select & 0x0c) << 4);
}

/* ---- text ---- */

/* Where in plane 2 the two fonts lie that attribute bit 3 chooses from. */
static u32 font_offset(const struct vga *vga, bool second)
{
    u8 map = vga->sr[SR_FONT];
    unsigned n = second ? (map >> 2 & 3) | (map >> 3 & 4) : (map & 3) | (map >> 2 & 4);

    return (n & 3) * 0x4000 + (n >> 2) * 0x2000;
}

static void draw_cell(const struct vga *vga, const struct text_mode *t, const u8 *cell, bool cursor,
                      u32 *out, unsigned stride)
{
    u8 c = cell[0], attribute = cell[1];
    const u8 *font = &vga->memory[4 * (font_offset(vga, !(attribute & 8)) + c * FONT_HEIGHT) + 2];
    unsigned back_mask = vga->ar[AR_MODE] & AR_MODE_BLINK ? 7 : 15;
    u32 fore = attribute_color(vga, attribute & 15);
    u32 back = attribute_color(vga, attribute >> 4 & back_mask);
    unsigned first = vga->cr[CR_CURSOR_START] & 0x1f, last = vga->cr[CR_CURSOR_END] & 0x1f;

    for (unsigned y = 0; y < t->char_height; y++) {
        unsigned bits = font[4 * y] << 1;

        /* The ninth dot of line-drawing characters repeats the eighth. */
        if (c >= 0xc0 && c <= 0xdf && (vga->ar[AR_MODE] & AR_MODE_LINE_GRAPHICS))
            bits |= bits >> 1 & 1;
        if (cursor && y >= first && y <= last)
            bits = 0x1ff;
        for (unsigned x = 0; x < t->char_width; x++)
            out[y * stride + x] = bits >> (8 - x) & 1 ? fore : back;
    }
}

static void draw_text(const struct vga *vga, const struct vga_image *image)
{
    struct text_mode t;
    bool cursor = !(vga->cr[CR_CURSOR_START] & CR_CURSOR_OFF);

    get_text_mode(vga, &t);
    for (unsigned row = 0; row < t.rows; row++) {
        for (unsigned column = 0; column < t.columns; column++) {
            u32 n = t.start + row * t.pitch + column;

            draw_cell(vga, &t, cell_at(vga, n), cursor && n == t.cursor,
                      image->pixels + (size_t)row * t.char_height * image->width +
                          (size_t)column * t.char_width,
                      image->width);
        }
    }
}

/* ---- graphics ---- */

/* Four planes, a bit each: the 16-colour modes. Two bits of planes 0 and 1 in turn: CGA's. */
static u32 planar_pixel(const struct vga *vga, u32 word, unsigned x, bool cga)
{
    unsigned color = 0;

    if (cga) {
        u8 byte = x & 4 ? word >> 8 : word;

        return attribute_color(vga, byte >> (6 - 2 * (x & 3)) & 3);
    }
    for (unsigned plane = 0; plane < 4; plane++)
        color |= (word >> (8 * plane + 7 - (x & 7)) & 1) << plane;
    return attribute_color(vga, color);
}

static void draw_planar(const struct vga *vga, const struct vga_image *image, unsigned repeat)
{
    unsigned shift = vga->gr[GR_MODE] >> GR_MODE_SHIFT & 3;
    u32 start = start_address(vga), pitch = vga->cr[CR_OFFSET] * 2U;

    for (unsigned y = 0; y < image->height; y++) {
        unsigned line = y / repeat;
        u32 at = start + line * pitch;

        if (!(vga->cr[CR_MODE] & 1)) /* CGA's odd lines are 8 KiB further on */
            at = start + (line >> 1) * pitch + (line & 1) * 0x2000;
        for (unsigned x = 0; x < image->width; x++) {
            u32 word;
            u32 n = shift >= 2 ? at + x / 4 : at + x / 8;

            memcpy(&word, &vga->memory[4 * (size_t)(n & 0xffff)], sizeof(word));
            image->pixels[(size_t)y * image->width + x] =
                shift >= 2 ? dac_color(vga, word >> 8 * (x & 3))
                           : planar_pixel(vga, word, x, shift == 1);
        }
    }
}

static u32 expand(u32 value, unsigned bits)
{
    return value << (8 - bits) | value >> (2 * bits - 8);
}

/* In 32 bits, which is what a system of today draws in. */
static void draw_line_32(const u8 *from, u32 *to, unsigned width)
{
    for (unsigned x = 0; x < width; x++) {
        u32 v;

        memcpy(&v, from + 4 * (size_t)x, sizeof(v));
        to[x] = v & 0xffffff;
    }
}

static u32 linear_pixel(const struct vga *vga, u64 at, u16 bpp)
{
    u32 v = 0;

    memcpy(&v, vga->memory + at, bpp == 15 ? 2 : bpp / 8);
    switch (bpp) {
    case 8:
        return dac_color(vga, (u8)v);
    case 15:
        return expand(v >> 10 & 31, 5) << 16 | expand(v >> 5 & 31, 5) << 8 | expand(v & 31, 5);
    case 16:
        return expand(v >> 11 & 31, 5) << 16 | expand(v >> 5 & 63, 6) << 8 | expand(v & 31, 5);
    default:
        return v & 0xffffff;
    }
}

/* vbe_fix sees to it that all of it lies within the memory. */
static void draw_linear(const struct vga *vga, const struct vga_image *image)
{
    u16 bpp = vga->vbe[VBE_BPP];
    unsigned bytes = bpp == 15 ? 2 : bpp / 8;

    for (unsigned y = 0; y < image->height; y++) {
        u64 line =
            (u64)(vga->vbe[VBE_Y_OFFSET] + y) * vga->vbe[VBE_VIRT_WIDTH] + vga->vbe[VBE_X_OFFSET];

        u32 *out = image->pixels + (size_t)y * image->width;

        if (bpp == 32) {
            draw_line_32(vga->memory + line * bytes, out, image->width);
            continue;
        }
        for (unsigned x = 0; x < image->width; x++)
            out[x] = linear_pixel(vga, (line + x) * bytes, bpp);
    }
}

/* ---- the whole ---- */

static void get_size(const struct vga *vga, struct vga_image *image)
{
    unsigned shift = vga->gr[GR_MODE] >> GR_MODE_SHIFT & 3;
    struct text_mode t;

    if (vga_vbe_enabled(vga)) {
        image->width = vga->vbe[VBE_XRES];
        image->height = vga->vbe[VBE_YRES];
    } else if (is_text(vga)) {
        get_text_mode(vga, &t);
        image->width = t.columns * t.char_width;
        image->height = t.rows * t.char_height;
    } else {
        image->width = (vga->cr[CR_H_DISPLAY_END] + 1U) * (shift >= 2 ? 4 : 8);
        image->height = display_lines(vga);
    }
    image->width = MIN(image->width, MAX_WIDTH);
    image->height = MIN(image->height, MAX_HEIGHT);
}

static void draw(const struct vga *vga, const struct vga_image *image)
{
    unsigned repeat = (vga->cr[CR_MAX_SCAN_LINE] & 0x1f) + 1;

    if (vga_vbe_enabled(vga)) {
        draw_linear(vga, image);
        return;
    }
    if (!(vga->ar_index & AR_INDEX_SCREEN_ON) || (vga->sr[SR_CLOCK] & SR_CLOCK_SCREEN_OFF))
        return;
    if (is_text(vga))
        draw_text(vga, image);
    else
        draw_planar(vga, image, vga->cr[CR_MAX_SCAN_LINE] & CR_MAX_SCAN_DOUBLE ? 2 : repeat);
}

/* Its lock, ranges and bus aren't used: it is no device, only the registers and the memory of one. */
struct vga_view {
    struct vga vga;
    bool filled;
};

struct vga_view *vga_view_create(struct error *err)
{
    struct vga_view *view =
        calloc(1, sizeof(*view)); /* untouched pages of its 8 MiB cost nothing */

    if (!view)
        error_host(err, ENOMEM, "a picture of the screen");
    return view;
}

void vga_view_destroy(struct vga_view *view)
{
    free(view);
}

/* Video memory that can be seen: planes have 64 KiB each; vbe_fix keeps linear memory within its bounds. */
static void seen_memory(const struct vga *vga, size_t *from, size_t *len)
{
    size_t line = vga_vbe_bytes_per_line(vga->vbe[VBE_VIRT_WIDTH], vga->vbe[VBE_BPP]);

    *from = 0;
    *len = 4 * KIB(64);
    if (vga_vbe_enabled(vga)) {
        *from = line * vga->vbe[VBE_Y_OFFSET];
        *len = line * vga->vbe[VBE_YRES];
    }
}

bool vga_view_update(struct vga_view *view, struct vga *vga)
{
    const size_t registers = offsetof(struct vga, misc);
    bool changed;
    size_t from, len;

    device_lock(&vga->pci.dev);
    changed = !view->filled || view->vga.changes != vga->changes;
    if (changed) {
        memcpy((u8 *)&view->vga + registers, (u8 *)vga + registers,
               offsetof(struct vga, memory) - registers);
        seen_memory(vga, &from, &len);
        memcpy(view->vga.memory + from, vga->memory + from, len);
        view->vga.changes = vga->changes;
        view->filled = true;
    }
    device_unlock(&vga->pci.dev);
    return changed;
}

int vga_view_render(const struct vga_view *view, struct vga_image *image, struct error *err)
{
    struct vga_image next;
    size_t pixels;

    get_size(&view->vga, &next);
    pixels = (size_t)next.width * next.height;
    if (image->pixels && next.width == image->width && next.height == image->height) {
        memset(image->pixels, 0, pixels * sizeof(image->pixels[0]));
    } else {
        next.pixels = calloc(pixels, sizeof(next.pixels[0]));
        vga_image_free(image);
        if (!next.pixels)
            return error_host(err, ENOMEM, "a picture of the screen");
        *image = next;
    }
    draw(&view->vga, image);
    return 0;
}

int vga_render(struct vga *vga, struct vga_image *image, struct error *err)
{
    struct vga_view *view = vga_view_create(err);
    int ret;

    *image = (struct vga_image){0};
    if (!view)
        return -ENOMEM;
    vga_view_update(view, vga);
    ret = vga_view_render(view, image, err);
    vga_view_destroy(view);
    return ret;
}

void vga_image_free(struct vga_image *image)
{
    free(image->pixels);
    *image = (struct vga_image){0};
}

/* Code page 437, which a PC's fonts have: what isn't ASCII. */
static const u16 cp437_low[32] = {
    0x0020, 0x263a, 0x263b, 0x2665, 0x2666, 0x2663, 0x2660, 0x2022, 0x25d8, 0x25cb, 0x25d9,
    0x2642, 0x2640, 0x266a, 0x266b, 0x263c, 0x25ba, 0x25c4, 0x2195, 0x203c, 0x00b6, 0x00a7,
    0x25ac, 0x21a8, 0x2191, 0x2193, 0x2192, 0x2190, 0x221f, 0x2194, 0x25b2, 0x25bc,
};
static const u16 cp437_high[129] = {
    0x2302, 0x00c7, 0x00fc, 0x00e9, 0x00e2, 0x00e4, 0x00e0, 0x00e5, 0x00e7, 0x00ea, 0x00eb, 0x00e8,
    0x00ef, 0x00ee, 0x00ec, 0x00c4, 0x00c5, 0x00c9, 0x00e6, 0x00c6, 0x00f4, 0x00f6, 0x00f2, 0x00fb,
    0x00f9, 0x00ff, 0x00d6, 0x00dc, 0x00a2, 0x00a3, 0x00a5, 0x20a7, 0x0192, 0x00e1, 0x00ed, 0x00f3,
    0x00fa, 0x00f1, 0x00d1, 0x00aa, 0x00ba, 0x00bf, 0x2310, 0x00ac, 0x00bd, 0x00bc, 0x00a1, 0x00ab,
    0x00bb, 0x2591, 0x2592, 0x2593, 0x2502, 0x2524, 0x2561, 0x2562, 0x2556, 0x2555, 0x2563, 0x2551,
    0x2557, 0x255d, 0x255c, 0x255b, 0x2510, 0x2514, 0x2534, 0x252c, 0x251c, 0x2500, 0x253c, 0x255e,
    0x255f, 0x255a, 0x2554, 0x2569, 0x2566, 0x2560, 0x2550, 0x256c, 0x2567, 0x2568, 0x2564, 0x2565,
    0x2559, 0x2558, 0x2552, 0x2553, 0x256b, 0x256a, 0x2518, 0x250c, 0x2588, 0x2584, 0x258c, 0x2590,
    0x2580, 0x03b1, 0x00df, 0x0393, 0x03c0, 0x03a3, 0x03c3, 0x00b5, 0x03c4, 0x03a6, 0x0398, 0x03a9,
    0x03b4, 0x221e, 0x03c6, 0x03b5, 0x2229, 0x2261, 0x00b1, 0x2265, 0x2264, 0x2320, 0x2321, 0x00f7,
    0x2248, 0x00b0, 0x2219, 0x00b7, 0x221a, 0x207f, 0x00b2, 0x25a0, 0x00a0,
};

static char *put_utf8(char *out, u8 c)
{
    unsigned code = c < 32 ? cp437_low[c] : c < 127 ? c : cp437_high[c - 127];

    if (code < 0x80) {
        *out++ = (char)code;
    } else if (code < 0x800) {
        *out++ = (char)(0xc0 | code >> 6);
        *out++ = (char)(0x80 | (code & 63));
    } else {
        *out++ = (char)(0xe0 | code >> 12);
        *out++ = (char)(0x80 | (code >> 6 & 63));
        *out++ = (char)(0x80 | (code & 63));
    }
    return out;
}

static char *put_row(const struct vga *vga, const struct text_mode *t, unsigned row, char *out)
{
    char *end = out;

    for (unsigned column = 0; column < t->columns; column++) {
        u8 c = cell_at(vga, t->start + row * t->pitch + column)[0];

        out = put_utf8(out, c);
        if (c && c != ' ')
            end = out;
    }
    *end++ = '\n';
    return end;
}

char *vga_text(struct vga *vga, struct error *err)
{
    struct text_mode t = {0};
    char *text, *out;

    device_lock(&vga->pci.dev);
    if (is_text(vga))
        get_text_mode(vga, &t);
    text = out = malloc((size_t)t.rows * (3 * t.columns + 1) + 1);
    for (unsigned row = 0; text && row < t.rows; row++)
        out = put_row(vga, &t, row, out);
    device_unlock(&vga->pci.dev);
    if (!text)
        error_host(err, ENOMEM, "the text on the screen");
    else
        *out = '\0';
    return text;
}
