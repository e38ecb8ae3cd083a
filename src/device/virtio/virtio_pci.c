/*
 * The registers of a virtio device on PCI: VIRTIO 1.2, 4.1.4. Four parts of one BAR, which vendor-specific
 * capabilities point at, and a fifth capability that reaches the same registers through configuration space, for
 * firmware that can't map the BAR.
 */
#include "device/virtio/internal.h"

#include <string.h>

#define CAP_COMMON_CFG 1
#define CAP_NOTIFY_CFG 2
#define CAP_ISR_CFG 3
#define CAP_DEVICE_CFG 4
#define CAP_PCI_CFG 5

struct virtio_pci_cap { /* 4.1.4 */
    u8 vndr, next, len, cfg_type;
    u8 bar, id, padding[2];
    u32 offset, length;
    u32 data; /* notify_off_multiplier or pci_cfg_data, where there is one */
};
#define CAP_LENGTH offsetof(struct virtio_pci_cap, data)
#define CAP_LENGTH_WITH_DATA sizeof(struct virtio_pci_cap)

struct common_cfg { /* 4.1.4.3 */
    u32 device_feature_select;
    u32 device_feature;
    u32 driver_feature_select;
    u32 driver_feature;
    u16 config_msix_vector;
    u16 num_queues;
    u8 device_status;
    u8 config_generation;
    u16 queue_select;
    u16 queue_size;
    u16 queue_msix_vector;
    u16 queue_enable;
    u16 queue_notify_off;
    u64 queue_desc;
    u64 queue_driver;
    u64 queue_device;
    u16 queue_notif_config_data;
    u16 queue_reset;
};
_Static_assert(offsetof(struct common_cfg, queue_reset) == 0x3a, "VIRTIO 1.2, 4.1.4.3");

static u64 value_mask(unsigned size)
{
    return size >= 8 ? UINT64_MAX : BIT(8 * size) - 1;
}

/* ---- common configuration ---- */

/* The queue that queue_select names, or NULL. */
static struct virtq *selected(struct virtio *v)
{
    return v->queue_select < v->config.queues ? &v->queues[v->queue_select] : NULL;
}

static u32 feature_word(u64 features, u32 select)
{
    return select < 2 ? features >> 32 * select : 0;
}

static void fill_common(struct virtio *v, struct common_cfg *c)
{
    const struct virtq *q = selected(v);

    *c = (struct common_cfg){
        .device_feature_select = v->device_feature_select,
        .device_feature = feature_word(v->offered, v->device_feature_select),
        .driver_feature_select = v->driver_feature_select,
        .driver_feature = feature_word(v->features, v->driver_feature_select),
        .config_msix_vector = v->config_vector,
        .num_queues = v->config.queues,
        .device_status = v->status,
        .config_generation = v->generation,
        .queue_select = v->queue_select,
    };
    if (!q)
        return;
    c->queue_size = q->size;
    c->queue_msix_vector = q->vector;
    c->queue_enable = q->enabled;
    c->queue_notify_off = v->queue_select;
    c->queue_desc = q->desc;
    c->queue_driver = q->driver;
    c->queue_device = q->device;
    c->queue_reset = v->queue_resetting >> v->queue_select & 1;
}

static u64 common_read(struct virtio *v, unsigned offset, unsigned size)
{
    struct common_cfg c;
    u64 value = 0;

    if (offset + size > sizeof(c))
        return 0;
    fill_common(v, &c);
    memcpy(&value, (const u8 *)&c + offset, size);
    return value;
}

static void write_features(struct virtio *v, u32 value)
{
    unsigned shift = 32 * v->driver_feature_select;

    if (v->driver_feature_select > 1 || (v->status & VIRTIO_STATUS_FEATURES_OK))
        return;
    v->features = (v->features & ~(0xffffffffULL << shift)) | (u64)value << shift;
}

/* A vector that there isn't reads back as none (4.1.5.1.2.1). */
static u16 known_vector(const struct virtio *v, u64 value)
{
    return value < v->pci.msix_vectors ? value : 0xffff;
}

/* Half of a queue's address: drivers write 64-bit registers by halves (4.1.3.1). */
static void write_address(gpa_t *address, unsigned offset, u64 value)
{
    unsigned shift = offset & 4 ? 32 : 0;

    *address = (*address & ~(0xffffffffULL << shift)) | (u64)(u32)value << shift;
}

static void write_queue_register(struct virtio *v, struct virtq *q, unsigned offset, u64 value)
{
    switch (offset) {
    case offsetof(struct common_cfg, queue_msix_vector):
        q->vector = known_vector(v, value);
        return;
    case offsetof(struct common_cfg, queue_enable):
        if (value == 1)
            virtio_enable_queue(v, v->queue_select);
        return;
    case offsetof(struct common_cfg, queue_reset):
        if (value == 1 && virtio_has(v, VIRTIO_F_RING_RESET))
            virtio_reset_queue(v, v->queue_select);
        return;
    }
    /* The rest is fixed while the queue is enabled (4.1.4.3.2). */
    if (q->enabled)
        return;
    switch (offset) {
    case offsetof(struct common_cfg, queue_size):
        if (value && value <= VIRTQ_SIZE_MAX)
            q->size = value;
        break;
    case offsetof(struct common_cfg, queue_desc):
    case offsetof(struct common_cfg, queue_desc) + 4:
        write_address(&q->desc, offset - offsetof(struct common_cfg, queue_desc), value);
        break;
    case offsetof(struct common_cfg, queue_driver):
    case offsetof(struct common_cfg, queue_driver) + 4:
        write_address(&q->driver, offset - offsetof(struct common_cfg, queue_driver), value);
        break;
    case offsetof(struct common_cfg, queue_device):
    case offsetof(struct common_cfg, queue_device) + 4:
        write_address(&q->device, offset - offsetof(struct common_cfg, queue_device), value);
        break;
    }
}

static void common_write(struct virtio *v, unsigned offset, u64 value)
{
    switch (offset) {
    case offsetof(struct common_cfg, device_feature_select):
        v->device_feature_select = value;
        break;
    case offsetof(struct common_cfg, driver_feature_select):
        v->driver_feature_select = value;
        break;
    case offsetof(struct common_cfg, driver_feature):
        write_features(v, value);
        break;
    case offsetof(struct common_cfg, config_msix_vector):
        v->config_vector = known_vector(v, value);
        break;
    case offsetof(struct common_cfg, device_status):
        virtio_set_status(v, value);
        break;
    case offsetof(struct common_cfg, queue_select):
        v->queue_select = value;
        break;
    default:
        if (selected(v))
            write_queue_register(v, selected(v), offset, value);
        break;
    }
}

/* ---- the device's own configuration ---- */

static u64 device_read(struct virtio *v, unsigned offset, unsigned size)
{
    u64 value = 0;

    for (unsigned i = 0; i < size && offset + i < v->config.config_size; i++)
        value |= (u64)v->config.config[offset + i] << 8 * i;
    return value;
}

static void device_write(struct virtio *v, unsigned offset, u64 value, unsigned size)
{
    bool any = false;

    for (unsigned i = 0; i < size && offset + i < v->config.config_size; i++) {
        u8 mask = v->config.config_writable ? v->config.config_writable[offset + i] : 0;
        u8 *byte = &v->config.config[offset + i];

        *byte = (*byte & ~mask) | ((value >> 8 * i) & mask);
        any |= mask != 0;
    }
    if (any && v->ops->config_written)
        v->ops->config_written(v, offset, size);
}

/* ---- the BAR; the lock is held ---- */

static u64 isr_read(struct virtio *v)
{
    u8 isr = v->isr;

    v->isr = 0;
    pci_intx_set(&v->pci, false);
    return isr;
}

static u64 region_read(struct virtio *v, unsigned offset, unsigned size)
{
    switch (offset & ~0xfffU) {
    case VIRTIO_BAR_COMMON:
        return common_read(v, offset, size);
    case VIRTIO_BAR_ISR:
        return offset == VIRTIO_BAR_ISR ? isr_read(v) : 0;
    case VIRTIO_BAR_DEVICE:
        return device_read(v, offset - VIRTIO_BAR_DEVICE, size);
    default:
        return 0;
    }
}

static void region_write(struct virtio *v, unsigned offset, u64 value, unsigned size)
{
    unsigned q = (offset - VIRTIO_BAR_NOTIFY) / VIRTIO_NOTIFY_MULTIPLIER;

    switch (offset & ~0xfffU) {
    case VIRTIO_BAR_COMMON:
        common_write(v, offset, value & value_mask(size));
        break;
    case VIRTIO_BAR_DEVICE:
        device_write(v, offset - VIRTIO_BAR_DEVICE, value, size);
        break;
    case VIRTIO_BAR_NOTIFY:
        if (q < v->config.queues)
            virtio_kick(v, q);
        break;
    }
}

static u64 bar_read(void *opaque, u64 offset, unsigned size)
{
    struct virtio *v = opaque;
    u64 value;

    device_lock(&v->pci.dev);
    value = region_read(v, (unsigned)offset, size);
    device_unlock(&v->pci.dev);
    return value;
}

static void bar_write(void *opaque, u64 offset, u64 value, unsigned size)
{
    struct virtio *v = opaque;

    /* The busy way takes no lock: the loop may hold it for long. */
    if (offset >= VIRTIO_BAR_NOTIFY) {
        region_write(v, (unsigned)offset, value, size);
        return;
    }
    device_lock(&v->pci.dev);
    region_write(v, (unsigned)offset, value, size);
    device_unlock(&v->pci.dev);
}

static const struct io_ops bar_ops = {bar_read, bar_write, 4};

u64 virtio_pci_notify_offset(unsigned q)
{
    return VIRTIO_BAR_NOTIFY + (u64)q * VIRTIO_NOTIFY_MULTIPLIER;
}

/* ---- capabilities ---- */

static unsigned add_cap(struct virtio *v, u8 type, u32 offset, u32 length, u8 len)
{
    unsigned at = pci_add_capability(&v->pci, PCI_CAP_ID_VNDR, len);

    v->pci.config[at + offsetof(struct virtio_pci_cap, len)] = len;
    v->pci.config[at + offsetof(struct virtio_pci_cap, cfg_type)] = type;
    v->pci.config[at + offsetof(struct virtio_pci_cap, bar)] = VIRTIO_BAR;
    pci_config_set32(&v->pci, at + offsetof(struct virtio_pci_cap, offset), offset);
    pci_config_set32(&v->pci, at + offsetof(struct virtio_pci_cap, length), length);
    return at;
}

void virtio_pci_setup(struct virtio *v)
{
    unsigned at;

    pci_add_bar(&v->pci, VIRTIO_BAR, PCI_BAR_MEM64, VIRTIO_BAR_SIZE, &bar_ops, v);
    pci_set_doorbells(&v->pci, VIRTIO_BAR, v->doorbells, v->config.queues);
    pci_add_msix(&v->pci, v->config.queues + 1, VIRTIO_MSIX_BAR);
    at = add_cap(v, CAP_PCI_CFG, 0, 0, CAP_LENGTH_WITH_DATA);
    v->cfg_cap = at;
    pci_config_allow32(&v->pci, at + offsetof(struct virtio_pci_cap, bar), 0xff);
    pci_config_allow32(&v->pci, at + offsetof(struct virtio_pci_cap, offset), ~0U);
    pci_config_allow32(&v->pci, at + offsetof(struct virtio_pci_cap, length), ~0U);
    pci_config_allow32(&v->pci, at + offsetof(struct virtio_pci_cap, data), ~0U);
    if (v->config.config_size)
        add_cap(v, CAP_DEVICE_CFG, VIRTIO_BAR_DEVICE, v->config.config_size, CAP_LENGTH);
    add_cap(v, CAP_ISR_CFG, VIRTIO_BAR_ISR, 1, CAP_LENGTH);
    at = add_cap(v, CAP_NOTIFY_CFG, VIRTIO_BAR_NOTIFY, VIRTIO_NOTIFY_MULTIPLIER * v->config.queues,
                 CAP_LENGTH_WITH_DATA);
    pci_config_set32(&v->pci, at + offsetof(struct virtio_pci_cap, data), VIRTIO_NOTIFY_MULTIPLIER);
    add_cap(v, CAP_COMMON_CFG, VIRTIO_BAR_COMMON, sizeof(struct common_cfg), CAP_LENGTH);
}

/* Whether [offset, offset + size) of configuration space touches pci_cfg_data; then where that points. */
static bool cfg_window(struct virtio *v, unsigned offset, unsigned size, u32 *at, u32 *length)
{
    struct virtio_pci_cap cap;
    unsigned data = v->cfg_cap + offsetof(struct virtio_pci_cap, data);

    if (!v->cfg_cap || offset >= data + 4 || offset + size <= data)
        return false;
    memcpy(&cap, v->pci.config + v->cfg_cap, sizeof(cap));
    *at = cap.offset;
    *length = cap.length;
    return cap.bar == VIRTIO_BAR && (cap.length == 1 || cap.length == 2 || cap.length == 4) &&
           cap.offset % cap.length == 0 && cap.offset < VIRTIO_BAR_SIZE;
}

void virtio_pci_config_read(struct pci_device *pci, unsigned offset, unsigned size)
{
    struct virtio *v = container_of(pci, struct virtio, pci);
    u32 at, length;

    if (cfg_window(v, offset, size, &at, &length))
        pci_config_set32(pci, v->cfg_cap + offsetof(struct virtio_pci_cap, data),
                         region_read(v, at, length));
}

void virtio_pci_config_written(struct pci_device *pci, unsigned offset, unsigned size)
{
    struct virtio *v = container_of(pci, struct virtio, pci);
    u32 at, length;

    if (cfg_window(v, offset, size, &at, &length))
        region_write(v, at,
                     pci_config_get32(pci, v->cfg_cap + offsetof(struct virtio_pci_cap, data)),
                     length);
}
