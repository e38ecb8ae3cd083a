#!/usr/bin/python3
"""A guest with several processors in a doppel that ThreadSanitizer watches: it passes, and nothing is reported.

    tsan.py IMAGE...

Under the interpreter, whose every access is seen. Translated code isn't, and kicks don't get into it, for the
sanitizer holds signals back until a thread calls the C library.
"""

import os
import re
import sys

import guest

SUPPRESSIONS = os.path.join(guest.ROOT, "tests", "tsan.supp")


def main():
    """One machine an image."""
    cases = guest.Cases()
    os.environ["TSAN_OPTIONS"] = f"suppressions={SUPPRESSIONS}"
    for image in sys.argv[1:]:
        name = os.path.basename(image).removesuffix(".elf")
        vm = guest.Guest("--engine", "interp", "--cpus", "4", "--kernel", image, "--debug-exit", "0xf4")
        cases.equal(f"{name}-status", vm.finish(), 1)
        reports = re.findall(r"(?m)^SUMMARY: .*", vm.stderr())
        if not cases.check(f"{name}-no-races", not reports, "; ".join(reports)):
            vm.show()
    cases.done()


main()
