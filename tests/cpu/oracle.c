/*
 * Random instructions on the real processor and under doppel: everything must be the same.
 *
 *     oracle [options] NATIVE
 *
 *     --seed N      of the random numbers; "random" for one by the clock (default: ORACLE_SEED of the
 *                   environment, or else 1, so that a run of the tests doesn't fail by luck). Printed.
 *     --blocks      whole blocks of instructions, each from several states (block.h), not cases
 *     --rounds N    how often doppel runs a block from each of its states (4), or a case (1); of
 *                   a case, the last time counts
 *     --kicks       kick doppel's vCPU out of blocks all the time, and let it go on; not the same
 *                   again with the same seed
 *     --adopt       two vCPUs run a block by turns, and share what they make of it
 *     --count N     cases of each mode (200000 for 64-bit, a quarter of it for 32-bit; blocks: 5000
 *                   and 2500)
 *     --first N     begin with case N
 *     --mode 64|32  only this one
 *     --only NAME   only this mnemonic
 *     --without NAME,...  not these mnemonics; "far" is for far calls, jumps and returns, and IRET,
 *                   "mmx" for what has an MMX register for an operand
 *     --bytes HEX   only this instruction
 *     --engine NAME as in doppel run (each of this build's software engines in turn)
 *     --errors N    stop after this many differences (10)
 *     --coverage    count the cases of each mnemonic, and those that ended without a fault; of blocks,
 *                   what ended them
 *     --verbose     all registers of differing cases
 *
 * NATIVE is the program that runs cases on the real processor (native.c). A case is made from the seed
 * and its own number, so `--seed S --first N --count 1 --mode M` shows it again.
 */
#define _GNU_SOURCE
#include "block_run.h"
#include "compare.h"
#include "generate.h"
#include "guest.h"
#include "native_link.h"

#include "x86/regs.h"

#include <cpuid.h>
#include <getopt.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <ucontext.h>
#include <unistd.h>

struct options {
    u64 seed, first, count;
    unsigned mode, max_errors;
    const char *only, *without, *engine, *native;
    u8 bytes[15];
    unsigned nbytes, rounds;
    bool blocks, kicks, adopt, coverage, verbose;
};

struct coverage {
    u32 cases, completed;
};

static struct options options = {.max_errors = 10};
static struct native_link native;
static struct guest *guest;
static struct generator *generator;
static struct host host;
static struct coverage coverage[ZYDIS_MNEMONIC_MAX_VALUE + 2];
static unsigned errors;
/* For the handler of a crash or a hang. */
static const struct test_case *current;
static u64 current_number;

/* --- Running --- */

static void on_crash(int sig)
{
    signal(sig, SIG_DFL);
    printf("not ok %s: %s at case %llu\n", "oracle", strsignal(sig),
           (unsigned long long)current_number);
    if (current) {
        print_code(generator_decoder(generator), current);
        print_state("before", &current->before);
    }
    fflush(stdout);
    raise(sig);
}

static void doppel_run(const struct test_case *c, struct outcome *out)
{
    current = c;
    alarm(20);
    for (unsigned n = 0; n < MAX(options.rounds, 1u); n++)
        guest_run(guest, c, native.shared->images[c->image], out);
    alarm(0);
    current = NULL;
}

/* Whether the case shortened to n instructions still differs. */
static bool differs_when_cut(const struct test_case *c, unsigned n, struct test_case *cut,
                             struct outcome *real, struct outcome *doppel, struct report *report)
{
    struct shared *shared = native.shared;
    struct test_case kept = shared->cases[0];
    struct outcome kept_outcome = shared->outcomes[0];

    *cut = *c;
    cut->code_len = n < c->ncode ? c->starts[n] : c->code_len;
    cut->ncode = (u16)n;
    shared->cases[0] = *cut;
    native_begin(&native, 1);
    native_finish(&native, 1);
    *real = shared->outcomes[0];
    shared->cases[0] = kept;
    shared->outcomes[0] = kept_outcome;
    doppel_run(cut, doppel);
    return !compare(generator_decoder(generator), cut, real, doppel, report);
}

static void report_difference(const struct test_case *c, u64 number, unsigned mode)
{
    static struct outcome real, doppel;
    struct test_case cut = *c;
    struct report report;
    unsigned n = 1;

    while (n <= c->ncode && !differs_when_cut(c, n, &cut, &real, &doppel, &report))
        n++;
    printf("%u-bit case %llu differs:%s\n", mode, (unsigned long long)number,
           n > c->ncode ? " not when it is run again" : "");
    print_code(generator_decoder(generator), &cut);
    if (options.verbose) {
        print_state("before", &cut.before);
        print_state("native", &real.after);
        print_state("doppel", &doppel.after);
    }
    printf("  exception %u, error %#x, cr2 %#llx; differences:\n%s", real.vector, real.error,
           (unsigned long long)real.cr2, report.text);
    for (unsigned i = 0; i < cut.npokes; i++)
        printf("    poke %#x = %llx\n", cut.pokes[i].offset + WINDOW,
               (unsigned long long)cut.pokes[i].value);
    fflush(stdout);
}

static void count_coverage(const struct test_case *c, const struct outcome *o)
{
    ZydisMnemonic mnemonic = mnemonic_at(generator_decoder(generator), c, 0);

    coverage[mnemonic].cases++;
    coverage[mnemonic].completed += o->vector == EXC_DB || o->vector == EXC_BP;
}

static struct random random_for(u64 number, unsigned mode, u64 salt)
{
    struct random r = {options.seed ^ number * 0xd1342543de82ef95 ^ (u64)mode << 56 ^ salt << 48};

    random_next(&r);
    return r;
}

static void make_batch(u64 batch, unsigned mode)
{
    struct random r = random_for(batch, mode, 1);

    generate_images(&r, &host, native.shared->images);
    for (u32 n = 0; n < BATCH; n++) {
        r = random_for(batch * BATCH + n, mode, 2);
        if (options.nbytes)
            generate_case_of(generator, &r, options.bytes, options.nbytes,
                             &native.shared->cases[n]);
        else
            generate_case(generator, &r, &native.shared->cases[n]);
    }
}

/* Runs the cases of one batch that are wanted. */
static void run_batch(u64 batch, unsigned mode, u64 first, u64 end)
{
    static struct outcome doppel[BATCH];
    struct shared *shared = native.shared;
    u32 from = batch * BATCH < first ? (u32)(first - batch * BATCH) : 0;
    u32 to = (u32)MIN((u64)BATCH, end - batch * BATCH);

    make_batch(batch, mode);
    memmove(shared->cases, shared->cases + from, (to - from) * sizeof(shared->cases[0]));
    native_begin(&native, to - from);
    for (u32 n = 0; n < to - from; n++) {
        current_number = batch * BATCH + from + n;
        doppel_run(&shared->cases[n], &doppel[n]);
    }
    native_finish(&native, to - from);
    for (u32 n = 0; n < to - from && errors < options.max_errors; n++) {
        struct report report;

        count_coverage(&shared->cases[n], &shared->outcomes[n]);
        if (!compare(generator_decoder(generator), &shared->cases[n], &shared->outcomes[n],
                     &doppel[n], &report)) {
            errors++;
            report_difference(&shared->cases[n], batch * BATCH + from + n, mode);
        }
    }
}

/* What long runs found: each is run often enough to find it again. */
static const struct {
    unsigned mode, nbytes;
    u8 bytes[15];
    const char *was;
} found[] = {
    {32, 5, "\xc4\xe1\xfb\x93\xe7", "KMOVD ESP, K7 with VEX.W moved 64 bits"},
    {64, 6, "\x2e\x48\x0f\xc7\x0c\xfc",
     "CMPXCHG16B [RSP + 8 * RDI] with EFLAGS.AC raised #GP for #SS"},
    {64, 8, "\x36\xff\xac\x04\x55\x0f\x50\x2b",
     "JMP FAR [RSP + RAX + ...] to 32-bit code, and the next event saved more of RSP than ESP"},
};
#define FOUND_CASES 50000

static void run_found(unsigned mode)
{
    for (unsigned n = 0; n < ARRAY_SIZE(found); n++) {
        if (found[n].mode != mode)
            continue;
        memcpy(options.bytes, found[n].bytes, sizeof(options.bytes));
        options.nbytes = found[n].nbytes;
        for (u64 batch = 0; batch * BATCH < FOUND_CASES && errors < options.max_errors; batch++)
            run_batch(batch, mode, 0, FOUND_CASES);
    }
    options.nbytes = 0;
}

/* Returns how many differ. */
static unsigned run_mode(const char *engine, unsigned mode)
{
    u64 count = options.count ? options.count : 200000;
    u64 end;
    unsigned mnemonics, forms;

    if (!options.count && mode == 32)
        count /= 4;
    end = options.first + count;
    generator = generator_create(mode == 64, options.only, &host);
    if (!generator) {
        printf("not ok %u-bit: no instruction is called %s\n", mode, options.only);
        return 1;
    }
    generator_size(generator, &mnemonics, &forms);
    errors = 0;
    for (u64 batch = options.first / BATCH; batch * BATCH < end && errors < options.max_errors;
         batch++)
        run_batch(batch, mode, options.first, end);
    if (!options.count && !options.only && !options.nbytes)
        run_found(mode);
    printf("# %u-bit: %u mnemonics in %u forms, seed %llu\n", mode, mnemonics, forms,
           (unsigned long long)options.seed);
    if (errors)
        printf("not ok %u-bit user instructions do what the real processor does (%s): %u of %llu "
               "cases differ\n",
               mode, engine, errors, (unsigned long long)count);
    else
        printf("ok %u-bit user instructions do what the real processor does (%s): %llu cases\n",
               mode, engine, (unsigned long long)count);
    generator_destroy(generator);
    return errors;
}

static void print_coverage(void)
{
    for (unsigned n = 0; n <= ZYDIS_MNEMONIC_MAX_VALUE; n++) {
        if (coverage[n].cases)
            printf("# %-20s %6u cases, %6u without a fault\n",
                   ZydisMnemonicGetString((ZydisMnemonic)n), coverage[n].cases,
                   coverage[n].completed);
    }
}

/* --- Set-up --- */

static unsigned parse_bytes(const char *hex)
{
    unsigned n = 0, value;

    while (n < sizeof(options.bytes) && sscanf(hex + 2 * n, "%2x", &value) == 1)
        options.bytes[n++] = (u8)value;
    return n;
}

static u64 parse_seed(const char *text)
{
    struct timespec now;

    if (strcmp(text, "random"))
        return strtoull(text, NULL, 0);
    clock_gettime(CLOCK_REALTIME, &now);
    return (u64)now.tv_sec * 1000 + (u64)now.tv_nsec / 1000000;
}

static int parse_options(int argc, char **argv)
{
    static const struct option known[] = {
        {"blocks", no_argument, NULL, 'B'},        {"rounds", required_argument, NULL, 'r'},
        {"kicks", no_argument, NULL, 'k'},         {"seed", required_argument, NULL, 's'},
        {"count", required_argument, NULL, 'c'},   {"first", required_argument, NULL, 'f'},
        {"mode", required_argument, NULL, 'm'},    {"only", required_argument, NULL, 'o'},
        {"bytes", required_argument, NULL, 'b'},   {"engine", required_argument, NULL, 'e'},
        {"errors", required_argument, NULL, 'n'},  {"coverage", no_argument, NULL, 'C'},
        {"verbose", no_argument, NULL, 'v'},       {"adopt", no_argument, NULL, 'a'},
        {"without", required_argument, NULL, 'w'}, {NULL, 0, NULL, 0},
    };
    const char *seed = getenv("ORACLE_SEED");
    int option;

    options.seed = seed ? parse_seed(seed) : 1;
    while ((option = getopt_long(argc, argv, "", known, NULL)) != -1) {
        switch (option) {
        case 'B':
            options.blocks = true;
            break;
        case 'r':
            options.rounds = (unsigned)atoi(optarg);
            break;
        case 'k':
            options.kicks = true;
            break;
        case 'a':
            options.adopt = true;
            break;
        case 's':
            options.seed = parse_seed(optarg);
            break;
        case 'c':
            options.count = strtoull(optarg, NULL, 0);
            break;
        case 'f':
            options.first = strtoull(optarg, NULL, 0);
            break;
        case 'm':
            options.mode = (unsigned)atoi(optarg);
            break;
        case 'o':
            options.only = optarg;
            break;
        case 'b':
            options.nbytes = parse_bytes(optarg);
            break;
        case 'e':
            options.engine = optarg;
            break;
        case 'n':
            options.max_errors = (unsigned)atoi(optarg);
            break;
        case 'w':
            options.without = optarg;
            break;
        case 'C':
            options.coverage = true;
            break;
        case 'v':
            options.verbose = true;
            break;
        default:
            return -1;
        }
    }
    options.native = argv[optind];
    return optind + 1 == argc ? 0 : -1;
}

static u32 host_mxcsr_mask(void)
{
    _Alignas(16) u8 area[512] = {0};
    u32 mask;

    __asm__ volatile("fxsave %0" : "=m"(area));
    memcpy(&mask, area + 28, 4);
    return mask ? mask : 0xffbf;
}

static u64 host_xcr0(void)
{
    u32 a, b, c, d;

    __cpuid(1, a, b, c, d);
    if (!(c & bit_OSXSAVE))
        return XCR0_X87 | XCR0_SSE;
    __asm__ volatile("xgetbv" : "=a"(a), "=d"(d) : "c"(0));
    return (u64)d << 32 | a;
}

static volatile sig_atomic_t rf_was_set;

static void on_invalid_opcode(int sig, siginfo_t *info, void *context)
{
    greg_t *registers = ((ucontext_t *)context)->uc_mcontext.gregs;

    rf_was_set = !!(registers[REG_EFL] & EFLAGS_RF);
    registers[REG_RIP] += 2; /* past UD2 */
}

static bool host_sets_rf(void)
{
    struct sigaction action = {.sa_sigaction = on_invalid_opcode, .sa_flags = SA_SIGINFO}, before;

    sigaction(SIGILL, &action, &before);
    __asm__ volatile("ud2");
    sigaction(SIGILL, &before, NULL);
    return rf_was_set;
}

/* Each returns how many differ. */
static unsigned run_cases(const char *engine)
{
    struct random random = random_for(0, 0, 3);
    struct error err;
    u8 read_only[PAGE];
    unsigned differ = 0;
    int r;

    generate_read_only(&random, read_only);
    r = native_open(&native, options.native, read_only);
    if (r < 0) {
        printf("not ok oracle: the native side: %s\n", strerror(-r));
        return 1;
    }
    guest = guest_create(engine, &host, read_only, 1, &err);
    if (!guest) {
        printf("not ok oracle: %s\n", err.text);
        native_close(&native);
        return 1;
    }
    if (options.mode != 32)
        differ += run_mode(engine, 64);
    if (options.mode != 64)
        differ += run_mode(engine, 32);
    native_close(&native);
    guest_destroy(guest);
    return differ;
}

static unsigned run_all_blocks(const char *engine)
{
    struct block_options o = {
        .native = options.native,
        .engine = engine,
        .host = host,
        .seed = options.seed,
        .first = options.first,
        .rounds = options.rounds ? options.rounds : 4,
        .max_errors = options.max_errors,
        .kicks = options.kicks,
        .ncpus = options.adopt ? 2 : 1,
        .coverage = options.coverage,
        .verbose = options.verbose,
    };
    unsigned differ = 0;

    for (o.mode = 64; o.mode >= 32; o.mode -= 32) {
        o.count = options.count ? options.count : o.mode == 64 ? 5000 : 2500;
        if (!options.mode || options.mode == o.mode)
            differ += run_blocks(&o);
    }
    return differ;
}

int main(int argc, char **argv)
{
    static const int crashes[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT, SIGALRM};
    const char *engine;
    unsigned differ = 0;

    if (parse_options(argc, argv) < 0) {
        fprintf(stderr, "usage: oracle [options] NATIVE (see the head of oracle.c)\n");
        return 2;
    }
    printf("# seed %llu\n", (unsigned long long)options.seed);
    host = (struct host){.mxcsr_mask = host_mxcsr_mask(),
                         .xcr0 = host_xcr0(),
                         .sets_rf = host_sets_rf(),
                         .without = options.without};
    if (!host.sets_rf)
        printf("# this processor never sets RF: it isn't compared\n");
    /* Before the first engine, which puts its own handlers in front of these for good. */
    for (unsigned n = 0; n < ARRAY_SIZE(crashes); n++)
        signal(crashes[n], on_crash);
    for (unsigned n = 0; (engine = options.engine ? options.engine : guest_engine(n)); n++) {
        differ += options.blocks ? run_all_blocks(engine) : run_cases(engine);
        if (options.engine)
            break;
    }
    if (options.coverage && !options.blocks)
        print_coverage();
    return differ != 0;
}
