/*
 * How handlers run.
 *
 * A block is an array of struct insn. Each handler does its instruction and tail-calls the next one's
 * handler, so a block runs without a dispatch loop; a handler that ends the block returns to the run loop
 * instead, having made gpr[GPR_RIP] exact. When the block is dropped under a running instruction
 * (self-modifying code), the handlers of the rest are replaced by one that leaves the block.
 */
#ifndef DOPPEL_ENGINE_SOFT_INTERP_H
#define DOPPEL_ENGINE_SOFT_INTERP_H

#include "engine/soft/flags.h"
#include "engine/soft/mmu.h"
#include "engine/soft/segment.h"
#include "engine/soft/vcpu.h"

#define NEXT(v, i)                                                                                 \
    do {                                                                                           \
        return (i)[1].fn((v), (i) + 1);                                                            \
    } while (0)

#endif
