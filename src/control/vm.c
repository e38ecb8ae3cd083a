#include "control/vm.h"

#include "block/block.h"
#include "chardev/chardev.h"
#include "control/cards.h"
#include "control/control.h"
#include "control/screenshot.h"
#include "control/stats.h"
#include "control/vnc.h"
#include "engine/engine.h"
#include "engine/perf_map.h"
#include "host/cgroup.h"
#include "host/event_loop.h"
#include "host/log.h"
#include "machine/machine.h"
#include "net/net.h"
#include "net/vsock.h"
#include "share/share.h"

#include <errno.h>
#include <signal.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/signalfd.h>
#include <sys/stat.h>
#include <unistd.h>

struct vm {
    const struct vm_config *config;
    u64 begin_ns;
    const struct engine_ops *engine;
    struct engine_checks checks;
    struct perf_map *perf_map;
    struct cgroup *cgroup; /* for --weight and --cap, or NULL */
    struct event_loop *loop;
    struct chardev *serial;
    struct machine_disks disks;
    struct machine_nets nets;
    struct machine_pmems pmems;
    struct machine_shares shares;
    struct machine_consoles consoles;
    struct control *control; /* NULL: none */
    FILE *stats;
    int signal_fd;
    struct fd_watch signal_watch;
    char vars[VM_PATH_MAX + 8]; /* see choose_vars */
    struct machine *machine;    /* NULL until it is created */
    struct vnc *vnc;
};

/* On the loop's thread, so there is a machine: the loop runs within machine_run only. */
static void vm_quit(void *opaque)
{
    struct vm *vm = opaque;

    machine_quit(vm->machine);
}

static int write_screenshots(struct vm *vm, struct error *err)
{
    struct vga *vga = machine_vga(vm->machine);
    int ret = 0;

    for (unsigned i = 0; vga && !ret && i < vm->config->nscreenshots; i++)
        ret = screenshot_write(vga, vm->config->screenshots[i], err);
    if (ret)
        error_prefix(err, "--screenshot");
    return ret;
}

static void take_screenshots(struct vm *vm)
{
    struct error err;

    if (write_screenshots(vm, &err))
        log_error("%s", err.text);
}

static void signal_ready(void *opaque, u32 events)
{
    struct vm *vm = opaque;
    struct signalfd_siginfo info;

    if (read(vm->signal_fd, &info, sizeof(info)) != (ssize_t)sizeof(info))
        return;
    if (info.ssi_signo == SIGUSR1) {
        take_screenshots(vm);
    } else if (info.ssi_signo == SIGCONT) {
        machine_start(vm->machine); /* it may be paused (werror=stop) */
    } else {
        log_info("ending on signal %u (%s)", info.ssi_signo, strsignal((int)info.ssi_signo));
        vm_quit(vm);
    }
}

/*
 * Signals that end the VM, or let it go on, come through the loop. They are blocked in every thread made after this, so
 * it runs before there is another.
 */
static int open_signals(struct vm *vm, struct error *err)
{
    sigset_t set;
    int ret;

    signal(SIGPIPE, SIG_IGN);
    sigemptyset(&set);
    sigaddset(&set, SIGINT);
    sigaddset(&set, SIGTERM);
    sigaddset(&set, SIGHUP);
    sigaddset(&set, SIGUSR1);
    sigaddset(&set, SIGCONT);
    pthread_sigmask(SIG_BLOCK, &set, NULL);
    vm->signal_fd = signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK);
    if (vm->signal_fd < 0)
        return error_host(err, errno, "cannot create a signalfd");
    vm->signal_watch = (struct fd_watch){
        .fd = vm->signal_fd, .events = EPOLLIN, .ready = signal_ready, .opaque = vm};
    ret = event_loop_watch(vm->loop, &vm->signal_watch);
    return ret ? error_host(err, -ret, "cannot watch a signalfd") : 0;
}

static int enter_cgroup(struct vm *vm, struct error *err)
{
    const struct vm_config *c = vm->config;

    if (!c->weight && !c->cap)
        return 0;
    vm->cgroup = cgroup_enter(c->weight, c->cap, err);
    if (vm->cgroup)
        return 0;
    error_prefix(err, "%s", c->weight ? "--weight" : "--cap");
    return -EIO;
}

static int open_loop(struct vm *vm, struct error *err)
{
    vm->loop = event_loop_create(err);
    return vm->loop ? 0 : -EIO;
}

static int choose_engine(struct vm *vm, struct error *err)
{
    vm->engine = engine_choose(vm->config->engine, &vm->checks, err);
    if (vm->engine)
        return 0;
    if (err->class == ERROR_INPUT)
        error_prefix(err, "--engine");
    return -EINVAL;
}

/* Before the VM runs: a path that can't be written is told now, not after an hour. */
static int open_stats(struct vm *vm, struct error *err)
{
    const char *path = vm->config->stats;

    if (!path)
        return 0;
    vm->stats = fopen(path, "we");
    return vm->stats ? 0 : error_input(err, "--stats: %s: %s", path, strerror(errno));
}

static int open_perf_map(struct vm *vm, struct error *err)
{
    const char *symbols = vm->config->perf_map;

    if (!symbols)
        return 0;
    if (vm->engine != &engine_bt)
        return error_input(err, "--perf-map: the engine %s makes no code: give --engine bt",
                           vm->engine->name);
    vm->perf_map = perf_map_create(symbols, err);
    if (vm->perf_map)
        return 0;
    error_prefix(err, "--perf-map");
    return -EIO;
}

static int open_serial(struct vm *vm, struct error *err)
{
    struct chardev_owner owner = {vm_quit, vm};

    vm->serial = chardev_open(vm->config->serial, vm->loop, &owner, err);
    if (vm->serial)
        return 0;
    if (err->class == ERROR_INPUT)
        error_prefix(err, "--serial");
    return -EIO;
}

static int open_disks(struct vm *vm, struct error *err)
{
    for (unsigned i = 0; i < vm->config->ndisks; i++) {
        if (cards_open_disk(&vm->config->disks[i], vm->loop, &vm->disks.disk[i], err)) {
            if (err->class == ERROR_INPUT)
                error_prefix(err, vm->config->disks[i].cdrom ? "--cdrom" : "--disk");
            return -EIO;
        }
        vm->disks.count++;
    }
    return 0;
}

static int open_pmems(struct vm *vm, struct error *err)
{
    while (vm->pmems.count < vm->config->npmems) {
        struct block_backend *backend =
            cards_open_pmem(&vm->config->pmems[vm->pmems.count], vm->loop, err);

        if (!backend) {
            if (err->class == ERROR_INPUT)
                error_prefix(err, "--pmem");
            return -EIO;
        }
        vm->pmems.backend[vm->pmems.count++] = backend;
    }
    return 0;
}

static int open_nets(struct vm *vm, struct error *err)
{
    const struct vm_config *c = vm->config;

    while (vm->nets.count < c->nnets) {
        struct net_backend *net =
            cards_open_net(c->nets[vm->nets.count], c->name, vm->nets.count, vm->loop, err);

        if (!net) {
            if (err->class == ERROR_INPUT)
                error_prefix(err, "--net");
            return -EIO;
        }
        vm->nets.backend[vm->nets.count++] = net;
    }
    return 0;
}

static int open_consoles(struct vm *vm, struct error *err)
{
    struct chardev_owner owner = {vm_quit, vm};

    for (unsigned i = 0; i < vm->config->nconsoles; i++) {
        const struct vm_console *c = &vm->config->consoles[i];

        vm->consoles.port[i].chr = chardev_open(c->where, vm->loop, &owner, err);
        if (!vm->consoles.port[i].chr) {
            if (err->class == ERROR_INPUT)
                error_prefix(err, "--console");
            return -EIO;
        }
        vm->consoles.port[i].name = c->name[0] ? c->name : NULL;
        vm->consoles.count++;
    }
    return 0;
}

static int open_vsock(struct vm *vm, struct error *err)
{
    if (!vm->config->vsock)
        return 0;
    vm->nets.vsock = vsock_open(vm->config->vsock, vm->loop, err);
    if (vm->nets.vsock)
        return 0;
    if (err->class == ERROR_INPUT)
        error_prefix(err, "--vsock");
    return -EIO;
}

static int open_shares(struct vm *vm, struct error *err)
{
    while (vm->shares.count < vm->config->nshares) {
        const struct vm_share *s = &vm->config->shares[vm->shares.count];
        struct share_config config = {.path = s->path, .read_only = s->read_only};
        struct machine_share *out = &vm->shares.dir[vm->shares.count];

        if (s->vhost_user)
            out->vhost_user = s->path;
        else
            out->share = share_open(&config, err);
        if (!out->share && !out->vhost_user) {
            if (err->class == ERROR_INPUT)
                error_prefix(err, "--share");
            return -EIO;
        }
        out->tag = s->tag;
        vm->shares.count++;
    }
    return 0;
}

static int open_control(struct vm *vm, struct error *err)
{
    if (!vm->config->control)
        return 0;
    vm->control = control_open(vm->config, vm->loop, err);
    if (vm->control)
        return 0;
    if (err->class == ERROR_INPUT)
        error_prefix(err, "--control");
    return -EIO;
}

/*
 * The file of UEFI's variables: what the user says, else one beside the first disk that the guest may write, as they tell
 * where on it the system's loader is. NULL: they are forgotten.
 */
static const char *choose_vars(struct vm *vm)
{
    const struct vm_config *c = vm->config;
    struct stat st;

    if (!c->firmware.what || strcmp(c->firmware.what, "uefi"))
        return c->firmware.vars;
    if (c->firmware.vars)
        return strcmp(c->firmware.vars, "none") ? c->firmware.vars : NULL;
    for (unsigned i = 0; i < c->ndisks; i++) {
        const struct vm_disk *d = &c->disks[i];

        if (d->read_only || stat(d->path, &st) || !S_ISREG(st.st_mode))
            continue;
        snprintf(vm->vars, sizeof(vm->vars), "%s.vars", d->path);
        return vm->vars;
    }
    return NULL;
}

/* Whether a device's backend is another process, which gets the guest's memory. */
static bool has_vhost_user(const struct vm *vm)
{
    bool any = false;

    for (unsigned i = 0; i < vm->disks.count; i++)
        any |= vm->disks.disk[i].vhost_user != NULL;
    for (unsigned i = 0; i < vm->nets.count; i++)
        any |= net_vhost_user_path(vm->nets.backend[i]) != NULL;
    for (unsigned i = 0; i < vm->shares.count; i++)
        any |= vm->shares.dir[i].vhost_user != NULL;
    return any;
}

static int create_machine(struct vm *vm, struct error *err)
{
    const struct vm_config *c = vm->config;
    struct machine_config config = {
        .engine = vm->engine,
        .checks = vm->checks,
        .perf_map = vm->perf_map,
        .cpu = c->cpu,
        .nested = c->nested,
        .memory = c->memory,
        .memory_options = c->memory_options,
        .cpus = c->cpus,
        .pin = c->pin,
        .topology = c->topology,
        .pv_off = c->pv_off,
        .kernel = c->kernel,
        .initrd = c->initrd,
        .cmdline = c->append,
        .firmware = c->firmware,
        .serial = vm->serial,
        .disks = &vm->disks,
        .nets = &vm->nets,
        .pmems = &vm->pmems,
        .shares = &vm->shares,
        .shares_memory = has_vhost_user(vm),
        .consoles = &vm->consoles,
        .debug_exit_port = c->debug_exit_port,
        .no_reboot = c->no_reboot,
        .slots = c->slots,
        .card_gone = control_card_gone,
        .opaque = vm->control,
    };

    config.firmware.vars = choose_vars(vm);
    vm->machine = machine_create(&config, vm->loop, err);
    if (!vm->machine)
        return -EIO;
    if (vm->control)
        control_attach(vm->control, vm->machine);
    return 0;
}

static int open_vnc(struct vm *vm, struct error *err)
{
    const struct vm_config *c = vm->config;

    if (!c->vnc)
        return 0;
    vm->vnc = vnc_open(c->vnc, c->vnc_password, machine_vga(vm->machine),
                       machine_keyboard(vm->machine), err);
    if (vm->vnc)
        return 0;
    if (err->class == ERROR_INPUT)
        error_prefix(err, "--vnc");
    return -EIO;
}

static int status_of(const struct machine_end *end)
{
    switch (end->reason) {
    case MACHINE_END_POWER_OFF:
    case MACHINE_END_QUIT:
        return VM_STATUS_POWER_OFF;
    case MACHINE_END_RESET:
    case MACHINE_END_TRIPLE_FAULT:
        return VM_STATUS_GUEST_RESET;
    case MACHINE_END_DEBUG_EXIT:
        return (int)(end->value & 0xff);
    case MACHINE_END_ERROR:
    case MACHINE_END_NONE:
        break;
    }
    return end->error.class == ERROR_INPUT ? VM_STATUS_BAD_INPUT : VM_STATUS_HOST_FAILURE;
}

static int write_stats(struct vm *vm, int status, struct error *err)
{
    struct vm_stats stats = {
        .name = vm->config->name,
        .engine = vm->engine->name,
        .begin_ns = vm->begin_ns,
        .end_ns = host_clock_ns(),
        .status = status,
    };

    if (!vm->stats)
        return 0;
    machine_stats(vm->machine, &stats.machine);
    return stats_write(&stats, vm->stats, vm->config->stats, err);
}

static void close_all(struct vm *vm)
{
    vnc_close(vm->vnc);
    if (vm->machine && vm->control)
        control_detach(vm->control);
    if (vm->machine)
        machine_destroy(vm->machine);
    control_close(vm->control);
    perf_map_destroy(vm->perf_map);
    while (vm->disks.count)
        block_destroy(vm->disks.disk[--vm->disks.count].backend);
    while (vm->pmems.count)
        block_destroy(vm->pmems.backend[--vm->pmems.count]);
    while (vm->shares.count)
        share_close(vm->shares.dir[--vm->shares.count].share);
    vsock_close(vm->nets.vsock);
    while (vm->nets.count)
        net_close(vm->nets.backend[--vm->nets.count]);
    while (vm->consoles.count)
        chardev_close(vm->consoles.port[--vm->consoles.count].chr);
    chardev_close(vm->serial);
    if (vm->stats)
        fclose(vm->stats);
    if (vm->signal_fd >= 0) {
        event_loop_unwatch(vm->loop, &vm->signal_watch);
        close(vm->signal_fd);
    }
    if (vm->loop)
        event_loop_destroy(vm->loop);
    cgroup_leave(vm->cgroup);
}

int vm_run(const struct vm_config *config)
{
    static int (*const steps[])(struct vm * vm, struct error * err) = {
        enter_cgroup, choose_engine, open_loop,      open_signals, open_stats,  open_perf_map,
        open_disks,   open_nets,     open_vsock,     open_shares,  open_serial, open_consoles,
        open_pmems,   open_control,  create_machine, open_vnc,
    };
    struct vm vm = {.config = config, .begin_ns = host_clock_ns(), .signal_fd = -1};
    struct machine_end end = {.reason = MACHINE_END_NONE};
    int status;

    for (size_t i = 0; i < ARRAY_SIZE(steps); i++) {
        if (steps[i](&vm, &end.error))
            goto out;
    }
    machine_run(vm.machine, &end);
    if (end.reason == MACHINE_END_TRIPLE_FAULT)
        log_info("the guest shut itself down by a triple fault");
    if (write_screenshots(&vm, &end.error))
        end.reason = MACHINE_END_ERROR;
    if (write_stats(&vm, status_of(&end), &end.error))
        end.reason = MACHINE_END_ERROR;
out:
    status = status_of(&end);
    /* After the terminal is itself again. */
    close_all(&vm);
    if (end.error.class != ERROR_NONE)
        log_error("%s", end.error.text);
    return status;
}
