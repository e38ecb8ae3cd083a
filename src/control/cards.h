/*
 * What cards of the machine work with, opened as the user described it: of those that it begins with, and of those
 * that are added later.
 */
#ifndef DOPPEL_CONTROL_CARDS_H
#define DOPPEL_CONTROL_CARDS_H

#include "control/vm.h"
#include "host/event_loop.h"
#include "machine/cards.h"
#include "net/net.h"

/* *out borrows d's strings; block_destroy ends its backend. 0 or -errno with err set. */
int cards_open_disk(const struct vm_disk *d, struct event_loop *loop, struct machine_disk *out,
                    struct error *err);
/* A raw image, all of whose space is there to be written; block_destroy ends it. NULL with err set. */
struct block_backend *cards_open_pmem(const struct vm_pmem *p, struct event_loop *loop,
                                      struct error *err);
/* The nth network card of the machine of that name, which its MAC address comes from. NULL with err set. */
struct net_backend *cards_open_net(const char *spec, const char *name, unsigned n,
                                   struct event_loop *loop, struct error *err);

#endif
