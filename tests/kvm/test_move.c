/*
 * A guest doesn't notice that it is moved between engines.
 *
 *     test_move KERNEL INITRD [--long]
 *
 * Debian's kernel boots under kvm and runs its script. While it does, the machine is paused, its state
 * is taken, and a fresh machine goes on with it: under kvm, under bt or interp, under kvm again. The guest
 * must come to its end with the same output as ever. By --long it is moved more often, and with two processors, too.
 *
 * Between two machines of one engine the states must compare equal. Between kvm and the others they do but
 * for what neither can hold of the other, so there the guest is the judge.
 *
 * The dirty log, which moves under way will need, is compared with what was written in fact.
 */
#include "chardev/chardev.h"
#include "machine/internal.h"
#include "state/stream.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define NS_PER_MS 1000000ULL
#define MEMORY MIB(128)
#define MAX_MACHINES 16

static const char *kernel, *initrd;
static struct event_loop *loop;
static unsigned failures;

static void check(bool passed, const char *name, const char *why)
{
    if (passed) {
        printf("ok move: %s\n", name);
    } else {
        failures++;
        printf("not ok move: %s: %s\n", name, why);
    }
    fflush(stdout);
}

static void die(const char *what)
{
    printf("not ok move: %s\n", what);
    exit(1);
}

/* ---- one guest, and the machines that it passes through ---- */

struct guest {
    unsigned cpus;
    struct machine *machine;
    struct chardev *console;
    unsigned machines; /* so far: the console of each is /tmp/console.N */
    struct machine_end end;
};

static void create(struct guest *g, const struct engine_ops *engine, struct machine **machine,
                   struct chardev **console)
{
    struct chardev_owner nobody = {0};
    struct machine_config config = {
        .engine = engine,
        .cpu = "host", /* the processor that QEMU emulates lacks VME, which v2 has */
        .memory = MEMORY,
        .cpus = g->cpus,
        .kernel = kernel,
        .initrd = initrd,
        .cmdline = "console=ttyS0 quiet",
    };
    struct error err;
    char path[64];

    if (g->machines == MAX_MACHINES)
        die("too many machines");
    snprintf(path, sizeof(path), "/tmp/console.%u", g->machines++);
    *console = chardev_open(path, loop, &nobody, &err);
    if (!*console)
        die(err.text);
    config.serial = *console;
    *machine = machine_create(&config, loop, &err);
    if (!*machine)
        die(err.text);
}

static void leave(struct machine *machine, struct chardev *console)
{
    machine_destroy(machine);
    chardev_close(console);
}

static void stop_loop(void *opaque)
{
    event_loop_stop(loop);
}

/* Runs for so long; false once the guest has ended. */
static bool run_for(struct guest *g, u64 ms)
{
    struct host_timer timer = {.fire = stop_loop};

    event_loop_timer_arm(loop, &timer, host_clock_ns() + ms * NS_PER_MS);
    machine_run(g->machine, &g->end);
    event_loop_timer_remove(loop, &timer);
    return g->end.reason == MACHINE_END_NONE;
}

/* The text of all consoles, in order. */
static const char *console_text(const struct guest *g)
{
    static char text[1 << 20];
    size_t used = 0;

    for (unsigned n = 0; n < g->machines; n++) {
        char path[64];
        FILE *file;

        snprintf(path, sizeof(path), "/tmp/console.%u", n);
        file = fopen(path, "r");
        if (file) {
            used += fread(text + used, 1, sizeof(text) - 1 - used, file);
            fclose(file);
        }
    }
    text[used] = '\0';
    return text;
}

/* The guest goes on in a fresh machine under `engine`; the old one is gone. */
static void move(struct guest *g, const struct engine_ops *engine, bool same, const char *name)
{
    struct state_writer w = {0};
    const char *difference = NULL;
    struct chardev *console;
    struct machine *fresh;
    struct error err = {0};
    char where[128];
    bool fine = false;

    create(g, engine, &fresh, &console);
    if (machine_save(g->machine, &w, &err) == 0) {
        struct state_reader r = {.data = w.data, .len = w.len};

        fine = machine_load(fresh, &r, &err) == 0;
        if (fine && same)
            difference = machine_compare(g->machine, fresh, where, sizeof(where));
    }
    check(fine && !difference, name, difference ? difference : err.text);
    state_writer_free(&w);
    leave(g->machine, g->console);
    g->machine = fresh;
    g->console = console;
    usleep(50000); /* the guest's clock stands meanwhile */
}

/* ---- the tests ---- */

/* To where the script is running. */
static bool boot(struct guest *g, unsigned cpus, const struct engine_ops *engine)
{
    *g = (struct guest){.cpus = cpus};
    create(g, engine, &g->machine, &g->console);
    for (unsigned i = 0; i < 600; i++) {
        if (!run_for(g, 100))
            return false;
        if (strstr(console_text(g), "doppel-guest: up"))
            return true;
    }
    return false;
}

static void finish(struct guest *g, const char *name)
{
    char label[64], cpus[32];
    const char *text;

    run_for(g, 240 * 1000);
    leave(g->machine, g->console);
    text = console_text(g);
    snprintf(label, sizeof(label), "%s-%u-cpus-power-off", name, g->cpus);
    check(g->end.reason == MACHINE_END_POWER_OFF, label, g->end.error.text);
    snprintf(label, sizeof(label), "%s-%u-cpus-output", name, g->cpus);
    snprintf(cpus, sizeof(cpus), "guest: cpus=%u ", g->cpus);
    check(strstr(text, cpus) && strstr(text, "sum=ok procs=ok"), label,
          "the guest's script went wrong");
    snprintf(label, sizeof(label), "%s-%u-cpus-no-complaint", name, g->cpus);
    check(!strstr(text, "Call Trace") && !strstr(text, "stall"), label, "its kernel complained");
}

/* Under kvm only: the states must be the same, at any moment of the boot. */
static void test_same(unsigned cpus, unsigned moves)
{
    struct guest g = {.cpus = cpus};

    create(&g, &engine_kvm, &g.machine, &g.console);
    for (unsigned i = 0; i < moves && run_for(&g, 200 + 150 * i); i++)
        move(&g, &engine_kvm, true, "kvm-to-kvm");
    finish(&g, "kvm");
}

/* There and back. The software processor is slow down here, so it doesn't get much of the work. */
static void test_between(unsigned cpus, unsigned rounds)
{
    static const struct {
        const struct engine_ops *engine;
        const char *there, *back;
    } others[] = {{&engine_bt, "kvm-to-bt", "bt-to-kvm"},
                  {&engine_interp, "kvm-to-interp", "interp-to-kvm"}};
    struct guest g;

    if (!boot(&g, cpus, &engine_kvm)) {
        check(false, "boot", console_text(&g));
        return;
    }
    for (unsigned i = 0; i < rounds; i++) {
        unsigned n = i % ARRAY_SIZE(others);

        move(&g, others[n].engine, false, others[n].there);
        if (!run_for(&g, 1500))
            break;
        move(&g, &engine_kvm, false, others[n].back);
        if (!run_for(&g, 20))
            break;
    }
    finish(&g, "between");
}

/* ---- the dirty log ---- */

static bool is_marked(const u64 *bitmap, u64 page)
{
    return bitmap[page / 64] & BIT(page % 64);
}

/* Whether every page of the slot that differs from `before` is marked. */
static bool covers(const struct memory_slot *slot, const u8 *before, const u64 *bitmap)
{
    for (u64 page = 0; page < slot->size >> GUEST_PAGE_SHIFT; page++) {
        u64 at = page << GUEST_PAGE_SHIFT;

        if (!is_marked(bitmap, page) && memcmp(slot->host + at, before + at, GUEST_PAGE_SIZE))
            return false;
    }
    return true;
}

static u64 count_marked(const u64 *bitmap, size_t words)
{
    u64 sum = 0;

    for (size_t w = 0; w < words; w++)
        sum += (u64)__builtin_popcountll(bitmap[w]);
    return sum;
}

/* What the guest writes is in the log, once; what the VMM writes, too; what nobody writes isn't. */
static void test_dirty_log(void)
{
    static u64 bitmap[MEMORY / GUEST_PAGE_SIZE / 64 + 1];
    const gpa_t ours = MIB(100);
    const struct memory_slot *slot;
    struct error err = {0};
    struct machine *m;
    struct guest g;
    u8 *before;
    u64 page;

    if (!boot(&g, 1, &engine_kvm)) {
        check(false, "dirty-log-boot", console_text(&g));
        return;
    }
    m = g.machine;
    slot = memory_find(&m->memory, ours);
    page = (ours - slot->gpa) >> GUEST_PAGE_SHIFT;
    before = malloc(slot->size);
    memcpy(before, slot->host, slot->size);
    check(!m->ops->dirty_log_start(m->engine, &err), "dirty-log-start", err.text);
    run_for(&g, 200);
    check(!m->ops->dirty_log_read(m->engine, slot, bitmap, ARRAY_SIZE(bitmap)) &&
              covers(slot, before, bitmap),
          "dirty-log-covers", "a page was written and isn't marked");
    check(count_marked(bitmap, ARRAY_SIZE(bitmap)) > 0 &&
              count_marked(bitmap, ARRAY_SIZE(bitmap)) < slot->size / GUEST_PAGE_SIZE / 2,
          "dirty-log-some", "no page is marked, or most are");
    check(!m->ops->dirty_log_read(m->engine, slot, bitmap, ARRAY_SIZE(bitmap)) &&
              count_marked(bitmap, ARRAY_SIZE(bitmap)) == 0,
          "dirty-log-taken", "pages are marked that nobody wrote");
    memory_write(&m->memory, ours, slot->host + (ours - slot->gpa), 1);
    check(!m->ops->dirty_log_read(m->engine, slot, bitmap, ARRAY_SIZE(bitmap)) &&
              is_marked(bitmap, page) && count_marked(bitmap, ARRAY_SIZE(bitmap)) == 1,
          "dirty-log-vmm", "the VMM's own write isn't marked, or others are");
    memcpy(before, slot->host, slot->size);
    run_for(&g, 200);
    check(!m->ops->dirty_log_read(m->engine, slot, bitmap, ARRAY_SIZE(bitmap)) &&
              covers(slot, before, bitmap),
          "dirty-log-goes-on", "a page was written again and isn't marked");
    m->ops->dirty_log_stop(m->engine);
    free(before);
    finish(&g, "dirty-log");
}

int main(int argc, char **argv)
{
    bool all = argc > 3 && !strcmp(argv[3], "--long");
    struct error err;

    if (argc < 3)
        die("usage: test_move KERNEL INITRD [--long]");
    kernel = argv[1];
    initrd = argv[2];
    loop = event_loop_create(&err);
    if (!loop)
        die(err.text);
    test_same(1, all ? 8 : 2);
    test_between(1, all ? 6 : 2);
    test_dirty_log();
    if (all) {
        test_same(2, 4);
        test_between(2, 2);
    }
    event_loop_destroy(loop);
    return failures ? 1 : 0;
}
