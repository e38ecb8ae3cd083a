/*
 * The oracle test: random instructions on the real processor and under doppel, everything compared.
 *
 * Three parties share this header: generate.c makes cases, native.c (a program of its own, so that
 * nothing but the test's pages is within reach of a wild access) runs them on the real processor,
 * guest.c runs them under an engine. The test's parent and the native program share one memory:
 * batches of cases go one way, their outcomes the other.
 *
 * What a case sees, the same on both sides
 *  1. CODE: two pages, readable and executable, filled with INT3; the instructions are in them.
 *  2. WINDOW: pages 0, 1 and 4 can be written, page 2 can be read, pages 3 and 5 are not there, and
 *     none can be executed. All else is unmapped to user mode.
 *  3. The GDT of a Linux kernel (its user segments, kernel segments of privilege 0).
 */
#ifndef DOPPEL_TESTS_CPU_CASE_H
#define DOPPEL_TESTS_CPU_CASE_H

#include "host/types.h"

#define PAGE 4096u

#define CODE 0x10000000u
#define CODE_PAGES 2u
#define CODE_SIZE (CODE_PAGES * PAGE)
#define WINDOW 0x20000000u
#define WINDOW_PAGES 6u
#define WINDOW_READ_ONLY 2u /* this page */
#define WRITABLE_PAGES 3u
/* The pages that can be written, in the order in which images hold them. */
static const u8 writable_pages[WRITABLE_PAGES] = {0, 1, 4};

#define INT3 0xcc

#define USER_CS32 0x23u
#define USER_DS 0x2bu
#define USER_CS64 0x33u

#define BATCH 128u
#define IMAGES 8u
#define CODE_MAX 1024u
#define INSNS_MAX 160u
#define POKES 6u

/* What this processor has, of which user mode sees registers. */
struct host {
    u32 mxcsr_mask;
    u64 xcr0;
    bool sets_rf;        /* in the flags that a fault pushes; QEMU's TCG, for one, never does */
    const char *without; /* mnemonics that are left out on it, as --without has them; NULL: none */
};

/* What user mode can see of a processor. Registers that the host lacks are zero. */
struct user_state {
    u64 gpr[16], rip, rflags;
    u16 es, cs, ss, ds, fs, gs;
    u16 fcw, fsw, fop;
    u8 ftw; /* abridged, as FXSAVE has it: one bit a register that is not empty, R0 first */
    u32 mxcsr, pkru;
    u64 fs_base, gs_base;
    u64 fip, fdp;
    u64 k[8];
    u8 st[8][16]; /* ST(0) first; 10 bytes each */
    _Alignas(64) u8 vec[32][64];
};

/* Eight bytes of the window that a case wants to have a certain value. */
struct poke {
    u16 offset; /* into the writable pages, as an image holds them */
    u64 value;
};

struct test_case {
    struct user_state before;
    u8 image; /* what the writable pages hold */
    u16 code_len;
    u16 ncode;             /* instructions */
    u16 starts[INSNS_MAX]; /* where each begins in code */
    u16 code_offset;       /* of the first instruction, from CODE on */
    u8 code[CODE_MAX];
    u8 npokes;
    struct poke pokes[POKES];
};

struct outcome {
    struct user_state after;
    u8 vector;
    bool lost; /* nothing came back */
    u32 error;
    u64 cr2; /* #PF */
    u8 window[WRITABLE_PAGES * PAGE];
};

enum { NATIVE_IDLE, NATIVE_RUN };

struct shared {
    u32 command; /* a futex: NATIVE_RUN until the native side is done */
    u32 count;
    u32 running; /* the case that is being run */
    u8 read_only[PAGE];
    u8 images[IMAGES][WRITABLE_PAGES * PAGE];
    struct test_case cases[BATCH];
    struct outcome outcomes[BATCH];
};

#endif
