/*
 * Which key of a US keyboard is meant by what a VNC client sends.
 */
#ifndef DOPPEL_CONTROL_VNC_KEYS_H
#define DOPPEL_CONTROL_VNC_KEYS_H

#include "host/types.h"

#define VNC_KEY_LEFT_SHIFT 0x12
#define VNC_KEY_RIGHT_SHIFT 0x59
#define VNC_KEY_CAPS_LOCK 0x58

struct vnc_key {
    u16 code;    /* as i8042_key takes it */
    bool shift;  /* the symbol is the key's with Shift */
    bool letter; /* so it is with Caps Lock */
};

/* The key of an X keysym (RFC 6143, 7.5.4). False: such a keyboard has none. */
bool vnc_key_find(u32 keysym, struct vnc_key *key);

#endif
