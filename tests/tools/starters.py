#!/usr/bin/python3
"""Let many runs of deploy.py start at the same instant, round after round: exactly one may have the lock.

Usage: python3 tests/tools/starters.py [--starters 50] [--rounds 200] [--directory DIR]

Each starter is a process of its own, forked from one that has loaded deploy.py
already: what is left between the starting signal and the lock is the program's
own work, and the race as narrow as it can be.  All want to make live the
release that is not; the one that got the lock stands in a hook until every
other has given up.
"""

import argparse
import errno
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any, Dict, List, NamedTuple

sys.path.insert(0, os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "lib"))

from scenes import configure  # noqa: E402
from support import App, load_deploy  # noqa: E402

VERSIONS = ("1.0", "1.1")
PATIENCE_SECONDS = 120


class Ended(NamedTuple):
    """How one starter ended: its exit code, the processor time it took, and when, in seconds from the starting signal."""

    pid: int
    exit_code: int
    own_seconds: float
    wall_seconds: float
    stderr: str


class Figures(NamedTuple):
    """What all rounds came to; a problem is a line that says in which round what was wrong."""

    rounds: int
    starters: int
    losers: int
    unnamed: int
    slowest_own_seconds: float
    slowest_wall_seconds: float
    seconds: float
    problems: List[str]

    def line(self) -> str:
        """Write the figures for people."""
        return (f"{self.rounds} rounds of {self.starters} starters in {self.seconds:.0f} s: {self.losers:,} gave way with "
                f"exit code 75 "
                f"({self.unnamed} before the owner had written its name), the slowest after {self.slowest_own_seconds:.2f} "
                f"s of its own and {self.slowest_wall_seconds:.2f} s by the clock; "
                f"{len(self.problems)} problems")


class Race:
    """An application with two releases, and a FIFO at which the owner of the lock stands."""

    def __init__(self, directory: Path, starters: int) -> None:
        self.app, self.starters, self.deploy = App(directory / "app"), starters, load_deploy()
        configure(self.app)
        for version in VERSIONS:
            self.app.deploy(version)
        self.gate = directory / "gate"
        os.mkfifo(str(self.gate))
        configure(self.app, f"[hooks]\npre_activate = cat {self.gate}\n")

    def round(self, version: str) -> List[Ended]:
        """Start everybody at once, let the owner go on when all others have ended; how each ended, the owner last."""
        reader, writer = os.pipe()
        pids = [self._fork(number, version, reader, writer) for number in range(self.starters)]
        os.close(reader)
        started = time.monotonic()
        os.close(writer)
        ended = []  # type: List[Ended]
        try:
            while len(ended) < self.starters - 1:
                ended.append(self._wait(pids, started))
            self._open_gate(started)
            ended.append(self._wait(pids, started))
        finally:
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
        return ended

    def _fork(self, number: int, version: str, reader: int, writer: int) -> int:
        pid = os.fork()
        if pid:
            return pid
        try:
            os.close(writer)
            for descriptor, kind in ((1, "stdout"), (2, "stderr")):
                opened = os.open(str(self.app.directory / f"{kind}-{number}"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
                os.dup2(opened, descriptor)
            os.rename(str(self.app.directory / f"stderr-{number}"), str(self.app.directory / f"stderr-of-{os.getpid()}"))
            sys.stdout, sys.stderr = open(1, "w"), open(2, "w")
            os.read(reader, 1)  # ends when the starting signal, the closing of the other end, is given
            os.close(reader)
            os._exit(self.deploy.main(["--json", "-c", str(self.app.config), "activate", version]))
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(99)

    def _wait(self, pids: List[int], started: float) -> Ended:
        while time.monotonic() - started < PATIENCE_SECONDS:
            for pid in list(pids):
                found, status, usage = os.wait4(pid, os.WNOHANG)
                if found:
                    pids.remove(pid)
                    return self._ended(pid, status, usage, time.monotonic() - started)
            time.sleep(0.002)
        raise RuntimeError(f"not within {PATIENCE_SECONDS} s: {len(pids)} of {self.starters} still run")

    def _ended(self, pid: int, status: int, usage: Any, wall_seconds: float) -> Ended:
        path = self.app.directory / f"stderr-of-{pid}"
        text = path.read_text()
        path.unlink()
        code = os.WEXITSTATUS(status) if os.WIFEXITED(status) else -os.WTERMSIG(status)
        return Ended(pid, code, usage.ru_utime + usage.ru_stime, wall_seconds, text)

    def _open_gate(self, started: float) -> None:
        """Let `cat` come to its end; it may not have come to the FIFO yet."""
        while True:
            try:
                os.close(os.open(str(self.gate), os.O_WRONLY | os.O_NONBLOCK))
                return
            except OSError as error:
                if error.errno != errno.ENXIO or time.monotonic() - started > PATIENCE_SECONDS:
                    raise
            time.sleep(0.002)


def judge(race: Race, version: str, before: Dict[str, Any], ended: List[Ended]) -> List[str]:
    """Say what is wrong with a round; `before` is what was there before it."""
    *losers, owner = ended
    problems = [f"owner ended with {owner.exit_code}: {owner.stderr}"] if owner.exit_code else []
    for loser in losers:
        if loser.exit_code != 75:
            problems.append(f"a loser ended with {loser.exit_code}: {loser.stderr}")
        elif not re.search(rf"\bpid {owner.pid} of ", loser.stderr) and "an unknown process" not in loser.stderr:
            problems.append(f"a loser did not name the owner {owner.pid}: {loser.stderr}")
    after = look(race.app)
    if after["version"] != version or after["history"] != before["history"] + 1:
        problems.append(f"before it was {before}, now it is {after}, and {version} was to be live")
    if after["releases"] != before["releases"] or race.app.leftovers():
        problems.append(f"releases were {before['releases']}, are {after['releases']}, left over: {race.app.leftovers()}")
    return problems


def look(app: App) -> Dict[str, Any]:
    """What a round may change, and what not."""
    return {"version": app.version, "history": len(app.history()), "releases": app.releases()}


def run(directory: Path, starters: int, rounds: int) -> Figures:
    """Run all rounds."""
    race, problems, everybody = Race(directory, starters), [], []  # type: Race, List[str], List[Ended]
    started = time.monotonic()
    for number in range(rounds):
        version, before = VERSIONS[number % 2], look(race.app)
        ended = race.round(version)
        everybody += ended[:-1]
        problems += [f"round {number}: {problem}" for problem in judge(race, version, before, ended)]
    losers = [loser for loser in everybody if loser.exit_code == 75]
    return Figures(rounds, starters, len(losers), sum("an unknown process" in loser.stderr for loser in losers),
                   max(loser.own_seconds for loser in everybody), max(loser.wall_seconds for loser in everybody),
                   time.monotonic() - started, problems)


def main() -> int:
    """Read the command line and run; 1 when any round went wrong."""
    parser = argparse.ArgumentParser(description="Many runs at once, one lock.", allow_abbrev=False)
    parser.add_argument("--starters", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--directory", help="where to make the root; default: a temporary directory")
    options = parser.parse_args()
    directory = Path(tempfile.mkdtemp(prefix="deploy-test-starters-", dir=options.directory))
    try:
        figures = run(directory, options.starters, options.rounds)
    finally:
        shutil.rmtree(str(directory))
    print(json.dumps(figures.problems[:20], indent=1))
    print(figures.line())
    return int(bool(figures.problems))


if __name__ == "__main__":
    sys.exit(main())
