/*
 * The dirty log: which pages were written since the last look.
 *
 * Two who write: the guest, whom the kernel watches, and the VMM itself (a device's DMA), who marks
 * slot->dirty. The kernel tells in one of two ways. With bitmaps, KVM_GET_DIRTY_LOG takes a slot's at
 * once. With rings, each vCPU has a ring in which it notes the pages that it dirtied; we take the
 * entries, mark slot->dirty, and hand them back by KVM_RESET_DIRTY_RINGS, which protects the pages
 * again. A vCPU whose ring is full leaves the guest until that is done.
 *
 * A kernel whose rings were turned on has no bitmaps, so the choice is made once, at the start.
 * Reference: Documentation/virt/kvm/api.rst, 4.8, 8.29.
 */
#include "engine/kvm/kvm.h"
#include "host/log.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/mman.h>

#define RING_ENTRIES 4096u

static size_t slot_pages(const struct memory_slot *s)
{
    return s->size >> GUEST_PAGE_SHIFT;
}
static size_t slot_words(const struct memory_slot *s)
{
    return (slot_pages(s) + 63) / 64;
}

static void mark_page(struct kvm_slot *slot, u64 page)
{
    if (slot->dirty && page < slot_pages(&slot->slot))
        atomic_fetch_or(&slot->dirty[page / 64], BIT(page % 64));
}

void kvm_dirty_init(struct kvm_engine *e)
{
    u64 bytes = RING_ENTRIES * sizeof(struct kvm_dirty_gfn);
    struct kvm_enable_cap cap = {.cap = KVM_CAP_DIRTY_LOG_RING, .args = {bytes}};

    if (kvm_host_cap(e->vm, KVM_CAP_DIRTY_LOG_RING) >= (int)bytes &&
        ioctl(e->vm, KVM_ENABLE_CAP, &cap) == 0)
        e->ring_entries = RING_ENTRIES;
}

int kvm_dirty_map_ring(struct kvm_vcpu *v, struct error *err)
{
    size_t size = v->engine->ring_entries * sizeof(struct kvm_dirty_gfn);
    void *ring;

    if (!size)
        return 0;
    ring = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, v->fd,
                (off_t)KVM_DIRTY_LOG_PAGE_OFFSET << GUEST_PAGE_SHIFT);
    if (ring == MAP_FAILED)
        return error_host(err, errno, "cannot map the dirty ring of vCPU %u", v->index);
    v->ring = ring;
    return 0;
}

void kvm_dirty_unmap_ring(struct kvm_vcpu *v)
{
    if (v->ring)
        munmap(v->ring, v->engine->ring_entries * sizeof(struct kvm_dirty_gfn));
}

/* dirty_lock is held. True when there was anything. */
static bool harvest_ring(struct kvm_vcpu *v)
{
    struct kvm_engine *e = v->engine;
    u32 first = v->ring_next;

    for (;;) {
        struct kvm_dirty_gfn *g = &v->ring[v->ring_next % e->ring_entries];

        if (!(__atomic_load_n(&g->flags, __ATOMIC_ACQUIRE) & KVM_DIRTY_GFN_F_DIRTY))
            return v->ring_next != first;
        if (g->slot < MEMORY_MAX_SLOTS)
            mark_page(&e->slots[g->slot], g->offset);
        __atomic_store_n(&g->flags, KVM_DIRTY_GFN_F_RESET, __ATOMIC_RELEASE);
        v->ring_next++;
    }
}

static void harvest(struct kvm_engine *e)
{
    bool any = false;

    pthread_mutex_lock(&e->dirty_lock);
    for (unsigned i = 0; i < e->nvcpus; i++) {
        struct kvm_vcpu *v = atomic_load(&e->vcpus[i]);

        if (v && v->ring)
            any |= harvest_ring(v);
    }
    if (any && ioctl(e->vm, KVM_RESET_DIRTY_RINGS, 0) < 0)
        log_once(LOG_WARN, "kvm: cannot reset the dirty rings");
    pthread_mutex_unlock(&e->dirty_lock);
}

void kvm_dirty_ring_full(struct kvm_vcpu *v)
{
    harvest(v->engine);
}

void kvm_dirty_mark(struct kvm_engine *e, gpa_t gpa, u64 len)
{
    if (!len)
        return;
    for (unsigned n = 0; n < MEMORY_MAX_SLOTS; n++) {
        struct kvm_slot *s = &e->slots[n];
        u64 last;

        if (gpa < s->slot.gpa || gpa - s->slot.gpa >= s->slot.size)
            continue;
        last = (gpa - s->slot.gpa + len - 1) >> GUEST_PAGE_SHIFT;
        for (u64 page = (gpa - s->slot.gpa) >> GUEST_PAGE_SHIFT; page <= last; page++)
            mark_page(s, page);
        return;
    }
}

int kvm_dirty_start(struct kvm_engine *e, struct error *err)
{
    int ret;

    for (unsigned n = 0; n < MEMORY_MAX_SLOTS; n++) {
        struct kvm_slot *s = &e->slots[n];

        if (!s->slot.size)
            continue;
        if (!s->dirty)
            s->dirty = calloc(slot_words(&s->slot), sizeof(u64));
        if (!s->dirty)
            return error_host(err, ENOMEM, "can't start the dirty log");
    }
    harvest(e); /* what an earlier log left */
    for (unsigned n = 0; n < MEMORY_MAX_SLOTS; n++) {
        for (size_t w = 0; e->slots[n].dirty && w < slot_words(&e->slots[n].slot); w++)
            atomic_store(&e->slots[n].dirty[w], 0);
    }
    atomic_store(&e->dirty_logging, true);
    ret = kvm_memory_sync(e, err);
    if (ret)
        atomic_store(&e->dirty_logging, false);
    return ret;
}

void kvm_dirty_stop(struct kvm_engine *e)
{
    struct error err;

    atomic_store(&e->dirty_logging, false);
    if (kvm_memory_sync(e, &err))
        log_once(LOG_WARN, "%s", err.text); /* the guest only runs slower */
}

int kvm_dirty_read(struct kvm_engine *e, const struct memory_slot *slot, u64 *bitmap, size_t words)
{
    struct kvm_slot *s = NULL;

    for (unsigned n = 0; n < MEMORY_MAX_SLOTS; n++) {
        if (e->slots[n].slot.size && e->slots[n].slot.gpa == slot->gpa)
            s = &e->slots[n];
    }
    if (!s || !s->dirty || !atomic_load(&e->dirty_logging) || words < slot_words(slot))
        return -EINVAL;
    if (e->ring_entries) {
        harvest(e);
        for (size_t w = 0; w < slot_words(slot); w++)
            bitmap[w] = 0;
    } else {
        struct kvm_dirty_log log = {.slot = (u32)(s - e->slots), .dirty_bitmap = bitmap};

        if (ioctl(e->vm, KVM_GET_DIRTY_LOG, &log) < 0)
            return -errno;
    }
    for (size_t w = 0; w < slot_words(slot); w++)
        bitmap[w] |= atomic_exchange(&s->dirty[w], 0);
    return 0;
}

void kvm_dirty_free(struct kvm_slot *slot)
{
    free((void *)slot->dirty);
    slot->dirty = NULL;
}
