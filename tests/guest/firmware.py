#!/usr/bin/python3
"""Firmware and the old PC: SeaBIOS boots a sector of our own from virtio, IDE and NVMe disks, GRUB's rescue ISO from
a CD-ROM drive, and memtest86+ through GRUB; what they show is read from the screen. OVMF boots GRUB from a CD-ROM and
from a disk of each kind."""

import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import guest

BOOT_SECTOR = r"""
    .code16
    .globl _start
_start:
    xor %ax, %ax
    mov %ax, %ds
    mov %ax, %es
    mov %ax, %ss
    mov $0x7c00, %sp
    mov $0x42, %ah          # extended read: sector 1 to 0x8000
    mov $packet, %si
    int $0x13
    jc failed
    mov $0x8000, %si
next:
    lodsb
    test %al, %al
    jz done
    mov $0x0e, %ah          # teletype
    mov $7, %bx
    push %ax
    int $0x10
    pop %ax
    mov $0x3f8, %dx
    outb %al, %dx
    jmp next
done:
    mov $21, %al
    jmp leave
failed:
    mov $1, %al
leave:
    mov $0xf4, %dx
    outb %al, %dx
    hlt
    .align 4
packet:
    .byte 16, 0
    .word 1, 0x8000, 0
    .quad 1
    .org 510
    .word 0xaa55
    .asciz "read by INT 13h\r\n"
    .org 1024
"""

GRUB_CONFIG = """
set timeout=0
serial --unit=0 --speed=115200
terminal_output --append serial
echo
echo "booted by $grub_platform"
if [ "$grub_platform" = pc ]; then
menuentry memtest {
    linux16 /memtest.bin
}
fi
"""


def rescue_iso(directory):
    """GRUB's rescue CD-ROM, for BIOS and UEFI, with memtest86+ on it; returns its path."""
    tree, image = os.path.join(directory, "tree"), os.path.join(directory, "rescue.iso")
    os.makedirs(os.path.join(tree, "boot", "grub"))
    shutil.copy("/boot/memtest86+ia32.bin", os.path.join(tree, "memtest.bin"))
    subprocess.run(["grub-mkrescue", "-o", image, tree], check=True, stdout=subprocess.DEVNULL,
                   stderr=subprocess.DEVNULL)
    return image


def memtest_iso(directory):
    """The same with a menu that starts memtest86+ by itself."""
    tree, image = os.path.join(directory, "tree"), os.path.join(directory, "memtest.iso")
    with open(os.path.join(tree, "boot", "grub", "grub.cfg"), "w", encoding="ascii") as file:
        file.write(GRUB_CONFIG)
    subprocess.run(["grub-mkrescue", "-o", image, tree], check=True, stdout=subprocess.DEVNULL,
                   stderr=subprocess.DEVNULL)
    return image


def screen_of(process, path):
    """The text on the screen now."""
    if os.path.exists(path):
        os.unlink(path)
    process.send_signal(signal.SIGUSR1)
    for _ in range(100):
        if os.path.exists(path):
            with open(path, encoding="utf-8") as file:
                return file.read()
        time.sleep(0.05)
    return ""


def boots_to(directory, pattern, *options, patience=guest.PATIENCE):
    """Runs until the screen matches; returns the last screen and whether it did."""
    path = os.path.join(directory, "screen.txt")
    process = subprocess.Popen([guest.DOPPEL, "run", *options, "--serial", "none", "--screenshot",
                                path], stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + patience
    screen = ""
    time.sleep(0.5) # until the signal has its handler
    while process.poll() is None and time.monotonic() < deadline:
        screen = screen_of(process, path)
        if re.search(pattern, screen):
            break
        time.sleep(0.5)
    process.terminate()
    process.wait()
    return screen, bool(re.search(pattern, screen))


def sector_cases(cases, directory):
    """The boot sector, from each kind of disk, with each software engine."""
    image = guest.boot_disk(directory, BOOT_SECTOR)
    for bus, engine in itertools.product(("virtio", "ide", "nvme"), ("interp", "bt")):
        name = f"{bus}, {engine}"
        text, picture = (os.path.join(directory, "screen" + end) for end in (".txt", ".png"))
        run = guest.Guest("--firmware", "bios", "--engine", engine, "--disk",
                          f"{image},format=raw,bus={bus}", "--debug-exit", "0xf4", "--screenshot", text,
                          "--screenshot", picture, wrap=("env", "DOPPEL_LOG=debug"))
        status = run.finish()
        cases.equal(f"SeaBIOS boots a sector ({name})", status, 21 << 1 | 1)
        if status != 43:
            run.show()
            continue
        with open(text, encoding="utf-8") as file:
            screen = file.read()
        cases.check(f"the text is on the screen ({name})", "read by INT 13h\n" in screen, screen)
        cases.check(f"the text is on the serial port ({name})",
                    "read by INT 13h" in [line for _, line in run.lines], run.lines)
        cases.check(f"the firmware's messages are in the log ({name})",
                    re.search(r"firmware: SeaBIOS \(version .*(?s:.*)firmware: Booting from", run.stderr()),
                    run.stderr())
        with open(picture, "rb") as file:
            cases.equal(f"a picture of the screen is a PNG ({name})", file.read(8),
                        b"\x89PNG\r\n\x1a\n")


def iso_cases(cases, directory):
    """GRUB from a CD-ROM, and what it boots."""
    screen, reached = boots_to(directory, r"(?m)^grub>", "--firmware", "bios", "--engine", "bt",
                               "--cdrom", rescue_iso(directory))
    cases.check("GRUB's rescue ISO comes to its prompt", reached, screen)
    screen, reached = boots_to(directory, r"(?s)Memtest86\+.*Pass.*Test", "--firmware", "bios",
                               "--engine", "bt", "--memory", "64M", "--cdrom",
                               memtest_iso(directory))
    cases.check("memtest86+ tests", reached, screen)


def uefi_boots(cases, name, *options):
    """GRUB comes up by OVMF."""
    run = guest.Guest("--engine", "bt", "--memory", "256M", *options)
    reached = run.read_until("booted by efi")
    run.process.terminate()
    if not cases.check(name, reached is not None, run.stderr()):
        run.show()
    run.finish(30)


def uefi_cases(cases, directory):
    """GRUB from the same image by OVMF, as a CD-ROM and as a disk; variables end up in their file."""
    variables = os.path.join(directory, "vars.fd")
    image = os.path.join(directory, "memtest.iso")
    uefi_boots(cases, "OVMF boots GRUB", "--firmware", "uefi,vars=" + variables, "--cdrom", image)
    for bus in ("virtio", "nvme"):
        uefi_boots(cases, f"OVMF boots GRUB ({bus})", "--firmware", "uefi", "--disk",
                   f"{image},format=raw,readonly=on,bus={bus}")
    with open(variables, "rb") as file, open("/usr/share/OVMF/OVMF_VARS_4M.fd", "rb") as template:
        cases.check("UEFI's variables are kept", file.read() != template.read(), "nothing was written")


def main():
    """All cases."""
    cases = guest.Cases()
    with guest.temporary() as directory:
        sector_cases(cases, directory)
        iso_cases(cases, directory)
        uefi_cases(cases, directory)
    cases.done()


if __name__ == "__main__":
    sys.exit(main())
