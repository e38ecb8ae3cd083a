#include "control/control.h"

#include "chardev/chardev.h"
#include "control/hotplug.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define LINE_MAX_LENGTH 2048 /* of a command, with its NUL */

struct control {
    struct chardev *chr;
    struct hotplug hotplug;
    /* What came of a line, and what of an answer wasn't taken yet. */
    char line[LINE_MAX_LENGTH];
    size_t length;
    bool too_long; /* the rest of the line is dropped */
    char *unsent;
    size_t unsent_length;
};

/* ---- answers ---- */

static void send_unsent(struct control *c)
{
    size_t n = chardev_write(c->chr, (const u8 *)c->unsent, c->unsent_length);

    c->unsent_length -= n;
    memmove(c->unsent, c->unsent + n, c->unsent_length);
}

/* "WORD TEXT\n". A client that doesn't read its answers gives no more commands until it does. */
static void say(struct control *c, const char *word, const char *text)
{
    size_t more = strlen(word) + strlen(text) + 3;
    char *all = realloc(c->unsent, c->unsent_length + more);

    if (!all)
        return;
    c->unsent = all;
    c->unsent_length +=
        (size_t)snprintf(all + c->unsent_length, more, *text ? "%s %s\n" : "%s%s\n", word, text);
    send_unsent(c);
}

/* ---- commands: words, of which the last may be the rest of the line ---- */

static char *next_word(char **rest)
{
    char *word = *rest + strspn(*rest, " ");

    *rest = word + strcspn(word, " ");
    if (**rest)
        *(*rest)++ = '\0';
    return word;
}

static int device_add(struct control *c, char *rest, struct error *err)
{
    char *name = next_word(&rest), *kind = next_word(&rest);

    rest += strspn(rest, " ");
    return hotplug_add(&c->hotplug, name, kind, rest, err);
}

static int device_del(struct control *c, char *rest, struct error *err)
{
    char *name = next_word(&rest), *how = next_word(&rest);

    if (*how && strcmp(how, "force"))
        return error_input(err, "unknown word '%s': give force or nothing", how);
    return hotplug_remove(&c->hotplug, name, *how, err);
}

static int devices(struct control *c, char *rest, struct error *err)
{
    for (unsigned i = 0; i < c->hotplug.slots; i++) {
        const struct hotplug_card *card = &c->hotplug.cards[i];
        char text[HOTPLUG_NAME_MAX + 32];

        snprintf(text, sizeof(text), "%u %s %s", i + 1, card->kind, card->name);
        if (card->kind)
            say(c, "slot", text);
    }
    return 0;
}

static const struct {
    const char *name;
    int (*run)(struct control *c, char *rest, struct error *err);
} commands[] = {{"device_add", device_add}, {"device_del", device_del}, {"devices", devices}};

static int run(struct control *c, char *rest, struct error *err)
{
    const char *name = next_word(&rest);

    for (size_t i = 0; i < ARRAY_SIZE(commands); i++) {
        if (!strcmp(commands[i].name, name))
            return commands[i].run(c, rest, err);
    }
    return error_input(err, "unknown command '%s': give device_add, device_del or devices", name);
}

static void take_line(struct control *c)
{
    struct error err;
    int ret;

    c->line[c->length] = '\0';
    if (c->too_long)
        ret = error_input(&err, "a command has %d characters at most", LINE_MAX_LENGTH - 1);
    else
        ret = run(c, c->line, &err);
    c->length = 0;
    c->too_long = false;
    if (ret)
        say(c, "error", err.text);
    else
        say(c, "ok", "");
}

/* ---- the stream's handlers ---- */

static size_t can_receive(void *opaque)
{
    struct control *c = opaque;

    return c->unsent_length ? 0 : LINE_MAX_LENGTH;
}

static size_t receive(void *opaque, const u8 *buf, size_t len)
{
    struct control *c = opaque;

    for (size_t i = 0; i < len; i++) {
        if (buf[i] == '\n')
            take_line(c);
        else if (c->length + 1 < sizeof(c->line))
            c->line[c->length++] = (char)buf[i];
        else
            c->too_long = true;
    }
    return len;
}

static void writable(void *opaque)
{
    struct control *c = opaque;

    send_unsent(c);
    if (!c->unsent_length)
        chardev_accept_input(c->chr);
}

static void receive_break(void *opaque)
{
}

static void card_gone(void *opaque, const char *name)
{
    say(opaque, "removed", name);
}

/* ---- life ---- */

struct control *control_open(const struct vm_config *config, struct event_loop *loop,
                             struct error *err)
{
    struct control *c = calloc(1, sizeof(*c));

    if (!c) {
        error_host(err, ENOMEM, "control");
        return NULL;
    }
    c->hotplug.config = (struct hotplug_config){
        .loop = loop,
        .name = config->name,
        .first_net = config->nnets,
        .parse_disk = config->parse_disk,
        .gone = card_gone,
        .opaque = c,
    };
    c->hotplug.slots = config->slots;
    c->chr = chardev_open(config->control, loop, &(struct chardev_owner){0}, err);
    if (c->chr)
        return c;
    free(c);
    return NULL;
}

void control_attach(struct control *c, struct machine *machine)
{
    struct chardev_handlers handlers = {can_receive, receive, writable, receive_break, c};

    c->hotplug.machine = machine;
    chardev_attach(c->chr, &handlers);
}

void control_card_gone(void *opaque, unsigned slot)
{
    struct control *c = opaque;

    hotplug_card_gone(&c->hotplug, slot);
}

void control_detach(struct control *c)
{
    chardev_attach(c->chr, NULL);
}

void control_close(struct control *c)
{
    if (!c)
        return;
    chardev_close(c->chr);
    hotplug_close(&c->hotplug);
    free(c->unsent);
    free(c);
}
