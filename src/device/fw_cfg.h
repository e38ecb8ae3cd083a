/*
 * fw_cfg: named blobs that the machine hands to firmware and guests (QEMU, docs/specs/fw_cfg), by a
 * selector and a data port, or by DMA.
 */
#ifndef DOPPEL_DEVICE_FW_CFG_H
#define DOPPEL_DEVICE_FW_CFG_H

#include "device/device.h"

#define FW_CFG_PORTS 12 /* selector, data, and at offset 4 the DMA address */

/* Keys with a fixed meaning; more are in the specification. */
#define FW_CFG_SIGNATURE 0x00
#define FW_CFG_ID 0x01
#define FW_CFG_NB_CPUS 0x05
#define FW_CFG_KERNEL_SIZE 0x08
#define FW_CFG_INITRD_SIZE 0x0b
#define FW_CFG_MAX_CPUS 0x0f
#define FW_CFG_KERNEL_DATA 0x11
#define FW_CFG_INITRD_DATA 0x12
#define FW_CFG_CMDLINE_SIZE 0x14
#define FW_CFG_CMDLINE_DATA 0x15
#define FW_CFG_SETUP_SIZE 0x17
#define FW_CFG_SETUP_DATA 0x18
#define FW_CFG_FILE_DIR 0x19
#define FW_CFG_FILE_FIRST 0x20

#define FW_CFG_MAX_FILES 64
#define FW_CFG_MAX_NAME 55

enum fw_cfg_owner {
    FW_CFG_COPY,     /* the device keeps a copy of its own */
    FW_CFG_BORROW,   /* the caller's data must stay, unchanged, as long as the device lives */
    FW_CFG_WRITABLE, /* as borrowed, but guests may write it by DMA: the caller saves its state */
};

struct fw_cfg;

struct fw_cfg_config {
    u16 port;
};

/*
 * With signature, ID, and an empty directory. NULL with err set: the ports are taken, or no memory.
 */
struct fw_cfg *fw_cfg_create(const struct device_env *env, const struct fw_cfg_config *cfg,
                             struct error *err);
struct device *fw_cfg_device(struct fw_cfg *fw);

/*
 * Items are added while the board is built, before the guest runs. A key or name that is there
 * already is a bug of the board. fw_cfg_add_key: key < FW_CFG_FILE_FIRST. fw_cfg_add_file: the name
 * is a path like "etc/table-loader". Both return 0 or -errno with err set (no memory, too many
 * files, name too long).
 */
int fw_cfg_add_key(struct fw_cfg *fw, u16 key, void *data, u32 len, enum fw_cfg_owner owner,
                   struct error *err);
int fw_cfg_add_file(struct fw_cfg *fw, const char *name, void *data, u32 len,
                    enum fw_cfg_owner owner, struct error *err);
/* Numeric items, stored little-endian. */
int fw_cfg_add_u16(struct fw_cfg *fw, u16 key, u16 value, struct error *err);
int fw_cfg_add_u32(struct fw_cfg *fw, u16 key, u32 value, struct error *err);

#endif
