#include "control/stats.h"

#include <errno.h>
#include <jansson.h>
#include <sys/resource.h>
#include <unistd.h>

static double seconds(u64 ns)
{
    return (double)ns / (double)NS_PER_SEC;
}

static double cpu_seconds(void)
{
    struct rusage usage;

    getrusage(RUSAGE_SELF, &usage);
    return (double)(usage.ru_utime.tv_sec + usage.ru_stime.tv_sec) +
           (double)(usage.ru_utime.tv_usec + usage.ru_stime.tv_usec) / 1e6;
}

static json_t *exits(const struct machine_stats *s)
{
    const struct {
        const char *name;
        u64 count;
    } counts[] = {
        {"port", s->engine.exits_port},
        {"mmio", s->engine.exits_mmio},
        {"interrupt", s->engine.exits_interrupt},
        {"exception", s->engine.exits_exception},
        {"irq_window", s->engine.exits_irq_window},
        {"eoi", s->engine.exits_eoi},
        {"msr", s->engine.exits_msr},
        {"dirty_ring", s->engine.exits_dirty_ring},
        {"signal", s->engine.exits_signal},
        {"halt", s->engine.exits_halt + s->exits[VCPU_EXIT_HALT]},
        {"kicked", s->exits[VCPU_EXIT_KICKED]},
        {"hypercall", s->exits[VCPU_EXIT_HYPERCALL]},
        {"shutdown", s->exits[VCPU_EXIT_SHUTDOWN]},
    };
    json_t *json = json_object();

    for (size_t i = 0; json && i < ARRAY_SIZE(counts); i++)
        json_object_set_new(json, counts[i].name, json_integer((json_int_t)counts[i].count));
    return json;
}

/* kvm: seconds that this process took between a guest's exits and its going on, by their reason. */
static json_t *exit_seconds(const struct engine_stats *e)
{
    const struct {
        const char *name;
        u64 ns;
    } costs[] = {
        {"port", e->ns_port},     {"mmio", e->ns_mmio}, {"irq_window", e->ns_irq_window},
        {"eoi", e->ns_eoi},       {"msr", e->ns_msr},   {"dirty_ring", e->ns_dirty_ring},
        {"signal", e->ns_signal},
    };
    json_t *json = json_object();

    for (size_t i = 0; json && i < ARRAY_SIZE(costs); i++)
        json_object_set_new(json, costs[i].name, json_real(seconds(costs[i].ns)));
    return json;
}

/* Seconds from the process's start to the first guest instruction; null when none was run. */
static json_t *first_instruction(const struct vm_stats *stats)
{
    u64 first = stats->machine.first_instruction_ns;

    return first ? json_real(seconds(first - stats->begin_ns)) : json_null();
}

/* Bytes of this process in the host's RAM (proc(5), statm); 0 when the host won't say. */
static u64 resident(void)
{
    FILE *file = fopen("/proc/self/statm", "re");
    unsigned long long pages = 0;

    if (!file)
        return 0;
    if (fscanf(file, "%*u %llu", &pages) != 1)
        pages = 0;
    fclose(file);
    return pages * (u64)sysconf(_SC_PAGESIZE);
}

int stats_write(const struct vm_stats *stats, FILE *out, const char *path, struct error *err)
{
    const struct engine_stats *e = &stats->machine.engine;
    const struct {
        const char *name;
        json_t *value;
    } members[] = {
        {"name", json_string(stats->name)},
        {"engine", json_string(stats->engine)},
        {"status", json_integer(stats->status)},
        {"wall_seconds", json_real(seconds(stats->end_ns - stats->begin_ns))},
        {"cpu_seconds", json_real(cpu_seconds())},
        {"first_instruction_seconds", first_instruction(stats)},
        {"first_instruction_cpu_seconds",
         json_real(seconds(stats->machine.first_instruction_cpu_ns))},
        {"resident_bytes", json_integer((json_int_t)resident())},
        {"guest_resident_bytes", json_integer((json_int_t)stats->machine.guest_resident)},
        {"instructions", json_integer((json_int_t)e->instructions)},
        {"exits", exits(&stats->machine)},
        {"exit_seconds", exit_seconds(e)},
        {"blocks_decoded", json_integer((json_int_t)e->blocks_decoded)},
        {"blocks_translated", json_integer((json_int_t)e->blocks_translated)},
        {"blocks_adopted", json_integer((json_int_t)e->blocks_adopted)},
        {"blocks_evicted", json_integer((json_int_t)e->blocks_evicted)},
        {"cache_bytes", json_integer((json_int_t)e->cache_bytes)},
        {"tlb_misses", json_integer((json_int_t)e->tlb_misses)},
        {"tlb_flushes", json_integer((json_int_t)e->tlb_flushes)},
        {"smc_invalidations", json_integer((json_int_t)e->smc_invalidations)},
        {"direct_mappings", json_integer((json_int_t)e->direct_mappings)},
        {"direct_faults", json_integer((json_int_t)e->direct_faults)},
        {"spins", json_integer((json_int_t)e->spins)},
        {"irqfds", json_integer((json_int_t)e->irqfds)},
        {"resets", json_integer((json_int_t)stats->machine.resets)},
    };
    json_t *json = json_object();
    bool complete = json;
    bool written;

    /* Takes each value, also where it fails. */
    for (size_t i = 0; i < ARRAY_SIZE(members); i++)
        complete &= !json_object_set_new(json, members[i].name, members[i].value);
    if (!complete) {
        json_decref(json);
        return error_host(err, ENOMEM, "%s: cannot make the statistics", path);
    }
    errno = 0;
    written = !json_dumpf(json, out, JSON_INDENT(2) | JSON_REAL_PRECISION(9)) &&
              fputc('\n', out) != EOF && !fflush(out);
    json_decref(json);
    return written ? 0 : error_host(err, errno ? errno : EIO, "%s: cannot write", path);
}
