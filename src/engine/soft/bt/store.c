/*
 * The store of translations. See store.h.
 *
 * It is made of shards, by guest page, each with its lock. A shard is a ring of records, from the oldest to the
 * newest, none of which lies across its end: what is left there is taken by a record of nothing. The records that
 * have a key are chained by its hash.
 */
#include "engine/soft/bt/store.h"

#include "bus/memory.h"
#include "host/pages.h"

#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#define SHARDS 16
#define BUCKET_BITS 14
#define UNIT 64 /* what records are multiples of */

struct record {
    struct bt_store_key key;
    u32 size;  /* bytes of what it holds */
    u32 units; /* in all */
    u32 next;  /* in the chain; see place */
    bool chained;
    _Alignas(UNIT) u8 data[];
};

struct shard {
    pthread_mutex_t lock; /* guards the rest */
    u8 *ring;
    u64 head, tail; /* the next record's place, and the oldest's: bytes since the beginning */
    u32 buckets[1u << BUCKET_BITS];
};

struct bt_store {
    size_t ring_size;
    unsigned nlocks; /* that were made */
    struct shard shards[SHARDS];
};

/* --- Life --- */

void bt_store_destroy(struct bt_store *s)
{
    if (!s)
        return;
    for (unsigned n = 0; n < SHARDS; n++)
        pages_free(s->shards[n].ring, s->ring_size);
    while (s->nlocks)
        pthread_mutex_destroy(&s->shards[--s->nlocks].lock);
    free(s);
}

struct bt_store *bt_store_create(size_t size, struct error *err)
{
    struct bt_store *s = calloc(1, sizeof(*s));

    if (!s)
        goto fail;
    s->ring_size = size / SHARDS / UNIT * UNIT;
    for (; s->nlocks < SHARDS; s->nlocks++)
        pthread_mutex_init(&s->shards[s->nlocks].lock, NULL);
    for (unsigned n = 0; n < SHARDS; n++) {
        s->shards[n].ring = pages_alloc(s->ring_size);
        if (!s->shards[n].ring)
            goto fail;
    }
    return s;

fail:
    error_host(err, ENOMEM, "can't make the store of translated code");
    bt_store_destroy(s);
    return NULL;
}

/* --- Chains --- */

static u64 hash_of(u64 n)
{
    return n * 0x9e3779b97f4a7c15ULL;
}

static struct shard *shard_of(struct bt_store *s, const struct bt_store_key *key)
{
    return &s->shards[(hash_of(key->gpa >> GUEST_PAGE_SHIFT) >> 32) % SHARDS];
}

static u32 *bucket_of(struct shard *shard, const struct bt_store_key *key)
{
    return &shard->buckets[hash_of(key->gpa ^ key->page << 3 ^ key->mode << 44) >>
                           (64 - BUCKET_BITS)];
}

/* Records are named by their place in the ring, in units, counted from 1; 0 is none. */
static struct record *record_at(const struct shard *shard, u32 place)
{
    return (struct record *)(shard->ring + (size_t)(place - 1) * UNIT);
}

static u32 place_of(const struct shard *shard, const struct record *r)
{
    return (u32)(((const u8 *)r - shard->ring) / UNIT) + 1;
}

static bool has_key(const struct record *r, const struct bt_store_key *key)
{
    return r->key.gpa == key->gpa && r->key.gpa2 == key->gpa2 && r->key.page == key->page &&
           r->key.mode == key->mode;
}

/* Where the key's record is named, or the 0 at the chain's end. */
static u32 *find(struct shard *shard, const struct bt_store_key *key)
{
    u32 *link = bucket_of(shard, key);

    while (*link && !has_key(record_at(shard, *link), key))
        link = &record_at(shard, *link)->next;
    return link;
}

static void unchain(struct shard *shard, const struct bt_store_key *key)
{
    u32 *link = find(shard, key);

    if (*link) {
        struct record *r = record_at(shard, *link);

        r->chained = false;
        *link = r->next;
    }
}

/* --- The ring --- */

/* The next `units` of the ring, which are there up to its end, without the records that were there. */
static struct record *take(struct bt_store *s, struct shard *shard, u32 units)
{
    u64 size = (u64)units * UNIT;
    struct record *r = (struct record *)(shard->ring + shard->head % s->ring_size);

    while (shard->head + size - shard->tail > s->ring_size) {
        const struct record *oldest =
            (const struct record *)(shard->ring + shard->tail % s->ring_size);

        shard->tail += (u64)oldest->units * UNIT;
        if (oldest->chained)
            unchain(shard, &oldest->key);
    }
    shard->head += size;
    *r = (struct record){.units = units};
    return r;
}

u64 bt_store_bytes(struct bt_store *s)
{
    u64 bytes = 0;

    for (unsigned n = 0; n < SHARDS; n++) {
        pthread_mutex_lock(&s->shards[n].lock);
        bytes += MIN(s->shards[n].head, s->ring_size);
        pthread_mutex_unlock(&s->shards[n].lock);
    }
    return bytes;
}

void bt_store_put(struct bt_store *s, const struct bt_store_key *key, const struct iovec *parts,
                  unsigned nparts)
{
    struct shard *shard = shard_of(s, key);
    size_t size = 0, in_all, left;
    struct record *r;
    u32 *bucket;
    u8 *to;

    for (unsigned n = 0; n < nparts; n++)
        size += parts[n].iov_len;
    in_all = (sizeof(*r) + size + UNIT - 1) / UNIT * UNIT;
    if (in_all > s->ring_size)
        return;
    pthread_mutex_lock(&shard->lock);
    unchain(shard, key);
    left = s->ring_size - shard->head % s->ring_size;
    if (left < in_all)
        take(s, shard, (u32)(left / UNIT));
    r = take(s, shard, (u32)(in_all / UNIT));
    r->key = *key;
    r->size = (u32)size;
    to = r->data;
    for (unsigned n = 0; n < nparts; n++) {
        memcpy(to, parts[n].iov_base, parts[n].iov_len);
        to += parts[n].iov_len;
    }
    bucket = bucket_of(shard, key);
    r->next = *bucket;
    r->chained = true;
    *bucket = place_of(shard, r);
    pthread_mutex_unlock(&shard->lock);
}

size_t bt_store_get(struct bt_store *s, const struct bt_store_key *key, void *to, size_t room)
{
    struct shard *shard = shard_of(s, key);
    size_t size = 0;
    u32 place;

    pthread_mutex_lock(&shard->lock);
    place = *find(shard, key);
    if (place && record_at(shard, place)->size <= room) {
        size = record_at(shard, place)->size;
        memcpy(to, record_at(shard, place)->data, size);
    }
    pthread_mutex_unlock(&shard->lock);
    return size;
}
