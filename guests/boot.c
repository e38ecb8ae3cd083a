/*
 * What the loader hands over, by PVH (Xen, public/arch-x86/hvm/start_info.h) and by multiboot 1
 * (Multiboot Specification 0.6.96, sections 3.2 and 3.3). tests/guest/protocols.py starts it with
 * 64 MiB, a command line, and the modules that are described here.
 */
#include "guest.h"

#define MEMORY (64u << 20)
/* The BIOS's and the video memory's hole, and the firmware's tables. */
#define MEMORY_RESERVED (1u << 20)
#define COMMAND_LINE "alpha  beta=\"c d\" -- omega"

#define MULTIBOOT_MAGIC 0x2badb002
#define HVM_START_MAGIC 0x336ec578
#define RAM 1

struct hvm_start_info {
    u32 magic, version, flags, nr_modules;
    u64 modlist_paddr, cmdline_paddr, rsdp_paddr, memmap_paddr;
    u32 memmap_entries, reserved;
};
struct hvm_modlist_entry {
    u64 paddr, size, cmdline_paddr, reserved;
};
struct hvm_memmap_entry {
    u64 addr, size;
    u32 type, reserved;
};

#define INFO_MEMORY BIT(0)
#define INFO_CMDLINE BIT(2)
#define INFO_MODULES BIT(3)
#define INFO_MMAP BIT(6)
#define INFO_LOADER_NAME BIT(9)

struct multiboot_info {
    u32 flags, mem_lower, mem_upper, boot_device, cmdline, mods_count, mods_addr, syms[4];
    u32 mmap_length, mmap_addr, drives_length, drives_addr, config_table, boot_loader_name;
};
struct multiboot_module {
    u32 start, end, string, reserved;
};
struct multiboot_mmap_entry {
    u32 size;
    u64 base, length;
    u32 type;
} __attribute__((packed));

/* Each module's size, and the arguments behind its file's name. */
static const struct module {
    u32 size;
    const char *arguments;
} modules[] = {{5000, "one  two"}, {3, "a,b"}};

static u32 length(const char *text)
{
    u32 n = 0;

    while (text[n])
        n++;
    return n;
}

static bool same(const char *a, const char *b)
{
    return length(a) == length(b) && !memcmp(a, b, length(a));
}

/* Whether `text` is a file's name that ends in `name`, a space, and `rest`. */
static bool is_file_and(const char *text, const char *name, const char *rest)
{
    u32 n = length(text), name_len = length(name), rest_len = length(rest);

    return n > name_len + 1 + rest_len && same(text + n - rest_len, rest) &&
           text[n - rest_len - 1] == ' ' &&
           !memcmp(text + n - rest_len - 1 - name_len, name, name_len);
}

/* Byte i of module m is 7 i + m + 1, as protocols.py writes it. */
static bool content_is(u32 module, const u8 *bytes, u32 size)
{
    for (u32 i = 0; i < size; i++) {
        if (bytes[i] != (u8)(7 * i + module + 1))
            return false;
    }
    return true;
}

/* The memory map, told entry by entry and then judged. */
static struct {
    u64 end, ram;
    bool sorted, kernel_in_ram;
} map = {.sorted = true};

static void map_add(u64 base, u64 size, u32 type)
{
    extern const u8 multiboot_header[], bss_end[];

    if (!size || base < map.end || base + size < base)
        map.sorted = false;
    map.end = base + size;
    if (type != RAM)
        return;
    map.ram += size;
    if (base <= (word)multiboot_header && base + size >= (word)bss_end)
        map.kernel_in_ram = true;
}

static void check_map(void)
{
    check("map-sorted", map.sorted);
    check("map-ram", map.ram <= MEMORY && map.ram >= MEMORY - MEMORY_RESERVED);
    check("map-has-kernel", map.kernel_in_ram);
}

static void check_entry(void)
{
    check_equal("entry-cr0", boot_entry.cr0 & (CR0_PE | CR0_PG), CR0_PE);
    check_equal("entry-flags", boot_entry.flags & (FLAG_IF | FLAG_VM | FLAG_TF), 0);
    check_equal("entry-es", boot_entry.by_es, boot_entry.eax);
}

/* Odd megabytes are there only with the A20 line on. */
static void check_a20(void)
{
    volatile u32 *odd = (volatile u32 *)0x500000, *even = (volatile u32 *)0x400000;
    u32 odd_was = *odd, even_was = *even;

    *even = 1;
    *odd = 2;
    check_equal("a20", *even, 1);
    *even = even_was;
    *odd = odd_was;
}

static void check_pvh_module(const struct hvm_start_info *si)
{
    const struct hvm_modlist_entry *m = (const void *)(word)si->modlist_paddr;

    check_equal("modules", si->nr_modules, 1);
    if (si->nr_modules != 1)
        return;
    check_equal("module-size", m->size, modules[0].size);
    check_equal("module-page", m->paddr & 4095, 0);
    check("module-content", content_is(0, (const u8 *)(word)m->paddr, modules[0].size));
    check_equal("module-command-line", m->cmdline_paddr, 0);
    check_equal("module-reserved", m->reserved, 0);
}

static void check_pvh(void)
{
    const struct hvm_start_info *si = (const void *)boot_entry.ebx;
    const struct hvm_memmap_entry *e = (const void *)(word)si->memmap_paddr;

    check_equal("magic", si->magic, HVM_START_MAGIC);
    check_equal("version", si->version, 1);
    check_equal("flags", si->flags, 0);
    check_equal("reserved", si->reserved, 0);
    check("command-line", same((const char *)(word)si->cmdline_paddr, COMMAND_LINE));
    check("rsdp", si->rsdp_paddr && !memcmp((const void *)(word)si->rsdp_paddr, "RSD PTR ", 8));
    for (u32 i = 0; i < si->memmap_entries; i++)
        map_add(e[i].addr, e[i].size, e[i].type);
    check_map();
    check_pvh_module(si);
}

static void check_multiboot_modules(const struct multiboot_info *info)
{
    static const char *const groups[] = {"first-", "second-"}, *const names[] = {"first", "second"};
    const struct multiboot_module *m = (const void *)info->mods_addr;

    check_equal("modules", info->mods_count, ARRAY_SIZE(modules));
    for (u32 i = 0; i < ARRAY_SIZE(modules) && i < info->mods_count; i++) {
        check_group = groups[i];
        check_equal("size", m[i].end - m[i].start, modules[i].size);
        check_equal("page", m[i].start & 4095, 0);
        check("content", content_is(i, (const u8 *)m[i].start, modules[i].size));
        check("string", is_file_and((const char *)m[i].string, names[i], modules[i].arguments));
    }
    check_group = "";
}

static void check_multiboot(void)
{
    const struct multiboot_info *info = (const void *)boot_entry.ebx;
    u32 want = INFO_MEMORY | INFO_CMDLINE | INFO_MODULES | INFO_MMAP | INFO_LOADER_NAME;
    const char *loader = (const char *)info->boot_loader_name;

    check_equal("flags", info->flags & want, want);
    check_equal("entry-fs", boot_entry.by_fs, boot_entry.eax);
    check_equal("entry-gs", boot_entry.by_gs, boot_entry.eax);
    check("mem-lower", info->mem_lower >= 600 && info->mem_lower <= 640);
    check("mem-upper", info->mem_upper <= (MEMORY >> 10) - 1024 &&
                           info->mem_upper >= ((MEMORY - MEMORY_RESERVED) >> 10) - 1024);
    check("command-line", is_file_and((const char *)info->cmdline, "32.elf", COMMAND_LINE) ||
                              is_file_and((const char *)info->cmdline, "32.bin", COMMAND_LINE));
    check("loader-name", same(loader, on_tcg() ? "qemu" : "doppel"));
    for (u32 at = 0; at < info->mmap_length;) {
        const struct multiboot_mmap_entry *e = (const void *)(info->mmap_addr + at);

        map_add(e->base, e->length, e->type);
        at += e->size + sizeof(e->size);
    }
    check_map();
    check_multiboot_modules(info);
}

void guest_main(void)
{
    bool multiboot = boot_entry.eax == MULTIBOOT_MAGIC;

    print(multiboot ? "entered by multiboot\n" : "entered by PVH\n");
    check_entry();
    check_a20();
    if (multiboot)
        check_multiboot();
    else
        check_pvh();
}
