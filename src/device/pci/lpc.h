/*
 * The LPC bridge of the ICH9, function 00:1f.0 of a PC with the Q35 chipset: what firmware programs of the ISA
 * side. Interrupt routing (PIRQ A to H to the 8259s) and the place of the ACPI registers; the devices behind
 * it are the board's.
 */
#ifndef DOPPEL_DEVICE_PCI_LPC_H
#define DOPPEL_DEVICE_PCI_LPC_H

#include "device/pci/host.h"

#define LPC_DEVFN PCI_DEVFN(31, 0)

struct lpc;

struct lpc_config {
    /* The ACPI registers are at this port now; 0: nowhere. With the device's lock held. */
    void (*pm_base_changed)(void *opaque, u16 base);
    /* lpc_pirq_irq may say something else now. With the device's lock held. */
    void (*routes_changed)(void *opaque);
    void *opaque;
};

struct lpc *lpc_create(const struct device_env *env, const struct lpc_config *cfg,
                       struct pci_host *host, struct error *err);
struct device *lpc_device(struct lpc *lpc);

/* Which input of the 8259s PIRQ n is routed to, or -1. Any thread, any lock held: it takes none. */
int lpc_pirq_irq(const struct lpc *lpc, unsigned n);

/* After a load: puts the ACPI registers where the state says. */
void lpc_loaded(struct lpc *lpc);

#endif
