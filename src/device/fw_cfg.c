/*
 * fw_cfg.
 *
 * Items are numbered by key; those from FW_CFG_FILE_FIRST on are files, which the directory (an
 * item itself) lists by name. The guest selects a key, and reads on from offset 0: a byte at a time
 * from the data port, or any length by a DMA descriptor in its memory. Beyond an item's end, and
 * from a key that has none, it reads zeros. A DMA access to memory that isn't there ends with the
 * error bit in the descriptor; a descriptor that can't be read or written leaves no one to tell.
 *
 * Everything in the directory and in DMA descriptors is big-endian, the selector and the numeric
 * items are little-endian.
 */
#include "device/fw_cfg.h"

#include "host/log.h"

#include <assert.h>
#include <endian.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

/* Ports, from the base. */
#define PORT_SELECTOR 0
#define PORT_DATA 1
#define PORT_DMA_HIGH 4
#define PORT_DMA_LOW 8

#define DMA_SIGNATURE 0x51454d5520434647ULL /* "QEMU CFG" */

#define ID_TRADITIONAL 0x1
#define ID_DMA 0x2

#define KEY_WRITE 0x4000 /* no longer has a meaning */

#define DMA_ERROR 0x01
#define DMA_READ 0x02
#define DMA_SKIP 0x04
#define DMA_SELECT 0x08
#define DMA_WRITE 0x10
#define DMA_KEY_SHIFT 16

#define ITEMS (FW_CFG_FILE_FIRST + FW_CFG_MAX_FILES)

struct item {
    u8 *data;
    u32 len;
    bool present, owned, writable;
};

struct directory_entry {
    u32 size;
    u16 select;
    u16 reserved;
    char name[FW_CFG_MAX_NAME + 1];
};

/* What the guest reads under FW_CFG_FILE_DIR. */
struct directory {
    u32 count;
    struct directory_entry entries[FW_CFG_MAX_FILES];
};

struct dma_descriptor {
    u32 control;
    u32 length;
    u64 address;
};

struct fw_cfg {
    struct device dev;
    struct io_bus *ports;
    struct guest_memory *memory;
    struct io_range range;
    struct item items[ITEMS];
    struct directory directory;
    unsigned nfiles;

    u16 selected;
    u32 offset; /* in the selected item; never beyond its end but by a damaged snapshot */
    u32 dma_high;
};

static const struct item no_item;

static const struct item *fw_cfg_item(const struct fw_cfg *fw)
{
    unsigned key = fw->selected & ~KEY_WRITE; /* arch-local keys (8000h) have no items */

    return key < ITEMS ? &fw->items[key] : &no_item;
}

static void fw_cfg_select(struct fw_cfg *fw, u16 key)
{
    fw->selected = key;
    fw->offset = 0;
}

/* Bytes of the selected item from the offset on. */
static u32 fw_cfg_left(const struct fw_cfg *fw)
{
    u32 len = fw_cfg_item(fw)->len;

    return fw->offset < len ? len - fw->offset : 0;
}

static u8 fw_cfg_read_byte(struct fw_cfg *fw)
{
    return fw_cfg_left(fw) ? fw_cfg_item(fw)->data[fw->offset++] : 0;
}

static int zero_guest(struct guest_memory *memory, gpa_t gpa, u32 len)
{
    static const u8 zeros[4096];

    while (len) {
        u32 n = MIN(len, (u32)sizeof(zeros));
        if (memory_write(memory, gpa, zeros, n) < 0)
            return -EFAULT;
        gpa += n;
        len -= n;
    }
    return 0;
}

static int dma_read_item(struct fw_cfg *fw, gpa_t gpa, u32 len)
{
    u32 n = MIN(len, fw_cfg_left(fw));

    if (n && memory_write(fw->memory, gpa, fw_cfg_item(fw)->data + fw->offset, n) < 0)
        return -EFAULT;
    fw->offset += n;
    return zero_guest(fw->memory, gpa + n, len - n);
}

static int dma_write_item(struct fw_cfg *fw, gpa_t gpa, u32 len)
{
    const struct item *item = fw_cfg_item(fw);

    if (!item->writable || len > fw_cfg_left(fw))
        return -EPERM;
    if (memory_read(fw->memory, gpa, item->data + fw->offset, len) < 0)
        return -EFAULT;
    fw->offset += len;
    return 0;
}

/*
 * One operation a descriptor; select may come with it. The order of precedence is the
 * specification's.
 */
static int dma_perform(struct fw_cfg *fw, u32 control, gpa_t gpa, u32 len)
{
    if (control & DMA_SELECT)
        fw_cfg_select(fw, control >> DMA_KEY_SHIFT);
    if ((control & (DMA_READ | DMA_WRITE)) && gpa + len < gpa)
        return -EFAULT;
    if (control & DMA_READ)
        return dma_read_item(fw, gpa, len);
    if (control & DMA_WRITE)
        return dma_write_item(fw, gpa, len);
    if (control & DMA_SKIP)
        fw->offset += MIN(len, fw_cfg_left(fw));
    return 0;
}

static void fw_cfg_dma(struct fw_cfg *fw, gpa_t gpa)
{
    struct dma_descriptor d;

    if (memory_read(fw->memory, gpa, &d, sizeof(d)) < 0) {
        log_once(LOG_WARN, "fw_cfg: DMA descriptor at %#llx is not in guest memory",
                 (unsigned long long)gpa);
        return;
    }
    int rc = dma_perform(fw, be32toh(d.control), be64toh(d.address), be32toh(d.length));
    u32 control = htobe32(rc < 0 ? DMA_ERROR : 0);
    if (memory_write(fw->memory, gpa, &control, sizeof(control)) < 0)
        log_once(LOG_WARN, "fw_cfg: DMA descriptor at %#llx vanished", (unsigned long long)gpa);
}

static u64 fw_cfg_read(void *opaque, u64 offset, unsigned size)
{
    struct fw_cfg *fw = opaque;
    u64 value = UINT64_MAX; /* what is write-only or not there */

    device_lock(&fw->dev);
    if (offset == PORT_DATA && size == 1)
        value = fw_cfg_read_byte(fw);
    else if (offset >= PORT_DMA_HIGH)
        value = htobe64(DMA_SIGNATURE) >> 8 * (offset - PORT_DMA_HIGH);
    device_unlock(&fw->dev);
    return value & (BIT(8 * size) - 1);
}

/*
 * The address is big-endian and its low half starts the operation. Writes to the data port do
 * nothing.
 */
static void fw_cfg_write(void *opaque, u64 offset, u64 value, unsigned size)
{
    struct fw_cfg *fw = opaque;

    device_lock(&fw->dev);
    if (offset == PORT_SELECTOR && size == 2) {
        fw_cfg_select(fw, value);
    } else if (offset == PORT_DMA_HIGH && size == 4) {
        fw->dma_high = be32toh(value);
    } else if (offset == PORT_DMA_LOW && size == 4) {
        gpa_t gpa = (u64)fw->dma_high << 32 | be32toh(value);
        fw->dma_high = 0;
        fw_cfg_dma(fw, gpa);
    }
    device_unlock(&fw->dev);
}

static const struct io_ops fw_cfg_io_ops = {
    .read = fw_cfg_read,
    .write = fw_cfg_write,
    .max_size = 4,
};

static int set_item(struct fw_cfg *fw, u16 key, void *data, u32 len, enum fw_cfg_owner owner,
                    struct error *err)
{
    struct item *item = &fw->items[key];
    u8 *bytes = data;

    assert(!item->present);
    if (owner == FW_CFG_COPY) {
        bytes = malloc(len ? len : 1);
        if (!bytes)
            return error_host(err, ENOMEM, "fw_cfg: item of %u bytes", len);
        memcpy(bytes, data, len);
    }
    *item = (struct item){
        .data = bytes,
        .len = len,
        .present = true,
        .owned = owner == FW_CFG_COPY,
        .writable = owner == FW_CFG_WRITABLE,
    };
    return 0;
}

int fw_cfg_add_key(struct fw_cfg *fw, u16 key, void *data, u32 len, enum fw_cfg_owner owner,
                   struct error *err)
{
    assert(key < FW_CFG_FILE_FIRST);
    return set_item(fw, key, data, len, owner, err);
}

int fw_cfg_add_file(struct fw_cfg *fw, const char *name, void *data, u32 len,
                    enum fw_cfg_owner owner, struct error *err)
{
    struct directory_entry *entries = fw->directory.entries;
    u16 key = FW_CFG_FILE_FIRST + fw->nfiles;
    unsigned at = 0;

    if (strlen(name) > FW_CFG_MAX_NAME)
        return error_input(err, "fw_cfg: name \"%s\" is longer than %u bytes", name,
                           FW_CFG_MAX_NAME);
    if (fw->nfiles == FW_CFG_MAX_FILES)
        return error_input(err, "fw_cfg: no room for \"%s\": %u files at most", name,
                           FW_CFG_MAX_FILES);
    while (at < fw->nfiles && strcmp(entries[at].name, name) < 0)
        at++;
    assert(at == fw->nfiles || strcmp(entries[at].name, name) != 0);

    int rc = set_item(fw, key, data, len, owner, err);
    if (rc < 0)
        return rc;
    memmove(&entries[at + 1], &entries[at], (fw->nfiles - at) * sizeof(*entries));
    entries[at] = (struct directory_entry){.size = htobe32(len), .select = htobe16(key)};
    strcpy(entries[at].name, name);
    fw->nfiles++;
    fw->directory.count = htobe32(fw->nfiles);
    fw->items[FW_CFG_FILE_DIR].len =
        offsetof(struct directory, entries) + fw->nfiles * sizeof(*entries);
    return 0;
}

int fw_cfg_add_u16(struct fw_cfg *fw, u16 key, u16 value, struct error *err)
{
    u16 le = htole16(value);

    return fw_cfg_add_key(fw, key, &le, sizeof(le), FW_CFG_COPY, err);
}

int fw_cfg_add_u32(struct fw_cfg *fw, u16 key, u32 value, struct error *err)
{
    u32 le = htole32(value);

    return fw_cfg_add_key(fw, key, &le, sizeof(le), FW_CFG_COPY, err);
}

static void fw_cfg_reset(struct device *dev)
{
    struct fw_cfg *fw = container_of(dev, struct fw_cfg, dev);

    device_lock(dev);
    fw_cfg_select(fw, FW_CFG_SIGNATURE);
    fw->dma_high = 0;
    device_unlock(dev);
}

static void fw_cfg_free(struct fw_cfg *fw)
{
    for (unsigned key = 0; key < ITEMS; key++)
        if (fw->items[key].owned)
            free(fw->items[key].data);
    pthread_mutex_destroy(&fw->dev.lock);
    free(fw);
}

static void fw_cfg_destroy(struct device *dev)
{
    struct fw_cfg *fw = container_of(dev, struct fw_cfg, dev);

    io_bus_remove(fw->ports, &fw->range);
    fw_cfg_free(fw);
}

static const struct state_field fw_cfg_fields[] = {
    STATE_HOST(struct fw_cfg, dev),     STATE_HOST(struct fw_cfg, ports),
    STATE_HOST(struct fw_cfg, memory),  STATE_HOST(struct fw_cfg, range),
    STATE_HOST(struct fw_cfg, items),   STATE_HOST(struct fw_cfg, directory),
    STATE_HOST(struct fw_cfg, nfiles),  STATE_FIELD(struct fw_cfg, selected),
    STATE_FIELD(struct fw_cfg, offset), STATE_FIELD(struct fw_cfg, dma_high),
};

static const struct state_desc fw_cfg_state = STATE_DESC("fw_cfg", 1, struct fw_cfg, fw_cfg_fields);

static const struct device_ops fw_cfg_ops = {
    .reset = fw_cfg_reset,
    .destroy = fw_cfg_destroy,
};

struct fw_cfg *fw_cfg_create(const struct device_env *env, const struct fw_cfg_config *cfg,
                             struct error *err)
{
    struct fw_cfg *fw = calloc(1, sizeof(*fw));

    if (!fw) {
        error_host(err, ENOMEM, "fw_cfg");
        return NULL;
    }
    device_init(&fw->dev, "fw_cfg", &fw_cfg_ops, &fw_cfg_state);
    fw->ports = env->ports;
    fw->memory = env->memory;
    fw->range = (struct io_range){
        .name = "fw_cfg",
        .base = cfg->port,
        .size = FW_CFG_PORTS,
        .ops = &fw_cfg_io_ops,
        .opaque = fw,
    };
    if (fw_cfg_add_key(fw, FW_CFG_SIGNATURE, "QEMU", 4, FW_CFG_BORROW, err) < 0 ||
        fw_cfg_add_u32(fw, FW_CFG_ID, ID_TRADITIONAL | ID_DMA, err) < 0 ||
        fw_cfg_add_key(fw, FW_CFG_FILE_DIR, &fw->directory, offsetof(struct directory, entries),
                       FW_CFG_BORROW, err) < 0 ||
        io_bus_add(fw->ports, &fw->range, err) < 0) {
        fw_cfg_free(fw);
        return NULL;
    }
    return fw;
}

struct device *fw_cfg_device(struct fw_cfg *fw)
{
    return &fw->dev;
}
