#!/usr/bin/python3
"""Measure deploy.py side by side with what an operator would type instead.

Usage: python3 tests/tools/bench.py [--scale 1] [--rounds 5] [--rows PATTERN] [--filesystems tmpfs,ext4]
                              [--directory DIR] [--cache DIR] [--json FILE] [--program FILE] [--list]

A full run takes an hour or more and some gigabytes of memory; --rows picks, --scale shrinks.

Makes its corpora once (in .cache/bench, out of real files of this machine), then
runs every row against its alternatives in turn, round by round, so that whatever
else the machine does meets all of them.  Each staging gets a fresh filesystem: a
tmpfs, or an ext4 in an image that was made a moment ago, because creating files
where tens of thousands were just deleted can slow any tool ten times.

    L1   sha256sum -c, tar -xf, sync -f, ln -s
    L2   L1, and sha256sum of every file into a manifest before the sync

Prints medians, ranges and ratios, each with its target and whether it is met.
Nothing here judges: the exit code says only whether everything ran.
"""

import argparse
import glob
import hashlib
import importlib.util
import itertools
import json
import os
import platform
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from contextlib import contextmanager
from typing import Any, Callable, Dict, Iterable, Iterator, List, NamedTuple, Optional, Set, Tuple

TOP = os.path.abspath(os.path.join(os.path.dirname(__file__), "..", ".."))
# Part of the archives' names, so that what an older recipe made is not taken for what this one makes.
RECIPE = 2
MEMORY = "/dev/shm"
MIB = 1 << 20
FIXED_MTIME = 1767225600
START = "import argparse, configparser, json, logging"
# No option of deploy.py may come from whoever runs the measurement.
ENVIRONMENT = dict({name: value for name, value in os.environ.items() if not name.startswith("DEPLOY_")}, LC_ALL="C.UTF-8")


class LeftOut(Exception):
    """A row cannot be measured here; says why."""


def require(*programs: str) -> None:
    """Leave the row out unless all of these programs are there."""
    for program in programs:
        if not find_program(program):
            raise LeftOut(f"{program} is not installed")


def find_program(name: str) -> Optional[str]:
    """The path of a program, be it one for administrators."""
    return shutil.which(name, path=os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin")


# -- corpora: members out of real files --------------------------------------

class Member(NamedTuple):
    """A file (its content), or a symlink (its target) where the content is None."""

    name: str
    content: Optional[bytes]
    target: str = ""


Files = Iterator[Tuple[str, bytes]]


class Corpus(NamedTuple):
    """What is packed: its members at a scale, and how much it holds at scale 1."""

    name: str
    members: Callable[[float], Iterator[Member]]
    files: float
    total_bytes: float
    gzip_level: int = 6


def versions(pattern: str) -> List[str]:
    """What lies in every Python that pyenv has, and in the one that runs this."""
    pyenv = os.environ.get("PYENV_ROOT") or os.path.expanduser("~/.pyenv")
    found = sorted(glob.glob(os.path.join(pyenv, "versions", "*", pattern)))
    return found + [os.path.join(sys.base_prefix, pattern)]


def text_files() -> Files:
    """Real text of this machine: programs, their data and documentation."""
    wanted = re.compile(r".*\.(py|pyi|js|mjs|cjs|ts|json|md|rst|txt|html|css|c|h|cpp|hpp|sh|pl|pm|rb|xml|po|tcl|vim)\Z")
    roots = ["/usr/lib/node_modules", "/usr/local/lib/node_modules"] + versions("lib")
    for name, path in walk(roots + ["/usr/include", "/usr/lib/python3", "/usr/share"]):
        if wanted.match(name):
            content = read_file(path, 512 * 1024)
            if content:
                yield name, content


def binary_files() -> Files:
    """Real programs and libraries of this machine."""
    roots = sorted(glob.glob("/usr/lib/*-linux-gnu*")) + ["/usr/bin", "/usr/sbin"] + versions("lib") + versions("bin")
    for name, path in walk(roots):
        content = read_file(path, 64 * MIB) if ".so" in name or "." not in name or name.endswith(".a") else b""
        if content[:4] == b"\x7fELF" or content[:7] == b"!<arch>":
            yield name, content


def walk(roots: Iterable[str]) -> Iterator[Tuple[str, str]]:
    """Every file below the roots, always in the same order: its name for an archive, and its path."""
    plain, seen = re.compile(r"[A-Za-z0-9._+@/-]{1,200}\Z"), set()  # type: Any, Set[str]
    for root in roots:
        if os.path.realpath(root) in seen:
            continue
        seen.add(os.path.realpath(root))
        for directory, below, names in os.walk(root):
            below[:] = sorted(name for name in below if name != "__pycache__")
            for path in (os.path.join(directory, name) for name in sorted(names)):
                if plain.match(path):
                    yield path.lstrip("/"), path


def read_file(path: str, most_bytes: int) -> bytes:
    """A regular file's content; nothing when it is none, is larger or cannot be read."""
    try:
        if os.path.islink(path) or not 0 < os.path.getsize(path) <= most_bytes or not os.path.isfile(path):
            return b""
        with open(path, "rb") as stream:
            return stream.read()
    except OSError:
        return b""


def endlessly(files: Callable[[], Files]) -> Files:
    """The files again and again: from the second time on each begins elsewhere, under another name."""
    for time_around in itertools.count():
        found = False
        for name, content in files():
            found, turn = True, time_around * 4099 % len(content)
            yield f"again{time_around}/{name}" if time_around else name, content[turn:] + content[:turn]
        if not found:
            raise SystemExit("this machine has no real files to make corpora of")


def make_tree(files: int, total_bytes: float, every: int = 0) -> Iterator[Member]:
    """Text files that keep to a mean size; with `every` a symlink beside each that many."""
    pool, written_bytes = endlessly(text_files), 0
    for number in range(files):
        name, content = next(pool)
        missing_bytes = total_bytes / files * (number + 1) - written_bytes
        if missing_bytes < 0:
            content = content[:2048]
        while len(content) < missing_bytes - 256 * 1024:
            content += next(pool)[1]
        written_bytes += len(content)
        yield Member(name, content)
        if every and number % every == 0:
            yield Member(name + ".link", None, os.path.basename(name))


def make_large(files: int, total_bytes: float) -> Iterator[Member]:
    """A few large files of programs and libraries; what is over when one is full begins the next."""
    pool, rest = endlessly(binary_files), b""
    for number in range(files):
        size_bytes = int(total_bytes / files)
        pieces, length = [rest], len(rest)
        while length < size_bytes:
            pieces.append(next(pool)[1])
            length += len(pieces[-1])
        joined = b"".join(pieces)
        rest = joined[size_bytes:]
        yield Member(f"bin/program-{number:03d}", joined[:size_bytes])


def make_short(files: int, file_bytes: int) -> Iterator[Member]:
    """So many short text files, in directories as an npm tree has them."""
    pool = endlessly(text_files)
    content = b""
    for number in range(files):
        while len(content) < file_bytes:
            content += next(pool)[1]
        yield Member(f"node_modules/package-{number // 100:04d}/dist/esm/module-{number:06d}.js", content[:file_bytes])
        content = content[file_bytes:]


def make_blocks(total_bytes: float) -> Iterator[Member]:
    """Much for little: one random block within gzip's window over and over, far above what max_ratio lets zeros do."""
    block = random.Random(1).getrandbits(8 * 16384).to_bytes(16384, "little")
    file_bytes = min(64 * MIB, max(16384, total_bytes / 4))
    for number in range(max(1, int(total_bytes / file_bytes))):
        yield Member(f"blocks/{number:03d}", block * int(file_bytes / 16384))


def change(members: Iterator[Member]) -> Iterator[Member]:
    """The same tree with 2% of its files changed."""
    for number, member in enumerate(members):
        yield member if number % 50 else member._replace(content=(member.content or b"") + b"\nchanged\n")


def at_least(least: int, number: float) -> int:
    """A number of things at a small scale, never so small that nothing is left to measure."""
    return max(least, int(round(number)))


GROWTH_FILES, GROWTH_MEGABYTES = (1000, 10000, 100000), (100, 1000, 4000)
GIB4 = 4096.0 * MIB


def small_tree(scale: float) -> Iterator[Member]:
    """30,936 files of 284 MB, as many as an npm tree that was measured."""
    return make_tree(at_least(12, 30936 * scale), 284e6 * scale)


def all_corpora() -> Dict[str, Corpus]:
    """Every corpus, by name."""
    corpora = [
        Corpus("tiny", lambda scale: make_short(1, 100), 1, 4096),
        Corpus("small", small_tree, 30936, 284e6),
        Corpus("small-next", lambda scale: change(small_tree(scale)), 30936, 284e6),
        Corpus("large", lambda scale: make_large(at_least(2, 20 * scale), 630e6 * scale), 20, 630e6),
        Corpus("source", lambda scale: make_tree(at_least(20, 80000 * scale), 1.3e9 * scale, 40), 82000, 1.3e9),
        Corpus("members", lambda scale: make_short(at_least(20, 200000 * scale), 40), 200000, 200000 * 4096, 1),
        Corpus("blocks", lambda scale: make_blocks(GIB4 * scale), 64, GIB4, 1),
    ]
    corpora += [growing_files(files) for files in GROWTH_FILES] + [growing_megabytes(size) for size in GROWTH_MEGABYTES]
    return {corpus.name: corpus for corpus in corpora}


def growing_files(files: int) -> Corpus:
    """So many files of 4 kB."""
    return Corpus(f"files-{files}", lambda scale: make_short(at_least(1, files * scale), 4000), files, 4096.0 * files, 1)


def growing_megabytes(size: int) -> Corpus:
    """So many megabytes, 25 to a file."""
    return Corpus(f"megabytes-{size}", lambda scale: make_large(size // 25, size * 1e6 * scale), size / 25, size * 1e6, 1)


CORPORA = all_corpora()


# -- artifacts: corpora packed, once -----------------------------------------

def compressor(suffix: str, gzip_level: int) -> List[str]:
    """What compresses a tar of this suffix; empty where nothing does."""
    return {".tar.gz": ["gzip", f"-{gzip_level}"], ".tar.xz": ["xz", "-T0", "-1"],
            ".tar.zst": ["zstd", "-q", "-T0", "-3"]}.get(suffix, [])


def with_directories(members: Iterator[Member]) -> Iterator[Member]:
    """Put every directory, as a member whose name ends in a slash, before what lies in it."""
    seen = set()  # type: Set[str]
    for member in members:
        parts = member.name.split("/")[:-1]
        for depth in range(1, len(parts) + 1):
            directory = "/".join(parts[:depth]) + "/"
            if directory not in seen:
                seen.add(directory)
                yield Member(directory, b"")
        yield member


def write_tar(members: Iterator[Member], sink: Any) -> None:
    """Write members as the tar program would; nothing is kept of what was written."""
    import io
    archive = tarfile.open(fileobj=sink, mode="w|", format=tarfile.GNU_FORMAT, bufsize=MIB)
    for member in members:
        info = tarfile.TarInfo(member.name.rstrip("/"))
        info.mtime, info.mode, info.size = FIXED_MTIME, 0o644, len(member.content or b"")
        if member.content is None:
            info.type, info.linkname, info.mode = tarfile.SYMTYPE, member.target, 0o777
        elif member.name.endswith("/"):
            info.type, info.mode = tarfile.DIRTYPE, 0o755
        archive.addfile(info, io.BytesIO(member.content or b""))
        archive.members = []  # type: ignore
    archive.close()


def write_zip(members: Iterator[Member], path: str) -> None:
    """Write files and directories as the zip program would."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for member in members:
            info = zipfile.ZipInfo(member.name, (2026, 1, 1, 0, 0, 0))
            info.create_system, info.compress_type = 3, zipfile.ZIP_DEFLATED
            info.external_attr = (0o40755 << 16 | 0x10) if member.name.endswith("/") else 0o100644 << 16
            archive.writestr(info, member.content or b"")


def write_compressed(members: Iterator[Member], path: str, argv: List[str]) -> None:
    """Write a tar through a compressor."""
    with open(path, "wb") as stream:
        process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=stream)
        with process.stdin:  # type: ignore
            write_tar(members, process.stdin)
        if process.wait():
            raise SystemExit(f"{' '.join(argv)} failed")


def make_artifact(corpus: Corpus, suffix: str, cache: str, scale: float) -> str:
    """Make a corpus's archive with its digest beside it, unless it is there already; returns its path."""
    path = os.path.join(cache, f"{corpus.name}-{RECIPE}.{scale:g}{suffix}")
    argv = compressor(suffix, corpus.gzip_level)
    require(*argv[:1])
    if os.path.exists(path + ".sha256"):
        return path
    say(f"(making {path})")
    os.makedirs(cache, exist_ok=True)
    members = with_directories(corpus.members(scale))
    if suffix == ".zip":
        write_zip(members, path + ".part")
    elif argv:
        write_compressed(members, path + ".part", argv)
    else:
        with open(path + ".part", "wb") as stream:
            write_tar(members, stream)
    os.rename(path + ".part", path)
    # The digest comes last: where it is, the archive is whole.
    line = f"{digest(path)}  {os.path.basename(path)}\n"
    with open(path + ".sha256.part", "w") as text:
        text.write(line)
    os.rename(path + ".sha256.part", path + ".sha256")
    # What was just written must not be written to disk while something is measured.
    os.sync()
    return path


def digest(path: str) -> str:
    """The SHA-256 of a file; reading it also brings it into memory, where every contender then finds it."""
    hasher = hashlib.sha256()
    with open(path, "rb") as stream:
        for block in iter(lambda: stream.read(MIB), b""):
            hasher.update(block)
    return hasher.hexdigest()


# -- places: a fresh filesystem for every run --------------------------------

class Filesystem(NamedTuple):
    """How a filesystem is made in an image, and mounted."""

    make: List[str]
    options: str
    least_bytes: int


FILESYSTEMS = {
    # Nothing that ext4 would write later by itself: it would do so while somebody is measured.
    "ext4": Filesystem(["mkfs.ext4", "-q", "-F", "-m", "0", "-E", "lazy_itable_init=1,lazy_journal_init=1,nodiscard"],
                       "loop,noinit_itable", 64 * MIB),
    "xfs": Filesystem(["mkfs.xfs", "-q", "-f", "-K", "-m", "reflink=1"], "loop", 512 * MIB),
    "btrfs": Filesystem(["mkfs.btrfs", "-q", "-f", "-K"], "loop", 512 * MIB),
}


def may_mount() -> bool:
    """Tell whether this user can have a mount namespace and mount into it."""
    argv = ["unshare", "--mount", "mount", "-t", "tmpfs", "bench", tempfile.gettempdir()]
    try:
        return subprocess.call(argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) == 0
    except OSError:
        return False


def available_bytes(directory: str) -> int:
    """What may be written: at most the directory's free space, and at most the free memory that caches it."""
    found = os.statvfs(directory)
    with open("/proc/meminfo") as stream:
        memory = re.search(r"MemAvailable:\s+(\d+) kB", stream.read())
    free_bytes = found.f_bavail * found.f_frsize
    return min(free_bytes, int(memory.group(1)) * 1024) if memory else free_bytes


class Places:
    """Gives each run a fresh filesystem of the wanted kind, and takes it away again."""

    def __init__(self, directory: str, *, mounting: bool) -> None:
        self.directory, self._mounting = directory, mounting

    @contextmanager
    def fresh(self, kind: str, size_bytes: float) -> Iterator[str]:
        """A fresh empty filesystem with room for so many bytes; LeftOut where that cannot be."""
        home = MEMORY if kind == "tmpfs" and os.path.isdir(MEMORY) else self.directory
        if available_bytes(home) < size_bytes:
            raise LeftOut(f"{home} and the memory have no room for {size_bytes / MIB:,.0f} MiB")
        if kind == "tmpfs" and not self._mounting:
            if home != MEMORY:
                raise LeftOut(f"tmpfs cannot be mounted here, and there is no {MEMORY}")
            with tempfile.TemporaryDirectory(dir=home) as top:
                yield top
            return
        with tempfile.TemporaryDirectory(dir=self.directory) as top:
            place = os.path.join(top, "place")
            os.mkdir(place)
            self._mount(kind, os.path.join(top, "image"), place, int(size_bytes))
            try:
                yield place
            finally:
                if subprocess.call(["umount", place], stderr=subprocess.DEVNULL):
                    subprocess.call(["umount", "--lazy", place])

    def _mount(self, kind: str, image: str, place: str, size_bytes: int) -> None:
        if not self._mounting:
            raise LeftOut(f"{kind} cannot be mounted here")
        if kind == "tmpfs":
            self._try(["mount", "-t", kind, "-o", f"size={size_bytes},nr_inodes=0,mode=755", "bench", place])
            return
        filesystem = FILESYSTEMS[kind]
        require(filesystem.make[0])
        with open(image, "wb") as stream:
            stream.truncate(max(size_bytes, filesystem.least_bytes))
        self._try([str(find_program(filesystem.make[0]))] + filesystem.make[1:] + [image])
        self._try(["mount", "-t", kind, "-o", filesystem.options, image, place])

    def _try(self, argv: List[str]) -> None:
        done = subprocess.run(argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        if done.returncode:
            raise LeftOut(done.stderr.decode("utf-8", "replace").strip().replace("\n", "; ") or f"{argv[0]} failed")


# -- measuring ---------------------------------------------------------------

class Figure(NamedTuple):
    """What was measured of one contender.

    ratio: our median divided by this one's, where the two are compared.
    target: the most that the ratio should be, or the median where there is no ratio.
    note: why there are no values.
    """

    name: str
    unit: str
    values: List[float]
    ratio: Optional[float] = None
    target: Optional[float] = None
    note: str = ""

    @property
    def median(self) -> Optional[float]:
        """The median; None where there are no values."""
        return statistics.median(self.values) if self.values else None

    @property
    def met(self) -> Optional[bool]:
        """Whether the target is met; None where there is none."""
        compared = self.median if self.ratio is None else self.ratio
        return None if self.target is None or compared is None else abs(compared) <= self.target


class Contender(NamedTuple):
    """A command line for a fresh directory, and the most that ours may take of its time."""

    name: str
    argv: Callable[[str], List[str]]
    target: Optional[float] = None
    program: str = "sh"


def run_quietly(argv: List[str]) -> float:
    """Run a command to its end; returns its seconds, and stops the measurement where it fails."""
    started_seconds = time.perf_counter()
    done = subprocess.run(argv, cwd="/", env=ENVIRONMENT, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                          stderr=subprocess.PIPE)
    seconds = time.perf_counter() - started_seconds
    if done.returncode:
        fail(argv, done.stderr)
    return seconds


def fail(argv: List[str], stderr: bytes) -> None:
    """Stop: what a command that failed has taken means nothing."""
    raise SystemExit(f"{' '.join(argv)[:300]} failed:\n{stderr.decode('utf-8', 'replace')}")


def compare(contenders: List[Contender], rounds: int, place: Callable[[], Any]) -> List[Figure]:
    """Run contenders in turn, `rounds` times, each in a place of its own; ours is the first."""
    able = [contender for contender in contenders if find_program(contender.program)]
    seconds = {contender.name: [] for contender in able}  # type: Dict[str, List[float]]
    for number in range(rounds):
        # Whoever goes first in one round goes last in the next.
        start = number % len(able)
        for contender in able[start:] + able[:start]:
            with place() as top:
                seconds[contender.name].append(run_quietly(contender.argv(top)))
    ours = statistics.median(seconds[contenders[0].name])
    figures = []
    for contender in contenders:
        values = seconds.get(contender.name, [])
        note = "" if values else f"{contender.program} is not installed"
        ratio = ours / statistics.median(values) if values and contender is not contenders[0] else None
        figures.append(Figure(contender.name, "s", values, ratio, contender.target, note))
    return figures


@contextmanager
def nowhere() -> Iterator[str]:
    """The place of what needs no fresh one."""
    yield ""


def peak_memory(argv: List[str]) -> Tuple[float, Dict[str, float]]:
    """Run a command; returns the most memory, in MiB, of its process and, by name, of those below it.

    The kernel's high-water mark only rises, so looking often enough sees it;
    it belongs to what was exec'ed, unlike ru_maxrss, which remembers who forked.
    """
    with tempfile.TemporaryFile() as stderr:
        process = subprocess.Popen(argv, cwd="/", env=ENVIRONMENT, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                                   stderr=stderr)
        seen = {}  # type: Dict[int, Tuple[str, float]]
        while process.poll() is None:
            for pid in family(process.pid):
                seen[pid] = high_water(pid) or seen.get(pid, ("", 0.0))
            time.sleep(0.002)
        if process.returncode:
            stderr.seek(0)
            fail(argv, stderr.read())
    children = {}  # type: Dict[str, float]
    for pid, (name, mib) in seen.items():
        if pid != process.pid and mib:
            children[name] = max(mib, children.get(name, 0.0))
    return seen.get(process.pid, ("", 0.0))[1], children


def family(pid: int) -> List[int]:
    """A process and all below it."""
    pids = [pid]
    for path in glob.glob(f"/proc/{pid}/task/*/children"):
        try:
            with open(path) as stream:
                below = [int(number) for number in stream.read().split()]
        except OSError:
            continue  # it ended meanwhile
        pids += [found for child in below for found in family(child)]
    return pids


def high_water(pid: int) -> Optional[Tuple[str, float]]:
    """A process's name and the most memory it has had, in MiB; None when it is gone."""
    try:
        with open(f"/proc/{pid}/status") as stream:
            text = stream.read()
    except OSError:
        return None
    found = re.search(r"\AName:\s*(.*)\n(?:.*\n)*VmHWM:\s+(\d+) kB", text)
    return (found.group(1), int(found.group(2)) / 1024) if found else None


class Bench:
    """What the rows share: the options, the program, the artifacts and the places."""

    def __init__(self, options: Any, work: str, places: Places) -> None:
        self.options, self.work, self.places = options, work, places
        self.kinds = options.filesystems
        self.deploy = [sys.executable, options.program]
        self._module = None  # type: Any
        self._states = {}  # type: Dict[Tuple[int, int], str]

    @property
    def rounds(self) -> int:
        """How often a row is measured."""
        return int(self.options.rounds)

    @property
    def source(self) -> str:
        """The program as text, also where its bytecode is measured."""
        return os.path.join(TOP, "deploy.py") if self.options.program.endswith(".pyc") else self.options.program

    @property
    def many_rounds(self) -> int:
        """How often what takes milliseconds is measured: noise weighs more there."""
        return 4 * self.rounds - 3

    def artifact(self, corpus: str, suffix: str = ".tar.gz") -> str:
        """The path of an artifact, made if it must be, and in memory."""
        path = make_artifact(CORPORA[corpus], suffix, self.options.cache, self.options.scale)
        digest(path)
        return path

    def room(self, corpus: str) -> float:
        """How large a filesystem must be to hold a corpus, with what deploy.py wants to stay free (256M)."""
        found, scale = CORPORA[corpus], self.options.scale
        return float((found.total_bytes * 1.1 + found.files * 4096) * scale + 512 * MIB)

    def stage(self, root: str, artifact: str, *more: str) -> List[str]:
        """The command line that stages an artifact."""
        return self.deploy + ["-q", "--root", root] + list(more) + ["stage", artifact]

    def module(self) -> Any:
        """deploy.py, imported."""
        if self._module is None:
            spec = importlib.util.spec_from_file_location("deploy", self.options.program)
            self._module = importlib.util.module_from_spec(spec)  # type: ignore
            sys.modules["deploy"] = self._module
            spec.loader.exec_module(self._module)  # type: ignore
        return self._module

    def store(self, root: str) -> Any:
        """A root, opened with deploy.py's own code."""
        return self.module().Store(root, self.module().load_settings([], {}, []))

    def state(self, lines: int, releases: int) -> str:
        """A root with so many lines of history and so many releases, made once."""
        if (lines, releases) not in self._states:
            root = os.path.join(self.work, f"state-{lines}-{releases}")
            run_quietly(self.deploy + ["-q", "--root", root, "deploy", self.artifact("tiny")])
            store = self.store(root)
            multiply_releases(store, releases)
            multiply_history(self.module(), store, lines)
            store.close()
            run_quietly(self.deploy + ["--root", root, "history", "--verify"])
            self._states[lines, releases] = root
        return self._states[lines, releases]


def multiply_releases(store: Any, releases: int) -> None:
    """Give a root with one live release so many: retired copies of it, older than it."""
    record, = store.records()[0].values()
    previous = None  # type: Optional[str]
    for number in range(1, releases):
        name = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(FIXED_MTIME + number)) + f"-1.0.{number}"
        old = record._replace(id=name, sequence=number, state="retired", previous=previous, deactivated_at=record.created_at)
        shutil.copytree(f"{store.path}/releases/{record.id}", f"{store.path}/releases/{name}", symlinks=True)
        for path in glob.glob(f"{store.path}/.deploy/*/{record.id}"):
            shutil.copy2(path, os.path.join(os.path.dirname(path), name))
        store.save(old)
        previous = name
    way_back = dict(record.rollback, release=previous)
    store.save(record._replace(sequence=releases, previous=previous, rollback=way_back))


def multiply_history(module: Any, store: Any, lines: int) -> None:
    """Lengthen a root's history to so many lines, chained as deploy.py chains them."""
    entry, before = store.history()[-1], b""
    with open(f"{store.path}/.deploy/history.jsonl", "wb") as stream:
        for sequence in range(1, lines):
            chained = hashlib.sha256(before).hexdigest() if before else ""
            line = entry._replace(sequence=sequence, previous_sha256=chained)
            before = json.dumps(module.seal(module.encode(line))).encode("ascii")
            stream.write(before + b"\n")
    # The last one by deploy.py itself, which goes on from there.
    store.append_history(entry)


# -- rows --------------------------------------------------------------------

class Row(NamedTuple):
    """A name, and what gives its figures."""

    name: str
    measure: Callable[[Bench], List[Figure]]


LEVEL = ('cd "$1" && sha256sum -c --quiet "$2.sha256" && mkdir "$0/release" && {unpack} && {manifest}'
         'sync -f "$0/release" && ln -sfn release "$0/current"')
MANIFEST = 'cd "$0/release" && find . -type f -print0 | xargs -0 sha256sum > ../manifest && '


def typed(artifact: str, manifest: str) -> Callable[[str], List[str]]:
    """What an operator would type: L1, or L2 with a manifest."""
    directory, name = os.path.split(artifact)
    unpack = 'unzip -q "$1/$2" -d "$0/release"' if name.endswith(".zip") else 'tar -xf "$1/$2" -C "$0/release"'
    script = LEVEL.format(unpack=unpack, manifest=manifest)
    return lambda top: ["sh", "-c", script, top, directory, name]


def stage_against_all(bench: Bench, corpus: str, kind: str) -> List[Figure]:
    """Stage a .tar.gz: whole process, checks, manifest and durability on."""
    artifact = bench.artifact(corpus)
    filtered = ", filter='data'" if hasattr(tarfile, "data_filter") else ""
    unpack = f"import shutil, sys; shutil.unpack_archive(sys.argv[1], sys.argv[2]{filtered})"
    contenders = [
        Contender("deploy.py stage", lambda top: bench.stage(top + "/app", artifact)),
        Contender("L1", typed(artifact, ""), 0.80),
        Contender("L2", typed(artifact, MANIFEST), 0.50),
        Contender("bsdtar -xf", lambda top: ["bsdtar", "-xf", artifact, "-C", top], 1.15, "bsdtar"),
        Contender("shutil.unpack_archive", lambda top: [sys.executable, "-c", unpack, artifact, top],
                  {"small": 0.40, "large": 0.80}.get(corpus)),
    ]
    return compare(contenders, bench.rounds, lambda: bench.places.fresh(kind, bench.room(corpus)))


def stage_against_l2(bench: Bench, corpus: str, suffix: str, kind: str) -> List[Figure]:
    """Stage another format against L2, where tar or unzip picks the decompressor."""
    if suffix == ".zip":
        require("unzip")
    artifact = bench.artifact(corpus, suffix)
    contenders = [Contender("deploy.py stage", lambda top: bench.stage(top + "/app", artifact)),
                  Contender("L2", typed(artifact, MANIFEST), 0.70)]
    return compare(contenders, bench.rounds, lambda: bench.places.fresh(kind, bench.room(corpus)))


def verify(bench: Bench, corpus: str) -> List[Figure]:
    """Hash a release again, against sha256sum over the same manifest."""
    artifact = bench.artifact(corpus)
    with bench.places.fresh(bench.kinds[0], bench.room(corpus)) as top:
        root = top + "/app"
        run_quietly(bench.deploy + ["-q", "--root", root, "deploy", artifact])
        release = os.path.realpath(root + "/current")
        check = 'cd "$0" && sha256sum -c --quiet "$1"'
        manifest = f"{root}/.deploy/manifests/{os.path.basename(release)}"
        contenders = [Contender("deploy.py verify", lambda _: bench.deploy + ["-q", "--root", root, "verify"]),
                      Contender("sha256sum -c --quiet", lambda _: ["sh", "-c", check, release, manifest], 0.60)]
        return compare(contenders, bench.rounds, nowhere)


def used_bytes(top: str) -> int:
    """What a filesystem holds once everything is written."""
    subprocess.check_call(["sync", "-f", top])
    found = os.statvfs(top)
    return (found.f_blocks - found.f_bfree) * found.f_frsize


def second_release(bench: Bench, sharing: str, kind: str) -> List[Figure]:
    """Stage a release of which 2% of the files changed after one that is live: the time and disk it takes."""
    argv = bench.deploy + ["--root", bench.work, "config"]
    if b"share_unchanged" not in subprocess.check_output(argv, cwd="/", env=ENVIRONMENT):
        raise LeftOut("this deploy.py has no [deploy] share_unchanged")
    first, second = bench.artifact("small"), bench.artifact("small-next")
    option, times, shares = ("--set", f"deploy.share_unchanged={sharing}"), ([], []), ([], [])  # type: Any, Any, Any
    for _ in range(bench.rounds):
        with bench.places.fresh(kind, 2 * bench.room("small")) as top:
            root, used = top + "/app", [used_bytes(top)]
            times[0].append(run_quietly(bench.stage(root, first, *option)))
            used.append(used_bytes(top))
            run_quietly(bench.deploy + ["-q", "--root", root, "activate", "latest"])
            between = used_bytes(top)
            times[1].append(run_quietly(bench.stage(root, second, *option)))
            used.append(used_bytes(top) - between)
            for place, taken in ((0, used[2]), (1, freed_by_unchanged(root, top))):
                shares[place].append(100.0 * taken / max(1, used[1] - used[0]))
    ratio = statistics.median(times[1]) / statistics.median(times[0])
    return [Figure("second stage", "s", times[1]), Figure("first stage", "s", times[0], ratio, 1.0),
            Figure("second's disk, of the first's", "%", shares[0]),
            Figure("of that the unchanged files'", "%", shares[1], None, 5.0)]


def freed_by_unchanged(root: str, top: str) -> int:
    """Delete the files that the newer of two releases has from the older; returns how many bytes that frees."""
    older, newer = sorted(os.listdir(root + "/releases"))
    lines = []
    for release in (older, newer):
        with open(f"{root}/.deploy/manifests/{release}", "rb") as stream:
            lines.append(set(stream))
    before = used_bytes(top)
    for line in lines[0] & lines[1]:
        os.unlink(os.path.join(os.fsencode(f"{root}/releases/{newer}"), line[66:-1]))
    return before - used_bytes(top)


def memory(bench: Bench, corpus: str, suffix: str) -> List[Figure]:
    """The most memory that staging takes: deploy.py's own process, and each program it starts."""
    artifact, own, others = bench.artifact(corpus, suffix), [], {}  # type: str, List[float], Dict[str, List[float]]
    for _ in range(min(2, bench.rounds)):
        with bench.places.fresh("tmpfs", bench.room(corpus)) as top:
            mib, children = peak_memory(bench.stage(top + "/app", artifact))
            own.append(mib)
            for name, child_mib in children.items():
                others.setdefault(name, []).append(child_mib)
    return [Figure("deploy.py stage", "MiB", own, None, 64.0)] + [
        Figure(f"its {name}", "MiB", values) for name, values in sorted(others.items())]


def interpreter(program: str = START) -> Callable[[str], List[str]]:
    """A Python that does only this."""
    return lambda _: [sys.executable, "-I", "-c", program]


def asking(bench: Bench, command: str) -> List[Figure]:
    """What is asked often: with a long history and many releases, and with few of either."""
    scale = bench.options.scale
    sizes = [(at_least(20, 10000 * scale), at_least(6, 200 * scale)), (10, 3)]
    names = [f"{lines:,} lines, {releases} releases" for lines, releases in sizes]
    roots = [bench.state(lines, releases) for lines, releases in sizes]
    contenders = [Contender(names[0], lambda _: bench.deploy + ["--root", roots[0], command]),
                  Contender(names[1], lambda _: bench.deploy + ["--root", roots[1], command]),
                  Contender("interpreter start", interpreter(), 1.5)]
    return compare(contenders, bench.many_rounds, nowhere)


def compiling(bench: Bench) -> List[Figure]:
    """How long Python takes to compile the program, which every run of it has to wait for."""
    source = bench.source
    program = f"compile(open({source!r}, 'rb').read(), 'deploy.py', 'exec')"
    contenders = [Contender("start and compile", interpreter(program)), Contender("empty interpreter", interpreter("pass"))]
    figures = compare(contenders, bench.many_rounds, nowhere)
    difference = [with_it - without for with_it, without in zip(figures[0].values, figures[1].values)]
    return figures + [Figure("compile only", "s", difference)]


def health_check(bench: Bench) -> List[Figure]:
    """Ask a server once, as a container's health check does: from source, and from bytecode made when the image was built."""
    import http.server
    import py_compile
    import threading

    class Well(http.server.BaseHTTPRequestHandler):
        """Answers every request with 200."""

        def do_GET(self) -> None:
            """Answer."""
            self.send_response(200)
            self.end_headers()

        def log_message(self, *words: Any) -> None:
            """Say nothing."""

    compiled = os.path.join(bench.work, "deploy.pyc")
    py_compile.compile(bench.source, compiled, doraise=True)
    server = http.server.HTTPServer(("127.0.0.1", 0), Well)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    argv = ["probe", "--url", f"http://127.0.0.1:{server.server_port}/"]
    try:
        return [Figure(name, "s", [run_quietly([sys.executable, program] + argv) for _ in range(bench.many_rounds)], None, 0.15)
                for name, program in (("from source", bench.source), ("from bytecode", compiled))]
    finally:
        server.shutdown()


def nothing_to_do(bench: Bench) -> List[Figure]:
    """Deploy what is live already."""
    artifact = bench.artifact("small")
    with bench.places.fresh(bench.kinds[0], bench.room("small")) as top:
        argv = bench.deploy + ["-q", "--root", top + "/app", "deploy", artifact]
        run_quietly(argv)
        return compare([Contender("deploy.py deploy", lambda _: argv), Contender("interpreter start", interpreter(), 2.0)],
                       bench.many_rounds, nowhere)


def switching(bench: Bench, kind: str) -> List[Figure]:
    """Only the switch: from the look at where current points to the new link being durable."""
    microseconds = []
    with bench.places.fresh(kind, 64 * MIB) as top:
        names = ["20260101T000000Z-1.0", "20260101T000001Z-1.1"]
        for name in names:
            os.makedirs(f"{top}/app/releases/{name}")
        store, before = bench.store(top + "/app"), None  # type: Any, Optional[str]
        for number in range(at_least(20, 1000 * bench.options.scale)):
            started_seconds = time.perf_counter()
            store.switch(before, names[number % 2])
            microseconds.append((time.perf_counter() - started_seconds) * 1e6)
            before = names[number % 2]
        store.close()
    return [Figure("Store.switch", "us", microseconds)]


def growth(bench: Bench, unit: str, sizes: Tuple[int, ...]) -> List[Figure]:
    """Stage ever more: what the largest takes over what the line through the smaller ones says."""
    artifacts = {size: bench.artifact(f"{unit}-{size}") for size in sizes}
    seconds = {size: [] for size in sizes}  # type: Dict[int, List[float]]
    for _ in range(bench.rounds):
        for size in sizes:
            with bench.places.fresh(bench.kinds[0], bench.room(f"{unit}-{size}")) as top:
                seconds[size].append(run_quietly(bench.stage(top + "/app", artifacts[size])))
    return growth_figures(unit, bench.options.scale, seconds)


def growth_figures(unit: str, scale: float, seconds: Dict[int, List[float]]) -> List[Figure]:
    """The times, the time of one unit after subtracting the fixed start-up, and how far the largest is from the line."""
    amounts = {size: at_least(1, size * scale) if unit == "files" else size * scale for size in seconds}
    low, middle, high = sorted(seconds)
    medians = {size: statistics.median(values) for size, values in seconds.items()}
    slope = (medians[middle] - medians[low]) / (amounts[middle] - amounts[low])
    fixed = medians[low] - slope * amounts[low]
    figures = [Figure(f"{amounts[size]:,g} {unit}", "s", values) for size, values in seconds.items()]
    one = {"files": "a file", "megabytes": "a megabyte"}[unit]
    figures += [Figure(f"{one}, of {amounts[size]:,g}", "us", [(value - fixed) / amounts[size] * 1e6 for value in values])
                for size, values in seconds.items() if size != low]
    line = fixed + slope * amounts[high]
    # Where noise lets the small ones fall there is no line to hold the largest to.
    away = [100.0 * (value / line - 1) for value in seconds[high]] if slope > 0 else []
    note = "" if away else "the smaller ones differ too little for a line"
    return figures + [Figure("fixed start-up", "s", [fixed]), Figure("largest, off the line", "%", away, None, 15.0, note)]


def all_rows(kinds: List[str]) -> List[Row]:
    """Every row there is, in the order in which they are measured."""
    rows = []  # type: List[Row]

    def add(name: str, measure: Callable[..., List[Figure]], *arguments: Any) -> None:
        rows.append(Row(name, lambda bench: measure(bench, *arguments)))

    for corpus in ("small", "large", "source"):
        for kind in kinds:
            add(f"stage {corpus}.tar.gz on {kind}", stage_against_all, corpus, kind)
    for corpus in ("small", "large"):
        for suffix in (".tar", ".tar.xz", ".tar.zst", ".zip"):
            for kind in kinds:
                add(f"stage {corpus}{suffix} on {kind}", stage_against_l2, corpus, suffix, kind)
        add(f"verify {corpus}", verify, corpus)
    for sharing, kind in [("reflink", "xfs"), ("reflink", "btrfs")] + [("hardlink", kind) for kind in kinds]:
        add(f"second release by {sharing} on {kind}", second_release, sharing, kind)
    for suffix in (".tar.gz", ".tar", ".tar.xz", ".tar.zst", ".zip"):
        add(f"memory of 200,000 members {suffix}", memory, "members", suffix)
    add("memory of 4 GiB .tar.gz", memory, "blocks", ".tar.gz")
    add("status", asking, "status")
    add("releases", asking, "releases")
    add("compile deploy.py", compiling)
    add("deploy what is live", nothing_to_do)
    add("health check", health_check)
    for kind in kinds:
        add(f"switch on {kind}", switching, kind)
    add("growth in files", growth, "files", GROWTH_FILES)
    add("growth in megabytes", growth, "megabytes", GROWTH_MEGABYTES)
    return rows


# -- the report --------------------------------------------------------------

def say(text: str) -> None:
    """Print at once: a full run takes long, and somebody watches it."""
    print(text)
    sys.stdout.flush()


def describe(figure: Figure) -> str:
    """One line of the table."""
    if figure.median is None:
        return f"    {figure.name:<30} left out: {figure.note}"
    digits = {"s": 3, "us": 1, "MiB": 1, "%": 1}[figure.unit]
    median, low, high = (f"{value:.{digits}f}" for value in (figure.median, min(figure.values), max(figure.values)))
    text = f"    {figure.name:<30} {median:>10} {figure.unit:<3} [{low} to {high}]"
    text = f"{text:<76}" + ("" if figure.ratio is None else f" {figure.ratio:6.2f} x")
    if figure.target is not None:
        text = f"{text:<86} target {figure.target:g}, {'met' if figure.met else 'not met'}"
    return text.rstrip()


def measure_row(bench: Bench, row: Row) -> Dict[str, Any]:
    """Measure and print a row; returns it for the JSON."""
    load, left_out, figures = os.getloadavg()[0], "", []  # type: float, str, List[Figure]
    try:
        figures = row.measure(bench)
    except LeftOut as reason:
        left_out = str(reason)
    loads = [round(load, 2), round(os.getloadavg()[0], 2)]
    say(f"{row.name}  (left out: {left_out})" if left_out else f"{row.name}  (load {loads[0]:.1f} to {loads[1]:.1f})")
    for figure in figures:
        say(describe(figure))
    return {"row": row.name, "load": loads, "left_out": left_out or None,
            "figures": [dict(figure._asdict(), median=figure.median, met=figure.met) for figure in figures]}


def summarize(results: List[Dict[str, Any]]) -> None:
    """Say how many targets were met, and which were not."""
    judged = [(result["row"], figure) for result in results for figure in result["figures"] if figure["met"] is not None]
    missed = [f"    {row}: {figure['name']} {figure['median'] if figure['ratio'] is None else figure['ratio']:.2f}"
              f", target {figure['target']:g}" for row, figure in judged if not figure["met"]]
    say(f"\n{len(judged) - len(missed)} of {len(judged)} targets met" + (", all but:" if missed else ""))
    for line in missed:
        say(line)


def measure_all(options: Any, rows: List[Row]) -> None:
    """Measure the rows, print them and write the JSON."""
    say(f"Python {platform.python_version()}, {platform.system()} {platform.release()}, {os.cpu_count()} cores, "
        f"load {os.getloadavg()[0]:.1f}, scale {options.scale:g}, {options.rounds} rounds\n"
        f"ratio: our median over theirs; images lie in {options.directory}"
        + ("" if options.scale == 1 else "; the targets are meant for scale 1"))
    report = {"python": sys.version, "system": platform.platform(), "cores": os.cpu_count(), "scale": options.scale,
              "rounds": options.rounds, "directory": options.directory, "program": options.program,
              "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}  # type: Dict[str, Any]
    with tempfile.TemporaryDirectory(dir=options.directory) as work:
        bench = Bench(options, work, Places(work, mounting=options.mounting))
        report["rows"] = [measure_row(bench, row) for row in rows]
    summarize(report["rows"])
    os.makedirs(os.path.dirname(os.path.abspath(options.json)), exist_ok=True)
    with open(options.json, "w") as stream:
        json.dump(report, stream, indent=2)
        stream.write("\n")


def filesystems(text: str) -> List[str]:
    """Read --filesystems."""
    kinds = [kind.strip() for kind in text.split(",") if kind.strip()]
    if not kinds or set(kinds) - {"tmpfs"} - set(FILESYSTEMS):
        raise argparse.ArgumentTypeError(f"expected some of tmpfs, {', '.join(FILESYSTEMS)}, between commas")
    return kinds


def parse(arguments: List[str]) -> Any:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument("--scale", type=float, default=1.0, help="share of each corpus that is used (default 1)")
    parser.add_argument("--rounds", type=int, default=5, help="how often each contender runs (default 5)")
    parser.add_argument("--rows", default="", metavar="PATTERN",
                        help="only rows in whose name this regular expression is found")
    parser.add_argument("--filesystems", type=filesystems, default=["tmpfs", "ext4"], metavar="LIST",
                        help="where to stage (default tmpfs,ext4)")
    parser.add_argument("--directory", default=MEMORY if os.path.isdir(MEMORY) else tempfile.gettempdir(), metavar="DIR",
                        help="where filesystem images are made (default %(default)s)")
    parser.add_argument("--cache", default=os.path.join(TOP, ".cache", "bench"), metavar="DIR",
                        help="where the corpora are kept (default %(default)s)")
    parser.add_argument("--json", default=os.path.join(TOP, ".cache", "bench.json"), metavar="FILE",
                        help="where the figures go (default %(default)s)")
    parser.add_argument("--program", default=os.path.join(TOP, "deploy.py"), metavar="FILE",
                        help="another deploy.py to measure, to compare two")
    parser.add_argument("--list", action="store_true", help="name the rows, measure nothing")
    parser.add_argument("--mounting", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.rounds < 1 or options.scale <= 0:
        parser.error("--rounds and --scale must be more than nothing")
    for name in ("directory", "cache", "json", "program"):
        setattr(options, name, os.path.abspath(getattr(options, name)))
    return options


def main() -> None:
    """Measure what was asked for, in a mount namespace of its own where that can be had."""
    sys.dont_write_bytecode = True
    options = parse(sys.argv[1:])
    rows = [row for row in all_rows(options.filesystems) if re.search(options.rows, row.name)]
    if options.list:
        say("\n".join(row.name for row in rows))
        return
    if not options.mounting and may_mount():
        # What is mounted in there goes with the last process, however this one ends.
        argv = ["unshare", "--mount", sys.executable, os.path.abspath(__file__), "--mounting"] + sys.argv[1:]
        os.execvp(argv[0], argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    measure_all(options, rows)


if __name__ == "__main__":
    main()
