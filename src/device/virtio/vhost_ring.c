#include "device/virtio/vhost_ring.h"

#include <errno.h>
#include <stdatomic.h>
#include <string.h>

#define DESC_F_NEXT 1
#define DESC_F_WRITE 2
#define DESC_F_INDIRECT 4
#define USED_F_NO_NOTIFY 1

struct desc { /* 2.7.5 */
    u64 addr;
    u32 len;
    u16 flags;
    u16 next;
};

struct used_elem { /* 2.7.8 */
    u32 id;
    u32 len;
};

struct avail { /* 2.7.6 */
    u16 flags;
    _Atomic u16 idx;
    u16 ring[VHOST_RING_SIZE];
    u16 used_event;
};

struct used { /* 2.7.8 */
    _Atomic u16 flags;
    _Atomic u16 idx;
    struct used_elem ring[VHOST_RING_SIZE];
    u16 avail_event;
};

/* The memory of a ring, with a table of descriptors for each entry. */
struct layout {
    struct desc desc[VHOST_RING_SIZE];
    struct avail avail;
    struct used used __attribute__((aligned(4096)));
    struct desc tables[VHOST_RING_SIZE][VIRTQ_SEGMENTS_MAX];
};
_Static_assert(sizeof(struct layout) <= VHOST_RING_BYTES, "VHOST_RING_BYTES holds a ring");

static struct layout *layout_of(const struct vhost_shadow *s)
{
    return (struct layout *)s->host;
}

void vhost_shadow_reset(struct vhost_shadow *s, bool indirect)
{
    struct layout *l = layout_of(s);

    memset(l->desc, 0, sizeof(l->desc));
    memset(&l->avail, 0, sizeof(l->avail));
    memset(&l->used, 0, sizeof(l->used));
    memset(s->entries, 0, sizeof(s->entries));
    s->indirect = indirect;
    s->next_avail = s->next_used = 0;
    s->pushed = 0;
    s->first_free = 0;
    s->nfree = VHOST_RING_SIZE;
    for (unsigned i = 0; i < VHOST_RING_SIZE; i++)
        s->next_free[i] = (u16)(i + 1);
}

void vhost_shadow_describe(const struct vhost_shadow *s, struct vhost_ring *r)
{
    r->size = VHOST_RING_SIZE;
    r->base = s->next_used;
    r->desc = s->gpa + offsetof(struct layout, desc);
    r->driver = s->gpa + offsetof(struct layout, avail);
    r->device = s->gpa + offsetof(struct layout, used);
}

static u16 descriptors_for(const struct vhost_shadow *s, const struct virtq_chain *chain)
{
    return s->indirect ? 1 : (u16)(chain->nread + chain->nwrite);
}

bool vhost_shadow_is_too_long(const struct vhost_shadow *s, const struct virtq_chain *chain)
{
    return descriptors_for(s, chain) > VHOST_RING_SIZE;
}

static void fill(struct desc *d, const struct virtq_chain *chain, unsigned n, u16 next)
{
    const struct virtq_segment *segment = &chain->segments[n];
    bool more = n + 1 < chain->nread + chain->nwrite;

    *d = (struct desc){
        .addr = segment->gpa,
        .len = segment->len,
        .flags = (u16)((n >= chain->nread ? DESC_F_WRITE : 0) | (more ? DESC_F_NEXT : 0)),
        .next = next,
    };
}

static void fill_table(struct vhost_shadow *s, u16 head, const struct virtq_chain *chain)
{
    struct layout *l = layout_of(s);
    unsigned n = chain->nread + chain->nwrite;

    for (unsigned i = 0; i < n; i++)
        fill(&l->tables[head][i], chain, i, (u16)(i + 1));
    l->desc[head] = (struct desc){
        .addr = s->gpa + offsetof(struct layout, tables) + head * sizeof(l->tables[0]),
        .len = (u32)(n * sizeof(struct desc)),
        .flags = DESC_F_INDIRECT,
    };
}

bool vhost_shadow_push(struct vhost_shadow *s, struct virtq_chain *chain)
{
    struct layout *l = layout_of(s);
    u16 n = descriptors_for(s, chain), head = s->first_free, at = head;

    if (n > s->nfree)
        return false;
    for (u16 i = 0; i < n; i++) {
        if (!s->indirect)
            fill(&l->desc[at], chain, i, s->next_free[at]);
        at = s->next_free[at];
    }
    if (s->indirect)
        fill_table(s, head, chain);
    s->first_free = at;
    s->nfree -= n;
    s->entries[head] = (struct vhost_ring_entry){.chain = chain, .ndesc = n, .order = s->pushed++};
    l->avail.ring[s->next_avail++ % VHOST_RING_SIZE] = head;
    atomic_store_explicit(&l->avail.idx, s->next_avail, memory_order_release);
    return true;
}

bool vhost_shadow_wants_kick(const struct vhost_shadow *s)
{
    atomic_thread_fence(memory_order_seq_cst);
    return !(atomic_load_explicit(&layout_of(s)->used.flags, memory_order_relaxed) &
             USED_F_NO_NOTIFY);
}

/* The entry's descriptors are free again; they are still chained to one another. */
static struct virtq_chain *release(struct vhost_shadow *s, u16 head)
{
    struct vhost_ring_entry *e = &s->entries[head];
    struct virtq_chain *chain = e->chain;
    u16 last = head;

    for (u16 i = 1; i < e->ndesc; i++)
        last = s->next_free[last];
    s->next_free[last] = s->first_free;
    s->first_free = head;
    s->nfree += e->ndesc;
    e->chain = NULL;
    return chain;
}

int vhost_shadow_take(struct vhost_shadow *s, struct virtq_chain **chain, u32 *written)
{
    struct layout *l = layout_of(s);
    struct used_elem e;

    if (atomic_load_explicit(&l->used.idx, memory_order_acquire) == s->next_used)
        return 0;
    e = *(volatile struct used_elem *)&l->used.ring[s->next_used % VHOST_RING_SIZE];
    if (e.id >= VHOST_RING_SIZE || !s->entries[e.id].chain)
        return -EPROTO;
    s->next_used++;
    *chain = release(s, (u16)e.id);
    *written = (u32)MIN(e.len, (*chain)->write_len);
    return 1;
}

struct virtq_chain *vhost_shadow_take_back(struct vhost_shadow *s, bool *last)
{
    int newest = -1;

    for (int i = 0; i < VHOST_RING_SIZE; i++) {
        if (s->entries[i].chain && (newest < 0 || s->entries[i].order > s->entries[newest].order))
            newest = i;
    }
    if (newest < 0)
        return NULL;
    *last = s->entries[newest].order + 1 == s->pushed;
    if (*last)
        s->pushed--;
    return release(s, (u16)newest);
}
