/*
 * Files that the guest has open.
 */
#include "share/internal.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define SLOTS_FIRST 64

/* The lock is held: a free slot, or -errno. */
static s64 free_slot(struct handle_table *t)
{
    u32 size = t->size ? 2 * t->size : SLOTS_FIRST, i = t->first_free;
    struct handle **slots;

    if (t->count >= t->max)
        return -ENFILE;
    while (i < t->size && t->slots[i])
        i++;
    if (i < t->size)
        return i;
    slots = realloc(t->slots, size * sizeof(struct handle *));
    if (!slots)
        return -ENOMEM;
    memset(slots + t->size, 0, (size - t->size) * sizeof(struct handle *));
    t->slots = slots;
    t->size = size;
    return i;
}

int handle_create(struct share *s, struct node *n, int fd, bool directory, u64 *number)
{
    struct handle_table *t = &s->handles;
    struct handle *h = malloc(sizeof(*h));
    s64 slot;

    if (!h)
        return -ENOMEM;
    *h = (struct handle){.fd = fd, .node = n, .directory = directory, .users = 1};
    pthread_mutex_init(&h->position, NULL);
    pthread_mutex_lock(&s->lock);
    slot = free_slot(t);
    if (slot >= 0) {
        t->slots[slot] = h;
        t->count++;
        t->first_free = (u32)slot + 1;
        *number = (u64)slot;
    }
    pthread_mutex_unlock(&s->lock);
    if (slot >= 0)
        return 0;
    pthread_mutex_destroy(&h->position);
    free(h);
    return (int)slot;
}

int handle_get(struct share *s, u64 number, bool directory, struct handle **out)
{
    struct handle_table *t = &s->handles;
    struct handle *h;
    int ret = -EBADF;

    pthread_mutex_lock(&s->lock);
    h = number < t->size ? t->slots[number] : NULL;
    if (h && h->directory == directory) {
        h->users++;
        *out = h;
        ret = 0;
    }
    pthread_mutex_unlock(&s->lock);
    return ret;
}

void handle_put(struct share *s, struct handle *h)
{
    bool last;

    pthread_mutex_lock(&s->lock);
    last = --h->users == 0;
    pthread_mutex_unlock(&s->lock);
    if (!last)
        return;
    close(h->fd);
    node_put(s, h->node);
    pthread_mutex_destroy(&h->position);
    free(h);
}

int handle_release(struct share *s, u64 number)
{
    struct handle_table *t = &s->handles;
    struct handle *h = NULL;

    pthread_mutex_lock(&s->lock);
    if (number < t->size && t->slots[number]) {
        h = t->slots[number];
        t->slots[number] = NULL;
        t->count--;
        t->first_free = MIN(t->first_free, (u32)number);
    }
    pthread_mutex_unlock(&s->lock);
    if (!h)
        return -EBADF;
    handle_put(s, h);
    return 0;
}

void handles_release_all(struct share *s)
{
    for (u32 i = 0; i < s->handles.size; i++)
        handle_release(s, i);
}
