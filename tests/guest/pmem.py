#!/usr/bin/python3
"""Files as memory, end to end: Debian's kernel makes a file system on /dev/pmem0 and writes to it, by its page cache
and by DAX; what it synced is in the host's file when doppel is killed, and the next boot reads it, of the same file
read-only."""

import os

import guest

MODULES = ["virtio_ring", "virtio", "virtio_pci_modern_dev", "virtio_pci_legacy_dev", "virtio_pci",
           "libnvdimm", "nd_btt", "nd_pmem", "nd_virtio", "virtio_pmem"]
SIZE = 64 << 20
# Two pieces, so that the text is not found in the initramfs that it comes from.
MARKER = ("doppel persistent ", "memory ")

# Linux looks at a region beside the program that loads its driver.
LOAD = "".join(f"insmod /lib/{name}.ko\n" for name in MODULES) + """
until [ -e /dev/pmem0 ]; do sleep 0.1; done
mkdir -p /mnt
"""

WRITE = LOAD + f"""
echo "pmem: sectors $(cat /sys/block/pmem0/size)"
mke2fs -F -b 4096 /dev/pmem0 >/dev/null 2>&1
mount -t ext4 /dev/pmem0 /mnt
for i in $(seq 2000); do echo "{MARKER[0]}""{MARKER[1]}$i"; done >/mnt/text
dd if=/dev/urandom of=/mnt/cached bs=64k count=64 2>/dev/null
umount /mnt
mount -t ext4 -o dax /dev/pmem0 /mnt && echo "pmem: dax $(grep -c 'pmem0.*dax' /proc/mounts)"
dd if=/dev/urandom of=/mnt/direct bs=64k count=64 2>/dev/null
sync
echo "pmem: wrote $(cat /mnt/cached /mnt/direct | md5sum | cut -c1-32)"
while :; do sleep 1; done
"""

READ = LOAD + """
mount -t ext4 -o ro,noload /dev/pmem0 /mnt
echo "pmem: read $(cat /mnt/cached /mnt/direct | md5sum | cut -c1-32)"
umount /mnt
dd if=/dev/urandom of=/dev/pmem0 bs=64k count=16 conv=fsync 2>/dev/null
"""


def boot(directory, engine, script, pmem):
    """A guest with a file as memory, which runs a script."""
    return guest.Guest("--engine", engine, "--kernel", guest.kernel(), "--initrd",
                       guest.initramfs(directory, script, *guest.modules(MODULES)), "--append",
                       "console=ttyS0 quiet", "--memory", "256M", "--pmem", pmem)


def said(vm, what):
    """The rest of the line "pmem: WHAT REST"."""
    prefix = f"pmem: {what} "
    return next((line[len(prefix):] for _, line in vm.lines if line.startswith(prefix)), None)


def play(cases, directory, engine):
    """Two boots."""
    path = os.path.join(directory, "pmem")
    with open(path, "wb") as file:
        file.truncate(SIZE)

    vm = boot(directory, engine, WRITE, path)
    vm.read_until("pmem: wrote")
    vm.process.kill()
    vm.process.wait()
    cases.equal(f"{engine}-sectors", said(vm, "sectors"), str(SIZE // 512))
    cases.equal(f"{engine}-dax", said(vm, "dax"), "1")
    wrote = said(vm, "wrote")
    with open(path, "rb") as file:
        before = file.read()
    cases.equal(f"{engine}-in-the-file", before.count("".join(MARKER).encode()), 2000)

    second = boot(directory, engine, READ, path + ",readonly")
    cases.equal(f"{engine}-power-off", second.finish(), 0)
    cases.check(f"{engine}-kept", wrote and said(second, "read") == wrote,
                f"{wrote} became {said(second, 'read')}")
    with open(path, "rb") as file:
        cases.check(f"{engine}-readonly", file.read() == before, "the guest changed the file")
    if cases.failed:
        vm.show()
        second.show()


def main():
    """All of it."""
    cases = guest.Cases()
    with guest.temporary() as directory:
        play(cases, directory, "bt")
    cases.done()


main()
