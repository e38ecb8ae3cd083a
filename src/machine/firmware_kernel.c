#include "machine/firmware_kernel.h"

#include "machine/image.h"
#include "machine/load.h"

#include <stdlib.h>
#include <string.h>

#define SECTOR 512U
#define SETUP_SECTS_OFFSET 0x1f1
#define SETUP_SECTS_DEFAULT 4 /* what 0 means (Linux, Documentation/arch/x86/boot.rst) */
#define SIZE_LIMIT GIB(4)     /* fw_cfg's sizes have 32 bits */

static int read_file(const char *path, u8 **data, u64 *size, struct error *err)
{
    struct image img;
    int ret = image_open(&img, path, err);

    if (ret)
        return ret;
    *size = img.size;
    if (img.size >= SIZE_LIMIT)
        ret = error_input(err, "'%s' has %llu MiB; firmware takes less than 4096", path,
                          load_mib(img.size));
    else
        ret = image_read_all(&img, data, err);
    image_close(&img);
    return ret;
}

static int read_kernel(struct firmware_kernel *k, const char *path, struct error *err)
{
    int ret = read_file(path, &k->kernel, &k->kernel_size, err);
    u8 sectors;

    if (ret)
        return ret;
    if (!linux_is_image(k->kernel, k->kernel_size))
        return error_input(err,
                           "'%s' is no Linux bzImage, and firmware boots no other kernel: leave "
                           "--firmware out",
                           path);
    sectors = k->kernel[SETUP_SECTS_OFFSET];
    k->setup_size = ((sectors ? sectors : SETUP_SECTS_DEFAULT) + 1U) * SECTOR;
    if (k->setup_size >= k->kernel_size)
        return error_input(err, "'%s' is truncated: it has %llu bytes; fetch it again", path,
                           (unsigned long long)k->kernel_size);
    return 0;
}

int firmware_kernel_open(struct firmware_kernel *k, const char *kernel, const char *initrd,
                         const char *cmdline, struct error *err)
{
    int ret;

    *k = (struct firmware_kernel){.cmdline = cmdline};
    ret = read_kernel(k, kernel, err);
    if (!ret && initrd)
        ret = read_file(initrd, &k->initrd, &k->initrd_size, err);
    return ret;
}

void firmware_kernel_close(struct firmware_kernel *k)
{
    free(k->kernel);
    free(k->initrd);
    *k = (struct firmware_kernel){0};
}

/* An item of data, and the one that has its size. */
static int add_part(struct fw_cfg *cfg, u16 size_key, u16 data_key, const void *data, u64 size,
                    struct error *err)
{
    int ret = fw_cfg_add_u32(cfg, size_key, (u32)size, err);

    return ret ? ret : fw_cfg_add_key(cfg, data_key, (void *)data, (u32)size, FW_CFG_BORROW, err);
}

int firmware_kernel_add(const struct firmware_kernel *k, struct fw_cfg *cfg, struct error *err)
{
    int ret;

    if (!k->kernel)
        return 0;
    ret = add_part(cfg, FW_CFG_SETUP_SIZE, FW_CFG_SETUP_DATA, k->kernel, k->setup_size, err);
    if (!ret)
        ret = add_part(cfg, FW_CFG_KERNEL_SIZE, FW_CFG_KERNEL_DATA, k->kernel + k->setup_size,
                       k->kernel_size - k->setup_size, err);
    if (!ret && k->initrd)
        ret = add_part(cfg, FW_CFG_INITRD_SIZE, FW_CFG_INITRD_DATA, k->initrd, k->initrd_size, err);
    if (!ret)
        ret = add_part(cfg, FW_CFG_CMDLINE_SIZE, FW_CFG_CMDLINE_DATA, k->cmdline,
                       strlen(k->cmdline) + 1, err);
    return ret;
}
