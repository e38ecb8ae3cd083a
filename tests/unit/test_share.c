/*
 * The server of shared directories: what a guest's kernel asks for is done; what a hostile one asks for leads nowhere
 * outside the directory, costs no more than is allowed, and crashes nothing.
 */
#include "share_rig.h"

#include <sys/xattr.h>

#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>

#include <cmocka.h>

#define ROOT FUSE_ROOT_ID

static struct share_rig *mounted(bool read_only)
{
    struct share_rig *r = share_rig_create(read_only);

    assert_int_equal(share_rig_init(r), 0);
    return r;
}

static s64 make_dir(struct share_rig *r, u64 parent, const char *name)
{
    struct fuse_mkdir_in in = {.mode = 0755};
    int ret = share_rig_name(r, FUSE_MKDIR, parent, &in, sizeof(in), name);

    return ret ? ret : (s64)((struct fuse_entry_out *)r->answer)->nodeid;
}

static s64 create(struct share_rig *r, u64 parent, const char *name, u32 mode, u64 *handle)
{
    struct fuse_create_in in = {.flags = O_RDWR | O_CREAT, .mode = mode};
    const struct fuse_entry_out *entry = (const void *)r->answer;
    int ret = share_rig_name(r, FUSE_CREATE, parent, &in, sizeof(in), name);

    *handle = ret ? UINT64_MAX : ((const struct fuse_open_out *)(entry + 1))->fh;
    if (ret)
        return ret;
    return (s64)entry->nodeid;
}

static int move(struct share_rig *r, u64 from, const char *name, u64 to, const char *new_name,
                u32 flags)
{
    struct fuse_rename2_in in = {.newdir = to, .flags = flags};
    char names[128];
    int len = snprintf(names, sizeof(names), "%s%c%s", name, 0, new_name);

    return share_rig_call(r, FUSE_RENAME2, from, &in, sizeof(in), names, (size_t)len + 1);
}

static int get_attr(struct share_rig *r, u64 node)
{
    struct fuse_getattr_in in = {0};

    return share_rig_call(r, FUSE_GETATTR, node, &in, sizeof(in), NULL, 0);
}

static int set_attr(struct share_rig *r, u64 node, const struct fuse_setattr_in *in)
{
    return share_rig_call(r, FUSE_SETATTR, node, in, sizeof(*in), NULL, 0);
}

static const struct fuse_attr *told_attr(const struct share_rig *r)
{
    return &((const struct fuse_attr_out *)r->answer)->attr;
}

static u32 host_mode(const struct share_rig *r, const char *name)
{
    struct stat st;

    assert_int_equal(lstat(share_rig_path(r, name), &st), 0);
    return st.st_mode;
}

static void host_rename(const struct share_rig *r, const char *from, const char *to)
{
    char old[512];

    strcpy(old, share_rig_path(r, from));
    assert_int_equal(rename(old, share_rig_path(r, to)), 0);
}

static void files_are_made_written_and_read(void **state)
{
    struct share_rig *r = mounted(false);
    mode_t before = umask(077);
    char text[6] = "";
    u64 handle = 0;
    s64 node = create(r, ROOT, "new", 0664, &handle);

    umask(before);
    assert_true(node > ROOT);
    assert_int_equal(host_mode(r, "new"), S_IFREG | 0664); /* whatever this process's umask */
    assert_int_equal(share_rig_write(r, handle, 3, "hello", 5), 0);
    assert_int_equal(((struct fuse_write_out *)r->answer)->size, 5);
    assert_int_equal(share_rig_read(r, handle, 0, 4096), 0);
    assert_int_equal(r->len, 8);
    assert_memory_equal(r->answer, "\0\0\0hello", 8);
    assert_int_equal(get_attr(r, (u64)node), 0);
    assert_int_equal(told_attr(r)->size, 8);
    assert_int_equal(
        set_attr(r, (u64)node, &(struct fuse_setattr_in){.valid = FATTR_SIZE, .size = 2}), 0);
    assert_int_equal(told_attr(r)->size, 2);
    assert_int_equal(
        set_attr(r, (u64)node,
                 &(struct fuse_setattr_in){.valid = FATTR_MTIME, .mtime = 77, .mtimensec = 5}),
        0);
    assert_int_equal(told_attr(r)->mtime, 77);
    assert_int_equal(told_attr(r)->mtimensec, 5);
    assert_int_equal(share_rig_release(r, handle), 0);
    assert_int_equal(share_rig_release(r, handle), -EBADF);
    assert_int_equal(share_rig_read(r, handle, 0, 10), -EBADF);

    /* A file that is there already is opened, unless the guest wants a new one. */
    assert_int_equal(create(r, ROOT, "file", 0600, &handle) > ROOT, true);
    assert_int_equal(share_rig_read(r, handle, 0, sizeof(text)), 0);
    assert_memory_equal(r->answer, "conten", sizeof(text));
    share_rig_destroy(r);
}

static void no_name_leads_outside(void **state)
{
    static const char *const bad[] = {"", ".", "..", "../secret", "/etc", "a/b", "file/"};
    struct share_rig *r = mounted(false);
    s64 link, dir_link;
    u64 handle;

    assert_int_equal(symlink("../secret", share_rig_path(r, "link")), 0);
    assert_int_equal(symlink("..", share_rig_path(r, "up")), 0);
    for (unsigned i = 0; i < ARRAY_SIZE(bad); i++) {
        assert_int_equal(share_rig_lookup(r, ROOT, bad[i]), -EINVAL);
        assert_int_equal(make_dir(r, ROOT, bad[i]), -EINVAL);
        assert_int_equal(create(r, ROOT, bad[i], 0644, &handle), -EINVAL);
        assert_int_equal(move(r, ROOT, "file", ROOT, bad[i], 0), -EINVAL);
        assert_int_equal(move(r, ROOT, bad[i], ROOT, "x", 0), -EINVAL);
        assert_int_equal(share_rig_name(r, FUSE_UNLINK, ROOT, NULL, 0, bad[i]), -EINVAL);
    }
    link = share_rig_lookup(r, ROOT, "link");
    assert_true(link > ROOT);
    assert_int_equal(((struct fuse_entry_out *)r->answer)->attr.mode & S_IFMT, S_IFLNK);
    assert_int_equal(share_rig_call(r, FUSE_READLINK, (u64)link, NULL, 0, NULL, 0), 0);
    assert_int_equal(r->len, strlen("../secret"));
    assert_int_equal(share_rig_open(r, (u64)link, FUSE_OPEN, O_RDONLY), -EINVAL);
    assert_int_equal(set_attr(r, (u64)link, &(struct fuse_setattr_in){.valid = FATTR_SIZE}),
                     -EINVAL);
    assert_int_equal(create(r, ROOT, "link", 0644, &handle), -EINVAL);
    dir_link = share_rig_lookup(r, ROOT, "up");
    assert_true(dir_link > ROOT);
    assert_int_equal(share_rig_lookup(r, (u64)dir_link, "secret"), -ENOTDIR);
    assert_int_equal(share_rig_open(r, (u64)dir_link, FUSE_OPENDIR, O_RDONLY), -ENOTDIR);
    assert_int_equal(share_rig_name(r, FUSE_UNLINK, (u64)dir_link, NULL, 0, "secret"), -ENOTDIR);
    assert_int_equal(access(r->base, F_OK), 0);
    share_rig_destroy(r);
}

static void only_files_and_directories_are_opened(void **state)
{
    struct share_rig *r = mounted(false);
    struct fuse_mknod_in in = {.mode = S_IFIFO | 0644};
    u64 handle;
    s64 fifo;

    assert_int_equal(share_rig_name(r, FUSE_MKNOD, ROOT, &in, sizeof(in), "fifo"), 0);
    fifo = share_rig_lookup(r, ROOT, "fifo");
    assert_int_equal(share_rig_open(r, (u64)fifo, FUSE_OPEN, O_RDONLY), -EINVAL);
    assert_int_equal(create(r, ROOT, "fifo", 0644, &handle), -EINVAL);
    for (unsigned i = 0; i < 2; i++) {
        in.mode = (i ? S_IFCHR : S_IFBLK) | 0666;
        in.rdev = 0x103; /* /dev/null */
        assert_int_equal(share_rig_name(r, FUSE_MKNOD, ROOT, &in, sizeof(in), "null"), -EPERM);
    }
    share_rig_destroy(r);
}

static void read_only_is_kept(void **state)
{
    struct share_rig *r = mounted(true);
    struct fuse_setattr_in chmod_in = {.valid = FATTR_MODE, .mode = 0777};
    s64 file = share_rig_lookup(r, ROOT, "file"), handle;
    u64 new_handle;

    assert_true(file > ROOT);
    assert_int_equal(create(r, ROOT, "new", 0644, &new_handle), -EROFS);
    assert_int_equal(make_dir(r, ROOT, "new"), -EROFS);
    assert_int_equal(move(r, ROOT, "file", ROOT, "new", 0), -EROFS);
    assert_int_equal(share_rig_name(r, FUSE_UNLINK, ROOT, NULL, 0, "file"), -EROFS);
    assert_int_equal(set_attr(r, (u64)file, &chmod_in), -EROFS);
    assert_int_equal(share_rig_open(r, (u64)file, FUSE_OPEN, O_RDWR), -EROFS);
    assert_int_equal(share_rig_open(r, (u64)file, FUSE_OPEN, O_RDONLY | O_TRUNC), -EROFS);
    handle = share_rig_open(r, (u64)file, FUSE_OPEN, O_RDONLY);
    assert_true(handle >= 0);
    assert_int_equal(share_rig_write(r, (u64)handle, 0, "x", 1), -EROFS);
    assert_int_equal(share_rig_read(r, (u64)handle, 0, 100), 0);
    assert_int_equal(r->len, strlen("contents"));
    share_rig_destroy(r);
}

/* Whether this file system has extended attributes for users; without them no owner can be noted. */
static bool has_xattrs(const struct share_rig *r)
{
    return setxattr(share_rig_path(r, "file"), "user.probe", "x", 1, 0) == 0;
}

static void owners_and_set_id_bits_are_the_guests_alone(void **state)
{
    struct share_rig *r = mounted(false);
    struct fuse_setattr_in in = {.valid = FATTR_UID | FATTR_GID, .uid = 4321, .gid = 8765};
    struct fuse_getxattr_in any = {.size = 1000};
    s64 file = share_rig_lookup(r, ROOT, "file");
    struct stat st;

    if (!has_xattrs(r)) {
        share_rig_destroy(r);
        skip();
    }
    assert_int_equal(set_attr(r, (u64)file, &in), 0);
    assert_int_equal(told_attr(r)->uid, 4321);
    assert_int_equal(told_attr(r)->gid, 8765);
    in = (struct fuse_setattr_in){.valid = FATTR_MODE, .mode = 06755};
    assert_int_equal(set_attr(r, (u64)file, &in), 0);
    assert_int_equal(told_attr(r)->mode, S_IFREG | 06755);
    assert_int_equal(told_attr(r)->uid, 4321);
    assert_int_equal(host_mode(r, "file"), S_IFREG | 0755);
    stat(share_rig_path(r, "file"), &st);
    assert_int_equal(st.st_uid, geteuid());

    /* The note is none of the guest's extended attributes. */
    assert_int_equal(
        share_rig_name(r, FUSE_GETXATTR, (u64)file, &any, sizeof(any), "user.doppel.owner"),
        -EOPNOTSUPP);
    assert_int_equal(share_rig_name(r, FUSE_REMOVEXATTR, (u64)file, NULL, 0, "user.doppel.owner"),
                     -EOPNOTSUPP);
    assert_int_equal(share_rig_call(r, FUSE_LISTXATTR, (u64)file, &any, sizeof(any), NULL, 0), 0);
    assert_int_equal(r->len, sizeof("user.probe"));
    assert_memory_equal(r->answer, "user.probe", sizeof("user.probe"));

    /* A write of somebody's takes the bits away, a change of the owner as well. */
    in = (struct fuse_setattr_in){.valid = FATTR_KILL_SUIDGID | FATTR_SIZE, .size = 1};
    assert_int_equal(set_attr(r, (u64)file, &in), 0);
    assert_int_equal(told_attr(r)->mode, S_IFREG | 0755);

    /* Back to what the host has: the note goes. */
    in = (struct fuse_setattr_in){
        .valid = FATTR_UID | FATTR_GID, .uid = geteuid(), .gid = getegid()};
    assert_int_equal(set_attr(r, (u64)file, &in), 0);
    assert_int_equal(getxattr(share_rig_path(r, "file"), "user.doppel.owner", NULL, 0), -1);
    share_rig_destroy(r);
}

static void extended_attributes_of_users(void **state)
{
    struct share_rig *r = mounted(false);
    struct {
        u32 size, flags;
    } set = {.size = 5};
    struct fuse_getxattr_in get = {.size = 0};
    s64 file = share_rig_lookup(r, ROOT, "file");
    bool have = has_xattrs(r);

    assert_int_equal(
        share_rig_call(r, FUSE_SETXATTR, (u64)file, &set, sizeof(set), "security.x\0value", 16),
        -EOPNOTSUPP);
    assert_int_equal(share_rig_call(r, FUSE_SETXATTR, (u64)file, &set, sizeof(set),
                                    "user.doppel.owner\0"
                                    "0 0 0",
                                    23),
                     -EOPNOTSUPP);
    if (have) {
        assert_int_equal(
            share_rig_call(r, FUSE_SETXATTR, (u64)file, &set, sizeof(set), "user.x\0value", 12), 0);
        /* Less data than it says. */
        assert_int_equal(
            share_rig_call(r, FUSE_SETXATTR, (u64)file, &set, sizeof(set), "user.x\0val", 10),
            -EINVAL);
        assert_int_equal(share_rig_name(r, FUSE_GETXATTR, (u64)file, &get, sizeof(get), "user.x"),
                         0);
        assert_int_equal(((struct fuse_getxattr_out *)r->answer)->size, 5);
        get.size = 4;
        assert_int_equal(share_rig_name(r, FUSE_GETXATTR, (u64)file, &get, sizeof(get), "user.x"),
                         -ERANGE);
        get.size = 5;
        assert_int_equal(share_rig_name(r, FUSE_GETXATTR, (u64)file, &get, sizeof(get), "user.x"),
                         0);
        assert_memory_equal(r->answer, "value", 5);
        assert_int_equal(share_rig_name(r, FUSE_REMOVEXATTR, (u64)file, NULL, 0, "user.x"), 0);
    }
    share_rig_destroy(r);
}

static void links_and_removal(void **state)
{
    struct share_rig *r = mounted(false);
    s64 file = share_rig_lookup(r, ROOT, "file"), dir = make_dir(r, ROOT, "dir");
    struct fuse_link_in in = {.oldnodeid = (u64)file};
    char target[16];

    assert_int_equal(share_rig_name(r, FUSE_LINK, (u64)dir, &in, sizeof(in), "other"), 0);
    assert_int_equal(((struct fuse_entry_out *)r->answer)->nodeid, file); /* one inode, one node */
    assert_int_equal(((struct fuse_entry_out *)r->answer)->attr.nlink, 2);
    assert_int_equal(share_rig_call(r, FUSE_SYMLINK, (u64)dir, "sym", 4, "../file", 8), 0);
    assert_int_equal(readlink(share_rig_path(r, "dir/sym"), target, sizeof(target)), 7);
    assert_int_equal(share_rig_name(r, FUSE_RMDIR, ROOT, NULL, 0, "dir"), -ENOTEMPTY);
    assert_int_equal(share_rig_name(r, FUSE_UNLINK, (u64)dir, NULL, 0, "sym"), 0);
    assert_int_equal(share_rig_name(r, FUSE_UNLINK, (u64)dir, NULL, 0, "other"), 0);
    assert_int_equal(share_rig_name(r, FUSE_RMDIR, ROOT, NULL, 0, "dir"), 0);
    /* The host says so, and the guest may believe it for a while. */
    assert_int_equal(share_rig_lookup(r, ROOT, "dir"), -ENOENT);
    assert_int_equal(r->len, sizeof(struct fuse_entry_out));
    assert_true(((struct fuse_entry_out *)r->answer)->entry_valid > 0);
    share_rig_destroy(r);
}

/* With descriptors for hardly anything: nodes are had again by their names. */
static void nodes_outlive_their_descriptors(void **state)
{
    struct share_rig *r = mounted(false);
    s64 a = make_dir(r, ROOT, "a"), b = make_dir(r, (u64)a, "b"), c = make_dir(r, ROOT, "c"), file;
    struct fuse_open_in in = {.flags = O_RDONLY};
    u64 handle;

    r->share->nodes.fds_max = 1;
    file = create(r, (u64)b, "deep", 0644, &handle);
    share_rig_write(r, handle, 0, "deep", 4);
    share_rig_release(r, handle);
    assert_int_equal(r->share->nodes.fds, 1);
    /* Moved by the guest, with what is in it. */
    assert_int_equal(move(r, ROOT, "a", (u64)c, "moved", 0), 0);
    assert_int_equal(share_rig_call(r, FUSE_OPEN, (u64)file, &in, sizeof(in), NULL, 0), 0);
    handle = ((struct fuse_open_out *)r->answer)->fh;
    assert_int_equal(share_rig_read(r, handle, 0, 100), 0);
    assert_memory_equal(r->answer, "deep", 4);
    /* An open file has its descriptors, even when its name is gone. */
    assert_int_equal(share_rig_name(r, FUSE_UNLINK, (u64)b, NULL, 0, "deep"), 0);
    assert_int_equal(get_attr(r, (u64)file), 0);
    assert_int_equal(told_attr(r)->nlink, 0);
    assert_int_equal(share_rig_release(r, handle), 0);
    assert_int_equal(get_attr(r, (u64)file), -ESTALE);
    /* Moved by the host: not found until it is looked up again, and then the same. */
    host_rename(r, "c", "file2");
    assert_int_equal(get_attr(r, (u64)b), -ESTALE);
    assert_int_equal(share_rig_lookup(r, ROOT, "file2"), c);
    assert_int_equal(get_attr(r, (u64)b), 0);
    /* Replaced by the host: another inode, another node. */
    assert_int_equal(unlink(share_rig_path(r, "file")), 0);
    file = share_rig_lookup(r, ROOT, "file2");
    share_rig_put(share_rig_path(r, "file"), "new");
    assert_true(share_rig_lookup(r, ROOT, "file") != file);
    share_rig_destroy(r);
}

/* A link in the place of a directory, while the node has no descriptor, leads nowhere. */
static void a_link_in_the_way_is_not_followed(void **state)
{
    struct share_rig *r = mounted(false);
    s64 dir = make_dir(r, ROOT, "dir"), file;
    u64 handle;

    r->share->nodes.fds_max = 1;
    file = create(r, (u64)dir, "secret", 0644, &handle);
    share_rig_release(r, handle);
    assert_int_equal(get_attr(r, (u64)file), 0);
    host_rename(r, "dir", "aside");
    assert_int_equal(symlink("..", share_rig_path(r, "dir")), 0);
    assert_int_equal(get_attr(r, (u64)file), -ESTALE);
    assert_int_equal(get_attr(r, (u64)dir), -ESTALE);
    share_rig_destroy(r);
}

static void what_a_guest_holds_is_bounded(void **state)
{
    struct share_rig *r = mounted(false);
    struct fuse_forget_in forget = {.nlookup = 1000};
    s64 file, handle;

    share_set_inodes_max(r->share, 2);
    file = share_rig_lookup(r, ROOT, "file");
    assert_true(file > ROOT);
    assert_int_equal(make_dir(r, ROOT, "dir"), -ENFILE);
    r->share->handles.max = 2;
    assert_int_equal(share_rig_open(r, (u64)file, FUSE_OPEN, O_RDONLY), 0);
    handle = share_rig_open(r, (u64)file, FUSE_OPEN, O_RDONLY);
    assert_int_equal(handle, 1);
    assert_int_equal(share_rig_open(r, (u64)file, FUSE_OPEN, O_RDONLY), -ENFILE);
    assert_int_equal(share_rig_release(r, 0), 0);
    assert_int_equal(share_rig_open(r, (u64)file, FUSE_OPEN, O_RDONLY), 0);
    /* Forgotten, but open; then gone, and there is room for another. */
    share_rig_call(r, FUSE_FORGET, (u64)file, &forget, sizeof(forget), NULL, 0);
    assert_int_equal(r->len, 0);
    assert_int_equal(share_rig_read(r, 0, 0, 10), 0);
    share_rig_release(r, 0);
    share_rig_release(r, 1);
    assert_int_equal(get_attr(r, (u64)file), -ESTALE);
    assert_true(share_rig_lookup(r, ROOT, "dir") > ROOT);
    /* The root isn't forgotten. */
    share_rig_call(r, FUSE_FORGET, ROOT, &forget, sizeof(forget), NULL, 0);
    assert_int_equal(get_attr(r, ROOT), 0);
    share_rig_destroy(r);
}

static void messages_are_judged(void **state)
{
    struct share_rig *r = share_rig_create(false);
    struct fuse_in_header h = {.len = sizeof(h), .opcode = FUSE_STATFS, .nodeid = ROOT};
    struct fuse_out_header out;
    struct iovec in_iov = {&h, sizeof(h)}, out_iov = {&out, sizeof(out)};
    struct share_request request = {&in_iov, 1, &out_iov, 1};
    struct fuse_init_in old = {.major = FUSE_KERNEL_VERSION, .minor = 8};
    char *big = calloc(1, 100000);

    assert_int_equal(get_attr(r, ROOT), -EIO); /* before FUSE_INIT */
    assert_int_equal(share_rig_call(r, FUSE_INIT, 0, &old, sizeof(old), NULL, 0), -EPROTO);
    assert_false(share_is_mounted(r->share));
    assert_int_equal(share_rig_init(r), 0);
    assert_true(share_is_mounted(r->share));
    assert_int_equal(share_rig_call(r, FUSE_GETATTR, ROOT, "", 1, NULL, 0), -EINVAL);
    assert_int_equal(share_rig_call(r, FUSE_LOOKUP, ROOT, "endless", 7, NULL, 0), -EINVAL);
    assert_int_equal(share_rig_call(r, FUSE_LOOKUP, ROOT, NULL, 0, NULL, 0), -EINVAL);
    assert_int_equal(share_rig_call(r, FUSE_IOCTL, ROOT, big, 32, NULL, 0), -ENOSYS);
    assert_int_equal(share_rig_call(r, 4711, ROOT, big, 32, NULL, 0), -ENOSYS);
    assert_int_equal(share_rig_call(r, FUSE_LOOKUP, ROOT, big, 100000, NULL, 0), -E2BIG);
    memset(big, 'x', 300);
    assert_int_equal(share_rig_lookup(r, ROOT, big), -ENAMETOOLONG);
    assert_int_equal(get_attr(r, 12345), -ESTALE);
    free(big);

    /* No room for what the answer would hold, or for any answer; a length that isn't there. */
    assert_int_equal(share_serve(r->share, &request), sizeof(out));
    assert_int_equal(out.error, -EINVAL);
    out_iov.iov_len = 8;
    assert_int_equal(share_serve(r->share, &request), 0);
    out_iov.iov_len = sizeof(out);
    h.len = sizeof(h) + 100;
    assert_int_equal(share_serve(r->share, &request), sizeof(out));
    assert_int_equal(out.error, -EINVAL);
    in_iov.iov_len = 8;
    assert_int_equal(share_serve(r->share, &request), 0);
    share_rig_destroy(r);
}

static void a_new_mount_begins_anew(void **state)
{
    struct share_rig *r = mounted(false);
    s64 dir = make_dir(r, ROOT, "a"), inner = make_dir(r, (u64)dir, "b");
    s64 file = share_rig_lookup(r, ROOT, "file");
    s64 handle = share_rig_open(r, (u64)file, FUSE_OPEN, O_RDONLY);

    assert_int_equal(r->share->nodes.count, 4);
    assert_int_equal(share_rig_init(r), 0);
    assert_int_equal(get_attr(r, (u64)inner), -ESTALE);
    assert_int_equal(share_rig_read(r, (u64)handle, 0, 10), -EBADF);
    assert_int_equal(r->share->nodes.count, 1);
    assert_int_equal(r->share->handles.count, 0);
    assert_int_equal(share_rig_call(r, FUSE_DESTROY, 0, NULL, 0, NULL, 0), 0);
    assert_false(share_is_mounted(r->share));
    share_rig_destroy(r);
}

static void the_cache_is_kept_while_it_is_right(void **state)
{
    struct share_rig *r = mounted(false);
    s64 file = share_rig_lookup(r, ROOT, "file");
    const struct fuse_open_out *out = (const void *)r->answer;

    assert_true(share_rig_open(r, (u64)file, FUSE_OPEN, O_RDONLY) >= 0);
    assert_int_equal(out->open_flags, 0);
    assert_true(share_rig_open(r, (u64)file, FUSE_OPEN, O_RDONLY) >= 0);
    assert_int_equal(out->open_flags, FOPEN_KEEP_CACHE);
    share_rig_put(share_rig_path(r, "file"), "of another length");
    assert_true(share_rig_open(r, (u64)file, FUSE_OPEN, O_RDONLY) >= 0);
    assert_int_equal(out->open_flags, 0);
    share_rig_destroy(r);
}

#define ENTRIES 300

/* Reads a directory in small pieces; counts the names e0... in seen, and looks at the nodes. */
static void read_dir(struct share_rig *r, bool plus, unsigned seen[ENTRIES])
{
    s64 handle = share_rig_open(r, ROOT, FUSE_OPENDIR, O_RDONLY);
    struct fuse_read_in in = {.fh = (u64)handle, .size = 1000};

    assert_true(handle >= 0);
    for (;;) {
        assert_int_equal(share_rig_call(r, plus ? FUSE_READDIRPLUS : FUSE_READDIR, ROOT, &in,
                                        sizeof(in), NULL, 0),
                         0);
        if (!r->len)
            break;
        assert_true(r->len <= in.size);
        for (size_t at = 0; at < r->len;) {
            const struct fuse_entry_out *entry = (const void *)(r->answer + at);
            const struct fuse_dirent *d = plus ? (const void *)(entry + 1) : (const void *)entry;
            unsigned n;

            if (sscanf(d->name, "e%u", &n) == 1) {
                seen[n]++;
                assert_true(!plus || (entry->nodeid && S_ISREG(entry->attr.mode)));
            }
            in.offset = d->off;
            at += FUSE_DIRENT_SIZE(d) + (plus ? sizeof(*entry) : 0);
        }
    }
    assert_int_equal(share_rig_read(r, (u64)handle, 0, 10), -EBADF); /* no file */
    share_rig_release(r, (u64)handle);
}

static void directories_are_read_in_pieces(void **state)
{
    for (int plus = 0; plus < 2; plus++) {
        struct share_rig *r = mounted(false);
        unsigned seen[ENTRIES] = {0};
        char name[16];

        for (unsigned i = 0; i < ENTRIES; i++) {
            snprintf(name, sizeof(name), "e%u", i);
            share_rig_put(share_rig_path(r, name), "");
        }
        read_dir(r, plus, seen);
        for (unsigned i = 0; i < ENTRIES; i++)
            assert_int_equal(seen[i], 1);
        /* All of them, "file" and the root; a plain listing gives no nodes. */
        assert_int_equal(r->share->nodes.count, plus ? ENTRIES + 2 : 1);
        share_rig_destroy(r);
    }
}

static void holes_ranges_and_copies(void **state)
{
    struct share_rig *r = mounted(false);
    struct fuse_fallocate_in room = {.length = 100000};
    struct fuse_copy_file_range_in copy = {.len = UINT64_MAX};
    struct fuse_lseek_in seek = {.whence = SEEK_HOLE};
    struct fuse_fsync_in sync = {.fsync_flags = FUSE_FSYNC_FDATASYNC};
    s64 node = create(r, ROOT, "room", 0644, &room.fh);

    assert_int_equal(share_rig_call(r, FUSE_FALLOCATE, (u64)node, &room, sizeof(room), NULL, 0), 0);
    assert_int_equal(get_attr(r, (u64)node), 0);
    assert_int_equal(told_attr(r)->size, 100000);
    copy.fh_in =
        (u64)share_rig_open(r, (u64)share_rig_lookup(r, ROOT, "file"), FUSE_OPEN, O_RDONLY);
    copy.fh_out = sync.fh = room.fh;
    assert_int_equal(share_rig_call(r, FUSE_COPY_FILE_RANGE, 0, &copy, sizeof(copy), NULL, 0), 0);
    assert_int_equal(((struct fuse_write_out *)r->answer)->size, strlen("contents"));
    seek.fh = copy.fh_in;
    assert_int_equal(share_rig_call(r, FUSE_LSEEK, 0, &seek, sizeof(seek), NULL, 0), 0);
    assert_int_equal(((struct fuse_lseek_out *)r->answer)->offset, strlen("contents"));
    assert_int_equal(share_rig_call(r, FUSE_FSYNC, (u64)node, &sync, sizeof(sync), NULL, 0), 0);
    assert_int_equal(share_rig_call(r, FUSE_STATFS, ROOT, NULL, 0, NULL, 0), 0);
    assert_true(((struct fuse_statfs_out *)r->answer)->st.blocks > 0);
    share_rig_destroy(r);
}

/* ---- several calls at once ---- */

#define THREADS 4
#define ROUNDS 200

struct worker {
    struct share_rig rig; /* of its own, for the answers; the share is common */
    unsigned number;
    bool failed;
};

static void *work(void *opaque)
{
    struct worker *w = opaque;
    struct fuse_forget_in forget = {.nlookup = 1};
    char name[16], other[16];
    u64 handle;

    for (unsigned i = 0; i < ROUNDS && !w->failed; i++) {
        s64 node, common = share_rig_lookup(&w->rig, ROOT, "file");

        snprintf(name, sizeof(name), "w%u", w->number);
        snprintf(other, sizeof(other), "v%u", w->number);
        node = create(&w->rig, ROOT, name, 0644, &handle);
        w->failed |= node <= ROOT || common <= ROOT ||
                     share_rig_write(&w->rig, handle, 0, &i, sizeof(i)) ||
                     share_rig_read(&w->rig, handle, 0, sizeof(i)) ||
                     memcmp(w->rig.answer, &i, sizeof(i)) != 0 ||
                     move(&w->rig, ROOT, name, ROOT, other, 0) || get_attr(&w->rig, (u64)common) ||
                     share_rig_name(&w->rig, FUSE_UNLINK, ROOT, NULL, 0, other) ||
                     share_rig_release(&w->rig, handle);
        share_rig_call(&w->rig, FUSE_FORGET, (u64)node, &forget, sizeof(forget), NULL, 0);
        share_rig_call(&w->rig, FUSE_FORGET, (u64)common, &forget, sizeof(forget), NULL, 0);
    }
    return NULL;
}

static void calls_run_side_by_side(void **state)
{
    struct share_rig *r = mounted(false);
    struct worker *w = calloc(THREADS, sizeof(*w));
    pthread_t threads[THREADS];

    r->share->nodes.fds_max = 2;
    for (unsigned i = 0; i < THREADS; i++) {
        w[i].rig.share = r->share;
        w[i].number = i;
        assert_int_equal(pthread_create(&threads[i], NULL, work, &w[i]), 0);
    }
    for (unsigned i = 0; i < THREADS; i++) {
        pthread_join(threads[i], NULL);
        assert_false(w[i].failed);
    }
    assert_int_equal(r->share->nodes.count, 1);
    assert_int_equal(r->share->handles.count, 0);
    free(w);
    share_rig_destroy(r);
}

static void bad_directories_are_refused(void **state)
{
    struct share_config config = {.path = "/nowhere/at/all"};
    struct error err;

    assert_null(share_open(&config, &err));
    assert_int_equal(err.class, ERROR_INPUT);
    config.path = "/dev/null";
    assert_null(share_open(&config, &err));
    assert_int_equal(err.class, ERROR_INPUT);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(files_are_made_written_and_read),
        cmocka_unit_test(no_name_leads_outside),
        cmocka_unit_test(only_files_and_directories_are_opened),
        cmocka_unit_test(read_only_is_kept),
        cmocka_unit_test(owners_and_set_id_bits_are_the_guests_alone),
        cmocka_unit_test(extended_attributes_of_users),
        cmocka_unit_test(links_and_removal),
        cmocka_unit_test(nodes_outlive_their_descriptors),
        cmocka_unit_test(a_link_in_the_way_is_not_followed),
        cmocka_unit_test(what_a_guest_holds_is_bounded),
        cmocka_unit_test(messages_are_judged),
        cmocka_unit_test(a_new_mount_begins_anew),
        cmocka_unit_test(the_cache_is_kept_while_it_is_right),
        cmocka_unit_test(directories_are_read_in_pieces),
        cmocka_unit_test(holes_ranges_and_copies),
        cmocka_unit_test(calls_run_side_by_side),
        cmocka_unit_test(bad_directories_are_refused),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
