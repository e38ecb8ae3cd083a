/*
 * The network of a card whose backend is another process: what the user chose for the card. Packets never come here
 * (device/virtio/vhost_user.h).
 */
#include "net/backend.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

struct vhost_user_net {
    struct net_backend b;
    char *path;
};

static void vhost_user_close(struct net_backend *b)
{
    struct vhost_user_net *v = container_of(b, struct vhost_user_net, b);

    net_backend_fini(b);
    free(v->path);
    free(v);
}

static const struct net_backend_ops vhost_user_ops = {.close = vhost_user_close};

const char *net_vhost_user_path(const struct net_backend *b)
{
    return b->ops == &vhost_user_ops ? container_of(b, struct vhost_user_net, b)->path : NULL;
}

struct net_backend *net_vhost_user_open(const struct net_options *o, struct event_loop *loop,
                                        struct error *err)
{
    struct vhost_user_net *v;

    if (!o->argument || !*o->argument) {
        error_input(err, "give the path of the backend's socket: vhost-user=PATH");
        return NULL;
    }
    if (o->pcap || o->have_mtu) {
        error_input(err, "%s is not for a card of another process: give mac or nothing",
                    o->pcap ? "pcap" : "mtu");
        return NULL;
    }
    v = calloc(1, sizeof(*v));
    if (v)
        v->path = strdup(o->argument);
    if (!v || !v->path) {
        free(v);
        error_host(err, ENOMEM, "vhost-user=%s", o->argument);
        return NULL;
    }
    net_backend_init(&v->b, &vhost_user_ops, loop);
    return &v->b;
}
