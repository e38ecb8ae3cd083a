/*
 * Linux by the 64-bit boot protocol (Documentation/arch/x86/boot.rst and zero-page.rst).
 *
 * A bzImage is a real-mode part, which is not used here but for the setup header inside it, and a
 * protected-mode part: a small program that unpacks the kernel proper (an ELF file, vmlinux), moves
 * it into place and jumps to it. Unpacking is work for hundreds of millions of guest instructions,
 * so it is done here on the host where that is possible, unless the guest does it as fast
 * (guest_unpacks): then point 3 holds for every kernel.
 *
 * 1. The setup header says where the packed vmlinux lies (payload_offset, payload_length) and where
 *    the kernel wants to be (pref_address, with init_size bytes from there for its own use).
 * 2. vmlinux's segments go to their physical addresses, which start at pref_address. The unpacker's
 *    own entry and vmlinux's entry take the same arguments and the same processor state: long mode,
 *    all of kernel, zero page and command line mapped at their physical addresses, RSI = zero page.
 *    A kernel at its link address needs no relocation, and none of the unpacker's further work:
 *    address randomisation stays off (KASLR_FLAG is clear in loadflags), 5-level paging too.
 * 3. When the payload is in a format that the host cannot unpack (bzip2, lzo), is damaged, or is
 *    not an ELF file that lies within [pref_address, pref_address + init_size), the protected-mode
 *    part goes to pref_address instead and starts at its 64-bit entry, 0x200 bytes in. So a bad
 *    payload is the guest's to complain about, in its own words.
 *
 * Loading anywhere else but at pref_address would gain nothing: the unpacker moves the kernel up to
 * there.
 */
#include "host/log.h"
#include "machine/decompress.h"
#include "machine/elf.h"
#include "machine/layout.h"
#include "machine/load.h"

#include <asm/bootparam.h>
#include <elf.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define SECTOR 512ULL
#define HEADER_OFFSET 0x1f1
#define HEADER_MAGIC_OFFSET 0x202
#define HEADER_MAGIC 0x53726448u /* "HdrS" */
#define BOOT_FLAG_OFFSET 0x1fe
#define BOOT_FLAG 0xaa55
#define PROTOCOL_MIN 0x020c /* the first with xloadflags: Linux 3.8 */
#define ENTRY64_OFFSET 0x200
#define LOADER_UNDEFINED 0xff
#define VIDEO_MODE_NORMAL 0xffff
#define KERNEL_MIN_ADDRESS MIB(1)

struct linux_kernel {
    struct setup_header hdr;
    u64 code_offset, code_size; /* the protected-mode part in the file */
    gpa_t start, end;           /* what the kernel occupies from its entry on */
};

bool linux_is_image(const u8 *head, size_t len)
{
    u16 flag;
    u32 magic;

    if (len < HEADER_MAGIC_OFFSET + sizeof(magic))
        return false;
    memcpy(&flag, head + BOOT_FLAG_OFFSET, sizeof(flag));
    memcpy(&magic, head + HEADER_MAGIC_OFFSET, sizeof(magic));
    return flag == BOOT_FLAG && magic == HEADER_MAGIC;
}

static int read_header(struct linux_kernel *k, const struct image *img, struct error *err)
{
    const u64 needed =
        offsetof(struct setup_header, handover_offset); /* all of protocol 2.12 but EFI's */
    u64 len;
    u8 jump;
    int ret;

    /* The header ends where the jump at its 0x200 leads to: 0x202 plus the jump's distance. */
    ret = image_read(img, 0x201, &jump, 1, err);
    if (ret)
        return ret;
    len = MIN((u64)HEADER_MAGIC_OFFSET + jump - HEADER_OFFSET, sizeof(k->hdr));
    memset(&k->hdr, 0, sizeof(k->hdr));
    ret = image_read(img, HEADER_OFFSET, &k->hdr, len, err);
    if (ret)
        return ret;
    if (k->hdr.version < PROTOCOL_MIN)
        return error_input(err,
                           "'%s' has boot protocol %u.%02u, too old for the 64-bit entry; give a "
                           "64-bit Linux of version 3.8 or later",
                           img->path, k->hdr.version >> 8, k->hdr.version & 0xff);
    if (len < needed)
        return error_input(err,
                           "'%s' is damaged: its setup header has %llu bytes, %llu are needed; "
                           "fetch or build it again",
                           img->path, (unsigned long long)len, (unsigned long long)needed);
    if (!(k->hdr.xloadflags & XLF_KERNEL_64))
        return error_input(err,
                           "'%s' is a 32-bit Linux, without the 64-bit entry; give a kernel for "
                           "x86-64",
                           img->path);
    if (!(k->hdr.loadflags & LOADED_HIGH))
        return error_input(err, "'%s' is a zImage; give a bzImage", img->path);
    return 0;
}

static int check_layout(struct linux_kernel *k, const struct loader_request *req,
                        const struct image *img, struct error *err)
{
    u64 setup_sectors = k->hdr.setup_sects ? k->hdr.setup_sects : 4;
    u64 size;

    k->code_offset = (setup_sectors + 1) * SECTOR;
    k->code_size = (u64)k->hdr.syssize * 16;
    if (k->code_size <= ENTRY64_OFFSET)
        return error_input(err,
                           "'%s' is damaged: its setup header says that there are %llu bytes of "
                           "kernel; fetch or build it again",
                           img->path, (unsigned long long)k->code_size);
    if (k->code_offset + k->code_size > img->size)
        return error_input(err, "'%s' is truncated: %llu bytes of %llu; fetch it again", img->path,
                           (unsigned long long)img->size,
                           (unsigned long long)(k->code_offset + k->code_size));

    k->start = k->hdr.pref_address;
    size = MAX((u64)k->hdr.init_size, k->code_size);
    if (k->start < KERNEL_MIN_ADDRESS || k->start >= LOAD_LIMIT || size > LOAD_LIMIT - k->start ||
        k->start & (GUEST_PAGE_SIZE - 1))
        return error_input(err,
                           "'%s' is damaged: it wants %llu MiB of memory at %#llx; fetch or build "
                           "it again",
                           img->path, load_mib(size), (unsigned long long)k->start);
    k->end = k->start + size;
    if (!load_is_ram(req, k->start, size))
        return error_input(err, "'%s' needs memory up to %#llx; give it at least --memory %lluM",
                           img->path, (unsigned long long)k->end, load_mib(k->end));
    return 0;
}

static int check_cmdline(const struct linux_kernel *k, const struct loader_request *req,
                         struct error *err)
{
    size_t len = strlen(req->cmdline);

    if (len > k->hdr.cmdline_size)
        return error_input(err,
                           "the command line has %zu bytes, and '%s' takes %u at most; shorten "
                           "--append",
                           len, req->kernel, k->hdr.cmdline_size);
    return 0;
}

/* As high as may be: below initrd_addr_max and in RAM, above the kernel. */
static int load_initrd(struct linux_kernel *k, const struct loader_request *req, struct error *err)
{
    gpa_t ceiling = MIN((u64)k->hdr.initrd_addr_max + 1, LAYOUT_LOW_RAM_END);
    gpa_t floor = (k->end + GUEST_PAGE_SIZE - 1) & ~(GUEST_PAGE_SIZE - 1);
    struct image img;
    gpa_t at = 0;
    int ret = image_open(&img, req->initrd, err);

    if (ret)
        return ret;
    if (floor >= ceiling || img.size > ceiling - floor)
        ret = error_input(err,
                          "initrd '%s' is too large: %llu MiB, and '%s' can take %llu MiB; give a "
                          "smaller one",
                          img.path, load_mib(img.size), req->kernel,
                          floor < ceiling ? (unsigned long long)(ceiling - floor) >> 20 : 0ULL);
    else if (!load_place_high(req, img.size, floor, ceiling, &at))
        ret = error_input(err,
                          "initrd '%s' (%llu MiB) does not fit into memory beside the kernel; "
                          "give at least --memory %lluM",
                          img.path, load_mib(img.size),
                          load_mib(floor + img.size + GUEST_PAGE_SIZE - 1));
    else
        ret = image_load(&img, 0, img.size, req->memory, at, err);
    if (!ret) {
        k->hdr.ramdisk_image = (u32)at;
        k->hdr.ramdisk_size = (u32)img.size;
    }
    image_close(&img);
    return ret;
}

/*
 * Linux links its first segment 2 MiB behind the start of the file. Unpacked so much before the kernel's place, most
 * of it is where it belongs, and no page is zeroed or copied for the way there.
 */
#define UNPACKED_LEAD MIB(2)

/* Guest memory for the unpacked file, at *at. NULL: there is none. */
static u8 *place_unpacked(const struct linux_kernel *k, const struct loader_request *req, u64 size,
                          gpa_t *at)
{
    u64 len = size;
    u8 *host;

    if (k->start < UNPACKED_LEAD)
        return NULL;
    *at = k->start - UNPACKED_LEAD;
    if (load_meets_info(*at, size) || *at + size > k->end)
        return NULL;
    host = memory_dma(req->memory, *at, &len, true);
    return len == size ? host : NULL;
}

/* Of a file that lies in guest memory: by way of a copy. */
static int load_copy(const struct elf *in_place, const struct loader_request *req,
                     struct error *err)
{
    struct image copy = *in_place->img;
    struct elf e = *in_place;
    u8 *data = malloc(copy.size);
    int ret;

    if (!data)
        return error_host(err, ENOMEM, "cannot allocate %llu bytes to unpack it",
                          (unsigned long long)copy.size);
    memcpy(data, copy.data, copy.size);
    copy.data = data;
    e.img = &copy;
    ret = elf_load(&e, req, err);
    free(data);
    return ret;
}

/*
 * Puts an unpacked vmlinux in its place, all of which is found to fit before. at: where in guest memory it is; 0: it
 * isn't.
 */
static int load_vmlinux(const struct linux_kernel *k, const struct loader_request *req,
                        const struct image *vmlinux, gpa_t at, gpa_t *entry, struct error *err)
{
    struct elf e;
    gpa_t start, end;
    int ret = elf_open(&e, vmlinux, err);

    if (!ret)
        ret = elf_extent(&e, req, &start, &end, err);
    if (ret)
        return ret;
    if (e.machine != EM_X86_64 || !e.is64)
        return error_input(err, "its payload is not a 64-bit kernel");
    if (start < k->start || end > k->end || !elf_holds(&e, e.entry))
        return error_input(err, "its payload lies outside %#llx to %#llx",
                           (unsigned long long)k->start, (unsigned long long)k->end);
    *entry = e.entry;
    if (!at)
        return elf_load(&e, req, err);
    return elf_settle(&e, req, at) ? 0 : load_copy(&e, req, err);
}

static int unpack_and_load(const struct linux_kernel *k, const struct loader_request *req,
                           const struct image *img, u8 *payload, gpa_t *entry, struct error *err)
{
    u32 len = k->hdr.payload_length;
    struct image vmlinux;
    const char *format;
    gpa_t at = 0;
    u32 size;
    u8 *out, *mapped = NULL;
    int ret = image_read(img, k->code_offset + k->hdr.payload_offset, payload, len, err);

    if (ret)
        return ret;
    format = decompress_format(payload, len);
    size = decompress_size(payload, len);
    /* It is unpacked in place by the guest, so it fits into the kernel's own memory. */
    if (!size || size > k->end - k->start)
        return error_input(err, "its payload says that it unpacks to %u bytes", size);
    out = place_unpacked(k, req, size, &at);
    if (!out) {
        at = 0;
        mapped = mmap(NULL, size, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (mapped == MAP_FAILED)
            return error_host(err, errno, "cannot allocate %u bytes to unpack it", size);
        madvise(mapped, size, MADV_HUGEPAGE); /* halves the time for lz4 */
        out = mapped;
    }
    ret = decompress(payload, len, out, size);
    if (at)
        memory_tell_written(req->memory, at, size);
    if (ret) {
        ret = error_input(err, "its payload (%s) %s", format ? format : "unknown format",
                          ret == -EOPNOTSUPP ? "is in a format not known here" : "is damaged");
    } else {
        vmlinux = image_of_bytes(img->path, out, size);
        ret = load_vmlinux(k, req, &vmlinux, at, entry, err);
    }
    if (mapped)
        munmap(mapped, size);
    return ret;
}

static int load_payload(const struct linux_kernel *k, const struct loader_request *req,
                        const struct image *img, gpa_t *entry, struct error *err)
{
    u64 offset = k->hdr.payload_offset, len = k->hdr.payload_length;
    u8 *payload;
    int ret;

    if (!len || offset > k->code_size || len > k->code_size - offset)
        return error_input(err, "its setup header does not say where the payload is");
    payload = malloc(len);
    if (!payload)
        return error_host(err, ENOMEM, "cannot allocate %llu bytes to unpack it",
                          (unsigned long long)len);
    ret = unpack_and_load(k, req, img, payload, entry, err);
    free(payload);
    return ret;
}

static int load_kernel(const struct linux_kernel *k, const struct loader_request *req,
                       const struct image *img, gpa_t *entry, struct error *err)
{
    struct error why = {0};

    if (!req->guest_unpacks) {
        if (!load_payload(k, req, img, entry, &why))
            return 0;
        log_debug("'%s' unpacks itself in the guest: %s", img->path, why.text);
    }
    *entry = k->start + ENTRY64_OFFSET;
    return image_load(img, k->code_offset, k->code_size, req->memory, k->start, err);
}

static void fill_e820(struct boot_params *bp, const struct e820_map *map)
{
    _Static_assert(E820_MAX <= E820_MAX_ENTRIES_ZEROPAGE, "the zero page holds the whole map");

    bp->e820_entries = (u8)map->count;
    for (unsigned i = 0; i < map->count; i++) {
        bp->e820_table[i].addr = map->entries[i].base;
        bp->e820_table[i].size = map->entries[i].size;
        bp->e820_table[i].type = map->entries[i].type;
    }
}

/*
 * The zero page. What stays zero says something as well: screen_info, that there is no VGA text
 * screen; setup_data, that there is nothing more to tell.
 */
static int put_zero_page(const struct linux_kernel *k, struct load_info *info, gpa_t *at,
                         struct error *err)
{
    const struct loader_request *req = info->req;
    struct boot_params bp;
    gpa_t cmdline;
    int ret = load_info_put(info, req->cmdline, strlen(req->cmdline) + 1, 16, &cmdline, err);

    if (ret)
        return ret;
    memset(&bp, 0, sizeof(bp));
    bp.hdr = k->hdr;
    bp.hdr.type_of_loader = LOADER_UNDEFINED;
    bp.hdr.vid_mode = VIDEO_MODE_NORMAL;
    bp.hdr.loadflags = LOADED_HIGH;
    bp.hdr.code32_start = (u32)k->start;
    bp.hdr.cmd_line_ptr = (u32)cmdline;
    bp.hdr.setup_data = 0;
    bp.acpi_rsdp_addr = req->rsdp;
    fill_e820(&bp, req->e820);
    return load_info_put(info, &bp, sizeof(bp), GUEST_PAGE_SIZE, at, err);
}

/* Maps the first 4 GiB at their physical addresses, in pages of 2 MiB (SDM vol. 3, 4.5). */
static int put_page_tables(struct load_info *info, gpa_t *pml4, struct error *err)
{
    u64 table[512] = {0}, pdpt[512] = {0};
    gpa_t at;
    int ret;

    for (u64 gib = 0; gib < LOAD_LIMIT / GIB(1); gib++) {
        for (u64 i = 0; i < 512; i++)
            table[i] = (GIB(gib) + MIB(2) * i) | PTE_P | PTE_W | PTE_A | PTE_D | PTE_PS;
        ret = load_info_put(info, table, sizeof(table), GUEST_PAGE_SIZE, &at, err);
        if (ret)
            return ret;
        pdpt[gib] = at | PTE_P | PTE_W | PTE_A;
    }
    ret = load_info_put(info, pdpt, sizeof(pdpt), GUEST_PAGE_SIZE, &at, err);
    if (ret)
        return ret;
    memset(table, 0, sizeof(table));
    table[0] = at | PTE_P | PTE_W | PTE_A;
    return load_info_put(info, table, sizeof(table), GUEST_PAGE_SIZE, pml4, err);
}

int linux_load(const struct loader_request *req, const struct image *img, struct cpu *cpu,
               struct error *err)
{
    struct load_info info = load_info_begin(req);
    struct linux_kernel k = {0};
    gpa_t entry = 0, zero_page, pml4;
    int ret;

    ret = read_header(&k, img, err);
    if (!ret)
        ret = check_layout(&k, req, img, err);
    if (!ret)
        ret = check_cmdline(&k, req, err);
    k.hdr.ramdisk_image = 0;
    k.hdr.ramdisk_size = 0;
    if (!ret && req->initrd)
        ret = load_initrd(&k, req, err);
    if (!ret)
        ret = load_kernel(&k, req, img, &entry, err);
    if (!ret)
        ret = put_zero_page(&k, &info, &zero_page, err);
    if (!ret)
        ret = put_page_tables(&info, &pml4, err);
    if (!ret)
        ret = load_enter_flat(&info, LOAD_DESC_CODE64, cpu, err);
    if (ret)
        return ret;
    cpu->cr0 = CR0_PE | CR0_ET | CR0_PG;
    cpu->cr3 = pml4;
    cpu->cr4 = CR4_PAE;
    cpu->msr.efer = EFER_LME | EFER_LMA;
    cpu->gpr[RSI] = zero_page;
    cpu->gpr[GPR_RIP] = entry;
    return 0;
}
