/*
 * The keyboard controller and its two devices. Registers and commands: IBM PS/2 Hardware Interface Technical
 * Reference (1990), "Keyboard and Auxiliary Device Controller", "Keyboards" and "Mouse"; the wheel
 * mouse's knock (rates 200, 100, 80): Microsoft, "Windows and the 5-button wheel mouse".
 *
 * Bytes for the guest wait in three bounded queues: the controller's own answers, the keyboard's and the
 * mouse's. One at a time moves into the output buffer, in that order, when it is empty and the device's
 * interface is enabled; that is what raises IRQ 1 or 12. A device's answer to a command clears
 * what it had queued, as the devices do, so an answer always has room.
 *
 * The keyboard speaks scan set 2 (or 1, when the guest chose it); while the command byte says so the
 * controller translates set 2 into set 1: a table, and F0 before a code becomes its bit 7.
 */
#include "device/i8042.h"

#include "machine/layout.h"

#include <errno.h>
#include <stdlib.h>

enum { QUEUE_SIZE = 32, RAM_SIZE = 32, KEYBOARD_BUFFER = 16, KEY_SEQUENCE_MAX = 8 };

enum {
    STATUS_OBF = 0x01,
    STATUS_SYS = 0x04,
    STATUS_COMMAND = 0x08,
    STATUS_UNLOCKED = 0x10,
    STATUS_AUX = 0x20,
};

/* The command byte is byte 0 of the controller's RAM. */
enum {
    MODE_KEYBOARD_IRQ = 0x01,
    MODE_MOUSE_IRQ = 0x02,
    MODE_SYS = 0x04,
    MODE_KEYBOARD_OFF = 0x10,
    MODE_MOUSE_OFF = 0x20,
    MODE_TRANSLATE = 0x40,
};

enum {
    OUT_RUN = 0x01, /* low: the processor is in reset */
    OUT_A20 = 0x02,
    OUT_KEYBOARD_IRQ = 0x10,
    OUT_MOUSE_IRQ = 0x20,
    OUT_LINES = 0xc0, /* keyboard clock and data */
};

/* Commands to port 0x64. */
enum {
    CMD_READ_RAM = 0x20,  /* to 0x3f */
    CMD_WRITE_RAM = 0x60, /* to 0x7f */
    CMD_TEST_PASSWORD = 0xa4,
    CMD_MOUSE_OFF = 0xa7,
    CMD_MOUSE_ON = 0xa8,
    CMD_MOUSE_TEST = 0xa9,
    CMD_SELF_TEST = 0xaa,
    CMD_KEYBOARD_TEST = 0xab,
    CMD_KEYBOARD_OFF = 0xad,
    CMD_KEYBOARD_ON = 0xae,
    CMD_READ_INPUT = 0xc0,
    CMD_READ_OUTPUT = 0xd0,
    CMD_WRITE_OUTPUT = 0xd1,
    CMD_ECHO_KEYBOARD = 0xd2,
    CMD_ECHO_MOUSE = 0xd3,
    CMD_TO_MOUSE = 0xd4,
    CMD_A20_OFF = 0xdd,
    CMD_A20_ON = 0xdf,
    CMD_READ_TEST = 0xe0,
    CMD_PULSE = 0xf0, /* to 0xff: the low bits that are 0 pulse low */
};

/* Commands to both devices, and to one of them. */
enum {
    DEV_IDENTIFY = 0xf2,
    DEV_RATE = 0xf3,
    DEV_ENABLE = 0xf4,
    DEV_DISABLE = 0xf5,
    DEV_DEFAULTS = 0xf6,
    DEV_RESEND = 0xfe,
    DEV_RESET = 0xff,
    KBD_LEDS = 0xed,
    KBD_ECHO = 0xee,
    KBD_SCAN_SET = 0xf0,
    KBD_KEY_TYPES_FIRST = 0xf7,
    KBD_KEY_TYPES_LAST = 0xfd,
    MOUSE_SCALE_1 = 0xe6,
    MOUSE_SCALE_2 = 0xe7,
    MOUSE_RESOLUTION = 0xe8,
    MOUSE_STATUS = 0xe9,
    MOUSE_STREAM = 0xea,
    MOUSE_POLL = 0xeb,
    MOUSE_UNWRAP = 0xec,
    MOUSE_WRAP = 0xee,
    MOUSE_REMOTE = 0xf0,
};

enum { ANSWER_ACK = 0xfa, ANSWER_RESEND = 0xfe, ANSWER_TEST_PASSED = 0xaa };
enum { BREAK_PREFIX = 0xf0, EXTENDED_PREFIX = 0xe0, OVERRUN_SET1 = 0xff, OVERRUN_SET2 = 0x00 };
enum { ID_MOUSE = 0, ID_WHEEL = 3, ID_FIVE_BUTTONS = 4 };
enum { PACKET_X_SIGN = 0x10, PACKET_Y_SIGN = 0x20, PACKET_ONE = 0x08 };
enum { MOUSE_MAX_MOTION = 4096 };

struct queue {
    u8 data[QUEUE_SIZE];
    u8 head, count;
};

struct i8042 {
    struct device dev;

    u8 ram[RAM_SIZE];
    u8 output_port; /* OUT_RUN and OUT_A20 as written */
    u8 command;     /* awaits its data byte at port 0x60; 0: none */
    u8 status;
    u8 output;            /* the output buffer; STATUS_OBF and STATUS_AUX tell of it */
    bool translate_break; /* an F0 was swallowed: the next code is a break */
    struct queue answers;

    struct queue keyboard;
    u8 keyboard_command; /* awaits its parameter; 0: none */
    u8 keyboard_last;    /* for resend */
    u8 scan_set, leds, typematic;
    bool scanning;

    struct queue mouse;
    u8 mouse_command;
    u8 mouse_last;
    u8 mouse_id, mouse_rate, mouse_resolution;
    u8 rate_history[2]; /* the last two sample rates, oldest first: the wheel's knock */
    u8 buttons, buttons_sent;
    bool mouse_enabled, mouse_remote, mouse_wrap, mouse_scale_2;
    s16 dx, dy, dz;

    bool stopped; /* with the machine, whose state stands still then */
    struct device_env env;
    struct irq_line keyboard_irq, mouse_irq;
    struct a20_gate *a20;
    struct power_sink power;
    struct io_range data_range, command_range;
};

/* Scan set 2 to set 1, as the controller translates. Codes from 0x80 on stand for themselves but two. */
static const u8 set1[128] = {
    0xff, 0x43, 0x41, 0x3f, 0x3d, 0x3b, 0x3c, 0x58, 0x64, 0x44, 0x42, 0x40, 0x3e, 0x0f, 0x29, 0x59,
    0x65, 0x38, 0x2a, 0x70, 0x1d, 0x10, 0x02, 0x5a, 0x66, 0x71, 0x2c, 0x1f, 0x1e, 0x11, 0x03, 0x5b,
    0x67, 0x2e, 0x2d, 0x20, 0x12, 0x05, 0x04, 0x5c, 0x68, 0x39, 0x2f, 0x21, 0x14, 0x13, 0x06, 0x5d,
    0x69, 0x31, 0x30, 0x23, 0x22, 0x15, 0x07, 0x5e, 0x6a, 0x72, 0x32, 0x24, 0x16, 0x08, 0x09, 0x5f,
    0x6b, 0x33, 0x25, 0x17, 0x18, 0x0b, 0x0a, 0x60, 0x6c, 0x34, 0x35, 0x26, 0x27, 0x19, 0x0c, 0x61,
    0x6d, 0x73, 0x28, 0x74, 0x1a, 0x0d, 0x62, 0x6e, 0x3a, 0x36, 0x1c, 0x1b, 0x75, 0x2b, 0x63, 0x76,
    0x55, 0x56, 0x77, 0x78, 0x79, 0x7a, 0x0e, 0x7b, 0x7c, 0x4f, 0x7d, 0x4b, 0x47, 0x7e, 0x7f, 0x6f,
    0x52, 0x53, 0x50, 0x4c, 0x4d, 0x48, 0x01, 0x45, 0x57, 0x4e, 0x51, 0x4a, 0x37, 0x49, 0x46, 0x54,
};

static u8 to_set1(u8 code)
{
    if (code == 0x83)
        return 0x41;
    if (code == 0x84)
        return 0x54;
    return code < 0x80 ? set1[code] : code;
}

/* A full queue drops the byte: callers that care check the room first. */
static void queue_push(struct queue *q, u8 value)
{
    if (q->count < QUEUE_SIZE)
        q->data[(q->head + q->count++) % QUEUE_SIZE] = value;
}

static u8 queue_pop(struct queue *q)
{
    u8 value = q->data[q->head];

    q->head = (q->head + 1) % QUEUE_SIZE;
    q->count--;
    return value;
}

static void queue_clear(struct queue *q)
{
    q->head = 0;
    q->count = 0;
}

static void update_irqs(struct i8042 *k)
{
    bool full = k->status & STATUS_OBF;
    bool aux = k->status & STATUS_AUX;

    irq_line_set(&k->keyboard_irq, full && !aux && (k->ram[0] & MODE_KEYBOARD_IRQ));
    irq_line_set(&k->mouse_irq, full && aux && (k->ram[0] & MODE_MOUSE_IRQ));
}

static void fill_output(struct i8042 *k, u8 value, bool aux)
{
    k->output = value;
    k->status |= STATUS_OBF | (aux ? STATUS_AUX : 0);
}

static s16 add_motion(s16 sum, int d)
{
    d = MAX(MIN(d, MOUSE_MAX_MOTION), -MOUSE_MAX_MOTION) + sum;
    return (s16)MAX(MIN(d, MOUSE_MAX_MOTION), -MOUSE_MAX_MOTION);
}

static s16 take_motion(s16 *sum, int least, int most)
{
    s16 part = (s16)MAX(MIN(*sum, most), least);

    *sum -= part;
    return part;
}

/* One movement report (Mouse, "Data packet format"). */
static void push_packet(struct i8042 *k)
{
    s16 x = take_motion(&k->dx, -255, 255), y = take_motion(&k->dy, -255, 255);

    queue_push(&k->mouse, PACKET_ONE | (k->buttons & 7) | (x < 0 ? PACKET_X_SIGN : 0) |
                              (y < 0 ? PACKET_Y_SIGN : 0));
    queue_push(&k->mouse, (u8)x);
    queue_push(&k->mouse, (u8)y);
    if (k->mouse_id != ID_MOUSE) {
        u8 z = (u8)take_motion(&k->dz, -8, 7);
        queue_push(&k->mouse, k->mouse_id == ID_FIVE_BUTTONS ? z & 15 : z);
    } else {
        k->dz = 0;
    }
    k->buttons_sent = k->buttons;
}

/* In stream mode, reports what is new once the last report has gone. */
static void stream_mouse(struct i8042 *k)
{
    bool wheel = k->mouse_id != ID_MOUSE && k->dz;

    if (k->mouse_enabled && !k->mouse_remote && !k->mouse_wrap && k->mouse.count == 0 &&
        (k->dx || k->dy || wheel || k->buttons != k->buttons_sent))
        push_packet(k);
}

/* Moves waiting bytes on: into the output buffer, when it is free. */
static void advance(struct i8042 *k)
{
    stream_mouse(k);
    while (!(k->status & STATUS_OBF)) {
        if (k->answers.count) {
            fill_output(k, queue_pop(&k->answers), false);
        } else if (k->keyboard.count && !(k->ram[0] & MODE_KEYBOARD_OFF)) {
            u8 code = k->keyboard_last = queue_pop(&k->keyboard);

            if (k->ram[0] & MODE_TRANSLATE) {
                if (code == BREAK_PREFIX) {
                    k->translate_break = true;
                    continue;
                }
                code = to_set1(code) | (k->translate_break ? 0x80 : 0);
                k->translate_break = false;
            }
            fill_output(k, code, false);
        } else if (k->mouse.count && !(k->ram[0] & MODE_MOUSE_OFF)) {
            k->mouse_last = queue_pop(&k->mouse);
            fill_output(k, k->mouse_last, true);
        } else {
            break;
        }
    }
    update_irqs(k);
}

static void keyboard_defaults(struct i8042 *k)
{
    k->scan_set = 2;
    k->typematic = 0x2b;
    k->keyboard_command = 0;
}

static void answer_keyboard(struct i8042 *k, u8 value)
{
    queue_push(&k->keyboard, value);
}

static void keyboard_parameter(struct i8042 *k, u8 value)
{
    u8 command = k->keyboard_command;

    k->keyboard_command = 0;
    switch (command) {
    case KBD_LEDS:
        k->leds = value & 7;
        break;
    case DEV_RATE:
        k->typematic = value & 0x7f;
        break;
    case KBD_SCAN_SET:
        if (value > 2) {
            answer_keyboard(k, ANSWER_RESEND);
            return;
        }
        answer_keyboard(k, ANSWER_ACK);
        if (value == 0)
            answer_keyboard(k, k->scan_set);
        else
            k->scan_set = value;
        return;
    }
    answer_keyboard(k, ANSWER_ACK);
}

static void write_keyboard(struct i8042 *k, u8 value)
{
    queue_clear(&k->keyboard);
    k->translate_break = false;
    /* A byte that is a command ends the wait for a parameter. */
    if (k->keyboard_command && value < KBD_LEDS) {
        keyboard_parameter(k, value);
        return;
    }
    k->keyboard_command = 0;
    switch (value) {
    case KBD_ECHO:
        answer_keyboard(k, KBD_ECHO);
        return;
    case DEV_RESEND:
        answer_keyboard(k, k->keyboard_last);
        return;
    case KBD_LEDS:
    case KBD_SCAN_SET:
    case DEV_RATE:
        k->keyboard_command = value;
        break;
    case DEV_IDENTIFY:
        answer_keyboard(k, ANSWER_ACK);
        answer_keyboard(k, 0xab);
        answer_keyboard(k, 0x83);
        return;
    case DEV_ENABLE:
        k->scanning = true;
        break;
    case DEV_DISABLE:
        keyboard_defaults(k);
        k->scanning = false;
        break;
    case DEV_DEFAULTS: /* goes on scanning if it was */
        keyboard_defaults(k);
        break;
    case DEV_RESET:
        keyboard_defaults(k);
        k->leds = 0;
        k->scanning = true;
        answer_keyboard(k, ANSWER_ACK);
        answer_keyboard(k, ANSWER_TEST_PASSED);
        return;
    default:
        /* Key types matter in scan set 3 only. */
        if (value < KBD_KEY_TYPES_FIRST || value > KBD_KEY_TYPES_LAST) {
            answer_keyboard(k, ANSWER_RESEND);
            return;
        }
        break;
    }
    answer_keyboard(k, ANSWER_ACK);
}

static void mouse_defaults(struct i8042 *k)
{
    k->mouse_rate = 100;
    k->mouse_resolution = 2;
    k->mouse_enabled = false;
    k->mouse_remote = false;
    k->mouse_wrap = false;
    k->mouse_scale_2 = false;
    k->mouse_command = 0;
    k->rate_history[0] = k->rate_history[1] = 0;
    k->dx = k->dy = k->dz = 0;
}

static void answer_mouse(struct i8042 *k, u8 value)
{
    queue_push(&k->mouse, value);
}

/* Three rates in a row are a knock that turns the wheel, then the further buttons, on. */
static void set_mouse_rate(struct i8042 *k, u8 rate)
{
    if (rate == 80 && k->rate_history[0] == 200 && k->rate_history[1] == 100)
        k->mouse_id = ID_WHEEL;
    else if (rate == 80 && k->rate_history[0] == 200 && k->rate_history[1] == 200 &&
             k->mouse_id == ID_WHEEL)
        k->mouse_id = ID_FIVE_BUTTONS;
    k->rate_history[0] = k->rate_history[1];
    k->rate_history[1] = rate;
    k->mouse_rate = rate;
}

static void mouse_status(struct i8042 *k)
{
    answer_mouse(k, (k->mouse_remote ? 0x40 : 0) | (k->mouse_enabled ? 0x20 : 0) |
                        (k->mouse_scale_2 ? 0x10 : 0) | (k->buttons & I8042_BUTTON_LEFT ? 4 : 0) |
                        (k->buttons & I8042_BUTTON_MIDDLE ? 2 : 0) |
                        (k->buttons & I8042_BUTTON_RIGHT ? 1 : 0));
    answer_mouse(k, k->mouse_resolution);
    answer_mouse(k, k->mouse_rate);
}

static void write_mouse(struct i8042 *k, u8 value)
{
    u8 command = k->mouse_command;

    queue_clear(&k->mouse);
    k->mouse_command = 0;
    if (k->mouse_wrap && value != MOUSE_UNWRAP && value != DEV_RESET) {
        answer_mouse(k, value);
        return;
    }
    if (value == DEV_RESEND) {
        answer_mouse(k, k->mouse_last);
        return;
    }
    if (command) {
        if (command == DEV_RATE)
            set_mouse_rate(k, value);
        else
            k->mouse_resolution = value & 3;
        answer_mouse(k, ANSWER_ACK);
        return;
    }
    if ((value < MOUSE_SCALE_1 || (value > MOUSE_REMOTE && value < DEV_IDENTIFY) ||
         value > DEV_DEFAULTS || value == 0xed || value == 0xef) &&
        value != DEV_RESET) {
        answer_mouse(k, ANSWER_RESEND);
        return;
    }
    answer_mouse(k, ANSWER_ACK);
    switch (value) {
    case MOUSE_SCALE_1:
    case MOUSE_SCALE_2:
        k->mouse_scale_2 = value == MOUSE_SCALE_2;
        break;
    case MOUSE_RESOLUTION:
    case DEV_RATE:
        k->mouse_command = value;
        break;
    case MOUSE_STATUS:
        mouse_status(k);
        break;
    case MOUSE_STREAM:
        k->mouse_remote = false;
        break;
    case MOUSE_POLL:
        push_packet(k);
        break;
    case MOUSE_UNWRAP:
    case MOUSE_WRAP:
        k->mouse_wrap = value == MOUSE_WRAP;
        break;
    case MOUSE_REMOTE:
        k->mouse_remote = true;
        break;
    case DEV_IDENTIFY:
        answer_mouse(k, k->mouse_id);
        break;
    case DEV_ENABLE:
    case DEV_DISABLE:
        k->mouse_enabled = value == DEV_ENABLE;
        break;
    case DEV_DEFAULTS:
        mouse_defaults(k);
        break;
    case DEV_RESET:
        mouse_defaults(k);
        k->mouse_id = ID_MOUSE;
        answer_mouse(k, ANSWER_TEST_PASSED);
        answer_mouse(k, ID_MOUSE);
        break;
    }
}

/* Returns true when the guest pulled the reset line. */
static bool write_output_port(struct i8042 *k, u8 value)
{
    k->output_port = value & (OUT_RUN | OUT_A20);
    a20_gate_set(k->a20, A20_KEYBOARD, value & OUT_A20);
    return !(value & OUT_RUN);
}

static u8 read_output_port(const struct i8042 *k)
{
    u8 value = k->output_port | OUT_LINES;

    if (k->status & STATUS_OBF)
        value |= k->status & STATUS_AUX ? OUT_MOUSE_IRQ : OUT_KEYBOARD_IRQ;
    return value;
}

static void write_ram(struct i8042 *k, u8 index, u8 value)
{
    k->ram[index] = value;
    if (index == 0)
        k->status = (k->status & ~STATUS_SYS) | (value & MODE_SYS ? STATUS_SYS : 0);
}

/* A controller's answer takes the place of answers that the guest never fetched. */
static void answer(struct i8042 *k, u8 value)
{
    queue_clear(&k->answers);
    queue_push(&k->answers, value);
}

/* A command to port 0x64; true when it resets the machine. */
static bool write_command(struct i8042 *k, u8 value)
{
    k->status |= STATUS_COMMAND;
    k->command = 0;
    if (value >= CMD_PULSE)
        return !(value & OUT_RUN);
    if (value >= CMD_READ_RAM && value < CMD_READ_RAM + RAM_SIZE) {
        answer(k, k->ram[value - CMD_READ_RAM]);
        return false;
    }
    if (value >= CMD_WRITE_RAM && value < CMD_WRITE_RAM + RAM_SIZE) {
        k->command = value;
        return false;
    }
    switch (value) {
    case CMD_TEST_PASSWORD:
        answer(k, 0xf1); /* none installed */
        break;
    case CMD_MOUSE_OFF:
        k->ram[0] |= MODE_MOUSE_OFF;
        break;
    case CMD_MOUSE_ON:
        k->ram[0] &= ~MODE_MOUSE_OFF;
        break;
    case CMD_MOUSE_TEST:
    case CMD_KEYBOARD_TEST:
    case CMD_READ_TEST:
        answer(k, 0x00);
        break;
    case CMD_SELF_TEST:
        write_ram(k, 0, k->ram[0] | MODE_SYS);
        answer(k, 0x55);
        break;
    case CMD_KEYBOARD_OFF:
        k->ram[0] |= MODE_KEYBOARD_OFF;
        break;
    case CMD_KEYBOARD_ON:
        k->ram[0] &= ~MODE_KEYBOARD_OFF;
        break;
    case CMD_READ_INPUT:
        answer(k, 0x80); /* the key lock is open */
        break;
    case CMD_READ_OUTPUT:
        answer(k, read_output_port(k));
        break;
    case CMD_A20_OFF:
        return write_output_port(k, k->output_port & ~OUT_A20);
    case CMD_A20_ON:
        return write_output_port(k, k->output_port | OUT_A20);
    case CMD_WRITE_OUTPUT:
    case CMD_ECHO_KEYBOARD:
    case CMD_ECHO_MOUSE:
    case CMD_TO_MOUSE:
        k->command = value;
        break;
    }
    return false;
}

/* A byte to port 0x60; true when it resets the machine. */
static bool write_data(struct i8042 *k, u8 value)
{
    u8 command = k->command;

    k->status &= ~STATUS_COMMAND;
    k->command = 0;
    switch (command) {
    case 0:
        /* Talking to the keyboard turns its interface on. */
        k->ram[0] &= ~MODE_KEYBOARD_OFF;
        write_keyboard(k, value);
        return false;
    case CMD_WRITE_OUTPUT:
        return write_output_port(k, value);
    case CMD_ECHO_KEYBOARD:
    case CMD_ECHO_MOUSE:
        /* As if the device had sent it just now: in front of what waits. */
        k->status &= ~STATUS_AUX;
        fill_output(k, value, command == CMD_ECHO_MOUSE);
        irq_line_lower(command == CMD_ECHO_MOUSE ? &k->mouse_irq : &k->keyboard_irq);
        return false;
    case CMD_TO_MOUSE:
        k->ram[0] &= ~MODE_MOUSE_OFF;
        write_mouse(k, value);
        return false;
    default:
        write_ram(k, command & (RAM_SIZE - 1), value);
        return false;
    }
}

static u64 data_read(void *opaque, u64 offset, unsigned size)
{
    struct i8042 *k = opaque;

    device_lock(&k->dev);
    u8 value = k->output;
    k->status &= ~(STATUS_OBF | STATUS_AUX);
    update_irqs(k);
    advance(k);
    device_unlock(&k->dev);
    return value;
}

static u64 status_read(void *opaque, u64 offset, unsigned size)
{
    struct i8042 *k = opaque;

    device_lock(&k->dev);
    u8 value = k->status;
    device_unlock(&k->dev);
    return value;
}

static void guest_write(struct i8042 *k, bool (*write)(struct i8042 *k, u8 value), u8 value)
{
    device_lock(&k->dev);
    bool reset = write(k, value);
    advance(k);
    device_unlock(&k->dev);
    if (reset && k->power.request)
        k->power.request(k->power.sink, POWER_RESET, 0);
}

static void data_write(void *opaque, u64 offset, u64 value, unsigned size)
{
    guest_write(opaque, write_data, (u8)value);
}

static void command_write(void *opaque, u64 offset, u64 value, unsigned size)
{
    guest_write(opaque, write_command, (u8)value);
}

/* The bytes that the keyboard sends for a key in its scan set; returns how many. */
static unsigned key_sequence(const struct i8042 *k, u16 key, bool down, u8 out[KEY_SEQUENCE_MAX])
{
    static const u8 pause1[] = {0xe1, 0x1d, 0x45, 0xe1, 0x9d, 0xc5};
    static const u8 pause2[] = {0xe1, 0x14, 0x77, 0xe1, 0xf0, 0x14, 0xf0, 0x77};
    u8 code = (u8)key;
    unsigned n = 0;

    if (key & I8042_KEY_PAUSE) {
        const u8 *from = k->scan_set == 1 ? pause1 : pause2;
        unsigned len = k->scan_set == 1 ? sizeof(pause1) : sizeof(pause2);
        for (; down && n < len; n++)
            out[n] = from[n];
        return n;
    }
    if (key & I8042_KEY_E0)
        out[n++] = EXTENDED_PREFIX;
    if (k->scan_set == 1) {
        out[n++] = to_set1(code) | (down ? 0 : 0x80);
    } else {
        if (!down)
            out[n++] = BREAK_PREFIX;
        out[n++] = code;
    }
    return n;
}

void i8042_key(struct i8042 *k, u16 key, bool down)
{
    u8 bytes[KEY_SEQUENCE_MAX];

    device_lock(&k->dev);
    unsigned n = key_sequence(k, key, down, bytes);
    if (!k->scanning || k->stopped) {
        n = 0;
    } else if (n && k->keyboard.count + n > KEYBOARD_BUFFER) {
        /* There is one more place, for the overrun code. */
        n = k->keyboard.count <= KEYBOARD_BUFFER;
        bytes[0] = k->scan_set == 1 ? OVERRUN_SET1 : OVERRUN_SET2;
    }
    for (unsigned i = 0; i < n; i++)
        queue_push(&k->keyboard, bytes[i]);
    if (n)
        advance(k);
    device_unlock(&k->dev);
}

bool i8042_has_room(struct i8042 *k)
{
    bool room;

    device_lock(&k->dev);
    room = k->keyboard.count + KEY_SEQUENCE_MAX <= KEYBOARD_BUFFER;
    device_unlock(&k->dev);
    return room;
}

void i8042_mouse(struct i8042 *k, int dx, int dy, int dz, u8 buttons)
{
    device_lock(&k->dev);
    if (!k->stopped) {
        k->dx = add_motion(k->dx, dx);
        k->dy = add_motion(k->dy, dy);
        k->dz = add_motion(k->dz, dz);
        k->buttons = buttons & 7;
        advance(k);
    }
    device_unlock(&k->dev);
}

static int i8042_loaded(void *obj, struct error *err)
{
    struct i8042 *k = obj;
    const struct queue *queues[] = {&k->answers, &k->keyboard, &k->mouse};

    for (unsigned i = 0; i < ARRAY_SIZE(queues); i++) {
        if (queues[i]->head >= QUEUE_SIZE || queues[i]->count > QUEUE_SIZE)
            return error_input(err, "i8042: impossible queue");
    }
    /* A command in waiting indexes the RAM. */
    if (k->command && k->command != CMD_WRITE_OUTPUT && k->command != CMD_ECHO_KEYBOARD &&
        k->command != CMD_ECHO_MOUSE && k->command != CMD_TO_MOUSE &&
        (k->command < CMD_WRITE_RAM || k->command >= CMD_WRITE_RAM + RAM_SIZE))
        return error_input(err, "i8042: impossible command 0x%x", k->command);
    /* Within its bounds the movement can't overflow. */
    k->dx = add_motion(k->dx, 0);
    k->dy = add_motion(k->dy, 0);
    k->dz = add_motion(k->dz, 0);
    a20_gate_set(k->a20, A20_KEYBOARD, k->output_port & OUT_A20);
    update_irqs(k);
    return 0;
}

static const struct state_field queue_fields[] = {
    STATE_FIELD(struct queue, data),
    STATE_FIELD(struct queue, head),
    STATE_FIELD(struct queue, count),
};

static const struct state_desc queue_state = STATE_DESC("queue", 1, struct queue, queue_fields);

static const struct state_field i8042_fields[] = {
    STATE_HOST(struct i8042, dev),
    STATE_FIELD(struct i8042, ram),
    STATE_FIELD(struct i8042, output_port),
    STATE_FIELD(struct i8042, command),
    STATE_FIELD(struct i8042, status),
    STATE_FIELD(struct i8042, output),
    STATE_FIELD(struct i8042, translate_break),
    STATE_STRUCTS(struct i8042, answers, &queue_state),
    STATE_STRUCTS(struct i8042, keyboard, &queue_state),
    STATE_FIELD(struct i8042, keyboard_command),
    STATE_FIELD(struct i8042, keyboard_last),
    STATE_FIELD(struct i8042, scan_set),
    STATE_FIELD(struct i8042, leds),
    STATE_FIELD(struct i8042, typematic),
    STATE_FIELD(struct i8042, scanning),
    STATE_STRUCTS(struct i8042, mouse, &queue_state),
    STATE_FIELD(struct i8042, mouse_command),
    STATE_FIELD(struct i8042, mouse_last),
    STATE_FIELD(struct i8042, mouse_id),
    STATE_FIELD(struct i8042, mouse_rate),
    STATE_FIELD(struct i8042, mouse_resolution),
    STATE_FIELD(struct i8042, rate_history),
    STATE_FIELD(struct i8042, buttons),
    STATE_FIELD(struct i8042, buttons_sent),
    STATE_FIELD(struct i8042, mouse_enabled),
    STATE_FIELD(struct i8042, mouse_remote),
    STATE_FIELD(struct i8042, mouse_wrap),
    STATE_FIELD(struct i8042, mouse_scale_2),
    STATE_FIELD(struct i8042, dx),
    STATE_FIELD(struct i8042, dy),
    STATE_FIELD(struct i8042, dz),
    STATE_HOST(struct i8042, stopped),
    STATE_HOST(struct i8042, env),
    STATE_HOST(struct i8042, keyboard_irq),
    STATE_HOST(struct i8042, mouse_irq),
    STATE_HOST(struct i8042, a20),
    STATE_HOST(struct i8042, power),
    STATE_HOST(struct i8042, data_range),
    STATE_HOST(struct i8042, command_range),
};

static const struct state_desc i8042_state = {
    .name = "i8042",
    .version = 1,
    .struct_size = sizeof(struct i8042),
    .fields = i8042_fields,
    .nfields = ARRAY_SIZE(i8042_fields),
    .loaded = i8042_loaded,
};

/* As firmware leaves it: tested, both interfaces on, translating, A20 on. */
static void i8042_reset(struct device *dev)
{
    struct i8042 *k = container_of(dev, struct i8042, dev);

    device_lock(dev);
    for (unsigned i = 0; i < RAM_SIZE; i++)
        k->ram[i] = 0;
    k->ram[0] = MODE_KEYBOARD_IRQ | MODE_MOUSE_IRQ | MODE_SYS | MODE_TRANSLATE;
    k->status = STATUS_SYS | STATUS_UNLOCKED;
    k->command = 0;
    k->output = 0;
    k->translate_break = false;
    write_output_port(k, OUT_RUN | OUT_A20);
    queue_clear(&k->answers);
    queue_clear(&k->keyboard);
    queue_clear(&k->mouse);
    keyboard_defaults(k);
    k->keyboard_last = 0;
    k->leds = 0;
    k->scanning = true;
    mouse_defaults(k);
    k->mouse_last = 0;
    k->mouse_id = ID_MOUSE;
    k->buttons = k->buttons_sent = 0;
    update_irqs(k);
    device_unlock(dev);
}

static void set_stopped(struct device *dev, bool stopped)
{
    struct i8042 *k = container_of(dev, struct i8042, dev);

    device_lock(dev);
    k->stopped = stopped;
    device_unlock(dev);
}

static void i8042_start(struct device *dev)
{
    set_stopped(dev, false);
}

static void i8042_stop(struct device *dev)
{
    set_stopped(dev, true);
}

static void i8042_destroy(struct device *dev)
{
    struct i8042 *k = container_of(dev, struct i8042, dev);

    io_bus_remove(k->env.ports, &k->command_range);
    io_bus_remove(k->env.ports, &k->data_range);
    pthread_mutex_destroy(&dev->lock);
    free(k);
}

static const struct device_ops i8042_ops = {
    .reset = i8042_reset,
    .destroy = i8042_destroy,
    .start = i8042_start,
    .stop = i8042_stop,
};

static const struct io_ops data_ops = {
    .read = data_read,
    .write = data_write,
    .max_size = 1,
};

static const struct io_ops command_ops = {
    .read = status_read,
    .write = command_write,
    .max_size = 1,
};

struct i8042 *i8042_create(const struct device_env *env, const struct i8042_config *cfg,
                           struct error *err)
{
    struct i8042 *k = calloc(1, sizeof(*k));

    if (!k) {
        error_host(err, ENOMEM, "keyboard controller");
        return NULL;
    }
    device_init(&k->dev, "i8042", &i8042_ops, &i8042_state);
    k->env = *env;
    k->keyboard_irq = cfg->keyboard_irq;
    k->mouse_irq = cfg->mouse_irq;
    k->a20 = cfg->a20;
    k->power = cfg->power;
    k->data_range = (struct io_range){
        .name = "i8042 data",
        .base = PORT_I8042_DATA,
        .size = 1,
        .ops = &data_ops,
        .opaque = k,
    };
    k->command_range = (struct io_range){
        .name = "i8042 command",
        .base = PORT_I8042_COMMAND,
        .size = 1,
        .ops = &command_ops,
        .opaque = k,
    };
    if (io_bus_add(env->ports, &k->data_range, err) < 0)
        goto out_free;
    if (io_bus_add(env->ports, &k->command_range, err) < 0)
        goto out_remove;
    i8042_reset(&k->dev);
    return k;

out_remove:
    io_bus_remove(env->ports, &k->data_range);
out_free:
    pthread_mutex_destroy(&k->dev.lock);
    free(k);
    return NULL;
}

struct device *i8042_device(struct i8042 *k)
{
    return &k->dev;
}
