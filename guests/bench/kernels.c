/*
 * Kernels that run in user mode as well as on a bare machine: see kernels.h.
 *
 * The numbers of units are such that Bochs 2.7 takes some tenths of a second for each: long enough
 * to be timed from outside, by when a line arrives.
 */
#include "kernels.h"

#define BUFFER_BYTES (256 * 1024)
#define CHASE_NODES (128 * 1024) /* of 16 bytes: 2 MiB, 512 pages */
#define SORT_ITEMS 16384

static u8 buffer[BUFFER_BYTES] __attribute__((aligned(4096)));
static u8 copy[BUFFER_BYTES] __attribute__((aligned(4096)));
static u32 items[SORT_ITEMS];
static u32 crc_table[256];
static struct node {
    struct node *next;
    u64 value;
} nodes[CHASE_NODES] __attribute__((aligned(4096)));
static float vector_a[4096] __attribute__((aligned(16)));
static float vector_b[4096] __attribute__((aligned(16)));

/* Keeps the compiler from seeing through a value: no constant folding, no idiom recognition. */
#define OPAQUE(x) __asm__ volatile("" : "+r"(x))

static u32 random_next(u32 *state)
{
    u32 x = *state;

    x ^= x << 13;
    x ^= x >> 17;
    x ^= x << 5;
    return *state = x;
}

void kernels_prepare(void)
{
    u32 seed = 2463534242u;

    for (u32 i = 0; i < BUFFER_BYTES; i++)
        buffer[i] = (u8)random_next(&seed);
    for (u32 i = 0; i < 256; i++) {
        u32 c = i;

        for (int bit = 0; bit < 8; bit++)
            c = c & 1 ? 0xedb88320u ^ c >> 1 : c >> 1;
        crc_table[i] = c;
    }
    for (u32 i = 0; i < 4096; i++) {
        vector_a[i] = (float)(random_next(&seed) & 1023) / 64;
        vector_b[i] = (float)(random_next(&seed) & 1023) / 64;
    }
    /* One cycle through all nodes, in random order (Sattolo's shuffle). */
    for (u32 i = 0; i < CHASE_NODES; i++)
        nodes[i] = (struct node){.next = &nodes[i], .value = i};
    for (u32 i = CHASE_NODES - 1; i > 0; i--) {
        u32 j = random_next(&seed) % i;
        struct node *swap = nodes[i].next;

        nodes[i].next = nodes[j].next;
        nodes[j].next = swap;
    }
}

/* Arithmetic in registers: multiply, rotate, shift, add, compare. */
static u64 run_integer(unsigned n)
{
    u64 a = 0x9e3779b97f4a7c15, b = 1, c = 0;

    while (n--) {
        a = a * 6364136223846793005u + 1442695040888963407u;
        b ^= a >> 29;
        b = b << 17 | b >> 47;
        c += b & 0xff ? b : a;
        if (c & 0x40)
            c -= b >> 3;
    }
    return a ^ b ^ c;
}

/* Divisions, which no interpreter makes slow and none can make fast: greatest common divisors. */
static u64 run_divide(unsigned n)
{
    u32 seed = 1;
    u64 sum = 0;

    while (n--) {
        u64 a = random_next(&seed), b = random_next(&seed) | 1;

        while (b) {
            u64 rest = a % b;

            a = b;
            b = rest;
        }
        sum += a;
    }
    return sum;
}

static void quicksort(u32 *first, u32 *last)
{
    while (last - first > 0) {
        u32 pivot = first[(last - first) / 2];
        u32 *i = first, *j = last;

        while (i <= j) {
            while (*i < pivot)
                i++;
            while (*j > pivot)
                j--;
            if (i <= j) {
                u32 swap = *i;

                *i++ = *j;
                *j-- = swap;
            }
        }
        quicksort(first, j);
        first = i;
    }
}

/* Loads, stores, branches that nobody can predict. */
static u64 run_sort(unsigned n)
{
    u64 sum = 0;
    u32 seed = 7;

    while (n--) {
        for (u32 i = 0; i < SORT_ITEMS; i++)
            items[i] = random_next(&seed);
        quicksort(items, items + SORT_ITEMS - 1);
        for (u32 i = 0; i < SORT_ITEMS; i += 64)
            sum = sum * 31 + items[i];
    }
    return sum;
}

/* Two dependent loads a byte. */
static u64 run_crc(unsigned n)
{
    u32 crc = ~0u;

    while (n--) {
        for (u32 i = 0; i < BUFFER_BYTES; i++)
            crc = crc_table[(u8)(crc ^ buffer[i])] ^ crc >> 8;
    }
    return ~crc;
}

/* A load from another page at every step: the reach of an emulator's TLB. */
static u64 run_chase(unsigned n)
{
    struct node *at = nodes;
    u64 sum = 0;

    while (n--) {
        for (unsigned i = 0; i < 1024; i++) {
            sum += at->value;
            at = at->next;
        }
    }
    return sum;
}

/* Byte stores with a stride. */
static u64 run_sieve(unsigned n)
{
    u64 count = 0;

    while (n--) {
        for (u32 i = 0; i < BUFFER_BYTES; i++)
            copy[i] = 1;
        for (u32 i = 2; i * i < BUFFER_BYTES; i++) {
            if (copy[i]) {
                for (u32 j = i * i; j < BUFFER_BYTES; j += i)
                    copy[j] = 0;
            }
        }
        for (u32 i = 2; i < BUFFER_BYTES; i++)
            count += copy[i];
    }
    return count;
}

static u64 __attribute__((noinline, optimize("no-optimize-sibling-calls"))) fibonacci(u64 n)
{
    OPAQUE(n);
    return n < 2 ? n : fibonacci(n - 1) + fibonacci(n - 2);
}

/* Calls, returns, the stack. */
static u64 run_recurse(unsigned n)
{
    u64 sum = 0;

    while (n--)
        sum += fibonacci(20);
    return sum;
}

static u64 op_add(u64 x, u64 y)
{
    return x + y;
}
static u64 op_sub(u64 x, u64 y)
{
    return x - y;
}
static u64 op_xor(u64 x, u64 y)
{
    return x ^ y;
}
static u64 op_mul(u64 x, u64 y)
{
    return x * (y | 1);
}
static u64 op_rotate(u64 x, u64 y)
{
    return (x << 7 | x >> 57) + y;
}
static u64 op_max(u64 x, u64 y)
{
    return x > y ? x : y;
}
static u64 op_not(u64 x, u64 y)
{
    return ~x + (y >> 1);
}
static u64 op_swap(u64 x, u64 y)
{
    return __builtin_bswap64(x) ^ y;
}
static u64 (*const volatile ops[])(u64, u64) = {
    op_add, op_sub, op_xor, op_mul, op_rotate, op_max, op_not, op_swap,
};

/* Calls through a table, the target known only at run time. */
static u64 run_indirect(unsigned n)
{
    u64 x = 1;
    u32 seed = 3;

    while (n--) {
        u32 r = random_next(&seed);

        x = ops[r >> 4 & 7](x, r);
        x = ops[r >> 12 & 7](x, r);
    }
    return x;
}

enum { PUSH, ADD, SUB, MUL, DUP, SWAP, LOAD, STORE, JUMP_NONZERO, HALT };

/* An interpreter in the interpreter: a stack machine that computes with a loop counter. */
static u64 run_bytecode(unsigned n)
{
    static const u8 program[] = {
        PUSH, 200, STORE, 0,   PUSH,  1,   STORE, 1, /* i = 200; x = 1 */
        LOAD, 1,   DUP,   MUL, LOAD,  0,   ADD,   PUSH, 3,
        SUB,                             /* 8: x * x + i - 3 */
        LOAD, 1,   SWAP,  SUB, STORE, 1, /* x -= that */
        LOAD, 0,   PUSH,  1,   SUB,   DUP, STORE, 0,    JUMP_NONZERO,
        8, /* while (--i) */
        LOAD, 1,   HALT,
    };
    u64 variables[2], stack[16], sum = 0;

    while (n--) {
        const u8 *code = program;
        u64 *sp = stack;

        for (;;) {
            switch (*code++) {
            case PUSH:
                *sp++ = *code++;
                continue;
            case ADD:
                sp--;
                sp[-1] += *sp;
                continue;
            case SUB:
                sp--;
                sp[-1] -= *sp;
                continue;
            case MUL:
                sp--;
                sp[-1] *= *sp;
                continue;
            case DUP:
                *sp = sp[-1];
                sp++;
                continue;
            case SWAP: {
                u64 top = sp[-1];

                sp[-1] = sp[-2];
                sp[-2] = top;
                continue;
            }
            case LOAD:
                *sp++ = variables[*code++];
                continue;
            case STORE:
                variables[*code++] = *--sp;
                continue;
            case JUMP_NONZERO:
                code = *--sp ? program + *code : code + 1;
                continue;
            case HALT:
                break;
            }
            break;
        }
        sum += *--sp;
    }
    return sum;
}

/* REP MOVS and REP STOS: how kernels copy and clear. */
static u64 run_copy(unsigned n)
{
    u64 sum = 0;

    while (n--) {
        void *to = copy;
        const void *from = buffer;
        u64 count = BUFFER_BYTES - 64;

        __asm__ volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(count) : : "memory");
        sum += copy[n % BUFFER_BYTES];
        to = copy + 8;
        count = BUFFER_BYTES / 8 - 8;
        __asm__ volatile("rep stosq" : "+D"(to), "+c"(count) : "a"(sum) : "memory");
        from = buffer;
        for (to = copy, count = 64; count; count--) {
            u64 few = 64;

            __asm__ volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(few) : : "memory");
        }
        sum += copy[n & 4095];
    }
    return sum;
}

/* Strings the way a plain C library treats them: byte loops, REPNE SCASB, REPE CMPSB. */
static u64 run_string(unsigned n)
{
    static const char text[] = "the quick brown fox jumps over the lazy dog and runs on for a bit";
    char word[sizeof(text)];
    u64 sum = 0;

    while (n--) {
        const char *from = text, *mine = word;
        char *to = word;
        u64 count = sizeof(text);

        do
            OPAQUE(to);
        while ((*to++ = *from++));
        to = word;
        __asm__ volatile("repne scasb" : "+D"(to), "+c"(count) : "a"(0) : "memory", "cc");
        sum += count;
        from = text;
        count = sizeof(text);
        __asm__ volatile("repe cmpsb" : "+S"(from), "+D"(mine), "+c"(count) : : "memory", "cc");
        sum += sizeof(text) - count;
        for (from = word; *from; from++)
            sum = sum * 33 + (u8)(*from >= 'a' && *from <= 'z' ? *from - 32 : *from);
    }
    return sum;
}

/* Scalar doubles: points of the Mandelbrot set. */
static u64 run_double(unsigned n)
{
    u64 sum = 0;

    while (n--) {
        double cx = -2 + (n & 63) * (3.0 / 64), cy = -1 + (n >> 6 & 63) * (2.0 / 64), x = 0, y = 0;
        unsigned i = 0;

        for (; i < 100 && x * x + y * y < 4; i++) {
            double next = x * x - y * y + cx;

            y = 2 * x * y + cy;
            x = next;
        }
        sum += i;
    }
    return sum;
}

/* The old stack unit: a series in long doubles. */
static u64 run_x87(unsigned n)
{
    long double sum = 0, sign = 1;

    for (unsigned i = 0; i < n; i++) {
        sum += sign / (2 * (long double)i + 1);
        sign = -sign;
    }
    return (u64)(sum * 4e15L);
}

/* Packed floats and integers of SSE2. */
static u64 run_sse(unsigned n)
{
    typedef float float4 __attribute__((vector_size(16)));
    typedef int int4 __attribute__((vector_size(16)));
    const float4 *a = (const float4 *)vector_a;
    const float4 *b = (const float4 *)vector_b;
    float4 sum = {0};
    int4 mix = {1, 2, 3, 4};

    while (n--) {
        for (unsigned i = 0; i < 1024; i++) {
            sum = sum * (float4){0.5f, 0.5f, 0.5f, 0.5f} + a[i] * b[i];
            mix = (mix ^ (int4)b[i]) + (mix >> 7);
        }
    }
    return (u64)(sum[0] + sum[1] + sum[2] + sum[3]) ^ (u32)mix[0] ^ (u64)(u32)mix[3] << 20;
}

const struct kernel kernels[] = {
    {"integer", run_integer, 2000000},
    {"divide", run_divide, 150000},
    {"sort", run_sort, 6},
    {"crc", run_crc, 12},
    {"chase", run_chase, 6000},
    {"sieve", run_sieve, 4},
    {"recurse", run_recurse, 150},
    {"indirect", run_indirect, 1000000},
    {"bytecode", run_bytecode, 600},
    {"copy", run_copy, 150},
    {"string", run_string, 30000},
    {"double", run_double, 60000},
    {"x87", run_x87, 1500000},
    {"sse", run_sse, 2000},
};
const unsigned kernel_count = sizeof(kernels) / sizeof(kernels[0]);
