/*
 * The software engine: its side of the engine contract (engine/engine.h). What runs guest code is in
 * run.c and below.
 */
#include "engine/soft/block.h"
#include "engine/soft/bt/bt.h"
#include "engine/soft/bt/store.h"
#include "engine/soft/decode.h"
#include "engine/soft/flags.h"
#include "engine/soft/host_exec.h"
#include "engine/soft/lapic.h"
#include "engine/soft/mmu.h"
#include "engine/soft/msr.h"
#include "engine/soft/posts.h"
#include "engine/soft/pv.h"
#include "engine/soft/run.h"
#include "engine/soft/soft_cpuid.h"
#include "host/pages.h"

#include <errno.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

static struct soft_engine *engine_of(struct engine *e)
{
    return (struct soft_engine *)e;
}
static struct soft_vcpu *vcpu_of(struct vcpu *v)
{
    return (struct soft_vcpu *)v;
}

u64 soft_tsc(struct soft_vcpu *v)
{
    return clock_ns_to_ticks(vm_clock_now(v->engine->config.clock), v->engine->tsc_hz) +
           v->cpu.tsc_offset;
}

/* --- Life --- */

static int soft_probe_host(struct error *err)
{
    return 0;
}

static void soft_support(struct cpuid_support *out)
{
    *out = *soft_cpuid_support();
}

static unsigned soft_max_cpus(void)
{
    return SOFT_MAX_CPUS;
}

static size_t tracks_size(const struct memory_slot *s)
{
    return (s->size >> GUEST_PAGE_SHIFT) * sizeof(struct page_track);
}
static size_t dirty_words(const struct memory_slot *s)
{
    return ((s->size >> GUEST_PAGE_SHIFT) + 63) / 64;
}

static void soft_destroy(struct engine *engine)
{
    struct soft_engine *e = engine_of(engine);

    for (unsigned n = 0; n < e->config.memory->nslots; n++) {
        if (e->pages[n])
            pages_free(e->pages[n], tracks_size(&e->config.memory->slots[n]));
        free((void *)e->dirty[n]);
    }
    bt_direct_spaces_destroy(e->direct);
    if (e->lapic_bus)
        lapic_bus_destroy(e->lapic_bus);
    for (unsigned n = 0; n < SOFT_CODE_LOCKS; n++)
        pthread_mutex_destroy(&e->code_locks[n].lock);
    bt_store_destroy(e->store);
    free(e);
}

static struct engine *soft_create(const struct engine_config *config, struct error *err)
{
    struct soft_engine *e = calloc(1, sizeof(*e));

    if (!e) {
        error_host(err, ENOMEM, "can't make the software engine");
        return NULL;
    }
    e->config = *config;
    e->tsc_hz = cpuid_model_tsc_hz(config->cpuid);
    atomic_init(&e->a20, true);
    for (unsigned n = 0; n < SOFT_CODE_LOCKS; n++)
        pthread_mutex_init(&e->code_locks[n].lock, NULL);
    e->lapic_bus = lapic_bus_create();
    for (unsigned n = 0; n < config->memory->nslots; n++) {
        e->pages[n] = pages_alloc(tracks_size(&config->memory->slots[n]));
        if (!e->pages[n])
            goto fail;
    }
    if (e->lapic_bus)
        return (struct engine *)e;
fail:
    error_host(err, ENOMEM, "can't make the software engine");
    soft_destroy((struct engine *)e);
    return NULL;
}

/* What vCPUs that translate share. False: err is set. */
static bool share_among_vcpus(struct soft_engine *e, struct error *err)
{
    const struct engine_config *config = &e->config;

    e->direct = bt_direct_spaces_create(err);
    if (!e->direct || config->ncpus == 1)
        return e->direct;
    e->store = bt_store_create(bt_choose(&config->checks).store_size, err);
    return e->store;
}

static struct engine *bt_create_engine(const struct engine_config *config, struct error *err)
{
    struct engine *engine;

    if (config->checks.verify && config->ncpus > 1) {
        error_input(err,
                    "--engine bt,verify compares one processor's stores: give --cpus 1, not %u",
                    config->ncpus);
        return NULL;
    }
    engine = soft_create(config, err);
    if (!engine)
        return NULL;
    engine_of(engine)->bt = true;
    if (share_among_vcpus(engine_of(engine), err))
        return engine;
    soft_destroy(engine);
    return NULL;
}

/* --- vCPUs --- */

static void lapic_wake(void *opaque, enum lapic_event event, u8 vector)
{
    struct soft_vcpu *v = opaque;

    switch (event) {
    case LAPIC_EVENT_INTERRUPT:
    case LAPIC_EVENT_EXTINT:
        soft_attend(v, ATTN_INTERRUPT);
        break;
    case LAPIC_EVENT_NMI:
        soft_attend(v, ATTN_NMI);
        break;
    case LAPIC_EVENT_INIT:
        soft_attend(v, ATTN_INIT);
        break;
    case LAPIC_EVENT_SIPI:
        atomic_store(&v->sipi_vector, vector);
        soft_attend(v, ATTN_SIPI);
        break;
    case LAPIC_EVENT_TIMER:
        soft_update_deadline(v);
        break;
    }
}
static void lapic_eoi(void *opaque, u8 vector)
{
    struct soft_vcpu *v = opaque;
    struct engine_machine_ops *machine = &v->engine->config.machine;

    machine->eoi_broadcast(machine->machine, vector);
}
static bool lapic_take_eoi(void *opaque)
{
    return pv_take_eoi(opaque);
}
static u64 lapic_now(void *opaque)
{
    struct soft_vcpu *v = opaque;

    return vm_clock_now(v->engine->config.clock);
}
static const struct lapic_ops lapic_callbacks = {lapic_wake, lapic_eoi, lapic_take_eoi, lapic_now};

static void soft_vcpu_destroy(struct vcpu *vcpu)
{
    struct soft_vcpu *v = vcpu_of(vcpu);

    if (v->lapic)
        lapic_destroy(v->lapic);
    bt_destroy(v);
    pv_destroy(v);
    host_exec_destroy(v);
    block_cache_destroy(v->blocks);
    insn_decoder_destroy(v->decoder);
    v->engine->vcpus[v->index] = NULL;
    pthread_mutex_destroy(&v->posts_lock);
    pages_free(v, sizeof(*v));
}

static void soft_vcpu_reset(struct vcpu *vcpu)
{
    struct soft_vcpu *v = vcpu_of(vcpu);

    cpu_reset(&v->cpu, v->index);
    soft_set_signature(v);
    lapic_reset(v->lapic);
    v->aflags = aflags_from_eflags(v->cpu.rflags);
    v->cur = &insn_none;
    v->irq_waiting = v->unhalted = false;
    atomic_store(&v->attention, 0);
    soft_fpu_drop(v);
    soft_tlb_flush(v);
    soft_mode_changed(v);
}

static struct vcpu *soft_vcpu_create(struct engine *engine, unsigned index, struct error *err)
{
    struct soft_engine *e = engine_of(engine);
    struct soft_vcpu *v = pages_alloc(sizeof(*v));
    struct lapic_config lapic = {
        .index = index,
        .id = (u8)cpuid_model_apic_id(e->config.cpuid, index),
        .phys_bits = cpuid_model_phys_bits(e->config.cpuid),
        .tsc_hz = e->tsc_hz,
        .x2apic = cpuid_model_has(e->config.cpuid, FEATURE_X2APIC),
        .tsc_deadline = cpuid_model_has(e->config.cpuid, FEATURE_TSC_DEADLINE),
        .ops = &lapic_callbacks,
        .opaque = v,
    };

    if (!v) {
        error_host(err, ENOMEM, "can't make vCPU %u", index);
        return NULL;
    }
    pages_want_huge(v, offsetof(struct soft_vcpu, direct_map));
    v->engine = e;
    v->index = index;
    v->cpuid = e->config.cpuid;
    v->phys_bits = lapic.phys_bits;
    v->a20_mask = UINT64_MAX;
    v->timer_deadline = UINT64_MAX;
    v->cur = &insn_none;
    soft_tlb_init(v);
    pthread_mutex_init(&v->posts_lock, NULL);
    atomic_init(&v->asleep, true);
    e->vcpus[index] = v;
    e->nvcpus = MAX(e->nvcpus, index + 1);

    v->blocks = block_cache_create(err);
    v->decoder = insn_decoder_create();
    v->lapic = lapic_create(e->lapic_bus, &lapic);
    if (!v->blocks || !v->decoder || !v->lapic || host_exec_create(v, err) < 0 ||
        (e->bt && bt_create(v, err) < 0)) {
        if (!v->lapic || !v->decoder)
            error_host(err, ENOMEM, "no memory for vCPU %u", index);
        soft_vcpu_destroy((struct vcpu *)v);
        return NULL;
    }
    soft_vcpu_reset((struct vcpu *)v);
    return (struct vcpu *)v;
}

static void soft_vcpu_run(struct vcpu *vcpu, struct vcpu_exit *exit)
{
    struct soft_vcpu *v = vcpu_of(vcpu);

    v->exit = exit;
    if (v->bt)
        bt_thread_begin(v);
    soft_run(v);
    if (v->bt)
        bt_thread_end(v);
    v->exit = NULL;
    v->stats.instructions = v->icount;
}

static void soft_vcpu_kick(struct vcpu *vcpu)
{
    soft_attend(vcpu_of(vcpu), ATTN_KICK);
}

/* --- State --- */

static void soft_get_state(struct vcpu *vcpu, struct cpu *cpu, struct lapic_state *apic)
{
    struct soft_vcpu *v = vcpu_of(vcpu);

    if (atomic_load(&v->attention) & ATTN_NMI)
        v->cpu.nmi_pending = true;
    *cpu = v->cpu;
    cpu->rflags = soft_flags_get(v);
    cpu->cr8 = lapic_cr8(v->lapic);
    lapic_save(v->lapic, apic);
}

static int soft_set_state(struct vcpu *vcpu, const struct cpu *cpu, const struct lapic_state *apic,
                          struct error *err)
{
    struct soft_vcpu *v = vcpu_of(vcpu);
    int r = lapic_load(v->lapic, apic, err);

    if (r < 0)
        return r;
    lapic_set_tsc_offset(v->lapic, cpu->tsc_offset);
    lapic_set_lint0(v->lapic, atomic_load(&v->engine->extint));
    v->cpu = *cpu;
    v->cpu.gpr[GPR_ZERO] = 0;
    soft_flags_set(v, cpu->rflags);
    v->cur = &insn_none;
    v->irq_waiting = false;
    soft_fpu_drop(v);
    soft_tlb_flush(v);
    soft_mode_changed(v);
    return 0;
}

/* --- Interrupts --- */

static void soft_deliver_msi(struct engine *engine, u64 address, u32 data)
{
    lapic_bus_deliver(engine_of(engine)->lapic_bus, address, data);
}

static void soft_set_extint(struct engine *engine, bool level)
{
    struct soft_engine *e = engine_of(engine);

    atomic_store(&e->extint, level);
    for (unsigned n = 0; n < e->nvcpus; n++)
        if (e->vcpus[n])
            lapic_set_lint0(e->vcpus[n]->lapic, level);
}

static void soft_inject_nmi(struct vcpu *vcpu)
{
    soft_attend(vcpu_of(vcpu), ATTN_NMI);
}

static void soft_set_a20(struct engine *engine, bool on)
{
    struct soft_engine *e = engine_of(engine);

    atomic_store(&e->a20, on);
    for (unsigned n = 0; n < e->nvcpus; n++)
        if (e->vcpus[n])
            soft_attend(e->vcpus[n], ATTN_POSTS);
}

/* --- Memory --- */

static void set_dirty(_Atomic u64 *dirty, u64 first, u64 last)
{
    for (u64 page = first; page <= last; page++)
        atomic_fetch_or(&dirty[page / 64], BIT(page % 64));
}

static void soft_memory_written(struct engine *engine, gpa_t gpa, u64 len)
{
    struct soft_engine *e = engine_of(engine);
    const struct memory_slot *slot = memory_find(e->config.memory, gpa);
    u64 first, last, any = 0;
    size_t n;

    if (!slot || !len)
        return;
    n = (size_t)(slot - e->config.memory->slots);
    first = (gpa - slot->gpa) >> GUEST_PAGE_SHIFT;
    last = (MIN(gpa + len, slot->gpa + slot->size) - 1 - slot->gpa) >> GUEST_PAGE_SHIFT;
    if (e->dirty_logging)
        set_dirty(e->dirty[n], first, last);
    atomic_thread_fence(memory_order_seq_cst); /* as a vCPU's store: code_pages.c */
    for (u64 page = first; page <= last; page++)
        any |= atomic_load(&e->pages[n][page].code_lines);
    if (!any)
        return;
    for (unsigned c = 0; c < e->nvcpus; c++)
        if (e->vcpus[c])
            soft_post_written(e->vcpus[c], gpa, len);
}

static void soft_memory_changed(struct engine *engine)
{
    struct soft_engine *e = engine_of(engine);

    for (unsigned n = 0; n < e->config.memory->nslots; n++)
        if (!e->pages[n])
            e->pages[n] = pages_alloc(tracks_size(&e->config.memory->slots[n]));
    for (unsigned c = 0; c < e->nvcpus; c++)
        if (e->vcpus[c]) {
            block_cache_flush(e->vcpus[c]);
            soft_tlb_flush(e->vcpus[c]);
            bt_direct_drop(e->vcpus[c]);
        }
}

static int soft_dirty_log_start(struct engine *engine, struct error *err)
{
    struct soft_engine *e = engine_of(engine);

    for (unsigned n = 0; n < e->config.memory->nslots; n++) {
        if (!e->dirty[n])
            e->dirty[n] = calloc(dirty_words(&e->config.memory->slots[n]), sizeof(u64));
        if (!e->dirty[n])
            return error_host(err, ENOMEM, "can't start the dirty log");
    }
    e->dirty_logging = true;
    soft_protect_everywhere(e);
    return 0;
}

static void soft_dirty_log_stop(struct engine *engine)
{
    engine_of(engine)->dirty_logging = false;
}

/*
 * The bits are taken first and the write tags dropped after: a store that still goes by an old tag
 * in between is to a page whose bit was just taken, and is done before this returns.
 */
static int soft_dirty_log_read(struct engine *engine, const struct memory_slot *slot, u64 *bitmap,
                               size_t words)
{
    struct soft_engine *e = engine_of(engine);
    size_t n = (size_t)(slot - e->config.memory->slots);

    if (!e->dirty_logging || words < dirty_words(slot))
        return -EINVAL;
    for (size_t w = 0; w < dirty_words(slot); w++)
        bitmap[w] = atomic_exchange(&e->dirty[n][w], 0);
    soft_protect_everywhere(e);
    return 0;
}

static void soft_stats(struct engine *engine, struct engine_stats *out)
{
    struct soft_engine *e = engine_of(engine);

    *out = (struct engine_stats){.cache_bytes = e->store ? bt_store_bytes(e->store) : 0};
    for (unsigned n = 0; n < e->nvcpus; n++) {
        const struct soft_vcpu *v = e->vcpus[n];

        if (!v)
            continue;
        out->instructions += v->bt ? 0 : v->icount; /* translated ones aren't counted */
        out->exits_port += v->stats.exits_port;
        out->exits_mmio += v->stats.exits_mmio;
        out->exits_halt += v->stats.exits_halt;
        out->exits_exception += v->stats.exits_exception;
        out->exits_interrupt += v->stats.exits_interrupt;
        out->blocks_decoded += v->stats.blocks_decoded;
        out->cache_bytes += block_cache_bytes(v->blocks) + bt_bytes(v);
        out->blocks_translated += v->stats.blocks_translated;
        out->blocks_adopted += v->stats.blocks_adopted;
        out->blocks_evicted += v->stats.blocks_evicted;
        out->tlb_misses += v->stats.tlb_misses;
        out->tlb_flushes += v->stats.tlb_flushes;
        out->spins += v->stats.spins;
        out->smc_invalidations += v->stats.smc_invalidations;
        out->direct_mappings += v->stats.direct_mappings;
        out->direct_faults += v->stats.direct_faults;
    }
}

/* What the two software engines have in common: all but how guest code is run. */
#define SOFT_OPS                                                                                   \
    .max_cpus = soft_max_cpus, .cpuid_support = soft_support, .destroy = soft_destroy,             \
    .vcpu_create = soft_vcpu_create, .vcpu_destroy = soft_vcpu_destroy, .vcpu_run = soft_vcpu_run, \
    .vcpu_kick = soft_vcpu_kick, .vcpu_get_state = soft_get_state,                                 \
    .vcpu_set_state = soft_set_state, .vcpu_reset = soft_vcpu_reset,                               \
    .deliver_msi = soft_deliver_msi, .set_extint = soft_set_extint, .set_a20 = soft_set_a20,       \
    .inject_nmi = soft_inject_nmi, .memory_written = soft_memory_written,                          \
    .memory_changed = soft_memory_changed, .dirty_log_start = soft_dirty_log_start,                \
    .dirty_log_stop = soft_dirty_log_stop, .dirty_log_read = soft_dirty_log_read,                  \
    .stats = soft_stats

const struct engine_ops engine_interp = {
    .name = "interp",
    .probe = soft_probe_host,
    .create = soft_create,
    SOFT_OPS,
};

const struct engine_ops engine_bt = {
    .name = "bt",
    .maps_memory = true,
    .probe = bt_probe,
    .create = bt_create_engine,
    SOFT_OPS,
};
