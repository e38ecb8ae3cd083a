/*
 * A VGA with a linear frame buffer: the adapter that Bochs and QEMU ("-vga std") have, which firmware and systems
 * know as PCI 1234:1111. Text, planar and 256-colour modes by the VGA's registers; others by the VBE DISPI
 * interface at ports 0x1ce and 0x1cf.
 */
#ifndef DOPPEL_DEVICE_VGA_H
#define DOPPEL_DEVICE_VGA_H

#include "device/pci/host.h"

struct vga;

struct vga_config {
    const u8 *rom; /* the VGA BIOS, borrowed; NULL: none */
    u32 rom_size;
};

struct vga *vga_create(const struct device_env *env, const struct vga_config *cfg,
                       struct pci_host *host, u8 devfn, struct error *err);
struct device *vga_device(struct vga *vga);

/*
 * A copy of what the screen is made of. Pictures are made from it while the guest goes on: a vCPU that draws waits for
 * the copying only. Belongs to one thread at a time.
 */
struct vga_view;

/* NULL with err set when memory is short. An empty view, until its first update. */
struct vga_view *vga_view_create(struct error *err);
void vga_view_destroy(struct vga_view *view);
/* Copies, unless nothing has changed since the view's last update: then it returns false. */
bool vga_view_update(struct vga_view *view, struct vga *vga);

/* What the screen shows: width * height pixels of 0xRRGGBB, row by row. */
struct vga_image {
    unsigned width, height;
    u32 *pixels; /* owned */
};
/*
 * Draws what the view shows: *image is empty, or an earlier picture, whose memory serves again. 0, or -ENOMEM with err set and
 * the image empty. A screen that is off is black, in the size that it has.
 */
int vga_view_render(const struct vga_view *view, struct vga_image *image, struct error *err);
/* The same by a view of its own. Any thread. */
int vga_render(struct vga *vga, struct vga_image *image, struct error *err);
void vga_image_free(struct vga_image *image);

/*
 * The text on the screen as UTF-8, a line each row, without trailing spaces: malloc'd, empty in a graphics mode. NULL
 * with err set when memory is short. Any thread.
 */
char *vga_text(struct vga *vga, struct error *err);

#endif
