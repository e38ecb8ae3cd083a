#!/usr/bin/python3
"""The Linux program of the benchmarks computes the same in a guest as on the processor itself.

    results.py PROGRAM

PROGRAM is guests/linux, built. Each of its benchmarks runs once, and its checksum is compared. A case
for each: integer and vector code of a compiler and the C library, and what the guest's kernel does
for processes, memory and signals.
"""

import errno
import json
import os
import re
import subprocess
import sys

import guest
import system

# Under an odd seed, user code is mapped at its own addresses from the start.
DIRECT = "bt,seed=9"
RESULT = re.compile(r"result (\S+) \S+ \S+ ([0-9a-f]{16})")


def main():
    """A native run, and one an engine."""
    program = os.path.abspath(sys.argv[1])
    cases = guest.Cases()
    try:
        native = dict(RESULT.findall(subprocess.run([program, "--seconds", "0"], check=True,
                                                    text=True, stdout=subprocess.PIPE).stdout))
    except OSError as error:
        if error.errno != errno.ENOEXEC:
            raise
        print("ok native-results # skip: this kernel has no 32-bit programs")
        return
    cases.check("native-results", len(native) >= 20, f"only {sorted(native)}")
    with guest.temporary() as directory:
        script = f"{os.path.basename(program)} --seconds 0 2>&1\n"
        initramfs = guest.initramfs(directory, script, program)
        for engine in [*system.ENGINES, DIRECT]:
            stats = os.path.join(directory, "stats")
            vm = guest.Guest("--engine", engine, "--kernel", guest.kernel(), "--initrd", initramfs,
                             "--append", "console=ttyS0 quiet", "--stats", stats)
            status = vm.finish()
            failed = cases.failed
            results = dict(RESULT.findall("\n".join(line for _, line in vm.lines)))
            for name, checksum in native.items():
                cases.equal(f"{engine}-{name}", results.get(name), checksum)
            cases.equal(f"{engine}-power-off", status, 0)
            if engine == DIRECT and not program.endswith("32"):
                with open(stats, encoding="ascii") as file:
                    cases.check("direct-mappings", json.load(file)["direct_mappings"] > 100,
                                "no user pages were mapped at their own addresses")
            if cases.failed > failed:
                vm.show()
    cases.done()


main()
