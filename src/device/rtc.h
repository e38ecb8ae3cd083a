/*
 * The MC146818 real-time clock of a PC, with 128 bytes of CMOS memory (clock registers included) and the
 * 128 bytes of a later chipset's upper bank.
 *
 * The time is the VM's wall clock plus what the guest set. Time and memory are kept by a battery: they
 * survive a reset.
 */
#ifndef DOPPEL_DEVICE_RTC_H
#define DOPPEL_DEVICE_RTC_H

#include "device/device.h"

/* CMOS bytes that a PC's firmware and its guests agree on, for rtc_set_cmos. */
enum {
    CMOS_SHUTDOWN_STATUS = 0x0f,
    CMOS_BASE_MEMORY = 0x15,     /* 16 bits: KiB below 1 MiB */
    CMOS_EXTENDED_MEMORY = 0x17, /* 16 bits: KiB above 1 MiB, at most 65535; also at 0x30 */
    CMOS_EXTENDED_MEMORY2 = 0x30,
    CMOS_CENTURY = 0x32,
    CMOS_MEMORY_16MIB = 0x34, /* 16 bits: 64 KiB units above 16 MiB, at most 65535 */
    CMOS_MEMORY_4GIB = 0x5b,  /* 24 bits: 64 KiB units above 4 GiB */
};

struct rtc;

struct rtc_config {
    struct irq_line irq;
};

struct rtc *rtc_create(const struct device_env *env, const struct rtc_config *cfg,
                       struct error *err);
struct device *rtc_device(struct rtc *rtc);

/* Sets a byte of CMOS memory (14 to 255: not the clock's registers). Any thread. */
void rtc_set_cmos(struct rtc *rtc, u8 index, u8 value);

/* Bit 7 of port 0x70: the guest has shut the NMI off. Any thread. */
bool rtc_nmi_disabled(struct rtc *rtc);

#endif
