#include "machine/memory_map.h"

#include "block/block.h"
#include "machine/layout.h"

#include <errno.h>
#include <sys/sysinfo.h>

/* RAM and swap of the host in bytes; 0 when it won't say. */
static u64 host_memory(void)
{
    struct sysinfo info;

    if (sysinfo(&info))
        return 0;
    return ((u64)info.totalram + info.totalswap) * info.mem_unit;
}

static int check_size(u64 size, struct error *err)
{
    u64 host = host_memory();

    if (size < MEMORY_SIZE_MIN)
        return error_input(err, "a machine with %llu KiB of memory can't start: give 1M or more",
                           (unsigned long long)(size >> 10));
    if (size % GUEST_PAGE_SIZE)
        return error_input(err, "memory comes in pages of 4 KiB: give a multiple of 4K");
    if (host && size > host)
        return error_input(err,
                           "this host has %llu MiB of memory and swap, not %llu MiB: give less",
                           (unsigned long long)(host >> 20), (unsigned long long)(size >> 20));
    return 0;
}

static int add_high(struct guest_memory *memory, u64 size, u64 low_end, struct error *err)
{
    return size > low_end ? memory_add_slot(memory, LAYOUT_HIGH_RAM_BASE, size - low_end, 0, err)
                          : 0;
}

int memory_map_build(struct guest_memory *memory, u64 size, struct error *err)
{
    u64 low_end = MIN(size, LAYOUT_LOW_RAM_END);
    int ret = check_size(size, err);

    if (!ret)
        ret = memory_add_slot(memory, 0, LAYOUT_VGA_BASE, 0, err);
    if (!ret)
        ret = memory_add_slot(memory, LAYOUT_VGA_END, low_end - LAYOUT_VGA_END, 0, err);
    if (!ret)
        ret = add_high(memory, size, low_end, err);
    return ret;
}

int memory_map_build_firmware(struct guest_memory *memory, u64 size, u64 rom_size,
                              struct error *err)
{
    const u64 piece = KIB(16), last = LAYOUT_SHADOW_END - KIB(64);
    u64 low_end = MIN(size, LAYOUT_LOW_RAM_END);
    int ret = check_size(size, err);

    if (!ret)
        ret = memory_add_slot(memory, 0, LAYOUT_VGA_BASE, 0, err);
    for (gpa_t at = LAYOUT_SHADOW_BASE; !ret && at < last; at += piece)
        ret = memory_add_slot(memory, at, piece, 0, err);
    if (!ret)
        ret = memory_add_slot(memory, last, LAYOUT_SHADOW_END - last, 0, err);
    if (!ret && low_end > LAYOUT_SHADOW_END)
        ret = memory_add_slot(memory, LAYOUT_SHADOW_END, low_end - LAYOUT_SHADOW_END, 0, err);
    if (!ret)
        ret = add_high(memory, size, low_end, err);
    if (!ret)
        ret = memory_add_slot(memory, LAYOUT_ROM_END - rom_size, rom_size, MEMORY_ROM, err);
    return ret;
}

gpa_t memory_map_end(const struct guest_memory *memory)
{
    const struct memory_slot *last = &memory->slots[memory->nslots - 1];

    return MAX(LAYOUT_HIGH_RAM_BASE, last->gpa + last->size);
}

static int add_pmem(struct guest_memory *memory, const struct block_backend *backend, u64 limit,
                    struct error *err)
{
    gpa_t at = (memory_map_end(memory) + LAYOUT_PMEM_ALIGN - 1) & ~(LAYOUT_PMEM_ALIGN - 1);
    u64 size = block_size(backend);

    if (!size || size % LAYOUT_PMEM_UNIT)
        return error_input(err, "%s: memory is of a multiple of 2 MiB, not %llu bytes",
                           block_path(backend), (unsigned long long)size);
    if (at > limit || size > limit - at)
        return error_input(err, "%s: %llu MiB are more than the processor can address",
                           block_path(backend), (unsigned long long)(size >> 20));
    return memory_add_file(memory, at, size, block_fd(backend),
                           block_is_read_only(backend) ? MEMORY_ROM : 0, err);
}

int memory_map_add_pmems(struct guest_memory *memory, const struct machine_pmems *pmems, u64 limit,
                         struct error *err)
{
    int ret = 0;

    for (unsigned i = 0; pmems && i < pmems->count && !ret; i++)
        ret = add_pmem(memory, pmems->backend[i], limit, err);
    return ret;
}

const struct memory_slot *memory_map_pmem(const struct guest_memory *memory, unsigned n)
{
    for (unsigned i = 0; i < memory->nslots; i++) {
        if ((memory->slots[i].flags & MEMORY_FILE) && n-- == 0)
            return &memory->slots[i];
    }
    return NULL;
}

static void add(struct e820_map *map, u64 base, u64 end, u32 type)
{
    if (base < end)
        map->entries[map->count++] = (struct e820_entry){base, end - base, type};
}

void memory_map_e820(const struct guest_memory *memory, struct e820_map *map)
{
    map->count = 0;
    add(map, 0, LAYOUT_EBDA_BASE, E820_RAM);
    add(map, LAYOUT_EBDA_BASE, LAYOUT_VGA_BASE, E820_RESERVED);
    add(map, LAYOUT_ACPI_BASE, LAYOUT_ACPI_END, E820_RESERVED);
    /* The first slot is the one below 640 KiB; what the others hold below 1 MiB is the firmware's. */
    for (unsigned i = 1; i < memory->nslots; i++) {
        const struct memory_slot *slot = &memory->slots[i];

        if (slot->gpa < LAYOUT_HIGH_RAM_BASE)
            add(map, MAX(slot->gpa, LAYOUT_ACPI_END), slot->gpa + slot->size, E820_RAM);
    }
    add(map, LAYOUT_ECAM_BASE, LAYOUT_MMIO32_BASE, E820_RESERVED);
    for (unsigned i = 1; i < memory->nslots; i++) {
        const struct memory_slot *slot = &memory->slots[i];

        if (slot->gpa >= LAYOUT_HIGH_RAM_BASE)
            add(map, slot->gpa, slot->gpa + slot->size, E820_RAM);
    }
}

void memory_map_e820_firmware(u64 size, struct e820_map *map)
{
    u64 low_end = MIN(size, LAYOUT_LOW_RAM_END);

    map->count = 0;
    add(map, 0, low_end, E820_RAM);
    add(map, LAYOUT_HIGH_RAM_BASE, LAYOUT_HIGH_RAM_BASE + (size - low_end), E820_RAM);
}
