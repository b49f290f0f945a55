"""Where what was said is kept: the journal, syslog, files that logrotate moves, and the trace that a run is part of."""

import json
import logging
import os
import re
import shlex
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional

import pytest

from support import (App, clean_environment, compiled, described, in_namespace, load_deploy, needs, deep, run_deploy, snapshot,
                     wait_until)

deploy = load_deploy()

HOOK_SPEAKS = "[env]\nDB_PASSWORD = swordfish-9\n[hooks]\npre_activate = /bin/sh -c 'echo hook speaks; echo pw=$DB_PASSWORD; env'\n"
HOOK_FAILS = "[env]\nDB_PASSWORD = swordfish-9\n[hooks]\npost_activate = /bin/sh -c 'printf \"died of \\033[2J$DB_PASSWORD\"; exit 1'\n"


class Receiver:
    """Whatever takes datagrams: a syslog daemon, the journal."""

    def __init__(self, path: Any = None) -> None:
        self.socket = socket.socket(socket.AF_UNIX if path else socket.AF_INET, socket.SOCK_DGRAM)
        self.socket.bind(str(path) if path else ("127.0.0.1", 0))
        self.address = str(path) if path else f"udp://127.0.0.1:{self.socket.getsockname()[1]}"
        self.datagrams = []  # type: List[bytes]
        self._thread = threading.Thread(target=self._receive, daemon=True)
        self._thread.start()

    def _receive(self) -> None:
        try:
            for datagram in iter(lambda: self.socket.recv(1 << 18), b""):
                self.datagrams.append(datagram)
        except OSError:
            pass

    def until(self, wanted: bytes) -> List[bytes]:
        """Wait until something that holds these bytes has come, and return all there is."""
        wait_until(lambda: any(wanted in datagram for datagram in self.datagrams), what=f"{wanted!r} is received")
        return self.datagrams

    def close(self) -> None:
        """Stop receiving."""
        try:
            self.socket.shutdown(socket.SHUT_RDWR)
        except OSError:  # a UDP socket says that it is not connected, and wakes the thread all the same
            pass
        self._thread.join(10)
        self.socket.close()


@pytest.fixture
def udp() -> Iterator[Receiver]:
    """A receiver on loopback."""
    receiver = Receiver()
    yield receiver
    receiver.close()


@pytest.fixture
def local(tmp_path: Path) -> Iterator[Receiver]:
    """A receiver such as listens at /dev/log."""
    receiver = Receiver(tmp_path / "log.socket")
    yield receiver
    receiver.close()


# -- the journal ---------------------------------------------------------------------

def fields(datagram: bytes) -> Dict[str, str]:
    """Read an entry of the journal's native protocol."""
    found = {}
    while datagram:
        head, _, datagram = datagram.partition(b"\n")
        name, equals, value = head.partition(b"=")
        if not equals:
            size = int.from_bytes(datagram[:8], "little")
            value, end, datagram = datagram[8:8 + size], datagram[8 + size:9 + size], datagram[9 + size:]
            assert end == b"\n"
        assert name.decode() not in found
        found[name.decode()] = value.decode("utf-8")
    return found


class JournalRun:
    """A run whose stdout and stderr are a socket that $JOURNAL_STREAM names, beside a journal's native socket."""

    def __init__(self, app: App, *words: Any, stream: Optional[str] = None, env: Optional[Dict[str, str]] = None, deaf: bool = False) -> None:
        socket_path = app.directory / "journal.socket"
        journal = Receiver(socket_path)
        ours, theirs = socket.socketpair()
        if deaf:
            ours.shutdown(socket.SHUT_RDWR)
        found = os.fstat(theirs.fileno())
        program = ("import importlib.machinery, os, sys; loader = importlib.machinery.SourcelessFileLoader('deploy', sys.argv[1]); "
                   "deploy = loader.load_module(); deploy.JOURNAL_SOCKET = sys.argv[2]; os._exit(deploy.main(sys.argv[3:]))")
        process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", program, compiled(), str(socket_path), "-c", str(app.config), *map(str, words)],
            stdin=subprocess.DEVNULL, stdout=theirs, stderr=theirs,
            env=clean_environment({"JOURNAL_STREAM": stream or f"{found.st_dev}:{found.st_ino}", **(env or {})}))
        theirs.close()
        text = b"".join(iter(lambda: ours.recv(1 << 16), b"")).decode("utf-8")
        ours.close()
        self.exit_code = process.wait(60)
        # Datagrams of one sender keep their order: once a last one is here, all are.
        end = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        end.sendto(b"END", str(socket_path))
        end.close()
        self.events = [fields(datagram) for datagram in journal.until(b"END")[:-1]]
        self.lines = text.splitlines()
        journal.close()
        socket_path.unlink()

    def text(self) -> str:
        """Everything that the journal would hold."""
        return "\n".join(self.lines + [event["MESSAGE"] for event in self.events])


def test_what_the_journal_gets_as_lines_has_priorities(app: App) -> None:
    app.configure(HOOK_SPEAKS + "[probe:web]\ncommand = false\nrequired = no\nsuccesses = 1\ndeadline = 10ms\n")
    run = JournalRun(app, "-v", "deploy", app.artifact("1.0"))
    assert run.exit_code == 0
    assert [line for line in run.lines if not re.match(r"<[3467]>", line)] == []
    assert [line[:3] for line in run.lines if line.endswith("| hook speaks")] == ["<6>"]
    assert {line[:3] for line in run.lines if "cwd /" in line or "/bin/sh -c" in line} == {"<7>"}
    assert f"<6>myapp: {app.current} is live" in run.lines
    assert any(event["PRIORITY"] == "4" and event["DEPLOY_STEP"] == "probe:web" for event in run.events)


def test_the_end_of_each_step_and_of_the_run_is_an_event_with_fields(app: App) -> None:
    app.configure(HOOK_SPEAKS)
    run = JournalRun(app, "deploy", app.artifact("1.0"))
    entry = app.history()[-1]
    assert {event["DEPLOY_ID"] for event in run.events} == {entry["deploy_id"]}
    assert {event["SYSLOG_IDENTIFIER"] for event in run.events} == {"deploy.py"}
    assert {event["DEPLOY_APP"] for event in run.events} == {"myapp"}
    assert {event["DEPLOY_RELEASE"] for event in run.events} == {app.current}
    assert {event["PRIORITY"] for event in run.events} == {"6"}
    *steps, end = run.events
    assert [event["DEPLOY_STEP"] for event in steps] == [step["name"] for step in entry["steps"]]
    assert {(event["MESSAGE_ID"], event["DEPLOY_RESULT"]) for event in steps} == {(deploy.MESSAGE_IDS["step_done"], "done")}
    assert "DEPLOY_STEP" not in end and end["MESSAGE"].startswith("checked ")
    assert (end["MESSAGE_ID"], end["DEPLOY_RESULT"]) == (deploy.MESSAGE_IDS["run_done"], "deployed")


def test_a_stream_that_broke_costs_the_journal_its_lines_and_no_event(app: App) -> None:
    app.configure(HOOK_FAILS)
    run = JournalRun(app, "deploy", app.artifact("1.0"), deaf=True)
    assert run.exit_code == 5 and run.lines == []
    assert [event.get("DEPLOY_STEP") for event in run.events] == [step["name"] for step in app.history()[-1]["steps"]] + [None]


def test_nothing_stands_in_the_journal_twice(app: App) -> None:
    app.configure(HOOK_FAILS)
    run = JournalRun(app, "deploy", app.artifact("1.0"))
    assert run.exit_code == 5
    events = [line for event in run.events for line in event["MESSAGE"].splitlines()]
    lines = [line[3:] for line in run.lines]
    assert len(events) > 5 and not set(events) & set(lines)
    assert len([line for line in events + lines if "rolled back" in line]) == 1


def test_a_failure_is_one_event_that_holds_the_error_and_the_hint(app: App) -> None:
    app.configure(HOOK_FAILS)
    run = JournalRun(app, "deploy", app.artifact("1.0"))
    end = run.events[-1]
    assert (end["MESSAGE_ID"], end["DEPLOY_RESULT"], end["PRIORITY"]) == (deploy.MESSAGE_IDS["run_failed"], "rolled_back", "3")
    first, second = end["MESSAGE"].split("\n")
    assert first.startswith("deploy.py: error: hook post_activate failed") and second.startswith("hint: ")
    failed = [event for event in run.events if event["MESSAGE_ID"] == deploy.MESSAGE_IDS["step_failed"]]
    assert [(event["DEPLOY_STEP"], event["DEPLOY_RESULT"], event["PRIORITY"]) for event in failed] == \
        [("hook:post_activate", "failed", "3")]


def test_what_is_refused_before_a_step_is_an_event_too(app: App) -> None:
    run = JournalRun(app, "deploy", app.directory / "none.tar.gz")
    assert [(event["MESSAGE_ID"], event["DEPLOY_RESULT"]) for event in run.events] == [(deploy.MESSAGE_IDS["run_failed"], "refused")]
    assert "none.tar.gz" in run.events[0]["MESSAGE"]


def test_a_command_line_that_is_wrong_has_priorities_as_well(app: App) -> None:
    run = JournalRun(app, "deplyo")
    assert run.exit_code == 2 and run.events == []
    assert [line[:3] for line in run.lines] == ["<3>", "<3>"]


def test_what_the_journal_gets_is_masked_and_escaped(app: App) -> None:
    app.configure(HOOK_FAILS)
    run = JournalRun(app, "deploy", app.artifact("1.0"))
    assert "died of" in run.text() and "[masked]" in run.text()
    assert "swordfish-9" not in run.text() and "\033" not in run.text()
    assert "died of \\x1b[2J[masked]" in run.events[-1]["MESSAGE"]


def test_the_journal_is_silent_on_a_quiet_run_that_changes_nothing(app: App) -> None:
    artifact = app.artifact("1.0")
    changed = JournalRun(app, "-q", "deploy", artifact)
    assert changed.events[-1]["DEPLOY_RESULT"] == "deployed" and any("is live" in line for line in changed.lines)
    again = JournalRun(app, "-q", "deploy", artifact)
    assert (again.exit_code, again.lines, again.events) == (0, [], [])


def test_a_dry_run_is_no_event(app: App) -> None:
    run = JournalRun(app, "-n", "deploy", app.artifact("1.0"))
    assert run.events == [] and any("plan of deploy" in line for line in run.lines)


def test_another_stream_than_the_journals_gets_plain_lines(app: App) -> None:
    run = JournalRun(app, "deploy", app.artifact("1.0"), stream="1:1")
    assert run.events == [] and not any(line.startswith("<") for line in run.lines)
    assert any(line.startswith("  done    activate") for line in run.lines)


def test_stderr_alone_may_lead_to_the_journal(app: App) -> None:
    with (app.directory / "stderr").open("w+") as stderr:
        found = os.fstat(stderr.fileno())
        done = subprocess.run([sys.executable, compiled(), "-c", str(app.config), "status"], stdout=subprocess.PIPE, stderr=stderr,
                              env=clean_environment({"JOURNAL_STREAM": f"{found.st_dev}:{found.st_ino}"}))
    assert done.returncode == 0 and done.stdout.startswith(b"  application")


@pytest.mark.skipif(os.path.exists(deploy.JOURNAL_SOCKET), reason="this host has a journal, and it would be written to")
def test_where_the_journals_socket_is_gone_the_line_is_written_after_all(app: App) -> None:
    with (app.directory / "stderr").open("w+") as stderr:
        found = os.fstat(stderr.fileno())
        done = subprocess.run([sys.executable, compiled(), "-c", str(app.config), "deploy", str(app.artifact("1.0"))], stderr=stderr,
                              stdout=subprocess.DEVNULL, env=clean_environment({"JOURNAL_STREAM": f"{found.st_dev}:{found.st_ino}"}))
        stderr.seek(0)
        lines = stderr.read().splitlines()
    assert done.returncode == 0
    assert any(line.startswith("<6>  done    activate") for line in lines) and lines[-1].startswith("<6>checked ")


def test_children_do_not_take_their_output_for_the_journal(app: App) -> None:
    app.configure(HOOK_SPEAKS)
    run = JournalRun(app, "deploy", app.artifact("1.0"))
    assert "DEPLOY_HOOK=pre_activate" in run.text() and "JOURNAL_STREAM" not in run.text()


def test_each_kind_of_event_has_an_id_of_its_own() -> None:
    ids = list(deploy.MESSAGE_IDS.values())
    assert len(set(ids)) == len(ids) and all(re.match(r"[0-9a-f]{32}\Z", found) for found in ids)


JOURNALD = """
mkdir -p /run/systemd/journal /run/log/journal /run/systemd/journald.conf.d
printf '[Journal]\\nStorage=volatile\\nReadKMsg=no\\nAudit=no\\n' > /run/systemd/journald.conf.d/test.conf
/lib/systemd/systemd-journald &
journald=$!
{python} -c '
import os, socket, subprocess, sys, time
ends = time.monotonic() + 30
journal = socket.socket(socket.AF_UNIX)
while journal.connect_ex("/run/systemd/journal/stdout") and time.monotonic() < ends:
    time.sleep(0.02)
journal.sendall(b"deploy.py\\ndeploy-shop.service\\n6\\n1\\n0\\n0\\n0\\n")
found = os.fstat(journal.fileno())
environ = dict(os.environ, JOURNAL_STREAM="%d:%d" % (found.st_dev, found.st_ino))
sys.exit(subprocess.call(sys.argv[1:], stdout=journal, stderr=journal, env=environ))
' {argv} || test $? = 5
journalctl --sync
journalctl --no-pager -o json -t deploy.py
kill $journald
wait $journald
"""


@deep
def test_a_real_journal_finds_the_events_by_the_deployments_id(app: App) -> None:
    needs("journalctl")
    app.configure(HOOK_FAILS)
    argv = [sys.executable, compiled(), "-c", str(app.config), "deploy", str(app.artifact("1.0"))]
    done = in_namespace(JOURNALD.format(python=sys.executable, argv=" ".join(map(shlex.quote, argv))), fresh=["/run"])
    entries = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    run = app.history()[-1]
    found = [entry for entry in entries if entry.get("DEPLOY_ID") == run["deploy_id"]]
    assert [entry["DEPLOY_STEP"] for entry in found[:-1]] == [step["name"] for step in run["steps"]]
    assert (found[-1]["DEPLOY_RESULT"], found[-1]["PRIORITY"]) == ("rolled_back", "3") and "\nhint: " in found[-1]["MESSAGE"]
    assert {entry["_SYSTEMD_UNIT"] for entry in entries} == {"deploy-shop.service"}
    plain = [entry for entry in entries if "DEPLOY_ID" not in entry]
    assert {entry["PRIORITY"] for entry in plain} == {"4", "6"} and not any(entry["MESSAGE"].startswith("<") for entry in plain)
    assert sum("going back" in entry["MESSAGE"] for entry in entries) == 1


# -- syslog ----------------------------------------------------------------------------

RFC_3164 = re.compile(r"<(\d{1,3})>[A-Z][a-z]{2} [ 123]\d \d\d:\d\d:\d\d (\S+ )?deploy\.py\[(\d+)\]: ([^\x00-\x1f\x7f]*)\Z")


def parsed(datagrams: List[bytes]) -> List[Any]:
    """The datagrams as RFC 3164 has them: (priority, host, process id, line)."""
    found = [RFC_3164.match(datagram.decode("utf-8")) for datagram in datagrams]
    assert None not in found, datagrams
    return [match.groups() for match in found if match]


def test_syslog_over_udp_gets_what_the_log_file_gets(app: App, udp: Receiver) -> None:
    app.configure(f"{HOOK_SPEAKS}[log]\nsyslog = {udp.address}\nfile = {app.directory}/run.log\n")
    result = app.run("deploy", app.artifact("1.0"), check=0)
    lines = parsed(udp.until(b"checked "))
    assert {host for _, host, _, _ in lines} == {os.uname().nodename.partition(".")[0] + " "}
    assert len({process for _, _, process, _ in lines}) == 1
    assert {int(priority) for priority, _, _, _ in lines} <= {3 * 8 + severity for severity in (3, 4, 6, 7)}
    said = next(line for _, _, _, line in lines if line.endswith("hook speaks"))
    for part in (f"deploy_id={result.data['deploy_id']}", "application=myapp", f"release={app.current}", "step=hook:pre_activate"):
        assert part in said
    logged = [line.split(" ", 2)[2] for line in (app.directory / "run.log").read_text().splitlines()]
    assert [line for _, _, _, line in lines] == logged and len(logged) > 10
    assert "swordfish-9" not in str(lines) and "[masked]" in str(lines)


def test_syslog_through_a_socket_such_as_dev_log_has_no_host(app: App, local: Receiver) -> None:
    app.run("deploy", app.artifact("1.0"), "--set", f"log.syslog={local.address}", check=0)
    lines = parsed(local.until(b"checked "))
    assert {host for _, host, _, _ in lines} == {None} and {int(priority) for priority, _, _, _ in lines} <= {27, 28, 30, 31}


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_a_line_too_long_for_syslog_is_cut_and_still_whole_in_its_form(log_format: str, app: App, udp: Receiver) -> None:
    app.configure("[hooks]\npre_activate = /bin/sh -c 'head -c 4000 /dev/zero | tr \"\\\\0\" x; printf \"\\303\\244\\n\"'\n")
    app.run("deploy", app.artifact("1.0"), "--set", f"log.syslog={udp.address}", "--log-format", log_format, check=0)
    datagrams = udp.until(b"checked ")
    assert max(map(len, datagrams)) in range(1000, 2048) and any(b"x" * 990 in datagram for datagram in datagrams)
    for _, _, _, line in parsed(datagrams):
        assert log_format == "text" or json.loads(line)["application"] == "myapp"


def test_json_lines_tell_the_ends_of_steps_and_runs(app: App) -> None:
    app.configure(HOOK_FAILS)
    app.run("deploy", app.artifact("1.0"), "--log-file", app.directory / "log", "--log-format", "json", check=5)
    lines = [json.loads(line) for line in (app.directory / "log").read_text().splitlines()]
    ends = [(line["event"], line["result"]) for line in lines if "event" in line]
    assert ends[-1] == ("run_failed", "rolled_back") and ("step_failed", "failed") in ends and ends[0] == ("step_done", "done")


@pytest.mark.parametrize("place", ["nobody", "full", "stale"])
def test_a_syslog_that_is_not_there_or_hangs_costs_little_and_changes_nothing(place: str, app: App, tmp_path: Path) -> None:
    path = tmp_path / "place"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as hanging:
        if place in ("full", "stale"):
            hanging.bind(str(path))
        if place == "stale":
            hanging.close()
        plain = app.run("deploy", app.artifact("1.0"), "--set", "hooks.pre_activate=seq 1 2000", json=False, check=0)
        logged = app.run("deploy", app.artifact("1.1"), "--set", f"log.syslog={path}", "--set", "hooks.pre_activate=seq 1 2000",
                         json=False, check=0, timeout=60)  # waiting for each line would take minutes
    assert logged.stderr.count("\n") == plain.stderr.count("\n") and app.version == "1.1"


def test_why_syslog_cannot_be_reached_is_told_to_who_asks(app: App, tmp_path: Path) -> None:
    result = app.run("-v", "deploy", app.artifact("1.0"), "--set", f"log.syslog={tmp_path}/none", check=0)
    assert "not all that is said is in the log: No such file" in result.stderr


def says(handler: Any, text: str) -> None:
    """Have a line written."""
    handler.emit(logging.makeLogRecord({"msg": text, "levelname": "ERROR", "context": {}, "event": {}}))


def test_a_syslog_that_was_started_anew_gets_the_next_line(tmp_path: Path) -> None:
    reported = []  # type: List[str]
    handler = deploy.Syslog(str(tmp_path / "log"))
    handler.report = reported.append
    for number in range(3):
        receiver = Receiver(tmp_path / "log")
        says(handler, f"line {number}")
        receiver.until(f"]: line {number}".encode())
        receiver.close()
        (tmp_path / "log").unlink()
        says(handler, "lost")
    assert len(reported) == 1, "once"


def test_a_pipe_that_nobody_reads_is_no_log_file_and_not_waited_for(app: App) -> None:
    path = app.directory / "log"
    os.mkfifo(str(path))
    error = app.run("deploy", app.artifact("1.0"), "--log-file", path, check=2).data["error"]
    assert f"cannot open the log file {path}: " in error["message"] and error["hint"] and app.releases() == []


@pytest.mark.parametrize("text", ["dev/log", "udp://", "udp://host", "udp://host:0", "udp://host:65536", "udp://a b:514",
                                  "tcp://host:514", "udp://::1:514", "udp://user@host:514", "udp://loghost:514"])
def test_a_syslog_that_is_none_is_refused(text: str, app: App) -> None:
    app.configure(f"[log]\nsyslog = {text}\n")
    error = app.run("status", check=2).data["error"]["message"]
    assert str(app.config) in error and "[log] syslog" in error and "udp://ADDRESS:PORT" in error


def test_syslog_addresses_are_read_as_they_are_written() -> None:
    assert [deploy.read_value("syslog", text) for text in
            ("/dev/log", "udp://192.0.2.1:514", "udp://[::1]:5514")] == \
        ["/dev/log", ("192.0.2.1", 514), ("::1", 5514)]


def test_a_log_line_is_whole_whatever_the_applications_name_and_the_bytes_of_a_file_are(app: App) -> None:
    app.config.write_text(f"[deploy]\nroot = {app.root}\napplication = my {{app\n[log]\nfile = {app.directory}/log\nformat = json\n")
    name = os.fsencode(str(app.directory)) + b"/none-\xff.tar.gz"
    subprocess.run([sys.executable, compiled(), "-c", str(app.config), "deploy", name], env=clean_environment(), stderr=subprocess.DEVNULL)
    text = (app.directory / "log").read_bytes().decode("ascii")
    lines = [json.loads(line) for line in text.splitlines()]
    assert [line["application"] for line in lines] == ["my {app"] * len(lines)
    # What json forgives, other readers do not: a lone surrogate is no character.
    assert any("none-" in line["message"] for line in lines) and not re.search("[\ud800-\udfff]", "".join(map(str, lines)))


@pytest.mark.parametrize("place", [".deploy/history.jsonl", ".deploy/new.log", "releases/x.log", "current/x.log"])
def test_no_log_is_written_into_a_release_or_the_state(place: str, app: App) -> None:
    app.deploy("1.0")
    before = snapshot(app.root)
    for given in (["--log-file", app.root / place], ["--set", f"log.file={app.root / place}"]):
        for words in (["status"], ["-n", "prune"]):
            assert "deploy.py's own" in app.run(*given, *words, check=2).data["error"]["message"]
    assert snapshot(app.root) == before
    app.run("--log-file", app.root / "shared" / "deploy.log", "status", check=0)


def test_a_log_that_cannot_be_written_is_told_once_and_ends_nothing(app: App) -> None:
    result = app.run("--log-file", "/dev/full", "deploy", app.artifact("1.0"), check=0)
    assert result.data["warnings"] == ["not all that is said is in the log: No space left on device"], described(result.data)


def test_a_log_shows_that_a_quiet_run_had_nothing_to_do(app: App) -> None:
    app.deploy("1.0")
    for words in (["deploy", app.artifact("1.0")], ["recover"], ["status"]):
        result = app.run("-q", *words, "--log-file", app.directory / "log", "--log-format", "json", json=False, check=0)
        assert result.stderr == "" and (words == ["status"] or result.stdout == "")
    lines = [json.loads(line) for line in (app.directory / "log").read_text().splitlines()]
    said = [(line["command"], line["message"], line["event"], line["result"]) for line in lines if line["level"] == "info"]
    assert said == [("deploy", f"{app.current} is live already; nothing to do", "run_done", "unchanged"),
                    ("recover", "nothing to recover", "run_done", "unchanged")]


# -- files that are moved ----------------------------------------------------------------

LOGROTATE = """{log} {{
    rotate 3
    {how}
    nocompress
    missingok
}}
"""


@deep
@pytest.mark.parametrize("how", ["nocreate", "create 0600"])
def test_logrotate_may_move_the_file_under_a_run(how: str, app: App, tmp_path: Path) -> None:
    needs("logrotate")
    log, rules = tmp_path / "shop.log", tmp_path / "rules"
    rules.write_text(LOGROTATE.format(log=log, how=how))
    rules.chmod(0o644)
    rotate = f"{needs('logrotate')} -f -s {tmp_path}/state {rules}"
    app.configure(f"[hooks]\npre_activate =\n    echo before\n    {rotate}\n    echo after\n[log]\nfile = {log}\n")
    app.run("deploy", app.artifact("1.0"), check=0)
    old, new = (tmp_path / "shop.log.1").read_text(), log.read_text()
    assert "] before\n" in old and "] before\n" not in new
    assert "] after\n" in new and "] after\n" not in old and "checked " in new


def test_a_log_that_was_moved_is_made_anew_with_its_mode(app: App, tmp_path: Path) -> None:
    log = tmp_path / "log"
    app.configure(f"[hooks]\npre_activate =\n    echo before\n    mv {log} {log}.1\n    echo after\n[log]\nfile = {log}\n")
    app.run("deploy", app.artifact("1.0"), check=0)
    assert "] before\n" in (tmp_path / "log.1").read_text() and "] after\n" in log.read_text()
    assert log.stat().st_mode & 0o777 == 0o640


# -- the trace ---------------------------------------------------------------------------

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TOLD = re.compile(rf"TRACEPARENT=00-{TRACE}-([0-9a-f]{{16}})-01\Z")


def test_a_trace_goes_on_through_log_history_and_children(app: App, server: Any) -> None:
    tell = app.directory / "told"
    app.configure(f"[hooks]\npre_activate = env\n[service:web]\ncommand = /bin/sh -c 'env > {tell}-service'\n"
                  f"[probe:web]\ncommand = /bin/sh -c 'env > {tell}-probe'\nsuccesses = 1\n")
    result = app.run("deploy", app.artifact("1.0"), "--log-file", app.directory / "log", "--log-format", "json",
                     env={"TRACEPARENT": f"00-{TRACE}-{PARENT}-01"}, check=0)
    hook = next(step["output"] for step in result.data["steps"] if step["name"] == "hook:pre_activate")
    told = hook + Path(f"{tell}-service").read_text().splitlines() + Path(f"{tell}-probe").read_text().splitlines()
    spans = [found.group(1) for found in map(TOLD.match, told) if found]
    assert len(spans) == 3 and len(set(spans)) == 1 and spans[0] not in (PARENT, "0" * 16)
    assert {json.loads(line)["trace_id"] for line in (app.directory / "log").read_text().splitlines()} == {TRACE}
    assert app.history()[-1]["by"]["traceparent"] == f"00-{TRACE}-{PARENT}-01"
    app.run("deploy", app.artifact("1.1"), "--log-file", app.directory / "text", env={"TRACEPARENT": f"00-{TRACE}-{PARENT}-00"})
    assert all(f"trace_id={TRACE}" in line for line in (app.directory / "text").read_text().splitlines())


def test_a_probe_over_http_is_part_of_the_trace(app: App) -> None:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(5)
        heads = []  # type: List[bytes]

        def answer() -> None:
            while len(heads) < 2:
                talk, _ = listening.accept()
                heads.append(talk.recv(65536))
                talk.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
                talk.close()
        threading.Thread(target=answer, daemon=True).start()
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/"
        run_deploy("probe", "--url", url, env={"TRACEPARENT": f"00-{TRACE}-{PARENT}-01"}, check=0)
        run_deploy("probe", "--url", url, check=0)
    assert re.search(rf"\r\ntraceparent: 00-{TRACE}-(?!{PARENT})[0-9a-f]{{16}}-01\r\n".encode(), heads[0])
    assert b"traceparent" not in heads[1]


@pytest.mark.parametrize("text", [
    "", "x", f"00-{'0' * 32}-{PARENT}-01", f"00-{TRACE}-{'0' * 16}-01", f"00-{TRACE.upper()}-{PARENT}-01", f"ff-{TRACE}-{PARENT}-01",
    f"01-{TRACE}-{PARENT}-01", f"00-{TRACE}-{PARENT}", f"00-{TRACE}-{PARENT}-01-more", f"00-{TRACE}-{PARENT}-01\n", f"00-{TRACE[1:]}-{PARENT}-01"])
def test_what_is_no_trace_is_ignored(text: str, app: App) -> None:
    app.configure("[hooks]\npre_activate = env\n")
    result = app.run("-v", "deploy", app.artifact("1.0"), "--log-file", app.directory / "log", env={"TRACEPARENT": text}, check=0)
    hook = next(step["output"] for step in result.data["steps"] if step["name"] == "hook:pre_activate")
    assert not any("TRACE" in line for line in hook)
    assert "traceparent" not in app.history()[-1]["by"] and "trace_id=" not in (app.directory / "log").read_text()
