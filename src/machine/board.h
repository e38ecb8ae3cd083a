/*
 * The board: every device of the machine, created, wired and destroyed in one place.
 */
#ifndef DOPPEL_MACHINE_BOARD_H
#define DOPPEL_MACHINE_BOARD_H

#include "device/device.h"
#include "engine/engine.h"

struct board;
struct chardev;
struct machine_consoles;
struct machine_disk;
struct machine_disks;
struct machine_nets;
struct machine_pmems;
struct machine_shares;
struct net_backend;
struct e820_map;
struct firmware;
struct i8042;
struct vga;
struct virtio_balloon;
struct state_reader;
struct state_writer;

struct board_config {
    struct device_env env;
    const struct engine_ops *ops; /* the processors' side of the interrupt lines */
    struct engine *engine;
    struct power_sink power;
    unsigned cpus;
    const struct cpuid_model *cpuid;         /* for their APIC IDs */
    unsigned phys_bits;                      /* of the processors' addresses */
    const struct e820_map *e820;             /* for the CMOS's memory sizes and fw_cfg */
    struct chardev *serial;                  /* for COM1, or NULL */
    const struct machine_disks *disks;       /* NULL: none */
    const struct machine_consoles *consoles; /* NULL: none */
    const struct machine_nets *nets;         /* NULL: none */
    const struct machine_pmems *pmems;   /* NULL: none; their slots of memory are there already */
    const struct machine_shares *shares; /* NULL: none */
    u16 debug_exit_port;                 /* 0: none */
    struct firmware *firmware;           /* NULL: a direct boot */
    unsigned slots;                      /* for cards that come and go */
    /*
     * board_update is to be called, with no vCPU running. On a vCPU's thread, with device locks held. NULL: never.
     */
    void (*update_wanted)(void *opaque);
    /* The card in a slot has been destroyed; on the loop's thread. May be NULL. */
    void (*card_gone)(void *opaque, unsigned slot);
    void *opaque;
};

/* All devices in their power-on state. What config points to must outlive the board. */
struct board *board_create(const struct board_config *config, struct error *err);
void board_destroy(struct board *board);

/* The screen; NULL: there is none. The keyboard, with its mouse. */
struct vga *board_vga(struct board *board);
struct i8042 *board_keyboard(struct board *board);
struct virtio_balloon *board_balloon(struct board *board);

/* The RESET line: every device to its power-on state. No vCPU may run. */
void board_reset(struct board *board);

/*
 * Wakes what waits for a machine that runs (characters on their way through COM1, queues of requests), and
 * brings all of it to a stand: after it nothing changes memory or the devices' state. On the loop's thread
 * with no vCPU running; any number of times.
 */
void board_start(struct board *board);
void board_stop(struct board *board);
/* Whether a stopped board still keeps what can't be saved: a failed write, to be tried again (werror=stop). */
bool board_is_busy(struct board *board);

/*
 * The state of all devices and of the wires between them, while no vCPU runs and the clock stands.
 * Before a load the clock is set to the time of the save, and after it the vCPUs get their state: lines
 * and timers are up to date then. A load that fails (-EINVAL with err set) leaves some devices as they
 * were and some as saved.
 */
void board_save(struct board *board, struct state_writer *w);
int board_load(struct board *board, struct state_reader *r, struct error *err);
/* The name of the first state field in which two boards differ, in buf, or NULL. */
const char *board_compare(const struct board *a, const struct board *b, char *buf, size_t buflen);

/*
 * What firmware leaves behind for a kernel: the A20 gate open, addresses in PCI's BARs, and the ACPI
 * tables in guest memory; *rsdp is where their root is.
 */
int board_prepare_boot(struct board *board, gpa_t *rsdp, struct error *err);

/*
 * With firmware, in place of that: the A20 gate open, as a PC has it at its first instruction. And after a reset or a
 * load: shows RAM or ROM where the host bridge says. Returns whether the engine must be told.
 */
void board_prepare_firmware(struct board *board);
bool board_update_memory(struct board *board);
/* What the board asked for: that, and what is to be done with cards in slots. Returns the same. */
bool board_update(struct board *board);

/*
 * Cards in slots, on the loop's thread: -errno with err set when there is no such slot, or one that is taken or
 * empty. What the card works with is borrowed until card_gone. Removing asks the guest, which takes its time;
 * with `force` no vCPU may run, and the card is destroyed at once.
 */
int board_plug_disk(struct board *board, unsigned slot, const struct machine_disk *disk,
                    struct error *err);
int board_plug_net(struct board *board, unsigned slot, struct net_backend *net, struct error *err);
int board_unplug(struct board *board, unsigned slot, bool force, struct error *err);

/* For struct engine_machine_ops: INTA, and EOI broadcasts. Any thread. */
int board_ack_extint(struct board *board);
void board_eoi(struct board *board, u8 vector);

#endif
