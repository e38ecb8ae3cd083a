/*
 * The AML emitter.
 *
 * A body is preceded by its length, PkgLength, whose own size (one to four bytes) depends on the
 * length and is counted in it (20.2.4). So a body is written first, and aml_end moves it up by the
 * size of the length, innermost first. Outer bodies are not closed yet, so no length written before
 * is touched.
 */
#include "machine/aml.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

/* Opcodes (20.3). */
#define AML_ZERO_OP 0x00
#define AML_ONE_OP 0x01
#define AML_NAME_OP 0x08
#define AML_BYTE_PREFIX 0x0a
#define AML_WORD_PREFIX 0x0b
#define AML_DWORD_PREFIX 0x0c
#define AML_STRING_PREFIX 0x0d
#define AML_QWORD_PREFIX 0x0e
#define AML_SCOPE_OP 0x10
#define AML_BUFFER_OP 0x11
#define AML_PACKAGE_OP 0x12
#define AML_METHOD_OP 0x14
#define AML_DUAL_NAME_PREFIX 0x2e
#define AML_MULTI_NAME_PREFIX 0x2f
#define AML_EXT_PREFIX 0x5b
#define AML_ROOT_CHAR 0x5c
#define AML_LOCAL0_OP 0x60
#define AML_ARG0_OP 0x68
#define AML_STORE_OP 0x70
#define AML_AND_OP 0x7b
#define AML_OR_OP 0x7d
#define AML_CREATE_DWORD_FIELD_OP 0x8a
#define AML_LNOT_OP 0x92
#define AML_LEQUAL_OP 0x93
#define AML_IF_OP 0xa0
#define AML_ELSE_OP 0xa1
#define AML_RETURN_OP 0xa4
#define AML_DEVICE_OP 0x82 /* after AML_EXT_PREFIX */

/* Resource descriptors (6.4.2, 6.4.3): small ones hold their length in the low three bits. */
#define RESOURCE_IRQ 0x22
#define RESOURCE_IO 0x47
#define RESOURCE_END_TAG 0x79
#define RESOURCE_MEMORY32_FIXED 0x86
#define RESOURCE_IO_DECODE16 0x01
#define RESOURCE_DWORD_RANGE 0x87
#define RESOURCE_WORD_RANGE 0x88
#define RESOURCE_QWORD_RANGE 0x8a
enum { RANGE_MEMORY = 0, RANGE_IO = 1, RANGE_BUS = 2 };
#define RANGE_FIXED 0x0c     /* both ends; decoded positively, and handed on */
#define RANGE_IO_ENTIRE 0x03 /* ISA and non-ISA ports */
#define RANGE_MEMORY_RW 0x01 /* and not cacheable */

#define SEGMENT 4

void aml_init(struct aml *a)
{
    *a = (struct aml){0};
}

void aml_free(struct aml *a)
{
    free(a->data);
    aml_init(a);
}

bool aml_failed(const struct aml *a)
{
    assert(a->depth == 0);
    return a->failed;
}

static bool aml_grow(struct aml *a, size_t more)
{
    if (a->failed)
        return false;
    if (a->len + more <= a->capacity)
        return true;
    size_t capacity = MAX(2 * a->capacity, a->len + more + 1024);
    u8 *data = realloc(a->data, capacity);
    if (!data) {
        a->failed = true;
        return false;
    }
    a->data = data;
    a->capacity = capacity;
    return true;
}

static void emit(struct aml *a, const void *bytes, size_t n)
{
    if (!aml_grow(a, n))
        return;
    memcpy(a->data + a->len, bytes, n);
    a->len += n;
}

static void emit_byte(struct aml *a, u8 byte)
{
    emit(a, &byte, 1);
}

/* The low n bytes of value; little-endian. */
static void emit_le(struct aml *a, u64 value, unsigned n)
{
    for (unsigned i = 0; i < n; i++)
        emit_byte(a, value >> 8 * i);
}

/* NameString (20.2.2). Segments shorter than four letters are padded with underscores. */
void aml_path(struct aml *a, const char *path)
{
    unsigned segments = *path != '\0' && strcmp(path, "\\") != 0;

    if (*path == '\\') {
        emit_byte(a, AML_ROOT_CHAR);
        path++;
    }
    for (const char *p = path; *p; p++)
        segments += *p == '.';

    if (segments == 0)
        emit_byte(a, AML_ZERO_OP);
    else if (segments == 2)
        emit_byte(a, AML_DUAL_NAME_PREFIX);
    else if (segments > 2) {
        emit_byte(a, AML_MULTI_NAME_PREFIX);
        emit_byte(a, segments);
    }
    for (unsigned i = 0; i < segments; i++) {
        size_t n = strcspn(path, ".");
        assert(n >= 1 && n <= SEGMENT);
        emit(a, path, n);
        emit(a, "____", SEGMENT - n);
        path += n + 1;
    }
}

static void aml_open(struct aml *a, bool resources)
{
    assert(a->depth < AML_MAX_DEPTH);
    a->open[a->depth++] = (struct aml_open){.start = a->len, .resources = resources};
}

/*
 * PkgLength: up to 63 in one byte; else a nibble in the first, with the count of the bytes after
 * it.
 */
static unsigned encode_length(u8 out[4], size_t body)
{
    unsigned size = body + 1 < BIT(6) ? 1 : body + 2 < BIT(12) ? 2 : body + 3 < BIT(20) ? 3 : 4;
    size_t length = body + size;

    assert(length < BIT(28));
    out[0] = size == 1 ? length : (size - 1) << 6 | (length & 0xf);
    for (unsigned i = 1; i < size; i++)
        out[i] = length >> (8 * i - 4);
    return size;
}

static void insert(struct aml *a, size_t at, const u8 *bytes, size_t n)
{
    if (!aml_grow(a, n))
        return;
    memmove(a->data + at + n, a->data + at, a->len - at);
    memcpy(a->data + at, bytes, n);
    a->len += n;
}

/* A buffer's size is a term before its bytes, and inside its length. */
static void insert_buffer_size(struct aml *a, size_t start)
{
    size_t size = a->len - start;
    u8 term[3] = {AML_WORD_PREFIX, size, size >> 8};

    assert(size <= 0xffff);
    insert(a, start, term, sizeof(term));
}

void aml_end(struct aml *a)
{
    u8 length[4];
    unsigned n;

    assert(a->depth > 0);
    struct aml_open open = a->open[--a->depth];
    if (open.resources) {
        emit_byte(a, RESOURCE_END_TAG);
        emit_byte(a, 0); /* checksum: 0 counts as right */
        insert_buffer_size(a, open.start);
    }
    n = encode_length(length, a->len - open.start);
    insert(a, open.start, length, n);
}

void aml_scope(struct aml *a, const char *path)
{
    emit_byte(a, AML_SCOPE_OP);
    aml_open(a, false);
    aml_path(a, path);
}

void aml_device(struct aml *a, const char *path)
{
    emit_byte(a, AML_EXT_PREFIX);
    emit_byte(a, AML_DEVICE_OP);
    aml_open(a, false);
    aml_path(a, path);
}

void aml_method(struct aml *a, const char *path, unsigned nargs)
{
    assert(nargs <= 7);
    emit_byte(a, AML_METHOD_OP);
    aml_open(a, false);
    aml_path(a, path);
    emit_byte(a, nargs);
}

void aml_package(struct aml *a, u8 nelements)
{
    emit_byte(a, AML_PACKAGE_OP);
    aml_open(a, false);
    emit_byte(a, nelements);
}

void aml_if(struct aml *a)
{
    emit_byte(a, AML_IF_OP);
    aml_open(a, false);
}

void aml_else(struct aml *a)
{
    emit_byte(a, AML_ELSE_OP);
    aml_open(a, false);
}

void aml_return(struct aml *a)
{
    emit_byte(a, AML_RETURN_OP);
}

void aml_resources(struct aml *a)
{
    emit_byte(a, AML_BUFFER_OP);
    aml_open(a, true);
}

void aml_name(struct aml *a, const char *path)
{
    emit_byte(a, AML_NAME_OP);
    aml_path(a, path);
}

void aml_int(struct aml *a, u64 value)
{
    if (value <= 1) {
        emit_byte(a, value ? AML_ONE_OP : AML_ZERO_OP);
    } else if (value <= UINT8_MAX) {
        emit_byte(a, AML_BYTE_PREFIX);
        emit_le(a, value, 1);
    } else if (value <= UINT16_MAX) {
        emit_byte(a, AML_WORD_PREFIX);
        emit_le(a, value, 2);
    } else if (value <= UINT32_MAX) {
        emit_byte(a, AML_DWORD_PREFIX);
        emit_le(a, value, 4);
    } else {
        emit_byte(a, AML_QWORD_PREFIX);
        emit_le(a, value, 8);
    }
}

void aml_string(struct aml *a, const char *text)
{
    emit_byte(a, AML_STRING_PREFIX);
    emit(a, text, strlen(text) + 1);
}

/*
 * Three letters of five bits, then four hex digits; the bytes in order (ACPI 6.4, 19.3.4 and
 * 6.1.5).
 */
void aml_eisa_id(struct aml *a, const char *id)
{
    assert(strlen(id) == 7);
    u32 value =
        (id[0] - '@') << 26 | (id[1] - '@') << 21 | (id[2] - '@') << 16 | strtoul(id + 3, NULL, 16);

    emit_byte(a, AML_DWORD_PREFIX);
    emit_le(a, __builtin_bswap32(value), 4);
}

void aml_arg(struct aml *a, unsigned n)
{
    assert(n < 7);
    emit_byte(a, AML_ARG0_OP + n);
}

void aml_store(struct aml *a)
{
    emit_byte(a, AML_STORE_OP);
}

void aml_or(struct aml *a)
{
    emit_byte(a, AML_OR_OP);
}

void aml_and(struct aml *a)
{
    emit_byte(a, AML_AND_OP);
}

void aml_equal(struct aml *a)
{
    emit_byte(a, AML_LEQUAL_OP);
}

void aml_not_equal(struct aml *a)
{
    emit_byte(a, AML_LNOT_OP);
    emit_byte(a, AML_LEQUAL_OP);
}

void aml_local(struct aml *a)
{
    emit_byte(a, AML_LOCAL0_OP);
}

void aml_dword_field(struct aml *a, unsigned arg, unsigned index, const char *name)
{
    emit_byte(a, AML_CREATE_DWORD_FIELD_OP);
    aml_arg(a, arg);
    aml_int(a, index);
    aml_path(a, name);
}

/* The first three groups are numbers, whose bytes come in little-endian order (ACPI 6.4, 19.6.142). */
void aml_uuid(struct aml *a, const char *uuid)
{
    static const u8 digits[16] = {6, 4, 2, 0, 11, 9, 16, 14, 19, 21, 24, 26, 28, 30, 32, 34};

    assert(strlen(uuid) == 36);
    emit_byte(a, AML_BUFFER_OP);
    aml_open(a, false);
    aml_int(a, sizeof(digits));
    for (unsigned i = 0; i < sizeof(digits); i++) {
        char byte[3] = {uuid[digits[i]], uuid[digits[i] + 1]};

        emit_byte(a, (u8)strtoul(byte, NULL, 16));
    }
    aml_end(a);
}

void aml_resource_io(struct aml *a, u16 port, u8 len)
{
    emit_byte(a, RESOURCE_IO);
    emit_byte(a, RESOURCE_IO_DECODE16);
    emit_le(a, port, 2); /* minimum */
    emit_le(a, port, 2); /* maximum */
    emit_byte(a, 1);     /* alignment */
    emit_byte(a, len);
}

void aml_resource_irq(struct aml *a, unsigned irq)
{
    assert(irq < 16);
    emit_byte(a, RESOURCE_IRQ);
    emit_le(a, BIT(irq), 2);
}

void aml_resource_memory32(struct aml *a, u32 base, u32 len, bool writable)
{
    emit_byte(a, RESOURCE_MEMORY32_FIXED);
    emit_le(a, 9, 2);
    emit_byte(a, writable);
    emit_le(a, base, 4);
    emit_le(a, len, 4);
}

/* An address space descriptor (6.4.3.5): granularity, minimum, maximum, translation, length. */
static void emit_range(struct aml *a, unsigned width, u8 type, u8 type_flags, u64 first, u64 last)
{
    static const u8 tags[] = {
        [2] = RESOURCE_WORD_RANGE, [4] = RESOURCE_DWORD_RANGE, [8] = RESOURCE_QWORD_RANGE};

    emit_byte(a, tags[width]);
    emit_le(a, 3 + 5 * width, 2);
    emit_byte(a, type);
    emit_byte(a, RANGE_FIXED);
    emit_byte(a, type_flags);
    emit_le(a, 0, width);
    emit_le(a, first, width);
    emit_le(a, last, width);
    emit_le(a, 0, width);
    emit_le(a, last - first + 1, width);
}

void aml_resource_bus_range(struct aml *a, u16 first, u16 last)
{
    emit_range(a, 2, RANGE_BUS, 0, first, last);
}

void aml_resource_io_range(struct aml *a, u16 first, u16 last)
{
    emit_range(a, 2, RANGE_IO, RANGE_IO_ENTIRE, first, last);
}

void aml_resource_memory_range(struct aml *a, u64 first, u64 last)
{
    emit_range(a, last > UINT32_MAX ? 8 : 4, RANGE_MEMORY, RANGE_MEMORY_RW, first, last);
}
