#!/usr/bin/python3
"""deploy.py - take an artifact live on this host, and back.

One file, standard library only, Python 3.6 to 3.14.  It checks the host,
verifies and unpacks an artifact into a release of its own, points the symlink
`current` at it in one atomic rename, restarts services, asks the running
program whether it is healthy, rolls back by itself when it is not, and keeps a
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
    step         one action: its text, and how to do and to undo it
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
                                    rendered templates; unpacked as .new-*
    ROOT/shared/                    linked into every release; flags.json
    ROOT/slots/NAME                 the release in a slot; live.conf tells the
                                    proxy which slot is live (only with [slots])
    ROOT/maintenance                the flag file, while it is up
    ROOT/.deploy/lock               flock; never unlinked
    ROOT/.deploy/journal.json       only while something is under way
    ROOT/.deploy/history.jsonl      hash-chained, one JSON object a line
    ROOT/.deploy/releases/ID.json   the record
    ROOT/.deploy/manifests/ID       `sha256sum -c` reads it inside the release
    ROOT/.deploy/trees/ID           the rest of it: directories, links, modes
    ROOT/.deploy/trash, cache       swept by recovery, but *.part and *.etag
    ROOT/.deploy/source.json        what sync has seen of the source
    ROOT/.deploy/hold.json          who holds what is live, and why
    ROOT/.deploy/reserve            given up on a full disk

A release's states
    staged --activate--> active --another goes live--> retired --prune--> gone
                           |  ^                           |
                           |  +---------rollback----------+
                           +--failure after activation--> bad --prune--> gone
    What another tool left is adopted as active or retired.  A release that a
    person rolled back from is retired, and refused by deploy as a bad one is.

A deployment's phases, as the journal names them
    staging --> intent --> switched --> (journal removed: the verdict is in)
       |          |           |
     undone     undone   rolling_back --> (journal removed)

Exit codes
    0 done or nothing to do         6 failed, and not rolled back
    1 failed before activation      7 a read-only command found a problem
    2 usage or configuration        10 changed (with --detailed-exitcode)
    3 preflight failed              70 internal error
    4 artifact refused              75 another run holds the lock
    5 failed and rolled back        130, 143 interrupted, undone

Sections, each using only itself and those above it
     1 Constants and exit codes     10 Policy
     2 Errors                       11 Source
     3 Console                      12 Facts and preflight
     4 System                       13 Operations
     5 Options                      14 Executor
     6 State                        15 Reference
     7 Signatures                   16 Commands
     8 Artifact                     17 Reports
     9 Hooks, services, probes, templates
    18 Command line and main

To follow a deployment, read the table of operations in section 13, then
`transact` in section 16: observe, plan, check, execute.
To add a flag: a row of FLAG_TABLE (5), its use in `command_NAME` (16), where
`select_release` reads a RELEASE.  An option: a row of OPTION_TABLES (5); what
only some kinds of probe know, also in PROBE_KINDS (5).  A kind of probe: rows of
[probe:*] and PROBE_KINDS, a flag (5), `ProbeRun.ask_KIND` (9), `check_probes`
(12).  Then `make example`, a test, and its part of test_style.py's ceilings.
"""

import sys

# No file beside this one, in PYTHONPATH or in a home directory may take a standard module's place:
# a json.py there would run as root.  So only the library's own directories are searched.  What
# Python has imported before this line (sitecustomize, .pth files) only `python3 -I` keeps out.
if __name__ == "__main__" and not sys.flags.isolated:
    _here = __file__.rpartition("/")[0] or "."
    _own = tuple(prefix.rstrip("/") + "/lib" for prefix in (sys.base_prefix, sys.base_exec_prefix))
    sys.path[:] = [entry for entry in sys.path[1:] if entry.startswith(_own)
                   and entry != _here and "-packages" not in entry]

INCOMPLETE = "this Python's standard library is not whole"
INSTALL = "install all of it (Debian, Ubuntu: apt-get install python3)"
_stderr = sys.stderr
try:
    sys.stderr = None  # hashlib would show a traceback for each hash that it has not got
    import argparse
    import binascii
    import errno
    import fcntl
    import gc
    import hashlib
    import itertools
    import json
    import operator
    import os
    import re
    import signal
    import stat
    import struct
    import time
    import zlib
    from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
    from functools import lru_cache, partial
    from operator import attrgetter
    from types import SimpleNamespace
    from typing import (Any, Callable, Dict, Iterable, Iterator, List, NamedTuple,
                        Optional, Sequence, Set, Tuple, Union)
    if not hasattr(hashlib, "sha256"):
        raise ImportError("hashlib has no sha256")
except ImportError as _error:
    if _stderr:
        _stderr.write(f"deploy.py: error: {INCOMPLETE}: {_error}; {INSTALL}\n")
    if "--json" in sys.argv or len(sys.argv) == 2 and "/" in sys.argv[1]:  # the latter from Ansible
        _text = f'"{INCOMPLETE}: {_error}"'
        if sys.stdout:
            sys.stdout.write('{"ok": false, "changed": false, "failed": true, "exit_code": 2, '
                             f'"msg": {_text}, "error": {{"message": {_text}, '
                             f'"hint": "{INSTALL}"}}}}\n')
    sys.exit(2)
finally:
    sys.stderr = _stderr

# Python 3.6 has no os.scandir(fd), no subprocess text= and no dataclasses: none is used here.


# ============================================================================
# 1  Constants and exit codes
#    Names for every number and word that is a promise.
# ============================================================================

Json = Dict[str, Any]  # a JSON object
OptionalText = Optional[str]
VERSION = "2.0.0"
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

STATE_STAGED = "staged"
STATE_ACTIVE = "active"
STATE_RETIRED = "retired"
STATE_BAD = "bad"
STATES = (STATE_STAGED, STATE_ACTIVE, STATE_RETIRED, STATE_BAD)

PHASE_STAGING = "staging"
PHASE_INTENT = "intent"
PHASE_SWITCHED = "switched"
PHASE_ROLLING_BACK = "rolling_back"
PHASES = (PHASE_STAGING, PHASE_INTENT, PHASE_SWITCHED, PHASE_ROLLING_BACK)

# Ends of a run, to be notified of; history, log and metrics use the same words.
NOTIFY_EVENTS = (
    ("deployed", "deploy made a release live"),
    ("synced", "sync made a release live"),
    ("activated", "activate made a release live"),
    ("rolled_back", "went back: by itself (exit 5), or by rollback"),
    ("failed", "failed before activation (exit 1), interrupted, or an internal error"),
    ("left_live", "failed after activation, and the release stays live (exit 6)"),
    ("rollback_failed", "a person is needed (exit 6)"),
    ("refused", "preflight failed (exit 3), or the artifact was refused (exit 4)"),
    ("recovered", "what a crash had left was finished or undone"),
    ("staged", "stage made a release; only where `events` names it"),
    ("pruned", "prune deleted releases; only where `events` names it"),
)
DEFAULT_EVENTS = [name for name, _ in NOTIFY_EVENTS if name not in ("staged", "pruned")]

# name, type, help; each has the label `app`, and those that its help names in brackets.
METRICS = (
    ("deploy_last_run_timestamp_seconds", "gauge",
     "When the last run ended, since the epoch [command]."),
    ("deploy_last_run_success", "gauge",
     "Whether the last run succeeded (1) or not (0) [command]."),
    ("deploy_last_run_exit_code", "gauge", "Exit code of the last run [command]."),
    ("deploy_last_run_duration_seconds", "gauge", "How long the last run took [command]."),
    ("deploy_last_success_timestamp_seconds", "gauge",
     "When the last run that succeeded ended, since the epoch."),
    ("deploy_last_deployment_timestamp_seconds", "gauge",
     "When the last deploy, activate or rollback ended, since the epoch [command]."),
    ("deploy_last_deployment_success", "gauge",
     "Whether the last deploy, activate or rollback succeeded (1) or not (0) [command]."),
    ("deploy_last_deployment_exit_code", "gauge", "Its exit code: 6 needs a person [command]."),
    ("deploy_last_deployment_duration_seconds", "gauge",
     "How long the last deploy, activate or rollback took [command]."),
    ("deploy_step_duration_seconds", "gauge", "How long a step of the last run took [step]."),
    ("deploy_release_info", "gauge",
     "The release that is live, and its artifact's digest [release, sha256]; always 1."),
    ("deploy_release_activated_timestamp_seconds", "gauge",
     "When the release that is live was activated, since the epoch."),
    ("deploy_runs_total", "counter", "Runs by how they ended [result]."),
)

# The label `result` of deploy_runs_total.
RUN_RESULTS = [name for name, _ in NOTIFY_EVENTS] + [
    "pinned", "unpinned", "adopted", "held", "unheld", "flagged", "unchanged", "usage",
    "busy", "interrupted", "internal_error"]

HOOK_NAMES = ("pre_stage", "post_stage", "pre_activate", "post_activate",
              "post_deploy", "on_failure", "pre_rollback", "post_rollback")

MIGRATE_NAMES = ("check", "backup", "up", "down")
CLIENT_SECONDS = 10.0  # how long one visitor of `maintenance serve` may take
EXTRA_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
MAX_STATE_BYTES = 16 << 20
MAX_CONFIG_BYTES = 1 << 20
MAX_RECOVERIES = 2
MAX_DEPTH = 64
MAX_NAME_BYTES = 255
MAX_PATH_BYTES = 1024
MAX_JUDGED_LINKS = 1000
WATCH_SECONDS = 0.25  # the longest wait that a signal cannot cut short
LONGEST_SECONDS = 480 * 3600  # poll(2) takes milliseconds in 31 bits: not quite 600 h
UNLIMITED_SECONDS = 300.0  # asked of systemd where nothing bounds the work (a slow disk)
OUTPUT_TAIL_LINES = 40
OUTPUT_LINE_CHARACTERS = 4096
# More than is shown, so that a secret on the cut is masked whole (a character: up to 4 bytes).
MASKED_BYTES = 8 * OUTPUT_LINE_CHARACTERS


# ============================================================================
# 2  Errors
#    One hierarchy; the class says the exit code (Interrupted: its signal).  All end in main().
# ============================================================================

class DeployError(Exception):
    """A failure that a person can act on: what and why, what to do next, what was seen."""

    exit_code = EXIT_FAILED

    def __init__(self, message: str, hint: str = "", evidence: Optional[Json] = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.evidence = evidence or {}


class StepFailed(DeployError):
    """A step failed before activation; the steps before it are undone."""


class ReleaseFailed(StepFailed):
    """A release failed by its own fault before it was live: it is marked bad all the same."""


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
    """The run failed after activation; the previous release is live again."""

    exit_code = EXIT_ROLLED_BACK


class RollbackFailed(DeployError):
    """The run failed, and going back failed too."""

    exit_code = EXIT_ROLLBACK_FAILED


class ProblemFound(DeployError):
    """A read-only command found a problem."""

    exit_code = EXIT_PROBLEM


class Busy(DeployError):
    """Another run holds the lock."""

    exit_code = EXIT_BUSY


class Interrupted(DeployError):
    """SIGINT, SIGTERM or SIGHUP asked the run to stop."""

    def __init__(self, number: int) -> None:
        super().__init__(f"interrupted by {signal.Signals(number).name}",
                         "run the same command again")
        self.exit_code = 128 + (signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)


# What may stop any work without being a defect.
FAILURES = (DeployError, OSError, ImportError, MemoryError)


# ============================================================================
# 3  Console
#    The only writer to stdout, stderr and the log.  Everything foreign is
#    escaped and every secret is masked here, once, on the way out.
# ============================================================================

# C0 and C1 controls, line and paragraph separators, bidirectional overrides:
# what can move a cursor, forge a log line or hide text.
_UNPRINTABLE = {code: f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" for code in [
    *range(32), *range(0x7f, 0xa0), 0x61c, 0x200e, 0x200f, *range(0x2028, 0x202f),
    *range(0x2066, 0x206a)]}
MASK = "[masked]"
# Words in private names (options, variables, headers, keys), and a pattern of what must follow.
_SECRET_WORDS = {
    "passw": "", "passphrase": "", "secret": "", "token": "", "credential": "", "cookie": "",
    "apikey": "", "accesskey": "", "signingkey": "", "private": "(?=[_-]|key)",
    "auth": "(?:(?![a-z])|orization|entication)", "dsn": "(?![a-z])",
    "_key": "(?![a-z])", "-key": "(?![a-z])", "_pass": "(?![a-z])", "-pass": "(?![a-z])",
    "_pwd": "(?![a-z])", "-pwd": "(?![a-z])",
}
_ANY_SECRET_WORD = "|".join(map("".join, _SECRET_WORDS.items()))
# Finds such a word in a whole name, in lower case.
SECRET_NAME = re.compile(rf"{_ANY_SECRET_WORD}|\A(?:pass|key)\Z")
# What looks private in any text: words of which it has one or more, its pattern, what is shown.
# Speed: the words are looked for first; compiling a pattern takes as long as a hundred looks.
_SECRET_FORMS = [
    # A URL's user and password, and its query; one slash where it was taken for a path.
    ([":/"], r"(?i)(?<![a-z0-9+.-])([a-z][a-z0-9+.-]*://?)([^/\s?#'\"]*@)", rf"\1{MASK}@"),
    ([":/"], r"(?i)(?<![a-z0-9+.-])([a-z][a-z0-9+.-]*://?[^\s?#'\"]*\?)[^\s#'\"]+", rf"\1{MASK}"),
    (["authorization", "cookie"],
     r"(?i)\b((?:authorization|proxy-authorization|cookie|set-cookie)[\"']?[ \t]*[:=][ \t]*)"
     r"\S[^\r\n]*", rf"\1{MASK}"),
    # NAME=VALUE, "name": "value", --name VALUE.  Speed: a name is tried only at its beginning; at
    # each of its letters, a long line of names would take minutes.
    (_SECRET_WORDS, r"(?i)(?<![\w.-])"
     # Not private: ..._file and LoadCredential= hold a path, which errors must be able to name;
     # tests_pass: 12 is a count.
     r"(?!LoadCredential=|[\w.-]*(?:[_-]file|tls_key|public[_-]key"
     r"|\.(?:tar|t?gz|bz2|xz|zst|zip|sha256))(?![\w.-])"
     r"|(?:test|check|spec|case)s?[_-]pass[\"']?[ \t]*[=:][ \t]*[0-9]+(?!\S))"
     rf"(?=[\w.-]*(?:{_ANY_SECRET_WORD}))"
     r"([\w.-]+[\"']?[ \t]*[=:][ \t]*"
     r"|--?[\w-]+[ \t]+(?!-|(?:is|was|or|and|for|must|needs?|requires?|option|argument)\b))"
     r"(?!(?:no such file|permission denied|(?:is|not) a directory|operation not permitted)\b)"
     r"(?:\"(?:[^\"\\\n]|\\.)*\"|'[^'\n]*'|[\"']?[^\s\"',;&]+)", rf"\1{MASK}"),
    # -p PASSWORD: any word behind mysql and its like, else one with letters and digits (but not
    # find's -print0).
    (["-p"], r"((?:mysql|mariadb|sshpass)[^\n|;&]{0,200}?\s-p[ ]?(?=\S)"
     r"|-p(?<!\S-p)(?!rint0\b)(?=[^\s/:]*[0-9])(?=[^\s/:]*[A-Za-z])(?=\S{6}))\S+", rf"\1{MASK}"),
    # A JSON web token (RFC 7519): base64 of `{"`, and two or four parts more.
    (["eyj"], r"eyJ(?<![\w.-]eyJ)[\w-]{6,}(?:\.[\w-]*){2,4}", MASK),
]


def escape(text: str) -> str:
    """Make control characters and terminal escapes visible instead of effective."""
    return text.translate(_UNPRINTABLE)


class Secrets(List[str]):
    """The values that must never be shown, longest first."""

    def add(self, value: str) -> None:
        """Remember a private value, and each line of one that has several."""
        for part in map(str.strip, {value, *value.split("\n")}):
            # Shorter values ("1", "yes") would blot out half of every sentence.
            if len(part) >= 4 and part not in self:
                self.append(part)
        self.sort(key=len, reverse=True)

    def mask(self, text: str) -> str:
        """Mask known secrets, and whatever matches _SECRET_FORMS."""
        for value in self:
            text = text.replace(value, MASK)
        lowered = text.lower()
        for words, form, shown in _SECRET_FORMS:
            if any(word in lowered for word in words):
                text = re.sub(form, shown, text)
        return text

    def mask_json(self, value: Any, name: str = "") -> Any:
        """Mask secrets in a JSON-like value, and any string whose `name` looks secret."""
        if isinstance(value, str):
            is_secret = SECRET_NAME.search(name.lower()) and not value.startswith("SHA256:")
            return MASK if value and is_secret else self.mask(value)  # a fingerprint is public
        if isinstance(value, dict):
            return {key: self.mask_json(item, str(key)) for key, item in value.items()}
        if not isinstance(value, (list, tuple)):
            return value
        items = [self.mask_json(item) for item in value]
        for number, (word, item) in enumerate(zip(value, value[1:]), 1):
            # --token and its value, as two words of a command.
            if str(word)[:1] == "-" and self.mask(f"{word} {item}").endswith(MASK):
                items[number] = MASK
        return items


def format_size(size_bytes: float) -> str:
    """Write a byte count for people: 999 B, 1.4 MB (powers of 1000)."""
    unit, digits = "B", 0
    for larger in ("kB", "MB", "GB", "TB"):
        if abs(size_bytes) >= 999.5:
            size_bytes, unit, digits = size_bytes / 1000, larger, 1
    return f"{size_bytes:.{digits}f} {unit}"


def format_seconds(seconds: float) -> str:
    """Write a duration for people: 0.04s, 3.10s, 2m05s, 1h20m."""
    if seconds < 59.995:
        return f"{seconds:.2f}s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}m{rest:02d}s" if minutes < 60 else f"{minutes // 60}h{minutes % 60:02d}m"


def format_time(seconds_since_epoch: Optional[float] = None) -> str:
    """Write a time, by default this one, as RFC 3339 in UTC, to the second."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds_since_epoch))


def count(number: int, noun: str, plural: str = "") -> str:
    """Write `1 file`, `30,936 files`."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def render_table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Lay out rows in columns, folded on a terminal that is too narrow."""
    import textwrap
    table = [list(headers)] + [[escape(str(cell)) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*table)]
    with suppress(OSError):  # no terminal
        # A terminal that does not know its width says 0.
        room = (os.get_terminal_size(1).columns or 80) - 2 * (len(widths) - 1)
        while sum(widths) > room and max(widths) > 16:
            widths[widths.index(max(widths))] -= 1
    lines = []
    for row in table:
        cells = [textwrap.wrap(cell, max(1, width)) for cell, width in zip(row, widths)]
        for pieces in itertools.zip_longest(*cells, fillvalue=""):
            lines.append("  ".join(map(str.ljust, pieces, widths)).rstrip())
    return "\n".join(lines)


def send_datagram(address: Any, data: bytes, wait_seconds: float) -> None:
    """Send one datagram to a socket's path, or to a (numeric address, port)."""
    import socket
    family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
    if isinstance(address, str):
        family = socket.AF_UNIX
    with socket.socket(family, socket.SOCK_DGRAM) as sender:
        sender.settimeout(wait_seconds)
        sender.sendto(data, address)


# -- the log -----------------------------------------------------------------

# As syslog(3) and the journal count them.
PRIORITIES = {"error": 3, "warning": 4, "info": 6, "debug": 7}


class Log:
    """A place for every line of a run; each kind writes one with a `send` of its own."""

    as_json = False
    report: Any = None

    def line(self, record: Any, limit: Optional[int] = None) -> str:
        """Write a record as text or as JSON; `event` has the fields of what ended, if any."""
        message = record.msg[:limit]
        if self.as_json:
            return json.dumps({"time": format_time(record.created),
                               "level": record.levelname.lower(), "message": message,
                               **record.context, **record.event})
        words = " ".join(f"{key}={value}" for key, value in record.context.items())
        return f"[{words}] {message}" if words else message

    def emit(self, record: Any) -> None:
        """Take a record of `logging`; a lost line is reported, and stops nothing."""
        try:
            self.send(record)  # type: ignore
        except OSError as error:
            # Forgotten first: `report` logs its own line, and would come back here.
            report, self.report = self.report, None
            if report:
                report(f"not all that is said is in the log: {error.strerror or error}")


class LogFile(Log):
    """A file that is appended to, opened for each line: logrotate may move it at any time.

    Not the library's WatchedFileHandler: that follows symlinks, waits for a FIFO's reader, and
    writes a line in pieces, between which another run may write.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        try:
            self._write(b"")
        except OSError as error:
            raise UsageError(f"cannot open the log file {path}: {error.strerror}",
                             "choose a regular file that this user can write: --log-file FILE")

    def send(self, record: Any) -> None:
        """Write one line."""
        stamp = "" if self.as_json else f"{format_time(record.created)} {record.levelname} "
        self._write(f"{stamp}{self.line(record)}\n".encode("utf-8", "backslashreplace"))

    def _write(self, data: bytes) -> None:
        descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW
                             | os.O_NONBLOCK, 0o640)
        try:
            if data and os.write(descriptor, data) < len(data):
                raise OSError(errno.ENOSPC, "it is full")
        finally:
            os.close(descriptor)


class Syslog(Log):
    """A syslog daemon: a datagram of RFC 3164 for each line.

    The library's SysLogHandler asks a name server and waits for a full socket with every line;
    this one waits for at most a second, and after a failure not at all.
    """

    LONGEST_CHARACTERS = 1000  # every receiver should take 2,048 bytes (RFC 5424, 6.1)

    def __init__(self, address: Any) -> None:
        self._address = address
        self._host = "" if isinstance(address, str) else os.uname().nodename.split(".")[0] + " "
        self._wait_seconds = 1.0

    def send(self, record: Any) -> None:
        """Send one line."""
        stamp = time.strftime("%b %e %H:%M:%S", time.localtime(record.created))
        priority = 3 * 8 + PRIORITIES[record.levelname.lower()]  # facility daemon
        line = f"<{priority}>{stamp} {self._host}deploy.py[{os.getpid()}]: " \
               f"{self.line(record, self.LONGEST_CHARACTERS)}"
        try:
            send_datagram(self._address, line.encode("utf-8", "backslashreplace"),
                          self._wait_seconds)
        except OSError:
            self._wait_seconds = 0.0
            raise


JOURNAL_SOCKET = "/run/systemd/journal/socket"
# Each kind of end in systemd's journal, for `journalctl MESSAGE_ID=...`: they never change.
MESSAGE_IDS = {
    "step_done": "752776c9d4a04544b445b2571c16d1c0",
    "step_failed": "50e9d49501a849f387ee31d5aadd09be",
    "run_done": "b74b2ae3000449748a7e69bd2284dad1",
    "run_failed": "0243aa5108f3479a91f41ea025cd832f",
}
JOURNAL_FIELDS = {
    "deploy_id": "DEPLOY_ID", "application": "DEPLOY_APP", "command": "DEPLOY_COMMAND",
    "release": "DEPLOY_RELEASE", "step": "DEPLOY_STEP", "result": "DEPLOY_RESULT",
    "trace_id": "DEPLOY_TRACE_ID",
}


# -- the console -------------------------------------------------------------

class Console:
    """The result on stdout, everything else on stderr, and the log beside them."""

    COLOURS = {"ok": "32", "done": "32", "fail": "31", "failed": "31", "warn": "33",
               "error": "31;1", "dim": "2"}
    LEVELS = {"fail": "error", "failed": "error", "warn": "warning"}  # by status

    json_mode = False
    quiet = False
    verbose = False
    colour = False
    utf8 = False
    shows_progress = False
    supervisor = ""  # $NOTIFY_SOCKET, where systemd listens
    is_result_lost = False  # stdout lacks some of it: its disk is full

    def __init__(self, journal_stream: str = "") -> None:
        self.secrets = Secrets()
        self.warnings: List[str] = []
        self.log_context: Dict[str, str] = {}  # fields of every line in the log
        self.heed: Callable[[], None] = lambda: None  # raises once a signal has come
        self.diff: Dict[str, str] = {}  # of `current`, for Ansible
        self._log: Any = None
        self._held: List[Callable[[], None]] = []
        self._broken: List[Any] = []
        self._bound_seconds = UNLIMITED_SECONDS
        self._in_journal = []  # streams to $JOURNAL_STREAM (device:inode, systemd.exec(5))
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError, AttributeError):
                status = os.fstat(stream.fileno())
                if journal_stream == f"{status.st_dev}:{status.st_ino}":
                    self._in_journal.append(stream)

    def add_log(self, log: Log, report: Callable[[str], Any], *, as_json: bool) -> None:
        """Send every line to a log as well; `report` is called the first time one is lost."""
        import logging
        log.as_json = as_json
        log.report = report
        if self._log is None:
            self._log = logging.Logger("deploy.py")  # not getLogger: nobody else configures it
        handler: Any = logging.Handler()
        handler.emit = log.emit
        self._log.addHandler(handler)

    def say(self, text: str, event: Optional[Dict[str, str]] = None, *, status: str = "",
            level: str = "", shown: str = "{}") -> None:
        """Write a line to stderr, in the form `shown`, and to the log; held back while quiet.

        A `status` is shown as a coloured word before it, and sets the level.
        """
        text = self.clean(text)
        level = level or self.LEVELS.get(status, "info")
        if self._log:
            words = f"{status}: {text}" if status else text
            getattr(self._log, level)(words.encode("utf-8", "backslashreplace").decode("utf-8"),
                                      extra={"context": self.log_context, "event": event or {}})
        if status:
            shown = f"  {self.paint(status, f'{status:<7}')} {{}}"
        about = event and {**self.log_context, **event}
        write = partial(self._write, sys.stderr, shown.replace("{}", text) + "\n", level, about)
        if self.quiet and shown:
            self._held.append(write)
        elif shown:
            write()

    def warn(self, text: str) -> None:
        """A warning: shown, logged, and kept for the result."""
        self.warnings.append(self.secrets.mask(text))
        self.say(text, status="warn")

    def debug(self, text: str) -> None:
        """A line that only -v and the log show."""
        if self.verbose or self._log:
            self.say(text, level="debug", shown=self.paint("dim", "  {}") if self.verbose else "")

    def output(self, text: str) -> None:
        """One line that a hook or a service command wrote."""
        self.say(text, shown=self.paint("dim", "    | ") + "{}")

    def error(self, message: str, hint: str = "", event: Optional[Dict[str, str]] = None) -> None:
        """The two lines of an error; never held back."""
        self.say(message + (f" (hint: {hint})" if hint else ""), event, level="error", shown="")
        self.release_held()
        text = f"deploy.py: {self.paint('error', 'error:')} {self.clean(message)}"
        if hint:
            text += f"\nhint: {self.clean(hint)}"
        self._write(sys.stderr, text + "\n", "error",
                    event and {**self.log_context, **event})

    def traceback(self) -> None:
        """Show the exception being handled with its traceback."""
        import traceback
        for line in traceback.format_exc().rstrip().split("\n"):
            self._write(sys.stderr, self.clean(line) + "\n", "error")

    def result(self, text: str) -> None:
        """Lines of the result, on stdout; --json prints its object instead, -q holds them back."""
        lines = "\n".join(map(self.clean, text.split("\n"))) + "\n"
        if self.quiet:
            self._held.append(partial(self.raw_result, lines))
        elif not self.json_mode:
            self._write(sys.stdout, lines)

    def raw_result(self, text: str) -> None:
        """A result that is not escaped: only for our own text, such as a generated file."""
        if not self.json_mode:
            self._write(sys.stdout, text)

    def json_result(self, value: Json) -> None:
        """The one object of --json, in ASCII for any locale."""
        self._write(sys.stdout, json.dumps(self.secrets.mask_json(value)) + "\n")

    @contextmanager
    def progress(self, label: str, total: int = 0) -> Iterator[Callable[..., None]]:
        """Show work of over a second as one line that is redrawn, and tell systemd of it.

        Yields a function that takes how much of `total` (0: unknown) is done, and heeds signals.
        """
        pause_seconds = 0.1 if self.shows_progress else 1.0
        next_seconds = time.monotonic() + 1.0
        is_shown = False

        def update(done: int, detail: str = "") -> None:
            nonlocal next_seconds, is_shown
            self.heed()
            if time.monotonic() < next_seconds:
                return
            next_seconds = time.monotonic() + pause_seconds
            share = f"{min(1.0, done / total):.0%} " if total else ""
            text = self.clean(f"{label} {share}{detail}")
            self.working(text)
            if self.shows_progress:
                is_shown = True
                columns = os.get_terminal_size(2).columns or 80
                self._write(sys.stderr, f"\r\033[K  {text[:columns - 3]}")

        try:
            yield update
        finally:
            if is_shown:
                self._write(sys.stderr, "\r\033[K")

    def working(self, text: str, bound_seconds: float = 0.0, state: str = "") -> None:
        """Tell systemd what is under way; ask for twice the time it may take (sd_notify(3)).

        Without a bound, the last one is asked for again.  `state` is a line such as READY=1.
        """
        if self.supervisor[:1] not in ("/", "@"):
            return
        self._bound_seconds = bound_seconds or self._bound_seconds
        # systemd ignores a datagram of more than 4096 bytes.
        words = [f"STATUS={self.clean(text)[:256]}",
                 f"EXTEND_TIMEOUT_USEC={2000000 * self._bound_seconds:.0f}", state]
        with suppress(OSError):
            send_datagram(re.sub("^@", "\0", self.supervisor),
                          "\n".join(words).encode("utf-8", "backslashreplace"), 0.0)

    def paint(self, kind: str, text: str) -> str:
        """Colour a piece of text where colour is wanted."""
        if not self.colour or kind not in self.COLOURS:
            return text
        return f"\033[{self.COLOURS[kind]}m{text}\033[0m"

    def clean(self, text: str) -> str:
        """Mask secrets, then escape what could act on a terminal."""
        return escape(self.secrets.mask(text))

    def release_held(self) -> None:
        """Write what --quiet held back, after a change or a failure."""
        held, self._held = self._held, []
        for write in held:
            write()

    def _write(self, stream: Any, text: str, level: str = "info",
               about: Optional[Dict[str, str]] = None) -> None:
        """Write text in the terminal's encoding; a closed pipe or a full disk stops nothing.

        Where the stream leads to systemd's journal, an event goes there with its fields (`about`).
        """
        if about and stream in self._in_journal:
            fields = {field: about[name] for name, field in JOURNAL_FIELDS.items()
                      if about.get(name)}
            fields.update(MESSAGE=text.rstrip("\n"), PRIORITY=str(PRIORITIES[level]),
                          MESSAGE_ID=MESSAGE_IDS[about["event"]], SYSLOG_IDENTIFIER="deploy.py")
            entry = b""
            for name, content in fields.items():  # in the form that takes any value
                value = content.encode("utf-8", "backslashreplace")
                entry += b"%b\n%b%b\n" % (name.encode(), len(value).to_bytes(8, "little"), value)
            with suppress(OSError):
                send_datagram(JOURNAL_SOCKET, entry, 1.0)
                return
        if stream is None or stream in self._broken:
            return
        if stream in self._in_journal:
            text = re.sub(r"(?m)^(?=.)", f"<{PRIORITIES[level]}>", text)
        try:
            stream.flush()
            stream.buffer.write(text.encode("utf-8" if self.utf8 else "ascii", "backslashreplace"))
            stream.flush()
        except (OSError, ValueError, AttributeError) as error:
            self._broken.append(stream)
            # Who closes a pipe has seen enough; a full disk under the result is an error.
            number = getattr(error, "errno", None)
            if stream is sys.stdout and number not in (None, errno.EPIPE, errno.EBADF):
                self.is_result_lost = True
                self.error(f"stdout: {os.strerror(number)}: what was printed there is cut off",
                           "write it to another place")


# ============================================================================
# 4  System
#    Files, commands, environment, threads, signals, identity.  The only section
#    that knows subprocess and os.environ.
# ============================================================================

_DIRECTORY_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
_READ_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
_CREATE_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW

# In this process's environment: get a variable, empty if unset; list all; unset one.
environment: Callable[[str], str] = partial(os.environ.get, default="")
environment_names: Callable[[], List[str]] = partial(list, os.environ)
forget_variable: Callable[[str], str] = os.environ.pop


def local_time(zone: str, seconds_since_epoch: float) -> time.struct_time:
    """Return the local time in a zone; PreflightFailed for one that C would take for UTC."""
    path, before = f"/usr/share/zoneinfo/{zone}", os.environ.copy()
    if zone != "UTC" and not (os.path.isfile(path) and read_file(path, 1 << 20)[:4] == b"TZif"):
        raise PreflightFailed(f"timezone {zone} is unknown here: {path} is no zone",
                              "correct [policy] timezone, or install tzdata")
    os.environ["TZ"] = "UTC0" if zone == "UTC" else path
    time.tzset()
    local = time.localtime(seconds_since_epoch)
    os.environ.pop("TZ")
    os.environ.update(before)
    time.tzset()
    return local


def absolute(path: str) -> str:
    """Make a path absolute; UsageError where the working directory is gone."""
    try:
        return os.path.abspath(path)
    except OSError:
        raise UsageError(f"{path!r} leads nowhere: the working directory was deleted",
                         "cd to another directory")


def native(text: str) -> str:
    """Turn text from a UTF-8 file into the str that the os module takes (3.6 under LANG=C)."""
    return os.fsdecode(text.encode("utf-8", "surrogateescape"))


def portable(name: str) -> str:
    """Turn a str from the os module into UTF-8 text with surrogate escapes, in any locale."""
    return os.fsencode(name).decode("utf-8", "surrogateescape")


def reason(error: Exception) -> str:
    """Say why something failed, with the errno's name, which can be searched for."""
    # A number without a name (a host that cannot be resolved) would tell nobody anything.
    name = errno.errorcode.get(error.errno or 0, "") if isinstance(error, OSError) else ""
    text = getattr(error, "strerror", None) or str(error)
    return f"{text} ({name})" if name else text


@contextmanager
def blaming(kind: Any, where: str, hint: str) -> Iterator[None]:
    """Turn an error of reading or parsing into one that says where."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise kind(f"{getattr(error, 'filename', None) or where}: {reason(error)}", hint)
    except (LookupError, TypeError, AttributeError, RecursionError):
        raise kind(f"{where}: it is damaged", hint)


def read_base64(text: bytes) -> bytes:
    """Decode canonical base64, white space aside; ValueError for any other."""
    data = binascii.a2b_base64(text)
    if binascii.b2a_base64(data, newline=False) != b"".join(text.split()):
        raise ValueError("its base64 is damaged")
    return data


def write_base64(data: bytes) -> str:
    """Encode in base64, on one line."""
    return binascii.b2a_base64(data, newline=False).decode("ascii")


def fits(name: str, patterns: str) -> bool:
    """Match patterns, split by commas, of * and ?; a leading ! excludes (ssh_config(5))."""
    signs = [pattern[:1] for pattern in patterns.split(",") if re.fullmatch(
        re.escape(pattern.lstrip("!")).replace(r"\*", ".*").replace(r"\?", "."), name)]
    return bool(signs) and "!" not in signs


def path_pattern(glob: str) -> str:
    """Turn a glob into a regex: `*` and `?` stay within a directory, `**` does not."""
    known = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    words = re.split(r"(\*\*/?|\*|\?)", native(glob))
    return "".join(known.get(word) or re.escape(word) for word in words)


# -- files -------------------------------------------------------------------

def write_all(descriptor: int, data: Union[bytes, memoryview]) -> None:
    """Write everything, in as many calls as the kernel needs."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view):]


def open_file(path: str, flags: int, dir_fd: Optional[int] = None) -> Any:
    """Open a regular file as a binary stream, never waiting; OSError(EINVAL) for any other."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | flags, dir_fd=dir_fd)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", path)
    return os.fdopen(descriptor, "rb")


def read_file(path: str, limit_bytes: int, flags: int = 0, dir_fd: Optional[int] = None) -> bytes:
    """Read a regular file, never waiting; OSError(EFBIG) for one beyond the limit."""
    with open_file(path, flags, dir_fd) as stream:
        data: bytes = stream.read(limit_bytes + 1)
    if len(data) > limit_bytes:
        raise OSError(errno.EFBIG, f"larger than {format_size(limit_bytes)}", path)
    return data


# -- who and where -----------------------------------------------------------

def user_name(uid: int = -1) -> str:
    """Return a user's name, by default the effective one's; the number without a passwd entry."""
    import pwd
    uid = os.geteuid() if uid < 0 else uid
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def traceparent(parent: str = "") -> str:
    """Return $TRACEPARENT (W3C trace context 00), with its parent replaced; "" if it is none."""
    given = environment("TRACEPARENT")
    match = given and re.match(
        r"(00-(?!0{32})[0-9a-f]{32}-)((?!0{16})[0-9a-f]{16})(-[0-9a-f]{2})\Z", given)
    return f"{match[1]}{parent or match[2]}{match[3]}" if match else ""


def who() -> Json:
    """Say who runs this, as whom and where, and what probably started it.

    The person is SUDO_USER (believed as root; others can invent it), else the login's, else ours.
    """
    import pwd
    uid = os.geteuid()
    with suppress(OSError, ValueError):
        login = int(read_file("/proc/self/loginuid", 64))
        if login != (1 << 32) - 1:  # -1: a service
            uid = login
    person = environment("SUDO_USER")
    with suppress(KeyError):
        if person and os.geteuid() == 0:
            uid = pwd.getpwnam(person).pw_uid
    started_by = [("ansible", os.path.basename(sys.argv[0]).startswith("AnsiballZ_")),
                  ("systemd", environment("INVOCATION_ID")),
                  ("ssh", environment("SSH_CONNECTION")),
                  ("terminal", sys.stdin and sys.stdin.isatty()),
                  ("cron", environment("SHELL") == "/bin/sh" and environment("LOGNAME")
                   and not environment("TERM")),
                  ("script", True)]
    by = {"user": user_name(uid), "uid": uid, "as": user_name(), "host": os.uname().nodename,
          "pid": os.getpid(), "trigger": next(name for name, is_so in started_by if is_so)}
    if traceparent():
        by["traceparent"] = traceparent()
    return by


def process_is_alive(pid: int) -> bool:
    """Tell whether a process exists, whoever owns it."""
    try:
        os.kill(pid, 0)
    except OSError as error:
        return error.errno == errno.EPERM
    return True


def sockets(port: int, state: str) -> List[str]:
    """List the inodes of TCP sockets on a local port; state 0A: listening, 01: established."""
    tables = [read_file(f"/proc/net/{name}", MAX_STATE_BYTES).decode("ascii")
              for name in {"tcp", "tcp6"}.intersection(os.listdir("/proc/net"))]
    return re.findall(rf"(?m)^ *\d+: \w+:{port:04X} \S+ {state}(?: +\S+){{5}} +(\d+)",
                      "".join(tables))


Problem = Tuple[str, str]  # what is wrong, and what to do about it
Problems = Dict[str, Problem]  # by path


def owner_problem(path: str, status: os.stat_result, owners: Sequence[int] = (), *,
                  spare_root: bool) -> Problems:
    """Say why others could have written a file; with `spare_root` members of group root may."""
    mode, others = stat.S_IMODE(status.st_mode), 0o022
    with suppress(OSError, AttributeError):
        # Under an access list the group's bits are the most that anybody in it may do.
        if spare_root and status.st_gid == 0 and \
                "system.posix_acl_access" not in os.listxattr(path, follow_symlinks=False):
            others = 0o002
    if status.st_uid not in (owners or (0, os.geteuid())):
        return {path: (
            f"{path} belongs to uid {status.st_uid}",
            f"chown root {path}, or run as its owner: sudo -u '#{status.st_uid}' deploy.py ...")}
    is_sticky = stat.S_ISDIR(status.st_mode) and mode & stat.S_ISVTX
    if mode & others and not is_sticky and not stat.S_ISLNK(status.st_mode):
        return {path: (f"{path} is writable by group or others (mode {mode:04o})",
                       f"chmod go-w {path}")}
    return {}


def trust_problems(path: str, owners: Sequence[int] = (), *, spare_root: bool = False) -> Problems:
    """Say, by path, why others could have written a file.

    Follows the path as the kernel does: each directory, link and file on it must belong to one of
    `owners` (by default root and us), and not be writable by group or others.
    """
    problems: Problems = {}
    place = "/"
    links = 0
    ahead = os.path.abspath(path).split("/")[::-1]
    while ahead:
        # No link is left in `place`: `..` leads where it leads the kernel.
        place = os.path.normpath(os.path.join(place, ahead.pop()))
        try:
            status = os.lstat(place)
        except OSError:
            continue  # missing or unreadable: other checks report that
        problems.update(owner_problem(place, status, owners, spare_root=spare_root))
        if stat.S_ISLNK(status.st_mode) and links < MAX_JUDGED_LINKS:
            links += 1
            target = os.readlink(place)
            ahead += target.split("/")[::-1]
            place = "/" if target.startswith("/") else os.path.dirname(place)
    return problems


# -- commands ----------------------------------------------------------------

class CommandResult:
    """How a command ended: exit code (negative: the signal), and the last lines it wrote."""

    exit_code = 127
    timed_out = False
    seconds = 0.0
    rest = b""  # an unfinished line

    def __init__(self, argv: Sequence[str], directory: str, mask: Callable[[str], str],
                 on_line: Optional[Callable[[str], Any]]) -> None:
        self.argv = list(argv)
        self.directory = directory
        self.tail: List[str] = []
        self._mask = mask
        self._on_line = on_line

    def take(self, data: bytes) -> None:
        """Take a piece of output: mask, cut and pass on its whole lines; keep the last."""
        *lines, rest = (self.rest + data).split(b"\n")
        self.rest = rest[:MASKED_BYTES]
        for line in lines:
            text = self._mask(line[:MASKED_BYTES].decode("utf-8", "backslashreplace"))
            self.tail.append(text.rstrip("\r")[:OUTPUT_LINE_CHARACTERS])
            if self._on_line:
                self._on_line(self.tail[-1])
        del self.tail[:-OUTPUT_TAIL_LINES]

    @property
    def ok(self) -> bool:
        """Tell whether it ended by itself with exit code 0."""
        return self.exit_code == 0 and not self.timed_out

    def verdict(self) -> str:
        """Say in words how it ended."""
        if self.timed_out:
            took = format_seconds(self.seconds)
            return f"timed out after {took} and was killed with its children"
        if self.exit_code < 0:
            names = {int(number): number.name for number in signal.Signals}
            return f"was killed by {names.get(-self.exit_code, f'signal {-self.exit_code}')}"
        return f"exited with code {self.exit_code}"


def command_path() -> str:
    """Return PATH with the system directories that cron and systemd leave out."""
    present = environment("PATH").split(":") if environment("PATH") else []
    return ":".join(present + [entry for entry in EXTRA_PATH.split(":") if entry not in present])


def base_environment() -> Dict[str, str]:
    """Return the small environment of every child."""
    return {"PATH": command_path(), "HOME": environment("HOME") or "/", "LANG": "C.UTF-8"}


def program_places(name: str, directory: str, path: str) -> List[str]:
    """List the paths where a program started in `directory` is looked for, up to the one it has.

    Whoever can write to an earlier one could put a program there.
    """
    places: List[str] = []
    for entry in path.split(":") if "/" not in name else [""]:
        places.append(os.path.join(directory, entry, name))
        if os.path.isfile(places[-1]) and os.access(places[-1], os.X_OK):
            break
    return places


def find_command(name: str) -> Optional[str]:
    """Find a program: a bare name in the command path, anything else as it stands."""
    place = program_places(name, "", command_path())[-1]
    return place if os.path.isfile(place) and os.access(place, os.X_OK) else None


def account(kind: str, name: str, option: str) -> Any:
    """Look up a user or group; UsageError, naming the option, if it is missing."""
    import grp
    import pwd
    try:
        return pwd.getpwnam(name) if kind == "user" else grp.getgrnam(name)
    except KeyError:
        raise UsageError(f"{kind} {name!r} does not exist on this host",
                         f"create it, or correct {option}")


def become_user(name: str) -> Callable[[], None]:
    """Return a function that makes a child run as `name`, with all its groups."""
    entry = account("user", name, "run_as in [hooks]")
    # Not between fork and exec: a name service may lock, or load libraries.
    groups = os.getgrouplist(entry.pw_name, entry.pw_gid)

    def change() -> None:
        os.setgroups(groups)
        os.setgid(entry.pw_gid)
        os.setuid(entry.pw_uid)
    return change


POLL_SECONDS = 0.02
KILL_AFTER_SECONDS = 5.0
READ_BYTES = 1 << 14  # read before each look for signals; every byte may be a line
DRAIN_READS = 64  # 1 MiB, all that a pipe can hold; its writer may never stop


def run_command(argv: Sequence[str], *, interrupts: "Interrupts", timeout_seconds: float,
                directory: str = "/", environ: Optional[Dict[str, str]] = None, stdin: Any = None,
                kill_after_seconds: float = KILL_AFTER_SECONDS, run_as: str = "",
                mask: Callable[[str], str] = str, on_line: Optional[Callable[[str], Any]] = None,
                begun: Optional[Callable[[int], Any]] = None,
                lasts: Callable[[Any], bool] = lambda process: process.poll() is None,
                ) -> CommandResult:
    """Run a command to its end, without a shell, in a session of its own; stdin is a file.

    `environ` is the whole environment.  When the time is up, on a signal or any error, the whole
    group is killed.  What cannot be started gives exit code 127 and says why in `tail`.  A child
    that holds its stdout is not waited for, unless `lasts` says so.
    """
    import subprocess
    result = CommandResult(argv, directory, mask, on_line)
    change = become_user(run_as) if run_as else None
    # `begun` is told the group in the child, before the program can run (no other thread works
    # now, so no lock is held there), and here again: the child's memory is not ours.
    note_and_change = lambda: (begun(os.getpid()), change and change())
    started_seconds = time.monotonic()
    try:
        process: Any = subprocess.Popen(
            result.argv, bufsize=0, env=environ or base_environment(), cwd=directory,
            stdin=stdin or subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            start_new_session=True, preexec_fn=note_and_change if begun else change)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        result.tail = [f"cannot start {argv[0]}: {reason(error)}"]  # see PROBE_HINTS
        return result
    output = process.stdout
    os.set_blocking(output.fileno(), False)
    watched = [output.fileno()]
    try:
        if begun:
            begun(process.pid)
        while lasts(process) and not result.timed_out:
            left_seconds = timeout_seconds - (time.monotonic() - started_seconds)
            result.timed_out = left_seconds <= 0
            if interrupts.wait(min(POLL_SECONDS, left_seconds), *watched):
                data = output.read(READ_BYTES)
                result.take(data or b"")
                if data == b"":  # it is about to end; speed: `wait` looks every 1 ms, not 20
                    watched = []
                    with suppress(subprocess.TimeoutExpired):
                        process.wait(POLL_SECONDS)
    finally:
        result.seconds = time.monotonic() - started_seconds  # killing it is not its time
        for number in (signal.SIGTERM, signal.SIGKILL) if process.poll() is None else ():
            # KILL also when the leader is gone: its children may have ignored TERM.  What sudo
            # started is another user's: the wait for it ends.
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, number)
            with suppress(subprocess.TimeoutExpired):
                process.wait(kill_after_seconds)
        pieces = iter(lambda: output.read(READ_BYTES) or b"", b"")
        result.take(b"".join(itertools.islice(pieces, DRAIN_READS)))
        if result.rest:
            result.take(b"\n")
        output.close()
    result.exit_code = -signal.SIGKILL if process.returncode is None else process.returncode
    return result


def processes(name: str) -> Iterator[Tuple[int, bytes]]:
    """Yield the pid and one readable file in /proc of each process."""
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError):
            yield int(pid), read_file(f"/proc/{pid}/{name}", MAX_STATE_BYTES)


def end_groups(find: Callable[[], Optional[Set[int]]]) -> None:
    """End the process groups that `find` returns, until that is None: TERM, and KILL after 2 s."""
    kills_seconds, sent = time.monotonic() + 2.0, set()
    for groups in iter(find, None):
        left_seconds = kills_seconds - time.monotonic()
        number = signal.SIGTERM if left_seconds > 0 else signal.SIGKILL
        for group in groups:
            if (group, number) not in sent:
                sent.add((group, number))
                with suppress(OSError):  # it has ended, or is another user's
                    os.killpg(group, number)
        if left_seconds < -KILL_AFTER_SECONDS:
            return
        time.sleep(POLL_SECONDS)


def end_group(group: int, deploy_id: str) -> None:
    """End what is left of a process group of a run, but no other that has its number by now."""
    mark = f"\0DEPLOY_ID={deploy_id}\0".encode("ascii")

    def find() -> Optional[Set[int]]:
        for pid, environ in processes("environ"):
            with suppress(OSError):
                if mark in environ and os.getpgid(pid) == group:
                    return {group}
        return None
    end_groups(find)


def end_children() -> None:
    """End all descendants of this process, which is their subreaper."""
    def find() -> Optional[Set[int]]:
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return None
        # Behind the name, which may hold anything: state, parent, group (proc(5)).
        fields = [line.rpartition(b")")[2].split() for _, line in processes("stat")]
        return {int(group) for _, parent, group, *_ in fields if int(parent) == os.getpid()}
    end_groups(find)


# -- threads and signals -----------------------------------------------------

def start_thread(work: Callable[[], None]) -> Any:
    """Do work in a daemon thread; OSError where none can be started.

    Returns an event that is set once the work is done.  Up to Python 3.9 a thread that ends calls
    pthread_exit(3), and the C library aborts the whole process when it cannot load libgcc_s then:
    so it is loaded before, and where an image has none, a thread that is done sleeps on.
    """
    import threading
    done = threading.Event()
    may_end = sys.version_info >= (3, 10)
    if not may_end:
        with suppress(ImportError, OSError):
            import ctypes
            may_end = bool(ctypes.CDLL("libgcc_s.so.1"))

    def run() -> None:
        try:
            work()
        finally:
            done.set()
            while not may_end:
                time.sleep(3600)

    try:
        threading.Thread(target=run, daemon=True).start()
    except RuntimeError as error:
        # As fork(2) fails at the limit of processes, which counts threads, too.
        raise OSError(errno.EAGAIN, str(error))
    return done


class Interrupts:
    """Turns SIGINT, SIGTERM and SIGHUP into Interrupted, where stopping is safe.

    A signal is noted and wakes a `wait`; `check` raises for it, but not while this `is_closed`, as
    on the way back: what came meanwhile counts afterwards.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    is_closed = False
    _pending = 0
    _waking = -1  # can be read once a signal has come

    def install(self) -> None:
        """Take over the signals, except where the starter has them ignored (nohup)."""
        self._waking, writing = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(writing)
        # Where the starter ignores it, exit codes of children are lost, and subprocess says 0.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for number in self.SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._handle)

    def _handle(self, number: int, frame: Any) -> None:
        self._pending = self._pending or number

    def check(self) -> None:
        """Raise Interrupted if a signal has come."""
        if self._pending and not self.is_closed:
            number, self._pending = self._pending, 0
            raise Interrupted(number)

    def wait(self, seconds: float, *descriptors: int) -> List[int]:
        """Wait at most so long until a descriptor can be read; a signal ends it as `check` does."""
        import select
        ends_seconds = time.monotonic() + min(seconds, LONGEST_SECONDS)
        poll = select.poll()
        for descriptor in {self._waking, *descriptors} - {-1}:
            poll.register(descriptor, select.POLLIN)
        while True:
            self.check()
            left_seconds = ends_seconds - time.monotonic()
            ready = [descriptor for descriptor, _ in poll.poll(max(0.0, left_seconds) * 1000)]
            if self._waking in ready:
                # The bytes have only woken us: the handler has noted the number.
                os.read(self._waking, 4096)
                ready.remove(self._waking)
                self.check()
            if ready or left_seconds <= 0:
                return ready


# ============================================================================
# 5  Options
#    The tables of kinds of values, options, commands and flags.  INI keys, variables,
#    help, the example file and the README are made from them.
# ============================================================================

CANDIDATE_PORT = "${DEPLOY_CANDIDATE_PORT}"  # replaced in a command, and in what asks it
OF_SLOTS = ("${slot}", "${port}")
KEY_LITERAL = re.compile(r"RW[\w+/=]{40,}\Z")  # of minisign or signify; else a path
QUOTES = " '\"[](){}"
_SECONDS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
# Text in quotes or behind a backslash, which a shell does not interpret either.
_QUOTED = r"(?s)\\.|'[^']*'|\"((?:\\.|[^\"\\])*)\""
_SHELL_SYNTAX = (
    r"[0-9]*>&[0-9-]*|&&|\|\||[|;&<>*?`]|\$\w+|\$[({?@#!$-]|(?<!\S)~(?=/|\s|\Z)")
SHELL_WORDS = (". : alias bg bind builtin case cd declare eval exec exit export fg for function "
               "hash history if jobs let local popd pushd read readonly return set shift shopt "
               "source times trap type typeset ulimit umask unalias unset until wait while { ( !"
               ).split()


def _duration(text: str) -> float:
    number = text.rstrip("hms")
    seconds = float(number) * _SECONDS[text[len(number):]]
    if seconds > LONGEST_SECONDS:
        raise ValueError(f"expected at most {LONGEST_SECONDS // 3600}h")
    return seconds


def _moment(text: str) -> Callable[[float, int], float]:
    """Read a point in time; returns a function of now and of a duration's sign (-1: ago)."""
    if text[-1] in _SECONDS:
        span_seconds = float(text[:-1]) * _SECONDS[text[-1]]
        return lambda now_seconds, sign: now_seconds + sign * span_seconds
    import calendar
    whole = text + "0000-00-00T00:00:00Z"[len(text):]
    with suppress(ValueError):
        seconds = float(calendar.timegm(time.strptime(whole, "%Y-%m-%dT%H:%M:%SZ")))
        return lambda now_seconds, sign: seconds
    raise KeyError(text)  # it looks like a time, and is none


def _plain(text: str) -> str:
    """Refuse other formats' quotes, brackets and comments: they would be part of the value."""
    if re.match(r"(?s)['\"\[({]|.*\s[#;]", text):
        right = re.split(r"\s+[#;]", text)[0].strip(QUOTES)
        raise ValueError("a comment needs a line of its own, and quotes or brackets would be part "
                         f"of it; write {right}")
    if "\n" in text:
        raise ValueError("expected one line")
    return text


def _path(text: str) -> str:
    if re.search(r"\A~|\$[A-Za-z_{(]", text):
        raise ValueError("`~` and `$NAME` are not replaced here; write the path in full")
    return native(_plain(text)) if text else ""


def _relative(text: str) -> str:
    path = os.path.normpath(_path(text))
    longest = max(len(os.fsencode(part)) for part in path.split("/"))
    if re.match(r"/|\.\.?(/|\Z)", path) or re.search(r"[\0-\x1f]", path) \
            or longest > MAX_NAME_BYTES or len(os.fsencode(path)) > MAX_PATH_BYTES:
        raise ValueError(f"expected a relative path that stays inside, not {text!r}")
    return path


def _argv(text: str, filled_in: str = "(?!)") -> List[str]:
    """Split a command as a shell would; ValueError, with a replacement, for what needs one."""
    import shlex
    words = shlex.split(text)
    # Within double quotes a shell still interprets `$` and backquotes.
    bare = re.sub(_QUOTED, lambda quoted: "_" + "".join(
        re.findall(r"\$\w+|\$[({]|`", quoted.group(1) or "")), re.sub(filled_in, "", text))
    match = re.search(_SHELL_SYNTAX, bare)
    if match:
        raise ValueError(f"{match.group()} is for a shell, and none runs here; write sh -c "
                         f"{shlex.quote(text)}, or put it in single quotes where it is meant "
                         "as it stands")
    if words and (words[0] in ["", *SHELL_WORDS] or re.match(r"[A-Za-z_]\w*=", words[0])):
        raise ValueError(f"{words[0]} is no program but for a shell to do; write sh -c "
                         f"{shlex.quote(text)}, and a variable as NAME = value into [env]")
    return words


_DAYS = ["mon", "tue", "wed", "thu", "fri", "sat", "sun"]
_DAY = f"(?:{'|'.join(_DAYS)})"
_HOUR = "(?:[01][0-9]|2[0-3]):[0-5][0-9]"
_DATE = "[0-9]{4}-[0-9]{2}-[0-9]{2}"
_WINDOW = (rf"(?:allow|deny)(?:\s+({_DAY}(?:[,-]{_DAY})*))?(?:\s+({_HOUR})-({_HOUR}|24:00))?"
           rf"(?:\s+({_DATE})\.\.({_DATE}))?\s*(?:#.*)?\Z")


def _window(text: str) -> Tuple[str, Callable[[Any, int], bool]]:
    """Read a window: its line, and a function of day and minute: whether it is open."""
    match = re.match(_WINDOW, text)
    if not match or (match[4] or "") > (match[5] or ""):
        raise ValueError("expected allow|deny [mon-fri] [HH:MM-HH:MM] [date..date] [# why], not "
                         + text)
    days, begin, end, first, last = match.groups()
    spans = [(_DAYS.index(part[:3]), _DAYS.index(part[-3:]))
             for part in (days or "mon-sun").split(",")]
    opens, closes = (int(clock[:2]) * 60 + int(clock[3:])
                     for clock in (begin or "00:00", end or "24:00"))
    closes += 1440 if closes <= opens else 0  # over midnight
    return text, lambda day, minute: (
        opens <= minute < closes and (first or "") <= day.isoformat() <= (last or "9999")
        and any((day.weekday() - low) % 7 <= (high - low) % 7 for low, high in spans))


def _regex(text: str) -> str:
    try:
        re.compile(text[1:] if text.startswith("!") else text)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"not a regular expression: {error}")
    return text


def _statuses(text: str) -> List[Tuple[int, int]]:
    spans = []  # speed: without a pattern, which every start would compile for the default
    for span in text.replace(",", " ").split():
        spans.append((int(span[:3]), int(span[-3:])))
        if span[:3] > span[-3:]:
            raise ValueError("a range ends before it begins")
    return spans


def _address(text: str) -> Tuple[str, int]:
    host, _, port = text.rpartition(":")
    return host.rpartition("/")[2].strip("[]"), int(port)


# kind, its name in the documentation, what an error says was expected, the pattern of the whole
# text.  A kind that is not here is a choice, written `one|two|three`.
KIND_TABLE = r"""
text        text                         -  -
name        text                         -  -
names       one a line                   -  -
list        one a line                   -  -
path        path                         -  -
private     path                         -  -
paths       paths, one a line            -  -
key         key or its file              -  -
keys        keys or their files, one a line  -  -
relative    relative path                -  -
relatives   relative paths, one a line   -  -
argv        command                      -  -
filled      command                      -  -
probe_argv  command                      -  -
commands    commands, one a line         -  -
regex       regular expression           -  -
unit        systemd unit  the name of one unit; another one is another [service:NAME]
    (?!-)[^,/*?\[]*
int         number        a whole number, 0 or more, of at most 18 digits  [0-9]{1,18}
times       number        a whole number, 1 or more                   0*[1-9][0-9]{0,17}
factor      number        a number such as 1.5, 1 or more             [1-9][0-9]{0,8}(\.[0-9]{1,9})?
share       number        a share between 0 and 1                     0(\.[0-9]{1,9})?|1(\.0{1,9})?
size        size          a size such as 64k, 10M or 2G               [0-9]{1,12}[kKMGT]?
duration    duration      a duration such as 500ms, 3s, 2m or 1h      @TIME@
limit       duration      a duration such as 3s or 2m, more than 0s   (?=.*[1-9])@TIME@
moment      time          a time such as 2026-11-30T06:00:00Z or 2026-11-30, or such as 7d
    [0-9]{1,6}[smh]|[0-9]{1,4}[dw]|[0-9]{4}-[0-9]{2}-[0-9]{2}(T[0-9:]{8}Z)?
bool        yes or no     yes or no      (?i)yes|true|on|1|no|false|off|0
mode        file mode     a file mode such as 0640                    0?[0-7]{3}
slot        port          a port, 1 to 65535                          @PORT@
port        auto or a port  auto or a port from 1 to 65535            auto|@PORT@
statuses    status codes  HTTP status codes such as 200-299, 301      \s*@CODE@([\s,]+@CODE@)*\s*
address     [host:]port   PORT or HOST:PORT                           ([^\s,]*:)?@PORT@
addresses   [host:]port, one a line      -  -
syslog      /dev/log or udp://ADDRESS:PORT  a socket's path, or udp://ADDRESS:PORT (not a name)
    /.*|udp://(\[[0-9A-Fa-f:.]+\]|[0-9.]+):@PORT@
collector   URL, or environment  http://HOST:PORT, https://HOST/... or environment
    environment|https?://[^\s/@]+(/[^\s@]*)?
events      events        some of @NAMED@                             ((@EVENTS@)([\s,]+|\Z))+
pattern     text          @v where the version stands                 .*@v.*
window      window                       -  -
windows     windows, one a line          -  -
flag        file name     one name of letters, digits, `.`, `_`, `-`, and none of deploy.py's own
    (?!(current|releases|shared|slots|\.deploy|\.\.?)\Z|\.current\.)[\w.-]{1,50}
digest      digest        the 64 hexadecimal digits that sha256sum prints  (sha256:)?[0-9A-Fa-f]{64}
version     version       letters, digits and . _ + ~ -, at most 100, and no word such as current
    (?!(current|previous|latest)\Z)[A-Za-z0-9][A-Za-z0-9._+~-]{0,99}
signal      name of a signal  the name of a signal, such as HUP       (?i)(SIG)?[A-Z0-9]+
"""
# How the text of a kind becomes a value; a kind that is not here stays text.  Raises ValueError
# with a text of its own, or KeyError for that of the table.
READERS: Dict[str, Callable[[str], Any]] = {
    "name": _plain, "unit": _plain, "pattern": _plain, "relative": _relative,
    "path": _path, "private": _path, "window": _window, "address": _address,
    "key": lambda text: text if KEY_LITERAL.match(text) else _path(text),
    "int": int, "times": int, "slot": int, "factor": float, "share": float,
    "port": lambda text: int(text.replace("auto", "0")), "mode": lambda text: int(text, 8),
    "size": lambda text: int(text.rstrip("kKMGT")) << 10 * ("KMGT".find(text[-1].upper()) + 1),
    "duration": _duration, "limit": _duration, "moment": _moment, "regex": _regex,
    "bool": lambda text: text.lower() in ("yes", "true", "on", "1"), "statuses": _statuses,
    "argv": _argv, "filled": lambda text: _argv(text, re.escape(CANDIDATE_PORT)),
    "probe_argv": lambda text: _argv(text, "|".join(map(re.escape, (CANDIDATE_PORT, *OF_SLOTS)))),
    "syslog": lambda text: _path(text) if text[0] == "/" else _address(text),
    "events": lambda text: text.replace(",", " ").split(),
    "signal": lambda text: signal.Signals["SIG" + text.upper().replace("SIG", "")].name[3:],
}


def read_table(columns: int, text: str, **texts: str) -> Iterator[List[str]]:
    """Read rows of cells two or more spaces apart, `-` for none; an indented line continues."""
    text = re.sub("@([A-Z]+)@", lambda match: texts[match.group(1)], text)  # @NAME@ is one of them
    for row in re.sub(r"\n +", "  ", text.strip()).split("\n"):
        cells = re.split(r" {2,}", row, maxsplit=columns - 1)
        yield ["" if cell == "-" else cell for cell in cells]


_PORT = (r"(?!0)([0-9]{1,4}|[1-5][0-9]{4}|6[0-4][0-9]{3}|65[0-4][0-9]{2}|655[0-2][0-9]"
         r"|6553[0-5])")
KINDS = {kind: row for kind, *row in read_table(
    4, KIND_TABLE, PORT=_PORT, TIME=r"[0-9]{1,9}(\.[0-9]{1,9})?(ms|s|m|h)",
    CODE=r"[1-5][0-9]{2}(-[1-5][0-9]{2})?", EVENTS="|".join(dict(NOTIFY_EVENTS)),
    NAMED=", ".join(dict(NOTIFY_EVENTS)))}

# Of each kind of list: the kind of its lines, and a pattern that shows one to hold several.
LISTS = {"names": ("name", r"[\s,]"), "list": ("path", r",|\A- "), "paths": ("path", r",|\A- "),
         "keys": ("key", r",|\A- "), "relatives": ("relative", r",|\A- "),
         "addresses": ("address", r"[\s,]"), "commands": ("argv", r"\A\Z"),
         "windows": ("window", r"\A\Z")}


def read_value(kind: str, text: str) -> Any:
    """Read a text as a kind of value; ValueError says what was expected."""
    if kind in LISTS:
        item, apart = LISTS[kind]
        lines = [line.strip() for line in text.split("\n") if line.strip()]
        for line in lines:
            if re.search(apart, line) and not re.search(r"\s[#;]", line):
                parts = [part.strip(QUOTES) for part in re.split(apart, line)]
                right = " and ".join(filter(None, parts))
                raise ValueError(f"expected one a line; write {right} on a line of its own each")
        return [read_value(item, line) for line in lines]
    choices = kind.replace("|", ", ")
    _, expected, pattern = KINDS.get(kind, [choices, choices, kind])
    with suppress(KeyError):  # it has the form, but there is none
        if re.fullmatch(pattern or "(?s).*", text):
            return READERS.get(kind, str)(text)
    raise ValueError(f"expected {expected}")


def seconds_of(text: str) -> float:
    """Read an RFC 3339 time, to the second; ValueError for anything else."""
    import calendar
    match = re.fullmatch(r"(\d{4})-(\d\d)-(\d\d)T(\d\d):(\d\d):(\d\d)(?:\.\d+)?"
                         r"(?:Z|([+-]\d\d):(\d\d))", text)
    if not match:
        raise ValueError(f"{text!r} is no time such as 2026-11-30T06:00:00Z")
    *moment, hours, minutes = match.groups("0")
    ahead_seconds = int(hours) * 3600 + int(hours[0] + minutes) * 60
    return float(calendar.timegm(tuple(map(int, moment))) - ahead_seconds)


class Option(SimpleNamespace):  # speed: a NamedTuple costs every start 0.25 ms
    """One option: its place in the INI, how its text is read, what it means."""

    section: str  # `probe:*` may be given many times, each with a name
    key: str  # `*` or `json.*` stands for keys that the operator chooses
    kind: str
    default: str
    help: str
    takes: str  # what sort of text, in words
    value: Any  # the default, read


# Each section with what it is for, then its options: key, kind, default, help.
OPTION_TABLES = """\
[deploy] what is deployed, and where
application       name       -       name of what is deployed; default: the root's last component
root              path       -       directory that holds current, releases, shared and .deploy
keep_releases     int        5       good releases kept; current, previous, pinned ones always stay
shared_dirs       relatives  -       directories linked from shared/ into releases; made if missing
shared_files      relatives  -       files linked from shared/ into every release; they must exist
auto_rollback     bool       yes     roll back when anything fails after activation
lock_wait         duration   0s      how long to wait for another run to finish
min_free          size       256M    free space that must be left after staging
durable           bool       yes     sync every release to disk before it is published
mutable           list       -       globs of what the running service may write in a release
group             name       -       group whose members share the root; all but root may deploy
readable  owner|group|all  owner     who may look: status, releases, history, show, verify
app_user          name       -       user that the directories of writable are given to (root only)
writable          relatives  -       directories made for app_user in a release; they are mutable
delegated         names      -       commands that --delegate lets a person run; see there
inbox             path       -       directory of artifacts for it: who may write there may deploy
share_unchanged  no|reflink|hardlink  reflink  how a file that is as in the live release is stored

[artifact] how artifacts are named and verified
checksum  required|if-present|off  required  whether an artifact needs a SHA-256 to be compared with
match             pattern    -       file name pattern, @v is the version, such as myapp_@v.tar.gz
strip_components  int        0       leading directories to drop from every name, as tar does
symlinks  inside|refuse|any  inside  whether it may hold symlinks, and whether they may lead outside
allow_links       list       -       globs of targets outside that are meant: /usr/bin/python3*

[signature] who must have signed an artifact
verify  required|if-present|off  -   whether it needs one; required, once anything below is given
keys              keys       -       public keys of minisign, signify or openssl (cosign, DSSE)
allowed_signers   path       -       who may sign with ssh-keygen -Y, and with which key
namespace         name       deploy  what such a signature must have been made for
principal         names      -       whose of allowed_signers counts; default: anybody's
command           argv       -       exit 0 is yes; the bytes on stdin, $DEPLOY_SIGNATURE beside
legacy            bool       no      take what minisign signed without hashing it first

[limits] what an archive may cost
max_artifact      size       4G      largest artifact; 0 is no limit, here and below
max_files         int        250000  most members of an archive
max_file          size       4G      largest single file
max_expanded      size       16G     most bytes that may come out of an archive
max_ratio         int        200     most bytes that may come out for each compressed one, beyond 1G

[preflight] what the host must offer
require_commands  names      -       programs that must be found on PATH
require_env       names      -       environment variables that must be set and not empty
require_files     paths      -       files that must exist and be readable
free_ports        addresses  -       TCP ports that nothing may listen on yet
user              name       -       user that deploy.py must be run as
accept_risk       paths      -       paths that root believes although others may change them

[env] environment of hooks and commands
*                 text       -       environment variable handed to hooks and commands

[hooks] commands run at named points, each without a shell, in the release
pre_stage         commands   -       before the artifact is unpacked
post_stage        commands   -       in the unpacked release, before it is sealed; may add to it
pre_activate      commands   -       before the switch; a failure leaves everything as it was
post_activate     commands   -       right after the switch, before services restart
post_deploy       commands   -       after the probes passed
on_failure        commands   -       after a failure, when undoing or rolling back is done
pre_rollback      commands   -       before the switch back
post_rollback     commands   -       after the previous release is live again
timeout           limit      10m     for each hook command; then TERM and KILL to its process group
run_as            name       -       user that hooks and commands run as (root only)

[migrate] the data follow the release; each command under the rules for hooks, in the release
check             argv       -       exit code 0: nothing to migrate, 1: something; default: always
backup            argv       -       saves the data, before up
up                argv       -       migrates the data, before the switch
down              argv       -       undoes it, in the release that is left
on_rollback  down|keep  down         what rollback, and activate of an earlier release, do about it
timeout           limit      1h      for each command; then TERM and KILL to its process group

[maintenance] a flag file by which a web server shows its maintenance page
during  never|migrate|switch  never  put up by a run from before backup, or from before the switch
flag              flag       maintenance  its name in the root
retry_after       int        120     seconds that `maintenance serve` asks visitors to wait

[template:*] a file rendered into every release
source            relative   -       template in the release; $${name} in it is kept as ${name}
target            relative   -       where the result goes in the release
mode              mode       0644    file mode of the result

[vars] values for templates
*                 text       -       value for ${name} in templates

[candidate] the new release, started on a port of its own and asked before the switch
command           filled     -       starts it at ${DEPLOY_CANDIDATE_PORT}, by the rules for hooks
port              port       auto    port that it listens on; auto is a free one
timeout           limit      60s     longest time from its start to the verdict

[service:*] a service restarted after each switch: unit, pidfile and signal, or command
unit              unit       -       systemd unit to act on
pidfile           path       -       file that holds the process id to signal
signal            signal     HUP     signal for the process in pidfile
command           argv       -       command that restarts the service, under the rules for hooks
action  restart|reload|reload-or-restart|start|none  restart  what to do once current has changed
systemctl         argv       systemctl  how to call it: sudo systemctl, systemctl --user
after             names      -       services that go first
timeout           limit      60s     longest time the action may take
settle            duration   3s      time it must then stay up unchanged (systemd units, pidfiles)

[slots] the idle one of two slots starts the new release, then a proxy leads there
*                 slot       -       a slot's name, and the port its unit listens on; exactly two
unit              unit       -       a slot's systemd unit, such as shop@${slot}.service
include           text       -       text of slots/live.conf; ${slot} and ${port} are the live one's
reload            argv       -       has the proxy read it; under the rules for hooks, in the root
drain             duration   30s     how long the slot that is left may take to end its requests
systemctl         argv       systemctl  how to call it: sudo systemctl, systemctl --user
timeout           limit      60s     longest time a unit may take to start or stop
settle            duration   3s      time it must then stay up unchanged

[probe:*] a question put to the running service: url, tcp, command or service
url               text       -       HTTP or HTTPS URL to ask; of a slot: with ${slot} or ${port}
tcp               text       -       host:port or unix:/path to connect to
command           probe_argv  -      command that must exit with 0, under the rules for hooks
service           name       -       name of a [service:NAME] that must be up
connect           text       -       host:port or unix:/path to send the url's connection to
status            statuses   200-299  HTTP status codes that are healthy
body              regex      -       must be in the answer (or the output); a leading ! negates
json.*            text       -       value at this dotted path of the JSON answer
expect_header.*   regex      -       must be found in this header of the answer
release           text       -       where the answer has its version: json:PATH, header:NAME, body
method            text       GET     HTTP method
header.*          text       -       request header
auth_file         private    -       file with the Authorization header's value, or user:password
redirects         int        0       redirects to follow, on the same host
max_body          size       64k     how much of the answer is read
tls_verify        bool       yes     check the certificate and its name
tls_ca            path       -       CA certificates to trust instead of the system's
tls_cert          path       -       client certificate
tls_key           path       -       key of the client certificate
when  after|before|both|candidate  after  probe the new release, the host before, or the candidate
initial_delay     duration   0s      wait before the first try
period            duration   2s      wait between tries; shorter where the deadline is near
timeout           limit      3s      longest time of one try
deadline          limit      60s     longest time until it must be healthy
successes         times      2       tries in a row that must be healthy
soak              duration   0s      how long it must stay healthy afterwards
failures          times      3       tries in a row that end it, once the new release answers
backoff           factor     1.5     factor by which the wait grows after a failed try
period_max        duration   10s     longest wait between tries
jitter            share      0.1     random share added to or taken from each wait
required          bool       yes     no: a failure is only a warning

[policy] when, by whom and after what a release may go live; never asked on a way back
environment       name       -       what this host is part of, such as production
windows           windows    -       when; deny wins, and an allow means only then
timezone          name       UTC     zone of the windows, such as Europe/Berlin
approvals         int        0       how many must have approved of it, whoever runs this aside
approvers         path       -       who may approve, in ssh-keygen's allowed_signers format
promoted_from     name       -       environment in which it must have been live, by attestation
promoted_after    moment     -       how long it must have been live there
promoted_within   moment     -       how old the attestation may be
attesters         path       -       whose attestations count, in the same format
judge             argv       -       command that may say no, under the rules for hooks
sbom              bool       no      whether it needs an SBOM, in a signed SHA256SUMS
deny_licenses     list       -       globs of licenses that nothing in it may have, such as AGPL-*
deny_packages     names      -       globs of packages not to be in it: NAME, NAME@VERSION or purl
unknown_licenses  allow|warn|deny  warn  what is done about a package without a known license
builders          names      -       who may have built it, by signed provenance
sources           names      -       repositories it may have been built from, by signed provenance
override          bool       no      --override WHY may pass windows, approvals and promotion

[source] where sync fetches releases from
url               text       -       directory or https:// URL of the index, and of artifacts
index             name       SHA256SUMS  name of the index there; one that ends in .json is JSON
channel           name       -       channel of a JSON index, instead of the newest version
order        semver|uapi     semver  which version is newer, where no channel says so
prereleases       bool       no      take pre-releases too
token_file        private    -       file with a token, sent as Bearer to the url's host alone
header.*          text       -       request header, to the url's host alone
tls_ca            path       -       CA certificates to trust instead of the system's
tls_cert          path       -       client certificate
tls_key           path       -       key of the client certificate
proxy             text       none    none, environment, or the http:// URL of a proxy
timeout           limit      30s     longest time to wait for an answer, and for data after it
min_rate          size       1k      fewer bytes a second than this, over timeout, end a try
max_age           duration   -       longest time since the index was signed
insecure          bool       no      allow http; only where a configuration file says so
git               text       -       repository to take a commit of, instead of an index
ref               text       main    its branch, or tags (refs/tags/v*) of which the newest counts

[notify:*] somebody who is told how a run ended: by webhook, a chat, email or a command
type  webhook|slack|teams|discord|email|command  webhook  how it is told
events  events  @EVENTS@       what it is told of
text  text  ${application} on ${host}: ${event}: ${message}  what it is told, of the result's words
body              text       -       what is posted instead, with ${name} as in text (webhook)
url               text       -       HTTP or HTTPS URL to post to (webhook and chats)
url_file          private    -       file with the url, which is a secret itself
token_file        private    -       file with a token that is sent as such (Bearer; webhook)
header.*          text       -       request header, ${name} as in text (webhook)
tls_ca            path       -       CAs to trust instead of the system's (webhook and chats)
proxy   none|environment     none    whether https_proxy and no_proxy count (webhook and chats)
to                list       -       addresses to write to (email)
from              text       -       address to write from (email); default: deploy@HOST
smtp  text  localhost:25             host:port of a mail server that needs no login (email)
command           argv       -       command to run, under the rules for hooks (command)

[metrics] numbers for Prometheus
textfile_dir      path       -       node_exporter's textfile directory, for deploy_APPLICATION.prom

[trace] spans of each run that writes, for OpenTelemetry
otlp              collector  -       base URL of a collector that takes OTLP over HTTP

[log] where everything that is said is kept: a file, syslog, or both
file              path       -       log file to append to
syslog            syslog     -       syslog daemon: its socket, or another host's address
format            text|json  text    log lines as text or as JSON objects
"""


def read_options() -> Iterator[Tuple[str, str, Dict[str, Option]]]:
    """Yield each section's name, what it is for, and its options by key."""
    for part in OPTION_TABLES.split("\n\n"):
        heading, _, table = part.partition("\n")
        section, _, about = heading[1:].partition("] ")
        options = {}
        for key, kind, default, text in read_table(4, table, EVENTS=", ".join(DEFAULT_EVENTS)):
            takes = KINDS.get(kind, [kind.replace("|", ", ")])[0]
            value: Any = default.split()  # a list, or a command without quotes
            if kind not in LISTS and takes != "command":
                value = default and READERS.get(kind, str)(default)  # speed: not checked
            options[key] = Option(section=section, key=key, kind=kind, default=default, help=text,
                                  takes=takes, value=value)
        yield section, about, options


SECTIONS = tuple(read_options())
OPTIONS = {section: options for section, _, options in SECTIONS}

TRUSTED = {"keys", "allowed_signers", "command"}  # of [signature], what can vouch
_ANSWER_KEYS = ("body", "json", "release", "max_body")
# The kinds of probes, and the keys that only some kinds know: with any other kind such a key is a
# mistake, because nobody would check it.
PROBE_KINDS: Dict[str, Tuple[str, ...]] = {
    "url": ("connect", "status", "expect_header", "method", "header", "auth_file", "redirects",
            "tls_verify", "tls_ca", "tls_cert", "tls_key") + _ANSWER_KEYS,
    "tcp": (), "command": _ANSWER_KEYS, "service": ()}
# Of each of these texts, exactly one key must be given in such a section.
ONE_OF = {"service": ("unit pidfile command",), "probe": (" ".join(PROBE_KINDS),),
          "template": ("source", "target"), "candidate": ("command",), "migrate": ("up",),
          "slots": ("unit", "include", "reload")}

# command, an example, what it does
COMMAND_TABLE = """\
deploy      deploy shop-1.4.2.tar.gz  preflight, stage, activate, probe; rolls back if that fails
stage       stage shop-1.4.2.tar.gz  verify and unpack only; the release is `staged`
activate    activate 1.4.2  make a staged or earlier release live
rollback    rollback  re-activate the previous good release, or the one that is named
preflight   preflight shop-1.4.2.tar.gz  run every read-only check, and show them as a table
probe       probe --url http://127.0.0.1:8080/health --wait 30s  run probes now, or an ad-hoc one
verify      verify current  hash a release again and compare it with its manifest
status      status  show what is live, what it can go back to, and whether a person is needed
releases    releases  list the releases, newest first, `*` on the current one
history     history --limit 5  list the deployments, oldest first; --verify checks the hash chain
show        show latest  show one deployment with its steps, and the evidence where it failed
sync        sync --splay 10m  fetch the newest artifact of [source], and deploy it; or only --check
prune       --set deploy.keep_releases=3 -n prune  delete what keep_releases no longer keeps
pin         pin 1.4.1  protect a release from pruning
adopt       adopt 20261121101500  make a release known that another tool left: a rollback target
unpin       unpin 1.4.1  let a release be pruned again
hold        hold -m 'the sale is on' --until 12h  let nothing but rollback change what is live
unhold      unhold  let deployments change what is live again
flags       flags new_checkout=25%  show the feature flags, or set some: on, off, a share, a text
diff        diff previous  compare two releases by their manifests, the second is what is live
logs        logs web  show what the services wrote to the journal since the release went live
report      report --since 90d --format html -o report.html  how often, how well, how fast it went
recover     recover  finish or undo what a crash left; --to settles what cannot be decided
approve     approve shop-1.4.2.tar.gz --expires 24h  print what those sign who approve of it
attest      attest current  print what this host signs: that a release was live here
maintenance  maintenance on -m "new disks"  put the maintenance flag up (on, off), or serve the page
pack        pack build -o shop-1.4.2.tar.gz  pack a directory into a reproducible .tar.gz
config      config --example  show every option with its value and where it came from
help        help systemd  show what this program is, how a command is used, or another page
completion  completion bash  print what makes bash or zsh complete the words of this program
"""
COMMAND_HELP = {name: (text, example) for name, example, text in read_table(3, COMMAND_TABLE)}


class Flag(SimpleNamespace):
    """A flag or argument of the command line."""

    names: List[str]
    metavar: str  # empty: a switch; `[X]` need not be given, `X...` may repeat
    commands: List[str]  # empty: all, and it may stand before the command
    help: str
    dest: str  # argparse's name of its value
    kind: str  # by which its text is checked; empty: not at all
    option: str  # section.key of the option that it sets
    is_argument: bool


# names (=dest, or =the option that it sets), metavar (/kind), commands, help
# All commands share one namespace: a name that means something else elsewhere needs `=dest`.
FLAG_TABLE = """\
-h --help=show_help  -            -  show how it is used
--version=show_version  -         -  show the version
-c --config          FILE...      -  configuration file; may repeat, a later one wins
-n --dry-run         -            -  show the plan, change nothing
--json               -            -  print exactly one JSON object on stdout
-v --verbose         -            -  show every check and what each step looks at
-q --quiet           -            -  print nothing when nothing changed and nothing is wrong
--no-color           -            -  no colour (NO_COLOR is honoured too)
--set  SECTION.KEY=VALUE...       -  set one option; may repeat
--detailed-exitcode  -            -  exit 10 when something changed
--debug              -            -  show tracebacks
--delegate           FILE         -  must stand first: what root's FILE lets a person do, no more
-m --message         TEXT         -  why: kept in record and history, told to hooks and notifiers
artifact             ARTIFACT     deploy stage approve  archive or directory
artifact             [ARTIFACT]   preflight  archive or directory
release              RELEASE      activate pin unpin  @RELEASE@
release              RELEASE      adopt  name of a directory in releases/, or current
release              [RELEASE]    rollback  @RELEASE@; default: the previous good one
release              [RELEASE]    verify attest  @RELEASE@; default: current
release              RELEASE      diff  @RELEASE@
other                [RELEASE]    diff  @RELEASE@; default: current
service              [SERVICE]    logs  a configured service; default: all of them
-f --follow          -            logs  go on showing what they write
--until              TIME/moment  hold  2026-11-30T06:00:00Z, or a duration; default: until unhold
assignments          [NAME=VALUE...]  flags  flags to set; `NAME=` removes one
--sha256             HEX/digest   deploy stage preflight  digest the artifact must have
--signature          FILE         deploy stage preflight  its signature, wherever that lies
--release-version    V/version    deploy stage preflight pack  version, instead of the name's
--allow-downgrade    -            deploy stage preflight sync  take one older than what is live
-f --force           -            deploy stage preflight activate rollback prune sync recover
    insist: a bad or changed release, another application's root, pruning what was written to
--override           WHY          deploy activate sync preflight
    pass windows, approvals and promotion where [policy] lets you; it is recorded and told
--expires            TIME/moment  approve  until when the approval counts; default: 7d
--splay       DURATION/duration   deploy stage activate rollback prune recover sync
    wait first, this host's own share of DURATION: always the same, evenly spread over hosts
--check              -            sync  only look: exit 7 where something new waits, 0 where not
--version            V            sync  this version of the source's, instead of the newest
names                [NAME...]    probe  configured probes; default: all
--url                URL          probe config  ask this URL; with config --minimal: its probe's
--tcp                ADDRESS      probe  connect to host:port or unix:/path
--command=probe_command  PROGRAM  probe  run this program, with its arguments
--expect             KEY=VALUE...  probe  any key of [probe:NAME], without one; may repeat
--wait               DURATION/limit  probe  try until it is healthy, so long at most; default: once
--verify             -            history  check the hash chain
--since              TIME/moment  history report  2026-11-30, or a duration back, such as 7d
--format      text|csv|json|html  report  how it is written
--failed             -            history  only what failed
--operation          NAME         history  only this operation, such as deploy
--limit              N/int        history  newest entries to show, 20 without; 0 means all
id                   [ID]         show  id, prefix or number, or a release; default: the last one
--all                -            status  of every root in /etc/deploy/*.ini
--to                 RELEASE      recover  settle on this release, whatever the journal says
action               on|off|serve  maintenance  put it up, take it away, answer 503 with the page
--listen      HOST:PORT/address   maintenance  where `serve` listens
--page               FILE         maintenance  HTML that `serve` shows; default: a line of text
--health             PATH         maintenance  where `serve` answers 200; default: /healthz
directory            DIRECTORY    pack  directory to pack
-o --output          FILE         pack report  file to write; default: NAME[-V].tar.gz, or stdout
--keep-mtimes        -            pack  keep the files' own times, instead of one for all
--example            -            config  print a configuration file with every option
--minimal            -            config  print one of ten lines, to begin with
--unit               UNIT         config  its service, with --minimal
topic                [TOPIC]      help  systemd, cron, hooks, config, or a command
shell                bash|zsh     completion  whose script
--root=deploy.root   DIR          -  directory that holds current, releases, shared and .deploy
--wait-lock=deploy.lock_wait  DURATION  -  how long to wait for another run to finish
--log-file=log.file  FILE         -  log file to append to
--log-format=log.format  text|json  -  log lines as text or as JSON objects
"""


def read_flags() -> Iterator[Flag]:
    """Read the table of flags."""
    release = "id, unique prefix, version, digest prefix, current, previous or latest"
    for words, metavar, commands, about in read_table(4, FLAG_TABLE, RELEASE=release):
        spelled, _, dest = words.partition("=")
        metavar, _, kind = metavar.partition("/")
        names, option = spelled.split(), dest if "." in dest else ""
        if option or not dest:
            dest = names[-1].lstrip("-").replace("-", "_")
        yield Flag(names=names, metavar=metavar, commands=commands.split(), help=about, dest=dest,
                   kind=metavar if "|" in metavar else kind, option=option,
                   is_argument=spelled[0] != "-")


FLAGS = tuple(read_flags())


def nearest(name: str, names: Iterable[str], otherwise: str = "") -> str:
    """Suggest the most similar name; where there is none, list all."""
    import difflib
    known = {name.lower(): name for name in names}
    for similar in difflib.get_close_matches(name.lower(), list(known), n=1):
        return f"did you mean {known[similar]!r}?"
    return otherwise or f"there are {', '.join(known.values()) or 'none'}"


def options_of(section: str) -> Dict[str, Option]:
    """Return a section's options by key: `probe:web` has those of `probe:*`, itself no section."""
    return OPTIONS.get(re.sub(r":(?:[A-Za-z0-9_-]+|(\*))\Z", r":*\1", section), {})


def find_option(options: Dict[str, Option], key: str) -> Optional[Option]:
    """Return a section's row for a key as the operator wrote it, or None."""
    row = options.get(key) or options.get(re.sub(r"\..+\Z", ".*", key)) or options.get("*")
    return None if "*" in key else row


def unknown(section: str, key: str, origin: str) -> UsageError:
    """Make the error for an unknown section or key, suggesting the nearest name."""
    names, word, subject = list(options_of(section)), key, f"key {key!r} in [{section}]"
    if not names:
        names = [name.replace(":*", ":NAME") for name in OPTIONS]
        word, subject = section, f"section [{section}]"
    return UsageError(f"{origin}: unknown {subject}", nearest(word, names))


def spell(argv: Sequence[str]) -> str:
    """Write an argv as it would be typed into a shell."""
    import shlex
    return " ".join(shlex.quote(word) for word in argv)


def meaningless(values: Any, keys: Iterable[str], what: str) -> str:
    """Say which of these keys mean nothing to a section that gives them."""
    useless = [key for key in values.given if key in keys]
    plural = "" if len(useless) > 1 else "s"
    return f"{' and '.join(useless)} mean{plural} nothing to {what}" if useless else ""


def fill_in(section: Any, values: Dict[str, Any]) -> Any:
    """Copy a section with these texts replaced, wherever they stand."""
    text = json.dumps(vars(section))
    for place, value in values.items():
        text = text.replace(place, json.dumps(str(value))[1:-1])
    return SimpleNamespace(**json.loads(text))


# By section and key: the text given, and its origin (a file, or words without a slash).
Layer = Dict[Tuple[str, str], Tuple[str, str]]


class Settings:
    """Every option's value: `settings.deploy.root`, `settings.probe["web"].header["Accept"]`.

    A value that cannot be read is one of the `mistakes`, and its default is used.
    """

    def __init__(self, given: Layer, files: List[str]) -> None:
        self.given = given
        self.files = files
        self.delegate: Optional[str] = None  # the file of --delegate
        self.mistakes: List[UsageError] = []
        self.unread: List[Tuple[str, str]] = []  # (section, key) of what cannot be read
        self.rows: List[Tuple[str, str, str, str]] = []  # of all: section, key, text, origin
        declared = sorted({section for section, _ in given})
        for table in OPTIONS:
            kind, is_named, _ = table.partition(":")
            setattr(self, kind, {
                section[len(kind) + 1:]: self._section(section, OPTIONS[table])
                for section in declared if section.startswith(f"{kind}:")
            } if is_named else self._section(table, OPTIONS[table]))
        for probe in self.probe.values():
            probe.of_slot = any(place in json.dumps(vars(probe)) for place in OF_SLOTS)
        both, self.slots = self.slots, {}
        self.has_slots = bool(both.given)
        for name in filter(both.chosen.get, both.chosen):  # like a [service:NAME] with a unit
            places = dict(zip(OF_SLOTS, (name, both.chosen[name])))
            self.slots[name] = slot = fill_in(both, places)
            vars(slot).update(name=name, port=both.chosen[name], places=places, action="restart",
                              include=slot.include + "\n", pidfile="", command=[])

    def _section(self, section: str, options: Dict[str, Option]) -> Any:
        """Read one section; its `given` are the options that differ from their defaults."""
        kind, _, name = section.partition(":")
        values = SimpleNamespace(name=name, given=[])
        own = [(key, find_option(options, key)) for place, key in self.given if place == section]
        for key, option in options.items():
            prefix, is_chosen, _ = key.partition("*")
            attribute = prefix.rstrip(".") or "chosen"
            named = [other for other, row in own if row is option]
            # By the part of the key that `*` stands for; without `*` it is empty.
            read = {other[len(prefix):]: self._value(option, section, other) for other in named}
            if any(self.given[section, other][0] != option.default for other in named):
                values.given.append(attribute)
            if not read and not is_chosen:
                self.rows.append((section, key, option.default, "default"))
            setattr(values, attribute, read if is_chosen else read.get("", option.value))
        for group in ONE_OF.get(kind, ()):
            present = [key for key in group.split() if key in values.given]
            if len(present) != 1 and (name or values.given):
                wanted = ("exactly one of " if " " in group else "") + group.replace(" ", ", ")
                self.mistakes.append(self.wrong(
                    section, f"needs {wanted}, and has {' and '.join(present) or 'none'}"))
        return values.chosen if list(options) == ["*"] else values

    def _value(self, option: Option, section: str, key: str) -> Any:
        text, origin = self.given[section, key]
        self.rows.append((section, key, text, origin))
        value, directory = option.value, os.path.dirname(origin)
        try:
            if text != option.default:
                value = read_value(option.kind, text)
        except ValueError as error:
            self.unread.append((section, key))
            self.mistakes.append(UsageError(f"{origin}: [{section}] {key} = {text!r}: {error}",
                                            f"{option.key}: {option.help}"))
        if option.kind in ("paths", "keys"):
            return [path if KEY_LITERAL.match(path) else absolute(os.path.join(directory, path))
                    for path in value]
        if option.kind in ("path", "private") and value:
            value = absolute(os.path.join(directory, value))
            # What systemd hands over (LoadCredential=) replaces it.
            handed = os.path.join(environment("CREDENTIALS_DIRECTORY") or "/dev/null",
                                  section.rpartition(":")[2])
            if option.kind == "private" and os.path.exists(handed):
                value = handed
        return value

    def wrong(self, section: str, problem: str) -> UsageError:
        """Make the error for a section whose values do not go together."""
        origin = next(origin for (name, _), (_, origin) in self.given.items() if name == section)
        return UsageError(f"{origin}: [{section}] {problem}", f"correct the section [{section}]")

    def origin(self, section: str, key: str) -> str:
        """Say where a value came from."""
        return self.given.get((section, key), ("", "default"))[1]

    def command_line(self, text: str) -> str:
        """Write a command line for this root and configuration."""
        words = ["deploy.py"]
        for path in self.files:
            words += ["-c", absolute(path)]
        if self.delegate:
            words = ["sudo", "deploy.py", "--delegate", self.delegate]
        if self.deploy.root and self.origin("deploy", "root") not in self.files:
            words += ["--root", os.path.realpath(self.deploy.root)]
        return f"{spell(words)} {text}"

    def refuse_mistakes(self) -> None:
        """Raise a UsageError that lists all mistakes and hints."""
        if len(self.mistakes) == 1:
            raise self.mistakes[0]
        if self.mistakes:
            texts = [f"({number}) {mistake.message} [{mistake.hint}]"
                     for number, mistake in enumerate(self.mistakes, 1)]
            raise UsageError(f"{len(texts)} mistakes in the configuration: {'; '.join(texts)}",
                             "correct them all; deploy.py config --example shows every option")


def load_settings(files: Sequence[str], flags: Layer, assignments: Sequence[str],
                  *, refuse: bool = True) -> Settings:
    """Put the layers together: default, files, environment, flags, --set; a later one wins.

    UsageError lists all mistakes; without `refuse` they are left in the result's `mistakes`.
    """
    given: Layer = {}
    mistakes: List[UsageError] = []
    for path in files:
        read_ini(path, given, mistakes)
    # DEPLOY_<SECTION>_<KEY>, for sections without names, and for those that the files declare.
    sections = [section for section in OPTIONS if ":" not in section]
    sections += {section for section, _ in given if ":" in section}
    for name in environment_names():
        # DEPLOY_CANDIDATE_PORT sets an option, except in a command that a run has started.
        if not name.startswith("DEPLOY_") or (
                name == CANDIDATE_PORT[2:-1] and environment("DEPLOY_HOOK")):
            continue
        for section in sections:
            prefix = "DEPLOY_" + re.sub(r"[^A-Z0-9]", "_", section.upper()) + "_"
            options, key = options_of(section), name[len(prefix):]
            key = key.lower() if key.lower() in options else key
            if name.startswith(prefix) and (key in options or "*" in options):
                given[section, key] = environment(name), f"environment {name}"
    given.update(flags)
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        section, dot, key = name.strip().partition(".")  # a later `.` belongs to the key
        if not equals or not dot:
            mistakes.append(UsageError(f"--set {assignment!r}: expected SECTION.KEY=VALUE",
                                       "for example --set deploy.keep_releases=3"))
        elif not find_option(options_of(section), key):
            mistakes.append(unknown(section, key, "--set"))
        else:
            given[section, key] = value.strip(), "command line (--set)"
    settings = Settings(given, list(files))
    settings.mistakes[:0] = mistakes
    if not settings.signature.verify:
        trusted = TRUSTED.intersection(settings.signature.given)
        settings.signature.verify = "required" if trusted else "off"
    if refuse:
        settings.refuse_mistakes()
    return settings


def read_ini(path: str, given: Layer, mistakes: List[UsageError]) -> None:
    """Read a configuration file into a layer; add what is wrong to `mistakes`."""
    import configparser
    parser = configparser.RawConfigParser(
        delimiters=("=",), interpolation=None, default_section="\0none")
    parser.optionxform = str  # type: ignore  # keys keep their case
    try:
        text = read_file(absolute(path), MAX_CONFIG_BYTES).decode("utf-8-sig")
        if "\0" in text:  # no path or argument can hold one
            raise ValueError("it holds a NUL character")
        parser.read_string(text, path)
    except (OSError, ValueError, configparser.Error) as error:
        problem = " ".join(reason(error).split())
        if isinstance(error, configparser.ParsingError):
            # Not configparser's words: they quote the line, which may hold a password.
            number = getattr(error, "lineno", 0) or error.errors[0][0]
            problem = f"line {number} is none that can stand there"
        mistakes.append(UsageError(
            f"cannot read the configuration {path}: {problem}",
            "name a readable INI file in UTF-8: [section], then key = value or a continuation, "
            "each section and key once"))
        return
    for section in parser.sections():
        options = options_of(section)
        if not options:
            mistakes.append(unknown(section, "", path))
            continue
        if ":" in section:
            given[section, ""] = "", path  # declared, maybe nothing more
        for key, text in parser.items(section):
            if find_option(options, key):
                given[section, key] = text.strip(), path
            else:
                mistakes.append(unknown(section, key, path))


# ============================================================================
# 6  State
#    One root, by directory descriptors.  Only this section changes its links,
#    records, journal and history, each durably; sections 8 and 13 write what
#    lies in releases and shared/.  Last, what one run carries with it.
# ============================================================================

# -- directories, held open ------------------------------------------------

def open_own_file(path: str) -> int:
    """Open a regular file with one name, following no symlink; UsageError for all else."""
    with suppress(OSError), Directory(os.path.dirname(path)) as directory:
        with open_file(os.path.basename(path), os.O_NOFOLLOW, directory.descriptor) as stream:
            if os.fstat(stream.fileno()).st_nlink == 1:
                return os.dup(stream.fileno())
    raise UsageError(f"{path} is no regular file of one name", "copy the artifact itself there")


class Descriptor(AbstractContextManager):  # type: ignore
    """Something held open by descriptor until the end of a `with` block."""

    descriptor = -1

    def close(self) -> None:
        """Close the descriptor."""
        # Forgotten first: closed twice, the number could be another file's by then.
        descriptor, self.descriptor = self.descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def __exit__(self, *details: Any) -> None:
        self.close()


class Directory(Descriptor):
    """A directory held open; names are single components, and no symlink is followed."""

    def __init__(self, path: str, dir_fd: Optional[int] = None) -> None:
        self.descriptor = os.open(path, _DIRECTORY_FLAGS, dir_fd=dir_fd)

    def child(self, path: str, *, make: bool = False, mode: int = 0o755,
              group: int = -1) -> "Directory":
        """Open a directory below, name by name; `make` what is missing, for `group`."""
        deepest = Directory(".", self.descriptor)
        for name in path.split("/"):
            with deepest:
                is_new = False
                if make:
                    with suppress(FileExistsError):
                        os.mkdir(name, mode, dir_fd=deepest.descriptor)
                        is_new = True
                deepest = Directory(name or ".", deepest.descriptor)
                if is_new:
                    give_to_group(deepest.descriptor, group)
        return deepest

    def write(self, name: str, data: Union[bytes, Iterable[bytes]], mode: int = 0o600) -> str:
        """Replace a file durably, in one rename; return its SHA-256."""
        hasher = hashlib.sha256()
        temporary = temporary_name(name)
        descriptor = os.open(temporary, _CREATE_FLAGS, mode, dir_fd=self.descriptor)
        try:
            with open(descriptor, "wb") as stream:
                for piece in [data] if isinstance(data, bytes) else data:
                    stream.write(piece)
                    hasher.update(piece)
                stream.flush()
                # The umask may have taken bits away at open().
                os.fchmod(descriptor, mode)
                os.fsync(descriptor)
            os.rename(temporary, name, src_dir_fd=self.descriptor, dst_dir_fd=self.descriptor)
        except BaseException:
            with suppress(FileNotFoundError):
                os.unlink(temporary, dir_fd=self.descriptor)
            raise
        os.fsync(self.descriptor)
        return hasher.hexdigest()

    def remove_tree(self, name: str) -> None:
        """Remove an entry and all below it, following no symlink; a missing one is fine.

        What lies deeper than MAX_DEPTH is moved up first: no tree exhausts stack or descriptors.
        """
        pending = [name]
        while pending:
            with suppress(FileNotFoundError):
                self._remove(pending.pop(), self, pending, 0)

    def _remove(self, name: str, top: "Directory", pending: List[str], level: int) -> None:
        status = os.stat(name, dir_fd=self.descriptor, follow_symlinks=False)
        if not stat.S_ISDIR(status.st_mode):
            os.unlink(name, dir_fd=self.descriptor)
            return
        user = os.geteuid()
        if status.st_mode & 0o700 != 0o700 and user != 0 and user == status.st_uid:
            # Else its owner could not empty it.  Root can anyway, and must not do this: chmod
            # follows a symlink that was swapped in.
            os.chmod(name, 0o700, dir_fd=self.descriptor)
        if level > MAX_DEPTH:
            pending.append(temporary_name("deep"))
            os.rename(name, pending[-1], src_dir_fd=self.descriptor, dst_dir_fd=top.descriptor)
            return
        try:
            # On a mount point this fails with EBUSY before anything below it is removed.
            os.rmdir(name, dir_fd=self.descriptor)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        with self.child(name) as below:
            for entry in os.listdir(below.descriptor):
                with suppress(FileNotFoundError):  # somebody else was faster
                    below._remove(entry, top, pending, level + 1)
        os.rmdir(name, dir_fd=self.descriptor)


def temporary_name(name: str) -> str:
    """Make a name that no earlier run can have left behind."""
    return f".{name}.{os.getpid()}.{os.urandom(4).hex()}.tmp"


def sync_filesystem(descriptor: int) -> None:
    """Make what was written to a filesystem durable: by syncfs(2), else by sync(2).

    `descriptor` must have been opened before the writing: syncfs then reports failed writes.
    """
    try:
        import ctypes
        library = ctypes.CDLL(None, use_errno=True)
        failed = library.syncfs(descriptor) != 0
    except (ImportError, OSError, AttributeError):
        os.sync()
        return
    if failed:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def give_to_group(descriptor: int, group: int) -> None:
    """Let a group, unless it is -1, write in a directory and own what is made there."""
    if group >= 0:
        os.fchown(descriptor, -1, group)
        os.fchmod(descriptor, stat.S_IMODE(os.fstat(descriptor).st_mode) | 0o2070)


# -- what is written down ----------------------------------------------------

class Record(NamedTuple):
    """The rollback metadata of a release, `.deploy/releases/<id>.json`.

    previous: what was live when this went forward last.  rolled_back_at: when a person rolled back
    from it; rollbacks pass over it.  pruned_at: when its files went; what is known of it stays, for
    a refused artifact or a `down`.  note: the text of -m.  Times are RFC 3339 UTC, sizes bytes.
    """

    id: str
    sequence: int
    version: str
    state: str
    pinned: bool
    artifact: Json
    tree: Json
    created_at: str
    activated_at: OptionalText
    deactivated_at: OptionalText
    previous: OptionalText
    by: Json
    rollback: Json
    failure: Optional[Json]
    rolled_back_at: OptionalText
    pruned_at: OptionalText
    note: OptionalText = None
    application: OptionalText = None
    built_at: OptionalText = None
    slot: OptionalText = None
    migrated: bool = False

    @property
    def sha256(self) -> str:
        """The digest of the artifact it was made from."""
        return str(self.artifact.get("sha256", ""))

    @property
    def path(self) -> str:
        """Where that artifact was when it was staged."""
        return native(str(self.artifact.get("source", "")))


class Journal(NamedTuple):
    """What is under way, `.deploy/journal.json`.

    recoveries: how many automatic ones began.  done: steps begun before it was last written.
    chain: Store.chain before the run.  migration: which commands of [migrate] began, and the last
    one's process group and deploy_id; the one run of a process writes into it.
    """

    deploy_id: str
    operation: str
    from_release: OptionalText
    to_release: str
    phase: str
    started_at: str
    recoveries: int
    plan: List[Any]
    done: List[Any]
    failure: Optional[Json]
    by: Json
    chain: str = ""
    migration: Json = {}

    def __str__(self) -> str:
        return f"{self.operation} of {self.to_release}"


class HistoryEntry(NamedTuple):
    """One line of `.deploy/history.jsonl`: a run that changed something, or tried to.

    release: the one that the run was about; for prune, the live one.  result: one of RUN_RESULTS,
    or `aborted` (a later run ended it).  automatic: whether a failure, not a person, led back.
    previous_sha256: of the line before, without its newline; empty in the first.
    """

    sequence: int
    at: str
    deploy_id: str
    operation: str
    result: str
    release: OptionalText
    version: OptionalText
    previous: OptionalText
    exit_code: int
    seconds: float
    message: str
    by: Json
    steps: List[Any]
    failure: Optional[Json]
    previous_sha256: str
    artifact_sha256: OptionalText = None
    built_at: OptionalText = None
    note: OptionalText = None
    automatic: Optional[bool] = None


# What JSON must hold for a type: anybody can make a valid seal.
JSON_TYPES: Dict[Any, Any] = {
    float: (float, int), List[Any]: list, Json: dict, OptionalText: (str, type(None)),
    Optional[bool]: (bool, type(None)), Optional[Json]: (dict, type(None))}
# Fields' other names in JSON: `from` is a keyword of Python.
JSON_NAMES = {"from_release": "from", "to_release": "to"}
# Patterns of texts.  Ids become file names; an adopted release may have any name.
ANY_NAME = r"(?!\.\.?\Z)[^/\0]+"
TEXT_FORMS = {"id": ANY_NAME, "to": ANY_NAME, "previous": ANY_NAME, "from": ANY_NAME,
              "state": "|".join(STATES), "phase": "|".join(PHASES)}


def encode(value: Any) -> Json:
    """Turn a record, journal or history entry into a JSON object."""
    data = {JSON_NAMES.get(field, field): part for field, part in value._asdict().items()}
    return dict(data, schema=SCHEMA)


def seal(data: Json) -> Json:
    """Add the checksum that shows whether a file was changed or cut off."""
    plain = {key: value for key, value in data.items() if key != "checksum"}
    text = json.dumps(plain, sort_keys=True)
    return dict(plain, checksum=hashlib.sha256(text.encode("ascii")).hexdigest())


def decode(kind: Any, data: bytes, where: str, hint: str = "") -> Any:
    """Read a sealed object, in which fields with a default may be missing; StateError."""
    try:
        sealed = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise StateError(f"{where} is damaged: {error}", hint)
    if not isinstance(sealed, dict) or sealed.get("checksum") != seal(sealed)["checksum"]:
        raise StateError(f"{where} is damaged: its checksum does not match", hint)
    if sealed.get("schema") != SCHEMA:
        raise StateError(f"{where} has schema {sealed.get('schema')!r}, "
                         f"this program knows {SCHEMA}", hint)
    values = {}
    for field, annotation in kind.__annotations__.items():
        name = JSON_NAMES.get(field, field)
        values[field] = value = sealed.get(name, kind._field_defaults.get(field, ...))
        form = TEXT_FORMS.get(name, "") if value is not None else ""
        if not isinstance(value, JSON_TYPES.get(annotation, annotation)) \
                or form and not re.fullmatch(form, value) \
                or name == "tree" and not isinstance(value.get("bytes", 0), int):
            raise StateError(f"{where} has no proper {name!r}", hint)
    return kind(**values)


# -- the root ----------------------------------------------------------------

RECORDS = ".deploy/releases"
MANIFESTS = ".deploy/manifests"
TREES = ".deploy/trees"
TRASH = ".deploy/trash"
PRIVATE_DIRECTORIES = (".deploy", RECORDS, MANIFESTS, TREES, TRASH)
JOURNAL = ".deploy/journal.json"
HISTORY = ".deploy/history.jsonl"
LOCK = ".deploy/lock"
RESERVE = ".deploy/reserve"
SOURCE = ".deploy/source.json"
CACHE = ".deploy/cache"
HOLD = ".deploy/hold.json"
FLAGS_FILE = "shared/flags.json"
# Artifacts are unpacked in releases/, to inherit its group, setgid bit, default ACL and label.
STAGING_PREFIX = ".new-"
# By directory, what a crash may leave; staging and history.head are version 1.0.0's.
_TEMPORARY = r"\..*\.\d+\.[0-9a-f]{8}\.tmp\Z"
LEFTOVERS = {
    "releases": re.escape(STAGING_PREFIX), TRASH: "", RECORDS: _TEMPORARY, MANIFESTS: _TEMPORARY,
    TREES: _TEMPORARY, "slots": _TEMPORARY, "": _TEMPORARY.replace(".*", "current"),
    ".deploy": _TEMPORARY + r"|staging\Z|history\.head\Z",
    "shared": _TEMPORARY.replace(".*", "flags.json"),
    CACHE: r"(?!(?:[0-9a-f]{40}|[0-9a-f]{64})\.(?:part|etag)\Z)"}
# The size of RESERVE, which is made while RESERVE_SHARE times as much is free.
RESERVE_BYTES = 1 << 20
RESERVE_SHARE = 16


class Current(NamedTuple):
    """Where `current` points: a release, nothing yet, or a problem and the command for it."""

    release: OptionalText
    problem: str = ""
    hint: str = ""
    missing: OptionalText = None  # a release that is gone: the link may be replaced


class Store(ExitStack):
    """One root, held open until `close`; paths are relative to it.

    A run that changes anything holds the lock from before its first look until after pruning; one
    that only looks takes none.  Everything is opened by descriptor from the root down: the
    application's user may own the root, and could put a symlink in place of `releases`.
    """

    def __init__(self, path: str, settings: Settings) -> None:
        super().__init__()
        group, readable = settings.deploy.group, settings.deploy.readable
        self.top = self.enter_context(Directory(path))
        self.path = path
        self.command_line = settings.command_line
        self.flag: str = settings.maintenance.flag
        # The gid of [deploy] group, whose members share the root; -1 for none.
        self.group = account("group", group, "[deploy] group").gr_gid if group else -1
        # The modes of new files and directories in .deploy.
        self.file_mode = {"owner": 0o600, "group": 0o640, "all": 0o644}[readable]
        self.directory_mode = self.file_mode | (self.file_mode & 0o444) >> 2
        if group:
            self.file_mode |= 0o060
            self.directory_mode |= 0o2070
        self._open = {"": self.top}
        # By release, temporary symlinks for `switch` to rename.
        self._links: Dict[str, str] = {}
        # The SHA-256 of the history's last line when last read or written.  Only a copy elsewhere
        # proves anything: who can write the file can chain it anew.
        self.chain = ""

    @classmethod
    def open(cls, settings: Settings) -> Optional["Store"]:
        """Open a root for looking; None if there is no such directory."""
        path = os.path.realpath(settings.deploy.root)
        try:
            return cls(path, settings)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise PreflightFailed(f"cannot open the root {error.filename or path}: {reason(error)}",
                                  "name a directory that this user can read: --root DIR")

    @classmethod
    def create(cls, settings: Settings) -> "Store":
        """Open a root for writing, making what is missing; PreflightFailed if that fails."""
        group = check_group(settings.deploy.group) if settings.deploy.group else -1
        path = os.path.realpath(settings.deploy.root)
        parent, name = os.path.split(path)
        try:
            if not os.path.isdir(path):
                with Directory(parent) as above:
                    above.child(name, make=True, group=group).close()
                    os.fsync(above.descriptor)
            store = cls(path, settings)
            store.status(RECORDS)  # StateError if this user may not enter .deploy
            store.check_owner()
            # shared/ always: hooks are handed its path.
            slots = ["slots"] if settings.slots else []
            for place in ["releases", "shared", *slots, *PRIVATE_DIRECTORIES]:
                mode = store.directory_mode if place in PRIVATE_DIRECTORIES else 0o755
                if place != "shared" or store.status(place) is None:  # may be an operator's link
                    with store.top.child(place, make=True, mode=mode, group=group) as directory, \
                            suppress(PermissionError):  # another member owns it
                        if group >= 0:  # again, as a run may have been killed before
                            give_to_group(directory.descriptor, group)
            os.fsync(store.top.descriptor)
            return store
        except OSError as error:
            hint = f"the root and what is in it must be directories that {user_name()} can write"
            if not os.path.isdir(parent):
                hint = f"mkdir -p {parent}"
            raise PreflightFailed(f"cannot prepare the root {path}: "
                                  f"{error.filename or ''}: {reason(error)}", hint)

    def check_owner(self, *, read_only: bool = False) -> None:
        """Refuse a .deploy that others could write; `read_only` lets another user's own pass."""
        for name in PRIVATE_DIRECTORIES:
            try:
                status = os.fstat(self.directory(name).descriptor)
            except (FileNotFoundError, StateError):
                continue  # the check `root` refuses what is no directory
            path = f"{self.path}/{name}"
            if read_only and name == ".deploy" and status.st_uid != os.geteuid():
                return
            if os.geteuid() == 0 and status.st_uid != 0:
                raise StateError(
                    f"{path} belongs to uid {status.st_uid}, and its contents would be believed",
                    f"run it as its owner: sudo -u '#{status.st_uid}' deploy.py ...; or, if nobody "
                    f"has changed anything in it: chown -R root {path}")
            others = 0o002 if status.st_gid == self.group else 0o022
            if status.st_mode & others:
                raise StateError(f"{path} is writable by group or others "
                                 f"(mode {stat.S_IMODE(status.st_mode):04o})",
                                 f"chmod -R go-w {self.path}/.deploy")

    def directory(self, path: str) -> Directory:
        """Open a directory, once; StateError for a symlink or a forbidden one."""
        if path not in self._open:
            above, name = os.path.split(path)
            try:
                place = Directory(name, self.directory(above).descriptor)
                self._open[path] = self.enter_context(place)
            except OSError as error:
                if error.errno not in (errno.ENOTDIR, errno.ELOOP, errno.EACCES):
                    raise
                raise StateError(f"{self.path}/{path} cannot be read by {user_name()} as a "
                                 f"directory: {reason(error)}",
                                 f"run it as the owner of {self.path}/.deploy or as root; "
                                 "a file that is in its place has to be moved away")
        return self._open[path]

    def names(self, path: str) -> List[str]:
        """List a directory, sorted; empty if there is none."""
        try:
            return sorted(os.listdir(self.directory(path).descriptor))
        except FileNotFoundError:
            return []

    def status(self, path: str) -> Optional[os.stat_result]:
        """Return the lstat of a path, or None if nothing is there."""
        try:
            above, name = os.path.split(path)
            return os.stat(name, dir_fd=self.directory(above).descriptor, follow_symlinks=False)
        except FileNotFoundError:
            return None

    def is_release(self, name: str) -> bool:
        """Tell whether a real directory of that name is in releases/."""
        status = self.status(f"releases/{name}")
        return status is not None and stat.S_ISDIR(status.st_mode)

    def lock_used(self) -> int:
        """Return when the lock was last taken or given back, in ns."""
        status = self.status(LOCK)
        return status.st_mtime_ns if status else 0

    def load(self, path: str, kind: Any = dict) -> Any:
        """Read a sealed `kind`, or a JSON object (dict); None without a file, else StateError."""
        where, hint = f"{self.path}/{path}", "correct it, or move it out of the way"
        if kind is Journal and self.status(path):
            where = f"the journal {where}"
            hint = "check that the release you want is live, then: " \
                + self.command_line("recover --to RELEASE")
        try:
            above, name = os.path.split(path)
            data = read_file(name, MAX_STATE_BYTES, os.O_NOFOLLOW, self.directory(above).descriptor)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StateError(f"{where} cannot be read: {reason(error)}", hint)
        if kind is not dict:
            return decode(kind, data, where, hint)
        with suppress(ValueError, RecursionError):
            value = json.loads(data.decode("utf-8"))
            if isinstance(value, dict):
                return value
        raise StateError(f"{where} cannot be read: it is no JSON object", hint)

    def write(self, path: str, data: Union[bytes, Iterable[bytes]], mode: int = 0) -> str:
        """Replace a file, by default with the mode for .deploy; return its SHA-256."""
        above, name = os.path.split(path)
        return self.directory(above).write(name, data, mode or self.file_mode)

    def save(self, value: Any) -> None:
        """Write a record or the journal durably."""
        path = JOURNAL if isinstance(value, Journal) else f"{RECORDS}/{value.id}.json"
        self.write(path, json.dumps(seal(encode(value)), indent=2).encode("ascii") + b"\n")

    def maintenance(self) -> Json:
        """Read who put the maintenance flag up: a run has a deploy_id; empty if it is not up."""
        try:
            flag = self.load(self.flag)
            return {} if flag is None else flag or {"by": "somebody"}
        except StateError:
            return {"by": "somebody"}  # any file of that name is a flag

    def forget(self, *paths: str) -> None:
        """Remove files durably; a missing one is fine."""
        for path in paths:
            above, name = os.path.split(path)
            place = self.directory(above).descriptor
            with suppress(FileNotFoundError):
                os.unlink(name, dir_fd=place)
            os.fsync(place)

    # -- releases and current ------------------------------------------------

    def current(self) -> Current:
        """Look where `current` points."""
        link = f"{self.path}/current"
        try:
            target = os.readlink("current", dir_fd=self.top.descriptor)
        except FileNotFoundError:
            return Current(None)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            return Current(None, f"{link} is not a symlink",
                           f"move it out of the way: mv {link} {link}.old")
        directory, release = os.path.split(os.path.normpath(os.path.join(self.path, target)))
        # Other tools write an absolute path, in which a directory may be a symlink.
        if os.path.realpath(directory) != f"{self.path}/releases":
            return Current(None, f"{link} points outside releases/: {target}",
                           f"remove the link: rm {link}")
        if not self.is_release(release):
            settle = self.command_line("recover --to RELEASE")
            return Current(None, f"{link} points to {target}, which does not exist",
                           f"make a release live that is there: {settle}; "
                           f"where none is: rm {link}, then deploy", release)
        return Current(release)

    def switch(self, expected: OptionalText, target: OptionalText, *, keep: bool = False) -> None:
        """Point `current` at a release, or take it away; one rename, durable when this returns.

        Compare and swap: StepFailed unless `current` is what the plan saw, or the target already.
        `keep` also makes the link for the way back: a full disk may have no room for it later.
        """
        current = self.current()
        live = current.release or current.missing
        if current.problem and not current.missing or live not in (expected, target):
            raise StepFailed(f"current changed under the run: expected {expected or 'nothing'}, "
                             f"found {current.problem or live or 'nothing'}",
                             "look at what else switches it, then run again")
        if target is None:
            self.forget("current")
            return
        if not self.is_release(target):
            raise StepFailed(f"releases/{target} does not exist",
                             f"see what is there: {self.command_line('releases')}")
        releases = {target, live} if keep and live else {target}
        missing = sorted(releases - set(self._links))
        for release in missing:
            temporary = temporary_name("current")
            os.symlink(f"releases/{release}", temporary, dir_fd=self.top.descriptor)
            self._links[release] = temporary
        if missing:
            os.fsync(self.top.descriptor)  # on disk before one of them becomes `current`
        os.rename(self._links[target], "current",
                  src_dir_fd=self.top.descriptor, dst_dir_fd=self.top.descriptor)
        del self._links[target]
        os.fsync(self.top.descriptor)

    def put_in_slot(self, name: str, release: str) -> None:
        """Point a slot's link at a release, durably."""
        slots = self.directory("slots").descriptor
        temporary = temporary_name(name)
        os.symlink(f"../releases/{release}", temporary, dir_fd=slots)
        os.rename(temporary, name, src_dir_fd=slots, dst_dir_fd=slots)
        os.fsync(slots)

    def new_staging(self) -> str:
        """Make a private directory in releases/ to unpack into; return its name."""
        name = temporary_name(STAGING_PREFIX[1:] + "release")
        os.mkdir(name, 0o777, dir_fd=self.directory("releases").descriptor)
        tree = self.directory(f"releases/{name}").descriptor
        if self.group >= 0:
            give_to_group(tree, self.group)  # any member may have to remove it
        # Once published it has the mode that umask, setgid bit and default ACL gave it.
        self._published_mode = stat.S_IMODE(os.fstat(tree).st_mode)
        os.fchmod(tree, self._published_mode & ~(0o077 if self.group < 0 else 0o007))
        return name

    def publish(self, staging: str, release: str) -> None:
        """Give an unpacked and synced tree its name under releases/."""
        releases = self.directory("releases").descriptor
        tree = self.directory(f"releases/{staging}").descriptor
        os.fchmod(tree, self._published_mode)
        os.fsync(tree)
        if self.status(f"releases/{release}") is not None:
            raise StepFailed(f"releases/{release} exists already",
                             "look at what made it, then run again")
        os.rename(staging, release, src_dir_fd=releases, dst_dir_fd=releases)
        os.fsync(releases)

    def remove_release(self, release: str) -> None:
        """Delete a release, renamed out of sight first if that can be done, then its manifest."""
        releases, trash = self.directory("releases"), self.directory(TRASH)
        if self.status(f"releases/{release}") is not None:
            name = temporary_name(release)
            try:
                os.rename(release, name, src_dir_fd=releases.descriptor,
                          dst_dir_fd=trash.descriptor)
            except OSError as error:
                if error.errno != errno.EXDEV:
                    raise
                # overlayfs renames no directory of a lower layer, such as an image's.  If killed
                # here, the rest is not as in its manifest: no target, until prune deletes it.
                releases.remove_tree(release)
            os.fsync(releases.descriptor)
            trash.remove_tree(name)
        self.forget(f"{MANIFESTS}/{release}", f"{TREES}/{release}")

    def sweep(self, warn: Callable[[str], None], known: Optional[Set[str]] = None, *,
              read_only: bool = False) -> List[str]:
        """Remove what a crash left, and manifests of releases not `known`; return the paths."""
        paths = []
        for path, pattern in LEFTOVERS.items():
            pattern = pattern.replace("current", f"(?:current|{re.escape(self.flag)})")
            names: List[str] = []
            with suppress(StateError):  # shared/ may be the operator's symlink
                names = self.names(path)
            for name in names:
                is_stray = path in (MANIFESTS, TREES) and known is not None and name not in known
                if not path and name == self.flag:
                    is_stray = "deploy_id" in self.maintenance()
                if not is_stray and not re.match(pattern, name):
                    continue
                shown = f"{path}/{name}".lstrip("/")
                try:
                    if not read_only:
                        self.directory(path).remove_tree(name)
                    paths.append(shown)
                except OSError as error:
                    warn(f"{shown} cannot be removed: {reason(error)}")
        return paths

    def reserve(self, *, keep: bool) -> None:
        """Set a mebibyte aside if there is ample room, or (not `keep`) give it to a full disk."""
        disk = os.fstatvfs(self.top.descriptor)
        free_bytes = disk.f_bavail * disk.f_frsize
        if not keep and (free_bytes < RESERVE_BYTES or disk.f_files and not disk.f_favail):
            self.forget(RESERVE)
        if keep and free_bytes >= RESERVE_SHARE * RESERVE_BYTES and self.status(RESERVE) is None:
            with suppress(OSError):  # the next run tries again
                # Zeros would take no room on a filesystem that compresses.
                self.write(RESERVE, os.urandom(RESERVE_BYTES))

    # -- records, manifests and the journal ----------------------------------

    def records(self) -> Tuple[Dict[str, Record], List[str]]:
        """Read every record; return with them what is wrong with each damaged file."""
        records, problems = {}, []
        for name in self.names(RECORDS):
            if not name.endswith(".json") or name.startswith("."):
                continue
            try:
                record = self.load(f"{RECORDS}/{name}", Record)
            except StateError as error:
                problems.append(error.message)
                continue
            if record and record.id + ".json" != name:
                problems.append(f"{self.path}/{RECORDS}/{name} is the record of {record.id}")
            elif record:
                records[record.id] = record
        return records, problems

    def make_whole(self, record: Record) -> str:
        """Say how to repair a release that differs from its manifest."""
        if record.artifact.get("sha256_source") != "adopted":
            return "deploy its artifact again: deploy.py deploy --force --allow-downgrade ARTIFACT"
        forget = spell(["rm", f"{self.path}/{RECORDS}/{record.id}.json"])
        return f"adopt it as it is: {forget} && {self.command_line(f'adopt {record.id}')}"

    @contextmanager
    def open_manifest(self, record: Record) -> Iterator[Tuple[Any, Any]]:
        """Open a release's manifest and tree as binary streams; StateError without them."""
        release = record.id
        with ExitStack() as stack:
            streams = []
            for path in (MANIFESTS, TREES):
                try:
                    place = self.directory(path).descriptor
                    streams.append(stack.enter_context(open_file(release, os.O_NOFOLLOW, place)))
                except FileNotFoundError:
                    raise StateError(f"{release} cannot be verified: "
                                     f"{self.path}/{path}/{release} is missing",
                                     self.make_whole(record))
            yield streams[0], streams[1]

    def clear_journal(self) -> None:
        """Remove the journal durably: nothing is under way any more."""
        while self._links:  # those that no switch has used
            with suppress(FileNotFoundError):
                os.unlink(self._links.popitem()[1], dir_fd=self.top.descriptor)
        if self.status(JOURNAL) is not None:
            self.forget(JOURNAL)

    # -- the history ---------------------------------------------------------

    def read_history(self, newest: int = 0, *, cut: bool = False) -> Tuple[List[bytes], bytes]:
        """Return its lines, oldest first, and the torn one that a crash may have left behind them.

        `newest`: only so many, read from the end.  `cut`: take the torn one off the file.
        PreflightFailed if it cannot be read.
        """
        self.chain = ""
        try:
            above, name = os.path.split(HISTORY)
            place = self.directory(above).descriptor
            stream = open_file(name, os.O_NOFOLLOW, place)
        except FileNotFoundError:
            return [], b""
        except OSError as error:
            # No StateError: unlike a damaged line, this stops a recovery.
            raise PreflightFailed(f"{self.path}/{HISTORY} cannot be read: {reason(error)}",
                                  "it must be a regular file: move it back, or away")
        with stream:
            end = position = stream.seek(0, os.SEEK_END)
            data = b""
            while position > 0 and (not newest or data.count(b"\n") <= newest):
                start = max(0, position - (1 << 16)) if newest else 0
                stream.seek(start)
                data = stream.read(position - start) + data
                position = start
        *lines, torn = data.split(b"\n")
        if cut and torn:
            flags = os.O_WRONLY | os.O_NOFOLLOW
            with open(os.open(name, flags, dir_fd=place), "wb") as stream:
                stream.truncate(end - len(torn))
                os.fsync(stream)
        if lines:
            self.chain = hashlib.sha256(lines[-1]).hexdigest()
        return lines[-newest:], torn

    def history(self, newest: int = 0) -> List[HistoryEntry]:
        """Read the history, oldest first; StateError for a damaged line."""
        hint = f"see which: {self.command_line('history --verify')}"
        return [decode(HistoryEntry, line, f"a line of {self.path}/{HISTORY}", hint)
                for line in self.read_history(newest)[0]]

    def append_history(self, entry: HistoryEntry) -> None:
        """Append a line, numbered and chained to the one before it, durably."""
        lines, sequence = self.read_history(1, cut=True)[0], 0
        if lines:
            try:
                sequence = decode(HistoryEntry, lines[0], "").sequence
            except StateError:
                sequence = len(self.read_history()[0])
        entry = entry._replace(sequence=sequence + 1, previous_sha256=self.chain)
        if self.status(HISTORY) is None:
            self.write(HISTORY, b"")  # its name must be on disk before its first line
        line = json.dumps(seal(encode(entry))).encode("ascii")
        above, name = os.path.split(HISTORY)
        flags = os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW
        with open(os.open(name, flags, dir_fd=self.directory(above).descriptor), "wb") as stream:
            stream.write(line + b"\n")
            stream.flush()
            os.fsync(stream)
        self.chain = hashlib.sha256(line).hexdigest()

    def verify_history(self) -> List[str]:
        """Name lines that were changed or follow a missing one; only `chain` tells of the last."""
        problems, chain = [], ""
        lines, torn = self.read_history()
        for number, line in enumerate(lines, 1):
            try:
                entry = decode(HistoryEntry, line, f"line {number}")
                # Earlier versions began a new chain with `unknown`.
                if entry.previous_sha256 != chain and (chain or entry.previous_sha256 != "unknown"):
                    problems.append(f"line {number}: the line before it was changed or is missing")
            except StateError as error:
                problems.append(error.message)
            chain = hashlib.sha256(line).hexdigest()
        if lock_holder(self) is None:  # else a run may be writing its line
            if torn:
                problems.append(f"line {len(lines) + 1} is cut off")
            releases = sum(map(len, self.records()))  # damaged records count, too
            if not lines and releases and self.load(JOURNAL, Journal) is None:
                problems.append(f"the history is missing, and {count(releases, 'release')} had one")
        return problems


def check_group(group: str) -> int:
    """Return the gid of [deploy] group; StateError for root (must not trust it) and non-members."""
    if os.geteuid() == 0:
        raise StateError(f"the members of [deploy] group = {group} could change what root believes",
                         "run it as one of them, or remove group")
    number: int = account("group", group, "[deploy] group").gr_gid
    if number not in (os.getegid(), *os.getgroups()):
        raise StateError(f"{user_name()} is not in the group {group}, whose members deploy here",
                         f"usermod -aG {group} {user_name()}, then log in again")
    return number


# -- the lock ----------------------------------------------------------------

# `lock_holder` takes the lock for microseconds, or longer on a stalled machine.
LOOK_SECONDS = 5.0


@contextmanager
def lock(store: Store, wait_seconds: float, holder: Json, interrupts: Interrupts) -> Iterator[None]:
    """Hold the kernel's flock on `.deploy/lock`; Busy, which names the holder, once the time is up.

    It ends with its process.  The file's content only informs people.  The file is never unlinked,
    or two runs could each lock a file of that name.
    """
    above, name = os.path.split(LOCK)
    # 0600 whatever `readable` says: whoever can open the file can hold the lock.
    descriptor = os.open(name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600,
                         dir_fd=store.directory(above).descriptor)
    ends_seconds = time.monotonic() + max(0.05, wait_seconds)
    with open(descriptor, "r+b", buffering=0) as stream:
        if store.group >= 0 and os.fstat(descriptor).st_uid == os.geteuid():
            os.fchmod(descriptor, 0o660)
        while True:
            with suppress(BlockingIOError):
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            late_seconds = time.monotonic() - ends_seconds
            other = lock_holder(store) if late_seconds >= 0 else None
            if other is not None or late_seconds > LOOK_SECONDS:
                raise busy(other or {})
            interrupts.wait(0.02)
        with suppress(OSError):  # a full disk must not stop the prune that would help it
            stream.truncate(0)
            stream.write(json.dumps(holder).encode("ascii"))
        try:
            yield
        finally:
            with suppress(OSError):
                stream.truncate(0)  # `lock_used` needs the new mtime


def lock_holder(store: Store) -> Optional[Json]:
    """Return who holds the lock: empty if the file does not tell, None if nobody does."""
    try:
        above, name = os.path.split(LOCK)
        with open_file(name, os.O_NOFOLLOW, store.directory(above).descriptor) as stream:
            with suppress(BlockingIOError):
                fcntl.flock(stream.fileno(), fcntl.LOCK_SH | fcntl.LOCK_NB)
                return None
            holder = json.loads(stream.read(4096).decode("ascii"))
            return holder if {"pid", "user", "host", "command", "since"} <= set(holder) else {}
    except PermissionError:
        # Without access to the file, the kernel's list of locks tells, by inode.
        with suppress(OSError):
            line = f"FLOCK .* WRITE .*:{store.status(LOCK).st_ino} "  # type: ignore
            if re.search(line.encode("ascii"), read_file("/proc/locks", MAX_STATE_BYTES)):
                return {}
    except (ValueError, TypeError, RecursionError):
        return {}
    except OSError:
        pass
    return None


def busy(holder: Json) -> Busy:
    """Make the error that names who holds the lock."""
    return Busy(f"another run holds the lock: {describe_holder(holder)}",
                "wait for it with --wait-lock 5m, or look at what it does")


def describe_holder(holder: Json) -> str:
    """Describe a lock's holder to people."""
    if not holder:
        return "an unknown process"
    return "pid {pid} of {user} on {host}, {command} since {since}".format(**holder)


# -- one run -------------------------------------------------------------------

class CheckResult(NamedTuple):
    """What a preflight check found: ok, warn, fail or skip, and what to do about it."""

    name: str
    status: str
    detail: str
    hint: str


class StepResult(NamedTuple):
    """How a step ended: done, skipped, failed, undone or planned; its commands' last output."""

    name: str
    status: str
    seconds: float
    detail: str
    output: Sequence[str] = ()
    started_at: float = 0.0  # seconds since the epoch

    def to_json(self) -> Json:
        """Return it for history and --json; `output` only where there is some."""
        kept = self._fields[:5] if self.output else self._fields[:4]
        return {name: getattr(self, name) for name in kept}


class Context(NamedTuple):
    """The release that a hook, service, probe or template is run for."""

    application: str
    root: str
    release: str
    version: str
    release_path: str
    previous: str
    deploy_id: str
    failed: str = ""
    note: str = ""
    candidate_port: str = ""
    slot: Any = None
    directory: str = ""  # where commands run; empty: in the release

    def variables(self) -> Dict[str, str]:
        """Return the DEPLOY_* variables, all but DEPLOY_HOOK."""
        always = {
            "APPLICATION": self.application, "ROOT": self.root, "RELEASE": self.release,
            "VERSION": self.version, "RELEASE_PATH": self.release_path, "ID": self.deploy_id,
            "CURRENT_PATH": f"{self.root}/current", "SHARED_PATH": f"{self.root}/shared",
            "PREVIOUS_RELEASE": self.previous}
        sometimes = {
            "NOTE": self.note, "CANDIDATE_PORT": self.candidate_port,
            "FAILED_RELEASE": self.failed,
            "FAILED_PATH": self.failed and f"{self.root}/releases/{self.failed}",
            "SLOT": self.slot and self.slot.name, "SLOT_PORT": self.slot and str(self.slot.port)}
        return {f"DEPLOY_{name}": value for name, value in {**always, **sometimes}.items()
                if value or name in always}


class Outcome:
    """What a command did, for people and for --json."""

    changed = False
    rolled_back = False
    release: OptionalText = None
    previous: OptionalText = None
    message = ""
    result = ""  # in the history's word, if it has a line there
    is_repeated = False  # a refusal told before: nobody is notified again
    error: Optional[DeployError] = None

    def __init__(self, command: str) -> None:
        self.command = command
        self.steps: List[StepResult] = []
        self.checks: List[CheckResult] = []
        self.extra: Json = {}  # what this command adds to the object of --json


class Run:
    """One run: the command, its settings, what it observed and did."""

    # The open root, what was observed there, and the open artifact, if any.
    store: Any = None
    facts: Any = None
    artifact: Any = None
    plan: Any = None
    # What sync found to deploy, and the open directory that it fetches into.
    offer: Any = None
    cache: Any = None
    # What the steps hand on: the staged tree's name and manifest.
    staging = ""
    manifest: Any = None
    journal: Any = None  # on disk from the plan's first phase on
    down_failed = ""  # why a `down` failed, if one did
    left_is_healthy = False  # what a rollback leaves: only then may it go back there
    is_believed = False  # the configuration was accepted: what it names may be told of the run

    def __init__(self, settings: Settings, console: Console, interrupts: Interrupts,
                 flags: Any) -> None:
        self.settings = settings
        self.console = console
        self.interrupts = interrupts
        self.flags = flags
        self.deploy_id = time.strftime("%Y%m%dT%H%M%SZ-", time.gmtime()) + os.urandom(3).hex()
        # For child processes: the caller's trace, else our own if [trace] is set.
        self.traceparent = traceparent(os.urandom(8).hex())
        if settings.trace.otlp and not self.traceparent:
            self.traceparent = f"00-{os.urandom(16).hex()}-{os.urandom(8).hex()}-01"
        self.by = who()
        notes = [portable(getattr(flags, "message", None) or "")]
        if getattr(flags, "override", None):
            notes.append(f"override: {flags.override}")
        self.note = console.secrets.mask("; ".join(filter(None, notes)))
        # The root, absolute and without symlinks, or empty; also facts.root and store.path.
        self.place = settings.deploy.root and os.path.realpath(settings.deploy.root)
        self.application = settings.deploy.application or os.path.basename(self.place) \
            or "application"
        self.outcome = Outcome(flags.command)
        self.fetch: Any = None  # gets, once, what [policy] wants beside sync's artifact
        self.judged: Dict[str, str] = {}  # by digest, why [policy] judge let it pass
        self.output: List[str] = []  # a command's last lines, for the step's result
        self.signalled: Set[str] = set()  # services whose process was there to be signalled

    @property
    def root(self) -> str:
        """The path in `place`; UsageError if none is given, or it cannot be a root."""
        root = self.place
        if not root:
            raise UsageError("no root is given", "name it with --root DIR, or set root in [deploy]")
        if root == "/" or escape(root) != root:
            raise UsageError(f"{root!r} cannot be a root",
                             "name the application's own directory: --root DIR")
        for match in re.finditer(r"/(?=(?:releases|\.deploy)/)", root + "/"):
            above = root[:match.start()]
            if os.path.isdir(f"{above}/.deploy"):
                # ROOT/current, too, resolved: what is written there would change a release.
                raise UsageError(f"{root} cannot be a root: it lies inside another one",
                                 f"perhaps --root {above} is meant")
        return root


class Step(NamedTuple):
    """One action of a plan.

    `do` returns a short detail or nothing, or False if it was not needed; it raises DeployError or
    OSError.  `undo` takes it back, done, half done or not begun.  `phase` is the journal's while it
    runs, `noted` the one after it, if a recovery must know that it is done.  A failure of an
    `optional` step is a warning.  `seconds` is its longest time, if known, `plan` what it was made
    for; `what` is for its own `do` and `undo`.
    """

    name: str
    text: str
    do: Callable[[Run, Any], Any]
    undo: Callable[[Run, Any], None] = lambda run, step: None
    phase: str = ""
    optional: bool = False
    noted: str = ""
    seconds: float = UNLIMITED_SECONDS
    plan: Any = None
    what: Any = None


Steps = List[Step]


class Plan(NamedTuple):
    """From which release to which an operation leads, and its steps in order.

    `steps` lead to the verdict, `last` follow it; `way_back` is taken after a failed switch, with
    steps made for a plan of their own, whose `back` is true.
    """

    operation: str
    from_release: OptionalText
    to_release: OptionalText
    back: bool = False
    steps: Steps = []
    last: Steps = []
    way_back: Steps = []

    def to_json(self) -> List[Dict[str, str]]:
        """Return the steps for the journal and --json."""
        return [{"name": step.name, "description": step.text} for step in self.steps + self.last]


# ============================================================================
# 7  Signatures
#    Who signed these bytes: minisign, signify, SSH, cosign and DSSE.  Takes
#    bytes and digests; opens nothing but key files.  Pure Python, for hosts with
#    neither ssh-keygen nor OpenSSL's module; keys are public, so timing tells
#    nothing.  Tested by Wycheproof's vectors (tests/lib/vectors.json) and the
#    tools themselves.  Whoever does not accept it sets [signature] command.
# ============================================================================

# Curves y^2 = x^3 + ax + b (SP 800-186, 3.2.1): prime and a; in base64 the order and the base
# point's x and y, which give b.  edwards25519 (RFC 8032, 5.1) is mapped by RFC 7748, 4.1 with
# A = 486662: _D is its d; modulo _P, _SHIFT = A/3, _SCALE^2 = -A - 2, a = 1 - A^2/3.
_P = (1 << 255) - 19
_D = 0x52036cee2b6ffe738cc740797779e89800700a4d4141d8ab75eb4dca135978a3
_SHIFT = 0x2aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaad2451
_SCALE = 0x0f26edf460a006bbd27b08dc03fc4f7ec5a1d3d14b7d1a82cc6e04aaff457e06
_CURVES = {
    "ed25519": (_P, 0x2aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa984914a144, """
EAAAAAAAAAAAAAAAAAAAABTe+d6i95zWWBJjGlz10+0= KqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqtJFo=
X1HmXkdfeUsf4SLTiLcus23CsoGSg55N1hY6XYExLBQ="""),
    "nistp256": ((1 << 256) - (1 << 224) + (1 << 192) + (1 << 96) - 1, -3, """
/////wAAAAD//////////7zm+q2nF56E87nKwvxjJVE= axfR8uEsQkf4vOblY6RA8ncDfYEt6zOg9KE5RdiYwpY=
T+NC4v4af5uO5+tKfA+eFivOM1drMV7Oy7ZAaDe/UfU="""),
    "nistp384": ((1 << 384) - (1 << 128) - (1 << 96) + (1 << 32) - 1, -3, """
////////////////////////////////x2NNgfQ3Ld9YGg2ySLCneuzsGWrMxSlz
qofKIr6LBTeOscce8yCtdG4dO2KLp5uYWfdB4IJUKjhVAvJdv1UpbDpUXjhydgq3
NhfeSpYmLG9dnpi/kpLcKfj0Hb0omhR86doxE7XwuMAKYLHOHX6BnXpDHXyQ6g5f"""),
    "nistp521": ((1 << 521) - 1, -3, """
Af//////////////////////////////////////////+lGGh4O/L5Zrf8wBSPcJpdA7tcm4iZxHrrtvtx6ROGQJ
AMaFjga3BATpzZ4+y2YjlbRCnGSBOQU/tSH4KK9ga009uqFLXnfv51ko/h3BJ6L/qN4zSLPBhWpCm/l+fjHC5b1m
ARg5KWp4mjvABFyKX7QsfRvZmPVESVebRGgXr70XJz5mLJfucple9CZAxVC5AT+tB2E1PHCGonLCQIi+lHaf0WZQ""")}
# By kind of key: its hash, and the DER before the key in a PEM (RFC 3279, 5480, 8410).
_KEY_KINDS = {
    "rsa": ("sha256", "300d06092a864886f70d01010105000382"),
    "ed25519": ("sha512", "302a300506032b6570032100"),
    "nistp256": ("sha256", "3059301306072a8648ce3d020106082a8648ce3d030107034200"),
    "nistp384": ("sha384", "3076301006072a8648ce3d020106052b81040022036200"),
    "nistp521": ("sha512", "30819b301006072a8648ce3d020106052b8104002303818600")}
# By a digest's size, what PKCS #1 puts before it (RFC 8017, 9.2).
_DIGEST_INFO = {32: "003031300d060960864801650304020105000420",
                64: "003051300d060960864801650304020305000440"}
_ARMOR = rb"-----BEGIN ([A-Z ]+)-----\s([\w+/=\s]+)-----END \1-----\s*\Z"
_MINISIGN = (rb"untrusted comment:[^\n]*\n(\S{100})\r?\n"
             rb"(?:trusted comment: ([^\r\n]*)\r?\n(\S{88})\s*)?\Z")
# A line of allowed_signers (ssh-keygen(1)), but no certificates and no local times.
_SIGNER = (
    r'\s*(?:#.*|("[^"]+"|[^\s"]+)\s+(?i:(?:namespaces="([^"]*)"|'
    r'valid-after="(\d{8}|\d{12}|\d{14})Z"|valid-before="(\d{8}|\d{12}|\d{14})Z"|,(?=\S))+\s+)?'
    r"(?:ssh|ecdsa|sk)-\S+\s+(\S+)(?:\s.*)?)?\Z")
SUSPECT = "do not deploy it: copy both again, or correct [signature] (`command` is for other kinds)"


def _add(curve: Any, one: Any, two: Any) -> Any:
    # Complete, projective (Renes, Costello, Batina 2016, algorithm 1).  xy is X1 Y2 + X2 Y1.
    (p, a, b), (x1, y1, z1), (x2, y2, z2) = curve, one, two
    xx, yy, zz = x1 * x2 % p, y1 * y2 % p, z1 * z2 % p
    xy, yz, xz = (x1 * y2 + x2 * y1) % p, (y1 * z2 + y2 * z1) % p, (x1 * z2 + x2 * z1) % p
    u, v, w = a * xz + 3 * b * zz, a * (xx - a * zz) + 3 * b * xz, 3 * xx + a * zz
    return (xy * (yy - u) - yz * v) % p, ((yy + u) * (yy - u) + w * v) % p, (
        yz * (yy + u) + xy * w) % p


def _combine(curve: Any, *terms: Any) -> Any:
    # The sum of number times point, by doubling and adding.
    total = 0, 1, 0
    for bit in range(max(terms)[0].bit_length() - 1, -1, -1):
        total = _add(curve, total, total)
        for number, point in terms:
            if number >> bit & 1:
                total = _add(curve, total, point)
    return total


def _read_curve(kind: str) -> Any:
    p, a, text = _CURVES[kind]
    order, x, y = (int.from_bytes(binascii.a2b_base64(word), "big") for word in text.split())
    return order, p, (p, a, (y * y - x ** 3 - a * x) % p), (x, y, 1)


def _read_edwards(data: bytes) -> Any:
    # RFC 8032, 5.1.3 (square is x^2); then mapped.  Anybody can sign for a point of small order.
    sign, y = divmod(int.from_bytes(data, "little"), 1 << 255)
    square = (y * y - 1) * pow(_D * y * y + 1, _P - 2, _P) % _P
    x = pow(square, (_P + 3) // 8, _P)
    x = x if x * x % _P == square else x * pow(2, (_P - 1) // 4, _P) % _P
    x = x if x & 1 == sign else _P - x
    slope = (1 + y) * pow(x * (1 - y), _P - 2, _P)
    point = (slope * x + _SHIFT) % _P, slope * _SCALE % _P, 1
    if len(data) != 32 or y >= _P or x * x % _P != square \
            or not _combine(_read_curve("ed25519")[2], (8, point))[2]:
        raise ValueError("it holds no Ed25519 key, or a weak one")
    return point


def _read_number(data: bytes) -> int:
    # A positive number, in the only form that DER and SSH allow.
    if not data or data[0] > 127 or data[0] == 0 and data[1:2] < b"\x80":
        raise ValueError("a number in it is not written as it must be")
    return int.from_bytes(data, "big")


def _read_der(data: bytes) -> List[bytes]:
    # ECDSA's r and s (RFC 3279, 2.2.3), written anew to compare; %c takes no more than 255.
    body = data[3 if data[1] == 0x81 else 2:]
    first, second = body[2:2 + body[1]][:99], body[4 + body[1]:][:99]
    body = b"\2%c%s\2%c%s" % (len(first), first, len(second), second)
    if data != (b"0\x81%c" if len(body) > 127 else b"0%c") % len(body) + body:
        raise ValueError("it is no strict DER")
    return [first, second]


def _read_strings(data: bytes) -> List[bytes]:
    # SSH's: each behind its length (RFC 4251, 5).
    end = 4 + int.from_bytes(data[:4], "big")
    if 0 < len(data) < max(4, end):
        raise ValueError("it ends too early")
    return [data[4:end]] + _read_strings(data[end:]) if data else []


class PublicKey:
    """A key: n and e of RSA, a point on a curve, the 32 bytes of Ed25519; `id` is minisign's."""

    def __init__(self, kind: str, data: bytes, fields: List[bytes], id: bytes = b"") -> None:
        self.kind = kind
        self.id = id
        self.numbers: Any = fields[-1]
        self.fingerprint = "SHA256:" + write_base64(hashlib.sha256(data).digest()).rstrip("=")
        if kind == "rsa":
            n, e = self.numbers = tuple(map(_read_number, fields))
            if not 2048 <= n.bit_length() <= 8192 or not n & e & 1 or e < 3:
                raise ValueError("an RSA key needs 2048 to 8192 bits and an odd exponent from 3 on")
        elif kind == "ed25519":
            _read_edwards(self.numbers)
        else:
            p, a, b = _read_curve(kind)[2]
            x, y = divmod(int.from_bytes(fields[-1][1:], "big"), 1 << 8 * (len(fields[-1]) // 2))
            if self.numbers[0] != 4 or max(x, y) >= p or (y * y - x ** 3 - a * x - b) % p:
                raise ValueError(f"it holds no uncompressed point of {kind}")
            self.numbers = x, y, 1

    def begin(self, signature: Any, message: bytes = b"", name: str = "") -> Any:
        """Return the hash of what was signed, to be fed the (rest of the) message."""
        prefix = signature[:32] + self.numbers if self.kind == "ed25519" else b""
        return hashlib.new(name or _KEY_KINDS[self.kind][0], prefix + message)

    def holds(self, signature: Any, hasher: Any) -> bool:
        """Say whether this key signed what was hashed; ValueError or IndexError for nonsense."""
        digest, number = hasher.digest(), int.from_bytes(hasher.digest(), "big")
        if self.kind == "rsa":
            (n, e), s = self.numbers, int.from_bytes(signature, "big")
            size = (n.bit_length() + 7) // 8
            # s^e must be the one right encoding, all of it (RFC 8017, 8.2.2 and 9.2).
            right = (_DIGEST_INFO[len(digest)] + digest.hex()).rjust(2 * size - 4, "f")
            return len(signature) == size and s < n and pow(s, e, n) == int("1" + right, 16)
        order, p, curve, base = _read_curve(self.kind)
        if self.kind == "ed25519":
            # s B - k A = R (RFC 8032, 5.1.7); k is `number`.
            s, number = (int.from_bytes(text, "little") for text in (signature[32:], digest))
            (x, y, _), right = map(_read_edwards, (self.numbers, signature[:32]))
            x, y, z = _combine(curve, (s, base), (number % order, (x, -y, 1)))
            return len(signature) == 64 and s < order and z != 0 \
                and (right[0] * z - x) % p == (right[1] * z - y) % p == 0
        # x of (e G + r Q) / s is r (FIPS 186-5, 6.4.2); e is `number`, w is 1 / s.
        r, s = map(_read_number, signature if isinstance(signature, list) else _read_der(signature))
        w = pow(s, order - 2, order)
        x, _, z = _combine(curve, (number * w % order, base), (r * w % order, self.numbers))
        return 0 < r < order and 0 < s < order and z != 0 and x * pow(z, p - 2, p) % p % order == r


def _read_ssh_key(data: bytes) -> PublicKey:
    # RFC 4253, 5656, 8709; PROTOCOL.u2f.  RSA: e, n; ECDSA: curve, point; sk-: application last.
    name, *fields = _read_strings(data)
    kind = re.sub(rb"\A(sk-)?(ssh|ecdsa-sha2)-|@openssh\.com\Z", b"", name).decode("ascii")
    if kind not in _KEY_KINDS:
        raise ValueError(f"a key of type {name.decode('ascii')} is not taken")
    fields = fields[::-1] if kind == "rsa" else fields[:1 + kind.startswith("nist")]
    return PublicKey(kind, data, fields)


def read_key(text: str) -> PublicKey:
    """Read a public key: minisign's or signify's, literal or in a file, or a PEM; UsageError."""
    hint = "give a minisign or signify public key, its file, or what openssl pkey -pubout writes"
    with blaming(UsageError, f"key {text}", hint):
        data = text.encode() if KEY_LITERAL.match(text) else read_file(text, MAX_CONFIG_BYTES)
    with blaming(UsageError, f"key {text} line {1 + data.startswith(b'untrusted')}", hint):
        pem = re.match(_ARMOR, data)
        blob = read_base64(pem.group(2) if pem else re.sub(rb"\Auntrusted comment:.*", b"", data))
        for kind, (_, mark) in _KEY_KINDS.items():
            _, is_kind, value = blob.partition(binascii.unhexlify(mark))
            size = int.from_bytes(value[9:11], "big")  # of RSA's n; e is behind it
            if pem and is_kind:
                return PublicKey(kind, blob, [value] if kind != "rsa" else [
                    value[11:11 + size], value[13 + size:]])
        if pem or len(blob) != 42 or blob[:2] != b"Ed":
            raise ValueError("it is no public key of minisign, signify or openssl")
        return PublicKey("ed25519", blob, [blob[10:]], blob[2:10])


def read_signers(path: str) -> Iterator[Any]:
    """Read allowed_signers: (principals, namespaces, since, until, key) of each; UsageError."""
    hint = "a line is PRINCIPALS [namespaces=\"deploy\",valid-before=\"20301231Z\"] TYPE KEY"
    with blaming(UsageError, path, hint):
        lines = read_file(path, MAX_CONFIG_BYTES).decode().split("\n")
    for number, line in enumerate(lines, 1):
        with blaming(UsageError, f"{path} line {number}", hint):
            names, *rest, key = re.match(_SIGNER, line).groups("")  # type: ignore
            if key:
                yield (names.strip('"'), *rest,
                       _read_ssh_key(read_base64(key.encode())).fingerprint)


class Verification(NamedTuple):
    """A verification under way: it is fed the bytes once, and says who signed them."""

    name: str
    claims: Any  # each: what `finish` returns, a hash to feed, whether it proves the claim, ...
    sizes: List[int]

    def feed(self, chunk: Any) -> "Verification":
        """Take the next bytes."""
        self.sizes.append(len(chunk))
        for _, hasher, *_ in self.claims:
            hasher.update(chunk)
        return self

    def finish(self) -> Json:
        """Return {scheme, signer, key, at}; ArtifactRefused if nobody known signed these bytes."""
        for claim, hasher, is_true, *_ in self.claims:
            with suppress(ValueError, LookupError):
                if is_true(hasher):  # `of` is in Artifact's own claim, by SHA256SUMS
                    return dict(zip(("scheme", "signer", "key", "at", "of"), claim))
        raise ArtifactRefused(f"{self.name}: no known key signed these bytes", SUSPECT)


class Verifier(NamedTuple):
    """Says who signed bytes: one of the keys, or an allowed signer."""

    keys: Sequence[PublicKey]
    signers: Sequence[Any]
    namespace: str
    principals: Sequence[str] = ()
    legacy: bool = False

    def verify(self, data: bytes, signature: bytes, name: str) -> Json:
        """Verify bytes in memory; `name` is what errors call the signature."""
        return self.begin(signature, name).feed(data).finish()

    def begin(self, signature: bytes, name: str) -> Verification:
        """Read a signature of any kind, and return what to feed with the bytes; ArtifactRefused."""
        sizes: Any = []
        with blaming(ArtifactRefused, name, SUSPECT):
            if signature.startswith(b"untrusted comment:"):
                claims = [self._minisign(signature, sizes)]
            elif signature.startswith(b"-----BEGIN SSH"):
                claims = [self._ssh(signature)]
            elif signature.startswith(b"{"):
                claims = self.statements(signature)
            else:
                data = read_base64(signature)
                claims = [(("cosign", key.fingerprint, key.fingerprint, None), key.begin(data),
                           partial(key.holds, data)) for key in self.keys if not key.id]
        return Verification(name, claims, sizes)

    def statements(self, envelopes: bytes) -> List[Any]:
        """Return a claim for each in-toto statement that a key signed (DSSE 1.0), with it last."""
        claims = []
        for line in filter(None, map(bytes.strip, envelopes.split(b"\n"))):
            envelope = json.loads(line.decode())
            kind = envelope["payloadType"].encode()
            payload = read_base64(envelope["payload"].encode())
            message = b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload)
            for key, entry in itertools.product(self.keys, envelope["signatures"]):
                data = read_base64(entry["sig"].encode())
                with suppress(ValueError, LookupError, TypeError, AttributeError):
                    if not key.id and kind == b"application/vnd.in-toto+json" \
                            and key.holds(data, key.begin(data, message)):
                        statement = json.loads(payload.decode())
                        digests = [part["digest"].get("sha256") for part in statement["subject"]]
                        claims.append((
                            ("dsse", key.fingerprint, key.fingerprint, None), hashlib.sha256(),
                            lambda hasher, of=digests: hasher.hexdigest() in of, statement))
        return claims

    def _minisign(self, signature: bytes, sizes: Any) -> Any:
        # Two letters, key id, signature; `last` signs that with the comment.
        first, comment, last = re.match(_MINISIGN, signature).groups()  # type: ignore
        blob, moment = read_base64(first), re.search(rb"\btimestamp:(\d{1,10})\b", comment or b"")
        value, signer = blob[10:], blob[9:1:-1].hex().upper()
        key = next((key for key in self.keys if key.id == blob[2:10]), None)
        if not key:
            raise ValueError(f"it is by key {signer}, which is not in [signature] keys")
        if last and not key.holds(read_base64(last), key.begin(read_base64(last), value + comment)):
            raise ValueError("its trusted comment was changed")
        is_hashed = last and blob[:2] == b"ED"
        if not is_hashed and (blob[:2] != b"Ed" or last and not self.legacy):
            raise ValueError("it is of minisign's old form, which [signature] legacy = yes takes")
        try:
            hasher = hashlib.blake2b() if is_hashed else key.begin(value)
        except (AttributeError, ValueError):
            raise ValueError("it needs BLAKE2, which this Python has not got (FIPS mode?)")

        def is_true(hasher: Any) -> bool:
            if is_hashed:
                return key.holds(value, key.begin(value, hasher.digest()))
            # Nobody signed the two letters: 64 bytes may be the hash of what was signed as ED.
            return sum(sizes) != 64 and key.holds(value, hasher)

        at = format_time(int(moment.group(1))) if moment else None
        return ("minisign" if last else "signify", signer, key.fingerprint, at), hasher, is_true

    def _ssh(self, signature: bytes) -> Any:
        blob = read_base64(re.match(_ARMOR, signature).group(2))  # type: ignore
        public, namespace, reserved, algorithm, inner = _read_strings(blob[10:])
        key, (key_type, *_, application) = _read_ssh_key(public), _read_strings(public)
        flags = inner[-5:] if key_type.startswith(b"sk-") else b""
        kind, value = _read_strings(inner[:len(inner) - len(flags)])
        data = _read_strings(value) if key.kind.startswith("nist") else value
        sha = {key_type: "", b"rsa-sha2-256": "sha256", b"rsa-sha2-512": "sha512"}[kind]  # no SHA-1
        if blob[:10] != b"SSHSIG\0\0\0\1" or key.kind == "rsa" and not sha \
                or algorithm not in (b"sha256", b"sha512") or flags and not flags[0] & 1 \
                or namespace != self.namespace.encode():
            raise ValueError(f"{kind!r} over {algorithm!r} for {namespace!r}, or nobody touched it")

        def is_true(hasher: Any) -> bool:
            text = b"SSHSIG" + b"".join(len(part).to_bytes(4, "big") + part for part in (
                namespace, reserved, algorithm, hasher.digest()))
            if flags:
                text = hashlib.sha256(application).digest() + flags + hashlib.sha256(text).digest()
            return key.holds(data, key.begin(data, text, sha))

        now = time.strftime("%Y%m%d%H%M%S", time.gmtime())
        for globs, namespaces, since, until, known in self.signers:
            names = [name for name in self.principals or globs.split(",")[:1] if fits(name, globs)]
            if known == key.fingerprint and names and since <= now <= (until or "9") \
                    and fits(self.namespace, namespaces or "*"):
                return ("ssh", names[0], known, None), hashlib.new(algorithm.decode()), is_true
        raise ValueError(f"allowed_signers does not let {key.fingerprint} sign this")


# ============================================================================
# 8  Artifact
#    Digest, archive, manifest.  The artifact is opened once; the bytes that
#    are hashed are the bytes that are unpacked, and nothing is written that
#    the Judge has not admitted.
# ============================================================================

BLOCK_BYTES = 512 << 10
SLICE_BYTES = 128 << 10
QUEUE_BLOCKS = 4
MAX_SIDECAR_BYTES = 1 << 20
MAX_HEADER_BYTES = 1 << 20
MAX_HEADERS_BYTES = 64 << 20
MAX_CENTRAL_BYTES = 64 << 20
MAX_WINDOW_LOG = 27  # a decoder's memory: 128 MiB
MAX_EXTENSIONS = 16
MAX_STREAMS = 100000
MAX_LINK_HOPS = 40
MAX_LINK_STEPS = 4000000
MAX_REFUSALS = 20
MAX_SIZE_BYTES = 1 << 47
SHOWN_CHARACTERS = 300
# Added to what max_ratio allows: similar files compress very well.
RATIO_FLOOR_BYTES = 1 << 30

# Formats by content: a name proves nothing.
_MAGIC = (
    rb"(?P<tar_gz>\x1f\x8b\x08)|(?P<tar_bz2>BZh[1-9])|(?P<tar_xz>\xfd7zXZ\0)|"
    rb"(?P<tar_zst>\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18)|(?P<zip>PK(?:\x03\x04|\x05\x06))")
ARCHIVE_SUFFIX = r"(?i)\.(?:tar(?:\.(?:gz|bz2|xz|zst))?|t[gbx]z2?|tzst|zip|whl|jar|war)\Z"

SIGNATURES = (".minisig", ".sig", ".intoto.jsonl")  # appended to the artifact's name
FILE = "file"
DIRECTORY = "directory"
SYMLINK = "symlink"
HARD_LINK = "hard link"
REBUILD = "build the artifact again without it; nothing of it was kept"
COPY_AGAIN = "copy it again from where it was built"
_MODE_FILE = 0o644
_MODE_DIRECTORY = 0o755

# Called now and then with the bytes done; may raise (a signal).
Watch = Callable[[int], None]


def show(name: bytes) -> str:
    """Write a member's name for a message: bytes that are not UTF-8 as \\x8b, a long one cut."""
    text = repr(name.decode("utf-8", "surrogateescape"))
    text = re.sub(r"\\udc([89a-f][0-9a-f])", r"\\x\1", text)
    if len(text) > SHOWN_CHARACTERS + 50:
        text = f"{text[:SHOWN_CHARACTERS]}...{text[-40:]}"
    return text


def some_of(names: Sequence[bytes]) -> str:
    """Name the first few."""
    return ", ".join(map(show, names[:4])) + (", ..." if len(names) > 4 else "")


def refuse(name: bytes, why: str, hint: str = REBUILD) -> ArtifactRefused:
    """Make the error that names the member and the reason."""
    return ArtifactRefused(f"artifact refused: member {show(name)}: {why}", hint)


def damaged(why: str) -> ArtifactRefused:
    """Make the error for a damaged archive."""
    return ArtifactRefused(f"the archive is damaged or incomplete: {why}", COPY_AGAIN)


def exceeds(what: str, most: int, option: str) -> ArtifactRefused:
    """Make the error for what exceeds a limit."""
    shown = f"{most:,} members" if option == "max_files" else format_size(most)
    return ArtifactRefused(f"{what} more than the {shown} that [limits] {option} allows",
                           f"raise [limits] {option} if that is right")


class Member(NamedTuple):
    """One member of an archive, or one path of a manifest.

    `content` is the target of a symlink or hard link; in a manifest it is a file's SHA-256.
    `mtime_ns` is None where no time is known.  Names are bytes, in a manifest relative, without ./.
    """

    name: bytes
    kind: str
    mode: int
    size_bytes: int = 0
    mtime_ns: Optional[int] = None
    content: bytes = b""


Manifest = Dict[bytes, Member]
Members = Iterator[Tuple[Member, Iterable[Any]]]  # each with its data, to be read or not


# -- the artifact, its digest and its signature --------------------------------

def verifier_of(settings: Settings) -> Verifier:
    """Make the verifier that [signature] configures; UsageError for a damaged key."""
    options = settings.signature
    signers = list(read_signers(options.allowed_signers)) if options.allowed_signers else []
    return Verifier(list(map(read_key, options.keys)), signers, options.namespace,
                    options.principal, options.legacy)


class Artifact(Descriptor):
    """An archive or a directory, opened once and never again by name.

    `sha256` is the digest that its bytes must have, found by `identify`; `read_sha256` the one they
    had when they were last read to the end.  `expanded_bytes` and `files` are what it takes on
    disk, 0 where only unpacking (or hashing a directory) tells.  `notes` are for the operator.
    """

    format = ""
    sha256 = ""
    sha256_source = ""
    read_sha256 = ""
    read_bytes = 0
    signature_file = ""
    listing = b""  # the SHA256SUMS that is signed in the artifact's place, if one is
    verify: Any = None  # starts a Verification, one for each pass over the bytes
    copy: Any = None  # a file with what [signature] command is to read
    signature: Optional[Json] = None  # who signed
    # Why no signature counts: there is none, it is bad, or the bytes were not yet read.
    distrust: Optional[ArtifactRefused] = None
    # Set by sections 10 and 12: `built_at`, `release` (unchanged, and made from the same bytes in
    # the same way) and its `version`.
    version = ""
    built_at: Optional[str] = None
    release: Optional[str] = None
    expanded_bytes = 0
    files = 0
    tail = b""  # a zip's end, from its central directory on: read once

    def __init__(self, path: str, limits: Any, delegated: Optional[str] = None) -> None:
        """Open an artifact; ArtifactRefused where that fails, or its format or size is not allowed.

        With `limits` None any file will do.
        """
        # A symlink is resolved once, here, and a delegate's never; the result must not be one.
        self.given = absolute(path)
        self.path = self.given if delegated else os.path.realpath(self.given)
        self.nofollow = os.O_NOFOLLOW if delegated else 0  # for the files beside it
        self.name = os.path.basename(self.path)
        self.notes: List[str] = []
        # A zip's entries: the local header's offset << 32 | the position in the central directory
        # (numbers take the least memory).  The last has the offset where entries end.
        self.entries: List[int] = []
        try:
            self.descriptor = open_own_file(self.path) if delegated else os.open(
                self.path, _READ_FLAGS)
        except (OSError, ValueError) as error:
            why = "does not exist" if isinstance(error, FileNotFoundError) else \
                f"cannot be opened: {reason(error)}"
            raise ArtifactRefused(f"artifact {path} {why}", "name a file that this user can read; "
                                  "what is on the network or in a pipe must be saved first")
        self.status = os.fstat(self.descriptor)
        self.size_bytes = self.status.st_size
        # By this a later run tells whether it is the same file.
        self.identity = {key: getattr(self.status, f"st_{key}")
                         for key in ("dev", "ino", "size", "mtime_ns", "ctime_ns")}
        try:
            if stat.S_ISDIR(self.status.st_mode):
                self.format = "directory"
            elif limits is not None:
                # Only a regular file has a size; a pipe cannot be read, not even 0 bytes.
                self.format = format_of(self.size_bytes and self.read_at(
                    0, min(TAR_BLOCK_BYTES, self.size_bytes)) or b"")
                if not self.format:
                    raise ArtifactRefused(
                        f"artifact {self.path} is empty, begins with zeros, or has an unknown "
                        "format", "check the build or the copy; deploy a .tar, .tar.gz, .tar.bz2, "
                        ".tar.xz, .tar.zst, a .zip or a directory")
                if 0 < limits.max_artifact < self.size_bytes:
                    raise exceeds(f"{self.name} has {format_size(self.size_bytes)},",
                                  limits.max_artifact, "max_artifact")
                # Refuse now where its decoder is missing; nothing is decoded yet.
                decompress(self.format, iter(()))
                if self.format == "zip":
                    read_central(self, limits)
        except BaseException:
            self.close()
            raise

    def read_at(self, offset: int, size_bytes: int) -> bytes:
        """Read a piece; ArtifactRefused when the disk fails or the file ends early."""
        with blaming(ArtifactRefused, f"cannot read artifact {self.path}",
                     "wait until it is fully copied, and check the disk it lies on"):
            data = os.pread(self.descriptor, size_bytes, offset)
            if len(data) < size_bytes:
                raise ValueError("it became shorter while it was read")
            return data

    def blocks(self) -> Iterator[bytes]:
        """Read the whole file; set `read_sha256` and `signature`, or `distrust` if that is bad.

        A zip's `tail` is not read again: what was judged is hashed.
        """
        end, hasher = self.size_bytes - len(self.tail), hashlib.sha256()
        self.read_sha256, self.read_bytes = "", 0
        verification = self.verify() if self.verify else None
        copy = None if self.listing else self.copy  # which has the signed listing already
        if copy:
            copy.truncate(0)
            copy.seek(0)
        pieces = (self.read_at(offset, min(BLOCK_BYTES, end - offset))
                  for offset in range(0, end, BLOCK_BYTES))
        for block in itertools.chain(pieces, [self.tail]):
            hasher.update(block)
            if verification:
                verification.feed(block)
            if copy:
                self.keep(block)
            self.read_bytes += len(block)
            yield block
        self.read_sha256 = hasher.hexdigest()
        try:
            if verification:
                self.signature = dict({"of": "artifact"}, **verification.finish())
                self.distrust = None
        except ArtifactRefused as error:
            self.distrust = error

    def find_signature(self, settings: Settings, given: str) -> None:
        """Read `given`, else the first signature file; set `verify` and `distrust`."""
        options, sums = settings.signature, os.path.join(os.path.dirname(self.path), "SHA256SUMS")
        of_listing = [sums + ".minisig", sums + ".sig"]
        places = [self.path + suffix for suffix in SIGNATURES] + of_listing
        paths = [] if self.format == "directory" else list(filter(os.path.lexists, places))
        paths = [absolute(given)] if given else paths
        if not paths and options.verify == "if-present":
            return
        self.distrust = ArtifactRefused(
            f"{self.name} has no signature: no .minisig, .sig or .intoto.jsonl of its name, nor "
            "SHA256SUMS.minisig or .sig", "have it signed, or SHA256SUMS; pack a directory")
        if not paths:
            return
        self.signature_file = path = paths[0]
        try:
            with blaming(ArtifactRefused, path, SUSPECT):
                name = os.path.basename(path)
                signature = read_file(path, MAX_SIDECAR_BYTES, self.nofollow)
                verify: Any = partial(verifier_of(settings).begin, signature, name)
                if not options.keys and not options.allowed_signers:
                    # Always true: ask_signature_command judges, before anything is sealed.
                    claim = "command", options.command[0], None, None
                    verify = lambda: Verification(name, [(claim, hashlib.sha256(), bool)], [])
                verification = verify()  # a malformed signature is refused now
                if path in of_listing:
                    # The listing is verified now; each pass only compares the digest in it.
                    self.listing = read_file(sums, MAX_SIDECAR_BYTES, self.nofollow)
                    digests = [digest for entry, digest in read_digests(self.listing)
                               if os.path.basename(entry) == os.fsencode(self.name)]
                    if len(digests) != 1:
                        raise ValueError(f"SHA256SUMS does not list {self.name} once")
                    signed = (*verification.feed(self.listing).finish().values(), "SHA256SUMS")
                    verify = lambda: Verification(f"{name}: SHA256SUMS has another digest", [
                        (signed, hashlib.sha256(),
                         lambda hasher: hasher.hexdigest() == digests[0])], [])
        except ArtifactRefused as error:
            self.distrust = error
            return
        if options.command:
            self.copy = None  # an earlier call's
            self.keep(self.listing)
        # Last: when keep() fails, nothing may count as verified.
        self.verify = verify

    def keep(self, data: bytes) -> None:
        """Add to the copy for [signature] command; StepFailed where there is no room."""
        from tempfile import TemporaryFile
        with blaming(StepFailed, "cannot keep in TMPDIR what [signature] command is to read",
                     "make room in TMPDIR or /tmp, then run again"):
            self.copy = self.copy or TemporaryFile(buffering=0)
            write_all(self.copy.fileno(), data)

    def hash(self, settings: Settings, watch: Watch) -> str:
        """Return the SHA-256 of an archive's bytes, or of the tree that a directory becomes."""
        judge = Judge(settings, self)
        if self.format != "directory":
            for _ in self.blocks():
                watch(self.read_bytes)
            return self.read_sha256
        for member, pieces in read_directory(self, watch):
            # Judged before it is read: a sparse file can claim terabytes.
            for entry in judge.admit(member):
                if entry.kind == FILE:
                    judge.manifest[entry.name] = entry._replace(content=hash_pieces(pieces))
        judge.check()
        self.files = len(judge.manifest)
        self.expanded_bytes = count_members(judge.manifest)["bytes"]
        return tree_digest(judge.manifest)

    def identify(self, settings: Any, watch: Watch, sha256: str = "", version: str = "") -> None:
        """Find digest, version and size; `sha256` and `version` are what the operator gave.

        Else the digest is in ARTIFACT.sha256 (there it may stand alone) or in SHA256SUMS beside it,
        by the artifact's base name.
        """
        from shlex import quote
        (directory, name), policy = os.path.split(self.path), settings.artifact.checksum
        self.sha256, self.sha256_source = sha256[-64:].lower(), "--sha256"
        base = os.fsencode(name)
        sources = (name + ".sha256", (base, b"")), ("SHA256SUMS", (base,))
        for source, names in () if sha256 or policy == "off" else sources:
            with blaming(ArtifactRefused, f"cannot use {source}", "correct or remove it, or give "
                         "--sha256"), suppress(FileNotFoundError, NotADirectoryError):
                digests = {digest for entry, digest in read_digests(read_file(
                    os.path.join(directory, source), MAX_SIDECAR_BYTES, self.nofollow))
                    if entry.rpartition(b"/")[2] in names}
                if len(digests) > 1:
                    raise ValueError(f"it is ambiguous: it has different digests for {name}")
                if digests:
                    self.sha256, self.sha256_source = digests.pop(), source
                    break
                if source != "SHA256SUMS":
                    raise ValueError(f"it has no entry for {name}")
        # A directory was not transferred: nothing can have changed on the way.
        if not self.sha256 and policy == "required" and self.format != "directory":
            raise ArtifactRefused(
                f"no SHA-256 to compare {name} with: no --sha256, {name}.sha256 or SHA256SUMS",
                f"where the artifact was built: cd {quote(directory)} && "
                f"sha256sum {quote(name)} > {quote(name + '.sha256')}")
        if not self.sha256:
            self.sha256, self.sha256_source = self.hash(settings, watch), "computed"
        elif self.format == "directory":
            self.hash(settings, watch)
        self.version = version or find_version(self.name, settings.artifact.match, self.sha256)
        if self.format == "tar.gz" and 4 <= self.size_bytes < 1 << 29:
            # gzip's trailer has the size modulo 4 GiB (RFC 1952); deflate saves 1032 to 1 at most.
            full_bytes = int.from_bytes(self.read_at(self.size_bytes - 4, 4), "little")
            if self.size_bytes <= full_bytes <= 1032 * self.size_bytes:
                self.expanded_bytes = full_bytes
        if 0 < settings.limits.max_expanded < self.expanded_bytes:
            raise exceeds(f"{self.name} expands to {format_size(self.expanded_bytes)},",
                          settings.limits.max_expanded, "max_expanded")

    def confirm(self, settings: Settings, watch: Watch, known: str = "") -> None:
        """Compare the digest where nothing is unpacked; `known` is the last reading's."""
        if self.sha256_source != "computed":
            self.compare(known or self.hash(settings, watch))

    def compare(self, actual: str) -> None:
        """Raise ArtifactRefused for any digest but the expected one."""
        if self.sha256 and actual != self.sha256:
            raise ArtifactRefused(
                f"checksum mismatch for {self.name}: its SHA-256 is {actual}, expected "
                f"{self.sha256}",
                "copy the artifact again, or correct the digest; do not deploy it as it is")


def format_of(head: bytes) -> str:
    """Tell an archive's format by its first bytes; empty for an unknown one.

    A tar's header has a checksum: the sum of its bytes, with blanks for the field itself.
    """
    if len(head) == TAR_BLOCK_BYTES:
        claimed, blanked = tar_number(head[148:156]), head[:148] + b" " * 8 + head[156:]
        # Speed (8 % of small files): Adler-32's low half is 1 + the sum, modulo 65521.
        if claimed == zlib.adler32(blanked) - 1 & 0xffff or 65519 < claimed == sum(blanked):
            return "tar"
    match = re.match(_MAGIC, head)
    return str(match.lastgroup).replace("_", ".") if match else ""


# A digest alone, or a line of sha256sum, BSD sha256 or openssl.  Groups: the mark of an escaped
# name, name (BSD, openssl), digest, name (sha256sum).
_DIGEST_LINE = (rb"(?s)(\\?)(?:SHA(?:2-)?256 ?\((.+)\) ?= ?)?"
                rb"\s*([0-9A-Fa-f]{64})(?: [ *]?(.*\S.*)|\s*)\Z")
_ESCAPES = {b"\\": b"\\\\", b"\n": b"\\n", b"\r": b"\\r"}


def unescape_name(name: bytes) -> bytes:
    """Read a name as coreutils escape it; KeyError for an escape that they never write."""
    plain = {escaped: byte for byte, escaped in _ESCAPES.items()}
    return re.sub(rb"\\.?", lambda match: plain[match.group()], name, flags=re.DOTALL)


def read_digests(data: bytes) -> List[Tuple[bytes, str]]:
    """Read SHA256SUMS into (name or empty, digest); KeyError as unescape_name."""
    entries = []
    lines = re.split(rb"\r?\n", data.lstrip(b"\xef\xbb\xbf"))
    for match in filter(None, map(re.compile(_DIGEST_LINE).match, lines)):
        escaped, tagged, digest, plain = match.groups()
        entry = tagged or plain or b""
        entries.append((unescape_name(entry) if escaped else entry, digest.decode().lower()))
    return entries


# -- the version -------------------------------------------------------------

_VERSION = KINDS["version"][2] + r"\Z"
# What builds append for the platform is not part of the version.
_PLATFORM = (
    r"(?i)(?:[-_.](?:linux|darwin|windows|unknown|gnu|musl|amd64|arm64|x86_64|x64|x86|i[36]86|"
    r"aarch64|armv[67]l?|ppc64le|s390x|noarch|any|all|src|source|orig|bin|dist|release))+\Z")


def find_version(name: str, pattern: str, sha256: str) -> str:
    """Take the version from the artifact's name (1.0.0-rc.1 from foo-1.0.0-rc.1.tgz).

    By [artifact] match (ArtifactRefused for a name that does not fit), else by convention, else the
    digest's first 12 digits.
    """
    stem = re.sub(ARCHIVE_SUFFIX, "", name)
    if pattern:
        match = re.match("(.+)".join(map(re.escape, pattern.partition("@v")[::2])) + r"\Z", name)
    elif name.lower().endswith(".whl"):
        match = re.match(r"[^-]+-([^-]+)-.+-", stem)  # PEP 427: name-version-...-platform
    else:
        stem = re.sub(_PLATFORM, "", stem)
        match = (re.search(r"(?:\A|[-_])v?(\d+\.\d.*)\Z", stem)
                 or re.search(r"(?:\A|[-_])v?(\d+(?:[-_.+~].*)?)\Z", stem))
    if match and re.match(_VERSION, match.group(1)):
        return match.group(1)
    if pattern:
        raise ArtifactRefused(
            f"the artifact's name {name!r} does not fit [artifact] match = {pattern!r}, or what it "
            "has for a version cannot be one",
            "name the artifact by the pattern, or give a version with --release-version")
    return sha256[:12]


def version_key(version: str) -> Optional[Tuple[Any, ...]]:
    """Return the key that orders a version (numbers, then pre-release), None for an unclear one."""
    match = re.match(
        r"v?(\d+(?:\.\d+)*)(?:[-.~]?((?:a|b|c|rc|alpha|beta|pre|preview|dev)[.-]?\d*(?:\.\d+)*))?"
        r"(?:\+.*)?\Z", version, re.IGNORECASE)
    if not match:
        return None
    numbers, before = match.groups()
    # dev, alpha, beta, then every other word for a candidate
    parts = [int(part) if part.isdigit() else {"d": 0, "a": 1, "b": 2}.get(part[0], 3)
             for part in re.findall(r"[a-z]+|\d+", (before or "").lower())]
    numbers = re.sub(r"(\.0+)+\Z", "", numbers)
    return [int(number) for number in numbers.split(".")], not before, parts


# -- the manifest ------------------------------------------------------------

def add_member(manifest: Manifest, member: Member) -> None:
    """Add a member that is not the artifact's, replacing one of the same name.

    Missing directories above it are added; what was below it is dropped.
    """
    parent = member.name.rpartition(b"/")[0]
    if parent and parent not in manifest:
        add_member(manifest, Member(parent, DIRECTORY, _MODE_DIRECTORY))
    if member.name in manifest:
        for name in [name for name in manifest if name.startswith(member.name + b"/")]:
            del manifest[name]
    manifest[member.name] = member


def count_members(manifest: Manifest) -> Dict[str, int]:
    """Count files, directories, symlinks and bytes (0 where the manifest was read back)."""
    kinds = [member.kind for member in manifest.values()]
    return {"files": kinds.count(FILE), "directories": kinds.count(DIRECTORY),
            "symlinks": kinds.count(SYMLINK),
            "bytes": sum(member.size_bytes for member in manifest.values())}


def names_of(manifest: Manifest, kind: str) -> List[bytes]:
    """Return the names of one kind, sorted."""
    return sorted(name for name, member in manifest.items() if member.kind == kind)


def digest_lines(manifest: Manifest) -> Iterator[bytes]:
    """Yield the lines of `.deploy/manifests/<id>`, in sha256sum's own format."""
    for name in names_of(manifest, FILE):
        escaped = re.sub(rb"[\\\n\r]", lambda match: _ESCAPES[match.group()], name)
        mark = b"\\" if escaped != name else b""
        yield b"%s%s  %s\n" % (mark, manifest[name].content.hex().encode(), escaped)


def tree_lines(manifest: Manifest) -> Iterator[bytes]:
    """Yield the lines of `.deploy/trees/<id>`: directories, symlinks, modes, a JSON array each."""
    for kind in (DIRECTORY, SYMLINK, FILE):
        for name in names_of(manifest, kind):
            _, _, mode, _, _, content = manifest[name]
            if kind != FILE or mode != _MODE_FILE:
                texts = [text.decode("utf-8", "surrogateescape")
                         for text in (name, content if kind == SYMLINK else b"%04o" % mode)]
                yield json.dumps(["mode" if kind == FILE else kind, *texts]).encode("ascii") + b"\n"


def tree_digest(manifest: Manifest) -> str:
    """Return the SHA-256 of the lines of both files."""
    lines = itertools.chain(digest_lines(manifest), tree_lines(manifest))
    return hash_pieces(lines).hex()


def read_manifest(digests: Iterable[bytes], tree: Iterable[bytes]) -> Manifest:
    """Read a manifest from its two files' lines; ValueError for a malformed one."""
    manifest: Manifest = {}
    form = re.compile(rb"(?s)(\\?)([0-9a-f]{64})  (.+)\n\Z")
    try:
        for line in digests:
            escaped, digest, name = form.match(line).groups()  # type: ignore
            name = unescape_name(name) if escaped else name
            manifest[name] = Member(name, FILE, _MODE_FILE, content=binascii.unhexlify(digest))
        for line in tree:
            kind, *texts = json.loads(line[:line.index(b"\n")].decode("ascii"))
            name, value = [text.encode("utf-8", "surrogateescape") for text in texts]
            if kind == SYMLINK:
                manifest[name] = Member(name, SYMLINK, 0o777, content=value)
            elif kind == DIRECTORY:
                manifest[name] = Member(name, DIRECTORY, int(value, 8))
            else:
                manifest[name] = manifest[name]._replace(mode=int(value, 8))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError("its manifest has a malformed line") from None
    return manifest


# -- judging -----------------------------------------------------------------

_UNSAFE_BYTES = bytes(range(32)) + b"\x7f\\"
UNSAFE = "has a control character or a backslash"
NO_NAME = "its name is empty, or strip_components leaves no name of it"
WINDOWS_HINT = ("it was made on Windows by a program that writes \\ for /: make it with tar, 7-Zip "
                "or PowerShell 7")
LINK_HINT = ("name targets that are meant in [artifact] allow_links, or leave them out: python3 -m "
             "venv --copies, or links that [hooks] post_stage makes")


def judge_name(name: bytes, strip: int) -> Tuple[bytes, str]:
    """Drop `.`, empty and the first few components; return the rest, and why it is unsafe."""
    parts = [part for part in name.split(b"/") if part not in (b"", b".")]
    plain, problem = b"/".join(parts[strip:]), ""
    # Speed (3 % of small files): translate() takes half of a pattern's time.
    if len(name.translate(None, _UNSAFE_BYTES)) != len(name):
        problem = f"its name {UNSAFE}"
    elif name.startswith(b"/"):
        problem = "its name is absolute"
    elif len(plain) > MAX_PATH_BYTES:
        problem = f"its name has more than {MAX_PATH_BYTES} bytes"
    elif b".." in parts:
        problem = "its name climbs with '..'"
    elif len(plain) > MAX_NAME_BYTES and max(map(len, parts)) > MAX_NAME_BYTES:
        problem = f"its name has a component over {MAX_NAME_BYTES} bytes"
    elif len(parts) > MAX_DEPTH:
        problem = f"it lies over {MAX_DEPTH} levels deep"
    elif not plain:
        problem = NO_NAME
    return plain, problem


# What gets into archives unnoticed: the name of a file or directory, and what it is.
_MACOS = "left there by macOS; pack with COPYFILE_DISABLE=1 tar --exclude .DS_Store, or zip -X"
_ODDITIES = {b"._": _MACOS, b"__MACOSX": _MACOS, b".DS_Store": _MACOS,
             b".git": "a Git repository, with all of its history; pack with git archive"}


class Judge:
    """Admits members or refuses the archive; never looks at the disk.

    Later members and symlinks are judged by the `manifest` of those before; the caller adds the
    digests.  Refused members are collected for `check`; an exceeded limit ends it at once.
    """

    def __init__(self, settings: Settings, artifact: Artifact) -> None:
        limits, root = settings.limits, settings.deploy.root or "/-"
        most = limits.max_expanded or MAX_SIZE_BYTES, "max_expanded"
        if limits.max_ratio and artifact.format != "directory":
            most = min(most, (RATIO_FLOOR_BYTES + artifact.size_bytes * limits.max_ratio,
                              "max_ratio"))
        self.most_expanded = most
        self.manifest: Manifest = {}
        self.refused = 0
        self._refusals: List[ArtifactRefused] = []  # the first MAX_REFUSALS
        self._settings = settings.artifact
        self._roots = [os.fsencode(path) for path in (root, os.path.realpath(root))]
        self._limits = [(limits.max_files or MAX_SIZE_BYTES, "max_files"),
                        (limits.max_file or MAX_SIZE_BYTES, "max_file"), most]
        # A tar's backslash is meant: systemd writes - in unit names as \x2d.
        self._backslash_hint = WINDOWS_HINT if artifact.format == "zip" else REBUILD
        self._members = 0
        self._expanded_bytes = 0
        self._steps = 0

    def admit(self, member: Member) -> List[Member]:
        """Return what is to be made now: directories, then a file or the copy for a hard link.

        A copy's `content` is its source.  Empty once one was refused; ArtifactRefused at a limit.
        """
        entries = [member]
        try:
            entries = self._judge(member)
        except ArtifactRefused as refusal:
            self._note(refusal)
        size_bytes = entries[-1].size_bytes if entries else 0
        self._members += 1
        self._expanded_bytes += size_bytes
        # Directories that are only implied cost as much as members do.
        values = max(self._members, len(self.manifest)), size_bytes, self._expanded_bytes
        for value, (most, option) in zip(values, self._limits):
            if value > most:
                self.check()
                raise exceeds(f"artifact refused: member {show(member.name)}: it has or leads to",
                              most, option)
        return [] if self.refused else entries

    def _judge(self, member: Member) -> List[Member]:
        kind, target, manifest, entries = member.kind, member.content, self.manifest, []
        name, problem = judge_name(member.name, self._settings.strip_components)
        is_link = kind == SYMLINK
        if problem == NO_NAME and kind == DIRECTORY and member.name:
            return entries  # the top itself
        if kind not in (FILE, DIRECTORY, SYMLINK, HARD_LINK):
            problem = f"it is a {kind}, which a release cannot hold"
        elif member.size_bytes and kind != FILE:
            problem = f"it is a {kind} and has data"
        elif is_link and self._settings.symlinks == "refuse":
            problem = "it is a symlink, and [artifact] symlinks = refuse"
        elif is_link and not 0 < len(target) <= MAX_PATH_BYTES:
            problem = "its symlink target is empty or too long"
        elif is_link and len(target.translate(None, _UNSAFE_BYTES)) != len(target):
            problem = f"its symlink target {UNSAFE}"
        if problem:
            raise refuse(member.name, problem,
                         self._backslash_hint if b"\\" in member.name else REBUILD)
        above = name.rpartition(b"/")[0]
        while above and above not in manifest:  # the archive need not list directories
            entries.insert(0, Member(above, DIRECTORY, _MODE_DIRECTORY))
            above = above.rpartition(b"/")[0]
        if above and manifest[above].kind != DIRECTORY:
            raise refuse(member.name, f"it lies below {show(above)}, a {manifest[above].kind}")
        for implied in entries:
            manifest[implied.name] = implied
        known = manifest.get(name)
        if known is not None and (known.kind, kind) != (DIRECTORY, DIRECTORY):
            raise refuse(member.name, f"the name comes twice; it is a {known.kind} already")
        # No special bits; writable by the owner alone, who can always read it.
        mode = member.mode & 0o755 | (0o500 if kind == DIRECTORY else 0o400)
        entry = Member(name, kind, mode, member.size_bytes, member.mtime_ns)
        if is_link:
            entry = Member(name, kind, 0o777, content=target)
        elif kind == HARD_LINK:
            source_name, problem = judge_name(target, self._settings.strip_components)
            if problem:
                raise refuse(target, problem)
            source = manifest.get(source_name)
            if source is None or source.kind == DIRECTORY:
                raise refuse(member.name, f"it is a hard link to {show(target)}, which is no "
                             "earlier file or symlink of the archive")
            # The manifest has a file with the source's digest; the caller is told what to copy.
            entry = source._replace(name=name)
            if source.kind == FILE:  # a symlink's copy is made with the symlinks
                entries.append(Member(name, kind, source.mode, source.size_bytes, None,
                                      source_name))
        elif known is None:
            entries.append(entry)
        manifest[name] = entry
        return entries

    def _note(self, refusal: ArtifactRefused) -> None:
        self.refused += 1
        if self.refused <= MAX_REFUSALS:
            self._refusals.append(refusal)

    def check(self) -> None:
        """Raise ArtifactRefused where members were refused; it names them all."""
        if self.refused:
            members = [refusal.message.partition(": member ")[2] for refusal in self._refusals]
            if self.refused > len(members):
                members.append(f"and {self.refused - len(members):,} more")
            hints = dict.fromkeys(refusal.hint for refusal in self._refusals)
            raise ArtifactRefused(f"artifact refused: {count(self.refused, 'member')}: "
                                  + "; ".join(members), "; ".join(hints))

    def finish(self) -> List[str]:
        """Judge where symlinks lead, which only the whole archive tells; return what is odd."""
        manifest, notes, odd = self.manifest, [], {}
        for refusal in filter(None, map(self._follow, names_of(manifest, SYMLINK))):
            self._note(refusal)
        self.check()
        if not manifest:
            raise ArtifactRefused("the artifact holds nothing, or nothing below strip_components",
                                  "look at what the build put into it; nothing was kept")
        files = [name for name, member in manifest.items() if member.kind == FILE]
        tops = {name.partition(b"/")[0] for name in manifest}
        if not self._settings.strip_components and len(tops) == 1 and files and tops != {*files}:
            notes.append(f"everything lies under {show(min(tops))}: "
                         "strip_components = 1 would drop it")
        if len(files) == 1 and re.search(ARCHIVE_SUFFIX, os.fsdecode(files[0])):
            notes.append(f"it holds nothing but {show(files[0])}, which stays packed: "
                         "deploy that archive itself")
        for name in manifest:
            base = name.rpartition(b"/")[2]
            oddity = _ODDITIES.get(b"._" if base.startswith(b"._") else base)
            if oddity:
                odd.setdefault(oddity, []).append(name)
        private = [name for name in files if not manifest[name].mode & 0o044]
        if private:
            odd[f"{count(len(private), 'file')} that only the owner may read, as a build under "
                "umask 077 makes them; pack opens them to all, secrets belong in shared/"] = private
        # By hash: the names themselves would take more memory than all else.
        import unicodedata
        seen: Dict[int, bytes] = {}
        for name in manifest:
            text = unicodedata.normalize("NFC", name.decode("utf-8", "surrogateescape"))
            key = unicodedata.normalize("NFC", text.casefold()).encode("utf-8", "surrogateescape")
            other = key if key in manifest else seen.setdefault(hash(key), name)
            if other != name:
                odd.setdefault("the same names on systems that ignore case or Unicode form",
                               []).extend((other, name))
        return notes + [f"{some_of(names)}: {oddity}" for oddity, names in odd.items()]

    def _follow(self, name: bytes) -> Optional[ArtifactRefused]:
        """Follow a symlink as the kernel would, but in the manifest.

        Returns why it is refused, if so.  Loops and long chains are admitted: they lead nowhere.
        """
        place, _, last = name.rpartition(b"/")
        parts, hops, top = [last], 0, b""  # a stack: the next part is the last one
        while parts and not top:
            part = parts.pop()
            if part == b"..":
                known = self.manifest.get(place)
                if not place:
                    # Out of the release: on from releases/; other releases are outside as well.
                    parts.append(part)
                    top = self._roots[1] + b"/releases/-"
                elif known is None or known.kind != DIRECTORY:
                    return refuse(name, "its symlink target climbs out of what is no directory of "
                                        "the archive")
                place = place.rpartition(b"/")[0]
            elif part not in (b"", b"."):
                inside = place + b"/" + part if place else part
                known = self.manifest.get(inside)
                if known is None or known.kind != SYMLINK or hops > MAX_LINK_HOPS:
                    place = inside
                    continue
                target = known.content.split(b"/")
                parts += reversed(target)
                hops += 1
                self._steps += len(target)
                top = b"" if target[0] else b"/"
                if self._steps > MAX_LINK_STEPS:
                    return refuse(name, "the archive's symlinks are too many and too long to "
                                        "follow")
        if not top or self._settings.symlinks == "any":
            return None
        place = os.path.normpath(b"/".join([top, *reversed(parts)]))
        own = tuple(root + word for root in self._roots for word in (b"/shared/", b"/current/"))
        is_meant = any(re.fullmatch(path_pattern(glob), os.fsdecode(place))
                       for glob in self._settings.allow_links)
        if is_meant or (place + b"/").startswith(own):
            return None
        return refuse(name, f"it is a symlink to {show(self.manifest[name].content)}, which "
                            f"leaves the release for {show(place)}", LINK_HINT)


# -- decoding: blocks of the file in, blocks of the archive out ----------------

class Stream:
    """Cuts pieces of given sizes out of blocks of any size; `view` is the current one's rest."""

    def __init__(self, blocks: Iterator[bytes]) -> None:
        self.blocks = blocks
        self.view = memoryview(b"")

    def peek(self, size_bytes: int = 1) -> bytes:
        """Return so many bytes, or fewer at the data's end, without taking them."""
        while len(self.view) < size_bytes:
            block = next(self.blocks, b"")
            if not block:
                break
            self.view = memoryview(bytes(self.view) + block if self.view else block)
        return bytes(self.view[:size_bytes])

    def pieces(self, size_bytes: int) -> Iterator[memoryview]:
        """Take so many bytes in uncopied pieces; ArtifactRefused when the data end before."""
        while size_bytes:
            if not self.view and not self.peek():
                raise damaged("it ends in the middle of a member, or without its end-of-archive")
            piece = self.view[:size_bytes]
            self.view = self.view[size_bytes:]
            size_bytes -= len(piece)
            yield piece

    def take(self, size_bytes: int) -> bytes:
        """Take so many bytes; ArtifactRefused as in pieces()."""
        return b"".join(self.pieces(size_bytes))


class LibZstd:
    """Decodes one zstd frame by libzstd, with the interface of Python 3.14's decompressor."""

    def __init__(self) -> None:
        import ctypes
        self._library = ctypes.CDLL("libzstd.so.1")
        self._library.ZSTD_createDCtx.restype = ctypes.c_void_p
        self._context = ctypes.c_void_p(self._library.ZSTD_createDCtx())
        self._library.ZSTD_DCtx_setParameter(self._context, 100, MAX_WINDOW_LOG)  # windowLogMax

    def __del__(self) -> None:
        with suppress(AttributeError):  # __init__ found no such library
            self._library.ZSTD_freeDCtx(self._context)

    def decompress(self, data: bytes, most_bytes: int) -> bytes:
        """Decode into so many bytes at most; ValueError for damaged data."""
        import ctypes
        given = ctypes.create_string_buffer(data, len(data) + 1)
        space = ctypes.create_string_buffer(most_bytes)
        # ZSTD_inBuffer and ZSTD_outBuffer: address, size, and how many bytes are done.
        triple = ctypes.c_size_t * 3
        source = triple(ctypes.addressof(given), len(data), 0)
        target = triple(ctypes.addressof(space), most_bytes, 0)
        code = self._library.ZSTD_decompressStream(self._context, target, source)
        if code < 0:  # an error (zstd_errors.h): the size_t is read as an int
            raise ValueError("its window is too large" if code == -16 else f"zstd error {-code}")
        self.eof = not code
        self.unused_data = self.unconsumed_tail = data[source[2]:]
        return ctypes.string_at(space, target[2])


def decompress(kind: str, blocks: Iterator[bytes]) -> Iterator[bytes]:
    """Decode a file's blocks; at once ImportError or ArtifactRefused for a missing decoder."""
    make: Any = partial(zlib.decompressobj, 31)
    errors: Any = zlib.error
    if kind in ("tar", "zip"):
        return blocks
    if kind == "tar.bz2":
        import bz2
        make, errors = bz2.BZ2Decompressor, (OSError, EOFError)
    elif kind == "tar.xz":
        import lzma
        make = partial(lzma.LZMADecompressor, lzma.FORMAT_XZ, 1 << MAX_WINDOW_LOG)
        errors = lzma.LZMAError
    elif kind == "tar.zst":
        try:
            from compression import zstd  # type: ignore
            options = {zstd.DecompressionParameter.window_log_max: MAX_WINDOW_LOG}
            make, errors = partial(zstd.ZstdDecompressor, options=options), zstd.ZstdError
        except ImportError:
            make, errors = LibZstd, ValueError
            with blaming(ArtifactRefused, "this Python and this host cannot read zstd",
                         "install libzstd, or deploy a .tar.gz"):
                make()
    return decode_streams(blocks, make, errors)


def decode_streams(blocks: Iterator[Any], make: Callable[[], Any], errors: Any,
                   most_streams: int = MAX_STREAMS) -> Iterator[bytes]:
    """Decode consecutive streams, zeros allowed between them; each must be complete."""
    decoder: Any = None
    streams = 0
    # Cut smaller to bound what a decoder copies when a stream ends within a block.
    slices = (block[start:start + SLICE_BYTES] for block in blocks
              for start in range(0, len(block), SLICE_BYTES))
    try:
        for data in slices:
            is_full = False
            while data or is_full:
                if decoder is None:
                    data = bytes(data).lstrip(b"\0") if streams else data
                    if not data:
                        break
                    decoder, streams = make(), streams + 1
                    if streams > most_streams:
                        raise ArtifactRefused(
                            f"the archive is cut into more than {most_streams:,} streams",
                            "pack it in one: gzip, not bgzip")
                piece = decoder.decompress(data, BLOCK_BYTES)
                yield piece
                is_full = len(piece) == BLOCK_BYTES
                # zlib hands back what it has not read; the others keep it and are asked again.
                data = getattr(decoder, "unconsumed_tail", b"")
                if decoder.eof:
                    data, decoder, is_full = decoder.unused_data, None, False
    except errors as error:
        if not re.search(r"(?i)memory|window", str(error)):
            raise damaged(str(error))
        most = format_size(1 << MAX_WINDOW_LOG)
        raise ArtifactRefused(
            f"decoding needs more memory than the {most} it may take ({error})", "pack it with a "
            "smaller dictionary or window: xz -9, zstd -19 without --ultra or --long")
    if decoder is not None:
        raise damaged("the compressed data end too early")


def pump(artifact: Artifact, limit: Tuple[int, str], watch: Watch) -> Iterator[Any]:
    """Read, hash and decode in a second thread."""
    import queue
    items: Any = queue.Queue(QUEUE_BLOCKS)
    stopping = False

    def work() -> None:
        raw, decoded_bytes = artifact.blocks(), 0
        try:
            decoded: Iterator[Any] = decode_zip(artifact, raw) if artifact.format == "zip" else \
                decompress(artifact.format, raw)
            # What the decoder leaves is hashed as well.
            for item in itertools.chain(decoded, (b"" for _ in raw)):
                decoded_bytes += len(item)  # a zip's size is known from its directory
                if decoded_bytes > limit[0]:
                    raise exceeds(f"{artifact.name} expands to", *limit)
                if stopping:
                    return
                if item:
                    items.put(item)
            items.put(b"")
        except BaseException as error:
            items.put(error)

    artifact.read_sha256 = ""
    worker = start_thread(work)
    item: Any = None
    try:
        while item is None or item:
            item = None
            with suppress(queue.Empty):  # a slow disk or decoder must not delay a signal
                item = items.get(timeout=WATCH_SECONDS)
            watch(artifact.read_bytes)
            if isinstance(item, BaseException):
                raise item
            if item:
                yield item
    finally:
        # The worker must not outlive the open artifact: it stops at its next item.
        stopping = True
        while not worker.wait(0):
            with suppress(queue.Empty):
                items.get(timeout=0.01)


# -- tar ---------------------------------------------------------------------

TAR_BLOCK_BYTES = 512
TAR_KINDS = {
    b"0": FILE, b"\0": FILE, b"7": FILE, b"1": HARD_LINK, b"2": SYMLINK, b"3": "character device",
    b"4": "block device", b"5": DIRECTORY, b"6": "FIFO", b"S": "sparse file",
    b"D": "part of an incremental archive (tar -g)", b"M": "continuation from another volume",
    b"V": "volume label", b"X": "Solaris extended header",
}
_SPLIT_HEADER = struct.Struct("100s8s16x12s12s8xc100s6s82x155s12x").unpack
_PAX_RECORD = re.compile(rb"([1-9]\d{0,6}) ([^=\n]{1,255})=")
_NO_NUMBER = -1 << 62


def tar_number(field: bytes) -> int:
    """Read an octal field, empty for 0, or GNU's base-256; far below 0 for an unreadable one."""
    digits = field.rstrip(b"\0 ")
    if not digits.isdigit():  # speed (20 % of small files): nearly every field is
        if field[0] in (0x80, 0xff):
            return int.from_bytes(field[1:], "big", signed=field[0] == 0xff)
        match = re.match(rb" *([0-7]*)(?:[ \0].*)?\Z", field, re.DOTALL)
        if not match:
            return _NO_NUMBER
        digits = match.group(1) or b"0"
    try:
        return int(digits, 8)
    except ValueError:
        return _NO_NUMBER


def read_tar(artifact: Artifact, stream: Stream) -> Members:
    """Parse ustar, pax and GNU members.

    ArtifactRefused: bad checksum, headers that disagree, negative size (CVE-2025-8194), no end.
    """
    extensions: List[Tuple[bytes, bytes]] = []
    extension_bytes = padding = 0
    head = stream.peek(TAR_BLOCK_BYTES)
    inner = format_of(head)
    if inner != "tar" and head[257:262] != b"ustar" and (any(head) or not head):
        what = f"a {inner} and no tar" if inner else "no tar"
        raise ArtifactRefused(f"what is compressed here is {what}",
                              "deploy a tar, compressed once: tar -czf app.tar.gz .")
    while True:
        header = stream.take(padding + TAR_BLOCK_BYTES)[padding:]
        if not any(header):
            break
        name, mode_field, size_field, time_field, flag, target, magic, prefix = \
            _SPLIT_HEADER(header)
        name = name.partition(b"\0")[0]
        if format_of(header) != "tar":
            raise refuse(name, "its header has a wrong checksum", COPY_AGAIN)
        size_bytes, mode, seconds = map(tar_number, (size_field, mode_field, time_field))
        if size_bytes < 0 or mode < 0:
            raise refuse(name, "its header has a negative or unreadable number")
        if flag in b"xgLK":
            extension_bytes += size_bytes
            if len(extensions) == MAX_EXTENSIONS or size_bytes > MAX_HEADER_BYTES \
                    or extension_bytes > MAX_HEADERS_BYTES:
                raise refuse(name, "its extension headers are too many or too large")
            extensions.append((flag, stream.take(size_bytes)))
        else:
            if magic == b"ustar\0" and prefix[0]:
                name = prefix.partition(b"\0")[0] + b"/" + name
            kind = TAR_KINDS.get(flag) or f"member of the unknown type {flag!r}"
            mtime_ns = seconds * 10 ** 9 if abs(seconds) < 1 << 36 else None
            member = Member(name, kind, mode, size_bytes, mtime_ns, target.partition(b"\0")[0])
            if extensions:
                member = extended(member, extensions)
                extensions, size_bytes = [], member.size_bytes
            if flag in b"0\0" and member.name.endswith(b"/"):
                member = member._replace(kind=DIRECTORY)  # as tar wrote them before POSIX
            pieces = stream.pieces(size_bytes)
            yield member, pieces
            for _ in pieces:  # what the caller did not read
                pass
        padding = -size_bytes % TAR_BLOCK_BYTES
    if extensions:  # no member follows, as git archive writes an empty tree; judged all the same
        extended(Member(name, FILE, _MODE_FILE), extensions)
    if any(flag != b"g" for flag, _ in extensions) \
            or stream.peek() and any(stream.take(TAR_BLOCK_BYTES)):
        raise damaged("it has data after a single end-of-archive block")
    # A tape record's padding means nothing, but all is read to be hashed: any() of a list.
    if any([bool(block.tobytes().strip(b"\0")) for block in itertools.chain(
            [stream.view], map(memoryview, stream.blocks))]):
        artifact.notes.append("what lies behind the end of the archive is not all zeros, and no "
                              "part of the release")


def extended(member: Member, extensions: List[Tuple[bytes, bytes]]) -> Member:
    """Replace what extension headers (pax, GNU) give anew; other keywords mean nothing here."""
    name, kind, mode, size_bytes, mtime_ns, target = member
    special: Dict[bytes, bytes] = {}
    for flag, data in extensions:
        position = 0
        while position < len(data):
            if flag in b"LK":
                key, value = b"path" if flag == b"L" else b"linkpath", data.rstrip(b"\0")
                position = len(data)
            else:
                record = _PAX_RECORD.match(data, position)
                end = position + int(record.group(1)) if record else 0
                if not record or not record.end() < end <= len(data) or data[end - 1:end] != b"\n":
                    raise refuse(name, "its pax header is malformed")
                key, value, position = record.group(2), data[record.end():end - 1], end
            if key.startswith((b"GNU.sparse", b"GNU.dumpdir")):
                raise refuse(name, "it is a sparse file or part of an incremental archive, which a "
                             "release cannot hold", "build the archive without --sparse and -g")
            # A global one, in which `git archive` puts its commit, must not name or size members.
            if key in (b"path", b"linkpath", b"size") and (flag == b"g" or key in special):
                raise refuse(name, f"its extension headers give {key.decode()} twice, or a global "
                                   "one gives it to every member")
            if flag != b"g":
                special[key] = value
    name = special.get(b"path", name)
    if b"linkpath" in special and kind not in (SYMLINK, HARD_LINK):
        raise refuse(name, f"its extension header makes a link of it, its own header a {kind}")
    if b"size" in special:
        size = int(special[b"size"]) if re.match(rb"\d{1,18}\Z", special[b"size"]) else -1
        # It may differ only where the header's field cannot hold it.
        if size != size_bytes and size < 8 << 30:
            raise refuse(name, f"its pax header gives an unreadable size, or another than the "
                               f"{size_bytes} bytes of its ustar header")
        size_bytes = size
    if b"mtime" in special:
        match = re.match(rb"(-?\d{1,11})(?:\.(\d*))?\Z", special[b"mtime"])
        mtime_ns = int(match.group(1) + (match.group(2) or b"").ljust(9, b"0")[:9]) \
            if match else None
    return Member(name, kind, mode, size_bytes, mtime_ns, special.get(b"linkpath", target))


# -- zip ---------------------------------------------------------------------

_ENCRYPTED = 0x2041
_DESCRIBED_LATER = 0x0008
_UTF8 = 0x0800
_FULL = 0xffffffff


# An entry of the central directory (APPNOTE 4.3.12): its member, raw name, Unicode path field,
# flags, method, CRC-32, packed and full size, and the offset of its local header.
ZipEntry = Tuple[Member, bytes, bytes, int, int, int, int, int, int]


def find_central(artifact: Artifact) -> Tuple[int, int, int]:
    """Return the central directory's offset, size and number of entries (APPNOTE 4.3.14 to 16)."""
    base = max(0, artifact.size_bytes - 22 - 65535)
    tail = artifact.read_at(base, artifact.size_bytes - base)
    ends, why = [], "missing"
    for match in re.finditer(rb"PK\x05\x06(?=.{16}(..))", tail, re.DOTALL):
        rest_at = match.start() + 22 + int.from_bytes(match.group(1), "little")
        rest = tail[rest_at:]
        if rest.strip(b"\0"):
            why = f"not its end: {len(rest)} bytes of no entry lie behind it"
        elif rest_at <= len(tail):  # zeros that follow pad a tape's record
            ends.append(match.start())
    if len(ends) != 1:
        raise damaged(f"its end-of-central-directory record is {'ambiguous' if ends else why}")
    values = struct.unpack_from("<HHHHII", tail, ends[0] + 4)
    end = base + ends[0]
    if tail.startswith(b"PK\6\7", ends[0] - 20):
        # A zip64 record and the locator that points to it stand before this one.
        end -= 76
        signature, record_bytes, *wide, _, disk, at, disks = struct.unpack(
            "<4sQ4xIIQQQQ4sIQI", artifact.read_at(end, 76))
        if (signature, record_bytes, disk, at) != (b"PK\6\6", 44, 0, end) or disks > 1:
            raise damaged("its zip64 locator points nowhere or its record not where it should be")
        if any(value not in (full, 0xffff, _FULL) for value, full in zip(values, wide)):
            raise damaged("its zip64 and zip records disagree")
        values = tuple(wide)
    disk, first_disk, here, number, size_bytes, start = values
    if disk or first_disk or here != number:
        raise damaged("it is split over several disks")
    if start + size_bytes != end or size_bytes > MAX_CENTRAL_BYTES or size_bytes < 46 * number:
        raise damaged("its central directory is not where it should be, or too large")
    return start, size_bytes, number


def read_central(artifact: Artifact, limits: Any) -> None:
    """Read a zip's central directory, once; ArtifactRefused for a damaged or ambiguous one."""
    start, size_bytes, number = find_central(artifact)
    if 0 < limits.max_files < number:
        raise exceeds(f"the zip has {number:,} entries,", limits.max_files, "max_files")
    artifact.tail = artifact.read_at(start, artifact.size_bytes - start)
    position, unknown = 0, []
    try:
        while position < size_bytes:
            entry, end = zip_entry(artifact.tail, position)
            (name, *_), raw_name, unicode_name, *_, full_bytes, offset = entry
            artifact.entries.append(offset << 32 | position)
            artifact.expanded_bytes += full_bytes
            if name not in (raw_name, unicode_name[5:]):
                unknown.append(name)
            position = end
    except struct.error:
        position = -1
    artifact.files = len(artifact.entries)
    if (position, artifact.files) != (size_bytes, number):
        raise damaged(f"its central directory is malformed, or has not {number} entries")
    artifact.entries.sort()
    artifact.entries.append(start << 32)
    if artifact.entries[0] >> 32:
        raise refuse(b"", "something is hidden before the first entry")
    if unknown:
        artifact.notes.append(f"{count(len(unknown), 'name')} of the zip are in an encoding that "
                              f"it does not tell; taken for cp437: {some_of(unknown)}")


def zip_entry(central: bytes, position: int) -> Tuple[ZipEntry, int]:
    """Read one entry of the central directory; return it and where the next one begins."""
    (signature, system, flags, method, clock, date, crc, packed_bytes, size_bytes, name_length,
     extra_length, comment_length, disk, attributes, offset) = struct.unpack_from(
         "<4sxB2xHHHHIIIHHHH2xII", central, position)
    name_end = position + 46 + name_length
    raw_name = name = central[position + 46:name_end]
    if signature != b"PK\1\2" or disk not in (0, 0xffff):
        raise damaged("its central directory is malformed")
    if flags & _ENCRYPTED or method not in (0, 8):
        raise refuse(raw_name, f"it is encrypted, or compressed by method {method}",
                     "build the zip with deflate and without a password")
    fields, (size_bytes, packed_bytes, offset) = read_extra(
        central[name_end:name_end + extra_length], (size_bytes, packed_bytes, offset), raw_name)
    # The Unicode path field (4.6.9) counts only if its CRC is that of this name.
    unicode_name = fields.get(0x7075, b"")
    if unicode_name[:5] == struct.pack("<BI", 1, zlib.crc32(raw_name)):
        name = unicode_name[5:]
        if flags & _UTF8 and name != raw_name:
            raise refuse(raw_name, f"its Unicode path field has another name: {show(name)}")
    else:
        try:  # Info-ZIP on Unix writes UTF-8 and leaves the flag out
            raw_name.decode("utf-8" if system == 3 or flags & _UTF8 else "ascii")
        except UnicodeDecodeError:
            name = raw_name.decode("cp437").encode("utf-8")
    # Unix modes are in the external attributes; Maven sets all type bits for a directory.
    mode = attributes >> 16 if system == 3 else 0
    kind = _KINDS_ON_DISK.get(stat.S_IFMT(mode) or stat.S_IFREG, "special file")
    if name.endswith(b"/") and kind in (FILE, "special file"):
        kind, mode = DIRECTORY, 0
    if name.endswith(b"/") != (kind == DIRECTORY):
        raise refuse(name, f"its name and its attributes, of a {kind}, disagree about what it is")
    mode = stat.S_IMODE(mode) or (_MODE_DIRECTORY if kind == DIRECTORY else _MODE_FILE)
    # The extended timestamp, else the DOS time, taken as UTC: its zone is unknown.
    stamp, mtime_ns = fields.get(0x5455, b""), None
    if len(stamp) >= 5 and stamp[0] & 1:
        mtime_ns = 10 ** 9 * int.from_bytes(stamp[1:5], "little", signed=True)
    elif date:
        import calendar
        month = min(date >> 5 & 15 or 1, 12)  # 0, 13, 14 and 15 are none
        mtime_ns = 10 ** 9 * calendar.timegm((1980 + (date >> 9), month, date & 31, clock >> 11,
                                              clock >> 5 & 63, 2 * (clock & 31)))
    member = Member(name, kind, mode, size_bytes, mtime_ns)
    return (member, raw_name, unicode_name, flags, method, crc, packed_bytes, size_bytes,
            offset), name_end + extra_length + comment_length


def read_extra(extra: bytes, values: Tuple[int, ...], name: bytes) -> Tuple[Any, Any]:
    """Split the extra field by kind; the first of a kind counts (APPNOTE 4.5).

    Saturated 32-bit `values` are replaced by those of the zip64 field (4.5.3).
    """
    fields: Dict[int, bytes] = {}
    position = 0
    while position + 4 <= len(extra):
        kind, size_bytes = struct.unpack_from("<HH", extra, position)
        position += 4 + size_bytes
        fields.setdefault(kind, extra[position - size_bytes:position])
    saturated = values.count(_FULL)
    if saturated:
        if len(fields.get(0x0001, b"")) < 8 * saturated:
            raise refuse(name, "its sizes are in a zip64 field that is missing")
        full = iter(struct.unpack_from(f"<{saturated}Q", fields[0x0001]))
        values = tuple(next(full) if value == _FULL else value for value in values)
    return fields, values


def decode_zip(artifact: Artifact, blocks: Iterator[bytes]) -> Iterator[List[Any]]:
    """Unpack the entries' data in one pass over the file.

    All must be as the central directory says: local headers, sizes, checksums, no overlap, no gap.
    Yields lists of (entry, piece), because handing each one to the other thread would cost more.
    """
    stream, batch, batch_bytes = Stream(blocks), [], 0
    following = itertools.islice(artifact.entries, 1, None)
    for place, next_place in zip(artifact.entries, following):
        entry, _ = zip_entry(artifact.tail, place & _FULL)
        (name, *_), _, _, flags, method, crc, packed_bytes, size_bytes, offset = entry
        gap_bytes = (next_place >> 32) - offset - local_header(entry, stream) - packed_bytes
        pieces: Iterator[Any] = stream.pieces(packed_bytes)
        if method:
            pieces = decode_streams(pieces, partial(zlib.decompressobj, -15), zlib.error, 1)
        actual_bytes = actual_crc = 0
        try:
            for piece in pieces if size_bytes else itertools.chain([b""], pieces):
                actual_bytes += len(piece)
                actual_crc = zlib.crc32(piece, actual_crc)
                if actual_bytes > size_bytes:
                    break
                batch.append((entry, piece))
                batch_bytes += 256 + len(piece)  # an entry costs as much without data
                if batch_bytes > SLICE_BYTES:
                    yield batch
                    batch, batch_bytes = [], 0
        except ArtifactRefused as error:
            raise refuse(name, "its compressed data are damaged, or do not end where they should: "
                               f"{error.message}", COPY_AGAIN)
        if (actual_bytes, actual_crc) != (size_bytes, crc):
            raise refuse(name, "its data have not the announced size or checksum", COPY_AGAIN)
        # Only its data descriptor may lie between its data and what follows (APPNOTE 4.3.9), with
        # or without signature, with sizes of 32 or 64 bits.
        gap, allowed = stream.take(gap_bytes) if 0 <= gap_bytes <= 24 else b"?", [b""]
        if flags & _DESCRIBED_LATER:
            with suppress(struct.error):  # the sizes do not fit into 32 bits
                for form in ("<IQQ", "<III"):
                    allowed.append(struct.pack(form, crc, packed_bytes, size_bytes))
        if gap not in allowed and not (gap[:4] == b"PK\7\x08" and gap[4:] in allowed[1:]):
            raise refuse(name, "its data overlap another entry's, or something is hidden around "
                               "them")
    yield batch


def local_header(entry: ZipEntry, stream: Stream) -> int:
    """Compare a local header (APPNOTE 4.3.7) with the central directory; return its size."""
    (own_name, *_), raw_name, unicode_name, flags, method, *expected, _ = entry
    mark, local_flags, local_method, crc, packed_bytes, size_bytes, name_length, extra_length = \
        struct.unpack("<4s2xHH4xIIIHH", stream.take(30))
    name, extra = stream.take(name_length), stream.take(extra_length)
    # Any of the three may be left to the data descriptor, which decode_zip compares.
    later = (0, _FULL) if flags & _DESCRIBED_LATER else ()
    fields, sizes = read_extra(extra, () if later else (size_bytes, packed_bytes), name)
    size_bytes, packed_bytes = sizes or (size_bytes, packed_bytes)
    if (mark, name, local_flags, local_method) != (b"PK\3\4", raw_name, flags, method) \
            or fields.get(0x7075, unicode_name) != unicode_name \
            or any(value not in (right, *later)
                   for value, right in zip((crc, packed_bytes, size_bytes), expected)):
        raise refuse(own_name, "its data do not begin with a local header, or that and the central "
                             "directory disagree")
    return 30 + name_length + extra_length


def read_zip(batches: Iterator[List[Tuple[ZipEntry, Any]]]) -> Members:
    """Yield the members of a zip from what decode_zip has unpacked."""
    entries = itertools.groupby(itertools.chain.from_iterable(batches), operator.itemgetter(0))
    for (member, *_), group in entries:
        pieces = map(operator.itemgetter(1), group)
        if member.kind == SYMLINK:
            if member.size_bytes > MAX_PATH_BYTES:
                raise refuse(member.name, "its symlink target is too long")
            member = member._replace(size_bytes=0, content=b"".join(pieces))
        yield member, pieces


# -- trees on disk -----------------------------------------------------------

_KINDS_ON_DISK = {
    stat.S_IFREG: FILE, stat.S_IFDIR: DIRECTORY, stat.S_IFLNK: SYMLINK, stat.S_IFIFO: "FIFO",
    stat.S_IFSOCK: "socket", stat.S_IFCHR: "character device", stat.S_IFBLK: "block device"}


def walk_tree(directory: int, prefix: bytes = b"") -> Iterator[Tuple[Member, int, os.stat_result]]:
    """Walk a tree by descriptors, names sorted: yields each member, open until the next one.

    The descriptor is -1 for a symlink, which is not followed, and for a socket or the like.
    """
    for base in sorted(map(os.fsencode, os.listdir(directory))):
        name, target = prefix + base, b""
        with Descriptor() as opened:
            try:
                # No stat before: it could have seen another file.
                opened.descriptor = os.open(base, _READ_FLAGS, dir_fd=directory)
                status = os.fstat(opened.descriptor)
            except OSError as error:
                if error.errno not in (errno.ELOOP, errno.ENXIO):
                    error.filename = name
                    raise
                status = os.stat(base, dir_fd=directory, follow_symlinks=False)
                if stat.S_ISLNK(status.st_mode):
                    target = os.readlink(base, dir_fd=directory)
            kind = _KINDS_ON_DISK.get(stat.S_IFMT(status.st_mode), "special file")
            mode, size_bytes = stat.S_IMODE(status.st_mode), 0
            if kind == DIRECTORY:
                mode &= ~stat.S_ISGID  # inherited from releases/, not the artifact's
            elif kind == FILE:
                size_bytes = status.st_size
            yield Member(name, kind, mode, size_bytes, status.st_mtime_ns, target), \
                opened.descriptor, status
            # No artifact goes deeper: of what was added there, the top directory is named.
            if kind == DIRECTORY and name.count(b"/") < MAX_DEPTH:
                yield from walk_tree(opened.descriptor, name + b"/")


def blocks_of(descriptor: int, size_bytes: int = MAX_SIZE_BYTES,
              watch: Optional[Watch] = None) -> Iterator[bytes]:
    """Read an open file from its start, at most `size_bytes` of it."""
    offset = 0
    while offset < size_bytes:
        if watch:
            watch(offset)
        block = os.pread(descriptor, min(BLOCK_BYTES, size_bytes - offset), offset)
        if not block:
            break
        offset += len(block)
        yield block


def tree_members(directory: int, watch: Watch) -> Iterator[Tuple[Member, Any, Iterable[bytes]]]:
    """Walk a tree: yields members, their status, and a file's data up to the size it had."""
    done_bytes = 0
    for member, descriptor, status in walk_tree(directory):
        watch(done_bytes)
        yield member, status, blocks_of(descriptor, member.size_bytes,
                                        lambda offset: watch(done_bytes + offset))
        done_bytes += member.size_bytes


def reading(artifact: Artifact, items: Iterable[Any]) -> Iterator[Any]:
    """Pass items on; an OSError from reading a directory becomes ArtifactRefused."""
    try:
        yield from items
    except OSError as error:
        where = show(error.filename) if isinstance(error.filename, bytes) else "part of it"
        raise ArtifactRefused(f"cannot read artifact {artifact.path}: {where}: {reason(error)}",
                              "make all of it readable for this user")


def read_directory(artifact: Artifact, watch: Watch, forbidden: Tuple[int, int] = (0, 0),
                   skipped: Iterable[Tuple[int, int]] = ()) -> Members:
    """Yield a directory's members; ArtifactRefused for what cannot be read.

    `forbidden` is a (device, inode) that must not lie inside, `skipped` are files to leave out.
    """
    tree = tree_members(artifact.descriptor, watch)
    for member, status, pieces in reading(artifact, tree):
        place = status.st_dev, status.st_ino
        if place == forbidden:
            raise refuse(member.name, "the release would be made inside the artifact",
                         "deploy a directory that does not hold the root")
        if place not in skipped:
            yield member, reading(artifact, pieces)


def hash_pieces(pieces: Iterable[Any]) -> bytes:
    """Return the SHA-256 of pieces, as bytes."""
    hasher = hashlib.sha256()
    for piece in pieces:
        hasher.update(piece)
    return hasher.digest()


def scan_tree(directory: Directory, watch: Watch, mutable: Any = None,
              known: Optional[Manifest] = None) -> Manifest:
    """Make the manifest of a tree on disk; given the `known` one, hash only its files.

    Without `known`, ArtifactRefused for what a release cannot hold.  `mutable` files are left out.
    """
    manifest: Manifest = {}
    for member, _, pieces in tree_members(directory.descriptor, watch):
        name, kind, mode, size_bytes, _, content = member
        if mutable and kind != DIRECTORY and mutable.match(os.fsdecode(name)):
            continue
        if known is None and kind not in (FILE, DIRECTORY, SYMLINK):
            raise refuse(name, f"it is a {kind}, which a release cannot hold")
        if kind == FILE and (known is None or name in known):
            content = hash_pieces(pieces)
        manifest[name] = Member(name, kind, mode, size_bytes, None, content)
    return manifest


# How two trees differ: "changed", "missing" or "added" -> path (as os gives it) -> what changed,
# empty for a file's bytes.
Differences = Dict[str, Dict[str, str]]


def differences(old: Manifest, new: Manifest) -> Differences:
    """Name every path that differs between two trees."""
    result: Differences = {"changed": {}, "missing": {}, "added": {}}
    for name in sorted({*old, *new}):
        was, now, path = old.get(name), new.get(name), os.fsdecode(name)
        if was is None or now is None:
            result["added" if was is None else "missing"][path] = ""
        elif now.kind != was.kind:
            result["changed"][path] = f"is a {now.kind}, was a {was.kind}"
        elif now.content != was.content:
            result["changed"][path] = f"led to {os.fsdecode(was.content)}" \
                if now.kind == SYMLINK else ""
        elif now.mode != was.mode:
            result["changed"][path] = f"has mode {now.mode:04o}, was {was.mode:04o}"
    return result


# -- unpacking ---------------------------------------------------------------

_WRITE_FLAGS = (_CREATE_FLAGS & ~os.O_WRONLY) | os.O_RDWR  # a reflink is read back
_FICLONE = 0x40049409  # ioctl_ficlone(2)


def unpack(artifact: Artifact, destination: Directory, settings: Settings, watch: Watch,
           sharer: Optional["Sharer"] = None) -> Tuple[Manifest, List[str]]:
    """Hash, judge and unpack in one pass into an empty private directory.

    Returns the manifest and notes for the operator.  Names need no check against the disk: every
    directory on the way was made here, and symlinks are made last, when no file follows.
    ArtifactRefused, also for a wrong digest; OSError from writing as it comes.
    """
    place, judge, kind = destination.descriptor, Judge(settings, artifact), artifact.format
    manifest, status = judge.manifest, os.fstat(place)
    blocks: Any
    if kind == "directory":
        members = blocks = read_directory(artifact, watch, (status.st_dev, status.st_ino))
    else:
        blocks = pump(artifact, judge.most_expanded, watch)
        members = read_zip(blocks) if kind == "zip" else read_tar(artifact, Stream(blocks))
    umask = os.umask(0)
    # Speed (3 % of small files): what is made here lives on; looking for cycles finds none.
    gc.disable()
    try:
        for member, pieces in members:
            for entry in judge.admit(member):
                if entry.kind == DIRECTORY:
                    os.mkdir(entry.name, _MODE_DIRECTORY | status.st_mode & 0o020, dir_fd=place)
                elif entry.kind == FILE:
                    digest = write_file(entry, pieces, place, sharer)
                    manifest[entry.name] = Member(*entry[:4], None, digest)
                else:  # a hard link is copied: changing one file must not change another
                    with Descriptor() as source:
                        source.descriptor = os.open(entry.content, _READ_FLAGS, dir_fd=place)
                        mtime_ns = os.fstat(source.descriptor).st_mtime_ns
                        write_file(entry._replace(mtime_ns=mtime_ns),
                                   blocks_of(source.descriptor), place, sharer)
        if kind == "directory":
            artifact.read_sha256 = tree_digest(manifest)
        artifact.compare(artifact.read_sha256)
        notes = judge.finish()
        for name in names_of(manifest, SYMLINK):
            os.symlink(manifest[name].content, name, dir_fd=place)
    except ArtifactRefused:
        if artifact.sha256 and kind != "directory":
            # A wrong digest explains best why they could not be read.
            artifact.compare(artifact.read_sha256 or artifact.hash(settings, watch))
        judge.check()
        raise
    finally:
        blocks.close()
        gc.enable()
        os.umask(umask)
    if artifact.distrust:
        raise artifact.distrust
    return manifest, artifact.notes + notes


def write_file(entry: Member, pieces: Iterable[Any], place: int,
               sharer: Optional["Sharer"]) -> bytes:
    """Write a new file and its time, shared where the live one is equal; return its SHA-256."""
    is_small = entry.size_bytes <= BLOCK_BYTES
    if sharer and is_small:
        # Writing what is then shared takes most of the time: a small file waits for that.
        pieces = [b"".join(pieces)]
        digest = hash_pieces(pieces)
        if sharer.share(entry, pieces[0], digest, place=place, name=entry.name):
            return digest
    hasher = hashlib.sha256()
    descriptor = os.open(entry.name, _WRITE_FLAGS, entry.mode, dir_fd=place)
    try:
        for piece in pieces:
            hasher.update(piece)
            write_all(descriptor, piece)
        if entry.mtime_ns is not None:
            os.utime(descriptor, ns=(entry.mtime_ns, entry.mtime_ns))
    finally:
        os.close(descriptor)
    digest = hasher.digest()
    if sharer and not is_small:
        temporary = os.fsencode(temporary_name("shared"))
        if sharer.share(entry, None, digest, place=place, name=temporary):
            os.rename(temporary, entry.name, src_dir_fd=place, dst_dir_fd=place)
    return digest


class Sharer(Descriptor):
    """Lets files that are equal in the live release take no space again.

    The live file is read again, whatever its manifest says; no symlink is followed.
    """

    def __init__(self, release: Directory, how: str) -> None:
        self.how = how  # "no" once a reflink failed
        self.shared_files = 0
        self._release = release
        self._parent: Optional[bytes] = None  # the name of what `descriptor` is open on

    def share(self, entry: Member, data: Optional[bytes], digest: bytes, *, place: int,
              name: bytes) -> bool:
        """Make a file of the live one's blocks, or a hard link to it, if both are equal.

        `data` is all of a small one, to be compared rather than hashed.
        """
        parent, _, base = entry.name.rpartition(b"/")
        is_equal = lambda descriptor: hash_pieces(blocks_of(descriptor)) == digest \
            if data is None else os.pread(descriptor, len(data), 0) == data
        if self.how == "no" or not entry.size_bytes:
            return False
        with Descriptor() as live, Descriptor() as new:
            with suppress(OSError):  # no such file, or unreadable
                if parent != self._parent:  # they come directory by directory
                    self.close()
                    self._parent = parent
                    opened = self._release.child(os.fsdecode(parent))
                    self.descriptor, opened.descriptor = opened.descriptor, -1
                live.descriptor = os.open(base, _READ_FLAGS, dir_fd=self.descriptor)
                status = os.fstat(live.descriptor)
                if status.st_size != entry.size_bytes:
                    return False
                # A link shares owner, mode, time and ACL, too.  Nobody can swap the open file.
                own = stat.S_IFREG | entry.mode, os.geteuid()
                if self.how == "hardlink" and (status.st_mode, status.st_uid) == own \
                        and entry.mtime_ns in (None, status.st_mtime_ns) \
                        and set(os.listxattr(live.descriptor)) <= {"security.selinux"} \
                        and is_equal(live.descriptor):
                    os.link(f"/proc/self/fd/{live.descriptor}", name, dst_dir_fd=place)
                    self.shared_files += 1
                    return True
            if live.descriptor < 0 or self.how == "hardlink":
                return False
            new.descriptor = os.open(name, _WRITE_FLAGS, entry.mode, dir_fd=place)
            try:
                fcntl.ioctl(new.descriptor, _FICLONE, live.descriptor)
            except OSError:
                self.how = "no"
            # Not the live file is compared: it may change at any time, and its ctime need not tell.
            if self.how == "reflink" and is_equal(new.descriptor):
                if entry.mtime_ns is not None:
                    os.utime(new.descriptor, ns=(entry.mtime_ns, entry.mtime_ns))
                self.shared_files += 1
                return True
            os.unlink(name, dir_fd=place)
            return False


# -- packing -------------------------------------------------------------------

PACKED_EPOCH = "315532800"  # 1980-01-01, the first that a zip can hold


def tar_pieces(members: Members, judge: Judge, seconds: Optional[int],
               notes: List[str]) -> Iterator[Any]:
    """Write members as GNU tar does, judged as an artifact is; add to `notes`."""
    import tarfile
    stamp, stale = ((seconds or 0) & 0xffffffff).to_bytes(4, "little"), []
    for member, pieces in members:
        name, kind, mode, size_bytes, mtime_ns, target = member
        judge.admit(member)
        if judge.refused:
            continue
        info = tarfile.TarInfo(os.fsdecode(name))
        info.mode = 0o755 if kind == DIRECTORY or mode & 0o100 else 0o644
        info.size, info.uname, info.gname = size_bytes, "root", "root"
        info.linkname = os.fsdecode(target)
        info.type = {FILE: b"0", DIRECTORY: b"5", SYMLINK: b"2"}[kind]
        info.mtime = mtime_ns / 10 ** 9 if seconds is None else seconds
        yield info.tobuf(tarfile.PAX_FORMAT if seconds is None else tarfile.GNU_FORMAT, "utf-8",
                         "surrogateescape")
        is_bytecode = seconds is not None and name.endswith(b".pyc") and b"__pycache__/" in name
        left_bytes = size_bytes
        for piece in pieces:
            left_bytes -= len(piece)
            # It holds its source's old time (PEP 552), behind flags, of which 1 and 3 mean that a
            # digest counts instead; up to Python 3.6, in their place.
            if is_bytecode and piece[4:8] not in (b"\1\0\0\0", b"\3\0\0\0", stamp) \
                    and piece[8:12] != stamp:
                stale.append(name)
            is_bytecode = False
            yield piece
        if left_bytes:
            raise refuse(name, "it became shorter while it was read", "pack it again")
        yield bytes(-size_bytes % TAR_BLOCK_BYTES)
    notes += judge.finish()
    if stale:
        notes.append(f"{some_of(stale)}: bytecode that will be stale, and written anew in the "
                     "release; pack with --keep-mtimes or without __pycache__")
    yield bytes(2 * TAR_BLOCK_BYTES)


def pack(source: str, target: str, settings: Settings, watch: Watch, *,
         keep_mtimes: bool = False) -> Tuple[Json, List[str]]:
    """Write a directory as a reproducible .tar.gz and its .sha256; return its facts and warnings.

    The same tree gives the same bytes: names sorted, owners root, modes 0644 and 0755, one time
    ($SOURCE_DATE_EPOCH, else 1980-01-01).  ArtifactRefused for what could not be deployed; `target`
    is left alone then, and where `watch` raises.
    """
    epoch = environment("SOURCE_DATE_EPOCH") or PACKED_EPOCH
    if not re.match(r"\d{1,11}\Z", epoch):
        raise UsageError(f"SOURCE_DATE_EPOCH={epoch} is no number of seconds",
                         "SOURCE_DATE_EPOCH=$(git log -1 --format=%ct)")
    directory, base = os.path.split(absolute(target))
    notes: List[str] = []

    def compressed() -> Iterator[bytes]:
        # Leave out what is being written and what an earlier run left.
        own = [os.stat(name, dir_fd=place.descriptor) for name in os.listdir(place.descriptor)
               if name in (base, f"{base}.sha256") or name.startswith(f".{base}.{os.getpid()}.")]
        members = read_directory(artifact, watch, skipped={
            (status.st_dev, status.st_ino) for status in own})
        encoder = zlib.compressobj(6, zlib.DEFLATED, 31)
        for piece in tar_pieces(members, judge, None if keep_mtimes else int(epoch), notes):
            yield encoder.compress(piece)
        yield encoder.flush()

    with Artifact(source, settings.limits) as artifact, \
            Directory(os.path.realpath(directory)) as place:
        judge = Judge(settings, artifact)
        digest = place.write(base, compressed(), 0o644)
        packed = Member(os.fsencode(base), FILE, 0o644, content=bytes.fromhex(digest))
        place.write(base + ".sha256", digest_lines({packed.name: packed}), 0o644)
        size_bytes = os.stat(base, dir_fd=place.descriptor).st_size
    return {"sha256": digest, "size": size_bytes,
            "files": count_members(judge.manifest)["files"]}, notes


# ============================================================================
# 9  Hooks, services, probes, templates
#    How the operator's commands are run, and how a service is asked whether it is
#    healthy.  Every wait ends, whatever a command, a service or a server does.
# ============================================================================

EVIDENCE_CHARACTERS = 300
HOW_TO_RUN = ("it must be there (./NAME comes with the release), be executable (chmod +x), not lie "
              "on what is mounted noexec, and its #! line name an interpreter that exists here")

# A check yields findings: status (fail, warn, skip, ok), detail, and what to do about it.  Its
# result is the worst, so that it may end with an "ok"; without any it is ok, too.
Finding = Tuple[str, str, str]
Findings = Iterator[Finding]
Answer = Json  # of a peer or a probe, as far as it is known


def read_text(path: str) -> str:
    """Read a regular file of at most 64 KiB; never waits for a FIFO."""
    return read_file(path, 65536).decode("utf-8", "replace")


# -- commands under the rules for hooks --------------------------------------

def commands(settings: Settings) -> List[Any]:
    """List what is run under the rules for hooks: (section, key, argv, in_root, in_release)."""
    rows = [("hooks", hook, argv, hook == "pre_stage", hook != "pre_stage")
            for hook in HOOK_NAMES for argv in getattr(settings.hooks, hook)]
    rows += [("migrate", name, getattr(settings.migrate, name), False, True)
             for name in MIGRATE_NAMES]
    rows += [("slots", "reload", slot.reload, True, False) for slot in settings.slots.values()]
    for kind in ("service", "probe", "notify"):
        for name, section in sorted(getattr(settings, kind).items()):
            in_root = kind == "notify" or getattr(section, "when", "") in ("before", "both")
            rows.append((f"{kind}:{name}", "command", section.command, in_root, True))
    rows += [("candidate", "command", settings.candidate.command, False, True),
             ("policy", "judge", settings.policy.judge, True, False),
             ("signature", "command", settings.signature.command, True, False)]
    return [row for row in rows if row[2]]


def missing_programs(settings: Settings, *sections: str) -> Findings:
    """Find the programs of these sections, or kinds of sections, that are missing."""
    for section, key, (program, *_), _, _ in commands(settings):
        # What comes with the release, or is found in a PATH of [env], cannot be looked for yet.
        is_elsewhere = program[0] != "/" if "/" in program else "PATH" in settings.env
        is_wanted = {section, section.partition(":")[0]}.intersection(sections)
        if is_wanted and not is_elsewhere and not find_command(program):
            yield ("fail", f"[{section}] {key}: {program} is not found or not executable",
                   HOW_TO_RUN)


def foreign_program(settings: Settings, where: str, program: str, directory: str) -> Problems:
    """Find, by path, what others could change on the way to a program that root runs."""
    search_path = native(settings.env.get("PATH", command_path()))  # where hooks are looked up
    places = program_places(native(program), directory, search_path)
    return {path: (f"{problem}, on the way to {program} of {where}",
                   f"{hint}; or [hooks] run_as = USER, so that root does not run it")
            for place in places if not settings.hooks.run_as  # else it has only that user's rights
            for path, (problem, hint) in trust_problems(place).items()}


def accepting(settings: Settings, paths: Iterable[str]) -> str:
    """Spell the option that accepts these paths' risk, beside those accepted so far."""
    risks = "\n".join(dict.fromkeys([*settings.preflight.accept_risk, *paths]))
    option = spell(["--set", f"preflight.accept_risk={risks}"])
    return f"accept the risk, for every such path: {option}"


def refuse_foreign_programs(settings: Settings, programs: Iterable[Tuple[str, str]],
                            directory: str) -> None:
    """Raise StepFailed if root would run a (place, program) that others could have written."""
    # Preflight has looked, but a hook may have made links in the release since.
    if os.geteuid() != 0:
        return
    problems = {path: problem for where, program in programs
                for path, problem in foreign_program(settings, where, program, directory).items()
                if path not in settings.preflight.accept_risk}
    for problem, hint in problems.values():
        raise StepFailed(f"what root would run could have been written by others: {problem}",
                         f"{hint}; or {accepting(settings, problems)}")


def start_command(run: Run, context: Context, what: str, argv: Sequence[str], *,
                  start: Callable[..., Any] = run_command, **options: Any) -> Any:
    """Run an operator's command under the rules for hooks; `what` is KIND NAME (hook pre_stage)."""
    settings = run.settings
    directory = next(filter(os.path.isdir, (  # the release, or the nearest to it that exists
        context.directory, context.release_path, context.root, "/")))
    refuse_foreign_programs(settings, [(what, argv[0])], directory)
    environ = base_environment()
    if settings.hooks.run_as:
        environ["HOME"] = os.path.expanduser(f"~{settings.hooks.run_as}")
    if run.traceparent:
        environ["TRACEPARENT"] = run.traceparent
    environ = {**environ, **settings.env, **context.variables(),
               "DEPLOY_HOOK": what.replace("hook ", "").replace(" ", ":"),
               **options.pop("variables", {})}
    environ = {name: native(value) for name, value in environ.items()}
    return start([native(word) for word in argv], environ=environ, directory=directory,
                 run_as=settings.hooks.run_as, interrupts=run.interrupts,
                 mask=run.console.secrets.mask, **options)


SHOWN_BYTES = 8 << 20  # of one command's output: a flood must fill neither log nor memory
SHOWN_LINE_BYTES = 100  # what a line costs beside its text


def perform_command(run: Run, context: Context, what: str, argv: Sequence[str],
                    timeout_seconds: float, *, most: int = 0, **options: Any) -> CommandResult:
    """Run an operator's command, show and keep its output; StepFailed for codes over `most`."""
    left_bytes = SHOWN_BYTES

    def pass_on(line: str) -> None:
        nonlocal left_bytes
        left_bytes -= len(line) + SHOWN_LINE_BYTES
        if left_bytes >= 0:
            run.console.output(line)

    typed = spell(argv)
    run.console.working(f"{what}: {typed}", timeout_seconds)
    run.console.debug(f"{what}: {typed}")
    result = start_command(run, context, what, argv, timeout_seconds=timeout_seconds,
                           on_line=pass_on, **options)
    if left_bytes < 0:
        for line in ["... too much output: here is its end ...", *result.tail]:
            run.console.output(line)
    if 0 <= result.exit_code <= most and not result.timed_out:
        run.output = [*run.output, *result.tail][-OUTPUT_TAIL_LINES:]
        return result
    hint = "its output says why; correct the command or the release, then run this again"
    if result.timed_out:
        hint = "find out what it waits for, or give it more time where there is a `timeout`"
    elif result.exit_code in (126, 127):
        hint = HOW_TO_RUN
    how = ": ".join([f"{result.verdict()} in {result.directory}", *result.tail[-1:]])
    raise StepFailed(f"{what} failed: {typed} {how}", hint, {
        "argv": result.argv, "exit_code": result.exit_code, "timed_out": result.timed_out,
        "output": result.tail})


# -- templates ---------------------------------------------------------------

PLACEHOLDER = r"(\$?)\$\{([A-Za-z_][A-Za-z0-9_.-]*)\}"


def render_template(text: str, values: Dict[str, str], where: str) -> str:
    """Replace every `${name}`; `$${name}` gives `${name}`; StepFailed for names without a value."""
    missing = {f"${{{name}}}" for escaped, name in re.findall(PLACEHOLDER, text)
               if not escaped and name not in values}
    if missing:
        names = ", ".join(sorted(missing))
        raise StepFailed(f"{where}: no value for {names}", "set them in [vars] or in the "
                         "environment; write $${name} for a literal ${name}")
    return re.sub(PLACEHOLDER, lambda match: (
        match.group()[1:] if match.group(1) else values[match.group(2)]), text)


# -- services ----------------------------------------------------------------

class Service:
    """What must notice that `current` has changed; here, by a command of the operator's."""

    is_acting = False  # once it is, errors carry the end of the unit's journal
    is_gone = False  # its process did not exist at the last look
    pid = ""
    shown: Dict[str, str] = {}  # a unit's state, as it was read last
    first: Dict[str, str] = {}  # and when the unit came up: it must stay the same

    def __init__(self, run: Run, section: Any) -> None:
        self.run = run
        self.section = section
        self.limit_seconds = section.timeout

    def check(self) -> Findings:
        """Yield findings where acting on it cannot work on this host."""
        return missing_programs(self.run.settings, f"service:{self.section.name}")

    def down(self) -> str:
        """Say why it is not up, or did not stay up; empty where it is, or nobody can know."""
        return ""

    def act(self, context: Context) -> str:
        """Act on it and confirm that it is healthy; StepFailed with evidence if it is not."""
        perform_command(self.run, context, f"service {self.section.name}", self.section.command,
                        self.section.timeout)
        return "its command exited with code 0"

    def failed(self, why: str, **evidence: Any) -> StepFailed:
        """Make the error for a service that is not healthy."""
        hint = "look into its own log; pidfile must name a living process that follows `current`"
        if self.section.unit:
            hint = ("systemctl status {0}; journalctl -u {0}; give it more time with `timeout`; "
                    "without systemd use pidfile or command").format(self.section.unit)
        if self.is_acting:
            evidence.update(journal_of(self.run, [self.section]))
        return StepFailed(f"service {self.section.name}: {why}", hint, evidence)

    def settle(self, context: Context) -> None:
        """Watch it for the settle time; StepFailed if it goes down or runs another release."""
        interrupts, ends_seconds = self.run.interrupts, time.monotonic() + self.section.settle
        is_over = False
        while not is_over:
            is_over = time.monotonic() >= ends_seconds
            why = self.down()
            if why and self.section.pidfile:
                interrupts.wait(WATCH_SECONDS)  # a re-exec may not have written the new pidfile yet
                why = self.down()
            if why:
                raise self.failed(why)
            interrupts.wait(0 if is_over else WATCH_SECONDS)
        if answers_naming(self.run, context) and any(
                probe.release and probe.when in ("after", "both")
                for probe in self.run.settings.probe.values()):
            return  # such a probe asks the process itself, which counts for more
        releases = os.path.realpath(f"{context.root}/releases") + "/"
        for link in ("cwd", "exe"):
            with suppress(OSError):
                place = os.readlink(f"/proc/{self.pid}/{link}")
                if place.startswith(releases) \
                        and not f"{place}/".startswith(f"{releases}{context.release}/"):
                    raise self.failed(f"process {self.pid} still runs from another release: its "
                                      f"{link} is {place}")


UNIT_PROPERTIES = ("LoadState,ActiveState,SubState,MainPID,InvocationID,NRestarts,"
                   "NeedDaemonReload,Type,Result,ExecMainStatus,CanReload,UnitFileState")


class UnitService(Service):
    """A systemd unit; its state is watched: systemctl's exit code proves nothing (Type=simple)."""

    def check(self) -> Findings:
        """Find out whether it can be acted on, and does not run this very program."""
        unit, action, state = self.section.unit, self.section.action, self.state()
        groups = re.split("[/\n]", read_text("/proc/self/cgroup"))
        if action != "none" and (unit in groups or f"{unit}.service" in groups):
            yield ("fail", f"deploy.py runs in {unit} and would be killed by its own {action}",
                   "run deploy.py from a unit of its own")
        if state["LoadState"] != "loaded":
            yield ("fail", f"unit {unit} is not loaded (LoadState={state['LoadState']})",
                   f"install it and systemctl daemon-reload, systemctl unmask {unit}, or correct "
                   "`unit`")
        elif action == "reload" and state["CanReload"] == "no":
            yield ("fail", f"unit {unit} cannot be reloaded: it has no ExecReload=",
                   "use action = restart or reload-or-restart")

    def down(self) -> str:
        """Say why it is not up, or not the same as when it came up."""
        unit = self.section.unit
        try:
            state = self.state()
        except StepFailed as error:
            return error.message.partition(": ")[2]
        active, sub, kind = state["ActiveState"], state["SubState"], state["Type"]
        # A timer or socket has no Type, and need not be "running".
        if active == "active" and (sub == "running" or not kind) \
                or kind == "oneshot" and state["Result"] == "success" and sub in ("exited", "dead"):
            changed = [name for name in ("MainPID", "InvocationID", "NRestarts")
                       if self.first and state[name] != self.first[name]]
            return f"unit {unit} did not stay up: another {', '.join(changed)}" if changed else ""
        why = ", result {Result} {ExecMainStatus}".format(**state).rstrip()
        return f"unit {unit} is {active} ({sub}{why if state['Result'] != 'success' else ''})"

    def act(self, context: Context) -> str:
        """Restart, reload or start it, wait until it is up, and see that it stays up."""
        self.is_acting = True
        unit, action = self.section.unit, self.section.action
        before = self.state()
        if action == "reload" and before["ActiveState"] in ("inactive", "failed"):
            action = "start"  # that it was down before is not the release's fault
        if before["NeedDaemonReload"] == "yes":
            self.systemctl("daemon-reload")
        # Else a deployment, its rollback and a second try would together hit the start limit.
        self.systemctl("reset-failed", unit)
        self.systemctl(action, unit)
        ends_seconds = time.monotonic() + self.limit_seconds
        first = self.state()
        # What waits for an automatic restart has failed, and is not on its way up.
        while first["ActiveState"] in ("activating", "reloading", "refreshing") \
                and not first["SubState"].startswith("auto-restart") \
                and time.monotonic() < ends_seconds:
            self.run.interrupts.wait(WATCH_SECONDS)
            first = self.state()
        if action == "restart" and first["InvocationID"] == before["InvocationID"] != "":
            raise self.failed(f"unit {unit} was not restarted: its InvocationID is the one from "
                              "before")
        self.first = first
        self.settle(context)
        process = f", process {self.pid}" if self.pid not in ("", "0") else ""
        return f"{unit} is {first['ActiveState']} ({first['SubState']}{process})"

    def at_boot(self, verb: str, before: str) -> None:
        """Enable or disable it; a unit without [Install] is neither, and left alone."""
        if self.state()["UnitFileState"] == before:
            self.systemctl(verb, self.section.unit)

    def stop(self) -> None:
        """Stop it, and disable it so that no boot starts it."""
        self.systemctl("stop", self.section.unit)
        self.systemctl("reset-failed", self.section.unit)  # it may have ended as failed
        self.at_boot("disable", "enabled")

    def state(self) -> Dict[str, str]:
        """Read the unit's state in one call, so that the properties belong together."""
        done = self.systemctl("show", "-p", UNIT_PROPERTIES, self.section.unit)
        self.shown = dict.fromkeys(UNIT_PROPERTIES.split(","), "")
        self.shown.update(line.split("=", 1) for line in done.tail if "=" in line)
        self.pid = self.shown["MainPID"]
        return self.shown

    def systemctl(self, verb: str, *arguments: str) -> CommandResult:
        """Run systemctl; StepFailed if it fails, except for reset-failed."""
        done = run_command([*self.section.systemctl, verb, *arguments],
                           environ=manager_environment(),
                           timeout_seconds=self.limit_seconds, interrupts=self.run.interrupts)
        if done.ok or verb == "reset-failed":
            return done
        raise self.failed(f"systemctl {verb} {self.section.unit} {done.verdict()}: "
                          f"{' '.join(done.tail[-3:])}", output=done.tail)


def manager_environment() -> Dict[str, str]:
    """Return every child's small environment, and what `systemctl --user` needs."""
    runtime = environment("XDG_RUNTIME_DIR") or f"/run/user/{os.geteuid()}"
    return dict(base_environment(), XDG_RUNTIME_DIR=runtime)


def journal_of(run: Run, services: Iterable[Any]) -> Dict[str, List[str]]:
    """Show the last journal lines of the services' units, and return them as evidence."""
    lines = []
    for service in services:
        if not service.unit or not find_command("journalctl"):
            continue
        manager = ["--user"] if "--user" in service.systemctl else []
        # Without --sync what it has just written might not be in the journal yet.
        for arguments in (["--sync"], [*manager, "-u", service.unit, "-n", "10", "--no-pager"]):
            done = run_command(["journalctl", *arguments], timeout_seconds=5.0,
                               interrupts=run.interrupts, on_line=run.console.output,
                               mask=run.console.secrets.mask)
        lines += done.tail
    return {"journal": lines} if lines else {}


class PidfileService(Service):
    """A process that writes its id to a file, and reloads at a signal."""

    def check(self) -> Findings:
        """Look for the process; that it is down is only a warning."""
        why = self.down() if self.section.action != "none" else ""
        if why:
            yield ("warn" if self.is_gone else "fail", f"service {self.section.name}: {why}",
                   "start it, or correct pidfile")

    def act(self, context: Context) -> str:
        """Send the signal, and see that the service stays up."""
        name, signal_name, signalled = self.section.name, self.section.signal, self.run.signalled
        if not context.previous:
            return "nothing to signal: nothing was live before"
        why = self.down()
        if why and self.is_gone and name not in signalled:
            self.run.console.warn(f"service {name}: {why}: start it")  # see UnitService.act
            return "not signalled: it does not run"
        try:
            if not why:
                os.kill(int(self.pid), signal.Signals["SIG" + signal_name])
        except OSError as error:
            why = reason(error)
        if why:
            fix = ": start it" if self.is_gone else ""
            raise self.failed(f"sending {signal_name}: {why}{fix}")
        signalled.add(name)
        self.settle(context)
        return f"{signal_name} sent to process {self.pid}, which is up"

    def down(self) -> str:
        """Say why the process does not run, or why the pidfile is not believed."""
        path, ours = self.section.pidfile, (0, os.geteuid())
        try:
            with open_file(path, os.O_NOFOLLOW) as stream:
                status = os.fstat(stream.fileno())
                text = stream.read(65536).decode("utf-8", "replace")
        except OSError as error:
            self.is_gone = isinstance(error, FileNotFoundError)
            return f"{path}: {reason(error)}"
        pid = self.pid = text.partition("\n")[0].strip()
        self.is_gone = False
        if not re.match(r"[0-9]{1,9}\Z", pid) or int(pid) <= 1:
            return f"{path} holds {pid[:40]!r} and not a process id"
        owner, state = -1, ""
        with suppress(OSError):  # no /proc, or no such process
            owner = os.stat(f"/proc/{pid}").st_uid
            # The name in parentheses may hold anything, so fields count from its end (proc(5)).
            state = read_text(f"/proc/{pid}/stat").rpartition(")")[2].lstrip()[:1]
        self.is_gone = state in ("Z", "X") or not process_is_alive(int(pid))
        by_group = status.st_mode & stat.S_IWGRP and status.st_gid not in (0, os.getegid())
        if self.is_gone:
            return f"process {pid} of {path} is not running"
        if status.st_uid not in (*ours, owner):
            return f"{path} belongs to uid {status.st_uid}, process {pid} to uid {owner}"
        if (by_group or status.st_mode & stat.S_IWOTH) and status.st_uid in ours:
            return (f"{path} is writable by group or others (mode "
                    f"{stat.S_IMODE(status.st_mode):04o}), who could name any process")
        return ""


def make_service(run: Run, name: str) -> Service:
    """Make the service that [service:NAME] describes."""
    section = run.settings.service[name]
    if section.unit:
        return UnitService(run, section)
    return PidfileService(run, section) if section.pidfile else Service(run, section)


def describe_service(service: Any) -> str:
    """Say in one line what acting on a [service:NAME] section does."""
    if service.command:
        return f"run {spell(service.command)}"
    if service.pidfile:
        return f"send {service.signal} to the process in {service.pidfile}"
    return f"{service.action} unit {service.unit}"


def services_in_order(settings: Settings) -> List[str]:
    """List the services so that each comes after those in its `after`; UsageError for a cycle."""
    order = []
    later = list(settings.service)
    while later:
        ready = [name for name in later if set(order).issuperset(settings.service[name].after)]
        if not ready:
            after = ", ".join(settings.service[later[0]].after)
            raise settings.wrong(f"service:{later[0]}", f"after = {after}: there is no such "
                                 f"[service:NAME], or they wait for each other: {', '.join(later)}")
        order += ready
        later = [name for name in later if name not in ready]
    return order


# -- asking over the network -------------------------------------------------

def split_address(text: str) -> Tuple[str, int]:
    """Read host:port, [v6]:port or unix:/path (which gets port 0); ValueError for anything else."""
    if text.startswith("unix:/"):
        return _path(text[5:]), 0
    match = re.match(r"(\[[0-9A-Fa-f:.]+(?:%\w+)?\]|[^\s/@:]+):([0-9]{1,5})\Z", text)
    if not match or not 0 < int(match.group(2)) < 65536:
        raise ValueError(f"expected host:port, [IPv6 address]:port or unix:/path, not {text!r}")
    return match.group(1).strip("[]"), int(match.group(2))


# What a request is made from; the first three are the origin (RFC 6454).
Url = NamedTuple("Url", [("scheme", str), ("host", str), ("port", int), ("authority", str),
                         ("target", str), ("userinfo", str)])


def parse_url(text: str) -> Url:
    """Take an http or https URL apart; ValueError for any other, or one that cannot be asked."""
    from urllib.parse import quote, unquote, urlsplit
    parts = urlsplit(text)
    own_port = {"http": 80, "https": 443}.get(parts.scheme)
    if not own_port:
        raise ValueError(f"the URL must begin with http:// or https://, not {text[:40]!r}")
    if re.search("[\x00-\x20\x7f]", text) or parts.port == 0 \
            or not re.match("[\x21-\x7e]+\\Z", parts.hostname or ""):
        raise ValueError("the URL holds spaces or control characters, has no host in ASCII (write "
                         "xn--...), or port 0")
    userinfo, _, authority = parts.netloc.rpartition("@")
    target = quote((parts.path or "/") + ("?" + parts.query if parts.query else ""),
                   safe="%/:=&?~#+!$,;'@()*[]", errors="replace")
    return Url(parts.scheme, str(parts.hostname), parts.port or own_port, authority, target,
               unquote(userinfo))


def wrong_header(sent: Dict[str, str]) -> str:
    """Say which header's value cannot be sent (RFC 9110, 5.5); nothing where all can."""
    for name, value in sent.items():
        if re.search("[\x00-\x08\x0a-\x1f\x7f]", value):  # not shown: it may be secret
            return f"the value of header.{name} holds a line break or a control character"
    return ""


def tls_context(tls: Any) -> Any:
    """Make an ssl.SSLContext from a section's tls_*; OSError or ValueError for unfit files."""
    import ssl
    context = ssl.create_default_context(cafile=tls.tls_ca or None)
    if not getattr(tls, "tls_verify", True):
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    if getattr(tls, "tls_cert", ""):
        # Without a password OpenSSL would ask the terminal for one.
        context.load_cert_chain(tls.tls_cert, tls.tls_key or None, password="")
    return context


def network_error(error: Exception) -> str:
    """Say why asking a peer failed."""
    if isinstance(error, DeployError):
        return error.message
    if isinstance(error, ImportError):
        return f"{INCOMPLETE}: {error}; {INSTALL}"
    if type(error).__name__.startswith("SSL"):  # an OSError, but its errno is OpenSSL's
        return f"TLS: {error}"  # see PROBE_HINTS
    return reason(error) if getattr(error, "errno", None) else f"{type(error).__name__}: {error}"


def proxy_for(url: Url, choice: str) -> Optional[Url]:
    """Find the proxy for a URL: `none`, the `environment`'s (https_proxy, no_proxy), or a URL."""
    if choice == "environment":
        from urllib.request import getproxies_environment, proxy_bypass_environment
        choice = getproxies_environment().get(url.scheme, "none")
        if proxy_bypass_environment(url.host):
            return None
    if choice == "none":
        return None
    if "://" not in choice:  # as in the environment it may be
        choice = f"http://{choice}"
    if not choice.startswith("http://"):  # not shown: it may hold a password
        raise UsageError("the proxy is none that is spoken to in HTTP", "name an http:// one")
    return parse_url(choice)


# -- work that can be killed -------------------------------------------------

class Conversation(Descriptor):
    """Work that a forked process does, because that can be killed: most often, asking a peer.

    So no name look-up, no TLS, no dripping peer and no endless regular expression holds up the run.
    The child keeps only its end of a pipe and the descriptors to `keep`: it must not hold the lock,
    and there is no exec to close that.  It calls `talk`, and writes for each at(), and for what
    that returns, a line of JSON, which answer() reads; SIGALRM ends it at its limit.
    """

    def __init__(self, talk: Callable[["Conversation"], Answer], limit_seconds: float,
                 keep: Sequence[int] = ()) -> None:
        import warnings
        __import__("socket")  # where Python lacks it, this fails here, in the caller
        self.limit_seconds = limit_seconds
        self.known: Answer = {"stage": "starting (EAGAIN: too many processes?)"}
        self.socket: Any = None
        self._pid = -1
        self.descriptor, self._writing = os.pipe()
        with warnings.catch_warnings(), suppress(OSError):  # too many processes
            # 3.12 and later warn of threads; the child needs no lock that one of them might hold.
            warnings.simplefilter("ignore")
            self._pid = os.fork()
        if self._pid == 0:
            try:
                signal.set_wakeup_fd(-1)  # closed next, its number may become a socket's
                kept = sorted([self._writing, *keep])
                # None is as high as 1024: the kernel gives out the lowest number that is free.
                for low, high in zip([2, *kept], [*kept, 1024]):
                    os.closerange(low + 1, high)
                signal.signal(signal.SIGALRM, signal.SIG_DFL)  # not as it was inherited
                signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])
                signal.setitimer(signal.ITIMER_REAL, max(0.001, limit_seconds))
                try:
                    last = {"error": "", **talk(self)}
                except Exception as error:  # a peer may make the libraries raise anything
                    # Again: a malformed answer or a bad certificate will be no better then.
                    last = {"error": f"{self.known['stage']}: {network_error(error)}",
                            "again": isinstance(error, OSError) and "CERTIFICATE" not in str(error)
                            or type(error).__name__ == "IncompleteRead"}
                self.at(self.known["stage"], **last)
            finally:
                os._exit(EXIT_OK)  # the parent's buffers and clean-up are not the child's to do
        os.close(self._writing)

    def close(self) -> None:
        """Close the pipe, kill the child and reap it."""
        super().close()
        pid, self._pid = self._pid, -1
        if pid > 0:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)

    def at(self, stage: str, **known: Any) -> None:
        """In the child: report what it does now and what it knows, in case its time runs out."""
        self.known.update(known, stage=stage)
        write_all(self._writing, json.dumps(self.known).encode("ascii") + b"\n")

    def connect(self, address: Tuple[str, int]) -> Answer:
        """Open self.socket to (host, port), or to a unix socket's (path, 0)."""
        import socket
        host, port = address
        where = f"{host}:{port}" if port else host
        self.at(f"connecting to {where}")
        if port:
            opened = self.socket = socket.create_connection(address)
            # First the port: getpeername() fails where the peer has hung up already.
            if opened.getsockname()[1] == port and opened.getsockname() == opened.getpeername():
                # Given this very port as its own, a socket connects to itself (RFC 9293, 3.5).
                raise ConnectionRefusedError(errno.ECONNREFUSED,
                                             "Connection refused: nobody listens")
        else:
            self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self.socket.connect(native(host))
        return {"said": f"{where} accepts connections"}

    def request(self, method: str, url: Url, extra: Dict[str, str], section: Any,
                body: bytes = b"") -> Any:
        """Ask by HTTP/1.1 (RFC 9112), as a section's tls_*, connect, proxy and header keys say."""
        import http.client
        address, target, login = getattr(section, "connect", ""), url.target, {}
        proxy = proxy_for(url, getattr(section, "proxy", "none"))
        if proxy and proxy.userinfo:
            login["Proxy-Authorization"] = f"Basic {write_base64(proxy.userinfo.encode())}"
        if proxy and url.scheme == "https":
            self.at("asking the proxy for a tunnel")
            tunnel = http.client.HTTPConnection(proxy.host, proxy.port)
            tunnel.set_tunnel(url.host, url.port, login)
            tunnel.connect()
            self.socket, login = tunnel.sock, {}
        elif proxy:
            target = f"http://{url.authority}{target}"
            self.connect((proxy.host, proxy.port))
        else:
            self.connect(split_address(address) if address else (url.host, url.port))
        if url.scheme == "https":
            self.at("reading tls_ca, tls_cert and tls_key")
            context = tls_context(section)
            self.at("in the TLS handshake")  # see PROBE_HINTS
            self.socket = context.wrap_socket(self.socket, server_hostname=url.host)
        self.at("sending the request")
        always = {"Host": url.authority, "User-Agent": f"deploy.py/{VERSION}",
                  "Connection": "close", **login}
        headers = dict({name.lower(): (name, value) for part in (always, extra, section.header)
                        for name, value in part.items()}.values())
        wrong = wrong_header(headers)
        if wrong:  # http.client's own message holds the value, which may be secret
            raise ValueError(wrong)
        connection = http.client.HTTPConnection(url.host, url.port)
        connection.sock = self.socket
        connection.request(method, target, body or None, {
            name: native(value).encode("utf-8", "surrogateescape")
            for name, value in headers.items()})
        self.at("waiting for the head of the answer")
        response = connection.getresponse()
        self.at("reading the answer", status=response.status)
        return response

    def answer(self, interrupts: Interrupts, hear: Any = lambda known: None) -> Answer:
        """Wait for its end, tell `hear` what is known so far; "error" says why that is not all."""
        rest, piece = b"", b"begins"
        while self._pid > 0 and piece:
            if interrupts.wait(LONGEST_SECONDS, self.descriptor):
                piece = os.read(self.descriptor, 1 << 16)
                *lines, rest = (rest + piece).split(b"\n")
                if lines:
                    self.known = json.loads(lines[-1].decode("ascii"))
                    hear(self.known)
        return {"error": f"no answer within {format_seconds(self.limit_seconds)}, it was still "
                         f"{self.known['stage']}", **self.known}


# -- a candidate's guard -----------------------------------------------------

class Guard(Conversation):
    """A command, and all that it starts, beside this process until the end of a `with` block.

    The child, the guard, runs it, and as subreaper inherits its orphans.  It ends all of it (TERM,
    KILL) and reports `ended` once the parent's end of a second pipe is closed (by close(), or by a
    kill -9 of the run), time is up, or for 2 s it has not run and nothing has listened.
    """

    def __init__(self, argv: Sequence[str], *, port: int, timeout_seconds: float,
                 **options: Any) -> None:
        import ctypes
        self.ends_seconds = time.monotonic() + timeout_seconds
        # In the end: whether it was started, why it ended before it was told to, its last output.
        self.ended: Any = None
        reading, self._lifeline = os.pipe()
        why, until_seconds = None, 0.0

        def lasts(process: Any) -> bool:
            nonlocal why, until_seconds
            now_seconds, is_up = time.monotonic(), process.poll() is None
            if not is_up:
                try:
                    os.waitpid(-1, os.WNOHANG)
                except ChildProcessError:
                    return False  # nothing is left
            # A daemon's first process may end before its last one listens.
            if is_up or sockets(port, "0A"):
                until_seconds = now_seconds + 2.0
            if Interrupts().wait(0, reading):
                why = ""
            elif now_seconds > self.ends_seconds + 0.5:  # a probe's deadline says more
                why = "was not healthy in time"
            elif now_seconds < until_seconds:
                return True
            end_children()  # the guard has no children but these
            return False

        def talk(asking: Conversation) -> Answer:
            nonlocal why
            os.setsid()  # whoever kills the run's process group must not kill its guard
            if ctypes.CDLL(None).prctl(36, 1, 0, 0, 0):  # PR_SET_CHILD_SUBREAPER, prctl(2)
                return {"ended": [False, "was not started: the kernel allows no guard for it", []]}
            # Not the run's own Interrupts: it waits on a descriptor that is closed here.
            result = run_command(argv, lasts=lasts, timeout_seconds=LONGEST_SECONDS,
                                 **dict(options, interrupts=Interrupts()))
            why = result.verdict() if why is None else why
            return {"ended": [result.seconds > 0, why, result.tail]}

        super().__init__(talk, LONGEST_SECONDS, [reading])
        os.close(reading)

    def close(self) -> None:
        """Have the guard end all of it, unless that has ended."""
        if not self.ended:
            os.close(self._lifeline)
            self.ended = self.answer(Interrupts()).get("ended", [False, "lost its guard", []])
        super().close()


# -- probes ------------------------------------------------------------------

# As a word: 1.2 is not in 11.2, 1.2.3, 1.2-rc1, 1.2+build or 3-1.2, but is in v1.2 and "1.2.".
VERSION_ALONE = r"(?<![^\W_])(?<![.+~])(?<!\d-)[vV]?(?:{})(?![^\W_]|~|[.+_-]\w)"


def answers_naming(run: Run, context: Context) -> List[str]:
    """List what an answer may call a release; nothing if its version is its digest or id."""
    record = run.facts and run.facts.records.get(context.release)
    if context.version in (context.release, record.sha256[:12] if record else ""):
        return []
    return [re.sub(r"\A[vV](?=\d)", "", word)
            for word in (context.version, context.release) if word]


def compare_answer(asking: Conversation, probe: Any, versions: List[str], text: str,
                   header: Callable[[str], Optional[str]]) -> Answer:
    """Compare an answer's text and headers with what the probe expects.

    "error" is the first difference; "named" says whether the answer names one of the `versions`
    (without a leading v), None where the probe does not ask: the old process may answer, too.
    """
    asking.at("comparing the answer with what is expected", body=text[:8 * EVIDENCE_CHARACTERS])
    errors = [f"header {name} is {header(name) or 'missing'}, expected {pattern}"
              for name, pattern in probe.expect_header.items()
              if not matches(pattern, header(name))]
    if probe.body and not matches(probe.body, text):
        errors.append(f"the answer does not match body = {probe.body}")
    for path, expected in probe.json.items():
        value, why = json_value(text, path)
        if value != expected:
            errors.append(why or f"json {path} is {value!r}, expected {expected!r}")
    named = None
    if probe.release and versions:
        where, _, name = probe.release.partition(":")
        value, why = header(name), f"the answer names no version by {probe.release}"
        if where == "json":
            value, why = json_value(text, name)
        if where == "body":
            words = "|".join(map(re.escape, versions))
            named = bool(re.search(VERSION_ALONE.format(words), text))
        elif value is not None:
            named = re.sub(r"\A[vV](?=\d)", "", value) in versions
            why = f"answered with version {value}"
        if not named:  # see PROBE_HINTS
            errors.append(f"{why}, expected {versions[0]}: the old process may still be running")
    return {"error": "".join(errors[:1]), "named": named}


def matches(pattern: str, text: Optional[str]) -> bool:
    """Search for a pattern; a leading ! wants it absent, as it is where there is no text."""
    is_unwanted = pattern.startswith("!")
    match = text is not None and re.search(pattern[1:] if is_unwanted else pattern, text)
    return bool(match) != is_unwanted


def json_value(text: str, path: str) -> Tuple[Optional[str], str]:
    """Return the value at a dotted path of a JSON text, as text; or None and why there is none."""
    try:
        value = json.loads(text)
        for key in path.split("."):
            if isinstance(value, list):
                value = dict(zip(map(str, itertools.count()), value))
            value = value[key]
    except (ValueError, RecursionError) as error:
        return None, f"the answer is not JSON: {error}"
    except (LookupError, TypeError):
        return None, f"the answer's JSON has no {path!r}"
    return value if isinstance(value, str) else json.dumps(value), ""


def probe_kind(probe: Any) -> str:
    """Return which of PROBE_KINDS a probe is; nothing where it is not one of them."""
    kinds = [kind for kind in PROBE_KINDS if kind in probe.given]
    return kinds[0] if len(kinds) == 1 else ""


def probe_mistakes(settings: Settings, probe: Any) -> List[str]:
    """Say all that is wrong with a probe's settings, without asking anything."""
    kind, release, of_candidate = probe_kind(probe), probe.release, probe.when == "candidate"
    places = [*OF_SLOTS, CANDIDATE_PORT] if of_candidate else OF_SLOTS
    probe = fill_in(probe, dict.fromkeys(places, "1"))
    wrong, service = [wrong_header(probe.header)], settings.service.get(probe.service)
    for key, read in ("url", parse_url), ("tcp", split_address), ("connect", split_address):
        try:
            if getattr(probe, key):
                read(getattr(probe, key))
        except ValueError as error:
            wrong.append(f"{key}: {error}")
    if kind:
        others = set().union(*PROBE_KINDS.values()).difference(PROBE_KINDS[kind])
        wrong.append(meaningless(probe, others, f"a {kind} probe"))
    return [problem for is_wrong, problem in (
        (of_candidate and not settings.candidate.command,
         "when = candidate needs a [candidate] with its command"),
        (not of_candidate and CANDIDATE_PORT in str(probe.command),
         f"{CANDIDATE_PORT} is known while a candidate is asked: when = candidate"),
        (of_candidate and kind == "service", "a candidate is no service"),
        (probe.of_slot and (not settings.has_slots or probe.when != "after"),
         "${slot} and ${port} need [slots], and when = after"),
        (release and not re.match(r"(json:.+|header:[!-9;-~]+|body)\Z", release),
         f"release = {release}: expected json:PATH, header:NAME or body"),
        (kind == "command" and release.startswith("header:"), "a command's output has no headers"),
        (kind == "service" and not service, f"there is no [service:{probe.service}]"),
        (service and service.command,
         f"whether [service:{probe.service}] is up cannot be known: it has only a command"),
        ) if is_wrong] + list(filter(None, wrong))


def adhoc_probe(kind: str, target: str, assignments: List[str]) -> SimpleNamespace:
    """Make a probe from a target and KEY=VALUE texts, with the table's defaults."""
    section = "probe:ad-hoc"
    given = {(section, kind): (target, f"--{kind}")}
    for text in assignments:
        key, equals, value = (part.strip() for part in text.partition("="))
        if not equals:
            raise UsageError(f"--expect {text!r}: expected KEY=VALUE",
                             "for example --expect json.status=ok")
        if not find_option(OPTIONS["probe:*"], key):
            raise unknown(section, key, "--expect")
        given[section, key] = value, "--expect"
    settings = Settings(given, [])
    settings.refuse_mistakes()
    return settings.probe["ad-hoc"]


PROBE_HINTS = (  # by words of a failed probe's detail: where these are made names this
    ("status 30[12378],", "give the address that it leads to, or allow redirects = 1"),
    ("status 40[137],", "give the probe a login: auth_file, or a [probe:NAME] header.NAME"),
    ("TLS: |TLS handshake", "name the authority with tls_ca, or correct the host and port in url"),
    ("old process may still", "see that the service is restarted, and runs from current"),
    ("cannot start ", HOW_TO_RUN),
    ("", "look at the service's own log"))
SHORTEST_WAIT_SECONDS = 0.02  # what a period of 0s comes to
NO_ANSWER: Answer = {"error": "too few answers in a row were healthy", "status": None, "body": "",
                     "named": None, "heard": False, "final": False}


class ProbeRun:
    """A probe's tries from the first to the verdict, and what came of them.

    ask_KIND asks once, within self.limit_seconds, and returns "error" (empty if it is healthy),
    "said" (if it is), "status", the start of the "body", "named" (see compare_answer()), "final"
    where no later answer can be better, and "heard" where certainly the service said this, not a
    proxy or what failed on the way; in doubt, only if `named`.  Or it returns a function, whose
    time attempt() limits; what that raises becomes "STAGE: reason", STAGE from asking.at().
    """

    tries = 0
    failure = NO_ANSWER  # the last one
    restarts: Optional[int] = None  # of its unit, at the first look
    # run_probe() adds ok, detail, seconds and evidence.

    def __init__(self, run: Run, probe: Any, context: Context, versions: List[str],
                 progress: Any) -> None:
        self.run = run
        self.probe = probe
        self.name = probe.name
        self.required = probe.required
        self.context = context
        self.versions = versions
        self.progress = progress

    def to_json(self) -> Json:
        """Return what is reported of it."""
        return {name: getattr(self, name) for name in (
            "name", "ok", "required", "tries", "seconds", "detail", "evidence")}

    def complaint(self) -> str:
        """Say that it failed: after how many tries, why, and how the answer began."""
        text = f"probe {self.name} failed after {count(self.tries, 'try', 'tries')}: {self.detail}"
        body = self.evidence["body"][:120]
        return f"{text}; the answer began: {body!r}" if body else text

    def hint(self) -> str:
        """Say where to look, or what to correct."""
        return next(hint for pattern, hint in PROBE_HINTS if re.search(pattern, self.detail))

    def full(self, guard: Optional[Guard], *, is_new: bool) -> Answer:
        """Ask until it is healthy, then whether it stays so; "error" is the verdict.

        `is_new`: whatever answers is the new release.  The end of a `guard`'s command ends this.
        """
        import random
        probe, watched, why = self.probe, [guard.descriptor] if guard else [], ""
        healthy = failed = failed_by_new = 0  # in a row; by_new: the new release itself said so
        is_soaking = False
        pause_seconds, spacing_seconds = probe.initial_delay, probe.period
        ends_seconds = time.monotonic() + pause_seconds + probe.deadline
        while not why:
            if self.run.interrupts.wait(pause_seconds, *watched):
                guard.close()
                why = f"the candidate {guard.ended[1]}"
                break
            left_seconds = ends_seconds - time.monotonic()
            is_cut = not is_soaking and left_seconds < probe.timeout
            answer = self.attempt(left_seconds if is_cut else probe.timeout)
            left_seconds = ends_seconds - time.monotonic()
            if not answer["error"]:
                healthy += 1
                failed = failed_by_new = 0
                spacing_seconds = probe.period
            elif self.tries == 1 or not is_cut or left_seconds > 0:
                # Else the deadline cut it short: then it tells less than the tries before it.
                self.failure = answer
                failed += 1
                healthy = 0
                by_new = is_new if answer["named"] is None else answer["named"]
                failed_by_new = failed_by_new + 1 if by_new and answer["heard"] else 0
                if failed > 1 and not is_soaking:
                    spacing_seconds = min(spacing_seconds * probe.backoff,
                                          max(probe.period, probe.period_max))
            if not is_soaking and healthy >= probe.successes:
                is_soaking = True
                left_seconds = probe.soak
                ends_seconds = time.monotonic() + left_seconds
            error = self.failure["error"]
            if answer["final"] or failed_by_new >= probe.failures and not is_soaking:
                why = f"the new release itself failed: {error}"
            elif is_soaking and failed >= probe.failures:
                why = f"failed {failed} times in a row after it was healthy: {error}"
            elif not is_soaking and left_seconds <= SHORTEST_WAIT_SECONDS:
                why = f"not healthy within {format_seconds(probe.deadline)}: {error}"
            elif is_soaking and left_seconds <= 0 and not failed:
                return answer  # after a failed try the soak goes on until one succeeds
            pause_seconds = spacing_seconds * (1 + random.uniform(-probe.jitter, probe.jitter))
            if not failed or not is_soaking:
                # At most half of it: a last try comes before the deadline.  A soak ends with one.
                pause_seconds = min(pause_seconds, left_seconds / (1 if is_soaking else 2))
            pause_seconds = max(SHORTEST_WAIT_SECONDS, pause_seconds)
        return dict(self.failure, error=why)

    def attempt(self, limit_seconds: float) -> Answer:
        """Ask once, within this limit."""
        console = self.run.console
        self.limit_seconds = limit_seconds = max(0.001, limit_seconds)
        ends_seconds = time.monotonic() + limit_seconds
        answer = getattr(self, f"ask_{probe_kind(self.probe)}")()
        if self.probe.command:  # what it wrote in time is compared, however late that was
            limit_seconds = max(0.05, ends_seconds - time.monotonic())
        if callable(answer):
            with Conversation(answer, limit_seconds) as asking:
                answer = asking.answer(self.run.interrupts)
        answer = dict(NO_ANSWER, **answer)
        for key in ("error", "body"):  # masked before it is cut: half a secret is not recognized
            answer[key] = console.secrets.mask(answer[key])[:EVIDENCE_CHARACTERS]
        self.tries += 1
        reported = f"try {self.tries}: {answer['error'] or answer['said']}"
        console.debug(f"probe {self.probe.name}: {reported}")
        if self.progress:
            self.progress(self.tries, reported)
        return answer

    def ask_url(self) -> Any:
        """Ask over HTTP or HTTPS."""
        with suppress(ImportError):  # what is missing, the process that asks reports
            __import__("http.client")  # once here: it would cost each such process 15 ms
            __import__("ssl")
        probe, url, headers = self.probe, parse_url(self.probe.url), {"Accept": "*/*"}
        if self.run.traceparent:
            headers["traceparent"] = self.run.traceparent
        try:
            login = read_text(probe.auth_file).strip() if probe.auth_file else url.userinfo
        except OSError as error:
            return {"error": f"reading auth_file: {reason(error)}"}
        encoded = write_base64(login.encode("utf-8"))
        if login:  # "Bearer ..." as it stands, or RFC 7617
            is_whole = probe.auth_file and " " in login
            headers["Authorization"] = login if is_whole else f"Basic {encoded}"
        for secret in (login, login.partition(" ")[2], login.partition(":")[2], encoded):
            self.run.console.secrets.add(secret)

        def talk(asking: Conversation) -> Answer:
            from urllib.parse import urljoin
            address = probe.url
            for _ in range(probe.redirects + 1):
                hop = parse_url(address)
                if hop[:3] != url[:3]:
                    return {"error": f"redirected to another origin, {address}"}
                response = asking.request(probe.method, hop, headers, probe)
                location, status = response.getheader("Location"), response.status
                if not probe.redirects or not location or not 301 <= status <= 308:
                    break
                response.close()  # both, or the peer does not see it
                asking.socket.close()
                address = urljoin(address, location)
            else:
                return {"error": f"more than {count(probe.redirects, 'redirect')}, the last to "
                                 f"{address}"}
            data = response.read(probe.max_body)
            if len(data) < probe.max_body and response.length:
                raise ConnectionError("it ended before its Content-Length")
            text = data.decode("utf-8-sig", "replace")
            answer = compare_answer(asking, probe, self.versions, text, response.getheader)
            if not any(low <= status <= high for low, high in probe.status):
                ranges = ", ".join(f"{low}-{high}" for low, high in probe.status)
                answer["error"] = f"status {status}, expected {ranges}"  # see PROBE_HINTS
            # 503 means not yet; 502 and 504 are a proxy's, unless the answer names the release.
            is_heard = status != 503 and (answer["named"] or status not in (502, 504))
            return dict(answer, said=f"status {status}", heard=is_heard)

        return talk

    def ask_tcp(self) -> Any:
        """See whether somebody accepts a connection."""
        return partial(Conversation.connect, address=split_address(self.probe.tcp))

    def ask_command(self) -> Any:
        """Run an operator's command: exit code 0 is healthy, where its output is as expected."""
        probe, lines = self.probe, []
        left_characters = probe.max_body

        def keep(line: str) -> None:
            nonlocal left_characters
            if left_characters > 0:
                lines.append(line)
            left_characters -= len(line) + 1

        try:
            result = start_command(self.run, self.context, f"probe {probe.name}", probe.command,
                                   timeout_seconds=self.limit_seconds, on_line=keep)
        except (UsageError, StepFailed) as error:
            return {"error": error.message}
        text = "\n".join(lines or result.tail)  # the tail says why it could not be started

        def compare(asking: Conversation) -> Answer:
            asking.known["status"] = result.exit_code
            answer = compare_answer(asking, probe, self.versions, text, lambda name: None)
            if not result.ok:
                answer["error"] = ": ".join([result.verdict(), *result.tail[-1:]])
            # What fails may not have reached the service, unless its output names the release.
            return dict(answer, said="exited with code 0", heard=answer["named"] or result.ok)

        return compare

    def ask_service(self) -> Answer:
        """See whether a [service:NAME] is up."""
        service = make_service(self.run, self.probe.service)
        service.limit_seconds = min(service.limit_seconds, self.limit_seconds)
        error, state = service.down(), service.shown
        target, restarts = f"service {self.probe.service}", int(state.get("NRestarts") or 0)
        if self.restarts is None:
            self.restarts = restarts
        restarts -= self.restarts
        is_looping = restarts >= self.probe.failures  # a crash loop looks up at most tries
        if is_looping and not error:
            error = f"{target} was restarted {count(restarts, 'time')}"
        return {"error": error, "said": f"{target} is up",
                "final": error and (is_looping or state.get("ActiveState") == "failed")}


def run_probe(run: Run, probe: Any, context: Context, *, expect_release: bool,
              once: bool = False, progress: Any = None, restarted: bool = False,
              guard: Optional[Guard] = None) -> ProbeRun:
    """Ask until the verdict is in, or `once`; a failure is not raised: ok is False.

    `expect_release`: the answer must name the context's version or release.
    `restarted`: this run has just acted on the services.  `guard`: it is a candidate that is asked.
    """
    started_seconds, slot = time.monotonic(), context.slot
    run.console.working(f"probe {probe.name}", probe.initial_delay + probe.deadline + probe.soak)
    services = [*run.settings.service.values(), *([slot] if slot else [])]
    if probe.of_slot:
        if not slot:
            raise ProblemFound(f"probe {probe.name} asks the live slot, and none is live",
                               "deploy something first")
        probe = fill_in(probe, slot.places)
    # Where this run has restarted all that could answer, the new release does, unless a proxy may
    # still lead to the other slot.
    is_new = bool(guard) or restarted and bool(services) and (probe.of_slot or not slot) and all(
        service.unit and service.action == "restart" for service in services)
    versions = answers_naming(run, context) if expect_release else []
    probing = ProbeRun(run, probe, context, versions, progress)
    answer = probing.attempt(probe.timeout) if once else probing.full(guard, is_new=is_new)
    error = answer["error"]
    probing.ok = not error
    probing.detail = error or f"{answer['said']} ({count(probing.tries, 'try', 'tries')})"
    answer["tries"] = probing.tries
    probing.evidence = {key: answer[key] for key in ("status", "body", "error", "tries")}
    if error and not once and not guard and (expect_release or probe.service):
        probing.evidence.update(journal_of(run, [
            service for service in services if probe.service in ("", service.name)]))
    probing.seconds = round(time.monotonic() - started_seconds, 3)
    return probing


def hold_port(host: str, port: int) -> Any:
    """Bind a socket to a TCP port of an address, 0 for a free one; OSError where it is taken."""
    import socket
    held = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    # As servers do: connections that linger in TIME_WAIT do not count as taken.
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if ":" in host:
        held.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    held.bind((host, port))
    return held


# ============================================================================
# 10  Policy
#    When, by whom and after what a release may go live: judge_* are rules, rows of the
#    table of checks; [policy] judge is the operator's command, one of them; Judge (8)
#    decides on an archive's members.
# ============================================================================

JUDGE_SECONDS = 30.0
DEPLOYMENT = "https://deploy.py/deployment/v1"
# By predicateType of SLSA provenance: the paths of the builder, the source, the end of the build.
PROVENANCE = {
    "https://slsa.dev/provenance/v1": (
        "runDetails.builder.id", "buildDefinition.externalParameters.workflow.repository",
        "runDetails.metadata.finishedOn"),
    "https://slsa.dev/provenance/v0.2": (
        "builder.id", "invocation.configSource.uri", "metadata.buildFinishedOn")}


def rule(judge: Callable[..., Finding], suffixes: str = "", hint: str = "", *,
         passable: bool = False) -> Callable[[Run], List[Finding]]:
    """Make the check of a rule: `judge` raises to refuse, and what it raises becomes the finding.

    With `suffixes` it gets the first of these files beside the artifact.  Skipped on any way back,
    for what was live before, and without an artifact (but for windows in `preflight`).  `stage` is
    only warned, and so is --override where it is `passable` and the policy allows it.
    """
    def check(run: Run) -> List[Finding]:
        command, policy = run.flags.command, run.settings.policy
        artifact = run.plan and (run.facts.artifact or run.facts.records.get(run.plan.to_release))
        is_asked = artifact or command == "preflight" and judge is judge_windows
        if not is_asked or command == "rollback" or command == "activate" and artifact.activated_at:
            return [("skip", "nothing is to go live for the first time", "")]
        try:
            if not suffixes:
                return [judge(run, artifact)]
            with blaming(PreflightFailed, artifact.path, hint):
                place, data = read_beside(run, artifact.path, *suffixes.split())
            with blaming(PreflightFailed, place, hint):
                return [judge(run, artifact, place, data)]
        except (UsageError, PreflightFailed, ArtifactRefused, StepFailed) as error:
            allows = passable and policy.override
            status = "warn" if command == "stage" or allows and run.flags.override else "fail"
            return [(status, error.message, error.hint + ("; or --override WHY" if allows else ""))]
    return check


def base_name(path: str) -> str:
    """Return the last name of a path or of a URL, which is decoded."""
    from urllib.parse import unquote
    return os.path.basename(unquote(path.partition("?")[0]) if "://" in path else path)


def read_beside(run: Run, path: str, *suffixes: str) -> Tuple[str, bytes]:
    """Read the first file that exists of those with these suffixes, here or at [source]."""
    for place in (path + suffix for suffix in suffixes):
        if run.fetch and "://" in place:
            body = run.fetch(place).get("body")
            if body is not None:
                return place, body.encode("latin-1")
        with suppress(FileNotFoundError):
            # A link in the inbox could lead to what only root may read.
            flags = os.O_NOFOLLOW if run.flags.delegate else 0
            return place, read_file(place, MAX_STATE_BYTES, flags)
    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), place)


def judge_windows(run: Run, artifact: Any) -> Finding:
    """No window denies now and, where there are any that allow, one of these is open."""
    from datetime import date, timedelta
    policy = run.settings.policy
    now = local_time(policy.timezone, run.facts.now_seconds)
    today, minute = date(*now[:3]), now.tm_hour * 60 + now.tm_min
    text = time.strftime("%a %Y-%m-%d %H:%M %Z", now)
    open_now = {line for line, is_open in policy.windows
                if is_open(today, minute) or is_open(today - timedelta(1), minute + 1440)}
    allowing = {line for line, _ in policy.windows if line.startswith("allow")}
    why = open_now - allowing
    if not why and not allowing & open_now:
        why = {f"outside of {line}" for line in allowing}
    if why:
        raise PreflightFailed("; ".join([text, *sorted(why)]), "wait for a time that is allowed")
    return "ok", text, ""


def approval(run: Run, artifact: Any, expires: str) -> bytes:
    """Write the text that approvers sign: six lines, the same bytes in any locale."""
    name = portable(base_name(artifact.path))
    lines = ("deploy-approval 1", f"application {run.application}",
             f"environment {run.settings.policy.environment}", f"artifact {name}",
             f"sha256 {artifact.sha256}", f"expires {expires}")
    return b"".join(escape(line).encode("ascii", "backslashreplace") + b"\n" for line in lines)


def judge_approvals(run: Run, artifact: Any, place: str, data: bytes) -> Finding:
    """Enough approvers have signed, each counted once, and whoever runs this not at all."""
    import glob
    policy, signed, others = run.settings.policy, set(), set()
    signers = list(read_signers(policy.approvers))
    verifier = Verifier([], signers, "deploy-approval")
    # A [source] over https lists no files: each signer's is asked for by name.
    names = {who.partition("@")[0] for globs, *_ in signers for who in globs.split(",")}
    marks = ["", *(f".{name}" for name in names if re.fullmatch(r"[\w.-]+", name))]
    paths = glob.glob(f"{glob.escape(place)}.*sig") or [f"{place}{mark}.sig" for mark in marks]
    expires = data[-21:-1].decode("ascii")
    if data != approval(run, artifact, expires):
        raise ValueError("it is about something else: another application, environment or artifact")
    if seconds_of(expires) <= run.facts.now_seconds:
        raise ValueError(f"it expired at {expires}")
    for path in sorted(paths):
        try:
            who = verifier.verify(data, read_beside(run, path, "")[1], path)["signer"]
            # A signer that is a pattern could also stand for whoever runs this.
            is_own = run.by["user"] in (who, who.partition("@")[0])
            counted = others if is_own or re.search("[*?]", who) else signed
            counted.add(who)
        except ArtifactRefused as error:
            others.add(error.message)
        except FileNotFoundError:
            pass
    lists = [", ".join(sorted(people)) or "nobody" for people in (signed, others)]
    text = f"{len(signed)} of {policy.approvals}: {lists[0]}; not counted: {lists[1]}"
    if len(signed) < policy.approvals:
        raise ValueError(text)
    return "ok", text, ""


def judge_promotion(run: Run, artifact: Any, place: str, data: bytes) -> Finding:
    """A signed attestation says that it was live elsewhere, long enough and recently enough."""
    policy, (name, signature) = run.settings.policy, read_beside(run, place, ".sig")
    verifier = Verifier([], list(read_signers(policy.attesters)), "deploy-attestation")
    who = verifier.verify(data, signature, name)["signer"]
    statement = json.loads(data.decode("utf-8"))
    predicate = statement["predicate"]
    for key, value, expected in (
            ("predicateType", statement["predicateType"], DEPLOYMENT),
            ("sha256", statement["subject"][0]["digest"]["sha256"], artifact.sha256),
            ("application", predicate["application"], run.application),
            ("environment", predicate["environment"], policy.promoted_from)):
        if value != expected:
            raise ValueError(f"its {key} is {value}, not {expected}")
    soaked, at = float(predicate["soakedSeconds"]), predicate["attestedAt"]
    text = f"live in {policy.promoted_from} for {format_seconds(soaked)} at {at}, says {who}"
    if policy.promoted_after and not soaked >= policy.promoted_after(0, 1):  # true for NaN, too
        raise ValueError(f"{text}; promoted_after is longer")
    if policy.promoted_within and \
            seconds_of(at) < policy.promoted_within(run.facts.now_seconds, -1):
        raise ValueError(f"{text}; promoted_within is shorter ago")
    return "ok", text, ""


def is_denied(terms: str, patterns: str) -> bool:
    """Say whether a license expression has no choice that is allowed; brackets make it one."""
    terms = re.sub(r"\A\(([^()]*)\)\Z", r"\1", " ".join(terms.lower().split()))
    choices = [terms] if "(" in terms else terms.split(" or ")
    return all(any(fits(name.strip("()"), patterns) for name in (choice, *choice.split()))
               for choice in choices)


def note_built(run: Run, text: Any, *, is_best: bool = True) -> None:
    """Note when the artifact was built (RFC 3339, UTC); any other text is ignored."""
    artifact = run.facts.artifact
    if artifact and (is_best or not artifact.built_at):
        with suppress(ValueError):
            artifact.built_at = format_time(seconds_of(str(text)))


def judge_sbom(run: Run, artifact: Any, place: str, data: bytes) -> Finding:
    """An SBOM (CycloneDX, SPDX 2) in a signed SHA256SUMS lists nothing that is denied."""
    policy, wrong, unknown = run.settings.policy, [], []
    sums, listing = read_beside(run, os.path.join(os.path.dirname(place), "SHA256SUMS"), "")
    name, signature = read_beside(run, sums, ".minisig", ".sig")
    verifier_of(run.settings).verify(listing, signature, name)
    for path, sha256 in (artifact.path, artifact.sha256), (place, hashlib.sha256(data).hexdigest()):
        if (os.fsencode(base_name(path)), sha256) not in read_digests(listing):
            raise ValueError(f"{sums} does not list {path} with its digest")
    packages, licenses = (",".join(globs).lower()
                          for globs in (policy.deny_packages, policy.deny_licenses))
    document = json.loads(data.decode("utf-8"))
    about = document.get("metadata") or document.get("creationInfo") or {}
    note_built(run, about.get("timestamp") or about.get("created"), is_best=False)
    parts = list(document["components" if "bomFormat" in document else "packages"])
    for part in parts:
        parts += part.get("components", [])  # this loop comes to them, too
        name = f"{part['name']}@{part.get('version') or part.get('versionInfo')}"
        names = [part["name"], name, part.get("purl") or name]
        names += [other["referenceLocator"] for other in part.get("externalRefs", [])]
        terms = [part.get("licenseConcluded"), part.get("licenseDeclared")]
        for entry in part.get("licenses", []):
            terms += [entry.get("expression"), *map(entry.get("license", {}).get, ("id", "name"))]
        terms = [term for term in terms if term not in (None, "NONE", "NOASSERTION")]
        hits = [text for text in names if fits(text.lower(), packages)]
        hits += [text for text in terms if is_denied(text, licenses)]
        if hits:
            wrong.append(f"{name} ({hits[0]})")
        elif not terms:
            unknown.append(name)
    text = f"{count(len(parts), 'package')}, {count(len(unknown), 'license')} unknown"
    if policy.unknown_licenses == "deny":
        wrong += unknown
    if wrong or not parts:
        raise ValueError(f"denied: {', '.join(wrong[:5])}" if wrong else "it lists no package")
    if unknown and policy.unknown_licenses == "warn":
        return "warn", f"{text}: {', '.join(unknown[:5])}", ""
    return "ok", text, ""


def judge_provenance(run: Run, artifact: Any, place: str, data: bytes) -> Finding:
    """Signed SLSA provenance names an allowed builder and source."""
    policy = run.settings.policy
    for *_, statement in verifier_of(run.settings).statements(data):
        places = PROVENANCE.get(statement["predicateType"])
        digests = [subject["digest"].get("sha256") for subject in statement["subject"]]
        if not places or artifact.sha256 not in digests:
            continue
        text = json.dumps(statement["predicate"])
        builder, uri, built_at = (json_value(text, path)[0] or "" for path in places)
        source = re.sub(r"\Agit\+|@refs/.*", "", uri)
        for names, allowed in ((builder,), policy.builders), ((source, uri), policy.sources):
            if allowed and not set(names).intersection(allowed):
                raise ValueError(f"{names[0]} is none of {', '.join(allowed)}")
        note_built(run, built_at)
        return "ok", f"built by {builder} from {source}", ""
    raise ValueError("no SLSA provenance of v1 or v0.2 in it is about this artifact")


def judge_by_command(run: Run, artifact: Any) -> Finding:
    """The command of [policy] judge exits with 0 in time; its first line is the reason."""
    import tempfile
    facts, policy, lines = run.facts, run.settings.policy, []
    if artifact.sha256 in run.judged:  # before there was a root, or the bytes
        return "ok", run.judged[artifact.sha256], ""
    live = facts.records.get(facts.current.release or "")
    before = facts.records.get(live.previous or "") if live else None
    case = run.console.secrets.mask_json({
        "schema": SCHEMA, "operation": run.plan.operation, "application": run.application,
        "environment": policy.environment, "host": run.by["host"], "by": run.by,
        "now": format_time(facts.now_seconds), "override": run.flags.override,
        "artifact": {"name": portable(base_name(artifact.path)), "version": artifact.version,
                     "source": portable(artifact.path), "sha256": artifact.sha256},
        "current": live and encode(live), "previous": before and encode(before),
        "plan": run.plan.to_json(), "checks": [check._asdict() for check in run.outcome.checks]})
    context = Context(run.application, facts.root, "", "", facts.root, "", run.deploy_id)
    with blaming(PreflightFailed, "cannot keep in TMPDIR what [policy] judge is to read",
                 "make room in TMPDIR or /tmp, then run again"):
        stream = tempfile.TemporaryFile(buffering=0)
        write_all(stream.fileno(), json.dumps(case).encode("ascii"))
    with stream:
        stream.seek(0)
        done = start_command(run, context, "policy judge", policy.judge, stdin=stream,
                             timeout_seconds=JUDGE_SECONDS,
                             on_line=lambda line: lines or lines.append(line))
    why = [*lines, *done.tail, "it said nothing"][0]
    if not done.ok:
        raise PreflightFailed(f"{spell(done.argv)} {done.verdict()}: {why}", "it is to decide")
    run.judged[artifact.sha256] = why
    return "ok", why, ""


# ============================================================================
# 11  Source
#    How a host fetches its releases by itself: the index, the download, and what
#    was seen of both before.
# ============================================================================

MAX_INDEX_BYTES = 2 << 20  # kept in source.json, where a byte may take six
GIT_SECONDS = 3600.0


class Offer(Artifact):
    """An artifact as the source describes it; its bytes may not be here yet."""

    withdrawn = False
    format, size_bytes, given, ref = "not fetched yet", 0, "", ""

    def __init__(self, **fields: Any) -> None:
        vars(self).update(fields, release_version=fields["version"])  # as the flags call it


def source_mistakes(settings: Settings) -> Iterator[Tuple[str, Any, str]]:
    """Yield what does not go together in [source]."""
    source, is_json = settings.source, settings.source.index.endswith(".json")
    for is_wrong, problem in (
            (source.channel and not is_json, "channel needs an index in JSON"),
            (settings.signature.command, "[signature] command verifies no index: keys do"),
            (source.url and source.git, "url and git are two sources: leave one"),
            (source.url and not is_json and not settings.artifact.match,
             "index = SHA256SUMS needs [artifact] match, which tells the version"),
            (source.insecure and settings.origin("source", "insecure") not in settings.files,
             "insecure counts in a configuration file alone"),
            (source.url.startswith("http:") and not source.insecure, "url: expected https://"),
            (not re.match("(none|environment)$|http://.", source.proxy),
             "proxy: expected none, environment or http://HOST:PORT"),
            (wrong_header(source.header), wrong_header(source.header))):
        yield "source", is_wrong, problem
    try:
        read = _path if source.url[:1] in ("", "/", "~", "$") else parse_url
        read(source.url)
    except ValueError as error:
        yield "source", True, str(error)


def uapi_key(version: str) -> List[Any]:
    """Order versions as systemd does (UAPI.10): 1~rc1, 1, 1-1, 1.1, 1a, 11."""
    # What may come next, in rising order: ~, the end (here \0), -, ^, ., letters, digits.
    parts = re.findall(r"([~^.-])|([A-Za-z]+)|([0-9]+)", version)
    return [("~\0-^.".find(mark) if mark else 5 + bool(digits), int(digits or 0), letters)
            for mark, letters, digits in parts] + [(1, 0, "")]


def fetch(run: Run, address: str, etag: str = "", files: Sequence[int] = ()) -> Answer:
    """GET a text, or the rest of run.offer into `files`: descriptors of its .part and .etag."""
    source = run.settings.source
    if address.startswith("/"):
        with suppress(FileNotFoundError):
            return {"status": 200, "body": read_file(address, MAX_INDEX_BYTES).decode("latin-1")}
        return {"status": 404}
    # Token, headers and certificate go to the source's own host alone.
    home = parse_url(source.url)[:3]
    token = source.token_file and read_text(source.token_file).strip()
    login = {"Authorization": f"Bearer {token}"} if token else {}
    ours = SimpleNamespace(**dict(vars(source), header={**login, **source.header}))
    elsewhere = SimpleNamespace(header={}, tls_ca=source.tls_ca, proxy=source.proxy)

    def talk(asking: Conversation) -> Answer:
        from urllib.parse import urljoin
        extra, hop, before = {"If-None-Match": etag} if etag else {}, address, ""
        done = os.fstat(files[0]).st_size if files else 0
        part_etag = os.pread(files[1], 4096, 0).decode("latin-1") if done else ""
        if part_etag:
            extra = {"Range": f"bytes={done}-", "If-Range": part_etag}
        for _ in range(6):
            asking.at("reading its address")
            url = parse_url(hop)
            if url.scheme == "http" and (not source.insecure or before == "https"):
                return {"error": f"{hop} is not https", "again": False}
            signal.setitimer(signal.ITIMER_REAL, source.timeout)
            response = asking.request("GET", url, extra, ours if url[:3] == home else elsewhere)
            location = response.getheader("Location")
            if response.status not in (301, 302, 303, 307, 308) or not location:
                return receive(run, asking, response, extra, files)
            asking.socket.close()
            hop, before = urljoin(hop, location), url.scheme
        return {"error": f"more than 5 redirects, the last to {hop}", "again": False}

    with run.console.progress("fetch", run.offer.size_bytes if files else 0) as progress:
        for pause in (1, 2, 4, 0):
            with Conversation(talk, source.timeout, files) as asking:
                answer = asking.answer(run.interrupts, lambda known: progress(
                    known.get("done", 0), known["stage"]))
            error = answer["error"][:EVIDENCE_CHARACTERS]
            if not (error and answer.get("again", True) and pause):
                break
            if re.match(r"\d{1,9}\Z", answer.get("wait", "")):
                pause = min(int(answer["wait"]), 60)
            run.console.say(f"{address}: {error}; again in {pause} s", status="warn")
            run.interrupts.wait(pause)
    if error and answer.get("status") != 404:
        raise (ArtifactRefused if answer.get("wrong") else DeployError)(
            f"cannot fetch {address}: {error}", "check [source], the network, and what is there")
    return answer


def receive(run: Run, asking: Conversation, response: Any, extra: Dict[str, str],
            files: Sequence[int]) -> Answer:
    """Take a body as long as it keeps coming; refuse one that could be cut off unnoticed."""
    source, status, total, body = run.settings.source, response.status, response.length, []
    content_range, etag = response.getheader("Content-Range"), response.getheader("ETag") or ""
    begin, take, most_bytes = 0, body.append, MAX_STATE_BYTES if run.offer else MAX_INDEX_BYTES
    asking.at("reading the answer", etag=etag, wait=response.getheader("Retry-After") or "")
    if status == 304 and "If-None-Match" in extra:
        return {}
    if status in (206, 416) and "Range" in extra:
        begin = os.fstat(files[0]).st_size
        match = re.match(rf"bytes {begin}-\d+/(\d{{1,15}})\Z", content_range or "")
        if status == 416 or not match or etag != extra["If-Range"]:
            os.ftruncate(files[0], 0)
            return {"error": f"status {status}, and not the part that was asked for"}
        total = int(match.group(1))
    elif status != 200:
        return {"error": f"status {status}", "again": status in (408, 425, 429) or status >= 500}
    elif total is None and not response.chunked or content_range is not None:
        return {"error": "status 200 with a Content-Range, or without a length", "again": False}
    if files:
        most_bytes = run.offer.size_bytes or run.settings.limits.max_artifact or MAX_SIZE_BYTES
        take = partial(write_all, files[0])
        os.ftruncate(files[0], begin)
        os.lseek(files[0], begin, os.SEEK_SET)
        os.ftruncate(files[1], 0)
        os.pwrite(files[1], re.sub("W/.*", "", etag).encode("latin-1"), 0)
    done = counted_bytes = begin
    for piece in iter(lambda: response.read1(min(1 << 16, (total or MAX_SIZE_BYTES) - done)), b""):
        done += len(piece)
        if done > most_bytes:
            return {"error": f"more than {format_size(most_bytes)}", "again": False, "wrong": True}
        # Before writing: if the run has died, this process ends here, as nobody reads its pipe.
        asking.at(f"receiving it: {format_size(done)}", done=done)
        take(piece)
        if done - counted_bytes >= source.min_rate * source.timeout:
            signal.setitimer(signal.ITIMER_REAL, source.timeout)
            counted_bytes = done
    if total is not None and done < total:
        return {"error": f"it ended {count(total - done, 'byte')} early"}
    return {"body": b"".join(body).decode("latin-1")}


def remember(run: Run, seen: Dict[str, Any], **news: Any) -> None:
    """Write down what was seen of the source, unless this run only looks."""
    seen.update(news)
    if run.cache:
        run.store.write(SOURCE, json.dumps(seal(seen), indent=2).encode("ascii") + b"\n")


def verify_index(run: Run, fetched: Json) -> Optional[Json]:
    """Say who signed an index, None for nobody; ArtifactRefused where the signature is bad."""
    index, verify = run.settings.source.index, run.settings.signature.verify
    text, signature = (fetched[key].encode("latin-1") for key in ("text", "signature"))
    if verify == "off" or verify == "if-present" and not signature:
        return None
    return {**verifier_of(run.settings).verify(text, signature, f"signature of {index}"),
            "of": index}


def read_source(run: Run, seen: Json) -> Optional[Json]:
    """Bring index and signature in `seen` up to date; says who signed, DeployError if bad."""
    place = f"{run.settings.source.url.rstrip('/')}/{run.settings.source.index}"
    for etag in (seen.get("etag", ""), ""):  # once more in full, if they disagree
        answer, fetched = fetch(run, place, etag), seen
        if answer["status"] == 404:
            raise DeployError(f"{place} does not exist", "correct [source] url and index")
        if answer["status"] == 200:
            fetched = {"text": answer["body"], "etag": answer.get("etag", ""), "signature": ""}
            for suffix in (".minisig", ".sig"):
                if run.settings.signature.verify != "off" and not fetched["signature"]:
                    fetched["signature"] = fetch(run, place + suffix).get("body", "")
        try:
            signed = verify_index(run, fetched)
            seen.update(fetched)
            return signed
        except ArtifactRefused as error:
            problem = error
    if not seen.get("unmatched"):
        remember(run, seen, unmatched=True)
        raise DeployError(f"{problem.message}; one of the two may still be on its way",
                          "the next run looks again")
    raise problem


def read_index(run: Run, text: str) -> Tuple[Json, List[Offer]]:
    """Read an index: what it says of itself, and its offers; ArtifactRefused if damaged."""
    from urllib.parse import quote, unquote, urljoin
    source, head, offers, data = run.settings.source, {}, [], text.encode("latin-1")
    base = source.url.rstrip("/") + "/"
    with blaming(ArtifactRefused, f"the index {base}{source.index} is damaged",
                 "publish it again, whole"):
        if source.index.endswith(".json"):
            head = json.loads(data.decode("utf-8"))
            rows = head["releases"]
            is_whole = head["schema"] == 1 and type(head["sequence"]) is int
        else:
            rows = [{"name": name.decode("utf-8", "surrogateescape"), "sha256": digest}
                    for name, digest in read_digests(data)]
            is_whole = data.endswith(b"\n")
        if not is_whole:
            raise ValueError("its schema or sequence, or its last line has no end")
        head["wanted"] = source.channel and head["channels"].get(source.channel, source.channel)
        for row in rows:
            name = row["name"].rpartition("/")[2]
            if name.startswith("BEST-BEFORE-"):
                head["expires"] = f"{name[12:]}T23:59:59Z"
            with suppress(ArtifactRefused):  # it does not match: a signature, another platform
                row.setdefault("version", find_version(
                    name, run.settings.artifact.match, row["sha256"]))
            if "version" not in row:
                continue
            for key, form in ("version", _VERSION), ("sha256", "[0-9a-f]{64}"):
                if not re.fullmatch(form, row.get(key) or ""):
                    raise ValueError(f"{key} {row.get(key)!r} of {name!r}")
            url, built_at = row.get("url") or quote(row["name"]), row.get("built_at")
            offers.append(Offer(
                path=urljoin(base, url) if "://" in base else base + unquote(url), name=name,
                version=row["version"], sha256=row["sha256"], size_bytes=int(row.get("size") or 0),
                built_at=format_time(seconds_of(built_at)) if built_at else None,
                withdrawn=bool(row.get("withdrawn"))))
        if head.get("expires"):
            head["expires"] = format_time(seconds_of(head["expires"]))
    return head, offers


def choose(run: Run, head: Json, offers: List[Offer], seen: Json) -> Offer:
    """Pick what the source wants live; ArtifactRefused for an index that goes back (TUF)."""
    source, now_seconds, fitting = run.settings.source, run.facts.now_seconds, []
    order = {"semver": version_key, "uapi": uapi_key}[source.order]
    wanted = run.flags.version or head["wanted"]
    for offer in offers:
        key = order(offer.version) or ()
        # Of a pre-release uapi_key has a part for "~", and version_key's second part is False.
        is_pre = (0, 0, "") in key or False in key[1:2]
        is_fit = offer.version == wanted if wanted else key and (source.prereleases or not is_pre)
        if is_fit and not offer.withdrawn:
            fitting.append((key, offer))
        elif not key:
            run.console.say(f"{offer.name}: {offer.version} has no place in the order")
    key, best = max(fitting, key=operator.itemgetter(0), default=((), Offer(version="")))
    ours, signed_at = run.settings.deploy.application, head["signed_at"]
    expires = head.get("expires") or "9"  # as texts, "9" is later and "" earlier than any time
    oldest = format_time(now_seconds - source.max_age) if source.max_age else ""
    last = seen.get("newest") or {"version": "", "sequence": 0}
    pairs = {(offer.version, offer.sha256) for offer in offers}
    before = last["version"] and order(last["version"])  # None if `order` was another
    goes_back = "releases" not in head and not wanted and fitting and before and key < before
    for is_wrong, problem in (
            (not fitting, f"has no {wanted or 'release'} that fits"),
            (len(pairs) > len(dict(pairs)), "has two digests of one version"),
            (ours and head.get("application", ours) != ours, f"is of {head.get('application')}"),
            (expires < format_time(now_seconds), f"expired at {expires}"),
            (head.get("sequence", 0) < last["sequence"], "has a lower sequence than before"),
            (signed_at < seen.get("signed_at", ""), "was signed before the one before"),
            (signed_at < oldest,
             f"was signed at {signed_at or 'an unknown time'}, longer ago than max_age"),
            (goes_back, f"has {best.version} for its newest, and had {last['version']}"),
            (best.version == last["version"] and best.sha256 != last.get("sha256"),
             f"has other bytes of {best.version} than before")):
        if is_wrong:
            raise ArtifactRefused(f"the index of {source.git or source.url} {problem}",
                                  "publish a new one; to take what is there now: "
                                  f"rm {run.root}/{SOURCE}")
    return best


def look(run: Run) -> Tuple[Json, Set[str]]:
    """Set run.offer to what the source wants live; returns what was seen, and all digests."""
    source, seen = run.settings.source, run.store and run.store.load(SOURCE) or {}
    origin = {"url": source.git or source.url, "index": source.ref if source.git else source.index,
              "channel": source.channel, "prereleases": source.prereleases}
    if seen != seal(seen) or not origin.items() <= seen.items():
        seen = origin
    signed = None
    if not source.git:
        try:
            if "text" in seen:
                verify_index(run, seen)
        except ArtifactRefused:
            # Its key is no longer trusted: a thief's sequence could shut out every later index.
            seen = origin
        signed = read_source(run, seen)
    head, offers = list_refs(run) if source.git else read_index(run, seen["text"])
    head["signed_at"] = (signed or {}).get("at") or ""
    run.offer = offer = choose(run, head, offers, seen)
    offer.signature, offer.signature_file = signed, source.index if signed else ""
    digest = hashlib.sha256(seen.get("text", "").encode("latin-1")).hexdigest()
    if source.git or digest != seen.get("index_sha256"):
        seen["refused"] = {}
    if not run.flags.version:
        seen["newest"] = {"version": offer.version, "sha256": offer.sha256,
                          "sequence": head.get("sequence", 0)}
    remember(run, seen, index_sha256=digest, signed_at=head["signed_at"], unmatched=False,
             checked_at=format_time(run.facts.now_seconds))
    return seen, {offer.sha256 for offer in offers}


def bring(run: Run) -> str:
    """Fetch run.offer into the cache, from where an earlier run stopped; returns its path."""
    offer, name, files = run.offer, run.offer.sha256, []
    with ExitStack() as stack:
        for kind in ("part", "etag"):
            files.append(os.open(f"{name}.{kind}", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
                                 | os.O_CLOEXEC, run.store.file_mode, dir_fd=run.cache.descriptor))
            stack.callback(os.close, files[-1])
            with suppress(PermissionError):  # another member's, who gave it to the group
                os.fchmod(files[-1], run.store.file_mode)

        def sha256() -> str:
            return hash_pieces(blocks_of(files[0])).hex()

        if offer.ref:
            archive(run, f"{name}.part")
            offer.sha256 = sha256()  # before, the commit stood for it
            run.judged = {offer.sha256: why for why in run.judged.values()}
        actual, status = sha256(), 206
        while actual != offer.sha256 and status == 206:  # after a part that does not fit, the whole
            status = fetch(run, offer.path, files=files)["status"]
            actual = sha256()
            if actual != offer.sha256:
                os.ftruncate(files[0], 0)
        if status == 404:
            raise DeployError(f"{offer.path} does not exist", "see what the index points to")
        if actual != offer.sha256:
            raise ArtifactRefused(f"checksum mismatch for {offer.name}: its SHA-256 is {actual}, "
                                  f"the index says {offer.sha256}", "publish both again")
    return f"{run.root}/{CACHE}/{name}.part"


def git(run: Run, *words: str) -> List[str]:
    """Run git in the cache, by descriptor: nobody can swap that for a link; returns its output."""
    lines = []
    place = f"/proc/{os.getpid()}/fd/{run.cache.descriptor}" if run.cache else "/"
    result = run_command(["git", *words], interrupts=run.interrupts, directory=place,
                         environ=dict(base_environment(), GIT_TERMINAL_PROMPT="0"),
                         timeout_seconds=GIT_SECONDS, on_line=lines.append)
    if not result.ok:
        raise DeployError(f"git {' '.join(words)} {result.verdict()}: {' '.join(lines[:2])}",
                          "see [source] git and ref, and whether this user may read there")
    return lines


def list_refs(run: Run) -> Tuple[Json, List[Offer]]:
    """Ask the repository what `ref` names; until it is fetched, the commit is its digest."""
    from fnmatch import fnmatchcase
    source, offers = run.settings.source, []
    ref = source.ref if source.ref.startswith("refs/") else f"refs/heads/{source.ref}"
    lines = [line.split("\t") for line in git(run, "ls-remote", "--", source.git, ref)]
    commits = {words[1]: words[0] for words in lines if len(words) == 2}
    is_tag = ref.startswith("refs/tags/")
    for name, commit in commits.items():
        version = name[len("refs/tags/"):] if is_tag else commit[:12]
        commit = commits.get(name + "^{}", commit)
        if fnmatchcase(name, ref) and re.match(_VERSION, version):
            offers.append(Offer(version=version, sha256=commit, path=f"{source.git}#{commit}",
                                name=f"{run.application}-{version}.tar", ref=name))
    return {"wanted": "" if is_tag or not offers else offers[0].version}, offers


def archive(run: Run, file: str) -> None:
    """Make run.offer's `git archive`, the same bytes on every host, once its signature holds."""
    offer, signature = run.offer, run.settings.signature
    own = ["-C", "git", "-c", "tar.umask=0022", "-c", "core.autocrlf=false", "-c", "core.eol=lf",
           "-c", "core.attributesFile=/dev/null", "-c", "gpg.program=false",
           "-c", f"gpg.ssh.allowedSignersFile={signature.allowed_signers}"]
    run.cache.remove_tree("git")
    git(run, "init", "-q", "--bare", "git")
    git(run, *own, "fetch", "-q", "--depth=1", run.settings.source.git, f"+{offer.ref}:refs/it")
    *_, commit, seconds = git(run, *own, "log", "-1", "--format=%H%n%ct", "refs/it")
    if re.fullmatch("[0-9]{1,11}", seconds):  # it may claim anything
        offer.built_at = format_time(int(seconds))
    if commit != offer.sha256:
        raise DeployError(f"{offer.ref} has moved to {commit} meanwhile", "run it again")
    if signature.verify != "off":
        kind = "tag" if offer.ref.startswith("refs/tags/") else "commit"
        match = None
        try:
            output = " ".join(git(run, *own, f"verify-{kind}", "refs/it"))
            match = re.search(r'Good "git" signature for (\S+) with \S+ key (\S+)', output)
        except DeployError as error:
            output = error.message
        if not match or signature.principal and match.group(1) not in signature.principal:
            raise ArtifactRefused(f"{offer.path} is not signed by whom [signature] names: {output}",
                                  "have it signed by one of allowed_signers")
        offer.signature = {"scheme": "ssh", "signer": match.group(1), "key": match.group(2),
                           "at": None, "of": kind}
    git(run, *own, "archive", "--format=tar", "-o", f"../{file}", commit)
    run.cache.remove_tree("git")


# ============================================================================
# 12  Facts and preflight
#    What is observed before anything changes, and a table of checks of it.
#    Reads everything; writes only the history's line for a refusal.
# ============================================================================

class Facts(NamedTuple):
    """Everything that the planner and the checks may know, observed at one moment."""

    settings: Settings
    request: Any  # the command line's flags
    root: str
    command_line: Callable[[str], str]
    application: str
    deploy_id: str
    note: str
    now_seconds: float
    current: Current = Current(None)
    # Steps keep records, on_disk and slots up to date; the defaults are of a root not there.
    records: Dict[str, Record] = {}
    state_problems: Sequence[str] = ()
    on_disk: Set[str] = set()
    in_use: Dict[str, str] = {}  # by release, who runs from it
    journal: Optional[Journal] = None
    holder: Optional[Json] = None
    hold: Json = {}  # by, note, since, until; empty without one, or once it is over
    flags: Json = {}  # in shared/flags.json; only for the command
    artifact: Optional[Artifact] = None
    refusal: Optional[DeployError] = None
    slots: Dict[str, str] = {}  # by release, the slot whose link names it
    live_slot: str = ""  # that live.conf names; empty unless it is exactly one
    live_conf: str = ""

    def release(self, name: str) -> Optional[Record]:
        """Return the record of a release that is really there."""
        return self.records.get(name) if name in self.on_disk else None


def observe(run: Run, *, locked: bool = False, artifact: str = "", confirm: bool = False) -> Facts:
    """Look at the root, unless that is done, and at the artifact; keeps `run.facts`.

    `confirm`: read its bytes now, as nothing will unpack it.
    """
    if run.facts is None:
        unlocked = None if locked else run.store
        used = unlocked and unlocked.lock_used()
        run.facts = observe_root(run, locked=locked)
        if unlocked and unlocked.lock_used() != used:
            # A run began or ended meanwhile: half of this may be of the state before.
            run.facts = observe_root(run, locked=locked)
    run.outcome.release = run.facts.current.release
    if artifact:
        try:
            opened = observe_artifact(run, artifact, confirm=confirm)
            run.facts = run.facts._replace(artifact=opened)
        except (ArtifactRefused, UsageError) as error:
            run.facts = run.facts._replace(refusal=error)
            if confirm and run.settings.signature.verify != "off":
                with suppress(ArtifactRefused, UsageError):
                    # Refused for something else: its signature is still judged.
                    opened = run.artifact = run.artifact or Artifact(
                        artifact, None, delegated=run.flags.delegate)
                    if not opened.read_sha256:
                        opened.find_signature(run.settings, run.flags.signature or "")
                        opened.hash(run.settings, lambda done: run.interrupts.check())
    opened = run.facts.artifact
    if opened:
        names = {"name": portable(opened.name), "source": portable(opened.path)}
        run.outcome.extra["artifact"] = {
            **run.console.secrets.mask_json(names),
            "version": opened.version, "format": opened.format, "size": opened.size_bytes,
            "sha256": opened.sha256, "signature": opened.signature}
    return run.facts


def observe_root(run: Run, *, locked: bool) -> Facts:
    """Look at what is under the root; without a root there is nothing yet."""
    store, settings, command, now_seconds = run.store, run.settings, run.flags.command, time.time()
    facts = Facts(settings, run.flags, run.place, settings.command_line, run.application,
                  run.deploy_id, run.note, now_seconds, artifact=run.offer)
    if store is None:
        return facts
    # First: what a run makes live meanwhile must not seem to lack a record.
    seen: Json = {"current": store.current()}
    records, problems = store.records()
    try:
        seen["journal"] = store.load(JOURNAL, Journal)
    except StateError as error:
        problems.append(error.message)
    try:
        hold = store.load(HOLD)
        with blaming(StateError, f"{store.path}/{HOLD} cannot be read", ""):
            if hold and dict(hold["by"]) is not None \
                    and (hold["until"] or "9") > format_time(now_seconds):
                seen["hold"] = hold
    except StateError as error:
        problems.append(error.message)
    if command in ("deploy", "sync", "activate", "prune"):
        # Only then: reading /proc costs more than all the rest.
        seen["in_use"] = releases_in_use(settings, store.path)
    if command == "flags":
        seen["flags"] = store.load(FLAGS_FILE) or {}
    if not locked:
        seen["holder"] = lock_holder(store)
    if settings.slots:
        links = {name: f"{store.path}/slots/{name}" for name in settings.slots}
        seen["slots"] = {os.path.basename(os.readlink(link)): name
                         for name, link in links.items() if os.path.islink(link)}
        path = f"{store.path}/slots/live.conf"
        conf = seen["live_conf"] = read_text(path) if os.path.isfile(path) else ""
        # If `include` was changed since it was written, the port in it still tells.
        named = [name for name, slot in settings.slots.items() if conf == slot.include] or [
            name for name, slot in settings.slots.items() if re.search(rf"\b{slot.port}\b", conf)]
        seen["live_slot"] = named[0] if len(named) == 1 else ""
    on_disk = {name for name in store.names("releases")
               if not name.startswith(STAGING_PREFIX) and store.is_release(name)}
    return facts._replace(records=records, state_problems=problems, on_disk=on_disk, **seen)


def slot_problem(facts: Facts) -> Iterator[Problem]:
    """Yield a problem if live.conf, the slots' links, `current` and its record do not agree."""
    live = facts.live_slot or "no slot"
    current = facts.current.release or "nothing"
    record = facts.records.get(current)
    linked = facts.slots.get(current, "no slot")
    recorded = record and record.slot or "no slot"
    if not facts.journal and facts.holder is None and {linked, recorded} != {live}:
        yield (f"slots/live.conf names {live}, and current {current}, whose link is that of "
               f"{linked}, and which by its record is in {recorded}",
               facts.command_line(f"recover --to {facts.current.release or 'RELEASE'}"))


def observe_artifact(run: Run, path: str, *, confirm: bool) -> Artifact:
    """Open the artifact, which stays open to be unpacked, and find out what it is."""
    settings, facts, flags = run.settings, run.facts, run.flags
    run.artifact = artifact = Artifact(path, settings.limits, delegated=flags.delegate)
    for key in ("name", "path", "built_at", "signature", "signature_file") if run.offer else ():
        setattr(artifact, key, getattr(run.offer, key))  # a file in the cache tells none of these
    if (artifact.path + "/").startswith((f"{facts.root}/releases/", f"{facts.root}/.deploy/")):
        # A release has shared links and templates in it, and may be pruned while it is copied.
        raise ArtifactRefused(f"artifact {artifact.path} lies inside {facts.root}: deploy.py's own",
                              "name what the build made; a release goes live again by "
                              + facts.command_line("activate RELEASE"))
    if settings.signature.verify != "off" and not run.offer:  # its index was verified
        artifact.find_signature(settings, flags.signature or "")
    elif flags.signature:
        raise UsageError("--signature: no key is known", "set [signature] keys")
    given = run.offer or flags  # digest and version
    with run.console.progress("hash", artifact.size_bytes) as progress:
        artifact.identify(settings, progress, given.sha256 or "", given.release_version or "")
        # What is live stays live under any file name, unless a version is given.
        live = facts.current.release
        any_name = flags.command in ("deploy", "preflight") and not flags.release_version
        before = max((
            record for record in facts.records.values()
            if record.sha256 == artifact.sha256 and record.id in facts.on_disk and not flags.force
            and record.state != STATE_BAD
            and (record.version == artifact.version or any_name and record.id == live)
            and record.artifact.get("strip_components") == settings.artifact.strip_components),
            key=lambda record: (record.id == live, record.sequence), default=None)
        if before or confirm:
            # The very file that `before` was unpacked from is read again only for its signature.
            is_same = before and before.artifact.get("identity") == artifact.identity \
                and not artifact.distrust
            artifact.confirm(settings, progress, before.sha256 if is_same else "")
    if not before:
        return artifact
    for status, why, hint in check_signature(run):
        if status == "fail":
            raise ArtifactRefused(why, hint)
    try:
        changed = before.id != live and problems_of(check_release(run, before))
    except StateError as error:
        changed = error.message  # without a manifest it counts as changed
    if changed:
        run.console.warn(f"{before.id} was changed since it was staged; staging the artifact again")
    else:
        artifact.release = before.id
        artifact.version = before.version
    return artifact


def check_release(run: Run, record: Record) -> Differences:
    """Compare a release with its manifest; StateError if that is missing or damaged."""
    release, store = record.id, run.store
    written = mutable_pattern(run.settings.deploy)
    try:
        with run.console.progress("verify", int(record.tree.get("bytes") or 0)) as progress, \
                store.open_manifest(record) as streams:
            for name, stream in zip(("manifest", "tree"), streams):
                digest = hash_pieces(blocks_of(stream.fileno())).hex()
                if digest != record.tree.get(f"{name}_sha256"):
                    raise ValueError(f"{store.path}/.deploy/{name}s/{release} was changed")
            with store.directory("releases").child(release) as directory:
                manifest = read_manifest(*streams)
                if run.settings.deploy.writable:  # not hashed: of any size by now
                    manifest = {name: member for name, member in manifest.items()
                                if not written.match(os.fsdecode(name))}
                found = differences(manifest, scan_tree(directory, progress, known=manifest))
    except ValueError as error:
        raise StateError(f"{release} cannot be verified: {error}", store.make_whole(record))
    except PermissionError as error:
        raise StateError(f"{release} cannot be verified: {user_name()} may not read "
                         f"{portable(os.fsdecode(error.filename or 'part of it'))}: "
                         f"{reason(error)}", "run it as the owner of that")
    # A new directory above something mutable is no difference; other names in it are.
    parents = {name[:slash.start()] for name in found["added"] if written.match(name)
               for slash in re.finditer("/", name)}
    return {word: {name: why for name, why in names.items()
                   if not (written.match(name) or word == "added" and name in parents)}
            for word, names in found.items()}


def mutable_pattern(deploy: Any, *, bytecode: bool = True) -> Any:
    """Compile what may change in a release: bytecode, [deploy] mutable and writable."""
    parts = [r"(?:.*/)?__pycache__(?:/|\Z)", r".*\.py[co]\Z"] if bytecode else [r"(?!)"]
    parts += [re.escape(path) + r"(?:/|\Z)" for path in deploy.writable]
    parts += [path_pattern(glob.strip("/")) + r"(?:/|\Z)" for glob in deploy.mutable]
    return re.compile("|".join(parts), re.DOTALL)


def strangers(run: Run, record: Record) -> List[str]:
    """List what was written into a release since it was made, bytecode and `mutable` aside."""
    written = mutable_pattern(run.settings.deploy)
    added = []
    top = f"{run.store.path}/releases/{record.id}/"
    # Without a manifest nothing is known; of a tree too deep, what was found will do.
    with suppress(OSError, ValueError, StateError, RecursionError), \
            run.store.open_manifest(record) as streams:
        known = {os.fsdecode(name) for name in read_manifest(*streams)}
        for place, directories, files in os.walk(top):  # which follows no link
            run.interrupts.check()
            inside = os.path.join(place, "")[len(top):]
            links = [name for name in directories if os.path.islink(f"{place}/{name}")]
            added += [name for name in (inside + name for name in files + links)
                      if name not in known and not written.match(name)]
            directories[:] = [name for name in directories if not written.match(f"{inside}{name}/")]
    return sorted(added)


def name_differences(run: Run, found: Differences) -> List[str]:
    """Put all differences into the result; return a line for each."""
    run.outcome.extra["differences"] = {
        word: list(map(portable, names)) for word, names in found.items()}
    return [f"{word:<8} {portable(name)}  {portable(why)}".rstrip()
            for word, names in found.items() for name, why in names.items()]


def problems_of(differences: Differences) -> str:
    """Say what makes a release unfit to go live; files that were only added do not."""
    return " and ".join(
        f"{count(len(differences[word]), 'entry', 'entries')} {word} "
        f"({', '.join(itertools.islice(differences[word], 3))})"
        for word in ("changed", "missing") if differences[word])


def context_for(facts: Facts, release: OptionalText, previous: OptionalText = None,
                failed: str = "") -> Context:
    """Describe a release, or the one to be made, to hooks, probes and templates."""
    record = facts.records.get(release or "")
    live = facts.current.release
    if previous is None:
        previous = record.previous if record and release == live else live
    known = record or (None if release in facts.on_disk else facts.artifact)
    path = f"{facts.root}/releases/{release}" if release else facts.root
    return Context(facts.application, facts.root, release or "",
                   known.version if known else release or "", path, previous or "",
                   facts.deploy_id, failed, facts.note,
                   slot=facts.settings.slots.get(facts.slots.get(release or "")))


def releases_in_use(settings: Settings, root: str) -> Dict[str, str]:
    """Return, by release, a process that has its working directory or executable in it.

    It must be root's, the owner's or a service's (by cgroup or pidfile): nobody else shall keep a
    release by a `cd` into it.
    """
    inside = os.path.realpath(f"{root}/releases") + "/"
    found = {}
    services = settings.service.values()
    units = {unit for service in services if service.unit
             for unit in (service.unit, f"{service.unit}.service")}
    pidfiles = [service.pidfile for service in services if service.pidfile]
    numbers = filter(str.isdigit, os.listdir("/proc") if os.path.isdir("/proc") else ())
    for process, name in itertools.product(numbers, ("cwd", "exe")):
        with suppress(OSError, ValueError, KeyError):  # it has ended, or may not be looked at
            target = os.readlink(f"/proc/{process}/{name}")
            release = target[len(inside):].split("/")[0]
            if not target.startswith(inside) or release in found:
                continue
            # The real uid: running something setuid does not make a user its owner.
            known = dict(re.findall(r"(?m)^(\w+):\s*(\S+)", read_text(f"/proc/{process}/status")))
            user = int(known["Uid"])
            owner = os.lstat(inside + release).st_uid
            groups = read_text(f"/proc/{process}/cgroup").strip().split("/") if units else []
            own = {process, known["PPid"], *groups}
            if user in (0, owner) or own.intersection(units) or any(
                    read_text(path).strip() in own for path in filter(os.path.isfile, pidfiles)):
                found[release] = f"pid {process} of {user_name(user)}"
    return found


# -- refusals ----------------------------------------------------------------

REMEMBERED_ENTRIES = 100
GOES_LIVE = ("deployed", "synced", "activated", "rolled_back", "left_live", "recovered")


def note_ending(run: Run, about: Any, error: Optional[DeployError], **fields: Any) -> None:
    """Append a line about a record or artifact to the history; a refusal once, not at every tick.

    Again only once another release went live, or, without a digest, on another day.
    """
    outcome, entry = run.outcome, HistoryEntry(**{
        "sequence": 0, "at": format_time(), "by": run.by, "previous_sha256": "",
        "message": run.console.secrets.mask(error.message) if error else "",
        "version": about.version if about else None, "note": run.note or None,
        "artifact_sha256": about.sha256 if about else None,
        "built_at": about.built_at if about else None, **fields})

    def refused(refusal: HistoryEntry) -> Any:
        # Free space and days differ from tick to tick.
        message = re.sub(r"([A-Z]\w\w )?\d[\d.,:]*( [kMGT]?B\b)?", "#", refusal.message)
        return refusal.result, message, refusal.artifact_sha256 or refusal.at[:10]

    outcome.result = entry.result
    if entry.result == "refused":
        with suppress(StateError):  # a damaged line; `history --verify` finds it
            since = itertools.takewhile(
                lambda earlier: earlier.result not in GOES_LIVE or earlier.automatic,
                reversed(run.store.history(REMEMBERED_ENTRIES)))
            outcome.is_repeated = refused(entry) in map(refused, since)
    if not outcome.is_repeated:
        run.store.append_history(entry)
    outcome.extra["chain"] = run.store.chain


def remember_refusal(run: Run, error: DeployError) -> None:
    """Note in the history that a run was refused before its first step; it has the lock."""
    if run.outcome.result or isinstance(error, StateError) or any(
            check.status == "fail" and check.name in ("permissions", "root", "state")
            for check in run.outcome.checks):
        return  # it is written, or nothing may be written there
    why = {"step": "preflight", "reason": run.console.secrets.mask(error.message),
           "evidence": {}, "interrupted": False}
    try:
        note_ending(run, run.facts and run.facts.artifact, error, deploy_id=run.deploy_id,
                    operation=run.flags.command, result="refused", release=None,
                    previous=run.facts.current.release if run.facts else None,
                    exit_code=error.exit_code, seconds=0.0, steps=[], failure=why)
    except (OSError, StateError) as problem:
        run.console.warn(f"the refusal could not be written down: {reason(problem)}")


# -- checks ------------------------------------------------------------------

RESTORE = "restore the file from a backup, or move it away: its release is then unknown"
SEVERITY = ("fail", "warn", "skip", "ok")
KEY_FILES = ("auth_file", "url_file", "token_file", "tls_ca", "tls_cert", "tls_key")


def check_configuration(run: Run) -> Findings:
    """The right user runs this; credentials and certificates that it names can be used."""
    settings = run.settings
    user = settings.preflight.user
    run.console.debug(f"{os.uname().nodename}: python {sys.executable} {sys.version.split()[0]}, "
                      f"cwd {os.path.realpath('/proc/self/cwd')}, PATH {command_path()}")
    if user not in ("", user_name(), str(os.geteuid())):
        yield "fail", f"run by {user_name()}, not by {user}", f"sudo -u {user} deploy.py ..."
    for name, probe in sorted(settings.probe.items()):
        named = [f"{key} {getattr(probe, key)}" for key in KEY_FILES if getattr(probe, key, "")]
        try:
            text = read_text(probe.auth_file).strip() if probe.auth_file else ""
            wrong = " " in text and wrong_header({"Authorization": text})
            if wrong:
                raise ValueError(wrong)
            if any(name.startswith("tls_") for name in named):
                tls_context(probe)
        except (OSError, ValueError) as error:
            yield ("fail", f"[probe:{name}] {', '.join(named)}: {network_error(error)}",
                   "auth_file holds a header's value or user:password; tls_* are PEM, tls_key is "
                   "not encrypted")
    for key, name in (("run_as", settings.hooks.run_as),
                      ("app_user", settings.deploy.writable and settings.deploy.app_user)):
        if name and account("user", name, key) and os.geteuid() != 0:
            yield "fail", f"{key} = {name} needs root", f"run as root, or remove {key}"
    yield "ok", ", ".join(settings.files) or "no file; defaults and command line", ""


def check_trust(run: Run) -> Findings:
    """Nobody else can have written what this run trusts."""
    serious = "fail" if os.geteuid() == 0 else "warn"
    store = run.store
    root = run.facts.root
    private = f"{root}/.deploy"
    if run.settings.deploy.group:
        check_group(run.settings.deploy.group)
    refused, accepted = untrusted(run.settings)
    # Unless root runs a program out of a release (in `refused`), an application that owns
    # releases/ can only change its own code: a warning.
    for path, (problem, fix) in {**trust_problems(f"{root}/releases"), **refused}.items():
        status = os.lstat(path)
        # In its own root, [deploy] group may write.
        is_own = store and status.st_gid == store.group and not status.st_mode & 0o002 \
            and f"{path}/".startswith(f"{root}/")
        if not is_own and path not in accepted:
            yield serious if path in refused else "warn", problem, fix
    for problem, fix in accepted.values():
        yield "warn", problem, fix
    if store is not None:
        store.check_owner()
        own = store.status(".deploy")
        mode = stat.S_IMODE(own.st_mode) if own else 0
        if mode & 0o077 & ~store.directory_mode:
            yield (serious, f"{private} is open to others (mode {mode:04o})",
                   f"chmod {store.directory_mode:04o} {private}")


def untrusted(settings: Settings) -> Tuple[Problems, Problems]:
    """Find, by path, what root acts on and others could change: refused, and accepted risks."""
    refused: Problems = {}
    deploy, signature, policy = settings.deploy, settings.signature, settings.policy
    paths = [*settings.files, deploy.root, signature.allowed_signers, policy.approvers,
             policy.attesters, *itertools.filterfalse(KEY_LITERAL.match, signature.keys)]
    for peer in (*settings.probe.values(), *settings.notify.values(), settings.source):
        paths += [getattr(peer, key, "") for key in KEY_FILES]
    for service in (*settings.service.values(), *settings.slots.values()):
        if service.unit:
            paths += program_places(service.systemctl[0], "/", command_path())
    if settings.source.git:
        paths += program_places("git", "/", command_path())
    for path in filter(None, paths):
        refused.update(trust_problems(path))
    root = os.path.realpath(deploy.root) if deploy.root else ""
    shared = tuple(f"{path}/" for path in deploy.shared_dirs + deploy.shared_files)
    for section, key, (program, *_), in_root, in_release in commands(settings):
        directories = [root or "/"] if in_root or not root else []
        if in_release and root:
            directories += [f"{root}/releases/(new)", os.path.realpath(f"{root}/current")]
            if (os.path.normpath(native(program)) + "/").startswith(shared):
                directories.append(f"{root}/shared")
        for directory in directories:
            refused = {**foreign_program(settings, f"[{section}] {key}", program, directory),
                       **refused}
    risks = settings.preflight.accept_risk
    if settings.origin("preflight", "accept_risk") in settings.files:
        # A configuration that others may write cannot accept its own risk.
        own = set().union(*map(trust_problems, settings.files))
        risks = [path for path in risks if path not in own]
    return refused, {path: refused.pop(path) for path in risks if path in refused}


def check_root(run: Run) -> Findings:
    """The root can be written or made, on one filesystem: else a rename would fail (EXDEV)."""
    root = run.facts.root
    place = root if run.store else f"{os.path.dirname(root)}/."
    if not os.access(place, os.W_OK | os.X_OK):
        yield ("fail", f"{place} is not there or cannot be written by {user_name()}",
               f"mkdir -p {root}, chown {user_name()} {root} (of a group: chgrp, chmod g+rwxs), or "
               "mount it read-write")
    for name in ("releases", *PRIVATE_DIRECTORIES) if run.store else ():
        path = f"{root}/{name}"
        status = os.lstat(path if os.path.lexists(path) else root)
        if not stat.S_ISDIR(status.st_mode) or status.st_dev != os.lstat(root).st_dev:
            yield ("fail", f"{path} is no directory of the root's filesystem",
                   f"move it away, or unmount {path}")
    yield "ok", root if run.store else f"{root} will be made", ""


def check_application(run: Run) -> Findings:
    """No other application deploys to this root; compared if both were given a name."""
    ours = run.settings.deploy.application
    newest = max((record for record in run.facts.records.values() if record.application),
                 key=attrgetter("sequence"), default=None)
    if newest and newest.application != ours:
        yield ("warn" if run.flags.force else "fail",
               f"this root is {newest.application}'s, and what is to be deployed is {ours}",
               "name the right root, or take it over: --force")


def check_hold(run: Run) -> Findings:
    """Nobody holds what is live; only a rollback may pass a hold."""
    hold = run.facts.hold
    command = run.flags.command
    if command != "rollback":
        until = f" until {hold['until']}" if hold["until"] else ""
        yield ("warn" if command == "stage" else "fail",
               f"{hold['by'].get('user')} on {hold['by'].get('host')} holds what is live, since "
               f"{hold.get('since')}{until}: {hold.get('note')}",
               f"wait, or ask whoever it was: {run.settings.command_line('unhold')}")


def check_state(run: Run) -> Findings:
    """`current`, records and journal are in order."""
    facts = run.facts
    current = facts.current
    serious = "fail"
    fix = RESTORE
    if run.flags.command in ("rollback", "activate"):
        fix += f"; or go to a whole one: {facts.command_line('recover --to RELEASE')}"
        if current.release in facts.records:
            serious = "warn"  # another release's damaged record must not stop a way back
    for problem in facts.state_problems:
        yield serious, problem, fix
    if current.problem:
        yield "fail", current.problem, current.hint
    elif current.release and current.release not in facts.records:
        yield ("warn", f"current points to {current.release}, which has no record",
               f"make it known: {facts.command_line(f'adopt {current.release}')}")
    yield "ok", current.release or "nothing is live yet", ""


def check_lock(run: Run) -> Findings:
    """No other run is at work, and none was interrupted."""
    journal = run.facts.journal
    if run.facts.holder is not None:
        yield ("fail", f"held by {describe_holder(run.facts.holder)}",
               "look again once it has ended; a real run waits for it with --wait-lock 5m")
    elif journal:
        yield ("warn", f"{journal} was interrupted ({journal.phase})",
               "the next writing command recovers it first")


def check_artifact(run: Run) -> Findings:
    """It is whole, did not fail, was not rolled back from, and is no older than what is live."""
    artifact, refusal, flags, facts = run.facts.artifact, run.facts.refusal, run.flags, run.facts
    if refusal:
        raise refusal
    bad = refused_record(facts, artifact.sha256)
    live = facts.records.get(facts.current.release or "")
    if bad and flags.force:
        yield "warn", f"refused before as {bad.id}, and is tried again", ""
    elif bad and (bad.state == STATE_BAD or flags.command != "stage"):
        yield ("fail", *bad_refusal(bad))
    # The version of an adopted release is only its name.
    if live and live.artifact.get("sha256_source") != "adopted":
        new = version_key(artifact.version)
        old = version_key(live.version)
        if new and old and new < old:
            yield ("warn" if flags.allow_downgrade else "fail",
                   f"{artifact.version} is older than {live.version}, which is live",
                   "to go back use rollback or activate; to insist, --allow-downgrade")
    yield ("ok", f"{artifact.name}: {artifact.format}, {format_size(artifact.size_bytes)}, version "
           f"{artifact.version}, sha256 {artifact.sha256[:12]} ({artifact.sha256_source})", "")


def check_signature(run: Run) -> Findings:
    """[signature]: who signed the artifact, once its bytes were read."""
    artifact = run.artifact
    live = run.facts.release(run.facts.current.release or "")
    if artifact is None or run.settings.signature.verify == "off":
        yield "skip", "no artifact given, or verify = off", ""
        return
    if artifact.copy and (artifact.listing or not artifact.distrust):
        ask_signature_command(run, artifact)
    if artifact.verify and not artifact.read_sha256:
        yield "ok", f"{artifact.signature_file} is verified once the bytes are read", ""
    elif artifact.distrust:
        yield "fail", artifact.distrust.message, artifact.distrust.hint
    elif artifact.signature:
        yield "ok", f"{artifact.signature_file}: by {artifact.signature['signer']}", ""
    elif live and live.artifact.get("signature"):
        yield ("warn", "it has no signature, and what is live has one",
               "have it signed where it was built, or insist: [signature] verify = required")
    else:
        yield "skip", "it has no signature", ""


def ask_signature_command(run: Run, artifact: Artifact) -> None:
    """Hand what was signed to [signature] command, which must agree with the keys, if any."""
    copy, artifact.copy = artifact.copy, None
    copy.seek(0)
    try:
        perform_command(run, context_for(run.facts, None), "signature",
                        run.settings.signature.command, 60.0, stdin=copy,
                        variables={"DEPLOY_SIGNATURE": artifact.signature_file})
    except StepFailed as error:
        artifact.verify = artifact.signature = None
        artifact.distrust = ArtifactRefused(error.message, error.hint)


def check_origin(run: Run) -> Findings:
    """Nobody else can have written the artifact, its digest, or anything on the way."""
    artifact, settings, problems = run.facts.artifact, run.settings, {}
    place, given, inbox = os.path.dirname(artifact.path), artifact.given, settings.deploy.inbox
    paths = [given, f"{artifact.path}.sha256", f"{place}/SHA256SUMS"]
    is_listed = run.offer and given == run.offer.path  # its sha256 is from the index beside it
    if is_listed:
        paths.append(f"{settings.source.url}/{settings.source.index}")
    is_trusted = (run.flags.sha256 or run.offer) and not is_listed or artifact.signature_file \
        or inbox and place == os.path.realpath(inbox)
    if is_trusted or os.geteuid():
        return
    for path in paths:
        problems.update(trust_problems(path, spare_root=True))
    if artifact.format == "directory":
        for member, _, status in walk_tree(artifact.descriptor):
            path = os.path.join(artifact.path, os.fsdecode(member.name))
            for why, fix in owner_problem(path, status, spare_root=True).values():
                problems.setdefault(artifact.path, (f"{artifact.path}: {why}", fix))
    # It may have been opened by somebody's link, which is gone by now.
    if not os.path.samestat(artifact.status, os.stat(given)):
        yield "fail", f"{given} was replaced while it was looked at", "run it again"
    for path, (why, fix) in problems.items():
        yield ("warn" if path in settings.preflight.accept_risk else "fail", why,
               f"{fix}; or give its digest from where it was built: --sha256; or "
               f"{accepting(settings, problems)}")


def is_refused(record: Record) -> bool:
    """Say whether a release failed, or a person rolled back from it: no timer may retry it."""
    return record.state == STATE_BAD or record.rolled_back_at is not None


def refused_record(facts: Facts, sha256: str) -> Optional[Record]:
    """Return the record for which this digest is refused, unless a newer try of it went well."""
    tries = [record for record in facts.records.values() if record.sha256 == sha256]
    newest = max(tries, key=attrgetter("sequence"), default=None)
    return newest if newest and is_refused(newest) else None


def bad_refusal(bad: Record) -> Problem:
    """Say why a bad artifact or release is refused, and how to insist."""
    if bad.state != STATE_BAD and bad.rolled_back_at:
        return (f"{bad.version} was rolled back from at {bad.rolled_back_at}: {bad.id}",
                f"deploy another version, or insist: activate {bad.id}, or --force")
    why = (bad.failure or {}).get("reason", "it failed after activation")
    return (f"{bad.version} is marked bad: {bad.id}: {why}",
            "deploy a corrected version, or insist with --force")


def check_room(run: Run) -> Findings:
    """There is room for what is to be unpacked, and what must stay free on top."""
    root, artifact, needed_bytes, needed_files = run.facts.root, run.facts.artifact, 0, 0
    disk = os.statvfs(root if run.store else os.path.dirname(root))
    if artifact and not artifact.release:
        # 0 where nobody knows: a full disk stops the unpacking in time.
        needed_bytes, needed_files = artifact.expanded_bytes, artifact.files
    for free, needed, spare, show, hint in (
            (disk.f_bavail * disk.f_frsize, needed_bytes, run.settings.deploy.min_free,
             format_size, "free some space (deploy.py prune), or lower [deploy] min_free"),
            # Some filesystems count no inodes.  64: for links, records and temporary files.
            (disk.f_favail if disk.f_files else 1 << 60, needed_files, 64, "{:,} inodes".format,
             "remove files: deploy.py prune")):
        yield ("ok" if free >= needed + spare else "fail",
               f"{show(free)} free, {show(needed)} needed and {show(spare)} kept free", hint)


def check_shared(run: Run) -> Findings:
    """Shared files exist, as made empty they would be a lie; directories are no links."""
    from pathlib import Path
    root, directories = Path(run.facts.root), run.settings.deploy.shared_dirs
    shared = root / "shared"
    for path in run.settings.deploy.shared_files:
        if not os.path.isfile(shared / path):
            yield ("fail", f"{shared / path} is missing, or no file",
                   f"put the real file at {shared / path}")
    # When shared directories are made, no symlink on the way is followed.
    wrong = [place for place in sorted({place for path in directories
                                        for place in (shared / path, *(shared / path).parents)
                                        if place == shared or shared in place.parents})
             if os.path.islink(place) or os.path.exists(place) and not os.path.isdir(place)]
    for place in wrong:
        yield ("fail", f"{place} is not a directory itself", "put the directory there (or mount "
               f"it: mount --bind), or move {place} away")
    for path in () if wrong else directories:
        old, new = Path(os.path.realpath(root / "current"), path), shared / path
        if os.path.isdir(old) and not os.path.islink(old) and any(old.glob("*")) \
                and not any(new.glob("*")):
            yield ("warn", f"shared/{path} is empty, and what the live release holds in {path} will"
                   f" not be seen any more: mkdir -p {new} && cp -a {old}/. {new}/", "")


def check_required(run: Run) -> Findings:
    """[preflight] require_* and free_ports."""
    preflight = run.settings.preflight
    for key, is_there in (("require_commands", find_command), ("require_env", environment),
                          ("require_files", lambda path: os.access(path, os.R_OK))):
        for name in getattr(preflight, key):
            if not is_there(name):
                yield ("fail", f"{name} of {key} is not there, empty, or not to be read",
                       f"install, set or create {name} for {user_name()}")
    yield from check_ports(preflight.free_ports)


def check_programs(run: Run) -> Findings:
    """Programs are there, those of the release aside, and a candidate's port is free."""
    sections = ["probe", "candidate", "slots"]
    port = run.settings.candidate.port
    if run.flags.command not in ("rollback", "activate"):
        sections += ["hooks", "migrate"]
    yield from missing_programs(run.settings, *sections)
    if port and run.flags.command not in ("stage", "rollback"):
        yield from check_ports([("", port)])


def check_ports(places: Sequence[Tuple[str, int]]) -> Findings:
    """Ports are free: bound for an instant, the only proof; without a host, on every address."""
    for host, port in places:
        try:
            hold_port(host or "0.0.0.0", port).close()
        except (OSError, TypeError) as error:  # TypeError: the host cannot be a name
            yield ("fail", f"port {host}:{port}: {reason(error)}",
                   f"see who has it: ss -ltnp 'sport = :{port}'; or correct free_ports")


def check_slots(run: Run) -> Findings:
    """Both units are known, the idle slot's port is free, and all agree on the live slot."""
    import glob
    facts = run.facts
    for problem in slot_problem(facts):
        yield ("fail", *problem)
    for name, slot in run.settings.slots.items():
        unit = UnitService(run, slot)
        yield from unit.check()
        inodes = sockets(slot.port, "0A") if unit.down() else []
        if inodes:
            pids = [path.split("/")[2] for path in glob.iglob("/proc/[0-9]*/fd/*")
                    if os.path.exists(path) and str(os.stat(path).st_ino) in inodes]
            yield ("fail", f"port {slot.port} of slot {name} is taken by process "
                   f"{', '.join(pids[:1])}, and {slot.unit} is down",
                   "end that process, or correct [slots]")
    if facts.current.release and not facts.live_conf:
        yield ("warn", f"{facts.current.release} is live in no slot: what runs of it is left alone",
               "stop it once the proxy leads to a slot")
    if not any(probe.of_slot for probe in run.settings.probe.values()):
        yield ("warn", "no probe asks a slot before the proxy leads there: its unit alone decides",
               "put ${port} into what a [probe:NAME] asks")


def check_probes(run: Run) -> Findings:
    """Probes with when = before or both hold, and the others can tell the version."""
    context = context_for(run.facts, None)
    new = run.facts.artifact
    for name, probe in sorted(run.settings.probe.items()):
        if new and new.version == new.sha256[:12] and probe.release and probe.when != "before":
            yield ("fail", f"[probe:{name}] release: no answer can name {new.version}, the "
                   f"digest of {new.name}", "give the artifact a name with its version (see "
                   "[artifact] match), or --release-version VERSION")
        if probe.when in ("after", "candidate"):
            continue
        with run.console.progress(f"probe {name}") as progress:
            result = run_probe(run, probe, context, expect_release=False, progress=progress)
        if not result.ok:
            yield ("fail" if probe.required else "warn", result.complaint(),
                   "correct what it asks for before deploying")


# name, check, and attributes of the run: the check is skipped unless one of them is set.
CHECKS: Tuple[Tuple[str, Callable[[Run], Iterable[Finding]], str], ...] = (
    ("configuration", check_configuration, ""),
    ("permissions", check_trust, ""),
    ("root", check_root, ""),
    ("state", check_state, ""),
    ("application", check_application, "settings.deploy.application"),
    ("hold", check_hold, "facts.hold"),
    ("lock", check_lock, ""),
    ("artifact", check_artifact, "facts.artifact facts.refusal"),
    ("signature", check_signature, "settings.signature.given"),
    ("origin", check_origin, "facts.artifact"),
    ("space", check_room, ""),
    ("required", check_required, "settings.preflight.given"),
    ("shared", check_shared, "settings.deploy.shared_dirs settings.deploy.shared_files"),
    ("programs", check_programs, "settings.probe settings.candidate.command settings.slots "
     "settings.migrate.up " + " ".join(f"settings.hooks.{name}" for name in HOOK_NAMES)),
    ("services", lambda run: itertools.chain.from_iterable(
        make_service(run, name).check() for name in services_in_order(run.settings)),
     "settings.service"),
    ("slots", check_slots, "settings.slots"),
    ("probes", check_probes, "settings.probe"),
    ("windows", rule(judge_windows, passable=True), "settings.policy.windows"),
    ("approvals", rule(judge_approvals, ".approval", "deploy.py approve says what to sign",
                       passable=True), "settings.policy.approvals"),
    ("promotion", rule(judge_promotion, ".attestation", "deploy.py attest, on a host where it was "
                       "live, says what to sign", passable=True), "settings.policy.promoted_from"),
    ("sbom", rule(judge_sbom, ".cdx.json .spdx.json", "let the build write it without what is "
                  "denied, list it in SHA256SUMS with the artifact, and sign that"),
     "settings.policy.sbom settings.policy.deny_licenses settings.policy.deny_packages"),
    ("provenance", rule(judge_provenance, ".intoto.jsonl",
                        "let an allowed builder write it, for this artifact, and sign it"),
     "settings.policy.builders settings.policy.sources"),
    ("override", lambda run: [] if run.settings.policy.override else [
        ("fail", "[policy] override = no", "go without --override")], "flags.override"),
    # Last: it is told what the others found.
    ("judge", rule(judge_by_command), "settings.policy.judge"),
)

# Skipped on a way back: a check of what only the next release needs belongs here.
AHEAD_CHECKS = ("artifact", "signature", "origin", "space", "required", "shared", "services",
                "probes")
# A failure of these refuses the artifact (exit 4), not the host (exit 3).
ARTIFACT_CHECKS = ("artifact", "signature")
# These run what is configured: skipped if somebody else may have written it.
ACTING_CHECKS = ("signature", "services", "slots", "probes", "judge")


def run_checks(run: Run, *, going_back: bool = False) -> List[CheckResult]:
    """Run every check, whatever the others found."""
    results: List[CheckResult] = []
    run.outcome.checks = results
    is_trusted = True
    for name, check, about in CHECKS:
        if going_back and name in AHEAD_CHECKS:
            continue
        try:
            if about and not any(attrgetter(path)(run) for path in about.split()):
                found = [("skip", "nothing to check", "")]
            elif name in ACTING_CHECKS and not is_trusted:
                found = [("skip", "not asked: see permissions", "")]
            else:
                found = list(check(run)) or [("ok", "as it should be", "")]
        except DeployError as error:
            if type(error) in (Interrupted, DeployError):  # the latter: sync's network
                raise
            # Whichever check found it, it is the artifact that is refused.
            name = "artifact" if isinstance(error, ArtifactRefused) else name
            found = [("fail", error.message, error.hint)]
        except OSError as error:
            found = [("fail", f"{error.filename}: {reason(error)}", "see that it can be read")]
        worst = min((row[0] for row in found), key=SEVERITY.index)
        _, details, fixes = zip(*[row for row in found if row[0] == worst])
        hint = "" if worst == "ok" else "; ".join(dict.fromkeys(filter(None, fixes)))
        results.append(CheckResult(name, worst, "; ".join(details), hint))
        if (name, worst) == ("permissions", "fail"):
            is_trusted = False
    return results


# ============================================================================
# 13  Operations
#    What each operation does, in which order: ORDER lists its words, WORDS says
#    which steps a word stands for.  A plan is made from settings and facts
#    alone: only its steps look at the disk, the clock or the network.
# ============================================================================

STAGE = "pre_stage unpack shared templates writable publish post_stage seal"
GO = "pre_activate check close_early backup up candidate slot close proxy activate"
AFTER = "down post_activate services probes post_deploy"

# operation: its words before the switch, after it, once the verdict is in and once the journal is
# gone; and what the history calls its success.
ORDER = {
    "stage": (STAGE, "", "", "", "staged"),
    "deploy": (STAGE + " " + GO, AFTER, "open? drain", "prune", "deployed"),
    "sync": (STAGE + " " + GO, AFTER, "open? drain", "prune", "synced"),
    "activate": ("verify " + GO, AFTER, "open? drain", "prune", "activated"),
    "rollback": ("verify health? pre_rollback check close_early backup up slot close proxy "
                 "activate", "down services probes post_rollback", "open? drain", "",
                 "rolled_back"),
    # From here to the end no journal is kept.
    # recover --to: a person has decided, so only a changed release stops it, until --force.
    "recover": ("verify slot? proxy activate services? probes? drain sweep?", "", "", "",
                "recovered"),
    "prune": ("prune", "", "", "", "pruned"), "adopt": ("adopt", "", "", "", "adopted"),
    "pin": ("pin", "", "", "", "pinned"), "unpin": ("unpin", "", "", "", "unpinned"),
    "hold": ("hold", "", "", "", "held"), "unhold": ("unhold", "", "", "", "unheld"),
    "flags": ("flags", "", "", "", "flagged")}
# There are two ways back.  Before the switch Executor.undo has each step undo its own change.
# After it the services run the new release, and undoing would not start the old: these words do.
# ?: its failure is only a warning.
WAY_BACK = "pre_rollback? proxy activate down services probes post_rollback? open? drain"

# These only write something down.
NOTING = ("pin", "unpin", "adopt", "hold", "unhold", "flags")

LEAST_DRAIN_SECONDS = 1.0  # the proxy has read live.conf by then
DRAIN_LOOK_SECONDS = 0.2
KEPT_BAD_RELEASES = 1
KEPT_DIFFERENCES = 200  # lines, in the history


# -- which release is meant --------------------------------------------------

def newest_first(records: Iterable[Any]) -> List[Record]:
    """Sort records by sequence, the newest first; None is left out."""
    return sorted(filter(None, records), key=attrgetter("sequence"), reverse=True)


def select_release(facts: Facts, text: str) -> Record:
    """Find a release by id, version, role, or the start of its id or digest.

    UsageError for none or several; StateError for none while a record cannot be read.
    """
    releases = newest_first(map(facts.release, facts.records))
    live = facts.current.release
    named = live or "/" if text == "current" else text  # no id begins with a slash
    matches = [record for record in releases if record.id == named] or \
        [record for record in releases if record.version == named] or \
        [record for record in releases if record.id.startswith(named)
         or len(named) >= 4 and record.sha256.startswith(named.lower())]
    if text == "latest":
        matches = releases[:1]
    elif text == "previous":
        matches = newest_first([rollback_target(facts, live)])
    if len(matches) == 1:
        return matches[0]
    names = ", ".join(record.id for record in (matches or releases)[:10])
    if matches:
        raise UsageError(f"{text!r} may be any of {len(matches)} releases: {names}",
                         "give more of the id")
    kind = StateError if facts.state_problems else UsageError
    raise kind("; ".join([f"there is no release {text!r}", *facts.state_problems]),
               f"the releases are {names}" if names else unrecorded(facts))


def unrecorded(facts: Facts) -> str:
    """Say what to adopt or deploy if no release has a record."""
    names = ", ".join(sorted(facts.on_disk.difference(facts.records))[-9:])
    adopt = facts.command_line("adopt RELEASE")
    return f"{adopt}: {names}" if names else "nothing is left to adopt: deploy an artifact"


def lost_current(facts: Facts) -> Optional[StateError]:
    """Return the error for a missing `current` if a record says what should be live.

    `recover --to` keeps that record's `previous`, `activate` would not.
    """
    live = facts.current.release
    for record in facts.records.values():
        if live is None and record.state == STATE_ACTIVE and record.id in facts.on_disk:
            return StateError(f"{record.id} should be live, but current is missing",
                              facts.command_line(f"recover --to {record.id}"))
    return None


def rollback_target(facts: Facts, live: OptionalText, *, certain: bool = False
                    ) -> Optional[Record]:
    """Choose where a rollback goes: the last good release that was live before this one.

    `certain`: StateError where a record on the way cannot be read.
    """
    # Along `previous` until one comes twice; then what is older.
    names: List[Any] = [live]
    while names[-1] in facts.records and names.count(names[-1]) == 1:
        names.append(facts.records[names[-1]].previous)
    if live in facts.records:
        names += [record.id for record in newest_first(facts.records.values())
                  if record.sequence < facts.records[live].sequence]
    for name in names[1:]:
        record = facts.release(name)
        if record and name != live and not record.rolled_back_at \
                and record.state in (STATE_ACTIVE, STATE_RETIRED):
            return record
        if certain and name in facts.on_disk and not record and facts.state_problems:
            raise StateError(
                f"the previous release {name} cannot be judged: {'; '.join(facts.state_problems)}",
                f"name the release to go back to: {facts.command_line('rollback RELEASE')}")
    return None


def is_under_way(journal: Optional[Journal], live: OptionalText) -> bool:
    """Say whether a deployment has switched and has no verdict; `rollback` would be it."""
    return journal is not None and live == journal.to_release and \
        journal.operation in ("deploy", "sync", "activate") and journal.phase != PHASE_ROLLING_BACK


# -- the planner -------------------------------------------------------------

def plan_operation(facts: Facts) -> Plan:
    """Plan the operation, without steps if it is done already; or raise a refusal."""
    request, live, artifact = facts.request, facts.current.release, facts.artifact
    operation, release, is_done = request.command, live or "", False
    if operation in ("deploy", "stage", "sync"):
        release = release_id(facts, artifact)
        is_done = bool(artifact.release) and (operation == "stage" or release == live)
        if is_done and operation != "stage" and facts.records[release].failure:
            raise ArtifactRefused(*bad_refusal(facts.records[release]))
    elif operation == "adopt":
        release = release if request.release == "current" else request.release
        if release not in facts.on_disk:
            raise UsageError(f"there is no release directory {request.release!r} in "
                             f"{facts.root}/releases", unrecorded(facts))
        is_done = release in facts.records
    elif operation == "unhold":
        is_done = not facts.hold
    elif operation not in ("hold", "prune", "flags"):
        target = choose_target(facts)
        release = target.id
        is_done = release == live and operation != "recover"
        if operation in ("pin", "unpin"):
            is_done = target.pinned == (operation == "pin")
        elif operation != "recover" and not (is_done or request.force):
            if target.state == STATE_BAD:
                raise ArtifactRefused(*bad_refusal(target))
            if operation == "activate" and facts.settings.signature.verify == "required" \
                    and not target.artifact.get("signature"):
                raise ArtifactRefused(f"{release} was staged without a signature", "deploy its "
                                      "artifact, once it is signed, or insist with --force")
        if operation == "rollback" and target.state == STATE_STAGED and not is_done:
            raise UsageError(f"{release} was never live: there is no way back to it",
                             f"make it live: {facts.command_line(f'activate {release}')}")
    plan = Plan(operation, live, release)
    if is_done:
        return plan
    for name in facts.settings.migrate.down and migrations_left(facts, plan) or ():
        if name not in facts.on_disk:
            raise PreflightFailed(f"{name} migrated the data and is gone: only it could undo that",
                                  "leave the data as they are: --set migrate.on_rollback=keep")
    return make_plan(facts, plan)


def choose_target(facts: Facts) -> Record:
    """Return the named release, else a rollback's target; raises where there is none."""
    request, live, lost = facts.request, facts.current.release, lost_current(facts)
    named = request.to or request.release
    if request.to and facts.current.problem and not facts.current.missing:
        raise StateError(facts.current.problem, facts.current.hint)
    if named:
        return select_release(facts, named)
    if lost:
        raise lost
    target = rollback_target(facts, live, certain=True)
    if is_under_way(facts.journal, live):
        target = facts.release(facts.journal.from_release) or target
    if target is None:
        names = ", ".join(sorted(facts.on_disk - {live}))
        is_known = facts.on_disk <= {*facts.records}
        raise PreflightFailed("there is no previous good release to roll back to",
                              f"{facts.command_line('activate RELEASE')}: {names}"
                              if names and is_known else unrecorded(facts))
    return target


def make_plan(facts: Facts, plan: Plan) -> Plan:
    """Expand the words of an operation, and those of its way back."""
    before, after, closing, last, _ = ORDER[plan.operation]
    back = Plan(plan.operation, plan.to_release, plan.from_release, back=True)
    return plan._replace(
        steps=expand(before, PHASE_INTENT if after else "", facts, plan)
        + expand(after, PHASE_SWITCHED, facts, plan),
        last=expand(closing, PHASE_SWITCHED, facts, plan) + expand(last, "", facts, plan),
        way_back=expand(WAY_BACK if after else "", PHASE_ROLLING_BACK, facts, back))


def expand(words: str, phase: str, facts: Facts, plan: Plan) -> Steps:
    """Make the steps of some words of the table; none for a word that is not configured."""
    steps: Steps = []
    for word in words.split():
        name = word.rstrip("?")
        own_phase = PHASE_STAGING if name in STAGE.split() else phase
        if own_phase == PHASE_STAGING and facts.artifact and facts.artifact.release:
            continue  # it is staged already
        needed, make, *actions = WORDS[name]
        values = [attrgetter(option)(facts.settings) for option in needed.split()]
        if needed and not any(value and value != "never" for value in values):
            continue
        made: Any = make(name, facts, plan) if callable(make) else \
            make.format(release=plan.to_release)
        for step in [Step(name, made, *actions)] if actions else made:
            steps.append(step._replace(
                phase=own_phase, plan=plan, optional=step.optional or word != name,
                noted=step.noted if own_phase in (PHASE_INTENT, PHASE_SWITCHED) else ""))
    return steps


def release_id(facts: Facts, artifact: Any) -> str:
    """Name an artifact's release: where it is staged, else by time and version, made unique."""
    base = time.strftime("%Y%m%dT%H%M%SZ-", time.gmtime(facts.now_seconds)) + artifact.version
    name, number = base, 2
    while name in facts.records or name in facts.on_disk:
        name, number = f"{base}.{number}", number + 1
    return artifact.release or name


def step_context(run: Run, step: Step) -> Context:
    """Describe a step's release; on the way back, the one that failed as well."""
    plan = step.plan
    return context_for(run.facts, plan.to_release, plan.from_release or "",
                       plan.from_release or "" if plan.back else "")


# -- steps: from the artifact to a sealed release ----------------------------

def do_hook(run: Run, step: Step) -> None:
    """Run one hook's commands in order, up to the first that fails."""
    name, hooks = step.name.partition(":")[2], run.settings.hooks
    for argv in getattr(hooks, name):
        perform_command(run, step_context(run, step), f"hook {name}", argv, hooks.timeout)


def do_unpack(run: Run, step: Step) -> str:
    """Unpack the artifact; ArtifactRefused for what is wrong with it."""
    live, sharing, sharer = run.facts.current.release, run.settings.deploy.share_unchanged, None
    with ExitStack() as stack:
        progress = stack.enter_context(run.console.progress("unpack", run.artifact.size_bytes))
        run.staging = run.store.new_staging()
        tree = run.store.directory(f"releases/{run.staging}")
        # Whoever may write to its files would write to the live one's through hard links.
        is_written = run.settings.hooks.post_stage or run.settings.deploy.writable
        if live and sharing != "no" and not (sharing == "hardlink" and is_written):
            live_tree = stack.enter_context(run.store.directory("releases").child(live))
            sharer = Sharer(live_tree, sharing)
            stack.callback(sharer.close)
        run.manifest, notes = unpack(run.artifact, tree, run.settings, progress, sharer)
    if run.artifact.copy:
        ask_signature_command(run, run.artifact)
        if run.artifact.distrust:
            raise run.artifact.distrust
    for note in notes:
        run.console.warn(note)
    counts = count_members(run.manifest)
    detail = f"{count(counts['files'], 'file')}, {format_size(counts['bytes'])}"
    if sharer and sharer.shared_files:
        detail += f", {sharer.shared_files:,} shared with {live}"
    if run.artifact.signature:
        detail += f", signed by {run.artifact.signature['signer']}"
    return detail


def open_made(run: Run, path: str) -> Directory:
    """Open a directory of the staged tree; what is missing is made and put into the manifest.

    A symlink of the artifact on the way is refused: it could lead outside.
    """
    place = ""
    for name in filter(None, path.split("/")):
        place = f"{place}/{name}".lstrip("/")
        member = run.manifest.get(os.fsencode(place))
        if member is None:
            add_member(run.manifest, Member(os.fsencode(place), DIRECTORY, _MODE_DIRECTORY))
        elif member.kind != DIRECTORY:
            raise StepFailed(f"{place} is not a directory in the artifact",
                             f"choose another place than {path}/")
    return run.store.directory(f"releases/{run.staging}").child(path, make=bool(path))


def put_member(run: Run, member: Member, data: bytes = b"") -> None:
    """Put a link or file into the staged release, in place of what the artifact has there."""
    parent, _, name = os.fsdecode(member.name).rpartition("/")
    with open_made(run, parent) as directory:
        directory.remove_tree(name)
        if member.kind == SYMLINK:
            os.symlink(member.content, name, dir_fd=directory.descriptor)
        else:
            directory.write(name, data, member.mode)
    add_member(run.manifest, member)


def do_shared(run: Run, step: Step) -> None:
    """Make missing shared directories, and a relative link to each shared path."""
    deploy = run.settings.deploy
    for path in deploy.shared_dirs + deploy.shared_files:
        if path in deploy.shared_dirs:
            run.store.top.child(f"shared/{path}", make=True, group=run.store.group).close()
        target = "../" * (2 + path.count("/")) + "shared/" + path
        put_member(run, Member(os.fsencode(path), SYMLINK, 0o777, content=os.fsencode(target)))


def do_templates(run: Run, step: Step) -> None:
    """Render the templates; StepFailed names every placeholder without a value."""
    values = {name: environment(name) for name in environment_names()}
    values.update(step_context(run, step).variables())
    values = {**{name: portable(value) for name, value in values.items()}, **run.settings.vars}
    mask = run.console.secrets.mask
    for template in run.settings.template.values():
        parent, _, name = template.source.rpartition("/")
        section = f"template:{template.name}"
        with open_made(run, parent) as directory:
            try:
                data = read_file(name, MAX_STATE_BYTES, os.O_NOFOLLOW, directory.descriptor)
            except FileNotFoundError:
                raise StepFailed(f"template {template.source} is not in the artifact",
                                 f"correct [{section}] source")
        source = data.decode(errors="surrogateescape")
        rendered = render_template(source, values, template.source).encode(errors="surrogateescape")
        mode = template.mode
        for escaped, key in re.findall(PLACEHOLDER, source):
            # A URL's query is always masked, and need not be secret.
            is_masked = MASK in mask(values.get(key, "")).replace("?" + MASK, "")
            if not escaped and (SECRET_NAME.search(key.lower()) or is_masked) \
                    and run.settings.origin(section, "mode") == "default":
                mode = 0o640  # not for every user of the host
        target = Member(os.fsencode(template.target), FILE, mode, len(rendered), None,
                        hashlib.sha256(rendered).digest())
        if run.manifest.get(target.name, target).kind == DIRECTORY:
            raise StepFailed(f"{template.target} is a directory in the artifact",
                             f"correct [{section}] target")
        put_member(run, target, rendered)


def do_writable(run: Run, step: Step) -> None:
    """Give [deploy] writable, with all that is in it, to the application's user."""
    uid = account("user", run.settings.deploy.app_user, "[deploy] app_user").pw_uid
    for path in run.settings.deploy.writable:
        with open_made(run, path) as directory:
            # Nobody else reaches the tree yet; even so, no link is followed.
            for _, descriptor, _ in walk_tree(directory.descriptor):
                if descriptor >= 0:
                    os.fchown(descriptor, uid, -1)
            os.fchown(directory.descriptor, uid, -1)


def do_publish(run: Run, step: Step) -> None:
    """Make the staged tree durable, then rename it to the release's id."""
    tree = run.store.directory(f"releases/{run.staging}")
    # Last, and the deepest first: their modes may forbid to write or to enter.
    for name in reversed(names_of(run.manifest, DIRECTORY)):
        if run.manifest[name].mode != _MODE_DIRECTORY:
            os.chmod(name, run.manifest[name].mode, dir_fd=tree.descriptor)
    if run.store.group >= 0:
        open_to_group(run)
    # Before the rename: what stands under a release's id must survive a power cut.
    if run.settings.deploy.durable:
        sync_filesystem(tree.descriptor)
    run.store.publish(run.staging, step.plan.to_release)


def undo_publish(run: Run, step: Step) -> None:
    """Remove the release; where the staged tree was not renamed, that id is somebody else's."""
    if not run.staging or not run.store.is_release(run.staging):
        run.store.remove_release(step.plan.to_release)


def open_to_group(run: Run) -> None:
    """Let the group write to a release's directories, so that any member can prune it."""
    for name in names_of(run.manifest, DIRECTORY):
        with run.store.directory(f"releases/{run.staging}").child(os.fsdecode(name)) as directory:
            with suppress(PermissionError):  # a hook made it as another user
                give_to_group(directory.descriptor, run.store.group)
            mode = stat.S_IMODE(os.fstat(directory.descriptor).st_mode) & ~stat.S_ISGID
        run.manifest[name] = run.manifest[name]._replace(mode=mode)


def scan_release(run: Run, release: str, whose: str, fix: str) -> Manifest:
    """Hash the tree of a release; StepFailed for what no release can hold."""
    try:
        with run.console.progress("hash") as progress, \
                run.store.directory("releases").child(release) as directory:
            return scan_tree(directory, progress,
                             mutable_pattern(run.settings.deploy, bytecode=False))
    except ArtifactRefused as error:
        raise StepFailed(f"{whose} what no release can hold: {error.message.partition(': ')[2]}",
                         f"{fix}, or name its place in [deploy] mutable")


def keep_record(run: Run, release: str, **fields: Any) -> None:
    """Write manifest, then record, of a complete release: from now on it is known."""
    tree = dict(
        count_members(run.manifest),
        tree_sha256=run.store.write(f"{TREES}/{release}", tree_lines(run.manifest)),
        manifest_sha256=run.store.write(f"{MANIFESTS}/{release}", digest_lines(run.manifest)))
    record = Record(**dict(
        dict.fromkeys(Record._fields), id=release, pinned=False, migrated=False, by=run.by,
        rollback={"release": None, "command": None}, note=run.note or None, tree=tree, **fields))
    run.store.save(record)
    run.facts.records[release] = record


def change_record(run: Run, release: str, **fields: Any) -> None:
    """Change fields of a release's record, on disk and in the facts."""
    record = run.facts.records[release]._replace(**fields)
    run.store.save(record)
    run.facts.records[release] = record


def do_seal(run: Run, step: Step) -> None:
    """Write manifest and record of what was unpacked, with post_stage's changes."""
    release, source, shown = step.plan.to_release, run.facts.artifact, run.outcome.extra["artifact"]
    created_at = format_time()
    if run.settings.hooks.post_stage:
        run.manifest = scan_release(run, release, "post_stage left", "correct [hooks] post_stage")
        if run.store.group >= 0:
            open_to_group(run)
        if run.settings.deploy.durable:
            sync_filesystem(run.store.directory("releases").descriptor)
    shown["signature"] = source.signature  # known by now
    # Digests are not masked: a secret such as 1234 may well occur in one.
    artifact = dict(shown, sha256_source=run.console.secrets.mask(source.sha256_source),
                    strip_components=run.settings.artifact.strip_components,
                    identity=None if source.format == "directory" else source.identity)
    keep_record(run, release, version=source.version, state=STATE_STAGED, artifact=artifact,
                created_at=created_at,
                sequence=1 + max([0, *map(attrgetter("sequence"), run.facts.records.values())]),
                application=run.settings.deploy.application or None,
                built_at=source.built_at or (source.signature or {}).get("at"))
    run.facts.on_disk.add(release)


# -- steps: to what is live --------------------------------------------------

def not_brought(release: str, names: Sequence[str]) -> str:
    """Name the first files of a release that did not come from its artifact."""
    some = ", ".join(map(portable, names[:3]))
    return f"{release} holds {count(len(names), 'file')} that the artifact did not bring: {some}"


def do_verify(run: Run, step: Step) -> str:
    """Hash a release against its manifest before it goes live."""
    release = step.plan.to_release
    differences = check_release(run, run.facts.records[release])
    problem = problems_of(differences)
    run.output = name_differences(run, differences)[:KEPT_DIFFERENCES]
    programs = [(f"[{section}] {key}", argv[0])
                for section, key, argv, _, in_release in commands(run.settings) if in_release]
    refuse_foreign_programs(run.settings, programs, f"{run.store.path}/releases/{release}")
    if problem and not run.flags.force:
        raise StepFailed(
            f"{release} is not what was staged: {problem}",
            f"see all of it: {run.settings.command_line(f'verify {release}')}; then "
            f"{run.store.make_whole(run.facts.records[release])}, or insist: --force; "
            "what the service may write belongs into [deploy] mutable")
    if problem:
        run.console.warn(f"{release} is not what was staged: {problem}")
    if differences["added"]:
        run.console.warn(not_brought(release, [*differences["added"]]))
    return f"taken all the same: {problem}" if problem else "unchanged since it was staged"


def do_candidate(run: Run, step: Step) -> str:
    """Probe the release on a port that no visitor knows; ReleaseFailed by its own fault."""
    with hold_port("0.0.0.0", run.settings.candidate.port) as held:
        port = str(held.getsockname()[1])
    context = step_context(run, step)._replace(candidate_port=port)
    candidate = fill_in(run.settings.candidate, {CANDIDATE_PORT: port})
    probes = [probe for probe in run.settings.probe.values() if probe.when == "candidate"] or [
        adhoc_probe("tcp", f"localhost:{port}", [
            "deadline=480h", "successes=1", "period=100ms", "backoff=1"])]  # 480h: cut below
    with run.console.progress(step.name) as progress, start_command(
            run, context, step.name, candidate.command, start=Guard, port=int(port),
            timeout_seconds=candidate.timeout) as guard:
        for probe in probes:
            probe = fill_in(probe, {CANDIDATE_PORT: port})
            probe.deadline = min(probe.deadline, guard.ends_seconds - time.monotonic())
            last = run_probe(run, probe, context, expect_release=True, progress=progress,
                             guard=guard)
            if not last.ok and last.required:
                break
            if not last.ok:
                run.console.warn(last.complaint())
    is_started, why, run.output = guard.ended
    for line in run.output:
        run.console.output(line)
    if not why and (last.ok or not last.required):
        return last.detail
    why = f"the candidate {why}" if why else last.complaint()
    raise (ReleaseFailed if is_started else StepFailed)(
        ": ".join([why, *run.output[-1:]]), "see what it wrote; then correct the release, "
        "or what [candidate] and its probes say", dict(last.evidence, output=run.output))


def migrations_left(facts: Facts, plan: Plan) -> Optional[List[str]]:
    """Name the releases whose migrations a person undoes by going back, newest first.

    None for a move forward: to a release that was never live, or that is newer.
    """
    target, live = (facts.records.get(name or "") for name in (plan.to_release, plan.from_release))
    if not target or not live or not target.activated_at or target.sequence > live.sequence:
        return None
    if facts.settings.migrate.on_rollback == "keep" or not facts.settings.migrate.down:
        return []
    return [record.id for record in newest_first(facts.records.values())
            if record.migrated and target.sequence < record.sequence <= live.sequence]


def make_migrate(word: str, facts: Facts, plan: Plan) -> Steps:
    """Have the new release migrate the data; going back, have each release undo its migration.

    `down` runs where a person goes back, for each release that migrated since; and where `up` had
    begun: on the way back, or before the switch as the undo of the other commands.
    """
    forward = Plan(plan.operation, plan.to_release, plan.from_release) if plan.back else plan
    to_undo = migrations_left(facts, forward)
    is_by_hand = word == "down" and not plan.back
    releases = [forward.to_release] if to_undo is None else []
    if is_by_hand:
        releases = to_undo or []
    text = " ".join(getattr(facts.settings.migrate, word))
    return [Step(f"migrate:{word}", f"run {text} in {release}", do_migrate, undo_migrate,
                 optional=is_by_hand, what=release) for release in releases]


def do_migrate(run: Run, step: Step) -> Any:
    """Run a command of [migrate] in a release, where it is needed; a `down` that fails is noted."""
    settings, state, release = run.settings.migrate, run.journal.migration, step.what
    word = step.name.partition(":")[2]
    argv = getattr(settings, word)
    nothing_to_migrate = state.get("idle")  # said `check`
    nothing_to_undo = step.plan.back and not (state.get("up") and argv)
    if nothing_to_migrate or nothing_to_undo or run.down_failed:
        return False

    def begun(group: int) -> None:
        # In the child and here, see run_command: a recovery ends the group and undoes its work.
        state.update({word: True, "group": group, "deploy_id": run.deploy_id})
        run.store.save(run.journal)

    try:
        previous = run.facts.records[release].previous if word == "down" else None
        result = perform_command(run, context_for(run.facts, release, previous),
                                 f"migrate {word}", argv, settings.timeout,
                                 most=int(word == "check"), begun=begun)
        if word in ("up", "down"):
            change_record(run, release, migrated=word == "up")
    except FAILURES as error:
        if word != "down":
            raise
        saved = state.get("backup") or spell(settings.backup) or "there is none"
        run.down_failed = f"{reason(error)}; the backup: {saved}"
        raise RollbackFailed(run.down_failed, "correct the data, or put the backup back, then: "
                             + run.settings.command_line("recover"))
    detail = "".join(result.tail[-1:]) or f"its command {result.verdict()}"
    state.update({word: detail, "up": word == "up", "idle": word == "check" and result.ok})
    return detail


def undo_migrate(run: Run, step: Step) -> None:
    """Run `down` as on the way back, if `up` had begun; shown as a step, though in no plan."""
    begun_at, run.output = time.time(), []
    step = step._replace(name="migrate:down", plan=step.plan._replace(back=True))
    detail = do_migrate(run, step)
    if detail:
        run.console.say(f"{step.name:<20} {detail}", status="done")
        run.outcome.steps.append(StepResult(step.name, "done", time.time() - begun_at, detail,
                                            run.output, begun_at))


def make_close(word: str, facts: Facts, plan: Plan) -> Steps:
    """Put the maintenance flag up: before `backup`, or before the switch and a person's `down`."""
    maintenance = facts.settings.maintenance
    to_undo = migrations_left(facts, plan)
    is_early = maintenance.during == "migrate" and to_undo is None
    is_wanted = is_early if word == "close_early" else maintenance.during == "switch" or to_undo
    return [Step("maintenance:on", f"put {maintenance.flag} up until the verdict is in",
                 put_flag_up, what=is_early)] if is_wanted else []


def put_flag_up(run: Run, step: Step) -> bool:
    """Put the flag up as this run's, unless it is a person's or `check` wants no migration."""
    flag = run.store.maintenance()
    is_idle = step.what and run.journal.migration.get("idle")
    needed = not (is_idle or flag and "deploy_id" not in flag)
    if needed:
        whose = {"deploy_id": run.deploy_id, "since": format_time()}
        run.store.write(run.store.flag, json.dumps(whose).encode("ascii"), 0o644)
    return needed


def take_flag_down(run: Run, step: Step) -> bool:
    """Take the flag down, unless it is a person's by now."""
    needed = "deploy_id" in run.store.maintenance()
    if needed:
        run.store.forget(run.store.flag)
    return needed


def make_activate(word: str, facts: Facts, plan: Plan) -> Steps:
    """Point `current` at a release in one atomic rename, or remove it."""
    target = plan.to_release
    source = plan.from_release or facts.current.missing
    if target == source:
        return []
    text = f"point current at {target}" + (f" (was {source})" if source else "")
    if not target:
        word, text = "deactivate", "remove current: nothing was live before"
    return [Step(word, text, do_activate, undo_activate, noted=PHASE_SWITCHED, what=source)]


def do_activate(run: Run, step: Step) -> None:
    """Switch, and warn of what the old release holds beside its artifact."""
    source, target = step.what, step.plan.to_release
    # A link back is made first: after the switch, a full disk may have no room for one.
    keep = not step.plan.back and step.plan.operation != "recover"
    leaving = run.facts.release(source) if keep else None
    written = strangers(run, leaving) if leaving else []  # now: later, services would wait for it
    run.store.switch(source, target, keep=keep)
    if written:
        run.console.warn(f"{not_brought(source, written)}; {target} has none of that: name its "
                         "place in shared_dirs or mutable")


def undo_activate(run: Run, step: Step) -> None:
    """Switch back where the switch was done and only its confirmation failed."""
    if run.store.current().release == step.plan.to_release:
        run.store.switch(step.plan.to_release, step.what)


# -- steps: with two slots ---------------------------------------------------

def target_slot(facts: Facts, plan: Plan) -> str:
    """Name the release's slot, else the idle one; on the way back none where it had none."""
    idle = next(name for name in facts.settings.slots if name != facts.live_slot)
    return facts.slots.get(plan.to_release or "", "" if plan.back else idle)


def make_slot(word: str, facts: Facts, plan: Plan) -> Steps:
    """Start the release in the idle slot and probe it there."""
    slot = facts.settings.slots[target_slot(facts, plan)]
    before = [earlier for earlier, name in facts.slots.items() if name == slot.name]
    text = f"start {slot.unit}, port {slot.port}, for {plan.to_release}"
    return [Step(f"slot:{slot.name}", text, start_slot, stop_slot, what=(slot, before)),
            *make_probes(word, facts, plan)]


def start_slot(run: Run, step: Step) -> str:
    """Note the slot in the release's record, then link it, then start its unit."""
    release, slot, slots = step.plan.to_release, step.what[0], run.facts.slots
    unit = UnitService(run, slot)
    if release in slots and not unit.down():
        return f"{slot.unit} runs it already"
    change_record(run, release, slot=slot.name)
    slots[release] = slot.name
    run.store.put_in_slot(slot.name, release)
    detail = unit.act(step_context(run, step))
    unit.at_boot("enable", "disabled")
    return detail


def stop_slot(run: Run, step: Step) -> None:
    """Stop the slot's unit, and link what was linked there before."""
    slot, before = step.what
    if step.plan.to_release in run.facts.slots:  # without a link nothing was started
        UnitService(run, slot).stop()
        run.store.forget(f"slots/{slot.name}")
        for earlier in before:
            run.store.put_in_slot(slot.name, earlier)


def do_proxy(run: Run, step: Step) -> None:
    """Have the proxy lead to the release's slot, or to the slot that an undo names."""
    facts, slots = run.facts, run.settings.slots
    target = target_slot(facts, step.plan) if step.what is None else step.what
    conf = slots[target].include if target else ""
    if target == facts.live_slot:
        conf = facts.live_conf
    if conf:
        run.store.write("slots/live.conf", conf.encode("utf-8", "surrogateescape"), 0o644)
    else:
        run.store.forget("slots/live.conf")
    context = step_context(run, step)._replace(directory=run.root, slot=slots.get(target))
    perform_command(run, context, "hook reload", next(iter(slots.values())).reload,
                    run.settings.hooks.timeout)


def undo_proxy(run: Run, step: Step) -> None:
    """Have the proxy lead where it led before; RollbackFailed where that fails too."""
    before = run.facts.live_slot
    # In a recovery: that run had not yet written live.conf, so there is nothing to undo.
    if run.journal.recoveries and (run.journal.phase == PHASE_STAGING or not before):
        return
    try:
        do_proxy(run, step._replace(what=before))
    except FAILURES as error:
        raise RollbackFailed(f"and once more: {reason(error)}",
                             run.settings.command_line("recover"))


def make_drain(word: str, facts: Facts, plan: Plan) -> Steps:
    """Stop the old slot once it has no connections, its time is up or a signal comes."""
    target = target_slot(facts, plan)
    # A slot without a link never ran, unless this run started it.
    return [Step(f"drain:{slot.name}", f"stop {slot.unit} once nothing is asked of it any more, "
                 f"after {format_seconds(slot.drain)} at the latest", do_drain, optional=True,
                 what=slot)
            for name, slot in facts.settings.slots.items()
            if name != target and (plan.back or name in facts.slots.values())][:1]


def do_drain(run: Run, step: Step) -> None:
    """Wait until two looks in a row find no connection, then stop the slot."""
    slot, interrupts, was_closed = step.what, run.interrupts, run.interrupts.is_closed
    ends_seconds = time.monotonic() + slot.drain
    quiet = 0
    interrupts.is_closed = False
    try:
        with suppress(Interrupted), run.console.progress(step.name) as progress:
            interrupts.wait(min(LEAST_DRAIN_SECONDS, slot.drain))
            while quiet < 2 and time.monotonic() < ends_seconds:
                with suppress(OSError):  # without /proc it waits to the end
                    connections = sockets(slot.port, "01")
                    quiet = 0 if connections else quiet + 1
                    progress(0)
                interrupts.wait(DRAIN_LOOK_SECONDS)
    finally:
        interrupts.is_closed = was_closed
    UnitService(run, slot).stop()


# -- steps: to a verdict -----------------------------------------------------

def make_probes(word: str, facts: Facts, plan: Plan) -> Steps:
    """Ask whether the release is healthy and which it is: in its slot, or where visitors ask."""
    return [Step(f"probe:{name}",
                 f"probe {name}" + ("" if probe.required else " (a failure is only a warning)"),
                 do_probe, what=probe, optional=not probe.required)
            for name, probe in sorted(facts.settings.probe.items())
            if plan.to_release and probe.when in ("after", "both") and (
                probe.of_slot == (word == "slot")
                or plan.back and plan.to_release in facts.slots)]


def do_probe(run: Run, step: Step) -> str:
    """Run a probe until its verdict is in."""
    with run.console.progress(step.name) as progress:
        probed = run_probe(run, step.what, step_context(run, step), expect_release=True,
                           progress=progress, restarted=True)
    if not probed.ok:
        raise StepFailed(probed.complaint(), probed.hint(), probed.evidence)
    return probed.detail


def do_health(run: Run, step: Step) -> str:
    """Ask once how the live release is doing: nothing leads back to a broken one."""
    context = context_for(run.facts, step.plan.from_release)
    failed = [make_service(run, name).down() for name, service in run.settings.service.items()
              if (service.unit or service.pidfile) and service.action != "none"]
    for probe in run.settings.probe.values():
        if probe.when in ("after", "both") and (run.facts.live_slot or not probe.of_slot):
            probed = run_probe(run, probe, context, expect_release=True, once=True)
            failed.append("" if probed.ok else probed.detail)
    why = "; ".join(filter(None, failed)) or not failed and "nothing could be asked"
    run.left_is_healthy = not why
    return f"not healthy, no way back to it: {why}" if why else "healthy"


# -- steps: what is kept, and notes ------------------------------------------

def make_prune(word: str, facts: Facts, plan: Plan) -> Steps:
    """Delete what retention does not keep: good releases beyond keep_releases, bad beyond one.

    What will be live, what a rollback would then go to, what is pinned, in a slot or in use, and
    what has no record stay.  A release about to be made counts as kept.
    """
    live, previous = plan.to_release or None, plan.from_release
    if live == previous:
        target = rollback_target(facts, live)
        previous = target and target.id
    # What is in use gets no step, or every deployment would warn of it.
    keep = {live, previous, *facts.in_use, *facts.slots}
    if facts.current.release is None:  # only its record tells what should be live
        for record in facts.records.values():
            if record.state == STATE_ACTIVE:
                keep |= {record.id, record.previous}
    releases = newest_first(map(facts.release, facts.records))
    good = [record for record in releases
            if record.state in (STATE_ACTIVE, STATE_RETIRED) or record.id == live]
    bad = [record for record in releases if record.state == STATE_BAD and record.id != live]
    arriving = live is not None and live not in facts.records
    kept = max(1, facts.settings.deploy.keep_releases) - arriving
    return [Step(f"prune:{record.id}",
                 f"delete {record.id} ({record.state}, sequence {record.sequence})",
                 do_prune, optional=True, what=record)
            for record in good[kept:] + bad[KEPT_BAD_RELEASES:]
            if record.id not in keep and not record.pinned]


def refuse_to_prune(run: Run, record: Record) -> None:
    """StepFailed for a release in use since the plan was made, or that holds files of its own."""
    in_use = releases_in_use(run.settings, run.store.path)
    if record.id in in_use:
        raise StepFailed(f"{record.id} is in use by {in_use[record.id]}", "prune once it has ended")
    written = [] if run.flags.force else strangers(run, record)
    if written:
        raise StepFailed(
            f"{not_brought(record.id, written)}; it is kept: save them, then prune --force",
            "what the application writes belongs into shared_dirs, or into mutable")


def do_prune(run: Run, step: Step) -> str:
    """Delete a release, files first; the record of a refused or migrated one is kept."""
    record = step.what
    refuse_to_prune(run, record)
    run.store.remove_release(record.id)
    if record.migrated or refused_record(run.facts, record.sha256) == record:
        run.store.save(record._replace(pruned_at=format_time()))
    else:
        run.store.forget(f"{RECORDS}/{record.id}.json")
    return f"{format_size(int(record.tree.get('bytes') or 0))} freed"


def do_adopt(run: Run, step: Step) -> str:
    """Hash and record a release that another tool left; its files are not changed."""
    release, records = step.plan.to_release, run.facts.records
    path = f"{run.store.path}/releases/{release}"
    # The time in its name, else its directory's, gives its place in the order.
    match = re.match(r"(\d{4})-?(\d\d)-?(\d\d)[T_-]?(\d\d)-?(\d\d)-?(\d\d)", release)
    made_at = "{}-{}-{}T{}:{}:{}Z".format(*match.groups()) if match else \
        format_time(os.lstat(path).st_mtime)
    run.manifest = scan_release(run, release, f"{release} holds", "remove it")
    sequence = 1 + max([0, *(record.sequence for record in records.values()
                             if record.created_at <= made_at)])
    for record in newest_first(records.values()):  # no two ever share a number
        if record.sequence >= sequence:
            change_record(run, record.id, sequence=record.sequence + 1)
    counts = count_members(run.manifest)
    digest = hash_pieces(digest_lines(run.manifest)).hex()
    keep_record(run, release, sequence=sequence, version=release, created_at=made_at,
                activated_at=made_at, state=STATE_ACTIVE
                if release == run.facts.current.release else STATE_RETIRED,
                artifact={"name": release, "source": path, "format": "directory",
                          "signature": None, "size": counts["bytes"], "sha256": digest,
                          "sha256_source": "adopted", "strip_components": 0})
    return f"{count(counts['files'], 'file')}, made at {made_at}"


def do_pin(run: Run, step: Step) -> None:
    """Protect a release from pruning, or end that."""
    change_record(run, step.plan.to_release, pinned=step.name == "pin")


def make_hold(word: str, facts: Facts, plan: Plan) -> Steps:
    """Write down that what is live is to stay, until when, who says so and why."""
    until, given = None, facts.request.until
    if not facts.note.strip():
        raise UsageError("hold needs a reason", "say it: deploy.py hold -m 'WHY'")
    if given:
        until = format_time(read_value("moment", given)(facts.now_seconds, 1))
        if until <= format_time(facts.now_seconds):
            raise UsageError(f"--until {given} is past", "name a time to come, or a duration: 12h")

    def do(run: Run, step: Step) -> None:
        hold = {"by": run.by, "note": run.note, "since": format_time(), "until": until}
        run.store.write(HOLD, json.dumps(hold).encode("ascii"))

    return [Step(word, f"hold what is live until {until or 'unhold'}", do)]


def make_flags(word: str, facts: Facts, plan: Plan) -> Steps:
    """Set feature flags: on, off, a percentage or a text; `NAME=` removes one."""
    flags = dict(facts.flags)
    values = {"on": True, "off": False}
    for text in map(portable, facts.request.assignments):
        # Other languages cannot read JSON that holds half a surrogate pair.
        match = re.match(r"([A-Za-z0-9_.-]{1,100})="
                         r"(?:(100|[0-9]{1,2})%|([^\ud800-\udfff]*(?<!%)))\Z", text)
        if not match:
            raise UsageError(f"{text!r} sets no flag", "write NAME=on, NAME=off, NAME=25%, "
                             "NAME=TEXT in UTF-8, or NAME= to remove it; letters, digits, . _ -")
        name, percent, value = match.groups()
        flags[name] = {"percent": int(percent)} if percent else values.get(value, value)
        if value == "":
            del flags[name]
    text = "set " + " ".join(facts.request.assignments)
    return [Step(word, text, do_flags, what=flags)] if flags != facts.flags else []


def do_flags(run: Run, step: Step) -> None:
    """Replace shared/flags.json in one rename: applications read it without a lock."""
    data = json.dumps(step.what, indent=2, sort_keys=True).encode("ascii") + b"\n"
    run.store.write(FLAGS_FILE, data, 0o644)
    run.facts = run.facts._replace(flags=step.what)


def show_flag(value: Any) -> str:
    """Show a feature flag as the command line sets it; as JSON what cannot be set there."""
    if isinstance(value, dict) and list(value) == ["percent"]:
        return f"{value['percent']}%"
    words = {"true": "on", "false": "off", "null": "none"}
    text = json.dumps(value)
    return value if isinstance(value, str) else words.get(text, text)


# word: what must be configured for it; then text, `do` and perhaps `undo` of its one step, or else
# a function that makes its steps.  The text may be a function, too; both get word, facts and plan.
WORDS: Dict[str, Tuple[Any, ...]] = {
    "unpack": ("", lambda word, facts, plan:
               f"verify and unpack {facts.artifact.name if facts.artifact else 'the artifact'}",
               do_unpack, lambda run, step:
               run.staging and run.store.directory("releases").remove_tree(run.staging)),
    "shared": ("deploy.shared_dirs deploy.shared_files", lambda word, facts, plan:
               "link from shared/: " + ", ".join(facts.settings.deploy.shared_dirs
                                                 + facts.settings.deploy.shared_files), do_shared),
    "templates": ("template", lambda word, facts, plan: "render " + ", ".join(
        f"{template.source} -> {template.target}"
        for template in facts.settings.template.values()), do_templates),
    "writable": ("deploy.writable", lambda word, facts, plan:
                 f"give {', '.join(facts.settings.deploy.writable)} to "
                 + facts.settings.deploy.app_user, do_writable),
    "publish": ("", lambda word, facts, plan: f"move to releases/{plan.to_release}" + (
        ", once it is synced to disk" if facts.settings.deploy.durable else ""),
                do_publish, undo_publish),
    "seal": ("", "write manifest and record", do_seal, lambda run, step:
             run.store.forget(f"{RECORDS}/{step.plan.to_release}.json")),
    "verify": ("", "verify {release} against its manifest", do_verify),
    # What has no verdict yet was never healthy, and need not be asked.
    "health": ("service probe", lambda word, facts, plan: [
        Step(word, f"ask once how {plan.from_release} is doing: only a healthy one is a way back",
             do_health)]
               if plan.from_release and not is_under_way(facts.journal, plan.from_release) else []),
    "candidate": ("candidate.command", lambda word, facts, plan:
                  f"start {' '.join(facts.settings.candidate.command)} on port "
                  f"{facts.settings.candidate.port or 'auto'}, probe it there, end it",
                  do_candidate),
    "close_early": ("maintenance.during", make_close),
    "close": ("maintenance.during", make_close),
    "open": ("maintenance.during", lambda word, facts, plan: [
        Step("maintenance:off", f"take {facts.settings.maintenance.flag} down", take_flag_down)]),
    "activate": ("", make_activate),
    "slot": ("slots", make_slot),
    # Optional on a way back to no slot: a proxy may not reload without the file.
    "proxy": ("slots", lambda word, facts, plan: [
        Step(word, f"have slots/live.conf lead to {target_slot(facts, plan) or 'no slot'}, reload",
             do_proxy, undo_proxy, optional=not target_slot(facts, plan))]),
    "drain": ("slots", make_drain),
    "services": ("service", lambda word, facts, plan: [
        Step(f"service:{service.name}", describe_service(service), lambda run, step:
             make_service(run, step.what).act(step_context(run, step)),
             seconds=service.timeout + service.settle, what=service.name)
        for service in map(facts.settings.service.get, services_in_order(facts.settings))
        if service.action != "none" and plan.to_release]),
    "probes": ("probe", make_probes),
    "prune": ("", make_prune),
    "pin": ("", "pin {release}", do_pin),
    "unpin": ("", "unpin {release}", do_pin),
    "adopt": ("", "hash releases/{release}, and keep a record of it", do_adopt),
    "hold": ("", make_hold),
    "unhold": ("", "let what is live be replaced again",
               lambda run, step: run.store.forget(HOLD)),
    "flags": ("", make_flags),
    "sweep": ("", "remove what a crash left", lambda run, step:
              ", ".join(run.store.sweep(run.console.warn)) or "nothing was left"),
    # A hook that ran after the switch is noted, so that no recovery runs it again.
    **{name: (f"hooks.{name}", lambda word, facts, plan: [Step(
        f"hook:{word}", f"run hook {word}: " + "; ".join(
            " ".join(argv) for argv in getattr(facts.settings.hooks, word)), do_hook,
        seconds=facts.settings.hooks.timeout * len(getattr(facts.settings.hooks, word)),
        noted=PHASE_SWITCHED if word.startswith("post_") else "")]) for name in HOOK_NAMES},
    **{name: (f"migrate.{name}", make_migrate) for name in MIGRATE_NAMES}}


# ============================================================================
# 14  Executor
#    Runs a plan: journals each phase before its first step, and ends every run
#    in one place.  Recovery uses the same table and functions.
# ============================================================================

class Executor:
    """Carries one plan through to a verdict.

    In the end one of these holds: the plan is done and recorded; everything before the switch is
    undone; `from_release` is live again and the failure recorded; the release stays live and a
    person decides; or RollbackFailed says what a person must do, and the journal stays.
    """

    def __init__(self, run: Run, plan: Plan, journal: Optional[Journal] = None) -> None:
        self.run, self.plan = run, plan
        self.done: Steps = []
        self.blameless = False  # the failure, if any, is not the release's fault
        self.started_seconds = time.monotonic()
        # Every recovery comes here, `recover --to` too: its run's migration must not go on.
        earlier = run.facts.journal
        if earlier and earlier.migration:
            end_group(earlier.migration["group"], earlier.migration["deploy_id"])
        # `recover --to` is the verdict on that run, under its id.
        judged = earlier if plan.operation == "recover" and earlier else run
        run.journal = journal or Journal(
            deploy_id=judged.deploy_id, operation=plan.operation, phase="", recoveries=0, done=[],
            from_release=plan.from_release, to_release=plan.to_release, migration={}, failure=None,
            plan=run.console.secrets.mask_json(plan.to_json()), by=run.by, chain=run.store.chain,
            started_at=format_time(run.facts.now_seconds))

    def execute(self) -> None:
        """Run the plan's steps to the verdict; raises if that is a failure."""
        run, plan = self.run, self.plan
        # Without a journal nothing is stopped half way.
        run.interrupts.is_closed = not any(step.phase for step in plan.steps)
        try:
            for step in plan.steps:
                self.take(step)
            live = run.store.current()
            run.interrupts.check()
            if run.journal.phase == PHASE_SWITCHED and live.release != plan.to_release:
                raise StepFailed(
                    f"{plan.to_release} is not live after all: "
                    f"{live.problem or live.release or 'current is gone'}",
                    "see which hook or other program changes `current`, then run again")
            self.blameless = True
            if run.down_failed:
                raise StepFailed(run.down_failed, "correct the data, or put the backup back")
            # The verdict is in: signals from here on change nothing.
            run.interrupts.is_closed = True
            self.end(ORDER[plan.operation][-1])
        except Exception as error:
            if isinstance(error, Interrupted):
                run.console.working(str(error), 0.0, "STOPPING=1")
            # That our own files cannot be written, or a module is missing, is not its fault.
            if isinstance(error, (OSError, ImportError, MemoryError)):
                self.blameless = True
            final = self.fail(step_error(error, self.done[-1].name if self.done else "the plan"))
            if final is error or not isinstance(error, FAILURES):
                raise  # also a defect of this program; all is undone by now
            raise final from error
        for step in plan.last:
            if not step.phase:
                self.take(step)
        if any(result.status == "done" for result in run.outcome.steps):
            run.outcome.changed = True

    def take(self, step: Step) -> None:
        """Journal the phase where it is new, do the step, and show how it went."""
        run, console = self.run, self.run.console
        if step.phase not in ("", run.journal.phase):
            self.enter(step.phase)
        run.interrupts.check()
        self.done.append(step)
        console.log_context["step"] = step.name
        console.working(step.text, step.seconds)
        run.output, status, detail = [], "failed", "internal error"
        started_at, started_seconds = time.time(), time.monotonic()
        try:
            answer = step.do(run, step)
            status, detail = "done", answer if isinstance(answer, str) else step.text
            if answer is False:
                status, detail = "skipped", "not needed"
        except FAILURES as error:
            detail = step_error(error, step.name).message
            if not step.optional or isinstance(error, Interrupted):
                raise
            console.warnings.append(f"{step.name}: {detail}")
        finally:
            seconds = time.monotonic() - started_seconds
            mask = console.secrets.mask_json
            run.outcome.steps.append(StepResult(step.name, status, round(seconds, 4), mask(detail),
                                                mask(run.output), started_at))
            console.say(f"{step.name:<20} {format_seconds(seconds):>7}  {detail}",
                        {"event": f"step_{status}".replace("skipped", "done"), "result": status},
                        status="warn" if status == "failed" and step.optional else status)
            console.log_context.pop("step", None)
        if step.noted:
            self.enter(step.noted)

    def enter(self, phase: str, error: Optional[DeployError] = None) -> None:
        """Journal the phase that begins, the steps so far and the failure, durably."""
        run, journal = self.run, self.run.journal
        run.journal = journal._replace(
            phase=phase, failure=self.failure(error) if error else journal.failure,
            done=list(dict.fromkeys(journal.done + [step.name for step in self.done])))
        try:
            run.store.save(run.journal)
        except FAILURES as problem:
            if not error:
                raise
            # Undoing and going back matter more than noting why.
            run.console.warn("the journal could not be written: "
                             + step_error(problem, "journal").message)

    def end(self, result: str, error: Optional[DeployError] = None, exit_code: int = EXIT_OK, *,
            keep_journal: bool = False) -> None:
        """Close the run: write records, then history; take the closing steps; remove the journal.

        Without a result the first two are written already.
        """
        run, plan, failure = self.run, self.plan, self.failure(error) if error else None
        if result:
            automatic = result == "rolled_back" and error is not None
            rejected = automatic or result == "rollback_failed" or isinstance(error, ReleaseFailed)
            for record in settled(self, result, failure, rejected=rejected):
                run.store.save(record)
                run.facts.records[record.id] = record
            note_ending(
                run, run.facts.records.get(plan.to_release) or run.facts.artifact, error,
                deploy_id=run.journal.deploy_id, operation=plan.operation, result=result,
                release=plan.to_release or None, previous=plan.from_release, exit_code=exit_code,
                seconds=round(time.monotonic() - self.started_seconds, 3), failure=failure,
                steps=[dict(step.to_json(), started_at=format_time(step.started_at))
                       for step in run.outcome.steps],
                automatic=automatic if result == "rolled_back" else None)
        if keep_journal:
            return
        for step in [] if error else plan.last:
            if step.phase:
                self.take(step)
        try:
            run.store.clear_journal()
        except OSError as problem:
            # The verdict is durable: from here on nothing may be undone.
            run.console.warn(f"the journal could not be removed: {reason(problem)}; "
                             "the next run does it")

    def failure(self, error: DeployError) -> Json:
        """Describe a failure for record, history and journal; the first one stands."""
        run = self.run
        failed = [step.name for step in run.outcome.steps if step.status == "failed"]
        return run.journal.failure or run.console.secrets.mask_json({
            "step": failed[-1] if failed else self.plan.operation, "reason": error.message,
            "evidence": error.evidence, "interrupted": isinstance(error, Interrupted)})

    def fail(self, error: DeployError) -> DeployError:
        """Undo, go back, or leave the new release live; returns what the run ends with."""
        run, plan, undone, phase = self.run, self.plan, self.done, self.run.journal.phase
        run.interrupts.is_closed = True
        # Why the new release stays live all the same, and what a person runs then.
        why = command = ""
        if plan.operation == "recover" and plan.from_release != plan.to_release \
                and run.store.current().release == plan.to_release:
            why, command = "it was chosen", f"recover --to {plan.to_release}"
        elif phase == PHASE_SWITCHED and run.journal.migration.get("down"):
            why, command = "`down` has begun on the data", "activate RELEASE"
        elif phase == PHASE_SWITCHED and plan.operation == "rollback" and not run.left_is_healthy:
            why, command = f"nothing shows that {plan.from_release} was healthy", "activate RELEASE"
        elif phase == PHASE_SWITCHED and not run.settings.deploy.auto_rollback:
            why, command = "auto_rollback is off", "rollback"
        is_switched = why or phase in (PHASE_SWITCHED, PHASE_ROLLING_BACK)
        # What was staged goes, as if nothing had begun; one to blame stays, to be refused as bad.
        if is_switched or isinstance(error, ReleaseFailed):
            undone = [step for step in undone if step.phase != PHASE_STAGING and not why]
            run.outcome.changed = True
        names = {step.name for step in undone}
        run.outcome.steps = [step._replace(status="undone") if step.status == "done"
                             and step.name in names else step for step in run.outcome.steps]
        if why:
            result, final = "left_live", RollbackFailed(
                f"{error.message}; {plan.to_release} is live all the same: {why}",
                "correct the cause, then settle on it or leave it: "
                f"{run.settings.command_line(command)}")
        else:
            result, final = self.go_back(error) if is_switched else self.undo(error, undone)
        try:
            if phase and result:
                self.end(result, error, final.exit_code, keep_journal=result == "rollback_failed")
        except FAILURES as problem:
            run.console.warn("the verdict could not be written, and the next run recovers it: "
                             + step_error(problem, "history").message)
        after = expand("open? on_failure?" if phase else "", "", run.facts, plan)
        if isinstance(final, (RolledBack, ReleaseFailed)):
            # A timer that deploys one broken artifact after another must not fill the disk.
            stayed = Plan("prune", plan.from_release, plan.from_release)
            after += expand("prune", "", run.facts, stayed)
        for step in after:
            self.take(step)
        return final

    def undo(self, error: DeployError, steps: Sequence[Step]) -> Tuple[str, DeployError]:
        """Before the switch: undo all, newest first; no result if one fails: the journal stays."""
        run, problems = self.run, []
        for step in reversed(steps):
            if problems and step.phase == PHASE_STAGING:
                continue  # the next run tries again, and may need the release for that
            try:
                step.undo(run, step)
            except Exception as problem:  # even a defect: undo the others
                problems.append(f"{step.name}: {step_error(problem, step.name).message}")
                if isinstance(problem, RollbackFailed):
                    problem.message = f"{error.message}; {problem.message}"
                    error = problem
        run.outcome.release = self.plan.from_release
        run.outcome.previous = None
        if problems:
            run.console.warn("not everything could be undone: " + "; ".join(problems))
            if run.journal.phase:
                self.enter(run.journal.phase, error)
            return "", error
        is_refused = error.exit_code in (EXIT_PREFLIGHT, EXIT_ARTIFACT)
        return "refused" if is_refused else "failed", error

    def go_back(self, error: DeployError) -> Tuple[str, DeployError]:
        """After the switch: make the old release live again; RolledBack or RollbackFailed."""
        run, plan, problems = self.run, self.plan, []
        before = plan.from_release
        command_line = run.settings.command_line
        run.console.say(f"going back to {before or 'what was before: nothing'}", status="warn")
        self.enter(PHASE_ROLLING_BACK, error)
        for step in plan.way_back:
            try:
                self.take(step)
            except Exception as problem:  # even a defect: go on
                problems.append(step_error(problem, step.name).message)
                if step.name in ("proxy", "activate", "deactivate"):
                    break
        started = [name for name in run.journal.done if name.startswith("service:")]
        if started and not before:
            run.console.warn(f"{', '.join(started)} may still run what failed: stop it by hand")
        current = run.store.current()
        run.outcome.release = current.release
        run.outcome.previous = plan.to_release if current.release == before else before
        if problems:
            return "rollback_failed", RollbackFailed(
                f"{error.message}; the rollback failed too: {'; '.join(problems)}; "
                f"live now: {current.release or current.problem or 'nothing'}",
                f"correct the cause, then: {command_line('recover')}; or settle on a release by "
                f"hand: {command_line('recover --to RELEASE')}")
        run.outcome.rolled_back = True
        live = f"{before} is live again" if before else "nothing is live, as before"
        return "rolled_back", RolledBack(
            f"{error.message}; rolled back: {live}",
            error.hint or f"see what happened: {command_line(f'show {run.journal.deploy_id}')}")


def settled(executor: Executor, result: str, failure: Optional[Json], *,
            rejected: bool) -> List[Record]:
    """Return the records that change as a run ends, to be written."""
    run, plan = executor.run, executor.plan
    records = run.facts.records
    now = format_time()
    new, old = records.get(plan.to_release), records.get(plan.from_release)
    proven = failure and not executor.blameless and not failure["interrupted"]
    changed = []
    if rejected:
        if old and old.state != STATE_ACTIVE and result != "rollback_failed":
            changed.append(old._replace(state=STATE_ACTIVE, deactivated_at=None))
        if new:
            # One that was good before may fail now for another cause.
            state = STATE_BAD if proven or new.state == STATE_BAD else STATE_STAGED
            if new.activated_at and new.state != STATE_BAD:
                state = STATE_RETIRED
            left_at = now if run.journal.phase == PHASE_ROLLING_BACK else new.deactivated_at
            changed.append(new._replace(state=state, failure=failure, deactivated_at=left_at))
    elif result in GOES_LIVE:
        for record in records.values():
            if record.state == STATE_ACTIVE and record != new:
                # One that failed and was left live does not become good by being replaced.
                changed.append(record._replace(
                    state=STATE_BAD if record.failure else STATE_RETIRED, deactivated_at=now,
                    rolled_back_at=now if plan.operation == "rollback" else None))
        if new:
            # A rollback keeps its target's `previous`, so that the next one goes further back.
            back = plan.operation in ("rollback", "recover") and new.activated_at
            previous = new.previous if back else plan.from_release
            command = run.settings.command_line("rollback") if previous else None
            changed.append(new._replace(
                state=STATE_ACTIVE, activated_at=now, deactivated_at=None, previous=previous,
                failure=failure if proven else None, rolled_back_at=None,
                note=run.note or new.note, rollback={"release": previous, "command": command}))
    return changed


def step_error(error: Exception, step: str) -> DeployError:
    """Turn what a step raised into an error that a person can act on."""
    if isinstance(error, DeployError):
        return error
    if isinstance(error, ImportError):
        return UsageError(f"{INCOMPLETE}: {error}", INSTALL)
    if isinstance(error, MemoryError):
        return StepFailed(f"{step}: out of memory", "give it more (ulimit -v, MemoryMax=)")
    if not isinstance(error, OSError):
        return StepFailed(f"{step}: internal error: {type(error).__name__}: {error}",
                          "this is a defect: please report it")
    where = ""
    if isinstance(error.filename, (str, bytes)):  # os.listdir(descriptor) puts a number there
        where = f" at {escape(portable(os.fsdecode(error.filename)))}"
    hint = "fix the cause, then run again"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        hint = "free some space, then run again"
    elif error.errno in (errno.EMFILE, errno.EAGAIN):
        hint = "raise the limit (ulimit -n, -u; TasksMax=), then run again"
    return StepFailed(f"{step}: {reason(error)}{where}", hint)


# -- recovery ------------------------------------------------------------------

def recover(run: Run) -> List[str]:
    """Finish or undo what an earlier run left, and say what was done; twice changes nothing more.

    StateError where only a person can decide, RollbackFailed where the recovery failed.
    """
    store, done, current = run.store, [], run.facts.current
    journal = store.load(JOURNAL, Journal)
    if current.problem:
        raise StateError(current.problem, current.hint)
    if journal is not None:
        for release, slot in run.facts.slots.items():
            if slot == run.facts.live_slot and release != current.release \
                    and release in (journal.from_release, journal.to_release):
                store.switch(current.release, release)  # visitors follow live.conf
        done.append(settle_journal(run, journal, store.current().release))
        run.facts = observe_root(run, locked=True)
    facts = run.facts
    live = facts.current.release
    # While a record cannot be read, nothing that it may need is removed.
    known = None if facts.state_problems else facts.on_disk
    done += [f"removed {name}" for name in store.sweep(run.console.warn, known)]
    if store.read_history(1, cut=True)[1]:
        done.append("cut off a torn line of the history")
    # The link is the truth: only what it names is active; without it, what should be live stays so.
    # Records without files go, unless they refuse an artifact or tell of a migration.
    for record in facts.records.values():
        exists = record.id in facts.on_disk
        state = record.state
        if record.id == live:
            state = STATE_ACTIVE
        elif state == STATE_ACTIVE and (live or not exists):
            state = STATE_RETIRED
        changed = record._replace(state=state)
        if state != record.state:
            done.append(f"{record.id} is {state}, not {record.state}")
        if not (exists or record.pruned_at or record.id == live or facts.state_problems):
            done.append(f"forgot {record.id}: its files are gone")
            changed = changed._replace(pruned_at=format_time())
            if not is_refused(record) and not record.migrated:
                store.forget(f"{RECORDS}/{record.id}.json")
                continue
        if changed != record:
            store.save(changed)
    return done


def settle_journal(run: Run, journal: Journal, live: OptionalText) -> str:
    """Bring the run that a journal tells of to its end; returns how it ended."""
    store, earlier = run.store, str(journal)
    for release in filter(None, (journal.from_release, journal.to_release)):
        # A record that cannot be read must not be taken for a missing one.
        if release not in run.facts.records and store.status(f"{RECORDS}/{release}.json"):
            problems = "; ".join(run.facts.state_problems)
            raise StateError(f"cannot recover the {earlier}: {problems}", by_hand(store))
    plan = make_plan(run.facts, Plan(journal.operation, journal.from_release, journal.to_release))
    verdict = verdict_of(store, journal, live)
    if verdict:
        if live != journal.to_release:
            plan = plan._replace(last=[])
        Executor(run, plan, journal).end("")
        return f"{earlier} was finished ({verdict})"
    if run.flags.command == "rollback" and is_under_way(journal, live):
        # No restart or probe of what is to be left.
        Executor(run, plan, journal).end("aborted", StepFailed("rolled back before its verdict"),
                                         EXIT_FAILED, keep_journal=True)
        return f"{earlier} ends here: the rollback is its verdict"
    run.console.say(f"recovering the {earlier} ({journal.phase}, begun {journal.started_at})")
    if journal.recoveries >= MAX_RECOVERIES:
        run.outcome.is_repeated = True  # a person was called when it failed
        raise RollbackFailed(f"{earlier} was recovered {journal.recoveries} times without success; "
                             f"live now: {live or 'nothing'}", by_hand(store))
    # The link shows how far the run came; the journal may be one write behind.
    phase, failure = journal.phase, journal.failure
    if phase == PHASE_INTENT and live != journal.from_release:
        phase = PHASE_SWITCHED
    elif phase in (PHASE_SWITCHED, PHASE_ROLLING_BACK) and live != journal.to_release:
        phase = PHASE_ROLLING_BACK
    if phase == PHASE_SWITCHED:
        failure = None  # what failed was before the switch
    elif phase == PHASE_ROLLING_BACK and failure is None:
        failure = {"step": journal.operation, "evidence": {}, "interrupted": True,
                   "reason": "it led back, and why could not be noted"}
    journal = journal._replace(phase=phase, failure=failure, recoveries=journal.recoveries + 1)
    if phase in (PHASE_STAGING, PHASE_INTENT):
        return abort(run, plan, journal)
    store.save(journal)
    # Restarting and probing again does no harm.
    steps = expand("slot proxy", PHASE_SWITCHED, run.facts, plan) + [
        step for step in plan.steps if step.phase == PHASE_SWITCHED
        and not (step.noted and step.name in journal.done)]
    last = [step for step in plan.last if step.phase]
    executor = Executor(run, plan._replace(steps=steps, last=last), journal)
    try:
        if phase == PHASE_ROLLING_BACK:
            raise executor.fail(StepFailed(str(failure.get("reason"))))
        executor.execute()
    except RolledBack as error:
        if isinstance(error.__cause__, Interrupted):
            raise
        run.outcome.rolled_back = False
        return f"{earlier} was rolled back: {error.message}"
    return f"{earlier} was finished: it is live"


def abort(run: Run, plan: Plan, journal: Journal) -> str:
    """Undo a run that had not switched; what it sealed is whole, and stays for the next try."""
    made_here = any(step.phase == PHASE_STAGING for step in plan.steps)
    sealed = made_here and run.store.status(f"{RECORDS}/{journal.to_release}.json")
    executor = Executor(run, plan, journal)
    for step in reversed(plan.steps):
        if not (sealed and step.phase == PHASE_STAGING):
            step.undo(run, step)
    why = (journal.failure or {}).get("reason", "interrupted before activation")
    executor.end("aborted", StepFailed(str(why)), EXIT_FAILED)
    ending = "was not finished; the release stays staged" if sealed else \
        "was undone: it had not been activated"
    return f"{journal} {ending}"


def verdict_of(store: Store, journal: Journal, live: OptionalText) -> str:
    """Return the result in the history, where the run had come to one.

    StateError where something else has changed `current` since.
    """
    verdict = ""
    with suppress(StateError):  # a damaged line must not stop it; --verify finds it
        for last in store.history(1):
            # A rollback that gives the verdict writes `aborted` before it switches.
            is_left = last.result == "aborted" and live == journal.to_release
            if last.deploy_id == journal.deploy_id and last.result != "rollback_failed" \
                    and not is_left:
                verdict = last.result
    if not verdict and live not in (journal.from_release, journal.to_release):
        raise StateError(
            f"cannot recover the {journal}: current is {live or 'missing'}, neither where it came "
            f"from ({journal.from_release or 'nothing live'}) nor where it went", by_hand(store))
    return verdict


def by_hand(store: Store) -> str:
    """Hint at what only a person can decide."""
    return "see which release should be live, then settle on it: " \
        + store.command_line("recover --to RELEASE")


# ============================================================================
# 15  Reference
#    What the program says about itself: pages of help, the script that completes
#    its words, what ansible-doc reads.  Texts alone.
# ============================================================================

HELP = {
    "systemd": """\
`systemctl enable --now deploy@shop.timer deploy-recover@shop` for shop.ini:

    # /etc/systemd/system/deploy@.service
    [Service]
    Type=oneshot
    ExecStart=/usr/local/sbin/deploy.py -c /etc/deploy/%i.ini deploy /var/lib/artifacts/%i.tar.gz
    NotifyAccess=main
    SuccessExitStatus=75
    TimeoutStartSec=15min
    TimeoutStopSec=5min
    KillMode=mixed
    ProtectSystem=strict
    ReadWritePaths=/srv/%i
    ProtectHome=yes
    PrivateTmp=yes
    NoNewPrivileges=yes
    # /etc/systemd/system/deploy@.timer
    [Timer]
    OnCalendar=*:0/15
    RandomizedDelaySec=5min
    FixedRandomDelay=true
    Persistent=true
    [Install]
    WantedBy=timers.target
    # /etc/systemd/system/deploy-recover@.service
    [Service]
    Type=oneshot
    ExecStart=/usr/local/sbin/deploy.py -c /etc/deploy/%i.ini recover
    [Install]
    WantedBy=multi-user.target
""",
    "cron": """\
A line for /etc/cron.d; cron mails whatever is printed:

    MAILTO=ops@example.com
    */15 * * * * root /usr/local/sbin/deploy.py -c /etc/deploy/shop.ini -q \
deploy --splay 10m /var/lib/artifacts/shop.tar.gz

A link shop.tar.gz has the version of what it points to (shop-1.4.2.tar.gz).
`-q` prints nothing when nothing changed and nothing is wrong, else one block
on stderr; what is refused as before prints nothing again, and exits as before.
`--splay 10m` waits first, unlocked: a share of it that host and application
alone decide, the same every time. The short PATH of cron is enough. A run that
finds another one at work exits with 75; `--wait-lock 5m` waits for it instead.
""",
    "hooks": """\
A hook is one or more commands, one a line, run in the release; `pre_stage`,
and `on_failure` once the release is gone again, in the root:

    [hooks]
    post_stage = bin/install-dependencies
    pre_activate =
        bin/migrate --check
        bin/migrate
    post_deploy = sh -c 'curl -fsS http://127.0.0.1:8080/warm > /dev/null'

No shell reads them: what only a shell could do (`&&`, `>`, `$NAME`, `*`, `cd`)
is refused unless it is quoted; `sh -c '...'` asks for one. Each runs under
`timeout` in a process group of its own, stdin /dev/null, with PATH, HOME,
LANG=C.UTF-8, `[env]` and `DEPLOY_APPLICATION`, `DEPLOY_ROOT`, `DEPLOY_ID`,
`DEPLOY_RELEASE`, `DEPLOY_VERSION`, `DEPLOY_RELEASE_PATH`, `DEPLOY_HOOK`,
`DEPLOY_CURRENT_PATH`, `DEPLOY_SHARED_PATH`, `DEPLOY_PREVIOUS_RELEASE`; of `-m`
`DEPLOY_NOTE`, after a failure `DEPLOY_FAILED_RELEASE`, `DEPLOY_FAILED_PATH`,
of a slot `DEPLOY_SLOT`, `DEPLOY_SLOT_PORT`, of a candidate and its probes
`DEPLOY_CANDIDATE_PORT`, of a trace `TRACEPARENT`. What it leaves running does
not hold up the deployment.

`post_stage` may add to the release, which is sealed afterwards: `verify` finds
what changes later. On the automatic way back `pre_rollback` and
`post_rollback` only warn.
""",
    "config": """\
An INI file, `=` between key and value, one item a line in lists, comments on
lines of their own. `deploy.py config --example` prints every option.

    [deploy]
    root = /srv/shop
    shared_dirs =
        log
        var/uploads

    [service:web]
    unit = shop-web.service

Precedence: command line, the environment (`DEPLOY_<SECTION>_<KEY>`, such as
`DEPLOY_DEPLOY_ROOT`), files, the default; `deploy.py config` says where each
value is from. Without `-c`: `$DEPLOY_CONFIG`, else `./deploy.ini`, else, in a
directory inside a root, the file in /etc/deploy that has that root, elsewhere
`/etc/deploy/deploy.ini`.

Durations are written `500ms`, `3s`, `2m`, `1h` (behind a flag a bare number is
seconds); sizes `64k`, `10M`, `2G`. Relative paths are relative to the file.
""",
}

COMPLETION = """\
# Completion of deploy.py, for ~/.bashrc or, behind compinit, ~/.zshrc:
#   eval "$(deploy.py completion bash)"
if [[ -n $ZSH_VERSION ]]; then autoload -U +X bashcompinit && bashcompinit; fi
_deploy_py() {
    local word="${COMP_WORDS[COMP_CWORD]}" command="" skip="" offer="" item
    for item in "${COMP_WORDS[@]:1:$((COMP_CWORD - 1))}"; do
        if [[ $item == = ]]; then skip=1; continue; fi
        if [[ -n $skip ]]; then skip=""; continue; fi
        case $item in
            %(taking)s) skip=1 ;;
            %(commands)s) command=$item; break ;;
        esac
    done
    case "$command:$word" in
%(cases)s
        *:-*) offer="%(everywhere)s" ;;
        :*) if [[ -z $skip ]]; then offer="%(names)s"; fi ;;
    esac
    COMPREPLY=($(compgen -W "$offer" -- "$word"))
}
complete -o default -F _deploy_py deploy.py
"""

# For ansible-doc, which reads these texts without running the file.
DOCUMENTATION = """\
module: deploy
short_description: Take an artifact live on this host, and back
description:
  - This file is deploy.py itself; arguments and flags of a command are parameters, with _ for -.
  - Check mode is a dry run. Another run that holds the lock is a failure with rc 75.
  - Quote what YAML would change, such as a version (1.10) or a file mode (0640).
options:
  command: {type: str, default: deploy, description: "what to do: any command of deploy.py"}
  artifact: {type: path, description: "archive or directory, for deploy, stage and preflight"}
  release: {type: str, description: "release to activate, to go back to, to verify, to pin"}
  config: {type: list, elements: path, description: "configuration files, a later one wins"}
  root: {type: path, description: "directory that holds current, releases, shared and .deploy"}
  set: {type: dict, description: 'options: "section.key": value'}
  sha256: {type: str, description: "digest the artifact must have"}
  release_version: {type: str, description: "version, instead of the one in the artifact's name"}
  force: {type: bool, default: no, description: "insist, as on a bad or a changed release"}
  wait_lock: {type: str, description: "how long to wait for another run to finish, such as 5m"}
"""

EXAMPLES = """\
- name: Deploy; while another run holds the lock (rc 75), try again
  deploy:
    config: /etc/deploy/shop.ini
    artifact: /var/lib/artifacts/shop-1.4.2.tar.gz
  register: deployed
  until: deployed.rc != 75
  retries: 10
  delay: 30

- name: The same without a configuration file
  deploy:
    root: /srv/shop
    artifact: /var/lib/artifacts/shop-1.4.2.tar.gz
    set: {deploy.keep_releases: 3, "probe:web.url": "http://127.0.0.1:8080/health"}

- name: Go back to the previous good release
  deploy: {command: rollback, config: /etc/deploy/shop.ini}
"""

RETURN = """\
changed: {type: bool, returned: always, description: "something changed, or would in check mode"}
rc: {type: int, returned: always, description: "the exit code"}
msg: {type: str, returned: always, description: "the end in one line, with the hint"}
release: {type: str, returned: always, description: "what is live at the end, or null"}
previous: {type: str, returned: always, description: "what was live before, or null"}
rolled_back: {type: bool, returned: always, description: "the release from before is live again"}
"""


# ============================================================================
# 16  Commands
#    One function each: observe, plan, show, execute.  All that a command returns
#    goes into the Outcome; people are shown the same.
# ============================================================================

def no_such(kind: str, name: str, names: Iterable[str]) -> UsageError:
    """Make the error for an unknown name; its hint is the nearest known one."""
    return UsageError(f"there is no {kind} {name!r}", nearest(name, names))


# What one line shows of an object, in this order.
IN_SHORT = "id name deploy_id version state activated_at operation result status to phase " \
    "release at seconds detail user pid command since until note port live by"


def in_short(name: str, value: Any) -> str:
    """Write a value of --json on one line for people: `*` is yes, `-` is no value."""
    if isinstance(value, dict):
        return "  ".join(in_short(key, value[key]) for key in IN_SHORT.split() if value.get(key))
    if isinstance(value, bool):
        return "*" if value else ""
    if isinstance(value, float) and name.endswith("seconds"):
        return format_seconds(value)
    return "-" if value in (None, "") else str(value)


def show_table(run: Run, headers: str, keys: str, rows: Sequence[Json], nothing: str = "") -> None:
    """Show these keys of each row as a table, or `nothing` if there are no rows."""
    table = [[in_short(key, row[key]) for key in keys.split()] for row in rows]
    run.console.result(render_table(headers.split("|"), table) if rows else nothing)


def block(values: Json, indent: str = "  ") -> Iterator[str]:
    """Write each value that is not empty on a line of its own, an object below its name."""
    for name, value in values.items():
        if value and name in ("failure", "evidence", "slots"):
            yield f"{indent}{name}"
            yield from block(value, indent + "  ")
            continue
        for item in value if isinstance(value, list) else [value]:
            if item not in (None, "", {}):
                yield f"{indent}{name:<16} {in_short(name, item)}"
                name = ""


def conclude(run: Run, message: str, lines: Iterable[str] = ()) -> None:
    """Show `lines` and the message, which becomes the outcome's."""
    run.outcome.message = message
    run.console.result("\n".join([*lines, message]))


# -- a root, opened ------------------------------------------------------------

@contextmanager
def looking(run: Run, *, must_exist: bool = True, make: bool = False) -> Iterator[Optional[Store]]:
    """Open the root, neither locked nor recovered; in the end close all that was opened.

    `make` creates it.  `must_exist` is for commands that only read: UsageError without a root, and
    a damaged state is what they found (exit 7), not what stops them (exit 3).
    """
    if make:
        run.store = Store.create(run.settings)
    else:
        run.store = run.root and Store.open(run.settings)
    try:
        if must_exist and run.store is None:
            raise UsageError(f"the root {run.root} does not exist",
                             "name another with --root DIR, or deploy something first")
        yield run.store
    except PreflightFailed as error:
        if must_exist:
            raise ProblemFound(error.message, error.hint)
        raise
    finally:
        for opened in filter(None, (run.artifact, run.store, run.cache)):
            opened.close()
        run.artifact = run.store = run.cache = None


@contextmanager
def changing(run: Run) -> Iterator[Facts]:
    """Lock the root, recover what an earlier run left, and observe; with -n only observe."""
    if run.flags.dry_run:
        with looking(run, must_exist=False):
            yield observe(run)
        return
    command, outcome = run.flags.command, run.outcome
    wait_seconds = run.settings.deploy.lock_wait
    holder = dict(run.by, command=command, since=format_time(), deploy_id=run.deploy_id)
    with looking(run, must_exist=False, make=True) as store:
        run.console.working("taking the lock", wait_seconds + UNLIMITED_SECONDS)
        with lock(store, wait_seconds, holder, run.interrupts):
            store.read_history(1)  # if it cannot be read, better now than after a change
            if command in ("rollback", "recover", "prune"):
                store.reserve(keep=False)
            if not run.flags.to:  # with --to a person settles what was left
                # A recovery's steps and result are not the command's.
                recovery = run.outcome = outcome if command == "recover" else Outcome("recover")
                try:
                    observe(run, locked=True)
                    done = outcome.extra["recovered"] = recover(run)
                finally:
                    run.outcome = outcome
                    # If it fails as before, nobody is notified again.
                    outcome.is_repeated = recovery.is_repeated
                for line in done:
                    run.console.say(f"recovered: {line}")
                if done:
                    outcome.changed = True
                    run.facts = None  # to be observed anew
                run.interrupts.is_closed = False  # recovery closes it
            try:
                yield observe(run, locked=True)
            except (PreflightFailed, ArtifactRefused) as error:
                remember_refusal(run, error)
                raise
            if outcome.changed:
                store.reserve(keep=True)


def is_untouched(run: Run) -> bool:
    """Say whether nothing was ever deployed to the root."""
    try:
        os.lstat(f"{run.root}/.deploy")
    except OSError as error:  # any other is reported where the root is opened
        return error.errno == errno.ENOENT
    return False


# -- commands that change what is live -----------------------------------------

def transact(run: Run) -> None:
    """Observe, plan, check and execute; with -n show the plan instead."""
    flags, outcome, console = run.flags, run.outcome, run.console
    artifact = flags.artifact or ""
    if run.note:
        outcome.extra["note"] = run.note
    flags.dry_run = flags.dry_run or flags.check
    if is_untouched(run):
        adopts = flags.command == "adopt" and os.path.isdir(f"{run.root}/releases")
        if not adopts and flags.command not in ("deploy", "stage", "sync"):
            raise UsageError(f"nothing was ever deployed to {run.root}",
                             "name another root: --root DIR; or deploy or adopt something first")
        if not flags.dry_run and not adopts:
            # Before a root is made, all else must be right: its name may be a typo.
            with looking(run, must_exist=False):
                # As if locked: `changing` waits for another run that makes this root.
                facts = observe(run, locked=True, artifact=artifact)
                run.plan = plan_operation(facts) if facts.artifact else None
                preflight(run, show=False)
            run.facts = run.plan = None
    with changing(run):
        if flags.command == "sync":
            artifact = find_new(run)
        facts = observe(run, artifact=artifact, confirm=flags.dry_run)
        is_broken = facts.refusal or facts.state_problems or facts.current.problem
        if is_broken and not flags.to:
            preflight(run)  # most often it ends here
        plan = run.plan = plan_operation(facts)
        steps, before, after = plan.steps + plan.last, plan.from_release, plan.to_release
        if steps and flags.command not in (*NOTING, "prune", "recover"):
            preflight(run, show=not is_broken)
        # Before any step: the report of a failure names both.
        outcome.previous, outcome.release = before, after or None
        console.log_context["release"] = after
        if before == after:
            target = rollback_target(facts, before)
            outcome.previous = target and target.id
        switches = any(step.name == "activate" for step in steps)
        for when, live in (("before", before), ("after", after if switches else before)):
            console.diff[f"{when}_header"] = f"{facts.root}/current"
            console.diff[when] = f"releases/{live}\n" if live else ""
        if flags.dry_run:
            show_plan(run, plan)
        elif steps:
            Executor(run, plan).execute()
            if run.cache:
                try:
                    run.store.directory(".deploy").remove_tree("cache")
                except OSError as error:
                    console.warn(f"cache/ stays, for the next run: {reason(error)}")


def find_new(run: Run) -> str:
    """Choose what the source wants live, and fetch it where it is not; returns where it lies."""
    flags, store, source = run.flags, run.store, run.settings.source
    if not source.url and not source.git:
        raise UsageError("there is no source to fetch from", "name it: [source] url, or git")
    facts, cached = run.facts, []
    if not flags.dry_run:
        run.cache = store.directory(".deploy").child("cache", make=True)
        with suppress(PermissionError):  # another member's
            give_to_group(run.cache.descriptor, store.group)
        cached = os.listdir(run.cache.descriptor)
    seen, listed = look(run)
    run.fetch = source.url and lru_cache(maxsize=None)(partial(fetch, run))
    offer, live = run.offer, facts.release(facts.current.release or "")
    for record in facts.records.values():
        if offer.ref and record.artifact["source"] == run.console.secrets.mask(offer.path):
            offer.sha256 = record.sha256
    run.facts = facts._replace(artifact=offer)
    if source.index.endswith(".json") or source.order == "uapi":
        flags.allow_downgrade = True  # `sequence` alone guards: a channel may point back
    for name in cached:
        if name.partition(".")[0] not in listed - {live.sha256 if live else ""}:
            run.cache.remove_tree(name)
    if live and live.sha256 == offer.sha256:
        offer.release = live.id
        return ""
    bad, refused = refused_record(facts, offer.sha256), seen.get("refused") or {}
    if not flags.force:
        if bad:
            raise ArtifactRefused(*bad_refusal(bad))
        if refused.get("sha256") == offer.sha256:
            raise ArtifactRefused(refused["reason"], "publish it again, with its index")
    if flags.check:
        raise ProblemFound(f"{offer.version} is new: {offer.path}",
                           f"deploy it: {facts.command_line('sync')}")
    if offer.path.startswith("/") and not offer.ref:
        return str(offer.path)
    if flags.dry_run:
        return ""
    run.plan = plan_operation(run.facts)
    preflight(run, show=False)
    try:
        return bring(run)
    except ArtifactRefused as error:
        store.directory(".deploy").remove_tree("cache")
        remember(run, seen, refused={"sha256": offer.sha256, "reason": error.message,
                                     "at": format_time()})
        raise


def preflight(run: Run, *, show: bool = True) -> None:
    """Run the checks that guard this command; of failures raise the artifact's refusal first."""
    console, facts, started_seconds = run.console, run.facts, time.monotonic()
    results = run_checks(run, going_back=run.flags.command in ("rollback", "activate"))
    failed = [result for result in results if result.status == "fail"]
    for name, status, detail, _ in results if show or failed else []:
        if status == "warn":
            console.warn(f"{name}: {detail}")
        elif status == "fail" and len(failed) > 1:  # a single one is the error
            console.say(f"{name}: {detail}", status="fail")
        else:
            console.debug(f"{status:<5} {name}: {detail}")
    if failed:
        if facts.refusal:
            raise facts.refusal
        name, _, detail, hint = failed[0]
        if name == "lock":
            raise Busy(f"another run holds the lock: {describe_holder(facts.holder)}", hint)
        kind = ArtifactRefused if name in ARTIFACT_CHECKS else PreflightFailed
        raise kind(f"preflight: {name}: {detail}", hint)
    if show:
        seconds = format_seconds(time.monotonic() - started_seconds)
        console.say(f"{'preflight':<20} {seconds:>7}  {count(len(results), 'check')}", status="ok")


def show_plan(run: Run, plan: Plan) -> None:
    """Print the plan of a dry run: the very steps that a real run would execute."""
    outcome, facts, steps = run.outcome, run.facts, plan.steps + plan.last
    if not outcome.checks:  # else the check `lock` has reported it
        for _, problem, _ in check_lock(run):
            run.console.warn(f"lock: {problem}; after that the plan may be another")
    outcome.changed = bool(steps or facts.journal and facts.holder is None)
    outcome.extra["plan"] = plan.to_json()
    outcome.steps = [StepResult(step.name, "planned", 0.0, step.text) for step in steps]
    if not steps:
        conclude(run, "nothing to do")
        return
    length = count(len(steps), "step")
    outcome.message = f"would {run.flags.command}: {length}"
    lines = [f"plan of {plan.operation} ({length}; nothing was changed)", *block(
        {f"{number:>2}  {step.name:<16}": step.text for number, step in enumerate(steps, 1)})]
    # A rollback goes back only to what a step `health` has asked.
    is_blind = plan.operation == "rollback" and all(step.name != "health" for step in plan.steps)
    if plan.way_back and (is_blind or not run.settings.deploy.auto_rollback):
        lines.append(f"should anything fail after activation: {plan.to_release} stays live")
    elif plan.way_back:
        lines += ["should anything fail after activation:", *block(
            {f"    {step.name:<16}": step.text for step in plan.way_back})]
    run.console.result("\n".join(lines))
    for step in steps:  # what only reads is done: behind the plan, as it may fail
        if step.name == "verify":
            step.do(run, step)
        elif step.do is do_prune:
            try:
                refuse_to_prune(run, step.what)
            except StepFailed as error:
                run.console.warn(f"{step.name}: {error.message}")


MOVED = {"deploy": "is live", "sync": "is live", "stage": "is staged", "activate": "is live",
         "rollback": "is live again", "pin": "is pinned", "unpin": "is not pinned",
         "adopt": "is known", "hold": "is held", "unhold": "may be replaced again"}


def command_move(run: Run) -> None:
    """Carry out a command of MOVED, and say how to undo it."""
    command, outcome = run.flags.command, run.outcome
    transact(run)
    if run.flags.dry_run:
        return
    message = f"{outcome.release or 'nothing'} {MOVED[command]}"
    if command in NOTING or not outcome.steps:
        conclude(run, message if command in NOTING else f"{message} already; nothing to do")
        return
    facts, shown = run.facts, {"before": outcome.previous}
    before = facts.records.get(outcome.previous or "")
    if command == "stage":
        shown = {"go live": facts.command_line(f"activate {outcome.release}")}
    elif command == "rollback" and before and before.state != STATE_BAD:
        shown["undo"] = facts.command_line(f"activate {before.id}")
    elif command != "rollback" and before and rollback_target(facts, outcome.release):
        shown["undo"] = facts.command_line("rollback")
    outcome.message = message
    lines = [f"  {what:<16} {how}" for what, how in shown.items() if how]
    run.console.result("\n".join([f"{run.application}: {message}", *lines]))


def command_prune(run: Run) -> None:
    """Delete what keep_releases no longer keeps."""
    transact(run)
    facts, would = run.facts, "would be " if run.flags.dry_run else ""
    removed = [step.name.partition(":")[2] for step in run.outcome.steps
               if step.status in ("done", "planned")]
    run.outcome.extra["removed"] = removed
    for name, process in sorted(facts.in_use.items()):
        if name != facts.current.release:
            run.console.say(f"{name} is in use by {process}, and stays")
    run.outcome.message = f"{count(len(removed), 'release')} {would}removed"
    if not would:
        conclude(run, run.outcome.message, removed)


def command_recover(run: Run) -> None:
    """Finish or undo what a crash left; --to settles what only a person can decide."""
    outcome, dry_run, done, lost = run.outcome, run.flags.dry_run, [], None
    if run.flags.to:
        transact(run)
        if not dry_run:
            outcome.changed = True
            conclude(run, f"{outcome.release} is live, and nothing is under way")
            outcome.extra["recovered"] = [outcome.message]
        return
    if not is_untouched(run):
        with changing(run) as facts:
            lost, journal, current = lost_current(facts), facts.journal, facts.current
            done = outcome.extra.get("recovered", [])
            if dry_run:  # what a real run would be refused with comes first
                if facts.holder is not None:
                    raise busy(facts.holder)
                if current.problem:
                    raise StateError(current.problem, current.hint)
                if journal:
                    verdict_of(run.store, journal, current.release)  # or StateError
                    done.append(f"recover the {journal} ({journal.phase})")
                done += [f"remove {path}"
                         for path in run.store.sweep(run.console.warn, read_only=True)]
                outcome.changed = bool(done)
    if dry_run:
        outcome.extra["plan"] = [{"name": "recover", "description": line} for line in done]
    conclude(run, "; ".join(done) or "nothing to recover")
    if lost:
        raise lost
    if run.facts and run.facts.state_problems:
        raise StateError("; ".join(run.facts.state_problems), RESTORE)


# -- commands that only look ---------------------------------------------------

def command_preflight(run: Run) -> None:
    """Run every read-only check, and show them as a table."""
    outcome = run.outcome
    with looking(run, must_exist=False):
        facts = observe(run, artifact=run.flags.artifact or "", confirm=True)
        if facts.artifact:
            run.plan = make_plan(facts, Plan("deploy", outcome.release,
                                             release_id(facts, facts.artifact)))
        results = run_checks(run)
    show_table(run, "STATUS|CHECK|FOUND|WHAT TO DO", "status name detail hint",
               [result._asdict() for result in results])
    run.console.warnings += [f"{result.name}: {result.detail}" for result in results
                             if result.status == "warn"]
    failed = [result for result in results if result.status == "fail"]
    outcome.message = f"{count(len(results), 'check')}, {len(failed)} failed"
    if failed:
        names = ", ".join(result.name for result in failed)
        raise PreflightFailed(f"preflight: {count(len(failed), 'check')} failed: {names}: "
                              f"{failed[0].detail}", failed[0].hint)


def command_verify(run: Run) -> None:
    """Hash a release again and compare it with its manifest."""
    with looking(run) as store:
        release = select_release(observe(run), run.flags.release or "current")
        run.outcome.release = release.id
        lines = name_differences(run, check_release(run, release))
    conclude(run, f"{release.id}: {count(len(lines), 'difference')}", lines)
    if lines:
        raise ProblemFound(f"{run.outcome.message}: {', '.join(lines[:5])}",
                           f"{store.make_whole(release)}, or roll back")


def command_diff(run: Run) -> None:
    """Compare two releases by their manifests, without reading their files."""
    trees, ids = [], []
    with looking(run) as store:
        facts = observe(run)
        for name in (run.flags.release, run.flags.other or "current"):
            release = select_release(facts, name)
            with store.open_manifest(release) as streams, blaming(
                    ProblemFound, release.id, facts.command_line(f"verify {release.id}")):
                trees.append(read_manifest(*streams))
            ids.append(release.id)
    lines = name_differences(run, differences(*trees))
    run.outcome.previous, run.outcome.release = ids
    conclude(run, f"from {ids[0]} to {ids[1]}: {count(len(lines), 'difference')}", lines)


def command_logs(run: Run) -> None:
    """Show what the services' units wrote to the journal since the release went live."""
    chosen, slots, lines = run.flags.service, run.settings.slots, []
    with looking(run):
        facts = observe(run)
        live = select_release(facts, "current")
    services = {**run.settings.service, **slots}
    if chosen and chosen not in services:
        raise no_such("service", chosen, services)
    idle = set(slots) - {facts.live_slot}
    units = [service for name, service in services.items()
             if service.unit and (name == chosen or not chosen and name not in idle)]
    if not units or run.flags.follow and (run.flags.json or len(units) > 1):
        raise UsageError("logs shows the journals of systemd units, and --follow one of them",
                         "name one service that has a unit, and --follow without --json")
    since_seconds = seconds_of(live.activated_at or live.created_at)
    for service in units:
        argv = [re.sub(r"(?:.*/)?systemctl\Z", "journalctl", word) for word in service.systemctl]
        argv += ["--no-pager", f"--since=@{since_seconds:.0f}", "-u", service.unit]
        if run.flags.follow:
            argv.append("--follow")
        done = run_command(argv, interrupts=run.interrupts, environ=manager_environment(),
                           timeout_seconds=LONGEST_SECONDS, mask=run.console.secrets.mask,
                           on_line=lines.append if run.flags.json else run.console.result)
        if not done.ok:
            raise ProblemFound(f"{spell(argv)} {done.verdict()}: {' '.join(done.tail[-3:])}",
                               "run it as a user who may read the journal, or as root")
    run.outcome.release, run.outcome.extra["logs"] = live.id, lines


def command_flags(run: Run) -> None:
    """Show the feature flags, or set some of them."""
    if run.flags.assignments:
        transact(run)
    else:
        with looking(run):
            observe(run)
    values = run.outcome.extra["flags"] = run.facts.flags
    run.outcome.message = count(len(values), "flag")
    if not run.flags.dry_run:
        show_table(run, "FLAG|VALUE", "name value", [
            {"name": name, "value": show_flag(value)} for name, value in sorted(values.items())],
            "no flags")


def command_probe(run: Run) -> None:
    """Run the configured probes now, or an ad-hoc one."""
    flags, is_live, outcome = run.flags, False, run.outcome
    probes = chosen_probes(run.settings, flags)
    context = Context("", "/", "", "", "/", "", run.deploy_id)
    if run.settings.deploy.root:  # without one there is nothing to compare the answer with
        with looking(run, must_exist=False):
            facts = observe(run)
        is_live, context = outcome.release in facts.records, context_for(facts, outcome.release)
    if not is_live and flags.expect and probes[0].release:
        raise UsageError(f"--expect release={probes[0].release}: no release is known to be live, "
                         "to compare the answer with", "name the root of what answers: --root DIR")
    results = [run_probe(run, probe, context, expect_release=is_live, once=flags.wait is None)
               for probe in probes]
    rows = outcome.extra["probes"] = [result.to_json() for result in results]
    show_table(run, "HEALTHY|PROBE|TOOK|ANSWER", "ok name seconds detail", rows)
    failed = [result for result in results if not result.ok and result.required]
    outcome.message = f"{count(len(results), 'probe')}, {len(failed)} failed"
    if failed:
        raise ProblemFound(failed[0].complaint(), failed[0].hint())


def chosen_probes(settings: Settings, flags: Any) -> List[Any]:
    """Make the probes that the command line asks for; UsageError where it does not agree."""
    known, names = settings.probe, flags.names
    targets = {kind: getattr(flags, {"command": "probe_command"}.get(kind, kind))
               for kind in PROBE_KINDS if kind != "service"}  # that needs a section
    words = ", ".join(f"--{kind}" for kind in targets)
    probes = [adhoc_probe(kind, target, flags.expect or [])
              for kind, target in targets.items() if target]
    if len(probes) + bool(names) > 1 or flags.expect and not probes:
        raise UsageError(f"probe takes names, or one of {words} with --expect",
                         "ask one thing at a time")
    if not probes:  # of a candidate nobody asks unless it is named: none is started here
        names = names or [name for name in sorted(known) if known[name].when != "candidate"]
    for name in names:
        if name not in known:
            raise no_such("probe", name, known)
        probes.append(known[name])
    if not probes:
        raise UsageError("there is no probe to run",
                         f"configure a [probe:NAME], or give one of {words}")
    for probe in probes:
        probe.when = "after"
        if flags.wait is not None:
            probe.deadline = read_value("limit", flags.wait)
        problems = probe_mistakes(settings, probe)
        if problems:
            raise UsageError(f"probe {probe.name}: {'; '.join(problems)}",
                             "correct it in the configuration or on the command line")
    return probes


CONFIG_DIRECTORY = "/etc/deploy"


def configurations() -> List[str]:
    """List the configurations of this host's applications."""
    with suppress(OSError):
        return sorted(f"{CONFIG_DIRECTORY}/{name}" for name in os.listdir(CONFIG_DIRECTORY)
                      if name.endswith(".ini") and name[0] != ".")
    return []


def command_status(run: Run) -> None:
    """Show the state of one root, or with --all of each that is configured on this host."""
    if not run.flags.all:
        show_status(run)
        return
    rows = run.outcome.extra["roots"] = []
    for path in configurations():
        row = {"application": None, "root": None, "release": None, "configuration": path,
               "problem": "", "ok": True}
        rows.append(row)
        try:
            each = Run(load_settings([path], {}, []), Console(), run.interrupts, run.flags)
            each.console.quiet = True
            row.update(application=each.application, root=each.settings.deploy.root)
            show_status(each)
            row["release"] = each.outcome.release
        except FAILURES as error:
            row.update(problem=step_error(error, "status").message, ok=False)
    run.outcome.message = count(len(rows), "root")
    show_table(run, "APPLICATION|ROOT|CURRENT|OK|PROBLEM", "application root release ok problem",
               rows, run.outcome.message)
    problems = [f"{row['configuration']}: {row['problem']}" for row in rows if row["problem"]]
    if problems:
        raise ProblemFound("; ".join(problems), "deploy.py -c FILE status tells more of each")


def show_status(run: Run) -> None:
    """Show what is live, where a rollback goes, and whether anything needs a person."""
    outcome, last = run.outcome, None
    with looking(run) as store:
        facts = observe(run)
        name = outcome.release
        current, previous = facts.release(name or ""), rollback_target(facts, name)
        problems = list(status_problems(run, previous))
        flag = store.maintenance() if store.status(store.flag) else None
        try:
            store.check_owner(read_only=True)
            last = next(iter(store.history(1)), None)
        except StateError as error:
            problems.append((error.message, error.hint))
    outcome.previous = previous and previous.id
    links = {slot: release for release, slot in facts.slots.items()}
    status = outcome.extra["status"] = {
        "current": current and encode(current), "previous": previous and encode(previous),
        "journal": facts.journal and encode(facts.journal), "last": last and encode(last),
        "lock": facts.holder, "maintenance": flag, "hold": facts.hold or None,
        "releases": len(facts.on_disk & set(facts.records)), "configuration": run.settings.files,
        "problems": [problem for problem, _ in problems],
        "slots": {slot: {"port": values.port, "release": links.get(slot),
                         "live": slot == facts.live_slot}
                  for slot, values in run.settings.slots.items()}}
    run.console.result("\n".join(block({
        "application": facts.application, "root": facts.root, **status,
        "current": status["current"] or name or "nothing is live",
        "state": "" if problems else "ok"})))
    outcome.message = f"{name or 'nothing'} is live; state: {'; '.join(status['problems']) or 'ok'}"
    if problems:
        raise ProblemFound(*problems[0])


def status_problems(run: Run, target: Optional[Record]) -> Iterator[Problem]:
    """Give each thing that is broken and what to do about it; `target` is a rollback's."""
    facts, store, command_line = run.facts, run.store, run.facts.command_line
    live, journal, lost = facts.current.release, facts.journal, lost_current(facts)
    for status, problem, fix in check_state(run):
        if status != "ok":
            yield problem, fix
    if facts.settings.slots:
        yield from slot_problem(facts)
    for record in filter(None, (facts.release(live or ""), target)):
        if not all(store.status(f"{path}/{record.id}") for path in (MANIFESTS, TREES)):
            yield (f"{record.id} cannot be verified: its manifest is missing",
                   store.make_whole(record))
    if facts.holder is not None:
        return
    if journal:
        needs_person = journal.recoveries >= MAX_RECOVERIES
        try:
            verdict_of(store, journal, live)
        except StateError:
            needs_person = True
        yield (f"{journal} was not finished ({journal.phase})",
               command_line("recover --to RELEASE" if needs_person else "recover"))
    if journal or facts.current.problem:
        return
    if "deploy_id" in store.maintenance():
        yield "maintenance is on, and the run that wanted it has ended", command_line("recover")
    if lost:
        yield lost.message, lost.hint
    for record in facts.records.values():
        if record.state == STATE_ACTIVE and record.id != live and not lost:
            why, fix = "its files are gone", "recover"
            if record.id in facts.on_disk:
                why, fix = f"current points to {live}", f"activate {record.id}"
            yield f"{record.id} should be live, but {why}", command_line(fix)
        elif record.id == live and record.failure:
            yield (f"{live} is live, but failed: {record.failure.get('reason')}",
                   command_line("rollback") if target else "deploy a corrected version")


def command_releases(run: Run) -> None:
    """List the releases, newest first, `*` on the current one."""
    with looking(run):
        facts = observe(run)
    rows = run.outcome.extra["releases"] = [
        dict(encode(record), current=record.id == facts.current.release)
        for record in newest_first(map(facts.release, facts.records))]
    run.outcome.message = count(len(rows), "release")
    shown = [dict(row, size=format_size(int(row["tree"].get("bytes") or 0)),
                  state=row["state"] + (", pinned" if row["pinned"] else "")) for row in rows]
    show_table(run, "|RELEASE|VERSION|STATE|ACTIVATED|SIZE",
               "current id version state activated_at size", shown,
               f"no releases yet: {unrecorded(facts)}")
    if facts.state_problems:
        raise ProblemFound("; ".join(facts.state_problems), RESTORE)


def command_history(run: Run) -> None:
    """List the deployments, oldest first; --verify proves that no line was changed."""
    flags, outcome, since = run.flags, run.outcome, ""
    with looking(run) as store:
        if flags.verify:
            outcome.extra["history"] = []
            problems = store.verify_history()
            lines = count(len(store.read_history()[0]), "entry", "entries")
            conclude(run, "; ".join(problems[:3]) or f"{lines}, the chain is whole")
            if problems:
                raise ProblemFound(
                    f"the history is not whole: {outcome.message}", f"compare {store.path}/"
                    f"{HISTORY} with a backup or with your log; to start over, move it away")
            return
        entries = store.history()
        outcome.extra["chain"] = store.chain
    if flags.since:
        since = format_time(read_value("moment", flags.since)(time.time(), -1))
    if flags.operation and flags.operation not in ORDER:
        raise no_such("operation", flags.operation, ORDER)
    chosen = [encode(entry) for entry in entries
              if entry.at >= since and flags.operation in (None, entry.operation)
              and not (flags.failed and entry.exit_code in (EXIT_OK, EXIT_CHANGED))]
    limit = int(flags.limit or (0 if flags.json else 20))
    shown = outcome.extra["history"] = chosen[-limit:] if limit else chosen
    outcome.extra["total"] = len(chosen)
    outcome.message = count(len(chosen), "entry", "entries")
    if len(shown) < len(chosen):
        outcome.message += f", the newest {limit} of them shown; --limit 0 shows all"
        run.console.say(outcome.message)
    show_table(run, "TIME|ID|OPERATION|RESULT|VERSION|TOOK|BY",
               "at deploy_id operation result version seconds by",
               [dict(entry, by=entry["by"].get("user")) for entry in shown],
               "nothing like that in the history" if entries else "no history yet")


def command_show(run: Run) -> None:
    """Show one deployment with its steps, and the evidence where it failed."""
    outcome, text = run.outcome, run.flags.id or "latest"
    with looking(run) as store:
        entries = store.history()
        if text == "current":
            text = store.current().release or text
    names = [(name, entry) for entry in entries for name in (
        entry.deploy_id, str(entry.sequence), entry.release, entry.version) if name]
    exact = [entry for name, entry in names if name == text]
    exact.sort(key=lambda entry: entry.operation not in NOTING)  # before a pin or hold
    matches = exact[-1:] or [entry for name, entry in names if name.startswith(text)]
    if text == "latest":
        matches = entries[-1:]
    ids = list(dict.fromkeys(entry.deploy_id for entry in matches or entries))[-5:]
    if not matches or len(ids) > 1:
        raise UsageError(f"{text!r} is {'more than one' if matches else 'no'} deployment",
                         f"give one of: {', '.join(ids) or 'none was deployed here so far'}")
    shown = outcome.extra["history"] = [
        encode(entry) for entry in entries if entry.deploy_id == ids[0]]
    for entry in shown:
        steps = [part for step in entry["steps"] for part in (step, *step.get("output", ()))]
        run.console.result("\n".join(block(dict(entry, steps=steps))))
    outcome.release, outcome.previous = shown[-1]["release"], shown[-1]["previous"]
    outcome.message = shown[-1]["result"]


def measure(entries: Iterable[HistoryEntry], since: str, until: str) -> Json:
    """Compute the four keys of DORA and the rework rate between two times (RFC 3339).

    A deployment that was rolled back, then or later, or needed a person has failed; the next one
    is rework.  Recovery is from going live to healthy again, lead time from the build to going
    live: medians, in seconds.
    """
    from statistics import mean, median
    rows, by_release, broken = [], {}, []

    def span(begin: Any, end: Any) -> Optional[float]:
        return seconds_of(end) - seconds_of(begin) if begin and end else None

    for entry in entries:
        last = rows[-1] if rows else {}
        left = by_release.get(entry.previous)
        goes_live = entry.result in GOES_LIVE
        needs_person = entry.result in ("left_live", "rollback_failed")
        # The recovery of a run is written under the run's own id.
        is_end = entry.deploy_id == last.get("deploy_id")
        is_manual = goes_live and not entry.automatic
        if is_manual and entry.operation == "rollback" and left and not left["failed"]:
            left["failed"] = True
            broken.append(left)
        if not needs_person and (is_manual or goes_live and is_end):
            for row in broken:
                row["well_at"] = entry.at
            broken = []
        if is_end or entry.operation not in ("deploy", "activate", "sync") or not (
                goes_live or needs_person):
            continue
        row = {key: getattr(entry, key) for key in (
            "at deploy_id operation result release version note built_at").split()}
        row.update(by=entry.by.get("user"), failed=entry.automatic or needs_person,
                   rework=last.get("failed", False), well_at=entry.at if entry.automatic else None)
        # The first counts: the way back has one too, a recovered run may have none.
        for step in reversed(entry.steps):
            if step["name"] == "activate":
                row["at"] = step.get("started_at") or row["at"]  # older lines lack it
        rows.append(row)
        by_release[entry.release] = row
        if needs_person:
            broken.append(row)
    rows = [row for row in rows if since <= row["at"] <= until]
    for row in rows:
        row["recovery_seconds"] = span(row["at"], row["failed"] and row["well_at"])
        row["lead_seconds"] = span(row["built_at"], row["at"])
    days = max(1.0, (seconds_of(until) - seconds_of(since)) / 86400)
    report = {"since": since, "until": until, "deployments": len(rows),
              "per_day": round(len(rows) / days, 3), "failed": sum(row["failed"] for row in rows)}
    for name, key, middle in (
            ("change_fail_rate", "failed", mean), ("rework_rate", "rework", mean),
            ("recovery_seconds", "recovery_seconds", median),
            ("lead_seconds", "lead_seconds", median)):
        known = [float(row[key]) for row in rows if row[key] is not None]
        report[name] = round(middle(known), 4) if known else None
    return dict(report, runs=rows)


def refuse_odd_files(*paths: str) -> None:
    """Raise UsageError for a device or a link, which a rename into place would replace."""
    for path in paths:
        if os.path.lexists(path) and (os.path.islink(path) or not os.path.isfile(path)):
            raise UsageError(f"{portable(path)} is no regular file, and would become one",
                             "name another file: -o FILE")


def command_report(run: Run) -> None:
    """Show how often deployments ran and failed, and the times to recover and to go live."""
    flags, output, now_seconds = run.flags, run.flags.output or "-", time.time()
    since = format_time(read_value("moment", flags.since or "90d")(now_seconds, -1))
    with looking(run) as store:
        report = measure(store.history(), since, format_time(now_seconds))
    run.outcome.extra["report"] = report
    measures = {key: in_short(key, value) for key, value in report.items() if key != "runs"}
    text = "\n".join([*block(measures), ""])
    if flags.format == "json":
        text = json.dumps(report, indent=2) + "\n"
    elif flags.format == "html":
        text = report_page(run.application, report["runs"], measures)
    elif flags.format == "csv":
        import csv
        import io
        table = io.StringIO()
        writer = csv.DictWriter(table, (
            "at deploy_id operation result release version failed rework recovery_seconds "
            "lead_seconds by note").split(), extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(report["runs"])
        text = table.getvalue()
    text = run.console.secrets.mask(text)
    run.outcome.message = f"{count(report['deployments'], 'deployment')}, {report['failed']} failed"
    if output == "-":
        run.console.raw_result(text)
        return
    path = absolute(output)
    refuse_odd_files(path)
    with blaming(UsageError, f"cannot write {output}", "name another: -o FILE"), \
            Directory(os.path.realpath(os.path.dirname(path))) as directory:
        if not flags.dry_run:
            directory.write(os.path.basename(path), text.encode("utf-8", "backslashreplace"), 0o644)
    conclude(run, f"{run.outcome.message}: {output}")


REPORT_PAGE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{name}: deployments</title>
<style>
:root {{ color-scheme: light dark; --good: #1a7f37; --bad: #cf222e }}
@media (prefers-color-scheme: dark) {{ :root {{ --good: #3fb950; --bad: #f85149 }} }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2rem auto;
  padding: 0 1rem }}
dl {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 1rem }}
dd {{ margin: 0; font-weight: 600; overflow-wrap: anywhere }}
svg {{ width: 100%; height: 64px; border-bottom: 1px solid }}
div {{ overflow-x: auto }}
table {{ border-collapse: collapse; width: 100%; font-size: 14px }}
th, td {{ text-align: left; padding: .3rem .6rem; border-bottom: 1px solid #8884 }}
rect.good {{ fill: var(--good) }}
rect.bad {{ fill: var(--bad) }}
.good td:nth-child(3) {{ color: var(--good) }}
.bad td:nth-child(3) {{ color: var(--bad) }}
</style>
</head>
<body>
<h1>{name}</h1>
<dl>
{measures}
</dl>
<svg viewBox="0 0 1000 64" preserveAspectRatio="none" role="img" aria-label="Timeline">
{marks}
</svg>
<div><table>
<tr><th>live since</th><th>version</th><th>result</th><th>by</th><th>note</th></tr>
{runs}
</table></div>
</body>
</html>
"""


def report_page(application: str, runs: List[Json], measures: Json) -> str:
    """Write the report as an HTML page that loads nothing."""
    from html import escape as quote
    first, last = seconds_of(measures["since"]), seconds_of(measures["until"])
    marks, rows = [], []
    for run in runs:
        kind = "bad" if run["failed"] else "good"
        cells = [quote(in_short(key, run[key])) for key in "at version result by note".split()]
        x = 990 * (seconds_of(run["at"]) - first) / max(1, last - first)
        marks.append(f'<rect class="{kind}" x="{x:.1f}" y="12" width="6" height="40">'
                     '<title>{}: {} {}</title></rect>'.format(*cells))
        rows.insert(0, f'<tr class="{kind}"><td>{"</td><td>".join(cells)}</td></tr>')
    shown = [f"<div><dt>{key}</dt><dd>{quote(value)}</dd></div>"
             for key, value in measures.items()]
    return REPORT_PAGE.format(name=quote(application), measures="\n".join(shown),
                              marks="\n".join(marks), runs="\n".join(rows))


def command_attest(run: Run) -> None:
    """Print the statement that a release was live here, for this host's key to sign."""
    with looking(run) as store:
        facts = observe(run)
        record = select_release(facts, run.flags.release or "current")
        entries = [entry for entry in store.history()
                   if entry.release == record.id and entry.result in GOES_LIVE]
    run.outcome.release = record.id
    if is_refused(record) or record.failure or not record.activated_at or not entries:
        raise ProblemFound(f"{record.id} is {record.state}: it did not run here, or not well",
                           f"name one that did: {facts.command_line('releases')}")
    now = format_time(facts.now_seconds)
    soaked_seconds = seconds_of(record.deactivated_at or now) - seconds_of(record.activated_at)
    name = portable(os.path.basename(record.path))
    statement = {
        "_type": "https://in-toto.io/Statement/v1", "predicateType": DEPLOYMENT,
        "subject": [{"name": name, "digest": {"sha256": record.sha256}}], "predicate": {
            "application": run.application, "environment": run.settings.policy.environment,
            "host": run.by["host"], "version": record.version, "release": record.id,
            "activatedAt": record.activated_at, "attestedAt": now,
            "soakedSeconds": max(0, int(soaked_seconds)), "deployId": entries[-1].deploy_id,
            "result": entries[-1].result, "chain": store.chain,
            "manifestSha256": record.tree.get("manifest_sha256")}}
    show_signable(run, json.dumps(statement) + "\n", f"{name}.attestation",
                  "-n deploy-attestation -f /etc/ssh/ssh_host_ed25519_key")


def command_approve(run: Run) -> None:
    """Print the text that approvers of an artifact sign."""
    with Artifact(run.flags.artifact, run.settings.limits, run.flags.delegate) as artifact, \
            run.console.progress("hash", artifact.size_bytes) as progress:
        artifact.identify(run.settings, progress)
        artifact.confirm(run.settings, progress)
    expires = read_value("moment", run.flags.expires or "7d")(time.time(), 1)
    text = approval(run, artifact, format_time(expires)).decode("ascii")
    show_signable(run, text, f"{artifact.name}.approval", "-n deploy-approval -f KEY")


def show_signable(run: Run, text: str, name: str, options: str) -> None:
    """Print the exact bytes to be signed, and on stderr the command that signs them."""
    run.outcome.extra["text"], run.outcome.message = text, f"what {name} is to hold"
    run.console.raw_result(text)
    run.console.say(f"save it as {name}, beside the artifact; then: "
                    f"ssh-keygen -Y sign {options} {spell([name])}")


# -- maintenance, and commands beside a root -----------------------------------

def command_maintenance(run: Run) -> None:
    """Put the flag up or down, without the lock, as a run may hang; or serve the page."""
    flag, outcome, action = run.settings.maintenance.flag, run.outcome, run.flags.action
    if action == "serve":
        serve_maintenance(run)
        return
    with looking(run) as store:
        owner = store.maintenance()
        outcome.changed = bool(owner)
        if action == "on":  # a run's flag becomes the person's, and stays
            outcome.changed = not owner or "deploy_id" in owner
        if outcome.changed and not run.flags.dry_run:
            if action == "on":
                owner = {"by": run.by, "since": format_time(), "note": run.note or None}
                store.write(flag, json.dumps(owner).encode("ascii"), 0o644)
            else:
                store.forget(flag)
    conclude(run, f"maintenance is {action}: {run.root}/{flag}")
    run.console.say(outcome.message, shown="")


def serve_maintenance(run: Run) -> None:
    """Answer 503 and the page to everybody, and 200 where a balancer asks, until a signal."""
    import socket
    from selectors import EVENT_READ, EVENT_WRITE, DefaultSelector
    flags, listen, path = run.flags, run.flags.listen, run.flags.health or "/healthz"
    if not listen or path[0] != "/":
        raise UsageError("maintenance serve needs one --listen HOST:PORT, and --health a /PATH",
                         "such as --listen 127.0.0.1:8503 --health /healthz")
    healthy = re.compile(rb"(GET|HEAD) %b[ ?]" % re.escape(os.fsencode(path)))
    status = f"503 Service Unavailable\r\nRetry-After: {run.settings.maintenance.retry_after}"
    page = read_file(flags.page, MAX_CONFIG_BYTES) if flags.page else b"Down for maintenance.\n"

    def answer(client: Any) -> Iterator[int]:
        request = b""
        while not re.search(rb"\n\r?\n", request) and len(request) < READ_BYTES:
            yield EVENT_READ  # for which the loop waits
            request += client.recv(READ_BYTES) or b"\n\n"
        line, body = ("200 OK", b"ok\n") if healthy.match(request) else (status, page)
        text = f"HTTP/1.1 {line}\r\nContent-Type: text/html; charset=utf-8\r\n" \
            f"Content-Length: {len(body)}\r\nCache-Control: no-store\r\nConnection: close\r\n\r\n"
        data = text.encode("ascii") + (b"" if request[:5] == b"HEAD " else body)
        while data:
            yield EVENT_WRITE
            data = data[client.send(data):]
        client.shutdown(socket.SHUT_WR)
        yield EVENT_READ
        while client.recv(READ_BYTES):  # closing it unread could lose the answer
            yield EVENT_READ

    run.console.say(f"503 for everybody on {listen}")
    if flags.dry_run:
        return
    address = read_value("address", listen)
    family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
    with socket.socket(family) as listener, DefaultSelector() as selector, suppress(Interrupted):
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(128)
        listener.setblocking(False)
        selector.register(listener, EVENT_READ)
        while True:
            run.interrupts.wait(1.0, selector.fileno())  # a client's limit is no finer
            ready = {key.fileobj for key, _ in selector.select(0)}
            for client, _, _, visit in list(selector.get_map().values())[1:]:  # listener first
                with suppress(StopIteration, OSError):  # it has its answer, or is gone
                    if client in ready:
                        selector.modify(client, next(visit[0]), visit)
                    if time.monotonic() < visit[1]:
                        continue
                selector.unregister(client)
                client.close()
            if listener in ready:
                try:
                    client, _ = listener.accept()
                    client.setblocking(False)
                    ends_seconds = time.monotonic() + CLIENT_SECONDS
                    selector.register(client, EVENT_READ, (answer(client), ends_seconds))
                except OSError:
                    run.interrupts.wait(0.1)  # too many at once


def command_pack(run: Run) -> None:
    """Pack a directory into a reproducible .tar.gz, with its .sha256 beside it."""
    flags, outcome = run.flags, run.outcome
    directory = absolute(flags.directory)
    version = f"-{flags.release_version}" if flags.release_version else ""
    shown = flags.output or f"{os.path.basename(directory)}{version}.tar.gz"
    target = absolute(shown)
    if not os.path.isdir(directory):
        raise UsageError(f"{directory} is not a directory",
                         "name the directory to pack: deploy.py pack DIRECTORY")
    if flags.output == "-":
        raise UsageError("an artifact needs a name", "name it: pack -o FILE")
    refuse_odd_files(target, f"{target}.sha256")
    text, warnings = f"pack {directory} into {target} and {target}.sha256", []
    outcome.extra["plan"], message = [{"name": "pack", "description": text}], f"would {text}"
    if not flags.dry_run:
        packed, warnings = pack(directory, target, run.settings,
                                lambda done: run.interrupts.check(), keep_mtimes=flags.keep_mtimes)
        outcome.extra["artifact"] = dict(packed, path=portable(target))
        message = f"{portable(shown)}: {count(packed['files'], 'file')}, " \
            f"{format_size(packed['size'])}, sha256 {packed['sha256']}"
    outcome.changed = True
    conclude(run, message)
    for warning in warnings:
        run.console.warn(warning)


MINIMAL = """\
[deploy]
application = {name}
root = {root}

{unit_mark}[service:{name}]
{unit_mark}unit = {unit}

{url_mark}[probe:{name}]
{url_mark}url = {url}
{url_mark}deadline = 30s
"""


def command_config(run: Run) -> None:
    """Show every option with its value and where it came from."""
    flags, deploy = run.flags, run.settings.deploy
    values = run.outcome.extra["config"] = {}
    if flags.example:
        lines = ["# deploy.ini: every option with its default. Remove a leading # to set one.",
                 "# Durations: 500ms, 3s, 2m, 1h. Sizes: 64k, 10M, 2G. Lists: one item a line.",
                 "# Relative paths are relative to this file. Comments stand on their own lines."]
        for section, about, options in SECTIONS:
            named = section.replace("*", "NAME")
            lines += ["", f"# {about}", f"#[{named}]" if named != section else f"[{section}]"]
            for option in options.values():
                lines.append(f"# {option.help} ({option.takes})")
                lines.append(f"#{option.key.replace('*', 'NAME')} = {option.default}".rstrip())
        run.console.raw_result("\n".join([*lines, ""]))
        return
    if flags.minimal:
        name = deploy.application or "shop"
        run.console.raw_result(MINIMAL.format(
            name=name, root=deploy.root or f"/srv/{name}", unit=flags.unit or f"{name}.service",
            url=flags.url or "http://127.0.0.1:8080/health", unit_mark="" if flags.unit else "#",
            url_mark="" if flags.url else "#"))
        return
    rows = []
    for section, key, text, origin in run.settings.rows:
        shown = text.replace("\n", " | ")
        if text and (section in ("env", "vars") or key.startswith("header.")) \
                and SECRET_NAME.search(key.lower()):
            shown = MASK
        rows.append((section, key, shown, origin))
        values[f"{section}.{key}"] = {"value": shown, "origin": origin}
    given = {name.partition(":")[0] for name, _ in run.settings.given}
    given.update(("deploy", "artifact", "limits"))
    inert = run.outcome.extra["inert"] = [name.replace("*", "NAME") for name, _, _ in SECTIONS
                                          if name.partition(":")[0] not in given]
    run.outcome.message = count(len(rows), "option")
    run.console.result(render_table(("SECTION", "KEY", "VALUE", "FROM"), rows))
    run.console.result(render_table(("NOT CONFIGURED: NOTHING OF IT RUNS",), [[", ".join(inert)]]))


def share_of(host: str, application: str) -> float:
    """Return a host's share of --splay, 0 to 1: evenly spread over the hosts, always the same."""
    digest = hashlib.sha256(f"{host} {application}".encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") / 2 ** 64


def wait_splay(run: Run) -> None:
    """Wait this host's share of --splay."""
    name = run.application if run.root else ""  # raises where none is given, before the wait
    seconds = read_value("duration", run.flags.splay) * share_of(os.uname().nodename, name)
    waiting = "would wait" if run.flags.dry_run else "waiting"
    text = f"{waiting} {format_seconds(seconds)} of --splay {run.flags.splay}"
    run.console.say(text)
    if not run.flags.dry_run:
        run.console.working(text, seconds)
        run.interrupts.wait(seconds)


def command_help(run: Run) -> None:
    """Show what this program is, or a page of HELP; `help COMMAND` is answered before."""
    topic = run.flags.topic
    text = f"{(__doc__ or '').strip()}\n\nPages: deploy.py help {', '.join(HELP)}, or a command\n"
    if topic and topic not in HELP:
        raise no_such("help on", topic, [*HELP, *COMMAND_HELP])
    text = HELP.get(topic, text)
    run.outcome.extra["help"] = {"topic": topic, "text": text}
    run.console.raw_result(text)


def command_completion(run: Run) -> None:
    """Print the script by which bash or zsh completes this program's words."""
    flags = [(name, flag) for flag in FLAGS for name in flag.names if not flag.is_argument]
    everywhere = " ".join(name for name, flag in flags if not flag.commands)
    cases = []
    for command in COMMAND_HELP:
        own = " ".join(name for name, flag in flags if command in flag.commands)
        cases.append(f'        {command}:-*) offer="{own} {everywhere}" ;;')
    script = run.outcome.extra["completion"] = COMPLETION % {
        "taking": "|".join(name for name, flag in flags if flag.metavar),
        "commands": "|".join(COMMAND_HELP), "names": " ".join(COMMAND_HELP),
        "everywhere": everywhere, "cases": "\n".join(cases)}
    run.console.raw_result(script)


# ============================================================================
# 17  Reports
#    What a run reports once it has ended: metrics, notifications, a trace, the
#    summary, the error, the one JSON object.  Nothing here changes the outcome.
# ============================================================================

def result_object(error: Optional[DeployError], run: Any = None, exit_code: int = EXIT_OK,
                  seconds: float = 0.0) -> Json:
    """Make the one object of --json; `run` is None where no command was run."""
    outcome, root, warnings = Outcome(""), "", []
    if run is not None:
        outcome, root, warnings = run.outcome, run.place, run.console.warnings
    failed, is_dry = error is not None, bool(run and run.flags.dry_run)
    statuses = [done.status for done in (*outcome.steps, *outcome.checks)]
    return dict(
        outcome.extra, ok=not failed, changed=outcome.changed, failed=failed,
        command=outcome.command or None, exit_code=exit_code,
        msg=error.message if error else outcome.message,
        application=run.application if root else None,
        root=portable(root) or None,
        release=outcome.release, previous=outcome.previous, rolled_back=outcome.rolled_back,
        deploy_id=run and run.deploy_id, dry_run=is_dry,
        steps=[step.to_json() for step in outcome.steps],
        checks=[check._asdict() for check in outcome.checks],
        summary={"checked": len(outcome.checks), "warnings": len(warnings),
                 "changed": max(statuses.count("done"), int(outcome.changed and not is_dry)),
                 "failed": max(statuses.count("failed") + statuses.count("fail"), int(failed))},
        warnings=warnings, seconds=round(seconds, 3),
        error={"message": error.message, "hint": error.hint} if error else None)


# -- metrics -------------------------------------------------------------------

def write_metrics(run: Run, ended: str, result: Json) -> None:
    """Update the application's file in [metrics] textfile_dir, where others may write too."""
    path, lines = run.settings.metrics.textfile_dir, []
    samples: Json = {metric: {} for metric, _, _ in METRICS}  # by metric and labels
    name = re.sub(r"[^A-Za-z0-9._-]", lambda match: f"_{ord(match.group()):x}", run.application)
    name = f"deploy_{name[:200]}.prom"
    labels = re.escape(label(run)) + r'(?:,[a-z0-9]+="(?:[^"\\\n]|\\[\\n"])*")*'
    sample = rf"(?m)^(\w+)\{{({labels})\}} (\d{{1,20}}(?:\.\d+)?)$"
    try:
        with Directory(path) as directory:
            with suppress(OSError):  # a filesystem without such locks (NFS)
                for _ in range(100):  # two runs at once both count; none waits over 1 s
                    with suppress(BlockingIOError):
                        fcntl.flock(directory.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        break
                    time.sleep(0.01)
            with suppress(OSError):  # none, or none of ours: it is replaced
                data = read_file(name, MAX_CONFIG_BYTES, os.O_NOFOLLOW, directory.descriptor)
                for metric, key, value in re.findall(sample, data.decode("utf-8", "replace")):
                    if metric in samples:
                        samples[metric][key] = float(value)
            if result["exit_code"] not in (EXIT_BUSY, EXIT_USAGE):
                replace_samples(samples, run, result)
            # A counter that does not begin with 0 would not show its first increase.
            counts = samples["deploy_runs_total"]
            for word in RUN_RESULTS:
                key = label(run, result=word)
                counts[key] = counts.get(key, 0) + (word == ended)
            for metric, kind, text in METRICS:
                if samples[metric]:
                    lines += [f"# HELP {metric} {text}", f"# TYPE {metric} {kind}"]
                for key, value in samples[metric].items():
                    lines.append(f"{metric}{{{key}}} {value:.3f}")
            directory.write(name, "\n".join([*lines, ""]).encode("utf-8"), 0o644)
    except OSError as error:
        run.console.warn(f"metrics: cannot write {path}/{name}: {reason(error)}")


def label(run: Run, **labels: str) -> str:
    """Write a sample's labels, escaped as the text format demands."""
    pairs = []
    for name, value in dict(app=run.application, **labels).items():
        text = value.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
        text = re.sub(r'[\\"]', r"\\\g<0>", text).replace("\n", "\\n")
        pairs.append(f'{name}="{text}"')
    return ",".join(pairs)


def replace_samples(samples: Json, run: Run, result: Json) -> None:
    """Replace the samples of the run before by this run's; what it does not measure stays."""
    command, now = run.flags.command, time.time()
    # Nothing to do is no deployment, unless the last one failed.
    is_news = result["changed"] or result["failed"] or \
        not all(samples["deploy_last_deployment_success"].values())
    values = dict(timestamp_seconds=now, success=result["ok"], exit_code=result["exit_code"],
                  duration_seconds=result["seconds"])
    families = ["run"]
    # A recovery that ends a deployment is that deployment's verdict.
    if is_news and (command in ("deploy", "sync", "activate", "rollback")
                    or command == "recover" and run.outcome.result):
        families.append("deployment")
    for family in families:
        for name, value in values.items():
            samples[f"deploy_last_{family}_{name}"] = {label(run, command=command): value}
    if result["ok"]:
        samples["deploy_last_success_timestamp_seconds"] = {label(run): now}
    steps = samples["deploy_step_duration_seconds"] = {}
    for step in run.outcome.steps:
        # No release in a label: each would be one more series.  The way back repeats names.
        key = label(run, step=re.sub("^prune:.*", "prune", step.name))
        steps[key] = steps.get(key, 0) + step.seconds
    info = samples["deploy_release_info"] = {}
    activated = samples["deploy_release_activated_timestamp_seconds"] = {}
    with suppress(*FAILURES), looking(run) as store:
        release = store.current().release
        record = store.records()[0].get(release or "")
        if release:
            sha256 = record.sha256 if record else ""
            info[label(run, release=portable(release), sha256=sha256)] = 1
        if record and record.activated_at:
            activated[label(run)] = seconds_of(record.activated_at)


# -- notifications -------------------------------------------------------------

NOTIFY_SECONDS = 3.0
NOTIFY_GRACE_SECONDS = 0.3  # a command's, between TERM and KILL

# type: the keys of which exactly one must be given, its other keys, the body that it sends.
URL_KEYS = ("url", "url_file")
CHAT_KEYS = ("tls_ca", "proxy")
NOTIFIERS = {
    "webhook": (URL_KEYS, ("token_file", "header", "body", *CHAT_KEYS),
                '{"event": "${event}", "text": "${text}", "result": ${result}}'),
    "slack": (URL_KEYS, CHAT_KEYS, '{"text": "${text}"}'),
    # An Adaptive Card, as a Workflows webhook takes it.
    "teams": (URL_KEYS, CHAT_KEYS, """{"type": "message", "attachments": [{
        "contentType": "application/vnd.microsoft.card.adaptive", "content": {
            "$schema": "http://adaptivecards.io/schemas/adaptive-card.json",
            "type": "AdaptiveCard", "version": "1.4",
            "body": [{"type": "TextBlock", "text": "${text}", "wrap": true}]}}]}"""),
    "discord": (URL_KEYS, CHAT_KEYS,
                '{"content": "${text}", "allowed_mentions": {"parse": []}}'),
    "email": (("to",), ("from", "smtp"), ""),
    "command": (("command",), (), ""),
}
JSON_BEGINS = ("{", "[")
MOST_CHARACTERS = 2000  # of a text that is posted: Discord's limit

# The names that a text may use as ${name}, beside DEPLOY_*.
NOTE_WORDS = ("event message host command application release version previous previous_version "
              "deploy_id exit_code seconds note").split()


def check_notifier(settings: Any) -> str:
    """Say what is wrong with a [notify:NAME], without sending anything."""
    needs, takes, _ = NOTIFIERS[settings.type]
    others = {key for row in NOTIFIERS.values() for key in row[0] + row[1]} - {*needs, *takes}
    unused = meaningless(settings, others, f"type = {settings.type}")
    if unused:
        return unused
    if sum(key in settings.given for key in needs) != 1:
        return f"type = {settings.type} needs {' or '.join(needs)}"
    words = dict.fromkeys([*NOTE_WORDS, *Context("", "", "", "", "", "", "").variables()], "1")
    key, headers = "smtp", {f"header.{name}": value for name, value in settings.header.items()}
    try:
        split_address(settings.smtp)
        for key, template in dict(headers, text=settings.text, body=settings.body).items():
            rendered = render_template(template, words, key)
        if settings.body.startswith(JSON_BEGINS):
            json.loads(rendered)
    except StepFailed as error:
        return error.message
    except ValueError as error:
        return f"{key}: {error}"
    wrong = settings.url and wrong_target(settings.url)
    return f"url: {wrong}" if wrong else wrong_header(settings.header)


def wrong_target(url: str) -> str:
    """Say what is wrong with a URL to post to, without repeating it: it may hold a secret."""
    try:
        if parse_url(url).userinfo:
            return "expected no user and password in it; a token goes into token_file"
    except ValueError:
        return "expected http://HOST/... or https://HOST/..."
    return ""


def deliver(run: Run, sending: Dict[str, Callable[[Conversation], Json]]) -> None:
    """Send in processes of their own, side by side; warn of each failure, by its key."""
    run.interrupts.is_closed = True
    with ExitStack() as stack:
        begun = {failure: stack.enter_context(Conversation(send, NOTIFY_SECONDS))
                 for failure, send in sending.items()}
        for failure, asking in begun.items():
            # A receiver may answer anything, at any length.
            why = run.console.secrets.mask(asking.answer(run.interrupts)["error"])
            if why:
                run.console.warn(f"{failure}: {why[:2 * EVIDENCE_CHARACTERS]}")


def notify(run: Run, ended: str, result: Json) -> None:
    """Send each notifier the events that it asks for, of two: what was recovered, and the end."""
    events = {"recovered"} if result.get("recovered") else set()
    # Without a root nothing remembers a refusal, and a timer would send it at every tick.
    if not (run.outcome.is_repeated or ended == "refused" and is_untouched(run)):
        events.add("failed" if ended in ("interrupted", "internal_error") else ended)
    result = run.console.secrets.mask_json(result)
    deliver(run, {f"notify {settings.name}: not told of {event}":
                  partial(tell, run=run, settings=settings, event=event, result=result)
                  for settings in run.settings.notify.values()
                  for event in events.intersection(settings.events)})


def tell(asking: Conversation, run: Run, settings: Any, event: str, result: Json) -> Json:
    """Notify of an event, in a process of its own; returns as `post` does."""
    context, words = describe_event(run, event, result)
    if settings.type == "slack":
        import html
        # Or a value would call everybody in the channel (<!channel>), or pass for a link.
        words = {name: html.escape(value, quote=False) for name, value in words.items()}
    where = f"[notify:{settings.name}]"
    text = render_template(settings.text, words, where)
    if settings.type == "email":
        subject = "{application} on {host}: {event}".format(**words)
        return send_mail(asking, settings, subject, text)
    if settings.type == "command":
        # As in Guard: what the run's own waits on is closed in this process.
        run.interrupts = Interrupts()
        run.settings.env.update(DEPLOY_EVENT=event, DEPLOY_TEXT=text)
        ended = start_command(run, context, f"notify {settings.name}", settings.command,
                              timeout_seconds=NOTIFY_SECONDS - 2 * NOTIFY_GRACE_SECONDS,
                              kill_after_seconds=NOTIFY_GRACE_SECONDS)
        why = ": ".join([f"{spell(ended.argv)} {ended.verdict()}", *ended.tail[-1:]])
        return {} if ended.ok else {"error": why}
    settings.header = {name: render_template(value, words, where)
                       for name, value in settings.header.items()}
    secrets = {"url": settings.url, "token": ""}
    for name in secrets:
        path = getattr(settings, f"{name}_file")
        if path:
            asking.at(f"reading {name}_file")
            secrets[name] = read_text(path).strip()
            if not secrets[name]:
                return {"error": f"{name}_file is empty"}
    if wrong_target(secrets["url"]):
        return {"error": "url_file holds no https:// URL"}
    if secrets["token"]:
        settings.header["Authorization"] = f"Bearer {secrets['token']}"
    body = settings.body or NOTIFIERS[settings.type][2]
    words["text"] = text[:MOST_CHARACTERS]
    if body.startswith(JSON_BEGINS):  # then what stands in it is escaped
        words = {name: json.dumps(value)[1:-1] for name, value in words.items()}
    else:
        settings.header.setdefault("Content-Type", "text/plain; charset=utf-8")
    words["result"] = json.dumps(result)
    return post(asking, secrets["url"], settings, render_template(body, words, where))


def post(asking: Conversation, target: str, settings: Any, body: str) -> Json:
    """Post a body; returns {"error": why} where that failed, else {}."""
    data = body.encode("utf-8", "backslashreplace")
    response = asking.request("POST", parse_url(target), {
        "Content-Type": "application/json", "Content-Length": str(len(data))}, settings, data)
    if 200 <= response.status < 300:
        return {}
    answer = response.read(8 * EVIDENCE_CHARACTERS).decode("utf-8", "replace")
    return {"error": f"status {response.status}: {answer}".rstrip(" :")}


def describe_event(run: Run, event: str, result: Json) -> Tuple[Context, Dict[str, str]]:
    """Return the context of the release that was to go live, and what ${name} in texts is."""
    facts, lines, before = run.facts, [result["msg"]], None
    context = Context(run.application, run.place, "", "", run.place, "", run.deploy_id)
    if facts is not None:
        release = run.outcome.release if result["command"] == "recover" else None
        before = facts.records.get(facts.current.release or "")
        context = context_for(facts, run.plan.to_release if run.plan else release)
    if event == "recovered":
        lines = result.get("recovered") or lines  # nothing where a person settled it
    words = dict(
        context.variables(), **context._asdict(), event=event, command=result["command"],
        message="; ".join(filter(None, [*lines, run.note])), host=os.uname().nodename,
        previous_version=before.version if before else "", exit_code=str(result["exit_code"]),
        seconds=f"{result['seconds']:.1f}")
    return context, {
        name: run.console.clean(value).encode("utf-8", "backslashreplace").decode("utf-8")
        for name, value in words.items() if isinstance(value, str)}


def send_mail(asking: Conversation, settings: Any, subject: str, text: str) -> Json:
    """Send the text by a mail server (RFC 5321); returns as `post` does."""
    import smtplib
    from email.mime.text import MIMEText
    from email.utils import formatdate, make_msgid
    host = os.uname().nodename
    sender = getattr(settings, "from") or f"deploy@{host}"
    message = MIMEText(text + "\n", "plain", "utf-8")
    for name, value in (
            ("From", sender), ("To", ", ".join(settings.to)), ("Subject", subject),
            ("Date", formatdate()), ("Message-ID", make_msgid(domain=host)),
            ("Auto-Submitted", "auto-generated")):
        message[name] = value
    asking.connect(split_address(settings.smtp))
    asking.at("talking to the mail server")
    server = smtplib.SMTP(local_hostname=host)
    server.sock = asking.socket
    code, answer = server.getreply()
    if code != 220:
        return {"error": f"the mail server said {code} {answer.decode('utf-8', 'replace')}"}
    refused = server.sendmail(sender, settings.to, message.as_string())
    server.putcmd("quit")  # the mail is delivered, whatever the answer to this
    return {"error": f"the mail server refused {', '.join(refused)}"} if refused else {}


# -- traces --------------------------------------------------------------------

def send_trace(run: Run, ended: str, result: Json) -> None:
    """Send a span for the run and one for each step, by OTLP/HTTP in JSON."""
    mask, caller, target = run.console.secrets.mask, traceparent(), run.settings.trace.otlp
    _, trace, own, sampled = run.traceparent.split("-")
    whole = target == "environment" and environment("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
    if target == "environment":
        target = whole or environment("OTEL_EXPORTER_OTLP_ENDPOINT")
    if not target or not int(sampled, 16) & 1 \
            or environment("OTEL_SDK_DISABLED").lower() == "true":
        return
    if not whole and not target.endswith("/v1/traces"):
        target = target.rstrip("/") + "/v1/traces"

    def describe(name: str, begun_seconds: float, taken_seconds: float, why: str,
                 **fields: Any) -> Json:
        begun_ns = int(begun_seconds * 10 ** 9)
        return {"traceId": trace, "name": name, "kind": 1, "startTimeUnixNano": str(begun_ns),
                "endTimeUnixNano": str(begun_ns + int(taken_seconds * 10 ** 9)),
                "status": {"code": 2, "message": mask(why)} if why else {"code": 1}, **fields}

    def attributes(**texts: Any) -> List[Json]:
        return [{"key": key.replace("_", ".", 1), "value": {"stringValue": mask(str(text))}}
                for key, text in texts.items()]

    exit_attribute = {"key": "deploy.exit_code", "value": {"intValue": str(result["exit_code"])}}
    spans = [describe(
        f"deploy.py {run.flags.command}", time.time() - result["seconds"], result["seconds"],
        result["msg"] if result["failed"] else "", spanId=own,
        attributes=[exit_attribute, *attributes(
            deploy_id=run.deploy_id, deploy_release=result["release"], deploy_result=ended)])]
    if caller:
        spans[0]["parentSpanId"] = caller.split("-")[2]
    spans += [describe(step.name, step.started_at, step.seconds,
                       step.detail if step.status == "failed" else "",
                       spanId=os.urandom(8).hex(), parentSpanId=own)
              for step in run.outcome.steps if step.started_at]
    content = json.dumps({"resourceSpans": [{
        "resource": {"attributes": attributes(
            service_name=environment("OTEL_SERVICE_NAME") or run.application)},
        "scopeSpans": [{"scope": {"name": "deploy.py", "version": VERSION}, "spans": spans}]}]})
    from urllib.parse import unquote
    pairs = re.findall(r"([^=,\s]+)\s*=([^,]*)", environment("OTEL_EXPORTER_OTLP_HEADERS"))
    headers = {name: unquote(value.strip()) for name, value in pairs}
    settings = SimpleNamespace(header=headers, tls_ca="", proxy="none")
    deliver(run, {"trace: not sent": lambda asking: post(asking, target, settings, content)})


# -- all of it -----------------------------------------------------------------

# How a failed run ended, by its exit code; of 6 the history knows.
ENDS = {EXIT_FAILED: "failed", EXIT_USAGE: "usage", EXIT_PREFLIGHT: "refused",
        EXIT_ARTIFACT: "refused", EXIT_ROLLED_BACK: "rolled_back", EXIT_PROBLEM: "failed",
        EXIT_INTERNAL: "internal_error", EXIT_BUSY: "busy"}


def report_run(run: Run, exit_code: int, seconds: float) -> None:
    """Report how a run ended.  Its lock is free by now; whoever cannot be told is a warning."""
    outcome, console, settings, command = run.outcome, run.console, run.settings, run.flags.command
    error, dry_run, writes, end = outcome.error, run.flags.dry_run, command in ORDER, None
    ended = outcome.result
    if exit_code == EXIT_ROLLBACK_FAILED:
        ended = ended or "rollback_failed"  # or left_live
    elif error:
        ended = ENDS.get(exit_code, "interrupted")
    elif command == "recover" or not ended:
        ended = "recovered" if ended or outcome.extra.get("recovered") else "unchanged"
    result = result_object(error, run, exit_code, seconds)
    if not dry_run and run.is_believed and writes:
        for name, send, is_wanted in (
                ("metrics", write_metrics, settings.metrics.textfile_dir and settings.deploy.root),
                ("notify", notify, settings.notify),
                ("trace", send_trace, settings.trace.otlp)):
            try:
                if is_wanted:
                    send(run, ended, result)
            except Exception as problem:  # a defect here must not make what is done exit 70
                console.warn(step_error(problem, name).message)
            result["summary"]["warnings"] = len(console.warnings)
    if not dry_run:
        end = {"event": "run_failed" if error else "run_done", "result": ended}
    console.working(result["msg"], state="" if error else "READY=1")
    if outcome.steps or outcome.checks:
        text = "checked {checked}, changed {changed}, failed {failed}".format(**result["summary"])
        if console.warnings:
            text += f", {count(len(console.warnings), 'warning')}"
        console.say(f"{text} in {format_seconds(seconds)}", None if error else end)
    elif not error and writes:
        console.say(outcome.message, end, shown="")
    if error and console.quiet and outcome.is_repeated and outcome.result == "refused":
        console.say(error.message, end, level="error", shown="")  # only logged: cron mailed it
    elif error:
        console.error(error.message, error.hint, end)
    elif console.quiet and (outcome.changed or console.warnings) and not dry_run:
        console.release_held()
    if console.json_mode:
        console.json_result(result)


# ============================================================================
# 18  Command line and main
#    Parses, loads, runs one command, and turns whatever happens into an exit
#    code, two lines of error, or one JSON object.
# ============================================================================

COMMANDS = {name: command_move if name in MOVED else globals()[f"command_{name}"]
            for name in COMMAND_HELP}

# About the program itself: they read no configuration, so a broken one cannot stop them.
TELLING = ("help", "completion")
# Commands that run no program and write nothing in a root: root may use them with a configuration
# that others could have written.  `preflight` does run some, and judges that itself.
LOOKING = TELLING + ("config", "status", "releases", "history", "show", "verify", "diff", "report")


class HelpAsked(Exception):
    """--help or --version: the text to show instead of running a command."""


ACTIONS = {"show_help": "help", "show_version": "version"}  # argparse's own


class Parser(argparse.ArgumentParser):
    """argparse, but what it has to say is raised, for main() to show."""

    version = f"deploy.py {VERSION}"

    def __init__(self, **settings: Any) -> None:
        # Speed: without a width, every start would import shutil and lzma to ask for it.
        super().__init__(add_help=False, formatter_class=lambda prog: (
            argparse.RawDescriptionHelpFormatter(prog, max_help_position=30, width=79)), **settings)
        self.color = False  # Python 3.14 would colour the help

    def error(self, message: str) -> Any:
        """Raise UsageError, with the nearest word that may stand there."""
        match = re.search(r"(?:choice: '|arguments: (?=-))([^\s'=]+)", message)
        word, names = match.group(1) if match else "", list(COMMANDS)
        if word.startswith("-"):
            names = [name for flag in FLAGS for name in flag.names]
        hint = f"see {self.prog} --help: the flags of a command stand behind it"
        if word not in names:
            hint = nearest(word, names, hint)
        raise UsageError(re.sub(r"\Aargument | \(choose from .*", "", message), hint)

    def _get_option_tuples(self, option_string: str) -> Any:
        # No abbreviations.  Before 3.8 allow_abbrev=False forbids joined short options as well.
        short = not option_string.startswith("--")
        return super()._get_option_tuples(option_string) if short else []  # type: ignore

    def _print_message(self, message: str, file: Any = None) -> None:
        raise HelpAsked(message)


def add_flag(group: Any, flag: Flag) -> Any:
    """Add one row of FLAG_TABLE to a parser or to a group of one."""
    values: List[str] = []  # from before and behind the command: `append` would lose the former

    def read(text: str) -> Any:
        # A shell variable that was never set must not pass for a flag that was not given.
        if not text:
            raise argparse.ArgumentTypeError("given, but empty")
        if flag.metavar == "DURATION" and re.match(r"[0-9]+\Z", text):
            text += "s"
        try:
            if flag.kind:
                read_value(flag.kind, text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text!r}: {error}")
        values.append(text)
        return values if flag.metavar.endswith("...") else text

    # A common flag has no default: the command's parser would put it over what stood before.
    kind: Json = {"default": None if flag.commands else argparse.SUPPRESS, "help": flag.help}
    if flag.metavar:
        kind.update(metavar=flag.metavar.strip("[]."), type=read)
    else:
        kind["action"] = ACTIONS.get(flag.dest, "store_true")
    if not flag.is_argument:
        kind["dest"] = flag.dest
    elif "[" in flag.metavar:
        kind["nargs"] = "*" if "..." in flag.metavar else "?"
    return group.add_argument(*flag.names, **kind)


def parse_command_line(argv: List[str]) -> Any:
    """Read the command line by the tables; UsageError for every mistake, HelpAsked for help."""
    common = Parser()
    group = common.add_argument_group("global options, before or after the command")
    everywhere = {flag.dest: add_flag(group, flag) for flag in FLAGS if not flag.commands}
    parser = Parser(prog="deploy.py", usage="deploy.py [global options] COMMAND [options]",
                    description="Take an artifact live on this host, and back.\n\n"
                                "example:\n  deploy.py --root /srv/shop deploy shop-1.4.2.tar.gz",
                    epilog="more: deploy.py COMMAND --help, deploy.py help", parents=[common])
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands",
                                     prog="deploy.py", parser_class=Parser)
    commands.required = True  # 3.6 has no keyword for it
    # Speed: making all parsers takes a third of a short run; only --help needs them all.
    asks_help = "--help" in argv or any(
        "h" in word and word[0] == "-" and word[1] != "-" for word in argv)  # such as -nh
    for name in [name for name in COMMANDS if asks_help or name in argv]:
        own = [flag for flag in FLAGS if name in flag.commands]
        usage = " ".join([name] + [flag.metavar for flag in own if flag.is_argument])
        text, example = COMMAND_HELP[name]
        command = commands.add_parser(
            name, parents=[common], conflict_handler="resolve", help=text,
            usage=f"deploy.py [global options] {usage}",
            description=f"{text}\n\nexample:\n  deploy.py {example}")
        for flag in own:
            add_flag(command, flag)
        # That of sync has taken its name away.
        everywhere["show_version"].option_strings = ["--version"]
    flags = parser.parse_args(argv)
    for flag in FLAGS:
        vars(flags).setdefault(flag.dest, None)
    if flags.delegate:
        raise UsageError("--delegate FILE stands first, as two words, and once",
                         "deploy.py --delegate FILE COMMAND ...")
    if flags.command == "help" and flags.topic in COMMANDS and flags.topic not in HELP:
        parse_command_line([flags.topic, "--help"])
    return flags


# -- the same file as an Ansible module --------------------------------------

# Ansible starts a module that says WANT_JSON with one argument: a JSON file of the parameters.
# It decides these by check mode, diff mode and verbosity, or they concern a terminal.
NO_PARAMETERS = ("dry_run json verbose quiet no_color detailed_exitcode debug delegate "
                 "show_help show_version").split()
# State and history are made of these: no_log cannot hide them.
NOT_HIDDEN = "release release_version sha256 id names to root config".split()


def read_parameters(path: str) -> Optional[Json]:
    """Read the parameters from Ansible; None for any other file, {} for JSON that is damaged."""
    data = b""
    with suppress(OSError):
        data = read_file(path, MAX_CONFIG_BYTES)
    if not data.lstrip().startswith(b"{"):
        return None
    try:
        parameters = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError):
        return {}
    return parameters if "_ansible_module_name" in parameters else None


class ModuleConsole(Console):
    """Answers Ansible with one object on stdout; whatever else is printed goes to stderr."""

    def __init__(self, parameters: Json) -> None:
        super().__init__()
        self.json_mode = True
        self._shows_diff = parameters.get("_ansible_diff")
        self._traceback: Json = {}
        self._answer = -1
        with suppress(OSError):  # one of the two may be closed
            self._answer = os.dup(1)
            os.dup2(2, 1)

    def traceback(self) -> None:
        """Keep the traceback for the answer."""
        import traceback
        self._traceback = {"exception": traceback.format_exc()}

    def json_result(self, value: Json) -> None:
        """Answer with the object of --json and what Ansible looks for."""
        answer = dict(value, rc=value["exit_code"], **self._traceback)
        if self._shows_diff and self.diff and not value["failed"]:
            answer["diff"] = self.diff
        if value["error"] and value["error"]["hint"]:
            answer["msg"] += f" (hint: {value['error']['hint']})"
        text = json.dumps(self.secrets.mask_json(answer)) + "\n"
        with suppress(OSError):
            write_all(self._answer, text.encode("ascii"))

    def _write(self, *_: Any) -> None:
        pass


def parameters_of(command: str) -> Dict[str, Flag]:
    """Return the module's parameters for a command, by name: each is a flag."""
    return {flag.dest: flag for flag in FLAGS
            if command in (flag.commands or (command,)) and flag.dest not in NO_PARAMETERS}


def module_argv(parameters: Json, secrets: Secrets) -> List[str]:
    """Translate a task's parameters into the command line that does the same."""
    if not parameters:
        raise UsageError("the file with the parameters is no JSON object", "run the task again")
    given = {name: value for name, value in parameters.items()
             if not name.startswith("_ansible_") and value is not None}
    command = given.pop("command", "deploy")
    commands = [name for name in COMMANDS if name not in TELLING]
    if command not in commands:
        raise UsageError(f"command: there is no {command!r}", nearest(str(command), commands))
    argv, arguments, known = ["--json", command], ["--"], parameters_of(command)
    if parameter_texts("_ansible_check_mode", "", parameters.get("_ansible_check_mode") or False):
        argv.append("-n")
    if parameters.get("_ansible_verbosity", 0) >= 3:
        argv.append("--debug")
    for name, value in given.items():
        if name not in known:
            raise UsageError(f"unknown parameter {name!r} of the command {command}",
                             nearest(name, known, f"it takes {', '.join(known)}"))
        flag = known[name]
        texts = parameter_texts(name, flag.metavar, value)
        if parameters.get("_ansible_no_log") and name not in NOT_HIDDEN:
            for text in texts:
                hidden = text.partition("=")[2]
                for part in (text, hidden, *re.findall(r"[^\s=\"']{9,}", hidden)):
                    secrets.add(part)
        if flag.is_argument:
            arguments += texts
        else:
            argv += [f"{flag.names[-1]}={text}" if flag.metavar else flag.names[-1]
                     for text in texts]
    argv += arguments if arguments[1:] else []
    if re.search("[\0\ud800-\udc7f\udd00-\udfff]", "".join(argv)):
        raise UsageError("a parameter holds a character that no argument can have",
                         "write it without")
    return [native(word) for word in argv]


def parameter_texts(name: str, metavar: str, value: Any) -> List[str]:
    """Write a parameter's value as texts, one for each word of the command line."""
    if not metavar:
        try:
            return [""] if read_value("bool", str(value)) else []
        except ValueError as error:
            raise UsageError(f"{name}: {error}", "yes, no, true, false, 1 or 0")
    if name == "set" and isinstance(value, dict):
        return [f"{key}=" + "\n".join(
            # YAML reads 0640 as the number 416, and 1.10 as 1.1.
            parameter_text(f"set: {key}", item, bool, str if key.endswith(".mode") else int)
            for item in (items if isinstance(items, list) else [items]))
                for key, items in value.items()]
    if "..." in metavar:
        items = value if isinstance(value, list) else parameter_text(name, value).split(",")
        return [parameter_text(name, item).strip() for item in items]
    return [parameter_text(name, value, int if metavar in ("N", "DURATION") else str)]


def parameter_text(name: str, value: Any, *fine: type) -> str:
    """Write a value as text; UsageError for types that YAML makes of text, unless they are fine."""
    kind = type(value)
    if kind not in (str, *fine):
        raise UsageError(f"{name}: expected text, and YAML made of it the {kind.__name__} "
                         f"{json.dumps(value)}",
                         "quote it: unquoted, 1.10 becomes 1.1, and 0640 or no something else")
    return str(value) if kind is str else str(value).lower()


# -- before a command runs ---------------------------------------------------

def load(flags: Any) -> Settings:
    """Load the settings that the flags ask for; UsageError lists all mistakes in them.

    Where nobody named a configuration, a working directory inside a root has that root's, from
    /etc/deploy: without it no service would be restarted.
    """
    if flags.command in TELLING:
        return Settings({}, [])
    given: Layer = {}
    for flag in FLAGS:
        if flag.option and getattr(flags, flag.dest) is not None:
            section, _, key = flag.option.partition(".")
            given[section, key] = getattr(flags, flag.dest), "command line"
    files, place = flags.config, ""
    if not files:
        named = environment("DEPLOY_CONFIG")
        files = [named] if named else list(filter(os.path.exists, ["deploy.ini"]))
    if not files:
        with suppress(OSError):  # it may be gone
            place = os.getcwd()
        while place.strip("/") and not os.path.isdir(f"{place}/.deploy"):
            place = os.path.dirname(place)
        # A root that was named may be another one.
        set_root = [text for text in flags.set or () if text.startswith("deploy.root=")]
        root = "".join(set_root[-1:])[len("deploy.root="):] or flags.root \
            or environment("DEPLOY_DEPLOY_ROOT") or place
        if place.strip("/") and os.path.realpath(root) == place:
            files = [path for path in configurations() if place == os.path.realpath(
                load_settings([path], {}, [], refuse=False).deploy.root or "/dev/null")][:1]
            if not files:
                given.setdefault(("deploy", "root"), (place, "command line"))
        else:
            files = list(filter(os.path.lexists, [f"{CONFIG_DIRECTORY}/deploy.ini"]))
    settings = load_settings(files, given, flags.set or [], refuse=False)
    settings.delegate = flags.delegate
    if settings.mistakes and (flags.command not in LOOKING or flags.command == "config"):
        check_settings(settings)
    settings.refuse_mistakes()
    return settings


def check_settings(settings: Settings) -> None:
    """Raise one UsageError for all mistakes, contradictions among them."""
    mistakes = settings.mistakes
    for check_all, is_needed in (
            (services_in_order, settings.service),
            (verifier_of, settings.signature.given)):
        try:
            if is_needed:
                check_all(settings)
        except UsageError as error:
            mistakes.append(error)
    for section, is_wrong, problem in disagreements(settings):
        text = f"[{section}] {problem}"
        # An unreadable value is reported already: its default's contradictions are no mistakes.
        if is_wrong and not any(f"[{place}]" in text and key in re.findall(r"[\w.-]+", problem)
                                for place, key in settings.unread):
            mistakes.append(settings.wrong(section, problem))
    settings.refuse_mistakes()


def disagreements(settings: Settings) -> Iterator[Tuple[str, Any, str]]:
    """Yield possible contradictions: section, whether it is one, what is wrong with it."""
    deploy, signature, policy = settings.deploy, settings.signature, settings.policy
    for name, probe in settings.probe.items():
        for problem in probe_mistakes(settings, probe):
            yield f"probe:{name}", True, problem
    for name, notifier in settings.notify.items():
        problem = check_notifier(notifier)
        yield f"notify:{name}", problem, problem
    yield ("signature", signature.verify != "off" and not TRUSTED.intersection(signature.given),
           f"verify = {signature.verify} needs keys, allowed_signers or command")
    taken = deploy.shared_dirs + deploy.shared_files
    for path in deploy.writable:
        is_shared = any(os.path.commonpath([path, place]) == place for place in taken)
        yield ("deploy", not deploy.app_user or is_shared,
               f"writable = {path} needs app_user, and a place that is not shared")
    for name, template in settings.template.items():
        for place in filter(None, taken if template.target else ()):
            yield (f"template:{name}", os.path.commonpath([template.target, place]) in (
                template.target, place), f"target = {template.target}: it meets {place}")
        taken = taken + [template.target]
    for key, needed in (("approvals", "approvers"), ("promoted_from", "attesters"),
                        ("promoted_after", "promoted_from"), ("promoted_within", "promoted_from")):
        yield ("policy", key in policy.given and not getattr(policy, needed),
               f"{key} needs {needed}")
    for name in set(settings.probe).intersection(settings.notify):
        notifier = settings.notify[name]
        yield (f"notify:{name}",
               settings.probe[name].auth_file and (notifier.url_file or notifier.token_file),
               f"its file and that of [probe:{name}] would be the same credential, {name}: "
               "give it another name")
    if settings.source.given:
        yield from source_mistakes(settings)
    if settings.has_slots and "slots" not in dict(settings.unread):
        slots, names = settings.slots.values(), " and ".join(settings.slots)
        yield ("slots", not re.match(r"[\w-]+ and [\w-]+\Z", names),
               "needs exactly two names, of letters, digits, - and _, each with a port, not "
               + (names or "none"))
        for key in ("port", "unit", "include"):
            yield ("slots", len({getattr(slot, key) for slot in slots}) == 1,
                   f"{key} is the same for both: write ${{slot}} or ${{port}} into it")
        for name, service in settings.service.items():
            unit = service.unit.replace(".service", "")
            yield (f"service:{name}", unit in [slot.unit.replace(".service", "") for slot in slots],
                   "has the unit of a slot, which none but [slots] may start")


def learn_secrets(settings: Settings, secrets: Secrets) -> None:
    """Tell the console every private value, before a hook or a server can show it."""
    named = [(name, environment(name)) for name in environment_names()
             if name != "CREDENTIALS_DIRECTORY"]  # a path that errors must be able to name
    named += [*settings.env.items(), *settings.vars.items()]
    private: List[str] = []
    receivers = [*settings.probe.values(), *settings.notify.values(), settings.source]
    for receiver in filter(attrgetter("given"), receivers):
        named += receiver.header.items()
        texts = re.findall(r"\A[a-z]+://([^/?#@]*)@", receiver.url)
        for key in ("auth_file", "token_file", "url_file"):
            path = getattr(receiver, key, "")
            with suppress(OSError):  # preflight reports it
                texts += [read_text(path).strip()] if path else []
        for text in texts:
            private += [text, text.partition(":")[2], text.partition(" ")[2]]
        # A short word such as `true` is no secret: masking it would blot out sentences.
        private += [value for name, value in re.findall(r"[?&]([^=&#]*)=([^&#]*)", receiver.url)
                    if len(value) >= 8 or SECRET_NAME.search(name.lower())]
        if settings.notify.get(receiver.name) is receiver:
            # The long words of a notifier's path let anybody post there.
            for url in [receiver.url, *texts]:
                private += re.findall(r"[^/?#&=]{16,}", url.partition("://")[2].partition("/")[2])
    for value in private + [value for name, value in named if SECRET_NAME.search(name.lower())]:
        secrets.add(value)
        if "%" in value or "+" in value:
            from urllib.parse import unquote_plus
            secrets.add(unquote_plus(value))


def open_log(flags: Any, settings: Settings, console: Console) -> None:
    """Open everything that [log] names; UsageError when a file cannot be opened."""
    log = settings.log
    if settings.deploy.root and log.file and re.match(
            re.escape(os.path.realpath(settings.deploy.root)) + r"/(\.deploy|releases)/",
            os.path.realpath(log.file)):
        raise UsageError(f"the log file {log.file} lies in .deploy or releases, deploy.py's own "
                         "places", "write it to another place, such as /var/log")
    if flags.dry_run:
        return
    # Lines that root appends to a file of their choice can make others root (a crontab).
    if os.geteuid() == 0 and any(map(trust_problems, settings.files)):
        for key in ("file", "syslog"):
            if settings.origin("log", key) in settings.files:
                console.warn(f"[log] {key} is not used: others could have written the "
                             "configuration that names it")
                setattr(log, key, "")
    as_json = log.format == "json"
    if log.file:
        console.add_log(LogFile(log.file), console.warn, as_json=as_json)
    if log.syslog:
        console.add_log(Syslog(log.syslog), console.debug, as_json=as_json)


# -- what root lets a person do ----------------------------------------------

DELEGATED_FLAGS = "-n --json -q -v -m --sha256 --release-version --wait-lock".split()


def parse_delegated(argv: List[str]) -> Any:
    """Read a command line that begins with --delegate FILE; UsageError for all it may not hold."""
    path, words = absolute("".join(argv[1:2])), argv[2:]
    for problem, hint in trust_problems(path, owners=(0,)).values():
        raise UsageError(f"--delegate {path}: {problem}", hint)
    try:
        flags = parse_command_line(words)
    except HelpAsked:
        raise UsageError("a delegated run shows no help", "deploy.py --help, without sudo")
    refused = [name for name in environment_names() if name.startswith("DEPLOY_")]
    # To other programs @FILE and {JSON} mean more arguments: here they never shall.
    refused += [word.partition("=")[0] for word in words if re.match(r"[@{]|--\Z|--.*=", word)]
    refused += [flag.names[-1] for flag in FLAGS if getattr(flags, flag.dest)
                and not flag.is_argument and not set(flag.names).intersection(DELEGATED_FLAGS)]
    if refused:
        raise UsageError(f"a delegated run takes no {refused[0]}",
                         f"of flags it takes {', '.join(DELEGATED_FLAGS)}, each value as its own "
                         "word; no variable DEPLOY_*, and no word that begins with @ or {")
    # A sudoers file may let the person's through: PATH, HOME, CREDENTIALS_DIRECTORY.
    kept = "SUDO_.*|LANG|LC_.*|TERM|NO_COLOR"
    kept += "|HOME" if environment("HOME") == os.path.expanduser("~root") else ""
    for name in environment_names():
        if not re.fullmatch(kept, name):
            forget_variable(name)
    flags.config, flags.delegate = [path], path
    settings, artifact = load(flags), flags.artifact
    delegated, inbox = settings.deploy.delegated, settings.deploy.inbox
    if flags.command not in delegated or flags.command in ("pack", *TELLING):
        # pack reads any directory.
        raise UsageError(f"{flags.command} is not delegated by {path}",
                         "run it without sudo" if flags.command in TELLING
                         else f"delegated: {', '.join(delegated) or 'nothing'}")
    if artifact:
        place, name = os.path.split(absolute(artifact))
        is_signed = settings.signature.verify == "required" and any(
            os.path.lexists(f"{place}/{file}{suffix}")
            for file in (name, "SHA256SUMS") for suffix in SIGNATURES)
        if ".." in artifact.split("/") or place != inbox and not is_signed:
            raise UsageError(f"{artifact} is not directly in [deploy] inbox",
                             f"put the artifact itself there: {inbox}/NAME")
        os.close(open_own_file(f"{place}/{name}"))
    return flags


# -- one run -----------------------------------------------------------------

def run_command_line(argv: List[str], console: Console) -> Tuple[int, Run]:
    """Run one command; returns its exit code, and the run, whose outcome has its error."""
    flags = parse_delegated(argv) if argv[:1] == ["--delegate"] else parse_command_line(argv)
    is_terminal = bool(sys.stderr) and sys.stderr.isatty()
    plain = flags.no_color or environment("NO_COLOR") or environment("TERM") == "dumb"
    console.json_mode = flags.json
    console.quiet = flags.quiet
    console.verbose = flags.verbose or flags.debug
    console.colour = is_terminal and not plain
    console.shows_progress = is_terminal and not flags.quiet
    locale = environment("LC_ALL") or environment("LC_CTYPE") or environment("LANG")
    console.utf8 = "utf" in locale.lower()
    console.supervisor = environment("NOTIFY_SOCKET")
    settings = load(flags)
    learn_secrets(settings, console.secrets)
    interrupts = Interrupts()
    interrupts.install()
    console.heed = interrupts.check
    run = Run(settings, console, interrupts, flags)
    outcome, command = run.outcome, flags.command
    console.log_context = {"deploy_id": run.deploy_id, "command": command}
    if settings.deploy.root:
        console.log_context["application"] = escape(run.application)
    if run.traceparent:
        console.log_context["trace_id"] = run.traceparent.split("-")[1]
    open_log(flags, settings, console)
    try:
        if command not in LOOKING:
            check_settings(settings)
        if os.geteuid() == 0 and command not in LOOKING + ("preflight",):
            refused = untrusted(settings)[0]
            for problem, hint in refused.values():
                raise PreflightFailed(
                    f"what root acts on could have been written by others: {problem}", f"{hint}; "
                    f"or {accepting(settings, refused)}")
        run.is_believed = True
        if flags.splay:
            wait_splay(run)
        COMMANDS[command](run)
        if command == "config" and not (flags.example or flags.minimal):
            check_settings(settings)  # after they were shown
    except Exception as error:
        outcome.error = failure_of(error, command, console, flags.debug)
    if outcome.error:
        return outcome.error.exit_code, run
    return EXIT_CHANGED if outcome.changed and flags.detailed_exitcode else EXIT_OK, run


def failure_of(error: BaseException, step: str, console: Console, debug: Any) -> DeployError:
    """Turn whatever was raised into the error to report; a defect shows its traceback."""
    if isinstance(error, KeyboardInterrupt):  # not after Interrupts.install
        return Interrupted(signal.SIGINT)
    if debug or not isinstance(error, FAILURES):
        console.traceback()
    if isinstance(error, FAILURES):
        return step_error(error, step)
    failure = DeployError(f"internal error: {type(error).__name__}: {error}",
                          "this is a defect: please report it")
    failure.exit_code = EXIT_INTERNAL
    return failure


def main(argv: Optional[List[str]] = None) -> int:
    """Run the command line; the one place where every error ends."""
    started_seconds = time.monotonic()
    argv = sys.argv[1:] if argv is None else argv
    parameters = None
    # Only a path: no file in the working directory may take the place of a command.
    if len(argv) == 1 and "/" in argv[0] and argv[0][0] != "-":
        parameters = read_parameters(argv[0])
    console = Console(environment("JOURNAL_STREAM"))
    console.json_mode = "--json" in argv
    if parameters is not None:
        console = ModuleConsole(parameters)
    os.umask(0o022)
    try:
        if parameters is not None:
            argv = module_argv(parameters, console.secrets)
        exit_code, run = run_command_line(argv, console)
        report_run(run, exit_code, time.monotonic() - started_seconds)
        # What was changed is done although the output is lost; what only prints has failed.
        if console.is_result_lost and not run.outcome.changed and exit_code == EXIT_OK:
            exit_code = EXIT_FAILED
        return exit_code
    except HelpAsked as asked:
        console.raw_result(str(asked))
        if console.json_mode:
            shown = {"topic": None, "text": str(asked)}
            console.json_result(dict(result_object(None), msg=str(asked), help=shown))
        return EXIT_FAILED if console.is_result_lost else EXIT_OK
    except (Exception, KeyboardInterrupt) as error:
        debug = "--debug" in argv and argv[:1] != ["--delegate"]
        failure = failure_of(error, "deploy.py", console, debug)
        console.error(failure.message, failure.hint)
    if console.json_mode:
        console.json_result(result_object(failure, exit_code=failure.exit_code))
    return failure.exit_code


if __name__ == "__main__":
    _exit_code = main()
    # At once: a signal kills Python while it shuts down, and would turn "done" into 143.
    os._exit(_exit_code)
