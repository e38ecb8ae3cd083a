/*
 * Direct boot: puts a kernel, its initrd and command line into guest memory and says in which state the
 * first processor starts. Linux bzImage (64-bit boot protocol), ELF with a PVH note, multiboot 1.
 */
#ifndef DOPPEL_MACHINE_LOADER_H
#define DOPPEL_MACHINE_LOADER_H

#include "bus/memory.h"
#include "host/error.h"
#include "x86/cpu.h"

/* The memory map as the BIOS call E820h reports it (ACPI 6.4, table 15.6). */
enum e820_type { E820_RAM = 1, E820_RESERVED = 2, E820_ACPI = 3, E820_NVS = 4 };
struct e820_entry {
    u64 base, size;
    u32 type;
};
#define E820_MAX 64
struct e820_map {
    struct e820_entry entries[E820_MAX]; /* sorted, not overlapping */
    unsigned count;
};

struct loader_request {
    const char *kernel;  /* path */
    const char *initrd;  /* path, or NULL; for multiboot: modules as "FILE ARGS,FILE ARGS" */
    const char *cmdline; /* never NULL */
    const struct e820_map *e820;
    gpa_t rsdp;         /* where the board put the ACPI root pointer; 0: none */
    bool guest_unpacks; /* a packed kernel is left to its own unpacker */
    struct guest_memory *memory;
};

/*
 * Loads by the image's own kind. On success `cpu` (already reset) holds the entry state. Errors name the
 * file: ERROR_INPUT for files that are missing, unreadable, damaged, or too large for the memory.
 */
int loader_load(const struct loader_request *req, struct cpu *cpu, struct error *err);

#endif
