/*
 * The board's slots for cards that come and go while the machine runs: a root port of PCI Express each
 * (device/pci/port.h), and the card that is in it. All on the loop's thread.
 */
#ifndef DOPPEL_MACHINE_SLOTS_H
#define DOPPEL_MACHINE_SLOTS_H

#include "device/pci/port.h"
#include "machine/cards.h"

struct slots {
    struct slot {
        struct pci_port *port;
        struct device *card;        /* NULL: empty */
        struct block_backend *disk; /* what the card works with, when it is one */
    } slot[MACHINE_SLOTS_MAX];
    unsigned count;
    void (*card_gone)(void *opaque, unsigned slot);
    void *opaque;
};

/* One more slot. The port is the caller's to destroy, as a device, after slots_remove_all. NULL with err set. */
struct device *slots_add(struct slots *s, struct pci_host *host, void (*attention)(void *opaque),
                         void *opaque, struct error *err);

/* Whether a card can be put into a slot: its place on the bus, or -EINVAL with err set. */
int slots_place(const struct slots *s, unsigned slot, struct error *err);
/* A card was created at that place, a disk or (NULL) something else. The slots destroy it. */
void slots_insert(struct slots *s, unsigned slot, struct device *card, struct block_backend *disk);
/*
 * Asks the guest to let a card go, or with `force` takes it as it is (no vCPU may run then). When it is destroyed
 * card_gone tells so, which may be within this call. 0 or -errno with err set.
 */
int slots_remove(struct slots *s, unsigned slot, bool force, struct error *err);
/* Does what the ports want done with their cards. No vCPU may run. */
void slots_update(struct slots *s);
/* The machine ends: nobody is told. */
void slots_remove_all(struct slots *s);

#endif
