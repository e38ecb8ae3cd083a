#!/usr/bin/python3
"""VNC, from a viewer to the guest and back: a boot sector's screen is read in a client's picture, what the client types
is typed there, a linear frame buffer takes the place of the text, and Debian's vncsnapshot sees the same."""

import os
import socket
import subprocess
import sys
import time

import guest
import rfb

# Shows all of ASCII, then echoes keys; Enter sets 640x480 in 32 bits, whose first lines become orange.
BOOT_SECTOR = r"""
    .code16
    .globl _start
_start:
    xor %ax, %ax
    mov %ax, %ds
    mov %ax, %ss
    mov $0x7c00, %sp
    mov $3, %ax             # text, the screen cleared
    int $0x10
    mov $0x20, %al
characters:
    call put
    inc %al
    cmp $0x7f, %al
    jne characters
    mov $13, %al
    call put
    mov $10, %al
    call put
echo:
    xor %ax, %ax
    int $0x16
    cmp $13, %al
    je graphics
    call put
    jmp echo
graphics:
    mov $registers, %si
    mov $0x1ce, %dx
next:
    lodsw
    cmp $0xffff, %ax
    je fill
    out %ax, %dx
    inc %dx
    lodsw
    out %ax, %dx
    dec %dx
    jmp next
fill:
    mov $0x3ce, %dx         # the window: 64 KiB at A0000
    mov $0x0506, %ax
    out %ax, %dx
    mov $0xa000, %ax
    mov %ax, %es
    xor %di, %di
    mov $0x4000, %cx
    mov $0xff8040, %eax
    cld
    rep stosl
halt:
    hlt
    jmp halt
put:
    push %ax
    mov $0x0e, %ah
    mov $7, %bx
    int $0x10
    pop %ax
    ret
registers:                  # VBE DISPI: off, width, height, bits, on with a linear frame buffer
    .word 4, 0, 1, 640, 2, 480, 3, 32, 4, 0x41, 0xffff
    .org 510
    .word 0xaa55
"""

CHARACTERS = "".join(map(chr, range(0x20, 0x7f)))
TYPED = "Hello, 2 you!"
TYPED_ROW = 2 # after the two rows that the characters take


def wait_for(viewer, condition):
    """Takes updates in until the condition holds; returns the rectangles of the last one, None when it was in vain."""
    deadline = time.monotonic() + guest.PATIENCE
    rectangles = []
    while not condition(viewer):
        if time.monotonic() > deadline:
            return None
        rectangles = viewer.update()
    return rectangles


def has_booted(viewer):
    """Whether the last of the characters is there, and the cursor below them."""
    if (viewer.width, viewer.height) != (80 * rfb.CELL_WIDTH, 25 * rfb.CELL_HEIGHT):
        return False
    glyphs = rfb.learn(viewer, CHARACTERS)
    blank = viewer.cell(0, 0)
    return len(glyphs) == len(CHARACTERS) and viewer.cell(0, TYPED_ROW) != blank and all(
        viewer.cell(column, row) == blank for row in range(TYPED_ROW + 1, 25) for column in range(80))


def screen_cases(cases, viewer):
    """Reading, typing, and another mode."""
    if not cases.check("the text screen is seen", wait_for(viewer, has_booted) is not None,
                       f"{viewer.width}x{viewer.height}"):
        return
    glyphs = rfb.learn(viewer, CHARACTERS)
    viewer.type("x")
    rectangles = wait_for(viewer, lambda v: rfb.read_row(v, glyphs, TYPED_ROW).startswith("x"))
    cases.check("a key is echoed", rectangles is not None, "it never was")
    cases.check("an update holds no more than what changed",
                rectangles and all(y >= TYPED_ROW * rfb.CELL_HEIGHT and
                                   y + height <= (TYPED_ROW + 1) * rfb.CELL_HEIGHT and width < 100
                                   for _, y, width, height in rectangles), rectangles)
    viewer.type(TYPED)
    seen = wait_for(viewer, lambda v: rfb.read_row(v, glyphs, TYPED_ROW)[:-1] == "x" + TYPED)
    cases.check("what is typed is on the screen", seen is not None,
                rfb.read_row(viewer, glyphs, TYPED_ROW))
    viewer.key(rfb.ENTER)
    orange = wait_for(viewer, lambda v: v.height == 480 and v.pixel(639, 24) == 0xff8040)
    cases.check("the linear frame buffer is seen", orange is not None,
                f"{viewer.width}x{viewer.height}")
    cases.equal("and what isn't drawn is black", viewer.pixel(0, 479), 0)


def free_port():
    """A TCP port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def jpeg_size(path):
    """(width, height) of a baseline JPEG, by its SOF0 segment."""
    with open(path, "rb") as file:
        data = file.read()
    at = data.index(b"\xff\xc0")
    return int.from_bytes(data[at + 7:at + 9], "big"), int.from_bytes(data[at + 5:at + 7], "big")


def snapshot(port, picture):
    """Has vncsnapshot take a picture; its size, or what it said, or None.

    It knows nothing of sizes that change: one that does while it looks leaves it waiting for the rest of the old one.
    """
    try:
        taken = subprocess.run(["vncsnapshot", "-quiet", f"127.0.0.1:{port - 5900}", picture], timeout=5,
                               stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True, check=False)
    except subprocess.TimeoutExpired:
        return None
    return jpeg_size(picture) if taken.returncode == 0 else taken.stdout


def snapshot_case(cases, directory, image):
    """An independent client, by TCP."""
    picture = os.path.join(directory, "screen.jpg")
    port = free_port()
    process = subprocess.Popen([guest.DOPPEL, "run", "--firmware", "bios", "--disk", f"{image},format=raw",
                                "--serial", "none", "--vnc", f":{port}"], stdin=subprocess.DEVNULL)
    deadline = time.monotonic() + guest.PATIENCE
    size = None
    while size != (720, 400) and time.monotonic() < deadline and process.poll() is None:
        size = snapshot(port, picture)
        time.sleep(0.1)
    cases.equal("vncsnapshot takes a picture of the text screen", size, (720, 400))
    process.terminate()
    cases.equal("the machine ends as told", process.wait(guest.PATIENCE), 0)


def main():
    """All cases."""
    cases = guest.Cases()
    with guest.temporary() as directory:
        image, path = guest.boot_disk(directory, BOOT_SECTOR), os.path.join(directory, "vnc")
        process = subprocess.Popen([guest.DOPPEL, "run", "--firmware", "bios", "--disk",
                                    f"{image},format=raw", "--serial", "none", "--vnc", "unix:" + path],
                                   stdin=subprocess.DEVNULL)
        try:
            screen_cases(cases, rfb.Viewer(path))
        finally:
            process.terminate()
            process.wait()
        cases.check("the socket goes with the machine", not os.path.exists(path), "it is there")
        snapshot_case(cases, directory, image)
    cases.done()


if __name__ == "__main__":
    sys.exit(main())
