#!/usr/bin/python3
"""The demo's web application: one page, and /health, which names the version that is running.

Usage: server.py PORT PIDFILE

The version is read once, at the start, from the VERSION file beside this
program: a process that nobody restarts goes on answering with its old version.
A file BROKEN beside it makes /health answer 500.  The pid file stays locked
for as long as the process lives, however it dies.
"""

import fcntl
import http.server
import json
import os
import signal
import sys
from typing import Any

HERE = os.path.dirname(os.path.realpath(__file__))


def read_version() -> str:
    """The version of the release that this program is part of."""
    with open(os.path.join(HERE, "VERSION")) as stream:
        return stream.read().strip()


class Application(http.server.BaseHTTPRequestHandler):
    """Answers / and /health."""

    version = read_version()
    broken = os.path.exists(os.path.join(HERE, "BROKEN"))

    def do_GET(self) -> None:
        """Answer a page, the health report, or 404."""
        if self.path == "/health":
            report = {"status": "failing" if self.broken else "ok", "version": self.version}
            self.answer(500 if self.broken else 200, "application/json", json.dumps(report))
        elif self.path == "/":
            self.answer(200, "text/html", f"<!doctype html><title>Shop</title><h1>Shop {self.version}</h1>\n")
        else:
            self.answer(404, "text/plain", "not found\n")

    def answer(self, status: int, content_type: str, text: str) -> None:
        """Send one whole answer."""
        body = text.encode("utf-8")
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def lock_pid_file(path: str) -> Any:
    """Write our pid into the pid file and keep it locked.

    Waits for the lock: whoever looks whether a server runs holds it for an instant.
    """
    stream = open(path, "a+")
    fcntl.flock(stream, fcntl.LOCK_EX)
    stream.truncate(0)
    stream.write(f"{os.getpid()}\n")
    stream.flush()
    return stream


def main() -> None:
    """Serve until TERM."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))
    http.server.HTTPServer.allow_reuse_address = True
    with http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Application) as server:
        # Only now: whoever waits for the pid file finds the port open.
        pid_file = lock_pid_file(sys.argv[2])
        with pid_file:
            server.serve_forever(0.05)


if __name__ == "__main__":
    main()
