/*
 * The high precision event timer.
 *
 * 1. The counter. `base` is its value at VM time `base_ns`; while it runs it has advanced by
 *    (now - base_ns) / 10 ticks since: the elapsed ticks. While it is halted nothing has elapsed.
 *
 * 2. When timers match. Each timer keeps `due`: the number of elapsed ticks at its next match, or
 *    NEVER. Elapsed ticks don't wrap in the life of a machine, so "has it matched?" is one
 *    comparison, whatever the counter's own value and width. hpet_schedule computes `due` from the
 *    comparator, after a write to it, to the counter or to a timer's mode; hpet_catch_up passes the
 *    matches that lie in the past, moves the accumulator of a periodic timer, and finds the next
 *    `due`.
 *
 * 3. Catching up happens at every register access, before it, and in the host timer's callback. So
 *    a guest that reads registers sees them as hardware would have them, however late the host is.
 *    A host timer is armed only for timers that may interrupt.
 *
 * 4. Matches that were missed while the host was late count as one interrupt. A period below
 *    HPET_MIN_PERIOD, which the ACPI table gives as the limit, is served no more often than that
 *    limit, so that a guest can't keep the event loop busy.
 *
 * 5. Interrupts (2.3.6, 2.3.8). An edge is sent at the match. A level sets the timer's status bit,
 *    even while its interrupts are off, and the line follows the status bit; hpet_update_lines
 *    derives all levels from the registers after every change. FSB messages take the place of
 *    edges, before any line. With the legacy route on, timers 0 and 1 use ISA interrupts 0 and 8,
 *    whatever their route fields say.
 */
#include "device/hpet.h"

#include "host/log.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

/* Registers (2.3.1), as 64-bit words. */
#define HPET_CAP 0x000
#define HPET_CFG 0x010
#define HPET_STS 0x020
#define HPET_COUNTER 0x0f0
#define HPET_TIMER_BASE 0x100
#define HPET_TIMER_STRIDE 0x20
#define HPET_TIMER_CFG 0x00
#define HPET_TIMER_CMP 0x08
#define HPET_TIMER_FSB 0x10

#define CFG_ENABLE BIT(0)
#define CFG_LEG_RT BIT(1)

#define TN_INT_TYPE_LEVEL BIT(1)
#define TN_INT_ENB BIT(2)
#define TN_TYPE_PERIODIC BIT(3)
#define TN_PER_INT_CAP BIT(4)
#define TN_SIZE_CAP BIT(5)
#define TN_VAL_SET BIT(6)
#define TN_32MODE BIT(8)
#define TN_INT_ROUTE_SHIFT 9
#define TN_INT_ROUTE (0x1fULL << TN_INT_ROUTE_SHIFT)
#define TN_FSB_EN BIT(14)
#define TN_FSB_CAP BIT(15)
#define TN_ROUTE_CAP_SHIFT 32
#define TN_WRITABLE                                                                                \
    (TN_INT_TYPE_LEVEL | TN_INT_ENB | TN_TYPE_PERIODIC | TN_VAL_SET | TN_32MODE | TN_INT_ROUTE |   \
     TN_FSB_EN)

#define FS_PER_NS 1000000ULL
#define NEVER UINT64_MAX
#define ROUTE_NONE 0

/* As on ICH9: any timer may use the last four inputs, timer 2 also input 11. */
static const u32 route_cap[HPET_TIMERS] = {0x00f00000, 0x00f00000, 0x00f00800};

struct hpet_timer {
    u64 config; /* the writable bits and the route; capabilities are added on reading */
    u64 cmp;    /* the comparator: in periodic mode the accumulator */
    u64 period; /* what software last wrote to the comparator */
    u64 fsb;    /* message data in the low half, address in the high half */
    u64 due;    /* elapsed ticks at the next match */
};

struct hpet {
    struct device dev;
    struct io_bus *mmio;
    struct vm_clock *clock;
    struct io_range range;
    struct vm_timer timer;
    struct irq_line pins[HPET_PINS];
    struct irq_line legacy[2];
    struct msi_sink msi;
    void (*legacy_route)(void *opaque, bool on);
    void *opaque;

    u64 config;
    u64 base, base_ns;
    u32 status;
    struct hpet_timer timers[HPET_TIMERS];
};

static bool hpet_enabled(const struct hpet *h)
{
    return h->config & CFG_ENABLE;
}

static u64 hpet_elapsed(struct hpet *h)
{
    return hpet_enabled(h) ? (vm_clock_now(h->clock) - h->base_ns) / HPET_PERIOD_NS : 0;
}

static u64 saturating_add(u64 a, u64 b)
{
    return b > UINT64_MAX - a ? UINT64_MAX : a + b;
}

static u64 timer_width_mask(const struct hpet_timer *t)
{
    return t->config & TN_32MODE ? 0xffffffffULL : UINT64_MAX;
}

static bool timer_is_periodic(const struct hpet_timer *t)
{
    return (t->config & TN_TYPE_PERIODIC) && (t->period & timer_width_mask(t));
}

/* The line that timer n uses, or NULL when the guest has routed it to none. */
static struct irq_line *timer_line(struct hpet *h, unsigned n)
{
    unsigned route = (h->timers[n].config & TN_INT_ROUTE) >> TN_INT_ROUTE_SHIFT;

    if ((h->config & CFG_LEG_RT) && n < ARRAY_SIZE(h->legacy))
        return &h->legacy[n];
    return route < HPET_PINS && (route_cap[n] & BIT(route)) ? &h->pins[route] : NULL;
}

/* Timers that share a line are ORed. An edge that was sent left its line low. */
static void hpet_derive_levels(struct hpet *h, bool pins[HPET_PINS], bool legacy[2])
{
    memset(pins, 0, HPET_PINS * sizeof(*pins));
    memset(legacy, 0, 2 * sizeof(*legacy));
    for (unsigned n = 0; n < HPET_TIMERS; n++) {
        u64 config = h->timers[n].config;
        struct irq_line *line = timer_line(h, n);

        if (!line || !hpet_enabled(h) || !(h->status & BIT(n)) || !(config & TN_INT_ENB) ||
            !(config & TN_INT_TYPE_LEVEL))
            continue;
        if (line >= h->pins && line < h->pins + HPET_PINS)
            pins[line - h->pins] = true;
        else
            legacy[line - h->legacy] = true;
    }
}

static void hpet_update_lines(struct hpet *h)
{
    bool pins[HPET_PINS], legacy[2];

    hpet_derive_levels(h, pins, legacy);
    for (unsigned i = 0; i < HPET_PINS; i++)
        irq_line_set(&h->pins[i], pins[i]);
    for (unsigned i = 0; i < ARRAY_SIZE(h->legacy); i++)
        irq_line_set(&h->legacy[i], legacy[i]);
}

static void hpet_match(struct hpet *h, unsigned n)
{
    struct hpet_timer *t = &h->timers[n];

    if (t->config & TN_INT_TYPE_LEVEL) {
        h->status |= BIT(n);
        hpet_update_lines(h);
    } else if (t->config & TN_INT_ENB) {
        struct irq_line *line = timer_line(h, n);
        if (t->config & TN_FSB_EN)
            msi_deliver(&h->msi, t->fsb >> 32, t->fsb);
        else if (line && !line->level)
            irq_line_pulse(line);
    }
}

/*
 * The counter has reached t->due: moves the accumulator and finds the next match after `elapsed`.
 */
static void timer_advance(struct hpet_timer *t, u64 elapsed)
{
    u64 step = timer_width_mask(t);

    if (timer_is_periodic(t)) {
        u64 period = t->period & step;
        u64 periods = (elapsed - t->due) / period + 1;
        t->cmp = (t->cmp + periods * period) & step;
        t->due = saturating_add(t->due, periods * period);
    } else if (t->config & TN_32MODE) {
        u64 wraps =
            ((elapsed - t->due) >> 32) + 1; /* it matches again each time the counter wraps */
        t->due = saturating_add(t->due, wraps << 32);
    } else {
        t->due = NEVER;
    }
}

static void hpet_catch_up(struct hpet *h)
{
    u64 elapsed = hpet_elapsed(h);

    if (!hpet_enabled(h))
        return;
    for (unsigned n = 0; n < HPET_TIMERS; n++) {
        if (h->timers[n].due > elapsed)
            continue;
        timer_advance(&h->timers[n], elapsed);
        hpet_match(h, n);
    }
}

/* Finds the next match of a timer whose comparator, mode, or counter has changed. */
static void hpet_schedule(struct hpet *h, unsigned n)
{
    struct hpet_timer *t = &h->timers[n];
    u64 elapsed = hpet_elapsed(h);

    t->due = hpet_enabled(h)
                 ? saturating_add(elapsed, (t->cmp - (h->base + elapsed)) & timer_width_mask(t))
                 : NEVER;
}

static void hpet_schedule_all(struct hpet *h)
{
    for (unsigned n = 0; n < HPET_TIMERS; n++)
        hpet_schedule(h, n);
}

static bool timer_may_interrupt(const struct hpet *h, unsigned n)
{
    const struct hpet_timer *t = &h->timers[n];
    bool raised = (t->config & TN_INT_TYPE_LEVEL) && (h->status & BIT(n));

    return (t->config & TN_INT_ENB) && t->due != NEVER && !raised;
}

static void hpet_arm(struct hpet *h)
{
    u64 elapsed = hpet_elapsed(h);
    u64 first = NEVER;

    for (unsigned n = 0; n < HPET_TIMERS; n++) {
        const struct hpet_timer *t = &h->timers[n];
        u64 due = t->due;

        if (!timer_may_interrupt(h, n))
            continue;
        if (timer_is_periodic(t) && (t->period & timer_width_mask(t)) < HPET_MIN_PERIOD)
            due = MAX(due, elapsed + HPET_MIN_PERIOD);
        first = MIN(first, due);
    }
    if (hpet_enabled(h) && first < (UINT64_MAX - h->base_ns) / HPET_PERIOD_NS)
        vm_timer_arm(&h->timer, h->base_ns + first * HPET_PERIOD_NS);
    else
        vm_timer_cancel(&h->timer);
}

static void hpet_timer_fired(void *opaque)
{
    struct hpet *h = opaque;

    device_lock(&h->dev);
    hpet_catch_up(h);
    hpet_arm(h);
    device_unlock(&h->dev);
}

static void hpet_set_counter(struct hpet *h, u64 value)
{
    h->base = value;
    h->base_ns = vm_clock_now(h->clock);
    hpet_schedule_all(h);
}

static void hpet_write_config(struct hpet *h, u64 value)
{
    u64 changed = (value ^ h->config) & (CFG_ENABLE | CFG_LEG_RT);

    if (changed & CFG_ENABLE) {
        u64 counter = h->base + hpet_elapsed(h);
        h->config ^= CFG_ENABLE;
        hpet_set_counter(h, counter);
    }
    if (changed & CFG_LEG_RT) {
        h->config ^= CFG_LEG_RT;
        if (h->legacy_route)
            h->legacy_route(h->opaque, h->config & CFG_LEG_RT);
    }
}

/* A route that the timer can't take doesn't stick: software reads back to see (2.3.8). */
static void timer_write_config(struct hpet *h, unsigned n, u64 value)
{
    struct hpet_timer *t = &h->timers[n];
    u64 old = t->config;
    u64 config = value & TN_WRITABLE;

    if (!(route_cap[n] & BIT((config & TN_INT_ROUTE) >> TN_INT_ROUTE_SHIFT)))
        config = (config & ~TN_INT_ROUTE) | (old & TN_INT_ROUTE);
    if (!(config & TN_TYPE_PERIODIC))
        config &= ~TN_VAL_SET;
    t->config = config;
    if (!(config & TN_INT_TYPE_LEVEL))
        h->status &= ~BIT(n);
    if (config & TN_32MODE) {
        t->cmp &= 0xffffffff;
        t->period &= 0xffffffff;
    }
    if ((config ^ old) & (TN_32MODE | TN_TYPE_PERIODIC))
        hpet_schedule(h, n);
}

/* Bytes of `old` replaced by the dword or quadword that was written. */
static u64 merge(u64 old, u64 value, unsigned shift, unsigned size)
{
    u64 mask = (size == 8 ? UINT64_MAX : 0xffffffffULL) << shift;

    return (old & ~mask) | (value << shift & mask);
}

/*
 * In periodic mode a write sets the period, and with VAL_SET, which clears itself, the accumulator
 * too (2.3.9.2.2): a 32-bit program sets VAL_SET anew before it writes the upper half.
 */
static void timer_write_cmp(struct hpet *h, unsigned n, u64 value, unsigned shift, unsigned size)
{
    struct hpet_timer *t = &h->timers[n];

    if (!(t->config & TN_TYPE_PERIODIC) || (t->config & TN_VAL_SET)) {
        t->cmp = merge(t->cmp, value, shift, size) & timer_width_mask(t);
        hpet_schedule(h, n);
    }
    t->period = merge(t->period, value, shift, size) & timer_width_mask(t);
    t->config &= ~TN_VAL_SET;
}

static u64 timer_read(const struct hpet *h, unsigned n, u64 reg)
{
    const struct hpet_timer *t = &h->timers[n];

    switch (reg) {
    case HPET_TIMER_CFG:
        return (t->config & ~TN_VAL_SET) | TN_PER_INT_CAP | TN_SIZE_CAP | TN_FSB_CAP |
               (u64)route_cap[n] << TN_ROUTE_CAP_SHIFT;
    case HPET_TIMER_CMP:
        return t->cmp;
    case HPET_TIMER_FSB:
        return t->fsb;
    default:
        return 0;
    }
}

static u64 hpet_read_word(struct hpet *h, u64 reg)
{
    switch (reg) {
    case HPET_CAP:
        return HPET_CAP_ID | HPET_PERIOD_NS * FS_PER_NS << 32;
    case HPET_CFG:
        return h->config;
    case HPET_STS:
        return h->status;
    case HPET_COUNTER:
        return h->base + hpet_elapsed(h);
    case HPET_TIMER_BASE ... HPET_TIMER_BASE + HPET_TIMERS *HPET_TIMER_STRIDE - 1:
        return timer_read(h, (reg - HPET_TIMER_BASE) / HPET_TIMER_STRIDE, reg % HPET_TIMER_STRIDE);
    default:
        return 0;
    }
}

static void timer_write(struct hpet *h, u64 reg, u64 value, unsigned shift, unsigned size)
{
    unsigned n = (reg - HPET_TIMER_BASE) / HPET_TIMER_STRIDE;

    switch (reg % HPET_TIMER_STRIDE) {
    case HPET_TIMER_CFG:
        timer_write_config(h, n, merge(h->timers[n].config, value, shift, size));
        break;
    case HPET_TIMER_CMP:
        timer_write_cmp(h, n, value, shift, size);
        break;
    case HPET_TIMER_FSB:
        h->timers[n].fsb = merge(h->timers[n].fsb, value, shift, size);
        break;
    }
}

static void hpet_write_word(struct hpet *h, u64 reg, u64 value, unsigned shift, unsigned size)
{
    switch (reg) {
    case HPET_CFG:
        hpet_write_config(h, merge(h->config, value, shift, size));
        break;
    case HPET_STS:
        h->status &= ~merge(0, value, shift, size);
        break;
    case HPET_COUNTER:
        hpet_set_counter(h, merge(h->base + hpet_elapsed(h), value, shift, size));
        break;
    case HPET_TIMER_BASE ... HPET_TIMER_BASE + HPET_TIMERS *HPET_TIMER_STRIDE - 1:
        timer_write(h, reg, value, shift, size);
        break;
    }
}

static u64 hpet_read(void *opaque, u64 offset, unsigned size)
{
    struct hpet *h = opaque;

    device_lock(&h->dev);
    hpet_catch_up(h);
    u64 value = hpet_read_word(h, offset & ~7ULL) >> 8 * (offset & 7);
    device_unlock(&h->dev);
    return size == 8 ? value : value & (BIT(8 * size) - 1);
}

/* The specification has aligned dword and quadword accesses only; others write nothing. */
static void hpet_write(void *opaque, u64 offset, u64 value, unsigned size)
{
    struct hpet *h = opaque;

    if (size < 4 || offset & (size - 1)) {
        log_once(LOG_DEBUG, "hpet: write of %u bytes at %#llx ignored", size,
                 (unsigned long long)offset);
        return;
    }
    device_lock(&h->dev);
    hpet_catch_up(h);
    hpet_write_word(h, offset & ~7ULL, value, 8 * (offset & 7), size);
    hpet_catch_up(h); /* a comparator that equals the counter matches at once */
    hpet_update_lines(h);
    hpet_arm(h);
    device_unlock(&h->dev);
}

static const struct io_ops hpet_io_ops = {
    .read = hpet_read,
    .write = hpet_write,
    .max_size = 8,
};

static void hpet_reset(struct device *dev)
{
    struct hpet *h = container_of(dev, struct hpet, dev);

    device_lock(dev);
    hpet_write_config(h, 0);
    h->status = 0;
    for (unsigned n = 0; n < HPET_TIMERS; n++)
        h->timers[n] = (struct hpet_timer){.cmp = UINT64_MAX};
    hpet_set_counter(h, 0);
    hpet_update_lines(h);
    hpet_arm(h);
    device_unlock(dev);
}

static void hpet_destroy(struct device *dev)
{
    struct hpet *h = container_of(dev, struct hpet, dev);

    io_bus_remove(h->mmio, &h->range);
    vm_timer_destroy(&h->timer);
    pthread_mutex_destroy(&dev->lock);
    free(h);
}

static int timer_check(const struct hpet *h, unsigned n)
{
    const struct hpet_timer *t = &h->timers[n];
    unsigned route = (t->config & TN_INT_ROUTE) >> TN_INT_ROUTE_SHIFT;

    if ((t->config & ~TN_WRITABLE) || (route != ROUTE_NONE && !(route_cap[n] & BIT(route))))
        return -EINVAL;
    return (t->cmp | t->period) & ~timer_width_mask(t) ? -EINVAL : 0;
}

/*
 * Levels are derived; what hangs on the lines restores its own inputs, so only the board is told,
 * of the legacy route. The clock has been set before: a base in its future would make elapsed ticks
 * wrap.
 */
static int hpet_loaded(void *obj, struct error *err)
{
    struct hpet *h = obj;
    bool pins[HPET_PINS], legacy[2];

    if ((h->config & ~(CFG_ENABLE | CFG_LEG_RT)) || (h->status >> HPET_TIMERS))
        return error_input(err, "hpet: saved configuration or status has reserved bits set");
    if (h->base_ns > vm_clock_now(h->clock))
        return error_input(err, "hpet: saved counter starts after the VM clock's present time");
    for (unsigned n = 0; n < HPET_TIMERS; n++)
        if (timer_check(h, n) < 0)
            return error_input(err, "hpet: saved registers of timer %u are impossible", n);

    hpet_derive_levels(h, pins, legacy);
    for (unsigned i = 0; i < HPET_PINS; i++)
        h->pins[i].level = pins[i];
    for (unsigned i = 0; i < ARRAY_SIZE(h->legacy); i++)
        h->legacy[i].level = legacy[i];
    if (h->legacy_route)
        h->legacy_route(h->opaque, h->config & CFG_LEG_RT);
    hpet_arm(h);
    return 0;
}

static const struct state_field hpet_timer_fields[] = {
    STATE_FIELD(struct hpet_timer, config), STATE_FIELD(struct hpet_timer, cmp),
    STATE_FIELD(struct hpet_timer, period), STATE_FIELD(struct hpet_timer, fsb),
    STATE_FIELD(struct hpet_timer, due),
};

static const struct state_desc hpet_timer_state =
    STATE_DESC("hpet_timer", 1, struct hpet_timer, hpet_timer_fields);

static const struct state_field hpet_fields[] = {
    STATE_HOST(struct hpet, dev),
    STATE_HOST(struct hpet, mmio),
    STATE_HOST(struct hpet, clock),
    STATE_HOST(struct hpet, range),
    STATE_HOST(struct hpet, timer),
    STATE_HOST(struct hpet, pins),
    STATE_HOST(struct hpet, legacy),
    STATE_HOST(struct hpet, msi),
    STATE_HOST(struct hpet, legacy_route),
    STATE_HOST(struct hpet, opaque),
    STATE_FIELD(struct hpet, config),
    STATE_FIELD(struct hpet, base),
    STATE_FIELD(struct hpet, base_ns),
    STATE_FIELD(struct hpet, status),
    STATE_STRUCTS(struct hpet, timers, &hpet_timer_state),
};

static const struct state_desc hpet_state = {
    .name = "hpet",
    .version = 1,
    .struct_size = sizeof(struct hpet),
    .fields = hpet_fields,
    .nfields = ARRAY_SIZE(hpet_fields),
    .loaded = hpet_loaded,
};

static const struct device_ops hpet_ops = {
    .reset = hpet_reset,
    .destroy = hpet_destroy,
};

struct hpet *hpet_create(const struct device_env *env, const struct hpet_config *cfg,
                         struct error *err)
{
    struct hpet *h = calloc(1, sizeof(*h));

    if (!h) {
        error_host(err, ENOMEM, "hpet");
        return NULL;
    }
    device_init(&h->dev, "hpet", &hpet_ops, &hpet_state);
    h->mmio = env->mmio;
    h->clock = env->clock;
    memcpy(h->pins, cfg->pins, sizeof(h->pins));
    memcpy(h->legacy, cfg->legacy, sizeof(h->legacy));
    h->msi = cfg->msi;
    h->legacy_route = cfg->legacy_route;
    h->opaque = cfg->opaque;
    h->range = (struct io_range){
        .name = "hpet",
        .base = cfg->base,
        .size = HPET_SIZE,
        .ops = &hpet_io_ops,
        .opaque = h,
    };
    vm_timer_init(&h->timer, h->clock, hpet_timer_fired, h);
    hpet_reset(&h->dev);
    if (io_bus_add(h->mmio, &h->range, err) < 0) {
        vm_timer_destroy(&h->timer);
        pthread_mutex_destroy(&h->dev.lock);
        free(h);
        return NULL;
    }
    return h;
}

struct device *hpet_device(struct hpet *h)
{
    return &h->dev;
}
