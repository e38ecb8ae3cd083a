/*
 * The I/O APIC.
 *
 * 1. A pin's level here means asserted or not. The polarity bit is stored and read back, and
 *    changes nothing: there is no wire whose voltage it could describe, and the firmware tables
 *    tell the guest which polarity to program for each input.
 * 2. An edge-triggered pin sends when it becomes asserted, if it isn't masked; an edge that meets a
 *    mask is lost (82093AA, 3.2.4).
 * 3. A level-triggered pin sends when it is asserted, not masked, and its remote IRR is clear;
 *    sending sets remote IRR, an EOI for its vector clears it, and if the pin is still asserted it
 *    sends again. Whatever can make that condition true (the pin, the entry, an EOI) ends in
 *    ioapic_service.
 * 4. SMI, NMI, INIT and ExtINT are edges whatever the trigger bit says: no EOI answers them, so
 *    remote IRR would stay set for good.
 * 5. Messages leave as MSIs (Intel SDM vol. 3, 11.11; ICH9 13.5.7). Delivery takes no time, so
 *    delivery status always reads idle.
 */
#include "device/ioapic.h"

#include "host/log.h"

#include <errno.h>
#include <stdlib.h>

/* Memory-mapped registers. */
#define IOREGSEL 0x00
#define IOWIN 0x10
#define IOEOI 0x40

/* Registers behind the window. */
#define IOAPICID 0x00
#define IOAPICVER 0x01
#define IOAPICARB 0x02
#define IOREDTBL 0x10

#define IOAPIC_VERSION 0x20

#define RTE_VECTOR 0xffULL
#define RTE_DELMOD_SHIFT 8
#define RTE_DESTMOD BIT(11)
#define RTE_DELIVS BIT(12)
#define RTE_REMOTE_IRR BIT(14)
#define RTE_TRIGGER_LEVEL BIT(15)
#define RTE_MASK BIT(16)
#define RTE_EDID_SHIFT 48
#define RTE_DEST_SHIFT 56
#define RTE_WRITABLE (0xffff00000001ffffULL & ~(RTE_DELIVS | RTE_REMOTE_IRR))

#define DELIVER_LOWEST 1 /* modes above it are SMI, NMI, INIT and ExtINT */

#define MSI_ADDRESS_BASE 0xfee00000ULL
#define MSI_ADDRESS_DEST_SHIFT 12
#define MSI_ADDRESS_EDID_SHIFT 4
#define MSI_ADDRESS_REDIRECTION_HINT BIT(3)
#define MSI_ADDRESS_LOGICAL BIT(2)
#define MSI_DATA_ASSERT BIT(14)
#define MSI_DATA_LEVEL BIT(15)

struct ioapic {
    struct device dev;
    struct io_bus *mmio;
    struct io_range range;
    struct msi_sink msi;

    u32 pins; /* asserted inputs, one bit each */
    u8 select;
    u8 id;
    u64 redir[IOAPIC_PINS];
};

static unsigned rte_delivery_mode(u64 rte)
{
    return rte >> RTE_DELMOD_SHIFT & 7;
}

static bool rte_is_level(u64 rte)
{
    return (rte & RTE_TRIGGER_LEVEL) && rte_delivery_mode(rte) <= DELIVER_LOWEST;
}

static void ioapic_send(struct ioapic *io, unsigned pin)
{
    u64 rte = io->redir[pin];
    u64 address = MSI_ADDRESS_BASE | (rte >> RTE_DEST_SHIFT) << MSI_ADDRESS_DEST_SHIFT |
                  (rte >> RTE_EDID_SHIFT & 0xff) << MSI_ADDRESS_EDID_SHIFT;
    u32 data = (rte & RTE_VECTOR) | rte_delivery_mode(rte) << RTE_DELMOD_SHIFT | MSI_DATA_ASSERT;

    if (rte & RTE_DESTMOD)
        address |= MSI_ADDRESS_LOGICAL;
    if (rte_delivery_mode(rte) == DELIVER_LOWEST)
        address |= MSI_ADDRESS_REDIRECTION_HINT;
    if (rte_is_level(rte)) {
        data |= MSI_DATA_LEVEL;
        io->redir[pin] |= RTE_REMOTE_IRR;
    }
    msi_deliver(&io->msi, address, data);
}

/* Sends a level-triggered interrupt that is due; edges are sent where they happen. */
static void ioapic_service(struct ioapic *io, unsigned pin)
{
    u64 rte = io->redir[pin];

    if (rte_is_level(rte) && (io->pins & BIT(pin)) && !(rte & (RTE_MASK | RTE_REMOTE_IRR)))
        ioapic_send(io, pin);
}

void ioapic_set_irq(void *sink, unsigned pin, bool level)
{
    struct ioapic *io = sink;

    if (pin >= IOAPIC_PINS)
        return;
    device_lock(&io->dev);
    bool was = io->pins & BIT(pin);
    if (level)
        io->pins |= BIT(pin);
    else
        io->pins &= ~BIT(pin);
    if (rte_is_level(io->redir[pin]))
        ioapic_service(io, pin);
    else if (level && !was && !(io->redir[pin] & RTE_MASK))
        ioapic_send(io, pin);
    device_unlock(&io->dev);
}

/* Remote IRR is cleared for all matching entries first: a delivery mustn't see half of an EOI. */
static void ioapic_eoi_locked(struct ioapic *io, u8 vector)
{
    u32 ended = 0;

    for (unsigned pin = 0; pin < IOAPIC_PINS; pin++) {
        u64 rte = io->redir[pin];
        if ((rte & RTE_REMOTE_IRR) && (rte & RTE_VECTOR) == vector) {
            io->redir[pin] &= ~RTE_REMOTE_IRR;
            ended |= BIT(pin);
        }
    }
    for (unsigned pin = 0; pin < IOAPIC_PINS; pin++)
        if (ended & BIT(pin))
            ioapic_service(io, pin);
}

void ioapic_eoi(struct ioapic *io, u8 vector)
{
    device_lock(&io->dev);
    ioapic_eoi_locked(io, vector);
    device_unlock(&io->dev);
}

static u32 ioapic_read_window(const struct ioapic *io)
{
    switch (io->select) {
    case IOAPICID:
    case IOAPICARB: /* no arbitration bus: it shows what the last ID write loaded into it */
        return (u32)io->id << 24;
    case IOAPICVER:
        return IOAPIC_VERSION | (IOAPIC_PINS - 1) << 16;
    case IOREDTBL ... IOREDTBL + 2 * IOAPIC_PINS - 1:
        return io->redir[(io->select - IOREDTBL) / 2] >> (io->select & 1 ? 32 : 0);
    default:
        return 0;
    }
}

/*
 * Remote IRR is read-only, but leaves with the level trigger: how software without the EOI register
 * frees a stuck entry, by switching it to edge and back.
 */
static void ioapic_write_redirection(struct ioapic *io, unsigned pin, bool high, u32 value)
{
    u64 old = io->redir[pin];
    u64 rte = high ? (u64)value << 32 | (u32)old : (old & ~0xffffffffULL) | value;

    rte = (rte & RTE_WRITABLE) | (old & RTE_REMOTE_IRR);
    if (!rte_is_level(rte))
        rte &= ~RTE_REMOTE_IRR;
    io->redir[pin] = rte;
    ioapic_service(io, pin);
}

static void ioapic_write_window(struct ioapic *io, u32 value)
{
    switch (io->select) {
    case IOAPICID:
        io->id = value >> 24 & 0xf;
        break;
    case IOREDTBL ... IOREDTBL + 2 * IOAPIC_PINS - 1:
        ioapic_write_redirection(io, (io->select - IOREDTBL) / 2, io->select & 1, value);
        break;
    default:
        log_once(LOG_DEBUG, "ioapic: write of %#x to register %#x ignored", value, io->select);
    }
}

static u64 ioapic_read(void *opaque, u64 offset, unsigned size)
{
    struct ioapic *io = opaque;
    u32 value = 0;

    device_lock(&io->dev);
    switch (offset & ~3ULL) {
    case IOREGSEL:
        value = io->select;
        break;
    case IOWIN:
        value = ioapic_read_window(io);
        break;
    }
    device_unlock(&io->dev);
    return value >> 8 * (offset & 3) & (size == 4 ? 0xffffffff : BIT(8 * size) - 1);
}

/* Registers are written as dwords; the two that hold a byte take narrower writes as well. */
static void ioapic_write(void *opaque, u64 offset, u64 value, unsigned size)
{
    struct ioapic *io = opaque;

    device_lock(&io->dev);
    switch (offset) {
    case IOREGSEL:
        io->select = value;
        break;
    case IOWIN:
        if (size == 4)
            ioapic_write_window(io, value);
        break;
    case IOEOI:
        ioapic_eoi_locked(io, value);
        break;
    }
    device_unlock(&io->dev);
}

static const struct io_ops ioapic_io_ops = {
    .read = ioapic_read,
    .write = ioapic_write,
    .max_size = 4,
};

/* The inputs belong to the devices that drive them: a reset leaves them as they are. */
static void ioapic_reset(struct device *dev)
{
    struct ioapic *io = container_of(dev, struct ioapic, dev);

    device_lock(dev);
    io->select = 0;
    io->id = 0;
    for (unsigned pin = 0; pin < IOAPIC_PINS; pin++)
        io->redir[pin] = RTE_MASK;
    device_unlock(dev);
}

static void ioapic_destroy(struct device *dev)
{
    struct ioapic *io = container_of(dev, struct ioapic, dev);

    io_bus_remove(io->mmio, &io->range);
    pthread_mutex_destroy(&dev->lock);
    free(io);
}

static int ioapic_loaded(void *obj, struct error *err)
{
    struct ioapic *io = obj;

    if (io->pins >> IOAPIC_PINS || io->id > 0xf)
        return error_input(err, "ioapic: saved inputs %#x or ID %#x out of range", io->pins,
                           io->id);
    for (unsigned pin = 0; pin < IOAPIC_PINS; pin++) {
        u64 rte = io->redir[pin];
        if ((rte & ~(RTE_WRITABLE | RTE_REMOTE_IRR)) ||
            ((rte & RTE_REMOTE_IRR) && !rte_is_level(rte)))
            return error_input(err, "ioapic: saved entry %u is impossible: %#llx", pin,
                               (unsigned long long)rte);
    }
    return 0;
}

static const struct state_field ioapic_fields[] = {
    STATE_HOST(struct ioapic, dev),   STATE_HOST(struct ioapic, mmio),
    STATE_HOST(struct ioapic, range), STATE_HOST(struct ioapic, msi),
    STATE_FIELD(struct ioapic, pins), STATE_FIELD(struct ioapic, select),
    STATE_FIELD(struct ioapic, id),   STATE_FIELD(struct ioapic, redir),
};

static const struct state_desc ioapic_state = {
    .name = "ioapic",
    .version = 1,
    .struct_size = sizeof(struct ioapic),
    .fields = ioapic_fields,
    .nfields = ARRAY_SIZE(ioapic_fields),
    .loaded = ioapic_loaded,
};

static const struct device_ops ioapic_ops = {
    .reset = ioapic_reset,
    .destroy = ioapic_destroy,
};

struct ioapic *ioapic_create(const struct device_env *env, const struct ioapic_config *cfg,
                             struct error *err)
{
    struct ioapic *io = calloc(1, sizeof(*io));

    if (!io) {
        error_host(err, ENOMEM, "ioapic");
        return NULL;
    }
    device_init(&io->dev, "ioapic", &ioapic_ops, &ioapic_state);
    io->mmio = env->mmio;
    io->msi = cfg->msi;
    io->range = (struct io_range){
        .name = "ioapic",
        .base = cfg->base,
        .size = IOAPIC_SIZE,
        .ops = &ioapic_io_ops,
        .opaque = io,
    };
    ioapic_reset(&io->dev);
    if (io_bus_add(io->mmio, &io->range, err) < 0) {
        pthread_mutex_destroy(&io->dev.lock);
        free(io);
        return NULL;
    }
    return io;
}

struct device *ioapic_device(struct ioapic *io)
{
    return &io->dev;
}
