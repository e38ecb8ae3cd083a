/*
 * Bytes as a driver of virtio-pmem: requests of any shape in rings of both kinds, registers, resets with flushes under
 * way. Then a damaged state.
 */
#include "../unit/disk_rig.h"
#include "../unit/virtio_rig.h"
#include "device/virtio/pmem.h"
#include "fuzz_device.h"
#include "host/log.h"

#define START 0x40000000ULL
#define SIZE KIB(64)

static void add_request(struct driver *d, struct input *in)
{
    struct buffer b[3];
    unsigned n = 1 + take(in, 1) % 3;
    u32 type = take(in, 1) % 2;

    memory_write(&d->rig->memory, BUFFERS, &type, sizeof(type));
    for (unsigned i = 0; i < n; i++) {
        /* Often right, so that it comes as far as a flush. */
        bool right = take(in, 1) & 3;

        b[i] = right ? (struct buffer){BUFFERS + 8 * i, 4, i > 0}
                     : (struct buffer){take(in, 2), (u32)take(in, 2), take(in, 1) & 1};
    }
    add(d, b, n, take(in, 1) % d->size);
    notify(d);
}

static void step(struct driver *d, struct virtio *v, struct input *in)
{
    unsigned size = 1U << take(in, 1) % 4;

    switch (take(in, 1) % 6) {
    case 0:
        access_bus(d->rig->env.mmio, TOY_BAR + take(in, 2) % VIRTIO_BAR_SIZE, size, false, in);
        break;
    case 1:
    case 2:
        add_request(d, in);
        break;
    case 3:
        start_driver(d, take(in, 8), 1 + take(in, 1) % 32);
        break;
    case 4:
        virtio_device(v)->ops->reset(virtio_device(v));
        config_write(d->rig, TOY_DEVFN, PCI_BASE_ADDRESS_0 + 4 * VIRTIO_BAR, TOY_BAR, 4);
        config_write(d->rig, TOY_DEVFN, PCI_COMMAND, PCI_COMMAND_MEMORY | PCI_COMMAND_MASTER, 2);
        break;
    case 5:
        load_damaged_state(virtio_device(v), in);
        pci_host_loaded(d->host);
        break;
    }
    run_loop(d);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct input in = {data, size};
    struct driver d = {.rig = disk_rig_create(), .size = 8};
    struct virtio_pmem_config cfg = {rig_disk(d.rig, SIZE, false), START, SIZE};
    struct device *host;
    struct virtio *v;

    log_set_level(LOG_ERROR);
    d.host = rig_pci_host(d.rig);
    v = virtio_pmem_create(&d.rig->env, &cfg, d.host, TOY_DEVFN, &d.rig->err);
    if (!v)
        abort();
    virtio_device(v)->ops->reset(virtio_device(v));
    config_write(d.rig, TOY_DEVFN, PCI_BASE_ADDRESS_0 + 4 * VIRTIO_BAR, TOY_BAR, 4);
    config_write(d.rig, TOY_DEVFN, PCI_COMMAND, PCI_COMMAND_MEMORY | PCI_COMMAND_MASTER, 2);
    start_driver(&d, take(&in, 8), 8);
    while (in.left)
        step(&d, v, &in);
    virtio_device(v)->ops->destroy(virtio_device(v));
    block_destroy(cfg.backend);
    host = pci_host_device(d.host);
    host->ops->destroy(host);
    disk_rig_destroy(d.rig);
    return 0;
}
