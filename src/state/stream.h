/*
 * The stream that a machine's state travels in: versioned sections, one after another, in memory.
 *
 *     section     name, instance, version, length, payload
 *     header      char name[24] (padded with NUL), u32 instance, u32 version, u64 length: little-endian
 *
 * Whoever reads knows which section comes next, so there is no directory. A section is complete before
 * the next one begins: a file or a migration can take the sections as they come and put its own magic
 * number, checksums and blocks around them.
 *
 * The reader trusts nothing. It refuses a section that isn't the expected one by name, instance and
 * version, that reaches beyond the end, or that is left over, with a line that names it.
 */
#ifndef DOPPEL_STATE_STREAM_H
#define DOPPEL_STATE_STREAM_H

#include "host/error.h"
#include "host/types.h"
#include "state/fields.h"

#define STATE_NAME_SIZE 24

/* Zeroed: an empty stream. Memory that runs out is told once, by state_writer_finish. */
struct state_writer {
    u8 *data;
    size_t len;
    /* the writer's own */
    size_t capacity;
    size_t section; /* where the open one's header is */
    bool failed;
};

/* A section of anything: begin, any number of pieces, end. `name` is shorter than STATE_NAME_SIZE. */
void state_write_begin(struct state_writer *w, const char *name, u32 instance, u32 version);
void state_write_bytes(struct state_writer *w, const void *buf, size_t len);
void state_write_end(struct state_writer *w);
/* A section of what a field table describes. The caller holds whatever lock obj needs. */
void state_write_section(struct state_writer *w, const struct state_desc *desc, u32 instance,
                         const void *obj);
/* 0 when all of it is there: data and len. -ENOMEM with err set. */
int state_writer_finish(const struct state_writer *w, struct error *err);
void state_writer_free(struct state_writer *w);

/* `data` is borrowed, and so is all that the reader gives out. */
struct state_reader {
    const u8 *data;
    size_t len;
    /* the reader's own */
    size_t at;
};

struct state_section {
    const u8 *data;
    size_t len;
};

/* The next section's payload, when it is the one that is expected. 0, or -EINVAL with err set. */
int state_read_begin(struct state_reader *r, const char *name, u32 instance, u32 version,
                     struct state_section *section, struct error *err);
/* The next section into obj, by its field table: all of it or nothing (state_load). */
int state_read_section(struct state_reader *r, const struct state_desc *desc, u32 instance,
                       void *obj, struct error *err);
/* 0 when nothing is left; else -EINVAL with err set. */
int state_read_end(const struct state_reader *r, struct error *err);

#endif
