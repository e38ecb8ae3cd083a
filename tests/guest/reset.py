#!/usr/bin/python3
"""The ways in which a guest's life ends or starts anew, and the exit statuses that go with them.

    reset.py ENGINE
"""

import json
import os
import signal
import sys

import guest


def run(directory, script, append, *options):
    """Boots the cloud kernel with a script; returns the Guest."""
    return guest.Guest("--engine", sys.argv[1], "--kernel", guest.kernel(), "--initrd", guest.initramfs(directory, script),
                       "--append", f"console=ttyS0 quiet {append}", *options)


def main():
    """A boot a case."""
    cases = guest.Cases()
    with guest.temporary() as directory:
        vm = run(directory, "reboot -f\n", "", "--no-reboot")
        if not cases.equal("no-reboot-status", vm.finish(), 3):
            vm.show()

        stats = os.path.join(directory, "stats")
        vm = run(directory, "reboot -f\n", "reboot=t", "--stats", stats)
        if not cases.equal("triple-fault-status", vm.finish(), 3):
            vm.show()
        with open(stats, encoding="ascii") as file:
            told = json.load(file)
        cases.equal("stats-status", told.get("status"), 3)
        cases.check("stats-exits", told.get("exits", {}).get("port", 0) > 0, "no port exits")
        first = told.get("first_instruction_seconds")
        cases.check("stats-first-instruction", first is not None and first < told["wall_seconds"],
                    f"{first!r}")

        # Twice up, so a reset boots again; then the user has seen enough.
        vm = run(directory, "reboot -f\n", "")
        up = [vm.read_until("doppel-guest: up"), vm.read_until("doppel-guest: up")]
        cases.check("reboot-boots-again", all(up), "it came up once at most")
        vm.process.send_signal(signal.SIGTERM)
        if not cases.equal("sigterm-status", vm.finish(20), 0):
            vm.show()
    cases.done()


main()
