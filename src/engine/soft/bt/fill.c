/*
 * Filling the TLB for translated code, without giving up the guest's vector registers: a page walk
 * that changes nothing in guest memory and raises nothing. What needs either (a fault, an A or D bit to
 * set, MMIO, a page of code that is written) is refused, and the interpreter does that one access with
 * all that belongs to it (mmu.c). Compiled without vector instructions.
 */
#include "engine/soft/bt/bt.h"

#include "engine/soft/lapic.h"
#include "engine/soft/mmu.h"

struct leaf {
    gpa_t gpa;
    u64 entry, mask;
    bool user, writable;
};

static const struct memory_slot *find_slot(const struct guest_memory *m, gpa_t gpa)
{
    for (unsigned n = 0; n < m->nslots; n++)
        if (gpa - m->slots[n].gpa < m->slots[n].size)
            return &m->slots[n];
    return NULL;
}

/* 4- and 5-level paging (SDM vol. 3, 4.5). */
static bool walk(const struct soft_vcpu *v, gva_t lin, struct leaf *leaf)
{
    const struct cpu *cpu = &v->cpu;
    const struct guest_memory *m = v->engine->config.memory;
    u64 address = PTE_ADDR_MASK & (BIT(v->phys_bits) - 1), reserved = PTE_ADDR_MASK & ~address;
    gpa_t table = cpu->cr3 & address;

    leaf->user = leaf->writable = true;
    if (!(cpu->msr.efer & EFER_NXE))
        reserved |= PTE_NX;
    for (int level = cpu->cr4 & CR4_LA57 ? 4 : 3;; level--) {
        unsigned shift = 12 + 9 * (unsigned)level;
        gpa_t gpa = (table + ((lin >> shift) & 0x1ff) * 8) & v->a20_mask;
        const struct memory_slot *slot = find_slot(m, gpa);
        u64 entry;

        if (!slot)
            return false;
        entry = atomic_load_explicit((_Atomic u64 *)(void *)(slot->host + (gpa - slot->gpa)),
                                     memory_order_relaxed);
        if (!(entry & PTE_P) || !(entry & PTE_A) || (entry & reserved))
            return false;
        leaf->user &= !!(entry & PTE_U);
        leaf->writable &= !!(entry & PTE_W);
        if (level && !(entry & PTE_PS)) {
            table = entry & address;
            continue;
        }
        if (level > 2 || (level == 2 && !soft_has(v, FEATURE_PAGE1GB)))
            return false;
        leaf->mask = BIT(shift) - 1;
        if (level && (entry & address & leaf->mask & ~BIT(12)))
            return false;
        leaf->entry = entry;
        leaf->gpa = ((entry & address & ~leaf->mask) | (lin & leaf->mask)) & v->a20_mask;
        return true;
    }
}

/* Read and write rights of the page for accesses of `kind` (vol. 3, 4.6). */
static bool rights(const struct soft_vcpu *v, const struct leaf *leaf, enum tlb_kind kind,
                   bool *write)
{
    const struct cpu *cpu = &v->cpu;
    u32 keys;

    if (kind == TLB_USER && !leaf->user)
        return false;
    if (leaf->user && kind == TLB_KERNEL && (cpu->cr4 & CR4_SMAP))
        return false;
    *write = leaf->writable || (kind != TLB_USER && !(cpu->cr0 & CR0_WP));
    if (cpu->cr4 & (leaf->user ? CR4_PKE : CR4_PKS)) {
        keys = leaf->user ? cpu->pkru : (u32)cpu->msr.pkrs;
        if ((keys >> (2 * ((leaf->entry >> PTE_PKEY_SHIFT) & 15))) & 3)
            return false;
    }
    return true;
}

bool bt_tlb_fill(struct soft_vcpu *v, gva_t lin, bool write)
{
    struct soft_engine *e = v->engine;
    enum tlb_kind kind = v->tlb_kind;
    struct tlb *tlb = &v->tlbs[kind];
    struct tlb_entry *entry = tlb_slot(tlb, lin);
    gva_t page = lin & ~(GUEST_PAGE_SIZE - 1);
    const struct memory_slot *slot;
    struct page_track *track;
    struct leaf leaf;
    bool may_write;
    gpa_t gpa;
    u64 index;

    if (!(v->cpu.cr0 & CR0_PG) || !soft_canonical(v, lin) || (write && e->dirty_logging) ||
        !walk(v, lin, &leaf) || !rights(v, &leaf, kind, &may_write))
        return false;
    may_write &= !!(leaf.entry & PTE_D);
    gpa = leaf.gpa & ~(GUEST_PAGE_SIZE - 1);
    slot = find_slot(e->config.memory, gpa);
    if (!slot || lapic_claims(v->lapic, gpa))
        return false;
    index = (gpa - slot->gpa) >> GUEST_PAGE_SHIFT;
    track = &e->pages[slot - e->config.memory->slots][index];
    entry->info = gpa | (may_write ? TLB_INFO_WRITABLE : 0);
    if ((leaf.entry & PTE_G) && (v->cpu.cr4 & CR4_PGE))
        entry->info |= TLB_INFO_GLOBAL;
    if (leaf.mask != GUEST_PAGE_SIZE - 1) {
        entry->info |= leaf.mask >= GIB(1) - 1 ? TLB_INFO_HUGE : TLB_INFO_LARGE;
        v->large_low = MIN(v->large_low, lin & ~leaf.mask);
        v->large_high = MAX(v->large_high, lin | leaf.mask);
    }
    v->stats.tlb_misses++;
    may_write &= !(slot->flags & MEMORY_ROM) && !e->dirty_logging &&
                 !atomic_load_explicit(&track->code_lines, memory_order_relaxed);
    entry->host = (u64)(uintptr_t)(slot->host + (gpa - slot->gpa));
    entry->read_tag = page;
    entry->write_tag = may_write ? page : page ^ GUEST_PAGE_SIZE;
    index = (u64)(entry - tlb->entries);
    tlb->used[index / 64] |= BIT(index % 64);
    if (may_write)
        atomic_store_explicit(&track->write_tagged, true, memory_order_relaxed);
    return may_write || !write;
}
