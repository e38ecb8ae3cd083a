/*
 * The host bridge and its bus: who is which function, and the three ways into configuration space.
 *
 * It is the one of a PC with Intel's Q35 chipset (MCH data sheet, document 316966), which firmware and
 * systems know: function 00:00.0, ports 0xCF8 and 0xCFC, and a window in memory (ECAM) where PCIEXBAR
 * puts it. Eight interrupt lines, PIRQ A to H, come out of the bus: slot s, INTx p (INTA is 0) is wired
 * to PIRQ E + (s + p) % 4, and in slots 25 to 31, which are the chipset's own, to PIRQ A + p.
 *
 * Locks: the bus's (private) before a device's; the lines' own last.
 */
#ifndef DOPPEL_DEVICE_PCI_HOST_H
#define DOPPEL_DEVICE_PCI_HOST_H

#include "device/pci/pci.h"

#define PCI_PIRQS 8
#define PCI_ECAM_BUS_SIZE 0x100000 /* bytes of configuration space on a bus */

#define PCI_HOST_VENDOR 0x8086
#define PCI_HOST_DEVICE 0x29c0
/* Firmware takes the machine for one that has fw_cfg by these (SeaBIOS: src/fw/paravirt.c, qemu_detect). */
#define PCI_HOST_SUBSYSTEM_VENDOR 0x1af4
#define PCI_HOST_SUBSYSTEM 0x1100
#define PCI_HOST_PCIEXBAR 0x60 /* 64 bits */
#define PCI_HOST_PCIEXBAR_ENABLE 1

struct pci_host_config {
    u16 port;                        /* of CONFIG_ADDRESS; CONFIG_DATA is 4 further on */
    struct irq_line pirq[PCI_PIRQS]; /* level, asserted is true */
    struct msi_sink msi;
    /*
     * Accesses to CONFIG_ADDRESS's ports that aren't of 32 bits go elsewhere (PCI 3.0, 3.2.2.3.2): a
     * byte at offset 1 is the reset control register, 0xCF9. May be NULL.
     */
    u8 (*reset_control_read)(void *opaque);
    void (*reset_control_write)(void *opaque, u8 value);
    /* The guest wrote a PAM register: pci_host_pam may say something else now. On its vCPU's thread. May be NULL. */
    void (*pam_written)(void *opaque);
    void *opaque;
};

struct pci_host *pci_host_create(const struct device_env *env, const struct pci_host_config *cfg,
                                 struct error *err);
struct device *pci_host_device(struct pci_host *host);

/*
 * Puts a function onto the bus; place is PCI_DEVFN(slot, function), or PCI_BEHIND a root port. -EEXIST with err set
 * when there is one. Its configuration space at this time is its power-on state (behind a port with an Express
 * capability, which is added here). The device takes itself away again.
 */
int pci_host_add(struct pci_host *host, struct pci_device *pci, u16 place, struct error *err);
/*
 * What the programmable attribute map says of a piece of [0xc0000, 0x100000): where reads go, to RAM or to the ROM
 * behind the chipset, and whether writes reach RAM.
 */
#define PCI_HOST_PAM_SEGMENTS 13
#define PCI_HOST_PAM_READ 1
#define PCI_HOST_PAM_WRITE 2
struct pci_host_pam {
    gpa_t base;
    u32 size;
    u8 access; /* PCI_HOST_PAM_* that go to RAM */
};
void pci_host_pam(struct pci_host *host, unsigned n, struct pci_host_pam *pam);

/* The first slot from `first` on without a function 0, or -1. */
int pci_host_free_slot(struct pci_host *host, unsigned first);
/* Which PIRQ an INTx pin (0 to 3) of a slot is wired to. */
unsigned pci_host_pirq(unsigned slot, unsigned pin);

/* After all devices were loaded from a saved state: ranges and lines are where that says. */
void pci_host_loaded(struct pci_host *host);

/* Where addresses for BARs come from. */
struct pci_windows {
    u64 mmio_base, mmio_end;
    u32 io_base, io_end;
};

/*
 * What firmware does at boot: an address for each BAR (64-bit ones too, below 4 GiB), decoding on, a bus number and
 * a window for each bridge, and ECAM at `ecam`. irq[]: what PCI_INTERRUPT_LINE tells, for each PIRQ. No vCPU may run.
 */
void pci_host_assign(struct pci_host *host, const struct pci_windows *windows, gpa_t ecam,
                     const u8 irq[PCI_PIRQS]);

#endif
