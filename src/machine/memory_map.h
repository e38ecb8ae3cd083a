/*
 * The guest's memory: RAM by machine/layout.h, and the map that the guest is told.
 */
#ifndef DOPPEL_MACHINE_MEMORY_MAP_H
#define DOPPEL_MACHINE_MEMORY_MAP_H

#include "bus/memory.h"
#include "host/error.h"
#include "machine/cards.h"
#include "machine/loader.h"

#define MEMORY_SIZE_MIN MIB(1)

/*
 * Adds the RAM slots of a machine with `size` bytes: up to 640 KiB, from LAYOUT_VGA_END to
 * LAYOUT_LOW_RAM_END, and what is left from 4 GiB on. As on a PC, the hole between the first two is
 * counted in the size. ERROR_INPUT for a size that is no multiple of a page, less than
 * MEMORY_SIZE_MIN or more than the host has.
 */
int memory_map_build(struct guest_memory *memory, u64 size, struct error *err);

/*
 * Slots for files as memory, behind all else, below `limit`; not in the E820 map, which is made without them. Their
 * devices tell the guest. memory_map_pmem has the nth. 0, or -errno with err set.
 */
int memory_map_add_pmems(struct guest_memory *memory, const struct machine_pmems *pmems, u64 limit,
                         struct error *err);
const struct memory_slot *memory_map_pmem(const struct guest_memory *memory, unsigned n);
/* Where the last slot ends, 4 GiB at least. */
gpa_t memory_map_end(const struct guest_memory *memory);

/* The same as E820h entries, with the EBDA, the firmware area and the ECAM window reserved. */
void memory_map_e820(const struct guest_memory *memory, struct e820_map *map);

/*
 * With firmware: the same RAM, in which each piece of [0xc0000, 0x100000) that the host bridge can hand to the ROM is
 * a slot, and a ROM of rom_size bytes that ends at 4 GiB. What firmware is told is RAM, all of it from 0 on.
 */
int memory_map_build_firmware(struct guest_memory *memory, u64 size, u64 rom_size,
                              struct error *err);
void memory_map_e820_firmware(u64 size, struct e820_map *map);

#endif
