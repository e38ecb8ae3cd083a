/*
 * Cards that come and go while the machine runs: their names, the slots that they are in (machine_plug_disk), and
 * what they work with. All on the loop's thread.
 */
#ifndef DOPPEL_CONTROL_HOTPLUG_H
#define DOPPEL_CONTROL_HOTPLUG_H

#include "control/cards.h"
#include "machine/machine.h"

#define HOTPLUG_NAME_MAX 64 /* with its NUL */

struct hotplug_config {
    struct event_loop *loop;
    const char *name;   /* of the machine */
    unsigned first_net; /* network cards that it has without */
    vm_parse_disk *parse_disk;
    /* The card of this name has gone; its name is free. */
    void (*gone)(void *opaque, const char *name);
    void *opaque;
};

struct hotplug {
    struct hotplug_config config;
    struct machine *machine; /* whoever creates it sets it */
    struct hotplug_card {
        char name[HOTPLUG_NAME_MAX]; /* empty: the slot is */
        const char *kind;
        struct vm_disk disk;
        struct machine_disk machine_disk;
        struct net_backend *net;
    } cards[MACHINE_SLOTS_MAX];
    unsigned slots;
};

/*
 * Puts a card into the first free slot. kind: "disk", then `what` is as --disk has it, or "net", as --net. 0, or
 * -errno with err set.
 */
int hotplug_add(struct hotplug *h, const char *name, const char *kind, const char *what,
                struct error *err);
/* Asks the guest to let it go (config.gone follows), or pulls it out (machine_unplug). */
int hotplug_remove(struct hotplug *h, const char *name, bool force, struct error *err);
/* For machine_config.card_gone. */
void hotplug_card_gone(struct hotplug *h, unsigned slot);
/* After the machine's end. */
void hotplug_close(struct hotplug *h);

#endif
