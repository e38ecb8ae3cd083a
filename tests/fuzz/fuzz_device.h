/*
 * What the harnesses of devices share: the input as a stream of numbers, accesses to a bus, and a damaged state.
 */
#ifndef DOPPEL_TESTS_FUZZ_DEVICE_H
#define DOPPEL_TESTS_FUZZ_DEVICE_H

#include "../unit/device_rig.h"

struct input {
    const uint8_t *data;
    size_t left;
};

/* The next n bytes (8 at most) as a number; zeroes behind the end. */
static inline u64 take(struct input *in, size_t n)
{
    u64 value = 0;

    n = MIN(n, in->left);
    memcpy(&value, in->data, n);
    in->data += n;
    in->left -= n;
    return value;
}

/* The next n bytes, and zeroes behind the end. Returns how many there were. */
static inline size_t take_bytes(struct input *in, u8 *buf, size_t n)
{
    size_t here = MIN(n, in->left);

    memset(buf, 0, n);
    memcpy(buf, in->data, here);
    in->data += here;
    in->left -= here;
    return here;
}

/* A read, or a write of what comes next. */
static inline void access_bus(struct io_bus *bus, u64 at, unsigned size, bool read,
                              struct input *in)
{
    if (read)
        io_bus_read(bus, at, size);
    else
        io_bus_write(bus, at, take(in, size), size);
}

/*
 * Loads the device's own state with some bytes changed, near the beginning or the end, where registers are; buffers
 * are most of what lies between.
 */
static inline void load_damaged_state(struct device *dev, struct input *in)
{
    size_t len = state_size(dev->state);
    u8 *bytes = malloc(len + 1);
    struct error err = {0};

    if (dev->ops->stop)
        dev->ops->stop(dev);
    state_save(dev->state, dev, bytes);
    for (unsigned changes = take(in, 1) % 16; changes && len; changes--) {
        bool from_end = take(in, 1) & 1;
        size_t at = take(in, 2) % len;

        bytes[from_end ? len - 1 - at : at] = (u8)take(in, 1);
    }
    device_lock(dev);
    state_load(dev->state, dev, bytes, len, &err);
    device_unlock(dev);
    free(bytes);
    if (dev->ops->start)
        dev->ops->start(dev);
}

#endif
