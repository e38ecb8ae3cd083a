/*
 * The guest's screen, keyboard and mouse for VNC clients (RFC 6143), by libvncserver.
 */
#ifndef DOPPEL_CONTROL_VNC_H
#define DOPPEL_CONTROL_VNC_H

#include "host/error.h"

struct i8042;
struct vga;
struct vnc;

/*
 * Serves clients at `where`, HOST:PORT (tcp_socket_listen) or unix:PATH, from now on, on a thread of its own. Who connects
 * must know the password on the first line of `password_file`; NULL: none is asked for, which only an address that other
 * hosts don't reach may have. NULL with err set on failure. The devices must outlive it. The process ignores SIGPIPE.
 */
struct vnc *vnc_open(const char *where, const char *password_file, struct vga *vga,
                     struct i8042 *keyboard, struct error *err);
/* Breaks off all connections. NULL is fine. */
void vnc_close(struct vnc *vnc);

#endif
