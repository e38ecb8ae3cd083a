/*
 * Lookups run on every vCPU's thread at each exit, changes are rare (a guest that moves a PCI BAR), so
 * readers take no lock: the ranges are a sorted array under a sequence counter. A reader finds its entry
 * by bisection, copies it, and tries again when the counter moved. A machine has some thirty ranges:
 * five steps over a few cache lines.
 *
 * What that promises: once io_bus_remove returns, no lookup finds the range, and the io_range itself is
 * not touched any more. An operation that was looked up before may still be running, so who frees what
 * `opaque` points to has the vCPUs stopped.
 *
 * The array only ever grows, by doubling. Arrays that were outgrown stay until the bus goes, as readers
 * may be in them: all of them together are no larger than the current one.
 */
#include "bus/io.h"

#include "host/log.h"

#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>

#define INITIAL_CAPACITY 32

/* Members are atomic as they are copied while a writer may move them; the counter tells. */
struct entry {
    _Atomic u64 base, size;
    const struct io_ops *_Atomic ops;
    void *_Atomic opaque;
    struct io_range *range; /* for writers */
};

struct table {
    struct table *outgrown;
    size_t capacity;
    struct entry entries[];
};

struct io_bus {
    const char *name;
    u64 limit;
    pthread_mutex_t lock; /* writers, and the listener */
    struct io_listener listener;
    atomic_uint sequence; /* odd while a writer is at work */
    struct table *_Atomic table;
    atomic_size_t count;
};

/* What a reader has found at an address: a copy of an entry, or a gap (ops is NULL) and its end. */
struct found {
    u64 base, size;
    const struct io_ops *ops;
    void *opaque;
};

static struct table *table_create(size_t capacity)
{
    struct table *table = calloc(1, sizeof(*table) + capacity * sizeof(table->entries[0]));

    if (table)
        table->capacity = capacity;
    return table;
}

struct io_bus *io_bus_create(const char *name, u64 limit, struct error *err)
{
    struct io_bus *bus = calloc(1, sizeof(*bus));
    struct table *table = table_create(INITIAL_CAPACITY);

    if (!bus || !table) {
        error_host(err, ENOMEM, "%s bus", name);
        free(bus);
        free(table);
        return NULL;
    }
    bus->name = name;
    bus->limit = limit;
    pthread_mutex_init(&bus->lock, NULL);
    atomic_init(&bus->table, table);
    return bus;
}

void io_bus_destroy(struct io_bus *bus)
{
    struct table *table;

    if (!bus)
        return;
    table = bus->table;
    while (table) {
        struct table *outgrown = table->outgrown;

        free(table);
        table = outgrown;
    }
    pthread_mutex_destroy(&bus->lock);
    free(bus);
}

/* ---- changes ---- */

static void entry_move(struct entry *to, const struct entry *from)
{
    atomic_store_explicit(&to->base, from->base, memory_order_release);
    atomic_store_explicit(&to->size, from->size, memory_order_release);
    atomic_store_explicit(&to->ops, from->ops, memory_order_release);
    atomic_store_explicit(&to->opaque, from->opaque, memory_order_release);
    to->range = from->range;
}

/* Makes place for one more. bus->lock is held. */
static int table_grow(struct io_bus *bus)
{
    struct table *old = bus->table, *new;

    if (bus->count < old->capacity)
        return 0;
    new = table_create(old->capacity * 2);
    if (!new)
        return -ENOMEM;
    for (size_t i = 0; i < old->capacity; i++)
        entry_move(&new->entries[i], &old->entries[i]);
    new->outgrown = old;
    atomic_store(&bus->table, new);
    return 0;
}

static int bus_insert(struct io_bus *bus, struct io_range *range, struct error *err)
{
    size_t count = bus->count, at = 0;
    struct entry *entries;
    struct entry new = {
        .base = range->base,
        .size = range->size,
        .ops = range->ops,
        .opaque = range->opaque,
        .range = range,
    };

    if (table_grow(bus) < 0)
        return error_host(err, ENOMEM, "%s bus", bus->name);
    entries = bus->table->entries;
    while (at < count && entries[at].base < range->base)
        at++;
    for (size_t i = at > 0 ? at - 1 : 0; i <= at && i < count; i++) {
        const struct io_range *other = entries[i].range;

        if (other->base < range->base + range->size && range->base < other->base + other->size) {
            error_input(err, "%s at 0x%llx of the %s bus is in the way of %s", other->name,
                        (unsigned long long)other->base, bus->name, range->name);
            return -EEXIST;
        }
    }
    atomic_fetch_add(&bus->sequence, 1);
    for (size_t i = count; i > at; i--)
        entry_move(&entries[i], &entries[i - 1]);
    entry_move(&entries[at], &new);
    atomic_store(&bus->count, count + 1);
    atomic_fetch_add(&bus->sequence, 1);
    return 0;
}

int io_bus_add(struct io_bus *bus, struct io_range *range, struct error *err)
{
    int ret;

    if (!range->size || range->base >= bus->limit || range->size > bus->limit - range->base)
        return error_input(err, "%s: 0x%llx bytes at 0x%llx are outside of the %s bus", range->name,
                           (unsigned long long)range->size, (unsigned long long)range->base,
                           bus->name);
    pthread_mutex_lock(&bus->lock);
    ret = bus_insert(bus, range, err);
    pthread_mutex_unlock(&bus->lock);
    return ret;
}

void io_bus_remove(struct io_bus *bus, struct io_range *range)
{
    struct entry *entries;
    size_t count, at = 0;

    pthread_mutex_lock(&bus->lock);
    entries = bus->table->entries;
    count = bus->count;
    while (at < count && entries[at].range != range)
        at++;
    if (at < count) {
        atomic_fetch_add(&bus->sequence, 1);
        for (size_t i = at; i + 1 < count; i++)
            entry_move(&entries[i], &entries[i + 1]);
        atomic_store(&bus->count, count - 1);
        atomic_fetch_add(&bus->sequence, 1);
    }
    pthread_mutex_unlock(&bus->lock);
}

void io_bus_listen(struct io_bus *bus, struct io_listener listener)
{
    pthread_mutex_lock(&bus->lock);
    bus->listener = listener;
    pthread_mutex_unlock(&bus->lock);
}

void io_bus_set_doorbell(struct io_bus *bus, u64 addr, int fd, bool there)
{
    pthread_mutex_lock(&bus->lock);
    if (bus->listener.doorbell)
        bus->listener.doorbell(bus->listener.opaque, addr, fd, there);
    pthread_mutex_unlock(&bus->lock);
}

/* ---- lookups ---- */

#define LOAD(p) atomic_load_explicit(&(p), memory_order_acquire)

/* One try: what it finds means something only when the counter hasn't moved. */
static void find_once(struct io_bus *bus, u64 addr, struct found *found)
{
    struct table *table = LOAD(bus->table);
    size_t count = MIN(LOAD(bus->count), table->capacity);
    size_t low = 0, high = count;

    /* The first entry whose base is above addr; the one before it is the only one that may hold it. */
    while (low < high) {
        size_t mid = (low + high) / 2;

        if (LOAD(table->entries[mid].base) <= addr)
            low = mid + 1;
        else
            high = mid;
    }
    if (low > 0) {
        struct entry *e = &table->entries[low - 1];

        *found = (struct found){LOAD(e->base), LOAD(e->size), LOAD(e->ops), LOAD(e->opaque)};
        if (addr - found->base < found->size)
            return;
    }
    *found = (struct found){.base = addr};
    found->size = (low < count ? LOAD(table->entries[low].base) : bus->limit) - addr;
}

static void find(struct io_bus *bus, u64 addr, struct found *found)
{
    unsigned before;

    if (addr >= bus->limit) {
        *found = (struct found){.base = addr, .size = UINT64_MAX};
        return;
    }
    do {
        before = LOAD(bus->sequence);
        find_once(bus, addr, found);
    } while (before % 2 || before != LOAD(bus->sequence));
}

/* How many of the `left` bytes at addr go in one access: a power of two that the range takes whole. */
static unsigned piece_size(const struct found *found, u64 addr, unsigned left)
{
    u64 room = found->size - (addr - found->base);
    unsigned widest = found->ops && found->ops->max_size ? found->ops->max_size : 8;
    unsigned size = 8;

    while (size > left || size > widest || size > room)
        size /= 2;
    return size;
}

static u64 value_mask(unsigned size)
{
    return size >= 8 ? UINT64_MAX : BIT(size * 8) - 1;
}

static void log_unclaimed(const struct io_bus *bus, const char *what, u64 addr, unsigned size)
{
    if (log_enabled(LOG_DEBUG) && log_first_time(addr ^ (u64)(uintptr_t)bus << 32))
        log_debug("%s bus: %u-byte %s at 0x%llx, where nobody is", bus->name, size, what,
                  (unsigned long long)addr);
}

u64 io_bus_read(struct io_bus *bus, u64 addr, unsigned size)
{
    u64 value = 0;

    for (unsigned done = 0; done < size;) {
        struct found found;
        unsigned piece;
        u64 part = UINT64_MAX;

        find(bus, addr + done, &found);
        piece = piece_size(&found, addr + done, size - done);
        if (found.ops)
            part = found.ops->read(found.opaque, addr + done - found.base, piece);
        else
            log_unclaimed(bus, "read", addr + done, piece);
        value |= (part & value_mask(piece)) << (done * 8);
        done += piece;
    }
    return value;
}

void io_bus_write(struct io_bus *bus, u64 addr, u64 value, unsigned size)
{
    for (unsigned done = 0; done < size;) {
        struct found found;
        unsigned piece;

        find(bus, addr + done, &found);
        piece = piece_size(&found, addr + done, size - done);
        if (found.ops)
            found.ops->write(found.opaque, addr + done - found.base,
                             value >> (done * 8) & value_mask(piece), piece);
        else
            log_unclaimed(bus, "write", addr + done, piece);
        done += piece;
    }
}
