#include "host/log.h"

#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static const char *const level_names[] = {
    [LOG_ERROR] = "error",
    [LOG_WARN] = "warning",
    [LOG_INFO] = "info",
    [LOG_DEBUG] = "debug",
};

static atomic_int max_level = LOG_INFO;
static atomic_bool terminal_raw;
static pthread_once_t environment_once = PTHREAD_ONCE_INIT;

/* DOPPEL_LOG names the last level to show; it has precedence over log_set_level. */
static atomic_int environment_level = -1;

static void read_environment(void)
{
    const char *wanted = getenv("DOPPEL_LOG");

    for (unsigned i = 0; wanted && i < ARRAY_SIZE(level_names); i++) {
        if (strcmp(wanted, level_names[i]) == 0)
            environment_level = (int)i;
    }
}

void log_set_level(enum log_level level)
{
    max_level = (int)level;
}

void log_set_terminal_raw(bool raw)
{
    terminal_raw = raw && isatty(STDERR_FILENO);
}

bool log_enabled(enum log_level level)
{
    int limit;

    pthread_once(&environment_once, read_environment);
    limit = environment_level >= 0 ? environment_level : max_level;
    return level <= LOG_WARN || (int)level <= limit;
}

void log_message(enum log_level level, const char *fmt, ...)
{
    char line[1024];
    va_list args;
    size_t used;

    if (!log_enabled(level))
        return;

    used = (size_t)snprintf(line, sizeof(line) - 2, "doppel: %s: ", level_names[level]);
    va_start(args, fmt);
    vsnprintf(line + used, sizeof(line) - 2 - used, fmt, args);
    va_end(args);
    used = strlen(line);
    if (terminal_raw)
        line[used++] = '\r';
    line[used++] = '\n';

    /* One write, so that lines of several threads and processes don't mix. A log has no log to
     * complain to when it fails. */
    if (write(STDERR_FILENO, line, used) < 0)
        return;
}

#define FIRST_TIME_KEYS 1024

bool log_first_time(u64 key)
{
    static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
    static struct {
        u64 key;
        bool used;
    } seen[FIRST_TIME_KEYS * 2]; /* open addressing, at most half full */
    static unsigned nseen;
    size_t slot = (key * 0x9e3779b97f4a7c15ULL >> 32) % ARRAY_SIZE(seen);
    bool first;

    pthread_mutex_lock(&lock);
    while (seen[slot].used && seen[slot].key != key)
        slot = (slot + 1) % ARRAY_SIZE(seen);
    first = !seen[slot].used && nseen < FIRST_TIME_KEYS;
    if (first) {
        seen[slot].key = key;
        seen[slot].used = true;
        nseen++;
    }
    pthread_mutex_unlock(&lock);
    return first;
}
