/*
 * The host's KVM: whether it is there, and whether it can do what the engine needs. Everything that
 * is used without a check of its own stands in needed[].
 *
 * Reference: the kernel's Documentation/virt/kvm/api.rst; section numbers are of that document.
 */
#include "engine/kvm/kvm.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/ioctl.h>
#include <unistd.h>

#define KVM_DEVICE "/dev/kvm"

/*
 * Pages that Intel's processors need in the guest's address space for real mode, where the machine
 * has neither RAM nor devices: three for a TSS, one for a page table.
 */
#define KVM_IDENTITY_MAP 0xfeffc000ULL
#define KVM_TSS 0xfeffd000ULL

static const struct {
    unsigned cap;
    const char *name;
} needed[] = {
#define NEEDED(cap)                                                                                \
    {                                                                                              \
        cap, #cap                                                                                  \
    }
    NEEDED(KVM_CAP_USER_MEMORY),
    NEEDED(KVM_CAP_READONLY_MEM),
    NEEDED(KVM_CAP_EXT_CPUID),
    NEEDED(KVM_CAP_SPLIT_IRQCHIP),
    NEEDED(KVM_CAP_IRQ_ROUTING),
    NEEDED(KVM_CAP_SIGNAL_MSI),
    NEEDED(KVM_CAP_IRQFD),
    NEEDED(KVM_CAP_IOEVENTFD),
    NEEDED(KVM_CAP_IOEVENTFD_ANY_LENGTH),
    NEEDED(KVM_CAP_X2APIC_API),
    NEEDED(KVM_CAP_TSC_DEADLINE_TIMER),
    NEEDED(KVM_CAP_MP_STATE),
    NEEDED(KVM_CAP_USER_NMI),
    NEEDED(KVM_CAP_VCPU_EVENTS),
    NEEDED(KVM_CAP_DEBUGREGS),
    NEEDED(KVM_CAP_XSAVE),
    NEEDED(KVM_CAP_XCRS),
    NEEDED(KVM_CAP_SREGS2),
    NEEDED(KVM_CAP_MCE),
    NEEDED(KVM_CAP_ADJUST_CLOCK),
    NEEDED(KVM_CAP_VCPU_ATTRIBUTES),
    NEEDED(KVM_CAP_IMMEDIATE_EXIT),
    NEEDED(KVM_CAP_SET_TSS_ADDR),
    NEEDED(KVM_CAP_SET_IDENTITY_MAP_ADDR),
    NEEDED(KVM_CAP_X86_USER_SPACE_MSR),
#undef NEEDED
};

int kvm_host_cap(int fd, unsigned cap)
{
    return ioctl(fd, KVM_CHECK_EXTENSION, (unsigned long)cap);
}

static int check_device(int dev, struct error *err)
{
    int version = ioctl(dev, KVM_GET_API_VERSION, 0);

    if (version != KVM_API_VERSION)
        return error_host(err, ENOSYS, KVM_DEVICE " speaks API version %d, not %d", version,
                          KVM_API_VERSION);
    for (size_t i = 0; i < ARRAY_SIZE(needed); i++) {
        if (kvm_host_cap(dev, needed[i].cap) <= 0)
            return error_host(err, ENOSYS, "this kernel's KVM lacks %s", needed[i].name);
    }
    return 0;
}

int kvm_host_open(struct error *err)
{
    int dev = open(KVM_DEVICE, O_RDWR | O_CLOEXEC), ret;

    if (dev < 0) {
        switch (errno) {
        case ENOENT:
            return error_host(err, ENOENT,
                              "no " KVM_DEVICE ": hardware virtualisation is off, or "
                              "the kvm module isn't loaded");
        case EACCES:
            return error_host(err, EACCES, "no permission for " KVM_DEVICE ": join the group kvm");
        default:
            return error_host(err, errno, KVM_DEVICE);
        }
    }
    ret = check_device(dev, err);
    if (ret) {
        close(dev);
        return ret;
    }
    return dev;
}

unsigned kvm_host_max_vcpus(void)
{
    struct error err;
    int dev = kvm_host_open(&err), max;

    if (dev < 0)
        return 1;
    max = kvm_host_cap(dev, KVM_CAP_MAX_VCPUS);
    close(dev);
    return max > 0 ? (unsigned)max : 1;
}

/* The same everywhere: the kernel has the local APICs, we have the rest. */
static int enable_split_irqchip(int vm, struct error *err)
{
    struct kvm_enable_cap split = {.cap = KVM_CAP_SPLIT_IRQCHIP, .args = {KVM_LEVEL_ROUTES}};
    struct kvm_enable_cap x2apic = {
        .cap = KVM_CAP_X2APIC_API,
        .args = {KVM_X2APIC_API_USE_32BIT_IDS | KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK},
    };
    struct kvm_enable_cap msr = {.cap = KVM_CAP_X86_USER_SPACE_MSR,
                                 .args = {KVM_MSR_EXIT_REASON_UNKNOWN}};

    if (ioctl(vm, KVM_ENABLE_CAP, &split) < 0)
        return error_host(err, errno, "cannot enable KVM_CAP_SPLIT_IRQCHIP");
    if (ioctl(vm, KVM_ENABLE_CAP, &x2apic) < 0)
        return error_host(err, errno, "cannot enable KVM_CAP_X2APIC_API");
    if (ioctl(vm, KVM_ENABLE_CAP, &msr) < 0)
        return error_host(err, errno, "cannot enable KVM_CAP_X86_USER_SPACE_MSR");
    return 0;
}

int kvm_host_create_vm(int dev, struct error *err)
{
    u64 identity = KVM_IDENTITY_MAP;
    int vm, ret;

    do
        vm = ioctl(dev, KVM_CREATE_VM, 0UL);
    while (vm < 0 && errno == EINTR);
    if (vm < 0)
        return error_host(err, errno, "KVM cannot create a VM");
    ret = enable_split_irqchip(vm, err);
    if (!ret && ioctl(vm, KVM_SET_IDENTITY_MAP_ADDR, &identity) < 0)
        ret = error_host(err, errno, "KVM_SET_IDENTITY_MAP_ADDR");
    if (!ret && ioctl(vm, KVM_SET_TSS_ADDR, (unsigned long)KVM_TSS) < 0)
        ret = error_host(err, errno, "KVM_SET_TSS_ADDR");
    if (ret) {
        close(vm);
        return ret;
    }
    return vm;
}
