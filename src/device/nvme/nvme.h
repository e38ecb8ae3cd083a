/*
 * An NVMe controller with disks as its namespaces: NVM Express 1.4.
 */
#ifndef DOPPEL_DEVICE_NVME_NVME_H
#define DOPPEL_DEVICE_NVME_NVME_H

#include "block/block.h"
#include "device/pci/host.h"

#define NVME_NAMESPACES_MAX 16
#define NVME_SERIAL_SIZE 20

struct nvme;

struct nvme_config {
    const char *serial; /* the controller's; longer ones are cut off. Differs from every other's */
    struct block_backend *namespaces[NVME_NAMESPACES_MAX]; /* borrowed; outlive the device */
    unsigned count;                                        /* 1 or more; the first is NSID 1 */
};

/* The controller, on the bus at a place (pci.h). NULL with err set. */
struct nvme *nvme_create(const struct device_env *env, const struct nvme_config *cfg,
                         struct pci_host *host, u16 place, struct error *err);
struct device *nvme_device(struct nvme *n);

#endif
