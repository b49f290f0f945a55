"""The command line: options, output, exit codes, terminals, pipes, logs and odd surroundings."""

import errno
import fcntl
import json
import os
import pty
import pwd
import re
import select
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import time
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple, Optional

import pytest

from support import (
    DEPLOY, TESTS, App, Result, clean_environment, decode_one_object, deploy_argv, free_port, load_deploy, make_artifact, needs,
    run_deploy, start_deploy, wait_until, write_checksum)

deploy = load_deploy()

KEYS = {"ok", "changed", "failed", "command", "exit_code", "msg", "application", "root", "release", "previous", "rolled_back",
        "deploy_id", "dry_run", "steps", "checks", "summary", "warnings", "error", "seconds"}
SUMMARY_KEYS = {"checked", "changed", "failed", "warnings"}
GLOBAL_OPTIONS = ("-c", "--config", "--root", "-n", "--dry-run", "--json", "-v", "--verbose", "-q", "--quiet", "--no-color",
                  "--wait-lock", "--set", "--log-file", "--log-format", "--detailed-exitcode", "--debug")


def wrong_with(result: Result) -> List[str]:
    """What the one JSON object of a run lacks or contradicts."""
    data = result.data
    problems = [f"no {name}" for name in sorted(KEYS - set(data))]
    if problems:
        return problems
    if set(data["summary"]) != SUMMARY_KEYS or any(type(number) is not int for number in data["summary"].values()):
        problems.append(f"summary is {data['summary']}")
    problems += [f"summary's {key} is {count}" for key, count in data["summary"].items() if type(count) is not int]
    if data["exit_code"] != result.exit_code:
        problems.append(f"exit_code {data['exit_code']}, really {result.exit_code}")
    if data["ok"] is not (result.exit_code in (0, 10)) or data["failed"] is data["ok"]:
        problems.append(f"ok {data['ok']}, failed {data['failed']}")
    if (data["error"] is None) is not data["ok"]:
        problems.append(f"error is {data['error']}")
    if data["error"] and not (data["error"]["message"] and data["error"]["hint"]):
        problems.append(f"error is {data['error']}")
    if data["error"] and data["error"]["message"] != data["msg"]:
        problems.append(f"msg is {data['msg']!r}")
    problems += [f"step {step}" for step in data["steps"] if set(step) != {"name", "status", "seconds", "detail"}]
    problems += [f"check {check}" for check in data["checks"] if set(check) != {"name", "status", "detail", "hint"}]
    return problems


def assert_two_lines(result: Result) -> None:
    """stderr ends with the two lines of an error, and shows no traceback."""
    lines = result.stderr.splitlines()
    assert len(lines) >= 2, result.describe()
    assert re.match(r"deploy\.py: error: \S", lines[-2]), result.describe()
    assert re.match(r"hint: \S", lines[-1]), result.describe()
    assert "Traceback" not in result.stderr


class OnTerminal(NamedTuple):
    """How a run on a pseudo-terminal ended, and every byte it showed."""

    exit_code: int
    output: bytes


def run_on_terminal(*args: Any, env: Optional[Dict[str, Optional[str]]] = None, timeout: float = 60, columns: int = 200,
                    **options: Any) -> OnTerminal:
    """Run deploy.py with stdout and stderr on one pseudo-terminal."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    process = subprocess.Popen(deploy_argv(*args, json=False, **options), env=clean_environment(env), cwd="/", stdin=slave,
                               stdout=slave, stderr=slave, start_new_session=True)
    os.close(slave)
    output, deadline = b"", time.monotonic() + timeout
    try:
        while time.monotonic() < deadline:
            if select.select([master], [], [], 0.2)[0]:
                try:
                    data = os.read(master, 65536)
                except OSError as error:  # EIO: nobody holds the other end any more
                    assert error.errno == errno.EIO
                    break
                if not data:
                    break
                output += data
        return OnTerminal(process.wait(max(0.1, deadline - time.monotonic())), output)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        os.close(master)


def python_hook(code: str) -> str:
    """A hook's command line that runs Python code (without single quotes or newlines)."""
    return f"{sys.executable} -ISc '{code}'"


@pytest.fixture(scope="module")
def live(tmp_path_factory: Any) -> App:
    """An application with 1.0 retired and 1.1 live, for tests that only look."""
    app = App(tmp_path_factory.mktemp("live") / "app")
    app.deploy("1.0")
    app.deploy("1.1")
    return app


# -- global options ----------------------------------------------------------

def global_words(app: App, log: Path) -> List[str]:
    """Every global option that can be seen to have worked."""
    return ["-c", str(app.config), "--root", str(app.root), "--json", "-v", "--no-color", "--wait-lock", "1s",
            "--set", "deploy.min_free=1M", "--set", "vars.X=1", "--log-file", str(log), "--log-format", "json",
            "--detailed-exitcode", "--debug"]


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_global_options_count_before_and_after_the_command(before: bool, app: App) -> None:
    artifact, log = app.artifact("1.0"), app.directory / "run.log"
    words, command = global_words(app, log), ["stage", str(artifact)]
    result = run_deploy(*(words + command if before else command + words), json=False, check=10)
    data = decode_one_object(result)
    assert data["changed"] is True and data["root"] == str(app.root) and len(app.releases()) == 1
    assert all(json.loads(line) for line in log.read_text().splitlines()) and log.stat().st_size
    assert any("1.0 MB kept free" in check["detail"] for check in data["checks"])
    assert "python" in result.stderr  # -v


@pytest.mark.parametrize("words", [["-n", "stage", "{artifact}"], ["stage", "--dry-run", "{artifact}"], ["stage", "{artifact}", "-n"]],
                         ids=["before", "between", "after"])
def test_dry_run_counts_wherever_it_stands(words: List[str], app: App) -> None:
    artifact = app.artifact("1.0")
    result = app.run(*[word.format(artifact=artifact) for word in words], check=0)
    assert result.data["dry_run"] is True and app.releases() == []


def test_a_configuration_and_an_artifact_behind_a_double_dash_go_together() -> None:
    flags = deploy.parse_command_line(["-c", "a.ini", "deploy", "--set", "deploy.root=/r", "--", "-artifact"])
    assert (flags.config, flags.set, flags.artifact) == (["a.ini"], ["deploy.root=/r"], "-artifact")


def test_two_dashes_end_the_flags(app: App) -> None:
    artifact = app.directory / "-1.0.tar.gz"
    app.artifact("1.0").rename(artifact)
    write_checksum(artifact)
    app.run("deploy", "--", artifact.name, cwd=app.directory, check=0)
    assert app.version == "1.0"


def test_an_option_given_in_both_places_counts_as_the_later_one(tmp_path: Path) -> None:
    result = run_deploy("--root", tmp_path / "a", "status", "--root", tmp_path / "b", check=2)
    assert result.data["root"] == str(tmp_path / "b")


@pytest.mark.parametrize("words", [["-qn"], ["-q", "-n"], ["-nv", "--quiet"]], ids=" ".join)
def test_short_options_can_be_joined(words: List[str], app: App) -> None:
    result = app.run("stage", *words, app.artifact("1.0"), check=0)
    assert result.data["dry_run"] is True and app.releases() == []


@pytest.mark.parametrize("words", [
    ["--dry", "status"], ["--conf", "x", "status"], ["--verb", "status"], ["status", "--js"], ["deploy", "--forc", "x"],
    ["stage", "--release-v", "1", "x"], ["config", "--exam"], ["stat"], ["history", "--lim", "3"],
], ids=" ".join)
def test_nothing_can_be_abbreviated(words: List[str], live: App) -> None:
    assert_two_lines(live.run(*words, check=2))


def test_help_lists_every_command_and_every_global_option() -> None:
    text = run_deploy("--help", json=False, check=0).stdout
    for name in list(deploy.COMMANDS) + list(GLOBAL_OPTIONS) + ["--version"]:
        assert re.search(rf"(?m)(^|[\s,]){re.escape(name)}\b", text), name


def test_the_help_of_a_command_shows_its_own_and_the_global_options() -> None:
    text = run_deploy("deploy", "--help", json=False, check=0).stdout
    for name in GLOBAL_OPTIONS + ("--sha256", "--release-version", "--allow-downgrade", "--force", "ARTIFACT"):
        assert name in text, name


@pytest.mark.parametrize("words", [["--version"], ["status", "--version"]], ids=" ".join)
def test_version(words: List[str]) -> None:
    assert re.match(r"deploy\.py \d+\.\d+\.\d+\n\Z", run_deploy(*words, json=False, check=0).stdout)


# -- --json ------------------------------------------------------------------

def test_every_command_answers_with_one_complete_object(app: App) -> None:
    (app.directory / "tree").mkdir()
    (app.directory / "tree" / "a").write_text("a")
    app.configure("[probe:up]\ncommand = true\nsuccesses = 1")
    runs = [
        ("preflight", app.artifact("1.0")), ("deploy", app.artifact("1.0")), ("deploy", app.artifact("1.0")),
        ("stage", app.artifact("1.1")), ("activate", "1.1"), ("rollback",), ("status",), ("releases",), ("history",), ("show", "1"),
        ("verify",), ("approve", app.artifact("1.0")), ("attest", "1.0"), ("probe",), ("pin", "1.1"), ("unpin", "1.1"), ("adopt", "current"),
        ("diff", "1.0"), ("flags", "a=on"), ("hold", "-m", "why"), ("unhold",), ("report",), ("prune",), ("recover",), ("config",),
        ("config", "--example"), ("history", "--verify"), ("-n", "deploy", app.artifact("1.2")), ("-n", "recover"), ("-n", "prune"),
        ("pack", app.directory / "tree", "-o", app.directory / "tree.tar.gz"),
        ("-n", "pack", app.directory / "tree", "-o", app.directory / "tree.tar.gz"), ("-q", "status"), ("maintenance", "off"), ("help",), ("completion", "zsh"),
    ]
    # `logs` needs a journal, `sync` a source; both have tests of their own.
    assert {word for run in runs for word in run} >= set(deploy.COMMANDS) - {"logs", "sync"}
    offenders = []
    for words in runs:
        result = app.run(*words, check=0)
        problems = wrong_with(result)
        command = next(word for word in words if word in deploy.COMMANDS)
        if result.data.get("command") != command:
            problems.append(f"command is {result.data.get('command')}")
        offenders += [f"{' '.join(map(str, words))}: {problem}" for problem in problems]
    assert offenders == []


DATA = [
    ("releases", ["releases"], "releases", list), ("history", ["history"], "history", list), ("plan", ["-n", "rollback"], "plan", list),
    ("probes", ["probe", "--command", "true"], "probes", list), ("config", ["config"], "config", dict),
    ("differences", ["verify"], "differences", dict), ("removed", ["prune"], "removed", list),
    ("recovered", ["recover"], "recovered", list), ("show", ["show", "1"], "history", list),
]


@pytest.mark.parametrize("name,words,key,kind", DATA, ids=[row[0] for row in DATA])
def test_commands_add_their_own_key(name: str, words: List[str], key: str, kind: type, live: App) -> None:
    assert isinstance(live.run(*words, check=0).data[key], kind)


ERRORS = [
    ("no-command", [], 2), ("unknown-command", ["deploi"], 2), ("unknown-option", ["status", "--frobnicate"], 2),
    ("no-artifact-given", ["deploy"], 2), ("too-many-arguments", ["status", "x"], 2), ("value-missing", ["status", "--root"], 2),
    ("config-missing", ["-c", "/nonexistent/deploy.ini", "status"], 2), ("unknown-key", ["--set", "deploy.rot=x", "status"], 2),
    ("no-root", ["--set", "deploy.root=", "status"], 2), ("root-missing", ["--root", "/nonexistent/root", "status"], 2),
    ("root-is-a-file", ["--root", "/etc/passwd", "status"], 3), ("root-unmakable", ["--root", "/proc/x/y", "deploy", "{artifact}"], 3),
    ("artifact-missing", ["deploy", "/nonexistent/a.tar.gz"], 4), ("artifact-is-text", ["deploy", "{text}"], 4),
    ("artifact-empty", ["deploy", "{empty}"], 4), ("artifact-without-digest", ["deploy", "{bare}"], 4),
    ("digest-wrong", ["deploy", "{artifact}", "--sha256", "0" * 64], 4), ("digest-no-hex", ["deploy", "{artifact}", "--sha256", "zz"], 2),
    ("version-wrong", ["deploy", "{artifact}", "--release-version", "../x"], 2),
    ("release-unknown", ["activate", "9.9"], 2), ("pin-unknown", ["pin", "9.9"], 2), ("verify-unknown", ["verify", "9.9"], 2),
    ("show-unknown", ["show", "nothing"], 2), ("limit-wrong", ["history", "--limit", "many"], 2),
    ("probe-unknown", ["probe", "web"], 2), ("probe-none", ["probe"], 2),
    ("probe-two", ["probe", "--url", "http://x/", "--tcp", "x:1"], 2),
    ("probe-wait", ["probe", "--command", "true", "--wait", "soon"], 2), ("probe-expect", ["probe", "--command", "true", "--expect", "x"], 2),
    ("probe-fails", ["probe", "--command", "false"], 7), ("probe-no-program", ["probe", "--command", "no-such-program"], 7),
    ("pack-missing", ["pack", "/nonexistent"], 2), ("pack-a-file", ["pack", "{text}"], 2),
    ("pack-to-a-pipe", ["pack", "{directory}", "-o", "-"], 2),
    ("pack-into-nothing", ["pack", "{directory}", "-o", "/nonexistent/x.tar.gz"], 1),
    ("log-unwritable", ["--log-file", "/nonexistent/x.log", "status"], 2), ("log-is-a-directory", ["--log-file", "/", "status"], 2),
    ("preflight-fails", ["preflight", "--set", "deploy.min_free=999T"], 3),
    ("deploy-fails-preflight", ["deploy", "{artifact}", "--set", "deploy.min_free=999T"], 3),
    ("downgrade", ["deploy", "{older}"], 4), ("recover-to-unknown", ["recover", "--to", "9.9"], 2),
    ("hook-program-missing", ["deploy", "{artifact}", "--set", "hooks.pre_stage=no-such-program"], 3),
    ("hook-fails", ["deploy", "{artifact}", "--set", "hooks.pre_activate=false"], 1),
    ("run-as-nobody-knows", ["deploy", "{artifact}", "--set", "hooks.run_as=no-such-user"], 3),
]


@pytest.fixture(scope="module")
def mistakes(tmp_path_factory: Any) -> App:
    """An application with a live release, for commands that must fail and change nothing that is live."""
    app = App(tmp_path_factory.mktemp("mistakes") / "app")
    app.deploy("1.0")
    return app


@pytest.mark.parametrize("name,words,exit_code", ERRORS, ids=[row[0] for row in ERRORS])
def test_every_mistake_gives_one_complete_object_two_lines_and_no_traceback(
        name: str, words: List[str], exit_code: int, mistakes: App) -> None:
    inputs = mistakes.directory / "inputs"
    inputs.mkdir(exist_ok=True)
    (inputs / "text.tar.gz").write_text("this is no archive\n")
    (inputs / "empty.tar.gz").write_bytes(b"")
    bare = make_artifact(inputs / "bare", "3.0")
    bare.with_name(bare.name + ".sha256").unlink()
    paths = {"artifact": mistakes.artifact("2.0"), "text": inputs / "text.tar.gz", "empty": inputs / "empty.tar.gz", "bare": bare,
             "older": mistakes.artifact("0.9"), "directory": inputs}
    before = mistakes.current
    result = mistakes.run(*[word.format(**paths) for word in words])
    assert result.exit_code == exit_code, result.describe()
    assert wrong_with(result) == []
    assert_two_lines(result)
    assert mistakes.current == before


def test_an_error_after_activation_gives_one_complete_object(app: App) -> None:
    app.deploy("1.0")
    result = app.run("deploy", app.artifact("1.1"), "--set", "hooks.post_activate=false", check=5)
    assert wrong_with(result) == [] and result.data["rolled_back"] is True
    assert_two_lines(result)
    result = app.run("deploy", app.artifact("1.2"), "--set", "hooks.post_activate=false", "--set", "deploy.auto_rollback=no", check=6)
    assert wrong_with(result) == [] and result.data["release"] == app.current
    assert_two_lines(result)
    result = app.run("deploy", app.artifact("1.1"), "--allow-downgrade", check=4)
    assert wrong_with(result) == [] and "--force" in result.data["error"]["hint"]


def test_a_held_lock_gives_one_complete_object_that_names_the_holder(app: App) -> None:
    app.deploy("1.0")
    with open(str(app.root / ".deploy" / "lock"), "r+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write(json.dumps({"pid": 1, "user": "me", "host": "here", "command": "deploy", "since": "now"}))
        lock.flush()
        for words in (["prune"], ["prune", "--wait-lock", "100ms"]):
            result = app.run(*words, check=75)
            assert wrong_with(result) == []
            assert re.search(r"pid \d+ of \S+ on ", result.data["error"]["message"])
            assert_two_lines(result)
        assert app.run("status", check=0).data["status"]["lock"]["command"] == "deploy"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["TERM", "INT"])
def test_a_signal_before_activation_gives_one_complete_object(number: int, app: App) -> None:
    marker = app.directory / "started"
    app.configure("[hooks]\npre_activate = " + python_hook(f'import time; open("{marker}", "w").close(); time.sleep(60)'))
    with open(str(app.directory / "out"), "wb") as stdout, open(str(app.directory / "err"), "wb") as stderr:
        process = start_deploy("deploy", app.artifact("1.0"), config=app.config, stdout=stdout, stderr=stderr)
        try:
            wait_until(marker.exists, what="the hook to start")
            process.send_signal(number)
            process.wait(60)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    result = Result([], process.returncode, (app.directory / "out").read_text(), (app.directory / "err").read_text(), None)
    assert result.exit_code == 128 + number
    result = result._replace(data=decode_one_object(result))
    assert [problem for problem in wrong_with(result) if "error is" not in problem] == []
    assert app.releases() == [] and app.leftovers() == []


@pytest.mark.parametrize("words", [["--version"], ["--help"], ["status", "--help"]], ids=" ".join)
def test_help_and_version_are_one_object_too(words: List[str]) -> None:
    assert wrong_with(run_deploy(*words, check=0)) == []


# -- errors ------------------------------------------------------------------

def test_an_error_is_two_lines_and_nothing_on_stdout(tmp_path: Path) -> None:
    result = run_deploy("status", root=tmp_path / "missing", json=False, check=2)
    assert result.stdout == "" and len(result.stderr.splitlines()) == 2
    assert_two_lines(result)


@pytest.mark.parametrize("words", [["status"], ["-c", "/nonexistent/deploy.ini", "status"], ["deploi"]],
                         ids=["in-a-command", "in-the-configuration", "in-the-command-line"])
def test_debug_shows_the_traceback(words: List[str], tmp_path: Path) -> None:
    result = run_deploy("--debug", *words, root=tmp_path / "missing", json=False, check=2)
    assert "Traceback (most recent call last)" in result.stderr
    assert re.match(r"hint: ", result.stderr.splitlines()[-1])


def test_an_error_is_one_line_however_the_name_looks(tmp_path: Path) -> None:
    result = run_deploy("deploy", "/nonexistent/a\nhint: forged\x1b[31m.tar.gz", root=tmp_path, json=False, check=4)
    lines = result.stderr.splitlines()
    assert "\x1b" not in result.stderr
    assert sum(line.startswith("hint: ") for line in lines) == 1
    assert_two_lines(result)


def test_a_refusal_stands_there_once_and_several_by_name(app: App) -> None:
    one = app.run("deploy", "/nonexistent/a.tar.gz", json=False, check=4).stderr
    assert one.count("/nonexistent/a.tar.gz does not exist") == 1
    both = app.run("--set", "preflight.require_commands=nosuch", "deploy", "/nonexistent/a.tar.gz", json=False, check=4).stderr
    assert "  fail    required: nosuch of require_commands is " in both and "  fail    artifact: " in both


# -- quiet, verbose, exit code ------------------------------------------------

def test_quiet_is_silent_when_nothing_changes(live: App) -> None:
    artifact = live.directory / "artifacts" / "myapp-1.1.tar.gz"
    for words in (["deploy", artifact], ["stage", artifact], ["activate", "current"], ["status"], ["prune"], ["recover"],
                  ["preflight"], ["verify"]):
        result = live.run("-q", *words, json=False, check=0)
        assert (result.stdout, result.stderr) == ("", ""), words


def test_quiet_prints_the_result_on_stdout_and_the_rest_on_stderr_when_something_changes(app: App) -> None:
    result = app.run("-q", "deploy", app.artifact("1.0"), json=False, check=0)
    assert result.stdout.splitlines()[0].endswith(f"{app.current} is live")
    lines = result.stderr.splitlines()
    assert any("activate" in line for line in lines) and "" not in lines
    assert "is live" not in result.stderr


@pytest.mark.parametrize("words", [["rollback"], ["pin", "current"], ["pack", "{tree}", "-o", "{target}"]], ids=lambda words: words[0])
def test_quiet_says_something_whatever_changed(words: List[str], app: App) -> None:
    app.deploy("1.0")
    app.deploy("1.1")
    (app.directory / "tree").mkdir()
    (app.directory / "tree" / "a").write_text("a")
    paths = {"tree": app.directory / "tree", "target": app.directory / "tree.tar.gz"}
    result = app.run("-q", *[word.format(**paths) for word in words], json=False, check=0)
    assert result.stdout != ""


def test_quiet_still_shows_errors_with_what_led_to_them(app: App) -> None:
    app.configure("[hooks]\npre_activate = " + python_hook('print("the reason"); raise SystemExit(3)'))
    result = app.run("-q", "deploy", app.artifact("1.0"), json=False, check=1)
    assert result.stdout == "" and "    | the reason" in result.stderr
    assert_two_lines(result)


def test_verbose_shows_every_check(app: App) -> None:
    artifact = app.artifact("1.0")
    quiet, verbose = app.run("stage", "-n", artifact, check=0), app.run("stage", "-n", "-v", artifact, check=0)
    assert "inodes" not in quiet.stderr and "inodes" in verbose.stderr


def test_detailed_exitcode_says_whether_anything_changed(app: App) -> None:
    artifact = app.artifact("1.0")
    for words, exit_code in (((["-n", "deploy", artifact]), 10), (["deploy", artifact], 10), (["deploy", artifact], 0),
                             (["-n", "deploy", artifact], 0), (["pin", "current"], 10), (["pin", "current"], 0), (["status"], 0),
                             (["recover"], 0), (["prune"], 0), (["activate", "9.9"], 2)):
        result = app.run("--detailed-exitcode", *words, check=exit_code)
        assert result.data["changed"] is (exit_code == 10) and result.data["ok"] is (exit_code != 2)


# -- who ran it --------------------------------------------------------------

NAMED = """
import json, os, sys
sys.path.insert(0, sys.argv[1])
import support
deploy = support.load_deploy()
os.setuid(int(sys.argv[2]))
print(json.dumps(deploy.who()))
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
@pytest.mark.parametrize("uid, sudo_user, user, effective", [
    (0, "daemon", "daemon", "root"), (0, None, "root", "root"), (0, "no-such-user", "root", "root"), (1, "root", "daemon", "daemon")],
    ids=["sudo", "root", "unknown", "a claim of somebody else's"])
def test_the_person_behind_a_run_is_named(uid: int, sudo_user: Optional[str], user: str, effective: str) -> None:
    login = Path("/proc/self/loginuid")
    if login.exists() and login.read_text() not in ("4294967295", "0") and sudo_user != "daemon":
        pytest.skip("this session has a login of its own")
    done = subprocess.run([sys.executable, "-c", NAMED, str(TESTS / "lib"), str(uid)], stdout=subprocess.PIPE, check=True,
                          stdin=subprocess.DEVNULL, env=clean_environment({"SUDO_USER": sudo_user}))
    by = json.loads(done.stdout.decode())
    assert (by["user"], by["uid"], by["as"]) == (user, pwd.getpwnam(user).pw_uid, effective)


@pytest.mark.parametrize("env, trigger", [
    ({}, "script"), ({"INVOCATION_ID": "1"}, "systemd"), ({"SSH_CONNECTION": "a 1 b 2"}, "ssh"),
    ({"SHELL": "/bin/sh", "LOGNAME": "root", "PATH": "/usr/bin:/bin"}, "cron"),
    ({"SHELL": "/bin/sh", "LOGNAME": "root", "TERM": "xterm"}, "script")], ids=["script", "systemd", "ssh", "cron", "a shell's"])
def test_what_started_a_run_is_in_its_history(env: Dict[str, Optional[str]], trigger: str, app: App) -> None:
    app.run("stage", app.artifact("1.0"), env=env, check=0)
    assert app.history()[-1]["by"]["trigger"] == trigger


# -- terminals ---------------------------------------------------------------

COLOUR = re.compile(rb"\x1b\[[0-9;]*m")


@pytest.mark.parametrize("words,env,coloured", [
    ([], {"TERM": "xterm"}, True), ([], {"TERM": "xterm", "NO_COLOR": ""}, True), ([], {"TERM": "xterm", "NO_COLOR": "1"}, False),
    (["--no-color"], {"TERM": "xterm"}, False), ([], {"TERM": "dumb"}, False),
], ids=["terminal", "NO_COLOR-empty", "NO_COLOR", "--no-color", "dumb"])
def test_colour_only_on_a_terminal_that_wants_it(words: List[str], env: Dict[str, Optional[str]], coloured: bool, live: App) -> None:
    shown = run_on_terminal(*words, "activate", "9.9", config=live.config, env=env)
    assert shown.exit_code == 2 and b"9.9" in shown.output
    assert bool(COLOUR.search(shown.output)) is coloured


@pytest.mark.parametrize("words", [["preflight"], ["config"]], ids=" ".join)
def test_a_table_is_not_wider_than_the_terminal_and_loses_nothing(words: List[str], live: App) -> None:
    wide, narrow = [run_on_terminal(*words, config=live.config, env={"NO_COLOR": "1"}, columns=columns).output.decode().splitlines()
                    for columns in (1000, 70)]
    assert max(map(len, narrow)) <= 70 < max(map(len, wide))
    # Each word is there, and of those that are longer than their column each letter; how much is free changes.
    assert sorted(re.sub(r"[\s\d]", "", "".join(narrow))) == sorted(re.sub(r"[\s\d]", "", "".join(wide)))


def test_a_terminal_that_does_not_know_its_width_has_eighty_columns(app: App) -> None:
    app.deploy("1.0")
    shown = run_on_terminal("releases", config=app.config, env={"TERM": "xterm"}, columns=0)
    assert str(app.current).encode() in shown.output
    app.configure(f"[probe:web]\ntcp = 127.0.0.1:{free_port()}\ndeadline = 1500ms\nperiod = 100ms\nperiod_max = 100ms\nwhen = before")
    shown = run_on_terminal("preflight", config=app.config, env={"TERM": "xterm"}, columns=0)
    assert re.search(rb"\r\x1b\[K *probe web try \d+: .*ECONN", shown.output), shown.output


def test_no_colour_and_no_control_characters_in_a_pipe(app: App) -> None:
    result = app.run("deploy", app.artifact("1.0"), env={"TERM": "xterm"}, json=False, check=0)
    assert re.search("[\x00-\x09\x0b-\x1f\x7f]", result.stdout + result.stderr) is None


def test_progress_only_on_a_terminal_and_only_when_it_takes_long(app: App) -> None:
    app.configure(f"[probe:web]\ntcp = 127.0.0.1:{free_port()}\ndeadline = 2500ms\nperiod = 100ms\nperiod_max = 100ms\nwhen = before")
    argv = ["preflight", app.artifact("1.0")]
    with open(str(app.directory / "err"), "wb") as stderr:
        piped = start_deploy(*argv, config=app.config, env={"TERM": "xterm"}, stderr=stderr)
        shown = run_on_terminal(*argv, config=app.config, env={"TERM": "xterm"})
        assert piped.wait(60) == shown.exit_code == 3
    assert b"\r\x1b[K" in shown.output and re.search(rb"\r\x1b\[K *probe web", shown.output)
    assert b"\r" not in (app.directory / "err").read_bytes()
    for _ in range(3):  # on a busy host one may take long all the same
        short = run_on_terminal("preflight", config=app.config, env={"TERM": "xterm", "DEPLOY_PROBE_WEB_DEADLINE": "100ms"})
        if b"\r\x1b[K" not in short.output:
            break
    assert short.exit_code == 3 and b"\r\x1b[K" not in short.output


@pytest.mark.parametrize("locale,ascii_only", [("C", True), ("C.UTF-8", False)])
def test_what_is_shown_fits_the_locale(locale: str, ascii_only: bool, app: App) -> None:
    app.configure("[hooks]\npost_stage = echo caf\u00e9\n")
    shown = run_on_terminal("deploy", app.artifact("1.0"), config=app.config, env={"TERM": "xterm", "LC_ALL": locale})
    assert shown.exit_code == 0 and b"unpack" in shown.output
    assert all(byte < 128 for byte in shown.output) is ascii_only


def test_output_is_ascii_when_the_locale_is_c(tmp_path: Path) -> None:
    root = tmp_path / "caf\u00e9"
    for words in (["deploy", make_artifact(tmp_path / "in", "1.0")], ["status"], ["releases"]):
        result = run_deploy(*words, root=root, env={"LC_ALL": "C", "LANG": None}, json=False, check=0)
        assert all(ord(character) < 128 for character in result.stdout + result.stderr), result.describe()


# -- mistakes are told in the words that were typed ---------------------------

@pytest.mark.parametrize("words, message, hint", [
    (["prune", "--splay="], "--splay: given, but empty", "stand behind it"),
    (["prune", "--log-file", ""], "--log-file: given, but empty", "stand behind it"),
    (["probe", "--command", ""], "--command: given, but empty", "stand behind it"),
    (["pin", ""], "RELEASE: given, but empty", "stand behind it"),
    (["probe", "--tcp", "127.0.0.1:1", "--expect", "timeuot=1s"], "--expect: unknown key 'timeuot'", "did you mean 'timeout'?"),
    (["probe", "--tcp", "127.0.0.1:1", "--expect", "timeout"], "--expect 'timeout': expected KEY=VALUE", "json.status=ok"),
    (["probe", "--tcp", "127.0.0.1:1", "--expect", "period=x"], "--expect: [probe:ad-hoc] period = 'x'", "deadline is near"),
])
def test_a_mistake_is_told_in_the_words_that_were_typed(words: List[str], message: str, hint: str) -> None:
    error = run_deploy(*words, check=2).data["error"]
    assert error["message"].startswith(message) and error["hint"].endswith(hint)


# -- closed streams ----------------------------------------------------------

STREAMS = ["config", "releases", "deploy", "--help", "--version", "config --example", "status --json", "activate 9.9"]


@pytest.mark.parametrize("words,closed", [(words, "pipe") for words in STREAMS] + [
    (words, "closed") for words in ("--help", "deploy", "status --json")])
def test_a_stdout_that_takes_nothing_never_changes_the_exit_code(words: str, closed: str, live: App) -> None:
    argv = words.split() + ([str(live.directory / "artifacts" / "myapp-1.1.tar.gz")] if words == "deploy" else [])
    command = [sys.executable, str(DEPLOY), "-c", str(live.config)] + argv
    expected = 2 if "activate" in words else 0
    done = run_with_stdout(command, closed)
    assert done.returncode == expected, done.stderr
    assert b"Traceback" not in done.stderr and b"Exception ignored" not in done.stderr


@pytest.mark.parametrize("words, expected", [("--help", 1), ("config --example", 1), ("help systemd", 1), ("status --json", 1), ("status", 1),
                                             ("activate 9.9", 2), ("pin current", 0), ("prune", 1), ("pack DIRECTORY", 0)])
def test_a_full_disk_under_stdout_is_told_and_fails_what_only_prints(words: str, expected: int, live: App, tmp_path: Path) -> None:
    """`config --example > deploy.ini` left an empty file and said nothing."""
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "file").write_text("x")
    argv = [str(tmp_path / "d") if word == "DIRECTORY" else word for word in words.split()]
    done = run_with_stdout([sys.executable, str(DEPLOY), "-c", str(live.config)] + argv, "full")
    assert done.returncode == expected, done.stderr
    assert done.stderr.count(b"deploy.py: error: stdout: No space left on device") == (expected != 2)


def run_with_stdout(command: List[str], closed: str) -> Any:
    """Run with stdout a pipe that nobody reads, closed, or a full disk."""
    options = {"env": clean_environment(), "cwd": "/", "stdin": subprocess.DEVNULL, "stderr": subprocess.PIPE, "timeout": 60}  # type: Any
    if closed == "closed":
        return subprocess.run(["/bin/sh", "-c", 'exec "$@" >&-', "sh"] + command, **options)
    if closed == "full":
        with open("/dev/full", "wb") as full:
            return subprocess.run(command, stdout=full, **options)
    reader, writer = os.pipe()
    os.close(reader)
    try:
        return subprocess.run(command, stdout=writer, **options)
    finally:
        os.close(writer)


@pytest.mark.parametrize("how", ["2>&-", ">&- 2>&-", "<&- >&- 2>&-", "2>/dev/full", ">/dev/full 2>/dev/full"])
def test_a_deployment_succeeds_with_its_streams_closed(how: str, app: App) -> None:
    app.configure("[hooks]\npost_stage = " + python_hook('import sys; print("out"); print("err", file=sys.stderr)'))
    argv = deploy_argv("deploy", app.artifact("1.0"), config=app.config, json=False)
    done = subprocess.run(["/bin/sh", "-c", f'exec "$@" {how}', "sh"] + argv, env=clean_environment(), cwd="/", timeout=60)
    assert done.returncode == 0 and app.version == "1.0"
    assert app.run("verify", check=0).data["ok"] and app.run("history", "--verify", check=0).data["ok"]
    assert app.leftovers() == []


def test_the_first_line_can_be_taken_by_head(live: App) -> None:
    script = f'set -o pipefail; "{sys.executable}" "{DEPLOY}" -c "{live.config}" config | head -1'
    done = subprocess.run([needs("bash"), "-c", script], env=clean_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert (done.returncode, done.stdout.split()[:1], done.stderr) == (0, [b"SECTION"], b"")


# -- odd surroundings --------------------------------------------------------

LOCALES = [{}, {"LC_ALL": "C", "LANG": None}, {"LC_ALL": "C", "LANG": None, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}]


@pytest.mark.parametrize("env", LOCALES, ids=["utf-8", "C", "ascii"])
def test_odd_bytes_in_file_names_survive(env: Dict[str, Optional[str]], tmp_path: Path) -> None:
    odd = os.fsdecode(b"odd \xff \xc3\xa9")
    names = {f"{odd}.txt": "odd", "caf\u00e9/x": "x"}
    artifact = make_artifact(tmp_path / odd, "1.0", names)
    root = tmp_path / (odd + "-root")
    for as_json, words in ((True, ["deploy", artifact]), (True, ["status"]), (False, ["status"]), (False, ["releases"]),
                           (False, ["show", "1"]), (False, ["preflight", artifact])):
        run_deploy(*words, root=root, env=env, check=0, json=as_json)
    assert sorted(os.listdir(os.fsencode(str(root / "current")))) == sorted(
        [b"VERSION", b"bin", b"lib", b"data", b"log", b"caf\xc3\xa9", b"odd \xff \xc3\xa9.txt"])
    (root / "current" / f"{odd}.txt").write_text("changed")
    found = run_deploy("verify", root=root, env=env, check=7)
    assert found.data["differences"]["changed"] == [f"{odd}.txt"]


def test_it_runs_with_an_empty_environment(app: App) -> None:
    argv = deploy_argv("deploy", app.artifact("1.0"), config=app.config)
    done = subprocess.run([needs("env"), "-i"] + argv, cwd="/", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.decode("ascii"))["ok"] and app.version == "1.0"


@pytest.mark.parametrize("words", [["deploy", "{artifact}"], ["status"], ["preflight"], ["config"], ["-n", "stage", "{artifact}"]],
                         ids=lambda words: words[0] if words[0] != "-n" else "dry-run")
def test_it_runs_from_a_deleted_working_directory(words: List[str], app: App) -> None:
    app.deploy("1.0")
    gone = app.directory / "gone"
    gone.mkdir()
    argv = deploy_argv(*[word.format(artifact=app.artifact("1.1")) for word in words], config=app.config)
    done = subprocess.run(["/bin/sh", "-c", 'cd "$1" && rmdir "$1" && shift && exec "$@"', "sh", str(gone)] + argv,
                          env=clean_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert done.returncode == 0, done.stderr.decode("utf-8", "replace")
    assert json.loads(done.stdout.decode("ascii"))["ok"]


HOSTILE = ("json", "argparse", "configparser", "subprocess", "hashlib", "logging", "shlex", "socket", "difflib", "tempfile", "tarfile",
           "zipfile", "pwd", "ssl", "traceback", "deploy")


@pytest.fixture
def hostile(tmp_path: Path) -> Iterator[Path]:
    """A directory of modules that leave a mark when they are imported; afterwards there must be none."""
    directory, mark = tmp_path / "hostile", tmp_path / "mark"
    directory.mkdir()
    for name in HOSTILE:
        (directory / f"{name}.py").write_text(f"open({str(mark)!r}, 'a').write({name!r} + chr(10))\nraise SystemExit(99)\n")
    yield directory
    assert not mark.exists(), mark.read_text()


@pytest.mark.parametrize("where", ["beside", "cwd", "PYTHONPATH", "home"])
def test_no_module_of_somebody_elses_is_imported(where: str, hostile: Path, app: App) -> None:
    script, env, cwd = DEPLOY, {}, Path("/")  # type: Path, Dict[str, Optional[str]], Path
    if where == "beside":
        script = Path(shutil.copy(str(DEPLOY), str(hostile / "deploy.py")))
    elif where == "cwd":
        cwd, env = hostile, {"PYTHONPATH": ""}
    elif where == "PYTHONPATH":
        env = {"PYTHONPATH": str(hostile)}
    else:
        site = app.directory / ".local" / "lib" / ("python%d.%d" % sys.version_info[:2]) / "site-packages"
        shutil.copytree(str(hostile), str(site))
        env = {"HOME": str(app.directory)}
    done = subprocess.run([sys.executable, str(script), "--json", "-c", str(app.config), "--log-file", str(app.directory / "log"),
                           "deploy", str(app.artifact("1.0"))], env=clean_environment(env), cwd=str(cwd),
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert done.returncode == 0, done.stderr
    assert app.version == "1.0"


def test_it_leaves_no_bytecode_and_nothing_beside_itself(tmp_path: Path) -> None:
    script = shutil.copy(str(DEPLOY), str(tmp_path / "deploy.py"))
    env = clean_environment({"PYTHONDONTWRITEBYTECODE": None})
    subprocess.check_call([sys.executable, script, "config"], env=env, cwd=str(tmp_path), stdout=subprocess.DEVNULL)
    assert os.listdir(str(tmp_path)) == ["deploy.py"]


@pytest.mark.skipif(os.geteuid() != 0, reason="changing the user needs root")
def test_it_runs_without_a_passwd_entry_for_its_user() -> None:
    # Not in tmp_path, which other users cannot enter.
    place = Path(tempfile.mkdtemp(prefix="deploy-test-uid-"))
    try:
        artifact = make_artifact(place, "1.0")
        place.chmod(0o777)
        done = subprocess.run(
            [needs("setpriv"), "--reuid=61234", "--regid=61234", "--clear-groups", "/usr/bin/python3", "-I", "-", "--json",
             "--root", str(place / "root"), "deploy", str(artifact)],
            input=DEPLOY.read_bytes(), env={}, cwd="/", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout.decode("ascii"))["ok"]
        assert (place / "root" / "current" / "VERSION").stat().st_uid == 61234
    finally:
        shutil.rmtree(str(place))


# -- the log -----------------------------------------------------------------

def deploy_with_log(app: App, log_format: str) -> Result:
    """Deploy with a hook that prints a line and two secrets, into run.log."""
    app.configure("[env]\nDB_PASSWORD = swordfish-9\n[hooks]\npre_activate = " + python_hook(
        'import os; print("hook speaks"); print("password=" + os.environ["DB_PASSWORD"]); '
        'print("http://me:letmein9@127.0.0.1/x?t=1")'))
    return app.run("deploy", app.artifact("1.0"), "--log-file", app.directory / "run.log", "--log-format", log_format, check=0)


def test_a_json_log_has_deploy_id_release_and_step(app: App) -> None:
    result = deploy_with_log(app, "json")
    lines = [json.loads(line) for line in (app.directory / "run.log").read_text(encoding="utf-8").splitlines()]
    assert {line["deploy_id"] for line in lines} == {result.data["deploy_id"]}
    assert {line["level"] for line in lines} <= {"debug", "info", "warning", "error"}
    assert all(re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ\Z", line["time"]) for line in lines)
    said = [line for line in lines if line["message"] == "hook speaks"]
    assert [(line["step"], line["release"]) for line in said] == [("hook:pre_activate", app.current)]
    assert not any("step" in line for line in lines if line["message"].startswith("checked "))


def test_the_end_of_a_step_is_logged_under_that_step(app: App) -> None:
    result = deploy_with_log(app, "json")
    lines = [json.loads(line) for line in (app.directory / "run.log").read_text(encoding="utf-8").splitlines()]
    done = [line.get("step") for line in lines if line["message"].startswith("done: ")]
    assert done == [step["name"] for step in result.data["steps"]]


def test_a_text_log_has_time_level_deploy_id_release_and_step(app: App) -> None:
    result = deploy_with_log(app, "text")
    lines = (app.directory / "run.log").read_text(encoding="utf-8").splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ (DEBUG|INFO|WARNING|ERROR) ", line) for line in lines)
    said = next(line for line in lines if line.endswith("hook speaks"))
    for part in (f"deploy_id={result.data['deploy_id']}", f"release={app.current}", "step=hook:pre_activate"):
        assert part in said


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_the_log_the_history_and_the_output_mask_secrets(log_format: str, app: App) -> None:
    result = deploy_with_log(app, log_format)
    app.run("show", "1", "--log-file", app.directory / "run.log", check=0)
    everything = result.stdout + result.stderr + (app.directory / "run.log").read_text() + json.dumps(app.history())
    assert "[masked]" in result.stderr and "hook speaks" in everything
    assert "swordfish-9" not in everything and "letmein9" not in everything


def test_errors_and_runs_that_change_nothing_are_logged_too(live: App, tmp_path: Path) -> None:
    live.run("activate", "9.9", "--log-file", tmp_path / "log", check=2)
    live.run("status", "--log-file", tmp_path / "log", check=0)
    lines = (tmp_path / "log").read_text().splitlines()
    assert any(" ERROR " in line and "9.9" in line for line in lines)


def test_a_log_line_cannot_be_forged_by_a_hook(app: App) -> None:
    app.configure("[hooks]\npre_activate = " + python_hook(
        r'import sys; sys.stdout.buffer.write(b"a\r2026-01-01T00:00:00Z ERROR forged\x1b[2J\xe2\x80\xa8b\xff\n")'))
    app.run("deploy", app.artifact("1.0"), "--log-file", app.directory / "log", check=0)
    text = (app.directory / "log").read_bytes().decode("utf-8")
    assert not any(line.startswith("2026-01-01T00:00:00Z ERROR forged") for line in text.splitlines())
    assert "\x1b" not in text and "\u2028" not in text
