/*
 * The instructions that tell a user program about the machine without trapping (Robin and Irvine,
 * USENIX Security 2000), and their relatives: in ring 3, each behaves as on a real processor, under
 * every setting of IOPL, UMIP, TSD, PCE and FSGSBASE that governs it.
 */
#include "guest.h"

static struct table_pointer got;
static u16 selector;
static word reg;

static void tables(void)
{
    WORKS("sgdt", "sgdt %0", : "=m"(got) :);
    check("sgdt-value", got.base == gdt_pointer.base && got.limit == gdt_pointer.limit);
    WORKS("sidt", "sidt %0", : "=m"(got) :);
    check("sidt-value", got.base == idt_pointer.base && got.limit == idt_pointer.limit);
    selector = 1;
    WORKS("sldt", "sldt %0", : "=m"(selector) :);
    check_equal("sldt-value", selector, 0);
    WORKS("str", "str %0", : "=m"(selector) :);
    check_equal("str-value", selector, SEL_TSS);
    WORKS("smsw", "smsw %0", : "=r"(reg) :);
    check_equal("smsw-value", reg & 0xf, 0x3); /* PE, MP */
}

static void tables_umip(void)
{
    FAULTS("umip-sgdt", GP, 0, "sgdt %0", : "=m"(got) :);
    FAULTS("umip-sidt", GP, 0, "sidt %0", : "=m"(got) :);
    FAULTS("umip-sldt", GP, 0, "sldt %0", : "=m"(selector) :);
    FAULTS("umip-str", GP, 0, "str %0", : "=m"(selector) :);
    FAULTS("umip-smsw", GP, 0, "smsw %0", : "=r"(reg) :);
    FAULTS("umip-smsw-memory", GP, 0, "smsw %0", : "=m"(selector) :);
}

static void flags(void)
{
    word before = flags_get();

    WORKS("popf-if-ignored", "push %0; popf", : : "r"(before | (word)FLAG_IF) : "cc", "memory");
    check("popf-if-unchanged", !(flags_get() & FLAG_IF));
    WORKS("popf-iopl-ignored", "push %0; popf", : : "r"(before | FLAG_IOPL3) : "cc", "memory");
    check_equal("popf-iopl-unchanged", flags_get() & FLAG_IOPL3, before & FLAG_IOPL3);
    flags_set(before | (word)(FLAG_CF | FLAG_ZF));
    check_equal("popf-arithmetic", flags_get() & (FLAG_CF | FLAG_ZF), FLAG_CF | FLAG_ZF);
    flags_set(before | (word)BIT(21));
    check("popf-id", flags_get() & BIT(21));
    flags_set(before | (word)(FLAG_VIF | FLAG_VIP));
    check("popf-vif-vip-ignored", !(flags_get() & (FLAG_VIF | FLAG_VIP)));
    flags_set(before);
}

static void flags_iopl3(void)
{
    word before = flags_get();

    check_equal("pushf-shows-iopl", before & FLAG_IOPL3, FLAG_IOPL3);
    flags_set(before | FLAG_IF);
    check("iopl3-popf-if", flags_get() & FLAG_IF);
    flags_set(before & ~(word)FLAG_IF);
    check("iopl3-popf-if-clear", !(flags_get() & FLAG_IF));
    flags_set(before & ~(word)FLAG_IOPL3);
    check_equal("iopl3-popf-iopl-unchanged", flags_get() & FLAG_IOPL3, FLAG_IOPL3);
}

static bool zero_flag(void)
{
    return reg & FLAG_ZF;
}
#define PROBE(insn, ...)                                                                           \
    TRY(insn "; pushf; pop %0", : "=r"(reg) : __VA_ARGS__ : "cc", "memory", "eax")

static void segments(void)
{
    PROBE("lar %w1, %%eax", "r"(SEL_USER_DATA));
    check("lar-own-data", zero_flag());
    PROBE("lar %w1, %%eax", "r"(SEL_DATA));
    check("lar-hides-kernel-data", !zero_flag());
    PROBE("lar %w1, %%eax", "r"(0));
    check("lar-null", !zero_flag());
    PROBE("lsl %w1, %%eax", "r"(SEL_USER_DATA));
    check("lsl-own-data", zero_flag());
    PROBE("lsl %w1, %%eax", "r"(SEL_CODE));
    check("lsl-hides-kernel-code", !zero_flag());
    PROBE("verr %w1", "r"(SEL_USER_DATA));
    check("verr-own-data", zero_flag());
    PROBE("verr %w1", "r"(SEL_DATA));
    check("verr-kernel-data", !zero_flag());
    PROBE("verw %w1", "r"(SEL_USER_DATA));
    check("verw-own-data", zero_flag());
    PROBE("verw %w1", "r"(SEL_USER_CODE32));
    check("verw-code", !zero_flag());
    PROBE("verr %w1", "r"(0xfff8));
    check("verr-beyond-table", !zero_flag());
    __asm__("mov %%cs, %0" : "=r"(selector));
    check_equal("mov-from-cs-shows-rpl", selector & 3, 3);
    __asm__("mov %%ss, %0" : "=r"(selector));
    check_equal("mov-from-ss", selector, SEL_USER_DATA);
#ifndef __x86_64__
    __asm__ volatile("pushl %%cs; popl %0" : "=r"(reg));
    check_equal("push-cs", reg & 0xffff, SEL_USER_CODE32);
    PROBE("arpl %w1, %w2", "r"(3), "r"(SEL_DATA));
    check("arpl", zero_flag());
    TRY("pushl %0; popl %%ss", : : "r"(SEL_DATA) : "memory");
    check("pop-ss-gp", trap.vector == GP && trap.error == SEL_DATA);
#endif
    TRY("mov %0, %%ds", : : "r"(0));
    check_equal("mov-null-ds", (u64)(long long)trap.vector, (u64)(long long)NONE);
    __asm__ volatile("mov %0, %%ds" : : "r"(SEL_USER_DATA));
    TRY("mov %0, %%fs", : : "r"(SEL_DATA));
    check("mov-kernel-fs", trap.vector == GP && trap.error == SEL_DATA);
}

static void counters(void)
{
    WORKS("rdtsc", "rdtsc", : : : "eax", "edx");
    WORKS("cpuid", "cpuid", : : "a"(0) : "ebx", "ecx", "edx");
    FAULTS("rdpmc-without-pce", GP, 0, "rdpmc", : : "c"(0) : "eax", "edx");
    if (cpuid(0x80000001, 0).d & BIT(27))
        WORKS("rdtscp", "rdtscp", : : : "eax", "ecx", "edx");
    FAULTS("xgetbv-without-osxsave", UD, 0, "xgetbv", : : "c"(0) : "eax", "edx");
    FAULTS("xsetbv", UD, 0, "xsetbv", : : "a"(1), "c"(0), "d"(0));
    FAULTS("monitor", UD, 0, "monitor", : : "a"(got.base), "c"(0), "d"(0));
}

static void counters_tsd(void)
{
    FAULTS("tsd-rdtsc", GP, 0, "rdtsc", : : : "eax", "edx");
    if (cpuid(0x80000001, 0).d & BIT(27))
        FAULTS("tsd-rdtscp", GP, 0, "rdtscp", : : : "eax", "ecx", "edx");
}

static void counters_osxsave(void)
{
    WORKS("xgetbv", "xgetbv", : "=a"(reg) : "c"(0) : "edx");
    check("xgetbv-x87", reg & 1);
    FAULTS("xsetbv-gp", GP, 0, "xsetbv", : : "a"(1), "c"(0), "d"(0));
    check("cpuid-osxsave", cpuid(1, 0).c & BIT(27));
}

#ifdef __x86_64__
static void bases_off(void)
{
    FAULTS("rdfsbase-off", UD, 0, "rdfsbase %0", : "=r"(reg) :);
    FAULTS("wrgsbase-off", UD, 0, "wrgsbase %0", : : "r"(0ULL));
    FAULTS("swapgs-user", GP, 0, "swapgs", :);
}

static void bases_on(void)
{
    WORKS("wrfsbase", "wrfsbase %0", : : "r"(0x123456789ULL));
    WORKS("rdfsbase", "rdfsbase %0", : "=r"(reg) :);
    check_equal("rdfsbase-value", reg, 0x123456789ULL);
    FAULTS("wrfsbase-noncanonical", GP, 0, "wrfsbase %0", : : "r"(BIT(56)));
    WORKS("wrgsbase", "wrgsbase %0", : : "r"(1ULL << 40));
    WORKS("rdgsbase", "rdgsbase %0", : "=r"(reg) :);
    check_equal("rdgsbase-value", reg, 1ULL << 40);
}
#endif

void guest_main(void)
{
    run_user(tables, 0);
    if (cpuid(7, 0).c & BIT(2)) {
        set_cr4(cr4() | (word)CR4_UMIP);
        run_user(tables_umip, 0);
        WORKS("umip-ring-0", "sgdt %0", : "=m"(got) :);
        set_cr4(cr4() & ~(word)CR4_UMIP);
    } else {
        skip("umip", "not there");
    }
    run_user(flags, 0);
    run_user(flags_iopl3, FLAG_IOPL3);
    run_user(segments, 0);
    run_user(counters, 0);
    set_cr4(cr4() | (word)CR4_TSD);
    run_user(counters_tsd, 0);
    WORKS("tsd-ring-0", "rdtsc", : : : "eax", "edx");
    set_cr4(cr4() & ~(word)CR4_TSD);
    if (cpuid(1, 0).c & BIT(26)) {
        set_cr4(cr4() | (word)CR4_OSXSAVE);
        run_user(counters_osxsave, 0);
        set_cr4(cr4() & ~(word)CR4_OSXSAVE);
    } else {
        skip("xsave", "not there");
    }
#ifdef __x86_64__
    run_user(bases_off, 0);
    if (cpuid(7, 0).b & BIT(0)) {
        set_cr4(cr4() | CR4_FSGSBASE);
        run_user(bases_on, 0);
        set_cr4(cr4() & ~CR4_FSGSBASE);
    } else {
        skip("fsgsbase", "not there");
    }
#endif
}
