#!/usr/bin/python3
"""Boots guests/boot.c by PVH and multiboot 1, which checks what it was handed.

    protocols.py IMAGE [--qemu]

The way in is the image's; under PVH an initrd is one file. With --qemu it runs on QEMU's TCG, which
enters an image that has both headers by multiboot.
"""

import os
import sys

import guest
import system

COMMAND_LINE = 'alpha  beta="c d" -- omega'
# File, size, and arguments, in which a comma is doubled; as guests/boot.c has them.
MODULES = [("first", 5000, "one  two"), ("second", 3, "a,,b")]


def write_modules(directory):
    """Writes the modules and returns the paths."""
    paths = []
    for number, (name, size, _) in enumerate(MODULES):
        paths.append(os.path.join(directory, name))
        with open(paths[-1], "wb") as file:
            file.write(bytes((7 * i + number + 1) & 0xFF for i in range(size)))
    return paths


def main():
    """A run an engine."""
    image = sys.argv[1]
    on_qemu = "--qemu" in sys.argv[2:]
    cases = guest.Cases()
    with guest.temporary() as directory:
        paths = write_modules(directory)
        if "pvh" in os.path.basename(image) and not on_qemu:
            initrd = paths[0]
        else:
            initrd = ",".join(f"{path} {args}" for path, (_, _, args) in zip(paths, MODULES))
        if on_qemu:
            system.run(cases, "tcg",
                       ["qemu-system-x86_64", "-accel", "tcg", "-cpu", "max", "-m", "64",
                        "-kernel", image, "-initrd", initrd, "-append", COMMAND_LINE,
                        "-device", f"isa-debug-exit,iobase={system.PORT:#x}", "-display", "none",
                        "-serial", "stdio", "-no-reboot"], system.PASSED)
            cases.done()
        for engine in system.ENGINES + system.CHECKED:
            system.run(cases, engine,
                       [guest.DOPPEL, "run", "--engine", engine, "--cpu", "max",
                        "--memory", "64M", "--kernel", image, "--initrd", initrd,
                        "--append", COMMAND_LINE, "--debug-exit", hex(system.PORT),
                        "--serial", "stdio", "--no-reboot"], system.PASSED)
    cases.done()


main()
