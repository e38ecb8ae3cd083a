/*
 * The ACPI tables of a direct boot (ACPI 6.4): RSDP, RSDT and XSDT, FADT, FACS, MADT, HPET, MCFG, DSDT.
 * The addresses in them are those of machine/layout.h.
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
};

/*
 * Writes the tables to guest memory at [base, base + space), the root pointer first; base: a
 * multiple of 64 between 0xe0000 and 1 MiB, for guests that search for it there. 0, or -errno with
 * err set when they don't fit, memory is short, or the range isn't RAM.
 */
int acpi_build(const struct acpi_config *cfg, gpa_t base, u64 space, struct guest_memory *memory,
               gpa_t *rsdp_out, struct error *err);

#endif
