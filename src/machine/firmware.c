#include "machine/firmware.h"

#include "machine/image.h"
#include "machine/layout.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define BIOS_PATH "/usr/share/seabios/bios-256k.bin"

static int read_rom(struct firmware *fw, const char *path, struct error *err)
{
    struct image img;
    int ret = image_open(&img, path, err);

    if (ret)
        return ret;
    if (!img.size || img.size > LAYOUT_ROM_MAX || img.size % GUEST_PAGE_SIZE) {
        ret = error_input(err,
                          "'%s' has %llu bytes, which no firmware image has: give one of whole "
                          "4 KiB, up to %llu MiB",
                          path, (unsigned long long)img.size,
                          (unsigned long long)(LAYOUT_ROM_MAX >> 20));
        goto out;
    }
    fw->rom = malloc(img.size);
    fw->rom_size = img.size;
    if (fw->rom)
        ret = image_read(&img, 0, fw->rom, img.size, err);
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

int firmware_open(struct firmware *fw, const struct firmware_config *config, struct error *err)
{
    const char *path = config->what;
    int ret = 0;

    *fw = (struct firmware){0};
    if (!strcmp(path, "bios")) {
        path = BIOS_PATH;
        ret = check_package(path, "seabios", err);
    }
    if (!ret)
        ret = read_rom(fw, path, err);
    return ret;
}

void firmware_close(struct firmware *fw)
{
    acpi_free_blobs(&fw->acpi);
    free(fw->rom);
    fw->rom = NULL;
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
