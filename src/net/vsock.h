/*
 * The host's side of vsock: streams between ports of the guest and Unix sockets. VIRTIO 1.2, 5.10.6
 * has the packets.
 *
 * A program on the host that wants port P of the guest connects to the socket at `path` and says
 * "CONNECT P\n"; when the guest accepts it reads "OK <port of the host's side>\n", and then the
 * stream is the guest's. Where the guest refuses, the connection is closed. A guest that connects
 * to port P of the host (CID 2) reaches the socket at `path` + "_P". It is the protocol that
 * Firecracker's users know.
 *
 * On the event loop's thread. The device may hold its lock when it calls; `ready` is never called
 * from within.
 */
#ifndef DOPPEL_NET_VSOCK_H
#define DOPPEL_NET_VSOCK_H

#include "host/error.h"
#include "host/event_loop.h"
#include "host/types.h"

struct vsock;

#define VSOCK_CID_HOST 2
#define VSOCK_CID_MIN 3
#define VSOCK_CID_MAX 0xfffffffeU

struct vsock_header { /* 5.10.6 */
    u64 src_cid, dst_cid;
    u32 src_port, dst_port;
    u32 len;
    u16 type, op;
    u32 flags;
    u32 buf_alloc, fwd_cnt;
} __attribute__((packed));
#define VSOCK_PAYLOAD_MAX 65536

/* `cid=N,path=SOCKET`. NULL with err set. */
struct vsock *vsock_open(const char *spec, struct event_loop *loop, struct error *err);
/* NULL is fine. */
void vsock_close(struct vsock *v);
u32 vsock_cid(const struct vsock *v);

/* `ready`: there may be packets for the guest. NULL detaches. */
void vsock_attach(struct vsock *v, void (*ready)(void *opaque), void *opaque);
/* A packet of the guest's with its payload, of h->len bytes up to VSOCK_PAYLOAD_MAX. */
void vsock_from_guest(struct vsock *v, const struct vsock_header *h, const u8 *payload);
/* The next packet for the guest, with at most `room` bytes of payload. False: there is none. */
bool vsock_to_guest(struct vsock *v, struct vsock_header *h, u8 *payload, size_t room);
/* The guest forgot all connections. */
void vsock_reset(struct vsock *v);

#endif
