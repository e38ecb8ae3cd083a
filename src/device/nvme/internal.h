/*
 * What the files of the NVMe controller share: nvme.c, its registers, life and state; queue.c, queues and
 * interrupts; data.c, where a command's data lie; admin.c and identify.c, admin commands; io.c, those that work on
 * a disk.
 *
 *   vCPU threads    registers. A doorbell only stores its value, and wakes the loop's thread.
 *   loop's thread   takes commands from the queues, submits and completes them. Nothing in it may block.
 *
 * The guest is hostile: a command is copied once and then judged; queues, lists and buffers are checked to be guest
 * memory at every use. What a command gets wrong is its status; queues that aren't in memory are the controller's
 * fatal status (CSTS.CFS), which only a reset ends.
 *
 * A command is taken only when its completion has a place in the completion queue (`reserved`), so completions never
 * wait for the guest. Commands that the disks work on are counted (`in_flight`): a reset of the controller, the
 * deletion of a queue and a stop of the machine are over when all of them came back. So no request ever writes to
 * memory that the guest has already given to something else.
 *
 * The device's lock is held in all functions here, but for nvme_kick.
 */
#ifndef DOPPEL_DEVICE_NVME_INTERNAL_H
#define DOPPEL_DEVICE_NVME_INTERNAL_H

#include "device/nvme/nvme.h"
#include "device/nvme/regs.h"
#include "host/loop_kick.h"

#include <stdatomic.h>

#define NVME_QUEUES 17          /* of each kind: the admin queue, and 16 for input and output */
#define NVME_QUEUE_SIZE_MAX 256 /* entries */
#define NVME_ASYNC_MAX 4        /* Asynchronous Event Requests that wait */
#define NVME_SECTOR 512U
#define NVME_MDTS 7 /* a transfer has 2^7 pages at most */
#define NVME_TRANSFER_MAX ((u64)NVME_PAGE_SIZE << NVME_MDTS)
#define NVME_PIECES_MAX 256 /* of a command's data: by PRP it has 129 at most */

struct nvme_sq {
    gpa_t base;
    u16 size; /* entries; 0: there is no such queue */
    u16 head;
    u16 cq;
    _Atomic u32 tail; /* as the guest wrote it */
    bool deleting;    /* when the last of its commands is done; which command asked for it */
    u16 delete_cid;
    unsigned in_flight;
};

struct nvme_cq {
    gpa_t base;
    u16 size;
    u16 tail;
    u16 vector;
    bool interrupts;
    bool phase;
    u16 users;            /* submission queues */
    _Atomic u32 head;     /* as the guest wrote it */
    u16 last_head;        /* what made sense of that */
    _Atomic bool starved; /* a command waits for room here */
    u16 reserved;
};

struct nvme_namespace {
    struct block_backend *backend;
    u64 blocks;
    struct block_request flush; /* at a shutdown */
    struct nvme *nvme;
};

struct nvme_statistics { /* for the health log */
    u64 sectors_read, sectors_written;
    u64 commands_read, commands_written;
    u64 media_errors, errors;
};

struct nvme {
    struct pci_device pci;
    struct nvme_config cfg;
    struct device_env env;
    char serial[NVME_SERIAL_SIZE + 1];
    struct loop_kick kick;
    _Atomic u64 kicked; /* submission queues that the loop is to look at */
    bool stopped;       /* by the machine */
    unsigned in_flight, shutdown_flushes;

    u32 cc, csts, aqa;
    u32 int_mask;
    _Atomic bool intx; /* the line is high */
    u64 asq, acq;
    bool resetting, shutdown_wanted;
    struct nvme_sq sq[NVME_QUEUES];
    struct nvme_cq cq[NVME_QUEUES];
    u32 features[NVME_FEATURES];
    u32 uncoalesced; /* vectors, as features have it */
    u16 async_cid[NVME_ASYNC_MAX];
    u8 async_count;
    u8 events;          /* bits of NVME_EVENT_*, to be told */
    bool events_masked; /* until the error log is read */
    struct nvme_statistics stats;
    struct nvme_error_entry last_error;
    struct nvme_namespace ns[NVME_NAMESPACES_MAX];
};

/* A command as it was taken from a queue. */
struct nvme_context {
    struct nvme *n;
    struct nvme_sq *sq;
    struct nvme_command cmd;
    u32 result; /* for the completion */
};

/* ---- nvme.c ---- */

/* The namespace of an ID, or NULL. */
struct nvme_namespace *nvme_namespace(struct nvme *n, u32 nsid);
/* A command that a disk worked on (sq NULL: none of the guest's) came back: what waits for the last of them goes on. */
void nvme_request_returned(struct nvme *n, struct nvme_sq *sq);
/* The guest's queues are no memory. */
void nvme_fatal(struct nvme *n, const char *why);

/* ---- queue.c ---- */

/* Has the loop look at submission queues, one bit each. Any thread, no lock. */
void nvme_kick(struct nvme *n, u64 queues);
/* The loop's: takes commands from a queue while there are any. */
void nvme_serve(struct nvme *n, unsigned sqid);
/* A doorbell (3.1.24, 3.1.25), by its index. Takes no lock unless interrupts are by INTx. */
void nvme_doorbell(struct nvme *n, unsigned index, u32 value);
void nvme_complete(struct nvme *n, struct nvme_sq *sq, u16 cid, enum nvme_status status,
                   u32 result);
void nvme_sq_init(struct nvme *n, unsigned sqid, gpa_t base, u16 size, u16 cqid);
void nvme_cq_init(struct nvme *n, unsigned cqid, gpa_t base, u16 size, u16 vector, bool interrupts);
void nvme_sq_delete(struct nvme *n, struct nvme_sq *sq);
void nvme_cq_delete(struct nvme *n, struct nvme_cq *cq);
/* INTx, by what is in the completion queues. */
void nvme_update_intx(struct nvme *n);
/* An Asynchronous Event Request, which waits for something to tell. False: too many do. */
bool nvme_wait_for_event(struct nvme *n, u16 cid);
/* Gives one back as aborted. False: there is none with this ID, or no room to do it. */
bool nvme_abort_event_request(struct nvme *n, u16 cid);
/* Tells what there is to tell, if the guest asked for it. */
void nvme_tell_events(struct nvme *n);

/* ---- data.c ---- */

struct nvme_data {
    unsigned pieces;
    u64 len;
    struct iovec iov[NVME_PIECES_MAX];
    gpa_t gpa[NVME_PIECES_MAX];
};

/* Where the command's `len` bytes lie, checked. to_guest: the controller writes them. */
enum nvme_status nvme_map_data(struct nvme *n, const struct nvme_command *cmd, u64 len,
                               bool to_guest, struct nvme_data *data);
/* After the controller wrote to all of it. */
void nvme_data_written(struct nvme *n, const struct nvme_data *data);
/* A command's data as a whole, to and from `buf`. */
enum nvme_status nvme_data_to_guest(struct nvme *n, const struct nvme_command *cmd, const void *buf,
                                    u64 len);
enum nvme_status nvme_data_from_guest(struct nvme *n, const struct nvme_command *cmd, void *buf,
                                      u64 len);

/* ---- admin.c, identify.c, io.c ---- */

/* The status to complete with at once; NVME_PENDING: it will be completed later. */
#define NVME_PENDING ((enum nvme_status)0xffff)
enum nvme_status nvme_admin_command(struct nvme_context *c);
enum nvme_status nvme_identify(struct nvme_context *c);
enum nvme_status nvme_get_log_page(struct nvme_context *c);
enum nvme_status nvme_io_command(struct nvme_context *c);

/* Features at their defaults (5.21.1). */
void nvme_reset_features(struct nvme *n);
/* Flushes all disks: CSTS.SHST tells when that is done. */
void nvme_start_shutdown(struct nvme *n);

#endif
