/*
 * Engine bt with a cache of translated code that is much smaller than what the guest runs: all of it goes, and comes
 * back, and what the engine knows of its blocks is what there is.
 */
#include "bt_rig.h"

#include <pthread.h>
#include <stdatomic.h>
#include <time.h>

#define FUNCTIONS 0x40000u
#define FUNCTION_SIZE 16u
#define COUNT 6000u
#define ROUNDS 3
#define CODE_SIZE KIB(256)

/* Calls one function after another, RDI of them. */
static void put_caller(struct rig *r)
{
    /* 1: call *%rsi; add %rax, %rbx; add $16, %rsi; dec %rdi; jnz 1b; out %al, $PORT_END; 2: jmp 2b */
    static const u8 caller[] = {0xff, 0xd6, 0x48, 0x01, 0xc3, 0x48, 0x83,     0xc6, 0x10,
                                0x48, 0xff, 0xcf, 0x75, 0xf2, 0xe6, PORT_END, 0xeb, 0xfe};

    put(r, LOOP, caller, sizeof(caller));
}

/* Function n returns first + n, by the return instruction of the next: mov $value, %eax; jmp there; ret */
static void put_functions(struct rig *r, u32 first)
{
    for (u32 n = 0; n <= COUNT; n++) {
        u8 code[FUNCTION_SIZE] = {0xb8, 0, 0, 0, 0, 0xeb, FUNCTION_SIZE, 0xc3};
        u32 value = first + n;

        memcpy(code + 1, &value, sizeof(value));
        put(r, FUNCTIONS + n * FUNCTION_SIZE, code, sizeof(code));
    }
}

static u64 expected(u64 first)
{
    return COUNT * first + (u64)COUNT * (COUNT - 1) / 2;
}

/* Seeds of the smallest caches, of which some have few of one thing or another; all code is translated at once. */
static u64 next_seed(u64 seed)
{
    for (;;) {
        struct bt_choices c = bt_choose(&(struct engine_checks){.seed = ++seed});

        if (c.code_size == CODE_SIZE && !c.hot_runs)
            return seed;
    }
}
#define SEEDS 6

static struct soft_vcpu *vcpu(const struct rig *r)
{
    return (struct soft_vcpu *)r->vcpu;
}

/* --- What there is --- */

static bool is_live(const struct bt *bt, const struct bt_block *b)
{
    u32 n = (u32)(b - bt->blocks);

    return (n + bt->max_blocks - bt->oldest) % bt->max_blocks < bt->nblocks;
}

static void check_block(const struct soft_vcpu *v, struct bt_block *b)
{
    struct bt *bt = v->bt;

    assert_ptr_equal(bt_block_at(bt, bt_run_at(bt, b->start.hot)), b);
    assert_ptr_equal(bt_block_at(bt, bt_run_at(bt, b->hot_end - 1)), b);
    if (b->cold_end > b->start.cold) {
        assert_ptr_equal(bt_block_at(bt, bt_run_at(bt, b->start.cold)), b);
        assert_ptr_equal(bt_block_at(bt, bt_run_at(bt, b->cold_end - 1)), b);
    }
    if (b->dropped)
        return;
    assert_ptr_equal(bt_block_find(v, b->gpa, b->page, b->mode), b);
    for (u32 n = b->start.exits; n < b->start.exits + b->nexits; n++) {
        const struct bt_block *to = bt->exits[n].to;

        assert_true(!to || (is_live(bt, to) && !to->dropped));
    }
    for (const struct bt_exit *e = b->incoming; e; e = e->next_in) {
        assert_ptr_equal(e->to, b);
        assert_ptr_equal(*e->link_in, e);
    }
}

/* No two blocks have a byte of code, or an exit, in common: each is found where it is. */
static void check_cache(const struct soft_vcpu *v)
{
    struct bt *bt = v->bt;

    assert_true(bt->nblocks > 0 && bt->nblocks <= bt->max_blocks);
    for (unsigned part = 0; part < BT_PARTS; part++)
        assert_true(bt->next.of[part] >= bt->begin.of[part] &&
                    bt->next.of[part] <= bt->end.of[part]);
    for (u32 n = 0; n < bt->nblocks; n++)
        check_block(v, bt_block_nth(bt, n));
    assert_null(bt_block_at(bt, bt->executable));
    assert_null(bt_block_at(bt, bt->executable + BT_CODE_SIZE - 1));
    for (unsigned slot = 0; slot < JUMP_SIZE; slot++) {
        const struct bt_block *b;

        if (v->bt_shared.jump[slot].tag == bt_jump_no_tag(slot))
            continue;
        b = bt_block_at(bt, v->bt_shared.jump[slot].code);
        assert_non_null(b);
        assert_ptr_equal(bt_run_at(bt, b->jump_entry), v->bt_shared.jump[slot].code);
    }
    for (unsigned part = 0; part < 2; part++)
        for (unsigned n = 0; n < ARRAY_SIZE(bt->pages[part]); n++)
            for (const struct bt_block *b = bt->pages[part][n]; b; b = b->page_next[part])
                assert_true(is_live(bt, b) && b->listed[part]);
}

/* --- Tests --- */

static void more_code_than_the_cache_holds(void **state)
{
    u64 seed = 0;

    for (unsigned n = 0; n < SEEDS; n++) {
        struct rig *r = rig_create(1, seed = next_seed(seed));

        put_caller(r);
        put_functions(r, 1);
        for (unsigned round = 0; round < ROUNDS; round++) {
            assert_int_equal(sum(r, FUNCTIONS, COUNT), expected(1));
            check_cache(vcpu(r));
        }
        assert_true(stats(r).blocks_evicted > COUNT);
        rig_destroy(r);
    }
}

/* A store is noticed wherever blocks, or what was decoded for them, are still there. */
static void code_is_written_after_eviction(void **state)
{
    struct rig *r = rig_create(1, next_seed(0));

    put_caller(r);
    for (u32 first = 1; first < 4; first++) {
        put_functions(r, first);
        assert_int_equal(sum(r, FUNCTIONS, COUNT), expected(first));
        check_cache(vcpu(r));
    }
    rig_destroy(r);
}

static void flushed_in_between(void **state)
{
    struct rig *r = rig_create(1, next_seed(0));

    put_caller(r);
    put_functions(r, 1);
    for (unsigned round = 0; round < ROUNDS; round++) {
        assert_int_equal(sum(r, FUNCTIONS, COUNT), expected(1));
        engine_bt.memory_changed(r->engine);
        assert_int_equal(vcpu(r)->bt->nblocks, 0);
        assert_true(bt_has_room(vcpu(r)->bt));
    }
    rig_destroy(r);
}

struct kicker {
    struct rig *r;
    atomic_bool stop;
};

static void *kick_all_the_time(void *opaque)
{
    struct kicker *k = opaque;

    while (!atomic_load(&k->stop)) {
        engine_bt.vcpu_kick(k->r->vcpu);
        nanosleep(&(struct timespec){.tv_nsec = 50000}, NULL);
    }
    return NULL;
}

/* The signal handler comes at any moment: it must find the block that runs. */
static void kicked_all_the_time(void **state)
{
    struct kicker k = {.r = rig_create(1, next_seed(0))};
    struct lapic_state apic;
    struct vcpu_exit exit;
    struct cpu cpu;
    pthread_t thread;

    put_caller(k.r);
    put_functions(k.r, 1);
    enter(k.r, FUNCTIONS, COUNT);
    assert_int_equal(pthread_create(&thread, NULL, kick_all_the_time, &k), 0);
    do {
        engine_bt.vcpu_run(k.r->vcpu, &exit);
        assert_int_equal(exit.reason, VCPU_EXIT_KICKED);
        engine_bt.vcpu_get_state(k.r->vcpu, &cpu, &apic);
    } while (cpu.gpr[RDI]);
    atomic_store(&k.stop, true);
    pthread_join(thread, NULL);
    engine_bt.vcpu_get_state(k.r->vcpu, &cpu, &apic);
    assert_int_equal(cpu.gpr[RBX], expected(1));
    check_cache(vcpu(k.r));
    rig_destroy(k.r);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(more_code_than_the_cache_holds),
        cmocka_unit_test(code_is_written_after_eviction),
        cmocka_unit_test(flushed_in_between),
        cmocka_unit_test(kicked_all_the_time),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
