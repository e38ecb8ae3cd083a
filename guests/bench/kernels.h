/*
 * The kernels of bench/bochs: small programs, each a kind of code that real guests are made of.
 *
 * A table of them is run by guest.c on the bare machine and by native.c under Linux, which see the
 * same object file. run(n) does n units of work and returns a checksum, which must be the same
 * everywhere. The system kernels, which need the bare machine, are in guest.c.
 */
#ifndef BENCH_KERNELS_H
#define BENCH_KERNELS_H

typedef unsigned char u8;
typedef unsigned int u32;
typedef unsigned long long u64;

struct kernel {
    const char *name;
    u64 (*run)(unsigned n);
    unsigned n;
};

extern const struct kernel kernels[];
extern const unsigned kernel_count;

/* Fills the buffers that several kernels share. */
void kernels_prepare(void);

#endif
