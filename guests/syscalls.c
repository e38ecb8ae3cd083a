/*
 * SYSCALL and SYSRET, SYSENTER and SYSEXIT in 64-bit and compatibility mode, with what differs
 * between the vendors.
 *
 * Intel SDM vol. 2, the instructions' pages; AMD APM vol. 3, the same.
 */
#include "guest.h"

#define MSR_STAR 0xc0000081
#define MSR_LSTAR 0xc0000082
#define MSR_CSTAR 0xc0000083
#define MSR_FMASK 0xc0000084
#define MSR_SYSENTER_CS 0x174
#define MSR_SYSENTER_ESP 0x175
#define MSR_SYSENTER_EIP 0x176

static volatile u64 got_rcx, got_r11, got_flags, got_cs, got_ss, got_sp, want_rcx, back_flags;
static volatile u64 back_cs, back_ss;
void syscall_entry(void);
void sysenter_entry(void);
void user_syscall(void);
void user_sysenter(void);

__asm__(".globl syscall_entry\n"
        "syscall_entry:\n"
        "    mov %rcx, got_rcx\n"
        "    mov %r11, got_r11\n"
        "    mov %rsp, got_sp\n"
        "    mov $stack_top - 16384, %rsp\n"
        "    pushf\n"
        "    popq got_flags\n"
        "    mov %cs, got_cs\n"
        "    mov %ss, got_ss\n"
        "    mov got_sp, %rsp\n"
        "    sysretq\n"
        ".globl user_syscall\n"
        "user_syscall:\n"
        "    movq $1f, want_rcx\n"
        "    stc\n"
        "    std\n"
        "    syscall\n"
        "1:  pushf\n"
        "    popq back_flags\n"
        "    cld\n"
        "    mov %cs, back_cs\n"
        "    mov %ss, back_ss\n"
        "    ret\n"
        ".globl sysenter_entry\n"
        "sysenter_entry:\n"
        "    mov %rsp, got_sp\n"
        "    pushf\n"
        "    popq got_flags\n"
        "    mov %cs, got_cs\n"
        "    mov %ss, got_ss\n"
        "    mov %r8, %rdx\n"
        "    mov %r9, %rcx\n"
        "    sysexitq\n"
        ".globl user_sysenter\n"
        "user_sysenter:\n"
        "    mov $1f, %r8\n"
        "    mov %rsp, %r9\n"
        "    sysenter\n"
        "1:  mov %cs, back_cs\n"
        "    mov %ss, back_ss\n"
        "    ret\n");

void user32_syscall(void), user32_sysenter(void), syscall32_entry(void), sysenter32_entry(void);

/* The same from compatibility mode: SYSCALL by CSTAR (AMD), SYSENTER (Intel); back by the 32-bit
 * forms. */
__asm__("syscall32_entry:\n"
        "    mov %rcx, got_rcx\n"
        "    mov %cs, got_cs\n"
        "    sysretl\n"
        "sysenter32_entry:\n"
        "    mov %cs, got_cs\n"
        "    mov %esi, %edx\n"
        "    mov %edi, %ecx\n"
        "    sysexitl\n"
        ".code32\n"
        "user32_syscall:\n"
        "    syscall\n"
        "    mov %cs, back_cs\n"
        "    ret\n"
        "user32_sysenter:\n"
        "    movl $1f, %esi\n"
        "    mov %esp, %edi\n"
        "    sysenter\n"
        "1:  mov %cs, back_cs\n"
        "    mov %ss, back_ss\n"
        "    ret\n"
        ".code64\n");

/* Runs fn() in compatibility mode; true when it returned, to 32-bit code that ends by INT. */
static bool run_user32(void (*fn)(void))
{
    static const u8 done[] = {0xcd, VECTOR_USER_DONE};
    u32 *sp = (u32 *)(user_stack + sizeof(user_stack) - 64);

    trap.vector = NONE;
    *--sp = (u32)(word)done;
    __asm__ volatile("mov %0, %%ds; mov %0, %%es" : : "r"(SEL_USER_DATA));
    user_enter((word)fn, (word)sp, 2, SEL_USER_CODE32, SEL_USER_DATA);
    user_kernel_sp = 0;
    return trap.vector == NONE;
}

static void user_privileged(void)
{
    FAULTS("sysret-in-user-mode", GP, 0, "sysretq", : : "c"(0) : "memory");
    if (!cpu_is_amd())
        FAULTS("sysexit-in-user-mode", GP, 0, "sysexitq", : : "c"(0), "d"(0) : "memory");
}

static void canonical(void)
{
    if (!cpu_is_amd()) {
        FAULTS("sysret-noncanonical", GP, 0, "sysretq", : : "c"(BIT(50) << 7) : "memory", "r11");
        FAULTS("sysexit-noncanonical-ip", GP, 0, "sysexitq", : : "d"(BIT(63)), "c"(0) : "memory");
        FAULTS("sysexit-noncanonical-sp", GP, 0, "sysexitq", : : "d"(0), "c"(BIT(63)) : "memory");
    }
    FAULTS("wrmsr-cstar-noncanonical", GP, 0, "wrmsr", : : "c"(MSR_CSTAR), "a"(0), "d"(0x01000000));
    FAULTS("wrmsr-sysenter-eip-noncanonical", GP, 0, "wrmsr",
           :
           : "c"(MSR_SYSENTER_EIP), "a"(0), "d"(0x01000000));
    FAULTS("wrmsr-sysenter-esp-noncanonical", GP, 0, "wrmsr",
           :
           : "c"(MSR_SYSENTER_ESP), "a"(0), "d"(0x01000000));
}

static void compatibility(void)
{
    wrmsr(MSR_CSTAR, (word)syscall32_entry);
    got_cs = back_cs = 0;
    if (cpu_is_amd()) {
        check("amd-syscall-in-compatibility-mode", run_user32(user32_syscall));
        check_equal("amd-syscall-by-cstar", got_cs, SEL_CODE);
        check_equal("amd-syscall-rcx", got_rcx, (word)user32_syscall + 2);
        check_equal("amd-sysret-to-32-bits", back_cs, SEL_USER_CODE32);
        if (on_tcg()) {
            skip("amd-sysenter-ud-in-compatibility-mode", "TCG obeys");
            return;
        }
        run_user32(user32_sysenter);
        check_equal("amd-sysenter-ud-in-compatibility-mode", (u64)trap.vector, UD);
        return;
    }
    run_user32(user32_syscall);
    check_equal("intel-syscall-ud-in-compatibility-mode", (u64)trap.vector, UD);
    wrmsr(MSR_SYSENTER_CS, SEL_CODE);
    wrmsr(MSR_SYSENTER_EIP, (word)sysenter32_entry);
    check("sysenter-in-compatibility-mode", run_user32(user32_sysenter));
    check_equal("sysenter-to-64-bits", got_cs, SEL_CODE);
    check_equal("sysexit-to-32-bits-cs", back_cs, SEL_USER_CODE32);
    check_equal("sysexit-to-32-bits-ss", back_ss, SEL_USER_DATA);
}

void guest_main(void)
{
    wrmsr(MSR_STAR, (u64)SEL_CODE << 32 | (u64)SEL_USER_CODE32 << 48);
    wrmsr(MSR_LSTAR, (word)syscall_entry);
    wrmsr(MSR_FMASK, FLAG_IF | FLAG_DF | FLAG_TF);
    run_user(user_syscall, 0);
    check_equal("syscall-off-ud", (u64)trap.vector, UD);
    FAULTS("sysret-off-ud", UD, 0, "sysretq", : : "c"(0) : "memory");
    wrmsr(MSR_EFER, rdmsr(MSR_EFER) | EFER_SCE);
    check("syscall-returns", run_user(user_syscall, FLAG_IF));
    check_equal("syscall-rcx", got_rcx, want_rcx);
    check_equal("syscall-r11", got_r11 & (FLAG_CF | FLAG_DF | FLAG_IF),
                FLAG_CF | FLAG_DF | FLAG_IF);
    check_equal("syscall-fmask", got_flags & (FLAG_CF | FLAG_DF | FLAG_IF), FLAG_CF);
    check_equal("syscall-cs", got_cs, SEL_CODE);
    check_equal("syscall-ss", got_ss, SEL_DATA);
    check_equal("sysret-cs", back_cs, SEL_USER_CODE64);
    check_equal("sysret-ss", back_ss, SEL_USER_DATA);
    check_equal("sysret-flags", back_flags & (FLAG_CF | FLAG_DF | FLAG_IF),
                FLAG_CF | FLAG_DF | FLAG_IF);
    FAULTS("wrmsr-lstar-noncanonical", GP, 0, "wrmsr", : : "c"(MSR_LSTAR), "a"(0), "d"(0x01000000));
    wrmsr(MSR_SYSENTER_CS, SEL_CODE);
    check("run-user", run_user(user_privileged, 0));
    canonical();
    compatibility();

    wrmsr(MSR_SYSENTER_ESP, (word)trap_stack + sizeof(trap_stack));
    wrmsr(MSR_SYSENTER_EIP, (word)sysenter_entry);
    if (cpu_is_amd()) {
        wrmsr(MSR_SYSENTER_CS, SEL_CODE);
        run_user(user_sysenter, 0);
        check_equal("amd-sysenter-ud-in-long-mode", (u64)trap.vector, UD);
        FAULTS("amd-sysexit-ud-in-long-mode", UD, 0, "sysexitq", :);
        return;
    }
    wrmsr(MSR_SYSENTER_CS, 0);
    run_user(user_sysenter, 0);
    check("sysenter-cs-null", trap.vector == GP && trap.error == 0);
    wrmsr(MSR_SYSENTER_CS, SEL_CODE);
    check("sysenter-returns", run_user(user_sysenter, FLAG_IF));
    check_equal("sysenter-sp", got_sp, (word)trap_stack + sizeof(trap_stack));
    check_equal("sysenter-cs", got_cs, SEL_CODE);
    check_equal("sysenter-ss", got_ss, SEL_DATA);
    check("sysenter-if", !(got_flags & FLAG_IF));
    check_equal("sysexit-cs", back_cs, SEL_USER_CODE64);
    check_equal("sysexit-ss", back_ss, SEL_USER_DATA2);
}
