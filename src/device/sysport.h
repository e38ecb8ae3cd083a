/*
 * The mainboard's small ports: 0x92 (fast A20 and reset), 0xCF9 (reset control), 0x80 (POST codes), 0xED
 * (the other delay port), and a debug exit port. And the A20 gate, which port 0x92 and the keyboard
 * controller drive together.
 */
#ifndef DOPPEL_DEVICE_SYSPORT_H
#define DOPPEL_DEVICE_SYSPORT_H

#include "device/device.h"

enum a20_source { A20_KEYBOARD = 1, A20_PORT_92 = 2 };

/* Address line 20 is on while any source turns it on. */
struct a20_gate {
    /* Called on every change, with the source device's lock held: must not call back into it. */
    void (*changed)(void *opaque, bool enabled);
    void *opaque;
    /* the gate's own */
    pthread_mutex_t lock;
    u8 sources;
};

/* The gate starts off. It must outlive the devices that drive it; destroy has nothing to free. */
void a20_gate_init(struct a20_gate *gate, void (*changed)(void *opaque, bool enabled),
                   void *opaque);
void a20_gate_set(struct a20_gate *gate, enum a20_source source, bool on);
bool a20_gate_enabled(struct a20_gate *gate);

struct sysport;

struct sysport_config {
    struct a20_gate *a20;
    struct power_sink power;
    u16 debug_exit_port; /* 0: none */
    /* 0xCF9 lies within the PCI host bridge's port: it calls sysport_reset_control_* instead. */
    bool reset_in_bridge;
};

struct sysport *sysport_create(const struct device_env *env, const struct sysport_config *cfg,
                               struct error *err);
struct device *sysport_device(struct sysport *sysport);

/* The reset control register, 0xCF9. Any thread. */
u8 sysport_reset_control_read(struct sysport *sysport);
void sysport_reset_control_write(struct sysport *sysport, u8 value);

#endif
