#!/usr/bin/python3
"""Cards that come and go: Debian's kernel, whose pciehp knows the root ports by _OSC, gets a disk while it runs,
writes to it, lets it go, and finds what it wrote when the disk comes back; a network card; a disk that is pulled out
in the midst of writes; and a guest that doesn't answer."""

import hashlib
import os
import signal
import socket
import subprocess
import time

import guest

MODULES = ["virtio_ring", "virtio", "virtio_pci_modern_dev", "virtio_pci_legacy_dev", "virtio_pci", "virtio_blk",
           "failover", "net_failover", "virtio_net"]

# What comes is told by the kernel's own names, as soon as it is there or has gone.
SCRIPT = "".join(f"insmod /lib/{name}.ko\n" for name in MODULES) + r"""
until_there() { until [ -e $1 ]; do sleep 0.1; done; }
until_gone() { while [ -e $1 ]; do sleep 0.1; done; }
echo "plug: slots $(ls /sys/bus/pci/slots | tr '\n' ' ')"
echo "plug: msi $(grep -c pciehp /proc/interrupts)"
echo "plug: ready"
until_there /dev/vda
echo "plug: disk $(cat /sys/block/vda/serial) $(cat /sys/block/vda/size)"
mkdir -p /mnt
mke2fs -F /dev/vda >/dev/null 2>&1
mount -t ext4 /dev/vda /mnt
dd if=/dev/urandom of=/mnt/kept bs=64k count=64 2>/dev/null
echo "plug: wrote $(md5sum </mnt/kept | cut -c1-32)"
umount /mnt
echo "plug: take it"
until_gone /dev/vda
echo "plug: gone"
until_there /dev/vda
mount -t ext4 /dev/vda /mnt
echo "plug: read $(md5sum </mnt/kept | cut -c1-32)"
umount /mnt
echo "plug: net please"
until_there /sys/class/net/eth0
ip link set eth0 up
udhcpc -i eth0 -s /bin/true -n -q -t 20 >/dev/null 2>&1 && echo "plug: lease"
echo "plug: pull it"
dd if=/dev/zero of=/dev/vda bs=64k oflag=direct 2>/dev/null
echo "plug: write failed $?"
until_gone /dev/vda
echo "plug: pulled"
for slot in /sys/bus/pci/slots/*; do echo "plug: adapter ${slot##*/} $(cat $slot/adapter)"; done
echo "plug: end"
"""


COME_AND_GO = "".join(f"insmod /lib/{name}.ko\n" for name in MODULES) + r"""
until_there() { until [ -e $1 ]; do sleep 0.1; done; }
echo "plug: ready"
until_there DEVICE
echo "plug: read $(md5sum <DEVICE | cut -c1-32)"
echo "plug: take it"
while [ -e DEVICE ]; do sleep 0.1; done
"""


class Control:
    """A client of the control socket."""

    def __init__(self, path):
        deadline = time.monotonic() + guest.PATIENCE
        while True:
            self.socket = socket.socket(socket.AF_UNIX)
            try:
                self.socket.connect(path)
                break
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)
        self.socket.settimeout(guest.PATIENCE)
        self.lines = self.socket.makefile("r", encoding="ascii")
        self.events = []

    def ask(self, command):
        """Sends a command; returns its answer: the lines, the last of which begins with ok or error."""
        self.socket.sendall(command.encode() + b"\n")
        lines = []
        while not lines or lines[-1].split(" ")[0] not in ("ok", "error"):
            line = self.lines.readline().rstrip("\n")
            if line.startswith("removed "):
                self.events.append(line)
            else:
                lines.append(line)
            if not line:
                break
        return "\n".join(lines)

    def event(self):
        """The next event, which may have come already."""
        return self.events.pop(0) if self.events else self.lines.readline().rstrip("\n")


def said(vm, what):
    """The rest of the first line "plug: WHAT REST"."""
    prefix = f"plug: {what} "
    return next((line[len(prefix):] for _, line in vm.lines if line.startswith(prefix)), None)


def run(directory, engine, options, script=SCRIPT, slots=2):
    """A guest with slots, and a client of its socket."""
    path = os.path.join(directory, "control")
    vm = guest.Guest("--engine", engine, "--kernel", guest.kernel(), "--initrd",
                     guest.initramfs(directory, script, *guest.modules(MODULES)), "--append",
                     "console=ttyS0 quiet", "--memory", "256M", "--control", f"socket={path}",
                     "--slots", str(slots), *options)
    return vm, Control(path)


def play(cases, directory, engine):
    """The whole script."""
    disk = os.path.join(directory, "disk.qcow2")
    other = os.path.join(directory, "other.raw")
    subprocess.run([guest.DOPPEL, "image", "create", "-f", "qcow2", disk, "32M"], check=True)
    subprocess.run([guest.DOPPEL, "image", "create", "-f", "raw", other, "1M"], check=True)
    add = f"device_add a disk {disk},serial=plugged"
    vm, control = run(directory, engine, ["--cpus", "1"])
    begun = vm.read_until("plug: ready") is not None
    if not cases.check(f"{engine}-ready", begun, "the guest didn't get that far"):
        vm.show()
        vm.process.kill()
        return
    cases.equal(f"{engine}-slots", said(vm, "slots"), "1 2 ")
    cases.equal(f"{engine}-msi", said(vm, "msi"), "2")
    cases.equal(f"{engine}-add", control.ask(add), "ok")
    cases.equal(f"{engine}-add-twice", control.ask(add).split(":")[0], "error there is a card 'a'")
    cases.check(f"{engine}-locked", "in use" in control.ask(f"device_add b disk {disk}"),
                "another card got the same image")
    vm.read_until("plug: take it")
    cases.equal(f"{engine}-disk", said(vm, "disk"), "plugged 65536")
    cases.equal(f"{engine}-list", control.ask("devices"), "slot 1 disk a\nok")
    cases.equal(f"{engine}-remove", control.ask("device_del a"), "ok")
    vm.read_until("plug: gone")
    cases.equal(f"{engine}-removed", control.event(), "removed a")
    cases.equal(f"{engine}-list-empty", control.ask("devices"), "ok")
    cases.equal(f"{engine}-add-again", control.ask(add), "ok")
    vm.read_until("plug: net please")
    cases.equal(f"{engine}-kept", said(vm, "read"), said(vm, "wrote"))
    cases.equal(f"{engine}-net", control.ask("device_add n net user"), "ok")
    cases.check(f"{engine}-full", "slots are taken" in control.ask(f"device_add o disk {other}"),
                "a third card went into two slots")
    vm.read_until("plug: pull it")
    cases.check(f"{engine}-lease", any(line == "plug: lease" for _, line in vm.lines), "no DHCP")
    time.sleep(0.2)  # some writes are under way; the result doesn't depend on how many
    cases.equal(f"{engine}-pull", control.ask("device_del a force"), "ok")
    cases.equal(f"{engine}-pulled", control.event(), "removed a")
    vm.read_until("plug: end")
    cases.equal(f"{engine}-write-failed", said(vm, "write failed"), "1")
    cases.equal(f"{engine}-adapters",
                [line for _, line in vm.lines if line.startswith("plug: adapter")],
                ["plug: adapter 1 0", "plug: adapter 2 1"])
    # Linux 6.1 itself can't power off any more: it waits for ever for the pulled device to be reset.
    vm.process.send_signal(signal.SIGTERM)
    if not cases.equal(f"{engine}-end", vm.finish(), 0) or cases.failed:
        vm.show()
    status, output = guest.tool("qemu-img", "check", disk)
    cases.check(f"{engine}-image", status == 0, output)


def come_and_go(cases, directory, name, device, option, *options):
    """A disk comes, is read, and goes."""
    disk = os.path.join(directory, name)
    with open(disk, "wb") as file:
        file.write(os.urandom(1 << 20))
    with open(disk, "rb") as file:
        want = hashlib.md5(file.read()).hexdigest()
    vm, control = run(directory, "bt", options, COME_AND_GO.replace("DEVICE", device))
    vm.read_until("plug: ready")
    cases.equal(f"{name}-add", control.ask(f"device_add a disk {disk},format=raw{option}"), "ok")
    vm.read_until("plug: take it")
    cases.equal(f"{name}-read", said(vm, "read"), want)
    cases.equal(f"{name}-remove", control.ask("device_del a"), "ok")
    cases.equal(f"{name}-removed", control.event(), "removed a")
    if not cases.equal(f"{name}-end", vm.finish(), 0) or cases.failed:
        vm.show()


def main():
    """The whole script; a disk of the other kind; slots as firmware leaves them."""
    cases = guest.Cases()
    with guest.temporary() as directory:
        play(cases, directory, "bt")
        come_and_go(cases, directory, "nvme", "/dev/nvme0n1", ",bus=nvme")
        come_and_go(cases, directory, "uefi", "/dev/vda", "", "--firmware", "uefi,vars=none")
    cases.done()


main()
