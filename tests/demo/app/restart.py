#!/usr/bin/python3
"""Restart the demo's server from the live release, as a service manager would.

Usage: restart.py PORT STATE_DIRECTORY     stop the server that runs, start current's
       restart.py --stop STATE_DIRECTORY   only stop it

The new process is detached: a session of its own, stdin closed, its output in
STATE_DIRECTORY/server.log, its working directory the release that `current`
resolves to (DEPLOY_CURRENT_PATH, or the release this file is part of).
"""

import fcntl
import os
import signal
import subprocess
import sys
import time

WAIT_SECONDS = 5.0


def running_pid(pid_file: str) -> int:
    """The pid of the server that holds the pid file's lock, or 0."""
    try:
        with open(pid_file, "r+") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return int(stream.read() or 0)
    except FileNotFoundError:
        pass
    return 0


def stop(pid_file: str) -> None:
    """Stop the server that runs, if one does: TERM, and KILL when that does not help."""
    deadline = time.monotonic() + WAIT_SECONDS
    pid = running_pid(pid_file)
    while pid:
        try:
            os.kill(pid, signal.SIGTERM if time.monotonic() < deadline else signal.SIGKILL)
        except ProcessLookupError:
            pass
        time.sleep(0.05)
        pid = running_pid(pid_file)


def start(port: str, state: str, pid_file: str) -> None:
    """Start the live release's server and wait until it listens; SystemExit when it does not."""
    release = os.path.realpath(os.environ.get("DEPLOY_CURRENT_PATH") or os.path.dirname(os.path.abspath(__file__)))
    with open(os.path.join(state, "server.log"), "ab") as log:
        server = subprocess.Popen(
            [sys.executable or "/usr/bin/python3", "-B", os.path.join(release, "server.py"), port, pid_file],
            cwd=release, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
    deadline = time.monotonic() + WAIT_SECONDS
    while running_pid(pid_file) != server.pid:
        if server.poll() is not None:
            sys.exit(f"the server ended with code {server.returncode}; see {log.name}")
        if time.monotonic() > deadline:
            sys.exit(f"the server does not listen after {WAIT_SECONDS:.0f} s; see {log.name}")
        time.sleep(0.05)
    print(f"pid {server.pid} runs {os.path.basename(release)}")


def main() -> None:
    """Stop, and start again unless --stop was given."""
    first, state = sys.argv[1:]
    pid_file = os.path.join(state, "server.pid")
    stop(pid_file)
    if first != "--stop":
        start(first, state, pid_file)


if __name__ == "__main__":
    main()
