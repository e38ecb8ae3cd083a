#include "machine/machine.h"

#include "device/device.h"
#include "host/log.h"
#include "machine/internal.h"
#include "machine/layout.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

#define PORT_COUNT 0x10000
/*
 * Edk2 maps all that the processor can address, by pages of 2 MiB; with the 48 bits of many hosts these tables would be
 * larger than memory (OVMF 2022.11 takes no notice of that). A TiB is what QEMU's processors have, too.
 */
#define FIRMWARE_PHYS_BITS 40

static void park_all(struct machine *m)
{
    for (unsigned i = 0; i < m->ncpus; i++)
        vcpu_thread_park(&m->cpus[i]);
}

/* Wakes the loop for what was just noted. The guest must not run on past its request. */
static void notify(struct machine *m)
{
    u64 one = 1;

    park_all(m);
    /* Fails only when the counter is full, and then the loop wakes anyway. */
    if (write(m->request_fd, &one, sizeof(one)) < 0)
        log_debug("machine: the request counter is full");
}

static void request_end(struct machine *m, const struct machine_end *end)
{
    pthread_mutex_lock(&m->request_lock);
    if (m->end.reason == MACHINE_END_NONE)
        m->end = *end;
    pthread_mutex_unlock(&m->request_lock);
    notify(m);
}

static void request_reset(struct machine *m)
{
    if (m->config.no_reboot) {
        request_end(m, &(struct machine_end){.reason = MACHINE_END_RESET});
        return;
    }
    pthread_mutex_lock(&m->request_lock);
    m->reset_requested = true;
    pthread_mutex_unlock(&m->request_lock);
    notify(m);
}

/* On the thread of the vCPU that wrote a register of the board's, which goes no further until it is done. */
static void request_update(void *opaque)
{
    struct machine *m = opaque;

    pthread_mutex_lock(&m->request_lock);
    m->update_requested = true;
    pthread_mutex_unlock(&m->request_lock);
    notify(m);
}

void machine_update_memory(struct machine *m)
{
    if (board_update_memory(m->board))
        m->ops->memory_changed(m->engine);
}

static void update(struct machine *m)
{
    bool running = m->running;

    machine_pause(m);
    if (board_update(m->board))
        m->ops->memory_changed(m->engine);
    if (running)
        machine_start(m);
}

/* struct power_sink: any thread, with device locks held. */
static void power_request(void *opaque, enum power_request what, u32 value)
{
    struct machine *m = opaque;

    switch (what) {
    case POWER_OFF:
        request_end(m, &(struct machine_end){.reason = MACHINE_END_POWER_OFF});
        break;
    case POWER_RESET:
        request_reset(m);
        break;
    case POWER_DEBUG_EXIT:
        request_end(m, &(struct machine_end){.reason = MACHINE_END_DEBUG_EXIT, .value = value});
        break;
    case POWER_PAUSE:
        pthread_mutex_lock(&m->request_lock);
        m->pause_requested = true;
        pthread_mutex_unlock(&m->request_lock);
        notify(m);
        break;
    case POWER_PANICKED:
        /* What follows (a reboot, a crash kernel, a halt) is the guest's own choice. */
        log_once(LOG_WARN, "the guest tells that it panicked");
        break;
    }
}

/* On a vCPU's thread. */
static void vcpu_stopped(void *opaque, const struct vcpu_exit *exit)
{
    struct machine_end end = {.reason = MACHINE_END_TRIPLE_FAULT};

    if (exit->reason == VCPU_EXIT_ERROR) {
        end.reason = MACHINE_END_ERROR;
        end.error = exit->error;
    }
    request_end(opaque, &end);
}

static void requests_ready(void *opaque, u32 events)
{
    struct machine *m = opaque;
    struct machine_end end = {.reason = MACHINE_END_ERROR};
    bool ended, reset, pause, changed;
    u64 count;

    if (read(m->request_fd, &count, sizeof(count)) < 0)
        return;
    pthread_mutex_lock(&m->request_lock);
    ended = m->end.reason != MACHINE_END_NONE;
    reset = m->reset_requested;
    pause = m->pause_requested;
    changed = m->update_requested;
    m->reset_requested = m->pause_requested = m->update_requested = false;
    pthread_mutex_unlock(&m->request_lock);

    if (changed)
        update(m);
    if (ended)
        event_loop_stop(m->loop);
    else if (reset && machine_reset(m, &end.error))
        request_end(m, &end);
    else if (pause && m->running)
        machine_pause(m);
}

static int engine_ack_extint(void *opaque)
{
    struct machine *m = opaque;

    return board_ack_extint(m->board);
}

static void engine_eoi_broadcast(void *opaque, u8 vector)
{
    struct machine *m = opaque;

    board_eoi(m->board, vector);
}

static void memory_written(void *opaque, gpa_t gpa, u64 len)
{
    struct machine *m = opaque;

    m->ops->memory_written(m->engine, gpa, len);
}

static int create_processor_model(struct machine *m, struct error *err)
{
    unsigned max = m->ops->max_cpus ? m->ops->max_cpus() : 1;
    struct cpuid_support support = {0};

    if (m->config.cpus > max)
        return error_input(err, "--cpus: engine %s gives a machine %u at most, not %u",
                           m->ops->name, max, m->config.cpus);
    m->ops->cpuid_support(&support);
    m->cpuid = cpuid_model_create(m->config.cpu, &support, m->config.cpus, host_tsc_hz(), err);
    if (m->cpuid && (!m->config.nested || !cpuid_model_offer_nested(m->cpuid, &support, err))) {
        cpuid_model_drop_pv(m->cpuid, m->config.pv_off);
        if (m->config.topology.sockets)
            cpuid_model_set_topology(m->cpuid, &m->config.topology);
        if (m->config.firmware.what)
            cpuid_model_limit_phys_bits(m->cpuid, FIRMWARE_PHYS_BITS);
        return 0;
    }
    if (err->class == ERROR_INPUT)
        error_prefix(err, "--cpu");
    return -EINVAL;
}

static int open_firmware(struct machine *m, struct error *err)
{
    struct firmware_config config = m->config.firmware;
    int ret;

    if (!config.what)
        return 0;
    config.kernel = m->config.kernel;
    config.initrd = m->config.initrd;
    config.cmdline = m->config.cmdline;
    ret = firmware_open(&m->firmware, &config, err);
    m->firmware.smbios_config.memory = m->config.memory;
    m->firmware.smbios_config.cpus = m->config.cpus;
    return ret;
}

static int prepare_memory(struct machine *m, struct error *err)
{
    const struct memory_options *o = &m->config.memory_options;

    m->memory.options = *o;
    if (!m->ops->maps_memory && !m->config.shares_memory)
        return 0;
    if (o->hugepages || o->mergeable)
        return error_input(err, "%s: memory for engine %s%s is in a file, which can't be so",
                           o->hugepages ? "hugepages=on" : "mergeable=on", m->ops->name,
                           m->config.shares_memory ? " and vhost-user" : "");
    return memory_use_file(&m->memory, m->config.shares_memory, err);
}

static int build_memory(struct machine *m, struct error *err)
{
    const struct firmware *fw = &m->firmware;
    gpa_t rom = LAYOUT_ROM_END - fw->rom_size;
    int ret = prepare_memory(m, err);

    if (ret)
        return ret;
    if (!m->config.firmware.what)
        return memory_map_build(&m->memory, m->config.memory, err);
    ret = memory_map_build_firmware(&m->memory, m->config.memory, fw->rom_size, err);
    if (!ret && memory_write(&m->memory, rom, fw->rom, fw->rom_size) < 0)
        ret = error_host(err, EFAULT, "no place for the firmware");
    return ret;
}

static int create_buses(struct machine *m, struct error *err)
{
    int ret = build_memory(m, err);

    if (ret) {
        if (err->class == ERROR_INPUT)
            error_prefix(err, "--memory");
        return ret;
    }
    if (m->config.firmware.what)
        memory_map_e820_firmware(m->config.memory, &m->e820);
    else
        memory_map_e820(&m->memory, &m->e820);
    ret = memory_map_add_pmems(&m->memory, m->config.pmems, BIT(cpuid_model_phys_bits(m->cpuid)),
                               err);
    if (ret) {
        if (err->class == ERROR_INPUT)
            error_prefix(err, "--pmem");
        return ret;
    }
    m->ports = io_bus_create("port", PORT_COUNT, err);
    if (!m->ports)
        return -ENOMEM;
    m->mmio = io_bus_create("mmio", BIT(cpuid_model_phys_bits(m->cpuid)), err);
    return m->mmio ? 0 : -ENOMEM;
}

static int create_engine(struct machine *m, struct error *err)
{
    struct engine_config config = {
        .memory = &m->memory,
        .ports = m->ports,
        .mmio = m->mmio,
        .clock = m->clock,
        .machine = {engine_ack_extint, engine_eoi_broadcast, m},
        .cpuid = m->cpuid,
        .ncpus = m->config.cpus,
        .host_cpus = processors_usable(&m->config.pin),
        .checks = m->config.checks,
        .pv_off = m->config.pv_off,
        .perf_map = m->config.perf_map,
    };

    m->engine = m->ops->create(&config, err);
    if (!m->engine)
        return err->class == ERROR_INPUT ? -EINVAL : -EIO;
    m->memory.listener = (struct memory_listener){memory_written, m};
    return 0;
}

static void card_gone(void *opaque, unsigned slot)
{
    struct machine *m = opaque;

    m->config.card_gone(m->config.opaque, slot);
}

static int create_board(struct machine *m, struct error *err)
{
    struct board_config config = {
        .env = {.ports = m->ports,
                .mmio = m->mmio,
                .memory = &m->memory,
                .clock = m->clock,
                .loop = m->loop},
        .ops = m->ops,
        .engine = m->engine,
        .power = {power_request, m},
        .cpus = m->config.cpus,
        .cpuid = m->cpuid,
        .phys_bits = cpuid_model_phys_bits(m->cpuid),
        .e820 = &m->e820,
        .serial = m->config.serial,
        .disks = m->config.disks,
        .nets = m->config.nets,
        .pmems = m->config.pmems,
        .shares = m->config.shares,
        .consoles = m->config.consoles,
        .debug_exit_port = m->config.debug_exit_port,
        .firmware = m->config.firmware.what ? &m->firmware : NULL,
        .slots = m->config.slots,
        .update_wanted = request_update,
        .card_gone = m->config.card_gone ? card_gone : NULL,
        .opaque = m,
    };

    m->board = board_create(&config, err);
    return m->board ? 0 : -EIO;
}

static int create_cpus(struct machine *m, struct error *err)
{
    m->cpus = calloc(m->config.cpus, sizeof(*m->cpus));
    if (!m->cpus)
        return error_host(err, ENOMEM, "cannot create %u processors", m->config.cpus);
    while (m->ncpus < m->config.cpus) {
        int ret = vcpu_thread_create(&m->cpus[m->ncpus], m->ops, m->engine, m->ncpus, vcpu_stopped,
                                     m, err);

        if (ret)
            return ret;
        m->ncpus++;
        ret = processors_pin(m->cpus[m->ncpus - 1].thread, &m->config.pin, m->ncpus - 1, err);
        if (ret)
            return ret;
    }
    return 0;
}

/*
 * A direct boot skips the firmware, so the first processor is left as firmware leaves it: MTRRs on with
 * write-back as the default, the local APIC enabled with the 8259 pair behind LINT0 and NMI at LINT1
 * (MultiProcessor Specification 1.4, 3.6.2.1: virtual wire mode).
 */
static void leave_as_firmware(struct cpu *cpu, struct lapic_state *apic)
{
    cpu->msr.mtrr_def_type = 0xc06;
    apic->svr = 0x1ff;
    apic->lvt[LVT_LINT0] = 0x700;
    apic->lvt[LVT_LINT1] = 0x400;
}

/*
 * Processors reset, and what they find. Firmware starts where a processor does. In a direct boot its part is done here: tables and kernel in memory, the first
 * processor at its entry.
 */
static int load(struct machine *m, struct error *err)
{
    struct vcpu *first = m->cpus[0].vcpu;
    struct loader_request request = {
        .kernel = m->config.kernel,
        .initrd = m->config.initrd,
        .cmdline = m->config.cmdline,
        .e820 = &m->e820,
        .memory = &m->memory,
        .guest_unpacks = m->ops->native,
    };
    struct lapic_state apic;
    struct cpu cpu;
    int ret;

    for (unsigned i = 0; i < m->ncpus; i++)
        m->ops->vcpu_reset(m->cpus[i].vcpu);
    if (m->config.firmware.what) {
        board_prepare_firmware(m->board);
        machine_update_memory(m);
        return 0;
    }
    ret = board_prepare_boot(m->board, &request.rsdp, err);
    if (ret)
        return ret;
    m->ops->vcpu_get_state(first, &cpu, &apic);
    leave_as_firmware(&cpu, &apic);
    ret = loader_load(&request, &cpu, err);
    if (ret)
        return ret;
    return m->ops->vcpu_set_state(first, &cpu, &apic, err);
}

static int create_requests(struct machine *m, struct error *err)
{
    int ret;

    m->request_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (m->request_fd < 0)
        return error_host(err, errno, "cannot create an eventfd");
    m->request_watch = (struct fd_watch){
        .fd = m->request_fd, .events = EPOLLIN, .ready = requests_ready, .opaque = m};
    ret = event_loop_watch(m->loop, &m->request_watch);
    return ret ? error_host(err, -ret, "cannot watch an eventfd") : 0;
}

struct machine *machine_create(const struct machine_config *config, struct event_loop *loop,
                               struct error *err)
{
    static int (*const steps[])(struct machine * m, struct error * err) = {
        create_requests, create_processor_model, open_firmware, create_buses,
        create_engine,   create_board,           create_cpus,   load,
    };
    struct machine *m = calloc(1, sizeof(*m));

    if (!m) {
        error_host(err, ENOMEM, "cannot create the machine");
        return NULL;
    }
    m->config = *config;
    m->ops = config->engine;
    m->loop = loop;
    m->request_fd = -1;
    m->firmware.vars_fd = -1;
    pthread_mutex_init(&m->request_lock, NULL);
    m->clock = vm_clock_create(loop, err);
    if (!m->clock)
        goto fail;
    for (size_t i = 0; i < ARRAY_SIZE(steps); i++) {
        if (steps[i](m, err))
            goto fail;
    }
    return m;
fail:
    machine_destroy(m);
    return NULL;
}

void machine_destroy(struct machine *m)
{
    /* Those who act first, then those who are acted upon. */
    while (m->ncpus)
        vcpu_thread_destroy(&m->cpus[--m->ncpus]);
    free(m->cpus);
    if (m->board)
        board_destroy(m->board);
    m->memory.listener = (struct memory_listener){0};
    if (m->engine)
        m->ops->destroy(m->engine);
    if (m->mmio)
        io_bus_destroy(m->mmio);
    if (m->ports)
        io_bus_destroy(m->ports);
    memory_destroy(&m->memory);
    if (m->config.firmware.what)
        firmware_close(&m->firmware);
    if (m->cpuid)
        cpuid_model_destroy(m->cpuid);
    if (m->clock)
        vm_clock_destroy(m->clock);
    if (m->request_fd >= 0) {
        event_loop_unwatch(m->loop, &m->request_watch);
        close(m->request_fd);
    }
    pthread_mutex_destroy(&m->request_lock);
    free(m);
}

bool machine_has_request(struct machine *m)
{
    bool requested;

    pthread_mutex_lock(&m->request_lock);
    requested = m->end.reason != MACHINE_END_NONE || m->reset_requested || m->update_requested;
    pthread_mutex_unlock(&m->request_lock);
    return requested;
}

void machine_fail(struct machine *m, const struct error *err)
{
    request_end(m, &(struct machine_end){.reason = MACHINE_END_ERROR, .error = *err});
}

static bool has_ended(struct machine *m)
{
    bool ended;

    pthread_mutex_lock(&m->request_lock);
    ended = m->end.reason != MACHINE_END_NONE;
    pthread_mutex_unlock(&m->request_lock);
    return ended;
}

static u64 process_cpu_ns(void)
{
    struct timespec ts;

    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &ts);
    return (u64)ts.tv_sec * NS_PER_SEC + (u64)ts.tv_nsec;
}

void machine_start(struct machine *m)
{
    if (m->running || has_ended(m))
        return;
    m->running = true;
    board_start(m->board);
    vm_clock_start(m->clock);
    if (!m->started_cpu_ns)
        m->started_cpu_ns = process_cpu_ns();
    for (unsigned i = 0; i < m->ncpus; i++)
        vcpu_thread_resume(&m->cpus[i]);
}

void machine_pause(struct machine *m)
{
    park_all(m);
    for (unsigned i = 0; i < m->ncpus; i++)
        vcpu_thread_wait_parked(&m->cpus[i]);
    board_stop(m->board);
    vm_clock_stop(m->clock);
    m->running = false;
}

int machine_reset(struct machine *m, struct error *err)
{
    bool running = m->running;
    int ret;

    machine_pause(m);
    board_reset(m->board);
    ret = load(m, err);
    if (ret)
        return ret;
    m->resets++;
    if (running)
        machine_start(m);
    return 0;
}

int machine_plug_disk(struct machine *m, unsigned slot, const struct machine_disk *disk,
                      struct error *err)
{
    int ret = board_plug_disk(m->board, slot, disk, err);

    if (!ret && !m->running)
        board_stop(m->board);
    return ret;
}

int machine_plug_net(struct machine *m, unsigned slot, struct net_backend *net, struct error *err)
{
    int ret = board_plug_net(m->board, slot, net, err);

    if (!ret && !m->running)
        board_stop(m->board);
    return ret;
}

int machine_unplug(struct machine *m, unsigned slot, bool force, struct error *err)
{
    bool running = m->running;
    int ret;

    if (!force)
        return board_unplug(m->board, slot, false, err);
    machine_pause(m);
    ret = board_unplug(m->board, slot, true, err);
    if (running)
        machine_start(m);
    return ret;
}

struct vga *machine_vga(struct machine *m)
{
    return board_vga(m->board);
}

struct i8042 *machine_keyboard(struct machine *m)
{
    return board_keyboard(m->board);
}

struct virtio_balloon *machine_balloon(struct machine *m)
{
    return board_balloon(m->board);
}

void machine_quit(struct machine *m)
{
    request_end(m, &(struct machine_end){.reason = MACHINE_END_QUIT});
}

void machine_run(struct machine *m, struct machine_end *end)
{
    machine_start(m);
    event_loop_run(m->loop);
    machine_pause(m);
    pthread_mutex_lock(&m->request_lock);
    *end = m->end;
    pthread_mutex_unlock(&m->request_lock);
}

void machine_stats(struct machine *m, struct machine_stats *out)
{
    *out = (struct machine_stats){.resets = m->resets,
                                  .first_instruction_cpu_ns = m->started_cpu_ns,
                                  .guest_resident = memory_resident(&m->memory)};
    for (unsigned i = 0; i < m->ncpus; i++) {
        u64 started = m->cpus[i].started_ns;

        if (started && (!out->first_instruction_ns || started < out->first_instruction_ns))
            out->first_instruction_ns = started;
        for (unsigned r = 0; r < VCPU_EXIT_REASONS; r++)
            out->exits[r] += m->cpus[i].exits[r];
    }
    m->ops->stats(m->engine, &out->engine);
}
