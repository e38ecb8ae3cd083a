#include "state/stream.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct header {
    char name[STATE_NAME_SIZE];
    u32 instance;
    u32 version;
    u64 length;
};
_Static_assert(sizeof(struct header) == 40, "as it lies in the stream");

/* ---- writing ---- */

/* Room for len more bytes, which become part of the stream. NULL once memory has run out. */
static u8 *extend(struct state_writer *w, size_t len)
{
    u8 *room;

    if (w->failed)
        return NULL;
    if (len > w->capacity - w->len) {
        size_t capacity = MAX(w->len + len, w->capacity * 2);
        u8 *data = realloc(w->data, capacity);

        if (!data) {
            w->failed = true;
            return NULL;
        }
        w->data = data;
        w->capacity = capacity;
    }
    room = w->data + w->len;
    w->len += len;
    return room;
}

void state_write_begin(struct state_writer *w, const char *name, u32 instance, u32 version)
{
    struct header header = {.instance = instance, .version = version};

    memcpy(header.name, name, strnlen(name, sizeof(header.name) - 1));
    w->section = w->len;
    state_write_bytes(w, &header, sizeof(header));
}

void state_write_bytes(struct state_writer *w, const void *buf, size_t len)
{
    u8 *room = extend(w, len);

    if (room && len)
        memcpy(room, buf, len);
}

void state_write_end(struct state_writer *w)
{
    u64 length = w->len - w->section - sizeof(struct header);

    if (!w->failed)
        memcpy(w->data + w->section + offsetof(struct header, length), &length, sizeof(length));
}

void state_write_section(struct state_writer *w, const struct state_desc *desc, u32 instance,
                         const void *obj)
{
    u8 *room;

    state_write_begin(w, desc->name, instance, desc->version);
    room = extend(w, state_size(desc));
    if (room)
        state_save(desc, obj, room);
    state_write_end(w);
}

int state_writer_finish(const struct state_writer *w, struct error *err)
{
    return w->failed ? error_host(err, ENOMEM, "no memory for the machine's state") : 0;
}

void state_writer_free(struct state_writer *w)
{
    free(w->data);
    *w = (struct state_writer){0};
}

/* ---- reading ---- */

/* The header at r->at; -EINVAL when what is left can't be a section. `want` is for the message. */
static int read_header(const struct state_reader *r, const char *want, struct header *header,
                       struct error *err)
{
    if (r->len - r->at < sizeof(*header))
        return error_input(err, "the state ends where section %s should begin", want);
    memcpy(header, r->data + r->at, sizeof(*header));
    for (size_t i = 0; i < strnlen(header->name, sizeof(header->name)); i++) {
        /* It will be printed, and it may have come from anywhere. */
        if (header->name[i] < ' ' || header->name[i] > '~')
            return error_input(err, "the state is damaged where section %s should begin", want);
    }
    return 0;
}

int state_read_begin(struct state_reader *r, const char *name, u32 instance, u32 version,
                     struct state_section *section, struct error *err)
{
    char want[STATE_NAME_SIZE + 16];
    struct header header;

    snprintf(want, sizeof(want), "%s.%u", name, instance);
    if (read_header(r, want, &header, err) < 0)
        return -EINVAL;
    if (strncmp(header.name, name, sizeof(header.name)) != 0 || header.instance != instance)
        return error_input(err, "the state has section %.*s.%u where %s should be", STATE_NAME_SIZE,
                           header.name, header.instance, want);
    if (header.version != version)
        return error_input(err, "state section %s is of version %u, and this doppel reads %u", want,
                           header.version, version);
    if (header.length > r->len - r->at - sizeof(header))
        return error_input(err, "state section %s is cut short", want);
    section->data = r->data + r->at + sizeof(header);
    section->len = header.length;
    r->at += sizeof(header) + header.length;
    return 0;
}

int state_read_section(struct state_reader *r, const struct state_desc *desc, u32 instance,
                       void *obj, struct error *err)
{
    struct state_section section;
    int ret = state_read_begin(r, desc->name, instance, desc->version, &section, err);

    if (ret < 0)
        return ret;
    ret = state_load(desc, obj, section.data, section.len, err);
    if (ret < 0)
        error_prefix(err, "state section %s.%u", desc->name, instance);
    return ret;
}

int state_read_end(const struct state_reader *r, struct error *err)
{
    struct header header;

    if (r->at == r->len)
        return 0;
    if (read_header(r, "(none)", &header, err) < 0)
        return error_input(err, "the state goes on after its last section");
    return error_input(err, "the state has section %.*s.%u after its last one", STATE_NAME_SIZE,
                       header.name, header.instance);
}
