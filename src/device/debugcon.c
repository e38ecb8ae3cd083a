/*
 * The firmware's debug port, as Bochs and QEMU have it: a read answers 0xe9 where it is there.
 */
#include "device/debugcon.h"

#include "host/log.h"

#include <errno.h>
#include <stdlib.h>

#define DEBUGCON_READBACK 0xe9
#define LINE_MAX_LENGTH 200

struct debugcon {
    struct device dev;
    struct io_bus *ports;
    struct io_range range;
    u8 line[LINE_MAX_LENGTH]; /* so far */
    u32 length;
};

static u64 debugcon_read(void *opaque, u64 offset, unsigned size)
{
    return DEBUGCON_READBACK;
}

static void debugcon_write(void *opaque, u64 offset, u64 value, unsigned size)
{
    struct debugcon *d = opaque;
    u8 c = (u8)value;

    device_lock(&d->dev);
    if (c >= ' ' && c < 0x7f)
        d->line[d->length++] = c;
    if ((c == '\n' && d->length) || d->length == LINE_MAX_LENGTH) {
        log_debug("firmware: %.*s", (int)d->length, d->line);
        d->length = 0;
    }
    device_unlock(&d->dev);
}

static const struct io_ops debugcon_io_ops = {debugcon_read, debugcon_write, 1};

static void debugcon_reset(struct device *dev)
{
    struct debugcon *d = container_of(dev, struct debugcon, dev);

    device_lock(dev);
    d->length = 0;
    device_unlock(dev);
}

static void debugcon_destroy(struct device *dev)
{
    struct debugcon *d = container_of(dev, struct debugcon, dev);

    io_bus_remove(d->ports, &d->range);
    pthread_mutex_destroy(&dev->lock);
    free(d);
}

static int debugcon_loaded(void *obj, struct error *err)
{
    const struct debugcon *d = obj;

    if (d->length >= LINE_MAX_LENGTH)
        return error_input(err, "debugcon: the saved line is too long");
    return 0;
}

static const struct state_field debugcon_fields[] = {
    STATE_HOST(struct debugcon, dev),     STATE_HOST(struct debugcon, ports),
    STATE_HOST(struct debugcon, range),   STATE_FIELD(struct debugcon, line),
    STATE_FIELD(struct debugcon, length),
};
static const struct state_desc debugcon_state = {
    .name = "debugcon",
    .version = 1,
    .struct_size = sizeof(struct debugcon),
    .fields = debugcon_fields,
    .nfields = ARRAY_SIZE(debugcon_fields),
    .loaded = debugcon_loaded,
};

static const struct device_ops debugcon_ops = {
    .reset = debugcon_reset,
    .destroy = debugcon_destroy,
};

struct debugcon *debugcon_create(const struct device_env *env, u16 port, struct error *err)
{
    struct debugcon *d = calloc(1, sizeof(*d));

    if (!d) {
        error_host(err, ENOMEM, "debugcon");
        return NULL;
    }
    device_init(&d->dev, "debugcon", &debugcon_ops, &debugcon_state);
    d->ports = env->ports;
    d->range = (struct io_range){"debugcon", port, 1, &debugcon_io_ops, d};
    if (io_bus_add(d->ports, &d->range, err) < 0) {
        debugcon_destroy(&d->dev);
        return NULL;
    }
    return d;
}

struct device *debugcon_device(struct debugcon *d)
{
    return &d->dev;
}
