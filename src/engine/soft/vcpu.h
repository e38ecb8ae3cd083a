/*
 * The software processor's vCPU: the architecture (struct cpu) and what makes it run fast.
 *
 * Conventions that all of engine/soft keeps
 *  1. RIP. While a block runs, cpu.gpr[GPR_RIP] is the (E)IP of the block's first byte, and the current
 *     instruction is at gpr[GPR_RIP] + v->cur->offset. Between blocks gpr[GPR_RIP] is exact and v->cur is
 *     &insn_none (offset 0, length 0). soft_ip and soft_next_ip hide the difference.
 *  2. v->cur is set by whatever may fault: slow paths of memory accesses, and every handler that is
 *     not a plain integer one (INSN handlers in tables wrapped by decode.c start with v->cur = i).
 *  3. A guest fault is raised by soft_raise*, which does not return: it puts RIP on the faulting
 *     instruction and unwinds (longjmp) to the run loop, which delivers it. So a handler changes no
 *     architectural state before its last possible fault, and holds no lock across one.
 *  4. Arithmetic flags live in v->aflags (see flags.h); cpu.rflags holds all the others. Use
 *     soft_flags_get and soft_flags_set for the whole.
 *  5. After a change of CR0, CR4, EFER, XCR0, PKRU's enabling, CS, SS, CPL or EFLAGS.VM/TF/AC call
 *     soft_mode_changed: it recomputes what is derived (mode, effective bases, TLB in use). An
 *     instruction that can change any of these must end its block (INSN_ENDS_BLOCK in its definition).
 *  6. engine/soft reaches devices only through the buses of struct engine_config.
 */
#ifndef DOPPEL_ENGINE_SOFT_VCPU_H
#define DOPPEL_ENGINE_SOFT_VCPU_H

#include "engine/engine.h"
#include "engine/soft/insn.h"

#include <pthread.h>
#include <setjmp.h>
#include <stdatomic.h>

struct lapic;
struct soft_engine;
struct block_cache;
struct bt;
struct bt_journal;
struct bt_store;

/* Mode bits: they key decoded blocks, so code decoded in one mode never runs in another. */
#define MODE_CODE16 0x00u
#define MODE_CODE32 0x01u
#define MODE_CODE64 0x02u
#define MODE_CODE_MASK 0x03u
#define MODE_STACK32 0x04u   /* SS.B: PUSH, POP, CALL use ESP (64-bit mode always uses RSP) */
#define MODE_USER 0x08u      /* CPL 3 */
#define MODE_SINGLE 0x10u    /* one instruction a block: TF, code breakpoints, interrupt shadow */
#define MODE_PROTECTED 0x20u /* CR0.PE and not EFLAGS.VM */

/* Which translations an access uses. Tags of one never serve another. */
enum tlb_kind {
    TLB_KERNEL,    /* CPL 0 to 2, or implicit supervisor access, SMAP in force */
    TLB_KERNEL_AC, /* CPL 0 to 2 with EFLAGS.AC set, or no SMAP */
    TLB_USER,      /* CPL 3 */
    TLB_KINDS,
};

#define TLB_BITS 12
#define TLB_SIZE (1u << TLB_BITS)
/* What slot n holds for "nothing": a page of the next slot, which no access looks up here. */
#define TLB_NO_TAG(n) ((u64)((n) ^ 1) << GUEST_PAGE_SHIFT)

/* One page. An access at `lin` hits when (lin ^ tag) <= 4096 - size: same page, and not across it. */
struct tlb_entry {
    u64 read_tag;  /* linear address of the page, or TLB_NO_TAG(slot) */
    u64 write_tag; /* also: D set, no decoded code in the page, no dirty logging due */
    u64 host;      /* host address of the page; at a hit, lin ^ tag is the offset in it */
    u64 info;      /* guest-physical page address | TLB_INFO_* */
};
#define TLB_INFO_GLOBAL 0x1
#define TLB_INFO_LARGE 0x2    /* part of a 2 or 4 MiB page */
#define TLB_INFO_HUGE 0x4     /* part of a 1 GiB page */
#define TLB_INFO_WRITABLE 0x8 /* writes are allowed and D is set, even if write_tag is not */

struct tlb {
    struct tlb_entry entries[TLB_SIZE];
    /* One bit for each entry that may hold something: flushes look at these only. */
    u64 used[TLB_SIZE / 64];
    u64 nonglobal[TLB_SIZE / 64]; /* of these, the ones that go with an address space */
};

/* A page that instructions are fetched from. */
#define FETCH_ENTRIES 64
struct fetch_entry {
    u64 lin; /* of the page; FETCH_NONE: empty */
    gpa_t gpa;
    const u8 *host; /* NULL: not RAM or ROM */
    bool user, global;
};

#define FETCH_NONE 1 /* no page begins there */

/* Where translations of large pages were used since the last flush. */
struct large_range {
    gva_t low, high;
};

#define SOFT_POSTS 16
struct soft_post {
    unsigned kind; /* posts.c */
    gpa_t gpa;
    u64 len;
};

/* What an instruction of a class raises when it is not to be had now. */
enum fpu_class { FPU_X87, FPU_MMX, FPU_SSE, FPU_AVX, FPU_AVX512, FPU_CLASSES };

/* Reasons to look up from guest code (v->attention). Set by any thread, cleared by the vCPU. */
#define ATTN_INTERRUPT 0x01u /* the local APIC or ExtINT may have something */
#define ATTN_NMI 0x02u
#define ATTN_INIT 0x04u
#define ATTN_SIPI 0x08u
#define ATTN_KICK 0x10u
#define ATTN_SHADOW 0x20u /* own: shadow, TF, RF, code breakpoints, pending #DB: one careful step */
#define ATTN_POSTS 0x40u  /* others wrote memory that may hold decoded code (v->posts) */
#define ATTN_TIMER 0x100u /* the APIC timer may be due */
#define ATTN_UNHALT 0x200u /* a hypercall ends HLT, or the next one */
#define ATTN_LEFT 0x80u    /* own: v->leave is set, or cpu.activity is not CPU_RUNNING */

/*
 * What translated code reaches through GS (bt/essay in bt/translate.c). The jump cache maps a linear
 * address, mixed with jump_key, to the code of its block.
 */
#define JUMP_BITS 20 /* of an address, that tell where in the cache it is */
#define JUMP_ALIGN 2 /* the lowest, which don't: code has few entries so near each other */
#define JUMP_SIZE (1u << (JUMP_BITS - JUMP_ALIGN))
struct jump_entry {
    u64 tag;
    const u8 *code;
};
#define DIRECT_SHIFT 21
#define DIRECT_CHUNKS (1u << (47 - DIRECT_SHIFT))
struct bt_shared {
    u64 host_rsp;
    const u8 *entry; /* where bt_enter goes on */
    u64 ip_page;     /* linear address of the page that the running block begins in */
    u64 jump_key;
    u64 linear; /* of the access that missed */
    u64 temp;
    u64 kept_address[2]; /* host addresses in borrowed registers, while C fills the TLB */
    u64 flag_source;     /* an operand of what made the flags: see struct bt_recipe */
    u32 site;            /* which exit or access left the code */
    u32 reason;          /* enum bt_reason */
    struct jump_entry jump[JUMP_SIZE]; /* a lookup has one of the host's cache lines to fetch */
};

struct soft_vcpu {
    struct cpu cpu; /* first: handlers index it */

    /* Hot: derived from the state by soft_mode_changed */
    u32 aflags;              /* arithmetic flags, see flags.h */
    u32 mode;                /* MODE_* */
    struct tlb *tlb;         /* the TLB for accesses at the current privilege (maybe tlb_none) */
    enum tlb_kind tlb_kind;  /* how accesses at the current privilege translate */
    u64 seg_base[SEG_COUNT]; /* effective: 0 for ES, CS, SS, DS in 64-bit mode */
    const struct insn *cur;
    u8 canonical_shift; /* 64 less the width of a linear address */
    _Atomic u32 attention;
    _Atomic u8 sipi_vector;      /* of the last start-up IPI */
    u8 class_fault[FPU_CLASSES]; /* 0, or EXC_UD or EXC_NM */
    u64 icount;
    u64 repeat_icount; /* icount when a repeated instruction was last left in the middle */

    /* Translation */
    struct tlb tlbs[TLB_KINDS];
    struct tlb tlb_none; /* never filled: #AC checks and data breakpoints see every access */
    struct fetch_entry fetches[FETCH_ENTRIES];
    u64 map_generation; /* changes whenever any translation may have; from 1 on while code runs */
    struct large_range large_data[2], large_code; /* data: by the half of the address space */
    struct block_cache *blocks;
    struct insn_decoder *decoder;
    bool align_check;      /* #AC is on: CPL 3, CR0.AM, EFLAGS.AC */
    bool data_breakpoints; /* DR7 enables one */

    /* Configuration and neighbours */
    struct soft_engine *engine;
    const struct cpuid_model *cpuid;
    struct lapic *lapic;
    unsigned index;
    unsigned phys_bits;
    gpa_t a20_mask; /* all ones, or bit 20 clear */

    /* Unwinding from a fault to the run loop */
    jmp_buf unwind;
    struct {
        u8 vector;
        bool has_error;
        u32 error;
    } raised;

    /* x87 and SIMD on the host's units: host_exec.c */
    struct host_exec *host_exec;
    bool fpu_live; /* the guest's x87 registers are in the host's */

    /* Binary translation; NULL: the interpreter alone */
    struct bt *bt;
    u32 bt_mode;                /* keys translated blocks */
    bool bt_possible;           /* the current mode is one that is translated */
    struct bt_journal *journal; /* bt,verify; else NULL */
    bool journaling;            /* stores are noted, and to be undone */
    bool vectors_live;          /* the guest's vector registers and MXCSR are in the host's */

    struct vcpu_exit *exit; /* where the run loop's exit goes */
    bool leave;             /* vcpu_run must return with *exit */
    bool irq_waiting;       /* an interrupt was seen that could not be taken then */
    unsigned poll;          /* blocks to go until the APIC timer is looked at */
    u64 timer_deadline;     /* the APIC timer's, in VM ns; UINT64_MAX: none */
    struct block *block;    /* the one that runs, for counting instructions */

    struct engine_stats stats;

    _Atomic bool waiting; /* asleep, in HLT or MWAIT: whoever sets attention wakes it (wait.c) */
    u32 poll_ns;          /* for how long to look for attention before that: wait.c */
    _Atomic u64 woken_at; /* VM time of the last wake, ns; 0: it was seen to */
    u32 wake_ns;          /* how long wakes took lately: wait.c */
    bool unhalted;        /* the next HLT is over at once */
    int schedstat_fd;     /* the host's account of this thread; 0: not opened, -1: there is none */
    u64 steal_seen, steal_looked_at; /* of that account, ns; VM time, ns */
    u32 spin_yields;
    u64 spin_start, spin_last; /* of PAUSEs, in host TSC ticks */

    /* What others ask of this vCPU: posts.h. The counts are of posts since the beginning. */
    pthread_mutex_t posts_lock; /* guards these three, and changes of posts_sent */
    struct soft_post posts[SOFT_POSTS];
    unsigned nposts;
    bool posts_lost; /* there was no place for one */
    _Atomic u64 posts_sent, posts_answered;
    u64 posts_taken;     /* as posts_answered; the vCPU's own */
    _Atomic bool asleep; /* runs no guest code, and will look at its posts before it does */

    struct bt_shared bt_shared;
    /* By 2 MiB of user addresses: 1 where translated code may use them as they are (bt/direct.c). */
    u8 direct_map[DIRECT_CHUNKS];
};

#define SOFT_MAX_CPUS 64 /* sets of vCPUs are bits of a u64 */

/* What the engine knows of a page of guest memory. */
struct page_track {
    _Atomic u64 code_lines; /* which of its 64-byte lines hold code that a vCPU keeps blocks of */
    _Atomic u64 code_users; /* which vCPUs do */
    _Atomic u64 writers;    /* which vCPUs may have a write tag for it, or a store under way */
    _Atomic bool
        direct_write; /* a direct mapping for writing it may be there (bt/direct_space.c) */
};

/* Of some pages each: guards the clearing of code_lines (code_pages.c). */
#define SOFT_CODE_LOCKS 64
struct code_lock {
    pthread_mutex_t lock;
    u64 blocks; /* made of these pages' code so far */
};

struct direct_spaces;

struct soft_engine {
    struct engine_config config;
    struct soft_vcpu *vcpus[SOFT_MAX_CPUS];
    unsigned nvcpus;
    struct lapic_bus *lapic_bus;
    /* By slot, one a page. */
    struct page_track *pages[MEMORY_MAX_SLOTS];
    _Atomic u64 *dirty[MEMORY_MAX_SLOTS]; /* one bit a page, while dirty_logging */
    struct code_lock code_locks[SOFT_CODE_LOCKS];
    _Atomic bool dirty_logging;
    bool bt;                      /* vCPUs translate */
    struct bt_store *store;       /* of what they share of it; NULL: there is one vCPU */
    struct direct_spaces *direct; /* of bt: the mappings that its vCPUs share */
    _Atomic unsigned sleeping;    /* vCPUs, in HLT; those that wait for a start-up IPI, too */
    _Atomic bool a20;
    _Atomic bool extint;        /* the level at every LINT0 */
    _Atomic unsigned exclusive; /* number, from 1, of the vCPU that alone may run: posts.h */
    u64 tsc_hz;
};

extern const struct insn insn_none;

/* --- run.c --- */
/* RESET and INIT leave the processor's signature in EDX (SDM vol. 3, table 9-1). */
void soft_set_signature(struct soft_vcpu *v);

/* --- mode.c --- */
void soft_mode_changed(struct soft_vcpu *v);
/* The same, and quickly within 64-bit mode, if nothing has changed but CPL, CS, SS and EFLAGS. */
void soft_privilege_changed(struct soft_vcpu *v);

/* --- soft.c --- */
/* The guest's TSC: VM clock in TSC ticks, plus cpu.tsc_offset. */
u64 soft_tsc(struct soft_vcpu *v);
/* Sets bits of v->attention and wakes the vCPU from HLT. Any thread. */
void soft_attend(struct soft_vcpu *v, u32 bits);

static inline bool soft_long_mode(const struct soft_vcpu *v)
{
    return v->cpu.msr.efer & EFER_LMA;
}
static inline bool soft_code64(const struct soft_vcpu *v)
{
    return (v->mode & MODE_CODE_MASK) == MODE_CODE64;
}
static inline bool soft_protected(const struct soft_vcpu *v)
{
    return v->mode & MODE_PROTECTED;
}
static inline bool soft_vm86(const struct soft_vcpu *v)
{
    return v->cpu.rflags & EFLAGS_VM;
}
/* 3 in virtual-8086 mode, 0 in real mode. */
static inline unsigned soft_cpl(const struct soft_vcpu *v)
{
    return cpu_cpl(&v->cpu);
}
static inline bool soft_has(const struct soft_vcpu *v, enum cpuid_feature f)
{
    return cpuid_model_has(v->cpuid, f);
}

/*
 * Cuts an instruction pointer to its width. That is 32 bits in 16-bit code too: only branches with 16-bit
 * operands wrap at 64 KiB; code that runs off the end meets the segment's limit, or goes on in a larger
 * segment.
 */
static inline u64 soft_ip_mask(const struct soft_vcpu *v, u64 ip)
{
    return (v->mode & MODE_CODE_MASK) == MODE_CODE64 ? ip : (u32)ip;
}
/* The current instruction's address, and the next one's. */
static inline u64 soft_ip(const struct soft_vcpu *v)
{
    return soft_ip_mask(v, v->cpu.gpr[GPR_RIP] + v->cur->offset);
}
static inline u64 soft_next_ip(const struct soft_vcpu *v)
{
    return soft_ip_mask(v, v->cpu.gpr[GPR_RIP] + v->cur->offset + v->cur->len);
}
/* Makes `ip` the exact instruction pointer: the last thing an instruction that ends its block does. */
static inline void soft_set_ip(struct soft_vcpu *v, u64 ip)
{
    v->cpu.gpr[GPR_RIP] = ip;
    v->cur = &insn_none;
}
/* Leaves a repeated instruction between two iterations, with RIP on it. */
static inline void soft_leave_repeated(struct soft_vcpu *v)
{
    soft_set_ip(v, soft_ip(v));
    v->repeat_icount = v->icount;
}
/* Whether the next instruction is the rest of a repeated one: it is not broken at once more, and what
 * comes in between pushes RF set (vol. 3, 17.3.1.1). */
static inline bool soft_inside_repeated(const struct soft_vcpu *v)
{
    return v->repeat_icount == v->icount && v->icount;
}

#endif
