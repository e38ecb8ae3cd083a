#!/usr/bin/python3
"""Tests the KVM engine one level down, on hosts with or without hardware virtualisation.

    nested.py [--all] [GUEST.elf]... [--program TEST]...

QEMU's TCG emulates AMD's SVM. So Debian's generic kernel is booted under it, with Debian's own KVM
modules, and what is to be tested runs in there: see inside.sh. The short form takes a minute or two;
--all runs every boot and every guest.

Where QEMU or the kernel package can't be had, the one case is skipped.
"""

import argparse
import glob
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(os.path.dirname(HERE), "guest"))

import guest  # noqa: E402 pylint: disable=wrong-import-position

QEMU = "qemu-system-x86_64"
MODULES = ("irqbypass", "kvm", "ccp", "kvm-amd")
PATIENCE = 1500
DEBUG_EXIT = "isa-debug-exit,iobase=0xf4"

# Where KVM's emulator (Linux 6.1) isn't as the manuals say, by guest and check.
_IO_BREAKPOINTS = dict.fromkeys(("io-ip", "io-dr6", "io-in", "io-other-port", "io-overlap",
                                 "access-by-locked"), "no breakpoint at what KVM emulates")
KVM_DEVIATIONS = {
    "breakpoints32": _IO_BREAKPOINTS,
    "breakpoints64": _IO_BREAKPOINTS,
    "interrupts64": {"x2-x2apic-eoi-nonzero": "any value is taken"},
    "syscalls64": {"amd-sysexit-ud-in-long-mode": "SYSEXIT is emulated, as on Intel's processors",
                   "unexpected-exception": "that SYSEXIT arrives in ring 3"},
}

# TCG lets LTR take a null selector, as these check; what enters ring 0 next then ends QEMU.
END_QEMU = ("exceptions32", "exceptions64")
APPLETS = ("sh mount insmod timeout sed grep tail wc basename sleep mv ln rm cat dmesg poweroff "
           "true false ls").split()

# What the innermost guest does: computes, and runs processes side by side.
SCRIPT = """
cpus=$(nproc)
clock=$(cat /sys/devices/system/clocksource/clocksource0/current_clocksource)
sum=$(seq 2000 | sha256sum | cut -c1-64)
[ "$sum" = SUM ] && sum=ok
for i in 1 2 3 4; do (seq 300 | sort -r | head -n 1 >/tmp/p.$i) & done
wait
procs=bad
[ "$(cat /tmp/p.1 /tmp/p.2 /tmp/p.3 /tmp/p.4 | tr -d '\\n')" = 99999999 ] && procs=ok
echo "guest: cpus=$cpus clock=$clock sum=$sum procs=$procs"
"""


def skip(why):
    """There is nothing to test with."""
    print(f"ok nested-kvm # skip {why}")
    sys.exit(0)


def host_kernel():
    """Debian's generic kernel and its KVM modules, in a folder of the cache; None: not to be had."""
    cache = os.environ.get("XDG_CACHE_HOME")
    cache = os.path.join(cache, "doppel") if cache else os.path.join(guest.ROOT, ".cache")
    folder = os.path.join(cache, "kvm-host")
    if not os.path.exists(os.path.join(folder, "kvm.ko")):
        wanted = " ".join(["./boot/vmlinuz-*", *(f"*/{name}.ko*" for name in MODULES)])
        done = subprocess.run([os.path.join(guest.ROOT, "scripts", "fetch-package"),
                               "linux-image-amd64", wanted, folder], check=False)
        if done.returncode:
            return None
        for packed in glob.glob(os.path.join(folder, "*.ko.xz")):
            subprocess.run(["unxz", packed], check=True)
    return folder


def libraries(program):
    """The shared libraries of a program, and its loader, as ldd tells."""
    out = subprocess.run(["ldd", program], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                         text=True, check=False).stdout
    return set(re.findall(r"(/\S+)", out))


def copy(source, tree, path):
    """Copies a file to `path` in the tree."""
    target = os.path.join(tree, path.lstrip("/"))
    os.makedirs(os.path.dirname(target), exist_ok=True)
    shutil.copyfile(source, target)
    shutil.copymode(source, target)


def build_tree(tree, folder, guests, programs, plan):
    """What the machine under QEMU finds as its file system."""
    for directory in ("bin", "dev", "proc", "sys", "tmp"):
        os.makedirs(os.path.join(tree, directory))
    busybox = subprocess.run([os.path.join(guest.ROOT, "scripts", "fetch-busybox")], check=True,
                             stdout=subprocess.PIPE, text=True).stdout.strip()
    copy(busybox, tree, "bin/busybox")
    for applet in APPLETS:
        os.symlink("busybox", os.path.join(tree, "bin", applet))
    for name in MODULES:
        copy(os.path.join(folder, name + ".ko"), tree, f"modules/{name}.ko")
    copy(guest.DOPPEL, tree, "doppel")
    needed = libraries(guest.DOPPEL)
    for program in programs:
        copy(program, tree, os.path.basename(program))
        needed |= libraries(program)
    for library in needed:
        copy(library, tree, library)
    for image in guests:
        copy(image, tree, os.path.basename(image))
    copy(guest.kernel("cloud-amd64"), tree, "vmlinuz")
    copy(os.path.join(HERE, "inside.sh"), tree, "init")
    total = subprocess.run("seq 2000 | sha256sum | cut -c1-64", shell=True, check=True,
                           stdout=subprocess.PIPE, text=True).stdout.strip()
    with tempfile.TemporaryDirectory() as directory:
        shutil.move(guest.initramfs(directory, SCRIPT.replace("SUM", total)),
                    os.path.join(tree, "guest.cpio"))
    with open(os.path.join(tree, "plan"), "w", encoding="ascii") as file:
        file.write("".join(line + "\n" for line in plan))


def failures_of_tcg(image):
    """The checks of a guest that fail on TCG alone, or None when it doesn't end there.

    KVM on TCG's processor can do no better than that processor.
    """
    command = [QEMU, "-accel", "tcg", "-cpu", "max", "-nodefaults", "-display", "none", "-serial",
               "stdio", "-no-reboot", "-device", DEBUG_EXIT, "-kernel", image]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.DEVNULL, timeout=20, check=False)
    except subprocess.TimeoutExpired:
        return None
    if done.returncode < 0:
        return None
    return set(re.findall(r"(?m)^not ok ([^:\r\n]+)", done.stdout.decode(errors="replace")))


def make_plan(everything, guests, programs):
    """The lines for inside.sh."""
    plan = ["refuse", "auto", "boot 2"]
    if everything:
        plan += ["boot 1", "boot 4"]
    for program in programs:
        extra = " --long" if everything else ""
        plan.append(f"program /{os.path.basename(program)} /vmlinuz /guest.cpio{extra}")
    # Last, for they try the processor below hardest.
    return plan + [f"guest /{os.path.basename(image)}" for image in guests]


def run(kernel, archive, known):
    """Boots the machine; returns whether a case failed, and whether it came to its end.

    Cases are passed on as they come; `known` are those that are TCG's own, by guest.
    """
    command = [QEMU, "-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2", "-m", "1G",
               "-nodefaults", "-display", "none", "-serial", "stdio", "-no-reboot",
               "-kernel", kernel, "-initrd", archive, "-append",
               "console=ttyS0 quiet panic=-1 tsc=reliable mitigations=off"]
    failed, done = False, False
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as process:
        timer = threading.Timer(PATIENCE, process.kill)
        timer.start()
        for raw in process.stdout:
            line = raw.decode(errors="replace").strip()
            case = re.match(r"not ok (\S+): ([^:]+)", line)
            status = re.match(r"not ok (\S+)-status: status", line)
            why = None
            if status and (known.get(status[1]) or status[1] in KVM_DEVIATIONS):
                print(f"ok {status[1]}-status # skip a check of its fails", flush=True)
                continue
            if case and case[2] in known.get(case[1], ()):
                why = "it fails on TCG alone"
            elif case:
                why = KVM_DEVIATIONS.get(case[1], {}).get(case[2])
            if why:
                print(f"ok {case[1]}: {case[2]} # skip {why}", flush=True)
            elif re.match(r"(not )?ok ", line):
                failed |= line.startswith("not ok")
                print(line, flush=True)
            elif line.startswith("inside: done"):
                done = True
            elif line:
                print(f"    | {line}", flush=True)
        timer.cancel()
    return failed, done


def main():
    """Parses the arguments, builds, boots."""
    parser = argparse.ArgumentParser(description="The KVM engine, one level down.")
    parser.add_argument("--all", action="store_true", help="every boot and every guest")
    parser.add_argument("--program", action="append", default=[], help="a test program")
    parser.add_argument("guests", nargs="*", help="guests of our own")
    args = parser.parse_args()

    for tool in (QEMU, "cpio", "ldd"):
        if not shutil.which(tool):
            skip(f"{tool} is not installed")
    folder = host_kernel()
    if not folder:
        skip("Debian's kernel package can't be fetched")

    known, guests = {}, []
    for image in args.guests:
        name = os.path.basename(image).removesuffix(".elf")
        known[name] = None if name in END_QEMU else failures_of_tcg(image)
        if known[name] is None:
            print(f"ok {name} # skip QEMU can't run it", flush=True)
        else:
            guests.append(image)
    with guest.temporary() as directory:
        tree, archive = os.path.join(directory, "tree"), os.path.join(directory, "archive")
        build_tree(tree, folder, guests, args.program,
                   make_plan(args.all, guests, args.program))
        with open(archive, "wb") as out:
            names = subprocess.run(["find", "."], cwd=tree, check=True, stdout=subprocess.PIPE)
            subprocess.run(["cpio", "--quiet", "-o", "-H", "newc"], cwd=tree, check=True,
                           input=names.stdout, stdout=out)
        failed, done = run(glob.glob(os.path.join(folder, "vmlinuz-*"))[0], archive, known)
    if not done:
        print("not ok nested-kvm: the machine under QEMU didn't come to its end")
    sys.exit(1 if failed or not done else 0)


main()
