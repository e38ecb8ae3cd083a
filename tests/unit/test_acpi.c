/*
 * The ACPI tables: found as an OS finds them, checksums, the processors of the MADT, refusals; and,
 * where iasl (Debian's acpica-tools) is installed, every table disassembled and compiled again.
 */
#include "machine/acpi.h"
#include "machine/aml.h"
#include "machine/layout.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#define SPACE (LAYOUT_ACPI_END - LAYOUT_ACPI_BASE)

static u8 sum(const u8 *bytes, size_t n)
{
    u8 total = 0;

    while (n--)
        total += *bytes++;
    return total;
}

static u64 get(const u8 *p, unsigned n)
{
    u64 value = 0;

    memcpy(&value, p, n);
    return value;
}

static const u8 *build(struct guest_memory *m, const struct acpi_config *cfg)
{
    struct error err;
    gpa_t rsdp = 0;

    memset(m, 0, sizeof(*m));
    assert_int_equal(memory_add_slot(m, LAYOUT_ACPI_BASE, SPACE, 0, &err), 0);
    assert_int_equal(acpi_build(cfg, LAYOUT_ACPI_BASE, SPACE, m, &rsdp, &err), 0);
    assert_int_equal(rsdp, LAYOUT_ACPI_BASE);
    return memory_host(m, rsdp, 36);
}

/* The table of this signature by way of the XSDT (the DSDT and FACS: of the FADT), or NULL. */
static const u8 *find(struct guest_memory *m, const u8 *rsdp, const char *signature)
{
    const u8 *xsdt = memory_host(m, get(rsdp + 24, 8), 36);

    if (strcmp(signature, "XSDT") == 0)
        return xsdt;
    if (strcmp(signature, "DSDT") == 0)
        return memory_host(m, get(find(m, rsdp, "FACP") + 140, 8), 36);
    if (strcmp(signature, "FACS") == 0)
        return memory_host(m, get(find(m, rsdp, "FACP") + 36, 4), 64);
    for (u32 at = 36; at < get(xsdt + 4, 4); at += 8) {
        const u8 *table = memory_host(m, get(xsdt + at, 8), 36);
        if (memcmp(table, signature, 4) == 0)
            return table;
    }
    return NULL;
}

static const char *const checked[] = {"XSDT", "FACP", "APIC", "HPET", "MCFG", "DSDT"};

static void every_checksum_is_right(void **state)
{
    struct acpi_config cfg = {.ncpus = 4};
    struct guest_memory m;
    const u8 *rsdp = build(&m, &cfg);

    assert_memory_equal(rsdp, "RSD PTR ", 8);
    assert_int_equal(sum(rsdp, 20), 0);
    assert_int_equal(sum(rsdp, 36), 0);
    for (unsigned i = 0; i < ARRAY_SIZE(checked); i++) {
        const u8 *table = find(&m, rsdp, checked[i]);
        assert_non_null(table);
        assert_memory_equal(table, checked[i], 4);
        assert_int_equal(sum(table, get(table + 4, 4)), 0);
    }
    const u8 *rsdt = memory_host(&m, get(rsdp + 16, 4), 36);
    assert_memory_equal(rsdt, "RSDT", 4);
    assert_int_equal(sum(rsdt, get(rsdt + 4, 4)), 0);
    assert_int_equal(get(rsdt + 36, 4), get(find(&m, rsdp, "XSDT") + 36, 8));
    const u8 *facs = find(&m, rsdp, "FACS");
    assert_memory_equal(facs, "FACS", 4);
    assert_int_equal(get(find(&m, rsdp, "FACP") + 36, 4) % 64, 0);
    memory_destroy(&m);
}

/* How many entries of a type the MADT has. */
static unsigned count_entries(const u8 *madt, u8 type)
{
    unsigned n = 0;

    for (u32 at = 44; at < get(madt + 4, 4); at += madt[at + 1]) {
        assert_true(madt[at + 1] >= 6);
        n += madt[at] == type;
    }
    return n;
}

static void madt_lists_every_processor(void **state)
{
    u32 ids[] = {0, 1, 254, 255, 70000};
    struct acpi_config small = {.ncpus = 64};
    struct acpi_config large = {.ncpus = ARRAY_SIZE(ids), .apic_ids = ids};
    struct guest_memory m;
    const u8 *madt = find(&m, build(&m, &small), "APIC");

    assert_int_equal(count_entries(madt, 0), 64);
    assert_int_equal(count_entries(madt, 9), 0);
    assert_int_equal(count_entries(madt, 1), 1);
    assert_int_equal(count_entries(madt, 2), 2);
    assert_int_equal(count_entries(madt, 4), 1);
    memory_destroy(&m);

    madt = find(&m, build(&m, &large), "APIC");
    assert_int_equal(count_entries(madt, 0), 3);
    assert_int_equal(count_entries(madt, 9), 2);
    assert_int_equal(count_entries(madt, 10), 1);
    memory_destroy(&m);
}

static void refuses_what_does_not_fit(void **state)
{
    struct acpi_config cfg = {.ncpus = 1};
    struct guest_memory m = {.nslots = 0};
    struct error err;
    gpa_t rsdp = 0;

    assert_int_equal(memory_add_slot(&m, LAYOUT_ACPI_BASE, 4096, 0, &err), 0);
    for (u64 space = 0; space < 1024; space += 7)
        assert_true(acpi_build(&cfg, LAYOUT_ACPI_BASE, space, &m, &rsdp, &err) < 0);
    assert_true(acpi_build(&cfg, LAYOUT_EBDA_BASE & ~63ULL, SPACE, &m, &rsdp, &err) < 0);
    assert_int_equal(rsdp, 0);
    memory_destroy(&m);
}

static void package_lengths_take_one_to_three_bytes(void **state)
{
    static const struct {
        unsigned body;
        u8 bytes[3];
        unsigned n;
    } cases[] = {
        {62, {63}, 1},
        {63, {0x41, 0x04}, 2},
        {4093, {0x4f, 0xff}, 2},
        {4094, {0x81, 0x00, 0x01}, 3},
    };

    for (unsigned i = 0; i < ARRAY_SIZE(cases); i++) {
        struct aml a;
        aml_init(&a);
        aml_package(&a, 0); /* its count is the first byte of the body */
        for (unsigned b = 1; b < cases[i].body; b++)
            aml_int(&a, 0);
        aml_end(&a);
        assert_false(aml_failed(&a));
        assert_int_equal(a.len, 1 + cases[i].n + cases[i].body);
        assert_memory_equal(a.data + 1, cases[i].bytes, cases[i].n);
        aml_free(&a);
    }
}

static void names_and_numbers_are_encoded(void **state)
{
    static const u8 expected[] = {
        0x08, '\\', 0x2e, '_', 'S', 'B',  '_',  'A',  'B',  'C',  'D', 0x0a, 0x80, /* byte */
        0x08, 0x2f, 3,    'A', '_', '_',  '_',  'B',  '_',  '_',  '_', 'C',  '_',
        '_',  '_',                                                /* three */
        0x0e, 0,    0,    0,   0,   1,    0,    0,    0,          /* qword */
        0x08, 'X',  'Y',  'Z', 'W', 0x0c, 0x41, 0xd0, 0x05, 0x01, /* EISA ID */
    };
    struct aml a;

    aml_init(&a);
    aml_name(&a, "\\_SB.ABCD");
    aml_int(&a, 0x80);
    aml_name(&a, "A.B.C");
    aml_int(&a, 0x100000000ULL);
    aml_name(&a, "XYZW");
    aml_eisa_id(&a, "PNP0501");
    assert_int_equal(a.len, sizeof(expected));
    assert_memory_equal(a.data, expected, sizeof(expected));
    aml_free(&a);
}

static void dump(const char *dir, const char *name, const u8 *table)
{
    char path[256];
    FILE *file;

    snprintf(path, sizeof(path), "%s/%s.dat", dir, name);
    file = fopen(path, "wb");
    assert_non_null(file);
    assert_int_equal(fwrite(table, 1, get(table + 4, 4), file), get(table + 4, 4));
    assert_int_equal(fclose(file), 0);
}

/* iasl -d, then iasl on what came of it. Errors, warnings and remarks of the compiler count. */
static void iasl_takes_every_table(void **state)
{
    static const char *const tables[] = {"FACP", "APIC", "HPET", "MCFG", "DSDT", "FACS", "XSDT"};
    u32 ids[] = {0, 1, 300};
    struct acpi_config cfg = {.ncpus = ARRAY_SIZE(ids),
                              .apic_ids = ids,
                              .mmio64_base = LAYOUT_MMIO64_ALIGN,
                              .mmio64_size = LAYOUT_MMIO64_ALIGN};
    struct guest_memory m;
    const u8 *rsdp;
    char dir[] = "/tmp/doppel-acpi-XXXXXX", command[512];

    if (system("command -v iasl >/dev/null") != 0) {
        print_message("skip: iasl is not installed (package acpica-tools)\n");
        skip();
    }
    assert_non_null(mkdtemp(dir));
    rsdp = build(&m, &cfg);
    for (unsigned i = 0; i < ARRAY_SIZE(tables); i++) {
        dump(dir, tables[i], find(&m, rsdp, tables[i]));
        snprintf(
            command, sizeof(command),
            "cd %s && iasl -d %s.dat >%s.log 2>&1 && ! grep -Ei 'error|warning|invalid' %s.dsl",
            dir, tables[i], tables[i], tables[i]);
        if (system(command) != 0)
            fail_msg("%s: iasl -d: see %s", tables[i], dir);
        snprintf(command, sizeof(command), "cd %s && iasl -we %s.dsl >>%s.log 2>&1", dir, tables[i],
                 tables[i]);
        if (system(command) != 0)
            fail_msg("%s: iasl: see %s/%s.log", tables[i], dir, tables[i]);
    }
    memory_destroy(&m);
    snprintf(command, sizeof(command), "rm -r %s", dir);
    assert_int_equal(system(command), 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_checksum_is_right),
        cmocka_unit_test(madt_lists_every_processor),
        cmocka_unit_test(refuses_what_does_not_fit),
        cmocka_unit_test(package_lengths_take_one_to_three_bytes),
        cmocka_unit_test(names_and_numbers_are_encoded),
        cmocka_unit_test(iasl_takes_every_table),
    };
    return cmocka_run_group_tests_name("acpi", tests, NULL, NULL);
}
