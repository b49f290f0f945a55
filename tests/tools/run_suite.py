#!/usr/bin/python3
"""Run the test suite in virtual environments of its own, which hold pytest and nothing else.

Usage: run_suite.py [--all | --others] [--jobs N] [--shares N] [-- PYTEST ARGUMENTS]

Without --all: the Python that runs this, in .venv.  With --all: every Python
from 3.6 to 3.14 that pyenv has, each in .venvs/VERSION, then a summary; one
that is not installed is named and left out.  With --others: all but the one
that runs this.  With --shares the oldest and the newest run everything, and
those between them one case in N, each Python its own; N of them in a row have
run every case.  $PYTEST_ARGUMENTS works as well.
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
from typing import Dict, List, NamedTuple, Tuple

TESTS = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TOP = os.path.dirname(TESTS)
VERSIONS = [(3, minor) for minor in range(6, 15)]
PYTEST_OPTIONS = ["-p", "no:cacheprovider", "-q", "-ra", "--tb=short", "--strict-markers", "--rootdir", TOP, TESTS]


class Outcome(NamedTuple):
    """How the suite ended under one Python."""

    version: str
    exit_code: int
    seconds: float
    summary: str


def find_pythons() -> Dict[Tuple[int, int], str]:
    """The newest patch release of each Python that pyenv has: {(3, 6): path of the interpreter}."""
    root = os.environ.get("PYENV_ROOT") or os.path.expanduser("~/.pyenv")
    found = {}  # type: Dict[Tuple[int, int], Tuple[int, str]]
    for path in glob.glob(os.path.join(root, "versions", "*", "bin", "python3")):
        numbers = re.match(r"(\d+)\.(\d+)\.(\d+)\Z", path.split(os.sep)[-3])
        if numbers:
            major, minor, patch = (int(number) for number in numbers.groups())
            found[major, minor] = max((patch, path), found.get((major, minor), (-1, "")))
    return {version: path for version, (_, path) in found.items()}


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


def run_suite(python: str, venv: str, arguments: List[str], *, live: bool, share: str = "0/1") -> Outcome:
    """Run pytest; `live` shows its output as it comes, otherwise it is shown at the end, in one piece."""
    version, started = os.path.basename(venv), time.monotonic()
    try:
        inside = make_venv(python, venv)
    except (OSError, subprocess.CalledProcessError) as error:
        return Outcome(version, 1, time.monotonic() - started, f"no virtual environment: {error}")
    argv = [inside, "-B", "-W", "error::SyntaxWarning", "-m", "pytest"] + PYTEST_OPTIONS + arguments
    done = subprocess.run(argv, cwd=TOP, env=dict(os.environ, DEPLOY_TEST_SHARE=share), stdin=subprocess.DEVNULL,
                          stdout=None if live else subprocess.PIPE, stderr=None if live else subprocess.STDOUT)
    output = (done.stdout or b"").decode("utf-8", "replace").rstrip()
    if not live:
        show(f"===== Python {version} =====\n{output}")
    return Outcome(version, done.returncode, time.monotonic() - started, output.split("\n")[-1].strip("= "))


_show_lock = threading.Lock()


def show(text: str) -> None:
    """Print in one piece, whatever the locale can encode."""
    with _show_lock:
        sys.stdout.buffer.write((text + "\n").encode("utf-8", "replace"))
        sys.stdout.buffer.flush()


def run_all(arguments: List[str], jobs: int, shares: int, *, others: bool) -> int:
    """Run the suite under every Python there is (`others`: but this one) and print a summary; returns the exit code."""
    from concurrent.futures import ThreadPoolExecutor
    pythons = find_pythons()
    if others:
        pythons.pop(sys.version_info[:2], None)
    if not pythons:
        show("pyenv has no Python 3.6 to 3.14")
        return 1
    ends = [min(pythons), max(pythons)]
    share = dict.fromkeys(ends, "0/1")  # first: these suites take longest
    share.update((version, f"{number % shares}/{shares}") for number, version in enumerate(sorted(set(pythons) - set(ends))))
    with ThreadPoolExecutor(jobs) as pool:
        runs = [pool.submit(run_suite, pythons[version], os.path.join(TOP, ".venvs", "%d.%d" % version), arguments, live=False,
                            share=share[version]) for version in share if version in VERSIONS]
        outcomes = {run.result().version: run.result() for run in runs}
    show("\n===== summary =====")
    for version in ("%d.%d" % numbers for numbers in VERSIONS):
        outcome = outcomes.get(version)
        if outcome:
            word = "FAILED" if outcome.exit_code else "passed"
            show(f"{version:<5} {word}  {outcome.seconds:6.1f} s  {outcome.summary}")
        else:
            own = others and version == "%d.%d" % sys.version_info[:2]
            show(f"{version:<5} {'left out: it runs this' if own else 'not installed'}")
    return int(any(outcome.exit_code for outcome in outcomes.values()))


def main() -> int:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description="Run the test suite.", allow_abbrev=False)
    parser.add_argument("--all", action="store_true", help="under every Python that pyenv has")
    parser.add_argument("--others", action="store_true", help="under every such Python but the one that runs this")
    parser.add_argument("--jobs", type=int, default=1, help="how many at a time, with --all")
    parser.add_argument("--shares", type=int, default=1, help="run one in so many cases, but under the oldest and the newest")
    parser.add_argument("arguments", nargs="*", help="handed to pytest, after --")
    options = parser.parse_args()
    arguments = shlex.split(os.environ.get("PYTEST_ARGUMENTS", "")) + options.arguments
    if options.all or options.others:
        return run_all(arguments, options.jobs, options.shares, others=options.others)
    outcome = run_suite(sys.executable, os.path.join(TOP, ".venv"), arguments, live=True)
    if outcome.summary:
        show(outcome.summary)
    return outcome.exit_code


if __name__ == "__main__":
    sys.exit(main())
