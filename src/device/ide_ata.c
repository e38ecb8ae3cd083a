/*
 * A disk's commands: ATA/ATAPI-6 (T13/1410D), chapter 8.
 */
#include "device/ide_internal.h"

#include <string.h>

enum {
    ATA_NOP = 0x00,
    ATA_RECALIBRATE = 0x10,
    ATA_READ_SECTORS = 0x20,
    ATA_READ_SECTORS_NORETRY = 0x21,
    ATA_READ_SECTORS_EXT = 0x24,
    ATA_READ_DMA_EXT = 0x25,
    ATA_READ_NATIVE_MAX_EXT = 0x27,
    ATA_READ_MULTIPLE_EXT = 0x29,
    ATA_WRITE_SECTORS = 0x30,
    ATA_WRITE_SECTORS_NORETRY = 0x31,
    ATA_WRITE_SECTORS_EXT = 0x34,
    ATA_WRITE_DMA_EXT = 0x35,
    ATA_WRITE_MULTIPLE_EXT = 0x39,
    ATA_READ_VERIFY = 0x40,
    ATA_READ_VERIFY_NORETRY = 0x41,
    ATA_READ_VERIFY_EXT = 0x42,
    ATA_SEEK = 0x70,
    ATA_DIAGNOSTIC = 0x90,
    ATA_INITIALIZE_PARAMETERS = 0x91,
    ATA_READ_MULTIPLE = 0xc4,
    ATA_WRITE_MULTIPLE = 0xc5,
    ATA_SET_MULTIPLE = 0xc6,
    ATA_READ_DMA = 0xc8,
    ATA_READ_DMA_NORETRY = 0xc9,
    ATA_WRITE_DMA = 0xca,
    ATA_WRITE_DMA_NORETRY = 0xcb,
    ATA_STANDBY_IMMEDIATE = 0xe0,
    ATA_IDLE_IMMEDIATE = 0xe1,
    ATA_STANDBY = 0xe2,
    ATA_IDLE = 0xe3,
    ATA_CHECK_POWER_MODE = 0xe5,
    ATA_SLEEP = 0xe6,
    ATA_FLUSH_CACHE = 0xe7,
    ATA_FLUSH_CACHE_EXT = 0xea,
    ATA_IDENTIFY = 0xec,
    ATA_SET_FEATURES = 0xef,
    ATA_READ_NATIVE_MAX = 0xf8,
};
enum { FEATURE_TRANSFER_MODE = 0x03 };

#define LBA28_MAX 0x0fffffffULL

void ide_put_string(u8 *at, const char *text, unsigned len)
{
    for (unsigned i = 0; i < len; i++)
        at[i ^ 1] = *text ? (u8)*text++ : ' ';
}

static void put_word(u8 *page, unsigned n, unsigned value)
{
    page[2 * n] = (u8)value;
    page[2 * n + 1] = (u8)(value >> 8);
}

static void put_number(u8 *page, unsigned n, u64 value, unsigned words)
{
    for (unsigned i = 0; i < words; i++)
        put_word(page, n + i, (unsigned)(value >> 16 * i) & 0xffff);
}

/* IDENTIFY DEVICE (8.15). */
static void identify(struct ide_channel *ch)
{
    struct ide_drive *d = ide_drive(ch);
    u64 sectors = d->size / IDE_SECTOR;
    u64 cylinders = MIN(sectors / (16 * 63), 16383ULL);
    u64 current = MIN(sectors / (d->heads * d->sectors), 65535ULL);
    u8 *page = ch->buffer;

    memset(page, 0, IDE_SECTOR);
    put_word(page, 0, 0x0040); /* fixed */
    put_word(page, 1, (unsigned)cylinders);
    put_word(page, 3, 16);
    put_word(page, 6, 63);
    for (unsigned i = 0; i < IDE_SERIAL_SIZE; i++)
        page[(2 * 10 + i) ^ 1] = d->serial[i] ? d->serial[i] : ' ';
    ide_put_string(page + 2 * 23, "1.0", 8);
    ide_put_string(page + 2 * 27, "doppel disk", 40);
    put_word(page, 47, 0x8000 | IDE_MULTIPLE_MAX);
    put_word(page, 49, 0x0f00); /* DMA, LBA, IORDY */
    put_word(page, 50, 0x4000);
    put_word(page, 53, 7); /* words 54 to 58, 64 to 70, 88 are valid */
    put_word(page, 54, (unsigned)current);
    put_word(page, 55, d->heads);
    put_word(page, 56, d->sectors);
    put_number(page, 57, current * d->heads * d->sectors, 2);
    put_word(page, 59, d->multiple ? 0x100U | d->multiple : 0);
    put_number(page, 60, MIN(sectors, LBA28_MAX), 2);
    put_word(page, 63, 7 | ((d->dma_mode & 0xf8) == 0x20 ? 0x100U << (d->dma_mode & 7) : 0));
    put_word(page, 64, 3); /* PIO 3 and 4 */
    for (unsigned i = 65; i <= 68; i++)
        put_word(page, i, 120);
    put_word(page, 80, 0x70);   /* ATA/ATAPI-4 to 6 */
    put_word(page, 82, 0x4020); /* write cache, NOP */
    put_word(page, 83, 0x7400); /* FLUSH CACHE, and EXT; 48 bits */
    put_word(page, 84, 0x4000);
    put_word(page, 85, 0x4020);
    put_word(page, 86, 0x3400);
    put_word(page, 87, 0x4000);
    put_word(page, 88, 0x3f | ((d->dma_mode & 0xf8) == 0x40 ? 0x100U << (d->dma_mode & 7) : 0));
    put_word(page, 93, 0x6001 | (ch->selected ? 0x4a00 : 0x004a));
    put_number(page, 100, sectors, 4);
    ide_reply(ch, IDE_SECTOR, IDE_SECTOR, false);
}

/* Where the registers point, in sectors (6.2); false outside of the disk. */
static bool get_range(struct ide_drive *d, bool ext, u64 *lba, u64 *count)
{
    u64 sectors = d->size / IDE_SECTOR;

    *lba = d->lba_low[0] | d->lba_mid[0] << 8 | d->lba_high[0] << 16;
    *count = d->count[0];
    if (ext) {
        *lba |= (u64)d->lba_low[1] << 24 | (u64)d->lba_mid[1] << 32 | (u64)d->lba_high[1] << 40;
        *count |= (u64)d->count[1] << 8;
        if (!*count)
            *count = 65536;
    } else {
        if (d->device & DEVICE_LBA) {
            *lba |= (u64)(d->device & 15) << 24;
        } else {
            u64 cylinder = d->lba_mid[0] | d->lba_high[0] << 8;

            if (!d->lba_low[0] || d->lba_low[0] > d->sectors || (d->device & 15) >= d->heads)
                return false;
            *lba = (cylinder * d->heads + (d->device & 15)) * d->sectors + d->lba_low[0] - 1;
        }
        if (!*count)
            *count = 256;
    }
    return *lba < sectors && *count <= sectors - *lba;
}

enum access { ACCESS_READ, ACCESS_WRITE, ACCESS_VERIFY };

static void transfer(struct ide_channel *ch, enum access access, bool ext, u32 block, bool dma)
{
    struct ide_drive *d = ide_drive(ch);
    u64 lba, count;

    if (!block || (access == ACCESS_WRITE && block_is_read_only(d->backend)))
        ide_fail(ch, ERROR_ABRT);
    else if (!get_range(d, ext, &lba, &count))
        ide_fail(ch, ERROR_IDNF);
    else if (access == ACCESS_READ)
        ide_read(ch, lba * IDE_SECTOR, count * IDE_SECTOR, block * IDE_SECTOR, dma);
    else if (access == ACCESS_WRITE)
        ide_write(ch, lba * IDE_SECTOR, count * IDE_SECTOR, block * IDE_SECTOR, dma);
    else
        ide_done(ch);
}

static void set_features(struct ide_channel *ch)
{
    struct ide_drive *d = ide_drive(ch);

    switch (d->features[0]) {
    case FEATURE_TRANSFER_MODE:
        d->dma_mode = d->count[0];
        ide_done(ch);
        break;
    case 0x02: /* write cache */
    case 0x82:
    case 0x55: /* read ahead */
    case 0xaa:
    case 0x66: /* defaults */
    case 0xcc:
        ide_done(ch);
        break;
    default:
        ide_fail(ch, ERROR_ABRT);
    }
}

static void set_multiple(struct ide_channel *ch)
{
    struct ide_drive *d = ide_drive(ch);
    u8 n = d->count[0];

    if (n > IDE_MULTIPLE_MAX || (n & (n - 1))) {
        ide_fail(ch, ERROR_ABRT);
        return;
    }
    d->multiple = n;
    ide_done(ch);
}

static void initialize_parameters(struct ide_channel *ch)
{
    struct ide_drive *d = ide_drive(ch);

    if (!d->count[0]) {
        ide_fail(ch, ERROR_ABRT);
        return;
    }
    d->heads = (d->device & 15) + 1;
    d->sectors = d->count[0];
    ide_done(ch);
}

static void read_native_max(struct ide_channel *ch, bool ext)
{
    struct ide_drive *d = ide_drive(ch);
    u64 last = MAX(d->size / IDE_SECTOR, 1ULL) - 1;

    if (!ext)
        last = MIN(last, LBA28_MAX);
    d->lba_low[0] = (u8)last;
    d->lba_mid[0] = (u8)(last >> 8);
    d->lba_high[0] = (u8)(last >> 16);
    if (ext) {
        d->lba_low[1] = (u8)(last >> 24);
        d->lba_mid[1] = (u8)(last >> 32);
        d->lba_high[1] = (u8)(last >> 40);
    } else {
        d->device = (d->device & 0xf0) | (u8)(last >> 24);
    }
    ide_done(ch);
}

static void diagnostic(struct ide_channel *ch)
{
    for (unsigned i = 0; i < 2; i++) {
        ide_signature(&ch->drives[i]);
        ch->drives[i].status = ch->drives[i].cdrom ? 0 : STATUS_DRDY | STATUS_DSC;
        ch->drives[i].error = 1;
    }
    ch->selected = 0;
    ide_raise(ch);
}

void ide_ata_command(struct ide_channel *ch, u8 command)
{
    struct ide_drive *d = ide_drive(ch);

    if ((command & 0xf0) == ATA_RECALIBRATE || (command & 0xf0) == ATA_SEEK) {
        ide_done(ch);
        return;
    }
    switch (command) {
    case ATA_READ_SECTORS:
    case ATA_READ_SECTORS_NORETRY:
        transfer(ch, ACCESS_READ, false, 1, false);
        break;
    case ATA_READ_SECTORS_EXT:
        transfer(ch, ACCESS_READ, true, 1, false);
        break;
    case ATA_READ_MULTIPLE:
        transfer(ch, ACCESS_READ, false, d->multiple, false);
        break;
    case ATA_READ_MULTIPLE_EXT:
        transfer(ch, ACCESS_READ, true, d->multiple, false);
        break;
    case ATA_READ_DMA:
    case ATA_READ_DMA_NORETRY:
        transfer(ch, ACCESS_READ, false, 1, true);
        break;
    case ATA_READ_DMA_EXT:
        transfer(ch, ACCESS_READ, true, 1, true);
        break;
    case ATA_WRITE_SECTORS:
    case ATA_WRITE_SECTORS_NORETRY:
        transfer(ch, ACCESS_WRITE, false, 1, false);
        break;
    case ATA_WRITE_SECTORS_EXT:
        transfer(ch, ACCESS_WRITE, true, 1, false);
        break;
    case ATA_WRITE_MULTIPLE:
        transfer(ch, ACCESS_WRITE, false, d->multiple, false);
        break;
    case ATA_WRITE_MULTIPLE_EXT:
        transfer(ch, ACCESS_WRITE, true, d->multiple, false);
        break;
    case ATA_WRITE_DMA:
    case ATA_WRITE_DMA_NORETRY:
        transfer(ch, ACCESS_WRITE, false, 1, true);
        break;
    case ATA_WRITE_DMA_EXT:
        transfer(ch, ACCESS_WRITE, true, 1, true);
        break;
    case ATA_READ_VERIFY:
    case ATA_READ_VERIFY_NORETRY:
        transfer(ch, ACCESS_VERIFY, false, 1, false);
        break;
    case ATA_READ_VERIFY_EXT:
        transfer(ch, ACCESS_VERIFY, true, 1, false);
        break;
    case ATA_FLUSH_CACHE:
    case ATA_FLUSH_CACHE_EXT:
        ide_flush(ch);
        break;
    case ATA_IDENTIFY:
        identify(ch);
        break;
    case ATA_SET_FEATURES:
        set_features(ch);
        break;
    case ATA_SET_MULTIPLE:
        set_multiple(ch);
        break;
    case ATA_INITIALIZE_PARAMETERS:
        initialize_parameters(ch);
        break;
    case ATA_READ_NATIVE_MAX:
        read_native_max(ch, false);
        break;
    case ATA_READ_NATIVE_MAX_EXT:
        read_native_max(ch, true);
        break;
    case ATA_DIAGNOSTIC:
        diagnostic(ch);
        break;
    case ATA_CHECK_POWER_MODE:
        d->count[0] = 0xff; /* active */
        ide_done(ch);
        break;
    case ATA_STANDBY_IMMEDIATE:
    case ATA_IDLE_IMMEDIATE:
    case ATA_STANDBY:
    case ATA_IDLE:
    case ATA_SLEEP:
        ide_done(ch);
        break;
    default:
        ide_fail(ch, ERROR_ABRT);
        break;
    }
}
