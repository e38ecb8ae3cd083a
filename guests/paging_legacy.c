/*
 * Paging in 32-bit mode: two levels with pages of 4 KiB and 4 MiB, the latter above 4 GiB too, and
 * PAE with its four page-directory-pointer entries, which are read when CR3 is loaded and only then.
 *
 * Intel SDM vol. 3, 4.3 and 4.4.
 */
#include "guest.h"

#define P 1
#define W 2
#define U 4
#define A 0x20
#define D 0x40
#define PS 0x80
#define PF_P 1
#define PF_W 2
#define PF_U 4
#define PF_RSVD 8
#define PF_I 16

#define VA 0x40001000u /* directory entry 256 (2 levels); pointer 1, entry 0 (PAE) */

static u32 directory[1024] __attribute__((aligned(4096)));
static u32 table[1024] __attribute__((aligned(4096)));
static u64 pointers[4] __attribute__((aligned(32)));
static u64 pae_directory[2][512] __attribute__((aligned(4096)));
static u64 pae_table[512] __attribute__((aligned(4096)));
static u8 frame_a[4096] __attribute__((aligned(4096)));
static u8 frame_b[4096] __attribute__((aligned(4096)));
static volatile u8 seen;

static void load(void)
{
    TRY("movb (%1), %0", : "=q"(seen) : "r"(VA) : "memory");
}

static void store(void)
{
    TRY("movb $0xc3, (%0)", : : "r"(VA) : "memory");
}

static void execute(void)
{
    TRY("call *%0", : : "r"(VA) : "memory");
}

static void expect_pf(const char *name, word error)
{
    check(name, trap.vector == PF && trap.error == error && trap.cr2 == VA);
}

static void expect_none(const char *name)
{
    check_equal(name, (u32)trap.vector, (u32)NONE);
}

static void flush(void)
{
    set_cr3(cr3());
}

static void paging_on(word root, word cr4_bits)
{
    set_cr4((cr4() & ~(word)(CR4_PSE | CR4_PAE)) | cr4_bits);
    set_cr3(root);
    set_cr0(cr0() | (word)CR0_PG);
}

static void paging_off(void)
{
    set_cr0(cr0() & ~(word)CR0_PG);
}

static void two_levels(void)
{
    check_group = "two-level-";
    for (u32 i = 0; i < 256; i++)
        directory[i] = i << 22 | PS | P | W | U;
    directory[1023] = 0xffc00000u | PS | P | W;
    directory[256] = (u32)table | P | W | U;
    table[1] = (u32)frame_a | P | W | U;
    frame_a[0] = 0x11;
    paging_on((word)directory, CR4_PSE);
    load();
    check_equal("load", seen, 0x11);
    check_equal("accessed", table[1] & (A | D), A);
    check_equal("directory-accessed", directory[256] & (A | D), A);
    store();
    check_equal("dirty", table[1] & (A | D), A | D);
    table[1] &= ~(u32)P;
    flush();
    load();
    expect_pf("absent-load", 0);
    run_user(store, 0);
    expect_pf("absent-user-store", PF_U | PF_W);
    execute();
    expect_pf("absent-execute-has-no-i-bit", 0);
    table[1] |= P;
    table[1] &= ~(u32)W;
    flush();
    run_user(store, 0);
    expect_pf("read-only-user-store", PF_P | PF_W | PF_U);
    store();
    expect_none("read-only-store-without-wp");
    set_cr0(cr0() | (word)CR0_WP);
    store();
    expect_pf("read-only-store-with-wp", PF_P | PF_W);
    set_cr0(cr0() & ~(word)CR0_WP);
    table[1] = (u32)frame_a | P | W;
    flush();
    run_user(load, 0);
    expect_pf("supervisor-user-load", PF_P | PF_U);
    directory[256] = ((u32)frame_a & 0xffc00000u) | PS | P | W | U;
    flush();
    TRY("movb (%1), %0", : "=q"(seen) : "r"(0x40000000u + ((u32)frame_a & 0x3fffff)));
    check_equal("4m-load", seen, 0xc3);
    check_equal("4m-accessed", directory[256] & (A | D), A);
    directory[256] |= 1u << 21;
    flush();
    load();
    expect_pf("4m-reserved-bit-21", PF_P | PF_RSVD);
    paging_off();
}

#define HIGH_VALUE 0x36
static bool high_memory; /* at 4 GiB and up; then pse36() has left HIGH_VALUE there */

/* PSE-36: bits 20 to 13 of the entry of a 4 MiB page are bits 39 to 32 of its address. Those that
 * the processor has no address lines for are reserved. */
static void pse36(void)
{
    u32 at = 0x40000000u + ((u32)frame_a & 0x3fffff), entry = (u32)frame_a & 0xffc00000u;
    u32 width = cpuid(0x80000000, 0).a >= 0x80000008 ? cpuid(0x80000008, 0).a & 0xff : 36;

    check_group = "pse36-";
    if (!(cpuid(1, 0).d & BIT(17))) {
        skip("all", "not there");
        return;
    }
    entry |= PS | P | W | U;
    frame_a[0] = 0x11;
    directory[256] = entry | 1u << 13;
    paging_on((word)directory, CR4_PSE);
    TRY("movb %1, (%0)", : : "r"(at), "i"(HIGH_VALUE) : "memory");
    expect_none("store");
    check_equal("is-not-below", frame_a[0], 0x11);
    TRY("movb (%1), %0", : "=q"(seen) : "r"(at) : "memory");
    high_memory = seen == HIGH_VALUE;
    if (high_memory)
        check("load", true);
    else
        check_equal("load-of-nothing", seen, 0xff);
    check_equal("accessed-dirty", directory[256], entry | 1u << 13 | A | D);
    directory[256] = entry | 1u << 20;
    flush();
    if (width >= 40) {
        TRY("movb (%1), %0", : "=q"(seen) : "r"(at) : "memory");
        expect_none("bit-39");
    } else {
        load();
        expect_pf("bit-39-is-reserved", PF_P | PF_RSVD);
        directory[256] = entry | 1u << (width - 32 + 13);
        flush();
        run_user(store, 0);
        expect_pf("first-bit-beyond-address-is-reserved", PF_P | PF_RSVD | PF_W | PF_U);
    }
    directory[256] = entry;
    flush();
    TRY("movb (%1), %0", : "=q"(seen) : "r"(at) : "memory");
    check_equal("load-below", seen, 0x11);
    paging_off();
}

static void pae(void)
{
    check_group = "pae-";
    for (u32 i = 0; i < 512; i++)
        pae_directory[0][i] = (u64)i << 21 | PS | P | W | U;
    pae_directory[1][0] = (u32)pae_table | P | W | U;
    pae_table[1] = (u32)frame_a | P | W | U;
    frame_a[0] = 0x33;
    frame_b[0] = 0x44;
    pointers[0] = (u32)pae_directory[0] | P;
    pointers[1] = (u32)pae_directory[1] | P;
    paging_on((word)pointers, CR4_PAE);
    load();
    check_equal("load", seen, 0x33);
    check_equal("accessed", pae_table[1] & (A | D), A);
    check_equal("pointer-has-no-accessed-bit", pointers[1] & A, 0);
    pae_table[1] = (u32)frame_b | P | W | U;
    __asm__ volatile("invlpg (%0)" : : "r"(VA) : "memory");
    load();
    check_equal("invlpg", seen, 0x44);
    if (high_memory) {
        pae_table[1] = BIT(32) | ((u32)frame_a & 0x3ff000) | P | W | U;
        flush();
        load();
        check_equal("finds-what-pse36-stored", seen, HIGH_VALUE);
        pae_table[1] = (u32)frame_b | P | W | U;
        flush();
    }
    pae_table[1] |= BIT(63);
    flush();
    load();
    expect_pf("nx-without-nxe-is-reserved", PF_P | PF_RSVD);
    wrmsr(MSR_EFER, rdmsr(MSR_EFER) | EFER_NXE);
    flush();
    load();
    expect_none("nx-load");
    execute();
    expect_pf("nx-execute", PF_P | PF_I);
    pae_table[1] &= ~BIT(63);
    pae_table[1] |= BIT(62);
    flush();
    load();
    expect_pf("bit-62-is-reserved", PF_P | PF_RSVD);
    pae_table[1] &= ~BIT(62);
    flush();

    pointers[1] = 0;
    __asm__ volatile("invlpg (%0)" : : "r"(VA) : "memory");
    load();
    if (cpu_is_amd())
        skip("pointers-are-read-at-cr3", "AMD's may be read at any time");
    else
        expect_none("pointers-are-read-at-cr3");
    flush();
    load();
    expect_pf("pointer-absent", 0);
    pointers[1] = (u32)pae_directory[1] | P | BIT(1);
    if (cpu_is_amd()) {
        skip("pointer-reserved-bit", "AMD finds it at the access");
    } else {
        FAULTS("pointer-reserved-bit", GP, 0, "mov %0, %%cr3", : : "r"(cr3()) : "memory");
    }
    pointers[1] = (u32)pae_directory[1] | P;
    flush();
    load();
    expect_none("pointer-again");
    paging_off();
    set_cr4(cr4() & ~(word)CR4_PAE);
}

void guest_main(void)
{
    two_levels();
    pse36();
    pae();
    check_group = "";
    check("paging-is-off-again", !(cr0() & CR0_PG));
}
