/*
 * Bytes as a guest at a root port: its registers, the card's configuration space and memory behind it, while the owner
 * puts cards in and takes them out. Then a damaged state. The sanitizers are the judges, and a slot that doesn't say of
 * itself what is in it.
 */
#include "../unit/port_rig.h"
#include "fuzz_device.h"
#include "host/log.h"

#define BUS 1

static void owner(struct slot_rig *s, struct input *in)
{
    struct error err;

    switch (take(in, 1) % 4) {
    case 0:
        if (!s->card)
            slot_insert(s);
        break;
    case 1:
        if (s->card)
            slot_eject(s);
        break;
    case 2:
        if (s->card)
            pci_port_press_button(s->port, &err);
        break;
    case 3:
        pci_port_device(s->port)->ops->reset(pci_port_device(s->port));
        break;
    }
}

static void step(struct slot_rig *s, struct input *in)
{
    unsigned size = 1U << take(in, 1) % 3;
    struct io_bus *mmio = s->rig->env.mmio;

    switch (take(in, 1) % 8) {
    case 0:
    case 1:
        config_write(s->rig, PORT_DEVFN, take(in, 1), take(in, size), size);
        break;
    case 2:
        config_write(s->rig, PORT_DEVFN, s->cap + PCI_EXP_SLTCTL, take(in, 2), 2);
        break;
    case 3:
        config_read(s->rig, PORT_DEVFN, take(in, 1), size);
        break;
    case 4:
        io_bus_write(mmio, ECAM + (take(in, 1) % 4 << 20) + take(in, 2), take(in, size), size);
        break;
    case 5:
        io_bus_write(mmio, 0xc0000000 + take(in, 3), take(in, size), size);
        break;
    case 6:
        owner(s, in);
        break;
    case 7:
        load_damaged_state(pci_port_device(s->port), in);
        pci_host_loaded(s->host);
        break;
    }
    if (s->card)
        pci_msix_notify(&s->card->pci, 0);
    while (s->attention) {
        s->attention = 0;
        slot_update(s);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct input in = {data, size};
    struct slot_rig *s;

    log_set_level(LOG_ERROR);
    s = slot_rig_create();
    config_write(s->rig, 0, PCI_HOST_PCIEXBAR, ECAM | 1, 4);
    config_write(s->rig, PORT_DEVFN, PCI_PRIMARY_BUS, BUS << 16 | BUS << 8, 4);
    config_write(s->rig, PORT_DEVFN, PCI_MEMORY_BASE, 0xc0f0c000, 4);
    config_write(s->rig, PORT_DEVFN, PCI_COMMAND, PCI_COMMAND_MEMORY | PCI_COMMAND_MASTER, 2);
    while (in.left)
        step(s, &in);
    if (!(config_read(s->rig, PORT_DEVFN, s->cap + PCI_EXP_SLTSTA, 2) & PCI_EXP_SLTSTA_PDS) !=
        !s->card)
        abort();
    slot_rig_destroy(s);
    return 0;
}
