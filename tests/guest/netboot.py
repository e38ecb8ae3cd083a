#!/usr/bin/python3
"""Boots from the network: what DHCP names and TFTP serves, under BIOS by iPXE as the card's ROM, under UEFI by itself;
before a disk that boots, too, and only when asked for."""

import os
import subprocess

import guest

# One program, for a disk's sector or what the network serves (both run at 0:7C00): it says so and leaves by SAYS.
PROGRAM = r"""
    .code16
    .globl _start
_start:
    mov $SAYS, %al
    mov $0xf4, %dx
    outb %al, %dx
    hlt
    .org 510
    .word 0xaa55
"""
DISK, NETWORK = 21, 22

GRUB_CONFIG = """
serial --unit=0 --speed=115200
terminal_output serial
echo
echo "booted by $grub_platform from $net_default_server"
"""


def program(directory, says):
    """A disk image with the program in its first sector; returns its path."""
    folder = os.path.join(directory, str(says))
    os.mkdir(folder)
    return guest.boot_disk(folder, PROGRAM.replace("SAYS", str(says)))


def grub(directory, served):
    """GRUB as one file for UEFI, with its configuration in it."""
    config = os.path.join(directory, "grub.cfg")
    with open(config, "w", encoding="ascii") as file:
        file.write(GRUB_CONFIG)
    subprocess.run(["grub-mkstandalone", "-O", "x86_64-efi", "--modules=serial echo efinet",
                    "--fonts=", "--locales=", "--themes=", "-o", os.path.join(served, "grub.efi"),
                    f"boot/grub/grub.cfg={config}"], check=True, stderr=subprocess.DEVNULL)


def boot(disk, *options):
    """Boots by BIOS, from a disk or otherwise: the number that what was booted left with, or None."""
    vm = guest.Guest("--firmware", "bios", "--engine", "bt", "--memory", "64M", "--disk",
                     disk + ",format=raw", "--serial", "none", "--debug-exit", "0xf4", *options)
    status = vm.finish()
    if status is None or not status & 1:
        vm.show()
        return None
    return status >> 1


def main():
    """Three boots by BIOS, one by UEFI."""
    cases = guest.Cases()
    with guest.temporary() as directory:
        served = os.path.join(directory, "served")
        os.mkdir(served)
        disk = program(directory, DISK)
        os.rename(program(directory, NETWORK), os.path.join(served, "program"))
        os.truncate(os.path.join(served, "program"), 4096)
        network = f"user,tftp={served},bootfile="
        cases.equal("bios", boot(disk, "--net", network + "program", "--boot", "network"), NETWORK)
        cases.equal("bios-falls-back-to-the-disk",
                    boot(disk, "--net", network + "missing", "--boot", "network"), DISK)
        cases.equal("bios-disk-first", boot(disk, "--net", network + "program"), DISK)

        grub(directory, served)
        vm = guest.Guest("--firmware", "uefi,vars=none", "--engine", "bt", "--memory", "256M", "--net",
                         network + "grub.efi", "--boot", "network")
        reached = vm.expect(rb"booted by efi from (\S+)\s")
        vm.process.terminate()
        vm.finish(30)
        if not cases.equal("uefi", reached and reached[1], b"10.0.2.2"):
            vm.show()
    cases.done()


main()
