#include "machine/firmware.h"

#include "machine/image.h"
#include "machine/layout.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define BIOS_PATH "/usr/share/seabios/bios-256k.bin"
#define VGA_BIOS_PATH "/usr/share/seabios/vgabios-stdvga.bin"
#define VGA_BIOS_MAX KIB(128)

/* A file of up to max bytes, in whole units: *data is to be freed. */
static int read_image(const char *path, u64 max, u64 unit, u8 **data, u64 *size, struct error *err)
{
    struct image img;
    int ret = image_open(&img, path, err);

    if (ret)
        return ret;
    if (!img.size || img.size > max || img.size % unit) {
        ret = error_input(err,
                          "'%s' has %llu bytes, which no firmware image has: give one of a "
                          "multiple of %llu, up to %llu KiB",
                          path, (unsigned long long)img.size, (unsigned long long)unit,
                          (unsigned long long)(max >> 10));
        goto out;
    }
    *data = malloc(img.size);
    *size = img.size;
    if (*data)
        ret = image_read(&img, 0, *data, img.size, err);
    else
        ret = error_host(err, ENOMEM, "firmware '%s'", path);
out:
    image_close(&img);
    return ret;
}

static int check_package(const char *path, const char *package, struct error *err)
{
    if (access(path, F_OK) == 0)
        return 0;
    return error_input(err, "'%s' is missing: install the package %s, or give a file", path,
                       package);
}

/* Firmware that has no need of it, or brings its own, runs without the package. */
static int read_vga_rom(struct firmware *fw, struct error *err)
{
    u64 size;
    int ret;

    if (access(VGA_BIOS_PATH, F_OK))
        return 0;
    ret = read_image(VGA_BIOS_PATH, VGA_BIOS_MAX, 512, &fw->vga_rom, &size, err);
    if (!ret)
        fw->vga_rom_size = (u32)size;
    return ret;
}

int firmware_open(struct firmware *fw, const struct firmware_config *config, struct error *err)
{
    const char *path = config->what;
    int ret = 0;

    *fw = (struct firmware){.cdrom_first = config->cdrom_first};
    if (!strcmp(path, "bios")) {
        path = BIOS_PATH;
        ret = check_package(path, "seabios", err);
    }
    if (!ret)
        ret = read_image(path, LAYOUT_ROM_MAX, GUEST_PAGE_SIZE, &fw->rom, &fw->rom_size, err);
    if (!ret)
        ret = read_vga_rom(fw, err);
    return ret;
}

void firmware_close(struct firmware *fw)
{
    acpi_free_blobs(&fw->acpi);
    free(fw->rom);
    free(fw->vga_rom);
    free(fw->boot_order);
    fw->boot_order = NULL;
    fw->rom = fw->vga_rom = NULL;
}

static int add_blob(struct fw_cfg *cfg, const char *name, const struct acpi_blob *blob,
                    struct error *err)
{
    return fw_cfg_add_file(cfg, name, blob->data, blob->len, FW_CFG_BORROW, err);
}

int firmware_add_files(struct firmware *fw, struct fw_cfg *cfg, const struct e820_map *e820,
                       const struct acpi_config *acpi, struct error *err)
{
    int ret = acpi_build_blobs(acpi, &fw->acpi, err);

    for (unsigned i = 0; i < e820->count; i++) {
        const struct e820_entry *e = &e820->entries[i];

        fw->e820[i] = (struct firmware_e820){e->base, e->size, e->type};
    }
    if (!ret)
        ret = fw_cfg_add_file(cfg, "etc/e820", fw->e820, e820->count * sizeof(fw->e820[0]),
                              FW_CFG_BORROW, err);
    if (!ret)
        ret = add_blob(cfg, ACPI_TABLES_FILE, &fw->acpi.tables, err);
    if (!ret)
        ret = add_blob(cfg, ACPI_RSDP_FILE, &fw->acpi.rsdp, err);
    if (!ret)
        ret = add_blob(cfg, ACPI_LOADER_FILE, &fw->acpi.loader, err);
    return ret;
}

int firmware_add_boot_order(struct firmware *fw, struct fw_cfg *cfg,
                            const struct firmware_boot_device *devices, unsigned n,
                            struct error *err)
{
    size_t len = 0;

    if (!n)
        return 0;
    fw->boot_order = calloc(n, FIRMWARE_PATH_MAX + 1);
    if (!fw->boot_order)
        return error_host(err, ENOMEM, "the boot order");
    for (unsigned pass = 0; pass < 2; pass++) {
        for (unsigned i = 0; i < n; i++) {
            if (devices[i].cdrom == ((pass == 0) == fw->cdrom_first))
                len += (size_t)sprintf(fw->boot_order + len, "%s\n", devices[i].path);
        }
    }
    return fw_cfg_add_file(cfg, "bootorder", fw->boot_order, (u32)len + 1, FW_CFG_BORROW, err);
}
