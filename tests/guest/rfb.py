"""A small VNC client (RFC 6143): raw pictures, changes of their size, keys; and text read from such a picture."""

import socket
import struct
import time

ENCODING_RAW = 0
ENCODING_DESKTOP_SIZE = -223
XRGB_32 = struct.pack(">BBBBHHHBBB3x", 32, 24, 0, 1, 255, 255, 255, 16, 8, 0)

ENTER = 0xff0d
CELL_WIDTH, CELL_HEIGHT = 9, 16


class Viewer:
    """A connection to a Unix socket, with the picture as of the last update."""

    def __init__(self, path, patience=60):
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(patience)
        deadline = time.monotonic() + patience
        while self.socket.connect_ex(path) != 0:
            if time.monotonic() > deadline:
                raise TimeoutError(f"nobody listens at {path}")
            time.sleep(0.05)
        assert self.read(12) == b"RFB 003.008\n"
        self.send(b"RFB 003.008\n")
        assert 1 in self.read(self.read(1)[0]) # security types: None
        self.send(b"\1")
        assert self.unpack(">I") == (0,)
        self.send(b"\1")
        self.width, self.height = self.unpack(">HH16x")
        self.name = self.read(*self.unpack(">I"))
        self.rows = [bytearray(4 * self.width) for _ in range(self.height)]
        self.send(b"\0\0\0\0" + XRGB_32)
        self.send(struct.pack(">BxHii", 2, 2, ENCODING_RAW, ENCODING_DESKTOP_SIZE))
        self.request(False)

    def send(self, data):
        """All of it."""
        self.socket.sendall(data)

    def read(self, size):
        """Exactly `size` bytes."""
        data = b""
        while len(data) < size:
            part = self.socket.recv(size - len(data))
            if not part:
                raise EOFError("the server has closed the connection")
            data += part
        return data

    def unpack(self, form):
        """What the next bytes hold."""
        return struct.unpack(form, self.read(struct.calcsize(form)))

    def request(self, incremental=True):
        """Asks for the next update."""
        self.send(struct.pack(">BBHHHH", 3, incremental, 0, 0, self.width, self.height))

    def update(self):
        """Takes one update in; returns its rectangles (x, y, width, height)."""
        kind, count = self.unpack(">BxH")
        assert kind == 0, f"message {kind}"
        rectangles = []
        for _ in range(count):
            x, y, width, height, encoding = self.unpack(">HHHHi")
            if encoding == ENCODING_DESKTOP_SIZE:
                self.width, self.height = width, height
                self.rows = [bytearray(4 * width) for _ in range(height)]
                continue
            assert encoding == ENCODING_RAW, f"encoding {encoding}"
            for row in range(y, y + height):
                self.rows[row][4 * x:4 * (x + width)] = self.read(4 * width)
            rectangles.append((x, y, width, height))
        self.request()
        return rectangles

    def key(self, *keysyms):
        """Presses and lets go of each."""
        for keysym in keysyms:
            self.send(struct.pack(">BBxxI", 4, 1, keysym) + struct.pack(">BBxxI", 4, 0, keysym))

    def type(self, text):
        """Types ASCII."""
        self.key(*text.encode("ascii"))

    def pixel(self, x, y):
        """0xRRGGBB."""
        return int.from_bytes(self.rows[y][4 * x:4 * x + 3], "little")

    def cell(self, column, row):
        """The pixels of a character's place in text mode."""
        left, right = 4 * column * CELL_WIDTH, 4 * (column + 1) * CELL_WIDTH
        return b"".join(bytes(line[left:right]) for line in
                        self.rows[row * CELL_HEIGHT:(row + 1) * CELL_HEIGHT])


def learn(viewer, text):
    """A map from pictures to characters, from a screen that begins with `text`."""
    columns = viewer.width // CELL_WIDTH
    return {viewer.cell(i % columns, i // columns): c for i, c in enumerate(text)}


def read_row(viewer, glyphs, row):
    """The text of a row; what isn't known is a '?'."""
    cells = (viewer.cell(column, row) for column in range(viewer.width // CELL_WIDTH))
    return "".join(glyphs.get(cell, "?") for cell in cells).rstrip()
