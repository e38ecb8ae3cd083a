/*
 * Code that changes code: its next instruction, its own block, an instruction across two pages, a
 * loop that patches itself each time; by REP MOVS and STOS, LOCK, PUSH, and another address of the
 * page; and data that is written all the time beside code. Built for 32 and 64 bits.
 *
 * Intel SDM vol. 3, 11.6: on the same processor and linear address a store is seen by the next
 * fetch; by another linear address, after a jump that serializes (CPUID here).
 */
#include "guest.h"

static u8 page[8192] __attribute__((aligned(4096)));

typedef u32 (*function)(void);

/* mov $value, %eax; ret */
static void write_function(u8 *at, u32 value)
{
    at[0] = 0xb8;
    memcpy(at + 1, &value, 4);
    at[5] = 0xc3;
}

/* A PUSH onto code that ran; then the code again. */
static u32 push_over(u8 *at, u32 value)
{
    word first = 0xb8 | (word)value << 8, result;

    write_function(at + 1, 0); /* the first byte of what is pushed comes to `at` */
    at[0] = 0x90;
    ((function)(word)at)();
    /* B8 and three bytes of the number, over NOP, B8 and the start of the old one. */
    __asm__ volatile("mov " REG_SP ", %0; mov %1, " REG_SP "; push %2; mov %0, " REG_SP
                     : "=&r"(result)
                     : "r"(at + sizeof(word)), "r"(first)
                     : "memory");
    at[5] = 0xc3;
    return ((function)(word)at)();
}

/* Stores to the same page, between and by its code: a counter beside the function that counts. */
static void hot_data(void)
{
    /* incl (di); movl (di), eax; ret */
    static const u8 count_up[] = {0xff, 0x07, 0x8b, 0x07, 0xc3};
    volatile u32 *counter = (volatile u32 *)(page + 2048);
    u32 result = 0;

    memcpy(page + 2000, count_up, sizeof(count_up));
    *counter = 0;
    for (unsigned i = 0; i < 20000; i++)
        __asm__ volatile("call *%2"
                         : "=a"(result)
                         : "D"(counter), "r"(page + 2000)
                         : "memory", "cc");
    check_equal("hot-data-beside-code", result, 20000);
    page[2000 + 1] = 0x0f; /* decl (di) */
    __asm__ volatile("call *%2" : "=a"(result) : "D"(counter), "r"(page + 2000) : "memory", "cc");
    check_equal("hot-code-changed", result, 19999);
}

#ifdef __x86_64__
extern u64 boot_pml4[];
#define ALIAS 0x4000000UL
static u64 table[512] __attribute__((aligned(4096)));

/* The page at a second linear address: written by one, run by the other. */
static void alias(void)
{
    u64 *pdpt = (u64 *)(boot_pml4[0] & ~0xfffULL), *pd = (u64 *)(pdpt[0] & ~0xfffULL);
    u8 *twin = (u8 *)ALIAS;

    table[0] = (word)page | 3;
    pd[ALIAS >> 21] = (word)table | 3;
    set_cr3(cr3());
    write_function(page, 1);
    check_equal("alias-runs", ((function)(word)twin)(), 1);
    check_equal("alias-original", ((function)(word)page)(), 1);
    twin[1] = 2;
    cpuid(0, 0);
    check_equal("alias-written-original-runs", ((function)(word)page)(), 2);
    page[1] = 3;
    cpuid(0, 0);
    check_equal("original-written-alias-runs", ((function)(word)twin)(), 3);
    /* Another page under the same address. */
    write_function(page + 4096, 77);
    table[0] = (word)(page + 4096) | 3;
    __asm__ volatile("invlpg (%0)" : : "r"(twin) : "memory");
    check_equal("remapped-code", ((function)(word)twin)(), 77);
}
#endif

void guest_main(void)
{
    u32 result, sum = 0;

    __asm__ volatile("movb $0x42, 1f + 1; 1: movl $0, %0" : "=a"(result) : : "memory");
    check_equal("next-instruction", result, 0x42);

    __asm__ volatile("movl $3, %%ecx; xorl %%edx, %%edx;"
                     "2: incb 1f + 1; nop; nop; 1: movl $0, %%eax; addl %%eax, %%edx; loop 2b"
                     : "=d"(sum)
                     :
                     : "eax", "ecx", "memory", "cc");
    check_equal("loop-patches-itself", sum, 6);

    for (u32 i = 1; i <= 100; i++) {
        write_function(page, i);
        sum += ((function)(word)page)();
    }
    check_equal("rewritten-and-called-100-times", sum, 6 + 5050);

    write_function(page + 4093, 0x11223344);
    check_equal("across-pages", ((function)(word)(page + 4093))(), 0x11223344);
    page[4097] = 0x99; /* the last byte of its number, in the second page */
    check_equal("across-pages-second-page-changed", ((function)(word)(page + 4093))(), 0x99223344);
    page[4095] = 0x88;
    check_equal("across-pages-first-page-changed", ((function)(word)(page + 4093))(), 0x99228844);

    write_function(page + 64, 1);
    check_equal("rep-movs-before", ((function)(word)(page + 64))(), 1);
    write_function(page + 1024, 2);
    memcpy(page + 64, page + 1024, 6);
    check_equal("rep-movs-over-code", ((function)(word)(page + 64))(), 2);
    __asm__ volatile("lock; incb %0" : "+m"(page[65]));
    check_equal("locked-increment-of-code", ((function)(word)(page + 64))(), 3);
    memset(page + 65, 0x21, 4);
    check_equal("rep-stos-over-code", ((function)(word)(page + 64))(), 0x21212121);
    check_equal("push-over-code", push_over(page + 256, 0x5566) & 0xffffff, 0x5566);
    hot_data();
#ifdef __x86_64__
    alias();
#endif
}
