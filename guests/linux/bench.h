/*
 * The Linux program that bench/bt runs natively and in its guests: small benchmarks, each a kind of
 * work that real programs are made of. It is static, so the same bytes run everywhere.
 *
 * Rules for a benchmark:
 *  1. run() does one unit of work, the same at every call, and returns a checksum of its results. A
 *     unit takes 0.1 to 2 ms on the processor itself: long against the clock, short enough to be
 *     repeated under an interpreter.
 *  2. The checksum doesn't depend on time, addresses, process numbers or the processor's model, so
 *     that any two machines that compute the same agree on it.
 *  3. begin() and end(), where there are any, prepare and clean up, and aren't measured.
 */
#ifndef BENCH_H
#define BENCH_H

#include <stddef.h>
#include <stdint.h>

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;
typedef int32_t s32;

struct benchmark {
    const char *name;
    u64 (*run)(void);
    unsigned operations; /* in one run(): the time told is that of one; 0 is taken as 1 */
    void (*begin)(void);
    void (*end)(void);
    int (*possible)(void); /* where not every processor can do it */
};

/* Each list ends with an entry without a name. */
extern const struct benchmark compute_benchmarks[]; /* integer code */
extern const struct benchmark float_benchmarks[];   /* floating point and SIMD */
extern const struct benchmark corner_benchmarks[];  /* not to be measured: see corners.c */
extern const struct benchmark sharing_benchmarks[]; /* nor these: sharing.c */
extern const struct benchmark
    system_benchmarks[]; /* the kernel's work, asked for by system calls */

/* Tells on stderr what went wrong, with errno's text where it is set, and ends the program. */
void die(const char *what) __attribute__((noreturn));

/* Keeps the compiler from seeing through a value: no constant folding, no hoisting. */
#define OPAQUE(x) __asm__ volatile("" : "+r"(x))

#define ARRAY_SIZE(a) (sizeof(a) / sizeof((a)[0]))

/* Marsaglia's xorshift generator of 32 bits (Journal of Statistical Software 8(14), 2003). */
static inline u32 random_next(u32 *state)
{
    u32 x = *state;

    x ^= x << 13;
    x ^= x >> 17;
    x ^= x << 5;
    return *state = x;
}

static inline u64 mix(u64 sum, u64 value)
{
    return (sum ^ value) * 0x9e3779b97f4a7c15u;
}

/* text.c: TEXT_BYTES of words in lines, the same at every call, with a NUL behind. */
#define TEXT_BYTES (96 * 1024)
const char *text(void);

/* crc.c: the CRC-32 of Ethernet and gzip, a byte at a time, by table. */
u32 crc32(const void *data, size_t size);

/* compress.c: LZ77 and Huffman codes. */
u64 run_compress(void);
u64 run_decompress(void);

/* sha256.c: of `size` bytes; the first 8 of its 32. */
u64 sha256(const void *data, size_t size);

#endif
