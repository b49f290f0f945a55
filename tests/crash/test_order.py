"""What is on disk at each instant of a run: the order of writing, and states that a power cut could leave.

The rules are held to traces of real runs.  Each trace is then read again with
one of its syncs left out: the rules must see that, or `UNIMPORTANT` says why
that sync may be missing.
"""

import fnmatch
import json
import os
import random
import re
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Set, Tuple

import pytest

import replay
from replay import Disk, Op, Play, Trace, plain
from support import deep, needs, sized

STATE = "root/.deploy"
# How many crash states the suite tries; tests/replay.py tries as many as it is told.
STATES = sized(quick=80, whole=240)


class Excuse(NamedTuple):
    """A sync that may be left out with no rule the worse for it: in which scenarios, of what, right after what, and why."""

    scenario: str
    path: str
    before: str
    why: str


JOURNAL = "renameat root/.deploy/.journal.json.tmp root/.deploy/journal.json"
UNIMPORTANT = [
    Excuse("[!f]*", "root", "nothing", "the root was made ready by an earlier run, and nothing in it was made anew"),
    Excuse("*", STATE, JOURNAL + " (staging)",
           "the syncfs of the release covers it, and what is being unpacked is swept without a journal"),
    Excuse("*", STATE, JOURNAL + " (switched)",
           "with current at the new release a journal that still says intent is read as switched"),
    Excuse("first deploy", STATE, "unlinkat root/.deploy/journal.json",
           "a journal that comes back beside its verdict is taken away, and the reserve's sync covers it"),
    Excuse("*", STATE + "/releases", "renameat *.1.?.json.tmp *", "the next record's sync of the same directory covers it"),
    Excuse("dressed deploy", "root/releases/.new-release.tmp/etc*", "*",
           "the syncfs of the release covers what a template made"),
    Excuse("dressed deploy", "root/releases", "renameat *",
           "what post_stage made is synced by another syncfs before the record"),
    Excuse("prune", STATE + "/*", "unlinkat *1.1*", "the release that is pruned next syncs the same directories"),
]


# -- rules ---------------------------------------------------------------------

class Rules:
    """Follows a run and notes where something was relied on before it was sure to be on disk."""

    def __init__(self, trace: Trace) -> None:
        self.trace = halved(trace)
        self.disk, self.broken, self.asked = Disk(self.trace), [], 0  # type: Disk, List[str], int

    def check(self) -> List[str]:
        """Go through the run; returns what was broken, empty when nothing was."""
        for op in self.trace.ops:
            self._before(op)
            self.disk.step()
        self._at_the_end()
        return self.broken

    def _need(self, condition: Any, op: Op, what: str) -> None:
        self.asked += 1
        if not condition:
            self.broken.append(f"{op.call} {plain(op.source + ' ' if op.source else '')}{plain(op.path)}: {what}")

    # What is sure, seen from the root of the tree.

    def durable(self, path: str) -> Optional[int]:
        """The inode that a path leads to on disk, whatever else is lost; None where that is not sure."""
        tree, here = self.disk.tree([]), 0
        for part in path.split("/"):
            inode = tree.get(here, {}).get(part)
            if inode is None or self._is_unsettled(here, part):
                return None
            here = inode
        return here

    def _is_unsettled(self, directory: int, name: str) -> bool:
        return any((change.directory, change.name) == (directory, name)
                   for number in self.disk.volatile for change in self.trace.ops[number].changes)

    def is_gone(self, path: str) -> bool:
        """Whether it is sure that nothing has this name."""
        parent, _, name = path.rpartition("/")
        directory = self.durable(parent)
        return directory is not None and name not in self.disk.tree([]).get(directory, {}) and \
            not self._is_unsettled(directory, name)

    def is_whole(self, inode: int) -> bool:
        """Whether a file's data and mode, or everything in a directory, are sure."""
        if inode in self.disk.data and self.disk.data[inode][1] or len(self.disk.modes.get(inode, [])) > 1:
            return False
        entries = self.disk.tree(self.disk.volatile).get(inode, {})
        return all(not self._is_unsettled(inode, name) and self.is_whole(below) for name, below in entries.items()) and \
            not any(change.directory == inode for number in self.disk.volatile for change in self.trace.ops[number].changes)

    def is_sure(self, path: str) -> bool:
        """Whether a path leads to something whole, whatever is lost."""
        inode = self.durable(path)
        return inode is not None and self.is_whole(inode)

    def phase(self) -> str:
        """What the journal says that is sure to be found after a crash; empty where there may be none."""
        inode = self.durable(f"{STATE}/journal.json")
        if inode is None or not self.is_whole(inode):
            return ""
        return str(json.loads(self.disk.durable_data(inode).decode("ascii"))["phase"])

    # The rules.

    def _before(self, op: Op) -> None:
        if op.call.startswith("rename"):
            self._before_rename(op)
        if op.path == "root/current" and op.call.startswith("unlink"):
            self._need(self.phase() == "rolling_back", op, f"taken away while the journal says {self.phase()!r}")
        if op.path == f"{STATE}/history.jsonl" and op.data is not None:
            self._before_verdict(op)
        if op.path == f"{STATE}/journal.json" and op.call.startswith("unlink"):
            self._before_clearing(op)
        if op.call.startswith("unlink") and re.match(rf"{STATE}/(manifests|trees|releases)/[^.]", op.path):
            self._before_forgetting(op)

    def _before_rename(self, op: Op) -> None:
        if op.path.startswith((f"{STATE}/trash/", "root/releases/.new-")):
            return  # nobody reads there
        parent = op.path.rpartition("/")[0]
        self._need(self.is_whole(op.inode), op, "published before its data was synced")
        self._need(self.durable(parent) is not None, op, "published in a directory that may be lost")
        if op.path == "root/current":
            self._need(self.durable(op.source) is not None, op, "the new link may be lost")
            target = os.fsdecode(self.trace.inodes[op.inode].data).rpartition("/")[2]
            self._before_switch(op, target)
        if op.path.startswith("root/releases/"):
            self._need(self.phase() == "staging", op, "published before the journal told of it")
        if re.match(rf"{STATE}/releases/[^.]", op.path):
            self._before_record(op)
        if op.path == f"{STATE}/journal.json":
            self._before_journal(op)

    def _before_switch(self, op: Op, release: str) -> None:
        names = [f"root/releases/{release}", f"{STATE}/releases/{release}.json", f"{STATE}/manifests/{release}",
                 f"{STATE}/trees/{release}"]
        for name in names:
            self._need(self.is_sure(name), op, f"switched before {plain(name)} was sure")
        self._need(self.phase() in ("intent", "rolling_back"), op, f"switched while the journal says {self.phase()!r}")

    def _before_journal(self, op: Op) -> None:
        phase = json.loads(self.disk.newest_data(op.inode).decode("ascii"))["phase"]
        if phase == "switched":
            self._need(self._current_is_settled(), op, "the journal says switched before that was sure")
        if phase == "intent":
            self._need(not self._volatile_in("root/releases", STATE + "/releases", STATE + "/manifests", STATE + "/trees"),
                       op, "the journal says intent before the release was sealed")

    def _before_record(self, op: Op) -> None:
        record = json.loads(self.disk.newest_data(op.inode).decode("ascii"))
        if record["state"] in ("active", "retired", "bad"):
            self._need(self._current_is_settled(), op, f"recorded as {record['state']} before the switch was sure")
        else:
            for name in ("manifests", "trees"):
                self._need(self.is_sure(f"{STATE}/{name}/{record['id']}"), op, f"recorded before its {name} were sure")
            self._need(self.is_sure(f"root/releases/{record['id']}"), op, "recorded before the release was sure")

    def _before_verdict(self, op: Op) -> None:
        self._need(self._current_is_settled(), op, "the verdict is written before current was sure")
        self._need(not self._volatile_in(f"{STATE}/releases"), op, "the verdict is written before the records")
        self._need(not self._volatile_in("root/releases"), op, "the verdict is written before releases/ was sure")

    def _before_clearing(self, op: Op) -> None:
        self._need(self._current_is_settled(), op, "the journal goes before current was sure")
        self._need(self._line_is_sure(), op, "the journal goes before the verdict was sure")
        self._need(not self._volatile_in(f"{STATE}/releases"), op, "the journal goes before the records were sure")

    def _before_forgetting(self, op: Op) -> None:
        release = op.path.rpartition("/")[2]
        release = release[:-5] if release.endswith(".json") else release
        # An undo forgets first: the journal knows the release, and recovery takes it away.
        self._need(self.is_gone(f"root/releases/{release}") or self.phase() in ("staging", "intent"), op,
                   "forgotten while the release may come back")

    def _at_the_end(self) -> None:
        end = Op("exit", "", -1)
        self._need(not self._volatile_in("root", "root/releases", STATE, STATE + "/releases", STATE + "/manifests",
                                         STATE + "/trees"), end, "reported as done before it was sure")
        line = self.disk.trace.find(f"{STATE}/history.jsonl")
        self._need(line is None or self.is_whole(line), end, "the verdict was reported before it was sure")

    def _current_is_settled(self) -> bool:
        root = self.durable("root")
        return root is not None and not self._is_unsettled(root, "current")

    def _line_is_sure(self) -> bool:
        return self.is_sure(f"{STATE}/history.jsonl")

    def _volatile_in(self, *paths: str) -> bool:
        inodes = {self.trace.find(path) for path in paths}
        # A link for the way back that was not needed may come back: the next run sweeps it.
        return any(change.directory in inodes and not (change.name.startswith(".current.") and change.inode is None)
                   for number in self.disk.volatile for change in self.trace.ops[number].changes)


def halved(trace: Trace) -> Trace:
    """The run with each rename between two directories as two operations, each sure with its own directory only."""
    ops = []  # type: List[Op]
    for op in trace.ops:
        if len({change.directory for change in op.changes}) < 2:
            ops.append(op)
            continue
        gone, there = op.changes
        ops += [op._replace(changes=(there,)), Op("moved away", op.source, op.inode, changes=(gone,))]
    return with_ops(trace, ops)


def with_ops(trace: Trace, ops: List[Op]) -> Trace:
    """The same run with other operations."""
    other = Trace.__new__(Trace)
    other.__dict__.update(trace.__dict__)
    other.ops = ops
    return other


# -- the traces ------------------------------------------------------------------

@pytest.fixture(scope="module")
def plays(tmp_path_factory: Any) -> Dict[str, Play]:
    """Every scenario, recorded once."""
    needs("strace")
    return {name: replay.perform(name, tmp_path_factory.mktemp("play") / "app") for name in replay.PLAYS}


def without(trace: Trace, number: int) -> Trace:
    """The same run, had it left one of its operations out."""
    return with_ops(trace, trace.ops[:number] + trace.ops[number + 1:])


def syncs(trace: Trace) -> Iterator[Tuple[int, Op]]:
    """The syncs of a run with their numbers."""
    return ((number, op) for number, op in enumerate(trace.ops) if op.syncs)


def after_what(trace: Trace, number: int) -> str:
    """What a sync came right after, with the phase where that was the journal."""
    op, last = trace.ops[number], trace.ops[number - 1] if number else None
    if last is None or last.path != f"{STATE}/journal.json" or last.call.startswith("unlink"):
        return op.before
    data = [other.data for other in trace.ops[:number] if other.inode == last.inode and other.data is not None][-1]
    return f"{op.before} ({json.loads((data or b'').decode('ascii'))['phase']})"


def excuse_for(name: str, trace: Trace, number: int) -> Optional[Excuse]:
    """Why a sync may be missing."""
    path, before = plain(trace.ops[number].path), after_what(trace, number)
    return next((found for found in UNIMPORTANT if fnmatch.fnmatchcase(name, found.scenario)
                 and fnmatch.fnmatchcase(path, found.path) and fnmatch.fnmatchcase(before, found.before)), None)


# -- order -----------------------------------------------------------------------

@pytest.mark.parametrize("name", sorted(replay.PLAYS))
def test_nothing_is_relied_on_before_it_is_sure_to_be_on_disk(plays: Dict[str, Play], name: str) -> None:
    rules = Rules(plays[name].trace)
    assert rules.check() == []
    assert rules.asked >= (10 if name == "prune" else 20), "the rules did not see the run"


def test_every_sync_that_is_left_out_is_noticed_or_excused(plays: Dict[str, Play]) -> None:
    mattered, excused, unexplained, used = 0, 0, [], set()  # type: int, int, List[str], Set[Excuse]
    for name, play in plays.items():
        for number, op in syncs(play.trace):
            noticed, found = Rules(without(play.trace, number)).check(), excuse_for(name, play.trace, number)
            mattered += bool(noticed)
            if not noticed and found is None:
                unexplained.append(f"{name}: {op.call} {plain(op.path)} after {after_what(play.trace, number)}")
            elif not noticed and found is not None:
                excused += 1
                used.add(found)
    assert not unexplained, "no rule misses these, and no excuse names them:\n" + "\n".join(unexplained)
    assert used == set(UNIMPORTANT), f"never needed: {set(UNIMPORTANT) - used}"
    assert mattered > 160 and excused < mattered / 3, (mattered, excused)


# -- replay ----------------------------------------------------------------------

@deep
def test_a_sample_of_the_states_that_a_power_cut_leaves_is_recovered(plays: Dict[str, Play]) -> None:
    cases = replay.collect(list(plays.values()), STATES, seed=7)
    assert len(cases) == STATES and len({case.scenario for case in cases}) >= min(len(plays), STATES // 40)
    problems = replay.in_children(replay.try_case, cases, 1)
    assert not problems, "\n\n".join(problems)


@deep
@pytest.mark.parametrize("path, call, expected", [
    ("root/releases/.new-release.tmp", "syncfs", "is not whole"),
    (STATE + "/.journal.json.tmp", "fsync", "journal.json.*(is damaged|cannot be read)"),
    (STATE + "/releases/.1.2.json.tmp", "fsync", "JSONDecodeError|is damaged"),
])
def test_the_replay_sees_a_sync_that_is_missing(plays: Dict[str, Play], path: str, call: str, expected: str) -> None:
    play = plays["second deploy"]
    number = next(number for number, op in syncs(play.trace) if op.call == call and plain(op.path) == path)
    shorter = without(play.trace, number)
    # Where it does most harm: from there to the next sync of everything.
    ends = next((at for at, op in enumerate(shorter.ops) if at >= number and op.syncs == "all"), len(shorter.ops))
    cases = replay.collect([play._replace(trace=shorter)], 300, seed=3)
    cases = [case for case in cases if number <= int((re.search(r"after (\d+) ", case.place) or [0, 0])[1]) <= ends][:40]
    problems = replay.in_children(replay.try_case, cases, 1, chunk=20)
    assert any(re.search(expected, problem) for problem in problems), f"{len(cases)} states, {len(problems)} problems"


def test_the_model_keeps_what_was_synced_and_loses_what_was_not(tmp_path: Any) -> None:
    trace = Trace(tmp_path)
    trace.make("mkdir", "root", "directory")
    trace.sync("fsync", "")
    trace.make("openat", "root/a", "file")
    trace.write("write", "root/a", b"new", None)
    trace.rename("rename", "root/a", "root/b")
    states = {tuple((path, data) for path, kind, _, data in state if kind == "file") for state in all_states(trace)}
    kept = {("root/b", data) for data in (b"new", b"", b"n", b"\0\0\0")} | {("root/a", b"")}
    assert {()} | {(found,) for found in kept} <= states
    trace.sync("fsync", "root/b")
    trace.sync("fsync", "root")
    assert {tuple(state[1:]) for state in all_states(trace)} == {(("root/b", "file", 0o777, b"new"),)}


def all_states(trace: Trace) -> List[Any]:
    """The states at the end of a small trace."""
    disk = Disk(trace)
    for _ in trace.ops:
        disk.step()
    return list(replay.states_at(disk, random.Random(1)))
