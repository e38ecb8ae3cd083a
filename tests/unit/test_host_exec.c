/*
 * Proves that x87 and SIMD instructions run by the software processor do what the same bytes do
 * when the host runs them: random instructions, registers and memory, both ways, everything
 * compared. And that for 32-bit code the host is given no general register of 64 bits.
 */
#include "engine/soft/host_exec.h"
#include "engine/soft/soft_cpuid.h"
#include "host/trap.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

#include <cmocka.h>

#define CASES 60000u /* DOPPEL_CASES in the environment: another number */
#define MEMORY_SIZE 4096u
#define HOLE 15u

struct native {
    u8 vec[32][64];
    u64 k[8];
    u64 gpr[4]; /* RAX, RCX, RDX, RBX */
    u64 flags;
    u32 mxcsr, trap;
    u8 fpu[112];
};

/*
 * Runs the instruction in the hole with all registers from *n (RDI) and memory at RSI, and stores
 * them all. It is copied to where it can be patched.
 */
extern const u8 native_begin[], native_hole[], native_landing[], native_end[];
__asm__(".pushsection .rodata\n"
        "native_begin:\n"
        "  push %rbx; push %rbp; sub $16, %rsp\n"
        "  stmxcsr (%rsp)\n"
        "  .irp "
        "r,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31\n"
        "  vmovups 64*\\r(%rdi), %zmm\\r\n"
        "  .endr\n"
        "  .irp r,0,1,2,3,4,5,6,7\n"
        "  kmovq 2048+8*\\r(%rdi), %k\\r\n"
        "  .endr\n"
        "  frstor 2160(%rdi)\n"
        "  ldmxcsr 2152(%rdi)\n"
        "  pushq 2144(%rdi); popfq\n"
        "  mov 2112(%rdi), %rax; mov 2120(%rdi), %rcx\n"
        "  mov 2128(%rdi), %rdx; mov 2136(%rdi), %rbx\n"
        "  movl $0, 2156(%rdi)\n"
        "native_hole:\n"
        "  .skip 15, 0x90\n"
        "  mov %rax, 2112(%rdi); mov %rcx, 2120(%rdi)\n"
        "  mov %rdx, 2128(%rdi); mov %rbx, 2136(%rdi)\n"
        "1: pushfq; popq 2144(%rdi)\n"
        "  stmxcsr 2152(%rdi)\n"
        "  ldmxcsr (%rsp)\n"
        "  fnsave 2160(%rdi)\n"
        "  .irp "
        "r,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31\n"
        "  vmovups %zmm\\r, 64*\\r(%rdi)\n"
        "  .endr\n"
        "  .irp r,0,1,2,3,4,5,6,7\n"
        "  kmovq %k\\r, 2048+8*\\r(%rdi)\n"
        "  .endr\n"
        "  vzeroupper\n"
        "  add $16, %rsp; pop %rbp; pop %rbx\n"
        "  ret\n"
        "native_landing:\n"
        "  mov %eax, 2156(%rdi)\n"
        "  jmp 1b\n"
        "native_end:\n"
        ".popsection\n");
_Static_assert(offsetof(struct native, fpu) == 2160, "the assembly's offsets");

typedef void native_fn(struct native *n, void *memory);

struct bench {
    struct soft_vcpu *v;
    u8 *code;   /* writable and executable: a test's own */
    u8 *memory; /* one page that guest and native code use in turn */
    struct insn insns[2];
    ZydisDecoder decoder;
    u64 seed;
};

static u64 next_random(struct bench *b)
{
    b->seed ^= b->seed << 13;
    b->seed ^= b->seed >> 7;
    b->seed ^= b->seed << 17;
    return b->seed * 0x2545f4914f6cdd1dULL;
}

static void stop(struct soft_vcpu *v, const struct insn *i)
{
}

static void fill(struct bench *b, void *at, size_t n)
{
    static const u64 special[] = {0,
                                  1ULL << 63,
                                  0x7ff0000000000000,
                                  0x7ff8000000000001,
                                  0x7f800000ff800001,
                                  0x3f8000003f800000,
                                  0x3ff0000000000000,
                                  0x0000000100000001,
                                  0x7ff0000000000001,
                                  ~0ULL};
    u8 *p = at;

    for (; n >= 8; n -= 8, p += 8) {
        u64 word = next_random(b);

        if (word % 3 == 0)
            word = special[word / 3 % ARRAY_SIZE(special)];
        memcpy(p, &word, 8);
    }
}

/* Called by the test itself: cmocka puts its own signal handlers in place just before. */
static bool setup(struct bench *b)
{
    struct error err;
    struct soft_vcpu *v;
    struct tlb_entry *e;

    if (!__builtin_cpu_supports("avx512bw"))
        return false;
    v = aligned_alloc(64, (sizeof(*v) + 63) & ~(size_t)63);
    memset(v, 0, sizeof(*v));
    b->v = v;
    v->cpuid = cpuid_model_create("host", soft_cpuid_support(), 1, 1000000000, &err);
    v->mode = MODE_CODE64 | MODE_PROTECTED;
    v->cpu.cr4 = CR4_OSFXSR | CR4_OSXMMEXCPT | CR4_OSXSAVE;
    v->cpu.xcr0 = cpuid_model_xcr0(v->cpuid);
    v->tlb = &v->tlb_none;
    b->memory = mmap(NULL, MEMORY_SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    for (unsigned n = 0; n < TLB_SIZE; n++)
        v->tlb_none.entries[n].read_tag = v->tlb_none.entries[n].write_tag = TLB_NO_TAG(n);
    e = tlb_slot(v->tlb, (gva_t)(uintptr_t)b->memory);
    e->read_tag = e->write_tag = (u64)(uintptr_t)b->memory;
    assert_int_equal(host_exec_create(v, &err), 0);
    b->code =
        mmap(NULL, 4096, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    memcpy(b->code, native_begin, (size_t)(native_end - native_begin));
    assert_int_equal(
        trap_region_add(b->code, 4096, b->code + (native_landing - native_begin), &err), 0);
    ZydisDecoderInit(&b->decoder, ZYDIS_MACHINE_MODE_LONG_64, ZYDIS_STACK_WIDTH_64);
    b->seed = getenv("DOPPEL_SEED") ? strtoull(getenv("DOPPEL_SEED"), NULL, 0) : 0x1234567;
    return true;
}

static void teardown(struct bench *b)
{
    trap_region_remove(b->code);
    host_exec_destroy(b->v);
    cpuid_model_destroy((struct cpuid_model *)(uintptr_t)b->v->cpuid);
    free(b->v);
    munmap(b->code, 4096);
    munmap(b->memory, MEMORY_SIZE);
}

/* Random bytes shaped like an x87, SSE, VEX or EVEX instruction on registers or [RSI]. */
static unsigned make_bytes(struct bench *b, u8 *bytes)
{
    u64 r = next_random(b);
    unsigned kind = r % 8, n = 0;
    u8 map = (u8)(1 + (r >> 8) % 3);
    u8 modrm = (u8)(r >> 16);

    modrm = (u8)(r >> 24 & 1 ? (modrm & 0x38) | 6 : modrm | 0xc0);
    if (kind == 0) {
        bytes[n++] = (u8)(0xd8 + (r >> 32 & 7));
    } else if (kind <= 2) {
        static const u8 prefixes[] = {0x66, 0xf2, 0xf3};

        if (r >> 28 & 3)
            bytes[n++] = prefixes[(r >> 28 & 3) - 1];
        if (r >> 30 & 1)
            bytes[n++] = (u8)(0x40 | ((r >> 31) & 0xd));
        bytes[n++] = 0x0f;
        if (map > 1)
            bytes[n++] = map == 2 ? 0x38 : 0x3a;
        bytes[n++] = (u8)(r >> 40);
    } else if (kind <= 4) {
        bytes[n++] = 0xc4;
        bytes[n++] = (u8)((r >> 28 & 0xa0) | 0x40 | map);
        bytes[n++] = (u8)(r >> 48 & 1 ? r >> 32 : r >> 32 | 0x78);
        bytes[n++] = (u8)(r >> 40);
    } else {
        bytes[n++] = 0x62;
        bytes[n++] = (u8)((r >> 28 & 0xf0) | map);
        bytes[n++] = (u8)((r >> 48 & 1 ? r >> 32 : r >> 32 | 0x78) | 4);
        bytes[n++] = (u8)(r >> 52 & (r >> 49 & 1 ? 0xff : 0x6f));
        bytes[n++] = (u8)(r >> 40);
    }
    bytes[n++] = modrm;
    bytes[n++] = (u8)next_random(b);
    while (n < HOLE)
        bytes[n++] = 0x90;
    return n;
}

/* Whether the native harness can hold it: its general registers, no stack, no RIP. */
static bool fits(const ZydisDecodedInstruction *zi, const ZydisDecodedOperand *ops)
{
    for (unsigned n = 0; n < zi->operand_count; n++) {
        const ZydisDecodedOperand *op = &ops[n];
        ZydisRegisterClass class = ZydisRegisterGetClass(op->reg.value);

        if (op->type == ZYDIS_OPERAND_TYPE_MEMORY &&
            (op->mem.base != ZYDIS_REGISTER_RSI || op->mem.index != ZYDIS_REGISTER_NONE ||
             op->mem.disp.value != 0))
            return false;
        if (op->type == ZYDIS_OPERAND_TYPE_REGISTER && class >= ZYDIS_REGCLASS_GPR8 &&
            class <= ZYDIS_REGCLASS_GPR64 && ZydisRegisterGetId(op->reg.value) > RBX)
            return false;
    }
    return true;
}

static void random_state(struct bench *b, struct native *n)
{
    u64 r = next_random(b);
    struct {
        u32 fcw, fsw, ftw, rest[4];
    } env = {.fcw = 0x37f, .fsw = (u32)(r >> 40 & 0x3800), .ftw = (r & 1) ? 0xffff : 0};

    fill(b, n->vec, sizeof(n->vec));
    fill(b, n->k, sizeof(n->k));
    fill(b, n->gpr, sizeof(n->gpr));
    n->flags = EFLAGS_FIXED | EFLAGS_IF | (next_random(b) & EFLAGS_ARITH);
    n->mxcsr = r >> 8 & 3 ? 0x1f80 : (u32)(r >> 16 & 0xffbf);
    n->trap = 0;
    fill(b, n->fpu, sizeof(n->fpu));
    if (r >> 2 & 1)
        env.fcw = (u32)(r >> 3 & 0xf3f) | 0x40;
    memcpy(n->fpu, &env, sizeof(env));
}

static void put_state(struct soft_vcpu *v, const struct native *n)
{
    u16 words[6];

    soft_fpu_drop(v);
    memcpy(v->cpu.vec, n->vec, sizeof(n->vec));
    memcpy(v->cpu.k, n->k, sizeof(n->k));
    memcpy(v->cpu.gpr, n->gpr, sizeof(n->gpr));
    v->aflags = aflags_from_eflags(n->flags);
    v->cpu.mxcsr = n->mxcsr;
    memcpy(words, n->fpu, sizeof(words));
    v->cpu.fcw = words[0];
    v->cpu.fsw = words[2];
    v->cpu.ftw = words[4];
    for (unsigned r = 0; r < 8; r++)
        memcpy(v->cpu.fpr[(r + (v->cpu.fsw >> 11)) & 7], n->fpu + 28 + 10 * r, 10);
    /* So that the tag word becomes what the processor makes of it, used or not. */
    fpu_load(v);
}

static void get_state(struct soft_vcpu *v, struct native *n)
{
    u16 words[6];

    soft_fpu_sync(v);
    memcpy(n->vec, v->cpu.vec, sizeof(n->vec));
    memcpy(n->k, v->cpu.k, sizeof(n->k));
    memcpy(n->gpr, v->cpu.gpr, sizeof(n->gpr));
    n->flags = (n->flags & ~EFLAGS_ARITH) | aflags_to_eflags(v->aflags);
    n->mxcsr = v->cpu.mxcsr;
    memcpy(words, n->fpu, sizeof(words));
    words[0] = v->cpu.fcw;
    words[2] = v->cpu.fsw;
    words[4] = v->cpu.ftw;
    memcpy(n->fpu, words, sizeof(words));
    for (unsigned r = 0; r < 8; r++)
        memcpy(n->fpu + 28 + 10 * r, v->cpu.fpr[(r + (v->cpu.fsw >> 11)) & 7], 10);
}

/* 0, or the vector that was raised. */
static u32 run_soft(struct bench *b)
{
    b->v->raised.vector = 0;
    if (!_setjmp(b->v->unwind)) {
        b->v->cur = &b->insns[0];
        b->insns[0].fn(b->v, b->insns);
    } else {
        return b->v->raised.vector;
    }
    return 0;
}

/* Makes b->insns run the bytes; false when no thunk runs them. */
static bool prepare(struct bench *b, const u8 *bytes, unsigned offset, ZydisDecodedInstruction *zi)
{
    ZydisDecodedOperand ops[ZYDIS_MAX_OPERAND_COUNT];
    struct decode_context ctx = {zi, ops, bytes, b->v->mode};

    if (!ZYAN_SUCCESS(ZydisDecoderDecodeFull(&b->decoder, bytes, HOLE, zi, ops)) || !fits(zi, ops))
        return false;
    memset(b->insns, 0, sizeof(b->insns));
    b->insns[0].base = b->insns[0].index = GPR_ZERO;
    b->insns[0].disp = (s64)(uintptr_t)(b->memory + offset);
    b->insns[0].seg = SEG_DS;
    b->insns[0].asize = 8;
    b->insns[0].len = zi->length;
    b->insns[1].fn = stop;
    for (unsigned n = 0; n < zi->operand_count; n++) {
        if (ops[n].type == ZYDIS_OPERAND_TYPE_REGISTER &&
            ops[n].encoding == ZYDIS_OPERAND_ENCODING_MODRM_REG)
            b->insns[0].reg = (u8)ZydisRegisterGetId(ops[n].reg.value);
    }
    return host_exec_decode(b->v, &ctx, &b->insns[0]) && b->insns[0].ext;
}

static void report(const struct bench *b, const u8 *bytes, const ZydisDecodedInstruction *zi,
                   const struct native *want, const struct native *got)
{
    print_message("%s:", ZydisMnemonicGetString(zi->mnemonic));
    for (unsigned n = 0; n < zi->length; n++)
        print_message(" %02x", bytes[n]);
    print_message("\ntrap %u %u flags %lx %lx mxcsr %x %x\n", want->trap, got->trap, want->flags,
                  got->flags, want->mxcsr, got->mxcsr);
    for (unsigned n = 0; n < sizeof(*want); n += 8) {
        if (memcmp((const u8 *)want + n, (const u8 *)got + n, 8) != 0)
            print_message("  at %u (register %u): %016lx %016lx\n", n, n / 64,
                          *(const u64 *)((const u8 *)want + n),
                          *(const u64 *)((const u8 *)got + n));
    }
}

static void instructions_match_the_host(void **state)
{
    struct bench bench = {0}, *b = &bench;
    native_fn *native;
    unsigned ran = 0, faults = 0, bad = 0;
    unsigned cases = getenv("DOPPEL_CASES") ? (unsigned)atoi(getenv("DOPPEL_CASES")) : CASES;
    static struct native start, want, got;
    static u8 before[256], after[256];

    if (!setup(b))
        skip();
    native = (native_fn *)(uintptr_t)b->code;
    print_message("seed %#lx\n", b->seed);
    while (ran < cases && bad < 20) {
        unsigned offset = (unsigned)(next_random(b) & 1 ? 0 : next_random(b) & 63);
        u8 bytes[HOLE];
        ZydisDecodedInstruction zi;
        bool same;

        make_bytes(b, bytes);
        if (!prepare(b, bytes, offset, &zi))
            continue;
        memset(bytes + zi.length, 0x90, HOLE - zi.length);
        random_state(b, &start);
        fill(b, before, sizeof(before));

        want = start;
        memcpy(b->memory, before, sizeof(before));
        memcpy(b->code + (native_hole - native_begin), bytes, HOLE);
        native(&want, b->memory + offset);
        memcpy(after, b->memory, sizeof(after));

        memcpy(b->memory, before, sizeof(before));
        put_state(b->v, &start);
        got = start;
        got.trap = run_soft(b);
        get_state(b->v, &got);

        /* Pointers aside (FIP and FDP are each side's own), all must agree. */
        memset(want.fpu + 12, 0, 16);
        memset(got.fpu + 12, 0, 16);
        memset(want.fpu + 108, 0, 4);
        memset(got.fpu + 108, 0, 4);
        for (unsigned n = 2; n < 12; n += 4) {
            memset(want.fpu + n, 0, 2);
            memset(got.fpu + n, 0, 2);
        }
        same =
            memcmp(&want, &got, sizeof(want)) == 0 && memcmp(after, b->memory, sizeof(after)) == 0;
        ran++;
        faults += want.trap != 0;
        if (!same) {
            bad++;
            report(b, bytes, &zi, &want, &got);
        }
    }
    print_message("%u instructions, %u of them faulted\n", ran, faults);
    teardown(b);
    assert_int_equal(bad, 0);
}

/* Of VEX and EVEX alike. */
static bool has_w(const struct thunk_spec *s)
{
    return s->insn[2] & 0x80;
}

/* Whatever the host has: the instructions are not run. */
static void w_is_cleared_for_32_bit_general_registers(void **state)
{
    static const enum cpuid_feature features[] = {
        FEATURE_XSAVE,   FEATURE_AVX,      FEATURE_AVX2,     FEATURE_FMA,
        FEATURE_AVX512F, FEATURE_AVX512DQ, FEATURE_AVX512BW, FEATURE_AVX512VL,
    };
    static const struct {
        u8 bytes[7];
        bool w;
    } cases[] = {
        {"\xc4\xe1\xfb\x93\xe7", false},     /* KMOVD ESP, K7 */
        {"\xc4\xe1\xfb\x92\xfc", false},     /* KMOVD K7, ESP */
        {"\xc4\xe1\xf9\x6e\xc4", false},     /* VMOVD XMM0, ESP */
        {"\xc4\xe1\xf9\x7e\x06", false},     /* VMOVD [ESI], XMM0 */
        {"\xc4\xe1\xfb\x2a\x06", false},     /* VCVTSI2SD XMM0, XMM0, [ESI] */
        {"\xc4\xe1\xfa\x2d\xe0", false},     /* VCVTSS2SI ESP, XMM0 */
        {"\x62\xf1\xff\x08\x79\xe0", false}, /* VCVTSD2USI ESP, XMM0 */
        {"\x62\xf2\xfd\x48\x7c\xc4", false}, /* VPBROADCASTD ZMM0, ESP */
        {"\xc4\xe3\xf9\x61\xc0\x00", false}, /* VPCMPESTRI XMM0, XMM0, 0 */
        {"\xc4\xe1\xf9\x90\x06", true},      /* KMOVD K0, [ESI] */
        {"\xc4\xe1\xf8\x90\xc1", true},      /* KMOVQ K0, K1 */
        {"\xc4\xe2\xf9\x98\xc0", true},      /* VFMADD132PD XMM0, XMM0, XMM0 */
        {"\x62\xf2\xfd\x48\x59\xc0", true},  /* VPBROADCASTQ ZMM0, XMM0 */
    };
    struct cpuid_support support = *soft_cpuid_support();
    ZydisDecodedOperand ops[ZYDIS_MAX_OPERAND_COUNT];
    ZydisDecodedInstruction zi;
    ZydisDecoder decoder;
    struct soft_vcpu *v = aligned_alloc(64, (sizeof(*v) + 63) & ~(size_t)63);
    struct error err;

    memset(v, 0, sizeof(*v));
    for (unsigned n = 0; n < ARRAY_SIZE(features); n++)
        support.bits[features[n] / 64] |= BIT(features[n] % 64);
    v->cpuid = cpuid_model_create("max", &support, 1, 1000000000, &err);
    v->mode = MODE_CODE32 | MODE_PROTECTED;
    assert_int_equal(host_exec_create(v, &err), 0);
    ZydisDecoderInit(&decoder, ZYDIS_MACHINE_MODE_LONG_COMPAT_32, ZYDIS_STACK_WIDTH_32);
    for (unsigned n = 0; n < ARRAY_SIZE(cases); n++) {
        struct decode_context ctx = {&zi, ops, cases[n].bytes, v->mode};
        struct insn insn = {.seg = SEG_DS, .asize = 4};
        const struct thunk *t;

        assert_true(ZYAN_SUCCESS(ZydisDecoderDecodeFull(&decoder, cases[n].bytes, 7, &zi, ops)));
        assert_true(host_exec_decode(v, &ctx, &insn));
        t = insn.ext;
        assert_non_null(t);
        if (has_w(&t->spec) != cases[n].w)
            fail_msg("case %u: W %u", n, has_w(&t->spec));
    }
    host_exec_destroy(v);
    cpuid_model_destroy((struct cpuid_model *)(uintptr_t)v->cpuid);
    free(v);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(instructions_match_the_host),
        cmocka_unit_test(w_is_cleared_for_32_bit_general_registers),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
