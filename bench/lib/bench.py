"""What the benchmarks share: machines, programs to run in them, lines with their times, tables."""

import os
import select
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
DOPPEL = os.environ.get("DOPPEL", os.path.join(ROOT, "build", "doppel"))
APPEND = "console=ttyS0 quiet"


class BenchError(Exception):
    """A command that didn't do what the benchmark needs of it."""


def build(command):
    """Runs a compiler or the like; shows what it says only when it fails."""
    done = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          check=False)
    if done.returncode:
        raise BenchError(f"{' '.join(command)}\n{done.stdout}")


def cloud_kernel():
    """The path of Debian's cloud kernel, fetched when it is not there."""
    done = subprocess.run([os.path.join(ROOT, "scripts", "fetch-kernel"), "cloud-amd64"],
                          text=True, stdout=subprocess.PIPE, check=False)
    if done.returncode:
        raise BenchError("there is no kernel")
    return done.stdout.strip()


def make_initramfs(directory, script, *programs):
    """An initramfs that runs `script` (text) with `programs` (paths) in /bin; returns its path."""
    path = os.path.join(directory, "initramfs")
    with open(path + ".script", "w", encoding="ascii") as file:
        file.write(script)
    build([os.path.join(ROOT, "scripts", "make-initramfs"), path, path + ".script", *programs])
    return path


def doppel_command(engine, memory, kernel, initramfs):
    """doppel, booting Linux with its console on stdout."""
    return [DOPPEL, "run", "--engine", engine, "--memory", memory, "--kernel", kernel,
            "--initrd", initramfs, "--append", APPEND]


def qemu_command(memory, kernel, initramfs):
    """The same by QEMU's TCG, with no device that this doesn't need."""
    return ["qemu-system-x86_64", "-accel", "tcg", "-cpu", "max", "-m", memory, "-nodefaults",
            "-display", "none", "-serial", "stdio", "-kernel", kernel, "-initrd", initramfs,
            "-append", APPEND]


def _cpu_seconds(pid):
    """Processor seconds that all threads of a process have used until now."""
    # What clock_getcpuclockid(3) answers on Linux: ~pid, and 2 for the scheduler's exact count.
    return time.clock_gettime(~pid << 3 | 2)


def peak_memory(pid):
    """The most bytes of memory that a process has had resident until now."""
    with open(f"/proc/{pid}/status", encoding="ascii") as file:
        for line in file:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    raise BenchError(f"process {pid} has no memory")


def timed_lines(command, patience, clock="wall", pipe=False, started=None):
    """Runs a command and yields (seconds, line) for each line of its stdout, as it arrives.

    The seconds count from the start of the process: of the wall, or with clock="cpu" of the
    processor time used. With pipe=True the lines come from a pipe of their own, whose path, good
    within the command's process, replaces "{pipe}" in its words. `started` is called with the
    process's number. The process is ended when the caller stops. When it ends by itself with
    another status than 0, a BenchError has the last that it said on stderr.
    """
    read_end, write_end = os.pipe()
    command = [word.replace("{pipe}", f"/dev/fd/{write_end}") if pipe else word for word in command]
    begin = time.monotonic()
    with tempfile.TemporaryFile() as errors, \
         subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=errors,
                          stdout=subprocess.DEVNULL if pipe else write_end,
                          pass_fds=(write_end,) if pipe else ()) as process:
        os.close(write_end)
        if started:
            started(process.pid)
        try:
            rest = b""
            while True:
                left = begin + patience - time.monotonic()
                if left <= 0 or not select.select([read_end], [], [], left)[0]:
                    raise BenchError(f"not done after {patience} s")
                data = os.read(read_end, 65536)
                if not data:
                    if process.wait():
                        errors.seek(0)
                        said = errors.read().decode("ascii", "replace").strip().splitlines()
                        raise BenchError(said[-1] if said else f"status {process.returncode}")
                    return
                if b"\n" not in data:
                    rest += data
                    continue
                if clock == "cpu":
                    now = _cpu_seconds(process.pid)
                else:
                    now = time.monotonic() - begin
                *lines, rest = (rest + data).split(b"\n")
                for line in lines:
                    yield now, line.decode("ascii", "replace").strip("\r")
        finally:
            process.kill()
            os.close(read_end)


def geometric_mean(values):
    """Of positive numbers: the fair mean of ratios."""
    return statistics.geometric_mean(values)


def in_unit(nanoseconds):
    """For a column: three digits and a unit."""
    for unit in ("ns", "us", "ms", "s"):
        if nanoseconds < 1000 or unit == "s":
            break
        nanoseconds /= 1000
    digits = 0 if nanoseconds >= 100 else 1 if nanoseconds >= 10 else 2
    return f"{nanoseconds:.{digits}f} {unit}"


def table(header, rows):
    """Prints rows of strings: the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    for row in [header, *rows]:
        print("  ".join(cell.rjust(width) if i else cell.ljust(width)
                        for i, (cell, width) in enumerate(zip(row, widths))).rstrip())


def fail(name, error):
    """Ends the benchmark with one line."""
    sys.exit(f"{name}: {error}")
