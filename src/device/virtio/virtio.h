/*
 * What every virtio device is made of: a PCI function with the registers that a driver negotiates through.
 * Virtual I/O Device (VIRTIO) 1.2, chapters 2, 3 and 4.1; no legacy interface.
 *
 * A device is a struct whose first member is `struct virtio`. It says what it is (struct virtio_config) and
 * gives a few operations; virtio_create_finish puts it on the bus. Where things happen:
 *
 *   vCPU threads    registers. A notification only wakes the loop's thread.
 *   loop's thread   ops->queue_ready, and whatever completes later. Nothing in it may block.
 *
 * Both take the device's lock; operations are called with it held. A device that keeps chains for later
 * counts them (virtio_pop and virtio_complete do): a reset of the device or of a queue, and a stop of the
 * machine, are over when all of them came back. Meanwhile the driver reads that the reset is under way (2.4.1,
 * 2.6.1). So no request ever writes to memory that the guest has already given to something else.
 *
 * A driver that breaks the rules gets DEVICE_NEEDS_RESET, and nothing of its queues is looked at any more.
 */
#ifndef DOPPEL_DEVICE_VIRTIO_VIRTIO_H
#define DOPPEL_DEVICE_VIRTIO_VIRTIO_H

#include "device/pci/host.h"
#include "device/virtio/queue.h"
#include "host/loop_kick.h"

#include <stdatomic.h>

#define VIRTIO_QUEUES_MAX 40
/* The PCI device ID is this and the type (4.1.2). */
#define VIRTIO_PCI_DEVICE 0x1040

enum virtio_type { /* chapter 5 */
                   VIRTIO_TYPE_NET = 1,
                   VIRTIO_TYPE_BLOCK = 2,
                   VIRTIO_TYPE_CONSOLE = 3,
                   VIRTIO_TYPE_ENTROPY = 4,
                   VIRTIO_TYPE_BALLOON = 5,
                   VIRTIO_TYPE_VSOCK = 19,
                   VIRTIO_TYPE_PMEM = 27,
                   VIRTIO_TYPE_FS = 26,
};

/* Feature bits that aren't of one type of device (chapter 6). */
#define VIRTIO_F_INDIRECT_DESC BIT(28)
#define VIRTIO_F_EVENT_IDX BIT(29)
#define VIRTIO_F_VERSION_1 BIT(32)
#define VIRTIO_F_ACCESS_PLATFORM BIT(33)
#define VIRTIO_F_RING_PACKED BIT(34)
#define VIRTIO_F_RING_RESET BIT(40)

/* Device status (2.1). */
#define VIRTIO_STATUS_ACKNOWLEDGE 1
#define VIRTIO_STATUS_DRIVER 2
#define VIRTIO_STATUS_DRIVER_OK 4
#define VIRTIO_STATUS_FEATURES_OK 8
#define VIRTIO_STATUS_NEEDS_RESET 64
#define VIRTIO_STATUS_FAILED 128

struct virtio;

struct virtio_ops {
    /* On the loop's thread: the driver may have put chains into queue q. */
    void (*queue_ready)(struct virtio *v, unsigned q);
    /* Optional. The driver wrote to [offset, offset + size) of the device's configuration. */
    void (*config_written)(struct virtio *v, unsigned offset, unsigned size);
    /* Optional. A reset of the device or of a queue begins: give back chains that wait for nothing. */
    void (*resetting)(struct virtio *v);
    /* Optional. A reset is over: nothing is in flight, and the driver starts anew. */
    void (*reset)(struct virtio *v);
    /* Optional. Features are agreed on and the driver is ready. */
    void (*driver_ok)(struct virtio *v);
    /*
     * With no vCPU running and the lock not held, on the loop's thread: bring in what is in flight. NULL
     * when chains never outlive queue_ready.
     */
    void (*drain)(struct virtio *v);
    /* Optional, as drain: the machine goes on; or what was kept for that must be given back now. */
    void (*start)(struct virtio *v);
    void (*give_up)(struct virtio *v);
    /* Optional. Whether it holds, though nothing is in flight, what a saved state can't. The lock is held. */
    bool (*busy)(struct virtio *v);
    void (*destroy)(struct virtio *v); /* frees it; virtio_fini was called */
};

struct virtio_config {
    const char *name;
    enum virtio_type type;
    u16 class;    /* PCI_CLASS_* */
    u64 features; /* the type's own; those above are added */
    unsigned queues;
    u8 *config; /* the device's configuration, which it may change (virtio_config_changed) */
    unsigned config_size;
    const u8 *config_writable; /* as long: which bits the driver may write; NULL: none */
};

/* A queue's notifications on their way to the loop. */
struct virtio_notifier {
    struct virtio *v;
    struct loop_kick kick;
};

struct virtio {
    struct pci_device pci;
    const struct virtio_ops *ops;
    struct virtio_config config;
    struct device_env env;
    u64 offered;

    struct virtio_notifier notifiers[VIRTIO_QUEUES_MAX];
    struct pci_doorbell doorbells[VIRTIO_QUEUES_MAX]; /* the notifiers' eventfds */
    _Atomic u64 kicked; /* queues that virtio_kick has told the loop of */
    bool stopped;       /* by the machine */
    u64 held;           /* queues whose interrupt waits for `hold` */
    u64 came;           /* those of them that got chains since */
    struct host_timer hold;
    u8 prompt[VIRTIO_QUEUES_MAX]; /* interrupts that don't wait, as waiting was no use */
    unsigned in_flight;
    unsigned queue_in_flight[VIRTIO_QUEUES_MAX];
    u8 cfg_cap; /* offset of the PCI configuration access capability */

    u64 features; /* that the driver accepted */
    u32 device_feature_select, driver_feature_select;
    u16 config_vector;
    u16 queue_select;
    u8 status;
    u8 generation;
    u8 isr;
    bool resetting;
    u64 queue_resetting; /* queues */
    struct virtq queues[VIRTIO_QUEUES_MAX];
};

extern const struct state_desc virtio_state;

/* Sets up *v in a zeroed struct that `state` describes. 0 or -errno, and then nothing is left to undo. */
int virtio_init(struct virtio *v, const struct virtio_ops *ops, const struct virtio_config *config,
                const struct state_desc *state, const struct device_env *env, struct error *err);
/* Onto the bus: the last step. After a failure, dev.ops->destroy takes all away. */
int virtio_add(struct virtio *v, struct pci_host *host, u16 place, struct error *err);

/* For ops, the lock held. 1 with *chain set (the caller frees it), 0: none, or the driver broke the rules. */
int virtio_pop(struct virtio *v, unsigned q, struct virtq_chain **chain);
/* Takes the last pop of a queue back, and frees the chain: the guest's, and to be popped again later. */
void virtio_unpop(struct virtio *v, unsigned q, struct virtq_chain *chain);
/* Gives a popped chain back and frees it. Then virtio_signal once for all that were given back. */
void virtio_complete(struct virtio *v, unsigned q, struct virtq_chain *chain, u32 written);
/* The same, of one of several that the driver is to see at once: the last goes by virtio_complete. */
void virtio_complete_held(struct virtio *v, unsigned q, struct virtq_chain *chain, u32 written);
void virtio_signal(struct virtio *v, unsigned q);
/*
 * As virtio_signal, but a driver that goes on giving work meanwhile hears of several answers at once, up to 0.1 ms
 * later. On the loop's thread.
 */
void virtio_signal_soon(struct virtio *v, unsigned q);
/* Asks for notifications (virtq_set_notify). */
void virtio_set_notify(struct virtio *v, unsigned q, bool on);
/*
 * What queue_ready does for a queue whose chains are answered one by one: `serve` owns each chain. It gives way
 * to the loop's other work now and then, should the driver never stop to send.
 */
void virtio_serve(struct virtio *v, unsigned q,
                  void (*serve)(struct virtio *v, unsigned q, struct virtq_chain *chain));
/* The device's configuration changed. */
void virtio_config_changed(struct virtio *v);
/* The driver did what no driver may. */
void virtio_needs_reset(struct virtio *v, const char *why);
/* Wakes the loop for a queue, as the driver's notification does. Any thread. */
void virtio_kick(struct virtio *v, unsigned q);
static inline bool virtio_has(const struct virtio *v, u64 feature)
{
    return v->features & feature;
}
static inline bool virtio_is_live(const struct virtio *v)
{
    return (v->status & VIRTIO_STATUS_DRIVER_OK) && !(v->status & VIRTIO_STATUS_NEEDS_RESET) &&
           !v->resetting && !v->stopped;
}
static inline struct device *virtio_device(struct virtio *v)
{
    return &v->pci.dev;
}

/* For the machine. Registers of a direct test: BAR and offsets of the parts (virtio_pci.c). */
#define VIRTIO_BAR 4
#define VIRTIO_MSIX_BAR 1
#define VIRTIO_BAR_COMMON 0x0000
#define VIRTIO_BAR_ISR 0x1000
#define VIRTIO_BAR_DEVICE 0x2000
#define VIRTIO_BAR_NOTIFY 0x3000
#define VIRTIO_BAR_SIZE 0x4000
#define VIRTIO_NOTIFY_MULTIPLIER 4

#endif
