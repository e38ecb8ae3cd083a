#include "control/hotplug.h"

#include "block/block.h"

#include <errno.h>
#include <string.h>

static struct hotplug_card *find(struct hotplug *h, const char *name)
{
    for (unsigned i = 0; i < h->slots; i++) {
        if (!strcmp(h->cards[i].name, name))
            return &h->cards[i];
    }
    return NULL;
}

static void close_card(struct hotplug_card *card)
{
    block_destroy(card->machine_disk.backend);
    net_close(card->net);
    *card = (struct hotplug_card){0};
}

static int add_disk(struct hotplug *h, struct hotplug_card *card, const char *what,
                    struct error *err)
{
    int ret = h->config.parse_disk(what, &card->disk, err);

    if (ret)
        return ret;
    if (card->disk.bus == MACHINE_DISK_IDE)
        return error_input(err, "an IDE disk can't be added: give bus=nvme, or leave bus= out");
    ret = cards_open_disk(&card->disk, h->config.loop, &card->machine_disk, err);
    return ret ? ret
               : machine_plug_disk(h->machine, (unsigned)(card - h->cards), &card->machine_disk,
                                   err);
}

static int add_net(struct hotplug *h, struct hotplug_card *card, const char *what,
                   struct error *err)
{
    unsigned slot = (unsigned)(card - h->cards);

    card->net =
        cards_open_net(what, h->config.name, h->config.first_net + slot, h->config.loop, err);
    return card->net ? machine_plug_net(h->machine, slot, card->net, err) : -EIO;
}

int hotplug_add(struct hotplug *h, const char *name, const char *kind, const char *what,
                struct error *err)
{
    bool disk = !strcmp(kind, "disk");
    struct hotplug_card *card;
    int ret;

    if (!disk && strcmp(kind, "net"))
        return error_input(err, "there is no card '%s': give disk or net", kind);
    if (!*name || strlen(name) >= sizeof(card->name))
        return error_input(err, "a name has 1 to %zu characters", sizeof(card->name) - 1);
    if (find(h, name))
        return error_input(err, "there is a card '%s': give another name, or remove it first",
                           name);
    card = find(h, "");
    if (!card)
        return error_input(err,
                           h->slots ? "all %u slots are taken: remove a card first"
                                    : "the machine has %u slots: start it with --slots N",
                           h->slots);
    strcpy(card->name, name);
    card->kind = disk ? "disk" : "net";
    ret = disk ? add_disk(h, card, what, err) : add_net(h, card, what, err);
    if (ret)
        close_card(card);
    return ret;
}

int hotplug_remove(struct hotplug *h, const char *name, bool force, struct error *err)
{
    struct hotplug_card *card = *name ? find(h, name) : NULL;

    if (!card)
        return error_input(err, "no card '%s' was added", name);
    return machine_unplug(h->machine, (unsigned)(card - h->cards), force, err);
}

void hotplug_card_gone(struct hotplug *h, unsigned slot)
{
    struct hotplug_card *card = &h->cards[slot];
    char name[HOTPLUG_NAME_MAX];

    strcpy(name, card->name);
    close_card(card);
    h->config.gone(h->config.opaque, name);
}

void hotplug_close(struct hotplug *h)
{
    for (unsigned i = 0; i < h->slots; i++)
        close_card(&h->cards[i]);
}
