#define _GNU_SOURCE /* F_OFD_SETLK */
#include "machine/firmware.h"

#include "device/pflash.h"
#include "device/virtio/virtio.h"
#include "machine/image.h"
#include "machine/layout.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define BIOS_PATH "/usr/share/seabios/bios-256k.bin"
#define UEFI_CODE_PATH "/usr/share/OVMF/OVMF_CODE_4M.fd" /* the build without SMM */
#define UEFI_VARS_PATH "/usr/share/OVMF/OVMF_VARS_4M.fd"
#define VGA_BIOS_PATH "/usr/share/seabios/vgabios-stdvga.bin"
#define VGA_BIOS_MAX KIB(128)
#define NET_BOOT_PATH "/usr/lib/ipxe/qemu/pxe-virtio.rom"
#define NET_BOOT_MAX KIB(512)

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
    *size = img.size;
    ret = image_read_all(&img, data, err);
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

/* ---- the card's ROM: iPXE, which boots from networks under BIOS; UEFI brings what it needs ---- */

/* The header of an expansion ROM (PCI Firmware 3.0, 5.1.1 and 5.1.2). */
#define ROM_SIGNATURE 0xaa55
#define ROM_UNITS 2      /* length, in units of 512 bytes */
#define ROM_CHECKSUM 6   /* where iPXE has the byte that makes the sum 0 */
#define ROM_PCIR 0x18    /* offset of the PCI data structure */
#define PCIR_DEVICE 6    /* from there */
#define PCIR_LENGTH 0x18 /* of the part that counts here */

static u16 rom_get16(const u8 *rom, u32 at)
{
    return (u16)(rom[at] | rom[at + 1] << 8);
}

/*
 * A BIOS runs a ROM only if it is for the device's ID. iPXE's is for the virtio-net of before VIRTIO 1.0; the driver in it
 * knows both.
 */
static int address_rom(u8 *rom, u32 size, u16 device, struct error *err)
{
    u32 pcir = size > ROM_PCIR + 1 ? rom_get16(rom, ROM_PCIR) : 0;
    u8 *id = rom + pcir + PCIR_DEVICE, sum = 0;

    if (!pcir || rom_get16(rom, 0) != ROM_SIGNATURE || rom[ROM_UNITS] * 512u > size ||
        pcir + PCIR_LENGTH > size || memcmp(rom + pcir, "PCIR", 4) != 0)
        return error_input(err, "'%s' is no PCI expansion ROM: install the package ipxe-qemu",
                           NET_BOOT_PATH);
    id[0] = (u8)device;
    id[1] = (u8)(device >> 8);
    for (u32 i = 0; i < rom[ROM_UNITS] * 512u; i++)
        sum += rom[i];
    rom[ROM_CHECKSUM] -= sum;
    return 0;
}

static int read_net_rom(struct firmware *fw, struct error *err)
{
    int ret = check_package(NET_BOOT_PATH, "ipxe-qemu", err);
    u64 size = 0;

    if (!ret)
        ret = read_image(NET_BOOT_PATH, NET_BOOT_MAX, 512, &fw->net_rom, &size, err);
    if (!ret)
        ret = address_rom(fw->net_rom, (u32)size, VIRTIO_PCI_DEVICE + VIRTIO_TYPE_NET, err);
    fw->net_rom_size = (u32)size;
    return ret;
}

/* ---- UEFI's variables ---- */

/* Whoever has them open writes to them. */
static int lock_vars(int fd, const char *path, struct error *err)
{
    struct flock lock = {.l_type = F_WRLCK, .l_whence = SEEK_SET};

    if (fcntl(fd, F_OFD_SETLK, &lock) == 0)
        return 0;
    if (errno == EAGAIN || errno == EACCES)
        return error_input(
            err, "'%s' is in use by another machine: give uefi,vars=FILE, a file of its own", path);
    return error_host(err, errno, "'%s' can't be locked", path);
}

/* A new file gets what the template has. */
static int fill_vars(struct firmware *fw, const char *path, struct error *err)
{
    struct stat st;
    ssize_t n;

    if (fstat(fw->vars_fd, &st) < 0)
        return error_host(err, errno, "'%s'", path);
    if (st.st_size && (u64)st.st_size != fw->vars_size)
        return error_input(err,
                           "'%s' has %llu bytes, not %llu: it holds no variables of this firmware",
                           path, (unsigned long long)st.st_size, (unsigned long long)fw->vars_size);
    if (st.st_size)
        n = pread(fw->vars_fd, fw->vars, fw->vars_size, 0);
    else
        n = pwrite(fw->vars_fd, fw->vars, fw->vars_size, 0);
    if (n != (ssize_t)fw->vars_size)
        return error_host(err, n < 0 ? errno : EIO, "'%s'", path);
    return 0;
}

static int open_vars_file(struct firmware *fw, const char *path, struct error *err)
{
    int ret;

    fw->vars_fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    if (fw->vars_fd < 0)
        return error_input(err,
                           "'%s', for UEFI's variables: %s; give uefi,vars=FILE, or vars=none to "
                           "forget them",
                           path, strerror(errno));
    ret = lock_vars(fw->vars_fd, path, err);
    return ret ? ret : fill_vars(fw, path, err);
}

static int open_uefi(struct firmware *fw, const struct firmware_config *config, struct error *err)
{
    int ret = check_package(UEFI_CODE_PATH, "ovmf", err);

    if (!ret)
        ret = read_image(UEFI_CODE_PATH, LAYOUT_ROM_MAX, GUEST_PAGE_SIZE, &fw->rom, &fw->rom_size,
                         err);
    if (!ret)
        ret = read_image(UEFI_VARS_PATH, PFLASH_MAX, PFLASH_BLOCK, &fw->vars, &fw->vars_size, err);
    if (!ret && config->vars)
        ret = open_vars_file(fw, config->vars, err);
    return ret;
}

static int open_images(struct firmware *fw, const struct firmware_config *config, struct error *err)
{
    const char *path = config->what;
    int ret = 0;

    if (!strcmp(path, "uefi"))
        return open_uefi(fw, config, err);
    if (config->vars)
        return error_input(err, "vars= is for uefi only");
    if (!strcmp(path, "bios")) {
        if (config->kernel)
            return error_input(err, "bios boots no --kernel: give uefi, or leave --firmware out");
        path = BIOS_PATH;
        ret = check_package(path, "seabios", err);
    }
    if (!ret)
        ret = read_image(path, LAYOUT_ROM_MAX, GUEST_PAGE_SIZE, &fw->rom, &fw->rom_size, err);
    if (!ret)
        ret = read_vga_rom(fw, err);
    if (!ret && config->boot_first == FIRMWARE_BOOT_NETWORK)
        ret = read_net_rom(fw, err);
    return ret;
}

int firmware_open(struct firmware *fw, const struct firmware_config *config, struct error *err)
{
    int ret;

    *fw = (struct firmware){
        .boot_first = config->boot_first,
        .vars_fd = -1,
        .smbios_config = {.product = config->product,
                          .serial = config->serial,
                          .has_uuid = config->has_uuid},
    };
    memcpy(fw->smbios_config.uuid, config->uuid, sizeof(config->uuid));
    ret = open_images(fw, config, err);
    if (ret && err->class == ERROR_INPUT)
        error_prefix(err, "--firmware");
    if (!ret && config->kernel)
        ret =
            firmware_kernel_open(&fw->kernel, config->kernel, config->initrd, config->cmdline, err);
    return ret;
}

void firmware_close(struct firmware *fw)
{
    acpi_free_blobs(&fw->acpi);
    firmware_kernel_close(&fw->kernel);
    free(fw->rom);
    free(fw->vga_rom);
    free(fw->net_rom);
    free(fw->vars);
    free(fw->boot_order);
    if (fw->vars_fd >= 0)
        close(fw->vars_fd);
    fw->vars_fd = -1;
    fw->vars = NULL;
    fw->boot_order = NULL;
    fw->rom = fw->vga_rom = fw->net_rom = NULL;
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
    smbios_build(&fw->smbios, &fw->smbios_config);
    if (!ret)
        ret = fw_cfg_add_file(cfg, SMBIOS_TABLES_FILE, fw->smbios.tables, fw->smbios.len,
                              FW_CFG_BORROW, err);
    if (!ret)
        ret = fw_cfg_add_file(cfg, SMBIOS_ANCHOR_FILE, fw->smbios.anchor, SMBIOS_ANCHOR_SIZE,
                              FW_CFG_BORROW, err);
    return ret ? ret : firmware_kernel_add(&fw->kernel, cfg, err);
}

int firmware_add_boot_order(struct firmware *fw, struct fw_cfg *cfg,
                            const struct firmware_boot_device *devices, unsigned n,
                            struct error *err)
{
    const enum firmware_boot order[] = {fw->boot_first, FIRMWARE_BOOT_DISK, FIRMWARE_BOOT_CDROM};
    size_t len = 0;

    fw->boot_order = calloc(n + 1, FIRMWARE_PATH_MAX + 1);
    if (!fw->boot_order)
        return error_host(err, ENOMEM, "the boot order");
    for (unsigned pass = 0; pass < ARRAY_SIZE(order); pass++) {
        for (unsigned i = 0; i < n && (!pass || order[pass] != order[0]); i++) {
            if (devices[i].kind == order[pass])
                len +=
                    (size_t)sprintf(fw->boot_order + len, "%s%s", len ? "\n" : "", devices[i].path);
        }
    }
    return len ? fw_cfg_add_file(cfg, "bootorder", fw->boot_order, (u32)len + 1, FW_CFG_BORROW, err)
               : 0;
}
