/*
 * Bytes as a driver of one of the small virtio devices (pmem, balloon, rng): requests of any shape in any of its queues,
 * in rings of both kinds; registers, resets with work under way, and what the host asks of it meanwhile. Then a
 * damaged state.
 */
#include "../unit/disk_rig.h"
#include "../unit/virtio_rig.h"
#include "device/virtio/balloon.h"
#include "device/virtio/pmem.h"
#include "device/virtio/rng.h"
#include "fuzz_device.h"
#include "host/log.h"

#define PMEM_START 0x40000000ULL
#define PMEM_SIZE KIB(64)
#define BALLOON_QUEUES 5

struct device_under_test {
    struct driver d;
    struct virtio *v;
    struct virtio_balloon *balloon;
    struct block_backend *pmem;
    unsigned queues;
    u64 hinted;
};

static void create_device(struct device_under_test *t, unsigned kind)
{
    struct rig *r = t->d.rig;

    t->queues = 1;
    if (kind == 0) {
        struct virtio_pmem_config cfg = {rig_disk(r, PMEM_SIZE, false), PMEM_START, PMEM_SIZE};

        t->pmem = cfg.backend;
        t->v = virtio_pmem_create(&r->env, &cfg, t->d.host, TOY_DEVFN, &r->err);
    } else if (kind == 1) {
        t->queues = BALLOON_QUEUES;
        t->balloon = virtio_balloon_create(&r->env, t->d.host, TOY_DEVFN, &r->err);
        t->v = t->balloon ? virtio_balloon_virtio(t->balloon) : NULL;
    } else {
        t->v = virtio_rng_create(&r->env, t->d.host, TOY_DEVFN, &r->err);
    }
    if (!t->v)
        abort();
}

static void place_bar(struct driver *d)
{
    config_write(d->rig, TOY_DEVFN, PCI_BASE_ADDRESS_0 + 4 * VIRTIO_BAR, TOY_BAR, 4);
    config_write(d->rig, TOY_DEVFN, PCI_COMMAND, PCI_COMMAND_MEMORY | PCI_COMMAND_MASTER, 2);
}

static void begin_queue(struct device_under_test *t, struct input *in)
{
    negotiate(&t->d, take(in, 8) | VIRTIO_F_VERSION_1);
    set_queue(&t->d, take(in, 1) % t->queues, 1 + take(in, 1) % 32);
    reg_write(&t->d, STATUS, 15, 1);
    run_loop(&t->d);
}

static void add_request(struct device_under_test *t, struct input *in)
{
    struct buffer b[3];
    unsigned n = 1 + take(in, 1) % 3, queue = take(in, 1) % t->queues;
    u64 words[2] = {take(in, 2), take(in, 8)};

    memory_write(&t->d.rig->memory, BUFFERS, words, sizeof(words));
    for (unsigned i = 0; i < n; i++) {
        /* Often what a driver would send, so that more than checks is run. */
        bool right = take(in, 1) & 3;

        b[i] = right ? (struct buffer){BUFFERS + 8 * i, 4, i > 0}
                     : (struct buffer){take(in, 2), (u32)take(in, 2), take(in, 1) & 1};
    }
    add(&t->d, b, n, take(in, 1) % t->d.size);
    reg_write(&t->d, VIRTIO_BAR_NOTIFY + VIRTIO_NOTIFY_MULTIPLIER * queue, queue, 2);
}

static void hinted(void *opaque, gpa_t gpa, u64 len)
{
    *(u64 *)opaque += len;
}

/* What the machine's owner wants of a balloon. */
static void ask_balloon(struct device_under_test *t, struct input *in)
{
    struct balloon_hints hints = {.free = hinted, .opaque = &t->hinted};
    struct balloon_stats stats;

    if (!t->balloon)
        return;
    virtio_balloon_set_target(t->balloon, take(in, 8));
    virtio_balloon_stats(t->balloon, &stats);
    virtio_balloon_hint(t->balloon, &hints);
}

static void step(struct device_under_test *t, struct input *in)
{
    struct device *dev = virtio_device(t->v);
    unsigned size = 1U << take(in, 1) % 4;

    switch (take(in, 1) % 7) {
    case 0:
        access_bus(t->d.rig->env.mmio, TOY_BAR + take(in, 2) % VIRTIO_BAR_SIZE, size,
                   take(in, 1) & 1, in);
        break;
    case 1:
    case 2:
        add_request(t, in);
        break;
    case 3:
        begin_queue(t, in);
        break;
    case 4:
        dev->ops->reset(dev);
        place_bar(&t->d);
        break;
    case 5:
        ask_balloon(t, in);
        break;
    case 6:
        load_damaged_state(dev, in);
        pci_host_loaded(t->d.host);
        break;
    }
    run_loop(&t->d);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct input in = {data, size};
    struct device_under_test t = {.d = {.rig = disk_rig_create(), .size = 8}};
    struct device *host;

    log_set_level(LOG_ERROR);
    t.d.host = rig_pci_host(t.d.rig);
    create_device(&t, take(&in, 1) % 3);
    place_bar(&t.d);
    begin_queue(&t, &in);
    while (in.left)
        step(&t, &in);
    virtio_device(t.v)->ops->destroy(virtio_device(t.v));
    block_destroy(t.pmem);
    host = pci_host_device(t.d.host);
    host->ops->destroy(host);
    disk_rig_destroy(t.d.rig);
    return 0;
}
