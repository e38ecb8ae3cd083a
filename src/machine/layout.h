/*
 * Where things are in the guest's physical address space and port space. One list, used by the board,
 * the firmware tables and the loaders.
 */
#ifndef DOPPEL_MACHINE_LAYOUT_H
#define DOPPEL_MACHINE_LAYOUT_H

#include "host/types.h"

/* RAM below 4 GiB ends here at most; the rest of it starts at 4 GiB. PCI's windows lie between. */
#define LAYOUT_LOW_RAM_END 0xb0000000ULL
#define LAYOUT_ECAM_BASE 0xb0000000ULL /* 256 MiB */
#define LAYOUT_MMIO32_BASE 0xc0000000ULL
#define LAYOUT_MMIO32_END 0xfe000000ULL
#define LAYOUT_MMIO32_FIRMWARE_END                                                                 \
    0xfec00000ULL                          /* firmware's own choice of addresses reaches to here */
#define LAYOUT_MMIO64_ALIGN 0x800000000ULL /* a window of 32 GiB behind the last RAM, aligned so */
#define LAYOUT_HIGH_RAM_BASE 0x100000000ULL
#define LAYOUT_PMEM_ALIGN                                                                          \
    0x40000000ULL /* files as memory lie behind the last RAM, each aligned so */
#define LAYOUT_PMEM_UNIT                                                                           \
    0x200000ULL /* and are of whole units: Linux's sections of memory with struct pages */

#define LAYOUT_EBDA_BASE 0x9fc00ULL /* to 640 KiB: reserved */
#define LAYOUT_VGA_BASE 0xa0000ULL  /* a hole: no RAM from here to LAYOUT_VGA_END */
#define LAYOUT_VGA_END 0xc0000ULL
#define LAYOUT_ACPI_BASE 0xe0000ULL /* RSDP and tables, to 1 MiB, in direct boots */
#define LAYOUT_ACPI_END 0x100000ULL

/* With firmware: its ROM ends at 4 GiB, and its last part shows below 1 MiB until there is RAM in its place. */
#define LAYOUT_SHADOW_BASE 0xc0000ULL
#define LAYOUT_SHADOW_END 0x100000ULL
#define LAYOUT_ROM_LOW_BASE 0xe0000ULL
#define LAYOUT_ROM_END 0x100000000ULL
#define LAYOUT_ROM_MAX MIB(16)

#define LAYOUT_IOAPIC_BASE 0xfec00000ULL
#define LAYOUT_HPET_BASE 0xfed00000ULL
#define LAYOUT_LAPIC_BASE 0xfee00000ULL

#define LAYOUT_IOAPIC_PINS 24

#define PORT_PIC_MASTER 0x20
#define PORT_PIC_SLAVE 0xa0
#define PORT_PIC_ELCR 0x4d0
#define PORT_PIT 0x40
#define PORT_I8042_DATA 0x60
#define PORT_PIT_CONTROL_B 0x61
#define PORT_I8042_COMMAND 0x64
#define PORT_RTC 0x70
#define PORT_POST 0x80
#define PORT_FAST_A20 0x92
#define PORT_COM1 0x3f8
#define PORT_DEBUGCON 0x402
#define PORT_PVPANIC 0x505
#define PORT_FW_CFG 0x510
#define PORT_PCI_CONFIG 0xcf8 /* with the reset control register in it */
#define PORT_RESET 0xcf9
#define PORT_PCI_IO_BASE 0xc000 /* where BARs get ports in a direct boot */
#define PORT_PCI_IO_END 0x10000
/* ACPI fixed hardware */
#define PORT_ACPI_PM1_EVT 0x600
#define PORT_ACPI_PM1_CNT 0x604
#define PORT_ACPI_PM_TMR 0x608
#define PORT_ACPI_GPE0 0x620
#define PORT_ACPI_GPE0_LEN 8

/* ISA interrupt lines, which are also the IOAPIC's pins but for the PIT (pin 2). */
#define IRQ_PIT 0
#define IRQ_KEYBOARD 1
#define IRQ_COM1 4
#define IRQ_RTC 8
#define IRQ_SCI 9
#define IRQ_MOUSE 12
#define IRQ_IDE 14 /* and 15 for the second channel */
/*
 * PIRQ A to H of the PCI bus, at the PIC: A, B, E and F on the first, the others on the second, which is also what
 * firmware programs the LPC bridge to. At the IOAPIC they have pins of their own.
 */
#define IRQ_PCI_LOW 10
#define IRQ_PCI_HIGH 11
#define GSI_PIRQ 16

/* Slots of the PCI bus: 0 is the host bridge, 31 the chipset's; cards take what is free from here on. */
#define PCI_SLOT_VGA 1
#define PCI_SLOT_PORTS 28 /* root ports, a function each */
#define PCI_SLOT_IDE 30
#define PCI_SLOT_FIRST_CARD 2

#endif
