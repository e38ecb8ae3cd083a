/*
 * This process's stdin and stdout.
 *
 * Both may be shared with other processes (the shell, the rest of a pipeline), which O_NONBLOCK would
 * confuse, and either may be a regular file, which epoll refuses. So a thread each reads and writes them,
 * blocking.
 *
 * A terminal on stdin becomes raw, so that the guest gets every key. What must never happen is that doppel
 * is gone and the terminal still raw: it is restored when the stream closes, at exit, and by a handler
 * for those signals that would end the process and that nobody else handles.
 */
#include "chardev/internal.h"
#include "host/log.h"

#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <termios.h>
#include <unistd.h>

#define ESCAPE_KEY 0x01 /* Ctrl-A */

static const char escape_help[] = "\r\n"
                                  "Ctrl-A x  end the VM\r\n"
                                  "Ctrl-A b  send a break (Linux: SysRq, then its key)\r\n"
                                  "Ctrl-A a  send Ctrl-A to the guest (so does Ctrl-A twice)\r\n"
                                  "Ctrl-A h  show this\r\n";

struct stdio_chardev {
    struct chardev chr;
    struct chardev_writer writer;
    pthread_t reader;
    bool escape_keys; /* stdin is a terminal */
    bool escaped;     /* the last key was Ctrl-A */
};

/* ---- the terminal: one a process, as stdin is ---- */

static const int fatal_signals[] = {SIGHUP,  SIGINT, SIGQUIT, SIGTERM, SIGABRT,
                                    SIGSEGV, SIGBUS, SIGILL,  SIGFPE};

static atomic_flag stdio_taken = ATOMIC_FLAG_INIT;
static atomic_bool terminal_raw;
static struct termios terminal_saved; /* valid while terminal_raw */

/* Async-signal-safe. */
static void terminal_restore(void)
{
    if (atomic_exchange(&terminal_raw, false))
        tcsetattr(STDIN_FILENO, TCSANOW, &terminal_saved);
}

/* Installed with SA_RESETHAND: the signal raised again ends the process as it would have. */
static void restore_and_die(int signal_number)
{
    terminal_restore();
    raise(signal_number);
}

static void signals_catch(void)
{
    struct sigaction action = {.sa_handler = restore_and_die, .sa_flags = (int)SA_RESETHAND}, old;

    for (size_t i = 0; i < ARRAY_SIZE(fatal_signals); i++) {
        if (sigaction(fatal_signals[i], NULL, &old) == 0 && old.sa_handler == SIG_DFL)
            sigaction(fatal_signals[i], &action, NULL);
    }
}

static void signals_release(void)
{
    struct sigaction action = {.sa_handler = SIG_DFL}, old;

    for (size_t i = 0; i < ARRAY_SIZE(fatal_signals); i++) {
        if (sigaction(fatal_signals[i], NULL, &old) == 0 && old.sa_handler == restore_and_die)
            sigaction(fatal_signals[i], &action, NULL);
    }
}

static int terminal_make_raw(struct error *err)
{
    static atomic_flag at_exit_set = ATOMIC_FLAG_INIT;
    struct termios raw;

    if (tcgetattr(STDIN_FILENO, &terminal_saved) < 0)
        return error_host(err, errno, "terminal");
    raw = terminal_saved;
    cfmakeraw(&raw);
    if (!atomic_flag_test_and_set(&at_exit_set))
        atexit(terminal_restore);
    signals_catch();
    atomic_store(&terminal_raw, true);
    if (tcsetattr(STDIN_FILENO, TCSANOW, &raw) < 0) {
        int errnum = errno;

        atomic_store(&terminal_raw, false);
        signals_release();
        return error_host(err, errnum, "terminal");
    }
    log_set_terminal_raw(true);
    return 0;
}

static void terminal_release(void)
{
    terminal_restore();
    signals_release();
    log_set_terminal_raw(false);
}

/* ---- input ---- */

static struct stdio_chardev *stdio_of(struct chardev *chr)
{
    return container_of(chr, struct stdio_chardev, chr);
}

/* Whether the key is for the guest. The lock is held. */
static bool filter_key(struct stdio_chardev *s, u8 key)
{
    if (!s->escaped) {
        s->escaped = key == ESCAPE_KEY;
        return !s->escaped;
    }
    s->escaped = false;
    switch (key) {
    case 'x':
        s->chr.quit = true;
        return false;
    case 'b':
        s->chr.send_break = true;
        return false;
    case 'h':
    case '?':
        ring_put(&s->chr.out, (const u8 *)escape_help, sizeof(escape_help) - 1);
        pthread_cond_broadcast(&s->chr.changed);
        return false;
    case 'a':
    case ESCAPE_KEY:
        key = ESCAPE_KEY;
        ring_put(&s->chr.in, &key, 1);
        return false;
    default:
        return false;
    }
}

/* Takes what was read: at most ring_room(&in) bytes. The lock is held. */
static void take_input(struct stdio_chardev *s, const u8 *buf, size_t len)
{
    if (!s->escape_keys) {
        ring_put(&s->chr.in, buf, len);
    } else {
        for (size_t i = 0; i < len; i++) {
            if (filter_key(s, buf[i]))
                ring_put(&s->chr.in, &buf[i], 1);
        }
    }
    chardev_schedule_work(&s->chr);
}

/* At least one byte; -1 at the end of the input, or on an error. The thread can be cancelled in here. */
static ssize_t read_some(u8 *buf, size_t len)
{
    ssize_t n;

    pthread_setcancelstate(PTHREAD_CANCEL_ENABLE, NULL);
    while ((n = read(STDIN_FILENO, buf, len)) < 0 && (errno == EINTR || errno == EAGAIN)) {
        struct pollfd wait = {.fd = STDIN_FILENO, .events = POLLIN};

        poll(&wait, 1, -1);
    }
    pthread_setcancelstate(PTHREAD_CANCEL_DISABLE, NULL);
    return n > 0 ? n : -1;
}

static void *reader_thread(void *opaque)
{
    struct stdio_chardev *s = opaque;
    struct chardev *chr = &s->chr;
    u8 buf[4096];
    ssize_t n;

    pthread_setcancelstate(PTHREAD_CANCEL_DISABLE, NULL);
    pthread_mutex_lock(&chr->lock);
    for (;;) {
        size_t room = MIN(ring_room(&chr->in), sizeof(buf));

        if (chr->closing)
            break;
        if (!room) {
            pthread_cond_wait(&chr->changed, &chr->lock);
            continue;
        }
        pthread_mutex_unlock(&chr->lock);
        n = read_some(buf, room);
        pthread_mutex_lock(&chr->lock);
        if (n < 0)
            break; /* the end of the input, or a terminal that hung up: the guest gets no more */
        take_input(s, buf, (size_t)n);
    }
    pthread_mutex_unlock(&chr->lock);
    return NULL;
}

/* ---- the backend ---- */

static void stdio_rings_changed(struct chardev *chr)
{
    pthread_cond_broadcast(&chr->changed);
}

static void stdio_close(struct chardev *chr)
{
    struct stdio_chardev *s = stdio_of(chr);

    chardev_writer_stop(&s->writer);
    pthread_cancel(s->reader);
    pthread_join(s->reader, NULL);
    if (s->escape_keys)
        terminal_release();
    atomic_flag_clear(&stdio_taken);
}

static const struct chardev_backend stdio_backend = {
    .rings_changed = stdio_rings_changed,
    .close = stdio_close,
};

struct chardev *chardev_stdio_open(struct event_loop *loop, struct error *err)
{
    struct stdio_chardev *s;
    struct chardev *chr;
    int ret;

    if (atomic_flag_test_and_set(&stdio_taken)) {
        error_input(err, "stdio can be used once only");
        return NULL;
    }
    chr = chardev_new(sizeof(*s), &stdio_backend, loop);
    if (!chr) {
        error_host(err, ENOMEM, "stdio");
        goto out_taken;
    }
    s = stdio_of(chr);
    s->escape_keys = isatty(STDIN_FILENO);
    if (s->escape_keys && terminal_make_raw(err) < 0)
        goto out_free;
    if (chardev_writer_start(&s->writer, chr, STDOUT_FILENO, "stdout", err) < 0)
        goto out_terminal;
    ret = chardev_thread_start(&s->reader, reader_thread, s);
    if (ret == 0)
        return chr;
    error_host(err, -ret, "a thread for stdin");
    chardev_writer_stop(&s->writer);

out_terminal:
    if (s->escape_keys)
        terminal_release();
out_free:
    chardev_free(chr);
out_taken:
    atomic_flag_clear(&stdio_taken);
    return NULL;
}
