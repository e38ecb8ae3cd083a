"""A small C project, with Debian's make and gcc to build it in a guest."""

import os
import shutil

from bench import fetch_tree
from csource import c_source

PACKAGES = ["gcc", "libc6-dev", "make", "dash"]
FILES = 12
FILE_LINES = 250
MAKEFILE = """\
PARTS := $(wildcard part_*.c)

all.o: $(PARTS:.c=.o)
\tld -r -o $@ $^

%.o: %.c
\tgcc -O1 -Dmain=$* -c -o $@ $<
"""
BUILD = """\
export PATH=/usr/bin LC_ALL=C HOME=/work
cd /work && make -s -j{workers}
"""


def make_tree(directory, workers, files=FILES):
    """A copy of the packages' tree, "debian" in `directory`; returns its path.

    There, `chroot` runs /bin/sh /work/build, which makes /work/all.o from so many files by so many jobs
    at once.
    """
    tree = os.path.join(directory, "debian")
    shutil.copytree(fetch_tree("smp", *PACKAGES), tree, symlinks=True)
    work = os.path.join(tree, "work")
    os.mkdir(work)
    for n in range(files):
        with open(os.path.join(work, f"part_{n}.c"), "w", encoding="ascii") as file:
            file.write(c_source(FILE_LINES, seed=n))
    for name, text in (("Makefile", MAKEFILE), ("build", BUILD.format(workers=workers))):
        with open(os.path.join(work, name), "w", encoding="ascii") as file:
            file.write(text)
    return tree
