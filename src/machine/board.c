/*
 * How the devices are wired:
 *
 *     PIT 0 ---+                    +--> PIC pair --INTR--> every processor's LINT0
 *     RTC 8 ---+--> isa_line_set ---+
 *     HPET 0,8-+    (ISA lines)     +--> IOAPIC ----MSI---> local APICs
 *     COM1 4, keyboard 1, mouse 12, SCI 9
 *     PCI's PIRQ A to H: at the PIC where the LPC bridge routes them (10 and 11), at the IOAPIC pins 16 to 23
 *
 * Each ISA interrupt goes to the PIC and to the IOAPIC at once; the guest masks the one that it doesn't
 * use. The PIT's line 0 arrives at the IOAPIC's pin 2, as on every PC and as the MADT says. ISA lines 0
 * and 8 have two sources: the HPET, while its legacy route is on, else the PIT and the RTC.
 *
 * Lock order: the PCI bus's, a device's lock, the PCI lines', isa.lock, the PIC's or the IOAPIC's, the engine's.
 */
#include "machine/board.h"

#include "chardev/chardev.h"
#include "device/acpi_pm.h"
#include "device/debugcon.h"
#include "device/fw_cfg.h"
#include "device/hpet.h"
#include "device/i8042.h"
#include "device/ide.h"
#include "device/ioapic.h"
#include "device/nvme/nvme.h"
#include "device/pci/host.h"
#include "device/pci/lpc.h"
#include "device/pflash.h"
#include "device/pic.h"
#include "device/pit.h"
#include "device/pvpanic.h"
#include "device/rtc.h"
#include "device/serial.h"
#include "device/sysport.h"
#include "device/vga.h"
#include "device/virtio/balloon.h"
#include "device/virtio/blk.h"
#include "device/virtio/console.h"
#include "device/virtio/fs.h"
#include "device/virtio/net.h"
#include "device/virtio/pmem.h"
#include "device/virtio/rng.h"
#include "device/virtio/vhost_user.h"
#include "device/virtio/vsock.h"
#include "host/log.h"
#include "machine/acpi.h"
#include "machine/cards.h"
#include "machine/firmware.h"
#include "machine/layout.h"
#include "machine/loader.h"
#include "machine/memory_map.h"
#include "machine/slots.h"
#include "state/stream.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define IOAPIC_PIN_PIT 2
#define IOAPIC_ID 0
#define DISK_QUEUES_MAX 16
#define FAST_A20_ON 0x02
#define BOARD_MAX_DEVICES 80

/* The two lines that the HPET takes over, as indices into struct isa's arrays. */
enum { LEGACY_PIT, LEGACY_RTC, LEGACY_COUNT };

struct isa {
    pthread_mutex_t lock;
    bool hpet_route;
    bool own[LEGACY_COUNT];  /* what the PIT and the RTC say */
    bool hpet[LEGACY_COUNT]; /* what the HPET says */
    bool driven[LEGACY_COUNT];
    bool pirq[PCI_PIRQS];
    u16 pirq_driven; /* inputs of the PIC that they hold up */
};

static const struct state_field isa_fields[] = {
    STATE_HOST(struct isa, lock),         STATE_FIELD(struct isa, hpet_route),
    STATE_FIELD(struct isa, own),         STATE_FIELD(struct isa, hpet),
    STATE_FIELD(struct isa, driven),      STATE_FIELD(struct isa, pirq),
    STATE_FIELD(struct isa, pirq_driven),
};
static const struct state_desc isa_state = STATE_DESC("isa", 1, struct isa, isa_fields);

struct board {
    struct board_config config;
    struct isa isa;
    bool loading; /* see board_load */
    struct a20_gate a20;
    struct pic *pic;
    struct ioapic *ioapic;
    struct serial *com1;
    struct rtc *rtc;
    struct i8042 *keyboard;
    struct pci_host *pci;
    struct lpc *lpc; /* with firmware */
    struct acpi_pm *pm;
    struct fw_cfg *fw_cfg;
    u64 memory_end;                                        /* as firmware is told it */
    struct vga *vga;                                       /* with firmware */
    char boot_paths[MACHINE_DISKS_MAX][FIRMWARE_PATH_MAX]; /* of each disk, as firmware names it */
    char net_boot_paths[MACHINE_NETS_MAX][FIRMWARE_PATH_MAX];
    u8 *no_rom; /* what reads as ones where neither RAM nor ROM is */
    struct sysport *sysport;
    struct virtio_balloon *balloon;
    struct virtio_console *console; /* NULL: none */
    struct console_end {            /* of a port's stream */
        struct board *board;
        unsigned port;
    } console_ends[MACHINE_CONSOLES_MAX];
    struct device
        *devices[BOARD_MAX_DEVICES]; /* in the order of creation, but for cards in slots */
    unsigned ndevices;
    struct slots slots;
};

/* The next device from *i on, cards in slots last; NULL at the end. */
static struct device *next_device(const struct board *b, unsigned *i)
{
    if (*i < b->ndevices)
        return b->devices[(*i)++];
    while (*i - b->ndevices < b->slots.count) {
        struct device *card = b->slots.slot[(*i)++ - b->ndevices].card;

        if (card)
            return card;
    }
    return NULL;
}

static void extint_set(void *opaque, unsigned n, bool level)
{
    struct board *b = opaque;

    b->config.ops->set_extint(b->config.engine, level);
}

static void deliver_msi(void *opaque, u64 address, u32 data)
{
    struct board *b = opaque;

    b->config.ops->deliver_msi(b->config.engine, address, data);
}

static int bind_msi(void *opaque, int fd, u64 address, u32 data)
{
    struct board *b = opaque;

    return b->config.ops->msi_bind(b->config.engine, fd, address, data);
}

static void unbind_msi(void *opaque, int fd)
{
    struct board *b = opaque;

    b->config.ops->msi_unbind(b->config.engine, fd);
}

static struct msi_sink msi_sink(struct board *b)
{
    struct msi_sink sink = {.deliver = deliver_msi, .sink = b};

    if (b->config.ops->msi_bind) {
        sink.bind = bind_msi;
        sink.unbind = unbind_msi;
    }
    return sink;
}

static void a20_changed(void *opaque, bool on)
{
    struct board *b = opaque;

    if (b->config.ops->set_a20)
        b->config.ops->set_a20(b->config.engine, on);
    else if (!on)
        log_once(LOG_WARN, "engine %s can't close the A20 gate", b->config.ops->name);
}

/* The ISA line itself: its two listeners. */
static void isa_drive(struct board *b, unsigned n, bool level)
{
    pic_set_irq(b->pic, n, level);
    ioapic_set_irq(b->ioapic, n == IRQ_PIT ? IOAPIC_PIN_PIT : n, level);
}

static const unsigned legacy_irq[LEGACY_COUNT] = {IRQ_PIT, IRQ_RTC};

/* The isa lock is held. */
static void legacy_update(struct board *b, unsigned i)
{
    struct isa *isa = &b->isa;
    bool level = isa->hpet_route ? isa->hpet[i] : isa->own[i];

    if (level == isa->driven[i])
        return;
    isa->driven[i] = level;
    isa_drive(b, legacy_irq[i], level);
}

static void legacy_set(struct board *b, bool *source, unsigned i, bool level)
{
    pthread_mutex_lock(&b->isa.lock);
    *source = level;
    legacy_update(b, i);
    pthread_mutex_unlock(&b->isa.lock);
}

/* struct irq_line's set, for a device on ISA line n. */
static void isa_line_set(void *opaque, unsigned n, bool level)
{
    struct board *b = opaque;

    if (b->loading)
        return;
    if (n == IRQ_PIT)
        legacy_set(b, &b->isa.own[LEGACY_PIT], LEGACY_PIT, level);
    else if (n == IRQ_RTC)
        legacy_set(b, &b->isa.own[LEGACY_RTC], LEGACY_RTC, level);
    else
        isa_drive(b, n, level);
}

/* struct irq_line's set, for HPET timer i on the legacy route. */
static void hpet_legacy_set(void *opaque, unsigned i, bool level)
{
    struct board *b = opaque;

    if (!b->loading)
        legacy_set(b, &b->isa.hpet[i], i, level);
}

static void hpet_legacy_route(void *opaque, bool on)
{
    struct board *b = opaque;

    if (b->loading)
        return;
    pthread_mutex_lock(&b->isa.lock);
    b->isa.hpet_route = on;
    for (unsigned i = 0; i < LEGACY_COUNT; i++)
        legacy_update(b, i);
    pthread_mutex_unlock(&b->isa.lock);
}

/* Where a direct boot routes them, and what each PCI function is told then. */
static const u8 pirq_isa_irq[PCI_PIRQS] = {
    IRQ_PCI_LOW, IRQ_PCI_LOW, IRQ_PCI_HIGH, IRQ_PCI_HIGH,
    IRQ_PCI_LOW, IRQ_PCI_LOW, IRQ_PCI_HIGH, IRQ_PCI_HIGH,
};

static int pirq_route(const struct board *b, unsigned n)
{
    return b->lpc ? lpc_pirq_irq(b->lpc, n) : pirq_isa_irq[n];
}

/* Those that share an input of the PIC are ORed there. The isa lock is held. */
static void pirqs_drive(struct board *b)
{
    u16 driven = 0, changed;

    for (unsigned n = 0; n < PCI_PIRQS; n++) {
        int irq = pirq_route(b, n);

        if (b->isa.pirq[n] && irq >= 0)
            driven |= BIT(irq);
    }
    changed = driven ^ b->isa.pirq_driven;
    b->isa.pirq_driven = driven;
    for (unsigned irq = 0; irq < 16; irq++) {
        if (changed >> irq & 1)
            pic_set_irq(b->pic, irq, driven >> irq & 1);
    }
}

/* struct irq_line's set, for PIRQ n. */
static void pirq_set(void *opaque, unsigned n, bool level)
{
    struct board *b = opaque;

    if (b->loading)
        return;
    pthread_mutex_lock(&b->isa.lock);
    b->isa.pirq[n] = level;
    pirqs_drive(b);
    ioapic_set_irq(b->ioapic, GSI_PIRQ + n, level);
    pthread_mutex_unlock(&b->isa.lock);
}

static void routes_changed(void *opaque)
{
    struct board *b = opaque;

    if (b->loading)
        return;
    pthread_mutex_lock(&b->isa.lock);
    pirqs_drive(b);
    pthread_mutex_unlock(&b->isa.lock);
}

static struct irq_line isa_line(struct board *b, unsigned n)
{
    return (struct irq_line){.set = isa_line_set, .sink = b, .n = n};
}

/* A device's ends of its stream; and the stream's ends of COM1. */
static size_t stream_put(void *opaque, const u8 *buf, size_t len)
{
    return chardev_write(opaque, buf, len);
}

static void stream_accept_input(void *opaque)
{
    chardev_accept_input(opaque);
}

static size_t com1_can_receive(void *opaque)
{
    return serial_can_receive(opaque);
}

static size_t com1_receive(void *opaque, const u8 *buf, size_t len)
{
    return serial_receive(opaque, buf, len);
}

static void com1_writable(void *opaque)
{
    serial_writable(opaque);
}

static void com1_receive_break(void *opaque)
{
    serial_receive_break(opaque);
}

/* Notes a device that was created, for its reset and its end. */
static int add(struct board *b, struct device *dev)
{
    b->devices[b->ndevices++] = dev;
    return 0;
}

static int create_pic(struct board *b, struct error *err)
{
    struct pic_config config = {.intr = {.set = extint_set, .sink = b}};

    b->pic = pic_create(&b->config.env, &config, err);
    return b->pic ? add(b, pic_device(b->pic)) : -EIO;
}

static int create_ioapic(struct board *b, struct error *err)
{
    struct ioapic_config config = {.base = LAYOUT_IOAPIC_BASE, .msi = msi_sink(b)};

    b->ioapic = ioapic_create(&b->config.env, &config, err);
    return b->ioapic ? add(b, ioapic_device(b->ioapic)) : -EIO;
}

static int create_pit(struct board *b, struct error *err)
{
    struct pit_config config = {.irq = isa_line(b, IRQ_PIT)};
    struct pit *pit = pit_create(&b->config.env, &config, err);

    return pit ? add(b, pit_device(pit)) : -EIO;
}

static int create_hpet(struct board *b, struct error *err)
{
    struct hpet_config config = {
        .base = LAYOUT_HPET_BASE,
        .msi = msi_sink(b),
        .legacy_route = hpet_legacy_route,
        .opaque = b,
    };
    struct hpet *hpet;

    for (unsigned i = 0; i < HPET_PINS; i++)
        config.pins[i] = (struct irq_line){.set = ioapic_set_irq, .sink = b->ioapic, .n = i};
    for (unsigned i = 0; i < LEGACY_COUNT; i++)
        config.legacy[i] = (struct irq_line){.set = hpet_legacy_set, .sink = b, .n = i};
    hpet = hpet_create(&b->config.env, &config, err);
    return hpet ? add(b, hpet_device(hpet)) : -EIO;
}

static void set_cmos_bytes(struct rtc *rtc, u8 index, u64 value, unsigned bytes)
{
    for (unsigned i = 0; i < bytes; i++)
        rtc_set_cmos(rtc, (u8)(index + i), (u8)(value >> (8 * i)));
}

/* The memory sizes where a PC's firmware leaves them. */
static void set_cmos_memory(struct board *b)
{
    u64 low_end = 0, high = 0;

    for (unsigned i = 0; i < b->config.e820->count; i++) {
        const struct e820_entry *e = &b->config.e820->entries[i];

        if (e->type == E820_RAM && e->base >= LAYOUT_HIGH_RAM_BASE)
            high += e->size;
        else if (e->type == E820_RAM)
            low_end = MAX(low_end, e->base + e->size);
    }
    u64 extended = low_end > MIB(1) ? (low_end - MIB(1)) >> 10 : 0;
    u64 above_16m = low_end > MIB(16) ? (low_end - MIB(16)) >> 16 : 0;

    set_cmos_bytes(b->rtc, CMOS_BASE_MEMORY, LAYOUT_EBDA_BASE >> 10, 2);
    set_cmos_bytes(b->rtc, CMOS_EXTENDED_MEMORY, MIN(extended, 0xffff), 2);
    set_cmos_bytes(b->rtc, CMOS_EXTENDED_MEMORY2, MIN(extended, 0xffff), 2);
    set_cmos_bytes(b->rtc, CMOS_MEMORY_16MIB, MIN(above_16m, 0xffff), 2);
    set_cmos_bytes(b->rtc, CMOS_MEMORY_4GIB, MIN(high >> 16, 0xffffff), 3);
}

static int create_rtc(struct board *b, struct error *err)
{
    struct rtc_config config = {.irq = isa_line(b, IRQ_RTC)};

    b->rtc = rtc_create(&b->config.env, &config, err);
    if (!b->rtc)
        return -EIO;
    set_cmos_memory(b);
    return add(b, rtc_device(b->rtc));
}

static int create_com1(struct board *b, struct error *err)
{
    struct chardev *chr = b->config.serial;
    struct serial_config config = {.base = PORT_COM1, .irq = isa_line(b, IRQ_COM1)};

    if (chr)
        config.ops = (struct serial_ops){stream_put, stream_accept_input, chr};
    b->com1 = serial_create(&b->config.env, &config, err);
    if (!b->com1)
        return -EIO;
    if (chr) {
        struct chardev_handlers handlers = {com1_can_receive, com1_receive, com1_writable,
                                            com1_receive_break, b->com1};

        chardev_attach(chr, &handlers);
    }
    return add(b, serial_device(b->com1));
}

static int create_i8042(struct board *b, struct error *err)
{
    struct i8042_config config = {
        .keyboard_irq = isa_line(b, IRQ_KEYBOARD),
        .mouse_irq = isa_line(b, IRQ_MOUSE),
        .a20 = &b->a20,
        .power = b->config.power,
    };

    b->keyboard = i8042_create(&b->config.env, &config, err);
    return b->keyboard ? add(b, i8042_device(b->keyboard)) : -EIO;
}

struct i8042 *board_keyboard(struct board *b)
{
    return b->keyboard;
}

/* Port 0xCF9, which lies within the host bridge's. No guest runs before there is a sysport. */
static u8 reset_control_read(void *opaque)
{
    struct board *b = opaque;

    return sysport_reset_control_read(b->sysport);
}

static void reset_control_write(void *opaque, u8 value)
{
    struct board *b = opaque;

    sysport_reset_control_write(b->sysport, value);
}

static void want_update(void *opaque)
{
    struct board *b = opaque;

    if (b->config.update_wanted)
        b->config.update_wanted(b->config.opaque);
}

static int create_pci(struct board *b, struct error *err)
{
    struct pci_host_config config = {
        .port = PORT_PCI_CONFIG,
        .msi = msi_sink(b),
        .reset_control_read = reset_control_read,
        .reset_control_write = reset_control_write,
        .pam_written = b->config.firmware ? want_update : NULL,
        .opaque = b,
    };

    for (unsigned i = 0; i < PCI_PIRQS; i++)
        config.pirq[i] = (struct irq_line){.set = pirq_set, .sink = b, .n = i};
    b->pci = pci_host_create(&b->config.env, &config, err);
    return b->pci ? add(b, pci_host_device(b->pci)) : -EIO;
}

static int create_sysport(struct board *b, struct error *err)
{
    struct sysport_config config = {
        .a20 = &b->a20,
        .power = b->config.power,
        .debug_exit_port = b->config.debug_exit_port,
        .reset_in_bridge = true,
    };

    b->sysport = sysport_create(&b->config.env, &config, err);
    if (b->sysport)
        return add(b, sysport_device(b->sysport));
    if (err->class == ERROR_INPUT)
        error_prefix(err, "--debug-exit: give a free port, such as 0xf4");
    return -EIO;
}

static int create_acpi_pm(struct board *b, struct error *err)
{
    struct acpi_pm_config config = {
        .pm1_evt = PORT_ACPI_PM1_EVT,
        .pm1_cnt = PORT_ACPI_PM1_CNT,
        .pm_tmr = PORT_ACPI_PM_TMR,
        .gpe0 = PORT_ACPI_GPE0,
        .sci = isa_line(b, IRQ_SCI),
        .power = b->config.power,
    };

    b->pm = acpi_pm_create(&b->config.env, &config, err);
    return b->pm ? add(b, acpi_pm_device(b->pm)) : -EIO;
}

static void pm_base_changed(void *opaque, u16 base)
{
    struct board *b = opaque;

    acpi_pm_move(b->pm, base);
}

/* Firmware chooses where the ACPI registers are; they are nowhere until then. */
static int create_lpc(struct board *b, struct error *err)
{
    struct lpc_config config = {pm_base_changed, routes_changed, b};

    if (!b->config.firmware)
        return 0;
    acpi_pm_move(b->pm, 0);
    b->lpc = lpc_create(&b->config.env, &config, b->pci, err);
    return b->lpc ? add(b, lpc_device(b->lpc)) : -EIO;
}

static int create_vga(struct board *b, struct error *err)
{
    const struct firmware *fw = b->config.firmware;
    struct vga_config config = {0};

    if (!fw)
        return 0;
    config.rom = fw->vga_rom;
    config.rom_size = fw->vga_rom_size;
    b->vga = vga_create(&b->config.env, &config, b->pci, PCI_DEVFN(PCI_SLOT_VGA, 0), err);
    return b->vga ? add(b, vga_device(b->vga)) : -EIO;
}

struct vga *board_vga(struct board *b)
{
    return b->vga;
}

static int create_pflash(struct board *b, struct error *err)
{
    const struct firmware *fw = b->config.firmware;
    struct pflash_config config;
    struct pflash *p;

    if (!fw || !fw->vars)
        return 0;
    config = (struct pflash_config){
        .base = LAYOUT_ROM_END - fw->rom_size - fw->vars_size,
        .data = fw->vars,
        .size = (u32)fw->vars_size,
        .fd = fw->vars_fd,
    };
    p = pflash_create(&b->config.env, &config, err);
    return p ? add(b, pflash_device(p)) : -EIO;
}

static int create_debugcon(struct board *b, struct error *err)
{
    struct debugcon *d;

    if (!b->config.firmware)
        return 0;
    d = debugcon_create(&b->config.env, PORT_DEBUGCON, err);
    return d ? add(b, debugcon_device(d)) : -EIO;
}

static int create_pvpanic(struct board *b, struct error *err)
{
    struct pvpanic_config config = {.port = PORT_PVPANIC, .power = b->config.power};
    struct pvpanic *panic = pvpanic_create(&b->config.env, &config, err);

    return panic ? add(b, pvpanic_device(panic)) : -EIO;
}

/* PCI's window above 4 GiB lies behind all memory, if it ends on the bus. */
static void pci_window64(struct board *b, struct acpi_config *config)
{
    u64 end = memory_map_end(b->config.env.memory);

    end = (end + LAYOUT_MMIO64_ALIGN - 1) & ~(LAYOUT_MMIO64_ALIGN - 1);
    if (end + LAYOUT_MMIO64_ALIGN > BIT(b->config.phys_bits))
        return;
    config->mmio64_base = end;
    config->mmio64_size = LAYOUT_MMIO64_ALIGN;
}

/* The number of possible APIC IDs: firmware counts by them. */
static u16 apic_id_limit(const struct board *b)
{
    return (u16)(cpuid_model_apic_id(b->config.cpuid, b->config.cpus - 1) + 1);
}

static int create_fw_cfg(struct board *b, struct error *err)
{
    struct fw_cfg_config config = {.port = PORT_FW_CFG};
    struct fw_cfg *fw = fw_cfg_create(&b->config.env, &config, err);
    int ret;

    if (!fw)
        return -EIO;
    add(b, fw_cfg_device(fw));
    ret = fw_cfg_add_u16(fw, FW_CFG_NB_CPUS, (u16)b->config.cpus, err);
    if (!ret)
        ret = fw_cfg_add_u16(fw, FW_CFG_MAX_CPUS, apic_id_limit(b), err);
    b->fw_cfg = fw;
    return ret;
}

/* A disk's write failed, under werror=stop. */
static void disk_stop(void *opaque, const char *disk, int error)
{
    struct board *b = opaque;

    log_error("%s: a write failed: %s: the machine is paused; mend that, then: kill -CONT %d", disk,
              strerror(error), (int)getpid());
    b->config.power.request(b->config.power.sink, POWER_PAUSE, 0);
}

/* The next free slot for a card, as a devfn; or -1 with err set. */
static int card_devfn(struct board *b, struct error *err)
{
    int slot = pci_host_free_slot(b->pci, PCI_SLOT_FIRST_CARD);

    if (slot < 0)
        return error_input(err, "the PCI bus has no free slot: give fewer disks and other cards");
    return PCI_DEVFN(slot, 0);
}

/* A device of another process's. Their saved states are told apart by their places on the bus. */
static struct virtio *create_vhost_user(struct board *b, const struct vhost_user_config *config,
                                        u16 place, struct error *err)
{
    struct virtio *v = vhost_user_create(&b->config.env, config, b->pci, place, err);

    if (v)
        virtio_device(v)->instance = place;
    return v;
}

static struct virtio *create_disk_at(struct board *b, const struct machine_disk *disk, u16 place,
                                     struct error *err)
{
    struct virtio_blk_config config = {
        .backend = disk->backend,
        .serial = disk->serial,
        .queues = MIN(b->config.cpus, DISK_QUEUES_MAX),
    };
    struct vhost_user_config vhost = {
        .kind = VHOST_USER_BLK, .path = disk->vhost_user, .queues = config.queues};

    if (disk->vhost_user)
        return create_vhost_user(b, &vhost, place, err);
    return virtio_blk_create(&b->config.env, &config, b->pci, place, err);
}

static int create_disk(struct board *b, const struct machine_disk *disk, char *boot_path,
                       struct error *err)
{
    int devfn = card_devfn(b, err);
    struct virtio *v;

    if (devfn < 0)
        return devfn;
    snprintf(boot_path, FIRMWARE_PATH_MAX, "/pci@i0cf8/scsi@%x/disk@0,0", PCI_SLOT(devfn));
    v = create_disk_at(b, disk, (u16)devfn, err);
    return v ? add(b, virtio_device(v)) : -EIO;
}

/* A console port's ends of its stream, and the stream's ends of the port. */
static size_t port_can_receive(void *opaque)
{
    struct console_end *e = opaque;

    return virtio_console_can_receive(e->board->console, e->port);
}

static size_t port_receive(void *opaque, const u8 *buf, size_t len)
{
    struct console_end *e = opaque;

    return virtio_console_receive(e->board->console, e->port, buf, len);
}

static void port_writable(void *opaque)
{
    struct console_end *e = opaque;

    virtio_console_writable(e->board->console, e->port);
}

static void port_receive_break(void *opaque)
{
}

static int create_console(struct board *b, struct error *err)
{
    const struct machine_consoles *c = b->config.consoles;
    struct console_port ports[MACHINE_CONSOLES_MAX];
    int devfn;

    _Static_assert(MACHINE_CONSOLES_MAX <= VIRTIO_CONSOLE_PORTS_MAX, "the device has them all");
    if (!c || !c->count)
        return 0;
    devfn = card_devfn(b, err);
    if (devfn < 0)
        return devfn;
    for (unsigned i = 0; i < c->count; i++)
        ports[i] = (struct console_port){.name = c->port[i].name,
                                         .put = stream_put,
                                         .accept_input = stream_accept_input,
                                         .opaque = c->port[i].chr};
    b->console = virtio_console_create(&b->config.env, ports, c->count, b->pci, (u8)devfn, err);
    if (!b->console)
        return -EIO;
    for (unsigned i = 0; i < c->count; i++) {
        struct chardev_handlers handlers = {port_can_receive, port_receive, port_writable,
                                            port_receive_break, &b->console_ends[i]};

        b->console_ends[i] = (struct console_end){b, i};
        chardev_attach(c->port[i].chr, &handlers);
    }
    return add(b, virtio_device(virtio_console_virtio(b->console)));
}

static int create_rng(struct board *b, struct error *err)
{
    int devfn = card_devfn(b, err);
    struct virtio *v = devfn < 0 ? NULL : virtio_rng_create(&b->config.env, b->pci, (u8)devfn, err);

    return v ? add(b, virtio_device(v)) : -EIO;
}

static int create_balloon(struct board *b, struct error *err)
{
    int devfn = card_devfn(b, err);

    if (devfn < 0)
        return devfn;
    b->balloon = virtio_balloon_create(&b->config.env, b->pci, (u8)devfn, err);
    return b->balloon ? add(b, virtio_device(virtio_balloon_virtio(b->balloon))) : -EIO;
}

struct virtio_balloon *board_balloon(struct board *b)
{
    return b->balloon;
}

static int create_disks(struct board *b, struct error *err)
{
    const struct machine_disks *disks = b->config.disks;
    int ret = 0;

    for (unsigned i = 0; disks && i < disks->count && !ret; i++) {
        const struct machine_disk *disk = &disks->disk[i];

        if (disk->stop_on_error)
            block_stop_on_error(disk->backend, disk_stop, b);
        if (disk->bus == MACHINE_DISK_VIRTIO)
            ret = create_disk(b, disk, b->boot_paths[i], err);
    }
    return ret;
}

/* The serial number of the controller that a disk, the nth, is a namespace of. */
static void nvme_serial(const struct machine_disk *disk, unsigned i, char *out)
{
    if (disk->serial)
        snprintf(out, NVME_SERIAL_SIZE + 1, "%s", disk->serial);
    else
        snprintf(out, NVME_SERIAL_SIZE + 1, "DOPPEL%u", i);
}

/* The controller of disk `first`, and of those behind it with its serial number; they are struck off `left`. */
static int create_nvme_controller(struct board *b, unsigned first, u32 *left, struct error *err)
{
    const struct machine_disks *disks = b->config.disks;
    char serial[NVME_SERIAL_SIZE + 1], other[NVME_SERIAL_SIZE + 1];
    struct nvme_config config = {.serial = serial};
    int devfn = card_devfn(b, err);
    struct nvme *nvme;

    if (devfn < 0)
        return devfn;
    nvme_serial(&disks->disk[first], first, serial);
    for (u32 rest = *left; rest; rest &= rest - 1) {
        unsigned i = (unsigned)__builtin_ctz(rest);

        nvme_serial(&disks->disk[i], i, other);
        if (strcmp(serial, other))
            continue;
        *left &= ~BIT32(i);
        config.namespaces[config.count++] = disks->disk[i].backend;
        /* OVMF goes by this name and the EUI-64, which is 0. */
        snprintf(b->boot_paths[i], FIRMWARE_PATH_MAX, "/pci@i0cf8/pci8086,5845@%x/namespace@%x,0",
                 PCI_SLOT((unsigned)devfn), config.count);
    }
    nvme = nvme_create(&b->config.env, &config, b->pci, (u8)devfn, err);
    if (!nvme)
        return -EIO;
    nvme_device(nvme)->instance = first;
    return add(b, nvme_device(nvme));
}

static int create_nvme(struct board *b, struct error *err)
{
    const struct machine_disks *disks = b->config.disks;
    u32 left = 0;
    int ret = 0;

    _Static_assert(MACHINE_DISKS_MAX <= NVME_NAMESPACES_MAX, "one controller may have all disks");
    for (unsigned i = 0; disks && i < disks->count; i++) {
        if (disks->disk[i].bus == MACHINE_DISK_NVME)
            left |= BIT32(i);
    }
    while (left && !ret)
        ret = create_nvme_controller(b, (unsigned)__builtin_ctz(left), &left, err);
    return ret;
}

static struct virtio *create_net_at(struct board *b, struct net_backend *net, u16 place,
                                    struct error *err)
{
    struct vhost_user_config vhost = {
        .kind = VHOST_USER_NET, .path = net_vhost_user_path(net), .mac = net_info(net)->mac};
    struct virtio_net_config config = {.backend = net};

    if (vhost.path)
        return create_vhost_user(b, &vhost, place, err);
    if (b->config.firmware) {
        config.rom = b->config.firmware->net_rom;
        config.rom_size = b->config.firmware->net_rom_size;
    }
    return virtio_net_create(&b->config.env, &config, b->pci, place, err);
}

static int create_net(struct board *b, unsigned i, struct error *err)
{
    struct net_backend *net = b->config.nets->backend[i];
    int devfn = card_devfn(b, err);
    struct virtio *v = devfn < 0 ? NULL : create_net_at(b, net, (u16)devfn, err);

    if (!v)
        return -EIO;
    if (!net_vhost_user_path(net))
        virtio_device(v)->instance = i;
    snprintf(b->net_boot_paths[i], FIRMWARE_PATH_MAX, "/pci@i0cf8/ethernet@%x/ethernet-phy@0",
             PCI_SLOT((unsigned)devfn));
    return add(b, virtio_device(v));
}

static int create_nets(struct board *b, struct error *err)
{
    int ret = 0;

    for (unsigned i = 0; !ret && b->config.nets && i < b->config.nets->count; i++)
        ret = create_net(b, i, err);
    return ret;
}

static int create_vsock(struct board *b, struct error *err)
{
    int devfn;
    struct virtio *v;

    if (!b->config.nets || !b->config.nets->vsock)
        return 0;
    devfn = card_devfn(b, err);
    if (devfn < 0)
        return devfn;
    v = virtio_vsock_create(&b->config.env, b->config.nets->vsock, b->pci, (u8)devfn, err);
    return v ? add(b, virtio_device(v)) : -EIO;
}

static int create_share(struct board *b, unsigned i, struct error *err)
{
    const struct machine_share *share = &b->config.shares->dir[i];
    struct vhost_user_config vhost = {
        .kind = VHOST_USER_FS, .path = share->vhost_user, .tag = share->tag};
    int devfn = card_devfn(b, err);
    struct virtio *v;

    if (devfn < 0)
        return devfn;
    if (vhost.path)
        v = create_vhost_user(b, &vhost, (u16)devfn, err);
    else
        v = virtio_fs_create(&b->config.env, share->share, share->tag, b->pci, (u8)devfn, err);
    if (!v)
        return -EIO;
    if (!vhost.path)
        virtio_device(v)->instance = i;
    return add(b, virtio_device(v));
}

static int create_shares(struct board *b, struct error *err)
{
    int ret = 0;

    for (unsigned i = 0; !ret && b->config.shares && i < b->config.shares->count; i++)
        ret = create_share(b, i, err);
    return ret;
}

static int create_pmems(struct board *b, struct error *err)
{
    const struct machine_pmems *pmems = b->config.pmems;

    for (unsigned i = 0; pmems && i < pmems->count; i++) {
        const struct memory_slot *slot = memory_map_pmem(b->config.env.memory, i);
        struct virtio_pmem_config config = {pmems->backend[i], slot->gpa, slot->size};
        int devfn = card_devfn(b, err);
        struct virtio *v;

        if (devfn < 0)
            return devfn;
        v = virtio_pmem_create(&b->config.env, &config, b->pci, (u16)devfn, err);
        if (!v)
            return -EIO;
        add(b, virtio_device(v));
    }
    return 0;
}

static int create_slots(struct board *b, struct error *err)
{
    b->slots.card_gone = b->config.card_gone;
    b->slots.opaque = b->config.opaque;
    for (unsigned i = 0; i < b->config.slots; i++) {
        struct device *port = slots_add(&b->slots, b->pci, want_update, b, err);

        if (!port)
            return -EIO;
        add(b, port);
    }
    return 0;
}

/* A controller with one namespace, in a slot. */
static struct device *create_nvme_at(struct board *b, const struct machine_disk *disk,
                                     unsigned slot, u16 place, struct error *err)
{
    char serial[NVME_SERIAL_SIZE + 1];
    struct nvme_config config = {.serial = serial, .namespaces = {disk->backend}, .count = 1};
    struct nvme *nvme;

    nvme_serial(disk, MACHINE_DISKS_MAX + slot, serial);
    nvme = nvme_create(&b->config.env, &config, b->pci, place, err);
    if (!nvme)
        return NULL;
    nvme_device(nvme)->instance = MACHINE_DISKS_MAX + slot;
    return nvme_device(nvme);
}

int board_plug_disk(struct board *b, unsigned slot, const struct machine_disk *disk,
                    struct error *err)
{
    int place = slots_place(&b->slots, slot, err);
    struct device *card;

    if (place < 0)
        return place;
    if (disk->stop_on_error)
        block_stop_on_error(disk->backend, disk_stop, b);
    if (disk->bus == MACHINE_DISK_NVME) {
        card = create_nvme_at(b, disk, slot, (u16)place, err);
    } else {
        struct virtio *v = create_disk_at(b, disk, (u16)place, err);

        card = v ? virtio_device(v) : NULL;
    }
    if (!card)
        return -EIO;
    slots_insert(&b->slots, slot, card, disk->backend);
    return 0;
}

int board_plug_net(struct board *b, unsigned slot, struct net_backend *net, struct error *err)
{
    int place = slots_place(&b->slots, slot, err);
    struct virtio *v;

    if (place < 0)
        return place;
    v = create_net_at(b, net, (u16)place, err);
    if (!v)
        return -EIO;
    slots_insert(&b->slots, slot, virtio_device(v), NULL);
    return 0;
}

int board_unplug(struct board *b, unsigned slot, bool force, struct error *err)
{
    return slots_remove(&b->slots, slot, force, err);
}

/* Disks begin at the first drive, CD-ROMs at the third, which is the second channel's first. -1: no room. */
static int place_on_ide(const struct ide_config *config, bool cdrom)
{
    for (unsigned i = 0; i < IDE_DRIVES; i++) {
        unsigned n = (cdrom ? i + 2 : i) % IDE_DRIVES;

        if (!config->drives[n].backend)
            return (int)n;
    }
    return -1;
}

static int create_ide(struct board *b, struct error *err)
{
    struct ide_config config = {.irq = {isa_line(b, IRQ_IDE), isa_line(b, IRQ_IDE + 1)}};
    const struct machine_disks *disks = b->config.disks;
    bool wanted = false;
    struct ide *ide;

    for (unsigned i = 0; disks && i < disks->count; i++) {
        const struct machine_disk *disk = &disks->disk[i];
        int n = place_on_ide(&config, disk->cdrom);

        if (disk->bus != MACHINE_DISK_IDE)
            continue;
        if (n < 0)
            return error_input(err, "an IDE controller has %d drives at most", IDE_DRIVES);
        config.drives[n] = (struct ide_drive_config){disk->backend, disk->serial, disk->cdrom};
        snprintf(b->boot_paths[i], FIRMWARE_PATH_MAX, "/pci@i0cf8/ide@%x/drive@%d/disk@%d",
                 PCI_SLOT_IDE, n / 2, n % 2);
        wanted = true;
    }
    if (!wanted)
        return 0;
    ide = ide_create(&b->config.env, &config, b->pci, PCI_DEVFN(PCI_SLOT_IDE, 0), err);
    return ide ? add(b, ide_device(ide)) : -EIO;
}

struct apic_ids {
    u32 id[UINT8_MAX];
};

/* What the tables say of the processors. They are to be gone through while `ids` lasts. */
static void describe_processors(const struct board *b, struct apic_ids *ids,
                                struct acpi_config *config)
{
    for (unsigned n = 0; n < b->config.cpus; n++)
        ids->id[n] = cpuid_model_apic_id(b->config.cpuid, n);
    config->ncpus = b->config.cpus;
    config->apic_ids = ids->id;
}

/* When all devices are there. */
static int add_firmware_files(struct board *b, struct error *err)
{
    struct acpi_config config = {
        .ioapic_id = IOAPIC_ID,
        .mmio32_end = LAYOUT_MMIO32_FIRMWARE_END,
        .vga = true,
    };
    const struct machine_disks *disks = b->config.disks;
    const struct machine_nets *nets = b->config.nets;
    struct firmware_boot_device devices[MACHINE_DISKS_MAX + MACHINE_NETS_MAX];
    struct apic_ids ids;
    unsigned n = 0;
    int ret;

    if (!b->config.firmware)
        return 0;
    describe_processors(b, &ids, &config);
    for (; disks && n < disks->count; n++)
        devices[n] = (struct firmware_boot_device){
            b->boot_paths[n], disks->disk[n].cdrom ? FIRMWARE_BOOT_CDROM : FIRMWARE_BOOT_DISK};
    for (unsigned i = 0; nets && i < nets->count; i++)
        devices[n++] = (struct firmware_boot_device){b->net_boot_paths[i], FIRMWARE_BOOT_NETWORK};

    pci_window64(b, &config);
    ret = firmware_add_files(b->config.firmware, b->fw_cfg, b->config.e820, &config, err);
    /* Firmware would place PCI behind the RAM, where files are. */
    b->memory_end = memory_map_end(b->config.env.memory);
    if (!ret && b->config.pmems && b->config.pmems->count)
        ret = fw_cfg_add_file(b->fw_cfg, "etc/reserved-memory-end", &b->memory_end,
                              sizeof(b->memory_end), FW_CFG_BORROW, err);
    return ret ? ret : firmware_add_boot_order(b->config.firmware, b->fw_cfg, devices, n, err);
}

struct board *board_create(const struct board_config *config, struct error *err)
{
    /*
     * Interrupt controllers first: the others may raise their lines from the start. The system ports
     * last: the user chooses one of them, and whose place it would take is there by then.
     */
    static int (*const steps[])(struct board * b, struct error * err) = {
        create_pic,     create_ioapic,  create_pci,         create_pit,     create_hpet,
        create_rtc,     create_com1,    create_i8042,       create_acpi_pm, create_lpc,
        create_vga,     create_pvpanic, create_debugcon,    create_pflash,  create_fw_cfg,
        create_sysport, create_disks,   create_nvme,        create_ide,     create_console,
        create_rng,     create_balloon, create_nets,        create_vsock,   create_shares,
        create_pmems,   create_slots,   add_firmware_files,
    };
    struct board *b = calloc(1, sizeof(*b));

    _Static_assert(ARRAY_SIZE(steps) + MACHINE_DISKS_MAX + MACHINE_NETS_MAX + MACHINE_SHARES_MAX +
                           MACHINE_PMEMS_MAX + MACHINE_SLOTS_MAX <=
                       BOARD_MAX_DEVICES,
                   "devices[] holds them all");
    if (!b) {
        error_host(err, ENOMEM, "cannot create the board");
        return NULL;
    }
    b->config = *config;
    pthread_mutex_init(&b->isa.lock, NULL);
    if (config->firmware) {
        b->no_rom = malloc(LAYOUT_SHADOW_END - LAYOUT_SHADOW_BASE);
        if (!b->no_rom) {
            error_host(err, ENOMEM, "cannot create the board");
            board_destroy(b);
            return NULL;
        }
        memset(b->no_rom, 0xff, LAYOUT_SHADOW_END - LAYOUT_SHADOW_BASE);
    }
    a20_gate_init(&b->a20, a20_changed, b);
    for (size_t i = 0; i < ARRAY_SIZE(steps); i++) {
        if (steps[i](b, err)) {
            board_destroy(b);
            return NULL;
        }
    }
    return b;
}

void board_destroy(struct board *b)
{
    if (b->config.serial)
        chardev_attach(b->config.serial, NULL);
    for (unsigned i = 0; b->console && i < b->config.consoles->count; i++)
        chardev_attach(b->config.consoles->port[i].chr, NULL);
    slots_remove_all(&b->slots);
    /* The last first, so that whoever raises a line goes before what it is wired to. */
    while (b->ndevices) {
        struct device *dev = b->devices[--b->ndevices];

        dev->ops->destroy(dev);
    }
    pthread_mutex_destroy(&b->isa.lock);
    free(b->no_rom);
    free(b);
}

void board_reset(struct board *b)
{
    struct device *dev;

    for (unsigned i = 0; (dev = next_device(b, &i));)
        dev->ops->reset(dev);
    slots_update(&b->slots);
}

void board_stop(struct board *b)
{
    struct device *dev;

    for (unsigned i = 0; (dev = next_device(b, &i));) {
        if (dev->ops->stop)
            dev->ops->stop(dev);
    }
}

bool board_is_busy(struct board *b)
{
    struct device *dev;
    bool busy = false;

    for (unsigned i = 0; (dev = next_device(b, &i));)
        busy |= dev->ops->busy && dev->ops->busy(dev);
    return busy;
}

void board_start(struct board *b)
{
    struct device *dev;

    for (unsigned i = 0; (dev = next_device(b, &i));) {
        if (dev->ops->start)
            dev->ops->start(dev);
    }
    for (unsigned i = 0; b->config.disks && i < b->config.disks->count; i++) {
        if (b->config.disks->disk[i].backend)
            block_resume(b->config.disks->disk[i].backend);
    }
    for (unsigned i = 0; i < b->slots.count; i++) {
        if (b->slots.slot[i].disk)
            block_resume(b->slots.slot[i].disk);
    }
    if (!b->config.serial)
        return;
    serial_writable(b->com1);
    chardev_accept_input(b->config.serial);
}

void board_save(struct board *b, struct state_writer *w)
{
    struct device *dev;

    pthread_mutex_lock(&b->isa.lock);
    state_write_section(w, &isa_state, 0, &b->isa);
    pthread_mutex_unlock(&b->isa.lock);
    for (unsigned i = 0; (dev = next_device(b, &i));) {
        device_lock(dev);
        state_write_section(w, dev->state, dev->instance, dev);
        device_unlock(dev);
    }
}

static int load_sections(struct board *b, struct state_reader *r, struct error *err)
{
    struct device *dev;
    int ret;

    pthread_mutex_lock(&b->isa.lock);
    ret = state_read_section(r, &isa_state, 0, &b->isa, err);
    pthread_mutex_unlock(&b->isa.lock);
    for (unsigned i = 0; ret == 0 && (dev = next_device(b, &i));) {
        device_lock(dev);
        ret = state_read_section(r, dev->state, dev->instance, dev, err);
        device_unlock(dev);
    }
    return ret;
}

/*
 * Each device derives the levels of its lines from its registers, and the listeners at the other ends
 * (the ISA wires, PIC, IOAPIC) have them in their own state: what is told meanwhile is no change, and
 * must make no edge. The lines that leave the board, INTR and A20, have no state at their other ends: the
 * PIC and the gate drive them as always.
 */
int board_load(struct board *b, struct state_reader *r, struct error *err)
{
    int ret;

    b->loading = true;
    ret = load_sections(b, r, err);
    if (b->lpc)
        lpc_loaded(b->lpc);
    pci_host_loaded(b->pci);
    b->loading = false;
    return ret;
}

const char *board_compare(const struct board *a, const struct board *b, char *buf, size_t buflen)
{
    const char *difference = state_compare(&isa_state, &a->isa, &b->isa, buf, buflen);

    const struct device *in_a, *in_b;

    for (unsigned i = 0, j = 0; !difference && (in_a = next_device(a, &i));) {
        in_b = next_device(b, &j);
        if (in_b)
            difference = state_compare(in_a->state, in_a, in_b, buf, buflen);
    }
    return difference;
}

/* PCI's interrupts are levels at the PIC. */
static void set_elcr(struct board *b)
{
    io_bus_write(b->config.env.ports, PORT_PIC_ELCR, BIT(IRQ_PCI_LOW) | BIT(IRQ_PCI_HIGH), 2);
}

int board_prepare_boot(struct board *b, gpa_t *rsdp, struct error *err)
{
    static const struct pci_windows windows = {
        .mmio_base = LAYOUT_MMIO32_BASE,
        .mmio_end = LAYOUT_MMIO32_END,
        .io_base = PORT_PCI_IO_BASE,
        .io_end = PORT_PCI_IO_END,
    };
    struct acpi_config config = {.ioapic_id = IOAPIC_ID, .mmio32_end = LAYOUT_MMIO32_END};
    struct apic_ids ids;

    describe_processors(b, &ids, &config);
    io_bus_write(b->config.env.ports, PORT_FAST_A20, FAST_A20_ON, 1);
    set_elcr(b);
    pci_host_assign(b->pci, &windows, LAYOUT_ECAM_BASE, pirq_isa_irq);
    pci_window64(b, &config);
    return acpi_build(&config, LAYOUT_ACPI_BASE, LAYOUT_ACPI_END - LAYOUT_ACPI_BASE,
                      b->config.env.memory, rsdp, err);
}

void board_prepare_firmware(struct board *b)
{
    io_bus_write(b->config.env.ports, PORT_FAST_A20, FAST_A20_ON, 1);
}

/* What the ROM has for [gpa, gpa + size): its last part, as far as that reaches down; ones below. */
static u8 *rom_at(struct board *b, gpa_t gpa)
{
    const struct firmware *fw = b->config.firmware;
    u64 from_end = LAYOUT_SHADOW_END - gpa;
    const struct memory_slot *rom;

    if (gpa < LAYOUT_ROM_LOW_BASE || from_end > fw->rom_size)
        return b->no_rom;
    rom = memory_find(b->config.env.memory, LAYOUT_ROM_END - fw->rom_size);
    return rom->host + (fw->rom_size - from_end);
}

/*
 * A piece that is written as RAM and read as ROM, for copying a ROM onto itself, can't be had from a slot: its writes
 * are dropped. Firmware of today copies from the ROM's place below 4 GiB.
 */
bool board_update_memory(struct board *b)
{
    struct guest_memory *memory = b->config.env.memory;
    bool changed = false;

    if (!b->config.firmware)
        return false;
    for (unsigned n = 0; n < PCI_HOST_PAM_SEGMENTS; n++) {
        struct pci_host_pam pam;

        pci_host_pam(b->pci, n, &pam);
        if (pam.access == PCI_HOST_PAM_WRITE)
            log_once(LOG_WARN, "the guest copies a ROM onto itself, which doesn't work here");
        changed |= memory_show(
            memory, pam.base, pam.access & PCI_HOST_PAM_READ ? NULL : rom_at(b, pam.base),
            pam.access == (PCI_HOST_PAM_READ | PCI_HOST_PAM_WRITE) ? 0 : MEMORY_ROM);
    }
    return changed;
}

bool board_update(struct board *b)
{
    slots_update(&b->slots);
    return board_update_memory(b);
}

int board_ack_extint(struct board *b)
{
    return pic_ack(b->pic);
}

void board_eoi(struct board *b, u8 vector)
{
    ioapic_eoi(b->ioapic, vector);
}
