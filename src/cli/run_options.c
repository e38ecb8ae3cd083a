#include "cli/run.h"

#include "cli/parse.h"
#include "control/screenshot.h"
#include "host/cgroup.h"
#include "machine/cards.h"

#include <ctype.h>
#include <string.h>

#define DEFAULT_MEMORY MIB(512)

struct option {
    const char *name;
    const char
        *value; /* what the value is, for the help; NULL: takes none; "[=...": may be left out */
    const char *help;
    int (*set)(struct vm_config *config, const char *value, struct error *err);
};

static int set_name(struct vm_config *config, const char *value, struct error *err)
{
    config->name = value;
    return parse_name(value, err);
}

static int set_engine(struct vm_config *config, const char *value, struct error *err)
{
    config->engine = value;
    return 0;
}

static int parse_choice(const char *key, const char *value, const char *yes, const char *no,
                        bool *out, struct error *err)
{
    *out = !strcmp(value, yes);
    if (*out || !strcmp(value, no))
        return 0;
    return error_input(err, "%s=%s: give %s or %s", key, value, yes, no);
}

static int set_cpu(struct vm_config *config, const char *value, struct error *err)
{
    char key[16], option[8];
    const char *options;
    int ret = parse_file_options(value, config->cpu, sizeof(config->cpu), &options, err);

    if (ret)
        return error_input(err, "'%s' is no CPU model: give host, v2 or v3", value);
    while (!ret &&
           (ret = parse_next_option(&options, key, sizeof(key), option, sizeof(option), err)) > 0) {
        if (strcmp(key, "nested"))
            return error_input(err, "unknown option '%s': give nested=on", key);
        ret = parse_choice(key, option, "on", "off", &config->nested, err);
    }
    return ret;
}

static int set_memory_option(struct memory_options *o, const char *key, const char *value,
                             struct error *err)
{
    if (!strcmp(key, "hugepages"))
        return parse_choice(key, value, "on", "off", &o->hugepages, err);
    if (!strcmp(key, "mergeable"))
        return parse_choice(key, value, "on", "off", &o->mergeable, err);
    if (!strcmp(key, "locked"))
        return parse_choice(key, value, "on", "off", &o->locked, err);
    return error_input(err, "unknown option '%s': give hugepages, locked or mergeable", key);
}

static int set_memory(struct vm_config *config, const char *value, struct error *err)
{
    const char *options = strchr(value, ',');
    char size[24], key[16], option[8];
    size_t len = options ? (size_t)(options++ - value) : strlen(value);
    int ret;

    if (len >= sizeof(size))
        return error_input(err, "'%s' is not a size: give one such as 512M or 2G", value);
    memcpy(size, value, len);
    size[len] = '\0';
    ret = parse_size(size, &config->memory, err);
    while (!ret &&
           (ret = parse_next_option(&options, key, sizeof(key), option, sizeof(option), err)) > 0)
        ret = set_memory_option(&config->memory_options, key, option, err);
    return ret;
}

static int set_cpus(struct vm_config *config, const char *value, struct error *err)
{
    return parse_cpus(value, &config->cpus, &config->topology, err);
}

static int set_pin(struct vm_config *config, const char *value, struct error *err)
{
    return parse_processors(value, &config->pin, err);
}

/* A whole number of those that the config has room for. */
static int parse_count(const char *text, unsigned least, unsigned most, unsigned *count,
                       struct error *err)
{
    u64 number;
    int ret = parse_number(text, least, most, &number, err);

    if (!ret)
        *count = (unsigned)number;
    return ret;
}

static int set_weight(struct vm_config *config, const char *value, struct error *err)
{
    return parse_count(value, 1, CGROUP_WEIGHT_MAX, &config->weight, err);
}

/* In hundredths of a processor, with "%" or without. */
static int set_cap(struct vm_config *config, const char *value, struct error *err)
{
    size_t len = strlen(value);
    char number[16];

    if (len && value[len - 1] == '%')
        len--;
    if (len >= sizeof(number))
        return error_input(err, "'%s': give a share of processors such as 150%%", value);
    memcpy(number, value, len);
    number[len] = '\0';
    return parse_count(number, 1, PROCESSOR_LIST_MAX * 100, &config->cap, err);
}

static int set_no_pv(struct vm_config *config, const char *value, struct error *err)
{
    return parse_pv_features(value, &config->pv_off, err);
}

static int set_path(const char **path, const char *value, struct error *err)
{
    if (!*value)
        return error_input(err, "the file name is empty");
    *path = value;
    return 0;
}

static int set_kernel(struct vm_config *config, const char *value, struct error *err)
{
    return set_path(&config->kernel, value, err);
}

static int set_initrd(struct vm_config *config, const char *value, struct error *err)
{
    return set_path(&config->initrd, value, err);
}

static int set_append(struct vm_config *config, const char *value, struct error *err)
{
    config->append = value;
    return 0;
}

/* WHAT[,OPTION=FILE], of which *file is left alone when the option is. */
static int parse_what_and_file(const char *value, char what[VM_PATH_MAX], const char *option,
                               char text[VM_PATH_MAX], const char **file, struct error *err)
{
    char key[16];
    const char *options;
    int ret = parse_file_options(value, what, VM_PATH_MAX, &options, err);

    while (!ret &&
           (ret = parse_next_option(&options, key, sizeof(key), text, VM_PATH_MAX, err)) > 0) {
        if (strcmp(key, option) || !*text)
            return error_input(err, "unknown option '%s': give %s=FILE", key, option);
        *file = text;
        ret = 0;
    }
    return ret;
}

static int set_firmware(struct vm_config *config, const char *value, struct error *err)
{
    config->firmware.what = config->firmware_what;
    return parse_what_and_file(value, config->firmware_what, "vars", config->firmware_vars,
                               &config->firmware.vars, err);
}

static int parse_bus(const char *value, enum machine_disk_bus *bus, struct error *err)
{
    static const char *const names[] = {
        [MACHINE_DISK_VIRTIO] = "virtio", [MACHINE_DISK_IDE] = "ide", [MACHINE_DISK_NVME] = "nvme"};

    for (unsigned i = 0; i < ARRAY_SIZE(names); i++) {
        if (!strcmp(value, names[i])) {
            *bus = i;
            return 0;
        }
    }
    return error_input(err, "bus=%s: give virtio, nvme or ide", value);
}

static int set_disk_option(struct vm_disk *d, const char *key, const char *value, struct error *err)
{
    bool qcow2;

    if (!strcmp(key, "readonly"))
        return parse_choice(key, value, "on", "off", &d->read_only, err);
    if (!strcmp(key, "bus"))
        return parse_bus(value, &d->bus, err);
    if (!strcmp(key, "werror"))
        return parse_choice(key, value, "stop", "report", &d->stop_on_error, err);
    if (!strcmp(key, "format")) {
        strcpy(d->format, strlen(value) < sizeof(d->format) ? value : "?");
        return parse_choice(key, value, "qcow2", "raw", &qcow2, err);
    }
    if (strcmp(key, "serial"))
        return error_input(err, "unknown option '%s': give bus, format, readonly, serial or werror",
                           key);
    if (strlen(value) >= sizeof(d->serial))
        return error_input(err, "serial=%s: give 20 characters at most", value);
    strcpy(d->serial, value);
    return 0;
}

/* "vhost-user=PATH" in place of a file: leaves PATH. */
static bool take_vhost_user(char *path)
{
    static const char prefix[] = "vhost-user=";
    size_t len = sizeof(prefix) - 1;

    if (strncmp(path, prefix, len) != 0 || !path[len])
        return false;
    memmove(path, path + len, strlen(path + len) + 1);
    return true;
}

static int parse_disk(const char *value, struct vm_disk *d, struct error *err)
{
    char key[16], option[64];
    const char *options;
    int ret;

    *d = (struct vm_disk){0};
    ret = parse_file_options(value, d->path, sizeof(d->path), &options, err);
    if (ret)
        return ret;
    d->vhost_user = take_vhost_user(d->path);
    if (d->vhost_user && options)
        return error_input(err, "a disk of another process has no options here");
    while ((ret = parse_next_option(&options, key, sizeof(key), option, sizeof(option), err)) > 0) {
        ret = set_disk_option(d, key, option, err);
        if (ret)
            return ret;
    }
    return ret;
}

static int set_disk(struct vm_config *config, const char *value, struct error *err)
{
    int ret;

    if (config->ndisks == VM_DISKS_MAX)
        return error_input(err, "a machine has %d disks at most", VM_DISKS_MAX);
    ret = parse_disk(value, &config->disks[config->ndisks], err);
    config->ndisks += ret == 0;
    return ret;
}

static int set_cdrom(struct vm_config *config, const char *value, struct error *err)
{
    struct vm_disk *d = &config->disks[config->ndisks];
    const char *options;
    int ret;

    if (config->ndisks == VM_DISKS_MAX)
        return error_input(err, "a machine has %d disks at most", VM_DISKS_MAX);
    *d = (struct vm_disk){
        .format = "raw", .read_only = true, .bus = MACHINE_DISK_IDE, .cdrom = true};
    ret = parse_file_options(value, d->path, sizeof(d->path), &options, err);
    if (!ret && options)
        ret = error_input(err, "a CD-ROM has no options: \",,\" is a comma in the file's name");
    config->ndisks += ret == 0;
    return ret;
}

/* 8-4-4-4-12 hexadecimal digits. */
static int set_uuid(struct vm_config *config, const char *value, struct error *err)
{
    static const char form[] = "xxxxxxxx-xxxx-xxxx-xxxx-xxxxxxxxxxxx";
    unsigned n = 0;

    for (size_t i = 0; i < sizeof(form); i++) {
        char c = value[i];
        bool fits = form[i] == 'x' ? isxdigit((unsigned char)c) != 0 : c == form[i];

        if (!fits)
            return error_input(err, "'%s' is no UUID: give one as uuidgen prints it", value);
        if (form[i] != 'x')
            continue;
        c = (char)(c <= '9' ? c - '0' : (c | 0x20) - 'a' + 10);
        config->firmware.uuid[n / 2] = (u8)(config->firmware.uuid[n / 2] << 4 | c);
        n++;
    }
    config->firmware.has_uuid = true;
    return 0;
}

/* What SMBIOS says of the machine: printable, as it ends up in menus and file names. */
static int set_smbios_text(const char **out, const char *value, struct error *err)
{
    size_t len = strlen(value);

    if (len < 1 || len > 64)
        return error_input(err, "give 1 to 64 characters");
    for (size_t i = 0; i < len; i++) {
        if (!isprint((unsigned char)value[i]))
            return error_input(err, "give printable ASCII characters");
    }
    *out = value;
    return 0;
}

static int set_product(struct vm_config *config, const char *value, struct error *err)
{
    return set_smbios_text(&config->firmware.product, value, err);
}

static int set_machine_serial(struct vm_config *config, const char *value, struct error *err)
{
    return set_smbios_text(&config->firmware.serial, value, err);
}

static int set_boot(struct vm_config *config, const char *value, struct error *err)
{
    static const char *const names[] = {"disk", "cdrom", "network"}; /* enum firmware_boot */

    for (unsigned i = 0; i < ARRAY_SIZE(names); i++) {
        if (!strcmp(value, names[i])) {
            config->firmware.boot_first = (enum firmware_boot)i;
            return 0;
        }
    }
    return error_input(err, "'%s': give disk, cdrom or network", value);
}

/* The one option that some have, and without a value. */
static int check_readonly(const char *options, struct error *err)
{
    return strcmp(options, "readonly") == 0
               ? 0
               : error_input(err, "unknown option '%s': give readonly or none", options);
}

static int set_console(struct vm_config *config, const char *value, struct error *err)
{
    struct vm_console *c = &config->consoles[config->nconsoles];
    char key[16], option[sizeof(c->name)];
    const char *options;
    int ret;

    if (config->nconsoles == VM_CONSOLES_MAX)
        return error_input(err, "a machine has %d console ports at most", VM_CONSOLES_MAX);
    *c = (struct vm_console){0};
    ret = parse_file_options(value, c->where, sizeof(c->where), &options, err);
    if (ret)
        return ret;
    while ((ret = parse_next_option(&options, key, sizeof(key), option, sizeof(option), err)) > 0) {
        if (strcmp(key, "name"))
            return error_input(err, "unknown option '%s': give name", key);
        ret = parse_name(option, err);
        if (ret)
            return ret;
        strcpy(c->name, option);
    }
    config->nconsoles += ret == 0;
    return ret;
}

static int set_pmem(struct vm_config *config, const char *value, struct error *err)
{
    struct vm_pmem *p = &config->pmems[config->npmems];
    const char *options;
    int ret;

    if (config->npmems == VM_PMEMS_MAX)
        return error_input(err, "a machine has %d files as memory at most", VM_PMEMS_MAX);
    ret = parse_file_options(value, p->path, sizeof(p->path), &options, err);
    if (ret)
        return ret;
    p->read_only = options != NULL;
    config->npmems++;
    return options ? check_readonly(options, err) : 0;
}

static int set_net(struct vm_config *config, const char *value, struct error *err)
{
    if (config->nnets == VM_NETS_MAX)
        return error_input(err, "a machine has %d network cards at most", VM_NETS_MAX);
    config->nets[config->nnets++] = value;
    return 0;
}

static int set_vsock(struct vm_config *config, const char *value, struct error *err)
{
    config->vsock = value;
    return 0;
}

/* DIR:TAG[,readonly]; DIR may hold colons, a tag doesn't. */
static int set_share(struct vm_config *config, const char *value, struct error *err)
{
    struct vm_share *s = &config->shares[config->nshares];
    const char *options;
    char *colon;
    int ret;

    if (config->nshares == VM_SHARES_MAX)
        return error_input(err, "a machine has %d shared directories at most", VM_SHARES_MAX);
    *s = (struct vm_share){0};
    ret = parse_file_options(value, s->path, sizeof(s->path), &options, err);
    if (ret)
        return ret;
    colon = strrchr(s->path, ':');
    if (!colon || colon == s->path || !colon[1] || strlen(colon + 1) > VM_SHARE_TAG_MAX)
        return error_input(err, "'%s': give DIR:TAG, a TAG of 1 to %d characters", value,
                           VM_SHARE_TAG_MAX);
    strcpy(s->tag, colon + 1);
    *colon = '\0';
    s->read_only = options != NULL;
    s->vhost_user = take_vhost_user(s->path);
    if (s->vhost_user && s->read_only)
        return error_input(err, "readonly is for the process that serves the directory to know");
    config->nshares++;
    return options ? check_readonly(options, err) : 0;
}

static int set_serial(struct vm_config *config, const char *value, struct error *err)
{
    return set_path(&config->serial, value, err);
}

static int set_debug_exit(struct vm_config *config, const char *value, struct error *err)
{
    u64 port;
    int ret = parse_number(value, 1, 0xffff, &port, err);

    if (!ret)
        config->debug_exit_port = (u16)port;
    return ret;
}

static int set_control(struct vm_config *config, const char *value, struct error *err)
{
    config->control = value;
    return strncmp(value, "socket=", 7) ? error_input(err, "'%s': give socket=PATH", value) : 0;
}

static int set_slots(struct vm_config *config, const char *value, struct error *err)
{
    return parse_count(value, 0, MACHINE_SLOTS_MAX, &config->slots, err);
}

static int set_no_reboot(struct vm_config *config, const char *value, struct error *err)
{
    config->no_reboot = true;
    return 0;
}

static int set_perf_map(struct vm_config *config, const char *value, struct error *err)
{
    config->perf_map = "";
    return value ? set_path(&config->perf_map, value, err) : 0;
}

static int set_stats(struct vm_config *config, const char *value, struct error *err)
{
    return set_path(&config->stats, value, err);
}

static int set_screenshot(struct vm_config *config, const char *value, struct error *err)
{
    if (config->nscreenshots == VM_SCREENSHOTS_MAX)
        return error_input(err, "give %d files at most", VM_SCREENSHOTS_MAX);
    config->screenshots[config->nscreenshots++] = value;
    return screenshot_check_name(value, err);
}

static int set_vnc(struct vm_config *config, const char *value, struct error *err)
{
    config->vnc = config->vnc_where;
    return parse_what_and_file(value, config->vnc_where, "password-file", config->vnc_password_file,
                               &config->vnc_password, err);
}

/* In the order of the help. */
static const struct option options[] = {
    {"--kernel", "FILE", "boot this Linux bzImage, PVH ELF or multiboot image", set_kernel},
    {"--initrd", "FILE", "initial file system (multiboot: modules, FILE[ ARGS][,...])", set_initrd},
    {"--append", "STRING", "kernel command line", set_append},
    {"--name", "NAME", "name of the machine (default: doppel)", set_name},
    {"--engine", "ENGINE", "auto, kvm, bt[,verify] or interp (default: auto)", set_engine},
    {"--cpu", "MODEL", "processor: host, v2 or v3 (default: host); host,nested=on has VMX or SVM",
     set_cpu},
    {"--memory", "SIZE[,...]", "memory, such as 512M or 2G (default: 512M); see below", set_memory},
    {"--no-pv", "NAME[,...]",
     "without KVM's paravirtual clock, steal-time, eoi, unhalt, tlb-flush, ipi, yield or async-pf; "
     "all",
     set_no_pv},
    {"--cpus", "N[,...]",
     "processors (default: 1); sockets=S,cores=C,threads=T: C a socket, T a core", set_cpus},
    {"--pin", "LIST", "host processors, such as 0-3,8, that the vCPUs run on, one after the other",
     set_pin},
    {"--weight", "N", "share of the host's processors, 1 to 10000, where others have 100",
     set_weight},
    {"--cap", "PERCENT", "processor time at most: 150% is one and a half processors'", set_cap},
    {"--firmware", "WHAT", "bios (Debian's seabios), uefi[,vars=...] (its ovmf), or an image FILE",
     set_firmware},
    {"--disk", "FILE[,...]", "a disk; see below", set_disk},
    {"--pmem", "FILE[,readonly]", "a file as memory of the guest's (/dev/pmem0), by virtio-pmem",
     set_pmem},
    {"--cdrom", "FILE", "an ISO image, in an IDE CD-ROM drive", set_cdrom},
    {"--boot", "WHICH", "what firmware boots first: disk (default), cdrom or network", set_boot},
    {"--uuid", "UUID", "the machine's, in SMBIOS", set_uuid},
    {"--product", "NAME", "its product name there (default: doppel)", set_product},
    {"--serial-number", "TEXT", "its serial number there", set_machine_serial},
    {"--net", "WHAT", "a network card; see below", set_net},
    {"--vsock", "cid=N,path=S", "vsock by a Unix socket; see below", set_vsock},
    {"--share", "DIR:TAG[,...]", "a directory that the guest mounts by TAG; see below", set_share},
    {"--serial", "WHERE", "stdio, FILE, socket=PATH or none (default: stdio)", set_serial},
    {"--console", "WHERE[,...]",
     "a virtio console: as --serial; with name=NAME a port of that name", set_console},
    {"--control", "socket=PATH",
     "a Unix socket for commands to the running machine (docs/control.md)", set_control},
    {"--slots", "N", "PCI Express slots for what --control adds: 0 to 8 (default: 0)", set_slots},
    {"--debug-exit", "PORT", "a guest's write of V to PORT ends with status (V << 1) | 1",
     set_debug_exit},
    {"--no-reboot", NULL, "end with status 3 when the guest resets", set_no_reboot},
    {"--screenshot", "FILE", "at exit and on SIGUSR1, the screen as .png, or its text as .txt",
     set_screenshot},
    {"--vnc", "WHERE[,...]", "screen, keyboard and mouse for a VNC viewer; see below", set_vnc},
    {"--stats", "FILE", "write statistics as JSON to FILE at exit", set_stats},
    {"--perf-map", "[=FILE]", "bt: write /tmp/perf-PID.map for perf; FILE is a System.map",
     set_perf_map},
};

static bool may_be_repeated(const struct option *o)
{
    return o->set == set_disk || o->set == set_cdrom || o->set == set_screenshot ||
           o->set == set_console || o->set == set_net || o->set == set_share || o->set == set_pmem;
}

static const struct option *find_option(const char *arg, size_t len)
{
    for (size_t i = 0; i < ARRAY_SIZE(options); i++) {
        if (strlen(options[i].name) == len && !memcmp(options[i].name, arg, len))
            return &options[i];
    }
    return NULL;
}

/* One option at argv[*i], with its value there ("--memory=1G") or in the next ("--memory 1G"). */
static int parse_option(int argc, char **argv, int *i, u64 *seen, struct vm_config *config,
                        struct error *err)
{
    const char *arg = argv[*i];
    const char *value = strchr(arg, '=');
    size_t len = value ? (size_t)(value - arg) : strlen(arg);
    const struct option *o;
    int ret;

    if (arg[0] != '-')
        return error_input(err, "unexpected argument '%s': see doppel run --help", arg);
    o = find_option(arg, len);
    if (!o)
        return error_input(err, "unknown option '%.*s': see doppel run --help", (int)len, arg);
    if ((*seen & BIT(o - options)) && !may_be_repeated(o))
        return error_input(err, "%s is given twice", o->name);
    *seen |= BIT(o - options);
    if (!o->value) {
        if (value)
            return error_input(err, "%s takes no value", o->name);
    } else if (value) {
        value++;
    } else if (o->value[0] == '[') {
        /* it is left out */
    } else if (*i + 1 < argc) {
        value = argv[++*i];
    } else {
        return error_input(err, "%s needs a value: %s", o->name, o->value);
    }
    ret = o->set(config, value, err);
    if (ret)
        error_prefix(err, "%s", o->name);
    return ret;
}

int cli_run_parse(int argc, char **argv, struct vm_config *config, bool *help, struct error *err)
{
    u64 seen = 0;

    *config = (struct vm_config){
        .name = "doppel",
        .engine = "auto",
        .cpu = "host",
        .memory = DEFAULT_MEMORY,
        .cpus = 1,
        .append = "",
        .serial = "stdio",
        .parse_disk = parse_disk,
    };
    *help = false;
    for (int i = 1; i < argc; i++) {
        int ret;

        if (!strcmp(argv[i], "--help") || !strcmp(argv[i], "-h")) {
            *help = true;
            return 0;
        }
        ret = parse_option(argc, argv, &i, &seen, config, err);
        if (ret)
            return ret;
    }
    if (config->slots && !config->control)
        return error_input(err,
                           "--slots: give --control socket=PATH too, which puts cards into them");
    if (config->nscreenshots && !config->firmware.what)
        return error_input(err, "--screenshot: a screen comes with --firmware only");
    if (config->vnc && !config->firmware.what)
        return error_input(err, "--vnc: a screen comes with --firmware only");
    if (config->firmware.boot_first == FIRMWARE_BOOT_NETWORK && !config->nnets)
        return error_input(err, "--boot network: give --net user,tftp=DIR,bootfile=FILE too, or "
                                "another network");
    if (!config->kernel && !config->firmware.what)
        return error_input(err, "nothing to boot: give --kernel FILE or --firmware bios");
    if (!config->kernel && (config->initrd || *config->append))
        return error_input(err, "%s goes with --kernel", config->initrd ? "--initrd" : "--append");
    return 0;
}

void cli_run_help(FILE *out)
{
    fputs("usage: doppel run [--kernel FILE] [--firmware WHAT] [options]\n"
          "\n"
          "Runs a virtual machine until its guest powers off.\n"
          "\n",
          out);
    for (size_t i = 0; i < ARRAY_SIZE(options); i++) {
        const struct option *o = &options[i];
        int used = fprintf(out, "  %s%s%s", o->name, o->value && o->value[0] != '[' ? " " : "",
                           o->value ? o->value : "");

        fprintf(out, "%*s%s\n", 25 - used, "", o->help);
    }
    fputs(
        "\n"
        "--memory SIZE[,hugepages=on][,locked=on][,mergeable=on]: of the host's reserved huge "
        "pages\n"
        "(engines kvm and interp); kept in RAM; given up to KSM, which merges equal pages.\n"
        "\n"
        "--weight and --cap put the machine into a control group of its own (cgroup v2), which "
        "ends\n"
        "with it.\n"
        "\n"
        "--disk FILE[,format=raw|qcow2][,bus=virtio|nvme|ide][,readonly=on][,serial=TEXT]\n"
        "[,werror=report|stop]: a raw or qcow2 image or a block device, as a virtio disk, an NVMe\n"
        "disk, or at the ports of an old PC's IDE controller; more than once for more of them.\n"
        "NVMe disks with one serial are namespaces of one controller. With werror=stop a write\n"
        "that fails pauses the machine, and SIGCONT lets it try again. \",,\" in FILE is a comma.\n"
        "\n"
        "--firmware uefi keeps UEFI's variables, such as boot entries, in a file beside the first\n"
        "disk image that isn't read-only, DISK.vars, which is made when it isn't there. vars=FILE\n"
        "keeps them in FILE, vars=none forgets them at the end. With --kernel, uefi boots the "
        "kernel\n"
        "before it looks at disks.\n"
        "--net user[,hostfwd=tcp:[HOST]:PORT-[GUEST]:PORT]...[,tftp=DIR][,bootfile=FILE]: a\n"
        "network of the guest's own, whose packets leave as this process's connections. The\n"
        "guest is 10.0.2.15 by DHCP, the host is 10.0.2.2, DNS is 10.0.2.3. tftp=DIR serves\n"
        "the files in DIR to it, and bootfile=FILE is the one of them that --boot network loads:\n"
        "by iPXE (Debian's ipxe-qemu) with bios, by itself with uefi.\n"
        "hostfwd (tcp or udp) lets the host in, by its loopback address\n"
        "unless HOST is another.\n"
        "--net tap=IF[,queues=N]: a tap interface of the host's.\n"
        "--net socket=PATH: a cable to another doppel; the first one listens, the second "
        "connects.\n"
        "All take mac=ADDRESS, mtu=BYTES and pcap=FILE, a capture for tcpdump. More than once for\n"
        "more cards.\n"
        "--pmem FILE[,readonly]: a raw image of a multiple of 2 MiB as memory, which Linux has as\n"
        "/dev/pmem0 (and mounts with -o dax); what it syncs is on the host's medium. readonly: "
        "what "
        "it\n"
        "writes there is lost.\n"
        "--vsock cid=N,path=SOCKET: the guest has CID N. Who connects to SOCKET and sends "
        "\"CONNECT P\"\n"
        "reaches its port P; port P of the host (CID 2) is the socket SOCKET_P.\n"
        "--share DIR:TAG[,readonly]: the guest mounts DIR by \"mount -t virtiofs TAG /mnt\". What "
        "it\n"
        "makes there belongs to this process's user. More than once for more of them.\n"
        "--vnc HOST:PORT or unix:PATH[,password-file=FILE]: HOST is 127.0.0.1 unless given, and\n"
        "another than a loopback address only with a password, the first line of FILE (8 "
        "characters\n"
        "at most: that is VNC's; nothing is encrypted). Keys are a US keyboard's.\n"
        "--disk vhost-user=PATH, --net vhost-user=PATH[,mac=ADDRESS], --share vhost-user=PATH:TAG: "
        "the\n"
        "device is served by another process, which listens at the socket PATH "
        "(qemu-storage-daemon,\n"
        "virtiofsd...) and gets the guest's memory.\n"
        "\n"
        "With the console on a terminal, Ctrl-A x ends the machine and Ctrl-A h lists the keys.\n"
        "Exit status: 0 the guest powered off, 1 the host failed, 2 bad usage or input, 3 triple\n"
        "fault or a reset under --no-reboot; with --debug-exit, what the guest chose.\n"
        "\n"
        "examples:\n"
        "  doppel run --kernel vmlinuz --initrd initramfs.cpio --append console=ttyS0\n"
        "  doppel run --kernel vmlinuz --initrd test.cpio --append 'console=ttyS0 panic=-1' \\\n"
        "             --serial console.log --no-reboot --stats stats.json\n"
        "  doppel run --kernel guest.elf --serial none --debug-exit 0xf4\n"
        "  doppel run --firmware bios --disk debian.qcow2 --screenshot screen.png\n"
        "  doppel run --firmware bios --cdrom installer.iso --disk disk.qcow2 --vnc :5900\n"
        "  doppel run --firmware uefi --cdrom installer.iso --disk disk.qcow2\n",
        out);
}
