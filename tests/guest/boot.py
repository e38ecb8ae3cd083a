#!/usr/bin/python3
"""Boots one of Debian's kernels, runs checks.sh in it, and compares its clock with the host's.

    boot.py cloud-amd64|amd64 ENGINE
"""

import os
import re
import sys
import time

import guest


def main():
    """One boot, many cases."""
    flavour, engine = sys.argv[1:3]
    cases = guest.Cases()
    with open(os.path.join(os.path.dirname(__file__), "checks.sh"), encoding="ascii") as file:
        script = file.read()
    with guest.temporary() as directory:
        vm = guest.Guest("--engine", engine, "--kernel", guest.kernel(flavour),
                         "--initrd", guest.initramfs(directory, script),
                         "--append", "console=ttyS0 quiet", "--memory", "512M")
        status = vm.finish()

    checks = [line for _, line in vm.lines if line.startswith("check: ")]
    for line in checks:
        name, verdict = line.removeprefix("check: ").split(" ", 1)
        cases.check(f"{flavour}-{name}", verdict == "ok", verdict)
    # A script that lost its way prints too few of them.
    cases.equal(f"{flavour}-all-checks-ran", len(checks), len(re.findall(r"(?m)^check ", script)))

    clocks = [(at, *map(float, line.split()[1:])) for at, line in vm.lines
              if line.startswith("clock: ")]
    if cases.equal(f"{flavour}-clock-lines", len(clocks), 2):
        (host1, up1, _), (host2, up2, wall2) = clocks
        passed, real = up2 - up1, host2 - host1
        cases.check(f"{flavour}-clock-speed", abs(passed - real) < 0.5 and passed >= 5,
                    f"{passed:.2f} s in the guest, {real:.2f} s here")
        off = wall2 - (time.time() - (time.monotonic() - host2))
        # Until Linux takes the TSC it counts ticks, and a busy host loses it some, on any PC.
        cases.check(f"{flavour}-clock-date", abs(off) < 10, f"the guest is {off:.1f} s ahead")

    ended = any(line.startswith("doppel-guest: script ended with status 0")
                for _, line in vm.lines)
    cases.check(f"{flavour}-script-ended", ended, "no such line")
    cases.equal(f"{flavour}-power-off", status, 0)
    if cases.failed:
        vm.show()
    cases.done()


main()
