/*
 * The machine's life, under an engine that is a list of steps instead of a processor: what the guest
 * asks for by its ports ends, resets or keeps the machine as it should.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "chardev/chardev.h"
#include "device/acpi_pm.h"
#include "machine/layout.h"
#include "machine/machine.h"
#include "state/stream.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#define DEBUG_EXIT_PORT 0xf4

enum step_kind { STEP_OUT8, STEP_OUT16, STEP_POLL8, STEP_EXIT, STEP_SPIN };

struct step {
    enum step_kind kind;
    u32 port;  /* or the exit's reason */
    u32 value; /* STEP_POLL8: until one of these bits is set */
};

/* The script of the test that runs now; the engine below plays it once per boot. */
static const struct step *script_of[4];
static atomic_uint boots;
static atomic_bool a20_open;

struct vcpu {
    struct engine *engine;
    pthread_mutex_t lock;
    pthread_cond_t wake;
    bool kicked;
    const struct step *next;
    struct cpu cpu;
};

struct engine {
    struct engine_config config;
};

static int fake_probe(struct error *err)
{
    return 0;
}

static void fake_cpuid_support(struct cpuid_support *out)
{
    memset(out, 0xff, sizeof(*out));
}

static struct engine *fake_create(const struct engine_config *config, struct error *err)
{
    struct engine *e = calloc(1, sizeof(*e));

    e->config = *config;
    return e;
}

static void fake_destroy(struct engine *e)
{
    free(e);
}

static void fake_vcpu_reset(struct vcpu *v)
{
    cpu_reset(&v->cpu, 0);
    v->next = script_of[atomic_fetch_add(&boots, 1)];
}

static struct vcpu *fake_vcpu_create(struct engine *e, unsigned index, struct error *err)
{
    struct vcpu *v = calloc(1, sizeof(*v));

    v->engine = e;
    pthread_mutex_init(&v->lock, NULL);
    pthread_cond_init(&v->wake, NULL);
    return v;
}

static void fake_vcpu_destroy(struct vcpu *v)
{
    pthread_cond_destroy(&v->wake);
    pthread_mutex_destroy(&v->lock);
    free(v);
}

static bool take_kick(struct vcpu *v, bool wait)
{
    bool kicked;

    pthread_mutex_lock(&v->lock);
    while (wait && !v->kicked)
        pthread_cond_wait(&v->wake, &v->lock);
    kicked = v->kicked;
    v->kicked = false;
    pthread_mutex_unlock(&v->lock);
    return kicked;
}

static void fake_vcpu_run(struct vcpu *v, struct vcpu_exit *exit)
{
    exit->reason = VCPU_EXIT_KICKED;
    while (!take_kick(v, false)) {
        const struct step *s = v->next;

        switch (s->kind) {
        case STEP_OUT8:
            io_bus_write(v->engine->config.ports, s->port, s->value, 1);
            break;
        case STEP_OUT16:
            io_bus_write(v->engine->config.ports, s->port, s->value, 2);
            break;
        case STEP_POLL8:
            if (!(io_bus_read(v->engine->config.ports, s->port, 1) & s->value))
                continue;
            break;
        case STEP_EXIT:
            v->next++;
            exit->reason = (enum vcpu_exit_reason)s->port;
            if (exit->reason == VCPU_EXIT_ERROR)
                error_host(&exit->error, 5, "the engine broke");
            return;
        case STEP_SPIN:
            take_kick(v, true);
            return;
        }
        v->next++;
    }
}

static void fake_vcpu_kick(struct vcpu *v)
{
    pthread_mutex_lock(&v->lock);
    v->kicked = true;
    pthread_cond_signal(&v->wake);
    pthread_mutex_unlock(&v->lock);
}

static void fake_get_state(struct vcpu *v, struct cpu *cpu, struct lapic_state *apic)
{
    *cpu = v->cpu;
    memset(apic, 0, sizeof(*apic));
}

static int fake_set_state(struct vcpu *v, const struct cpu *cpu, const struct lapic_state *apic,
                          struct error *err)
{
    v->cpu = *cpu;
    return 0;
}

static void fake_deliver_msi(struct engine *e, u64 address, u32 data)
{
}

static void fake_set_extint(struct engine *e, bool level)
{
}

static void fake_set_a20(struct engine *e, bool on)
{
    atomic_store(&a20_open, on);
}

static void fake_memory_written(struct engine *e, gpa_t gpa, u64 len)
{
}

static void fake_stats(struct engine *e, struct engine_stats *out)
{
    memset(out, 0, sizeof(*out));
}

static const struct engine_ops fake_engine = {
    .name = "fake",
    .probe = fake_probe,
    .cpuid_support = fake_cpuid_support,
    .create = fake_create,
    .destroy = fake_destroy,
    .vcpu_create = fake_vcpu_create,
    .vcpu_destroy = fake_vcpu_destroy,
    .vcpu_run = fake_vcpu_run,
    .vcpu_kick = fake_vcpu_kick,
    .vcpu_get_state = fake_get_state,
    .vcpu_set_state = fake_set_state,
    .vcpu_reset = fake_vcpu_reset,
    .deliver_msi = fake_deliver_msi,
    .set_extint = fake_set_extint,
    .set_a20 = fake_set_a20,
    .memory_written = fake_memory_written,
    .stats = fake_stats,
};

/* A multiboot image of one page: the smallest kernel that the loaders take. */
static void write_kernel(char *path)
{
    u32 image[1024] = {
        0x1badb002, 1 << 16,  -(0x1badb002U + (1 << 16)), /* magic, flags, checksum */
        0x100000,   0x100000, 0x101000,
        0x101000,   0x100000, /* header, load, load end, bss end, entry */
    };
    int fd = mkstemp(path);

    assert_true(fd >= 0);
    assert_int_equal(write(fd, image, sizeof(image)), sizeof(image));
    close(fd);
}

static struct machine *create_with(const char *kernel, u64 memory, bool no_reboot,
                                   struct chardev *serial, struct event_loop *loop)
{
    struct machine_config config = {
        .engine = &fake_engine,
        .cpu = "host",
        .memory = memory,
        .cpus = 1,
        .kernel = kernel,
        .cmdline = "",
        .serial = serial,
        .debug_exit_port = DEBUG_EXIT_PORT,
        .no_reboot = no_reboot,
    };
    struct error err = {0};
    struct machine *m = machine_create(&config, loop, &err);

    if (!m)
        fail_msg("%s", err.text);
    return m;
}

static struct machine *create(const char *kernel, u64 memory, bool no_reboot,
                              struct event_loop *loop)
{
    return create_with(kernel, memory, no_reboot, NULL, loop);
}

/* Boots a machine whose n-th boot plays the n-th script, and runs it to its end. */
static void play(const struct step *first, const struct step *second, bool no_reboot,
                 struct machine_end *end, struct machine_stats *stats)
{
    char kernel[] = "/tmp/test_machine.XXXXXX";
    struct error err = {0};
    struct event_loop *loop = event_loop_create(&err);
    struct machine *m;

    write_kernel(kernel);
    script_of[0] = first;
    script_of[1] = second;
    atomic_store(&boots, 0);
    m = create(kernel, MIB(8), no_reboot, loop);
    machine_run(m, end);
    machine_stats(m, stats);
    machine_destroy(m);
    event_loop_destroy(loop);
    unlink(kernel);
}

#define POWER_OFF_STEP                                                                             \
    {                                                                                              \
        STEP_OUT16, PORT_ACPI_PM1_CNT, 1 << 13 | ACPI_SLP_TYP_S5 << 10                             \
    }

static void test_power_off_ends_it(void **state)
{
    static const struct step script[] = {POWER_OFF_STEP, {STEP_SPIN, 0, 0}};
    struct machine_end end;
    struct machine_stats stats;

    play(script, NULL, false, &end, &stats);
    assert_int_equal(end.reason, MACHINE_END_POWER_OFF);
    assert_int_equal(stats.resets, 0);
    assert_true(stats.first_instruction_ns > 0);
}

static void test_reset_boots_again(void **state)
{
    static const struct step first[] = {{STEP_OUT8, PORT_RESET, 6}, {STEP_SPIN, 0, 0}};
    static const struct step second[] = {POWER_OFF_STEP, {STEP_SPIN, 0, 0}};
    struct machine_end end;
    struct machine_stats stats;

    play(first, second, false, &end, &stats);
    assert_int_equal(end.reason, MACHINE_END_POWER_OFF);
    assert_int_equal(stats.resets, 1);
    assert_int_equal(atomic_load(&boots), 2);
}

static void test_reset_ends_it_under_no_reboot(void **state)
{
    static const struct step script[] = {{STEP_OUT8, PORT_I8042_COMMAND, 0xfe}, {STEP_SPIN, 0, 0}};
    struct machine_end end;
    struct machine_stats stats;

    play(script, NULL, true, &end, &stats);
    assert_int_equal(end.reason, MACHINE_END_RESET);
}

static void test_triple_fault_ends_it(void **state)
{
    static const struct step script[] = {{STEP_EXIT, VCPU_EXIT_SHUTDOWN, 0}};
    struct machine_end end;
    struct machine_stats stats;

    play(script, NULL, false, &end, &stats);
    assert_int_equal(end.reason, MACHINE_END_TRIPLE_FAULT);
    assert_int_equal(stats.exits[VCPU_EXIT_SHUTDOWN], 1);
}

static void test_engine_failure_ends_it_with_its_text(void **state)
{
    static const struct step script[] = {{STEP_EXIT, VCPU_EXIT_ERROR, 0}};
    struct machine_end end;
    struct machine_stats stats;

    play(script, NULL, false, &end, &stats);
    assert_int_equal(end.reason, MACHINE_END_ERROR);
    assert_int_equal(end.error.class, ERROR_HOST);
    assert_non_null(strstr(end.error.text, "the engine broke"));
}

static void test_debug_exit_chooses_the_status(void **state)
{
    static const struct step script[] = {{STEP_OUT8, DEBUG_EXIT_PORT, 0x11}, {STEP_SPIN, 0, 0}};
    struct machine_end end;
    struct machine_stats stats;

    play(script, NULL, false, &end, &stats);
    assert_int_equal(end.reason, MACHINE_END_DEBUG_EXIT);
    assert_int_equal(end.value, 0x23);
}

static void test_hypercall_and_halt_go_on(void **state)
{
    static const struct step script[] = {{STEP_EXIT, VCPU_EXIT_HYPERCALL, 0},
                                         {STEP_EXIT, VCPU_EXIT_KICKED, 0},
                                         POWER_OFF_STEP,
                                         {STEP_EXIT, VCPU_EXIT_HALT, 0}};
    struct machine_end end;
    struct machine_stats stats;

    play(script, NULL, false, &end, &stats);
    assert_int_equal(end.reason, MACHINE_END_POWER_OFF);
    assert_int_equal(stats.exits[VCPU_EXIT_HYPERCALL], 1);
}

static void test_a20_gate_reaches_the_engine(void **state)
{
    static const struct step script[] = {
        {STEP_OUT8, PORT_I8042_COMMAND,
         0xdd}, /* one source off, and the other: only then it closes */
        {STEP_OUT8, PORT_FAST_A20, 0},
        POWER_OFF_STEP,
        {STEP_SPIN, 0, 0}};
    struct machine_end end;
    struct machine_stats stats;

    play(script, NULL, false, &end, &stats);
    assert_int_equal(end.reason, MACHINE_END_POWER_OFF);
    assert_int_equal(atomic_load(&a20_open), false);
}

static struct state_writer save(struct machine *m)
{
    struct state_writer w = {0};
    struct error err;

    if (machine_save(m, &w, &err))
        fail_msg("%s", err.text);
    return w;
}

static int load(struct machine *m, const struct state_writer *w, size_t len, struct error *err)
{
    struct state_reader r = {.data = w->data, .len = len};

    return machine_load(m, &r, err);
}

/* A machine that was changed by its guest, paused; and what it was saved as. */
struct moved {
    char kernel[32];
    struct event_loop *loop;
    struct machine *from;
    struct state_writer saved;
};

static void set_up_move(struct moved *t)
{
    /* Devices of every kind, and the A20 gate, which is closed last. */
    static const struct step script[] = {
        {STEP_OUT8, PORT_PIT_CONTROL_B, 1}, {STEP_OUT8, PORT_PIT + 3, 0x34},
        {STEP_OUT8, PORT_PIT, 0x12},        {STEP_OUT8, PORT_PIT, 0x34},
        {STEP_OUT8, PORT_PIC_MASTER, 0x11}, {STEP_OUT8, PORT_PIC_MASTER + 1, 0x20},
        {STEP_OUT8, PORT_COM1 + 4, 0x0b},   {STEP_OUT8, PORT_I8042_COMMAND, 0xdd},
        {STEP_OUT8, PORT_FAST_A20, 0},      {STEP_SPIN, 0, 0}};
    static const struct step rest[] = {POWER_OFF_STEP, {STEP_SPIN, 0, 0}};
    struct error err;

    *t = (struct moved){.kernel = "/tmp/test_machine.XXXXXX"};
    write_kernel(t->kernel);
    script_of[0] = script;
    script_of[1] = rest;
    atomic_store(&boots, 0);
    t->loop = event_loop_create(&err);
    t->from = create(t->kernel, MIB(8), false, t->loop);
    machine_start(t->from);
    while (atomic_load(&a20_open))
        usleep(1000);
    machine_pause(t->from);
    t->saved = save(t->from);
}

static void tear_down_move(struct moved *t)
{
    state_writer_free(&t->saved);
    machine_destroy(t->from);
    event_loop_destroy(t->loop);
    unlink(t->kernel);
}

static void test_state_goes_into_another_machine(void **state)
{
    struct state_writer again;
    struct machine_end end;
    struct machine *to;
    struct error err;
    struct moved t;
    char where[128];

    set_up_move(&t);
    to = create(t.kernel, MIB(8), false, t.loop);
    assert_true(atomic_load(&a20_open));
    assert_non_null(machine_compare(t.from, to, where, sizeof(where)));
    if (load(to, &t.saved, t.saved.len, &err))
        fail_msg("%s", err.text);
    if (machine_compare(t.from, to, where, sizeof(where)))
        fail_msg("%s differs", where);
    assert_false(atomic_load(&a20_open));
    again = save(to);
    assert_int_equal(again.len, t.saved.len);
    assert_memory_equal(again.data, t.saved.data, again.len);
    state_writer_free(&again);

    machine_run(to, &end);
    assert_int_equal(end.reason, MACHINE_END_POWER_OFF);
    machine_destroy(to);
    tear_down_move(&t);
}

static void test_damaged_state_ends_the_machine(void **state)
{
    struct machine_end end;
    struct machine *to;
    struct error err;
    struct moved t;

    set_up_move(&t);
    to = create(t.kernel, MIB(8), false, t.loop);
    assert_true(load(to, &t.saved, t.saved.len - 1, &err) < 0);
    assert_int_equal(err.class, ERROR_INPUT);
    machine_run(to, &end); /* no step of the guest's is played: it would power off */
    assert_int_equal(end.reason, MACHINE_END_ERROR);
    assert_string_equal(end.error.text, err.text);
    machine_destroy(to);
    tear_down_move(&t);
}

static void test_state_of_another_kind_is_refused(void **state)
{
    struct machine_end end;
    struct machine *to;
    struct error err;
    struct moved t;

    set_up_move(&t);
    to = create(t.kernel, MIB(16), false, t.loop);
    assert_true(load(to, &t.saved, t.saved.len, &err) < 0);
    assert_non_null(strstr(err.text, "bytes of memory"));
    machine_run(to, &end); /* it was left alone */
    assert_int_equal(end.reason, MACHINE_END_POWER_OFF);
    assert_true(machine_save(to, &t.saved, &err) < 0);
    machine_destroy(to);
    tear_down_move(&t);
}

static void stop_loop(void *opaque)
{
    event_loop_stop(opaque);
}

/* What was typed before the load, when nobody listened, arrives once the machine goes on. */
static void test_input_reaches_a_restored_machine(void **state)
{
    static const struct step wait[] = {
        {STEP_POLL8, PORT_COM1 + 5, 1}, POWER_OFF_STEP, {STEP_SPIN, 0, 0}};
    static const struct chardev_owner nobody = {0};
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    char directory[] = "/tmp/test_machine.XXXXXX", spec[64];
    int client = socket(AF_UNIX, SOCK_STREAM, 0);
    struct host_timer timer;
    struct chardev *console;
    struct machine_end end;
    struct machine *to;
    struct error err;
    struct moved t;

    set_up_move(&t);
    script_of[1] = wait;
    assert_non_null(mkdtemp(directory));
    snprintf(address.sun_path, sizeof(address.sun_path), "%s/console", directory);
    snprintf(spec, sizeof(spec), "socket=%s/console", directory);
    console = chardev_open(spec, t.loop, &nobody, &err);
    if (!console)
        fail_msg("%s", err.text);
    to = create_with(t.kernel, MIB(8), false, console, t.loop);
    assert_int_equal(connect(client, (struct sockaddr *)&address, sizeof(address)), 0);
    assert_int_equal(write(client, "x", 1), 1);
    timer = (struct host_timer){.fire = stop_loop, .opaque = t.loop};
    event_loop_timer_arm(t.loop, &timer, host_clock_ns() + 50000000);
    event_loop_run(t.loop);
    event_loop_timer_remove(t.loop, &timer);

    if (load(to, &t.saved, t.saved.len, &err))
        fail_msg("%s", err.text);
    machine_run(to, &end);
    assert_int_equal(end.reason, MACHINE_END_POWER_OFF);
    machine_destroy(to);
    chardev_close(console);
    close(client);
    rmdir(directory);
    tear_down_move(&t);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_power_off_ends_it),
        cmocka_unit_test(test_reset_boots_again),
        cmocka_unit_test(test_reset_ends_it_under_no_reboot),
        cmocka_unit_test(test_triple_fault_ends_it),
        cmocka_unit_test(test_engine_failure_ends_it_with_its_text),
        cmocka_unit_test(test_debug_exit_chooses_the_status),
        cmocka_unit_test(test_hypercall_and_halt_go_on),
        cmocka_unit_test(test_a20_gate_reaches_the_engine),
        cmocka_unit_test(test_state_goes_into_another_machine),
        cmocka_unit_test(test_damaged_state_ends_the_machine),
        cmocka_unit_test(test_state_of_another_kind_is_refused),
        cmocka_unit_test(test_input_reaches_a_restored_machine),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
