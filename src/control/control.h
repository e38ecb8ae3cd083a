/*
 * The control socket: what a user asks of a machine that runs, by lines of text. docs/control.md describes it.
 */
#ifndef DOPPEL_CONTROL_CONTROL_H
#define DOPPEL_CONTROL_CONTROL_H

#include "control/vm.h"
#include "host/event_loop.h"

struct control;
struct machine;

/* Opens config->control, which is a stream as chardev_open takes it. NULL with err set. */
struct control *control_open(const struct vm_config *config, struct event_loop *loop,
                             struct error *err);
/* Commands are taken from now on; the machine outlives them. */
void control_attach(struct control *c, struct machine *machine);
/* For machine_config.card_gone; opaque is the control. */
void control_card_gone(void *opaque, unsigned slot);
/* Takes no more commands; before the machine's end. */
void control_detach(struct control *c);
/* After it. NULL is fine. */
void control_close(struct control *c);

#endif
