#!/usr/bin/env python3
"""Writes the seeds of fuzz_loader: one small, valid image of every kind, after an option byte."""

import gzip
import lzma
import pathlib
import struct

OPTION_INITRD, OPTION_PAYLOAD = 1, 2
KERNEL = 0x1000000


def elf64(address, note=b""):
    text = b"\xf4" * 16
    header = struct.pack("<16sHHIQQQIHHHHHH", b"\x7fELF\2\1\1", 2, 62, 1, address, 64, 0, 0, 64,
                         56, 2, 0, 0, 0)
    load = struct.pack("<IIQQQQQQ", 1, 5, 176, address, address, 16, 8192, 4096)
    notes = struct.pack("<IIQQQQQQ", 4 if note else 0, 4, 192, 0, 0, len(note), len(note), 4)
    return header + load + notes + text + note


def elf32(address, header):
    start = struct.pack("<16sHHIIIIIHHHHHH", b"\x7fELF\1\1\1", 2, 3, 1, address, 52, 0, 0, 52, 32,
                        1, 0, 0, 0)
    load = struct.pack("<IIIIIIII", 1, 84, address, address, 64, 4096, 5, 4096)
    return start + load + header.ljust(64, b"\xf4")


def multiboot(flags, *addresses):
    magic = 0x1BADB002
    return struct.pack(f"<{3 + len(addresses)}I", magic, flags, -(magic + flags) & 0xFFFFFFFF,
                       *addresses)


def bzimage(payload):
    code = payload.ljust((len(payload) + 1023) // 512 * 512, b"\0")
    image = bytearray(1024) + code
    header = {
        0x1F1: ("B", 1),                    # setup_sects
        0x1F4: ("I", len(code) // 16),      # syssize
        0x1FE: ("H", 0xAA55),               # boot_flag
        0x200: ("H", 0x66EB),               # jump
        0x202: ("4s", b"HdrS"),
        0x206: ("H", 0x20F),                # version
        0x211: ("B", 1),                    # loadflags
        0x22C: ("I", 0x7FFFFFFF),           # initrd_addr_max
        0x236: ("H", 1),                    # xloadflags
        0x238: ("I", 2047),                 # cmdline_size
        0x24C: ("I", len(payload)),         # payload_length
        0x258: ("Q", KERNEL),               # pref_address
        0x260: ("I", 0x10000),              # init_size
    }
    for offset, (kind, value) in header.items():
        struct.pack_into("<" + kind, image, offset, value)
    return bytes(image)


def payloads(data):
    """The data in every format, stored rather than packed where that is easy to write."""
    size = struct.pack("<I", len(data))
    lz4 = bytes([0xF0, len(data) - 15]) + data
    return {
        "gzip": gzip.compress(data, mtime=0),
        "xz": lzma.compress(data, lzma.FORMAT_XZ, lzma.CHECK_CRC32) + size,
        "lzma": lzma.compress(data, lzma.FORMAT_ALONE) + size,
        "zstd": bytes.fromhex("28b52ffd20") + bytes([len(data)])
                + (len(data) << 3 | 1).to_bytes(3, "little") + data + size,
        "lz4": bytes.fromhex("02214c18") + struct.pack("<I", len(lz4)) + lz4 + size,
    }


def main():
    note = struct.pack("<III4sQ", 4, 8, 18, b"Xen", 0x200000)
    kludge = multiboot(1 << 16, 0x100000, 0x100000, 0, 0x102000, 0x100020)
    seeds = {
        "pvh": (OPTION_INITRD, elf64(0x200000, note)),
        "multiboot-elf": (OPTION_INITRD, elf32(0x100000, multiboot(3))),
        "multiboot-kludge": (0, kludge + b"\xf4" * 32),
        "bzimage-damaged": (0, bzimage(b"damaged")),
    }
    for name, payload in payloads(elf64(KERNEL)).items():
        seeds["bzimage-" + name] = (OPTION_INITRD, bzimage(payload))
        seeds["payload-" + name] = (OPTION_PAYLOAD, payload)

    folder = pathlib.Path(__file__).parent / "loader"
    folder.mkdir(exist_ok=True)
    for name, (option, data) in seeds.items():
        (folder / name).write_bytes(bytes([option]) + data)


main()
