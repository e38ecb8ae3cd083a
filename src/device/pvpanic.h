/*
 * The pvpanic device: a port by which a guest tells that it panicked (QEMU, docs/specs/pvpanic).
 */
#ifndef DOPPEL_DEVICE_PVPANIC_H
#define DOPPEL_DEVICE_PVPANIC_H

#include "device/device.h"

#define PVPANIC_PANICKED 0x1     /* the guest panicked, and does nothing about it itself */
#define PVPANIC_CRASH_LOADED 0x2 /* it panicked, and goes on into its own crash kernel */

struct pvpanic;

struct pvpanic_config {
    u16 port;
    struct power_sink power; /* told of PVPANIC_PANICKED, with the event bits; no lock is held */
};

/* Returns NULL with err set when the port is taken or memory is short. */
struct pvpanic *pvpanic_create(const struct device_env *env, const struct pvpanic_config *cfg,
                               struct error *err);
struct device *pvpanic_device(struct pvpanic *p);

#endif
