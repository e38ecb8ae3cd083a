/*
 * The local APIC: priorities, every way to send and to be addressed, the timer's three modes, the
 * transitions of IA32_APIC_BASE, and what a message from another thread may not break.
 */
#include "engine/soft/lapic.h"

#include <errno.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#define CPUS 4
#define MSI 0xfee00000ull

struct rig {
    struct lapic_bus *bus;
    struct lapic *apic[CPUS];
    struct cpu_end {
        struct rig *rig;
        atomic_uint events[LAPIC_EVENT_TIMER + 1];
        u8 sipi_vector;
        u8 eoi_vector;
        unsigned eois;
        bool ended; /* by the guest, in memory */
        unsigned asked;
    } end[CPUS];
    u64 now;
    atomic_uint senders; /* threads that still send */
};

static void on_wake(void *opaque, enum lapic_event event, u8 vector)
{
    struct cpu_end *e = opaque;

    e->events[event]++;
    if (event == LAPIC_EVENT_SIPI)
        e->sipi_vector = vector;
}

static void on_eoi(void *opaque, u8 vector)
{
    struct cpu_end *e = opaque;

    e->eoi_vector = vector;
    e->eois++;
}

static bool on_take_eoi(void *opaque)
{
    struct cpu_end *e = opaque;

    e->asked++;
    return e->ended;
}

static u64 get_now(void *opaque)
{
    return ((struct cpu_end *)opaque)->rig->now;
}

static const struct lapic_ops ops = {
    .wake = on_wake, .eoi_broadcast = on_eoi, .take_eoi = on_take_eoi, .now = get_now};

static int rig_up(void **state)
{
    struct rig *r = calloc(1, sizeof(*r));

    r->bus = lapic_bus_create();
    r->now = 1000;
    for (unsigned i = 0; i < CPUS; i++) {
        struct lapic_config config = {
            .index = i,
            .id = (u8)i,
            .phys_bits = 40,
            .tsc_hz = 2000000000,
            .x2apic = true,
            .tsc_deadline = true,
            .ops = &ops,
            .opaque = &r->end[i],
        };

        r->end[i].rig = r;
        r->apic[i] = lapic_create(r->bus, &config);
        lapic_mmio_write(r->apic[i], 0xf0, 0x1ff, 4);
    }
    *state = r;
    return 0;
}

static int rig_down(void **state)
{
    struct rig *r = *state;

    for (unsigned i = 0; i < CPUS; i++)
        lapic_destroy(r->apic[i]);
    lapic_bus_destroy(r->bus);
    free(r);
    return 0;
}

static u32 rd(struct lapic *l, u32 offset)
{
    return (u32)lapic_mmio_read(l, offset, 4);
}

static void wr(struct lapic *l, u32 offset, u32 value)
{
    lapic_mmio_write(l, offset, value, 4);
}

static void ipi(struct lapic *l, u32 dest, u32 low)
{
    wr(l, 0x310, dest << 24);
    wr(l, 0x300, low);
}

static void to_x2apic(struct rig *r)
{
    for (unsigned i = 0; i < CPUS; i++)
        assert_true(lapic_set_base(r->apic[i], lapic_base(r->apic[i]) | APIC_BASE_X2APIC));
}

/* Which APICs have something deliverable, one bit each; all of it is taken and ended. */
static unsigned take_all(struct rig *r)
{
    unsigned got = 0;

    for (unsigned i = 0; i < CPUS; i++) {
        while (lapic_has_interrupt(r->apic[i])) {
            lapic_ack(r->apic[i]);
            got |= 1u << i;
            if (lapic_claims(r->apic[i], MSI))
                wr(r->apic[i], 0xb0, 0);
            else
                assert_true(lapic_msr_write(r->apic[i], 0x80b, 0));
        }
    }
    return got;
}

static void reset_values(void **state)
{
    struct rig *r = *state;
    struct lapic *l = r->apic[2];

    lapic_reset(l);
    assert_int_equal(lapic_base(l), 0xfee00800);
    assert_int_equal(lapic_base(r->apic[0]), 0xfee00900);
    assert_int_equal(rd(l, 0x20), 2u << 24);
    assert_int_equal(rd(l, 0x30), 0x50014);
    assert_int_equal(rd(l, 0xe0), 0xffffffff);
    assert_int_equal(rd(l, 0xf0), 0xff);
    for (u32 reg = 0x320; reg <= 0x370; reg += 0x10)
        assert_int_equal(rd(l, reg), 0x10000);
    /* Disabled by software: masks can't be cleared, fixed interrupts are not accepted. */
    wr(l, 0x350, 0x700);
    assert_int_equal(rd(l, 0x350), 0x10700);
    lapic_bus_deliver(r->bus, MSI | 2 << 12, 0x40);
    assert_false(lapic_has_interrupt(l));
}

static void priorities_nest(void **state)
{
    struct rig *r = *state;
    struct lapic *l = r->apic[0];

    lapic_bus_deliver(r->bus, MSI, 0x41);
    assert_int_equal(r->end[0].events[LAPIC_EVENT_INTERRUPT], 1);
    assert_int_equal(lapic_ack(l), 0x41);
    assert_int_equal(rd(l, 0xa0), 0x40);
    lapic_bus_deliver(r->bus, MSI, 0x4f); /* same class: waits */
    assert_false(lapic_has_interrupt(l));
    lapic_bus_deliver(r->bus, MSI, 0x52);
    assert_int_equal(lapic_deliverable(l), 0x52);
    assert_int_equal(lapic_ack(l), 0x52);
    assert_int_equal(rd(l, 0x120), 1u << (0x52 - 0x40) | 1u << 1);
    wr(l, 0xb0, 0);
    assert_false(lapic_has_interrupt(l));
    wr(l, 0xb0, 0);
    assert_int_equal(lapic_ack(l), 0x4f);
    wr(l, 0xb0, 0);
    assert_int_equal(rd(l, 0xa0), 0);

    lapic_set_cr8(l, 6);
    assert_int_equal(rd(l, 0x80), 0x60);
    lapic_bus_deliver(r->bus, MSI, 0x6f);
    assert_false(lapic_has_interrupt(l));
    assert_int_equal(lapic_ack(l), 0xff); /* spurious */
    assert_int_equal(rd(l, 0x100 + 0x70), 0);
    wr(l, 0x80, 0x5f);
    assert_int_equal(lapic_cr8(l), 5);
    assert_int_equal(lapic_ack(l), 0x6f);
}

static void level_interrupts_broadcast_their_end(void **state)
{
    struct rig *r = *state;

    lapic_bus_deliver(r->bus, MSI, 0xc000 | 0x33); /* level, assert */
    assert_int_equal(rd(r->apic[0], 0x190), 1u << 19);
    lapic_ack(r->apic[0]);
    wr(r->apic[0], 0xb0, 0);
    assert_int_equal(r->end[0].eois, 1);
    assert_int_equal(r->end[0].eoi_vector, 0x33);
    lapic_bus_deliver(r->bus, MSI, 0x33); /* the same vector, edge */
    lapic_ack(r->apic[0]);
    wr(r->apic[0], 0xb0, 0);
    assert_int_equal(r->end[0].eois, 1);
    lapic_bus_deliver(r->bus, MSI, 0x8000 | 0x33); /* level, de-assert: nothing */
    assert_false(lapic_has_interrupt(r->apic[0]));
}

static void destinations(void **state)
{
    struct rig *r = *state;

    ipi(r->apic[0], 2, 0x50);
    assert_int_equal(take_all(r), 0x4);
    ipi(r->apic[0], 0xff, 0x50);
    assert_int_equal(take_all(r), 0xf);
    ipi(r->apic[0], 63, 0x50);
    assert_int_equal(take_all(r), 0);
    ipi(r->apic[1], 0, 1 << 18 | 0x50);
    assert_int_equal(take_all(r), 0x2);
    ipi(r->apic[1], 0, 2 << 18 | 0x50);
    assert_int_equal(take_all(r), 0xf);
    ipi(r->apic[1], 0, 3 << 18 | 0x50);
    assert_int_equal(take_all(r), 0xd);

    for (unsigned i = 0; i < CPUS; i++) /* flat logical */
        wr(r->apic[i], 0xd0, 1u << (24 + i));
    ipi(r->apic[0], 0xa, 1 << 11 | 0x50);
    assert_int_equal(take_all(r), 0xa);
    lapic_bus_deliver(r->bus, MSI | 0x5 << 12 | 4, 0x50);
    assert_int_equal(take_all(r), 0x5);

    for (unsigned i = 0; i < CPUS; i++) { /* clusters of two */
        wr(r->apic[i], 0xe0, 0x0fffffff);
        wr(r->apic[i], 0xd0, (i / 2) << 28 | 1u << (24 + i % 2));
    }
    ipi(r->apic[0], 0x13, 1 << 11 | 0x50);
    assert_int_equal(take_all(r), 0xc);
    ipi(r->apic[0], 0xf1, 1 << 11 | 0x50);
    assert_int_equal(take_all(r), 0x5);
}

static void lowest_priority_takes_the_idlest(void **state)
{
    struct rig *r = *state;

    for (unsigned i = 0; i < CPUS; i++) {
        wr(r->apic[i], 0xd0, 1u << (24 + i));
        wr(r->apic[i], 0x80, 0x40 - 0x10 * (i == 2));
    }
    lapic_bus_deliver(r->bus, MSI | 0xf << 12 | 4, 0x150);
    assert_int_equal(take_all(r), 0x4);
    wr(r->apic[2], 0xf0, 0xff); /* software-disabled: not a candidate */
    lapic_bus_deliver(r->bus, MSI | 0xf << 12 | 4, 0x150);
    assert_int_equal(take_all(r), 0x1);
}

static void startup_messages(void **state)
{
    struct rig *r = *state;

    ipi(r->apic[0], 1, 0xc500); /* INIT, level, assert */
    ipi(r->apic[0], 1, 0x8500); /* de-assert: nothing */
    ipi(r->apic[0], 1, 0x69a);
    ipi(r->apic[0], 3, 0x400);
    assert_int_equal(r->end[1].events[LAPIC_EVENT_INIT], 1);
    assert_int_equal(r->end[1].events[LAPIC_EVENT_SIPI], 1);
    assert_int_equal(r->end[1].sipi_vector, 0x9a);
    assert_int_equal(r->end[3].events[LAPIC_EVENT_NMI], 1);
    ipi(r->apic[0], 0, 3 << 18 | 0x4500);
    assert_int_equal(r->end[0].events[LAPIC_EVENT_INIT], 0);
    assert_int_equal(r->end[2].events[LAPIC_EVENT_INIT], 1);

    wr(r->apic[1], 0x80, 0x30);
    lapic_init(r->apic[1]);
    assert_int_equal(rd(r->apic[1], 0x80), 0);
    assert_int_equal(rd(r->apic[1], 0x20), 1u << 24);
}

static void errors_are_latched_and_told(void **state)
{
    struct rig *r = *state;
    struct lapic *l = r->apic[0];

    wr(l, 0x370, 0x77);
    ipi(l, 1, 0x0f); /* illegal vector */
    assert_int_equal(rd(l, 0x280), 0);
    wr(l, 0x280, 0);
    assert_int_equal(rd(l, 0x280), 0x20);
    assert_int_equal(lapic_ack(l), 0x77);
    wr(l, 0xb0, 0);
    lapic_bus_deliver(r->bus, MSI, 0x05);
    rd(l, 0x3f0);
    wr(l, 0x280, 0);
    assert_int_equal(rd(l, 0x280), 0xc0);
    wr(l, 0x280, 0);
    assert_int_equal(rd(l, 0x280), 0);
    wr(l, 0x370, 0x03); /* an error interrupt that is an error itself */
    lapic_bus_deliver(r->bus, MSI, 0x05);
    take_all(r);
}

static void timer_one_shot_and_periodic(void **state)
{
    struct rig *r = *state;
    struct lapic *l = r->apic[0];

    wr(l, 0x320, 0x61);
    wr(l, 0x3e0, 0x3); /* by 16 */
    wr(l, 0x380, 10000);
    assert_int_equal(lapic_next_deadline(l), 161000);
    assert_true(r->end[0].events[LAPIC_EVENT_TIMER] > 0);
    r->now = 81000;
    assert_int_equal(rd(l, 0x390), 5000);
    lapic_timer_expire(l, r->now);
    assert_false(lapic_has_interrupt(l));
    r->now = 161000;
    lapic_timer_expire(l, r->now);
    assert_int_equal(lapic_ack(l), 0x61);
    wr(l, 0xb0, 0);
    assert_int_equal(rd(l, 0x390), 0);
    assert_true(lapic_next_deadline(l) == UINT64_MAX);

    wr(l, 0x320, 0x20061);
    wr(l, 0x3e0, 0xb); /* by 1 */
    wr(l, 0x380, 100000);
    assert_int_equal(lapic_next_deadline(l), 261000);
    r->now = 475000; /* two were missed */
    assert_int_equal(rd(l, 0x390), 86000);
    lapic_timer_expire(l, r->now);
    assert_int_equal(lapic_next_deadline(l), 561000);
    assert_int_equal(take_all(r), 1);
    wr(l, 0x320, 0x30061); /* masked: it counts on, and says nothing */
    lapic_timer_expire(l, 600000);
    assert_int_equal(take_all(r), 0);
    assert_int_equal(lapic_next_deadline(l), 661000);
    wr(l, 0x380, 0);
    assert_true(lapic_next_deadline(l) == UINT64_MAX);

    wr(l, 0x380, 1); /* a period of 1 ns must not hang us */
    r->now = 700000;
    lapic_timer_expire(l, r->now);
    assert_true(lapic_next_deadline(l) >= r->now + 1000);
}

static void timer_tsc_deadline(void **state)
{
    struct rig *r = *state;
    struct lapic *l = r->apic[0];

    lapic_set_tsc_deadline(l, 5000); /* not in that mode */
    assert_int_equal(lapic_tsc_deadline(l), 0);
    wr(l, 0x320, 0x40062);
    lapic_set_tsc_deadline(l, 50000);
    assert_int_equal(lapic_next_deadline(l), 25000);
    lapic_set_tsc_offset(l, 10000);
    assert_int_equal(lapic_next_deadline(l), 20000);
    wr(l, 0x380, 77); /* ignored in this mode */
    assert_int_equal(lapic_next_deadline(l), 20000);
    assert_int_equal(rd(l, 0x390), 0);
    lapic_timer_expire(l, 20000);
    assert_int_equal(lapic_tsc_deadline(l), 0);
    assert_int_equal(take_all(r), 1);
    lapic_set_tsc_deadline(l, 9000); /* before the VM began */
    assert_int_equal(lapic_next_deadline(l), 0);
    lapic_set_tsc_deadline(l, 0);
    assert_true(lapic_next_deadline(l) == UINT64_MAX);
    lapic_set_tsc_deadline(l, INT64_MAX);
    lapic_next_deadline(l);
    wr(l, 0x320, 0x62);
    assert_true(lapic_next_deadline(l) == UINT64_MAX);
}

static void base_transitions(void **state)
{
    struct rig *r = *state;
    struct lapic *l = r->apic[0];
    const u64 off = 0xfee00100, xapic = 0xfee00900, x2apic = 0xfee00d00, invalid = 0xfee00500;
    u64 v;

    assert_false(lapic_set_base(l, xapic | 1));
    assert_false(lapic_set_base(l, xapic | 1ull << 40));
    assert_false(lapic_set_base(l, invalid));
    assert_true(lapic_set_base(l, 0xfec01900));
    assert_true(lapic_claims(l, 0xfec01ff0));
    assert_false(lapic_claims(l, 0xfee00000));
    assert_true(lapic_set_base(l, xapic));
    assert_false(lapic_msr_read(l, 0x802, &v));
    assert_true(lapic_set_base(l, x2apic));
    assert_false(lapic_claims(l, 0xfee00000));
    assert_true(lapic_msr_read(l, 0x802, &v));
    assert_int_equal(v, 0);
    assert_false(lapic_set_base(l, xapic));
    assert_false(lapic_set_base(l, invalid));
    assert_true(lapic_set_base(l, off));
    assert_false(lapic_claims(l, 0xfee00000));
    assert_false(lapic_set_base(l, x2apic));
    assert_true(lapic_set_base(l, xapic));
    assert_int_equal(rd(l, 0xf0), 0xff); /* as after RESET */
}

static void x2apic_registers(void **state)
{
    struct rig *r = *state;
    struct lapic *l = r->apic[3];
    u64 v;

    to_x2apic(r);
    assert_true(lapic_msr_read(l, 0x802, &v));
    assert_int_equal(v, 3);
    assert_true(lapic_msr_read(l, 0x80d, &v));
    assert_int_equal(v, 8);
    assert_false(lapic_msr_read(l, 0x80e, &v)); /* no DFR */
    assert_false(lapic_msr_read(l, 0x80b, &v)); /* EOI is write-only */
    assert_false(lapic_msr_read(l, 0x831, &v)); /* ICR is one register */
    assert_false(lapic_msr_read(l, 0x8ff, &v));
    assert_false(lapic_msr_write(l, 0x802, 3));
    assert_false(lapic_msr_write(l, 0x80b, 1));
    assert_false(lapic_msr_write(l, 0x808, 0x100));
    assert_false(lapic_msr_write(l, 0x828, 1));
    assert_false(lapic_msr_write(l, 0x832, 1ull << 20));
    assert_false(lapic_msr_write(l, 0x80f, 0x1000));
    assert_true(lapic_msr_write(l, 0x832, 0x40030));
    assert_true(lapic_msr_write(l, 0x83f, 0x90));
    assert_int_equal(take_all(r), 0x8);
    assert_true(lapic_msr_write(l, 0x830, 2ull << 32 | 0x55));
    assert_int_equal(take_all(r), 0x4);
    assert_true(lapic_msr_read(l, 0x830, &v));
    assert_int_equal(v, 2ull << 32 | 0x55);
    assert_true(lapic_msr_write(l, 0x830, 0xffffffffull << 32 | 0x55));
    assert_int_equal(take_all(r), 0xf);
    assert_true(lapic_msr_write(l, 0x830, 0x6ull << 32 | 0x855)); /* cluster 0, members 1 and 2 */
    assert_int_equal(take_all(r), 0x6);
    assert_true(lapic_msr_write(l, 0x830, 0x10006ull << 32 | 0x855)); /* another cluster */
    assert_int_equal(take_all(r), 0);
    lapic_bus_deliver(r->bus, MSI | 0x9 << 12 | 4, 0x55);
    assert_int_equal(take_all(r), 0x9);
}

static void pic_line_comes_through_lint0(void **state)
{
    struct rig *r = *state;
    struct lapic *l = r->apic[0];

    lapic_set_lint0(l, true);
    assert_false(lapic_has_extint(l)); /* masked */
    wr(l, 0x350, 0x700);
    assert_true(lapic_has_extint(l));
    assert_int_equal(r->end[0].events[LAPIC_EVENT_EXTINT], 1);
    lapic_set_lint0(l, false);
    assert_false(lapic_has_extint(l));
    wr(l, 0x350, 0x400); /* NMI, by the edge */
    lapic_set_lint0(l, true);
    lapic_set_lint0(l, true);
    assert_int_equal(r->end[0].events[LAPIC_EVENT_NMI], 1);
    assert_false(lapic_has_extint(l));
    lapic_set_base(l, 0xfee00100); /* without an APIC the line is the processor's INTR */
    assert_true(lapic_has_extint(l));
}

static void extint_messages_wait_to_be_taken(void **state)
{
    struct rig *r = *state;
    struct lapic_state s;
    struct error err;

    lapic_bus_deliver(r->bus, MSI | 2 << 12, 0x700);
    assert_false(lapic_has_extint(r->apic[0]));
    assert_true(lapic_has_extint(r->apic[2])); /* whatever LINT0 says */
    assert_int_equal(r->end[2].events[LAPIC_EVENT_EXTINT], 1);
    lapic_save(r->apic[2], &s);
    lapic_ack_extint(r->apic[2]);
    assert_false(lapic_has_extint(r->apic[2]));
    assert_int_equal(lapic_load(r->apic[2], &s, &err), 0);
    assert_true(lapic_has_extint(r->apic[2]));
    s.extint = 2;
    assert_int_equal(lapic_load(r->apic[2], &s, &err), -EINVAL);
    ipi(r->apic[0], 3, 0x700); /* no mode of an IPI */
    assert_false(lapic_has_extint(r->apic[3]));
}

/* Takes the vector that must be there, and leaves its end to the guest's memory if that may be. */
static bool take_deferred(struct lapic *l, u8 vector)
{
    assert_int_equal(lapic_ack(l), vector);
    return lapic_defer_eoi(l);
}

static void deferred_ends_of_interrupts(void **state)
{
    struct rig *r = *state;
    struct lapic *l = r->apic[0];
    struct cpu_end *e = &r->end[0];

    ipi(r->apic[1], 0, 0x50);
    assert_true(take_deferred(l, 0x50));
    e->ended = true;
    e->events[LAPIC_EVENT_INTERRUPT] = 0;
    ipi(r->apic[1], 0, 0x51); /* no higher priority: told all the same */
    assert_int_equal(e->events[LAPIC_EVENT_INTERRUPT], 1);
    assert_false(lapic_has_interrupt(l));
    lapic_sync_eoi(l);
    assert_int_equal(lapic_deliverable(l), 0x51);
    assert_int_equal(e->asked, 1);
    lapic_sync_eoi(l); /* asked once */
    assert_int_equal(e->asked, 1);

    assert_true(take_deferred(l, 0x51));
    e->ended = false;
    assert_int_equal(rd(l, 0x120), BIT(0x51 - 0x40)); /* a look at ISR asks */
    assert_int_equal(e->asked, 2);
    wr(l, 0xb0, 0);
    assert_int_equal(rd(l, 0x120), 0);

    ipi(l, 0, 0x52);
    assert_true(take_deferred(l, 0x52));
    e->ended = true;
    assert_int_equal(rd(l, 0x120), 0);
}

static void ends_that_others_wait_for_are_not_deferred(void **state)
{
    struct rig *r = *state;
    struct lapic *l = r->apic[0];

    lapic_bus_deliver(r->bus, MSI, 0xc060); /* level: the IOAPIC wants to hear of its end */
    assert_false(take_deferred(l, 0x60));
    wr(l, 0xb0, 0);
    ipi(r->apic[1], 0, 0x50);
    ipi(r->apic[1], 0, 0x61);
    assert_false(take_deferred(l, 0x61)); /* 0x50 waits for it */
    wr(l, 0xb0, 0);
    assert_true(take_deferred(l, 0x50));
    lapic_init(l);
    lapic_sync_eoi(l);
    assert_int_equal(r->end[0].asked, 0);
}

static void state_goes_round_and_bad_state_is_refused(void **state)
{
    struct rig *r = *state;
    struct lapic_state s, t, bad;
    struct error err;

    to_x2apic(r);
    lapic_bus_deliver(r->bus, MSI | 1 << 12, 0x71);
    lapic_save(r->apic[1], &s);
    lapic_reset(r->apic[1]);
    assert_false(lapic_has_interrupt(r->apic[1]));
    assert_int_equal(lapic_load(r->apic[1], &s, &err), 0);
    assert_int_equal(lapic_deliverable(r->apic[1]), 0x71);
    lapic_save(r->apic[1], &t);
    assert_memory_equal(&s, &t, sizeof(s));

    assert_true(lapic_load(r->apic[2], &s, &err) < 0); /* another's ID */
    bad = s;
    bad.base_msr &= ~APIC_BASE_ENABLE;
    assert_true(lapic_load(r->apic[1], &bad, &err) < 0);
    bad = s;
    bad.irr[0] = 2;
    assert_true(lapic_load(r->apic[1], &bad, &err) < 0);
    bad = s;
    bad.lvt[LVT_TIMER] = 0xffffffff;
    assert_true(lapic_load(r->apic[1], &bad, &err) < 0);
    bad = s;
    bad.ldr = 0xffff;
    assert_true(lapic_load(r->apic[1], &bad, &err) < 0);
}

static void odd_accesses_do_no_harm(void **state)
{
    struct rig *r = *state;
    struct lapic *l = r->apic[0];
    u32 seed = 12345;

    assert_int_equal(lapic_mmio_read(l, 0x32, 1), 0x05);
    assert_int_equal(lapic_mmio_read(l, 0x34, 4), 0);
    assert_int_equal(lapic_mmio_read(l, 0x30, 8), 0x50014);
    for (int i = 0; i < 200000; i++) {
        seed = seed * 1664525 + 1013904223;
        r->now += seed & 0xffff;
        if (seed & 0x10000)
            lapic_mmio_write(l, (seed >> 8) & 0xfff & ~(seed & 0x20000 ? 0xfu : 0u), seed * 7919,
                             1u << ((seed >> 20) & 3));
        else
            lapic_mmio_read(l, (seed >> 8) & 0xfff, 1u << ((seed >> 20) & 3));
        if (lapic_has_interrupt(l))
            assert_true(lapic_ack(l) >= 16);
        if (lapic_next_deadline(l) <= r->now)
            lapic_timer_expire(l, r->now);
    }
}

#define MESSAGES 20000

static void *send_messages(void *opaque)
{
    struct rig *r = opaque;

    for (unsigned i = 0; i < MESSAGES; i++)
        lapic_bus_deliver(r->bus, MSI | 0xff << 12, 0x30 + i % 0xc0);
    r->senders--;
    return NULL;
}

static void *send_ipis(void *opaque)
{
    struct rig *r = opaque;

    for (unsigned i = 0; i < MESSAGES; i++)
        ipi(r->apic[1], 0, 2u << 18 | (0x30 + i % 0xc0));
    r->senders--;
    return NULL;
}

static void messages_of_many_threads_all_arrive(void **state)
{
    struct rig *r = *state;
    struct lapic *l = r->apic[0];
    pthread_t threads[2];
    unsigned taken = 0;

    r->senders = 2;
    pthread_create(&threads[0], NULL, send_messages, r);
    pthread_create(&threads[1], NULL, send_ipis, r);
    while (r->senders > 0 || lapic_has_interrupt(l)) {
        if (!lapic_has_interrupt(l))
            continue;
        assert_true(lapic_ack(l) >= 0x30);
        wr(l, 0xb0, 0);
        taken++;
    }
    pthread_join(threads[0], NULL);
    pthread_join(threads[1], NULL);
    take_all(r);
    assert_true(taken > 0);
    for (u32 reg = 0x200; reg < 0x280; reg += 0x10)
        assert_int_equal(rd(l, reg), 0);
}

int main(void)
{
#define RIGGED(f) cmocka_unit_test_setup_teardown(f, rig_up, rig_down)
    const struct CMUnitTest tests[] = {
        RIGGED(reset_values),
        RIGGED(priorities_nest),
        RIGGED(level_interrupts_broadcast_their_end),
        RIGGED(destinations),
        RIGGED(lowest_priority_takes_the_idlest),
        RIGGED(startup_messages),
        RIGGED(errors_are_latched_and_told),
        RIGGED(timer_one_shot_and_periodic),
        RIGGED(timer_tsc_deadline),
        RIGGED(base_transitions),
        RIGGED(x2apic_registers),
        RIGGED(pic_line_comes_through_lint0),
        RIGGED(extint_messages_wait_to_be_taken),
        RIGGED(deferred_ends_of_interrupts),
        RIGGED(ends_that_others_wait_for_are_not_deferred),
        RIGGED(state_goes_round_and_bad_state_is_refused),
        RIGGED(odd_accesses_do_no_harm),
        RIGGED(messages_of_many_threads_all_arrive),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
