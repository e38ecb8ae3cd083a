/*
 * The oracle test: random blocks of instructions, with branches, loops and calls.
 *
 * A block is made of units, each of a few instructions that belong together. Branches lead from a unit
 * to another's start, so units can be left out of a block, and the rest is still a block: that is how
 * a differing one is shrunk. It always comes to its end: it is left by INT3 or a fault.
 */
#ifndef DOPPEL_TESTS_CPU_BLOCK_H
#define DOPPEL_TESTS_CPU_BLOCK_H

#include "case.h"
#include "generate.h"

#define UNITS_MAX 64u
#define UNIT_INSNS 8u
#define FUNCTIONS 3u
/* States that a block is entered with. */
#define VARIANTS 8u

enum fix_kind {
    FIX_NONE,
    FIX_JUMP,     /* a relative jump or call: its opcode is that of the short form */
    FIX_CODE,     /* four bytes hold the target's address */
    FIX_CODE_RIP, /* four bytes hold the target's distance */
    FIX_DATA_RIP, /* four bytes hold the distance of `address` */
};

struct block_insn {
    u8 bytes[15], len;
    u8 fix, at; /* enum fix_kind; where in bytes */
    bool far;   /* the jump has its long form, though the short one might do */
    u16 target; /* a unit; or CALLS + a function's number */
    u32 address;
};
#define CALLS 0x100u

struct unit {
    u8 ninsns;
    u8 function; /* 0: none, the block itself */
    u8 partner;  /* the unit that it can't be left out without; itself: none */
    bool fixed;  /* can't be left out */
    struct block_insn insns[UNIT_INSNS];
};

struct block {
    unsigned nunits;
    struct unit units[UNITS_MAX]; /* function by function, the last of each returns */
    u32 place;                    /* where it is, somehow */
    u8 image;
    struct user_state before[VARIANTS];
};

void block_generate(const struct generator *g, bool mode64, struct random *r, struct block *b);

/* The case that runs the units of b that are alive from variant's state. False: it is too long. */
bool block_case(const struct block *b, const bool alive[UNITS_MAX], unsigned variant,
                struct test_case *c);

#endif
