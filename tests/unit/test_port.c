/*
 * Root ports: configuration space and windows behind them, and their slots: what the guest sees of cards that come and
 * go, what it does about them, and what neither side may do.
 */
#include "port_rig.h"

#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>

#include <cmocka.h>

#define BUS 5
#define WINDOW 0xc0100000ULL
#define PREF_WINDOW 0x800000000ULL
#define MSIX_BAR (WINDOW + 0x8000)

#define ON (PCI_EXP_SLTCTL_PIC_ON | PCI_EXP_SLTCTL_AIC_OFF)
#define OFF (PCI_EXP_SLTCTL_PIC_OFF | PCI_EXP_SLTCTL_AIC_OFF | PCI_EXP_SLTCTL_PCC)
#define BLINK (PCI_EXP_SLTCTL_PIC_BLINK | PCI_EXP_SLTCTL_AIC_OFF)
#define NOTIFY (PCI_EXP_SLTCTL_HPIE | PCI_EXP_SLTCTL_DLLSCE | PCI_EXP_SLTSTA_ABP)

static int setup(void **state)
{
    *state = slot_rig_create();
    return 0;
}

static int teardown(void **state)
{
    slot_rig_destroy(*state);
    return 0;
}

/* ---- the guest ---- */

static u64 port_get(struct slot_rig *s, unsigned offset, unsigned size)
{
    return config_read(s->rig, PORT_DEVFN, offset, size);
}
static void port_put(struct slot_rig *s, unsigned offset, u64 value, unsigned size)
{
    config_write(s->rig, PORT_DEVFN, offset, value, size);
}
static u16 slot_status(struct slot_rig *s)
{
    return (u16)port_get(s, s->cap + PCI_EXP_SLTSTA, 2);
}
static void control(struct slot_rig *s, u16 value)
{
    port_put(s, s->cap + PCI_EXP_SLTCTL, value, 2);
}
static void clear_status(struct slot_rig *s)
{
    port_put(s, s->cap + PCI_EXP_SLTSTA, 0xffff, 2);
}
static bool link_is_active(struct slot_rig *s)
{
    return port_get(s, s->cap + PCI_EXP_LNKSTA, 2) & PCI_EXP_LNKSTA_DLLLA;
}

/* By ECAM: function 0 of device 0 of the port's bus. */
static u64 card_get(struct slot_rig *s, unsigned offset, unsigned size)
{
    return io_bus_read(s->rig->env.mmio, ECAM + ((u64)BUS << 20) + offset, size);
}
static void card_put(struct slot_rig *s, unsigned offset, u64 value, unsigned size)
{
    io_bus_write(s->rig->env.mmio, ECAM + ((u64)BUS << 20) + offset, value, size);
}

static void open_bridge(struct slot_rig *s)
{
    config_write(s->rig, 0, PCI_HOST_PCIEXBAR, ECAM | 1, 4);
    port_put(s, PCI_PRIMARY_BUS, BUS << 16 | BUS << 8, 4);
    port_put(s, PCI_MEMORY_BASE, WINDOW >> 16, 2);
    port_put(s, PCI_MEMORY_LIMIT, WINDOW >> 16, 2); /* to the end of this MiB */
    port_put(s, PCI_COMMAND, PCI_COMMAND_MEMORY | PCI_COMMAND_MASTER, 2);
}

static void place_card(struct slot_rig *s, u64 at)
{
    card_put(s, PCI_BASE_ADDRESS_0, at, 4);
    card_put(s, PCI_BASE_ADDRESS_0 + 4, at >> 32, 4);
    card_put(s, PCI_BASE_ADDRESS_0 + 8, MSIX_BAR, 4);
    card_put(s, PCI_COMMAND, PCI_COMMAND_MEMORY | PCI_COMMAND_MASTER, 2);
}

/* A guest with a driver, a card that it uses, and MSI. */
static void use_card(struct slot_rig *s)
{
    unsigned msi = find_capability(s->rig, PORT_DEVFN, PCI_CAP_ID_MSI, 0);

    open_bridge(s);
    port_put(s, msi + PCI_MSI_ADDRESS_LO, 0xfee00000, 4);
    port_put(s, msi + PCI_MSI_DATA, 0x55, 2);
    port_put(s, msi + PCI_MSI_FLAGS, PCI_MSI_FLAGS_ENABLE, 2);
    slot_insert(s);
    control(s, ON | NOTIFY);
    clear_status(s);
    place_card(s, WINDOW);
}

static bool card_answers(struct slot_rig *s)
{
    return io_bus_read(s->rig->env.mmio, WINDOW + 8, 4) == 8;
}

/* ---- the bridge ---- */

static void identifies_itself_as_a_port_with_a_slot(void **state)
{
    struct slot_rig *s = *state;
    u16 flags = (u16)port_get(s, s->cap + PCI_EXP_FLAGS, 2);
    u32 slot = (u32)port_get(s, s->cap + PCI_EXP_SLTCAP, 4);

    assert_int_equal(port_get(s, PCI_HEADER_TYPE, 1), PCI_HEADER_TYPE_BRIDGE);
    assert_int_equal(port_get(s, PCI_CLASS_DEVICE, 2), PCI_CLASS_BRIDGE_PCI);
    assert_int_equal(flags, PCI_EXP_FLAGS_SLOT | PCI_EXP_TYPE_ROOT_PORT << 4 | 2);
    assert_true(slot & PCI_EXP_SLTCAP_HPC);
    assert_int_equal(slot >> PCI_EXP_SLTCAP_PSN_SHIFT, 7);
    assert_int_equal(slot_status(s), 0);
    assert_int_equal(port_get(s, s->cap + PCI_EXP_SLTCTL, 2), OFF);
    assert_false(link_is_active(s));
    port_put(s, 0x1c, 0xffff, 2); /* no window for ports */
    assert_int_equal(port_get(s, 0x1c, 2), 0);
}

static void a_card_is_found_on_the_ports_bus(void **state)
{
    struct slot_rig *s = *state;

    open_bridge(s);
    slot_insert(s);
    control(s, ON);
    assert_int_equal(card_get(s, 0, 4), 0x56781234);
    assert_int_equal(card_get(s, 0x1000, 4), 0xffffffff); /* function 1 */
    assert_int_equal(card_get(s, 0x8000, 4), 0xffffffff); /* device 1: there is none on a link */
    io_bus_write(s->rig->env.ports, CONFIG_PORT, 0x80000000U | BUS << 16, 4);
    assert_int_equal(io_bus_read(s->rig->env.ports, CONFIG_PORT + 4, 4), 0x56781234);
    port_put(s, PCI_SECONDARY_BUS, BUS + 1, 1);
    assert_int_equal(card_get(s, 0, 4), 0xffffffff);
    assert_int_equal(card_get(s, PCI_ECAM_BUS_SIZE, 4), 0x56781234);
    port_put(s, PCI_SECONDARY_BUS, BUS, 1);
    /* An endpoint of PCI Express. */
    unsigned cap = (unsigned)card_get(s, PCI_CAPABILITY_LIST, 1);
    assert_int_equal(card_get(s, cap, 1), PCI_CAP_ID_EXP);
    assert_int_equal(card_get(s, cap + PCI_EXP_FLAGS, 2), 2);
}

static void a_bar_answers_within_the_windows_only(void **state)
{
    struct slot_rig *s = *state;
    struct io_bus *mmio = s->rig->env.mmio;

    open_bridge(s);
    slot_insert(s);
    control(s, ON);
    place_card(s, WINDOW);
    assert_true(card_answers(s));
    io_bus_write(mmio, WINDOW, 0x11, 4);
    assert_int_equal(s->card->last, 0x11);

    place_card(s, WINDOW + MIB(1)); /* beyond */
    assert_int_equal(io_bus_read(mmio, WINDOW + MIB(1) + 8, 4), 0xffffffff);
    port_put(s, PCI_MEMORY_LIMIT, (WINDOW + MIB(1)) >> 16, 2);
    assert_int_equal(io_bus_read(mmio, WINDOW + MIB(1) + 8, 4), 8);

    place_card(s, PREF_WINDOW);
    assert_int_equal(io_bus_read(mmio, PREF_WINDOW + 8, 4), 0xffffffff);
    port_put(s, PCI_PREF_BASE_UPPER32, PREF_WINDOW >> 32, 4);
    port_put(s, PCI_PREF_LIMIT_UPPER32, PREF_WINDOW >> 32, 4);
    port_put(s, PCI_PREF_MEMORY_BASE, 0, 2);
    assert_int_equal(io_bus_read(mmio, PREF_WINDOW + 8, 4), 8);

    port_put(s, PCI_COMMAND, PCI_COMMAND_MASTER, 2); /* forwards nothing */
    assert_int_equal(io_bus_read(mmio, PREF_WINDOW + 8, 4), 0xffffffff);
    port_put(s, PCI_COMMAND, PCI_COMMAND_MASTER | PCI_COMMAND_MEMORY, 2);
    assert_int_equal(io_bus_read(mmio, PREF_WINDOW + 8, 4), 8);
}

/* INTx of the card is the port's, turned by its device number: INTA of slot 4. */
static void interrupts_come_through(void **state)
{
    struct slot_rig *s = *state;
    unsigned line = pci_host_pirq(4, 0), cap;

    use_card(s);
    pci_intx_set(&s->card->pci, true);
    assert_true(s->rig->levels[line]);
    pci_intx_set(&s->card->pci, false);
    assert_false(s->rig->levels[line]);

    cap = (unsigned)card_get(s, PCI_CAPABILITY_LIST, 1);
    while (card_get(s, cap, 1) != PCI_CAP_ID_MSIX)
        cap = (unsigned)card_get(s, cap + 1, 1);
    card_put(s, cap + PCI_MSIX_FLAGS, PCI_MSIX_FLAGS_ENABLE, 2);
    io_bus_write(s->rig->env.mmio, MSIX_BAR, 0xfee01000, 8);
    io_bus_write(s->rig->env.mmio, MSIX_BAR + 8, 0x77, 8);
    s->rig->messages = 0;
    port_put(s, PCI_COMMAND, PCI_COMMAND_MEMORY, 2); /* the port lets nothing up: it waits */
    assert_false(pci_is_bus_master(&s->card->pci));
    pci_msix_notify(&s->card->pci, 0);
    assert_int_equal(s->rig->messages, 0);
    port_put(s, PCI_COMMAND, PCI_COMMAND_MEMORY | PCI_COMMAND_MASTER, 2);
    assert_int_equal(s->rig->messages, 1);
    assert_int_equal(s->rig->msi_data, 0x77);
}

static void a_direct_boot_opens_the_bridge(void **state)
{
    struct slot_rig *s = *state;
    struct pci_windows w = {0xc0000000, 0xc1000000, 0xc000, 0x10000};
    const u8 irq[PCI_PIRQS] = {10, 11, 10, 11, 10, 11, 10, 11};
    u64 at;

    slot_insert(s);
    pci_port_device(s->port)->ops->reset(pci_port_device(s->port));
    pci_host_assign(s->host, &w, ECAM, irq);
    assert_int_equal(port_get(s, PCI_PRIMARY_BUS, 4) & 0xffffff, 0x010100);
    at = io_bus_read(s->rig->env.mmio, ECAM + PCI_ECAM_BUS_SIZE + PCI_BASE_ADDRESS_0, 4) & ~15ULL;
    assert_int_equal(port_get(s, PCI_MEMORY_BASE, 2) << 16, at & ~(MIB(1) - 1));
    assert_int_equal(io_bus_read(s->rig->env.mmio, at + 8, 4), 8);
}

/* ---- the slot ---- */

static void a_card_that_comes_is_told(void **state)
{
    struct slot_rig *s = *state;
    unsigned line = pci_host_pirq(4, 1);

    open_bridge(s);
    control(s, OFF | NOTIFY);
    clear_status(s);
    assert_false(s->rig->levels[line]);
    slot_insert(s);
    assert_true(s->rig->levels[line]); /* INTx: MSI is off */
    assert_int_equal(slot_status(s), PCI_EXP_SLTSTA_PDS | PCI_EXP_SLTSTA_PDC | PCI_EXP_SLTSTA_ABP);
    assert_int_equal(card_get(s, 0, 4), 0xffffffff); /* it has no power yet */
    clear_status(s);
    assert_false(s->rig->levels[line]);
    control(s, ON | NOTIFY);
    assert_int_equal(slot_status(s), PCI_EXP_SLTSTA_PDS | PCI_EXP_SLTSTA_CC | PCI_EXP_SLTSTA_DLLSC);
    assert_true(link_is_active(s));
    assert_true(s->rig->levels[line]); /* DLLSC; command completed isn't enabled */
    assert_int_equal(card_get(s, 0, 4), 0x56781234);
    assert_null(card_create(s->rig, s->host)); /* there is no second place */
    assert_non_null(strstr(s->rig->err.text, "card is where card is to be"));
}

static void a_message_is_sent_when_the_condition_becomes_true(void **state)
{
    struct slot_rig *s = *state;
    struct error err;

    use_card(s);
    s->rig->messages = 0;
    control(s, ON | NOTIFY); /* completed: not enabled */
    assert_int_equal(s->rig->messages, 0);
    control(s, ON | NOTIFY | PCI_EXP_SLTCTL_CCIE); /* the status is there already */
    assert_int_equal(s->rig->messages, 1);
    assert_int_equal(s->rig->msi_data, 0x55);
    assert_int_equal(pci_port_press_button(s->port, &err), 0); /* it was true before */
    assert_int_equal(s->rig->messages, 1);
    clear_status(s);
    assert_int_equal(pci_port_press_button(s->port, &err), 0);
    assert_int_equal(s->rig->messages, 2);
    assert_false(s->rig->levels[pci_host_pirq(4, 1)]);
}

static void a_card_goes_when_the_guest_lets_it(void **state)
{
    struct slot_rig *s = *state;
    struct error err;

    use_card(s);
    assert_int_equal(pci_port_press_button(s->port, &err), 0);
    assert_true(slot_status(s) & PCI_EXP_SLTSTA_ABP);
    assert_int_equal(slot_update(s), PCI_PORT_NOTHING);
    control(s, BLINK | NOTIFY);
    assert_int_equal(pci_port_press_button(s->port, &err), -EBUSY);
    assert_true(card_answers(s));
    control(s, BLINK | NOTIFY | PCI_EXP_SLTCTL_PCC);
    assert_false(card_answers(s));
    assert_int_equal(s->attention, 1);
    assert_int_equal(slot_update(s),
                     PCI_PORT_RESET); /* it has no power, and goes when the indicator is off */
    assert_int_equal(s->card->resets, 1);
    clear_status(s);
    control(s, OFF | NOTIFY);
    assert_int_equal(s->attention, 2);
    assert_int_equal(slot_update(s), PCI_PORT_REMOVE);
    assert_null(s->card);
    assert_int_equal(slot_status(s), PCI_EXP_SLTSTA_PDC | PCI_EXP_SLTSTA_CC);
    assert_int_equal(slot_update(s), PCI_PORT_NOTHING);
    slot_insert(s);
    control(s, ON | NOTIFY);
    place_card(s, WINDOW);
    assert_true(card_answers(s));
}

/* Power, link and bus are the guest's: without asking, too, and the card stays where it is. */
static void a_card_loses_its_state_with_its_link(void **state)
{
    struct slot_rig *s = *state;
    const struct {
        unsigned reg, off, on;
    } ways[] = {
        {s->cap + PCI_EXP_SLTCTL, OFF, ON},
        {s->cap + PCI_EXP_LNKCTL, PCI_EXP_LNKCTL_LD, 0},
        {PCI_BRIDGE_CONTROL, PCI_BRIDGE_CTL_BUS_RESET, 0},
    };

    use_card(s);
    for (unsigned i = 0; i < ARRAY_SIZE(ways); i++) {
        place_card(s, WINDOW);
        assert_true(card_answers(s));
        port_put(s, ways[i].reg, ways[i].off, 2);
        assert_int_equal(s->attention, i + 1);
        assert_false(card_answers(s));
        assert_int_equal(card_get(s, 0, 4), 0xffffffff);
        assert_false(pci_is_bus_master(&s->card->pci));
        assert_int_equal(slot_update(s), PCI_PORT_RESET);
        assert_true(slot_status(s) & PCI_EXP_SLTSTA_PDS);
        port_put(s, ways[i].reg, ways[i].on, 2);
        assert_int_equal(card_get(s, 0, 4), 0x56781234);
        assert_int_equal(card_get(s, PCI_COMMAND, 2), 0);
        assert_int_equal(s->card->resets, i + 1);
    }
    assert_int_equal(slot_update(s), PCI_PORT_NOTHING);
}

static void a_card_may_be_pulled_out(void **state)
{
    struct slot_rig *s = *state;

    use_card(s);
    pci_intx_set(&s->card->pci, true);
    s->rig->messages = 0;
    slot_eject(s);
    assert_false(s->rig->levels[pci_host_pirq(4, 0)]);
    assert_int_equal(s->rig->messages, 1);
    assert_int_equal(slot_status(s), PCI_EXP_SLTSTA_PDC | PCI_EXP_SLTSTA_DLLSC);
    assert_false(card_answers(s));
    assert_int_equal(card_get(s, 0, 4), 0xffffffff);
    assert_int_equal(slot_update(s), PCI_PORT_NOTHING);
}

/* Nobody answers; then the machine is reset: who was to leave leaves, who wasn't has power. */
static void a_reset_lets_a_card_go_that_was_to_leave(void **state)
{
    struct slot_rig *s = *state;
    struct device *port = pci_port_device(s->port);
    struct error err;

    use_card(s);
    port->ops->reset(port);
    assert_int_equal(slot_update(s), PCI_PORT_NOTHING);
    assert_int_equal(slot_status(s), PCI_EXP_SLTSTA_PDS);
    assert_true(link_is_active(s));
    assert_int_equal(pci_port_press_button(s->port, &err), 0);
    assert_int_equal(pci_port_press_button(s->port, &err), 0);
    assert_int_equal(slot_update(s), PCI_PORT_NOTHING);
    port->ops->reset(port);
    assert_int_equal(slot_update(s), PCI_PORT_REMOVE);
    assert_int_equal(port_get(s, s->cap + PCI_EXP_SLTCTL, 2), OFF);
}

static void a_card_without_power_goes_at_once(void **state)
{
    struct slot_rig *s = *state;
    struct error err;

    use_card(s);
    control(s, OFF);
    slot_update(s);
    s->attention = 0;
    assert_int_equal(pci_port_press_button(s->port, &err), 0);
    assert_int_equal(s->attention, 1);
    assert_int_equal(slot_update(s), PCI_PORT_REMOVE);
}

/* ---- state ---- */

static void move(struct slot_rig *from, struct slot_rig *to)
{
    struct device *parts[][2] = {
        {pci_host_device(from->host), pci_host_device(to->host)},
        {pci_port_device(from->port), pci_port_device(to->port)},
        {&from->card->pci.dev, &to->card->pci.dev},
    };

    for (unsigned i = 0; i < ARRAY_SIZE(parts); i++) {
        char buf[128];
        const char *wrong = rig_round_trip(to->rig, parts[i][0], parts[i][1], buf, sizeof(buf));

        if (wrong)
            fail_msg("%s", wrong);
    }
    pci_host_loaded(to->host);
}

static void state_survives_the_round_trip(void **state)
{
    struct slot_rig *s = *state, *fresh = slot_rig_create();
    struct error err;

    use_card(s);
    pci_port_press_button(s->port, &err);
    slot_insert(fresh);
    move(s, fresh);
    assert_true(card_answers(fresh));
    assert_true(pci_is_bus_master(&fresh->card->pci));
    assert_int_equal(slot_status(fresh), slot_status(s));
    control(fresh, OFF);
    assert_int_equal(slot_update(fresh), PCI_PORT_REMOVE);
    slot_rig_destroy(fresh);
}

static void a_state_needs_the_same_cards(void **state)
{
    struct slot_rig *s = *state, *empty = slot_rig_create();
    const struct state_desc *desc = pci_port_device(s->port)->state;
    size_t len = state_size(desc);
    u8 *bytes = malloc(len);
    struct error err;

    use_card(s);
    state_save(desc, pci_port_device(s->port), bytes);
    assert_int_equal(state_load(desc, pci_port_device(empty->port), bytes, len, &err), -EINVAL);
    assert_string_equal(err.text, "the state is of a machine with a card in slot 7");
    assert_int_equal(state_load(desc, pci_port_device(s->port), bytes, len, &err), 0);
    bytes[s->cap + PCI_EXP_LNKSTA + 1] ^= PCI_EXP_LNKSTA_DLLLA >> 8;
    assert_int_equal(state_load(desc, pci_port_device(s->port), bytes, len, &err), -EINVAL);
    free(bytes);
    slot_rig_destroy(empty);
}

#define TEST(fn) cmocka_unit_test_setup_teardown(fn, setup, teardown)

int main(void)
{
    const struct CMUnitTest tests[] = {
        TEST(identifies_itself_as_a_port_with_a_slot),
        TEST(a_card_is_found_on_the_ports_bus),
        TEST(a_bar_answers_within_the_windows_only),
        TEST(interrupts_come_through),
        TEST(a_direct_boot_opens_the_bridge),
        TEST(a_card_that_comes_is_told),
        TEST(a_message_is_sent_when_the_condition_becomes_true),
        TEST(a_card_goes_when_the_guest_lets_it),
        TEST(a_card_loses_its_state_with_its_link),
        TEST(a_card_may_be_pulled_out),
        TEST(a_reset_lets_a_card_go_that_was_to_leave),
        TEST(a_card_without_power_goes_at_once),
        TEST(state_survives_the_round_trip),
        TEST(a_state_needs_the_same_cards),
    };
    return cmocka_run_group_tests_name("port", tests, NULL, NULL);
}
