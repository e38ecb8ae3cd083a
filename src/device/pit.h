/*
 * The 8254 interval timer of a PC, and port 0x61, through which the guest reaches channel 2's gate and
 * output (the speaker).
 *
 * Counts are computed from the VM clock when somebody looks; a timer runs only for channel 0's output.
 */
#ifndef DOPPEL_DEVICE_PIT_H
#define DOPPEL_DEVICE_PIT_H

#include "device/device.h"

#define PIT_HZ 1193182

struct pit;

struct pit_config {
    struct irq_line irq; /* channel 0's OUT */
};

struct pit *pit_create(const struct device_env *env, const struct pit_config *cfg,
                       struct error *err);
struct device *pit_device(struct pit *pit);

#endif
