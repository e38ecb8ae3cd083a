/*
 * A rig with a PCI bus, a function on it that remembers what reaches its BARs, and a guest's accesses to
 * configuration space. See device_rig.h.
 */
#ifndef DOPPEL_TESTS_PCI_RIG_H
#define DOPPEL_TESTS_PCI_RIG_H

#include "device/pci/host.h"
#include "device_rig.h"

#define CONFIG_PORT 0xcf8
#define ECAM 0xb0000000ULL

static inline struct pci_host *rig_pci_host(struct rig *r)
{
    struct pci_host_config config = {.port = CONFIG_PORT, .msi = rig_msi(r)};
    struct pci_host *host;

    for (unsigned i = 0; i < PCI_PIRQS; i++)
        config.pirq[i] = rig_line(r, i);
    host = pci_host_create(&r->env, &config, &r->err);
    if (!host)
        abort();
    return host;
}

/* By ports, as every PC has them. */
static inline u64 config_read(struct rig *r, unsigned devfn, unsigned offset, unsigned size)
{
    io_bus_write(r->env.ports, CONFIG_PORT, 0x80000000U | devfn << 8 | (offset & 0xfc), 4);
    return io_bus_read(r->env.ports, CONFIG_PORT + 4 + (offset & 3), size);
}
static inline void config_write(struct rig *r, unsigned devfn, unsigned offset, u64 value,
                                unsigned size)
{
    io_bus_write(r->env.ports, CONFIG_PORT, 0x80000000U | devfn << 8 | (offset & 0xfc), 4);
    io_bus_write(r->env.ports, CONFIG_PORT + 4 + (offset & 3), value, size);
}

/* The offset of the nth (from 0) capability of this kind, or 0. */
static inline unsigned find_capability(struct rig *r, unsigned devfn, u8 id, unsigned nth)
{
    unsigned at = config_read(r, devfn, PCI_CAPABILITY_LIST, 1);

    while (at && (config_read(r, devfn, at, 1) != id || nth--))
        at = config_read(r, devfn, at + 1, 1);
    return at;
}

#endif
