#!/usr/bin/python3
"""A user at the console: types into a shell, pastes, looks at the keys, and leaves by Ctrl-A x."""

import hashlib
import os
import pty
import random
import re
import select
import subprocess
import sys
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

    def run(self, command):
        """Types a line; returns all that comes up to the next prompt, echoed or not."""
        self.seen = b""
        self.pump(command.encode() + b"\r", lambda seen: seen.endswith(PROMPT))
        return self.seen

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
        term = Terminal("--engine", sys.argv[1], "--kernel", guest.kernel(),
                        "--initrd", guest.initramfs(directory),
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

        # No echo: Linux drops echoed characters when a terminal is pasted into faster than it prints.
        line = "".join(rng.choice("abcdefghijklmnopqrstuvwxyz0123456789") for _ in range(PASTE))
        text = "\n".join(line[i:i + 63] for i in range(0, PASTE // 64 * 63, 63)) + "\n"
        want = hashlib.sha256(text.encode()).hexdigest()
        term.ask("stty -echo")
        term.seen = b""
        term.pump(b"cat >/tmp/paste\r" + text.encode() + b"\x04",
                  lambda seen: seen.endswith(PROMPT))
        cases.check("paste-in", want.encode() in term.run("sha256sum </tmp/paste"),
                    "the guest got something else")
        out = term.run("cat /tmp/paste")
        cases.check("paste-out", text.encode() in out, f"{len(out)} characters came")
        # Both ways at once.
        term.seen = b""
        term.pump(b"cat /tmp/paste & cat >/tmp/second; wait\r" + text.encode() + b"\x04",
                  lambda seen: seen.endswith(PROMPT))
        cases.check("paste-both-out", text.encode() in term.seen,
                    f"{len(term.seen)} characters came")
        cases.check("paste-both-in", want.encode() in term.run("sha256sum </tmp/second"),
                    "the guest got something else")

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
