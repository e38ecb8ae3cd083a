/*
 * The loaders, with small images made here and with Debian's kernels where they are at hand. Each
 * image is a memfd, reached by its path under /proc/self/fd.
 */
#define _GNU_SOURCE /* memfd_create */
#include "host/log.h"
#include "machine/elf.h"
#include "machine/layout.h"
#include "machine/loader.h"

#include <asm/bootparam.h>
#include <elf.h>
#include <errno.h>
#include <fcntl.h>
#include <glob.h>
#include <lz4.h>
#include <lzma.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>
#include <zlib.h>
#include <zstd.h>

#include <cmocka.h>

#define KERNEL_AT 0x1000000u
#define KERNEL_INIT_SIZE 0x100000u
#define RSDP 0xe0000u

/* One machine of `memory_size` bytes and what is to be loaded into it. */
struct fixture {
    struct guest_memory memory;
    struct e820_map e820;
    struct loader_request req;
    struct cpu cpu;
    struct error err;
    int fds[8];
    char paths[8][32];
    int nfds;
};

static void machine_init(struct fixture *f, u64 memory_size)
{
    u64 low = MIN(memory_size, LAYOUT_LOW_RAM_END);

    memset(f, 0, sizeof(*f));
    assert_int_equal(memory_add_slot(&f->memory, 0, LAYOUT_VGA_BASE, 0, &f->err), 0);
    assert_int_equal(memory_add_slot(&f->memory, MIB(1), low - MIB(1), 0, &f->err), 0);
    f->e820 = (struct e820_map){
        .entries = {{0, LAYOUT_EBDA_BASE, E820_RAM},
                    {LAYOUT_EBDA_BASE, LAYOUT_VGA_BASE - LAYOUT_EBDA_BASE, E820_RESERVED},
                    {LAYOUT_ACPI_BASE, LAYOUT_ACPI_END - LAYOUT_ACPI_BASE, E820_RESERVED},
                    {MIB(1), low - MIB(1), E820_RAM}},
        .count = 4,
    };
    f->req = (struct loader_request){
        .cmdline = "console=ttyS0", .e820 = &f->e820, .rsdp = RSDP, .memory = &f->memory};
}

static void machine_free(struct fixture *f)
{
    for (int i = 0; i < f->nfds; i++)
        close(f->fds[i]);
    memory_destroy(&f->memory);
}

static const char *file_of(struct fixture *f, const void *data, size_t len)
{
    int i = f->nfds++;

    f->fds[i] = memfd_create("image", MFD_CLOEXEC);
    assert_true(f->fds[i] >= 0);
    assert_int_equal(write(f->fds[i], data, len), len);
    snprintf(f->paths[i], sizeof(f->paths[i]), "/proc/self/fd/%d", f->fds[i]);
    return f->paths[i];
}

static void load_ok(struct fixture *f)
{
    int ret = loader_load(&f->req, &f->cpu, &f->err);

    if (ret)
        print_message("# %s\n", f->err.text);
    assert_int_equal(ret, 0);
}

/* Loading fails with an input error, in one line that has the word and names the file. */
static void load_fails(struct fixture *f, const char *file, const char *word)
{
    assert_int_equal(loader_load(&f->req, &f->cpu, &f->err), -EINVAL);
    assert_int_equal(f->err.class, ERROR_INPUT);
    if (!strstr(f->err.text, word) || !strstr(f->err.text, file))
        fail_msg("'%s' lacks '%s' or '%s'", f->err.text, word, file);
    assert_null(strchr(f->err.text, '\n'));
}

static void guest_get(struct fixture *f, gpa_t gpa, void *buf, size_t len)
{
    assert_int_equal(memory_read(&f->memory, gpa, buf, len), 0);
}

static u32 guest_u32(struct fixture *f, gpa_t gpa)
{
    u32 v;

    guest_get(f, gpa, &v, sizeof(v));
    return v;
}

static void assert_guest_string(struct fixture *f, gpa_t gpa, const char *expected)
{
    char buf[256] = {0};

    guest_get(f, gpa, buf, strlen(expected) + 1);
    assert_string_equal(buf, expected);
}

/* Images */

#define PAGE_PATTERN 0xa5

struct elf64_image {
    Elf64_Ehdr eh;
    Elf64_Phdr ph[2];
    struct {
        Elf64_Nhdr nh;
        char name[4];
        u64 entry;
    } note;
    u8 text[8192];
};

/* A page of text at `paddr` with another page of BSS; and a PVH note when asked for. */
static struct elf64_image make_elf64(u64 paddr, bool pvh)
{
    struct elf64_image e = {
        .eh = {.e_ident = {0x7f, 'E', 'L', 'F', ELFCLASS64, ELFDATA2LSB, EV_CURRENT},
               .e_type = ET_EXEC,
               .e_machine = EM_X86_64,
               .e_entry = paddr,
               .e_phoff = offsetof(struct elf64_image, ph),
               .e_phentsize = sizeof(Elf64_Phdr),
               .e_phnum = 2},
        .ph = {{.p_type = PT_LOAD,
                .p_offset = offsetof(struct elf64_image, text),
                .p_vaddr = paddr + 0xffffffff80000000,
                .p_paddr = paddr,
                .p_filesz = 8192,
                .p_memsz = 12288},
               {.p_type = pvh ? PT_NOTE : PT_NULL,
                .p_offset = offsetof(struct elf64_image, note),
                .p_filesz = sizeof(e.note),
                .p_align = 4}},
        .note = {.nh = {.n_namesz = 4, .n_descsz = 8, .n_type = 18},
                 .name = "Xen",
                 .entry = paddr + 16},
    };

    memset(e.text, PAGE_PATTERN, sizeof(e.text));
    return e;
}

struct elf32_image {
    Elf32_Ehdr eh;
    Elf32_Phdr ph;
    u32 multiboot[3];
    u8 text[4096];
};

static struct elf32_image make_elf32_multiboot(u32 paddr)
{
    struct elf32_image e = {
        .eh = {.e_ident = {0x7f, 'E', 'L', 'F', ELFCLASS32, ELFDATA2LSB, EV_CURRENT},
               .e_type = ET_EXEC,
               .e_machine = EM_386,
               .e_entry = paddr + 4,
               .e_phoff = offsetof(struct elf32_image, ph),
               .e_phentsize = sizeof(Elf32_Phdr),
               .e_phnum = 1},
        .ph = {.p_type = PT_LOAD,
               .p_offset = offsetof(struct elf32_image, text),
               .p_paddr = paddr,
               .p_filesz = 4096,
               .p_memsz = 8192},
        .multiboot = {0x1badb002, 3, -(0x1badb002u + 3)},
    };

    memset(e.text, PAGE_PATTERN, sizeof(e.text));
    return e;
}

/* A bzImage with `payload` at the start of its protected-mode part. Free it. */
struct bzimage {
    u8 *data;
    size_t size;
    struct setup_header *hdr;
};

#define SETUP_SIZE (2 * 512)

static struct bzimage make_bzimage(const void *payload, size_t len)
{
    size_t code = (MAX(len, 1024) + 511) / 512 * 512;
    struct bzimage b = {.size = SETUP_SIZE + code};

    b.data = calloc(1, b.size);
    b.hdr = (struct setup_header *)(b.data + 0x1f1);
    *b.hdr = (struct setup_header){
        .setup_sects = 1,
        .syssize = (u32)(code / 16),
        .boot_flag = 0xaa55,
        .jump = 0x66eb,
        .header = 0x53726448,
        .version = 0x20f,
        .loadflags = LOADED_HIGH,
        .initrd_addr_max = 0x7fffffff,
        .kernel_alignment = 0x200000,
        .relocatable_kernel = 1,
        .xloadflags = XLF_KERNEL_64,
        .cmdline_size = 2047,
        .payload_length = (u32)len,
        .pref_address = KERNEL_AT,
        .init_size = KERNEL_INIT_SIZE,
    };
    memcpy(b.data + SETUP_SIZE, payload, len);
    return b;
}

enum packer { GZIP, XZ, LZMA, ZSTD, LZ4, PACKERS };

static size_t append_size(u8 *out, size_t len, size_t unpacked)
{
    u32 v = (u32)unpacked;

    memcpy(out + len, &v, sizeof(v));
    return len + sizeof(v);
}

static size_t pack_lzma(enum packer how, const u8 *in, size_t len, u8 *out, size_t room)
{
    lzma_stream s = LZMA_STREAM_INIT;
    lzma_options_lzma options;

    lzma_lzma_preset(&options, 1);
    if (how == XZ)
        assert_int_equal(lzma_easy_encoder(&s, 1, LZMA_CHECK_CRC32), LZMA_OK);
    else
        assert_int_equal(lzma_alone_encoder(&s, &options), LZMA_OK);
    s.next_in = in;
    s.avail_in = len;
    s.next_out = out;
    s.avail_out = room;
    assert_int_equal(lzma_code(&s, LZMA_FINISH), LZMA_STREAM_END);
    lzma_end(&s);
    return s.total_out;
}

/* As the kernel's build packs its payload; `out` has room for `room` bytes. */
static size_t pack(enum packer how, const void *in, size_t len, u8 *out, size_t room)
{
    z_stream z = {
        .next_in = (u8 *)in, .avail_in = (uInt)len, .next_out = out, .avail_out = (uInt)room};
    u32 n;

    switch (how) {
    case GZIP:
        assert_int_equal(deflateInit2(&z, 9, Z_DEFLATED, 31, 8, Z_DEFAULT_STRATEGY), Z_OK);
        assert_int_equal(deflate(&z, Z_FINISH), Z_STREAM_END);
        deflateEnd(&z);
        return z.total_out;
    case ZSTD:
        return append_size(out, ZSTD_compress(out, room, in, len, 3), len);
    case LZ4:
        memcpy(out, (u8[]){0x02, 0x21, 0x4c, 0x18}, 4);
        n = (u32)LZ4_compress_default(in, (char *)out + 8, (int)len, (int)room - 8);
        memcpy(out + 4, &n, sizeof(n));
        return append_size(out, 8 + n, len);
    default:
        return append_size(out, pack_lzma(how, in, len, out, room), len);
    }
}

static struct bzimage make_packed_bzimage(enum packer how, const struct elf64_image *vmlinux)
{
    u8 payload[16384];

    return make_bzimage(payload, pack(how, vmlinux, sizeof(*vmlinux), payload, sizeof(payload)));
}

/* Linux */

/* What the 64-bit boot protocol says of the processor's state at the entry. */
static void assert_long_mode_entry(struct fixture *f)
{
    const struct cpu *c = &f->cpu;
    u64 descriptor, entry, pdpte;

    assert_true(c->cr0 & CR0_PE && c->cr0 & CR0_PG);
    assert_true(c->cr4 & CR4_PAE);
    assert_int_equal(c->msr.efer, EFER_LME | EFER_LMA);
    assert_int_equal(c->rflags, EFLAGS_FIXED);
    assert_int_equal(c->seg[SEG_CS].selector, 0x10);
    assert_true(c->seg[SEG_CS].attr & SEG_ATTR_L);
    assert_int_equal(c->seg[SEG_CS].limit, 0xffffffff);
    for (int i = 0; i < SEG_COUNT; i++)
        if (i != SEG_CS)
            assert_int_equal(c->seg[i].selector, 0x18);
    guest_get(f, c->gdtr.base + 0x10, &descriptor, 8);
    assert_int_equal(descriptor_attr(descriptor), c->seg[SEG_CS].attr);
    guest_get(f, c->gdtr.base + 0x18, &descriptor, 8);
    assert_int_equal(descriptor_attr(descriptor), c->seg[SEG_DS].attr);
    /* The first 4 GiB are mapped at their own addresses. */
    guest_get(f, c->cr3, &entry, 8);
    for (u64 gpa = 0; gpa < GIB(4); gpa += MIB(2)) {
        guest_get(f, (entry & PTE_ADDR_MASK) + (gpa >> 30) * 8, &pdpte, 8);
        assert_true(pdpte & PTE_P && !(pdpte & PTE_PS));
        guest_get(f, (pdpte & PTE_ADDR_MASK) + ((gpa >> 21) & 511) * 8, &descriptor, 8);
        assert_int_equal(descriptor & PTE_ADDR_MASK, gpa);
        assert_true(descriptor & PTE_P && descriptor & PTE_W && descriptor & PTE_PS);
    }
}

static void assert_zero_page(struct fixture *f)
{
    struct boot_params bp;

    guest_get(f, f->cpu.gpr[RSI], &bp, sizeof(bp));
    assert_int_equal(bp.hdr.header, 0x53726448);
    assert_int_equal(bp.hdr.type_of_loader, 0xff);
    assert_int_equal(bp.hdr.loadflags, LOADED_HIGH);
    assert_int_equal(bp.sentinel, 0);
    assert_int_equal(bp.hdr.setup_data, 0);
    assert_int_equal(bp.screen_info.orig_video_isVGA, 0);
    assert_int_equal(bp.acpi_rsdp_addr, RSDP);
    assert_int_equal(bp.e820_entries, f->e820.count);
    for (unsigned i = 0; i < f->e820.count; i++) {
        assert_int_equal(bp.e820_table[i].addr, f->e820.entries[i].base);
        assert_int_equal(bp.e820_table[i].size, f->e820.entries[i].size);
        assert_int_equal(bp.e820_table[i].type, f->e820.entries[i].type);
    }
    assert_guest_string(f, bp.hdr.cmd_line_ptr, f->req.cmdline);
}

static void linux_payload_of_every_format_starts_at_its_elf_entry(void **state)
{
    for (enum packer how = 0; how < PACKERS; how++) {
        struct elf64_image vmlinux = make_elf64(KERNEL_AT, false);
        struct bzimage b = make_packed_bzimage(how, &vmlinux);
        struct fixture f;
        u8 text[12288], dirt = 1;

        machine_init(&f, MIB(64));
        /* A machine that is reset may have anything in its memory. */
        memory_write(&f.memory, KERNEL_AT + 8192 + 7, &dirt, 1);
        f.req.kernel = file_of(&f, b.data, b.size);
        load_ok(&f);
        assert_int_equal(f.cpu.gpr[GPR_RIP], KERNEL_AT);
        assert_long_mode_entry(&f);
        assert_zero_page(&f);
        guest_get(&f, KERNEL_AT, text, sizeof(text));
        assert_memory_equal(text, vmlinux.text, 8192);
        for (int i = 8192; i < 12288; i++)
            assert_int_equal(text[i], 0);
        machine_free(&f);
        free(b.data);
    }
}

/* Two segments of a file that is in guest memory at `at`; returns whether they could be settled there. */
static bool settle(struct fixture *f, gpa_t at, u64 first, u64 second)
{
    struct {
        Elf64_Ehdr eh;
        Elf64_Phdr ph[2];
        char text[2][16];
    } file = {
        .eh = {.e_ident = {ELFMAG0, ELFMAG1, ELFMAG2, ELFMAG3, ELFCLASS64, ELFDATA2LSB, EV_CURRENT},
               .e_type = ET_EXEC,
               .e_machine = EM_X86_64,
               .e_version = EV_CURRENT,
               .e_phoff = sizeof(Elf64_Ehdr),
               .e_phentsize = sizeof(Elf64_Phdr),
               .e_phnum = 2},
        .text = {"the first", "the second"}};
    struct image img;
    struct elf e;

    for (unsigned n = 0; n < 2; n++)
        file.ph[n] = (Elf64_Phdr){.p_type = PT_LOAD,
                                  .p_offset = (u64)((u8 *)file.text[n] - (u8 *)&file),
                                  .p_paddr = n ? second : first,
                                  .p_filesz = 16,
                                  .p_memsz = n ? 24 : 16};
    assert_int_equal(memory_write(&f->memory, at, &file, sizeof(file)), 0);
    img = image_of_bytes("vmlinux", memory_host(&f->memory, at, sizeof(file)), sizeof(file));
    assert_int_equal(elf_open(&e, &img, &f->err), 0);
    return elf_settle(&e, &f->req, at);
}

static void a_file_in_guest_memory_settles_where_it_is(void **state)
{
    const gpa_t at = MIB(2), text = at + sizeof(Elf64_Ehdr) + 2 * sizeof(Elf64_Phdr);
    struct fixture f;
    u64 behind;

    machine_init(&f, MIB(8));
    assert_true(settle(&f, at, text, MIB(4)));
    assert_guest_string(&f, text, "the first");
    assert_guest_string(&f, MIB(4), "the second");
    assert_true(settle(&f, at, MIB(3), text)); /* the second takes the first one's place */
    assert_guest_string(&f, MIB(3), "the first");
    assert_guest_string(&f, text, "the second");
    assert_int_equal(memory_write(&f.memory, MIB(4) + 16, "garbage", 8), 0);
    assert_true(settle(&f, at, text - 8, MIB(4))); /* over itself */
    assert_guest_string(&f, text - 8, "the first");
    guest_get(&f, MIB(4) + 16, &behind, sizeof(behind));
    assert_int_equal(behind, 0);
    machine_free(&f);
}

/* The first would be moved over the second, which waits there. */
static void a_file_in_guest_memory_that_would_overwrite_itself_stays(void **state)
{
    const gpa_t at = MIB(2), text = at + sizeof(Elf64_Ehdr) + 2 * sizeof(Elf64_Phdr);
    struct fixture f;

    machine_init(&f, MIB(8));
    assert_false(settle(&f, at, text + 8, MIB(4)));
    assert_guest_string(&f, text, "the first");
    assert_guest_string(&f, text + 16, "the second");
    assert_false(settle(&f, at, MIB(8) - 8, MIB(4))); /* beyond RAM's end */
    machine_free(&f);
}

/* Loads a bzImage and finds its protected-mode part at the preferred address, entered at 0x200. */
static void assert_unpacks_itself_if(const struct bzimage *b, bool guest_unpacks)
{
    struct fixture f;
    u8 code[1024];

    machine_init(&f, MIB(64));
    f.req.guest_unpacks = guest_unpacks;
    f.req.kernel = file_of(&f, b->data, b->size);
    load_ok(&f);
    assert_int_equal(f.cpu.gpr[GPR_RIP], KERNEL_AT + 0x200);
    guest_get(&f, KERNEL_AT, code, sizeof(code));
    assert_memory_equal(code, b->data + SETUP_SIZE, sizeof(code));
    assert_long_mode_entry(&f);
    assert_zero_page(&f);
    machine_free(&f);
}

static void assert_unpacks_itself(const struct bzimage *b)
{
    assert_unpacks_itself_if(b, false);
}

static void linux_payload_is_left_to_the_guest_on_demand(void **state)
{
    for (enum packer how = 0; how < PACKERS; how++) {
        struct elf64_image vmlinux = make_elf64(KERNEL_AT, false);
        struct bzimage b = make_packed_bzimage(how, &vmlinux);

        assert_unpacks_itself_if(&b, true);
        free(b.data);
    }
}

static void linux_payload_that_the_host_cannot_unpack_is_left_to_the_guest(void **state)
{
    static const char payloads[][16] = {"BZh9 and so on", "\x89LZO\0\r\n", "\x1f\x8b\b damaged",
                                        "no"};

    for (size_t i = 0; i < ARRAY_SIZE(payloads); i++) {
        struct bzimage b = make_bzimage(payloads[i], sizeof(payloads[i]));

        assert_unpacks_itself(&b);
        free(b.data);
    }
}

static void linux_payload_outside_of_the_kernels_own_memory_is_left_to_the_guest(void **state)
{
    static const u64 places[] = {0x100000,   KERNEL_AT - 4096,  KERNEL_AT + KERNEL_INIT_SIZE - 4096,
                                 0x40000000, UINT64_MAX - 4095, 0x80000};

    for (size_t i = 0; i < ARRAY_SIZE(places); i++) {
        struct elf64_image vmlinux = make_elf64(places[i], false);
        struct bzimage b = make_packed_bzimage(LZ4, &vmlinux);

        assert_unpacks_itself(&b);
        free(b.data);
    }
}

static void linux_payload_of_a_wrong_size_is_left_to_the_guest(void **state)
{
    static const u32 sizes[] = {0, 1, sizeof(struct elf64_image) - 1,
                                sizeof(struct elf64_image) + 1, UINT32_MAX};

    for (enum packer how = 0; how < PACKERS; how++) {
        for (size_t i = 0; i < ARRAY_SIZE(sizes); i++) {
            struct elf64_image vmlinux = make_elf64(KERNEL_AT, false);
            struct bzimage b = make_packed_bzimage(how, &vmlinux);

            memcpy(b.data + SETUP_SIZE + b.hdr->payload_length - 4, &sizes[i], 4);
            assert_unpacks_itself(&b);
            free(b.data);
        }
    }
}

static void linux_payload_that_is_not_in_the_file_is_left_to_the_guest(void **state)
{
    static const u32 spans[][2] = {{0, UINT32_MAX}, {UINT32_MAX, 16}, {0, 0}, {1024, 1}, {0, 3}};

    for (size_t i = 0; i < ARRAY_SIZE(spans); i++) {
        struct bzimage b = make_bzimage("x", 1);

        b.hdr->payload_offset = spans[i][0];
        b.hdr->payload_length = spans[i][1];
        assert_unpacks_itself(&b);
        free(b.data);
    }
}

static void linux_initrd_is_as_high_as_the_kernel_allows(void **state)
{
    static const struct {
        u64 memory;
        u32 addr_max;
        gpa_t end;
    } cases[] = {
        {MIB(64), 0x7fffffff, MIB(64)},
        {MIB(64), 0x2ffffff, MIB(48)},
        {GIB(4), 0x7fffffff, GIB(2)},
        {GIB(4), UINT32_MAX, LAYOUT_LOW_RAM_END},
    };
    u8 initrd[5000], got[5000];

    memset(initrd, 0x77, sizeof(initrd));
    for (size_t i = 0; i < ARRAY_SIZE(cases); i++) {
        struct bzimage b = make_bzimage("x", 1);
        struct boot_params bp;
        struct fixture f;

        b.hdr->initrd_addr_max = cases[i].addr_max;
        machine_init(&f, cases[i].memory);
        f.req.kernel = file_of(&f, b.data, b.size);
        f.req.initrd = file_of(&f, initrd, sizeof(initrd));
        load_ok(&f);
        guest_get(&f, f.cpu.gpr[RSI], &bp, sizeof(bp));
        assert_int_equal(bp.hdr.ramdisk_image, cases[i].end - 8192);
        assert_int_equal(bp.hdr.ramdisk_size, sizeof(initrd));
        guest_get(&f, bp.hdr.ramdisk_image, got, sizeof(got));
        assert_memory_equal(got, initrd, sizeof(got));
        machine_free(&f);
        free(b.data);
    }
}

static void linux_initrd_that_does_not_fit_says_how_much_memory_would_do(void **state)
{
    struct bzimage b = make_bzimage("x", 1);
    struct fixture f;

    /* The kernel ends at 17 MiB: 17 + 40 are needed. */
    machine_init(&f, MIB(32));
    f.req.kernel = file_of(&f, b.data, b.size);
    f.req.initrd = file_of(&f, "", 0);
    assert_int_equal(ftruncate(f.fds[1], MIB(40)), 0);
    load_fails(&f, f.req.initrd, "--memory 58M");
    assert_int_equal(ftruncate(f.fds[1], (off_t)GIB(3)), 0);
    load_fails(&f, f.req.initrd, "too large");
    assert_int_equal(ftruncate(f.fds[1], INT64_MAX), 0);
    load_fails(&f, f.req.initrd, "too large");
    machine_free(&f);
    /* And that much does. */
    machine_init(&f, MIB(58));
    f.req.kernel = file_of(&f, b.data, b.size);
    f.req.initrd = file_of(&f, "", 0);
    assert_int_equal(ftruncate(f.fds[1], MIB(40)), 0);
    load_ok(&f);
    machine_free(&f);
    free(b.data);
}

static void linux_initrd_never_overlaps_the_kernel(void **state)
{
    struct bzimage b = make_bzimage("x", 1);
    struct fixture f;

    machine_init(&f, KERNEL_AT + KERNEL_INIT_SIZE + 4096);
    f.req.kernel = file_of(&f, b.data, b.size);
    f.req.initrd = file_of(&f, "x", 1);
    load_ok(&f);
    assert_int_equal(ftruncate(f.fds[1], 4097), 0);
    load_fails(&f, f.req.initrd, "--memory");
    machine_free(&f);
    free(b.data);
}

static void linux_command_line_is_bounded(void **state)
{
    struct bzimage b = make_bzimage("x", 1);
    char cmdline[200002];
    struct fixture f;

    machine_init(&f, MIB(64));
    f.req.kernel = file_of(&f, b.data, b.size);
    f.req.cmdline = cmdline;
    memset(cmdline, 'a', sizeof(cmdline));
    cmdline[2047] = '\0';
    load_ok(&f);
    cmdline[2047] = 'a';
    cmdline[2048] = '\0';
    load_fails(&f, f.req.kernel, "shorten --append");
    /* A kernel that claims to take anything gets what there is room for. */
    b.hdr->cmdline_size = UINT32_MAX;
    f.req.kernel = file_of(&f, b.data, b.size);
    cmdline[2048] = 'a';
    cmdline[200001] = '\0';
    load_fails(&f, f.req.kernel, "shorten --append");
    machine_free(&f);
    free(b.data);
}

static void linux_damaged_headers_are_refused(void **state)
{
    enum { HDR = 0x1f1 };
    static const struct {
        size_t offset;
        u64 value;
        size_t len;
        const char *word;
    } cases[] = {
        {offsetof(struct setup_header, version), 0x20b, 2, "too old"},
        {offsetof(struct setup_header, xloadflags), 0, 2, "32-bit"},
        {offsetof(struct setup_header, loadflags), 0, 1, "zImage"},
        {offsetof(struct setup_header, syssize), 0, 4, "damaged"},
        {offsetof(struct setup_header, syssize), UINT32_MAX, 4, "truncated"},
        {offsetof(struct setup_header, setup_sects), 0xff, 1, "truncated"},
        {offsetof(struct setup_header, pref_address), 0, 8, "damaged"},
        {offsetof(struct setup_header, pref_address), 0x1000001, 8, "damaged"},
        {offsetof(struct setup_header, pref_address), UINT64_MAX & ~0xfffULL, 8, "damaged"},
        {offsetof(struct setup_header, pref_address), GIB(4), 8, "damaged"},
        {offsetof(struct setup_header, pref_address), MIB(63), 8, "--memory 64M"},
        {offsetof(struct setup_header, init_size), UINT32_MAX, 4, "damaged"},
        {offsetof(struct setup_header, init_size), MIB(100), 4, "--memory 116M"},
        {0x201 - HDR, 0x30, 1, "damaged"},
    };

    for (size_t i = 0; i < ARRAY_SIZE(cases); i++) {
        struct bzimage b = make_bzimage("x", 1);
        struct fixture f;

        machine_init(&f, MIB(63) + KERNEL_INIT_SIZE - 4096);
        memcpy((u8 *)b.hdr + cases[i].offset, &cases[i].value, cases[i].len);
        f.req.kernel = file_of(&f, b.data, b.size);
        load_fails(&f, f.req.kernel, cases[i].word);
        machine_free(&f);
        free(b.data);
    }
}

static void linux_truncated_at_any_length_is_refused(void **state)
{
    struct elf64_image vmlinux = make_elf64(KERNEL_AT, false);
    struct bzimage b = make_packed_bzimage(GZIP, &vmlinux);
    struct fixture f;

    machine_init(&f, MIB(64));
    f.req.kernel = file_of(&f, b.data, b.size);
    for (size_t len = b.size - 1; len > 0; len--) {
        assert_int_equal(ftruncate(f.fds[0], (off_t)len), 0);
        load_fails(&f, f.req.kernel, "");
    }
    machine_free(&f);
    free(b.data);
}

/* PVH */

static void assert_protected_entry(struct fixture *f)
{
    const struct cpu *c = &f->cpu;

    assert_int_equal(c->cr0, CR0_PE | CR0_ET);
    assert_int_equal(c->cr4, 0);
    assert_int_equal(c->msr.efer, 0);
    assert_int_equal(c->rflags, EFLAGS_FIXED);
    assert_int_equal(c->seg[SEG_CS].base, 0);
    assert_int_equal(c->seg[SEG_CS].limit, 0xffffffff);
    assert_int_equal(c->seg[SEG_CS].attr, 0xc09b);
    for (int i = 0; i < SEG_COUNT; i++) {
        if (i == SEG_CS)
            continue;
        assert_int_equal(c->seg[i].limit, 0xffffffff);
        assert_int_equal(c->seg[i].attr, 0xc093);
    }
    assert_int_equal(c->tr.limit, 0x67);
    assert_int_equal(c->tr.attr, 0x8b);
}

static void pvh_gets_start_info_and_its_entry(void **state)
{
    struct elf64_image e = make_elf64(0x200000, true);
    u64 modlist, module[3];
    struct fixture f;
    gpa_t si;
    u64 q[4];

    machine_init(&f, MIB(16));
    f.req.kernel = file_of(&f, &e, sizeof(e));
    f.req.initrd = file_of(&f, "initrd", 6);
    load_ok(&f);
    assert_protected_entry(&f);
    assert_int_equal(f.cpu.gpr[GPR_RIP], 0x200010);
    si = f.cpu.gpr[RBX];
    assert_int_equal(guest_u32(&f, si), 0x336ec578);
    assert_int_equal(guest_u32(&f, si + 4), 1);
    assert_int_equal(guest_u32(&f, si + 12), 1);
    guest_get(&f, si + 16, q, sizeof(q));
    modlist = q[0];
    assert_guest_string(&f, q[1], f.req.cmdline);
    assert_int_equal(q[2], RSDP);
    assert_int_equal(guest_u32(&f, si + 48), f.e820.count);
    for (unsigned i = 0; i < f.e820.count; i++) {
        u64 entry[3];

        guest_get(&f, q[3] + i * 24, entry, sizeof(entry));
        assert_int_equal(entry[0], f.e820.entries[i].base);
        assert_int_equal(entry[1], f.e820.entries[i].size);
        assert_int_equal((u32)entry[2], f.e820.entries[i].type);
    }
    guest_get(&f, modlist, module, sizeof(module));
    assert_int_equal(module[0], MIB(16) - 4096);
    assert_int_equal(module[1], 6);
    assert_guest_string(&f, module[0], "initrd");
    machine_free(&f);
}

static void elf_with_wild_numbers_is_refused(void **state)
{
    enum { LOAD = offsetof(struct elf64_image, ph), NOTE = LOAD + sizeof(Elf64_Phdr) };
    static const struct {
        size_t offset;
        u64 value;
        size_t len;
        const char *word;
    } cases[] = {
        {offsetof(Elf64_Ehdr, e_phoff), UINT64_MAX, 8, "outside the file"},
        {offsetof(Elf64_Ehdr, e_phoff), sizeof(struct elf64_image) - 8, 8, "outside the file"},
        {offsetof(Elf64_Ehdr, e_phnum), 0xffff, 2, "program headers"},
        {offsetof(Elf64_Ehdr, e_phnum), 0, 2, "program headers"},
        {offsetof(Elf64_Ehdr, e_phentsize), 1, 2, "program headers"},
        {offsetof(Elf64_Ehdr, e_machine), EM_AARCH64, 2, "another machine"},
        {offsetof(Elf64_Ehdr, e_type), ET_REL, 2, "not linked"},
        {EI_CLASS, 7, 1, "another machine"},
        {EI_DATA, ELFDATA2MSB, 1, "another machine"},
        {LOAD + offsetof(Elf64_Phdr, p_offset), UINT64_MAX, 8, "outside the file"},
        {LOAD + offsetof(Elf64_Phdr, p_filesz), UINT64_MAX, 8, "outside the file"},
        {LOAD + offsetof(Elf64_Phdr, p_memsz), 100, 8, "more bytes"},
        {LOAD + offsetof(Elf64_Phdr, p_memsz), UINT64_MAX, 8, "wraps around"},
        {LOAD + offsetof(Elf64_Phdr, p_memsz), MIB(64), 8, "--memory"},
        {LOAD + offsetof(Elf64_Phdr, p_paddr), UINT64_MAX, 8, "wraps around"},
        {LOAD + offsetof(Elf64_Phdr, p_paddr), GIB(1), 8, "--memory"},
        {LOAD + offsetof(Elf64_Phdr, p_paddr), LAYOUT_VGA_BASE - 4096, 8, "--memory"},
        {LOAD + offsetof(Elf64_Phdr, p_paddr), 0x7f000, 8, "boot information"},
        {LOAD + offsetof(Elf64_Phdr, p_paddr), 0x300000, 8, "PVH entry"},
        {LOAD, PT_NULL, 4, "nothing to load"},
        {NOTE, PT_NULL, 4, "CONFIG_PVH"},
        {NOTE, PT_LOAD, 4, "more bytes"},
        {NOTE + offsetof(Elf64_Phdr, p_offset), UINT64_MAX - 4, 8, "outside the file"},
        {offsetof(struct elf64_image, note.nh.n_namesz), UINT32_MAX, 4, "CONFIG_PVH"},
        {offsetof(struct elf64_image, note.nh.n_descsz), UINT32_MAX, 4, "CONFIG_PVH"},
        {offsetof(struct elf64_image, note.entry), GIB(5), 8, "PVH entry"},
    };

    for (size_t i = 0; i < ARRAY_SIZE(cases); i++) {
        struct elf64_image e = make_elf64(0x200000, true);
        struct fixture f;

        memcpy((u8 *)&e + cases[i].offset, &cases[i].value, cases[i].len);
        machine_init(&f, MIB(16));
        f.req.kernel = file_of(&f, &e, sizeof(e));
        load_fails(&f, f.req.kernel, cases[i].word);
        machine_free(&f);
    }
}

/* Multiboot */

static void multiboot_elf_gets_all_its_information(void **state)
{
    struct elf32_image e = make_elf32_multiboot(0x100000);
    char initrd[128], cmdline[128], string[128];
    u32 mods, mmap, flags;
    struct fixture f;
    gpa_t mbi;

    machine_init(&f, MIB(16));
    f.req.kernel = file_of(&f, &e, sizeof(e));
    file_of(&f, "first", 6);
    file_of(&f, "2nd", 4);
    snprintf(initrd, sizeof(initrd), "%s one,,two,%s", f.paths[1], f.paths[2]);
    f.req.initrd = initrd;
    load_ok(&f);
    assert_protected_entry(&f);
    assert_int_equal(f.cpu.gpr[GPR_RIP], 0x100004);
    assert_int_equal(f.cpu.gpr[RAX], 0x2badb002);
    mbi = f.cpu.gpr[RBX];
    flags = guest_u32(&f, mbi);
    assert_int_equal(flags, BIT(0) | BIT(2) | BIT(3) | BIT(6) | BIT(9));
    assert_int_equal(guest_u32(&f, mbi + 4), 639);
    assert_int_equal(guest_u32(&f, mbi + 8), 15 * 1024);
    snprintf(cmdline, sizeof(cmdline), "%s %s", f.req.kernel, f.req.cmdline);
    assert_guest_string(&f, guest_u32(&f, mbi + 16), cmdline);
    assert_int_equal(guest_u32(&f, mbi + 20), 2);
    mods = guest_u32(&f, mbi + 24);
    assert_int_equal(guest_u32(&f, mods), 0x102000); /* the page behind text and BSS */
    assert_int_equal(guest_u32(&f, mods + 4), 0x102006);
    assert_guest_string(&f, guest_u32(&f, mods), "first");
    snprintf(string, sizeof(string), "%s one,two", f.paths[1]);
    assert_guest_string(&f, guest_u32(&f, mods + 8), string);
    assert_int_equal(guest_u32(&f, mods + 16), 0x103000);
    assert_guest_string(&f, guest_u32(&f, mods + 16), "2nd");
    assert_guest_string(&f, guest_u32(&f, mods + 24), f.paths[2]);
    assert_int_equal(guest_u32(&f, mbi + 44), 24 * f.e820.count);
    mmap = guest_u32(&f, mbi + 48);
    for (unsigned i = 0; i < f.e820.count; i++) {
        assert_int_equal(guest_u32(&f, mmap + i * 24), 20);
        assert_int_equal(guest_u32(&f, mmap + i * 24 + 4), f.e820.entries[i].base);
        assert_int_equal(guest_u32(&f, mmap + i * 24 + 12), f.e820.entries[i].size);
        assert_int_equal(guest_u32(&f, mmap + i * 24 + 20), f.e820.entries[i].type);
    }
    assert_guest_string(&f, guest_u32(&f, mbi + 64), "doppel");
    machine_free(&f);
}

struct kludge_image {
    u8 before[64];
    u32 header[8];
    u8 text[4096];
};

static struct kludge_image make_kludge(u32 load, u32 load_end, u32 bss_end, u32 entry)
{
    u32 flags = BIT(16) | BIT(2);
    struct kludge_image k = {
        .header = {0x1badb002, flags, -(0x1badb002u + flags), load + 64, load, load_end, bss_end,
                   entry},
    };

    memset(k.text, PAGE_PATTERN, sizeof(k.text));
    return k;
}

static void multiboot_kludge_loads_by_its_header(void **state)
{
    static const u32 ends[][2] = {{0, 0}, {0x110000 + 1000, 0x112000}};

    for (size_t i = 0; i < ARRAY_SIZE(ends); i++) {
        struct kludge_image k = make_kludge(0x110000, ends[i][0], ends[i][1], 0x110080);
        u64 loaded = ends[i][0] ? 1000 : sizeof(k);
        u8 got[sizeof(k) + 1], dirt = 9;
        struct fixture f;

        machine_init(&f, MIB(16));
        memory_write(&f.memory, 0x110000 + 1000, &dirt, 1);
        f.req.kernel = file_of(&f, &k, sizeof(k));
        load_ok(&f);
        assert_protected_entry(&f);
        assert_int_equal(f.cpu.gpr[GPR_RIP], 0x110080);
        guest_get(&f, 0x110000, got, sizeof(got));
        assert_memory_equal(got, &k, loaded);
        assert_int_equal(got[loaded], 0);
        machine_free(&f);
    }
}

static void multiboot_damaged_headers_are_refused(void **state)
{
    static const struct {
        u32 word, value;
        const char *says;
    } cases[] = {
        {1, BIT(16) | BIT(5), "unknown features"},
        {3, 0, "does not match"},
        {3, 0x110000 + 100, "does not match"},
        {4, 0x100000, "does not match"},
        {5, 0x110000, "damaged"},
        {5, 0xffffffff, "damaged"},
        {6, 0xffffffff, "--memory"},
        {7, 0, "entry"},
        {7, 0x10ffff, "entry"},
        {7, 0x7fffffff, "entry"},
        {2, 0, "not a kernel"},
    };

    for (size_t i = 0; i < ARRAY_SIZE(cases); i++) {
        struct kludge_image k = make_kludge(0x110000, 0, 0, 0x110080);
        struct fixture f;

        k.header[cases[i].word] = cases[i].value;
        if (cases[i].word == 1)
            k.header[2] = -(k.header[0] + k.header[1]);
        machine_init(&f, MIB(16));
        f.req.kernel = file_of(&f, &k, sizeof(k));
        load_fails(&f, f.req.kernel, cases[i].says);
        machine_free(&f);
    }
}

static void multiboot_bad_modules_are_refused(void **state)
{
    struct elf32_image e = make_elf32_multiboot(0x100000);
    char initrd[8192];
    struct fixture f;

    machine_init(&f, MIB(16));
    f.req.kernel = file_of(&f, &e, sizeof(e));
    f.req.initrd = "/nonexistent/module x";
    load_fails(&f, "/nonexistent/module", "cannot open");
    f.req.initrd = "";
    load_fails(&f, "--initrd", "empty");
    snprintf(initrd, sizeof(initrd), "%s,", file_of(&f, "m", 1));
    f.req.initrd = initrd;
    load_fails(&f, "--initrd", "empty");
    initrd[0] = '\0';
    for (int i = 0; i < 257; i++)
        strcat(strcat(initrd, i ? "," : ""), f.paths[1]);
    load_fails(&f, "--initrd", "more than 256");
    assert_int_equal(ftruncate(f.fds[1], MIB(16)), 0);
    f.req.initrd = f.paths[1];
    load_fails(&f, f.paths[1], "--memory");
    machine_free(&f);
}

/* Files */

static void files_that_are_no_images_are_refused(void **state)
{
    static const struct {
        const char *path, *word;
    } cases[] = {
        {"/nonexistent/vmlinuz", "No such file"},
        {"/", "directory"},
        {"/dev/zero", "device"},
        {"/dev/null", "device"},
        {"/dev/tty", "open"},
        {"", "No such file"},
        {"/proc/self/exe", "PVH"},
    };
    char text[20000], fifo[] = "/tmp/doppel-fifo-XXXXXX";
    struct fixture f;

    machine_init(&f, MIB(16));
    for (size_t i = 0; i < ARRAY_SIZE(cases); i++) {
        if (!strcmp(cases[i].path, "/dev/tty") && isatty(STDIN_FILENO))
            continue;
        f.req.kernel = cases[i].path;
        load_fails(&f, cases[i].path, cases[i].word);
    }
    memset(text, ' ', sizeof(text));
    f.req.kernel = file_of(&f, text, sizeof(text));
    load_fails(&f, f.req.kernel, "not a kernel");
    f.req.kernel = file_of(&f, "", 0);
    load_fails(&f, f.req.kernel, "empty");
    /* A pipe that nobody writes to must not make us wait. */
    assert_true(close(mkstemp(fifo)) == 0 && unlink(fifo) == 0 && mkfifo(fifo, 0600) == 0);
    f.req.kernel = fifo;
    load_fails(&f, fifo, "pipe");
    unlink(fifo);
    machine_free(&f);
}

static void file_without_permission_is_refused(void **state)
{
    char path[] = "/tmp/doppel-secret-XXXXXX";
    int fd = mkstemp(path);
    struct fixture f;

    assert_true(fd >= 0 && write(fd, "x", 1) == 1 && fchmod(fd, 0) == 0);
    close(fd);
    machine_init(&f, MIB(16));
    f.req.kernel = path;
    if (geteuid() == 0) /* root may read it all the same */
        load_fails(&f, path, "not a kernel");
    else
        load_fails(&f, path, "make it readable");
    unlink(path);
    machine_free(&f);
}

/* Debian's kernels */

static u64 now_us(void)
{
    struct timespec ts;

    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (u64)ts.tv_sec * 1000000 + (u64)ts.tv_nsec / 1000;
}

static void debian_kernels_load_by_their_elf_entry(void **state)
{
    /* Where scripts/fetch-kernel puts them, from the project's folder and from a build folder. */
    static const char *const patterns[] = {".cache/kernel-*/boot/vmlinuz-*",
                                           "../.cache/kernel-*/boot/vmlinuz-*"};
    glob_t found = {0};

    for (size_t i = 0; i < ARRAY_SIZE(patterns); i++)
        glob(patterns[i], i ? GLOB_APPEND : 0, NULL, &found);
    if (!found.gl_pathc) {
        globfree(&found);
        print_message("# no Debian kernel here; scripts/fetch-kernel gets one\n");
        skip();
    }
    for (size_t i = 0; i < found.gl_pathc; i++) {
        struct boot_params bp;
        struct fixture f;
        u64 start;

        machine_init(&f, MIB(512));
        f.req.kernel = found.gl_pathv[i];
        start = now_us();
        load_ok(&f);
        print_message("# %s: loaded in %llu us\n", f.req.kernel,
                      (unsigned long long)(now_us() - start));
        guest_get(&f, f.cpu.gpr[RSI], &bp, sizeof(bp));
        assert_int_equal(f.cpu.gpr[GPR_RIP], bp.hdr.pref_address);
        assert_long_mode_entry(&f);
        assert_zero_page(&f);
        machine_free(&f);
        /* Too little memory for this kernel: told so, not crashed. */
        machine_init(&f, MIB(32));
        f.req.kernel = found.gl_pathv[i];
        load_fails(&f, f.req.kernel, "--memory");
        machine_free(&f);
    }
    globfree(&found);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(linux_payload_of_every_format_starts_at_its_elf_entry),
        cmocka_unit_test(a_file_in_guest_memory_settles_where_it_is),
        cmocka_unit_test(a_file_in_guest_memory_that_would_overwrite_itself_stays),
        cmocka_unit_test(linux_payload_is_left_to_the_guest_on_demand),
        cmocka_unit_test(linux_payload_that_the_host_cannot_unpack_is_left_to_the_guest),
        cmocka_unit_test(linux_payload_outside_of_the_kernels_own_memory_is_left_to_the_guest),
        cmocka_unit_test(linux_payload_of_a_wrong_size_is_left_to_the_guest),
        cmocka_unit_test(linux_payload_that_is_not_in_the_file_is_left_to_the_guest),
        cmocka_unit_test(linux_initrd_is_as_high_as_the_kernel_allows),
        cmocka_unit_test(linux_initrd_that_does_not_fit_says_how_much_memory_would_do),
        cmocka_unit_test(linux_initrd_never_overlaps_the_kernel),
        cmocka_unit_test(linux_command_line_is_bounded),
        cmocka_unit_test(linux_damaged_headers_are_refused),
        cmocka_unit_test(linux_truncated_at_any_length_is_refused),
        cmocka_unit_test(pvh_gets_start_info_and_its_entry),
        cmocka_unit_test(elf_with_wild_numbers_is_refused),
        cmocka_unit_test(multiboot_elf_gets_all_its_information),
        cmocka_unit_test(multiboot_kludge_loads_by_its_header),
        cmocka_unit_test(multiboot_damaged_headers_are_refused),
        cmocka_unit_test(multiboot_bad_modules_are_refused),
        cmocka_unit_test(files_that_are_no_images_are_refused),
        cmocka_unit_test(file_without_permission_is_refused),
        cmocka_unit_test(debian_kernels_load_by_their_elf_entry),
    };

    log_set_level(LOG_WARN);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
