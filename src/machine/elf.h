/*
 * ELF files (System V ABI, chapters 4 and 5) as boot images: 32-bit and 64-bit, little-endian, for
 * x86. Every number in the file is checked before it is used.
 */
#ifndef DOPPEL_MACHINE_ELF_H
#define DOPPEL_MACHINE_ELF_H

#include "machine/image.h"
#include "machine/loader.h"

struct elf {
    const struct image *img;
    bool is64;
    u16 machine; /* EM_386 or EM_X86_64 */
    u64 entry;
    u64 phoff;
    unsigned phnum;
};

struct elf_segment {
    u32 type; /* PT_* */
    u64 offset, paddr, filesz, memsz, align;
};

bool elf_is_image(const u8 *head, size_t len);

/* Checks the header and that the program headers lie in the file. `img` is borrowed. */
int elf_open(struct elf *e, const struct image *img, struct error *err);

/* Program header i (below phnum); its contents lie in the file. */
int elf_segment_get(const struct elf *e, unsigned i, struct elf_segment *s, struct error *err);

/*
 * Checks that all PT_LOAD segments fit into RAM at their physical addresses, apart from each other
 * and from the boot information; [*start, *end) spans them.
 */
int elf_extent(const struct elf *e, const struct loader_request *req, gpa_t *start, gpa_t *end,
               struct error *err);

/* Whether a PT_LOAD segment holds the byte at a physical address: an entry must lie in one. */
bool elf_holds(const struct elf *e, gpa_t at);

/* Copies the PT_LOAD segments, zeroing what the file does not hold. After elf_extent. */
int elf_load(const struct elf *e, const struct loader_request *req, struct error *err);

/*
 * The same when the file itself lies in guest memory from gpa `at` on, in one slot: what is in its place stays there.
 * False: the segments can't be moved so one after the other, and nothing was done.
 */
bool elf_settle(const struct elf *e, const struct loader_request *req, gpa_t at);

#endif
