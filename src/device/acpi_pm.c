/*
 * ACPI fixed hardware.
 *
 * 1. Status bits are set by events and cleared by writing 1 to them. The SCI is a level: the OR of
 *    all status bits whose enable bit is set. acpi_pm_update_sci follows every change of either.
 * 2. The PM timer is the VM clock at 3.579545 MHz, 32 bits wide. TMR_STS is set whenever its top
 *    bit changes (4.8.3.3), which is every 2^31 ticks, about ten minutes. `tmr_epoch` is the number
 *    of such changes accounted for; acpi_pm_catch_up compares it with the clock at every access, so
 *    that a host timer is needed only while TMR_EN wants an SCI for it.
 * 3. Registers may be accessed a byte at a time (4.7): an access of any width is a loop over bytes.
 */
#include "device/acpi_pm.h"

#include "host/log.h"

#include <errno.h>
#include <stdlib.h>

#define PM1_TMR BIT(0) /* the same bit in status and enable */
#define PM1_GBL BIT(5)
#define PM1_PWRBTN BIT(8)
#define PM1_SLPBTN BIT(9)
#define PM1_RTC BIT(10)

/* No bus master, sleep button or wake status: those bits read 0. */
#define PM1_STS_BITS (PM1_TMR | PM1_PWRBTN)
#define PM1_EN_BITS (PM1_TMR | PM1_GBL | PM1_PWRBTN | PM1_SLPBTN | PM1_RTC)

#define PM1_SCI_EN BIT(0)
#define PM1_BM_RLD BIT(1)
#define PM1_SLP_TYP_SHIFT 10
#define PM1_SLP_TYP (7U << PM1_SLP_TYP_SHIFT)
#define PM1_SLP_EN BIT(13)

#define TMR_EPOCH_SHIFT 31

enum block { BLOCK_PM1_EVT, BLOCK_PM1_CNT, BLOCK_PM_TMR, BLOCK_GPE0, BLOCKS };

struct acpi_pm {
    struct device dev;
    struct io_bus *ports;
    struct vm_clock *clock;
    struct io_range ranges[BLOCKS];
    unsigned nranges; /* those on the bus */
    struct vm_timer timer;
    struct irq_line sci;
    struct power_sink power;

    u64 tmr_epoch;
    u32 gpe_sts, gpe_en;
    u16 pm1_sts, pm1_en, pm1_cnt;
};

static u64 acpi_pm_ticks(struct acpi_pm *pm)
{
    return clock_ns_to_ticks(vm_clock_now(pm->clock), ACPI_PM_TIMER_HZ);
}

static void acpi_pm_update_sci(struct acpi_pm *pm)
{
    irq_line_set(&pm->sci, (pm->pm1_sts & pm->pm1_en) || (pm->gpe_sts & pm->gpe_en));
}

static void acpi_pm_catch_up(struct acpi_pm *pm)
{
    u64 epoch = acpi_pm_ticks(pm) >> TMR_EPOCH_SHIFT;

    if (epoch == pm->tmr_epoch)
        return;
    pm->tmr_epoch = epoch;
    pm->pm1_sts |= PM1_TMR;
    acpi_pm_update_sci(pm);
}

/* While TMR_STS is set the next change of the top bit has nothing to tell. */
static void acpi_pm_arm(struct acpi_pm *pm)
{
    if ((pm->pm1_en & PM1_TMR) && !(pm->pm1_sts & PM1_TMR))
        vm_timer_arm(&pm->timer,
                     clock_ticks_to_ns((pm->tmr_epoch + 1) << TMR_EPOCH_SHIFT, ACPI_PM_TIMER_HZ));
    else
        vm_timer_cancel(&pm->timer);
}

static void acpi_pm_timer_fired(void *opaque)
{
    struct acpi_pm *pm = opaque;

    device_lock(&pm->dev);
    acpi_pm_catch_up(pm);
    acpi_pm_arm(pm);
    device_unlock(&pm->dev);
}

void acpi_pm_power_button(struct acpi_pm *pm)
{
    device_lock(&pm->dev);
    pm->pm1_sts |= PM1_PWRBTN;
    acpi_pm_update_sci(pm);
    device_unlock(&pm->dev);
}

void acpi_pm_gpe_raise(struct acpi_pm *pm, unsigned n)
{
    device_lock(&pm->dev);
    pm->gpe_sts |= BIT(n);
    acpi_pm_update_sci(pm);
    device_unlock(&pm->dev);
}

static u64 value_mask(unsigned size)
{
    return BIT(8 * size) - 1;
}

/* Both event blocks look alike: half status, half enable. */
static u64 event_block_read(u32 sts, u32 en, unsigned half, u64 offset, unsigned size)
{
    return ((u64)en << 8 * half | sts) >> 8 * offset & value_mask(size);
}

/* Applies a write to an event block; returns the status bits it clears and changes *en. */
static u32 event_block_write(u32 *en, unsigned half, u64 offset, u64 value, unsigned size)
{
    u64 bits = (value & value_mask(size)) << 8 * offset;
    u64 written = value_mask(size) << 8 * offset;
    u32 en_written = written >> 8 * half;

    *en = (*en & ~en_written) | (bits >> 8 * half & en_written);
    return bits & value_mask(half);
}

static u64 pm1_evt_read(void *opaque, u64 offset, unsigned size)
{
    struct acpi_pm *pm = opaque;

    device_lock(&pm->dev);
    acpi_pm_catch_up(pm);
    u64 value = event_block_read(pm->pm1_sts, pm->pm1_en, ACPI_PM1_EVT_LEN / 2, offset, size);
    device_unlock(&pm->dev);
    return value;
}

static void pm1_evt_write(void *opaque, u64 offset, u64 value, unsigned size)
{
    struct acpi_pm *pm = opaque;

    device_lock(&pm->dev);
    acpi_pm_catch_up(pm);
    u32 en = pm->pm1_en;
    pm->pm1_sts &= ~event_block_write(&en, ACPI_PM1_EVT_LEN / 2, offset, value, size);
    pm->pm1_en = en & PM1_EN_BITS;
    acpi_pm_update_sci(pm);
    acpi_pm_arm(pm);
    device_unlock(&pm->dev);
}

static u64 gpe0_read(void *opaque, u64 offset, unsigned size)
{
    struct acpi_pm *pm = opaque;

    device_lock(&pm->dev);
    u64 value = event_block_read(pm->gpe_sts, pm->gpe_en, ACPI_GPE0_LEN / 2, offset, size);
    device_unlock(&pm->dev);
    return value;
}

static void gpe0_write(void *opaque, u64 offset, u64 value, unsigned size)
{
    struct acpi_pm *pm = opaque;

    device_lock(&pm->dev);
    pm->gpe_sts &= ~event_block_write(&pm->gpe_en, ACPI_GPE0_LEN / 2, offset, value, size);
    acpi_pm_update_sci(pm);
    device_unlock(&pm->dev);
}

static u64 pm1_cnt_read(void *opaque, u64 offset, unsigned size)
{
    struct acpi_pm *pm = opaque;

    device_lock(&pm->dev);
    u64 value = pm->pm1_cnt >> 8 * offset & value_mask(size);
    device_unlock(&pm->dev);
    return value;
}

/* SLP_EN and GBL_RLS are write-only; SLP_EN starts the transition that SLP_TYP names. */
static void pm1_cnt_write(void *opaque, u64 offset, u64 value, unsigned size)
{
    struct acpi_pm *pm = opaque;
    u64 bits = (value & value_mask(size)) << 8 * offset;
    u64 written = value_mask(size) << 8 * offset;

    device_lock(&pm->dev);
    pm->pm1_cnt = ((pm->pm1_cnt & ~written) | bits) & (PM1_BM_RLD | PM1_SLP_TYP);
    pm->pm1_cnt |= PM1_SCI_EN;
    unsigned type = pm->pm1_cnt >> PM1_SLP_TYP_SHIFT & 7;
    device_unlock(&pm->dev);

    if (!(bits & PM1_SLP_EN))
        return;
    if (type == ACPI_SLP_TYP_S5)
        pm->power.request(pm->power.sink, POWER_OFF, 0);
    else
        log_once(LOG_WARN, "acpi: guest asked for sleep type %u, which is not offered", type);
}

static u64 pm_tmr_read(void *opaque, u64 offset, unsigned size)
{
    struct acpi_pm *pm = opaque;

    return (u32)acpi_pm_ticks(pm) >> 8 * offset & value_mask(size);
}

static void pm_tmr_write(void *opaque, u64 offset, u64 value, unsigned size)
{
    log_once(LOG_DEBUG, "acpi: write to the read-only PM timer ignored");
}

static const struct {
    const char *name;
    u32 size;
    struct io_ops ops;
} blocks[BLOCKS] = {
    [BLOCK_PM1_EVT] = {"acpi-pm1-evt", ACPI_PM1_EVT_LEN, {pm1_evt_read, pm1_evt_write, 4}},
    [BLOCK_PM1_CNT] = {"acpi-pm1-cnt", ACPI_PM1_CNT_LEN, {pm1_cnt_read, pm1_cnt_write, 2}},
    [BLOCK_PM_TMR] = {"acpi-pm-timer", ACPI_PM_TMR_LEN, {pm_tmr_read, pm_tmr_write, 4}},
    [BLOCK_GPE0] = {"acpi-gpe0", ACPI_GPE0_LEN, {gpe0_read, gpe0_write, 4}},
};

void acpi_pm_move(struct acpi_pm *pm, u16 base)
{
    static const u16 offsets[BLOCKS] = {0x00, 0x04, 0x08, 0x20};
    struct error err;

    while (pm->nranges)
        io_bus_remove(pm->ports, &pm->ranges[--pm->nranges]);
    while (base && pm->nranges < BLOCKS) {
        struct io_range *range = &pm->ranges[pm->nranges];

        range->base = base + offsets[pm->nranges];
        if (io_bus_add(pm->ports, range, &err) < 0) {
            log_once(LOG_WARN, "acpi: %s", err.text);
            break;
        }
        pm->nranges++;
    }
}

static void acpi_pm_reset(struct device *dev)
{
    struct acpi_pm *pm = container_of(dev, struct acpi_pm, dev);

    device_lock(dev);
    pm->tmr_epoch = acpi_pm_ticks(pm) >> TMR_EPOCH_SHIFT;
    pm->gpe_sts = pm->gpe_en = 0;
    pm->pm1_sts = pm->pm1_en = 0;
    pm->pm1_cnt = PM1_SCI_EN;
    acpi_pm_update_sci(pm);
    acpi_pm_arm(pm);
    device_unlock(dev);
}

static void acpi_pm_destroy(struct device *dev)
{
    struct acpi_pm *pm = container_of(dev, struct acpi_pm, dev);

    for (unsigned i = 0; i < pm->nranges; i++)
        io_bus_remove(pm->ports, &pm->ranges[i]);
    vm_timer_destroy(&pm->timer);
    pthread_mutex_destroy(&dev->lock);
    free(pm);
}

/* The line's level is derived; what hangs on it restores its own inputs, so it isn't told. */
static int acpi_pm_loaded(void *obj, struct error *err)
{
    struct acpi_pm *pm = obj;

    if ((pm->pm1_sts & ~PM1_STS_BITS) || (pm->pm1_en & ~PM1_EN_BITS) ||
        (pm->pm1_cnt & ~(PM1_BM_RLD | PM1_SLP_TYP)) != PM1_SCI_EN ||
        pm->tmr_epoch > UINT64_MAX >> (TMR_EPOCH_SHIFT + 1))
        return error_input(err, "acpi: saved PM1 registers or timer are impossible");
    pm->sci.level = (pm->pm1_sts & pm->pm1_en) || (pm->gpe_sts & pm->gpe_en);
    acpi_pm_arm(pm);
    return 0;
}

static const struct state_field acpi_pm_fields[] = {
    STATE_HOST(struct acpi_pm, dev),        STATE_HOST(struct acpi_pm, ports),
    STATE_HOST(struct acpi_pm, clock),      STATE_HOST(struct acpi_pm, ranges),
    STATE_HOST(struct acpi_pm, nranges),    STATE_HOST(struct acpi_pm, timer),
    STATE_HOST(struct acpi_pm, sci),        STATE_HOST(struct acpi_pm, power),
    STATE_FIELD(struct acpi_pm, tmr_epoch), STATE_FIELD(struct acpi_pm, gpe_sts),
    STATE_FIELD(struct acpi_pm, gpe_en),    STATE_FIELD(struct acpi_pm, pm1_sts),
    STATE_FIELD(struct acpi_pm, pm1_en),    STATE_FIELD(struct acpi_pm, pm1_cnt),
};

static const struct state_desc acpi_pm_state = {
    .name = "acpi_pm",
    .version = 1,
    .struct_size = sizeof(struct acpi_pm),
    .fields = acpi_pm_fields,
    .nfields = ARRAY_SIZE(acpi_pm_fields),
    .loaded = acpi_pm_loaded,
};

static const struct device_ops acpi_pm_ops = {
    .reset = acpi_pm_reset,
    .destroy = acpi_pm_destroy,
};

struct acpi_pm *acpi_pm_create(const struct device_env *env, const struct acpi_pm_config *cfg,
                               struct error *err)
{
    const u16 ports[BLOCKS] = {cfg->pm1_evt, cfg->pm1_cnt, cfg->pm_tmr, cfg->gpe0};
    struct acpi_pm *pm = calloc(1, sizeof(*pm));

    if (!pm) {
        error_host(err, ENOMEM, "acpi");
        return NULL;
    }
    device_init(&pm->dev, "acpi_pm", &acpi_pm_ops, &acpi_pm_state);
    pm->ports = env->ports;
    pm->clock = env->clock;
    pm->sci = cfg->sci;
    pm->power = cfg->power;
    vm_timer_init(&pm->timer, pm->clock, acpi_pm_timer_fired, pm);
    acpi_pm_reset(&pm->dev);

    for (; pm->nranges < BLOCKS; pm->nranges++) {
        unsigned i = pm->nranges;
        pm->ranges[i] = (struct io_range){
            .name = blocks[i].name,
            .base = ports[i],
            .size = blocks[i].size,
            .ops = &blocks[i].ops,
            .opaque = pm,
        };
        if (io_bus_add(pm->ports, &pm->ranges[i], err) < 0) {
            acpi_pm_destroy(&pm->dev);
            return NULL;
        }
    }
    return pm;
}

struct device *acpi_pm_device(struct acpi_pm *pm)
{
    return &pm->dev;
}
