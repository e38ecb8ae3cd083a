/*
 * The NVMe controller over real images: what it tells of itself, data by PRP and SGL, what no disk can do, queues that
 * come and go, a controller that is reset with commands under way, and a host that has no space left.
 */
#include "disk_rig.h"
#include "folder.h"
#include "nvme_rig.h"

#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <unistd.h>

#include <cmocka.h>

#define DISK MIB(1)
#define BLOCKS (DISK / 512)

struct fixture {
    struct rig *r;
    struct nvme_rig *t;
    struct faulty *disk;              /* namespace 1 */
    struct block_backend *backend[2]; /* of it, and of namespace 2, which can't be written */
    unsigned stops;
};

static struct fixture *create(const char *format, bool pool_only)
{
    struct fixture *f = calloc(1, sizeof(*f));
    struct disk_create c = {.format = format, .size = DISK, .size_given = true, .replace = true};
    struct disk_options options = {.format = format};
    struct nvme_config cfg = {.serial = "number 1", .count = 2};
    struct error err = {0};
    char path[64];

    snprintf(path, sizeof(path), "%s/%s", folder, format);
    if (disk_create(path, &c, &err))
        fail_msg("%s", err.text);
    f->r = disk_rig_create();
    f->disk = faulty_open(path, &options, &err);
    if (!f->disk)
        fail_msg("%s", err.text);
    f->backend[0] = block_create(&f->disk->d, f->r->env.loop, pool_only, &err);
    f->backend[1] = rig_disk(f->r, KIB(64), true);
    assert_non_null(f->backend[0]);
    memcpy(cfg.namespaces, f->backend, sizeof(f->backend));
    f->t = nvme_rig_create(f->r, &cfg);
    return f;
}

static void destroy(struct fixture *f)
{
    nvme_rig_destroy(f->t);
    block_destroy(f->backend[0]);
    block_destroy(f->backend[1]);
    disk_rig_destroy(f->r);
    free(f);
}

/* With a driver that has set up two pairs of queues. */
static struct fixture *create_ready(const char *format, bool pool_only)
{
    struct fixture *f = create(format, pool_only);

    assert_int_equal(nvme_enable(f->t), NVME_CSTS_RDY);
    nvme_create_pair(f->t, 1);
    nvme_create_pair(f->t, 2);
    return f;
}

static u8 *data_at(struct fixture *f, gpa_t at, u64 len)
{
    u8 *p = memory_host(&f->r->memory, at, len);

    assert_non_null(p);
    return p;
}

static void put64(struct fixture *f, gpa_t at, u64 value)
{
    memcpy(data_at(f, at, 8), &value, 8);
}

static struct nvme_command transfer(u8 opcode, u64 lba, u32 blocks, gpa_t prp1, gpa_t prp2)
{
    return (struct nvme_command){.opcode = opcode,
                                 .nsid = 1,
                                 .prp1 = prp1,
                                 .prp2 = prp2,
                                 .cdw10 = (u32)lba,
                                 .cdw11 = (u32)(lba >> 32),
                                 .cdw12 = blocks - 1};
}

static unsigned do_transfer(struct fixture *f, u8 opcode, u64 lba, u32 blocks, gpa_t prp1,
                            gpa_t prp2)
{
    struct nvme_command cmd = transfer(opcode, lba, blocks, prp1, prp2);

    return nvme_do(f->t, 1, &cmd, NULL);
}

static void fill(struct fixture *f, gpa_t at, u64 len, u64 seed)
{
    u8 *p = data_at(f, at, len);

    for (u64 i = 0; i < len; i += 8)
        memcpy(p + i, &(u64){rig_random(&seed)}, 8);
}

/* What the disk has from `lba` on, read page by page. */
static void expect(struct fixture *f, u64 lba, const u8 *want, u64 len)
{
    for (u64 done = 0; done < len; done += 512) {
        assert_int_equal(do_transfer(f, NVME_READ, lba + done / 512, 1, NVME_DATA + 0xf0000, 0), 0);
        assert_memory_equal(data_at(f, NVME_DATA + 0xf0000, 512), want + done, 512);
    }
}

/* ---- what it tells ---- */

static unsigned identify(struct fixture *f, u32 cns, u32 nsid)
{
    struct nvme_command cmd = {
        .opcode = NVME_ADMIN_IDENTIFY, .nsid = nsid, .prp1 = NVME_DATA, .cdw10 = cns};

    return nvme_do(f->t, 0, &cmd, NULL);
}

static void identify_tells_of_controller_and_namespaces(void **state)
{
    struct fixture *f = create_ready("raw", false);
    const void *page = data_at(f, NVME_DATA, 4096);
    const struct nvme_id_controller *id = page;
    const struct nvme_id_namespace *ns = page;
    const u32 *list = page;
    u8 first[16];

    assert_int_equal(nvme_reg(f->t, NVME_REG_VS), 0x10400);
    assert_int_equal(nvme_reg(f->t, NVME_REG_CAP) & 0xffff, 255);
    assert_int_equal(identify(f, NVME_CNS_CONTROLLER, 0), 0);
    assert_memory_equal(id->sn, "number 1            ", 20);
    assert_int_equal(id->nn, 2);
    assert_int_equal(id->sqes, 0x66);
    assert_int_equal(id->cqes, 0x44);
    assert_int_equal(id->ver, 0x10400);
    assert_memory_equal(id->subnqn, "nqn.2014-08.org.nvmexpress:uuid:", 32);
    assert_int_equal(strlen(id->subnqn), 68);
    assert_int_equal(identify(f, NVME_CNS_NAMESPACE, 1), 0);
    assert_int_equal(ns->nsze, BLOCKS);
    assert_int_equal(ns->lbaf[0], 9 << 16);
    assert_int_equal(ns->nsattr, 0);
    assert_int_equal(identify(f, NVME_CNS_NAMESPACE, 2), 0);
    assert_int_equal(ns->nsze, KIB(64) / 512);
    assert_int_equal(ns->nsattr, NVME_ID_NSATTR_PROTECTED);
    assert_int_equal(identify(f, NVME_CNS_NAMESPACE, NVME_NSID_ALL), 0);
    assert_int_equal(ns->nsze, 0);
    assert_int_equal(identify(f, NVME_CNS_NAMESPACE, 3), NVME_INVALID_NAMESPACE);
    assert_int_equal(identify(f, NVME_CNS_ACTIVE_NAMESPACES, 0), 0);
    assert_true(list[0] == 1 && list[1] == 2 && list[2] == 0);
    assert_int_equal(identify(f, NVME_CNS_ACTIVE_NAMESPACES, 1), 0);
    assert_true(list[0] == 2 && list[1] == 0);
    assert_int_equal(identify(f, NVME_CNS_ACTIVE_NAMESPACES, NVME_NSID_ALL),
                     NVME_INVALID_NAMESPACE);
    assert_int_equal(identify(f, NVME_CNS_DESCRIPTORS, 1), 0);
    memcpy(first, list + 1, sizeof(first));
    assert_int_equal(identify(f, NVME_CNS_DESCRIPTORS, 2), 0);
    assert_memory_not_equal(first, list + 1, sizeof(first));
    assert_int_equal(identify(f, NVME_CNS_DESCRIPTORS, 0), NVME_INVALID_NAMESPACE);
    assert_int_equal(identify(f, 0x77, 0), NVME_INVALID_FIELD);
    destroy(f);
}

static unsigned log_page(struct fixture *f, u32 id, u32 bytes, u32 offset)
{
    struct nvme_command cmd = {.opcode = NVME_ADMIN_GET_LOG_PAGE,
                               .nsid = NVME_NSID_ALL,
                               .prp1 = NVME_DATA,
                               .cdw10 = (bytes / 4 - 1) << 16 | id,
                               .cdw12 = offset};

    return nvme_do(f->t, 0, &cmd, NULL);
}

static void logs_count_what_was_done(void **state)
{
    struct fixture *f = create_ready("raw", false);
    const void *page = data_at(f, NVME_DATA, 4096);
    const struct nvme_health *h = page;
    const struct nvme_error_entry *e = page;
    const struct nvme_effects *effects = page;

    for (unsigned i = 0; i < 3; i++)
        assert_int_equal(do_transfer(f, NVME_READ, 0, 8, NVME_DATA, 0), 0);
    assert_int_equal(do_transfer(f, NVME_WRITE, 0, 8, NVME_DATA, 0), 0);
    assert_int_equal(do_transfer(f, NVME_WRITE, BLOCKS, 8, NVME_DATA, 0), NVME_LBA_OUT_OF_RANGE);
    assert_int_equal(log_page(f, NVME_LOG_HEALTH, 512, 0), 0);
    assert_int_equal(h->commands_read[0], 3);
    assert_int_equal(h->commands_written[0], 1);
    assert_int_equal(h->units_read[0], 1);
    assert_int_equal(h->errors[0], 1);
    assert_int_equal(log_page(f, NVME_LOG_ERRORS, 64, 0), 0);
    assert_int_equal(e->count, 1);
    assert_int_equal(e->sq_id, 1);
    assert_int_equal(e->status >> 1 & 0x7ff, NVME_LBA_OUT_OF_RANGE);
    assert_int_equal(log_page(f, NVME_LOG_FIRMWARE, 512, 0), 0);
    assert_memory_equal((const u8 *)page + 8, "1       ", 8);
    assert_int_equal(log_page(f, NVME_LOG_EFFECTS, 4096, 0), 0);
    assert_true(effects->io[NVME_WRITE] & NVME_EFFECT_CONTENT);
    assert_int_equal(effects->io[0x05], 0);
    /* A part, and what lies outside. */
    assert_int_equal(log_page(f, NVME_LOG_FIRMWARE, 8, 8), 0);
    assert_memory_equal(page, "1       ", 8);
    assert_int_equal(log_page(f, NVME_LOG_FIRMWARE, 8, 516), NVME_INVALID_FIELD);
    assert_int_equal(log_page(f, 0x7f, 8, 0), NVME_INVALID_LOG_PAGE);
    destroy(f);
}

static unsigned feature(struct fixture *f, u8 opcode, u32 id, u32 value, u32 *result)
{
    struct nvme_command cmd = {.opcode = opcode, .cdw10 = id, .cdw11 = value};

    return nvme_do(f->t, 0, &cmd, result);
}

static void features_are_kept_until_a_reset(void **state)
{
    struct fixture *f = create("raw", false);
    const u8 set = NVME_ADMIN_SET_FEATURES, get = NVME_ADMIN_GET_FEATURES;
    u32 value;

    nvme_enable(f->t);
    assert_int_equal(feature(f, set, NVME_FEATURE_QUEUES, 0x00070007, &value), 0);
    assert_int_equal(value, 15 << 16 | 15);
    assert_int_equal(feature(f, set, NVME_FEATURE_QUEUES, 0xffff, NULL), NVME_INVALID_FIELD);
    assert_int_equal(feature(f, set, NVME_FEATURE_WRITE_CACHE, 0, NULL), 0);
    assert_int_equal(feature(f, get, NVME_FEATURE_WRITE_CACHE, 0, &value), 0);
    assert_int_equal(value, 0);
    assert_int_equal(feature(f, set, NVME_FEATURE_VECTOR, 1 << 16 | 3, NULL), 0);
    assert_int_equal(feature(f, get, NVME_FEATURE_VECTOR, 3, &value), 0);
    assert_int_equal(value, 1 << 16 | 3);
    assert_int_equal(feature(f, get, NVME_FEATURE_VECTOR, 2, &value), 0);
    assert_int_equal(value, 2);
    assert_int_equal(feature(f, set, NVME_FEATURE_VECTOR, 99, NULL), NVME_INVALID_FIELD);
    assert_int_equal(feature(f, set, NVME_FEATURE_POWER, 1, NULL), NVME_INVALID_FIELD);
    assert_int_equal(feature(f, set, 0x55, 1, NULL), NVME_INVALID_FIELD);
    assert_int_equal(feature(f, set, NVME_FEATURE_WRITE_CACHE | NVME_FEATURE_SAVE, 1, NULL),
                     NVME_FEATURE_NOT_SAVEABLE);
    nvme_disable(f->t);
    nvme_enable(f->t);
    assert_int_equal(feature(f, get, NVME_FEATURE_WRITE_CACHE, 0, &value), 0);
    assert_int_equal(value, 1);
    nvme_create_pair(f->t, 1);
    assert_int_equal(feature(f, set, NVME_FEATURE_QUEUES, 0, NULL), NVME_COMMAND_SEQUENCE_ERROR);
    destroy(f);
}

/* ---- data ---- */

static void data_go_by_prp(void **state)
{
    struct fixture *f = create_ready("raw", *state != NULL);
    const u64 len = 128 * 4096;
    gpa_t list = NVME_LIST + 4096 - 16; /* two entries in this page; the second leads on */

    fill(f, NVME_DATA, len, 11);
    /* Within a page; into the next; by a list. */
    assert_int_equal(do_transfer(f, NVME_WRITE, 3, 2, NVME_DATA + 0x204, 0), 0);
    expect(f, 3, data_at(f, NVME_DATA + 0x204, 1024), 1024);
    assert_int_equal(
        do_transfer(f, NVME_WRITE, 30, 8, NVME_DATA + 4096 - 512, NVME_DATA + 3 * 4096), 0);
    expect(f, 30, data_at(f, NVME_DATA + 4096 - 512, 512), 512);
    expect(f, 31, data_at(f, NVME_DATA + 3 * 4096, 3584), 3584);
    put64(f, NVME_LIST, NVME_DATA + 9 * 4096);
    put64(f, NVME_LIST + 8, NVME_DATA + 5 * 4096);
    assert_int_equal(do_transfer(f, NVME_WRITE, 64, 24, NVME_DATA, NVME_LIST), 0);
    expect(f, 72, data_at(f, NVME_DATA + 9 * 4096, 4096), 4096);
    expect(f, 80, data_at(f, NVME_DATA + 5 * 4096, 4096), 4096);
    /* The largest, by a chain of lists, in pages that lie backwards, and into memory again. */
    put64(f, list, NVME_DATA + 126 * 4096);
    put64(f, list + 8, NVME_LIST + 4096);
    for (unsigned i = 0; i < 126; i++)
        put64(f, NVME_LIST + 4096 + 8 * i, NVME_DATA + (125 - i) * 4096);
    assert_int_equal(do_transfer(f, NVME_WRITE, 256, 1024, NVME_DATA + 127 * 4096, list), 0);
    for (unsigned i = 0; i < 128; i += 31)
        expect(f, 256 + 8 * i, data_at(f, NVME_DATA + (127 - i) * 4096, 4096), 4096);
    memset(data_at(f, NVME_DATA, len), 0, len);
    assert_int_equal(do_transfer(f, NVME_READ, 256, 1024, NVME_DATA + 127 * 4096, list), 0);
    fill(f, NVME_DATA + len, len - 0x20000, 11);
    assert_memory_equal(data_at(f, NVME_DATA, len), data_at(f, NVME_DATA + len, len),
                        len - 0x20000);

    assert_int_equal(do_transfer(f, NVME_READ, 0, 1, NVME_DATA + 2, 0), NVME_INVALID_PRP_OFFSET);
    assert_int_equal(do_transfer(f, NVME_READ, 0, 9, NVME_DATA, NVME_DATA + 8),
                     NVME_INVALID_PRP_OFFSET);
    assert_int_equal(do_transfer(f, NVME_READ, 0, 24, NVME_DATA, NVME_LIST + 4),
                     NVME_INVALID_PRP_OFFSET);
    assert_int_equal(do_transfer(f, NVME_READ, 0, 24, NVME_DATA, GIB(5)), NVME_DATA_TRANSFER_ERROR);
    assert_int_equal(do_transfer(f, NVME_READ, 0, 1, GIB(5), 0), NVME_DATA_TRANSFER_ERROR);
    assert_int_equal(do_transfer(f, NVME_READ, 0, 1, ~0ULL & ~3ULL, 0), NVME_DATA_TRANSFER_ERROR);
    put64(f, NVME_LIST + 8, NVME_DATA + 512);
    assert_int_equal(do_transfer(f, NVME_READ, 0, 24, NVME_DATA, NVME_LIST),
                     NVME_INVALID_PRP_OFFSET);
    put64(f, list + 8, NVME_LIST + 8);
    assert_int_equal(do_transfer(f, NVME_READ, 0, 1024, NVME_DATA, list), NVME_INVALID_PRP_OFFSET);
    destroy(f);
}

static void put_sgl(struct fixture *f, gpa_t at, u8 type, gpa_t address, u32 len)
{
    struct nvme_sgl_descriptor s = {.address = address, .length = len, .type = type};

    memcpy(data_at(f, at, sizeof(s)), &s, sizeof(s));
}

static unsigned sgl_transfer(struct fixture *f, u8 opcode, u64 lba, u32 blocks, u8 type, gpa_t at,
                             u32 len)
{
    struct nvme_command cmd = transfer(opcode, lba, blocks, 0, 0);
    struct nvme_sgl_descriptor s = {.address = at, .length = len, .type = type};

    memcpy(&cmd.prp1, &s, sizeof(s));
    cmd.flags = 0x40;
    return nvme_do(f->t, 1, &cmd, NULL);
}

static void data_go_by_sgl(void **state)
{
    enum { BLOCK = NVME_SGL_DATA_BLOCK, SEGMENT = NVME_SGL_SEGMENT, LAST = NVME_SGL_LAST_SEGMENT };
    struct fixture *f = create_ready("raw", false);
    gpa_t more = NVME_LIST + 0x1000;
    u8 want[2048];

    fill(f, NVME_DATA, 0x10000, 12);
    assert_int_equal(sgl_transfer(f, NVME_WRITE, 8, 4, BLOCK, NVME_DATA + 3, 2048), 0);
    expect(f, 8, data_at(f, NVME_DATA + 3, 2048), 2048);
    put_sgl(f, NVME_LIST, BLOCK, NVME_DATA + 0x5001, 700);
    put_sgl(f, NVME_LIST + 16, BLOCK, NVME_DATA, 0);
    put_sgl(f, NVME_LIST + 32, SEGMENT, more + 32, 32);
    put_sgl(f, more + 32, BLOCK, NVME_DATA + 0x7000, 300);
    put_sgl(f, more + 48, LAST, more, 16);
    put_sgl(f, more, BLOCK, NVME_DATA + 0x100, 1048);
    assert_int_equal(sgl_transfer(f, NVME_WRITE, 16, 4, SEGMENT, NVME_LIST, 48), 0);
    memcpy(want, data_at(f, NVME_DATA + 0x5001, 700), 700);
    memcpy(want + 700, data_at(f, NVME_DATA + 0x7000, 300), 300);
    memcpy(want + 1000, data_at(f, NVME_DATA + 0x100, 1048), 1048);
    expect(f, 16, want, sizeof(want));

    assert_int_equal(sgl_transfer(f, NVME_WRITE, 0, 5, SEGMENT, NVME_LIST, 48),
                     NVME_INVALID_SGL_LENGTH);
    assert_int_equal(sgl_transfer(f, NVME_WRITE, 0, 1, SEGMENT, NVME_LIST, 48),
                     NVME_INVALID_SGL_LENGTH);
    assert_int_equal(sgl_transfer(f, NVME_WRITE, 0, 4, SEGMENT, NVME_LIST, 47),
                     NVME_INVALID_SGL_SEGMENT);
    assert_int_equal(sgl_transfer(f, NVME_WRITE, 0, 4, SEGMENT, NVME_LIST, 0),
                     NVME_INVALID_SGL_SEGMENT);
    assert_int_equal(sgl_transfer(f, NVME_WRITE, 0, 4, SEGMENT, NVME_LIST, 32),
                     NVME_INVALID_SGL_SEGMENT);
    assert_int_equal(sgl_transfer(f, NVME_WRITE, 0, 4, LAST, NVME_LIST, 48), NVME_INVALID_SGL_TYPE);
    assert_int_equal(sgl_transfer(f, NVME_WRITE, 0, 4, 0x10, NVME_DATA, 2048),
                     NVME_INVALID_SGL_TYPE);
    assert_int_equal(sgl_transfer(f, NVME_WRITE, 0, 4, SEGMENT, GIB(5), 48),
                     NVME_DATA_TRANSFER_ERROR);
    /* One that leads to itself for ever. */
    put_sgl(f, more, BLOCK, NVME_DATA, 0);
    put_sgl(f, more + 16, SEGMENT, more, 32);
    assert_int_equal(sgl_transfer(f, NVME_WRITE, 0, 4, SEGMENT, more, 32), NVME_INVALID_SGL_COUNT);
    destroy(f);
}

/* ---- the commands of a disk ---- */

static void a_flush_reaches_the_medium(void **state)
{
    struct fixture *f = create_ready("raw", false);
    struct nvme_command flush = {.opcode = NVME_FLUSH, .nsid = 1};
    struct nvme_command fua = transfer(NVME_WRITE, 0, 1, NVME_DATA, 0);

    assert_int_equal(do_transfer(f, NVME_WRITE, 0, 1, NVME_DATA, 0), 0);
    assert_int_equal(f->disk->flushes, 0);
    assert_int_equal(nvme_do(f->t, 1, &flush, NULL), 0);
    assert_int_equal(f->disk->flushes, 1);
    fua.cdw12 |= NVME_RW_FUA;
    assert_int_equal(nvme_do(f->t, 1, &fua, NULL), 0);
    assert_int_equal(f->disk->flushes, 2);
    assert_int_equal(feature(f, NVME_ADMIN_SET_FEATURES, NVME_FEATURE_WRITE_CACHE, 0, NULL), 0);
    assert_int_equal(do_transfer(f, NVME_WRITE, 0, 1, NVME_DATA, 0), 0);
    assert_int_equal(f->disk->flushes, 3);
    flush.nsid = NVME_NSID_ALL;
    assert_int_equal(nvme_do(f->t, 1, &flush, NULL), NVME_INVALID_NAMESPACE);
    destroy(f);
}

static unsigned deallocate(struct fixture *f, const struct nvme_range *ranges, unsigned n)
{
    struct nvme_command cmd = {.opcode = NVME_DATASET_MANAGEMENT,
                               .nsid = 1,
                               .prp1 = NVME_LIST,
                               .cdw10 = n - 1,
                               .cdw11 = NVME_DSM_DEALLOCATE};

    memcpy(data_at(f, NVME_LIST, n * sizeof(*ranges)), ranges, n * sizeof(*ranges));
    return nvme_do(f->t, 1, &cmd, NULL);
}

static void zeroes_and_discards(void **state)
{
    static const u8 zeroes[4096];
    struct fixture *f = create_ready("qcow2", false);
    struct nvme_command zero = transfer(NVME_WRITE_ZEROES, 2, 3, 0, 0);
    struct nvme_range ranges[3] = {{0, 128, 128}, {0, 0, 5}, {0, 256, 512}};

    fill(f, NVME_DATA, 4096, 13);
    for (u64 lba = 0; lba < 1024; lba += 8)
        assert_int_equal(do_transfer(f, NVME_WRITE, lba, 8, NVME_DATA, 0), 0);
    assert_int_equal(nvme_do(f->t, 1, &zero, NULL), 0);
    expect(f, 0, data_at(f, NVME_DATA, 1024), 1024);
    expect(f, 2, zeroes, 3 * 512);
    expect(f, 5, data_at(f, NVME_DATA + 5 * 512, 512), 512);
    assert_int_equal(deallocate(f, ranges, 3), 0);
    expect(f, 128, zeroes, 4096);
    expect(f, 256, data_at(f, NVME_DATA, 4096), 4096);
    expect(f, 512 + 248, zeroes, 4096);
    expect(f, 512 + 256, data_at(f, NVME_DATA, 4096), 4096);
    ranges[2].lba = BLOCKS - 255;
    assert_int_equal(deallocate(f, ranges, 3), NVME_LBA_OUT_OF_RANGE);
    zero = transfer(NVME_WRITE_ZEROES, BLOCKS - 1, 2, 0, 0);
    assert_int_equal(nvme_do(f->t, 1, &zero, NULL), NVME_LBA_OUT_OF_RANGE);
    zero = transfer(NVME_WRITE_ZEROES, 1016, 8, 0, 0);
    zero.cdw12 |= NVME_ZEROES_DEAC;
    assert_int_equal(nvme_do(f->t, 1, &zero, NULL), 0);
    expect(f, 1016, zeroes, 4096);
    destroy(f);
}

static void what_no_disk_can_do_is_refused(void **state)
{
    struct fixture *f = create_ready("raw", false);
    struct nvme_command cmd = transfer(NVME_READ, 0, 1, NVME_DATA, 0);

    assert_int_equal(do_transfer(f, NVME_READ, BLOCKS - 1, 2, NVME_DATA, 0), NVME_LBA_OUT_OF_RANGE);
    assert_int_equal(do_transfer(f, NVME_READ, ~0ULL, 2, NVME_DATA, 0), NVME_LBA_OUT_OF_RANGE);
    assert_int_equal(do_transfer(f, NVME_READ, 0, 1025, NVME_DATA, NVME_LIST), NVME_INVALID_FIELD);
    assert_int_equal(do_transfer(f, 0x55, 0, 1, NVME_DATA, 0), NVME_INVALID_OPCODE);
    cmd.nsid = 3;
    assert_int_equal(nvme_do(f->t, 1, &cmd, NULL), NVME_INVALID_NAMESPACE);
    cmd.nsid = 2;
    assert_int_equal(nvme_do(f->t, 1, &cmd, NULL), 0);
    assert_int_equal(*data_at(f, NVME_DATA + 77, 1), disk_pattern(77));
    cmd.opcode = NVME_WRITE;
    assert_int_equal(nvme_do(f->t, 1, &cmd, NULL), NVME_WRITE_PROTECTED);
    cmd = transfer(NVME_READ, 0, 1, NVME_DATA, 0);
    cmd.flags = 1;
    assert_int_equal(nvme_do(f->t, 1, &cmd, NULL), NVME_INVALID_FIELD);
    cmd.flags = 0xc0;
    assert_int_equal(nvme_do(f->t, 1, &cmd, NULL), NVME_INVALID_FIELD);
    cmd = (struct nvme_command){.opcode = 0x7f};
    assert_int_equal(nvme_do(f->t, 0, &cmd, NULL), NVME_INVALID_OPCODE);
    destroy(f);
}

/* ---- queues ---- */

static unsigned delete_queue(struct fixture *f, u8 opcode, u32 q)
{
    struct nvme_command cmd = {.opcode = opcode, .cdw10 = q};

    return nvme_do(f->t, 0, &cmd, NULL);
}

static void queues_come_and_go(void **state)
{
    struct fixture *f = create("raw", false);
    struct nvme_command cmd = {.opcode = NVME_ADMIN_CREATE_CQ,
                               .prp1 = NVME_CQ(1),
                               .cdw10 = 7 << 16 | 1,
                               .cdw11 = NVME_QUEUE_CONTIGUOUS};

    nvme_enable(f->t);
    assert_int_equal(nvme_create_cq(f->t, 0, 16, 0), NVME_INVALID_QUEUE_ID);
    assert_int_equal(nvme_create_cq(f->t, 17, 16, 0), NVME_INVALID_QUEUE_ID);
    assert_int_equal(nvme_create_cq(f->t, 1, 1, 0), NVME_INVALID_QUEUE_SIZE);
    assert_int_equal(nvme_create_cq(f->t, 1, 257, 0), NVME_INVALID_QUEUE_SIZE);
    assert_int_equal(nvme_create_cq(f->t, 1, 16, 17), NVME_INVALID_VECTOR);
    cmd.cdw11 = 0;
    assert_int_equal(nvme_do(f->t, 0, &cmd, NULL), NVME_INVALID_FIELD);
    cmd.cdw11 = NVME_QUEUE_CONTIGUOUS;
    cmd.prp1 += 8;
    assert_int_equal(nvme_do(f->t, 0, &cmd, NULL), NVME_INVALID_PRP_OFFSET);
    assert_int_equal(nvme_create_sq(f->t, 1, 16, 1), NVME_INVALID_COMPLETION_QUEUE);
    nvme_create_pair(f->t, 1);
    assert_int_equal(nvme_create_cq(f->t, 1, 16, 1), NVME_INVALID_QUEUE_ID);
    assert_int_equal(nvme_create_sq(f->t, 1, 16, 1), NVME_INVALID_QUEUE_ID);
    assert_int_equal(do_transfer(f, NVME_READ, 0, 1, NVME_DATA, 0), 0);
    assert_int_equal(delete_queue(f, NVME_ADMIN_DELETE_CQ, 1), NVME_INVALID_QUEUE_DELETION);
    assert_int_equal(delete_queue(f, NVME_ADMIN_DELETE_SQ, 2), NVME_INVALID_QUEUE_ID);
    assert_int_equal(delete_queue(f, NVME_ADMIN_DELETE_SQ, 0), NVME_INVALID_QUEUE_ID);
    assert_int_equal(delete_queue(f, NVME_ADMIN_DELETE_SQ, 1), 0);
    assert_int_equal(delete_queue(f, NVME_ADMIN_DELETE_SQ, 1), NVME_INVALID_QUEUE_ID);
    assert_int_equal(delete_queue(f, NVME_ADMIN_DELETE_CQ, 1), 0);
    assert_int_equal(delete_queue(f, NVME_ADMIN_DELETE_CQ, 1), NVME_INVALID_QUEUE_ID);
    nvme_create_pair(f->t, 1);
    assert_int_equal(do_transfer(f, NVME_READ, 0, 1, NVME_DATA, 0), 0);
    destroy(f);
}

/* The queue is gone only when nothing of it writes to memory any more. */
static void deleting_a_queue_waits_for_its_commands(void **state)
{
    struct fixture *f = create_ready("raw", false);
    struct nvme_command read = transfer(NVME_READ, 0, 1, NVME_DATA, 0);
    struct nvme_command delete = {.opcode = NVME_ADMIN_DELETE_SQ, .cdw10 = 1};
    struct nvme_completion e;

    f->disk->held = 1;
    nvme_queue_command(f->t, 1, &read);
    nvme_ring(f->t, 1);
    rig_run_loop(f->r);
    nvme_queue_command(f->t, 0, &delete);
    nvme_ring(f->t, 0);
    for (unsigned i = 0; i < 10; i++)
        rig_run_loop(f->r);
    assert_false(nvme_take(f->t, 0, &e));
    __atomic_store_n(&f->disk->held, 0, __ATOMIC_SEQ_CST);
    e = nvme_wait(f->t, 0);
    assert_int_equal(nvme_status_of(&e), 0);
    assert_true(nvme_take(f->t, 1, &e));
    assert_int_equal(delete_queue(f, NVME_ADMIN_DELETE_CQ, 1), 0);
    destroy(f);
}

/* More commands than places for their completions: none is lost, and none written over. */
static void a_full_completion_queue_holds_commands_back(void **state)
{
    struct fixture *f = create("raw", false);
    struct nvme_command read = transfer(NVME_READ, 0, 1, NVME_DATA, 0);
    struct nvme_completion e;
    u16 first;

    nvme_enable(f->t);
    nvme_clear_queue(f->t, 1, 4);
    assert_int_equal(nvme_create_cq(f->t, 1, 4, 1), 0);
    assert_int_equal(nvme_create_sq(f->t, 1, NVME_RIG_ENTRIES, 1), 0);
    first = f->t->cid;
    f->t->size[1] = NVME_RIG_ENTRIES;
    for (unsigned i = 0; i < 12; i++)
        nvme_queue_command(f->t, 1, &read);
    nvme_ring(f->t, 1);
    f->t->size[1] = 4;
    for (unsigned i = 0; i < 50; i++) {
        rig_run_loop(f->r);
        poll(NULL, 0, 1);
    }
    for (unsigned i = 0; i < 12; i++) {
        e = nvme_wait(f->t, 1);
        assert_in_range(e.cid, first, first + 11);
        assert_int_equal(nvme_status_of(&e), 0);
    }
    for (unsigned i = 0; i < 5; i++)
        rig_run_loop(f->r);
    assert_false(nvme_take(f->t, 1, &e));
    destroy(f);
}

static void a_wrong_doorbell_is_told_as_an_event(void **state)
{
    struct fixture *f = create_ready("raw", false);
    struct nvme_command ask = {.opcode = NVME_ADMIN_ASYNC_EVENT};
    struct nvme_command abort = {.opcode = NVME_ADMIN_ABORT};
    struct nvme_completion e;
    u16 cid[5];
    u32 result;

    for (unsigned i = 0; i < 5; i++)
        cid[i] = nvme_queue_command(f->t, 0, &ask);
    nvme_ring(f->t, 0);
    e = nvme_wait(f->t, 0); /* one is too many */
    assert_int_equal(e.cid, cid[4]);
    assert_int_equal(nvme_status_of(&e), NVME_ASYNC_LIMIT_EXCEEDED);
    nvme_set_reg(f->t, NVME_REG_DOORBELLS + 8, 999);
    e = nvme_wait(f->t, 0);
    assert_int_equal(nvme_status_of(&e), 0);
    assert_int_equal(e.result, NVME_LOG_ERRORS << 16 | NVME_EVENT_INVALID_VALUE << 8);
    /* Masked until the log was read. */
    nvme_set_reg(f->t, NVME_REG_DOORBELLS + 12, 999);
    nvme_set_reg(f->t, NVME_REG_DOORBELLS + 8, 999);
    rig_run_loop(f->r);
    assert_false(nvme_take(f->t, 0, &e));
    assert_int_equal(log_page(f, NVME_LOG_ERRORS, 64, 0), 0);
    e = nvme_wait(f->t, 0);
    assert_int_equal(e.result, NVME_LOG_ERRORS << 16 | NVME_EVENT_INVALID_VALUE << 8);
    destroy(f);

    f = create_ready("raw", false);
    cid[0] = nvme_queue_command(f->t, 0, &ask);
    nvme_ring(f->t, 0);
    rig_run_loop(f->r);
    abort.cdw10 = (u32)cid[0] << 16;
    nvme_queue_command(f->t, 0, &abort);
    nvme_ring(f->t, 0);
    e = nvme_wait(f->t, 0);
    assert_int_equal(e.cid, cid[0]);
    assert_int_equal(nvme_status_of(&e), NVME_ABORTED);
    e = nvme_wait(f->t, 0);
    assert_int_equal(e.result, 0);
    assert_int_equal(nvme_do(f->t, 0, &abort, &result), 0);
    assert_int_equal(result, 1);
    /* The queue that was told nonsense still works. */
    assert_int_equal(do_transfer(f, NVME_READ, 0, 1, NVME_DATA, 0), 0);
    destroy(f);
}

/* ---- interrupts ---- */

static void interrupts_by_msix(void **state)
{
    struct fixture *f = create_ready("raw", false);

    nvme_enable_msix(f->t);
    f->r->messages = 0;
    assert_int_equal(do_transfer(f, NVME_READ, 0, 1, NVME_DATA, 0), 0);
    assert_int_equal(f->r->messages, 1);
    assert_int_equal(f->r->msi_data, 0x41);
    assert_int_equal(identify(f, NVME_CNS_CONTROLLER, 0), 0);
    assert_int_equal(f->r->msi_data, 0x40);
    for (unsigned i = 0; i < PCI_PIRQS; i++)
        assert_false(f->r->levels[i]);
    destroy(f);
}

static bool line_is_high(struct fixture *f)
{
    return f->r->levels[pci_host_pirq(PCI_SLOT(NVME_DEVFN), 0)];
}

static void interrupts_by_a_line(void **state)
{
    struct fixture *f = create_ready("raw", false);
    struct nvme_command id = {
        .opcode = NVME_ADMIN_IDENTIFY, .prp1 = NVME_DATA, .cdw10 = NVME_CNS_CONTROLLER};
    struct nvme_completion e;

    assert_false(line_is_high(f));
    nvme_queue_command(f->t, 0, &id);
    nvme_ring(f->t, 0);
    rig_run_loop(f->r);
    assert_true(line_is_high(f));
    nvme_set_reg(f->t, NVME_REG_INTMS, 1);
    assert_false(line_is_high(f));
    assert_int_equal(nvme_reg(f->t, NVME_REG_INTMC), 1);
    nvme_set_reg(f->t, NVME_REG_INTMC, 1);
    assert_true(line_is_high(f));
    assert_true(nvme_take(f->t, 0, &e));
    assert_false(line_is_high(f));
    destroy(f);
}

/* ---- resets ---- */

static void a_reset_waits_for_the_disk(void **state)
{
    struct fixture *f = create("qcow2", false);

    for (unsigned round = 0; round < 6; round++) {
        struct nvme_command cmd =
            transfer(round % 2 ? NVME_READ : NVME_WRITE, round, 8, NVME_DATA, 0);

        assert_int_equal(nvme_enable(f->t), NVME_CSTS_RDY);
        nvme_create_pair(f->t, 1);
        __atomic_store_n(&f->disk->held, 1, __ATOMIC_SEQ_CST);
        nvme_queue_command(f->t, 1, &cmd);
        nvme_ring(f->t, 1);
        rig_run_loop(f->r);
        nvme_set_reg(f->t, NVME_REG_CC, 0);
        rig_run_loop(f->r);
        assert_true(nvme_reg(f->t, NVME_REG_CSTS) & NVME_CSTS_RDY);
        __atomic_store_n(&f->disk->held, 0, __ATOMIC_SEQ_CST);
        nvme_disable(f->t);
        assert_false(nvme_device(f->t->nvme)->ops->busy(nvme_device(f->t->nvme)));
    }
    destroy(f);
}

static void a_shutdown_flushes(void **state)
{
    struct fixture *f = create_ready("raw", false);

    nvme_set_reg(f->t, NVME_REG_CC, nvme_reg(f->t, NVME_REG_CC) | 1 << 14);
    for (unsigned i = 0;
         (nvme_reg(f->t, NVME_REG_CSTS) & NVME_CSTS_SHST) != NVME_CSTS_SHST_COMPLETE; i++) {
        assert_true(i < 5000);
        rig_run_loop(f->r);
        poll(NULL, 0, 1);
    }
    assert_int_equal(f->disk->flushes, 1);
    nvme_disable(f->t);
    assert_int_equal(nvme_enable(f->t), NVME_CSTS_RDY);
    destroy(f);
}

static void queues_that_are_no_memory_need_a_reset(void **state)
{
    struct fixture *f = create("raw", false);

    nvme_enable(f->t);
    nvme_disable(f->t);
    nvme_set_reg64(f->t, NVME_REG_ASQ, GIB(5));
    nvme_set_reg(f->t, NVME_REG_CC, NVME_CC_EN);
    nvme_set_reg(f->t, NVME_REG_DOORBELLS, 1);
    rig_run_loop(f->r);
    assert_int_equal(nvme_reg(f->t, NVME_REG_CSTS), NVME_CSTS_RDY | NVME_CSTS_CFS);
    nvme_set_reg(f->t, NVME_REG_CC, 0);
    assert_int_equal(nvme_reg(f->t, NVME_REG_CSTS), 0);
    nvme_set_reg(f->t, NVME_REG_CC, NVME_CC_EN | 1 << 7); /* pages of 8 KiB */
    assert_int_equal(nvme_reg(f->t, NVME_REG_CSTS), NVME_CSTS_CFS);
    nvme_disable(f->t);
    nvme_set_reg64(f->t, NVME_REG_ACQ, GIB(5));
    nvme_set_reg64(f->t, NVME_REG_ASQ, NVME_SQ(0));
    nvme_set_reg(f->t, NVME_REG_CC, NVME_CC_EN);
    nvme_set_reg(f->t, NVME_REG_DOORBELLS, 1);
    rig_run_loop(f->r);
    assert_int_equal(nvme_reg(f->t, NVME_REG_CSTS), NVME_CSTS_RDY | NVME_CSTS_CFS);
    nvme_disable(f->t);
    assert_int_equal(nvme_enable(f->t), NVME_CSTS_RDY);
    assert_int_equal(identify(f, NVME_CNS_CONTROLLER, 0), 0);
    destroy(f);
}

/* ---- errors of the host's ---- */

static void a_failed_write_is_told(void **state)
{
    struct fixture *f = create_ready("raw", false);

    __atomic_store_n(&f->disk->error, -ENOSPC, __ATOMIC_SEQ_CST);
    assert_int_equal(do_transfer(f, NVME_WRITE, 8, 1, NVME_DATA, 0), NVME_CAPACITY_EXCEEDED);
    __atomic_store_n(&f->disk->error, -EIO, __ATOMIC_SEQ_CST);
    assert_int_equal(do_transfer(f, NVME_WRITE, 8, 1, NVME_DATA, 0), NVME_WRITE_FAULT);
    __atomic_store_n(&f->disk->error, 0, __ATOMIC_SEQ_CST);
    assert_int_equal(do_transfer(f, NVME_WRITE, 8, 1, NVME_DATA, 0), 0);
    destroy(f);
}

static void stopped(void *opaque, const char *disk, int error)
{
    struct fixture *f = opaque;

    f->stops++;
    assert_int_equal(error, ENOSPC);
}

static void werror_stop_keeps_the_write_until_there_is_space(void **state)
{
    struct fixture *f = create_ready("raw", false);
    struct device *dev = nvme_device(f->t->nvme);
    struct nvme_command write = transfer(NVME_WRITE, 9, 1, NVME_DATA, 0);
    struct nvme_completion e;

    block_stop_on_error(f->backend[0], stopped, f);
    fill(f, NVME_DATA, 512, 14);
    __atomic_store_n(&f->disk->error, -ENOSPC, __ATOMIC_SEQ_CST);
    nvme_queue_command(f->t, 1, &write);
    nvme_ring(f->t, 1);
    for (unsigned i = 0; i < 5000 && !f->stops; i++) {
        rig_run_loop(f->r);
        poll(NULL, 0, 1);
    }
    assert_int_equal(f->stops, 1);
    dev->ops->stop(dev);
    assert_true(dev->ops->busy(dev));
    assert_false(nvme_take(f->t, 1, &e));
    __atomic_store_n(&f->disk->error, 0, __ATOMIC_SEQ_CST);
    dev->ops->start(dev);
    block_resume(f->backend[0]);
    e = nvme_wait(f->t, 1);
    assert_int_equal(nvme_status_of(&e), 0);
    expect(f, 9, data_at(f, NVME_DATA, 512), 512);
    /* A machine that ends with one kept. */
    __atomic_store_n(&f->disk->error, -ENOSPC, __ATOMIC_SEQ_CST);
    nvme_queue_command(f->t, 1, &write);
    nvme_ring(f->t, 1);
    rig_run_loop(f->r);
    destroy(f);
}

/* ---- all together ---- */

/* Both queues at once, over each other's places, discards among them: all come back. */
static void many_commands_at_once_come_back(void **state)
{
    struct fixture *f = create_ready("qcow2", *state != NULL);
    u64 seed = 6;

    for (unsigned round = 0; round < 40; round++) {
        unsigned back = 0;

        for (unsigned q = 1; q <= 2; q++) {
            for (unsigned i = 0; i < NVME_RIG_ENTRIES - 1; i++) {
                static const u8 opcodes[] = {NVME_WRITE,        NVME_WRITE,
                                             NVME_READ,         NVME_FLUSH,
                                             NVME_WRITE_ZEROES, NVME_DATASET_MANAGEMENT};
                gpa_t at = NVME_DATA + 0x2000 * (q * NVME_RIG_ENTRIES + i);
                u64 lba = rig_random(&seed) % (BLOCKS - 64);
                struct nvme_command cmd = transfer(opcodes[rig_random(&seed) % ARRAY_SIZE(opcodes)],
                                                   lba, 16, at, at + 0x1000);

                if (cmd.opcode == NVME_DATASET_MANAGEMENT) {
                    struct nvme_range range = {.lba = lba, .blocks = 48};

                    memcpy(data_at(f, at, sizeof(range)), &range, sizeof(range));
                    cmd.cdw10 = 0;
                    cmd.cdw11 = NVME_DSM_DEALLOCATE;
                }
                nvme_queue_command(f->t, q, &cmd);
            }
            nvme_ring(f->t, q);
        }
        for (unsigned i = 0; back < 2 * (NVME_RIG_ENTRIES - 1); i++) {
            struct nvme_completion e;

            assert_true(i < 5000);
            for (unsigned q = 1; q <= 2; q++)
                while (nvme_take(f->t, q, &e)) {
                    assert_int_equal(nvme_status_of(&e), 0);
                    back++;
                }
            rig_run_loop(f->r);
            poll(NULL, 0, 1);
        }
    }
    destroy(f);
}

static void state_survives_the_round_trip(void **state)
{
    struct fixture *f = create_ready("raw", false);
    struct nvme_config cfg = {.serial = "number 1", .count = 2};
    struct device *dev = nvme_device(f->t->nvme);
    struct nvme_command ask = {.opcode = NVME_ADMIN_ASYNC_EVENT};
    struct nvme *fresh;
    char buf[128];
    const char *wrong;

    memcpy(cfg.namespaces, f->backend, sizeof(f->backend));
    fresh = nvme_create(&f->r->env, &cfg, f->t->host, PCI_DEVFN(7, 0), &f->r->err);
    nvme_queue_command(f->t, 0, &ask);
    nvme_ring(f->t, 0);
    assert_int_equal(do_transfer(f, NVME_WRITE, 0, 1, NVME_DATA, 0), 0);
    assert_int_equal(feature(f, NVME_ADMIN_SET_FEATURES, NVME_FEATURE_WRITE_CACHE, 0, NULL), 0);
    wrong = rig_round_trip(f->r, dev, nvme_device(fresh), buf, sizeof(buf));
    if (wrong)
        fail_msg("%s", wrong);
    /* It goes on from there, where the first one was. */
    dev->ops->destroy(dev);
    f->t->nvme = fresh;
    config_write(f->r, PCI_DEVFN(7, 0), PCI_BASE_ADDRESS_0, NVME_BAR, 4);
    assert_int_equal(do_transfer(f, NVME_READ, 0, 1, NVME_DATA, 0), 0);
    destroy(f);
}

static void an_impossible_state_is_refused(void **state)
{
    struct fixture *f = create_ready("raw", false);
    struct device *dev = nvme_device(f->t->nvme);
    size_t len = state_size(dev->state);
    u8 *bytes = malloc(len);
    unsigned refused = 0;

    state_save(dev->state, dev, bytes);
    assert_int_equal(state_load(dev->state, dev, bytes, len, &f->r->err), 0);
    for (size_t i = 0; i < len; i++) {
        u8 old = bytes[i];

        bytes[i] ^= 0x80;
        refused += state_load(dev->state, dev, bytes, len, &f->r->err) != 0;
        bytes[i] = old;
    }
    assert_true(refused > 20);
    assert_int_equal(state_load(dev->state, dev, bytes, len, &f->r->err), 0);
    free(bytes);
    assert_int_equal(do_transfer(f, NVME_READ, 0, 1, NVME_DATA, 0), 0);
    destroy(f);
}

int main(void)
{
    static int pool_only;
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(identify_tells_of_controller_and_namespaces),
        cmocka_unit_test(logs_count_what_was_done),
        cmocka_unit_test(features_are_kept_until_a_reset),
        cmocka_unit_test(data_go_by_prp),
        cmocka_unit_test_prestate(data_go_by_prp, &pool_only),
        cmocka_unit_test(data_go_by_sgl),
        cmocka_unit_test(a_flush_reaches_the_medium),
        cmocka_unit_test(zeroes_and_discards),
        cmocka_unit_test(what_no_disk_can_do_is_refused),
        cmocka_unit_test(queues_come_and_go),
        cmocka_unit_test(deleting_a_queue_waits_for_its_commands),
        cmocka_unit_test(a_full_completion_queue_holds_commands_back),
        cmocka_unit_test(a_wrong_doorbell_is_told_as_an_event),
        cmocka_unit_test(interrupts_by_msix),
        cmocka_unit_test(interrupts_by_a_line),
        cmocka_unit_test(a_reset_waits_for_the_disk),
        cmocka_unit_test(a_shutdown_flushes),
        cmocka_unit_test(queues_that_are_no_memory_need_a_reset),
        cmocka_unit_test(a_failed_write_is_told),
        cmocka_unit_test(werror_stop_keeps_the_write_until_there_is_space),
        cmocka_unit_test(many_commands_at_once_come_back),
        cmocka_unit_test_prestate(many_commands_at_once_come_back, &pool_only),
        cmocka_unit_test(state_survives_the_round_trip),
        cmocka_unit_test(an_impossible_state_is_refused),
    };
    return cmocka_run_group_tests_name("nvme", tests, folder_make, folder_remove);
}
