#!/usr/bin/python3
"""What bt tells of the code that it makes: --perf-map and --stats.

    translated.py GUEST.elf
"""

import json
import os
import re
import subprocess
import sys

import guest
import system

LINE = re.compile(r"([0-9a-f]+) ([0-9a-f]+) (\S+)")


def run(cases, label, image, directory, *options):
    """Runs the guest to its end; returns the map's lines as (start, size, name), and the statistics."""
    stats = os.path.join(directory, "stats")
    process = subprocess.Popen(
        [guest.DOPPEL, "run", "--engine", "bt", "--cpu", "max", "--kernel", image, "--debug-exit",
         hex(system.PORT), "--no-reboot", "--stats", stats, *options],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    cases.equal(f"{label}-status", process.wait(guest.PATIENCE), system.PASSED)
    path = f"/tmp/perf-{process.pid}.map"
    lines = []
    if os.path.exists(path):
        with open(path, encoding="ascii") as file:
            lines = file.read().splitlines()
        os.unlink(path)
    parsed = [LINE.fullmatch(line) for line in lines]
    cases.check(f"{label}-lines", all(parsed), f"{lines[:3]}")
    with open(stats, encoding="ascii") as file:
        told = json.load(file)
    return [(int(m[1], 16), int(m[2], 16), m[3]) for m in parsed if m], told


def disjoint(pieces):
    """Whether no piece of code reaches into the next one."""
    pieces = sorted(pieces)
    return all(at + size <= after for (at, size, _), (after, _, _) in zip(pieces, pieces[1:]))


def profile(cases, directory):
    """Linux under perf: its report names code of the guest's kernel and of its programs."""
    data, pid = os.path.join(directory, "perf.data"), os.path.join(directory, "pid")
    record = ["perf", "record", "-q", "-e", "cpu-clock", "-F", "999", "-o", data]
    try:
        probe = subprocess.run([*record, "true"], check=False, capture_output=True, timeout=60)
    except FileNotFoundError:
        print("ok perf-names-guest-code # skip: no perf here")
        return
    if probe.returncode:
        print("ok perf-names-guest-code # skip: perf may not record here")
        return
    work = "for n in 1 2 3 4; do seq 1 20000 | sha256sum; done\n"
    command = [guest.DOPPEL, "run", "--engine", "bt", "--perf-map", "--kernel", guest.kernel(), "--initrd",
               guest.initramfs(directory, work), "--append", "console=ttyS0 quiet"]
    done = subprocess.run([*record, "sh", "-c", f"echo $$ >{pid}; exec \"$@\"", "sh", *command], check=False,
                          stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, timeout=guest.PATIENCE)
    cases.equal("perf-status", done.returncode, 0)
    report = subprocess.run(["perf", "report", "-i", data, "--stdio", "--sort", "symbol"], check=False, text=True,
                            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    with open(pid, encoding="ascii") as file:
        os.unlink(f"/tmp/perf-{file.read().strip()}.map")
    for side in ("kernel", "user"):
        found = set(re.findall(rf"guest_{side}_[0-9a-f]+", report.stdout))
        cases.check(f"perf-names-{side}-code", len(found) >= 5, f"{sorted(found)} of {len(report.stdout)} bytes")


def main():
    """A guest without a map, with one, with symbols, and one under perf."""
    image = sys.argv[1]
    cases = guest.Cases()
    with guest.temporary() as directory:
        pieces, told = run(cases, "no-map", image, directory)
        cases.equal("no-map-no-lines", len(pieces), 0)
        cases.check("stats-blocks-translated", told["blocks_translated"] > 20,
                    told["blocks_translated"])
        cases.check("stats-blocks-decoded", told["blocks_decoded"] > 20, told["blocks_decoded"])
        # A host instruction or more for each.
        cases.check("stats-cache-bytes", told["cache_bytes"] > 64 * told["blocks_translated"],
                    told["cache_bytes"])
        for name in ("tlb_misses", "tlb_flushes", "smc_invalidations"):
            cases.check(f"stats-{name}", told[name] > 0, told[name])
        # One OUT a character at least, of a page of text.
        cases.check("stats-port-exits", told["exits"]["port"] > 500, told["exits"]["port"])
        cases.check("stats-exceptions", told["exits"]["exception"] > 0, told["exits"]["exception"])
        cases.equal("stats-instructions-unknown", told["instructions"], 0)

        pieces, told = run(cases, "map", image, directory, "--perf-map")
        # Each block has a hot part, and most a cold one.
        cases.check("map-has-each-block",
                    told["blocks_translated"] <= len(pieces) <= 2 * told["blocks_translated"],
                    f"{len(pieces)} lines, {told['blocks_translated']} blocks")
        cases.check("map-disjoint", disjoint(pieces), "pieces of code overlap")
        names = [re.fullmatch(r"guest_kernel_([0-9a-f]+)", name) for _, _, name in pieces]
        cases.check("map-names", all(names), f"{[p[2] for p in pieces][:3]}")
        cases.check("map-addresses", all(0x100000 <= int(m[1], 16) < 1 << 32 for m in names if m),
                    f"{[p[2] for p in pieces][:3]}")

        symbols = os.path.join(directory, "System.map")
        with open(symbols, "wb") as file:
            file.write(subprocess.run(["nm", image], check=True, stdout=subprocess.PIPE).stdout)
        pieces, _ = run(cases, "symbols", image, directory, f"--perf-map={symbols}")
        names = {name for _, _, name in pieces}
        cases.check("symbols-are-there", {"print", "runs"} <= names, sorted(names))

        for name, *options in (("other-engine", "--engine", "interp", "--perf-map"),
                               ("no-such-file", "--engine", "bt", "--perf-map=/nowhere/map"),
                               ("not-a-map", "--engine", "bt", "--perf-map=/bin/sh"),
                               ("empty-name", "--engine", "bt", "--perf-map=")):
            done = subprocess.run([guest.DOPPEL, "run", "--kernel", image, *options], check=False,
                                  stdin=subprocess.DEVNULL, capture_output=True, timeout=60)
            cases.check(f"refused-{name}",
                        done.returncode == 2 and len(done.stderr.splitlines()) == 1,
                        f"status {done.returncode}, {done.stderr!r}")
        profile(cases, directory)
    cases.done()


main()
