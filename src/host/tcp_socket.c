#include "host/tcp_socket.h"

#include <errno.h>
#include <netdb.h>
#include <netinet/in.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#define HOST_MAX 256
#define PORT_DIGITS_MAX 5
#define PORT_MAX 65535

/* The two parts of `where`; host may be in brackets, and is the loopback address when it is left out. */
static int split(const char *where, char host[HOST_MAX], const char **port, struct error *err)
{
    const char *colon = strrchr(where, ':');
    size_t len = colon ? (size_t)(colon - where) : 0;
    const char *digits = colon ? colon + 1 : "";

    if (!colon || len >= HOST_MAX || !*digits || strlen(digits) > PORT_DIGITS_MAX ||
        digits[strspn(digits, "0123456789")] || strtoul(digits, NULL, 10) > PORT_MAX)
        return error_input(err, "give HOST:PORT, such as 127.0.0.1:5900, not '%s'", where);
    *port = digits;
    if (len >= 2 && where[0] == '[' && where[len - 1] == ']') {
        where++;
        len -= 2;
    }
    memcpy(host, where, len);
    host[len] = '\0';
    if (!len)
        strcpy(host, "127.0.0.1");
    return 0;
}

static bool is_loopback(const struct sockaddr *address)
{
    if (address->sa_family == AF_INET6)
        return IN6_IS_ADDR_LOOPBACK(&((const struct sockaddr_in6 *)address)->sin6_addr);
    return ntohl(((const struct sockaddr_in *)address)->sin_addr.s_addr) >> 24 == IN_LOOPBACKNET;
}

static int listen_at(const struct addrinfo *a, int backlog)
{
    int one = 1, ret;
    int fd = socket(a->ai_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);

    if (fd < 0)
        return -errno;
    if (setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one)) == 0 &&
        bind(fd, a->ai_addr, a->ai_addrlen) == 0 && listen(fd, backlog) == 0)
        return fd;
    ret = -errno;
    close(fd);
    return ret;
}

int tcp_socket_listen(const char *where, int backlog, bool *loopback, struct error *err)
{
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM}, *found;
    char host[HOST_MAX];
    const char *port = NULL;
    int ret = split(where, host, &port, err);

    if (ret < 0)
        return ret;
    ret = getaddrinfo(host, port, &hints, &found);
    if (ret)
        return error_input(err, "%s: %s", where, gai_strerror(ret));
    *loopback = is_loopback(found->ai_addr);
    ret = listen_at(found, backlog);
    freeaddrinfo(found);
    if (ret < 0)
        error_input(err, "can't listen at %s: %s", where, strerror(-ret));
    return ret;
}
