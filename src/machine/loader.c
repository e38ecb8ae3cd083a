#include "machine/loader.h"

#include "machine/elf.h"
#include "machine/image.h"
#include "machine/load.h"

#include <errno.h>
#include <string.h>

/* Every kind of image shows in its first bytes; a multiboot header lies in the first 8 KiB. */
#define HEAD_SIZE 8192

int load_info_put(struct load_info *info, const void *data, u64 len, u64 align, gpa_t *gpa,
                  struct error *err)
{
    gpa_t at = (info->next + align - 1) & ~(align - 1);

    if (at > LOAD_INFO_END || len > LOAD_INFO_END - at)
        return error_input(err,
                           "'%s': command line and modules need more than the %llu KiB there are "
                           "for boot information; shorten --append or --initrd",
                           info->req->kernel, (LOAD_INFO_END - LOAD_INFO_BASE) >> 10);
    if (memory_write(info->req->memory, at, data, len) < 0)
        return error_input(err, "too little memory to boot '%s'; give more with --memory",
                           info->req->kernel);
    info->next = at + len;
    *gpa = at;
    return 0;
}

bool load_is_ram(const struct loader_request *req, gpa_t gpa, u64 len)
{
    const struct memory_slot *slot = memory_find(req->memory, gpa);

    if (!slot || slot->flags & MEMORY_ROM || !len || len > slot->size - (gpa - slot->gpa))
        return false;
    for (unsigned i = 0; i < req->e820->count; i++) {
        const struct e820_entry *e = &req->e820->entries[i];

        if (e->type == E820_RAM && gpa >= e->base && gpa - e->base < e->size)
            return len <= e->size - (gpa - e->base);
    }
    return false;
}

bool load_meets_info(gpa_t gpa, u64 len)
{
    return gpa < LOAD_INFO_END && (gpa >= LOAD_INFO_BASE || len > LOAD_INFO_BASE - gpa);
}

/* The part of a RAM entry inside [floor, ceiling), in whole pages; false when nothing is left. */
static bool usable_part(const struct e820_entry *e, gpa_t floor, gpa_t ceiling, gpa_t *lo,
                        gpa_t *hi)
{
    if (e->type != E820_RAM)
        return false;
    *lo = (MAX(e->base, floor) + GUEST_PAGE_SIZE - 1) & ~(GUEST_PAGE_SIZE - 1);
    *hi = MIN(e->base + e->size, ceiling) & ~(GUEST_PAGE_SIZE - 1);
    return *lo < *hi;
}

bool load_place_high(const struct loader_request *req, u64 len, gpa_t floor, gpa_t ceiling,
                     gpa_t *gpa)
{
    gpa_t lo, hi;

    for (unsigned i = req->e820->count; i-- > 0;) {
        if (!usable_part(&req->e820->entries[i], floor, ceiling, &lo, &hi) || hi - lo < len)
            continue;
        *gpa = (hi - len) & ~(GUEST_PAGE_SIZE - 1);
        if (load_is_ram(req, *gpa, len))
            return true;
    }
    return false;
}

bool load_place_low(const struct loader_request *req, u64 len, gpa_t floor, gpa_t ceiling,
                    gpa_t *gpa)
{
    gpa_t lo, hi;

    for (unsigned i = 0; i < req->e820->count; i++) {
        if (!usable_part(&req->e820->entries[i], floor, ceiling, &lo, &hi) || hi - lo < len)
            continue;
        *gpa = lo;
        if (load_is_ram(req, lo, len))
            return true;
    }
    return false;
}

void load_zero(const struct loader_request *req, gpa_t gpa, u64 len)
{
    static const u8 zeros[GUEST_PAGE_SIZE];

    while (len) {
        u64 n = MIN(len, GUEST_PAGE_SIZE - (gpa & (GUEST_PAGE_SIZE - 1)));
        const void *host = memory_host(req->memory, gpa, n);

        if (host && memcmp(host, zeros, n))
            memory_write(req->memory, gpa, zeros, n);
        gpa += n;
        len -= n;
    }
}

unsigned long long load_mib(u64 bytes)
{
    return (bytes >> 20) + ((bytes & (MIB(1) - 1)) != 0);
}

static void load_segment(struct segment *s, u16 selector, u64 descriptor)
{
    *s = (struct segment){
        .base = descriptor_base(descriptor),
        .limit = descriptor_limit(descriptor),
        .attr = descriptor_attr(descriptor),
        .selector = selector,
    };
}

int load_enter_flat(struct load_info *info, u64 code_descriptor, struct cpu *cpu, struct error *err)
{
    const u64 gdt[] = {
        [LOAD_SEL_CODE / 8] = code_descriptor,
        [LOAD_SEL_DATA / 8] = LOAD_DESC_DATA,
    };
    gpa_t at;
    int ret = load_info_put(info, gdt, sizeof(gdt), 8, &at, err);

    if (ret)
        return ret;
    memset(cpu->gpr, 0, sizeof(cpu->gpr));
    cpu->rflags = EFLAGS_FIXED;
    cpu->gdtr = (struct descriptor_table){.base = at, .limit = sizeof(gdt) - 1};
    cpu->idtr = (struct descriptor_table){0};
    for (int i = 0; i < SEG_COUNT; i++)
        load_segment(&cpu->seg[i], LOAD_SEL_DATA, LOAD_DESC_DATA);
    load_segment(&cpu->seg[SEG_CS], LOAD_SEL_CODE, code_descriptor);
    cpu->ldtr = (struct segment){.attr = SEG_ATTR_UNUSABLE};
    /* A busy TSS of the least size, though nothing is in it: what the PVH ABI asks for, and what
     * hardware virtualisation wants to see in TR. */
    cpu->tr = (struct segment){.limit = 0x67, .attr = SEG_ATTR_P | SYSSEG_TSS32_BUSY};
    return 0;
}

int load_enter_protected(struct load_info *info, gpa_t entry, gpa_t argument, struct cpu *cpu,
                         struct error *err)
{
    int ret = load_enter_flat(info, LOAD_DESC_CODE32, cpu, err);

    if (ret)
        return ret;
    cpu->cr0 = CR0_PE | CR0_ET;
    cpu->cr3 = 0;
    cpu->cr4 = 0;
    cpu->msr.efer = 0;
    cpu->gpr[RBX] = argument;
    cpu->gpr[GPR_RIP] = entry;
    return 0;
}

static int load_elf_or_multiboot(const struct loader_request *req, const struct image *img,
                                 const u8 *head, size_t len, struct cpu *cpu, struct error *err)
{
    int multiboot = multiboot_find(head, len);
    gpa_t entry;
    int pvh = 0;

    if (elf_is_image(head, len)) {
        pvh = pvh_find_entry(img, &entry, err);
        if (pvh > 0)
            return pvh_load(req, img, entry, cpu, err);
    }
    if (multiboot >= 0)
        return multiboot_load(req, img, (u32)multiboot, cpu, err);
    if (pvh < 0)
        return pvh;
    if (elf_is_image(head, len))
        return error_input(err,
                           "'%s' is an ELF file with neither a PVH note nor a multiboot header; "
                           "give a bzImage (vmlinuz), or build the kernel with CONFIG_PVH=y",
                           img->path);
    return error_input(err,
                       "'%s' is not a kernel; give a Linux bzImage (vmlinuz), an ELF file with a "
                       "PVH note, or a multiboot image",
                       img->path);
}

int loader_load(const struct loader_request *req, struct cpu *cpu, struct error *err)
{
    u8 head[HEAD_SIZE];
    struct image img;
    size_t len;
    int ret = image_open(&img, req->kernel, err);

    if (ret)
        return ret;
    len = MIN(img.size, sizeof(head));
    ret = image_read(&img, 0, head, len, err);
    if (!ret) {
        if (linux_is_image(head, len))
            ret = linux_load(req, &img, cpu, err);
        else
            ret = load_elf_or_multiboot(req, &img, head, len, cpu, err);
    }
    image_close(&img);
    return ret;
}
