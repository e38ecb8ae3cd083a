/*
 * Unix stream sockets by their path: nonblocking, closed on exec.
 */
#ifndef DOPPEL_HOST_UNIX_SOCKET_H
#define DOPPEL_HOST_UNIX_SOCKET_H

#include "host/error.h"

/* Each returns a descriptor, or -errno with err set. */

/* A stale socket, at which nobody listens any more, is replaced. */
int unix_socket_listen(const char *path, int backlog, struct error *err);
/* -ENOENT or -ECONNREFUSED: nobody listens there. -EAGAIN: too many wait there already. */
int unix_socket_connect(const char *path, struct error *err);

#endif
