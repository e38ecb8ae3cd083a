#!/usr/bin/python3
"""A guest's file system when doppel is killed: Debian's kernel writes to ext4 on a qcow2 image, and on a raw one, several
files at a time and each with fsync, and SIGKILL ends doppel in the midst of it, time and again on the same image.
Each time what the guest had synced is there, and fsck and qemu-img find nothing wrong."""

import hashlib
import os
import random
import shutil
import subprocess
import time

import guest

ROUNDS = {"qcow2": 20, "raw": 5}
WRITERS = 3
MODULES = ["virtio_ring", "virtio", "virtio_pci_modern_dev", "virtio_pci_legacy_dev", "virtio_pci",
           "virtio_blk"]

# The number of the round is in the kernel's command line, and in the files' names. Files of the round before the last
# go, so that there is always room; they are discarded, so that most writes take a cluster, which a flush that is
# left out would lose. What "more" gets is never synced.
SCRIPT = "".join(f"insmod /lib/{name}.ko\n" for name in MODULES) + r"""
round=$(sed 's/.*round=\([0-9]*\).*/\1/' /proc/cmdline)
mkdir /mnt
mount -t ext4 -o discard /dev/vda /mnt || exit 1
rm -f /mnt/*/$((round - 2)).*

writer() {
    n=0
    mkdir -p /mnt/$1
    while :; do
        n=$((n + 1))
        name=$1/$round.$n
        dd if=/dev/urandom of=/mnt/$name bs=4k count=$((n % 17 + 1)) conv=fsync 2>/dev/null || exit 1
        echo "crash: synced $name $(md5sum </mnt/$name)"
    done
}

for i in $(seq WRITERS); do writer $i & done
while :; do
    dd if=/dev/urandom of=/mnt/more bs=64k count=16 2>/dev/null
done
""".replace("WRITERS", str(WRITERS))


def write_and_kill(directory, disk, number, rng):
    """One round; returns {NAME: md5} of what the guest said it had synced, or None when it didn't get so far."""
    vm = guest.Guest("--engine", "bt", "--kernel", guest.kernel(), "--initrd",
                     os.path.join(directory, "initramfs"), "--append",
                     f"console=ttyS0 quiet round={number}", "--memory", "128M", "--disk", disk)
    going = all(vm.read_until("crash: synced") for _ in range(rng.randint(WRITERS, 40)))
    time.sleep(rng.uniform(0, 0.02))
    vm.process.kill()
    vm.finish()
    if not going:
        vm.show()
        return None
    said = [line.split() for _, line in vm.lines if line.startswith("crash: synced")]
    return {words[2]: words[3] for words in said if len(words) == 5}


def files_on(raw, directory):
    """{NAME: md5} of the files on an ext4 image."""
    out = os.path.join(directory, "out")
    shutil.rmtree(out, ignore_errors=True)
    os.mkdir(out)
    folders = " ".join(f"/{i + 1}" for i in range(WRITERS))
    guest.tool("debugfs", "-R", f"rdump {folders} {out}", raw)
    found = {}
    for folder, _, names in os.walk(out):
        for name in names:
            path = os.path.join(folder, name)
            with open(path, "rb") as file:
                found[os.path.relpath(path, out)] = hashlib.md5(file.read()).hexdigest()
    return found


def look(cases, directory, disk, number, synced):
    """What is wrong with the image after a round is told as cases."""
    raw = os.path.join(directory, "raw")
    if disk.endswith(".qcow2"):
        status, output = guest.tool("qemu-img", "check", disk)
        cases.check(f"round-{number}-image", status in (0, 3), output)  # 3: space is lost, as after any crash
    image, _, kind = disk.partition(",format=")
    subprocess.run([guest.DOPPEL, "image", "convert", "--force", "-f", kind or "qcow2", "-O", "raw", image, raw],
                   check=True)
    # First the journal, then whether it left anything to mend.
    status, output = guest.tool("e2fsck", "-fp", raw)
    again, more = guest.tool("e2fsck", "-fn", raw)
    cases.check(f"round-{number}-fsck", status in (0, 1) and again == 0, output + more)
    found = files_on(raw, directory)
    lost = [name for name, digest in synced.items() if found.get(name) != digest]
    cases.check(f"round-{number}-synced", not lost, f"of {len(synced)} files lost: {lost}")


def rounds(cases, directory, disk, first, count):
    """Rounds on one image, numbered on."""
    before = {}
    for number in range(first, first + count):
        synced = write_and_kill(directory, disk, number, random.Random(number))
        if not cases.check(f"round-{number}-writes", synced, "the guest didn't get that far"):
            break
        look(cases, directory, disk, number, {**before, **synced})
        before = synced


def main():
    """All rounds of each kind of image."""
    os.environ["PATH"] += ":/usr/sbin:/sbin"
    cases = guest.Cases()
    with guest.temporary() as directory:
        empty, qcow2, raw = (os.path.join(directory, name) for name in ("empty", "disk.qcow2", "disk.raw"))
        guest.initramfs(directory, SCRIPT, *guest.modules(MODULES))
        subprocess.run(["mke2fs", "-q", "-t", "ext4", empty, "96M"], check=True,
                       stdout=subprocess.DEVNULL)
        subprocess.run([guest.DOPPEL, "image", "convert", "-O", "qcow2", "--cluster-size", "4K", empty,
                        qcow2], check=True)
        os.rename(empty, raw)
        rounds(cases, directory, qcow2, 1, ROUNDS["qcow2"])
        subprocess.run([guest.DOPPEL, "image", "check", "--repair", qcow2], check=True,
                       stdout=subprocess.DEVNULL)
        status, output = guest.tool("qemu-img", "check", qcow2)
        cases.check("lost-space-is-found", status == 0, output)
        rounds(cases, directory, raw + ",format=raw", 1 + ROUNDS["qcow2"], ROUNDS["raw"])
    cases.done()


main()
