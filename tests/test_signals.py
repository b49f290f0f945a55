"""Signals: before activation everything is undone, after it the old release comes back, and no child stays behind."""

import fcntl
import json
import os
import re
import signal
import sys
from pathlib import Path
from typing import Any, Iterator, List

import pytest

from crashes import content, holder_pid, inconsistencies, is_running, script, strace, trace_of, wait_gone
from support import App, needs, start_deploy, wait_until

SIGNALS = [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)]
by_signal = pytest.mark.parametrize("number, exit_code", SIGNALS, ids=[number.name for number, _ in SIGNALS])


class Running:
    """A run that is under way: its process, and what it printed once it has ended."""

    def __init__(self, app: App, *arguments: Any, **options: Any) -> None:
        self.app, self.stdout, self.stderr = app, app.directory / "stdout", app.directory / "stderr"
        with self.stdout.open("wb") as stdout, self.stderr.open("wb") as stderr:
            self.process = start_deploy(*arguments, config=app.config, stdout=stdout, stderr=stderr, **options)

    @property
    def pid(self) -> int:
        """The process id of deploy.py itself, which may run under strace."""
        return int(wait_until(lambda: holder_pid(self.app), what="the lock names its holder"))

    def end(self) -> Any:
        """Wait for the end; the one JSON object, with its exit code checked."""
        exit_code = self.process.wait(30)
        text = self.stdout.read_text()
        assert text, f"exit code {exit_code} and nothing on stdout: {self.stderr.read_text()}"
        data = json.loads(text)
        assert data["exit_code"] == exit_code and "Traceback" not in self.stderr.read_text(), self.stderr.read_text()
        return data


@pytest.fixture
def live(app: App) -> Iterator[App]:
    """An application of which 1.0 is live; processes that wrote into `pids` are killed at the end."""
    app.deploy("1.0")
    # What the tests read the process id from must be that of the run under test.
    (app.root / ".deploy" / "lock").write_text("")
    yield app
    for pid in pids(app):
        if is_running(pid):
            os.kill(pid, signal.SIGKILL)


def pids(app: App) -> List[int]:
    """The processes that blocking scripts wrote down."""
    path = app.directory / "pids"
    return [int(line) for line in path.read_text().split()] if path.exists() else []


def block(app: App, name: str = "block", unless: str = "false") -> Path:
    """A script that blocks, with a child, and notes both process ids; it passes where `unless` is true."""
    return script(app.directory / name, f"{unless} && exit 0\nsleep 600 &\necho $! >> {app.directory}/pids\n"
                                        f"echo $$ >> {app.directory}/pids\necho blocking\nwait")


def wait_blocked(app: App) -> None:
    """Wait until the script blocks."""
    wait_until(lambda: len(pids(app)) == 2, what="the script blocks")


# -- before activation -----------------------------------------------------------

@by_signal
def test_a_signal_while_unpacking_undoes_everything(live: App, number: int, exit_code: int) -> None:
    # strace holds the run at the last step of unpacking, with files in staging already.
    slow = strace(live, "-e", "trace=symlinkat", "-e", "inject=symlinkat:delay_enter=400000:when=1")
    before = content(live.root)
    running = Running(live, "deploy", live.artifact("1.1"), python=slow)
    wait_until(lambda: list((live.root / ".deploy" / "staging").glob("*/bin/run")), what="staging is filled")
    os.kill(running.pid, number)
    data = running.end()
    assert data["exit_code"] == exit_code and data["steps"][-1]["name"] == "unpack", data
    assert content(live.root) == before and inconsistencies(live, ["1.0"]) == []


@pytest.mark.parametrize("hook, number, exit_code", [
    ("pre_stage", signal.SIGTERM, 143), ("post_stage", signal.SIGINT, 130)] + [("pre_activate",) + pair for pair in SIGNALS])
def test_a_signal_in_a_hook_before_activation_undoes_everything(live: App, number: int, exit_code: int, hook: str) -> None:
    before = content(live.root)
    live.configure(f"[hooks]\n{hook} = {block(live)}\n")
    running = Running(live, "deploy", live.artifact("1.1"))
    wait_blocked(live)
    running.process.send_signal(number)
    data = running.end()
    assert data["exit_code"] == exit_code and not data["rolled_back"]
    assert data["error"]["message"] == f"interrupted by {signal.Signals(number).name}"
    wait_gone(pids(live))
    assert content(live.root) == before and inconsistencies(live, ["1.0"]) == []
    assert live.history()[-1]["exit_code"] == exit_code
    live.configure()
    live.deploy("1.1")


@by_signal
def test_a_signal_while_waiting_for_the_lock_ends_the_wait(live: App, number: int, exit_code: int) -> None:
    path = live.root / ".deploy" / "lock"
    before = content(live.root)
    with path.open("r+") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        running = Running(live, "--wait-lock", "60s", "deploy", live.artifact("1.1"))
        wait_until(lambda: str(path) in open_files(running.process.pid), what="it waits for the lock")
        running.process.send_signal(number)
        assert running.end()["exit_code"] == exit_code
    assert content(live.root) == before and inconsistencies(live, ["1.0"]) == []


def open_files(pid: int) -> List[str]:
    """The paths of the files that a process has open."""
    found = []
    for name in os.listdir(f"/proc/{pid}/fd"):
        try:
            found.append(os.readlink(f"/proc/{pid}/fd/{name}"))
        except OSError:
            pass
    return found


def test_a_signal_between_fork_and_exec_leaves_no_child(live: App) -> None:
    # The hook's process exists but has not become the hook yet: strace holds it there.
    hook = script(live.directory / "quiet", "exec sleep 600")
    live.configure(f"[hooks]\npre_activate = {hook}\n")
    slow = strace(live, "-e", "trace=execve", "-e", "inject=execve:delay_enter=400000:when=1")
    running = Running(live, "deploy", live.artifact("1.1"), python=slow)
    pid, children = running.pid, []  # type: int, List[int]

    def holds_child() -> bool:
        found = re.findall(r"(?m)^(\d+) +execve\(\S*/quiet", trace_of(live).read_text())
        children[:] = [int(text) for text in found if int(text) != pid]
        return bool(children)
    wait_until(holds_child, what="the hook's process is about to exec")
    os.kill(pid, signal.SIGTERM)
    wait_gone([pid], 20)
    try:
        wait_gone(children, 3)
    finally:
        for child in children:
            if is_running(child):
                os.killpg(child, signal.SIGKILL)
        running.process.wait(20)
    assert running.end()["exit_code"] == 143 and live.version == "1.0"


# -- after activation ------------------------------------------------------------

AFTER = {
    "post_activate": "[hooks]\npost_activate = {block}\n",
    "service": "[service:x]\ncommand = {block}\n",
    "probe": "[probe:x]\ncommand = {block}\ntimeout = 60s\n",
    "between probes": "[probe:x]\ncommand = /bin/sh -c 'test $DEPLOY_VERSION = 1.0 || {{ echo 1 >> {dir}/pids; echo 2 >> {dir}/pids; false; }}'\n"
                      "period = 60s\nperiod_max = 60s\ndeadline = 100s\nsuccesses = 1\n",
    "post_deploy": "[hooks]\npost_deploy = {block}\n",
}


@pytest.mark.parametrize("where", sorted(AFTER))
def test_a_signal_after_activation_brings_the_old_release_back(live: App, where: str) -> None:
    only_new = block(live, unless='test "$DEPLOY_VERSION" = 1.0')
    live.configure(AFTER[where].format(block=only_new, dir=live.directory))
    number = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP][sorted(AFTER).index(where) % 3]
    running = Running(live, "deploy", live.artifact("1.1"))
    wait_blocked(live)
    assert live.version == "1.1"
    running.process.send_signal(number)
    data = running.end()
    if where == "between probes":
        (live.directory / "pids").unlink()
    assert data["exit_code"] == 5 and data["rolled_back"] and signal.Signals(number).name in data["error"]["message"]
    wait_gone(pids(live))
    assert inconsistencies(live, ["1.0"]) == []
    # It was interrupted and proved nothing: it may be tried again unasked.
    live.configure()
    live.deploy("1.1")


def test_a_signal_after_the_switch_of_a_rollback_by_hand_stays_on_the_newer(live: App) -> None:
    live.deploy("1.1")
    live.configure(f"[service:x]\ncommand = {block(live, unless='test $DEPLOY_VERSION = 1.1')}\n")
    running = Running(live, "rollback")
    wait_blocked(live)
    running.process.send_signal(signal.SIGTERM)
    assert running.end()["exit_code"] == 5
    assert inconsistencies(live, ["1.1"]) == []


def test_more_signals_during_the_way_back_change_nothing(live: App) -> None:
    go, on_the_way = live.directory / "go", live.directory / "on-the-way"
    wait = script(live.directory / "wait", f"touch {on_the_way}\nn=0\nwhile [ ! -e {go} ] && [ $n -lt 500 ]; do sleep 0.02; n=$((n+1)); done")
    live.configure(f"[hooks]\npost_activate = {block(live)}\npre_rollback = {wait}\n")
    running = Running(live, "deploy", live.artifact("1.1"))
    wait_blocked(live)
    running.process.send_signal(signal.SIGTERM)
    wait_until(on_the_way.exists, what="the way back")
    for number, _ in SIGNALS:
        running.process.send_signal(number)
    go.touch()
    data = running.end()
    assert data["exit_code"] == 5 and live.history()[-1]["result"] == "reverted"
    assert "hook:pre_rollback" in [step["name"] for step in data["steps"] if step["status"] == "done"]
    assert inconsistencies(live, ["1.0"]) == []


def test_signals_while_undoing_change_nothing(live: App) -> None:
    # strace holds the run at its first removal of what it had staged.
    live.configure("[hooks]\npre_activate = false\n")
    slow = strace(live, "-e", "trace=unlinkat", "-e", "inject=unlinkat:delay_enter=400000:when=1")
    running = Running(live, "deploy", live.artifact("1.1"), python=slow)
    wait_until(lambda: trace_of(live).exists() and "unlinkat(" in trace_of(live).read_text(), what="undoing has begun")
    os.kill(running.pid, signal.SIGTERM)
    assert running.end()["exit_code"] == 1
    assert inconsistencies(live, ["1.0"]) == []


def test_a_signal_while_recovery_goes_back_does_not_call_for_a_person(live: App) -> None:
    probe = "[probe:sick]\ncommand = /bin/sh -c 'test $DEPLOY_VERSION = 1.0'\ndeadline = 500ms\nperiod = 20ms\nsuccesses = 1\n"
    live.configure("[hooks]\npre_rollback = /bin/sh -c 'kill -9 $PPID'\n" + probe)
    assert live.run("deploy", live.artifact("1.1"), json=False).exit_code == -signal.SIGKILL
    go, there = live.directory / "go", live.directory / "there"
    wait = script(live.directory / "wait", f"touch {there}\nn=0\nwhile [ ! -e {go} ] && [ $n -lt 500 ]; do sleep 0.02; n=$((n+1)); done")
    live.configure(f"[service:x]\ncommand = {wait}\n")
    running = Running(live, "recover")
    wait_until(there.exists, what="recovery restarts the service of the old release")
    running.process.send_signal(signal.SIGTERM)
    go.touch()
    data = running.end()
    assert data["exit_code"] != 6, data["error"]
    live.configure()
    live.run("recover", check=0)
    assert inconsistencies(live, ["1.0"]) == []


# -- who is not meant ------------------------------------------------------------

def test_under_nohup_a_hangup_changes_nothing(live: App) -> None:
    go, there = live.directory / "go", live.directory / "there"
    wait = script(live.directory / "wait", f"touch {there}\nn=0\nwhile [ ! -e {go} ] && [ $n -lt 500 ]; do sleep 0.02; n=$((n+1)); done")
    live.configure(f"[hooks]\npre_activate = {wait}\n")
    python = script(live.directory / "bin" / "under-nohup", f"exec {needs('nohup')} {sys.executable} \"$@\"")
    running = Running(live, "deploy", live.artifact("1.1"), python=str(python))
    wait_until(there.exists, what="the hook runs")
    running.process.send_signal(signal.SIGHUP)
    go.touch()
    assert running.end()["exit_code"] == 0 and live.version == "1.1"


def test_a_terminals_interrupt_does_not_reach_the_hook_itself(live: App) -> None:
    """Control-C goes to the whole group of the terminal: the hook must hear of it from deploy.py alone, as TERM."""
    heard = live.directory / "heard"
    listen = script(live.directory / "listen", f"trap 'echo INT >> {heard}' INT\ntrap 'echo TERM >> {heard}; exit' TERM\n"
                                               f"sleep 600 &\necho $! >> {live.directory}/pids\necho $$ >> {live.directory}/pids\nwait; wait")
    live.configure(f"[hooks]\npre_activate = {listen}\n")
    running = Running(live, "deploy", live.artifact("1.1"))
    wait_blocked(live)
    os.killpg(running.process.pid, signal.SIGINT)
    assert running.end()["exit_code"] == 130
    assert heard.read_text() == "TERM\n"
    wait_gone(pids(live))
