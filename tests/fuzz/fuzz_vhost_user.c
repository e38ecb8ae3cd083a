/*
 * Bytes as a vhost-user backend: what it answers when it is asked who it is, and what it writes into the rings that it
 * shares with us. The sanitizers are the judges; and each chain must come back once, however mad the backend.
 */
#include "device/virtio/vhost_ring.h"
#include "fuzz_device.h"

#include <pthread.h>
#include <stdio.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#define CONFIG_SIZE 60

struct peer {
    int listener;
    struct input *in;
};

/* Says all that it has to say, and listens until nobody speaks. */
static void *speak(void *opaque)
{
    struct peer *p = opaque;
    int fd = accept(p->listener, NULL, NULL);
    char heard[256];

    if (fd < 0)
        return NULL;
    if (send(fd, p->in->data, p->in->left, MSG_NOSIGNAL) >= 0 && shutdown(fd, SHUT_WR) == 0) {
        while (recv(fd, heard, sizeof(heard), 0) > 0)
            ;
    }
    close(fd);
    return NULL;
}

static void greet(struct input *in)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    struct peer p = {socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0), in};
    struct vhost_link l = {.path = address.sun_path};
    struct error err;
    pthread_t thread;

    snprintf(address.sun_path, sizeof(address.sun_path), "/tmp/fuzz-vhost.%d", (int)getpid());
    unlink(address.sun_path);
    if (bind(p.listener, (struct sockaddr *)&address, sizeof(address)) < 0 ||
        listen(p.listener, 1) < 0 || pthread_create(&thread, NULL, speak, &p) != 0)
        abort();
    if (vhost_connect(&l, CONFIG_SIZE, &err) == 0) {
        if (l.config_size != CONFIG_SIZE)
            __builtin_trap();
        vhost_stop_ring(&l, 0);
    }
    vhost_disconnect(&l);
    pthread_join(thread, NULL);
    close(p.listener);
    unlink(address.sun_path);
}

/* ---- rings ---- */

struct counts {
    unsigned out, back;
};

static void give_back(struct virtq_chain *chain, struct counts *n)
{
    n->back++;
    free(chain);
}

static void push(struct vhost_shadow *s, struct input *in, struct counts *n)
{
    struct virtq_chain *chain = calloc(1, sizeof(*chain));

    chain->nread = 1 + (unsigned)take(in, 1) % 8;
    chain->nwrite = (unsigned)take(in, 1) % (VIRTQ_SEGMENTS_MAX - 8);
    for (unsigned i = 0; i < chain->nread + chain->nwrite; i++)
        chain->segments[i].len = 16;
    chain->write_len = 16 * chain->nwrite;
    if (!vhost_shadow_is_too_long(s, chain) && vhost_shadow_push(s, chain))
        n->out++;
    else
        free(chain);
}

static void scribble(struct vhost_shadow *s, struct input *in)
{
    struct vhost_ring r;
    gpa_t part;

    vhost_shadow_describe(s, &r);
    part = (take(in, 1) & 7) ? r.device : take(in, 1) & 1 ? r.driver : r.desc;
    for (unsigned i = take(in, 1) % 16, at = (unsigned)take(in, 2) % 2048; i; i--, at++)
        s->host[part - s->gpa + at] = (u8)take(in, 1);
}

static void answer(struct vhost_shadow *s, struct input *in)
{
    struct vhost_ring r;
    u16 *used;

    vhost_shadow_describe(s, &r);
    used = (u16 *)(s->host + (r.device - s->gpa));
    used[2 + 4 * (used[1] % VHOST_RING_SIZE)] = (u16)take(in, 1);
    used[3 + 4 * (used[1] % VHOST_RING_SIZE)] = 0;
    used[1]++;
}

static void rings(struct input *in)
{
    static u8 memory[VHOST_RING_BYTES] __attribute__((aligned(4096)));
    static struct vhost_shadow s;
    struct virtq_chain *chain;
    struct counts n = {0};
    bool last;
    u32 written;

    memset(memory, 0, sizeof(memory));
    s = (struct vhost_shadow){.host = memory, .gpa = BIT(52)};
    vhost_shadow_reset(&s, take(in, 1) & 1);
    while (in->left) {
        switch (take(in, 1) % 4) {
        case 0:
            push(&s, in, &n);
            break;
        case 1:
            scribble(&s, in);
            break;
        case 2:
            answer(&s, in);
            break;
        case 3:
            for (unsigned i = 0; i < 2 * VHOST_RING_SIZE; i++) {
                if (vhost_shadow_take(&s, &chain, &written) != 1)
                    break;
                if (written > chain->write_len)
                    __builtin_trap();
                give_back(chain, &n);
            }
            break;
        }
    }
    while ((chain = vhost_shadow_take_back(&s, &last)))
        give_back(chain, &n);
    if (n.out != n.back || s.nfree != VHOST_RING_SIZE)
        __builtin_trap();
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct input in = {data, size};

    if (take(&in, 1) % 4)
        rings(&in);
    else
        greet(&in);
    return 0;
}
