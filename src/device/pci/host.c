/*
 * The host bridge. Registers: Intel 3 Series Express Chipset data sheet (316966), chapters 3 and 5.1;
 * configuration mechanism #1: PCI Local Bus Specification 3.0, 3.2.2.3.2; ECAM: PCI Express 4.0, 7.2.2.
 *
 * Ranges: config writes that may move one end in pci_host_update_ranges, which compares where each BAR
 * is with where it is to be, takes away all that are wrong and then adds. Two BARs may want one place while a
 * guest moves them about; the second finds it taken, and gets it by a later pass when the first is gone.
 *
 * Lines: `asserted` counts the functions that drive each PIRQ. It is derived: what a function drives is in
 * its configuration space.
 */
#include "device/pci/host.h"

#include "device/pci/internal.h"
#include "host/log.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define CONFIG_ADDRESS_ENABLE BIT(31)
#define CONFIG_ADDRESS_WRITABLE 0x80fffffcU

#define FUNCTIONS 256
#define SLOTS 32
#define PINS 4
#define SLOT_FUNCTIONS 8
#define FIRST_CHIPSET_SLOT 25

/* PCIEXBAR (5.1.16): bits 2:1 choose how many buses ECAM has. */
#define PCIEXBAR_LENGTH_SHIFT 1
#define PCIEXBAR_WRITABLE_LO 0xfc000007U
#define PCIEXBAR_WRITABLE_HI 0xfU

#define BRIDGE_WINDOW MIB(2) /* of memory behind each, in a direct boot */

#define PAM0 0x90 /* to PAM6 (5.1.18 to 5.1.24): who answers in [0xc0000, 0x100000) */
#define PAM_COUNT 7
/* No system management mode: registers that the firmware reads back. */
#define SMRAM 0x9d
#define ESMRAMC 0x9e
#define SMRAM_POWER_ON 0x02
#define ESMRAMC_POWER_ON 0x38

struct pci_host {
    struct pci_device pci;
    struct device_env env;
    struct pci_host_config config;
    struct io_range address_range, data_range, ecam;
    bool ecam_mapped;

    pthread_mutex_t lock; /* functions[], and where ranges are */
    struct pci_device *functions[FUNCTIONS];

    pthread_mutex_t lines_lock;
    unsigned asserted[PCI_PIRQS];

    u32 address; /* CONFIG_ADDRESS; the device's lock */
};

/* ---- interrupts ---- */

unsigned pci_host_pirq(unsigned slot, unsigned pin)
{
    return slot < FIRST_CHIPSET_SLOT ? 4 + (slot + pin) % 4 : pin % 4;
}

/* A bridge hands INTx p of its device d on as its own (d + p) % 4 (PCI-to-PCI bridges 1.2, table 9-1). */
static unsigned pirq_of(const struct pci_device *pci)
{
    unsigned bridge = pci->place >> 8, slot = PCI_SLOT(pci->place & 0xff);

    if (!bridge)
        return pci_host_pirq(slot, pci->pin);
    return pci_host_pirq(PCI_SLOT(bridge), (slot + pci->pin) % PINS);
}

void pci_host_intx(struct pci_host *host, struct pci_device *pci, bool level)
{
    unsigned n = pirq_of(pci);

    if (pci->intx_driven == level)
        return;
    pci->intx_driven = level;
    pthread_mutex_lock(&host->lines_lock);
    host->asserted[n] += level ? 1 : -1U;
    irq_line_set(&host->config.pirq[n], host->asserted[n] > 0);
    pthread_mutex_unlock(&host->lines_lock);
}

void pci_host_send(struct pci_host *host, u64 address, u32 data)
{
    if (host->config.msi.deliver)
        msi_deliver(&host->config.msi, address, data);
}

bool pci_host_binds(const struct pci_host *host)
{
    return host->config.msi.bind;
}

bool pci_host_bind(struct pci_host *host, int fd, u64 address, u32 data)
{
    const struct msi_sink *msi = &host->config.msi;

    return msi->bind(msi->sink, fd, address, data) == 0;
}

void pci_host_unbind(struct pci_host *host, int fd)
{
    host->config.msi.unbind(host->config.msi.sink, fd);
}

/* ---- who is where; the bus's lock is held ---- */

/* NULL when the function isn't one. */
static struct pci_bridge *bridge_of(struct pci_device *pci)
{
    return pci && pci_is_bridge(pci) ? container_of(pci, struct pci_bridge, pci) : NULL;
}

/* Where it is noted who is at a place; NULL: there can be nobody. */
static struct pci_device **function_entry(struct pci_host *host, unsigned place)
{
    struct pci_bridge *bridge;

    if (place < FUNCTIONS)
        return &host->functions[place];
    bridge = bridge_of(host->functions[place >> 8 & 0xff]);
    return bridge && (place & 0xff) < PCI_LINK_FUNCTIONS ? &bridge->functions[place & 0xff] : NULL;
}

/* Calls fn for each function, with the bridge that it is behind, or NULL. */
static void for_each_function(struct pci_host *host,
                              void (*fn)(struct pci_host *host, struct pci_device *pci,
                                         struct pci_bridge *above))
{
    for (unsigned i = 0; i < FUNCTIONS; i++) {
        struct pci_bridge *bridge = bridge_of(host->functions[i]);

        if (host->functions[i])
            fn(host, host->functions[i], NULL);
        for (unsigned j = 0; bridge && j < PCI_LINK_FUNCTIONS; j++) {
            if (bridge->functions[j])
                fn(host, bridge->functions[j], bridge);
        }
    }
}

/* ---- ranges ---- */

static struct io_bus *bus_of(struct pci_host *host, const struct pci_bar *bar)
{
    return pci_bar_is_io(bar) ? host->env.ports : host->env.mmio;
}

static void set_doorbells(struct pci_host *host, const struct pci_bar *bar, bool there)
{
    for (unsigned i = 0; i < bar->ndoorbells; i++)
        io_bus_set_doorbell(bus_of(host, bar), bar->range.base + bar->doorbells[i].offset,
                            bar->doorbells[i].fd, there);
}

static void unmap_bar(struct pci_host *host, struct pci_bar *bar)
{
    if (!bar->mapped)
        return;
    set_doorbells(host, bar, false);
    io_bus_remove(bus_of(host, bar), &bar->range);
    bar->mapped = false;
}

/* Fails where something else is, or beyond the bus: nobody answers there then. */
static void map_bar(struct pci_host *host, struct pci_bar *bar, u64 address)
{
    struct error err;

    bar->range.base = address;
    bar->mapped = io_bus_add(bus_of(host, bar), &bar->range, &err) == 0;
    if (bar->mapped)
        set_doorbells(host, bar, true);
    else
        log_once(LOG_DEBUG, "pci: %s", err.text);
}

static u64 wanted_address(struct pci_device *pci, struct pci_bridge *above, unsigned n)
{
    u64 address;

    device_lock(&pci->dev);
    address = pci_bar_address(pci, n);
    device_unlock(&pci->dev);
    if (above && !(address && pci_bridge_forwards(above, address, pci->bars[n].size)))
        return 0;
    return address;
}

static void unmap_moved(struct pci_host *host, struct pci_device *pci, struct pci_bridge *above)
{
    for (unsigned n = 0; n < PCI_BARS; n++) {
        struct pci_bar *bar = &pci->bars[n];

        if (bar->mapped && wanted_address(pci, above, n) != bar->range.base)
            unmap_bar(host, bar);
    }
}

static void map_wanted(struct pci_host *host, struct pci_device *pci, struct pci_bridge *above)
{
    for (unsigned n = 0; n < PCI_BARS; n++) {
        struct pci_bar *bar = &pci->bars[n];
        u64 address;

        if (bar->kind == PCI_BAR_NONE || bar->mapped)
            continue;
        address = wanted_address(pci, above, n);
        if (address)
            map_bar(host, bar, address);
    }
}

/* What a bridge that became a bus master held back goes on its way. */
static void update_upstream(struct pci_host *host, struct pci_device *pci, struct pci_bridge *above)
{
    bool cut_off;

    if (!above)
        return;
    cut_off = !pci_bridge_is_bus_master(above);
    device_lock(&pci->dev);
    pci->cut_off = cut_off;
    pci_msi_update(pci);
    pci_msix_update(pci);
    device_unlock(&pci->dev);
}

static void update_ecam(struct pci_host *host, bool add)
{
    u64 reg, size, base;

    device_lock(&host->pci.dev);
    memcpy(&reg, host->pci.config + PCI_HOST_PCIEXBAR, sizeof(reg));
    device_unlock(&host->pci.dev);
    size = MIB(256) >> MIN(reg >> PCIEXBAR_LENGTH_SHIFT & 3, 2);
    base = reg & PCI_HOST_PCIEXBAR_ENABLE ? reg & ~7ULL & ~(size - 1) : 0;
    if (!add && host->ecam_mapped && (base != host->ecam.base || size != host->ecam.size)) {
        io_bus_remove(host->env.mmio, &host->ecam);
        host->ecam_mapped = false;
    } else if (add && !host->ecam_mapped && base) {
        struct error err;

        host->ecam.base = base;
        host->ecam.size = size;
        host->ecam_mapped = io_bus_add(host->env.mmio, &host->ecam, &err) == 0;
        if (!host->ecam_mapped)
            log_once(LOG_DEBUG, "pci: %s", err.text);
    }
}

static void update_ranges(struct pci_host *host)
{
    update_ecam(host, false);
    for_each_function(host, unmap_moved);
    update_ecam(host, true);
    for_each_function(host, map_wanted);
    for_each_function(host, update_upstream);
}

void pci_host_lock(struct pci_host *host)
{
    pthread_mutex_lock(&host->lock);
}

void pci_host_unlock(struct pci_host *host)
{
    update_ranges(host);
    pthread_mutex_unlock(&host->lock);
}

void pci_host_update_ranges(struct pci_host *host)
{
    pci_host_lock(host);
    pci_host_unlock(host);
}

/* ---- configuration space ---- */

/* Of bridges that a guest gave one bus number the first answers. The bus's lock is held. */
static struct pci_device *function_at(struct pci_host *host, unsigned bus, unsigned devfn)
{
    if (bus == 0)
        return host->functions[devfn];
    for (unsigned i = 0; i < FUNCTIONS; i++) {
        struct pci_bridge *bridge = bridge_of(host->functions[i]);

        if (bridge && pci_bridge_leads_to(bridge, bus))
            return bridge->open && devfn < PCI_LINK_FUNCTIONS ? bridge->functions[devfn] : NULL;
    }
    return NULL;
}

static u32 bus_read(struct pci_host *host, unsigned bus, unsigned devfn, unsigned offset,
                    unsigned size)
{
    u32 value = ~0U;
    struct pci_device *pci;

    pthread_mutex_lock(&host->lock);
    pci = function_at(host, bus, devfn);
    if (pci)
        value = pci_config_read(pci, offset, size);
    pthread_mutex_unlock(&host->lock);
    return value;
}

static void bus_write(struct pci_host *host, unsigned bus, unsigned devfn, unsigned offset,
                      u32 value, unsigned size)
{
    struct pci_device *pci;

    pthread_mutex_lock(&host->lock);
    pci = function_at(host, bus, devfn);
    if (pci && (pci_config_write(pci, offset, value, size) || pci == &host->pci))
        update_ranges(host);
    pthread_mutex_unlock(&host->lock);
}

static u64 address_read(void *opaque, u64 offset, unsigned size)
{
    struct pci_host *host = opaque;
    u64 value = UINT64_MAX;

    if (size == 4) {
        device_lock(&host->pci.dev);
        value = host->address;
        device_unlock(&host->pci.dev);
    } else if (offset == 1 && host->config.reset_control_read) {
        value = 0xff00 | host->config.reset_control_read(host->config.opaque);
    }
    return value;
}

static void address_write(void *opaque, u64 offset, u64 value, unsigned size)
{
    struct pci_host *host = opaque;

    if (size == 4) {
        device_lock(&host->pci.dev);
        host->address = value & CONFIG_ADDRESS_WRITABLE;
        device_unlock(&host->pci.dev);
    } else if (offset == 1 && host->config.reset_control_write) {
        host->config.reset_control_write(host->config.opaque, value);
    }
}

static u32 config_address(struct pci_host *host)
{
    u32 address;

    device_lock(&host->pci.dev);
    address = host->address;
    device_unlock(&host->pci.dev);
    return address;
}

static u64 data_read(void *opaque, u64 offset, unsigned size)
{
    u32 a = config_address(opaque);

    if (!(a & CONFIG_ADDRESS_ENABLE))
        return UINT64_MAX;
    return bus_read(opaque, a >> 16 & 0xff, a >> 8 & 0xff, (a & 0xfc) + (unsigned)offset, size);
}

static void data_write(void *opaque, u64 offset, u64 value, unsigned size)
{
    u32 a = config_address(opaque);

    if (a & CONFIG_ADDRESS_ENABLE)
        bus_write(opaque, a >> 16 & 0xff, a >> 8 & 0xff, (a & 0xfc) + (unsigned)offset, value,
                  size);
}

static u64 ecam_read(void *opaque, u64 offset, unsigned size)
{
    return bus_read(opaque, offset >> 20, offset >> 12 & 0xff, offset & 0xfff, size);
}

static void ecam_write(void *opaque, u64 offset, u64 value, unsigned size)
{
    bus_write(opaque, offset >> 20, offset >> 12 & 0xff, offset & 0xfff, value, size);
}

static const struct io_ops address_ops = {address_read, address_write, 4};
static const struct io_ops data_ops = {data_read, data_write, 4};
static const struct io_ops ecam_ops = {ecam_read, ecam_write, 4};

/* ---- the attribute map ---- */

/* PAM0 has 64 KiB from 0xf0000 in its high half, the others 16 KiB in each half from 0xc0000 on. */
void pci_host_pam(struct pci_host *host, unsigned n, struct pci_host_pam *pam)
{
    bool last = n == PCI_HOST_PAM_SEGMENTS - 1;
    unsigned reg = last ? PAM0 : PAM0 + 1 + n / 2;
    unsigned shift = last || n % 2 ? 4 : 0;

    device_lock(&host->pci.dev);
    *pam = (struct pci_host_pam){
        .base = 0xc0000 + 0x4000ULL * n,
        .size = last ? 0x10000 : 0x4000,
        .access = host->pci.config[reg] >> shift & (PCI_HOST_PAM_READ | PCI_HOST_PAM_WRITE),
    };
    device_unlock(&host->pci.dev);
}

static void pci_host_written(struct pci_device *pci, unsigned offset, unsigned size)
{
    struct pci_host *host = container_of(pci, struct pci_host, pci);

    if (offset < PAM0 + PAM_COUNT && offset + size > PAM0 && host->config.pam_written)
        host->config.pam_written(host->config.opaque);
}

/* ---- functions come and go ---- */

/* A slot's function 0 tells whether there are others (6.2.1). The bus's lock is held. */
static void update_multi_function(struct pci_device **functions)
{
    struct pci_device *first = functions[0];
    bool others = false;

    for (unsigned i = 1; i < SLOT_FUNCTIONS; i++)
        others |= functions[i] != NULL;
    if (!first || !others)
        return;
    device_lock(&first->dev);
    first->config[PCI_HEADER_TYPE] |= PCI_HEADER_TYPE_MULTI_FUNCTION;
    first->power_on[PCI_HEADER_TYPE] |= PCI_HEADER_TYPE_MULTI_FUNCTION;
    device_unlock(&first->dev);
}

int pci_host_add(struct pci_host *host, struct pci_device *pci, u16 place, struct error *err)
{
    struct pci_device **entry;
    int ret = 0;

    pthread_mutex_lock(&host->lock);
    entry = function_entry(host, place);
    if (!entry || *entry) {
        error_host(err, EEXIST, "pci: %s is where %s is to be (%02x.%x)",
                   entry ? (*entry)->dev.name : "nothing", pci->dev.name, PCI_SLOT(place & 0xff),
                   PCI_FUNCTION(place));
        ret = -EEXIST;
    } else {
        if (place >= FUNCTIONS)
            pci_add_express(pci, PCI_EXP_TYPE_ENDPOINT);
        memcpy(pci->power_on, pci->config, sizeof(pci->power_on));
        pci->host = host;
        pci->place = place;
        pci->dev.instance = place;
        *entry = pci;
        update_multi_function(entry - PCI_FUNCTION(place));
    }
    pthread_mutex_unlock(&host->lock);
    return ret;
}

void pci_host_remove(struct pci_host *host, struct pci_device *pci)
{
    pthread_mutex_lock(&host->lock);
    device_lock(&pci->dev);
    pci_host_intx(host, pci, false);
    device_unlock(&pci->dev);
    for (unsigned n = 0; n < PCI_BARS; n++)
        unmap_bar(host, &pci->bars[n]);
    *function_entry(host, pci->place) = NULL;
    pci->host = NULL;
    pthread_mutex_unlock(&host->lock);
}

int pci_host_free_slot(struct pci_host *host, unsigned first)
{
    int found = -1;

    pthread_mutex_lock(&host->lock);
    for (unsigned slot = first; slot < SLOTS && found < 0; slot++) {
        if (!host->functions[PCI_DEVFN(slot, 0)])
            found = (int)slot;
    }
    pthread_mutex_unlock(&host->lock);
    return found;
}

static void load_function(struct pci_host *host, struct pci_device *pci, struct pci_bridge *above)
{
    device_lock(&pci->dev);
    pci->intx_driven = pci_intx_wanted(pci);
    pthread_mutex_lock(&host->lines_lock);
    host->asserted[pirq_of(pci)] += pci->intx_driven;
    pthread_mutex_unlock(&host->lines_lock);
    device_unlock(&pci->dev);
}

void pci_host_loaded(struct pci_host *host)
{
    pthread_mutex_lock(&host->lock);
    memset(host->asserted, 0, sizeof(host->asserted));
    for_each_function(host, load_function);
    for (unsigned n = 0; n < PCI_PIRQS; n++)
        host->config.pirq[n].level = host->asserted[n] > 0;
    pci_host_unlock(host);
}

/* ---- what firmware does ---- */

static u64 place(u64 *next, u64 end, u64 size)
{
    u64 at = (*next + size - 1) & ~(size - 1);

    if (at >= end || size > end - at)
        return 0;
    *next = at + size;
    return at;
}

static void assign_function(struct pci_device *pci, struct pci_windows *w, const u8 *irq)
{
    u16 command;

    device_lock(&pci->dev);
    command = pci_config_get16(pci, PCI_COMMAND);
    for (unsigned n = 0; n < PCI_BARS; n++) {
        struct pci_bar *bar = &pci->bars[n];
        u64 io = w->io_base, at;

        if (bar->kind == PCI_BAR_NONE || bar->kind == PCI_BAR_ROM)
            continue;
        if (pci_bar_is_io(bar)) {
            at = place(&io, w->io_end, bar->size);
            w->io_base = (u32)io;
        } else {
            at = place(&w->mmio_base, w->mmio_end, MAX(bar->size, 0x1000ULL));
        }
        if (!at) {
            log_warn("pci: no room for BAR %u of %s", n, pci->dev.name);
            continue;
        }
        pci_config_set32(pci, pci_bar_offset(n), (u32)at | pci->power_on[pci_bar_offset(n)]);
        command |= pci_bar_is_io(bar) ? PCI_COMMAND_IO : PCI_COMMAND_MEMORY;
    }
    pci_config_set16(pci, PCI_COMMAND, command);
    if (pci->config[PCI_INTERRUPT_PIN])
        pci->config[PCI_INTERRUPT_LINE] = irq[pirq_of(pci)];
    device_unlock(&pci->dev);
}

/* A card in a slot now, and those that come later, find their places in the window. */
static void assign_bridge(struct pci_bridge *bridge, u8 bus, struct pci_windows *w, const u8 *irq)
{
    u64 at = place(&w->mmio_base, w->mmio_end, BRIDGE_WINDOW);
    struct pci_windows behind = {.mmio_base = at, .mmio_end = at ? at + BRIDGE_WINDOW : 0};

    pci_bridge_assign(bridge, bus, at, BRIDGE_WINDOW);
    for (unsigned i = 0; i < PCI_LINK_FUNCTIONS; i++) {
        if (bridge->functions[i])
            assign_function(bridge->functions[i], &behind, irq);
    }
}

static void assign_ecam(struct pci_device *pci, gpa_t ecam)
{
    device_lock(&pci->dev);
    pci_config_set32(pci, PCI_HOST_PCIEXBAR, (u32)ecam | PCI_HOST_PCIEXBAR_ENABLE);
    pci_config_set32(pci, PCI_HOST_PCIEXBAR + 4, ecam >> 32);
    device_unlock(&pci->dev);
}

void pci_host_assign(struct pci_host *host, const struct pci_windows *windows, gpa_t ecam,
                     const u8 irq[PCI_PIRQS])
{
    struct pci_windows w = *windows;
    u8 buses = 0;

    pthread_mutex_lock(&host->lock);
    for (unsigned i = 0; i < FUNCTIONS; i++) {
        struct pci_device *pci = host->functions[i];

        if (!pci)
            continue;
        assign_function(pci, &w, irq);
        if (bridge_of(pci))
            assign_bridge(bridge_of(pci), ++buses, &w, irq);
    }
    assign_ecam(&host->pci, ecam);
    pci_host_unlock(host);
}

/* ---- the bridge as a device ---- */

static void pci_host_reset(struct device *dev)
{
    struct pci_host *host = container_of(dev, struct pci_host, pci.dev);

    device_lock(dev);
    host->address = 0;
    device_unlock(dev);
    pci_device_reset(&host->pci);
}

static void pci_host_destroy(struct device *dev)
{
    struct pci_host *host = container_of(dev, struct pci_host, pci.dev);

    if (host->ecam_mapped)
        io_bus_remove(host->env.mmio, &host->ecam);
    io_bus_remove(host->env.ports, &host->address_range);
    io_bus_remove(host->env.ports, &host->data_range);
    pci_device_fini(&host->pci);
    pthread_mutex_destroy(&host->lines_lock);
    pthread_mutex_destroy(&host->lock);
    free(host);
}

static int pci_host_state_loaded(void *obj, struct error *err)
{
    const struct pci_host *host = obj;

    if (host->address & ~CONFIG_ADDRESS_WRITABLE)
        return error_input(err, "pci: saved CONFIG_ADDRESS %#x is impossible", host->address);
    return 0;
}

static const struct state_field pci_host_fields[] = {
    STATE_STRUCTS(struct pci_host, pci, &pci_device_state),
    STATE_HOST(struct pci_host, env),
    STATE_HOST(struct pci_host, config),
    STATE_HOST(struct pci_host, address_range),
    STATE_HOST(struct pci_host, data_range),
    STATE_HOST(struct pci_host, ecam),
    STATE_HOST(struct pci_host, ecam_mapped),
    STATE_HOST(struct pci_host, lock),
    STATE_HOST(struct pci_host, functions),
    STATE_HOST(struct pci_host, lines_lock),
    STATE_HOST(struct pci_host, asserted),
    STATE_FIELD(struct pci_host, address),
};
static const struct state_desc pci_host_state = {
    .name = "pci_host",
    .version = 1,
    .struct_size = sizeof(struct pci_host),
    .fields = pci_host_fields,
    .nfields = ARRAY_SIZE(pci_host_fields),
    .loaded = pci_host_state_loaded,
};

static const struct pci_device_ops pci_host_ops = {
    .dev = {.reset = pci_host_reset, .destroy = pci_host_destroy},
    .config_written = pci_host_written,
};

static void init_registers(struct pci_device *pci)
{
    pci_config_allow32(pci, PCI_HOST_PCIEXBAR, PCIEXBAR_WRITABLE_LO);
    pci_config_allow32(pci, PCI_HOST_PCIEXBAR + 4, PCIEXBAR_WRITABLE_HI);
    pci->writable[PAM0] = 0x30;
    for (unsigned i = 1; i < PAM_COUNT; i++)
        pci->writable[PAM0 + i] = 0x33;
    pci->writable[SMRAM] = 0x78;
    pci->config[SMRAM] = SMRAM_POWER_ON;
    pci->writable[ESMRAMC] = 0x87;
    pci->config[ESMRAMC] = ESMRAMC_POWER_ON;
}

struct pci_host *pci_host_create(const struct device_env *env, const struct pci_host_config *cfg,
                                 struct error *err)
{
    static const struct pci_identity identity = {
        .vendor = PCI_HOST_VENDOR,
        .device = PCI_HOST_DEVICE,
        .class = PCI_CLASS_BRIDGE_HOST,
        .subsystem_vendor = PCI_HOST_SUBSYSTEM_VENDOR,
        .subsystem = PCI_HOST_SUBSYSTEM,
    };
    struct pci_host *host = calloc(1, sizeof(*host));

    if (!host) {
        error_host(err, ENOMEM, "pci host bridge");
        return NULL;
    }
    host->env = *env;
    host->config = *cfg;
    pthread_mutex_init(&host->lock, NULL);
    pthread_mutex_init(&host->lines_lock, NULL);
    pci_device_init(&host->pci, "pci_host", &pci_host_ops, &pci_host_state, &identity);
    init_registers(&host->pci);
    host->address_range = (struct io_range){"pci config address", cfg->port, 4, &address_ops, host};
    host->data_range = (struct io_range){"pci config data", cfg->port + 4, 4, &data_ops, host};
    host->ecam = (struct io_range){.name = "pci ecam", .ops = &ecam_ops, .opaque = host};
    if (pci_host_add(host, &host->pci, PCI_DEVFN(0, 0), err) < 0 ||
        io_bus_add(env->ports, &host->address_range, err) < 0 ||
        io_bus_add(env->ports, &host->data_range, err) < 0) {
        pci_host_destroy(&host->pci.dev);
        return NULL;
    }
    return host;
}

struct device *pci_host_device(struct pci_host *host)
{
    return &host->pci.dev;
}
