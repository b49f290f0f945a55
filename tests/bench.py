#!/usr/bin/python3
"""Measure deploy.py side by side with what an operator would type instead.

Usage: python3 tests/bench.py [--scale 1.0] [--rounds 5] [--directory DIR] [--json FILE]

Makes its corpora once (in .cache/bench), then runs every row against its
alternatives in turn, round by round, so that whatever else the machine does
meets all of them. Prints medians and ratios; nothing here judges.

    L1   sha256sum -c, tar -xf, sync -f, ln -s
    L2   L1 and sha256sum of every file into a manifest
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Callable, Dict, List, NamedTuple

TESTS = os.path.dirname(os.path.abspath(__file__))
TOP = os.path.dirname(TESTS)
DEPLOY = [sys.executable, os.path.join(TOP, "deploy.py")]
INTERPRETER = [sys.executable, "-I", "-c", "import argparse, configparser, json, logging"]
WORDS = [hashlib.sha256(str(number).encode()).hexdigest()[:3 + number % 9] for number in range(2000)]


class Corpus(NamedTuple):
    """A tree to be packed: how many files, how large on average, how many symlinks."""

    name: str
    files: int
    mean_bytes: int
    symlinks: int


CORPORA = (
    Corpus("small", 30000, 9000, 0),
    Corpus("large", 20, 30000000, 0),
    Corpus("source", 80000, 17000, 2000),
)


class Row(NamedTuple):
    """One measurement: ours first, then the alternatives, each a function of a fresh directory."""

    name: str
    contenders: Dict[str, Callable[[str], List[str]]]


def write_tree(corpus: Corpus, top: str, scale: float) -> None:
    """Write a tree whose contents compress like source code; the same every time."""
    chance = random.Random(corpus.name)
    for number in range(max(2, int(corpus.files * scale))):
        directory = os.path.join(top, corpus.name, f"d{number // 1000}", f"e{number // 20 % 50}")
        os.makedirs(directory, exist_ok=True)
        # A corpus of few files shrinks by their size once it has only two.
        size_bytes = int(corpus.mean_bytes * chance.uniform(0.1, 1.9) * min(1.0, corpus.files * scale / 2))
        text = " ".join(chance.choice(WORDS) for _ in range(min(size_bytes, 200000) // 8 + 1)).encode()
        with open(os.path.join(directory, f"f{number}.js"), "wb") as stream:
            for _ in range(max(1, size_bytes // len(text))):
                stream.write(text)
    for number in range(int(corpus.symlinks * scale)):
        os.symlink("f0.js", os.path.join(top, corpus.name, "d0", "e0", f"l{number}.js"))


def make_artifact(corpus: Corpus, cache: str, scale: float) -> str:
    """Make a corpus's archive with its digest beside it, unless it is there already."""
    path = os.path.join(cache, f"{corpus.name}-{scale:g}.tar.gz")
    if not os.path.exists(path + ".sha256"):
        os.makedirs(cache, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as top:
            write_tree(corpus, top, scale)
            subprocess.check_call(["tar", "-czf", path, "-C", top, corpus.name])
        with open(path + ".sha256", "wb") as stream:
            stream.write(subprocess.check_output(["sha256sum", os.path.basename(path)], cwd=cache))
    return path


def staging_row(corpus: Corpus, artifact: str) -> Row:
    """Stage an archive: whole process, checks, manifest and durability on."""
    directory, name = os.path.split(artifact)
    level1 = f"cd {directory} && sha256sum --quiet -c {name}.sha256 && tar -xf {name} -C $0 && sync -f $0 && ln -sfn $0/x $0/current"
    level2 = level1 + " && cd $0 && find . -type f -print0 | xargs -0 sha256sum > manifest"
    unpack = "import shutil, sys; shutil.unpack_archive(sys.argv[1], sys.argv[2]" + \
        (", filter='data')" if sys.version_info >= (3, 12) else ")")
    contenders = {
        "deploy.py stage": lambda root: DEPLOY + ["-q", "--root", root, "stage", artifact],
        "L1": lambda root: ["sh", "-c", level1, root],
        "L2": lambda root: ["sh", "-c", level2, root],
        "shutil.unpack_archive": lambda root: [sys.executable, "-c", unpack, artifact, root],
    }  # type: Dict[str, Callable[[str], List[str]]]
    if shutil.which("bsdtar"):
        contenders["bsdtar -xf"] = lambda root: ["bsdtar", "-xf", artifact, "-C", root]
    return Row(f"stage {corpus.name}.tar.gz", contenders)


def standing_rows(corpus: Corpus, artifact: str, root: str) -> List[Row]:
    """What is asked of a release that is there: verify, status, and deploying it again."""
    run_quietly(DEPLOY + ["-q", "--root", root, "deploy", artifact])
    release = os.path.basename(os.readlink(os.path.join(root, "current")))
    manifest = os.path.join(root, ".deploy", "manifests", release)
    check = f"cd {root}/current && sha256sum -c --quiet {manifest}"
    start = lambda fresh: INTERPRETER  # noqa: E731
    return [
        Row(f"verify {corpus.name}", {"deploy.py verify": lambda fresh: DEPLOY + ["--root", root, "verify"],
                                      "sha256sum -c": lambda fresh: ["sh", "-c", check]}),
        Row("status", {"deploy.py status": lambda fresh: DEPLOY + ["--root", root, "status"], "python start": start}),
        Row("deploy what is live", {"deploy.py deploy": lambda fresh: DEPLOY + ["-q", "--root", root, "deploy", artifact],
                                    "python start": start}),
    ]


def run_quietly(argv: List[str]) -> float:
    """Run a command to its end; returns its seconds, and stops the measurement where it fails."""
    started_seconds = time.perf_counter()
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    seconds = time.perf_counter() - started_seconds
    if done.returncode:
        raise SystemExit(f"{' '.join(argv)[:200]} failed:\n{done.stderr.decode('utf-8', 'replace')}")
    return seconds


def measure(row: Row, rounds: int, directory: str) -> Dict[str, List[float]]:
    """Run a row's contenders in turn, each in a fresh directory, `rounds` times."""
    seconds = {name: [] for name in row.contenders}  # type: Dict[str, List[float]]
    for _ in range(rounds):
        for name, argv in row.contenders.items():
            with tempfile.TemporaryDirectory(dir=directory) as fresh:
                seconds[name].append(run_quietly(argv(fresh)))
    return seconds


def report(row: Row, seconds: Dict[str, List[float]]) -> Dict[str, object]:
    """Print a row's medians and ratios; returns them for the JSON."""
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    ours = next(iter(medians.values()))
    print(f"{row.name}  (load {os.getloadavg()[0]:.1f})")
    for name, median in medians.items():
        ratio = "" if median == ours else f"   ours is {ours / median:.2f} x"
        print(f"    {name:<24} {median:8.3f} s  [{min(seconds[name]):.3f} to {max(seconds[name]):.3f}]{ratio}")
    sys.stdout.flush()
    return {"row": row.name, "medians": medians, "ratios": {name: ours / median for name, median in medians.items()}}


def main() -> None:
    """Measure everything."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--scale", type=float, default=1.0, help="share of each corpus's files (default 1)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--directory", default="/dev/shm" if os.path.isdir("/dev/shm") else None, help="where to unpack")
    parser.add_argument("--cache", default=os.path.join(TOP, ".cache", "bench"), help="where the corpora are kept")
    parser.add_argument("--json", default=os.path.join(TOP, ".cache", "bench.json"), metavar="FILE")
    options = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory(dir=options.directory) as work:
        for number, corpus in enumerate(CORPORA):
            artifact = make_artifact(corpus, options.cache, options.scale)
            rows = [staging_row(corpus, artifact)]
            if number == 0:
                rows += standing_rows(corpus, artifact, os.path.join(work, "root"))
            results += [report(row, measure(row, options.rounds, work)) for row in rows]
    os.makedirs(os.path.dirname(options.json), exist_ok=True)
    with open(options.json, "w") as stream:
        json.dump({"python": sys.version, "scale": options.scale, "rounds": options.rounds, "rows": results}, stream, indent=2)


if __name__ == "__main__":
    main()
