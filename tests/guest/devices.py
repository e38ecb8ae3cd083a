#!/usr/bin/python3
"""A guest that writes anything to every device (guests/devices.c): the machine goes on, and disks are as whole as before.

    devices.py GUEST.elf
"""

import os
import subprocess
import sys

import guest

PASSED = 1  # a write of 0 to the debug-exit port


def run(cases, directory, engine, image):
    """One run, with a card of each kind."""
    path = {name: os.path.join(directory, f"{engine}-{name}") for name in
            ("raw", "qcow2", "nvme", "ide", "pmem", "share", "vsock", "control")}
    for name, form in (("raw", "raw"), ("qcow2", "qcow2"), ("nvme", "qcow2"), ("ide", "raw"), ("pmem", "raw")):
        subprocess.run([guest.DOPPEL, "image", "create", "-f", form, path[name], "2M"], check=True)
    os.mkdir(path["share"])
    vm = guest.Guest(
        "--engine", engine, "--memory", "512M", "--kernel", image, "--debug-exit", "0xf4", "--no-reboot",
        "--disk", path["raw"] + ",format=raw", "--disk", path["qcow2"] + ",format=qcow2",
        "--disk", path["nvme"] + ",format=qcow2,bus=nvme", "--disk", path["ide"] + ",format=raw,bus=ide",
        "--pmem", path["pmem"], "--share", path["share"] + ":it", "--net", "user",
        "--vsock", "cid=3,path=" + path["vsock"], "--control", "socket=" + path["control"], "--slots", "2")
    status = vm.finish()
    if not cases.equal(f"{engine}-status", status, PASSED):
        vm.show()
    for name in ("qcow2", "nvme"):
        checked, output = guest.tool("qemu-img", "check", path[name])
        cases.check(f"{engine}-{name}", checked in (0, 3), output)  # 3: space is lost, for want of a flush


def main():
    """Each software engine."""
    cases = guest.Cases()
    with guest.temporary() as directory:
        for engine in ("interp", "bt"):
            run(cases, directory, engine, sys.argv[1])
    cases.done()


main()
