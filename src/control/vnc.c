/*
 * One thread does all of VNC: it waits for clients' messages, and while there is a client looks at the screen every
 * REFRESH_NS. What it finds changed there is drawn, compared with what was shown, and told to libvncserver in strips; a
 * client gets them when it asks. The guest is never waited for, nor does it wait: vga_view_update's copy is the
 * longest for which a vCPU can meet a lock.
 *
 * libvncserver blocks while a message is half read or an update half written, for CLIENT_WAIT_MS at most without any
 * progress: a client that dawdles holds up other clients, and nobody else. vnc_close ends such a wait by shutting the
 * connection down, for which it has a descriptor of its own for each.
 */
#define _GNU_SOURCE /* accept4, dup3 */
#include "control/vnc.h"

#include "control/vnc_input.h"
#include "device/vga.h"
#include "host/event_loop.h"
#include "host/library.h"
#include "host/log.h"
#include "host/tcp_socket.h"
#include "host/unix_socket.h"

#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <rfb/rfb.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#define CLIENTS_MAX 8
#define BACKLOG 8
#define REFRESH_NS 33000000ULL
#define CLIENT_WAIT_MS 5000
#define WRONG_PASSWORD_NS NS_PER_SEC /* for so long nobody is let in */
#define PASSWORD_MAX 8               /* characters that VNC authentication uses: RFC 6143, 7.2.2 */
#define STRIP_HEIGHT 16
#define UNIX_PREFIX "unix:"

#define RFB_SYMBOLS(X)                                                                             \
    X(rfbCheckPasswordByList)                                                                      \
    X(rfbClientConnectionGone)                                                                     \
    X(rfbCloseClient)                                                                              \
    X(rfbErr)                                                                                      \
    X(rfbGetScreen)                                                                                \
    X(rfbLog)                                                                                      \
    X(rfbMarkRectAsModified)                                                                       \
    X(rfbNewClient)                                                                                \
    X(rfbNewFramebuffer)                                                                           \
    X(rfbProcessClientMessage)                                                                     \
    X(rfbScreenCleanup)                                                                            \
    X(rfbUpdateClient)                                                                             \
    X(rfbWriteExact)

static struct {
#define MEMBER(name) __typeof__(name) *name;
    RFB_SYMBOLS(MEMBER)
#undef MEMBER
} library;

static const struct library_symbol symbols[] = {
#define SYMBOL(name) {#name, (void **)&library.name},
    RFB_SYMBOLS(SYMBOL)
#undef SYMBOL
};

struct client {
    rfbClientPtr rfb; /* NULL: a free place */
    int fd;           /* a duplicate of its socket's */
};

struct vnc {
    struct vga *vga;
    struct vga_view *view;
    struct vga_image image; /* what the screen shows */
    u32 *shown; /* what clients are told that it shows; of the size that `screen` says */
    struct vnc_input input;
    rfbScreenInfoPtr screen;
    char password[PASSWORD_MAX + 1];
    char *passwords[2]; /* as rfbCheckPasswordByList wants them */
    u64 refresh_ns;     /* when to look at the screen next, and whether the guest has read keys */
    u64 accept_ns;      /* no client is let in before */
    char *unix_path;    /* NULL: a TCP socket */
    int listen_fd, wake_fd;
    bool have_thread;
    pthread_t thread;

    pthread_mutex_t lock; /* of these */
    bool closing;
    struct client clients[CLIENTS_MAX];
};

/* ---- the picture ---- */

/* libvncserver's 32-bit pixels have red in the lowest byte. */
static u32 rfb_pixel(u32 rgb)
{
    return __builtin_bswap32(rgb) >> 8;
}

/* Where rows of the picture differ from what is shown, as columns [*left, *right); makes them the same. */
static void update_row(const u32 *image, u32 *shown, unsigned width, unsigned *left,
                       unsigned *right)
{
    unsigned first = 0, last = width;

    while (first < width && shown[first] == rfb_pixel(image[first]))
        first++;
    if (first == width)
        return;
    while (shown[last - 1] == rfb_pixel(image[last - 1]))
        last--;
    for (unsigned x = first; x < last; x++)
        shown[x] = rfb_pixel(image[x]);
    *left = MIN(*left, first);
    *right = MAX(*right, last);
}

static void update_strip(struct vnc *v, unsigned top, unsigned bottom)
{
    unsigned width = v->image.width, left = width, right = 0;

    for (unsigned y = top; y < bottom; y++)
        update_row(v->image.pixels + (size_t)y * width, v->shown + (size_t)y * width, width, &left,
                   &right);
    if (left < right)
        library.rfbMarkRectAsModified(v->screen, (int)left, (int)top, (int)right, (int)bottom);
}

/* Another size: clients that understand that are told so, the others go on with the part that they know. */
static int resize(struct vnc *v, struct error *err)
{
    const struct vga_image *image = &v->image;
    u32 *shown = calloc((size_t)image->width * image->height, sizeof(*shown));

    if (!shown)
        return error_host(err, ENOMEM, "the screen of VNC clients");
    library.rfbNewFramebuffer(v->screen, (char *)shown, (int)image->width, (int)image->height, 8, 3,
                              4);
    free(v->shown);
    v->shown = shown;
    return 0;
}

static int refresh(struct vnc *v, struct error *err)
{
    int ret;

    if (!vga_view_update(v->view, v->vga))
        return 0;
    ret = vga_view_render(v->view, &v->image, err);
    if (!ret && (v->image.width != (unsigned)v->screen->width ||
                 v->image.height != (unsigned)v->screen->height || !v->shown))
        ret = resize(v, err);
    for (unsigned y = 0; !ret && y < v->image.height; y += STRIP_HEIGHT)
        update_strip(v, y, MIN(y + STRIP_HEIGHT, v->image.height));
    return ret;
}

/* ---- clients ---- */

static void key_event(rfbBool down, rfbKeySym keysym, rfbClientPtr rfb)
{
    struct vnc *v = rfb->screen->screenData;

    vnc_input_key(&v->input, keysym, down);
}

static void pointer_event(int buttons, int x, int y, rfbClientPtr rfb)
{
    struct vnc *v = rfb->screen->screenData;

    vnc_input_pointer(&v->input, x, y, (u8)buttons);
}

static rfbBool check_password(rfbClientPtr rfb, const char *response, int len)
{
    struct vnc *v = rfb->screen->screenData;
    rfbBool right = library.rfbCheckPasswordByList(rfb, response, len);

    if (!right) {
        log_warn("vnc: a client gave a wrong password");
        v->accept_ns = host_clock_ns() + WRONG_PASSWORD_NS;
    }
    return right;
}

static struct client *free_place(struct vnc *v)
{
    for (unsigned i = 0; i < CLIENTS_MAX; i++) {
        if (v->clients[i].fd < 0)
            return &v->clients[i];
    }
    return NULL;
}

static bool any_client(const struct vnc *v)
{
    for (unsigned i = 0; i < CLIENTS_MAX; i++) {
        if (v->clients[i].rfb)
            return true;
    }
    return false;
}

/* From now on vnc_close shuts it down. False: it is closing already, or the host is out of descriptors. */
static bool take_place(struct vnc *v, struct client *c, int fd)
{
    int copy = fcntl(fd, F_DUPFD_CLOEXEC, 0);

    pthread_mutex_lock(&v->lock);
    if (v->closing && copy >= 0) {
        close(copy);
        copy = -1;
    }
    c->fd = copy;
    pthread_mutex_unlock(&v->lock);
    return copy >= 0;
}

static void leave_place(struct vnc *v, struct client *c)
{
    pthread_mutex_lock(&v->lock);
    close(c->fd);
    c->fd = -1;
    pthread_mutex_unlock(&v->lock);
    c->rfb = NULL;
}

/*
 * libvncserver takes the first bytes of a client for a WebSocket's, if they look so, and when there are less than 4 it
 * looks for ever. So it is introduced to a socket of ours, at which a client without that wish waits, and the client's own
 * takes its place then, with the greeting that was written meanwhile.
 */
static rfbClientPtr introduce(struct vnc *v, int fd)
{
    static const char no_websocket[4] = "RFB ";
    rfbProtocolVersionMsg greeting;
    rfbClientPtr rfb = NULL;
    int pair[2];

    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, pair) < 0)
        return NULL;
    if (pair[0] >= FD_SETSIZE || /* libvncserver keeps an fd_set */
        write(pair[1], no_websocket, sizeof(no_websocket)) != (ssize_t)sizeof(no_websocket))
        close(pair[0]);
    else
        rfb = library.rfbNewClient(v->screen, pair[0]); /* it closes that when it fails */
    if (rfb && (dup3(fd, rfb->sock, O_CLOEXEC) < 0 ||
                read(pair[1], greeting, sz_rfbProtocolVersionMsg) != sz_rfbProtocolVersionMsg ||
                library.rfbWriteExact(rfb, greeting, sz_rfbProtocolVersionMsg) < 0))
        library.rfbCloseClient(rfb); /* and update_client sees it out */
    close(pair[1]);
    return rfb;
}

static void accept_client(struct vnc *v)
{
    struct client *c = free_place(v);
    int one = 1, fd = accept4(v->listen_fd, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);

    if (fd < 0)
        return;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one)); /* fails for a Unix socket */
    if (take_place(v, c, fd)) {
        c->rfb = introduce(v, fd);
        if (!c->rfb)
            leave_place(v, c);
    }
    close(fd);
}

static void client_ready(struct client *c)
{
    library.rfbProcessClientMessage(c->rfb);
    /* Nothing is offered that keeps a second, scaled picture: libvncserver's don't follow a change of the size. */
    if (c->rfb->sock != RFB_INVALID_SOCKET && c->rfb->scaledScreen != c->rfb->screen)
        library.rfbCloseClient(c->rfb);
}

/* Sends what it has asked for, or sees it out. */
static void update_client(struct vnc *v, struct client *c)
{
    library.rfbUpdateClient(c->rfb);
    if (c->rfb->sock != RFB_INVALID_SOCKET)
        return;
    library.rfbClientConnectionGone(c->rfb);
    leave_place(v, c);
    vnc_input_release(&v->input);
}

/* ---- the thread ---- */

/* When to look up though nothing arrives; UINT64_MAX: never. */
static u64 next_deadline(const struct vnc *v, u64 now)
{
    u64 deadline = UINT64_MAX;

    if (any_client(v) || v->input.count)
        deadline = v->refresh_ns;
    if (v->accept_ns > now)
        deadline = MIN(deadline, v->accept_ns);
    return deadline;
}

/* Waits, and does what clients want. False when it is to end. */
static bool wait_for_clients(struct vnc *v)
{
    struct pollfd fds[CLIENTS_MAX + 2];
    u64 now = host_clock_ns(), deadline = next_deadline(v, now);
    struct timespec timeout = {0};
    bool accepting = now >= v->accept_ns && free_place(v);

    if (deadline > now) {
        timeout.tv_sec = (time_t)((deadline - now) / NS_PER_SEC);
        timeout.tv_nsec = (long)((deadline - now) % NS_PER_SEC);
    }
    for (unsigned i = 0; i < CLIENTS_MAX; i++)
        fds[i] = (struct pollfd){.fd = v->clients[i].rfb ? v->clients[i].fd : -1, .events = POLLIN};
    fds[CLIENTS_MAX] = (struct pollfd){.fd = accepting ? v->listen_fd : -1, .events = POLLIN};
    fds[CLIENTS_MAX + 1] = (struct pollfd){.fd = v->wake_fd, .events = POLLIN};
    if (ppoll(fds, ARRAY_SIZE(fds), deadline == UINT64_MAX ? NULL : &timeout, NULL) <= 0)
        return true;
    for (unsigned i = 0; i < CLIENTS_MAX; i++) {
        if (fds[i].revents)
            client_ready(&v->clients[i]);
    }
    if (fds[CLIENTS_MAX].revents)
        accept_client(v);
    return !fds[CLIENTS_MAX + 1].revents;
}

static void refresh_when_due(struct vnc *v)
{
    struct error err;
    u64 now = host_clock_ns();

    if (now < v->refresh_ns)
        return;
    if (any_client(v) && refresh(v, &err))
        log_once(LOG_ERROR, "vnc: %s", err.text);
    v->refresh_ns = host_clock_ns() + REFRESH_NS;
}

static void *serve(void *opaque)
{
    struct vnc *v = opaque;

    while (wait_for_clients(v)) {
        vnc_input_flush(&v->input);
        refresh_when_due(v);
        for (unsigned i = 0; i < CLIENTS_MAX; i++) {
            if (v->clients[i].rfb)
                update_client(v, &v->clients[i]);
        }
    }
    return NULL;
}

/* ---- opening and closing ---- */

PRINTF_LIKE(1, 2) static void library_log(const char *format, ...)
{
    char text[256];
    va_list args;

    if (!log_enabled(LOG_DEBUG))
        return;
    va_start(args, format);
    vsnprintf(text, sizeof(text), format, args);
    va_end(args);
    text[strcspn(text, "\n")] = '\0';
    log_debug("vnc: %s", text);
}

static int read_password(struct vnc *v, const char *path, struct error *err)
{
    char line[64] = "";
    FILE *file;
    int ret = 0;

    if (!path)
        return 0;
    file = fopen(path, "re");
    if (!file)
        return error_input(err, "%s: %s", path, strerror(errno));
    if (!fgets(line, sizeof(line), file))
        line[0] = '\0';
    line[strcspn(line, "\r\n")] = '\0';
    if (!line[0] || strlen(line) > PASSWORD_MAX)
        ret =
            error_input(err, "%s: a password of VNC's has 1 to %d characters", path, PASSWORD_MAX);
    else
        strcpy(v->password, line);
    explicit_bzero(line, sizeof(line));
    fclose(file);
    return ret;
}

static int open_listener(struct vnc *v, const char *where, struct error *err)
{
    bool loopback;

    if (!strncmp(where, UNIX_PREFIX, strlen(UNIX_PREFIX))) {
        const char *path = where + strlen(UNIX_PREFIX);

        v->listen_fd = unix_socket_listen(path, BACKLOG, err);
        if (v->listen_fd < 0)
            return v->listen_fd;
        v->unix_path = strdup(path);
        return v->unix_path ? 0 : error_host(err, ENOMEM, "%s", path);
    }
    v->listen_fd = tcp_socket_listen(where, BACKLOG, &loopback, err);
    if (v->listen_fd < 0)
        return v->listen_fd;
    if (!loopback && !v->password[0])
        return error_input(err,
                           "%s can be reached from other hosts: add password-file=FILE, or give "
                           "127.0.0.1",
                           where);
    return 0;
}

static int create_screen(struct vnc *v, struct error *err)
{
    rfbScreenInfoPtr s;

    v->view = vga_view_create(err);
    if (!v->view)
        return -ENOMEM;
    *library.rfbLog = *library.rfbErr = library_log;
    s = v->screen = library.rfbGetScreen(NULL, NULL, 640, 480, 8, 3, 4);
    if (!s)
        return error_host(err, ENOMEM, "the screen of VNC clients");
    s->screenData = v;
    s->desktopName = "doppel";
    s->alwaysShared = TRUE;
    s->maxClientWait = CLIENT_WAIT_MS;
    s->deferUpdateTime = 0;
    s->cursor = NULL; /* the guest draws its own */
    s->kbdAddEvent = key_event;
    s->ptrAddEvent = pointer_event;
    if (v->password[0]) {
        v->passwords[0] = v->password;
        s->authPasswdData = v->passwords;
        s->passwordCheck = check_password;
    }
    return refresh(v, err);
}

static int start_thread(struct vnc *v, struct error *err)
{
    int ret;

    v->wake_fd = eventfd(0, EFD_CLOEXEC);
    if (v->wake_fd < 0)
        return error_host(err, errno, "cannot create an eventfd");
    ret = pthread_create(&v->thread, NULL, serve, v);
    v->have_thread = ret == 0;
    return ret ? error_host(err, ret, "cannot create a thread for VNC") : 0;
}

struct vnc *vnc_open(const char *where, const char *password_file, struct vga *vga,
                     struct i8042 *keyboard, struct error *err)
{
    struct vnc *v = calloc(1, sizeof(*v));

    if (!v) {
        error_host(err, ENOMEM, "vnc");
        return NULL;
    }
    v->vga = vga;
    v->input.keyboard = keyboard;
    v->listen_fd = v->wake_fd = -1;
    pthread_mutex_init(&v->lock, NULL);
    for (unsigned i = 0; i < CLIENTS_MAX; i++)
        v->clients[i].fd = -1;
    if (library_load("libvncserver.so.1", symbols, ARRAY_SIZE(symbols), err) ||
        read_password(v, password_file, err) || open_listener(v, where, err) ||
        create_screen(v, err) || start_thread(v, err)) {
        vnc_close(v);
        return NULL;
    }
    return v;
}

static void stop_thread(struct vnc *v)
{
    const u64 one = 1;

    pthread_mutex_lock(&v->lock);
    v->closing = true;
    for (unsigned i = 0; i < CLIENTS_MAX; i++) {
        if (v->clients[i].fd >= 0)
            shutdown(v->clients[i].fd, SHUT_RDWR);
    }
    pthread_mutex_unlock(&v->lock);
    if (write(v->wake_fd, &one, sizeof(one)) != (ssize_t)sizeof(one))
        log_error("vnc: cannot wake its thread: %s", strerror(errno));
    pthread_join(v->thread, NULL);
}

void vnc_close(struct vnc *v)
{
    if (!v)
        return;
    if (v->have_thread)
        stop_thread(v);
    for (unsigned i = 0; i < CLIENTS_MAX; i++) {
        if (v->clients[i].rfb)
            library.rfbClientConnectionGone(v->clients[i].rfb);
        if (v->clients[i].fd >= 0)
            close(v->clients[i].fd);
    }
    if (v->screen)
        library.rfbScreenCleanup(v->screen);
    free(v->shown);
    vga_image_free(&v->image);
    vga_view_destroy(v->view);
    if (v->listen_fd >= 0)
        close(v->listen_fd);
    if (v->wake_fd >= 0)
        close(v->wake_fd);
    if (v->unix_path)
        unlink(v->unix_path);
    free(v->unix_path);
    pthread_mutex_destroy(&v->lock);
    explicit_bzero(v->password, sizeof(v->password));
    free(v);
}
