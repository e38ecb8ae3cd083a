/*
 * What virtio.c (the device's life) and virtio_pci.c (its registers) share. The device's lock is held.
 */
#ifndef DOPPEL_DEVICE_VIRTIO_INTERNAL_H
#define DOPPEL_DEVICE_VIRTIO_INTERNAL_H

#include "device/virtio/virtio.h"

/* The driver wrote to the status register; 0 begins a reset. */
void virtio_set_status(struct virtio *v, u8 value);
void virtio_enable_queue(struct virtio *v, unsigned q);
void virtio_reset_queue(struct virtio *v, unsigned q);

/* In virtio_pci.c: capabilities and BARs. */
void virtio_pci_setup(struct virtio *v);
/* Where queue q is notified: an offset in VIRTIO_BAR. */
u64 virtio_pci_notify_offset(unsigned q);
void virtio_pci_config_read(struct pci_device *pci, unsigned offset, unsigned size);
void virtio_pci_config_written(struct pci_device *pci, unsigned offset, unsigned size);

#endif
