/*
 * Bytes as a qcow2 image, which is opened, read, written, checked and mended. To get beyond the header the
 * input begins, unless its first byte says otherwise, where an empty image of 512-byte clusters has its own.
 * What an image may never do: crash, read beyond a buffer, grow without bounds.
 */
#define _GNU_SOURCE /* memfd_create */

#include "block/disk.h"
#include "host/log.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define IMAGE_MAX KIB(256)

static void use(struct disk *d, const uint8_t *data, size_t size)
{
    static u8 buf[KIB(64)];
    struct disk_check result;
    struct error err;

    for (unsigned i = 0; i + 4 <= MIN(size, 64U) && d->size; i += 4) {
        u64 at = ((u64)data[i + 1] << 8 | data[i + 2]) * 512 % d->size;
        u64 len = MIN(d->size - at, (1ULL + data[i + 3] % 64) * 512), end = at + len;
        enum disk_status status;

        switch (data[i] % 6) {
        case 0:
            disk_read(d, at, buf, len);
            break;
        case 1:
            disk_write(d, at, buf, len);
            break;
        case 2:
            d->ops->zero(d, at, len, data[i] & 8);
            break;
        case 3:
            d->ops->discard(d, at, len);
            break;
        case 4:
            d->ops->flush(d);
            break;
        case 5:
            d->ops->status(d, at, &end, &status);
            break;
        }
    }
    d->ops->check(d, data[0] & 1, &result, &err);
}

static void build(int fd, const uint8_t *data, size_t size)
{
    struct disk_create c = {.format = "qcow2", .size = KIB(512), .cluster_size = 512};
    struct block_file file = {.fd = fd, .path = "fuzz"};
    struct error err;
    u8 image[6 * 512];

    if (size < 2 || data[0] & 0x80) {
        file_write(&file, 0, data, size);
        return;
    }
    c.version = data[0] & 2 ? 2 : 3;
    qcow2_create(&file, &c, &err);
    file_read(&file, 0, image, sizeof(image));
    for (size_t i = 1; i + 3 <= size; i += 3) /* places and bytes */
        image[((size_t)data[i] << 8 | data[i + 1]) % sizeof(image)] = data[i + 2];
    file_write(&file, 0, image, sizeof(image));
    file_write(&file, 2 * KIB(64) - 1, "", 1); /* room for entries to point at */
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct disk_options options = {
        .format = "qcow2", .repair = size && data[0] & 1, .no_backing = true};
    int fd = memfd_create("qcow2", MFD_CLOEXEC);
    struct error err;
    struct disk *d;
    struct stat st;
    char path[32];

    log_set_level((enum log_level) - 1);
    if (fd < 0 || size > IMAGE_MAX)
        goto out;
    build(fd, data, size);
    snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
    d = disk_open(path, &options, &err);
    if (!d)
        goto out;
    use(d, data, size);
    disk_close(d);
    if (fstat(fd, &st) < 0 || st.st_size > (off_t)MIB(256))
        abort();
out:
    if (fd >= 0)
        close(fd);
    return 0;
}
