/*
 * What the command line takes, and what it refuses.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "cli/parse.h"
#include "cli/run.h"

#include <string.h>

static int run_parse(struct vm_config *config, struct error *err, const char *const *args)
{
    char *argv[32] = {"run"};
    int argc = 1;
    bool help;

    for (; args[argc - 1]; argc++)
        argv[argc] = (char *)args[argc - 1];
    memset(err, 0, sizeof(*err));
    return cli_run_parse(argc, argv, config, &help, err);
}
#define PARSE(config, err, ...) run_parse(config, err, (const char *const[]){__VA_ARGS__, NULL})

static void test_sizes(void **state)
{
    static const struct {
        const char *text;
        u64 size;
    } good[] = {
        {"1K", KIB(1)},
        {"512M", MIB(512)},
        {"2G", GIB(2)},
        {"10T", GIB(10240)},
        {"0M", 0},
        {"007M", MIB(7)},
        {"16777215T", 16777215ULL << 40},
    };
    static const char *const bad[] = {
        "",      "0",   "512", "M",     "512m", "512MB",     " 512M",
        "512 M", "-1G", "+1G", "0x10M", "1.5G", "16777216T", "99999999999999999999M",
    };

    for (size_t i = 0; i < ARRAY_SIZE(good); i++) {
        struct error err = {0};
        u64 size;

        assert_int_equal(parse_size(good[i].text, &size, &err), 0);
        assert_int_equal(size, good[i].size);
    }
    for (size_t i = 0; i < ARRAY_SIZE(bad); i++) {
        struct error err = {0};
        u64 size;

        if (!parse_size(bad[i], &size, &err))
            fail_msg("'%s' was taken", bad[i]);
        assert_int_equal(err.class, ERROR_INPUT);
    }
}

static void test_processors(void **state)
{
    static const struct {
        const char *text;
        unsigned cpus, sockets, cores, threads;
    } good[] = {
        {"1", 1, 1, 1, 1},           {"6", 6, 1, 6, 1},
        {"6,sockets=2", 6, 2, 3, 1}, {"8,threads=2", 8, 1, 4, 2},
        {"8,cores=2", 8, 4, 2, 1},   {"12,sockets=2,cores=3,threads=2", 12, 2, 3, 2},
        {"255", 255, 1, 255, 1},
    };
    static const char *const bad[] = {
        "",
        "0",
        "256",
        "two",
        "2,",
        "2,dies=2",
        "2,cores=",
        "2,cores=0",
        "5,cores=2",
        "2,sockets=3",
        "2,threads",
        "2;cores=2",
        "4,threads=256",
        "6,sockets=2,cores=2",
    };
    struct cpu_topology t;
    unsigned cpus;

    for (size_t i = 0; i < ARRAY_SIZE(good); i++) {
        struct error err = {0};

        assert_int_equal(parse_cpus(good[i].text, &cpus, &t, &err), 0);
        assert_int_equal(cpus, good[i].cpus);
        assert_int_equal(t.sockets, good[i].sockets);
        assert_int_equal(t.cores, good[i].cores);
        assert_int_equal(t.threads, good[i].threads);
    }
    for (size_t i = 0; i < ARRAY_SIZE(bad); i++) {
        struct error err = {0};

        if (!parse_cpus(bad[i], &cpus, &t, &err))
            fail_msg("'%s' was taken", bad[i]);
        assert_int_equal(err.class, ERROR_INPUT);
    }
}

static void test_processor_lists(void **state)
{
    static const char *const bad[] = {"",    ",",  "x",   "-1",   "1-",
                                      "2-1", "0,", "0 1", "1024", "0-256"};
    struct processor_list list;
    struct error err = {0};

    assert_int_equal(parse_processors("3", &list, &err), 0);
    assert_int_equal(list.count, 1);
    assert_int_equal(list.number[0], 3);
    assert_int_equal(parse_processors("8,0-2,8", &list, &err), 0);
    assert_int_equal(list.count, 5);
    assert_memory_equal(list.number, ((u16[]){8, 0, 1, 2, 8}), 5 * sizeof(u16));
    assert_int_equal(parse_processors("0-255", &list, &err), 0);
    assert_int_equal(list.count, PROCESSOR_LIST_MAX);
    for (size_t i = 0; i < ARRAY_SIZE(bad); i++)
        assert_int_not_equal(parse_processors(bad[i], &list, &err), 0);
}

static void test_pv_features(void **state)
{
    struct error err = {0};
    u32 bits;

    assert_int_equal(parse_pv_features("steal-time", &bits, &err), 0);
    assert_int_equal(bits, BIT(5));
    assert_int_equal(parse_pv_features("clock,ipi", &bits, &err), 0);
    assert_int_equal(bits, BIT(0) | BIT(3) | BIT(11) | BIT(24));
    assert_int_equal(parse_pv_features("all", &bits, &err), 0);
    assert_int_equal(bits, UINT32_MAX);
    assert_int_not_equal(parse_pv_features("", &bits, &err), 0);
    assert_int_not_equal(parse_pv_features("clock,", &bits, &err), 0);
    assert_int_not_equal(parse_pv_features("steal", &bits, &err), 0);
}

static void test_numbers(void **state)
{
    static const char *const bad[] = {"",    "-1",  "+1",  " 1", "1 ",   "0x",
                                      "0xg", "1e3", "256", "0",  "0x-1", "99999999999999999999"};
    struct error err = {0};
    u64 n;

    assert_int_equal(parse_number("0xF4", 1, 255, &n, &err), 0);
    assert_int_equal(n, 0xf4);
    assert_int_equal(parse_number("010", 1, 255, &n, &err), 0);
    assert_int_equal(n, 10);
    for (size_t i = 0; i < ARRAY_SIZE(bad); i++) {
        if (!parse_number(bad[i], 1, 255, &n, &err))
            fail_msg("'%s' was taken", bad[i]);
    }
}

static void test_defaults(void **state)
{
    struct vm_config c;
    struct error err;

    assert_int_equal(PARSE(&c, &err, "--kernel", "k"), 0);
    assert_string_equal(c.kernel, "k");
    assert_string_equal(c.engine, "auto");
    assert_string_equal(c.serial, "stdio");
    assert_int_equal(c.memory, MIB(512));
    assert_int_equal(c.cpus, 1);
    assert_int_equal(c.debug_exit_port, 0);
    assert_null(c.initrd);
    assert_null(c.stats);
    assert_false(c.no_reboot);
}

static void test_both_forms_of_an_option(void **state)
{
    struct vm_config c;
    struct error err;

    assert_int_equal(PARSE(&c, &err, "--kernel=k", "--append", "a=b c", "--memory=1G",
                           "--debug-exit", "0xf4", "--no-reboot", "--stats=s"),
                     0);
    assert_string_equal(c.append, "a=b c");
    assert_int_equal(c.memory, GIB(1));
    assert_int_equal(c.debug_exit_port, 0xf4);
    assert_true(c.no_reboot);
    assert_string_equal(c.stats, "s");
}

static void test_nested(void **state)
{
    static const char *const bad[] = {"host,", "host,nested", "host,nested=yes", "host,svm=on",
                                      "a-name-longer-than-any-model"};
    struct vm_config c;
    struct error err;

    assert_int_equal(PARSE(&c, &err, "--kernel=k"), 0);
    assert_string_equal(c.cpu, "host");
    assert_false(c.nested);
    assert_int_equal(PARSE(&c, &err, "--kernel=k", "--cpu=host,nested=on"), 0);
    assert_string_equal(c.cpu, "host");
    assert_true(c.nested);
    for (size_t i = 0; i < ARRAY_SIZE(bad); i++) {
        if (!PARSE(&c, &err, "--kernel=k", "--cpu", bad[i]))
            fail_msg("'%s' was taken", bad[i]);
        assert_non_null(strstr(err.text, "--cpu: "));
    }
}

static void test_memory_options(void **state)
{
    static const char *const bad[] = {"1G,",           "1G,hugepages", "1G,hugepages=yes",
                                      "1G,pages=huge", ",locked=on",   "1G,locked=on,"};
    struct vm_config c;
    struct error err;

    assert_int_equal(PARSE(&c, &err, "--kernel=k", "--memory=1G,hugepages=on,locked=on"), 0);
    assert_int_equal(c.memory, GIB(1));
    assert_true(c.memory_options.hugepages && c.memory_options.locked);
    assert_false(c.memory_options.mergeable);
    assert_int_equal(PARSE(&c, &err, "--kernel=k", "--memory", "2G,mergeable=on,hugepages=off"), 0);
    assert_true(c.memory_options.mergeable);
    assert_false(c.memory_options.hugepages || c.memory_options.locked);
    for (size_t i = 0; i < ARRAY_SIZE(bad); i++) {
        if (!PARSE(&c, &err, "--kernel=k", "--memory", bad[i]))
            fail_msg("'%s' was taken", bad[i]);
        assert_non_null(strstr(err.text, "--memory: "));
    }
}

static void test_errors_name_the_option(void **state)
{
    struct vm_config c;
    struct error err;

    assert_int_not_equal(PARSE(&c, &err, "--kernel", "k", "--memory", "lots"), 0);
    assert_non_null(strstr(err.text, "--memory: "));
    assert_int_not_equal(PARSE(&c, &err, "--kernel"), 0);
    assert_non_null(strstr(err.text, "--kernel needs a value"));
    assert_int_not_equal(PARSE(&c, &err, "--kernel", "k", "--kernel", "l"), 0);
    assert_non_null(strstr(err.text, "twice"));
    assert_int_not_equal(PARSE(&c, &err, "--kern", "k"), 0);
    assert_non_null(strstr(err.text, "unknown option '--kern'"));
    assert_int_not_equal(PARSE(&c, &err, "--memory", "1G"), 0);
    assert_non_null(strstr(err.text, "--kernel"));
}

static void test_disks(void **state)
{
    struct vm_config c;
    struct error err;

    assert_int_equal(PARSE(&c, &err, "--kernel", "k", "--disk", "a", "--disk",
                           "b,bus=nvme,serial=s", "--disk", "c,bus=ide,werror=stop", "--cdrom",
                           "d"),
                     0);
    assert_int_equal(c.ndisks, 4);
    assert_int_equal(c.disks[0].bus, MACHINE_DISK_VIRTIO);
    assert_int_equal(c.disks[1].bus, MACHINE_DISK_NVME);
    assert_string_equal(c.disks[1].serial, "s");
    assert_int_equal(c.disks[2].bus, MACHINE_DISK_IDE);
    assert_true(c.disks[2].stop_on_error);
    assert_int_equal(c.disks[3].bus, MACHINE_DISK_IDE);
    assert_true(c.disks[3].cdrom);
    assert_int_not_equal(PARSE(&c, &err, "--kernel", "k", "--disk", "a,bus=scsi"), 0);
    assert_non_null(strstr(err.text, "virtio, nvme or ide"));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_sizes),
        cmocka_unit_test(test_numbers),
        cmocka_unit_test(test_processors),
        cmocka_unit_test(test_processor_lists),
        cmocka_unit_test(test_pv_features),
        cmocka_unit_test(test_defaults),
        cmocka_unit_test(test_both_forms_of_an_option),
        cmocka_unit_test(test_nested),
        cmocka_unit_test(test_memory_options),
        cmocka_unit_test(test_errors_name_the_option),
        cmocka_unit_test(test_disks),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
