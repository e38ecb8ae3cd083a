/*
 * `doppel image`: makes, tells about, checks and changes disk images.
 */
#ifndef DOPPEL_CLI_IMAGE_H
#define DOPPEL_CLI_IMAGE_H

/* The command; argv[0] is "image". Returns the exit status. */
int cli_image(int argc, char **argv);

#endif
