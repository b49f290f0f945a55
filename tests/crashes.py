"""Stop deploy.py at one system call: record the calls of a run, kill or fail one of them, judge what is left."""

import hashlib
import json
import os
import re
import shutil
import signal
import sys
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional

from support import App, Result, application_tree, entry, needs, run_deploy, snapshot, wait_until

MUTATING = ("openat", "write", "pwrite64", "ftruncate", "rename", "renameat", "renameat2", "symlink", "symlinkat", "link",
            "linkat", "unlink", "unlinkat", "rmdir", "mkdir", "mkdirat", "chmod", "fchmod", "fchmodat", "fsync", "fdatasync",
            "sync", "syncfs")


class Call(NamedTuple):
    """One system call of a run: `number` counts those of the same name, as strace's `when` does."""

    name: str
    number: int
    text: str


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
    return str(script(app.directory / "bin" / name, f"exec {words} '{sys.executable}' \"$@\""))


def strace(app: App, *options: str) -> str:
    """A Python under strace, which writes the trace to the file that `trace_of` names."""
    return under(app, "traced", needs("strace"), "-f", "-qq", "-y", "-s", "300", "-o", trace_of(app), *options)


def trace_of(app: App) -> Path:
    """Where the trace of the last run is."""
    return app.directory / "trace"


class Saved:
    """An application's root as it was, to be put back before each try."""

    def __init__(self, app: App) -> None:
        self.app, self.copy = app, app.directory / "saved"
        shutil.rmtree(str(self.copy), ignore_errors=True)
        shutil.copytree(str(app.root), str(self.copy), symlinks=True)

    def restore(self) -> None:
        """Put the root back."""
        shutil.rmtree(str(self.app.root))
        shutil.copytree(str(self.copy), str(self.app.root), symlinks=True)


def record_calls(app: App, *arguments: Any, **options: Any) -> List[Call]:
    """Run deploy.py once and list the calls that changed, or made durable, something under the root."""
    app.run(*arguments, python=strace(app, "-e", "trace=" + known_calls()), **options)
    counts, calls, main = {}, [], None  # type: Dict[str, int], List[Call], Optional[str]
    for line in trace_of(app).read_text(errors="replace").splitlines():
        found = re.match(r"(\d+) +(\w+)\((.*)", line)
        if not found or found.group(1) != (main or found.group(1)):
            continue
        main, name = found.group(1), found.group(2)
        counts[name] = counts.get(name, 0) + 1
        if name == "openat" and "O_CREAT" not in line and "O_RDWR" not in line or "EEXIST" in line:
            continue
        if str(app.root) in line or name in ("sync", "syncfs"):
            calls.append(Call(name, counts[name], line))
    return calls


def known_calls() -> str:
    """The calls to trace, those that this architecture does not have marked as optional."""
    return ",".join("?" + name for name in MUTATING)


def find_call(calls: List[Call], name: str, pattern: str, after: str = "") -> Call:
    """The first call of a name whose line matches a pattern, after the first line that matches another."""
    passed = not after
    for call in calls:
        if passed and call.name == name and re.search(pattern, call.text):
            return call
        passed = passed or bool(re.search(after, call.text))
    listing = "\n".join(call.text for call in calls)
    raise AssertionError(f"no {name} that matches {pattern!r} after {after!r} in\n{listing}")


def inject(app: App, call: Call, what: str, *arguments: Any, **options: Any) -> Result:
    """Run deploy.py, and kill it (`signal=KILL`) or let it fail (`error=EIO`) at one call."""
    python = strace(app, "-e", f"trace={call.name}", "-e", f"inject={call.name}:{what}:when={call.number}")
    # A killed run prints nothing, so its output cannot be decoded.
    return run_deploy(*arguments, config=app.config, python=python, json=False, **options)


def kill_at(app: App, call: Call, *arguments: Any) -> Result:
    """Kill deploy.py just before one system call."""
    result = inject(app, call, "signal=KILL", *arguments)
    assert result.exit_code in (-signal.SIGKILL, 128 + signal.SIGKILL), f"was not killed at {call}\n{result.describe()}"
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


def wait_gone(pids: List[int], timeout: float = 5) -> None:
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
                 if name not in ("current", "releases", "shared", ".deploy")]
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
