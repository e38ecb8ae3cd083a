/*
 * Bytes as the messages of a guest that has a shared directory mounted: any operation on nodes and handles that it may
 * have or not, with names that are good, bad or cut off, in buffers that are too short, and with few descriptors. The
 * sanitizers are the judges, and what lies beside the directory, and on the host's files.
 */
#include "../unit/share_rig.h"
#include "fuzz_device.h"
#include "host/log.h"

#include <dirent.h>
#include <signal.h>
#include <sys/resource.h>

#define FILE_MAX MIB(1) /* of the host's disk */

static const char *const names[] = {"a",
                                    "b",
                                    "file",
                                    "..",
                                    ".",
                                    "",
                                    "a/b",
                                    "../secret",
                                    "up",
                                    "d",
                                    "e",
                                    "user.x",
                                    "user.doppel.owner",
                                    "/"};

/* Names as messages have them, or bytes. */
static size_t put_names(struct input *in, u8 *at, size_t room)
{
    size_t used = 0;

    for (unsigned n = take(in, 1) % 3; n; n--) {
        const char *name = names[take(in, 1) % ARRAY_SIZE(names)];

        used += (size_t)snprintf((char *)at + used, room - used, "%s", name) + 1;
    }
    for (unsigned n = take(in, 1) % 16; n; n--)
        at[used++] = (u8)take(in, 1);
    return used;
}

/* The operation's struct: mostly small numbers, as nodes, handles and sizes are. */
static size_t put_struct(struct input *in, u8 *at)
{
    size_t size = take(in, 1) % 12 * 8;

    for (size_t i = 0; i < size; i += 4) {
        u8 kind = (u8)take(in, 1);
        u32 value = kind < 200 ? kind % 16 : (u32)take(in, 4);

        memcpy(at + i, &value, 4);
    }
    return size;
}

static void message(struct share_rig *r, struct input *in)
{
    u8 args[512];
    u32 opcode = take(in, 1) % 52;
    u64 node = 1 + take(in, 1) % 12;
    size_t len;

    /* The host's disk has other things to do. */
    if (opcode == FUSE_SYNCFS || opcode == FUSE_FSYNC || opcode == FUSE_FSYNCDIR)
        return;
    len = put_struct(in, args);
    len += put_names(in, args + len, sizeof(args) - len - 16);
    share_rig_call(r, opcode, node, args, len, args, opcode == FUSE_WRITE ? take(in, 1) : 0);
}

/* A message that is cut off anywhere, with room for a part of the answer. */
static void short_message(struct share_rig *r, struct input *in)
{
    u8 bytes[200], room[100];
    struct fuse_in_header h = {.len = (u32)take(in, 2), .opcode = (u32)take(in, 1), .nodeid = 1};
    struct iovec from = {bytes, take(in, 1) % sizeof(bytes)},
                 to = {room, take(in, 1) % sizeof(room)};
    struct share_request request = {&from, 1, &to, 1};

    memset(bytes, 'x', sizeof(bytes));
    memcpy(bytes, &h, sizeof(h));
    if (h.opcode != FUSE_SYNCFS && share_serve(r->share, &request) > to.iov_len)
        __builtin_trap();
}

/* No file that runs as this user, no device; and the one beside it is whole. */
static void judge(const struct share_rig *r)
{
    char text[16] = "", path[80];
    struct dirent *d;
    struct stat st;
    DIR *dir = opendir(r->dir);
    FILE *f;

    if (!dir)
        return; /* the guest took the permission away */
    while ((d = readdir(dir))) {
        if (fstatat(dirfd(dir), d->d_name, &st, AT_SYMLINK_NOFOLLOW) < 0)
            continue;
        if ((S_ISREG(st.st_mode) && (st.st_mode & (S_ISUID | S_ISGID))) || S_ISCHR(st.st_mode) ||
            S_ISBLK(st.st_mode))
            __builtin_trap();
    }
    closedir(dir);
    snprintf(path, sizeof(path), "%s/secret", r->base);
    f = fopen(path, "re");
    if (!f || !fgets(text, sizeof(text), f) || strcmp(text, "secret") != 0)
        __builtin_trap();
    fclose(f);
    if (lstat(path, &st) < 0 || st.st_nlink != 1 || (st.st_mode & 07777) != (0666 & ~022))
        __builtin_trap();
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct input in = {data, size};
    struct rlimit limit = {FILE_MAX, FILE_MAX};
    struct share_rig *r;

    log_set_level(LOG_ERROR);
    umask(022);
    setrlimit(RLIMIT_FSIZE, &limit);
    signal(SIGXFSZ, SIG_IGN);
    r = share_rig_create(take(&in, 1) % 8 == 0);
    if (symlink("..", share_rig_path(r, "up")) < 0)
        abort();
    r->share->nodes.fds_max = 1 + take(&in, 1) % 8;
    r->share->handles.max = 8;
    share_set_inodes_max(r->share, 10);
    share_rig_init(r);
    while (in.left)
        take(&in, 1) % 8 ? message(r, &in) : short_message(r, &in);
    judge(r);
    share_rig_destroy(r);
    return 0;
}
