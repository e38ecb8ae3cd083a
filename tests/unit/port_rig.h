/*
 * A root port on a PCI bus, and a card for its slot that remembers what reaches its BAR. See pci_rig.h.
 */
#ifndef DOPPEL_TESTS_PORT_RIG_H
#define DOPPEL_TESTS_PORT_RIG_H

#include "device/pci/port.h"
#include "pci_rig.h"

#define PORT_DEVFN PCI_DEVFN(4, 1)
#define CARD_PLACE PCI_BEHIND(PORT_DEVFN, 0)
#define CARD_VECTORS 2

struct card {
    struct pci_device pci;
    u64 last; /* what was written to its BAR */
    unsigned resets;
};

static const struct state_field card_fields[] = {
    STATE_STRUCTS(struct card, pci, &pci_device_state),
    STATE_FIELD(struct card, last),
    STATE_HOST(struct card, resets),
};
static const struct state_desc card_state = STATE_DESC("card", 1, struct card, card_fields);

static inline u64 card_read(void *opaque, u64 offset, unsigned size)
{
    return offset;
}
static inline void card_write(void *opaque, u64 offset, u64 value, unsigned size)
{
    ((struct card *)opaque)->last = value;
}
static const struct io_ops card_io = {card_read, card_write, 8};

static inline void card_reset(struct device *dev)
{
    struct card *c = container_of(dev, struct card, pci.dev);

    c->resets++;
    pci_device_reset(&c->pci);
}
static inline void card_destroy(struct device *dev)
{
    struct card *c = container_of(dev, struct card, pci.dev);

    pci_device_fini(&c->pci);
    free(c);
}
static const struct pci_device_ops card_ops = {
    .dev = {.reset = card_reset, .destroy = card_destroy}};

/* NULL: there is one at its place already. */
static inline struct card *card_create(struct rig *r, struct pci_host *host)
{
    struct pci_identity id = {
        .vendor = 0x1234, .device = 0x5678, .class = PCI_CLASS_STORAGE_SCSI, .pin = 1};
    struct card *c = calloc(1, sizeof(*c));

    pci_device_init(&c->pci, "card", &card_ops, &card_state, &id);
    pci_add_bar(&c->pci, 0, PCI_BAR_MEM64, 0x4000, &card_io, c);
    pci_add_msix(&c->pci, CARD_VECTORS, 2);
    if (pci_host_add(host, &c->pci, CARD_PLACE, &r->err) < 0) {
        card_destroy(&c->pci.dev);
        return NULL;
    }
    return c;
}

struct slot_rig {
    struct rig *rig;
    struct pci_host *host;
    struct pci_port *port;
    struct card *card; /* NULL: the slot is empty */
    unsigned attention;
    unsigned cap; /* the port's Express capability */
};

static inline void slot_attention(void *opaque)
{
    ((struct slot_rig *)opaque)->attention++;
}

static inline struct slot_rig *slot_rig_create(void)
{
    struct slot_rig *s = calloc(1, sizeof(*s));
    struct pci_port_config config = {.number = 7, .attention = slot_attention, .opaque = s};

    s->rig = rig_create();
    s->host = rig_pci_host(s->rig);
    s->port = pci_port_create(&config, s->host, PORT_DEVFN, &s->rig->err);
    if (!s->port)
        abort();
    s->cap = find_capability(s->rig, PORT_DEVFN, PCI_CAP_ID_EXP, 0);
    return s;
}

static inline void slot_insert(struct slot_rig *s)
{
    s->card = card_create(s->rig, s->host);
    pci_port_insert(s->port);
}

static inline void slot_eject(struct slot_rig *s)
{
    card_destroy(&s->card->pci.dev);
    s->card = NULL;
    pci_port_eject(s->port);
}

/* As the board does it when it was called. */
static inline enum pci_port_action slot_update(struct slot_rig *s)
{
    enum pci_port_action action = pci_port_update(s->port);

    if (s->card && action == PCI_PORT_REMOVE)
        slot_eject(s);
    else if (s->card && action == PCI_PORT_RESET)
        card_reset(&s->card->pci.dev);
    return action;
}

static inline void slot_rig_destroy(struct slot_rig *s)
{
    if (s->card)
        card_destroy(&s->card->pci.dev);
    pci_port_device(s->port)->ops->destroy(pci_port_device(s->port));
    pci_host_device(s->host)->ops->destroy(pci_host_device(s->host));
    rig_destroy(s->rig);
    free(s);
}

#endif
