/*
 * State as lists of fields.
 *
 * Each struct that holds guest-visible state (a device, a CPU) has a table that names every member: the
 * fields that are state, and those that belong to the host (locks, pointers, caches). The table drives
 * save, load, compare and dump at once. A member named in neither list is found by state_desc_check:
 * the listed members must cover the struct but for alignment padding.
 *
 *     static const struct state_field fields[] = {
 *         STATE_FIELD(struct pit, latch),         integers, bools, enums and arrays of them
 *         STATE_BYTES(struct cpu, vec),           opaque bytes, any type, stored as they are
 *         STATE_STRUCTS(struct pit, ch, &desc),   a struct or array of structs with a table of its own
 *         STATE_HOST(struct pit, lock),           not state
 *     };
 *     const struct state_desc pit_state = STATE_DESC("pit", 1, struct pit, fields);
 *
 * Encoded form of a field: its bytes, little-endian, in table order. The stream (later) adds sections,
 * lengths and checksums.
 */
#ifndef DOPPEL_STATE_FIELDS_H
#define DOPPEL_STATE_FIELDS_H

#include "host/error.h"
#include "host/types.h"

enum state_kind {
    STATE_KIND_INT,
    STATE_KIND_BOOL, /* a load refuses other bytes than 0 and 1 */
    STATE_KIND_BYTES,
    STATE_KIND_STRUCT,
    STATE_KIND_HOST,
};

struct state_desc;

struct state_field {
    const char *name;
    enum state_kind kind;
    u32 offset;
    u32 size;                      /* of one element */
    u32 count;                     /* elements */
    const struct state_desc *desc; /* STATE_KIND_STRUCT */
};

struct state_desc {
    const char *name;
    u32 version;
    u32 struct_size;
    const struct state_field *fields;
    u32 nfields;
    /* After a load into `obj`: recompute what is derived. 0, or -EINVAL with err set to refuse it. */
    int (*loaded)(void *obj, struct error *err);
};

/* clang-format off */
/*
 * The innermost element of a member: the member itself, or what a one- or two-dimensional array is made
 * of. The builtins only look at types; an array's is of a pointer's class. Where there is nothing to
 * index, a character stands in, which __builtin_choose_expr then leaves out.
 */
#define STATE_IS_INDEXED_(e) (__builtin_classify_type(e) == 5)
#define STATE_ROW_(e) (*__builtin_choose_expr(STATE_IS_INDEXED_(e), (e), (char *)0))
#define STATE_PEEL_(e) __builtin_choose_expr(STATE_IS_INDEXED_(e), STATE_ROW_(e), (e))
#define STATE_ELEM_(T, m) STATE_PEEL_(STATE_PEEL_(((T *)0)->m))

/* 0; doesn't compile for a member that isn't of integers, or holds pointers. */
#define STATE_IS_INTEGER_(e) (__builtin_classify_type(e) >= 1 && __builtin_classify_type(e) <= 4)
#define STATE_IS_POINTER_(e)                                                                       \
    __builtin_types_compatible_p(__typeof__(e), __typeof__(&STATE_ROW_(e)))
#define STATE_MUST_BE_INTEGERS_(T, m)                                                              \
    (0 * sizeof(char[STATE_IS_INTEGER_(STATE_ELEM_(T, m)) && !STATE_IS_POINTER_(((T *)0)->m) &&    \
                             !STATE_IS_POINTER_(STATE_PEEL_(((T *)0)->m))                          \
                         ? 1                                                                       \
                         : -1]))

#define STATE_FIELD(T, m)                                                                          \
    {                                                                                              \
        .name = #m,                                                                                \
        .kind = _Generic(STATE_ELEM_(T, m), bool: STATE_KIND_BOOL, default: STATE_KIND_INT),       \
        .offset = offsetof(T, m), .size = sizeof(STATE_ELEM_(T, m)),                               \
        .count = sizeof(((T *)0)->m) / sizeof(STATE_ELEM_(T, m)) + STATE_MUST_BE_INTEGERS_(T, m),  \
    }
/* clang-format on */
#define STATE_BYTES(T, m)                                                                          \
    {                                                                                              \
        .name = #m, .kind = STATE_KIND_BYTES, .offset = offsetof(T, m), .size = 1,                 \
        .count = sizeof(((T *)0)->m),                                                              \
    }
#define STATE_STRUCTS(T, m, d)                                                                     \
    {                                                                                              \
        .name = #m, .kind = STATE_KIND_STRUCT, .offset = offsetof(T, m), .desc = (d),              \
        .size = sizeof(STATE_ELEM_(T, m)),                                                         \
        .count = sizeof(((T *)0)->m) / sizeof(STATE_ELEM_(T, m)),                                  \
    }
#define STATE_HOST(T, m)                                                                           \
    {                                                                                              \
        .name = #m, .kind = STATE_KIND_HOST, .offset = offsetof(T, m), .size = 1,                  \
        .count = sizeof(((T *)0)->m),                                                              \
    }
#define STATE_DESC(n, v, T, f)                                                                     \
    {                                                                                              \
        .name = (n), .version = (v), .struct_size = sizeof(T), .fields = (f),                      \
        .nfields = ARRAY_SIZE(f),                                                                  \
    }

/* Bytes that state_save writes. */
size_t state_size(const struct state_desc *d);
/* Writes state_size(d) bytes to buf. The caller holds whatever lock obj needs. */
void state_save(const struct state_desc *d, const void *obj, u8 *buf);
/*
 * Checks len == state_size(d), then loads and calls `loaded`, of inner structs first. 0, or -EINVAL
 * (-ENOMEM) with err set and obj as it was.
 */
int state_load(const struct state_desc *d, void *obj, const u8 *buf, size_t len, struct error *err);
/* The name of the first state field that differs between a and b, as "desc.field[i]", or NULL. */
const char *state_compare(const struct state_desc *d, const void *a, const void *b, char *buf,
                          size_t buflen);
/*
 * 0, or -EINVAL with the first byte range of the struct that no field covers and padding can't explain,
 * or that two fields cover. (A forgotten member as small as the padding in its place looks like it.)
 */
int state_desc_check(const struct state_desc *d, struct error *err);

#endif
