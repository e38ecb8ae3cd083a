/*
 * virtio-console with several ports: VIRTIO 1.2, 5.3. A port is a console (hvc0, hvc1...) or, with a name, a
 * character device of the guest's (/dev/virtio-ports/NAME). What is on the other side is a stream, as for a serial
 * port: the board connects it, by virtio_console_port_* and struct console_port's put.
 */
#ifndef DOPPEL_DEVICE_VIRTIO_CONSOLE_H
#define DOPPEL_DEVICE_VIRTIO_CONSOLE_H

#include "device/virtio/virtio.h"

#define VIRTIO_CONSOLE_PORTS_MAX 16

struct console_port {
    const char *name; /* NULL: a console */
    /* Takes up to len characters; fewer: virtio_console_port_writable follows. With the lock held. */
    size_t (*put)(void *opaque, const u8 *buf, size_t len);
    /* The guest can take input again. With the lock held; it must not call back. */
    void (*accept_input)(void *opaque);
    void *opaque;
};

struct virtio_console;

/* The device, on the bus at devfn, with 1 to VIRTIO_CONSOLE_PORTS_MAX ports. NULL with err set. */
struct virtio_console *virtio_console_create(const struct device_env *env,
                                             const struct console_port *ports, unsigned nports,
                                             struct pci_host *host, u8 devfn, struct error *err);
struct virtio *virtio_console_virtio(struct virtio_console *c);

/* The streams' side, on the loop's thread. How many characters the guest can take now; and some for it. */
size_t virtio_console_can_receive(struct virtio_console *c, unsigned port);
size_t virtio_console_receive(struct virtio_console *c, unsigned port, const u8 *buf, size_t len);
void virtio_console_writable(struct virtio_console *c, unsigned port);

#endif
