/*
 * Keys and pointer of VNC clients, for the guest's PS/2 keyboard and mouse. One for all clients: they share these as they
 * share the screen. Used by one thread.
 */
#ifndef DOPPEL_CONTROL_VNC_INPUT_H
#define DOPPEL_CONTROL_VNC_INPUT_H

#include "host/types.h"

#define VNC_INPUT_EVENTS 256
#define VNC_INPUT_CODES 0x201 /* those that i8042_key takes */

struct i8042;

/* Zeroed but for `keyboard`. */
struct vnc_input {
    struct i8042 *keyboard;
    struct {
        u16 code;
        bool down;
    } events[VNC_INPUT_EVENTS]; /* a ring: what the keyboard has no room for yet */
    unsigned head, count;
    bool held[VNC_INPUT_CODES]; /* as of the last event in the ring */
    unsigned nheld;
    bool caps_lock;
    bool have_position;
    int x, y;
    u8 buttons; /* as RFB has them */
};

/* A client's KeyEvent and PointerEvent (RFC 6143, 7.5.4 and 7.5.5). What is too much is dropped, never a release. */
void vnc_input_key(struct vnc_input *in, u32 keysym, bool down);
void vnc_input_pointer(struct vnc_input *in, int x, int y, u8 buttons);
/* Lets go of all keys and buttons: a client that held them has gone. */
void vnc_input_release(struct vnc_input *in);
/* Hands on what the keyboard has room for. */
void vnc_input_flush(struct vnc_input *in);

#endif
