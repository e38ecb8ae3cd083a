/*
 * The memory model between processors: what x86-TSO forbids must not happen (Intel SDM vol. 3, 8.2; Owens, Sarkar
 * and Sewell, "A Better x86 Memory Model: x86-TSO", 2009).
 *
 * Each shape runs over arrays of cells, so that many races happen between two barriers.
 */
#include "smp.h"

#define CELLS 4096
#define ROUNDS 256
#define INCREMENTS 2000 /* by locked instructions, a processor */
#define STRIDE 2        /* u64s a cell: neighbours in a line race too */

static volatile u64 x[CELLS * STRIDE], y[CELLS * STRIDE];
static volatile u64 r[4][CELLS];
static volatile u32 arrived, phase;
static unsigned parties;

/* All parties meet. */
static void barrier(void)
{
    u32 now = phase, before = 1;

    __asm__ volatile("lock xaddl %0, %1" : "+r"(before), "+m"(arrived));
    if (before + 1 == parties) {
        arrived = 0;
        fence();
        phase = now + 1;
    }
    while (phase == now)
        pause();
}

struct shape {
    const char *name;
    unsigned cpus;
    void (*run)(unsigned cpu, unsigned n); /* cell n on one processor */
    bool (*forbidden)(unsigned n);
};
static const struct shape *shape;
static u64 violations;

static void run_shape(unsigned cpu)
{
    for (unsigned round = 0; round < ROUNDS; round++) {
        if (cpu == 0)
            for (unsigned n = 0; n < CELLS * STRIDE; n++)
                x[n] = y[n] = 0;
        barrier();
        for (unsigned n = 0; n < CELLS; n++)
            shape->run(cpu, n);
        barrier();
        for (unsigned n = 0; cpu == 0 && n < CELLS; n++)
            violations += shape->forbidden(n);
    }
}

#define X x[n * STRIDE]
#define Y y[n * STRIDE]

/* Store buffering, with what drains the buffer in between. */
static void sb_fence(unsigned cpu, unsigned n)
{
    volatile u64 *mine = cpu ? &Y : &X, *other = cpu ? &X : &Y;

    *mine = 1;
    fence();
    r[cpu][n] = *other;
}
static void sb_locked(unsigned cpu, unsigned n)
{
    volatile u64 *mine = cpu ? &Y : &X, *other = cpu ? &X : &Y;
    u64 one = 1;

    __asm__ volatile("xchg %0, %1" : "+r"(one), "+m"(*mine) : : "memory");
    r[cpu][n] = *other;
}
static bool both_zero(unsigned n)
{
    return r[0][n] == 0 && r[1][n] == 0;
}

/* Message passing */
static void mp(unsigned cpu, unsigned n)
{
    if (cpu == 0) {
        X = 1;
        Y = 1;
    } else {
        r[0][n] = Y;
        r[1][n] = X;
    }
}
static bool flag_without_data(unsigned n)
{
    return r[0][n] == 1 && r[1][n] == 0;
}

/* Load buffering */
static void lb(unsigned cpu, unsigned n)
{
    volatile u64 *mine = cpu ? &Y : &X, *other = cpu ? &X : &Y;

    r[cpu][n] = *other;
    *mine = 1;
}
static bool both_one(unsigned n)
{
    return r[0][n] == 1 && r[1][n] == 1;
}

/* 2+2W: stores to two places in opposite order */
static void ww(unsigned cpu, unsigned n)
{
    volatile u64 *mine = cpu ? &Y : &X, *other = cpu ? &X : &Y;

    *mine = 1;
    *other = 2;
}
static bool both_first(unsigned n)
{
    return X == 1 && Y == 1;
}

/* IRIW: two readers see two writers' stores in the same order. */
static void iriw(unsigned cpu, unsigned n)
{
    switch (cpu) {
    case 0:
        X = 1;
        break;
    case 1:
        Y = 1;
        break;
    case 2:
        r[0][n] = X;
        r[1][n] = Y;
        break;
    default:
        r[2][n] = Y;
        r[3][n] = X;
        break;
    }
}
static bool orders_differ(unsigned n)
{
    return r[0][n] == 1 && r[1][n] == 0 && r[2][n] == 1 && r[3][n] == 0;
}

/* A store within a line is seen whole, aligned or not (8.1.1). */
static void whole(unsigned cpu, unsigned n)
{
    volatile u64 *at = (volatile u64 *)((word)&X + n % 8);

    if (cpu == 0)
        *at = ~0ULL;
    else
        r[0][n] = *at;
}
static bool torn(unsigned n)
{
    return r[0][n] != 0 && r[0][n] != ~0ULL;
}

static const struct shape shapes[] = {
    {"store-buffering-mfence", 2, sb_fence, both_zero},
    {"store-buffering-xchg", 2, sb_locked, both_zero},
    {"message-passing", 2, mp, flag_without_data},
    {"load-buffering", 2, lb, both_one},
    {"2+2w", 2, ww, both_first},
    {"iriw", 4, iriw, orders_differ},
    {"store-is-seen-whole", 2, whole, torn},
};

/* --- Locked instructions --- */

static u8 area[8192] __attribute__((aligned(4096)));
static volatile u8 *counter; /* u64, wherever the test has it */
static volatile u32 tickets[4 * INCREMENTS];
static volatile u32 next_ticket;

static void count_up(unsigned cpu)
{
    (void)cpu;
    barrier();
    for (unsigned n = 0; n < INCREMENTS; n++)
        __asm__ volatile("lock incq %0" : "+m"(*(volatile u64 *)counter) : : "memory", "cc");
}

/* One adds to all of it, the others to its upper half alone. */
static void count_halves(unsigned cpu)
{
    barrier();
    for (unsigned n = 0; n < INCREMENTS; n++)
        if (cpu == 0)
            __asm__ volatile("lock addq $1, %0"
                             : "+m"(*(volatile u64 *)counter)
                             :
                             : "memory", "cc");
        else
            __asm__ volatile("lock addl $1, %0"
                             : "+m"(*(volatile u32 *)(counter + 4))
                             :
                             : "memory", "cc");
}

/* XCHG moves a token: there is always exactly one, of 8 equal bytes. */
static volatile u32 bad_tokens;
static void pass_token(unsigned cpu)
{
    u64 mine = 0x0101010101010101ULL * (cpu + 1);

    barrier();
    for (unsigned n = 0; n < INCREMENTS; n++) {
        __asm__ volatile("xchg %0, %1" : "+r"(mine), "+m"(*(volatile u64 *)counter) : : "memory");
        if (mine != (mine & 0xff) * 0x0101010101010101ULL)
            bad_tokens++;
    }
}

static void take_tickets(unsigned cpu)
{
    (void)cpu;
    barrier();
    for (unsigned n = 0; n < INCREMENTS; n++) {
        u32 ticket = 1;

        if (n & 1) {
            __asm__ volatile("lock xaddl %0, %1"
                             : "+r"(ticket), "+m"(next_ticket)
                             :
                             : "memory", "cc");
        } else {
            u32 seen;

            do {
                ticket = next_ticket;
                __asm__ volatile("lock cmpxchgl %2, %1"
                                 : "=a"(seen), "+m"(next_ticket)
                                 : "r"(ticket + 1), "0"(ticket)
                                 : "memory", "cc");
            } while (seen != ticket);
        }
        tickets[ticket % ARRAY_SIZE(tickets)]++;
    }
}

static void run_all(unsigned cpus, void (*job)(unsigned cpu))
{
    parties = cpus;
    smp_run(cpus, job);
}

static void locked(const char *group, unsigned offset, unsigned cpus)
{
    check_group = group;
    counter = area + offset;
    *(volatile u64 *)counter = 0;
    run_all(cpus, count_up);
    check_equal("increments", *(volatile u64 *)counter, (u64)cpus * INCREMENTS);
    *(volatile u64 *)counter = 0;
    run_all(cpus, count_halves);
    check_equal("lower-half", *(volatile u32 *)counter, INCREMENTS);
    check_equal("upper-half", *(volatile u32 *)(counter + 4), (cpus - 1) * INCREMENTS);
    *(volatile u64 *)counter = 0;
    run_all(cpus, pass_token);
    check_equal("exchanges-are-whole", bad_tokens, 0);
    check_group = "";
}

void guest_main(void)
{
    unsigned cpus = smp_start(), lost = 0;

    check("processors", cpus >= 4);
    if (cpus < 4)
        return;
    for (unsigned n = 0; n < ARRAY_SIZE(shapes); n++) {
        shape = &shapes[n];
        violations = 0;
        run_all(shape->cpus, run_shape);
        check_equal(shape->name, violations, 0);
    }
    locked("aligned-", 64, 4);
    locked("across-lines-", 124, 4);
    locked("across-pages-", 4092, 2);
    run_all(4, take_tickets);
    for (unsigned n = 0; n < ARRAY_SIZE(tickets); n++)
        lost += tickets[n] != 1;
    check_equal("each-ticket-once", lost, 0);
}
