/*
 * What the files of the IDE controller share: ide.c, its registers and transfers; ide_ata.c, a disk's commands;
 * ide_atapi.c, a CD-ROM's.
 *
 * A command's data go through the channel's buffer, up to IDE_BUFFER bytes of it at a time. `fill` of them are there;
 * the guest, or DMA, is at `at`; by programmed I/O it goes on to `block_end`, where the drive interrupts. `left` bytes,
 * from `offset` on, are still to be read from the disk into the buffer, or to be written after it.
 *
 * The loop's thread talks to the disk. `wanted` is what it is to do next; `busy` that a request is under way, during
 * which status has BSY and the buffer is the request's. A reset meanwhile waits for it.
 */
#ifndef DOPPEL_DEVICE_IDE_INTERNAL_H
#define DOPPEL_DEVICE_IDE_INTERNAL_H

#include "device/ide.h"
#include "host/loop_kick.h"

#define IDE_BUFFER KIB(64)
#define IDE_SECTOR 512U
#define IDE_CD_SECTOR 2048U
#define IDE_MULTIPLE_MAX 16
#define IDE_SERIAL_SIZE 20
#define IDE_PACKET_SIZE 12

/* ATA/ATAPI-6 (T13/1410D), chapter 7. */
#define STATUS_BSY 0x80
#define STATUS_DRDY 0x40
#define STATUS_DSC 0x10
#define STATUS_DRQ 0x08
#define STATUS_ERR 0x01
#define ERROR_UNC 0x40
#define ERROR_IDNF 0x10
#define ERROR_ABRT 0x04
#define DEVICE_LBA 0x40
#define DEVICE_DRIVE_1 0x10
#define CONTROL_HOB 0x80
#define CONTROL_SRST 0x04
#define CONTROL_NIEN 0x02
#define REASON_CD 0x01 /* ATAPI's interrupt reason, in the sector count: a command is wanted */
#define REASON_IO 0x02 /* data go to the host */

enum ide_transfer {
    IDE_NONE,
    IDE_IN,     /* to the guest */
    IDE_OUT,    /* from the guest to the disk */
    IDE_PACKET, /* the twelve bytes of a command */
};
enum ide_wanted { IDE_WANT_NOTHING, IDE_WANT_READ, IDE_WANT_WRITE, IDE_WANT_FLUSH };

struct ide_drive {
    /* registers; each has what was written before it, too (48-bit commands) */
    u8 features[2], count[2], lba_low[2], lba_mid[2], lba_high[2];
    u8 device, status, error;
    u8 multiple; /* sectors of a block of READ and WRITE MULTIPLE; 0: off */
    u8 heads, sectors;
    u8 dma_mode; /* as SET FEATURES set it */
    u8 sense, sense_code;
    bool medium_changed;
    bool absent; /* from here on: not state */
    bool cdrom;
    u8 serial[IDE_SERIAL_SIZE];
    u64 size; /* bytes */
    struct block_backend *backend;
};

struct ide_channel {
    struct ide_drive drives[2];
    u8 selected, control;
    bool interrupt, reset_waits;
    u8 transfer, wanted;
    bool dma, dma_ready;
    bool busy; /* not state: nothing is under way when it is saved */
    u32 fill, at, block_end, block;
    u64 offset, left;
    u8 bm_command, bm_status;
    u32 bm_table;
    u32 prd, prd_address, prd_left; /* the next descriptor, and what is left of this one */
    bool prd_last;
    u8 buffer[IDE_BUFFER];
    /* not state */
    struct ide *ide;
    struct irq_line irq;
    struct io_range command_range, control_range;
    unsigned nranges;
    struct block_request request;
    struct iovec iov;
};

struct ide {
    struct pci_device pci;
    struct device_env env;
    struct loop_kick kick; /* some channel wants something of the loop */
    bool stopped;
    struct ide_channel channels[IDE_CHANNELS];
};

static inline struct ide_drive *ide_drive(struct ide_channel *ch)
{
    return &ch->drives[ch->selected];
}

/* The functions that follow want the device's lock held. */

void ide_raise(struct ide_channel *ch);
/* The command is done: without error, or with these bits of the error register. Interrupts. */
void ide_done(struct ide_channel *ch);
void ide_fail(struct ide_channel *ch, u8 error);
/* The registers after a reset, by which a drive's kind is known. */
void ide_signature(struct ide_drive *d);
/* Sends `len` bytes of the buffer in blocks of `block`. */
void ide_reply(struct ide_channel *ch, u32 len, u32 block, bool dma);
/* Sends and takes [offset, offset + len) of the disk. */
void ide_read(struct ide_channel *ch, u64 offset, u64 len, u32 block, bool dma);
void ide_write(struct ide_channel *ch, u64 offset, u64 len, u32 block, bool dma);
void ide_flush(struct ide_channel *ch);

void ide_ata_command(struct ide_channel *ch, u8 command);
/* Two characters a word, the first in its high byte. */
void ide_put_string(u8 *at, const char *text, unsigned len);

/* ide_atapi.c: the commands that a packet device has; what a complete packet asks for; a block begins, all is sent. */
void ide_atapi_command(struct ide_channel *ch, u8 command);
void ide_atapi_packet(struct ide_channel *ch);
void ide_atapi_failed(struct ide_channel *ch);

#endif
