/*
 * Virtqueues. References as VIRTIO 1.2 numbers them.
 *
 * 1. A driver writes an entry, then makes it available (an index in split rings, flags in packed ones): we
 *    read that word with acquire, then the entry. We write an entry, then publish it with release.
 * 2. Between publishing and asking whether the driver wants to know, and between asking for notifications
 *    and looking for chains, stands a full fence: the other side does the same with the words exchanged
 *    (2.7.7.2, 2.8.10).
 * 3. Positions in rings are ours alone and are bounded by `size`; the driver can't change size or addresses
 *    while the queue is enabled, and a load checks them again (transport.c).
 */
#include "device/virtio/queue.h"

#include <errno.h>
#include <stdatomic.h>
#include <string.h>

#define DESC_F_NEXT 1
#define DESC_F_WRITE 2
#define DESC_F_INDIRECT 4
#define PACKED_DESC_F_AVAIL BIT(7)
#define PACKED_DESC_F_USED BIT(15)

#define AVAIL_F_NO_INTERRUPT 1
#define USED_F_NO_NOTIFY 1

#define PACKED_EVENT_ENABLE 0
#define PACKED_EVENT_DISABLE 1
#define PACKED_EVENT_DESC 2
#define PACKED_EVENT_WRAP BIT(15)

struct split_desc { /* 2.7.5 */
    u64 addr;
    u32 len;
    u16 flags;
    u16 next;
};

struct packed_desc { /* 2.8.13 */
    u64 addr;
    u32 len;
    u16 id;
    u16 flags;
};

struct used_elem { /* 2.7.8 */
    u32 id;
    u32 len;
};

struct packed_event { /* 2.8.14 */
    u16 desc;         /* offset, and the wrap counter in bit 15 */
    u16 flags;
};

#define DESC_SIZE 16
_Static_assert(sizeof(struct split_desc) == DESC_SIZE && sizeof(struct packed_desc) == DESC_SIZE,
               "both kinds of descriptors are as long");

/* Offsets in the split rings (2.7.6, 2.7.8). */
#define RING_FLAGS 0
#define RING_INDEX 2
#define RING_ENTRIES 4

void virtq_reset(struct virtq *q)
{
    *q = (struct virtq){.size = VIRTQ_SIZE_MAX, .vector = 0xffff};
}

static u64 driver_area_size(const struct virtq *q)
{
    return q->packed ? sizeof(struct packed_event) : RING_ENTRIES + 2ULL * q->size + 2;
}

static u64 device_area_size(const struct virtq *q)
{
    return q->packed ? sizeof(struct packed_event)
                     : RING_ENTRIES + sizeof(struct used_elem) * q->size + 2;
}

static bool area_is_memory(const struct guest_memory *m, gpa_t gpa, u64 len, bool write)
{
    u64 there = len;

    return memory_dma(m, gpa, &there, write) && there == len;
}

int virtq_enable(struct virtq *q, const struct guest_memory *m)
{
    unsigned alignment = q->packed ? 4 : 2;

    if (!q->size || q->size > VIRTQ_SIZE_MAX || (!q->packed && (q->size & (q->size - 1))) ||
        q->desc % DESC_SIZE || q->driver % alignment || q->device % 4 ||
        !area_is_memory(m, q->desc, (u64)DESC_SIZE * q->size, q->packed) ||
        !area_is_memory(m, q->driver, driver_area_size(q), false) ||
        !area_is_memory(m, q->device, device_area_size(q), true))
        return -EPROTO;
    q->next_avail = q->next_used = q->unsignalled = 0;
    q->avail_wrap = q->used_wrap = true;
    q->enabled = true;
    return 0;
}

/* ---- words of the rings: in memory since virtq_enable, and aligned ---- */

static _Atomic u16 *ring_word(const struct guest_memory *m, gpa_t gpa)
{
    return memory_host(m, gpa, sizeof(u16));
}

static u16 load_word(const struct guest_memory *m, gpa_t gpa)
{
    _Atomic u16 *word = ring_word(m, gpa);

    return word ? atomic_load_explicit(word, memory_order_acquire) : 0;
}

static void store_word(const struct guest_memory *m, gpa_t gpa, u16 value)
{
    _Atomic u16 *word = ring_word(m, gpa);

    if (!word)
        return;
    atomic_store_explicit(word, value, memory_order_release);
    memory_tell_written(m, gpa, sizeof(value));
}

/* ---- chains ---- */

static int add_segment(struct virtq_chain *chain, gpa_t gpa, u8 *host, u32 len, bool write)
{
    unsigned n = chain->nread + chain->nwrite;

    /* What the device reads comes first (2.7.4.2). */
    if (n == VIRTQ_SEGMENTS_MAX || (!write && chain->nwrite))
        return -EPROTO;
    chain->segments[n] = (struct virtq_segment){.gpa = gpa, .host = host, .len = len};
    if (write) {
        chain->nwrite++;
        chain->write_len += len;
    } else {
        chain->nread++;
        chain->read_len += len;
    }
    return 0;
}

static int add_buffer(struct virtq_chain *chain, const struct guest_memory *m, gpa_t gpa, u32 len,
                      bool write)
{
    while (len) {
        u64 here = len;
        u8 *host = memory_dma(m, gpa, &here, write);

        if (!host || add_segment(chain, gpa, host, (u32)here, write) < 0)
            return -EPROTO;
        gpa += here;
        len -= (u32)here;
    }
    return 0;
}

/* The number of descriptors in an indirect table, or 0 when it is none. */
static unsigned indirect_count(u32 len)
{
    unsigned n = len / DESC_SIZE;

    return len % DESC_SIZE == 0 && n <= VIRTQ_SEGMENTS_MAX ? n : 0;
}

/* A list of split descriptors in a table of n, from `at` on. */
static int split_chain(struct virtq_chain *chain, const struct guest_memory *m, gpa_t table,
                       unsigned n, u16 at, bool indirect)
{
    struct split_desc d;

    for (unsigned seen = 0; seen < n; seen++) {
        if (at >= n || memory_read(m, table + (u64)DESC_SIZE * at, &d, sizeof(d)) < 0)
            return -EPROTO;
        if (d.flags & DESC_F_INDIRECT) {
            unsigned count = indirect_count(d.len);

            /* Not within a table, and not with more to follow (2.7.5.3.1). */
            if (indirect || (d.flags & DESC_F_NEXT) || !count)
                return -EPROTO;
            return split_chain(chain, m, d.addr, count, 0, true);
        }
        if (add_buffer(chain, m, d.addr, d.len, d.flags & DESC_F_WRITE) < 0)
            return -EPROTO;
        if (!(d.flags & DESC_F_NEXT))
            return 0;
        at = d.next;
    }
    return -EPROTO; /* a loop */
}

static void chain_clear(struct virtq_chain *chain)
{
    chain->id = chain->ndesc = 0;
    chain->nread = chain->nwrite = 0;
    chain->read_len = chain->write_len = 0;
}

static int pop_split(struct virtq *q, const struct guest_memory *m, struct virtq_chain *chain)
{
    u16 available = load_word(m, q->driver + RING_INDEX) - q->next_avail;
    u16 head;

    if (!available)
        return 0;
    if (available > q->size)
        return -EPROTO;
    head = load_word(m, q->driver + RING_ENTRIES + 2ULL * (q->next_avail % q->size));
    chain->id = head;
    if (split_chain(chain, m, q->desc, q->size, head, false) < 0)
        return -EPROTO;
    q->next_avail++;
    return 1;
}

/* Moves a position in a packed ring on; n <= size. */
static void advance(const struct virtq *q, u16 *at, bool *wrap, u16 n)
{
    unsigned next = *at + n;

    if (next >= q->size) {
        next -= q->size;
        *wrap = !*wrap;
    }
    *at = next;
}

static int packed_indirect(struct virtq_chain *chain, const struct guest_memory *m,
                           const struct packed_desc *table)
{
    unsigned n = indirect_count(table->len);
    struct packed_desc d;

    for (unsigned i = 0; i < n; i++) {
        /* The order is that of the table; only WRITE counts of the flags (2.8.7). */
        if (memory_read(m, table->addr + (u64)DESC_SIZE * i, &d, sizeof(d)) < 0 ||
            add_buffer(chain, m, d.addr, d.len, d.flags & DESC_F_WRITE) < 0)
            return -EPROTO;
    }
    return n ? 0 : -EPROTO;
}

static int pop_packed(struct virtq *q, const struct guest_memory *m, struct virtq_chain *chain)
{
    u16 at = q->next_avail;
    bool wrap = q->avail_wrap;
    struct packed_desc d;
    u16 flags = load_word(m, q->desc + (u64)DESC_SIZE * at + offsetof(struct packed_desc, flags));

    if (!!(flags & PACKED_DESC_F_AVAIL) != wrap || !!(flags & PACKED_DESC_F_USED) == wrap)
        return 0;
    do {
        if (chain->ndesc == q->size ||
            memory_read(m, q->desc + (u64)DESC_SIZE * at, &d, sizeof(d)) < 0)
            return -EPROTO;
        chain->ndesc++;
        if (d.flags & DESC_F_INDIRECT) {
            if (chain->ndesc > 1 || (d.flags & DESC_F_NEXT) || packed_indirect(chain, m, &d) < 0)
                return -EPROTO;
        } else if (add_buffer(chain, m, d.addr, d.len, d.flags & DESC_F_WRITE) < 0) {
            return -EPROTO;
        }
        advance(q, &at, &wrap, 1);
    } while (d.flags & DESC_F_NEXT);
    chain->id = d.id;
    q->next_avail = at;
    q->avail_wrap = wrap;
    return 1;
}

int virtq_pop(struct virtq *q, const struct guest_memory *m, struct virtq_chain *chain)
{
    if (!q->enabled)
        return 0;
    chain_clear(chain);
    return q->packed ? pop_packed(q, m, chain) : pop_split(q, m, chain);
}

void virtq_unpop(struct virtq *q, const struct virtq_chain *chain)
{
    if (!q->enabled)
        return;
    if (!q->packed) {
        q->next_avail--;
        return;
    }
    if (chain->ndesc > q->next_avail) {
        q->next_avail += q->size;
        q->avail_wrap = !q->avail_wrap;
    }
    q->next_avail -= chain->ndesc;
}

/* ---- giving back ---- */

static void tell_written(const struct guest_memory *m, const struct virtq_chain *chain, u32 written)
{
    for (unsigned i = chain->nread; i < chain->nread + chain->nwrite && written; i++) {
        u32 here = MIN(written, chain->segments[i].len);

        memory_tell_written(m, chain->segments[i].gpa, here);
        written -= here;
    }
}

static int push_split(struct virtq *q, const struct guest_memory *m,
                      const struct virtq_chain *chain, u32 written)
{
    struct used_elem e = {.id = chain->id, .len = written};
    gpa_t entry = q->device + RING_ENTRIES + sizeof(e) * (q->next_used % q->size);
    void *host = memory_host(m, entry, sizeof(e));

    if (!host)
        return -EPROTO;
    memcpy(host, &e, sizeof(e));
    memory_tell_written(m, entry, sizeof(e));
    q->next_used++;
    return 0;
}

static int push_packed(struct virtq *q, const struct guest_memory *m,
                       const struct virtq_chain *chain, u32 written)
{
    gpa_t entry = q->desc + (u64)DESC_SIZE * q->next_used;
    struct packed_desc *d = memory_host(m, entry, sizeof(*d));
    u16 flags = q->used_wrap ? PACKED_DESC_F_AVAIL | PACKED_DESC_F_USED : 0;

    if (!d)
        return -EPROTO;
    d->len = written;
    d->id = chain->id;
    memory_tell_written(m, entry, sizeof(*d));
    flags |= chain->nwrite ? DESC_F_WRITE : 0;
    entry += offsetof(struct packed_desc, flags);
    if (q->held) {
        store_word(m, entry, flags);
    } else {
        q->held_entry = entry;
        q->held_flags = flags;
    }
    advance(q, &q->next_used, &q->used_wrap, chain->ndesc);
    return 0;
}

/* The driver sees what is held. */
static void show_held(struct virtq *q, const struct guest_memory *m)
{
    if (!q->held)
        return;
    if (q->packed)
        store_word(m, q->held_entry, q->held_flags);
    else
        store_word(m, q->device + RING_INDEX, q->next_used);
    q->held = 0;
}

int virtq_push(struct virtq *q, const struct guest_memory *m, const struct virtq_chain *chain,
               u32 written)
{
    int ret = virtq_push_held(q, m, chain, written);

    show_held(q, m);
    return ret;
}

int virtq_push_held(struct virtq *q, const struct guest_memory *m, const struct virtq_chain *chain,
                    u32 written)
{
    int ret;

    if (!q->enabled)
        return 0;
    tell_written(m, chain, written);
    ret = q->packed ? push_packed(q, m, chain, written) : push_split(q, m, chain, written);
    if (ret)
        return ret;
    q->held++;
    q->unsignalled = MIN(q->unsignalled + (q->packed ? chain->ndesc : 1), q->size);
    return 0;
}

/* Whether position `event` is among the last n before `next` (2.7.7.2). */
static bool event_was_passed(u16 event, u16 next, u16 n)
{
    return (u16)(next - event - 1) < n;
}

static bool split_wants_signal(const struct virtq *q, const struct guest_memory *m, u16 n)
{
    if (q->event_idx)
        return event_was_passed(load_word(m, q->driver + RING_ENTRIES + 2ULL * q->size),
                                q->next_used, n);
    return !(load_word(m, q->driver + RING_FLAGS) & AVAIL_F_NO_INTERRUPT);
}

static bool packed_wants_signal(const struct virtq *q, const struct guest_memory *m, u16 n)
{
    u16 flags = load_word(m, q->driver + offsetof(struct packed_event, flags)) & 3;
    u16 event = load_word(m, q->driver + offsetof(struct packed_event, desc));
    u16 offset = event & ~PACKED_EVENT_WRAP;

    if (flags != PACKED_EVENT_DESC)
        return flags == PACKED_EVENT_ENABLE;
    /* A position of the lap before lies one ring's length lower. */
    if (!!(event & PACKED_EVENT_WRAP) != q->used_wrap)
        offset -= q->size;
    return event_was_passed(offset, q->next_used, n);
}

bool virtq_should_signal(struct virtq *q, const struct guest_memory *m)
{
    u16 n = q->unsignalled;

    q->unsignalled = 0;
    if (!q->enabled || !n)
        return false;
    atomic_thread_fence(memory_order_seq_cst);
    return q->packed ? packed_wants_signal(q, m, n) : split_wants_signal(q, m, n);
}

void virtq_set_notify(struct virtq *q, const struct guest_memory *m, bool on)
{
    if (!q->enabled)
        return;
    if (q->packed)
        store_word(m, q->device + offsetof(struct packed_event, flags),
                   on ? PACKED_EVENT_ENABLE : PACKED_EVENT_DISABLE);
    else if (!q->event_idx)
        store_word(m, q->device + RING_FLAGS, on ? 0 : USED_F_NO_NOTIFY);
    else if (on) /* the event index stays behind otherwise, so that it isn't met */
        store_word(m, q->device + RING_ENTRIES + sizeof(struct used_elem) * q->size, q->next_avail);
    if (on)
        atomic_thread_fence(memory_order_seq_cst);
}

/* ---- contents ---- */

unsigned virtq_chain_iov(const struct virtq_chain *chain, bool write, u64 offset, u64 len,
                         struct iovec *iov)
{
    unsigned first = write ? chain->nread : 0;
    unsigned end = write ? chain->nread + chain->nwrite : chain->nread, n = 0;

    for (unsigned i = first; i < end && len; i++) {
        const struct virtq_segment *s = &chain->segments[i];

        if (offset >= s->len) {
            offset -= s->len;
            continue;
        }
        iov[n].iov_base = s->host + offset;
        iov[n].iov_len = MIN(len, s->len - offset);
        len -= iov[n++].iov_len;
        offset = 0;
    }
    return n;
}

size_t virtq_chain_read(const struct virtq_chain *chain, u64 offset, void *buf, size_t len)
{
    struct iovec iov[VIRTQ_SEGMENTS_MAX];
    unsigned n = virtq_chain_iov(chain, false, offset, len, iov);
    size_t done = 0;

    for (unsigned i = 0; i < n; i++) {
        memcpy((u8 *)buf + done, iov[i].iov_base, iov[i].iov_len);
        done += iov[i].iov_len;
    }
    return done;
}

size_t virtq_chain_write(const struct virtq_chain *chain, u64 offset, const void *buf, size_t len)
{
    struct iovec iov[VIRTQ_SEGMENTS_MAX];
    unsigned n = virtq_chain_iov(chain, true, offset, len, iov);
    size_t done = 0;

    for (unsigned i = 0; i < n; i++) {
        memcpy(iov[i].iov_base, (const u8 *)buf + done, iov[i].iov_len);
        done += iov[i].iov_len;
    }
    return done;
}

static const struct state_field virtq_fields[] = {
    STATE_FIELD(struct virtq, size),        STATE_FIELD(struct virtq, vector),
    STATE_FIELD(struct virtq, enabled),     STATE_FIELD(struct virtq, packed),
    STATE_FIELD(struct virtq, event_idx),   STATE_FIELD(struct virtq, desc),
    STATE_FIELD(struct virtq, driver),      STATE_FIELD(struct virtq, device),
    STATE_FIELD(struct virtq, next_avail),  STATE_FIELD(struct virtq, next_used),
    STATE_FIELD(struct virtq, avail_wrap),  STATE_FIELD(struct virtq, used_wrap),
    STATE_FIELD(struct virtq, unsignalled), STATE_HOST(struct virtq, held),
    STATE_HOST(struct virtq, held_flags),   STATE_HOST(struct virtq, held_entry),
};
const struct state_desc virtq_state = STATE_DESC("virtq", 1, struct virtq, virtq_fields);
