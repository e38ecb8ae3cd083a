"""A web server on this host, for guests to fetch from and to send to."""

import http.server
import os
import threading

import guest


class Server(http.server.ThreadingHTTPServer):
    """Gives the guest a blob, takes what it posts, and lets it wait until the host has done its part."""

    def __init__(self, address):
        self.blob = os.urandom(8 << 20)
        self.uploads = {}  # by path
        self.waiting = threading.Event()
        self.release = threading.Event()
        super().__init__((address, 0), Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Handler(http.server.BaseHTTPRequestHandler):
    """One request of a guest's."""

    def answer(self, body):
        """Sends a body."""
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):  # pylint: disable=invalid-name
        """/blob, or /wait."""
        if self.path == "/wait":
            self.server.waiting.set()
            self.server.release.wait(guest.PATIENCE)
        self.answer(self.server.blob if self.path == "/blob" else b"")

    def do_POST(self):  # pylint: disable=invalid-name
        """An upload."""
        self.server.uploads[self.path] = self.rfile.read(int(self.headers["Content-Length"]))
        self.answer(b"")

    def log_message(self, format, *args):  # pylint: disable=redefined-builtin
        """Keeps quiet."""
