/*
 * Descriptors, stacks and code-segment checks: what exceptions, far transfers, task switches and segment
 * loads have in common. Private to exception.c, segment.c, far.c, task.c and system.c.
 */
#ifndef DOPPEL_ENGINE_SOFT_DESCRIPTOR_H
#define DOPPEL_ENGINE_SOFT_DESCRIPTOR_H

#include "engine/soft/exception.h"
#include "engine/soft/segment.h"

/* Attributes that real-address mode, virtual-8086 mode and SYSCALL give without a descriptor. */
#define ATTR_DATA (SEG_ATTR_P | SEG_ATTR_S | SEG_ATTR_WRITABLE | SEG_ATTR_ACCESSED)
#define ATTR_CODE (ATTR_DATA | SEG_ATTR_CODE)
#define ATTR_DPL(n) ((u32)(n) << SEG_ATTR_DPL_SHIFT)

/* A selector as error codes show it: without RPL (bit 0 of an error code is EXT). */
static inline u32 selector_error(u16 selector)
{
    return selector & 0xfffc;
}
static inline bool selector_null(u16 selector)
{
    return (selector & 0xfffc) == 0;
}
static inline unsigned selector_rpl(u16 selector)
{
    return selector & 3;
}

/* Fields of the first eight bytes of a descriptor or gate (vol. 3, 3.4.5, 5.8.3, 6.11). */
static inline unsigned desc_type(u64 d)
{
    return (d >> 40) & 15;
}
static inline bool desc_is_system(u64 d)
{
    return !(d & BIT(44));
}
static inline bool desc_present(u64 d)
{
    return d & BIT(47);
}
static inline unsigned desc_dpl(u64 d)
{
    return (d >> 45) & 3;
}
static inline bool desc_is_code(u64 d)
{
    return (d & BIT(44)) && (d & BIT(43));
}
static inline bool desc_is_conforming(u64 d)
{
    return desc_is_code(d) && (d & BIT(42));
}
static inline bool desc_is_writable_data(u64 d)
{
    return (d & BIT(44)) && !(d & BIT(43)) && (d & BIT(41));
}
static inline bool desc_is_readable(u64 d)
{
    return (d & BIT(44)) && (!(d & BIT(43)) || (d & BIT(41)));
}
static inline bool desc_long(u64 d)
{
    return d & BIT(53);
}
static inline bool desc_db(u64 d)
{
    return d & BIT(54);
}
static inline u16 gate_selector(u64 d)
{
    return (u16)(d >> 16);
}
static inline u32 gate_offset(u64 d)
{
    return (u32)(d & 0xffff) | (u32)((d >> 32) & 0xffff0000);
}

/*
 * Reads the eight bytes of a descriptor from GDT or LDT; false: beyond the table's limit, or there is no
 * LDT. soft_read_system_descriptor also gets bytes 8 to 15 in *high, which system descriptors and call
 * gates have in IA-32e mode (0 for all others).
 */
bool soft_read_descriptor(struct soft_vcpu *v, u16 selector, u64 *d);
bool soft_read_system_descriptor(struct soft_vcpu *v, u16 selector, u64 *d, u64 *high);
/* Changes type bits of a descriptor in memory, atomically: sets and clears bits of its byte 5. */
void soft_update_descriptor(struct soft_vcpu *v, u16 selector, u8 set, u8 clear);
/* Sets the accessed bit of a code or data descriptor, in memory (when it isn't) and in *d. */
void soft_descriptor_accessed(struct soft_vcpu *v, u16 selector, u64 *d);

/* The segment that a descriptor describes; one loaded with a null selector, that keeps CPL in its DPL. */
struct segment soft_segment(u16 selector, u64 d);
struct segment soft_null_segment(u16 selector, unsigned dpl);
/* Puts it in place, with the effective base. After CS or SS follow with soft_mode_changed. */
void soft_commit_segment(struct soft_vcpu *v, enum segreg seg, struct segment s);

/*
 * Checks a segment that ES, DS, FS or GS is to be loaded with (CPL as it is now); a fault other than "not
 * present" is `vector`: #GP, or #TS in a task switch. The selector isn't null.
 */
u64 soft_check_data_segment(struct soft_vcpu *v, u16 selector, enum exception vector);
/* The same for SS, at privilege `cpl`. */
u64 soft_check_stack_segment(struct soft_vcpu *v, u16 selector, unsigned cpl,
                             enum exception vector);
/* CS of RET and IRET: all but the instruction pointer. */
u64 soft_check_return_code(struct soft_vcpu *v, u16 selector);
/* #GP(0) unless ip is within the code segment d: its limit, or canonical in a 64-bit one. */
void soft_check_ip(struct soft_vcpu *v, u64 d, u64 ip);
/* Whether code in d runs in 64-bit mode. */
static inline bool soft_desc_is_code64(const struct soft_vcpu *v, u64 d)
{
    return soft_long_mode(v) && desc_long(d);
}
/* After a return to outer privilege: nulls data segments that it may not use (RET, IRET). */
void soft_drop_inner_segments(struct soft_vcpu *v);

/*
 * A stack being pushed to or popped from; nothing of the processor changes until soft_stack_commit.
 * Frames are written whole or not at all.
 */
struct stack {
    u64 base, sp;
    u64 mask; /* of sp: 16, 32 or 64 bits */
    u32 limit, attr;
    unsigned access; /* ACCESS_STACK, and ACCESS_SYSTEM while CPL is still that of the old stack */
    u32 error;       /* of #SS */
};
/* The current one. */
struct stack soft_stack(const struct soft_vcpu *v);
/* One to switch to, at `sp`; flat: 64-bit mode, where the segment has no part in it. */
struct stack soft_stack_in(const struct soft_vcpu *v, const struct segment *ss, u64 sp, bool flat,
                           u32 error);
/* #SS unless `bytes` can be pushed. */
void soft_stack_room(struct soft_vcpu *v, const struct stack *s, unsigned bytes);
/* Pushes values[0], then values[1], ...; pops into values[0], values[1], ... Up to STACK_MAX of them. */
#define STACK_MAX 40
void soft_stack_push(struct soft_vcpu *v, struct stack *s, const u64 *values, unsigned n,
                     unsigned size);
void soft_stack_pop(struct soft_vcpu *v, struct stack *s, u64 *values, unsigned n, unsigned size);
/* (E/R)SP = s->sp, as wide as the stack is. */
void soft_stack_commit(struct soft_vcpu *v, const struct stack *s);

/*
 * The stack for an inner privilege, from the TSS (vol. 3, 5.8.5): checks it all (#TS, #SS) and returns
 * the segment in *ss. In IA-32e mode SS becomes null; ist is 1 to 7, or 0.
 */
struct stack soft_inner_stack(struct soft_vcpu *v, unsigned cpl, unsigned ist, struct segment *ss);

/* The old stack pointer as a new stack holds it: outside 64-bit mode ESP, whatever is above it. */
static inline u64 soft_saved_sp(const struct soft_vcpu *v)
{
    return soft_code64(v) ? v->cpu.gpr[RSP] : (u32)v->cpu.gpr[RSP];
}

/* EFLAGS as the event under delivery (cpu.event_*) saves it: RF is set by faults. */
u64 soft_event_flags(const struct soft_vcpu *v);

#endif
