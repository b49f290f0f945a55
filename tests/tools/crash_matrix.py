#!/usr/bin/python3
"""Stop deploy.py at every system call that changes something, and judge what is left.

Usage: python3 tests/tools/crash_matrix.py [--jobs N] [--only SCENARIO]... [kill | errno | read]

kill   kills the run there; `current` is the old or the new release, complete,
       and one `recover`, or the next deployment, brings everything into line.
errno  lets the call fail with ENOSPC, EIO, EDQUOT, EROFS, EMFILE or EACCES;
       exit code, error and state are as promised.
read   lets the calls fail that only read: opening a file or a directory, and
       listing one.

Without one of them, all.  Needs Linux and strace; TMPDIR on a tmpfs is fastest.
Exits 1 when a point fails, or was not hit.
"""

import argparse
import os
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from typing import Any, Dict, List, NamedTuple, Tuple

sys.dont_write_bytecode = True
os.umask(0o022)
sys.path.insert(0, os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "lib"))

from crash_scenarios import SCENARIOS, Stage  # noqa: E402  (no bytecode beside the sources)
from crashes import same_place  # noqa: E402

WELL = {"kill": "all consistent", "errno": "all as promised", "read": "all as promised"}


class Outcome(NamedTuple):
    """What a part of a scenario's points came to; `places` are all of them, as every process must see them."""

    tried: int
    places: List[str]
    failures: List[str]


def run_part(what: str, name: str, part: int, parts: int) -> Outcome:
    """Prepare a scenario and try every so many of its points."""
    with tempfile.TemporaryDirectory(prefix="deploy-crash-") as directory:
        stage = Stage(name, os.path.join(directory, "app"))
        points, failures = stage.points(what), []
        chosen = list(enumerate(points))[part::parts]
        for number, point in chosen:
            problems = stage.try_point(point, number)
            if problems:
                failures.append("\n    ".join([f"{name}: {point.describe()}"] + problems))
        return Outcome(len(chosen), [same_place(point.call).replace(directory, "") for point in points], failures)


def collect(parts: List[Any], what: str, name: str) -> Tuple[int, List[str]]:
    """Wait for the parts of a scenario, print its line and what failed; returns how many points there were, and that."""
    outcomes = [part.result() for part in parts]
    failures = [failure for outcome in outcomes for failure in outcome.failures]
    tried = sum(outcome.tried for outcome in outcomes)
    if any(outcome.places != outcomes[0].places for outcome in outcomes) or tried != len(outcomes[0].places):
        failures.append(f"{name}: two runs of it made different calls, so that some point was missed")
    print(f"{name:<22} {what} points {tried:>4}, {f'{len(failures)} FAILED' if failures else WELL[what]}", flush=True)
    print("".join(f"\n{failure}\n" for failure in failures), end="", flush=True)
    return tried, failures


def run_matrix(kinds: List[str], names: List[str], jobs: int) -> int:
    """Try everything; returns the exit code."""
    started, total, failures = time.monotonic(), 0, []  # type: float, int, List[str]
    with ProcessPoolExecutor(jobs) as pool:
        pending = {(what, name): [pool.submit(run_part, what, name, part, jobs) for part in range(jobs)]
                   for what in kinds for name in names}  # type: Dict[Tuple[str, str], List[Any]]
        for (what, name), parts in pending.items():
            tried, failed = collect(parts, what, name)
            total, failures = total + tried, failures + failed
    seconds = time.monotonic() - started
    print(f"{total} points in {seconds:.0f} s ({total / seconds:.1f} a second), {len(failures)} failed")
    return int(bool(failures))


def main() -> int:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description="Stop deploy.py at every system call.", allow_abbrev=False)
    parser.add_argument("what", nargs="?", choices=sorted(WELL), help="only this third")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="how many processes (default: one a CPU)")
    parser.add_argument("--only", action="append", choices=sorted(SCENARIOS), help="only this scenario; may repeat")
    options = parser.parse_args()
    return run_matrix([options.what] if options.what else list(WELL), options.only or list(SCENARIOS), options.jobs)


if __name__ == "__main__":
    sys.exit(main())
