/*
 * The header of a bridge: PCI-to-PCI Bridge Architecture Specification 1.2, chapter 3; what PCI Express makes of it:
 * PCI Express 4.0, 7.5.1.3.
 *
 * Two windows in memory, the one for prefetchable memory with 64-bit addresses. There is none for ports (its
 * registers read 0, 3.2.5.6): what is to be had in a slot needs none.
 */
#include "device/pci/internal.h"

#define MIB_MASK (MIB(1) - 1)

static void init_window(struct pci_device *pci, unsigned base, u16 type)
{
    pci_config_allow16(pci, base, PCI_RANGE_MASK);
    pci_config_allow16(pci, base + 2, PCI_RANGE_MASK);
    /* Closed: it ends before it begins. */
    pci_config_set16(pci, base, PCI_RANGE_MASK | type);
    pci_config_set16(pci, base + 2, type);
}

void pci_bridge_init(struct pci_bridge *bridge, const char *name, const struct pci_device_ops *ops,
                     const struct state_desc *state, const struct pci_identity *id)
{
    struct pci_device *pci = &bridge->pci;

    pci_device_init(pci, name, ops, state, id);
    pci->config[PCI_HEADER_TYPE] = PCI_HEADER_TYPE_BRIDGE;
    pci_config_allow16(pci, PCI_COMMAND, PCI_COMMAND_MEMORY);
    pci->writable[PCI_PRIMARY_BUS] = 0xff;
    pci->writable[PCI_SECONDARY_BUS] = 0xff;
    pci->writable[PCI_SUBORDINATE_BUS] = 0xff;
    init_window(pci, PCI_MEMORY_BASE, 0);
    init_window(pci, PCI_PREF_MEMORY_BASE, PCI_PREF_RANGE_TYPE_64);
    pci_config_allow32(pci, PCI_PREF_BASE_UPPER32, ~0U);
    pci_config_allow32(pci, PCI_PREF_LIMIT_UPPER32, ~0U);
    pci_config_allow16(pci, PCI_BRIDGE_CONTROL,
                       PCI_BRIDGE_CTL_PARITY | PCI_BRIDGE_CTL_SERR | PCI_BRIDGE_CTL_BUS_RESET);
}

bool pci_bridge_leads_to(struct pci_bridge *bridge, unsigned bus)
{
    bool leads;

    device_lock(&bridge->pci.dev);
    leads = bridge->pci.config[PCI_SECONDARY_BUS] == bus;
    device_unlock(&bridge->pci.dev);
    return leads;
}

static bool holds(u64 base, u64 limit, u64 at, u64 size)
{
    return at >= base && at <= limit && size - 1 <= limit - at;
}

bool pci_bridge_forwards(struct pci_bridge *bridge, u64 at, u64 size)
{
    const struct pci_device *pci = &bridge->pci;
    bool forwards = false;

    device_lock(&bridge->pci.dev);
    if (bridge->open && (pci->config[PCI_COMMAND] & PCI_COMMAND_MEMORY)) {
        u64 base = (pci_config_get16(pci, PCI_MEMORY_BASE) & PCI_RANGE_MASK) << 16;
        u64 limit = (pci_config_get16(pci, PCI_MEMORY_LIMIT) & PCI_RANGE_MASK) << 16;
        u64 pref = (pci_config_get16(pci, PCI_PREF_MEMORY_BASE) & PCI_RANGE_MASK) << 16;
        u64 pref_limit = (pci_config_get16(pci, PCI_PREF_MEMORY_LIMIT) & PCI_RANGE_MASK) << 16;

        pref |= (u64)pci_config_get32(pci, PCI_PREF_BASE_UPPER32) << 32;
        pref_limit |= (u64)pci_config_get32(pci, PCI_PREF_LIMIT_UPPER32) << 32;
        forwards =
            holds(base, limit | MIB_MASK, at, size) || holds(pref, pref_limit | MIB_MASK, at, size);
    }
    device_unlock(&bridge->pci.dev);
    return forwards;
}

bool pci_bridge_is_bus_master(struct pci_bridge *bridge)
{
    bool master;

    device_lock(&bridge->pci.dev);
    master = bridge->open && pci_is_bus_master(&bridge->pci);
    device_unlock(&bridge->pci.dev);
    return master;
}

void pci_bridge_assign(struct pci_bridge *bridge, u8 bus, u64 base, u64 size)
{
    struct pci_device *pci = &bridge->pci;

    device_lock(&pci->dev);
    pci->config[PCI_SECONDARY_BUS] = bus;
    pci->config[PCI_SUBORDINATE_BUS] = bus;
    if (base) {
        pci_config_set16(pci, PCI_MEMORY_BASE, base >> 16 & PCI_RANGE_MASK);
        pci_config_set16(pci, PCI_MEMORY_LIMIT, (base + size - 1) >> 16 & PCI_RANGE_MASK);
        pci_config_set16(pci, PCI_COMMAND, PCI_COMMAND_MEMORY | PCI_COMMAND_MASTER);
    }
    device_unlock(&pci->dev);
}

static const struct state_field bridge_fields[] = {
    STATE_STRUCTS(struct pci_bridge, pci, &pci_device_state),
    STATE_HOST(struct pci_bridge, functions),
    STATE_HOST(struct pci_bridge, open),
};

const struct state_desc pci_bridge_state =
    STATE_DESC("pci_bridge", 1, struct pci_bridge, bridge_fields);
