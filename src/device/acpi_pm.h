/*
 * ACPI fixed hardware (ACPI 6.4, section 4.8): the PM1 event and control blocks, the PM timer, and
 * one general-purpose event block. The system is always in ACPI mode: there is no SMI command port,
 * and SCI_EN is fixed at 1. Of the sleep states only S5 (off) is offered.
 */
#ifndef DOPPEL_DEVICE_ACPI_PM_H
#define DOPPEL_DEVICE_ACPI_PM_H

#include "device/device.h"

#define ACPI_PM1_EVT_LEN 4
#define ACPI_PM1_CNT_LEN 2
#define ACPI_PM_TMR_LEN 4
#define ACPI_GPE0_LEN 8 /* 32 events: 4 bytes of status, 4 of enable */
#define ACPI_GPE0_EVENTS 32

#define ACPI_PM_TIMER_HZ 3579545
#define ACPI_SLP_TYP_S5 7 /* what \_S5 gives for SLP_TYP */

struct acpi_pm;

struct acpi_pm_config {
    u16 pm1_evt, pm1_cnt, pm_tmr, gpe0; /* ports of the blocks */
    struct irq_line sci;                /* level, asserted while an enabled event is pending */
    struct power_sink power;            /* called with no lock held */
};

/* Returns NULL with err set when a port is taken or memory is short. */
struct acpi_pm *acpi_pm_create(const struct device_env *env, const struct acpi_pm_config *cfg,
                               struct error *err);
struct device *acpi_pm_device(struct acpi_pm *pm);

/* The user pressed the power button. Any thread. */
void acpi_pm_power_button(struct acpi_pm *pm);
/* Sets general-purpose event n's status bit (n < ACPI_GPE0_EVENTS). Any thread. */
void acpi_pm_gpe_raise(struct acpi_pm *pm, unsigned n);

/*
 * All blocks to where the chipset puts them: PM1 events at the base, PM1 control at 4, the timer at 8, GPE0 at
 * 0x20 (ICH9 data sheet, table 13-10). 0: nowhere. Takes no lock; one caller at a time.
 */
void acpi_pm_move(struct acpi_pm *pm, u16 base);

#endif
