/*
 * The store: what the vCPUs of a machine let each other have of their translations.
 *
 * It holds records, each a copy of some bytes that it knows nothing of, by the block's key: the guest-physical
 * addresses of its one or two pages, the mode, and the linear address of a placed block's page. A key has one
 * record at most, the last. Nothing is dropped when guest code changes: who takes a record compares.
 *
 * Memory is bounded. The oldest records make room for new ones.
 *
 * Any vCPU's thread may use it. A lock is held while a record is copied and its neighbours are looked at; there are
 * several, by the page, and who runs translated code takes none.
 */
#ifndef DOPPEL_ENGINE_SOFT_BT_STORE_H
#define DOPPEL_ENGINE_SOFT_BT_STORE_H

#include "host/error.h"
#include "host/types.h"

#include <stddef.h>
#include <sys/uio.h>

struct bt_store_key {
    gpa_t gpa, gpa2;
    gva_t page;
    u64 mode;
};

struct bt_store;

/* `size` bytes are kept of records at most. NULL, err set: no memory. */
struct bt_store *bt_store_create(size_t size, struct error *err);
/* NULL is nothing. */
void bt_store_destroy(struct bt_store *s);

/* Keeps a copy of the parts, one behind the other, in the place of the key's record. One that is too large is not. */
void bt_store_put(struct bt_store *s, const struct bt_store_key *key, const struct iovec *parts,
                  unsigned nparts);

/* Copies the key's record to `to`. Returns its size; 0: there is none, or none that fits into `room`. */
size_t bt_store_get(struct bt_store *s, const struct bt_store_key *key, void *to, size_t room);

/* Bytes of host memory that records take. */
u64 bt_store_bytes(struct bt_store *s);

#endif
