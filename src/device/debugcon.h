/*
 * The port to which firmware writes what it does (0x402), a character at a time. Lines go to the log, at level
 * debug.
 */
#ifndef DOPPEL_DEVICE_DEBUGCON_H
#define DOPPEL_DEVICE_DEBUGCON_H

#include "device/device.h"

struct debugcon;

struct debugcon *debugcon_create(const struct device_env *env, u16 port, struct error *err);
struct device *debugcon_device(struct debugcon *d);

#endif
