/*
 * Hardware exceptions inside generated code.
 *
 * Guest instructions that run on the host's own units may fault there: a misaligned SSE operand, an
 * unmasked floating-point exception. Generated code announces its address range with a landing
 * point; an exception inside the range resumes there with EAX = the exception's vector, all other
 * registers as they were. An exception anywhere else is ours and goes where it went before: to a
 * sanitizer's handler or to the default, which ends the process.
 */
#ifndef DOPPEL_HOST_TRAP_H
#define DOPPEL_HOST_TRAP_H

#include "host/error.h"
#include "host/types.h"

/*
 * Guards [start, start + size): exceptions there resume at `landing`, which must not fault. The
 * handlers are installed with the first region. 0, -ENOSPC (too many regions) or another -errno,
 * err set.
 */
int trap_region_add(const void *start, size_t size, const void *landing, struct error *err);
/*
 * The same, with exceptions handed to a handler on the thread that met them, which changes the context
 * (ucontext_t) to where it resumes. It returns false for one that isn't the guest's.
 */
typedef bool trap_handler(void *opaque, void *context);
int trap_region_add_handler(const void *start, size_t size, trap_handler *handler, void *opaque,
                            struct error *err);
/* No thread may be inside the region. */
void trap_region_remove(const void *start);

#endif
