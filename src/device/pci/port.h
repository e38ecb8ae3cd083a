/*
 * A root port of PCI Express with a slot, into which a card can be put while the machine runs, and out of which it
 * can be taken: native hot-plug (PCI Express Base Specification 4.0, 6.7), with an attention button, a power
 * controller and two indicators.
 *
 * A card is a function at PCI_BEHIND(the port's devfn, 0). Whoever owns both puts it in and takes it out:
 *
 *     in      create the card at its place; pci_port_insert. The guest is told, and switches the power on.
 *     out     pci_port_press_button. The guest is asked; it stops using the card, switches the power off, and then
 *             pci_port_update says PCI_PORT_REMOVE: destroy the card; pci_port_eject.
 *     pulled out      destroy the card, with no vCPU running; pci_port_eject. The guest finds that it has gone.
 *
 * The slot's power, its link and a reset of its bus are the guest's: while any of them is off, the card can't be
 * reached nor reach memory, and it has to be reset (PCI_PORT_RESET).
 */
#ifndef DOPPEL_DEVICE_PCI_PORT_H
#define DOPPEL_DEVICE_PCI_PORT_H

#include "device/pci/host.h"

struct pci_port;

struct pci_port_config {
    u8 number; /* of the slot, as guests name it */
    /*
     * pci_port_update is to be called, with no vCPU running. On the thread that wrote a register, with the bus's and
     * the port's lock held. May be NULL.
     */
    void (*attention)(void *opaque);
    void *opaque;
};

/* The port, on bus 0 at devfn, with its slot empty. NULL with err set. */
struct pci_port *pci_port_create(const struct pci_port_config *cfg, struct pci_host *host, u8 devfn,
                                 struct error *err);
struct device *pci_port_device(struct pci_port *port);

/* A card was created at the port's place: it is in the slot from now on. */
void pci_port_insert(struct pci_port *port);
/* It was destroyed. */
void pci_port_eject(struct pci_port *port);
/*
 * Asks the guest to let the card go. -EBUSY with err set while it thinks about it already. It may never answer, as
 * there may be nobody who knows of slots.
 */
int pci_port_press_button(struct pci_port *port, struct error *err);

enum pci_port_action { PCI_PORT_NOTHING, PCI_PORT_RESET, PCI_PORT_REMOVE };
/* What is to be done with the card now. No vCPU may run. */
enum pci_port_action pci_port_update(struct pci_port *port);

#endif
