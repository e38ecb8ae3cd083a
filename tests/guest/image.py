#!/usr/bin/python3
"""`doppel image`, with qemu-img as its judge: create, info, check, convert, resize, commit, locks, and
refusals."""

import itertools
import os
import random
import subprocess
import sys

import guest


def doppel(*args):
    """(status, stdout, stderr) of doppel image ARGS."""
    result = subprocess.run([guest.DOPPEL, "image", *args], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, check=False)
    return result.returncode, result.stdout, result.stderr


# Holds a lock as doppel does, until it is killed.
HOLD = """
import fcntl, struct, sys, time
file = open(sys.argv[1], "r+b")
for start, length in LOCKS:
    fcntl.fcntl(file, fcntl.F_OFD_SETLK, struct.pack("hhqqi", KIND, 0, start, length, 0))
print("held", flush=True)
time.sleep(1000)
"""
WRITER = HOLD.replace("KIND", "fcntl.F_WRLCK").replace("LOCKS", "[(0, 0)]")
READER = HOLD.replace("KIND", "fcntl.F_RDLCK").replace("LOCKS", "[(100, 1), (201, 1), (203, 1)]")


class Test:
    """A directory of images, and cases about them."""

    def __init__(self, directory):
        self.cases = guest.Cases()
        self.directory = directory

    def path(self, name):
        """A file there."""
        return os.path.join(self.directory, name)

    def done(self, name, *args):
        """doppel image ARGS works and says nothing on stderr."""
        status, out, err = doppel(*args)
        self.cases.check(name, status == 0 and not err, f"{status}: {err}")
        return out

    def refused(self, name, says, *args):
        """doppel image ARGS fails with one line that says it."""
        status, _, err = doppel(*args)
        self.cases.check(name, status == 2 and says in err and err.count("\n") == 1,
                         f"{status}: {err}")

    def sound(self, name, image):
        """qemu-img finds nothing wrong."""
        status, output = guest.tool("qemu-img", "check", image)
        self.cases.check(name, status == 0, output)

    def same(self, name, one, other):
        """Two images hold the same disk."""
        status, output = guest.tool("qemu-img", "compare", one, other)
        self.cases.check(name, status == 0, output)

    def data(self, name, size, seed, pieces=20):
        """A sparse raw file with pieces of noise."""
        noise = random.Random(seed)
        with open(self.path(name), "wb") as file:
            file.truncate(size)
            for _ in range(pieces):
                file.seek(noise.randrange(0, size - 70000) // 512 * 512)
                file.write(noise.randbytes(noise.randrange(512, 70000) // 512 * 512))
        return self.path(name)


def convert(test):
    """From and to each format, compressed ones and chains included."""
    raw = test.data("a.raw", 20 << 20, 1)
    for options in ([], ["--cluster-size", "512"], ["--cluster-size", "2M"],
                    ["--qcow2-version", "2"]):
        name = "-".join(["image-convert", *options]).replace("--", "")
        out = test.path("b.qcow2")
        test.done(name, "convert", "--force", *options, raw, out)
        test.sound(name + "-check", out)
        test.same(name + "-compare", raw, out)
    for compression in ("zlib", "zstd"):
        packed, back = test.path("packed.qcow2"), test.path("back.raw")
        guest.tool("qemu-img", "convert", "-c", "-O", "qcow2", "-o", f"compression_type={compression}", raw,
                 packed)
        test.done(f"image-convert-{compression}", "convert", "--force", "-O", "raw", packed, back)
        test.same(f"image-convert-{compression}-compare", raw, back)
    top = test.path("top.qcow2")
    test.done("image-create-backing", "create", "-b", "packed.qcow2", top)
    subprocess.run(["qemu-io", "-f", "qcow2", "-c", "write -P 7 1M 300k", "-c",
                    "write -z 5M 1M", top], check=True, stdout=subprocess.DEVNULL)
    test.done("image-convert-chain", "convert", "--force", top, test.path("flat.qcow2"))
    test.same("image-convert-chain-compare", top, test.path("flat.qcow2"))
    with open(test.path("odd.raw"), "wb") as file:
        file.write(os.urandom(1000))
    test.done("image-convert-odd", "convert", "--force", test.path("odd.raw"), test.path("odd.qcow2"))
    status, output = guest.tool("qemu-img", "compare", test.path("odd.raw"), test.path("odd.qcow2"))
    test.cases.check("image-convert-odd-compare", status == 0, output)


def compress(test):
    """Compressed images that we write are what qemu-img reads, and smaller."""
    text = test.data("text.raw", 20 << 20, 3)
    with open(text, "r+b") as file: # beside the noise, which nothing makes smaller
        for at in range(0, 16 << 20, 1 << 20):
            file.seek(at + at // 300)
            file.write(b"".join(b"%d bottles\n" % n for n in range(at, at + 40000)))
        file.truncate((20 << 20) - 512 * 3) # no whole cluster at the end
    for kind, options in itertools.product(("zlib", "zstd"), (
            [], ["--cluster-size", "512"], ["--cluster-size", "2M"], ["-b", text])):
        name = "-".join(["image-compress", kind, *options[:2][:1]]).replace("--", "")
        out = test.path("packed.qcow2")
        test.done(name, "convert", "--force", "--compress", kind, *options, text, out)
        test.sound(name + "-check", out)
        test.same(name + "-compare", text, out)
        test.cases.check(name + "-info", f"compression: {kind}" in test.done(name + "-says", "info", out))
        if not options:
            test.cases.check(name + "-smaller", os.stat(out).st_size * 2 < os.stat(text).st_blocks * 512,
                             f"{os.stat(out).st_size} of {os.stat(text).st_blocks * 512}")
        # A disk like any other: what is written there is found, and what was there is freed.
        subprocess.run(["qemu-io", "-f", "qcow2", "-c", "write -P 7 1M 300k", out], check=True,
                       stdout=subprocess.DEVNULL)
        test.sound(name + "-written-check", out)
    packed = test.path("packed.qcow2")
    test.done("image-compress-again", "convert", "--force", "--compress", "zlib", packed,
              test.path("again.qcow2"))
    test.same("image-compress-again-compare", packed, test.path("again.qcow2"))
    test.refused("image-compress-raw", "only a qcow2", "convert", "-O", "raw", "-c", "zlib", text,
                 test.path("e"))
    test.refused("image-compress-old", "version 2", "convert", "-c", "zstd", "--qcow2-version", "2",
                 text, test.path("e"))
    test.refused("image-compress-unknown", "zlib or zstd", "convert", "-c", "lzo", text, test.path("e"))


def locks(test):
    """One writer, or any number of readers: told in a line, and gone with the process."""
    image = test.path("locked.qcow2")
    test.done("image-lock-create", "create", image, "1M")
    for mode, script, refused in (
            ("writer", WRITER, ("check", "resize")),
            ("reader", READER, ("resize",))):
        holder = subprocess.Popen([sys.executable, "-c", script, image], stdout=subprocess.PIPE)
        holder.stdout.readline()
        for command in ("check", "resize"):
            args = [command, image] + (["2M"] if command == "resize" else [])
            if command in refused:
                test.refused(f"image-lock-{mode}-{command}", "in use by another process", *args)
            else:
                test.done(f"image-lock-{mode}-{command}", *args)
        # QEMU's programs keep out, and let in, whom doppel does.
        for command, args in (("check", ()), ("resize", ("2M",))):
            status, output = guest.tool("qemu-img", command, image, *args)
            test.cases.check(f"image-lock-{mode}-qemu-{command}",
                             (status != 0 and "lock" in output) == (command in refused),
                             f"{status}: {output}")
        holder.kill()
        holder.wait()
    test.done("image-lock-gone", "resize", image, "2M")
    # Whoever shows a backing image reads it, so nobody may change that.
    top = test.path("top.qcow2")
    test.done("image-lock-top", "create", "--force", "-b", image, top)
    holder = subprocess.Popen([sys.executable, "-c", WRITER, image], stdout=subprocess.PIPE)
    holder.stdout.readline()
    test.refused("image-lock-backing", "in use by another process", "convert", top, test.path("e"))
    holder.kill()
    holder.wait()
    # One of QEMU's that writes keeps us out, too.
    holder = subprocess.Popen(["qemu-io", "-f", "qcow2", image], stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE)
    holder.stdin.write(b"write 0 4k\n")
    holder.stdin.flush()
    holder.stdout.readline()
    test.refused("image-lock-qemu-writer", "in use by another process", "check", image)
    holder.kill()
    holder.wait()


def commit(test):
    """Into a raw and a qcow2 backing file."""
    for kind in ("raw", "qcow2"):
        base, top = test.path("base." + kind), test.path("over.qcow2")
        raw = test.data("c.raw", 8 << 20, 2)
        test.done(f"image-commit-{kind}-base", "convert", "--force", "-O", kind, raw, base)
        test.done(f"image-commit-{kind}-top", "create", "--force", "-b", os.path.basename(base),
                  top, "12M")
        subprocess.run(["qemu-io", "-f", "qcow2", "-c", "write -P 9 2M 500k", "-c",
                        "write -z 4M 1M", "-c", "write -P 5 11M 64k", top], check=True,
                       stdout=subprocess.DEVNULL)
        test.done(f"image-commit-{kind}-flat", "convert", "--force", "-O", "raw", top,
                  test.path("flat.raw"))
        test.done(f"image-commit-{kind}", "commit", "-q", top)
        test.same(f"image-commit-{kind}-compare", test.path("flat.raw"), base)
        test.same(f"image-commit-{kind}-top-compare", test.path("flat.raw"), top)
        test.sound(f"image-commit-{kind}-check", top)
        if kind == "qcow2":
            test.sound(f"image-commit-{kind}-base-check", base)


def check_and_resize(test):
    """Leaks are told and mended; sizes change."""
    image = test.path("d.qcow2")
    test.done("image-create", "create", image, "1G")
    out = test.done("image-info", "info", image)
    test.cases.check("image-info-says", "format: qcow2" in out and "1073741824 bytes" in out, out)
    test.done("image-check", "check", image)
    guest.tool("qemu-img", "convert", "-n", "-O", "qcow2", test.path("a.raw"), image)
    with open(image, "r+b") as file:  # a cluster more counts as used: a leak
        file.seek(0, os.SEEK_END)
        end = file.tell()
        file.write(bytes(65536))
        file.seek(2 * 65536 + 2 * (end // 65536) + 1)
        file.write(b"\1")
    out = test.done("image-check-leak", "check", image)
    test.cases.check("image-check-leak-says", "1 leaked" in out, out)
    test.done("image-check-repair", "check", "--repair", image)
    test.sound("image-check-repair-check", image)
    test.done("image-resize-grow", "resize", image, "+3G")
    test.sound("image-resize-grow-check", image)
    test.refused("image-resize-shrink", "--shrink", "resize", image, "16M")
    test.done("image-resize-shrink-asked", "resize", "--shrink", image, "16M")
    test.sound("image-resize-shrink-check", image)
    subprocess.run(["truncate", "-s", "16M", test.path("a.raw")], check=True)
    test.same("image-resize-shrink-compare", image, test.path("a.raw"))


def refusals(test):
    """One line each."""
    image = test.path("d.qcow2")
    test.refused("image-no-file", "No such file", "info", test.path("none"))
    test.refused("image-exists", "exists already", "create", image, "1G")
    test.refused("image-no-size", "size is missing", "create", test.path("e"))
    test.refused("image-bad-size", "size", "create", test.path("e"), "big")
    test.refused("image-bad-format", "unknown image format", "create", "-f", "vmdk",
                 test.path("e"), "1M")
    test.refused("image-no-backing", "No such file", "create", "-b", "none", test.path("e"))
    test.refused("image-raw-backing", "only a qcow2", "create", "-f", "raw", "-b", image,
                 test.path("e"), "1M")
    test.refused("image-bad-cluster", "power of two", "create", "--cluster-size", "3K",
                 test.path("e"), "1M")
    test.refused("image-commit-alone", "no backing", "commit", image)
    test.refused("image-raw-check", "nothing to check", "check", test.path("a.raw"))
    test.refused("image-unknown-command", "unknown command", "frobnicate")
    test.refused("image-unknown-option", "unknown option", "info", "--repair", image)
    test.refused("image-too-many", "too many", "info", image, image)
    test.cases.check("image-nothing-left", not os.path.exists(test.path("e")), "a file is left")
    loop = test.path("loop.qcow2")
    test.done("image-loop", "create", "-b", image, loop)
    guest.tool("qemu-img", "rebase", "-u", "-b", loop, "-F", "qcow2", image)
    test.refused("image-loop-refused", "circle", "convert", loop, test.path("e"))


def main():
    """All of it."""
    with guest.temporary() as directory:
        test = Test(directory)
        convert(test)
        compress(test)
        locks(test)
        commit(test)
        check_and_resize(test)
        refusals(test)
    test.cases.done()


main()
