#!/usr/bin/python3
"""What a user gets wrong is answered by one line on stderr and exit status 2, never by a crash."""

import os
import struct
import subprocess

import guest

# One page: a program header table and nothing else that is right.
ELF_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
ELF_IDENT = b"\x7fELF\x02\x01\x01" + bytes(9)


def elf(phoff, phnum, phentsize=56):
    """An ELF header whose program headers are where `phoff` says."""
    header = ELF_HEADER.pack(ELF_IDENT, 2, 62, 1, 0x100000, phoff, 0, 0, 64, phentsize, phnum, 0,
                             0, 0)
    return header.ljust(4096, b"\0")


def elf_segment(offset, paddr, filesz, memsz):
    """An ELF with one loadable segment."""
    segment = struct.pack("<IIQQQQQQ", 1, 7, offset, paddr, paddr, filesz, memsz, 4096)
    data = bytearray(elf(64, 1))
    data[64:64 + len(segment)] = segment
    return bytes(data)


def expect_refusal(cases, name, *args):
    """Runs doppel and wants status 2, one line on stderr, and nothing on stdout."""
    # `auto` may have a line of its own to say, about a /dev/kvm that doesn't work.
    if args[:1] == ("run",) and "--engine" not in args:
        args += ("--engine", "interp")
    done = subprocess.run([guest.DOPPEL, *args], stdin=subprocess.DEVNULL, capture_output=True,
                          timeout=60, check=False)
    lines = done.stderr.decode(errors="replace").splitlines()
    cases.check(name, done.returncode == 2 and len(lines) == 1 and not done.stdout,
                f"status {done.returncode}, stderr {lines!r}, stdout {done.stdout!r}")


def options(cases):
    """Options that are wrong in themselves."""
    run = ("run", "--kernel", "/bin/sh")
    for name, *args in (
            ("unknown-command", "walk"),
            ("unknown-option", "run", "--colour"),
            ("stray-argument", *run, "now"),
            ("no-kernel", "run"),
            ("missing-value", "run", "--kernel"),
            ("given-twice", *run, "--memory", "1G", "--memory", "2G"),
            ("value-for-a-flag", *run, "--no-reboot=yes"),
            ("memory-0", *run, "--memory", "0"),
            ("memory-0M", *run, "--memory", "0M"),
            ("memory-10T", *run, "--memory", "10T"),
            ("memory-overflow", *run, "--memory", "99999999999999999999T"),
            ("memory-wraps", *run, "--memory", "16777216T"),
            ("memory-no-unit", *run, "--memory", "512"),
            ("memory-negative", *run, "--memory", "-1G"),
            ("memory-odd", *run, "--memory", "1025K"),
            ("memory-junk", *run, "--memory", "1Gx"),
            ("memory-option", *run, "--memory", "1G,speed=high"),
            ("memory-hugepages-bt", *run, "--engine", "bt", "--memory", "1G,hugepages=on"),
            ("memory-mergeable-bt", *run, "--engine", "bt", "--memory", "1G,mergeable=on"),
            ("cpu-nested-interp", *run, "--cpu", "host,nested=on"),
            ("cpu-nested-v2", *run, "--cpu", "v2,nested=on"),
            ("cpus-0", *run, "--cpus", "0"),
            ("cpus-65", *run, "--engine", "interp", "--cpus", "65"),
            ("pin-junk", *run, "--pin", "0-"),
            ("pin-nobody", *run, "--pin", "1023"),
            ("weight-0", *run, "--weight", "0"),
            ("weight-10001", *run, "--weight", "10001"),
            ("cap-0", *run, "--cap", "0%"),
            ("cap-junk", *run, "--cap", "half"),
            ("no-pv", *run, "--no-pv", "clock,speed"),
            ("cpus-2-verify", *run, "--engine", "bt,verify", "--cpus", "2"),
            ("cpus-junk", *run, "--cpus", "two"),
            ("cpu-unknown", *run, "--cpu", "v9"),
            ("engine-unknown", *run, "--engine", "steam"),
            ("engine-two-checks", *run, "--engine", "bt,seed=1,verify"),
            ("engine-seed", *run, "--engine", "bt,seed=x"),
            ("engine-seed-alone", *run, "--engine", "interp,seed=1"),
            ("engine-verify", *run, "--engine", "interp,verify"),
            ("debug-exit-range", *run, "--debug-exit", "65536"),
            ("debug-exit-octal", *run, "--debug-exit", "0x"),
            ("debug-exit-taken", *run, "--debug-exit", "0x3f8"),
            ("debug-exit-taken-later", *run, "--debug-exit", "0x505"),
            ("name-empty", *run, "--name", ""),
            ("name-slash", *run, "--name", "a/b"),
            ("console-option", *run, "--console", "none,speed=high"),
            ("console-name", *run, "--console", "none,name=-"),
            ("control-kind", *run, "--control", "stdio"),
            ("control-elsewhere", *run, "--control", "socket=/nowhere/c"),
            ("slots-range", *run, "--control", "socket=/tmp/c", "--slots", "9"),
            ("slots-without-control", *run, "--slots", "1"),
            ("pmem-missing", *run, "--pmem", "missing.img"),
            ("pmem-size", *run, "--pmem", "/bin/sh,readonly"),
            ("pmem-option", *run, "--pmem", "/bin/sh,writable"),
            ("disk-missing", *run, "--disk", "missing.img"),
            ("disk-option", *run, "--disk", "disk.img,speed=high"),
            ("disk-format", *run, "--disk", "disk.img,format=vmdk"),
            ("disk-readonly", *run, "--disk", "disk.img,readonly=perhaps"),
            ("disk-serial", *run, "--disk", "disk.img,serial=" + "x" * 21),
            ("disk-empty", *run, "--disk", ",format=raw"),
            ("disk-no-qcow2", *run, "--disk", os.devnull + ",format=qcow2"),
            ("kernel-and-firmware", *run, "--firmware", "bios"),
            ("kernel-not-linux", "run", "--kernel", __file__, "--firmware", "uefi"),
            ("initrd-without-kernel", "run", "--firmware", "uefi", "--initrd", __file__),
            ("firmware-missing", "run", "--firmware", "missing.bin"),
            ("firmware-odd-size", "run", "--firmware", __file__),
            ("firmware-option", "run", "--firmware", "uefi,speed=high"),
            ("firmware-bios-vars", "run", "--firmware", "bios,vars=vars.fd"),
            ("firmware-vars-odd", "run", "--firmware", "uefi,vars=" + __file__),
            ("cdrom-missing", "run", "--firmware", "bios", "--cdrom", "missing.iso"),
            ("cdrom-option", "run", "--firmware", "bios", "--cdrom", __file__ + ",format=raw"),
            ("boot", "run", "--firmware", "bios", "--boot", "floppy"),
            ("boot-without-network", "run", "--firmware", "bios", "--boot", "network"),
            ("disk-bus", "run", "--firmware", "bios", "--disk", __file__ + ",bus=scsi"),
            ("uuid", "run", "--firmware", "bios", "--uuid", "0123"),
            ("product-empty", "run", "--firmware", "bios", "--product", ""),
            ("screenshot-name", "run", "--firmware", "bios", "--screenshot", "screen.jpg"),
            ("screenshot-without-screen", *run, "--screenshot", "screen.png"),
            ("vnc-without-screen", *run, "--vnc", ":5900"),
            ("vnc-no-port", "run", "--firmware", "bios", "--vnc", "localhost"),
            ("vnc-open-to-all", "run", "--firmware", "bios", "--vnc", "0.0.0.0:5900"),
            ("vnc-option", "run", "--firmware", "bios", "--vnc", ":5900,tls=on"),
            ("vnc-password-file", "run", "--firmware", "bios", "--vnc", ":5900,password-file=/nowhere/x"),
            ("vsock-empty", *run, "--vsock", "cid=3"),
            ("vsock-cid", *run, "--vsock", "cid=2,path=x"),
            ("vsock-path", *run, "--vsock", "cid=3,path=/nowhere/x"),
            ("net-kind", *run, "--net", "bridge"),
            ("net-option", *run, "--net", "user,speed=high"),
            ("net-forward", *run, "--net", "user,hostfwd=80"),
            ("net-tftp-missing", *run, "--net", "user,tftp=/nowhere/x"),
            ("net-tftp-file", *run, "--net", "user,tftp=" + __file__),
            ("net-bootfile", *run, "--net", "user,bootfile=" + 128 * "x"),
            ("net-mac", *run, "--net", "user,mac=red"),
            ("net-pcap", *run, "--net", "user,pcap=/nowhere/x"),
            ("net-socket", *run, "--net", "socket=/nowhere/x"),
            ("net-tap", *run, "--net", "tap=no-name-is-as-long-as-this"),
            ("share-missing", *run, "--share", "/nowhere:tag"),
            ("share-file", *run, "--share", __file__ + ":tag"),
            ("share-no-tag", *run, "--share", "/tmp"),
            ("share-empty-tag", *run, "--share", "/tmp:"),
            ("share-long-tag", *run, "--share", "/tmp:" + "x" * 37),
            ("share-option", *run, "--share", "/tmp:tag,speed=high"),
            ("disk-vhost-missing", *run, "--disk", "vhost-user=/nowhere"),
            ("disk-vhost-option", *run, "--disk", "vhost-user=/nowhere,serial=x"),
            ("net-vhost-missing", *run, "--net", "vhost-user=/nowhere"),
            ("net-vhost-option", *run, "--net", "vhost-user=/nowhere,pcap=x"),
            ("net-vhost-empty", *run, "--net", "vhost-user"),
            ("share-vhost-missing", *run, "--share", "vhost-user=/nowhere:tag"),
            ("share-vhost-option", *run, "--share", "vhost-user=/nowhere:tag,readonly"),
            ("serial-unwritable", *run, "--serial", "/nowhere/console"),
            ("serial-socket-empty", *run, "--serial", "socket="),
            ("stats-unwritable", *run, "--stats", "/nowhere/stats"),
    ):
        expect_refusal(cases, name, *args)


def files(cases, directory):
    """Kernels and initrds that are not what they should be."""
    def path(name, data):
        name = os.path.join(directory, name)
        with open(name, "wb") as file:
            file.write(data)
        return name

    kernel = guest.kernel()
    with open(kernel, "rb") as file:
        image = file.read()
    # Sparse: as large as it claims to be, and no bytes on the disk.
    huge = path("huge", b"")
    os.truncate(huge, 1 << 31)

    for name, data in (
            ("kernel-empty", b""),
            ("kernel-text", b"#!/bin/sh\necho no kernel\n" * 100),
            ("kernel-cut-in-header", image[:600]),
            ("kernel-cut-in-setup", image[:5000]),
            ("kernel-cut-in-payload", image[:len(image) // 2]),
            ("elf-header-only", elf(64, 1)[:64]),
            ("elf-wild-phoff", elf(0xfffffffffffff000, 1)),
            ("elf-wild-phnum", elf(64, 0xffff)),
            ("elf-odd-phentsize", elf(64, 1, 1)),
            ("elf-wild-offset", elf_segment(0xffffffffffffff00, 0x100000, 4096, 4096)),
            ("elf-wild-address", elf_segment(0, 0xfffffffffffff000, 4096, 1 << 40)),
            ("elf-wild-size", elf_segment(0, 0x100000, 1 << 62, 1 << 62)),
    ):
        expect_refusal(cases, name, "run", "--kernel", path(name, data))

    forbidden = path("forbidden", image)
    os.chmod(forbidden, 0)
    if os.geteuid():
        expect_refusal(cases, "kernel-forbidden", "run", "--kernel", forbidden)
    expect_refusal(cases, "kernel-missing", "run", "--kernel", os.path.join(directory, "none"))
    expect_refusal(cases, "kernel-directory", "run", "--kernel", directory)
    expect_refusal(cases, "kernel-device", "run", "--kernel", "/dev/zero")
    expect_refusal(cases, "initrd-missing", "run", "--kernel", kernel, "--initrd",
                   os.path.join(directory, "none"))
    expect_refusal(cases, "initrd-directory", "run", "--kernel", kernel, "--initrd", directory)
    expect_refusal(cases, "initrd-too-large", "run", "--kernel", kernel, "--initrd", huge)
    expect_refusal(cases, "memory-too-small", "run", "--kernel", kernel, "--memory", "1M")
    expect_refusal(cases, "append-too-long", "run", "--kernel", kernel, "--append", "x" * 100000)


def help_texts(cases):
    """--help and --version answer on stdout with status 0."""
    for name, *args in (("help", "--help"), ("run-help", "run", "--help"),
                        ("version", "--version")):
        done = subprocess.run([guest.DOPPEL, *args], capture_output=True, check=False)
        cases.check(name, done.returncode == 0 and b"doppel" in done.stdout and not done.stderr,
                    f"status {done.returncode}, stderr {done.stderr!r}")
    done = subprocess.run([guest.DOPPEL], capture_output=True, check=False)
    cases.check("no-command", done.returncode == 2 and b"usage" in done.stderr,
                f"status {done.returncode}")


def main():
    """All of them."""
    cases = guest.Cases()
    help_texts(cases)
    options(cases)
    with guest.temporary() as directory:
        files(cases, directory)
    cases.done()


main()
