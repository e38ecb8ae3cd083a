/*
 * The cache of translated code: memory, blocks, and how they are found, linked and dropped.
 *
 * Memory is one memfd, mapped twice: where it is written and where it runs; never both in one mapping.
 * The first half has hot code, the second cold code (exits, slow paths). Both are handed out in order and
 * round, as is all else that blocks are made of; who needs room evicts the oldest blocks (evict.c).
 *
 * A block is keyed by the guest-physical address of its first byte and the mode (v->bt_mode). It lies
 * within one page. It holds no linear address: v->bt_shared.ip_page has the page's. So every mapping of
 * the page shares it. Not so direct code (BT_MODE_DIRECT), which is what runs longest, and kernel code: their blocks
 * are placed, that is, made for one linear address, which is part of their key. Theirs are the only exits that are
 * linked to other pages, while direct.c, or kernel_links.c, knows what is mapped there.
 *
 * An instruction that lies across two pages is a block of its own. It is right only where both pages are
 * mapped, so no exit is linked to it: it is entered by the jump cache alone, which forgets it when either
 * page's mapping is dropped.
 *
 * All of it belongs to one vCPU and its thread. What the vCPUs have of each other's translations are copies: share.c.
 */
#ifndef DOPPEL_ENGINE_SOFT_BT_CACHE_H
#define DOPPEL_ENGINE_SOFT_BT_CACHE_H

#include "engine/soft/bt/insn.h"

#include <time.h>

/* Why translated code returned to C (v->bt_shared.reason). */
enum bt_reason {
    BT_SLOW,   /* a memory access missed: site, linear */
    BT_LINK,   /* a direct exit that leads nowhere yet: site is the exit's number */
    BT_JUMP,   /* gpr[RIP] has no code yet */
    BT_BRANCH, /* as BT_JUMP, behind an indirect branch: site */
    BT_STOP,   /* at an instruction for the interpreter: site */
    BT_QUICK,  /* at one that the interpreter does without leaving: site, its resume the number */
    BT_FLAGS,  /* at a load of flags that are a pending recipe: site, its resume where to go on */
    BT_FPU,    /* the x87 registers aren't live: site, its resume where to go on */
    BT_STRING, /* at a string instruction: site, its resume where to go on behind it */
    BT_NARROW, /* linear, a chunk's number, isn't mapped: site is the number of an exit to code that does
                * without; its resume is where the check begins anew */
    BT_FAULT, /* the host raised an exception: site was a point; flags and RIP are exact */
};

enum site_flags { SITE_FLAGS_MEMORY, SITE_FLAGS_RECIPE, SITE_FLAGS_HOST };

/* Where translated code may leave for C, besides its direct exits. */
struct bt_site {
    u32 resume; /* BT_SLOW: code offset at which the access begins anew */
    u16 offset; /* of the guest's instruction in its page */
    u16 size;   /* bytes of the access; BT_BRANCH: what a RET had added to RSP */
    bool write;
    bool grouped; /* the check covers more than the instruction's own access */
    u8 flags;     /* enum site_flags: where the arithmetic flags are */
    struct bt_recipe recipe;
    u32 x87; /* number of the instruction that the x87 pointers don't show yet, or 0 */
    struct bt_string string; /* BT_STRING */
};

/*
 * An x87 instruction whose effect on FIP, FOP, FCS and, with a memory operand, FDP and FDS is kept back:
 * the operand's address is still to be had from the registers.
 */
struct bt_x87 {
    u16 offset; /* of the instruction in its page */
    u16 fop;
    bool memory, address32;
    bool rip_relative; /* disp counts from the page's start */
    u8 base, index, scale, seg;
    s32 disp;
};

/* A host instruction that may raise an exception. */
struct bt_point {
    u32 at;     /* code offset */
    u16 offset; /* of the guest's instruction in its page */
    u8 flags;   /* enum site_flags */
    struct bt_recipe recipe;
    u32 x87; /* as in a site */
};

#define BT_BORROWED 2
#define BT_PERM (2 + BT_BORROWED)

/* Where an exit leaves the arithmetic flags. */
enum exit_flags {
    EXIT_HOST,
    EXIT_MEMORY,
    /* In the host's register, and as a recipe whose number is in the upper half of v->aflags. */
    EXIT_RECIPE,
};

#define RECIPE_NO_REGS BIT32(31)

struct bt_exit {
    u32 at;     /* code offset of the displacement to patch */
    u32 bridge; /* of code behind it that brings the registers in default order ... */
    u32 at2;    /* and of the displacement at its end; 0: they are in order */
    u32 stub;   /* code offset of where all that leads when not linked */
    s32 target; /* offset from the page's start; outside of the page in placed blocks only */
    u8 flags;   /* enum exit_flags */
    u8 misses;  /* BT_NARROW: how often it was taken before it was linked */
    u32 resume; /* BT_NARROW: code offset of the check */
    u8 perm[BT_PERM];
    u32 recipe_regs;     /* EXIT_RECIPE: registers that it is made from; RECIPE_NO_REGS: it isn't */
    struct bt_block *to; /* NULL: not linked */
    struct bt_exit *next_in, **link_in; /* to->incoming: the next, and what points to this one */
};

/* What blocks are made of. */
enum bt_part { BT_HOT, BT_COLD, BT_EXITS, BT_SITES, BT_POINTS, BT_X87S, BT_KEPT, BT_PARTS };

/* A place in each: code offsets, and numbers. */
union bt_position {
    struct {
        u32 hot, cold, exits, sites, points, x87s, kept;
    };
    u32 of[BT_PARTS]; /* by enum bt_part */
};

/* What happens first to the flags that a block is entered with. */
enum first_use { FLAGS_CLOBBERED, FLAGS_NEEDED, FLAGS_OVERWRITTEN };

struct bt_block {
    gpa_t gpa;
    gpa_t gpa2; /* of the second page, when its one instruction lies across; else 0 */
    gva_t page; /* a placed block's: linear address of the page that it begins in; else 0 */
    u32 mode;
    u16 bytes, count; /* of guest code; of the instructions that are translated */
    bool dropped;
    bool listed[2]; /* in the list of its first page's blocks; of its second page's */
    union bt_position start;
    u32 hot_end, cold_end; /* code offsets */
    /* Entries, as code offsets: from the jump cache; with the flags in memory; in the host's register. */
    u32 jump_entry, memory_entry, host_entry;
    u8 first_use; /* enum first_use */
    /* A recipe of registers may be pending at memory_entry, if it needs none of kept_regs. */
    bool takes_recipe;
    u32 kept_regs;
    /* Registers in memory in the place of R14 and R15 (NO_REG: themselves), those that are borrowed for
     * host addresses (NO_REG: none), and the entries for who has all that already. */
    u8 perm[BT_PERM];
    u32 memory_native, host_native;
    u32 fault; /* code offset: leaves with BT_FAULT */
    u32 nexits, npoints;
    struct bt_block *hash_next, *page_next[2];
    struct bt_exit *incoming;
};

#define BT_STORE_SIZE MIB(128)
#define BT_CODE_SIZE MIB(256)
#define BT_COLD_START MIB(128)
#define BT_BLOCKS_MAX (1u << 20)
#define BT_EXITS_MAX (1u << 22)
#define BT_SITES_MAX (1u << 22)
#define BT_POINTS_MAX (1u << 23)
#define BT_X87S_MAX (1u << 18)
#define BT_KEPT_MAX (1u << 16)
#define BT_HASH_BITS 19
#define BT_PAGES_BITS 16
#define BT_FILTER_BITS 16
#define BT_SPACES 16
#define BT_MODES 512
#define BT_UNLINKED 8
#define BT_RECIPES (1u << 16)

/* What is chosen freely: it changes the speed, and nothing that the manual promises a guest. */
struct bt_choices {
    unsigned hot_runs;     /* of an interpreted block, before it is translated */
    unsigned max_insns;    /* of a block */
    s32 group_span;        /* bytes that the check for a group of accesses covers at most */
    unsigned direct_ticks; /* moments that user code was seen in, before it is mapped directly */
    u64 direct_period;     /* TSC ticks between such moments */
    u32 code_size;         /* bytes that hot code has, and cold code */
    unsigned array_shift; /* blocks, exits and so on: a 2^array_shift-th of the most there can be */
    u32 store_size;       /* bytes of what vCPUs share */
};

struct direct;
struct bt_links;

struct bt {
    struct bt_choices choices;
    u8 *writable;
    const u8 *executable;
    u32 glue[BT_FAULT + 1]; /* code offsets of the ways out, by reason */
    u32 (*enter)(void);     /* runs v->bt_shared.entry; returns enum bt_reason */

    struct bt_block *blocks;
    struct bt_exit *exits;
    struct bt_site *sites;
    struct bt_point *points;
    struct bt_x87 *x87s; /* the first is none */
    /* Instructions of BT_QUICK, each with one behind it that leaves. */
    struct insn (*kept)[2];

    /* What is handed out: from where on, to where, the next that is free, and how far there is nothing of the
     * oldest block's in the way. */
    union bt_position begin, end, next, bound;
    u32 oldest, nblocks, max_blocks; /* blocks there are, from the oldest on, round: bt_block_nth */
    struct bt_block *hash[1u << BT_HASH_BITS];
    /* By page_next: blocks that begin in a page; those with a gpa2. */
    struct bt_block *pages[2][1u << BT_PAGES_BITS];

    /* jump_key by mode; 0: to be given anew. */
    u16 contexts[BT_MODES]; /* of supervisor code */
    struct bt_space {
        unsigned pcid;
        u16 contexts[BT_MODES]; /* of user code */
    } spaces[BT_SPACES];
    unsigned space, next_space; /* the current one, and the next to be given another PCID */
    u32 next_context;
    bool kernel_nonglobal; /* supervisor code ran from pages that a write of CR3 drops */
    u64 filter[(1u << BT_FILTER_BITS) / 64]; /* hashes of pages with entries in the jump cache */

    /* By number; 0 is none. They are few: equal ones share a number for good. */
    struct bt_recipe recipes[BT_RECIPES];
    u32 nrecipes;
    u16 recipe_hash[BT_RECIPES];

    /* Leaving on request: see kick.c */
    volatile bool armed;
    struct bt_block *unlinked[BT_UNLINKED]; /* whose exits the signal handler undid */
    volatile u32 nunlinked;
    pthread_t thread;
    timer_t timer;
    u64 timer_at; /* host time that the timer is set to */
    _Atomic bool running, kicked;
    struct { /* the thread's signal stack before */
        void *sp;
        size_t size;
        int flags;
    } old_stack;
    void *signal_stack;
    struct direct *direct;
    struct bt_links *kernel_links;
    struct bt_block *from; /* whose exit led to where there is no code yet, or NULL */
    bool interp_next;      /* the next instruction is the interpreter's */
};

/* The best, or for a seed other than 0 random ones (direct code from the start if it is odd, else never): many runs,
 * each with a seed, try out what the best choices don't come to. */
struct bt_choices bt_choose(const struct engine_checks *checks);

int bt_cache_create(struct soft_vcpu *v, struct error *err);
void bt_cache_destroy(struct soft_vcpu *v);

/* Pointers for writing and running at a code offset. */
static inline u8 *bt_write_at(const struct bt *bt, u32 offset)
{
    return bt->writable + offset;
}
static inline const u8 *bt_run_at(const struct bt *bt, u32 offset)
{
    return bt->executable + offset;
}

/* The n-th oldest block; n is nblocks: the next one to be made. */
static inline struct bt_block *bt_block_nth(const struct bt *bt, u32 n)
{
    return &bt->blocks[(bt->oldest + n) % bt->max_blocks];
}

/* How far it is from one place to another in what is handed out round. */
static inline u32 bt_distance(const struct bt *bt, unsigned part, u32 from, u32 to)
{
    return to >= from ? to - from : to - from + (bt->end.of[part] - bt->begin.of[part]);
}

/* The block of a mode at gpa, or NULL. lin: where that is mapped. */
struct bt_block *bt_block_find(const struct soft_vcpu *v, gpa_t gpa, gva_t lin, u32 mode);
/* The page of bt_block.page for code at lin. */
gva_t bt_place(gva_t lin, u32 mode);
/* Makes known the block that is the next, and finished; its bytes' lines are protected by the caller. */
void bt_block_insert(struct soft_vcpu *v, struct bt_block *b);
/* The block that a host address lies in, or NULL. Async-signal-safe. */
struct bt_block *bt_block_at(const struct bt *bt, const u8 *pc);

/* Whether the exit, which isn't one of a dropped block, leads to another page. */
static inline bool bt_exit_is_across(const struct bt_exit *e)
{
    return e->target < 0 || e->target >= (s32)GUEST_PAGE_SIZE;
}
void bt_exit_link(struct bt *bt, struct bt_exit *e, struct bt_block *to);
/* Undoes the links from other pages to the placed blocks of the page that is mapped at lin. */
void bt_cut_links(struct bt *bt, gpa_t gpa, gva_t lin);
/* Makes an exit lead to its stub, or to its block again; who links to whom stays. */
void bt_exit_detach(struct bt *bt, const struct bt_exit *e);
void bt_exit_attach(struct bt *bt, const struct bt_exit *e);

/*
 * What an address is mixed with to be a tag, by context: a multiple of 1 << JUMP_ALIGN, up to the last one. And what
 * makes none that is there.
 */
#define JUMP_KEY(context) ((u64)(context) | (u64)(context) << 48)
#define JUMP_KEY_NONE JUMP_KEY(UINT16_MAX)
#define JUMP_CONTEXT_STEP (1u << JUMP_ALIGN)
#define JUMP_CONTEXT_LAST (0x10000u - 2 * JUMP_CONTEXT_STEP)
/* Of an address that was mixed with its higher bits: what tells the slot of the jump cache. */
#define JUMP_MASK ((JUMP_SIZE - 1) << JUMP_ALIGN)
/*
 * The slot of the jump cache for lin. Addresses that differ by two contexts, or by one and the key that makes no tag, have
 * different slots, so that the tag, which has the context in the address's low bits, tells all of them apart.
 */
static inline unsigned bt_jump_slot(u64 lin)
{
    return ((lin ^ lin >> JUMP_BITS) & JUMP_MASK) >> JUMP_ALIGN;
}
/* What an empty slot holds: a tag that no address of this slot has in any context, canonical or not. */
static inline u64 bt_jump_no_tag(unsigned slot)
{
    return (u64)slot << JUMP_ALIGN;
}
void bt_jump_clear(struct soft_vcpu *v);
/* Code was left by a jump to lin: what the slot holds for it is of no use, or was dropped. */
void bt_jump_missed(struct soft_vcpu *v, gva_t lin);
/* What leads to hot code at offsets from `from` to `end` goes. */
void bt_jump_forget(struct soft_vcpu *v, u32 from, u32 end);
/* Enters a block into the jump cache for the linear address lin. */
void bt_jump_insert(struct soft_vcpu *v, gva_t lin, const struct bt_block *b);

/* [gpa, gpa + n) within one page is written: drops its blocks. Returns the lines that blocks still
 * use in the page. */
u64 bt_written(struct soft_vcpu *v, gpa_t gpa, u64 n);
/* The lines that blocks use in a page. Its lists are rid of dropped ones. */
u64 bt_lines(struct soft_vcpu *v, gpa_t page);
/* Drops every block. */
void bt_drop_all(struct soft_vcpu *v);
/* Nothing is left of any block in the pages of b. */
void bt_leave_pages(struct soft_vcpu *v, const struct bt_block *b);
/* Drops a block, so that its memory may be used again: nothing leads to it but the jump cache and the pages' lists. */
void bt_block_forget(struct soft_vcpu *v, struct bt_block *b);
/* The number of a recipe; 0: there are too many. */
u16 bt_recipe_number(struct bt *bt, const struct bt_recipe *r);
/* Keeps an instruction for BT_QUICK; returns its number. */
u32 bt_keep_insn(struct bt *bt, const struct insn *i);

/* --- evict.c --- */

/* Begins with an empty cache; begin.hot is set. */
void bt_room_create(struct bt *bt);
/* Whether there is room for one more block, whatever it is. */
bool bt_has_room(const struct bt *bt);
/*
 * Makes room: evicts some of the oldest blocks, in a time that is bounded. There may not be enough yet: then it is to be
 * called again. Not while code that was left may be gone on with.
 */
void bt_evict(struct soft_vcpu *v);
/* Drops everything, and uses its memory again. As bt_evict. */
void bt_flush(struct soft_vcpu *v);

/* The mode changed: bt_mode and bt_possible, and the key of the jump cache. */
void bt_mode_changed(struct soft_vcpu *v);
/* CPL or EFLAGS.AC alone did, within 64-bit mode. */
void bt_privilege_changed(struct soft_vcpu *v);
/* Translations changed: all; those that are not global; one page's. */
void bt_mappings_dropped(struct soft_vcpu *v);
void bt_nonglobal_dropped(struct soft_vcpu *v);
/* CR3 was written. keep: what was known of that PCID still holds. */
void bt_space_switched(struct soft_vcpu *v, unsigned pcid, bool keep);
void bt_page_dropped(struct soft_vcpu *v, gva_t lin);

#endif
