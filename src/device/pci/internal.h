/*
 * What the files of device/pci share.
 */
#ifndef DOPPEL_DEVICE_PCI_INTERNAL_H
#define DOPPEL_DEVICE_PCI_INTERNAL_H

#include "device/pci/pci.h"

/*
 * A bridge: a function whose header is of type 1, with one device behind it, as a link of PCI Express has. In
 * bridge.c; what makes it a root port is in port.c. It is on bus 0.
 */
#define PCI_LINK_FUNCTIONS 8

struct pci_bridge {
    struct pci_device pci;
    /* Under the bus's lock. */
    struct pci_device *functions[PCI_LINK_FUNCTIONS]; /* of device 0 on its secondary bus */
    bool open; /* the link is up and out of reset: the device can be reached, and reach memory */
};

extern const struct state_desc pci_bridge_state;

static inline bool pci_is_bridge(const struct pci_device *pci)
{
    return (pci->config[PCI_HEADER_TYPE] & ~PCI_HEADER_TYPE_MULTI_FUNCTION) ==
           PCI_HEADER_TYPE_BRIDGE;
}
/* As pci_device_init; the class is a bridge's. */
void pci_bridge_init(struct pci_bridge *bridge, const char *name, const struct pci_device_ops *ops,
                     const struct state_desc *state, const struct pci_identity *id);
/* These take the bridge's lock. Whether it is the bridge to this bus; */
bool pci_bridge_leads_to(struct pci_bridge *bridge, unsigned bus);
/* it hands accesses of [at, at + size) on to its device, or those of its device on to memory. */
bool pci_bridge_forwards(struct pci_bridge *bridge, u64 at, u64 size);
bool pci_bridge_is_bus_master(struct pci_bridge *bridge);
/* What firmware does: its bus, and one window. */
void pci_bridge_assign(struct pci_bridge *bridge, u8 bus, u64 base, u64 size);

/* The guest's accesses: 1, 2 or 4 bytes at any offset. The bus's lock is held; they take the device's. */
u32 pci_config_read(struct pci_device *pci, unsigned offset, unsigned size);
/* Returns whether ranges may have moved. */
bool pci_config_write(struct pci_device *pci, unsigned offset, u32 value, unsigned size);

/* Where BAR n is by its register and PCI_COMMAND; 0: nowhere. The device's lock is held. */
u64 pci_bar_address(const struct pci_device *pci, unsigned n);
static inline bool pci_bar_is_io(const struct pci_bar *bar)
{
    return bar->kind == PCI_BAR_IO;
}
static inline bool pci_bar_is_64(const struct pci_bar *bar)
{
    return bar->kind == PCI_BAR_MEM64 || bar->kind == PCI_BAR_MEM64_PREFETCH;
}
static inline unsigned pci_bar_offset(unsigned n)
{
    return n == PCI_BAR_ROM_INDEX ? PCI_ROM_ADDRESS : PCI_BASE_ADDRESS_0 + 4 * n;
}

/* The level that the device wants on its INTx line. The device's lock is held. */
bool pci_intx_wanted(const struct pci_device *pci);
/* In host.c: tells the bus. The device's lock is held. */
void pci_host_intx(struct pci_host *host, struct pci_device *pci, bool level);
void pci_host_send(struct pci_host *host, u64 address, u32 data);
/* Whether messages can be bound to eventfds; struct msi_sink's bind (true: it is bound) and unbind. */
bool pci_host_binds(const struct pci_host *host);
bool pci_host_bind(struct pci_host *host, int fd, u64 address, u32 data);
void pci_host_unbind(struct pci_host *host, int fd);
void pci_host_remove(struct pci_host *host, struct pci_device *pci);
/* Every range to where it is to be. Takes the bus's lock, and each device's in turn. */
void pci_host_update_ranges(struct pci_host *host);
/* The bus's lock. pci_host_unlock does the above before it lets go. */
void pci_host_lock(struct pci_host *host);
void pci_host_unlock(struct pci_host *host);

/* In msi.c: sends what is pending and no longer held back. The device's lock is held. */
void pci_msi_update(struct pci_device *pci);
void pci_msix_update(struct pci_device *pci);
/* No vector is bound to an eventfd any more. No lock is needed: the device is on its way out. */
void pci_msix_unbind(struct pci_device *pci);
int pci_msix_check_loaded(const struct pci_device *pci, struct error *err);

#endif
