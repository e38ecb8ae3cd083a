/*
 * Where a command's data lie: physical region pages (NVM Express 1.4, 4.3) and scatter gather lists (4.4).
 *
 * A list lies in guest memory, and may change while it is read: each part of it is copied once. The number of
 * entries that are looked at is bounded, for a list may lead back to itself.
 */
#include "device/nvme/internal.h"

#include <string.h>

#define PRPS_PER_PAGE (NVME_PAGE_SIZE / sizeof(u64))
#define SGL_CHUNK 64 /* descriptors that are read at once */
#define SGL_DESCRIPTORS_MAX 1024

/* Appends [gpa, gpa + len): a piece for each slot of memory that it touches, unless it continues the last one. */
static enum nvme_status add(struct nvme *n, struct nvme_data *d, gpa_t gpa, u64 len, bool to_guest)
{
    while (len) {
        u64 here = len;
        u8 *host = memory_dma(n->env.memory, gpa, &here, to_guest);
        struct iovec *last = d->pieces ? &d->iov[d->pieces - 1] : NULL;

        if (!host)
            return NVME_DATA_TRANSFER_ERROR;
        if (last && d->gpa[d->pieces - 1] + last->iov_len == gpa &&
            memory_host(n->env.memory, d->gpa[d->pieces - 1], last->iov_len + here)) {
            last->iov_len += here;
        } else {
            if (d->pieces == NVME_PIECES_MAX)
                return NVME_INVALID_SGL_COUNT;
            d->iov[d->pieces] = (struct iovec){host, here};
            d->gpa[d->pieces++] = gpa;
        }
        d->len += here;
        gpa += here;
        len -= here;
    }
    return NVME_OK;
}

/* ---- PRP ---- */

/* A list's entries are whole pages; where a page of the list is full but data are left, its last leads to the next. */
static enum nvme_status add_prp_list(struct nvme *n, gpa_t list, u64 left, bool to_guest,
                                     struct nvme_data *d)
{
    u64 entries[PRPS_PER_PAGE];
    enum nvme_status status = NVME_OK;

    while (left) {
        u64 pages = (left + NVME_PAGE_SIZE - 1) / NVME_PAGE_SIZE;
        unsigned room = (unsigned)(PRPS_PER_PAGE - list % NVME_PAGE_SIZE / sizeof(u64));
        unsigned count = (unsigned)MIN(pages, room);
        bool chained = pages > room;

        if (list % sizeof(u64))
            return NVME_INVALID_PRP_OFFSET;
        if (memory_read(n->env.memory, list, entries, count * sizeof(u64)))
            return NVME_DATA_TRANSFER_ERROR;
        for (unsigned i = 0; i < count - chained && !status; i++) {
            u64 here = MIN(left, NVME_PAGE_SIZE);

            status = entries[i] % NVME_PAGE_SIZE ? NVME_INVALID_PRP_OFFSET
                                                 : add(n, d, entries[i], here, to_guest);
            left -= here;
        }
        if (status)
            return status;
        list = entries[count - 1];
        /* Only where a list begins may it be within a page. */
        if (chained && list % NVME_PAGE_SIZE)
            return NVME_INVALID_PRP_OFFSET;
    }
    return NVME_OK;
}

static enum nvme_status map_prps(struct nvme *n, const struct nvme_command *cmd, u64 len,
                                 bool to_guest, struct nvme_data *d)
{
    u64 first = MIN(len, NVME_PAGE_SIZE - cmd->prp1 % NVME_PAGE_SIZE);
    enum nvme_status status;

    if (cmd->prp1 % sizeof(u32))
        return NVME_INVALID_PRP_OFFSET;
    status = add(n, d, cmd->prp1, first, to_guest);
    if (status || len == first)
        return status;
    if (len - first > NVME_PAGE_SIZE)
        return add_prp_list(n, cmd->prp2, len - first, to_guest, d);
    if (cmd->prp2 % NVME_PAGE_SIZE)
        return NVME_INVALID_PRP_OFFSET;
    return add(n, d, cmd->prp2, len - first, to_guest);
}

/* ---- SGL ---- */

struct sgl {
    struct nvme *n;
    struct nvme_data *data;
    u64 len; /* of the command's data */
    bool to_guest;
    unsigned seen; /* descriptors */
};

static bool is_segment(const struct nvme_sgl_descriptor *s)
{
    return s->type == NVME_SGL_SEGMENT || s->type == NVME_SGL_LAST_SEGMENT;
}

static enum nvme_status add_block(struct sgl *l, const struct nvme_sgl_descriptor *s)
{
    if (s->type != NVME_SGL_DATA_BLOCK)
        return NVME_INVALID_SGL_TYPE;
    if (++l->seen > SGL_DESCRIPTORS_MAX)
        return NVME_INVALID_SGL_COUNT;
    if (s->length > l->len - l->data->len)
        return NVME_INVALID_SGL_LENGTH;
    return add(l->n, l->data, s->address, s->length, l->to_guest);
}

/* The segment that *s describes; *s becomes its last descriptor, which may lead to another one. */
static enum nvme_status add_segment(struct sgl *l, struct nvme_sgl_descriptor *s)
{
    struct nvme_sgl_descriptor chunk[SGL_CHUNK];
    u64 count = s->length / sizeof(*s);
    bool last_segment = s->type == NVME_SGL_LAST_SEGMENT;
    gpa_t at = s->address;

    if (!count || s->length % sizeof(*s))
        return NVME_INVALID_SGL_SEGMENT;
    for (u64 i = 0; i < count; i++) {
        enum nvme_status status;

        if (i % SGL_CHUNK == 0 && memory_read(l->n->env.memory, at + i * sizeof(*s), chunk,
                                              MIN(SGL_CHUNK, count - i) * sizeof(*s)))
            return NVME_DATA_TRANSFER_ERROR;
        *s = chunk[i % SGL_CHUNK];
        /* Only a segment that isn't the last one has a way on, at its end, and it has nothing else there. */
        if (i == count - 1 && is_segment(s) && !last_segment)
            return ++l->seen > SGL_DESCRIPTORS_MAX ? NVME_INVALID_SGL_COUNT : NVME_OK;
        status = add_block(l, s);
        if (status)
            return status;
    }
    return last_segment ? NVME_OK : NVME_INVALID_SGL_SEGMENT;
}

static enum nvme_status map_sgl(struct nvme *n, const struct nvme_command *cmd, u64 len,
                                bool to_guest, struct nvme_data *d)
{
    struct sgl l = {.n = n, .data = d, .len = len, .to_guest = to_guest};
    struct nvme_sgl_descriptor s;
    enum nvme_status status;

    memcpy(&s, &cmd->prp1, sizeof(s));
    if (!is_segment(&s)) {
        status = add_block(&l, &s);
    } else {
        do {
            status = add_segment(&l, &s);
        } while (!status && is_segment(&s));
    }
    if (!status && d->len != len)
        status = NVME_INVALID_SGL_LENGTH;
    return status;
}

/* ---- both ---- */

enum nvme_status nvme_map_data(struct nvme *n, const struct nvme_command *cmd, u64 len,
                               bool to_guest, struct nvme_data *d)
{
    d->pieces = 0;
    d->len = 0;
    if ((cmd->flags & NVME_CMD_PSDT) == NVME_CMD_PSDT_RESERVED)
        return NVME_INVALID_FIELD;
    if (cmd->flags & NVME_CMD_PSDT)
        return map_sgl(n, cmd, len, to_guest, d);
    return map_prps(n, cmd, len, to_guest, d);
}

void nvme_data_written(struct nvme *n, const struct nvme_data *d)
{
    for (unsigned i = 0; i < d->pieces; i++)
        memory_tell_written(n->env.memory, d->gpa[i], d->iov[i].iov_len);
}

enum nvme_status nvme_data_to_guest(struct nvme *n, const struct nvme_command *cmd, const void *buf,
                                    u64 len)
{
    struct nvme_data d;
    enum nvme_status status = nvme_map_data(n, cmd, len, true, &d);
    const u8 *from = buf;

    if (status)
        return status;
    for (unsigned i = 0; i < d.pieces; i++) {
        memcpy(d.iov[i].iov_base, from, d.iov[i].iov_len);
        from += d.iov[i].iov_len;
    }
    nvme_data_written(n, &d);
    return NVME_OK;
}

enum nvme_status nvme_data_from_guest(struct nvme *n, const struct nvme_command *cmd, void *buf,
                                      u64 len)
{
    struct nvme_data d;
    enum nvme_status status = nvme_map_data(n, cmd, len, false, &d);
    u8 *to = buf;

    if (status)
        return status;
    for (unsigned i = 0; i < d.pieces; i++) {
        memcpy(to, d.iov[i].iov_base, d.iov[i].iov_len);
        to += d.iov[i].iov_len;
    }
    return NVME_OK;
}
