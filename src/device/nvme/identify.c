/*
 * What the controller tells of itself: Identify (NVM Express 1.4, 5.15) and the log pages (5.14).
 */
#include "device/nvme/internal.h"

#include <stdio.h>
#include <string.h>

#define MODEL "doppel NVMe disk"
#define FIRMWARE "1"
#define POWER_MAX 2500       /* of the one power state, in 10 mW */
#define TEMPERATURE 310      /* kelvin; there is no sensor */
#define TEMPERATURE_WARN 343 /* as the default threshold */
#define TEMPERATURE_CRITICAL 373
#define SHUTDOWN_US 10000000 /* to expect */
#define PREFERRED_SECTORS 8  /* 4096 bytes: what files are made of */
#define LOG_PAGE_MAX 4096

/* Text fields are filled up with spaces, and don't end in a zero (1.5). */
static void put_text(char *field, size_t size, const char *text)
{
    memset(field, ' ', size);
    memcpy(field, text, strnlen(text, size));
}

/* A UUID that is the same for the same controller and namespace every time (RFC 9562, version 8). */
static void make_uuid(const struct nvme *n, u32 nsid, u8 uuid[16])
{
    u64 hash = 0xcbf29ce484222325ULL; /* FNV-1a */

    for (unsigned i = 0; i < 16; i++) {
        for (const char *s = n->serial; *s; s++)
            hash = (hash ^ (u8)*s) * 0x100000001b3ULL;
        hash = (hash ^ (nsid + i)) * 0x100000001b3ULL;
        uuid[i] = (u8)(hash >> 32);
    }
    uuid[6] = (uuid[6] & 0x0f) | 0x80;
    uuid[8] = (uuid[8] & 0x3f) | 0x80;
}

static void put_subsystem_name(const struct nvme *n, char *out, size_t size)
{
    u8 u[16];

    make_uuid(n, 0, u);
    snprintf(out, size,
             "nqn.2014-08.org.nvmexpress:uuid:"
             "%02x%02x%02x%02x-%02x%02x-%02x%02x-%02x%02x-%02x%02x%02x%02x%02x%02x",
             u[0], u[1], u[2], u[3], u[4], u[5], u[6], u[7], u[8], u[9], u[10], u[11], u[12], u[13],
             u[14], u[15]);
}

static enum nvme_status identify_controller(struct nvme_context *c)
{
    const struct nvme *n = c->n;
    struct nvme_id_controller id = {
        .vid = pci_config_get16(&n->pci, PCI_VENDOR_ID),
        .ssvid = pci_config_get16(&n->pci, PCI_SUBSYSTEM_VENDOR_ID),
        .mdts = NVME_MDTS,
        .ver = NVME_VERSION,
        .rtd3e = SHUTDOWN_US,
        .cntrltype = NVME_ID_CONTROLLER_IO,
        .acl = 3,
        .aerl = NVME_ASYNC_MAX - 1,
        .frmw = NVME_ID_FRMW_ONE_READ_ONLY,
        .lpa = NVME_ID_LPA_EFFECTS | NVME_ID_LPA_OFFSETS,
        .wctemp = TEMPERATURE_WARN,
        .cctemp = TEMPERATURE_CRITICAL,
        .sqes = NVME_SQE_LOG2 << 4 | NVME_SQE_LOG2,
        .cqes = NVME_CQE_LOG2 << 4 | NVME_CQE_LOG2,
        .nn = n->cfg.count,
        .oncs = NVME_ID_ONCS_DSM | NVME_ID_ONCS_WRITE_ZEROES,
        .vwc = NVME_ID_VWC_PRESENT | NVME_ID_VWC_NO_FLUSH_ALL,
        .sgls = NVME_ID_SGLS,
    };

    put_text(id.sn, sizeof(id.sn), n->serial);
    put_text(id.mn, sizeof(id.mn), MODEL);
    put_text(id.fr, sizeof(id.fr), FIRMWARE);
    put_subsystem_name(n, id.subnqn, sizeof(id.subnqn));
    id.psd[0].max_power = POWER_MAX;
    return nvme_data_to_guest(c->n, &c->cmd, &id, sizeof(id));
}

static enum nvme_status identify_namespace(struct nvme_context *c)
{
    const struct nvme_namespace *ns = nvme_namespace(c->n, c->cmd.nsid);
    struct nvme_id_namespace id = {
        .nsfeat = NVME_ID_NSFEAT_OPTIMAL_IO,
        .dlfeat = NVME_ID_DLFEAT_ZEROES | NVME_ID_DLFEAT_DEAC,
        .npwg = PREFERRED_SECTORS - 1,
        .npwa = PREFERRED_SECTORS - 1,
        .npdg = PREFERRED_SECTORS - 1,
        .npda = PREFERRED_SECTORS - 1,
        .lbaf = {9U << NVME_ID_LBADS_SHIFT},
    };

    /* What all namespaces have in common, for those that could be made. */
    if (c->cmd.nsid != NVME_NSID_ALL) {
        if (!ns)
            return NVME_INVALID_NAMESPACE;
        id.nsze = id.ncap = id.nuse = ns->blocks;
        id.nsattr = block_is_read_only(ns->backend) ? NVME_ID_NSATTR_PROTECTED : 0;
    }
    return nvme_data_to_guest(c->n, &c->cmd, &id, sizeof(id));
}

/* Those above the one that is given. */
static enum nvme_status identify_active(struct nvme_context *c)
{
    u32 ids[1024] = {0};
    unsigned count = 0;

    if (c->cmd.nsid >= NVME_NSID_ALL - 1)
        return NVME_INVALID_NAMESPACE;
    for (u32 nsid = c->cmd.nsid + 1; nsid <= c->n->cfg.count; nsid++)
        ids[count++] = nsid;
    return nvme_data_to_guest(c->n, &c->cmd, ids, sizeof(ids));
}

static enum nvme_status identify_descriptors(struct nvme_context *c)
{
    u8 list[4096] = {NVME_DESCRIPTOR_UUID, 16};

    if (!nvme_namespace(c->n, c->cmd.nsid))
        return NVME_INVALID_NAMESPACE;
    make_uuid(c->n, c->cmd.nsid, list + 4);
    return nvme_data_to_guest(c->n, &c->cmd, list, sizeof(list));
}

enum nvme_status nvme_identify(struct nvme_context *c)
{
    switch (c->cmd.cdw10 & 0xff) {
    case NVME_CNS_NAMESPACE:
        return identify_namespace(c);
    case NVME_CNS_CONTROLLER:
        return identify_controller(c);
    case NVME_CNS_ACTIVE_NAMESPACES:
        return identify_active(c);
    case NVME_CNS_DESCRIPTORS:
        return identify_descriptors(c);
    default:
        return NVME_INVALID_FIELD;
    }
}

/* ---- log pages: each returns its size ---- */

static size_t error_log(struct nvme *n, u8 *page)
{
    memcpy(page, &n->last_error, sizeof(n->last_error));
    return sizeof(n->last_error);
}

static size_t health_log(struct nvme *n, u8 *page)
{
    struct nvme_health h = {
        .temperature = TEMPERATURE,
        .spare = 100,
        .spare_threshold = 10,
        .units_read = {(n->stats.sectors_read + 999) / 1000},
        .units_written = {(n->stats.sectors_written + 999) / 1000},
        .commands_read = {n->stats.commands_read},
        .commands_written = {n->stats.commands_written},
        .media_errors = {n->stats.media_errors},
        .errors = {n->stats.errors},
    };

    memcpy(page, &h, sizeof(h));
    return sizeof(h);
}

static size_t firmware_log(struct nvme *n, u8 *page)
{
    page[0] = 1; /* the active slot */
    put_text((char *)page + 8, 8, FIRMWARE);
    return 512;
}

static size_t effects_log(struct nvme *n, u8 *page)
{
    static const struct nvme_effects effects = {
        .admin =
            {
                [NVME_ADMIN_DELETE_SQ] = NVME_EFFECT_SUPPORTED,
                [NVME_ADMIN_CREATE_SQ] = NVME_EFFECT_SUPPORTED,
                [NVME_ADMIN_GET_LOG_PAGE] = NVME_EFFECT_SUPPORTED,
                [NVME_ADMIN_DELETE_CQ] = NVME_EFFECT_SUPPORTED,
                [NVME_ADMIN_CREATE_CQ] = NVME_EFFECT_SUPPORTED,
                [NVME_ADMIN_IDENTIFY] = NVME_EFFECT_SUPPORTED,
                [NVME_ADMIN_ABORT] = NVME_EFFECT_SUPPORTED,
                [NVME_ADMIN_SET_FEATURES] = NVME_EFFECT_SUPPORTED,
                [NVME_ADMIN_GET_FEATURES] = NVME_EFFECT_SUPPORTED,
                [NVME_ADMIN_ASYNC_EVENT] = NVME_EFFECT_SUPPORTED,
            },
        .io =
            {
                [NVME_FLUSH] = NVME_EFFECT_SUPPORTED,
                [NVME_WRITE] = NVME_EFFECT_SUPPORTED | NVME_EFFECT_CONTENT,
                [NVME_READ] = NVME_EFFECT_SUPPORTED,
                [NVME_WRITE_ZEROES] = NVME_EFFECT_SUPPORTED | NVME_EFFECT_CONTENT,
                [NVME_DATASET_MANAGEMENT] = NVME_EFFECT_SUPPORTED | NVME_EFFECT_CONTENT,
            },
    };

    memcpy(page, &effects, sizeof(effects));
    return sizeof(effects);
}

enum nvme_status nvme_get_log_page(struct nvme_context *c)
{
    static size_t (*const logs[])(struct nvme * n, u8 * page) = {
        [NVME_LOG_ERRORS] = error_log,
        [NVME_LOG_HEALTH] = health_log,
        [NVME_LOG_FIRMWARE] = firmware_log,
        [NVME_LOG_EFFECTS] = effects_log,
    };
    u8 page[LOG_PAGE_MAX] = {0}, id = (u8)c->cmd.cdw10;
    u64 len = (((c->cmd.cdw11 & 0xffffULL) << 16 | c->cmd.cdw10 >> 16) + 1) * sizeof(u32);
    u64 offset = (u64)c->cmd.cdw13 << 32 | c->cmd.cdw12, size;
    enum nvme_status status;

    if (id >= ARRAY_SIZE(logs) || !logs[id])
        return NVME_INVALID_LOG_PAGE;
    size = logs[id](c->n, page);
    if (offset % sizeof(u32) || offset > size)
        return NVME_INVALID_FIELD;
    status = nvme_data_to_guest(c->n, &c->cmd, page + offset, MIN(len, size - offset));
    /* Who has read what went wrong wants to be told of the next (5.2). */
    if (!status && id == NVME_LOG_ERRORS && !(c->cmd.cdw10 & NVME_LOG_RETAIN_EVENT)) {
        c->n->events_masked = false;
        nvme_kick(c->n, BIT(0));
    }
    return status;
}
