/*
 * What every device has: a name, a lock, a life (create, reset, save, load, destroy) and the table of
 * its state.
 *
 * A device is a struct whose first member is `struct device`. Its create function takes a device_env and
 * its own configuration (base address, interrupt lines), registers its ranges on the buses, and leaves
 * the device in its power-on state. The board (src/machine/board.c) creates, wires and destroys.
 *
 * Locking: dev.lock guards all of the device's state. Bus operations and timer callbacks take it. A
 * device may raise its lines and send MSIs with the lock held (interrupt controllers never call back
 * into a device while they hold their own lock), and calls nothing else that can call back.
 */
#ifndef DOPPEL_DEVICE_DEVICE_H
#define DOPPEL_DEVICE_DEVICE_H

#include "bus/clock.h"
#include "bus/io.h"
#include "bus/irq.h"
#include "bus/memory.h"
#include "host/error.h"
#include "host/event_loop.h"
#include "host/types.h"
#include "state/fields.h"

#include <pthread.h>

struct device;

struct device_ops {
    void (*reset)(struct device *dev);   /* to the power-on state; takes the lock itself */
    void (*destroy)(struct device *dev); /* takes timers and ranges away and frees it */
    /*
     * Optional, on the loop's thread with no vCPU running; they take the lock themselves. stop: finish
     * what is in flight and begin nothing more, so that memory and state stand still. start: go on.
     */
    void (*start)(struct device *dev);
    void (*stop)(struct device *dev);
    /* Optional. After stop: whether something waits that a saved state can't hold. */
    bool (*busy)(struct device *dev);
};

struct device {
    const char *name;
    u32 instance; /* tells apart those of one name in a saved state */
    const struct device_ops *ops;
    const struct state_desc *state; /* describes the struct that embeds this one */
    pthread_mutex_t lock;
};

/* What a device may use of the machine. Outlives every device. */
struct device_env {
    struct io_bus *ports;
    struct io_bus *mmio;
    struct guest_memory *memory;
    struct vm_clock *clock;
    struct event_loop *loop;
};

static inline void device_init(struct device *dev, const char *name, const struct device_ops *ops,
                               const struct state_desc *state)
{
    dev->name = name;
    dev->ops = ops;
    dev->state = state;
    pthread_mutex_init(&dev->lock, NULL);
}
static inline void device_lock(struct device *dev)
{
    pthread_mutex_lock(&dev->lock);
}
static inline void device_unlock(struct device *dev)
{
    pthread_mutex_unlock(&dev->lock);
}

/*
 * What a guest asks of the machine as a whole: by 0xCF9, the keyboard controller, port 0x92, ACPI PM1
 * control, pvpanic, debug exit. Any thread; returns at once, the vCPUs leave their loops soon after.
 */
enum power_request {
    POWER_OFF,        /* ACPI S5 */
    POWER_RESET,      /* a reset of the machine */
    POWER_DEBUG_EXIT, /* value: the status to exit with */
    POWER_PAUSE,      /* stop until the user lets it go on: a disk's write failed */
    POWER_PANICKED,   /* pvpanic: the guest told that it panicked; value: its event bits */
};
struct power_sink {
    void (*request)(void *sink, enum power_request what, u32 value);
    void *sink;
};

#endif
