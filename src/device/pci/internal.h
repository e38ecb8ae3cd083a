/*
 * What the files of device/pci share.
 */
#ifndef DOPPEL_DEVICE_PCI_INTERNAL_H
#define DOPPEL_DEVICE_PCI_INTERNAL_H

#include "device/pci/pci.h"

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
    return bar->kind >= PCI_BAR_MEM64;
}
static inline unsigned pci_bar_offset(unsigned n)
{
    return PCI_BASE_ADDRESS_0 + 4 * n;
}

/* The level that the device wants on its INTx line. The device's lock is held. */
bool pci_intx_wanted(const struct pci_device *pci);
/* In host.c: tells the bus. The device's lock is held. */
void pci_host_intx(struct pci_host *host, struct pci_device *pci, bool level);
void pci_host_send(struct pci_host *host, u64 address, u32 data);
void pci_host_remove(struct pci_host *host, struct pci_device *pci);
/* Every range to where it is to be. Takes the bus's lock, and each device's in turn. */
void pci_host_update_ranges(struct pci_host *host);

/* In msi.c: sends what is pending and no longer held back. The device's lock is held. */
void pci_msi_update(struct pci_device *pci);
void pci_msix_update(struct pci_device *pci);
int pci_msix_check_loaded(const struct pci_device *pci, struct error *err);

#endif
