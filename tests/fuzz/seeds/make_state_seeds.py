#!/usr/bin/python3
"""Writes the seeds of fuzz_state: good states, and code and accesses that use all there is.

    make_state_seeds.py DIRECTORY
"""

import os
import sys

RAW, LONG_MODE, RUN = 1, 2, 4

# The same bytes do about the same in every mode.
FPU = bytes.fromhex(
    "dbe3"              # fninit
    "d9e8 d9eb dec1"    # fld1; fldpi; faddp
    "d9fe"              # fsin
    "0fae06 0040"       # fxsave
    "dd36 0042 9b"      # fnsave; fwait
    "0f6ec0 0f77"       # movd mm0, eax; emms
)
SSE = bytes.fromhex(
    "0f57c0 660fefc9"   # xorps xmm0; pxor xmm1
    "0f58c1 0f5ec1"     # addps; divps
    "c5fc58c1"          # vaddps ymm0, ymm0, ymm1
    "31c9 0f01d0"       # xor ecx, ecx; xgetbv
)
SYSTEM = bytes.fromhex(
    "0fa2 0f31"         # cpuid; rdtsc
    "9c 9d fa fb"       # pushf; popf; cli; sti
    "0f20c0 0f22c0"     # mov eax, cr0 and back
    "b91b000000 0f32 0f30"  # rdmsr; wrmsr: APIC base
    "e464 b0ff e621"    # in 0x64; out 0x21
    "cd20 cf f4"        # int 0x20; iret; hlt
)
LOOP = bytes.fromhex("ebfe")


def seed(options, code, changes=()):
    """An input: what to change in the state, then the guest's code, which also says what to access."""
    out = bytes([options, len(changes)])
    for where, value in changes:
        out += where.to_bytes(2, "little") + bytes([value])
    return out + code


def main():
    """Writes them."""
    directory = sys.argv[1]
    os.makedirs(directory, exist_ok=True)
    everything = FPU + SSE + SYSTEM + LOOP
    seeds = {
        "real-mode": seed(RUN, everything),
        "long-mode": seed(RUN | LONG_MODE, everything),
        "changed": seed(RUN | LONG_MODE, everything, [(i * 97, i) for i in range(60)]),
        "accesses": seed(0, bytes(i * 7 & 0xff for i in range(400)), [(3, 1)]),
        "raw": bytes([RAW]) + b"isa".ljust(24, b"\0") + bytes([0, 0, 0, 0, 1, 0, 0, 0]) +
               bytes([7, 0, 0, 0, 0, 0, 0, 0]) + bytes(7),
    }
    for name, data in seeds.items():
        with open(os.path.join(directory, name), "wb") as file:
            file.write(data)


main()
