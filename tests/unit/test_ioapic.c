/* The IOAPIC: registers, edge and level delivery, EOI, and its state. */
#include "device/ioapic.h"
#include "device_rig.h"

#include <setjmp.h>
#include <stdarg.h>

#include <cmocka.h>

#define BASE 0xfec00000ULL
#define MASKED 0x10000U
#define LEVEL 0x8000U
#define REMOTE_IRR 0x4000U

struct fixture {
    struct rig *rig;
    struct ioapic *io;
};

static struct ioapic *make(struct rig *r, gpa_t base)
{
    struct ioapic_config cfg = {.base = base, .msi = rig_msi(r)};

    return ioapic_create(&r->env, &cfg, &r->err);
}

static int setup(void **state)
{
    struct fixture *f = calloc(1, sizeof(*f));

    f->rig = rig_create();
    f->io = make(f->rig, BASE);
    *state = f;
    return f->io ? 0 : -1;
}

static int teardown(void **state)
{
    struct fixture *f = *state;

    ioapic_device(f->io)->ops->destroy(ioapic_device(f->io));
    rig_destroy(f->rig);
    free(f);
    return 0;
}

static void write_reg(struct fixture *f, u8 reg, u32 value)
{
    io_bus_write(f->rig->env.mmio, BASE, reg, 4);
    io_bus_write(f->rig->env.mmio, BASE + 0x10, value, 4);
}

static u32 read_reg(struct fixture *f, u8 reg)
{
    io_bus_write(f->rig->env.mmio, BASE, reg, 4);
    return io_bus_read(f->rig->env.mmio, BASE + 0x10, 4);
}

static void program(struct fixture *f, unsigned pin, u32 high, u32 low)
{
    write_reg(f, 0x11 + 2 * pin, high);
    write_reg(f, 0x10 + 2 * pin, low);
}

static void identifies_itself(void **state)
{
    struct fixture *f = *state;

    assert_int_equal(read_reg(f, 1), 0x170020);
    assert_int_equal(read_reg(f, 0x10), MASKED);
    write_reg(f, 0, 0xffffffff);
    assert_int_equal(read_reg(f, 0), 0x0f000000);
    assert_int_equal(read_reg(f, 0x40), 0);
    program(f, 23, 0xffffffff, 0xffffffff);
    assert_int_equal(read_reg(f, 0x3f), 0xffff0000);
    assert_int_equal(read_reg(f, 0x3e), 0x1ffff & ~0x5000);
}

static void edge_sends_once_and_is_lost_when_masked(void **state)
{
    struct fixture *f = *state;

    program(f, 4, 0x02000000, MASKED | 0x34);
    ioapic_set_irq(f->io, 4, true);
    program(f, 4, 0x02000000, 0x34);
    assert_int_equal(f->rig->messages, 0);
    ioapic_set_irq(f->io, 4, false);
    ioapic_set_irq(f->io, 4, true);
    ioapic_set_irq(f->io, 4, true);
    assert_int_equal(f->rig->messages, 1);
    assert_int_equal(f->rig->msi_address, 0xfee02000);
    assert_int_equal(f->rig->msi_data, 0x4034);
}

static void level_is_sent_again_after_eoi(void **state)
{
    struct fixture *f = *state;

    program(f, 9, 0x01000000, LEVEL | 0x51);
    ioapic_set_irq(f->io, 9, true);
    ioapic_set_irq(f->io, 9, true);
    assert_int_equal(f->rig->messages, 1);
    assert_int_equal(f->rig->msi_data, 0xc051);
    assert_int_equal(read_reg(f, 0x22), LEVEL | REMOTE_IRR | 0x51);
    ioapic_eoi(f->io, 0x50);
    assert_int_equal(f->rig->messages, 1);
    ioapic_eoi(f->io, 0x51);
    assert_int_equal(f->rig->messages, 2);
    ioapic_set_irq(f->io, 9, false);
    io_bus_write(f->rig->env.mmio, BASE + 0x40, 0x51, 4);
    assert_int_equal(f->rig->messages, 2);
    assert_int_equal(read_reg(f, 0x22), LEVEL | 0x51);
}

static void level_waits_for_its_mask(void **state)
{
    struct fixture *f = *state;

    program(f, 9, 0, LEVEL | MASKED | 0x51);
    ioapic_set_irq(f->io, 9, true);
    assert_int_equal(f->rig->messages, 0);
    program(f, 9, 0, LEVEL | 0x51);
    assert_int_equal(f->rig->messages, 1);
}

static void switching_to_edge_clears_remote_irr(void **state)
{
    struct fixture *f = *state;

    program(f, 9, 0, LEVEL | 0x51);
    ioapic_set_irq(f->io, 9, true);
    write_reg(f, 0x22, MASKED | 0x51);
    write_reg(f, 0x22, MASKED | LEVEL | 0x51);
    assert_int_equal(read_reg(f, 0x22), MASKED | LEVEL | 0x51);
}

static void composes_every_kind_of_message(void **state)
{
    struct fixture *f = *state;

    program(f, 1, 0xa5a50000, 0x0900 | 0x60); /* logical, lowest priority, extended ID */
    ioapic_set_irq(f->io, 1, true);
    assert_int_equal(f->rig->msi_address, 0xfeea5a5c);
    assert_int_equal(f->rig->msi_data, 0x4160);
    program(f, 2, 0, LEVEL | 0x400); /* NMI: an edge, whatever the trigger bit says */
    ioapic_set_irq(f->io, 2, true);
    assert_int_equal(f->rig->msi_data, 0x4400);
    assert_int_equal(read_reg(f, 0x14), LEVEL | 0x400);
    program(f, 0, 0, 0x700); /* ExtINT */
    ioapic_set_irq(f->io, 0, true);
    assert_int_equal(f->rig->msi_data, 0x4700);
    ioapic_set_irq(f->io, 24, true);
    assert_int_equal(f->rig->messages, 3);
}

static void state_survives_the_round_trip(void **state)
{
    struct fixture *f = *state;
    u64 seed = 0x10a91c;
    char buf[128];

    for (unsigned i = 0; i < 2000; i++) {
        u64 r = rig_random(&seed);
        write_reg(f, r % 0x44, r >> 8);
        ioapic_set_irq(f->io, r >> 40 & 31, r >> 48 & 1);
        if (r >> 50 & 1)
            ioapic_eoi(f->io, r >> 52);
    }
    struct ioapic *fresh = make(f->rig, BASE + 0x1000);
    assert_non_null(fresh);
    const char *wrong =
        rig_round_trip(f->rig, ioapic_device(f->io), ioapic_device(fresh), buf, sizeof(buf));
    if (wrong)
        fail_msg("%s", wrong);
    ioapic_device(fresh)->ops->destroy(ioapic_device(fresh));
}

#define TEST(fn) cmocka_unit_test_setup_teardown(fn, setup, teardown)

int main(void)
{
    const struct CMUnitTest tests[] = {
        TEST(identifies_itself),
        TEST(edge_sends_once_and_is_lost_when_masked),
        TEST(level_is_sent_again_after_eoi),
        TEST(level_waits_for_its_mask),
        TEST(switching_to_edge_clears_remote_irr),
        TEST(composes_every_kind_of_message),
        TEST(state_survives_the_round_trip),
    };
    return cmocka_run_group_tests_name("ioapic", tests, NULL, NULL);
}
