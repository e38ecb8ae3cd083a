#include "machine/elf.h"

#include "machine/load.h"

#include <elf.h>
#include <string.h>

/* More program headers than any kernel has; bounds the work a hostile file can ask for. */
#define PHNUM_MAX 128

bool elf_is_image(const u8 *head, size_t len)
{
    return len >= SELFMAG && !memcmp(head, ELFMAG, SELFMAG);
}

int elf_open(struct elf *e, const struct image *img, struct error *err)
{
    union {
        u8 ident[EI_NIDENT];
        Elf32_Ehdr e32;
        Elf64_Ehdr e64;
    } h = {0};
    u16 phentsize, type;
    int ret = image_read(img, 0, &h.ident, sizeof(h.ident), err);

    if (ret)
        return ret;
    *e = (struct elf){.img = img, .is64 = h.ident[EI_CLASS] == ELFCLASS64};
    if (h.ident[EI_DATA] != ELFDATA2LSB ||
        (h.ident[EI_CLASS] != ELFCLASS32 && h.ident[EI_CLASS] != ELFCLASS64))
        return error_input(err, "'%s' is an ELF file for another machine; give one for x86",
                           img->path);
    ret = image_read(img, 0, &h, e->is64 ? sizeof(h.e64) : sizeof(h.e32), err);
    if (ret)
        return ret;
    if (e->is64) {
        e->machine = h.e64.e_machine;
        e->entry = h.e64.e_entry;
        e->phoff = h.e64.e_phoff;
        e->phnum = h.e64.e_phnum;
        phentsize = h.e64.e_phentsize;
        type = h.e64.e_type;
    } else {
        e->machine = h.e32.e_machine;
        e->entry = h.e32.e_entry;
        e->phoff = h.e32.e_phoff;
        e->phnum = h.e32.e_phnum;
        phentsize = h.e32.e_phentsize;
        type = h.e32.e_type;
    }
    if (e->machine != EM_386 && e->machine != EM_X86_64)
        return error_input(err,
                           "'%s' is an ELF file for another machine (number %u); give one for x86",
                           img->path, e->machine);
    if (type != ET_EXEC && type != ET_DYN)
        return error_input(err,
                           "'%s' is an ELF file that is not linked to run (type %u); give the "
                           "linker's output",
                           img->path, type);
    if (!e->phnum || e->phnum > PHNUM_MAX ||
        phentsize != (e->is64 ? sizeof(Elf64_Phdr) : sizeof(Elf32_Phdr)))
        return error_input(err,
                           "'%s' is damaged: %u ELF program headers of %u bytes; build it again",
                           img->path, e->phnum, phentsize);
    if (e->phoff > img->size || (u64)e->phnum * phentsize > img->size - e->phoff)
        return error_input(err,
                           "'%s' is damaged or truncated: its ELF program headers at %#llx lie "
                           "outside the file; fetch or build it again",
                           img->path, (unsigned long long)e->phoff);
    return 0;
}

int elf_segment_get(const struct elf *e, unsigned i, struct elf_segment *s, struct error *err)
{
    int ret;

    if (e->is64) {
        Elf64_Phdr p;

        ret = image_read(e->img, e->phoff + (u64)i * sizeof(p), &p, sizeof(p), err);
        if (ret)
            return ret;
        *s =
            (struct elf_segment){p.p_type, p.p_offset, p.p_paddr, p.p_filesz, p.p_memsz, p.p_align};
    } else {
        Elf32_Phdr p;

        ret = image_read(e->img, e->phoff + (u64)i * sizeof(p), &p, sizeof(p), err);
        if (ret)
            return ret;
        *s =
            (struct elf_segment){p.p_type, p.p_offset, p.p_paddr, p.p_filesz, p.p_memsz, p.p_align};
    }
    if (s->offset > e->img->size || s->filesz > e->img->size - s->offset)
        return error_input(err,
                           "'%s' is damaged or truncated: ELF segment %u (%llu bytes at offset "
                           "%#llx) lies outside the file; fetch or build it again",
                           e->img->path, i, (unsigned long long)s->filesz,
                           (unsigned long long)s->offset);
    if (s->type == PT_LOAD && s->filesz > s->memsz)
        return error_input(err,
                           "'%s' is damaged: ELF segment %u has more bytes in the file than in "
                           "memory; build it again",
                           e->img->path, i);
    return 0;
}

static int check_place(const struct elf *e, const struct loader_request *req, unsigned i,
                       const struct elf_segment *s, struct error *err)
{
    unsigned long long first = s->paddr, last = s->paddr + (s->memsz - 1);

    if (last < first)
        return error_input(err,
                           "'%s' is damaged: ELF segment %u (%#llx bytes at %#llx) wraps around "
                           "the address space; build it again",
                           e->img->path, i, (unsigned long long)s->memsz, first);
    if (load_meets_info(s->paddr, s->memsz))
        return error_input(err,
                           "'%s': ELF segment %u (%#llx to %#llx) covers the place of the boot "
                           "information (%#llx to %#llx); link it elsewhere",
                           e->img->path, i, first, last, LOAD_INFO_BASE, LOAD_INFO_END - 1);
    if (!load_is_ram(req, s->paddr, s->memsz))
        return error_input(err,
                           "'%s': ELF segment %u needs memory from %#llx to %#llx, and not all "
                           "of that is there; give more with --memory, or link it elsewhere",
                           e->img->path, i, first, last);
    return 0;
}

int elf_extent(const struct elf *e, const struct loader_request *req, gpa_t *start, gpa_t *end,
               struct error *err)
{
    u64 total = 0;

    *start = UINT64_MAX;
    *end = 0;
    for (unsigned i = 0; i < e->phnum; i++) {
        struct elf_segment s;
        int ret = elf_segment_get(e, i, &s, err);

        if (ret)
            return ret;
        if (s.type != PT_LOAD || !s.memsz)
            continue;
        ret = check_place(e, req, i, &s, err);
        if (ret)
            return ret;
        *start = MIN(*start, s.paddr);
        *end = MAX(*end, s.paddr + s.memsz);
        total += s.memsz;
    }
    if (!total)
        return error_input(err, "'%s' is an ELF file with nothing to load; give a linked kernel",
                           e->img->path);
    if (total > *end - *start)
        return error_input(err, "'%s' is damaged: its ELF segments overlap; build it again",
                           e->img->path);
    return 0;
}

bool elf_holds(const struct elf *e, gpa_t at)
{
    for (unsigned i = 0; i < e->phnum; i++) {
        struct elf_segment s;
        struct error err;

        if (elf_segment_get(e, i, &s, &err) == 0 && s.type == PT_LOAD && at >= s.paddr &&
            at - s.paddr < s.memsz)
            return true;
    }
    return false;
}

int elf_load(const struct elf *e, const struct loader_request *req, struct error *err)
{
    for (unsigned i = 0; i < e->phnum; i++) {
        struct elf_segment s;
        int ret = elf_segment_get(e, i, &s, err);

        if (!ret && s.type == PT_LOAD && s.memsz) {
            ret = image_load(e->img, s.offset, s.filesz, req->memory, s.paddr, err);
            load_zero(req, s.paddr + s.filesz, s.memsz - s.filesz);
        }
        if (ret)
            return ret;
    }
    return 0;
}

/* A segment to load; false: it is none. */
static bool get_load(const struct elf *e, unsigned i, struct elf_segment *s)
{
    struct error err;

    return elf_segment_get(e, i, s, &err) == 0 && s->type == PT_LOAD && s->memsz;
}

/* Whether segment i, moved, covers what is to be moved after it. */
static bool covers_later(const struct elf *e, unsigned i, const struct elf_segment *s, gpa_t at)
{
    struct elf_segment later;

    for (unsigned n = i + 1; n < e->phnum; n++)
        if (get_load(e, n, &later) && s->paddr < at + later.offset + later.filesz &&
            at + later.offset < s->paddr + s->memsz)
            return true;
    return false;
}

bool elf_settle(const struct elf *e, const struct loader_request *req, gpa_t at)
{
    struct elf_segment s;

    for (unsigned i = 0; i < e->phnum; i++) {
        u64 len;

        if (!get_load(e, i, &s))
            continue;
        len = s.filesz;
        if (covers_later(e, i, &s, at) || !memory_dma(req->memory, s.paddr, &len, true) ||
            len < s.filesz)
            return false;
    }
    for (unsigned i = 0; i < e->phnum; i++) {
        u64 len;
        u8 *to;

        if (!get_load(e, i, &s))
            continue;
        len = s.filesz;
        to = memory_dma(req->memory, s.paddr, &len, true);
        if (to != e->img->data + s.offset)
            memmove(to, e->img->data + s.offset, len);
        memory_tell_written(req->memory, s.paddr, len);
        load_zero(req, s.paddr + s.filesz, s.memsz - s.filesz);
    }
    return true;
}
