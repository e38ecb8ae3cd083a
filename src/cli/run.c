#include "cli/run.h"

#include "host/log.h"

int cli_run(int argc, char **argv)
{
    struct vm_config config;
    struct error err = {0};
    bool help;

    if (cli_run_parse(argc, argv, &config, &help, &err)) {
        log_error("%s", err.text);
        return VM_STATUS_BAD_INPUT;
    }
    if (help) {
        cli_run_help(stdout);
        return 0;
    }
    return vm_run(&config);
}
