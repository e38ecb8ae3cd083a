/*
 * One VM in this process, from its configuration to its exit status.
 */
#ifndef DOPPEL_CONTROL_VM_H
#define DOPPEL_CONTROL_VM_H

#include "host/error.h"
#include "host/processors.h"
#include "host/types.h"
#include "machine/cards.h"
#include "machine/firmware.h"
#include "x86/cpuid.h"

/* Exit statuses (docs/architecture.md). With --debug-exit the guest chooses others. */
enum vm_status {
    VM_STATUS_POWER_OFF = 0,
    VM_STATUS_HOST_FAILURE = 1,
    VM_STATUS_BAD_INPUT = 2,
    VM_STATUS_GUEST_RESET = 3,
};

#define VM_PATH_MAX 1024
#define VM_SCREENSHOTS_MAX 2
#define VM_DISKS_MAX 16
#define VM_NETS_MAX 8

struct vm_disk {
    char path[VM_PATH_MAX];
    bool vhost_user; /* path is the socket of a process that serves it */
    char format[8];  /* empty: as the file looks */
    char serial[21]; /* empty: none */
    bool read_only;
    bool stop_on_error;
    enum machine_disk_bus bus;
    bool cdrom;
};

#define VM_PMEMS_MAX 4

struct vm_pmem {
    char path[VM_PATH_MAX];
    bool read_only;
};

/* Reads FILE[,OPTION]... as --disk has it. 0 or -EINVAL with err set. */
typedef int vm_parse_disk(const char *text, struct vm_disk *disk, struct error *err);

#define VM_SHARES_MAX 8
#define VM_SHARE_TAG_MAX 36

struct vm_share {
    char path[1024];
    bool vhost_user; /* path is the socket of a process that serves it */
    char tag[VM_SHARE_TAG_MAX + 1];
    bool read_only;
};

#define VM_CONSOLES_MAX 16

struct vm_console {
    char where[VM_PATH_MAX]; /* as chardev_open takes it */
    char name[64];           /* empty: a console, not a named port */
};

/* What the user asked for. Strings are borrowed. */
struct vm_config {
    const char *name;
    const char *engine; /* as in --engine */
    char cpu[16];       /* CPUID model: host, v2, v3 */
    bool nested;        /* it offers the host's virtualisation */
    u64 memory;         /* bytes */
    struct memory_options memory_options;
    unsigned cpus;
    struct processor_list pin;    /* as in struct machine_config */
    unsigned weight, cap;         /* as cgroup_enter takes them */
    u32 pv_off;                   /* as in struct engine_config */
    struct cpu_topology topology; /* as in struct machine_config */
    const char *kernel;           /* path */
    const char *initrd;           /* path, or NULL */
    const char *append;
    struct firmware_config firmware;
    char firmware_what[VM_PATH_MAX], firmware_vars[VM_PATH_MAX]; /* what its strings may point to */
    const char *serial;                                          /* as chardev_open takes it */
    struct vm_disk disks[VM_DISKS_MAX];
    unsigned ndisks;
    const char *nets[VM_NETS_MAX]; /* as net_open takes them */
    unsigned nnets;
    struct vm_pmem pmems[VM_PMEMS_MAX];
    unsigned npmems;
    const char *vsock; /* as vsock_open takes it, or NULL */
    struct vm_share shares[VM_SHARES_MAX];
    unsigned nshares;
    struct vm_console consoles[VM_CONSOLES_MAX];
    unsigned nconsoles;
    u16 debug_exit_port; /* 0: none */
    bool no_reboot;
    const char *control;       /* as chardev_open takes it, or NULL */
    unsigned slots;            /* for cards that it adds; MACHINE_SLOTS_MAX at most */
    vm_parse_disk *parse_disk; /* what control has for reading a disk's description */
    const char *stats;         /* path, or NULL */
    const char *perf_map;      /* path of a System.map, "" for none; NULL: no map is written */
    const char *vnc;           /* as vnc_open takes them, or NULL */
    const char *vnc_password;
    char vnc_where[VM_PATH_MAX], vnc_password_file[VM_PATH_MAX]; /* what these may point to */
    const char *screenshots[VM_SCREENSHOTS_MAX];                 /* paths, for screenshot_write */
    unsigned nscreenshots;
};

/* Runs the VM to its end. Returns the exit status; failures have been told on stderr. */
int vm_run(const struct vm_config *config);

#endif
