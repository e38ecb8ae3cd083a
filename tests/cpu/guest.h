/* doppel's side of the oracle test: an engine with its vCPUs, set up as a Linux user process sees it. */
#ifndef DOPPEL_TESTS_CPU_GUEST_H
#define DOPPEL_TESTS_CPU_GUEST_H

#include "case.h"
#include "host/error.h"

struct guest;

/* engine: a name as in --engine. host: its registers are enabled. read_only: the window's page that
 * can't be written. ncpus: 1, or 2 that run the cases by turns. */
struct guest *guest_create(const char *engine, const struct host *host, const u8 *read_only,
                           unsigned ncpus, struct error *err);
void guest_destroy(struct guest *g);

/*
 * From now on kicks the vCPUs every so often, whatever it is about; its state is then taken out of it and put
 * back. 0, or -errno.
 */
int guest_start_kicks(struct guest *g);

/* Runs c, the writable pages holding `image` before its pokes. */
void guest_run(struct guest *g, const struct test_case *c, const u8 *image, struct outcome *out);

/* Blocks of guest code that the engine has translated. */
u64 guest_translated(struct guest *g);
/* Those that a vCPU has from another. */
u64 guest_adopted(struct guest *g);

/* The names of this build's software engines: n from 0 on; NULL: there are no more. */
const char *guest_engine(unsigned n);

#endif
