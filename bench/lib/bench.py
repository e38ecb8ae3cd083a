"""What the benchmarks share: build and run a command, time the lines it prints, print tables."""

import os
import select
import statistics
import subprocess
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
DOPPEL = os.environ.get("DOPPEL", os.path.join(ROOT, "build", "doppel"))


class BenchError(Exception):
    """A command that didn't do what the benchmark needs of it."""


def build(command):
    """Runs a compiler or the like; shows what it says only when it fails."""
    done = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          check=False)
    if done.returncode:
        raise BenchError(f"{' '.join(command)}\n{done.stdout}")


def _cpu_seconds(pid):
    """Processor seconds that all threads of a process have used until now."""
    # What clock_getcpuclockid(3) answers on Linux: ~pid, and 2 for the scheduler's exact count.
    return time.clock_gettime(~pid << 3 | 2)


def timed_lines(command, patience, clock="wall", pipe=False):
    """Runs a command and yields (seconds, line) for each line of its stdout, as it arrives.

    The seconds count from the start of the process: of the wall, or with clock="cpu" of the
    processor time used. With pipe=True the lines come from a pipe of their own, whose path, good within the
    command's process, replaces "{pipe}" in its words. The process is ended when the caller stops.
    """
    read_end, write_end = os.pipe()
    command = [word.replace("{pipe}", f"/dev/fd/{write_end}") if pipe else word for word in command]
    begin = time.monotonic()
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                          stdout=subprocess.DEVNULL if pipe else write_end,
                          pass_fds=(write_end,) if pipe else ()) as process:
        os.close(write_end)
        try:
            rest = b""
            while True:
                left = begin + patience - time.monotonic()
                if left <= 0 or not select.select([read_end], [], [], left)[0]:
                    raise BenchError(f"not done after {patience} s")
                data = os.read(read_end, 65536)
                if not data:
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


def table(header, rows):
    """Prints rows of strings: the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    for row in [header, *rows]:
        print("  ".join(cell.rjust(width) if i else cell.ljust(width)
                        for i, (cell, width) in enumerate(zip(row, widths))))


def fail(name, error):
    """Ends the benchmark with one line."""
    sys.exit(f"{name}: {error}")
