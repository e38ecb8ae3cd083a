/*
 * Code that changes code: its next instruction, its own block, an
 * instruction across two pages, a loop that patches itself each time, by REP MOVS and LOCK. Built for 32 and 64 bits.
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

void guest_main(void)
{
    u32 result, sum = 0;

    __asm__ volatile("movb $0x42, 1f + 1; 1: movl $0, %0" : "=a"(result) : : "memory");
    check_equal("next-instruction", result, 0x42);

    __asm__ volatile("movl $3, %%ecx; xorl %%edx, %%edx;"
                     "2: incb 1f + 1; nop; nop; 1: movl $0, %%eax; addl %%eax, %%edx; loop 2b"
                     : "=d"(sum) : : "eax", "ecx", "memory", "cc");
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
}
