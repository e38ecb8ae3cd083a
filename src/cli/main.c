/*
 * The doppel program: finds the command and gives it the rest of the line.
 */
#include "cli/image.h"
#include "cli/run.h"
#include "host/log.h"
#include "host/types.h"

#include <stdio.h>
#include <string.h>

#ifndef DOPPEL_VERSION
#error "the build defines DOPPEL_VERSION"
#endif

struct command {
    const char *name;
    const char *help;
    int (*run)(int argc, char **argv);
};

static const struct command commands[] = {
    {"run", "run a virtual machine", cli_run},
    {"image", "make, check and change disk images", cli_image},
};

static int usage(FILE *out, int status)
{
    fputs("usage: doppel COMMAND [options]\n"
          "\n"
          "A virtual machine monitor that needs no /dev/kvm and no root.\n"
          "\n",
          out);
    for (size_t i = 0; i < ARRAY_SIZE(commands); i++)
        fprintf(out, "  %-10s %s\n", commands[i].name, commands[i].help);
    fputs("\n"
          "  --help     this text; doppel COMMAND --help tells about a command\n"
          "  --version  the version\n"
          "\n"
          "example:\n"
          "  doppel run --kernel vmlinuz --initrd initramfs.cpio --append console=ttyS0\n",
          out);
    return status;
}

int main(int argc, char **argv)
{
    if (argc < 2)
        return usage(stderr, VM_STATUS_BAD_INPUT);
    if (!strcmp(argv[1], "--help") || !strcmp(argv[1], "-h"))
        return usage(stdout, 0);
    if (!strcmp(argv[1], "--version")) {
        puts("doppel " DOPPEL_VERSION);
        return 0;
    }
    for (size_t i = 0; i < ARRAY_SIZE(commands); i++) {
        if (!strcmp(argv[1], commands[i].name))
            return commands[i].run(argc - 1, argv + 1);
    }
    log_error("unknown command '%s': see doppel --help", argv[1]);
    return VM_STATUS_BAD_INPUT;
}
