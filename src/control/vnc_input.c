#include "control/vnc_input.h"

#include "control/vnc_keys.h"
#include "device/i8042.h"

enum { RFB_LEFT = 1, RFB_MIDDLE = 2, RFB_RIGHT = 4, RFB_WHEEL_UP = 8, RFB_WHEEL_DOWN = 16 };

static void push(struct vnc_input *in, u16 code, bool down)
{
    unsigned at = (in->head + in->count++) % VNC_INPUT_EVENTS;

    in->events[at].code = code;
    in->events[at].down = down;
    if (in->held[code] == down)
        return;
    in->held[code] = down;
    in->nheld = down ? in->nheld + 1 : in->nheld - 1;
}

/* Each key that is held has a place kept for its release. */
static bool has_room(const struct vnc_input *in, unsigned events)
{
    return in->count + in->nheld + events <= VNC_INPUT_EVENTS;
}

/*
 * A program that types may send 'A' with no Shift before it, and so does a client whose own Caps Lock is on. In the
 * second case, if the guest knows of it, the key alone is an 'A' already.
 */
static bool wants_shift(const struct vnc_input *in, const struct vnc_key *key)
{
    return key->shift && !in->held[VNC_KEY_LEFT_SHIFT] && !in->held[VNC_KEY_RIGHT_SHIFT] &&
           !(key->letter && in->caps_lock);
}

void vnc_input_key(struct vnc_input *in, u32 keysym, bool down)
{
    struct vnc_key key;

    if (!vnc_key_find(keysym, &key))
        return;
    if (!down) {
        if (in->held[key.code])
            push(in, key.code, false);
        return;
    }
    if (!has_room(in, 4)) /* with Shift before and after it, and its own release */
        return;
    if (key.code == VNC_KEY_CAPS_LOCK && !in->held[key.code])
        in->caps_lock = !in->caps_lock;
    if (wants_shift(in, &key)) {
        push(in, VNC_KEY_LEFT_SHIFT, true);
        push(in, key.code, true);
        push(in, VNC_KEY_LEFT_SHIFT, false);
    } else {
        push(in, key.code, true);
    }
}

static u8 ps2_buttons(u8 rfb)
{
    return (rfb & RFB_LEFT ? I8042_BUTTON_LEFT : 0) | (rfb & RFB_MIDDLE ? I8042_BUTTON_MIDDLE : 0) |
           (rfb & RFB_RIGHT ? I8042_BUTTON_RIGHT : 0);
}

/* RFB tells positions, a PS/2 mouse movements; the wheel turns by a notch when its "button" goes down. */
void vnc_input_pointer(struct vnc_input *in, int x, int y, u8 buttons)
{
    u8 pressed = buttons & ~in->buttons;
    int dz = !!(pressed & RFB_WHEEL_DOWN) - !!(pressed & RFB_WHEEL_UP);
    int dx = in->have_position ? x - in->x : 0, dy = in->have_position ? in->y - y : 0;

    in->x = x;
    in->y = y;
    in->have_position = true;
    in->buttons = buttons;
    i8042_mouse(in->keyboard, dx, dy, dz, ps2_buttons(buttons));
}

void vnc_input_release(struct vnc_input *in)
{
    for (unsigned code = 0; code < VNC_INPUT_CODES; code++) {
        if (in->held[code])
            push(in, (u16)code, false);
    }
    if (in->buttons)
        vnc_input_pointer(in, in->x, in->y, 0);
}

void vnc_input_flush(struct vnc_input *in)
{
    while (in->count && i8042_has_room(in->keyboard)) {
        i8042_key(in->keyboard, in->events[in->head].code, in->events[in->head].down);
        in->head = (in->head + 1) % VNC_INPUT_EVENTS;
        in->count--;
    }
}
