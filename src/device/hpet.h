/*
 * The high precision event timer (IA-PC HPET specification 1.0a): a 64-bit counter at 100 MHz and
 * three timers, each one-shot or periodic, by interrupt line or by message.
 */
#ifndef DOPPEL_DEVICE_HPET_H
#define DOPPEL_DEVICE_HPET_H

#include "device/device.h"

#define HPET_SIZE 0x400
#define HPET_PERIOD_NS 10
#define HPET_TIMERS 3
#define HPET_PINS 24

/* The low half of the capabilities register, which the ACPI table repeats as hardware ID. */
#define HPET_CAP_ID (0x80860000U | 1U << 15 | 1U << 13 | (HPET_TIMERS - 1) << 8 | 0x01)
/* The shortest period, in counter ticks, at which no periodic interrupt is lost. */
#define HPET_MIN_PERIOD 2000

struct hpet;

struct hpet_config {
    gpa_t base;
    struct irq_line
        pins[HPET_PINS];       /* the IOAPIC's inputs, by number; only 11 and 20 to 23 are used */
    struct irq_line legacy[2]; /* ISA interrupts 0 and 8, while the legacy route is on */
    struct msi_sink msi;
    /*
     * The legacy replacement route went on or off: while on, the PIT's and the RTC's periodic
     * interrupt are cut off from ISA interrupts 0 and 8. Called under the HPET's lock: must not
     * call back.
     */
    void (*legacy_route)(void *opaque, bool on);
    void *opaque;
};

/* Returns NULL with err set when the MMIO range is taken or memory is short. */
struct hpet *hpet_create(const struct device_env *env, const struct hpet_config *cfg,
                         struct error *err);
struct device *hpet_device(struct hpet *h);

#endif
