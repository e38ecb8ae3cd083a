/*
 * A compressor in the manner of gzip: LZ77 with chains of hashed positions, then Huffman codes made
 * for the data. What it writes is a format of its own:
 *
 *  - a length or distance v has a class, its number of bits and the bit below the highest, and the
 *    rest of its bits follow as they are (class_of);
 *  - the symbols of one code are 256 literals, END, and the classes of lengths; another code has
 *    the classes of distances;
 *  - first the lengths of all codes, a byte each; then symbols, until END. Bits fill bytes from the
 *    lowest up.
 */
#include "bench.h"

#include <string.h>

#define WINDOW 32768
#define MATCH_LEAST 4
#define MATCH_MOST 258
#define CHAIN_MOST 24 /* earlier positions that are tried */
#define HASH_BITS 13
#define NOWHERE (~0u)

#define END 256
#define CLASSES 40
#define SYMBOLS (END + 1 + CLASSES)
#define CODE_MOST 15 /* bits of a code */

#define OUTPUT_BYTES (2 * TEXT_BYTES)

/* A literal, or a length with a distance. */
struct token {
    u16 literal_or_length;
    u16 distance; /* 0: a literal */
};

static struct token tokens[TEXT_BYTES];
static u8 output[OUTPUT_BYTES];
static u8 restored[TEXT_BYTES];
static size_t output_bytes;

/* The class of v, and how many of its bits follow. */
static u32 class_of(u32 v, u32 *extra)
{
    u32 top;

    *extra = 0;
    if (v < 4)
        return v;
    top = 31 - (u32)__builtin_clz(v);
    *extra = top - 1;
    return top * 2 + (v >> (top - 1) & 1);
}

/* The least number of a class, and how many bits are to be added. */
static u32 class_base(u32 class, u32 *extra)
{
    *extra = 0;
    if (class < 4)
        return class;
    *extra = class / 2 - 1;
    return (2 + (class & 1)) << *extra;
}

static u32 hash_at(const u8 *at)
{
    u32 word;

    memcpy(&word, at, sizeof(word));
    return word * 2654435761u >> (32 - HASH_BITS);
}

static u32 match_length(const u8 *a, const u8 *b, u32 most)
{
    u32 length = 0;

    while (length < most && a[length] == b[length])
        length++;
    return length;
}

/* Fills tokens; returns how many. */
static size_t find_matches(const u8 *data, u32 size)
{
    static u32 head[1 << HASH_BITS], earlier[WINDOW];
    size_t count = 0;
    u32 at = 0;

    memset(head, 0xff, sizeof(head));
    while (at < size) {
        u32 best = 0, best_at = 0, step, most = size - at < MATCH_MOST ? size - at : MATCH_MOST;

        if (size - at >= MATCH_LEAST) {
            u32 candidate = head[hash_at(data + at)];

            for (int tries = 0;
                 tries < CHAIN_MOST && candidate != NOWHERE && at - candidate < WINDOW; tries++) {
                u32 length = match_length(data + candidate, data + at, most);

                if (length > best) {
                    best = length;
                    best_at = candidate;
                }
                candidate = earlier[candidate % WINDOW];
            }
        }
        if (best >= MATCH_LEAST)
            tokens[count++] = (struct token){(u16)best, (u16)(at - best_at)};
        else
            tokens[count++] = (struct token){data[at], 0};
        for (step = best >= MATCH_LEAST ? best : 1; step; step--, at++) {
            if (size - at >= MATCH_LEAST) {
                u32 hash = hash_at(data + at);

                earlier[at % WINDOW] = head[hash];
                head[hash] = at;
            }
        }
    }
    return count;
}

/* A heap of tree nodes, the least weight first. */
struct heap {
    u16 nodes[SYMBOLS];
    u32 count;
};

static void sink(struct heap *heap, const u32 *weights, u32 i)
{
    for (;;) {
        u32 least = i, child = 2 * i + 1;
        u16 node = heap->nodes[i];

        if (child < heap->count && weights[heap->nodes[child]] < weights[heap->nodes[least]])
            least = child;
        if (child + 1 < heap->count &&
            weights[heap->nodes[child + 1]] < weights[heap->nodes[least]])
            least = child + 1;
        if (least == i)
            return;
        heap->nodes[i] = heap->nodes[least];
        heap->nodes[least] = node;
        i = least;
    }
}

/* The lengths of Huffman's code for these frequencies, none above CODE_MOST. */
static void code_lengths(const u32 *frequencies, u32 count, u8 *lengths)
{
    u32 weights[2 * SYMBOLS], longest;
    u16 parent[2 * SYMBOLS];

    for (u32 i = 0; i < count; i++)
        weights[i] = frequencies[i];
    do {
        struct heap heap = {.count = 0};
        u32 next = count;

        for (u32 i = 0; i < count; i++) {
            if (weights[i])
                heap.nodes[heap.count++] = (u16)i;
        }
        for (u32 i = heap.count; i-- > 0;)
            sink(&heap, weights, i);
        while (heap.count > 1) {
            u16 a = heap.nodes[0], b;

            heap.nodes[0] = heap.nodes[--heap.count];
            sink(&heap, weights, 0);
            b = heap.nodes[0];
            weights[next] = weights[a] + weights[b];
            parent[a] = parent[b] = (u16)next;
            heap.nodes[0] = (u16)next++;
            sink(&heap, weights, 0);
        }
        longest = 0;
        memset(lengths, 0, count);
        for (u32 i = 0; i < count; i++) {
            u32 length = 0;

            if (!weights[i])
                continue;
            for (u32 node = i; node + 1 < next; node = parent[node])
                length++;
            lengths[i] = (u8)(length ? length : 1);
            longest = length > longest ? length : longest;
        }
        /* Too deep a tree becomes flatter when the weights come closer to each other. */
        for (u32 i = 0; i < count; i++)
            weights[i] = weights[i] ? weights[i] / 2 + 1 : 0;
    } while (longest > CODE_MOST);
}

/* Canonical codes: shorter ones first, in the order of symbols. Bits are turned round, since the
 * first bit of a code is written lowest. */
static void make_codes(const u8 *lengths, u32 count, u16 *codes)
{
    u32 code = 0;

    for (u32 length = 1; length <= CODE_MOST; length++, code <<= 1) {
        for (u32 i = 0; i < count; i++) {
            u32 turned = 0;

            if (lengths[i] != length)
                continue;
            for (u32 bit = 0; bit < length; bit++)
                turned |= (code >> bit & 1) << (length - 1 - bit);
            codes[i] = (u16)turned;
            code++;
        }
    }
}

static struct {
    u64 bits;
    u32 count;
    size_t at;
} writer;

static void put(u32 value, u32 bits)
{
    writer.bits |= (u64)value << writer.count;
    writer.count += bits;
    while (writer.count >= 8) {
        if (writer.at == OUTPUT_BYTES)
            die("compress: it grew");
        output[writer.at++] = (u8)writer.bits;
        writer.bits >>= 8;
        writer.count -= 8;
    }
}

u64 run_compress(void)
{
    const u8 *data = (const u8 *)text();
    size_t count = find_matches(data, TEXT_BYTES);
    u32 symbol_weights[SYMBOLS] = {[END] = 1}, class_weights[CLASSES] = {1};
    u8 symbol_lengths[SYMBOLS], class_lengths[CLASSES];
    u16 symbol_codes[SYMBOLS], class_codes[CLASSES];
    u32 extra;

    for (size_t i = 0; i < count; i++) {
        const struct token *t = &tokens[i];

        if (t->distance) {
            symbol_weights[END + 1 + class_of(t->literal_or_length, &extra)]++;
            class_weights[class_of(t->distance, &extra)]++;
        } else {
            symbol_weights[t->literal_or_length]++;
        }
    }
    code_lengths(symbol_weights, SYMBOLS, symbol_lengths);
    code_lengths(class_weights, CLASSES, class_lengths);
    make_codes(symbol_lengths, SYMBOLS, symbol_codes);
    make_codes(class_lengths, CLASSES, class_codes);

    memset(&writer, 0, sizeof(writer));
    for (u32 i = 0; i < SYMBOLS; i++)
        put(symbol_lengths[i], 8);
    for (u32 i = 0; i < CLASSES; i++)
        put(class_lengths[i], 8);
    for (size_t i = 0; i < count; i++) {
        const struct token *t = &tokens[i];
        u32 symbol = t->literal_or_length, class;

        if (!t->distance) {
            put(symbol_codes[symbol], symbol_lengths[symbol]);
            continue;
        }
        symbol = END + 1 + class_of(t->literal_or_length, &extra);
        put(symbol_codes[symbol], symbol_lengths[symbol]);
        put(t->literal_or_length & ((1u << extra) - 1), extra);
        class = class_of(t->distance, &extra);
        put(class_codes[class], class_lengths[class]);
        put(t->distance & ((1u << extra) - 1), extra);
    }
    put(symbol_codes[END], symbol_lengths[END]);
    put(0, 7);
    output_bytes = writer.at;
    return (u64)output_bytes << 32 | crc32(output, output_bytes);
}

/* A code as its reader wants it: how many codes of each length, and the symbols in that order. */
struct decoder {
    u16 counts[CODE_MOST + 1];
    u16 symbols[SYMBOLS];
};

static void make_decoder(struct decoder *decoder, const u8 *lengths, u32 count)
{
    u32 at = 0;

    memset(decoder->counts, 0, sizeof(decoder->counts));
    for (u32 length = 1; length <= CODE_MOST; length++) {
        for (u32 i = 0; i < count; i++) {
            if (lengths[i] == length) {
                decoder->symbols[at++] = (u16)i;
                decoder->counts[length]++;
            }
        }
    }
}

static struct {
    u64 bits;
    u32 count;
    size_t at;
} reader;

static u32 get(u32 bits)
{
    u32 value;

    while (reader.count < bits) {
        if (reader.at == output_bytes)
            die("decompress: the data ends early");
        reader.bits |= (u64)output[reader.at++] << reader.count;
        reader.count += 8;
    }
    value = (u32)(reader.bits & ((1u << bits) - 1));
    reader.bits >>= bits;
    reader.count -= bits;
    return value;
}

static u32 get_symbol(const struct decoder *decoder)
{
    u32 code = 0, first = 0, at = 0;

    for (u32 length = 1; length <= CODE_MOST; length++) {
        code |= get(1);
        if (code - first < decoder->counts[length])
            return decoder->symbols[at + code - first];
        at += decoder->counts[length];
        first = (first + decoder->counts[length]) << 1;
        code <<= 1;
    }
    die("decompress: no such code");
}

u64 run_decompress(void)
{
    static struct decoder symbols, classes;
    u8 lengths[SYMBOLS];
    u32 symbol, at = 0;

    if (!output_bytes)
        run_compress();
    memset(&reader, 0, sizeof(reader));
    memset(restored, 0, sizeof(restored));
    for (u32 i = 0; i < SYMBOLS; i++)
        lengths[i] = (u8)get(8);
    make_decoder(&symbols, lengths, SYMBOLS);
    for (u32 i = 0; i < CLASSES; i++)
        lengths[i] = (u8)get(8);
    make_decoder(&classes, lengths, CLASSES);
    while ((symbol = get_symbol(&symbols)) != END) {
        u32 extra, length, distance;

        if (symbol < END) {
            if (at == TEXT_BYTES)
                die("decompress: too much");
            restored[at++] = (u8)symbol;
            continue;
        }
        length = class_base(symbol - END - 1, &extra);
        length += get(extra);
        distance = class_base(get_symbol(&classes), &extra);
        distance += get(extra);
        if (!distance || distance > at || length > TEXT_BYTES - at)
            die("decompress: a match outside of the data");
        for (; length; length--, at++)
            restored[at] = restored[at - distance];
    }
    if (at != TEXT_BYTES || memcmp(restored, text(), TEXT_BYTES) != 0)
        die("decompress: not the text that was compressed");
    return crc32(restored, TEXT_BYTES);
}
