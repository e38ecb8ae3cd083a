#include "host/cgroup.h"

#include "host/log.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

/* Of cpu.max, in microseconds: the kernel's own. */
#define PERIOD_US 100000u

struct cgroup {
    char before[PATH_MAX]; /* the group that the process came from */
    char path[PATH_MAX];
};

/* Writes `text` to the file `name` of a group. 0 or -errno. */
static int write_file(const char *group, const char *name, const char *text)
{
    char path[PATH_MAX];
    ssize_t n;
    int fd, ret = 0;

    if (snprintf(path, sizeof(path), "%s/%s", group, name) >= (int)sizeof(path))
        return -ENAMETOOLONG;
    fd = open(path, O_WRONLY | O_CLOEXEC);
    if (fd < 0)
        return -errno;
    n = write(fd, text, strlen(text));
    if (n < 0)
        ret = -errno;
    close(fd);
    return ret;
}

/* Whether a list of words of a group, such as its controllers, has "cpu". */
static bool has_cpu(const char *group, const char *name)
{
    char path[PATH_MAX], word[64];
    bool found = false;
    FILE *file;

    if (snprintf(path, sizeof(path), "%s/%s", group, name) >= (int)sizeof(path))
        return false;
    file = fopen(path, "re");
    if (!file)
        return false;
    while (!found && fscanf(file, "%63s", word) == 1)
        found = strcmp(word, "cpu") == 0;
    fclose(file);
    return found;
}

/* Where cgroup v2 is mounted, and which of its groups is the root there: "" for its own. False: nowhere. */
static bool find_mount(char point[PATH_MAX], char root[PATH_MAX])
{
    FILE *file = fopen("/proc/self/mountinfo", "re");
    char *line = NULL;
    size_t size = 0;
    bool found = false;

    if (!file)
        return false;
    /* number, parent, device, root, mount point, options, optional fields, "-", type */
    while (!found && getline(&line, &size, file) > 0) {
        if (!strstr(line, " - cgroup2 "))
            continue;
        found = sscanf(line, "%*s %*s %*s %4095s %4095s", root, point) == 2;
    }
    free(line);
    fclose(file);
    if (found && strcmp(root, "/") == 0)
        root[0] = '\0';
    return found;
}

/* The directory of the group that this process is in. False: it has none in sight. */
static bool find_own(char path[PATH_MAX])
{
    char point[PATH_MAX], root[PATH_MAX], *line = NULL;
    FILE *file = fopen("/proc/self/cgroup", "re");
    size_t size = 0, skip;
    bool found = false;

    if (!file)
        return false;
    if (find_mount(point, root)) {
        skip = strlen(root);
        while (!found && getline(&line, &size, file) > 0) {
            line[strcspn(line, "\n")] = '\0';
            found = strncmp(line, "0::", 3) == 0 && strncmp(line + 3, root, skip) == 0 &&
                    snprintf(path, PATH_MAX, "%s%s", point, line + 3 + skip) < PATH_MAX;
        }
    }
    free(line);
    fclose(file);
    for (size_t len = found ? strlen(path) : 0; len > 1 && path[len - 1] == '/'; len--)
        path[len - 1] = '\0';
    return found;
}

static int set_limits(const char *path, unsigned weight, unsigned cap)
{
    char text[64];
    int ret = 0;

    if (weight) {
        snprintf(text, sizeof(text), "%u", weight);
        ret = write_file(path, "cpu.weight", text);
    }
    if (ret == 0 && cap) {
        snprintf(text, sizeof(text), "%llu %u", (unsigned long long)cap * (PERIOD_US / 100),
                 PERIOD_US);
        ret = write_file(path, "cpu.max", text);
    }
    return ret;
}

static int move_to(const char *path)
{
    return write_file(path, "cgroup.procs", "0"); /* who writes */
}

/* Makes g->path, a group in `parent`, and moves there. 0, or -errno with nothing changed. */
static int enter_in(struct cgroup *g, const char *parent, unsigned weight, unsigned cap)
{
    bool enabled = has_cpu(parent, "cgroup.subtree_control");
    int ret;

    if (!has_cpu(parent, "cgroup.controllers"))
        return -ENODEV;
    if (snprintf(g->path, PATH_MAX, "%s/doppel-%d", parent, (int)getpid()) >= PATH_MAX)
        return -ENAMETOOLONG;
    ret = enabled ? 0 : write_file(parent, "cgroup.subtree_control", "+cpu");
    if (ret)
        return ret;
    ret = mkdir(g->path, 0755) ? -errno : 0;
    if (ret == 0) {
        ret = set_limits(g->path, weight, cap);
        /* Where processes are left behind in the parent, it refuses. */
        if (ret == 0)
            ret = move_to(g->path);
        if (ret)
            rmdir(g->path);
    }
    if (ret && !enabled)
        write_file(parent, "cgroup.subtree_control", "-cpu");
    return ret;
}

/* Below the process's own group, or beside it. 0 or -errno, of the former. */
static int enter(struct cgroup *g, unsigned weight, unsigned cap)
{
    char parent[PATH_MAX];
    int ret = enter_in(g, g->before, weight, cap);

    if (ret == 0)
        return 0;
    strcpy(parent, g->before);
    *strrchr(parent, '/') = '\0';
    return enter_in(g, parent, weight, cap) == 0 ? 0 : ret;
}

struct cgroup *cgroup_enter(unsigned weight, unsigned cap, struct error *err)
{
    struct cgroup *g = calloc(1, sizeof(*g));
    int ret;

    if (!g) {
        error_host(err, ENOMEM, "a control group");
        return NULL;
    }
    ret = find_own(g->before) ? enter(g, weight, cap) : -ENODEV;
    if (ret == 0)
        return g;
    error_host(err, -ret,
               "can't make a control group with a share of the processors in %s: give this process "
               "one of its own (systemd-run --user --scope -p Delegate=yes doppel ...)",
               *g->before ? g->before : "cgroup v2, which isn't mounted");
    free(g);
    return NULL;
}

void cgroup_leave(struct cgroup *g)
{
    if (!g)
        return;
    if (move_to(g->before) || rmdir(g->path))
        log_warn("control group %s is left behind", g->path);
    free(g);
}
