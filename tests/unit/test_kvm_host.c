/*
 * What is said of a host whose KVM isn't there, isn't allowed, is too old, or doesn't work. /dev/kvm is played by this
 * file: the linker gives it the engine's calls of open and ioctl.
 */
#define _GNU_SOURCE /* memfd_create */
#include "engine/kvm/kvm.h"

#include <errno.h>
#include <fcntl.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include <cmocka.h>

#define RUN_SIZE 0x3000

/* What the host does. */
static int open_error;       /* 0: none */
static int version;          /* of the API */
static unsigned missing_cap; /* 0: none is */
static enum {
    RUN_HANGS,  /* until a signal */
    RUN_WRONG,  /* the guest's result isn't right */
    RUN_LEAVES, /* for a reason that the guest gives none for */
} run_mode;
static unsigned runs;
static struct kvm_run *run;

int __wrap_open64(const char *path, int flags, ...);
int __wrap_ioctl(int fd, unsigned long request, void *arg);
int __real_open64(const char *path, int flags, ...);

int __wrap_open64(const char *path, int flags, ...)
{
    if (strcmp(path, "/dev/kvm"))
        return __real_open64(path, flags);
    errno = open_error;
    return open_error ? -1 : __real_open64("/dev/null", O_RDWR | O_CLOEXEC);
}

static int new_vcpu(void)
{
    int fd = memfd_create("vcpu", MFD_CLOEXEC);

    assert_int_equal(ftruncate(fd, RUN_SIZE), 0);
    run = mmap(NULL, RUN_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    assert_ptr_not_equal(run, MAP_FAILED);
    return fd;
}

/* Takes processor time until the signal comes that is to end KVM_RUN. */
static int hang(void)
{
    sigset_t kick, old, pending;

    sigemptyset(&kick);
    sigaddset(&kick, KVM_KICK_SIGNAL);
    sigprocmask(SIG_BLOCK, &kick, &old);
    do
        sigpending(&pending);
    while (!sigismember(&pending, KVM_KICK_SIGNAL));
    sigprocmask(SIG_SETMASK, &old, NULL);
    errno = EINTR;
    return -1;
}

static int run_guest(void)
{
    runs++;
    if (run_mode == RUN_HANGS)
        return hang();
    run->exit_reason = run_mode == RUN_WRONG ? KVM_EXIT_IO : KVM_EXIT_HLT;
    run->io.port = 0x80;
    run->io.data_offset = sizeof(*run);
    return 0;
}

int __wrap_ioctl(int fd, unsigned long request, void *arg)
{
    switch (request) {
    case KVM_GET_API_VERSION:
        return version;
    case KVM_CHECK_EXTENSION:
        return (unsigned long)arg != missing_cap;
    case KVM_CREATE_VM:
        return __real_open64("/dev/null", O_RDWR | O_CLOEXEC);
    case KVM_CREATE_VCPU:
        return new_vcpu();
    case KVM_GET_VCPU_MMAP_SIZE:
        return RUN_SIZE;
    case KVM_RUN:
        return run_guest();
    default: /* what sets something */
        return 0;
    }
}

static int host_of(void **state)
{
    open_error = 0;
    version = KVM_API_VERSION;
    missing_cap = 0;
    runs = 0;
    return 0;
}

static void assert_refused(int error, const char *words)
{
    struct error err = {0};

    assert_int_equal(kvm_host_open(&err), -error);
    assert_int_equal(err.class, ERROR_HOST);
    assert_non_null(strstr(err.text, words));
    assert_null(strchr(err.text, '\n'));
}

static void a_missing_device_is_told(void **state)
{
    open_error = ENOENT;
    assert_refused(ENOENT, "no /dev/kvm");
    assert_int_equal(kvm_host_max_vcpus(), 1);
}

static void a_missing_permission_is_told(void **state)
{
    open_error = EACCES;
    assert_refused(EACCES, "no permission for /dev/kvm: join the group kvm");
}

static void an_old_kernel_is_told_by_version(void **state)
{
    version = 10;
    assert_refused(ENOSYS, "API version 10, not 12");
}

static void a_missing_capability_is_named(void **state)
{
    static const struct {
        unsigned cap;
        const char *name;
    } caps[] = {
#define CAP(cap) {cap, #cap}
        CAP(KVM_CAP_USER_MEMORY),
        CAP(KVM_CAP_READONLY_MEM),
        CAP(KVM_CAP_EXT_CPUID),
        CAP(KVM_CAP_SPLIT_IRQCHIP),
        CAP(KVM_CAP_IRQ_ROUTING),
        CAP(KVM_CAP_SIGNAL_MSI),
        CAP(KVM_CAP_IRQFD),
        CAP(KVM_CAP_IOEVENTFD),
        CAP(KVM_CAP_IOEVENTFD_ANY_LENGTH),
        CAP(KVM_CAP_X2APIC_API),
        CAP(KVM_CAP_TSC_DEADLINE_TIMER),
        CAP(KVM_CAP_MP_STATE),
        CAP(KVM_CAP_USER_NMI),
        CAP(KVM_CAP_VCPU_EVENTS),
        CAP(KVM_CAP_DEBUGREGS),
        CAP(KVM_CAP_XSAVE),
        CAP(KVM_CAP_XCRS),
        CAP(KVM_CAP_SREGS2),
        CAP(KVM_CAP_MCE),
        CAP(KVM_CAP_ADJUST_CLOCK),
        CAP(KVM_CAP_VCPU_ATTRIBUTES),
        CAP(KVM_CAP_IMMEDIATE_EXIT),
        CAP(KVM_CAP_SET_TSS_ADDR),
        CAP(KVM_CAP_SET_IDENTITY_MAP_ADDR),
        CAP(KVM_CAP_X86_USER_SPACE_MSR),
#undef CAP
    };

    for (size_t i = 0; i < ARRAY_SIZE(caps); i++) {
        char words[64] = "this kernel's KVM lacks ";

        missing_cap = caps[i].cap;
        strcat(words, caps[i].name);
        assert_refused(ENOSYS, words);
    }
}

/* The trial's time is processor time, so this ends no matter how busy the host is. */
static void a_guest_that_hangs_is_ended(void **state)
{
    struct error err = {0};

    run_mode = RUN_HANGS;
    assert_int_equal(kvm_trial(&err), -ETIME);
    assert_non_null(strstr(err.text, "KVM hangs in a 64-bit guest"));
    assert_int_equal(runs, 1);
}

static void a_guest_that_goes_wrong_is_told(void **state)
{
    struct error err = {0};

    run_mode = RUN_WRONG;
    assert_int_equal(kvm_trial(&err), -EIO);
    assert_non_null(strstr(err.text, "computes wrongly"));
    run_mode = RUN_LEAVES;
    assert_int_equal(kvm_trial(&err), -EIO);
    assert_non_null(strstr(err.text, "fails in a small 64-bit guest"));
    assert_int_equal(runs, 2);
}

/* What is said on stderr while `name` is looked for, and the engine found. */
static const struct engine_ops *choose(const char *name, char *said, size_t size)
{
    int to = memfd_create("said", MFD_CLOEXEC), saved = dup(STDERR_FILENO);
    const struct engine_ops *found;
    struct engine_checks checks;
    struct error err = {0};
    ssize_t n;

    dup2(to, STDERR_FILENO);
    found = engine_choose(name, &checks, &err);
    dup2(saved, STDERR_FILENO);
    n = pread(to, said, size - 1, 0);
    said[MAX(n, 0)] = '\0';
    close(saved);
    close(to);
    return found;
}

static u64 cpu_ms(void)
{
    struct timespec ts;

    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &ts);
    return (u64)ts.tv_sec * 1000 + (u64)ts.tv_nsec / 1000000;
}

static void auto_says_why_in_one_line_and_soon(void **state)
{
    u64 begin = cpu_ms();
    char said[256];

    run_mode = RUN_HANGS;
    assert_ptr_equal(choose("auto", said, sizeof(said)), &engine_bt);
    assert_true(cpu_ms() - begin < 50);
    assert_string_equal(said,
                        "doppel: info: engine kvm can't run here: KVM hangs in a 64-bit guest that "
                        "computes for a millisecond: Timer expired\n");
    /* A host without the device has nothing to be told of. */
    open_error = ENOENT;
    assert_ptr_equal(choose("auto", said, sizeof(said)), &engine_bt);
    assert_string_equal(said, "");
}

static void auto_takes_another_engine_then(void **state)
{
    struct engine_checks checks;
    struct error err = {0};

    run_mode = RUN_HANGS;
    assert_ptr_equal(engine_choose("auto", &checks, &err), &engine_bt);
    assert_int_equal(runs, 1); /* one try, of 10 ms */
    open_error = EACCES;
    assert_ptr_equal(engine_choose("auto", &checks, &err), &engine_bt);
    assert_null(engine_choose("kvm", &checks, &err));
    assert_int_equal(err.class, ERROR_HOST);
}

int main(void)
{
#define TEST(f) cmocka_unit_test_setup(f, host_of)
    const struct CMUnitTest tests[] = {
        TEST(a_missing_device_is_told),         TEST(a_missing_permission_is_told),
        TEST(an_old_kernel_is_told_by_version), TEST(a_missing_capability_is_named),
        TEST(a_guest_that_hangs_is_ended),      TEST(a_guest_that_goes_wrong_is_told),
        TEST(auto_takes_another_engine_then),   TEST(auto_says_why_in_one_line_and_soon),
    };
#undef TEST

    return cmocka_run_group_tests(tests, NULL, NULL);
}
