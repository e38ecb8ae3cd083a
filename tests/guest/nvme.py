#!/usr/bin/python3
"""NVMe disks end to end: Debian's kernel, whose driver is built in, makes file systems on a raw and a qcow2 disk,
writes, flushes and discards; doppel is killed; what the guest had synced is there in the next boot.

    nvme.py ENGINE
"""

import os
import subprocess
import sys
import time

import guest

# Disks have the names of controllers and namespaces in the order in which the kernel found them: by serial number.
FIND = r"""
name()
{
    for c in /sys/class/nvme/nvme*; do
        [ "$(cat $c/serial | tr -d ' ')" = $1 ] && basename $c/${c##*/}n$2
    done
}
raw=$(name first 1) qcow2=$(name second 1) fixed=$(name second 2)
"""

WRITE = FIND + r"""
echo "nvme: model $(cat /sys/class/nvme/nvme0/model)"
echo "nvme: sectors $(cat /sys/block/$raw/size) $(cat /sys/block/$qcow2/size) $(cat /sys/block/$fixed/size)"
echo "nvme: readonly $(cat /sys/block/$raw/ro) $(cat /sys/block/$qcow2/ro) $(cat /sys/block/$fixed/ro)"
echo "nvme: fixed $(md5sum </dev/$fixed | cut -c1-32)"
dd if=/dev/zero of=/dev/$fixed bs=512 count=1 conv=fsync 2>/dev/null && echo "nvme: wrote to a readonly disk"
for d in $raw $qcow2; do
    mke2fs -F /dev/$d >/dev/null 2>&1
    mkdir -p /mnt/$d
    mount -t ext4 /dev/$d /mnt/$d
    dd if=/dev/urandom of=/mnt/$d/gone bs=64k count=32 2>/dev/null
    dd if=/dev/urandom of=/mnt/$d/kept bs=1M count=4 2>/dev/null
    sync
    rm /mnt/$d/gone
    fstrim /mnt/$d || echo "nvme: fstrim failed"
    sync
done
echo "nvme: raw $(md5sum </mnt/$raw/kept | cut -c1-32)"
echo "nvme: qcow2 $(md5sum </mnt/$qcow2/kept | cut -c1-32)"
echo "nvme: interrupts $(grep -c 'PCI-MSI.*nvme.q' /proc/interrupts)"
echo "nvme: go"
while :; do
    for d in $raw $qcow2; do
        dd if=/dev/urandom of=/mnt/$d/more bs=64k count=16 2>/dev/null
        sync
    done
done
"""

READ = FIND + r"""
mkdir -p /mnt
for d in raw qcow2; do
    eval mount -t ext4 /dev/\$$d /mnt
    echo "nvme: $d $(md5sum </mnt/kept | cut -c1-32)"
    umount /mnt
done
blkdiscard /dev/$raw
echo "nvme: discarded $(tr -d '\0' </dev/$raw | wc -c)"
"""


def boot(directory, engine, script, raw, qcow2, fixed):
    """A guest with two controllers, the second one with two namespaces."""
    disks = (raw + ",format=raw,bus=nvme,serial=first", qcow2 + ",bus=nvme,serial=second",
             fixed + ",format=raw,readonly=on,bus=nvme,serial=second")
    return guest.Guest("--engine", engine, "--kernel", guest.kernel(), "--initrd",
                       guest.initramfs(directory, script), "--append", "console=ttyS0 quiet",
                       "--memory", "256M", *[o for disk in disks for o in ("--disk", disk)])


def told(vm):
    """What the guest's script said: {WHAT: rest}."""
    lines = [line.split(" ", 2)[1:] for _, line in vm.lines if line.startswith("nvme: ")]
    return {what: " ".join(rest).strip() for what, *rest in lines}


def main():
    """Two boots."""
    engine = sys.argv[1]
    cases = guest.Cases()
    with guest.temporary() as directory:
        raw, qcow2, fixed = (os.path.join(directory, n) for n in ("a.raw", "b.qcow2", "c.raw"))
        subprocess.run([guest.DOPPEL, "image", "create", "-f", "raw", raw, "32M"], check=True)
        subprocess.run([guest.DOPPEL, "image", "create", qcow2, "64M"], check=True)
        with open(fixed, "wb") as file:
            file.write(os.urandom(1 << 20))

        vm = boot(directory, engine, WRITE, raw, qcow2, fixed)
        going = vm.read_until("nvme: go")
        time.sleep(1)
        vm.process.kill()
        vm.process.wait()
        first = told(vm)
        cases.check("nvme-write", going is not None, "the script didn't get that far")
        cases.equal("nvme-model", first.get("model"), "doppel NVMe disk")
        cases.equal("nvme-sectors", first.get("sectors"), "65536 131072 2048")
        cases.equal("nvme-readonly", first.get("readonly"), "0 0 1")
        digest = subprocess.run(["md5sum", fixed], check=True, stdout=subprocess.PIPE, text=True)
        cases.equal("nvme-namespace-2", first.get("fixed"), digest.stdout[:32])
        cases.check("nvme-readonly-holds", "wrote" not in first, "a write went through")
        cases.check("nvme-fstrim", "fstrim" not in first, "it failed")
        cases.equal("nvme-msix", first.get("interrupts"), "4")
        status, output = guest.tool("qemu-img", "check", qcow2)
        cases.check("nvme-check-after-kill", status in (0, 3), output) # 3: leaks

        vm = boot(directory, engine, READ, raw, qcow2, fixed)
        cases.equal("nvme-power-off", vm.finish(), 0)
        second = told(vm)
        for disk in ("raw", "qcow2"):
            cases.check(f"nvme-{disk}-kept", first.get(disk) and first[disk] == second.get(disk),
                        f"{first.get(disk)} became {second.get(disk)}")
        cases.equal("nvme-discarded", second.get("discarded"), "0")
        cases.check("nvme-space-given-back", os.stat(raw).st_blocks < 64,
                    f"{os.stat(raw).st_blocks} blocks are in use")
        if cases.failed:
            vm.show()
    cases.done()


main()
