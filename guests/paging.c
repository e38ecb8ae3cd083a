/*
 * Paging in 64-bit mode: 4 levels with pages of 4 KiB, 2 MiB and 1 GiB, every permission with its
 * error code, accessed and dirty bits, reserved bits, protection keys, and what the manual promises
 * about the TLB: INVLPG, CR3, global pages, PCID, INVPCID.
 *
 * Intel SDM vol. 3, 4.5 to 4.7 and 4.10.
 */
#include "guest.h"

#define P 1ULL
#define W 2ULL
#define U 4ULL
#define A 0x20ULL
#define D 0x40ULL
#define PS 0x80ULL
#define G 0x100ULL
#define NX BIT(63)

#define PF_P 1
#define PF_W 2
#define PF_U 4
#define PF_RSVD 8
#define PF_I 16
#define PF_PK 32

/* The page under test: entry 1 of each level, so that no other page shares a table with it. */
#define VA ((1ULL << 39) + (1ULL << 30) + (1ULL << 21) + (1ULL << 12))

extern u64 boot_pml4[512];
static u64 pdpt[512] __attribute__((aligned(4096)));
static u64 pd[512] __attribute__((aligned(4096)));
static u64 pt[512] __attribute__((aligned(4096)));
static u64 other_pml4[512] __attribute__((aligned(4096)));
static u8 frame_a[4096] __attribute__((aligned(4096)));
static u8 frame_b[4096] __attribute__((aligned(4096)));
static volatile u8 seen;

static u64 *boot_pd(void)
{
    u64 *boot_pdpt = (u64 *)(boot_pml4[0] & ~0xfffULL);

    return (u64 *)(boot_pdpt[0] & ~0xfffULL);
}

static void flush(void)
{
    word v = cr4();

    set_cr4(v & ~CR4_PGE);
    set_cr4(v | CR4_PGE);
    set_cr3(cr3());
}

static void map(u64 l4, u64 l3, u64 l2, u64 l1)
{
    boot_pml4[1] = (word)pdpt | l4;
    pdpt[1] = (word)pd | l3;
    pd[1] = (word)pt | l2;
    pt[1] = (word)frame_a | l1;
    flush();
}

static void invlpg(u64 va)
{
    __asm__ volatile("invlpg (%0)" : : "r"(va) : "memory");
}

static void expect_pf(const char *name, word error, word address)
{
    if (trap.vector != PF)
        check_equal(name, (u64)(long long)trap.vector, PF);
    else if (trap.cr2 != address)
        check_equal(name, trap.cr2, address);
    else
        check_equal(name, trap.error, error);
}

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

enum { LOAD, STORE, EXECUTE, USER = 4 };

/* One access; `error` is -1 for none. */
static void access(const char *name, int kind, long error)
{
    static void (*const how[])(void) = {load, store, execute};

    if (kind & USER)
        run_user(how[kind & 3], 0);
    else
        how[kind & 3]();
    if (error < 0)
        check_equal(name, (u64)(long long)trap.vector, (u64)(long long)NONE);
    else
        expect_pf(name, (word)error, VA);
}

static void permissions(void)
{
    static const char *const levels[] = {"pml4e-", "pdpte-", "pde-", "pte-"};
    u64 *entries[] = {&boot_pml4[1], &pdpt[1], &pd[1], &pt[1]};

    for (unsigned i = 0; i < 4; i++) {
        check_group = levels[i];
        map(P | W | U, P | W | U, P | W | U, P | W | U);
        access("present-user-load", LOAD | USER, -1);
        access("present-user-store", STORE | USER, -1);
        access("present-user-execute", EXECUTE | USER, -1);
        map(P | W | U, P | W | U, P | W | U, P | W | U);
        *entries[i] &= ~P;
        flush();
        access("absent-load", LOAD, 0);
        access("absent-store", STORE, PF_W);
        access("absent-user-load", LOAD | USER, PF_U);
        access("absent-user-store", STORE | USER, PF_U | PF_W);
        access("absent-execute", EXECUTE, PF_I);
        *entries[i] |= P;
        *entries[i] &= ~W;
        flush();
        access("read-only-load", LOAD | USER, -1);
        access("read-only-user-store", STORE | USER, PF_U | PF_W | PF_P);
        access("read-only-store-without-wp", STORE, -1);
        set_cr0(cr0() | CR0_WP);
        access("read-only-store-with-wp", STORE, PF_W | PF_P);
        set_cr0(cr0() & ~CR0_WP);
        *entries[i] |= W;
        *entries[i] &= ~U;
        flush();
        access("supervisor-load", LOAD, -1);
        access("supervisor-user-load", LOAD | USER, PF_U | PF_P);
        access("supervisor-user-execute", EXECUTE | USER, PF_U | PF_P | PF_I);
        *entries[i] |= U | NX;
        flush();
        access("nx-load", LOAD | USER, -1);
        access("nx-execute", EXECUTE, PF_I | PF_P);
        access("nx-user-execute", EXECUTE | USER, PF_I | PF_P | PF_U);
        *entries[i] &= ~NX;
        *entries[i] |= BIT(51);
        flush();
        access("reserved-load", LOAD, PF_RSVD | PF_P);
        access("reserved-user-store", STORE | USER, PF_RSVD | PF_P | PF_W | PF_U);
        *entries[i] &= ~P;
        flush();
        access("reserved-but-absent", LOAD, 0);
    }
    check_group = "";
    map(P | W | U, P | W | U, P | W | U, P | W | U);
    boot_pml4[1] |= PS;
    flush();
    access("reserved-pml4e-ps", LOAD, PF_RSVD | PF_P);
    map(P | W | U, P | W | U, P | W | U | NX, P | W | U);
    wrmsr(MSR_EFER, rdmsr(MSR_EFER) & ~EFER_NXE);
    flush();
    access("reserved-nx-without-nxe", LOAD, PF_RSVD | PF_P);
    pd[1] &= ~NX;
    boot_pml4[1] &= ~P;
    flush();
    access("no-i-bit-without-nxe-and-smep", EXECUTE, 0);
    wrmsr(MSR_EFER, rdmsr(MSR_EFER) | EFER_NXE);
}

static void accessed_dirty(void)
{
    map(P | W | U, P | W | U, P | W | U, P | W | U);
    load();
    check_equal("a-pml4e", boot_pml4[1] & (A | D), A);
    check_equal("a-pdpte", pdpt[1] & (A | D), A);
    check_equal("a-pde", pd[1] & (A | D), A);
    check_equal("a-pte", pt[1] & (A | D), A);
    store();
    check_equal("d-pte", pt[1] & (A | D), A | D);
    check_equal("d-not-in-pde", pd[1] & (A | D), A);
    pt[1] &= ~(A | D);
    flush();
    store();
    check_equal("ad-by-store", pt[1] & (A | D), A | D);
    map(P | W | U, P | W | U, P | W | U, P);
    set_cr0(cr0() | CR0_WP);
    store();
    check_equal("d-not-by-refused-store", pt[1] & D, 0);
    set_cr0(cr0() & ~CR0_WP);
}

static void large_pages(void)
{
    u64 frame = (word)frame_a & ~0x1fffffULL;

    map(P | W | U, P | W | U, P | W | U, P | W | U);
    frame_a[0] = 0x5a;
    pd[1] = frame | P | W | U | PS;
    flush();
    TRY("movb (%1), %0",
        : "=q"(seen)
        : "r"((VA & ~0x1fffffULL) + ((word)frame_a & 0x1fffff))
        : "memory");
    check_equal("2m-load", seen, 0x5a);
    check_equal("2m-accessed", pd[1] & (A | D), A);
    store();
    check_equal("2m-dirty", pd[1] & (A | D), A | D);
    pd[1] = frame | P | W | U | PS | BIT(13);
    flush();
    access("2m-reserved-bit-13", LOAD, PF_RSVD | PF_P);
    pd[1] = frame | P | W | U | PS | BIT(12);
    flush();
    access("2m-pat-is-not-reserved", LOAD, -1);
    if (!(cpuid(0x80000001, 0).d & BIT(26))) {
        skip("1g", "no pages of 1 GiB");
        return;
    }
    pdpt[1] = P | W | U | PS;
    flush();
    TRY("movb (%1), %0", : "=q"(seen) : "r"((VA & ~0x3fffffffULL) + (word)frame_a) : "memory");
    check_equal("1g-load", seen, 0x5a);
    pdpt[1] |= BIT(29);
    flush();
    access("1g-reserved-bit-29", LOAD, PF_RSVD | PF_P);
}

/* The guest's own pages become the kernel's while SMEP and SMAP are on. */
static void supervisor_modes(void)
{
    u64 *own = boot_pd();
    u32 features = cpuid(7, 0).b;

    if (!(features & BIT(7)) || !(features & BIT(20))) {
        skip("smep-smap", "not there");
        return;
    }
    map(P | W | U, P | W | U, P | W | U, P | W | U);
    store(); /* a RET */
    own[0] &= ~U;
    flush();
    set_cr4(cr4() | CR4_SMEP);
    access("smep-execute", EXECUTE, PF_I | PF_P);
    access("smep-load", LOAD, -1);
    set_cr4(cr4() & ~CR4_SMEP);
    access("smep-off-execute", EXECUTE, -1);
    set_cr4(cr4() | CR4_SMAP);
    access("smap-load", LOAD, PF_P);
    access("smap-store", STORE, PF_P | PF_W);
    __asm__ volatile("stac");
    access("smap-ac-load", LOAD, -1);
    __asm__ volatile("clac");
    access("smap-execute", EXECUTE, -1);
    set_cr4(cr4() & ~CR4_SMAP);
    own[0] |= U;
    flush();
}

static void wrpkru(u32 v)
{
    __asm__ volatile("wrpkru" : : "a"(v), "c"(0), "d"(0) : "memory");
}

static void keys(void)
{
    if (!(cpuid(7, 0).c & BIT(3))) {
        skip("pku", "not there");
    } else {
        map(P | W | U, P | W | U, P | W | U, P | W | U | 5ULL << 59);
        FAULTS("pku-ud-without-pke", UD, 0, "rdpkru", : : "c"(0) : "eax", "edx");
        set_cr4(cr4() | CR4_PKE);
        wrpkru(1u << 10);
        access("pku-access-disable-load", LOAD | USER, PF_PK | PF_P | PF_U);
        access("pku-access-disable-kernel", LOAD, PF_PK | PF_P);
        access("pku-does-not-stop-execution", EXECUTE | USER, -1);
        wrpkru(1u << 11);
        access("pku-write-disable-load", LOAD | USER, -1);
        access("pku-write-disable-store", STORE | USER, PF_PK | PF_P | PF_U | PF_W);
        access("pku-write-disable-kernel-without-wp", STORE, -1);
        set_cr0(cr0() | CR0_WP);
        access("pku-write-disable-kernel-with-wp", STORE, PF_PK | PF_P | PF_W);
        set_cr0(cr0() & ~CR0_WP);
        FAULTS("pku-gp-ecx", GP, 0, "rdpkru", : : "c"(1) : "eax", "edx");
        wrpkru(0);
        set_cr4(cr4() & ~CR4_PKE);
    }
    if (!(cpuid(7, 0).c & BIT(31))) {
        skip("pks", "not there");
    } else {
        map(P | W | U, P | W | U, P | W, P | W | 5ULL << 59);
        set_cr4(cr4() | CR4_PKS);
        wrmsr(0x6e1, 1u << 10);
        access("pks-access-disable-load", LOAD, PF_PK | PF_P);
        wrmsr(0x6e1, 1u << 11);
        access("pks-write-disable-load", LOAD, -1);
        set_cr0(cr0() | CR0_WP);
        access("pks-write-disable-store", STORE, PF_PK | PF_P | PF_W);
        set_cr0(cr0() & ~CR0_WP);
        wrmsr(0x6e1, 0);
        set_cr4(cr4() & ~CR4_PKS);
    }
}

static u8 value(void)
{
    load();
    return trap.vector == NONE ? seen : 0;
}

static void invpcid(u64 type, u64 pcid, u64 va)
{
    u64 d[2] = {pcid, va};

    __asm__ volatile("invpcid %0, %1" : : "m"(d), "r"(type) : "memory");
}

/* Only what must have gone from the TLB is checked, not what may stay. */
static void tlb(void)
{
    map(P | W | U, P | W | U, P | W | U, P | W | U);
    frame_a[0] = 1;
    frame_b[0] = 2;
    check_equal("tlb-before", value(), 1);
    pt[1] = (word)frame_b | P | W | U;
    invlpg(VA);
    check_equal("invlpg", value(), 2);
    pt[1] = (word)frame_a | P | W | U;
    invlpg(VA + 0xabc);
    check_equal("invlpg-anywhere-in-page", value(), 1);
    pt[1] = (word)frame_b | P | W | U;
    set_cr3(cr3());
    check_equal("cr3-load", value(), 2);
    /* Pages 16 MiB apart, that a TLB of up to 4096 entries has in one place: a global one, then another. */
    pd[((VA + (16ULL << 20)) >> 21) & 511] = (word)pt | P | W | U;
    pt[1] = (word)frame_a | P | W | U | G;
    flush();
    (void)*(volatile u8 *)(VA + (16ULL << 20));
    pt[1] = (word)frame_a | P | W | U;
    value();
    pt[1] = (word)frame_b | P | W | U;
    set_cr3(cr3());
    check_equal("cr3-load-in-place-of-global", value(), 2);
    pd[((VA + (16ULL << 20)) >> 21) & 511] = 0;
    flush();
    pt[1] = (word)frame_a | P | W | U | G;
    invlpg(VA);
    value();
    pt[1] = (word)frame_b | P | W | U | G;
    invlpg(VA);
    check_equal("invlpg-global", value(), 2);
    pt[1] = (word)frame_a | P | W | U | G;
    set_cr4(cr4() ^ CR4_PGE);
    set_cr4(cr4() ^ CR4_PGE);
    check_equal("cr4-pge-toggle", value(), 1);
    map(P | W | U, P | W | U, P | W | U, 0);
    check_equal("absent", value(), 0);
    pt[1] = (word)frame_b | P | W | U;
    check_equal("absent-is-not-cached", value(), 2);
    FAULTS("invlpg-noncanonical-is-nothing", NONE, 0, "invlpg (%0)", : : "r"(BIT(56)));

    if (!(cpuid(1, 0).c & BIT(17)) || !(cpuid(7, 0).b & BIT(10))) {
        skip("pcid", "not there");
        return;
    }
    memcpy(other_pml4, boot_pml4, 4096);
    set_cr4(cr4() | CR4_PCIDE);
    set_cr3((word)other_pml4 | 5);
    check_equal("pcid-other-space", value(), 2);
    pt[1] = (word)frame_a | P | W | U;
    set_cr3((word)boot_pml4);
    set_cr3((word)other_pml4 | 5);
    check_equal("pcid-load-flushes-it", value(), 1);
    pt[1] = (word)frame_b | P | W | U;
    invpcid(0, 5, VA);
    check_equal("invpcid-address", value(), 2);
    pt[1] = (word)frame_a | P | W | U;
    invpcid(1, 5, 0);
    check_equal("invpcid-context", value(), 1);
    pt[1] = (word)frame_b | P | W | U | G;
    invpcid(2, 0, 0);
    check_equal("invpcid-all", value(), 2);
    pt[1] = (word)frame_a | P | W | U | G;
    invpcid(2, 0, 0);
    check_equal("invpcid-all-global", value(), 1);
    pt[1] = (word)frame_a | P | W | U;
    invpcid(2, 0, 0);
    value();
    pt[1] = (word)frame_b | P | W | U;
    invpcid(3, 0, 0);
    check_equal("invpcid-all-but-global", value(), 2);
    {
        u64 d[2] = {1 << 12, 0}, bad[2] = {0, BIT(56)};

        FAULTS("invpcid-gp-type", GP, 0, "invpcid %0, %1", : : "m"(d), "r"(4ULL));
        FAULTS("invpcid-gp-reserved", GP, 0, "invpcid %0, %1", : : "m"(d), "r"(1ULL));
        FAULTS("invpcid-gp-address", GP, 0, "invpcid %0, %1", : : "m"(bad), "r"(0ULL));
    }
    set_cr3((word)boot_pml4 | BIT(63));
    check("cr3-bit-63-is-not-kept", !(cr3() & BIT(63)));
    set_cr3((word)boot_pml4 | 7);
    FAULTS("gp-pcide-clear-is-fine", NONE, 0, "mov %0, %%cr4", : : "r"(cr4() & ~CR4_PCIDE));
    FAULTS("gp-pcide-with-pcid", GP, 0, "mov %0, %%cr4", : : "r"(cr4() | CR4_PCIDE));
    set_cr3((word)boot_pml4);
}

static void crossing(void)
{
    map(P | W | U, P | W | U, P | W | U, P | W | U);
    pt[2] = 0;
    flush();
    TRY("movl %%eax, (%0)", : : "r"(VA + 0xffe) : "memory");
    expect_pf("cross-page-store", PF_W, VA + 0x1000);
    frame_a[0xffe] = 7;
    TRY("movl $0x01010101, (%0)", : : "r"(VA + 0xffe) : "memory");
    check_equal("cross-page-store-is-all-or-nothing", frame_a[0xffe], 7);
    frame_a[0xfff] = 0x48; /* a prefix, and no more */
    TRY("call *%0", : : "r"(VA + 0xfff) : "memory");
    expect_pf("cross-page-fetch", PF_I, VA + 0x1000);
    check_equal("cross-page-fetch-ip", trap.ip, VA + 0xfff);
}

void guest_main(void)
{
    permissions();
    accessed_dirty();
    large_pages();
    supervisor_modes();
    keys();
    tlb();
    crossing();
}
