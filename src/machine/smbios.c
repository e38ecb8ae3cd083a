/*
 * The structures: DSP0134 2.8, chapter 7; the anchor: 5.2.1. Type 0, the firmware itself, is the firmware's to make.
 */
#include "machine/smbios.h"

#include <string.h>

enum {
    SMBIOS_SYSTEM = 1,
    SMBIOS_CHASSIS = 3,
    SMBIOS_PROCESSOR = 4,
    SMBIOS_MEMORY_ARRAY = 16,
    SMBIOS_MEMORY_DEVICE = 17,
    SMBIOS_BOOT = 32,
    SMBIOS_END = 127,
};

#define STRING_MAX 64

/* One structure as it grows: its fixed part, then its strings. */
struct writer {
    struct smbios *s;
    u32 start;
    u8 strings; /* so far */
    u8 text[4 * (STRING_MAX + 1)];
    u32 text_len;
    u16 handle, max_size, count;
};

static void put(struct writer *w, u64 value, unsigned bytes)
{
    for (unsigned i = 0; i < bytes; i++)
        w->s->tables[w->s->len++] = (u8)(value >> 8 * i);
}

static void begin(struct writer *w, u8 type, u16 handle)
{
    w->start = w->s->len;
    w->strings = 0;
    w->text_len = 0;
    put(w, type, 1);
    put(w, 0, 1);
    put(w, handle, 2);
}

/* The number of a string, which a field holds; 0 for none. */
static void put_string(struct writer *w, const char *text)
{
    size_t len = text ? strnlen(text, STRING_MAX) : 0;

    if (!len) {
        put(w, 0, 1);
        return;
    }
    memcpy(w->text + w->text_len, text, len);
    w->text[w->text_len + len] = 0;
    w->text_len += len + 1;
    put(w, ++w->strings, 1);
}

static void end(struct writer *w)
{
    u32 size;

    w->s->tables[w->start + 1] = (u8)(w->s->len - w->start);
    memcpy(w->s->tables + w->s->len, w->text, w->text_len);
    w->s->len += w->text_len;
    put(w, 0, w->strings ? 1 : 2);
    size = w->s->len - w->start;
    if (size > w->max_size)
        w->max_size = (u16)size;
    w->count++;
}

/* The first three fields of a UUID are little-endian here (7.2.1). */
static void put_uuid(struct writer *w, const u8 uuid[16])
{
    static const u8 order[16] = {3, 2, 1, 0, 5, 4, 7, 6, 8, 9, 10, 11, 12, 13, 14, 15};

    for (unsigned i = 0; i < 16; i++)
        put(w, uuid[order[i]], 1);
}

static void put_system(struct writer *w, const struct smbios_config *cfg)
{
    static const u8 none[16];

    begin(w, SMBIOS_SYSTEM, 0x100);
    put_string(w, "doppel");
    put_string(w, cfg->product ? cfg->product : "doppel");
    put(w, 0, 1); /* version */
    put_string(w, cfg->serial);
    put_uuid(w, cfg->has_uuid ? cfg->uuid : none);
    put(w, 6, 1); /* woken by the power switch */
    put(w, 0, 2);
    end(w);
}

static void put_chassis(struct writer *w)
{
    begin(w, SMBIOS_CHASSIS, 0x300);
    put_string(w, "doppel");
    put(w, 1, 1); /* other */
    put(w, 0, 3);
    put(w, 0x03030303, 4); /* states: safe; security: none */
    put(w, 0, 8);
    put(w, 0, 1);
    end(w);
}

static void put_processor(struct writer *w, unsigned index)
{
    begin(w, SMBIOS_PROCESSOR, (u16)(0x400 + index));
    put_string(w, "CPU");
    put(w, 3, 1); /* a central processor */
    put(w, 1, 1); /* of another family */
    put_string(w, "doppel");
    put(w, 0, 8);
    put(w, 0, 1);
    put(w, 0, 6);
    put(w, 0x41, 1); /* populated, enabled */
    put(w, 1, 1);
    put(w, 0xffffffff, 4); /* no caches: 0xffff each */
    put(w, 0xffff, 2);
    put(w, 0, 3);
    put(w, 0x010101, 3); /* one core, enabled, one thread */
    put(w, 0x04, 2);     /* 64 bits */
    put(w, 1, 2);
    end(w);
}

/* Sizes are in KiB below 2 TiB, and in MiB below 32 GiB; longer fields have the rest. */
static void put_memory(struct writer *w, u64 memory)
{
    u64 kib = memory >> 10, mib = memory >> 20;

    begin(w, SMBIOS_MEMORY_ARRAY, 0x1000);
    put(w, 1, 1);
    put(w, 3, 1); /* system memory */
    put(w, 3, 1); /* no error correction */
    put(w, kib < BIT(31) ? kib : BIT(31), 4);
    put(w, 0xfffe, 2);
    put(w, 1, 2);
    put(w, kib < BIT(31) ? 0 : memory, 8);
    end(w);

    begin(w, SMBIOS_MEMORY_DEVICE, 0x1100);
    put(w, 0x1000, 2);
    put(w, 0xfffe, 2);
    put(w, 0xffffffff, 4); /* widths: unknown */
    put(w, mib < 0x7fff ? mib : 0x7fff, 2);
    put(w, 9, 1); /* DIMM */
    put(w, 0, 1);
    put_string(w, "DIMM 0");
    put(w, 0, 1);
    put(w, 7, 1); /* RAM */
    put(w, 2, 2);
    put(w, 0, 2);
    put(w, 0, 4); /* manufacturer, serial, tag, part */
    put(w, 0, 1);
    put(w, mib < 0x7fff ? 0 : mib, 4);
    put(w, 0, 2);
    put(w, 0, 6);
    end(w);
}

static u8 checksum(const u8 *bytes, unsigned n)
{
    u8 sum = 0;

    while (n--)
        sum += *bytes++;
    return -sum;
}

static void put_mark(u8 *at, const char *mark)
{
    while (*mark)
        *at++ = (u8)*mark++;
}

static void build_anchor(struct smbios *s, const struct writer *w)
{
    u8 *a = s->anchor;

    memset(a, 0, sizeof(s->anchor));
    put_mark(a, "_SM_");
    a[5] = SMBIOS_ANCHOR_SIZE;
    a[6] = 2;
    a[7] = 8;
    a[8] = (u8)w->max_size;
    a[9] = (u8)(w->max_size >> 8);
    put_mark(a + 16, "_DMI_");
    a[22] = (u8)s->len;
    a[23] = (u8)(s->len >> 8);
    a[28] = (u8)w->count;
    a[29] = (u8)(w->count >> 8);
    a[30] = 0x28;
    a[21] = checksum(a + 16, 15);
    a[4] = checksum(a, SMBIOS_ANCHOR_SIZE);
}

#define PROCESSORS_MAX 16 /* that are told: all have the same to say */

void smbios_build(struct smbios *s, const struct smbios_config *cfg)
{
    struct writer w = {.s = s};

    s->len = 0;
    put_system(&w, cfg);
    put_chassis(&w);
    for (unsigned i = 0; i < MIN(cfg->cpus, PROCESSORS_MAX); i++)
        put_processor(&w, i);
    put_memory(&w, cfg->memory);
    begin(&w, SMBIOS_BOOT, 0x2000);
    put(&w, 0, 7);
    end(&w);
    begin(&w, SMBIOS_END, 0x7f00);
    end(&w);
    build_anchor(s, &w);
}
