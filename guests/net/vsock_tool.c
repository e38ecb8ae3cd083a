/*
 * A guest's side of vsock, for tests/guest/network.py.
 *
 *   vsock_tool echo PORT      takes one connection and gives back what it hears, until its end
 *   vsock_tool send PORT      connects to the host's port, sends stdin, then prints what it hears
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include <linux/vm_sockets.h>

static int fail(const char *what)
{
    perror(what);
    return 1;
}

/* Everything from one to the other; 0, or 1 when it broke off. */
static int copy(int from, int to)
{
    static char buf[65536];
    ssize_t n;

    while ((n = read(from, buf, sizeof(buf))) > 0) {
        for (ssize_t done = 0; done < n;) {
            ssize_t here = write(to, buf + done, (size_t)(n - done));

            if (here < 0)
                return fail("write");
            done += here;
        }
    }
    return n < 0 ? fail("read") : 0;
}

int main(int argc, char **argv)
{
    struct sockaddr_vm a = {.svm_family = AF_VSOCK};
    int fd = socket(AF_VSOCK, SOCK_STREAM, 0), peer;

    if (argc != 3)
        return 2;
    if (fd < 0)
        return fail("socket");
    a.svm_port = (unsigned)strtoul(argv[2], NULL, 10);
    if (!strcmp(argv[1], "echo")) {
        a.svm_cid = VMADDR_CID_ANY;
        if (bind(fd, (struct sockaddr *)&a, sizeof(a)) < 0 || listen(fd, 1) < 0)
            return fail("listen");
        puts("net: listens");
        fflush(stdout);
        peer = accept(fd, NULL, NULL);
        return peer < 0 ? fail("accept") : copy(peer, peer);
    }
    a.svm_cid = VMADDR_CID_HOST;
    if (connect(fd, (struct sockaddr *)&a, sizeof(a)) < 0)
        return fail("connect");
    if (copy(0, fd) || shutdown(fd, SHUT_WR) < 0)
        return 1;
    return copy(fd, 1);
}
