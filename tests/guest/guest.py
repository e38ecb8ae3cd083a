"""What the guest tests share: where the program and the kernels are, how a guest is run, and cases.

A case prints one line for tests/run, "ok NAME" or "not ok NAME: why".
"""

import os
import re
import select
import subprocess
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
DOPPEL = os.environ.get("DOPPEL", os.path.join(ROOT, "build", "doppel"))

# Seconds in which a guest must have said what a test waits for: a slow host, sanitizers.
PATIENCE = 300

# The processors of our own guests, where that isn't one. These are not run in lockstep, which is for one.
CPUS = {"litmus64": 4, "smp64": 4}


class Cases:
    """Counts what passed and failed; `done` ends the process with the right status."""

    def __init__(self):
        self.failed = 0

    def check(self, name, passed, why=""):
        """One case. `why` is told when it failed."""
        if passed:
            print(f"ok {name}", flush=True)
        else:
            self.failed += 1
            print(f"not ok {name}: {why}", flush=True)
        return passed

    def equal(self, name, got, want):
        """One case: both are the same."""
        return self.check(name, got == want, f"got {got!r}, want {want!r}")

    def done(self):
        """Ends the test."""
        sys.exit(1 if self.failed else 0)


def kernel(flavour="cloud-amd64"):
    """The path of Debian's kernel, fetched when it is not there."""
    return subprocess.run([os.path.join(ROOT, "scripts", "fetch-kernel"), flavour], check=True,
                          stdout=subprocess.PIPE, text=True).stdout.strip()


def broken_kernel(path):
    """A copy of a bzImage that ends with a triple fault as soon as it is entered: by either of its entries, at 0 and at
    0x200 of its protected-mode part (Documentation/arch/x86/boot.rst)."""
    with open(kernel(), "rb") as file:
        data = bytearray(file.read())
    code = (data[0x1f1] + 1) * 512
    for entry in (0, 0x200):
        data[code + entry:code + entry + 2] = b"\x0f\x0b" # UD2, without an IDT
    with open(path, "wb") as file:
        file.write(data)


def modules(names, flavour="cloud-amd64"):
    """The paths of modules of Debian's kernel."""
    folder = subprocess.run([os.path.join(ROOT, "scripts", "fetch-kernel"), "--modules", flavour],
                            check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
    return [os.path.join(folder, name + ".ko") for name in names]


def debian_image():
    """The path of a disk image of Debian 12, built when it is not there: not to be written to."""
    return subprocess.run([os.path.join(ROOT, "scripts", "debian-image")], check=True,
                          stdout=subprocess.PIPE, text=True).stdout.strip()


def initramfs(directory, script=None, *files):
    """Builds an initramfs in `directory` and returns its path.

    `script` is text to run, or None; `files` are paths of what it finds in /bin, and in
    /lib when they are modules.
    """
    out = os.path.join(directory, "initramfs")
    args = [os.path.join(ROOT, "scripts", "make-initramfs"), out]
    if script is not None:
        path = os.path.join(directory, "script")
        with open(path, "w", encoding="ascii") as file:
            file.write(script)
        args += [path, *files]
    subprocess.run(args, check=True)
    return out


def libraries(program):
    """The shared libraries of a program, and its loader, as ldd tells."""
    out = subprocess.run(["ldd", program], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                         text=True, check=False).stdout
    return set(re.findall(r"(/\S+)", out))


def tool(*command):
    """Runs a program of the host's; (status, output)."""
    result = subprocess.run(command, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            text=True)
    return result.returncode, result.stdout


def boot_disk(directory, source):
    """A disk of 1 MiB that begins with a boot sector, and what it reads, in assembly; returns its path."""
    text, obj, image = (os.path.join(directory, "boot" + end) for end in (".S", ".o", ".img"))
    with open(text, "w", encoding="ascii") as file:
        file.write(source)
    subprocess.run(["as", "--32", text, "-o", obj], check=True)
    subprocess.run(["ld", "-m", "elf_i386", "-Ttext", "0x7c00", "--oformat", "binary", obj, "-o",
                    image], check=True)
    os.truncate(image, 1 << 20)
    return image


def temporary():
    """A directory that goes with the `with` statement."""
    return tempfile.TemporaryDirectory(prefix="doppel-test.")


class Guest:
    """A running doppel, its console read line by line with the time at which each arrived.

    `wrap` is a command that becomes doppel (by exec), or nothing.
    """

    def __init__(self, *options, stdin=subprocess.DEVNULL, wrap=()):
        self.errors = tempfile.TemporaryFile()
        self.process = subprocess.Popen([*wrap, DOPPEL, "run", *options], stdin=stdin,
                                        stdout=subprocess.PIPE, stderr=self.errors)
        self.pending = b""
        self.lines = []  # (seconds, text)

    def read_until(self, text, patience=PATIENCE):
        """Reads lines until one begins with `text` (returned), or None at the end or in vain."""
        deadline = time.monotonic() + patience
        while True:
            while b"\n" in self.pending:
                line, self.pending = self.pending.split(b"\n", 1)
                line = line.decode(errors="replace").strip("\r") # GRUB ends a line with "\n\r"
                self.lines.append((time.monotonic(), line))
                if text is not None and line.startswith(text):
                    return line
            if not self._read(deadline):
                return None

    def expect(self, pattern, patience=PATIENCE):
        """Reads until the output matches `pattern` (a regular expression of bytes), whether or not its line has
        ended; what comes next is read after the match. Returns the match, or None at the end or in vain."""
        deadline = time.monotonic() + patience
        while not (match := re.search(pattern, self.pending)):
            if not self._read(deadline):
                return None
        seen, self.pending = self.pending[:match.end()], self.pending[match.end():]
        self.lines += [(time.monotonic(), line.strip("\r"))
                       for line in seen.decode(errors="replace").split("\n")]
        return match

    def _read(self, deadline):
        """Reads what there is, or waits for it; returns whether something came."""
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([self.process.stdout], [], [], left)[0]:
            return False
        data = os.read(self.process.stdout.fileno(), 65536)
        self.pending += data
        return bool(data)

    def finish(self, patience=PATIENCE):
        """Reads to the end; returns the exit status, or None when it had to be killed."""
        self.read_until(None, patience)
        try:
            return self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            return None

    def stderr(self):
        """What it said on stderr."""
        self.errors.seek(0)
        return self.errors.read().decode(errors="replace")

    def read_errors_until(self, text, times=1, patience=PATIENCE):
        """Waits until it has said `text` so many times on stderr; whether it has."""
        deadline = time.monotonic() + patience
        while self.stderr().count(text) < times:
            if self.process.poll() is not None or time.monotonic() > deadline:
                return self.stderr().count(text) >= times
            time.sleep(0.05)
        return True

    def show(self):
        """Prints the console, for whoever reads about a failure."""
        unread = self.pending.decode(errors="replace").split("\n") if self.pending else []
        for line in [line for _, line in self.lines] + unread:
            print(f"    | {line}")
        print(self.stderr(), end="")
