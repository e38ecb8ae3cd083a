/*
 * A CD-ROM's commands: the packet interface of ATA/ATAPI-6 (T13/1410D), 9.8, and MMC-3 (T10/1363D), chapter 6.
 */
#include "device/ide_internal.h"

#include <string.h>

enum {
    ATA_DEVICE_RESET = 0x08,
    ATA_DIAGNOSTIC = 0x90,
    ATA_PACKET = 0xa0,
    ATA_IDENTIFY_PACKET = 0xa1,
    ATA_SET_FEATURES = 0xef,
    ATA_CHECK_POWER_MODE = 0xe5,
    ATA_STANDBY_IMMEDIATE = 0xe0,
    ATA_IDLE_IMMEDIATE = 0xe1,
};

enum {
    MMC_TEST_UNIT_READY = 0x00,
    MMC_REQUEST_SENSE = 0x03,
    MMC_INQUIRY = 0x12,
    MMC_MODE_SENSE_6 = 0x1a,
    MMC_START_STOP = 0x1b,
    MMC_PREVENT_REMOVAL = 0x1e,
    MMC_READ_CAPACITY = 0x25,
    MMC_READ_10 = 0x28,
    MMC_SEEK_10 = 0x2b,
    MMC_READ_TOC = 0x43,
    MMC_GET_CONFIGURATION = 0x46,
    MMC_GET_EVENT = 0x4a,
    MMC_READ_DISC_INFORMATION = 0x51,
    MMC_MODE_SENSE_10 = 0x5a,
    MMC_READ_12 = 0xa8,
    MMC_MECHANISM_STATUS = 0xbd,
    MMC_READ_CD = 0xbe,
};

enum {
    SENSE_NONE,
    SENSE_NOT_READY = 2,
    SENSE_MEDIUM_ERROR = 3,
    SENSE_ILLEGAL = 5,
    SENSE_ATTENTION
};
#define CODE_READ_ERROR 0x11
#define CODE_INVALID_COMMAND 0x20
#define CODE_OUT_OF_RANGE 0x21
#define CODE_INVALID_FIELD 0x24
#define CODE_MEDIUM_CHANGED 0x28

#define FEATURE_DMA 0x01
#define DEFAULT_BYTES 0xfffe /* of a block, where the guest leaves them 0 (9.8) */

static u16 get_be16(const u8 *p)
{
    return (u16)(p[0] << 8 | p[1]);
}

static u32 get_be32(const u8 *p)
{
    return (u32)p[0] << 24 | (u32)p[1] << 16 | (u32)p[2] << 8 | p[3];
}

static void put_be32(u8 *p, u32 value)
{
    p[0] = (u8)(value >> 24);
    p[1] = (u8)(value >> 16);
    p[2] = (u8)(value >> 8);
    p[3] = (u8)value;
}

static void put_be16(u8 *p, unsigned value)
{
    p[0] = (u8)(value >> 8);
    p[1] = (u8)value;
}

static void fail(struct ide_channel *ch, u8 sense, u8 code)
{
    struct ide_drive *d = ide_drive(ch);

    d->sense = sense;
    d->sense_code = code;
    ide_fail(ch, (u8)(sense << 4));
}

void ide_atapi_failed(struct ide_channel *ch)
{
    fail(ch, SENSE_MEDIUM_ERROR, CODE_READ_ERROR);
}

static u32 block_bytes(const struct ide_drive *d)
{
    u32 limit = d->lba_mid[0] | d->lba_high[0] << 8;

    return limit ? MAX(limit & ~1U, 2U) : DEFAULT_BYTES;
}

/* The answer in the buffer, cut at what the guest has room for. */
static void reply(struct ide_channel *ch, u32 len, u32 room)
{
    struct ide_drive *d = ide_drive(ch);

    len = MIN(len, room);
    if (!len)
        ide_done(ch);
    else
        ide_reply(ch, len, block_bytes(d), d->features[0] & FEATURE_DMA);
}

static u32 sectors_of(const struct ide_drive *d)
{
    return (u32)MIN(d->size / IDE_CD_SECTOR, 0xffffffffULL);
}

static void read_sectors(struct ide_channel *ch, u32 lba, u32 count)
{
    struct ide_drive *d = ide_drive(ch);
    u32 sectors = sectors_of(d);

    if (lba > sectors || count > sectors - lba)
        fail(ch, SENSE_ILLEGAL, CODE_OUT_OF_RANGE);
    else if (!count)
        ide_done(ch);
    else
        ide_read(ch, (u64)lba * IDE_CD_SECTOR, (u64)count * IDE_CD_SECTOR, block_bytes(d),
                 d->features[0] & FEATURE_DMA);
}

static void request_sense(struct ide_channel *ch, const u8 *packet)
{
    struct ide_drive *d = ide_drive(ch);
    u8 *b = ch->buffer;
    u8 room = packet[4];

    memset(b, 0, 18);
    b[0] = 0x70;
    b[2] = d->sense;
    b[7] = 10;
    b[12] = d->sense_code;
    d->sense = d->sense_code = 0;
    reply(ch, 18, room);
}

static void inquiry(struct ide_channel *ch, const u8 *packet)
{
    static const char names[] = "doppel  CD-ROM          1.0 "; /* vendor, product, revision */
    u8 *b = ch->buffer;
    u32 room = get_be16(packet + 3);

    memset(b, 0, 36);
    b[0] = 0x05; /* CD-ROM */
    b[1] = 0x80; /* removable */
    b[3] = 0x21; /* ATAPI */
    b[4] = 31;
    for (unsigned i = 0; i < 28; i++)
        b[8 + i] = (u8)names[i];
    reply(ch, 36, room);
}

static void read_capacity(struct ide_channel *ch)
{
    u8 *b = ch->buffer;

    put_be32(b, MAX(sectors_of(ide_drive(ch)), 1U) - 1);
    put_be32(b + 4, IDE_CD_SECTOR);
    reply(ch, 8, 8);
}

/* An address of the table of contents: a sector, or minute, second and frame. */
static void put_address(u8 *p, u32 lba, bool msf)
{
    put_be32(p, lba);
    if (msf) {
        lba += 150;
        p[0] = 0;
        p[1] = (u8)(lba / (75 * 60));
        p[2] = (u8)(lba / 75 % 60);
        p[3] = (u8)(lba % 75);
    }
}

/* One data track (6.31). */
static void read_toc(struct ide_channel *ch, const u8 *packet)
{
    struct ide_drive *d = ide_drive(ch);
    bool msf = packet[1] & 2;
    unsigned format = packet[2] & 15 ? packet[2] & 15U : packet[9] >> 6;
    u32 room = get_be16(packet + 7), len;
    u8 *b = ch->buffer;

    memset(b, 0, 64);
    b[2] = b[3] = 1; /* the first and the last track, or session */
    switch (format) {
    case 0:
        if (packet[6] > 1 && packet[6] != 0xaa) {
            fail(ch, SENSE_ILLEGAL, CODE_INVALID_FIELD);
            return;
        }
        len = 4;
        if (packet[6] <= 1) {
            b[5] = 0x14;
            b[6] = 1;
            len = 12;
        }
        b[len + 1] = 0x16;
        b[len + 2] = 0xaa; /* the lead-out */
        put_address(b + len + 4, sectors_of(d), msf);
        len += 8;
        break;
    case 1:
        b[5] = 0x14;
        b[6] = 1;
        len = 12;
        break;
    default:
        fail(ch, SENSE_ILLEGAL, CODE_INVALID_FIELD);
        return;
    }
    if (format == 0 && packet[6] <= 1)
        put_address(b + 8, 0, msf);
    put_be16(b, len - 2);
    reply(ch, len, room);
}

/* The profile "CD-ROM", which is the current one. */
static void get_configuration(struct ide_channel *ch, const u8 *packet)
{
    u8 *b = ch->buffer;
    u32 room = get_be16(packet + 7);

    memset(b, 0, 16);
    put_be32(b, 12);
    put_be16(b + 6, 0x0008);
    b[10] = 0x03; /* feature 0, the profiles: persistent, current */
    b[11] = 4;
    put_be16(b + 12, 0x0008);
    b[14] = 1;
    reply(ch, 16, room);
}

/* Media events, when asked for by polling. */
static void get_event(struct ide_channel *ch, const u8 *packet)
{
    u8 *b = ch->buffer;
    u32 room = get_be16(packet + 7);

    if (!(packet[1] & 1)) {
        fail(ch, SENSE_ILLEGAL, CODE_INVALID_FIELD);
        return;
    }
    memset(b, 0, 8);
    b[1] = 4;
    if (packet[4] & 0x10) {
        b[2] = 4;    /* media */
        b[5] = 0x02; /* present */
        b[3] = 0x10;
        b[1] = 6;
        reply(ch, 8, room);
        return;
    }
    b[1] = 2;
    b[2] = 0x80; /* none of these */
    b[3] = 0x10;
    reply(ch, 4, room);
}

static void read_disc_information(struct ide_channel *ch, const u8 *packet)
{
    u8 *b = ch->buffer;
    u32 room = get_be16(packet + 7);

    memset(b, 0, 34);
    b[1] = 32;
    b[2] = 0x0e; /* complete */
    b[3] = b[4] = b[5] = b[6] = 1;
    reply(ch, 34, room);
}

/* Page 2Ah, capabilities, and 01h, error recovery; header of 8 bytes, or 4. */
static void mode_sense(struct ide_channel *ch, const u8 *packet, bool ten)
{
    u8 *b = ch->buffer;
    u32 room = ten ? get_be16(packet + 7) : packet[4];
    unsigned header = ten ? 8 : 4, page = packet[2] & 0x3f, len = header;

    memset(b, 0, 64);
    if (page != 0x01 && page != 0x2a && page != 0x3f) {
        fail(ch, SENSE_ILLEGAL, CODE_INVALID_FIELD);
        return;
    }
    if (page == 0x01 || page == 0x3f) {
        b[len] = 0x01;
        b[len + 1] = 6;
        b[len + 3] = 5;
        len += 8;
    }
    if (page == 0x2a || page == 0x3f) {
        b[len] = 0x2a;
        b[len + 1] = 18;
        b[len + 6] = 0x2d;
        put_be16(b + len + 8, 706); /* kB/s */
        put_be16(b + len + 14, 706);
        len += 20;
    }
    if (ten)
        put_be16(b, len - 2);
    else
        b[0] = (u8)(len - 1);
    reply(ch, len, room);
}

static void read_cd(struct ide_channel *ch, const u8 *packet)
{
    u32 count = get_be32(packet + 5) & 0xffffff; /* bytes 6 to 8 */

    if (packet[9] & 0xe8 || (packet[9] & 0x10) == 0) {
        fail(ch, SENSE_ILLEGAL, CODE_INVALID_FIELD);
        return;
    }
    read_sectors(ch, get_be32(packet + 2), count);
}

void ide_atapi_packet(struct ide_channel *ch)
{
    struct ide_drive *d = ide_drive(ch);
    u8 packet[IDE_PACKET_SIZE];

    memcpy(packet, ch->buffer, sizeof(packet));
    ch->transfer = IDE_NONE;
    /* The first command after a medium came is told so, but for those that always work. */
    if (d->medium_changed && packet[0] != MMC_INQUIRY && packet[0] != MMC_REQUEST_SENSE &&
        packet[0] != MMC_GET_CONFIGURATION && packet[0] != MMC_GET_EVENT) {
        d->medium_changed = false;
        fail(ch, SENSE_ATTENTION, CODE_MEDIUM_CHANGED);
        return;
    }
    switch (packet[0]) {
    case MMC_TEST_UNIT_READY:
    case MMC_START_STOP:
    case MMC_PREVENT_REMOVAL:
    case MMC_SEEK_10:
        ide_done(ch);
        break;
    case MMC_REQUEST_SENSE:
        request_sense(ch, packet);
        break;
    case MMC_INQUIRY:
        inquiry(ch, packet);
        break;
    case MMC_READ_CAPACITY:
        read_capacity(ch);
        break;
    case MMC_READ_10:
        read_sectors(ch, get_be32(packet + 2), get_be16(packet + 7));
        break;
    case MMC_READ_12:
        read_sectors(ch, get_be32(packet + 2), get_be32(packet + 6));
        break;
    case MMC_READ_CD:
        read_cd(ch, packet);
        break;
    case MMC_READ_TOC:
        read_toc(ch, packet);
        break;
    case MMC_GET_CONFIGURATION:
        get_configuration(ch, packet);
        break;
    case MMC_GET_EVENT:
        get_event(ch, packet);
        break;
    case MMC_READ_DISC_INFORMATION:
        read_disc_information(ch, packet);
        break;
    case MMC_MODE_SENSE_6:
        mode_sense(ch, packet, false);
        break;
    case MMC_MODE_SENSE_10:
        mode_sense(ch, packet, true);
        break;
    case MMC_MECHANISM_STATUS:
        memset(ch->buffer, 0, 8);
        reply(ch, 8, get_be16(packet + 8));
        break;
    default:
        fail(ch, SENSE_ILLEGAL, CODE_INVALID_COMMAND);
        break;
    }
}

/* IDENTIFY PACKET DEVICE (8.16). */
static void identify_packet(struct ide_channel *ch)
{
    struct ide_drive *d = ide_drive(ch);
    u8 *page = ch->buffer;

    memset(page, 0, IDE_SECTOR);
    page[0] = 0x80; /* 12-byte packets, removable */
    page[1] = 0x85; /* ATAPI, CD-ROM */
    for (unsigned i = 0; i < IDE_SERIAL_SIZE; i++)
        page[(2 * 10 + i) ^ 1] = d->serial[i] ? d->serial[i] : ' ';
    ide_put_string(page + 2 * 23, "1.0", 8);
    ide_put_string(page + 2 * 27, "doppel CD-ROM", 40);
    page[2 * 49 + 1] = 0x03; /* DMA, LBA */
    page[2 * 53] = 7;
    page[2 * 63] = 7;
    page[2 * 63 + 1] = (d->dma_mode & 0xf8) == 0x20 ? (u8)(1U << (d->dma_mode & 7)) : 0;
    page[2 * 64] = 3;
    page[2 * 80] = 0x70;
    page[2 * 88] = 0x3f;
    page[2 * 88 + 1] = (d->dma_mode & 0xf8) == 0x40 ? (u8)(1U << (d->dma_mode & 7)) : 0;
    ide_reply(ch, IDE_SECTOR, IDE_SECTOR, false);
}

/* The packet is asked for: no interrupt, the guest looks at DRQ. */
static void begin_packet(struct ide_channel *ch)
{
    struct ide_drive *d = ide_drive(ch);

    ch->transfer = IDE_PACKET;
    ch->fill = ch->block_end = IDE_PACKET_SIZE;
    ch->block = IDE_PACKET_SIZE;
    ch->at = 0;
    d->count[0] = (d->count[0] & ~7) | REASON_CD;
    d->status = STATUS_DRDY | STATUS_DSC | STATUS_DRQ;
}

void ide_atapi_command(struct ide_channel *ch, u8 command)
{
    struct ide_drive *d = ide_drive(ch);

    switch (command) {
    case ATA_PACKET:
        begin_packet(ch);
        break;
    case ATA_IDENTIFY_PACKET:
        identify_packet(ch);
        break;
    case ATA_DEVICE_RESET:
        ide_signature(d);
        d->status = 0;
        d->error = 1;
        break;
    case ATA_DIAGNOSTIC:
        ide_ata_command(ch, command);
        break;
    case ATA_SET_FEATURES:
        if (d->features[0] == 0x03)
            d->dma_mode = d->count[0];
        ide_done(ch);
        break;
    case ATA_CHECK_POWER_MODE:
        d->count[0] = 0xff;
        ide_done(ch);
        break;
    case ATA_STANDBY_IMMEDIATE:
    case ATA_IDLE_IMMEDIATE:
        ide_done(ch);
        break;
    default:
        /* A disk's commands are answered with what the drive is (9.12). */
        ide_fail(ch, ERROR_ABRT);
        if (command == 0xec || command == 0x20)
            ide_signature(d);
        break;
    }
}
