/*
 * What the parts of the file server share. `struct share`'s lock guards inodes and handles; it isn't held while
 * the host's file system works, but to reopen an inode whose descriptor was given up.
 */
#ifndef DOPPEL_SHARE_INTERNAL_H
#define DOPPEL_SHARE_INTERNAL_H

#include "share/share.h"

#include <fcntl.h>
#include <pthread.h>
#include <sys/stat.h>

#include <linux/fuse.h>
#include <linux/stat.h>

#define SHARE_NAME_MAX 255
#define SHARE_MODE_BITS 07777

/* ---- inodes that the guest knows (node.c) ---- */

/* Tells files apart, also one from another that got its inode number later. */
struct node_key {
    u64 dev, ino;
    u64 born; /* nanoseconds; 0 where the file system doesn't tell */
    u32 type; /* S_IFMT */
};

struct node {
    u64 id;
    struct node_key key;
    int fd; /* O_PATH, or -1: given up, and had again by the parent and name */
    struct node *parent;
    char *name;       /* where it was seen last; NULL: the root */
    u64 lookups;      /* how often the guest was given the id and has not forgotten it */
    unsigned users;   /* calls under way, and open files */
    unsigned inside;  /* nodes whose parent this is */
    u64 opened_state; /* of its contents, when the guest opened it last; see file.c */
    struct node *next_by_id, *next_by_key;
    struct node *older, *newer; /* of those with a descriptor and no user */
};

struct node_table {
    struct node **by_id, **by_key; /* hashed */
    size_t buckets;                /* of either; a power of two */
    u64 count, max, next_id;
    unsigned fds, fds_max;
    struct node *oldest, *newest;
    struct node *root;
};

/* ---- open files (handle.c) ---- */

struct handle {
    int fd;
    struct node *node; /* in use meanwhile */
    bool directory;
    unsigned users;
    pthread_mutex_t position; /* of a directory's fd */
};

struct handle_table {
    struct handle **slots; /* by number */
    u32 size, count, max, first_free;
};

struct share {
    pthread_mutex_t lock;
    bool read_only;
    _Atomic bool ready; /* the guest said FUSE_INIT */
    u64 dev;            /* of the root */
    int sync_fd;
    struct node_table nodes;
    struct handle_table handles;
};

/* One message, taken apart. */
struct call {
    struct share *share;
    const struct share_request *request;
    struct fuse_in_header header;
    const u8 *
        args; /* what follows it, copied: the operation's struct, names, data (not that of a write) */
    size_t args_len;
    const char *names[2];
    size_t data_at; /* in args, behind struct and names */
    size_t room;    /* for what follows the answer's header */
    u8 *reply;      /* call_reply's */
    bool in_place;  /* the answer is in guest memory already */
    u8 small[256] __attribute__((aligned(8)));
};

/* The answer's payload, zeroed: `size` bytes; NULL when the guest left no room for it, or there is no memory. */
void *call_reply(struct call *c, size_t size);
/* A part of the message, or of the room for the answer, which begins with its header. Returns the iovecs. */
unsigned call_iov_in(const struct call *c, size_t offset, size_t len, struct iovec *iov);
unsigned call_iov_out(const struct call *c, size_t offset, size_t len, struct iovec *iov);
#define SHARE_IOV_MAX 512

/*
 * node.c. node_get pins an inode, which has a descriptor then, until node_put: 0, or -ESTALE when it isn't known or
 * not where it was any more, or another -errno.
 */
int nodes_init(struct share *s, int root_fd, const struct statx *st);
void nodes_fini(struct share *s);
int node_get(struct share *s, u64 id, struct node **out);
void node_put(struct share *s, struct node *n);
/*
 * The guest is told of an inode: fd (O_PATH, taken over in any case) and *st are its own, and it was found in
 * `parent`, pinned, by this name. *out is pinned. 0, or -ENOMEM, -ENFILE.
 */
int node_found(struct share *s, struct node *parent, const char *name, int fd,
               const struct statx *st, struct node **out);
void node_forget(struct share *s, u64 id, u64 lookups);
/* The inode in `parent` by this name has come there by a rename. */
void node_moved(struct share *s, struct node *parent, const char *name);
void nodes_forget_all(struct share *s);

/* handle.c. Takes over fd and the pin of `n`, when it succeeds: 0, -ENFILE, -ENOMEM. */
int handle_create(struct share *s, struct node *n, int fd, bool directory, u64 *number);
int handle_get(struct share *s, u64 number, bool directory, struct handle **out);
void handle_put(struct share *s, struct handle *h);
int handle_release(struct share *s, u64 number);
void handles_release_all(struct share *s);

/* Descriptors of inodes (attr.c, mark.c). 0 or -errno. */
#define PROC_PATH_SIZE 32
/* The path by which the inode of a descriptor is reached, whatever became of its name. */
void proc_path(int fd, char path[PROC_PATH_SIZE]);
int stat_fd(int fd, struct statx *st);
/* As stat_fd, with owner and mode as the guest is told. */
int stat_for_guest(int fd, struct statx *st);
void fill_attr(const struct share *s, const struct statx *st, struct fuse_attr *attr);

/* What a guest wants to have of a file, and the host's file doesn't show (mark.c). */
struct wish {
    bool has_uid, has_gid, has_mode;
    u32 uid, gid;
    u32 mode; /* SHARE_MODE_BITS */
};
void mark_apply(int fd, struct statx *st);
int mark_set(int fd, const struct wish *w);
int mark_drop_set_id(int fd);
bool mark_is_name(const char *xattr);

/* An inode that was found (fd taken over): what the guest is told of it. *node, if wanted, is pinned. */
int enter(struct share *s, struct node *parent, const char *name, int fd,
          struct fuse_entry_out *out, struct node **node);
/* The O_PATH descriptor of a name in a directory, or -errno. */
int open_name(const struct node *parent, const char *name);

/* ---- operations: bytes of the answer's payload, or -errno ---- */

/* names.c */
int op_lookup(struct call *c);
int op_mknod(struct call *c);
int op_mkdir(struct call *c);
int op_symlink(struct call *c);
int op_link(struct call *c);
int op_unlink(struct call *c);
int op_rmdir(struct call *c);
int op_rename(struct call *c);
int op_rename2(struct call *c);
int op_create(struct call *c);
int op_readlink(struct call *c);
/* attr.c */
int op_getattr(struct call *c);
int op_setattr(struct call *c);
int op_statfs(struct call *c);
int op_getxattr(struct call *c);
int op_setxattr(struct call *c);
int op_listxattr(struct call *c);
int op_removexattr(struct call *c);
/* file.c */
int op_open(struct call *c);
int op_read(struct call *c);
int op_write(struct call *c);
int op_release(struct call *c);
int op_fsync(struct call *c);
int op_fallocate(struct call *c);
int op_lseek(struct call *c);
int op_copy_file_range(struct call *c);
/* Opens the inode again, for data: a descriptor or -errno. */
int open_node(const struct node *n, int flags);
/* What FUSE_OPEN and FUSE_CREATE answer: fills *out; takes over fd and, when it succeeds, the pin. */
int open_answer(struct share *s, struct node *n, int fd, struct fuse_open_out *out);
/* directory.c */
int op_opendir(struct call *c);
int op_readdir(struct call *c);
int op_readdirplus(struct call *c);

#endif
