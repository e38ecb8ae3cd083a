/*
 * Runs random blocks on both sides.
 *
 * The native side runs a block once from each of its states, doppel several times in turn: a translator
 * that waits until code is hot comes to translate it, and meets each branch both ways.
 *
 * What runs blocks is a child of this process, with a guest and a native side of its own. So a crash or a
 * hang of doppel is a difference like others: the child is gone, and what it left in shared memory says
 * which block it was. A differing block is shrunk by leaving out units as long as it still differs,
 * each try by a new child.
 */
#define _GNU_SOURCE
#include "block_run.h"

#include "block.h"
#include "compare.h"
#include "guest.h"
#include "native_link.h"

#include "x86/regs.h"

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define BLOCKS (BATCH / VARIANTS) /* of a batch */
#define HANG_SECONDS 10
#define TRY_HANG_SECONDS 3
#define SHRINK_SECONDS 90
#define PROBES 4u /* of each form */

/* What a child says. */
struct progress {
    u64 number; /* the block that runs */
    bool differs;
    unsigned variant, round; /* where it did */
    u64 translated, adopted; /* blocks, by the engine's count */
    u32 insns, ends[32];     /* instructions; which exceptions ended native runs */
    struct report report;
    struct outcome native, doppel;
};

struct runner {
    const struct block_options *o;
    struct generator *generator;
    struct progress *progress; /* shared with children */
    u8 read_only[PAGE];
    u8 images[IMAGES][WRITABLE_PAGES * PAGE];

    /* The last difference that a child found, and what ended it. */
    struct progress found;
    int status;

    /* A child's own. */
    struct native_link native;
    struct guest *guest;
};

static struct random random_of(const struct runner *r, u64 number, u64 salt)
{
    struct random random = {r->o->seed ^ number * 0xd1342543de82ef95 ^ (u64)r->o->mode << 56 ^
                            salt << 48};

    random_next(&random);
    return random;
}

/* --- In a child --- */

static void open_native(struct runner *r)
{
    int error = native_open(&r->native, r->o->native, r->read_only);

    if (error < 0) {
        fprintf(stderr, "oracle: the native side: %s\n", strerror(-error));
        exit(2);
    }
    memcpy(r->native.shared->images, r->images, sizeof(r->images));
}

static void open_sides(struct runner *r)
{
    struct error err;

    open_native(r);
    r->guest = guest_create(r->o->engine, &r->o->host, r->read_only, r->o->ncpus, &err);
    if (r->guest && (!r->o->kicks || !guest_start_kicks(r->guest)))
        return;
    fprintf(stderr, "oracle: %s\n", err.text);
    exit(2);
}

/* A block that has a layout, with all its units. */
static void make_block(const struct runner *r, u64 number, struct block *b)
{
    struct random random = random_of(r, number, 4);
    static const bool all[UNITS_MAX] = {[0 ... UNITS_MAX - 1] = true};
    struct test_case c;

    do
        block_generate(r->generator, r->o->mode == 64, &random, b);
    while (!block_case(b, all, 0, &c));
}

/*
 * Runs the cases of a block, which the shared memory has from `at` on, under doppel; only: this variant, or
 * VARIANTS for all. False: something differs, and r->progress says what.
 */
static bool doppel_agrees(struct runner *r, unsigned at, unsigned only)
{
    struct shared *shared = r->native.shared;
    struct progress *p = r->progress;

    for (unsigned n = 0; n < r->o->rounds * VARIANTS; n++) {
        unsigned v = only < VARIANTS ? only : n % VARIANTS;

        p->variant = v;
        p->round = n / VARIANTS;
        guest_run(r->guest, &shared->cases[at + v], shared->images[shared->cases[at + v].image],
                  &p->doppel);
        if (!compare(generator_decoder(r->generator), &shared->cases[at + v],
                     &shared->outcomes[at + v], &p->doppel, &p->report)) {
            p->native = shared->outcomes[at + v];
            p->differs = true;
            return false;
        }
    }
    return true;
}

struct range {
    u64 first, end;
};

static void run_range(struct runner *r, const void *argument)
{
    static const bool all[UNITS_MAX] = {[0 ... UNITS_MAX - 1] = true};
    const struct range *range = argument;
    static struct block b;

    open_sides(r);
    for (u64 n = range->first; n < range->end;) {
        unsigned blocks = (unsigned)MIN((u64)BLOCKS, range->end - n);

        r->progress->number = n;
        alarm(0);
        for (unsigned k = 0; k < blocks; k++) {
            make_block(r, n + k, &b);
            for (unsigned v = 0; v < VARIANTS; v++)
                block_case(&b, all, v, &r->native.shared->cases[k * VARIANTS + v]);
        }
        native_begin(&r->native, blocks * VARIANTS);
        native_finish(&r->native, blocks * VARIANTS);
        for (unsigned k = 0; k < blocks; k++, n++) {
            r->progress->number = n;
            r->progress->insns += r->native.shared->cases[k * VARIANTS].ncode;
            for (unsigned v = 0; v < VARIANTS; v++)
                r->progress->ends[r->native.shared->outcomes[k * VARIANTS + v].vector & 31]++;
            alarm(HANG_SECONDS);
            if (!doppel_agrees(r, k * VARIANTS, VARIANTS))
                return;
        }
    }
    alarm(0);
    r->progress->translated += guest_translated(r->guest);
    r->progress->adopted += guest_adopted(r->guest);
}

/* What is left of a differing block. */
struct attempt {
    const struct block *block;
    bool alive[UNITS_MAX];
    unsigned only; /* this variant; VARIANTS: all */
};

static void run_attempt(struct runner *r, const void *argument)
{
    const struct attempt *a = argument;

    open_sides(r);
    for (unsigned v = 0; v < VARIANTS; v++)
        block_case(a->block, a->alive, v, &r->native.shared->cases[v]);
    native_begin(&r->native, VARIANTS);
    native_finish(&r->native, VARIANTS);
    alarm(TRY_HANG_SECONDS);
    doppel_agrees(r, 0, a->only);
}

/* Which forms never do anything but raise #UD here. */
static void run_probes(struct runner *r, const void *argument)
{
    bool *lacking = (bool *)(uintptr_t)argument;
    struct shared *shared;
    u32 forms = generator_forms(r->generator), at[BATCH];

    open_native(r);
    shared = r->native.shared;
    for (u32 form = 0; form < forms;) {
        u32 n = 0;

        for (; form < forms && n + PROBES <= BATCH; form++) {
            struct random random = random_of(r, form, 5);

            lacking[form] = true;
            for (unsigned k = 0; k < PROBES; k++) {
                at[n] = form;
                n += generate_probe(r->generator, &random, form, &shared->cases[n]);
            }
        }
        native_begin(&r->native, n);
        native_finish(&r->native, n);
        for (u32 k = 0; k < n; k++)
            lacking[at[k]] &= shared->outcomes[k].lost || shared->outcomes[k].vector == EXC_UD;
    }
}

/* --- In the parent --- */

typedef void work_fn(struct runner *r, const void *argument);

/* Returns what waitpid says of a child that does `work`. */
static int in_child(struct runner *r, work_fn *work, const void *argument)
{
    int status = 0;
    pid_t pid;

    r->progress->differs = false;
    fflush(stdout);
    pid = fork();
    if (pid < 0) {
        perror("oracle: fork");
        exit(2);
    }
    if (pid == 0) {
        static const int crashes[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT, SIGALRM};

        for (unsigned n = 0; n < ARRAY_SIZE(crashes); n++)
            signal(crashes[n], SIG_DFL);
        work(r, argument);
        native_close(&r->native);
        _exit(0);
    }
    waitpid(pid, &status, 0);
    if (WIFEXITED(status) && WEXITSTATUS(status))
        exit(2); /* it has said why */
    return status;
}

/* Whether a child found a difference, which is kept; a crash or a hang is one. */
static bool differs_in_child(struct runner *r, work_fn *work, const void *argument)
{
    int status = in_child(r, work, argument);

    if (!status && !r->progress->differs)
        return false;
    r->found = *r->progress;
    r->status = status;
    return true;
}

static bool still_differs(struct runner *r, const struct attempt *a)
{
    struct test_case c;

    return block_case(a->block, a->alive, 0, &c) && differs_in_child(r, run_attempt, a);
}

/* Leaves out units from..from + n - 1, with their partners, as far as they may be. False: none of them. */
static bool leave_out(struct attempt *a, unsigned from, unsigned n)
{
    const struct block *b = a->block;
    bool any = false;

    for (unsigned u = from; u < MIN(from + n, b->nunits); u++) {
        if (b->units[u].fixed || !a->alive[u])
            continue;
        a->alive[u] = a->alive[b->units[u].partner] = false;
        any = true;
    }
    return any;
}

/* Leaves out what the difference doesn't need: halves of the block, quarters, ... single units. */
static void shrink(struct runner *r, struct attempt *a)
{
    unsigned chunk = (a->block->nunits + 1) / 2;
    time_t enough = time(NULL) + SHRINK_SECONDS;

    while (chunk && time(NULL) < enough) {
        bool smaller = false;

        for (unsigned from = 0; from < a->block->nunits && time(NULL) < enough; from += chunk) {
            struct attempt next = *a;

            if (!leave_out(&next, from, chunk))
                continue;
            if (still_differs(r, &next)) {
                *a = next;
                smaller = true;
            }
        }
        if (chunk > 1 || !smaller)
            chunk /= 2;
    }
}

static void print_found(struct runner *r, const struct attempt *a)
{
    const struct progress *p = &r->found;
    struct test_case c;

    printf("%u-bit block %llu ", r->o->mode, (unsigned long long)p->number);
    if (!r->status)
        printf("differs");
    else if (WTERMSIG(r->status) == SIGALRM)
        printf("hangs");
    else
        printf("ends doppel (%s)", strsignal(WTERMSIG(r->status)));
    printf(", in variant %u%s, round %u:\n", p->variant, a->only < VARIANTS ? " alone" : "",
           p->round);
    block_case(a->block, a->alive, p->variant, &c);
    print_code(generator_decoder(r->generator), &c);
    if (!r->o->verbose)
        print_gprs("before", &c.before);
    else
        print_state("before", &c.before);
    if (r->status)
        return;
    if (r->o->verbose) {
        print_state("native", &p->native.after);
        print_state("doppel", &p->doppel.after);
    }
    printf("  exception %u, error %#x, cr2 %#llx; differences:\n%s", p->native.vector,
           p->native.error, (unsigned long long)p->native.cr2, p->report.text);
}

/* from: the block that the child began with. */
static void report(struct runner *r, u64 from)
{
    u64 number = r->found.number;
    static struct block b;
    struct attempt a = {.block = &b, .only = VARIANTS};
    struct attempt one;

    make_block(r, number, &b);
    memset(a.alive, true, sizeof(a.alive));
    if (still_differs(r, &a)) {
        shrink(r, &a);
        one = a;
        one.only = r->found.variant;
        if (still_differs(r, &one))
            a = one;
    } else {
        printf("The next one doesn't differ by itself, only as one of --first %llu --count %llu.\n",
               (unsigned long long)from, (unsigned long long)(number - from + 1));
    }
    print_found(r, &a);
    fflush(stdout);
}

static void find_lacking(struct runner *r)
{
    u32 forms = generator_forms(r->generator);
    bool *lacking = mmap(NULL, forms, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);

    if (lacking == MAP_FAILED)
        abort();
    in_child(r, run_probes, lacking);
    for (u32 n = 0; n < forms; n++)
        generator_set_lacking(r->generator, n, lacking[n]);
    munmap(lacking, forms);
}

static void print_coverage(const struct runner *r)
{
    const struct progress *p = r->progress;

    printf("# %u instructions; ended by exceptions, each state once:", p->insns);
    for (unsigned n = 0; n < ARRAY_SIZE(p->ends); n++) {
        if (p->ends[n])
            printf(" %u: %u", n, p->ends[n]);
    }
    printf("\n");
}

unsigned run_blocks(const struct block_options *o)
{
    static struct runner runner;
    struct runner *r = &runner;
    struct range range = {o->first, o->first + o->count};
    struct random random;
    unsigned differ = 0;

    *r = (struct runner){.o = o};
    r->generator = generator_create(o->mode == 64, NULL, &o->host);
    r->progress =
        mmap(NULL, sizeof(*r->progress), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (!r->generator || r->progress == MAP_FAILED)
        abort();
    random = random_of(r, 0, 6);
    generate_read_only(&random, r->read_only);
    generate_images(&random, &o->host, r->images);
    find_lacking(r);

    while (range.first < range.end && differ < o->max_errors) {
        u64 number;

        if (!differs_in_child(r, run_range, &range))
            break;
        differ++;
        number = r->found.number;
        report(r, range.first);
        range.first = number + 1;
    }
    printf("# %u-bit blocks: seed %llu, %llu translated, %llu adopted\n", o->mode,
           (unsigned long long)o->seed, (unsigned long long)r->progress->translated,
           (unsigned long long)r->progress->adopted);
    if (o->coverage)
        print_coverage(r);
    /* bt may leave 32-bit code to the interpreter. */
    if (!r->progress->translated && !strncmp(o->engine, "bt", 2) && o->mode == 64 && !differ) {
        printf("not ok 64-bit blocks are translated\n");
        differ++;
    }
    if (differ)
        printf("not ok %u-bit blocks do what the real processor does (%s): %u of %llu differ\n",
               o->mode, o->engine, differ, (unsigned long long)o->count);
    else
        printf("ok %u-bit blocks do what the real processor does (%s): %llu blocks\n", o->mode,
               o->engine, (unsigned long long)o->count);
    munmap(r->progress, sizeof(*r->progress));
    generator_destroy(r->generator);
    return differ;
}
