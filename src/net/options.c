/*
 * The text of --net.
 */
#include "net/backend.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

/* Strict: all of the text, decimal. */
static int parse_int(const char *key, const char *text, unsigned long min, unsigned long max,
                     unsigned long *out, struct error *err)
{
    char *end;

    errno = 0;
    *out = strtoul(text, &end, 10);
    if (*text < '0' || *text > '9' || *end || errno || *out < min || *out > max)
        return error_input(err, "%s is a number from %lu to %lu, unlike '%s'", key, min, max, text);
    return 0;
}

static int hex_digit(char c)
{
    if (c >= '0' && c <= '9')
        return c - '0';
    c |= 0x20;
    return c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
}

static int parse_mac(struct net_options *o, const char *text, struct error *err)
{
    bool good = strlen(text) == 3 * NET_MAC_SIZE - 1;

    for (unsigned i = 0; i < NET_MAC_SIZE && good; i++) {
        int high = hex_digit(text[3 * i]), low = hex_digit(text[3 * i + 1]);

        good = high >= 0 && low >= 0 && (i == NET_MAC_SIZE - 1 || text[3 * i + 2] == ':');
        o->mac[i] = (u8)(high << 4 | low);
    }
    if (!good)
        return error_input(err, "'%s' is no MAC address: give one such as 52:54:00:12:34:56", text);
    if (o->mac[0] & 1)
        return error_input(err, "mac=%s is a group's address: make the first byte even", text);
    o->have_mac = true;
    return 0;
}

static int parse_key(struct net_options *o, const char *key, const char *value, struct error *err)
{
    unsigned long n;
    bool user = !strcmp(o->kind, "user"), tap = !strcmp(o->kind, "tap");

    if (!strcmp(key, "mac"))
        return parse_mac(o, value, err);
    if (!strcmp(key, "pcap")) {
        o->pcap = value;
        return 0;
    }
    if (!strcmp(key, "mtu")) {
        if (parse_int(key, value, NET_MTU_MIN, NET_MTU_MAX, &n, err))
            return -EINVAL;
        o->mtu = (u16)n;
        o->have_mtu = true;
        return 0;
    }
    if (tap && !strcmp(key, "queues")) {
        if (parse_int(key, value, 1, NET_QUEUES_MAX, &n, err))
            return -EINVAL;
        o->queues = (unsigned)n;
        o->have_queues = true;
        return 0;
    }
    if (user && !strcmp(key, "hostfwd")) {
        if (o->nforwards == NET_FORWARDS_MAX)
            return error_input(err, "more than %d of hostfwd", NET_FORWARDS_MAX);
        o->forwards[o->nforwards++] = value;
        return 0;
    }
    if (user && (!strcmp(key, "tftp") || !strcmp(key, "bootfile"))) {
        *(key[0] == 't' ? &o->tftp : &o->bootfile) = value;
        return 0;
    }
    return error_input(err, "%s has no option '%s'%s", o->kind, key,
                       user  ? ": hostfwd, tftp, bootfile, mac, mtu and pcap"
                       : tap ? ": queues, mac, mtu and pcap"
                             : ": mac, mtu and pcap");
}

int net_options_parse(struct net_options *o, const char *spec, struct error *err)
{
    char *next, *value;

    *o = (struct net_options){.queues = 1};
    o->text = strdup(spec);
    if (!o->text)
        return error_host(err, ENOMEM, "%s", spec);
    next = o->text;
    o->kind = strsep(&next, ",");
    value = strchr(o->kind, '=');
    if (value) {
        *value = 0;
        o->argument = value + 1;
    }
    while (next) {
        char *key = strsep(&next, ",");

        value = strchr(key, '=');
        if (!value || !value[1])
            return error_input(err, "'%s': give KEY=VALUE after a comma", key);
        *value = 0;
        if (parse_key(o, key, value + 1, err))
            return -EINVAL;
    }
    return 0;
}

void net_options_free(struct net_options *o)
{
    free(o->text);
}
