#!/usr/bin/python3
"""What becomes of writes that the host can't do: Debian's kernel writes to disks in a file system that is too small
(ENOSPC), and to a corrupt qcow2 image (EIO). It gets an error, or, under werror=stop, the machine waits until there is
space, and nothing is lost."""

import os
import signal
import struct
import subprocess

import guest

# The disk is larger than the file system, which a file more fills to its half.
DISK, SPACE, BALLAST = 16 << 20, 12 << 20, 6 << 20
WRITE = 8 << 20

MODULES = ["virtio_ring", "virtio", "virtio_pci_modern_dev", "virtio_pci_legacy_dev", "virtio_pci",
           "virtio_blk"]
LOAD = "".join(f"insmod /lib/{name}.ko\n" for name in MODULES)
BLOCKS = {"virtio": "vda", "nvme": "nvme0n1"}

SCRIPT = LOAD + r"""
dd if=/dev/urandom of=/tmp/data bs=1M count=8 2>/dev/null
dd if=/tmp/data of=/dev/DISK bs=64k conv=fsync 2>/tmp/errors && echo "write: done"
grep -q 'Input/output error' /tmp/errors && echo "write: I/O error"
echo 3 >/proc/sys/vm/drop_caches
dd if=/dev/DISK bs=64k count=128 2>/dev/null | cmp - /tmp/data && echo "write: kept"
sync
dd if=/tmp/data of=/dev/DISK bs=4k count=1 conv=fsync 2>/dev/null && echo "write: again"
echo "write: end"
"""


def namespace(directory):
    """A command that runs another in a mount namespace in which `directory` is a small file system."""
    mine = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    script = f'mount -t tmpfs -o size={SPACE} none "$0" && ' \
             f'head -c {BALLAST} /dev/zero >"$0/ballast" && ' \
             f'truncate -s {DISK} "$0/disk" && exec "$@"'
    return ["unshare", *mine, "--mount", "sh", "-c", script, directory]


def boot(directory, bus, *options, wrap=()):
    """A guest that writes to the disk."""
    script = SCRIPT.replace("DISK", BLOCKS[bus])
    initramfs = guest.initramfs(directory, script, *guest.modules(MODULES))
    return guest.Guest("--engine", "bt", "--kernel", guest.kernel(), "--initrd", initramfs,
                       "--append", "console=ttyS0 quiet", "--memory", "256M", *options, wrap=wrap)


def told(vm):
    """What the guest's script said, in order."""
    return [line[len("write: "):] for _, line in vm.lines if line.startswith("write: ")]


def judge(cases, vm, name, want):
    """The guest ended by itself and said what it should."""
    cases.equal(name + "-power-off", vm.finish(), 0)
    if not cases.equal(name, told(vm), want):
        vm.show()


def no_space(cases, directory, bus):
    """The guest is told, the host's user too, and the disk goes on working."""
    small = os.path.join(directory, "small")
    vm = boot(directory, bus, "--disk", f"{small}/disk,format=raw,bus={bus}", wrap=namespace(small))
    judge(cases, vm, f"write-no-space-{bus}", ["I/O error", "again", "end"])
    cases.check(f"write-no-space-{bus}-log",
                f"{small}/disk: a write failed: No space left on device" in vm.stderr(), vm.stderr())


def pause(cases, directory, bus):
    """werror=stop: the guest never learns of it."""
    small = os.path.join(directory, "small")
    vm = boot(directory, bus, "--disk", f"{small}/disk,format=raw,bus={bus},werror=stop",
              wrap=namespace(small))
    paused = vm.read_errors_until("the machine is paused")
    cases.check(f"write-pause-{bus}", paused and not told(vm), f"{told(vm)} {vm.stderr()}")
    vm.process.send_signal(signal.SIGCONT)
    again = vm.read_errors_until("the machine is paused", times=2)
    cases.check(f"write-pause-{bus}-again", again and not told(vm), f"{told(vm)} {vm.stderr()}")
    os.unlink(f"/proc/{vm.process.pid}/root{small}/ballast")
    vm.process.send_signal(signal.SIGCONT)
    judge(cases, vm, f"write-pause-{bus}-kept", ["done", "kept", "again", "end"])


def corrupt(cases, directory):
    """An entry of the image leads to where no data can be: the guest gets an I/O error, the image stays as it is."""
    image = os.path.join(directory, "corrupt.qcow2")
    subprocess.run([guest.DOPPEL, "image", "create", image, f"{DISK}"], check=True)
    subprocess.run(["qemu-io", "-f", "qcow2", "-c", "write -P 1 4M 64k", image], check=True,
                   stdout=subprocess.DEVNULL)
    with open(image, "r+b") as file:
        file.seek(40)
        l1_table = struct.unpack(">Q", file.read(8))[0]
        file.seek(l1_table)
        l2_table = struct.unpack(">Q", file.read(8))[0] & (1 << 56) - 512
        file.seek(l2_table + 8 * 64)
        file.write(struct.pack(">Q", 1 << 63 | 65536)) # the refcount table
    vm = boot(directory, "virtio", "--disk", image)
    judge(cases, vm, "write-corrupt", ["I/O error", "end"])
    cases.check("write-corrupt-log", "corrupt" in vm.stderr(), vm.stderr())
    again = subprocess.run([guest.DOPPEL, "run", "--kernel", guest.kernel(), "--disk", image],
                           stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
    cases.check("write-corrupt-refused", again.returncode == 2 and "marked as corrupt" in again.stderr,
                again.stderr)


def main():
    """All of it."""
    cases = guest.Cases()
    with guest.temporary() as directory:
        os.mkdir(os.path.join(directory, "small"))
        if subprocess.run([*namespace(os.path.join(directory, "small")), "true"], check=False,
                          stderr=subprocess.DEVNULL).returncode:
            print("ok write-no-space # skip: this user can't mount a small file system")
        else:
            for bus in BLOCKS:
                no_space(cases, directory, bus)
                pause(cases, directory, bus)
        corrupt(cases, directory)
    cases.done()


main()
