/*
 * The pair of 8259A interrupt controllers of a PC, with the edge/level control registers of later ones.
 *
 * Sixteen input lines; line 2 of the master is the slave's output. The master's INTR output is an
 * irq_line; the processor answers it by pic_ack.
 */
#ifndef DOPPEL_DEVICE_PIC_H
#define DOPPEL_DEVICE_PIC_H

#include "device/device.h"

struct pic;

struct pic_config {
    struct irq_line intr; /* INTR, to the processors' LINT0 */
};

struct pic *pic_create(const struct device_env *env, const struct pic_config *cfg,
                       struct error *err);
struct device *pic_device(struct pic *pic);

/*
 * The INTA cycle: the vector of the request to serve, which moves to ISR. A request that went away
 * meanwhile gives the spurious vector (IR7 of the chip that lost it). -1 when the master was never
 * initialised. Any thread.
 */
int pic_ack(struct pic *pic);

/* Drives input line n (0 to 15); fits irq_line.set with the pic as its sink. Any thread. */
void pic_set_irq(void *sink, unsigned n, bool level);

#endif
