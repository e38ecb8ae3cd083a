/*
 * Names and structures of NVM Express, revision 1.4 (June 2019); the numbers in brackets are its sections.
 */
#ifndef DOPPEL_DEVICE_NVME_REGS_H
#define DOPPEL_DEVICE_NVME_REGS_H

#include "host/types.h"

/* ---- controller registers (3.1) ---- */

#define NVME_REG_CAP 0x00 /* 64 bits */
#define NVME_REG_VS 0x08
#define NVME_REG_INTMS 0x0c
#define NVME_REG_INTMC 0x10
#define NVME_REG_CC 0x14
#define NVME_REG_CSTS 0x1c
#define NVME_REG_AQA 0x24
#define NVME_REG_ASQ 0x28 /* 64 bits */
#define NVME_REG_ACQ 0x30 /* 64 bits */
#define NVME_REG_DOORBELLS 0x1000

#define NVME_CAP_CQR BIT(16) /* queues must be contiguous in memory */
#define NVME_CAP_TO_SHIFT 24 /* of the time that RDY may take, in 500 ms */
#define NVME_CAP_CSS_NVM BIT(37)

#define NVME_VERSION 0x00010400U

#define NVME_CC_EN BIT32(0)
#define NVME_CC_CSS (7U << 4)
#define NVME_CC_MPS (15U << 7)
#define NVME_CC_AMS (7U << 11)
#define NVME_CC_SHN (3U << 14)
#define NVME_CC_IOSQES_SHIFT 16
#define NVME_CC_IOCQES_SHIFT 20
#define NVME_CC_WRITABLE 0x00fffff1U

#define NVME_CSTS_RDY BIT32(0)
#define NVME_CSTS_CFS BIT32(1)
#define NVME_CSTS_SHST (3U << 2)
#define NVME_CSTS_SHST_OCCURRING BIT32(2)
#define NVME_CSTS_SHST_COMPLETE BIT32(3)

#define NVME_SQE_LOG2 6
#define NVME_CQE_LOG2 4
#define NVME_PAGE_SIZE 4096U
#define NVME_NSID_ALL 0xffffffffU

/* ---- queue entries (4.2, 4.6) ---- */

struct nvme_command {
    u8 opcode;
    u8 flags; /* NVME_CMD_* */
    u16 cid;
    u32 nsid;
    u64 reserved;
    u64 metadata;
    u64 prp1, prp2; /* or an SGL descriptor */
    u32 cdw10, cdw11, cdw12, cdw13, cdw14, cdw15;
};
_Static_assert(sizeof(struct nvme_command) == 1 << NVME_SQE_LOG2, "4.2");

#define NVME_CMD_FUSE 0x03
#define NVME_CMD_PSDT 0xc0
#define NVME_CMD_PSDT_RESERVED 0xc0

struct nvme_completion {
    u32 result; /* command specific */
    u32 reserved;
    u16 sq_head, sq_id;
    u16 cid;
    u16 status; /* the phase tag in bit 0 */
};
_Static_assert(sizeof(struct nvme_completion) == 1 << NVME_CQE_LOG2, "4.6");

struct nvme_sgl_descriptor { /* 4.4 */
    u64 address;
    u32 length;
    u8 reserved[3];
    u8 type; /* the type in the upper half, its subtype in the lower */
};
#define NVME_SGL_DATA_BLOCK 0x00
#define NVME_SGL_SEGMENT 0x20
#define NVME_SGL_LAST_SEGMENT 0x30

/* ---- status: type and code, as in bits 10:0 of the field (4.6.1) ---- */

enum nvme_status {
    NVME_OK = 0x000,
    NVME_INVALID_OPCODE = 0x001,
    NVME_INVALID_FIELD = 0x002,
    NVME_DATA_TRANSFER_ERROR = 0x004,
    NVME_INTERNAL_ERROR = 0x006,
    NVME_ABORTED = 0x007,
    NVME_INVALID_NAMESPACE = 0x00b,
    NVME_COMMAND_SEQUENCE_ERROR = 0x00c,
    NVME_INVALID_SGL_SEGMENT = 0x00d,
    NVME_INVALID_SGL_COUNT = 0x00e,
    NVME_INVALID_SGL_LENGTH = 0x00f,
    NVME_INVALID_SGL_TYPE = 0x011,
    NVME_INVALID_PRP_OFFSET = 0x013,
    NVME_WRITE_PROTECTED = 0x020,
    NVME_LBA_OUT_OF_RANGE = 0x080,
    NVME_CAPACITY_EXCEEDED = 0x081,
    NVME_INVALID_COMPLETION_QUEUE = 0x100,
    NVME_INVALID_QUEUE_ID = 0x101,
    NVME_INVALID_QUEUE_SIZE = 0x102,
    NVME_ASYNC_LIMIT_EXCEEDED = 0x105,
    NVME_INVALID_VECTOR = 0x108,
    NVME_INVALID_LOG_PAGE = 0x109,
    NVME_INVALID_QUEUE_DELETION = 0x10c,
    NVME_FEATURE_NOT_SAVEABLE = 0x10d,
    NVME_FEATURE_NOT_CHANGEABLE = 0x10e,
    NVME_WRITE_FAULT = 0x280,
    NVME_READ_ERROR = 0x281,
    /* Not to be tried again: set by nvme_complete for what will fail again. */
    NVME_DO_NOT_RETRY = 0x4000,
};

/* ---- admin commands (5) ---- */

enum nvme_admin_opcode {
    NVME_ADMIN_DELETE_SQ = 0x00,
    NVME_ADMIN_CREATE_SQ = 0x01,
    NVME_ADMIN_GET_LOG_PAGE = 0x02,
    NVME_ADMIN_DELETE_CQ = 0x04,
    NVME_ADMIN_CREATE_CQ = 0x05,
    NVME_ADMIN_IDENTIFY = 0x06,
    NVME_ADMIN_ABORT = 0x08,
    NVME_ADMIN_SET_FEATURES = 0x09,
    NVME_ADMIN_GET_FEATURES = 0x0a,
    NVME_ADMIN_ASYNC_EVENT = 0x0c,
};

#define NVME_QUEUE_CONTIGUOUS BIT32(0) /* of CDW11, when a queue is created */
#define NVME_QUEUE_INTERRUPTS BIT32(1)

enum nvme_identify_cns { /* 5.15.1 */
                         NVME_CNS_NAMESPACE = 0,
                         NVME_CNS_CONTROLLER = 1,
                         NVME_CNS_ACTIVE_NAMESPACES = 2,
                         NVME_CNS_DESCRIPTORS = 3,
};

enum nvme_log_page { /* 5.14.1 */
                     NVME_LOG_ERRORS = 1,
                     NVME_LOG_HEALTH = 2,
                     NVME_LOG_FIRMWARE = 3,
                     NVME_LOG_EFFECTS = 5,
};
#define NVME_LOG_RETAIN_EVENT BIT32(15)

enum nvme_feature { /* 5.21.1 */
                    NVME_FEATURE_ARBITRATION = 0x01,
                    NVME_FEATURE_POWER = 0x02,
                    NVME_FEATURE_TEMPERATURE = 0x04,
                    NVME_FEATURE_ERROR_RECOVERY = 0x05,
                    NVME_FEATURE_WRITE_CACHE = 0x06,
                    NVME_FEATURE_QUEUES = 0x07,
                    NVME_FEATURE_COALESCING = 0x08,
                    NVME_FEATURE_VECTOR = 0x09,
                    NVME_FEATURE_ATOMICITY = 0x0a,
                    NVME_FEATURE_ASYNC_EVENTS = 0x0b,
                    NVME_FEATURES
};
#define NVME_FEATURE_SAVE BIT32(31)

/* Asynchronous events of type "error status" (5.2.1). */
#define NVME_EVENT_INVALID_REGISTER 0x00
#define NVME_EVENT_INVALID_VALUE 0x01

/* ---- NVM commands (6) ---- */

enum nvme_opcode {
    NVME_FLUSH = 0x00,
    NVME_WRITE = 0x01,
    NVME_READ = 0x02,
    NVME_WRITE_ZEROES = 0x08,
    NVME_DATASET_MANAGEMENT = 0x09,
};

#define NVME_RW_FUA BIT32(30)      /* of CDW12 */
#define NVME_ZEROES_DEAC BIT32(25) /* of CDW12: the space may be given back */
#define NVME_DSM_DEALLOCATE BIT32(2)
#define NVME_DSM_RANGES_MAX 256

struct nvme_range { /* 6.7 */
    u32 attributes;
    u32 blocks;
    u64 lba;
};

/* ---- what Identify tells (5.15.2) ---- */

struct nvme_id_controller {
    u16 vid, ssvid;
    char sn[20], mn[40], fr[8];
    u8 rab, ieee[3], cmic, mdts;
    u16 cntlid;
    u32 ver, rtd3r, rtd3e, oaes, ctratt;
    u16 rrls;
    u8 reserved102[9];
    u8 cntrltype;
    u8 fguid[16];
    u8 reserved128[128];
    u16 oacs;
    u8 acl, aerl, frmw, lpa, elpe, npss, avscc, apsta;
    u16 wctemp, cctemp;
    u8 reserved270[242];
    u8 sqes, cqes;
    u16 maxcmd;
    u32 nn;
    u16 oncs, fuses;
    u8 fna, vwc;
    u16 awun, awupf;
    u8 nvscc, nwpc;
    u16 acwu, reserved534;
    u32 sgls;
    u8 reserved540[228];
    char subnqn[256];
    u8 reserved1024[1024];
    struct {
        u16 max_power; /* in 10 mW */
        u8 reserved[30];
    } psd[32];
    u8 vendor[1024];
} __attribute__((packed));
_Static_assert(sizeof(struct nvme_id_controller) == 4096, "figure 247");
_Static_assert(offsetof(struct nvme_id_controller, oacs) == 256, "figure 247");
_Static_assert(offsetof(struct nvme_id_controller, sqes) == 512, "figure 247");
_Static_assert(offsetof(struct nvme_id_controller, subnqn) == 768, "figure 247");

#define NVME_ID_CONTROLLER_IO 1         /* cntrltype */
#define NVME_ID_FRMW_ONE_READ_ONLY 0x03 /* one slot, which nobody can write */
#define NVME_ID_LPA_EFFECTS 0x02
#define NVME_ID_LPA_OFFSETS 0x04
#define NVME_ID_ONCS_DSM 0x04
#define NVME_ID_ONCS_WRITE_ZEROES 0x08
#define NVME_ID_VWC_PRESENT 0x01
#define NVME_ID_VWC_NO_FLUSH_ALL 0x04 /* Flush takes one namespace, not all at once */
#define NVME_ID_SGLS 0x01

struct nvme_id_namespace {
    u64 nsze, ncap, nuse;
    u8 nsfeat, nlbaf, flbas, mc, dpc, dps, nmic, rescap, fpi, dlfeat;
    u16 nawun, nawupf, nacwu, nabsn, nabo, nabspf, noiob;
    u8 nvmcap[16];
    u16 npwg, npwa, npdg, npda, nows;
    u8 reserved74[18];
    u32 anagrpid;
    u8 reserved96[3];
    u8 nsattr;
    u16 nvmsetid, endgid;
    u8 nguid[16];
    u64 eui64;
    u32 lbaf[16];
    u8 reserved192[192];
    u8 vendor[3712];
} __attribute__((packed));
_Static_assert(sizeof(struct nvme_id_namespace) == 4096, "figure 245");
_Static_assert(offsetof(struct nvme_id_namespace, nsattr) == 99, "figure 245");
_Static_assert(offsetof(struct nvme_id_namespace, lbaf) == 128, "figure 245");

#define NVME_ID_NSFEAT_OPTIMAL_IO 0x10 /* npwg to nows mean something */
#define NVME_ID_DLFEAT_ZEROES 0x01     /* what was deallocated reads as zeroes */
#define NVME_ID_DLFEAT_DEAC 0x08       /* Write Zeroes may deallocate */
#define NVME_ID_NSATTR_PROTECTED 0x01
#define NVME_ID_LBADS_SHIFT 16

#define NVME_DESCRIPTOR_UUID 3 /* figure 246 */

/* ---- log pages (5.14.1) ---- */

struct nvme_error_entry {
    u64 count;
    u16 sq_id, cid, status, location;
    u64 lba;
    u32 nsid;
    u8 vendor, transport;
    u8 reserved[34];
} __attribute__((packed));
_Static_assert(sizeof(struct nvme_error_entry) == 64, "figure 193");

struct nvme_health {
    u8 critical;
    u16 temperature; /* kelvin */
    u8 spare, spare_threshold, used, endurance;
    u8 reserved7[25];
    u64 units_read[2], units_written[2]; /* thousands of 512 bytes, rounded up; 128-bit numbers */
    u64 commands_read[2], commands_written[2];
    u64 busy[2], power_cycles[2], power_on_hours[2], unsafe_shutdowns[2], media_errors[2],
        errors[2];
    u8 reserved192[320];
} __attribute__((packed));
_Static_assert(sizeof(struct nvme_health) == 512, "figure 194");

struct nvme_effects {
    u32 admin[256], io[256];
    u8 reserved[2048];
};
_Static_assert(sizeof(struct nvme_effects) == 4096, "figure 204");
#define NVME_EFFECT_SUPPORTED BIT32(0)
#define NVME_EFFECT_CONTENT BIT32(1) /* it changes data */

#endif
