/*
 * Messages: taken apart, checked, handed to the operation, answered.
 *
 * A message is copied once, but for the data of a write, and then judged. The table says what each operation's
 * message holds: a struct, then names. No operation sees a name that leads anywhere but to an entry of its
 * directory.
 */
#define _GNU_SOURCE /* O_PATH */

#include "share/internal.h"

#include "host/log.h"

#include <errno.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* A message without data of a write: the longest is an extended attribute with its name. */
#define ARGS_MAX (KIB(64) + 512)
#define WRITE_MAX MIB(1)
#define GUEST_PAGE 4096
#define FUSE_MINOR_MIN 31 /* the first that virtio-fs's drivers speak */
/* Before FUSE_INIT_EXT, and FUSE_SETXATTR_EXT. */
#define INIT_IN_SIZE offsetof(struct fuse_init_in, flags2)
#define SETXATTR_IN_SIZE offsetof(struct fuse_setxattr_in, setxattr_flags)

#define FEATURES                                                                                   \
    (FUSE_ASYNC_READ | FUSE_ATOMIC_O_TRUNC | FUSE_BIG_WRITES | FUSE_AUTO_INVAL_DATA |              \
     FUSE_DO_READDIRPLUS | FUSE_READDIRPLUS_AUTO | FUSE_ASYNC_DIO | FUSE_PARALLEL_DIROPS |         \
     FUSE_MAX_PAGES | FUSE_HANDLE_KILLPRIV_V2)

struct operation {
    int (*run)(struct call *c);
    size_t args; /* the struct's size */
    unsigned names;
    bool any_name : 1; /* the second may be anything: a link's target */
    bool changes : 1;  /* refused on a read-only share */
    bool no_answer : 1;
};

/* ---- messages as iovecs ---- */

static unsigned slice(const struct iovec *from, unsigned nfrom, size_t offset, size_t len,
                      struct iovec *iov)
{
    unsigned n = 0;

    for (unsigned i = 0; i < nfrom && len && n < SHARE_IOV_MAX; i++) {
        size_t here;

        if (offset >= from[i].iov_len) {
            offset -= from[i].iov_len;
            continue;
        }
        here = MIN(len, from[i].iov_len - offset);
        iov[n++] = (struct iovec){(u8 *)from[i].iov_base + offset, here};
        len -= here;
        offset = 0;
    }
    return n;
}

unsigned call_iov_in(const struct call *c, size_t offset, size_t len, struct iovec *iov)
{
    return slice(c->request->in, c->request->nin, offset, len, iov);
}

unsigned call_iov_out(const struct call *c, size_t offset, size_t len, struct iovec *iov)
{
    return slice(c->request->out, c->request->nout, offset, len, iov);
}

static size_t total(const struct iovec *iov, unsigned n)
{
    size_t len = 0;

    for (unsigned i = 0; i < n; i++)
        len += iov[i].iov_len;
    return len;
}

static void copy_in(const struct call *c, size_t offset, void *buf, size_t len)
{
    struct iovec iov[SHARE_IOV_MAX];
    unsigned n = call_iov_in(c, offset, len, iov);
    u8 *to = buf;

    for (unsigned i = 0; i < n; i++) {
        memcpy(to, iov[i].iov_base, iov[i].iov_len);
        to += iov[i].iov_len;
    }
}

static void copy_out(const struct call *c, size_t offset, const void *buf, size_t len)
{
    struct iovec iov[SHARE_IOV_MAX];
    unsigned n = call_iov_out(c, offset, len, iov);
    const u8 *from = buf;

    for (unsigned i = 0; i < n; i++) {
        memcpy(iov[i].iov_base, from, iov[i].iov_len);
        from += iov[i].iov_len;
    }
}

void *call_reply(struct call *c, size_t size)
{
    if (size > c->room)
        return NULL;
    if (size <= sizeof(c->small)) {
        c->reply = c->small;
        memset(c->reply, 0, size);
    } else {
        c->reply = calloc(1, size);
    }
    return c->reply;
}

/* ---- the session ---- */

static void forget_session(struct share *s)
{
    handles_release_all(s);
    nodes_forget_all(s);
}

static int op_init(struct call *c)
{
    const struct fuse_init_in *in = (const void *)c->args;
    struct fuse_init_out *out = call_reply(c, sizeof(*out));
    struct share *s = c->share;

    if (!out)
        return -EINVAL;
    out->major = FUSE_KERNEL_VERSION;
    out->minor = FUSE_KERNEL_MINOR_VERSION;
    /* A guest of another major version reads ours from the answer, and begins anew if it speaks that, too. */
    if (in->major > FUSE_KERNEL_VERSION)
        return sizeof(*out);
    if (in->major < FUSE_KERNEL_VERSION || in->minor < FUSE_MINOR_MIN) {
        log_once(LOG_WARN, "the guest's FUSE is too old (%u.%u) for a shared directory", in->major,
                 in->minor);
        return -EPROTO;
    }
    forget_session(s);
    out->max_readahead = in->max_readahead;
    out->flags = in->flags & FEATURES;
    out->max_write = WRITE_MAX;
    out->max_pages = WRITE_MAX / GUEST_PAGE;
    out->time_gran = 1;
    s->ready = true;
    return sizeof(*out);
}

static int op_destroy(struct call *c)
{
    c->share->ready = false;
    forget_session(c->share);
    return 0;
}

static int op_forget(struct call *c)
{
    const struct fuse_forget_in *in = (const void *)c->args;

    node_forget(c->share, c->header.nodeid, in->nlookup);
    return 0;
}

static int op_batch_forget(struct call *c)
{
    const struct fuse_batch_forget_in *in = (const void *)c->args;
    const u8 *at = c->args + sizeof(*in), *end = c->args + c->args_len;
    struct fuse_forget_one one;

    for (u32 i = 0; i < in->count && sizeof(one) <= (size_t)(end - at); i++) {
        memcpy(&one, at, sizeof(one));
        node_forget(c->share, one.nodeid, one.nlookup);
        at += sizeof(one);
    }
    return 0;
}

static int op_syncfs(struct call *c)
{
    return syncfs(c->share->sync_fd) < 0 ? -errno : 0;
}

/* Nothing that is under way can be called off. */
static int op_interrupt(struct call *c)
{
    return 0;
}

/* What is missing is answered by ENOSYS, and the guest's kernel does without. */
static const struct operation operations[] = {
    [FUSE_LOOKUP] = {.run = op_lookup, .names = 1},
    [FUSE_FORGET] = {.run = op_forget, .args = sizeof(struct fuse_forget_in), .no_answer = true},
    [FUSE_GETATTR] = {.run = op_getattr, .args = sizeof(struct fuse_getattr_in)},
    [FUSE_SETATTR] = {.run = op_setattr, .args = sizeof(struct fuse_setattr_in), .changes = true},
    [FUSE_READLINK] = {.run = op_readlink},
    [FUSE_SYMLINK] = {.run = op_symlink, .names = 2, .any_name = true, .changes = true},
    [FUSE_MKNOD] = {.run = op_mknod,
                    .args = sizeof(struct fuse_mknod_in),
                    .names = 1,
                    .changes = true},
    [FUSE_MKDIR] = {.run = op_mkdir,
                    .args = sizeof(struct fuse_mkdir_in),
                    .names = 1,
                    .changes = true},
    [FUSE_UNLINK] = {.run = op_unlink, .names = 1, .changes = true},
    [FUSE_RMDIR] = {.run = op_rmdir, .names = 1, .changes = true},
    [FUSE_RENAME] = {.run = op_rename,
                     .args = sizeof(struct fuse_rename_in),
                     .names = 2,
                     .changes = true},
    [FUSE_LINK] = {.run = op_link,
                   .args = sizeof(struct fuse_link_in),
                   .names = 1,
                   .changes = true},
    [FUSE_OPEN] = {.run = op_open, .args = sizeof(struct fuse_open_in)},
    [FUSE_READ] = {.run = op_read, .args = sizeof(struct fuse_read_in)},
    [FUSE_WRITE] = {.run = op_write, .args = sizeof(struct fuse_write_in), .changes = true},
    [FUSE_STATFS] = {.run = op_statfs},
    [FUSE_RELEASE] = {.run = op_release, .args = sizeof(struct fuse_release_in)},
    [FUSE_FSYNC] = {.run = op_fsync, .args = sizeof(struct fuse_fsync_in)},
    [FUSE_SETXATTR] = {.run = op_setxattr, .args = SETXATTR_IN_SIZE, .names = 1, .changes = true},
    [FUSE_GETXATTR] = {.run = op_getxattr, .args = sizeof(struct fuse_getxattr_in), .names = 1},
    [FUSE_LISTXATTR] = {.run = op_listxattr, .args = sizeof(struct fuse_getxattr_in)},
    [FUSE_REMOVEXATTR] = {.run = op_removexattr, .names = 1, .changes = true},
    [FUSE_INIT] = {.run = op_init, .args = INIT_IN_SIZE},
    [FUSE_OPENDIR] = {.run = op_opendir, .args = sizeof(struct fuse_open_in)},
    [FUSE_READDIR] = {.run = op_readdir, .args = sizeof(struct fuse_read_in)},
    [FUSE_RELEASEDIR] = {.run = op_release, .args = sizeof(struct fuse_release_in)},
    [FUSE_FSYNCDIR] = {.run = op_fsync, .args = sizeof(struct fuse_fsync_in)},
    [FUSE_CREATE] = {.run = op_create,
                     .args = sizeof(struct fuse_create_in),
                     .names = 1,
                     .changes = true},
    [FUSE_INTERRUPT] = {.run = op_interrupt,
                        .args = sizeof(struct fuse_interrupt_in),
                        .no_answer = true},
    [FUSE_DESTROY] = {.run = op_destroy},
    [FUSE_BATCH_FORGET] = {.run = op_batch_forget,
                           .args = sizeof(struct fuse_batch_forget_in),
                           .no_answer = true},
    [FUSE_FALLOCATE] = {.run = op_fallocate,
                        .args = sizeof(struct fuse_fallocate_in),
                        .changes = true},
    [FUSE_READDIRPLUS] = {.run = op_readdirplus, .args = sizeof(struct fuse_read_in)},
    [FUSE_RENAME2] = {.run = op_rename2,
                      .args = sizeof(struct fuse_rename2_in),
                      .names = 2,
                      .changes = true},
    [FUSE_LSEEK] = {.run = op_lseek, .args = sizeof(struct fuse_lseek_in)},
    [FUSE_COPY_FILE_RANGE] = {.run = op_copy_file_range,
                              .args = sizeof(struct fuse_copy_file_range_in),
                              .changes = true},
    [FUSE_SYNCFS] = {.run = op_syncfs, .args = sizeof(struct fuse_syncfs_in)},
};

/* ---- one message ---- */

static bool is_entry_name(const char *name)
{
    size_t len = strlen(name);

    return len && len <= SHARE_NAME_MAX && !strchr(name, '/') && strcmp(name, ".") != 0 &&
           strcmp(name, "..") != 0;
}

/* Finds the names behind the struct. */
static int find_names(struct call *c, const struct operation *op)
{
    c->data_at = op->args;
    for (unsigned i = 0; i < op->names; i++) {
        const char *name = (const char *)c->args + c->data_at;
        size_t len = strnlen(name, c->args_len - c->data_at);

        if (len == c->args_len - c->data_at)
            return -EINVAL; /* it doesn't end */
        if (!(i && op->any_name) && !is_entry_name(name))
            return len > SHARE_NAME_MAX ? -ENAMETOOLONG : -EINVAL;
        c->names[i] = name;
        c->data_at += len + 1;
    }
    return 0;
}

static int run(struct call *c, const struct operation *op)
{
    int ret;

    if (!c->share->ready && op->run != op_init)
        return -EIO;
    if (op->changes && c->share->read_only)
        return -EROFS;
    if (c->args_len < op->args)
        return -EINVAL;
    ret = find_names(c, op);
    return ret ? ret : op->run(c);
}

static size_t answer(struct call *c, int result)
{
    struct fuse_out_header h = {
        .len = (u32)(sizeof(h) + (u32)MAX(result, 0)),
        .error = MIN(result, 0),
        .unique = c->header.unique,
    };

    copy_out(c, 0, &h, sizeof(h));
    if (result > 0 && !c->in_place)
        copy_out(c, sizeof(h), c->reply, (size_t)result);
    return h.len;
}

/* Copies what follows the header, and does it. */
static int serve(struct call *c, const struct operation *op)
{
    u8 small[1024] __attribute__((aligned(8))), *args = small;
    int ret;

    c->args_len = c->header.len - sizeof(c->header);
    if (c->header.opcode == FUSE_WRITE)
        c->args_len = MIN(c->args_len, op->args);
    if (c->args_len > ARGS_MAX)
        return -E2BIG;
    if (c->args_len > sizeof(small)) {
        args = malloc(c->args_len);
        if (!args)
            return -ENOMEM;
    }
    copy_in(c, sizeof(c->header), args, c->args_len);
    c->args = args;
    ret = run(c, op);
    if (args != small)
        free(args);
    return ret;
}

size_t share_serve(struct share *s, const struct share_request *r)
{
    struct call c = {.share = s, .request = r};
    size_t in_len = total(r->in, r->nin), out_len = total(r->out, r->nout), done = 0;
    const struct operation *op = NULL;
    int ret;

    if (in_len < sizeof(c.header))
        return 0;
    copy_in(&c, 0, &c.header, sizeof(c.header));
    if (c.header.opcode < ARRAY_SIZE(operations) && operations[c.header.opcode].run)
        op = &operations[c.header.opcode];
    if (op && op->no_answer)
        out_len = 0;
    else if (out_len < sizeof(struct fuse_out_header))
        return 0;
    else
        c.room = MIN(out_len - sizeof(struct fuse_out_header), INT_MAX);
    if (c.header.len < sizeof(c.header) || c.header.len > in_len)
        ret = -EINVAL;
    else
        ret = op ? serve(&c, op) : -ENOSYS;
    if (out_len)
        done = answer(&c, ret);
    if (c.reply != c.small)
        free(c.reply);
    return done;
}

/* ---- life ---- */

static int open_root(struct share *s, const char *path, struct error *err)
{
    struct statx st;
    int fd = open(path, O_PATH | O_DIRECTORY | O_CLOEXEC), ret;

    if (fd < 0)
        return error_input(err, "%s: %s", path, strerror(errno));
    s->sync_fd = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (s->sync_fd < 0) {
        ret = error_input(err, "%s: %s", path, strerror(errno));
        close(fd);
        return ret;
    }
    ret = stat_fd(fd, &st);
    if (!ret)
        ret = nodes_init(s, fd, &st);
    s->dev = (u64)st.stx_dev_major << 32 | st.stx_dev_minor;
    if (!ret)
        return 0;
    close(fd);
    return error_host(err, -ret, "%s", path);
}

struct share *share_open(const struct share_config *config, struct error *err)
{
    struct share *s;

    /* Inodes are opened by their descriptors. */
    if (access("/proc/self/fd", X_OK) < 0) {
        error_host(err, errno, "a shared directory needs /proc");
        return NULL;
    }
    s = calloc(1, sizeof(*s));
    if (!s) {
        error_host(err, ENOMEM, "%s", config->path);
        return NULL;
    }
    s->read_only = config->read_only;
    s->sync_fd = -1;
    pthread_mutex_init(&s->lock, NULL);
    if (open_root(s, config->path, err)) {
        share_close(s);
        return NULL;
    }
    /* Descriptors are bounded alike for both. */
    s->handles.max = s->nodes.fds_max;
    return s;
}

void share_close(struct share *s)
{
    if (!s)
        return;
    handles_release_all(s);
    nodes_fini(s);
    free(s->handles.slots);
    if (s->sync_fd >= 0)
        close(s->sync_fd);
    pthread_mutex_destroy(&s->lock);
    free(s);
}

void share_set_inodes_max(struct share *s, u64 n)
{
    s->nodes.max = n;
}

bool share_is_mounted(struct share *s)
{
    return s->ready;
}
