/*
 * The log: one line a message on stderr, "doppel: level: text". Thread-safe.
 *
 * Levels: error and warn always; info unless quiet; debug only under DOPPEL_LOG=debug.
 * `log_once` is for what a guest can provoke at will: each call site (or, with log_once_key, each key
 * at a call site) speaks once per process.
 */
#ifndef DOPPEL_HOST_LOG_H
#define DOPPEL_HOST_LOG_H

#include "host/types.h"
#include <stdatomic.h>

enum log_level { LOG_ERROR, LOG_WARN, LOG_INFO, LOG_DEBUG };

void log_set_level(enum log_level level);
/* While a terminal is raw, lines must end in CR LF. */
void log_set_terminal_raw(bool raw);
/* Whether a message of this level would be written now. */
bool log_enabled(enum log_level level);
void log_message(enum log_level level, const char *fmt, ...) PRINTF_LIKE(2, 3);

#define log_error(...) log_message(LOG_ERROR, __VA_ARGS__)
#define log_warn(...) log_message(LOG_WARN, __VA_ARGS__)
#define log_info(...) log_message(LOG_INFO, __VA_ARGS__)
#define log_debug(...) log_message(LOG_DEBUG, __VA_ARGS__)

#define log_once(level, ...)                                                                       \
    do {                                                                                           \
        static atomic_flag said_ = ATOMIC_FLAG_INIT;                                               \
        if (!atomic_flag_test_and_set(&said_))                                                     \
            log_message(level, __VA_ARGS__);                                                       \
    } while (0)

/* True the first time that `key` is seen (a bounded set: after 1024 keys always false). */
bool log_first_time(u64 key);

#endif
