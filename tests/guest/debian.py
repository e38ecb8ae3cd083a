#!/usr/bin/python3
"""A disk image of Debian 12 (scripts/debian-image) on a whole PC: firmware, GRUB, systemd, a login on the serial
port; then its disk, its network, and what the firmware's tables say, looked at from there.

    debian.py bios|uefi
"""

import hashlib
import io
import os
import re
import struct
import subprocess
import sys
import tarfile
import time

import guest
import web

PROMPT = rb"root@debian:~# "
UUID = "12345678-9abc-def0-1122-334455667788"
ROOT_OFFSET = 18 << 20  # of the root file system on the disk


class Login:
    """root's shell on the serial port."""

    def __init__(self, vm):
        self.vm = vm

    def _send(self, line):
        os.write(self.vm.process.stdin.fileno(), line.encode() + b"\r")

    def begin(self):
        """Logs in; returns whether there is a prompt."""
        if not self.vm.expect(rb"debian login: "):
            return False
        self._send("root")
        if not self.vm.expect(rb"Password: "):
            return False
        # login turns the echo off behind its prompt, and discards what came before.
        time.sleep(0.5)
        self._send("doppel")
        if not self.vm.expect(PROMPT, patience=30):
            self._send("doppel")
            if not self.vm.expect(PROMPT):
                return False
        # Neither what is typed nor the kernel's messages shall be among what commands print.
        self._send("stty -echo; dmesg -n 1")
        return self.vm.expect(PROMPT) is not None

    def ask(self, command):
        """What a command prints."""
        self._send(command)
        match = self.vm.expect(rb"(?s)^(.*?)(?:\x1b\[\?2004[hl]\r?)*" + PROMPT)
        text = re.sub(rb"\x1b\[\?2004[hl]|\r", b"", match[1]) if match else b""
        return text.decode(errors="replace").strip()

    def power_off(self):
        """Shuts the guest down; returns doppel's exit status."""
        self._send("poweroff")
        return self.vm.finish()


def disk_checks(cases, login):
    """The root file system, and what is read back from the disk, not the cache."""
    cases.equal("root", login.ask("findmnt -no SOURCE,FSTYPE,OPTIONS / | tr -s ' ' | cut -d, -f1"),
                "/dev/vda3 ext4 rw")
    written = login.ask("dd if=/dev/urandom bs=1M count=32 status=none | "
                        "tee /root/data | sha256sum; sync; echo 3 >/proc/sys/vm/drop_caches")
    cases.equal("read-back", login.ask("sha256sum </root/data"), written)
    return written.split(" ")[0]


def network_checks(cases, login, server):
    """An address by DHCP, and files both ways."""
    host = f"http://10.0.2.2:{server.server_port}"
    login.ask("/lib/systemd/systemd-networkd-wait-online --any --timeout=120")
    cases.equal("dhcp", login.ask("ip -4 -o addr show scope global | tr -s ' ' | cut -d' ' -f4"),
                "10.0.2.15/24")
    cases.equal("download", login.ask(f"wget -qO- {host}/blob | sha256sum"),
                hashlib.sha256(server.blob).hexdigest() + "  -")
    mine = login.ask(f"wget -qO- --post-file=/root/data {host}/mine; sha256sum </root/data")
    cases.equal("upload", hashlib.sha256(server.uploads.get("/mine", b"")).hexdigest() + "  -", mine)


def smbios_checks(cases, login):
    """What the options said of the machine, as it went through the firmware."""
    for what, want in (("system-manufacturer", "doppel"), ("system-product-name", "Testbed 9"),
                       ("system-serial-number", "SN-42/b"), ("system-uuid", UUID)):
        cases.equal(what, login.ask("dmidecode -s " + what), want)
    memory = login.ask("dmidecode -t memory")
    cases.check("smbios-memory", re.search(r"(?m)^\s*Size: 512 MB$", memory), memory)


def acpi_checks(cases, login, server):
    """The tables as the firmware made them by the table loader: placed, with pointers and checksums."""
    host = f"http://10.0.2.2:{server.server_port}"
    login.ask("cp -r /sys/firmware/acpi/tables /tmp/acpi && "
              f"tar -C /tmp -cf /tmp/acpi.tar acpi && wget -qO- --post-file=/tmp/acpi.tar {host}/acpi")
    tables = {}
    with tarfile.open(fileobj=io.BytesIO(server.uploads.get("/acpi", b""))) as archive:
        for member in archive.getmembers():
            name = os.path.basename(member.name)
            if member.isfile() and re.fullmatch("[A-Z]{4}[0-9]*", name):
                tables[name] = archive.extractfile(member).read()
    missing = {"APIC", "DSDT", "FACP", "FACS", "HPET", "MCFG"} - set(tables)
    cases.check("acpi-tables", not missing, f"without {sorted(missing)}: {sorted(tables)}")
    wrong = [name for name, table in tables.items()
             if name != "FACS" and (sum(table) & 255 or struct.unpack_from("<I", table, 4)[0] != len(table))]
    cases.check("acpi-checksums", tables and not wrong, f"{wrong}")
    fadt = tables.get("FACP", bytes(148))
    pointers = struct.unpack_from("<I", fadt, 36) + struct.unpack_from("<Q", fadt, 140)  # FACS, DSDT
    cases.check("acpi-pointers", all(0 < p < 512 << 20 for p in pointers), f"{pointers}")
    complaints = login.ask("dmesg | grep -E 'ACPI.*(Error|Warning|[Ii]ncorrect)'")
    cases.equal("acpi-no-complaints", complaints, "")


def session(cases, login, firmware):
    """From the prompt to the end."""
    server = web.Server("127.0.0.1")
    cases.equal("firmware", login.ask("test -d /sys/firmware/efi && echo uefi || echo bios"), firmware)
    cases.equal("system", login.ask("systemctl is-system-running --wait"), "running")
    cases.equal("kernel-errors", login.ask("dmesg -l emerg,alert,crit,err"), "")
    data = disk_checks(cases, login)
    network_checks(cases, login, server)
    smbios_checks(cases, login)
    acpi_checks(cases, login, server)
    cases.equal("power-off", login.power_off(), 0)
    return data


def image_checks(cases, directory, disk, data):
    """The image that the guest left: whole, and with the file in it."""
    status, output = guest.tool("qemu-img", "check", disk)
    cases.check("image-check", status == 0, output)
    raw, out = os.path.join(directory, "raw"), os.path.join(directory, "data")
    subprocess.run([guest.DOPPEL, "image", "convert", "-O", "raw", disk, raw], check=True)
    root = f"{raw}?offset={ROOT_OFFSET}"
    status, output = guest.tool("e2fsck", "-fn", root)
    cases.check("fsck", status == 0, output)
    subprocess.run(["debugfs", "-R", f"dump /root/data {out}", root], check=True,
                   stderr=subprocess.DEVNULL)
    with open(out, "rb") as file:
        cases.equal("file-on-the-image", hashlib.sha256(file.read()).hexdigest(), data)


def main():
    """One boot, a session, a look at what is left."""
    firmware = sys.argv[1]
    os.environ["PATH"] += ":/usr/sbin:/sbin"
    cases = guest.Cases()
    with guest.temporary() as directory:
        disk = os.path.join(directory, "disk.qcow2")
        subprocess.run([guest.DOPPEL, "image", "create", "-b", guest.debian_image(), disk], check=True,
                       stdout=subprocess.DEVNULL)
        vm = guest.Guest("--firmware", firmware, "--engine", "bt", "--disk", disk, "--net", "user",
                         "--product", "Testbed 9", "--serial-number", "SN-42/b", "--uuid", UUID,
                         stdin=subprocess.PIPE)
        grub = vm.expect(rb"GRUB \((pc|efi)\) loads")
        cases.equal("grub", grub and grub[1].decode(), {"bios": "pc", "uefi": "efi"}[firmware])
        login = Login(vm)
        if cases.check("login", login.begin(), "no prompt"):
            data = session(cases, login, firmware)
            image_checks(cases, directory, disk, data)
        else:
            vm.process.kill()
        if cases.failed:
            vm.show()
    cases.done()


main()
