/*
 * A text to work on: words drawn from a list, some more often than others, in lines. It compresses
 * somewhat better than prose does.
 */
#include "bench.h"

#include <string.h>

static const char *const words[] = {
    "the",     "of",      "and",      "to",        "a",         "in",      "is",        "it",
    "that",    "was",     "for",      "on",        "are",       "with",    "as",        "be",
    "machine", "memory",  "page",     "register",  "clock",     "address", "interrupt", "kernel",
    "process", "thread",  "segment",  "table",     "entry",     "fault",   "device",    "queue",
    "each",    "every",   "several",  "without",   "before",    "after",   "between",   "because",
    "guest",   "host",    "virtual",  "physical",  "translate", "execute", "decode",    "branch",
    "writes",  "reads",   "returns",  "calls",     "waits",     "signals", "copies",    "shares",
    "quickly", "exactly", "together", "elsewhere", "perhaps",   "never",   "always",    "again",
};

static char buffer[TEXT_BYTES + 1];

const char *text(void)
{
    u32 seed = 20011;
    size_t at = 0, column = 0;

    if (buffer[0])
        return buffer;
    while (at < TEXT_BYTES) {
        /* The lesser of two draws: early words come more often. */
        u32 a = random_next(&seed) % ARRAY_SIZE(words), b = random_next(&seed) % ARRAY_SIZE(words);
        const char *word = words[a < b ? a : b];
        size_t length = strlen(word);
        u32 r = random_next(&seed);

        if (length > TEXT_BYTES - at)
            length = TEXT_BYTES - at;
        memcpy(buffer + at, word, length);
        at += length;
        column += length + 1;
        if (at + 2 >= TEXT_BYTES)
            continue;
        if (r % 11 == 0)
            buffer[at++] = r % 3 ? ',' : '.';
        buffer[at++] = column > 72 ? '\n' : ' ';
        if (column > 72)
            column = 0;
        if (r % 97 == 0)
            buffer[at++] = (char)('0' + r / 97 % 10);
    }
    return buffer;
}
