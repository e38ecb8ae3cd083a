#!/usr/bin/python3
"""A parallel build in the guest: make -j of a small C project by Debian's gcc, on two processors.

    smp_build.py [--engine ENGINE] [--files N]

One processor builds the same, file after file: both must have made the same object. Skipped where Debian's packages
can't be fetched.
"""

import argparse
import os
import re
import sys

import guest

sys.path.insert(0, os.path.join(guest.ROOT, "bench", "lib"))

import bench  # noqa: E402 pylint: disable=wrong-import-position
import cproject  # noqa: E402 pylint: disable=wrong-import-position

SCRIPT = """\
chroot /debian /bin/sh /work/build
echo "made $? $(sha256sum </debian/work/all.o)"
dmesg | grep -E 'WARNING:|BUG|Call Trace|Oops|detected stall|self-detected|soft lockup|segfault|traps:'
exit 0
"""
PATIENCE = 900 # seconds: on a busy machine, too


def make(cases, engine, cpus, workers, files):
    """Builds in a guest with so many processors, by so many jobs; returns the checksum of what it made."""
    with guest.temporary() as directory:
        initramfs = guest.initramfs(directory, SCRIPT)
        bench.append_tree(initramfs, cproject.make_tree(directory, workers, files))
        # A starved host must not look like a hang.
        vm = guest.Guest("--engine", engine, "--cpus", str(cpus), "--memory", "1G", "--kernel", guest.kernel(),
                         "--initrd", initramfs, "--append",
                         "console=ttyS0 quiet rcupdate.rcu_cpu_stall_timeout=200 watchdog_thresh=60")
        status = vm.finish(PATIENCE)
    said = [line for _, line in vm.lines if line and not line.startswith("doppel-guest:") and "Power down" not in line]
    found = re.fullmatch(r"made 0 ([0-9a-f]{64})  -", said[0]) if len(said) == 1 else None
    if not cases.check(f"build-{cpus}-cpus-{workers}-jobs", status == 0 and found,
                       f"status {status}, printed {said}"):
        vm.show()
    return found and found[1]


def main():
    """Both builds."""
    parser = argparse.ArgumentParser(description="A parallel build in a guest.")
    parser.add_argument("--engine", default="bt")
    parser.add_argument("--files", type=int, default=6, help="of the project (6)")
    args = parser.parse_args()
    cases = guest.Cases()
    try:
        parallel = make(cases, args.engine, 2, 4, args.files)
    except bench.BenchError as error:
        print(f"ok parallel-build # skip {error}")
        return
    cases.equal("parallel-build-made-the-same", parallel, make(cases, args.engine, 1, 1, args.files))
    cases.done()


main()
