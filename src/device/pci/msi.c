/*
 * MSI and MSI-X: PCI Local Bus Specification 3.0, section 6.8.
 *
 * A vector that is masked when its event comes sets its pending bit; unmasking sends it and clears the
 * bit (6.8.3.2). Without bus mastering a device can't write a message: it waits likewise. With the
 * capability disabled there is nothing to send and nothing pending: the device uses INTx.
 *
 * Where the engine binds messages to eventfds (bus/irq.h), each MSI-X vector gets an eventfd when it first sends,
 * and a signal of it is how it sends. Masks and pending bits are looked at before, so the engine needn't know
 * them; what the guest writes into a vector's entry is told to the engine when the vector sends next, for
 * drivers write entries word by word.
 */
#include "device/pci/pci.h"

#include "device/pci/internal.h"

#include <assert.h>
#include <errno.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

static u64 value_mask(unsigned size)
{
    return size >= 8 ? UINT64_MAX : BIT(8 * size) - 1;
}

/* ---- MSI ---- */

void pci_add_msi(struct pci_device *pci, unsigned vectors)
{
    unsigned log2 = (unsigned)__builtin_ctz(vectors), cap;

    assert(vectors >= 1 && vectors <= 32 && (vectors & (vectors - 1)) == 0);
    cap = pci_add_capability(pci, PCI_CAP_ID_MSI, PCI_MSI_LENGTH);
    pci->msi_cap = cap;
    pci_config_set16(pci, cap + PCI_MSI_FLAGS,
                     log2 << PCI_MSI_FLAGS_CAPABLE_SHIFT | PCI_MSI_FLAGS_64BIT |
                         PCI_MSI_FLAGS_MASKBIT);
    /* The flags are the upper half of the capability's first register. */
    pci_config_allow32(pci, cap, (u32)(PCI_MSI_FLAGS_ENABLE | PCI_MSI_FLAGS_ENABLED) << 16);
    pci_config_allow32(pci, cap + PCI_MSI_ADDRESS_LO, ~3U);
    pci_config_allow32(pci, cap + PCI_MSI_ADDRESS_HI, ~0U);
    pci_config_allow32(pci, cap + PCI_MSI_DATA, 0xffff);
    pci_config_allow32(pci, cap + PCI_MSI_MASK, (u32)(BIT(vectors) - 1));
    memset(pci->own + cap + PCI_MSI_PENDING, 0xff, 4);
}

bool pci_msi_enabled(const struct pci_device *pci)
{
    return pci->msi_cap &&
           (pci_config_get16(pci, pci->msi_cap + PCI_MSI_FLAGS) & PCI_MSI_FLAGS_ENABLE);
}

/* How many vectors the guest gave: it may grant fewer than the device has, and not more. */
static unsigned msi_granted(const struct pci_device *pci)
{
    u16 flags = pci_config_get16(pci, pci->msi_cap + PCI_MSI_FLAGS);
    unsigned granted = (flags & PCI_MSI_FLAGS_ENABLED) >> PCI_MSI_FLAGS_ENABLED_SHIFT;
    unsigned capable = flags >> PCI_MSI_FLAGS_CAPABLE_SHIFT & 7;

    return 1U << MIN(granted, capable);
}

void pci_msi_update(struct pci_device *pci)
{
    unsigned cap = pci->msi_cap;
    u32 pending, ready, data;
    u64 address;

    if (!pci_msi_enabled(pci) || !pci_is_bus_master(pci))
        return;
    pending = pci_config_get32(pci, cap + PCI_MSI_PENDING);
    ready = pending & ~pci_config_get32(pci, cap + PCI_MSI_MASK);
    if (!ready)
        return;
    pci_config_set32(pci, cap + PCI_MSI_PENDING, pending & ~ready);
    address = pci_config_get32(pci, cap + PCI_MSI_ADDRESS_LO) |
              (u64)pci_config_get32(pci, cap + PCI_MSI_ADDRESS_HI) << 32;
    data = pci_config_get16(pci, cap + PCI_MSI_DATA);
    for (; ready; ready &= ready - 1) {
        u32 vector = (u32)__builtin_ctz(ready);

        /* The device changes the low bits of the data that the guest gave it (6.8.1.6). */
        pci_host_send(pci->host, address, (data & ~(msi_granted(pci) - 1)) | vector);
    }
}

void pci_msi_notify(struct pci_device *pci, unsigned vector)
{
    unsigned pending = pci->msi_cap + PCI_MSI_PENDING;

    if (!pci_msi_enabled(pci))
        return;
    /* Events whose vector was not granted share those that were. */
    vector &= msi_granted(pci) - 1;
    pci_config_set32(pci, pending, pci_config_get32(pci, pending) | (u32)BIT(vector));
    pci_msi_update(pci);
}

/* ---- MSI-X ---- */

static u16 msix_flags(const struct pci_device *pci)
{
    return pci->msix_cap ? pci_config_get16(pci, pci->msix_cap + PCI_MSIX_FLAGS) : 0;
}

bool pci_msix_enabled(const struct pci_device *pci)
{
    return msix_flags(pci) & PCI_MSIX_FLAGS_ENABLE;
}

static bool msix_is_held_back(const struct pci_device *pci, unsigned vector)
{
    return !pci_is_bus_master(pci) || (msix_flags(pci) & PCI_MSIX_FLAGS_MASKALL) ||
           (pci->msix[vector].control & PCI_MSIX_ENTRY_CTRL_MASKBIT);
}

/* Whether the vector's eventfd sends this message: if it may be, it does from now on. */
static bool msix_bind(struct pci_device *pci, unsigned vector, u64 address, u32 data)
{
    struct pci_msix_route *r = &pci->msix_routes[vector];
    int fd = r->fd;

    if (fd >= 0 && r->address == address && r->data == data)
        return true;
    if (fd < 0 && pci_host_binds(pci->host))
        fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (fd < 0)
        return false;
    if (pci_host_bind(pci->host, fd, address, data)) {
        *r = (struct pci_msix_route){.fd = fd, .address = address, .data = data};
        return true;
    }
    if (r->fd < 0)
        close(fd);
    return false;
}

static void msix_send(struct pci_device *pci, unsigned vector)
{
    const struct pci_msix_entry *e = &pci->msix[vector];
    u64 address = (u64)e->address_hi << 32 | e->address_lo;

    if (!msix_bind(pci, vector, address, e->data))
        pci_host_send(pci->host, address, e->data);
    else
        (void)eventfd_write(pci->msix_routes[vector].fd, 1); /* full: the signal is under way */
}

void pci_msix_unbind(struct pci_device *pci)
{
    for (unsigned i = 0; i < pci->msix_vectors; i++) {
        struct pci_msix_route *r = &pci->msix_routes[i];

        if (r->fd < 0)
            continue;
        pci_host_unbind(pci->host, r->fd);
        close(r->fd);
        r->fd = -1;
    }
}

void pci_msix_notify(struct pci_device *pci, unsigned vector)
{
    if (vector >= pci->msix_vectors || !pci_msix_enabled(pci))
        return;
    if (msix_is_held_back(pci, vector))
        pci->msix_pending[vector / 64] |= BIT(vector % 64);
    else
        msix_send(pci, vector);
}

void pci_msix_clear(struct pci_device *pci, unsigned vector)
{
    if (vector < pci->msix_vectors)
        pci->msix_pending[vector / 64] &= ~BIT(vector % 64);
}

static void msix_update_vector(struct pci_device *pci, unsigned vector)
{
    u64 *pending = &pci->msix_pending[vector / 64], bit = BIT(vector % 64);

    if (!(*pending & bit) || msix_is_held_back(pci, vector))
        return;
    *pending &= ~bit;
    msix_send(pci, vector);
}

void pci_msix_update(struct pci_device *pci)
{
    if (!pci->msix_cap)
        return;
    for (unsigned i = 0; i < ARRAY_SIZE(pci->msix_pending); i++) {
        if (!pci_msix_enabled(pci))
            pci->msix_pending[i] = 0;
        for (u64 left = pci->msix_pending[i]; left; left &= left - 1)
            msix_update_vector(pci, 64 * i + (unsigned)__builtin_ctzll(left));
    }
}

static u32 *msix_register(struct pci_msix_entry *e, unsigned offset)
{
    switch (offset & 12) {
    case 0:
        return &e->address_lo;
    case 4:
        return &e->address_hi;
    case 8:
        return &e->data;
    default:
        return &e->control;
    }
}

/* The table comes first in the BAR, the pending bits in its second half. */
static u64 msix_bar_read(void *opaque, u64 offset, unsigned size)
{
    struct pci_device *pci = opaque;
    u64 half = pci->bars[pci->config[pci->msix_cap + PCI_MSIX_TABLE] & 7].size / 2;
    u32 value = 0;

    device_lock(&pci->dev);
    if (offset < pci->msix_vectors * (u64)PCI_MSIX_ENTRY_SIZE)
        value = *msix_register(&pci->msix[offset / PCI_MSIX_ENTRY_SIZE], offset & 15);
    else if (offset >= half && offset - half < sizeof(pci->msix_pending))
        value = pci->msix_pending[(offset - half) / 8] >> ((offset & 4) ? 32 : 0);
    device_unlock(&pci->dev);
    return value >> 8 * (offset & 3) & value_mask(size);
}

/* Software writes whole dwords (6.8.2); what else comes is merged into them. */
static void msix_bar_write(void *opaque, u64 offset, u64 value, unsigned size)
{
    struct pci_device *pci = opaque;
    unsigned shift = 8 * (offset & 3);
    u32 mask = (u32)(value_mask(size) << shift);

    if (offset >= pci->msix_vectors * (u64)PCI_MSIX_ENTRY_SIZE)
        return;
    device_lock(&pci->dev);
    unsigned vector = offset / PCI_MSIX_ENTRY_SIZE;
    u32 *reg = msix_register(&pci->msix[vector], offset & 15);
    *reg = (*reg & ~mask) | ((u32)(value << shift) & mask);
    pci->msix[vector].control &= PCI_MSIX_ENTRY_CTRL_MASKBIT;
    msix_update_vector(pci, vector);
    device_unlock(&pci->dev);
}

static const struct io_ops msix_bar_ops = {msix_bar_read, msix_bar_write, 4};

void pci_add_msix(struct pci_device *pci, unsigned vectors, unsigned bar)
{
    unsigned cap = pci_add_capability(pci, PCI_CAP_ID_MSIX, PCI_MSIX_LENGTH);
    u32 half = 2048;

    assert(vectors >= 1 && vectors <= PCI_MSIX_MAX);
    while (half < vectors * PCI_MSIX_ENTRY_SIZE)
        half *= 2;
    pci_add_bar(pci, bar, PCI_BAR_MEM32, 2ULL * half, &msix_bar_ops, pci);
    pci->msix_cap = cap;
    pci->msix_vectors = vectors;
    for (unsigned i = 0; i < vectors; i++)
        pci->msix_routes[i].fd = -1;
    pci_config_set16(pci, cap + PCI_MSIX_FLAGS, vectors - 1);
    pci_config_allow32(pci, cap, (u32)(PCI_MSIX_FLAGS_ENABLE | PCI_MSIX_FLAGS_MASKALL) << 16);
    pci_config_set32(pci, cap + PCI_MSIX_TABLE, bar);
    pci_config_set32(pci, cap + PCI_MSIX_PBA, half | bar);
}

int pci_msix_check_loaded(const struct pci_device *pci, struct error *err)
{
    for (unsigned i = 0; i < PCI_MSIX_MAX; i++) {
        bool exists = i < pci->msix_vectors;
        u64 pending = pci->msix_pending[i / 64] & BIT(i % 64);

        if ((pending && !exists) ||
            (pci->msix[i].control & ~(u32)(exists ? PCI_MSIX_ENTRY_CTRL_MASKBIT : 0)))
            return error_input(err, "%s: saved MSI-X vector %u is impossible", pci->dev.name, i);
    }
    return 0;
}
