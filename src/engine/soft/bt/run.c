/*
 * Running translated code: find or make the block, enter it, and see why it was left.
 *
 * The guest's vector registers stay in the host's across the ways out that this file and fill.c deal
 * with; both are compiled without vector instructions. Whatever else is called brings them home first
 * (soft_vectors_sync).
 */
#include "engine/soft/bt/bt.h"

#include "engine/soft/block.h"
#include "engine/soft/flags.h"
#include "engine/soft/host_exec.h"
#include "engine/soft/interp.h"
#include "engine/soft/mmu.h"
#include "engine/soft/run.h"

#include <errno.h>
#include <stdlib.h>

#define NEVER_HOT UINT16_MAX
#define NARROW_MISSES 4 /* runs by the interpreter before there is code by the TLB */

/* --- Finding --- */

static gva_t next_page(gva_t lin)
{
    return (lin | (GUEST_PAGE_SIZE - 1)) + 1;
}

/* Where the exact RIP is in memory. Raises what the fetch raises, at RIP. */
static const u8 *fetch(struct soft_vcpu *v, gpa_t *gpa)
{
    v->cur = &insn_none;
    return soft_fetch(v, v->cpu.gpr[GPR_RIP], gpa);
}

/* The block for the exact RIP, or NULL. */
static struct bt_block *find_block(struct soft_vcpu *v)
{
    gva_t lin = v->cpu.gpr[GPR_RIP];
    struct bt_block *b;
    gpa_t gpa;

    if (!fetch(v, &gpa))
        return NULL;
    b = bt_block_find(v, gpa, lin, v->bt_mode);
    if (b && b->gpa2 && (!soft_fetch(v, next_page(lin), &gpa) || gpa != b->gpa2))
        return NULL;
    return b;
}

/* Its code. */
static const u8 *find_code(struct soft_vcpu *v)
{
    const struct bt_block *b = find_block(v);

    if (!b)
        return NULL;
    bt_jump_insert(v, v->cpu.gpr[GPR_RIP], b);
    return bt_run_at(v->bt, b->memory_entry);
}

/* Looks in the jump cache first. */
static const u8 *look_up(struct soft_vcpu *v)
{
    gva_t lin = v->cpu.gpr[GPR_RIP];
    const struct jump_entry *entry = &v->bt_shared.jump[bt_jump_slot(lin)];

    v->bt_shared.ip_page = lin & ~(GUEST_PAGE_SIZE - 1);
    if (entry->tag == (lin ^ v->bt_shared.jump_key))
        return entry->code;
    return find_code(v);
}

/* The code to go on with at the exact RIP; NULL: there is none, or it is the interpreter's turn. */
static const u8 *code_here(struct soft_vcpu *v)
{
    if (unlikely(!v->bt->choices.direct_period))
        bt_direct_tick(v);
    if (!v->bt_possible || v->bt->interp_next || v->journal)
        return NULL;
    if (v->bt_mode & BT_MODE_DIRECT)
        bt_direct_stack(v);
    return look_up(v);
}

/* --- Cold code --- */

/* Whether this run of a block is one too many to be interpreted. */
static bool grows_hot(const struct soft_vcpu *v, struct block *b)
{
    if (b->heat <= v->bt->choices.hot_runs)
        b->heat++;
    return b->heat < NEVER_HOT && b->heat > v->bt->choices.hot_runs;
}

/* Where the code at the exact RIP is. False: nowhere that it could be translated from. Raises what the fetch raises. */
static bool find_source(struct soft_vcpu *v, struct bt_source *s)
{
    *s = (struct bt_source){0};
    s->host = fetch(v, &s->gpa);
    if (s->host && bt_goes_across(v, s->gpa, s->host))
        s->host2 = soft_fetch(v, next_page(v->cpu.gpr[GPR_RIP]), &s->gpa2);
    return s->host;
}

static struct bt_block *make_block(struct soft_vcpu *v, const struct bt_source *s, u32 mode)
{
    struct bt_block *b = bt_adopt(v, s, mode);

    return b ? b : bt_translate(v, s, mode);
}

/* What another vCPU found hot is not interpreted first. */
static bool adopt(struct soft_vcpu *v)
{
    struct bt_source s;

    if (!find_source(v, &s) || !bt_adopt(v, &s, v->bt_mode))
        return false;
    v->bt->from = NULL;
    return true;
}

static bool translate(struct soft_vcpu *v, struct block *b)
{
    struct bt_source s;

    if (find_source(v, &s) && make_block(v, &s, v->bt_mode)) {
        v->bt->from = NULL;
        return true;
    }
    b->heat = NEVER_HOT;
    return false;
}

static void run_cold(struct soft_vcpu *v, struct block *b)
{
    v->bt->interp_next = false;
    v->bt->from = NULL;
    v->poll--;
    soft_run_block(v, b);
}

/*
 * The block at the exact RIP, where the interpreter goes on, if it was decoded and isn't hot. It hardly ever has a
 * translation then, which would be sought in vain.
 */
static struct block *cold_block(struct soft_vcpu *v)
{
    struct block *b = v->journal || v->vectors_live ? NULL : block_cache_kept(v);

    return b && b->heat < v->bt->choices.hot_runs ? b : NULL;
}

/* Runs one block by the interpreter, or has it translated. */
static void interpret(struct soft_vcpu *v)
{
    bool may_translate = v->bt_possible && !v->bt->interp_next;
    struct block *b;

    soft_vectors_sync(v);
    if (unlikely(!bt_has_room(v->bt)))
        bt_evict(v);
    b = block_cache_kept(v);
    if (!b && may_translate && v->engine->store && adopt(v))
        return;
    if (!b)
        b = block_cache_make(v);
    if (may_translate && grows_hot(v, b) && bt_has_room(v->bt) && translate(v, b))
        return;
    run_cold(v, b);
}

/* --- Coming back --- */

static void stop_at(struct soft_vcpu *v, u16 offset)
{
    v->cpu.gpr[GPR_RIP] = v->bt_shared.ip_page + offset;
    v->bt->interp_next = true;
}

static void stop_at_site(struct soft_vcpu *v, const struct bt_site *site)
{
    if (site->flags == SITE_FLAGS_RECIPE)
        v->aflags = bt_recipe_flags(v, &site->recipe);
    bt_x87_point(v, site->x87);
    stop_at(v, site->offset);
}

static void stop_at_point(struct soft_vcpu *v, const struct bt_point *point)
{
    if (point->flags == SITE_FLAGS_RECIPE)
        v->aflags = bt_recipe_flags(v, &point->recipe);
    bt_x87_point(v, point->x87);
    stop_at(v, point->offset);
}

/*
 * The check of a group of accesses met the end of a page: code for the same instructions with a check for
 * each access. NULL: there is none.
 */
static struct bt_block *narrow_block(struct soft_vcpu *v)
{
    u32 mode = v->bt_mode | BT_MODE_NARROW;
    struct bt_source s = {0};
    struct bt_block *b;

    s.host = fetch(v, &s.gpa);
    if (!s.host || v->journal)
        return NULL;
    b = bt_block_find(v, s.gpa, v->cpu.gpr[GPR_RIP], mode);
    if (!b) {
        soft_vectors_sync(v);
        if (!bt_goes_across(v, s.gpa, s.host))
            b = make_block(v, &s, mode);
    }
    return b;
}

/* An access missed. Returns where to go on, or NULL: by the interpreter. */
static const u8 *on_slow(struct soft_vcpu *v)
{
    const struct bt_site *site = &v->bt->sites[v->bt_shared.site];
    gva_t lin = v->bt_shared.linear;
    const struct bt_block *b;

    if ((lin & (GUEST_PAGE_SIZE - 1)) + site->size <= GUEST_PAGE_SIZE) {
        if (bt_tlb_fill(v, lin, site->write))
            return bt_run_at(v->bt, site->resume);
        stop_at_site(v, site);
        return NULL;
    }
    stop_at_site(v, site);
    b = site->grouped ? narrow_block(v) : NULL;
    if (!b)
        return NULL;
    v->bt->interp_next = false;
    return bt_run_at(v->bt, b->memory_entry);
}

/* An access of direct code whose chunk isn't mapped. */
static const u8 *on_narrow(struct soft_vcpu *v)
{
    struct bt_exit *e = &v->bt->exits[v->bt_shared.site];
    struct bt_block *b = e->to;

    v->cpu.gpr[GPR_RIP] = v->bt_shared.ip_page + (u64)(s64)e->target;
    if (!b && bt_direct_want(v, v->bt_shared.linear))
        return bt_run_at(v->bt, e->resume);
    if (!b && ++e->misses > NARROW_MISSES)
        b = narrow_block(v);
    if (!b) {
        v->bt->interp_next = true;
        return NULL;
    }
    if (!e->to)
        bt_exit_link(v->bt, e, b);
    return bt_run_at(v->bt, b->memory_entry);
}

/* The host's page fault, too: the interpreter meets the guest's, if it is one. */
static void on_fault(struct soft_vcpu *v)
{
    stop_at_point(v, &v->bt->points[v->bt_shared.site]);
    if (v->bt_shared.linear && (v->bt_mode & BT_MODE_DIRECT))
        bt_direct_fault(v, v->bt_shared.linear);
}

static bool link_across(struct soft_vcpu *v, const struct bt_block *b)
{
    return bt_is_kernel(b->mode) ? bt_kernel_link(v, b) : bt_direct_link(v, b);
}

/* A direct exit that isn't linked, or was undone by a kick. */
static const u8 *on_link(struct soft_vcpu *v)
{
    struct bt *bt = v->bt;
    struct bt_exit *e = &bt->exits[v->bt_shared.site];

    v->cpu.gpr[GPR_RIP] = v->bt_shared.ip_page + (u64)(s64)e->target;
    if (!e->to) {
        struct bt_block *b = find_block(v);

        bt->from = b ? NULL : bt_block_at(bt, bt_run_at(bt, e->at));
        if (!b || b->gpa2 || v->journal || (bt_exit_is_across(e) && !link_across(v, b)))
            return NULL;
        bt_exit_link(bt, e, b);
    }
    v->bt_shared.ip_page = v->cpu.gpr[GPR_RIP] & ~(GUEST_PAGE_SIZE - 1);
    return bt_run_at(bt, e->to->memory_entry);
}

/* A branch to where the jump cache has nothing. */
static const u8 *on_jump(struct soft_vcpu *v)
{
    bt_jump_missed(v, v->cpu.gpr[GPR_RIP]);
    return code_here(v);
}

/* An indirect one, to an address that may not be canonical, which is the branch's fault. */
static const u8 *on_branch(struct soft_vcpu *v)
{
    const struct bt_site *site = &v->bt->sites[v->bt_shared.site];

    if (soft_canonical(v, v->cpu.gpr[GPR_RIP]))
        return on_jump(v);
    v->cpu.gpr[RSP] -= site->size;
    stop_at(v, site->offset);
    return NULL;
}

/* At one that the interpreter executes at once. */
static void come_to_quick(struct soft_vcpu *v)
{
    const struct bt_site *site = &v->bt->sites[v->bt_shared.site];

    if (unlikely(site->x87))
        bt_x87_point(v, site->x87);
    v->cpu.gpr[GPR_RIP] = v->bt_shared.ip_page + site->offset;
}

static void execute_quick(struct soft_vcpu *v)
{
    const struct insn *i = v->bt->kept[v->bt->sites[v->bt_shared.site].resume];

    v->block = NULL;
    i->fn(v, i);
}

static const u8 *on_quick(struct soft_vcpu *v)
{
    come_to_quick(v);
    execute_quick(v);
    return code_here(v);
}

static const u8 *on_string(struct soft_vcpu *v)
{
    const struct bt_site *site = &v->bt->sites[v->bt_shared.site];

    if (bt_string(v, &site->string))
        return bt_run_at(v->bt, site->resume);
    stop_at_site(v, site);
    return NULL;
}

/* Stops where the code would have gone on behind site: within a block. */
static void stop_within(struct soft_vcpu *v, const struct bt_site *site, u32 reason)
{
    stop_at_site(v, site);
    if (reason == BT_STRING) /* it's done */
        v->cpu.gpr[GPR_RIP] = soft_ip_mask(v, v->cpu.gpr[GPR_RIP] + site->string.len);
    v->bt->interp_next = false;
}

static const u8 *came_back(struct soft_vcpu *v, u32 reason)
{
    switch (reason) {
    case BT_SLOW:
        return on_slow(v);
    case BT_LINK:
        return on_link(v);
    case BT_BRANCH:
        return on_branch(v);
    case BT_STOP:
        stop_at_site(v, &v->bt->sites[v->bt_shared.site]);
        return NULL;
    case BT_QUICK:
        return on_quick(v);
    case BT_NARROW:
        return on_narrow(v);
    case BT_FAULT:
        on_fault(v);
        return NULL;
    case BT_STRING:
        return on_string(v);
    case BT_FLAGS: /* enter() saw to it */
        return bt_run_at(v->bt, v->bt->sites[v->bt_shared.site].resume);
    case BT_FPU:
        fpu_make_live(v);
        return bt_run_at(v->bt, v->bt->sites[v->bt_shared.site].resume);
    default: /* BT_JUMP */
        return on_jump(v);
    }
}

/* Whether code that came_back() returned is for the exact RIP and the mode as it is now, not for going on within what
 * was left. */
static bool goes_on_anew(u32 reason)
{
    return reason == BT_QUICK || reason == BT_JUMP || reason == BT_BRANCH;
}

/* Runs v->bt_shared.entry; the arithmetic flags are in v->aflags afterwards. */
static u32 enter(struct soft_vcpu *v)
{
    u32 reason = v->bt->enter();

    if (unlikely(v->aflags >> 16))
        v->aflags = bt_recipe_flags(v, &v->bt->recipes[v->aflags >> 16]);
    return reason;
}

/* Enters code and goes on for as long as what comes back is seen to here. */
static void run_code(struct soft_vcpu *v, const u8 *code)
{
    struct bt *bt = v->bt;
    const struct bt_site *site = NULL;
    u32 reason = BT_JUMP, mode = v->bt_mode;

    do {
        if (unlikely(!v->vectors_live))
            bt_vectors_load(v);
        v->bt_shared.entry = code;
        bt->armed = true;
        atomic_signal_fence(memory_order_seq_cst);
        if (unlikely(atomic_load_explicit(&v->attention, memory_order_relaxed))) {
            bt->armed = false;
            if (site)
                stop_within(v, site, reason);
            return;
        }
        reason = enter(v);
        bt->armed = false;
        atomic_signal_fence(memory_order_seq_cst);
        if (unlikely(bt->nunlinked || v->bt_shared.jump_key == JUMP_KEY_NONE))
            bt_relink(v);
        site = reason == BT_SLOW || reason == BT_FPU || reason == BT_FLAGS || reason == BT_STRING
                   ? &bt->sites[v->bt_shared.site]
                   : NULL;
        code = came_back(v, reason);
        if (goes_on_anew(reason))
            mode = v->bt_mode;
    } while (code && v->bt_mode == mode); /* direct mappings may end, where RIP is exact */
}

/* One block beside the interpreter. False: there is none for the exact RIP. */
static bool verify_block(struct soft_vcpu *v)
{
    const struct bt_block *b;
    u32 reason;

    if (v->bt_mode & BT_MODE_DIRECT)
        bt_direct_stack(v);
    b = find_block(v);
    if (!b)
        return false;
    v->bt_shared.ip_page = v->cpu.gpr[GPR_RIP] & ~(GUEST_PAGE_SIZE - 1);
    bt_verify_begin(v, b);
    if (b->dropped)
        return true; /* the interpreter dropped it on its way: begin anew */
    v->bt_shared.entry = bt_run_at(v->bt, b->memory_entry);
    do {
        if (!v->vectors_live)
            bt_vectors_load(v);
        reason = enter(v);
        if (reason == BT_QUICK) { /* not undone, so not compared */
            come_to_quick(v);
            bt_verify_end(v, b, false);
            execute_quick(v);
            return true;
        }
        v->bt_shared.entry = came_back(v, reason);
    } while ((reason == BT_SLOW || reason == BT_FPU || reason == BT_FLAGS || reason == BT_NARROW) &&
             v->bt_shared.entry);
    bt_verify_end(v, b, reason == BT_FAULT);
    return true;
}

static void run_once(struct soft_vcpu *v)
{
    struct block *cold = cold_block(v);
    const u8 *code;

    if (cold) {
        cold->heat++;
        run_cold(v, cold);
        return;
    }
    code = code_here(v);
    if (code)
        run_code(v, code);
    else if (!v->journal || !v->bt_possible || v->bt->interp_next || !verify_block(v))
        interpret(v);
}

void bt_run(struct soft_vcpu *v)
{
    struct bt *bt = v->bt;

    atomic_store_explicit(&bt->kicked, false, memory_order_relaxed);
    if (!atomic_exchange(&bt->running, true)) /* until now no timer was set for it */
        bt_set_deadline(v, v->timer_deadline);
    while (v->poll && likely(!atomic_load_explicit(&v->attention, memory_order_relaxed)))
        run_once(v);
    bt_direct_tick(v);
}

/* --- Life --- */

int bt_probe(struct error *err)
{
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("bmi2"))
        return error_host(err, ENOTSUP,
                          "engine bt: this processor lacks BMI2; use --engine interp");
    if (!__builtin_cpu_supports("avx"))
        return error_host(err, ENOTSUP, "engine bt: this processor lacks AVX; use --engine interp");
    return 0;
}

int bt_create(struct soft_vcpu *v, struct error *err)
{
    int ret = bt_cache_create(v, err);

    if (ret < 0)
        return ret;
    bt_glue_emit(v->bt);
    bt_room_create(v->bt);
    bt_jump_clear(v);
    ret = bt_kick_create(v, err);
    if (!ret)
        ret = bt_direct_create(v, err);
    if (!ret && v->engine->config.checks.verify)
        ret = bt_verify_create(v, err);
    if (ret < 0)
        bt_cache_destroy(v);
    return ret;
}

void bt_destroy(struct soft_vcpu *v)
{
    if (!v->bt)
        return;
    free(v->journal);
    bt_direct_destroy(v);
    bt_kick_destroy(v);
    bt_cache_destroy(v);
}
