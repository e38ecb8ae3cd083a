#!/usr/bin/python3
"""iPXE, a BIOS program that drives virtio-net itself: it gets an address by DHCP and a script from this host, which
says what iPXE finds in SMBIOS; read from the screen."""

import os
import shutil
import subprocess

import firmware
import guest
import web

UUID = "12345678-9abc-def0-1122-334455667788"

# iPXE's commands are its command line; the script comes over the network.
GRUB_CONFIG = """
linux16 /ipxe.lkrn dhcp "&&" chain http://10.0.2.2:PORT/blob
boot
"""
CHAINED = b"#!ipxe\necho Chained: ${net0/chip} ${net0/ip} ${product} ${uuid}\nshell\n"


def iso(directory, port):
    """An image, for a CD-ROM or a disk, on which GRUB starts iPXE; returns its path."""
    tree, image = os.path.join(directory, "tree"), os.path.join(directory, "ipxe.iso")
    os.makedirs(os.path.join(tree, "boot", "grub"))
    shutil.copy("/boot/ipxe.lkrn", tree)
    with open(os.path.join(tree, "boot", "grub", "grub.cfg"), "w", encoding="ascii") as file:
        file.write(GRUB_CONFIG.replace("PORT", str(port)))
    subprocess.run(["grub-mkrescue", "-o", image, tree], check=True, stdout=subprocess.DEVNULL,
                   stderr=subprocess.DEVNULL)
    return image


def main():
    """One boot."""
    cases = guest.Cases()
    server = web.Server("127.0.0.1")
    server.blob = CHAINED
    with guest.temporary() as directory:
        screen, reached = firmware.boots_to(
            directory, "Chained: virtio-net 10.0.2.15 Testbed 9 " + UUID, "--firmware", "bios",
            "--engine", "bt", "--memory", "64M", "--disk",
            iso(directory, server.server_port) + ",format=raw,readonly=on", "--net", "user",
            "--product", "Testbed 9", "--uuid", UUID)
        cases.check("ipxe-boots-from-the-network", reached, screen)
    cases.done()


main()
