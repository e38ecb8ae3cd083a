/*
 * Code that changes, or comes to lie elsewhere, after it has run often: what a translator made of it must
 * not be what runs then. Patched loops and blocks, across pages, by another address of the page and by
 * fw_cfg's DMA; and code under addresses whose translation changes: INVLPG, and CR3 without and with
 * PCIDs and global pages. guests/selfmod.c has the same where nothing has run often.
 */
#include "guest.h"

#define WINDOW 0x4000000UL
#define PTE_GLOBAL 0x100
#define CR3_NO_FLUSH BIT(63)
#define RUNS 200
#define FW_CFG_DMA 0x514
#define DMA_READ_SELECTED 0x0a /* of the item whose number is in the upper half; 0: "QEMU" */

typedef u64 (*function)(u64 count, void *memory);
extern u64 boot_pml4[];

static u8 page[4 * 4096] __attribute__((aligned(4096)));
static u64 table[512] __attribute__((aligned(4096)));
/* The rest of a second address space. */
static u64 pml4[512] __attribute__((aligned(4096))), pdpt[512] __attribute__((aligned(4096))),
    directory[512] __attribute__((aligned(4096))), second_table[512] __attribute__((aligned(4096)));

static u64 call(const void *code, u64 count, void *memory)
{
    return ((function)(word)code)(count, memory);
}

/* mov $value, %eax; ret */
static void write_function(u8 *at, u32 value)
{
    at[0] = 0xb8;
    memcpy(at + 1, &value, 4);
    at[5] = 0xc3;
}

static bool runs(const void *code, u64 want)
{
    bool right = true;

    for (unsigned n = 0; n < RUNS; n++)
        right &= call(code, 0, NULL) == want;
    return right;
}

static u64 *entry_of(word linear)
{
    u64 *upper = (u64 *)(boot_pml4[0] & ~0xfffULL), *pd = (u64 *)(upper[0] & ~0xfffULL);

    pd[linear >> 21] = (word)table | 3;
    return &table[(linear >> 12) & 511];
}

static void invlpg(word linear)
{
    __asm__ volatile("invlpg (%0)" : : "r"(linear) : "memory");
}

/* --- Patches --- */

/* xor %eax, %eax; 1: add $1, %eax; dec %rdi; jnz 1b; ret */
static const u8 counting_loop[] = {0x31, 0xc0, 0x83, 0xc0, 1, 0x48, 0xff, 0xcf, 0x75, 0xf8, 0xc3};

static void patched_loop(void)
{
    u8 *code = page + 64;
    bool right = true;

    memcpy(code, counting_loop, sizeof(counting_loop));
    check_equal("loop", call(code, 10000, NULL), 10000);
    for (u8 n = 2; n < 60; n++) {
        code[4] = n;
        right &= call(code, 500, NULL) == 500u * n;
    }
    check("loop-patched", right);
}

/*
 * A loop of two blocks, chained to each other, in which the first patches the second: RSI is the place of
 * the number that is added, and the low byte of the count is written there.
 */
static void patches_next_block(void)
{
    static const u8 code[] = {
        0x31, 0xc0,                   /* xor %eax, %eax */
        0x40, 0x88, 0x3e,             /* 1: mov %dil, (%rsi) */
        0xeb, 0x00,                   /* jmp 2f */
        0x05, 0x00, 0x00, 0x00, 0x00, /* 2: add $0, %eax */
        0x48, 0xff, 0xcf,             /* dec %rdi */
        0x75, 0xf1,                   /* jnz 1b */
        0xc3,
    };
    u8 *at = page + 1024;

    memcpy(at, code, sizeof(code));
    check_equal("block-patches-next", call(at, 200, at + 8), 200 * 201 / 2);
    /* The same loop, so that it is chained before it begins to patch. */
    memcpy(at, code, sizeof(code));
    check_equal("block-patches-elsewhere", call(at, 10000, page + 4000), 0);
    check_equal("chained-block-patches-next", call(at, 250, at + 8), 250 * 251 / 2);
}

/* As above in one block: the store and what it changes, with no branch in between. */
static void patches_itself(void)
{
    static const u8 code[] = {
        0x31, 0xc0,                   /* xor %eax, %eax */
        0x40, 0x88, 0x3e,             /* 1: mov %dil, (%rsi) */
        0x05, 0x00, 0x00, 0x00, 0x00, /* add $0, %eax */
        0x48, 0xff, 0xcf,             /* dec %rdi */
        0x75, 0xf3,                   /* jnz 1b */
        0xc3,
    };
    u8 *at = page + 2048;

    memcpy(at, code, sizeof(code));
    check_equal("block-stores-elsewhere", call(at, 10000, page + 4000), 0);
    check_equal("block-patches-itself", call(at, 200, at + 6), 200 * 201 / 2);
}

/* An instruction across two pages, and a loop across two pages. */
static void across_pages(void)
{
    u8 *at = page + 4093, *loop = page + 2 * 4096 - 5;
    bool right = true;

    write_function(at, 0x11223344);
    check("across-pages", runs(at, 0x11223344));
    page[4097] = 0x99;
    check("across-pages-second-patched", runs(at, 0x99223344));
    page[4095] = 0x88;
    check("across-pages-first-patched", runs(at, 0x99228844));
    for (u8 n = 1; n < 100; n++) {
        page[4097] = n;
        right &= call(at, 0, NULL) == (0x00228844 | (u32)n << 24);
    }
    check("across-pages-patched-each-time", right);
    memcpy(loop, counting_loop, sizeof(counting_loop));
    check_equal("loop-across-pages", call(loop, 10000, NULL), 10000);
    loop[4] = 3;
    check_equal("loop-across-pages-patched-in-first", call(loop, 1000, NULL), 3000);
    loop[7] = 0xc9; /* dec %rcx: and RCX is 5, or less after */
    __asm__ volatile("call *%1" : : "c"(5), "r"(loop), "D"(0), "S"(0) : "rax", "memory", "cc");
    loop[7] = 0xcf;
    check_equal("loop-across-pages-patched-back", call(loop, 1000, NULL), 3000);
}

/* --- Other ways to write --- */

static void aliases(void)
{
    u8 *twin = (u8 *)WINDOW;

    *entry_of(WINDOW) = (word)page | 3;
    set_cr3(cr3());
    write_function(page + 128, 1);
    check("alias", runs(twin + 128, 1) && runs(page + 128, 1));
    twin[129] = 2;
    cpuid(0, 0);
    check("alias-writes", runs(page + 128, 2) && runs(twin + 128, 2));
    page[129] = 3;
    cpuid(0, 0);
    check("original-writes", runs(twin + 128, 3) && runs(page + 128, 3));
}

static u32 swapped(u32 n)
{
    return n >> 24 | (n >> 8 & 0xff00) | (n & 0xff00) << 8 | n << 24;
}

static void by_dma(void)
{
    static struct {
        u32 control, length, address_high, address_low;
    } __attribute__((aligned(16))) volatile dma;
    u8 *at = page + 192;

    write_function(at, 5);
    check("before-dma", runs(at, 5));
    dma.control = swapped(DMA_READ_SELECTED);
    dma.length = swapped(4);
    dma.address_high = 0;
    dma.address_low = swapped((u32)(word)(at + 1));
    __asm__ volatile("outl %0, %1"
                     :
                     : "a"(swapped((u32)(word)&dma)), "d"((u16)(FW_CFG_DMA + 4))
                     : "memory");
    for (unsigned n = 0; n < 1000000 && dma.control; n++)
        ;
    check_equal("dma-ends", dma.control, 0);
    cpuid(0, 0);
    check("written-by-dma", runs(at, 0x554d4551)); /* "QEMU" */
}

/* --- Remapped code --- */

/* 1: call *%rsi; add %rax, %rbx; dec %rdi; jnz 1b: from one page into another. */
static u64 sum_of_calls(u64 count, const void *code)
{
    u64 sum = 0;

    __asm__ volatile("1: call *%2; add %%rax, %0; dec %1; jnz 1b"
                     : "+r"(sum), "+D"(count)
                     : "S"(code)
                     : "rax", "memory", "cc");
    return sum;
}

static void remapped_by_invlpg(void)
{
    volatile u64 *entry = entry_of(WINDOW);
    bool right = true;

    write_function(page, 1);
    write_function(page + 4096, 1000);
    for (unsigned n = 0; n < 100; n++) {
        *entry = (word)(page + 4096 * (n & 1)) | 3;
        invlpg(WINDOW);
        right &= sum_of_calls(100, (void *)WINDOW) == (n & 1 ? 100000 : 100);
    }
    check("remapped-by-invlpg", right);
    *entry = 0;
    invlpg(WINDOW);
    FAULTS("unmapped", PF, 0x0, "mov (%0), %%eax", : : "r"(WINDOW) : "eax");
    TRY("call *%0", : : "r"(WINDOW) : "rax", "memory");
    check("unmapped-code", trap.vector == PF && trap.ip == WINDOW && trap.cr2 == WINDOW);
}

/* Two address spaces, the same but for the window: page, and page + 4096. */
static void make_second_space(void)
{
    u64 *upper = (u64 *)(boot_pml4[0] & ~0xfffULL), *pd = (u64 *)(upper[0] & ~0xfffULL);

    memcpy(pml4, boot_pml4, 4096);
    memcpy(pdpt, upper, 4096);
    memcpy(directory, pd, 4096);
    pml4[0] = (word)pdpt | 7;
    pdpt[0] = (word)directory | 7;
    directory[WINDOW >> 21] = (word)second_table | 3;
    second_table[0] = (word)(page + 4096) | 3;
    *entry_of(WINDOW) = (word)page | 3;
}

static bool switches(u64 first, u64 second)
{
    bool right = true;

    for (unsigned n = 0; n < 200; n++) {
        set_cr3(n & 1 ? second : first);
        right &= sum_of_calls(n % 7 ? 3 : 100, (void *)WINDOW) ==
                 (n % 7 ? 3u : 100u) * (n & 1 ? 1000 : 1);
    }
    set_cr3(cr3() & ~0xfffULL);
    return right;
}

static void remapped_by_cr3(void)
{
    word before = cr3() & ~0xfffULL, second = (word)pml4;
    volatile u64 *entry = entry_of(WINDOW);

    make_second_space();
    write_function(page, 1);
    write_function(page + 4096, 1000);
    check("two-address-spaces", switches(before, second));
    set_cr3(before);
    *entry = (word)page | 3 | PTE_GLOBAL;
    invlpg(WINDOW);
    check("global", runs((void *)WINDOW, 1));
    *entry = (word)(page + 4096) | 3 | PTE_GLOBAL;
    invlpg(WINDOW);
    check("global-remapped-by-invlpg", runs((void *)WINDOW, 1000));
    *entry = (word)page | 3 | PTE_GLOBAL;
    set_cr4(cr4() & ~CR4_PGE);
    set_cr4(cr4() | CR4_PGE);
    check("global-remapped-by-pge", runs((void *)WINDOW, 1));
    *entry = (word)page | 3;
    invlpg(WINDOW);

    if (!(cpuid(1, 0).c & BIT(17))) {
        skip("pcid", "not there");
        return;
    }
    set_cr4(cr4() | CR4_PCIDE);
    check("pcids", switches(before | 1, second | 2));
    check("pcids-without-flush", switches(before | 1 | CR3_NO_FLUSH, second | 2 | CR3_NO_FLUSH));
    /* What a PCID's pages are now is seen by the write of CR3 that flushes them. */
    set_cr3(before | 1);
    check("pcid-before", runs((void *)WINDOW, 1));
    set_cr3(second | 2);
    *entry = (word)(page + 4096) | 3;
    set_cr3(before | 1);
    check("pcid-remapped-and-flushed", runs((void *)WINDOW, 1000));
    *entry = (word)page | 3;
    invlpg(WINDOW);
    check("pcid-remapped-by-invlpg", runs((void *)WINDOW, 1));
    /* One space under another's number, flushed on the way. */
    set_cr3(second | 1);
    check("pcid-of-another", runs((void *)WINDOW, 1000));
    set_cr3(before);
    set_cr4(cr4() & ~CR4_PCIDE);
}

/* --- A call from page to page --- */

static void map_callee(volatile u64 *entry, const u8 *code, u64 flags)
{
    entry[1] = (word)code | 3 | flags;
    invlpg(WINDOW + 4096);
}

/* The caller's page and, at first, the other one are global. */
static void calls_other_page(void)
{
    static const u8 call_next_page[] = {0xe8, 0xfb, 0x0f, 0, 0, 0xc3}; /* call WINDOW + 4096; ret */
    volatile u64 *entry = entry_of(WINDOW);
    u8 *first = page + 4096, *second = page + 8192;

    set_cr4(cr4() | CR4_PGE);
    memcpy(page, call_next_page, sizeof(call_next_page));
    write_function(first, 1);
    write_function(second, 2);
    *entry = (word)page | 3 | PTE_GLOBAL;
    invlpg(WINDOW);
    map_callee(entry, first, PTE_GLOBAL);
    check("callee", runs((void *)WINDOW, 1));
    map_callee(entry, second, PTE_GLOBAL);
    check("callee-remapped-by-invlpg", runs((void *)WINDOW, 2));
    entry[1] = (word)first | 3 | PTE_GLOBAL;
    set_cr4(cr4() & ~CR4_PGE);
    set_cr4(cr4() | CR4_PGE);
    check("callee-remapped-by-pge", runs((void *)WINDOW, 1));
    write_function(first, 3);
    check("callee-written", runs((void *)WINDOW, 3));
    map_callee(entry, first, 0);
    check("callee-not-global", runs((void *)WINDOW, 3));
    entry[1] = (word)second | 3;
    set_cr3(cr3());
    check("callee-remapped-by-cr3", runs((void *)WINDOW, 2));
    map_callee(entry, first, PTE_GLOBAL);
    check("callee-global-again", runs((void *)WINDOW, 3));
    entry[1] = 0;
    invlpg(WINDOW + 4096);
    TRY("call *%0", : : "r"(WINDOW) : "memory", "ax");
    check("callee-gone", trap.vector == PF && trap.cr2 == WINDOW + 4096);
    map_callee(entry, second, PTE_GLOBAL);
    check("callee-back", runs((void *)WINDOW, 2));
}

void guest_main(void)
{
    patched_loop();
    patches_next_block();
    patches_itself();
    across_pages();
    aliases();
    by_dma();
    remapped_by_invlpg();
    remapped_by_cr3();
    calls_other_page();
}
