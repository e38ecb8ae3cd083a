/*
 * A kernel for firmware to boot: OVMF finds it in fw_cfg, as QEMU puts it there (OVMF,
 * QemuKernelLoaderFsDxe; QEMU, hw/i386/x86-common.c), and starts it before it looks at any disk.
 */
#ifndef DOPPEL_MACHINE_FIRMWARE_KERNEL_H
#define DOPPEL_MACHINE_FIRMWARE_KERNEL_H

#include "device/fw_cfg.h"

struct firmware_kernel {
    u8 *kernel; /* owned; NULL: none */
    u64 kernel_size;
    u32 setup_size; /* the real-mode part at its start */
    u8 *initrd;     /* owned; NULL: none */
    u64 initrd_size;
    const char *cmdline; /* borrowed */
};

/*
 * Reads a Linux bzImage, and an initrd unless that is NULL. ERROR_INPUT names the file that is missing, too large or
 * no such kernel. Close it in any case.
 */
int firmware_kernel_open(struct firmware_kernel *k, const char *kernel, const char *initrd,
                         const char *cmdline, struct error *err);
void firmware_kernel_close(struct firmware_kernel *k);

/* Lends it to fw_cfg, which it must outlive. Nothing, when none was opened. */
int firmware_kernel_add(const struct firmware_kernel *k, struct fw_cfg *cfg, struct error *err);

#endif
