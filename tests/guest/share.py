#!/usr/bin/python3
"""Shared directories end to end: Debian's kernel mounts one by virtiofs and works in it.

Files with checksums to the guest and back, a tree of small ones, moves, links that point outside, owners
and modes, changes of the host's; a second directory that is read-only. The host judges what it finds.
"""

import hashlib
import os
import stat

import guest

MODULES = ["virtio_ring", "virtio", "virtio_pci_modern_dev", "virtio_pci_legacy_dev", "virtio_pci",
           "fuse", "virtiofs"]
FILES = 400  # of the tree

SCRIPT = "".join(f"insmod /lib/{name}.ko\n" for name in MODULES) + r"""
mkdir -p /mnt /ro
mount -t virtiofs work /mnt || echo "share: no mount"
mount -t virtiofs other /ro || echo "share: no read-only mount"
mount -t virtiofs nobody /tmp 2>/dev/null && echo "share: mounted what isn't there"

echo "share: blob $(md5sum </mnt/blob | cut -c1-32)"
dd if=/dev/urandom of=/mnt/back bs=64k count=100 2>/dev/null
echo "share: back $(md5sum </mnt/back | cut -c1-32)"
cp /mnt/blob /mnt/copy

# A tree as a build makes and reads it.
mkdir /mnt/tree
for d in 0 1 2 3; do
    mkdir /mnt/tree/$d
    for f in $(seq FILES_EACH); do echo "$d $f" >/mnt/tree/$d/$f.c; done
done
echo "share: tree $(find /mnt/tree -name '*.c' | wc -l) $(cat /mnt/tree/*/*.c | md5sum | cut -c1-32)"
mv /mnt/tree/3 /mnt/tree/moved
mv /mnt/tree/0/1.c /mnt/tree/moved/from0.c
rm -r /mnt/tree/1
echo "share: after $(find /mnt/tree -name '*.c' | wc -l) $(cat /mnt/tree/moved/from0.c)"
cp -a /mnt/tree/2 /mnt/tree/again && rm -r /mnt/tree/2

# Links lead where they lead for the guest, and nowhere on the host.
echo "of the guest" >/secret
echo "share: outside $(cat /mnt/outside) $(cat /mnt/up/secret) $(cat /mnt/../secret)"
echo written >/mnt/outside
echo "share: written $(cat /secret)"
ln -s /etc/passwd /mnt/passwd
echo "share: link $(cut -d: -f1 /mnt/passwd)"
mknod /mnt/disk b 8 0 2>/dev/null && echo "share: made a device"
mkfifo /mnt/fifo
(cat /mnt/fifo >/tmp/fifo; ) & echo through >/mnt/fifo; wait
echo "share: fifo $(cat /tmp/fifo)"

# Owners and modes.
echo mine >/mnt/owned
chown 1234:99 /mnt/owned && chmod 4751 /mnt/owned
echo "share: owned $(stat -c '%u %g %a' /mnt/owned)"
touch -d '2001-02-03 04:05:06' /mnt/owned
echo "share: time $(stat -c %Y /mnt/owned)"
truncate -s 3 /mnt/owned
ln /mnt/owned /mnt/second
echo "share: links $(stat -c '%h %s' /mnt/second)"

echo "share: read-only $(cat /ro/note)"
echo x 2>/dev/null >/ro/note && echo "share: wrote to the read-only one"
rm /ro/note 2>/dev/null && echo "share: removed there"
touch /ro/new 2>/dev/null && echo "share: created there"

# The host changes a file that the guest has read.
cat /mnt/changing >/dev/null
echo "share: change"
until grep -q changed /mnt/changing; do usleep 100000; done
until test -e /mnt/appeared; do usleep 100000; done
echo "share: changed"
sync
umount /mnt && mount -t virtiofs work /mnt && echo "share: again $(cat /mnt/second)"
""".replace("FILES_EACH", str(FILES // 4))


def md5(data):
    """As md5sum prints it."""
    return hashlib.md5(data).hexdigest()


def read(*path):
    """A file's bytes, or None."""
    try:
        with open(os.path.join(*path), "rb") as file:
            return file.read()
    except OSError:
        return None


def write(data, *path):
    """Makes a file."""
    with open(os.path.join(*path), "wb") as file:
        file.write(data)


def prepare(directory):
    """What the host has before: (the shared directory, the read-only one, the blob)."""
    work, other = os.path.join(directory, "work:dir"), os.path.join(directory, "other")
    blob = os.urandom(5 << 20)
    os.mkdir(work)
    os.mkdir(other)
    write(blob, work, "blob")
    write(b"before\n", work, "changing")
    write(b"to read\n", other, "note")
    write(b"secret", directory, "secret")
    os.symlink("../secret", os.path.join(work, "outside"))
    os.symlink("..", os.path.join(work, "up"))
    return work, other, blob


def judge_tree(cases, work, said):
    """The tree, as the guest told of it and as the host finds it."""
    each = FILES // 4
    # The shell's order of *.c is that of the names.
    text = "".join(f"{d} {f}\n" for d in range(4)
                   for f in sorted(range(1, each + 1), key=lambda n: f"{n}.c"))
    cases.equal("share-tree", said.get("tree"), f"{FILES} {md5(text.encode())}")
    cases.equal("share-moved", said.get("after"), f"{FILES - each} 0 1")
    cases.equal("share-host-tree", sorted(os.listdir(os.path.join(work, "tree"))),
                ["0", "again", "moved"])
    cases.equal("share-host-moved", read(work, "tree", "moved", "from0.c"), b"0 1\n")
    cases.equal("share-host-copied", len(os.listdir(os.path.join(work, "tree", "again"))), each)


def judge_owner(cases, work, said):
    """Owner and mode are the guest's; on the host the file is ours and runs as nobody."""
    found = os.stat(os.path.join(work, "owned"))
    cases.equal("share-owner", said.get("owned"), "1234 99 4751")
    cases.equal("share-host-owner", (found.st_uid, found.st_gid), (os.geteuid(), os.getegid()))
    cases.equal("share-host-mode", oct(stat.S_IMODE(found.st_mode)), "0o751")
    cases.equal("share-time", said.get("time"), "981173106")
    cases.equal("share-links", said.get("links"), "2 3")


def main():
    """One boot."""
    cases = guest.Cases()
    with guest.temporary() as directory:
        work, other, blob = prepare(directory)
        vm = guest.Guest("--engine", "bt", "--kernel", guest.kernel(), "--initrd",
                         guest.initramfs(directory, SCRIPT, *guest.modules(MODULES)),
                         "--append", "console=ttyS0 quiet", "--memory", "256M",
                         "--share", work + ":work", "--share", other + ":other,readonly")
        if vm.read_until("share: change"):
            write(b"changed, and longer\n", work, "changing")
            write(b"", work, "appeared")
        cases.equal("share-power-off", vm.finish(), 0)
        lines = [line.split(" ", 2) for _, line in vm.lines if line.startswith("share: ")]
        said = {line[1]: line[2] if len(line) > 2 else "" for line in lines}

        cases.equal("share-to-guest", said.get("blob"), md5(blob))
        cases.equal("share-from-guest", md5(read(work, "back") or b""), said.get("back"))
        cases.check("share-copy", read(work, "copy") == blob, "it isn't the same")
        judge_tree(cases, work, said)
        for wrong in ("no", "mounted", "made", "wrote", "removed", "created"):
            cases.check(f"share-nothing-{wrong}", wrong not in said, said.get(wrong))
        cases.equal("share-outside", read(directory, "secret"), b"secret")
        cases.equal("share-outside-in-guest", said.get("outside"), " ".join(["of the guest"] * 3))
        cases.equal("share-outside-written", said.get("written"), "written")
        cases.equal("share-link", said.get("link"), "root")
        cases.equal("share-fifo", said.get("fifo"), "through")
        judge_owner(cases, work, said)
        cases.equal("share-read-only", said.get("read-only"), "to read")
        cases.equal("share-read-only-host", (os.listdir(other), read(other, "note")),
                    (["note"], b"to read\n"))
        cases.check("share-host-changes", "changed" in said, "the guest didn't see them")
        cases.equal("share-again", said.get("again"), "min")
        if cases.failed:
            vm.show()
    cases.done()


main()
