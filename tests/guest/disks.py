#!/usr/bin/python3
"""Disks end to end: Debian's kernel makes file systems on a raw and a qcow2 disk and writes to them; doppel is
killed in the midst of more writes; what the guest had synced is there in the next boot, and qemu-img finds the
images whole."""

import hashlib
import os
import socket
import subprocess
import time

import guest

DEVICES = ["virtio-rng", "virtio_console", "virtio_balloon"]
MODULES = ["virtio_ring", "virtio", "virtio_pci_modern_dev", "virtio_pci_legacy_dev", "virtio_pci",
           "virtio_blk"]

LOAD = "".join(f"insmod /lib/{name}.ko\n" for name in MODULES) + "mkdir -p /mnt\n"

WRITE = LOAD + r"""
echo "disk: serial $(cat /sys/block/vda/serial) $(cat /sys/block/vdb/serial)"
echo "disk: sectors $(cat /sys/block/vda/size) $(cat /sys/block/vdb/size) $(cat /sys/block/vdc/size)"
echo "disk: readonly $(cat /sys/block/vda/ro) $(cat /sys/block/vdb/ro) $(cat /sys/block/vdc/ro)"
echo "disk: backing $(dd if=/dev/vdc bs=512 count=1 2>/dev/null | md5sum | cut -c1-32)"
dd if=/dev/zero of=/dev/vdc bs=512 count=1 conv=fsync 2>/dev/null && echo "disk: wrote to a readonly disk"
for d in vda vdb; do
    mke2fs -F /dev/$d >/dev/null 2>&1
    mkdir /mnt/$d
    mount -t ext4 /dev/$d /mnt/$d
    dd if=/dev/urandom of=/mnt/$d/gone bs=64k count=32 2>/dev/null
    dd if=/dev/urandom of=/mnt/$d/kept bs=64k count=64 2>/dev/null
    sync
    rm /mnt/$d/gone
    fstrim /mnt/$d || echo "disk: fstrim failed"
    sync
    echo "disk: synced $d $(md5sum </mnt/$d/kept | cut -c1-32)"
done
echo "disk: interrupts $(grep -c 'virtio.-req' /proc/interrupts)"
echo "disk: go"
while :; do
    for d in vda vdb; do
        dd if=/dev/urandom of=/mnt/$d/more bs=64k count=16 2>/dev/null
        sync
    done
done
"""

READ = LOAD + r"""
for d in vda vdb; do
    mkdir /mnt/$d
    mount -t ext4 /dev/$d /mnt/$d
    echo "disk: found $d $(md5sum </mnt/$d/kept | cut -c1-32)"
    umount /mnt/$d
done
for m in virtio-rng virtio_console virtio_balloon; do insmod /lib/$m.ko; done
echo "disk: rng $(cat /sys/class/misc/hw_random/rng_current) $(head -c 64 /dev/hwrng | wc -c)"
echo "disk: balloon $(cat /sys/bus/virtio/drivers/virtio_balloon/virtio*/device)"
sleep 1
port=$(grep -l '^agent$' /sys/class/virtio-ports/*/name | cut -d/ -f5)
exec 3<>/dev/$port  # open all the time: Linux drops what has come when a port is closed
echo "to the host" >&3
read -r line <&3
echo "disk: port $line"
echo "from hvc0" >/dev/hvc0
"""


def boot(directory, script, *disks, more=()):
    """A guest with these disks that runs a script."""
    options = [option for disk in disks for option in ("--disk", disk)] + list(more)
    return guest.Guest("--engine", "interp", "--kernel", guest.kernel(),
                       "--initrd", guest.initramfs(directory, script,
                                                   *guest.modules(MODULES + DEVICES)),
                       "--append", "console=ttyS0 quiet", "--memory", "256M", *options)


def told(vm):
    """What the guest's script said: {"disk: WHAT": rest}."""
    lines = [line.split(" ", 2) for _, line in vm.lines if line.startswith("disk: ")]
    return {line[1]: line[2] if len(line) > 2 else "" for line in lines
            if line[1] not in ("synced", "found")} | {
                tuple(line[1:2] + line[2].split(" ")[:1]): line[2].split(" ")[1] for line in lines
                if line[1] in ("synced", "found") and " " in line[2]}


def answer_port(path):
    """Sends back the line that comes from the guest's port."""
    deadline = time.monotonic() + guest.PATIENCE
    with socket.socket(socket.AF_UNIX) as stream:
        while time.monotonic() < deadline:
            try:
                stream.connect(path)
                break
            except OSError:
                time.sleep(0.1)
        stream.settimeout(guest.PATIENCE)
        line = stream.makefile("rb").readline()
        stream.sendall(b"got: " + line)
        time.sleep(1)


def main():
    """Two boots."""
    cases = guest.Cases()
    with guest.temporary() as directory:
        raw, qcow2, base, overlay = (os.path.join(directory, name)
                                     for name in ("a.raw", "b.qcow2", "base.raw", "c.qcow2"))
        subprocess.run([guest.DOPPEL, "image", "create", "-f", "raw", raw, "32M"], check=True)
        subprocess.run([guest.DOPPEL, "image", "create", "-f", "qcow2", qcow2, "64M"], check=True)
        sector = os.urandom(512)
        with open(base, "wb") as file:
            file.write(sector * 64)
        subprocess.run([guest.DOPPEL, "image", "create", "-f", "qcow2", "-b", base, overlay],
                       check=True)

        vm = boot(directory, WRITE, raw + ",format=raw,serial=first", qcow2 + ",serial=second",
                  overlay + ",readonly=on")
        going = vm.read_until("disk: go")
        # A second doppel must not get at an image in use.
        second = subprocess.run([guest.DOPPEL, "run", "--kernel", guest.kernel(), "--disk", qcow2],
                                stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                                check=False)
        time.sleep(1.5)
        vm.process.kill()
        vm.process.wait()
        first = told(vm)
        cases.check("disks-write", going is not None, "the script didn't get that far")
        cases.equal("disks-serial", first.get("serial"), "first second")
        cases.equal("disks-sectors", first.get("sectors"), "65536 131072 64")
        cases.equal("disks-readonly", first.get("readonly"), "0 0 1")
        cases.equal("disks-backing", first.get("backing"), hashlib.md5(sector).hexdigest())
        cases.check("disks-readonly-holds", "wrote" not in first, "a write went through")
        cases.equal("disks-msix", first.get("interrupts"), "3")
        cases.check("disks-fstrim", "fstrim" not in first, "it failed")
        cases.check("disks-locked", second.returncode == 2 and "in use" in second.stderr,
                    f"{second.returncode}: {second.stderr}")
        status, output = guest.tool("qemu-img", "check", qcow2)
        cases.check("disks-check-after-kill", status in (0, 3), output)  # 3: leaks only

        hvc, port = os.path.join(directory, "hvc0"), os.path.join(directory, "port")
        vm = boot(directory, READ, raw + ",format=raw", qcow2,
                  more=("--console", hvc, "--console", f"socket={port},name=agent"))
        answer_port(port)
        cases.equal("disks-power-off", vm.finish(), 0)
        second_boot = told(vm)
        cases.equal("virtio-rng", second_boot.get("rng"), "virtio_rng.0 64")
        cases.equal("virtio-balloon", second_boot.get("balloon"), "0x0005")
        cases.equal("virtio-port", second_boot.get("port"), "got: to the host")
        with open(hvc, encoding="ascii") as file:
            cases.check("virtio-console", "from hvc0" in file.read(), "nothing came")
        for disk in ("vda", "vdb"):
            kept = first.get(("synced", disk))
            cases.check(f"disks-{disk}-kept",
                        kept and kept == second_boot.get(("found", disk)),
                        f"{kept} became {second_boot.get(('found', disk))}")
        subprocess.run([guest.DOPPEL, "image", "check", "--repair", qcow2], check=True,
                       stdout=subprocess.DEVNULL)
        status, output = guest.tool("qemu-img", "check", qcow2)
        cases.check("disks-check", status == 0, output)
        out = os.path.join(directory, "copy.raw")
        subprocess.run([guest.DOPPEL, "image", "convert", "-O", "raw", qcow2, out], check=True)
        status, output = guest.tool("qemu-img", "compare", qcow2, out)
        cases.check("disks-compare", status == 0, output)
        if cases.failed:
            vm.show()
    cases.done()


main()
