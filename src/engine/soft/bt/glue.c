/*
 * The way from C into translated code and back, and the vector registers on both.
 *
 * bt_enter saves what C expects kept, loads the guest's registers and jumps to v->bt_shared.entry. The
 * ways out store the guest's registers to v->cpu, take the stack up where bt_enter left it, and return the
 * reason. Arithmetic flags are in v->aflags whenever code is left, and are not loaded by bt_enter.
 */
#include "engine/soft/bt/asm.h"
#include "engine/soft/bt/bt.h"

#include <immintrin.h>

#define HOST_MXCSR 0x1f80u

static const u8 kept_by_c[] = {RBX, RBP, R12, R13, R14, R15};

static void put_push(u8 **p, unsigned reg)
{
    if (reg >= 8)
        put8(p, 0x41);
    put8(p, 0x50 | (reg & 7));
}
static void put_pop(u8 **p, unsigned reg)
{
    if (reg >= 8)
        put8(p, 0x41);
    put8(p, 0x58 | (reg & 7));
}

static void put_enter(u8 **p)
{
    for (unsigned n = 0; n < ARRAY_SIZE(kept_by_c); n++)
        put_push(p, kept_by_c[n]);
    put_store_gs(p, GS_OFFSET(bt_shared.host_rsp), RSP);
    for (unsigned reg = 0; reg < S1; reg++)
        put_load_gs(p, reg, GS_GPR(reg));
    put8(p, 0x65); /* jmp gs:[entry] */
    put8(p, 0xff);
    put_modrm(p, 0, 4, 4);
    put8(p, 0x25);
    put32(p, GS_OFFSET(bt_shared.entry));
}

static void put_leave(u8 **p)
{
    for (unsigned reg = 0; reg < S1; reg++)
        put_store_gs(p, GS_GPR(reg), reg);
    put_load_gs(p, RSP, GS_OFFSET(bt_shared.host_rsp));
    for (unsigned n = ARRAY_SIZE(kept_by_c); n-- > 0;)
        put_pop(p, kept_by_c[n]);
    put_op_gs(p, false, OP_MOV, RAX, GS_OFFSET(bt_shared.reason));
    put8(p, 0xc3);
}

void bt_glue_emit(struct bt *bt)
{
    u8 *p = bt->writable, *jumps[BT_FAULT + 1], *leave;

    bt->enter = (u32(*)(void))(uintptr_t)bt->executable;
    put_enter(&p);
    for (unsigned reason = 0; reason <= BT_FAULT; reason++) {
        bt->glue[reason] = (u32)(p - bt->writable);
        put_store_gs_imm32(&p, GS_OFFSET(bt_shared.reason), reason);
        jumps[reason] = put_jmp(&p);
    }
    leave = p;
    for (unsigned reason = 0; reason <= BT_FAULT; reason++)
        patch_rel32(jumps[reason], leave);
    put_leave(&p);
    bt->begin.hot = ((u32)(p - bt->writable) + 63) & ~63u;
}

#define EACH_VECTOR(X)                                                                             \
    X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11) X(12) X(13) X(14) X(15)

/* The upper parts of ZMM are touched by no translated code but what zeroes them; so they count when the
 * guest has AVX-512 on. */
static bool has_zmm(const struct soft_vcpu *v)
{
    return (v->cpu.xcr0 & XCR0_AVX512) == XCR0_AVX512;
}

void bt_vectors_load(struct soft_vcpu *v)
{
    if (has_zmm(v)) {
#define LOAD(n) "vmovdqu64 " #n "*64(%0), %%zmm" #n "\n\t"
        __asm__ volatile(EACH_VECTOR(LOAD) : : "r"(v->cpu.vec) : "memory");
#undef LOAD
    } else {
#define LOAD(n) "vmovdqu " #n "*64(%0), %%ymm" #n "\n\t"
        __asm__ volatile(EACH_VECTOR(LOAD) : : "r"(v->cpu.vec) : "memory");
#undef LOAD
    }
    __asm__ volatile("ldmxcsr %0" : : "m"(v->cpu.mxcsr));
    v->vectors_live = true;
}

void bt_vectors_save(struct soft_vcpu *v)
{
    u32 host = HOST_MXCSR;

    if (has_zmm(v)) {
#define STORE(n) "vmovdqu64 %%zmm" #n ", " #n "*64(%0)\n\t"
        __asm__ volatile(EACH_VECTOR(STORE) : : "r"(v->cpu.vec) : "memory");
#undef STORE
    } else {
#define STORE(n) "vmovdqu %%ymm" #n ", " #n "*64(%0)\n\t"
        __asm__ volatile(EACH_VECTOR(STORE) : : "r"(v->cpu.vec) : "memory");
#undef STORE
    }
    __asm__ volatile("stmxcsr %0" : "=m"(v->cpu.mxcsr));
    __asm__ volatile("ldmxcsr %0" : : "m"(host));
    v->vectors_live = false;
}
