/*
 * The audit of direct code takes accesses whose address was found in direct_map, and refuses each that wasn't, or
 * isn't what was found any more.
 */
#include "engine/soft/bt/audit.h"

#include "engine/soft/bt/asm.h"
#include "engine/soft/bt/translate.h"

#include "audit_rig.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>

#include <cmocka.h>

#define MAX_LOOKS 8
#define UNCHECKED "an address that isn't S1's"
#define FAR (s32)(DIRECT_REACH + 64)

struct rig {
    struct bt *bt;
    struct bt_block block;
    struct bt_exit exit;
    u8 *p, *start;
    u8 *leave[MAX_LOOKS]; /* displacements that lead out where a chunk isn't mapped */
    unsigned nleave;
};

static int setup(void **state)
{
    struct rig *r = calloc(1, sizeof(*r));

    r->bt = code_create(&r->block, &r->exit);
    r->block.mode = BT_MODE_USER | BT_MODE_DIRECT;
    r->p = r->start = r->bt->writable + HOT;
    *state = r;
    return 0;
}

static int teardown(void **state)
{
    struct rig *r = *state;

    code_destroy(r->bt);
    free(r);
    return 0;
}

static u32 offset_of(const struct rig *r, const u8 *p)
{
    return (u32)(p - r->bt->writable);
}

static void put_bytes(struct rig *r, const char *bytes, size_t n)
{
    memcpy(r->p, bytes, n);
    r->p += n;
}
#define PUT(r, bytes) put_bytes(r, bytes, sizeof(bytes) - 1)

/* S2 = S2 >> shift; goes on if the map has that. */
static void put_look(struct rig *r, unsigned shift, unsigned cc)
{
    put_shift(&r->p, true, 5, S2, shift);
    PUT(r, "\x65\x41\x80\xbf"); /* cmp byte gs:[S2 + direct_map], 0 */
    put32(&r->p, GS_OFFSET(direct_map));
    put8(&r->p, 0);
    r->leave[r->nleave++] = put_jcc(&r->p, cc);
}

/* Other code, in the place of what was put. */
static void begin_anew(struct rig *r)
{
    r->p = r->start;
    r->nleave = 0;
}

static void put_look_of(struct rig *r, unsigned reg)
{
    put_mov_rr(&r->p, S2, reg);
    put_look(r, DIRECT_SHIFT, CC_E);
}

/* Ends the code as emit_direct.c and translate.c do, and asks. */
static bool accepted(struct rig *r, struct bt_fault_found *found)
{
    u8 *cold = r->bt->writable + COLD;

    patch_rel32(put_jmp(&r->p), r->bt->writable + r->bt->glue[BT_STOP]);
    r->block.hot_end = offset_of(r, r->p);
    for (unsigned n = 0; n < r->nleave; n++)
        patch_rel32(r->leave[n], cold);
    if (r->nleave) {
        r->block.nexits = 1;
        r->exit.resume = offset_of(r, r->start);
        r->exit.at = offset_of(r, put_jmp(&cold));
        r->exit.bridge = r->exit.stub = offset_of(r, cold);
        put_store_gs_imm32(&cold, GS_OFFSET(bt_shared.site), 0);
        patch_rel32(put_jmp(&cold), r->bt->writable + r->bt->glue[BT_NARROW]);
    }
    r->block.cold_end = offset_of(r, cold);
    return bt_audit(r->bt, &r->block, (const u32[2]){0, 0}, found);
}

static void assert_accepted(struct rig *r)
{
    struct bt_fault_found found;

    if (!accepted(r, &found))
        fail_msg("refused at %u: %s", found.at, found.what);
}
static void assert_refused(struct rig *r, const char *what)
{
    struct bt_fault_found found;

    if (accepted(r, &found))
        fail_msg("accepted; wanted '%s'", what);
    assert_string_equal(found.what, what);
}

static void accesses_near_a_checked_base(void **state)
{
    struct rig *r = *state;

    put_look_of(r, RBX);
    put_load_word(&r->p, 8, RCX, RBX, 0);
    put_store_word(&r->p, 8, RBX, (s32)DIRECT_REACH, RCX);
    put_load_word(&r->p, 4, RCX, RBX, -(s32)DIRECT_REACH);
    assert_accepted(r);
}

static void an_access_without_a_look(void **state)
{
    struct rig *r = *state;

    put_look_of(r, RBX);
    put_load_word(&r->p, 8, RCX, RSI, 0);
    assert_refused(r, UNCHECKED);
}

static void accesses_out_of_reach(void **state)
{
    struct rig *r = *state;

    for (unsigned n = 0; n < 2; n++) {
        begin_anew(r);
        put_look_of(r, RBX);
        put_load_word(&r->p, 8, RCX, RBX, n ? -FAR : FAR);
        assert_refused(r, UNCHECKED);
    }
}

/* In code that isn't direct, and in what goes by the TLB beside direct code, no address is the guest's. */
static void looks_of_other_code(void **state)
{
    static const u32 modes[] = {BT_MODE_USER, BT_MODE_USER | BT_MODE_DIRECT | BT_MODE_NARROW};
    struct rig *r = *state;

    for (unsigned n = 0; n < ARRAY_SIZE(modes); n++) {
        begin_anew(r);
        r->block.mode = modes[n];
        put_look_of(r, RBX);
        put_load_word(&r->p, 8, RCX, RBX, 0);
        assert_refused(r, "no look into the TLB");
    }
}

static void a_look_the_wrong_way_round(void **state)
{
    struct rig *r = *state;

    put_mov_rr(&r->p, S2, RBX);
    put_look(r, DIRECT_SHIFT, CC_NE);
    put_load_word(&r->p, 8, RCX, RBX, 0);
    assert_refused(r, UNCHECKED);
}

static void a_look_by_another_shift(void **state)
{
    struct rig *r = *state;

    put_mov_rr(&r->p, S2, RBX);
    put_look(r, DIRECT_SHIFT - 1, CC_E);
    assert_refused(r, "no look into the TLB");
}

static void a_look_interrupted(void **state)
{
    struct rig *r = *state;

    put_mov_rr(&r->p, S2, RBX);
    put_op_ri(&r->p, true, EXT_ADD, RCX, 1);
    put_look(r, DIRECT_SHIFT, CC_E);
    assert_refused(r, "no look into the TLB");
}

/* What the way out of a look leads to doesn't know it. */
static void where_nothing_was_found(void **state)
{
    struct rig *r = *state;
    u8 *taken;

    put_look_of(r, RBX);
    taken = r->leave[--r->nleave];
    put_load_word(&r->p, 8, RCX, RBX, 0);
    patch_rel32(taken, r->p);
    put_load_word(&r->p, 8, RCX, RBX, 8);
    assert_refused(r, UNCHECKED);
}

static void bases_that_change(void **state)
{
    struct rig *r = *state;

    put_look_of(r, RBX);
    put_op_ri(&r->p, true, EXT_ADD, RBX, 64);
    put_load_word(&r->p, 8, RCX, RBX, 0);
    put_lea(&r->p, RBX, RBX, -128);
    put_load_word(&r->p, 8, RCX, RBX, 0);
    put_op_ri(&r->p, true, EXT_SUB, RBX, 64);
    put_load_word(&r->p, 8, RCX, RBX, 0);
    put_mov_rr(&r->p, RBX, RCX);
    put_load_word(&r->p, 8, RCX, RBX, 0);
    assert_refused(r, UNCHECKED);
}

static void a_base_that_drifts(void **state)
{
    struct rig *r = *state;

    put_look_of(r, RBX);
    for (unsigned n = 0; n < 3; n++)
        put_op_ri(&r->p, true, EXT_ADD, RBX, (s32)DIRECT_REACH / 2);
    put_load_word(&r->p, 8, RCX, RBX, 0);
    assert_refused(r, UNCHECKED);
}

static void a_base_cut_to_32_bits(void **state)
{
    struct rig *r = *state;

    put_look_of(r, RBX);
    put_op_ri(&r->p, false, EXT_ADD, RBX, 1);
    put_load_word(&r->p, 8, RCX, RBX, 0);
    assert_refused(r, UNCHECKED);
}

/* mov rcx, [rbx + rsi * 8 + 16] behind a look of just that; then the index changes. */
static void an_index_that_changes(void **state)
{
    struct rig *r = *state;

    PUT(r, "\x4c\x8d\x7c\xf3\x10"); /* lea r15, [rbx + rsi * 8 + 16] */
    put_look(r, DIRECT_SHIFT, CC_E);
    PUT(r, "\x48\x8b\x4c\xf3\x10");
    put_lea(&r->p, RSI, RSI, 1);
    PUT(r, "\x48\x8b\x4c\xf3\x10");
    assert_refused(r, UNCHECKED);
}

static void another_scale(void **state)
{
    struct rig *r = *state;

    PUT(r, "\x4c\x8d\x7c\xf3\x10");
    put_look(r, DIRECT_SHIFT, CC_E);
    PUT(r, "\x48\x8b\x4c\xb3\x10"); /* mov rcx, [rbx + rsi * 4 + 16] */
    assert_refused(r, UNCHECKED);
}

/* RSP is good without a look, and so is what it is near to. */
static void the_stack(void **state)
{
    struct rig *r = *state;

    PUT(r,
        "\x50\x41\x57\x68\x01\x02\x03\x04\x58\x41\x5e"); /* push rax; push r15; push 0x4030201; pops */
    put_look_of(r, RBP);
    PUT(r, "\xc9\x58"); /* leave; pop rax */
    put_load_word(&r->p, 8, RCX, RSP, 64);
    assert_accepted(r);
}

static void the_stack_out_of_reach(void **state)
{
    struct rig *r = *state;

    for (unsigned n = 0; n < 4; n++) {
        begin_anew(r);
        switch (n) {
        case 0:
            put_mov_rr(&r->p, RSP, RBX);
            break;
        case 1:
            put_lea(&r->p, RSP, RSP, FAR);
            break;
        case 2:
            put_look_of(r, RBX);
            PUT(r, "\xc9"); /* leave */
            break;
        default:
            put_load_word(&r->p, 8, RCX, RSP, -FAR);
            break;
        }
        PUT(r, "\x58"); /* pop rax */
        assert_refused(r, n == 2 ? "an access without a check" : UNCHECKED);
    }
}

static void the_stack_behind_a_look(void **state)
{
    struct rig *r = *state;

    put_mov_rr(&r->p, RSP, RBX);
    put_look_of(r, RSP);
    PUT(r, "\x58"); /* pop rax */
    assert_refused(r, "a way out without a look at RSP");
    begin_anew(r);
    put_look_of(r, RSP);
    PUT(r, "\x58\x50"); /* pop rax; push rax */
    assert_accepted(r);
}

/* What goes by the TLB beside direct code has the stack as that has it. */
static void the_stack_of_what_goes_by_the_tlb(void **state)
{
    struct rig *r = *state;

    r->block.mode |= BT_MODE_NARROW;
    put_look_of(r, RSP);
    PUT(r, "\x58\x50"); /* pop rax; push rax */
    assert_accepted(r);
    begin_anew(r);
    put_mov_rr(&r->p, RSP, RBX);
    PUT(r, "\x58");
    assert_refused(r, UNCHECKED);
}

/* The next block takes RSP as it is. */
static void ways_out_with_another_stack(void **state)
{
    struct rig *r = *state;

    put_lea(&r->p, RSP, RSP, -64);
    put_look_of(r, RBX);
    assert_refused(r, "a way out without a look at RSP");
    begin_anew(r);
    put_lea(&r->p, RSP, RSP, -64);
    put_load_word(&r->p, 8, S2, RSP, 0);
    put_look_of(r, RBX);
    assert_accepted(r);
    begin_anew(r);
    put_load_word(&r->p, 8, S2, RSP, 0);
    put_lea(&r->p, RSP, RSP, -(s32)KIB(128));
    put_look_of(r, RBX);
    assert_refused(r, "a way out without a look at RSP");
}

static void put_known_look(struct rig *r, u32 chunk)
{
    PUT(r, "\x65\x80\x3c\x25"); /* cmp byte gs:[direct_map + chunk], 0 */
    put32(&r->p, GS_OFFSET(direct_map) + chunk);
    put8(&r->p, 0);
    r->leave[r->nleave++] = put_jcc(&r->p, CC_E);
}

/* mov rcx, [address] */
static void put_load_at(struct rig *r, u32 address)
{
    PUT(r, "\x48\x8b\x0c\x25");
    put32(&r->p, address);
}

static void addresses_that_are_numbers(void **state)
{
    struct rig *r = *state;

    put_known_look(r, 3);
    put_load_at(r, 3u << DIRECT_SHIFT);
    put_load_at(r, (4u << DIRECT_SHIFT) - 8);
    put_mov_imm(&r->p, S1, 3u << DIRECT_SHIFT);
    put_load_word(&r->p, 8, RCX, S1, 8);
    put_known_look(r, 0x3fff000);
    put_mov_imm(&r->p, S1, 0x3fff000ULL << DIRECT_SHIFT);
    put_load_word(&r->p, 8, RCX, S1, 8);
    assert_accepted(r);
}

static void other_numbers(void **state)
{
    struct rig *r = *state;

    for (unsigned n = 0; n < 4; n++) {
        begin_anew(r);
        put_known_look(r, n == 3 ? DIRECT_CHUNKS : 3);
        put_mov_imm(&r->p, S1, 3u << DIRECT_SHIFT);
        if (n == 0)
            put_load_at(r, 5u << DIRECT_SHIFT);
        else if (n == 1)
            put_load_at(r, 2u << DIRECT_SHIFT);
        else if (n == 2)
            put_mov_rr(&r->p, S1, RBX);
        put_load_word(&r->p, 8, RCX, S1, 0);
        assert_refused(r, n == 3   ? "a field that isn't the code's"
                          : n == 2 ? "an access without a check"
                                   : UNCHECKED);
    }
}

/* cmp rcx, count; ja */
static void put_count(struct rig *r, s32 count)
{
    put_op_ri(&r->p, true, EXT_CMP, RCX, count);
    r->leave[r->nleave++] = put_jcc(&r->p, CC_A);
}

static void strings(void **state)
{
    struct rig *r = *state;

    put_look_of(r, RDI);
    put_look_of(r, RSI);
    PUT(r, "\xa4"); /* movsb */
    put_look_of(r, RDI);
    PUT(r, "\x48\xab"); /* stosq */
    put_count(r, (s32)DIRECT_REACH / 8);
    put_look_of(r, RDI);
    put_look_of(r, RSI);
    PUT(r, "\xf3\x48\xa5"); /* rep movsq */
    assert_accepted(r);
}

static void strings_that_go_too_far(void **state)
{
    static const char insns[][3] = {"\xf3\xa4", "\xf3\xaa", "\xf3\xa5", "\xf3\xa6", "\xf3\xa4"};
    struct rig *r = *state;

    for (unsigned n = 0; n < ARRAY_SIZE(insns); n++) {
        begin_anew(r);
        if (n)
            put_count(r, (s32)DIRECT_REACH); /* of bytes: too many for MOVSD */
        if (n == 4)
            put_mov_rr(&r->p, RCX, RBX);
        put_look_of(r, RDI);
        if (n != 1)
            put_look_of(r, RSI);
        else
            put_mov_rr(&r->p, RDI, RBX);
        put_bytes(r, insns[n], 2);
        assert_refused(r, n == 1 ? UNCHECKED : "an instruction that code must not have");
    }
}

/* A register in memory is what was looked up until something is stored there. */
static void registers_in_memory(void **state)
{
    struct rig *r = *state;

    put_load_gs(&r->p, S1, GS_GPR(S1));
    put_look_of(r, S1);
    put_load_word(&r->p, 8, RCX, S1, 0);
    put_mov_rr(&r->p, S1, RCX);
    put_load_gs(&r->p, S1, GS_GPR(S1));
    put_load_word(&r->p, 8, RCX, S1, 8);
    put_store_gs(&r->p, GS_GPR(S1), RCX);
    put_load_gs(&r->p, S1, GS_GPR(S1));
    put_load_word(&r->p, 8, RCX, S1, 0);
    assert_refused(r, "an access without a check");
}

static void one_register_of_memory_for_another(void **state)
{
    struct rig *r = *state;

    put_load_gs(&r->p, S1, GS_GPR(S1));
    put_look_of(r, S1);
    put_load_gs(&r->p, S1, GS_GPR(S2));
    put_load_word(&r->p, 8, RCX, S1, 0);
    assert_refused(r, "an access without a check");
}

#define TEST(fn) cmocka_unit_test_setup_teardown(fn, setup, teardown)

int main(void)
{
    const struct CMUnitTest tests[] = {
        TEST(accesses_near_a_checked_base),
        TEST(an_access_without_a_look),
        TEST(accesses_out_of_reach),
        TEST(looks_of_other_code),
        TEST(a_look_the_wrong_way_round),
        TEST(a_look_by_another_shift),
        TEST(a_look_interrupted),
        TEST(where_nothing_was_found),
        TEST(bases_that_change),
        TEST(a_base_that_drifts),
        TEST(a_base_cut_to_32_bits),
        TEST(an_index_that_changes),
        TEST(another_scale),
        TEST(the_stack),
        TEST(the_stack_out_of_reach),
        TEST(the_stack_behind_a_look),
        TEST(the_stack_of_what_goes_by_the_tlb),
        TEST(ways_out_with_another_stack),
        TEST(addresses_that_are_numbers),
        TEST(other_numbers),
        TEST(strings),
        TEST(strings_that_go_too_far),
        TEST(registers_in_memory),
        TEST(one_register_of_memory_for_another),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
