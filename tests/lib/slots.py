"""Two slots for tests: a systemctl that starts real processes, the application that they run, a proxy before them, and its clients."""

import os
import re
import signal
import socket
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional

import tables
from crashes import is_running, script
from support import App, fake_command, file, free_port, needs, wait_until

# Answers with the version that it was started with.  What is in `sick` fails: it does not start, or is ill alone (slot) or behind a proxy.
APPLICATION = """#!{python} -IS
import _thread, os, socket, sys
version, sick = open("VERSION").read().strip(), open("sick").read() if os.path.exists("sick") else ""
if sick == "start":
    sys.exit("no database")
def serve(connection):
    asked = b"begins"
    while asked:
        asked = connection.recv(65536)
        ill = sick == ("proxy" if b"x-proxy" in asked.lower() else "slot") and b"/health" in asked
        answer = "HTTP/1.1 %s OK\\r\\nContent-Length: %d\\r\\n\\r\\n%s" % (500 if ill else 200, len(version), version)
        connection.sendall(answer.encode() if asked else b"")
        if b"onnection: close" in asked:
            break
    connection.close()
listener = socket.socket()
listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
listener.bind(("127.0.0.1", int(sys.argv[1])))
listener.listen(128)
while True:
    _thread.start_new_thread(serve, (listener.accept()[0],))
"""

# As far as deploy.py knows it: units shop@NAME run slots/NAME/bin/serve; the directory holds a pid and `enabled` for each.
SYSTEMCTL = """#!/bin/sh
echo "$*" >> {directory}/calls
for unit; do :; done
if [ -e {directory}/kill ]; then  # so many calls from here on, and whether that one is still carried out
    read -r left how < {directory}/kill
    echo $((left - 1)) $how > {directory}/kill
    [ $left != 1 ] || kill -9 $PPID
    [ $left != 1 ] || [ $how = after ] || exit 1
fi
name=${{unit#*@}}; name=${{name%.service}}
cd {directory}
pid=; [ ! -e $name.pid ] || read -r pid < $name.pid
boot=disabled; [ ! -e $name.boot ] || read -r boot < $name.boot
up() {{ state=Z; [ -z "$pid" ] || read -r state < /proc/$pid/stat; case $state in Z | *") Z"*) false ;; esac; }}
end() {{ if up; then kill $pid; while up; do sleep 0.01; done; fi; }}
case $1 in
    show)
        printf '%s\\n' UnitFileState=$boot LoadState=loaded NRestarts=0 NeedDaemonReload=no Type=simple Result=success ExecMainStatus=0 CanReload=no
        if up; then printf '%s\\n' ActiveState=active SubState=running MainPID=$pid InvocationID=$pid
        else printf '%s\\n' ActiveState=inactive SubState=dead MainPID=0 InvocationID=$pid; fi ;;
    stop) end ;;
    restart)
        end
        cd {root}/slots/$name && exec > /dev/null 2>&1
        setsid ./bin/serve $(cat {directory}/$name.port) &
        echo $! > {directory}/$name.pid ;;
    enable) echo enabled > $name.boot ;;
    disable) echo disabled > $name.boot ;;
esac 2> /dev/null
"""


class Shop:
    """An application in two slots, as far as tests need it."""

    def __init__(self, app: App) -> None:
        self.app, self.slots = app, app.root / "slots"
        self.ports = {"blue": free_port(), "green": free_port()}
        self.directory = app.directory / "units"
        self.directory.mkdir()
        self.systemctl = script(self.directory / "systemctl", "")
        self.systemctl.write_text(SYSTEMCTL.format(directory=self.directory, root=app.root))
        for name, port in self.ports.items():
            (self.directory / f"{name}.port").write_text(f"{port}\n")

    def configure(self, text: str = "", **keys: str) -> None:
        """Write deploy.ini; `keys` replace those of [slots], and `text` follows."""
        values = {"unit": "shop@${slot}.service", "include": "to ${port}", "reload": "true", "drain": "0s", "settle": "0s",
                  "systemctl": str(self.systemctl), **self.ports, **keys}  # type: Dict[str, Any]
        lines = "".join(f"{key} = {value}\n" for key, value in values.items())
        self.app.configure(f"durable = no\n[slots]\n{lines}[probe:slot]\nurl = http://127.0.0.1:${{port}}/health\nrelease = body\n"
                           f"period = 50ms\ndeadline = 8s\nsuccesses = 1\n{text}")

    def artifact(self, version: str, sick: str = "") -> Path:
        """Build a version of the application; `sick` says where it fails."""
        serve = file(APPLICATION.format(python=sys.executable), 0o755)
        return self.app.artifact(version, {"bin/serve": serve, **({"sick": sick} if sick else {})})

    def deploy(self, version: str, sick: str = "", check: Optional[int] = 0) -> Any:
        """Deploy a version."""
        return self.app.run("deploy", self.artifact(version, sick), check=check)

    def pid(self, slot: str) -> int:
        """The process that runs in a slot, or 0."""
        path = self.directory / f"{slot}.pid"
        pid = int(path.read_text()) if path.exists() else 0
        return pid if pid and is_running(pid) else 0

    def running(self) -> Dict[str, str]:
        """By slot that runs, the release that its process runs from."""
        return {slot: os.path.basename(os.readlink(f"/proc/{self.pid(slot)}/cwd")) for slot in self.ports if self.pid(slot)}

    def links(self) -> Dict[str, str]:
        """By slot, the release that its link names."""
        return {slot: os.path.basename(os.readlink(str(self.slots / slot))) for slot in self.ports if (self.slots / slot).is_symlink()}

    def boot(self, slot: str) -> str:
        """Whether a slot starts at the next boot: `enabled` or `disabled`."""
        path = self.directory / f"{slot}.boot"
        return path.read_text().strip() if path.exists() else "disabled"

    def live_conf(self) -> Optional[str]:
        """What live.conf says."""
        path = self.slots / "live.conf"
        return path.read_text() if path.is_file() else None

    def verbs(self) -> List[str]:
        """What was asked of systemctl, but for what only looks."""
        calls = (self.directory / "calls").read_text().splitlines()
        return [call for call in calls if not call.startswith("show")]

    def stop(self) -> None:
        """End what runs."""
        for slot in self.ports:
            if self.pid(slot):
                os.kill(self.pid(slot), signal.SIGKILL)


# Around what the README shows.
NGINX = """
daemon off;
worker_processes 2;
error_log {place}/error.log;
pid {place}/pid;
events {{ worker_connections 512; }}
http {{
    access_log off;
    client_body_temp_path {place}/1; proxy_temp_path {place}/2; fastcgi_temp_path {place}/3; uwsgi_temp_path {place}/4;
    scgi_temp_path {place}/5;
    keepalive_requests 1000000;
    {shown}
}}
"""
HAPROXY = """
global
    stats socket {place}/admin level admin expose-fd listeners
defaults
    mode http
    timeout connect 5s
    timeout client 30s
    timeout server 30s
frontend web
    bind 127.0.0.1:{port}
    http-request set-header X-Proxy haproxy
    default_backend shop
"""


def shown(pattern: str) -> str:
    """What the README shows, from a line that matches a pattern to the end of its block."""
    found = re.search(rf"(?m)^    (?={pattern})(.*\n)(    .*\n)*", tables.section("No visitor notices"))
    assert found, pattern
    return textwrap.dedent(found.group())


class Proxy:
    """nginx or HAProxy, reading live.conf; `reload` starts it where it does not run, as reload-or-restart does."""

    def __init__(self, name: str, shop: Shop, place: Path) -> None:
        place.mkdir()
        self.place, self.port, conf = place, free_port(), shop.slots / "live.conf"
        own = place / "own.conf"
        lines = re.findall(r"`(backend shop|server live [^`]*)`", tables.section("No visitor notices"))
        self.include = shown("    upstream").partition("reload")[0] if name == "nginx" else "\n    ".join(lines) + "\n"
        if name == "nginx":
            server = shown("include /srv").replace("/srv/shop", str(shop.app.root)).replace("listen 80", f"listen 127.0.0.1:{self.port}")
            server = server.replace("location / {", "location / { proxy_set_header X-Proxy nginx;")
            own.write_text(NGINX.format(place=place, shown=server))
            argv = [needs("nginx"), "-p", str(place), "-c", str(own)]
            reload = argv + ["-s", "reload"]
            test = argv + ["-t", "-q"]
        else:
            own.write_text(HAPROXY.format(place=place, port=self.port))
            argv = [needs("haproxy"), "-W", "-p", str(place / "pid"), "-f", str(own), "-f", str(conf)]
            test = [argv[0], "-c", "-q", "-f", str(own), "-f", str(conf)]
            reload = ["/bin/kill", "-USR2"]
        self.reload = fake_command(place, "reload", (
            "import subprocess, time, signal\n"
            f"subprocess.check_call({test!r}, stdout=sys.stderr)\n"
            f"path = {str(place / 'pid')!r}\n"
            "running = os.path.exists(path) and open(path).read().split()\n"
            "if running and os.path.exists('/proc/' + running[0]):\n"
            f"    sys.exit(subprocess.call({reload!r} + ([running[0]] if {name!r} == 'haproxy' else [])))\n"
            f"log = open({str(place / 'log')!r}, 'ab')\n"
            f"subprocess.Popen({argv!r}, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)\n"
            "while not os.path.exists(path) or not open(path).read():\n"
            "    time.sleep(0.01)"))

    def stop(self) -> None:
        """End it."""
        path = self.place / "pid"
        if path.exists():
            pid = int(path.read_text().split()[0])
            os.kill(pid, signal.SIGTERM)
            wait_until(lambda: not is_running(pid), 30, "the proxy ends")


class Asked(NamedTuple):
    """One request: when it began and was answered, and by which version; an error has no version."""

    began: float
    ended: float
    version: str
    error: str


class Client(threading.Thread):
    """Asks again and again on one connection.

    One that was closed while nothing was asked on it is opened again, as every client does (RFC 9112, 9.3.1): a request on it is sent
    once more, on a new connection, where no byte of an answer had come.
    """

    def __init__(self, port: int) -> None:
        super().__init__(daemon=True)
        self.port, self.answers, self.reopened, self._ending = port, [], 0, threading.Event()  # type: int, List[Asked], int, Any
        self._socket = None  # type: Optional[socket.socket]
        self.start()

    def run(self) -> None:
        while not self._ending.wait(0.005):
            began, version, error = time.monotonic(), "", ""
            try:
                version = self._ask()
            except (OSError, ValueError) as problem:
                error, self._socket = repr(problem), None
            self.answers.append(Asked(began, time.monotonic(), version, error))

    def _ask(self) -> str:
        for _ in range(2):
            is_reused = self._socket is not None
            connection = self._socket or socket.create_connection(("127.0.0.1", self.port), 20)
            self._socket, data = connection, b""
            try:
                connection.sendall(b"GET / HTTP/1.1\r\nHost: shop\r\n\r\n")
                data = connection.recv(4096)
            except (BrokenPipeError, ConnectionResetError):
                if not is_reused:
                    raise
            if data or not is_reused:
                break
            self._socket = None
            connection.close()
            self.reopened += 1
        while b"\r\n\r\n" not in data:
            piece = connection.recv(4096)
            if not piece:
                raise ValueError(f"cut off: {data!r}")
            data += piece
        head, _, body = data.partition(b"\r\n\r\n")
        fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:])
        length = int(fields[b"content-length"])
        while len(body) < length:
            body += connection.recv(4096)
        if fields.get(b"connection") == b"close":
            connection.close()
            self._socket = None
        if not head.startswith(b"HTTP/1.1 200"):
            raise ValueError(f"{head!r}")
        return body.decode().strip()

    def end(self) -> None:
        """Ask no more."""
        self._ending.set()
        self.join(30)
