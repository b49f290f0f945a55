"""deploy.py in images that hold little more than Python, and in Pythons that are not whole."""

import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Dict, Iterator

import pytest

from images import UNKNOWN_UID, Image, Python
from support import missing, once_in_ci, wait_until

OWN, DEBIAN = sys.executable, "/usr/bin/python3"
NOT_UTF8 = b"caf\xe9.txt"

SERVER = """
import http.server, os, signal, socketserver

class Handler(http.server.BaseHTTPRequestHandler):
    version = "none"

    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.version)))
        self.end_headers()
        self.wfile.write(self.version.encode())

def read(*details):
    with open("/srv/app/current/VERSION") as stream:
        Handler.version = stream.read().strip()

signal.signal(signal.SIGHUP, read)
server = socketserver.TCPServer(("127.0.0.1", 0), Handler)
for name, number in (("port", server.server_address[1]), ("pid", os.getpid())):
    with open("/srv/web." + name + ".new", "w") as stream:
        stream.write(str(number))
    os.rename("/srv/web." + name + ".new", "/srv/web." + name)
server.serve_forever()
"""

CONFIG = """
[deploy]
root = /srv/app
application = shop
[hooks]
post_activate = {python} -c "import os; open('/srv/hooked', 'a').write(os.environ['DEPLOY_VERSION'] + ' ')"
[service:web]
pidfile = /srv/web.pid
settle = 0s
[probe:web]
url = http://127.0.0.1:{port}/
release = body
successes = 1
period = 50ms
deadline = {deadline}
"""


@contextmanager
def image(directory: Path, executable: str, uid: int, **options: Any) -> Iterator[Image]:
    """An image, ready to run."""
    if os.geteuid() != 0:
        missing("root, who may mount,")
    with Image(directory, Python.of(executable), uid, **options) as ready:
        yield ready


@contextmanager
def server(inside: Image) -> Iterator[int]:
    """A program that serves the version which was live when it was last told to look: its port."""
    (inside.volume / "server.py").write_text(SERVER)
    process = subprocess.Popen(inside.argv("/srv/server.py"), env={}, stderr=subprocess.DEVNULL)
    try:
        wait_until((inside.volume / "web.pid").exists, 60, "the server's pidfile")
        yield int((inside.volume / "web.port").read_text())
    finally:
        process.kill()
        process.wait()


def source(inside: Image, version: str) -> str:
    """A directory to pack, with a name in it that is not UTF-8."""
    top = inside.volume / f"shop-{version}"
    top.mkdir()
    (top / "VERSION").write_text(version + "\n")
    with open(os.path.join(os.fsencode(str(top)), NOT_UTF8), "wb") as stream:
        stream.write(version.encode())
    return f"/srv/{top.name}"


def deploy(inside: Image, version: str, check: int = 0) -> Dict[str, Any]:
    """Pack and deploy a version; the result."""
    artifact = f"/srv/shop-{version}.tar.gz"
    inside.run("pack", source(inside, version), "-o", artifact, check=0)
    return inside.run("-c", "/srv/deploy.ini", "deploy", artifact, check=check).data


def test_the_image_holds_nothing_but_python(tmp_path: Path) -> None:
    with image(tmp_path, OWN, UNKNOWN_UID) as inside:
        look = ("import os, pwd\n"
                "there = [path for path in ('/bin', '/usr/bin/env', '/etc', '/tmp', '/proc', '/dev/shm') if os.path.exists(path)]\n"
                "print(os.geteuid(), os.getgroups(), there, sorted(os.listdir('/dev')), dict(os.environ).get('HOME'))\n"
                "try: open('/new', 'w')\n"
                "except OSError as error: print(error.strerror)\n"
                "try: pwd.getpwuid(os.geteuid())\n"
                "except KeyError: print('nobody')\n")
        found = subprocess.check_output(inside.argv("-I", "-c", look), env={}).decode()
    assert found == "12345 [] [] ['null', 'urandom'] None\nRead-only file system\nnobody\n"


def live_a_life(directory: Path, executable: str, uid: int) -> None:
    """Every command that a deployment needs, with a hook, a service, a probe and a rollback."""
    with image(directory, executable, uid) as inside, server(inside) as port:
        ini, config = inside.volume / "deploy.ini", ("-c", "/srv/deploy.ini")
        ini.write_text(CONFIG.format(python=inside.python.path, port=port, deadline="60s"))

        # A first release, a second one, and back.
        first = deploy(inside, "1.0")["release"]
        second = deploy(inside, "1.1")["release"]
        assert inside.run("probe", *config, check=0).data["probes"][0]["ok"]
        assert inside.run("rollback", *config, check=0).data["release"] == first
        assert (inside.volume / "hooked").read_text() == "1.0 1.1 "
        assert os.path.exists(os.path.join(os.fsencode(str(inside.volume)), b"app/current", NOT_UTF8))

        # What only looks.
        status = inside.run("status", *config, check=0).data
        assert (status["release"], status["previous"]) == (first, None)
        assert {entry["id"] for entry in inside.run("releases", *config, check=0).data["releases"]} == {first, second}
        inside.run("verify", *config, check=0)
        inside.run("preflight", *config, check=0)

        # A process of the image may run from what is pruned: nobody can tell, and that is said.
        third = deploy(inside, "1.2")["release"]
        pruned = inside.run("prune", *config, "--set", "deploy.keep_releases=1", check=0).data
        assert pruned["removed"] == [second] and "no /proc" in pruned["steps"][0]["detail"]

        # One that its probe does not take for what it is, since the server is told nothing.
        ini.write_text(CONFIG.format(python=inside.python.path, port=port, deadline="300ms").replace("settle = 0s", "action = none"))
        assert deploy(inside, "1.3", check=5)["release"] == third
        history = inside.run("history", *config, check=0).data["history"]
        assert [entry["result"] for entry in history] == [
            "deployed", "deployed", "rolled_back", "deployed", "pruned", "reverted"]
        os.unlink(os.path.join(os.fsencode(str(inside.volume)), b"app/current", NOT_UTF8))
        assert inside.run("verify", *config, check=7).data["differences"]["missing"] == ["caf\udce9.txt"]
        inside.run("recover", *config, check=0)

        # Without any configuration.
        inside.run("probe", "--url", f"http://127.0.0.1:{port}/", check=0)
        inside.run("probe", "--tcp", f"127.0.0.1:{port}", check=0)
        inside.run("config", check=0)
        assert "exit-codes" in inside.run("help", json=False, check=0).stdout


def test_a_life_in_an_image_that_holds_nothing_but_python(tmp_path: Path) -> None:
    live_a_life(tmp_path, OWN, UNKNOWN_UID)


@(once_in_ci if sys.version_info >= (3, 7) else lambda test: test)
def test_a_life_as_root_in_an_image_that_holds_nothing_but_python(tmp_path: Path) -> None:
    live_a_life(tmp_path, OWN, 0)


@once_in_ci
@pytest.mark.parametrize("uid", [0, UNKNOWN_UID], ids=["root", "unknown-uid"])
def test_a_life_in_an_image_that_holds_nothing_but_debians_python(tmp_path: Path, uid: int) -> None:
    live_a_life(tmp_path, DEBIAN, uid)


@once_in_ci
def test_without_proc_nobody_elses_pidfile_chooses_what_root_signals(tmp_path: Path) -> None:
    with image(tmp_path, OWN, 0) as inside, server(inside):
        (inside.volume / "deploy.ini").write_text("[service:web]\npidfile = /srv/web.pid\n[probe:web]\nservice = web\n")
        inside.run("-c", "/srv/deploy.ini", "probe", check=0)
        os.chown(str(inside.volume / "web.pid"), UNKNOWN_UID, UNKNOWN_UID)
        assert "belongs to uid 12345, process" in inside.run("-c", "/srv/deploy.ini", "probe", check=7).data["msg"]
