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
DIRECT = "bt,seed=31"
# Engines, and numbers of processors.
RUNS = [*((engine, 1) for engine in [*system.ENGINES, DIRECT]), ("bt", 3), (DIRECT, 2)]
RESULT = re.compile(r"result (\S+) (\S+) \S+ ([0-9a-f]{16})")
# The class of what several processors do.
CORNERS = "corners"


def main():
    """A native run, and those of RUNS."""
    program = os.path.abspath(sys.argv[1])
    cases = guest.Cases()
    try:
        native = RESULT.findall(subprocess.run([program, "--seconds", "0"], check=True, text=True,
                                               stdout=subprocess.PIPE).stdout)
    except OSError as error:
        if error.errno != errno.ENOEXEC:
            raise
        print("ok native-results # skip: this kernel has no 32-bit programs")
        return
    cases.check("native-results", len(native) >= 20, f"only {native}")
    with guest.temporary() as directory:
        script = f"[ $(nproc) = 1 ] || only={CORNERS}\n{os.path.basename(program)} --seconds 0 $only 2>&1\n"
        initramfs = guest.initramfs(directory, script, program)
        for engine, cpus in RUNS:
            wanted = [result for result in native if cpus == 1 or result[1] == CORNERS]
            stats = os.path.join(directory, "stats")
            label = engine if cpus == 1 else f"{engine}-{cpus}-cpus"
            vm = guest.Guest("--engine", engine, "--cpus", str(cpus), "--kernel", guest.kernel(),
                             "--initrd", initramfs, "--append", "console=ttyS0 quiet", "--stats", stats)
            status = vm.finish()
            failed = cases.failed
            results = RESULT.findall("\n".join(line for _, line in vm.lines))
            for name, _, checksum in wanted:
                cases.equal(f"{label}-{name}", [got for same, _, got in results if same == name],
                            [checksum])
            cases.equal(f"{label}-power-off", status, 0)
            if engine == DIRECT and not program.endswith("32"):
                with open(stats, encoding="ascii") as file:
                    cases.check(f"{label}-direct-mappings", json.load(file)["direct_mappings"] > 100,
                                "no user pages were mapped at their own addresses")
            if cases.failed > failed:
                vm.show()
    cases.done()


main()
