/*
 * The guest's page tables, as direct mappings need them: 4-level paging (SDM vol. 3, 4.5), user pages that were
 * accessed already, 2 MiB of addresses at a time. Whatever else there is (a page of 1 GiB, tables that are no RAM, reserved
 * bits) counts as nothing, and is left to the TLB.
 */
#include "engine/soft/bt/direct.h"

#define USED (PTE_P | PTE_U | PTE_A)

const struct memory_slot *direct_ram_at(const struct soft_vcpu *v, gpa_t gpa)
{
    const struct memory_slot *s = memory_find(v->engine->config.memory, gpa);

    return s && s->host == s->backing && s->fd >= 0 ? s : NULL;
}

static const _Atomic u64 *table_at(const struct soft_vcpu *v, gpa_t gpa)
{
    const struct memory_slot *s;

    gpa &= v->a20_mask;
    s = direct_ram_at(v, gpa);
    return s ? (const _Atomic u64 *)(const void *)(s->host + (gpa - s->gpa)) : NULL;
}

static u64 address_bits(const struct soft_vcpu *v)
{
    return PTE_ADDR_MASK & (BIT(v->phys_bits) - 1);
}

static u64 reserved_bits(const struct soft_vcpu *v)
{
    return (PTE_ADDR_MASK & ~address_bits(v)) | (v->cpu.msr.efer & EFER_NXE ? 0 : PTE_NX);
}

static bool is_usable(const struct soft_vcpu *v, u64 entry)
{
    return (entry & USED) == USED && !(entry & reserved_bits(v));
}

struct direct_entries direct_find_entries(const struct soft_vcpu *v, u32 number)
{
    struct direct_entries e = {.writable = true, .executable = true}, none = {.there = false};
    gva_t lin = (gva_t)number << DIRECT_SHIFT;
    gpa_t at = v->cpu.cr3 & address_bits(v);

    for (unsigned shift = 39; shift >= DIRECT_SHIFT; shift -= 9) {
        const _Atomic u64 *table = table_at(v, at);
        u64 entry;

        if (!table)
            return none;
        entry = atomic_load_explicit(&table[(lin >> shift) & 0x1ff], memory_order_relaxed);
        if (!is_usable(v, entry))
            return none;
        e.writable &= !!(entry & PTE_W);
        e.executable &= !(entry & PTE_NX);
        at = entry & address_bits(v);
        if (entry & PTE_PS) {
            e.large = entry;
            e.there = shift == DIRECT_SHIFT && !(at & (CHUNK_SIZE - 1) & ~BIT(12));
            return e;
        }
    }
    e.table = table_at(v, at);
    e.there = e.table;
    return e;
}

u64 direct_entry(const struct soft_vcpu *v, const struct direct_entries *e, unsigned n, gpa_t *gpa)
{
    u64 entry = e->large;

    if (!e->there)
        return 0;
    *gpa = (entry & address_bits(v) & ~(CHUNK_SIZE - 1)) + n * GUEST_PAGE_SIZE;
    if (e->table) {
        entry = atomic_load_explicit(&e->table[n], memory_order_relaxed);
        *gpa = entry & address_bits(v);
    }
    *gpa &= v->a20_mask;
    return entry;
}

bool direct_may_read(const struct soft_vcpu *v, u64 entry)
{
    return is_usable(v, entry);
}

bool direct_may_fetch(const struct soft_vcpu *v, const struct direct_entries *e, u64 entry)
{
    return is_usable(v, entry) && !(entry & PTE_NX) && e->executable;
}
