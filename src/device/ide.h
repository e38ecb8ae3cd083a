/*
 * An IDE controller as the PIIX3 has it: two channels at the ports and interrupts of the old PC, two drives each,
 * by programmed I/O or bus-master DMA. Drives are ATA disks or ATAPI CD-ROMs.
 */
#ifndef DOPPEL_DEVICE_IDE_H
#define DOPPEL_DEVICE_IDE_H

#include "block/block.h"
#include "device/pci/host.h"

#define IDE_CHANNELS 2
#define IDE_DRIVES 4 /* channel n has 2n and 2n + 1 */

struct ide;

struct ide_drive_config {
    struct block_backend *backend; /* borrowed; outlives the device. NULL: no drive */
    const char *serial;            /* up to 20 characters; NULL: one is made up */
    bool cdrom;                    /* its medium can be read only */
};

struct ide_config {
    struct ide_drive_config drives[IDE_DRIVES];
    struct irq_line irq[IDE_CHANNELS];
};

struct ide *ide_create(const struct device_env *env, const struct ide_config *cfg,
                       struct pci_host *host, u8 devfn, struct error *err);
struct device *ide_device(struct ide *ide);

#endif
