#include "cli/image.h"

#include "block/convert.h"
#include "block/disk.h"
#include "cli/parse.h"
#include "control/vm.h"
#include "host/log.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define OPERANDS_MAX 2

/* What may stand on the line, for all of the commands. */
struct image_args {
    const char *format, *output_format, *backing, *backing_format, *compression;
    u64 cluster_size;
    unsigned version;
    bool repair, shrink, force, quiet;
    const char *operands[OPERANDS_MAX];
    unsigned noperands;
};

struct image_command {
    const char *name;
    const char *usage, *help;
    const char *options; /* letters of those that it takes: see image_options */
    unsigned min, max;   /* operands */
    int (*run)(const struct image_args *args, struct error *err);
};

/* ---- the options ---- */

static int set_format(struct image_args *a, const char *value, struct error *err)
{
    a->format = value;
    return 0;
}
static int set_output_format(struct image_args *a, const char *value, struct error *err)
{
    a->output_format = value;
    return 0;
}
static int set_backing(struct image_args *a, const char *value, struct error *err)
{
    a->backing = value;
    return 0;
}
static int set_backing_format(struct image_args *a, const char *value, struct error *err)
{
    a->backing_format = value;
    return 0;
}
static int set_compression(struct image_args *a, const char *value, struct error *err)
{
    a->compression = value;
    if (strcmp(value, "zlib") && strcmp(value, "zstd"))
        return error_input(err, "unknown compression '%s': give zlib or zstd", value);
    return 0;
}
static int set_cluster_size(struct image_args *a, const char *value, struct error *err)
{
    int ret = strcmp(value, "512") ? parse_size(value, &a->cluster_size, err) : 0;

    if (!strcmp(value, "512"))
        a->cluster_size = 512;
    if (!ret && (a->cluster_size < 512 || a->cluster_size > MIB(2)))
        return error_input(err, "give 512 to 2M");
    return ret;
}
static int set_version(struct image_args *a, const char *value, struct error *err)
{
    u64 n;
    int ret = parse_number(value, 2, 3, &n, err);

    if (!ret)
        a->version = (unsigned)n;
    return ret;
}
static int set_repair(struct image_args *a, const char *value, struct error *err)
{
    a->repair = true;
    return 0;
}
static int set_shrink(struct image_args *a, const char *value, struct error *err)
{
    a->shrink = true;
    return 0;
}
static int set_force(struct image_args *a, const char *value, struct error *err)
{
    a->force = true;
    return 0;
}
static int set_quiet(struct image_args *a, const char *value, struct error *err)
{
    a->quiet = true;
    return 0;
}

static const struct image_option {
    char letter; /* as in struct image_command */
    const char *name, *short_name, *value, *help;
    int (*set)(struct image_args *a, const char *value, struct error *err);
} image_options[] = {
    {'f', "--format", "-f", "FORMAT", "raw or qcow2 (default: as the file looks; qcow2 for create)",
     set_format},
    {'O', "--output-format", "-O", "FORMAT", "format of the new image (default: qcow2)",
     set_output_format},
    {'b', "--backing", "-b", "FILE", "image that shows where the new one has nothing", set_backing},
    {'F', "--backing-format", "-F", "FORMAT", "its format (default: as it looks)",
     set_backing_format},
    {'z', "--compress", "-c", "KIND", "zlib or zstd: the new image's data are compressed by that",
     set_compression},
    {'c', "--cluster-size", NULL, "SIZE", "512 to 2M, a power of two (default: 64K)",
     set_cluster_size},
    {'v', "--qcow2-version", NULL, "N", "2 or 3 (default: 3)", set_version},
    {'r', "--repair", "-r", NULL, "mend what is wrong", set_repair},
    {'s', "--shrink", NULL, NULL, "allow a smaller size: what lies behind it is lost", set_shrink},
    {'y', "--force", NULL, NULL, "replace a file that exists", set_force},
    {'q', "--quiet", "-q", NULL, "no progress, no summary", set_quiet},
};

static const struct image_option *find_option(const struct image_command *c, const char *arg,
                                              size_t len)
{
    for (size_t i = 0; i < ARRAY_SIZE(image_options); i++) {
        const struct image_option *o = &image_options[i];

        if (!strchr(c->options, o->letter))
            continue;
        if ((strlen(o->name) == len && !memcmp(o->name, arg, len)) ||
            (o->short_name && !strcmp(o->short_name, arg)))
            return o;
    }
    return NULL;
}

static int parse_option(const struct image_command *c, int argc, char **argv, int *i,
                        struct image_args *args, struct error *err)
{
    const char *arg = argv[*i], *value = strchr(arg, '=');
    size_t len = value ? (size_t)(value - arg) : strlen(arg);
    const struct image_option *o = find_option(c, arg, len);
    int ret;

    if (!o)
        return error_input(err, "unknown option '%.*s': see doppel image --help", (int)len, arg);
    if (!o->value && value)
        return error_input(err, "%s takes no value", o->name);
    if (value)
        value++;
    else if (o->value && *i + 1 < argc)
        value = argv[++*i];
    else if (o->value)
        return error_input(err, "%s needs a value: %s", o->name, o->value);
    ret = o->set(args, value, err);
    if (ret)
        error_prefix(err, "%s", o->name);
    return ret;
}

static int parse_args(const struct image_command *c, int argc, char **argv, struct image_args *args,
                      struct error *err)
{
    for (int i = 1; i < argc; i++) {
        int ret = 0;

        if (argv[i][0] == '-' && argv[i][1])
            ret = parse_option(c, argc, argv, &i, args, err);
        else if (args->noperands < c->max)
            args->operands[args->noperands++] = argv[i];
        else
            ret = error_input(err, "'%s' is one too many: doppel image %s", argv[i], c->usage);
        if (ret)
            return ret;
    }
    if (args->noperands < c->min)
        return error_input(err, "usage: doppel image %s", c->usage);
    return 0;
}

/* ---- progress ---- */

struct progress {
    const char *what;
    bool shown;
    unsigned percent;
};

static void show_progress(void *opaque, u64 done, u64 total)
{
    struct progress *p = opaque;
    unsigned percent = total ? (unsigned)(done * 100 / total) : 100;

    if (!p->shown || percent == p->percent)
        return;
    p->percent = percent;
    fprintf(stderr, "\r%s: %3u %%%s", p->what, percent, done == total ? "\n" : "");
    fflush(stderr);
}

static struct progress progress_begin(const char *what, const struct image_args *args)
{
    return (struct progress){
        .what = what, .shown = !args->quiet && isatty(STDERR_FILENO), .percent = 101};
}

/* ---- the commands ---- */

static struct disk *open_disk(const char *path, const char *format, bool read_only,
                              struct error *err)
{
    struct disk_options options = {.format = format, .read_only = read_only};

    return disk_open(path, &options, err);
}

/* Closes it; an error of its own is told only when there was none before. */
static int close_disk(struct disk *d, const char *path, int before, struct error *err)
{
    int ret = disk_close(d);

    return before || !ret ? before : error_host(err, -ret, "%s: cannot write the rest of it", path);
}

static int parse_disk_size(const char *text, u64 *size, struct error *err)
{
    char *end;

    /* Sizes of whole sectors may be given in bytes. */
    errno = 0;
    *size = strtoull(text, &end, 10);
    if (*text >= '0' && *text <= '9' && !*end && !errno) {
        if (*size % DISK_SECTOR)
            return error_input(err, "size '%s': give a multiple of 512, or one such as 10G", text);
        return 0;
    }
    return parse_size(text, size, err);
}

static int run_create(const struct image_args *a, struct error *err)
{
    struct disk_create c = {
        .format = a->format ? a->format : "qcow2",
        .backing = a->backing,
        .backing_format = a->backing_format,
        .cluster_size = (u32)a->cluster_size,
        .version = a->version,
        .replace = a->force,
        .size_given = a->noperands == 2,
    };
    int ret = 0;

    if (strcmp(c.format, "raw") && strcmp(c.format, "qcow2"))
        return error_input(err, "unknown image format '%s': give raw or qcow2", c.format);
    if (c.size_given)
        ret = parse_disk_size(a->operands[1], &c.size, err);
    else if (!a->backing)
        return error_input(err, "the size is missing: doppel image create FILE SIZE");
    return ret ? ret : disk_create(a->operands[0], &c, err);
}

static void print_size(const char *what, u64 bytes)
{
    static const char *const units[] = {"", "KiB", "MiB", "GiB", "TiB", "PiB"};
    unsigned unit = 0;
    double n = (double)bytes;

    while (n >= 1024 && unit + 1 < ARRAY_SIZE(units)) {
        n /= 1024;
        unit++;
    }
    if (unit)
        printf("%s: %.4g %s (%" PRIu64 " bytes)\n", what, n, units[unit], bytes);
    else
        printf("%s: %" PRIu64 " bytes\n", what, bytes);
}

static int run_info(const struct image_args *a, struct error *err)
{
    struct disk_options options = {.format = a->format, .read_only = true, .no_backing = true};
    struct disk *d = disk_open(a->operands[0], &options, err);
    struct stat st;

    if (!d)
        return -EINVAL;
    printf("image: %s\nformat: %s\n", a->operands[0], d->ops->format);
    print_size("disk size", d->size);
    if (fstat(d->file.fd, &st) == 0)
        print_size("space in use", (u64)st.st_blocks * 512);
    d->ops->info(d, stdout);
    return disk_close(d);
}

static int run_check(const struct image_args *a, struct error *err)
{
    struct disk_options options = {
        .format = a->format, .read_only = !a->repair, .repair = a->repair, .no_backing = true};
    struct disk *d = disk_open(a->operands[0], &options, err);
    struct disk_check r;
    int ret;

    if (!d)
        return -EINVAL;
    ret = d->ops->check(d, a->repair, &r, err);
    ret = close_disk(d, a->operands[0], ret, err);
    if (ret)
        return ret;
    if (!a->quiet)
        printf("%" PRIu64 " clusters of data, %" PRIu64 " corruptions, %" PRIu64
               " leaked clusters, %" PRIu64 " mended\n",
               r.clusters, r.corruptions, r.leaks, r.repaired);
    if (r.corruptions + r.leaks <= r.repaired)
        return 0;
    if (!r.corruptions) {
        if (!a->quiet)
            printf("Space is lost, data is not: doppel image check --repair gives it back.\n");
        return 0;
    }
    return error_input(err, "%s: is corrupt%s", a->operands[0],
                       a->repair ? ", and not all of it could be mended"
                                 : ": run doppel image check --repair");
}

static int run_convert(const struct image_args *a, struct error *err)
{
    struct disk_create c = {
        .format = a->output_format ? a->output_format : "qcow2",
        .backing = a->backing,
        .backing_format = a->backing_format,
        .cluster_size = (u32)a->cluster_size,
        .version = a->version,
        .replace = a->force,
        .size_given = true,
        .zstd = a->compression && !strcmp(a->compression, "zstd"),
    };
    struct progress p = progress_begin("convert", a);
    struct disk *from, *to;
    int ret;

    if (strcmp(c.format, "raw") && strcmp(c.format, "qcow2"))
        return error_input(err, "unknown image format '%s': give raw or qcow2", c.format);
    if (a->compression && strcmp(c.format, "qcow2"))
        return error_input(err, "--compress: only a qcow2 image can be compressed: give -O qcow2");
    if (c.zstd && c.version == 2)
        return error_input(err, "--compress: version 2 of qcow2 has no zstd: give zlib");
    from = open_disk(a->operands[0], a->format, true, err);
    if (!from)
        return -EINVAL;
    c.size = (from->size + DISK_SECTOR - 1) / DISK_SECTOR * DISK_SECTOR;
    ret = disk_create(a->operands[1], &c, err);
    if (ret) {
        disk_close(from);
        return ret;
    }
    to = open_disk(a->operands[1], c.format, false, err);
    ret =
        to ? disk_copy(from, to, a->backing != NULL, a->compression != NULL, show_progress, &p, err)
           : -EINVAL;
    if (to)
        ret = close_disk(to, a->operands[1], ret, err);
    disk_close(from);
    if (ret)
        unlink(a->operands[1]);
    return ret;
}

static int run_resize(const struct image_args *a, struct error *err)
{
    const char *text = a->operands[1];
    bool plus = text[0] == '+';
    struct disk *d;
    u64 size;
    int ret = parse_disk_size(text + plus, &size, err);

    if (ret)
        return ret;
    d = open_disk(a->operands[0], a->format, false, err);
    if (!d)
        return -EINVAL;
    if (plus)
        size += d->size;
    if (size > DISK_SIZE_MAX)
        ret = error_input(err, "a disk can't be larger than 1024P");
    else if (size < d->size && !a->shrink)
        ret = error_input(err, "%s: is larger than %s: add --shrink to cut off what lies behind",
                          a->operands[0], text);
    else
        ret = d->ops->resize(d, size, err);
    return close_disk(d, a->operands[0], ret, err);
}

static int run_commit(const struct image_args *a, struct error *err)
{
    struct progress p = progress_begin("commit", a);
    int ret = disk_commit(a->operands[0], a->format, show_progress, &p, err);

    if (!ret && !a->quiet)
        printf("%s: its data is in its backing file now\n", a->operands[0]);
    return ret;
}

static const struct image_command image_commands[] = {
    {"create", "create [-f FORMAT] [-b BACKING] FILE [SIZE]", "make an empty image", "fbFcvyq", 1,
     2, run_create},
    {"info", "info FILE", "tell about an image", "f", 1, 1, run_info},
    {"check", "check [--repair] FILE", "look for inconsistencies in a qcow2 image", "frq", 1, 1,
     run_check},
    {"convert", "convert [-O FORMAT] FILE NEW", "copy an image into a new one", "fObFzcvyq", 2, 2,
     run_convert},
    {"resize", "resize [--shrink] FILE [+]SIZE", "change the size of the disk", "fsq", 2, 2,
     run_resize},
    {"commit", "commit FILE", "move an image's data into its backing file", "fq", 1, 1, run_commit},
};

static void help(FILE *out)
{
    fputs("usage: doppel image COMMAND [options]\n\n", out);
    for (size_t i = 0; i < ARRAY_SIZE(image_commands); i++)
        fprintf(out, "  %-48s %s\n", image_commands[i].usage, image_commands[i].help);
    fputs("\n", out);
    for (size_t i = 0; i < ARRAY_SIZE(image_options); i++) {
        const struct image_option *o = &image_options[i];
        char name[64];

        snprintf(name, sizeof(name), "%s%s%s%s%s", o->short_name ? o->short_name : "",
                 o->short_name ? ", " : "", o->name, o->value ? " " : "", o->value ? o->value : "");
        fprintf(out, "  %-29s %s\n", name, o->help);
    }
    fputs("\n"
          "Exit status: 0 done, and for check: the image is sound; 1 the host failed; 2 bad usage "
          "or\n"
          "input, and for check: the image is corrupt.\n"
          "\n"
          "examples:\n"
          "  doppel image create disk.qcow2 20G\n"
          "  doppel image create -b debian.qcow2 mine.qcow2\n"
          "  doppel image convert -O raw mine.qcow2 disk.raw\n"
          "  doppel image convert --compress zstd disk.raw small.qcow2\n",
          out);
}

int cli_image(int argc, char **argv)
{
    struct image_args args = {0};
    struct error err = {0};

    for (int i = 1; i < argc; i++) {
        if (!strcmp(argv[i], "--help") || !strcmp(argv[i], "-h")) {
            help(stdout);
            return 0;
        }
    }
    if (argc < 2) {
        help(stderr);
        return VM_STATUS_BAD_INPUT;
    }
    for (size_t i = 0; i < ARRAY_SIZE(image_commands); i++) {
        const struct image_command *c = &image_commands[i];

        if (strcmp(argv[1], c->name))
            continue;
        if (!parse_args(c, argc - 1, argv + 1, &args, &err) && !c->run(&args, &err))
            return 0;
        log_error("%s", err.text);
        return err.class == ERROR_HOST ? VM_STATUS_HOST_FAILURE : VM_STATUS_BAD_INPUT;
    }
    log_error("unknown command 'image %s': see doppel image --help", argv[1]);
    return VM_STATUS_BAD_INPUT;
}
