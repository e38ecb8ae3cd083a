"""What bench/programs has python3 do: objects, dictionaries, strings, floats, and the library.

Runs alone, and prints a checksum of all that it computed.
"""

import hashlib
import heapq
import json
import re

SUM = hashlib.sha256()


def note(value):
    """Takes a result into the checksum."""
    SUM.update(repr(value).encode())


class Shape:
    """Something with methods."""

    def __init__(self, width, height):
        self.width = width
        self.height = height

    def area(self):
        """For calls of methods."""
        return self.width * self.height


class Square(Shape):
    """For a method that calls its base."""

    def __init__(self, side):
        super().__init__(side, side)

    def area(self):
        return super().area() + 1


def numbers():
    """Integers, lists, and a generator."""
    sieve = bytearray([1]) * 60000
    for i in range(2, 245):
        if sieve[i]:
            for j in range(i * i, len(sieve), i):
                sieve[j] = 0
    note(sum(i for i in range(2, len(sieve)) if sieve[i]))
    x = 1
    for _ in range(60000):
        x = (x * 1103515245 + 12345) % 2147483648
    note(x)
    note(pow(3, 20011) % 10**40)


def objects():
    """Calls and attributes."""
    shapes = [Square(i) if i % 3 else Shape(i, i + 1) for i in range(20000)]
    note(sum(shape.area() for shape in shapes))

    def fibonacci(n):
        return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)
    note(fibonacci(19))


def text():
    """Strings, dictionaries, regular expressions, JSON."""
    words = [f"word{i * i % 997}" for i in range(20000)]
    counts = {}
    for word in words:
        counts[word] = counts.get(word, 0) + 1
    best = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    note(best[:50])
    line = " ".join(words)
    note(len(re.findall(r"\bword(\d)\1\d?\b", line)))
    note(line.upper().replace("WORD", "w").split()[::501])
    data = {word: [count, count / 7, {"of": word[::-1]}] for word, count in best}
    copy = data
    for _ in range(5):
        copy = json.loads(json.dumps(copy))
    note(copy == data)


def floats():
    """A simulation, and a heap."""
    x, y, z = 1.0, 1.0, 1.0
    for _ in range(30000):
        x, y, z = (x + 0.01 * 10 * (y - x), y + 0.01 * (x * (28 - z) - y),
                   z + 0.01 * (x * y - z * 8 / 3))
    note((x, y, z))
    heap = []
    for i in range(10000):
        heapq.heappush(heap, (i * 7919 % 10007, i))
    note([heapq.heappop(heap) for _ in range(5000)][::97])


def main():
    """All of it, some times over."""
    for _ in range(6):
        numbers()
        objects()
        text()
        floats()
    print(SUM.hexdigest())


main()
