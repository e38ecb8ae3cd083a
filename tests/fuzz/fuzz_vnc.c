/*
 * Bytes as what a VNC client sends, after a handshake or from the first byte on, in pieces between which the screen
 * changes its mode. Only the sanitizers look at what comes out.
 */
#include "../unit/pci_rig.h"

#include "control/vnc.h"
#include "device/i8042.h"
#include "device/vga.h"
#include "host/event_loop.h"
#include "host/log.h"
#include "host/unix_socket.h"

#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <sys/socket.h>
#include <unistd.h>

#define VGA_DEVFN PCI_DEVFN(1, 0)
#define PIECE_MAX 64
#define END_NS (20 * NS_PER_SEC)

static void a20_changed(void *opaque, bool on)
{
}

static void set_mode(struct rig *r, u8 what)
{
    const u16 values[][2] = {{4, 0}, {1, 8 + (what & 0x3f)}, {2, 8 + (what >> 4)}, {3, 32}, {4, 1}};

    for (size_t i = 0; i < ARRAY_SIZE(values); i++) {
        io_bus_write(r->env.ports, 0x1ce, values[i][0], 2);
        io_bus_write(r->env.ports, 0x1cf, values[i][1], 2);
    }
}

/* Takes what there is, so that the server isn't held up; false at the end. */
static bool drain(int fd, int timeout_ms)
{
    static u8 buf[1 << 16];
    struct pollfd p = {.fd = fd, .events = POLLIN};

    while (poll(&p, 1, timeout_ms) > 0) {
        if (read(fd, buf, sizeof(buf)) <= 0)
            return false;
        timeout_ms = 0;
    }
    return true;
}

static void talk(struct rig *r, int fd, const u8 *data, size_t size)
{
    static const char hello[] = "RFB 003.008\n\1\1";
    size_t n = sizeof(hello) - 1;

    if (size && (*data & 1) && send(fd, hello, n, MSG_NOSIGNAL) != (ssize_t)n)
        return;
    for (; size && drain(fd, 0); data += n, size -= n) {
        n = MIN(size, 1 + *data % PIECE_MAX);
        if (send(fd, data, n, MSG_NOSIGNAL) != (ssize_t)n)
            return;
        if (*data % 8 == 7)
            set_mode(r, data[n - 1]);
    }
    shutdown(fd, SHUT_WR);
    for (u64 deadline = host_clock_ns() + END_NS; drain(fd, 100);) {
        if (host_clock_ns() > deadline)
            __builtin_trap();
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct rig *r = rig_create();
    struct pci_host *host = rig_pci_host(r);
    struct vga_config config = {0};
    struct vga *vga = vga_create(&r->env, &config, host, VGA_DEVFN, &r->err);
    struct a20_gate a20;
    struct i8042_config keyboard = {rig_line(r, 1), rig_line(r, 12), &a20, rig_power(r)};
    struct i8042 *k;
    char where[64];
    struct vnc *vnc;
    int fd;

    log_set_level(LOG_ERROR);
    signal(SIGPIPE, SIG_IGN);
    a20_gate_init(&a20, a20_changed, r);
    k = i8042_create(&r->env, &keyboard, &r->err);
    set_mode(r, 0x23);
    snprintf(where, sizeof(where), "unix:/tmp/fuzz-vnc.%d", (int)getpid());
    vnc = vnc_open(where, NULL, vga, k, &r->err);
    fd = vnc ? unix_socket_connect(where + strlen("unix:"), &r->err) : -1;
    if (fd < 0)
        abort();
    talk(r, fd, data, size);
    close(fd);
    vnc_close(vnc);
    i8042_device(k)->ops->destroy(i8042_device(k));
    vga_device(vga)->ops->destroy(vga_device(vga));
    pci_host_device(host)->ops->destroy(pci_host_device(host));
    rig_destroy(r);
    return 0;
}
