#include "control/screenshot.h"

#include "device/vga.h"

#include <errno.h>
#include <png.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static bool ends_in(const char *path, const char *end)
{
    size_t len = strlen(path), n = strlen(end);

    return len > n && !strcmp(path + len - n, end);
}

int screenshot_check_name(const char *path, struct error *err)
{
    if (ends_in(path, ".png") || ends_in(path, ".txt"))
        return 0;
    return error_input(err, "'%s': give a file that ends in .png, or in .txt for the text alone",
                       path);
}

/* libpng leaves by longjmp when it fails, so what it works with is not in registers of this function. */
static int put_png(FILE *out, const struct vga_image *image, u8 *row)
{
    png_structp png = png_create_write_struct(PNG_LIBPNG_VER_STRING, NULL, NULL, NULL);
    png_infop info = png ? png_create_info_struct(png) : NULL;
    int ret = -EIO;

    if (!info || setjmp(png_jmpbuf(png)))
        goto out;
    png_init_io(png, out);
    png_set_IHDR(png, info, image->width, image->height, 8, PNG_COLOR_TYPE_RGB, PNG_INTERLACE_NONE,
                 PNG_COMPRESSION_TYPE_DEFAULT, PNG_FILTER_TYPE_DEFAULT);
    png_set_compression_level(png, 3);
    png_write_info(png, info);
    for (unsigned y = 0; y < image->height; y++) {
        const u32 *pixels = image->pixels + (size_t)y * image->width;

        for (unsigned x = 0; x < image->width; x++) {
            row[3 * x] = (u8)(pixels[x] >> 16);
            row[3 * x + 1] = (u8)(pixels[x] >> 8);
            row[3 * x + 2] = (u8)pixels[x];
        }
        png_write_row(png, row);
    }
    png_write_end(png, NULL);
    ret = 0;
out:
    png_destroy_write_struct(&png, &info);
    return ret;
}

static int write_picture(struct vga *vga, FILE *out, struct error *err)
{
    struct vga_image image = {0};
    int ret = vga_render(vga, &image, err);
    u8 *row;

    if (ret)
        return ret;
    row = malloc(3 * (size_t)image.width);
    if (!row)
        ret = error_host(err, ENOMEM, "a picture of the screen");
    else if (put_png(out, &image, row) < 0)
        ret = error_host(err, errno ? errno : EIO, "a picture of the screen");
    free(row);
    vga_image_free(&image);
    return ret;
}

static int write_text(struct vga *vga, FILE *out, struct error *err)
{
    char *text = vga_text(vga, err);
    int ret = 0;

    if (!text)
        return -ENOMEM;
    if (fputs(text, out) < 0)
        ret = error_host(err, errno, "the text on the screen");
    free(text);
    return ret;
}

int screenshot_write(struct vga *vga, const char *path, struct error *err)
{
    size_t size = strlen(path) + sizeof(".new");
    char *temporary = malloc(size);
    FILE *out;
    int ret;

    if (!temporary)
        return error_host(err, ENOMEM, "%s", path);
    snprintf(temporary, size, "%s.new", path);
    out = fopen(temporary, "we");
    if (!out) {
        ret = error_host(err, errno, "%s", temporary);
        free(temporary);
        return ret;
    }
    ret = ends_in(path, ".png") ? write_picture(vga, out, err) : write_text(vga, out, err);
    if (fclose(out) && !ret)
        ret = error_host(err, errno, "%s", temporary);
    if (!ret && rename(temporary, path))
        ret = error_host(err, errno, "%s", path);
    if (ret)
        unlink(temporary);
    free(temporary);
    return ret;
}
