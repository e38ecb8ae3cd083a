#!/usr/bin/python3
"""A user at the console: types into a shell, pastes, looks at the keys, and leaves by Ctrl-A x."""

import hashlib
import os
import pty
import random
import re
import select
import subprocess
import termios
import time

import guest

PROMPT = b"doppel:~# "
PASTE = 65536
CTRL_A = b"\x01"
ESCAPES = re.compile(rb"\x1b\[[0-9;]*[A-Za-z]|\r")


class Terminal:
    """doppel on a terminal of its own."""

    def __init__(self, *options):
        self.master, self.slave = pty.openpty()
        self.before = termios.tcgetattr(self.slave)
        self.process = subprocess.Popen([guest.DOPPEL, "run", *options], stdin=self.slave,
                                        stdout=self.slave, stderr=subprocess.DEVNULL,
                                        start_new_session=True)
        self.seen = b""  # without escape sequences and carriage returns

    def pump(self, data, done, patience=guest.PATIENCE):
        """Writes `data` as fast as it is taken, while it reads; until done(seen) or in vain."""
        deadline = time.monotonic() + patience
        while data or not done(self.seen):
            left = deadline - time.monotonic()
            readable, writable, _ = select.select([self.master], [self.master] if data else [], [],
                                                  max(left, 0))
            if not readable and not writable:
                return False
            if readable:
                try:
                    # The shell asks for the cursor's place after its prompt.
                    self.seen = ESCAPES.sub(b"", self.seen + os.read(self.master, 65536))
                except OSError:
                    return False
            if writable:
                data = data[os.write(self.master, data[:4096]):]
        return True

    def ask(self, command):
        """Types a line; returns what comes up to the next prompt."""
        self.seen = b""
        echo = command.encode() + b"\n"
        self.pump(command.encode() + b"\r",
                  lambda seen: echo in seen and seen.split(echo, 1)[1].endswith(PROMPT))
        return self.seen.partition(echo)[2].removesuffix(PROMPT).decode(errors="replace")


def main():
    """One boot, a session at it."""
    cases = guest.Cases()
    rng = random.Random(2)
    with guest.temporary() as directory:
        term = Terminal("--kernel", guest.kernel(), "--initrd", guest.initramfs(directory),
                        "--append", "console=ttyS0 quiet")
        if not cases.check("prompt", term.pump(b"", lambda seen: seen.endswith(PROMPT)),
                           f"saw {term.seen[-500:]!r}"):
            term.process.kill()
            cases.done()

        cases.equal("command", term.ask("echo $((6 * 7))"), "42\n")
        cases.equal("tty", term.ask("test -t 0 && test -t 1 && echo yes"), "yes\n")
        term.pump(b"sleep 100\r", lambda seen: b"sleep 100\n" in seen)
        time.sleep(0.5)
        term.seen = b""
        cases.check("interrupt-key", term.pump(b"\x03", lambda seen: seen.endswith(PROMPT), 60),
                    "Ctrl-C gave no prompt")

        # In: echoed by the guest as it comes, so both ways are busy at once.
        line = "".join(rng.choice("abcdefghijklmnopqrstuvwxyz0123456789") for _ in range(PASTE))
        text = "\n".join(line[i:i + 63] for i in range(0, PASTE // 64 * 63, 63)) + "\n"
        term.pump(b"cat >/tmp/paste\r", lambda seen: seen.endswith(b"cat >/tmp/paste\n"))
        term.seen = b""
        lines = text.count("\n")
        cases.check("paste-echo", term.pump(text.encode(), lambda seen: seen.count(b"\n") >= lines)
                    and term.seen == text.encode(),
                    f"{len(term.seen)} characters came back")
        term.seen = b""
        term.pump(b"\x04", lambda seen: seen.endswith(PROMPT), 60)
        want = hashlib.sha256(text.encode()).hexdigest()
        cases.equal("paste-in", term.ask("sha256sum </tmp/paste").split(" ")[0], want)
        # Out, alone.
        cases.equal("paste-out", hashlib.sha256(term.ask("cat /tmp/paste").encode()).hexdigest(),
                    want)

        term.seen = b""
        cases.check("help-key", term.pump(CTRL_A + b"h",
                                          lambda seen: re.search(rb"Ctrl-A\W+x", seen), 30),
                    f"saw {term.seen!r}")
        term.seen = b""
        term.pump(CTRL_A + b"x", lambda seen: False, 1)
        try:
            status = term.process.wait(10)
        except subprocess.TimeoutExpired:
            term.process.kill()
            status = None
        cases.equal("quit-key", status, 0)
        cases.equal("terminal-restored", termios.tcgetattr(term.slave), term.before)
    cases.done()


main()
