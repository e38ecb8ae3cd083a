/*
 * The trial guest: whether this host's KVM is worth taking.
 *
 * That /dev/kvm opens says little. There are hosts, virtual machines themselves, whose KVM runs
 * real-mode code in an emulator and never gets a 64-bit kernel to boot. So `auto` lets KVM run what
 * such a kernel does: 64-bit code in ring 0 that reads EFER, loads CR3, takes a page fault through
 * its IDT and returns from it, and computes. The same computation is run by this process, and the
 * guest must have its result, in about its time. A guest that hangs is ended by a timer.
 *
 * Time is the thread's CPU time, which counts the guest's: other processes on the same processor
 * make no KVM look slow, or hang.
 */
#define _GNU_SOURCE /* gettid */
#include "engine/kvm/kvm.h"
#include "x86/regs.h"

#include <errno.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#ifndef sigev_notify_thread_id
#define sigev_notify_thread_id _sigev_un._tid
#endif

#define ITERATIONS 100000u
#define TIMEOUT_NS (10 * 1000 * 1000)
#define TIMEOUT_REPEAT_NS (1000 * 1000) /* a signal that comes just before KVM_RUN is missed */

/* The guest may take this many times the computation's native time, entry and faults included. */
#define SLOWDOWN_MAX 8

/* The guest's memory, in pages: tables, code, and the computation's own page. */
#define GUEST_PML4 0x1000u
#define GUEST_PDPT 0x2000u
#define GUEST_PD 0x3000u
#define GUEST_GDT 0x4000u
#define GUEST_IDT 0x5000u
#define GUEST_CODE 0x6000u
#define GUEST_TABLE 0x7000u
#define GUEST_STACK_TOP 0x9000u
#define GUEST_SIZE 0x9000u
#define GUEST_UNMAPPED 0x400000u
#define GUEST_PORT 0x80

#define MAX_CPUID 256

#define SELECTOR_CODE 8
#define SELECTOR_DATA 16

/*
 * u64 kvm_trial_compute(u64 table[512], u64 iterations): a chain of multiplications, with loads and
 * stores that depend on it. Runs in the guest and in this process, so position-independent.
 * kvm_trial_guest: the guest's entry; kvm_trial_fault: its page fault handler, which skips the
 * faulting instruction of 3 bytes and leaves CR2 in RBX.
 */
__asm__(".pushsection .text\n"
        "kvm_trial_guest:\n"
        "    mov $0xc0000080, %ecx\n" /* EFER */
        "    rdmsr\n"
        "    test $0x400, %eax\n" /* LMA */
        "    jz 1f\n"
        "    mov %cr3, %rax\n"
        "    mov %rax, %cr3\n"
        "    mov $0x400000, %eax\n" /* GUEST_UNMAPPED */
        "    movb $0, (%rax)\n"
        "    mov $0x7000, %edi\n" /* GUEST_TABLE */
        "    mov $100000, %esi\n" /* ITERATIONS */
        "    call kvm_trial_compute\n"
        "    add %rbx, %rax\n"
        "    out %eax, $0x80\n" /* GUEST_PORT */
        "1:  hlt\n"
        "    jmp 1b\n"
        "kvm_trial_fault:\n"
        "    add $8, %rsp\n"
        "    addq $3, (%rsp)\n"
        "    mov %cr2, %rbx\n"
        "    iretq\n"
        "kvm_trial_compute:\n"
        "    mov %rsi, %rax\n"
        "    movabs $0x9e3779b97f4a7c15, %rcx\n"
        "2:  imul %rcx, %rax\n"
        "    mov %rax, %rdx\n"
        "    shr $55, %rdx\n"
        "    add (%rdi, %rdx, 8), %rax\n"
        "    mov %rax, (%rdi, %rdx, 8)\n"
        "    dec %rsi\n"
        "    jnz 2b\n"
        "    ret\n"
        "kvm_trial_end:\n"
        ".popsection\n");

extern const u8 kvm_trial_guest[], kvm_trial_fault[], kvm_trial_end[];
u64 kvm_trial_compute(u64 *table, u64 iterations);

struct trial {
    int dev, vm, vcpu;
    size_t run_size;
    struct kvm_run *run;
    u8 *memory;
};

static u64 thread_ns(void)
{
    struct timespec ts;

    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &ts);
    return (u64)ts.tv_sec * NS_PER_SEC + (u64)ts.tv_nsec;
}

static void put64(struct trial *t, u64 at, u64 value)
{
    memcpy(t->memory + at, &value, sizeof(value));
}

/* One large page maps the guest's memory where it is; all beyond it is missing. */
static void fill_memory(struct trial *t)
{
    u64 handler = GUEST_CODE + ((uintptr_t)kvm_trial_fault - (uintptr_t)kvm_trial_guest);

    put64(t, GUEST_PML4, GUEST_PDPT | PTE_P | PTE_W);
    put64(t, GUEST_PDPT, GUEST_PD | PTE_P | PTE_W);
    put64(t, GUEST_PD, PTE_PS | PTE_P | PTE_W);
    put64(t, GUEST_GDT + SELECTOR_CODE, 0x00af9b000000ffffULL);
    put64(t, GUEST_GDT + SELECTOR_DATA, 0x00cf93000000ffffULL);
    put64(t, GUEST_IDT + 16 * EXC_PF,
          (handler & 0xffff) | SELECTOR_CODE << 16 | 0x8eULL << 40 | (handler >> 16) << 48);
    memcpy(t->memory + GUEST_CODE, kvm_trial_guest,
           (uintptr_t)kvm_trial_end - (uintptr_t)kvm_trial_guest);
}

static int open_trial(struct trial *t, struct error *err)
{
    struct kvm_userspace_memory_region region = {.memory_size = GUEST_SIZE};
    void *p;
    int size;

    t->dev = kvm_host_open(err);
    if (t->dev < 0)
        return t->dev;
    t->vm = ioctl(t->dev, KVM_CREATE_VM, 0UL);
    if (t->vm < 0)
        return error_host(err, errno, "KVM cannot create a VM");
    p = mmap(NULL, GUEST_SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED)
        return error_host(err, errno, "no memory for KVM's trial");
    t->memory = p;
    fill_memory(t);
    region.userspace_addr = (u64)(uintptr_t)t->memory;
    if (ioctl(t->vm, KVM_SET_USER_MEMORY_REGION, &region) < 0)
        return error_host(err, errno, "KVM_SET_USER_MEMORY_REGION");
    t->vcpu = ioctl(t->vm, KVM_CREATE_VCPU, 0UL);
    size = ioctl(t->dev, KVM_GET_VCPU_MMAP_SIZE, 0);
    if (t->vcpu < 0 || size < 0)
        return error_host(err, errno, "KVM cannot create a vCPU");
    p = mmap(NULL, (size_t)size, PROT_READ | PROT_WRITE, MAP_SHARED, t->vcpu, 0);
    if (p == MAP_FAILED)
        return error_host(err, errno, "cannot map a vCPU");
    t->run = p;
    t->run_size = (size_t)size;
    return kvm_time_check(t->vcpu, err);
}

static void close_trial(struct trial *t)
{
    if (t->run)
        munmap(t->run, t->run_size);
    if (t->vcpu >= 0)
        close(t->vcpu);
    if (t->vm >= 0)
        close(t->vm);
    if (t->memory)
        munmap(t->memory, GUEST_SIZE);
    if (t->dev >= 0)
        close(t->dev);
}

/* Long mode needs a processor that is told that it has it. */
static int set_cpuid(struct trial *t, struct error *err)
{
    union {
        struct kvm_cpuid2 head;
        u8 room[sizeof(struct kvm_cpuid2) + MAX_CPUID * sizeof(struct kvm_cpuid_entry2)];
    } table;

    table.head = (struct kvm_cpuid2){.nent = MAX_CPUID};
    if (ioctl(t->dev, KVM_GET_SUPPORTED_CPUID, &table) < 0 ||
        ioctl(t->vcpu, KVM_SET_CPUID2, &table) < 0)
        return error_host(err, errno, "KVM's CPUID");
    return 0;
}

static int set_registers(struct trial *t, struct error *err)
{
    struct kvm_regs regs = {.rip = GUEST_CODE, .rsp = GUEST_STACK_TOP, .rflags = EFLAGS_FIXED};
    struct kvm_segment data = {.limit = 0xffffffff,
                               .selector = SELECTOR_DATA,
                               .present = 1,
                               .type = 3,
                               .db = 1,
                               .s = 1,
                               .g = 1};
    struct kvm_segment code = data;
    struct kvm_sregs sregs;
    int ret = set_cpuid(t, err);

    if (ret)
        return ret;
    if (ioctl(t->vcpu, KVM_GET_SREGS, &sregs) < 0)
        return error_host(err, errno, "KVM_GET_SREGS");
    code.selector = SELECTOR_CODE;
    code.type = 11;
    code.db = 0;
    code.l = 1;
    sregs.cs = code;
    sregs.ds = sregs.es = sregs.fs = sregs.gs = sregs.ss = data;
    sregs.gdt = (struct kvm_dtable){.base = GUEST_GDT, .limit = 23};
    sregs.idt = (struct kvm_dtable){.base = GUEST_IDT, .limit = 16 * 32 - 1};
    sregs.cr0 = CR0_PE | CR0_ET | CR0_NE | CR0_WP | CR0_PG;
    sregs.cr3 = GUEST_PML4;
    sregs.cr4 = CR4_PAE;
    sregs.efer = EFER_LME | EFER_LMA;
    if (ioctl(t->vcpu, KVM_SET_SREGS, &sregs) < 0)
        return error_host(err, errno, "KVM refuses a vCPU in 64-bit mode");
    if (ioctl(t->vcpu, KVM_SET_REGS, &regs) < 0)
        return error_host(err, errno, "KVM_SET_REGS");
    return 0;
}

/* KVM_RUN, ended by a timer when the guest doesn't leave by itself. */
static int run_guest(struct trial *t, struct error *err)
{
    struct sigevent event = {.sigev_notify = SIGEV_THREAD_ID, .sigev_signo = KVM_KICK_SIGNAL};
    const struct itimerspec when = {.it_value.tv_nsec = TIMEOUT_NS,
                                    .it_interval.tv_nsec = TIMEOUT_REPEAT_NS};
    int ret, error;
    timer_t timer;

    event.sigev_notify_thread_id = gettid();
    if (timer_create(CLOCK_THREAD_CPUTIME_ID, &event, &timer) < 0)
        return error_host(err, errno, "no timer for KVM's trial");
    timer_settime(timer, 0, &when, NULL);
    ret = ioctl(t->vcpu, KVM_RUN, 0);
    error = errno;
    timer_delete(timer);
    if (ret < 0 && error == EINTR)
        return error_host(err, ETIME,
                          "KVM hangs in a 64-bit guest that computes for a millisecond");
    return ret < 0 ? error_host(err, error, "KVM_RUN") : 0;
}

static int judge(struct trial *t, u64 guest_ns, struct error *err)
{
    static u64 table[512];
    u64 begin, want, native_ns;
    u32 got = 0;

    begin = thread_ns();
    memset(table, 0, sizeof(table));
    want = kvm_trial_compute(table, ITERATIONS) + GUEST_UNMAPPED;
    native_ns = thread_ns() - begin;
    if (t->run->exit_reason != KVM_EXIT_IO || t->run->io.port != GUEST_PORT)
        return error_host(err, EIO, "KVM fails in a small 64-bit guest (exit reason %u)",
                          t->run->exit_reason);
    memcpy(&got, (u8 *)t->run + t->run->io.data_offset, sizeof(got));
    if (got != (u32)want)
        return error_host(err, EIO, "KVM computes wrongly in a small 64-bit guest");
    if (guest_ns > native_ns * SLOWDOWN_MAX)
        return error_host(err, ETIME, "KVM is %llu times slower than the processor",
                          (unsigned long long)(guest_ns / native_ns));
    return 0;
}

int kvm_trial(struct error *err)
{
    struct trial t = {.dev = -1, .vm = -1, .vcpu = -1};
    int ret = kvm_run_init(err);
    u64 begin;

    if (!ret)
        ret = open_trial(&t, err);
    if (!ret)
        ret = set_registers(&t, err);
    if (!ret) {
        begin = thread_ns();
        ret = run_guest(&t, err);
        if (!ret)
            ret = judge(&t, thread_ns() - begin, err);
    }
    close_trial(&t);
    return ret;
}
