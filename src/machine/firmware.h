/*
 * Firmware: its image, and what it is told.
 *
 * Debian's SeaBIOS and OVMF run as they are: the image is a ROM that ends at 4 GiB, and the tables, the memory map and
 * the order of boot devices are files in fw_cfg.
 */
#ifndef DOPPEL_MACHINE_FIRMWARE_H
#define DOPPEL_MACHINE_FIRMWARE_H

#include "device/fw_cfg.h"
#include "machine/acpi.h"
#include "machine/firmware_kernel.h"
#include "machine/loader.h"
#include "machine/smbios.h"

/* What it may boot from. */
enum firmware_boot { FIRMWARE_BOOT_DISK, FIRMWARE_BOOT_CDROM, FIRMWARE_BOOT_NETWORK };

/* What the user asked for. Strings are borrowed. */
struct firmware_config {
    const char *what; /* "bios", "uefi" or a file; NULL: none, a direct boot */
    /* The file of UEFI's variables, made when it isn't there; NULL: forgotten at the end. */
    const char *vars;
    /* What uefi boots, before any disk; kernel is NULL: nothing. cmdline is not, with a kernel. */
    const char *kernel, *initrd, *cmdline;
    enum firmware_boot boot_first; /* disks come next; networks, only when they come first */
    const char *product, *serial;  /* for SMBIOS, as in struct smbios_config */
    u8 uuid[16];
    bool has_uuid;
};

#define FIRMWARE_PATH_MAX 64

struct firmware {
    enum firmware_boot boot_first;
    char *boot_order;                   /* owned */
    struct smbios_config smbios_config; /* memory and cpus are filled in by who knows them */
    struct smbios smbios;
    u8 *rom; /* owned */
    u64 rom_size;
    u8 *vars; /* owned; NULL: none. They lie below the ROM */
    u64 vars_size;
    int vars_fd; /* -1: no file */
    u8 *vga_rom; /* owned; NULL: none */
    u32 vga_rom_size;
    u8 *net_rom; /* owned; NULL: none. It is for virtio-net */
    u32 net_rom_size;
    struct firmware_kernel kernel;
    struct acpi_blobs acpi; /* lent to fw_cfg, as the map is */
    struct firmware_e820 {
        u64 base, size;
        u32 type;
    } __attribute__((packed)) e820[E820_MAX];
};

/* Reads the image. ERROR_INPUT names the file, and the package where it is missing. */
int firmware_open(struct firmware *fw, const struct firmware_config *config, struct error *err);
void firmware_close(struct firmware *fw);

/* Makes the files that all firmware reads. The firmware must outlive fw_cfg. */
int firmware_add_files(struct firmware *fw, struct fw_cfg *cfg, const struct e820_map *e820,
                       const struct acpi_config *acpi, struct error *err);

/* What firmware may boot from, best first: Open Firmware's path, as the firmware forms it itself. */
struct firmware_boot_device {
    const char *path;
    enum firmware_boot kind;
};
int firmware_add_boot_order(struct firmware *fw, struct fw_cfg *cfg,
                            const struct firmware_boot_device *devices, unsigned n,
                            struct error *err);

#endif
