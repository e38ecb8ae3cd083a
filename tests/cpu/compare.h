/* The oracle test: comparing and printing what the two sides made of a case. */
#ifndef DOPPEL_TESTS_CPU_COMPARE_H
#define DOPPEL_TESTS_CPU_COMPARE_H

#include "case.h"

#include <Zydis/Zydis.h>

/* What differs, as text. */
struct report {
    char text[4096];
    size_t used;
};

/* Whether nothing differs but what the architecture leaves open. */
bool compare(const ZydisDecoder *decoder, const struct test_case *c, const struct outcome *native,
             const struct outcome *doppel, struct report *r);

/* Of instruction n; ZYDIS_MNEMONIC_INVALID: it is none. */
ZydisMnemonic mnemonic_at(const ZydisDecoder *decoder, const struct test_case *c, unsigned n);

void print_code(const ZydisDecoder *decoder, const struct test_case *c);
/* General registers and flags; everything. */
void print_gprs(const char *name, const struct user_state *s);
void print_state(const char *name, const struct user_state *s);

#endif
