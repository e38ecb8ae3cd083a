/*
 * A 16550A UART, as on a PC's COM port.
 *
 * Characters go to and come from a stream that knows nothing of UARTs: output by ops.put, input by
 * serial_receive. Neither side ever loses one: what the stream doesn't take waits in the transmitter
 * (THRE stays clear), and what the guest isn't ready for waits in the stream.
 */
#ifndef DOPPEL_DEVICE_SERIAL_H
#define DOPPEL_DEVICE_SERIAL_H

#include "device/device.h"

struct serial;

/* The stream behind the port. Called with the device's lock held: must not call back into it. */
struct serial_ops {
    /* Takes up to len characters; returns how many. After fewer than len: serial_writable follows. */
    size_t (*put)(void *opaque, const u8 *buf, size_t len);
    /* serial_can_receive may have become non-zero. May be NULL. */
    void (*accept_input)(void *opaque);
    void *opaque;
};

struct serial_config {
    u16 base;              /* first of the eight ports */
    struct irq_line irq;   /* where INTR goes (gated by MCR's OUT2, as on every PC) */
    struct serial_ops ops; /* all zero: output vanishes, no input */
};

/* NULL with err set when memory or the ports are not to be had. Destroyed by dev.ops->destroy. */
struct serial *serial_create(const struct device_env *env, const struct serial_config *cfg,
                             struct error *err);
struct device *serial_device(struct serial *s);

/* How many characters the guest is ready for: 0 until ops.accept_input. Any thread. */
size_t serial_can_receive(struct serial *s);
/* Gives the receiver up to len characters; returns how many it took. Any thread. */
size_t serial_receive(struct serial *s, const u8 *buf, size_t len);
/* A break condition arrives. Any thread. */
void serial_receive_break(struct serial *s);
/* The stream has room again: sends what waits. Any thread. */
void serial_writable(struct serial *s);

#endif
