/*
 * The field table of the local APIC's state.
 */
#include "x86/lapic.h"

static const struct state_field fields[] = {
    STATE_FIELD(struct lapic_state, base_msr),
    STATE_FIELD(struct lapic_state, id),
    STATE_FIELD(struct lapic_state, tpr),
    STATE_FIELD(struct lapic_state, ldr),
    STATE_FIELD(struct lapic_state, dfr),
    STATE_FIELD(struct lapic_state, svr),
    STATE_FIELD(struct lapic_state, esr),
    STATE_FIELD(struct lapic_state, esr_pending),
    STATE_FIELD(struct lapic_state, isr),
    STATE_FIELD(struct lapic_state, tmr),
    STATE_FIELD(struct lapic_state, irr),
    STATE_FIELD(struct lapic_state, icr),
    STATE_FIELD(struct lapic_state, lvt),
    STATE_FIELD(struct lapic_state, extint),
    STATE_FIELD(struct lapic_state, timer_initial),
    STATE_FIELD(struct lapic_state, timer_divide),
    STATE_FIELD(struct lapic_state, timer_start_ns),
    STATE_FIELD(struct lapic_state, timer_deadline_ns),
    STATE_FIELD(struct lapic_state, tsc_deadline),
};

const struct state_desc lapic_state_desc = STATE_DESC("lapic", 2, struct lapic_state, fields);
