/*
 * Integer benchmarks. The class is what an emulator is measured by first: arithmetic, loads and
 * stores, branches, calls.
 */
#include "bench.h"

#include <string.h>

/* Multiplications, shifts, compares, a branch that nobody predicts, some divisions: no memory. */
static u64 run_integer(void)
{
    u64 a = 0x243f6a8885a308d3, b = 0x13198a2e03707344, c = 0;

    for (u32 i = 1; i <= 60000; i++) {
        a = a * 6364136223846793005u + 1442695040888963407u;
        b ^= a >> 33;
        b = b << 23 | b >> 41;
        c += (b & 0x80) ? b - a : a >> 7;
        if ((a >> 40 & 3) == 0)
            c ^= c << 5;
        if (i % 16 == 0)
            c += b % (a >> 32 | 1);
    }
    return a ^ b ^ c;
}

struct record {
    u64 key, value;
};

static void swap_words(u64 *a, u64 *b, size_t words)
{
    while (words--) {
        u64 word = *a;

        *a++ = *b;
        *b++ = word;
    }
}

/* Quicksort with qsort's interface, for sizes of whole 8 bytes: each comparison is a call. */
static void sort(void *base, size_t count, size_t size, int (*compare)(const void *, const void *))
{
    char *low = base, *high = low + (count - 1) * size;

    while (low < high) {
        char *i = low, *j = high, *pivot = low + (size_t)(high - low) / size / 2 * size;

        for (;;) {
            while (compare(i, pivot) < 0)
                i += size;
            while (compare(j, pivot) > 0)
                j -= size;
            if (i >= j)
                break;
            swap_words((u64 *)i, (u64 *)j, size / 8);
            /* The pivot moves with its place. */
            pivot = pivot == i ? j : pivot == j ? i : pivot;
            i += size;
            j -= size;
        }
        /* The shorter part by recursion, so that the stack stays small. */
        if (j - low < high - j) {
            sort(low, (size_t)(j - low) / size + 1, size, compare);
            low = j + size;
        } else {
            sort(j + size, (size_t)(high - j) / size, size, compare);
            high = j;
        }
    }
}

static int compare_records(const void *a, const void *b)
{
    u64 x = ((const struct record *)a)->key, y = ((const struct record *)b)->key;

    return (x > y) - (x < y);
}

static u64 run_sort(void)
{
    static struct record records[4096];
    u32 seed = 7;
    u64 sum = 0;

    for (u32 i = 0; i < ARRAY_SIZE(records); i++)
        records[i] = (struct record){.key = random_next(&seed), .value = i};
    sort(records, ARRAY_SIZE(records), sizeof(records[0]), compare_records);
    for (u32 i = 1; i < ARRAY_SIZE(records); i++) {
        if (records[i].key < records[i - 1].key)
            die("sort: not in order");
        sum = mix(sum, records[i].value);
    }
    return sum;
}

static u64 run_crc(void)
{
    return crc32(text(), TEXT_BYTES);
}

static u64 run_sha256(void)
{
    return sha256(text(), TEXT_BYTES);
}

/* 2 MiB: far more pages than a processor's first TLB holds, and more than its first caches. */
static struct node {
    struct node *next;
    u64 value;
} nodes[128 * 1024] __attribute__((aligned(4096)));

/* One cycle through all nodes in random order (Sattolo's shuffle). */
static void chase_begin(void)
{
    u32 seed = 99;

    for (u32 i = 0; i < ARRAY_SIZE(nodes); i++)
        nodes[i] = (struct node){.next = &nodes[i], .value = i};
    for (u32 i = ARRAY_SIZE(nodes) - 1; i > 0; i--) {
        u32 j = random_next(&seed) % i;
        struct node *next = nodes[i].next;

        nodes[i].next = nodes[j].next;
        nodes[j].next = next;
    }
}

static u64 run_chase(void)
{
    struct node *at = nodes;
    u64 sum = 0;

    do {
        sum = sum * 3 + at->value;
        at = at->next;
    } while (at != nodes);
    return sum;
}

/* Strings byte by byte, as parsers go through them. */
static size_t byte_length(const char *s)
{
    const char *at = s;

    while (*at)
        at++;
    return (size_t)(at - s);
}

static const char *byte_find(const char *s, char c)
{
    while (*s && *s != c)
        s++;
    return *s ? s : NULL;
}

static int byte_compare(const char *a, const char *b, size_t size)
{
    while (size && *a == *b) {
        a++;
        b++;
        size--;
    }
    return size ? (u8)*a - (u8)*b : 0;
}

static const char *byte_search(const char *s, const char *word)
{
    size_t length = byte_length(word);

    while ((s = byte_find(s, *word))) {
        if (!byte_compare(s, word, length))
            return s;
        s++;
    }
    return NULL;
}

static u64 run_strings(void)
{
    const char *all = text(), *previous = all, *line, *at;
    u64 sum = byte_length(all);

    for (line = all; (at = byte_find(line, '\n')); line = at + 1) {
        size_t length = (size_t)(at - line);

        sum = mix(sum, length + (u64)byte_compare(line, previous, length < 40 ? length : 40));
        previous = line;
    }
    for (at = all; (at = byte_search(at, "elsewhere")); at++)
        sum = mix(sum, (u64)(at - all));
    return sum;
}

/* The C library's string functions, which take the widest vectors that the processor has. */
static u64 run_libc_strings(void)
{
    const char *all = text(), *previous = all, *line, *at;
    u64 sum = 0;

    for (int round = 0; round < 8; round++) {
        OPAQUE(all);
        sum += strlen(all);
        for (line = all; (at = strchr(line, '\n')); line = at + 1) {
            size_t length = (size_t)(at - line);
            int order = memcmp(line, previous, length < 40 ? length : 40);

            sum = mix(sum, length + (order > 0) * 2 + (order < 0));
            previous = line;
        }
        for (at = all; (at = strstr(at, "elsewhere perhaps")); at++)
            sum = mix(sum, (u64)(at - all));
        sum += memchr(all, 0, TEXT_BYTES + 1) == all + TEXT_BYTES;
    }
    return sum;
}

/* Counts the words of the text in a hash table: short loops, scattered loads. */
static u64 run_hash(void)
{
    static struct {
        const char *word;
        u32 length, count;
    } table[1024];
    const char *at = text(), *end = at + TEXT_BYTES;
    u64 sum = 0;

    memset(table, 0, sizeof(table));
    while (at < end) {
        const char *word = at;
        u64 hash = 0xcbf29ce484222325; /* FNV-1a */
        u32 length, slot;

        while (at<end && * at> ' ')
            hash = (hash ^ (u8)*at++) * 0x100000001b3;
        length = (u32)(at++ - word);
        slot = (u32)(hash >> 40) % ARRAY_SIZE(table);
        while (table[slot].word &&
               (table[slot].length != length || byte_compare(table[slot].word, word, length)))
            slot = (slot + 1) % ARRAY_SIZE(table);
        if (!table[slot].word) {
            table[slot].word = word;
            table[slot].length = length;
        }
        table[slot].count++;
    }
    for (u32 i = 0; i < ARRAY_SIZE(table); i++)
        sum = mix(sum, table[i].count);
    return sum;
}

static u64 __attribute__((noipa, optimize("no-optimize-sibling-calls"))) fibonacci(u64 n)
{
    return n < 2 ? n : fibonacci(n - 1) + fibonacci(n - 2);
}

static u64 run_calls(void)
{
    return fibonacci(23);
}

/* Objects of four classes in random order, each with its table of methods. */
struct shape;
struct methods {
    u64 (*area)(const struct shape *);
    void (*scale)(struct shape *, u64);
};
struct shape {
    const struct methods *methods;
    u64 a, b;
};

static u64 square_area(const struct shape *s)
{
    return s->a * s->a;
}

static u64 rectangle_area(const struct shape *s)
{
    return s->a * s->b;
}

static u64 triangle_area(const struct shape *s)
{
    return s->a * s->b / 2;
}

static u64 ring_area(const struct shape *s)
{
    return 3 * (s->a * s->a - s->b);
}

static void scale_one(struct shape *s, u64 by)
{
    s->a = s->a * by & 0xffff;
}

static void scale_both(struct shape *s, u64 by)
{
    s->a = s->a * by & 0xffff;
    s->b = s->b * by & 0xffff;
}

static u64 run_indirect(void)
{
    static const struct methods classes[] = {
        {square_area, scale_one},
        {rectangle_area, scale_both},
        {triangle_area, scale_both},
        {ring_area, scale_one},
    };
    static struct shape shapes[2048];
    u32 seed = 5;
    u64 sum = 0;

    for (u32 i = 0; i < ARRAY_SIZE(shapes); i++) {
        u32 r = random_next(&seed);

        shapes[i] = (struct shape){&classes[r >> 8 & 3], r & 0xff, r >> 16 & 0xff};
    }
    for (u64 round = 3; round < 23; round++) {
        for (u32 i = 0; i < ARRAY_SIZE(shapes); i++) {
            struct shape *s = &shapes[i];

            s->methods->scale(s, round);
            sum += s->methods->area(s);
        }
    }
    return sum;
}

/* An interpreter of a small register machine. Its program looks for the number below a limit whose
 * Collatz sequence is longest. */
enum { MOVE, SET, ADD, TRIPLE, HALVE, ODD, LESS, EQUAL, JUMP, JUMP_IF, HALT };

static u64 interpret(const u8 (*code)[4], u64 limit)
{
    u64 r[8] = {0};
    u32 pc = 0;

    r[7] = limit;
    for (;;) {
        const u8 *i = code[pc++];

        switch (i[0]) {
        case MOVE:
            r[i[1]] = r[i[2]];
            break;
        case SET:
            r[i[1]] = i[2];
            break;
        case ADD:
            r[i[1]] += r[i[2]];
            break;
        case TRIPLE:
            r[i[1]] = r[i[1]] * 3 + 1;
            break;
        case HALVE:
            r[i[1]] >>= 1;
            break;
        case ODD:
            r[i[1]] = r[i[2]] & 1;
            break;
        case LESS:
            r[i[1]] = r[i[2]] < r[i[3]];
            break;
        case EQUAL:
            r[i[1]] = r[i[2]] == r[i[3]];
            break;
        case JUMP:
            pc = i[1];
            break;
        case JUMP_IF:
            if (r[i[1]])
                pc = i[2];
            break;
        case HALT:
            return r[4] << 32 | r[3];
        }
    }
}

static u64 run_bytecode(void)
{
    /* r0 = number, r1 = where its sequence is, r2 = steps, r3 = the most, r4 = whose, r5 = one */
    static const u8 program[][4] = {
        {SET, 5, 1},      {SET, 0, 1},      {MOVE, 1, 0}, /* 2: the next number */
        {SET, 2, 0},      {EQUAL, 6, 1, 5},               /* 4: the next step */
        {JUMP_IF, 6, 13}, {ADD, 2, 5},      {ODD, 6, 1},  {JUMP_IF, 6, 11},
        {HALVE, 1},       {JUMP, 4},        {TRIPLE, 1}, /* 11 */
        {JUMP, 4},        {LESS, 6, 3, 2},               /* 13: done with this number */
        {JUMP_IF, 6, 19}, {ADD, 0, 5},                   /* 15 */
        {LESS, 6, 0, 7},  {JUMP_IF, 6, 2},  {HALT},       {MOVE, 3, 2}, /* 19: the longest so far */
        {MOVE, 4, 0},     {JUMP, 15},
    };

    return interpret(program, 700);
}

/* The C library's memcpy, memmove and memset: some large blocks, many small ones of odd sizes. */
static u64 run_memcpy(void)
{
    static char from[512 * 1024], to[512 * 1024];
    u32 seed = 11;
    u64 sum = 0;

    memset(from, 0x5a, sizeof(from));
    memcpy(from, text(), TEXT_BYTES);
    memcpy(to, from, sizeof(to));
    for (u32 i = 0; i < 16; i++)
        memcpy(to + i * 8192 + i, from + i * 4096, 16384);
    memmove(to + 100, to, 200000);
    for (u32 i = 0; i < 8000; i++) {
        u32 r = random_next(&seed);

        memcpy(to + (r & 0xffff), from + (r >> 12 & 0xffff), r >> 28 ? 1 + (r >> 20 & 0x3f) : 300);
    }
    for (u32 i = 0; i < sizeof(to); i += 1021)
        sum = mix(sum, (u8)to[i]);
    return sum;
}

const struct benchmark compute_benchmarks[] = {
    {"integer", run_integer},
    {"sort", run_sort},
    {"crc", run_crc},
    {"chase", run_chase, .begin = chase_begin},
    {"sha256", run_sha256},
    {"strings", run_strings},
    {"libc-strings", run_libc_strings},
    {"hash", run_hash},
    {"calls", run_calls},
    {"indirect", run_indirect},
    {"bytecode", run_bytecode},
    {"memcpy", run_memcpy},
    {"compress", run_compress},
    {"decompress", run_decompress},
    {NULL},
};
