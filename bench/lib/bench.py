"""What the benchmarks share: machines, programs to run in them, lines with their times, tables."""

import json
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


def cloud_modules(names):
    """The paths of modules of that kernel."""
    done = subprocess.run([os.path.join(ROOT, "scripts", "fetch-kernel"), "--modules", "cloud-amd64"],
                          text=True, stdout=subprocess.PIPE, check=False)
    if done.returncode:
        raise BenchError("there are no modules of the kernel")
    return [os.path.join(done.stdout.strip(), name + ".ko") for name in names]


def fetch_tree(name, *packages):
    """The path of Debian's packages, and what they need, unpacked into a tree; not to be changed."""
    done = subprocess.run([os.path.join(ROOT, "scripts", "fetch-tree"), name, *packages], text=True,
                          stdout=subprocess.PIPE, check=False)
    if done.returncode:
        raise BenchError(f"these programs are not to be had: {', '.join(packages)}")
    return done.stdout.strip()


def append_tree(initramfs, tree):
    """Appends a tree to an initramfs: Linux unpacks one archive after the other."""
    parent, name = os.path.split(tree)
    with open(initramfs, "ab") as file:
        found = subprocess.run(["find", name, "-print0"], cwd=parent, check=True,
                               stdout=subprocess.PIPE).stdout
        subprocess.run(["cpio", "--quiet", "-0", "-o", "-H", "newc", "-R", "0:0"], cwd=parent,
                       input=found, stdout=file, check=True)


def make_initramfs(directory, script, *programs):
    """An initramfs that runs `script` (text) with `programs` (paths) in /bin; returns its path."""
    path = os.path.join(directory, "initramfs")
    with open(path + ".script", "w", encoding="ascii") as file:
        file.write(script)
    build([os.path.join(ROOT, "scripts", "make-initramfs"), path, path + ".script", *programs])
    return path


def doppel_command(engine, memory, kernel, initramfs, cpus=1):
    """doppel, booting Linux with its console on stdout."""
    return [DOPPEL, "run", "--engine", engine, "--cpus", str(cpus), "--memory", memory,
            "--kernel", kernel, "--initrd", initramfs, "--append", APPEND]


def qemu_command(memory, kernel, initramfs, cpus=1):
    """The same by QEMU's TCG, a thread for each processor, with no device that this doesn't need."""
    return ["qemu-system-x86_64", "-accel", "tcg,thread=multi", "-cpu", "max", "-smp", str(cpus),
            "-m", memory, "-nodefaults", "-display", "none", "-serial", "stdio",
            "-kernel", kernel, "-initrd", initramfs, "-append", APPEND]


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


def typical_of(results, pick=statistics.median):
    """From who -> numbers: who -> median, and the ratios "x_native" and "x_tcg" where they ran."""
    of = {who: pick(numbers) for who, numbers in results.items()}
    of["x_native"] = of["doppel"] / of["native"]
    if "tcg" in of:
        of["x_tcg"] = of["tcg"] / of["doppel"]
    return of


def means_of(rows):
    """The geometric means of the ratios in what typical_of() returned, or this."""
    rows = list(rows)
    return {key: geometric_mean([row[key] for row in rows])
            for key in ("x_native", "x_tcg") if key in rows[0]}


def comparison(first, rows, picked="medians"):
    """Prints nanoseconds with their ratios; `first` are the columns before, by row."""
    who = [name for name in ("native", "doppel", "tcg") if name in rows[0]]
    ratios = [(title, key) for title, key in (("/ native", "x_native"), ("x TCG", "x_tcg"))
              if key in rows[0]]
    header, *names = first
    print()
    table([*header, *who, *(title for title, _ in ratios), ""],
          [[*name, *(in_unit(row[one]) for one in who), *(f"{row[key]:.2f}" for _, key in ratios),
            "slower than TCG" if row.get("x_tcg", 1) < 1 else ""]
           for name, row in zip(names, rows)])
    print(f"\n{picked}; '/ native': doppel's time in native ones"
          + ("; 'x TCG': how many times faster doppel is" if "tcg" in who else ""))


def means_text(means, most=None, least=None):
    """The ratios in words, with what they are to be: at most so much, at least so much."""
    text = f"{means['x_native']:.2f} / native"
    if most:
        text += f" (aim: at most {most})"
    if "x_tcg" in means:
        text += f", {means['x_tcg']:.2f} x TCG (aim: at least {least})"
    return text


def take_turns(name, runs, commands, run):
    """Runs each command `runs` times, in turn; returns who -> what run(command) returned."""
    results = {who: [] for who in commands}
    for number in range(runs):
        for who, command in commands.items():
            print(f"run {number + 1} {who}", flush=True)
            try:
                results[who].append(run(command))
            except (BenchError, OSError) as error:
                fail(name, f"{who}: {error}")
    return results


def write_json(path, figures):
    """Writes figures to a file, if there is a path."""
    if path:
        with open(path, "w", encoding="ascii") as file:
            json.dump(figures, file, indent=1)
            file.write("\n")


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
