/*
 * String instructions: every size both ways, repeated and not, by 16, 32 and 64-bit addresses;
 * faults in the middle with exact registers; pages crossed; overlaps; interrupts inside a long one.
 * Built for 32 and 64 bits.
 *
 * Intel SDM vol. 2B, REP; vol. 1, 7.3.9.
 */
#include "guest.h"

#define VECTOR_TIMER 0x51
#define PAGE 4096
#define LONG (16u << 20)

static u8 from[256] __attribute__((aligned(64))), to[256] __attribute__((aligned(64)));
static word si, di, cx, ax, flags;

static void fill(u8 *at, unsigned n, u8 first)
{
    for (unsigned i = 0; i < n; i++)
        at[i] = (u8)(first + i);
}

/* Runs one string instruction with si, di, cx and ax, and catches its exception. */
#define STRING(insn)                                                                               \
    do {                                                                                           \
        trap_resume = 0;                                                                           \
        TRY(insn "\n\tpushf; pop %4; cld",                                                         \
            : "+S"(si), "+D"(di), "+c"(cx), "+a"(ax), "=&d"(flags)                                 \
            :                                                                                      \
            : "memory", "cc");                                                                     \
        __asm__ volatile("cld");                                                                   \
    } while (0)

static void set(const void *source, const void *destination, word count)
{
    si = (word)source;
    di = (word)destination;
    cx = count;
}

static void expect(const char *name, const void *source, const void *destination, word count)
{
    check(name,
          trap.vector == NONE && si == (word)source && di == (word)destination && cx == count);
}

#define EACH_SIZE(suffix, size)                                                                    \
    do {                                                                                           \
        fill(from, 64, 1);                                                                         \
        memset(to, 0, 64);                                                                         \
        set(from, to, 5);                                                                          \
        STRING("movs" suffix);                                                                     \
        expect("movs" suffix, from + (size), to + (size), 5);                                      \
        check("movs" suffix "-data", !memcmp(from, to, size) && !to[size]);                        \
        set(from, to, 5);                                                                          \
        STRING("rep movs" suffix);                                                                 \
        expect("rep-movs" suffix, from + 5 * (size), to + 5 * (size), 0);                          \
        check("rep-movs" suffix "-data", !memcmp(from, to, 5 * (size)) && !to[5 * (size)]);        \
        memset(to, 0, 64);                                                                         \
        set(from + 4 * (size), to + 4 * (size), 4);                                                \
        STRING("std; rep movs" suffix);                                                            \
        expect("rep-movs" suffix "-down", from, to, 0);                                            \
        check("rep-movs" suffix "-down-data",                                                      \
              !memcmp(from + (size), to + (size), 4 * (size)) && !to[0] && !to[5 * (size)]);       \
        ax = (word)0x8877665544332211ULL;                                                          \
        memset(to, 0, 64);                                                                         \
        set(0, to, 3);                                                                             \
        STRING("rep stos" suffix);                                                                 \
        expect("rep-stos" suffix, 0, to + 3 * (size), 0);                                          \
        check("rep-stos" suffix "-data", !memcmp(to + 2 * (size), &ax, size) && !to[3 * (size)]);  \
        to[size] ^= 1;                                                                             \
        set(0, to, 9);                                                                             \
        STRING("repe scas" suffix);                                                                \
        expect("repe-scas" suffix, 0, to + 2 * (size), 7);                                         \
        check("repe-scas" suffix "-zf", !(flags & FLAG_ZF));                                       \
        memcpy(to, from, 64);                                                                      \
        to[3 * (size)] ^= 1;                                                                       \
        set(from, to, 9);                                                                          \
        STRING("repe cmps" suffix);                                                                \
        expect("repe-cmps" suffix, from + 4 * (size), to + 4 * (size), 5);                         \
        set(from + 3 * (size), to + 3 * (size), 9);                                                \
        STRING("repne cmps" suffix);                                                               \
        expect("repne-cmps" suffix, from + 5 * (size), to + 5 * (size), 7);                        \
        check("repne-cmps" suffix "-zf", flags &FLAG_ZF);                                          \
        ax = 0;                                                                                    \
        set(from, 0, 3);                                                                           \
        STRING("rep lods" suffix);                                                                 \
        expect("rep-lods" suffix, from + 3 * (size), 0, 0);                                        \
        check("rep-lods" suffix "-data", !memcmp(&ax, from + 2 * (size), size));                   \
    } while (0)

static void sizes(void)
{
    EACH_SIZE("b", 1);
    EACH_SIZE("w", 2);
    EACH_SIZE("l", 4);
#ifdef __x86_64__
    EACH_SIZE("q", 8);
#endif
    set(from, to, 0);
    STRING("stc; repe cmpsb");
    expect("repe-of-none", from, to, 0);
    check("repe-of-none-keeps-flags", flags & FLAG_CF);
    set(0, to, 4);
    STRING(".byte 0xf2; stosb");
    expect("repne-is-rep-without-compare", 0, to + 4, 0);
}

static void address_sizes(void)
{
#ifdef __x86_64__
    set(0, to, 3 | BIT(35));
    si = BIT(40);
    STRING("addr32 rep stosb");
    check("addr32-count-of-32-bits", trap.vector == NONE && cx == 0 && di == (word)to + 3);
    set(from, to, 1);
    di |= BIT(36);
    STRING("addr32 movsb");
    check("addr32-index-zero-extends", di == (word)to + 1 && si == (word)from + 1);
    wrmsr(0xc0000100, (word)from);
    fill(from, 64, 1);
    set((void *)8, to, 4);
    STRING("rep movsb %%fs:(%%rsi), (%%rdi)");
    check("fs-override", si == 12 && to[0] == 9 && to[3] == 12);
#else
    set(0, (void *)0x1234fffe, 0xabcd0004);
    ax = 0x5a;
    *(volatile u8 *)0xffff = 0;
    STRING("addr16 rep stosb");
    check_equal("addr16-index-wraps", di, 0x12340002);
    check_equal("addr16-count", cx, 0xabcd0000);
    check_equal("addr16-data", *(volatile u8 *)0xffff, 0x5a);
    set(0, (void *)0x5678f000, 3);
    di = 0x5678f001;
    STRING("std; addr16 rep stosb");
    check_equal("addr16-down", di, 0x5678effe);
#endif
}

static void overlaps(void)
{
    static u8 model[256];
    static const u8 distances[] = {1, 2, 3, 5, 7, 8, 9, 16, 31};
    bool bytes = true, dwords = true, down = true;

    for (unsigned d = 0; d < ARRAY_SIZE(distances); d++) {
        fill(to, 200, 1);
        fill(model, 200, 1);
        for (unsigned i = 0; i < 100; i++)
            model[distances[d] + i] = model[i];
        set(to, to + distances[d], 100);
        STRING("rep movsb");
        bytes &= !memcmp(to, model, 200);
        fill(to, 200, 1);
        fill(model, 200, 1);
        for (unsigned i = 0; i < 100; i += 4) {
            u8 four[4] = {model[i], model[i + 1], model[i + 2], model[i + 3]};

            for (unsigned k = 0; k < 4; k++)
                model[distances[d] + i + k] = four[k];
        }
        set(to, to + distances[d], 25);
        STRING("rep movsl");
        dwords &= !memcmp(to, model, 200);
        fill(to, 200, 1);
        fill(model, 200, 1);
        for (unsigned i = 100; i-- > 0;)
            model[distances[d] + i] = model[i];
        set(to + 99, to + distances[d] + 99, 100);
        STRING("std; rep movsb");
        down &= !memcmp(to, model, 200);
    }
    check("overlap-bytes", bytes);
    check("overlap-dwords", dwords);
    check("overlap-bytes-down", down);
}

#ifdef __x86_64__
extern u64 boot_pml4[];
#define WINDOW 0x4000000UL /* 64 MiB: pages of our own from here */
static u64 table[512] __attribute__((aligned(4096)));
static u8 backing[8 * PAGE] __attribute__((aligned(4096)));
static unsigned page_faults;

static void map(unsigned page, u64 bits)
{
    table[page] = bits ? (word)(backing + page * PAGE) | bits : 0;
    __asm__ volatile("invlpg (%0)" : : "r"(WINDOW + page * PAGE) : "memory");
}

static void on_page_fault(struct frame *f)
{
    page_faults++;
    map((unsigned)((cr2() - WINDOW) / PAGE), 3);
    (void)f;
}

static void expect_stop(const char *name, word error, word source, word destination, word count,
                        word at)
{
    check(name, trap.vector == PF && trap.error == error && trap.cr2 == at && si == source &&
                    di == destination && cx == count);
}

static void faults(void)
{
    u64 *pdpt = (u64 *)(boot_pml4[0] & ~0xfffULL), *pd = (u64 *)(pdpt[0] & ~0xfffULL);
    u8 *w = (u8 *)WINDOW;

    pd[WINDOW >> 21] = (word)table | 3;
    set_cr3(cr3());
    map(0, 3);
    map(1, 3);
    map(2, 0);
    map(3, 3);
    map(4, 1);
    set_cr0(cr0() | CR0_WP);
    memset(w, 0x11, 2 * PAGE);
    memset(w + 3 * PAGE, 0x33, PAGE);

    set(w, w + 2 * PAGE - 10, 100);
    STRING("rep movsb");
    expect_stop("movsb-destination-absent", 2, WINDOW + 10, WINDOW + 2 * PAGE, 90,
                WINDOW + 2 * PAGE);
    set(w + 2 * PAGE - 10, w, 100);
    STRING("rep movsb");
    expect_stop("movsb-source-absent", 0, WINDOW + 2 * PAGE, WINDOW + 10, 90, WINDOW + 2 * PAGE);
    set(w, w + 2 * PAGE - 20, 10);
    ax = 0x2222222222222222;
    STRING("rep stosq");
    expect_stop("stosq-straddles-absent", 2, WINDOW, WINDOW + 2 * PAGE - 4, 8, WINDOW + 2 * PAGE);
    check("stosq-straddling-stores-nothing", w[2 * PAGE - 5] == 0x22 && w[2 * PAGE - 4] == 0x11);
    set(w + 2 * PAGE - 12, w, 10);
    STRING("rep lodsq");
    expect_stop("lodsq-straddles-absent", 0, WINDOW + 2 * PAGE - 4, WINDOW, 9, WINDOW + 2 * PAGE);
    set(w, w + 4 * PAGE - 16, 10);
    STRING("rep movsl");
    expect_stop("movsl-read-only", 3, WINDOW + 16, WINDOW + 4 * PAGE, 6, WINDOW + 4 * PAGE);
    set(w, w + 3 * PAGE + 4, 10);
    STRING("std; rep stosb");
    expect_stop("stosb-down-absent", 2, WINDOW, WINDOW + 3 * PAGE - 1, 5, WINDOW + 3 * PAGE - 1);
    check("fault-keeps-df", trap.flags & FLAG_DF);
    memset(w, 0x11, 2 * PAGE);
    ax = 0x99;
    set(w, w + PAGE, 100000);
    STRING("repne scasb");
    expect_stop("scasb-absent", 0, WINDOW, WINDOW + 2 * PAGE, 100000 - PAGE, WINDOW + 2 * PAGE);
    set(w, w + PAGE, 100000);
    STRING("repe cmpsb");
    expect_stop("cmpsb-absent", 0, WINDOW + PAGE, WINDOW + 2 * PAGE, 100000 - PAGE,
                WINDOW + 2 * PAGE);
    check("fault-at-the-instruction", trap.ip == trap_at && trap.flags & FLAG_RF);
    set((void *)BIT(56), to, 4);
    STRING("rep movsb");
    check("noncanonical-source", trap.vector == GP && cx == 4);
    set(w + 2 * PAGE, w + 2 * PAGE, 0);
    STRING("rep movsb");
    check_equal("none-touches-nothing", (u64)(long long)trap.vector, (u64)(long long)NONE);

    /* Mapped by the handler, it goes on where it was. */
    for (unsigned i = 0; i < 8; i++)
        map(i, 0);
    for (unsigned i = 0; i < sizeof(backing); i++)
        backing[i] = (u8)(i * 7 >> 3);
    trap_handlers[PF] = on_page_fault;
    set(w + 100, w + 4 * PAGE + 55, 3 * PAGE);
    STRING("rep movsb");
    expect("resumed", w + 100 + 3 * PAGE, w + 4 * PAGE + 55 + 3 * PAGE, 0);
    check_equal("resumed-faults", page_faults, 8);
    check("resumed-data", !memcmp(backing + 100, backing + 4 * PAGE + 55, 3 * PAGE));
    trap_handlers[PF] = NULL;
}
#else
/* Segment limits stop in the middle too. */
static void faults(void)
{
    memset(to, 0, 64);
    gdt[SEL_FREE / 8] = descriptor((u32)(word)to, 15, 0x93, 4);
    __asm__ volatile("mov %0, %%es" : : "r"(SEL_FREE));
    ax = 0x22222222;
    set(0, (void *)6, 10);
    STRING("rep stosl");
    __asm__ volatile("mov %0, %%es" : : "r"(SEL_DATA));
    check("limit-stops", trap.vector == GP && trap.error == 0 && di == 14 && cx == 8);
    check("limit-stores-whole-elements", to[13] == 0x22 && !to[14]);
}
#endif

/* A long one is interrupted between two iterations, with RF set and registers that add up. */
static struct {
    word ip;
    unsigned inside, bad;
    word sum;
} interrupted;

static void on_timer(struct frame *f)
{
    if (f->ip == interrupted.ip && f->cx && f->cx != LONG) {
        interrupted.inside++;
        if (f->di + f->cx != interrupted.sum || !(f->flags & FLAG_RF))
            interrupted.bad++;
    }
    *(volatile u32 *)0xfee000b0 = 0;
}

static void interrupts(void)
{
    u8 *big = (u8 *)0x2000000;
    word n = LONG;

    trap_handlers[VECTOR_TIMER] = on_timer;
    outb(0x21, 0xff);
    outb(0xa1, 0xff);
    *(volatile u32 *)0xfee000f0 = 0x1ff;
    *(volatile u32 *)0xfee003e0 = 0xb;
    *(volatile u32 *)0xfee00320 = VECTOR_TIMER | 1 << 17;
    for (unsigned round = 0; round < 20 && !interrupted.inside; round++) {
        memset(big, 0, n + 1);
        set(0, big, n);
        ax = 0x77;
        interrupted.sum = (word)big + n;
        __asm__ volatile(MOVW "$1f, %2; movl %k3, (%4); sti; nop; 1: rep stosb; cli"
                         : "+D"(di), "+c"(cx), "+m"(interrupted.ip)
                         : "r"(200000), "r"(0xfee00380UL), "a"(ax)
                         : "memory");
    }
    *(volatile u32 *)0xfee00320 = 1 << 16;
    check("interrupted-inside", interrupted.inside);
    if (on_tcg())
        skip("interrupted-registers", "TCG does not set RF");
    else
        check_equal("interrupted-registers", interrupted.bad, 0);
    check("interrupted-finishes", cx == 0 && di == interrupted.sum);
    check("interrupted-data",
          big[0] == 0x77 && big[n / 2] == 0x77 && big[n - 1] == 0x77 && !big[n]);
}

void guest_main(void)
{
    sizes();
    address_sizes();
    overlaps();
    faults();
    interrupts();
}
