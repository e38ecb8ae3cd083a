/*
 * Configuration space of one function: PCI Local Bus Specification 3.0, chapter 6.
 *
 * 1. A byte's `writable` bits are what a write changes, `write_clear` bits are cleared by a written 1,
 *    all others keep their value. A BAR's size is nothing but the mask of its writable bits (6.2.5.1).
 * 2. Functions have no extended capabilities: offsets from 256 on read 0, as PCI Express wants it where
 *    the list is empty (PCIe 4.0, 7.6).
 * 3. PCI_STATUS_INTERRUPT is the level that the device asserts; the line has it too unless the guest
 *    disabled it (6.2.3). So the level of a line is state that lies in configuration space.
 */
#include "device/pci/pci.h"

#include "device/pci/internal.h"

#include <assert.h>
#include <errno.h>
#include <string.h>

#define COMMAND_WRITABLE                                                                           \
    (PCI_COMMAND_MASTER | PCI_COMMAND_PARITY | PCI_COMMAND_SERR | PCI_COMMAND_INTX_DISABLE)

u16 pci_config_get16(const struct pci_device *pci, unsigned offset)
{
    u16 value;

    memcpy(&value, pci->config + offset, sizeof(value));
    return value;
}

u32 pci_config_get32(const struct pci_device *pci, unsigned offset)
{
    u32 value;

    memcpy(&value, pci->config + offset, sizeof(value));
    return value;
}

void pci_config_set16(struct pci_device *pci, unsigned offset, u16 value)
{
    memcpy(pci->config + offset, &value, sizeof(value));
}

void pci_config_set32(struct pci_device *pci, unsigned offset, u32 value)
{
    memcpy(pci->config + offset, &value, sizeof(value));
}

void pci_config_allow32(struct pci_device *pci, unsigned offset, u32 mask)
{
    for (unsigned i = 0; i < 4; i++)
        pci->writable[offset + i] |= mask >> 8 * i;
}

void pci_config_allow16(struct pci_device *pci, unsigned offset, u16 mask)
{
    for (unsigned i = 0; i < 2; i++)
        pci->writable[offset + i] |= mask >> 8 * i;
}

/* ---- setting up ---- */

void pci_device_init(struct pci_device *pci, const char *name, const struct pci_device_ops *ops,
                     const struct state_desc *state, const struct pci_identity *id)
{
    device_init(&pci->dev, name, &ops->dev, state);
    pci->ops = ops;
    pci->next_cap = PCI_FIRST_CAPABILITY;
    pci_config_set16(pci, PCI_VENDOR_ID, id->vendor);
    pci_config_set16(pci, PCI_DEVICE_ID, id->device);
    pci->config[PCI_REVISION_ID] = id->revision;
    pci->config[PCI_CLASS_PROG] = id->interface;
    pci_config_set16(pci, PCI_CLASS_DEVICE, id->class);
    pci_config_set16(pci, PCI_SUBSYSTEM_VENDOR_ID, id->subsystem_vendor);
    pci_config_set16(pci, PCI_SUBSYSTEM_ID, id->subsystem);
    pci_config_allow32(pci, PCI_COMMAND, COMMAND_WRITABLE);
    pci->writable[PCI_CACHE_LINE_SIZE] = 0xff;
    pci->own[PCI_STATUS] = PCI_STATUS_INTERRUPT;
    if (id->pin) {
        pci->config[PCI_INTERRUPT_PIN] = id->pin;
        pci->pin = id->pin - 1;
        pci->writable[PCI_INTERRUPT_LINE] = 0xff;
    }
}

void pci_add_bar(struct pci_device *pci, unsigned n, enum pci_bar_kind kind, u64 size,
                 const struct io_ops *ops, void *opaque)
{
    unsigned offset = pci_bar_offset(n);
    struct pci_bar *bar = &pci->bars[n];
    u64 mask = ~(size - 1);

    assert(n < PCI_BARS && (size & (size - 1)) == 0 && size >= 4 && !pci->host);
    *bar = (struct pci_bar){
        .kind = kind,
        .size = size,
        .range = {.name = pci->dev.name, .size = size, .ops = ops, .opaque = opaque},
    };
    if (pci_bar_is_io(bar)) {
        /* All 32 bits can be written, though ports have 16: SeaBIOS sizes BARs so. */
        pci->config[offset] = PCI_BASE_ADDRESS_SPACE_IO;
        pci_config_allow32(pci, offset, (u32)mask);
        pci_config_allow32(pci, PCI_COMMAND, PCI_COMMAND_IO);
        return;
    }
    assert(size > PCI_BASE_ADDRESS_MEM_FLAGS && (!pci_bar_is_64(bar) || n + 1 < PCI_BAR_ROM_INDEX));
    if (pci_bar_is_64(bar)) {
        pci->config[offset] = PCI_BASE_ADDRESS_MEM_TYPE_64;
        pci_config_allow32(pci, offset + 4, mask >> 32);
    }
    if (kind == PCI_BAR_MEM64_PREFETCH || kind == PCI_BAR_MEM32_PREFETCH)
        pci->config[offset] |= PCI_BASE_ADDRESS_MEM_PREFETCH;
    if (kind == PCI_BAR_ROM)
        mask = (mask & PCI_ROM_ADDRESS_MASK) | PCI_ROM_ADDRESS_ENABLE;
    pci_config_allow32(pci, offset, (u32)mask);
    pci_config_allow32(pci, PCI_COMMAND, PCI_COMMAND_MEMORY);
}

void pci_set_doorbells(struct pci_device *pci, unsigned n, const struct pci_doorbell *doorbells,
                       unsigned count)
{
    pci->bars[n].doorbells = doorbells;
    pci->bars[n].ndoorbells = count;
}

static u64 rom_read(void *opaque, u64 offset, unsigned size)
{
    const struct pci_device *pci = opaque;
    u64 value = UINT64_MAX;

    if (offset < pci->rom_size)
        memcpy(&value, pci->rom + offset, MIN(size, pci->rom_size - offset));
    return value;
}

static void rom_write(void *opaque, u64 offset, u64 value, unsigned size)
{
}

static const struct io_ops rom_ops = {rom_read, rom_write, 8};

void pci_add_rom(struct pci_device *pci, const u8 *data, u32 size)
{
    u64 window = 2048;

    while (window < size)
        window *= 2;
    pci->rom = data;
    pci->rom_size = size;
    pci_add_bar(pci, PCI_BAR_ROM_INDEX, PCI_BAR_ROM, window, &rom_ops, pci);
}

unsigned pci_add_capability(struct pci_device *pci, u8 id, unsigned len)
{
    unsigned offset = pci->next_cap;

    assert(offset + len <= PCI_CONFIG_SIZE && !pci->host);
    pci->config[offset] = id;
    pci->config[offset + 1] = pci->config[PCI_CAPABILITY_LIST];
    pci->config[PCI_CAPABILITY_LIST] = offset;
    pci->config[PCI_STATUS] |= PCI_STATUS_CAP_LIST;
    pci->next_cap = (offset + len + 3) & ~3U;
    return offset;
}

unsigned pci_add_express(struct pci_device *pci, unsigned type)
{
    unsigned cap = pci_add_capability(pci, PCI_CAP_ID_EXP, PCI_EXP_LENGTH);

    pci_config_set16(pci, cap + PCI_EXP_FLAGS,
                     PCI_EXP_FLAGS_VERSION | type << PCI_EXP_FLAGS_TYPE_SHIFT);
    pci_config_set32(pci, cap + PCI_EXP_DEVCAP, PCI_EXP_DEVCAP_RBER);
    pci_config_allow16(pci, cap + PCI_EXP_DEVCTL, PCI_EXP_DEVCTL_WRITABLE);
    pci_config_set32(pci, cap + PCI_EXP_LNKCAP, PCI_EXP_WIDTH_X1 | PCI_EXP_SPEED_2_5GT);
    pci_config_allow16(pci, cap + PCI_EXP_LNKCTL, PCI_EXP_LNKCTL_CCC);
    pci_config_set16(pci, cap + PCI_EXP_LNKSTA, PCI_EXP_WIDTH_X1 | PCI_EXP_SPEED_2_5GT);
    pci_config_set32(pci, cap + PCI_EXP_LNKCAP2, PCI_EXP_LNKCAP2_2_5GT);
    return cap;
}

void pci_device_fini(struct pci_device *pci)
{
    pci_msix_unbind(pci);
    if (pci->host)
        pci_host_remove(pci->host, pci);
    pthread_mutex_destroy(&pci->dev.lock);
}

void pci_device_reset(struct pci_device *pci)
{
    device_lock(&pci->dev);
    pci_intx_set(pci, false);
    memcpy(pci->config, pci->power_on, sizeof(pci->config));
    memset(pci->msix_pending, 0, sizeof(pci->msix_pending));
    memset(pci->msix, 0, sizeof(pci->msix));
    for (unsigned i = 0; i < pci->msix_vectors; i++)
        pci->msix[i].control = PCI_MSIX_ENTRY_CTRL_MASKBIT;
    device_unlock(&pci->dev);
    if (pci->host)
        pci_host_update_ranges(pci->host);
}

/* ---- the guest's accesses ---- */

bool pci_is_bus_master(const struct pci_device *pci)
{
    return (pci->config[PCI_COMMAND] & PCI_COMMAND_MASTER) && !pci->cut_off;
}

u64 pci_bar_address(const struct pci_device *pci, unsigned n)
{
    const struct pci_bar *bar = &pci->bars[n];
    u8 command = pci->config[PCI_COMMAND];
    u64 address = pci_config_get32(pci, pci_bar_offset(n));

    if (pci_bar_is_io(bar))
        return command & PCI_COMMAND_IO ? address & ~(u64)PCI_BASE_ADDRESS_IO_FLAGS : 0;
    if (bar->kind == PCI_BAR_NONE || !(command & PCI_COMMAND_MEMORY))
        return 0;
    if (bar->kind == PCI_BAR_ROM)
        return address & PCI_ROM_ADDRESS_ENABLE ? address & PCI_ROM_ADDRESS_MASK : 0;
    if (pci_bar_is_64(bar))
        address |= (u64)pci_config_get32(pci, pci_bar_offset(n + 1)) << 32;
    return address & ~(u64)PCI_BASE_ADDRESS_MEM_FLAGS;
}

u32 pci_config_read(struct pci_device *pci, unsigned offset, unsigned size)
{
    u32 value = 0;

    device_lock(&pci->dev);
    if (pci->ops->config_read && offset < PCI_CONFIG_SIZE)
        pci->ops->config_read(pci, offset, size);
    for (unsigned i = 0; i < size && offset + i < PCI_CONFIG_SIZE; i++)
        value |= (u32)pci->config[offset + i] << 8 * i;
    device_unlock(&pci->dev);
    return value;
}

static bool overlaps(unsigned offset, unsigned size, unsigned start, unsigned len)
{
    return offset < start + len && start < offset + size;
}

bool pci_config_write(struct pci_device *pci, unsigned offset, u32 value, unsigned size)
{
    if (offset >= PCI_CONFIG_SIZE)
        return false;
    device_lock(&pci->dev);
    for (unsigned i = 0; i < size && offset + i < PCI_CONFIG_SIZE; i++) {
        u8 *byte = &pci->config[offset + i];
        u8 new = value >> 8 * i, writable = pci->writable[offset + i];

        *byte = (*byte & ~writable) | (new &writable);
        *byte &= ~(new & pci->write_clear[offset + i]);
    }
    if (pci->ops->config_written)
        pci->ops->config_written(pci, offset, size);
    pci_host_intx(pci->host, pci, pci_intx_wanted(pci));
    pci_msi_update(pci);
    pci_msix_update(pci);
    device_unlock(&pci->dev);
    return pci_is_bridge(pci) || overlaps(offset, size, PCI_COMMAND, 2) ||
           overlaps(offset, size, PCI_BASE_ADDRESS_0, 24) ||
           overlaps(offset, size, PCI_ROM_ADDRESS, 4);
}

/* ---- INTx ---- */

bool pci_intx_wanted(const struct pci_device *pci)
{
    return (pci->config[PCI_STATUS] & PCI_STATUS_INTERRUPT) &&
           !(pci_config_get16(pci, PCI_COMMAND) & PCI_COMMAND_INTX_DISABLE);
}

void pci_intx_set(struct pci_device *pci, bool level)
{
    if (level)
        pci->config[PCI_STATUS] |= PCI_STATUS_INTERRUPT;
    else
        pci->config[PCI_STATUS] &= ~PCI_STATUS_INTERRUPT;
    if (pci->host)
        pci_host_intx(pci->host, pci, pci_intx_wanted(pci));
}

/* ---- state ---- */

/* What neither a write nor the device itself changes must be as it is in this device. */
static int pci_device_loaded(void *obj, struct error *err)
{
    struct pci_device *pci = obj;

    for (unsigned i = 0; i < PCI_CONFIG_SIZE; i++) {
        u8 free = pci->writable[i] | pci->write_clear[i] | pci->own[i];

        if ((pci->config[i] ^ pci->power_on[i]) & ~free)
            return error_input(err, "%s: the saved configuration space is of another device (%#x)",
                               pci->dev.name, i);
    }
    return pci_msix_check_loaded(pci, err);
}

static const struct state_field msix_entry_fields[] = {
    STATE_FIELD(struct pci_msix_entry, address_lo),
    STATE_FIELD(struct pci_msix_entry, address_hi),
    STATE_FIELD(struct pci_msix_entry, data),
    STATE_FIELD(struct pci_msix_entry, control),
};
static const struct state_desc msix_entry_state =
    STATE_DESC("pci_msix_entry", 1, struct pci_msix_entry, msix_entry_fields);

static const struct state_field pci_device_fields[] = {
    STATE_HOST(struct pci_device, dev),
    STATE_HOST(struct pci_device, ops),
    STATE_HOST(struct pci_device, host),
    STATE_HOST(struct pci_device, place),
    STATE_HOST(struct pci_device, cut_off),
    STATE_FIELD(struct pci_device, config),
    STATE_HOST(struct pci_device, writable),
    STATE_HOST(struct pci_device, write_clear),
    STATE_HOST(struct pci_device, own),
    STATE_HOST(struct pci_device, power_on),
    STATE_HOST(struct pci_device, next_cap),
    STATE_HOST(struct pci_device, bars),
    STATE_HOST(struct pci_device, rom),
    STATE_HOST(struct pci_device, rom_size),
    STATE_HOST(struct pci_device, pin),
    STATE_HOST(struct pci_device, intx_driven),
    STATE_HOST(struct pci_device, msi_cap),
    STATE_HOST(struct pci_device, msix_cap),
    STATE_HOST(struct pci_device, msix_vectors),
    STATE_STRUCTS(struct pci_device, msix, &msix_entry_state),
    STATE_FIELD(struct pci_device, msix_pending),
    STATE_HOST(struct pci_device, msix_routes),
};

const struct state_desc pci_device_state = {
    .name = "pci",
    .version = 1,
    .struct_size = sizeof(struct pci_device),
    .fields = pci_device_fields,
    .nfields = ARRAY_SIZE(pci_device_fields),
    .loaded = pci_device_loaded,
};
