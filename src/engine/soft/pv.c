#include "engine/soft/pv.h"

#include "engine/soft/lapic.h"
#include "engine/soft/mmu.h"

#include <fcntl.h>
#include <stdlib.h>
#include <unistd.h>

#define STEAL_ENABLE BIT(0)
#define STEAL_RESERVED 0x3eull
#define EOI_ENABLE BIT(0)
#define EOI_RESERVED 0x2ull
#define EOI_WORD 4 /* bytes, on 4 */
#define EOI_PENDING 0x01u
/* Reading the host's account takes a microsecond or two. */
#define STEAL_INTERVAL_NS 2000000

#define VCPU_PREEMPTED 0x01u /* it doesn't run now */
#define VCPU_FLUSH_TLB 0x02u /* set by another vCPU meanwhile: flush before you run */

/* struct kvm_steal_time, 64 bytes on 64 bytes. */
struct steal_time {
    u64 steal;   /* ns in which the vCPU could have run and didn't */
    u32 version; /* odd while it changes */
    u32 flags;
    _Atomic u8 preempted; /* VCPU_*; other vCPUs of the guest change it */
    u8 pad[47];
};
_Static_assert(sizeof(struct steal_time) == 64, "as guests know it");

/* The guest's structure, or NULL: none is set, or it is not in RAM. */
static struct steal_time *steal_time(const struct soft_vcpu *v)
{
    u64 value = v->cpu.msr.kvm_steal_time;

    if (!(value & STEAL_ENABLE) || !soft_has(v, FEATURE_KVM_STEAL_TIME))
        return NULL;
    return memory_host(v->engine->config.memory, value & ~STEAL_ENABLE, sizeof(struct steal_time));
}

static void tell_written(const struct soft_vcpu *v)
{
    memory_tell_written(v->engine->config.memory, v->cpu.msr.kvm_steal_time & ~STEAL_ENABLE,
                        sizeof(struct steal_time));
}

/* Nanoseconds that this thread has waited for a processor, by the host's account; 0 where it keeps none. */
static u64 host_wait_ns(struct soft_vcpu *v)
{
    char text[64], *wait;
    ssize_t n;

    if (!v->schedstat_fd)
        v->schedstat_fd = open("/proc/thread-self/schedstat", O_RDONLY | O_CLOEXEC);
    if (v->schedstat_fd < 0)
        return 0;
    n = pread(v->schedstat_fd, text, sizeof(text) - 1, 0);
    if (n <= 0)
        return 0;
    text[n] = '\0';
    strtoull(text, &wait, 10); /* the time that it ran comes first */
    return strtoull(wait, NULL, 10);
}

void pv_update_steal(struct soft_vcpu *v)
{
    struct steal_time *t = steal_time(v);
    u64 now, wait;

    if (!t)
        return;
    now = vm_clock_now(v->engine->config.clock);
    if (now - v->steal_looked_at < STEAL_INTERVAL_NS)
        return;
    v->steal_looked_at = now;
    wait = host_wait_ns(v);
    if (wait <= v->steal_seen)
        return;
    t->version |= 1;
    atomic_signal_fence(memory_order_seq_cst);
    t->steal += wait - v->steal_seen;
    atomic_signal_fence(memory_order_seq_cst);
    t->version++;
    v->steal_seen = wait;
    tell_written(v);
}

bool pv_set_steal_time(struct soft_vcpu *v, u64 value)
{
    if ((value & STEAL_RESERVED) ||
        ((value & STEAL_ENABLE) &&
         !memory_host(v->engine->config.memory, value & ~STEAL_ENABLE, sizeof(struct steal_time))))
        return false;
    v->cpu.msr.kvm_steal_time = value;
    v->steal_seen = host_wait_ns(v);
    return true;
}

/* A guest's kernel spares itself the IPI to who sleeps, and asks for the flush here. */
void pv_begin_sleep(struct soft_vcpu *v)
{
    struct steal_time *t = steal_time(v);

    if (!t)
        return;
    atomic_store(&t->preempted, VCPU_PREEMPTED);
    tell_written(v);
}

void pv_end_sleep(struct soft_vcpu *v)
{
    struct steal_time *t = steal_time(v);

    if (!t)
        return;
    if (atomic_exchange(&t->preempted, 0) & VCPU_FLUSH_TLB)
        soft_tlb_flush(v);
    tell_written(v);
    pv_update_steal(v);
}

/* --- EOI --- */

/* Bit 0: the interrupt in service may be ended by clearing it. NULL: the guest has no such word. */
static u8 *eoi_word(const struct soft_vcpu *v)
{
    u64 value = v->cpu.msr.kvm_pv_eoi;

    if (!(value & EOI_ENABLE) || !soft_has(v, FEATURE_KVM_PV_EOI))
        return NULL;
    return memory_host(v->engine->config.memory, value & ~EOI_ENABLE, EOI_WORD);
}

static void set_eoi_word(struct soft_vcpu *v, u8 *word, u8 value)
{
    *word = value;
    memory_tell_written(v->engine->config.memory, v->cpu.msr.kvm_pv_eoi & ~EOI_ENABLE, EOI_WORD);
}

bool pv_set_eoi(struct soft_vcpu *v, u64 value)
{
    if ((value & EOI_RESERVED) ||
        ((value & EOI_ENABLE) &&
         !memory_host(v->engine->config.memory, value & ~EOI_ENABLE, EOI_WORD)))
        return false;
    lapic_sync_eoi(v->lapic);
    v->cpu.msr.kvm_pv_eoi = value;
    return true;
}

void pv_offer_eoi(struct soft_vcpu *v)
{
    u8 *word = eoi_word(v);

    if (word && lapic_defer_eoi(v->lapic))
        set_eoi_word(v, word, *word | EOI_PENDING);
}

bool pv_take_eoi(struct soft_vcpu *v)
{
    u8 *word = eoi_word(v);

    if (!word)
        return false;
    if (!(*word & EOI_PENDING))
        return true;
    set_eoi_word(v, word, *word & ~EOI_PENDING);
    return false;
}

void pv_destroy(struct soft_vcpu *v)
{
    if (v->schedstat_fd > 0)
        close(v->schedstat_fd);
}
