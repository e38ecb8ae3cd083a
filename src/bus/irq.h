/*
 * Interrupt lines and message-signalled interrupts, as devices see them.
 *
 * A line is a value that its owner raises and lowers; what hangs on it (PIC, IOAPIC, both) is the
 * board's affair. A line that nobody connected swallows what it is told.
 */
#ifndef DOPPEL_BUS_IRQ_H
#define DOPPEL_BUS_IRQ_H

#include "host/types.h"

struct irq_line {
    void (*set)(void *sink, unsigned n, bool level); /* called on every change; any thread */
    void *sink;
    unsigned n;
    bool level; /* what was set last: kept by the owner's lock */
};

/* Sets the level; tells the sink only about changes. The caller holds its device's lock. */
static inline void irq_line_set(struct irq_line *line, bool level)
{
    if (line->level == level)
        return;
    line->level = level;
    if (line->set)
        line->set(line->sink, line->n, level);
}
static inline void irq_line_raise(struct irq_line *line)
{
    irq_line_set(line, true);
}
static inline void irq_line_lower(struct irq_line *line)
{
    irq_line_set(line, false);
}
/* An edge: low, high, low. */
static inline void irq_line_pulse(struct irq_line *line)
{
    irq_line_set(line, false);
    irq_line_set(line, true);
    irq_line_set(line, false);
}

/* Where MSIs go (Intel SDM vol. 3, 11.11: address and data formats). Any thread. */
struct msi_sink {
    void (*deliver)(void *sink, u64 address, u32 data);
    void *sink;
    /*
     * Optional, both: a signal of the eventfd sends this message from now on, in place of the one that it was
     * bound to. 0, or -errno when the message is to be delivered. The eventfd stays the caller's, and open until
     * it is unbound.
     */
    int (*bind)(void *sink, int fd, u64 address, u32 data);
    void (*unbind)(void *sink, int fd);
};
static inline void msi_deliver(const struct msi_sink *s, u64 address, u32 data)
{
    s->deliver(s->sink, address, data);
}

#endif
