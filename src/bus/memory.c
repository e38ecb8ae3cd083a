#include "bus/memory.h"

#include "bus/memory_file.h"

#include <errno.h>
#include <linux/mman.h> /* MAP_HUGE_2MB */
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

static bool slot_contains(const struct memory_slot *slot, gpa_t gpa)
{
    return gpa >= slot->gpa && gpa - slot->gpa < slot->size;
}

int memory_use_file(struct guest_memory *m, bool shared, struct error *err)
{
    int fd = memory_file_open(shared, err);

    if (fd < 0)
        return -EIO;
    m->in_file = true;
    m->fd = fd;
    m->file_end = 0;
    return 0;
}

int memory_share(struct guest_memory *m, struct error *err)
{
    return memory_file_seal(m->in_file ? m->fd : -1, err);
}

/* Private memory at a place congruent to gpa. NULL with errno set: there is none. */
static u8 *map_private(gpa_t gpa, u64 size, int flags)
{
    u8 *host = memory_reserve(gpa, size);
    int saved;

    if (!host || mmap(host, size, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | flags, -1, 0) != MAP_FAILED)
        return host;
    saved = errno;
    munmap(host, size);
    errno = saved;
    return NULL;
}

static u8 *add_anonymous(gpa_t gpa, u64 size, struct error *err)
{
    u8 *host = map_private(gpa, size, MAP_NORESERVE);

    if (!host) {
        error_host(err, errno, "no host memory for %llu MiB of guest memory",
                   (unsigned long long)(size >> 20));
        return NULL;
    }
    /* Fewer of the host's TLB misses. Advice only: kernels without huge pages refuse it. */
    madvise(host, size, MADV_HUGEPAGE);
    return host;
}

/* [*gpa, *gpa + *size) made larger, to begin and end with a huge page. */
static void round_to_huge(u64 *gpa, u64 *size)
{
    u64 end = (*gpa + *size + HUGE_PAGE - 1) & ~(HUGE_PAGE - 1);

    *gpa &= ~(HUGE_PAGE - 1);
    *size = end - *gpa;
}

/* What the slot doesn't fill of its first and last huge page stays unused. */
static u8 *add_huge(gpa_t gpa, u64 size, struct error *err)
{
    gpa_t from = gpa;
    u8 *host;

    round_to_huge(&from, &size);
    host = map_private(from, size, MAP_HUGETLB | MAP_HUGE_2MB);
    if (!host) {
        error_host(err, errno,
                   "hugepages=on: the host has no %llu free huge pages of 2 MiB (its root gives "
                   "more by the sysctl vm.nr_hugepages)",
                   (unsigned long long)(size / HUGE_PAGE));
        return NULL;
    }
    return host + (gpa - from);
}

/* Whether slots of this size are made of reserved huge pages: small ones would waste them. */
static bool wants_huge(const struct guest_memory *m, u64 size)
{
    return m->options.hugepages && size >= HUGE_PAGE;
}

static u8 *add_backing(struct guest_memory *m, gpa_t gpa, u64 size, u64 *fd_offset,
                       struct error *err)
{
    if (m->in_file)
        return memory_file_add(m->fd, &m->file_end, gpa, size, fd_offset, err);
    return wants_huge(m, size) ? add_huge(gpa, size, err) : add_anonymous(gpa, size, err);
}

static void remove_backing(const struct memory_slot *slot)
{
    u64 at = (u64)(uintptr_t)slot->backing, size = slot->size;

    if (slot->huge)
        round_to_huge(&at, &size);
    munmap((void *)(uintptr_t)at, size);
}

static int apply_options(const struct memory_options *options, u8 *host, u64 size,
                         struct error *err)
{
    if (options->mergeable && madvise(host, size, MADV_MERGEABLE))
        return error_host(err, errno, "mergeable=on: the host's kernel can't merge pages");
    if (options->locked && mlock(host, size))
        return error_host(err, errno,
                          "locked=on: can't lock %llu MiB in RAM (ulimit -l says how much may be)",
                          (unsigned long long)(size >> 20));
    return 0;
}

/* Where among the slots one for [gpa, gpa + size) belongs, or -EINVAL with err set. */
static int place_for(const struct guest_memory *m, gpa_t gpa, u64 size, struct error *err)
{
    const u64 offset_mask = GUEST_PAGE_SIZE - 1;
    unsigned at = 0;

    if (!size || (gpa & offset_mask) || (size & offset_mask) || gpa + size - 1 < gpa)
        return error_input(err, "guest memory can't be 0x%llx bytes at 0x%llx",
                           (unsigned long long)size, (unsigned long long)gpa);
    if (m->nslots == MEMORY_MAX_SLOTS)
        return error_input(err, "guest memory can't be in more than %d pieces", MEMORY_MAX_SLOTS);
    while (at < m->nslots && m->slots[at].gpa < gpa)
        at++;
    if ((at > 0 && slot_contains(&m->slots[at - 1], gpa)) ||
        (at < m->nslots && m->slots[at].gpa - gpa < size))
        return error_input(err, "guest memory at 0x%llx is there already", (unsigned long long)gpa);
    return (int)at;
}

static void insert_slot(struct guest_memory *m, unsigned at, const struct memory_slot *slot)
{
    memmove(&m->slots[at + 1], &m->slots[at], (m->nslots - at) * sizeof(m->slots[0]));
    m->slots[at] = *slot;
    m->nslots++;
}

int memory_add_slot(struct guest_memory *m, gpa_t gpa, u64 size, u32 flags, struct error *err)
{
    struct memory_slot slot = {
        .gpa = gpa, .size = size, .flags = flags, .fd = m->in_file ? m->fd : -1};
    int at = place_for(m, gpa, size, err), ret;

    if (at < 0)
        return at;
    slot.backing = slot.host = add_backing(m, gpa, size, &slot.fd_offset, err);
    if (!slot.host)
        return -ENOMEM;
    slot.huge = !m->in_file && wants_huge(m, size);
    ret = apply_options(&m->options, slot.host, size, err);
    if (ret) {
        remove_backing(&slot);
        return ret;
    }
    insert_slot(m, (unsigned)at, &slot);
    return 0;
}

int memory_add_file(struct guest_memory *m, gpa_t gpa, u64 size, int fd, u32 flags,
                    struct error *err)
{
    struct memory_slot slot = {.gpa = gpa, .size = size, .flags = flags | MEMORY_FILE, .fd = fd};
    /* Of a file that must not change, what a loader may write to a ROM is this mapping's own. */
    int sharing = flags & MEMORY_ROM ? MAP_PRIVATE | MAP_NORESERVE : MAP_SHARED;
    int at = place_for(m, gpa, size, err);

    if (at < 0)
        return at;
    slot.host = memory_reserve(gpa, size);
    if (!slot.host)
        return error_host(err, errno, "no address space for %llu MiB of a file",
                          (unsigned long long)(size >> 20));
    slot.backing = slot.host;
    if (mmap(slot.host, size, PROT_READ | PROT_WRITE, sharing | MAP_FIXED, fd, 0) == MAP_FAILED) {
        int ret = error_host(err, errno, "can't map %llu MiB of a file",
                             (unsigned long long)(size >> 20));

        munmap(slot.host, size);
        return ret;
    }
    insert_slot(m, (unsigned)at, &slot);
    return 0;
}

void memory_destroy(struct guest_memory *m)
{
    for (unsigned i = 0; i < m->nslots; i++)
        remove_backing(&m->slots[i]);
    m->nslots = 0;
    if (m->in_file)
        close(m->fd);
    m->in_file = false;
}

bool memory_show(struct guest_memory *m, gpa_t gpa, u8 *host, u32 flags)
{
    for (unsigned i = 0; i < m->nslots; i++) {
        struct memory_slot *slot = &m->slots[i];
        u8 *shown = host ? host : slot->backing;

        if (slot->gpa != gpa || (slot->host == shown && slot->flags == flags))
            continue;
        slot->host = shown;
        slot->flags = flags;
        return true;
    }
    return false;
}

const struct memory_slot *memory_find(const struct guest_memory *m, gpa_t gpa)
{
    for (unsigned i = 0; i < m->nslots; i++) {
        if (slot_contains(&m->slots[i], gpa))
            return &m->slots[i];
    }
    return NULL;
}

void *memory_host(const struct guest_memory *m, gpa_t gpa, u64 len)
{
    const struct memory_slot *slot = memory_find(m, gpa);
    u64 offset;

    if (!slot)
        return NULL;
    offset = gpa - slot->gpa;
    return len <= slot->size - offset ? slot->host + offset : NULL;
}

void *memory_dma(const struct guest_memory *m, gpa_t gpa, u64 *len, bool write)
{
    const struct memory_slot *slot = memory_find(m, gpa);

    if (!slot || (write && (slot->flags & MEMORY_ROM)))
        return NULL;
    *len = MIN(*len, slot->size - (gpa - slot->gpa));
    return slot->host + (gpa - slot->gpa);
}

void memory_tell_written(const struct guest_memory *m, gpa_t gpa, u64 len)
{
    if (m->listener.written && len)
        m->listener.written(m->listener.opaque, gpa, len);
}

bool memory_discard(const struct guest_memory *m, void *host, u64 len)
{
    /* Kernels before 6.1 take what is left of a huge page, too. */
    if (m->options.hugepages && ((u64)(uintptr_t)host | len) % HUGE_PAGE)
        return false;
    /* Of a file, MADV_DONTNEED would drop this mapping's view only. */
    return madvise(host, len, m->in_file ? MADV_REMOVE : MADV_DONTNEED) == 0;
}

/* As mincore tells, a piece at a time. */
static u64 resident_in(u8 *host, u64 size)
{
    unsigned char pages[4096];
    u64 count = 0;

    for (u64 at = 0; at < size; at += sizeof(pages) * GUEST_PAGE_SIZE) {
        u64 len = MIN(size - at, sizeof(pages) * GUEST_PAGE_SIZE);

        if (mincore(host + at, len, pages))
            continue;
        for (u64 page = 0; page < len / GUEST_PAGE_SIZE; page++)
            count += pages[page] & 1;
    }
    return count * GUEST_PAGE_SIZE;
}

u64 memory_resident(const struct guest_memory *m)
{
    u64 sum = 0;

    for (unsigned i = 0; i < m->nslots; i++)
        sum += resident_in(m->slots[i].backing, m->slots[i].size);
    return sum;
}

/* Whether all of [gpa, gpa + len) is memory, in however many adjacent slots. */
static bool range_is_memory(const struct guest_memory *m, gpa_t gpa, u64 len)
{
    while (len) {
        const struct memory_slot *slot = memory_find(m, gpa);
        u64 here;

        if (!slot)
            return false;
        here = MIN(len, slot->size - (gpa - slot->gpa));
        gpa += here;
        len -= here;
        if (len && gpa == 0) /* past the end of the address space */
            return false;
    }
    return true;
}

int memory_read(const struct guest_memory *m, gpa_t gpa, void *buf, u64 len)
{
    u8 *to = buf;

    if (!range_is_memory(m, gpa, len))
        return -EFAULT;
    while (len) {
        const struct memory_slot *slot = memory_find(m, gpa);
        u64 offset = gpa - slot->gpa;
        u64 here = MIN(len, slot->size - offset);

        memcpy(to, slot->host + offset, here);
        to += here;
        gpa += here;
        len -= here;
    }
    return 0;
}

int memory_write(struct guest_memory *m, gpa_t gpa, const void *buf, u64 len)
{
    const u8 *from = buf;

    if (!range_is_memory(m, gpa, len))
        return -EFAULT;
    while (len) {
        const struct memory_slot *slot = memory_find(m, gpa);
        u64 offset = gpa - slot->gpa;
        u64 here = MIN(len, slot->size - offset);

        memcpy(slot->host + offset, from, here);
        if (m->listener.written)
            m->listener.written(m->listener.opaque, gpa, here);
        from += here;
        gpa += here;
        len -= here;
    }
    return 0;
}
