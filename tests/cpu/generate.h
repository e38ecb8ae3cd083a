/* The oracle test's generator: what can be encoded, and random cases of it. */
#ifndef DOPPEL_TESTS_CPU_GENERATE_H
#define DOPPEL_TESTS_CPU_GENERATE_H

#include "case.h"

#include <Zydis/Zydis.h>

/* A small generator of pseudo-random numbers (splitmix64): the same cases wherever it runs. */
struct random {
    u64 state;
};

static inline u64 random_next(struct random *r)
{
    u64 z = r->state += 0x9e3779b97f4a7c15;

    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return z ^ (z >> 31);
}
/* 0 to n - 1 */
static inline u32 random_below(struct random *r, u32 n)
{
    return (u32)((random_next(r) >> 32) * n >> 32);
}
static inline bool random_percent(struct random *r, u32 percent)
{
    return random_below(r, 100) < percent;
}

struct generator;

/* only: a mnemonic, or NULL for all. NULL when nothing can be made. */
struct generator *generator_create(bool mode64, const char *only, const struct host *host);
void generator_destroy(struct generator *g);
/* Mnemonics and encodings that it found. */
void generator_size(const struct generator *g, unsigned *mnemonics, unsigned *forms);
const ZydisDecoder *generator_decoder(const struct generator *g);

/* --- For blocks --- */

/* Which instructions: a list of mnemonics in generate.c; any: all, by the weights of cases. */
enum choice { CHOICE_ANY, CHOICE_COMMON, CHOICE_PRODUCER, CHOICE_MOVE, CHOICE_CONSUMER, CHOICES };

#define NO_REGISTER 0xffu
struct address {
    u8 base, index, scale; /* scale as in SIB */
};

struct candidate {
    u8 code[32];
    ZydisDecodedInstruction zi;
    ZydisDecodedOperand ops[ZYDIS_MAX_OPERAND_COUNT];
};

/*
 * One instruction of a random form, which goes on to the next one when it doesn't fault; its memory operand
 * tends to be like *a, the displacement is random. False: that was nothing, try again.
 */
bool generate_candidate(const struct generator *g, struct random *r, enum choice choice,
                        const struct address *a, struct candidate *out);
/* The number of a general register of 16 to 64 bits, or -1. */
int gpr_number(ZydisRegister reg);
void generate_state(const struct generator *g, struct random *r, struct user_state *s);

/*
 * Forms that raise #UD whenever the processor meets them are rarely chosen. To find them: how many there are;
 * a case that runs one (false: there is none that can); what came of it.
 */
u32 generator_forms(const struct generator *g);
bool generate_probe(const struct generator *g, struct random *r, u32 form, struct test_case *c);
void generator_set_lacking(struct generator *g, u32 form, bool lacking);

/* --- Cases --- */

/* Fills the images that cases choose from. */
void generate_images(struct random *r, const struct host *host,
                     u8 images[IMAGES][WRITABLE_PAGES * PAGE]);
void generate_read_only(struct random *r, u8 page[PAGE]);
void generate_case(const struct generator *g, struct random *r, struct test_case *c);
/* A case that runs these bytes. */
void generate_case_of(const struct generator *g, struct random *r, const u8 *code, unsigned len,
                      struct test_case *c);

#endif
