#!/usr/bin/python3
"""Boots Debian's kernel with several processors again and again, and looks for what goes wrong once in a while.

    smp_boots.py PARALLEL [--boots N] [--engine ENGINE] [--cpus N,...]

PARALLEL is the program of guests/parallel. Each boot does a little of everything for which processors wake each
other, and its kernel may complain as early as it does by default: no stall warning, no clock that is unstable, no
wake-up that was lost (a guest that hasn't ended after a while). Prints a case a boot.
"""

import argparse

import guest

SCRIPT = """\
for work in "compute 16 32" "futex 8 2000" "trips 2 200" "fork 8 80" "exec 8 40" "signal 4 100" "timers 16 100"; do
    parallel $work | cut -d ' ' -f 2,4
done
seq 1 5000 | sort -rn | sort -n | tail -n 1
dmesg | grep -E 'WARNING:|BUG|Call Trace|Oops|stall|soft lockup|hard LOCKUP|[Uu]nstable|hung|do_boot_cpu failed'
echo "online $(cat /sys/devices/system/cpu/online)"
exit 0
"""
WANTED = ["compute 290823452", "futex 1", "trips 20100", "fork 3160", "exec 40", "signal 1", "timers 100",
          "5000"]
PATIENCE = 240  # seconds that no boot takes that goes on at all


def main():
    """Boots as often as was said."""
    parser = argparse.ArgumentParser(description="Boots a guest with several processors, often.")
    parser.add_argument("parallel", help="the program of guests/parallel")
    parser.add_argument("--boots", type=int, default=50, help="for each number of processors (50)")
    parser.add_argument("--engine", default="bt")
    parser.add_argument("--cpus", default="2,8", help="numbers of processors (2,8)")
    args = parser.parse_args()
    cases = guest.Cases()
    with guest.temporary() as directory:
        initramfs = guest.initramfs(directory, SCRIPT, args.parallel)
        for number in range(args.boots):
            for cpus in args.cpus.split(","):
                vm = guest.Guest("--engine", args.engine, "--cpus", cpus, "--memory", "256M",
                                 "--kernel", guest.kernel(), "--initrd", initramfs,
                                 "--append", "console=ttyS0 quiet")
                status = vm.finish(PATIENCE)
                got = [line for _, line in vm.lines
                       if line and not line.startswith("doppel-guest:") and "Power down" not in line]
                wanted = [*WANTED, f"online 0-{int(cpus) - 1}"]
                if not cases.check(f"{cpus}-cpus-boot-{number + 1}", status == 0 and got == wanted,
                                   f"status {status}, printed {got}"):
                    vm.show()
    cases.done()


main()
