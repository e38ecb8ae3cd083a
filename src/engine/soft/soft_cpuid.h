/*
 * Which CPUID features the software processor offers on this host.
 */
#ifndef DOPPEL_ENGINE_SOFT_SOFT_CPUID_H
#define DOPPEL_ENGINE_SOFT_SOFT_CPUID_H

#include "x86/cpuid.h"

/* Found out at the first call; any thread. */
const struct cpuid_support *soft_cpuid_support(void);

#endif
