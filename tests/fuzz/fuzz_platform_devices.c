/*
 * Bytes as register accesses, lines, events and time steps on the IOAPIC, HPET, ACPI fixed
 * hardware, fw_cfg and pvpanic at once; then a damaged state into each. Nothing that comes out is
 * checked but by the sanitizers and the devices' own assertions: a guest can't crash them.
 */
#include "../unit/device_rig.h"
#include "device/acpi_pm.h"
#include "device/fw_cfg.h"
#include "device/hpet.h"
#include "device/ioapic.h"
#include "device/pvpanic.h"
#include "fuzz_device.h"
#include "host/log.h"

#define IOAPIC_BASE 0xfec00000ULL
#define HPET_BASE 0xfed00000ULL

struct machine {
    struct rig *rig;
    struct ioapic *ioapic;
    struct hpet *hpet;
    struct acpi_pm *pm;
    struct fw_cfg *fw;
    struct pvpanic *pvpanic;
    struct device *devices[5];
    char writable[64];
};

static void to_ioapic(void *opaque, unsigned n, bool level)
{
    struct machine *m = opaque;

    ioapic_set_irq(m->ioapic, n, level);
}

static void legacy_route(void *opaque, bool on)
{
}

static bool build(struct machine *m)
{
    struct rig *r = rig_create();
    struct ioapic_config ioapic = {.base = IOAPIC_BASE, .msi = rig_msi(r)};
    struct hpet_config hpet = {
        .base = HPET_BASE,
        .legacy = {{.set = to_ioapic, .sink = m, .n = 2}, {.set = to_ioapic, .sink = m, .n = 8}},
        .msi = rig_msi(r),
        .legacy_route = legacy_route,
    };
    struct acpi_pm_config pm = {
        .pm1_evt = 0x600,
        .pm1_cnt = 0x604,
        .pm_tmr = 0x608,
        .gpe0 = 0x620,
        .sci = {.set = to_ioapic, .sink = m, .n = 9},
        .power = rig_power(r),
    };
    struct fw_cfg_config fw = {.port = 0x510};
    struct pvpanic_config pvpanic = {.port = 0x505, .power = rig_power(r)};

    for (unsigned i = 0; i < HPET_PINS; i++)
        hpet.pins[i] = (struct irq_line){.set = to_ioapic, .sink = m, .n = i};
    m->rig = r;
    m->ioapic = ioapic_create(&r->env, &ioapic, &r->err);
    m->hpet = hpet_create(&r->env, &hpet, &r->err);
    m->pm = acpi_pm_create(&r->env, &pm, &r->err);
    m->fw = fw_cfg_create(&r->env, &fw, &r->err);
    m->pvpanic = pvpanic_create(&r->env, &pvpanic, &r->err);
    if (!m->ioapic || !m->hpet || !m->pm || !m->fw || !m->pvpanic)
        return false;
    m->devices[0] = ioapic_device(m->ioapic);
    m->devices[1] = hpet_device(m->hpet);
    m->devices[2] = acpi_pm_device(m->pm);
    m->devices[3] = fw_cfg_device(m->fw);
    m->devices[4] = pvpanic_device(m->pvpanic);
    return fw_cfg_add_file(m->fw, "etc/text", "some text", 9, FW_CFG_BORROW, &r->err) == 0 &&
           fw_cfg_add_file(m->fw, "etc/state", m->writable, sizeof(m->writable), FW_CFG_WRITABLE,
                           &r->err) == 0;
}

static void mmio(struct machine *m, struct input *in, gpa_t base, u64 mask)
{
    unsigned size = 1U << take(in, 1) % 4;
    u64 addr = base + (take(in, 2) & mask);

    access_bus(m->rig->env.mmio, addr, size, take(in, 1) & 1, in);
}

static void port(struct machine *m, struct input *in)
{
    static const u16 bases[] = {0x505, 0x510, 0x600, 0x620};
    unsigned size = 1U << take(in, 1) % 3;
    u16 addr = bases[take(in, 1) % ARRAY_SIZE(bases)] + take(in, 1) % 16;

    access_bus(m->rig->env.ports, addr, size, take(in, 1) & 1, in);
}

static void guest_memory(struct machine *m, struct input *in)
{
    u64 bytes[2] = {take(in, 8), take(in, 8)};

    memory_write(&m->rig->memory, take(in, 2), bytes, sizeof(bytes));
}

static void step(struct machine *m, struct input *in)
{
    switch (take(in, 1) % 10) {
    case 0:
        mmio(m, in, IOAPIC_BASE, 0x5f);
        break;
    case 1:
    case 2:
        mmio(m, in, HPET_BASE, 0x1ff);
        break;
    case 3:
    case 4:
        port(m, in);
        break;
    case 5:
        rig_advance_bounded(m->rig->env.clock, take(in, 8) >> take(in, 1) % 64 >> 2, 64);
        break;
    case 6:
        ioapic_set_irq(m->ioapic, take(in, 1), take(in, 1) & 1);
        ioapic_eoi(m->ioapic, take(in, 1));
        break;
    case 7:
        acpi_pm_power_button(m->pm);
        acpi_pm_gpe_raise(m->pm, take(in, 1) % ACPI_GPE0_EVENTS);
        break;
    case 8:
        guest_memory(m, in);
        break;
    case 9: {
        struct device *dev = m->devices[take(in, 1) % ARRAY_SIZE(m->devices)];
        if (take(in, 1) & 1)
            dev->ops->reset(dev);
        else
            load_damaged_state(dev, in);
        break;
    }
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct machine m = {.rig = NULL};
    struct input in = {data, size};

    log_set_level(LOG_ERROR);
    if (!build(&m))
        abort();
    while (in.left)
        step(&m, &in);
    for (unsigned i = ARRAY_SIZE(m.devices); i-- > 0;)
        m.devices[i]->ops->destroy(m.devices[i]);
    rig_destroy(m.rig);
    return 0;
}
