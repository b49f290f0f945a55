#!/usr/bin/python3
"""Replay a recorded run as a disk could have kept it: what was not synced is lost, torn or out of order.

Usage: python3 tests/tools/replay.py [--states N] [--jobs N] [--seed N] [--scenario NAME]

The model, from the POSIX promises that every journalled Linux filesystem keeps:

- A file's data and mode are sure to be on disk after fsync of that file, or a
  syncfs or sync.  Before, a write may have left the old content, nothing, a
  part, zeros of the new length, or all of it; what was there before an append
  stays.
- An entry of a directory (made, renamed, removed) is sure to be on disk after
  fsync of that directory, or a syncfs or sync.  Before, it may be there or not,
  whatever became of other entries: only operations on the same name keep
  their order.
- A rename is one operation: it happened or it did not, both ends at once, and
  is sure when either of its directories was synced.

Not modelled: a rename between two directories that a disk tears in half, bits
that rot, and an fsync that lies.  The lock's text is information only, and not
varied.
"""

import argparse
import contextlib
import hashlib
import io
import json
import os
import random
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Set, Tuple

sys.dont_write_bytecode = True
sys.path.insert(0, os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "lib"))

from crashes import known_calls, recover_and_judge, strace, trace_of  # noqa: E402
from support import App, Result, load_deploy  # noqa: E402  (no bytecode beside the sources)

LOCK = "root/.deploy/lock"
# Files whose content means nothing.
MEANINGLESS = (LOCK, "root/.deploy/reserve")
# How many of one instant's possible states are drawn at most; few possible ones are drawn four times as often, to get all.
DRAWN = 2048


# -- deploy.py within this process ---------------------------------------------

class FastApp(App):
    """An application that exists already, on which deploy.py is run within this process: no new interpreter each time."""

    def __init__(self, directory: Any, config: Any) -> None:
        self.directory, self.config = Path(str(directory)), Path(str(config))
        self.root = self.directory / "root"

    def run(self, *args: Any, **options: Any) -> Result:
        """Run deploy.py on this root; stdout must be one JSON object."""
        argv = ["--json", "-c", str(self.config), "--root", str(self.root)] + [str(arg) for arg in args]
        streams = [io.TextIOWrapper(io.BytesIO(), "utf-8", "surrogateescape", write_through=True) for _ in range(2)]
        with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):
            exit_code = load_deploy().main(argv)
        texts = [stream.buffer.getvalue().decode("utf-8", "surrogateescape") for stream in streams]  # type: ignore
        return Result(argv, exit_code, texts[0], texts[1], json.loads(texts[0]))


def in_children(work: Callable[[Any], List[str]], items: List[Any], jobs: int, chunk: int = 100) -> List[str]:
    """Do work on every item in forked children, `jobs` at a time; returns what they found, in no order.

    A child does one chunk, so that descriptors which a refused run leaves to
    the end of its process cannot add up.
    """
    pending, running, found = [items[at:at + chunk] for at in range(0, len(items), chunk)], {}, []
    load_deploy()
    while pending or running:
        while pending and len(running) < jobs:
            output = tempfile.TemporaryFile()
            running[_child(work, pending.pop(), output)] = output
        # Only these: whoever uses this module may have other children.
        process = next(iter(running))
        status = os.waitpid(process, 0)[1]
        with running.pop(process) as output:
            output.seek(0)
            data = output.read()
        found += json.loads(data.decode("ascii")) if status == 0 else [f"a worker ended with status {status}: {data!r}"]
    return found


def _child(work: Callable[[Any], List[str]], items: List[Any], output: Any) -> int:
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        os.umask(0o022)
        output.write(json.dumps([line for item in items for line in work(item)]).encode("ascii"))
        output.flush()
        status = 0
    finally:
        os._exit(status)


# -- the model -----------------------------------------------------------------

class Inode:
    """A file, a directory or a symlink, with the content and mode it had at first."""

    def __init__(self, number: int, kind: str, mode: int = 0o755, data: bytes = b"") -> None:
        self.number, self.kind, self.mode, self.data = number, kind, mode, data


class Change(NamedTuple):
    """An entry of a directory that an operation sets: to an inode, or to nothing."""

    directory: int
    name: str
    inode: Optional[int]


class Op(NamedTuple):
    """One traced operation: what it does to entries, data and modes, or what it makes durable.

    `call` is the system call, `path` what it is about, relative to the
    application's directory; `inode` is the file, the directory or the moved
    thing; `syncs` is "", "inode" or "all".
    """

    call: str
    path: str
    inode: int
    source: str = ""
    changes: Tuple[Change, ...] = ()
    data: Optional[bytes] = None
    mode: Optional[int] = None
    syncs: str = ""
    before: str = ""


class Trace:
    """A run: the disk as it was at first, and everything that was done to it, in order."""

    def __init__(self, top: Any) -> None:
        self.top = str(top)
        self.inodes = [Inode(0, "directory")]
        self.first = {0: {}}  # type: Dict[int, Dict[str, int]]
        self.ops = []  # type: List[Op]
        if os.path.isdir(self.top + "/root"):
            self.first[0]["root"] = self._read(self.top + "/root")
        self._now = {number: dict(entries) for number, entries in self.first.items()}
        self._data = {}  # type: Dict[int, bytes]

    def _new(self, kind: str, mode: int, data: bytes = b"") -> int:
        self.inodes.append(Inode(len(self.inodes), kind, mode, data))
        return len(self.inodes) - 1

    def _read(self, path: str) -> int:
        mode = os.lstat(path).st_mode & 0o7777
        if os.path.islink(path):
            return self._new("symlink", mode, os.fsencode(os.readlink(path)))
        if not os.path.isdir(path):
            return self._new("file", mode, Path(path).read_bytes())
        number = self._new("directory", mode)
        self.first[number] = {name: self._read(f"{path}/{name}") for name in sorted(os.listdir(path))}
        return number

    def find(self, path: str) -> Optional[int]:
        """The inode that a path (relative to the top) leads to now."""
        here = 0  # type: Optional[int]
        for part in [part for part in path.split("/") if part]:
            here = self._now.get(here, {}).get(part) if here is not None else None
        return here

    def below(self, path: bytes) -> Optional[str]:
        """A path relative to the top; None when it lies elsewhere, or is deleted."""
        text = os.fsdecode(path)
        if text == self.top:
            return ""
        return text[len(self.top) + 1:] if (text + "/").startswith(self.top + "/root/") else None

    def _add(self, op: Op) -> None:
        self.ops.append(op)
        for change in op.changes:
            entries = self._now.setdefault(change.directory, {})
            entries.pop(change.name, None)
            if change.inode is not None:
                entries[change.name] = change.inode

    def _entry(self, path: str, inode: Optional[int]) -> Tuple[Change, ...]:
        parent, _, name = path.rpartition("/")
        directory = self.find(parent)
        assert directory is not None, f"the trace changes {path}, whose directory was never made"
        return (Change(directory, name, inode),)

    def make(self, call: str, path: str, kind: str, mode: int = 0o777, data: bytes = b"") -> None:
        """Something new."""
        number = self._new(kind, mode, data)
        self._add(Op(call, path, number, changes=self._entry(path, number)))

    def rename(self, call: str, source: str, path: str) -> None:
        """Something gets another name."""
        number = self.find(source)
        assert number is not None, f"the trace renames {source}, which was never made"
        self._add(Op(call, path, number, source=source, changes=self._entry(source, None) + self._entry(path, number)))

    def remove(self, call: str, path: str) -> None:
        """An entry goes."""
        number = self.find(path)
        assert number is not None, f"the trace removes {path}, which was never made"
        self._add(Op(call, path, number, changes=self._entry(path, None)))

    def write(self, call: str, path: str, data: bytes, offset: Optional[int]) -> None:
        """A file's data changes; without an offset at its end, as every write of deploy.py's does."""
        number = self.find(path)
        if number is None:
            return  # a file without a name
        old = self._data.get(number, self.inodes[number].data)
        at = len(old) if offset is None else offset
        self._data[number] = old[:at] + data + old[at + len(data):]
        self._add(Op(call, path, number, data=self._data[number]))

    def truncate(self, call: str, path: str, size: int) -> None:
        """A file is cut off."""
        number = self.find(path)
        assert number is not None, path
        self._data[number] = self._data.get(number, self.inodes[number].data)[:size]
        self._add(Op(call, path, number, data=self._data[number]))

    def chmod(self, call: str, path: str, mode: int) -> None:
        """A mode changes."""
        number = self.find(path)
        if number is not None:
            self._add(Op(call, path, number, mode=mode))

    def sync(self, call: str, path: str) -> None:
        """Something is made durable; `before` tells one sync of a directory from the next."""
        number = self.find(path)
        last = self.ops[-1] if self.ops else None
        before = f"{last.call} {plain(last.source + ' ' if last.source else '')}{plain(last.path)}" if last else "nothing"
        if call in ("sync", "syncfs"):
            self._add(Op(call, path, -1, syncs="all", before=before))
        elif number is not None:
            self._add(Op(call, path, number, syncs="inode", before=before))


def plain(path: str) -> str:
    """A path without what differs from run to run."""
    return re.sub(r"\.\d+\.[0-9a-f]{8}\.tmp", ".tmp", re.sub(r"\d{8}T\d{6}Z-", "", path))


# -- reading strace ------------------------------------------------------------

_HEX = r"(?:\\x[0-9a-f]{2})*"
_TOKEN = re.compile(rf'"({_HEX})"|(?:AT_FDCWD|\d+)<({_HEX})>')


def unhex(text: str) -> bytes:
    """Decode what strace -xx wrote."""
    return bytes.fromhex(text.replace("\\x", ""))


def calls_of(text: str) -> Iterator[Tuple[str, str, str]]:
    """The finished, successful calls of a trace as (name, arguments, result), those split by another process joined."""
    begun = {}  # type: Dict[str, str]
    for line in text.splitlines():
        process, _, rest = line.partition(" ")
        rest = rest.strip()
        resumed = re.match(r"<\.\.\. \w+ resumed>\s?(.*)", rest)
        if rest.endswith("<unfinished ...>"):
            begun[process] = rest[:-len("<unfinished ...>")]
            continue
        if resumed:
            rest = begun.pop(process, "") + resumed.group(1)
        found = re.match(r"(\w+)\((.*)\)\s+= (\d+)", rest)
        if found:
            yield found.group(1), found.group(2), found.group(3)


def paths_in(trace: Trace, name: str, arguments: str) -> List[Optional[str]]:
    """The paths a call names, each relative to its directory descriptor."""
    found, directory = [], None  # type: List[Optional[str]], Optional[bytes]
    for match in _TOKEN.finditer(arguments):
        if match.group(1) is None:
            directory = unhex(match.group(2))
        elif name not in ("write", "pwrite64"):
            path = unhex(match.group(1))
            found.append(trace.below(os.path.normpath(os.path.join(directory or b"/", path))))
            directory = None
    return found + ([trace.below(directory)] if directory is not None else [])


def read_trace(trace: Trace, text: str) -> None:
    """Fill a trace with what strace -f -y -xx recorded."""
    for name, arguments, result in calls_of(text):
        if name == "sync":
            trace.sync(name, "")
            continue
        paths = paths_in(trace, name, arguments)
        if not paths or paths[-1] is None or (name.startswith("rename") and paths[0] is None):
            continue
        _apply(trace, name, arguments, result, paths)


def _apply(trace: Trace, name: str, arguments: str, result: str, paths: List[Any]) -> None:
    path, last = paths[-1], arguments.rpartition(", ")[2]
    if name == "openat":
        if "O_CREAT" in arguments and trace.find(path) is None:
            trace.make(name, path, "file", int(last, 8) & ~0o022)
        assert "O_TRUNC" not in arguments, f"the model has no O_TRUNC: {path}"
    elif name in ("mkdir", "mkdirat"):
        trace.make(name, path, "directory", int(last, 8) & ~0o022)
    elif name in ("symlink", "symlinkat"):
        target = unhex(_TOKEN.search(arguments).group(1))  # type: ignore
        trace.make(name, path, "symlink", data=target)
    elif name.startswith("rename"):
        trace.rename(name, paths[0], path)
    elif name in ("unlink", "unlinkat", "rmdir"):
        trace.remove(name, path)
    elif name in ("write", "pwrite64"):
        data = unhex(re.search(rf'"({_HEX})"', arguments).group(1))[:int(result)]  # type: ignore
        trace.write(name, path, data, int(last) if name == "pwrite64" else None)
    elif name == "ftruncate":
        trace.truncate(name, path, int(last))
    elif name in ("chmod", "fchmod", "fchmodat"):
        mode = re.search(r", (0[0-7]+)", arguments)
        trace.chmod(name, path, int(mode.group(1), 8))  # type: ignore
    elif name in ("fsync", "fdatasync", "syncfs"):
        trace.sync(name, path)
    else:
        assert name in ("flock", "utimensat"), f"the model has no {name}: {arguments}"


def record(app: App, *arguments: Any) -> Tuple[Trace, Result]:
    """Run deploy.py under strace and read what it did."""
    trace = Trace(app.directory)
    # Long enough for any single write, or the trace would hold less than the file.
    result = app.run(*arguments, python=strace(app, "-xx", "-s", "1048576", "-e", "trace=" + known_calls()))
    read_trace(trace, trace_of(app).read_text())
    return trace, result


# -- what is durable -------------------------------------------------------------

class Disk:
    """What is sure to be on disk at an instant of a run, and what may be: operations by number, data by inode."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.entries = []  # type: List[int]
        self.volatile = []  # type: List[int]
        # inode -> (durable content, contents it may have instead)
        self.data = {}  # type: Dict[int, Tuple[bytes, List[bytes]]]
        self.modes = {}  # type: Dict[int, List[int]]
        self.at = 0

    def step(self) -> Op:
        """Take the next operation."""
        op = self.trace.ops[self.at]
        if op.changes:
            self.volatile.append(self.at)
        if op.data is not None:
            self.data.setdefault(op.inode, (self.durable_data(op.inode), []))[1].append(op.data)
        if op.mode is not None:
            self.modes.setdefault(op.inode, [self.durable_mode(op.inode)]).append(op.mode)
        if op.syncs:
            self._sync(op)
        self.at += 1
        return op

    def durable_data(self, inode: int) -> bytes:
        """The content that is sure."""
        return self.data[inode][0] if inode in self.data else self.trace.inodes[inode].data

    def newest_data(self, inode: int) -> bytes:
        """The content that a reader sees while nothing crashes."""
        return (self.data[inode][1] or [self.data[inode][0]])[-1] if inode in self.data else self.trace.inodes[inode].data

    def durable_mode(self, inode: int) -> int:
        """The mode that is sure."""
        return self.modes[inode][0] if inode in self.modes else self.trace.inodes[inode].mode

    def _sync(self, op: Op) -> None:
        everything = op.syncs == "all"
        for inode in list(self.data) if everything else [op.inode]:
            if inode in self.data:
                self.data[inode] = (self.newest_data(inode), [])
        for inode in list(self.modes) if everything else [op.inode]:
            if inode in self.modes:
                self.modes[inode] = self.modes[inode][-1:]
        sure = self.close(number for number in self.volatile
                          if everything or op.inode in {change.directory for change in self.trace.ops[number].changes})
        self.volatile = [number for number in self.volatile if number not in sure]
        self.entries = sorted(self.entries + list(sure))

    def close(self, chosen: Any) -> Set[int]:
        """Add to volatile operations the earlier ones on the same names: those cannot be missing."""
        chosen = set(chosen)
        names = set()  # type: Set[Tuple[int, str]]
        for number in reversed(self.volatile):
            own = {(change.directory, change.name) for change in self.trace.ops[number].changes}
            if number in chosen or own & names:
                chosen.add(number)
                names |= own
        return chosen

    def dirty(self) -> List[int]:
        """The inodes whose data is not sure, the lock aside."""
        locks = {op.inode for op in self.trace.ops[:self.at] if op.path == LOCK}
        return [inode for inode, (_, newer) in sorted(self.data.items()) if newer and inode not in locks]

    def tree(self, applied: Any) -> Dict[int, Dict[str, int]]:
        """The entries of every directory once some operations reached the disk, besides those that are sure."""
        found = {number: dict(entries) for number, entries in self.trace.first.items()}
        for number in sorted(set(self.entries) | set(applied)):
            for change in self.trace.ops[number].changes:
                entries = found.setdefault(change.directory, {})
                entries.pop(change.name, None)
                if change.inode is not None:
                    entries[change.name] = change.inode
        return found


# -- crash states ----------------------------------------------------------------

# What a root holds: (path, kind, mode, content), parents before what is in them.
State = Tuple[Tuple[str, str, int, bytes], ...]


def state_of(disk: Disk, applied: Any, contents: Dict[int, bytes], modes: Dict[int, int]) -> State:
    """What a directory tree looks like after a crash in which just this was kept."""
    tree, found, pending = disk.tree(applied), [], [("", 0)]
    while pending:
        path, inode = pending.pop()
        for name, number in sorted(tree.get(inode, {}).items()):
            thing, below = disk.trace.inodes[number], f"{path}/{name}".lstrip("/")
            data = contents.get(number, disk.newest_data(number)) if thing.kind != "directory" else b""
            mode = modes.get(number, disk.modes.get(number, [disk.durable_mode(number)])[-1])
            found.append((below, thing.kind, mode, data))
            if thing.kind == "directory":
                pending.append((below, number))
    return tuple(found)


def identity(state: State) -> bytes:
    """A digest of everything but content that means nothing."""
    digest = hashlib.sha256()
    for path, kind, mode, data in sorted(state):
        digest.update(repr((path, kind, mode, b"" if path in MEANINGLESS else data)).encode("utf-8", "surrogateescape"))
    return digest.digest()


def contents_of(disk: Disk, inode: int, rng: random.Random) -> List[bytes]:
    """What a file that was not synced may hold: old, cut off (as far as nothing), zeros where new bytes belong, or new."""
    old, newer = disk.data[inode]
    new = newer[-1]
    kept = len(old) if new.startswith(old) else 0
    cut = [new[:max(kept, at)] for at in (0, kept + 1, (kept + len(new)) // 2, len(new) - 1, rng.randint(kept, len(new)))]
    return list(dict.fromkeys([new, old, new[:kept] + b"\0" * (len(new) - kept)] + newer + cut))


def states_at(disk: Disk, rng: random.Random) -> Iterator[State]:
    """States that a crash at this instant may leave: nearly all of them where they are few, else a sample."""
    choices = {inode: contents_of(disk, inode, rng) for inode in disk.dirty()}
    modes = {inode: found for inode, found in disk.modes.items() if len(found) > 1}
    count = 2 ** len(disk.volatile)
    for found in list(choices.values()) + list(modes.values()):
        count *= len(found)
    # What a kill leaves, and what a crash leaves of a disk that wrote nothing unasked.
    yield state_of(disk, disk.volatile, {}, {})
    yield state_of(disk, [], {inode: disk.durable_data(inode) for inode in choices},
                   {inode: found[0] for inode, found in modes.items()})
    for turn in range(min(count * 4, DRAWN)):
        kind = turn % 4
        if kind == 0:  # in order, as a journal writes metadata
            applied = set(disk.volatile[:rng.randint(0, len(disk.volatile))])
        else:
            likely = rng.choice((0.2, 0.5, 0.8, 1.0))
            applied = disk.close(number for number in disk.volatile if rng.random() < likely)
        yield state_of(disk, applied, {inode: rng.choice(found) for inode, found in choices.items()},
                       {inode: rng.choice(found) for inode, found in modes.items()})


class Case(NamedTuple):
    """A crash state, where it comes from, and which versions may be live once it is recovered."""

    scenario: str
    config: str
    place: str
    state: State
    versions: List[Optional[str]]


class Play(NamedTuple):
    """A recorded scenario: the version before and after, and the configuration to recover under."""

    name: str
    trace: Trace
    config: str
    before: Optional[str]
    after: Optional[str]


def allowed(play: Play, at: int) -> List[Optional[str]]:
    """Which versions may be live after a crash: only the old before the switch was begun, only the new after the verdict."""
    done, switched, decided = play.trace.ops[:at], False, False
    line = False
    for op in done:
        switched = switched or op.path == "root/current" and bool(op.changes)
        line = line or op.path == "root/.deploy/history.jsonl" and op.data is not None
        decided = decided or line and bool(op.syncs)
    return [play.before] if not switched else [play.after] if decided else [play.before, play.after]


def cases_of(play: Play, rng: random.Random) -> Iterator[Iterator[Case]]:
    """One iterator of states for each instant of a run."""
    for at in range(len(play.trace.ops) + 1):
        yield _cases_at(play, at, random.Random(rng.random()))


def _cases_at(play: Play, at: int, rng: random.Random) -> Iterator[Case]:
    disk = Disk(play.trace)
    for _ in range(at):
        disk.step()
    last = play.trace.ops[at - 1] if at else None
    place = f"{play.name}, after {at} operations ({last.call} {plain(last.path)})" if last else f"{play.name}, at the start"
    versions = allowed(play, at)
    for state in states_at(disk, rng):
        yield Case(play.name, play.config, place, state, versions)


def collect(plays: List[Play], wanted: int, seed: int) -> List[Case]:
    """So many distinct states, taken from every instant of every run in turn."""
    rng, seen, found = random.Random(seed), set(), []  # type: Any, Set[bytes], List[Case]
    sources = [source for play in plays for source in cases_of(play, rng)]
    rng.shuffle(sources)
    while sources and len(found) < wanted:
        left = []
        for source in sources:
            case = _next_new(source, seen)
            if case is not None:
                found.append(case)
                left.append(source)
        sources = left
    return found[:wanted]


def _next_new(source: Iterator[Case], seen: Set[bytes]) -> Optional[Case]:
    for case in source:
        key = case.scenario.encode() + identity(case.state)
        if key not in seen:
            seen.add(key)
            return case
    return None


# -- trying one ------------------------------------------------------------------

def materialise(state: State, directory: str) -> None:
    """Make a state real."""
    os.makedirs(directory, exist_ok=True)
    modes = []
    for path, kind, mode, data in state:
        target = os.path.join(directory, path)
        if kind == "symlink":
            os.symlink(os.fsdecode(data), target)
        elif kind == "directory":
            os.mkdir(target, 0o700)
            modes.append((target, mode))
        else:
            with open(target, "wb") as stream:
                stream.write(data)
            os.chmod(target, mode)
    for target, mode in modes:
        os.chmod(target, mode)


def problems_of(case: Case, directory: str) -> List[str]:
    """Recover a state and judge what comes of it; each problem begins with where the state comes from."""
    config = Path(directory) / "deploy.ini"
    app = FastApp(directory, config)
    materialise(case.state, directory)
    config.write_text(case.config)
    if not (app.root / ".deploy").exists():
        problems = [] if app.run("recover").exit_code == 0 and app.version is None else ["recover of an untouched root"]
    else:
        problems = recover_and_judge(app, case.versions)
        verified = app.run("history", "--verify")
        problems += [] if verified.exit_code == 0 else [f"history --verify: {verified.describe()}"]
        problems += [f"releases/{name} has a mode of its own" for name in app.releases()
                     if os.stat(str(app.root / "releases" / name)).st_mode & 0o7777 != 0o755]
    return [f"{case.place}: {problem}" for problem in problems]


def scratch() -> str:
    """Where to put thousands of small trees: memory, where there is some."""
    return "/dev/shm" if os.path.isdir("/dev/shm") else tempfile.gettempdir()


def try_case(case: Case) -> List[str]:
    """Try a state in a directory of its own, which goes afterwards."""
    directory = tempfile.mkdtemp(prefix="deploy-replay-", dir=scratch())
    try:
        return problems_of(case, directory)
    except Exception as error:  # whatever it is, it must be told with the state that led to it
        return [f"{case.place}: {type(error).__name__}: {error}"]
    finally:
        shutil.rmtree(directory, ignore_errors=True)


# -- scenarios -------------------------------------------------------------------

# A service, not a probe: its verdict does not depend on how long a try takes on a busy machine.
PROBE = "keep_releases = 1\n[service:sick]\ncommand = /bin/sh -c 'test $DEPLOY_VERSION != 1.2'\n"


def play_first(app: App) -> Tuple[List[Any], Optional[str], Optional[str]]:
    """A first deployment, which makes the root."""
    app.root.rmdir()
    return ["deploy", app.artifact("1.0")], None, "1.0"


def play_second(app: App) -> Tuple[List[Any], Optional[str], Optional[str]]:
    """A deployment that prunes the release before the last."""
    app.deploy("1.0")
    app.deploy("1.1")
    app.configure("keep_releases = 1\n")
    return ["deploy", app.artifact("1.2")], "1.1", "1.2"


def play_failing(app: App) -> Tuple[List[Any], Optional[str], Optional[str]]:
    """A deployment whose probe fails, so that the old release comes back."""
    app.deploy("1.1")
    app.configure(PROBE)
    return ["deploy", app.artifact("1.2")], "1.1", "1.1"


def play_failing_first(app: App) -> Tuple[List[Any], Optional[str], Optional[str]]:
    """A first deployment whose probe fails, so that nothing is live again."""
    app.configure(PROBE)
    return ["deploy", app.artifact("1.2")], None, None


def play_undone(app: App) -> Tuple[List[Any], Optional[str], Optional[str]]:
    """A deployment that fails before activation."""
    app.deploy("1.1")
    app.configure("[hooks]\npre_activate = false\n")
    return ["deploy", app.artifact("1.2")], "1.1", "1.1"


def play_rollback(app: App) -> Tuple[List[Any], Optional[str], Optional[str]]:
    """A rollback by hand."""
    app.deploy("1.0")
    app.deploy("1.1")
    return ["rollback"], "1.1", "1.0"


def play_stage(app: App) -> Tuple[List[Any], Optional[str], Optional[str]]:
    """A release is made, and not switched to."""
    app.deploy("1.0")
    return ["stage", app.artifact("1.1")], "1.0", "1.0"


def play_activate(app: App) -> Tuple[List[Any], Optional[str], Optional[str]]:
    """A staged release goes live."""
    app.deploy("1.0")
    app.run("stage", app.artifact("1.1"), check=0)
    return ["activate", "1.1"], "1.0", "1.1"


def play_dressed(app: App) -> Tuple[List[Any], Optional[str], Optional[str]]:
    """A deployment with a shared directory, a template and a hook that writes into the release."""
    app.deploy("1.0")
    app.configure("shared_dirs = uploads/pictures\n[template:x]\nsource = VERSION\ntarget = etc/x\n"
                  "[hooks]\npost_stage = touch made-by-hook\n")
    return ["deploy", app.artifact("1.1")], "1.0", "1.1"


def play_prune(app: App) -> Tuple[List[Any], Optional[str], Optional[str]]:
    """Two releases go."""
    for version in ("1.0", "1.1", "1.2", "1.3"):
        app.deploy(version)
    app.configure("keep_releases = 1\n")
    return ["prune"], "1.3", "1.3"


def play_recover(app: App) -> Tuple[List[Any], Optional[str], Optional[str]]:
    """The recovery of a deployment that was killed after its switch, and must go back."""
    app.deploy("1.1")
    app.configure(PROBE + "[hooks]\npost_activate = /bin/sh -c 'kill -9 $PPID'\n")
    app.run("deploy", app.artifact("1.2"), json=False)
    app.configure(PROBE)
    return ["recover"], "1.1", "1.1"


PLAYS = {"first deploy": play_first, "second deploy": play_second, "deploy that rolls back": play_failing,
         "first deploy that fails": play_failing_first, "deploy that is undone": play_undone,
         "rollback": play_rollback, "stage": play_stage, "activate": play_activate, "dressed deploy": play_dressed,
         "prune": play_prune, "recover": play_recover}


def perform(name: str, directory: Any) -> Play:
    """Set a scene, record the run, and keep it with what may be live afterwards."""
    app = App(directory)
    arguments, before, after = PLAYS[name](app)
    trace, result = record(app, *arguments)
    assert app.version == after and len(trace.ops) > 20, result.describe()
    return Play(name, trace, re.sub(r"(?m)^root = .*\n", "", app.config.read_text()).replace("pre_activate = false", ""),
                before, after)


def main() -> int:
    """Replay, count, and print every problem; 1 when there is one."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--states", type=int, default=10000)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--scenario", choices=sorted(PLAYS), action="append")
    flags = parser.parse_args()
    started = time.monotonic()
    directory = tempfile.mkdtemp(prefix="deploy-replay-", dir=scratch())
    try:
        plays = [perform(name, f"{directory}/{number}") for number, name in enumerate(flags.scenario or PLAYS)]
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    cases = collect(plays, flags.states, flags.seed)
    recorded = time.monotonic()
    problems = in_children(try_case, cases, flags.jobs)
    counts = Counter(case.scenario for case in cases)
    for play in plays:
        print(f"{play.name:<26} {len(play.trace.ops):4} operations {counts[play.name]:6} distinct states")
    print(f"{len(cases)} distinct states, {len(problems)} problems; recorded in {recorded - started:.1f} s, "
          f"tried in {time.monotonic() - recorded:.1f} s")
    for problem in sorted(problems):
        print("\n" + problem)
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
