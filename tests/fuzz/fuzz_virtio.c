/*
 * Bytes as a driver of a virtio device: rings of both kinds, registers, notifications, resets in between, answers that
 * come late. Then a damaged state. The sanitizers and the rig's slots are the judges.
 */
#include "../unit/virtio_rig.h"
#include "fuzz_device.h"
#include "host/log.h"

static void ring_bytes(struct driver *d, struct input *in)
{
    static const u16 places[] = {RING_DESC, RING_DRIVER, RING_DEVICE, RING_INDIRECT};
    gpa_t at = places[take(in, 1) % ARRAY_SIZE(places)] + take(in, 1) * 2;

    for (unsigned n = take(in, 1) % 16; n; n--, at += 2)
        put16(d, at, (u16)take(in, 2));
}

static void add_chain(struct driver *d, struct input *in)
{
    struct buffer b[4];
    unsigned n = 1 + take(in, 1) % 4;

    for (unsigned i = 0; i < n; i++)
        b[i] = (struct buffer){take(in, 2), (u32)take(in, 2), take(in, 1) & 1};
    take(in, 1) & 1 ? add_indirect(d, b, n, take(in, 1) % d->size)
                    : add(d, b, n, take(in, 1) % d->size);
}

static void step(struct driver *d, struct input *in)
{
    unsigned size = 1U << take(in, 1) % 4;

    switch (take(in, 1) % 10) {
    case 0:
        reg_write(d, take(in, 2) % VIRTIO_BAR_SIZE, take(in, size), size);
        break;
    case 1:
        reg_write(d, take(in, 1) % 64, take(in, size), size);
        break;
    case 2:
        reg_read(d, take(in, 2) % VIRTIO_BAR_SIZE, size);
        break;
    case 3:
    case 4:
        ring_bytes(d, in);
        break;
    case 5:
        add_chain(d, in);
        notify(d);
        break;
    case 6:
        d->toy->keep = take(in, 1) & 1;
        if (!d->toy->keep)
            toy_answer_kept(d->toy);
        break;
    case 7:
        start_driver(d, take(in, 8), 1 + take(in, 1) % 32);
        break;
    case 8:
        config_write(d->rig, TOY_DEVFN, take(in, 1), take(in, size), MIN(size, 4));
        break;
    case 9:
        load_damaged_state(virtio_device(&d->toy->v), in);
        pci_host_loaded(d->host);
        break;
    }
    notify(d);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct input in = {data, size};
    struct driver *d;

    log_set_level(LOG_ERROR);
    d = driver_create();
    start_driver(d, take(&in, 8), 8);
    while (in.left)
        step(d, &in);
    driver_destroy(d);
    return 0;
}
