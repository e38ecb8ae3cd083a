/*
 * What a translator gets wrong that takes much for granted: code that another page's code calls is mapped over, RSP
 * goes where no stack is, string instructions fault half way, flags are asked for behind a return. Not measured: a run
 * is a checksum.
 */
#define _GNU_SOURCE
#include "bench.h"

#include <setjmp.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <ucontext.h>
#include <unistd.h>

#ifdef __x86_64__

#define PAGE 4096
#define HOT 20000 /* calls: enough for any translator */

static void *map(void *at, size_t size, int protection, int fd, off_t offset)
{
    int flags = (fd < 0 ? MAP_PRIVATE | MAP_ANONYMOUS : MAP_SHARED) | (at ? MAP_FIXED : 0);
    void *got = mmap(at, size, protection, flags, fd, offset);

    if (got == MAP_FAILED)
        die("mmap");
    return got;
}

/* --- Faults that are expected --- */

static sigjmp_buf behind_fault;
static greg_t at_fault[NGREG];
static u8 signal_stack[64 * 1024];

static void on_fault(int sig, siginfo_t *info, void *context)
{
    (void)sig;
    (void)info;
    memcpy(at_fault, ((ucontext_t *)context)->uc_mcontext.gregs, sizeof(at_fault));
    siglongjmp(behind_fault, 1);
}

static void expect_faults(int on)
{
    stack_t stack = {.ss_sp = signal_stack, .ss_size = sizeof(signal_stack)};
    struct sigaction action = {.sa_flags = SA_ONSTACK | SA_SIGINFO};

    if (on)
        action.sa_sigaction = on_fault;
    else
        action.sa_handler = SIG_DFL;
    sigaltstack(&stack, NULL);
    sigaction(SIGSEGV, &action, NULL);
}

/* --- Code that is mapped over --- */

/* File pages with a function each; where they are mapped the caller's CALL leads. */
enum { FIRST = 11, SECOND = 22, WRITTEN = 33, FUNCTIONS = 2 };

static u64 call_hot(u32 (*caller)(void), unsigned count)
{
    u64 sum = 0;

    while (count--)
        sum += caller();
    return sum;
}

static void put_function(u8 *at, u32 result)
{
    at[0] = 0xb8; /* mov eax, result; ret */
    memcpy(at + 1, &result, 4);
    at[5] = 0xc3;
}

/* Another function where the callee was, in a child: the parent keeps its own. */
static u64 in_a_child(u32 (*caller)(void), u8 *callee, int fd)
{
    int status;
    pid_t child = fork();

    if (child == 0) {
        map(callee, PAGE, PROT_READ | PROT_EXEC, fd, PAGE);
        _exit(call_hot(caller, HOT) == (u64)SECOND * HOT);
    }
    if (child < 0 || waitpid(child, &status, 0) != child)
        die("fork");
    return mix((u64)status, call_hot(caller, HOT));
}

static u64 run_remapped_code(void)
{
    static const u8 code[] = {0x48, 0x83, 0xec, 8, 0xe8, 0, 0, 0, 0, 0x48, 0x83, 0xc4, 8, 0xc3};
    u8 *pages = map(NULL, 3 * PAGE, PROT_READ | PROT_WRITE | PROT_EXEC, -1, 0);
    u8 *callee = pages + 2 * PAGE, *alias;
    s32 distance = (s32)(callee - (pages + 9));
    u32 (*caller)(void);
    int fd = memfd_create("code", 0);
    u64 sum = 0;

    memcpy(pages, code, sizeof(code)); /* sub rsp, 8; call callee; add rsp, 8; ret */
    memcpy(pages + 5, &distance, 4);
    memcpy(&caller, &(void *){pages}, sizeof(caller));
    if (fd < 0 || ftruncate(fd, FUNCTIONS * PAGE))
        die("memfd_create");
    alias = map(NULL, FUNCTIONS * PAGE, PROT_READ | PROT_WRITE, fd, 0);
    put_function(alias, FIRST);
    put_function(alias + PAGE, SECOND);
    for (int round = 0; round < 3; round++) {
        map(callee, PAGE, PROT_READ | PROT_EXEC, fd, (round & 1) * PAGE);
        sum = mix(sum, call_hot(caller, HOT));
    }
    sum = mix(sum, in_a_child(caller, callee, fd));
    put_function(alias, WRITTEN);
    sum = mix(sum, call_hot(caller, HOT));
    put_function(alias, FIRST);
    expect_faults(1);
    mprotect(callee, PAGE, PROT_READ);
    if (!sigsetjmp(behind_fault, 1))
        sum = mix(sum, call_hot(caller, HOT));
    sum = mix(sum, (u64)(at_fault[REG_RIP] - (greg_t)callee));
    mprotect(callee, PAGE, PROT_READ | PROT_EXEC);
    sum = mix(sum, call_hot(caller, HOT));
    munmap(callee, PAGE);
    if (!sigsetjmp(behind_fault, 1))
        sum = mix(sum, call_hot(caller, HOT));
    sum = mix(sum, (u64)(at_fault[REG_CR2] - (greg_t)callee));
    expect_faults(0);
    munmap(pages, 3 * PAGE);
    munmap(alias, FUNCTIONS * PAGE);
    close(fd);
    return sum;
}

/* --- Stacks --- */

/* Pushes until it can't, on a stack that ends there; returns how much that was. */
static u64 push_until_fault(u8 *top)
{
    expect_faults(1);
    if (!sigsetjmp(behind_fault, 1))
        __asm__ volatile("mov %0, %%rsp\n1:\tpush %%rsp\n\tjmp 1b" : : "r"(top) : "memory");
    expect_faults(0);
    return (u64)(top - (u8 *)at_fault[REG_RSP]);
}

/* On another stack, up to its very end: what is above RSP then is nobody's. */
static u64 use_all_of(u8 *top, u64 count)
{
    u64 sum = 0;

    __asm__ volatile("mov %%rsp, %%rbx\n\t"
                     "1:\tmov %[top], %%rsp\n\t"
                     "push %[count]\n\t"
                     "push %%rsp\n\t"
                     "add $8, %%rsp\n\t"
                     "jmp 2f\n"
                     "2:\tadd %[sum], (%%rsp)\n\t"
                     "pop %[sum]\n\t"
                     "jmp 3f\n" /* RSP is top: nothing is to be touched there */
                     "3:\tdec %[count]\n\t"
                     "jnz 1b\n\t"
                     "mov %%rbx, %%rsp"
                     : [sum] "+r"(sum), [count] "+r"(count)
                     : [top] "r"(top)
                     : "rbx", "memory", "cc");
    return sum;
}

/* RSP wanders off, without an access, and comes back. */
static u64 wander(u64 steps)
{
    u64 left = steps, distance;

    __asm__ volatile("mov %%rsp, %%rbx\n"
                     "1:\tsub $4096, %%rsp\n\t"
                     "dec %[left]\n\t"
                     "jnz 1b\n\t"
                     "mov %%rbx, %[distance]\n\t"
                     "sub %%rsp, %[distance]\n\t"
                     "mov %%rbx, %%rsp"
                     : [left] "+r"(left), [distance] "=&r"(distance)
                     :
                     : "rbx", "cc");
    return distance;
}

/* LEAVE to a frame elsewhere, and RSP as a number like any other. */
static u64 as_a_number(u8 *frame, u64 count)
{
    u64 sum = 0;

    memcpy(frame, &(u64){77}, 8);
    __asm__ volatile("mov %%rsp, %%r12\n\tmov %%rbp, %%r13\n"
                     "1:\tmov %[frame], %%rbp\n\t"
                     "leave\n\t"
                     "add %%rbp, %[sum]\n\t"
                     "mov $5, %%esp\n\t"
                     "lea (%%rsp,%[sum]), %[sum]\n\t"
                     "xor %%esp, %%esp\n\t"
                     "dec %[count]\n\t"
                     "jnz 1b\n\t"
                     "mov %%r12, %%rsp\n\tmov %%r13, %%rbp"
                     : [sum] "+r"(sum), [count] "+r"(count)
                     : [frame] "r"(frame)
                     : "r12", "r13", "memory", "cc");
    return sum;
}

static u64 run_stacks(void)
{
    static const u64 places[] = {0x20000000, 0x7ffff000, 0x123456789000, 0x7f0000000000};
    const size_t size = 16 * PAGE;
    u64 sum = 0;

    for (size_t n = 0; n < ARRAY_SIZE(places); n++) {
        u8 *stack = mmap((void *)places[n], size, PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);

        if (stack != (u8 *)places[n])
            stack = map(NULL, size, PROT_READ | PROT_WRITE, -1, 0);
        mprotect(stack, PAGE, PROT_NONE);
        mprotect(stack + size - PAGE, PAGE, PROT_NONE);
        sum = mix(sum, push_until_fault(stack + size - PAGE));
        sum = mix(sum, use_all_of(stack + size - PAGE, HOT));
        sum = mix(sum, as_a_number(stack + 2 * PAGE, HOT));
        munmap(stack, size);
    }
    return mix(sum, wander(HOT));
}

/* --- Strings --- */

struct string_state {
    u64 to, from, count;
};

/* REP MOVSB or STOSQ that may fault: how far it came. */
static u64 copy(u8 *to, const u8 *from, u64 count, int store)
{
    struct string_state s = {(u64)to, (u64)from, count};

    expect_faults(1);
    if (!sigsetjmp(behind_fault, 1)) {
        if (store)
            __asm__ volatile("rep stosq" : "+D"(s.to), "+c"(s.count) : "a"(count) : "memory");
        else
            __asm__ volatile("rep movsb" : "+D"(s.to), "+S"(s.from), "+c"(s.count) : : "memory");
    } else {
        s.to = (u64)at_fault[REG_RDI];
        s.from = store ? s.from : (u64)at_fault[REG_RSI];
        s.count = (u64)at_fault[REG_RCX];
    }
    expect_faults(0);
    return mix(mix(s.to - (u64)to, s.from - (u64)from), s.count);
}

static u64 run_strings(void)
{
    const size_t size = 4 << 20;
    u8 *from = map(NULL, size, PROT_READ | PROT_WRITE, -1, 0),
       *to = map(NULL, size, PROT_READ | PROT_WRITE, -1, 0);
    u64 sum = 0;

    for (size_t n = 0; n < size; n += PAGE / 2)
        from[n] = (u8)(n / PAGE);
    sum = mix(sum, copy(to, from, size, 0));
    mprotect(to + size / 2, PAGE, PROT_READ);
    mprotect(from + size / 4, PAGE, PROT_NONE);
    for (int round = 0; round < 40; round++) {
        sum = mix(sum, copy(to + round, from + size / 2, size / 2, 0)); /* writes fault */
        sum = mix(sum, copy(to, from + size / 4 - 100 - round, 1000, 0));
        sum = mix(sum, copy(to + size / 2 - 80 * (unsigned)round, from, 1000, 1));
        sum = mix(sum, copy(from + 1, from, 500, 0)); /* overlap: a byte repeated */
    }
    mprotect(from + size / 4, PAGE, PROT_READ | PROT_WRITE);
    __asm__ volatile("std\n\trep movsb\n\tcld"
                     :
                     : "D"(to + 5000), "S"(from + 70000), "c"(3000)
                     : "memory");
    sum = mix(sum, crc32(to, size));
    sum = mix(sum, crc32(from, size));
    munmap(from, size);
    munmap(to, size);
    return sum;
}

/* --- Flags behind a return --- */

#define FLAGS_OF_INTEREST 0x8d5u /* all but AF */

/* The flags that `insn` makes of x and y, behind a return; and what INC, ADC and SETcc make of them there. */
#define BEHIND_RETURN(insn, x, y)                                                                  \
    ({                                                                                             \
        u64 a_ = (x), flags_, more_ = 0;                                                           \
                                                                                                   \
        __asm__ volatile("lea -128(%%rsp), %%rsp\n\t" /* the red zone */                           \
                         "call 1f\n\t"                                                             \
                         "inc %[more]\n\t"                                                         \
                         "pushf\n\tpop %[flags]\n\t"                                               \
                         "call 1f\n\t"                                                             \
                         "adc $3, %[more]\n\t"                                                     \
                         "call 1f\n\t"                                                             \
                         "setg %b[more]\n\t"                                                       \
                         "jmp 2f\n"                                                                \
                         "1:\t" insn "\n\tret\n"                                                   \
                         "2:\tlea 128(%%rsp), %%rsp"                                               \
                         : [a] "+r"(a_), [flags] "=&r"(flags_), [more] "+q"(more_)                 \
                         : [b] "r"((u64)(y))                                                       \
                         : "memory", "cc");                                                        \
        mix(mix(a_, flags_ &FLAGS_OF_INTEREST), more_);                                            \
    })

static u64 run_flags(void)
{
    u32 random = 1;
    u64 sum = 0;

    for (unsigned n = 0; n < 4000; n++) {
        u64 x = (u64)random_next(&random) << (n % 33), y = (u64)random_next(&random) << (n % 17);

        sum = mix(sum, BEHIND_RETURN("cmp %[b], %[a]", x, y));
        sum = mix(sum, BEHIND_RETURN("cmp $77, %k[a]", x, y));
        sum = mix(sum, BEHIND_RETURN("add $-8, %[a]", x, y));
        sum = mix(sum, BEHIND_RETURN("sub %[b], %[a]", x, y));
        sum = mix(sum, BEHIND_RETURN("test %k[a], %k[a]", x, y));
        sum = mix(sum, BEHIND_RETURN("and %[b], %[a]", x, y));
        sum = mix(sum, BEHIND_RETURN("neg %[a]", x, y));
        sum = mix(sum, BEHIND_RETURN("shl $3, %[a]\n\tlea 8(%[a]), %[a]", x, y));
        sum = mix(sum, BEHIND_RETURN("cmp $5, %b[a]\n\tmov %[b], %[a]", x, y));
    }
    return sum;
}

const struct benchmark corner_benchmarks[] = {
    {"remapped-code", run_remapped_code},
    {"stacks", run_stacks},
    {"string-faults", run_strings},
    {"flags-behind-return", run_flags},
    {0},
};

#else

const struct benchmark corner_benchmarks[] = {{0}};

#endif
