/* A kernel for firmware: the items of fw_cfg that it becomes, and files that are none. Each file is a memfd. */
#define _GNU_SOURCE /* memfd_create */
#include "device_rig.h"
#include "machine/firmware.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cmocka.h>

#define PORT 0x510
#define KERNEL_SIZE 2000u
#define SETUP_SECTS 2u /* beyond the boot sector */
#define SETUP_SIZE ((SETUP_SECTS + 1) * 512u)

struct fixture {
    struct rig *rig;
    struct fw_cfg *fw;
    struct firmware_kernel kernel;
    u8 image[KERNEL_SIZE];
    int fds[2];
    char kernel_path[32], initrd_path[32];
};

static int setup(void **state)
{
    struct fixture *f = calloc(1, sizeof(*f));
    struct fw_cfg_config cfg = {.port = PORT};

    *state = f;
    f->rig = rig_create();
    f->fw = fw_cfg_create(&f->rig->env, &cfg, &f->rig->err);
    for (unsigned i = 0; i < KERNEL_SIZE; i++)
        f->image[i] = (u8)(i * 7);
    f->image[0x1f1] = SETUP_SECTS;
    f->image[0x1fe] = 0x55;
    f->image[0x1ff] = 0xaa;
    for (unsigned i = 0; i < 4; i++)
        f->image[0x202 + i] = (u8) "HdrS"[i];
    for (unsigned i = 0; i < 2; i++)
        f->fds[i] = memfd_create("image", MFD_CLOEXEC);
    snprintf(f->kernel_path, sizeof(f->kernel_path), "/proc/self/fd/%d", f->fds[0]);
    snprintf(f->initrd_path, sizeof(f->initrd_path), "/proc/self/fd/%d", f->fds[1]);
    return f->fw ? 0 : -1;
}

static int teardown(void **state)
{
    struct fixture *f = *state;

    fw_cfg_device(f->fw)->ops->destroy(fw_cfg_device(f->fw));
    firmware_kernel_close(&f->kernel);
    for (unsigned i = 0; i < 2; i++)
        close(f->fds[i]);
    rig_destroy(f->rig);
    free(f);
    return 0;
}

static int open_kernel(struct fixture *f, u64 size, const char *initrd)
{
    assert_int_equal(ftruncate(f->fds[0], 0), 0);
    assert_int_equal(pwrite(f->fds[0], f->image, size, 0), (ssize_t)size);
    return firmware_kernel_open(&f->kernel, f->kernel_path, initrd, "console=ttyS0", &f->rig->err);
}

static void read_item(struct fixture *f, u16 key, void *buf, u32 n)
{
    u8 *p = buf;

    io_bus_write(f->rig->env.ports, PORT, key, 2);
    while (n--)
        *p++ = (u8)io_bus_read(f->rig->env.ports, PORT + 1, 1);
}

static u32 read_size(struct fixture *f, u16 key)
{
    u32 size;

    read_item(f, key, &size, sizeof(size));
    return size;
}

static void kernel_is_in_two_parts(void **state)
{
    struct fixture *f = *state;
    u8 buf[KERNEL_SIZE];

    assert_int_equal(pwrite(f->fds[1], "initrd", 6, 0), 6);
    assert_int_equal(open_kernel(f, KERNEL_SIZE, f->initrd_path), 0);
    assert_int_equal(firmware_kernel_add(&f->kernel, f->fw, &f->rig->err), 0);
    assert_int_equal(read_size(f, FW_CFG_SETUP_SIZE), SETUP_SIZE);
    read_item(f, FW_CFG_SETUP_DATA, buf, SETUP_SIZE);
    assert_memory_equal(buf, f->image, SETUP_SIZE);
    assert_int_equal(read_size(f, FW_CFG_KERNEL_SIZE), KERNEL_SIZE - SETUP_SIZE);
    read_item(f, FW_CFG_KERNEL_DATA, buf, KERNEL_SIZE - SETUP_SIZE);
    assert_memory_equal(buf, f->image + SETUP_SIZE, KERNEL_SIZE - SETUP_SIZE);
    assert_int_equal(read_size(f, FW_CFG_INITRD_SIZE), 6);
    read_item(f, FW_CFG_INITRD_DATA, buf, 6);
    assert_memory_equal(buf, "initrd", 6);
    assert_int_equal(read_size(f, FW_CFG_CMDLINE_SIZE), 14);
    read_item(f, FW_CFG_CMDLINE_DATA, buf, 14);
    assert_string_equal((char *)buf, "console=ttyS0");
}

static void without_a_kernel_there_are_no_items(void **state)
{
    struct fixture *f = *state;

    assert_int_equal(firmware_kernel_add(&f->kernel, f->fw, &f->rig->err), 0);
    assert_int_equal(read_size(f, FW_CFG_KERNEL_SIZE), 0);
    assert_int_equal(read_size(f, FW_CFG_CMDLINE_SIZE), 0);
}

static void setup_of_no_sectors_has_four(void **state)
{
    struct fixture *f = *state;

    f->image[0x1f1] = 0;
    assert_int_not_equal(open_kernel(f, KERNEL_SIZE, NULL), 0);
    assert_non_null(strstr(f->rig->err.text, "truncated"));
}

static void other_files_are_refused(void **state)
{
    struct fixture *f = *state;

    assert_int_not_equal(open_kernel(f, SETUP_SIZE, NULL), 0);
    assert_non_null(strstr(f->rig->err.text, "truncated"));
    firmware_kernel_close(&f->kernel);
    assert_int_not_equal(open_kernel(f, 16, NULL), 0);
    assert_non_null(strstr(f->rig->err.text, "no Linux bzImage"));
    firmware_kernel_close(&f->kernel);
    assert_int_not_equal(open_kernel(f, KERNEL_SIZE, "/missing/initrd"), 0);
    assert_non_null(strstr(f->rig->err.text, "/missing/initrd"));
    assert_int_equal(f->rig->err.class, ERROR_INPUT);
}

static void bios_takes_no_kernel(void **state)
{
    struct fixture *f = *state;
    struct firmware_config config = {.what = "bios", .kernel = "vmlinuz", .cmdline = ""};
    struct firmware fw;

    assert_int_not_equal(firmware_open(&fw, &config, &f->rig->err), 0);
    assert_int_equal(f->rig->err.class, ERROR_INPUT);
    assert_non_null(strstr(f->rig->err.text, "give uefi"));
    firmware_close(&fw);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(kernel_is_in_two_parts, setup, teardown),
        cmocka_unit_test_setup_teardown(without_a_kernel_there_are_no_items, setup, teardown),
        cmocka_unit_test_setup_teardown(setup_of_no_sectors_has_four, setup, teardown),
        cmocka_unit_test_setup_teardown(other_files_are_refused, setup, teardown),
        cmocka_unit_test_setup_teardown(bios_takes_no_kernel, setup, teardown),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
