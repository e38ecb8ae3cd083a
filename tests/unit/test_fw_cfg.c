/* fw_cfg: items by port and by DMA, the directory, bad descriptors, and its state. */
#include "device/fw_cfg.h"
#include "device_rig.h"

#include <endian.h>
#include <setjmp.h>
#include <stdarg.h>

#include <cmocka.h>

#define PORT 0x510
#define DESCRIPTOR 0x100
#define BUFFER 0x2000

#define ERROR 1
#define READ 2
#define SKIP 4
#define SELECT(key) ((u32)(key) << 16 | 8)
#define WRITE 16

struct fixture {
    struct rig *rig;
    struct fw_cfg *fw;
    char writable[8];
};

static struct fw_cfg *make(struct rig *r, u16 port)
{
    struct fw_cfg_config cfg = {.port = port};

    return fw_cfg_create(&r->env, &cfg, &r->err);
}

static int setup(void **state)
{
    struct fixture *f = calloc(1, sizeof(*f));
    char text[] = "beta's text";

    f->rig = rig_create();
    f->fw = make(f->rig, PORT);
    *state = f;
    if (!f->fw || fw_cfg_add_file(f->fw, "opt/beta", text, 11, FW_CFG_COPY, &f->rig->err) < 0 ||
        fw_cfg_add_file(f->fw, "etc/alpha", "alpha", 5, FW_CFG_BORROW, &f->rig->err) < 0 ||
        fw_cfg_add_file(f->fw, "etc/w", f->writable, 8, FW_CFG_WRITABLE, &f->rig->err) < 0)
        return -1;
    memset(text, 'x', sizeof(text)); /* the copy is the device's own */
    return fw_cfg_add_u16(f->fw, FW_CFG_NB_CPUS, 0x1234, &f->rig->err);
}

static int teardown(void **state)
{
    struct fixture *f = *state;

    fw_cfg_device(f->fw)->ops->destroy(fw_cfg_device(f->fw));
    rig_destroy(f->rig);
    free(f);
    return 0;
}

static void select_key(struct fixture *f, u16 key)
{
    io_bus_write(f->rig->env.ports, PORT, key, 2);
}

static void read_port(struct fixture *f, void *buf, size_t n)
{
    for (u8 *p = buf; n--; p++)
        *p = io_bus_read(f->rig->env.ports, PORT + 1, 1);
}

/* Runs one descriptor; returns what control reads after it. */
static u32 dma(struct fixture *f, u32 control, u32 length, u64 address)
{
    u32 d[4] = {htobe32(control), htobe32(length), htobe32(address >> 32), htobe32(address)};

    memory_write(&f->rig->memory, DESCRIPTOR, d, sizeof(d));
    io_bus_write(f->rig->env.ports, PORT + 4, 0, 4);
    io_bus_write(f->rig->env.ports, PORT + 8, htobe32(DESCRIPTOR), 4);
    memory_read(&f->rig->memory, DESCRIPTOR, d, sizeof(d));
    return be32toh(d[0]);
}

static void shows_signature_id_and_numbers(void **state)
{
    struct fixture *f = *state;
    char text[6];
    u32 id;
    u16 ncpus;

    select_key(f, FW_CFG_SIGNATURE);
    read_port(f, text, 6);
    assert_memory_equal(text, "QEMU\0\0", 6);
    select_key(f, FW_CFG_ID);
    read_port(f, &id, 4);
    assert_int_equal(id, 3);
    select_key(f, FW_CFG_NB_CPUS);
    read_port(f, &ncpus, 2);
    assert_int_equal(ncpus, 0x1234);
    select_key(f, 0xbfff);
    read_port(f, text, 1);
    assert_int_equal(text[0], 0);
    assert_int_equal(io_bus_read(f->rig->env.ports, PORT + 4, 4), htobe32(0x51454d55));
    assert_int_equal(io_bus_read(f->rig->env.ports, PORT + 8, 4), htobe32(0x20434647));
}

static void directory_is_sorted_by_name(void **state)
{
    struct fixture *f = *state;
    struct {
        u32 count;
        struct {
            u32 size;
            u16 select, reserved;
            char name[56];
        } files[3];
    } dir;
    char text[11];

    select_key(f, FW_CFG_FILE_DIR);
    read_port(f, &dir, sizeof(dir));
    assert_int_equal(be32toh(dir.count), 3);
    assert_string_equal(dir.files[0].name, "etc/alpha");
    assert_string_equal(dir.files[1].name, "etc/w");
    assert_string_equal(dir.files[2].name, "opt/beta");
    assert_int_equal(be32toh(dir.files[2].size), 11);
    select_key(f, be16toh(dir.files[2].select));
    read_port(f, text, 11);
    assert_memory_equal(text, "beta's text", 11);
}

static void dma_reads_skips_and_pads_with_zeros(void **state)
{
    struct fixture *f = *state;
    char buf[16];

    memset((char *)memory_host(&f->rig->memory, BUFFER, 16), 0xee, 16);
    assert_int_equal(dma(f, SELECT(0x20) | SKIP, 7, 0), 0);
    assert_int_equal(dma(f, READ, 8, BUFFER), 0);
    memory_read(&f->rig->memory, BUFFER, buf, 16);
    assert_memory_equal(buf, "text\0\0\0\0\xee", 9);
    assert_int_equal(dma(f, SELECT(0x3000) | READ, 16, BUFFER), 0);
    memory_read(&f->rig->memory, BUFFER, buf, 16);
    assert_memory_equal(buf, (char[16]){0}, 16);
}

static void dma_writes_only_what_is_writable(void **state)
{
    struct fixture *f = *state;

    memory_write(&f->rig->memory, BUFFER, "12345678", 8);
    assert_int_equal(dma(f, SELECT(0x22) | WRITE, 8, BUFFER), 0);
    assert_memory_equal(f->writable, "12345678", 8);
    assert_int_equal(dma(f, SELECT(0x22) | WRITE, 9, BUFFER), ERROR);
    assert_int_equal(dma(f, SELECT(0x21) | WRITE, 5, BUFFER), ERROR);
}

static void dma_outside_memory_is_an_error(void **state)
{
    struct fixture *f = *state;

    assert_int_equal(dma(f, SELECT(0x20) | READ, 16, RIG_MEMORY - 8), ERROR);
    assert_int_equal(dma(f, SELECT(0x20) | READ, 0xffffffff, 0x1000), ERROR);
    assert_int_equal(dma(f, SELECT(0x20) | READ, 4096, ~0ULL - 100), ERROR);
    assert_int_equal(dma(f, SELECT(0x22) | WRITE, 8, 1ULL << 40), ERROR);
    io_bus_write(f->rig->env.ports, PORT + 4, 0xffffffff, 4);
    io_bus_write(f->rig->env.ports, PORT + 8, 0xffffffff, 4);
}

static void refuses_too_much(void **state)
{
    struct fixture *f = *state;
    char name[64];

    memset(name, 'n', sizeof(name));
    name[FW_CFG_MAX_NAME + 1] = '\0';
    assert_true(fw_cfg_add_file(f->fw, name, "", 0, FW_CFG_BORROW, &f->rig->err) < 0);
    name[FW_CFG_MAX_NAME] = '\0';
    for (unsigned i = 3; i < FW_CFG_MAX_FILES; i++) {
        name[0] = '0' + i;
        assert_int_equal(fw_cfg_add_file(f->fw, name, "", 0, FW_CFG_BORROW, &f->rig->err), 0);
    }
    assert_true(fw_cfg_add_file(f->fw, "more", "", 0, FW_CFG_BORROW, &f->rig->err) < 0);
}

static void state_survives_the_round_trip(void **state)
{
    struct fixture *f = *state;
    u64 seed = 0xf3c;
    char buf[128];

    for (unsigned i = 0; i < 1000; i++) {
        u64 r = rig_random(&seed);
        io_bus_write(f->rig->env.ports, PORT + r % 12, r >> 8, 1 << (r >> 60 & 1));
        io_bus_read(f->rig->env.ports, PORT + 1, 1);
    }
    select_key(f, 0x20);
    read_port(f, buf, 3);
    io_bus_write(f->rig->env.ports, PORT + 4, 0x12345678, 4);
    struct fw_cfg *fresh = make(f->rig, PORT + 0x100);
    assert_non_null(fresh);
    const char *wrong =
        rig_round_trip(f->rig, fw_cfg_device(f->fw), fw_cfg_device(fresh), buf, sizeof(buf));
    if (wrong)
        fail_msg("%s", wrong);
    assert_int_equal(io_bus_read(f->rig->env.ports, PORT + 0x101, 1), 0); /* it has no such item */
    fw_cfg_device(fresh)->ops->destroy(fw_cfg_device(fresh));
}

#define TEST(fn) cmocka_unit_test_setup_teardown(fn, setup, teardown)

int main(void)
{
    const struct CMUnitTest tests[] = {
        TEST(shows_signature_id_and_numbers),      TEST(directory_is_sorted_by_name),
        TEST(dma_reads_skips_and_pads_with_zeros), TEST(dma_writes_only_what_is_writable),
        TEST(dma_outside_memory_is_an_error),      TEST(refuses_too_much),
        TEST(state_survives_the_round_trip),
    };
    return cmocka_run_group_tests_name("fw_cfg", tests, NULL, NULL);
}
