#include "cli/parse.h"

#include <ctype.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define MAX_CPUS 255
#define NAME_MAX_LENGTH 63

int parse_number(const char *text, u64 min, u64 max, u64 *out, struct error *err)
{
    bool hex = text[0] == '0' && (text[1] == 'x' || text[1] == 'X');
    const char *digits = hex ? text + 2 : text;
    unsigned long long value;
    char *end;

    /* strtoull alone would take spaces, signs and, in base 0, octal. */
    if (!(hex ? isxdigit((unsigned char)*digits) : isdigit((unsigned char)*digits)))
        return error_input(err, "'%s' is not a number", text);
    errno = 0;
    value = strtoull(digits, &end, hex ? 16 : 10);
    if (*end)
        return error_input(err, "'%s' is not a number", text);
    if (errno || value < min || value > max)
        return error_input(err, "%s is out of range: give %llu to %llu", text,
                           (unsigned long long)min, (unsigned long long)max);
    *out = value;
    return 0;
}

int parse_size(const char *text, u64 *out, struct error *err)
{
    static const char units[] = "KMGT";
    unsigned long long value;
    const char *unit;
    unsigned shift;
    char *end;

    if (!isdigit((unsigned char)*text))
        return error_input(err, "'%s' is not a size: give one such as 512M or 2G", text);
    errno = 0;
    value = strtoull(text, &end, 10);
    if (!*end)
        return error_input(err, "'%s' has no unit: give one such as 512M or 2G", text);
    unit = strchr(units, *end);
    if (!unit || end[1])
        return error_input(err, "'%s' is not a size: give one such as 512M or 2G", text);
    shift = 10 * (unsigned)(unit - units + 1);
    if (errno || value > UINT64_MAX >> shift)
        return error_input(err, "%s is more than 64 bits can count", text);
    *out = (u64)value << shift;
    return 0;
}

int parse_name(const char *text, struct error *err)
{
    size_t len = strlen(text);

    if (len < 1 || len > NAME_MAX_LENGTH)
        return error_input(err, "a name has 1 to %d characters", NAME_MAX_LENGTH);
    if (!isalnum((unsigned char)text[0]))
        return error_input(err, "'%s' must begin with a letter or digit", text);
    for (size_t i = 1; i < len; i++) {
        if (!isalnum((unsigned char)text[i]) && !strchr("-_.", text[i]))
            return error_input(err, "'%s' may hold letters, digits, '-', '_' and '.' only", text);
    }
    return 0;
}

int parse_file_options(const char *text, char *file, size_t file_size, const char **options,
                       struct error *err)
{
    size_t n = 0;

    for (; *text && (*text != ',' || text[1] == ','); text++) {
        text += *text == ',';
        if (n + 1 == file_size)
            return error_input(err, "the file name is too long");
        file[n++] = *text;
    }
    file[n] = '\0';
    if (!n)
        return error_input(err, "the file name is empty");
    *options = *text ? text + 1 : NULL;
    return 0;
}

int parse_next_option(const char **options, char *key, size_t key_size, char *value,
                      size_t value_size, struct error *err)
{
    const char *text = *options;
    size_t len, key_len;

    if (!text)
        return 0;
    len = strcspn(text, ",");
    key_len = strcspn(text, "=");
    if (key_len >= len || key_len >= key_size || len - key_len - 1 >= value_size)
        return error_input(err, "'%.*s' is no KEY=VALUE that is known here", (int)len, text);
    memcpy(key, text, key_len);
    key[key_len] = '\0';
    memcpy(value, text + key_len + 1, len - key_len - 1);
    value[len - key_len - 1] = '\0';
    *options = text[len] ? text + len + 1 : NULL;
    return 1;
}

/* One of a topology's numbers by its name, or NULL. */
static unsigned *topology_number(struct cpu_topology *t, const char *name)
{
    if (!strcmp(name, "sockets"))
        return &t->sockets;
    if (!strcmp(name, "cores"))
        return &t->cores;
    return strcmp(name, "threads") ? NULL : &t->threads;
}

int parse_cpus(const char *text, unsigned *cpus, struct cpu_topology *topology, struct error *err)
{
    struct cpu_topology t = {0};
    char word[16], value[16];
    const char *options;
    u64 count, n;
    int ret;

    ret = parse_file_options(text, word, sizeof(word), &options, err);
    if (ret || parse_number(word, 1, MAX_CPUS, &count, err))
        return -EINVAL;
    while ((ret = parse_next_option(&options, word, sizeof(word), value, sizeof(value), err)) > 0) {
        unsigned *number = topology_number(&t, word);

        if (!number)
            return error_input(err, "unknown option '%s': give sockets, cores or threads", word);
        if (parse_number(value, 1, MAX_CPUS, &n, err))
            return -EINVAL;
        *number = (unsigned)n;
    }
    if (ret)
        return ret;
    t.threads = t.threads ? t.threads : 1;
    if (!t.cores)
        t.cores = (unsigned)MAX(count / ((u64)MAX(t.sockets, 1u) * t.threads), 1);
    if (!t.sockets)
        t.sockets = (unsigned)MAX(count / ((u64)t.cores * t.threads), 1);
    if ((u64)t.sockets * t.cores * t.threads != count)
        return error_input(
            err, "%u sockets of %u cores of %u threads are %llu processors, not %llu", t.sockets,
            t.cores, t.threads, (unsigned long long)t.sockets * t.cores * t.threads,
            (unsigned long long)count);
    *cpus = (unsigned)count;
    *topology = t;
    return 0;
}

/* The number at *text, which is moved behind it. False: there is none, or it is too large. */
static bool parse_processor(const char **text, unsigned long *number)
{
    char *end;

    if (!isdigit((unsigned char)**text))
        return false;
    *number = strtoul(*text, &end, 10);
    *text = end;
    return *number <= PROCESSOR_NUMBER_MAX;
}

/* A number or a range, into the list. */
static int parse_range(const char **text, struct processor_list *list)
{
    unsigned long first, last;

    if (!parse_processor(text, &first))
        return -EINVAL;
    last = first;
    if (**text == '-') {
        (*text)++;
        if (!parse_processor(text, &last) || last < first)
            return -EINVAL;
    }
    if (last - first >= PROCESSOR_LIST_MAX - list->count)
        return -EINVAL;
    while (first <= last)
        list->number[list->count++] = (u16)first++;
    return 0;
}

int parse_processors(const char *text, struct processor_list *list, struct error *err)
{
    const char *at = text;

    list->count = 0;
    while (parse_range(&at, list) == 0) {
        if (!*at)
            return 0;
        if (*at++ != ',')
            break;
    }
    return error_input(err, "'%s': give up to %d processors of the host's, such as 0-3,8", text,
                       PROCESSOR_LIST_MAX);
}

int parse_pv_features(const char *text, u32 *bits, struct error *err)
{
    static const struct {
        const char *name;
        u32 bits;
    } features[] = {
        {"clock", BIT(0) | BIT(3) | BIT(24)},
        {"steal-time", BIT(5)},
        {"eoi", BIT(6)},
        {"unhalt", BIT(7)},
        {"tlb-flush", BIT(9)},
        {"ipi", BIT(11)},
        {"yield", BIT(13)},
        {"async-pf", BIT(4) | BIT(10) | BIT(14)},
        {"all", UINT32_MAX},
    };

    *bits = 0;
    for (;;) {
        size_t len = strcspn(text, ","), i = 0;

        while (i < ARRAY_SIZE(features) &&
               (strlen(features[i].name) != len || strncmp(features[i].name, text, len) != 0))
            i++;
        if (i == ARRAY_SIZE(features))
            return error_input(err,
                               "unknown feature '%.*s': give clock, steal-time, eoi, unhalt, "
                               "tlb-flush, ipi, yield, async-pf or all",
                               (int)len, text);
        *bits |= features[i].bits;
        if (!text[len])
            return 0;
        text += len + 1;
    }
}
