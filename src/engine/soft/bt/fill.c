/*
 * Filling the TLB for translated code, without giving up the guest's vector registers: a page walk
 * that changes nothing in guest memory and raises nothing. What needs either (a fault, an A or D bit to
 * set, MMIO, a page of code that is written) is refused, and the interpreter does that one access with
 * all that belongs to it (mmu.c). Compiled without vector instructions.
 */
#include "engine/soft/bt/bt.h"

#include "engine/soft/code_pages.h"
#include "engine/soft/lapic.h"
#include "engine/soft/mmu.h"

struct leaf {
    gpa_t gpa;
    u64 entry, mask;
    bool user, writable, executable;
};

static const struct memory_slot *find_slot(const struct guest_memory *m, gpa_t gpa)
{
    for (unsigned n = 0; n < m->nslots; n++)
        if (gpa - m->slots[n].gpa < m->slots[n].size)
            return &m->slots[n];
    return NULL;
}

/* The entry at gpa; false: not in RAM. */
static bool read_entry(const struct soft_vcpu *v, gpa_t gpa, unsigned size, u64 *entry)
{
    const struct memory_slot *slot = find_slot(v->engine->config.memory, gpa);
    void *at;

    if (!slot)
        return false;
    at = slot->host + (gpa - slot->gpa);
    *entry = size == 4 ? atomic_load_explicit((_Atomic u32 *)at, memory_order_relaxed)
                       : atomic_load_explicit((_Atomic u64 *)at, memory_order_relaxed);
    return true;
}

/* 32-bit paging (SDM vol. 3, 4.3). Pages above 4 GiB are refused. */
static bool walk_32(const struct soft_vcpu *v, gva_t lin, struct leaf *leaf)
{
    const struct cpu *cpu = &v->cpu;
    gpa_t table = cpu->cr3 & 0xfffff000;

    leaf->user = leaf->writable = true;
    for (int level = 1;; level--) {
        unsigned shift = level ? 22 : 12;
        u64 entry;

        if (!read_entry(v, (table + ((lin >> shift) & 0x3ff) * 4) & v->a20_mask, 4, &entry) ||
            !(entry & PTE_P) || !(entry & PTE_A))
            return false;
        leaf->user &= !!(entry & PTE_U);
        leaf->writable &= !!(entry & PTE_W);
        if (level && !((entry & PTE_PS) && (cpu->cr4 & CR4_PSE))) {
            table = entry & 0xfffff000;
            continue;
        }
        leaf->mask = BIT(shift) - 1;
        if (entry & 0xfffff000 & leaf->mask)
            return false;
        leaf->entry = entry;
        leaf->gpa = ((entry & ~leaf->mask) | (lin & leaf->mask)) & v->a20_mask;
        return true;
    }
}

/* PAE, 4- and 5-level paging (SDM vol. 3, 4.4 and 4.5). */
static bool walk_64(const struct soft_vcpu *v, gva_t lin, struct leaf *leaf)
{
    const struct cpu *cpu = &v->cpu;
    u64 address = PTE_ADDR_MASK & (BIT(v->phys_bits) - 1), reserved = PTE_ADDR_MASK & ~address;
    bool pae = !(cpu->msr.efer & EFER_LMA);
    gpa_t table = cpu->cr3 & address;

    leaf->user = leaf->writable = leaf->executable = true;
    if (!(cpu->msr.efer & EFER_NXE))
        reserved |= PTE_NX;
    if (pae) {
        u64 pdpte = cpu->pdpte[(lin >> 30) & 3];

        reserved |= 0x7ff0000000000000ULL;
        if (!(pdpte & PTE_P))
            return false;
        table = pdpte & address;
    }
    for (int level = pae ? 1 : cpu->cr4 & CR4_LA57 ? 4 : 3;; level--) {
        unsigned shift = 12 + 9 * (unsigned)level;
        u64 entry;

        if (!read_entry(v, (table + ((lin >> shift) & 0x1ff) * 8) & v->a20_mask, 8, &entry) ||
            !(entry & PTE_P) || !(entry & PTE_A) || (entry & reserved))
            return false;
        leaf->user &= !!(entry & PTE_U);
        leaf->writable &= !!(entry & PTE_W);
        leaf->executable &= !(entry & PTE_NX);
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

static bool walk(const struct soft_vcpu *v, gva_t lin, struct leaf *leaf)
{
    if (!(v->cpu.cr0 & CR0_PG)) {
        *leaf = (struct leaf){.gpa = lin & v->a20_mask,
                              .entry = PTE_D,
                              .mask = GUEST_PAGE_SIZE - 1,
                              .writable = true};
        return true;
    }
    return (v->cpu.msr.efer & EFER_LMA) || (v->cpu.cr4 & CR4_PAE) ? walk_64(v, lin, leaf)
                                                                  : walk_32(v, lin, leaf);
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
    if ((cpu->msr.efer & EFER_LMA) && (cpu->cr4 & (leaf->user ? CR4_PKE : CR4_PKS))) {
        keys = leaf->user ? cpu->pkru : (u32)cpu->msr.pkrs;
        if ((keys >> (2 * ((leaf->entry >> PTE_PKEY_SHIFT) & 15))) & 3)
            return false;
    }
    return true;
}

bool bt_kernel_code_is_at(const struct soft_vcpu *v, gva_t lin, gpa_t gpa)
{
    struct leaf leaf;

    return (v->cpu.msr.efer & EFER_LMA) && (v->cpu.cr4 & CR4_PGE) && walk_64(v, lin, &leaf) &&
           leaf.gpa == gpa && leaf.executable && (leaf.entry & PTE_G) &&
           !(leaf.user && (v->cpu.cr4 & CR4_SMEP));
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

    if (!soft_canonical(v, lin) || (write && e->dirty_logging) || !walk(v, lin, &leaf) ||
        !rights(v, &leaf, kind, &may_write))
        return false;
    may_write &= !!(leaf.entry & PTE_D);
    gpa = leaf.gpa & ~(GUEST_PAGE_SIZE - 1);
    slot = find_slot(e->config.memory, gpa);
    if (!slot || lapic_claims(v->lapic, gpa))
        return false;
    track = soft_track_in(e, slot, gpa);
    if (may_write)
        soft_announce_store(v, track);
    entry->info = gpa | (may_write ? TLB_INFO_WRITABLE : 0);
    if ((leaf.entry & PTE_G) && (v->cpu.cr4 & CR4_PGE))
        entry->info |= TLB_INFO_GLOBAL;
    if (leaf.mask != GUEST_PAGE_SIZE - 1) {
        entry->info |= leaf.mask >= GIB(1) - 1 ? TLB_INFO_HUGE : TLB_INFO_LARGE;
        v->large_data[lin >> 63].low = MIN(v->large_data[lin >> 63].low, lin & ~leaf.mask);
        v->large_data[lin >> 63].high = MAX(v->large_data[lin >> 63].high, lin | leaf.mask);
    }
    v->stats.tlb_misses++;
    may_write &=
        !(slot->flags & MEMORY_ROM) && !e->dirty_logging && !atomic_load(&track->code_lines);
    entry->host = (u64)(uintptr_t)(slot->host + (gpa - slot->gpa));
    entry->read_tag = page;
    entry->write_tag = may_write ? page : page ^ GUEST_PAGE_SIZE;
    soft_tlb_note(tlb, (u64)(entry - tlb->entries));
    return may_write || !write;
}
