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

enum {
    MEMORY_ROM = 1,  /* guest writes are dropped */
    MEMORY_FILE = 2, /* the bytes of a file of the user's, and no RAM: memory_add_file */
};

struct memory_slot {
    gpa_t gpa;
    u64 size;
    u8 *host; /* page-aligned: what the guest sees there */
    u32 flags;
    bool huge;     /* made of the host's reserved huge pages */
    u8 *backing;   /* the slot's own bytes, seen or not: memory_show */
    int fd;        /* the file that these are in, which others may map too; -1: none */
    u64 fd_offset; /* where in it */
};

struct memory_listener {
    /* Somebody other than a vCPU's own store wrote [gpa, gpa + len): inside one slot. Any thread. */
    void (*written)(void *opaque, gpa_t gpa, u64 len);
    void *opaque;
};

/* What the host is to do with guest memory. Not of use with a file, but for `locked`. */
struct memory_options {
    bool hugepages; /* pages of 2 MiB, which the host has reserved, where slots hold such */
    bool mergeable; /* pages with equal bytes may become one: Linux's KSM */
    bool locked;    /* all of it is there from the start, and stays in RAM */
};

struct guest_memory {
    struct memory_options options;              /* for the slots that are added from now on */
    struct memory_slot slots[MEMORY_MAX_SLOTS]; /* sorted by gpa */
    unsigned nslots;
    struct memory_listener listener; /* one: the engine's */
    bool in_file; /* slots are made of a file that can be mapped elsewhere too: memory_use_file */
    int fd;       /* that file, when in_file */
    u64 file_end; /* bytes of it in use */
};

/*
 * Has the slots that are added from now on be parts of one file. Before the first of them. `shared`: of one that other
 * processes may have (memory_share). 0 or -errno.
 */
int memory_use_file(struct guest_memory *m, bool shared, struct error *err);
/*
 * When all slots are there and before another process gets the file: that can't make the file smaller beneath us
 * then. 0, or -errno when the file isn't of that kind.
 */
int memory_share(struct guest_memory *m, struct error *err);
/* Allocates zeroed host memory for a slot. Pages cost nothing until touched, unless the options want it so. */
int memory_add_slot(struct guest_memory *m, gpa_t gpa, u64 size, u32 flags, struct error *err);
/*
 * A slot of a file's bytes, from its start on, with MEMORY_FILE among its flags: what the guest writes is in the file,
 * in time. With MEMORY_ROM the file may be open for reading only. The descriptor stays the caller's, and must be
 * open for as long as the slot is there.
 */
int memory_add_file(struct guest_memory *m, gpa_t gpa, u64 size, int fd, u32 flags,
                    struct error *err);
void memory_destroy(struct guest_memory *m);
/*
 * Has the slot at gpa show other bytes than its own (NULL: its own), which stay the caller's, and gives it these
 * flags. Returns whether that changed anything; the engine is to be told then. No vCPU may run.
 */
bool memory_show(struct guest_memory *m, gpa_t gpa, u8 *host, u32 flags);

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
/* Gives the host back what memory_dma found, whole pages: they read as zeroes then, which the caller tells. False:
 * they stay as they are. */
bool memory_discard(const struct guest_memory *m, void *host, u64 len);
/* How many bytes of it the host holds in RAM now. */
u64 memory_resident(const struct guest_memory *m);
/* 0, or -EFAULT when any byte is outside RAM (nothing is copied then). ROM may be written here. */
int memory_read(const struct guest_memory *m, gpa_t gpa, void *buf, u64 len);
int memory_write(struct guest_memory *m, gpa_t gpa, const void *buf, u64 len);

#endif
