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

/* What the screen shows: width * height pixels of 0xRRGGBB, row by row. */
struct vga_image {
    unsigned width, height;
    u32 *pixels; /* owned */
};
/* Any thread. 0, or -ENOMEM with err set. A screen that is off is black, in the size that it has. */
int vga_render(struct vga *vga, struct vga_image *image, struct error *err);
void vga_image_free(struct vga_image *image);

/*
 * The text on the screen as UTF-8, a line each row, without trailing spaces: malloc'd, empty in a graphics mode. NULL
 * with err set when memory is short. Any thread.
 */
char *vga_text(struct vga *vga, struct error *err);

#endif
