/*
 * Thunks: code generation.
 *
 * Registers of a running thunk
 *  - RDI: the vCPU, whose first member is struct cpu. RSI: the memory operand. Neither is changed,
 *    so the landing stub finds the vCPU whatever instruction faulted.
 *  - RAX, RCX, RDX: guest general registers, whatever their numbers in the guest
 *    (thunk_spec.gpr_in): so a guest's RSP never gets into the host's.
 *  - vector, mask, x87 and MMX registers: those that the guest's instruction names.
 * All of these are caller-saved in the System V ABI (x87 and MMX registers are the guest's own for
 * as long as they are live: x87.c). A thunk is a leaf: it has no stack frame, so an exception
 * inside can be answered by going to the landing stub, which returns in its place.
 *
 * MXCSR is the guest's only around the one instruction that uses it.
 *
 * The arena is a memfd mapped twice, once to write and once to execute: no page is ever both.
 */
#define _GNU_SOURCE
#include "engine/soft/thunk.h"

#include "engine/soft/mmu.h"
#include "host/trap.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define HASH_SIZE 4096u
#define THUNK_CODE_MAX 512u /* the largest thunk is some 300 bytes */
#define PAGE_THUNKS 128u    /* allocated at a time */
#define HOST_MXCSR 0x1f80u

enum { HOST_RAX = 0, HOST_RDI = 7 };

struct thunk_page {
    struct thunk_page *next;
    unsigned used;
    struct thunk thunks[PAGE_THUNKS];
};

struct thunk_arena {
    u8 *writable;
    const u8 *executable;
    size_t size, used;
    size_t start; /* of the first thunk, behind the constants and the landing stub */
    bool avx, avx512, avx512bw;
    bool full, guarded;
    struct thunk_page *pages;
    struct thunk *hash[HASH_SIZE];
};

static void emit(struct thunk_arena *a, const void *bytes, size_t n)
{
    memcpy(a->writable + a->used, bytes, n);
    a->used += n;
}
#define EMIT(a, ...) emit((a), (const u8[]){__VA_ARGS__}, sizeof((const u8[]){__VA_ARGS__}))

static void emit32(struct thunk_arena *a, u32 value)
{
    emit(a, &value, sizeof(value));
}

/* ModRM with [RDI + offset]. */
static void emit_at(struct thunk_arena *a, unsigned reg, size_t offset)
{
    EMIT(a, (u8)(0x80 | (reg & 7) << 3 | HOST_RDI));
    emit32(a, (u32)offset);
}

static void emit_mov_gpr(struct thunk_arena *a, bool store, unsigned host, unsigned guest)
{
    EMIT(a, 0x48, store ? 0x89 : 0x8b);
    emit_at(a, host, offsetof(struct soft_vcpu, cpu.gpr) + guest * sizeof(u64));
}

static size_t vec_offset(unsigned reg)
{
    return offsetof(struct soft_vcpu, cpu.vec) + reg * 64;
}

/* MOVUPS, VMOVUPS: between vector register `reg` and its place in struct cpu. */
static void emit_mov_vec(struct thunk_arena *a, bool store, unsigned reg, unsigned size, bool vex)
{
    u8 opcode = store ? 0x11 : 0x10;

    if (!vex) {
        EMIT(a, (u8)(0x40 | (reg >> 3 & 1) << 2), 0x0f, opcode);
    } else if (reg < 16 && size < 64) {
        EMIT(a, 0xc4, (u8)(0x61 | (reg < 8) << 7), (u8)(0x78 | (size == 32) << 2), opcode);
    } else {
        EMIT(a, 0x62, (u8)(0x61 | !(reg & 8) << 7 | !(reg & 16) << 4), 0x7c, 0x48, opcode);
    }
    emit_at(a, reg, vec_offset(reg));
}

static void emit_mov_k(struct thunk_arena *a, bool store, unsigned reg)
{
    EMIT(a, 0xc4, 0xe1, a->avx512bw ? 0xf8 : 0x78, store ? 0x91 : 0x90);
    emit_at(a, reg, offsetof(struct soft_vcpu, cpu.k) + reg * sizeof(u64));
}

static void emit_guest_mxcsr(struct thunk_arena *a, bool store)
{
    EMIT(a, 0x0f, 0xae);
    emit_at(a, store ? 3 : 2, offsetof(struct soft_vcpu, cpu.mxcsr));
}

/* LDMXCSR [RIP + ...]: the host's value is the arena's first word. */
static void emit_host_mxcsr(struct thunk_arena *a)
{
    EMIT(a, 0x0f, 0xae, 0x15);
    emit32(a, (u32) - (s32)(a->used + 4));
}

static void emit_flags_in(struct thunk_arena *a)
{
    EMIT(a, 0x8b); /* MOV EAX, [v->aflags]; OF from bit 0, the rest from AH */
    emit_at(a, HOST_RAX, offsetof(struct soft_vcpu, aflags));
    EMIT(a, 0x04, 0x7f); /* ADD AL, 0x7f */
    EMIT(a, 0x9e);       /* SAHF */
}

static void emit_flags_out(struct thunk_arena *a)
{
    EMIT(a, 0x9f);             /* LAHF */
    EMIT(a, 0x0f, 0x90, 0xc0); /* SETO AL */
    EMIT(a, 0x0f, 0xb7, 0xc0); /* MOVZX EAX, AX */
    EMIT(a, 0x89);
    emit_at(a, HOST_RAX, offsetof(struct soft_vcpu, aflags));
}

static void emit_vzeroupper(struct thunk_arena *a)
{
    EMIT(a, 0xc5, 0xf8, 0x77);
}

/* Where trap.c resumes a thunk that raised an exception, vector in EAX. */
static void emit_landing(struct thunk_arena *a)
{
    EMIT(a, 0x83, 0xf8, EXC_XM); /* CMP EAX, 19 */
    EMIT(a, 0x75, 0x07);         /* JNE over the next */
    emit_guest_mxcsr(a, true);
    emit_host_mxcsr(a);
    if (a->avx)
        emit_vzeroupper(a);
    EMIT(a, 0xc3);
}

static void emit_thunk(struct thunk_arena *a, const struct thunk_spec *s)
{
    bool vex = s->flags & THUNK_ZERO_UPPER;
    unsigned out_size = !vex ? 16 : a->avx512 ? 64 : 32;

    /* The flags pass through RAX, so they come before the general registers. */
    if (s->flags & THUNK_FLAGS_IN)
        emit_flags_in(a);
    for (unsigned n = 0; n < ARRAY_SIZE(s->gpr_in); n++) {
        if (s->gpr_in[n])
            emit_mov_gpr(a, false, n, s->gpr_in[n] - 1u);
    }
    for (unsigned n = 0; n < 8; n++) {
        if (s->k_in & BIT(n))
            emit_mov_k(a, false, n);
    }
    for (unsigned n = 0; n < 32; n++) {
        if (s->vec_in & BIT(n))
            emit_mov_vec(a, false, n, s->vec_size, vex);
    }
    if (s->flags & THUNK_MXCSR)
        emit_guest_mxcsr(a, false);
    emit(a, s->insn, s->insn_len);
    if (s->flags & THUNK_MXCSR) {
        emit_guest_mxcsr(a, true);
        emit_host_mxcsr(a);
    }
    for (unsigned n = 0; n < 32; n++) {
        if (s->vec_out & BIT(n))
            emit_mov_vec(a, true, n, out_size, vex);
    }
    for (unsigned n = 0; n < 8; n++) {
        if (s->k_out & BIT(n))
            emit_mov_k(a, true, n);
    }
    for (unsigned n = 0; n < ARRAY_SIZE(s->gpr_out); n++) {
        if (s->gpr_out[n])
            emit_mov_gpr(a, true, n, s->gpr_out[n] - 1u);
    }
    if (s->flags & THUNK_FLAGS_OUT)
        emit_flags_out(a);
    if (vex && s->vec_size > 16)
        emit_vzeroupper(a);
    EMIT(a, 0x31, 0xc0, 0xc3); /* XOR EAX, EAX; RET */
}

static unsigned spec_hash(const struct thunk_spec *s)
{
    u64 h = 0xcbf29ce484222325ULL;
    u64 word;

    for (size_t n = 0; n + sizeof(word) <= sizeof(*s); n += sizeof(word)) {
        memcpy(&word, (const u8 *)s + n, sizeof(word));
        h = (h ^ word) * 0x9e3779b97f4a7c15ULL;
        h ^= h >> 29;
    }
    return (unsigned)(h >> 32) % HASH_SIZE;
}

static struct thunk *thunk_alloc(struct thunk_arena *a)
{
    if (!a->pages || a->pages->used == PAGE_THUNKS) {
        struct thunk_page *page = calloc(1, sizeof(*page));

        if (!page)
            return NULL;
        page->next = a->pages;
        a->pages = page;
    }
    return &a->pages->thunks[a->pages->used++];
}

const struct thunk *thunk_get(struct thunk_arena *a, const struct thunk_spec *spec)
{
    struct thunk **chain = &a->hash[spec_hash(spec)];
    struct thunk *t;

    for (t = *chain; t; t = t->next) {
        if (memcmp(&t->spec, spec, sizeof(*spec)) == 0)
            return t;
    }
    t = a->size - a->used < THUNK_CODE_MAX ? NULL : thunk_alloc(a);
    if (!t) {
        a->full = true;
        return NULL;
    }
    t->spec = *spec;
    t->code = (thunk_fn *)(uintptr_t)(a->executable + a->used);
    emit_thunk(a, spec);
    a->used = (a->used + 15) & ~(size_t)15;
    t->next = *chain;
    *chain = t;
    return t;
}

bool thunk_arena_full(const struct thunk_arena *a)
{
    return a->full;
}

void thunk_arena_reset(struct thunk_arena *a)
{
    while (a->pages) {
        struct thunk_page *next = a->pages->next;

        free(a->pages);
        a->pages = next;
    }
    memset(a->hash, 0, sizeof(a->hash));
    a->used = a->start;
    a->full = false;
}

struct thunk_arena *thunk_arena_create(size_t code_size, bool avx, bool avx512, bool avx512bw,
                                       struct error *err)
{
    struct thunk_arena *a = calloc(1, sizeof(*a));
    const u8 *landing;
    int fd = -1;
    void *map;

    if (!a) {
        error_host(err, ENOMEM, "the arena of generated code");
        return NULL;
    }
    a->size = code_size;
    a->avx = avx;
    a->avx512 = avx512;
    a->avx512bw = avx512bw;
    fd = memfd_create("doppel-thunks", MFD_CLOEXEC);
    if (fd < 0 || ftruncate(fd, (off_t)code_size) != 0)
        goto fail;
    map = mmap(NULL, code_size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (map == MAP_FAILED)
        goto fail;
    a->writable = map;
    map = mmap(NULL, code_size, PROT_READ | PROT_EXEC, MAP_SHARED, fd, 0);
    if (map == MAP_FAILED)
        goto fail;
    a->executable = map;
    close(fd);

    emit32(a, HOST_MXCSR);
    a->used = 16;
    landing = a->executable + a->used;
    emit_landing(a);
    a->start = a->used = (a->used + 63) & ~(size_t)63;
    if (trap_region_add(a->executable, code_size, landing, err) != 0) {
        thunk_arena_destroy(a);
        return NULL;
    }
    a->guarded = true;
    return a;

fail:
    error_host(err, errno, "mapping memory for generated code");
    if (fd >= 0)
        close(fd);
    thunk_arena_destroy(a);
    return NULL;
}

void thunk_arena_destroy(struct thunk_arena *a)
{
    if (!a)
        return;
    if (a->guarded)
        trap_region_remove(a->executable);
    thunk_arena_reset(a);
    if (a->executable)
        munmap((void *)(uintptr_t)a->executable, a->size);
    if (a->writable)
        munmap(a->writable, a->size);
    free(a);
}
