/*
 * Strict readers of what a user types: the whole text must be meant, or it is refused with one line.
 */
#ifndef DOPPEL_CLI_PARSE_H
#define DOPPEL_CLI_PARSE_H

#include "host/error.h"
#include "host/processors.h"
#include "host/types.h"
#include "x86/cpuid.h"

/* A number, decimal or with 0x, from min to max. 0 or -EINVAL. */
int parse_number(const char *text, u64 min, u64 max, u64 *out, struct error *err);

/* A size with its unit: digits and one of K, M, G, T (powers of 1024). 0 or -EINVAL. */
int parse_size(const char *text, u64 *out, struct error *err);

/*
 * FILE[,KEY=VALUE]...: the file, with ",," for a comma in it, and where the first key begins, NULL without.
 * 0, or -EINVAL when the name is empty or too long.
 */
int parse_file_options(const char *text, char *file, size_t file_size, const char **options,
                       struct error *err);
/* The next KEY=VALUE of such a list, moving *options on. 1, 0 at the end, -EINVAL. */
int parse_next_option(const char **options, char *key, size_t key_size, char *value,
                      size_t value_size, struct error *err);

/*
 * N[,sockets=S][,cores=C][,threads=T]: processors, and cores a socket and threads a core. One that is left out is
 * what the others leave it to be: cores before sockets, threads 1. 0, or -EINVAL when they don't multiply to N.
 */
int parse_cpus(const char *text, unsigned *cpus, struct cpu_topology *topology, struct error *err);

/* Numbers of the host's processors and ranges of them, between commas: "0-3,8". 0 or -EINVAL. */
int parse_processors(const char *text, struct processor_list *list, struct error *err);

/* Names of KVM's paravirtual features, between commas, as bits of EAX in CPUID leaf 0x40000001. 0 or -EINVAL. */
int parse_pv_features(const char *text, u32 *bits, struct error *err);

/* A name: 1 to 63 letters, digits, '-', '_' and '.', the first a letter or digit. 0 or -EINVAL. */
int parse_name(const char *text, struct error *err);

#endif
