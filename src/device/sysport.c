/*
 * Ports 0x92 and 0xCF9: Intel ICH data sheets, "PORT92" and "RST_CNT" (chapter "Processor Interface
 * Registers"). Port 0x80 is a page register that no DMA channel uses: it reads back what was written,
 * and firmware shows its progress there. Systems write to 0x80 or 0xED to let a microsecond pass.
 */
#include "device/sysport.h"

#include "machine/layout.h"

#include <errno.h>
#include <stdlib.h>

#define PORT_DELAY 0xed

enum { PORT_92_INIT_NOW = 0x01, PORT_92_A20 = 0x02 };
enum { RST_CNT_SYS = 0x02, RST_CNT_CPU = 0x04, RST_CNT_FULL = 0x08 };

enum { RANGE_PORT_92, RANGE_RESET, RANGE_POST, RANGE_DELAY, RANGE_DEBUG_EXIT, RANGES };

struct sysport {
    struct device dev;
    u8 port_92, reset_control, post, delay;

    struct device_env env;
    struct a20_gate *a20;
    struct power_sink power;
    struct io_range range[RANGES];
    unsigned nranges; /* registered so far, in order */
};

void a20_gate_init(struct a20_gate *gate, void (*changed)(void *opaque, bool enabled), void *opaque)
{
    *gate = (struct a20_gate){.changed = changed, .opaque = opaque};
    pthread_mutex_init(&gate->lock, NULL);
}

void a20_gate_set(struct a20_gate *gate, enum a20_source source, bool on)
{
    pthread_mutex_lock(&gate->lock);
    bool before = gate->sources;
    gate->sources = on ? gate->sources | source : gate->sources & ~source;
    bool after = gate->sources;
    if (before != after && gate->changed)
        gate->changed(gate->opaque, after);
    pthread_mutex_unlock(&gate->lock);
}

bool a20_gate_enabled(struct a20_gate *gate)
{
    pthread_mutex_lock(&gate->lock);
    bool enabled = gate->sources;
    pthread_mutex_unlock(&gate->lock);
    return enabled;
}

static void request_reset(struct sysport *s)
{
    if (s->power.request)
        s->power.request(s->power.sink, POWER_RESET, 0);
}

static u64 register_read(struct sysport *s, const u8 *reg)
{
    device_lock(&s->dev);
    u8 value = *reg;
    device_unlock(&s->dev);
    return value;
}

static void register_write(struct sysport *s, u8 *reg, u64 value)
{
    device_lock(&s->dev);
    *reg = (u8)value;
    device_unlock(&s->dev);
}

static u64 port_92_read(void *opaque, u64 offset, unsigned size)
{
    struct sysport *s = opaque;

    return register_read(s, &s->port_92);
}

static void port_92_write(void *opaque, u64 offset, u64 value, unsigned size)
{
    struct sysport *s = opaque;

    device_lock(&s->dev);
    bool reset = (value & ~s->port_92) & PORT_92_INIT_NOW;
    s->port_92 = value & (PORT_92_INIT_NOW | PORT_92_A20);
    a20_gate_set(s->a20, A20_PORT_92, value & PORT_92_A20);
    device_unlock(&s->dev);
    if (reset)
        request_reset(s);
}

u8 sysport_reset_control_read(struct sysport *s)
{
    return (u8)register_read(s, &s->reset_control);
}

void sysport_reset_control_write(struct sysport *s, u8 value)
{
    /* The rise of RST_CPU resets; the other bits say how thoroughly, and here it is always thorough. */
    device_lock(&s->dev);
    bool reset = (value & ~s->reset_control) & RST_CNT_CPU;
    s->reset_control = value & (RST_CNT_SYS | RST_CNT_CPU | RST_CNT_FULL);
    device_unlock(&s->dev);
    if (reset)
        request_reset(s);
}

static u64 reset_control_read(void *opaque, u64 offset, unsigned size)
{
    return sysport_reset_control_read(opaque);
}

static void reset_control_write(void *opaque, u64 offset, u64 value, unsigned size)
{
    sysport_reset_control_write(opaque, (u8)value);
}

static u64 post_read(void *opaque, u64 offset, unsigned size)
{
    struct sysport *s = opaque;

    return register_read(s, &s->post);
}

static void post_write(void *opaque, u64 offset, u64 value, unsigned size)
{
    struct sysport *s = opaque;

    register_write(s, &s->post, value);
}

static u64 delay_read(void *opaque, u64 offset, unsigned size)
{
    struct sysport *s = opaque;

    return register_read(s, &s->delay);
}

static void delay_write(void *opaque, u64 offset, u64 value, unsigned size)
{
    struct sysport *s = opaque;

    register_write(s, &s->delay, value);
}

static u64 debug_exit_read(void *opaque, u64 offset, unsigned size)
{
    return 0xff;
}

/* The bus splits wider writes, low byte first; that byte holds all the bits that reach the status. */
static void debug_exit_write(void *opaque, u64 offset, u64 value, unsigned size)
{
    struct sysport *s = opaque;

    if (s->power.request)
        s->power.request(s->power.sink, POWER_DEBUG_EXIT, (value << 1 | 1) & 0xff);
}

static int sysport_loaded(void *obj, struct error *err)
{
    struct sysport *s = obj;

    a20_gate_set(s->a20, A20_PORT_92, s->port_92 & PORT_92_A20);
    return 0;
}

static const struct state_field sysport_fields[] = {
    STATE_HOST(struct sysport, dev),
    STATE_FIELD(struct sysport, port_92),
    STATE_FIELD(struct sysport, reset_control),
    STATE_FIELD(struct sysport, post),
    STATE_FIELD(struct sysport, delay),
    STATE_HOST(struct sysport, env),
    STATE_HOST(struct sysport, a20),
    STATE_HOST(struct sysport, power),
    STATE_HOST(struct sysport, range),
    STATE_HOST(struct sysport, nranges),
};

static const struct state_desc sysport_state = {
    .name = "sysport",
    .version = 1,
    .struct_size = sizeof(struct sysport),
    .fields = sysport_fields,
    .nfields = ARRAY_SIZE(sysport_fields),
    .loaded = sysport_loaded,
};

static void sysport_reset(struct device *dev)
{
    struct sysport *s = container_of(dev, struct sysport, dev);

    device_lock(dev);
    s->port_92 = s->reset_control = s->post = s->delay = 0;
    a20_gate_set(s->a20, A20_PORT_92, false);
    device_unlock(dev);
}

static void sysport_destroy(struct device *dev)
{
    struct sysport *s = container_of(dev, struct sysport, dev);

    while (s->nranges > 0)
        io_bus_remove(s->env.ports, &s->range[--s->nranges]);
    pthread_mutex_destroy(&dev->lock);
    free(s);
}

static const struct device_ops sysport_ops = {
    .reset = sysport_reset,
    .destroy = sysport_destroy,
};

static const struct io_ops range_ops[RANGES] = {
    [RANGE_PORT_92] = {.read = port_92_read, .write = port_92_write, .max_size = 1},
    [RANGE_RESET] = {.read = reset_control_read, .write = reset_control_write, .max_size = 1},
    [RANGE_POST] = {.read = post_read, .write = post_write, .max_size = 1},
    [RANGE_DELAY] = {.read = delay_read, .write = delay_write, .max_size = 1},
    [RANGE_DEBUG_EXIT] = {.read = debug_exit_read, .write = debug_exit_write, .max_size = 1},
};

struct sysport *sysport_create(const struct device_env *env, const struct sysport_config *cfg,
                               struct error *err)
{
    static const char *const names[RANGES] = {"port 92", "reset control", "POST", "delay",
                                              "debug exit"};
    const u16 bases[RANGES] = {PORT_FAST_A20, PORT_RESET, PORT_POST, PORT_DELAY,
                               cfg->debug_exit_port};
    unsigned wanted = cfg->debug_exit_port ? RANGES : RANGE_DEBUG_EXIT;
    struct sysport *s = calloc(1, sizeof(*s));

    if (!s) {
        error_host(err, ENOMEM, "system ports");
        return NULL;
    }
    device_init(&s->dev, "sysport", &sysport_ops, &sysport_state);
    s->env = *env;
    s->a20 = cfg->a20;
    s->power = cfg->power;
    for (; s->nranges < wanted; s->nranges++) {
        s->range[s->nranges] = (struct io_range){
            .name = names[s->nranges],
            .base = bases[s->nranges],
            .size = 1,
            .ops = &range_ops[s->nranges],
            .opaque = s,
        };
        if (s->nranges == RANGE_RESET && cfg->reset_in_bridge)
            continue;
        if (io_bus_add(env->ports, &s->range[s->nranges], err) < 0) {
            sysport_destroy(&s->dev);
            return NULL;
        }
    }
    sysport_reset(&s->dev);
    return s;
}

struct device *sysport_device(struct sysport *s)
{
    return &s->dev;
}
