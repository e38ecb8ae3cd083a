/*
 * What every PCI function is made of: configuration space, BARs, capabilities, interrupts.
 *
 * A PCI device is a struct whose first member is `struct pci_device`, and that one's first member is the
 * `struct device` that the board knows. To make one:
 *
 *     pci_device_init(&d->pci, &ops, &state, &(struct pci_identity){...});    ids, class, pin
 *     pci_add_bar(&d->pci, 0, PCI_BAR_MEM32, 0x1000, &regs_ops, d);
 *     pci_add_msix(&d->pci, vectors, 1);                                      and other capabilities
 *     pci_host_add(host, &d->pci, place, err);                                pci/host.h
 *
 * Its reset operation calls pci_device_reset, its destroy operation pci_device_fini, its state table
 * holds STATE_STRUCTS(struct mine, pci, &pci_device_state). Configuration space is bytes, each with a
 * mask of the bits that the guest may write: what is set up between init and pci_host_add is the
 * power-on state, to which a reset goes back.
 *
 * The guest may move BARs at any time: they follow by themselves (pci_host.c). A BAR's operations are
 * called with the offset into it, with no lock held, as those of struct io_range are.
 *
 * Interrupts: a device with an event to tell asks pci_msix_enabled, and calls pci_msix_notify for its
 * vector or else pci_intx_set. Both, and all that looks into configuration space, want the device's
 * lock held; the functions that take it themselves say so.
 */
#ifndef DOPPEL_DEVICE_PCI_PCI_H
#define DOPPEL_DEVICE_PCI_PCI_H

#include "device/device.h"
#include "device/pci/regs.h"

#define PCI_CONFIG_SIZE 256
#define PCI_BARS 7
#define PCI_BAR_ROM_INDEX 6 /* the expansion ROM's */
#define PCI_MSIX_MAX 128    /* vectors */

/*
 * A function's place is its devfn on bus 0, or for a card in the slot of a root port (pci/port.h) that port's devfn and
 * the card's function. Places are wiring: they stay, while bus numbers are the guest's to choose.
 */
#define PCI_BEHIND(port, function) ((port) << 8 | (function))
#define PCI_DEVFN(slot, function) ((slot) << 3 | (function))
#define PCI_SLOT(devfn) ((devfn) >> 3)
#define PCI_FUNCTION(devfn) ((devfn)&7)

struct pci_device;
struct pci_host;

enum pci_bar_kind {
    PCI_BAR_NONE,
    PCI_BAR_IO,
    PCI_BAR_MEM32,
    PCI_BAR_MEM64,          /* takes two of the six */
    PCI_BAR_MEM64_PREFETCH, /* reads have no side effects */
    PCI_BAR_MEM32_PREFETCH,
    PCI_BAR_ROM, /* has an enable bit of its own */
};

/* A doorbell (bus/io.h) in a BAR. */
struct pci_doorbell {
    u64 offset;
    int fd; /* eventfd */
};

struct pci_bar {
    enum pci_bar_kind kind;
    u64 size; /* a power of two */
    struct io_range range;
    bool mapped;
    const struct pci_doorbell *doorbells;
    unsigned ndoorbells;
};

struct pci_identity {
    u16 vendor, device;
    u16 class; /* PCI_CLASS_*: base class and subclass */
    u8 interface;
    u8 revision;
    u16 subsystem_vendor, subsystem;
    u8 pin; /* INTx: 1 to 4 for INTA to INTD, 0 for none */
};

struct pci_device_ops {
    struct device_ops dev;
    /*
     * Optional, with the device's lock held: the guest is about to read [offset, offset + size) of
     * configuration space, or has written it. They may change config, and send interrupts.
     */
    void (*config_read)(struct pci_device *pci, unsigned offset, unsigned size);
    void (*config_written)(struct pci_device *pci, unsigned offset, unsigned size);
};

struct pci_msix_entry {
    u32 address_lo, address_hi, data, control;
};

/* An eventfd whose signal sends the message; see msi.c. */
struct pci_msix_route {
    int fd; /* -1: none */
    u32 data;
    u64 address;
};

struct pci_device {
    struct device dev;
    const struct pci_device_ops *ops;
    struct pci_host *host; /* NULL before pci_host_add */
    u16 place;
    bool cut_off; /* its port lets no access of it through to memory */

    u8 config[PCI_CONFIG_SIZE];
    /* Set up by the device and constant from pci_host_add on. */
    u8 writable[PCI_CONFIG_SIZE];    /* bits that a write changes */
    u8 write_clear[PCI_CONFIG_SIZE]; /* bits that a write of 1 clears */
    u8 own[PCI_CONFIG_SIZE];         /* bits that the device itself changes */
    u8 power_on[PCI_CONFIG_SIZE];
    u8 next_cap; /* where the next capability goes */
    struct pci_bar bars[PCI_BARS];
    const u8 *rom;
    u32 rom_size;

    u8 pin;           /* what PCI_INTERRUPT_PIN says, less 1 */
    bool intx_driven; /* as the host bridge counts it */
    u8 msi_cap;       /* offset of the capability; 0: none */
    u8 msix_cap;
    u16 msix_vectors;
    struct pci_msix_entry msix[PCI_MSIX_MAX];
    u64 msix_pending[PCI_MSIX_MAX / 64];
    struct pci_msix_route msix_routes[PCI_MSIX_MAX];
};

extern const struct state_desc pci_device_state;

/* `state` describes the struct that embeds *pci; ops->dev is what the board calls. */
void pci_device_init(struct pci_device *pci, const char *name, const struct pci_device_ops *ops,
                     const struct state_desc *state, const struct pci_identity *id);
/* Takes the device off its bus. No vCPU may be in its operations (they are stopped, or it was never added). */
void pci_device_fini(struct pci_device *pci);
/* Configuration space, BARs and interrupts to their power-on state. Takes the locks that it needs. */
void pci_device_reset(struct pci_device *pci);

/* size: a power of two, 16 or more in memory (4096 for its own page), 4 to 256 for ports. */
void pci_add_bar(struct pci_device *pci, unsigned n, enum pci_bar_kind kind, u64 size,
                 const struct io_ops *ops, void *opaque);
/* Doorbells of a memory BAR, which stay the caller's and constant for as long as the device lives. */
void pci_set_doorbells(struct pci_device *pci, unsigned n, const struct pci_doorbell *doorbells,
                       unsigned count);
/*
 * An expansion ROM (6.2.5.2), for firmware to run: `size` bytes, at most 16 MiB, which stay the caller's for as long as
 * the device lives.
 */
void pci_add_rom(struct pci_device *pci, const u8 *data, u32 size);
/* The capability that functions of PCI Express have; type: PCI_EXP_TYPE_*. Its length is PCI_EXP_LENGTH. */
unsigned pci_add_express(struct pci_device *pci, unsigned type);
/* A capability of `len` bytes, zeroed but for its header. Returns its offset in config. */
unsigned pci_add_capability(struct pci_device *pci, u8 id, unsigned len);
/* MSI with 64-bit addresses and masks; vectors: 1, 2, 4 to 32. */
void pci_add_msi(struct pci_device *pci, unsigned vectors);
/* MSI-X whose table and pending bits have BAR `bar` (32-bit memory) to themselves. */
void pci_add_msix(struct pci_device *pci, unsigned vectors, unsigned bar);

/* Configuration space as the device sees it; little-endian as ever. */
u16 pci_config_get16(const struct pci_device *pci, unsigned offset);
u32 pci_config_get32(const struct pci_device *pci, unsigned offset);
void pci_config_set16(struct pci_device *pci, unsigned offset, u16 value);
void pci_config_set32(struct pci_device *pci, unsigned offset, u32 value);
/* Lets the guest write the bits of `mask` (of a 32-bit register at offset). */
void pci_config_allow32(struct pci_device *pci, unsigned offset, u32 mask);
void pci_config_allow16(struct pci_device *pci, unsigned offset, u16 mask);

/* Whether the guest lets the device, and its port, reach memory, and so send MSIs. */
bool pci_is_bus_master(const struct pci_device *pci);

void pci_intx_set(struct pci_device *pci, bool level);
bool pci_msi_enabled(const struct pci_device *pci);
void pci_msi_notify(struct pci_device *pci, unsigned vector);
bool pci_msix_enabled(const struct pci_device *pci);
/* Vectors beyond the last are ignored: guests choose them. */
void pci_msix_notify(struct pci_device *pci, unsigned vector);
/* Takes back what is pending: the event was seen before its vector was unmasked. */
void pci_msix_clear(struct pci_device *pci, unsigned vector);

#endif
