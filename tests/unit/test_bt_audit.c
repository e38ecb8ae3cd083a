/*
 * The audit of translated code takes what the emitter makes, and refuses each way out of the guest's memory
 * that code could have.
 */
#include "engine/soft/bt/audit.h"

#include "engine/soft/bt/asm.h"

#include "audit_rig.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>

#include <cmocka.h>

#define SITES 2u

struct rig {
    struct bt *bt;
    struct bt_block block;
    struct bt_fault_found found;
    u8 *p;
    u8 *leave;   /* where the jump to the slow path is to be patched */
    u8 *leave2;  /* and the one of another check, which doesn't come back */
    u32 restart; /* code offset at which the access begins anew */
    u32 tag;     /* displacement of the tag that the check is with */
    struct bt_site sites[SITES];
    struct bt_exit exit;
};

static int setup(void **state)
{
    struct rig *r = calloc(1, sizeof(*r));

    r->bt = code_create(&r->block, &r->exit);
    r->bt->sites = r->sites;
    r->p = r->bt->writable + HOT;
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
    r->restart = (u32)(r->p - r->bt->writable);
    r->tag = entries_of(kind) + TAG(write);
    put_mov_rr(&r->p, S1, RAX);
    put_rorx(&r->p, S2, S1, 7);
    put_op_ri(&r->p, false, EXT_AND, S2, (TLB_SIZE - 1) << 5);
    put_op_gs_base(&r->p, OP_XOR, S1, S2, r->tag);
    put_op_ri(&r->p, true, EXT_CMP, S1, (s32)(GUEST_PAGE_SIZE - size));
    r->leave = put_jcc(&r->p, CC_A);
    put_op_gs_base(&r->p, OP_ADD, S1, S2, entries_of(kind) + HOST_ADDRESS);
}

static u8 *way_out(const struct rig *r, enum bt_reason reason)
{
    return r->bt->writable + r->bt->glue[reason];
}

static u32 offset_of(const struct rig *r, const u8 *p)
{
    return (u32)(p - r->bt->writable);
}

/* Ends the code with a way out, and asks. */
static bool accepted(struct rig *r)
{
    u8 *cold = r->bt->writable + COLD;

    patch_rel32(put_jmp(&r->p), way_out(r, BT_STOP));
    r->block.hot_end = offset_of(r, r->p);
    if (r->leave) {
        patch_rel32(r->leave, cold);
        put_store_gs_imm32(&cold, GS_OFFSET(bt_shared.site), 0);
        patch_rel32(put_jmp(&cold), way_out(r, BT_SLOW));
        r->sites[0].resume = r->restart;
    }
    r->block.cold_end = offset_of(r, cold);
    return bt_audit(r->bt, &r->block, (const u32[2]){0, SITES}, &r->found);
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
    const u32 offsets[] = {GS_OFFSET(bt_shared.host_rsp), GS_OFFSET(bt_shared.jump[0].code),
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

static void prefetch_of_any_field(void **state)
{
    struct rig *r = *state;

    put_prefetch_gs(&r->p, GS_OFFSET(cpu.cr3));
    assert_accepted(r);
}

static void jump_by_any_number(void **state)
{
    struct rig *r = *state;

    put_mov_rr(&r->p, S2, RAX);
    put_op_gs_index4(&r->p, false, 0xff, 4, S2, GS_OFFSET(bt_shared.jump[0].code));
    assert_refused(r, "no look into the jump cache");
}

static void jump_by_a_field(void **state)
{
    struct rig *r = *state;

    put_op_gs(&r->p, false, 0xff, 4, GS_GPR(RAX)); /* jmp gs:[gpr] */
    assert_refused(r, "an indirect branch");
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
    assert_false(bt_audit(r->bt, &r->block, (const u32[2]){0, SITES}, &r->found));
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

/* --- Borrowed registers --- */

#define U RBX
#define V RCX
#define KEPT(k) (GS_OFFSET(bt_shared.kept_address) + 8u * (k))

static void put_borrow(struct rig *r)
{
    put_store_gs(&r->p, GS_GPR(U), U);
    put_store_gs(&r->p, GS_GPR(V), V);
}

static void put_give_back(u8 **p)
{
    put_load_gs(p, U, GS_GPR(U));
    put_load_gs(p, V, GS_GPR(V));
}

/* A block that borrows two registers begins. */
static void begin_borrowing(struct rig *r)
{
    u32 native;

    r->p = r->bt->writable + HOT;
    r->leave = r->leave2 = NULL;
    r->block.nexits = 0;
    r->block.perm[2] = U;
    r->block.perm[3] = V;
    put_borrow(r);
    native = offset_of(r, r->p);
    r->block.memory_native = r->block.host_native = native;
}

/* A check, and its host address into a borrowed register. */
static void put_checked_into(struct rig *r, unsigned reg, bool write, u32 size)
{
    put_check_of(r, TLB_KERNEL, write, size);
    put_mov_rr(&r->p, reg, S1);
}

/* What breaks a slow path and its way back. */
enum flaw {
    NO_FLAW,
    KEEPS_NOTHING,      /* before it leaves */
    KEEPS_TOO_EARLY,    /* before the register has its address */
    NO_SITE,            /* left with a number that nobody knows */
    ANOTHERS_SITE,      /* of another block */
    LEAVES_BORROWED,    /* leaves without the guest's registers */
    FAULT_STRAIGHT_OUT, /* leaves on an exception with no change of registers */
    LATE_BRIDGE,        /* an exit's second branch comes before the change of registers */
};

/* The cold code of r->exit. */
static void put_exit(struct rig *r, u8 **p, enum flaw flaw)
{
    patch_rel32(bt_write_at(r->bt, r->exit.at), *p);
    r->exit.bridge = offset_of(r, *p);
    if (flaw != LATE_BRIDGE)
        put_give_back(p);
    r->exit.at2 = offset_of(r, put_jmp(p));
    r->exit.stub = offset_of(r, *p);
    if (flaw == LATE_BRIDGE)
        put_give_back(p);
    patch_rel32(put_jmp(p), way_out(r, BT_LINK));
}

/* The cold half of a block with one check, for one site, and the end of its hot one. */
static bool accepted_borrowing(struct rig *r, enum flaw flaw)
{
    u8 *hot = r->p, *cold = r->bt->writable + COLD;

    if (r->leave2)
        patch_rel32(r->leave2, hot);
    put_give_back(&hot);
    patch_rel32(put_jmp(&hot), way_out(r, BT_STOP));
    r->block.hot_end = offset_of(r, hot);
    patch_rel32(r->leave, cold);
    put_op_gs_base(&cold, OP_XOR, S1, S2, r->tag);
    put_store_gs(&cold, GS_OFFSET(bt_shared.linear), S1);
    if (flaw != KEEPS_NOTHING) {
        put_store_gs(&cold, KEPT(0), U);
        put_store_gs(&cold, KEPT(1), V);
    }
    if (flaw != LEAVES_BORROWED)
        put_give_back(&cold);
    if (flaw == NO_SITE)
        put_op_gs(&cold, false, 0x89, RAX, GS_OFFSET(bt_shared.site));
    else
        put_store_gs_imm32(&cold, GS_OFFSET(bt_shared.site), flaw == ANOTHERS_SITE ? SITES : 1);
    patch_rel32(put_jmp(&cold), way_out(r, BT_SLOW));
    r->sites[1].resume = offset_of(r, cold);
    put_store_gs(&cold, GS_GPR(U), U);
    put_store_gs(&cold, GS_GPR(V), V);
    put_load_gs(&cold, U, KEPT(0));
    put_load_gs(&cold, V, KEPT(1));
    patch_rel32(put_jmp(&cold), r->bt->writable + r->restart);
    r->block.fault = BT_FAULT;
    if (flaw != FAULT_STRAIGHT_OUT) {
        r->block.fault = offset_of(r, cold);
        put_give_back(&cold);
        patch_rel32(put_jmp(&cold), way_out(r, BT_FAULT));
    }
    if (r->block.nexits)
        put_exit(r, &cold, flaw);
    r->block.cold_end = offset_of(r, cold);
    return bt_audit(r->bt, &r->block, (const u32[2]){0, SITES}, &r->found);
}

static void assert_borrowing_accepted(struct rig *r)
{
    if (!accepted_borrowing(r, NO_FLAW))
        fail_msg("refused at %u: %s", r->found.at, r->found.what);
}
static void assert_borrowing_refused(struct rig *r, enum flaw flaw, const char *what)
{
    if (accepted_borrowing(r, flaw))
        fail_msg("accepted; wanted '%s'", what);
    assert_string_equal(r->found.what, what);
}

/* U is checked for 16 bytes, then V for 8: C comes back from there with U's address. */
static void put_two_checks(struct rig *r)
{
    put_checked_into(r, U, true, 16);
    r->leave2 = r->leave;
    put_checked_into(r, V, false, 8);
}

static void borrowed_addresses_pass(void **state)
{
    struct rig *r = *state;

    begin_borrowing(r);
    put_two_checks(r);
    put_load_word(&r->p, 8, RDX, V, 0);
    put_store_word(&r->p, 8, U, 8, RDX);
    put_load_word(&r->p, 8, V, U, 0); /* V is the guest's again */
    put_mov_rr(&r->p, RDX, V);
    assert_borrowing_accepted(r);
}

static void borrowed_without_a_check(void **state)
{
    struct rig *r = *state;

    begin_borrowing(r);
    put_checked_into(r, U, false, 8);
    put_load_word(&r->p, 8, RDX, V, 0);
    assert_borrowing_refused(r, NO_FLAW, "an access beyond its check");
    begin_borrowing(r);
    put_checked_into(r, U, false, 8);
    put_mov_rr(&r->p, U, RDX);
    put_load_word(&r->p, 8, RDX, U, 0);
    assert_borrowing_refused(r, NO_FLAW, "an access without a check");
    begin_borrowing(r); /* an address as it is before its check */
    put_mov_rr(&r->p, S1, RAX);
    put_mov_rr(&r->p, U, S1);
    put_load_word(&r->p, 8, RDX, U, 0);
    put_checked_into(r, V, false, 8);
    assert_borrowing_refused(r, NO_FLAW, "an access without a check");
    begin_borrowing(r); /* a part of a register is no address */
    put_check_of(r, TLB_KERNEL, false, 8);
    put_op_rr(&r->p, false, OP_MOV, U, S1);
    assert_borrowing_refused(r, NO_FLAW, "a host address is read");
}

static void borrowed_beyond_its_check(void **state)
{
    static const s32 offsets[] = {1, 8, -1, 1 << 20};
    struct rig *r = *state;

    for (unsigned n = 0; n < ARRAY_SIZE(offsets); n++) {
        begin_borrowing(r);
        put_checked_into(r, U, false, 8);
        put_load_word(&r->p, 8, RDX, U, offsets[n]);
        assert_borrowing_refused(r, NO_FLAW, "an access beyond its check");
    }
}

static void store_by_borrowed_checked_for_loads(void **state)
{
    struct rig *r = *state;

    begin_borrowing(r);
    put_checked_into(r, U, false, 8);
    put_store_word(&r->p, 8, U, 0, RDX);
    assert_borrowing_refused(r, NO_FLAW, "a store checked for loads");
}

static void borrowed_with_an_index(void **state)
{
    struct rig *r = *state;

    begin_borrowing(r);
    put_checked_into(r, U, false, 8);
    PUT(r, "\x48\x8b\x14\x03"); /* mov rdx, [rbx + rax] */
    assert_borrowing_refused(r, NO_FLAW, "an address that isn't S1's");
}

static void borrowed_address_read(void **state)
{
    static const struct {
        const char *bytes;
        u8 n;
    } cases[] = {
        {"\x48\x89\xda", 3},         /* mov rdx, rbx */
        {"\x88\xfa", 2},             /* mov dl, bh */
        {"\xb3\x01", 2},             /* mov bl, 1 */
        {"\x48\x8d\x53\x01", 4},     /* lea rdx, [rbx + 1] */
        {"\x48\x8d\x14\x18", 4},     /* lea rdx, [rax + rbx] */
        {"\x48\x89\x1b", 3},         /* mov [rbx], rbx */
        {"\x48\x0f\x44\xd8", 4},     /* cmove rbx, rax */
        {"\x48\x01\xc3", 3},         /* add rbx, rax */
        {"\x66\x48\x0f\x6e\xc3", 5}, /* movq xmm0, rbx */
        {"\x48\x0f\xc7\x0b", 4},     /* cmpxchg16b [rbx], whose operands RBX and RCX are */
        {"\x49\x87\xde", 3},         /* xchg r14, rbx */
    };
    struct rig *r = *state;

    for (unsigned n = 0; n < ARRAY_SIZE(cases); n++) {
        begin_borrowing(r);
        put_checked_into(r, U, true, 16);
        put_bytes(r, cases[n].bytes, cases[n].n);
        assert_borrowing_refused(r, NO_FLAW, "a host address is read");
    }
}

/* What the block before left in it is no more the guest's than one's own address. */
static void what_a_native_entry_left(void **state)
{
    struct rig *r = *state;

    begin_borrowing(r);
    put_mov_rr(&r->p, RDX, V);
    put_checked_into(r, U, false, 8);
    assert_borrowing_refused(r, NO_FLAW, "a host address is read");
}

static void borrowed_address_to_a_field(void **state)
{
    const u32 fields[] = {GS_GPR(U), GS_OFFSET(bt_shared.temp), GS_OFFSET(bt_shared.linear)};
    struct rig *r = *state;

    for (unsigned n = 0; n < ARRAY_SIZE(fields); n++) {
        begin_borrowing(r);
        put_checked_into(r, U, false, 8);
        put_store_gs(&r->p, fields[n], U);
        assert_borrowing_refused(r, NO_FLAW, "a host address is read");
    }
}

/* What is kept is for one register alone, and whole. */
static void kept_addresses_of_others(void **state)
{
    struct rig *r = *state;

    for (unsigned n = 0; n < 6; n++) {
        begin_borrowing(r);
        put_checked_into(r, U, false, 8);
        if (n == 0)
            put_load_gs(&r->p, RDX, KEPT(0));
        else if (n == 1)
            put_load_gs(&r->p, V, KEPT(0));
        else if (n == 2)
            put_store_gs(&r->p, KEPT(1), U);
        else if (n == 3)
            put_store_gs(&r->p, KEPT(0), RDX);
        else if (n == 4)
            put_op_gs(&r->p, true, OP_ADD, U, KEPT(0));
        else
            put_load_gs(&r->p, U, KEPT(0) + 4);
        assert_borrowing_refused(r, NO_FLAW, "a kept address of another's");
    }
    begin_borrowing(r);
    put_checked_into(r, U, false, 8);
    put_mov_rr(&r->p, U, RDX);
    put_store_gs(&r->p, KEPT(0), U);
    assert_borrowing_refused(r, NO_FLAW, "a guest's value kept as an address");
}

/* The way back from C must have what the way there knew: else U isn't to be used behind the check. */
static void resume_with_another_state(void **state)
{
    static const struct {
        enum flaw flaw;
        const char *what;
    } cases[] = {
        {KEEPS_NOTHING, "an access beyond its check"},
        {NO_SITE, "a way out without its site"},
        {ANOTHERS_SITE, "a way out without its site"},
        {LEAVES_BORROWED, "a host address goes out"},
        {FAULT_STRAIGHT_OUT, "a host address goes out"},
    };
    struct rig *r = *state;

    for (unsigned n = 0; n < ARRAY_SIZE(cases); n++) {
        begin_borrowing(r);
        put_two_checks(r);
        put_load_word(&r->p, 8, RDX, U, 8);
        assert_borrowing_refused(r, cases[n].flaw, cases[n].what);
    }
    /* It begins anew behind the check. */
    begin_borrowing(r);
    put_two_checks(r);
    r->restart = offset_of(r, r->p);
    put_load_word(&r->p, 8, RDX, V, 0);
    assert_borrowing_refused(r, NO_FLAW, "an access beyond its check");
}

/* An exit that is linked to a block that borrows the same, or by a bridge to any other. */
static void exits_with_borrowed_addresses(void **state)
{
    static const struct {
        u8 perm[BT_PERM];
        enum flaw flaw;
        const char *what; /* NULL: accepted */
    } cases[] = {
        {{NO_REG, NO_REG, U, V}, NO_FLAW, NULL},
        {{NO_REG, NO_REG, U, V}, LATE_BRIDGE, "a host address goes out"},
        {{NO_REG, NO_REG, V, U}, NO_FLAW, "a host address goes out"},
        {{NO_REG, NO_REG, U, NO_REG}, NO_FLAW, "a host address goes out"},
        {{NO_REG, NO_REG, NO_REG, NO_REG}, NO_FLAW, "a host address goes out"},
    };
    struct rig *r = *state;

    for (unsigned n = 0; n < ARRAY_SIZE(cases); n++) {
        begin_borrowing(r);
        put_two_checks(r);
        memcpy(r->exit.perm, cases[n].perm, BT_PERM);
        r->block.nexits = 1;
        r->exit.at = offset_of(r, put_jcc(&r->p, CC_E));
        if (cases[n].what)
            assert_borrowing_refused(r, cases[n].flaw, cases[n].what);
        else
            assert_borrowing_accepted(r);
    }
}

/* LOOP would move what it counts with. */
static void loop_of_a_borrowed_register(void **state)
{
    static const char *const cases[] = {"\xe2\x00", "\xe3\x00"}; /* loop, jrcxz */
    struct rig *r = *state;

    for (unsigned n = 0; n < ARRAY_SIZE(cases); n++) {
        begin_borrowing(r);
        put_checked_into(r, V, false, 8);
        put_bytes(r, cases[n], 2);
        put_load_word(&r->p, 8, RDX, V, 0);
        assert_borrowing_refused(r, NO_FLAW, "a branch of another kind");
    }
}

/* What an index is made of is no host address. */
static void index_of_a_host_address(void **state)
{
    struct rig *r = *state;

    begin_borrowing(r);
    put_checked_into(r, U, false, 8);
    put_mov_rr(&r->p, S2, U);
    assert_borrowing_refused(r, NO_FLAW, "a host address is read");
    begin_borrowing(r);
    put_check_of(r, TLB_KERNEL, false, 8);
    put_mov_rr(&r->p, S2, S1);
    assert_borrowing_refused(r, NO_FLAW, "a host address is read");
}

/* BTS of memory by a register reaches 2^60 bytes to both sides. */
static void bit_of_any_number(void **state)
{
    struct rig *r = *state;

    for (unsigned n = 0; n < 5; n++) {
        r->p = r->bt->writable + HOT;
        put_check_of(r, TLB_KERNEL, true, 8);
        if (n < 3)
            put_op_ri(&r->p, false, EXT_AND, S2, n == 2 ? 127 : 63);
        put_store_gs(&r->p, GS_OFFSET(bt_shared.temp), n == 3 ? RDX : S2);
        put_mov_rr(&r->p, S2, RAX);
        if (n == 1)
            put_store_gs(&r->p, GS_OFFSET(bt_shared.temp), RAX);
        put_load_gs(&r->p, S2, GS_OFFSET(bt_shared.temp));
        if (n == 4) {
            put_op_ri(&r->p, false, EXT_AND, S2, 63);
            PUT(r, "\x49\x0f\xab\x06"); /* bts [r14], rax */
        } else {
            PUT(r, "\x4d\x0f\xab\x3e"); /* bts [r14], r15 */
        }
        if (n)
            assert_refused(r, "a bit outside of its operand");
        else
            assert_accepted(r);
    }
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
        TEST(prefetch_of_any_field),
        TEST(jump_by_any_number),
        TEST(jump_by_a_field),
        TEST(branches_elsewhere),
        TEST(end_run_over),
        TEST(check_on_one_way),
        TEST(borrowed_addresses_pass),
        TEST(borrowed_without_a_check),
        TEST(borrowed_beyond_its_check),
        TEST(store_by_borrowed_checked_for_loads),
        TEST(borrowed_with_an_index),
        TEST(borrowed_address_read),
        TEST(what_a_native_entry_left),
        TEST(borrowed_address_to_a_field),
        TEST(kept_addresses_of_others),
        TEST(resume_with_another_state),
        TEST(exits_with_borrowed_addresses),
        TEST(loop_of_a_borrowed_register),
        TEST(index_of_a_host_address),
        TEST(bit_of_any_number),
        TEST(instructions_that_code_must_not_have),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
