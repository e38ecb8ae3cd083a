#!/usr/bin/python3
"""--weight, --cap and --pin: the kernel of a guest, in which doppel runs, shows what became of them.

There cgroup v2 has the processors, whatever the host makes of it. The inner machine halts at once and is
ended by a signal.
"""

import os
import subprocess

import guest

# A multiboot kernel that stops for good (Multiboot Specification 0.6.96, 3.1).
HALT = """\
.text
.globl _start
.long 0x1badb002, 0, -0x1badb002
_start:
    cli
    hlt
"""
SCRIPT = """\
doppel() {
    exec ld-linux-x86-64.so.2 --library-path /bin /bin/doppel run --engine interp --memory 16M \\
        --serial none --kernel /bin/halt "$@" 2>&1
}
group=
look() { # NAME PARENT: at the group of the doppel that was just started, then ends it
    group=$2/doppel-$!
    for n in $(seq 200); do
        grep -q $! "$group/cgroup.procs" 2>/dev/null && break
        sleep 0.1
    done
    echo "$1: weight $(cat $group/cpu.weight), max $(cat $group/cpu.max)"
    for n in $(seq 200); do
        grep -qs cpu-1 /proc/$!/task/*/comm && break
        sleep 0.1
    done
    grep -h Cpus_allowed_list $(grep -l cpu- /proc/$!/task/*/comm | sed 's/comm/status/')
    kill $!
    wait $!
    echo "$1: status $?, left $(ls -d $2/doppel-* 2>/dev/null)"
}
(doppel --weight 50)
echo "nowhere: status $?"
mkdir /cg
mount -t cgroup2 none /cg
doppel --cpus 3 --weight 50 --cap 150% --pin 1,0 &
look below /cg
mkdir /cg/inner
echo 0 >/cg/inner/cgroup.procs
doppel --cpus 2 --cap 25 &
look beside /cg
exit 0
"""
WANTED = [
    "below: weight 50, max 150000 100000",
    "Cpus_allowed_list:\t1", "Cpus_allowed_list:\t0", "Cpus_allowed_list:\t1",
    "below: status 0, left ",
    "beside: weight 100, max 25000 100000",
    "Cpus_allowed_list:\t0-1", "Cpus_allowed_list:\t0-1",
    "beside: status 0, left ",
]


def main():
    """One boot, some cases."""
    cases = guest.Cases()
    with guest.temporary() as directory:
        source, obj, halt = (os.path.join(directory, name) for name in ("halt.S", "halt.o", "halt"))
        with open(source, "w", encoding="ascii") as file:
            file.write(HALT)
        subprocess.run(["as", "--32", source, "-o", obj], check=True)
        subprocess.run(["ld", "-m", "elf_i386", "-Ttext", "0x200000", obj, "-o", halt], check=True)
        files = [guest.DOPPEL, *guest.libraries(guest.DOPPEL), halt]
        vm = guest.Guest("--engine", "bt", "--cpus", "2", "--memory", "512M",
                         "--kernel", guest.kernel(),
                         "--initrd", guest.initramfs(directory, SCRIPT, *files),
                         "--append", "console=ttyS0 quiet")
        status = vm.finish()
    lines = [line for _, line in vm.lines]
    refusal = [line for line in lines if "--weight" in line]
    cases.check("no-cgroup-is-told", len(refusal) == 1 and "isn't mounted" in refusal[0], refusal)
    cases.check("no-cgroup-is-a-failure", "nowhere: status 1" in lines)
    got = [line for line in lines if line.startswith(("below", "beside", "Cpus"))]
    for number, (line, wanted) in enumerate(zip(got, WANTED)):
        cases.equal(f"{number}-{wanted.split(':')[0]}", line, wanted)
    cases.equal("all-was-printed", len(got), len(WANTED))
    cases.equal("status", status, 0)
    if cases.failed:
        vm.show()
    cases.done()


main()
