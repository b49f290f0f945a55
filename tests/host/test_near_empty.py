"""deploy.py in images that hold little more than Python, and in Pythons that are not whole."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Dict, Iterator, List, Sequence

import pytest

from images import UNKNOWN_UID, WHOLE, Image, Python, library_without, python_without
from support import (App, DEPLOY, Result, Server, clean_environment, compiled, make_artifact, missing, needs, deep,
                     wait_until)
from tables import section

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
    if list(Path(Python.of(executable).path).parents[1].glob("usr/lib*/ld-linux*")):
        pytest.skip("this Python brings a C library of its own")
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
        # A first release, of which nobody tells the server: nothing was live before; a second one, and back.
        ini.write_text(CONFIG.format(python=inside.python.path, port=port, deadline="200ms\nrequired = no"))
        first = deploy(inside, "1.0")["release"]
        ini.write_text(CONFIG.format(python=inside.python.path, port=port, deadline="60s"))
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
        inside.run("preflight", *config, "--set", "log.syslog=udp://127.0.0.1:9", check=0)

        third = deploy(inside, "1.2")["release"]
        pruned = inside.run("prune", *config, "--set", "deploy.keep_releases=1", check=0).data
        assert pruned["removed"] == [second]

        # One that its probe does not take for what it is, since the server is told nothing.
        ini.write_text(CONFIG.format(python=inside.python.path, port=port, deadline="3s").replace("settle = 0s", "action = none"))
        assert deploy(inside, "1.3", check=5)["release"] == third
        history = inside.run("history", *config, check=0).data["history"]
        assert [entry["result"] for entry in history] == [
            "deployed", "deployed", "rolled_back", "deployed", "pruned", "rolled_back"]
        os.unlink(os.path.join(os.fsencode(str(inside.volume)), b"app/current", NOT_UTF8))
        assert inside.run("verify", *config, check=7).data["differences"]["missing"] == ["caf\udce9.txt"]
        inside.run("recover", *config, check=0)

        # Without any configuration.
        inside.run("probe", "--url", f"http://127.0.0.1:{port}/", check=0)
        inside.run("probe", "--tcp", f"127.0.0.1:{port}", check=0)
        inside.run("config", check=0)
        assert "Exit codes" in inside.run("help", json=False, check=0).stdout


@deep
def test_a_life_in_an_image_that_holds_nothing_but_python(tmp_path: Path) -> None:
    live_a_life(tmp_path, OWN, UNKNOWN_UID)


once_or_oldest = deep if sys.version_info >= (3, 7) else (lambda test: test)


@once_or_oldest
def test_a_life_as_root_in_an_image_that_holds_nothing_but_python(tmp_path: Path) -> None:
    live_a_life(tmp_path, OWN, 0)


@deep
@pytest.mark.parametrize("uid", [0, UNKNOWN_UID], ids=["root", "unknown-uid"])
def test_a_life_in_an_image_that_holds_nothing_but_debians_python(tmp_path: Path, uid: int) -> None:
    live_a_life(tmp_path, DEBIAN, uid)


@deep
def test_without_proc_nobody_elses_pidfile_chooses_what_root_signals(tmp_path: Path) -> None:
    with image(tmp_path, OWN, 0) as inside, server(inside):
        (inside.volume / "deploy.ini").write_text("[service:web]\npidfile = /srv/web.pid\n[probe:web]\nservice = web\n")
        inside.run("-c", "/srv/deploy.ini", "probe", check=0)
        os.chown(str(inside.volume / "web.pid"), UNKNOWN_UID, UNKNOWN_UID)
        assert "belongs to uid 12345, process" in inside.run("-c", "/srv/deploy.ini", "probe", check=7).data["msg"]


# -- what the page on containers tells ------------------------------------------

def instructions() -> Dict[str, List[str]]:
    """The command lines on the page, by the instruction that they are given to."""
    text = section("Containers")
    return {name: json.loads(words) for name, words in re.findall(r"(?m)^    (RUN|HEALTHCHECK)(?: CMD)? (\[.*\])$", text)}


@deep
def test_the_health_check_of_the_page_on_containers(tmp_path: Path) -> None:
    with image(tmp_path, DEBIAN, UNKNOWN_UID) as inside:
        def run(name: str, port: int) -> int:
            words = [word.replace("/usr/local/sbin", "").replace("/usr/local/lib", "/srv").replace(":8080/", f":{port}/")
                     for word in instructions()[name]]
            assert words[0] == "python3"
            return subprocess.call(inside.argv(*words[1:]), env={}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

        with server(inside) as port:
            assert run("RUN", port) == 0 and (inside.volume / "deploy.pyc").exists()
            assert run("HEALTHCHECK", port) == 0
        assert run("HEALTHCHECK", port) == 7


@deep
def test_process_1_heeds_signals(tmp_path: Path) -> None:
    with image(tmp_path, OWN, 0) as inside:
        waits = "import time; open('/srv/waiting', 'w'); time.sleep(600)"
        (inside.volume / "deploy.ini").write_text(
            f'[deploy]\nroot = /srv/app\n[hooks]\npre_activate = {inside.python.path} -c "{waits}"\n')
        inside.run("pack", source(inside, "1.0"), "-o", "/srv/shop-1.0.tar.gz", check=0)
        enter, chroot = inside.argv(inside.program, "-c", "/srv/deploy.ini", "deploy", "/srv/shop-1.0.tar.gz"), needs("chroot")
        position = enter.index(chroot)
        first = [needs("unshare"), "--pid", "--fork", "--kill-child"]
        process = subprocess.Popen(enter[:position] + first + enter[position:], env={}, stderr=subprocess.DEVNULL)
        wait_until((inside.volume / "waiting").exists, 60, "the hook")
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(children[0]), signal.SIGTERM)
        assert process.wait(60) == 143
        assert inside.run("-c", "/srv/deploy.ini", "status", check=0).data["release"] is None
        assert [entry["result"] for entry in inside.run("-c", "/srv/deploy.ini", "history", check=0).data["history"]] == ["failed"]


def test_a_python_that_believes_to_be_installed_in_the_top_directory_finds_its_library() -> None:
    """As Debian's does when it is started without PATH under its bare name."""
    done = subprocess.run(["python3", str(DEPLOY), "--version"], executable=needs(DEBIAN), env={}, cwd="/",
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.stdout.startswith(b"deploy.py "), done.stdout


# -- Pythons that are not whole -------------------------------------------------

HASHES = ("_hashlib.*", "_sha*", "_md5*", "_blake2*", "_sha2*")
TOLD = "this Python's standard library is not whole: "
WHAT_TO_INSTALL = "install all of it (Debian, Ubuntu: apt-get install python3)"


def run_without(directory: Path, patterns: Sequence[str], *args: Any) -> Result:
    """Run deploy.py by an interpreter that lacks some modules."""
    if {pattern.partition(".")[0] for pattern in patterns} & set(sys.builtin_module_names):
        pytest.skip("this Python has it built in")
    lame = python_without(directory / "python", Python.of(sys.executable), *patterns)
    argv = [lame, compiled(), *map(str, args)]
    done = subprocess.run(argv, env=clean_environment(), cwd="/", stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, universal_newlines=True)
    return Result(argv, done.returncode, done.stdout, done.stderr, None)


@pytest.mark.parametrize("pattern, args", [
    ("json", ("status",)), ("argparse.py", ("status",)), ("typing.py", ("--version",)), ("contextlib.py", ("help",)), ("zlib.*", ("status",)),
], ids=lambda value: value if isinstance(value, str) else "")
def test_a_missing_module_is_told_in_one_line(tmp_path: Path, pattern: str, args: Sequence[str]) -> None:
    name = pattern.partition(".")[0]
    result = run_without(tmp_path, [pattern], *args)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == f"deploy.py: error: {TOLD}No module named '{name}'; {WHAT_TO_INSTALL}\n"


@pytest.mark.parametrize("args", [("--json", "status"), ("/tmp/what-ansible-hands-over",)], ids=["json", "ansible"])
def test_a_missing_module_is_told_as_json_without_the_json_module(tmp_path: Path, args: Sequence[str]) -> None:
    result = run_without(tmp_path, ["json"], *args)
    told = json.loads(result.stdout)
    assert result.exit_code == told["exit_code"] == 2 and told["failed"] and not told["changed"]
    assert told["msg"] == told["error"]["message"] == TOLD + "No module named 'json'"


@pytest.mark.parametrize("closing", ["2>&-", ">&-"])
def test_a_missing_module_needs_no_stream_to_be_told_on(tmp_path: Path, closing: str) -> None:
    lame = python_without(tmp_path, Python.of(sys.executable), "json")
    done = subprocess.run(["sh", "-c", f'exec "$@" {closing}', "sh", lame, compiled(), "--json", "status"],
                          stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert done.returncode == 2 and b"Traceback" not in done.stderr


def test_a_hashlib_without_the_one_hash_is_told_in_one_line(tmp_path: Path) -> None:
    if {"_sha256", "_sha2"} & set(sys.builtin_module_names):
        pytest.skip("this Python has SHA-256 built in")
    result = run_without(tmp_path, HASHES, "status")
    assert result.exit_code == 2
    assert result.stderr == f"deploy.py: error: {TOLD}hashlib has no sha256; {WHAT_TO_INSTALL}\n"


@pytest.mark.parametrize("pattern, args", [
    ("configparser.py", ("-c", "deploy.ini", "status")), ("socket.py", ("probe", "--tcp", "127.0.0.1:1")),
    ("difflib.py", ("statsu",)),
], ids=lambda value: value if isinstance(value, str) else "")
def test_a_module_that_is_missed_later_is_an_error_like_any_other(tmp_path: Path, pattern: str, args: Sequence[str]) -> None:
    (tmp_path / "deploy.ini").write_text("[deploy]\nroot = root\n")
    args = [str(tmp_path / arg) if arg == "deploy.ini" else arg for arg in args]
    result = run_without(tmp_path, [pattern], *args)
    assert (result.exit_code, result.stdout) == (2, "")
    assert re.match(rf"deploy.py: error: {TOLD}No module named '{pattern.replace('.py', '')}'\nhint: {re.escape(WHAT_TO_INSTALL)}\n\Z",
                    result.stderr), result.stderr


@pytest.mark.parametrize("pattern", ["bz2.py", "_bz2.*"])
def test_an_artifact_that_this_python_cannot_read_is_refused(tmp_path: Path, app: App, pattern: str) -> None:
    artifact = app.artifact("1.0", suffix=".tar.bz2")
    result = run_without(tmp_path, [pattern], "--root", app.root, "deploy", artifact)
    assert result.exit_code == 2
    assert f"{TOLD}No module named '{pattern.partition('.')[0]}'\nhint: {WHAT_TO_INSTALL}\n" in result.stderr
    assert "Traceback" not in result.stderr and app.releases() == []


def test_https_without_ssl_is_an_answer_that_is_not_well(tmp_path: Path, server: Server) -> None:
    result = run_without(tmp_path, ["ssl.py"], "probe", "--url", f"https://127.0.0.1:{server.port}/")
    assert result.exit_code == 7 and f"{TOLD}No module named 'ssl'; {WHAT_TO_INSTALL}" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_deployment_needs_neither_ctypes_nor_ssl_nor_http(tmp_path: Path, app: App) -> None:
    patterns = ["ctypes", "_ctypes.*", "ssl.py", "_ssl.*", "http", "bz2.py", "lzma.py", "email", "urllib"]
    result = run_without(tmp_path, patterns, "--root", app.root, "deploy", app.artifact("1.0"))
    assert result.exit_code == 0 and app.version == "1.0", result.describe()


def test_a_module_that_is_missed_after_activation_leads_back(tmp_path: Path, app: App) -> None:
    app.deploy("1.0")
    app.configure("[hooks]\npost_activate = true\n")
    result = run_without(tmp_path, ["_posixsubprocess.*"], "-c", app.config, "deploy", app.artifact("1.1"))
    assert result.exit_code == 5 and f"{TOLD}No module named '_posixsubprocess'; rolled back" in result.stderr
    assert app.version == "1.0" and app.leftovers() == [] and "Traceback" not in result.stderr
    assert app.run("deploy", app.artifact("1.1"), check=0).data["changed"], "it is not called bad"


@deep
def test_lzma_is_missed_where_there_is_no_xz_either(tmp_path: Path) -> None:
    python = Python.of(OWN)
    library = library_without(tmp_path / "python", python, ["lzma.py"], WHOLE)
    with image(tmp_path / "image", OWN, 0, library=library) as inside:
        make_artifact(inside.volume, "1.0", suffix=".tar.xz")
        result = inside.run("--root", "/srv/app", "deploy", "/srv/myapp-1.0.tar.xz", json=False)
    assert result.exit_code == 2 and f"{TOLD}No module named 'lzma'\nhint: {WHAT_TO_INSTALL}" in result.stderr
    assert not (inside.volume / "app" / "releases").exists() or not os.listdir(str(inside.volume / "app" / "releases"))


@deep
def test_debians_minimal_python_is_told_what_it_lacks(tmp_path: Path) -> None:
    python = Python.of(DEBIAN)
    packages = [f"{prefix}{os.path.basename(python.library)}-minimal" for prefix in ("", "lib")]
    listed = subprocess.check_output([needs("dpkg"), "-L", *packages]).decode().splitlines()
    for name in listed:
        if name.startswith(python.library + "/") and os.path.isfile(name):
            target = tmp_path / "minimal" / os.path.relpath(name, python.library)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(name, str(target))
    with image(tmp_path / "image", DEBIAN, UNKNOWN_UID, library=tmp_path / "minimal") as inside:
        result = inside.run("status", json=False)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == f"deploy.py: error: {TOLD}No module named 'json'; {WHAT_TO_INSTALL}\n"
