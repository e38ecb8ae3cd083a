/*
 * TCP sockets by "HOST:PORT": nonblocking, closed on exec.
 */
#ifndef DOPPEL_HOST_TCP_SOCKET_H
#define DOPPEL_HOST_TCP_SOCKET_H

#include "host/error.h"
#include "host/types.h"

/*
 * Listens at HOST:PORT, [IPV6]:PORT or :PORT, which is 127.0.0.1. Returns a descriptor, or -errno with err set; *loopback
 * becomes whether only this host reaches it.
 */
int tcp_socket_listen(const char *where, int backlog, bool *loopback, struct error *err);

#endif
