"""A C file for a compiler to work on: functions of the kinds that programs have, under a seed."""

import random

HEAD = """\
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct item {
    struct item *next;
    const char *name;
    uint32_t key, flags;
    double weight;
};

static uint32_t counters[64];
"""

# Each takes two numbers and returns one. {n} is the function's own number, {call} an expression
# that calls an earlier one, {a} to {d} small numbers.
KINDS = ["""\
static uint32_t function_{n}(uint32_t x, uint32_t y)
{{
    uint32_t sum = x * {a}u + {b}u;

    for (uint32_t i = 0; i < (y & {c}u); i++) {{
        switch (sum >> {d} & 7) {{
        case 0:
            sum += i * {a}u;
            break;
        case 1:
            sum ^= sum << {d};
            break;
        case 2:
            sum -= {call};
            break;
        case 5:
            sum = sum / ({b}u + i) + x;
            break;
        default:
            sum = (sum >> 3 | sum << 29) + y;
        }}
    }}
    return sum + counters[x % 64];
}}
""", """\
static uint32_t function_{n}(uint32_t x, uint32_t y)
{{
    struct item *head = NULL, *item, **at;
    uint32_t found = 0;

    for (uint32_t i = 0; i < {c}u; i++) {{
        item = malloc(sizeof(*item));
        if (!item)
            return 0;
        *item = (struct item){{head, "item {n}", x + i * {a}u, i & {b}u, (double)i / {b}}};
        head = item;
    }}
    for (at = &head; (item = *at);) {{
        if (item->key % {d} == y % {d} || item->flags & 1) {{
            *at = item->next;
            found += item->key + (uint32_t)(item->weight * {a}) + (uint32_t)strlen(item->name);
            free(item);
        }} else {{
            at = &item->next;
        }}
    }}
    while ((item = head)) {{
        head = item->next;
        free(item);
    }}
    return found ^ {call};
}}
""", """\
static uint32_t function_{n}(uint32_t x, uint32_t y)
{{
    double matrix[{d}][{d}], sum = 0;

    for (int i = 0; i < {d}; i++) {{
        for (int j = 0; j < {d}; j++)
            matrix[i][j] = (double)(x * (uint32_t)i + y * (uint32_t)j) / {a};
    }}
    for (int k = 0; k < {d}; k++) {{
        for (int i = 0; i < {d}; i++) {{
            double factor = matrix[i][k] / (matrix[k][k] + {b});

            for (int j = k; j < {d}; j++)
                matrix[i][j] -= factor * matrix[k][j];
        }}
        sum += matrix[k][k] > 0 ? matrix[k][k] : -matrix[k][k];
    }}
    return sum < {c} ? (uint32_t)sum : {call};
}}
""", """\
static uint32_t function_{n}(uint32_t x, uint32_t y)
{{
    static const char text[] = "word {a} and word {b}, then {c}; and no more than {d}";
    char copy[sizeof(text)];
    uint32_t words = 0, digits = 0;

    memcpy(copy, text, sizeof(copy));
    for (char *at = copy; *at; at++) {{
        if (*at >= '0' && *at <= '9')
            digits = digits * 10 + (uint32_t)(*at - '0');
        else if (*at == ' ' || *at == ',')
            words++;
        else
            *at = (char)(*at ^ (char)(x & 15));
    }}
    if (strchr(copy, (int)(y & 127)))
        counters[words % 64] += digits;
    else if (digits > {b}u)
        counters[digits % 64] ^= {call};
    return words + digits + (uint32_t)strcspn(copy, "{n}");
}}
"""]

TAIL = """\
int main(int argc, char **argv)
{{
    uint32_t x = (uint32_t)argc, y = argc > 1 ? (uint32_t)atoi(argv[1]) : 1;

{calls}    printf("%u\\n", x);
    return 0;
}}
"""


def c_source(lines, seed=1972):
    """The text of a program of about so many lines."""
    rng = random.Random(seed)
    parts = [HEAD]
    count = 0
    length = HEAD.count("\n")
    while length < lines * 9 // 10:
        call = f"function_{rng.randrange(count)}(y, x)" if count else "x"
        parts.append(rng.choice(KINDS).format(n=count, call=call, a=rng.randrange(3, 90),
                                              b=rng.randrange(3, 300), c=rng.randrange(7, 64),
                                              d=rng.randrange(3, 12)))
        length += parts[-1].count("\n") + 1
        count += 1
    # Every function is needed, or the compiler leaves it out.
    calls = (f"    x += function_{i % count}(x, y);\n" for i in range(lines - length - 8))
    return "\n".join([*parts, TAIL.format(calls="".join(calls))])
