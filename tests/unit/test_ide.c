/*
 * IDE: who is there, programmed I/O and DMA both ways, interrupts, limits, CD-ROM packets, resets, state.
 */
#include "disk_rig.h"

#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>

#include <cmocka.h>

#include "device/ide.h"

#define DEVFN PCI_DEVFN(30, 0)
#define DISK_SIZE KIB(512)
#define CD_SIZE KIB(256)
#define PRIMARY 0x1f0
#define SECONDARY 0x170
#define BUS_MASTER 0xc000

#define ST_BSY 0x80
#define ST_DRDY 0x40
#define ST_DRQ 0x08
#define ST_ERR 0x01

struct fixture {
    struct rig *rig;
    struct pci_host *host;
    struct block_backend *disk, *cd;
    struct faulty *faulty; /* what the disk is made of */
    struct device *dev;
    unsigned stops;
};

static void create(struct fixture *f)
{
    struct ide_config config = {0};
    struct ide *ide;

    f->rig = disk_rig_create();
    f->host = rig_pci_host(f->rig);
    f->disk = rig_faulty_disk(f->rig, DISK_SIZE, &f->faulty);
    f->cd = rig_disk(f->rig, CD_SIZE, true);
    config.drives[0] = (struct ide_drive_config){.backend = f->disk, .serial = "SN1"};
    config.drives[2] = (struct ide_drive_config){.backend = f->cd, .cdrom = true};
    config.irq[0] = rig_line(f->rig, 14);
    config.irq[1] = rig_line(f->rig, 15);
    ide = ide_create(&f->rig->env, &config, f->host, DEVFN, &f->rig->err);
    assert_non_null(ide);
    f->dev = ide_device(ide);
    config_write(f->rig, DEVFN, PCI_BASE_ADDRESS_0 + 16, BUS_MASTER, 4);
    config_write(f->rig, DEVFN, PCI_COMMAND, PCI_COMMAND_IO | PCI_COMMAND_MASTER, 2);
}

static void destroy(struct fixture *f)
{
    f->dev->ops->destroy(f->dev);
    block_destroy(f->disk);
    block_destroy(f->cd);
    pci_host_device(f->host)->ops->destroy(pci_host_device(f->host));
    disk_rig_destroy(f->rig);
}

static int setup(void **state)
{
    struct fixture *f = calloc(1, sizeof(*f));

    create(f);
    *state = f;
    return 0;
}

static int teardown(void **state)
{
    destroy(*state);
    free(*state);
    return 0;
}

static u8 in(struct fixture *f, u16 port)
{
    return (u8)io_bus_read(f->rig->env.ports, port, 1);
}

static void out(struct fixture *f, u16 port, u8 value)
{
    io_bus_write(f->rig->env.ports, port, value, 1);
}

/* Has the loop's work done until the drive isn't busy; returns its status, which clears the interrupt. */
static u8 settle(struct fixture *f, u16 base)
{
    for (unsigned i = 0; i < 100 && in(f, base + 0x206) & ST_BSY; i++) {
        f->dev->ops->start(f->dev);
        f->dev->ops->stop(f->dev);
    }
    f->dev->ops->start(f->dev);
    return in(f, base + 7);
}

static void command(struct fixture *f, u16 base, u8 cmd, u32 lba, u8 count)
{
    out(f, base + 6, 0xe0 | (lba >> 24 & 15));
    out(f, base + 2, count);
    out(f, base + 3, (u8)lba);
    out(f, base + 4, (u8)(lba >> 8));
    out(f, base + 5, (u8)(lba >> 16));
    out(f, base + 7, cmd);
}

static void read_words(struct fixture *f, u16 base, u8 *buf, unsigned bytes)
{
    for (unsigned i = 0; i < bytes; i += 2) {
        u16 w = (u16)io_bus_read(f->rig->env.ports, base, 2);

        memcpy(buf + i, &w, 2);
    }
}

static void write_words(struct fixture *f, u16 base, const u8 *buf, unsigned bytes)
{
    for (unsigned i = 0; i < bytes; i += 2)
        io_bus_write(f->rig->env.ports, base, buf[i] | buf[i + 1] << 8, 2);
}

static void assert_pattern(const u8 *buf, u64 offset, u64 len)
{
    for (u64 i = 0; i < len; i++)
        assert_int_equal(buf[i], disk_pattern(offset + i));
}

static void drives_show_what_they_are(void **state)
{
    struct fixture *f = *state;
    u8 page[512];

    assert_int_equal(in(f, PRIMARY + 7), 0x50);
    assert_int_equal(in(f, PRIMARY + 4) | in(f, PRIMARY + 5) << 8, 0);
    assert_int_equal(in(f, SECONDARY + 4) | in(f, SECONDARY + 5) << 8, 0xeb14);
    out(f, PRIMARY + 6, 0xf0);
    assert_int_equal(in(f, PRIMARY + 7), 0); /* nobody */
    command(f, PRIMARY, 0xec, 0, 0);
    assert_int_equal(settle(f, PRIMARY), 0x58);
    read_words(f, PRIMARY, page, sizeof(page));
    assert_int_equal(page[120] | page[121] << 8, DISK_SIZE / 512);
    assert_memory_equal(page + 20, "NS 1", 4);
    assert_int_equal(in(f, PRIMARY + 7), 0x50);
    command(f, SECONDARY, 0xec, 0, 0); /* a CD-ROM says no */
    assert_int_equal(settle(f, SECONDARY) & ST_ERR, ST_ERR);
    assert_int_equal(in(f, SECONDARY + 4), 0x14);
}

static void sectors_are_read_with_an_interrupt_each(void **state)
{
    struct fixture *f = *state;
    u8 buf[3 * 512];

    command(f, PRIMARY, 0x20, 5, 3);
    assert_int_equal(in(f, PRIMARY + 0x206) & ST_BSY, ST_BSY);
    for (unsigned i = 0; i < 3; i++) {
        unsigned edges = f->rig->edges[14];

        assert_int_equal(settle(f, PRIMARY) & (ST_BSY | ST_DRQ), ST_DRQ);
        assert_false(f->rig->levels[14]); /* reading status clears it */
        read_words(f, PRIMARY, buf + 512 * i, 512);
        assert_int_equal(f->rig->edges[14] - edges, i == 0 ? 2 : i == 1 ? 1 : 0);
    }
    assert_int_equal(in(f, PRIMARY + 7), 0x50);
    assert_pattern(buf, 5 * 512, sizeof(buf));
}

static void long_reads_refill_the_buffer(void **state)
{
    struct fixture *f = *state;
    u8 *buf = malloc(256 * 512);

    command(f, PRIMARY, 0xc4, 100, 0); /* READ MULTIPLE, 256 sectors */
    for (unsigned done = 0; done < 256 * 512; done += 16 * 512) {
        assert_int_equal(settle(f, PRIMARY) & (ST_BSY | ST_DRQ), ST_DRQ);
        read_words(f, PRIMARY, buf + done, 16 * 512);
    }
    assert_int_equal(in(f, PRIMARY + 7), 0x50);
    assert_pattern(buf, 100 * 512, 256 * 512);
    free(buf);
}

static void what_is_written_is_read_back(void **state)
{
    struct fixture *f = *state;
    u8 data[1024], buf[1024];

    memset(data, 0xa5, sizeof(data));
    command(f, PRIMARY, 0x30, 9, 2);
    for (unsigned i = 0; i < 2; i++) {
        assert_int_equal(settle(f, PRIMARY) & ST_DRQ, ST_DRQ);
        write_words(f, PRIMARY, data + 512 * i, 512);
    }
    assert_int_equal(settle(f, PRIMARY), 0x50);
    command(f, PRIMARY, 0xe7, 0, 0);
    assert_int_equal(settle(f, PRIMARY), 0x50);
    command(f, PRIMARY, 0x20, 9, 2);
    settle(f, PRIMARY);
    read_words(f, PRIMARY, buf, 512);
    read_words(f, PRIMARY, buf + 512, 512);
    assert_memory_equal(buf, data, sizeof(buf));
}

static void ends_of_the_disk_are_kept(void **state)
{
    struct fixture *f = *state;

    command(f, PRIMARY, 0x20, DISK_SIZE / 512 - 1, 2);
    assert_int_equal(settle(f, PRIMARY) & ST_ERR, ST_ERR);
    assert_int_equal(in(f, PRIMARY + 1), 0x10);
    command(f, PRIMARY, 0x30, 0x0fffffff, 1);
    assert_int_equal(settle(f, PRIMARY) & ST_ERR, ST_ERR);
    command(f, PRIMARY, 0x05, 0, 1); /* no such command */
    assert_int_equal(settle(f, PRIMARY) & ST_ERR, ST_ERR);
    assert_int_equal(in(f, PRIMARY + 1), 0x04);
}

/* A table of two pieces at 0x100, of data at 0x1000 and 0x3000. */
static void put_table(struct fixture *f, u32 first, u32 second)
{
    u32 table[4] = {0x1000, first, 0x3000, second | 0x80000000U};

    memory_write(f->rig->env.memory, 0x100, table, sizeof(table));
    io_bus_write(f->rig->env.ports, BUS_MASTER + 4, 0x100, 4);
}

static void dma_goes_where_the_table_says(void **state)
{
    struct fixture *f = *state;
    u8 buf[512];

    put_table(f, 512, 1024);
    command(f, PRIMARY, 0xc8, 7, 3);
    out(f, BUS_MASTER, 0x09);
    assert_int_equal(settle(f, PRIMARY), 0x50);
    assert_int_equal(in(f, BUS_MASTER + 2) & 7, 4);
    memory_read(f->rig->env.memory, 0x1000, buf, 512);
    assert_pattern(buf, 7 * 512, 512);
    memory_read(f->rig->env.memory, 0x3200, buf, 512);
    assert_pattern(buf, 9 * 512, 512);
    out(f, BUS_MASTER, 0);
    out(f, BUS_MASTER + 2, 4);
    assert_int_equal(in(f, BUS_MASTER + 2) & 7, 0);

    out(f, BUS_MASTER, 0x01); /* the same to sector 200; started first */
    command(f, PRIMARY, 0xca, 200, 3);
    assert_int_equal(settle(f, PRIMARY), 0x50);
    command(f, PRIMARY, 0x20, 200, 1);
    settle(f, PRIMARY);
    read_words(f, PRIMARY, buf, 512);
    assert_pattern(buf, 7 * 512, 512);
}

static void dma_without_memory_fails(void **state)
{
    struct fixture *f = *state;

    put_table(f, 512, 512); /* too short */
    command(f, PRIMARY, 0xc8, 0, 8);
    out(f, BUS_MASTER, 0x09);
    assert_int_equal(settle(f, PRIMARY) & ST_ERR, ST_ERR);
    assert_int_equal(in(f, BUS_MASTER + 2) & 3, 2);
    out(f, BUS_MASTER, 0);
    io_bus_write(f->rig->env.ports, BUS_MASTER + 4, 0xfffffff0U, 4); /* nowhere */
    command(f, PRIMARY, 0xc8, 0, 1);
    out(f, BUS_MASTER, 0x09);
    assert_int_equal(settle(f, PRIMARY) & ST_ERR, ST_ERR);
}

static u8 packet(struct fixture *f, const u8 *bytes)
{
    out(f, SECONDARY + 6, 0xa0);
    out(f, SECONDARY + 1, 0);
    out(f, SECONDARY + 4, 0x00); /* 2 KiB at a time */
    out(f, SECONDARY + 5, 0x08);
    out(f, SECONDARY + 7, 0xa0);
    assert_int_equal(in(f, SECONDARY + 7) & ST_DRQ, ST_DRQ);
    assert_int_equal(in(f, SECONDARY + 2) & 3, 1);
    write_words(f, SECONDARY, bytes, 12);
    return settle(f, SECONDARY);
}

static void cdroms_answer_packets(void **state)
{
    static const u8 ready[12] = {0x00}, sense[12] = {0x03, 0, 0, 0, 18}, capacity[12] = {0x25};
    static const u8 read10[12] = {0x28, 0, 0, 0, 0, 3, 0, 0, 2};
    static const u8 beyond[12] = {0x28, 0, 0, 0, 0, 0x7f, 0, 0, 2}, unknown[12] = {0xf3};
    struct fixture *f = *state;
    u8 buf[4096];

    assert_int_equal(packet(f, ready) & ST_ERR, ST_ERR); /* the medium is new */
    assert_int_equal(packet(f, sense) & ST_DRQ, ST_DRQ);
    assert_int_equal(in(f, SECONDARY + 4), 18);
    read_words(f, SECONDARY, buf, 18);
    assert_int_equal(buf[2], 6);
    assert_int_equal(buf[12], 0x28);
    assert_int_equal(in(f, SECONDARY + 7), 0x50);
    assert_int_equal(packet(f, ready), 0x50);
    packet(f, capacity);
    read_words(f, SECONDARY, buf, 8);
    assert_int_equal(buf[3], CD_SIZE / 2048 - 1);
    assert_int_equal(packet(f, read10) & ST_DRQ, ST_DRQ);
    read_words(f, SECONDARY, buf, 2048);
    assert_int_equal(settle(f, SECONDARY) & ST_DRQ, ST_DRQ);
    read_words(f, SECONDARY, buf + 2048, 2048);
    assert_int_equal(settle(f, SECONDARY), 0x50);
    assert_int_equal(in(f, SECONDARY + 2) & 3, 3);
    assert_pattern(buf, 3 * 2048, sizeof(buf));
    assert_int_equal(packet(f, beyond) & ST_ERR, ST_ERR);
    assert_int_equal(in(f, SECONDARY + 1), 0x50);
    assert_int_equal(packet(f, unknown) & ST_ERR, ST_ERR);
}

static void a_reset_waits_for_the_disk(void **state)
{
    struct fixture *f = *state;

    command(f, PRIMARY, 0x20, 0, 8);
    f->dev->ops->start(f->dev); /* it is under way */
    out(f, PRIMARY + 0x206, 0x04);
    assert_int_equal(in(f, PRIMARY + 0x206), ST_BSY);
    out(f, PRIMARY + 0x206, 0x00);
    assert_int_equal(settle(f, PRIMARY), 0x50);
    assert_int_equal(in(f, PRIMARY + 2), 1);
    assert_false(f->rig->levels[14]);
}

static void interrupts_can_be_held_back(void **state)
{
    struct fixture *f = *state;

    out(f, PRIMARY + 0x206, 0x02);
    command(f, PRIMARY, 0xe5, 0, 0);
    assert_false(f->rig->levels[14]);
    out(f, PRIMARY + 0x206, 0x00);
    assert_true(f->rig->levels[14]);
    assert_int_equal(in(f, PRIMARY + 7), 0x50);
    assert_false(f->rig->levels[14]);
}

static void state_moves_between_accesses(void **state)
{
    static const u16 ports[] = {0x1f0, 0x1f1, 0x1f2,  0x1f3,  0x1f4,  0x1f6,  0x1f7,  0x1f7,
                                0x1f7, 0x3f6, 0x170,  0x171,  0x172,  0x174,  0x176,  0x177,
                                0x177, 0x376, 0xc000, 0xc002, 0xc004, 0xc008, 0xc00a, 0xc00c};
    static const u8 commands[] = {0x20, 0x30, 0xc4, 0xc5, 0xc8, 0xca, 0xec, 0xa0, 0xa1,
                                  0xc6, 0x24, 0x25, 0x35, 0xe7, 0xef, 0x91, 0x90, 0x08};
    struct fixture *f = *state, to = {0};
    u64 seed = 7;
    char where[128];

    for (unsigned round = 0; round < 30; round++) {
        for (unsigned i = 0; i < 400; i++) {
            u64 x = rig_random(&seed);
            u16 port = ports[x % ARRAY_SIZE(ports)];
            u8 value = (u8)(x >> 32);

            if ((port & 0x1f7) == 0x177 || port == 0x1f7)
                value = commands[value % ARRAY_SIZE(commands)];
            if ((port & 0xf) == 3 || (port & 0xf) == 4 || (port & 0xf) == 5)
                value &= 1;
            if (x & BIT(20))
                io_bus_read(f->rig->env.ports, port, port & 7 ? 1 : 2);
            else
                io_bus_write(f->rig->env.ports, port, value, port & 7 ? 1 : 2);
            if ((x >> 40 & 15) == 0)
                settle(f, PRIMARY);
        }
        f->dev->ops->stop(f->dev);
        create(&to);
        to.dev->ops->stop(to.dev);
        const char *wrong = rig_round_trip(f->rig, f->dev, to.dev, where, sizeof(where));

        if (wrong)
            fail_msg("round %u: %s", round, wrong);
        destroy(&to);
        f->dev->ops->start(f->dev);
    }
}

static void stopped(void *opaque, const char *disk, int error)
{
    struct fixture *f = opaque;

    f->stops++;
    assert_int_equal(error, ENOSPC);
}

static void a_failed_write_is_told_or_kept(void **state)
{
    struct fixture *f = *state;
    u8 data[512];

    memset(data, 0x5a, sizeof(data));
    f->faulty->error = -ENOSPC;
    command(f, PRIMARY, 0x30, 5, 1);
    write_words(f, PRIMARY, data, sizeof(data));
    assert_int_equal(settle(f, PRIMARY), ST_DRDY | ST_ERR);
    /* werror=stop: the drive is busy until there is space. */
    block_stop_on_error(f->disk, stopped, f);
    command(f, PRIMARY, 0x30, 5, 1);
    write_words(f, PRIMARY, data, sizeof(data));
    assert_int_equal(settle(f, PRIMARY) & ST_BSY, ST_BSY);
    assert_int_equal(f->stops, 1);
    assert_true(f->dev->ops->busy(f->dev));
    f->faulty->error = 0;
    block_resume(f->disk);
    assert_int_equal(settle(f, PRIMARY) & (ST_BSY | ST_ERR), 0);
    assert_false(f->dev->ops->busy(f->dev));
    command(f, PRIMARY, 0x20, 5, 1);
    assert_int_equal(settle(f, PRIMARY) & ST_DRQ, ST_DRQ);
    memset(data, 0, sizeof(data));
    read_words(f, PRIMARY, data, sizeof(data));
    for (unsigned i = 0; i < sizeof(data); i++)
        assert_int_equal(data[i], 0x5a);
    /* A reset with one kept gives it up. */
    f->faulty->error = -ENOSPC;
    command(f, PRIMARY, 0x30, 5, 1);
    write_words(f, PRIMARY, data, sizeof(data));
    assert_int_equal(settle(f, PRIMARY) & ST_BSY, ST_BSY);
    f->dev->ops->stop(f->dev);
    f->dev->ops->reset(f->dev);
    assert_false(f->dev->ops->busy(f->dev));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(drives_show_what_they_are, setup, teardown),
        cmocka_unit_test_setup_teardown(sectors_are_read_with_an_interrupt_each, setup, teardown),
        cmocka_unit_test_setup_teardown(long_reads_refill_the_buffer, setup, teardown),
        cmocka_unit_test_setup_teardown(what_is_written_is_read_back, setup, teardown),
        cmocka_unit_test_setup_teardown(ends_of_the_disk_are_kept, setup, teardown),
        cmocka_unit_test_setup_teardown(dma_goes_where_the_table_says, setup, teardown),
        cmocka_unit_test_setup_teardown(dma_without_memory_fails, setup, teardown),
        cmocka_unit_test_setup_teardown(cdroms_answer_packets, setup, teardown),
        cmocka_unit_test_setup_teardown(a_reset_waits_for_the_disk, setup, teardown),
        cmocka_unit_test_setup_teardown(interrupts_can_be_held_back, setup, teardown),
        cmocka_unit_test_setup_teardown(state_moves_between_accesses, setup, teardown),
        cmocka_unit_test_setup_teardown(a_failed_write_is_told_or_kept, setup, teardown),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
