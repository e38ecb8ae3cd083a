#!/usr/bin/python3
"""Boots Debian's kernel with several processors and runs smp.sh in it.

    smp.py PARALLEL ENGINE CPUS [SOCKETS CORES_A_SOCKET]

PARALLEL is the program of guests/parallel.
"""

import os
import re
import sys

import guest


def main():
    """One boot, many cases."""
    parallel, engine, cpus = sys.argv[1:4]
    option, sockets, cores = cpus, 1, int(cpus)
    if len(sys.argv) > 4:
        sockets, cores = map(int, sys.argv[4:])
        option = f"{cpus},sockets={sockets},cores={cores},threads={int(cpus) // (sockets * cores)}"
    cases = guest.Cases()
    with open(os.path.join(os.path.dirname(__file__), "smp.sh"), encoding="ascii") as file:
        script = f"CPUS={cpus}\nSOCKETS={sockets}\nCORES={sockets * cores}\n" + file.read()
    with guest.temporary() as directory:
        # A starved host must not look like a hang: its guest waits longer before it complains.
        append = "console=ttyS0 quiet rcupdate.rcu_cpu_stall_timeout=200 watchdog_thresh=60"
        vm = guest.Guest("--engine", engine, "--cpus", option, "--kernel", guest.kernel(),
                         "--initrd", guest.initramfs(directory, script, parallel),
                         "--append", append, "--memory", "512M")
        status = vm.finish()

    checks = [line for _, line in vm.lines if line.startswith("check: ")]
    for line in checks:
        name, verdict = line.removeprefix("check: ").split(" ", 1)
        cases.check(f"{cpus}-cpus-{name}", verdict == "ok", verdict)
    # A script that lost its way prints too few of them; two are in a loop of three rounds.
    expected = len(re.findall(r"(?m)^ *check ", script)) + 2 * 2
    cases.equal(f"{cpus}-cpus-all-checks-ran", len(checks), expected)
    cases.equal(f"{cpus}-cpus-power-off", status, 0)
    if cases.failed:
        vm.show()
    cases.done()


main()
