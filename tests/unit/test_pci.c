/*
 * PCI: configuration space by its three ways, BARs that are sized and moved, INTx, MSI, MSI-X, reset, state,
 * and what a direct boot assigns.
 */
#include "device/pci/internal.h"
#include "pci_rig.h"

#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <sys/eventfd.h>

#include <cmocka.h>

#define SLOT 3
#define DEVFN PCI_DEVFN(SLOT, 0)
#define BUS_MASTER_ON (PCI_COMMAND_IO | PCI_COMMAND_MEMORY | PCI_COMMAND_MASTER)
#define VECTORS 66

/* ---- a function ---- */

struct toy {
    struct pci_device pci;
    u64 last[4]; /* what was written to each BAR */
};

static const struct state_field toy_fields[] = {
    STATE_STRUCTS(struct toy, pci, &pci_device_state),
    STATE_FIELD(struct toy, last),
};
static const struct state_desc toy_state = STATE_DESC("toy", 1, struct toy, toy_fields);

static u64 bar_read(void *opaque, u64 offset, unsigned size)
{
    return offset;
}
static void bar_write(void *opaque, u64 offset, u64 value, unsigned size)
{
    u64 *last = opaque;

    *last = offset << 8 | (value & 0xff);
}
static const struct io_ops bar_ops = {bar_read, bar_write, 8};

static void toy_reset(struct device *dev)
{
    pci_device_reset(container_of(dev, struct pci_device, dev));
}
static void toy_destroy(struct device *dev)
{
    struct toy *t = container_of(dev, struct toy, pci.dev);

    pci_device_fini(&t->pci);
    free(t);
}
static const struct pci_device_ops toy_ops = {.dev = {.reset = toy_reset, .destroy = toy_destroy}};

static struct toy *toy_create(struct pci_host *host, unsigned devfn, u8 pin)
{
    struct pci_identity id = {.vendor = 0x1234,
                              .device = 0x5678,
                              .class = PCI_CLASS_STORAGE_SCSI,
                              .revision = 7,
                              .subsystem_vendor = 0xabcd,
                              .subsystem = 0xef01,
                              .pin = pin};
    struct toy *t = calloc(1, sizeof(*t));
    struct error err;

    pci_device_init(&t->pci, "toy", &toy_ops, &toy_state, &id);
    pci_add_bar(&t->pci, 0, PCI_BAR_IO, 64, &bar_ops, &t->last[0]);
    pci_add_bar(&t->pci, 1, PCI_BAR_MEM32, 0x1000, &bar_ops, &t->last[1]);
    pci_add_bar(&t->pci, 2, PCI_BAR_MEM64_PREFETCH, 0x200000, &bar_ops, &t->last[2]);
    pci_add_msi(&t->pci, 8);
    pci_add_msix(&t->pci, VECTORS, 4);
    assert_int_equal(pci_host_add(host, &t->pci, devfn, &err), 0);
    toy_reset(&t->pci.dev);
    return t;
}

struct fixture {
    struct rig *rig;
    struct pci_host *host;
    struct toy *toy;
};

static int setup(void **state)
{
    struct fixture *f = calloc(1, sizeof(*f));

    f->rig = rig_create();
    f->host = rig_pci_host(f->rig);
    f->toy = toy_create(f->host, DEVFN, 1);
    *state = f;
    return 0;
}

static int teardown(void **state)
{
    struct fixture *f = *state;

    toy_destroy(&f->toy->pci.dev);
    pci_host_device(f->host)->ops->destroy(pci_host_device(f->host));
    rig_destroy(f->rig);
    free(f);
    return 0;
}

static u64 get(struct fixture *f, unsigned offset, unsigned size)
{
    return config_read(f->rig, DEVFN, offset, size);
}
static void put(struct fixture *f, unsigned offset, u64 value, unsigned size)
{
    config_write(f->rig, DEVFN, offset, value, size);
}
static void place_bars(struct fixture *f)
{
    put(f, PCI_BASE_ADDRESS_0, 0xc000, 4);
    put(f, PCI_BASE_ADDRESS_0 + 4, 0xc0000000, 4);
    put(f, PCI_BASE_ADDRESS_0 + 8, 0x00200000, 4);
    put(f, PCI_BASE_ADDRESS_0 + 12, 8, 4);
    put(f, PCI_BASE_ADDRESS_0 + 16, 0xc0010000, 4);
    put(f, PCI_COMMAND, BUS_MASTER_ON, 2);
}

/* ---- configuration space ---- */

static void identifies_itself(void **state)
{
    struct fixture *f = *state;

    assert_int_equal(get(f, 0, 4), 0x56781234);
    assert_int_equal(get(f, 2, 2), 0x5678);
    assert_int_equal(get(f, PCI_CLASS_DEVICE, 2), PCI_CLASS_STORAGE_SCSI);
    assert_int_equal(get(f, PCI_REVISION_ID, 1), 7);
    assert_int_equal(get(f, PCI_SUBSYSTEM_VENDOR_ID, 4), 0xef01abcd);
    assert_int_equal(get(f, PCI_INTERRUPT_PIN, 1), 1);
    put(f, 0, 0, 4);
    put(f, PCI_INTERRUPT_PIN, 0, 1);
    assert_int_equal(get(f, 0, 4), 0x56781234);
    assert_int_equal(get(f, PCI_INTERRUPT_PIN, 1), 1);
    put(f, PCI_INTERRUPT_LINE, 11, 1);
    assert_int_equal(get(f, PCI_INTERRUPT_LINE, 1), 11);
    assert_int_equal(config_read(f->rig, 0, 0, 4), PCI_HOST_DEVICE << 16 | PCI_HOST_VENDOR);
}

static void absent_functions_read_ones(void **state)
{
    struct fixture *f = *state;

    assert_int_equal(config_read(f->rig, PCI_DEVFN(9, 0), 0, 4), 0xffffffff);
    assert_int_equal(config_read(f->rig, PCI_DEVFN(SLOT, 1), 0, 2), 0xffff);
    io_bus_write(f->rig->env.ports, CONFIG_PORT, 0x80010000, 4); /* bus 1 */
    assert_int_equal(io_bus_read(f->rig->env.ports, CONFIG_PORT + 4, 4), 0xffffffff);
    io_bus_write(f->rig->env.ports, CONFIG_PORT, 0, 4); /* not enabled */
    assert_int_equal(io_bus_read(f->rig->env.ports, CONFIG_PORT + 4, 4), 0xffffffff);
}

static void ecam_is_where_pciexbar_says(void **state)
{
    struct fixture *f = *state;
    struct io_bus *mmio = f->rig->env.mmio;
    u64 at = ECAM + (DEVFN << 12);

    assert_int_equal(io_bus_read(mmio, at, 4), 0xffffffff);
    config_write(f->rig, 0, PCI_HOST_PCIEXBAR, ECAM | 1, 4);
    assert_int_equal(io_bus_read(mmio, at, 4), 0x56781234);
    assert_int_equal(io_bus_read(mmio, at, 8) >> 32, get(f, 4, 4));
    assert_int_equal(io_bus_read(mmio, at + 0x100, 4), 0); /* no extended capabilities */
    io_bus_write(mmio, at + PCI_INTERRUPT_LINE, 5, 1);
    assert_int_equal(get(f, PCI_INTERRUPT_LINE, 1), 5);
    assert_int_equal(io_bus_read(mmio, ECAM + PCI_ECAM_BUS_SIZE, 4), 0xffffffff);
    config_write(f->rig, 0, PCI_HOST_PCIEXBAR, 0xd0000000 | 2 << 1 | 1, 4); /* 64 buses */
    assert_int_equal(io_bus_read(mmio, at, 4), 0xffffffff);
    assert_int_equal(io_bus_read(mmio, 0xd0000000 + (DEVFN << 12), 4), 0x56781234);
}

static unsigned reset_writes;
static u8 reset_read(void *opaque)
{
    return 0x42;
}
static void reset_write(void *opaque, u8 value)
{
    reset_writes += value;
}

static void bytes_at_0xcf9_are_the_reset_control(void **state)
{
    struct rig *r = rig_create();
    struct pci_host_config config = {
        .port = CONFIG_PORT, .reset_control_read = reset_read, .reset_control_write = reset_write};
    struct pci_host *host = pci_host_create(&r->env, &config, &r->err);

    reset_writes = 0;
    io_bus_write(r->env.ports, CONFIG_PORT, 0x80000600, 4);
    assert_int_equal(reset_writes, 0);
    io_bus_write(r->env.ports, CONFIG_PORT + 1, 6, 1);
    assert_int_equal(reset_writes, 6);
    assert_int_equal(io_bus_read(r->env.ports, CONFIG_PORT, 4), 0x80000600);
    assert_int_equal(io_bus_read(r->env.ports, CONFIG_PORT + 1, 1), 0x42);
    pci_host_device(host)->ops->destroy(pci_host_device(host));
    rig_destroy(r);
}

static void other_functions_make_a_slot_multi_function(void **state)
{
    struct fixture *f = *state;
    struct toy *second = toy_create(f->host, PCI_DEVFN(SLOT, 2), 2);
    struct error err;

    assert_int_equal(get(f, PCI_HEADER_TYPE, 1), PCI_HEADER_TYPE_MULTI_FUNCTION);
    assert_int_equal(config_read(f->rig, PCI_DEVFN(SLOT, 2), PCI_HEADER_TYPE, 1), 0);
    assert_int_equal(pci_host_add(f->host, &second->pci, DEVFN, &err), -EEXIST);
    assert_int_equal(pci_host_free_slot(f->host, SLOT), SLOT + 1);
    toy_destroy(&second->pci.dev);
    assert_int_equal(config_read(f->rig, PCI_DEVFN(SLOT, 2), 0, 4), 0xffffffff);
}

/* ---- BARs ---- */

static void bars_tell_their_size(void **state)
{
    struct fixture *f = *state;

    for (unsigned i = 0; i < PCI_BARS; i++)
        put(f, PCI_BASE_ADDRESS_0 + 4 * i, 0xffffffff, 4);
    assert_int_equal(get(f, PCI_BASE_ADDRESS_0, 4), 0xffffffc1);
    assert_int_equal(get(f, PCI_BASE_ADDRESS_0 + 4, 4), 0xfffff000);
    assert_int_equal(get(f, PCI_BASE_ADDRESS_0 + 8, 4), 0xffe0000c);
    assert_int_equal(get(f, PCI_BASE_ADDRESS_0 + 12, 4), 0xffffffff);
    assert_int_equal(get(f, PCI_BASE_ADDRESS_0 + 16, 4), 0xfffff000);
    assert_int_equal(get(f, PCI_BASE_ADDRESS_0 + 20, 4), 0);
}

static void bars_answer_where_they_are(void **state)
{
    struct fixture *f = *state;
    struct io_bus *mmio = f->rig->env.mmio;

    place_bars(f);
    io_bus_write(f->rig->env.ports, 0xc004, 0x11, 1);
    assert_int_equal(f->toy->last[0], 0x411);
    io_bus_write(mmio, 0xc0000008, 0x22, 4);
    assert_int_equal(f->toy->last[1], 0x822);
    io_bus_write(mmio, 0x800200010, 0x33, 8);
    assert_int_equal(f->toy->last[2], 0x1033);
    assert_int_equal(io_bus_read(mmio, 0x8003ffff8, 8), 0x1ffff8);

    put(f, PCI_BASE_ADDRESS_0 + 4, 0xd0000000, 4);
    assert_int_equal(io_bus_read(mmio, 0xc0000008, 4), 0xffffffff);
    assert_int_equal(io_bus_read(mmio, 0xd0000008, 4), 8);
    put(f, PCI_COMMAND, PCI_COMMAND_IO, 2);
    assert_int_equal(io_bus_read(mmio, 0xd0000008, 4), 0xffffffff);
    assert_int_equal(io_bus_read(f->rig->env.ports, 0xc004, 1), 4);
    put(f, PCI_COMMAND, 0, 2);
    assert_int_equal(io_bus_read(f->rig->env.ports, 0xc004, 1), 0xff);
}

/* Two functions that swap their places, one after the other. */
static void a_bar_gets_its_place_when_it_is_free(void **state)
{
    struct fixture *f = *state;
    struct toy *other = toy_create(f->host, PCI_DEVFN(4, 0), 1);
    struct io_bus *mmio = f->rig->env.mmio;

    put(f, PCI_BASE_ADDRESS_0 + 4, 0xc0000000, 4);
    put(f, PCI_COMMAND, PCI_COMMAND_MEMORY, 2);
    config_write(f->rig, PCI_DEVFN(4, 0), PCI_BASE_ADDRESS_0 + 4, 0xc0000000, 4);
    config_write(f->rig, PCI_DEVFN(4, 0), PCI_COMMAND, PCI_COMMAND_MEMORY, 2);
    io_bus_write(mmio, 0xc0000000, 1, 1);
    assert_int_equal(f->toy->last[1], 1);
    assert_int_equal(other->last[1], 0);
    put(f, PCI_BASE_ADDRESS_0 + 4, 0xc0001000, 4);
    io_bus_write(mmio, 0xc0000000, 2, 1);
    io_bus_write(mmio, 0xc0001000, 3, 1);
    assert_int_equal(f->toy->last[1], 3);
    assert_int_equal(other->last[1], 2);
    toy_destroy(&other->pci.dev);
    assert_int_equal(io_bus_read(mmio, 0xc0000000, 1), 0xff);
}

static void a_direct_boot_assigns_addresses(void **state)
{
    struct fixture *f = *state;
    struct pci_windows w = {0xc0000000, 0xc1000000, 0xc000, 0x10000};
    const u8 irq[PCI_PIRQS] = {10, 11, 10, 11, 10, 11, 10, 11};

    pci_host_assign(f->host, &w, ECAM, irq);
    u64 mem = get(f, PCI_BASE_ADDRESS_0 + 4, 4), wide = get(f, PCI_BASE_ADDRESS_0 + 8, 4);
    assert_true(mem >= w.mmio_base && mem < w.mmio_end);
    assert_int_equal(wide & 0x1fffff, 0xc);
    assert_int_equal(io_bus_read(f->rig->env.mmio, mem + 16, 4), 16);
    assert_int_equal(io_bus_read(f->rig->env.mmio, (wide & ~15ULL) + 32, 4), 32);
    assert_int_equal(io_bus_read(f->rig->env.mmio, ECAM + (DEVFN << 12), 4), 0x56781234);
    assert_int_equal(get(f, PCI_INTERRUPT_LINE, 1), irq[pci_host_pirq(SLOT, 0)]);
}

/* ---- interrupts ---- */

static void intx_lines_are_shared(void **state)
{
    struct fixture *f = *state;
    unsigned line = pci_host_pirq(SLOT, 0);
    struct toy *other = toy_create(f->host, PCI_DEVFN(SLOT + 4, 0), 1);

    assert_int_equal(line, 4 + SLOT % 4);
    assert_int_equal(pci_host_pirq(31, 1), 1);
    pci_intx_set(&f->toy->pci, true);
    pci_intx_set(&other->pci, true);
    assert_true(f->rig->levels[line]);
    assert_true(get(f, PCI_STATUS, 2) & PCI_STATUS_INTERRUPT);
    pci_intx_set(&f->toy->pci, false);
    assert_true(f->rig->levels[line]);
    config_write(f->rig, PCI_DEVFN(SLOT + 4, 0), PCI_COMMAND, PCI_COMMAND_INTX_DISABLE, 2);
    assert_false(f->rig->levels[line]);
    config_write(f->rig, PCI_DEVFN(SLOT + 4, 0), PCI_COMMAND, 0, 2);
    assert_true(f->rig->levels[line]);
    toy_destroy(&other->pci.dev);
    assert_false(f->rig->levels[line]);
}

static void msi_has_masks_and_pending_bits(void **state)
{
    struct fixture *f = *state;
    unsigned cap = find_capability(f->rig, DEVFN, PCI_CAP_ID_MSI, 0);
    struct rig *r = f->rig;

    pci_msi_notify(&f->toy->pci, 0);
    put(f, PCI_COMMAND, BUS_MASTER_ON, 2);
    assert_int_equal(get(f, cap + PCI_MSI_FLAGS, 2), 0x186);
    put(f, cap + PCI_MSI_ADDRESS_LO, 0xfee01003, 4);
    put(f, cap + PCI_MSI_ADDRESS_HI, 5, 4);
    put(f, cap + PCI_MSI_DATA, 0x4447, 2);
    put(f, cap + PCI_MSI_FLAGS, 2 << 4 | 1, 2); /* 4 of the 8 */
    assert_int_equal(r->messages, 0);
    pci_msi_notify(&f->toy->pci, 2);
    assert_int_equal(r->messages, 1);
    assert_int_equal(r->msi_address, 0x5fee01000);
    assert_int_equal(r->msi_data, 0x4446);
    put(f, cap + PCI_MSI_MASK, 1 << 1, 4);
    pci_msi_notify(&f->toy->pci, 5); /* shares the second */
    assert_int_equal(r->messages, 1);
    assert_int_equal(get(f, cap + PCI_MSI_PENDING, 4), 1 << 1);
    put(f, cap + PCI_MSI_MASK, 0, 4);
    assert_int_equal(r->messages, 2);
    assert_int_equal(r->msi_data, 0x4445);
    assert_int_equal(get(f, cap + PCI_MSI_PENDING, 4), 0);
}

#define MSIX_BAR 0xc0010000ULL

static void msix_has_masks_and_pending_bits(void **state)
{
    struct fixture *f = *state;
    struct rig *r = f->rig;
    struct io_bus *mmio = r->env.mmio;
    unsigned cap = find_capability(r, DEVFN, PCI_CAP_ID_MSIX, 0);
    u64 entry = MSIX_BAR + 65 * PCI_MSIX_ENTRY_SIZE;
    u64 pba = MSIX_BAR + (get(f, cap + PCI_MSIX_PBA, 4) & ~7ULL);

    place_bars(f);
    assert_int_equal(get(f, cap + PCI_MSIX_FLAGS, 2), VECTORS - 1);
    assert_int_equal(get(f, cap + PCI_MSIX_TABLE, 4), 4);
    assert_int_equal(io_bus_read(mmio, entry + 12, 4), 1); /* masked at first */
    io_bus_write(mmio, entry, 0x00000001fee02000, 8);
    io_bus_write(mmio, entry + 8, 0x4321, 4);
    pci_msix_notify(&f->toy->pci, 65); /* not enabled: nothing */
    put(f, cap + PCI_MSIX_FLAGS, PCI_MSIX_FLAGS_ENABLE | PCI_MSIX_FLAGS_MASKALL, 2);
    pci_msix_notify(&f->toy->pci, 65);
    pci_msix_notify(&f->toy->pci, VECTORS); /* there is none */
    assert_int_equal(io_bus_read(mmio, pba + 8, 8), 2);
    io_bus_write(mmio, entry + 12, 0, 4);
    assert_int_equal(r->messages, 0);
    put(f, cap + PCI_MSIX_FLAGS, PCI_MSIX_FLAGS_ENABLE, 2);
    assert_int_equal(r->messages, 1);
    assert_int_equal(r->msi_address, 0x1fee02000);
    assert_int_equal(r->msi_data, 0x4321);
    assert_int_equal(io_bus_read(mmio, pba + 8, 8), 0);
    pci_msix_notify(&f->toy->pci, 65);
    assert_int_equal(r->messages, 2);
    put(f, PCI_COMMAND, PCI_COMMAND_MEMORY, 2); /* no bus master: waits */
    pci_msix_notify(&f->toy->pci, 65);
    assert_int_equal(r->messages, 2);
    put(f, PCI_COMMAND, BUS_MASTER_ON, 2);
    assert_int_equal(r->messages, 3);
    io_bus_write(mmio, entry + 12, 1, 4);
    pci_msix_notify(&f->toy->pci, 65);
    pci_msix_clear(&f->toy->pci, 65);
    io_bus_write(mmio, entry + 12, 0, 4);
    assert_int_equal(r->messages, 3);
}

/* ---- vectors bound to eventfds, as KVM takes them ---- */

#define BOUND_MAX 4

struct binder {
    struct {
        int fd;
        u64 address;
        u32 data;
    } bound[BOUND_MAX];
    unsigned count, binds, room, delivered;
};

static void binder_deliver(void *sink, u64 address, u32 data)
{
    ((struct binder *)sink)->delivered++;
}

static int binder_bind(void *sink, int fd, u64 address, u32 data)
{
    struct binder *b = sink;
    unsigned i = 0;

    while (i < b->count && b->bound[i].fd != fd)
        i++;
    if (i == b->room)
        return -ENOSPC;
    b->count = MAX(b->count, i + 1);
    b->binds++;
    b->bound[i].fd = fd;
    b->bound[i].address = address;
    b->bound[i].data = data;
    return 0;
}

static void binder_unbind(void *sink, int fd)
{
    struct binder *b = sink;

    assert_int_equal(b->bound[b->count - 1].fd, fd); /* the toys below bind one after the other */
    b->count--;
}

/* How often the ith eventfd was signalled since this was asked last. */
static u64 take_signals(const struct binder *b, unsigned i)
{
    eventfd_t n = 0;

    return eventfd_read(b->bound[i].fd, &n) ? 0 : n;
}

static void set_vector(struct toy *toy, unsigned vector, u32 address, u32 data, u32 control)
{
    toy->pci.msix[vector] =
        (struct pci_msix_entry){.address_lo = address, .data = data, .control = control};
    pci_msix_update(&toy->pci);
}

static void msix_vectors_are_bound_to_eventfds(void **state)
{
    struct binder b = {.room = 1};
    struct pci_host_config config = {
        .port = CONFIG_PORT + 16,
        .msi = {binder_deliver, &b, binder_bind, binder_unbind},
    };
    struct rig *r = ((struct fixture *)*state)->rig;
    struct pci_host *host = pci_host_create(&r->env, &config, &r->err);
    struct toy *toy = toy_create(host, DEVFN, 1);
    struct pci_device *pci = &toy->pci;

    pci_config_set16(pci, PCI_COMMAND, PCI_COMMAND_MASTER);
    pci_config_set16(pci, pci->msix_cap + PCI_MSIX_FLAGS, (VECTORS - 1) | PCI_MSIX_FLAGS_ENABLE);
    set_vector(toy, 3, 0xfee01000, 0x41, PCI_MSIX_ENTRY_CTRL_MASKBIT);
    pci_msix_notify(pci, 3); /* masked: pending, and nothing is bound yet */
    assert_int_equal(b.binds, 0);
    set_vector(toy, 3, 0xfee01000, 0x41, 0);
    assert_int_equal(b.binds, 1);
    assert_int_equal(b.bound[0].address, 0xfee01000);
    assert_int_equal(b.bound[0].data, 0x41);
    assert_int_equal(take_signals(&b, 0), 1);
    pci_msix_notify(pci, 3);
    assert_int_equal(take_signals(&b, 0), 1);
    assert_int_equal(b.binds, 1);
    set_vector(toy, 3, 0xfee01000, 0x41, PCI_MSIX_ENTRY_CTRL_MASKBIT);
    pci_msix_notify(pci, 3); /* a mask holds the signal back */
    assert_int_equal(take_signals(&b, 0), 0);
    set_vector(toy, 3, 0xfee02000, 0x42, 0); /* what was pending goes to the new place */
    assert_int_equal(b.binds, 2);
    assert_int_equal(b.bound[0].address, 0xfee02000);
    assert_int_equal(b.bound[0].data, 0x42);
    assert_int_equal(take_signals(&b, 0), 1);
    assert_int_equal(b.delivered, 0);

    set_vector(toy, 5, 0xfee03000, 0x43, 0);
    pci_msix_notify(pci, 5); /* no room for a second: delivered */
    assert_int_equal(b.delivered, 1);

    toy_destroy(&pci->dev);
    assert_int_equal(b.count, 0);
    pci_host_device(host)->ops->destroy(pci_host_device(host));
}

/* ---- reset and state ---- */

static void reset_goes_back_to_power_on(void **state)
{
    struct fixture *f = *state;
    u8 before[PCI_CONFIG_SIZE];

    memcpy(before, f->toy->pci.config, sizeof(before));
    place_bars(f);
    pci_intx_set(&f->toy->pci, true);
    toy_reset(&f->toy->pci.dev);
    assert_memory_equal(f->toy->pci.config, before, sizeof(before));
    assert_false(f->rig->levels[pci_host_pirq(SLOT, 0)]);
    assert_int_equal(io_bus_read(f->rig->env.mmio, 0xc0000008, 4), 0xffffffff);
}

static void state_survives_the_round_trip(void **state)
{
    struct fixture *f = *state;
    struct rig *r = rig_create();
    struct pci_host *host = rig_pci_host(r);
    struct toy *fresh = toy_create(host, DEVFN, 1);
    u64 seed = 9;
    char buf[128];
    const char *wrong;

    place_bars(f);
    put(f, find_capability(f->rig, DEVFN, PCI_CAP_ID_MSIX, 0) + PCI_MSIX_FLAGS, 0xc000, 2);
    for (unsigned i = 0; i < VECTORS * 4; i++)
        io_bus_write(f->rig->env.mmio, MSIX_BAR + 4 * i, rig_random(&seed), 4);
    for (unsigned i = 0; i < VECTORS; i += 3)
        pci_msix_notify(&f->toy->pci, i);
    pci_intx_set(&f->toy->pci, true);
    wrong = rig_round_trip(f->rig, &f->toy->pci.dev, &fresh->pci.dev, buf, sizeof(buf));
    if (wrong)
        fail_msg("%s", wrong);
    config_write(f->rig, 0, PCI_HOST_PCIEXBAR, ECAM | 1, 4);
    wrong =
        rig_round_trip(f->rig, pci_host_device(f->host), pci_host_device(host), buf, sizeof(buf));
    if (wrong)
        fail_msg("%s", wrong);
    pci_host_loaded(host);
    assert_int_equal(io_bus_read(r->env.mmio, 0xc0000008, 4), 8);
    assert_int_equal(io_bus_read(r->env.mmio, ECAM + (DEVFN << 12), 4), 0x56781234);
    /* The line is up on that side already; its fall is news. */
    r->levels[pci_host_pirq(SLOT, 0)] = true;
    pci_intx_set(&fresh->pci, false);
    assert_false(r->levels[pci_host_pirq(SLOT, 0)]);

    toy_destroy(&fresh->pci.dev);
    pci_host_device(host)->ops->destroy(pci_host_device(host));
    rig_destroy(r);
}

static void a_state_of_another_device_is_refused(void **state)
{
    struct fixture *f = *state;
    size_t len = state_size(&toy_state);
    u8 *bytes = malloc(len);
    struct error err;

    state_save(&toy_state, f->toy, bytes);
    bytes[PCI_DEVICE_ID] ^= 1;
    assert_int_equal(state_load(&toy_state, f->toy, bytes, len, &err), -EINVAL);
    bytes[PCI_DEVICE_ID] ^= 1;
    bytes[PCI_BASE_ADDRESS_0 + 4] ^= 0x80; /* below the BAR's size */
    assert_int_equal(state_load(&toy_state, f->toy, bytes, len, &err), -EINVAL);
    bytes[PCI_BASE_ADDRESS_0 + 4] ^= 0x80;
    assert_int_equal(state_load(&toy_state, f->toy, bytes, len, &err), 0);
    free(bytes);
}

static void any_access_is_survived(void **state)
{
    struct fixture *f = *state;
    u64 seed = 5;

    config_write(f->rig, 0, PCI_HOST_PCIEXBAR, ECAM | 1, 4);
    for (unsigned i = 0; i < 200000; i++) {
        u64 r = rig_random(&seed), value = rig_random(&seed);
        unsigned size = 1U << (r & 3);
        u64 at = ECAM + (r >> 8 & 1 ? DEVFN << 12 : 0) + (r >> 10 & 0x1ff);

        if (r >> 20 & 1)
            at = 0xc0000000 + (r >> 24 & 0x1fff);
        if (r >> 21 & 1)
            io_bus_write(f->rig->env.mmio, at, value, size);
        else
            io_bus_read(f->rig->env.mmio, at, size);
        if ((r >> 40 & 7) == 0)
            pci_msix_notify(&f->toy->pci, r >> 43 & 127);
        if ((r >> 40 & 7) == 1)
            pci_msi_notify(&f->toy->pci, r >> 43 & 31);
        if ((r >> 40 & 7) == 2)
            pci_intx_set(&f->toy->pci, r >> 43 & 1);
        if ((r >> 50 & 0xff) == 0)
            config_write(f->rig, 0, PCI_HOST_PCIEXBAR, ECAM | 1, 4);
    }
}

#define TEST(fn) cmocka_unit_test_setup_teardown(fn, setup, teardown)

int main(void)
{
    const struct CMUnitTest tests[] = {
        TEST(identifies_itself),
        TEST(absent_functions_read_ones),
        TEST(ecam_is_where_pciexbar_says),
        cmocka_unit_test(bytes_at_0xcf9_are_the_reset_control),
        TEST(other_functions_make_a_slot_multi_function),
        TEST(bars_tell_their_size),
        TEST(bars_answer_where_they_are),
        TEST(a_bar_gets_its_place_when_it_is_free),
        TEST(a_direct_boot_assigns_addresses),
        TEST(intx_lines_are_shared),
        TEST(msi_has_masks_and_pending_bits),
        TEST(msix_has_masks_and_pending_bits),
        TEST(msix_vectors_are_bound_to_eventfds),
        TEST(reset_goes_back_to_power_on),
        TEST(state_survives_the_round_trip),
        TEST(a_state_of_another_device_is_refused),
        TEST(any_access_is_survived),
    };
    return cmocka_run_group_tests_name("pci", tests, NULL, NULL);
}
