/*
 * The 8254. Modes and commands: Intel 8254 data sheet (order 231164-005); port 0x61: Intel ICH data sheets,
 * "NMI Status and Control Register".
 *
 * Nothing counts here. A channel remembers the PIT clock tick at which its counting element was loaded and
 * with what; count and output at any tick follow by arithmetic. All six modes fit one picture:
 *
 *     start     the tick at which the element held `n` (a write takes effect one tick later)
 *     n         what was loaded: 1 to 65536, or to 10000 in BCD
 *     counting  it has been loaded, and if its mode wants a trigger, triggered
 *     held      elapsed ticks when something stopped it (modes 0 and 4), while `paused`
 *     next_n    written but not yet loaded, 0: none. Modes 2 and 3 load it at tick `switch_at`, the end
 *               of the period (of the half period, in mode 3), the others by the next trigger.
 *
 * settle() brings a channel up to date with the clock by carrying out a pending change of period; it
 * comes first in every operation.
 *
 * Channel 0's interrupt is the rising edge of OUT. The timer is armed for the next edge, reckoned from
 * `start`, so that no error adds up. Edges that passed while the host was late are one interrupt, as
 * they are for a guest that was away: the 8259A holds one request. And edges closer together than
 * MIN_EDGE_NS are thinned out: no processor could serve them.
 */
#include "device/pit.h"

#include "machine/layout.h"

#include <errno.h>
#include <stdlib.h>

#define MIN_EDGE_NS 10000
#define REFRESH_TOGGLE_NS 15085 /* DRAM refresh: channel 1 at its customary count of 18 */

enum { CHANNELS = 3, SPEAKER = 2 };

enum {
    MODE_TERMINAL_COUNT = 0,
    MODE_ONE_SHOT = 1,
    MODE_RATE = 2,
    MODE_SQUARE = 3,
    MODE_SOFT_STROBE = 4,
    MODE_HARD_STROBE = 5,
};

/* The control word: SC 7:6, RW 5:4, M 3:1, BCD 0. */
enum { RW_LATCH = 0, RW_LSB = 1, RW_MSB = 2, RW_WORD = 3 };
enum { SC_READ_BACK = 3 };
enum { CONTROL_BCD = 0x01 };
enum { READ_BACK_NO_COUNT = 0x20, READ_BACK_NO_STATUS = 0x10 };
enum { STATUS_OUT = 0x80, STATUS_NULL_COUNT = 0x40 };

enum {
    PORT_B_GATE2 = 0x01,
    PORT_B_SPEAKER = 0x02,
    PORT_B_WRITABLE = 0x0f, /* and the enables of parity and channel check */
    PORT_B_REFRESH = 0x10,
    PORT_B_OUT2 = 0x20,
};

struct pit_channel {
    s64 start; /* may lie before the clock's 0 */
    s64 held;
    s64 switch_at;
    u32 n;
    u32 next_n;
    u16 latched_count;
    u8 control;       /* RW, M and BCD as they were written */
    u8 count_lsb;     /* first half of a two-byte count */
    u8 latched_bytes; /* bytes of latched_count still to be read */
    u8 latched_status;
    bool status_latched;
    bool write_msb; /* RW_WORD: the next write is the MSB */
    bool read_msb;
    bool counting;
    bool paused;
    bool gate;
};

struct pit {
    struct device dev;
    struct pit_channel ch[CHANNELS];
    s64 edge_at; /* tick of the next rising edge of OUT 0 to report; INT64_MAX: none */
    u8 port_b;
    bool
        line; /* OUT 0 as the interrupt line shows it: the falling half of a period may be missing */

    struct device_env env;
    struct irq_line irq;
    struct io_range range;
    struct io_range port_b_range;
    struct vm_timer timer;
};

static s64 ticks_now(struct pit *pit)
{
    return (s64)clock_ns_to_ticks(vm_clock_now(pit->env.clock), PIT_HZ);
}

static unsigned mode_of(const struct pit_channel *c)
{
    unsigned mode = c->control >> 1 & 7;

    return mode > MODE_HARD_STROBE ? mode - 4 : mode; /* 6 and 7 are 2 and 3 */
}

static unsigned rw_of(const struct pit_channel *c)
{
    return c->control >> 4 & 3;
}

static u32 modulus(const struct pit_channel *c)
{
    return c->control & CONTROL_BCD ? 10000 : 0x10000;
}

static bool periodic(const struct pit_channel *c)
{
    return mode_of(c) == MODE_RATE || mode_of(c) == MODE_SQUARE;
}

static bool triggered(const struct pit_channel *c)
{
    return mode_of(c) == MODE_ONE_SHOT || mode_of(c) == MODE_HARD_STROBE;
}

/* Ticks since the load; 0 while it is still to come. */
static s64 elapsed(const struct pit_channel *c, s64 now)
{
    if (c->paused)
        return c->held;
    return now > c->start ? now - c->start : 0;
}

/* How long a square wave stays high: the longer half of an odd count. */
static u32 high_ticks(const struct pit_channel *c, u32 n)
{
    return mode_of(c) == MODE_SQUARE ? (n + 1) / 2 : n;
}

static void settle(struct pit_channel *c, s64 now)
{
    if (!periodic(c) || !c->counting || !c->next_n || now < c->switch_at)
        return;
    /* After a high half the new count begins with its low half. */
    bool starts_low = (c->switch_at - c->start) % c->n != 0;

    c->start = c->switch_at - (starts_low ? high_ticks(c, c->next_n) : 0);
    c->n = c->next_n;
    c->next_n = 0;
}

static bool channel_out(const struct pit_channel *c, s64 now)
{
    s64 t = elapsed(c, now);

    switch (mode_of(c)) {
    case MODE_TERMINAL_COUNT:
        return c->counting && t >= c->n;
    case MODE_ONE_SHOT:
        return !c->counting || now < c->start || t >= c->n;
    case MODE_RATE:
        return !c->counting || t % c->n != c->n - 1;
    case MODE_SQUARE:
        return !c->counting || t % c->n < high_ticks(c, c->n);
    default: /* the strobes: low for one tick at terminal count */
        return !c->counting || t != c->n;
    }
}

/* The counting element, as a latch command freezes it. */
static u16 channel_count(const struct pit_channel *c, s64 now)
{
    s64 t = elapsed(c, now), value = c->n;

    if (!c->counting) {
        value = c->n;
    } else if (mode_of(c) == MODE_RATE) {
        value = c->n - t % c->n;
    } else if (mode_of(c) == MODE_SQUARE) {
        /* Down by two in either half; an odd count starts from one less. */
        s64 phase = t % c->n;
        if (phase >= high_ticks(c, c->n))
            phase -= high_ticks(c, c->n);
        value = (c->n & ~1U) - 2 * phase;
    } else {
        /* After terminal count it goes on from the top. */
        value = (c->n - t) % (s64)modulus(c);
        if (value < 0)
            value += modulus(c);
    }
    value %= modulus(c);
    if (c->control & CONTROL_BCD) {
        value = value % 10 | value / 10 % 10 << 4 | value / 100 % 10 << 8 | value / 1000 << 12;
    }
    return (u16)value;
}

/* The first tick after `after` at which OUT rises; INT64_MAX: none to come as things are. */
static s64 next_rising_edge(const struct pit_channel *c, s64 after)
{
    if (!c->counting || c->paused)
        return INT64_MAX;
    if (periodic(c)) {
        s64 k = after < c->start ? 1 : (after - c->start) / c->n + 1;
        s64 edge = c->start + k * c->n;

        /* A pending count moves the next edge of a square wave when it takes over halfway. */
        if (c->next_n && mode_of(c) == MODE_SQUARE && c->switch_at < edge)
            edge = c->switch_at + c->next_n / 2;
        return edge;
    }
    s64 edge = c->start + c->n;
    if (mode_of(c) == MODE_SOFT_STROBE || mode_of(c) == MODE_HARD_STROBE)
        edge++;
    return edge > after ? edge : INT64_MAX;
}

static void set_line(struct pit *pit, bool level)
{
    pit->line = level;
    irq_line_set(&pit->irq, level);
}

/* Arms the timer for channel 0's next edge after `after`. */
static void schedule(struct pit *pit, s64 after)
{
    pit->edge_at = next_rising_edge(&pit->ch[0], after);
    if (pit->edge_at == INT64_MAX)
        vm_timer_cancel(&pit->timer);
    else
        vm_timer_arm(&pit->timer, clock_ticks_to_ns((u64)pit->edge_at, PIT_HZ));
}

/* Reports an edge of channel 0 that is due. */
static void report_edge(struct pit *pit, s64 now)
{
    if (now < pit->edge_at)
        return;
    set_line(pit, false);
    set_line(pit, true);
    schedule(pit, now + (s64)clock_ns_to_ticks(MIN_EDGE_NS, PIT_HZ));
}

static void timer_fired(void *opaque)
{
    struct pit *pit = opaque;

    device_lock(&pit->dev);
    s64 now = ticks_now(pit);
    settle(&pit->ch[0], now);
    report_edge(pit, now);
    if (pit->edge_at != INT64_MAX)
        vm_timer_arm(&pit->timer, clock_ticks_to_ns((u64)pit->edge_at, PIT_HZ));
    device_unlock(&pit->dev);
}

/* Brings a channel to `now` before an access; edges that the timer was late for go out first. */
static struct pit_channel *current(struct pit *pit, unsigned i, s64 now)
{
    settle(&pit->ch[i], now);
    if (i == 0)
        report_edge(pit, now);
    return &pit->ch[i];
}

/* After a change of channel i: OUT as it is now, and the edge to wait for. */
static void changed(struct pit *pit, unsigned i, s64 now)
{
    if (i != 0)
        return;
    set_line(pit, channel_out(&pit->ch[0], now));
    schedule(pit, now);
}

static void load(struct pit_channel *c, u32 n, s64 start)
{
    c->n = n;
    c->next_n = 0;
    c->start = start;
    c->counting = true;
    c->paused = !c->gate && !triggered(c) && !periodic(c);
    c->held = 0;
}

static u32 count_from_written(const struct pit_channel *c, u16 raw)
{
    u32 n = raw;

    if (c->control & CONTROL_BCD)
        n = (raw & 15) + (raw >> 4 & 15) * 10 + (raw >> 8 & 15) * 100 + (raw >> 12) * 1000;
    /* Digits above 9 can ask for more than the counter holds. */
    n %= modulus(c);
    return n ? n : modulus(c);
}

static void write_count(struct pit_channel *c, u16 raw, s64 now)
{
    u32 n = count_from_written(c, raw);

    if (triggered(c)) {
        c->next_n = n;
    } else if (!periodic(c)) {
        load(c, n, now + 1);
    } else if (!c->counting) {
        /* The gate starts it, when it is low now. */
        if (c->gate)
            load(c, n, now + 1);
        else
            c->next_n = n;
    } else {
        s64 t = elapsed(c, now);
        s64 period = c->start + t / c->n * c->n;

        c->next_n = n;
        c->switch_at = period + (t % c->n < high_ticks(c, c->n) ? high_ticks(c, c->n) : c->n);
    }
}

static void write_data(struct pit_channel *c, u8 value, s64 now)
{
    switch (rw_of(c)) {
    case RW_LSB:
        write_count(c, value, now);
        break;
    case RW_MSB:
        write_count(c, (u16)(value << 8), now);
        break;
    case RW_WORD:
        c->write_msb = !c->write_msb;
        if (!c->write_msb) {
            write_count(c, (u16)(value << 8 | c->count_lsb), now);
            break;
        }
        c->count_lsb = value;
        /* In mode 0 the first byte stops the counting and brings OUT low. */
        if (mode_of(c) == MODE_TERMINAL_COUNT)
            c->counting = false;
        break;
    }
}

static void latch_count(struct pit_channel *c, s64 now)
{
    if (c->latched_bytes)
        return;
    c->latched_count = channel_count(c, now);
    c->latched_bytes = rw_of(c) == RW_WORD ? 2 : 1;
}

static void latch_status(struct pit_channel *c, s64 now)
{
    if (c->status_latched)
        return;
    bool null_count = c->next_n || !c->counting;

    c->latched_status = (c->control & 0x3f) | (null_count ? STATUS_NULL_COUNT : 0) |
                        (channel_out(c, now) ? STATUS_OUT : 0);
    c->status_latched = true;
}

static u8 read_data(struct pit_channel *c, s64 now)
{
    if (c->status_latched) {
        c->status_latched = false;
        return c->latched_status;
    }
    u16 count = c->latched_bytes ? c->latched_count : channel_count(c, now);
    bool msb = rw_of(c) == RW_MSB;

    if (c->latched_bytes)
        c->latched_bytes--;
    if (rw_of(c) == RW_WORD) {
        msb = c->read_msb;
        c->read_msb = !c->read_msb;
    }
    return (u8)(msb ? count >> 8 : count);
}

static void write_mode(struct pit_channel *c, u8 value)
{
    c->control = value & 0x3f;
    c->n = MIN(c->n, modulus(c));
    c->counting = false;
    c->paused = false;
    c->next_n = 0;
    c->latched_bytes = 0;
    c->status_latched = false;
    c->write_msb = false;
    c->read_msb = false;
}

static void write_control(struct pit *pit, u8 value, s64 now)
{
    unsigned select = value >> 6;

    if (select == SC_READ_BACK) {
        for (unsigned i = 0; i < CHANNELS; i++) {
            if (!(value & 2 << i))
                continue;
            struct pit_channel *c = current(pit, i, now);
            if (!(value & READ_BACK_NO_COUNT))
                latch_count(c, now);
            if (!(value & READ_BACK_NO_STATUS))
                latch_status(c, now);
        }
        return;
    }
    struct pit_channel *c = current(pit, select, now);
    if ((value >> 4 & 3) == RW_LATCH) {
        latch_count(c, now);
    } else {
        write_mode(c, value);
        changed(pit, select, now);
    }
}

static void set_gate(struct pit_channel *c, bool level, s64 now)
{
    if (c->gate == level)
        return;
    c->gate = level;
    if (triggered(c)) {
        /* A rising edge loads what was written last, again and again. */
        if (level && (c->next_n || c->counting))
            load(c, c->next_n ? c->next_n : c->n, now + 1);
    } else if (periodic(c)) {
        /* Low stops it with OUT high, and the rise starts a new period. */
        if (!level && c->counting) {
            c->next_n = c->next_n ? c->next_n : c->n;
            c->counting = false;
        } else if (level && c->next_n) {
            load(c, c->next_n, now + 1);
        }
    } else if (c->counting && !level) {
        c->held = elapsed(c, now);
        c->paused = true;
    } else if (c->counting) {
        c->start = now - c->held;
        c->paused = false;
    }
}

static u64 pit_read(void *opaque, u64 offset, unsigned size)
{
    struct pit *pit = opaque;

    if (offset == CHANNELS)
        return 0xff; /* the control word can't be read */
    device_lock(&pit->dev);
    s64 now = ticks_now(pit);
    u8 value = read_data(current(pit, (unsigned)offset, now), now);
    device_unlock(&pit->dev);
    return value;
}

static void pit_write(void *opaque, u64 offset, u64 value, unsigned size)
{
    struct pit *pit = opaque;

    device_lock(&pit->dev);
    s64 now = ticks_now(pit);
    if (offset == CHANNELS) {
        write_control(pit, (u8)value, now);
    } else {
        write_data(current(pit, (unsigned)offset, now), (u8)value, now);
        changed(pit, (unsigned)offset, now);
    }
    device_unlock(&pit->dev);
}

static u64 port_b_read(void *opaque, u64 offset, unsigned size)
{
    struct pit *pit = opaque;

    device_lock(&pit->dev);
    s64 now = ticks_now(pit);
    u8 value = pit->port_b;
    if (vm_clock_now(pit->env.clock) / REFRESH_TOGGLE_NS & 1)
        value |= PORT_B_REFRESH;
    if (channel_out(current(pit, SPEAKER, now), now))
        value |= PORT_B_OUT2;
    device_unlock(&pit->dev);
    return value;
}

static void port_b_write(void *opaque, u64 offset, u64 value, unsigned size)
{
    struct pit *pit = opaque;

    device_lock(&pit->dev);
    s64 now = ticks_now(pit);
    pit->port_b = value & PORT_B_WRITABLE;
    set_gate(current(pit, SPEAKER, now), value & PORT_B_GATE2, now);
    device_unlock(&pit->dev);
}

static const struct state_field channel_fields[] = {
    STATE_FIELD(struct pit_channel, start),
    STATE_FIELD(struct pit_channel, held),
    STATE_FIELD(struct pit_channel, switch_at),
    STATE_FIELD(struct pit_channel, n),
    STATE_FIELD(struct pit_channel, next_n),
    STATE_FIELD(struct pit_channel, latched_count),
    STATE_FIELD(struct pit_channel, control),
    STATE_FIELD(struct pit_channel, count_lsb),
    STATE_FIELD(struct pit_channel, latched_bytes),
    STATE_FIELD(struct pit_channel, latched_status),
    STATE_FIELD(struct pit_channel, status_latched),
    STATE_FIELD(struct pit_channel, write_msb),
    STATE_FIELD(struct pit_channel, read_msb),
    STATE_FIELD(struct pit_channel, counting),
    STATE_FIELD(struct pit_channel, paused),
    STATE_FIELD(struct pit_channel, gate),
};

static const struct state_desc channel_state =
    STATE_DESC("channel", 1, struct pit_channel, channel_fields);

static const struct state_field pit_fields[] = {
    STATE_HOST(struct pit, dev),          STATE_STRUCTS(struct pit, ch, &channel_state),
    STATE_FIELD(struct pit, edge_at),     STATE_FIELD(struct pit, port_b),
    STATE_FIELD(struct pit, line),        STATE_HOST(struct pit, env),
    STATE_HOST(struct pit, irq),          STATE_HOST(struct pit, range),
    STATE_HOST(struct pit, port_b_range), STATE_HOST(struct pit, timer),
};

/* Ticks stay far from overflow: 2^62 of them are 120,000 years. */
static bool plausible_tick(s64 tick)
{
    return tick >= -(s64)BIT(32) && tick < (s64)BIT(62);
}

static int pit_loaded(void *obj, struct error *err)
{
    struct pit *pit = obj;

    for (unsigned i = 0; i < CHANNELS; i++) {
        const struct pit_channel *c = &pit->ch[i];
        if (c->n < 1 || c->n > modulus(c) || c->next_n > modulus(c) || c->latched_bytes > 2 ||
            c->control > 0x3f || !plausible_tick(c->start) || !plausible_tick(c->held) ||
            !plausible_tick(c->switch_at))
            return error_input(err, "pit: impossible state of channel %u", i);
    }
    if (pit->edge_at < 0)
        return error_input(err, "pit: impossible time of the next interrupt");
    if (pit->edge_at == INT64_MAX)
        vm_timer_cancel(&pit->timer);
    else
        vm_timer_arm(&pit->timer, clock_ticks_to_ns((u64)pit->edge_at, PIT_HZ));
    irq_line_set(&pit->irq, pit->line);
    return 0;
}

static const struct state_desc pit_state = {
    .name = "pit",
    .version = 1,
    .struct_size = sizeof(struct pit),
    .fields = pit_fields,
    .nfields = ARRAY_SIZE(pit_fields),
    .loaded = pit_loaded,
};

static void pit_reset(struct device *dev)
{
    struct pit *pit = container_of(dev, struct pit, dev);

    device_lock(dev);
    for (unsigned i = 0; i < CHANNELS; i++) {
        /* The data sheet leaves all undefined until a control word: nothing counts. */
        pit->ch[i] = (struct pit_channel){
            .control = RW_WORD << 4 | MODE_SQUARE << 1,
            .n = 0x10000,
            .gate = i != SPEAKER,
        };
    }
    pit->port_b = 0;
    changed(pit, 0, ticks_now(pit));
    device_unlock(dev);
}

static void pit_destroy(struct device *dev)
{
    struct pit *pit = container_of(dev, struct pit, dev);

    io_bus_remove(pit->env.ports, &pit->port_b_range);
    io_bus_remove(pit->env.ports, &pit->range);
    vm_timer_destroy(&pit->timer);
    pthread_mutex_destroy(&dev->lock);
    free(pit);
}

static const struct device_ops pit_ops = {
    .reset = pit_reset,
    .destroy = pit_destroy,
};

static const struct io_ops pit_io_ops = {
    .read = pit_read,
    .write = pit_write,
    .max_size = 1,
};

static const struct io_ops port_b_io_ops = {
    .read = port_b_read,
    .write = port_b_write,
    .max_size = 1,
};

struct pit *pit_create(const struct device_env *env, const struct pit_config *cfg,
                       struct error *err)
{
    struct pit *pit = calloc(1, sizeof(*pit));

    if (!pit) {
        error_host(err, ENOMEM, "interval timer");
        return NULL;
    }
    device_init(&pit->dev, "pit", &pit_ops, &pit_state);
    pit->env = *env;
    pit->irq = cfg->irq;
    vm_timer_init(&pit->timer, env->clock, timer_fired, pit);
    pit->range = (struct io_range){
        .name = "pit",
        .base = PORT_PIT,
        .size = CHANNELS + 1,
        .ops = &pit_io_ops,
        .opaque = pit,
    };
    pit->port_b_range = (struct io_range){
        .name = "port b",
        .base = PORT_PIT_CONTROL_B,
        .size = 1,
        .ops = &port_b_io_ops,
        .opaque = pit,
    };
    if (io_bus_add(env->ports, &pit->range, err) < 0)
        goto out_free;
    if (io_bus_add(env->ports, &pit->port_b_range, err) < 0)
        goto out_remove;
    pit_reset(&pit->dev);
    return pit;

out_remove:
    io_bus_remove(env->ports, &pit->range);
out_free:
    vm_timer_destroy(&pit->timer);
    pthread_mutex_destroy(&pit->dev.lock);
    free(pit);
    return NULL;
}

struct device *pit_device(struct pit *pit)
{
    return &pit->dev;
}
