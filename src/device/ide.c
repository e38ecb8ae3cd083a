/*
 * Registers and transfers: ATA/ATAPI-6 (T13/1410D) chapters 7 and 9; bus mastering: "Programming Interface for Bus
 * Master IDE Controller" 1.0; the PCI function: Intel 82371SB (PIIX3) data sheet, chapter 2.3.
 *
 * IDETIM's decode enable bits are set from the start, as not all firmware sets them.
 */
#include "device/ide.h"

#include "device/ide_internal.h"
#include "host/log.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define PIIX3_IDE 0x7010
#define PIIX_IDETIM 0x40 /* 16 bits for each channel */
#define PIIX_IDETIM_ENABLE 0x80
#define INTERFACE_BUS_MASTER 0x80 /* and the ports of old for both channels */

enum {
    REG_DATA,
    REG_FEATURES, /* read: error */
    REG_COUNT,
    REG_LBA_LOW,
    REG_LBA_MID,
    REG_LBA_HIGH,
    REG_DEVICE,
    REG_COMMAND, /* read: status */
    REGS
};

#define BAR_BUS_MASTER 4
#define BM_SIZE 16 /* 8 for each channel */
enum { BM_COMMAND = 0, BM_STATUS = 2, BM_TABLE = 4 };
#define BM_COMMAND_START 0x01
#define BM_COMMAND_TO_MEMORY 0x08
#define BM_STATUS_ACTIVE 0x01
#define BM_STATUS_ERROR 0x02
#define BM_STATUS_INTERRUPT 0x04
#define BM_STATUS_DRIVES 0x60
#define PRD_LAST 0x80000000U

/* ---- ends of commands ---- */

static void update_irq(struct ide_channel *ch)
{
    irq_line_set(&ch->irq, ch->interrupt && !(ch->control & CONTROL_NIEN));
}

void ide_raise(struct ide_channel *ch)
{
    ch->interrupt = true;
    ch->bm_status |= BM_STATUS_INTERRUPT;
    update_irq(ch);
}

static void end_transfer(struct ide_channel *ch)
{
    ch->transfer = IDE_NONE;
    ch->wanted = IDE_WANT_NOTHING;
    ch->left = 0;
    ch->fill = ch->at = ch->block_end = 0;
    if (ch->dma)
        ch->bm_status &= ~BM_STATUS_ACTIVE;
    ch->dma = ch->dma_ready = false;
}

static void set_reason(struct ide_channel *ch)
{
    struct ide_drive *d = ide_drive(ch);

    if (d->cdrom)
        d->count[0] = (d->count[0] & ~7) | REASON_CD | REASON_IO;
}

void ide_done(struct ide_channel *ch)
{
    struct ide_drive *d = ide_drive(ch);

    end_transfer(ch);
    d->status = STATUS_DRDY | STATUS_DSC;
    d->error = 0;
    set_reason(ch);
    ide_raise(ch);
}

void ide_fail(struct ide_channel *ch, u8 error)
{
    struct ide_drive *d = ide_drive(ch);

    end_transfer(ch);
    d->status = STATUS_DRDY | STATUS_ERR;
    d->error = error;
    set_reason(ch);
    ide_raise(ch);
}

/* ---- the loop's side ---- */

static void want(struct ide_channel *ch, enum ide_wanted what)
{
    ch->wanted = what;
    ide_drive(ch)->status = (ide_drive(ch)->status & ~STATUS_DRQ) | STATUS_BSY;
    loop_kick_send(&ch->ide->kick);
}

static void want_more(struct ide_channel *ch);
static void continue_dma(struct ide_channel *ch);
static void reset_channel(struct ide_channel *ch);
static void begin_block(struct ide_channel *ch, bool interrupt);

static void disk_failed(struct ide_channel *ch, enum ide_wanted what, int result)
{
    log_once(LOG_ERROR, "%s: %s failed: %s", block_path(ide_drive(ch)->backend),
             what == IDE_WANT_READ ? "a read" : "a write", strerror(-result));
    if (ide_drive(ch)->cdrom)
        ide_atapi_failed(ch);
    else
        ide_fail(ch, what == IDE_WANT_READ ? ERROR_UNC : ERROR_ABRT);
}

static void disk_done(struct ide_channel *ch, enum ide_wanted what)
{
    u32 len = (u32)ch->iov.iov_len;

    switch (what) {
    case IDE_WANT_READ:
        ch->fill = len;
        ch->at = ch->block_end = 0;
        ch->offset += len;
        ch->left -= len;
        if (ch->dma)
            continue_dma(ch);
        else
            begin_block(ch, true);
        break;
    case IDE_WANT_WRITE:
        ch->offset += len;
        ch->at = ch->fill = 0;
        if (!ch->left)
            ide_done(ch);
        else
            want_more(ch);
        break;
    default:
        ide_done(ch);
        break;
    }
}

static void request_done(struct block_request *r, int result)
{
    struct ide_channel *ch = container_of(r, struct ide_channel, request);
    enum ide_wanted what = ch->wanted;

    device_lock(&ch->ide->pci.dev);
    ch->busy = false;
    ch->wanted = IDE_WANT_NOTHING;
    ide_drive(ch)->status &= ~STATUS_BSY;
    if (ch->reset_waits)
        reset_channel(ch);
    else if (result)
        disk_failed(ch, what, result);
    else
        disk_done(ch, what);
    device_unlock(&ch->ide->pci.dev);
}

static void submit(struct ide_channel *ch)
{
    static const enum block_op ops[] = {[IDE_WANT_READ] = BLOCK_READ,
                                        [IDE_WANT_WRITE] = BLOCK_WRITE,
                                        [IDE_WANT_FLUSH] = BLOCK_FLUSH};
    u64 len = 0;

    if (ch->wanted == IDE_WANT_READ)
        len = MIN(ch->left, IDE_BUFFER);
    else if (ch->wanted == IDE_WANT_WRITE)
        len = ch->fill;
    ch->busy = true;
    ch->iov = (struct iovec){ch->buffer, len};
    ch->request = (struct block_request){
        .op = ops[ch->wanted],
        .offset = len ? ch->offset : 0,
        .len = len,
        .iov = &ch->iov,
        .n = 1,
        .done = request_done,
    };
    block_submit(ide_drive(ch)->backend, &ch->request);
}

static void serve(struct ide *ide)
{
    for (unsigned i = 0; i < IDE_CHANNELS && !ide->stopped; i++) {
        struct ide_channel *ch = &ide->channels[i];

        if (ch->wanted != IDE_WANT_NOTHING && !ch->busy)
            submit(ch);
    }
}

static void kicked(void *opaque)
{
    struct ide *ide = opaque;

    device_lock(&ide->pci.dev);
    serve(ide);
    device_unlock(&ide->pci.dev);
}

static void ide_start(struct device *dev)
{
    struct ide *ide = container_of(dev, struct ide, pci.dev);

    device_lock(dev);
    ide->stopped = false;
    serve(ide);
    device_unlock(dev);
}

static void for_each_disk(struct ide *ide, void (*fn)(struct block_backend *backend))
{
    for (unsigned i = 0; i < IDE_DRIVES; i++) {
        struct block_backend *backend = ide->channels[i / 2].drives[i % 2].backend;

        if (backend)
            fn(backend);
    }
}

static void ide_stop(struct device *dev)
{
    struct ide *ide = container_of(dev, struct ide, pci.dev);

    device_lock(dev);
    ide->stopped = true;
    device_unlock(dev);
    for_each_disk(ide, block_drain);
}

/* A failed write is kept, to be tried again. */
static bool ide_busy(struct device *dev)
{
    struct ide *ide = container_of(dev, struct ide, pci.dev);
    bool busy;

    device_lock(dev);
    busy = ide->channels[0].busy || ide->channels[1].busy;
    device_unlock(dev);
    return busy;
}

/* ---- programmed I/O ---- */

/* A block of the buffer, or of what is to fill it, is the guest's now. */
static void begin_block(struct ide_channel *ch, bool interrupt)
{
    struct ide_drive *d = ide_drive(ch);
    u32 len = MIN(ch->block, ch->fill - ch->at);

    ch->block_end = ch->at + len;
    d->status = STATUS_DRDY | STATUS_DSC | STATUS_DRQ;
    if (d->cdrom) {
        d->count[0] = (d->count[0] & ~7) | (ch->transfer == IDE_IN ? REASON_IO : 0);
        d->lba_mid[0] = (u8)len;
        d->lba_high[0] = (u8)(len >> 8);
    }
    if (interrupt)
        ide_raise(ch);
}

/* The buffer is used up. */
static void want_more(struct ide_channel *ch)
{
    bool first = ch->block_end == 0;

    ch->at = 0;
    if (ch->transfer == IDE_IN) {
        if (ch->left)
            want(ch, IDE_WANT_READ);
        else if (ch->dma || ide_drive(ch)->cdrom)
            ide_done(ch);
        else
            end_transfer(ch); /* a disk's last block was told before it was read */
        return;
    }
    ch->fill = (u32)MIN(ch->left, IDE_BUFFER);
    ch->left -= ch->fill;
    if (ch->dma)
        continue_dma(ch);
    else
        begin_block(ch, !first);
}

static void block_ended(struct ide_channel *ch)
{
    struct ide_drive *d = ide_drive(ch);

    d->status &= ~STATUS_DRQ;
    if (ch->transfer == IDE_PACKET) {
        ide_atapi_packet(ch);
    } else if (ch->at < ch->fill) {
        begin_block(ch, true);
    } else if (ch->transfer == IDE_OUT) {
        want(ch, IDE_WANT_WRITE);
    } else {
        want_more(ch);
    }
}

static u32 read_data(struct ide_channel *ch, unsigned size)
{
    u32 value = 0;

    if (!(ide_drive(ch)->status & STATUS_DRQ) || ch->transfer != IDE_IN || ch->dma)
        return ~0U;
    for (unsigned i = 0; i < size && ch->at < ch->block_end; i++)
        value |= (u32)ch->buffer[ch->at++] << 8 * i;
    if (ch->at == ch->block_end)
        block_ended(ch);
    return value;
}

static void write_data(struct ide_channel *ch, u32 value, unsigned size)
{
    if (!(ide_drive(ch)->status & STATUS_DRQ) || ch->transfer == IDE_IN || ch->dma)
        return;
    for (unsigned i = 0; i < size && ch->at < ch->block_end; i++)
        ch->buffer[ch->at++] = (u8)(value >> 8 * i);
    if (ch->at == ch->block_end)
        block_ended(ch);
}

/* ---- bus-master DMA ---- */

/* The next piece of guest memory. False at the end of the table, or where there is none. */
static bool next_prd(struct ide_channel *ch)
{
    u32 entry[2];

    if (ch->prd_last || memory_read(ch->ide->env.memory, ch->prd, entry, sizeof(entry)) < 0)
        return false;
    ch->prd += sizeof(entry);
    ch->prd_address = entry[0] & ~1U;
    ch->prd_left = entry[1] & 0xfffe;
    if (!ch->prd_left)
        ch->prd_left = 0x10000;
    ch->prd_last = entry[1] & PRD_LAST;
    return true;
}

/* Moves the buffer to or from memory. False when memory ends before it. */
static bool move_buffer(struct ide_channel *ch)
{
    struct guest_memory *memory = ch->ide->env.memory;

    while (ch->at < ch->fill) {
        u32 len;
        int ret;

        if (!ch->prd_left && !next_prd(ch))
            return false;
        len = MIN(ch->prd_left, ch->fill - ch->at);
        if (ch->transfer == IDE_IN)
            ret = memory_write(memory, ch->prd_address, ch->buffer + ch->at, len);
        else
            ret = memory_read(memory, ch->prd_address, ch->buffer + ch->at, len);
        if (ret < 0)
            return false;
        ch->at += len;
        ch->prd_address += len;
        ch->prd_left -= len;
    }
    return true;
}

/* Goes on when there are data, and the guest has started its side. */
static void continue_dma(struct ide_channel *ch)
{
    ide_drive(ch)->status = STATUS_DRDY | STATUS_DSC | STATUS_DRQ;
    ch->dma_ready = true;
    if (!(ch->bm_status & BM_STATUS_ACTIVE))
        return;
    ch->dma_ready = false;
    if (!pci_is_bus_master(&ch->ide->pci) || !move_buffer(ch)) {
        ch->bm_status |= BM_STATUS_ERROR;
        if (ide_drive(ch)->cdrom)
            ide_atapi_failed(ch);
        else
            ide_fail(ch, ERROR_ABRT);
    } else if (ch->transfer == IDE_OUT) {
        want(ch, IDE_WANT_WRITE);
    } else {
        want_more(ch);
    }
}

static void write_bm_command(struct ide_channel *ch, u8 value)
{
    bool start = value & BM_COMMAND_START, was = ch->bm_command & BM_COMMAND_START;

    ch->bm_command = value & (BM_COMMAND_START | BM_COMMAND_TO_MEMORY);
    if (!start)
        ch->bm_status &= ~BM_STATUS_ACTIVE;
    if (!start || was)
        return;
    ch->bm_status |= BM_STATUS_ACTIVE;
    ch->prd = ch->bm_table;
    ch->prd_left = 0;
    ch->prd_last = false;
    if (ch->dma_ready)
        continue_dma(ch);
}

static u64 bm_read(void *opaque, u64 offset, unsigned size)
{
    struct ide *ide = opaque;
    struct ide_channel *ch = &ide->channels[offset >> 3 & 1];
    u64 value = 0;

    device_lock(&ide->pci.dev);
    if ((offset & 7) == BM_COMMAND)
        value = ch->bm_command;
    else if ((offset & 7) == BM_STATUS)
        value = ch->bm_status;
    else if ((offset & 7) >= BM_TABLE)
        value = ch->bm_table >> 8 * (offset & 3);
    device_unlock(&ide->pci.dev);
    return value;
}

static void bm_write(void *opaque, u64 offset, u64 value, unsigned size)
{
    struct ide *ide = opaque;
    struct ide_channel *ch = &ide->channels[offset >> 3 & 1];

    device_lock(&ide->pci.dev);
    if ((offset & 7) == BM_COMMAND) {
        write_bm_command(ch, (u8)value);
    } else if ((offset & 7) == BM_STATUS) {
        ch->bm_status &= ~(value & (BM_STATUS_ERROR | BM_STATUS_INTERRUPT));
        ch->bm_status = (ch->bm_status & ~BM_STATUS_DRIVES) | (value & BM_STATUS_DRIVES);
    } else if ((offset & 7) >= BM_TABLE) {
        u32 mask = (u32)(BIT(8 * size) - 1) << 8 * (offset & 3);

        ch->bm_table = ((ch->bm_table & ~mask) | ((u32)value << 8 * (offset & 3) & mask)) & ~3U;
    }
    device_unlock(&ide->pci.dev);
}

static const struct io_ops bm_ops = {bm_read, bm_write, 4};

/* ---- transfers ---- */

static void begin(struct ide_channel *ch, enum ide_transfer transfer, u32 block, bool dma)
{
    ch->transfer = transfer;
    ch->block = block;
    ch->dma = dma;
    ch->dma_ready = false;
    ch->fill = ch->at = ch->block_end = 0;
}

void ide_reply(struct ide_channel *ch, u32 len, u32 block, bool dma)
{
    begin(ch, IDE_IN, block, dma);
    ch->fill = len;
    if (dma)
        continue_dma(ch);
    else
        begin_block(ch, true);
}

void ide_read(struct ide_channel *ch, u64 offset, u64 len, u32 block, bool dma)
{
    begin(ch, IDE_IN, block, dma);
    ch->offset = offset;
    ch->left = len;
    want_more(ch);
}

void ide_write(struct ide_channel *ch, u64 offset, u64 len, u32 block, bool dma)
{
    begin(ch, IDE_OUT, block, dma);
    ch->offset = offset;
    ch->left = len;
    want_more(ch);
}

void ide_flush(struct ide_channel *ch)
{
    begin(ch, IDE_NONE, 0, false);
    want(ch, IDE_WANT_FLUSH);
}

/* ---- resets ---- */

void ide_signature(struct ide_drive *d)
{
    d->count[0] = d->lba_low[0] = 1;
    d->lba_mid[0] = d->cdrom ? 0x14 : 0;
    d->lba_high[0] = d->cdrom ? 0xeb : 0;
    d->device &= DEVICE_DRIVE_1;
}

static void reset_drive(struct ide_drive *d)
{
    ide_signature(d);
    d->device = 0;
    d->status = d->cdrom ? 0 : STATUS_DRDY | STATUS_DSC;
    d->error = 1; /* diagnostics: passed */
    d->multiple = IDE_MULTIPLE_MAX;
    d->heads = 16;
    d->sectors = 63;
}

static void reset_channel(struct ide_channel *ch)
{
    ch->reset_waits = false;
    end_transfer(ch);
    ch->selected = 0;
    ch->interrupt = false;
    update_irq(ch);
    for (unsigned i = 0; i < 2; i++)
        reset_drive(&ch->drives[i]);
}

static void request_reset(struct ide_channel *ch)
{
    if (!ch->busy) {
        reset_channel(ch);
        return;
    }
    ch->reset_waits = true;
    for (unsigned i = 0; i < 2; i++)
        ch->drives[i].status = STATUS_BSY;
}

static void write_control(struct ide_channel *ch, u8 value)
{
    bool reset = (value & CONTROL_SRST) && !(ch->control & CONTROL_SRST);

    ch->control = value;
    if (reset)
        request_reset(ch);
    update_irq(ch);
}

/* ---- registers ---- */

static bool no_drives(const struct ide_channel *ch)
{
    return ch->drives[0].absent && ch->drives[1].absent;
}

static u8 read_register(struct ide_channel *ch, unsigned reg)
{
    struct ide_drive *d = ide_drive(ch);
    unsigned hob = ch->control & CONTROL_HOB ? 1 : 0;

    if (no_drives(ch))
        return 0;
    switch (reg) {
    case REG_FEATURES:
        return d->absent ? 0 : d->error;
    case REG_COUNT:
        return d->count[hob];
    case REG_LBA_LOW:
        return d->lba_low[hob];
    case REG_LBA_MID:
        return d->absent ? 0 : d->lba_mid[hob];
    case REG_LBA_HIGH:
        return d->absent ? 0 : d->lba_high[hob];
    case REG_DEVICE:
        return d->device | 0xa0 | (ch->selected ? DEVICE_DRIVE_1 : 0);
    case REG_COMMAND:
        ch->interrupt = false;
        update_irq(ch);
        return d->absent ? 0 : d->status;
    default:
        return 0;
    }
}

static void push(u8 reg[2], u8 value)
{
    reg[1] = reg[0];
    reg[0] = value;
}

static void write_command(struct ide_channel *ch, u8 command)
{
    struct ide_drive *d = ide_drive(ch);

    ch->interrupt = false;
    update_irq(ch);
    /* DEVICE RESET is for a packet device that is busy, too; DIAGNOSTIC is for both drives. */
    if (d->absent && command != 0x90)
        return;
    if ((d->status & (STATUS_BSY | STATUS_DRQ)) && !(command == 0x08 && d->cdrom && !ch->busy))
        return;
    end_transfer(ch);
    d->error = 0;
    if (d->cdrom)
        ide_atapi_command(ch, command);
    else
        ide_ata_command(ch, command);
}

static void write_register(struct ide_channel *ch, unsigned reg, u8 value)
{
    ch->control &= ~CONTROL_HOB;
    if (reg == REG_COMMAND) {
        write_command(ch, value);
        return;
    }
    /* Not while a command is under way, which the selected drive's registers are in the hands of (7.5 to 7.11). */
    if (ch->transfer != IDE_NONE || ch->wanted != IDE_WANT_NOTHING || ch->busy || ch->reset_waits)
        return;
    if (reg == REG_DEVICE)
        ch->selected = value & DEVICE_DRIVE_1 ? 1 : 0;
    for (unsigned i = 0; i < 2; i++) {
        struct ide_drive *d = &ch->drives[i];

        switch (reg) {
        case REG_FEATURES:
            push(d->features, value);
            break;
        case REG_COUNT:
            push(d->count, value);
            break;
        case REG_LBA_LOW:
            push(d->lba_low, value);
            break;
        case REG_LBA_MID:
            push(d->lba_mid, value);
            break;
        case REG_LBA_HIGH:
            push(d->lba_high, value);
            break;
        default:
            d->device = value;
            break;
        }
    }
}

static u64 command_read(void *opaque, u64 offset, unsigned size)
{
    struct ide_channel *ch = opaque;
    u64 value = 0;

    device_lock(&ch->ide->pci.dev);
    if (offset == REG_DATA)
        value = read_data(ch, size);
    else
        for (unsigned i = 0; i < size; i++)
            value |= (u64)read_register(ch, (unsigned)offset + i) << 8 * i;
    device_unlock(&ch->ide->pci.dev);
    return value;
}

static void command_write(void *opaque, u64 offset, u64 value, unsigned size)
{
    struct ide_channel *ch = opaque;

    device_lock(&ch->ide->pci.dev);
    if (offset == REG_DATA)
        write_data(ch, (u32)value, size);
    else
        for (unsigned i = 0; i < size; i++)
            write_register(ch, (unsigned)offset + i, (u8)(value >> 8 * i));
    device_unlock(&ch->ide->pci.dev);
}

/* Alternate status: doesn't clear the interrupt. */
static u64 control_read(void *opaque, u64 offset, unsigned size)
{
    struct ide_channel *ch = opaque;
    u8 status;

    device_lock(&ch->ide->pci.dev);
    status = ide_drive(ch)->absent ? 0 : ide_drive(ch)->status;
    device_unlock(&ch->ide->pci.dev);
    return status;
}

static void control_write(void *opaque, u64 offset, u64 value, unsigned size)
{
    struct ide_channel *ch = opaque;

    device_lock(&ch->ide->pci.dev);
    write_control(ch, (u8)value);
    device_unlock(&ch->ide->pci.dev);
}

static const struct io_ops command_ops = {command_read, command_write, 4};
static const struct io_ops control_ops = {control_read, control_write, 1};

/* ---- the device ---- */

static void power_on(struct ide_channel *ch)
{
    reset_channel(ch);
    ch->control = 0;
    ch->bm_command = ch->bm_status = 0;
    ch->bm_table = ch->prd = ch->prd_address = ch->prd_left = 0;
    ch->prd_last = false;
    ch->offset = 0;
    ch->block = 0;
    memset(ch->buffer, 0, sizeof(ch->buffer));
    for (unsigned i = 0; i < 2; i++) {
        struct ide_drive *d = &ch->drives[i];

        memset(d->features, 0, sizeof(d->features));
        d->count[1] = d->lba_low[1] = d->lba_mid[1] = d->lba_high[1] = 0;
        d->dma_mode = 0;
        d->sense = d->sense_code = 0;
        d->medium_changed = d->cdrom;
    }
}

/* Nothing is under way: the machine is stopped, or the device new. */
static void ide_reset(struct device *dev)
{
    struct ide *ide = container_of(dev, struct ide, pci.dev);

    for_each_disk(ide, block_give_up);
    device_lock(dev);
    for (unsigned i = 0; i < IDE_CHANNELS; i++)
        power_on(&ide->channels[i]);
    device_unlock(dev);
    pci_device_reset(&ide->pci);
}

static void ide_destroy(struct device *dev)
{
    struct ide *ide = container_of(dev, struct ide, pci.dev);

    ide_stop(dev);
    for_each_disk(ide, block_give_up);
    loop_kick_close(&ide->kick);
    for (unsigned i = 0; i < IDE_CHANNELS; i++) {
        struct ide_channel *ch = &ide->channels[i];

        if (ch->nranges > 0)
            io_bus_remove(ide->env.ports, &ch->command_range);
        if (ch->nranges > 1)
            io_bus_remove(ide->env.ports, &ch->control_range);
    }
    pci_device_fini(&ide->pci);
    free(ide);
}

static bool drive_is_possible(const struct ide_drive *d)
{
    return d->multiple <= IDE_MULTIPLE_MAX && d->heads >= 1 && d->heads <= 16 && d->sectors >= 1;
}

static bool channel_is_possible(const struct ide_channel *ch)
{
    const struct ide_drive *d = &ch->drives[ch->selected & 1];

    if (ch->selected > 1 || ch->transfer > IDE_PACKET || ch->wanted > IDE_WANT_FLUSH ||
        ch->fill > IDE_BUFFER || ch->at > ch->fill || ch->block_end > ch->fill || ch->reset_waits ||
        (ch->wanted != IDE_WANT_NOTHING && d->absent) ||
        (ch->transfer == IDE_PACKET && (!d->cdrom || ch->fill != IDE_PACKET_SIZE)) ||
        (ch->wanted == IDE_WANT_WRITE && (ch->transfer != IDE_OUT || !ch->fill)) ||
        (ch->wanted == IDE_WANT_READ && (ch->transfer != IDE_IN || !ch->left)) ||
        (ch->transfer == IDE_OUT && (d->cdrom || d->absent || block_is_read_only(d->backend))))
        return false;
    if ((ch->left || ch->transfer == IDE_OUT) &&
        (d->absent || ch->offset % IDE_SECTOR || ch->left % IDE_SECTOR || ch->offset > d->size ||
         ch->left + (ch->transfer == IDE_OUT ? ch->fill : 0) > d->size - ch->offset ||
         ch->fill % IDE_SECTOR))
        return false;
    return ch->transfer == IDE_NONE || ch->block || ch->dma;
}

static int ide_loaded(void *obj, struct error *err)
{
    struct ide *ide = obj;

    for (unsigned i = 0; i < IDE_CHANNELS; i++) {
        struct ide_channel *ch = &ide->channels[i];

        if (!channel_is_possible(ch) || !drive_is_possible(&ch->drives[0]) ||
            !drive_is_possible(&ch->drives[1]))
            return error_input(err, "ide: the saved registers are impossible");
        ch->irq.level = ch->interrupt && !(ch->control & CONTROL_NIEN);
    }
    return 0;
}

static const struct state_field drive_fields[] = {
    STATE_FIELD(struct ide_drive, features),
    STATE_FIELD(struct ide_drive, count),
    STATE_FIELD(struct ide_drive, lba_low),
    STATE_FIELD(struct ide_drive, lba_mid),
    STATE_FIELD(struct ide_drive, lba_high),
    STATE_FIELD(struct ide_drive, device),
    STATE_FIELD(struct ide_drive, status),
    STATE_FIELD(struct ide_drive, error),
    STATE_FIELD(struct ide_drive, multiple),
    STATE_FIELD(struct ide_drive, heads),
    STATE_FIELD(struct ide_drive, sectors),
    STATE_FIELD(struct ide_drive, dma_mode),
    STATE_FIELD(struct ide_drive, sense),
    STATE_FIELD(struct ide_drive, sense_code),
    STATE_FIELD(struct ide_drive, medium_changed),
    STATE_HOST(struct ide_drive, absent),
    STATE_HOST(struct ide_drive, cdrom),
    STATE_HOST(struct ide_drive, serial),
    STATE_HOST(struct ide_drive, size),
    STATE_HOST(struct ide_drive, backend),
};
static const struct state_desc drive_state =
    STATE_DESC("ide_drive", 1, struct ide_drive, drive_fields);

static const struct state_field channel_fields[] = {
    STATE_STRUCTS(struct ide_channel, drives, &drive_state),
    STATE_FIELD(struct ide_channel, selected),
    STATE_FIELD(struct ide_channel, control),
    STATE_FIELD(struct ide_channel, interrupt),
    STATE_FIELD(struct ide_channel, reset_waits),
    STATE_FIELD(struct ide_channel, transfer),
    STATE_FIELD(struct ide_channel, wanted),
    STATE_FIELD(struct ide_channel, dma),
    STATE_FIELD(struct ide_channel, dma_ready),
    STATE_HOST(struct ide_channel, busy),
    STATE_FIELD(struct ide_channel, fill),
    STATE_FIELD(struct ide_channel, at),
    STATE_FIELD(struct ide_channel, block_end),
    STATE_FIELD(struct ide_channel, block),
    STATE_FIELD(struct ide_channel, offset),
    STATE_FIELD(struct ide_channel, left),
    STATE_FIELD(struct ide_channel, bm_command),
    STATE_FIELD(struct ide_channel, bm_status),
    STATE_FIELD(struct ide_channel, bm_table),
    STATE_FIELD(struct ide_channel, prd),
    STATE_FIELD(struct ide_channel, prd_address),
    STATE_FIELD(struct ide_channel, prd_left),
    STATE_FIELD(struct ide_channel, prd_last),
    STATE_BYTES(struct ide_channel, buffer),
    STATE_HOST(struct ide_channel, ide),
    STATE_HOST(struct ide_channel, irq),
    STATE_HOST(struct ide_channel, command_range),
    STATE_HOST(struct ide_channel, control_range),
    STATE_HOST(struct ide_channel, nranges),
    STATE_HOST(struct ide_channel, request),
    STATE_HOST(struct ide_channel, iov),
};
static const struct state_desc channel_state =
    STATE_DESC("ide_channel", 1, struct ide_channel, channel_fields);

static const struct state_field ide_fields[] = {
    STATE_STRUCTS(struct ide, pci, &pci_device_state),
    STATE_HOST(struct ide, env),
    STATE_HOST(struct ide, kick),
    STATE_HOST(struct ide, stopped),
    STATE_STRUCTS(struct ide, channels, &channel_state),
};
static const struct state_desc ide_state = {
    .name = "ide",
    .version = 1,
    .struct_size = sizeof(struct ide),
    .fields = ide_fields,
    .nfields = ARRAY_SIZE(ide_fields),
    .loaded = ide_loaded,
};

static const struct pci_device_ops ide_ops = {
    .dev = {.reset = ide_reset,
            .destroy = ide_destroy,
            .start = ide_start,
            .stop = ide_stop,
            .busy = ide_busy},
};

static void set_up_drive(struct ide_drive *d, const struct ide_drive_config *cfg, unsigned n)
{
    char serial[IDE_SERIAL_SIZE + 1];

    d->absent = !cfg->backend;
    d->cdrom = cfg->cdrom && cfg->backend;
    d->backend = cfg->backend;
    if (cfg->backend)
        d->size = block_size(cfg->backend) / IDE_SECTOR * IDE_SECTOR;
    snprintf(serial, sizeof(serial), "%s", cfg->serial ? cfg->serial : "");
    if (!cfg->serial)
        snprintf(serial, sizeof(serial), "DOPPEL%u", n);
    memcpy(d->serial, serial, strlen(serial));
}

static int add_ranges(struct ide *ide, unsigned n, struct error *err)
{
    static const u16 command[IDE_CHANNELS] = {0x1f0, 0x170}, control[IDE_CHANNELS] = {0x3f6, 0x376};
    struct ide_channel *ch = &ide->channels[n];

    ch->command_range = (struct io_range){"ide", command[n], REGS, &command_ops, ch};
    ch->control_range = (struct io_range){"ide control", control[n], 1, &control_ops, ch};
    if (io_bus_add(ide->env.ports, &ch->command_range, err) < 0)
        return -EEXIST;
    ch->nranges++;
    if (io_bus_add(ide->env.ports, &ch->control_range, err) < 0)
        return -EEXIST;
    ch->nranges++;
    return 0;
}

struct ide *ide_create(const struct device_env *env, const struct ide_config *cfg,
                       struct pci_host *host, u8 devfn, struct error *err)
{
    static const struct pci_identity identity = {
        .vendor = PCI_HOST_VENDOR,
        .device = PIIX3_IDE,
        .class = PCI_CLASS_STORAGE_IDE,
        .interface = INTERFACE_BUS_MASTER,
        .subsystem_vendor = PCI_HOST_SUBSYSTEM_VENDOR,
        .subsystem = PCI_HOST_SUBSYSTEM,
    };
    struct ide *ide = calloc(1, sizeof(*ide));
    int ret;

    if (!ide) {
        error_host(err, ENOMEM, "ide");
        return NULL;
    }
    ide->env = *env;
    pci_device_init(&ide->pci, "ide", &ide_ops, &ide_state, &identity);
    pci_add_bar(&ide->pci, BAR_BUS_MASTER, PCI_BAR_IO, BM_SIZE, &bm_ops, ide);
    for (unsigned i = 0; i < IDE_CHANNELS; i++) {
        struct ide_channel *ch = &ide->channels[i];

        pci_config_allow32(&ide->pci, PIIX_IDETIM, 0xf3ffU << 16 * i);
        ide->pci.config[PIIX_IDETIM + 2 * i + 1] = PIIX_IDETIM_ENABLE;
        ch->ide = ide;
        ch->irq = cfg->irq[i];
        set_up_drive(&ch->drives[0], &cfg->drives[2 * i], 2 * i);
        set_up_drive(&ch->drives[1], &cfg->drives[2 * i + 1], 2 * i + 1);
        power_on(ch);
    }
    ret = loop_kick_open(&ide->kick, env->loop, kicked, ide, "ide", err);
    if (!ret)
        ret = pci_host_add(host, &ide->pci, devfn, err);
    for (unsigned i = 0; i < IDE_CHANNELS && !ret; i++)
        ret = add_ranges(ide, i, err);
    if (ret) {
        ide_destroy(&ide->pci.dev);
        return NULL;
    }
    return ide;
}

struct device *ide_device(struct ide *ide)
{
    return &ide->pci.dev;
}
