/*
 * The guests' library: see guest.h.
 */
#include "guest.h"

#define PORT_COM1 0x3f8
#define LSR 5
#define LSR_THRE 0x20

static unsigned failed;

#ifdef __x86_64__
#define CODE_FLAGS 0xa /* G, L */
#else
#define CODE_FLAGS 0xc /* G, D */
#endif
#define FLAT(access, flags) (0x000f00000000ffffULL | (u64)(access) << 40 | (u64)(flags) << 52)

u64 gdt[GDT_ENTRIES] __attribute__((aligned(16))) = {
    [SEL_CODE / 8] = FLAT(0x9b, CODE_FLAGS),  [SEL_DATA / 8] = FLAT(0x93, 0xc),
    [SEL_USER_CODE32 / 8] = FLAT(0xfb, 0xc),  [SEL_USER_DATA / 8] = FLAT(0xf3, 0xc),
    [SEL_USER_CODE64 / 8] = FLAT(0xfb, 0xa),  [SEL_USER_DATA2 / 8] = FLAT(0xf3, 0xc),
    [SEL_CODE32 / 8] = FLAT(0x9b, 0xc),       [SEL_CODE16 / 8] = 0x00009b000000ffffULL,
    [SEL_DATA16 / 8] = 0x000093000000ffffULL,
};
struct table_pointer gdt_pointer = {sizeof(gdt) - 1, (word)gdt};
struct gate idt[256] __attribute__((aligned(16)));
struct table_pointer idt_pointer = {sizeof(idt) - 1, (word)idt};
struct tss tss;
u8 user_stack[16384] __attribute__((aligned(4096)));
u8 trap_stack[16384] __attribute__((aligned(4096)));

volatile struct trap trap;
volatile word trap_resume, trap_at, trap_sp, trap_bp;
trap_handler trap_handlers[256];
word user_kernel_sp;
const char *check_group = "";
static bool user_returned;

void *memset(void *to, int c, word n)
{
    void *p = to;

    __asm__ volatile("rep stosb" : "+D"(p), "+c"(n) : "a"(c) : "memory");
    return to;
}

void *memcpy(void *to, const void *from, word n)
{
    void *p = to;

    __asm__ volatile("rep movsb" : "+D"(p), "+S"(from), "+c"(n) : : "memory");
    return to;
}

int memcmp(const void *a, const void *b, word n)
{
    const u8 *x = a, *y = b;

    for (; n; n--, x++, y++) {
        if (*x != *y)
            return *x - *y;
    }
    return 0;
}

static void print_char(char c)
{
    while (!(inb(PORT_COM1 + LSR) & LSR_THRE))
        ;
    outb(PORT_COM1, (u8)c);
}

void print(const char *text)
{
    for (; *text; text++)
        print_char(*text);
}

void print_hex(u64 value)
{
    int digit = 15;

    while (digit > 0 && !(value >> (4 * digit)))
        digit--;
    print("0x");
    for (; digit >= 0; digit--)
        print_char("0123456789abcdef"[value >> (4 * digit) & 15]);
}

void guest_exit(u8 status)
{
    outb(PORT_EXIT, status);
    print("the debug-exit port does not end the machine\n");
    for (;;)
        __asm__ volatile("cli; hlt");
}

/* Begins a check's line. */
static void print_check(const char *name, bool passed)
{
    if (!passed)
        failed++;
    print(passed ? "ok " : "not ok ");
    print(check_group);
    print(name);
}

void check(const char *name, bool passed)
{
    print_check(name, passed);
    print("\n");
}

void check_equal(const char *name, u64 got, u64 want)
{
    if (got == want) {
        check(name, true);
        return;
    }
    print_check(name, false);
    print(": got ");
    print_hex(got);
    print(" want ");
    print_hex(want);
    print("\n");
}

void skip(const char *name, const char *why)
{
    print_check(name, true);
    print(" # skip: ");
    print(why);
    print("\n");
}

static void print_trap(int vector, u64 error, u64 ip)
{
    if (vector == NONE) {
        print("no exception");
        return;
    }
    print("vector ");
    print_hex((u64)vector);
    print(" error ");
    print_hex(error);
    print(" at ");
    print_hex(ip);
}

void expect_fault(const char *name, int vector, word error)
{
    if (trap.vector == vector && (vector == NONE || (trap.error == error && trap.ip == trap_at))) {
        check(name, true);
        return;
    }
    print_check(name, false);
    print(": got ");
    print_trap(trap.vector, trap.error, trap.ip);
    print(" want ");
    print_trap(vector, error, trap_at);
    print("\n");
}

void trap_entry(struct frame *f)
{
    if (f->vector == VECTOR_USER_DONE) {
        user_returned = true;
        user_leave();
    }
    if (trap_handlers[f->vector]) {
        trap_handlers[f->vector](f);
        return;
    }
    trap.vector = (int)f->vector;
    trap.error = f->error;
    trap.ip = f->ip;
    trap.cr2 = cr2();
    trap.flags = f->flags;
    trap.cs = f->cs;
    trap.frame = (word)f;
#ifdef __x86_64__
    trap.sp = f->sp;
#endif
    if (trap_resume) {
        f->ip = trap_resume;
        f->flags &= ~(word)(FLAG_TF | FLAG_RF);
        trap_resume = 0;
        return;
    }
    if (user_kernel_sp && ((f->cs & 3) == 3 || f->flags & FLAG_VM)) {
        user_returned = false;
        user_leave();
    }
    print("not ok unexpected-exception: ");
    print_trap((int)f->vector, f->error, f->ip);
    print(" cr2 ");
    print_hex(cr2());
    print(" cs ");
    print_hex(f->cs);
    print("\n");
    guest_exit(GUEST_FAILED);
}

bool run_user(void (*fn)(void), word flags)
{
    word *sp = (word *)(user_stack + sizeof(user_stack) - 64);

    *--sp = (word)user_done;
#ifdef __x86_64__
    user_enter((word)fn, (word)sp, flags | 2, SEL_USER_CODE64, SEL_USER_DATA);
#else
    user_enter((word)fn, (word)sp, flags | 2, SEL_USER_CODE32, SEL_USER_DATA);
#endif
    user_kernel_sp = 0;
    return user_returned;
}

void set_gate(unsigned vector, const void *entry, u16 selector, u8 type)
{
    word at = (word)entry;
    struct gate *g = &idt[vector];

    *g = (struct gate){.offset_low = (u16)at, .selector = selector, .type = type};
#ifdef __x86_64__
    g->offset_mid = (u16)(at >> 16);
    g->offset_high = (u32)(at >> 32);
#else
    g->offset_high = (u16)(at >> 16);
#endif
}

u64 descriptor(u32 base, u32 limit, u8 access, u8 flags)
{
    return (limit & 0xffff) | (u64)(base & 0xffffff) << 16 | (u64)access << 40 |
           (u64)(limit >> 16 & 0xf) << 48 | (u64)flags << 52 | (u64)(base >> 24) << 56;
}

void load_tables(void)
{
    __asm__ volatile("lgdt %0; lidt %1" : : "m"(gdt_pointer), "m"(idt_pointer) : "memory");
}

void load_tr(void)
{
    gdt[SEL_TSS / 8] = descriptor((u32)(word)&tss, sizeof(tss) - 1, 0x89, 0);
#ifdef __x86_64__
    gdt[SEL_TSS / 8 + 1] = (word)&tss >> 32;
#endif
    __asm__ volatile("ltr %w0" : : "r"(SEL_TSS) : "memory");
}

struct cpuid cpuid(u32 leaf, u32 subleaf)
{
    struct cpuid r;

    __asm__ volatile("cpuid"
                     : "=a"(r.a), "=b"(r.b), "=c"(r.c), "=d"(r.d)
                     : "a"(leaf), "c"(subleaf));
    return r;
}

bool cpu_is_amd(void)
{
    u32 b = cpuid(0, 0).b;

    return b == 0x68747541 || b == 0x6f677948; /* Auth(enticAMD), Hygo(nGenuine) */
}

bool on_tcg(void)
{
    return cpuid(0x40000000, 0).b == 0x54474354; /* "TCGT" */
}

/* From start.S. */
void guest_start(void);
void guest_start(void)
{
    for (unsigned v = 0; v < 256; v++)
        set_gate(v, trap_stubs + 16 * v, SEL_CODE, GATE_INT);
    set_gate(BP, trap_stubs + 16 * BP, SEL_CODE, GATE_INT | GATE_DPL3);
    set_gate(OF, trap_stubs + 16 * OF, SEL_CODE, GATE_INT | GATE_DPL3);
    set_gate(VECTOR_USER_DONE, trap_stubs + 16 * VECTOR_USER_DONE, SEL_CODE, GATE_INT | GATE_DPL3);
#ifdef __x86_64__
    tss.sp[0] = (word)trap_stack + sizeof(trap_stack);
    tss.iomap = 104;
#else
    tss.sp0 = (word)trap_stack + sizeof(trap_stack);
    tss.ss0 = SEL_DATA;
    tss.iomap = 104;
#endif
    memset(tss.map, 0xff, sizeof(tss.map));
    tss.map[PORT_COM1 / 8] = 0;
    /* The 8259s masked: no firmware's timer comes when a guest sets IF. */
    outb(0x21, 0xff);
    outb(0xa1, 0xff);
    load_tables();
    load_tr();
    guest_main();
    print(failed ? "failed\n" : "passed\n");
    guest_exit(failed ? GUEST_FAILED : 0);
}
