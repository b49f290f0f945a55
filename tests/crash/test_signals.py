"""Signals: before activation everything is undone, after it the old release comes back, and no child stays behind."""

import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Dict, Iterator, List, Tuple

import pytest

from crashes import Call, Saved, content, holder_pid, inconsistencies, is_running, script, strace, trace_of, wait_gone, warm
from support import DEPLOY, TESTS, App, clean_environment, described, load_deploy, needs, sized, start_deploy, wait_until

SIGNALS = [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 143)]
# Where a test goes through every place, one in so many is tried.
STRIDE = sized(quick=5, whole=1)
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
        exit_code = self.process.wait(60)
        text = self.stdout.read_text()
        assert text, f"exit code {exit_code} and nothing on stdout: {self.stderr.read_text()}"
        data = json.loads(text)
        print(described(data))  # which pytest shows where the test fails
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
    # At the last step of unpacking, with files in staging already.
    name, before = signal.Signals(number).name, content(live.root)
    sends = strace(live, "-e", "trace=openat,symlinkat", "-e", f"inject=symlinkat:signal={name}:when=1")
    data = Running(live, "deploy", live.artifact("1.1"), python=sends).end()
    assert re.search(rf'(?s)openat\([^\n]*"bin/run".*symlinkat\(.*{name}', trace_of(live).read_text()), "staging was filled"
    assert data["exit_code"] == exit_code and data["steps"][-1]["name"] == "unpack", described(data)
    assert content(live.root) == before and inconsistencies(live, ["1.0"]) == []


def test_a_signal_ends_the_hashing_of_what_a_hook_made(live: App) -> None:
    before = content(live.root)
    hook = script(live.directory / "post_stage", "exec truncate -s 1T large")  # takes no space, and an hour to hash
    live.configure(f"[hooks]\npost_stage = {hook}")
    run = Running(live, "deploy", live.artifact("1.1"))
    pid = run.pid

    def hashes() -> bool:
        try:
            return any(os.readlink(f"/proc/{pid}/fd/{name}").endswith("/large") for name in os.listdir(f"/proc/{pid}/fd"))
        except FileNotFoundError:
            return False

    try:
        wait_until(hashes, timeout=60, what="it hashes what the hook has made")
        run.process.terminate()
        data = run.end()
    finally:
        run.process.kill()
    assert data["exit_code"] == 143 and data["steps"][-1]["name"] == "seal", described(data)
    assert content(live.root) == before and inconsistencies(live, ["1.0"]) == []


def test_a_signal_ends_packing_and_leaves_nothing_behind(app: App) -> None:
    source, target = app.directory / "source", app.directory / "packed" / "app.tar.gz"
    source.mkdir()
    target.parent.mkdir()
    with (source / "large").open("wb") as stream:
        stream.truncate(3 << 30)  # takes no space, and longer than a signal
    run = Running(app, "pack", source, "-o", target)
    wait_until(lambda: list(target.parent.iterdir()), what="it has begun to write")
    run.process.terminate()
    data = run.end()
    assert data["exit_code"] == 143 and not data["changed"], described(data)
    assert list(target.parent.iterdir()) == []


def test_a_signal_while_something_is_closed_is_no_failure_of_the_unpacking(live: App) -> None:
    """What was closed already was once closed again on the way out: a bad file descriptor, and exit code 1."""
    live.configure("durable = no\n")
    saved, artifact = Saved(live), live.artifact("1.1")

    def run(*options: str) -> Any:
        saved.restore()
        return warm().run("deploy", artifact, config=live.config, trace=trace_of(live), options=["-e", "trace=close,mkdirat,rename,renameat,renameat2"] + list(options))
    assert run().exit_code == 0
    lines = trace_of(live).read_text(errors="replace").splitlines()
    begins = next(number for number, line in enumerate(lines) if line.startswith("mkdirat(") and ".new-" in line)
    ends = next(number for number, line in enumerate(lines) if line.startswith("rename") and ".new-" in line)
    # In the unpacking: the directories of the live release and of the new one.
    closes = [(number, line) for number, line in enumerate([line for line in lines if line.startswith("close(")], 1)
              if line in lines[begins:ends] and re.search(r"/releases/(\d|\.new-)[^>]*>", line)]
    problems, seen = [], 0
    for number, line in closes[::STRIDE]:
        result = run("-e", f"inject=close:signal=TERM:when={number}")
        seen += result.data["steps"][-1]["name"] == "unpack"
        if result.exit_code != 143:
            problems.append(f"{line}: {described(result.data)}")
        problems += [f"{line}: {problem}" for problem in inconsistencies(live, ["1.0"])]
    assert problems == [] and seen >= 5 // STRIDE, "\n".join(problems)


WAITING = """
import os, signal, sys, threading, time
sys.path.insert(0, sys.argv[1])
import support
deploy = support.load_deploy()
interrupts = deploy.Interrupts()
interrupts.install()

def later(seconds, work):
    threading.Timer(seconds, work).start()

def ended_by(work):
    started = time.monotonic()
    try:
        return work(), time.monotonic() - started < 5
    except deploy.Interrupted as error:
        return error.exit_code, time.monotonic() - started < 5

terminate = lambda: os.kill(os.getpid(), signal.SIGTERM)
reading, writing = os.pipe()
"""


@pytest.mark.parametrize("code, expected", [
    ("later(0.2, terminate); print(ended_by(lambda: interrupts.wait(60, reading)))", "(143, True)"),
    ("later(0.2, terminate); print(ended_by(lambda: interrupts.wait(60)))", "(143, True)"),
    ("terminate(); print(ended_by(lambda: interrupts.wait(60)))", "(143, True)"),
    ("later(0.2, lambda: os.write(writing, b'x')); print(ended_by(lambda: interrupts.wait(60, reading) == [reading]))", "(True, True)"),
    ("interrupts.is_closed = True; later(0.1, terminate); later(0.4, lambda: os.write(writing, b'x'))\n"
     "print(ended_by(lambda: interrupts.wait(60, reading) == [reading]), interrupts.wait(0.1))\n"
     "interrupts.is_closed = False; print(ended_by(lambda: interrupts.wait(60)))", "(True, True) []\n(143, True)"),
    ("signal.signal(signal.SIGUSR1, lambda *_: None); later(0.1, lambda: os.kill(os.getpid(), signal.SIGUSR1))\n"
     "started = time.monotonic(); print(interrupts.wait(0.5), 0.5 <= time.monotonic() - started < 5)", "[] True"),
    ("later(0.2, terminate)\nwith deploy.Conversation(lambda asking: time.sleep(60), 60) as forked:\n"
     "    print(ended_by(lambda: forked.answer(interrupts)))", "(143, True)"),
], ids=["descriptor", "nothing", "before", "readable", "closed", "another signal", "forked"])
def test_a_signal_ends_a_wait_and_nothing_else_does(code: str, expected: str) -> None:
    """However it arrives: before the wait, within it, while nobody listens to it."""
    result = subprocess.run([sys.executable, "-c", WAITING + code, str(TESTS / "lib")],
                            stdout=subprocess.PIPE, universal_newlines=True, timeout=60)
    assert result.stdout.strip() == expected and result.returncode == 0


def test_a_forked_process_answers_fails_or_is_killed_at_its_limit(tmp_path: Path) -> None:
    """It holds nothing that was open, and never more than its time."""
    deploy, interrupts = load_deploy(), load_deploy().Interrupts()
    with (tmp_path / "lock").open("w") as lock:
        fcntl.flock(lock.fileno(), fcntl.LOCK_EX)
        with deploy.Conversation(lambda asking: {"a": None, "\u00e4": sorted(map(int, os.listdir("/proc/self/fd")))}, 60) as forked:
            answer = forked.answer(interrupts)
    descriptors = answer["\u00e4"]
    assert (answer["error"], answer["a"]) == ("", None)
    assert len([number for number in descriptors if number > 2]) == 2, "its pipe, and the directory it reads"
    for work, error in ((lambda asking: 1 / 0, "ZeroDivisionError: division by zero"),
                        (lambda asking: re.match("(a+)+$", "a" * 64 + "b"), "no answer within 0.30s")):
        started = time.monotonic()
        with deploy.Conversation(work, 0.3) as forked:
            assert error in forked.answer(interrupts)["error"]
        assert time.monotonic() - started < 30
    with deploy.Conversation(lambda asking: time.sleep(600), 600) as forked:
        pid = forked._pid
    assert not is_running(pid)


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
    assert data["error"] == {"message": f"interrupted by {signal.Signals(number).name}", "hint": "run the same command again"}
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
    wait_gone([pid])
    try:
        wait_gone(children, 30)
    finally:
        for child in children:
            if is_running(child):
                os.killpg(child, signal.SIGKILL)
        running.process.wait(60)
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


def test_a_signal_after_the_switch_of_a_rollback_by_hand_stays_where_it_was_to_go(live: App) -> None:
    live.deploy("1.1")
    live.configure(f"[service:x]\ncommand = {block(live, unless='test $DEPLOY_VERSION = 1.1')}\n")
    running = Running(live, "rollback")
    wait_blocked(live)
    running.process.send_signal(signal.SIGTERM)
    assert running.end()["exit_code"] == 6
    assert inconsistencies(live, ["1.0"]) == []


def test_more_signals_during_the_way_back_change_nothing(live: App) -> None:
    go, on_the_way = live.directory / "go", live.directory / "on-the-way"
    wait = script(live.directory / "wait", f"touch {on_the_way}\nn=0\nwhile [ ! -e {go} ] && [ $n -lt 3000 ]; do sleep 0.02; n=$((n+1)); done")
    live.configure(f"[hooks]\npost_activate = {block(live)}\npre_rollback = {wait}\n")
    running = Running(live, "deploy", live.artifact("1.1"))
    wait_blocked(live)
    running.process.send_signal(signal.SIGTERM)
    wait_until(on_the_way.exists, what="the way back")
    for number, _ in SIGNALS:
        running.process.send_signal(number)
    go.touch()
    data = running.end()
    assert data["exit_code"] == 5 and live.history()[-1]["result"] == "rolled_back"
    assert "hook:pre_rollback" in [step["name"] for step in data["steps"] if step["status"] == "done"]
    assert inconsistencies(live, ["1.0"]) == []


def test_signals_while_undoing_change_nothing(live: App) -> None:
    # At the first removal of what it had staged.
    told = live.directory / "told"
    live.configure(f"share_unchanged = no\n[hooks]\npre_activate = false\non_failure = touch {told}\n")
    sends = strace(live, "-e", "trace=unlinkat", "-e", "inject=unlinkat:signal=TERM:when=1")
    assert Running(live, "deploy", live.artifact("1.1"), python=sends).end()["exit_code"] == 1
    assert re.search(r'\.deploy/releases>, "[^"\n]+\.json", 0\)[^\n]*\n[^\n]* SIGTERM ', trace_of(live).read_text()), "undoing had begun"
    assert told.exists(), "on_failure is part of it"
    assert inconsistencies(live, ["1.0"]) == []


def signalled_on_the_way_back(live: App, *arguments: Any) -> Any:
    """Run a command that first goes back from what a crash left, and end it by SIGTERM meanwhile: the JSON result."""
    probe = "[probe:sick]\ncommand = /bin/sh -c 'test $DEPLOY_VERSION = 1.0'\ndeadline = 500ms\nperiod = 20ms\nsuccesses = 1\n"
    live.configure("[hooks]\npre_rollback = /bin/sh -c 'kill -9 $PPID'\n" + probe)
    assert live.run("deploy", live.artifact("1.1"), json=False).exit_code == -signal.SIGKILL
    go, there = live.directory / "go", live.directory / "there"
    wait = script(live.directory / "wait", f"touch {there}\nn=0\nwhile [ ! -e {go} ] && [ $n -lt 3000 ]; do sleep 0.02; n=$((n+1)); done")
    live.configure(f"[service:x]\ncommand = {wait}\n")
    running = Running(live, *arguments)
    wait_until(there.exists, what="recovery restarts the service of the old release")
    running.process.send_signal(signal.SIGTERM)
    go.touch()
    return running.end()


def test_a_signal_while_recovery_goes_back_does_not_call_for_a_person(live: App) -> None:
    data = signalled_on_the_way_back(live, "recover")
    assert data["exit_code"] != 6, described(data)
    live.configure()
    live.run("recover", check=0)
    assert inconsistencies(live, ["1.0"]) == []


def test_a_signal_while_recovery_goes_back_ends_the_run_before_its_own_work(live: App) -> None:
    """It was forgotten with the recovery, and the deployment begun that a stopping service had no time for."""
    data = signalled_on_the_way_back(live, "deploy", live.artifact("1.2"))
    assert data["exit_code"] == 143 and data["recovered"], described(data)
    assert inconsistencies(live, ["1.0"]) == []
    assert "1.2" not in [record["version"] for record in live.run("releases", check=0).data["releases"]]


# -- at every boundary -------------------------------------------------------------

STEPS = ("durable = no\n[hooks]\npre_stage = true\npost_stage = true\npre_activate = true\npost_activate = true\n"
         "post_deploy = true\n"
         "pre_rollback = true\npost_rollback = true\n[service:x]\ncommand = true\n[probe:y]\ncommand = true\nsuccesses = 1\n"
         "when = both\n")


def traced(app: App, *arguments: Any, inject: str = "") -> Any:
    """Run deploy.py once, with the main thread's calls that write or sync in the trace: the JSON result."""
    options = ["-e", "trace=write,fsync"] + (["-e", f"inject={inject}"] if inject else [])
    result = warm().run(*arguments, config=app.config, trace=trace_of(app), options=options)
    assert result.data["exit_code"] == result.exit_code and "Traceback" not in result.stderr, result.describe()
    return result.data


def trace(app: App, *arguments: Any) -> Tuple[List[str], List[Call]]:
    """Run deploy.py once, well: its steps, and its calls."""
    data = traced(app, *arguments)
    assert data["exit_code"] == 0, described(data)
    return [step["name"] for step in data["steps"]], calls_of(app)


def calls_of(app: App) -> List[Call]:
    """The calls in the last trace, each with its number among those of its name."""
    counts, calls = {}, []  # type: Dict[str, int], List[Call]
    for line in trace_of(app).read_text(errors="replace").splitlines():
        found = re.match(r"(write|fsync)\((.*)", line)
        if found:
            name = found.group(1)
            counts[name] = counts.get(name, 0) + 1
            calls.append(Call(name, counts[name], found.group(2)))
    return calls


def signal_at(app: App, call: Call, number: int, *arguments: Any) -> Tuple[Any, str]:
    """Send the program a signal at one of its calls; the JSON result, and the line that it was writing."""
    data = traced(app, *arguments, inject=f"{call.name}:signal={signal.Signals(number).name}:when={call.number}")
    met = next((found.text for found in calls_of(app) if (found.name, found.number) == (call.name, call.number)), "")
    return data, met


def expected_at(step: str, steps: List[str], exit_code: int) -> int:
    """The exit code that a signal between two steps must give: undone before the switch, gone back from after it."""
    return exit_code if steps.index(step) < steps.index("activate") else 5


@pytest.mark.parametrize("command, least", [("deploy", 11), ("rollback", 5)], ids=["deploy", "rollback"])
def test_a_signal_at_every_step_boundary_undoes_or_goes_back(live: App, command: str, least: int) -> None:
    """Each step prints its line when it ends: the signal comes with that line."""
    live.deploy("1.1")
    live.configure(STEPS)
    words = [command, live.artifact("1.2")] if command == "deploy" else [command]
    steps, calls = trace(twin_of(live), *words)
    assert len(steps) >= least, steps
    problems, saved = [], Saved(live)
    for index, step in list(enumerate(steps))[::STRIDE]:
        saved.restore()
        number, exit_code = SIGNALS[index % 3]
        ends = re.compile(r'"  done +' + re.escape(step))
        call = next(call for call in calls if call.name == "write" and ends.search(call.text))
        data, met = signal_at(live, call, number, *words)
        assert ends.search(met), f"write {call.number} is {met}, not the end of {step}"
        wanted = expected_at(step, steps, exit_code)
        problems += [f"{step}, {signal.Signals(number).name}: {problem}" for problem in inconsistencies(live, ["1.1"])]
        if data["exit_code"] != wanted or data["rolled_back"] is not (wanted == 5):
            problems.append(f"{step}: exit code {data['exit_code']}, rolled back {data['rolled_back']}, not {wanted}: "
                            f"{data['error']}")
        if live.releases() != sorted(known(live)):
            problems.append(f"{step}: releases {live.releases()}, known {known(live)}")
    assert problems == [], "\n".join(problems)


def twin_of(app: App) -> App:
    """An application like it, in which a run can be recorded while the one under test stays as it is."""
    twin = App(app.directory / "twin")
    for version in ("1.0", "1.1"):
        twin.deploy(version)
        if version == app.version:
            break
    twin.configure(STEPS)
    return twin


def known(app: App) -> List[str]:
    """The releases that have a record and were not pruned."""
    records = [json.loads(path.read_text()) for path in (app.root / ".deploy" / "releases").glob("*.json")]
    return [record["id"] for record in records if not record["pruned_at"]]


def test_a_signal_at_every_fsync_leaves_the_old_or_the_new_release_whole(live: App) -> None:
    """Among them every change of the journal: what is half durable when the signal comes is finished first."""
    live.configure(STEPS)
    calls = [call for call in trace(twin_of(live), "deploy", live.artifact("1.1"))[1] if call.name == "fsync"]
    assert len([call for call in calls if "journal" in call.text]) >= 4, "the trace shows what is synced"
    problems, seen, saved = [], set(), Saved(live)
    for index, call in enumerate(calls[::STRIDE]):
        saved.restore()
        number, exit_code = SIGNALS[index % 3]
        data, _ = signal_at(live, call, number, "deploy", live.artifact("1.1"))
        seen.add(data["exit_code"])
        if data["exit_code"] not in (0, 5, exit_code):
            problems.append(f"{call}: exit code {data['exit_code']}: {data['error']}")
        problems += [f"{call}: {problem}" for problem in inconsistencies(live, ["1.1"] if data["exit_code"] == 0
                                                                         else ["1.0"])]
    assert problems == [] and {0, 5} <= seen, "\n".join(problems)


# -- more than one signal, and children ----------------------------------------------

def interrupt_twice(live: App, configuration: str, again: int) -> Tuple[Running, Path]:
    """Interrupt a run in a command that takes its time to end, and send it another signal then; returns the run, and the command's mark."""
    asked, cleaned, ids = live.directory / "asked", live.directory / "cleaned", live.directory / "pids"
    slow = script(live.directory / "slow", f"test $DEPLOY_VERSION = 1.0 && exit 0\n"
                                           f"trap 'echo $$ >> {asked}; sleep 0.8; echo done > {cleaned}; exit 0' TERM\n"
                                           f"sleep 600 &\necho $! >> {ids}\necho $$ >> {ids}\nwait; wait")
    live.configure(configuration.format(slow=slow))
    running = Running(live, "deploy", live.artifact("1.1"))
    wait_blocked(live)
    running.process.send_signal(signal.SIGINT)
    wait_until(asked.exists, what="the command was asked to end")
    running.process.send_signal(again)
    return running, cleaned


@pytest.mark.parametrize("again", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_a_second_signal_does_not_cut_short_the_end_of_a_hook(live: App, again: int) -> None:
    """A person presses Control-C twice: the hook still gets its time to clean up, and everything is undone."""
    before = content(live.root)
    running, cleaned = interrupt_twice(live, "[hooks]\npre_activate = {slow}\n", again)
    data = running.end()
    assert (data["exit_code"], data["error"]["message"]) == (130, "interrupted by SIGINT")
    assert cleaned.exists(), "the hook was not left the time to clean up"
    wait_gone(pids(live))
    assert content(live.root) == before and inconsistencies(live, ["1.0"]) == []


def test_a_second_signal_does_not_cut_short_the_end_of_a_service_command(live: App) -> None:
    """Where a signal interrupts at once, it does so once."""
    running, cleaned = interrupt_twice(live, "[service:x]\ncommand = {slow}\n", signal.SIGTERM)
    assert running.end()["exit_code"] == 5
    assert cleaned.exists(), "the command was not left the time to clean up"
    wait_gone(pids(live))
    assert inconsistencies(live, ["1.0"]) == []


@by_signal
def test_a_signal_in_a_probe_before_the_deployment_changes_nothing(live: App, number: int, exit_code: int) -> None:
    before = content(live.root)
    live.configure(f"[probe:x]\ncommand = {block(live)}\ntimeout = 60s\nwhen = before\n")
    running = Running(live, "deploy", live.artifact("1.1"))
    wait_blocked(live)
    running.process.send_signal(number)
    data = running.end()
    assert data["exit_code"] == exit_code
    assert data["release"] == os.path.basename(os.readlink(str(live.root / "current"))), "what is live, not what was to be"
    wait_gone(pids(live))
    assert content(live.root) == before and inconsistencies(live, ["1.0"]) == []


@pytest.mark.parametrize("hook, exit_code", [("pre_activate", 143), ("post_activate", 5)])
def test_children_end_with_the_run_unless_they_detached_on_purpose(live: App, hook: str, exit_code: int) -> None:
    detached = live.directory / "detached"
    leave = script(live.directory / "leave", f'test "$DEPLOY_VERSION" = 1.0 && exit 0\nsetsid sh -c \'echo $$ > '
                                             f'{detached}; exec sleep 600\' &\n'
                                             f"(trap '' TERM HUP INT; sleep 600) &\necho $! >> {live.directory}/pids\n"
                                             f"echo $$ >> {live.directory}/pids\nwait")
    live.configure(f"[hooks]\n{hook} = {leave}\n")
    running = Running(live, "deploy", live.artifact("1.1"))
    wait_blocked(live)
    wait_until(lambda: detached.exists() and detached.read_text().strip(), what="a child has detached itself")
    running.process.send_signal(signal.SIGTERM)
    assert running.end()["exit_code"] == exit_code
    pid = int(detached.read_text())
    try:
        wait_gone(pids(live))
        assert is_running(pid), "what has a session of its own was meant to stay"
    finally:
        os.kill(pid, signal.SIGKILL)


# -- closed pipes ------------------------------------------------------------------------

PIPES = [("| head -1", ""), ("2>&1 | head -1", ""), ("2>&1 >/dev/null | head -1", "-v"), ("2>&1 | true", "-q"),
         ("2>&1 | true", "--json")]
TALKS = "[hooks]\npre_activate = /bin/sh -c 'seq 1 3000'\n" \
    "post_activate = /bin/sh -c 'seq 1 3000; {}'\npost_deploy = /bin/sh -c 'yes | head -2'\n"


@pytest.mark.parametrize("pipe, options", PIPES)
def test_a_reader_that_goes_away_never_changes_the_outcome(live: App, pipe: str, options: str) -> None:
    """Neither of a deployment nor of one that has to go back half way."""
    for version, ends, exit_code, alive in (("1.1", "true", 0, "1.1"), ("1.2", 'test "$DEPLOY_VERSION" != 1.2', 5, "1.1")):
        live.configure("durable = no\n" + TALKS.format(ends))
        assert piped(live, pipe, *options.split(), "deploy", str(live.artifact(version))) == exit_code
        assert inconsistencies(live, [alive]) == []
    assert [entry["result"] for entry in live.history()] == ["deployed", "deployed", "rolled_back"]


def piped(app: App, pipe: str, *words: str) -> int:
    """Run deploy.py in front of a pipe whose reader leaves early; the exit code of deploy.py itself."""
    line = f'"$0" "$@" {pipe}; exit ${{PIPESTATUS[0]}}'
    done = subprocess.run([needs("bash"), "-c", line, sys.executable, "-B", str(DEPLOY), "-c", str(app.config), *words],
                          env=clean_environment(), cwd="/", stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=60)
    assert b"Traceback" not in done.stderr and b"Exception ignored" not in done.stderr, done.stderr
    return done.returncode


def test_sigpipe_kills_a_hook_that_writes_to_nobody_as_anywhere_else(live: App) -> None:
    """Python ignores SIGPIPE; what it starts must not, or `yes | head` in a hook never ends."""
    live.configure("[hooks]\npre_activate = /bin/bash -c 'yes | head -1 > /dev/null; test ${PIPESTATUS[0]} = 141'\n")
    assert Running(live, "deploy", live.artifact("1.1")).end()["exit_code"] == 0


# -- who is not meant ------------------------------------------------------------

def test_under_nohup_a_hangup_changes_nothing(live: App) -> None:
    go, there = live.directory / "go", live.directory / "there"
    wait = script(live.directory / "wait", f"touch {there}\nn=0\nwhile [ ! -e {go} ] && [ $n -lt 3000 ]; do sleep 0.02; n=$((n+1)); done")
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
