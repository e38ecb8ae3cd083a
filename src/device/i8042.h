/*
 * The i8042 keyboard controller of a PC, with a keyboard and a mouse behind it. It also drives the A20
 * gate and resets the machine.
 */
#ifndef DOPPEL_DEVICE_I8042_H
#define DOPPEL_DEVICE_I8042_H

#include "device/device.h"
#include "device/sysport.h"

/* A key whose code has the E0 prefix: I8042_KEY_E0 | its second byte. */
#define I8042_KEY_E0 0x100
/* Pause sends one long sequence when pressed, and nothing when released. */
#define I8042_KEY_PAUSE 0x200

enum { I8042_BUTTON_LEFT = 1, I8042_BUTTON_RIGHT = 2, I8042_BUTTON_MIDDLE = 4 };

struct i8042;

struct i8042_config {
    struct irq_line keyboard_irq, mouse_irq;
    struct a20_gate *a20;
    struct power_sink power;
};

struct i8042 *i8042_create(const struct device_env *env, const struct i8042_config *cfg,
                           struct error *err);
struct device *i8042_device(struct i8042 *k);

/*
 * A key goes down or up: `key` is its scan set 2 code. Dropped while the guest has scanning off, and while the machine is
 * stopped; when the keyboard's buffer is full the guest gets its overrun code. Any thread.
 */
void i8042_key(struct i8042 *k, u16 key, bool down);
/* Whether the buffer has room for any key: who types faster than the guest reads waits for it. Any thread. */
bool i8042_has_room(struct i8042 *k);

/*
 * The mouse moved (dx to the right, dy upward, dz the wheel toward the user) and its buttons are as told.
 * Movement that the guest doesn't fetch adds up, within bounds. Dropped while the machine is stopped. Any thread.
 */
void i8042_mouse(struct i8042 *k, int dx, int dy, int dz, u8 buttons);

#endif
