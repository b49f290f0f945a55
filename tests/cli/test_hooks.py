"""Hooks through the command line: when they run, with what, and what becomes of a run when they fail."""

import json
import os
import pwd
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Dict, Iterator, List

import pytest

from crashes import content, is_running, script, under, wait_gone
from support import App, clean_environment, deep, deploy_argv, described, file, needs, run_deploy, start_deploy, wait_until

FORWARD = ["pre_stage", "post_stage", "pre_activate", "post_activate", "post_deploy"]
EVERY = FORWARD + ["on_failure", "pre_rollback", "post_rollback"]

SPY = """#!{python} -IS
import json, os, sys
def link(path):
    try:
        return os.readlink(path)
    except OSError:
        return None
with open({log!r}, "a") as log:
    log.write(json.dumps({{
        "env": dict(os.environ), "cwd": os.getcwd(), "current": link({current!r}), "argv": sys.argv[1:],
        "stdin": os.read(0, 10).decode(), "fds": sorted(link("/proc/self/fd/" + fd) or "" for fd in os.listdir("/proc/self/fd")),
        "session": os.getsid(0), "pid": os.getpid(), "umask": os.umask(0)}}) + "\\n")
"""


class Spy:
    """A program that notes how it is run, for every hook."""

    def __init__(self, app: App) -> None:
        self.path, self.log = app.directory / "spy", app.directory / "spy.log"
        self.path.write_text(SPY.format(python=sys.executable, log=str(self.log), current=str(app.root / "current")))
        self.path.chmod(0o755)

    def calls(self) -> List[Dict[str, Any]]:
        """Every call since the last question."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        self.log.write_text("")
        return [json.loads(line) for line in lines]

    def hooks(self, **others: str) -> str:
        """A [hooks] section in which every hook is the spy."""
        return "[hooks]\n" + "".join(f"{name} = {others.get(name, self.path)}\n" for name in EVERY)


@pytest.fixture
def spy(app: App) -> Spy:
    """A spy in the application's directory."""
    return Spy(app)


def names(calls: List[Dict[str, Any]]) -> List[str]:
    """Which hooks were called."""
    return [call["env"]["DEPLOY_HOOK"] for call in calls]


def pids_in(path: Path) -> List[int]:
    """The process ids that a script wrote down, one a line."""
    return [int(line) for line in path.read_text().split()] if path.exists() else []


@pytest.fixture
def pids(tmp_path: Path) -> Iterator[Path]:
    """A file for process ids; what still runs at the end is killed."""
    path = tmp_path / "pids"
    yield path
    for pid in pids_in(path):
        if is_running(pid):
            os.kill(pid, signal.SIGKILL)


# -- when and with what ----------------------------------------------------------

def test_every_hook_runs_at_its_point(app: App, spy: Spy) -> None:
    app.configure(spy.hooks())
    first = app.deploy("1.0").data
    spy.calls()
    second = app.deploy("1.1").data
    old, new = "releases/" + first["release"], "releases/" + second["release"]
    assert [(call["env"]["DEPLOY_HOOK"], call["current"]) for call in spy.calls()] == [
        ("pre_stage", old), ("post_stage", old), ("pre_activate", old), ("post_activate", new), ("post_deploy", new)]
    app.run("rollback", check=0)
    assert [(call["env"]["DEPLOY_HOOK"], call["current"]) for call in spy.calls()] == [
        ("pre_rollback", new), ("post_rollback", old)]
    app.run("stage", app.artifact("1.2"), check=0)
    assert names(spy.calls()) == ["pre_stage", "post_stage"]
    app.run("activate", "1.2", check=0)
    assert names(spy.calls()) == ["pre_activate", "post_activate", "post_deploy"]


def test_no_hook_runs_when_there_is_nothing_to_do_or_in_a_dry_run(app: App, spy: Spy) -> None:
    app.configure(spy.hooks())
    app.deploy("1.0")
    spy.calls()
    app.deploy("1.0")
    app.run("-n", "deploy", app.artifact("1.1"), check=0)
    app.run("-n", "rollback")
    assert spy.calls() == []


def test_a_hook_gets_exactly_the_documented_environment(app: App, spy: Spy) -> None:
    app.configure(spy.hooks() + "[env]\nMODE = blue green\nQUOTED = a = 'b' ; c\n")
    first = app.deploy("1.0").data
    spy.calls()
    second = app.run("deploy", app.artifact("1.1"), check=0, env={"SECRET_OF_OURS": "x", "PYTHONPATH": "/nowhere"}).data
    home = clean_environment()["HOME"]
    for call in [call for call in spy.calls() if call["env"]["DEPLOY_HOOK"] != "pre_stage"]:
        path = call["env"].pop("PATH").split(":")
        assert {"/usr/sbin", "/usr/bin", "/sbin", "/bin"} <= set(path) and "" not in path
        assert call["env"] == {
            "HOME": home, "LANG": "C.UTF-8", "MODE": "blue green", "QUOTED": "a = 'b' ; c",
            "DEPLOY_APPLICATION": "myapp", "DEPLOY_ROOT": str(app.root), "DEPLOY_RELEASE": second["release"],
            "DEPLOY_VERSION": "1.1", "DEPLOY_RELEASE_PATH": f"{app.root}/releases/{second['release']}",
            "DEPLOY_CURRENT_PATH": f"{app.root}/current", "DEPLOY_SHARED_PATH": f"{app.root}/shared",
            "DEPLOY_PREVIOUS_RELEASE": first["release"], "DEPLOY_ID": second["deploy_id"],
            "DEPLOY_HOOK": call["env"]["DEPLOY_HOOK"]}
        assert call["cwd"] == f"{app.root}/releases/{second['release']}"


def test_pre_stage_knows_which_release_is_about_to_be_made(app: App, spy: Spy) -> None:
    app.configure(spy.hooks())
    release = app.deploy("1.0").data["release"]
    call = spy.calls()[0]
    assert call["env"]["DEPLOY_HOOK"] == "pre_stage" and call["cwd"].startswith(str(app.root))
    assert (call["env"]["DEPLOY_VERSION"], call["env"]["DEPLOY_RELEASE"]) == ("1.0", release)


def test_a_hook_has_no_stdin_no_descriptors_and_a_session_of_its_own(app: App, spy: Spy) -> None:
    app.configure(spy.hooks())
    app.deploy("1.0")
    for call in spy.calls():
        assert call["stdin"] == "" and call["session"] == call["pid"] and call["umask"] == 0o022
        inherited = [fd for fd in call["fds"] if fd.startswith(str(app.root))]
        assert not inherited, f"{names([call])} inherited {inherited}: an inherited lock outlives its holder"


def test_a_hook_is_an_argv_and_never_a_shell_line(app: App, spy: Spy) -> None:
    app.configure(f"[hooks]\npre_stage =\n  {spy.path} 'a b' '$HOME' '*; touch owned' \\* foo$ x=~/y\n  {spy.path} second \"q'q & (z)\"\n")
    app.deploy("1.0")
    assert [call["argv"] for call in spy.calls()] == [["a b", "$HOME", "*; touch owned", "*", "foo$", "x=~/y"], ["second", "q'q & (z)"]]


SHELL = [
    "bin/migrate && bin/seed", "a || b", "a | b", "a; b", "a &", "echo x > f", "a < f", "a 2>&1", "rm *.log", "ls file?", "echo $HOME/x",
    'echo "$HOME"', "echo $(id)", 'echo "`id`"', "echo ${HOME}", "ls ~/x", "cd web", "export A", "source env", ". env", "set -e", "if true",
]


@pytest.mark.parametrize("line", SHELL)
def test_what_only_a_shell_could_do_is_refused_with_the_line_to_write(line: str, app: App) -> None:
    app.configure(f"[hooks]\npost_stage =\n  true\n  {line}\n")
    error = app.run("deploy", app.artifact("1.0"), check=2).data["error"]
    right = f"sh -c {shlex.quote(line)}"
    assert f"{app.config}: [hooks] post_stage" in error["message"] and f"write {right}" in error["message"]
    assert app.releases() == []
    app.configure(f"[hooks]\npost_stage =\n  true\n  {right}\n")
    app.run("config", check=0)


def test_a_variable_before_a_command_belongs_into_env(app: App) -> None:
    app.configure("[service:web]\ncommand = RAILS_ENV=production bin/restart\n")
    message = app.run("config", check=2).data["error"]["message"]
    assert "write sh -c 'RAILS_ENV=production bin/restart', and a variable as NAME = value into [env]" in message


def test_a_relative_program_is_the_releases_own(app: App) -> None:
    tree = {"bin/migrate": file("#!/bin/sh\necho migrating $(cat VERSION) in $(pwd) > ../../migrated\n", 0o755)}
    app.configure("[hooks]\npre_activate = bin/migrate\npost_activate = ./bin/migrate\n")
    app.deploy("1.0", tree)
    assert (app.root / "migrated").read_text() == f"migrating 1.0 in {app.root}/releases/{app.current}\n"


def test_what_post_stage_may_not_add_is_told_as_the_hooks_mistake(app: App) -> None:
    app.configure("[hooks]\npost_stage = mkfifo pipe\n")
    error = app.run("deploy", app.artifact("1.0"), check=1).data["error"]
    assert error["message"].startswith("post_stage left what no release can hold: member 'pipe': it is a FIFO")
    assert (error["hint"].partition(",")[0], app.releases()) == ("correct [hooks] post_stage", [])


def test_what_post_stage_adds_belongs_to_the_release(app: App) -> None:
    add = script(app.directory / "add", "mkdir -p built/deep && echo made > built/deep/file && chmod 640 built/deep/file && "
                                        "ln -s built/deep/file linked && echo changed > lib/nested/data.txt && rm bin/run")
    app.configure(f"[hooks]\npost_stage = {add}\n")
    app.deploy("1.0")
    manifest = (app.root / ".deploy" / "manifests" / str(app.current)).read_text()
    assert "built/deep/file" in manifest and "bin/run" not in manifest
    app.run("verify", check=0)
    assert app.record(str(app.current))["tree"]["files"] == 3
    (app.root / "current" / "built" / "deep" / "file").write_text("tampered\n")
    assert app.run("verify", check=7).data["differences"]["changed"] == ["built/deep/file"]


# -- failing ---------------------------------------------------------------------

@pytest.mark.parametrize("hook, exit_code, program", [
    ("pre_stage", 1, "false"), ("post_stage", 1, "false"), ("pre_activate", 1, "false"),
    ("pre_activate", 1, "./no-such-program"), ("post_activate", 5, "false"), ("post_deploy", 5, "false"),
    ("post_deploy", 5, "/bin/sh -c 'kill -9 $$'"), ("post_deploy", 5, "./no-such-program")])
def test_a_failing_hook_undoes_or_rolls_back(app: App, spy: Spy, hook: str, exit_code: int, program: str) -> None:
    app.deploy("1.0")
    live, before = app.current, content(app.root)
    app.configure(spy.hooks(**{hook: program}))
    result = app.run("deploy", app.artifact("1.1"), check=exit_code)
    assert hook in result.data["error"]["message"] and result.data["error"]["hint"]
    assert (app.current, app.version, app.leftovers()) == (live, "1.0", [])
    assert result.data["rolled_back"] is (exit_code == 5)
    expected = FORWARD[:FORWARD.index(hook)] + (["pre_rollback", "post_rollback"] if exit_code == 5 else []) + ["on_failure"]
    assert names(spy.calls()) == expected
    if exit_code == 1:
        assert content(app.root) == before
    assert app.history()[-1]["failure"]["step"] == f"hook:{hook}"
    assert app.run("status").exit_code == 0


def test_a_first_deployment_that_a_hook_fails_leaves_nothing_live(app: App, spy: Spy) -> None:
    app.configure(spy.hooks(post_activate="false"))
    app.run("deploy", app.artifact("1.0"), check=5)
    assert not os.path.lexists(str(app.root / "current"))
    assert names(spy.calls()) == ["pre_stage", "post_stage", "pre_activate", "pre_rollback", "post_rollback", "on_failure"]


def test_the_commands_of_a_hook_stop_at_the_first_that_fails(app: App, spy: Spy) -> None:
    app.configure(f"[hooks]\npre_activate =\n  {spy.path} one\n  false\n  {spy.path} three\n")
    app.run("deploy", app.artifact("1.0"), check=1)
    assert [call["argv"] for call in spy.calls()] == [["one"]]


def test_hooks_of_the_way_back_cannot_stop_it(app: App, spy: Spy) -> None:
    app.deploy("1.0")
    app.configure(spy.hooks(post_deploy="false", pre_rollback="false", post_rollback="false", on_failure="false"))
    result = app.run("deploy", app.artifact("1.1"), check=5)
    assert app.version == "1.0" and len([text for text in result.data["warnings"] if "rollback" in text]) == 2


@pytest.mark.parametrize("hook, exit_code, live", [("pre_rollback", 1, "1.1"), ("post_rollback", 6, "1.0")])
def test_a_hook_that_fails_a_rollback_by_hand_puts_nobody_back_on_what_was_not_seen_healthy(
        app: App, spy: Spy, hook: str, exit_code: int, live: str) -> None:
    app.deploy("1.0")
    app.deploy("1.1")
    app.configure(spy.hooks(**{hook: "false"}))
    app.run("rollback", check=exit_code)
    assert app.version == live and app.leftovers() == []


def test_hooks_of_the_way_back_are_told_what_becomes_live_and_what_was(app: App, spy: Spy) -> None:
    old = app.deploy("1.0").data["release"]
    app.configure(spy.hooks(post_deploy="false"))
    app.run("deploy", app.artifact("1.1"), check=5)
    failed = [name for name in app.releases() if name != old][0]
    back = [call for call in spy.calls() if "rollback" in call["env"]["DEPLOY_HOOK"]]
    assert [(call["env"]["DEPLOY_RELEASE"], call["env"]["DEPLOY_VERSION"]) for call in back] == [(old, "1.0")] * 2
    assert [call["current"] for call in back] == ["releases/" + failed, "releases/" + old]
    # As in a rollback by hand: the release that is being left.
    assert [call["env"]["DEPLOY_PREVIOUS_RELEASE"] for call in back] == [failed] * 2


@pytest.mark.parametrize("hook", ["pre_activate", "post_deploy"])
def test_on_failure_is_told_which_release_failed(app: App, spy: Spy, hook: str) -> None:
    app.deploy("1.0")
    app.configure(spy.hooks(**{hook: "false"}))
    result = app.run("deploy", app.artifact("1.1"))
    call = spy.calls()[-1]
    assert names([call]) == ["on_failure"] and call["current"].endswith("-1.0")
    assert (call["env"]["DEPLOY_VERSION"], call["env"]["DEPLOY_ID"]) == ("1.1", result.data["deploy_id"])
    assert call["env"]["DEPLOY_PREVIOUS_RELEASE"] == app.current, "what was live before it, also where it was live for a moment"
    assert call["env"]["DEPLOY_RELEASE"].endswith("-1.1")


@pytest.mark.parametrize("left", ["precious", ""], ids=["with a file", "empty"])
def test_undoing_never_deletes_what_somebody_else_made(app: App, left: str) -> None:
    """Nor what rename(2) would replace without a word: an empty directory."""
    app.deploy("1.0")
    # Under the very name that the new release is to have.
    take = script(app.directory / "take", f"to=$(sed -n 's/.*\"to\": \"\\(.*\\)\".*/\\1/p' {app.root}/.deploy/journal.json)\n"
                                          f"mkdir {app.root}/releases/$to && test -z '{left}' || echo data > {app.root}/releases/$to/precious")
    app.configure(f"[hooks]\npre_stage = {take}\n")
    error = app.run("deploy", app.artifact("1.1"), check=1).data["error"]
    assert "exists already" in error["message"]
    made, = [path for path in (app.root / "releases").iterdir() if path.name != app.current]
    assert os.listdir(str(made)) == ([left] if left else [])


# -- time --------------------------------------------------------------------------

def test_a_background_child_that_holds_stdout_does_not_hang_the_run(app: App, pids: Path) -> None:
    leave = script(app.directory / "leave", f"echo started\nsleep 600 &\necho $! >> {pids}")
    app.configure(f"[hooks]\npre_activate = {leave}\npost_activate = {leave}\ntimeout = 100s\n")
    app.run("deploy", app.artifact("1.0"), timeout=60, check=0)
    assert len(pids_in(pids)) == 2


@pytest.mark.parametrize("hook, exit_code", [("pre_activate", 1), ("post_activate", 5)])
def test_a_hook_past_its_timeout_is_killed_with_its_children(app: App, pids: Path, hook: str, exit_code: int) -> None:
    app.deploy("1.0")
    hang = script(app.directory / "hang", f"echo $$ >> {pids}\n(trap '' TERM; sleep 600) & echo $! >> {pids}\n"
                                          f"sleep 600 & echo $! >> {pids}\necho waiting; wait")
    for number, timeout in enumerate(("400ms", "4s", "40s")):
        app.configure(f"[hooks]\n{hook} = {hang}\ntimeout = {timeout}\n")
        result = app.run("deploy", app.artifact(f"1.1.{number}"), timeout=120, check=exit_code)
        assert "timed out" in result.data["error"]["message"] and "timeout" in result.data["error"]["hint"]
        if len(pids_in(pids)) >= 3:
            break  # else the host was so busy that the hook had not started them
    assert len(pids_in(pids)) >= 3
    wait_gone(pids_in(pids))
    assert app.version == "1.0"


def test_a_hook_that_ignores_term_is_killed(app: App, pids: Path) -> None:
    stubborn = script(app.directory / "stubborn", f"trap '' TERM\necho $$ >> {pids}\nwhile :; do sleep 1; done")
    for timeout in ("100ms", "1s", "10s"):
        app.configure(f"[hooks]\npre_stage = {stubborn}\ntimeout = {timeout}\n")
        app.run("deploy", app.artifact("1.0"), check=1)
        if pids_in(pids):
            break  # else the host was so busy that the hook had not come to it
    assert pids_in(pids)
    wait_gone(pids_in(pids))


@deep
def test_a_timeout_is_told_without_the_time_that_killing_took(app: App) -> None:
    stubborn = script(app.directory / "stubborn", "trap '' TERM\nwhile :; do sleep 1; done")
    app.configure(f"[hooks]\npre_activate = {stubborn}\ntimeout = 300ms\n")
    told = app.run("deploy", app.artifact("1.0"), check=1)
    seconds = re.search(r"timed out after (\d\.\d+)s", told.data["error"]["message"])
    step = told.data["steps"][-1]
    assert seconds and float(seconds.group(1)) < step["seconds"] - 3, "it got 5 s to heed TERM"


# -- output --------------------------------------------------------------------------

def test_output_reaches_the_log_line_by_line_while_the_hook_runs(app: App, tmp_path: Path) -> None:
    log, go = tmp_path / "log", tmp_path / "go"
    wait = script(app.directory / "wait", f"echo first line\nn=0\nwhile [ ! -e {go} ] && [ $n -lt 3000 ]; do sleep 0.02; n=$((n+1)); done\n"
                                          f"echo last line")
    app.configure(f"[hooks]\npre_activate = {wait}\n")
    process = start_deploy("--log-file", log, "deploy", app.artifact("1.0"), config=app.config)
    try:
        wait_until(lambda: log.exists() and "first line" in log.read_text(), what="the first line is in the log")
        assert process.poll() is None and "last line" not in log.read_text()
        go.touch()
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
    assert "last line" in log.read_text()


@pytest.mark.parametrize("ends", [0, 1], ids=["well", "failed"])
def test_the_tail_of_the_output_is_kept_in_the_history(app: App, ends: int) -> None:
    talk = script(app.directory / "talk", f"echo out of it; echo complaint >&2; exit {ends}")
    app.configure(f"[hooks]\npre_activate = {talk}\n")
    app.run("deploy", app.artifact("1.0"), check=ends)
    line = json.dumps(app.history()[-1])
    assert "complaint" in line and "out of it" in line


@pytest.mark.parametrize("flood", ["seq 1 20000; echo the end", "head -c 3000000 /dev/zero | tr '\\0' x; echo; echo the end",
                                   "head -c 1000000 /dev/urandom; echo; echo the end"], ids=["lines", "one line", "noise"])
def test_a_flood_of_output_is_survived_and_only_its_end_is_kept(app: App, tmp_path: Path, flood: str) -> None:
    app.configure(f"[hooks]\npre_activate = {script(app.directory / 'flood', flood + '; exit 1')}\n")
    result = app.run("--log-file", tmp_path / "log", "deploy", app.artifact("1.0"), timeout=60, check=1)
    failure = app.history()[-1]["failure"]
    assert failure["evidence"]["output"][-1] == "the end"
    assert len(json.dumps(app.history()[-1])) < 200000 and len(result.data["error"]["message"]) < 5000


@deep
def test_a_flood_of_empty_lines_does_not_hold_a_signal_or_use_up_the_time(app: App) -> None:
    app.configure("durable = no\n[hooks]\ntimeout = 20s\npre_stage = seq 1 30000\npre_activate = yes ''\n")
    with (app.directory / "out").open("w") as out:
        run = start_deploy("deploy", app.artifact("1.0"), "--log-file", app.directory / "log", config=app.config, stdout=out)
        wait_until(lambda: (app.directory / "log").exists() and "] \n" in (app.directory / "log").read_text(), what="the flood has begun")
        started = time.monotonic()
        run.send_signal(signal.SIGTERM)
        assert run.wait(60) == 143 and time.monotonic() - started < 15
    assert "] 30000\n" in (app.directory / "log").read_text()


def test_a_flood_without_end_is_stopped_by_the_timeout(app: App) -> None:
    app.configure("[hooks]\npre_activate = yes\ntimeout = 300ms\n")
    app.run("-q", "deploy", app.artifact("1.0"), timeout=60, check=1)


def test_binary_output_cannot_reach_a_terminal(app: App, tmp_path: Path) -> None:
    noise = script(app.directory / "noise", r"printf '\377\376\000\033[31mred\033[0m\r\302\205 b\303\244r\n\033]0;title\007\n'; exit 1")
    app.configure(f"[hooks]\npre_activate = {noise}\n")
    result = app.run("--log-file", tmp_path / "log", "deploy", app.artifact("1.0"), check=1)
    log = (tmp_path / "log").read_bytes().decode("utf-8")
    for where, text in (("stderr", result.stderr), ("stdout", result.stdout), ("log", log)):
        assert not set(text) & set("\x1b\x00\x07\x85"), where
    assert "red" in log and "b\u00e4r" in log


def test_secrets_are_masked_in_log_stderr_and_history(app: App, tmp_path: Path) -> None:
    leak = script(app.directory / "leak", 'echo "connecting with $DB_PASSWORD"; echo "https://u:$DB_PASSWORD@h/?k=$DB_PASSWORD"; exit 1')
    app.configure(f"[hooks]\npre_activate = {leak}\n[env]\nDB_PASSWORD = correct-horse-battery\n")
    result = app.run("-v", "--log-file", tmp_path / "log", "deploy", app.artifact("1.0"), check=1)
    kept = "".join(path.read_text(errors="replace") for path in (app.root / ".deploy").rglob("*") if path.is_file())
    for text in (result.stderr, (tmp_path / "log").read_text(), kept):
        assert "correct-horse-battery" not in text and "connecting with" in text
    assert "correct-horse-battery" not in result.stdout


# -- run_as --------------------------------------------------------------------------

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can run a hook as somebody else")


@needs_root
def test_run_as_runs_hooks_as_that_user_with_its_groups_and_home(app: App) -> None:
    """And with none of the groups of root, which may have some of its own."""
    nobody = pwd.getpwnam("nobody")
    app.configure("[hooks]\npre_activate = /bin/sh -c 'echo $(id -u) $HOME; id -g; id -G'\nrun_as = nobody\n")
    python = under(app, "of-many-groups", needs("setpriv"), "--groups", "4242,4343")
    done = app.run("deploy", app.artifact("1.0"), python=python, check=0).data
    said = next(step["output"] for step in done["steps"] if step["name"] == "hook:pre_activate")
    assert said[:2] == [f"{nobody.pw_uid} {nobody.pw_dir}", str(nobody.pw_gid)]
    assert sorted(map(int, said[2].split())) == sorted(os.getgrouplist("nobody", nobody.pw_gid))


@pytest.mark.parametrize("user", ["no-such-user-here", "-1", ""], ids=["unknown", "number", "empty"])
def test_run_as_an_unknown_user_is_refused_before_anything_runs(app: App, spy: Spy, user: str) -> None:
    app.configure(spy.hooks() + f"run_as = {user}\n")
    result = app.run("deploy", app.artifact("1.0"))
    if user:
        assert result.exit_code in (2, 3) and user in result.data["error"]["message"], result.describe()
        assert app.releases() == [] and spy.calls() == []
    else:
        assert result.exit_code == 0


@needs_root
def test_run_as_without_the_right_to_is_an_error_and_no_traceback(app: App) -> None:
    place = Path(tempfile.mkdtemp(prefix="deploy-test-nobody-"))
    try:
        shutil.copy(str(app.artifact("1.0")), str(place))
        shutil.copy(str(app.artifact("1.0")) + ".sha256", str(place))
        os.chown(str(place), pwd.getpwnam("nobody").pw_uid, -1)
        place.chmod(0o755)
        python = script(app.directory / "as-nobody", f"exec {needs('setpriv')} --reuid=nobody --clear-groups {needs('/usr/bin/python3')} \"$@\"")
        result = run_deploy("--set", "hooks.run_as=root", "--set", "hooks.pre_stage=true", "deploy", place / "myapp-1.0.tar.gz",
                            root=place / "root", python=str(python), cwd="/")
        assert result.exit_code in (1, 2, 3) and "Traceback" not in result.stderr, result.describe()
        assert "root" in result.data["error"]["message"]
    finally:
        shutil.rmtree(str(place))


# -- after the switch ----------------------------------------------------------------

@pytest.mark.parametrize("hook", ["post_activate", "post_deploy"])
@pytest.mark.parametrize("deed, exit_code", [
    ("rm -rf $DEPLOY_RELEASE_PATH", 5), ("ln -sfn releases/$DEPLOY_PREVIOUS_RELEASE $DEPLOY_CURRENT_PATH", 5),
    ("rm -f $DEPLOY_CURRENT_PATH", 6), ("rm -f $DEPLOY_CURRENT_PATH; mkdir $DEPLOY_CURRENT_PATH", 6)],
    ids=["deletes the release", "goes back itself", "removes current", "puts a directory there"])
def test_a_hook_that_undoes_the_switch_does_not_end_in_success(app: App, deed: str, exit_code: int, hook: str) -> None:
    """What is said to be live must be: success is told only of what `current` leads to."""
    app.deploy("1.0")
    app.configure(f"durable = no\n[hooks]\n{hook} = /bin/sh -c '{deed}'\n")
    result = app.run("deploy", app.artifact("1.1"), check=exit_code)
    assert "is not live after all" in result.data["error"]["message"], described(result.data)
    assert exit_code == 6 or app.version == "1.0" and result.data["rolled_back"]
    assert "None" not in result.data["error"]["message"], described(result.data)


def test_what_could_not_be_undone_is_told_and_undone_by_the_next_run(app: App) -> None:
    app.deploy("1.0")
    told = app.root.parent / "told"
    app.configure("durable = no\n[hooks]\npre_activate = /bin/sh -c 'rmdir $DEPLOY_ROOT/.deploy/trash; exit 1'\n"
                  f"on_failure = /bin/sh -c 'echo $DEPLOY_VERSION >> {told}'\n")
    result = app.run("deploy", app.artifact("1.1"), check=1)
    assert told.read_text() == "1.1\n", "whom on_failure calls is wanted here most of all"
    assert any("not everything could be undone" in warning for warning in result.data["warnings"]), described(result.data)
    assert result.data["release"] == app.current and app.version == "1.0", "what is live, not what is left over"
    assert len(os.listdir(str(app.root / "releases"))) == 2
    app.configure("durable = no\n")
    app.run("recover", check=0)
    assert os.listdir(str(app.root / "releases")) == [app.current] and not (app.root / ".deploy" / "journal.json").exists()
    ended = app.history()[-1]
    assert ended["result"] == "aborted" and ended["message"] == result.data["error"]["message"], "why it failed, not that it was interrupted"


@pytest.mark.parametrize("arguments, exit_code", [
    (["deploy"], 1), (["probe", "--command", "/bin/false"], 7), (["probe", "--command", "/bin/echo", "--expect", "body=x"], 7),
], ids=["hook", "probe", "judged"])
def test_the_exit_code_of_a_child_counts_where_the_starter_ignores_sigchld(app: App, arguments: List[Any], exit_code: int) -> None:
    app.configure("[hooks]\npre_activate = /bin/false")
    arguments = arguments + [app.artifact("1.0")] * (arguments == ["deploy"])
    ended = subprocess.run(deploy_argv(*arguments, config=app.config), env=clean_environment(), cwd="/", stdout=subprocess.PIPE,
                           preexec_fn=lambda: signal.signal(signal.SIGCHLD, signal.SIG_IGN))
    data = json.loads(ended.stdout.decode())
    assert data["exit_code"] == ended.returncode == exit_code, described(data)
    assert ended.returncode == 7 or "pre_activate failed" in data["msg"]


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount")
def test_a_filesystem_that_runs_nothing_is_named(app: App) -> None:
    place = app.directory / "noexec"
    place.mkdir()
    app.configure(f"[hooks]\npre_stage = {place}/hook\n")
    script = f"mount -t tmpfs -o noexec none {place} && printf '#!/bin/sh\\n' > {place}/hook && chmod 755 {place}/hook && exec \"$@\""
    argv = [needs("unshare"), "-m", "sh", "-c", script, "sh", *deploy_argv("deploy", app.artifact("1.0"), config=app.config)]
    done = subprocess.run(argv, env=clean_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert done.returncode == 3, done.stderr
    assert "mounted noexec" in json.loads(done.stdout.decode())["error"]["hint"]
