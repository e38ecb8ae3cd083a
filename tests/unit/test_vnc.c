/* VNC, with libvncclient at the other end: pictures, changes, sizes, keys, pointer, passwords, and clients that misbehave. */
#define _GNU_SOURCE /* mkdtemp */
#include "pci_rig.h"

#include <setjmp.h>
#include <stdarg.h>

#include <cmocka.h>

#include "control/vnc.h"
#include "control/vnc_input.h"
#include "control/vnc_keys.h"
#include "device/i8042.h"
#include "device/vga.h"
#include "host/event_loop.h"
#include "host/unix_socket.h"
#include "machine/layout.h"

#include <poll.h>
#include <rfb/rfbclient.h>
#include <signal.h>
#include <sys/socket.h>
#include <unistd.h>

#define DEVFN PCI_DEVFN(1, 0)
#define FRAMEBUFFER 0xe0000000ULL
#define WIDTH 64
#define HEIGHT 48
#define PATIENCE_NS (60 * NS_PER_SEC)

struct fixture {
    struct rig *rig;
    struct pci_host *host;
    struct vga *vga;
    struct i8042 *keyboard;
    struct a20_gate a20;
    struct vnc *vnc;
    char dir[32], socket[64], password[64];
};

static void a20_changed(void *opaque, bool on)
{
}

static int setup(void **state)
{
    struct fixture *f = calloc(1, sizeof(*f));
    struct vga_config vga = {0};

    f->rig = rig_create();
    f->host = rig_pci_host(f->rig);
    f->vga = vga_create(&f->rig->env, &vga, f->host, DEVFN, &f->rig->err);
    a20_gate_init(&f->a20, a20_changed, f);
    struct i8042_config keyboard = {
        .keyboard_irq = rig_line(f->rig, 1), .mouse_irq = rig_line(f->rig, 12), .a20 = &f->a20};
    f->keyboard = i8042_create(&f->rig->env, &keyboard, &f->rig->err);
    config_write(f->rig, DEVFN, PCI_BASE_ADDRESS_0, FRAMEBUFFER, 4);
    config_write(f->rig, DEVFN, PCI_COMMAND, PCI_COMMAND_MEMORY, 2);
    strcpy(f->dir, "/tmp/doppel-vnc.XXXXXX");
    assert_non_null(mkdtemp(f->dir));
    snprintf(f->socket, sizeof(f->socket), "unix:%s/socket", f->dir);
    snprintf(f->password, sizeof(f->password), "%s/password", f->dir);
    *state = f;
    return 0;
}

static int teardown(void **state)
{
    struct fixture *f = *state;

    vnc_close(f->vnc);
    i8042_device(f->keyboard)->ops->destroy(i8042_device(f->keyboard));
    vga_device(f->vga)->ops->destroy(vga_device(f->vga));
    pci_host_device(f->host)->ops->destroy(pci_host_device(f->host));
    rig_destroy(f->rig);
    unlink(f->password);
    assert_int_equal(rmdir(f->dir), 0); /* the socket has gone with the server */
    free(f);
    return 0;
}

static void vbe(struct fixture *f, u16 index, u16 value)
{
    io_bus_write(f->rig->env.ports, 0x1ce, index, 2);
    io_bus_write(f->rig->env.ports, 0x1cf, value, 2);
}

static void set_mode(struct fixture *f, u16 width, u16 height)
{
    vbe(f, 4, 0);
    vbe(f, 1, width);
    vbe(f, 2, height);
    vbe(f, 3, 32);
    vbe(f, 4, 0x41);
}

static void draw(struct fixture *f, unsigned x, unsigned y, u32 color)
{
    io_bus_write(f->rig->env.mmio, FRAMEBUFFER + 4 * (y * WIDTH + x), color, 4);
}

static const char *socket_path(const struct fixture *f)
{
    return f->socket + strlen("unix:");
}

static void serve(struct fixture *f, const char *password)
{
    if (password) {
        FILE *file = fopen(f->password, "w");

        fputs(password, file);
        fclose(file);
    }
    f->vnc = vnc_open(f->socket, password ? f->password : NULL, f->vga, f->keyboard, &f->rig->err);
    if (!f->vnc)
        fail_msg("%s", f->rig->err.text);
}

/* ---- the client ---- */

/* libvncclient forgets a string of each client's. */
const char *__lsan_default_suppressions(void);
const char *__lsan_default_suppressions(void)
{
    return "leak:rfbGetClient";
}

struct viewer {
    rfbClient *client;
    const char *password;
    int left, top, right, bottom; /* of all that was updated since it was reset */
};

static void note_update(rfbClient *client, int x, int y, int w, int h)
{
    struct viewer *v = rfbClientGetClientData(client, note_update);

    v->left = MIN(v->left, x);
    v->top = MIN(v->top, y);
    v->right = MAX(v->right, x + w);
    v->bottom = MAX(v->bottom, y + h);
}

static void reset_updates(struct viewer *v)
{
    v->left = v->top = INT32_MAX;
    v->right = v->bottom = 0;
}

static char *tell_password(rfbClient *client)
{
    const struct viewer *v = rfbClientGetClientData(client, note_update);

    return strdup(v->password);
}

static void quiet(const char *format, ...)
{
}

static bool connect_viewer(struct viewer *v, const struct fixture *f, const char *encodings,
                           const char *password)
{
    rfbClientLog = rfbClientErr = quiet;
    reset_updates(v);
    v->password = password;
    v->client = rfbGetClient(8, 3, 4);
    v->client->serverHost = strdup(socket_path(f));
    v->client->canHandleNewFBSize = TRUE;
    v->client->appData.encodingsString = encodings;
    v->client->GotFrameBufferUpdate = note_update;
    v->client->GetPassword = tell_password;
    rfbClientSetClientData(v->client, note_update, v);
    if (rfbInitClient(v->client, NULL, NULL))
        return true;
    v->client = NULL; /* freed */
    return false;
}

static void disconnect_viewer(struct viewer *v)
{
    free(v->client->frameBuffer);
    rfbClientCleanup(v->client);
}

static u32 pixel(const struct viewer *v, int x, int y)
{
    const u8 *p = v->client->frameBuffer + 4 * (size_t)(y * v->client->width + x);

    return (u32)p[0] << 16 | (u32)p[1] << 8 | p[2];
}

/* Takes updates until the pixel has that colour. */
static void wait_for_pixel(struct viewer *v, int x, int y, u32 color)
{
    u64 deadline = host_clock_ns() + PATIENCE_NS;

    while (x >= v->client->width || y >= v->client->height || pixel(v, x, y) != color) {
        if (host_clock_ns() > deadline)
            fail_msg("no pixel of 0x%06x at %d, %d", color, x, y);
        /* It reads ahead, and waits for what it hasn't read. */
        if (v->client->buffered || WaitForMessage(v->client, 100000) > 0)
            assert_true(HandleRFBServerMessage(v->client));
    }
}

/* Port 0x60's bytes, from the keyboard (or the mouse), as they come. */
static void expect_bytes(struct fixture *f, bool mouse, const u8 *bytes, unsigned n)
{
    u64 deadline = host_clock_ns() + PATIENCE_NS;

    for (unsigned i = 0; i < n;) {
        u8 status = (u8)io_bus_read(f->rig->env.ports, PORT_I8042_COMMAND, 1);

        if (status & 1) {
            assert_int_equal(!!(status & 0x20), mouse);
            assert_int_equal(io_bus_read(f->rig->env.ports, PORT_I8042_DATA, 1), bytes[i++]);
        } else if (host_clock_ns() > deadline) {
            fail_msg("%u of %u bytes arrived", i, n);
        } else {
            poll(NULL, 0, 1);
        }
    }
}
#define EXPECT(f, mouse, ...)                                                                      \
    expect_bytes(f, mouse, (const u8[]){__VA_ARGS__}, sizeof((const u8[]){__VA_ARGS__}))

/* ---- cases ---- */

static void the_screen_is_seen_in_every_encoding(void **state)
{
    static const char *const encodings[] = {"raw",  "rre",   "corre", "hextile", "ultra",
                                            "zlib", "tight", "zrle",  "zywrle"};
    struct fixture *f = *state;

    set_mode(f, WIDTH, HEIGHT);
    for (unsigned y = 0; y < HEIGHT; y++) {
        for (unsigned x = 0; x < WIDTH; x++)
            draw(f, x, y, x < 32 ? 0xff8001 : y << 8);
    }
    draw(f, 5, 7, 0x12abef);
    serve(f, NULL);
    for (size_t i = 0; i < ARRAY_SIZE(encodings); i++) {
        struct viewer v;

        assert_true(connect_viewer(&v, f, encodings[i], NULL));
        assert_int_equal(v.client->width, WIDTH);
        assert_int_equal(v.client->height, HEIGHT);
        wait_for_pixel(&v, 0, 0, 0xff8001);
        assert_int_equal(pixel(&v, 5, 7), 0x12abef);
        assert_int_equal(pixel(&v, 63, 47), 47 << 8);
        disconnect_viewer(&v);
    }
}

static void only_what_changed_is_sent(void **state)
{
    struct fixture *f = *state;
    struct viewer v;

    set_mode(f, WIDTH, HEIGHT);
    draw(f, 1, 1, 0x00ff00);
    serve(f, NULL);
    assert_true(connect_viewer(&v, f, "raw", NULL));
    wait_for_pixel(&v, 1, 1, 0x00ff00);
    assert_int_equal(v.right, WIDTH);
    reset_updates(&v);
    draw(f, 20, 17, 0xffffff);
    draw(f, 29, 18, 0x0000ff);
    wait_for_pixel(&v, 29, 18, 0x0000ff);
    wait_for_pixel(&v, 20, 17, 0xffffff);
    assert_true(v.left >= 20 && v.right <= 30);
    assert_true(v.top >= 16 && v.bottom <= 32); /* a strip's rows at most */
    disconnect_viewer(&v);
}

static void a_change_of_the_size_is_followed(void **state)
{
    struct fixture *f = *state;
    struct viewer v, old;

    set_mode(f, WIDTH, HEIGHT);
    serve(f, NULL);
    assert_true(connect_viewer(&v, f, "raw", NULL));
    assert_true(connect_viewer(&old, f, "raw", NULL));
    old.client->canHandleNewFBSize = FALSE;
    assert_true(SetFormatAndEncodings(old.client));
    set_mode(f, 2 * WIDTH, 2 * HEIGHT);
    io_bus_write(f->rig->env.mmio, FRAMEBUFFER + 4 * (2 * WIDTH * 2 * HEIGHT - 1), 0x123456, 4);
    wait_for_pixel(&v, 2 * WIDTH - 1, 2 * HEIGHT - 1, 0x123456);
    set_mode(f, 8, 8);
    io_bus_write(f->rig->env.mmio, FRAMEBUFFER + 4 * 63, 0x654321, 4);
    wait_for_pixel(&v, 7, 7, 0x654321);
    wait_for_pixel(&old, 7, 7, 0x654321); /* in the corner of what it had */
    disconnect_viewer(&v);
    disconnect_viewer(&old);
}

static void keys_reach_the_guest(void **state)
{
    struct fixture *f = *state;
    struct viewer v;

    serve(f, NULL);
    assert_true(connect_viewer(&v, f, "raw", NULL));
    SendKeyEvent(v.client, 'a', TRUE);
    SendKeyEvent(v.client, 'a', FALSE);
    SendKeyEvent(v.client, XK_Up, TRUE);
    SendKeyEvent(v.client, XK_Up, FALSE);
    EXPECT(f, false, 0x1e, 0x9e, 0xe0, 0x48, 0xe0, 0xc8);
    SendKeyEvent(v.client, XK_Shift_R, TRUE); /* as a viewer sends "A", */
    SendKeyEvent(v.client, 'A', TRUE);
    SendKeyEvent(v.client, 'A', FALSE);
    SendKeyEvent(v.client, XK_Shift_R, FALSE);
    EXPECT(f, false, 0x36, 0x1e, 0x9e, 0xb6);
    SendKeyEvent(v.client, '?', TRUE); /* and as a program does "?" */
    SendKeyEvent(v.client, '?', FALSE);
    EXPECT(f, false, 0x2a, 0x35, 0xaa, 0xb5);
    SendKeyEvent(v.client, XK_Caps_Lock, TRUE);
    SendKeyEvent(v.client, XK_Caps_Lock, FALSE);
    SendKeyEvent(v.client, 'B', TRUE);
    SendKeyEvent(v.client, 'B', FALSE);
    EXPECT(f, false, 0x3a, 0xba, 0x30, 0xb0);
    SendKeyEvent(v.client, 0x20ac, TRUE); /* not on this keyboard */
    SendKeyEvent(v.client, XK_F7, TRUE);
    EXPECT(f, false, 0x41);
    disconnect_viewer(&v); /* and what it held is let go of */
    EXPECT(f, false, 0xc1);
}

static void fast_typing_waits_for_the_guest(void **state)
{
    struct fixture *f = *state;
    struct viewer v;

    serve(f, NULL);
    assert_true(connect_viewer(&v, f, "raw", NULL));
    for (unsigned i = 0; i < 50; i++) {
        SendKeyEvent(v.client, 'e', TRUE);
        SendKeyEvent(v.client, 'e', FALSE);
    }
    for (unsigned i = 0; i < 50; i++)
        EXPECT(f, false, 0x12, 0x92);
    disconnect_viewer(&v);
}

static void the_pointer_moves_the_mouse(void **state)
{
    struct fixture *f = *state;
    struct viewer v;

    io_bus_write(f->rig->env.ports, PORT_I8042_COMMAND, 0xd4, 1);
    io_bus_write(f->rig->env.ports, PORT_I8042_DATA, 0xf4, 1); /* enable */
    EXPECT(f, true, 0xfa);
    serve(f, NULL);
    assert_true(connect_viewer(&v, f, "raw", NULL));
    SendPointerEvent(v.client, 10, 10, 0); /* from here on */
    SendPointerEvent(v.client, 13, 8, 0);
    EXPECT(f, true, 0x08, 3, 2);
    SendPointerEvent(v.client, 13, 8, rfbButton1Mask);
    EXPECT(f, true, 0x09, 0, 0);
    SendPointerEvent(v.client, 12, 9, rfbButton3Mask);
    EXPECT(f, true, 0x3a, 0xff, 0xff);
    disconnect_viewer(&v);
    EXPECT(f, true, 0x08, 0, 0);
}

static void a_password_lets_in(void **state)
{
    struct fixture *f = *state;
    struct viewer v;

    serve(f, "s3cret12\n");
    assert_false(connect_viewer(&v, f, "raw", "s3cret13"));
    assert_true(connect_viewer(&v, f, "raw", "s3cret12"));
    disconnect_viewer(&v);
}

static void refuse(struct fixture *f, const char *where, const char *password, const char *why)
{
    struct error err = {0};

    assert_null(vnc_open(where, password, f->vga, f->keyboard, &err));
    assert_int_equal(err.class, ERROR_INPUT);
    if (!strstr(err.text, why))
        fail_msg("'%s' does not say '%s'", err.text, why);
}

static void what_cannot_be_served_is_refused(void **state)
{
    struct fixture *f = *state;
    FILE *file = fopen(f->password, "w");

    fputs("longer than 8\n", file);
    fclose(file);
    refuse(f, "0.0.0.0:0", NULL, "password-file=FILE");
    refuse(f, "localhost", NULL, "HOST:PORT");
    refuse(f, ":", NULL, "HOST:PORT");
    refuse(f, ":http", NULL, "HOST:PORT");
    refuse(f, ":99999", NULL, "99999");
    refuse(f, "unix:", NULL, "socket");
    refuse(f, f->socket, f->password, "1 to 8 characters");
    refuse(f, f->socket, "/nonexistent", "/nonexistent: No such file");
}

static void tcp_is_served_at_the_loopback_address(void **state)
{
    struct fixture *f = *state;

    f->vnc = vnc_open(":0", NULL, f->vga, f->keyboard, &f->rig->err);
    assert_non_null(f->vnc);
    vnc_close(f->vnc);
    f->vnc = vnc_open("127.0.0.1:0", NULL, f->vga, f->keyboard, &f->rig->err);
    assert_non_null(f->vnc);
}

/* ---- clients that misbehave ---- */

static int connect_raw(struct fixture *f)
{
    struct error err;
    int fd = unix_socket_connect(socket_path(f), &err);

    assert_true(fd >= 0);
    return fd;
}

static void send_raw(int fd, const void *data, size_t len)
{
    assert_int_equal(send(fd, data, len, MSG_NOSIGNAL), len);
}

/* Reads until the server has closed. */
static void wait_for_end(int fd)
{
    char buf[4096];
    struct pollfd p = {.fd = fd, .events = POLLIN};
    ssize_t n = 1;

    while (n > 0) {
        assert_int_equal(poll(&p, 1, (int)(PATIENCE_NS / 1000000)), 1);
        n = read(fd, buf, sizeof(buf));
    }
    close(fd);
}

static const char hello[] = "RFB 003.008\n\1\1"; /* version, security type None, ClientInit */

static void too_many_clients_wait(void **state)
{
    struct fixture *f = *state;
    struct viewer v;
    int fds[8];
    char byte;

    set_mode(f, WIDTH, HEIGHT);
    serve(f, NULL);
    for (unsigned i = 0; i < ARRAY_SIZE(fds); i++) {
        struct pollfd p;

        fds[i] = connect_raw(f);
        p = (struct pollfd){.fd = fds[i], .events = POLLIN};
        assert_int_equal(poll(&p, 1, (int)(PATIENCE_NS / 1000000)), 1);
        assert_int_equal(read(fds[i], &byte, 1), 1);
    }
    int waiting = connect_raw(f);
    struct pollfd p = {.fd = waiting, .events = POLLIN};
    assert_int_equal(poll(&p, 1, 200), 0);
    close(waiting);
    for (unsigned i = 0; i < ARRAY_SIZE(fds); i++)
        close(fds[i]);
    assert_true(connect_viewer(&v, f, "raw", NULL)); /* there is room again */
    disconnect_viewer(&v);
}

static void what_makes_no_sense_ends_the_connection(void **state)
{
    static const u8 unknown[] = {0x77, 0, 0, 0};
    static const u8 scale[] = {8, 2, 0, 0}; /* UltraVNC's SetScale */
    static const u8 cut_text[] = {6, 0, 0, 0, 0xff, 0xff, 0xff, 0x00};
    static const struct {
        const void *data;
        size_t len;
    } inputs[] = {{unknown, sizeof(unknown)}, {scale, sizeof(scale)}, {cut_text, sizeof(cut_text)}};
    struct fixture *f = *state;

    set_mode(f, WIDTH, HEIGHT);
    serve(f, NULL);
    for (size_t i = 0; i < ARRAY_SIZE(inputs); i++) {
        int fd = connect_raw(f);

        send_raw(fd, hello, sizeof(hello) - 1);
        send_raw(fd, inputs[i].data, inputs[i].len);
        wait_for_end(fd);
    }
    int fd = connect_raw(f);
    send_raw(fd, "GET / HTTP/1.0\r\n\r\n", 18);
    wait_for_end(fd);
    fd = connect_raw(f);
    send_raw(fd, "R", 1); /* too little for anything */
    shutdown(fd, SHUT_WR);
    wait_for_end(fd);
}

/* Half a message, for whose rest the server waits. */
static void closing_waits_for_no_client(void **state)
{
    static const u8 cut_text[] = {6, 0, 0, 0, 0, 0, 0xff, 0, 'x'};
    struct fixture *f = *state;
    u64 begin;
    int fd;

    serve(f, NULL);
    fd = connect_raw(f);
    send_raw(fd, hello, sizeof(hello) - 1);
    send_raw(fd, cut_text, sizeof(cut_text));
    poll(NULL, 0, 300);
    begin = host_clock_ns();
    vnc_close(f->vnc);
    f->vnc = NULL;
    assert_true(host_clock_ns() - begin < 4 * NS_PER_SEC); /* the server's own patience is 5 s */
    wait_for_end(fd);
}

/* Whatever comes, each key that went down comes up. */
static void every_press_has_its_release(void **state)
{
    struct fixture *f = *state;
    struct vnc_input in = {.keyboard = f->keyboard};
    u64 random = 1;

    for (unsigned i = 0; i < 20000; i++) {
        u64 r = rig_random(&random);

        vnc_input_key(&in, r & 1 ? 0xff00 | (r >> 8 & 0xff) : r >> 8 & 0x7f, r >> 16 & 1);
        assert_true(in.count + in.nheld <= VNC_INPUT_EVENTS);
        if ((r >> 20 & 0xff) == 0)
            vnc_input_flush(&in);
    }
    vnc_input_release(&in);
    assert_int_equal(in.nheld, 0);
    assert_true(in.count <= VNC_INPUT_EVENTS);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(the_screen_is_seen_in_every_encoding, setup, teardown),
        cmocka_unit_test_setup_teardown(only_what_changed_is_sent, setup, teardown),
        cmocka_unit_test_setup_teardown(a_change_of_the_size_is_followed, setup, teardown),
        cmocka_unit_test_setup_teardown(keys_reach_the_guest, setup, teardown),
        cmocka_unit_test_setup_teardown(fast_typing_waits_for_the_guest, setup, teardown),
        cmocka_unit_test_setup_teardown(the_pointer_moves_the_mouse, setup, teardown),
        cmocka_unit_test_setup_teardown(a_password_lets_in, setup, teardown),
        cmocka_unit_test_setup_teardown(what_cannot_be_served_is_refused, setup, teardown),
        cmocka_unit_test_setup_teardown(tcp_is_served_at_the_loopback_address, setup, teardown),
        cmocka_unit_test_setup_teardown(too_many_clients_wait, setup, teardown),
        cmocka_unit_test_setup_teardown(what_makes_no_sense_ends_the_connection, setup, teardown),
        cmocka_unit_test_setup_teardown(closing_waits_for_no_client, setup, teardown),
        cmocka_unit_test_setup_teardown(every_press_has_its_release, setup, teardown),
    };

    signal(SIGPIPE, SIG_IGN);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
