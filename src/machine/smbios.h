/*
 * SMBIOS tables for firmware (DMTF DSP0134, version 2.8): what the machine is called, its serial number and UUID.
 */
#ifndef DOPPEL_MACHINE_SMBIOS_H
#define DOPPEL_MACHINE_SMBIOS_H

#include "host/types.h"

#define SMBIOS_TABLES_FILE "etc/smbios/smbios-tables"
#define SMBIOS_ANCHOR_FILE "etc/smbios/smbios-anchor"
#define SMBIOS_ANCHOR_SIZE 31
#define SMBIOS_TABLES_MAX 2048

struct smbios_config {
    const char *product, *serial; /* up to 64 characters; NULL: "doppel", none */
    u8 uuid[16];                  /* in the order in which it is written down */
    bool has_uuid;
    u64 memory; /* bytes */
    unsigned cpus;
};

struct smbios {
    u8 tables[SMBIOS_TABLES_MAX];
    u32 len;
    u8 anchor[SMBIOS_ANCHOR_SIZE]; /* the firmware puts in where the tables are */
};

void smbios_build(struct smbios *s, const struct smbios_config *cfg);

#endif
