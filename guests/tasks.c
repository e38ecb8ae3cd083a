/*
 * Segments and tasks in 32-bit protected mode: limits, expand-down, null selectors, call gates with
 * parameters, hardware task switches by JMP, CALL, a task gate and IRET, and virtual-8086 mode with
 * and without VME.
 *
 * Intel SDM vol. 3, chapters 3, 5, 7 and 20.
 */
#include "guest.h"

#define SEL_SEGMENT SEL_FREE
#define SEL_CALL_GATE (SEL_FREE + 8)
#define SEL_TASK (SEL_FREE + 16)
#define VECTOR_TASK 0x45

static u8 area[256] __attribute__((aligned(16)));
struct tss task;
static u8 task_stack[4096];
volatile u32 gate_sum, gate_cs, gate_ss, gate_sp, task_runs, task_flags, task_link;
volatile u32 gate_left; /* what is left on the stack after a gate */

static void load_es(u64 d)
{
    gdt[SEL_SEGMENT / 8] = d;
    __asm__ volatile("mov %0, %%es" : : "r"(SEL_SEGMENT) : "memory");
}

static void unload_es(void)
{
    __asm__ volatile("mov %0, %%es" : : "r"(SEL_DATA));
}

static void limits(void)
{
    load_es(descriptor((u32)area, 0x1f, 0x92, 4));
    check("accessed-bit-is-set", gdt[SEL_SEGMENT / 8] & BIT(40));
    WORKS("limit-last-byte", "movb %%es:0x1f, %%al", : : : "eax");
    FAULTS("limit-beyond", GP, 0, "movb %%es:0x20, %%al", : : : "eax");
    FAULTS("limit-dword-across", GP, 0, "movl %%es:0x1d, %%eax", : : : "eax");
    WORKS("limit-dword-last", "movl %%es:0x1c, %%eax", : : : "eax");
    FAULTS("limit-wraps", GP, 0, "movl %%es:0xffffffff, %%eax", : : : "eax");
    load_es(descriptor((u32)area, 0x1f, 0x90, 4));
    WORKS("read-only-load", "movb %%es:0, %%al", : : : "eax");
    FAULTS("read-only-store", GP, 0, "movb %%al, %%es:0", : : : "memory");
    load_es(descriptor((u32)area, 0x1f, 0x96, 4)); /* expand-down */
    FAULTS("expand-down-inside", GP, 0, "movb %%es:0x1f, %%al", : : : "eax");
    WORKS("expand-down-above", "movb %%es:0x20, %%al", : : : "eax");
    load_es(descriptor((u32)area, 0x1f, 0x96, 0));
    FAULTS("expand-down-16-bit-top", GP, 0, "movb %%es:0x10000, %%al", : : : "eax");
    load_es(descriptor((u32)area, 0x1f, 0x9a, 4));
    WORKS("code-load", "movb %%es:0, %%al", : : : "eax");
    FAULTS("code-store", GP, 0, "movb %%al, %%es:0", : : : "memory");
    load_es(descriptor(0, 0, 0x92, 0xc));
    WORKS("granularity-4k", "movb %%es:0xfff, %%al", : : : "eax");
    FAULTS("granularity-4k-beyond", GP, 0, "movb %%es:0x1000, %%al", : : : "eax");
    unload_es();
}

/* Called through the gate with two parameters from ring 3. */
void gate_target(void);
void gate_user(void);
__asm__(".globl gate_target\n"
        "gate_target:\n"
        "    movl 8(%esp), %eax\n"
        "    addl 12(%esp), %eax\n"
        "    movl %eax, %ss:gate_sum\n"
        "    movl %cs, %eax\n"
        "    movl %eax, %ss:gate_cs\n"
        "    movl %ss, %eax\n"
        "    movl %eax, %ss:gate_ss\n"
        "    movl %esp, %ss:gate_sp\n"
        "    lret $8\n"
        ".globl gate_user\n"
        "gate_user:\n"
        "    movl %esp, %edx\n"
        "    pushl $30\n"
        "    pushl $12\n"
        "    lcall $0x73, $0\n"
        "    subl %esp, %edx\n"
        "    movl %edx, gate_left\n"
        "    ret\n");

static void user_gates(void)
{
    FAULTS("call-kernel-code", GP, SEL_CODE, "lcall $0x08, $0", :);
    FAULTS("jump-data", GP, SEL_USER_DATA & ~3, "ljmp $0x23, $0", :);
    FAULTS("call-null", GP, 0, "lcall $0, $0", :);
}

static void gates(void)
{
    gdt[SEL_CALL_GATE / 8] = ((u32)gate_target & 0xffff) | (u64)SEL_CODE << 16 | 2ULL << 32 |
                             0xecULL << 40 | (u64)((u32)gate_target >> 16) << 48;
    gate_left = 1;
    check("call-gate-returns", run_user(gate_user, 0));
    check_equal("call-gate-parameters", gate_sum, 42);
    check_equal("call-gate-cs", gate_cs, SEL_CODE);
    check_equal("call-gate-ss", gate_ss, SEL_DATA);
    check_equal("call-gate-sp", gate_sp, (u32)trap_stack + sizeof(trap_stack) - 24);
    check_equal("call-gate-retf-pops-both-stacks", gate_left, 0);
    gdt[SEL_CALL_GATE / 8] &= ~BIT(47);
    run_user(gate_user, 0);
    check("call-gate-absent", trap.vector == NP && trap.error == SEL_CALL_GATE);
    gdt[SEL_CALL_GATE / 8] = (gdt[SEL_CALL_GATE / 8] | BIT(47)) & ~(3ULL << 45);
    run_user(gate_user, 0);
    check("call-gate-dpl", trap.vector == GP && trap.error == SEL_CALL_GATE);
    run_user(user_gates, 0);
}

void task_entry(void);
__asm__(".globl task_entry\n"
        "task_entry:\n"
        "    incl task_runs\n"
        "    pushf\n"
        "    popl task_flags\n"
        "    movzwl task_tss, %eax\n"
        "    movl %eax, task_link\n"
        "    iret\n"
        "    jmp task_entry\n"
        ".globl task_jump\n"
        "task_jump:\n"
        "    incl task_runs\n"
        "    pushf\n"
        "    popl task_flags\n"
        "    ljmp $0x38, $0\n"
        ".set task_tss, task\n");
void task_jump(void);

static void prepare_task(void (*entry)(void))
{
    memset(&task, 0, 104);
    task.ip = (u32)entry;
    task.flags = 2;
    task.sp = (u32)task_stack + sizeof(task_stack);
    task.cs = SEL_CODE;
    task.ss = task.ds = task.es = task.fs = task.gs = SEL_DATA;
    task.iomap = 104;
    gdt[SEL_TASK / 8] = descriptor((u32)&task, 103, 0x89, 0);
}

static u8 type_of(u16 sel)
{
    return (u8)(gdt[sel / 8] >> 40 & 0x1f);
}

static void switches(void)
{
    task_runs = 0;
    prepare_task(task_entry);
    __asm__ volatile("lcall $0x78, $0" : : : "memory", "cc", "eax");
    check_equal("task-call", task_runs, 1);
    check("task-call-sets-nt", task_flags & FLAG_NT);
    check_equal("task-call-link", task_link & 0xffff, SEL_TSS);
    check_equal("task-call-returned-busy", type_of(SEL_TSS), 0xb);
    check_equal("task-call-left-available", type_of(SEL_TASK), 0x9);
    check("task-iret-clears-nt", !(task.flags & FLAG_NT) && !(flags_get() & FLAG_NT));
    check("task-sets-ts", cr0() & CR0_TS);
    __asm__ volatile("clts");

    prepare_task(task_jump);
    __asm__ volatile("ljmp $0x78, $0" : : : "memory", "cc", "eax");
    check_equal("task-jump", task_runs, 2);
    check("task-jump-no-nt", !(task_flags & FLAG_NT));
    check_equal("task-jump-busy", type_of(SEL_TSS), 0xb);

    prepare_task(task_entry);
    idt[VECTOR_TASK] = (struct gate){.selector = SEL_TASK, .type = GATE_TASK};
    __asm__ volatile("int $0x45" : : : "memory", "cc", "eax");
    check_equal("task-gate-int", task_runs, 3);
    check("task-gate-int-nt", task_flags & FLAG_NT);

    prepare_task(task_entry);
    gdt[SEL_TASK / 8] |= 2ULL << 40;
    FAULTS("task-busy", GP, SEL_TASK, "lcall $0x78, $0", :);
    prepare_task(task_entry);
    gdt[SEL_TASK / 8] &= ~BIT(47);
    FAULTS("task-absent", NP, SEL_TASK, "lcall $0x78, $0", :);
    gdt[SEL_TASK / 8] = descriptor((u32)&task, 102, 0x89, 0);
    FAULTS("task-short", TS, SEL_TASK, "lcall $0x78, $0", :);
    prepare_task(task_entry);
    task.trace = 1;
    set_dr6(0xffff0ff0);
    TRY("lcall $0x78, $0", : : : "memory", "cc", "eax");
    check("task-t-bit", trap.vector == DB && dr6() & BIT(15));
    /* The new task is left for good: the old one's TR, without NT. */
    flags_set(flags_get() & ~(word)FLAG_NT);
    load_tr();

    __asm__ volatile("clts");
}

/* Virtual-8086 mode: `code` runs at 0x7000:0 until it raises an exception, which is in `trap`. */
void v86_enter(u32 flags);
__asm__(".globl v86_enter\n"
        "v86_enter:\n"
        "    pushl %ebx\n"
        "    pushl %ebp\n"
        "    pushl %esi\n"
        "    pushl %edi\n"
        "    movl %esp, user_kernel_sp\n"
        "    movl 20(%esp), %ecx\n"
        "    movl $0x1234, %eax\n"
        "    pushl $0x7000\n" /* GS, FS, DS, ES, SS */
        "    pushl $0x7000\n"
        "    pushl $0x7000\n"
        "    pushl $0x7000\n"
        "    pushl $0x7000\n"
        "    pushl $0xff00\n"
        "    pushl %ecx\n"
        "    pushl $0x7000\n"
        "    pushl $0\n"
        "    iretl\n");

static void v86(const u8 *code, u32 length, u32 flags)
{
    memcpy((void *)0x70000, code, length);
    trap.vector = NONE;
    v86_enter(flags | FLAG_VM | 2);
    user_kernel_sp = 0;
}
#define V86(flags, ...)                                                                            \
    do {                                                                                           \
        static const u8 code[] = {__VA_ARGS__};                                                    \
                                                                                                   \
        v86(code, sizeof(code), flags);                                                            \
    } while (0)

static void expect_v86(const char *name, int vector, u32 error, u32 ip)
{
    check(name,
          trap.vector == vector && trap.error == error && trap.ip == ip && trap.flags & FLAG_VM);
}

static void virtual_8086(void)
{
    volatile u8 *low = (volatile u8 *)0x70000;

    V86(0, 0x0f, 0x0b);
    expect_v86("v86-ud2", UD, 0, 0);
    check_equal("v86-cs", trap.cs, 0x7000);
    V86(FLAG_IOPL3, 0xc6, 0x06, 0x00, 0x01, 0x5a, 0x0f, 0x0b); /* movb $0x5a, 0x100 */
    expect_v86("v86-store", UD, 0, 5);
    check_equal("v86-segment-base", low[0x100], 0x5a);
    V86(0, 0xfa);
    expect_v86("v86-cli-iopl0", GP, 0, 0);
    V86(0, 0x9c);
    expect_v86("v86-pushf-iopl0", GP, 0, 0);
    V86(0, 0xcd, 0x10);
    expect_v86("v86-int-iopl0", GP, 0, 0);
    V86(FLAG_IOPL3, 0xcd, 0x40);
    expect_v86("v86-int-iopl3-dpl0", GP, 0x40 * 8 + 2, 0);
    V86(FLAG_IOPL3, 0xfa, 0xfb, 0x9c, 0x9d, 0x0f, 0x0b);
    expect_v86("v86-cli-iopl3", UD, 0, 4);
    V86(0, 0xf4);
    expect_v86("v86-hlt", GP, 0, 0);
    V86(0, 0xe4, 0x60);
    expect_v86("v86-in-by-map", GP, 0, 0);
    V86(FLAG_IOPL3, 0xe4, 0x60);
    expect_v86("v86-in-ignores-iopl", GP, 0, 0);
    V86(0, 0x0f, 0x00, 0xc8);
    expect_v86("v86-str-ud", UD, 0, 0);
    V86(0, 0x0f, 0x20, 0xc0);
    expect_v86("v86-mov-cr0", GP, 0, 0);
    V86(0, 0xa1, 0xff, 0xff);
    expect_v86("v86-word-at-ffff", GP, 0, 0);
    V86(0, 0x67, 0x66, 0xa1, 0, 0, 1, 0);
    expect_v86("v86-limit", GP, 0, 0);
    set_cr4(cr4() | (word)CR4_VME);
    V86(0, 0xfb, 0x0f, 0x0b);
    expect_v86("vme-sti", UD, 0, 1);
    check("vme-sti-sets-vif", trap.flags & FLAG_VIF && !(trap.flags & FLAG_IF));
    V86(FLAG_VIF, 0xfa, 0x0f, 0x0b);
    check("vme-cli-clears-vif", trap.vector == UD && !(trap.flags & FLAG_VIF));
    V86(FLAG_VIP, 0xfb);
    expect_v86("vme-sti-with-vip", GP, 0, 0);
    V86(FLAG_VIF, 0x9c, 0x58, 0x0f, 0x0b);
    check("vme-pushf-shows-vif",
          trap.vector == UD && (((struct frame *)trap.frame)->ax & 0x3200) == 0x3200);
    set_cr4(cr4() & ~(word)CR4_VME);
}

void guest_main(void)
{
    limits();
    gates();
    switches();
    virtual_8086();
}
