/*
 * The 8259A pair. Registers and behaviour: Intel 8259A data sheet (order 231468-003), and for the ELCR
 * and the fixed wiring of a PC the Intel ICH data sheets (chapter "8259 Interrupt Controllers").
 *
 * Where this follows the chipsets rather than the single chip: ICW1's LTIM is ignored, ELCR decides line by
 * line; the master's IR2 is wired to the slave and ICW3 changes nothing; 8086 mode always. And one place
 * where it is kinder than the chip: a request latched by an edge stays until it is acknowledged, even
 * when the line falls again before (the 8259A would answer with IR7). Devices may thus send pulses.
 *
 * A chip that was not initialised since power-on asks for nothing.
 */
#include "device/pic.h"

#include "machine/layout.h"

#include <assert.h>
#include <errno.h>
#include <stdlib.h>

enum { MASTER, SLAVE, CHIPS };
enum { CASCADE_IR = 2, SPURIOUS_IR = 7 };

/* Lines that may be level-triggered: not 0, 1, 2, 8 and 13, which are the mainboard's own. */
static const u8 elcr_mask[CHIPS] = {0xf8, 0xde};

enum {
    ICW1_IC4 = 0x01,
    ICW1_SNGL = 0x02,
    ICW1_INIT = 0x10,
    ICW4_AEOI = 0x02,
    ICW4_SFNM = 0x10,
};

/* OCW2's command, bits 7 to 5: rotate, specific level, EOI. */
enum {
    OCW2_ROTATE_AEOI_CLEAR = 0,
    OCW2_EOI = 1,
    OCW2_NOP = 2,
    OCW2_EOI_SPECIFIC = 3,
    OCW2_ROTATE_AEOI_SET = 4,
    OCW2_EOI_ROTATE = 5,
    OCW2_SET_PRIORITY = 6,
    OCW2_EOI_SPECIFIC_ROTATE = 7,
};

enum {
    OCW3_RIS = 0x01,
    OCW3_RR = 0x02,
    OCW3_POLL = 0x04,
    OCW3_SELECT = 0x08, /* with bit 4 clear: this is OCW3, not OCW2 */
    OCW3_SMM = 0x20,
    OCW3_ESMM = 0x40,
};

/* What a write to the odd address means next. */
enum init_step { INIT_NEVER, INIT_DONE, INIT_ICW2, INIT_ICW3, INIT_ICW4, INIT_STEPS };

struct pic_chip {
    u8 lines; /* the inputs as they are */
    u8 irr, isr, imr;
    u8 elcr;
    u8 vector_base;
    u8 lowest; /* the level of lowest priority; the one after it has the highest */
    u8 init_step;
    u8 icw1;
    bool auto_eoi, rotate_on_aeoi, special_fully_nested, special_mask;
    bool read_isr, poll;
};

struct pic {
    struct device dev;
    struct pic_chip chip[CHIPS];

    struct device_env env;
    struct irq_line intr;
    struct io_range range[CHIPS];
    struct io_range elcr_range;
};

/* How many steps below the highest priority level n is. */
static unsigned rank_of(const struct pic_chip *c, unsigned n)
{
    return (n - c->lowest - 1) & 7;
}

/* The level of highest priority among `set`, or -1 when it is empty. */
static int highest(const struct pic_chip *c, u8 set)
{
    for (unsigned i = 1; i <= 8; i++) {
        unsigned n = (c->lowest + i) & 7;
        if (set & BIT(n))
            return (int)n;
    }
    return -1;
}

/* The request that the chip asks service for, or -1. */
static int pending_level(const struct pic *pic, unsigned which)
{
    const struct pic_chip *c = &pic->chip[which];

    if (c->init_step != INIT_DONE)
        return -1;
    int request = highest(c, c->irr & ~c->imr);
    if (request < 0)
        return -1;
    /* In special mask mode a level in service that is masked holds nobody back. */
    int serving = highest(c, c->special_mask ? c->isr & ~c->imr : c->isr);
    if (serving < 0 || rank_of(c, (unsigned)request) < rank_of(c, (unsigned)serving))
        return request;
    /* In special fully nested mode the slave's next request, higher than its last, gets through. */
    if (c->special_fully_nested && which == MASTER && request == CASCADE_IR &&
        serving == CASCADE_IR)
        return request;
    return -1;
}

/* Carries the slave's output to the master's IR2, and the master's to INTR. */
static void update_outputs(struct pic *pic)
{
    struct pic_chip *master = &pic->chip[MASTER];

    if (pending_level(pic, SLAVE) >= 0)
        master->irr |= BIT(CASCADE_IR);
    else
        master->irr &= ~BIT(CASCADE_IR);
    irq_line_set(&pic->intr, pending_level(pic, MASTER) >= 0);
}

void pic_set_irq(void *sink, unsigned n, bool level)
{
    struct pic *pic = sink;

    if (n >= 8 * CHIPS || n == CASCADE_IR)
        return;
    device_lock(&pic->dev);
    struct pic_chip *c = &pic->chip[n / 8];
    u8 bit = BIT(n & 7);
    bool rising = level && !(c->lines & bit);

    c->lines = level ? c->lines | bit : c->lines & ~bit;
    if (c->elcr & bit)
        c->irr = level ? c->irr | bit : c->irr & ~bit;
    else if (rising)
        c->irr |= bit;
    update_outputs(pic);
    device_unlock(&pic->dev);
}

/* The chip's part of an INTA cycle, or of a poll: level n goes into service. */
static void acknowledge(struct pic_chip *c, unsigned n)
{
    u8 bit = BIT(n);

    if (!(c->elcr & bit))
        c->irr &= ~bit;
    if (!c->auto_eoi)
        c->isr |= bit;
    else if (c->rotate_on_aeoi)
        c->lowest = n;
}

int pic_ack(struct pic *pic)
{
    struct pic_chip *master = &pic->chip[MASTER], *slave = &pic->chip[SLAVE];
    int vector;

    device_lock(&pic->dev);
    int level = pending_level(pic, MASTER);
    if (master->init_step == INIT_NEVER) {
        vector = -1;
    } else if (level < 0) {
        vector = master->vector_base + SPURIOUS_IR;
    } else if (level != CASCADE_IR) {
        acknowledge(master, (unsigned)level);
        vector = master->vector_base + level;
    } else {
        int slave_level = pending_level(pic, SLAVE);

        /* IR2 is up only while the slave asks: there is no spurious IRQ 15. */
        assert(slave_level >= 0);
        acknowledge(master, CASCADE_IR);
        acknowledge(slave, (unsigned)slave_level);
        vector = slave->vector_base + slave_level;
    }
    update_outputs(pic);
    device_unlock(&pic->dev);
    return vector;
}

static void write_icw1(struct pic_chip *c, u8 value)
{
    c->icw1 = value;
    c->init_step = INIT_ICW2;
    c->imr = 0;
    c->isr = 0;
    c->irr = c->lines & c->elcr; /* the edge sense circuit is reset */
    c->lowest = 7;
    c->special_mask = false;
    c->read_isr = false;
    c->poll = false;
    if (!(value & ICW1_IC4)) {
        c->auto_eoi = false;
        c->special_fully_nested = false;
    }
}

static void write_ocw2(struct pic_chip *c, u8 value)
{
    /* In special mask mode a non-specific EOI passes over the masked levels. */
    int serving = highest(c, c->special_mask ? c->isr & ~c->imr : c->isr);
    u8 level = value & 7;

    switch (value >> 5) {
    case OCW2_EOI:
    case OCW2_EOI_ROTATE:
        if (serving < 0)
            break;
        c->isr &= ~BIT(serving);
        if (value >> 5 == OCW2_EOI_ROTATE)
            c->lowest = (u8)serving;
        break;
    case OCW2_EOI_SPECIFIC:
        c->isr &= ~BIT(level);
        break;
    case OCW2_EOI_SPECIFIC_ROTATE:
        c->isr &= ~BIT(level);
        c->lowest = level;
        break;
    case OCW2_SET_PRIORITY:
        c->lowest = level;
        break;
    case OCW2_ROTATE_AEOI_SET:
        c->rotate_on_aeoi = true;
        break;
    case OCW2_ROTATE_AEOI_CLEAR:
        c->rotate_on_aeoi = false;
        break;
    case OCW2_NOP:
        break;
    }
}

static void write_ocw3(struct pic_chip *c, u8 value)
{
    if (value & OCW3_ESMM)
        c->special_mask = value & OCW3_SMM;
    if (value & OCW3_POLL)
        c->poll = true;
    else if (value & OCW3_RR)
        c->read_isr = value & OCW3_RIS;
}

static void write_odd(struct pic_chip *c, u8 value)
{
    switch ((enum init_step)c->init_step) {
    case INIT_ICW2:
        c->vector_base = value & 0xf8;
        if (!(c->icw1 & ICW1_SNGL))
            c->init_step = INIT_ICW3;
        else
            c->init_step = c->icw1 & ICW1_IC4 ? INIT_ICW4 : INIT_DONE;
        break;
    case INIT_ICW3:
        c->init_step = c->icw1 & ICW1_IC4 ? INIT_ICW4 : INIT_DONE;
        break;
    case INIT_ICW4:
        c->auto_eoi = value & ICW4_AEOI;
        c->special_fully_nested = value & ICW4_SFNM;
        c->init_step = INIT_DONE;
        break;
    default: /* OCW1 */
        c->imr = value;
        break;
    }
}

static void chip_write(struct pic *pic, unsigned which, u64 offset, u8 value)
{
    struct pic_chip *c = &pic->chip[which];

    device_lock(&pic->dev);
    if (offset == 1)
        write_odd(c, value);
    else if (value & ICW1_INIT)
        write_icw1(c, value);
    else if (value & OCW3_SELECT)
        write_ocw3(c, value);
    else
        write_ocw2(c, value);
    update_outputs(pic);
    device_unlock(&pic->dev);
}

static u64 chip_read(struct pic *pic, unsigned which, u64 offset)
{
    struct pic_chip *c = &pic->chip[which];
    u8 value;

    device_lock(&pic->dev);
    if (c->poll) {
        int level = pending_level(pic, which);

        c->poll = false;
        value = 0;
        if (level >= 0) {
            acknowledge(c, (unsigned)level);
            value = 0x80 | (u8)level;
        }
        update_outputs(pic);
    } else if (offset == 1) {
        value = c->imr;
    } else {
        value = c->read_isr ? c->isr : c->irr;
    }
    device_unlock(&pic->dev);
    return value;
}

static void master_write(void *opaque, u64 offset, u64 value, unsigned size)
{
    chip_write(opaque, MASTER, offset, (u8)value);
}

static u64 master_read(void *opaque, u64 offset, unsigned size)
{
    return chip_read(opaque, MASTER, offset);
}

static void slave_write(void *opaque, u64 offset, u64 value, unsigned size)
{
    chip_write(opaque, SLAVE, offset, (u8)value);
}

static u64 slave_read(void *opaque, u64 offset, unsigned size)
{
    return chip_read(opaque, SLAVE, offset);
}

static void elcr_write(void *opaque, u64 offset, u64 value, unsigned size)
{
    struct pic *pic = opaque;
    struct pic_chip *c = &pic->chip[offset & 1];

    device_lock(&pic->dev);
    c->elcr = (u8)value & elcr_mask[offset & 1];
    c->irr = (c->irr & ~c->elcr) | (c->lines & c->elcr);
    update_outputs(pic);
    device_unlock(&pic->dev);
}

static u64 elcr_read(void *opaque, u64 offset, unsigned size)
{
    struct pic *pic = opaque;

    device_lock(&pic->dev);
    u8 value = pic->chip[offset & 1].elcr;
    device_unlock(&pic->dev);
    return value;
}

static int pic_loaded(void *obj, struct error *err)
{
    struct pic *pic = obj;

    for (unsigned i = 0; i < CHIPS; i++) {
        const struct pic_chip *c = &pic->chip[i];
        if (c->lowest > 7 || c->init_step >= INIT_STEPS)
            return error_input(err, "pic: impossible priority or initialisation step");
    }
    update_outputs(pic);
    return 0;
}

static const struct state_field chip_fields[] = {
    STATE_FIELD(struct pic_chip, lines),
    STATE_FIELD(struct pic_chip, irr),
    STATE_FIELD(struct pic_chip, isr),
    STATE_FIELD(struct pic_chip, imr),
    STATE_FIELD(struct pic_chip, elcr),
    STATE_FIELD(struct pic_chip, vector_base),
    STATE_FIELD(struct pic_chip, lowest),
    STATE_FIELD(struct pic_chip, init_step),
    STATE_FIELD(struct pic_chip, icw1),
    STATE_FIELD(struct pic_chip, auto_eoi),
    STATE_FIELD(struct pic_chip, rotate_on_aeoi),
    STATE_FIELD(struct pic_chip, special_fully_nested),
    STATE_FIELD(struct pic_chip, special_mask),
    STATE_FIELD(struct pic_chip, read_isr),
    STATE_FIELD(struct pic_chip, poll),
};

static const struct state_desc chip_state = STATE_DESC("chip", 1, struct pic_chip, chip_fields);

static const struct state_field pic_fields[] = {
    STATE_HOST(struct pic, dev),   STATE_STRUCTS(struct pic, chip, &chip_state),
    STATE_HOST(struct pic, env),   STATE_HOST(struct pic, intr),
    STATE_HOST(struct pic, range), STATE_HOST(struct pic, elcr_range),
};

static const struct state_desc pic_state = {
    .name = "pic",
    .version = 1,
    .struct_size = sizeof(struct pic),
    .fields = pic_fields,
    .nfields = ARRAY_SIZE(pic_fields),
    .loaded = pic_loaded,
};

static void pic_reset(struct device *dev)
{
    struct pic *pic = container_of(dev, struct pic, dev);

    device_lock(dev);
    for (unsigned i = 0; i < CHIPS; i++) {
        /* The input lines belong to the devices: they stay as they are. */
        pic->chip[i] = (struct pic_chip){.lines = pic->chip[i].lines, .lowest = 7};
    }
    update_outputs(pic);
    device_unlock(dev);
}

static void pic_destroy(struct device *dev)
{
    struct pic *pic = container_of(dev, struct pic, dev);

    io_bus_remove(pic->env.ports, &pic->elcr_range);
    for (unsigned i = 0; i < CHIPS; i++)
        io_bus_remove(pic->env.ports, &pic->range[i]);
    pthread_mutex_destroy(&dev->lock);
    free(pic);
}

static const struct device_ops pic_ops = {
    .reset = pic_reset,
    .destroy = pic_destroy,
};

static const struct io_ops chip_io_ops[CHIPS] = {
    [MASTER] = {.read = master_read, .write = master_write, .max_size = 1},
    [SLAVE] = {.read = slave_read, .write = slave_write, .max_size = 1},
};

static const struct io_ops elcr_io_ops = {
    .read = elcr_read,
    .write = elcr_write,
    .max_size = 1,
};

static int add_ranges(struct pic *pic, struct error *err)
{
    struct io_bus *ports = pic->env.ports;
    int ret = io_bus_add(ports, &pic->range[MASTER], err);

    if (ret < 0)
        return ret;
    ret = io_bus_add(ports, &pic->range[SLAVE], err);
    if (ret < 0)
        goto remove_master;
    ret = io_bus_add(ports, &pic->elcr_range, err);
    if (ret < 0)
        goto remove_slave;
    return 0;

remove_slave:
    io_bus_remove(ports, &pic->range[SLAVE]);
remove_master:
    io_bus_remove(ports, &pic->range[MASTER]);
    return ret;
}

struct pic *pic_create(const struct device_env *env, const struct pic_config *cfg,
                       struct error *err)
{
    static const u16 bases[CHIPS] = {PORT_PIC_MASTER, PORT_PIC_SLAVE};
    struct pic *pic = calloc(1, sizeof(*pic));

    if (!pic) {
        error_host(err, ENOMEM, "interrupt controller");
        return NULL;
    }
    device_init(&pic->dev, "pic", &pic_ops, &pic_state);
    pic->env = *env;
    pic->intr = cfg->intr;
    for (unsigned i = 0; i < CHIPS; i++) {
        pic->range[i] = (struct io_range){
            .name = "pic",
            .base = bases[i],
            .size = 2,
            .ops = &chip_io_ops[i],
            .opaque = pic,
        };
    }
    pic->elcr_range = (struct io_range){
        .name = "elcr",
        .base = PORT_PIC_ELCR,
        .size = CHIPS,
        .ops = &elcr_io_ops,
        .opaque = pic,
    };
    if (add_ranges(pic, err) < 0) {
        pthread_mutex_destroy(&pic->dev.lock);
        free(pic);
        return NULL;
    }
    pic_reset(&pic->dev);
    return pic;
}

struct device *pic_device(struct pic *pic)
{
    return &pic->dev;
}
