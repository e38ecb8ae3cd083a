/*
 * pvpanic. A read says which events the host understands, a write reports some of them. There is no
 * state: every event is passed on as it comes.
 */
#include "device/pvpanic.h"

#include "host/log.h"

#include <errno.h>
#include <stdlib.h>

#define PVPANIC_EVENTS (PVPANIC_PANICKED | PVPANIC_CRASH_LOADED)

struct pvpanic {
    struct device dev;
    struct io_bus *ports;
    struct io_range range;
    struct power_sink power;
};

static u64 pvpanic_read(void *opaque, u64 offset, unsigned size)
{
    return PVPANIC_EVENTS;
}

static void pvpanic_write(void *opaque, u64 offset, u64 value, unsigned size)
{
    struct pvpanic *p = opaque;

    if (value & ~(u64)PVPANIC_EVENTS)
        log_once(LOG_WARN, "pvpanic: guest reported unknown events %#x", (unsigned)value);
    if (value & PVPANIC_CRASH_LOADED)
        log_once(LOG_INFO, "pvpanic: guest panicked and starts its crash kernel");
    if (value & PVPANIC_PANICKED)
        p->power.request(p->power.sink, POWER_PANICKED, value & PVPANIC_EVENTS);
}

static const struct io_ops pvpanic_io_ops = {
    .read = pvpanic_read,
    .write = pvpanic_write,
    .max_size = 1,
};

static void pvpanic_reset(struct device *dev)
{
}

static void pvpanic_destroy(struct device *dev)
{
    struct pvpanic *p = container_of(dev, struct pvpanic, dev);

    io_bus_remove(p->ports, &p->range);
    pthread_mutex_destroy(&dev->lock);
    free(p);
}

static const struct state_field pvpanic_fields[] = {
    STATE_HOST(struct pvpanic, dev),
    STATE_HOST(struct pvpanic, ports),
    STATE_HOST(struct pvpanic, range),
    STATE_HOST(struct pvpanic, power),
};

static const struct state_desc pvpanic_state =
    STATE_DESC("pvpanic", 1, struct pvpanic, pvpanic_fields);

static const struct device_ops pvpanic_ops = {
    .reset = pvpanic_reset,
    .destroy = pvpanic_destroy,
};

struct pvpanic *pvpanic_create(const struct device_env *env, const struct pvpanic_config *cfg,
                               struct error *err)
{
    struct pvpanic *p = calloc(1, sizeof(*p));

    if (!p) {
        error_host(err, ENOMEM, "pvpanic");
        return NULL;
    }
    device_init(&p->dev, "pvpanic", &pvpanic_ops, &pvpanic_state);
    p->ports = env->ports;
    p->power = cfg->power;
    p->range = (struct io_range){
        .name = "pvpanic",
        .base = cfg->port,
        .size = 1,
        .ops = &pvpanic_io_ops,
        .opaque = p,
    };
    if (io_bus_add(p->ports, &p->range, err) < 0) {
        pthread_mutex_destroy(&p->dev.lock);
        free(p);
        return NULL;
    }
    return p;
}

struct device *pvpanic_device(struct pvpanic *p)
{
    return &p->dev;
}
