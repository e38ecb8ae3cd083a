/*
 * The soft MMU.
 *
 * A guest-linear address becomes a host address in two steps: the guest's own page tables give the
 * guest-physical address, the slot list the host's. The result is kept in a direct-mapped TLB, one for
 * each kind of access (enum tlb_kind), whose entries hold one tag for reading and one for writing.
 *
 * Invariants
 *  1. A tag is set only while the access it allows needs nothing more: the page tables permit it for the
 *     TLB's kind, A (and for write_tag D) is set in them, the page is RAM (for reading, or ROM).
 *  2. write_tag is never set on a page with a bit in code_lines, nor on one whose next write the dirty
 *     log must see. Who sets such a bit has every vCPU drop its tags (code_pages.c, posts.c).
 *  3. While v->tlb is tlb_none (alignment checks, data breakpoints) every access comes through here.
 *  4. map_generation changes whenever a translation may have changed for fetches; the block cache
 *     compares it. v->fetches holds nothing that was dropped.
 *
 * Entries carry no PCID: a write of CR3 drops what is not global, whatever CR3 bit 63 asks. That is
 * allowed (vol. 3, 4.10.4.1: bit 63 permits to keep, nothing more). The translator's jump cache keeps the
 * address spaces apart.
 */
#include "engine/soft/mmu.h"

#include "engine/soft/block.h"
#include "engine/soft/bt/bt.h"
#include "engine/soft/code_pages.h"
#include "engine/soft/debug.h"
#include "engine/soft/exception.h"
#include "engine/soft/lapic.h"
#include "engine/soft/posts.h"

/* A translation: where the byte at a linear address is. */
struct place {
    gpa_t gpa;
    u8 *host; /* NULL: MMIO */
    bool rom;
    struct page_track *track; /* the page's; NULL with host NULL */
};

/* --- Physical memory --- */

static struct place place_of(struct soft_vcpu *v, gpa_t gpa)
{
    struct soft_engine *e = v->engine;
    const struct memory_slot *slot;
    struct place p = {.gpa = gpa};

    if (unlikely(lapic_claims(v->lapic, gpa)))
        return p;
    slot = memory_find(e->config.memory, gpa);
    if (!slot)
        return p;
    p.host = slot->host + (gpa - slot->gpa);
    p.rom = slot->flags & MEMORY_ROM;
    p.track = soft_track_in(e, slot, gpa);
    return p;
}

/* Whether the page holds code, so that soft_code_written must hear of a store; which was announced. */
static bool holds_code(const struct place *p)
{
    return atomic_load(&p->track->code_lines);
}

static void mark_dirty(struct soft_vcpu *v, gpa_t gpa)
{
    struct soft_engine *e = v->engine;
    const struct memory_slot *slot = memory_find(e->config.memory, gpa);
    _Atomic u64 *dirty = slot ? e->dirty[slot - e->config.memory->slots] : NULL;
    u64 page;

    if (!dirty)
        return;
    page = (gpa - slot->gpa) >> GUEST_PAGE_SHIFT;
    atomic_fetch_or(&dirty[page / 64], BIT(page % 64));
}

static u64 mmio_read(struct soft_vcpu *v, gpa_t gpa, unsigned size)
{
    if (v->journaling)
        bt_journal_stop(v);
    v->stats.exits_mmio++;
    soft_vectors_sync(v);
    if (lapic_claims(v->lapic, gpa))
        return lapic_mmio_read(v->lapic, gpa & (GUEST_PAGE_SIZE - 1), size);
    return io_bus_read(v->engine->config.mmio, gpa, size);
}

static void mmio_write(struct soft_vcpu *v, gpa_t gpa, u64 value, unsigned size)
{
    if (v->journaling)
        bt_journal_stop(v);
    v->stats.exits_mmio++;
    soft_vectors_sync(v);
    if (lapic_claims(v->lapic, gpa)) {
        lapic_mmio_write(v->lapic, gpa & (GUEST_PAGE_SIZE - 1), value, size);
        /* TPR, EOI and timer registers change what is deliverable, and when. */
        v->poll = 0;
        atomic_fetch_or(&v->attention, ATTN_INTERRUPT);
        return;
    }
    io_bus_write(v->engine->config.mmio, gpa, value, size);
}

/* --- Page tables --- */

enum paging { PAGING_32, PAGING_PAE, PAGING_4, PAGING_5 };

struct walk {
    gpa_t gpa;     /* of lin */
    bool user;     /* U in every entry */
    bool writable; /* W in every entry */
    bool exec;     /* NX in none */
    bool global;
    bool dirty; /* D was set before */
    unsigned pkey;
    bool keyed;    /* 4- and 5-level paging */
    u64 page_mask; /* size of the leaf - 1 */
    /* The entries used, for A and D: where they are and what was read. */
    struct {
        gpa_t gpa;
        u64 value;
    } entry[5];
    unsigned nentries;
    unsigned entry_size;
};

enum walk_result { WALK_OK, WALK_NOT_PRESENT, WALK_RESERVED };

static u64 read_entry(struct soft_vcpu *v, gpa_t gpa, unsigned size)
{
    struct place p = place_of(v, gpa);

    if (!p.host) {
        soft_vectors_sync(v);
        return io_bus_read(v->engine->config.mmio, gpa, size);
    }
    if (size == 4)
        return atomic_load_explicit((_Atomic u32 *)(void *)p.host, memory_order_relaxed);
    return atomic_load_explicit((_Atomic u64 *)(void *)p.host, memory_order_relaxed);
}

/* Sets bits in an entry that still has the value seen. False: it changed, walk again. */
static bool update_entry(struct soft_vcpu *v, gpa_t gpa, unsigned size, u64 seen, u64 bits)
{
    struct place p = place_of(v, gpa);
    bool done;

    if (!p.host || p.rom)
        return true;
    soft_announce_store(v, p.track);
    if (holds_code(&p))
        soft_code_written(v, gpa, size);
    if (size == 4) {
        u32 old = (u32)seen;

        done =
            atomic_compare_exchange_strong((_Atomic u32 *)(void *)p.host, &old, (u32)(seen | bits));
    } else {
        u64 old = seen;

        done = atomic_compare_exchange_strong((_Atomic u64 *)(void *)p.host, &old, seen | bits);
    }
    if (done)
        mark_dirty(v, gpa);
    return done;
}

static enum paging paging_mode(const struct cpu *cpu)
{
    if (cpu->msr.efer & EFER_LMA)
        return cpu->cr4 & CR4_LA57 ? PAGING_5 : PAGING_4;
    return cpu->cr4 & CR4_PAE ? PAGING_PAE : PAGING_32;
}

/* 32-bit paging (vol. 3, 4.3). */
static enum walk_result walk_32(struct soft_vcpu *v, gva_t lin, struct walk *w)
{
    const struct cpu *cpu = &v->cpu;
    gpa_t table = cpu->cr3 & 0xfffff000;

    w->entry_size = 4;
    w->user = w->writable = w->exec = true;
    for (int level = 1; level >= 0; level--) {
        gpa_t gpa = (table + ((lin >> (level ? 22 : 12)) & 0x3ff) * 4) & v->a20_mask;
        u64 entry = read_entry(v, gpa, 4);

        w->entry[w->nentries].gpa = gpa;
        w->entry[w->nentries++].value = entry;
        if (!(entry & PTE_P))
            return WALK_NOT_PRESENT;
        w->user &= !!(entry & PTE_U);
        w->writable &= !!(entry & PTE_W);
        w->global = (entry & PTE_G) && (cpu->cr4 & CR4_PGE);
        w->dirty = entry & PTE_D;
        if (level == 0) {
            w->page_mask = GUEST_PAGE_SIZE - 1;
            w->gpa = (entry & 0xfffff000) | (lin & w->page_mask);
        } else if ((entry & PTE_PS) && (cpu->cr4 & CR4_PSE)) {
            /* PSE-36: bits 20 to 13 are address bits 39 to 32; those beyond MAXPHYADDR, and
             * bit 21, are reserved. */
            u64 high = (entry >> 13) & 0xff;

            if ((entry & BIT(21)) || (v->phys_bits < 40 && high >> (v->phys_bits - 32)))
                return WALK_RESERVED;
            w->page_mask = MIB(4) - 1;
            w->gpa = high << 32 | (entry & 0xffc00000) | (lin & w->page_mask);
            break;
        }
        table = entry & 0xfffff000;
    }
    return WALK_OK;
}

/* PAE, 4-level and 5-level paging (vol. 3, 4.4 and 4.5). */
static enum walk_result walk_64(struct soft_vcpu *v, gva_t lin, enum paging paging, struct walk *w)
{
    const struct cpu *cpu = &v->cpu;
    bool pae = paging == PAGING_PAE;
    int level = pae ? 1 : paging == PAGING_5 ? 4 : 3;
    u64 address = PTE_ADDR_MASK & (BIT(v->phys_bits) - 1);
    u64 reserved = PTE_ADDR_MASK & ~address;
    gpa_t table = cpu->cr3 & address;

    w->entry_size = 8;
    w->keyed = !pae;
    w->user = w->writable = w->exec = true;
    if (!(cpu->msr.efer & EFER_NXE))
        reserved |= PTE_NX;
    if (pae) {
        u64 pdpte = cpu->pdpte[(lin >> 30) & 3];

        reserved |= 0x7ff0000000000000ULL;
        if (!(pdpte & PTE_P))
            return WALK_NOT_PRESENT;
        table = pdpte & address;
    }
    for (;; level--) {
        unsigned shift = 12 + 9 * (unsigned)level;
        gpa_t gpa = (table + ((lin >> shift) & 0x1ff) * 8) & v->a20_mask;
        u64 entry = read_entry(v, gpa, 8);
        bool leaf = level == 0 || (entry & PTE_PS);

        w->entry[w->nentries].gpa = gpa;
        w->entry[w->nentries++].value = entry;
        if (!(entry & PTE_P))
            return WALK_NOT_PRESENT;
        if (entry & reserved)
            return WALK_RESERVED;
        w->user &= !!(entry & PTE_U);
        w->writable &= !!(entry & PTE_W);
        w->exec &= !(entry & PTE_NX);
        if (!leaf) {
            table = entry & address;
            continue;
        }
        if (level > 2 || (level == 2 && !soft_has(v, FEATURE_PAGE1GB)))
            return WALK_RESERVED;
        w->page_mask = BIT(shift) - 1;
        /* Bit 12 of a large page's entry is PAT; the address bits below its size are reserved. */
        if (level && (entry & address & w->page_mask & ~BIT(12)))
            return WALK_RESERVED;
        w->gpa = (entry & address & ~w->page_mask) | (lin & w->page_mask);
        w->global = (entry & PTE_G) && (cpu->cr4 & CR4_PGE);
        w->dirty = entry & PTE_D;
        w->pkey = (entry >> PTE_PKEY_SHIFT) & 15;
        return WALK_OK;
    }
}

/* Whether a protection key denies a data access (vol. 3, 4.6.2). */
static bool key_denies(const struct soft_vcpu *v, const struct walk *w, enum tlb_kind kind,
                       bool write)
{
    const struct cpu *cpu = &v->cpu;
    u32 rights;

    if (!w->keyed)
        return false;
    if (w->user) {
        if (!(cpu->cr4 & CR4_PKE))
            return false;
        rights = cpu->pkru >> (2 * w->pkey);
    } else {
        if (!(cpu->cr4 & CR4_PKS))
            return false;
        rights = (u32)cpu->msr.pkrs >> (2 * w->pkey);
    }
    if (rights & 1)
        return true;
    return write && (rights & 2) && (kind == TLB_USER || (cpu->cr0 & CR0_WP));
}

/* Whether the page may be accessed so, keys aside (vol. 3, 4.6.1). */
static bool permits(const struct soft_vcpu *v, const struct walk *w, enum tlb_kind kind,
                    unsigned access)
{
    const struct cpu *cpu = &v->cpu;

    if (kind == TLB_USER) {
        if (!w->user)
            return false;
        return access & ACCESS_EXEC ? w->exec : !(access & ACCESS_WRITE) || w->writable;
    }
    if (access & ACCESS_EXEC)
        return w->exec && !(w->user && (cpu->cr4 & CR4_SMEP));
    if (w->user && kind == TLB_KERNEL && (cpu->cr4 & CR4_SMAP))
        return false;
    return !(access & ACCESS_WRITE) || w->writable || !(cpu->cr0 & CR0_WP);
}

static _Noreturn void page_fault(struct soft_vcpu *v, gva_t lin, enum tlb_kind kind,
                                 unsigned access, u32 error)
{
    if (access & ACCESS_WRITE)
        error |= PF_W;
    if (kind == TLB_USER)
        error |= PF_U;
    if ((access & ACCESS_EXEC) &&
        ((v->cpu.cr4 & CR4_SMEP) || ((v->cpu.msr.efer & EFER_NXE) && (v->cpu.cr4 & CR4_PAE))))
        error |= PF_I;
    soft_raise_page_fault(v, lin, error);
}

/* Walks, checks and sets A and D; raises #PF. */
static void translate_paged(struct soft_vcpu *v, gva_t lin, enum tlb_kind kind, unsigned access,
                            struct walk *w)
{
    enum paging paging = paging_mode(&v->cpu);
    enum walk_result result;
    bool write = access & ACCESS_WRITE, again;

    do {
        *w = (struct walk){0};
        result = paging == PAGING_32 ? walk_32(v, lin, w) : walk_64(v, lin, paging, w);
        if (result == WALK_NOT_PRESENT)
            page_fault(v, lin, kind, access, 0);
        if (result == WALK_RESERVED)
            page_fault(v, lin, kind, access, PF_P | PF_RSVD);
        if (!permits(v, w, kind, access))
            page_fault(v, lin, kind, access, PF_P);
        if (!(access & ACCESS_EXEC) && key_denies(v, w, kind, write))
            page_fault(v, lin, kind, access, PF_P | PF_PK);
        again = false;
        for (unsigned n = 0; n < w->nentries && !again; n++) {
            bool leaf = n == w->nentries - 1;
            u64 bits = PTE_A | (leaf && write ? PTE_D : 0);

            if ((w->entry[n].value & bits) != bits)
                again = !update_entry(v, w->entry[n].gpa, w->entry_size, w->entry[n].value, bits);
        }
    } while (again);
    w->dirty |= write;
    w->gpa &= v->a20_mask;
}

static enum tlb_kind access_kind(const struct soft_vcpu *v, unsigned access)
{
    return access & ACCESS_SYSTEM ? TLB_KERNEL : v->tlb_kind;
}

/*
 * Lets stores to e's page take the fast path, if nothing must see them first. Under the dirty log only a
 * write may do so: the first since the log was read has to come here. A write was announced.
 */
static void grant_writes(struct soft_vcpu *v, struct tlb_entry *e, gva_t page,
                         const struct place *p, bool write)
{
    if (!(e->info & TLB_INFO_WRITABLE) || p->rom)
        return;
    soft_announce_store(v, p->track);
    if (holds_code(p))
        return;
    if (v->engine->dirty_logging) {
        if (!write)
            return;
        mark_dirty(v, p->gpa);
    }
    e->write_tag = page;
}

/* Where large pages are, so that INVLPG knows when it has more to do. */
static void note_large(struct large_range *r, gva_t lin, u64 mask)
{
    if (mask == GUEST_PAGE_SIZE - 1)
        return;
    r->low = MIN(r->low, lin & ~mask);
    r->high = MAX(r->high, lin | mask);
}

static bool in_large(const struct large_range *r, gva_t lin)
{
    return lin >= r->low && lin <= r->high;
}

/* Translates within one page, and keeps the result. */
static struct place translate(struct soft_vcpu *v, gva_t lin, unsigned access)
{
    enum tlb_kind kind = access_kind(v, access);
    struct tlb_entry *e = tlb_slot(&v->tlbs[kind], lin);
    gva_t page = lin & ~(GUEST_PAGE_SIZE - 1);
    bool write = access & ACCESS_WRITE, can_read = true;
    u64 info = 0;
    struct place p;

    if (e->read_tag == page && (!write || (e->info & TLB_INFO_WRITABLE))) {
        p = place_of(v, (e->info & ~(GUEST_PAGE_SIZE - 1)) | (lin & (GUEST_PAGE_SIZE - 1)));
        if (write) {
            mark_dirty(v, p.gpa);
            grant_writes(v, e, page, &p, true);
        }
        return p;
    }
    v->stats.tlb_misses++;
    if (v->cpu.cr0 & CR0_PG) {
        struct walk w;

        translate_paged(v, lin, kind, access, &w);
        p = place_of(v, w.gpa);
        can_read = !key_denies(v, &w, kind, false);
        if (w.dirty && permits(v, &w, kind, ACCESS_WRITE) && !key_denies(v, &w, kind, true))
            info |= TLB_INFO_WRITABLE;
        if (w.global)
            info |= TLB_INFO_GLOBAL;
        if (w.page_mask != GUEST_PAGE_SIZE - 1)
            info |= w.page_mask >= GIB(1) - 1 ? TLB_INFO_HUGE : TLB_INFO_LARGE;
        note_large(&v->large_data[lin >> 63], lin, w.page_mask);
    } else {
        p = place_of(v, lin & v->a20_mask);
        info |= TLB_INFO_WRITABLE;
    }
    if (!p.host)
        return p;
    if (write)
        mark_dirty(v, p.gpa);
    e->read_tag = can_read ? page : page ^ GUEST_PAGE_SIZE;
    e->write_tag = page ^ GUEST_PAGE_SIZE;
    e->host = (u64)(uintptr_t)p.host - (lin & (GUEST_PAGE_SIZE - 1));
    e->info = (p.gpa & ~(GUEST_PAGE_SIZE - 1)) | info;
    soft_tlb_note(&v->tlbs[kind], (u64)(e - v->tlbs[kind].entries));
    grant_writes(v, e, page, &p, write);
    return p;
}

/* --- Accesses --- */

/* The checks on the address itself, before any translation. Returns it as the bus sees it. */
static gva_t check_address(struct soft_vcpu *v, gva_t lin, size_t n, unsigned access)
{
    if (!soft_long_mode(v))
        return (u32)lin;
    if (unlikely(!soft_canonical(v, lin) || !soft_canonical(v, lin + n - 1)))
        soft_raise_error(v, access & ACCESS_STACK ? EXC_SS : EXC_GP, 0);
    return lin;
}

/*
 * #AC (SDM vol. 3, table 6-7; APM vol. 2, 8.2.18): scalars and vectors lie on their own size, up to 16
 * bytes, 80-bit numbers on 8 bytes, and the x87 images on their words, 2 or 4 bytes, whose number is odd.
 */
static void check_alignment(struct soft_vcpu *v, gva_t lin, size_t n, unsigned access)
{
    size_t boundary = n == 10 ? 8 : MIN(n & -n, 16);

    if (v->align_check && !(access & (ACCESS_SYSTEM | ACCESS_UNALIGNED)) && (lin & (boundary - 1)))
        soft_raise_error(v, EXC_AC, 0);
}

static void check_watches(struct soft_vcpu *v, gva_t lin, size_t n, unsigned access)
{
    check_alignment(v, lin, n, access);
    if (v->data_breakpoints)
        soft_data_access(v, lin, n, access);
}

static bool crosses_page(gva_t lin, size_t n)
{
    return (lin & (GUEST_PAGE_SIZE - 1)) + n > GUEST_PAGE_SIZE;
}

/* The start of the page behind lin's, with the wrap of the mode. */
static gva_t next_page(const struct soft_vcpu *v, gva_t lin)
{
    gva_t next = (lin | (GUEST_PAGE_SIZE - 1)) + 1;

    return soft_long_mode(v) ? next : (u32)next;
}

/* Frames and operands, by general registers: memcpy would take the vector registers. What a register holds is
 * copied at once, for another vCPU never sees a part of it. */
static void copy_small(void *to, const void *from, size_t n)
{
    u8 *d = to;
    const u8 *s = from;

    for (; n >= 8; n -= 8, d += 8, s += 8)
        memcpy(d, s, 8);
    if (n & 4) {
        memcpy(d, s, 4);
        d += 4, s += 4;
    }
    if (n & 2) {
        memcpy(d, s, 2);
        d += 2, s += 2;
    }
    if (n & 1)
        *d = *s;
}

/* A load of 1, 2, 4 or 8 bytes at once. */
static u64 read_scalar(const void *from, unsigned size)
{
    union {
        u8 n8;
        u16 n16;
        u32 n32;
        u64 n64;
    } value;

    switch (size) {
    case 1:
        memcpy(&value.n8, from, 1);
        return value.n8;
    case 2:
        memcpy(&value.n16, from, 2);
        return value.n16;
    case 4:
        memcpy(&value.n32, from, 4);
        return value.n32;
    default:
        memcpy(&value.n64, from, 8);
        return value.n64;
    }
}

static void copy(void *to, const void *from, size_t n)
{
    if (n <= 64)
        copy_small(to, from, n);
    else
        memcpy(to, from, n);
}

static void place_read(struct soft_vcpu *v, const struct place *p, void *buf, size_t n)
{
    u8 *to = buf;

    if (p->host) {
        copy(buf, p->host, n);
        return;
    }
    for (size_t done = 0; done < n;) {
        size_t left = n - done;
        unsigned size = left >= 8 ? 8 : left >= 4 ? 4 : left >= 2 ? 2 : 1;
        u64 value = mmio_read(v, p->gpa + done, size);

        memcpy(to + done, &value, size);
        done += size;
    }
}

static void place_write(struct soft_vcpu *v, const struct place *p, const void *buf, size_t n)
{
    const u8 *from = buf;

    if (p->host) {
        if (p->rom)
            return;
        soft_announce_store(v, p->track);
        if (v->journaling)
            bt_journal_write(v, p->host, n);
        else if (holds_code(p))
            soft_code_written(v, p->gpa, n);
        copy(p->host, buf, n);
        return;
    }
    for (size_t done = 0; done < n;) {
        size_t left = n - done;
        unsigned size = left >= 8 ? 8 : left >= 4 ? 4 : left >= 2 ? 2 : 1;
        u64 value = 0;

        memcpy(&value, from + done, size);
        mmio_write(v, p->gpa + done, value, size);
        done += size;
    }
}

/* Where the TLB has an access of n bytes, or NULL. */
static void *find_hit(struct soft_vcpu *v, gva_t lin, size_t n, unsigned access)
{
    const struct tlb_entry *e = tlb_slot(&v->tlbs[access_kind(v, access)], lin);
    u64 in_page = lin ^ (access & ACCESS_WRITE ? e->write_tag : e->read_tag);

    if (in_page > GUEST_PAGE_SIZE - n || v->tlb == &v->tlb_none)
        return NULL;
    return (void *)(uintptr_t)(e->host + in_page);
}

void soft_load_bytes(struct soft_vcpu *v, gva_t lin, void *buf, size_t n, unsigned access)
{
    const void *hit = n <= GUEST_PAGE_SIZE ? find_hit(v, lin, n, access) : NULL;
    struct place first, second;
    size_t head;

    if (likely(hit)) {
        copy(buf, hit, n);
        return;
    }
    lin = check_address(v, lin, n, access);
    check_watches(v, lin, n, access);
    first = translate(v, lin, access);
    if (likely(!crosses_page(lin, n))) {
        place_read(v, &first, buf, n);
        return;
    }
    head = GUEST_PAGE_SIZE - (lin & (GUEST_PAGE_SIZE - 1));
    second = translate(v, next_page(v, lin), access);
    place_read(v, &first, buf, head);
    place_read(v, &second, (u8 *)buf + head, n - head);
}

void soft_store_bytes(struct soft_vcpu *v, gva_t lin, const void *buf, size_t n, unsigned access)
{
    void *hit = n <= GUEST_PAGE_SIZE ? find_hit(v, lin, n, access | ACCESS_WRITE) : NULL;
    struct place first, second;
    size_t head;

    if (likely(hit)) {
        copy(hit, buf, n);
        return;
    }
    access |= ACCESS_WRITE;
    lin = check_address(v, lin, n, access);
    check_watches(v, lin, n, access);
    first = translate(v, lin, access);
    if (likely(!crosses_page(lin, n))) {
        place_write(v, &first, buf, n);
        return;
    }
    head = GUEST_PAGE_SIZE - (lin & (GUEST_PAGE_SIZE - 1));
    second = translate(v, next_page(v, lin), access);
    place_write(v, &first, buf, head);
    place_write(v, &second, (const u8 *)buf + head, n - head);
}

u64 soft_load(struct soft_vcpu *v, gva_t lin, unsigned size, unsigned access)
{
    const void *hit = find_hit(v, lin, size, access);
    struct place p;
    u64 value = 0;

    if (likely(hit))
        return read_scalar(hit, size);
    if (unlikely(crosses_page(lin, size))) {
        soft_load_bytes(v, lin, &value, size, access);
        return value;
    }
    lin = check_address(v, lin, size, access);
    check_watches(v, lin, size, access);
    p = translate(v, lin, access);
    return p.host ? read_scalar(p.host, size) : mmio_read(v, p.gpa, size);
}

void soft_store(struct soft_vcpu *v, gva_t lin, u64 value, unsigned size, unsigned access)
{
    void *hit = find_hit(v, lin, size, access | ACCESS_WRITE);
    struct place p;

    if (likely(hit)) {
        copy_small(hit, &value, size);
        return;
    }
    if (unlikely(crosses_page(lin, size))) {
        soft_store_bytes(v, lin, &value, size, access);
        return;
    }
    access |= ACCESS_WRITE;
    lin = check_address(v, lin, size, access);
    check_watches(v, lin, size, access);
    p = translate(v, lin, access);
    if (p.host)
        place_write(v, &p, &value, size);
    else
        mmio_write(v, p.gpa, size == 8 ? value : value & (BIT(8 * size) - 1), size);
}

void soft_probe(struct soft_vcpu *v, gva_t lin, size_t n, unsigned access)
{
    lin = check_address(v, lin, n, access);
    check_alignment(v, lin, n, access);
    translate(v, lin, access);
    if (crosses_page(lin, n))
        translate(v, next_page(v, lin), access);
}

void *soft_pointer(struct soft_vcpu *v, gva_t lin, size_t n, unsigned access)
{
    struct place p;

    if (v->align_check || v->data_breakpoints || crosses_page(lin, n))
        return NULL;
    lin = check_address(v, lin, n, access);
    p = translate(v, lin, access);
    if (!p.host || (p.rom && (access & ACCESS_WRITE)))
        return NULL;
    if ((access & ACCESS_WRITE) && v->journaling)
        bt_journal_write(v, p.host, n);
    else if ((access & ACCESS_WRITE) && holds_code(&p))
        soft_code_written(v, p.gpa, n);
    return p.host;
}

void soft_rmw_slow(struct soft_vcpu *v, const struct insn *i, gva_t lin, unsigned size,
                   soft_rmw_fn *compute, u64 arg)
{
    struct place first, second;
    size_t head = size;
    bool exclusive;
    u64 value = 0;

    v->cur = i;
    lin = check_address(v, lin, size, i->seg == SEG_SS ? ACCESS_STACK : 0);
    check_watches(v, lin, size, ACCESS_WRITE);
    first = translate(v, lin, ACCESS_WRITE);
    if (crosses_page(lin, size)) {
        head = GUEST_PAGE_SIZE - (lin & (GUEST_PAGE_SIZE - 1));
        second = translate(v, next_page(v, lin), ACCESS_WRITE);
    }
    /* In MMIO no device has locked accesses. */
    exclusive = (i->flags & INSN_LOCK) && first.host;
    if (exclusive)
        soft_exclusive_begin(v);
    place_read(v, &first, &value, head);
    if (head < size)
        place_read(v, &second, (u8 *)&value + head, size - head);
    value = compute(v, i, value, arg);
    place_write(v, &first, &value, head);
    if (head < size)
        place_write(v, &second, (u8 *)&value + head, size - head);
    if (exclusive)
        soft_exclusive_end(v);
}

const u8 *soft_fetch(struct soft_vcpu *v, gva_t lin, gpa_t *gpa)
{
    gva_t page, in_page;
    struct fetch_entry *f;
    bool user = v->mode & MODE_USER;

    if (!soft_code64(v))
        lin = (u32)lin;
    else if (unlikely(!soft_canonical(v, lin)))
        soft_raise_error(v, EXC_GP, 0);
    in_page = lin & (GUEST_PAGE_SIZE - 1);
    page = lin - in_page;
    f = &v->fetches[(page >> GUEST_PAGE_SHIFT) % FETCH_ENTRIES];
    if (f->lin != page || f->user != user) {
        bool global = false;
        struct place p;

        if (v->cpu.cr0 & CR0_PG) {
            struct walk w;

            translate_paged(v, page | in_page, user ? TLB_USER : TLB_KERNEL, ACCESS_EXEC, &w);
            p = place_of(v, w.gpa - in_page);
            global = w.global;
            note_large(&v->large_code, lin, w.page_mask);
        } else {
            p = place_of(v, page & v->a20_mask);
        }
        *f = (struct fetch_entry){page, p.gpa, p.host, user, global};
    }
    *gpa = f->gpa + in_page;
    return f->host ? f->host + in_page : NULL;
}

bool soft_fetch_is_global(const struct soft_vcpu *v, gva_t lin)
{
    return v->fetches[(lin >> GUEST_PAGE_SHIFT) % FETCH_ENTRIES].global;
}

/* --- Forgetting --- */

static void clear_entry(struct tlb *tlb, unsigned n)
{
    struct tlb_entry *e = &tlb->entries[n];

    e->read_tag = e->write_tag = TLB_NO_TAG(n);
    e->info = 0;
}

/* Every entry in `map` (used, nonglobal), as (struct tlb *, index); the body may clear it. */
#define FOR_EACH_IN(map, v, tlb, n)                                                                \
    for (struct tlb *tlb = (v)->tlbs; tlb < (v)->tlbs + TLB_KINDS; tlb++)                          \
        for (unsigned word_ = 0; word_ < TLB_SIZE / 64; word_++)                                   \
            for (u64 bits_ = tlb->map[word_], n;                                                   \
                 bits_ && (n = word_ * 64 + (unsigned)__builtin_ctzll(bits_), true);               \
                 bits_ &= bits_ - 1)

static void drop_entry(struct tlb *tlb, u64 n)
{
    clear_entry(tlb, (unsigned)n);
    tlb->used[n / 64] &= ~BIT(n % 64);
    tlb->nonglobal[n / 64] &= ~BIT(n % 64);
}

void soft_tlb_init(struct soft_vcpu *v)
{
    for (unsigned n = 0; n < TLB_SIZE; n++) {
        clear_entry(&v->tlb_none, n);
        for (unsigned k = 0; k < TLB_KINDS; k++)
            clear_entry(&v->tlbs[k], n);
    }
}

static void drop_fetches(struct soft_vcpu *v, bool global_too)
{
    for (unsigned n = 0; n < FETCH_ENTRIES; n++)
        if (global_too || !v->fetches[n].global)
            v->fetches[n].lin = FETCH_NONE;
}

void soft_tlb_flush(struct soft_vcpu *v)
{
    static const struct large_range none = {UINT64_MAX, 0};

    v->map_generation++;
    v->stats.tlb_flushes++;
    v->large_data[0] = v->large_data[1] = v->large_code = none;
    FOR_EACH_IN(used, v, tlb, n)
    drop_entry(tlb, n);
    drop_fetches(v, true);
    bt_mappings_dropped(v);
    bt_direct_flush(v);
}

static void drop_nonglobal(struct soft_vcpu *v)
{
    v->map_generation++;
    v->stats.tlb_flushes++;
    FOR_EACH_IN(nonglobal, v, tlb, n)
    drop_entry(tlb, n);
    drop_fetches(v, false);
}

void soft_tlb_flush_nonglobal(struct soft_vcpu *v)
{
    drop_nonglobal(v);
    bt_nonglobal_dropped(v);
    bt_direct_flush(v);
}

void soft_tlb_switch(struct soft_vcpu *v, unsigned pcid, bool keep)
{
    drop_nonglobal(v);
    bt_space_switched(v, pcid, keep);
    bt_direct_switch(v, pcid, keep);
}

/* Large pages are held as entries of 4 KiB; all of the one that holds lin have to go. */
static void flush_large(struct soft_vcpu *v, gva_t lin)
{
    u64 large = v->cpu.cr4 & CR4_PAE ? MIB(2) : MIB(4);

    FOR_EACH_IN(used, v, tlb, n)
    {
        const struct tlb_entry *e = &tlb->entries[n];
        /* A tag that isn't valid is a page of the next slot, still of the same large page. */
        u64 differ = e->read_tag ^ lin;

        if (((e->info & TLB_INFO_LARGE) && differ < large) ||
            ((e->info & TLB_INFO_HUGE) && differ < GIB(1)))
            drop_entry(tlb, n);
    }
}

void soft_tlb_flush_page(struct soft_vcpu *v, gva_t lin)
{
    v->map_generation++;
    if (in_large(&v->large_data[lin >> 63], lin))
        flush_large(v, lin);
    if (in_large(&v->large_code, lin)) {
        drop_fetches(v, true);
        bt_mappings_dropped(v);
    }
    v->fetches[(lin >> GUEST_PAGE_SHIFT) % FETCH_ENTRIES].lin = FETCH_NONE;
    for (unsigned k = 0; k < TLB_KINDS; k++)
        drop_entry(&v->tlbs[k], (lin >> GUEST_PAGE_SHIFT) & (TLB_SIZE - 1));
    bt_page_dropped(v, lin);
    bt_direct_flush_page(v, lin);
}

void soft_tlb_protect(struct soft_vcpu *v, gpa_t page)
{
    struct page_track *track = soft_page_track(v->engine, page);

    /* A page that is written and run by turns seldom has a write tag; looking for it is dear. */
    if (!track || !(atomic_load(&track->writers) & soft_vcpu_bit(v)))
        return;
    FOR_EACH_IN(used, v, tlb, n)
    if ((tlb->entries[n].info & ~(GUEST_PAGE_SIZE - 1)) == page)
        tlb->entries[n].write_tag = TLB_NO_TAG(n);
    atomic_fetch_and(&track->writers, ~soft_vcpu_bit(v));
}

void soft_tlb_protect_all(struct soft_vcpu *v)
{
    FOR_EACH_IN(used, v, tlb, n)
    tlb->entries[n].write_tag = TLB_NO_TAG(n);
    bt_direct_drop(v);
}

bool soft_load_pdptes(struct soft_vcpu *v, u64 cr3)
{
    u64 reserved = ~(BIT(v->phys_bits) - 1) | 0x1e6;
    u64 pdpte[4];

    for (unsigned n = 0; n < 4; n++) {
        pdpte[n] = read_entry(v, ((cr3 & 0xffffffe0) + n * 8) & v->a20_mask, 8);
        if ((pdpte[n] & PTE_P) && (pdpte[n] & reserved))
            return false;
    }
    memcpy(v->cpu.pdpte, pdpte, sizeof(pdpte));
    return true;
}
