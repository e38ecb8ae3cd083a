/*
 * A translation under way: what the emitter of single instructions (emit.c) and the maker of blocks
 * (translate.c) share.
 */
#ifndef DOPPEL_ENGINE_SOFT_BT_TRANSLATE_H
#define DOPPEL_ENGINE_SOFT_BT_TRANSLATE_H

#include "engine/soft/bt/asm.h"
#include "engine/soft/bt/bt.h"

#define BT_HOT_RUNS 16
#define BT_MAX_INSNS 64
#define BT_MAX_STUBS 512
#define BT_MAX_RELOCS 2048
#define BT_GROUP_SPAN 512
#define BT_DIRECT_GROUPS 8
#define BT_DIRECT_TICKS 16
#define BT_DIRECT_PERIOD 8000000 /* some 3 ms */

/*
 * Where the guest's arithmetic flags are at a point of the code. At least one holds:
 *   host    in the host's flags register;
 *   memory  in v->aflags, or, but if they are settled, as a pending recipe whose number is in its upper half;
 *   recipe  not kept, but to be had again from registers that haven't changed.
 */
struct flag_state {
    bool host, memory, settled;
    struct bt_recipe recipe; /* kind RECIPE_NONE: no recipe */
};

/*
 * One check serves accesses at [lo, hi) off one base: a register holds the host address of base + index
 * + lo, S1 for group 0, a borrowed one for the others. `shift` is what was added to the base since.
 */
struct access_group {
    bool valid, write;
    unsigned used; /* when last, as an instruction's number */
    u8 base, index, scale;
    s64 lo, hi; /* lo is one that an instruction can have */
    s32 shift;
};

/*
 * Direct code: the chunk of base + index + at is mapped, as long as the registers are what they were, but for
 * `shift`, which was added to the base since. So are the bytes for DIRECT_REACH around (direct.c).
 */
struct direct_group {
    bool valid;
    u8 base, index, scale;
    s64 at;
    s32 shift;
};
#define DIRECT_REACH ((s64)MIB(1))

#define CHUNK_IN_S2 UINT32_MAX
#define NO_SITE UINT32_MAX

/*
 * With BT_MODE_DIRECT: what is known of RSP, which is used without a look into the map. Wherever one block goes on to
 * another, RSP is in a chunk that was found mapped, or at most STACK_SLACK away from an address at which a stack access
 * was made since.
 */
struct stack_state {
    bool known;   /* else it must be looked up */
    bool touched; /* there was an access */
    s64 drift; /* RSP less the address of the last one, or less what RSP was at the block's start */
};
#define STACK_SLACK ((s64)KIB(32))

enum stub_kind { STUB_SLOW, STUB_EXIT, STUB_FAR, STUB_SITE, STUB_NARROW, STUB_STACK };

/* Code that is emitted behind the block, in the cold half. */
struct stub {
    u8 kind;    /* enum stub_kind */
    u8 reason;  /* STUB_SITE: enum bt_reason */
    u8 *from;   /* the displacement that leads to it */
    u32 number; /* of its site or exit; STUB_NARROW: of the chunk, or CHUNK_IN_S2 */
    u32 x87;    /* STUB_NARROW: as in a site */
    s32 target; /* STUB_FAR: offset from the page's start; STUB_SLOW: of the TLB tags in the vCPU */
    const u8 *resume; /* where C may go on in the block; NULL: it never does */
    u8 perm[BT_PERM];
    struct flag_state flags;
    struct stack_state stack;
};

/* Four bytes of code that aren't the same where the block is copied to: share.c. */
enum bt_reloc_kind {
    RELOC_CODE,   /* a displacement to the block's other half, or to a way out */
    RELOC_SITE,   /* the number of a site */
    RELOC_EXIT,   /* of an exit */
    RELOC_RECIPE, /* of a recipe, in the upper half */
};
struct bt_reloc {
    u32 at : 28;  /* code offset */
    u32 kind : 4; /* enum bt_reloc_kind */
};
_Static_assert(BT_CODE_SIZE <= BIT32(28), "a code offset has 28 bits");

struct translation {
    struct soft_vcpu *v;
    struct bt *bt;
    struct bt_block *block;
    u8 *p; /* the cursor, in the writable mapping */
    struct flag_state flags;
    struct access_group groups[1 + BT_BORROWED];
    struct direct_group direct[BT_DIRECT_GROUPS];
    unsigned next_direct; /* the one to be used next */
    struct stack_state stack;
    /* Where access() left the operand's host address: a register, and in direct code maybe an index. */
    u8 operand, operand_index, operand_scale;
    const u8 *check_start; /* direct code: where the check under way begins, with the flags kept */
    /*
     * Registers. home: the host register of each of the guest's, or NO_REG for the two in memory
     * (memory_reg). By default these are R14 and R15; perm[n] is one that is in memory in the place of
     * R14 + n, whose host register is perm[n]'s then. perm[2] and perm[3] aren't used by the block, and
     * are borrowed for host addresses.
     */
    u8 home[16], memory_reg[2], perm[BT_PERM];
    bool links_pages; /* exits to other pages may be linked (kernel_links.c, direct.c) */
    bool goes_across; /* behind the last instruction is one that lies across the page's end */
    u32 x87;          /* as in a site */
    bool x87_live;    /* the x87 registers were made live in this block */
    u32 quick_site;   /* that of BT_QUICK, or NO_SITE */
    struct bt_insn insns[BT_MAX_INSNS + 1];
    u32 pending; /* registers of the recipe in v->aflags, and RECIPE_NO_REGS; 0: none is there */
    unsigned count, at; /* instructions, and the one under way */
    struct stub stubs[BT_MAX_STUBS];
    unsigned nstubs;
    struct bt_reloc relocs[BT_MAX_RELOCS];
    unsigned nrelocs;
    u8 code[(BT_MAX_INSNS + 1) * 15]; /* the guest's, that the block is made of */
};

static inline bool is_placed(const struct translation *t)
{
    return bt_is_placed(t->block->mode);
}

/* Whether RSP is one that accesses may use as it is (struct stack_state). */
static inline bool has_direct_stack(const struct translation *t)
{
    return t->block->mode & BT_MODE_DIRECT;
}

static inline u32 code_offset(const struct translation *t, const u8 *p)
{
    return (u32)(p - t->bt->writable);
}

/* The four bytes before `end`. More than there is room for make the block one that isn't shared. */
static inline void add_reloc(struct translation *t, const u8 *end, enum bt_reloc_kind kind)
{
    if (t->nrelocs < BT_MAX_RELOCS)
        t->relocs[t->nrelocs] = (struct bt_reloc){code_offset(t, end) - 4, kind};
    t->nrelocs++;
}

/* --- translate.c --- */

/* Whether n bytes of guest code are `code`. */
bool bt_source_is(const struct bt_source *source, const u8 *code, unsigned n);
/* From now on a store to the block's bytes is noticed. False: one came before that; `code` is what they were. */
bool bt_block_protect(struct soft_vcpu *v, const struct bt_block *b, const struct bt_source *source,
                      const u8 *code);
/* The block bt->blocks[bt->nblocks] is made, of `code`. Its sites are those from first_site on. */
void bt_block_finish(struct soft_vcpu *v, struct bt_block *b, u32 first_site, const u8 *code);

/* --- share.c --- */

/* The block that t has just made, whose sites and x87 instructions are those from these numbers on, is for others, too. */
void bt_publish(const struct translation *t, u32 first_site, u32 first_x87);

/* --- emit.c --- */

/* One instruction that isn't an end of its block. */
void emit_insn(struct translation *t, const struct bt_insn *i);
/* The operand of an indirect branch, into S1; flags are in memory afterwards. */
void emit_branch_target(struct translation *t, const struct bt_insn *i);
/* Pushes the address of the instruction behind i. */
void emit_push_return(struct translation *t, const struct bt_insn *i);
/* RET's load of its target into S1, with RSP moved. */
void emit_pop_return(struct translation *t, const struct bt_insn *i);

/* Registers: makes `perm` the current one; changes between it and the default; ends it for good. */
void use_perm(struct translation *t, const u8 perm[BT_PERM]);
void put_perm_in(struct translation *t);
/* For a way out that comes back: keeps host addresses in borrowed registers, and has them again. */
void put_keep_addresses(struct translation *t, bool again);
void put_perm_out(struct translation *t);
void leave_perm(struct translation *t);
extern const u8 no_perm[BT_PERM]; /* the default */

/* A memory operand as base, index, displacement and size, where checks may serve several. */
struct access {
    u8 base, index, scale;
    s32 disp;
    unsigned size;
    bool write;
};
/* Bases that are no registers: the start of the block's page, for RIP-relative operands, and segments'. */
#define PAGE_BASE GPR_ZERO
#define SEG_BASE(seg) ((u8)(0x20 + (seg)))
/* Whether all that i does to `base` is to add *by. */
bool adds_constant(const struct bt_insn *i, u8 base, s32 *by);
bool in_memory(const struct translation *t, u8 reg);
/* reg = the linear address of the byte that is `offset` from the start of the block's page, cut to `word` bytes. */
void put_page_address(struct translation *t, u8 reg, s64 offset, unsigned word);
/* op reg, the guest's register: its own host register, or `scratch` loaded from memory */
u8 read_reg(struct translation *t, u8 reg, u8 scratch);
/* lea reg, [base + index * scale + disp] of host registers; NO_REG: none */
void put_lea_full(u8 **p, bool wide, unsigned reg, u8 base, u8 index, u8 scale, s32 disp);
/* ModRM, SIB and displacement of the operand that access() left. */
void put_operand(struct translation *t, unsigned reg, s32 disp);
/* The next host instruction may raise an exception at guest instruction i. */
void add_point(struct translation *t, const struct bt_insn *i);
void add_point_at(struct translation *t, s64 offset);
/* A stack instruction is about to change RSP (and others): the flags stay. */
void flags_before_write(struct translation *t, u32 regs);

/* --- emit_direct.c --- */

static inline bool is_direct(const struct translation *t)
{
    return (t->block->mode & (BT_MODE_DIRECT | BT_MODE_NARROW)) == BT_MODE_DIRECT;
}
/* As access() of emit.c: has the operand at base + disp, and i's index and segment, checked. */
s32 direct_access(struct translation *t, const struct bt_insn *i, u8 base, s32 disp);
/* The instruction was emitted: which checks still serve? */
void direct_after(struct translation *t, const struct bt_insn *i);
/* C is entered, and comes back. */
void direct_forget(struct translation *t);
/* Before the code goes on to another block, from the instruction at `offset`: what that expects of RSP holds. */
void stack_settle(struct translation *t, s64 offset);
/* MOVS or STOS. False: it can't be done so. */
bool direct_string(struct translation *t, const struct bt_insn *i);
void direct_push(struct translation *t, const struct bt_insn *i);
void direct_pop(struct translation *t, const struct bt_insn *i);
void direct_leave(struct translation *t, const struct bt_insn *i);
void direct_push_return(struct translation *t, const struct bt_insn *i);
void direct_pop_return(struct translation *t, const struct bt_insn *i);

/* Leaves a recipe pending in v->aflags. False: there are too many. */
bool put_recipe(struct translation *t, const struct bt_recipe *r);
void flags_need(struct translation *t);
void flags_to_memory(struct translation *t);
/* For a return, behind which nobody is likely to ask: as a pending recipe of nothing that changes, if there is one. */
void flags_put_away(struct translation *t);
/* Before who asks for them: if all there is of them may be a recipe that is pending in memory, has C see to it. */
void flags_settle(struct translation *t);
/* The code that loads them from memory. */
void put_flags_load(struct translation *t);
/* Before something that changes the host's flags. */
void flags_clobber(struct translation *t);
void emit_flags_save(u8 **p);

/* --- emit_x87.c --- */

/* Before an x87 or MMX instruction: has the guest's registers in the host's. */
void x87_make_live(struct translation *t, const struct bt_insn *i);
/* i was emitted: the x87 pointers change, later. */
void x87_note(struct translation *t, const struct bt_insn *i);
/* Has the x87 pointers right in v->cpu. Keeps the host's flags. */
void x87_store_pointers(struct translation *t);
/* The registers are about to change. */
void x87_before_write(struct translation *t, u32 regs);

struct stub *add_stub(struct translation *t, enum stub_kind kind, u8 *from);
/* A site for instruction i, with the flags as they are now. */
u32 add_site(struct translation *t, const struct bt_insn *i);

/* The operand's address, without a segment's base, into `to`: base_reg + disp, and i's index. Uses S1
 * and S2. */
void emit_address(struct translation *t, const struct bt_insn *i, u8 to, u8 base_reg, s32 disp);

/* Whether a memory access or another clobber of the host's flags comes with the instruction. */
bool insn_clobbers_flags(const struct bt_insn *i);
/* General registers that it changes, one bit each. */
u32 insn_changed_regs(const struct bt_insn *i);

#endif
