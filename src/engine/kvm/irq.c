/*
 * Interrupts under KVM: messages, the eventfds that send them, and the 8259 pair's line.
 *
 * The kernel has the local APICs; the 8259 pair and the IOAPIC are ours ("split irqchip"). A message
 * goes in by KVM_SIGNAL_MSI, or by an irqfd: an eventfd whose signal sends the message that the table
 * of GSI routes has for it (api.rst 4.26, 4.52, 4.75). The table serves two ends:
 *
 *  GSIs below KVM_LEVEL_ROUTES: end of interrupt. The kernel reports the EOI of a vector only when
 *  such a route says that the vector is level-triggered (7.5). The contract's engine doesn't know the
 *  IOAPIC's entries, and needn't: an EOI that matters follows a message with the level bit, so the
 *  first delivery of such a message puts it into the table. Old ones fall out as new ones need their
 *  place, the one longest unused first; what is in the table needlessly costs an exit that the
 *  IOAPIC ignores.
 *
 *  GSIs from there on: the messages of the irqfds.
 */
#include "engine/kvm/kvm.h"
#include "host/log.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>

#define MSI_ADDRESS 0xfee00000
#define MSI_ADDRESS_DEST_SHIFT 12
#define MSI_DATA_LEVEL 0x8000u

#define MAX_ROUTES (KVM_LEVEL_ROUTES + KVM_IRQFDS)

int kvm_irq_init(struct kvm_engine *e, struct error *err)
{
    pthread_mutex_init(&e->route_lock, NULL);
    e->route_table =
        calloc(1, sizeof(*e->route_table) + MAX_ROUTES * sizeof(e->route_table->entries[0]));
    return e->route_table ? 0 : error_host(err, ENOMEM, "can't make KVM's interrupt routes");
}

void kvm_irq_fini(struct kvm_engine *e)
{
    free(e->route_table);
    pthread_mutex_destroy(&e->route_lock);
}

/* --- The table of routes; route_lock is held --- */

static void add_route(struct kvm_irq_routing *table, u32 gsi, u64 address, u32 data)
{
    table->entries[table->nr++] = (struct kvm_irq_routing_entry){
        .gsi = gsi,
        .type = KVM_IRQ_ROUTING_MSI,
        .u.msi = {.address_lo = (u32)address, .address_hi = (u32)(address >> 32), .data = data},
    };
}

/* To the kernel, which takes it as a whole. 0 or -errno. */
static int give_routes(struct kvm_engine *e)
{
    struct kvm_irq_routing *table = e->route_table;

    table->nr = 0;
    for (u32 i = 0; i < KVM_LEVEL_ROUTES; i++) {
        if (e->routes[i].used)
            add_route(table, i, e->routes[i].address, e->routes[i].data);
    }
    for (u32 i = 0; i < KVM_IRQFDS; i++) {
        const struct kvm_irqfd_route *r = &e->irqfds[i];

        if (r->used)
            add_route(table, KVM_LEVEL_ROUTES + i, r->address, r->data);
    }
    return ioctl(e->vm, KVM_SET_GSI_ROUTING, table) < 0 ? -errno : 0;
}

/* --- Level-triggered messages --- */

/* Sees to it that the kernel reports the EOI of this message. */
static void note_level(struct kvm_engine *e, u64 address, u32 data)
{
    struct kvm_level_route *oldest = &e->routes[0];
    int ret;

    pthread_mutex_lock(&e->route_lock);
    e->route_clock++;
    for (unsigned i = 0; i < KVM_LEVEL_ROUTES; i++) {
        struct kvm_level_route *r = &e->routes[i];

        if (r->used && r->address == address && r->data == data) {
            r->used = e->route_clock;
            pthread_mutex_unlock(&e->route_lock);
            return;
        }
        if (r->used < oldest->used)
            oldest = r;
    }
    *oldest = (struct kvm_level_route){.address = address, .data = data, .used = e->route_clock};
    ret = give_routes(e);
    pthread_mutex_unlock(&e->route_lock);
    if (ret)
        log_once(LOG_ERROR, "kvm: cannot route level-triggered interrupts: %s", strerror(-ret));
}

void kvm_irq_note_in_service(struct kvm_vcpu *v, const struct lapic_state *apic)
{
    u32 id = cpuid_model_apic_id(v->engine->config.cpuid, v->index);
    u64 address = MSI_ADDRESS | (u64)id << MSI_ADDRESS_DEST_SHIFT;

    for (unsigned i = 0; i < 8; i++) {
        u32 levels = (apic->irr[i] | apic->isr[i]) & apic->tmr[i];

        for (; levels; levels &= levels - 1)
            note_level(v->engine, address, MSI_DATA_LEVEL | (32 * i + (u32)__builtin_ctz(levels)));
    }
}

/* --- Messages --- */

void kvm_irq_deliver(struct kvm_engine *e, u64 address, u32 data)
{
    struct kvm_msi msi = {
        .address_lo = (u32)address, .address_hi = (u32)(address >> 32), .data = data};

    if (data & MSI_DATA_LEVEL)
        note_level(e, address, data);
    if (ioctl(e->vm, KVM_SIGNAL_MSI, &msi) < 0)
        log_once(LOG_DEBUG, "kvm: a message to %#llx with %#x is refused: %s",
                 (unsigned long long)address, data, strerror(errno));
}

static int set_irqfd(struct kvm_engine *e, const struct kvm_irqfd_route *r, u32 flags)
{
    struct kvm_irqfd irqfd = {
        .fd = (u32)r->fd,
        .gsi = KVM_LEVEL_ROUTES + (u32)(r - e->irqfds),
        .flags = flags,
    };

    return ioctl(e->vm, KVM_IRQFD, &irqfd) < 0 ? -errno : 0;
}

/* The entry of an eventfd, or with fd -1 a free one; NULL: there is none. route_lock is held. */
static struct kvm_irqfd_route *find_irqfd(struct kvm_engine *e, int fd)
{
    for (unsigned i = 0; i < KVM_IRQFDS; i++) {
        struct kvm_irqfd_route *r = &e->irqfds[i];

        if (fd < 0 ? !r->used : r->used && r->fd == fd)
            return r;
    }
    return NULL;
}

int kvm_irq_bind(struct kvm_engine *e, int fd, u64 address, u32 data)
{
    struct kvm_irqfd_route *r;
    bool fresh = false;
    int ret = -ENOSPC;

    /* The route of a level-triggered message has to be among those whose EOI is reported. */
    if (data & MSI_DATA_LEVEL)
        return -EINVAL;
    pthread_mutex_lock(&e->route_lock);
    r = find_irqfd(e, fd);
    if (!r) {
        r = find_irqfd(e, -1);
        fresh = true;
    }
    if (r) {
        struct kvm_irqfd_route before = *r;

        *r = (struct kvm_irqfd_route){.used = true, .fd = fd, .address = address, .data = data};
        ret = give_routes(e);
        if (!ret && fresh)
            ret = set_irqfd(e, r, 0);
        if (ret)
            *r = before;
    }
    pthread_mutex_unlock(&e->route_lock);
    return ret;
}

void kvm_irq_unbind(struct kvm_engine *e, int fd)
{
    struct kvm_irqfd_route *r;

    pthread_mutex_lock(&e->route_lock);
    r = find_irqfd(e, fd);
    if (r) {
        (void)set_irqfd(e, r, KVM_IRQFD_FLAG_DEASSIGN); /* it is there: this can't fail */
        r->used = false;
    }
    pthread_mutex_unlock(&e->route_lock);
}

unsigned kvm_irq_bound(struct kvm_engine *e)
{
    unsigned n = 0;

    pthread_mutex_lock(&e->route_lock);
    for (unsigned i = 0; i < KVM_IRQFDS; i++)
        n += e->irqfds[i].used;
    pthread_mutex_unlock(&e->route_lock);
    return n;
}

/* --- The 8259 pair --- */

void kvm_irq_set_extint(struct kvm_engine *e, bool level)
{
    atomic_store(&e->extint, level);
    /* A line that falls is found low when the PIC is asked. */
    for (unsigned i = 0; level && i < e->nvcpus; i++) {
        struct kvm_vcpu *v = atomic_load(&e->vcpus[i]);

        if (v)
            kvm_attend(v);
    }
}
