#include "bus/memory.h"

#include <setjmp.h>
#include <stdarg.h>
#include <string.h>

#include <cmocka.h>

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <sys/mman.h>

static struct guest_memory memory;
static struct error err;

static struct {
    unsigned calls;
    gpa_t gpa[4];
    u64 len[4];
} told;

static void note_write(void *opaque, gpa_t gpa, u64 len)
{
    assert_in_range(told.calls, 0, 3);
    told.gpa[told.calls] = gpa;
    told.len[told.calls++] = len;
}

/* Two adjacent slots, the second a ROM, then a hole, then one more. Added out of order. */
static int setup(void **state)
{
    memset(&memory, 0, sizeof(memory));
    memset(&told, 0, sizeof(told));
    if (memory_add_slot(&memory, 0x10000, 0x2000, 0, &err) < 0 ||
        memory_add_slot(&memory, 0x1000, 0x1000, MEMORY_ROM, &err) < 0 ||
        memory_add_slot(&memory, 0, 0x1000, 0, &err) < 0)
        return -1;
    memory.listener = (struct memory_listener){.written = note_write};
    return 0;
}

static int teardown(void **state)
{
    memory_destroy(&memory);
    return 0;
}

static void slots_are_sorted_and_zeroed(void **state)
{
    u8 buf[0x1000], zeros[0x1000] = {0};

    assert_int_equal(memory.nslots, 3);
    for (unsigned i = 1; i < memory.nslots; i++)
        assert_true(memory.slots[i - 1].gpa < memory.slots[i].gpa);
    assert_int_equal(memory_read(&memory, 0x11000, buf, sizeof(buf)), 0);
    assert_memory_equal(buf, zeros, sizeof(buf));
}

/* Both mappings of a slot's part of the file show the same bytes, and no other slot's. */
static void a_file_can_be_mapped_again(void **state)
{
    struct guest_memory m = {0};
    const struct memory_slot *slot;
    u8 *again;

    assert_int_equal(memory_use_file(&m, false, &err), 0);
    assert_int_equal(memory_add_slot(&m, 0, 0xa0000, 0, &err), 0);
    assert_int_equal(memory_add_slot(&m, 0x100000, 0x300000, 0, &err), 0);
    slot = memory_find(&m, 0x200000);
    assert_int_equal(((u64)(uintptr_t)slot->host - slot->gpa) % MIB(2), 0);
    assert_int_equal((slot->fd_offset - slot->gpa) % MIB(2), 0);
    again =
        mmap(NULL, slot->size, PROT_READ | PROT_WRITE, MAP_SHARED, m.fd, (off_t)slot->fd_offset);
    assert_ptr_not_equal(again, MAP_FAILED);
    assert_int_equal(memory_write(&m, 0x200000, "there", 5), 0);
    assert_int_equal(memory_write(&m, 0, "here", 4), 0);
    assert_memory_equal(again + 0x100000, "there", 5);
    again[0] = 'x';
    assert_memory_equal(memory_host(&m, 0, 4), "here", 4);
    assert_memory_equal(memory_host(&m, 0x100000, 1), "x", 1);
    munmap(again, slot->size);
    memory_destroy(&m);
    assert_int_equal(fcntl(m.fd, F_GETFD), -1);
}

static void bad_slots_are_refused(void **state)
{
    static const struct {
        gpa_t gpa;
        u64 size;
    } bad[] = {
        {0x20000, 0},         {0x20001, 0x1000},     {0x20000, 0x1001},  {0, 0x1000},
        {0x11000, 0x1000},    {0xf000, 0x2000},      {0x2000, 0x100000}, {-0x1000ULL, 0x2000},
        {0x1000, -0x1000ULL}, {0x20000, 1ULL << 62},
    };

    for (unsigned i = 0; i < ARRAY_SIZE(bad); i++)
        assert_true(memory_add_slot(&memory, bad[i].gpa, bad[i].size, 0, &err) < 0);
    assert_int_equal(memory.nslots, 3);
}

static void there_is_a_limit_to_the_slots(void **state)
{
    for (gpa_t gpa = 0x100000; memory.nslots < MEMORY_MAX_SLOTS; gpa += 0x2000)
        assert_int_equal(memory_add_slot(&memory, gpa, 0x1000, 0, &err), 0);
    assert_int_equal(memory_add_slot(&memory, 0x8000, 0x1000, 0, &err), -EINVAL);
    assert_int_equal(err.class, ERROR_INPUT);
}

static void find_knows_the_edges(void **state)
{
    assert_ptr_equal(memory_find(&memory, 0), &memory.slots[0]);
    assert_ptr_equal(memory_find(&memory, 0xfff), &memory.slots[0]);
    assert_ptr_equal(memory_find(&memory, 0x1000), &memory.slots[1]);
    assert_null(memory_find(&memory, 0x2000));
    assert_null(memory_find(&memory, 0xffff));
    assert_ptr_equal(memory_find(&memory, 0x11fff), &memory.slots[2]);
    assert_null(memory_find(&memory, 0x12000));
    assert_null(memory_find(&memory, UINT64_MAX));
}

static void a_host_pointer_covers_all_or_is_null(void **state)
{
    assert_ptr_equal(memory_host(&memory, 0x10010, 0x1ff0), memory.slots[2].host + 0x10);
    assert_null(memory_host(&memory, 0x10010, 0x1ff1));
    assert_null(memory_host(&memory, 0x10010, UINT64_MAX));
    assert_null(memory_host(&memory, 0x10010, -0x10010ULL));
    assert_null(memory_host(&memory, 0xff8, 16));
    assert_null(memory_host(&memory, 0x2000, 0));
}

static void copies_cross_adjacent_slots(void **state)
{
    u8 out[16], in[16] = "0123456789abcde";

    assert_int_equal(memory_write(&memory, 0xff8, in, sizeof(in)), 0);
    assert_int_equal(memory_read(&memory, 0xff8, out, sizeof(out)), 0);
    assert_memory_equal(in, out, sizeof(in));
    assert_memory_equal(memory.slots[1].host, in + 8, 8);
}

static void the_listener_hears_of_each_slots_part(void **state)
{
    u8 in[16] = {0};

    assert_int_equal(memory_write(&memory, 0xff8, in, sizeof(in)), 0);
    assert_int_equal(told.calls, 2);
    assert_int_equal(told.gpa[0], 0xff8);
    assert_int_equal(told.len[0], 8);
    assert_int_equal(told.gpa[1], 0x1000);
    assert_int_equal(told.len[1], 8);
    assert_int_equal(memory_read(&memory, 0xff8, in, sizeof(in)), 0);
    assert_int_equal(told.calls, 2);
}

static void nothing_is_copied_when_a_byte_is_outside(void **state)
{
    u8 in[16], out[16], before[16];

    memset(in, 0xaa, sizeof(in));
    memset(out, 0x55, sizeof(out));
    memcpy(before, out, sizeof(out));
    assert_int_equal(memory_write(&memory, 0x1ff8, in, sizeof(in)), -EFAULT);
    assert_int_equal(memory.slots[1].host[0xff8], 0);
    assert_int_equal(memory_read(&memory, 0x1ff8, out, sizeof(out)), -EFAULT);
    assert_memory_equal(out, before, sizeof(out));
    assert_int_equal(memory_read(&memory, 0x11ff1, out, sizeof(out)), -EFAULT);
    assert_int_equal(told.calls, 0);
}

static void lengths_that_overflow_are_outside(void **state)
{
    u8 byte = 0;

    assert_int_equal(memory_read(&memory, 0, &byte, UINT64_MAX), -EFAULT);
    assert_int_equal(memory_write(&memory, 0x10000, &byte, -0x10000ULL), -EFAULT);
    assert_int_equal(memory_write(&memory, UINT64_MAX, &byte, 1), -EFAULT);
    assert_int_equal(memory_write(&memory, UINT64_MAX, &byte, UINT64_MAX), -EFAULT);
    assert_int_equal(memory_read(&memory, 0x5000, &byte, 0), 0);
}

static void memory_at_the_top_does_not_wrap_to_the_bottom(void **state)
{
    u8 buf[16];

    assert_int_equal(memory_add_slot(&memory, -0x1000ULL, 0x1000, 0, &err), 0);
    assert_int_equal(memory_read(&memory, -16ULL, buf, 16), 0);
    assert_int_equal(memory_read(&memory, -15ULL, buf, 16), -EFAULT);
}

/* Whether the mapping that holds `at` has this word among its VmFlags (proc(5), smaps). */
static bool has_vm_flag(const u8 *at, const char *flag)
{
    FILE *smaps = fopen("/proc/self/smaps", "re");
    u64 begin = 0, end = 0, b, e;
    bool found = false;
    char line[512];

    assert_non_null(smaps);
    while (fgets(line, sizeof(line), smaps)) {
        if (sscanf(line, "%" SCNx64 "-%" SCNx64 " ", &b, &e) == 2) {
            begin = b;
            end = e;
        }
        if ((u64)(uintptr_t)at >= begin && (u64)(uintptr_t)at < end &&
            !strncmp(line, "VmFlags:", 8))
            found = strstr(line, flag) != NULL;
    }
    fclose(smaps);
    return found;
}

/* So that KVM and the host's processor can use huge pages, whatever the guest address. */
static void host_addresses_are_congruent_to_the_guests(void **state)
{
    struct guest_memory m = {0};

    assert_int_equal(memory_add_slot(&m, 0xc0000, 0x1000000, 0, &err), 0);
    assert_int_equal(((u64)(uintptr_t)m.slots[0].host - 0xc0000) % MIB(2), 0);
    memory_destroy(&m);
}

#if defined(__SANITIZE_ADDRESS__)
#define MLOCK_WORKS                                                                                \
    false /* the sanitizer makes nothing of it, for its own memory is too large to be locked */
#elif defined(__has_feature)
#define MLOCK_WORKS !__has_feature(address_sanitizer)
#else
#define MLOCK_WORKS true
#endif

static void options_are_told_to_the_host(void **state)
{
    struct guest_memory m = {.options = {.locked = true}};

    assert_int_equal(memory_add_slot(&m, 0, 0x10000, 0, &err), 0);
    assert_true(!MLOCK_WORKS || has_vm_flag(m.slots[0].host, " lo"));
    m.options = (struct memory_options){.mergeable = true};
    if (memory_add_slot(&m, 0x10000, 0x10000, 0, &err)) /* no KSM in this kernel */
        assert_non_null(strstr(err.text, "mergeable=on"));
    else
        assert_true(has_vm_flag(m.slots[1].host, " mg"));
    memory_destroy(&m);
}

/* The host may have any number of huge pages; few tests' hosts have some. */
static void huge_pages_are_had_or_missed_by_name(void **state)
{
    struct guest_memory m = {.options = {.hugepages = true}};

    assert_int_equal(memory_add_slot(&m, 0, 0xa0000, 0, &err), 0);
    assert_false(m.slots[0].huge);
    if (memory_add_slot(&m, 0xc0000, MIB(4), 0, &err)) {
        assert_int_equal(err.class, ERROR_HOST);
        assert_non_null(strstr(err.text, "hugepages=on"));
        assert_non_null(strstr(err.text, "vm.nr_hugepages"));
    } else {
        u8 *host = m.slots[1].host;

        assert_true(has_vm_flag(host, " ht"));
        host[0] = host[MIB(4) - 1] = 1;
        assert_false(memory_discard(&m, host, 4096));
        assert_true(memory_discard(&m, host + MIB(2) - 0xc0000, MIB(2)));
        assert_int_equal(host[0], 1);
        assert_int_equal(host[MIB(4) - 1], 1);
    }
    memory_destroy(&m);
}

#define TEST(fn) cmocka_unit_test_setup_teardown(fn, setup, teardown)

int main(void)
{
    const struct CMUnitTest tests[] = {
        TEST(slots_are_sorted_and_zeroed),
        TEST(bad_slots_are_refused),
        TEST(there_is_a_limit_to_the_slots),
        TEST(find_knows_the_edges),
        TEST(a_host_pointer_covers_all_or_is_null),
        TEST(copies_cross_adjacent_slots),
        TEST(the_listener_hears_of_each_slots_part),
        TEST(nothing_is_copied_when_a_byte_is_outside),
        TEST(lengths_that_overflow_are_outside),
        TEST(memory_at_the_top_does_not_wrap_to_the_bottom),
        TEST(a_file_can_be_mapped_again),
        TEST(host_addresses_are_congruent_to_the_guests),
        TEST(options_are_told_to_the_host),
        TEST(huge_pages_are_had_or_missed_by_name),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
