/*
 * User code whose pages the kernel remaps, for engines that map them somewhere at addresses of their own. Accesses
 * reach from a base in one 2 MiB of addresses into the next, whose translations changed by themselves: after a page
 * of theirs was flushed, and after they met a fault before that.
 */
#include "guest.h"

#define USED 0x67ULL /* present, writable, user, accessed, dirty */
#define CHUNK (1ULL << 21)
#define FIRST ((1ULL << 39) + (1ULL << 30) + CHUNK)
#define SECOND (FIRST + CHUNK)
#define MISSING (SECOND + 4096)
/* A base in the first, and the same word of the second's first page from there and from its start. */
#define BASE (SECOND - 0x800)
#define FROM_BASE "0x1000"
#define FROM_START "0x800"
#define RUNS 100

extern u64 boot_pml4[512];
static u64 pdpt[512] __attribute__((aligned(4096)));
static u64 pd[512] __attribute__((aligned(4096)));
static u64 first_table[512] __attribute__((aligned(4096)));
static u64 second_table[512] __attribute__((aligned(4096)));
static u64 frames[3][512] __attribute__((aligned(4096)));
static u64 sum;

static void map_frame(unsigned n)
{
    second_table[0] = (word)frames[n] | USED;
    __asm__ volatile("invlpg (%0)" : : "r"(SECOND) : "memory");
}

static void map(void)
{
    boot_pml4[1] = (word)pdpt | USED;
    pdpt[1] = (word)pd | USED;
    pd[1] = (word)first_table | USED;
    pd[2] = (word)second_table | USED;
    for (unsigned n = 0; n < 3; n++)
        frames[n][0x800 / 8] = n + 1;
    map_frame(0);
    set_cr3(cr3());
}

/* What the user's functions do RUNS times, so that they are translated. */
static void read_from_base(void)
{
    sum = 0;
    for (unsigned n = 0; n < RUNS; n++)
        __asm__ volatile("add " FROM_BASE "(%1), %0" : "+r"(sum) : "r"(BASE) : "memory");
}

static void write_from_base(void)
{
    for (unsigned n = 0; n < RUNS; n++)
        __asm__ volatile("movq $9, " FROM_BASE "(%0)" : : "r"(BASE) : "memory");
}

static void read_from_start(void)
{
    sum = 0;
    for (unsigned n = 0; n < RUNS; n++)
        __asm__ volatile("add " FROM_START "(%1), %0" : "+r"(sum) : "r"(SECOND) : "memory");
}

static void read_missing(void)
{
    for (unsigned n = 0; n < RUNS; n++)
        TRY("mov (%0), %%rax", : : "r"(MISSING) : "rax", "memory");
}

static void check_reads(const char *name, void (*fn)(void), u64 frame)
{
    run_user(fn, 0);
    check_equal(name, sum, RUNS * (frame + 1));
}

void guest_main(void)
{
    map();
    check_reads("read-second", read_from_start, 0);
    check_reads("read-from-first", read_from_base, 0);
    map_frame(1);
    check_reads("flushed-page-read-from-first", read_from_base, 1);
    check_reads("flushed-page-read-second", read_from_start, 1);

    run_user(read_missing, 0);
    check_equal("fault", (u64)(long long)trap.vector, PF);
    map_frame(2);
    check_reads("flushed-after-fault-read-from-first", read_from_base, 2);
    run_user(read_missing, 0);
    map_frame(0);
    run_user(write_from_base, 0);
    check_equal("flushed-after-fault-written", frames[0][0x800 / 8], 9);
    check_equal("flushed-after-fault-not-written", frames[2][0x800 / 8], 3);
}
