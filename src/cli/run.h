/*
 * `doppel run`: the options, and the VM that they describe.
 */
#ifndef DOPPEL_CLI_RUN_H
#define DOPPEL_CLI_RUN_H

#include "control/vm.h"
#include "host/error.h"

#include <stdio.h>

/*
 * Reads the options of `doppel run` (argv[0] is "run"). *help is set, and nothing else, when --help was
 * among them. 0, or -EINVAL with an error that names the option.
 */
int cli_run_parse(int argc, char **argv, struct vm_config *config, bool *help, struct error *err);

void cli_run_help(FILE *out);

/* The command. Returns the exit status. */
int cli_run(int argc, char **argv);

#endif
