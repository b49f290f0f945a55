#!/usr/bin/python3
"""Switch `current` to and fro under processes that read through it without a pause, and count what they meet.

Usage: python3 tests/tools/readers.py [--switches 10000] [--opens 1000000] [--readers 3] [--directory DIR]

The switches are deploy.py's own (Store.switch).  A reader opens files through
`current`, where none may ever be missing, and opens the directory itself once
and then reads several files below it, which must all be of one release.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from typing import Any, Dict, List, NamedTuple

FILES = ("VERSION", "bin/run", "lib/nested/data.txt", "last")
RELEASES = 4
# How many opens a reader makes between two looks at whether it is to stop.
BATCH = 200


class Tally(NamedTuple):
    """What one reader, or all together, met."""

    opens: int
    directories: int
    missing: int
    mixed: int
    seen: List[str]


class Figures(NamedTuple):
    """What a whole run came to."""

    switches: int
    readers: int
    seconds: float
    tally: Tally

    def line(self) -> str:
        """Write the figures for people."""
        return (f"{self.switches:,} switches under {self.readers} readers in {self.seconds:.1f} s: {self.tally.opens:,} "
                f"opens through "
                f"current ({self.tally.directories:,} of the directory), {self.tally.missing} missing, {self.tally.mixed} "
                f"mixed, "
                f"{len(self.tally.seen)} releases seen")


# -- the reader: a process of its own -------------------------------------------

def read(current: str, stop: str, report: str) -> None:
    """Read through `current` until the file `stop` exists, then write the tally."""
    opens, directories, missing, mixed, seen = 0, 0, 0, 0, set()
    while not os.path.exists(stop):
        for number in range(BATCH // 2):
            opens, directories = opens + 2, directories + 1
            try:
                seen.add(read_whole(current + "/" + FILES[number % len(FILES)]))
                found = read_tree(current)
            except FileNotFoundError:
                missing += 1
                continue
            mixed += len(found) != 1
            seen |= found
        # Written on the way: the switching goes on until there were opens enough.
        write_report(report, Tally(opens, directories, missing, mixed, sorted(seen)))


def read_whole(path: str) -> str:
    """Read a small file in one go."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return os.read(descriptor, 100).decode("ascii")
    finally:
        os.close(descriptor)


def read_tree(current: str) -> Any:
    """Open the directory once and say of which releases the files below it are."""
    directory, found = os.open(current, os.O_RDONLY | os.O_DIRECTORY), set()
    try:
        for name in FILES:
            descriptor = os.open(name, os.O_RDONLY, dir_fd=directory)
            found.add(os.read(descriptor, 100).decode("ascii"))
            os.close(descriptor)
    finally:
        os.close(directory)
    return found


def write_report(path: str, tally: Tally) -> None:
    """Replace a tally, so that one that is read is whole."""
    with open(path + ".new", "w") as stream:
        json.dump(tally._asdict(), stream)
    os.rename(path + ".new", path)


def read_report(path: str) -> Tally:
    """Read a tally; an empty one before the first was written."""
    try:
        with open(path) as stream:
            return Tally(**json.load(stream))
    except FileNotFoundError:
        return Tally(0, 0, 0, 0, [])


# -- the switcher -----------------------------------------------------------------

def make_root(directory: str) -> Any:
    """A root with releases whose files each hold their release's name, the first one live; returns deploy.py's Store."""
    # Here and not above: the readers, which are this file too, need none of it.
    from support import load_deploy
    deploy = load_deploy()
    store = deploy.Store.create(deploy.load_settings([], {}, [f"deploy.root={directory}/root"]))
    for number in range(RELEASES):
        for name in FILES:
            path = os.path.join(store.path, "releases", name_of(number), name)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(path, "w") as stream:
                stream.write(name_of(number))
    store.switch(None, name_of(0))
    return store


def name_of(number: int) -> str:
    """The id of a release."""
    return f"20260101T00000{number}Z-1.{number}"


def start_readers(directory: str, current: str, number: int) -> Dict[str, Any]:
    """Start readers: {report: process}."""
    reports = [os.path.join(directory, f"reader-{index}") for index in range(number)]
    return {report: subprocess.Popen([sys.executable, "-IS", os.path.abspath(__file__), "--reader", current,
                                      os.path.join(directory, "stop"), report]) for report in reports}


def total(reports: List[str]) -> Tally:
    """Add up what the readers met so far."""
    tallies = [read_report(report) for report in reports]
    return Tally(*(sum(numbers) for numbers in list(zip(*tallies))[:4]),
                 seen=sorted({name for tally in tallies for name in tally.seen}))


def run(directory: str, switches: int, opens: int, readers: int, limit_seconds: float = 3600) -> Figures:
    """Switch until there were so many switches and so many opens; RuntimeError when a reader fails or time is up."""
    store = make_root(directory)
    processes = start_readers(directory, store.path + "/current", readers)
    started, done = time.monotonic(), 0
    try:
        while done < switches or done % 100 or total(list(processes)).opens < opens:
            store.switch(name_of(done % RELEASES), name_of((done + 1) % RELEASES))
            done += 1
            if time.monotonic() - started > limit_seconds:
                raise RuntimeError(f"not within {limit_seconds} s: {done} switches, {total(list(processes)).opens} opens")
        seconds = time.monotonic() - started
    finally:
        with open(os.path.join(directory, "stop"), "w"):
            pass
        codes = [process.wait() for process in processes.values()]
        store.close()
    if any(codes):
        raise RuntimeError(f"readers ended with {codes}")
    return Figures(done, readers, seconds, total(list(processes)))


def main() -> int:
    """Read the command line and run; 1 when a reader met what must never be."""
    parser = argparse.ArgumentParser(description="Switch current under continuous readers.", allow_abbrev=False)
    parser.add_argument("--switches", type=int, default=10000)
    parser.add_argument("--opens", type=int, default=1000000)
    parser.add_argument("--readers", type=int, default=3)
    parser.add_argument("--directory", help="where to make the root; default: a temporary directory")
    parser.add_argument("--reader", nargs=3, metavar=("CURRENT", "STOP", "REPORT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.reader:
        read(*options.reader)
        return 0
    directory = tempfile.mkdtemp(prefix="deploy-test-readers-", dir=options.directory)
    try:
        figures = run(directory, options.switches, options.opens, options.readers)
    finally:
        shutil.rmtree(directory)
    print(figures.line())
    return int(figures.tally.missing + figures.tally.mixed > 0 or figures.switches < options.switches)


if __name__ == "__main__":
    sys.exit(main())
