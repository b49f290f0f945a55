"""One run at a time: a kernel lock that names its holder, dies with it, and is inherited by nobody."""

import contextlib
import fcntl
import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any, Iterator, List

import pytest

import starters
from scenes import Gate, alive, configure, deploy_all
from support import SET, App, deep, fake_command, make_artifact, start_deploy, wait_until


@pytest.fixture
def app(app: App) -> App:
    """An application that does not sync the whole filesystem."""
    configure(app)
    return app


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Gate]:
    """A gate that is open at the end, whatever happened."""
    made = Gate(tmp_path / "gates")
    yield made
    made.open()


@pytest.fixture
def holder(app: App, gate: Gate) -> Iterator[subprocess.Popen]:
    """A deployment of 2.0 over 1.0 that holds the lock until the gate opens."""
    app.deploy("1.0")
    configure(app, f"[hooks]\npre_activate = {gate.command}\n")
    process = start_deploy("deploy", app.artifact("2.0"), config=app.config)
    gate.wait_for_visitor()
    yield process
    gate.open()
    process.kill()
    process.wait()


def waits_for_the_lock(app: App, process: subprocess.Popen) -> bool:
    """Whether a process has the lock's file open, and thus stands in the queue."""
    try:
        links = [os.readlink(f"/proc/{process.pid}/fd/{name}") for name in os.listdir(f"/proc/{process.pid}/fd")]
    except OSError:
        return False
    return str(app.root / ".deploy" / "lock") in links


def test_of_twenty_that_deploy_at_once_one_wins_and_the_state_is_whole(app: App, gate: Gate) -> None:
    first = app.deploy("1.0").data["release"]
    configure(app, f"[hooks]\npre_activate = {gate.command}\n")
    artifacts = [app.artifact(f"2.{number}") for number in range(20)]
    processes = [start_deploy("deploy", artifact, config=app.config) for artifact in artifacts]
    gate.wait_for_visitor()
    # The winner stands at the gate until every other has given up.
    wait_until(lambda: sum(process.poll() is not None for process in processes) == 19)
    assert app.current == first
    gate.open()
    codes = [process.wait(60) for process in processes]
    assert sorted(codes) == [0] + [75] * 19
    winner = codes.index(0)
    assert app.version == f"2.{winner}"
    assert app.releases() == sorted([first, str(app.current)])
    assert [entry["result"] for entry in app.history()] == ["deployed", "deployed"]
    assert app.leftovers() == []
    configure(app)
    app.run("status", check=0)
    app.run("verify", check=0)
    app.run("history", "--verify", check=0)


def test_runs_that_wait_go_one_after_the_other(app: App) -> None:
    artifacts = [app.artifact(f"1.{number}") for number in range(6)]
    processes = [start_deploy("deploy", artifact, "--wait-lock", "60s", "--allow-downgrade", config=app.config)
                 for artifact in artifacts]
    assert [process.wait(60) for process in processes] == [0] * 6
    history = app.history()
    assert [entry["sequence"] for entry in history] == list(range(1, 7))
    assert sorted(entry["version"] for entry in history) == [f"1.{number}" for number in range(6)]
    # Each saw what the one before had made live: no update was lost.
    assert [entry["previous"] for entry in history] == [None] + [entry["release"] for entry in history[:-1]]
    assert app.current == history[-1]["release"]


@deep
@pytest.mark.parametrize("rounds", [2, pytest.param(200, marks=pytest.mark.skipif(
    SET != "proof", reason="minutes long: make test-crash, or python3 tests/tools/starters.py"))])
def test_of_fifty_that_start_at_once_one_owns_the_lock_and_the_others_give_way(rounds: int, tmp_path: Path) -> None:
    """Losers exit with 75 while the owner still holds the lock, having changed nothing and used little time of their own."""
    figures = starters.run(tmp_path, 50, rounds)
    assert figures.problems == [], figures.line()
    assert figures.losers == 49 * rounds and figures.slowest_own_seconds < 1, figures.line()


def test_a_first_run_that_must_give_way_leaves_the_history_to_the_holder(app: App) -> None:
    """The holder may be about to note its first line, and sweeps what looks like a leftover."""
    state = app.root / ".deploy"
    state.mkdir(mode=0o700, parents=True)
    with (state / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        app.run("deploy", app.artifact("1.0"), check=75)
        assert [path.name for path in state.glob("*history*")] == []
    app.deploy("1.0")
    app.run("history", "--verify", check=0)


WRITING = ["deploy", "stage", "activate", "rollback", "prune", "pin", "unpin", "recover"]


def test_every_writing_command_gives_way_to_the_holder_and_names_it(app: App, holder: subprocess.Popen) -> None:
    live, releases = app.current, app.releases()
    for command in WRITING:
        words = {"deploy": [app.artifact("3.0")], "stage": [app.artifact("3.0")], "activate": ["1.0"], "pin": ["1.0"],
                 "unpin": ["1.0"]}.get(command, [])  # type: List[Any]
        busy = app.run(command, *words, check=75).data
        assert f"pid {holder.pid}" in busy["error"]["message"] and "deploy since" in busy["error"]["message"]
        assert "--wait-lock" in busy["error"]["hint"]
        assert (busy["ok"], busy["changed"]) == (False, False)
    assert (app.current, app.releases(), holder.poll()) == (live, releases, None)


def test_commands_that_look_do_not_wait(app: App, holder: subprocess.Popen) -> None:
    for command in ("releases", "history", "verify"):
        app.run(command, check=0)
    lock = app.run("status", check=0).data["status"]["lock"]
    assert (lock["pid"], lock["command"]) == (holder.pid, "deploy")


def test_a_look_at_the_lock_does_not_take_it_from_anybody(app: App, holder: subprocess.Popen, gate: Gate) -> None:
    failed = app.run("preflight", check=3).data
    lock = next(check for check in failed["checks"] if check["name"] == "lock")
    assert (lock["status"], f"pid {holder.pid}" in lock["detail"]) == ("fail", True)
    app.run("-n", "deploy", app.artifact("3.0"), "--set", "hooks.pre_activate=")
    gate.open()
    assert holder.wait(60) == 0


def test_a_look_that_stands_still_holds_nobody_up(app: App) -> None:
    """Whoever only asks who holds the lock has it for an instant, and may lose the processor just then."""
    app.deploy("1.0")
    with open(str(app.root / ".deploy" / "lock")) as look:
        fcntl.flock(look, fcntl.LOCK_SH)
        run = start_deploy("deploy", app.artifact("1.1"), config=app.config)
        wait_until(lambda: waits_for_the_lock(app, run))
        with contextlib.suppress(subprocess.TimeoutExpired):
            run.wait(0.5)
    assert (run.wait(60), app.version) == (0, "1.1")


def test_wait_lock_waits_until_the_holder_is_done(app: App, holder: subprocess.Popen, gate: Gate) -> None:
    waiting = start_deploy("deploy", app.artifact("3.0"), "--wait-lock", "60s", config=app.config)
    wait_until(lambda: waits_for_the_lock(app, waiting))
    assert (waiting.poll(), app.version) == (None, "1.0")
    gate.open()
    assert (holder.wait(60), waiting.wait(60)) == (0, 0)
    assert app.version == "3.0"
    assert app.record(str(app.current))["previous"] == app.history()[1]["release"], "it observed only once it had the lock"


@pytest.mark.parametrize("way", ["--wait-lock", "lock_wait", "DEPLOY_DEPLOY_LOCK_WAIT"])
def test_waiting_for_the_lock_ends_after_the_time_that_was_given(app: App, holder: subprocess.Popen, way: str) -> None:
    configure(app, "lock_wait = 300ms\n" if way == "lock_wait" else "")
    words = ["--wait-lock", "300ms"] if way == "--wait-lock" else []
    env = {way: "300ms"} if way.startswith("DEPLOY") else {}
    started = time.monotonic()
    busy = app.run("prune", *words, env=env, check=75).data
    assert 0.3 <= time.monotonic() - started < 50, "not when the holder is done"
    assert f"pid {holder.pid}" in busy["error"]["message"]


def test_a_killed_holder_frees_the_lock(app: App, holder: subprocess.Popen) -> None:
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    configure(app)
    # Its hook still runs: the lock was not inherited.
    done = app.run("deploy", app.artifact("3.0"), check=0).data
    assert (app.version, app.leftovers(), len(done["recovered"])) == ("3.0", [], 1)


def test_a_killed_holder_frees_the_lock_for_one_that_waits(app: App, holder: subprocess.Popen) -> None:
    configure(app)
    waiting = start_deploy("deploy", app.artifact("3.0"), "--wait-lock", "60s", config=app.config)
    wait_until(lambda: waits_for_the_lock(app, waiting))
    holder.send_signal(signal.SIGKILL)
    assert (waiting.wait(60), app.version, app.leftovers()) == (0, "3.0", [])


def test_a_stopped_holder_is_named_and_goes_on_when_it_is_woken(app: App, holder: subprocess.Popen, gate: Gate) -> None:
    live, releases = app.current, app.releases()
    holder.send_signal(signal.SIGSTOP)
    try:
        wait_until(lambda: state_of(holder.pid) == "T", what="the holder stands still")
        for command in (["deploy", app.artifact("3.0")], ["rollback"], ["prune"]):
            message = app.run(*command, check=75).data["error"]["message"]
            assert re.search(rf"\bpid {holder.pid} of \S+ on \S+, deploy since ", message), message
        lock = app.run("status", "--set", "hooks.pre_activate=").data["status"]["lock"]
        assert lock["pid"] == holder.pid
        assert (app.current, app.releases()) == (live, releases)
    finally:
        holder.send_signal(signal.SIGCONT)
    gate.open()
    assert (holder.wait(60), app.version) == (0, "2.0")


def state_of(pid: int) -> str:
    """The letter that /proc gives for a process's state."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


@pytest.mark.parametrize("how", ["failed", "timed out"])
def test_a_background_child_of_a_failing_hook_does_not_keep_the_lock(how: str, app: App, gate: Gate) -> None:
    """Detached with setsid, it outlives the run; the lock does not."""
    pid_file = app.directory / "pid"
    script = (f"import subprocess, time\nchild = subprocess.Popen(['cat', {str(gate.path)!r}], close_fds=False, start_new_session=True)\n"
              f"open({str(pid_file)!r}, 'w').write(str(child.pid))\n" + ("sys.exit(3)" if how == "failed" else "time.sleep(600)"))
    hook = fake_command(app.directory / "bin", "daemon", script)
    for seconds in (1, 10):
        configure(app, f"[hooks]\npre_activate = {hook.path}\ntimeout = {60 if how == 'failed' else seconds}s\n")
        app.deploy("1.0", check=1)
        if pid_file.exists():
            break  # else the host was so busy that the hook had not come to it
    child = int(pid_file.read_text())
    assert alive(child)
    configure(app)
    app.deploy("2.0")
    assert alive(child)
    gate.open()
    wait_until(lambda: not alive(child))


def test_a_background_child_of_a_hook_does_not_keep_the_lock(app: App, gate: Gate) -> None:
    pid_file = app.directory / "pid"
    script = (f"import subprocess\nchild = subprocess.Popen(['cat', {str(gate.path)!r}], close_fds=False)\n"
              f"open({str(pid_file)!r}, 'w').write(str(child.pid))")
    hook = fake_command(app.directory / "bin", "daemon", script)
    configure(app, f"[hooks]\npost_activate = {hook.path}\n")
    app.deploy("1.0")
    child = int(pid_file.read_text())
    assert alive(child)
    configure(app)
    app.deploy("2.0")
    assert alive(child)
    lock = str(app.root / ".deploy" / "lock")
    assert lock not in [os.readlink(f"/proc/{child}/fd/{name}") for name in os.listdir(f"/proc/{child}/fd")]
    gate.open()
    wait_until(lambda: not alive(child))


@pytest.mark.parametrize("content", ["", "{", json.dumps({"pid": 1, "user": "root", "host": "old", "command": "deploy",
                                                          "since": "2020-01-01T00:00:00Z"}), "\0" * 5000],
                         ids=["empty", "cut off", "an old holder", "zeros"])
def test_what_stands_in_the_lock_file_is_only_information(app: App, content: str) -> None:
    app.deploy("1.0")
    (app.root / ".deploy" / "lock").write_text(content)
    app.deploy("2.0")
    assert app.version == "2.0"


def test_the_lock_file_is_never_replaced(app: App, holder: subprocess.Popen, gate: Gate) -> None:
    lock = app.root / ".deploy" / "lock"
    before = lock.stat().st_ino
    app.run("prune", check=75)
    assert lock.stat().st_ino == before
    gate.open()
    holder.wait(60)
    app.deploy("3.0")
    assert lock.stat().st_ino == before
    assert re.match(r"0o600\Z", oct(lock.stat().st_mode & 0o777))


def test_two_applications_do_not_wait_for_each_other(app: App, holder: subprocess.Popen, tmp_path: Path) -> None:
    other = App(tmp_path / "other")
    configure(other)
    other.run("deploy", make_artifact(tmp_path / "builds", "1.0"), check=0)
    assert (other.version, holder.poll()) == ("1.0", None)
    assert deploy_all(other, "2.0") == [other.current]


def test_who_had_the_lock_before_is_not_taken_for_its_holder(app: App) -> None:
    """Whoever has just taken it may not have written its name yet."""
    app.deploy("1.0")
    with open(str(app.root / ".deploy" / "lock")) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "an unknown process" in app.run("pin", "1.0", check=75).data["error"]["message"]


@pytest.mark.parametrize("content", ["[" * 4000, "{", "[]", '{"pid": [], "user": {}}', "\xff"], ids=["deep", "cut", "list", "types", "bytes"])
def test_a_holder_that_cannot_be_read_is_an_unknown_one(app: App, content: str) -> None:
    app.deploy("1.0")
    with open(str(app.root / ".deploy" / "lock"), "r+", encoding="latin-1") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write(content)
        lock.flush()
        assert "another run holds the lock" in app.run("pin", "1.0", check=75).data["error"]["message"]
        assert app.run("status").exit_code == 0
