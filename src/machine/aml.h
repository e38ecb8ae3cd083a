/*
 * Writes AML, the byte code of ACPI's DSDT and SSDTs (ACPI 6.4, chapter 20), and the resource
 * descriptors that it carries (6.4).
 *
 * Terms go to a growing buffer in the order of the calls, which read like the ASL that they stand
 * for. What has a body is opened by one call and closed by aml_end:
 *
 *     aml_device(a, "COM1");
 *         aml_name(a, "_HID"); aml_eisa_id(a, "PNP0501");
 *         aml_name(a, "_CRS"); aml_resources(a);
 *             aml_resource_io(a, 0x3f8, 8);
 *             aml_resource_irq(a, 4);
 *         aml_end(a);
 *     aml_end(a);
 *
 * Names are paths of four-letter segments, with the leading "\" and dots between: "\\_SB.PCI0".
 * When memory runs out the buffer stays as it is and aml_failed says so: one check at the end
 * suffices.
 */
#ifndef DOPPEL_MACHINE_AML_H
#define DOPPEL_MACHINE_AML_H

#include "host/types.h"

#define AML_MAX_DEPTH 16

struct aml {
    u8 *data; /* owned; valid until aml_free */
    size_t len, capacity;
    bool failed;
    struct aml_open {
        size_t start; /* where the length of the body goes */
        bool resources;
    } open[AML_MAX_DEPTH];
    unsigned depth;
};

void aml_init(struct aml *a);
void aml_free(struct aml *a);
bool aml_failed(const struct aml *a);

/* Terms with a body, until aml_end. */
void aml_scope(struct aml *a, const char *path);
void aml_device(struct aml *a, const char *path);
void aml_method(struct aml *a, const char *path, unsigned nargs);
void aml_package(struct aml *a, u8 nelements);
void aml_if(struct aml *a);        /* the first term in it is the condition */
void aml_else(struct aml *a);      /* right after the end of an If */
void aml_resources(struct aml *a); /* a buffer of resource descriptors */
void aml_end(struct aml *a);

/* Name (path, ...): its value is the next term. */
void aml_name(struct aml *a, const char *path);

/* Values. */
void aml_int(struct aml *a, u64 value);
void aml_string(struct aml *a, const char *text); /* 7-bit characters */
void aml_eisa_id(struct aml *a, const char *id);  /* "PNP0501": three letters, four hex digits */
void aml_path(struct aml *a, const char *path);
void aml_arg(struct aml *a, unsigned n);        /* ArgN, n < 7 */
void aml_local(struct aml *a);                  /* Local0 */
void aml_uuid(struct aml *a, const char *uuid); /* a buffer of 16 bytes; as uuidgen prints it */

/* Return: the next term. */
void aml_return(struct aml *a);
/* Store: its source and its target are the next two terms. */
void aml_store(struct aml *a);
/* Or, And: two values and the target are the next three terms. */
void aml_or(struct aml *a);
void aml_and(struct aml *a);
/* Of the next two terms. */
void aml_equal(struct aml *a);
void aml_not_equal(struct aml *a);
/* CreateDWordField (ArgN, index, name). */
void aml_dword_field(struct aml *a, unsigned arg, unsigned index, const char *name);

/* Within aml_resources. */
void aml_resource_io(struct aml *a, u16 port, u8 len);
void aml_resource_irq(struct aml *a, unsigned irq); /* ISA: edge, active high; irq < 16 */
void aml_resource_memory32(struct aml *a, u32 base, u32 len, bool writable);
/* What a bridge hands on (6.4.3.5), first to last address. */
void aml_resource_bus_range(struct aml *a, u16 first, u16 last);
void aml_resource_io_range(struct aml *a, u16 first, u16 last);
void aml_resource_memory_range(struct aml *a, u64 first, u64 last); /* uncacheable, writable */

#endif
