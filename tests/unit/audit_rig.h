/*
 * Where the tests of the audit write their code: a cache with room for one block and one exit, and ways out at addresses
 * of their own.
 */
#ifndef DOPPEL_TESTS_UNIT_AUDIT_RIG_H
#define DOPPEL_TESTS_UNIT_AUDIT_RIG_H

#include "engine/soft/bt/bt.h"

#include <stdlib.h>

#define CODE_SIZE 4096u
#define HOT 64u
#define COLD 2048u

/* *block begins at HOT, where all of its entries are, and borrows nothing. Destroy it with code_destroy. */
static inline struct bt *code_create(struct bt_block *block, struct bt_exit *exit)
{
    struct bt *bt = calloc(1, sizeof(*bt));

    bt->writable = calloc(1, CODE_SIZE);
    bt->executable = bt->writable;
    bt->exits = exit;
    for (unsigned n = 0; n <= BT_FAULT; n++)
        bt->glue[n] = n;
    *block = (struct bt_block){.start = {{.hot = HOT, .cold = COLD}},
                               .jump_entry = HOT,
                               .memory_entry = HOT,
                               .host_entry = HOT,
                               .memory_native = HOT,
                               .host_native = HOT,
                               .fault = BT_FAULT,
                               .perm = {NO_REG, NO_REG, NO_REG, NO_REG}};
    return bt;
}

static inline void code_destroy(struct bt *bt)
{
    free(bt->writable);
    free(bt);
}

#endif
