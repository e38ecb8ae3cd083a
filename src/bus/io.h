/*
 * The port and MMIO buses: who answers at which address.
 *
 * Ranges are registered by devices (through the board) and looked up by engines. An access that no
 * range claims reads all ones and writes nowhere, logged at debug level once per address. Accesses that
 * a range can't take whole (wider than its max_size, or across its end) are split into smaller ones,
 * low address first, as a bridge does.
 *
 * Locking: lookups and dispatch may run on any thread at once; registration happens under the board's
 * construction or hot-plug and is safe against running lookups. Operations are called with no lock
 * held; each takes its device's own.
 */
#ifndef DOPPEL_BUS_IO_H
#define DOPPEL_BUS_IO_H

#include "host/error.h"
#include "host/types.h"

struct io_ops {
    /* Reads `size` (1, 2, 4 or 8) bytes at `offset` from the range's start. */
    u64 (*read)(void *opaque, u64 offset, unsigned size);
    void (*write)(void *opaque, u64 offset, u64 value, unsigned size);
    u8 max_size; /* widest access passed on: 1, 2, 4 or 8; 0 means 8 */
};

struct io_range {
    const char *name;
    u64 base, size;
    const struct io_ops *ops;
    void *opaque;
};

/*
 * A doorbell is an address to which a write, of any size and value, is but a signal. Who runs the guest may
 * signal the eventfd in place of making the access, which does the same: KVM's kernel does so.
 */
struct io_listener {
    /* A doorbell comes (`there`) or goes. Any thread, the bus locked: it can't be called. */
    void (*doorbell)(void *opaque, u64 addr, int fd, bool there);
    void *opaque;
};

struct io_bus;

/* limit: the number of addresses (0x10000 for ports; 1 << physical address bits for MMIO). */
struct io_bus *io_bus_create(const char *name, u64 limit, struct error *err);
void io_bus_destroy(struct io_bus *bus);

/* Adds a range; the caller owns `range` until it is removed. -EEXIST when it overlaps another. */
int io_bus_add(struct io_bus *bus, struct io_range *range, struct error *err);
void io_bus_remove(struct io_bus *bus, struct io_range *range);

/* Whom to tell of doorbells from now on: one, copied; without a function, nobody. */
void io_bus_listen(struct io_bus *bus, struct io_listener listener);
/*
 * For the owner of the range at addr: a doorbell comes, after the range, or goes, before it does. The eventfd
 * stays the owner's; it must be open until the doorbell is gone.
 */
void io_bus_set_doorbell(struct io_bus *bus, u64 addr, int fd, bool there);

/* The accesses that guests make. size: 1, 2, 4 or 8; the value is zero-extended. */
u64 io_bus_read(struct io_bus *bus, u64 addr, unsigned size);
void io_bus_write(struct io_bus *bus, u64 addr, u64 value, unsigned size);

#endif
