#!/usr/bin/python3
"""Run the test suite in virtual environments of its own, which hold pytest and nothing else.

Usage: run_suite.py [--all] [--jobs N] [-- PYTEST ARGUMENTS]

Without --all: the quick set under the Python that runs this.  With --all: the
whole set under it, and the quick set under every other Python from 3.6 to 3.14
that pyenv has: all of it under the oldest, and a part each under those after
it, which have run it together.  $DEPLOY_TEST_SET names another
set, $PYTEST_ARGUMENTS works as well.  A suite is cut into parts that run side
by side, and shows what it said at its end.
"""

import argparse
import glob
import os
import re
import shlex
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Dict, List, NamedTuple, Tuple

TESTS = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TOP = os.path.dirname(TESTS)
VERSIONS = [(3, minor) for minor in range(6, 15)]
PYTEST_OPTIONS = ["-p", "no:cacheprovider", "-q", "-ra", "--tb=short", "--strict-markers", "--rootdir", TOP, TESTS]


class Part(NamedTuple):
    """A part of a set under one Python: `share` is 1/3 for every third case, from the second on."""

    version: Tuple[int, int]
    python: str
    set: str
    share: str

    def name(self) -> str:
        """The Python, as people name it."""
        return "%d.%d" % self.version


class Outcome(NamedTuple):
    """How a part ended."""

    exit_code: int
    seconds: float
    summary: str


def find_pythons() -> Dict[Tuple[int, int], str]:
    """The newest patch release of each Python that pyenv has, or .cache: {(3, 6): path of the interpreter}."""
    root = os.environ.get("PYENV_ROOT") or os.path.expanduser("~/.pyenv")
    found = {}  # type: Dict[Tuple[int, int], Tuple[int, str]]
    places = glob.glob(os.path.join(root, "versions", "*")) + glob.glob(os.path.join(TOP, ".cache", "python-*"))
    for path in (os.path.join(place, "bin", "python3") for place in places):
        numbers = re.match(r"(?:python-)?(\d+)\.(\d+)(?:\.(\d+))?\Z", path.split(os.sep)[-3])
        if numbers and os.access(path, os.X_OK):
            major, minor, patch = (int(number or 0) for number in numbers.groups())
            found[major, minor] = max((patch, path), found.get((major, minor), (-1, "")))
    return {version: path for version, (_, path) in found.items() if version in VERSIONS}


def version_of(python: str, modules: str = "sys") -> str:
    """Which Python an interpreter is, such as `3.6`; empty when it does not run or lacks one of the modules."""
    program = f"import sys, {modules}; print('%d.%d' % sys.version_info[:2])"
    try:
        return subprocess.check_output([python, "-c", program], stderr=subprocess.DEVNULL).decode("ascii").strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def make_venv(python: str, venv: str) -> str:
    """Make a virtual environment with pytest, unless it is there already; returns the Python inside."""
    inside = os.path.join(venv, "bin", "python")
    if version_of(inside, "pytest") != version_of(python):
        subprocess.check_call([python, "-m", "venv", "--clear", venv])
        pip = [inside, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        if version_of(inside) == "3.6":
            # The pip that came with it takes the newest pytest, although that wants a newer Python.
            subprocess.check_call(pip + ["pip>=20,<21.4"])
        subprocess.check_call(pip + ["pytest"])
    return inside


def parts_of(pythons: Dict[Tuple[int, int], str], jobs: int, *, everything: bool) -> List[Part]:
    """What is run, the longest first: {} beside this Python runs the quick set under it alone."""
    chosen = os.environ.get("DEPLOY_TEST_SET")
    own = (sys.version_info[0], sys.version_info[1])
    count = 2 * jobs if everything else jobs
    parts = [Part(own, sys.executable, chosen or ("whole" if everything else "quick"), f"{number}/{count}") for number in range(count)]
    others = sorted(set(pythons) - {own})
    for version in others[:1]:
        parts += [Part(version, pythons[version], chosen or "quick", f"{number}/{jobs}") for number in range(jobs)]
    parts += [Part(version, pythons[version], chosen or "quick", f"{number}/{len(others[1:])}") for number, version in enumerate(others[1:])]
    return parts


def run_part(part: Part, inside: str, arguments: List[str]) -> Outcome:
    """Run pytest, and show its output at the end, in one piece."""
    started = time.monotonic()
    argv = [inside, "-B", "-W", "error::SyntaxWarning", "-m", "pytest"] + PYTEST_OPTIONS + arguments
    env = dict(os.environ, DEPLOY_TEST_SET=part.set, DEPLOY_TEST_SHARE=part.share)
    done = subprocess.run(argv, cwd=TOP, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    output = done.stdout.decode("utf-8", "replace").rstrip()
    show(f"===== Python {part.name()}, {part.set} set, part {part.share} =====\n{output}")
    # 5: of so few cases as were asked for this part has none.
    return Outcome(done.returncode % 5 if arguments else done.returncode, time.monotonic() - started, output.split("\n")[-1].strip("= "))


_show_lock = threading.Lock()


def show(text: str) -> None:
    """Print in one piece, whatever the locale can encode."""
    with _show_lock:
        sys.stdout.buffer.write((text + "\n").encode("utf-8", "replace"))
        sys.stdout.buffer.flush()


def main() -> int:
    """Read the command line, run, and print a summary."""
    parser = argparse.ArgumentParser(description="Run the test suite.", allow_abbrev=False)
    parser.add_argument("--all", action="store_true", help="the whole set, and the quick one under every other Python that pyenv has")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="how many parts run at a time")
    parser.add_argument("arguments", nargs="*", help="handed to pytest, after --")
    options = parser.parse_args()
    arguments = shlex.split(os.environ.get("PYTEST_ARGUMENTS", "")) + options.arguments
    parts = parts_of(find_pythons() if options.all else {}, options.jobs, everything=options.all)
    venvs = {part.version: os.path.join(TOP, ".venvs", part.name()) for part in parts}
    inside = {part.version: make_venv(part.python, venvs[part.version]) for part in parts}
    with ThreadPoolExecutor(options.jobs) as pool:
        outcomes = list(pool.map(lambda part: run_part(part, inside[part.version], arguments), parts))
    show("\n===== summary =====")
    for part, outcome in zip(parts, outcomes):
        word = "FAILED" if outcome.exit_code else "passed"
        show(f"{part.name():<5} {part.set:<6}{part.share:<5} {word}  {outcome.seconds:6.1f} s  {outcome.summary}")
    missing = sorted(set(VERSIONS) - set(venvs)) if options.all else []
    if missing:
        show("not installed: " + ", ".join("%d.%d" % version for version in missing))
    return int(any(outcome.exit_code for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
