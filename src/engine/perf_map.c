/*
 * perf's map of translated code. See perf_map.h.
 */
#define _GNU_SOURCE
#include "engine/perf_map.h"

#include "host/log.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define SYMBOLS_MAX MIB(64) /* bytes of a System.map */
#define BUFFER_SIZE KIB(256)

struct symbol {
    u64 address;
    const char *name;
};

struct perf_map {
    FILE *file;
    pthread_mutex_t lock;
    char *text; /* of the System.map, cut into names */
    struct symbol *symbols;
    size_t nsymbols;
};

/* --- Symbols --- */

static int compare_symbols(const void *a, const void *b)
{
    const struct symbol *x = a, *y = b;

    return x->address < y->address ? -1 : x->address > y->address;
}

/* A line is an address, one letter for the kind, and the name; T, t, W and w are code. */
static bool parse_line(char *line, struct symbol *s)
{
    char *end, *name;

    errno = 0;
    s->address = strtoull(line, &end, 16);
    if (errno || end == line || end[0] != ' ' || !end[1] || !strchr("TtWw", end[1]) ||
        end[2] != ' ')
        return false;
    name = end + 3;
    name[strcspn(name, " \t\r")] = '\0';
    s->name = name;
    return *name;
}

static size_t count_lines(const char *text)
{
    size_t n = 1;

    for (; (text = strchr(text, '\n')); text++)
        n++;
    return n;
}

static int parse_symbols(struct perf_map *m, const char *path, struct error *err)
{
    char *save = NULL;

    m->symbols = calloc(count_lines(m->text), sizeof(*m->symbols));
    if (!m->symbols)
        return error_host(err, ENOMEM, "the symbols of %s", path);
    for (char *line = strtok_r(m->text, "\n", &save); line; line = strtok_r(NULL, "\n", &save))
        if (parse_line(line, &m->symbols[m->nsymbols]))
            m->nsymbols++;
    if (!m->nsymbols)
        return error_input(err, "%s: no System.map: it has no symbols of code", path);
    qsort(m->symbols, m->nsymbols, sizeof(*m->symbols), compare_symbols);
    return 0;
}

static int read_symbols(struct perf_map *m, const char *path, struct error *err)
{
    FILE *file = fopen(path, "re");
    struct stat st;
    size_t len;
    int ret = 0;

    if (!file)
        return error_input(err, "%s: %s", path, strerror(errno));
    if (fstat(fileno(file), &st) != 0 || !S_ISREG(st.st_mode) || st.st_size > (off_t)SYMBOLS_MAX) {
        ret = error_input(err, "%s: no System.map: not a file, or too large", path);
        goto out;
    }
    m->text = malloc((size_t)st.st_size + 1);
    if (!m->text) {
        ret = error_host(err, ENOMEM, "reading %s", path);
        goto out;
    }
    len = fread(m->text, 1, (size_t)st.st_size, file);
    m->text[len] = '\0';
    ret = parse_symbols(m, path, err);
out:
    fclose(file);
    return ret;
}

/* The last symbol at or before an address, or NULL. */
static const struct symbol *find_symbol(const struct perf_map *m, u64 address)
{
    size_t low = 0, high = m->nsymbols;

    while (low < high) {
        size_t middle = (low + high) / 2;

        if (m->symbols[middle].address <= address)
            low = middle + 1;
        else
            high = middle;
    }
    return low ? &m->symbols[low - 1] : NULL;
}

/* --- The file --- */

/* In a folder that anybody may write to: what is there goes, and is not written through. */
static int open_map(struct perf_map *m, struct error *err)
{
    char path[64];
    int fd;

    snprintf(path, sizeof(path), "/tmp/perf-%d.map", (int)getpid());
    unlink(path);
    fd = open(path, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0644);
    m->file = fd >= 0 ? fdopen(fd, "w") : NULL;
    if (!m->file) {
        int error = errno;

        if (fd >= 0)
            close(fd);
        return error_host(err, error, "%s", path);
    }
    setvbuf(m->file, NULL, _IOFBF, BUFFER_SIZE);
    return 0;
}

struct perf_map *perf_map_create(const char *symbols, struct error *err)
{
    struct perf_map *m = calloc(1, sizeof(*m));

    if (!m) {
        error_host(err, ENOMEM, "perf's map");
        return NULL;
    }
    pthread_mutex_init(&m->lock, NULL);
    if ((*symbols && read_symbols(m, symbols, err)) || open_map(m, err)) {
        perf_map_destroy(m);
        return NULL;
    }
    return m;
}

void perf_map_destroy(struct perf_map *m)
{
    if (!m)
        return;
    if (m->file) {
        bool failed = ferror(m->file);

        if (fclose(m->file) != 0 || failed)
            log_warn("perf's map is not complete: %s", strerror(errno));
    }
    pthread_mutex_destroy(&m->lock);
    free(m->symbols);
    free(m->text);
    free(m);
}

void perf_map_add(struct perf_map *m, const void *code, size_t size, u64 lin, bool user)
{
    const struct symbol *s = user ? NULL : find_symbol(m, lin);

    if (!size)
        return;
    pthread_mutex_lock(&m->lock);
    if (s)
        fprintf(m->file, "%" PRIxPTR " %zx %s\n", (uintptr_t)code, size, s->name);
    else
        fprintf(m->file, "%" PRIxPTR " %zx guest_%s_%" PRIx64 "\n", (uintptr_t)code, size,
                user ? "user" : "kernel", lin);
    pthread_mutex_unlock(&m->lock);
}
