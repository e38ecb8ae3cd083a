/* VGA: text that is read back, planar writes, the DAC, VBE modes and their limits, pictures, ROM, state. */
#include "pci_rig.h"

#include <setjmp.h>
#include <stdarg.h>

#include <cmocka.h>

#include "device/vga.h"

#define DEVFN PCI_DEVFN(1, 0)
#define FRAMEBUFFER 0xe0000000ULL

static const u8 rom[1024] = {0x55, 0xaa, 2};

struct fixture {
    struct rig *rig;
    struct pci_host *host;
    struct vga *vga;
};

static void create(struct fixture *f)
{
    struct vga_config config = {rom, sizeof(rom)};

    f->rig = rig_create();
    f->host = rig_pci_host(f->rig);
    f->vga = vga_create(&f->rig->env, &config, f->host, DEVFN, &f->rig->err);
    assert_non_null(f->vga);
}

static void destroy(struct fixture *f)
{
    vga_device(f->vga)->ops->destroy(vga_device(f->vga));
    pci_host_device(f->host)->ops->destroy(pci_host_device(f->host));
    rig_destroy(f->rig);
}

static int setup(void **state)
{
    struct fixture *f = calloc(1, sizeof(*f));

    create(f);
    *state = f;
    return 0;
}

static int teardown(void **state)
{
    destroy(*state);
    free(*state);
    return 0;
}

static void out(struct fixture *f, u16 port, u8 value)
{
    io_bus_write(f->rig->env.ports, port, value, 1);
}

static u8 in(struct fixture *f, u16 port)
{
    return (u8)io_bus_read(f->rig->env.ports, port, 1);
}

/* An index and its data, as one 16-bit write. */
static void set(struct fixture *f, u16 port, u8 index, u8 value)
{
    io_bus_write(f->rig->env.ports, port, index | value << 8, 2);
}

static void vbe(struct fixture *f, u16 index, u16 value)
{
    io_bus_write(f->rig->env.ports, 0x1ce, index, 2);
    io_bus_write(f->rig->env.ports, 0x1cf, value, 2);
}

static u16 get_vbe(struct fixture *f, u16 index)
{
    io_bus_write(f->rig->env.ports, 0x1ce, index, 2);
    return (u16)io_bus_read(f->rig->env.ports, 0x1cf, 2);
}

static void poke(struct fixture *f, gpa_t at, u64 value, unsigned size)
{
    io_bus_write(f->rig->env.mmio, at, value, size);
}

static u64 peek(struct fixture *f, gpa_t at, unsigned size)
{
    return io_bus_read(f->rig->env.mmio, at, size);
}

/* Mode 3, 80 by 25, as far as it shows. */
static void text_mode(struct fixture *f)
{
    set(f, 0x3c4, 1, 0x01);
    set(f, 0x3c4, 2, 0x03);
    set(f, 0x3c4, 4, 0x02);
    set(f, 0x3ce, 5, 0x10);
    set(f, 0x3ce, 6, 0x0e);
    set(f, 0x3d4, 0x11, 0x0e);
    set(f, 0x3d4, 0x01, 79);
    set(f, 0x3d4, 0x07, 0x1f);
    set(f, 0x3d4, 0x09, 0x4f);
    set(f, 0x3d4, 0x0a, 0x20); /* no cursor */
    set(f, 0x3d4, 0x12, 0x8f);
    set(f, 0x3d4, 0x13, 40);
    in(f, 0x3da);
    for (u8 i = 0; i < 16; i++) {
        out(f, 0x3c0, i);
        out(f, 0x3c0, i);
    }
    out(f, 0x3c0, 0x12);
    out(f, 0x3c0, 0x0f);
    out(f, 0x3c0, 0x20);
    out(f, 0x3c8, 7);
    for (unsigned i = 0; i < 3; i++)
        out(f, 0x3c9, 0x2a);
}

static void text_can_be_read(void **state)
{
    struct fixture *f = *state;
    char *text;

    text_mode(f);
    poke(f, 0xb8000, 0x0769074800000000ULL >> 32, 4);
    poke(f, 0xb8000 + 2 * 81, 0x07c4, 2);
    assert_int_equal(peek(f, 0xb8000, 4), 0x07690748);
    text = vga_text(f->vga, &f->rig->err);
    assert_memory_equal(text, "Hi\n \xe2\x94\x80\n\n", 9);
    free(text);
    set(f, 0x3d4, 0x0d, 80); /* the screen begins at the second row */
    text = vga_text(f->vga, &f->rig->err);
    assert_memory_equal(text, " \xe2\x94\x80\n\n", 6);
    free(text);
}

static void characters_are_drawn_with_the_guests_font(void **state)
{
    struct fixture *f = *state;
    struct vga_image image;

    text_mode(f);
    set(f, 0x3c4, 2, 0x04); /* plane 2, planar */
    set(f, 0x3c4, 4, 0x06);
    set(f, 0x3ce, 5, 0x00);
    poke(f, 0xb8000, 0, 1); /* outside of the font: the window is at B8000 */
    set(f, 0x3ce, 6, 0x04);
    set(f, 0x3ce, 8, 0xff);
    poke(f, 0xa0000 + 'A' * 32, 0x81, 1);
    set(f, 0x3c4, 2, 0x03);
    set(f, 0x3c4, 4, 0x02);
    set(f, 0x3ce, 5, 0x10);
    set(f, 0x3ce, 6, 0x0e);
    poke(f, 0xb8000, 0x0741, 2);
    assert_int_equal(vga_render(f->vga, &image, &f->rig->err), 0);
    assert_int_equal(image.width, 80 * 8);
    assert_int_equal(image.height, 400);
    assert_int_equal(image.pixels[0], 0xaaaaaa);
    assert_int_equal(image.pixels[1], 0);
    assert_int_equal(image.pixels[7], 0xaaaaaa);
    vga_image_free(&image);
}

static void planes_are_written_by_mask_latch_and_function(void **state)
{
    struct fixture *f = *state;

    set(f, 0x3c4, 2, 0x0f);
    set(f, 0x3c4, 4, 0x06);
    set(f, 0x3ce, 6, 0x05);
    set(f, 0x3ce, 8, 0xff);
    poke(f, 0xa0010, 0x3c, 1);
    set(f, 0x3ce, 8, 0xf0); /* only the high nibble */
    set(f, 0x3ce, 0, 0x05);
    set(f, 0x3ce, 1, 0x0f);
    assert_int_equal(peek(f, 0xa0010, 1), 0x3c);
    poke(f, 0xa0010, 0x00, 1); /* set/reset: 1 in planes 0 and 2 */
    set(f, 0x3ce, 4, 0);
    assert_int_equal(peek(f, 0xa0010, 1), 0xfc);
    set(f, 0x3ce, 4, 1);
    assert_int_equal(peek(f, 0xa0010, 1), 0x0c);
    set(f, 0x3ce, 5, 0x01); /* the latches */
    poke(f, 0xa0011, 0x99, 1);
    set(f, 0x3ce, 5, 0x08); /* read mode 1: where the colour is 5 */
    set(f, 0x3ce, 2, 0x05);
    set(f, 0x3ce, 7, 0x0f);
    assert_int_equal(peek(f, 0xa0011, 1), 0xf0);
}

static void vbe_modes_fit_the_memory(void **state)
{
    struct fixture *f = *state;
    struct vga_image image;

    assert_int_equal(get_vbe(f, 0), 0xb0c5);
    vbe(f, 1, 640);
    vbe(f, 2, 480);
    vbe(f, 3, 32);
    vbe(f, 4, 0x41);
    config_write(f->rig, DEVFN, PCI_BASE_ADDRESS_0, FRAMEBUFFER, 4);
    config_write(f->rig, DEVFN, PCI_COMMAND, PCI_COMMAND_MEMORY, 2);
    poke(f, FRAMEBUFFER + 4 * (640 + 2), 0x00123456, 4);
    assert_int_equal(vga_render(f->vga, &image, &f->rig->err), 0);
    assert_int_equal(image.width, 640);
    assert_int_equal(image.height, 480);
    assert_int_equal(image.pixels[640 + 2], 0x123456);
    vga_image_free(&image);
    vbe(f, 5, 1); /* a bank of the same */
    poke(f, 0xa0000, 0x77, 1);
    assert_int_equal(peek(f, FRAMEBUFFER + 0x10000, 1), 0x77);
    for (unsigned i = 0; i < 2000; i++) {
        static u64 seed = 5;
        u64 x = rig_random(&seed);

        vbe(f, x % 11, (u16)(x >> 20));
        if (i % 100) /* pictures of 4 million pixels take their time */
            continue;
        assert_int_equal(vga_render(f->vga, &image, &f->rig->err), 0);
        vga_image_free(&image);
    }
}

static void the_rom_shows_where_it_is_put(void **state)
{
    struct fixture *f = *state;

    config_write(f->rig, DEVFN, PCI_ROM_ADDRESS, 0xfffffffe, 4);
    assert_int_equal(config_read(f->rig, DEVFN, PCI_ROM_ADDRESS, 4), 0xfffff800);
    config_write(f->rig, DEVFN, PCI_ROM_ADDRESS, 0xe8000001, 4);
    assert_int_equal(peek(f, 0xe8000000, 2), 0xffff);
    config_write(f->rig, DEVFN, PCI_COMMAND, PCI_COMMAND_MEMORY, 2);
    assert_int_equal(peek(f, 0xe8000000, 2), 0xaa55);
    config_write(f->rig, DEVFN, PCI_ROM_ADDRESS, 0xe8000000, 4);
    assert_int_equal(peek(f, 0xe8000000, 2), 0xffff);
}

static void a_view_is_what_the_screen_was(void **state)
{
    struct fixture *f = *state;
    struct vga_view *view = vga_view_create(&f->rig->err);
    struct vga_image image = {0};
    const u32 *pixels;

    config_write(f->rig, DEVFN, PCI_BASE_ADDRESS_0, FRAMEBUFFER, 4);
    config_write(f->rig, DEVFN, PCI_COMMAND, PCI_COMMAND_MEMORY, 2);
    vbe(f, 1, 64);
    vbe(f, 2, 16);
    vbe(f, 3, 32);
    vbe(f, 4, 0x41);
    poke(f, FRAMEBUFFER + 4, 0xff123456, 4);
    assert_true(vga_view_update(view, f->vga));
    assert_false(vga_view_update(view, f->vga)); /* nothing is new */
    poke(f, FRAMEBUFFER + 4, 0xabcdef, 4);
    assert_int_equal(vga_view_render(view, &image, &f->rig->err), 0);
    assert_int_equal(image.width, 64);
    assert_int_equal(image.pixels[1], 0x123456);
    pixels = image.pixels;
    assert_true(vga_view_update(view, f->vga));
    assert_int_equal(vga_view_render(view, &image, &f->rig->err), 0);
    assert_ptr_equal(image.pixels, pixels); /* drawn in the same place */
    assert_int_equal(image.pixels[1], 0xabcdef);
    vbe(f, 9, 1); /* the picture begins a line further down */
    assert_true(vga_view_update(view, f->vga));
    assert_int_equal(vga_view_render(view, &image, &f->rig->err), 0);
    assert_int_equal(image.pixels[1], 0);
    vga_image_free(&image);
    vga_view_destroy(view);
}

static void state_moves(void **state)
{
    struct fixture *f = *state, to;
    u64 seed = 11;
    char where[128];

    for (unsigned round = 0; round < 4; round++) {
        for (unsigned i = 0; i < 2000; i++) {
            u64 x = rig_random(&seed);

            if (x & 1)
                io_bus_write(f->rig->env.ports, 0x3b4 + (x >> 8) % 44, x >> 32, 1 + (x >> 1 & 1));
            else if (x & 2)
                vbe(f, x >> 8 & 15, (u16)(x >> 32));
            else if (x & 4)
                poke(f, 0xa0000 + (x >> 8 & 0x1ffff), x >> 32, 1U << (x >> 4 & 3));
            else
                in(f, 0x3b4 + (x >> 8) % 44);
        }
        create(&to);
        const char *wrong =
            rig_round_trip(f->rig, vga_device(f->vga), vga_device(to.vga), where, sizeof(where));
        if (wrong)
            fail_msg("%s", wrong);
        destroy(&to);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(text_can_be_read, setup, teardown),
        cmocka_unit_test_setup_teardown(characters_are_drawn_with_the_guests_font, setup, teardown),
        cmocka_unit_test_setup_teardown(planes_are_written_by_mask_latch_and_function, setup,
                                        teardown),
        cmocka_unit_test_setup_teardown(vbe_modes_fit_the_memory, setup, teardown),
        cmocka_unit_test_setup_teardown(the_rom_shows_where_it_is_put, setup, teardown),
        cmocka_unit_test_setup_teardown(a_view_is_what_the_screen_was, setup, teardown),
        cmocka_unit_test_setup_teardown(state_moves, setup, teardown),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
