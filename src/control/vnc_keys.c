/*
 * Codes are those of scan set 2 (IBM PS/2 Hardware Interface Technical Reference, "Keyboards"); keysyms those of X11's
 * keysymdef.h, where a printable character of Latin 1 stands for itself.
 */
#include "control/vnc_keys.h"

#include "device/i8042.h"

#include <rfb/keysym.h>

#define E0(code) (I8042_KEY_E0 | (code))
#define SHIFT 0x80 /* no key of a character has a code from 0x80 on */

/* From ' ' to '~'. */
static const u8 characters[] = {
    0x29,         0x16 | SHIFT, 0x52 | SHIFT, 0x26 | SHIFT, /*   ! " # */
    0x25 | SHIFT, 0x2e | SHIFT, 0x3d | SHIFT, 0x52,         /* $ % & ' */
    0x46 | SHIFT, 0x45 | SHIFT, 0x3e | SHIFT, 0x55 | SHIFT, /* ( ) * + */
    0x41,         0x4e,         0x49,         0x4a,         /* , - . / */
    0x45,         0x16,         0x1e,         0x26,         /* 0 1 2 3 */
    0x25,         0x2e,         0x36,         0x3d,         /* 4 5 6 7 */
    0x3e,         0x46,         0x4c | SHIFT, 0x4c,         /* 8 9 : ; */
    0x41 | SHIFT, 0x55,         0x49 | SHIFT, 0x4a | SHIFT, /* < = > ? */
    0x1e | SHIFT, 0x1c | SHIFT, 0x32 | SHIFT, 0x21 | SHIFT, /* @ A B C */
    0x23 | SHIFT, 0x24 | SHIFT, 0x2b | SHIFT, 0x34 | SHIFT, /* D E F G */
    0x33 | SHIFT, 0x43 | SHIFT, 0x3b | SHIFT, 0x42 | SHIFT, /* H I J K */
    0x4b | SHIFT, 0x3a | SHIFT, 0x31 | SHIFT, 0x44 | SHIFT, /* L M N O */
    0x4d | SHIFT, 0x15 | SHIFT, 0x2d | SHIFT, 0x1b | SHIFT, /* P Q R S */
    0x2c | SHIFT, 0x3c | SHIFT, 0x2a | SHIFT, 0x1d | SHIFT, /* T U V W */
    0x22 | SHIFT, 0x35 | SHIFT, 0x1a | SHIFT, 0x54,         /* X Y Z [ */
    0x5d,         0x5b,         0x36 | SHIFT, 0x4e | SHIFT, /* \ ] ^ _ */
    0x0e,         0x1c,         0x32,         0x21,         /* ` a b c */
    0x23,         0x24,         0x2b,         0x34,         /* d e f g */
    0x33,         0x43,         0x3b,         0x42,         /* h i j k */
    0x4b,         0x3a,         0x31,         0x44,         /* l m n o */
    0x4d,         0x15,         0x2d,         0x1b,         /* p q r s */
    0x2c,         0x3c,         0x2a,         0x1d,         /* t u v w */
    0x22,         0x35,         0x1a,         0x54 | SHIFT, /* x y z { */
    0x5d | SHIFT, 0x5b | SHIFT, 0x0e | SHIFT,               /* | } ~ */
};

static const struct {
    u16 keysym, code;
} others[] = {
    {XK_BackSpace, 0x66},
    {XK_Tab, 0x0d},
    {XK_ISO_Left_Tab, 0x0d},
    {XK_Return, 0x5a},
    {XK_Pause, I8042_KEY_PAUSE},
    {XK_Break, I8042_KEY_PAUSE},
    {XK_Scroll_Lock, 0x7e},
    {XK_Sys_Req, E0(0x7c)},
    {XK_Print, E0(0x7c)},
    {XK_Escape, 0x76},
    {XK_Home, E0(0x6c)},
    {XK_Left, E0(0x6b)},
    {XK_Up, E0(0x75)},
    {XK_Right, E0(0x74)},
    {XK_Down, E0(0x72)},
    {XK_Page_Up, E0(0x7d)},
    {XK_Page_Down, E0(0x7a)},
    {XK_End, E0(0x69)},
    {XK_Insert, E0(0x70)},
    {XK_Delete, E0(0x71)},
    {XK_Menu, E0(0x2f)},
    {XK_Num_Lock, 0x77},
    {XK_KP_Enter, E0(0x5a)},
    {XK_KP_Home, 0x6c},
    {XK_KP_Left, 0x6b},
    {XK_KP_Up, 0x75},
    {XK_KP_Right, 0x74},
    {XK_KP_Down, 0x72},
    {XK_KP_Page_Up, 0x7d},
    {XK_KP_Page_Down, 0x7a},
    {XK_KP_End, 0x69},
    {XK_KP_Begin, 0x73},
    {XK_KP_Insert, 0x70},
    {XK_KP_Delete, 0x71},
    {XK_KP_Multiply, 0x7c},
    {XK_KP_Add, 0x79},
    {XK_KP_Subtract, 0x7b},
    {XK_KP_Decimal, 0x71},
    {XK_KP_Divide, E0(0x4a)},
    {XK_KP_0, 0x70},
    {XK_KP_1, 0x69},
    {XK_KP_2, 0x72},
    {XK_KP_3, 0x7a},
    {XK_KP_4, 0x6b},
    {XK_KP_5, 0x73},
    {XK_KP_6, 0x74},
    {XK_KP_7, 0x6c},
    {XK_KP_8, 0x75},
    {XK_KP_9, 0x7d},
    {XK_F1, 0x05},
    {XK_F2, 0x06},
    {XK_F3, 0x04},
    {XK_F4, 0x0c},
    {XK_F5, 0x03},
    {XK_F6, 0x0b},
    {XK_F7, 0x83},
    {XK_F8, 0x0a},
    {XK_F9, 0x01},
    {XK_F10, 0x09},
    {XK_F11, 0x78},
    {XK_F12, 0x07},
    {XK_Shift_L, VNC_KEY_LEFT_SHIFT},
    {XK_Shift_R, VNC_KEY_RIGHT_SHIFT},
    {XK_Control_L, 0x14},
    {XK_Control_R, E0(0x14)},
    {XK_Caps_Lock, VNC_KEY_CAPS_LOCK},
    {XK_Meta_L, 0x11},
    {XK_Meta_R, E0(0x11)},
    {XK_Alt_L, 0x11},
    {XK_Alt_R, E0(0x11)},
    {XK_Mode_switch, E0(0x11)},
    {XK_ISO_Level3_Shift, E0(0x11)},
    {XK_Super_L, E0(0x1f)},
    {XK_Super_R, E0(0x27)},
};

bool vnc_key_find(u32 keysym, struct vnc_key *key)
{
    if (keysym >= ' ' && keysym - ' ' < ARRAY_SIZE(characters)) {
        u8 c = characters[keysym - ' '], lower = (u8)keysym | 0x20;

        *key = (struct vnc_key){
            .code = c & ~SHIFT, .shift = c & SHIFT, .letter = lower >= 'a' && lower <= 'z'};
        return true;
    }
    for (size_t i = 0; i < ARRAY_SIZE(others); i++) {
        if (others[i].keysym == keysym) {
            *key = (struct vnc_key){.code = others[i].code};
            return true;
        }
    }
    return false;
}
