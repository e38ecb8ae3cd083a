/*
 * What the backends are written with. See net.h for threads and locks.
 */
#ifndef DOPPEL_NET_BACKEND_H
#define DOPPEL_NET_BACKEND_H

#include "net/net.h"

#define NET_FORWARDS_MAX 32

struct pcap;

/* `--net KIND[=ARGUMENT][,KEY=VALUE...]`, taken apart. Strings are the options' own. */
struct net_options {
    char *text;
    const char *kind, *argument; /* argument: NULL when there is none */
    const char *pcap;
    const char *forwards[NET_FORWARDS_MAX];
    unsigned nforwards;
    const char *tftp, *bootfile; /* NULL: none */
    bool have_mac, have_mtu, have_queues;
    u8 mac[NET_MAC_SIZE];
    u16 mtu;
    unsigned queues;
};

/* 0 or -EINVAL; net_options_free in any case. */
int net_options_parse(struct net_options *o, const char *spec, struct error *err);
void net_options_free(struct net_options *o);

struct net_backend_ops {
    /*
     * As net_send, for a packet of NET_HEADER_SIZE to NET_PACKET_MAX bytes. May call net_deliver.
     */
    int (*send)(struct net_backend *b, unsigned queue, const struct net_offload *o,
                const struct iovec *iov, unsigned n, size_t len);
    /* Optional: net_may_deliver is true again, after it was false. May call net_deliver. */
    void (*resume)(struct net_backend *b, unsigned queue);
    void (*set_offloads)(struct net_backend *b, u32 takes);    /* optional */
    void (*set_queues)(struct net_backend *b, unsigned pairs); /* optional */
    void (*close)(struct net_backend *b);                      /* frees what embeds it */
};

/* Packets that wait for room in the card. */
struct net_queue {
    struct net_waiting *first, **end;
    unsigned packets;
    size_t bytes;
    bool held;     /* the backend was told not to deliver */
    bool captured; /* the packet that waits to be sent is in the capture already */
};

struct net_backend {
    const struct net_backend_ops *ops;
    struct event_loop *loop;
    struct net_info info;
    struct net_card card; /* receive is NULL when there is none */
    struct pcap *pcap;
    bool in_card; /* within a call of the card's */
    struct net_queue queues[NET_QUEUES_MAX];
    struct host_timer flush;
};

/* The kinds. `o` is theirs to read until they return. NULL with err set. */
struct net_backend *net_user_open(const struct net_options *o, struct event_loop *loop,
                                  struct error *err);
struct net_backend *net_tap_open(const struct net_options *o, struct event_loop *loop,
                                 struct error *err);
struct net_backend *net_vhost_user_open(const struct net_options *o, struct event_loop *loop,
                                        struct error *err);
struct net_backend *net_socket_open(const struct net_options *o, struct event_loop *loop,
                                    struct error *err);

/* Sets up the common part in a zeroed struct. */
void net_backend_init(struct net_backend *b, const struct net_backend_ops *ops,
                      struct event_loop *loop);
/* Its end, for `close`. */
void net_backend_fini(struct net_backend *b);

/* A packet for the guest; lost when too many wait already. */
void net_deliver(struct net_backend *b, unsigned queue, const struct net_offload *o,
                 const u8 *packet, size_t len);
/* Whether the card takes packets. When not, stop reading them until ops->resume. */
bool net_may_deliver(struct net_backend *b, unsigned queue);
/* After ops->send returned -EAGAIN. Not from within send or resume. */
void net_sendable(struct net_backend *b, unsigned queue);
void net_link_changed(struct net_backend *b, bool up);

/* Copies iov, which may change meanwhile, into buf: bytes copied, up to `size`. */
size_t net_gather(const struct iovec *iov, unsigned n, u8 *buf, size_t size);

#endif
