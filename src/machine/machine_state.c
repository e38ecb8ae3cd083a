/*
 * The machine's state, in the order in which it can be restored:
 *
 *     machine       what must be the same in the machine that takes it, and the time
 *     memory        a section a slot: where it is, and its pages that aren't all zero; not of files of the user's,
 *                   which like disks are where they are
 *     isa, devices  (board.c) their timers are armed by the clock, which is set by then
 *     cpu, lapic    a pair a processor; after the devices, for INTR is an input of the local APICs
 *
 * Integers are little-endian, as the host's are.
 */
#include "machine/internal.h"
#include "state/stream.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>

/* ---- what must be the same, and the clock ---- */

struct machine_state {
    u64 memory; /* bytes */
    u64 tsc_hz;
    u32 cpus;
    u32 sockets, cores, threads; /* as they are arranged: cores a socket, threads a core */
    char cpu[16];                /* the CPUID model's name */
    u64 clock_ns;                /* VM time */
};

static const struct state_field machine_fields[] = {
    STATE_FIELD(struct machine_state, memory),  STATE_FIELD(struct machine_state, tsc_hz),
    STATE_FIELD(struct machine_state, cpus),    STATE_BYTES(struct machine_state, cpu),
    STATE_FIELD(struct machine_state, sockets), STATE_FIELD(struct machine_state, cores),
    STATE_FIELD(struct machine_state, threads), STATE_FIELD(struct machine_state, clock_ns),
};
static const struct state_desc machine_desc =
    STATE_DESC("machine", 2, struct machine_state, machine_fields);

/* More than this a VM can't have run: 146 years. What is reckoned from it doesn't overflow. */
#define CLOCK_MAX_NS BIT(62)

static void describe(struct machine *m, struct machine_state *s)
{
    struct cpu_topology topology = cpuid_model_topology(m->cpuid);

    memset(s, 0, sizeof(*s));
    s->memory = m->config.memory;
    s->tsc_hz = cpuid_model_tsc_hz(m->cpuid);
    s->cpus = m->config.cpus;
    s->sockets = topology.sockets;
    s->cores = topology.cores;
    s->threads = topology.threads;
    memcpy(s->cpu, m->config.cpu, strnlen(m->config.cpu, sizeof(s->cpu)));
    s->clock_ns = vm_clock_now(m->clock);
}

static int check_kind(struct machine *m, const struct machine_state *s, struct error *err)
{
    struct machine_state own;

    describe(m, &own);
    if (s->memory != own.memory)
        return error_input(err, "the state is of a machine with %llu bytes of memory, not %llu",
                           (unsigned long long)s->memory, (unsigned long long)own.memory);
    if (s->cpus != own.cpus)
        return error_input(err, "the state is of a machine with %u processors, not %u", s->cpus,
                           own.cpus);
    if (s->sockets != own.sockets || s->cores != own.cores || s->threads != own.threads)
        return error_input(
            err,
            "the state is of a machine whose processors are %u sockets of %u cores of %u threads, "
            "not %u of %u of %u",
            s->sockets, s->cores, s->threads, own.sockets, own.cores, own.threads);
    if (memcmp(s->cpu, own.cpu, sizeof(s->cpu)) != 0)
        return error_input(err, "the state is of another processor model than %s", m->config.cpu);
    if (s->tsc_hz != own.tsc_hz)
        return error_input(err, "the state is of a processor with a TSC of %llu Hz, not %llu",
                           (unsigned long long)s->tsc_hz, (unsigned long long)own.tsc_hz);
    if (s->clock_ns > CLOCK_MAX_NS)
        return error_input(err, "the state's VM clock is out of range");
    return 0;
}

/* ---- memory ---- */

#define MEMORY_VERSION 1

struct slot_header {
    u64 gpa;
    u64 size;
};
struct saved_page {
    u64 index; /* in the slot; they ascend */
    u8 bytes[GUEST_PAGE_SIZE];
};

static const u8 zero_page[GUEST_PAGE_SIZE];

/* The slot's own bytes, though a ROM may hide them now. */
static u8 *slot_page(const struct memory_slot *slot, u64 index)
{
    return slot->backing + (index << GUEST_PAGE_SHIFT);
}

static bool page_is_zero(const u8 *page)
{
    return memcmp(page, zero_page, sizeof(zero_page)) == 0;
}

static void save_slot(const struct memory_slot *slot, unsigned n, struct state_writer *w)
{
    struct slot_header header = {.gpa = slot->gpa, .size = slot->size};

    state_write_begin(w, "memory", n, MEMORY_VERSION);
    state_write_bytes(w, &header, sizeof(header));
    for (u64 i = 0; i < slot->size >> GUEST_PAGE_SHIFT; i++) {
        if (page_is_zero(slot_page(slot, i)))
            continue;
        state_write_bytes(w, &i, sizeof(i));
        state_write_bytes(w, slot_page(slot, i), GUEST_PAGE_SIZE);
    }
    state_write_end(w);
}

static u64 page_index(const u8 *saved)
{
    u64 index;

    memcpy(&index, saved + offsetof(struct saved_page, index), sizeof(index));
    return index;
}

static int check_slot(const struct memory_slot *slot, unsigned n, const struct state_section *s,
                      struct error *err)
{
    u64 next = 0, pages = slot->size >> GUEST_PAGE_SHIFT;
    struct slot_header header;

    if (s->len < sizeof(header) || (s->len - sizeof(header)) % sizeof(struct saved_page))
        return error_input(err, "state section memory.%u has an impossible length", n);
    memcpy(&header, s->data, sizeof(header));
    if (header.gpa != slot->gpa || header.size != slot->size)
        return error_input(err, "state section memory.%u is of memory elsewhere", n);
    for (size_t at = sizeof(header); at < s->len; at += sizeof(struct saved_page)) {
        u64 index = page_index(s->data + at);

        if (index < next || index >= pages)
            return error_input(err, "state section memory.%u: page %#llx is out of place", n,
                               (unsigned long long)index);
        next = index + 1;
    }
    return 0;
}

/* The engine hears of it; pages that are right already are left alone. */
static void load_page(struct guest_memory *memory, const struct memory_slot *slot, u64 index,
                      const u8 *bytes)
{
    const struct memory_listener *listener = &memory->listener;

    if (memcmp(slot_page(slot, index), bytes, GUEST_PAGE_SIZE) == 0)
        return;
    memcpy(slot_page(slot, index), bytes, GUEST_PAGE_SIZE);
    if (listener->written)
        listener->written(listener->opaque, slot->gpa + (index << GUEST_PAGE_SHIFT),
                          GUEST_PAGE_SIZE);
}

static int load_slot(struct guest_memory *memory, unsigned n, struct state_reader *r,
                     struct error *err)
{
    const struct memory_slot *slot = &memory->slots[n];
    struct state_section section;
    size_t at = sizeof(struct slot_header);
    int ret = state_read_begin(r, "memory", n, MEMORY_VERSION, &section, err);

    if (ret == 0)
        ret = check_slot(slot, n, &section, err);
    if (ret < 0)
        return ret;
    for (u64 i = 0; i < slot->size >> GUEST_PAGE_SHIFT; i++) {
        const u8 *bytes = zero_page;

        if (at < section.len && page_index(section.data + at) == i) {
            bytes = section.data + at + offsetof(struct saved_page, bytes);
            at += sizeof(struct saved_page);
        }
        load_page(memory, slot, i, bytes);
    }
    return 0;
}

/* ---- processors ---- */

static void save_cpu(struct machine *m, unsigned n, struct state_writer *w)
{
    struct lapic_state apic;
    struct cpu cpu;

    m->ops->vcpu_get_state(m->cpus[n].vcpu, &cpu, &apic);
    state_write_section(w, &cpu_state_desc, n, &cpu);
    state_write_section(w, &lapic_state_desc, n, &apic);
}

static int load_cpu(struct machine *m, unsigned n, struct state_reader *r, struct error *err)
{
    struct lapic_state apic = {0};
    struct cpu cpu = {0};
    int ret = state_read_section(r, &cpu_state_desc, n, &cpu, err);

    if (ret == 0)
        ret = state_read_section(r, &lapic_state_desc, n, &apic, err);
    if (ret < 0)
        return ret;
    ret = m->ops->vcpu_set_state(m->cpus[n].vcpu, &cpu, &apic, err);
    if (ret < 0)
        error_prefix(err, "state of processor %u", n);
    return ret;
}

static const char *compare_cpus(struct machine *a, struct machine *b, unsigned n, char *buf,
                                size_t buflen)
{
    struct lapic_state apic_a, apic_b;
    struct cpu cpu_a, cpu_b;
    const char *difference;

    a->ops->vcpu_get_state(a->cpus[n].vcpu, &cpu_a, &apic_a);
    b->ops->vcpu_get_state(b->cpus[n].vcpu, &cpu_b, &apic_b);
    difference = state_compare(&cpu_state_desc, &cpu_a, &cpu_b, buf, buflen);
    if (!difference)
        difference = state_compare(&lapic_state_desc, &apic_a, &apic_b, buf, buflen);
    return difference;
}

/* ---- the whole ---- */

/* A machine that runs, or that is about to end or to be reset, has no state to take or to replace. */
static int check_idle(struct machine *m, struct error *err)
{
    if (m->running)
        return error_host(err, EBUSY, "the machine's state: it is running");
    if (machine_has_request(m))
        return error_host(err, EBUSY, "the machine's state: it is about to end or to be reset");
    if (board_is_busy(m->board))
        return error_host(err, EBUSY,
                          "the machine's state: a device holds what can't be saved (a disk's write "
                          "that failed, a directory that the guest has mounted)");
    return 0;
}

int machine_save(struct machine *m, struct state_writer *w, struct error *err)
{
    struct machine_state state;
    int ret = check_idle(m, err);

    if (ret < 0)
        return ret;
    /* What the processor holds of the guest's own guests has no place in struct cpu. */
    if (m->config.nested)
        return error_input(err, "a machine with nested=on can't be saved");
    describe(m, &state);
    state_write_section(w, &machine_desc, 0, &state);
    for (unsigned i = 0; i < m->memory.nslots; i++) {
        if (!(m->memory.slots[i].flags & MEMORY_FILE))
            save_slot(&m->memory.slots[i], i, w);
    }
    board_save(m->board, w);
    for (unsigned i = 0; i < m->ncpus; i++)
        save_cpu(m, i, w);
    return state_writer_finish(w, err);
}

static int load_rest(struct machine *m, struct state_reader *r, struct error *err)
{
    int ret = 0;

    for (unsigned i = 0; i < m->memory.nslots && ret == 0; i++) {
        if (!(m->memory.slots[i].flags & MEMORY_FILE))
            ret = load_slot(&m->memory, i, r, err);
    }
    if (ret == 0)
        ret = board_load(m->board, r, err);
    if (ret == 0)
        machine_update_memory(m);
    for (unsigned i = 0; i < m->ncpus && ret == 0; i++)
        ret = load_cpu(m, i, r, err);
    return ret ? ret : state_read_end(r, err);
}

int machine_load(struct machine *m, struct state_reader *r, struct error *err)
{
    struct machine_state state = {0};
    int ret = check_idle(m, err);

    if (ret == 0)
        ret = state_read_section(r, &machine_desc, 0, &state, err);
    if (ret == 0)
        ret = check_kind(m, &state, err);
    if (ret < 0)
        return ret;
    vm_clock_set(m->clock, state.clock_ns);
    ret = load_rest(m, r, err);
    if (ret < 0)
        machine_fail(m, err);
    return ret;
}

static const char *compare_memory(struct machine *a, struct machine *b, char *buf, size_t buflen)
{
    for (unsigned n = 0; n < a->memory.nslots; n++) {
        const struct memory_slot *in_a = &a->memory.slots[n], *in_b = &b->memory.slots[n];

        for (u64 i = 0; i < in_a->size >> GUEST_PAGE_SHIFT; i++) {
            if (memcmp(slot_page(in_a, i), slot_page(in_b, i), GUEST_PAGE_SIZE) == 0)
                continue;
            snprintf(buf, buflen, "memory at %#llx",
                     (unsigned long long)(in_a->gpa + (i << GUEST_PAGE_SHIFT)));
            return buf;
        }
    }
    return NULL;
}

const char *machine_compare(struct machine *a, struct machine *b, char *buf, size_t buflen)
{
    struct machine_state of_a, of_b;
    const char *difference;

    describe(a, &of_a);
    describe(b, &of_b);
    difference = state_compare(&machine_desc, &of_a, &of_b, buf, buflen);
    /* Machines of one kind from here on: the same slots, devices and processors. */
    if (!difference)
        difference = compare_memory(a, b, buf, buflen);
    if (!difference)
        difference = board_compare(a->board, b->board, buf, buflen);
    for (unsigned i = 0; i < a->ncpus && !difference; i++)
        difference = compare_cpus(a, b, i, buf, buflen);
    return difference;
}
