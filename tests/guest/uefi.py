#!/usr/bin/python3
"""UEFI boots a kernel that --kernel gives it, by fw_cfg; what it kept in variables is there in the next boot, beside
the disk, where vars= says, or nowhere; and what the options say of the machine is in SMBIOS."""

import os
import subprocess

import guest

UUID = "00112233-4455-6677-8899-aabbccddeeff"
VARIABLE = "/sys/firmware/efi/efivars/Kept-6b8bc2a8-5ad0-4b5f-9d4e-3f2f3c1d0e11"

# A variable begins with its attributes: kept, and to be had at boot time and later.
SCRIPT = f"""
insmod /lib/efivarfs.ko
mount -t efivarfs efivarfs /sys/firmware/efi/efivars
echo "uefi: kept $(tail -c +5 {VARIABLE} 2>/dev/null)"
[ -e {VARIABLE} ] || printf '\\007\\000\\000\\000this' >{VARIABLE}
echo "uefi: now $(tail -c +5 {VARIABLE})"
cd /sys/class/dmi/id
echo "uefi: smbios $(cat product_name):$(cat product_serial):$(cat product_uuid)"
echo "uefi: cmdline $(cat /proc/cmdline)"
"""


def boot(directory, firmware, *options):
    """Boots the script; returns the exit status and {WHAT: rest} of its lines."""
    vm = guest.Guest("--engine", "bt", "--firmware", firmware, "--kernel", guest.kernel(), "--initrd",
                     os.path.join(directory, "initramfs"), "--append", "console=ttyS0 quiet",
                     "--memory", "256M", *options)
    status = vm.finish()
    lines = [line.split(" ", 2) for _, line in vm.lines if line.startswith("uefi: ")]
    if status != 0 or not lines:
        vm.show()
    return status, {line[1]: line[2] if len(line) > 2 else "" for line in lines}


def main():
    """Two boots beside a disk, one that forgets, one with a file of its own."""
    cases = guest.Cases()
    with guest.temporary() as directory:
        disk = os.path.join(directory, "disk.qcow2")
        beside, own = disk + ".vars", os.path.join(directory, "own.fd")
        guest.initramfs(directory, SCRIPT, *guest.modules(["efivarfs"]))
        subprocess.run([guest.DOPPEL, "image", "create", disk, "1M"], check=True,
                       stdout=subprocess.DEVNULL)

        status, said = boot(directory, "uefi", "--disk", disk, "--product", "Testbed 9",
                            "--serial-number", "SN-42/b", "--uuid", UUID)
        cases.equal("power-off", status, 0)
        cases.check("cmdline", said.get("cmdline", "").startswith("console=ttyS0 quiet"), said)
        cases.equal("smbios", said.get("smbios"), f"Testbed 9:SN-42/b:{UUID}")
        cases.equal("new", (said.get("kept"), said.get("now")), ("", "this"))
        cases.check("beside-the-disk", os.path.exists(beside), os.listdir(directory))
        _, said = boot(directory, "uefi", "--disk", disk)
        cases.equal("kept", said.get("kept"), "this")

        with open(beside, "rb") as file:
            before = file.read()
        _, said = boot(directory, "uefi,vars=none", "--disk", disk)
        with open(beside, "rb") as file:
            cases.equal("forgotten", (said.get("kept"), said.get("now"), file.read() == before),
                        ("", "this", True))
        os.unlink(beside)
        _, said = boot(directory, "uefi,vars=" + own, "--disk", disk + ",readonly=on")
        cases.equal("own-file", (said.get("kept"), os.path.exists(own), os.path.exists(beside)),
                    ("", True, False))
    cases.done()


main()
