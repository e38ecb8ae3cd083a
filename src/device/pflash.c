/*
 * Commands: Intel StrataFlash Embedded Memory (P30) data sheet (306666), chapters 9 to 11, and JESD68.01 (CFI).
 *
 * Programming and erasing take no time, so that the chip is always ready when it is asked. A cleared status register
 * reads 0 until the next operation, without the ready bit: edk2's driver knows a flash chip by that
 * (OvmfPkg/QemuFlashFvbServicesRuntimeDxe, QemuFlashDetected).
 */
#include "device/pflash.h"

#include "host/log.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum {
    CMD_PROGRAM_ALTERNATE = 0x10,
    CMD_ERASE = 0x20,
    CMD_PROGRAM = 0x40,
    CMD_CLEAR_STATUS = 0x50,
    CMD_LOCK = 0x60,
    CMD_READ_STATUS = 0x70,
    CMD_READ_ID = 0x90,
    CMD_QUERY = 0x98,
    CMD_CONFIRM = 0xd0,
    CMD_BUFFERED_PROGRAM = 0xe8,
    CMD_READ_ARRAY = 0xff,
};

#define STATUS_READY 0x80
#define STATUS_ERASE_ERROR 0x20
#define STATUS_PROGRAM_ERROR 0x10

#define MANUFACTURER_INTEL 0x89
#define DEVICE_P30 0x18
#define WRITE_BUFFER 64U

enum mode { MODE_ARRAY, MODE_STATUS, MODE_ID, MODE_QUERY, MODES };
/* What the next write is, after a command's first. */
enum step {
    STEP_COMMAND,
    STEP_PROGRAM,
    STEP_ERASE,
    STEP_LOCK,
    STEP_COUNT,
    STEP_BUFFER,
    STEP_GO,
    STEPS
};

struct pflash {
    struct device dev;
    struct io_bus *mmio;
    struct io_range range;
    int fd;
    u32 size;

    u8 mode, step, status;
    u32 buffer_base, buffer_left; /* bytes that the guest is yet to give */
    u8 buffer[WRITE_BUFFER];
    u8 buffered[WRITE_BUFFER]; /* 1: given */
    u8 data[PFLASH_MAX];
};

/* ---- the file ---- */

static int save(struct pflash *p, u32 offset, u32 len)
{
    while (p->fd >= 0 && len) {
        ssize_t n = pwrite(p->fd, p->data + offset, len, offset);

        if (n <= 0) {
            log_once(LOG_ERROR, "the firmware's variables can't be written: %s",
                     n < 0 ? strerror(errno) : "the file takes no more");
            return -EIO;
        }
        offset += (u32)n;
        len -= (u32)n;
    }
    return 0;
}

/* ---- operations ---- */

/* Programming clears bits, never sets them. */
static void program(struct pflash *p, u32 offset, u8 value)
{
    p->data[offset] &= value;
    p->status |= STATUS_READY;
    if (save(p, offset, 1) < 0)
        p->status |= STATUS_PROGRAM_ERROR;
}

static void erase(struct pflash *p, u32 offset)
{
    u32 block = offset & ~(PFLASH_BLOCK - 1);

    memset(p->data + block, 0xff, PFLASH_BLOCK);
    p->status |= STATUS_READY;
    if (save(p, block, PFLASH_BLOCK) < 0)
        p->status |= STATUS_ERASE_ERROR;
}

static void begin_buffer(struct pflash *p, u32 offset, u8 count)
{
    p->buffer_base = offset & ~(WRITE_BUFFER - 1);
    p->buffer_left = MIN(count + 1U, WRITE_BUFFER);
    memset(p->buffered, 0, sizeof(p->buffered));
    p->step = STEP_BUFFER;
}

static void fill_buffer(struct pflash *p, u32 offset, u8 value)
{
    if (offset - p->buffer_base < WRITE_BUFFER) {
        p->buffer[offset - p->buffer_base] = value;
        p->buffered[offset - p->buffer_base] = 1;
    }
    if (--p->buffer_left == 0)
        p->step = STEP_GO;
}

static void program_buffer(struct pflash *p)
{
    for (u32 i = 0; i < WRITE_BUFFER; i++) {
        if (p->buffered[i])
            p->data[p->buffer_base + i] &= p->buffer[i];
    }
    p->status |= STATUS_READY;
    if (save(p, p->buffer_base, WRITE_BUFFER) < 0)
        p->status |= STATUS_PROGRAM_ERROR;
}

/* ---- commands ---- */

static void set_mode(struct pflash *p, enum mode mode, enum step step)
{
    p->mode = mode;
    p->step = step;
}

static void write_command(struct pflash *p, u32 offset, u8 command)
{
    switch (command) {
    case CMD_PROGRAM:
    case CMD_PROGRAM_ALTERNATE:
        set_mode(p, MODE_STATUS, STEP_PROGRAM);
        break;
    case CMD_ERASE:
        set_mode(p, MODE_STATUS, STEP_ERASE);
        break;
    case CMD_CLEAR_STATUS:
        p->status = 0;
        set_mode(p, MODE_ARRAY, STEP_COMMAND);
        break;
    case CMD_LOCK:
        set_mode(p, MODE_STATUS, STEP_LOCK);
        break;
    case CMD_READ_STATUS:
        set_mode(p, MODE_STATUS, STEP_COMMAND);
        break;
    case CMD_READ_ID:
        set_mode(p, MODE_ID, STEP_COMMAND);
        break;
    case CMD_QUERY:
        set_mode(p, MODE_QUERY, STEP_COMMAND);
        break;
    case CMD_BUFFERED_PROGRAM:
        p->status |= STATUS_READY; /* the buffer is free */
        set_mode(p, MODE_STATUS, STEP_COUNT);
        break;
    default: /* CMD_READ_ARRAY, and what there is not */
        set_mode(p, MODE_ARRAY, STEP_COMMAND);
        break;
    }
}

static void write_byte(struct pflash *p, u32 offset, u8 value)
{
    switch (p->step) {
    case STEP_PROGRAM:
        program(p, offset, value);
        p->step = STEP_COMMAND;
        break;
    case STEP_ERASE:
        if (value == CMD_CONFIRM)
            erase(p, offset);
        else
            p->status |= STATUS_READY | STATUS_ERASE_ERROR | STATUS_PROGRAM_ERROR;
        p->step = STEP_COMMAND;
        break;
    case STEP_LOCK: /* no block is ever locked */
        p->status |= STATUS_READY;
        p->step = STEP_COMMAND;
        break;
    case STEP_COUNT:
        begin_buffer(p, offset, value);
        break;
    case STEP_BUFFER:
        fill_buffer(p, offset, value);
        break;
    case STEP_GO:
        if (value == CMD_CONFIRM)
            program_buffer(p);
        else
            p->status |= STATUS_READY | STATUS_ERASE_ERROR | STATUS_PROGRAM_ERROR;
        p->step = STEP_COMMAND;
        break;
    default:
        write_command(p, offset, value);
        break;
    }
}

static u8 log2_of(u32 value)
{
    return (u8)(31 - __builtin_clz(value));
}

/* The CFI table (JESD68.01, 2.4 on): a byte at each address. */
static u8 query_byte(const struct pflash *p, u32 offset)
{
    const u32 blocks = p->size / PFLASH_BLOCK - 1;

    switch (offset & 0xff) {
    case 0x10:
        return 'Q';
    case 0x11:
        return 'R';
    case 0x12:
        return 'Y';
    case 0x13:
        return 0x01; /* the Intel command set, with no table of its own */
    case 0x1b:
        return 0x45; /* 4.5 to 5.5 V */
    case 0x1c:
        return 0x55;
    case 0x1f: /* 2^n microseconds for a byte, and a buffer; 2^n ms for a block */
    case 0x20:
        return 0x07;
    case 0x21:
        return 0x0a;
    case 0x27:
        return log2_of(p->size);
    case 0x2a:
        return log2_of(WRITE_BUFFER);
    case 0x2c:
        return 1; /* one region of blocks */
    case 0x2d:
        return (u8)blocks;
    case 0x2e:
        return (u8)(blocks >> 8);
    case 0x2f:
        return (u8)(PFLASH_BLOCK >> 8);
    case 0x30:
        return (u8)(PFLASH_BLOCK >> 16);
    default:
        return 0;
    }
}

static u8 read_byte(const struct pflash *p, u32 offset)
{
    switch (p->mode) {
    case MODE_STATUS:
        return p->status;
    case MODE_ID:
        return (offset & 0xff) == 0 ? MANUFACTURER_INTEL : (offset & 0xff) == 1 ? DEVICE_P30 : 0;
    case MODE_QUERY:
        return query_byte(p, offset);
    default:
        return p->data[offset];
    }
}

static u64 pflash_read(void *opaque, u64 offset, unsigned size)
{
    struct pflash *p = opaque;
    u64 value = 0;

    device_lock(&p->dev);
    for (unsigned i = 0; i < size && offset + i < p->size; i++)
        value |= (u64)read_byte(p, (u32)offset + i) << 8 * i;
    device_unlock(&p->dev);
    return value;
}

/* A wider write is a command in its low byte; as data, it is bytes one after another. */
static void pflash_write(void *opaque, u64 offset, u64 value, unsigned size)
{
    struct pflash *p = opaque;
    u8 step;

    device_lock(&p->dev);
    step = p->step;
    write_byte(p, (u32)offset, (u8)value);
    for (unsigned i = 1; i < size && offset + i < p->size; i++) {
        if (step == STEP_PROGRAM)
            program(p, (u32)offset + i, (u8)(value >> 8 * i));
        else if (step == STEP_BUFFER && p->step == STEP_BUFFER)
            fill_buffer(p, (u32)offset + i, (u8)(value >> 8 * i));
    }
    device_unlock(&p->dev);
}

static const struct io_ops pflash_io_ops = {pflash_read, pflash_write, 8};

/* ---- the device ---- */

/* What was programmed stays. */
static void pflash_reset(struct device *dev)
{
    struct pflash *p = container_of(dev, struct pflash, dev);

    device_lock(dev);
    set_mode(p, MODE_ARRAY, STEP_COMMAND);
    p->status = 0;
    p->buffer_left = p->buffer_base = 0;
    device_unlock(dev);
}

static void pflash_destroy(struct device *dev)
{
    struct pflash *p = container_of(dev, struct pflash, dev);

    io_bus_remove(p->mmio, &p->range);
    if (p->fd >= 0 && fsync(p->fd) < 0)
        log_error("the firmware's variables can't be written: %s", strerror(errno));
    pthread_mutex_destroy(&dev->lock);
    free(p);
}

static int pflash_loaded(void *obj, struct error *err)
{
    struct pflash *p = obj;

    if (p->mode >= MODES || p->step >= STEPS || p->buffer_left > WRITE_BUFFER ||
        (p->step == STEP_BUFFER && !p->buffer_left) || p->buffer_base > p->size - WRITE_BUFFER ||
        p->buffer_base % WRITE_BUFFER)
        return error_input(err, "pflash: the saved registers are impossible");
    return save(p, 0, p->size) < 0 ? error_input(err, "pflash: the variables can't be written") : 0;
}

static const struct state_field pflash_fields[] = {
    STATE_HOST(struct pflash, dev),          STATE_HOST(struct pflash, mmio),
    STATE_HOST(struct pflash, range),        STATE_HOST(struct pflash, fd),
    STATE_HOST(struct pflash, size),         STATE_FIELD(struct pflash, mode),
    STATE_FIELD(struct pflash, step),        STATE_FIELD(struct pflash, status),
    STATE_FIELD(struct pflash, buffer_base), STATE_FIELD(struct pflash, buffer_left),
    STATE_BYTES(struct pflash, buffer),      STATE_BYTES(struct pflash, buffered),
    STATE_BYTES(struct pflash, data),
};
static const struct state_desc pflash_state = {
    .name = "pflash",
    .version = 1,
    .struct_size = sizeof(struct pflash),
    .fields = pflash_fields,
    .nfields = ARRAY_SIZE(pflash_fields),
    .loaded = pflash_loaded,
};

static const struct device_ops pflash_ops = {
    .reset = pflash_reset,
    .destroy = pflash_destroy,
};

struct pflash *pflash_create(const struct device_env *env, const struct pflash_config *cfg,
                             struct error *err)
{
    struct pflash *p = calloc(1, sizeof(*p));

    if (!p) {
        error_host(err, ENOMEM, "pflash");
        return NULL;
    }
    device_init(&p->dev, "pflash", &pflash_ops, &pflash_state);
    p->mmio = env->mmio;
    p->fd = cfg->fd;
    p->size = cfg->size;
    memcpy(p->data, cfg->data, cfg->size);
    p->range = (struct io_range){"pflash", cfg->base, cfg->size, &pflash_io_ops, p};
    if (io_bus_add(p->mmio, &p->range, err) < 0) {
        pthread_mutex_destroy(&p->dev.lock);
        free(p);
        return NULL;
    }
    return p;
}

struct device *pflash_device(struct pflash *p)
{
    return &p->dev;
}
