#include "state/fields.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static size_t field_size(const struct state_field *f)
{
    switch (f->kind) {
    case STATE_KIND_HOST:
        return 0;
    case STATE_KIND_STRUCT:
        return f->count * state_size(f->desc);
    case STATE_KIND_INT:
    case STATE_KIND_BOOL:
    case STATE_KIND_BYTES:
        break;
    }
    return (size_t)f->count * f->size;
}

size_t state_size(const struct state_desc *d)
{
    size_t size = 0;

    for (u32 i = 0; i < d->nfields; i++)
        size += field_size(&d->fields[i]);
    return size;
}

/* Hosts are little-endian (x86-64 only), so integers are copied as they are. */
void state_save(const struct state_desc *d, const void *obj, u8 *buf)
{
    for (u32 i = 0; i < d->nfields; i++) {
        const struct state_field *f = &d->fields[i];
        const u8 *member = (const u8 *)obj + f->offset;

        if (f->kind == STATE_KIND_STRUCT) {
            for (u32 n = 0; n < f->count; n++)
                state_save(f->desc, member + (size_t)n * f->size, buf + n * state_size(f->desc));
        } else if (f->kind != STATE_KIND_HOST) {
            memcpy(buf, member, field_size(f));
        }
        buf += field_size(f);
    }
}

/* Whether buf, of state_size(d) bytes, holds only values that the fields' types have. */
static int check_values(const struct state_desc *d, const u8 *buf, struct error *err)
{
    for (u32 i = 0; i < d->nfields; i++) {
        const struct state_field *f = &d->fields[i];

        for (u32 n = 0; f->kind == STATE_KIND_BOOL && n < f->count; n++) {
            if (buf[n] > 1)
                return error_input(err, "state of %s: %s can't be %u", d->name, f->name, buf[n]);
        }
        for (u32 n = 0; f->kind == STATE_KIND_STRUCT && n < f->count; n++) {
            int ret = check_values(f->desc, buf + n * state_size(f->desc), err);

            if (ret < 0)
                return ret;
        }
        buf += field_size(f);
    }
    return 0;
}

static void copy_in(const struct state_desc *d, void *obj, const u8 *buf)
{
    for (u32 i = 0; i < d->nfields; i++) {
        const struct state_field *f = &d->fields[i];
        u8 *member = (u8 *)obj + f->offset;

        if (f->kind == STATE_KIND_STRUCT) {
            for (u32 n = 0; n < f->count; n++)
                copy_in(f->desc, member + (size_t)n * f->size, buf + n * state_size(f->desc));
        } else if (f->kind != STATE_KIND_HOST) {
            memcpy(member, buf, field_size(f));
        }
        buf += field_size(f);
    }
}

static int call_loaded(const struct state_desc *d, void *obj, struct error *err)
{
    for (u32 i = 0; i < d->nfields; i++) {
        const struct state_field *f = &d->fields[i];

        for (u32 n = 0; f->kind == STATE_KIND_STRUCT && n < f->count; n++) {
            int ret = call_loaded(f->desc, (u8 *)obj + f->offset + (size_t)n * f->size, err);

            if (ret < 0)
                return ret;
        }
    }
    return d->loaded ? d->loaded(obj, err) : 0;
}

int state_load(const struct state_desc *d, void *obj, const u8 *buf, size_t len, struct error *err)
{
    struct error ignored;
    u8 *old;
    int ret;

    if (len != state_size(d))
        return error_input(err, "state of %s has %zu bytes, not %zu", d->name, len, state_size(d));
    ret = check_values(d, buf, err);
    if (ret < 0)
        return ret;
    old = malloc(len ? len : 1);
    if (!old)
        return error_host(err, ENOMEM, "state of %s", d->name);
    state_save(d, obj, old);
    copy_in(d, obj, buf);
    ret = call_loaded(d, obj, err);
    if (ret < 0) {
        copy_in(d, obj, old);
        call_loaded(d, obj, &ignored); /* what is derived from the old values, again */
    }
    free(old);
    return ret;
}

/* The first difference within one element of a field, or NULL; `name` is the element's own. */
static const char *compare_element(const struct state_field *f, const u8 *a, const u8 *b,
                                   const char *name, char *buf, size_t buflen)
{
    if (f->kind == STATE_KIND_STRUCT) {
        struct state_desc inner = *f->desc;

        inner.name = name;
        return state_compare(&inner, a, b, buf, buflen);
    }
    if (memcmp(a, b, f->size) == 0)
        return NULL;
    snprintf(buf, buflen, "%s", name);
    return buf;
}

const char *state_compare(const struct state_desc *d, const void *a, const void *b, char *buf,
                          size_t buflen)
{
    for (u32 i = 0; i < d->nfields; i++) {
        const struct state_field *f = &d->fields[i];

        for (u32 n = 0; f->kind != STATE_KIND_HOST && n < f->count; n++) {
            size_t at = f->offset + (size_t)n * f->size;
            const u8 *in_a = (const u8 *)a + at, *in_b = (const u8 *)b + at;
            const char *difference;
            char name[128];

            if (f->count > 1)
                snprintf(name, sizeof(name), "%s.%s[%u]", d->name, f->name, n);
            else
                snprintf(name, sizeof(name), "%s.%s", d->name, f->name);
            difference = compare_element(f, in_a, in_b, name, buf, buflen);
            if (difference)
                return difference;
        }
    }
    return NULL;
}

/* ---- the check that a table is complete ---- */

#define MAX_ALIGNMENT 64

static u32 lowest_bit(u32 n)
{
    return n & -n;
}

/* The greatest alignment that the field's type can have: it divides its size and its offset. */
static u32 field_alignment(const struct state_field *f)
{
    u64 size =
        f->kind == STATE_KIND_INT || f->kind == STATE_KIND_BOOL || f->kind == STATE_KIND_STRUCT
            ? f->size
            : (u64)f->size * f->count;

    return MIN(lowest_bit((u32)size | f->offset), (u32)MAX_ALIGNMENT);
}

/* Marks the bytes of a field. `owner` says, for each byte of the struct, which field has it, plus 1. */
static int claim_bytes(const struct state_desc *d, u32 index, u32 *owner, struct error *err)
{
    const struct state_field *f = &d->fields[index];
    u64 end = f->offset + (u64)f->size * f->count;

    if (end > d->struct_size)
        return error_input(err, "table of %s: %s ends outside of the struct", d->name, f->name);
    if (f->kind == STATE_KIND_STRUCT) {
        if (f->size != f->desc->struct_size)
            return error_input(err, "table of %s: %s is no %s", d->name, f->name, f->desc->name);
        if (state_desc_check(f->desc, err) < 0)
            return -EINVAL;
    }
    for (u64 i = f->offset; i < end; i++) {
        if (owner[i])
            return error_input(err, "table of %s: %s and %s share byte %llu", d->name,
                               d->fields[owner[i] - 1].name, f->name, (unsigned long long)i);
        owner[i] = index + 1;
    }
    return 0;
}

static int find_unlisted(const struct state_desc *d, const u32 *owner, struct error *err)
{
    u32 struct_alignment = 1, start = 0;

    for (u32 i = 0; i < d->nfields; i++)
        struct_alignment = MAX(struct_alignment, field_alignment(&d->fields[i]));
    while (start < d->struct_size) {
        u32 end = start, alignment;

        while (end < d->struct_size && !owner[end])
            end++;
        alignment =
            end == d->struct_size ? struct_alignment : field_alignment(&d->fields[owner[end] - 1]);
        if (end - start >= alignment)
            return error_input(err, "table of %s: no field names bytes %u to %u of the struct (%s)",
                               d->name, start, end - 1,
                               start ? d->fields[owner[start - 1] - 1].name : "at its start");
        start = end + 1;
    }
    return 0;
}

int state_desc_check(const struct state_desc *d, struct error *err)
{
    u32 *owner = calloc(d->struct_size, sizeof(*owner));
    int ret = 0;

    if (!owner)
        return error_host(err, ENOMEM, "table of %s", d->name);
    for (u32 i = 0; i < d->nfields && ret == 0; i++)
        ret = claim_bytes(d, i, owner, err);
    if (ret == 0)
        ret = find_unlisted(d, owner, err);
    free(owner);
    return ret;
}
