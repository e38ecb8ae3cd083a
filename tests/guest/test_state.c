/*
 * A guest doesn't notice that its machine is paused, saved, and restored into another one, by this
 * software engine or that.
 *
 *     test_state ROOT [SEED]
 *
 * Debian's kernel runs a script that computes, sleeps, prints, and keeps what it works on in files on a virtio
 * and an NVMe disk; at random moments, from the first
 * instructions on, the machine's state moves to a fresh machine, and the first is destroyed. What the
 * guest prints must be what the same script prints here, and its clock must have stood meanwhile.
 * ROOT is doppel's source, for scripts/. The same seed gives the same moments, more or less: they are
 * in host time.
 */
#include "block/block.h"
#include "chardev/chardev.h"
#include "device/virtio/balloon.h"
#include "machine/machine.h"
#include "state/stream.h"
#include "x86/cpuid.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define NS_PER_MS 1000000ULL
#define MAX_MACHINES 64

/* The lines that begin with "state: " are the same wherever it runs. */
static const char script[] =
    "set -e\n"
    "d=$(mktemp -d)\n"
    "e=$(mktemp -d)\n"
    "if [ -e /lib/virtio_blk.ko ]; then\n"
    "    for m in ring '' pci_modern_dev pci_legacy_dev pci blk; do\n"
    "        insmod /lib/virtio${m:+_$m}.ko\n"
    "    done\n"
    "    insmod /lib/virtio_balloon.ko\n"
    "    mke2fs -F /dev/vda >/dev/null 2>&1\n"
    "    mount -t ext4 /dev/vda $d\n"
    "    mke2fs -F /dev/nvme0n1 >/dev/null 2>&1\n"
    "    mount -t ext4 /dev/nvme0n1 $e\n"
    "fi\n"
    "i=1\n"
    "while [ $i -le 32 ]; do\n"
    "    seq $i 5000 >$d/file\n"
    "    cp $d/file $e/file\n"
    "    sync $d/file $e/file\n"
    "    [ ! -e /lib/virtio_blk.ko ] || echo 3 >/proc/sys/vm/drop_caches\n"
    "    cmp $d/file $e/file\n"
    "    hash=$(sha256sum <$e/file | cut -c1-64)\n"
    "    sum=$(awk -v n=$i 'BEGIN { for (k = 1; k < 3000; k++) s += k / (k + n / 7);"
    " printf \"%.12f\", s }')\n"
    "    echo \"state: $i $hash $sum\"\n"
    "    echo \"uptime: $(cut -d' ' -f1 /proc/uptime)\"\n"
    "    sleep 0.05\n"
    "    i=$((i + 1))\n"
    "done\n"
    "[ -e /lib/virtio_blk.ko ] || rm -r $d $e\n";

static char directory[] = "/tmp/doppel-state.XXXXXX";
static char kernel[512], initrd[64];
static struct event_loop *loop;
static struct machine_disks disks; /* which all the machines have in turn */
static u64 seed;
static unsigned failures;

/* ---- cases ---- */

static bool check(bool passed, const char *name, const char *fmt, ...) PRINTF_LIKE(3, 4);
static bool check(bool passed, const char *name, const char *fmt, ...)
{
    va_list args;

    printf(passed ? "ok %s\n" : "not ok %s: ", name);
    if (!passed) {
        failures++;
        va_start(args, fmt);
        vprintf(fmt, args);
        va_end(args);
        putchar('\n');
    }
    fflush(stdout);
    return passed;
}

static void die(const char *what)
{
    printf("not ok state: %s\n", what);
    exit(1);
}

static u64 random_below(u64 n)
{
    seed ^= seed << 13;
    seed ^= seed >> 7;
    seed ^= seed << 17;
    return (seed >> 11) % n;
}

/* ---- what is booted ---- */

/* Runs a command of the shell; returns its output, at most len - 1 bytes of it, in buf. */
static void shell(char *buf, size_t len, const char *fmt, ...) PRINTF_LIKE(3, 4);
static void shell(char *buf, size_t len, const char *fmt, ...)
{
    char command[1024];
    va_list args;
    size_t got;
    FILE *pipe;

    va_start(args, fmt);
    vsnprintf(command, sizeof(command), fmt, args);
    va_end(args);
    pipe = popen(command, "r");
    if (!pipe)
        die("no shell");
    got = fread(buf, 1, len - 1, pipe);
    buf[got] = '\0';
    if (pclose(pipe) != 0)
        die(command);
}

static void prepare(const char *root)
{
    char path[64], none[1];
    FILE *file;

    if (!mkdtemp(directory))
        die("no temporary directory");
    snprintf(path, sizeof(path), "%s/script", directory);
    snprintf(initrd, sizeof(initrd), "%s/initrd", directory);
    file = fopen(path, "w");
    if (!file || fputs(script, file) < 0 || fclose(file) != 0)
        die("can't write the script");
    shell(kernel, sizeof(kernel), "'%s'/scripts/fetch-kernel", root);
    kernel[strcspn(kernel, "\n")] = '\0';
    shell(none, sizeof(none),
          "'%s'/scripts/make-initramfs '%s' '%s' \"$('%s'/scripts/fetch-kernel --modules)\"/*.ko",
          root, initrd, path, root);
}

static void create_disk(enum machine_disk_bus bus)
{
    struct machine_disk *out = &disks.disk[disks.count];
    struct disk_create c = {.format = "qcow2", .size = MIB(16), .size_given = true};
    struct disk_options options = {0};
    struct error err = {0};
    struct disk *disk;
    char path[64];

    snprintf(path, sizeof(path), "%s/disk.%u", directory, disks.count++);
    disk = disk_create(path, &c, &err) ? NULL : disk_open(path, &options, &err);
    if (!disk)
        die(err.text);
    out->bus = bus;
    out->backend = block_create(disk, loop, false, &err);
    if (!out->backend)
        die(err.text);
}

/* ---- a guest and the machines that it passes through ---- */

struct guest {
    struct machine *machine;
    struct chardev *console;
    unsigned machines; /* so far: each has a console of its own, directory/console.N */
    struct machine_end end;
    u64 ran_ns; /* host time in which it ran */
};

static void console_path(char *buf, size_t len, unsigned n)
{
    snprintf(buf, len, "%s/console.%u", directory, n);
}

static const struct cpu_topology one_cpu = {1, 1, 1};

/*
 * The kernel is told the speed of its TSC: what it makes of it by the PIT is wrong by as much as a busy
 * host keeps the vCPU waiting in the midst of it.
 */
static struct machine *create_machine(struct chardev *console, u64 memory,
                                      struct cpu_topology topology)
{
    struct machine_config config = {
        .engine = random_below(2) ? &engine_bt : &engine_interp,
        .cpu = "host",
        .memory = memory,
        .cpus = topology.sockets * topology.cores * topology.threads,
        .topology = topology,
        .kernel = kernel,
        .initrd = initrd,
        .cmdline = "console=ttyS0 quiet",
        .serial = console,
        .disks = &disks,
    };
    struct machine *m;
    struct error err;

    m = machine_create(&config, loop, &err);
    if (!m)
        die(err.text);
    return m;
}

/* The next machine of the guest, and its console; the ones before stay as they are. */
static void next_machine(struct guest *g, struct machine **machine, struct chardev **console)
{
    struct chardev_owner nobody = {0};
    struct error err;
    char path[64];

    if (g->machines == MAX_MACHINES)
        die("too many machines");
    console_path(path, sizeof(path), g->machines++);
    *console = chardev_open(path, loop, &nobody, &err);
    if (!*console)
        die(err.text);
    *machine = create_machine(*console, MIB(128), one_cpu);
}

static void leave_machine(struct machine *machine, struct chardev *console)
{
    machine_destroy(machine);
    chardev_close(console);
}

static void stop_loop(void *opaque)
{
    event_loop_stop(loop);
}

/* Runs for so long; false once the guest has ended. */
static bool run_for(struct guest *g, u64 ns)
{
    struct host_timer timer = {.fire = stop_loop};
    u64 begin = host_clock_ns();

    event_loop_timer_arm(loop, &timer, begin + ns);
    machine_run(g->machine, &g->end);
    event_loop_timer_remove(loop, &timer);
    g->ran_ns += host_clock_ns() - begin;
    return g->end.reason == MACHINE_END_NONE;
}

/* All that the guest printed, from machine to machine. */
static char *console_text(const struct guest *g)
{
    char *text = NULL, path[64];
    size_t len = 0;
    FILE *all = open_memstream(&text, &len);

    for (unsigned n = 0; n < g->machines; n++) {
        char buf[4096];
        FILE *file;
        size_t got;

        console_path(path, sizeof(path), n);
        file = fopen(path, "r");
        while (file && (got = fread(buf, 1, sizeof(buf), file)) > 0)
            fwrite(buf, 1, got, all);
        if (file)
            fclose(file);
        unlink(path);
    }
    fclose(all);
    return text;
}

static void begin(struct guest *g)
{
    *g = (struct guest){0};
    next_machine(g, &g->machine, &g->console);
}

/*
 * Looks at what came out. The guest's uptime begins with its kernel's timekeeping, a moment after the
 * VM clock, so it is less than the time that the machine ran (Linux corrects the TSC's speed by 1 % at
 * most); a clock that went on while the machine was paused would be ahead.
 */
static void finish(struct guest *g, const char *name, const char *expected)
{
    double ran = (double)g->ran_ns / (double)NS_PER_SEC, before = 0, uptime = 0;
    char label[64], *text, *said = calloc(1, strlen(expected) + 4096);
    bool back = false;
    size_t used = 0;

    leave_machine(g->machine, g->console);
    text = console_text(g);
    for (char *line = strtok(text, "\n"); line; line = strtok(NULL, "\n")) {
        line[strcspn(line, "\r")] = '\0';
        if (sscanf(line, "uptime: %lf", &uptime) == 1) {
            back |= uptime < before;
            before = uptime;
        } else if (strncmp(line, "state: ", 7) == 0 && used < strlen(expected)) {
            used += (size_t)snprintf(said + used, 1024, "%s\n", line);
        }
    }
    snprintf(label, sizeof(label), "%s-power-off", name);
    check(g->end.reason == MACHINE_END_POWER_OFF, label, "the machine ended for reason %d: %s",
          g->end.reason, g->end.error.text);
    snprintf(label, sizeof(label), "%s-output", name);
    check(strcmp(said, expected) == 0, label, "the guest printed:\n%s", said);
    snprintf(label, sizeof(label), "%s-clock", name);
    check(!back && uptime <= ran * 1.01 && uptime > ran / 2, label,
          "%.2f s passed in the guest, which ran %.2f s; it %s back", uptime, ran,
          back ? "went" : "didn't go");
    free(text);
    free(said);
}

/* ---- moving ---- */

/* Saves, restores into a fresh machine, compares, and leaves the old machine. False: it went wrong. */
static bool move(struct guest *g, const char *name)
{
    struct state_writer first = {0}, second = {0};
    struct chardev *console;
    struct machine *fresh;
    const char *difference = NULL;
    struct error err = {0};
    char where[128];
    bool fine = false;

    next_machine(g, &fresh, &console);
    if (machine_save(g->machine, &first, &err) == 0) {
        struct state_reader r = {.data = first.data, .len = first.len};

        fine = machine_load(fresh, &r, &err) == 0;
        if (fine)
            difference = machine_compare(g->machine, fresh, where, sizeof(where));
        fine = fine && !difference && machine_save(fresh, &second, &err) == 0 &&
               first.len == second.len && memcmp(first.data, second.data, first.len) == 0;
    }
    if (!fine)
        check(false, name, "move %u: %s", g->machines - 1, difference ? difference : err.text);
    state_writer_free(&first);
    state_writer_free(&second);
    leave_machine(g->machine, g->console);
    g->machine = fresh;
    g->console = console;
    return fine;
}

/* `moves` times, after up to max_ms each. The machine stands for 50 ms, to see that its clock does, too. */
static void test_moves(const char *name, unsigned moves, u64 max_ms, const char *expected)
{
    struct guest g;
    unsigned moved = 0;
    char label[64];

    begin(&g);
    while (moved < moves && run_for(&g, random_below(max_ms * NS_PER_MS))) {
        if (!move(&g, name))
            break;
        moved++;
        usleep(50000);
    }
    while (run_for(&g, UINT64_MAX / 4))
        ;
    snprintf(label, sizeof(label), "%s-all", name);
    check(moved == moves, label, "the guest ended after %u moves", moved);
    finish(&g, name, expected);
}

static void test_pauses(const char *expected)
{
    struct guest g;

    begin(&g);
    for (unsigned i = 0; i < 15 && run_for(&g, random_below(200 * NS_PER_MS)); i++)
        usleep(50000);
    while (run_for(&g, UINT64_MAX / 4))
        ;
    finish(&g, "pauses", expected);
}

/* ---- the balloon ---- */

struct hinted {
    u64 bytes;
    bool outside, done;
};

static void hinted_free(void *opaque, gpa_t gpa, u64 len)
{
    struct hinted *h = opaque;

    h->bytes += len;
    h->outside |= gpa >= MIB(128) || len > MIB(128) - gpa;
}

static void hinted_done(void *opaque)
{
    ((struct hinted *)opaque)->done = true;
}

/* The guest says which memory is free, as soon as it has the driver, and goes on with all of it whole. */
static void test_hints(const char *expected)
{
    struct hinted h = {0};
    struct balloon_hints hints = {hinted_free, hinted_done, &h};
    struct guest g;
    bool asked = false;

    begin(&g);
    while (!h.done && run_for(&g, 100 * NS_PER_MS))
        asked |= virtio_balloon_hint(machine_balloon(g.machine), &hints);
    check(asked && h.done && h.bytes > MIB(16) && !h.outside, "hints-free",
          "%s: %llu KiB hinted, %s", asked ? "asked" : "no driver",
          (unsigned long long)(h.bytes >> 10), h.done ? "all" : "without an end");
    while (run_for(&g, UINT64_MAX / 4))
        ;
    finish(&g, "hints", expected);
}

/* ---- states that are refused ---- */

static int load(struct machine *m, const u8 *data, size_t len, struct error *err)
{
    struct state_reader r = {.data = data, .len = len};

    return machine_load(m, &r, err);
}

/* A state that was cut off, or that goes on, ends the machine with what is wrong with it. */
static void test_damage(const struct state_writer *w, size_t len, const char *name)
{
    struct machine *m = create_machine(NULL, MIB(128), one_cpu);
    u8 *data = calloc(1, MAX(len, w->len));
    struct machine_end end = {0};
    struct error err = {0};

    memcpy(data, w->data, w->len);
    if (load(m, data, len, &err) < 0)
        machine_run(m, &end);
    check(end.reason == MACHINE_END_ERROR && strcmp(end.error.text, err.text) == 0, name,
          "the machine ended for reason %d, with '%s' after '%s'", end.reason, end.error.text,
          err.text);
    machine_destroy(m);
    free(data);
}

static void test_refusals(void)
{
    struct state_writer w = {0};
    struct error err = {0};
    struct machine *other;
    struct guest g;

    begin(&g);
    run_for(&g, 300 * NS_PER_MS);
    if (check(machine_save(g.machine, &w, &err) == 0, "save", "%s", err.text)) {
        test_damage(&w, w.len - 1, "cut-in-lapic");
        test_damage(&w, w.len - 2000, "cut-in-cpu");
        test_damage(&w, w.len / 2, "cut-in-memory");
        test_damage(&w, w.len + 100, "goes-on");
        other = create_machine(NULL, MIB(96), one_cpu);
        check(load(other, w.data, w.len, &err) < 0 && strstr(err.text, "bytes of memory"),
              "other-memory", "%s", err.text);
        machine_start(other);
        check(load(other, w.data, w.len, &err) == -EBUSY, "load-while-running", "%s", err.text);
        machine_pause(other);
        machine_destroy(other);
    }
    state_writer_free(&w);
    leave_machine(g.machine, g.console);
    free(console_text(&g));
}

/* A guest has read from CPUID and ACPI how its processors are arranged. */
static void test_topology(void)
{
    struct machine *cores = create_machine(NULL, MIB(128), (struct cpu_topology){1, 2, 1});
    struct machine *sockets = create_machine(NULL, MIB(128), (struct cpu_topology){2, 1, 1});
    struct state_writer w = {0};
    struct error err = {0};

    check(machine_save(cores, &w, &err) == 0, "save-two-cores", "%s", err.text);
    check(load(sockets, w.data, w.len, &err) < 0 &&
              strstr(err.text, "1 sockets of 2 cores of 1 threads, not 2 of 1 of 1"),
          "other-topology", "%s", err.text);
    state_writer_free(&w);
    machine_destroy(cores);
    machine_destroy(sockets);
}

int main(int argc, char **argv)
{
    char expected[8192], none[1];
    struct error err;

    if (argc < 2)
        die("usage: test_state ROOT [SEED]");
    seed = argc > 2 ? strtoull(argv[2], NULL, 0) : (u64)time(NULL);
    seed += !seed;
    printf("# seed %llu\n", (unsigned long long)seed);
    prepare(argv[1]);
    shell(expected, sizeof(expected), "sh %s/script | grep ^state:", directory);
    loop = event_loop_create(&err);
    if (!loop)
        die(err.text);
    create_disk(MACHINE_DISK_VIRTIO);
    create_disk(MACHINE_DISK_NVME);
    test_refusals();
    test_topology();
    test_pauses(expected);
    test_hints(expected);
    test_moves("moves-while-booting", 10, 60, expected);
    test_moves("moves", 20, 300, expected);
    while (disks.count)
        block_destroy(disks.disk[--disks.count].backend);
    event_loop_destroy(loop);
    shell(none, sizeof(none), "rm -r %s", directory);
    return failures ? 1 : 0;
}
