/*
 * The MC146818. Registers and behaviour: Motorola MC146818 data sheet (1984); the ports, the NMI mask and the
 * upper bank: Intel ICH data sheets, chapter "Real Time Clock Registers".
 *
 * Guest time is counted in ticks of the chip's 32768 Hz crystal since 1970-01-01 00:00 of whatever zone the
 * guest keeps: the VM's wall clock in ticks plus `offset`. Seconds turn where the count's low 15 bits
 * are zero, and the periodic interrupt comes where some of the low bits are: both fall out of one number,
 * as they fall out of one divider chain in the chip.
 *
 * While the guest holds the clock (register B's SET, or the divider in reset) the time registers stand
 * still in cmos[]; letting go computes a new offset from them. SET leaves the divider running, so the
 * fraction of the second goes on; a divider let out of reset starts half a second before its first
 * update.
 *
 * Flags of register C are gathered lazily: `seen` is the tick up to which they are right, and sync()
 * adds what happened since. A timer is armed only while an enabled interrupt has its flag still clear:
 * once the line is up nothing more can happen until the guest reads C, so a guest that is late gets one
 * interrupt and not a burst.
 */
#include "device/rtc.h"

#include "machine/layout.h"

#include <errno.h>
#include <stdlib.h>

#define RTC_HZ 32768
#define CMOS_SIZE 256
#define CMOS_BANK 128
#define SECONDS_PER_DAY 86400
/* UIP rises 244 us before an update, which takes 1984 us. */
#define UPDATE_TICKS 73

enum {
    RTC_SECONDS = 0,
    RTC_SECONDS_ALARM = 1,
    RTC_MINUTES = 2,
    RTC_MINUTES_ALARM = 3,
    RTC_HOURS = 4,
    RTC_HOURS_ALARM = 5,
    RTC_DAY_OF_WEEK = 6,
    RTC_DAY = 7,
    RTC_MONTH = 8,
    RTC_YEAR = 9,
    RTC_A = 10,
    RTC_B = 11,
    RTC_C = 12,
    RTC_D = 13,
};

enum { A_RATE = 0x0f, A_DIVIDER_RESET = 0x60, A_UIP = 0x80 };
enum {
    B_24H = 0x02,
    B_BINARY = 0x04,
    B_UIE = 0x10,
    B_AIE = 0x20,
    B_PIE = 0x40,
    B_SQWE = 0x08,
    B_SET = 0x80,
};
enum { C_UF = 0x10, C_AF = 0x20, C_PF = 0x40, C_IRQF = 0x80, C_FLAGS = 0x70 };
enum { D_VRT = 0x80 };
enum { HOURS_PM = 0x80, ALARM_ANY = 0xc0 };
enum { INDEX_NMI_OFF = 0x80 };

struct rtc {
    struct device dev;
    s64 offset;         /* guest time less wall time, in ticks */
    s64 seen;           /* guest time up to which register C is right */
    u8 cmos[CMOS_SIZE]; /* the time registers are stale while the clock runs */
    u8 index, upper_index;
    bool nmi_off;

    struct device_env env;
    struct irq_line irq;
    struct io_range range, upper_range;
    struct vm_timer timer;
};

struct calendar {
    s64 year;
    unsigned month, day; /* from 1 */
    unsigned hour, minute, second;
    unsigned weekday; /* Sunday is 0 */
};

static s64 floor_div(s64 a, s64 b)
{
    return a / b - (a % b < 0);
}

static s64 ticks_now(struct rtc *r)
{
    return (s64)clock_ns_to_ticks(vm_clock_wall_ns(r->env.clock), RTC_HZ) + r->offset;
}

/* Days since 1970-01-01 in the Gregorian calendar, and back; years begin in March to end in the leap day. */
static s64 days_from_date(s64 year, unsigned month, unsigned day)
{
    year -= month <= 2;
    s64 era = floor_div(year, 400);
    unsigned of_era = (unsigned)(year - era * 400);
    unsigned of_year = (153 * (month + (month > 2 ? -3U : 9U)) + 2) / 5 + day - 1;

    return era * 146097 + of_era * 365 + of_era / 4 - of_era / 100 + of_year - 719468;
}

static void calendar_from_seconds(struct calendar *c, s64 seconds)
{
    s64 days = floor_div(seconds, SECONDS_PER_DAY);
    unsigned in_day = (unsigned)(seconds - days * SECONDS_PER_DAY);
    s64 z = days + 719468;
    s64 era = floor_div(z, 146097);
    unsigned of_era = (unsigned)(z - era * 146097);
    unsigned year = (of_era - of_era / 1460 + of_era / 36524 - of_era / 146096) / 365;
    unsigned of_year = of_era - (365 * year + year / 4 - year / 100);
    unsigned march_month = (5 * of_year + 2) / 153;

    c->day = of_year - (153 * march_month + 2) / 5 + 1;
    c->month = march_month < 10 ? march_month + 3 : march_month - 9;
    c->year = year + era * 400 + (c->month <= 2);
    c->hour = in_day / 3600;
    c->minute = in_day / 60 % 60;
    c->second = in_day % 60;
    c->weekday = (unsigned)(days + 4 - floor_div(days + 4, 7) * 7);
}

static u8 encode(const struct rtc *r, unsigned value)
{
    if (r->cmos[RTC_B] & B_BINARY)
        return (u8)value;
    return (u8)(value / 10 % 10 << 4 | value % 10);
}

/* What the guest wrote, whatever it is, as a number (at most 255). */
static unsigned decode(const struct rtc *r, u8 value)
{
    if (r->cmos[RTC_B] & B_BINARY)
        return value;
    return (value >> 4) * 10U + (value & 15);
}

static u8 encode_hour(const struct rtc *r, unsigned hour)
{
    if (r->cmos[RTC_B] & B_24H)
        return encode(r, hour);
    return encode(r, hour % 12 ? hour % 12 : 12) | (hour >= 12 ? HOURS_PM : 0);
}

static unsigned decode_hour(const struct rtc *r, u8 value)
{
    if (r->cmos[RTC_B] & B_24H)
        return decode(r, value);
    return decode(r, value & ~HOURS_PM) % 12 + (value & HOURS_PM ? 12 : 0);
}

static bool clock_held(const struct rtc *r)
{
    return (r->cmos[RTC_B] & B_SET) || (r->cmos[RTC_A] & A_DIVIDER_RESET) == A_DIVIDER_RESET;
}

/* Brings the time registers up to date. */
static void store_time(struct rtc *r, s64 now)
{
    struct calendar c;

    calendar_from_seconds(&c, floor_div(now, RTC_HZ));
    r->cmos[RTC_SECONDS] = encode(r, c.second);
    r->cmos[RTC_MINUTES] = encode(r, c.minute);
    r->cmos[RTC_HOURS] = encode_hour(r, c.hour);
    r->cmos[RTC_DAY_OF_WEEK] = (u8)(c.weekday + 1);
    r->cmos[RTC_DAY] = encode(r, c.day);
    r->cmos[RTC_MONTH] = encode(r, c.month);
    r->cmos[RTC_YEAR] = encode(r, (unsigned)(c.year - floor_div(c.year, 100) * 100));
    r->cmos[CMOS_CENTURY] = encode(r, (unsigned)floor_div(c.year, 100) & 0xff);
}

/* Makes the time what the registers say, `fraction` ticks into the second. */
static void set_time(struct rtc *r, s64 fraction)
{
    unsigned month = decode(r, r->cmos[RTC_MONTH]);
    s64 year = (s64)decode(r, r->cmos[CMOS_CENTURY]) * 100 + decode(r, r->cmos[RTC_YEAR]);

    /* Nonsense is carried over into the next larger unit. */
    month = month ? month - 1 : 0;
    s64 days = days_from_date(year + month / 12, month % 12 + 1, 1);
    days += (s64)decode(r, r->cmos[RTC_DAY]) - 1;
    s64 seconds = days * SECONDS_PER_DAY + (s64)decode_hour(r, r->cmos[RTC_HOURS]) * 3600 +
                  decode(r, r->cmos[RTC_MINUTES]) * 60 + decode(r, r->cmos[RTC_SECONDS]);

    r->offset += seconds * RTC_HZ + fraction - ticks_now(r);
    r->seen = ticks_now(r);
}

static s64 second_fraction(s64 ticks)
{
    return ticks & (RTC_HZ - 1);
}

/* The periodic interrupt's period in ticks; 0: none. */
static s64 period_ticks(const struct rtc *r)
{
    unsigned rate = r->cmos[RTC_A] & A_RATE;

    if (rate == 0)
        return 0;
    return 1LL << (rate <= 2 ? rate + 6 : rate - 1);
}

static s64 next_multiple(s64 after, s64 step)
{
    return (floor_div(after, step) + 1) * step;
}

static bool alarm_matches(u8 alarm, u8 value)
{
    return (alarm & ALARM_ANY) == ALARM_ANY || alarm == value;
}

/* Whether the seconds alarm names a second at all: the register holds whatever the guest wrote. */
static bool alarm_second_exists(const struct rtc *r)
{
    for (unsigned second = 0; second < 60; second++) {
        if (alarm_matches(r->cmos[RTC_SECONDS_ALARM], encode(r, second)))
            return true;
    }
    return false;
}

/* The first tick after `after` at which the alarm goes off; INT64_MAX: never, for it names no time. */
static s64 next_alarm(const struct rtc *r, s64 after)
{
    s64 first = floor_div(after, RTC_HZ) + 1;

    /* Or the search would look at every second of the day. As it is, it takes 1500 steps at most. */
    if (!alarm_second_exists(r))
        return INT64_MAX;
    for (s64 t = first; t < first + SECONDS_PER_DAY;) {
        unsigned in_day = (unsigned)(t - floor_div(t, SECONDS_PER_DAY) * SECONDS_PER_DAY);

        if (!alarm_matches(r->cmos[RTC_HOURS_ALARM], encode_hour(r, in_day / 3600)))
            t += 3600 - in_day % 3600;
        else if (!alarm_matches(r->cmos[RTC_MINUTES_ALARM], encode(r, in_day / 60 % 60)))
            t += 60 - in_day % 60;
        else if (!alarm_matches(r->cmos[RTC_SECONDS_ALARM], encode(r, in_day % 60)))
            t++;
        else
            return t * RTC_HZ;
    }
    return INT64_MAX;
}

/* Adds to register C what happened up to `now`. */
static void sync(struct rtc *r, s64 now)
{
    u8 *flags = &r->cmos[RTC_C];
    s64 period = period_ticks(r);

    /* After a restore, the host's clock may be behind the one that it was saved by. */
    if (now < r->seen)
        r->seen = now;
    if ((r->cmos[RTC_A] & A_DIVIDER_RESET) != A_DIVIDER_RESET && period &&
        next_multiple(r->seen, period) <= now)
        *flags |= C_PF;
    if (!clock_held(r)) {
        if (next_multiple(r->seen, RTC_HZ) <= now)
            *flags |= C_UF;
        if (!(*flags & C_AF) && next_alarm(r, r->seen) <= now)
            *flags |= C_AF;
    }
    r->seen = now;
}

/* The interrupt line, and the timer for what may raise it next. */
static void update(struct rtc *r)
{
    u8 flags = r->cmos[RTC_C] & C_FLAGS;
    u8 enabled = r->cmos[RTC_B] & C_FLAGS; /* PIE, AIE and UIE lie like their flags */
    s64 next = INT64_MAX;

    r->cmos[RTC_C] = flags | (flags & enabled ? C_IRQF : 0);
    irq_line_set(&r->irq, flags & enabled);
    if (!(flags & enabled)) {
        if ((enabled & B_PIE) && period_ticks(r) &&
            (r->cmos[RTC_A] & A_DIVIDER_RESET) != A_DIVIDER_RESET)
            next = next_multiple(r->seen, period_ticks(r));
        if ((enabled & B_UIE) && !clock_held(r))
            next = MIN(next, next_multiple(r->seen, RTC_HZ));
        if ((enabled & B_AIE) && !clock_held(r))
            next = MIN(next, next_alarm(r, r->seen));
    }
    if (next == INT64_MAX) {
        vm_timer_cancel(&r->timer);
        return;
    }
    s64 wall_ticks = MAX(next - r->offset, 0);
    u64 target = clock_ticks_to_ns((u64)wall_ticks, RTC_HZ);
    u64 wall = vm_clock_wall_ns(r->env.clock);
    vm_timer_arm(&r->timer, vm_clock_now(r->env.clock) + (target > wall ? target - wall : 0));
}

static void timer_fired(void *opaque)
{
    struct rtc *r = opaque;

    device_lock(&r->dev);
    sync(r, ticks_now(r));
    update(r);
    device_unlock(&r->dev);
}

static bool time_register(unsigned reg)
{
    return reg == CMOS_CENTURY || (reg <= RTC_YEAR && reg != RTC_SECONDS_ALARM &&
                                   reg != RTC_MINUTES_ALARM && reg != RTC_HOURS_ALARM);
}

/* A write to A or B may stop the clock or let it go. */
static void write_control(struct rtc *r, unsigned reg, u8 value, s64 now)
{
    bool was_held = clock_held(r);
    bool was_reset = (r->cmos[RTC_A] & A_DIVIDER_RESET) == A_DIVIDER_RESET;

    if (!was_held)
        store_time(r, now);
    if (reg == RTC_A) {
        r->cmos[RTC_A] = value & ~A_UIP;
    } else {
        r->cmos[RTC_B] = value;
        /* SET stops the update interrupt as well: it clears UIE. */
        if (value & B_SET)
            r->cmos[RTC_B] &= ~B_UIE;
    }
    bool is_reset = (r->cmos[RTC_A] & A_DIVIDER_RESET) == A_DIVIDER_RESET;
    if (was_reset && !is_reset)
        set_time(r, RTC_HZ / 2);
    else if (was_held && !clock_held(r))
        set_time(r, second_fraction(now));
}

static u8 read_register(struct rtc *r, unsigned reg)
{
    s64 now = ticks_now(r);
    u8 value;

    if (time_register(reg)) {
        if (!clock_held(r))
            store_time(r, now);
        return r->cmos[reg];
    }
    switch (reg) {
    case RTC_A:
        value = r->cmos[RTC_A];
        if (!clock_held(r) && second_fraction(now) >= RTC_HZ - UPDATE_TICKS)
            value |= A_UIP;
        return value;
    case RTC_C:
        sync(r, now);
        update(r);
        value = r->cmos[RTC_C];
        r->cmos[RTC_C] = 0;
        update(r);
        return value;
    default:
        return r->cmos[reg];
    }
}

static void write_register(struct rtc *r, unsigned reg, u8 value)
{
    s64 now = ticks_now(r);

    sync(r, now);
    if (time_register(reg)) {
        if (clock_held(r)) {
            r->cmos[reg] = value;
        } else {
            store_time(r, now);
            r->cmos[reg] = value;
            set_time(r, second_fraction(now));
        }
    } else if (reg == RTC_A || reg == RTC_B) {
        write_control(r, reg, value, now);
    } else if (reg != RTC_C && reg != RTC_D) {
        r->cmos[reg] = value;
    }
    if (reg <= RTC_D || reg == CMOS_CENTURY)
        update(r);
}

static u64 rtc_read(void *opaque, u64 offset, unsigned size)
{
    struct rtc *r = opaque;
    u8 value = 0xff; /* the index can't be read */

    device_lock(&r->dev);
    if (offset == 1)
        value = read_register(r, r->index);
    device_unlock(&r->dev);
    return value;
}

static void rtc_write(void *opaque, u64 offset, u64 value, unsigned size)
{
    struct rtc *r = opaque;

    device_lock(&r->dev);
    if (offset == 0) {
        r->index = value & (CMOS_BANK - 1);
        r->nmi_off = value & INDEX_NMI_OFF;
    } else {
        write_register(r, r->index, (u8)value);
    }
    device_unlock(&r->dev);
}

static u64 upper_read(void *opaque, u64 offset, unsigned size)
{
    struct rtc *r = opaque;

    device_lock(&r->dev);
    u8 value = offset == 0 ? r->upper_index : r->cmos[CMOS_BANK + r->upper_index];
    device_unlock(&r->dev);
    return value;
}

static void upper_write(void *opaque, u64 offset, u64 value, unsigned size)
{
    struct rtc *r = opaque;

    device_lock(&r->dev);
    if (offset == 0)
        r->upper_index = value & (CMOS_BANK - 1);
    else
        r->cmos[CMOS_BANK + r->upper_index] = (u8)value;
    device_unlock(&r->dev);
}

void rtc_set_cmos(struct rtc *r, u8 index, u8 value)
{
    device_lock(&r->dev);
    if (index > RTC_D)
        /* cppcheck-suppress arrayIndexOutOfBoundsCond ; a u8 can't be 256 */
        r->cmos[index] = value;
    device_unlock(&r->dev);
}

bool rtc_nmi_disabled(struct rtc *r)
{
    device_lock(&r->dev);
    bool off = r->nmi_off;
    device_unlock(&r->dev);
    return off;
}

static int rtc_loaded(void *obj, struct error *err)
{
    struct rtc *r = obj;

    /* Years as far away as the registers can say fit in 2^55 ticks. */
    if (r->index >= CMOS_BANK || r->upper_index >= CMOS_BANK || r->offset < -(s64)BIT(56) ||
        r->offset > (s64)BIT(56) || r->seen < -(s64)BIT(57) || r->seen > (s64)BIT(57))
        return error_input(err, "rtc: impossible index or time");
    update(r);
    return 0;
}

static const struct state_field rtc_fields[] = {
    STATE_HOST(struct rtc, dev),         STATE_FIELD(struct rtc, offset),
    STATE_FIELD(struct rtc, seen),       STATE_FIELD(struct rtc, cmos),
    STATE_FIELD(struct rtc, index),      STATE_FIELD(struct rtc, upper_index),
    STATE_FIELD(struct rtc, nmi_off),    STATE_HOST(struct rtc, env),
    STATE_HOST(struct rtc, irq),         STATE_HOST(struct rtc, range),
    STATE_HOST(struct rtc, upper_range), STATE_HOST(struct rtc, timer),
};

static const struct state_desc rtc_state = {
    .name = "rtc",
    .version = 1,
    .struct_size = sizeof(struct rtc),
    .fields = rtc_fields,
    .nfields = ARRAY_SIZE(rtc_fields),
    .loaded = rtc_loaded,
};

/* RESET clears the interrupt enables and flags; the battery keeps the rest. */
static void rtc_reset(struct device *dev)
{
    struct rtc *r = container_of(dev, struct rtc, dev);

    device_lock(dev);
    r->index = 0;
    r->upper_index = 0;
    r->nmi_off = false;
    r->cmos[RTC_B] &= ~(B_PIE | B_AIE | B_UIE | B_SQWE);
    r->cmos[RTC_C] = 0;
    r->seen = ticks_now(r);
    update(r);
    device_unlock(dev);
}

static void rtc_destroy(struct device *dev)
{
    struct rtc *r = container_of(dev, struct rtc, dev);

    io_bus_remove(r->env.ports, &r->upper_range);
    io_bus_remove(r->env.ports, &r->range);
    vm_timer_destroy(&r->timer);
    pthread_mutex_destroy(&dev->lock);
    free(r);
}

static const struct device_ops rtc_ops = {
    .reset = rtc_reset,
    .destroy = rtc_destroy,
};

static const struct io_ops rtc_io_ops = {
    .read = rtc_read,
    .write = rtc_write,
    .max_size = 1,
};

static const struct io_ops upper_io_ops = {
    .read = upper_read,
    .write = upper_write,
    .max_size = 1,
};

struct rtc *rtc_create(const struct device_env *env, const struct rtc_config *cfg,
                       struct error *err)
{
    struct rtc *r = calloc(1, sizeof(*r));

    if (!r) {
        error_host(err, ENOMEM, "real-time clock");
        return NULL;
    }
    device_init(&r->dev, "rtc", &rtc_ops, &rtc_state);
    r->env = *env;
    r->irq = cfg->irq;
    r->cmos[RTC_A] = 0x26; /* what firmware leaves: 32768 Hz crystal, 1024 Hz rate */
    r->cmos[RTC_B] = B_24H;
    r->cmos[RTC_D] = D_VRT;
    vm_timer_init(&r->timer, env->clock, timer_fired, r);
    r->range = (struct io_range){
        .name = "rtc",
        .base = PORT_RTC,
        .size = 2,
        .ops = &rtc_io_ops,
        .opaque = r,
    };
    r->upper_range = (struct io_range){
        .name = "rtc upper bank",
        .base = PORT_RTC + 2,
        .size = 2,
        .ops = &upper_io_ops,
        .opaque = r,
    };
    if (io_bus_add(env->ports, &r->range, err) < 0)
        goto out_free;
    if (io_bus_add(env->ports, &r->upper_range, err) < 0)
        goto out_remove;
    rtc_reset(&r->dev);
    return r;

out_remove:
    io_bus_remove(env->ports, &r->range);
out_free:
    vm_timer_destroy(&r->timer);
    pthread_mutex_destroy(&r->dev.lock);
    free(r);
    return NULL;
}

struct device *rtc_device(struct rtc *r)
{
    return &r->dev;
}
