/*
 * Pictures of the guest's screen in files.
 */
#ifndef DOPPEL_CONTROL_SCREENSHOT_H
#define DOPPEL_CONTROL_SCREENSHOT_H

#include "host/error.h"

struct vga;

/*
 * Writes what the screen shows to `path`, whose end says as what: .png, a picture, or .txt, its text. The file is
 * replaced when the new one is complete. 0 or -errno with err set.
 */
int screenshot_write(struct vga *vga, const char *path, struct error *err);
/* 0 when the name ends so, or -EINVAL with err set. */
int screenshot_check_name(const char *path, struct error *err);

#endif
