#include "machine/slots.h"

#include "machine/layout.h"

#include <errno.h>

static u8 port_devfn(unsigned slot)
{
    _Static_assert(MACHINE_SLOTS_MAX <= 8, "the ports are functions of one device");
    return (u8)PCI_DEVFN(PCI_SLOT_PORTS, slot);
}

struct device *slots_add(struct slots *s, struct pci_host *host, void (*attention)(void *opaque),
                         void *opaque, struct error *err)
{
    struct pci_port_config config = {
        .number = (u8)(s->count + 1), .attention = attention, .opaque = opaque};
    struct slot *slot = &s->slot[s->count];

    slot->port = pci_port_create(&config, host, port_devfn(s->count), err);
    if (!slot->port)
        return NULL;
    s->count++;
    return pci_port_device(slot->port);
}

static int check_slot(const struct slots *s, unsigned slot, struct error *err)
{
    if (slot < s->count)
        return 0;
    return error_input(err, "the machine has %u slots: give --slots N for more", s->count);
}

int slots_place(const struct slots *s, unsigned slot, struct error *err)
{
    int ret = check_slot(s, slot, err);

    if (ret)
        return ret;
    if (s->slot[slot].card)
        return error_input(err, "there is a card in slot %u", slot + 1);
    return PCI_BEHIND(port_devfn(slot), 0);
}

void slots_insert(struct slots *s, unsigned slot, struct device *card, struct block_backend *disk)
{
    s->slot[slot].card = card;
    s->slot[slot].disk = disk;
    pci_port_insert(s->slot[slot].port);
}

static void destroy_card(struct slot *slot)
{
    struct device *card = slot->card;

    slot->card = NULL;
    slot->disk = NULL;
    card->ops->destroy(card);
}

static void eject(struct slots *s, unsigned slot)
{
    destroy_card(&s->slot[slot]);
    pci_port_eject(s->slot[slot].port);
    if (s->card_gone)
        s->card_gone(s->opaque, slot);
}

int slots_remove(struct slots *s, unsigned slot, bool force, struct error *err)
{
    int ret = check_slot(s, slot, err);

    if (ret)
        return ret;
    if (!s->slot[slot].card)
        return error_input(err, "slot %u is empty", slot + 1);
    if (!force)
        return pci_port_press_button(s->slot[slot].port, err);
    eject(s, slot);
    return 0;
}

void slots_update(struct slots *s)
{
    for (unsigned i = 0; i < s->count; i++) {
        struct device *card = s->slot[i].card;
        enum pci_port_action action = pci_port_update(s->slot[i].port);

        if (card && action == PCI_PORT_REMOVE)
            eject(s, i);
        else if (card && action == PCI_PORT_RESET)
            card->ops->reset(card);
    }
}

void slots_remove_all(struct slots *s)
{
    for (unsigned i = 0; i < s->count; i++) {
        if (s->slot[i].card)
            destroy_card(&s->slot[i]);
    }
}
