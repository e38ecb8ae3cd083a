#!/usr/bin/python3
"""Tests the KVM engine one level down, on hosts with or without hardware virtualisation.

    nested.py [--all] [--only WORD] [GUEST.elf]... [--program TEST]...

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
PATIENCE = 420  # seconds without a word from the outer machine: it tells of what it gives up sooner
TCG_PATIENCE = 60 # for one of our own guests on TCG alone
GUESTS_A_BOOT = 6
# Said by the outer machine's kernel; what the inner ones say begins elsewhere in its line.
LOCKUP = re.compile(r"\[ *\d+\.\d+\] watchdog: BUG: soft lockup")
DEBUG_EXIT = "isa-debug-exit,iobase=0xf4"

# Where KVM (Linux 6.1) isn't as the manuals say, or TCG is otherwise below KVM than on its own; by
# guest and check.
_IO_BREAKPOINTS = dict.fromkeys(("io-ip", "io-dr6", "io-in", "io-other-port", "io-overlap",
                                 "access-by-locked"), "no breakpoint at what KVM emulates")
_XSETBV = "QEMU 7.2 doesn't intercept XSETBV, so KVM doesn't know the guest's XCR0"
_FPU = dict(
    dict.fromkeys(("xsave-xstate-bv", "xsave-xmm1", "cpuid-size-with-avx", "avx-enabled",
                   "unexpected-exception"), _XSETBV),
    **{"fnstenv16-ip": "the pointer is lost when KVM switches the FPU's state"})
_RF = "TCG does not set RF"
KVM_DEVIATIONS = {
    "fpu32": _FPU,
    "fpu64": _FPU,
    "strings32": {"interrupted-registers": _RF},
    "strings64": {"interrupted-registers": _RF},
    "breakpoints32": _IO_BREAKPOINTS,
    "breakpoints64": _IO_BREAKPOINTS,
    "interrupts64": {"x2-x2apic-eoi-nonzero": "any value is taken"},
    "smp64": {"hypercall-ipi-mode": "KVM sends what has a reserved delivery mode"},
    "syscalls64": {"amd-sysexit-ud-in-long-mode": "SYSEXIT is emulated, as on Intel's processors",
                   "unexpected-exception": "that SYSEXIT arrives in ring 3"},
}

# What a software engine under TCG is too slow for, by guest.
SLOW = {"interrupts64": ("rtc-status-c",)}

# TCG lets LTR take a null selector, as these check; what enters ring 0 next then ends QEMU.
END_QEMU = ("exceptions32", "exceptions64")

# The oracle (tests/cpu) needs a processor below that does what it should in ring 3. Of QEMU 7.2's, these features are
# off: VROUNDSD of 256 bits ends QEMU (avx), ADCX and ADOX leave other bits in RFLAGS (adx), XGETBV shows components that
# doppel's models lack (mpx), and addresses are canonical by 57 bits where doppel's guests have 48 (la57). And these
# instructions are left out: far transfers access the stack as ring 0 does, which ends the kernel; with REX, MMX registers
# beyond the eighth are read; when the FPU's state is switched, its pointers are lost; a base that isn't canonical is taken.
ORACLE_CPU = "max,avx=off,adx=off,mpx=off,la57=off"
ORACLE_WITHOUT = "far,mmx,fnsave,fnstenv,wrfsbase,wrgsbase"
ORACLE = f"oracle --without {ORACLE_WITHOUT}"
APPLETS = ("sh mount insmod timeout sed grep head tail wc basename sleep mv ln rm cat dmesg poweroff "
           "true false ls mkdir truncate ip httpd pidof md5sum tee awk time").split()
LOADED = ("libslirp.so.0",) # src/host/library.h
QEMU_ROMS = ("bios-microvm.bin", "linuxboot_dma.bin", "pvh.bin")

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
echo "guest: cpus=$cpus clock=$clock sum=$sum procs=$procs svm=$(grep -c '^flags.* svm ' /proc/cpuinfo)"
"""

NETWORK = ["failover", "net_failover", "virtio_net"]
DISK = ["virtio_ring", "virtio", "virtio_pci_modern_dev", "virtio_pci_legacy_dev", "virtio_pci",
        "virtio_blk"]

# What it does with disks and a network. Each small write is a request or two of its own.
DEVICES = "".join(f"insmod /lib/{name}.ko\n" for name in DISK + NETWORK) + r"""
cat >/tmp/bound <<'END'
[ "$1" = bound ] || exit 0
ip addr add $ip/24 dev $interface
echo "guest: address $ip" >/dev/console
END
chmod 755 /tmp/bound
ip link set eth0 up
udhcpc -i eth0 -s /tmp/bound -n -q -t 20 >/dev/null 2>&1
wget -q -O /tmp/blob http://10.0.2.2:8080/blob
dd if=/tmp/blob of=/dev/vda bs=64k 2>/dev/null
mke2fs -F /dev/vdb >/dev/null 2>&1
mkdir /mnt
mount -t ext4 -o sync /dev/vdb /mnt
dd if=/tmp/blob of=/mnt/blob bs=16 count=1500 2>/dev/null
umount /mnt
echo "guest: requests $(awk '{print $1 + $5}' /sys/block/vdb/stat)"
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
    """As guest.libraries; of doppel those too that it loads itself."""
    found = guest.libraries(program)
    for name in LOADED if program == guest.DOPPEL else ():
        path = next(filter(os.path.exists, (os.path.join(os.path.dirname(other), name) for other in found)))
        found |= {path} | guest.libraries(path)
    return found


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
    copy(os.path.join(os.path.dirname(guest.DOPPEL), "guests", "shutdown64.elf"), tree, "start.elf")
    copy(os.path.join(os.path.dirname(guest.DOPPEL), "guests", "exits64.elf"), tree, "exits64.elf")
    if "start" in plan:
        guest.broken_kernel(os.path.join(tree, "start.bz"))
        for rom in QEMU_ROMS:
            copy(os.path.join("/usr/share/qemu", rom), tree, f"usr/share/qemu/{rom}")
        programs = programs | {"qemu": shutil.which(QEMU)}
    if wants_oracle(plan):
        build_folder = os.path.join(os.path.dirname(guest.DOPPEL), "tests", "cpu")
        programs = programs | {name: os.path.join(build_folder, name) for name in ("oracle", "oracle_native")}
    needed = set()
    for name, program in programs.items():
        copy(program, tree, name)
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
        shutil.move(guest.initramfs(directory, DEVICES, *guest.modules(DISK + NETWORK)),
                    os.path.join(tree, "devices.cpio"))
    with open(os.path.join(tree, "plan"), "w", encoding="ascii") as file:
        file.write("".join(line + "\n" for line in plan))


def wants_oracle(plan):
    """Whether the oracle is in the plan."""
    return any(line.startswith("oracle") for line in plan)


def name_of(image):
    """The name of one of our own guests."""
    return os.path.basename(image).removesuffix(".elf")


def failures_of_tcg(image):
    """The checks of a guest that fail on TCG alone, or None when it doesn't end there.

    KVM on TCG's processor can do no better than that processor.
    """
    command = [QEMU, "-accel", "tcg", "-cpu", "max", "-smp", str(guest.CPUS.get(name_of(image), 1)), "-nodefaults", "-display", "none", "-serial",
               "stdio", "-no-reboot", "-device", DEBUG_EXIT, "-kernel", image]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.DEVNULL, timeout=TCG_PATIENCE, check=False)
    except subprocess.TimeoutExpired:
        return None
    if done.returncode < 0:
        return None
    return set(re.findall(r"(?m)^not ok ([^:\r\n]+)", done.stdout.decode(errors="replace")))


def make_plans(everything, guests, programs):
    """What is to be run, in lists: each has a boot of the outer machine to itself."""
    boots = [["refuse", "auto", "memory"]]
    if everything:
        boots[0] += ["boot 1", "devices 1", "nested", "start", "exits"]
        boots.append(["boot 2", "boot 4", "devices 2"])
        boots.append([f"{ORACLE} --count 10000", f"{ORACLE} --blocks --count 300"])
    extra = " --long" if everything else ""
    boots[0] += [f"program /{os.path.basename(program)} /vmlinuz /guest.cpio{extra}" for program in programs]
    # Last, for they try the processor below hardest.
    guests = [f"guest /{os.path.basename(image)} {guest.CPUS.get(name_of(image), 1)}" for image in guests]
    if everything:
        boots += [guests[i:i + GUESTS_A_BOOT] for i in range(0, len(guests), GUESTS_A_BOOT)]
    else:
        boots[0] += guests
    return boots


class Results:
    """Passes on the cases that come from inside, and knows which failures aren't doppel's."""

    def __init__(self, known):
        self.known = known  # those that are TCG's own, by guest
        self.failed = False
        self.checks = {}  # {guest: {engine: {check: passed}}}

    def fail(self, case):
        """A failed case."""
        self.failed = True
        print(f"not ok {case}", flush=True)

    def excuse(self, name, check):
        """Why a guest's check may fail under kvm, or None."""
        if check in self.known.get(name, ()):
            return "it fails on TCG alone"
        return KVM_DEVIATIONS.get(name, {}).get(check)

    def case(self, passed, text):
        """One case from inside: "NAME" or "GUEST: CHECK", and perhaps ": why"."""
        status = re.match(r"(\S+)-status: status", text)
        check = re.match(r"(\S+): ([^:]+)", text)
        if check and not status:
            self.checks.setdefault(check[1], {}).setdefault("kvm", {})[check[2]] = passed
        if passed:
            print(f"ok {text}", flush=True)
        elif status and (self.known.get(status[1]) or status[1] in KVM_DEVIATIONS):
            print(f"ok {status[1]}-status # skip a check of its fails", flush=True)
        elif check and self.excuse(check[1], check[2]):
            print(f"ok {check[1]}: {check[2]} # skip {self.excuse(check[1], check[2])}", flush=True)
        else:
            self.fail(text)

    def elsewhere(self, engine, text):
        """A line about a guest on another engine: a check, or its end, when the two are compared."""
        check = re.match(r"(not )?ok (\S+): ([^:]+)", text)
        if check:
            of_guest = self.checks.setdefault(check[2], {})
            of_guest.setdefault(engine, {})[check[3]] = not check[1]
            return
        name = text.removeprefix("end ")
        ours, theirs = (self.checks.get(name, {}).get(e, {}) for e in ("kvm", engine))
        # A guest leaves out what its processor lacks, and KVM's lacks some of what the others have.
        both = ours.keys() & theirs.keys()
        differ = [check for check in sorted(both)
                  if ours[check] != theirs[check] and not self.excuse(name, check)
                  and check not in SLOW.get(name, ())]
        if differ or not both:
            self.fail(f"{name}-same-on-{engine}: {' '.join(differ) or 'no checks'}")
        else:
            print(f"ok {name}-same-on-{engine}", flush=True)
            print(f"    | {name}: {len(both)} checks of {len(theirs)} on {engine}", flush=True)


def patiently(process):
    """The lines that it prints; it is killed when there is none for too long."""
    while True:
        timer = threading.Timer(PATIENCE, process.kill)
        timer.start()
        line = process.stdout.readline()
        timer.cancel()
        if not line:
            return
        yield line


def boot(kernel, archive, results, plan):
    """Boots the machine once; returns how many lines of its plan were begun, and whether it came to its end."""
    command = [QEMU, "-accel", "tcg,thread=multi", "-cpu", ORACLE_CPU if wants_oracle(plan) else "max", "-smp", "2", "-m", "1G",
               "-nodefaults", "-display", "none", "-serial", "stdio", "-no-reboot",
               "-kernel", kernel, "-initrd", archive, "-append",
               "console=ttyS0 quiet panic=-1 tsc=reliable mitigations=off"]
    begun, done = 0, False
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as process:
        for raw in patiently(process):
            line = raw.decode(errors="replace").strip()
            case = re.match(r"(not )?ok (.*)", line)
            other = re.match(r"on (bt|interp): (.*)", line)
            if case:
                results.case(not case[1], case[2])
            elif other:
                results.elsewhere(other[1], other[2])
            elif line.startswith("inside: begin"):
                begun += 1
            elif line.startswith("inside: done"):
                done = True
            elif line:
                print(f"    | {line}", flush=True)
            if LOCKUP.match(line):
                process.kill()
    return begun, done


def run(kernel, results, plan, build):
    """Goes through a plan. Should the outer machine itself stop, it is booted afresh for what is left, and for what it was
    at, once more: QEMU 7.2 changes a processor's pending interrupts without a lock when it enters or leaves an SVM
    guest (svm_helper.c), so one that another processor sends meanwhile can be lost."""
    again = None
    while plan:
        with guest.temporary() as directory:
            archive = build(directory, plan)
            begun, done = boot(kernel, archive, results, plan)
        if done:
            return
        plan = plan[max(begun - 1, 0):]
        if plan[0] == again:
            results.fail(f"nested-kvm: twice the machine under QEMU didn't come to the end of '{again}'")
            return
        again = plan[0]
        print(f"    | the machine under QEMU stopped in '{again}': again", flush=True)


def main():
    """Parses the arguments, builds, boots."""
    parser = argparse.ArgumentParser(description="The KVM engine, one level down.")
    parser.add_argument("--all", action="store_true", help="every boot and every guest")
    parser.add_argument("--only", metavar="WORD", default="", help="what has WORD in its plan")
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
        name = name_of(image)
        # They want command lines and devices: tests/guest/protocols.py, devices.py.
        if name.startswith(("boot_", "devices")):
            continue
        known[name] = None if name in END_QEMU else failures_of_tcg(image)
        if known[name] is None:
            print(f"ok {name} # skip QEMU can't run it", flush=True)
        else:
            guests.append(image)
    programs = {os.path.basename(program): program for program in [guest.DOPPEL, *args.program]}

    def build(directory, plan):
        """The initramfs for a plan."""
        tree, archive = os.path.join(directory, "tree"), os.path.join(directory, "archive")
        build_tree(tree, folder, guests, programs, plan)
        with open(archive, "wb") as out:
            names = subprocess.run(["find", "."], cwd=tree, check=True, stdout=subprocess.PIPE)
            subprocess.run(["cpio", "--quiet", "-o", "-H", "newc"], cwd=tree, check=True,
                           input=names.stdout, stdout=out)
        return archive

    results = Results(known)
    kernel = glob.glob(os.path.join(folder, "vmlinuz-*"))[0]
    for plan in make_plans(args.all, guests, args.program):
        run(kernel, results, [line for line in plan if args.only in line], build)
    sys.exit(1 if results.failed else 0)


main()
