#!/usr/bin/python3
"""deploy.py - take an artifact live on this host, and back.

One file, standard library only, Python 3.6 to 3.14.  It checks the host,
verifies and unpacks an artifact into a release of its own, points the symlink
`current` at it in one atomic rename, restarts services, asks the running
program whether it is well, rolls back by itself when it is not, and keeps a
JSON record of everything it did.

Words
    application  what is deployed; one root directory each
    artifact     the archive or directory handed over
    release      one unpacked artifact, immutable, under releases/
    current      the symlink that makes a release live
    previous     the release that was live before, the rollback target
    shared       files and directories that outlive releases
    stage        verify and unpack, not live
    activate     atomically point `current` at a release
    probe        a question put to the running service
    hook         an operator's command at a named point
    step         one action with a description, an apply and an undo
    plan         the ordered steps, computed before anything changes
    manifest     the SHA-256 of every file of a release
    record       the JSON rollback metadata of one release
    journal      the durable note of what is under way, for recovery
    history      the append-only log of deployments
    bad          a release (and its artifact digest) that failed and must not
                 be tried again unasked

On disk
    ROOT/current -> releases/ID     relative symlink, replaced by rename
    ROOT/releases/ID/               exactly the artifact, plus shared links and
                                    rendered templates
    ROOT/shared/                    linked into every release
    ROOT/.deploy/lock               flock; never unlinked
    ROOT/.deploy/journal.json       only while something is under way
    ROOT/.deploy/history.jsonl      hash-chained, one JSON object a line
    ROOT/.deploy/releases/ID.json   the record
    ROOT/.deploy/manifests/ID       `sha256sum -c` reads it inside the release
    ROOT/.deploy/staging, cache, trash   swept by recovery

A release's states
    staged --activate--> active --another goes live--> retired --prune--> gone
       |                   |  ^                           |
       |                   |  +---------rollback----------+
       |                   +--failure after activation--> bad --prune--> gone
       +--prune--> gone

A deployment's phases, as the journal names them
    staging --> intent --> switched --> (journal removed: the verdict is in)
       |          |           |
     undone     undone   rolling_back --> (journal removed)

Exit codes
    0 done or nothing to do         6 failed, and so did the rollback
    1 failed before activation      7 a read-only command found a problem
    2 usage or configuration        10 changed (with --detailed-exitcode)
    3 preflight failed              70 internal error
    4 artifact refused              75 another run holds the lock
    5 failed and rolled back        130, 143 interrupted, undone

Sections, each using only what stands above it
     1 Constants and exit codes      9 Hooks, services, probes, templates
     2 Errors                       10 Preflight
     3 Console                      11 Steps
     4 System                       12 Planner
     5 Options                      13 Executor
     6 Model                        14 Commands
     7 State                        15 Command line and main
     8 Artifact

To follow a deployment, read sections 14, 12, 13 and 11 in that order: observe,
plan, execute, and what each step does.
"""

import sys

# Nothing that lies beside this file, in PYTHONPATH or in a home directory may
# take a standard module's place: a json.py in the working directory of root is
# code that runs as root.  `-I` would do it, but a shebang cannot carry flags
# everywhere, so the search path is cut down to the standard library's own.
if __name__ == "__main__" and not sys.flags.isolated:
    _here = __file__.rpartition("/")[0] or "."
    sys.path[:] = [
        entry for entry in sys.path[1:]
        if entry.startswith((sys.base_prefix + "/lib", sys.base_exec_prefix + "/lib"))
        and entry != _here and "-packages" not in entry]

import errno
import fcntl
import hashlib
import json
import os
import re
import signal
import stat
import time
from collections import deque
from contextlib import contextmanager
from types import SimpleNamespace
from typing import (Any, Callable, Dict, Iterable, Iterator, List, NamedTuple,
                    Optional, Sequence, Set, Tuple, Type, Union)

# Dated shims, 2026: 3.6 has no os.scandir(fd), no subprocess text= and no
# dataclasses; what follows does without them rather than wrapping them.


# ============================================================================
# 1  Constants and exit codes
#    Names for every number and word that is a promise.  Uses nothing.
# ============================================================================

VERSION = "1.0.0"
SCHEMA = 1

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_PREFLIGHT = 3
EXIT_ARTIFACT = 4
EXIT_ROLLED_BACK = 5
EXIT_ROLLBACK_FAILED = 6
EXIT_PROBLEM = 7
EXIT_CHANGED = 10
EXIT_INTERNAL = 70
EXIT_BUSY = 75

EXIT_CODES = (
    (EXIT_OK, "done, or nothing to do"),
    (EXIT_FAILED, "failed before activation (a hook, a step, the disk); `current` is as before"),
    (EXIT_USAGE, "usage or configuration; nothing was changed"),
    (EXIT_PREFLIGHT, "preflight failed; nothing was changed"),
    (EXIT_ARTIFACT, "artifact refused: missing, checksum, unsafe or damaged archive, known bad"),
    (EXIT_ROLLED_BACK, "failed after activation and rolled back; the previous release is live again"),
    (EXIT_ROLLBACK_FAILED, "failed, and the rollback failed too: a person is needed, the message says what to do"),
    (EXIT_PROBLEM, "a read-only command found a problem (probe, verify, status, history --verify)"),
    (EXIT_CHANGED, "only with --detailed-exitcode: something changed"),
    (EXIT_INTERNAL, "an internal error; a traceback is shown"),
    (EXIT_BUSY, "another run holds the lock"),
    (130, "interrupted by SIGINT before activation; everything undone (143: SIGTERM, 129: SIGHUP)"),
)

STATE_STAGED, STATE_ACTIVE, STATE_RETIRED, STATE_BAD = "staged", "active", "retired", "bad"
STATES = (STATE_STAGED, STATE_ACTIVE, STATE_RETIRED, STATE_BAD)

PHASE_STAGING, PHASE_INTENT = "staging", "intent"
PHASE_SWITCHED, PHASE_ROLLING_BACK = "switched", "rolling_back"
PHASES = (PHASE_STAGING, PHASE_INTENT, PHASE_SWITCHED, PHASE_ROLLING_BACK)

HOOK_NAMES = ("pre_stage", "post_stage", "pre_activate", "post_activate",
              "post_deploy", "on_failure", "pre_rollback", "post_rollback")

EXTRA_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
MAX_STATE_BYTES = 16 << 20
MAX_CONFIG_BYTES = 1 << 20
MAX_RECOVERIES = 2
OUTPUT_TAIL_LINES = 40
OUTPUT_LINE_CHARACTERS = 4096


# ============================================================================
# 2  Errors
#    One hierarchy; the class says the exit code.  Caught in one place, main().
# ============================================================================

class DeployError(Exception):
    """A failure that a person can act on: what failed, why, and what to do next."""

    exit_code = EXIT_FAILED

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class StepFailed(DeployError):
    """A step failed before activation; the steps before it are undone."""

    def __init__(self, message: str, hint: str = "", evidence: Optional[Dict[str, Any]] = None) -> None:
        super().__init__(message, hint)
        self.evidence = evidence or {}


class UsageError(DeployError):
    """The command line or the configuration is wrong."""

    exit_code = EXIT_USAGE


class PreflightFailed(DeployError):
    """The host is not fit for what was asked; nothing was changed."""

    exit_code = EXIT_PREFLIGHT


class StateError(PreflightFailed):
    """What is on disk under the root is not what this program left there."""


class ArtifactRefused(DeployError):
    """The artifact is missing, unverified, damaged, unsafe or known to be bad."""

    exit_code = EXIT_ARTIFACT


class RolledBack(DeployError):
    """It failed after activation; the previous release is live again."""

    exit_code = EXIT_ROLLED_BACK


class RollbackFailed(DeployError):
    """It failed, and going back failed too."""

    exit_code = EXIT_ROLLBACK_FAILED


class ProblemFound(DeployError):
    """A read-only command found what it was asked to look for."""

    exit_code = EXIT_PROBLEM


class Busy(DeployError):
    """Another run holds the lock."""

    exit_code = EXIT_BUSY


class Interrupted(DeployError):
    """SIGINT, SIGTERM or SIGHUP asked the run to stop."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"interrupted by {signal.Signals(signal_number).name}")
        self.exit_code = 128 + signal_number


# ============================================================================
# 3  Console
#    The only writer to stdout, stderr and the log.  Everything foreign is
#    escaped and every secret is masked here, once, on the way out.
# ============================================================================

# C0 and C1 controls, line and paragraph separators, bidirectional overrides:
# what can move a cursor, forge a log line or hide text.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")
_URL_PRIVATE = re.compile(r"([a-z][a-z0-9+.-]*://)([^/\s@]*@)?([^\s?#'\"]*)(\?[^\s#'\"]*)?", re.IGNORECASE)
_AUTHORIZATION = re.compile(r"(?i)\b(authorization|proxy-authorization|cookie|set-cookie)(\s*[:=]\s*)\S[^\r\n]*")
_SECRET_NAME = re.compile(r"(?i)(passw|secret|token|credential|private|api_?key|access_?key|auth|cookie|_key$|^key$|dsn)")
_SECRET_ASSIGNMENT = re.compile(
    r"(?i)\b([\w.-]*(?:password|passwd|secret|token|api_?key|access_?key|credential)[\w.-]*[\"']?\s*[=:]\s*[\"']?)([^\s\"',;&]+)")
MASK = "[masked]"


def escape(text: str) -> str:
    """Make control characters and terminal escapes visible instead of effective."""
    return _UNPRINTABLE.sub(lambda match: _escape_character(match.group()), text)


def _escape_character(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"


def looks_secret(name: str) -> bool:
    """Tell whether a key's name says that its value is private."""
    return bool(_SECRET_NAME.search(name))


class Secrets:
    """The values that must never be shown; `mask` takes them out of any text."""

    def __init__(self) -> None:
        self._values = []  # type: List[str]

    def add(self, value: str) -> None:
        """Remember a private value; lines of a longer one are private as well."""
        for part in {value.strip(), *value.split("\n")}:
            part = part.strip()
            # Shorter values ("1", "yes") would blot out half of every sentence.
            if len(part) >= 4 and part not in self._values:
                self._values.append(part)
        self._values.sort(key=len, reverse=True)

    def mask(self, text: str) -> str:
        """Return the text with known secrets, URL userinfo and queries, and Authorization masked."""
        for value in self._values:
            if value in text:
                text = text.replace(value, MASK)
        if "://" in text:
            text = _URL_PRIVATE.sub(self._mask_url, text)
        text = _AUTHORIZATION.sub(lambda found: found.group(1) + found.group(2) + MASK, text)
        return _SECRET_ASSIGNMENT.sub(lambda found: found.group(1) + MASK, text)

    @staticmethod
    def _mask_url(found: Any) -> str:
        userinfo = MASK + "@" if found.group(2) else ""
        query = "?" + MASK if found.group(4) else ""
        return found.group(1) + userinfo + found.group(3) + query

    def mask_json(self, value: Any) -> Any:
        """Mask every string inside a JSON-like value, and what stands under a secret-looking key."""
        if isinstance(value, str):
            return self.mask(value)
        if isinstance(value, dict):
            return {self.mask(str(key)): self.mask_json(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.mask_json(item) for item in value]
        return value


def format_size(size_bytes: float) -> str:
    """Write a byte count for people: 999 B, 1.4 MB (powers of 1000, as disks are sold)."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(size_bytes) < 999.5:
            return f"{size_bytes:.0f} {unit}" if unit == "B" else f"{size_bytes:.1f} {unit}"
        size_bytes /= 1000
    return f"{size_bytes:.1f} TB"


def format_seconds(seconds: float) -> str:
    """Write a duration for people: 0.042s, 3.1s, 2m05s."""
    if seconds < 10:
        return f"{seconds:.2f}s" if seconds >= 0.1 else f"{seconds:.3f}s"
    if seconds < 60:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(int(seconds + 0.5), 60)
    return f"{minutes}m{rest:02d}s" if minutes < 60 else f"{minutes // 60}h{minutes % 60:02d}m"


def format_time(seconds_since_epoch: float) -> str:
    """Write a time as RFC 3339 in UTC, to the second."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds_since_epoch))


def count(number: int, noun: str, plural: str = "") -> str:
    """Write `1 file`, `30,936 files`."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


class Progress:
    """One line that is redrawn while work lasts over a second; nothing off a terminal."""

    def __init__(self, console: "Console", label: str, total: int = 0) -> None:
        self._console, self._label, self._total = console, label, total
        self._next_draw_seconds = time.monotonic() + 1.0 if console.shows_progress else float("inf")
        self._drawn = False

    def update(self, done: int, detail: str = "") -> None:
        """Say how much of the total is done; draws at most ten times a second."""
        now_seconds = time.monotonic()
        if now_seconds < self._next_draw_seconds:
            return
        self._next_draw_seconds, self._drawn = now_seconds + 0.1, True
        self._console.draw(f"  {self._label:<12} {self._bar(done)}{detail}")

    def _bar(self, done: int) -> str:
        if not self._total:
            return ""
        share = min(1.0, done / self._total)
        full, empty = ("█", "░") if self._console.unicode else ("#", ".")
        width = round(share * 24)
        return f"{full * width}{empty * (24 - width)} {share:4.0%}  "

    def close(self) -> None:
        """Take the line off the terminal again."""
        if self._drawn:
            self._console.draw("")
            self._drawn = False


class Console:
    """The result on stdout, everything else on stderr, and the log beside them."""

    COLOURS = {"ok": "32", "done": "32", "fail": "31", "failed": "31", "warn": "33", "undone": "33",
               "error": "31;1", "head": "1", "dim": "2"}

    def __init__(self) -> None:
        self.secrets = Secrets()
        self.json_mode = self.quiet = self.verbose = False
        self.colour = self.unicode = self.shows_progress = False
        self.log_context = {}  # type: Dict[str, str]
        self._logger = None  # type: Any
        self._held = []  # type: List[str]
        self._broken = set()  # type: Set[int]

    def configure(self, *, json_mode: bool, quiet: bool, verbose: bool, color: bool) -> None:
        """Choose what is shown, from the command line and from what the terminal can do."""
        self.json_mode, self.quiet, self.verbose = json_mode, quiet, verbose
        terminal = bool(sys.stderr) and sys.stderr.isatty()
        self.unicode = "utf" in (getattr(sys.stderr, "encoding", "") or "").lower() and terminal
        self.colour = terminal and color
        self.shows_progress = terminal and not quiet

    def paint(self, kind: str, text: str) -> str:
        """Colour a piece of text where colour is wanted."""
        return f"\033[{self.COLOURS[kind]}m{text}\033[0m" if self.colour and kind in self.COLOURS else text

    # -- writing -------------------------------------------------------------

    def say(self, text: str = "", *, level: str = "info") -> None:
        """A line for the person watching, on stderr and in the log; held back while quiet."""
        self._log(level, text)
        self._stderr(self.clean(text))

    def painted(self, status: str, text: str) -> None:
        """A line that opens with a coloured status word in a column of its own."""
        self._log("error" if status.startswith("fail") else "warning" if status == "warn" else "info",
                  f"{status}: {text}")
        self._stderr(f"  {self.paint(status, f'{status:<7}')} {self.clean(text)}")

    def debug(self, text: str) -> None:
        """A line that only -v and the log show."""
        self._log("debug", text)
        if self.verbose:
            self._stderr(self.paint("dim", "  " + self.clean(text)))

    def output(self, text: str) -> None:
        """One line that a hook or a service command wrote."""
        self._log("info", text)
        self._stderr(self.paint("dim", "    | ") + self.clean(text))

    def result(self, text: str) -> None:
        """A line of the result, on stdout; --json replaces it by its one object."""
        if not self.json_mode and not self.quiet:
            self._write(sys.stdout, "\n".join(self.clean(line) for line in text.split("\n")) + "\n")

    def raw_result(self, text: str) -> None:
        """Text that is the result as it stands (generated files); not escaped, own words only."""
        if not self.json_mode:
            self._write(sys.stdout, text)

    def json_result(self, value: Dict[str, Any]) -> None:
        """The one object of --json; ASCII, so that any reader and any locale takes it."""
        self._write(sys.stdout, json.dumps(self.secrets.mask_json(value), ensure_ascii=True) + "\n")

    def error(self, message: str, hint: str = "") -> None:
        """The two lines of an error; never held back."""
        self._log("error", message + (f" (hint: {hint})" if hint else ""))
        self.release_held()
        self._write(sys.stderr, f"deploy.py: {self.paint('error', 'error:')} {self.clean(message)}\n")
        if hint:
            self._write(sys.stderr, f"hint: {self.clean(hint)}\n")

    def traceback(self) -> None:
        """Show the exception being handled with its traceback, for --debug and internal errors."""
        import traceback
        for line in traceback.format_exc().rstrip().split("\n"):
            self._write(sys.stderr, self.clean(line) + "\n")

    def draw(self, text: str) -> None:
        """Redraw the one progress line."""
        if self.shows_progress:
            try:
                columns = os.get_terminal_size(sys.stderr.fileno()).columns
            except OSError:
                columns = 80
            self._write(sys.stderr, "\r\033[K" + self.clean(text)[:max(20, columns - 1)])

    def progress(self, label: str, total: int = 0) -> Progress:
        """Start a progress line; `total` in the unit of the later updates, 0 when unknown."""
        return Progress(self, label, total)

    def clean(self, text: str) -> str:
        """Mask secrets, then escape what could act on a terminal."""
        return escape(self.secrets.mask(text))

    def release_held(self) -> None:
        """Write what --quiet held back: there was a change or a failure after all."""
        held, self._held = self._held, []
        for line in held:
            self._write(sys.stderr, line)

    def _stderr(self, line: str) -> None:
        if self.quiet:
            self._held.append(line + "\n")
        else:
            self._write(sys.stderr, line + "\n")

    def _write(self, stream: Any, text: str) -> None:
        """Write bytes that the stream's encoding can hold; a closed pipe never changes the outcome."""
        if stream is None or id(stream) in self._broken:
            return
        try:
            stream.flush()
            data = text.encode(stream.encoding or "ascii", "backslashreplace")
            target = getattr(stream, "buffer", None)
            if target is None:
                stream.write(data.decode(stream.encoding or "ascii"))
            else:
                target.write(data)
            stream.flush()
        except (OSError, ValueError):
            self._broken.add(id(stream))

    # -- the log -------------------------------------------------------------

    def open_log(self, path: str, log_format: str) -> None:
        """Append to a log file, as text with timestamps or as one JSON object a line.

        Raises UsageError when the file cannot be opened.
        """
        import logging
        import logging.handlers
        try:
            # WatchedFileHandler: logrotate may move the file under a long run.
            handler = logging.handlers.WatchedFileHandler(path, encoding="utf-8", errors="backslashreplace") \
                if sys.version_info >= (3, 9) else logging.handlers.WatchedFileHandler(path, encoding="utf-8")
        except OSError as error:
            raise UsageError(f"cannot open the log file {path}: {error.strerror}",
                             "choose a file that this user can write: --log-file FILE")
        text_format = logging.Formatter("%(asctime)sZ %(levelname)s %(context)s%(message)s", "%Y-%m-%dT%H:%M:%S")
        text_format.converter = time.gmtime
        handler.setFormatter(text_format if log_format == "text" else logging.Formatter("%(message)s"))
        self._log_as_json = log_format == "json"
        self._logger = logging.Logger("deploy", logging.DEBUG)
        self._logger.addHandler(handler)
        logging.raiseExceptions = False

    def _log(self, level: str, message: str) -> None:
        if self._logger is None:
            return
        import logging
        number = getattr(logging, level.upper())
        message = self.clean(message).encode("utf-8", "backslashreplace").decode("utf-8")
        if self._log_as_json:
            entry = {"time": format_time(time.time()), "level": level, "message": message}
            entry.update(self.log_context)
            self._logger.log(number, "%s", json.dumps(entry))
        else:
            context = " ".join(f"{key}={value}" for key, value in self.log_context.items())
            self._logger.log(number, "%s", message, extra={"context": f"[{context}] " if context else ""})


def render_table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Lay out rows in columns as wide as their widest cell; the last column is ragged."""
    table = [list(headers)] + [[escape(str(cell)) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in table) for column in range(len(headers))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in table]
    return "\n".join(lines)


def render_timeline(timings: Sequence[Tuple[str, float]], *, unicode: bool) -> List[str]:
    """Draw when each step ran within the whole, one line a step."""
    total_seconds = sum(seconds for _, seconds in timings) or 1.0
    widest = max([len(name) for name, _ in timings] or [0])
    start_seconds, lines = 0.0, []
    for name, seconds in timings:
        left = int(start_seconds / total_seconds * 30)
        width = max(1, round(seconds / total_seconds * 30))
        bar = (" " * min(left, 29) + ("█" if unicode else "#") * width)[:30]
        lines.append(f"  {name:<{widest}}  {bar:<30}  {format_seconds(seconds):>7}")
        start_seconds += seconds
    return lines


# ============================================================================
# 4  System
#    Files through directory descriptors, commands, environment, signals,
#    identity.  The only section that knows subprocess and os.environ.
# ============================================================================

_DIRECTORY_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_READ_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_CREATE_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


def environment(name: str, default: str = "") -> str:
    """Read one variable of this process's environment."""
    return os.environ.get(name, default)


def environment_names() -> List[str]:
    """List the names of this process's environment variables."""
    return list(os.environ)


def native(text: str) -> str:
    """Turn text from a UTF-8 file into the str that the os module takes, whatever the locale (3.6 under C)."""
    return os.fsdecode(text.encode("utf-8", "surrogateescape"))


def portable(name: str) -> str:
    """Turn a str from the os module into UTF-8 text with surrogate escapes, whatever the locale."""
    return os.fsencode(name).decode("utf-8", "surrogateescape")


def reason(error: OSError) -> str:
    """Say why the system refused, with the errno's name for those who search for it."""
    name = errno.errorcode.get(error.errno or 0, "")
    return f"{error.strerror or error} ({name})" if name else str(error)


def write_all(descriptor: int, data: Union[bytes, memoryview]) -> None:
    """Write everything, however many calls the kernel wants for it."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view):]


class Directory:
    """A directory held open by descriptor.

    Every name is a single component and no symlink is followed, so that a
    local user who swaps a path between a check and its use gains nothing.
    Methods raise OSError as the system gives it.
    """

    def __init__(self, path: str, descriptor: int) -> None:
        self.path, self.descriptor = path, descriptor

    @classmethod
    def open(cls, path: str) -> "Directory":
        """Open a directory by its path; the last component must not be a symlink."""
        return cls(path, os.open(path, _DIRECTORY_FLAGS))

    def child(self, name: str) -> "Directory":
        """Open a subdirectory."""
        return Directory(f"{self.path}/{name}", os.open(name, _DIRECTORY_FLAGS, dir_fd=self.descriptor))

    def make(self, name: str, mode: int = 0o755) -> "Directory":
        """Open a subdirectory, making it first where it is missing."""
        try:
            os.mkdir(name, mode, dir_fd=self.descriptor)
        except FileExistsError:
            pass
        return self.child(name)

    def walk_to(self, path: str, *, make: bool = False) -> "Directory":
        """Open a directory below by a relative path, component by component."""
        here = Directory(self.path, os.dup(self.descriptor))
        for name in [part for part in path.split("/") if part not in ("", ".")]:
            with here:
                here = here.make(name) if make else here.child(name)
        return here

    def names(self) -> List[str]:
        """List the entries, sorted."""
        return sorted(os.listdir(self.descriptor))

    def status(self, name: str) -> Optional[os.stat_result]:
        """Return lstat of an entry, or None where there is none."""
        try:
            return os.stat(name, dir_fd=self.descriptor, follow_symlinks=False)
        except FileNotFoundError:
            return None

    def is_directory(self, name: str) -> bool:
        """Tell whether an entry is a real directory."""
        found = self.status(name)
        return found is not None and stat.S_ISDIR(found.st_mode)

    def link_target(self, name: str) -> Optional[str]:
        """Return where a symlink points, or None where there is no symlink."""
        try:
            return os.readlink(name, dir_fd=self.descriptor)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.EINVAL):
                return None
            raise

    def read(self, name: str, limit_bytes: int = MAX_STATE_BYTES) -> Optional[bytes]:
        """Return a regular file's bytes, or None where there is no such file."""
        try:
            descriptor = os.open(name, _READ_FLAGS, dir_fd=self.descriptor)
        except FileNotFoundError:
            return None
        return read_descriptor(descriptor, f"{self.path}/{name}", limit_bytes)

    def write(self, name: str, data: bytes, mode: int = 0o600) -> None:
        """Replace a file durably: a unique temporary file, fsync, rename, fsync of the directory."""
        temporary = temporary_name(name)
        descriptor = os.open(temporary, _CREATE_FLAGS, mode, dir_fd=self.descriptor)
        try:
            try:
                write_all(descriptor, data)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            self.rename(temporary, self, name)
        except BaseException:
            self.discard(temporary)
            raise
        self.sync()

    def rename(self, name: str, target: "Directory", new_name: str) -> None:
        """Rename an entry into `target`, atomically; replaces what is there as rename(2) does."""
        os.rename(name, new_name, src_dir_fd=self.descriptor, dst_dir_fd=target.descriptor)

    def discard(self, name: str) -> None:
        """Remove a file or symlink if it is there."""
        try:
            os.unlink(name, dir_fd=self.descriptor)
        except FileNotFoundError:
            pass

    def remove_tree(self, name: str) -> None:
        """Remove an entry and all below it, never following a symlink; nothing there is fine."""
        found = self.status(name)
        if found is None:
            return
        if not stat.S_ISDIR(found.st_mode):
            self.discard(name)
            return
        if found.st_mode & 0o700 != 0o700:
            # A read-only directory of the artifact cannot be emptied as it is.
            os.chmod(name, 0o700, dir_fd=self.descriptor)
        with self.child(name) as below:
            for entry in os.listdir(below.descriptor):
                below.remove_tree(entry)
        os.rmdir(name, dir_fd=self.descriptor)

    def sync(self) -> None:
        """Make the directory's entries durable."""
        os.fsync(self.descriptor)

    def close(self) -> None:
        """Close the descriptor."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    def __enter__(self) -> "Directory":
        return self

    def __exit__(self, *details: Any) -> None:
        self.close()


def read_descriptor(descriptor: int, path: str, limit_bytes: int) -> bytes:
    """Read a regular file from a descriptor and close it; OSError(EFBIG) beyond the limit."""
    with os.fdopen(descriptor, "rb") as stream:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", path)
        data = stream.read(limit_bytes + 1)
    if len(data) > limit_bytes:
        raise OSError(errno.EFBIG, f"larger than {format_size(limit_bytes)}", path)
    return data


def temporary_name(name: str) -> str:
    """Make a name no earlier run can have left behind."""
    return f".{name}.{os.getpid()}.{os.urandom(4).hex()}.tmp"


def sync_filesystem() -> None:
    """Make everything written so far durable, in one call for all files (sync(2) waits on Linux)."""
    os.sync()


def boot_id() -> str:
    """Return the kernel's id of this boot, or an empty string where there is none."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as stream:
            return stream.read(64).strip()
    except OSError:
        return ""


def user_name() -> str:
    """Return the effective user's name; images without a passwd entry give the number."""
    import pwd
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return str(os.geteuid())


def who(trigger: str) -> Dict[str, Any]:
    """Say who runs this: user, uid, host, pid and what started it."""
    return {"user": user_name(), "uid": os.geteuid(), "host": os.uname().nodename,
            "pid": os.getpid(), "trigger": trigger}


def started_by() -> str:
    """Guess what started this run: systemd, cron, ssh or a person, from the environment."""
    if environment("INVOCATION_ID"):
        return "systemd"
    if environment("SSH_CONNECTION"):
        return "ssh"
    return "terminal" if sys.stdin is not None and sys.stdin.isatty() else "script"


def process_is_alive(pid: int) -> bool:
    """Tell whether a process exists, whoever owns it."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def processes_inside(path: str) -> List[int]:
    """List the processes whose working directory or executable lies inside a directory."""
    inside, found = os.path.realpath(path) + "/", []
    try:
        pids = [name for name in os.listdir("/proc") if name.isdigit()]
    except OSError:
        return []
    for pid in pids:
        for link in ("cwd", "exe"):
            try:
                target = os.readlink(f"/proc/{pid}/{link}")
            except OSError:
                continue
            if (target + "/").startswith(inside):
                found.append(int(pid))
                break
    return found


def trust_problem(path: str) -> Optional[Tuple[str, str]]:
    """Say why a file that root is about to believe could have been written by somebody else.

    Looks at the file and every directory above it: each must belong to root or
    the effective user and not be writable by group or others (a sticky
    directory such as /tmp may be).  Returns (problem, hint) or None.
    """
    path = os.path.realpath(path)
    while True:
        found = os.stat(path)
        mode = stat.S_IMODE(found.st_mode)
        if found.st_uid not in (0, os.geteuid()):
            return f"{path} belongs to uid {found.st_uid}", f"chown root {path}"
        sticky_directory = stat.S_ISDIR(found.st_mode) and mode & stat.S_ISVTX
        if mode & 0o022 and not sticky_directory:
            return f"{path} is writable by group or others (mode {mode:04o})", f"chmod go-w {path}"
        if path == "/":
            return None
        path = os.path.dirname(path)


# -- commands ----------------------------------------------------------------

class CommandResult(NamedTuple):
    """How a command ended: exit code (negative: the signal), and the last lines it wrote."""

    argv: List[str]
    exit_code: int
    timed_out: bool
    tail: List[str]
    seconds: float

    @property
    def ok(self) -> bool:
        """Tell whether it ended by itself with exit code 0."""
        return self.exit_code == 0 and not self.timed_out

    def verdict(self) -> str:
        """Say in words how it ended."""
        if self.timed_out:
            return f"timed out after {format_seconds(self.seconds)} and was killed with its children"
        if self.exit_code < 0:
            return f"was killed by {signal.Signals(-self.exit_code).name}"
        return f"exited with code {self.exit_code}"


def command_path() -> str:
    """Return PATH with the system directories that cron and systemd leave out."""
    present = environment("PATH").split(":") if environment("PATH") else []
    return ":".join(present + [entry for entry in EXTRA_PATH.split(":") if entry not in present])


def find_command(name: str, directory: str = "") -> Optional[str]:
    """Find a program: a bare name in the command path, anything else relative to `directory`."""
    import shutil
    if "/" in name:
        path = os.path.join(directory, name) if directory else name
        return path if os.access(path, os.X_OK) and os.path.isfile(path) else None
    return shutil.which(name, path=command_path())


def become_user(name: str) -> Callable[[], None]:
    """Return a function that gives a child the identity of `name`, all groups included.

    Raises UsageError for an unknown user.
    """
    import pwd
    try:
        entry = pwd.getpwnam(name)
    except KeyError:
        raise UsageError(f"user {name!r} does not exist on this host", "create it, or correct run_as in [hooks]")

    def change() -> None:
        os.initgroups(entry.pw_name, entry.pw_gid)
        os.setgid(entry.pw_gid)
        os.setuid(entry.pw_uid)
    return change


class RunningCommand:
    """A command in a session of its own, whose output is read as it comes.

    The wait ends when the command itself ends: a background child that still
    holds its stdout is not waited for.
    """

    POLL_SECONDS = 0.02
    KILL_AFTER_SECONDS = 5.0

    def __init__(self, argv: Sequence[str], environ: Dict[str, str], directory: str, run_as: str = "") -> None:
        import subprocess
        self.argv, self.tail, self._rest = list(argv), deque(maxlen=OUTPUT_TAIL_LINES), b""  # type: ignore
        self._started_seconds = time.monotonic()
        # The program is looked up in the child's PATH, the one the operator is shown.
        self._process = subprocess.Popen(
            self.argv, env=environ, cwd=directory, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, start_new_session=True, preexec_fn=become_user(run_as) if run_as else None)
        self._output = self._process.stdout.fileno()  # type: ignore
        os.set_blocking(self._output, False)

    def wait(self, timeout_seconds: float, on_line: Callable[[str], None]) -> CommandResult:
        """Read its output until it ends or its time is up; then nothing of it is left running in the group."""
        import select
        timed_out = False
        try:
            while self._process.poll() is None:
                left_seconds = timeout_seconds - (time.monotonic() - self._started_seconds)
                if left_seconds <= 0:
                    timed_out = True
                    break
                if self._output < 0:
                    time.sleep(self.POLL_SECONDS)
                elif select.select([self._output], [], [], min(self.POLL_SECONDS, left_seconds))[0]:
                    self._read(on_line)
        finally:
            if self._process.poll() is None:
                self._kill_group()
            self._drain(on_line)
            self._process.stdout.close()  # type: ignore
        return CommandResult(self.argv, self._process.returncode, timed_out, list(self.tail),
                             time.monotonic() - self._started_seconds)

    def _read(self, on_line: Callable[[str], None]) -> bool:
        try:
            data = os.read(self._output, 65536)
        except BlockingIOError:
            return False
        if not data:
            self._output = -1
            return False
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > OUTPUT_LINE_CHARACTERS:
            lines.append(self._rest)
            self._rest = b""
        for line in lines:
            self._emit(line, on_line)
        return True

    def _emit(self, line: bytes, on_line: Callable[[str], None]) -> None:
        text = line.decode("utf-8", "backslashreplace").rstrip("\r")[:OUTPUT_LINE_CHARACTERS]
        self.tail.append(text)
        on_line(text)

    def _drain(self, on_line: Callable[[str], None]) -> None:
        """Take what is in the pipe already; a child that keeps it open and full cannot hold us."""
        for _ in range(64):
            if self._output < 0 or not self._read(on_line):
                break
        if self._rest:
            self._emit(self._rest, on_line)
            self._rest = b""

    def _kill_group(self) -> None:
        """TERM to the whole group, KILL after a grace period."""
        deadline = time.monotonic() + self.KILL_AFTER_SECONDS
        self._signal_group(signal.SIGTERM)
        while self._process.poll() is None and time.monotonic() < deadline:
            time.sleep(self.POLL_SECONDS)
        # Also when the leader is gone: its children may have ignored TERM.
        self._signal_group(signal.SIGKILL)
        self._process.wait()

    def _signal_group(self, number: int) -> None:
        try:
            os.killpg(self._process.pid, number)
        except (ProcessLookupError, PermissionError):
            pass


def run_command(argv: Sequence[str], *, environ: Optional[Dict[str, str]] = None, directory: str = "/",
                timeout_seconds: float = 60.0, on_line: Callable[[str], None] = lambda line: None,
                run_as: str = "") -> CommandResult:
    """Run a command to its end, without a shell, stdin closed, in its own process group.

    `environ` is the whole environment; without it a minimal one is made.  A
    program that cannot be started gives exit code 127 and says why in `tail`.
    """
    try:
        running = RunningCommand(argv, environ or base_environment(), directory, run_as)
    except (OSError, ValueError) as error:
        why = reason(error) if isinstance(error, OSError) else str(error)
        return CommandResult(list(argv), 127, False, [f"cannot start {argv[0]}: {why}"], 0.0)
    return running.wait(timeout_seconds, on_line)


def base_environment() -> Dict[str, str]:
    """Return the small environment every child starts from."""
    home = environment("HOME") or "/"
    return {"PATH": command_path(), "HOME": home, "LANG": "C.UTF-8"}


def start_filter(argv: Sequence[str]) -> Any:
    """Start a decompressor as a subprocess.Popen with pipes at both ends; OSError when it cannot start."""
    import subprocess
    return subprocess.Popen(list(argv), env=base_environment(), cwd="/", stdin=subprocess.PIPE,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


# -- signals -----------------------------------------------------------------

class Interrupts:
    """Turns SIGINT, SIGTERM and SIGHUP into Interrupted, at points where stopping is safe.

    Only inside `allowed()`, where the work is waiting or can be thrown away,
    does a signal interrupt at once; elsewhere it waits for the next `check()`.
    After `close()` signals change nothing more: the way back is not
    interrupted.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self) -> None:
        self._pending, self._allowed, self._closed = 0, False, False

    def install(self) -> None:
        """Take over the signals, except where the starter has them ignored (nohup)."""
        for number in self.SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._handle)

    def _handle(self, number: int, frame: Any) -> None:
        if self._closed:
            return
        self._pending = self._pending or number
        if self._allowed:
            self._allowed = False
            self.check()

    def check(self) -> None:
        """Raise Interrupted if a signal has come."""
        if self._pending and not self._closed:
            number, self._pending = self._pending, 0
            raise Interrupted(number)

    def close(self) -> None:
        """Stop listening: what follows must run to its end."""
        self._closed = True

    @contextmanager
    def allowed(self) -> Iterator[None]:
        """Let signals interrupt the block at once."""
        self.check()
        self._allowed = True
        try:
            yield
        finally:
            self._allowed = False


# ============================================================================
# 5  Options
#    The one table: flags, INI keys, environment variables, help, the example
#    file and the README's table are all made from it.
# ============================================================================

class Option(NamedTuple):
    """One row: where it stands in the INI, how its text is read, and what it means.

    A section `probe:*` may be given many times, each with a name; a key `*` or
    `json.*` stands for keys the operator chooses.  `flag` is the command line's
    own spelling, where there is one.
    """

    section: str
    key: str
    kind: str
    default: str
    help: str
    flag: str = ""


def _parse_bool(text: str) -> bool:
    words = {"yes": True, "true": True, "on": True, "1": True, "no": False, "false": False, "off": False, "0": False}
    if text.lower() not in words:
        raise ValueError("expected yes or no")
    return words[text.lower()]


def _parse_int(text: str) -> int:
    if not re.match(r"\d{1,18}\Z", text):
        raise ValueError("expected a whole number, 0 or more")
    return int(text)


def _parse_float(text: str) -> float:
    if not re.match(r"\d{1,9}(\.\d{1,9})?\Z", text):
        raise ValueError("expected a number such as 1.5")
    return float(text)


def parse_duration(text: str) -> float:
    """Read `500ms`, `3s`, `2m` or `1h` as seconds; ValueError for anything else."""
    found = re.match(r"(\d{1,9}(?:\.\d{1,9})?)(ms|s|m|h)\Z", text)
    if not found:
        raise ValueError("expected a duration such as 500ms, 3s, 2m or 1h")
    return float(found.group(1)) * {"ms": 0.001, "s": 1, "m": 60, "h": 3600}[found.group(2)]


def parse_size(text: str) -> int:
    """Read `64k`, `10M` or `2G` as bytes (powers of 1024); ValueError for anything else."""
    found = re.match(r"(\d{1,12})([kKMGT]?)\Z", text)
    if not found:
        raise ValueError("expected a size such as 64k, 10M or 2G")
    return int(found.group(1)) << {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}[found.group(2).upper()]


def _parse_mode(text: str) -> int:
    if not re.match(r"0?[0-7]{3}\Z", text):
        raise ValueError("expected a file mode such as 0640")
    return int(text, 8)


def _parse_list(text: str) -> List[str]:
    return [line.strip() for line in text.split("\n") if line.strip()]


def _parse_argv(text: str) -> List[str]:
    import shlex
    return shlex.split(text)


def _parse_commands(text: str) -> List[List[str]]:
    return [_parse_argv(line) for line in _parse_list(text)]


def _parse_regex(text: str) -> str:
    try:
        re.compile(text[1:] if text.startswith("!") else text)
    except re.error as error:
        raise ValueError(f"not a regular expression: {error}")
    return text


def _parse_statuses(text: str) -> List[Tuple[int, int]]:
    ranges = []
    for item in text.split(","):
        found = re.match(r"\s*([1-5]\d\d)(?:\s*-\s*([1-5]\d\d))?\s*\Z", item)
        if not found:
            raise ValueError("expected HTTP status codes such as 200-299, 301")
        ranges.append((int(found.group(1)), int(found.group(2) or found.group(1))))
    return ranges


def _parse_addresses(text: str) -> List[Tuple[str, int]]:
    addresses = []
    for item in re.split(r"[\s,]+", text.strip()):
        if item:
            host, _, port = item.rpartition(":")
            if not port.isdigit() or not 0 < int(port) < 65536:
                raise ValueError(f"expected PORT or HOST:PORT, not {item!r}")
            addresses.append((host.strip("[]"), int(port)))
    return addresses


def _parse_relative(text: str) -> str:
    path = os.path.normpath(native(text)) if text else ""
    if path.startswith("/") or path.split("/")[0] in ("..", ".") or any(ord(c) < 32 for c in path):
        raise ValueError(f"expected a relative path that stays inside, not {text!r}")
    return path


def _parse_relatives(text: str) -> List[str]:
    return [_parse_relative(line) for line in _parse_list(text)]


# kind: (how its text is read, what the documentation calls it)
KINDS = {
    "text": (str, "text"),
    "path": (native, "path"),
    "paths": (lambda text: [native(line) for line in _parse_list(text)], "paths, one a line"),
    "relative": (_parse_relative, "relative path"),
    "relatives": (_parse_relatives, "relative paths, one a line"),
    "int": (_parse_int, "number"),
    "float": (_parse_float, "number"),
    "size": (parse_size, "size"),
    "duration": (parse_duration, "duration"),
    "bool": (_parse_bool, "yes or no"),
    "mode": (_parse_mode, "file mode"),
    "list": (_parse_list, "one a line"),
    "argv": (_parse_argv, "command"),
    "commands": (_parse_commands, "commands, one a line"),
    "regex": (_parse_regex, "regular expression"),
    "statuses": (_parse_statuses, "status codes"),
    "addresses": (_parse_addresses, "[host:]port, one a line"),
}  # type: Dict[str, Tuple[Callable[[str], Any], str]]

# A kind that is not in KINDS is a choice, written `one|two|three`.
OPTIONS = (
    Option("deploy", "application", "text", "", "name of what is deployed; default: the root's last component"),
    Option("deploy", "root", "path", "", "directory that holds current, releases, shared and .deploy", "--root"),
    Option("deploy", "keep_releases", "int", "5", "good releases kept by prune; current, previous and pinned ones come on top"),
    Option("deploy", "shared_dirs", "relatives", "", "directories linked from shared/ into every release, made when missing"),
    Option("deploy", "shared_files", "relatives", "", "files linked from shared/ into every release; they must exist"),
    Option("deploy", "auto_rollback", "bool", "yes", "go back to the previous release when anything fails after activation"),
    Option("deploy", "lock_wait", "duration", "0s", "how long to wait for another run to finish", "--wait-lock"),
    Option("deploy", "min_free", "size", "256M", "free space that must be left after staging"),
    Option("deploy", "durable", "bool", "yes", "sync every release to disk before it is published"),
    Option("artifact", "checksum", "required|if-present|off", "required", "whether an artifact needs a SHA-256 to be compared with"),
    Option("artifact", "match", "text", "", "file name pattern in which @v stands for the version, such as myapp_@v.tar.gz"),
    Option("artifact", "strip_components", "int", "0", "leading directories to drop from every name, as tar does"),
    Option("artifact", "symlinks", "inside|refuse", "inside", "whether an artifact may hold symlinks that stay inside it"),
    Option("limits", "max_artifact", "size", "4G", "largest artifact; 0 is no limit, here and below"),
    Option("limits", "max_files", "int", "250000", "most members of an archive"),
    Option("limits", "max_file", "size", "4G", "largest single file"),
    Option("limits", "max_expanded", "size", "16G", "most bytes that may come out of an archive"),
    Option("limits", "max_ratio", "int", "200", "most bytes that may come out for each byte of a compressed archive"),
    Option("preflight", "require_commands", "list", "", "programs that must be found on PATH"),
    Option("preflight", "require_env", "list", "", "environment variables that must be set and not empty"),
    Option("preflight", "require_files", "paths", "", "files that must exist and be readable"),
    Option("preflight", "free_ports", "addresses", "", "TCP ports that nothing may listen on yet"),
    Option("preflight", "user", "text", "", "user that deploy.py must be run as"),
    Option("env", "*", "text", "", "environment variable handed to hooks and commands"),
    Option("hooks", "pre_stage", "commands", "", "before the artifact is unpacked"),
    Option("hooks", "post_stage", "commands", "", "in the unpacked release, before it is sealed; may add to it"),
    Option("hooks", "pre_activate", "commands", "", "before the switch; a failure leaves everything as it was"),
    Option("hooks", "post_activate", "commands", "", "right after the switch, before services restart"),
    Option("hooks", "post_deploy", "commands", "", "after the probes passed"),
    Option("hooks", "on_failure", "commands", "", "after a failure, when undoing or rolling back is done"),
    Option("hooks", "pre_rollback", "commands", "", "before the switch back"),
    Option("hooks", "post_rollback", "commands", "", "after the previous release is live again"),
    Option("hooks", "timeout", "duration", "10m", "for each hook command; then TERM and KILL to its process group"),
    Option("hooks", "run_as", "text", "", "user that hooks and commands run as (root only)"),
    Option("template:*", "source", "relative", "", "template in the release; ${name} is replaced, $${name} is kept as ${name}"),
    Option("template:*", "target", "relative", "", "where the result goes in the release"),
    Option("template:*", "mode", "mode", "0644", "file mode of the result"),
    Option("vars", "*", "text", "", "value for ${name} in templates"),
    Option("service:*", "unit", "text", "", "systemd unit to act on"),
    Option("service:*", "pidfile", "path", "", "file that holds the process id to signal"),
    Option("service:*", "signal", "text", "HUP", "signal for the process in pidfile"),
    Option("service:*", "command", "argv", "", "command that restarts the service, under the rules for hooks"),
    Option("service:*", "action", "restart|reload|reload-or-restart|start|none", "restart", "what to do once current has changed"),
    Option("service:*", "after", "list", "", "services that go first"),
    Option("service:*", "timeout", "duration", "60s", "longest time the action may take"),
    Option("service:*", "settle", "duration", "3s", "time the service must stay up unchanged afterwards (systemd units, pidfiles)"),
    Option("probe:*", "url", "text", "", "HTTP or HTTPS URL to ask"),
    Option("probe:*", "tcp", "text", "", "host:port or unix:/path to connect to"),
    Option("probe:*", "command", "argv", "", "command that must exit with 0, under the rules for hooks"),
    Option("probe:*", "service", "text", "", "name of a [service:NAME] that must be up"),
    Option("probe:*", "connect", "text", "", "host:port or unix:/path to send the url's connection to"),
    Option("probe:*", "status", "statuses", "200-299", "HTTP status codes that are well"),
    Option("probe:*", "body", "regex", "", "must be found in the answer (or the output); a leading ! negates"),
    Option("probe:*", "json.*", "text", "", "value at this dotted path of the JSON answer"),
    Option("probe:*", "expect_header.*", "regex", "", "must be found in this header of the answer"),
    Option("probe:*", "release", "text", "", "where the answer names its version: json:PATH, header:NAME or body"),
    Option("probe:*", "method", "text", "GET", "HTTP method"),
    Option("probe:*", "header.*", "text", "", "request header"),
    Option("probe:*", "auth_file", "path", "", "file with the Authorization header's value; or user:password for Basic"),
    Option("probe:*", "redirects", "int", "0", "redirects to follow, on the same host"),
    Option("probe:*", "max_body", "size", "64k", "how much of the answer is read"),
    Option("probe:*", "tls_verify", "bool", "yes", "check the certificate and its name"),
    Option("probe:*", "tls_ca", "path", "", "CA certificates to trust instead of the system's"),
    Option("probe:*", "tls_cert", "path", "", "client certificate"),
    Option("probe:*", "tls_key", "path", "", "key of the client certificate"),
    Option("probe:*", "when", "after|before|both", "after", "probe the new release, the host before anything changes, or both"),
    Option("probe:*", "initial_delay", "duration", "0s", "wait before the first try"),
    Option("probe:*", "period", "duration", "2s", "wait between tries"),
    Option("probe:*", "timeout", "duration", "3s", "longest time of one try"),
    Option("probe:*", "deadline", "duration", "60s", "longest time until it must be well"),
    Option("probe:*", "successes", "int", "2", "tries in a row that must be well"),
    Option("probe:*", "soak", "duration", "0s", "how long it must stay well afterwards"),
    Option("probe:*", "failures", "int", "3", "tries in a row during the soak that mean failure"),
    Option("probe:*", "backoff", "float", "1.5", "factor by which the wait grows after a failed try"),
    Option("probe:*", "period_max", "duration", "10s", "longest wait between tries"),
    Option("probe:*", "jitter", "float", "0.1", "random share added to or taken from each wait"),
    Option("probe:*", "required", "bool", "yes", "no: a failure is only a warning"),
    Option("log", "file", "path", "", "log file to append to", "--log-file"),
    Option("log", "format", "text|json", "text", "log lines as text or as JSON objects", "--log-format"),
)

SECTION_HELP = (
    ("deploy", "what is deployed, and where"),
    ("artifact", "how artifacts are named and verified"),
    ("limits", "what an archive may cost"),
    ("preflight", "what the host must offer"),
    ("env", "environment of hooks and commands"),
    ("hooks", "commands run at named points, each without a shell, in the release"),
    ("template:*", "a file rendered into every release"),
    ("vars", "values for templates"),
    ("service:*", "a service restarted after each switch: unit, or pidfile and signal, or command"),
    ("probe:*", "a question put to the running service: url, tcp, command or service"),
    ("log", "the log file"),
)

# Each name is (section, key); exactly one key of each group must be given.
ONE_OF = (
    ("service:*", ("unit", "pidfile", "command")),
    ("probe:*", ("url", "tcp", "command", "service")),
    ("template:*", ("source",)),
    ("template:*", ("target",)),
)


def nearest(name: str, names: Iterable[str]) -> str:
    """Suggest the name that was probably meant: ` (did you mean X?)` or nothing."""
    import difflib
    found = difflib.get_close_matches(name, list(names), n=1)
    return f"did you mean {found[0]!r}?" if found else ""


def find_option(section: str, key: str) -> Optional[Option]:
    """Return the row for a section and key as the operator wrote them, or None."""
    section = wildcard(section)
    for option in OPTIONS:
        if option.section == section:
            if option.key == key or option.key == "*":
                return option
            if option.key.endswith(".*") and key.startswith(option.key[:-1]) and key != option.key[:-1]:
                return option
    return None


def wildcard(section: str) -> str:
    """Return the table's name of a section: `probe:web` stands under `probe:*`."""
    kind, colon, name = section.partition(":")
    return f"{kind}:*" if colon and re.match(r"[A-Za-z0-9_-]+\Z", name) else section


def parse_option(option: Option, text: str) -> Any:
    """Read a value's text; ValueError says what was expected."""
    if option.kind in KINDS:
        return KINDS[option.kind][0](text)
    choices = option.kind.split("|")
    if text not in choices:
        raise ValueError(f"expected {', '.join(choices[:-1])} or {choices[-1]}")
    return text


class Given(NamedTuple):
    """One value as somebody gave it, and where, for errors and for `config`."""

    text: str
    origin: str
    directory: str


class Settings:
    """Every option's value, typed, with its origin.

    Sections are attributes (`settings.deploy.root`); sections with names are
    dictionaries of such objects (`settings.probe["web"].url`); chosen keys are
    dictionaries of texts (`settings.env`, `settings.probe["web"].header`).
    """

    def __init__(self, given: Dict[Tuple[str, str], Given], files: List[str]) -> None:
        self.given, self.files = given, files
        for section in dict.fromkeys(option.section for option in OPTIONS):
            if section.endswith(":*"):
                names = sorted({name.partition(":")[2] for name, _ in given if wildcard(name) == section})
                kind = section[:-2]
                setattr(self, kind, {name: self._section(f"{kind}:{name}") for name in names})
            elif find_option(section, "*"):
                setattr(self, section, {key: value.text for (name, key), value in given.items() if name == section})
            else:
                setattr(self, section, self._section(section))
        self._check_groups()

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)

    def _section(self, section: str) -> SimpleNamespace:
        values = SimpleNamespace(name=section.partition(":")[2])
        for option in OPTIONS:
            if option.section != wildcard(section):
                continue
            if option.key.endswith(".*"):
                prefix = option.key[:-1]
                setattr(values, option.key[:-2], {
                    key[len(prefix):]: self._value(option, section, key)
                    for name, key in self.given if name == section and key.startswith(prefix)})
            else:
                setattr(values, option.key, self._value(option, section, option.key))
        return values

    def _value(self, option: Option, section: str, key: str) -> Any:
        given = self.given.get((section, key)) or Given(option.default, "default", "")
        try:
            value = parse_option(option, given.text)
        except ValueError as error:
            raise UsageError(f"{given.origin}: [{section}] {key} = {given.text!r}: {error}",
                             f"{option.key}: {option.help}")
        if option.kind == "path" and value and given.directory:
            return os.path.normpath(os.path.join(given.directory, value))
        if option.kind == "paths" and given.directory:
            return [os.path.normpath(os.path.join(given.directory, path)) for path in value]
        return value

    def _check_groups(self) -> None:
        for section, keys in ONE_OF:
            for name in getattr(self, section[:-2]):
                full = f"{section[:-2]}:{name}"
                present = [key for key in keys if self.given.get((full, key), Given("", "", "")).text]
                if len(present) != 1:
                    origin = next(given.origin for (where, _), given in self.given.items() if where == full)
                    wanted = keys[0] if len(keys) == 1 else "exactly one of " + ", ".join(keys)
                    got = f", not {' and '.join(present)}" if present else ", and has none"
                    raise UsageError(f"{origin}: [{full}] needs {wanted}{got}", f"correct the section [{full}]")

    def origin(self, section: str, key: str) -> str:
        """Say where a value came from."""
        found = self.given.get((section, key))
        return found.origin if found else "default"

    def rows(self) -> List[Tuple[str, str, str, str]]:
        """List every option in force as (section, key, text, origin), in the table's order."""
        rows = []
        for option in OPTIONS:
            names = [name for name, _ in self.given if wildcard(name) == option.section]
            sections = [option.section] if not option.section.endswith("*") else sorted(set(names))
            for section in sections:
                if option.key.endswith("*"):
                    rows += [(section, key, given.text, given.origin)
                             for (name, key), given in self.given.items()
                             if name == section and find_option(name, key) is option]
                else:
                    given = self.given.get((section, option.key)) or Given(option.default, "default", "")
                    rows.append((section, option.key, given.text, given.origin))
        return rows


def load_settings(files: Sequence[str], flags: Dict[Tuple[str, str], str], assignments: Sequence[str]) -> Settings:
    """Put the layers together: default, files, environment, command line; a later one wins.

    `flags` are options that have a flag of their own, `assignments` are the
    texts of --set.  Raises UsageError that names file, section and key.
    """
    given = {}  # type: Dict[Tuple[str, str], Given]
    for path in files:
        given.update(read_ini(path))
    given.update(read_environment({section for section, _ in given}))
    here = os.getcwd() if _has_working_directory() else "/"
    for (section, key), text in flags.items():
        given[section, key] = Given(text, "command line", here)
    for assignment in assignments:
        section, key, text = split_assignment(assignment)
        given[section, key] = Given(text, "command line (--set)", here)
    return Settings(given, list(files))


def _has_working_directory() -> bool:
    try:
        os.getcwd()
    except FileNotFoundError:
        return False
    return True


def discover_files() -> List[str]:
    """Find the configuration where -c names none: $DEPLOY_CONFIG, ./deploy.ini, /etc/deploy/deploy.ini."""
    if environment("DEPLOY_CONFIG"):
        return [environment("DEPLOY_CONFIG")]
    return [path for path in ("deploy.ini", "/etc/deploy/deploy.ini") if os.path.exists(path)][:1]


def read_ini(path: str) -> Dict[Tuple[str, str], Given]:
    """Read one configuration file; UsageError names the file, section and key that is wrong."""
    import configparser
    parser = configparser.RawConfigParser(
        delimiters=("=",), interpolation=None, comment_prefixes=("#", ";"), strict=True,
        empty_lines_in_values=False, default_section="\0none")
    parser.optionxform = str  # type: ignore  # keys keep their case
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        parser.read_string(read_descriptor(descriptor, path, MAX_CONFIG_BYTES).decode("utf-8-sig"), path)
    except OSError as error:
        raise UsageError(f"cannot read the configuration {path}: {reason(error)}",
                         "name a configuration that this user can read: -c FILE")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8: {error.reason} at byte {error.start}", "save it as UTF-8")
    except configparser.Error as error:
        raise UsageError(f"cannot understand {path}: {' '.join(str(error).split())}",
                         "lines are [section], key = value, or a continuation that is indented")
    directory = os.path.dirname(os.path.abspath(path))
    given = {}
    for section in parser.sections():
        for key, text in parser.items(section):
            check_known(section, key, path)
            given[section, key] = Given(text.strip(), path, directory)
        check_known(section, None, path)
    return given


def check_known(section: str, key: Optional[str], origin: str) -> None:
    """Raise UsageError for a section or key that does not exist, suggesting the nearest name."""
    sections = {option.section for option in OPTIONS}
    if wildcard(section) not in sections:
        plain = [name.replace(":*", ":NAME") for name in sorted(sections)]
        raise UsageError(f"{origin}: unknown section [{section}]",
                         nearest(section, plain) or "the sections are " + ", ".join(plain))
    if key is not None and find_option(section, key) is None:
        keys = [option.key for option in OPTIONS if option.section == wildcard(section)]
        raise UsageError(f"{origin}: unknown key {key!r} in [{section}]",
                         nearest(key, keys) or "the keys are " + ", ".join(keys))


def read_environment(sections: Set[str]) -> Dict[Tuple[str, str], Given]:
    """Take options from DEPLOY_<SECTION>_<KEY>; `sections` are those with names that the files declare."""
    given = {}
    names = set(environment_names())
    directory = os.getcwd() if _has_working_directory() else "/"
    for option in OPTIONS:
        for section in [name for name in sections if wildcard(name) == option.section] or [option.section]:
            prefix = "DEPLOY_" + re.sub(r"[^A-Z0-9]", "_", section.upper()) + "_"
            if option.key.endswith("*"):
                keys = [name[len(prefix):] for name in names if name.startswith(prefix)] if option.key == "*" else []
            else:
                keys = [option.key] if prefix + option.key.upper() in names else []
            for key in keys:
                name = prefix + (key if option.key == "*" else key.upper())
                given[section, key] = Given(environment(name), f"environment {name}", directory)
    return given


def split_assignment(text: str) -> Tuple[str, str, str]:
    """Read --set SECTION.KEY=VALUE; a later `.` belongs to the key (probe:web.json.status=ok)."""
    name, equals, value = text.partition("=")
    section, dot, key = name.strip().partition(".")
    if not equals or not dot:
        raise UsageError(f"--set {text!r}: expected SECTION.KEY=VALUE", "for example --set deploy.keep_releases=3")
    check_known(section, key, "--set")
    return section, key, value.strip()


def render_example() -> str:
    """Write the configuration file that shows every option, commented, with its default and help."""
    lines = ["# deploy.ini: every option with its default. Remove a leading # to set one.",
             "# Durations: 500ms, 3s, 2m, 1h. Sizes: 64k, 10M, 2G. Lists: one item a line, indented.",
             "# Relative paths are relative to this file."]
    for section, text in SECTION_HELP:
        lines += ["", f"# {text}", f"#[{section.replace('*', 'NAME')}]" if section.endswith("*") else f"[{section}]"]
        for option in OPTIONS:
            if option.section == section:
                key = option.key.replace("*", "NAME")
                lines += [f"# {option.help} ({kind_name(option.kind)})", f"#{key} = {option.default}".rstrip()]
    return "\n".join(lines) + "\n"


def kind_name(kind: str) -> str:
    """Say what sort of text an option takes."""
    return KINDS[kind][1] if kind in KINDS else kind.replace("|", ", ")


# ============================================================================
# 6  Model
#    Plain values: what is written to disk, what a plan is, what a run reports.
#    NamedTuples with explicit JSON codecs; nothing here touches the disk.
# ============================================================================

def _fields(data: Any, what: str, types: Dict[str, Any]) -> Dict[str, Any]:
    """Take the named fields out of decoded JSON; ValueError for a missing one or a wrong type."""
    if not isinstance(data, dict):
        raise ValueError(f"{what} is not a JSON object")
    if data.get("schema") != SCHEMA:
        raise ValueError(f"{what} has schema {data.get('schema')!r}, this program knows {SCHEMA}")
    for name, kind in types.items():
        if name not in data or not isinstance(data[name], kind):
            raise ValueError(f"{what} has no proper {name!r}")
    return {name: data[name] for name in types}


_TEXT_OR_NULL, _OBJECT_OR_NULL = (str, type(None)), (dict, type(None))


class Record(NamedTuple):
    """The rollback metadata of one release, `.deploy/releases/<id>.json`.

    artifact: name, source, format, size, sha256, signature, strip_components.
    tree: files, directories, symlinks, bytes, manifest_sha256.
    rollback: release, command.  failure: step, reason, evidence; or None.
    previous: the release that was live when this one last went forward.
    Times are RFC 3339 UTC; sizes are bytes.
    """

    id: str
    sequence: int
    version: str
    state: str
    pinned: bool
    artifact: Dict[str, Any]
    tree: Dict[str, Any]
    created_at: str
    activated_at: Optional[str]
    deactivated_at: Optional[str]
    previous: Optional[str]
    by: Dict[str, Any]
    rollback: Dict[str, Any]
    failure: Optional[Dict[str, Any]]
    pruned_at: Optional[str]

    TYPES = {"id": str, "sequence": int, "version": str, "state": str, "pinned": bool, "artifact": dict,
             "tree": dict, "created_at": str, "activated_at": _TEXT_OR_NULL, "deactivated_at": _TEXT_OR_NULL,
             "previous": _TEXT_OR_NULL, "by": dict, "rollback": dict, "failure": _OBJECT_OR_NULL,
             "pruned_at": _TEXT_OR_NULL}  # type: ignore

    @property
    def sha256(self) -> str:
        """The digest of the artifact this release was made from."""
        return str(self.artifact.get("sha256", ""))

    def to_json(self) -> Dict[str, Any]:
        """Return what is written to disk and shown by --json."""
        return dict(self._asdict(), schema=SCHEMA)

    @classmethod
    def from_json(cls, data: Any) -> "Record":
        """Read a record; ValueError when it is not one."""
        record = cls(**_fields(data, "the record", cls.TYPES))
        if record.state not in STATES:
            raise ValueError(f"the record has the unknown state {record.state!r}")
        return record


class Journal(NamedTuple):
    """What is under way, `.deploy/journal.json`; it exists only while something is.

    `recoveries` counts the automatic recoveries that were begun; `deadline` is
    when the run meant to have a verdict; `done` names the steps that ended.
    """

    deploy_id: str
    operation: str
    from_release: Optional[str]
    to_release: str
    phase: str
    artifact_sha256: str
    boot_id: str
    started_at: str
    deadline: Optional[str]
    recoveries: int
    plan: List[Dict[str, str]]
    done: List[str]
    failure: Optional[Dict[str, Any]]
    by: Dict[str, Any]

    TYPES = {"deploy_id": str, "operation": str, "from": _TEXT_OR_NULL, "to": str, "phase": str,
             "artifact_sha256": str, "boot_id": str, "started_at": str, "deadline": _TEXT_OR_NULL,
             "recoveries": int, "plan": list, "done": list, "failure": _OBJECT_OR_NULL, "by": dict}  # type: ignore

    def to_json(self) -> Dict[str, Any]:
        """Return what is written to disk."""
        data = dict(self._asdict(), schema=SCHEMA)
        data["from"], data["to"] = data.pop("from_release"), data.pop("to_release")
        return data

    @classmethod
    def from_json(cls, data: Any) -> "Journal":
        """Read a journal; ValueError when it is not one."""
        fields = _fields(data, "the journal", cls.TYPES)
        fields["from_release"], fields["to_release"] = fields.pop("from"), fields.pop("to")
        journal = cls(**fields)
        if journal.phase not in PHASES:
            raise ValueError(f"the journal has the unknown phase {journal.phase!r}")
        return journal


class HistoryEntry(NamedTuple):
    """One line of `.deploy/history.jsonl`: a run that changed something, or tried to.

    result: deployed, staged, activated, rolled_back (by hand), failed (undone
    before activation), reverted (failed after activation, previous release
    live again), rollback_failed, pruned, pinned, unpinned, aborted or recovered.
    `previous_sha256` is the SHA-256 of the line before, without its newline.
    """

    sequence: int
    at: str
    deploy_id: str
    operation: str
    result: str
    release: Optional[str]
    version: Optional[str]
    previous: Optional[str]
    exit_code: int
    seconds: float
    message: str
    by: Dict[str, Any]
    steps: List[Dict[str, Any]]
    failure: Optional[Dict[str, Any]]
    previous_sha256: str

    TYPES = {"sequence": int, "at": str, "deploy_id": str, "operation": str, "result": str,
             "release": _TEXT_OR_NULL, "version": _TEXT_OR_NULL, "previous": _TEXT_OR_NULL, "exit_code": int,
             "seconds": (int, float), "message": str, "by": dict, "steps": list, "failure": _OBJECT_OR_NULL,
             "previous_sha256": str}  # type: ignore

    def to_json(self) -> Dict[str, Any]:
        """Return what is written to disk and shown by --json."""
        return dict(self._asdict(), schema=SCHEMA)

    @classmethod
    def from_json(cls, data: Any) -> "HistoryEntry":
        """Read an entry; ValueError when it is not one."""
        return cls(**_fields(data, "the history line", cls.TYPES))


class CheckResult(NamedTuple):
    """What a preflight check found: ok, warn, fail or skip, and what to do about it."""

    name: str
    status: str
    detail: str
    hint: str = ""


class StepResult(NamedTuple):
    """How a step ended: done, skipped, failed, undone or planned."""

    name: str
    status: str
    seconds: float
    detail: str


class Session(NamedTuple):
    """What every part of a run shares."""

    settings: Settings
    console: Console
    interrupts: Interrupts


class Context(NamedTuple):
    """Which release a hook, service, probe or template is run for."""

    application: str
    root: str
    release: str
    version: str
    release_path: str
    previous: str
    deploy_id: str

    def variables(self) -> Dict[str, str]:
        """Return the DEPLOY_* variables, all but DEPLOY_HOOK."""
        return {
            "DEPLOY_APPLICATION": self.application, "DEPLOY_ROOT": self.root, "DEPLOY_RELEASE": self.release,
            "DEPLOY_VERSION": self.version, "DEPLOY_RELEASE_PATH": self.release_path,
            "DEPLOY_CURRENT_PATH": f"{self.root}/current", "DEPLOY_SHARED_PATH": f"{self.root}/shared",
            "DEPLOY_PREVIOUS_RELEASE": self.previous, "DEPLOY_ID": self.deploy_id}


class Plan(NamedTuple):
    """The ordered steps of one operation, computed before anything changes.

    `way_back` are the steps that make `from_release` live again, taken when a
    step fails after the switch; before the switch, steps are undone instead.
    """

    operation: str
    from_release: Optional[str]
    to_release: str
    steps: List[Any]
    way_back: List[Any]

    def to_json(self) -> List[Dict[str, str]]:
        """Return the plan as the journal keeps it and --json shows it."""
        return [{"name": step.name, "description": step.describe()} for step in self.steps]
