#include "host/unix_socket.h"

#include <errno.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

static int make_address(const char *path, struct sockaddr_un *address, struct error *err)
{
    *address = (struct sockaddr_un){.sun_family = AF_UNIX};
    if (!*path || strlen(path) >= sizeof(address->sun_path))
        return error_input(err, "a socket's path has 1 to %zu characters, unlike '%s'",
                           sizeof(address->sun_path) - 1, path);
    memcpy(address->sun_path, path, strlen(path));
    return 0;
}

static int make_socket(struct error *err)
{
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);

    return fd < 0 ? error_host(err, errno, "socket") : fd;
}

int unix_socket_connect(const char *path, struct error *err)
{
    struct sockaddr_un address;
    int fd, ret = make_address(path, &address, err);

    if (ret < 0)
        return ret;
    fd = make_socket(err);
    if (fd < 0 || connect(fd, (const struct sockaddr *)&address, sizeof(address)) == 0)
        return fd;
    ret = -errno;
    error_input(err, "can't connect to %s: %s", path, strerror(-ret));
    close(fd);
    return ret;
}

static bool is_stale(const char *path)
{
    struct error ignored;
    struct stat st;
    int fd;

    if (lstat(path, &st) < 0 || !S_ISSOCK(st.st_mode))
        return false;
    fd = unix_socket_connect(path, &ignored);
    if (fd >= 0)
        close(fd);
    return fd == -ECONNREFUSED;
}

int unix_socket_listen(const char *path, int backlog, struct error *err)
{
    struct sockaddr_un address;
    int fd, ret = make_address(path, &address, err);

    if (ret < 0)
        return ret;
    fd = make_socket(err);
    if (fd < 0)
        return fd;
    if (is_stale(path))
        unlink(path);
    if (bind(fd, (const struct sockaddr *)&address, sizeof(address)) == 0 &&
        listen(fd, backlog) == 0)
        return fd;
    ret = -errno;
    error_input(err, "can't listen at %s: %s", path, strerror(-ret));
    close(fd);
    return ret;
}
