/*
 * The 16550A UART. Registers and behaviour: National Semiconductor PC16550D data sheet (June 1995),
 * section 8 (registers), 8.4 (FIFO control), 8.6 (interrupts), and its FIFO notes.
 *
 * Time. Sending takes no time: a character goes to the stream at once, so the guest may write as fast as
 * it can. Only when the stream is full do characters stay in the transmitter FIFO, with THRE and TEMT
 * clear, until serial_writable. Receiving takes no time either; the only clock is the character
 * timeout, four character times by the divisor, that announces a FIFO filled below its trigger level.
 *
 * Who may lose characters. A guest's driver clears its FIFOs while it starts, so what arrives before it
 * listens would be lost, as on a real wire; a script piped into the VM must not be. The peer behaves
 * like a terminal with hardware flow control: it sends while RTS is up. Guests that don't know about
 * RTS show by other means that they listen: they enable the receive interrupt, or they read LSR over
 * and over with nothing to send. serial_can_receive is 0 before any of these.
 */
#include "device/serial.h"

#include <errno.h>
#include <stdlib.h>

#define SERIAL_PORTS 8
#define SERIAL_FIFO_SIZE 16
#define SERIAL_POLLS_TO_LISTEN 64

/* Register offsets; the first two are the divisor latch while LCR_DLAB is set. */
enum {
    REG_RBR_THR = 0,
    REG_IER = 1,
    REG_IIR_FCR = 2,
    REG_LCR = 3,
    REG_MCR = 4,
    REG_LSR = 5,
    REG_MSR = 6,
    REG_SCR = 7,
};

enum {
    IER_ERBFI = 0x01,
    IER_ETBEI = 0x02,
    IER_ELSI = 0x04,
    IER_EDSSI = 0x08,
    IER_MASK = 0x0f,
};

enum {
    IIR_MODEM = 0x00,
    IIR_NONE = 0x01,
    IIR_THRE = 0x02,
    IIR_RECEIVED = 0x04,
    IIR_LINE = 0x06,
    IIR_TIMEOUT = 0x0c,
    IIR_FIFOS = 0xc0,
};

enum {
    FCR_ENABLE = 0x01,
    FCR_CLEAR_RX = 0x02,
    FCR_CLEAR_TX = 0x04,
    FCR_DMA_MODE = 0x08,
    FCR_TRIGGER = 0xc0,
};

enum { LCR_WORD_LENGTH = 0x03, LCR_STOP = 0x04, LCR_PARITY = 0x08, LCR_DLAB = 0x80 };

enum {
    MCR_DTR = 0x01,
    MCR_RTS = 0x02,
    MCR_OUT1 = 0x04,
    MCR_OUT2 = 0x08,
    MCR_LOOP = 0x10,
    MCR_MASK = 0x1f,
};

enum {
    LSR_DR = 0x01,
    LSR_OE = 0x02,
    LSR_PE = 0x04,
    LSR_FE = 0x08,
    LSR_BI = 0x10,
    LSR_THRE = 0x20,
    LSR_TEMT = 0x40,
    LSR_FIFO_ERROR = 0x80,
    LSR_ERRORS = LSR_OE | LSR_PE | LSR_FE | LSR_BI,
    LSR_CHAR_ERRORS = LSR_PE | LSR_FE | LSR_BI,
};

enum {
    MSR_DCTS = 0x01,
    MSR_DDSR = 0x02,
    MSR_TERI = 0x04,
    MSR_DDCD = 0x08,
    MSR_CTS = 0x10,
    MSR_DSR = 0x20,
    MSR_RI = 0x40,
    MSR_DCD = 0x80,
    MSR_DELTAS = 0x0f,
    /* What a connected peer shows. */
    MSR_CONNECTED = MSR_CTS | MSR_DSR | MSR_DCD,
};

struct serial {
    struct device dev;

    u64 timeout_at; /* VM ns at which the character timeout is due; UINT64_MAX: not running */
    u16 divisor;
    u8 ier, fcr, lcr, mcr, lsr, msr, scr;
    bool thre_pending;    /* THR became empty since IIR was last read for it */
    bool timeout_pending; /* characters below the trigger level have waited long enough */
    u8 idle_polls;        /* LSR reads in a row that found nothing to do */

    /* The receiver FIFO, a ring; without FIFOs only one element is used. */
    u8 rx[SERIAL_FIFO_SIZE];
    u8 rx_errors[SERIAL_FIFO_SIZE]; /* LSR_CHAR_ERRORS that belong to each */
    u8 rx_head, rx_count;
    /* What the stream hasn't taken yet, oldest first. */
    u8 tx[SERIAL_FIFO_SIZE];
    u8 tx_count;

    struct device_env env;
    struct serial_ops stream;
    struct irq_line irq;
    struct io_range range;
    struct vm_timer timeout;
    bool timer_running; /* it will fire, perhaps before timeout_at */
};

static u8 fifo_size(const struct serial *s)
{
    return s->fcr & FCR_ENABLE ? SERIAL_FIFO_SIZE : 1;
}

static u8 rx_trigger(const struct serial *s)
{
    static const u8 levels[4] = {1, 4, 8, 14};

    return s->fcr & FCR_ENABLE ? levels[s->fcr >> 6] : 1;
}

/* The interrupt of highest priority that is enabled and pending, as IIR shows it (table IV). */
static u8 pending_interrupt(const struct serial *s)
{
    if ((s->ier & IER_ELSI) && (s->lsr & LSR_ERRORS))
        return IIR_LINE;
    if ((s->ier & IER_ERBFI) && s->rx_count >= rx_trigger(s))
        return IIR_RECEIVED;
    if ((s->ier & IER_ERBFI) && s->timeout_pending)
        return IIR_TIMEOUT;
    if ((s->ier & IER_ETBEI) && s->thre_pending)
        return IIR_THRE;
    if ((s->ier & IER_EDSSI) && (s->msr & MSR_DELTAS))
        return IIR_MODEM;
    return IIR_NONE;
}

static void update_irq(struct serial *s)
{
    irq_line_set(&s->irq, (s->mcr & MCR_OUT2) && pending_interrupt(s) != IIR_NONE);
}

/* Four character times (start, data, parity and stop bits) at the programmed rate, kept sensible. */
static u64 timeout_ns(const struct serial *s)
{
    u64 bits =
        1 + 5 + (s->lcr & LCR_WORD_LENGTH) + !!(s->lcr & LCR_PARITY) + (s->lcr & LCR_STOP ? 2 : 1);
    u64 divisor = s->divisor ? s->divisor : 1;
    u64 ns = 4 * bits * divisor * NS_PER_SEC / 115200;

    return MIN(ns, 10000000);
}

/*
 * Starts the character timeout anew, or stops it when there is nothing for it to announce. This runs for
 * every character, so a timer that is under way is left alone: it finds the later deadline by itself.
 */
static void restart_timeout(struct serial *s)
{
    s->timeout_pending = false;
    s->timeout_at = UINT64_MAX;
    if (!(s->fcr & FCR_ENABLE) || s->rx_count == 0)
        return;
    s->timeout_at = vm_clock_now(s->env.clock) + timeout_ns(s);
    if (!s->timer_running) {
        s->timer_running = true;
        vm_timer_arm(&s->timeout, s->timeout_at);
    }
}

static void timeout_fired(void *opaque)
{
    struct serial *s = opaque;

    device_lock(&s->dev);
    s->timer_running = false;
    if (s->timeout_at <= vm_clock_now(s->env.clock)) {
        s->timeout_at = UINT64_MAX;
        s->timeout_pending = true;
        update_irq(s);
    } else if (s->timeout_at != UINT64_MAX) {
        s->timer_running = true;
        vm_timer_arm(&s->timeout, s->timeout_at);
    }
    device_unlock(&s->dev);
}

/* LSR's bits that tell about the receiver FIFO; a character's errors show once it is the oldest. */
static void update_receiver_status(struct serial *s)
{
    u8 later_errors = 0;

    s->lsr &= ~(LSR_DR | LSR_FIFO_ERROR);
    if (s->rx_count == 0)
        return;
    s->lsr |= LSR_DR | s->rx_errors[s->rx_head];
    s->rx_errors[s->rx_head] = 0;
    for (unsigned i = 1; i < s->rx_count; i++)
        later_errors |= s->rx_errors[(s->rx_head + i) % SERIAL_FIFO_SIZE];
    if ((s->fcr & FCR_ENABLE) && ((s->lsr & LSR_CHAR_ERRORS) || later_errors))
        s->lsr |= LSR_FIFO_ERROR;
}

static void rx_push(struct serial *s, u8 c, u8 errors)
{
    if (s->rx_count == fifo_size(s)) {
        s->lsr |= LSR_OE;
        /* The FIFO keeps its contents (the shift register is lost); the lone RBR is overwritten. */
        if (s->fcr & FCR_ENABLE)
            return;
        s->rx_count = 0;
    }
    unsigned tail = (s->rx_head + s->rx_count) % SERIAL_FIFO_SIZE;
    s->rx[tail] = c;
    s->rx_errors[tail] = errors;
    s->rx_count++;
    update_receiver_status(s);
}

static void rx_clear(struct serial *s)
{
    s->rx_head = 0;
    s->rx_count = 0;
    update_receiver_status(s);
    restart_timeout(s);
}

static bool guest_listens(const struct serial *s)
{
    return (s->mcr & MCR_RTS) || (s->ier & IER_ERBFI) || s->idle_polls >= SERIAL_POLLS_TO_LISTEN;
}

static size_t room_for_input(const struct serial *s)
{
    if ((s->mcr & MCR_LOOP) || !guest_listens(s))
        return 0;
    return fifo_size(s) - s->rx_count;
}

/* Tells the stream when room for input appeared since `before`; half a FIFO at a time is enough. */
static void announce_room(struct serial *s, size_t before)
{
    size_t now = room_for_input(s);

    if (!s->stream.accept_input || now <= before)
        return;
    if (before == 0 || now == fifo_size(s) || now == SERIAL_FIFO_SIZE / 2)
        s->stream.accept_input(s->stream.opaque);
}

/* Gives the stream what waits; when all of it is gone the transmitter is empty. */
static void tx_flush(struct serial *s)
{
    size_t sent = s->tx_count;

    if (s->tx_count && s->stream.put)
        sent = MIN(s->stream.put(s->stream.opaque, s->tx, s->tx_count), s->tx_count);
    for (size_t i = sent; i < s->tx_count; i++)
        s->tx[i - sent] = s->tx[i];
    s->tx_count -= sent;
    if (s->tx_count == 0 && !(s->lsr & LSR_THRE)) {
        s->lsr |= LSR_THRE | LSR_TEMT;
        s->thre_pending = true;
    }
}

static void write_thr(struct serial *s, u8 c)
{
    s->idle_polls = 0;
    s->thre_pending = false;
    if (s->mcr & MCR_LOOP) {
        static const u8 masks[4] = {0x1f, 0x3f, 0x7f, 0xff};

        update_irq(s);
        rx_push(s, c & masks[s->lcr & LCR_WORD_LENGTH], 0);
        restart_timeout(s);
        s->thre_pending = true;
        return;
    }
    /* The guest wrote without looking at THRE: a full FIFO ignores it, a full THR is overwritten. */
    if (s->tx_count == fifo_size(s)) {
        if (s->fcr & FCR_ENABLE)
            return;
        s->tx_count = 0;
    }
    s->tx[s->tx_count++] = c;
    s->lsr &= ~(LSR_THRE | LSR_TEMT);
    /* The line falls between two characters, so that an edge-triggered controller sees each. */
    update_irq(s);
    tx_flush(s);
}

/* Modem status as the input pins show it; in loopback they are MCR's outputs (section 8.7). */
static void update_modem_status(struct serial *s)
{
    u8 pins = MSR_CONNECTED;

    if (s->mcr & MCR_LOOP) {
        pins = (s->mcr & MCR_RTS ? MSR_CTS : 0) | (s->mcr & MCR_DTR ? MSR_DSR : 0) |
               (s->mcr & MCR_OUT1 ? MSR_RI : 0) | (s->mcr & MCR_OUT2 ? MSR_DCD : 0);
    }
    u8 changed = (s->msr ^ pins) & ~MSR_DELTAS;
    u8 deltas = (changed & (MSR_CTS | MSR_DSR | MSR_DCD)) >> 4;
    if ((changed & MSR_RI) && !(pins & MSR_RI))
        deltas |= MSR_TERI;
    s->msr = pins | (s->msr & MSR_DELTAS) | deltas;
}

static void write_fcr(struct serial *s, u8 value)
{
    /* The other bits can be programmed only along with the enable bit; switching it clears both. */
    bool switched = (s->fcr ^ value) & FCR_ENABLE;

    if (!(value & FCR_ENABLE))
        value &= FCR_CLEAR_RX | FCR_CLEAR_TX;
    s->fcr = value & (FCR_ENABLE | FCR_DMA_MODE | FCR_TRIGGER);
    if (switched || (value & FCR_CLEAR_RX))
        rx_clear(s);
    if (switched || (value & FCR_CLEAR_TX)) {
        s->tx_count = 0;
        tx_flush(s);
    }
}

static u8 read_rbr(struct serial *s)
{
    u8 c = s->rx[s->rx_head];

    s->idle_polls = 0;
    if (s->rx_count == 0)
        return c;
    s->rx_head = (s->rx_head + 1) % SERIAL_FIFO_SIZE;
    s->rx_count--;
    update_receiver_status(s);
    restart_timeout(s);
    return c;
}

static u8 read_iir(struct serial *s)
{
    u8 iir = pending_interrupt(s);

    if (iir == IIR_THRE)
        s->thre_pending = false;
    return iir | (s->fcr & FCR_ENABLE ? IIR_FIFOS : 0);
}

static u8 read_lsr(struct serial *s)
{
    u8 lsr = s->lsr;

    s->lsr &= ~LSR_ERRORS;
    if (lsr & LSR_ERRORS)
        update_receiver_status(s);
    if ((lsr & LSR_THRE) && !(lsr & LSR_DR)) {
        if (s->idle_polls < SERIAL_POLLS_TO_LISTEN)
            s->idle_polls++;
    } else {
        s->idle_polls = 0;
    }
    return lsr;
}

static u64 serial_read(void *opaque, u64 offset, unsigned size)
{
    struct serial *s = opaque;
    u8 value = 0;

    device_lock(&s->dev);
    size_t room = room_for_input(s);
    switch (offset) {
    case REG_RBR_THR:
        value = s->lcr & LCR_DLAB ? s->divisor & 0xff : read_rbr(s);
        break;
    case REG_IER:
        value = s->lcr & LCR_DLAB ? s->divisor >> 8 : s->ier;
        break;
    case REG_IIR_FCR:
        value = read_iir(s);
        break;
    case REG_LCR:
        value = s->lcr;
        break;
    case REG_MCR:
        value = s->mcr;
        break;
    case REG_LSR:
        value = read_lsr(s);
        break;
    case REG_MSR:
        value = s->msr;
        s->msr &= ~MSR_DELTAS;
        break;
    case REG_SCR:
        value = s->scr;
        break;
    }
    update_irq(s);
    announce_room(s, room);
    device_unlock(&s->dev);
    return value;
}

static void serial_write(void *opaque, u64 offset, u64 wide, unsigned size)
{
    struct serial *s = opaque;
    u8 value = wide;

    device_lock(&s->dev);
    size_t room = room_for_input(s);
    switch (offset) {
    case REG_RBR_THR:
        if (s->lcr & LCR_DLAB)
            s->divisor = (s->divisor & 0xff00) | value;
        else
            write_thr(s, value);
        break;
    case REG_IER:
        if (s->lcr & LCR_DLAB) {
            s->divisor = (s->divisor & 0xff) | value << 8;
            break;
        }
        /* Enabling the THRE interrupt while THR is empty raises it at once. */
        if ((value & ~s->ier & IER_ETBEI) && (s->lsr & LSR_THRE))
            s->thre_pending = true;
        s->ier = value & IER_MASK;
        break;
    case REG_IIR_FCR:
        write_fcr(s, value);
        break;
    case REG_LCR:
        s->lcr = value;
        break;
    case REG_MCR:
        s->mcr = value & MCR_MASK;
        update_modem_status(s);
        break;
    case REG_SCR:
        s->scr = value;
        break;
    case REG_LSR: /* read-only: the data sheet keeps writes for factory tests */
    case REG_MSR:
        break;
    }
    update_irq(s);
    announce_room(s, room);
    device_unlock(&s->dev);
}

size_t serial_can_receive(struct serial *s)
{
    device_lock(&s->dev);
    size_t room = room_for_input(s);
    device_unlock(&s->dev);
    return room;
}

size_t serial_receive(struct serial *s, const u8 *buf, size_t len)
{
    device_lock(&s->dev);
    /* The guest may have stopped listening since the stream asked. */
    size_t n = MIN(len, room_for_input(s));
    for (size_t i = 0; i < n; i++)
        rx_push(s, buf[i], 0);
    if (n)
        restart_timeout(s);
    update_irq(s);
    device_unlock(&s->dev);
    return n;
}

void serial_receive_break(struct serial *s)
{
    device_lock(&s->dev);
    if (!(s->mcr & MCR_LOOP)) {
        rx_push(s, 0, LSR_BI | LSR_FE);
        restart_timeout(s);
        update_irq(s);
    }
    device_unlock(&s->dev);
}

void serial_writable(struct serial *s)
{
    device_lock(&s->dev);
    tx_flush(s);
    update_irq(s);
    device_unlock(&s->dev);
}

static int serial_loaded(void *obj, struct error *err)
{
    struct serial *s = obj;

    if (s->rx_head >= SERIAL_FIFO_SIZE || s->rx_count > fifo_size(s) || s->tx_count > fifo_size(s))
        return error_input(err, "%s: impossible FIFO state", s->dev.name);
    s->timer_running = s->timeout_at != UINT64_MAX;
    if (s->timer_running)
        vm_timer_arm(&s->timeout, s->timeout_at);
    update_irq(s);
    return 0;
}

static const struct state_field serial_fields[] = {
    STATE_HOST(struct serial, dev),           STATE_FIELD(struct serial, timeout_at),
    STATE_FIELD(struct serial, divisor),      STATE_FIELD(struct serial, ier),
    STATE_FIELD(struct serial, fcr),          STATE_FIELD(struct serial, lcr),
    STATE_FIELD(struct serial, mcr),          STATE_FIELD(struct serial, lsr),
    STATE_FIELD(struct serial, msr),          STATE_FIELD(struct serial, scr),
    STATE_FIELD(struct serial, thre_pending), STATE_FIELD(struct serial, timeout_pending),
    STATE_FIELD(struct serial, idle_polls),   STATE_FIELD(struct serial, rx),
    STATE_FIELD(struct serial, rx_errors),    STATE_FIELD(struct serial, rx_head),
    STATE_FIELD(struct serial, rx_count),     STATE_FIELD(struct serial, tx),
    STATE_FIELD(struct serial, tx_count),     STATE_HOST(struct serial, env),
    STATE_HOST(struct serial, stream),        STATE_HOST(struct serial, irq),
    STATE_HOST(struct serial, range),         STATE_HOST(struct serial, timeout),
    STATE_HOST(struct serial, timer_running),
};

static const struct state_desc serial_state = {
    .name = "serial",
    .version = 1,
    .struct_size = sizeof(struct serial),
    .fields = serial_fields,
    .nfields = ARRAY_SIZE(serial_fields),
    .loaded = serial_loaded,
};

static void serial_reset(struct device *dev)
{
    struct serial *s = container_of(dev, struct serial, dev);

    device_lock(dev);
    s->divisor = 12; /* 9600 baud; the data sheet leaves it indeterminate */
    s->ier = s->fcr = s->lcr = s->mcr = s->scr = 0;
    s->lsr = LSR_THRE | LSR_TEMT;
    s->msr = MSR_CONNECTED;
    s->thre_pending = false;
    s->idle_polls = 0;
    s->tx_count = 0;
    rx_clear(s);
    update_irq(s);
    device_unlock(dev);
}

static void serial_destroy(struct device *dev)
{
    struct serial *s = container_of(dev, struct serial, dev);

    io_bus_remove(s->env.ports, &s->range);
    vm_timer_destroy(&s->timeout);
    pthread_mutex_destroy(&dev->lock);
    free(s);
}

static const struct device_ops serial_ops = {
    .reset = serial_reset,
    .destroy = serial_destroy,
};

static const struct io_ops serial_io_ops = {
    .read = serial_read,
    .write = serial_write,
    .max_size = 1,
};

struct serial *serial_create(const struct device_env *env, const struct serial_config *cfg,
                             struct error *err)
{
    struct serial *s = calloc(1, sizeof(*s));

    if (!s) {
        error_host(err, ENOMEM, "serial port at 0x%x", cfg->base);
        return NULL;
    }
    device_init(&s->dev, "serial", &serial_ops, &serial_state);
    s->env = *env;
    s->stream = cfg->ops;
    s->irq = cfg->irq;
    s->timeout_at = UINT64_MAX;
    vm_timer_init(&s->timeout, env->clock, timeout_fired, s);
    s->range = (struct io_range){
        .name = "serial",
        .base = cfg->base,
        .size = SERIAL_PORTS,
        .ops = &serial_io_ops,
        .opaque = s,
    };
    if (io_bus_add(env->ports, &s->range, err) < 0) {
        vm_timer_destroy(&s->timeout);
        pthread_mutex_destroy(&s->dev.lock);
        free(s);
        return NULL;
    }
    serial_reset(&s->dev);
    return s;
}

struct device *serial_device(struct serial *s)
{
    return &s->dev;
}
