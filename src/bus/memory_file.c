/*
 * Files for guest memory.
 *
 * A memfd has pages of 4 KiB on most hosts, each of which costs a fault (3 us where hardware virtualisation
 * nests), because /sys/kernel/mm/transparent_hugepage/shmem_enabled is "never" by default. A tmpfs mounted
 * with huge=always has huge pages all the same. So the file is made on one, which is never attached to any
 * directory. That takes CAP_SYS_ADMIN, which anybody has in a user namespace of his own: a child enters one,
 * makes the file, and ends. It shares our table of descriptors, so the file is ours. Where all that is
 * forbidden a memfd serves, and where the file is for other processes as well: only a memfd's size can be fixed.
 */
#define _GNU_SOURCE
#include "bus/memory_file.h"

#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

/* Where guest memory goes if the place is free: far from where programs of the host or of the guest have theirs. */
#define PREFERRED_BASE 0x100000000000ULL

/* A file on a tmpfs of this process's. -1: it may not mount one. */
static int open_on_tmpfs(void)
{
    int fs = fsopen("tmpfs", FSOPEN_CLOEXEC), mount = -1, fd = -1;

    if (fs < 0)
        return -1;
    if (!fsconfig(fs, FSCONFIG_SET_STRING, "huge", "always", 0) &&
        !fsconfig(fs, FSCONFIG_SET_STRING, "size", "0", 0) && /* no limit but the host's memory */
        !fsconfig(fs, FSCONFIG_CMD_CREATE, NULL, NULL, 0))
        mount = fsmount(fs, FSMOUNT_CLOEXEC, 0);
    if (mount >= 0) {
        fd = openat(mount, ".", O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
        close(mount);
    }
    close(fs);
    return fd;
}

static bool write_text(const char *path, const char *text)
{
    int fd = open(path, O_WRONLY | O_CLOEXEC);
    bool done = fd >= 0 && write(fd, text, strlen(text)) == (ssize_t)strlen(text);

    if (fd >= 0)
        close(fd);
    return done;
}

/* In the child: root of a namespace in which nobody else is. Files can be made by who has a number there. */
static bool enter_namespace(uid_t uid, gid_t gid)
{
    char users[32], groups[32];

    snprintf(users, sizeof(users), "0 %u 1", uid);
    snprintf(groups, sizeof(groups), "0 %u 1", gid);
    return !unshare(CLONE_NEWUSER | CLONE_NEWNS) && write_text("/proc/self/setgroups", "deny") &&
           write_text("/proc/self/uid_map", users) && write_text("/proc/self/gid_map", groups);
}

static int open_in_namespace(void)
{
    uid_t uid = geteuid();
    gid_t gid = getegid();
    int said[2], fd = -1;
    pid_t child;

    if (pipe2(said, O_CLOEXEC))
        return -1;
    child = (pid_t)syscall(SYS_clone, CLONE_FILES | SIGCHLD, NULL, NULL, NULL, 0);
    if (!child) {
        if (enter_namespace(uid, gid))
            fd = open_on_tmpfs();
        if (write(said[1], &fd, sizeof(fd)) != sizeof(fd))
            _exit(1);
        _exit(0);
    }
    if (child > 0) {
        while (waitpid(child, NULL, 0) < 0 && errno == EINTR)
            ;
        fcntl(said[0], F_SETFL, O_NONBLOCK);
        if (read(said[0], &fd, sizeof(fd)) != sizeof(fd))
            fd = -1;
    }
    close(said[0]);
    close(said[1]);
    return fd;
}

int memory_file_open(bool sealable, struct error *err)
{
    int fd = sealable ? -1 : open_on_tmpfs();

    if (fd < 0 && !sealable)
        fd = open_in_namespace();
    if (fd < 0)
        fd = memfd_create("doppel-memory", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (fd < 0)
        error_host(err, errno, "making a file for guest memory");
    return fd;
}

int memory_file_seal(int fd, struct error *err)
{
    const int seals = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL;
    int has = fcntl(fd, F_GET_SEALS);

    if (has >= 0 && ((has & seals) == seals || fcntl(fd, F_ADD_SEALS, seals) == 0))
        return 0;
    return error_host(err, errno, "guest memory can't be shared with another process");
}

u8 *memory_reserve(gpa_t gpa, u64 size)
{
    u64 room = size + HUGE_PAGE, lead;
    u8 *at = mmap((void *)(PREFERRED_BASE + (gpa & ~(HUGE_PAGE - 1))), room, PROT_NONE,
                  MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

    if (at == MAP_FAILED)
        return NULL;
    lead = (gpa - (u64)(uintptr_t)at) & (HUGE_PAGE - 1);
    if (lead)
        munmap(at, lead);
    munmap(at + lead + size, room - lead - size);
    return at + lead;
}

u8 *memory_file_map(int fd, u64 offset, u64 size, int prot)
{
    u8 *host = memory_reserve(offset, size);
    int saved;

    if (!host || mmap(host, size, prot, MAP_SHARED | MAP_NORESERVE | MAP_FIXED, fd,
                      (off_t)offset) != MAP_FAILED)
        return host;
    saved = errno;
    munmap(host, size);
    errno = saved;
    return NULL;
}

u8 *memory_file_add(int fd, u64 *end, gpa_t gpa, u64 size, u64 *offset, struct error *err)
{
    u64 at = *end + ((gpa - *end) & (HUGE_PAGE - 1));
    u8 *host = NULL;

    if (!ftruncate(fd, (off_t)(at + size)))
        host = memory_file_map(fd, at, size, PROT_READ | PROT_WRITE);
    if (!host) {
        error_host(err, errno, "no host memory for %llu MiB of guest memory",
                   (unsigned long long)(size >> 20));
        return NULL;
    }
    *offset = at;
    *end = at + size;
    return host;
}
