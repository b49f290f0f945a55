#!/usr/bin/python3
"""Every bit of what deploy.py believes: flipped or cut off, it is refused or recovered, and never a wrong switch.

Usage: python3 tests/tools/damage.py [--stride N] [--jobs N] [--command NAME]

The journal, a record and the last line of the history are damaged one bit and
one length at a time; each command then runs on that root.  The suite tries a
sample, this program all of it.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Set, Tuple

sys.dont_write_bytecode = True
sys.path.insert(0, os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "lib"))

import replay  # noqa: E402
from crashes import Saved, find_call, inconsistencies, is_whole, kill_at, record_calls  # noqa: E402
from replay import FastApp  # noqa: E402
from support import App, Result, sized  # noqa: E402

# Every how many bits (and lengths) the suite tries one; no divisor of 8, or one bit of each byte would never be tried.
STRIDE = sized(quick=1597, whole=397)
KILL = "/bin/sh -c 'kill -9 $PPID'"
COMMANDS = ("status", "recover", "deploy", "rollback", "verify-history")


class Scene(NamedTuple):
    """A root before the damage, the new artifact, and what is live when each command has ended well."""

    directory: str
    artifact: str
    ends: Dict[str, str]


class Target(NamedTuple):
    """A file to damage: in which scene, its path under .deploy, and where the part to damage begins."""

    name: str
    scene: str
    path: str
    start: int
    data: bytes


class Damage(NamedTuple):
    """One bit flipped (`bit` counts from the start of the part), or the file cut off after `length` bytes of it."""

    target: str
    command: str
    bit: Optional[int]
    length: Optional[int]


ENDS = {"status": "1.1", "recover": "1.1", "deploy": "1.2", "rollback": "1.0", "verify-history": "1.1"}
SCENES = {}  # type: Dict[str, Scene]
TARGETS = {}  # type: Dict[str, Target]
_work = {}  # type: Dict[Tuple[int, str], Any]


# -- scenes ----------------------------------------------------------------------

def at_rest(app: App) -> None:
    """Three releases, of which the last is live."""
    for version in ("0.9", "1.0", "1.1"):
        app.deploy(version)


def under_way(app: App) -> None:
    """A deployment was killed after its switch: the journal says so."""
    app.deploy("0.9")
    app.deploy("1.0")
    app.configure(f"[hooks]\npost_activate = {KILL}\n")
    app.run("deploy", app.artifact("1.1"), json=False)
    app.configure()


def decided(app: App) -> None:
    """A deployment was killed with its verdict in the history and the journal still there."""
    app.deploy("0.9")
    app.deploy("1.0")
    artifact, saved = app.artifact("1.1"), Saved(app)
    calls = record_calls(app, "deploy", artifact, check=0)
    saved.restore()
    kill_at(app, find_call(calls, "unlinkat", '"journal.json"'), "deploy", artifact)


def set_scenes(directory: Any) -> None:
    """Play the scenes once, and list what can be damaged in them."""
    for name, play in (("at rest", at_rest), ("under way", under_way), ("decided", decided)):
        app = App(Path(str(directory)) / name.replace(" ", "-"))
        play(app)
        SCENES[name] = Scene(str(app.directory), str(app.artifact("1.2")), ENDS)
        state, live, before = app.root / ".deploy", app.releases()[-1], app.releases()[-2]
        found = {"at rest": [("record of current", f"releases/{live}.json"),
                             ("record of previous", f"releases/{before}.json"),
                             ("history", "history.jsonl")],
                 "under way": [("journal", "journal.json")],
                 "decided": [("history with a journal", "history.jsonl"), ("journal with a verdict", "journal.json")]}
        for title, path in found[name]:
            data = (state / path).read_bytes()
            start = data.rstrip(b"\n").rfind(b"\n") + 1 if path == "history.jsonl" else 0
            TARGETS[title] = Target(title, name, path, start, data)


def damages(stride: int, commands: Any = COMMANDS) -> List[Damage]:
    """Every so many bits and lengths of every target, for every command that has to do with it."""
    found = []
    for target in TARGETS.values():
        size = len(target.data) - target.start
        for command in commands:
            if command == "verify-history" and not target.path.startswith("history"):
                continue
            found += [Damage(target.name, command, bit, None) for bit in range(len(found) % stride, 8 * size, stride)]
            # A length is a state that a crash leaves, so these are tried more often.  That a whole line is gone from
            # the end shows only where the digest of the last one was kept elsewhere.
            shortest = 1 if command == "verify-history" else 0
            found += [Damage(target.name, command, None, length) for length in range(shortest, size, max(1, stride // 8))]
    return found


# -- one damage --------------------------------------------------------------------

def damaged(target: Target, damage: Damage) -> bytes:
    """The file's bytes with the damage."""
    if damage.length is not None:
        return target.data[:target.start + damage.length]
    data, bit = bytearray(target.data), damage.bit or 0
    data[target.start + bit // 8] ^= 1 << bit % 8
    return bytes(data)


def same_meaning(target: Target, data: bytes) -> bool:
    """Whether the damaged bytes still say the same: the last newline of a JSON file."""
    try:
        return target.path != "history.jsonl" and json.loads(data.decode("utf-8")) == json.loads(target.data.decode("ascii"))
    except ValueError:
        return False


def fingerprint(root: Path) -> Dict[str, Tuple[int, ...]]:
    """What tells whether anything was touched, without reading it; the lock's text is information only."""
    found = {}
    for directory, _, names in os.walk(str(root)):
        for path in [directory] + [os.path.join(directory, name) for name in names]:
            status = os.lstat(path)
            found[path] = (status.st_ino, status.st_mode, status.st_size, status.st_mtime_ns)
    found.pop(str(root / ".deploy" / "lock"), None)
    return found


def fresh(scene: str) -> FastApp:
    """This process's copy of a scene, as it was."""
    key = (os.getpid(), scene)
    if key not in _work:
        source = Path(SCENES[scene].directory)
        directory = tempfile.mkdtemp(prefix="work-", dir=str(source.parent))
        app = FastApp(directory, Path(directory) / "deploy.ini")
        app.config.write_text("[deploy]\napplication = myapp\ndurable = no\n")
        _work[key] = [app, None]
    app, left = _work[key]
    if left is None or fingerprint(app.root) != left:
        shutil.rmtree(str(app.root), ignore_errors=True)
        shutil.copytree(SCENES[scene].directory + "/root", str(app.root), symlinks=True)
        _work[key][1] = fingerprint(app.root)
    return app


def try_damage(damage: Damage) -> List[str]:
    """Damage, run, judge, mend; each problem begins with what was damaged."""
    target = TARGETS[damage.target]
    app, data = fresh(target.scene), damaged(target, damage)
    path = app.root / ".deploy" / target.path
    times = path.stat()
    path.write_bytes(data)
    before, live = fingerprint(app.root), app.current
    arguments = {"deploy": ["deploy", SCENES[target.scene].artifact], "verify-history": ["history", "--verify"]}
    try:
        result = app.run(*arguments.get(damage.command, [damage.command]))
        problems = judge(app, damage, result, before == fingerprint(app.root) and app.current == live)
        if result.exit_code == 0 and damage.command in ENDS and before != fingerprint(app.root):
            problems += judge_end(app, target)
    except Exception as error:  # whatever it is, it must be told with the damage that led to it
        problems = [f"{type(error).__name__}: {error}"]
    if before == fingerprint(app.root):
        path.write_bytes(target.data)
        os.utime(str(path), ns=(times.st_atime_ns, times.st_mtime_ns))
    where = f"bit {damage.bit}" if damage.length is None else f"cut off after {damage.length} bytes"
    return [f"{damage.command}, {damage.target}, {where}: {problem}" for problem in problems]


ALLOWED = {"status": {0, 7}, "recover": {0, 3, 6}, "deploy": {0, 3, 6}, "rollback": {0, 3, 6},
           "verify-history": {7}}  # type: Dict[str, Set[int]]


def judge(app: FastApp, damage: Damage, result: Result, untouched: bool) -> List[str]:
    """What is wrong with how a command ended."""
    problems = []
    target, version = TARGETS[damage.target], SCENES[TARGETS[damage.target].scene].ends[damage.command]
    if result.exit_code not in ALLOWED[damage.command]:
        problems.append(f"exit code {result.exit_code}")
    if "Traceback" in result.stderr:
        problems.append("a traceback")
    if result.exit_code and not untouched:
        problems.append("refused, and changed something")
    if result.exit_code and not (result.data["error"]["message"] and result.data["error"]["hint"]):
        problems.append("refused without a reason or a hint")
    if damage.command in ("status", "verify-history") and not untouched:
        problems.append("a command that only looks changed something")
    if result.exit_code == 0 and app.version != version:
        problems.append(f"{app.version} is live, not {version}")
    if result.exit_code == 0 and target.path.endswith(".json") and not same_meaning(target, damaged(target, damage)):
        # Looking shows what it can.
        if damage.command != "status":
            problems.append("a damaged file was believed")
    if app.current is None or not is_whole(app, app.current, str(app.version)):
        problems.append("what is live is not whole")
    return [f"{problem}\n{result.describe()}" for problem in problems]


def judge_end(app: FastApp, target: Target) -> List[str]:
    """What does not fit together after a command that went on, and whether the next recovery finds something to do."""
    if target.path.startswith("history"):
        # That the chain is broken is for `history --verify` to say; here it would hide the rest.
        (app.root / ".deploy" / "history.jsonl").unlink()
    # A record that cannot be read has been told of already.
    problems = [] if target.path.startswith("releases/") else inconsistencies(app, [app.version])
    again = app.run("recover")
    if again.exit_code or again.data["changed"]:
        problems.append(f"another recover found something: {again.describe()}")
    return problems


def main() -> int:
    """Try it all, count, and print every problem; 1 when there is one."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--stride", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--command", choices=COMMANDS, action="append")
    flags = parser.parse_args()
    started = time.monotonic()
    directory = tempfile.mkdtemp(prefix="deploy-damage-", dir=replay.scratch())
    try:
        set_scenes(directory)
        items = damages(flags.stride, flags.command or COMMANDS)
        problems = replay.in_children(try_damage, items, flags.jobs, chunk=400)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    for (target, command), number in sorted(Counter((item.target, item.command) for item in items).items()):
        print(f"{target:<24} {command:<16} {number:6}")
    print(f"{len(items)} damages, {len(problems)} problems in {time.monotonic() - started:.1f} s")
    for problem in sorted(problems):
        print("\n" + problem)
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
