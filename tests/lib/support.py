"""What the tests share: run deploy.py as a user would, build artifacts, watch the disk.

The tests drive the program through its command line and use real peers where
they can: a real HTTP server, the system's sha256sum, tar and strace.
"""

import atexit
import bz2
import gzip
import hashlib
import http.server
import importlib.util
import io
import itertools
import json as json_module
import lzma
import os
import pprint
import py_compile
import random
import re
import shutil
import signal
import socket
import socketserver
import stat
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import zipfile
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable, Dict, Iterable, Iterator, List, NamedTuple, Optional, Tuple, Union


def _end_without_pytest(message: str, pytrace: bool = True) -> None:
    raise AssertionError(message)


try:
    import pytest
    FAILURES = (AssertionError, pytest.fail.Exception, pytest.skip.Exception)  # type: Tuple[Any, ...]
except ImportError:  # crash_matrix.py runs without it
    pytest = SimpleNamespace(fail=_end_without_pytest, skip=_end_without_pytest)
    FAILURES = (AssertionError,)

TESTS = Path(__file__).resolve().parent.parent
TOP = TESTS.parent
DEPLOY = TOP / "deploy.py"
# How much is run: "quick" (make test) covers every promise, "whole" (make test-all) each case, "proof" (make test-crash) takes as long
# as it takes.
SET = os.environ.get("DEPLOY_TEST_SET", "whole")
# Runs are forked from a Python that has deploy.py loaded, but one in so many, which starts a Python of its own: the same suite in half
# the time.
WARM = 60
_runs = itertools.count(1)

# What reads this Python's bytecode: itself, and the scripts that start it under another command.
SAME_PYTHON = {sys.executable}

# 2026-01-01T00:00:00Z: every generated member carries it, so that archives are reproducible.
FIXED_MTIME = 1767225600

_home = tempfile.mkdtemp(prefix="deploy-test-home-")
atexit.register(shutil.rmtree, _home, ignore_errors=True)


# -- running deploy.py -------------------------------------------------------

class Result(NamedTuple):
    """How one run of deploy.py ended; `data` is the decoded JSON object, or None."""

    argv: List[str]
    exit_code: int
    stdout: str
    stderr: str
    data: Any

    def describe(self) -> str:
        """Everything there is to know about the run, for a failure's message."""
        return (f"$ {' '.join(self.argv)}\nexit code {self.exit_code}\n"
                f"--- stdout ---\n{self.stdout}\n--- stderr ---\n{self.stderr}")


def clean_environment(extra: Optional[Dict[str, Optional[str]]] = None) -> Dict[str, str]:
    """A minimal environment; `extra` adds variables, and a value of None takes one away."""
    wanted = {"PATH": os.environ.get("PATH", os.defpath), "HOME": _home, "LANG": "C.UTF-8"}  # type: Dict[str, Any]
    wanted.update(extra or {})
    return {name: str(value) for name, value in wanted.items() if value is not None}


def compiled() -> str:
    """deploy.py as bytecode: the suite runs it thousands of times, and compiling is half of a short run."""
    identity = hashlib.sha256(f"{DEPLOY} {os.stat(str(DEPLOY)).st_mtime_ns}".encode()).hexdigest()
    path = os.path.join(_home, identity[:12], "deploy.pyc")
    if not os.path.exists(path):
        # Under a name of this process: py_compile's own temporary name may be the same in two that were forked.
        own = f"{path}.{os.getpid()}"
        py_compile.compile(str(DEPLOY), own, dfile=str(DEPLOY), doraise=True)
        os.replace(own, path)
    return path


def deploy_argv(*args: Any, root: Any = None, config: Any = None, python: str = sys.executable,
                json: bool = True) -> List[str]:
    """The command line that `run_deploy` runs."""
    argv = [python, compiled() if python in SAME_PYTHON else str(DEPLOY)]
    argv += ["--json"] if json else []
    argv += ["--root", str(root)] if root is not None else []
    argv += ["-c", str(config)] if config is not None else []
    return argv + [os.fspath(arg) if isinstance(arg, Path) else str(arg) for arg in args]


def start_deploy(*args: Any, env: Optional[Dict[str, Optional[str]]] = None, cwd: Any = "/", stdout: Any = None,
                 stderr: Any = None, **options: Any) -> subprocess.Popen:
    """Start deploy.py in a process group of its own and do not wait, for tests of signals and locks.

    Takes root, config, python and json as `run_deploy` does.  Output goes
    nowhere unless a file is given.
    """
    return subprocess.Popen(
        deploy_argv(*args, **options), env=clean_environment(env), cwd=str(cwd), stdin=subprocess.DEVNULL,
        stdout=stdout or subprocess.DEVNULL, stderr=stderr or subprocess.DEVNULL, start_new_session=True)


def run_deploy(*args: Any, root: Any = None, config: Any = None, env: Optional[Dict[str, Optional[str]]] = None,
               cwd: Any = None, timeout: float = 60, python: str = sys.executable, check: Optional[int] = None,
               json: bool = True) -> Result:
    """Run deploy.py to its end.

    `env` adds to a minimal clean environment (see `clean_environment`), `cwd`
    is `/` unless given.  With `json` the run gets --json and `data` holds the
    decoded stdout; stdout that is not exactly one JSON object is a failure.
    `check` is the exit code that must come, else the test fails and shows all
    output.  A run that outlives `timeout` seconds is killed, and fails the test.
    """
    options = {"root": root, "config": config, "python": python, "json": json}
    if WARM and next(_runs) % WARM and python == sys.executable and not re.search(r"(?m)^(LANG|LC_|PYTHON)", "\n".join(env or {})):
        from crashes import run_warm
        result = run_warm(deploy_argv(*args, **options), env=clean_environment(env), cwd=str(cwd or "/"), timeout=timeout)
        if result is not None:
            return checked(result, json=json, check=check)
    # Files, not pipes: a background child that keeps stdout open cannot hang the test.
    with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
        process = start_deploy(*args, env=env, cwd=cwd or "/", stdout=stdout, stderr=stderr, **options)
        timed_out = _wait_or_kill(process, timeout)
        texts = []
        for stream in (stdout, stderr):
            stream.seek(0)
            texts.append(stream.read().decode("utf-8", "surrogateescape"))
    result = Result(deploy_argv(*args, **options), process.returncode, texts[0], texts[1], None)
    if timed_out:
        pytest.fail(f"still running after {timeout} s, killed\n{result.describe()}", pytrace=False)
    return checked(result, json=json, check=check)


def checked(result: Result, *, json: bool, check: Optional[int]) -> Result:
    """Decode what a run printed, and hold it against the exit code that must come."""
    if json:
        result = result._replace(data=decode_one_object(result))
    if check is not None and result.exit_code != check:
        pytest.fail(f"expected exit code {check}\n{result.describe()}", pytrace=False)
    return result


def shape(text: str) -> str:
    """A transcript without what differs from run to run: times, digests, numbers, the width of bars and columns."""
    text = re.sub(r"\b[0-9a-f]{12,64}\b", "HEX", re.sub(r"\d{8}T\d{6}Z-[0-9a-f]{6}\b", "RUN", text))
    text = re.sub(r"\d+(\.\d+)?(s|m\d+s)\b", "TIME", re.sub(r"#+", "#", text))
    text = re.sub(r" by \w+,", " by USER,", re.sub(r"\d+", "0", text))
    return re.sub(r"[ \t]+", " ", text).strip()


def _wait_or_kill(process: subprocess.Popen, timeout: float) -> bool:
    try:
        process.wait(timeout)
        return False
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return True


def decode_one_object(result: Result) -> Any:
    """Decode stdout, which must be exactly one JSON object."""
    try:
        data = json_module.loads(result.stdout)
    except ValueError as error:
        pytest.fail(f"stdout is not one JSON value: {error}\n{result.describe()}", pytrace=False)
    if not isinstance(data, dict):
        pytest.fail(f"stdout is not a JSON object\n{result.describe()}", pytrace=False)
    return data


def described(found: Any) -> str:
    """A result, or a part of one, as text: pytest cuts the repr of anything else in an assertion's message short."""
    if isinstance(found, dict) and "steps" in found:
        found = {name: found.get(name) for name in ("command", "exit_code", "error", "warnings", "steps")}
    return pprint.pformat(found, width=140)


def load_deploy() -> Any:
    """Import deploy.py as a module, once."""
    if "deploy" not in sys.modules:
        spec = importlib.util.spec_from_file_location("deploy", str(DEPLOY))
        module = importlib.util.module_from_spec(spec)
        sys.modules["deploy"] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules["deploy"]
            raise
    return sys.modules["deploy"]


# -- trees and archives ------------------------------------------------------

class Entry(NamedTuple):
    """One entry of a tree: a file's bytes, a directory (`content` None) or a symlink (`link`)."""

    content: Optional[bytes] = b""
    mode: int = 0o644
    link: str = ""


Spec = Union[str, bytes, Entry, None]


def file(content: Union[str, bytes] = b"", mode: int = 0o644) -> Entry:
    """A file with a mode."""
    return Entry(content.encode("utf-8") if isinstance(content, str) else content, mode)


def link(target: str) -> Entry:
    """A symlink."""
    return Entry(link=target, mode=0o777)


def directory(mode: int = 0o755) -> Entry:
    """A directory, which may stay empty."""
    return Entry(None, mode)


def entry(spec: Spec) -> Entry:
    """Read a tree's shorthand: text or bytes are a file, None is a directory."""
    if isinstance(spec, Entry):
        return spec
    return directory() if spec is None else file(spec)


def make_tree(path: Any, tree: Dict[str, Spec]) -> Path:
    """Write {relative name: text, bytes, file(), link(), directory() or None} under a path; returns the path."""
    top = Path(str(path))
    top.mkdir(parents=True, exist_ok=True)
    modes = []
    for name, spec in tree.items():
        found, target = entry(spec), top / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if found.link:
            target.symlink_to(found.link)
        elif found.content is None:
            target.mkdir(exist_ok=True)
            modes.append((target, found.mode))
        else:
            target.write_bytes(found.content)
            modes.append((target, found.mode))
    # Last and deepest first: a read-only directory could not be filled any more.
    for target, mode in sorted(modes, reverse=True):
        target.chmod(mode)
    return top


def member(name: str, content: Union[str, bytes] = b"", type: bytes = tarfile.REGTYPE, **fields: Any) -> Tuple[Any, bytes]:
    """One member of a tar archive, written exactly as told, however hostile.

    `fields` set any attribute of tarfile.TarInfo: linkname, mode, uid, uname,
    size (it may lie about the content, or be negative), devmajor, pax_headers.
    """
    info = tarfile.TarInfo(name)
    data = content.encode("utf-8") if isinstance(content, str) else content
    info.type, info.size, info.mtime = type, len(data), FIXED_MTIME
    info.mode = 0o755 if type == tarfile.DIRTYPE else 0o644
    for field, value in fields.items():
        setattr(info, field, value)
    return info, data


def tree_members(tree: Dict[str, Spec]) -> List[Tuple[Any, bytes]]:
    """The members of an ordinary archive of a tree, directories first."""
    directories = {str(parent): directory() for name in tree for parent in Path(name).parents if str(parent) != "."}
    everything = dict(directories, **{name: entry(spec) for name, spec in tree.items()})
    members = []
    for name, found in sorted(everything.items()):
        if found.link:
            members.append(member(name, type=tarfile.SYMTYPE, linkname=found.link, mode=0o777))
        elif found.content is None:
            members.append(member(name, type=tarfile.DIRTYPE, mode=found.mode))
        else:
            members.append(member(name, found.content, mode=found.mode))
    return members


def tar_bytes(members: Iterable[Any], tar_format: int = tarfile.PAX_FORMAT) -> bytes:
    """Write members one after another, unchecked; a member given as bytes goes in as it is."""
    out = io.BytesIO()
    for item in members:
        if isinstance(item, bytes):
            out.write(item)
            continue
        info, data = item
        out.write(info.tobuf(tar_format, "utf-8", "surrogateescape"))
        out.write(data + b"\0" * (-len(data) % tarfile.BLOCKSIZE))
    return out.getvalue() + b"\0" * (2 * tarfile.BLOCKSIZE)


def pax_global(**headers: str) -> bytes:
    """A pax global header, as `git archive` writes one; goes into a list of members."""
    return tarfile.TarInfo.create_pax_global_header(headers)  # type: ignore


def compress(data: bytes, compression: str) -> bytes:
    """Compress with '', 'gz', 'bz2', 'xz' or 'zst' (which needs the zstd program)."""
    if compression == "gz":
        out = io.BytesIO()
        with gzip.GzipFile(fileobj=out, mode="wb", mtime=0, filename="") as stream:
            stream.write(data)
        return out.getvalue()
    if compression == "zst":
        return subprocess.run([needs("zstd"), "-q", "-c"], input=data, stdout=subprocess.PIPE, check=True).stdout
    return {"": lambda data: data, "bz2": bz2.compress, "xz": lzma.compress}[compression](data)


SUFFIX_COMPRESSION = {".gz": "gz", ".tgz": "gz", ".bz2": "bz2", ".xz": "xz", ".zst": "zst"}


def make_tar(path: Any, members: Iterable[Any], compression: Optional[str] = None,
             tar_format: int = tarfile.PAX_FORMAT) -> Path:
    """Write a tar archive of `member()`s; the compression comes from the suffix unless it is given."""
    target = Path(str(path))
    if compression is None:
        compression = SUFFIX_COMPRESSION.get(target.suffix, "")
    target.write_bytes(compress(tar_bytes(members, tar_format), compression))
    return target


def make_zip(path: Any, tree: Dict[str, Spec]) -> Path:
    """Write a zip archive of a tree, with Unix modes and symlinks."""
    target = Path(str(path))
    with zipfile.ZipFile(str(target), "w", zipfile.ZIP_DEFLATED) as archive:
        for name, spec in sorted(tree.items()):
            found = entry(spec)
            is_directory = found.content is None and not found.link
            kind = stat.S_IFLNK if found.link else stat.S_IFDIR if is_directory else stat.S_IFREG
            info = zipfile.ZipInfo(name + "/" if is_directory else name, (2026, 1, 1, 0, 0, 0))
            info.create_system, info.external_attr = 3, (kind | found.mode) << 16
            info.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(info, found.link.encode("utf-8") if found.link else found.content or b"")
    return target


def application_tree(version: str) -> Dict[str, Spec]:
    """A small application: VERSION, an executable, a nested file, a symlink inside, an empty directory."""
    return {
        "VERSION": version + "\n",
        "bin/run": file(f"#!/bin/sh\necho {version}\n", 0o755),
        "lib/nested/data.txt": f"data of {version}\n",
        "data": link("lib/nested/data.txt"),
        "log": directory(),
    }


def make_artifact(directory: Any, version: str, files: Optional[Dict[str, Any]] = None, suffix: str = ".tar.gz",
                  name: str = "myapp") -> Path:
    """Build `myapp-<version><suffix>` of the small application, and its `.sha256` beside it.

    `files` adds to the tree or replaces entries; `files={"log": ...}`.
    """
    top = Path(str(directory))
    top.mkdir(parents=True, exist_ok=True)
    tree = dict(application_tree(version), **(files or {}))
    path = top / f"{name}-{version}{suffix}"
    if suffix == ".zip":
        make_zip(path, tree)
    else:
        make_tar(path, tree_members(tree))
    write_checksum(path)
    return path


def write_checksum(path: Any) -> Path:
    """Write `<path>.sha256` as sha256sum does."""
    artifact = Path(str(path))
    target = artifact.with_name(artifact.name + ".sha256")
    target.write_text(f"{sha256_of(artifact)}  {artifact.name}\n")
    return target


def sha256_of(path: Any) -> str:
    """The SHA-256 of a file, as hex."""
    digest = hashlib.sha256()
    with open(str(path), "rb") as stream:
        for block in iter(lambda: stream.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


# -- the disk ----------------------------------------------------------------

def snapshot(root: Any) -> Dict[str, Tuple[str, int, int, int, str]]:
    """Everything at and under a root: {path: (type, mode, size, mtime_ns, SHA-256 or link target)}.

    Equal snapshots mean that nothing was created, removed, written, touched or
    given another mode.  The root itself is ".".
    """
    top, seen = str(root), {}
    if not os.path.lexists(top):
        return seen
    pending = ["."]
    while pending:
        name = pending.pop()
        path = os.path.normpath(os.path.join(top, name))
        found = os.lstat(path)
        kind, content = "other", ""
        if stat.S_ISDIR(found.st_mode):
            kind = "directory"
            pending += [os.path.normpath(os.path.join(name, below)) for below in os.listdir(path)]
        elif stat.S_ISLNK(found.st_mode):
            kind, content = "symlink", os.readlink(path)
        elif stat.S_ISREG(found.st_mode):
            kind, content = "file", sha256_of(path)
        seen[name] = (kind, stat.S_IMODE(found.st_mode), found.st_size, found.st_mtime_ns, content)
    return seen


# -- tools and peers ---------------------------------------------------------

def in_ci() -> bool:
    """Whether a missing tool is a failure rather than a reason to skip."""
    return os.environ.get("CI", "").lower() == "true"


def missing(what: str) -> None:
    """Skip the test, naming what is missing; under CI=true fail it instead."""
    if in_ci():
        pytest.fail(f"{what} is missing, and CI must have it", pytrace=False)
    pytest.skip(f"{what} is missing")


def needs(tool: str) -> str:
    """The path of a program; without it the test is skipped locally and fails in CI."""
    path = shutil.which(tool)
    if path is None:
        missing(tool)
    return str(path)


def sized(quick: Any, whole: Any, proof: Any = None) -> Any:
    """What a test takes in the set that runs."""
    return {"quick": quick, "whole": whole, "proof": whole if proof is None else proof}[SET]


def deep(test: Any) -> Any:
    """Mark a test that takes long, and whose promise a shorter one covers too, or that needs no second Python."""
    return pytest.mark.skipif(SET == "quick", reason="not in the quick set: make test-all runs it")(test)


def needs_artifact(pattern: str) -> Path:
    """A fetched artifact that matches a pattern; see fetch_artifacts.sh."""
    where = Path(os.environ.get("DEPLOY_TEST_ARTIFACTS") or str(TOP / ".cache" / "artifacts"))
    found = sorted(where.glob(pattern)) if where.is_dir() else []
    if not found:
        missing(f"{pattern} in {where} (tests/tools/fetch_artifacts.sh fetches it)")
    return found[-1]


def in_namespace(script: str, fresh: Iterable[str] = (), timeout: float = 120) -> Any:
    """Run a shell script as root of mounts and processes of its own, with an empty tmpfs at each path of `fresh`.

    Returns the finished process with its output as text.  What the script
    leaves running ends with it, and nothing that it mounts is seen outside.
    """
    if os.geteuid() != 0:
        pytest.skip("root alone has namespaces")
    mounts = "".join(f"mount -t tmpfs -o mode=0755 fresh {path}\n" for path in fresh)
    return subprocess.run([needs("unshare"), "-m", "-p", "-f", "--kill-child", "--mount-proc", "/bin/sh", "-ec", mounts + script],
                          env=clean_environment(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          universal_newlines=True, timeout=timeout)


class FakeCommand(NamedTuple):
    """A program of ours, first on PATH, that remembers how it was called."""

    path: Path
    log: Path
    env: Dict[str, str]

    def calls(self) -> List[List[str]]:
        """The arguments of every call so far, without the program's name."""
        return [call["argv"] for call in self.details()]

    def details(self) -> List[Dict[str, Any]]:
        """Every call so far: argv, cwd and the environment."""
        if not self.log.exists():
            return []
        return [json_module.loads(line) for line in self.log.read_text().splitlines()]


_FAKE = """#!{python} -I
import json, os, sys
with open({log!r}, "a") as log:
    log.write(json.dumps({{"argv": sys.argv[1:], "cwd": os.getcwd(), "env": dict(os.environ)}}) + "\\n")
{script}
"""


def fake_command(directory: Any, name: str, script: str = "") -> FakeCommand:
    """Put an executable Python script into a directory; `.env` holds the PATH that finds it.

    Each call is logged as a JSON line before `script` (Python) runs:
    `fake_command(bin, "systemctl", "sys.exit(1)").calls() == [["restart", "x"]]`.
    """
    top = Path(str(directory))
    top.mkdir(parents=True, exist_ok=True)
    path, log = top / name, top / (name + ".log")
    path.write_text(_FAKE.format(python=sys.executable, log=str(log), script=script))
    path.chmod(0o755)
    return FakeCommand(path, log, {"PATH": f"{top}:{os.environ.get('PATH', os.defpath)}"})


def free_port() -> int:
    """A TCP port on loopback that nothing listens on, below those that the kernel hands out: no suite beside this one takes it meanwhile."""
    lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    while True:
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", random.randrange(lowest // 2, lowest)))
            return int(probe.getsockname()[1])


def wait_until(predicate: Callable[[], Any], timeout: float = 60, what: str = "") -> Any:
    """Wait until a predicate is true and return its value; the test fails after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while True:
        value = predicate()
        if value:
            return value
        if time.monotonic() > deadline:
            pytest.fail(f"not within {timeout} s: {what or predicate}")
        time.sleep(0.02)


class Server:
    """A real HTTP server on loopback that answers like a program which read its version when it started.

    `GET` answers {"status": "ok", "version": ...} with the version that the
    file held when the server was last (re)started, so one that nobody restarts
    goes on answering with the old version.  `restart_command` is a program for
    `[service:NAME] command`; `status` and `body` force another answer.
    """

    def __init__(self, version_file: Any, directory: Any) -> None:
        self.version_file = Path(str(version_file))
        self.status, self.body = 200, None  # type: int, Optional[bytes]
        self.requests = []  # type: List[str]
        self.restarts = 0
        self.version = self._read_version()
        self._http = _ThreadingServer(("127.0.0.1", 0), _Handler)
        self._http.owner = self
        self.port = int(self._http.server_address[1])
        self.url = f"http://127.0.0.1:{self.port}/health"
        self.restart_command = fake_command(directory, f"restart-{self.port}", (
            "import urllib.request\n"
            "opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))\n"
            f"opener.open('http://127.0.0.1:{self.port}/restart', data=b'', timeout=60).read()"))
        threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()

    def _read_version(self) -> Optional[str]:
        try:
            return self.version_file.read_text().strip()
        except OSError:
            return None

    def restart(self) -> None:
        """Read the version again, as a new process would."""
        self.version = self._read_version()
        self.restarts += 1

    def answer(self) -> Tuple[int, bytes]:
        """The status and the body of the next answer."""
        if self.body is not None:
            return self.status, self.body
        status = 503 if self.version is None and self.status == 200 else self.status
        words = {"status": "ok" if status == 200 else "failing", "version": self.version}
        return status, json_module.dumps(words).encode("ascii")

    def stop(self) -> None:
        """Stop listening."""
        self._http.shutdown()
        self._http.server_close()


class _ThreadingServer(socketserver.ThreadingMixIn, http.server.HTTPServer):
    daemon_threads = True
    owner = None  # type: Any


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.server.owner.requests.append(self.path)  # type: ignore
        self._answer(*self.server.owner.answer())  # type: ignore

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.owner.restart()  # type: ignore
        self._answer(200, b"restarted")

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *details: Any) -> None:
        """Keep the tests' output clean."""


# -- an application under deployment -----------------------------------------

class App:
    """One application in a temporary directory: its root, its configuration and its artifacts."""

    def __init__(self, directory: Any) -> None:
        self.directory = Path(str(directory))
        self.root = self.directory / "root"
        self.config = self.directory / "deploy.ini"
        self.root.mkdir(parents=True)
        self.configure()

    def configure(self, text: str = "") -> Path:
        """Write deploy.ini: the root and the application's name, then `text` (which may open with more of [deploy])."""
        self.config.write_text(f"[deploy]\nroot = {self.root}\napplication = myapp\n{text}\n")
        return self.config

    def artifact(self, version: str, files: Optional[Dict[str, Any]] = None, **options: Any) -> Path:
        """Build an artifact; see `make_artifact`."""
        return make_artifact(self.directory / "artifacts", version, files, **options)

    def run(self, *args: Any, **options: Any) -> Result:
        """Run deploy.py with this configuration; see `run_deploy`."""
        return run_deploy(*args, config=self.config, **options)

    def deploy(self, version: str, files: Optional[Dict[str, Any]] = None, check: int = 0) -> Result:
        """Build and deploy a version."""
        return self.run("deploy", self.artifact(version, files), check=check)

    @property
    def current(self) -> Optional[str]:
        """The id of the live release, or None."""
        path = self.root / "current"
        return os.path.basename(os.readlink(str(path))) if path.is_symlink() else None

    @property
    def version(self) -> Optional[str]:
        """What current/VERSION says, or None."""
        path = self.root / "current" / "VERSION"
        return path.read_text().strip() if path.exists() else None

    def releases(self) -> List[str]:
        """The names in releases/, sorted."""
        path = self.root / "releases"
        return sorted(os.listdir(str(path))) if path.is_dir() else []

    def record(self, release: str) -> Dict[str, Any]:
        """The record of a release."""
        return json_module.loads((self.root / ".deploy" / "releases" / f"{release}.json").read_text())

    def history(self) -> List[Dict[str, Any]]:
        """The lines of the history."""
        path = self.root / ".deploy" / "history.jsonl"
        return [json_module.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def leftovers(self) -> List[str]:
        """What a finished run must not leave: trash, a journal, what was being unpacked, temporary names."""
        state = self.root / ".deploy"
        found = [str(path.relative_to(self.root)) for path in (state / "trash").glob("*")]
        found += [str(path.relative_to(self.root)) for path in self.root.rglob("*.tmp")]
        return sorted(found + (["journal.json"] if (state / "journal.json").exists() else []))


# -- another user --------------------------------------------------------------

ANOTHER_UID = 61234


@contextmanager
def open_to_others() -> Iterator[App]:
    """An application in a place that every user may enter, which pytest's own directories are not."""
    place = Path(tempfile.mkdtemp(prefix="deploy-test-another-"))
    try:
        place.chmod(0o755)
        yield App(place / "app")
    finally:
        shutil.rmtree(str(place))


def run_as_another(app: App, *args: Any, but: Optional[Path] = None) -> Dict[str, Any]:
    """Give an application, `but` for one path, to a user without any rights and run deploy.py as that user: the JSON result.

    By the system's Python, fed through stdin: nothing else need be readable to that user.
    """
    for path in {app.directory, *app.directory.rglob("*")} - {but}:
        os.chown(str(path), ANOTHER_UID, ANOTHER_UID, follow_symlinks=False)
    argv = [needs("setpriv"), f"--reuid={ANOTHER_UID}", f"--regid={ANOTHER_UID}", "--clear-groups", "/usr/bin/python3", "-I", "-",
            "--json", "-c", str(app.config), *map(str, args)]
    done = subprocess.run(argv, input=DEPLOY.read_bytes(), env={}, cwd="/", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    return json_module.loads(done.stdout.decode("ascii"))
