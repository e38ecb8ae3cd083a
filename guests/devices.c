/*
 * A driver that does anything: random reads and writes of every PCI function's configuration space and BARs, of old
 * devices' ports, and of the memory that rings and commands lie in. Whatever devices make of it, the machine goes on;
 * what this guest would do to itself it leaves out: memory of its own for a ring, messages that reset the processor,
 * ports that end the machine.
 */
#include "guest.h"

#define ROUNDS 1000
#define STEPS 400
#define SCRATCH 0x04000000UL
#define SCRATCH_SIZE 0x40000UL
#define FUNCTIONS_MAX 64
#define BARS 6
#define RING_AT(q, area) (0x1000u * (3u * (q) + (area)))

struct function {
    u32 at; /* for the configuration address */
    u32 bars[BARS], sizes[BARS];
    u32 common, notify; /* virtio's structures (VIRTIO 1.2, 4.1.4.3 and 4.1.4.4); 0: none */
};

static struct function functions[FUNCTIONS_MAX];
static unsigned nfunctions;
static u64 state = 1;

static u32 next(void)
{
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return (u32)(state >> 16);
}

static void out32(u16 port, u32 value)
{
    __asm__ volatile("outl %0, %1" : : "a"(value), "Nd"(port));
}
static u32 in32(u16 port)
{
    u32 value;

    __asm__ volatile("inl %1, %0" : "=a"(value) : "Nd"(port));
    return value;
}

static u32 config_read(u32 at, u32 offset)
{
    out32(0xcf8, at | (offset & ~3u));
    return in32(0xcfc);
}
static void config_write(u32 at, u32 offset, u32 value)
{
    out32(0xcf8, at | (offset & ~3u));
    out32(0xcfc, value);
}

/* --- What there is --- */

static void measure(struct function *f, unsigned n)
{
    u32 offset = 0x10 + 4 * n, mask;

    f->bars[n] = config_read(f->at, offset);
    config_write(f->at, offset, ~0u);
    mask = config_read(f->at, offset);
    config_write(f->at, offset, f->bars[n]);
    mask &= f->bars[n] & 1 ? ~3u : ~15u;
    f->sizes[n] = mask ? ~mask + 1 : 0;
    if (f->bars[n] & 1)
        f->sizes[n] &= 0xffff;
}

/* Where a structure of virtio's is, by its capability (4.1.4). */
static u32 virtio_structure(const struct function *f, u8 type)
{
    for (u8 cap = (u8)config_read(f->at, 0x34); cap; cap = (u8)(config_read(f->at, cap) >> 8)) {
        u32 head = config_read(f->at, cap);

        if ((u8)head == 9 && head >> 24 == type)
            return (f->bars[(u8)config_read(f->at, cap + 4u) % BARS] & ~15u) +
                   config_read(f->at, cap + 8u);
    }
    return 0;
}

static void look(u32 at)
{
    struct function *f = &functions[nfunctions];
    bool bridge;

    if (config_read(at, 0) == ~0u || nfunctions == FUNCTIONS_MAX)
        return;
    nfunctions++;
    f->at = at;
    bridge = config_read(at, 0xc) >> 16 & 0x7f;
    for (unsigned n = 0; n < (bridge ? 2 : BARS); n++)
        measure(f, n);
    if ((config_read(at, 0) & 0xffff) == 0x1af4) {
        f->common = virtio_structure(f, 1);
        f->notify = virtio_structure(f, 2);
    }
}

/* As it was, so that the next round meets the device again. */
static void restore(const struct function *f)
{
    for (unsigned n = 0; n < BARS; n++)
        if (f->sizes[n])
            config_write(f->at, 0x10 + 4 * n, f->bars[n]);
    config_write(f->at, 4, 7);
}

/* --- What is written --- */

/* A small number, a place in the scratch memory, or one where there is none (and no message of an interrupt's). */
static u32 value32(void)
{
    u32 r = next();

    switch (next() & 3) {
    case 0:
        return 0;
    case 1:
        return r & 0xff;
    case 2:
        return (u32)SCRATCH + (r & (SCRATCH_SIZE - 1) & ~15u);
    default:
        return 0x80000000 | (r & 0x5fffffff);
    }
}

static void fill_scratch(void)
{
    volatile u32 *scratch = (volatile u32 *)SCRATCH;

    for (unsigned n = 0; n < 256; n++)
        scratch[next() % (SCRATCH_SIZE / 4)] = value32();
}

/* Narrow writes change the low part of a register only: its high part is what makes it a place. */
static void poke(u64 at, u32 size)
{
    u64 offset = next() % size;

    switch (next() & 7) {
    case 0:
        (void)*(volatile u8 *)(at + offset);
        break;
    case 1:
        (void)*(volatile u32 *)(at + (offset & ~3u));
        break;
    case 2:
        (void)*(volatile u64 *)(at + (offset & ~7u));
        break;
    case 3:
        *(volatile u8 *)(at + (offset & ~3u)) = (u8)next();
        break;
    case 4:
        *(volatile u16 *)(at + (offset & ~3u)) = (u16)(next() & 0xff);
        break;
    case 5:
        *(volatile u64 *)(at + (offset & ~7u)) =
            (u64)(next() & 3 ? 0 : value32()) << 32 | value32();
        break;
    default:
        *(volatile u32 *)(at + (offset & ~3u)) = value32();
        break;
    }
}

static void poke_bar(const struct function *f)
{
    unsigned n = next() % BARS;
    u32 size = f->sizes[n], bar = f->bars[n];

    if (!size)
        return;
    if (bar & 1) {
        u16 port = (u16)((bar & ~3u) + next() % size);

        if (next() & 1)
            outb(port, (u8)next());
        else
            inb(port);
    } else if (bar & ~15u) {
        /* Registers are at the start, and in a large BAR at the start of pages. */
        poke((bar & ~15u) + (size > 4096 ? next() % (size / 4096) * 4096 : 0),
             size < 256 || !(next() & 7) ? (size < 4096 ? size : 4096) : 256);
    }
}

/* Ports of old devices, without those that end the machine, mask addresses, or print. */
static void poke_port(void)
{
    static const struct {
        u16 first, count;
    } ports[] = {{0x20, 2},  {0x40, 4},  {0x60, 1},  {0x70, 2},  {0xa0, 2},  {0x170, 8}, {0x1f0, 8},
                 {0x376, 1}, {0x3f6, 1}, {0x4d0, 2}, {0x510, 2}, {0x608, 4}, {0x620, 8}};
    unsigned n = next() % ARRAY_SIZE(ports);
    u16 port = (u16)(ports[n].first + next() % ports[n].count);

    if (next() & 1)
        outb(port, (u8)next());
    else
        inb(port);
}

/* A driver begins as it should, with its rings in the scratch memory. */
static void begin_virtio(const struct function *f)
{
    volatile u8 *c = (volatile u8 *)(word)f->common;
    bool packed = next() & 1;

    c[0x14] = 0;
    c[0x14] = 1;
    c[0x14] = 3;
    *(volatile u32 *)(c + 8) = 1;
    *(volatile u32 *)(c + 12) = packed ? 5 : 1; /* VERSION_1, RING_PACKED */
    c[0x14] = 11;
    for (u16 q = 0; q < 4; q++) {
        *(volatile u16 *)(c + 0x16) = q;
        *(volatile u16 *)(c + 0x18) = 16;
        for (unsigned area = 0; area < 3; area++) {
            *(volatile u32 *)(c + 0x20 + 8 * area) = (u32)SCRATCH + RING_AT(q, area);
            *(volatile u32 *)(c + 0x24 + 8 * area) = 0;
        }
        *(volatile u16 *)(c + 0x1c) = 1;
    }
    c[0x14] = 15;
}

/* Descriptors that could be right, made available, and the device told. */
static void give_chains(const struct function *f)
{
    u16 q = next() & 3;
    volatile u32 *desc = (volatile u32 *)(SCRATCH + RING_AT(q, 0));
    volatile u16 *driver = (volatile u16 *)(SCRATCH + RING_AT(q, 1));

    for (unsigned n = 0; n < 16; n++) {
        desc[4 * n] = value32();
        desc[4 * n + 1] = 0;
        desc[4 * n + 2] = next() & 1 ? next() & 0xfff : value32();
        desc[4 * n + 3] =
            (next() & 0x000f0087) | (next() & 0x8080); /* next or ID, flags of both kinds */
        driver[2 + n] = next() & 15;
    }
    driver[1] += next() & 3;
    *(volatile u16 *)(word)(f->notify + 4u * q) = q;
}

static void step(void)
{
    const struct function *f = &functions[next() % nfunctions];

    switch (next() & 15) {
    case 0:
        config_write(f->at, next() & 0xfc, value32());
        break;
    case 1:
        config_read(f->at, next() & 0xfc);
        break;
    case 2:
    case 3:
        poke_port();
        break;
    case 4:
        fill_scratch();
        break;
    case 5:
        if (f->common)
            begin_virtio(f);
        break;
    case 6:
    case 7:
        if (f->notify)
            give_chains(f);
        break;
    default:
        poke_bar(f);
        break;
    }
}

void guest_main(void)
{
    for (u32 devfn = 0; devfn < 256; devfn++)
        look(0x80000000 | devfn << 8);
    check("functions", nfunctions > 8);
    for (unsigned n = 0; n < ROUNDS; n++) {
        for (unsigned k = 0; k < nfunctions; k++)
            restore(&functions[k]);
        for (unsigned k = 0; k < STEPS; k++)
            step();
    }
    check("the-machine-goes-on", true); /* who gets here says so */
}
