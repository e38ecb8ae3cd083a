/*
 * Guest memory: the list of slots, and the one checked door to it.
 *
 * A slot maps guest-physical addresses to host memory. Slots don't overlap. Everything that reads or
 * writes guest memory outside an engine's own fast paths comes through memory_read and memory_write,
 * which bound every access, and tell listeners about writes (translated code, the dirty log).
 */
#ifndef DOPPEL_BUS_MEMORY_H
#define DOPPEL_BUS_MEMORY_H

#include "host/error.h"
#include "host/types.h"

#define GUEST_PAGE_SHIFT 12
#define GUEST_PAGE_SIZE (1ULL << GUEST_PAGE_SHIFT)
#define MEMORY_MAX_SLOTS 32

enum { MEMORY_ROM = 1 }; /* guest writes are dropped */

struct memory_slot {
    gpa_t gpa;
    u64 size;
    u8 *host; /* page-aligned */
    u32 flags;
};

struct memory_listener {
    /* Somebody other than a vCPU's own store wrote [gpa, gpa + len): inside one slot. Any thread. */
    void (*written)(void *opaque, gpa_t gpa, u64 len);
    void *opaque;
};

struct guest_memory {
    struct memory_slot slots[MEMORY_MAX_SLOTS]; /* sorted by gpa */
    unsigned nslots;
    struct memory_listener listener; /* one: the engine's */
};

/* Allocates zeroed host memory for a slot (MAP_NORESERVE, so pages cost nothing until touched). */
int memory_add_slot(struct guest_memory *m, gpa_t gpa, u64 size, u32 flags, struct error *err);
void memory_destroy(struct guest_memory *m);

/* The slot that holds gpa, or NULL. */
const struct memory_slot *memory_find(const struct guest_memory *m, gpa_t gpa);

/* Host pointer for [gpa, gpa + len) when all of it is in one slot, else NULL. For reading only. */
void *memory_host(const struct guest_memory *m, gpa_t gpa, u64 len);

/*
 * For DMA: the host's bytes of as much of [gpa, gpa + *len) as lies in one slot, and *len becomes that. NULL
 * when there is no memory at gpa, or it is ROM and the device wants to write. What was written is told by
 * memory_tell_written, afterwards.
 */
void *memory_dma(const struct guest_memory *m, gpa_t gpa, u64 *len, bool write);
void memory_tell_written(const struct guest_memory *m, gpa_t gpa, u64 len);
/* 0, or -EFAULT when any byte is outside RAM (nothing is copied then). ROM may be written here. */
int memory_read(const struct guest_memory *m, gpa_t gpa, void *buf, u64 len);
int memory_write(struct guest_memory *m, gpa_t gpa, const void *buf, u64 len);

#endif
