#!/usr/bin/python3
"""Devices of other processes end to end: Debian's kernel with a disk of qemu-storage-daemon's, a file system of
virtiofsd's and a network card of this program's, each by vhost-user.

The disk's backend is killed in the midst of writes and started again: nothing is lost. The file system's is killed,
too: its requests fail, and the guest mounts it anew.
"""

import array
import hashlib
import mmap
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time

import guest

MODULES = ["virtio_ring", "virtio", "virtio_pci_modern_dev", "virtio_pci_legacy_dev", "virtio_pci",
           "virtio_blk", "failover", "net_failover", "virtio_net", "fuse", "virtiofs"]
VIRTIOFSD = ["/usr/lib/qemu/virtiofsd", "/usr/libexec/virtiofsd"]  # of Debian 12, of its successor
LOAD = "".join(f"insmod /lib/{name}.ko\n" for name in MODULES) + "mkdir -p /mnt /disk\n"

DISK = LOAD + r"""
echo "vhost: sectors $(cat /sys/block/vda/size)"
mke2fs -F /dev/vda >/dev/null 2>&1
mount -t ext4 /dev/vda /disk
dd if=/dev/urandom of=/disk/first bs=64k count=64 2>/dev/null
sync
echo "vhost: first $(md5sum </disk/first | cut -c1-32)"
dd if=/dev/urandom of=/tmp/second bs=64k count=400 2>/dev/null
echo "vhost: second $(md5sum </tmp/second | cut -c1-32)"
echo "vhost: go"
cp /tmp/second /disk/second
sync
umount /disk
echo 3 >/proc/sys/vm/drop_caches
mount -t ext4 /dev/vda /disk
echo "vhost: found $(md5sum </disk/first | cut -c1-32) $(md5sum </disk/second | cut -c1-32)"
umount /disk
dmesg | grep -i 'I/O error' && echo "vhost: errors"
"""

NET = LOAD + r"""
echo "vhost: mac $(cat /sys/class/net/eth0/address)"
ip addr add 192.168.7.1/24 dev eth0
ip link set eth0 up
ping -c 5 -i 0.2 -s 1000 -W 20 192.168.7.2 >/dev/null && echo "vhost: ping"
rmmod virtio_net && insmod /lib/virtio_net.ko
ip addr add 192.168.7.1/24 dev eth0
ip link set eth0 up
ping -c 1 -W 20 192.168.7.2 >/dev/null && echo "vhost: again"
"""

FILES = LOAD + r"""
mount -t virtiofs files /mnt || echo "vhost: no mount"
echo "vhost: blob $(md5sum </mnt/blob | cut -c1-32)"
dd if=/dev/urandom of=/mnt/back bs=64k count=64 2>/dev/null
echo "vhost: back $(md5sum </mnt/back | cut -c1-32)"
echo "vhost: kill"
while ls /mnt >/dev/null 2>&1; do usleep 100000; done
ls /mnt 2>&1 | grep -q 'not connected' && echo "vhost: refused"
umount /mnt
echo "vhost: start"
# Without a backend a mount may succeed, and then serve nothing.
until mount -t virtiofs files /mnt 2>/dev/null && test -s /mnt/back; do
    umount /mnt 2>/dev/null
    usleep 100000
done
echo "vhost: remounted $(md5sum </mnt/back | cut -c1-32)"
"""


def md5(data):
    """As md5sum prints it."""
    return hashlib.md5(data).hexdigest()


def serve(path, *command):
    """Starts a backend and waits until it listens."""
    if os.path.exists(path):
        os.unlink(path)
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + guest.PATIENCE
    while not os.path.exists(path) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    return process


def end(process):
    """Kills a backend."""
    process.kill()
    process.wait()


def boot(directory, script, *options):
    """A guest that runs a script."""
    return guest.Guest("--engine", "bt", "--kernel", guest.kernel(), "--initrd",
                       guest.initramfs(directory, script, *guest.modules(MODULES)),
                       "--append", "console=ttyS0 quiet", "--memory", "256M", *options)


def told(vm):
    """What a script said: {WHAT: rest}."""
    lines = [line.split(" ", 2) for _, line in vm.lines if line.startswith("vhost: ")]
    return {line[1]: line[2] if len(line) > 2 else "" for line in lines}


def disk(cases, directory):
    """A disk whose backend dies."""
    path, image = os.path.join(directory, "blk"), os.path.join(directory, "disk.raw")
    with open(image, "wb") as file:
        file.truncate(64 << 20)
    command = ["qemu-storage-daemon", "--blockdev", f"driver=file,node-name=file,filename={image}",
               "--export", f"type=vhost-user-blk,id=e,node-name=file,addr.type=unix,addr.path={path},"
               "writable=on"]
    daemon = serve(path, *command)
    vm = boot(directory, DISK, "--disk", f"vhost-user={path}")
    if vm.read_until("vhost: go"):
        end(daemon)
        daemon = serve(path, *command)
    status = vm.finish()
    end(daemon)
    said = told(vm)
    cases.equal("disk-power-off", status, 0)
    cases.equal("disk-sectors", said.get("sectors"), str((64 << 20) // 512))
    cases.equal("disk-found", said.get("found"), f"{said.get('first')} {said.get('second')}")
    cases.check("disk-no-errors", "errors" not in said, "the guest saw errors")
    cases.check("disk-backend-told", "backend is gone" in vm.stderr() and "is back" in vm.stderr(),
                vm.stderr())
    if cases.failed:
        vm.show()


def files(cases, directory):
    """A file system whose backend dies."""
    path, work = os.path.join(directory, "fs"), os.path.join(directory, "files")
    blob = os.urandom(4 << 20)
    os.mkdir(work)
    with open(os.path.join(work, "blob"), "wb") as file:
        file.write(blob)
    program = next(filter(os.path.exists, VIRTIOFSD), None)
    if not program:
        print("ok files # skip there is no virtiofsd here")
        return
    command = [program, f"--socket-path={path}", "-o", f"source={work}", "-o", "sandbox=chroot",
               "-f"]
    daemon = serve(path, *command)
    if daemon.poll() is not None:
        print("ok files # skip virtiofsd can't run here: it wants to be root")
        return
    vm = boot(directory, FILES, "--share", f"vhost-user={path}:files")
    if vm.read_until("vhost: kill"):
        end(daemon)
    if vm.read_until("vhost: start"):
        daemon = serve(path, *command)
    status = vm.finish()
    end(daemon)
    said = told(vm)
    cases.equal("files-power-off", status, 0)
    cases.equal("files-to-guest", said.get("blob"), md5(blob))
    with open(os.path.join(work, "back"), "rb") as file:
        cases.equal("files-from-guest", md5(file.read()), said.get("back"))
    cases.check("files-refused", "refused" in said, "no error without a backend")
    cases.equal("files-remounted", said.get("remounted"), said.get("back"))
    if cases.failed:
        vm.show()


class NetBackend(threading.Thread):
    """A host on the card's network, 192.168.7.2, that answers ARP and pings."""

    MAC = bytes.fromhex("525400070002")

    def __init__(self, path):
        super().__init__(daemon=True)
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(path)
        self.listener.listen()
        self.regions, self.rings = [], {}
        self.answered = 0
        self.start()

    def run(self):
        peer, _ = self.listener.accept()
        with peer:
            while True:
                fds = [peer] + [r["kick"] for r in self.rings.values() if r.get("on")]
                for ready in select.select(fds, [], [])[0]:
                    if ready is not peer:
                        os.eventfd_read(ready)
                    elif not self.message(peer):
                        return
                if all(self.rings.get(q, {}).get("on") for q in (0, 1)):
                    self.work()

    def message(self, peer):
        """One message of the front-end's; False at the end."""
        head, fds, _, _ = socket.recv_fds(peer, 12, 8)
        if len(head) < 12:
            return False
        request, _, size = struct.unpack("<III", head)
        body = b""
        while len(body) < size:
            body += peer.recv(size - len(body))
        ring = self.rings.setdefault(body[0], {}) if 8 <= request <= 18 and body else {}
        answer = None
        if request == 1:
            answer = struct.pack("<Q", 1 << 32 | 1 << 30 | 1 << 15)
        elif request == 5:
            self.set_memory(body, fds)
        elif request == 8:
            ring["num"] = struct.unpack_from("<I", body, 4)[0]
        elif request == 9:
            ring["desc"], ring["used"], ring["avail"] = struct.unpack_from("<QQQ", body, 8)
        elif request == 10:
            ring["next"] = ring["done"] = struct.unpack_from("<I", body, 4)[0]
        elif request == 11:
            ring["on"] = False
            answer = struct.pack("<II", body[0], ring["next"])
        elif request in (12, 13):
            ring["kick" if request == 12 else "call"] = fds[0]
        elif request == 15:
            answer = struct.pack("<Q", 0)
        elif request == 18:
            ring["on"] = True
        if answer is not None:
            peer.sendall(struct.pack("<III", request, 5, len(answer)) + answer)
        return True

    def set_memory(self, body, fds):
        """Maps what the front-end gives."""
        self.regions = []
        for i, fd in enumerate(fds):
            gpa, size, _, offset = struct.unpack_from("<QQQQ", body, 8 + 32 * i)
            self.regions.append((gpa, size, mmap.mmap(fd, size, offset=offset)))
            os.close(fd)

    def at(self, gpa):
        """(mapping, offset) of an address."""
        for base, size, mapping in self.regions:
            if base <= gpa < base + size:
                return mapping, gpa - base
        raise ValueError(f"{gpa:#x} is no memory")

    def read(self, gpa, form):
        """Fields in memory."""
        mapping, offset = self.at(gpa)
        return struct.unpack_from(form, mapping, offset)

    def take(self, ring):
        """The next chain: (head, [(address, length)]), or None."""
        if self.read(ring["avail"] + 2, "<H")[0] == ring["next"] & 0xffff:
            return None
        head = self.read(ring["avail"] + 4 + 2 * (ring["next"] % ring["num"]), "<H")[0]
        ring["next"] += 1
        table, at, buffers = ring["desc"], head, []
        while True:
            address, length, flags, after = self.read(table + 16 * at, "<QIHH")
            buffers.append((address, length))
            if not flags & 1:
                return head, buffers
            at = after

    def give(self, ring, head, length):
        """Gives a chain back."""
        mapping, offset = self.at(ring["used"])
        struct.pack_into("<II", mapping, offset + 4 + 8 * (ring["done"] % ring["num"]), head, length)
        ring["done"] += 1
        struct.pack_into("<H", mapping, offset + 2, ring["done"] & 0xffff)
        os.eventfd_write(ring["call"], 1)

    def work(self):
        """Answers what the guest sent."""
        while chain := self.take(self.rings[1]):
            head, buffers = chain
            packet = b"".join(m[o:o + length] for (m, o), length in
                              ((self.at(address), length) for address, length in buffers))
            self.give(self.rings[1], head, 0)
            answer = self.answer(packet[12:])
            chain = self.take(self.rings[0]) if answer else None
            if chain:
                head, buffers = chain
                mapping, offset = self.at(buffers[0][0])
                data = bytes(10) + b"\1\0" + answer
                mapping[offset:offset + len(data)] = data
                self.give(self.rings[0], head, len(data))

    def answer(self, packet):
        """What 192.168.7.2 says to a packet, if anything."""
        kind = packet[12:14]
        if kind == b"\x08\x06" and packet[38:42] == bytes([192, 168, 7, 2]):
            return (packet[6:12] + self.MAC + packet[12:20] + b"\0\2" + self.MAC + packet[38:42] +
                    packet[22:32])
        if kind == b"\x08\0" and packet[23] == 1 and packet[34] == 8:
            self.answered += 1
            body = array.array("B", packet[34:])
            total = (body[2] << 8 | body[3]) + 0x800  # the type's part of the checksum goes
            body[0], body[2], body[3] = 0, (total & 0xffff) >> 8, (total + (total >> 16)) & 0xff
            return (packet[6:12] + self.MAC + packet[12:26] + packet[30:34] + packet[26:30] +
                    body.tobytes())
        return None


def net(cases, directory):
    """A card whose backend is a thread here."""
    path = os.path.join(directory, "net")
    backend = NetBackend(path)
    vm = boot(directory, NET, "--net", f"vhost-user={path},mac=52:54:00:01:02:03")
    status = vm.finish()
    said = told(vm)
    cases.equal("net-power-off", status, 0)
    cases.equal("net-mac", said.get("mac"), "52:54:00:01:02:03")
    cases.check("net-ping", "ping" in said, "no answer")
    cases.check("net-after-a-reset", "again" in said, "no answer")
    cases.check("net-backend", backend.answered >= 6, f"{backend.answered} pings")
    if cases.failed:
        vm.show()


def main():
    """A boot for each."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    cases = guest.Cases()
    for part in (disk, files, net):
        if not sys.argv[1:] or part.__name__ in sys.argv[1:]:
            with guest.temporary() as directory:
                part(cases, directory)
    cases.done()


main()
