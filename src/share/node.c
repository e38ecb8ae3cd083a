/*
 * The inodes that a guest knows.
 *
 * A guest remembers inodes by the hundred thousand, and a process has fewer descriptors. So a node keeps its
 * descriptor only while it is among the last that were used; afterwards the inode is opened again by the names that lead
 * to it from the nearest directory that has one, without following links, and is taken only when it is the same
 * inode. If the host moved or replaced it, the guest hears ESTALE and looks its name up again.
 *
 * A node lives as long as the guest knows it, a call or an open file uses it, or another node's way leads
 * through it. Directories that the host moves into one another may make a ring of the latter: it is bounded, and goes
 * with the table.
 */
#define _GNU_SOURCE /* O_PATH, statx */

#include "share/internal.h"

#include <errno.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <linux/openat2.h>

#define BUCKETS_FIRST 1024
#define FDS_MAX 16384
#define FDS_MIN 64
#define FDS_SHARE 32 /* of what the process may have, for each directory's inodes */

static struct node_key key_of(const struct statx *st)
{
    return (struct node_key){
        .dev = (u64)st->stx_dev_major << 32 | st->stx_dev_minor,
        .ino = st->stx_ino,
        .born = st->stx_mask & STATX_BTIME
                    ? (u64)st->stx_btime.tv_sec * NS_PER_SEC + st->stx_btime.tv_nsec
                    : 0,
        .type = st->stx_mode & S_IFMT,
    };
}

static bool same_key(const struct node_key *a, const struct node_key *b)
{
    return a->ino == b->ino && a->dev == b->dev && a->born == b->born && a->type == b->type;
}

/* ---- the two hashes; the lock is held ---- */

static size_t bucket(const struct node_table *t, u64 value)
{
    return (value * 0x9e3779b97f4a7c15ULL) >> 32 & (t->buckets - 1);
}

static struct node *find_by_id(const struct node_table *t, u64 id)
{
    struct node *n = t->by_id[bucket(t, id)];

    while (n && n->id != id)
        n = n->next_by_id;
    return n;
}

static struct node *find_by_key(const struct node_table *t, const struct node_key *key)
{
    struct node *n = t->by_key[bucket(t, key->ino)];

    while (n && !same_key(&n->key, key))
        n = n->next_by_key;
    return n;
}

static void hash_in(struct node_table *t, struct node *n)
{
    struct node **id = &t->by_id[bucket(t, n->id)], **key = &t->by_key[bucket(t, n->key.ino)];

    n->next_by_id = *id;
    *id = n;
    n->next_by_key = *key;
    *key = n;
}

static void hash_out(struct node_table *t, struct node *n)
{
    struct node **id = &t->by_id[bucket(t, n->id)], **key = &t->by_key[bucket(t, n->key.ino)];

    while (*id != n)
        id = &(*id)->next_by_id;
    *id = n->next_by_id;
    while (*key != n)
        key = &(*key)->next_by_key;
    *key = n->next_by_key;
}

/* Twice the buckets. Without memory it goes on with those that there are. */
static void grow(struct node_table *t)
{
    struct node_table new = *t;

    new.buckets *= 2;
    new.by_id = calloc(new.buckets, sizeof(struct node *));
    new.by_key = calloc(new.buckets, sizeof(struct node *));
    if (!new.by_id || !new.by_key) {
        free(new.by_id);
        free(new.by_key);
        return;
    }
    for (size_t i = 0; i < t->buckets; i++) {
        for (struct node *n = t->by_id[i], *next; n; n = next) {
            next = n->next_by_id;
            hash_in(&new, n);
        }
    }
    free(t->by_id);
    free(t->by_key);
    *t = new;
}

/* ---- descriptors of nodes that nobody uses, in the order of their last use; the lock is held ---- */

static void list_out(struct node_table *t, struct node *n)
{
    *(n->older ? &n->older->newer : &t->oldest) = n->newer;
    *(n->newer ? &n->newer->older : &t->newest) = n->older;
    n->older = n->newer = NULL;
}

static void list_in(struct node_table *t, struct node *n)
{
    n->older = t->newest;
    *(t->newest ? &t->newest->newer : &t->oldest) = n;
    t->newest = n;
}

static void close_fd(struct node_table *t, struct node *n)
{
    if (n->fd < 0)
        return;
    close(n->fd);
    n->fd = -1;
    t->fds--;
}

static void pin(struct node_table *t, struct node *n)
{
    if (n->users++ == 0 && n->fd >= 0)
        list_out(t, n);
}

static void release_dead(struct node_table *t, struct node *n)
{
    while (n && !n->lookups && !n->users && !n->inside) {
        struct node *parent = n->parent;

        hash_out(t, n);
        if (n->fd >= 0)
            list_out(t, n);
        close_fd(t, n);
        t->count--;
        free(n->name);
        free(n);
        if (parent)
            parent->inside--;
        n = parent;
    }
}

static void unpin(struct node_table *t, struct node *n)
{
    if (--n->users)
        return;
    if (n->fd >= 0)
        list_in(t, n);
    release_dead(t, n);
    while (t->fds > t->fds_max && t->oldest) {
        struct node *oldest = t->oldest;

        list_out(t, oldest);
        close_fd(t, oldest);
    }
}

/* ---- opening by names ---- */

static int open_beneath(int dir, const char *path)
{
    struct open_how how = {
        .flags = O_PATH | O_NOFOLLOW | O_CLOEXEC,
        .resolve = RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS | RESOLVE_NO_MAGICLINKS,
    };
    int fd = (int)syscall(SYS_openat2, dir, path, &how, sizeof(how));

    return fd < 0 ? -errno : fd;
}

int open_name(const struct node *parent, const char *name)
{
    return open_beneath(parent->fd, name);
}

/* The lock is held. A file system that hangs holds up the other calls, but no vCPU and no device. */
static int reopen(struct node_table *t, struct node *n)
{
    char path[PATH_MAX];
    size_t at = sizeof(path) - 1;
    struct node *from = n;
    struct node_key key;
    struct statx st;
    int fd;

    path[at] = '\0';
    for (; from->fd < 0; from = from->parent) {
        size_t len = strlen(from->name);

        if (at <= len)
            return -ESTALE;
        at -= len;
        memcpy(path + at, from->name, len);
        path[--at] = '/';
    }
    fd = open_beneath(from->fd, path + at + 1);
    if (fd < 0)
        return fd == -ENOENT || fd == -ENOTDIR || fd == -ELOOP ? -ESTALE : fd;
    if (stat_fd(fd, &st) < 0)
        goto stale;
    key = key_of(&st);
    if (!same_key(&key, &n->key))
        goto stale;
    n->fd = fd;
    t->fds++;
    list_in(t, n);
    return 0;
stale:
    close(fd);
    return -ESTALE;
}

int node_get(struct share *s, u64 id, struct node **out)
{
    struct node *n;
    int ret = 0;

    pthread_mutex_lock(&s->lock);
    n = find_by_id(&s->nodes, id);
    if (!n)
        ret = -ESTALE;
    else if (n->fd < 0)
        ret = reopen(&s->nodes, n);
    if (!ret) {
        pin(&s->nodes, n);
        *out = n;
    }
    pthread_mutex_unlock(&s->lock);
    return ret;
}

void node_put(struct share *s, struct node *n)
{
    pthread_mutex_lock(&s->lock);
    unpin(&s->nodes, n);
    pthread_mutex_unlock(&s->lock);
}

/* ---- what the guest is told of, and forgets ---- */

/* Where it was seen last. Without memory for the name it stays where it was seen before. */
static void set_place(struct node_table *t, struct node *n, struct node *parent, const char *name)
{
    struct node *before = n->parent;
    char *copy;

    if (n == t->root || n == parent || (before == parent && !strcmp(n->name, name)))
        return;
    copy = strdup(name);
    if (!copy)
        return;
    free(n->name);
    n->name = copy;
    n->parent = parent;
    parent->inside++;
    if (before) {
        before->inside--;
        release_dead(t, before);
    }
}

static struct node *create(struct node_table *t, const struct node_key *key, struct node *parent,
                           const char *name, int fd)
{
    struct node *n = calloc(1, sizeof(*n));

    if (!n)
        return NULL;
    n->name = strdup(name);
    if (!n->name) {
        free(n);
        return NULL;
    }
    n->id = t->next_id++;
    n->key = *key;
    n->fd = fd;
    n->parent = parent;
    if (parent)
        parent->inside++;
    if (++t->count > t->buckets)
        grow(t);
    t->fds++;
    hash_in(t, n);
    list_in(t, n);
    return n;
}

/* The lock is held. */
static int found(struct node_table *t, const struct node_key *key, struct node *parent,
                 const char *name, int fd, struct node **out)
{
    struct node *n = find_by_key(t, key);

    if (n) {
        set_place(t, n, parent, name);
        if (n->fd >= 0) {
            close(fd);
        } else {
            n->fd = fd;
            t->fds++;
            list_in(t, n);
        }
    } else if (t->count >= t->max) {
        return -ENFILE;
    } else {
        n = create(t, key, parent, name, fd);
        if (!n)
            return -ENOMEM;
    }
    n->lookups++;
    pin(t, n);
    *out = n;
    return 0;
}

int node_found(struct share *s, struct node *parent, const char *name, int fd,
               const struct statx *st, struct node **out)
{
    struct node_key key = key_of(st);
    int ret;

    pthread_mutex_lock(&s->lock);
    ret = found(&s->nodes, &key, parent, name, fd, out);
    pthread_mutex_unlock(&s->lock);
    if (ret)
        close(fd);
    return ret;
}

void node_forget(struct share *s, u64 id, u64 lookups)
{
    struct node *n;

    pthread_mutex_lock(&s->lock);
    n = find_by_id(&s->nodes, id);
    if (n) {
        n->lookups -= MIN(lookups, n->lookups);
        release_dead(&s->nodes, n);
    }
    pthread_mutex_unlock(&s->lock);
}

void node_moved(struct share *s, struct node *parent, const char *name)
{
    int fd = open_name(parent, name);
    struct node_key key;
    struct statx st;
    struct node *n;

    if (fd < 0)
        return;
    if (stat_fd(fd, &st) == 0) {
        key = key_of(&st);
        pthread_mutex_lock(&s->lock);
        n = find_by_key(&s->nodes, &key);
        if (n)
            set_place(&s->nodes, n, parent, name);
        pthread_mutex_unlock(&s->lock);
    }
    close(fd);
}

void nodes_forget_all(struct share *s)
{
    struct node_table *t = &s->nodes;

    pthread_mutex_lock(&s->lock);
    for (size_t i = 0; i < t->buckets; i++) {
        for (struct node *n = t->by_id[i]; n; n = n->next_by_id)
            n->lookups = 0;
    }
    for (size_t i = 0; i < t->buckets; i++) {
        struct node *n = t->by_id[i];

        while (n) {
            bool dead = !n->users && !n->inside;

            release_dead(t, n);
            /* Parents that went with it may have been in this bucket. */
            n = dead ? t->by_id[i] : n->next_by_id;
        }
    }
    pthread_mutex_unlock(&s->lock);
}

/* ---- life ---- */

/* As many descriptors as the user may have: this process's limit is meant for programs that wait by select. */
static unsigned raise_fd_limit(void)
{
    struct rlimit limit;

    if (getrlimit(RLIMIT_NOFILE, &limit) < 0)
        return FDS_MIN;
    limit.rlim_cur = limit.rlim_max;
    setrlimit(RLIMIT_NOFILE, &limit);
    return (unsigned)MAX(FDS_MIN, MIN(FDS_MAX, limit.rlim_max / FDS_SHARE));
}

int nodes_init(struct share *s, int root_fd, const struct statx *st)
{
    struct node_table *t = &s->nodes;
    struct node_key key = key_of(st);

    *t = (struct node_table){
        .buckets = BUCKETS_FIRST,
        .max = UINT64_MAX,
        .next_id = FUSE_ROOT_ID,
        .fds_max = raise_fd_limit(),
    };
    t->by_id = calloc(t->buckets, sizeof(struct node *));
    t->by_key = calloc(t->buckets, sizeof(struct node *));
    t->root = t->by_id && t->by_key ? create(t, &key, NULL, "", root_fd) : NULL;
    if (!t->root) {
        nodes_fini(s);
        return -ENOMEM;
    }
    pin(t, t->root);
    return 0;
}

void nodes_fini(struct share *s)
{
    struct node_table *t = &s->nodes;

    for (size_t i = 0; t->by_id && i < t->buckets; i++) {
        for (struct node *n = t->by_id[i], *next; n; n = next) {
            next = n->next_by_id;
            close_fd(t, n);
            free(n->name);
            free(n);
        }
    }
    free(t->by_id);
    free(t->by_key);
    *t = (struct node_table){0};
}
