#!/usr/bin/python3
"""Runs one of our own guests (guests/) on every engine and passes its checks on.

    system.py GUEST.elf [--qemu]

A guest prints "ok NAME" or "not ok NAME: why" a check and leaves through the debug-exit port; one
whose name begins with "shutdown" ends by a triple fault instead. With --qemu it runs on QEMU's TCG,
a peer: DEVIATIONS lists what TCG is known to do otherwise, decided by the manuals.
"""

import os
import subprocess
import sys

import guest

ENGINES = ["interp", "bt"]
# Translated at once, by other choices, and in lockstep with the interpreter.
# The first two have room for some hundred blocks, which are evicted all the time.
CHECKED = ["bt,seed=73", "bt,seed=14", "bt,verify,seed=3"]

PORT = 0xF4
PASSED = 1  # a write of 0 to the debug-exit port
TRIPLE_FAULT = 3

# Megabytes, by guest: this one wants some above 4 GiB.
MEMORY = {"paging_legacy32": 4096}

# Checks that TCG fails, by guest, each with what the manuals say.
_PERMISSIVE = {
    "db-int1": "INT1 is a breakpoint of its debugger",
    "ud-lock-mov": "LOCK is not refused",
    "gp-rdmsr-unknown": "unknown MSRs read as 0",
    "gp-wrmsr-efer-reserved": "reserved bits are ignored",
    "gp-load-ldt-error-code": "a null LDT has a limit",
    "gp-ltr-null": "taken for LLDT's null",
    "np-gate-of-exception": "EXT is not set",
}
_DEBUG = dict(
    {f"gd-{what}": "DR7.GD does not exist" for what in ("fault", "cleared", "dr6", "write-fault")},
    **{name: "RF is not set within a repeated instruction"
       for name in ("step-rep-rf-between", "write-rep-rf", "execute-rep-once")},
    **{name: "only single steps are held back behind MOV SS"
       for name in ("execute-after-mov-ss-inhibited", "access-mov-ss-deferred",
                    "access-mov-ss-int-at-handler")},
    **{"write-two-at-once": "one breakpoint is reported",
       "access-rep-last-iteration": "RIP stays on the instruction",
       "write-not-by-ud": "LOCK is not refused",
       "dr7-fixed-zeros": "reserved bits are kept"})
_FPU = dict(
    {f"xm-{which}{what}": "SIMD exceptions are never raised"
     for which in ("invalid", "denormal", "divide-by-zero", "overflow", "underflow", "precision")
     for what in ("", "-flag-and-destination", "-is-ud-without-osxmmexcpt")},
    **{name: "reserved bits of MXCSR are taken"
       for name in ("mxcsr-reserved", "mxcsr-unchanged-by-fault", "fxrstor-mxcsr-reserved",
                    "xrstor-mxcsr-reserved")},
    **{name: "unmasked x87 exceptions come only at WAIT"
       for name in ("mf-at-fld", "mf-at-mmx", "mf-at-emms", "mf-after-unmasking",
                    "mf-not-when-masked-by-fnstenv")},
    **{f"ts-em-{mp}switch-{what}": "#NM before #UD"
       for mp in ("", "mp-") for what in ("mmx", "sse")},
    **{f"fnstenv-{what}": "upper halves are 0" for what in ("control", "status-top", "tags")},
    **{"stack-underflow-status": "stack faults are not noted",
       "xrstor-ts": "TS is not looked at",
       "avx-not-by-em": "EM is looked at"})
_RSVD = "P is not set beside RSVD"
_SEGMENTS = "segment limits and rights are not checked"
_XSETBV = "#GP before #UD for CR4.OSXSAVE"
_TRANSFERS = {
    "jump-sets-accessed": "CS is not marked accessed",
    "retf-stack-accessed": "SS is not marked accessed",
    "iret-stack-accessed": "SS is not marked accessed",
    "retf-stack-absent": "#NP, not #SS",
    "iret-stack-absent": "#NP, not #SS",
    "gate-to-conforming": "CS has the RPL of the gate's code",
}
DEVIATIONS = {
    "breakpoints32": _DEBUG,
    "breakpoints64": _DEBUG,
    "fpu32": _FPU,
    "fpu64": _FPU,
    "paging64": dict(
        {f"{level}-reserved-{how}": _RSVD for level in ("pml4e", "pdpte", "pde", "pte")
         for how in ("load", "user-store")},
        **{f"reserved-{what}": _RSVD for what in ("pml4e-ps", "nx-without-nxe")},
        **{"2m-reserved-bit-13": _RSVD, "1g-reserved-bit-29": _RSVD}),
    "sensitive32": {"xsetbv": _XSETBV},
    "sensitive64": {"xsetbv": _XSETBV, "wrfsbase-noncanonical": "no canonical check"},
    "strings32": {"limit-stops": _SEGMENTS, "limit-stores-whole-elements": _SEGMENTS},
    "strings64": {"fault-at-the-instruction": "RF is not set"},
    "segments32": dict(
        _TRANSFERS,
        **{f"limit-{seg}-{what}": _SEGMENTS for seg in ("es", "ss") for what in (
            "across", "beyond", "zero", "top-wraps", "pages-across", "down-across", "down-inside",
            "down-16-bit-across", "down-16-bit-beyond", "down-pages-inside", "down-nothing")},
        **{f"null-use-{seg}": _SEGMENTS for seg in ("ds", "es", "fs", "gs")},
        **{f"stack16-{what}": _SEGMENTS for what in (
            "push-across", "pop-across", "push-odd-across", "down-below")},
        **{name: _SEGMENTS for name in (
            "store-read-only", "add-read-only", "store-code", "gate-limit",
            "inner-stack-without-room")},
        **{"call-limit": "the error code is the selector",
           "inner-stack-absent": "#TS, not #SS"},
        **{name: "a 16-bit gate has a 32-bit offset" for name in (
            "gate16", "gate16-stack", "gate16-offset-is-16-bits")}),
    "segments64": dict(
        _TRANSFERS,
        **{f"{how}-code-l-and-d": "L beside D is not refused"
           for how in ("jump", "call", "retf", "iret")},
        **{f"{how}-compatibility-stack-null": "any null SS is taken outside of ring 3"
           for how in ("retf", "iret")},
        **{name: "types of legacy mode are taken" for name in (
            "lar-types", "lsl-types", "ltr-16-bit")},
        **{name: "the upper half is not checked" for name in (
            "ltr-noncanonical", "lldt-upper-type", "lldt-noncanonical")},
        **{f"null-{seg}-keeps-base": "the base is cleared on AMD's too" for seg in ("fs", "gs")},
        **{"compatibility-limit": _SEGMENTS, "compatibility-null-use": _SEGMENTS,
           "null-ss-rpl": "any null SS is taken",
           "es-base-does-not-count": "an override brings the base in"}),
    "syscalls64": {"syscall-fmask": "flags that FMASK spares are cleared",
                   **{f"wrmsr-{msr}-noncanonical": "no canonical check"
                      for msr in ("lstar", "cstar", "sysenter-eip", "sysenter-esp")}},
    "exceptions32": dict(_PERMISSIVE, **{"gp-null-data": _SEGMENTS}),
    "exceptions64": dict(
        _PERMISSIVE, **{
            "ss-noncanonical": "#GP for any segment",
            "gp-noncanonical-jump": "found at the target",
            "gp-wrmsr-fsbase-noncanonical": "no canonical check",
            "gp-cr8-reserved": "reserved bits are ignored"}),
    "modes64": {"la57-reserved-ps": _RSVD},
    "paging_legacy32": {
        "two-level-4m-reserved-bit-21": _RSVD,
        "pae-pointer-has-no-accessed-bit": "it sets one",
        "pae-nx-without-nxe-is-reserved": _RSVD,
        "pae-bit-62-is-reserved": _RSVD},
    "tasks32": dict(
        {name: _SEGMENTS for name in (
            "limit-beyond", "limit-dword-across", "limit-wraps", "read-only-store",
            "expand-down-inside", "expand-down-16-bit-top", "code-store", "granularity-4k-beyond",
            "v86-word-at-ffff", "v86-limit")},
        **{name: "no VME" for name in (
            "vme-sti", "vme-sti-sets-vif", "vme-cli-clears-vif", "vme-pushf-shows-vif")},
        **{"task-t-bit": "the T bit is ignored"}),
}


def run(cases, label, command, want, known=()):
    """Runs one guest by `command`; its status must be `want`."""
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, timeout=guest.PATIENCE, check=False)
        output, status = done.stdout, done.returncode
        errors = done.stderr.decode(errors="replace")
    except subprocess.TimeoutExpired as timeout:
        output, status, errors = timeout.stdout or b"", None, ""

    for line in output.decode(errors="replace").splitlines():
        line = line.strip("\r")
        if line.startswith("ok "):
            print(f"ok {label}: {line[3:]}", flush=True)
        elif line.startswith("not ok "):
            name = line[7:].split(":")[0]
            if name in known:
                print(f"ok {label}: {name} # skip: TCG: {known[name]}", flush=True)
                status = want if status == 5 else status
            else:
                cases.failed += 1
                print(f"not ok {label}: {line[7:]}", flush=True)
        else:
            print(f"    | {line}")
    if not cases.equal(f"{label}: status", status, want):
        print(errors, end="")


def main():
    """A run an engine."""
    image = sys.argv[1]
    name = os.path.basename(image).removesuffix(".elf")
    ends_by_triple_fault = name.startswith("shutdown")
    cpus = guest.CPUS.get(name, 1)
    memory = str(MEMORY.get(name, 512)) + "M"
    cases = guest.Cases()
    if "--qemu" in sys.argv[2:]:
        run(cases, "tcg",
            ["qemu-system-x86_64", "-accel", "tcg", "-cpu", "max", "-m", memory, "-smp", str(cpus), "-kernel", image,
             "-device", f"isa-debug-exit,iobase={PORT:#x}", "-display", "none", "-serial", "stdio",
             "-no-reboot"], 0 if ends_by_triple_fault else PASSED, DEVIATIONS.get(name, {}))
        cases.done()
    for engine in ENGINES + CHECKED:
        if cpus > 1 and "verify" in engine:
            continue
        run(cases, engine,
            [guest.DOPPEL, "run", "--engine", engine, "--cpu", "max", "--memory", memory, "--cpus", str(cpus),
             "--kernel", image, "--debug-exit", hex(PORT), "--serial", "stdio", "--no-reboot"],
            TRIPLE_FAULT if ends_by_triple_fault else PASSED)
    cases.done()


if __name__ == "__main__":
    main()
