/*
 * The file behind guest memory that is mapped more than once: by the translator at the guest's own addresses,
 * by a backend in another process. Translated code has such a file, too.
 */
#ifndef DOPPEL_BUS_MEMORY_FILE_H
#define DOPPEL_BUS_MEMORY_FILE_H

#include "host/error.h"
#include "host/types.h"

#define HUGE_PAGE MIB(2)

/*
 * An empty file without a name, of huge pages where the host has some for files; `sealable`: one that
 * memory_file_seal can fix. Returns its descriptor, the caller's to close, or -1, err set.
 */
int memory_file_open(bool sealable, struct error *err);

/* Fixes the file's size, whoever else has it: any number of times. 0 or -errno. */
int memory_file_seal(int fd, struct error *err);

/*
 * Address space for `size` bytes, with nothing in it, congruent to gpa modulo 2 MiB: only so can huge pages serve,
 * here and in the tables of KVM. NULL: there is none.
 */
u8 *memory_reserve(gpa_t gpa, u64 size);

/*
 * Maps [offset, offset + size) of the file, shared, at a host address congruent to the offset modulo 2 MiB. Returns
 * it, for munmap, or NULL and errno.
 */
u8 *memory_file_map(int fd, u64 offset, u64 size, int prot);

/*
 * Appends `size` bytes to the file, which is *end bytes long, and maps them, file offset and host address
 * congruent to gpa modulo 2 MiB, so that huge pages serve. Returns the mapping, with its file offset in *offset
 * and *end moved, or NULL, err set.
 */
u8 *memory_file_add(int fd, u64 *end, gpa_t gpa, u64 size, u64 *offset, struct error *err);

#endif
