/*
 * What the loaders share: where RAM is, the area below 640 KiB that holds what a kernel is told at
 * its entry, and flat segments. Only loader.c and load_*.c include this.
 *
 * The boot information of every protocol (zero page, hvm_start_info, multiboot information), the
 * command line, the GDT and the first page tables lie in one area of conventional memory. It is
 * clear of the BIOS data area, of the usual places of 16-bit start-up code, and of the two pages at
 * 0x9d000 where Linux's decompressor puts its paging trampoline while it still runs on the loader's
 * page tables.
 */
#ifndef DOPPEL_MACHINE_LOAD_H
#define DOPPEL_MACHINE_LOAD_H

#include "machine/image.h"
#include "machine/loader.h"

#define LOAD_INFO_BASE 0x80000ULL
#define LOAD_INFO_END 0x98000ULL

/* Kernels are loaded, and their processors started, below this. */
#define LOAD_LIMIT 0x100000000ULL

#define LOAD_SEL_CODE 0x10
#define LOAD_SEL_DATA 0x18
#define LOAD_DESC_CODE32 0x00cf9b000000ffffULL
#define LOAD_DESC_CODE64 0x00af9b000000ffffULL
#define LOAD_DESC_DATA 0x00cf93000000ffffULL

struct load_info {
    const struct loader_request *req;
    gpa_t next;
};

static inline struct load_info load_info_begin(const struct loader_request *req)
{
    return (struct load_info){.req = req, .next = LOAD_INFO_BASE};
}

/* Copies data into the area, at the next multiple of align (a power of two): *gpa. */
int load_info_put(struct load_info *info, const void *data, u64 len, u64 align, gpa_t *gpa,
                  struct error *err);

/* Whether all of [gpa, gpa + len), len > 0, is RAM that a kernel may use. */
bool load_is_ram(const struct loader_request *req, gpa_t gpa, u64 len);
/* Whether [gpa, gpa + len) meets the boot information's area. */
bool load_meets_info(gpa_t gpa, u64 len);
/* The highest and the lowest page-aligned place for len bytes of RAM in [floor, ceiling). */
bool load_place_high(const struct loader_request *req, u64 len, gpa_t floor, gpa_t ceiling,
                     gpa_t *gpa);
bool load_place_low(const struct loader_request *req, u64 len, gpa_t floor, gpa_t ceiling,
                    gpa_t *gpa);
/* Makes RAM read as zero without touching pages that already do. */
void load_zero(const struct loader_request *req, gpa_t gpa, u64 len);

/* Bytes in whole MiB, rounded up: for messages. */
unsigned long long load_mib(u64 bytes);

/*
 * Puts a GDT with a code and a data descriptor at LOAD_SEL_CODE and LOAD_SEL_DATA into the area and
 * loads it and the segment registers; clears the general registers; interrupts off. The rest of the
 * entry state (control registers, RIP, arguments) is the caller's.
 */
int load_enter_flat(struct load_info *info, u64 code_descriptor, struct cpu *cpu,
                    struct error *err);
/* The entry that PVH and multiboot share: 32-bit protected mode, no paging, EBX = argument. */
int load_enter_protected(struct load_info *info, gpa_t entry, gpa_t argument, struct cpu *cpu,
                         struct error *err);

/* load_linux.c. `head`: the file's first bytes. */
bool linux_is_image(const u8 *head, size_t len);
int linux_load(const struct loader_request *req, const struct image *img, struct cpu *cpu,
               struct error *err);

/* load_pvh.c. 1 with *entry set; 0 when the ELF file has no PVH note; else an error. */
int pvh_find_entry(const struct image *img, gpa_t *entry, struct error *err);
int pvh_load(const struct loader_request *req, const struct image *img, gpa_t entry,
             struct cpu *cpu, struct error *err);

/* load_multiboot.c. The header's offset in the file, or -1. */
int multiboot_find(const u8 *head, size_t len);
int multiboot_load(const struct loader_request *req, const struct image *img, u32 header_offset,
                   struct cpu *cpu, struct error *err);

#endif
