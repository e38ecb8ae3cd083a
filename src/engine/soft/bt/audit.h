/*
 * The audit of translated code, for builds with -Daudit=true: each block is read again, as the host's
 * processor will read it, and must keep the emitter's invariant. See audit.c.
 */
#ifndef DOPPEL_ENGINE_SOFT_BT_AUDIT_H
#define DOPPEL_ENGINE_SOFT_BT_AUDIT_H

#include "engine/soft/bt/bt.h"

#ifndef BT_AUDIT
#define BT_AUDIT 0 /* whether bt_translate has each block audited */
#endif

struct bt_fault_found {
    u32 at; /* code offset */
    const char *what;
};

/*
 * Whether the block, not linked yet, keeps the invariant; `sites` are the numbers of its first site and of
 * the one behind its last. If not, *found says where and why.
 */
bool bt_audit(const struct bt *bt, const struct bt_block *b, const u32 sites[2],
              struct bt_fault_found *found);

#endif
