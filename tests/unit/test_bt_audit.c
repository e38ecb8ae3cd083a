/*
 * The audit of translated code takes what the emitter makes, and refuses each way out of the guest's memory
 * that code could have.
 */
#include "engine/soft/bt/audit.h"

#include "engine/soft/bt/asm.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>

#include <cmocka.h>

#define CODE_SIZE 4096u
#define HOT 64u
#define COLD 2048u
#define NO_SITES ((const u32[2]){0, 0})

struct rig {
    struct bt *bt;
    struct bt_block block;
    struct bt_fault_found found;
    u8 *p;
    u8 *leave; /* where the jump to the slow path is to be patched */
};

static int setup(void **state)
{
    struct rig *r = calloc(1, sizeof(*r));

    r->bt = calloc(1, sizeof(*r->bt));
    r->bt->writable = calloc(1, CODE_SIZE);
    r->bt->executable = r->bt->writable;
    r->block = (struct bt_block){.hot = HOT,
                                 .cold = COLD,
                                 .jump_entry = HOT,
                                 .memory_entry = HOT,
                                 .host_entry = HOT,
                                 .memory_native = HOT,
                                 .host_native = HOT,
                                 .fault = BT_FAULT};
    r->p = r->bt->writable + HOT;
    for (unsigned n = 0; n <= BT_FAULT; n++)
        r->bt->glue[n] = n;
    *state = r;
    return 0;
}

static int teardown(void **state)
{
    struct rig *r = *state;

    free(r->bt->writable);
    free(r->bt);
    free(r);
    return 0;
}

static u32 entries_of(enum tlb_kind kind)
{
    return (u32)(offsetof(struct soft_vcpu, tlbs) + kind * sizeof(struct tlb) +
                 offsetof(struct tlb, entries));
}

#define TAG(write)                                                                                 \
    ((u32)((write) ? offsetof(struct tlb_entry, write_tag) : offsetof(struct tlb_entry, read_tag)))
#define HOST_ADDRESS ((u32)offsetof(struct tlb_entry, host))

/* What emit.c's put_check makes, for an address in RAX. */
static void put_check_of(struct rig *r, enum tlb_kind kind, bool write, u32 size)
{
    put_mov_rr(&r->p, S1, RAX);
    put_rorx(&r->p, S2, S1, 7);
    put_op_ri(&r->p, false, EXT_AND, S2, (TLB_SIZE - 1) << 5);
    put_op_gs_base(&r->p, OP_XOR, S1, S2, entries_of(kind) + TAG(write));
    put_op_ri(&r->p, true, EXT_CMP, S1, (s32)(GUEST_PAGE_SIZE - size));
    r->leave = put_jcc(&r->p, CC_A);
    put_op_gs_base(&r->p, OP_ADD, S1, S2, entries_of(kind) + HOST_ADDRESS);
}

/* Ends the code with a way out, and asks. */
static bool accepted(struct rig *r)
{
    u8 *cold = r->bt->writable + COLD;

    patch_rel32(put_jmp(&r->p), r->bt->writable + r->bt->glue[BT_STOP]);
    r->block.hot_end = (u32)(r->p - r->bt->writable);
    if (r->leave) {
        patch_rel32(r->leave, cold);
        patch_rel32(put_jmp(&cold), r->bt->writable + r->bt->glue[BT_SLOW]);
    }
    r->block.cold_end = (u32)(cold - r->bt->writable);
    return bt_audit(r->bt, &r->block, NO_SITES, &r->found);
}

static void assert_accepted(struct rig *r)
{
    if (!accepted(r))
        fail_msg("refused at %u: %s", r->found.at, r->found.what);
}
static void assert_refused(struct rig *r, const char *what)
{
    if (accepted(r))
        fail_msg("accepted; wanted '%s'", what);
    assert_string_equal(r->found.what, what);
}

static void put_bytes(struct rig *r, const char *bytes, size_t n)
{
    memcpy(r->p, bytes, n);
    r->p += n;
}
#define PUT(r, bytes) put_bytes(r, bytes, sizeof(bytes) - 1)

static void checked_accesses_pass(void **state)
{
    struct rig *r = *state;

    put_check_of(r, TLB_KERNEL, true, 16);
    put_load_word(&r->p, 8, RCX, S1, 0);
    put_store_word(&r->p, 8, S1, 8, RCX);
    assert_accepted(r);
}

static void fields_pass(void **state)
{
    struct rig *r = *state;

    put_load_gs(&r->p, S2, GS_GPR(S1));
    put_store_gs(&r->p, GS_GPR(S2), S2);
    put_store_gs(&r->p, GS_OFFSET(bt_shared.linear), RAX);
    assert_accepted(r);
}

static void unchecked_access(void **state)
{
    struct rig *r = *state;

    put_mov_rr(&r->p, S1, RAX);
    put_load_word(&r->p, 8, RCX, S1, 0);
    assert_refused(r, "an access without a check");
}

static void what_an_entry_left_in_s1(void **state)
{
    struct rig *r = *state;

    put_load_word(&r->p, 8, RCX, S1, 0);
    assert_refused(r, "an access beyond its check");
}

static void access_beyond_its_check(void **state)
{
    struct rig *r = *state;

    put_check_of(r, TLB_KERNEL, false, 8);
    put_load_word(&r->p, 8, RCX, S1, 1);
    assert_refused(r, "an access beyond its check");
}

static void access_below_its_check(void **state)
{
    struct rig *r = *state;

    put_check_of(r, TLB_KERNEL, false, 8);
    put_load_word(&r->p, 8, RCX, S1, -1);
    assert_refused(r, "an access beyond its check");
}

/* What displacements 2 GiB apart once made. */
static void check_of_a_negative_size(void **state)
{
    struct rig *r = *state;

    put_check_of(r, TLB_KERNEL, false, 0u - 64);
    put_load_word(&r->p, 8, RCX, S1, 0);
    assert_refused(r, "a host address without a check");
}

static void store_checked_for_loads(void **state)
{
    struct rig *r = *state;

    put_check_of(r, TLB_KERNEL, false, 8);
    put_store_word(&r->p, 8, S1, 0, RCX);
    assert_refused(r, "a store checked for loads");
}

static void s1_changed_behind_its_check(void **state)
{
    struct rig *r = *state;

    put_check_of(r, TLB_KERNEL, false, 8);
    put_mov_rr(&r->p, S1, RDX);
    put_load_word(&r->p, 8, RCX, S1, 0);
    assert_refused(r, "an access without a check");
}

static void s2_changed_within_a_check(void **state)
{
    struct rig *r = *state;

    put_mov_rr(&r->p, S1, RAX);
    put_rorx(&r->p, S2, S1, 7);
    put_op_ri(&r->p, false, EXT_AND, S2, (TLB_SIZE - 1) << 5);
    put_op_gs_base(&r->p, OP_XOR, S1, S2, entries_of(TLB_KERNEL) + TAG(false));
    put_op_ri(&r->p, true, EXT_CMP, S1, GUEST_PAGE_SIZE - 8);
    r->leave = put_jcc(&r->p, CC_A);
    put_rorx(&r->p, S2, RDX, 7);
    put_op_ri(&r->p, false, EXT_AND, S2, (TLB_SIZE - 1) << 5);
    put_op_gs_base(&r->p, OP_ADD, S1, S2, entries_of(TLB_KERNEL) + HOST_ADDRESS);
    assert_refused(r, "a host address without a check");
}

static void check_without_a_branch(void **state)
{
    struct rig *r = *state;

    put_mov_rr(&r->p, S1, RAX);
    put_rorx(&r->p, S2, S1, 7);
    put_op_ri(&r->p, false, EXT_AND, S2, (TLB_SIZE - 1) << 5);
    put_op_gs_base(&r->p, OP_XOR, S1, S2, entries_of(TLB_KERNEL) + TAG(false));
    put_op_ri(&r->p, true, EXT_CMP, S1, GUEST_PAGE_SIZE - 8);
    put_op_gs_base(&r->p, OP_ADD, S1, S2, entries_of(TLB_KERNEL) + HOST_ADDRESS);
    assert_refused(r, "a host address without a check");
}

static void check_with_another_branch(void **state)
{
    struct rig *r = *state;

    put_mov_rr(&r->p, S1, RAX);
    put_rorx(&r->p, S2, S1, 7);
    put_op_ri(&r->p, false, EXT_AND, S2, (TLB_SIZE - 1) << 5);
    put_op_gs_base(&r->p, OP_XOR, S1, S2, entries_of(TLB_KERNEL) + TAG(false));
    put_op_ri(&r->p, true, EXT_CMP, S1, GUEST_PAGE_SIZE - 8);
    r->leave = put_jcc(&r->p, CC_B);
    put_op_gs_base(&r->p, OP_ADD, S1, S2, entries_of(TLB_KERNEL) + HOST_ADDRESS);
    assert_refused(r, "a host address without a check");
}

static void index_without_its_mask(void **state)
{
    struct rig *r = *state;

    put_mov_rr(&r->p, S1, RAX);
    put_rorx(&r->p, S2, S1, 7);
    put_op_gs_base(&r->p, OP_XOR, S1, S2, entries_of(TLB_KERNEL) + TAG(false));
    assert_refused(r, "no look into the TLB");
}

/* A user's code must not have what the kernel's TLB allows. */
static void tlb_of_another_mode(void **state)
{
    struct rig *r = *state;

    r->block.mode = BT_MODE_USER;
    put_check_of(r, TLB_KERNEL, false, 8);
    assert_refused(r, "no look into the TLB");
}

static void host_address_into_a_register(void **state)
{
    struct rig *r = *state;

    put_check_of(r, TLB_KERNEL, false, 8);
    put_mov_rr(&r->p, RCX, S1);
    assert_refused(r, "a host address is read");
}

static void host_address_by_lea(void **state)
{
    struct rig *r = *state;

    put_check_of(r, TLB_KERNEL, false, 8);
    put_lea(&r->p, RCX, S1, 4);
    assert_refused(r, "a host address is read");
}

static void host_address_into_a_field(void **state)
{
    struct rig *r = *state;

    put_check_of(r, TLB_KERNEL, false, 8);
    put_store_gs(&r->p, GS_GPR(S1), S1);
    assert_refused(r, "a host address is read");
}

/* BSF of zero leaves its destination, which once stood for the guest's R14. */
static void host_address_left_by_bsf(void **state)
{
    struct rig *r = *state;

    put_check_of(r, TLB_KERNEL, false, 8);
    PUT(r, "\x4c\x0f\xbc\xf0"); /* bsf r14, rax */
    assert_refused(r, "a host address is read");
}

static void host_address_from_the_tlb(void **state)
{
    struct rig *r = *state;

    put_rorx(&r->p, S2, RAX, 7);
    put_op_ri(&r->p, false, EXT_AND, S2, (TLB_SIZE - 1) << 5);
    put_op_gs_base(&r->p, OP_MOV, RCX, S2, entries_of(TLB_KERNEL) + HOST_ADDRESS);
    assert_refused(r, "a host address without a check");
}

static void fields_that_are_not_its_own(void **state)
{
    const u32 offsets[] = {GS_OFFSET(bt_shared.host_rsp), GS_OFFSET(bt_shared.jump_code),
                           GS_OFFSET(engine), GS_OFFSET(cpu.cr3), sizeof(struct soft_vcpu)};

    for (unsigned n = 0; n < ARRAY_SIZE(offsets); n++) {
        struct rig *r = *state;

        r->p = r->bt->writable + HOT;
        put_load_gs(&r->p, RCX, offsets[n]);
        assert_refused(r, "a field that isn't the code's");
    }
}

static void store_to_a_field_for_loads(void **state)
{
    struct rig *r = *state;

    put_store_gs(&r->p, GS_OFFSET(seg_base), RCX);
    assert_refused(r, "a field that isn't the code's");
}

static void jump_by_any_number(void **state)
{
    struct rig *r = *state;

    put_mov_rr(&r->p, S2, RAX);
    put_op_gs_index8(&r->p, false, 0xff, 4, S2, GS_OFFSET(bt_shared.jump_code));
    assert_refused(r, "no look into the jump cache");
}

static void branches_elsewhere(void **state)
{
    static const struct {
        u32 to;
        const char *what;
    } cases[] = {{HOT + 1, "a branch into an instruction"}, {1500, "a branch out of the block"}};
    struct rig *r = *state;

    for (unsigned n = 0; n < ARRAY_SIZE(cases); n++) {
        u8 *from;

        r->p = r->bt->writable + HOT;
        from = put_jcc(&r->p, CC_E);
        patch_rel32(from, r->bt->writable + (n ? cases[n].to : HOT + 8)); /* into the mov below */
        put_mov_rr(&r->p, RAX, RCX);
        assert_refused(r, cases[n].what);
    }
}

static void end_run_over(void **state)
{
    struct rig *r = *state;

    put_mov_rr(&r->p, RAX, RCX);
    r->block.hot_end = (u32)(r->p - r->bt->writable);
    r->block.cold_end = COLD;
    assert_false(bt_audit(r->bt, &r->block, NO_SITES, &r->found));
    assert_string_equal(r->found.what, "its end is run over");
}

/* A check on one of two ways to an access is none. */
static void check_on_one_way(void **state)
{
    struct rig *r = *state;
    u8 *around, *slow;

    put_mov_rr(&r->p, S1, RAX);
    around = put_jcc(&r->p, CC_E);
    put_check_of(r, TLB_KERNEL, false, 8);
    slow = r->leave;
    patch_rel32(around, r->p);
    r->leave = slow;
    put_load_word(&r->p, 8, RCX, S1, 0);
    assert_refused(r, "an access beyond its check");
}

static void instructions_that_code_must_not_have(void **state)
{
    static const struct {
        const char *bytes, *what;
    } cases[] = {
        {"\x50", "an instruction that code must not have"},                 /* push rax */
        {"\x58", "an instruction that code must not have"},                 /* pop rax */
        {"\xc3", "an instruction that code must not have"},                 /* ret */
        {"\x0f\x05", "an instruction that code must not have"},             /* syscall */
        {"\xcc", "an instruction that code must not have"},                 /* int3 */
        {"\xcd\x80", "an instruction that code must not have"},             /* int 0x80 */
        {"\xf4", "an instruction that code must not have"},                 /* hlt */
        {"\xec", "an instruction that code must not have"},                 /* in al, dx */
        {"\xaa", "an instruction that code must not have"},                 /* stosb */
        {"\xf3\x48\x0f\xae\xd8", "an instruction that code must not have"}, /* wrgsbase rax */
        {"\x8e\xe8", NULL},                                                 /* mov gs, eax */
        {"\x0f\x01\xf8", "an instruction that code must not have"},         /* swapgs */
        {"\xff\xe0", "an indirect branch"},                                 /* jmp rax */
        {"\xff\xd0", "an instruction that code must not have"},             /* call rax */
        {"\x8b\x08", "an address that isn't S1's"},                         /* mov ecx, [rax] */
        {"\x8b\x0d\0\0\0\0", "an address that isn't S1's"},                 /* mov ecx, [rip] */
        {"\x64\x8b\x0c\x25\0\0\0\0", "an address off FS"},                  /* mov ecx, fs:[0] */
        {"\x65\x8b\x08", "an address off GS"},                              /* mov ecx, gs:[rax] */
        {"\x43\x8b\x0c\x3e", "an address that isn't S1's"}, /* mov ecx, [r14 + r15] */
        {"\xd7", "an address that isn't S1's"},             /* xlat */
    };
    static const u8 lengths[] = {1, 1, 1, 2, 1, 2, 1, 1, 1, 5, 2, 3, 2, 2, 2, 6, 8, 3, 4, 1};
    struct rig *r = *state;

    _Static_assert(ARRAY_SIZE(lengths) == ARRAY_SIZE(cases), "a length each");
    for (unsigned n = 0; n < ARRAY_SIZE(cases); n++) {
        r->p = r->bt->writable + HOT;
        put_bytes(r, cases[n].bytes, lengths[n]);
        if (cases[n].what)
            assert_refused(r, cases[n].what);
        else
            assert_false(accepted(r));
    }
}

int main(void)
{
#define TEST(name) cmocka_unit_test_setup_teardown(name, setup, teardown)
    const struct CMUnitTest tests[] = {
        TEST(checked_accesses_pass),
        TEST(fields_pass),
        TEST(unchecked_access),
        TEST(what_an_entry_left_in_s1),
        TEST(access_beyond_its_check),
        TEST(access_below_its_check),
        TEST(check_of_a_negative_size),
        TEST(store_checked_for_loads),
        TEST(s1_changed_behind_its_check),
        TEST(s2_changed_within_a_check),
        TEST(check_without_a_branch),
        TEST(check_with_another_branch),
        TEST(index_without_its_mask),
        TEST(tlb_of_another_mode),
        TEST(host_address_into_a_register),
        TEST(host_address_by_lea),
        TEST(host_address_into_a_field),
        TEST(host_address_left_by_bsf),
        TEST(host_address_from_the_tlb),
        TEST(fields_that_are_not_its_own),
        TEST(store_to_a_field_for_loads),
        TEST(jump_by_any_number),
        TEST(branches_elsewhere),
        TEST(end_run_over),
        TEST(check_on_one_way),
        TEST(instructions_that_code_must_not_have),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
