/*
 * The root port: PCI Express Base Specification 4.0, 6.7 (hot-plug) and 7.5.3 (the capability's registers).
 *
 * 1. Presence (SLTSTA_PDS) is the host's to change, power (SLTCTL_PCC) the guest's. The link is up while a card is
 *    present, has power, and the guest hasn't disabled it; LNKSTA_DLLLA is that, always.
 * 2. A write to slot control is a command, done at once: SLTSTA_CC.
 * 3. The interrupt's condition is an event whose enable is set, with SLTCTL_HPIE; as INTx it is the level, as MSI a
 *    message is sent when it becomes true (6.7.3.4).
 * 4. A card is let go when power and power indicator are both off, after the button was pressed: drivers switch the
 *    indicator last, and take no notice of what happens in the slot between the two.
 */
#include "device/pci/port.h"

#include "device/pci/internal.h"

#include <errno.h>
#include <stdlib.h>

/* The generic root port that firmware and systems know (docs/specs/pci-ids of QEMU); nothing in it is vendor's own. */
#define PORT_VENDOR 0x1b36
#define PORT_DEVICE 0x000c

#define PORT_EVENTS (PCI_EXP_SLTSTA_EVENTS | PCI_EXP_SLTSTA_DLLSC)
#define PORT_SLOT_HAS                                                                              \
    (PCI_EXP_SLTCAP_ABP | PCI_EXP_SLTCAP_PCP | PCI_EXP_SLTCAP_AIP | PCI_EXP_SLTCAP_PIP |           \
     PCI_EXP_SLTCAP_HPS | PCI_EXP_SLTCAP_HPC)

struct pci_port {
    struct pci_bridge bridge;
    struct pci_port_config config;
    unsigned cap;      /* offset of the Express capability */
    bool leaving;      /* the button was pressed */
    bool reset_wanted; /* the card lost its power, or its link */
    bool interrupting; /* the interrupt's condition is true */
};

static struct pci_port *port_of(struct pci_device *pci)
{
    return container_of(pci, struct pci_port, bridge.pci);
}

static u16 get(const struct pci_port *port, unsigned reg)
{
    return pci_config_get16(&port->bridge.pci, port->cap + reg);
}

static void set(struct pci_port *port, unsigned reg, u16 value)
{
    pci_config_set16(&port->bridge.pci, port->cap + reg, value);
}

static void add_events(struct pci_port *port, u16 events)
{
    set(port, PCI_EXP_SLTSTA, get(port, PCI_EXP_SLTSTA) | events);
}

/* ---- what follows from the registers; the bus's and the port's lock are held ---- */

static bool link_is_up(const struct pci_port *port)
{
    return (get(port, PCI_EXP_SLTSTA) & PCI_EXP_SLTSTA_PDS) &&
           !(get(port, PCI_EXP_SLTCTL) & PCI_EXP_SLTCTL_PCC) &&
           !(get(port, PCI_EXP_LNKCTL) & PCI_EXP_LNKCTL_LD);
}

static bool bus_is_open(const struct pci_port *port)
{
    return link_is_up(port) &&
           !(port->bridge.pci.config[PCI_BRIDGE_CONTROL] & PCI_BRIDGE_CTL_BUS_RESET);
}

static void update_link(struct pci_port *port)
{
    u16 status = get(port, PCI_EXP_LNKSTA) & ~PCI_EXP_LNKSTA_DLLLA;
    bool open = bus_is_open(port);

    if (link_is_up(port))
        status |= PCI_EXP_LNKSTA_DLLLA;
    if (status != get(port, PCI_EXP_LNKSTA))
        add_events(port, PCI_EXP_SLTSTA_DLLSC);
    set(port, PCI_EXP_LNKSTA, status);
    port->reset_wanted |= port->bridge.open && !open;
    port->bridge.open = open;
}

static void update_interrupt(struct pci_port *port)
{
    u16 control = get(port, PCI_EXP_SLTCTL), status = get(port, PCI_EXP_SLTSTA);
    bool link = (control & PCI_EXP_SLTCTL_DLLSCE) && (status & PCI_EXP_SLTSTA_DLLSC);
    bool on =
        (control & PCI_EXP_SLTCTL_HPIE) && ((control & status & PCI_EXP_SLTSTA_EVENTS) || link);

    if (on && !port->interrupting)
        pci_msi_notify(&port->bridge.pci, 0);
    port->interrupting = on;
    pci_intx_set(&port->bridge.pci, on && !pci_msi_enabled(&port->bridge.pci));
}

static bool is_let_go(const struct pci_port *port)
{
    const u16 off = PCI_EXP_SLTCTL_PCC | PCI_EXP_SLTCTL_PIC_OFF;

    return port->leaving &&
           (get(port, PCI_EXP_SLTCTL) & (PCI_EXP_SLTCTL_PCC | PCI_EXP_SLTCTL_PIC)) == off;
}

static void update(struct pci_port *port)
{
    update_link(port);
    update_interrupt(port);
    if ((port->reset_wanted || is_let_go(port)) && port->config.attention)
        port->config.attention(port->config.opaque);
}

static void port_config_written(struct pci_device *pci, unsigned offset, unsigned size)
{
    struct pci_port *port = port_of(pci);
    unsigned control = port->cap + PCI_EXP_SLTCTL;

    if (offset < control + 2 && offset + size > control)
        add_events(port, PCI_EXP_SLTSTA_CC);
    update(port);
}

/* ---- the owner's side ---- */

static void lock(struct pci_port *port)
{
    pci_host_lock(port->bridge.pci.host);
    device_lock(&port->bridge.pci.dev);
}

static void unlock(struct pci_port *port)
{
    update(port);
    device_unlock(&port->bridge.pci.dev);
    pci_host_unlock(port->bridge.pci.host);
}

void pci_port_insert(struct pci_port *port)
{
    lock(port);
    port->leaving = false;
    /* And the button, as whoever puts a card in does: where there is one, drivers don't ask to be told of presence. */
    add_events(port, PCI_EXP_SLTSTA_PDS | PCI_EXP_SLTSTA_PDC | PCI_EXP_SLTSTA_ABP);
    unlock(port);
}

void pci_port_eject(struct pci_port *port)
{
    lock(port);
    port->leaving = false;
    set(port, PCI_EXP_SLTSTA, get(port, PCI_EXP_SLTSTA) & ~PCI_EXP_SLTSTA_PDS);
    add_events(port, PCI_EXP_SLTSTA_PDC);
    update_link(port);
    port->reset_wanted = false; /* whose? */
    unlock(port);
}

int pci_port_press_button(struct pci_port *port, struct error *err)
{
    int ret = 0;

    lock(port);
    if ((get(port, PCI_EXP_SLTCTL) & PCI_EXP_SLTCTL_PIC) == PCI_EXP_SLTCTL_PIC_BLINK) {
        ret = -EBUSY; /* pressed again, it would take back what it asked for */
    } else {
        port->leaving = true;
        add_events(port, PCI_EXP_SLTSTA_ABP);
    }
    unlock(port);
    return ret ? error_host(err, -ret, "the guest is at work on slot %u", port->config.number) : 0;
}

enum pci_port_action pci_port_update(struct pci_port *port)
{
    enum pci_port_action action = PCI_PORT_NOTHING;

    device_lock(&port->bridge.pci.dev);
    if (is_let_go(port))
        action = PCI_PORT_REMOVE;
    else if (port->reset_wanted)
        action = PCI_PORT_RESET;
    port->reset_wanted = false;
    device_unlock(&port->bridge.pci.dev);
    return action;
}

/* ---- the port as a device ---- */

/* A card that is in has power after a reset; one that was to leave has none, and so leaves. */
static void port_reset(struct device *dev)
{
    struct pci_port *port = container_of(dev, struct pci_port, bridge.pci.dev);
    bool present, leaving;

    device_lock(dev);
    present = get(port, PCI_EXP_SLTSTA) & PCI_EXP_SLTSTA_PDS;
    leaving = port->leaving;
    device_unlock(dev);
    pci_device_reset(&port->bridge.pci);
    lock(port);
    if (present)
        add_events(port, PCI_EXP_SLTSTA_PDS);
    set(port, PCI_EXP_SLTCTL,
        PCI_EXP_SLTCTL_AIC_OFF |
            (present && !leaving ? PCI_EXP_SLTCTL_PIC_ON
                                 : PCI_EXP_SLTCTL_PIC_OFF | PCI_EXP_SLTCTL_PCC));
    update_link(port);
    set(port, PCI_EXP_SLTSTA, get(port, PCI_EXP_SLTSTA) & PCI_EXP_SLTSTA_PDS);
    port->reset_wanted = false; /* all are reset */
    unlock(port);
}

static void port_destroy(struct device *dev)
{
    struct pci_port *port = container_of(dev, struct pci_port, bridge.pci.dev);

    pci_device_fini(&port->bridge.pci);
    free(port);
}

static const struct pci_device_ops port_ops = {
    .dev = {.reset = port_reset, .destroy = port_destroy},
    .config_written = port_config_written,
};

static int port_loaded(void *obj, struct error *err)
{
    struct pci_port *port = obj;
    bool present = get(port, PCI_EXP_SLTSTA) & PCI_EXP_SLTSTA_PDS;

    if (present != (port->bridge.functions[0] != NULL))
        return error_input(err, "the state is of a machine %s a card in slot %u",
                           present ? "with" : "without", port->config.number);
    if (!(get(port, PCI_EXP_LNKSTA) & PCI_EXP_LNKSTA_DLLLA) != !link_is_up(port))
        return error_input(err, "slot %u: the saved link is impossible", port->config.number);
    port->bridge.open = bus_is_open(port);
    return 0;
}

static const struct state_field port_fields[] = {
    STATE_STRUCTS(struct pci_port, bridge, &pci_bridge_state),
    STATE_HOST(struct pci_port, config),
    STATE_HOST(struct pci_port, cap),
    STATE_FIELD(struct pci_port, leaving),
    STATE_FIELD(struct pci_port, reset_wanted),
    STATE_FIELD(struct pci_port, interrupting),
};
static const struct state_desc port_state = {
    .name = "pci_port",
    .version = 1,
    .struct_size = sizeof(struct pci_port),
    .fields = port_fields,
    .nfields = ARRAY_SIZE(port_fields),
    .loaded = port_loaded,
};

static void init_slot(struct pci_port *port)
{
    struct pci_device *pci = &port->bridge.pci;
    unsigned cap = pci_add_express(pci, PCI_EXP_TYPE_ROOT_PORT);

    port->cap = cap;
    set(port, PCI_EXP_FLAGS, get(port, PCI_EXP_FLAGS) | PCI_EXP_FLAGS_SLOT);
    pci_config_set32(pci, cap + PCI_EXP_LNKCAP,
                     pci_config_get32(pci, cap + PCI_EXP_LNKCAP) | PCI_EXP_LNKCAP_DLLLARC |
                         (u32)port->config.number << PCI_EXP_LNKCAP_PORT_SHIFT);
    pci_config_allow16(pci, cap + PCI_EXP_LNKCTL, PCI_EXP_LNKCTL_LD);
    pci_config_set32(pci, cap + PCI_EXP_SLTCAP,
                     PORT_SLOT_HAS | (u32)port->config.number << PCI_EXP_SLTCAP_PSN_SHIFT);
    pci_config_allow16(pci, cap + PCI_EXP_SLTCTL, PCI_EXP_SLTCTL_WRITABLE);
    pci->write_clear[cap + PCI_EXP_SLTSTA] = PORT_EVENTS & 0xff;
    pci->write_clear[cap + PCI_EXP_SLTSTA + 1] = PORT_EVENTS >> 8;
    pci->own[cap + PCI_EXP_SLTSTA] = PCI_EXP_SLTSTA_PDS;
    pci->own[cap + PCI_EXP_LNKSTA + 1] = PCI_EXP_LNKSTA_DLLLA >> 8;
    pci_config_allow16(pci, cap + PCI_EXP_RTCTL, 0xf);
}

struct pci_port *pci_port_create(const struct pci_port_config *cfg, struct pci_host *host, u8 devfn,
                                 struct error *err)
{
    struct pci_identity identity = {
        .vendor = PORT_VENDOR,
        .device = PORT_DEVICE,
        .class = PCI_CLASS_BRIDGE_PCI,
        .pin = PCI_FUNCTION(devfn) % 4 + 1,
    };
    struct pci_port *port = calloc(1, sizeof(*port));

    if (!port) {
        error_host(err, ENOMEM, "pci port");
        return NULL;
    }
    port->config = *cfg;
    pci_bridge_init(&port->bridge, "pci_port", &port_ops, &port_state, &identity);
    init_slot(port);
    pci_add_msi(&port->bridge.pci, 1);
    if (pci_host_add(host, &port->bridge.pci, devfn, err) < 0) {
        port_destroy(&port->bridge.pci.dev);
        return NULL;
    }
    port_reset(&port->bridge.pci.dev);
    return port;
}

struct device *pci_port_device(struct pci_port *port)
{
    return &port->bridge.pci.dev;
}
