/*
 * Bytes as register accesses on the VGA, the IDE controller, the flash chip and the LPC bridge, with their pictures
 * taken and their disks' work done in between; then a damaged state into each. Only the sanitizers look at what
 * comes out: a guest can't crash them, or make them touch what isn't theirs.
 */
#include "../unit/disk_rig.h"
#include "device/ide.h"
#include "device/pci/lpc.h"
#include "device/pflash.h"
#include "device/vga.h"
#include "fuzz_device.h"
#include "host/log.h"

#define DISK_SIZE KIB(64)
#define FLASH_BASE 0xffc00000ULL
#define FLASH_SIZE (4 * PFLASH_BLOCK)
#define FRAMEBUFFER 0xe0000000ULL
#define BUS_MASTER 0xc000
#define VGA_DEVFN PCI_DEVFN(1, 0)
#define IDE_DEVFN PCI_DEVFN(30, 0)

enum { DEV_VGA, DEV_IDE, DEV_FLASH, DEV_LPC, DEVICES };

struct machine {
    struct rig *rig;
    struct pci_host *host;
    struct block_backend *disk, *cd;
    struct vga *vga;
    struct device *devices[DEVICES];
};

static void base_changed(void *opaque, u16 base)
{
}

static void routes_changed(void *opaque)
{
}

static void build(struct machine *m)
{
    static const u8 rom[512] = {0x55, 0xaa};
    static u8 flash[FLASH_SIZE];
    struct vga_config vga = {rom, sizeof(rom)};
    struct pflash_config pflash = {.base = FLASH_BASE, .data = flash, .size = FLASH_SIZE, .fd = -1};
    struct lpc_config lpc = {base_changed, routes_changed, m};
    struct ide_config ide = {0};
    struct rig *r = disk_rig_create();

    m->rig = r;
    m->host = rig_pci_host(r);
    m->disk = rig_disk(r, DISK_SIZE, false);
    m->cd = rig_disk(r, DISK_SIZE, true);
    ide.drives[0].backend = m->disk;
    ide.drives[2] = (struct ide_drive_config){.backend = m->cd, .cdrom = true};
    ide.irq[0] = rig_line(r, 14);
    ide.irq[1] = rig_line(r, 15);
    m->vga = vga_create(&r->env, &vga, m->host, VGA_DEVFN, &r->err);
    m->devices[DEV_VGA] = vga_device(m->vga);
    m->devices[DEV_IDE] = ide_device(ide_create(&r->env, &ide, m->host, IDE_DEVFN, &r->err));
    m->devices[DEV_FLASH] = pflash_device(pflash_create(&r->env, &pflash, &r->err));
    m->devices[DEV_LPC] = lpc_device(lpc_create(&r->env, &lpc, m->host, &r->err));
    config_write(r, VGA_DEVFN, PCI_BASE_ADDRESS_0, FRAMEBUFFER, 4);
    config_write(r, VGA_DEVFN, PCI_COMMAND, PCI_COMMAND_MEMORY, 2);
    config_write(r, IDE_DEVFN, PCI_BASE_ADDRESS_0 + 16, BUS_MASTER, 4);
    config_write(r, IDE_DEVFN, PCI_COMMAND, PCI_COMMAND_IO | PCI_COMMAND_MASTER, 2);
}

static void destroy(struct machine *m)
{
    for (unsigned i = 0; i < DEVICES; i++)
        m->devices[i]->ops->destroy(m->devices[i]);
    block_destroy(m->disk);
    block_destroy(m->cd);
    pci_host_device(m->host)->ops->destroy(pci_host_device(m->host));
    disk_rig_destroy(m->rig);
}

/* What `op` says of an access: its size, and whether it reads. */
static void access_by(struct io_bus *bus, u64 at, struct input *in, u8 op)
{
    access_bus(bus, at, 1U << (op >> 6 & 3) % 3, op & 0x20, in);
}

static void work(struct machine *m)
{
    struct device *ide = m->devices[DEV_IDE];

    ide->ops->start(ide);
    ide->ops->stop(ide);
    ide->ops->start(ide);
}

static void look(struct machine *m)
{
    struct vga_image image = {0};

    if (vga_render(m->vga, &image, &m->rig->err) == 0)
        vga_image_free(&image);
    free(vga_text(m->vga, &m->rig->err));
}

static void act(struct machine *m, struct input *in)
{
    static const u16 ports[] = {0x1f0, 0x1f7, 0x170, 0x177, 0x3f6,
                                0x376, 0x3c0, 0x3c4, 0x3ce, 0x3d4};
    u8 op = (u8)take(in, 1);
    struct io_bus *ports_bus = m->rig->env.ports, *mmio = m->rig->env.mmio;

    switch (op & 0x0f) {
    case 0:
        access_by(ports_bus, ports[take(in, 1) % ARRAY_SIZE(ports)], in, op);
        break;
    case 1:
        access_by(ports_bus, 0x1f0 + take(in, 1) % 8, in, op);
        break;
    case 2:
        access_by(ports_bus, 0x170 + take(in, 1) % 8, in, op);
        break;
    case 3:
        access_by(ports_bus, 0x3b0 + take(in, 1) % 0x30, in, op);
        break;
    case 4:
        access_by(ports_bus, BUS_MASTER + take(in, 1) % 16, in, op);
        break;
    case 5:
        access_by(ports_bus, 0x1ce + take(in, 1) % 2, in, 0x40 | (op & 0x20));
        break;
    case 6:
        access_by(mmio, 0xa0000 + take(in, 3) % 0x20000, in, op);
        break;
    case 7:
        access_by(mmio, FLASH_BASE + take(in, 2) % FLASH_SIZE, in, op);
        break;
    case 8:
        access_by(mmio, FRAMEBUFFER + take(in, 3) % MIB(8), in, op);
        break;
    case 9:
        config_write(m->rig, op & 0x10 ? LPC_DEVFN : IDE_DEVFN, take(in, 1), take(in, 4), 4);
        break;
    case 10: { /* a table for DMA */
        u64 entry = take(in, 8);

        memory_write(m->rig->env.memory, take(in, 1) * 8, &entry, sizeof(entry));
        break;
    }
    case 11: /* many words of data */
        for (unsigned i = 0; i < 512; i++)
            access_by(ports_bus, op & 0x10 ? 0x1f0 : 0x170, in, 0x40 | (op & 0x20));
        break;
    case 12:
        look(m);
        break;
    default:
        work(m);
        break;
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct input in = {data, size};
    struct machine m;

    log_set_level(LOG_ERROR);
    build(&m);
    for (unsigned i = 0; i < 300 && in.left; i++)
        act(&m, &in);
    load_damaged_state(m.devices[take(&in, 1) % DEVICES], &in);
    for (unsigned i = 0; i < 100 && in.left; i++)
        act(&m, &in);
    work(&m);
    look(&m);
    destroy(&m);
    return 0;
}
