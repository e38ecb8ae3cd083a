/*
 * ICH9 LPC bridge: Intel I/O Controller Hub 9 data sheet (316972), chapter 13 (configuration registers in
 * 13.1, power management I/O registers in 13.8.3).
 *
 * There is no system management mode. Firmware finds APMC_EN set in SMI_EN from the start, which tells it
 * that somebody has set SMM up already, so that it leaves SMM alone (SeaBIOS: src/fw/smm.c).
 */
#include "device/pci/lpc.h"

#include "host/log.h"

#include <errno.h>
#include <stdatomic.h>
#include <stdlib.h>

#define LPC_DEVICE_ID 0x2918
#define LPC_REVISION 2

#define LPC_PMBASE 0x40 /* 13.1.15: bits 15 to 7; bit 0 tells that it is I/O space */
#define LPC_PMBASE_MASK 0xff80U
#define LPC_ACPI_CNTL 0x44 /* 13.1.16 */
#define LPC_ACPI_CNTL_ACPI_EN 0x80
#define LPC_GPIOBASE 0x48
#define LPC_GPIO_CNTL 0x4c
#define LPC_PIRQA_ROUT 0x60 /* to D; 13.1.19 */
#define LPC_SERIRQ_CNTL 0x64
#define LPC_PIRQE_ROUT 0x68      /* to H */
#define LPC_PIRQ_ROUT_IRQEN 0x80 /* set: not routed */
#define LPC_IO_DEC 0x80
#define LPC_EN 0x82
#define LPC_GEN1_DEC 0x84 /* to GEN4_DEC, 0x90 */
#define LPC_GEN_PMCON_1 0xa0
#define LPC_BIOS_CNTL 0xdc
#define LPC_RCBA 0xf0 /* no registers are there */

#define PM_SMI_EN 0x30 /* from PMBASE; SMI_STS is 4 further on */
#define PM_SMI_LEN 8
#define PM_SMI_EN_APMC_EN 0x20

struct lpc {
    struct pci_device pci;
    struct device_env env;
    struct lpc_config config;
    struct io_range smi;
    u16 pm_base; /* where they are now; 0: nowhere */
    atomic_uchar routes[PCI_PIRQS];
};

static unsigned route_register(unsigned n)
{
    return n < 4 ? LPC_PIRQA_ROUT + n : LPC_PIRQE_ROUT + n - 4;
}

int lpc_pirq_irq(const struct lpc *lpc, unsigned n)
{
    u8 route = atomic_load(&lpc->routes[n]);

    return route & LPC_PIRQ_ROUT_IRQEN ? -1 : route & 15;
}

static u64 smi_read(void *opaque, u64 offset, unsigned size)
{
    return (u64)PM_SMI_EN_APMC_EN >> 8 * offset;
}

static void smi_write(void *opaque, u64 offset, u64 value, unsigned size)
{
    log_once(LOG_DEBUG, "lpc: the guest wants SMIs, which there are none of");
}

static const struct io_ops smi_ops = {smi_read, smi_write, 4};

static void move_smi(struct lpc *lpc, u16 base)
{
    struct error err;

    if (lpc->smi.base)
        io_bus_remove(lpc->env.ports, &lpc->smi);
    lpc->smi.base = base ? base + PM_SMI_EN : 0;
    if (base && io_bus_add(lpc->env.ports, &lpc->smi, &err) < 0)
        lpc->smi.base = 0;
}

/* What derives from configuration space. The device's lock is held. */
static void update(struct lpc *lpc)
{
    const u8 *config = lpc->pci.config;
    u16 base = config[LPC_ACPI_CNTL] & LPC_ACPI_CNTL_ACPI_EN
                   ? pci_config_get16(&lpc->pci, LPC_PMBASE) & LPC_PMBASE_MASK
                   : 0;
    bool routed = false;

    if (base != lpc->pm_base) {
        lpc->pm_base = base;
        move_smi(lpc, base);
        lpc->config.pm_base_changed(lpc->config.opaque, base);
    }
    for (unsigned n = 0; n < PCI_PIRQS; n++)
        routed |= atomic_exchange(&lpc->routes[n], config[route_register(n)]) !=
                  config[route_register(n)];
    if (routed)
        lpc->config.routes_changed(lpc->config.opaque);
}

static void lpc_written(struct pci_device *pci, unsigned offset, unsigned size)
{
    update(container_of(pci, struct lpc, pci));
}

void lpc_loaded(struct lpc *lpc)
{
    device_lock(&lpc->pci.dev);
    update(lpc);
    device_unlock(&lpc->pci.dev);
}

static void lpc_reset(struct device *dev)
{
    struct lpc *lpc = container_of(dev, struct lpc, pci.dev);

    pci_device_reset(&lpc->pci);
    lpc_loaded(lpc);
}

static void lpc_destroy(struct device *dev)
{
    struct lpc *lpc = container_of(dev, struct lpc, pci.dev);

    move_smi(lpc, 0);
    pci_device_fini(&lpc->pci);
    free(lpc);
}

static const struct state_field lpc_fields[] = {
    STATE_STRUCTS(struct lpc, pci, &pci_device_state),
    STATE_HOST(struct lpc, env),
    STATE_HOST(struct lpc, config),
    STATE_HOST(struct lpc, smi),
    STATE_HOST(struct lpc, pm_base),
    STATE_HOST(struct lpc, routes),
};
static const struct state_desc lpc_state = STATE_DESC("lpc", 1, struct lpc, lpc_fields);

static const struct pci_device_ops lpc_ops = {
    .dev = {.reset = lpc_reset, .destroy = lpc_destroy},
    .config_written = lpc_written,
};

static void init_registers(struct pci_device *pci)
{
    pci_config_allow32(pci, LPC_PMBASE, LPC_PMBASE_MASK);
    pci->config[LPC_PMBASE] = 1;
    pci->writable[LPC_ACPI_CNTL] = LPC_ACPI_CNTL_ACPI_EN | 7;
    pci_config_allow32(pci, LPC_GPIOBASE, 0xff80);
    pci->config[LPC_GPIOBASE] = 1;
    pci->writable[LPC_GPIO_CNTL] = 0x11;
    for (unsigned n = 0; n < PCI_PIRQS; n++) {
        pci->writable[route_register(n)] = LPC_PIRQ_ROUT_IRQEN | 15;
        pci->config[route_register(n)] = LPC_PIRQ_ROUT_IRQEN;
    }
    pci->writable[LPC_SERIRQ_CNTL] = 0xff;
    pci->config[LPC_SERIRQ_CNTL] = 0x10;
    pci_config_allow32(pci, LPC_IO_DEC, 0x3fff1377);
    for (unsigned i = 0; i < 4; i++)
        pci_config_allow32(pci, LPC_GEN1_DEC + 4 * i, 0x00fcfffd);
    pci_config_allow32(pci, LPC_GEN_PMCON_1,
                       0x001f); /* without SMI_LOCK there would be no SMM to lock */
    pci->writable[LPC_BIOS_CNTL] = 0x1f;
    pci_config_allow32(pci, LPC_RCBA, 0xffffc001);
}

struct lpc *lpc_create(const struct device_env *env, const struct lpc_config *cfg,
                       struct pci_host *host, struct error *err)
{
    static const struct pci_identity identity = {
        .vendor = PCI_HOST_VENDOR,
        .device = LPC_DEVICE_ID,
        .class = PCI_CLASS_BRIDGE_ISA,
        .revision = LPC_REVISION,
        .subsystem_vendor = PCI_HOST_SUBSYSTEM_VENDOR,
        .subsystem = PCI_HOST_SUBSYSTEM,
    };
    struct lpc *lpc = calloc(1, sizeof(*lpc));

    if (!lpc) {
        error_host(err, ENOMEM, "lpc");
        return NULL;
    }
    lpc->env = *env;
    lpc->config = *cfg;
    lpc->smi =
        (struct io_range){.name = "lpc smi", .size = PM_SMI_LEN, .ops = &smi_ops, .opaque = lpc};
    pci_device_init(&lpc->pci, "lpc", &lpc_ops, &lpc_state, &identity);
    init_registers(&lpc->pci);
    for (unsigned n = 0; n < PCI_PIRQS; n++)
        atomic_init(&lpc->routes[n], LPC_PIRQ_ROUT_IRQEN);
    if (pci_host_add(host, &lpc->pci, LPC_DEVFN, err) < 0) {
        lpc_destroy(&lpc->pci.dev);
        return NULL;
    }
    return lpc;
}

struct device *lpc_device(struct lpc *lpc)
{
    return &lpc->pci.dev;
}
