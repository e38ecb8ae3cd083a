/*
 * ELF kernels with a PVH entry (Xen, docs/misc/pvh.pandoc and public/arch-x86/hvm/start_info.h):
 * the note XEN_ELFNOTE_PHYS32_ENTRY holds the physical address of a 32-bit entry, which takes in
 * EBX the address of an hvm_start_info.
 */
#include "machine/elf.h"
#include "machine/load.h"

#include <elf.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define XEN_ELFNOTE_PHYS32_ENTRY 18
#define NOTES_MAX KIB(64)

#define HVM_START_MAGIC 0x336ec578u

struct hvm_start_info {
    u32 magic, version, flags, nr_modules;
    u64 modlist_paddr, cmdline_paddr, rsdp_paddr;
    u64 memmap_paddr; /* from here on: version 1 */
    u32 memmap_entries, reserved;
};
struct hvm_modlist_entry {
    u64 paddr, size, cmdline_paddr, reserved;
};
struct hvm_memmap_entry {
    u64 addr, size;
    u32 type, reserved; /* types are E820's */
};
_Static_assert(sizeof(struct hvm_start_info) == 56, "as in start_info.h");
_Static_assert(sizeof(struct hvm_memmap_entry) == 24, "as in start_info.h");

static u64 align_up(u64 v, u64 align)
{
    return (v + align - 1) & ~(align - 1);
}

/* Looks through `len` bytes of notes; true with *entry set when the PVH note is among them. */
static bool scan_notes(const u8 *notes, u64 len, u64 align, gpa_t *entry)
{
    u64 at = 0;

    while (len - at >= sizeof(Elf64_Nhdr)) {
        Elf64_Nhdr n; /* the same in both classes */
        u64 name = at + sizeof(n), desc;

        memcpy(&n, notes + at, sizeof(n));
        desc = align_up(name + n.n_namesz, align);
        at = align_up(desc + n.n_descsz, align);
        if (desc > len || n.n_descsz > len - desc)
            return false;
        if (n.n_type == XEN_ELFNOTE_PHYS32_ENTRY && n.n_namesz == sizeof("Xen") &&
            !memcmp(notes + name, "Xen", sizeof("Xen")) && (n.n_descsz == 4 || n.n_descsz == 8)) {
            *entry = 0;
            memcpy(entry, notes + desc, n.n_descsz);
            return true;
        }
        if (at > len)
            return false;
    }
    return false;
}

int pvh_find_entry(const struct image *img, gpa_t *entry, struct error *err)
{
    struct elf e;
    int ret = elf_open(&e, img, err);

    for (unsigned i = 0; !ret && i < e.phnum; i++) {
        struct elf_segment s;
        u64 len;
        u8 *notes;

        ret = elf_segment_get(&e, i, &s, err);
        if (ret || s.type != PT_NOTE)
            continue;
        len = MIN(s.filesz, NOTES_MAX);
        notes = malloc(len + 1);
        if (!notes)
            return error_host(err, ENOMEM, "cannot read '%s'", img->path);
        ret = image_read(img, s.offset, notes, len, err);
        if (!ret && scan_notes(notes, len, s.align == 8 ? 8 : 4, entry))
            ret = 1;
        free(notes);
    }
    return ret;
}

static int load_module(const struct loader_request *req, gpa_t floor, struct hvm_modlist_entry *m,
                       struct error *err)
{
    struct image img;
    int ret = image_open(&img, req->initrd, err);

    if (ret)
        return ret;
    if (!load_place_high(req, img.size, floor, LOAD_LIMIT, &m->paddr))
        ret = error_input(err,
                          "initrd '%s' (%llu MiB) does not fit into memory above the kernel's end "
                          "at %#llx; give more with --memory, or a smaller one",
                          img.path, load_mib(img.size), (unsigned long long)floor);
    else
        ret = image_load(&img, 0, img.size, req->memory, m->paddr, err);
    m->size = img.size;
    image_close(&img);
    return ret;
}

static int put_memmap(struct load_info *info, struct hvm_start_info *si, struct error *err)
{
    const struct e820_map *e820 = info->req->e820;
    struct hvm_memmap_entry map[E820_MAX] = {0};

    for (unsigned i = 0; i < e820->count; i++) {
        map[i].addr = e820->entries[i].base;
        map[i].size = e820->entries[i].size;
        map[i].type = e820->entries[i].type;
    }
    si->memmap_entries = e820->count;
    return load_info_put(info, map, e820->count * sizeof(map[0]), 8, &si->memmap_paddr, err);
}

int pvh_load(const struct loader_request *req, const struct image *img, gpa_t entry,
             struct cpu *cpu, struct error *err)
{
    struct load_info info = load_info_begin(req);
    struct hvm_start_info si = {.magic = HVM_START_MAGIC, .version = 1, .rsdp_paddr = req->rsdp};
    gpa_t start, end, at;
    struct elf e;
    int ret = elf_open(&e, img, err);

    if (!ret)
        ret = elf_extent(&e, req, &start, &end, err);
    if (ret)
        return ret;
    if (!elf_holds(&e, entry) || entry >= LOAD_LIMIT)
        return error_input(err,
                           "'%s' is damaged: its PVH entry %#llx is outside of what it loads; "
                           "build it again",
                           img->path, (unsigned long long)entry);
    ret = elf_load(&e, req, err);
    if (!ret && req->initrd) {
        struct hvm_modlist_entry m = {0};

        ret = load_module(req, end, &m, err);
        if (!ret)
            ret = load_info_put(&info, &m, sizeof(m), 8, &si.modlist_paddr, err);
        si.nr_modules = 1;
    }
    if (!ret)
        ret = load_info_put(&info, req->cmdline, strlen(req->cmdline) + 1, 16, &si.cmdline_paddr,
                            err);
    if (!ret)
        ret = put_memmap(&info, &si, err);
    if (!ret)
        ret = load_info_put(&info, &si, sizeof(si), 8, &at, err);
    if (!ret)
        ret = load_enter_protected(&info, entry, at, cpu, err);
    return ret;
}
