/*
 * Floating point and SIMD. Results are exact by IEEE 754 and by the manual, so that their bits are
 * the checksums; nothing here calls the C library's mathematics, which varies with the processor.
 */
#include "bench.h"

#include <string.h>

#define BODIES 5
#define SIDE 96 /* of a matrix */

static u64 bits(double x)
{
    u64 result;

    memcpy(&result, &x, sizeof(result));
    return result;
}

/* The sun and four planets that attract each other, in scalar doubles with roots and divisions. */
static u64 run_nbody(void)
{
    struct body {
        double at[3], speed[3], mass;
    } bodies[BODIES];
    double energy = 0;

    for (int i = 0; i < BODIES; i++) {
        bodies[i] = (struct body){
            .at = {i * 3.5, i * i * 0.75 - 1, i * 0.125},
            .speed = {i * 0.01, 0.3 - i * 0.05, i * 0.002},
            .mass = i ? 0.01 / i : 40,
        };
    }
    for (int step = 0; step < 1500; step++) {
        for (int i = 0; i < BODIES; i++) {
            struct body *a = &bodies[i];

            for (int j = i + 1; j < BODIES; j++) {
                struct body *b = &bodies[j];
                double x = a->at[0] - b->at[0], y = a->at[1] - b->at[1], z = a->at[2] - b->at[2];
                double square = x * x + y * y + z * z;
                double force = 0.001 / (square * __builtin_sqrt(square));

                a->speed[0] -= x * b->mass * force;
                a->speed[1] -= y * b->mass * force;
                a->speed[2] -= z * b->mass * force;
                b->speed[0] += x * a->mass * force;
                b->speed[1] += y * a->mass * force;
                b->speed[2] += z * a->mass * force;
            }
        }
        for (int i = 0; i < BODIES; i++) {
            for (int k = 0; k < 3; k++)
                bodies[i].at[k] += 0.001 * bodies[i].speed[k];
        }
    }
    for (int i = 0; i < BODIES; i++) {
        for (int k = 0; k < 3; k++)
            energy += bodies[i].mass * bodies[i].speed[k] * bodies[i].speed[k] / 2;
    }
    return bits(energy);
}

/* Points of the Mandelbrot set: compares of doubles decide branches. */
static u64 run_mandelbrot(void)
{
    u64 sum = 0;

    for (int row = 0; row < 40; row++) {
        for (int column = 0; column < 60; column++) {
            double cx = -2 + column * (3.0 / 60), cy = -1 + row * (2.0 / 40), x = 0, y = 0;
            u32 i = 0;

            for (; i < 120 && x * x + y * y < 4; i++) {
                double next = x * x - y * y + cx;

                y = 2 * x * y + cy;
                x = next;
            }
            sum = mix(sum, i);
        }
    }
    return sum;
}

static float left[SIDE][SIDE], right[SIDE][SIDE], product[SIDE][SIDE];

static void matrix_begin(void)
{
    u32 seed = 23;

    for (int i = 0; i < SIDE; i++) {
        for (int j = 0; j < SIDE; j++) {
            left[i][j] = (float)(random_next(&seed) & 1023) / 64;
            right[i][j] = (float)(random_next(&seed) & 1023) / 96;
        }
    }
}

/* The inner loop goes along rows, so that compilers make vector code of it. */
static inline __attribute__((always_inline)) u64 multiply(void)
{
    u64 sum = 0;

    for (int i = 0; i < SIDE; i++) {
        for (int j = 0; j < SIDE; j++)
            product[i][j] = 0;
        for (int k = 0; k < SIDE; k++) {
            for (int j = 0; j < SIDE; j++)
                product[i][j] += left[i][k] * right[k][j];
        }
    }
    /* Some of it in each row and column: all would take as long as the product. */
    for (int i = 0; i < SIDE; i++) {
        for (int j = i % 16; j < SIDE; j += 16) {
            u32 word;

            memcpy(&word, &product[i][j], sizeof(word));
            sum = mix(sum, word);
        }
    }
    return sum;
}

static __attribute__((optimize("O3"))) u64 run_matrix(void)
{
    return multiply();
}

static __attribute__((optimize("O3"), target("avx2,fma"))) u64 run_matrix_avx2(void)
{
    return multiply();
}

static int has_avx2(void)
{
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

/* Two pictures, one laid over the other with a mask: packed integers. */
static __attribute__((optimize("O3"))) u64 run_blend(void)
{
    static u8 under[65536], over[65536], mask[65536], result[65536];
    static u64 sum_of_masks;
    u64 sum = 0;

    if (!sum_of_masks) {
        u32 seed = 31;

        for (u32 i = 0; i < sizeof(over); i++) {
            u32 r = random_next(&seed);

            under[i] = (u8)r;
            over[i] = (u8)(r >> 8);
            mask[i] = (u8)(r >> 16);
            sum_of_masks += mask[i];
        }
    }
    for (u32 round = 0; round < 8; round++) {
        for (u32 i = 0; i < sizeof(result); i++) {
            u16 weight = mask[i];

            result[i] = (u8)((u16)(over[i] * weight + under[i] * (255 - weight)) >> 8);
        }
        /* Each round writes the same; the compiler mustn't know. */
        __asm__ volatile("" : : : "memory");
        sum = mix(sum, result[round * 4001]);
    }
    for (u32 i = 0; i < sizeof(result); i += 8) {
        u64 word;

        memcpy(&word, result + i, sizeof(word));
        sum += word;
    }
    return sum;
}

/* The old stack unit: Leibniz's series in 80-bit numbers. */
static u64 run_x87(void)
{
    long double sum = 0, sign = 1;

    for (u32 i = 0; i < 40000; i++) {
        sum += sign / (2 * (long double)i + 1);
        sign = -sign;
    }
    return (u64)(sum * 4e18L);
}

const struct benchmark float_benchmarks[] = {
    {"nbody", run_nbody},
    {"mandelbrot", run_mandelbrot},
    {"matrix", run_matrix, .begin = matrix_begin},
    {"matrix-avx2", run_matrix_avx2, .begin = matrix_begin, .possible = has_avx2},
    {"blend", run_blend},
    {"x87", run_x87},
    {NULL},
};
