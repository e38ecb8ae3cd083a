/*
 * The ACPI tables.
 *
 * The tables are laid out one after another in an image on the host, which is then written to the
 * guest at once. Pointers between tables are guest addresses, known as soon as a table is placed;
 * those that point elsewhere come later, so the order is FACS, DSDT, FADT (which points at both),
 * MADT, HPET, MCFG, and the root tables; the RSDP has its place at the start.
 *
 * Choices that guests see:
 * - Fixed hardware, not the hardware-reduced model, and always in ACPI mode (SMI_CMD is 0): there
 *   is no system management mode to hand over from. The power button is fixed hardware too.
 * - There is one PCI host bridge, with no ISA bridge on its bus: the legacy devices stand in \_SB. Its interrupts
 *   are wired to inputs of the PIC or the IOAPIC for good, without link devices: _PRT names the inputs.
 * - Processors are ACPI0007 devices; the Processor term is gone since ACPI 6.4. _UID is the index,
 *   and the MADT's entries carry the same.
 * - ISA interrupts are the IOAPIC's inputs of the same number but for the PIT (2), and edges, but
 *   for the SCI: level, active high.
 */
#include "machine/acpi.h"

#include "device/acpi_pm.h"
#include "device/fw_cfg.h"
#include "device/hpet.h"
#include "device/pci/host.h"
#include "machine/aml.h"
#include "machine/layout.h"

#include <assert.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define OEM_ID "DOPPEL"
#define OEM_TABLE_ID "DOPPELVM"
#define CREATOR_ID "DOPL"
#define OEM_REVISION 1

#define ACPI_MAX_FIXUPS 64
#define TABLE_ALIGN 64 /* what the FACS needs; the others need no more than 16 */

struct table_header {
    char signature[4];
    u32 length;
    u8 revision;
    u8 checksum; /* makes the sum of all bytes 0 */
    char oem_id[6];
    char oem_table_id[8];
    u32 oem_revision;
    char creator_id[4];
    u32 creator_revision;
} __attribute__((packed));

/* Generic address structure (5.2.3.2). */
struct gas {
    u8 space;
    u8 bit_width;
    u8 bit_offset;
    u8 access_size; /* 1: byte, 2: word, 3: dword */
    u64 address;
} __attribute__((packed));

enum { GAS_MEMORY = 0, GAS_IO = 1 };

struct rsdp { /* 5.2.5.3 */
    char signature[8];
    u8 checksum; /* of the first 20 bytes */
    char oem_id[6];
    u8 revision;
    u32 rsdt;
    u32 length;
    u64 xsdt;
    u8 extended_checksum;
    u8 reserved[3];
} __attribute__((packed));
#define RSDP_V1_LENGTH 20

struct facs { /* 5.2.10 */
    char signature[4];
    u32 length;
    u32 hardware_signature;
    u32 waking_vector;
    u32 global_lock;
    u32 flags;
    u64 x_waking_vector;
    u8 version;
    u8 reserved[31];
} __attribute__((packed));

struct fadt { /* 5.2.9 */
    struct table_header header;
    u32 facs;
    u32 dsdt;
    u8 reserved0;
    u8 preferred_profile;
    u16 sci_int;
    u32 smi_cmd;
    u8 acpi_enable, acpi_disable, s4bios_req, pstate_cnt;
    u32 pm1a_evt_blk, pm1b_evt_blk, pm1a_cnt_blk, pm1b_cnt_blk;
    u32 pm2_cnt_blk, pm_tmr_blk, gpe0_blk, gpe1_blk;
    u8 pm1_evt_len, pm1_cnt_len, pm2_cnt_len, pm_tmr_len;
    u8 gpe0_blk_len, gpe1_blk_len, gpe1_base, cst_cnt;
    u16 p_lvl2_lat, p_lvl3_lat, flush_size, flush_stride;
    u8 duty_offset, duty_width, day_alarm, month_alarm, century;
    u16 boot_arch;
    u8 reserved1;
    u32 flags;
    struct gas reset_reg;
    u8 reset_value;
    u16 arm_boot_arch;
    u8 minor_version;
    u64 x_facs, x_dsdt;
    struct gas x_pm1a_evt_blk, x_pm1b_evt_blk, x_pm1a_cnt_blk, x_pm1b_cnt_blk;
    struct gas x_pm2_cnt_blk, x_pm_tmr_blk, x_gpe0_blk, x_gpe1_blk;
    struct gas sleep_control, sleep_status;
    char hypervisor_vendor[8];
} __attribute__((packed));

#define FADT_WBINVD BIT(0)
#define FADT_PROC_C1 BIT(2)
#define FADT_SLP_BUTTON BIT(5)  /* set: no fixed-hardware sleep button */
#define FADT_FIX_RTC BIT(6)     /* set: no RTC wake status in fixed hardware */
#define FADT_TMR_VAL_EXT BIT(8) /* the PM timer has 32 bits */
#define FADT_RESET_REG_SUP BIT(10)

#define BOOT_ARCH_LEGACY_DEVICES BIT(0)
#define BOOT_ARCH_8042 BIT(1)
#define BOOT_ARCH_NO_VGA BIT(2)

#define ECAM_SIZE (LAYOUT_MMIO32_BASE - LAYOUT_ECAM_BASE)
#define PCI_BUSES (ECAM_SIZE / PCI_ECAM_BUS_SIZE)

#define P_LVL2_UNSUPPORTED 101  /* microseconds: more than 100 */
#define P_LVL3_UNSUPPORTED 1001 /* more than 1000 */
#define RTC_CENTURY 0x32        /* CMOS index */
#define RESET_VALUE 0x0e        /* to 0xCF9: full reset, with its trigger bit */

struct madt { /* 5.2.12 */
    struct table_header header;
    u32 lapic_address;
    u32 flags;
} __attribute__((packed));
#define MADT_PCAT_COMPAT 1 /* there is an 8259 pair too */

struct madt_lapic {
    u8 type, length, uid, apic_id;
    u32 flags;
} __attribute__((packed));

struct madt_ioapic {
    u8 type, length, id, reserved;
    u32 address;
    u32 gsi_base;
} __attribute__((packed));

struct madt_override {
    u8 type, length, bus, source;
    u32 gsi;
    u16 flags;
} __attribute__((packed));

struct madt_lapic_nmi {
    u8 type, length, uid;
    u16 flags;
    u8 lint;
} __attribute__((packed));

struct madt_x2apic {
    u8 type, length;
    u16 reserved;
    u32 apic_id;
    u32 flags;
    u32 uid;
} __attribute__((packed));

struct madt_x2apic_nmi {
    u8 type, length;
    u16 flags;
    u32 uid;
    u8 lint;
    u8 reserved[3];
} __attribute__((packed));

enum madt_type {
    MADT_LAPIC = 0,
    MADT_IOAPIC = 1,
    MADT_OVERRIDE = 2,
    MADT_LAPIC_NMI = 4,
    MADT_X2APIC = 9,
    MADT_X2APIC_NMI = 10,
};
#define MADT_CPU_ENABLED 1
#define MADT_ACTIVE_HIGH_LEVEL 0xd /* MPS INTI flags: polarity 1, trigger mode 3 */
#define MADT_ALL_LAPICS 0xff
#define MADT_ALL_X2APICS 0xffffffff
#define FIRST_X2APIC_ID 255 /* IDs from here on don't fit a local APIC entry */

struct hpet_table { /* IA-PC HPET 1.0a, 3.2.4 */
    struct table_header header;
    u32 hardware_id;
    struct gas address;
    u8 number;
    u16 min_tick;
    u8 page_protection;
} __attribute__((packed));

struct mcfg { /* PCI Firmware Specification 3.0, 4.1.2 */
    struct table_header header;
    u8 reserved[8];
    u64 base;
    u16 segment;
    u8 first_bus, last_bus;
    u8 reserved2[4];
} __attribute__((packed));

_Static_assert(sizeof(struct table_header) == 36, "ACPI 6.4, 5.2.6");
_Static_assert(sizeof(struct rsdp) == 36, "ACPI 6.4, 5.2.5.3");
_Static_assert(sizeof(struct facs) == 64, "ACPI 6.4, 5.2.10");
_Static_assert(sizeof(struct fadt) == 276, "ACPI 6.4, 5.2.9");
_Static_assert(sizeof(struct hpet_table) == 56, "IA-PC HPET 1.0a, 3.2.4");
_Static_assert(ACPI_GPE0_LEN == PORT_ACPI_GPE0_LEN, "device and layout agree");

/*
 * The tables as they will be in the guest at `base`. Once something doesn't fit, `full` stays set.
 */
struct image {
    gpa_t base;
    u8 *data;
    size_t len, size;
    bool full;
    /* What has to be done when the tables move: pointers in them, and checksums, in this order. */
    struct fixup {
        u32 offset;
        u8 width;   /* of a pointer; 0: a table at `offset`, its checksum */
        u32 length; /* of that table */
    } fixups[ACPI_MAX_FIXUPS];
    unsigned nfixups;
};

static void image_fixup(struct image *im, size_t offset, u8 width, u32 length)
{
    if (im->nfixups == ACPI_MAX_FIXUPS) {
        im->full = true;
        return;
    }
    im->fixups[im->nfixups++] = (struct fixup){(u32)offset, width, length};
}

static void image_put(struct image *im, const void *bytes, size_t n)
{
    if (im->full || n > im->size - im->len) {
        im->full = true;
        return;
    }
    memcpy(im->data + im->len, bytes, n);
    im->len += n;
}

/* Starts a table: returns its offset. */
static size_t image_align(struct image *im)
{
    size_t start = (im->len + TABLE_ALIGN - 1) & ~(size_t)(TABLE_ALIGN - 1);

    if (im->full || start > im->size) {
        im->full = true;
        return 0;
    }
    im->len = start;
    return start;
}

static u8 checksum(const u8 *bytes, size_t n)
{
    u8 sum = 0;

    while (n--)
        sum += *bytes++;
    return -sum;
}

static struct table_header table_header(const char *signature, u8 revision)
{
    struct table_header h = {
        .revision = revision, .oem_revision = OEM_REVISION, .creator_revision = 1};

    memcpy(h.signature, signature, sizeof(h.signature));
    memcpy(h.oem_id, OEM_ID, sizeof(h.oem_id));
    memcpy(h.oem_table_id, OEM_TABLE_ID, sizeof(h.oem_table_id));
    memcpy(h.creator_id, CREATOR_ID, sizeof(h.creator_id));
    return h;
}

/* Ends the table that began at `start`: length and checksum. Returns its guest address. */
static gpa_t image_finish(struct image *im, size_t start)
{
    struct table_header *h = (struct table_header *)(im->data + start);

    if (im->full)
        return 0;
    h->length = im->len - start;
    h->checksum = checksum(im->data + start, h->length);
    image_fixup(im, start, 0, h->length);
    return im->base + start;
}

static void isa_device(struct aml *a, const char *name, const char *pnp_id)
{
    aml_device(a, name);
    aml_name(a, "_HID");
    aml_eisa_id(a, pnp_id);
}

static void ports_and_irq(struct aml *a, u16 port, u8 len, unsigned irq)
{
    aml_name(a, "_CRS");
    aml_resources(a);
    aml_resource_io(a, port, len);
    aml_resource_irq(a, irq);
    aml_end(a);
}

static void dsdt_legacy_devices(struct aml *a)
{
    isa_device(a, "PIC", "PNP0000");
    aml_name(a, "_CRS");
    aml_resources(a);
    aml_resource_io(a, PORT_PIC_MASTER, 2);
    aml_resource_io(a, PORT_PIC_SLAVE, 2);
    aml_resource_io(a, PORT_PIC_ELCR, 2);
    aml_resource_irq(a, 2);
    aml_end(a);
    aml_end(a);

    isa_device(a, "TIMR", "PNP0100");
    ports_and_irq(a, PORT_PIT, 4, IRQ_PIT);
    aml_end(a);

    isa_device(a, "RTC", "PNP0B00");
    ports_and_irq(a, PORT_RTC, 2, IRQ_RTC);
    aml_end(a);

    isa_device(a, "KBD", "PNP0303");
    aml_name(a, "_CRS");
    aml_resources(a);
    aml_resource_io(a, PORT_I8042_DATA, 1);
    aml_resource_io(a, PORT_I8042_COMMAND, 1);
    aml_resource_irq(a, IRQ_KEYBOARD);
    aml_end(a);
    aml_end(a);

    isa_device(a, "MOU", "PNP0F13");
    aml_name(a, "_CRS");
    aml_resources(a);
    aml_resource_irq(a, IRQ_MOUSE);
    aml_end(a);
    aml_end(a);

    isa_device(a, "COM1", "PNP0501");
    aml_name(a, "_UID");
    aml_int(a, 1);
    ports_and_irq(a, PORT_COM1, 8, IRQ_COM1);
    aml_end(a);
}

static void dsdt_hpet(struct aml *a)
{
    isa_device(a, "HPET", "PNP0103");
    aml_name(a, "_UID");
    aml_int(a, 0);
    aml_name(a, "_CRS");
    aml_resources(a);
    aml_resource_memory32(a, LAYOUT_HPET_BASE, HPET_SIZE, false);
    aml_end(a);
    aml_end(a);
}

/* A paravirtual device: present and working, but not to be shown to the user. */
static void virtual_device(struct aml *a, const char *name, const char *hid, u16 port, u8 len)
{
    aml_device(a, name);
    aml_name(a, "_HID");
    aml_string(a, hid);
    aml_name(a, "_STA");
    aml_int(a, 0xb);
    aml_name(a, "_CRS");
    aml_resources(a);
    aml_resource_io(a, port, len);
    aml_end(a);
    aml_end(a);
}

/* What belongs to the board itself, so that the OS gives it to no one else. */
static void dsdt_motherboard(struct aml *a)
{
    isa_device(a, "MBRD", "PNP0C02");
    aml_name(a, "_CRS");
    aml_resources(a);
    aml_resource_io(a, PORT_PIT_CONTROL_B, 1);
    aml_resource_io(a, PORT_POST, 1);
    aml_resource_io(a, PORT_FAST_A20, 1);
    aml_resource_io(a, PORT_ACPI_PM1_EVT, PORT_ACPI_GPE0 + ACPI_GPE0_LEN - PORT_ACPI_PM1_EVT);
    aml_resource_io(a, PORT_RESET, 1);
    aml_resource_memory32(a, LAYOUT_ECAM_BASE, ECAM_SIZE, true);
    aml_resource_memory32(a, LAYOUT_IOAPIC_BASE, 0x1000, true);
    aml_resource_memory32(a, LAYOUT_LAPIC_BASE, 0x1000, true);
    aml_end(a);
    aml_end(a);
}

/* What the bus hands on to its functions: bus numbers, ports and memory. */
static void pci_windows(struct aml *a, const struct acpi_config *cfg)
{
    aml_name(a, "_CRS");
    aml_resources(a);
    aml_resource_bus_range(a, 0, PCI_BUSES - 1);
    aml_resource_io(a, PORT_PCI_CONFIG, 8);
    aml_resource_io_range(a, 0, PORT_PCI_CONFIG - 1);
    aml_resource_io_range(a, PORT_PCI_CONFIG + 8, 0xffff);
    aml_resource_memory_range(a, LAYOUT_VGA_BASE, LAYOUT_VGA_END - 1);
    aml_resource_memory_range(a, LAYOUT_MMIO32_BASE, cfg->mmio32_end - 1);
    if (cfg->mmio64_size)
        aml_resource_memory_range(a, cfg->mmio64_base, cfg->mmio64_base + cfg->mmio64_size - 1);
    aml_end(a);
}

#define PCI_SLOTS 32
#define PCI_PINS 4

/* Where each slot's INTA to INTD arrive: at the IOAPIC or at the PIC (6.2.13). */
static void pci_routes(struct aml *a, const char *name, bool ioapic)
{
    aml_name(a, name);
    aml_package(a, PCI_SLOTS * PCI_PINS);
    for (unsigned i = 0; i < PCI_SLOTS * PCI_PINS; i++) {
        unsigned pirq = pci_host_pirq(i / PCI_PINS, i % PCI_PINS);

        aml_package(a, 4);
        aml_int(a, i / PCI_PINS << 16 | 0xffff);
        aml_int(a, i % PCI_PINS);
        aml_int(a, 0);
        aml_int(a, ioapic ? GSI_PIRQ + pirq : pirq / 2 % 2 ? IRQ_PCI_HIGH : IRQ_PCI_LOW);
        aml_end(a);
    }
    aml_end(a);
}

#define OSC_UUID "33db4d5b-1ff7-401c-9657-7441c03dd766"
/* Errors in the first dword, and what of the third is granted (PCI Firmware Specification 3.2, 4.5.1). */
#define OSC_UNKNOWN_UUID 0x04
#define OSC_UNKNOWN_REVISION 0x08
#define OSC_MASKED 0x10
#define OSC_PCIE_HOTPLUG 0x01
#define OSC_PCIE_PME 0x04
#define OSC_PCIE_CAPABILITY 0x10

/* Or (CDW1, error, CDW1) */
static void osc_error(struct aml *a, unsigned error)
{
    aml_or(a);
    aml_path(a, "CDW1");
    aml_int(a, error);
    aml_path(a, "CDW1");
}

/*
 * _OSC (ACPI 6.4, 6.2.11): the OS says what it knows of, and asks for control of it. It gets the root ports' hot-plug,
 * which without this it would leave to firmware.
 */
static void pci_osc(struct aml *a)
{
    aml_method(a, "_OSC", 4);
    aml_dword_field(a, 3, 0, "CDW1");
    aml_if(a);
    aml_equal(a);
    aml_arg(a, 0);
    aml_uuid(a, OSC_UUID);
    aml_dword_field(a, 3, 8, "CDW3");
    aml_and(a);
    aml_path(a, "CDW3");
    aml_int(a, OSC_PCIE_HOTPLUG | OSC_PCIE_PME | OSC_PCIE_CAPABILITY);
    aml_local(a);
    aml_if(a);
    aml_not_equal(a);
    aml_arg(a, 1);
    aml_int(a, 1);
    osc_error(a, OSC_UNKNOWN_REVISION);
    aml_end(a);
    aml_if(a);
    aml_not_equal(a);
    aml_path(a, "CDW3");
    aml_local(a);
    osc_error(a, OSC_MASKED);
    aml_end(a);
    aml_store(a);
    aml_local(a);
    aml_path(a, "CDW3");
    aml_end(a);
    aml_else(a);
    osc_error(a, OSC_UNKNOWN_UUID);
    aml_end(a);
    aml_return(a);
    aml_arg(a, 3);
    aml_end(a);
}

static void dsdt_pci(struct aml *a, const struct acpi_config *cfg)
{
    isa_device(a, "PCI0", "PNP0A08");
    aml_name(a, "_CID");
    aml_eisa_id(a, "PNP0A03");
    aml_name(a, "_UID");
    aml_int(a, 0);
    aml_name(a, "_SEG");
    aml_int(a, 0);
    aml_name(a, "_BBN");
    aml_int(a, 0);
    pci_windows(a, cfg);
    pci_osc(a);
    pci_routes(a, "PRTA", true);
    pci_routes(a, "PRTP", false);
    aml_method(a, "_PRT", 0);
    aml_if(a);
    aml_path(a, "\\PICM");
    aml_return(a);
    aml_path(a, "PRTA");
    aml_end(a);
    aml_return(a);
    aml_path(a, "PRTP");
    aml_end(a);
    aml_end(a);
}

static void dsdt_processors(struct aml *a, unsigned ncpus)
{
    for (unsigned i = 0; i < ncpus; i++) {
        char name[5];
        snprintf(name, sizeof(name), "C%03X", i & 0xfff);
        aml_device(a, name);
        aml_name(a, "_HID");
        aml_string(a, "ACPI0007");
        aml_name(a, "_UID");
        aml_int(a, i);
        aml_end(a);
    }
}

/* \_PIC tells which interrupt model the OS uses: 0 the 8259 pair, 1 the IOAPIC. */
static void dsdt_root(struct aml *a)
{
    aml_name(a, "\\PICM");
    aml_int(a, 0);
    aml_method(a, "\\_PIC", 1);
    aml_store(a);
    aml_arg(a, 0);
    aml_path(a, "\\PICM");
    aml_end(a);

    aml_name(a, "\\_S5");
    aml_package(a, 4);
    aml_int(a, ACPI_SLP_TYP_S5); /* for PM1a */
    aml_int(a, ACPI_SLP_TYP_S5); /* for PM1b */
    aml_int(a, 0);
    aml_int(a, 0);
    aml_end(a);
}

static int put_dsdt(struct image *im, const struct acpi_config *cfg, gpa_t *gpa, struct error *err)
{
    struct table_header header = table_header("DSDT", 2);
    size_t start = image_align(im);
    struct aml a;

    aml_init(&a);
    dsdt_root(&a);
    aml_scope(&a, "\\_SB");
    dsdt_processors(&a, cfg->ncpus);
    dsdt_motherboard(&a);
    dsdt_pci(&a, cfg);
    dsdt_legacy_devices(&a);
    dsdt_hpet(&a);
    virtual_device(&a, "FWCF", "QEMU0002", PORT_FW_CFG, FW_CFG_PORTS);
    virtual_device(&a, "PEVT", "QEMU0001", PORT_PVPANIC, 1);
    aml_end(&a);
    if (aml_failed(&a)) {
        aml_free(&a);
        return error_host(err, ENOMEM, "ACPI tables");
    }
    image_put(im, &header, sizeof(header));
    image_put(im, a.data, a.len);
    aml_free(&a);
    *gpa = image_finish(im, start);
    return 0;
}

static gpa_t put_facs(struct image *im)
{
    struct facs facs = {.signature = "FACS", .length = sizeof(facs), .version = 2};
    size_t start = image_align(im);

    image_put(im, &facs, sizeof(facs));
    return im->base + start;
}

static struct gas gas_io(u16 port, u8 bytes, u8 access_size)
{
    return (struct gas){GAS_IO, 8 * bytes, 0, access_size, port};
}

static gpa_t put_fadt(struct image *im, const struct acpi_config *cfg, gpa_t facs, gpa_t dsdt)
{
    struct fadt fadt = {
        .header = table_header("FACP", 6),
        .minor_version = 4,
        .facs = facs,
        .dsdt = dsdt,
        .x_dsdt = dsdt,
        .sci_int = IRQ_SCI,
        .pm1a_evt_blk = PORT_ACPI_PM1_EVT,
        .pm1a_cnt_blk = PORT_ACPI_PM1_CNT,
        .pm_tmr_blk = PORT_ACPI_PM_TMR,
        .gpe0_blk = PORT_ACPI_GPE0,
        .pm1_evt_len = ACPI_PM1_EVT_LEN,
        .pm1_cnt_len = ACPI_PM1_CNT_LEN,
        .pm_tmr_len = ACPI_PM_TMR_LEN,
        .gpe0_blk_len = ACPI_GPE0_LEN,
        .p_lvl2_lat = P_LVL2_UNSUPPORTED,
        .p_lvl3_lat = P_LVL3_UNSUPPORTED,
        .century = RTC_CENTURY,
        .boot_arch = BOOT_ARCH_LEGACY_DEVICES | BOOT_ARCH_8042 | (cfg->vga ? 0 : BOOT_ARCH_NO_VGA),
        .flags = FADT_WBINVD | FADT_PROC_C1 | FADT_SLP_BUTTON | FADT_FIX_RTC | FADT_TMR_VAL_EXT |
                 FADT_RESET_REG_SUP,
        .reset_reg = gas_io(PORT_RESET, 1, 1),
        .reset_value = RESET_VALUE,
        .x_pm1a_evt_blk = gas_io(PORT_ACPI_PM1_EVT, ACPI_PM1_EVT_LEN, 2),
        .x_pm1a_cnt_blk = gas_io(PORT_ACPI_PM1_CNT, ACPI_PM1_CNT_LEN, 2),
        .x_pm_tmr_blk = gas_io(PORT_ACPI_PM_TMR, ACPI_PM_TMR_LEN, 3),
        .x_gpe0_blk = gas_io(PORT_ACPI_GPE0, ACPI_GPE0_LEN, 1),
    };
    size_t start = image_align(im);

    memcpy(fadt.hypervisor_vendor, OEM_TABLE_ID, sizeof(fadt.hypervisor_vendor));
    image_put(im, &fadt, sizeof(fadt));
    image_fixup(im, start + offsetof(struct fadt, facs), sizeof(fadt.facs), 0);
    image_fixup(im, start + offsetof(struct fadt, dsdt), sizeof(fadt.dsdt), 0);
    image_fixup(im, start + offsetof(struct fadt, x_dsdt), sizeof(fadt.x_dsdt), 0);
    return image_finish(im, start);
}

/* One processor; returns whether it needed an x2APIC entry. */
static bool put_madt_processor(struct image *im, unsigned uid, u32 apic_id)
{
    if (apic_id < FIRST_X2APIC_ID && uid < MADT_ALL_LAPICS) {
        struct madt_lapic e = {MADT_LAPIC, sizeof(e), uid, apic_id, MADT_CPU_ENABLED};
        image_put(im, &e, sizeof(e));
        return false;
    }
    struct madt_x2apic e = {MADT_X2APIC, sizeof(e), 0, apic_id, MADT_CPU_ENABLED, uid};
    image_put(im, &e, sizeof(e));
    return true;
}

/* NMI arrives at LINT1 of every local APIC. */
static void put_madt_nmi(struct image *im, bool x2apics)
{
    struct madt_lapic_nmi nmi = {MADT_LAPIC_NMI, sizeof(nmi), MADT_ALL_LAPICS, 0, 1};
    struct madt_x2apic_nmi x2nmi = {MADT_X2APIC_NMI, sizeof(x2nmi), 0, MADT_ALL_X2APICS, 1, {0}};

    image_put(im, &nmi, sizeof(nmi));
    if (x2apics)
        image_put(im, &x2nmi, sizeof(x2nmi));
}

static gpa_t put_madt(struct image *im, const struct acpi_config *cfg)
{
    struct madt madt = {
        .header = table_header("APIC", 5),
        .lapic_address = LAYOUT_LAPIC_BASE,
        .flags = MADT_PCAT_COMPAT,
    };
    struct madt_ioapic ioapic = {MADT_IOAPIC, sizeof(ioapic),     cfg->ioapic_id,
                                 0,           LAYOUT_IOAPIC_BASE, 0};
    struct madt_override pit = {MADT_OVERRIDE, sizeof(pit), 0, IRQ_PIT, 2, 0};
    struct madt_override sci = {MADT_OVERRIDE, sizeof(sci), 0,
                                IRQ_SCI,       IRQ_SCI,     MADT_ACTIVE_HIGH_LEVEL};
    size_t start = image_align(im);
    bool x2apics = false;

    image_put(im, &madt, sizeof(madt));
    for (unsigned i = 0; i < cfg->ncpus; i++)
        x2apics |= put_madt_processor(im, i, cfg->apic_ids ? cfg->apic_ids[i] : i);
    image_put(im, &ioapic, sizeof(ioapic));
    image_put(im, &pit, sizeof(pit));
    image_put(im, &sci, sizeof(sci));
    put_madt_nmi(im, x2apics);
    return image_finish(im, start);
}

static gpa_t put_hpet(struct image *im)
{
    struct hpet_table hpet = {
        .header = table_header("HPET", 1),
        .hardware_id = HPET_CAP_ID,
        .address = {GAS_MEMORY, 64, 0, 0, LAYOUT_HPET_BASE},
        .min_tick = HPET_MIN_PERIOD,
    };
    size_t start = image_align(im);

    image_put(im, &hpet, sizeof(hpet));
    return image_finish(im, start);
}

static gpa_t put_mcfg(struct image *im)
{
    struct mcfg mcfg = {
        .header = table_header("MCFG", 1),
        .base = LAYOUT_ECAM_BASE,
        .last_bus = PCI_BUSES - 1,
    };
    size_t start = image_align(im);

    image_put(im, &mcfg, sizeof(mcfg));
    return image_finish(im, start);
}

/* RSDT (4-byte pointers, for guests older than ACPI 2.0) or XSDT (8-byte pointers). */
static gpa_t put_root(struct image *im, const char *signature, unsigned width, const gpa_t *tables,
                      unsigned n)
{
    struct table_header header = table_header(signature, 1);
    size_t start = image_align(im);

    image_put(im, &header, sizeof(header));
    for (unsigned i = 0; i < n; i++) {
        image_fixup(im, im->len, (u8)width, 0);
        image_put(im, &tables[i], width);
    }
    return image_finish(im, start);
}

static struct rsdp make_rsdp(gpa_t rsdt, gpa_t xsdt)
{
    struct rsdp r = {.revision = 2, .rsdt = rsdt, .length = sizeof(r), .xsdt = xsdt};

    memcpy(r.signature, "RSD PTR ", sizeof(r.signature));
    memcpy(r.oem_id, OEM_ID, sizeof(r.oem_id));
    r.checksum = checksum((const u8 *)&r, RSDP_V1_LENGTH);
    r.extended_checksum = checksum((const u8 *)&r, sizeof(r));
    return r;
}

/* All of it, with space for the RSDP at the start. 0, or -errno with err set. */
static int build_image(const struct acpi_config *cfg, struct image *im, gpa_t *rsdt, gpa_t *xsdt,
                       struct error *err)
{
    const struct rsdp rsdp = {0};
    gpa_t dsdt = 0, facs;
    gpa_t tables[4];
    int rc;

    assert(im->base % TABLE_ALIGN == 0 && cfg->ncpus >= 1);
    im->data = calloc(1, im->size);
    if (!im->data)
        return error_host(err, ENOMEM, "ACPI tables");
    image_put(im, &rsdp, sizeof(rsdp));
    facs = put_facs(im);
    rc = put_dsdt(im, cfg, &dsdt, err);
    if (rc < 0)
        return rc;
    tables[0] = put_fadt(im, cfg, facs, dsdt); /* the FADT is to be the first */
    tables[1] = put_madt(im, cfg);
    tables[2] = put_hpet(im);
    tables[3] = put_mcfg(im);
    *rsdt = put_root(im, "RSDT", 4, tables, ARRAY_SIZE(tables));
    *xsdt = put_root(im, "XSDT", 8, tables, ARRAY_SIZE(tables));
    if (im->full)
        return error_host(err, ENOSPC, "ACPI tables for %u CPUs need more than %llu bytes",
                          cfg->ncpus, (unsigned long long)im->size);
    return 0;
}

int acpi_build(const struct acpi_config *cfg, gpa_t base, u64 space, struct guest_memory *memory,
               gpa_t *rsdp_out, struct error *err)
{
    struct image im = {.base = base, .size = space};
    gpa_t rsdt, xsdt;
    int rc = build_image(cfg, &im, &rsdt, &xsdt, err);

    if (rc == 0) {
        struct rsdp rsdp = make_rsdp(rsdt, xsdt);

        memcpy(im.data, &rsdp, sizeof(rsdp));
        rc = memory_write(memory, base, im.data, im.len);
        if (rc < 0)
            error_host(err, -rc, "ACPI tables at %#llx", (unsigned long long)base);
        else
            *rsdp_out = base;
    }
    free(im.data);
    return rc;
}

/* ---- for firmware ---- */

/*
 * A command of the table loader, 128 bytes, little-endian. Pointers in a blob are offsets into the blob that they
 * point to, until ADD_POINTER adds where that was put.
 */
#define LOADER_NAME 56
enum loader_command { LOADER_ALLOCATE = 1, LOADER_ADD_POINTER = 2, LOADER_ADD_CHECKSUM = 3 };
enum loader_zone { LOADER_ZONE_HIGH = 1, LOADER_ZONE_FSEG = 2 };

struct loader_entry {
    u32 command;
    union {
        struct {
            char file[LOADER_NAME];
            u32 align;
            u8 zone;
        } __attribute__((packed)) allocate;
        struct {
            char file[LOADER_NAME], target[LOADER_NAME];
            u32 offset;
            u8 size;
        } __attribute__((packed)) pointer;
        struct {
            char file[LOADER_NAME];
            u32 offset, start, length;
        } __attribute__((packed)) checksum;
        u8 pad[124];
    };
} __attribute__((packed));
_Static_assert(sizeof(struct loader_entry) == 128, "hw/acpi/bios-linker-loader.c");

struct loader {
    struct loader_entry entries[ACPI_MAX_FIXUPS + 8];
    unsigned n;
};

static void loader_allocate(struct loader *l, const char *file, u32 align, u8 zone)
{
    struct loader_entry *e = &l->entries[l->n++];

    e->command = LOADER_ALLOCATE;
    strcpy(e->allocate.file, file);
    e->allocate.align = align;
    e->allocate.zone = zone;
}

static void loader_pointer(struct loader *l, const char *file, size_t offset, u8 size)
{
    struct loader_entry *e = &l->entries[l->n++];

    e->command = LOADER_ADD_POINTER;
    strcpy(e->pointer.file, file);
    strcpy(e->pointer.target, ACPI_TABLES_FILE);
    e->pointer.offset = (u32)offset;
    e->pointer.size = size;
}

/* The byte at `offset` makes [start, start + length) sum up to 0. */
static void loader_checksum(struct loader *l, const char *file, size_t offset, size_t start,
                            size_t length)
{
    struct loader_entry *e = &l->entries[l->n++];

    e->command = LOADER_ADD_CHECKSUM;
    strcpy(e->checksum.file, file);
    e->checksum.offset = (u32)offset;
    e->checksum.start = (u32)start;
    e->checksum.length = (u32)length;
}

/* Checksums are left out (0): SeaBIOS subtracts the sum from what is there, edk2 stores it. */
static void loader_build(struct loader *l, struct image *im)
{
    loader_allocate(l, ACPI_RSDP_FILE, 16, LOADER_ZONE_FSEG);
    loader_allocate(l, ACPI_TABLES_FILE, TABLE_ALIGN, LOADER_ZONE_HIGH);
    for (unsigned i = 0; i < im->nfixups; i++) {
        const struct fixup *f = &im->fixups[i];
        size_t sum = f->offset + offsetof(struct table_header, checksum);

        if (f->width) {
            loader_pointer(l, ACPI_TABLES_FILE, f->offset, f->width);
        } else {
            im->data[sum] = 0;
            loader_checksum(l, ACPI_TABLES_FILE, sum, f->offset, f->length);
        }
    }
    loader_pointer(l, ACPI_RSDP_FILE, offsetof(struct rsdp, rsdt), 4);
    loader_pointer(l, ACPI_RSDP_FILE, offsetof(struct rsdp, xsdt), 8);
    loader_checksum(l, ACPI_RSDP_FILE, offsetof(struct rsdp, checksum), 0, RSDP_V1_LENGTH);
    loader_checksum(l, ACPI_RSDP_FILE, offsetof(struct rsdp, extended_checksum), 0,
                    sizeof(struct rsdp));
}

int acpi_build_blobs(const struct acpi_config *cfg, struct acpi_blobs *out, struct error *err)
{
    struct image im = {.size = KIB(128)};
    struct loader *loader = calloc(1, sizeof(*loader));
    u8 *rsdp_bytes = malloc(sizeof(struct rsdp));
    struct rsdp rsdp;
    gpa_t rsdt, xsdt;
    int rc;

    if (!loader || !rsdp_bytes)
        rc = error_host(err, ENOMEM, "ACPI tables");
    else
        rc = build_image(cfg, &im, &rsdt, &xsdt, err);
    if (rc < 0) {
        free(loader);
        free(rsdp_bytes);
        free(im.data);
        return rc;
    }
    rsdp = make_rsdp(rsdt, xsdt);
    rsdp.checksum = rsdp.extended_checksum = 0;
    memcpy(rsdp_bytes, &rsdp, sizeof(rsdp));
    loader_build(loader, &im);
    out->tables = (struct acpi_blob){im.data, (u32)im.len};
    out->rsdp.data = rsdp_bytes;
    out->rsdp.len = sizeof(rsdp);
    out->loader = (struct acpi_blob){(u8 *)loader->entries, loader->n * sizeof(loader->entries[0])};
    return 0;
}

void acpi_free_blobs(struct acpi_blobs *blobs)
{
    free(blobs->tables.data);
    free(blobs->rsdp.data);
    free(blobs->loader.data);
    *blobs = (struct acpi_blobs){0};
}
