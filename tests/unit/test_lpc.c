/* The LPC bridge: where the ACPI registers are, interrupt routes, no SMM; and the host bridge's attribute map. */
#include "pci_rig.h"

#include <setjmp.h>
#include <stdarg.h>

#include <cmocka.h>

#include "device/pci/lpc.h"

struct fixture {
    struct rig *rig;
    struct pci_host *host;
    struct lpc *lpc;
    u16 base;
    unsigned routes;
};

static void base_changed(void *opaque, u16 base)
{
    ((struct fixture *)opaque)->base = base;
}

static void routes_changed(void *opaque)
{
    ((struct fixture *)opaque)->routes++;
}

static int setup(void **state)
{
    struct fixture *f = calloc(1, sizeof(*f));
    struct lpc_config config = {base_changed, routes_changed, f};

    f->rig = rig_create();
    f->host = rig_pci_host(f->rig);
    f->lpc = lpc_create(&f->rig->env, &config, f->host, &f->rig->err);
    *state = f;
    return f->lpc ? 0 : -1;
}

static int teardown(void **state)
{
    struct fixture *f = *state;

    lpc_device(f->lpc)->ops->destroy(lpc_device(f->lpc));
    pci_host_device(f->host)->ops->destroy(pci_host_device(f->host));
    rig_destroy(f->rig);
    free(f);
    return 0;
}

static void acpi_registers_are_where_pmbase_says(void **state)
{
    struct fixture *f = *state;

    config_write(f->rig, LPC_DEVFN, 0x40, 0x601, 4);
    assert_int_equal(f->base, 0);
    config_write(f->rig, LPC_DEVFN, 0x44, 0x80, 1);
    assert_int_equal(f->base, 0x600);
    assert_int_equal(io_bus_read(f->rig->env.ports, 0x630, 4), 0x20); /* SMIs: set up already */
    config_write(f->rig, LPC_DEVFN, 0x40, 0xb000, 4);
    assert_int_equal(f->base, 0xb000);
    assert_int_equal(config_read(f->rig, LPC_DEVFN, 0x40, 4), 0xb001);
    lpc_device(f->lpc)->ops->reset(lpc_device(f->lpc));
    assert_int_equal(f->base, 0);
}

static void pirqs_go_where_they_are_routed(void **state)
{
    struct fixture *f = *state;

    for (unsigned n = 0; n < PCI_PIRQS; n++)
        assert_int_equal(lpc_pirq_irq(f->lpc, n), -1);
    config_write(f->rig, LPC_DEVFN, 0x60, 0x0b0b0a0a, 4);
    config_write(f->rig, LPC_DEVFN, 0x6b, 0x05, 1);
    assert_int_equal(lpc_pirq_irq(f->lpc, 1), 10);
    assert_int_equal(lpc_pirq_irq(f->lpc, 3), 11);
    assert_int_equal(lpc_pirq_irq(f->lpc, 7), 5);
    assert_int_equal(f->routes, 2);
}

static void the_attribute_map_names_each_piece(void **state)
{
    struct fixture *f = *state;
    struct pci_host_pam pam;
    gpa_t next = 0xc0000;

    for (unsigned n = 0; n < PCI_HOST_PAM_SEGMENTS; n++) {
        pci_host_pam(f->host, n, &pam);
        assert_int_equal(pam.base, next);
        assert_int_equal(pam.access, 0);
        next += pam.size;
    }
    assert_int_equal(next, 0x100000);
    config_write(f->rig, 0, 0x90, 0x30, 1);
    config_write(f->rig, 0, 0x92, 0x12, 1);
    pci_host_pam(f->host, 12, &pam);
    assert_int_equal(pam.access, PCI_HOST_PAM_READ | PCI_HOST_PAM_WRITE);
    pci_host_pam(f->host, 2, &pam);
    assert_int_equal(pam.access, PCI_HOST_PAM_WRITE);
    pci_host_pam(f->host, 3, &pam);
    assert_int_equal(pam.access, PCI_HOST_PAM_READ);
}

static void all_of_it_is_state(void **state)
{
    struct fixture *f = *state;
    struct error err;

    if (state_desc_check(lpc_device(f->lpc)->state, &err) < 0)
        fail_msg("%s", err.text);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(acpi_registers_are_where_pmbase_says, setup, teardown),
        cmocka_unit_test_setup_teardown(pirqs_go_where_they_are_routed, setup, teardown),
        cmocka_unit_test_setup_teardown(the_attribute_map_names_each_piece, setup, teardown),
        cmocka_unit_test_setup_teardown(all_of_it_is_state, setup, teardown),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
