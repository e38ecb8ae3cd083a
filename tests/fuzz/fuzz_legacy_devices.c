/*
 * The legacy devices together on one port bus: input bytes, four at a time, become port accesses, steps of
 * time, input from outside, and acknowledge cycles.
 */
#include "device/i8042.h"
#include "device/pic.h"
#include "device/pit.h"
#include "device/rtc.h"
#include "device/serial.h"
#include "device/sysport.h"

#include "../unit/device_rig.h"

static const u16 ports[] = {0x20, 0x21,  0xa0,  0xa1,  0x4d0, 0x4d1, 0x40,  0x41,  0x42,  0x43,
                            0x61, 0x60,  0x64,  0x70,  0x71,  0x72,  0x73,  0x92,  0xcf9, 0x80,
                            0xf4, 0x3f8, 0x3f9, 0x3fa, 0x3fb, 0x3fc, 0x3fd, 0x3fe, 0x3ff};

static bool stream_full;

static size_t put(void *opaque, const u8 *buf, size_t len)
{
    return stream_full ? 0 : len;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct rig *r = rig_create();
    struct a20_gate gate;

    a20_gate_init(&gate, NULL, NULL);
    struct pic_config pic_config = {rig_line(r, 31)};
    struct pic *pic = pic_create(&r->env, &pic_config, &r->err);
    struct irq_line lines[16];
    for (unsigned i = 0; i < ARRAY_SIZE(lines); i++)
        lines[i] = (struct irq_line){.set = pic_set_irq, .sink = pic, .n = i};
    struct pit_config pit_config = {lines[0]};
    struct rtc_config rtc_config = {lines[8]};
    struct serial_config serial_config = {0x3f8, lines[4], {put, NULL, NULL}};
    struct i8042_config i8042_config = {lines[1], lines[12], &gate, rig_power(r)};
    struct sysport_config sysport_config = {&gate, rig_power(r), 0xf4, false};
    struct serial *serial = serial_create(&r->env, &serial_config, &r->err);
    struct i8042 *i8042 = i8042_create(&r->env, &i8042_config, &r->err);
    struct device *devices[] = {
        serial_device(serial),
        i8042_device(i8042),
        pit_device(pit_create(&r->env, &pit_config, &r->err)),
        rtc_device(rtc_create(&r->env, &rtc_config, &r->err)),
        sysport_device(sysport_create(&r->env, &sysport_config, &r->err)),
        pic_device(pic),
    };

    for (; size >= 4; data += 4, size -= 4) {
        u16 port = ports[data[1] % ARRAY_SIZE(ports)];

        switch (data[0] % 8) {
        case 0:
            io_bus_read(r->env.ports, port, 1U << (data[2] & 3));
            break;
        case 1:
            serial_receive(serial, data, data[1] & 3);
            stream_full = data[2] & 1;
            serial_writable(serial);
            break;
        case 2:
            i8042_key(i8042, (u16)(data[1] | data[2] << 8), data[3] & 1);
            break;
        case 3:
            i8042_mouse(i8042, (s8)data[1] * 100, (s8)data[2], (s8)data[3], data[3]);
            break;
        case 4:
            rig_advance_bounded(r->env.clock, (u64)data[1] << (data[2] % 40), 50);
            pic_ack(pic);
            break;
        default:
            io_bus_write(r->env.ports, port, data[2] | data[3] << 8, 1U << (data[0] >> 6));
            break;
        }
    }
    for (unsigned i = 0; i < ARRAY_SIZE(devices); i++)
        devices[i]->ops->destroy(devices[i]);
    rig_destroy(r);
    return 0;
}
