"""Stop deploy.py at one system call: record the calls of a run, kill or fail one of them, judge what is left."""

import hashlib
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence

from support import (SAME_PYTHON, TESTS, App, Result, application_tree, checked, clean_environment, compiled, deploy_argv, entry, needs,
                     snapshot, wait_until)

MUTATING = ("open", "openat", "creat", "write", "pwrite64", "writev", "truncate", "ftruncate", "fallocate", "sendfile",
            "copy_file_range", "rename", "renameat", "renameat2", "symlink", "symlinkat", "link", "linkat", "unlink",
            "unlinkat", "rmdir", "mkdir", "mkdirat", "chmod", "fchmod", "fchmodat", "fchmodat2", "chown", "fchown",
            "fchownat", "utimensat", "fsync", "fdatasync", "sync", "syncfs", "flock")
PHASE = re.compile(r'\\"phase\\": \\"(\w+)\\"')


class Call(NamedTuple):
    """One system call of a run: `number` counts those of the same name, as strace's `when` does.

    `phase` is how far the run is: "" before its first journal, then what it noted there last or is about to note of the
    switch, and "closed" once the verdict is in the history.
    """

    name: str
    number: int
    text: str
    phase: str = ""


def script(path: Any, text: str) -> Path:
    """Write an executable shell script."""
    target = Path(str(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text("#!/bin/sh\n" + text + "\n")
    target.chmod(0o755)
    return target


def under(app: App, name: str, *command: Any) -> str:
    """Make a program that runs its arguments as a Python's, under another command; goes in as `python`."""
    words = " ".join("'" + str(word) + "'" for word in command)
    path = str(script(app.directory / "bin" / name, f"exec {words} '{sys.executable}' \"$@\""))
    SAME_PYTHON.add(path)
    return path


def strace(app: App, *options: str) -> str:
    """A Python under strace, which writes the trace to the file that `trace_of` names."""
    return under(app, "traced", needs("strace"), "-f", "-qq", "-y", "-s", "300", "-o", trace_of(app), *options)


def trace_of(app: App) -> Path:
    """Where the trace of the last run is."""
    return app.directory / "trace"


class Saved:
    """An application's root as it was (it may not have been there), to be put back before each try."""

    def __init__(self, app: App) -> None:
        self.app, self.copy = app, app.directory / "saved"
        shutil.rmtree(str(self.copy), ignore_errors=True)
        if app.root.exists():
            shutil.copytree(str(app.root), str(self.copy), symlinks=True)

    def restore(self) -> None:
        """Put the root back."""
        shutil.rmtree(str(self.app.root), ignore_errors=True)
        if self.copy.exists():
            shutil.copytree(str(self.copy), str(self.app.root), symlinks=True)


class Warm:
    """A Python that has deploy.py loaded and forks a child for each run; see warm.py."""

    def __init__(self) -> None:
        # A child of init: a run looks who started it, and must find as many ancestors when the starter of these tests has ended.
        self._process = subprocess.Popen(
            [needs("setsid"), "--fork", sys.executable, "-I", "-B", str(TESTS / "lib" / "warm.py"), compiled()], env=clean_environment(),
            cwd="/", stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def run(self, *arguments: Any, config: Any, json: bool = True, check: Optional[int] = None, trace: Any = None,
            options: Sequence[str] = ()) -> Result:
        """Run deploy.py to its end as `run_deploy` does, under strace where a file for the trace is given."""
        argv = deploy_argv(*arguments, config=config, json=json)
        return checked(self.run_argv(argv, {"env": clean_environment(), "cwd": "/"}, trace=trace, options=options),
                       json=json, check=check)

    def run_argv(self, argv: List[str], place: Dict[str, Any], *, timeout: float = 60, trace: Any = None,
                 options: Sequence[str] = (), address_space_bytes: int = 0) -> Result:
        """Run deploy.py with the arguments of a `deploy_argv`, with the `env` and `cwd` of the place.

        `cost` then holds the milliseconds of processor time and the KiB of memory that the run took.
        """
        with tempfile.NamedTemporaryFile() as stdout, tempfile.NamedTemporaryFile() as stderr:
            self._ask(dict(place, argv=argv[2:], stdout=stdout.name, stderr=stderr.name, stopped=trace is not None,
                           address_space=address_space_bytes))
            pid, = self._answer()
            try:
                tracer = self._trace(pid, trace, options) if trace else None
                exit_code, *self.cost = self._answer(timeout)
            except BaseException:
                os.killpg(pid, signal.SIGKILL)
                self._answer()
                raise
            if tracer:
                tracer.communicate()
            texts = [stream.read().decode("utf-8", "surrogateescape") for stream in (stdout, stderr)]
        return Result(argv, exit_code, texts[0], texts[1], None)

    def _ask(self, request: Dict[str, Any]) -> None:
        self._process.stdin.write(json.dumps(request).encode("ascii") + b"\n")  # type: ignore
        self._process.stdin.flush()  # type: ignore

    def _answer(self, timeout: float = 60) -> List[int]:
        stream = self._process.stdout.fileno()  # type: ignore
        # One byte at a time: a buffer would hide from select() what came with the line before.
        text = b""
        while not text.endswith(b"\n"):
            assert select.select([stream], [], [], timeout)[0], f"no answer within {timeout} s"
            text += os.read(stream, 1) or b"1 0 0\n"
        return [int(word) for word in text.decode("ascii").split()]

    def _trace(self, pid: int, trace: Any, options: Sequence[str]) -> subprocess.Popen:
        """Take hold of a stopped run, and let it go on."""
        tracer = subprocess.Popen([needs("strace"), "-y", "-s", "400", "-o", str(trace), "-p", str(pid)] + list(options),
                                  stdin=subprocess.DEVNULL, stderr=subprocess.PIPE)
        said = tracer.stderr.readline().decode("utf-8", "replace")  # type: ignore
        assert "attached" in said, f"strace cannot trace: {said}"
        os.kill(pid, signal.SIGCONT)
        return tracer


_warm = {}  # type: Dict[str, Warm]


def warm() -> Warm:
    """The one such Python of this process, for deploy.py as it is now."""
    if compiled() not in _warm:
        _warm[compiled()] = Warm()
    return _warm[compiled()]


_warm_is_free = threading.Lock()


def run_warm(argv: List[str], *, env: Dict[str, str], cwd: str, timeout: float) -> Optional[Result]:
    """Run a command line in the one such Python; None where it is busy with another thread's."""
    if not _warm_is_free.acquire(blocking=False):
        return None
    try:
        return warm().run_argv(argv, {"env": env, "cwd": cwd}, timeout=timeout)
    finally:
        _warm_is_free.release()


class QuickApp(App):
    """An application whose runs start quickly, for tests that need very many."""

    def run(self, *args: Any, **options: Any) -> Result:
        """Run deploy.py with this configuration; takes `json` and `check`."""
        return warm().run(*args, config=self.config, **options)


def record_calls(app: App, *arguments: Any, check: Optional[int] = None, reading: bool = False) -> List[Call]:
    """Run deploy.py once and list the calls that changed, or made durable, something under the root, or those that read."""
    warm().run(*arguments, config=app.config, check=check, trace=trace_of(app),
               options=["-e", "trace=" + known_calls() + ",getdents64"])
    return list(recorded_calls(app, reading))


def recorded_calls(app: App, reading: bool) -> Iterator[Call]:
    """Read the last trace, of the program itself without its children."""
    counts, progress, published = {}, Progress(), ""  # type: Dict[str, int], Progress, str
    # The root's own directory as well: what makes a new root durable.
    ours = re.compile(re.escape(str(app.root)) + r"[>/\"]|<" + re.escape(str(app.directory)) + ">")
    for line in trace_of(app).read_text(errors="replace").splitlines():
        name = line.partition("(")[0]
        counts[name] = counts.get(name, 0) + 1
        progress.see_before(line)
        # What is written may name the root as well.
        where = line.partition(', "')[0] if name in ("write", "pwrite64") else line
        reads = name == "getdents64" or name in ("open", "openat") and not re.search("O_CREAT|O_RDWR|O_WRONLY", line)
        if (ours.search(where) or name in ("sync", "syncfs")) and "EEXIST" not in line and reads == reading:
            # The sync of a directory belongs to what was done in it.
            of_directory = name == "fsync" and not re.search(r"(\.tmp|\.jsonl)>", line)
            yield Call(name, counts[name], line + (f" after {published}" if of_directory else ""), progress.phase)
            if re.match("rename|unlink|symlink|mkdir", name):
                published = re.sub(r'.*, "([^"]*)".*', r"\1", line)
        progress.see_after(line)


class Progress:
    """How far a run is, read off its calls."""

    def __init__(self) -> None:
        self.phase, self._written, self._moved, self._told = "", "", False, False

    def see_before(self, line: str) -> None:
        """A call is about to be made."""
        if self._moved and self.phase == "intent" and '".journal.json.' in line:
            self.phase = "switched"

    def see_after(self, line: str) -> None:
        """A call was made."""
        found = PHASE.search(line) if ".journal.json." in line else None
        self._written = found.group(1) if found else self._written
        self._moved = self._moved or ', "current")' in line
        self._told = self._told or line.startswith("write(") and "/history.jsonl>" in line
        if ', "journal.json")' in line:
            self.phase = self._written
        elif self._told and line.startswith("fsync("):
            self.phase, self._told = "closed", False


def known_calls() -> str:
    """The calls to trace, those that this architecture does not have marked as optional."""
    return ",".join("?" + name for name in MUTATING)


def same_place(call: Call) -> str:
    """A call without what differs from run to run: numbers, temporary names, what is written."""
    text = re.sub(r"\.\d+\.[0-9a-f]{8}\.tmp", ".tmp", call.text.partition(" = ")[0])
    text = re.sub(r"\d{8}T\d{6}Z|<unfinished.*|\(\d+<|, \d+<|, 0x.*", "#", text)
    if call.name in ("write", "pwrite64", "ftruncate"):
        return text.partition(">,")[0]
    return re.sub(r"\)?\s*\Z", "", text)


def find_call(calls: List[Call], name: str, pattern: str, after: str = "") -> Call:
    """The first call of a name whose line matches a pattern, after the first line that matches another."""
    passed = not after
    for call in calls:
        if passed and call.name == name and re.search(pattern, call.text):
            return call
        passed = passed or bool(re.search(after, call.text))
    listing = "\n".join(call.text for call in calls)
    raise AssertionError(f"no {name} that matches {pattern!r} after {after!r} in\n{listing}")


def inject(app: App, call: Call, what: str, *arguments: Any) -> Result:
    """Run deploy.py, and kill it (`signal=KILL`) or let it fail (`error=EIO`) at one call."""
    # A killed run prints nothing, so its output cannot be decoded.
    result = warm().run(*arguments, config=app.config, json="KILL" not in what, trace=trace_of(app), options=[
        "-e", f"trace={call.name}", "-e", f"inject={call.name}:{what}:when={call.number}"])
    check_hit(app, call, result)
    return result


def check_hit(app: App, call: Call, result: Result) -> None:
    """See that it was this call, and not another of the same number in a run that went differently."""
    lines = [line for line in trace_of(app).read_text(errors="replace").splitlines() if line.startswith(call.name + "(")]
    assert len(lines) >= call.number, f"was not hit: {call}\n{result.describe()}"
    hit = call._replace(text=lines[call.number - 1])
    assert same_place(hit) == same_place(call), f"hit {hit.text}\ninstead of {call.text}"


def kill_at(app: App, call: Call, *arguments: Any) -> Result:
    """Kill deploy.py just before one system call."""
    result = inject(app, call, "signal=KILL", *arguments)
    assert result.exit_code == -signal.SIGKILL, f"was not killed at {call}\n{result.describe()}"
    return result


def holder_pid(app: App, root: Any = None) -> int:
    """The process id of the run that holds the lock, as it wrote it there; 0 where there is none yet."""
    try:
        return int(json.loads((Path(str(root or app.root)) / ".deploy" / "lock").read_text())["pid"])
    except (OSError, ValueError, KeyError):
        return 0


def is_running(pid: int) -> bool:
    """Whether a process exists and is more than a zombie."""
    try:
        with open(f"/proc/{pid}/stat", encoding="latin-1") as stream:
            return stream.read().rpartition(")")[2].split()[0] not in "ZX"
    except (OSError, IndexError):
        return False


def wait_gone(pids: List[int], timeout: float = 60) -> None:
    """Wait until none of the processes runs any more."""
    wait_until(lambda: not any(is_running(pid) for pid in pids), timeout, f"{pids} are gone")


# -- judging -------------------------------------------------------------------

def unchanged_part(root: Any) -> Dict[str, Any]:
    """A snapshot without the lock, whose text is information only."""
    return {name: found for name, found in snapshot(root).items() if name != ".deploy/lock"}


def content(root: Any) -> Dict[str, Any]:
    """What is under a root, without times and without the lock, the history and the cache of digests."""
    kept = {}
    for name, (kind, mode, size, _, text) in snapshot(root).items():
        if not re.match(r"\.deploy/(lock|history\..*|cache/.*)\Z", name):
            kept[name] = (kind, mode, 0 if kind == "directory" else size, text)
    return kept


def inconsistencies(app: App, versions: List[Optional[str]]) -> List[str]:
    """Everything that does not fit together under a root at rest; `versions` are those that may be live."""
    state, problems = app.root / ".deploy", [f"left over: {name}" for name in app.leftovers()]
    problems += [f"unknown: {name}" for name in os.listdir(str(app.root))
                 if name not in ("current", "releases", "shared", "slots", ".deploy")]
    if app.version not in versions:
        problems.append(f"live is {app.version} ({app.current}), not one of {versions}")
    on_disk = set(app.releases())
    records = {path.name[:-5]: json.loads(path.read_text()) for path in (state / "releases").glob("*.json")}
    whole = {name for name, record in records.items() if not record["pruned_at"]}
    manifests = set(os.listdir(str(state / "manifests")))
    if on_disk != whole:
        problems.append(f"releases {sorted(on_disk)}, but records {sorted(whole)}")
    if on_disk != manifests:
        problems.append(f"releases {sorted(on_disk)}, but manifests {sorted(manifests)}")
    active = {name for name, record in records.items() if record["state"] == "active"}
    if active != ({app.current} if app.current else set()):
        problems.append(f"current is {app.current}, but active by record are {sorted(active)}")
    if (app.root / "slots" / "live.conf").exists():
        links = {path.name: path for path in (app.root / "slots").iterdir() if path.is_symlink()}
        port = (app.root / "slots" / "live.conf").read_text()
        named = links[{"to 1\n": "blue", "to 2\n": "green"}[port]]
        problems += [f"slots/{name} leads nowhere" for name, path in links.items() if not path.exists()]
        if named.resolve().name != app.current or records[str(app.current)]["slot"] != named.name:
            problems.append(f"live.conf leads to {named.name}, of {named.resolve().name}, current is {app.current}")
    problems += [f"{name} is not whole" for name in on_disk & whole if not is_whole(app, name, records[name]["version"])]
    return problems + broken_chain(app)


def is_whole(app: App, release: str, version: str) -> bool:
    """Whether a release holds the small application of a version."""
    for name, spec in application_tree(version).items():
        path, found = app.root / "releases" / release / name, entry(spec)
        if found.link:
            if not path.is_symlink() or os.readlink(str(path)) != found.link:
                return False
        elif found.content is None:
            if not path.is_dir():
                return False
        elif not path.is_file() or path.read_bytes() != found.content:
            return False
    return True


def damaged_files(app: App, release: str) -> List[str]:
    """Which files of a release are not what its manifest says."""
    top, problems = app.root / "releases" / release, []
    for line in (app.root / ".deploy" / "manifests" / release).read_text().splitlines():
        digest, _, name = line.partition("  ")
        path = top / name
        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != digest:
            problems.append(f"{release}/{name} is not what was staged")
    return problems


def broken_chain(app: App) -> List[str]:
    """Where the history's hash chain does not hold."""
    path, before, problems = app.root / ".deploy" / "history.jsonl", b"", []
    data = path.read_bytes() if path.exists() else b""
    for number, line in enumerate(data.split(b"\n")[:-1], 1):
        if json.loads(line.decode("utf-8"))["previous_sha256"] != (hashlib.sha256(before).hexdigest() if before else ""):
            problems.append(f"history line {number} is not chained")
        before = line
    return problems + (["the history ends in a torn line"] if data and not data.endswith(b"\n") else [])


def recover_and_judge(app: App, versions: List[Optional[str]], check: Optional[Callable[[Result], None]] = None) -> List[str]:
    """Recover twice and ask for the status: what is wrong after that, empty when nothing is."""
    first = app.run("recover")
    problems = [] if first.exit_code == 0 else [f"recover: {first.describe()}"]
    problems += inconsistencies(app, versions)
    before = unchanged_part(app.root)
    second = app.run("recover")
    after = unchanged_part(app.root)
    if second.exit_code or second.data["changed"] or before != after:
        names = sorted(name for name in set(before) | set(after) if before.get(name) != after.get(name))
        problems.append(f"a second recover changed {names}: {second.describe()}")
    status = app.run("status")
    if status.exit_code:
        problems.append(f"status: {status.describe()}")
    if check is not None:
        check(first)
    return problems
