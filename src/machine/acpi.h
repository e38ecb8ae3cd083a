/*
 * The ACPI tables (ACPI 6.4): RSDP, RSDT and XSDT, FADT, FACS, MADT, HPET, MCFG, DSDT. The addresses in them are
 * those of machine/layout.h. In a direct boot they go to guest memory; firmware gets them as blobs with a list of
 * what is to be done to them ("etc/table-loader", the format of QEMU's hw/acpi/bios-linker-loader.c).
 */
#ifndef DOPPEL_MACHINE_ACPI_H
#define DOPPEL_MACHINE_ACPI_H

#include "bus/memory.h"
#include "host/error.h"

struct acpi_config {
    unsigned ncpus;      /* at least 1 */
    const u32 *apic_ids; /* one each CPU; NULL: 0, 1, 2, ... */
    u8 ioapic_id;
    u64 mmio64_base, mmio64_size; /* PCI's window above 4 GiB; size 0: none */
    gpa_t mmio32_end;             /* of PCI's window below it */
    bool vga;
};

/*
 * Writes the tables to guest memory at [base, base + space), the root pointer first; base: a
 * multiple of 64 between 0xe0000 and 1 MiB, for guests that search for it there. 0, or -errno with
 * err set when they don't fit, memory is short, or the range isn't RAM.
 */
int acpi_build(const struct acpi_config *cfg, gpa_t base, u64 space, struct guest_memory *memory,
               gpa_t *rsdp_out, struct error *err);

struct acpi_blob {
    u8 *data; /* owned: acpi_free_blobs */
    u32 len;
};
struct acpi_blobs {
    struct acpi_blob tables, rsdp, loader;
};
#define ACPI_TABLES_FILE "etc/acpi/tables"
#define ACPI_RSDP_FILE "etc/acpi/rsdp"
#define ACPI_LOADER_FILE "etc/table-loader"

/* The same for firmware. 0, or -errno with err set. */
int acpi_build_blobs(const struct acpi_config *cfg, struct acpi_blobs *out, struct error *err);
void acpi_free_blobs(struct acpi_blobs *blobs);

#endif
