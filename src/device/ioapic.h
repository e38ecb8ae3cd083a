/*
 * The I/O APIC: 24 interrupt inputs, each with an entry that says where it goes and how.
 *
 * Intel 82093AA data sheet (290566-001) as ICH9 has it (316972, section 13.5): version 20h with the
 * EOI register, and an extended destination ID that a remapping unit takes as a part of its index.
 */
#ifndef DOPPEL_DEVICE_IOAPIC_H
#define DOPPEL_DEVICE_IOAPIC_H

#include "device/device.h"

#define IOAPIC_PINS 24
#define IOAPIC_SIZE 0x1000

struct ioapic;

struct ioapic_config {
    gpa_t base;
    struct msi_sink msi; /* may be called under the IOAPIC's lock, on any thread */
};

/* Returns NULL with err set when the MMIO range is taken or memory is short. */
struct ioapic *ioapic_create(const struct device_env *env, const struct ioapic_config *cfg,
                             struct error *err);
struct device *ioapic_device(struct ioapic *io);

/*
 * Asserts or deasserts input `pin` (struct irq_line's `set`; sink: the struct ioapic). Pins beyond
 * the last are ignored. Any thread, with other devices' locks held.
 */
void ioapic_set_irq(void *sink, unsigned pin, bool level);

/*
 * The EOI that a local APIC broadcasts for a level-triggered vector. It may deliver anew from
 * within, so the caller holds no lock that its msi_sink takes.
 */
void ioapic_eoi(struct ioapic *io, u8 vector);

#endif
