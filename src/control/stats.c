#include "control/stats.h"

#include <errno.h>
#include <jansson.h>
#include <sys/resource.h>

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
    return json_pack("{sI sI sI sI sI sI sI sI sI}",                          /* clang-format off */
                     "port", (json_int_t)s->engine.exits_port,
                     "mmio", (json_int_t)s->engine.exits_mmio,
                     "interrupt", (json_int_t)s->engine.exits_interrupt,
                     "exception", (json_int_t)s->engine.exits_exception,
                     "irq_window", (json_int_t)s->engine.exits_irq_window,
                     "halt", (json_int_t)(s->engine.exits_halt + s->exits[VCPU_EXIT_HALT]),
                     "kicked", (json_int_t)s->exits[VCPU_EXIT_KICKED],
                     "hypercall", (json_int_t)s->exits[VCPU_EXIT_HYPERCALL],
                     "shutdown", (json_int_t)s->exits[VCPU_EXIT_SHUTDOWN]);   /* clang-format on */
}

/* Seconds from the process's start to the first guest instruction; null when none was run. */
static json_t *first_instruction(const struct vm_stats *stats)
{
    u64 first = stats->machine.first_instruction_ns;

    return first ? json_real(seconds(first - stats->begin_ns)) : json_null();
}

int stats_write(const struct vm_stats *stats, FILE *out, const char *path, struct error *err)
{
    const struct engine_stats *e = &stats->machine.engine;
    json_t *json = json_pack("{ss ss si sf sf so sI so sI sI sI sI sI sI sI}", /* clang-format off */
                             "name", stats->name,
                             "engine", stats->engine,
                             "status", stats->status,
                             "wall_seconds", seconds(stats->end_ns - stats->begin_ns),
                             "cpu_seconds", cpu_seconds(),
                             "first_instruction_seconds", first_instruction(stats),
                             "instructions", (json_int_t)e->instructions,
                             "exits", exits(&stats->machine),
                             "blocks_decoded", (json_int_t)e->blocks_decoded,
                             "blocks_translated", (json_int_t)e->blocks_translated,
                             "cache_bytes", (json_int_t)e->cache_bytes,
                             "tlb_misses", (json_int_t)e->tlb_misses,
                             "tlb_flushes", (json_int_t)e->tlb_flushes,
                             "smc_invalidations", (json_int_t)e->smc_invalidations,
                             "resets", (json_int_t)stats->machine.resets); /* clang-format on */
    bool written;

    if (!json)
        return error_host(err, ENOMEM, "%s: cannot make the statistics", path);
    errno = 0;
    written = !json_dumpf(json, out, JSON_INDENT(2)) && fputc('\n', out) != EOF && !fflush(out);
    json_decref(json);
    return written ? 0 : error_host(err, errno ? errno : EIO, "%s: cannot write", path);
}
