/*
 * Multiboot version 1 (Multiboot Specification 0.6.96): an image with a header in its first 8 KiB,
 * loaded by its ELF segments, or by the addresses in the header itself (the a.out kludge).
 *
 * Modules go right above the kernel, each on a page of its own, so that a kernel which maps little
 * at first can reach them. The kernel's string and the modules' begin with the file's name, as
 * GRUB's do.
 */
#define _GNU_SOURCE /* asprintf */
#include "host/log.h"
#include "machine/elf.h"
#include "machine/load.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MULTIBOOT_HEADER_MAGIC 0x1badb002u
#define MULTIBOOT_LOADER_MAGIC 0x2badb002u
#define MULTIBOOT_SEARCH 8192

#define HEADER_VIDEO BIT(2)
#define HEADER_KNOWN 7u          /* page alignment, memory information, video mode */
#define HEADER_REQUIRED 0xffffu  /* flags that a loader must know or refuse */
#define HEADER_ADDRESSES BIT(16) /* the a.out kludge */
#define HEADER_SHORT 12          /* bytes of a header without addresses */

#define INFO_MEMORY BIT(0)
#define INFO_CMDLINE BIT(2)
#define INFO_MODULES BIT(3)
#define INFO_MMAP BIT(6)
#define INFO_LOADER_NAME BIT(9)

#define MODULES_MAX 256

struct multiboot_header {
    u32 magic, flags, checksum;
    u32 header_addr, load_addr, load_end_addr, bss_end_addr, entry_addr;
};

struct multiboot_info {
    u32 flags;
    u32 mem_lower, mem_upper; /* KiB */
    u32 boot_device, cmdline;
    u32 mods_count, mods_addr;
    u32 syms[4];
    u32 mmap_length, mmap_addr;
    u32 drives_length, drives_addr;
    u32 config_table, boot_loader_name, apm_table;
    u32 vbe[4];
    u32 framebuffer[7];
};
_Static_assert(offsetof(struct multiboot_info, boot_loader_name) == 64, "as in the specification");

struct multiboot_module {
    u32 mod_start, mod_end, string, reserved;
};
struct multiboot_mmap_entry {
    u32 size; /* of what follows */
    u64 base, length;
    u32 type;
} __attribute__((packed));

int multiboot_find(const u8 *head, size_t len)
{
    for (size_t at = 0; at + HEADER_SHORT <= MIN(len, MULTIBOOT_SEARCH); at += 4) {
        u32 h[3];

        memcpy(h, head + at, sizeof(h));
        if (h[0] == MULTIBOOT_HEADER_MAGIC && h[0] + h[1] + h[2] == 0)
            return (int)at;
    }
    return -1;
}

/* Loads by the header's own addresses; *end is the first address after the image and its BSS. */
static int load_by_addresses(const struct loader_request *req, const struct image *img,
                             const struct multiboot_header *h, u32 header_offset, gpa_t *end,
                             struct error *err)
{
    u64 before = (u64)h->header_addr - h->load_addr; /* from the image's first byte to its header */
    u64 offset, filesz, memsz;

    if (h->header_addr < h->load_addr || before > header_offset)
        return error_input(err,
                           "'%s' is damaged: its multiboot load address %#x does not match its "
                           "header address %#x; build it again",
                           img->path, h->load_addr, h->header_addr);
    offset = header_offset - before;
    filesz = h->load_end_addr ? (u64)h->load_end_addr - h->load_addr : img->size - offset;
    if ((h->load_end_addr && h->load_end_addr <= h->load_addr) || filesz > img->size - offset)
        return error_input(err,
                           "'%s' is damaged or truncated: its multiboot header wants %#x to %#x "
                           "loaded, more than the file has; fetch or build it again",
                           img->path, h->load_addr, h->load_end_addr);
    memsz = filesz;
    if (h->bss_end_addr > h->load_addr)
        memsz = MAX(memsz, (u64)h->bss_end_addr - h->load_addr);
    if (load_meets_info(h->load_addr, memsz))
        return error_input(err,
                           "'%s' loads at %#x, over the place of the boot information (%#llx to "
                           "%#llx); link it elsewhere",
                           img->path, h->load_addr, LOAD_INFO_BASE, LOAD_INFO_END - 1);
    if (!load_is_ram(req, h->load_addr, memsz))
        return error_input(err,
                           "'%s' needs memory from %#x to %#llx, and not all of that is there; "
                           "give more with --memory",
                           img->path, h->load_addr, h->load_addr + (unsigned long long)memsz - 1);
    if (h->entry_addr < h->load_addr || h->entry_addr - h->load_addr >= memsz)
        return error_input(err,
                           "'%s' is damaged: its multiboot entry %#x is outside of what it loads; "
                           "build it again",
                           img->path, h->entry_addr);
    *end = h->load_addr + memsz;
    load_zero(req, h->load_addr + filesz, memsz - filesz);
    return image_load(img, offset, filesz, req->memory, h->load_addr, err);
}

static int load_by_elf(const struct loader_request *req, const struct image *img, gpa_t *entry,
                       gpa_t *end, struct error *err)
{
    struct elf e;
    gpa_t start;
    int ret = elf_open(&e, img, err);

    if (!ret)
        ret = elf_extent(&e, req, &start, end, err);
    if (ret)
        return ret;
    if (!elf_holds(&e, e.entry) || e.entry >= LOAD_LIMIT)
        return error_input(err,
                           "'%s' is damaged: its ELF entry %#llx is outside of what it loads; "
                           "build it again",
                           img->path, (unsigned long long)e.entry);
    *entry = e.entry;
    return elf_load(&e, req, err);
}

/*
 * Cuts the next module off a list "FILE ARGS,FILE ARGS", in which a doubled comma stands for one
 * that is part of a name or argument. The list is changed in place; NULL at its end.
 */
static char *next_module(char **list)
{
    char *module = *list, *out = *list, *in = *list;

    if (!module)
        return NULL;
    *list = NULL;
    for (; *in; in++) {
        if (in[0] == ',') {
            if (in[1] != ',') {
                *list = in + 1;
                break;
            }
            in++;
        }
        *out++ = *in;
    }
    *out = '\0';
    return module;
}

/* Loads one module at or above *floor, which moves behind it. `string` is "FILE ARGS". */
static int load_module(struct load_info *info, const char *string, gpa_t *floor,
                       struct multiboot_module *m, struct error *err)
{
    size_t name_len = strcspn(string, " ");
    char *name = strndup(string, name_len);
    struct image img;
    gpa_t at, text;
    int ret;

    if (!name)
        return error_host(err, ENOMEM, "cannot load module '%s'", string);
    ret = image_open(&img, name, err);
    if (ret)
        goto out;
    if (!load_place_low(info->req, img.size, *floor, LOAD_LIMIT, &at))
        ret = error_input(err,
                          "module '%s' (%llu MiB) does not fit into memory above %#llx; give more "
                          "with --memory",
                          name, load_mib(img.size), (unsigned long long)*floor);
    else
        ret = image_load(&img, 0, img.size, info->req->memory, at, err);
    if (!ret)
        ret = load_info_put(info, string, strlen(string) + 1, 1, &text, err);
    if (!ret) {
        *m = (struct multiboot_module){(u32)at, (u32)(at + img.size), (u32)text, 0};
        *floor = at + img.size;
    }
    image_close(&img);
out:
    free(name);
    return ret;
}

static int load_modules(struct load_info *info, gpa_t floor, struct multiboot_info *mbi,
                        struct error *err)
{
    struct multiboot_module modules[MODULES_MAX];
    char *list = strdup(info->req->initrd), *rest = list, *module;
    gpa_t at;
    u32 n = 0;
    int ret = 0;

    if (!list)
        return error_host(err, ENOMEM, "cannot load modules");
    while (!ret && (module = next_module(&rest))) {
        if (n == MODULES_MAX)
            ret = error_input(err, "--initrd names more than %d modules; give fewer", MODULES_MAX);
        else if (!*module)
            ret = error_input(err,
                              "--initrd has an empty module name; write FILE ARGS,FILE ARGS, and "
                              "a comma inside one as ',,'");
        else
            ret = load_module(info, module, &floor, &modules[n++], err);
    }
    if (!ret)
        ret = load_info_put(info, modules, n * sizeof(modules[0]), 8, &at, err);
    if (!ret) {
        mbi->flags |= INFO_MODULES;
        mbi->mods_count = n;
        mbi->mods_addr = (u32)at;
    }
    free(list);
    return ret;
}

/* "FILE COMMAND LINE" */
static int put_cmdline(struct load_info *info, struct multiboot_info *mbi, struct error *err)
{
    const struct loader_request *req = info->req;
    char *text;
    gpa_t at;
    int len = asprintf(&text, "%s%s%s", req->kernel, *req->cmdline ? " " : "", req->cmdline);
    int ret;

    if (len < 0)
        return error_host(err, ENOMEM, "cannot pass the command line");
    ret = load_info_put(info, text, (u64)len + 1, 1, &at, err);
    free(text);
    mbi->flags |= INFO_CMDLINE;
    mbi->cmdline = (u32)at;
    return ret;
}

/* RAM in KiB from base on, up to the first hole. */
static u32 ram_from(const struct e820_map *map, gpa_t base)
{
    for (unsigned i = 0; i < map->count; i++) {
        const struct e820_entry *e = &map->entries[i];

        if (e->type == E820_RAM && base >= e->base && base - e->base < e->size)
            return (u32)MIN((e->size - (base - e->base)) >> 10, UINT32_MAX);
    }
    return 0;
}

static int put_memory_map(struct load_info *info, struct multiboot_info *mbi, struct error *err)
{
    const struct e820_map *e820 = info->req->e820;
    struct multiboot_mmap_entry map[E820_MAX];
    gpa_t at;
    int ret;

    for (unsigned i = 0; i < e820->count; i++) {
        map[i].size = sizeof(map[i]) - sizeof(map[i].size);
        map[i].base = e820->entries[i].base;
        map[i].length = e820->entries[i].size;
        map[i].type = e820->entries[i].type;
    }
    mbi->flags |= INFO_MEMORY | INFO_MMAP;
    mbi->mem_lower = ram_from(e820, 0);
    mbi->mem_upper = ram_from(e820, MIB(1));
    mbi->mmap_length = e820->count * (u32)sizeof(map[0]);
    ret = load_info_put(info, map, mbi->mmap_length, 8, &at, err);
    mbi->mmap_addr = (u32)at;
    return ret;
}

/* Everything that the kernel is told; *at is where the information structure lies. */
static int put_info(struct load_info *info, gpa_t kernel_end, gpa_t *at, struct error *err)
{
    static const char loader_name[] = "doppel";
    struct multiboot_info mbi = {0};
    gpa_t name = 0;
    int ret = 0;

    if (info->req->initrd)
        ret = load_modules(info, kernel_end, &mbi, err);
    if (!ret)
        ret = put_cmdline(info, &mbi, err);
    if (!ret)
        ret = put_memory_map(info, &mbi, err);
    if (!ret)
        ret = load_info_put(info, loader_name, sizeof(loader_name), 1, &name, err);
    if (ret)
        return ret;
    mbi.flags |= INFO_LOADER_NAME;
    mbi.boot_loader_name = (u32)name;
    return load_info_put(info, &mbi, sizeof(mbi), 8, at, err);
}

int multiboot_load(const struct loader_request *req, const struct image *img, u32 header_offset,
                   struct cpu *cpu, struct error *err)
{
    struct load_info info = load_info_begin(req);
    struct multiboot_header h = {0};
    gpa_t entry = 0, end, at;
    int ret = image_read(img, header_offset, &h, HEADER_SHORT, err);

    if (ret)
        return ret;
    if (h.flags & HEADER_REQUIRED & ~HEADER_KNOWN)
        return error_input(err,
                           "'%s' is a multiboot image that requires unknown features (flags %#x); "
                           "build it for multiboot version 1",
                           img->path, h.flags);
    if (h.flags & HEADER_VIDEO)
        log_info("'%s' asks for a video mode; there is no screen, so it gets none", img->path);
    if (h.flags & HEADER_ADDRESSES) {
        ret = image_read(img, header_offset, &h, sizeof(h), err);
        if (!ret)
            ret = load_by_addresses(req, img, &h, header_offset, &end, err);
        entry = h.entry_addr;
    } else {
        ret = load_by_elf(req, img, &entry, &end, err);
    }
    if (!ret)
        ret = put_info(&info, end, &at, err);
    if (!ret)
        ret = load_enter_protected(&info, entry, at, cpu, err);
    if (!ret)
        cpu->gpr[RAX] = MULTIBOOT_LOADER_MAGIC;
    return ret;
}
