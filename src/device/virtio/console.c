/*
 * Ports and their queues (5.3.2): port 0 has queues 0 (to the guest) and 1 (from it), the control queues are
 * 2 and 3, and port n from 1 on has 2n + 2 and 2n + 3. A driver without MULTIPORT sees port 0 alone.
 *
 * Control messages (5.3.6.2) to the guest wait in `events`, a ring of fixed length: a guest that gives no
 * buffers loses the oldest news, not the host's memory.
 *
 * From the guest: a chain that the stream doesn't take whole is kept, and its queue stands still, until there is
 * room. To the guest: one buffer is taken in advance, so that the stream can be told how much there is room for.
 */
#include "device/virtio/console.h"

#include "host/log.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define CONSOLE_F_MULTIPORT BIT(1)
#define CONSOLE_F_EMERG_WRITE BIT(2)

enum { QUEUE_CONTROL_RX = 2, QUEUE_CONTROL_TX = 3 };

enum console_event {
    DEVICE_READY = 0,
    DEVICE_ADD = 1,
    PORT_READY = 3,
    CONSOLE_PORT = 4,
    PORT_OPEN = 6,
    PORT_NAME = 7,
};

struct console_config { /* 5.3.4 */
    u16 cols, rows;
    u32 max_nr_ports;
    u32 emerg_wr;
};

struct console_control { /* 5.3.6.2 */
    u32 id;
    u16 event;
    u16 value;
};

#define EVENTS_MAX (4 * VIRTIO_CONSOLE_PORTS_MAX)

struct port {
    struct console_port config;
    struct virtq_chain *rx; /* taken in advance, empty so far */
    struct virtq_chain *tx; /* the stream has taken tx_done[] bytes of it */
};

struct virtio_console {
    struct virtio v;
    struct console_config config;
    struct port ports[VIRTIO_CONSOLE_PORTS_MAX];
    unsigned nports;
    u32 open; /* saved: the ports that the guest has opened */
    u64 tx_done[VIRTIO_CONSOLE_PORTS_MAX];
    u32 nevents;
    struct console_control events[EVENTS_MAX];
};

static struct virtio_console *console_of(struct virtio *v)
{
    return container_of(v, struct virtio_console, v);
}

static bool has_ports(const struct virtio_console *c)
{
    return virtio_has(&c->v, CONSOLE_F_MULTIPORT);
}

static unsigned rx_queue(unsigned port)
{
    return port ? 2 * port + 2 : 0;
}

static unsigned tx_queue(unsigned port)
{
    return rx_queue(port) + 1;
}

/* ---- control ---- */

static void send_events(struct virtio_console *c)
{
    struct virtq_chain *chain;
    unsigned sent = 0;

    while (sent < c->nevents && virtio_pop(&c->v, QUEUE_CONTROL_RX, &chain)) {
        const struct console_control *e = &c->events[sent++];
        const char *name = c->ports[e->id].config.name;
        size_t len = virtq_chain_write(chain, 0, e, sizeof(*e));

        if (e->event == PORT_NAME && name)
            len += virtq_chain_write(chain, sizeof(*e), name, strlen(name));
        virtio_complete(&c->v, QUEUE_CONTROL_RX, chain, (u32)len);
    }
    if (!sent)
        return;
    c->nevents -= sent;
    memmove(c->events, c->events + sent, c->nevents * sizeof(c->events[0]));
    virtio_signal(&c->v, QUEUE_CONTROL_RX);
}

static void tell(struct virtio_console *c, unsigned port, enum console_event event, u16 value)
{
    if (c->nevents == EVENTS_MAX) {
        c->nevents--;
        memmove(c->events, c->events + 1, c->nevents * sizeof(c->events[0]));
    }
    c->events[c->nevents++] = (struct console_control){port, event, value};
}

static void describe_port(struct virtio_console *c, unsigned port)
{
    if (c->ports[port].config.name)
        tell(c, port, PORT_NAME, 1);
    else
        tell(c, port, CONSOLE_PORT, 1);
    tell(c, port, PORT_OPEN, 1);
}

static void control(struct virtio_console *c, const struct console_control *m)
{
    if (m->event == DEVICE_READY) {
        for (unsigned i = 0; m->value && i < c->nports; i++)
            tell(c, i, DEVICE_ADD, 1);
        return;
    }
    if (m->id >= c->nports)
        return;
    if (m->event == PORT_READY && m->value)
        describe_port(c, m->id);
    if (m->event == PORT_OPEN) {
        c->open = m->value ? c->open | 1U << m->id : c->open & ~(1U << m->id);
        c->ports[m->id].config.accept_input(c->ports[m->id].config.opaque);
    }
}

static void serve_control(struct virtio *v, unsigned q, struct virtq_chain *chain)
{
    struct console_control m;

    if (virtq_chain_read(chain, 0, &m, sizeof(m)) == sizeof(m))
        control(console_of(v), &m);
    virtio_complete(v, q, chain, 0);
    virtio_signal(v, q);
    send_events(console_of(v));
}

/* ---- from the guest ---- */

/* As much of the port's kept chain as the stream takes; true when all of it is gone. */
static bool drain_tx(struct virtio_console *c, unsigned n)
{
    struct port *p = &c->ports[n];
    u8 buf[4096];

    while (p->tx && c->tx_done[n] < p->tx->read_len) {
        size_t len = virtq_chain_read(p->tx, c->tx_done[n], buf, sizeof(buf));
        size_t taken = p->config.put(p->config.opaque, buf, len);

        c->tx_done[n] += taken;
        if (taken < len)
            return false;
    }
    if (p->tx) {
        struct virtq_chain *chain = p->tx;

        p->tx = NULL;
        c->tx_done[n] = 0;
        virtio_complete(&c->v, tx_queue(n), chain, 0);
        virtio_signal(&c->v, tx_queue(n));
    }
    return true;
}

static void serve_tx(struct virtio_console *c, unsigned n)
{
    struct port *p = &c->ports[n];
    unsigned q = tx_queue(n);

    for (unsigned i = 0; i < VIRTQ_SIZE_MAX; i++) {
        if (!drain_tx(c, n))
            return; /* virtio_console_writable goes on */
        virtio_set_notify(&c->v, q, true);
        if (!virtio_pop(&c->v, q, &p->tx))
            return;
    }
    virtio_kick(&c->v, q);
}

void virtio_console_writable(struct virtio_console *c, unsigned port)
{
    device_lock(&c->v.pci.dev);
    serve_tx(c, port);
    device_unlock(&c->v.pci.dev);
}

/* ---- to the guest ---- */

size_t virtio_console_can_receive(struct virtio_console *c, unsigned port)
{
    struct port *p = &c->ports[port];
    size_t room;

    device_lock(&c->v.pci.dev);
    if (!p->rx && (!has_ports(c) || (c->open & 1U << port)))
        virtio_pop(&c->v, rx_queue(port), &p->rx);
    room = p->rx ? p->rx->write_len : 0;
    device_unlock(&c->v.pci.dev);
    return room;
}

size_t virtio_console_receive(struct virtio_console *c, unsigned port, const u8 *buf, size_t len)
{
    struct port *p = &c->ports[port];
    size_t taken = 0;

    device_lock(&c->v.pci.dev);
    if (p->rx) {
        struct virtq_chain *chain = p->rx;

        p->rx = NULL;
        taken = virtq_chain_write(chain, 0, buf, len);
        virtio_complete(&c->v, rx_queue(port), chain, (u32)taken);
        virtio_signal(&c->v, rx_queue(port));
    }
    p->config.accept_input(p->config.opaque);
    device_unlock(&c->v.pci.dev);
    return taken;
}

/* ---- the device ---- */

static void queue_ready(struct virtio *v, unsigned q)
{
    struct virtio_console *c = console_of(v);
    unsigned port = q < 2 ? 0 : (q - 2) / 2;

    virtio_set_notify(v, q, true);
    if (q == QUEUE_CONTROL_RX)
        send_events(c);
    else if (q == QUEUE_CONTROL_TX)
        virtio_serve(v, q, serve_control);
    else if (q % 2)
        serve_tx(c, port);
    else
        c->ports[port].config.accept_input(c->ports[port].config.opaque);
}

/* Chains that wait for the world: given back, the input's empty and the output's unsent. */
static void give_back(struct virtio *v)
{
    struct virtio_console *c = console_of(v);

    for (unsigned i = 0; i < c->nports; i++) {
        struct virtq_chain *rx = c->ports[i].rx, *tx = c->ports[i].tx;

        c->ports[i].rx = c->ports[i].tx = NULL;
        if (rx)
            virtio_complete(v, rx_queue(i), rx, 0);
        if (tx)
            virtio_complete(v, tx_queue(i), tx, 0);
    }
}

/* The same for a pause, after which they are taken again: nothing is lost. */
static void console_drain(struct virtio *v)
{
    struct virtio_console *c = console_of(v);

    device_lock(&v->pci.dev);
    for (unsigned i = 0; i < c->nports; i++) {
        struct virtq_chain *rx = c->ports[i].rx, *tx = c->ports[i].tx;

        c->ports[i].rx = c->ports[i].tx = NULL;
        if (rx)
            virtio_unpop(v, rx_queue(i), rx);
        if (tx)
            virtio_unpop(v, tx_queue(i), tx);
    }
    device_unlock(&v->pci.dev);
}

static void console_reset(struct virtio *v)
{
    console_of(v)->open = 0;
    console_of(v)->nevents = 0;
    memset(console_of(v)->tx_done, 0, sizeof(console_of(v)->tx_done));
}

/* The driver may write one character before anything is set up (5.3.5.1). */
static void config_written(struct virtio *v, unsigned offset, unsigned size)
{
    struct virtio_console *c = console_of(v);
    u8 byte = (u8)c->config.emerg_wr;

    if (offset == offsetof(struct console_config, emerg_wr))
        c->ports[0].config.put(c->ports[0].config.opaque, &byte, 1);
}

static void console_destroy(struct virtio *v)
{
    free(console_of(v));
}

static const struct virtio_ops console_ops = {
    .queue_ready = queue_ready,
    .config_written = config_written,
    .resetting = give_back,
    .reset = console_reset,
    .drain = console_drain,
    .destroy = console_destroy,
};

static int console_loaded(void *obj, struct error *err)
{
    struct virtio_console *c = obj;

    for (u32 i = 0; i < MIN(c->nevents, EVENTS_MAX); i++) {
        if (c->events[i].id >= c->nports)
            return error_input(err, "virtio-console: a saved event is of port %u", c->events[i].id);
    }
    if (c->nevents > EVENTS_MAX || c->open >> c->nports)
        return error_input(err, "virtio-console: the saved state is of another one");
    return 0;
}

static const struct state_field control_fields[] = {
    STATE_FIELD(struct console_control, id),
    STATE_FIELD(struct console_control, event),
    STATE_FIELD(struct console_control, value),
};
static const struct state_desc control_state =
    STATE_DESC("console_control", 1, struct console_control, control_fields);

static const struct state_field console_fields[] = {
    STATE_STRUCTS(struct virtio_console, v, &virtio_state),
    STATE_HOST(struct virtio_console, config),
    STATE_HOST(struct virtio_console, ports),
    STATE_HOST(struct virtio_console, nports),
    STATE_FIELD(struct virtio_console, open),
    STATE_FIELD(struct virtio_console, tx_done),
    STATE_FIELD(struct virtio_console, nevents),
    STATE_STRUCTS(struct virtio_console, events, &control_state),
};
static const struct state_desc console_state = {
    .name = "virtio_console",
    .version = 1,
    .struct_size = sizeof(struct virtio_console),
    .fields = console_fields,
    .nfields = ARRAY_SIZE(console_fields),
    .loaded = console_loaded,
};

struct virtio_console *virtio_console_create(const struct device_env *env,
                                             const struct console_port *ports, unsigned nports,
                                             struct pci_host *host, u8 devfn, struct error *err)
{
    static const u8 writable[sizeof(struct console_config)] = {
        [offsetof(struct console_config, emerg_wr)] = 0xff};
    struct virtio_console *c = calloc(1, sizeof(*c));
    struct virtio_config config = {
        .name = "virtio-console",
        .type = VIRTIO_TYPE_CONSOLE,
        .class = PCI_CLASS_COMMUNICATION_OTHER,
        .features = CONSOLE_F_MULTIPORT | CONSOLE_F_EMERG_WRITE,
        .queues = 2 * nports + 2,
        .config_size = sizeof(struct console_config),
        .config_writable = writable,
    };

    if (!c) {
        error_host(err, ENOMEM, "virtio-console");
        return NULL;
    }
    c->nports = nports;
    c->config.max_nr_ports = nports;
    for (unsigned i = 0; i < nports; i++)
        c->ports[i].config = ports[i];
    config.config = (u8 *)&c->config;
    if (virtio_init(&c->v, &console_ops, &config, &console_state, env, err)) {
        free(c);
        return NULL;
    }
    if (virtio_add(&c->v, host, devfn, err)) {
        virtio_device(&c->v)->ops->destroy(virtio_device(&c->v));
        return NULL;
    }
    return c;
}

struct virtio *virtio_console_virtio(struct virtio_console *c)
{
    return &c->v;
}
