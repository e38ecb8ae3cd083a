/*
 * Names of the configuration space's registers: PCI Local Bus Specification 3.0, section 6.1 (header),
 * 6.7 (capabilities), 6.8 (MSI and MSI-X); class codes from its appendix D. Bridges: PCI-to-PCI Bridge Architecture
 * Specification 1.2, section 3.2. PCI Express capability: PCI Express Base Specification 4.0, section 7.5.3.
 */
#ifndef DOPPEL_DEVICE_PCI_REGS_H
#define DOPPEL_DEVICE_PCI_REGS_H

#define PCI_VENDOR_ID 0x00
#define PCI_DEVICE_ID 0x02
#define PCI_COMMAND 0x04
#define PCI_STATUS 0x06
#define PCI_REVISION_ID 0x08
#define PCI_CLASS_PROG 0x09
#define PCI_CLASS_DEVICE 0x0a
#define PCI_CACHE_LINE_SIZE 0x0c
#define PCI_LATENCY_TIMER 0x0d
#define PCI_HEADER_TYPE 0x0e
#define PCI_BASE_ADDRESS_0 0x10
#define PCI_SUBSYSTEM_VENDOR_ID 0x2c
#define PCI_SUBSYSTEM_ID 0x2e
#define PCI_ROM_ADDRESS 0x30
#define PCI_CAPABILITY_LIST 0x34
#define PCI_INTERRUPT_LINE 0x3c
#define PCI_INTERRUPT_PIN 0x3d
#define PCI_FIRST_CAPABILITY 0x40 /* what lies from here on is the device's own */

#define PCI_COMMAND_IO BIT(0)
#define PCI_COMMAND_MEMORY BIT(1)
#define PCI_COMMAND_MASTER BIT(2)
#define PCI_COMMAND_PARITY BIT(6)
#define PCI_COMMAND_SERR BIT(8)
#define PCI_COMMAND_INTX_DISABLE BIT(10)

#define PCI_STATUS_INTERRUPT BIT(3)
#define PCI_STATUS_CAP_LIST BIT(4)

#define PCI_HEADER_TYPE_BRIDGE 1
#define PCI_HEADER_TYPE_MULTI_FUNCTION 0x80

/* A bridge's header differs from PCI_BASE_ADDRESS_0 on. Limits are those of the last MiB within. */
#define PCI_PRIMARY_BUS 0x18
#define PCI_SECONDARY_BUS 0x19
#define PCI_SUBORDINATE_BUS 0x1a
#define PCI_MEMORY_BASE 0x20
#define PCI_MEMORY_LIMIT 0x22
#define PCI_PREF_MEMORY_BASE 0x24
#define PCI_PREF_MEMORY_LIMIT 0x26
#define PCI_PREF_BASE_UPPER32 0x28
#define PCI_PREF_LIMIT_UPPER32 0x2c
#define PCI_BRIDGE_CONTROL 0x3e

#define PCI_PREF_RANGE_TYPE_64 1
#define PCI_RANGE_MASK 0xfff0U /* of the 16-bit bases and limits: address bits 31 to 20 */
#define PCI_BRIDGE_CTL_PARITY BIT(0)
#define PCI_BRIDGE_CTL_SERR BIT(1)
#define PCI_BRIDGE_CTL_BUS_RESET BIT(6)

#define PCI_BASE_ADDRESS_SPACE_IO BIT(0)
#define PCI_BASE_ADDRESS_MEM_TYPE_64 BIT(2)
#define PCI_BASE_ADDRESS_MEM_PREFETCH BIT(3)
#define PCI_BASE_ADDRESS_IO_FLAGS 3U
#define PCI_BASE_ADDRESS_MEM_FLAGS 15U

#define PCI_ROM_ADDRESS_ENABLE BIT(0)
#define PCI_ROM_ADDRESS_MASK 0xfffff800U

#define PCI_CAP_ID_MSI 0x05
#define PCI_CAP_ID_VNDR 0x09
#define PCI_CAP_ID_EXP 0x10
#define PCI_CAP_ID_MSIX 0x11

/* MSI (6.8.1), as offsets in a capability with 64-bit addresses and masks for each vector. */
#define PCI_MSI_FLAGS 2
#define PCI_MSI_ADDRESS_LO 4
#define PCI_MSI_ADDRESS_HI 8
#define PCI_MSI_DATA 12
#define PCI_MSI_MASK 16
#define PCI_MSI_PENDING 20
#define PCI_MSI_LENGTH 24
#define PCI_MSI_FLAGS_ENABLE BIT(0)
#define PCI_MSI_FLAGS_CAPABLE_SHIFT 1 /* log2 of the vectors that the device has */
#define PCI_MSI_FLAGS_ENABLED_SHIFT 4 /* and of those that the guest gave it */
#define PCI_MSI_FLAGS_ENABLED (7U << PCI_MSI_FLAGS_ENABLED_SHIFT)
#define PCI_MSI_FLAGS_64BIT BIT(7)
#define PCI_MSI_FLAGS_MASKBIT BIT(8)

/* MSI-X (6.8.2). */
#define PCI_MSIX_FLAGS 2
#define PCI_MSIX_TABLE 4
#define PCI_MSIX_PBA 8
#define PCI_MSIX_LENGTH 12
#define PCI_MSIX_FLAGS_MASKALL BIT(14)
#define PCI_MSIX_FLAGS_ENABLE BIT(15)
#define PCI_MSIX_ENTRY_SIZE 16
#define PCI_MSIX_ENTRY_CTRL_MASKBIT BIT(0)

/* PCI Express, as offsets in the capability. */
#define PCI_EXP_FLAGS 0x02
#define PCI_EXP_DEVCAP 0x04
#define PCI_EXP_DEVCTL 0x08
#define PCI_EXP_LNKCAP 0x0c
#define PCI_EXP_LNKCTL 0x10
#define PCI_EXP_LNKSTA 0x12
#define PCI_EXP_SLTCAP 0x14
#define PCI_EXP_SLTCTL 0x18
#define PCI_EXP_SLTSTA 0x1a
#define PCI_EXP_RTCTL 0x1c
#define PCI_EXP_LNKCAP2 0x2c
#define PCI_EXP_LENGTH 0x3c

#define PCI_EXP_FLAGS_VERSION 2
#define PCI_EXP_FLAGS_TYPE_SHIFT 4
#define PCI_EXP_TYPE_ENDPOINT 0
#define PCI_EXP_TYPE_ROOT_PORT 4
#define PCI_EXP_FLAGS_SLOT BIT(8)
#define PCI_EXP_DEVCAP_RBER BIT(15) /* role-based error reporting: all have it */
#define PCI_EXP_DEVCTL_WRITABLE 0x78ffU
#define PCI_EXP_SPEED_2_5GT 1
#define PCI_EXP_WIDTH_X1 BIT(4)
#define PCI_EXP_LNKCAP_DLLLARC BIT(20) /* LNKSTA_DLLLA tells */
#define PCI_EXP_LNKCAP_PORT_SHIFT 24
#define PCI_EXP_LNKCTL_LD BIT(4)     /* link disable */
#define PCI_EXP_LNKCTL_CCC BIT(6)    /* common clock */
#define PCI_EXP_LNKSTA_DLLLA BIT(13) /* the data link layer is active */
#define PCI_EXP_LNKCAP2_2_5GT BIT(1)

/* Slot capabilities: what the slot has. */
#define PCI_EXP_SLTCAP_ABP BIT(0) /* attention button */
#define PCI_EXP_SLTCAP_PCP BIT(1) /* power controller */
#define PCI_EXP_SLTCAP_AIP BIT(3) /* attention indicator */
#define PCI_EXP_SLTCAP_PIP BIT(4) /* power indicator */
#define PCI_EXP_SLTCAP_HPS BIT(5) /* cards may go by surprise */
#define PCI_EXP_SLTCAP_HPC BIT(6) /* hot-plug */
#define PCI_EXP_SLTCAP_PSN_SHIFT 19
/* Slot control. The low five bits are enables of the events of the same place in slot status. */
#define PCI_EXP_SLTCTL_CCIE BIT(4)
#define PCI_EXP_SLTCTL_HPIE BIT(5)
#define PCI_EXP_SLTCTL_AIC_OFF (3U << 6)
#define PCI_EXP_SLTCTL_PIC (3U << 8)
#define PCI_EXP_SLTCTL_PIC_ON (1U << 8)
#define PCI_EXP_SLTCTL_PIC_BLINK (2U << 8)
#define PCI_EXP_SLTCTL_PIC_OFF (3U << 8)
#define PCI_EXP_SLTCTL_PCC BIT(10) /* set: power is off */
#define PCI_EXP_SLTCTL_DLLSCE BIT(12)
#define PCI_EXP_SLTCTL_WRITABLE 0x17ffU
/* Slot status. */
#define PCI_EXP_SLTSTA_ABP BIT(0)
#define PCI_EXP_SLTSTA_PDC BIT(3) /* presence detect changed */
#define PCI_EXP_SLTSTA_CC BIT(4)  /* command completed */
#define PCI_EXP_SLTSTA_PDS BIT(6) /* a card is present */
#define PCI_EXP_SLTSTA_DLLSC BIT(8)
#define PCI_EXP_SLTSTA_EVENTS 0x1fU /* and DLLSC */

#define PCI_CLASS_STORAGE_SCSI 0x0100
#define PCI_CLASS_STORAGE_IDE 0x0101
#define PCI_CLASS_STORAGE_SATA 0x0106
#define PCI_CLASS_STORAGE_EXPRESS 0x0108
#define PCI_CLASS_STORAGE_OTHER 0x0180
#define PCI_CLASS_NETWORK_ETHERNET 0x0200
#define PCI_CLASS_DISPLAY_VGA 0x0300
#define PCI_CLASS_MEMORY_RAM 0x0500
#define PCI_CLASS_BRIDGE_HOST 0x0600
#define PCI_CLASS_BRIDGE_ISA 0x0601
#define PCI_CLASS_BRIDGE_PCI 0x0604
#define PCI_CLASS_COMMUNICATION_OTHER 0x0780
#define PCI_CLASS_SERIAL_SMBUS 0x0c05
#define PCI_CLASS_OTHERS 0x00ff

#endif
