"""Services: a systemctl that answers from a state file, real processes for pidfiles, real commands."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from support import file, load_deploy, wait_until

deploy = load_deploy()

CONTEXT = deploy.Context("myapp", "/", "20260101T000000Z-1.1", "1.1", "/nonexistent/release", "20260101T000000Z-1.0", "id")

UP = {"LoadState": "loaded", "ActiveState": "active", "SubState": "running", "MainPID": "100", "InvocationID": "aa",
      "NRestarts": "0", "NeedDaemonReload": "no", "Type": "simple", "Result": "success"}

# Each action may name a series of states: the first is what the action leaves, the rest come one a `show`.
SYSTEMCTL = """
import json, os, sys
here = os.path.dirname(os.path.abspath(sys.argv[0]))
with open(here + "/calls", "a") as log:
    log.write(json.dumps(sys.argv[1:]) + "\\n")
with open(here + "/state") as stream:
    state = json.load(stream)
verb = sys.argv[1]
if verb == "show":
    wanted = sys.argv[sys.argv.index("-p") + 1].split(",")
    for name in wanted:
        if name in state["now"]:
            print(name + "=" + state["now"][name])
    if state.get("queue"):
        state["now"].update(state["queue"].pop(0))
else:
    said = state.get("on", {}).get(verb, {})
    state["queue"] = said.get("then", [])
    state["now"].update(said.get("state", {}))
    if said.get("say"):
        print(said["say"], file=sys.stderr)
    if said.get("sleep"):
        import time
        time.sleep(said["sleep"])
with open(here + "/state.new", "w") as stream:
    json.dump(state, stream)
os.rename(here + "/state.new", here + "/state")
sys.exit(0 if verb == "show" else said.get("code", 0))
"""


class Systemd:
    """The fake systemctl's state and what it was asked."""

    def __init__(self, directory):
        self.directory = directory
        self.now, self.on = dict(UP), {"restart": {"state": {"InvocationID": "bb", "MainPID": "200"}}}

    def write(self):
        (self.directory / "state").write_text(json.dumps({"now": self.now, "on": self.on}))

    def calls(self):
        path = self.directory / "calls"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def verbs(self):
        return [call[0] for call in self.calls() if call[0] != "show"]


def program(directory, name, code):
    path = directory / name
    path.write_text(f"#!{sys.executable} -IS\n{code}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def systemd(tmp_path, monkeypatch):
    directory = tmp_path / "bin"
    directory.mkdir()
    program(directory, "systemctl", SYSTEMCTL)
    program(directory, "journalctl", "import sys; print('journal of', *sys.argv[1:])")
    monkeypatch.setenv("PATH", f"{directory}:{os.environ['PATH']}")
    return Systemd(directory)


def session_with(*assignments):
    settings = deploy.load_settings([], {}, list(assignments))
    return deploy.Run(settings, deploy.Console(), deploy.Interrupts(), SimpleNamespace(command="probe"))


def against(service):
    """What is against acting on a service, and what to do about it; None for nothing."""
    try:
        found = list(service.check())
    except deploy.StepFailed as failed:  # which whoever checks makes a row of
        return failed.message, failed.hint
    return found[0][1:] if found else None


def unit(systemd, *assignments, name="app.service"):
    systemd.write()
    given = [f"service:app.{text}" for text in (f"unit={name}", "settle=0s", "timeout=20s", *assignments)]
    return deploy.make_service(session_with(*given), "app")


# -- systemd units -----------------------------------------------------------

def test_restart_reads_the_state_in_one_call_and_confirms_it(systemd):
    detail = unit(systemd).act(CONTEXT)
    assert detail == "app.service is active (running, process 200)"
    assert systemd.verbs() == ["reset-failed", "restart"]
    shows = [call for call in systemd.calls() if call[0] == "show"]
    assert shows[0] == ["show", "-p", "LoadState,ActiveState,SubState,MainPID,InvocationID,NRestarts,"
                        "NeedDaemonReload,Type,Result,ExecMainStatus,CanReload,UnitFileState", "app.service"]


def test_daemon_reload_only_where_it_is_needed_and_before_the_action(systemd):
    systemd.now["NeedDaemonReload"] = "yes"
    unit(systemd).act(CONTEXT)
    assert systemd.verbs() == ["daemon-reload", "reset-failed", "restart"]


def test_a_reset_failed_that_fails_changes_nothing(systemd):
    systemd.on["reset-failed"] = {"code": 1, "say": "Unit app.service not loaded."}
    assert "running" in unit(systemd).act(CONTEXT)


@pytest.mark.parametrize("action", ["reload", "reload-or-restart", "start"])
def test_other_actions_may_leave_the_process_as_it_is(systemd, action):
    assert "process 100" in unit(systemd, f"action={action}").act(CONTEXT)
    assert systemd.verbs() == ["reset-failed", action]


def test_action_none_does_nothing(systemd):
    service = unit(systemd, "action=none")
    assert deploy.WORDS["services"][1]("services", SimpleNamespace(settings=service.run.settings), None) == []


def test_a_restart_that_did_not_restart_is_a_failure(systemd):
    systemd.on["restart"] = {}
    with pytest.raises(deploy.StepFailed, match="was not restarted"):
        unit(systemd).act(CONTEXT)


@pytest.mark.parametrize("load", ["not-found", "masked", "error"])
def test_a_unit_that_is_not_loaded_is_refused(systemd, load):
    systemd.now["LoadState"] = load
    what, hint = against(unit(systemd))
    assert load in what and hint


STATES = {
    "failed": ({"ActiveState": "failed", "SubState": "failed", "Result": "exit-code"}, "failed (failed, result exit-code)"),
    "crash loop": ({"ActiveState": "activating", "SubState": "auto-restart"}, "activating (auto-restart)"),
    "gone": ({"ActiveState": "inactive", "SubState": "dead"}, "inactive (dead)"),
    "exited": ({"SubState": "exited"}, "active (exited)"),
    "oneshot stays": ({"SubState": "exited", "Type": "oneshot"}, ""),
    "oneshot ended": ({"ActiveState": "inactive", "SubState": "dead", "Type": "oneshot"}, ""),
    "oneshot failed": ({"ActiveState": "failed", "SubState": "failed", "Type": "oneshot", "Result": "exit-code"}, "exit-code"),
    "timer": ({"SubState": "waiting", "Type": "", "MainPID": "0"}, ""),
    "inactive timer": ({"ActiveState": "inactive", "SubState": "dead", "Type": ""}, "inactive"),
}


@pytest.mark.parametrize("change, message", list(STATES.values()), ids=list(STATES))
def test_which_states_are_up(systemd, change, message):
    systemd.on["restart"]["state"].update(change)
    service = unit(systemd)
    if message:
        with pytest.raises(deploy.StepFailed) as caught:
            service.act(CONTEXT)
        assert message in caught.value.message
        assert caught.value.evidence["journal"] == ["journal of -u app.service -n 10 --no-pager"]
        assert message in service.down()
    else:
        service.act(CONTEXT)
        assert service.down() == ""


@pytest.mark.parametrize("later", [
    {"MainPID": "300"}, {"InvocationID": "cc"}, {"NRestarts": "1"}, {"ActiveState": "failed", "SubState": "failed"},
    {"ActiveState": "activating", "SubState": "auto-restart"}, {"ActiveState": "deactivating", "SubState": "stop"}])
def test_a_change_within_the_settle_time_is_a_failure(systemd, later):
    systemd.on["restart"]["then"] = [{}, later]
    with pytest.raises(deploy.StepFailed):
        unit(systemd, "settle=60s").act(CONTEXT)


def test_the_settle_time_is_watched_to_its_end(systemd):
    for seconds in (0.6, 6, 60):
        seen, started = len(systemd.calls()), time.monotonic()
        unit(systemd, f"settle={seconds}s").act(CONTEXT)
        assert time.monotonic() - started >= seconds
        shows = [call for call in systemd.calls()[seen:] if call[0] == "show"]
        if len(shows) >= 4:
            break  # else it was a slow host, where each takes long
    assert len(shows) >= 4


def test_a_unit_on_its_way_is_waited_for(systemd):
    systemd.on["restart"]["state"].update(ActiveState="activating", SubState="start-post")
    systemd.on["restart"]["then"] = [{}, {"ActiveState": "active", "SubState": "running"}]
    assert "running" in unit(systemd).act(CONTEXT)


def test_an_action_that_fails_brings_what_systemctl_and_the_journal_say(systemd):
    systemd.on["restart"] = {"code": 1, "say": "Job for app.service failed."}
    with pytest.raises(deploy.StepFailed) as caught:
        unit(systemd).act(CONTEXT)
    assert "Job for app.service failed." in caught.value.message
    assert caught.value.evidence["output"] == ["Job for app.service failed."]
    assert caught.value.evidence["journal"] and "journalctl -u app.service" in caught.value.hint


def test_a_signal_while_the_journal_is_asked_leaves_no_process(systemd, monkeypatch):
    program(systemd.directory, "journalctl", "import time; time.sleep(600)")
    systemd.on["restart"] = {"code": 1}
    service, started = unit(systemd), []

    class Signalled(subprocess.Popen):
        def __init__(self, argv, **options):
            super().__init__(argv, **options)
            if argv[0] == "journalctl":
                started.append(self.pid)
                os.kill(os.getpid(), signal.SIGTERM)  # as one that comes when it has just been forked

    monkeypatch.setattr(subprocess, "Popen", Signalled)
    before = {number: signal.getsignal(number) for number in deploy.Interrupts.SIGNALS}
    service.run.interrupts.install()
    try:
        with pytest.raises(deploy.Interrupted):
            service.act(CONTEXT)
        assert len(started) == 1 and not deploy.process_is_alive(started[0])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for pid in started:
            if deploy.process_is_alive(pid):
                os.kill(pid, signal.SIGKILL)


def test_half_a_secret_of_the_journal_is_no_evidence(systemd):
    program(systemd.directory, "journalctl", f"print('x' * {deploy.OUTPUT_LINE_CHARACTERS - 8} + 'a-secret-of-the-service')")
    systemd.on["restart"] = {"code": 1}
    service = unit(systemd)
    service.run.console.secrets.add("a-secret-of-the-service")
    with pytest.raises(deploy.StepFailed) as caught:
        service.act(CONTEXT)
    assert caught.value.evidence["journal"][0].endswith("x" + deploy.MASK)


def test_a_secret_that_is_a_word_of_systemds_by_chance_hides_no_state(systemd):
    service = unit(systemd)
    for word in ("active", "running", "loaded"):
        service.run.console.secrets.add(word)
    assert "app.service is active" in service.act(CONTEXT)


def test_an_action_that_hangs_is_ended_by_its_timeout(systemd):
    systemd.on["restart"]["sleep"] = 60
    started = time.monotonic()
    with pytest.raises(deploy.StepFailed, match="timed out"):
        unit(systemd, "timeout=1s").act(CONTEXT)
    assert time.monotonic() - started < 50


def test_preflight_accepts_a_unit_that_is_there(systemd):
    assert against(unit(systemd)) is None


def test_preflight_refuses_the_unit_that_deploy_runs_in(systemd, monkeypatch):
    monkeypatch.setattr(deploy, "read_text", {"/proc/self/cgroup": "1:name=systemd:/system.slice/app.service\n0::/user.slice\n"}.__getitem__)
    for name in ("app.service", "app"):
        what, hint = against(unit(systemd, name=name))
        assert "deploy.py runs in" in what and hint
    assert against(unit(systemd, "action=none")) is None


def test_without_systemctl_preflight_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(deploy, "EXTRA_PATH", str(tmp_path))
    what, hint = against(deploy.make_service(session_with("service:app.unit=app.service"), "app"))
    assert "cannot start systemctl: No such file or directory" in what and "without systemd" in hint


def test_a_systemctl_that_cannot_work_is_a_problem_and_not_a_crash(systemd):
    program(systemd.directory, "systemctl", "import sys; sys.exit('System has not been booted with systemd')")
    service = unit(systemd)
    assert "has not been booted" in against(service)[0]
    assert "has not been booted" in service.down()
    with pytest.raises(deploy.StepFailed, match="has not been booted"):
        service.act(CONTEXT)


# -- pidfiles ----------------------------------------------------------------

DAEMON = """
import os, signal, sys, time
code = {"code": "pass"}
def on_hup(number, frame):
    exec(sys.argv[2])
signal.signal(signal.SIGHUP, on_hup)
with open(sys.argv[1] + ".new", "w") as stream:
    stream.write(str(os.getpid()) + "\\n")
os.rename(sys.argv[1] + ".new", sys.argv[1])
while True:
    signal.pause()
"""


@pytest.fixture
def daemon(tmp_path):
    started = []

    def start(on_hup="open(sys.argv[1] + '.hup', 'w').close()"):
        pidfile = tmp_path / "app.pid"
        started.append(subprocess.Popen([sys.executable, "-IS", "-c", DAEMON, str(pidfile), on_hup]))
        wait_until(pidfile.exists)
        return pidfile
    start.started = started
    yield start
    for process in started:
        process.kill()
        process.wait()


def pidfile_service(path, *assignments):
    given = [f"service:app.{text}" for text in (f"pidfile={path}", "settle=500ms", *assignments)]
    return deploy.make_service(session_with(*given), "app")


@pytest.mark.parametrize("name", ["HUP", "SIGHUP", "hup"])
def test_the_signal_reaches_the_process(daemon, name):
    pidfile = daemon()
    service = pidfile_service(pidfile, f"signal={name}")
    assert against(service) is None
    assert f"sent to process {pidfile.read_text().strip()}" in service.act(CONTEXT)
    wait_until(pidfile.with_suffix(".pid.hup").exists)
    assert service.down() == ""


def test_a_process_that_dies_of_the_signal_is_a_failure(daemon):
    pidfile = daemon("os._exit(1)")
    with pytest.raises(deploy.StepFailed, match="is not running"):
        pidfile_service(pidfile, "settle=60s").act(CONTEXT)


def test_a_zombie_is_not_alive(daemon):
    pidfile = daemon("os._exit(1)")
    process = daemon.started[0]
    process.send_signal(signal.SIGHUP)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert "is not running" in pidfile_service(pidfile).down()


def test_a_process_may_go_on_under_another_id(daemon):
    pidfile = daemon("os.unlink(sys.argv[1]); pid = os.fork()\n"
                     "if pid: os._exit(0)\n"
                     "time.sleep(0.1); open(sys.argv[1] + '.new', 'w').write(str(os.getpid()))\n"
                     "os.rename(sys.argv[1] + '.new', sys.argv[1])")
    before = int(pidfile.read_text())
    pidfile_service(pidfile, "settle=1s").act(CONTEXT)
    after = int(pidfile.read_text())
    os.kill(after, signal.SIGKILL)
    assert after != before


@pytest.mark.parametrize("content", ["", "abc", "0", "1", "-1", "-5\n", "999999999999", "12 34", "٣٣", "\x00", "+7", "1e3"])
def test_what_is_no_process_id_is_refused(tmp_path, content):
    pidfile = tmp_path / "pid"
    pidfile.write_bytes(content.encode())
    service = pidfile_service(pidfile)
    assert service.down() and list(service.check())[0][0] == "fail"
    with pytest.raises(deploy.StepFailed):
        service.act(CONTEXT)


def test_a_process_that_is_gone_a_missing_file_and_a_fifo_are_down(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    (tmp_path / "pid").write_text(str(process.pid))
    os.mkfifo(str(tmp_path / "fifo"))
    assert "is not running" in pidfile_service(tmp_path / "pid").down()
    assert "No such file" in pidfile_service(tmp_path / "none").down()
    assert "not a regular file" in pidfile_service(tmp_path / "fifo").down()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to give the pidfile away")
def test_a_pidfile_of_another_user_does_not_choose_roots_victim(daemon):
    pidfile = daemon()
    os.chown(str(pidfile), 12345, 12345)
    assert "belongs to uid 12345" in pidfile_service(pidfile).down()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to give the pidfile to a group")
@pytest.mark.parametrize("mode, group, why", [(0o646, 0, "writable by group or others (mode 0646)"), (0o664, 12345, "(mode 0664)"),
                                              (0o664, 0, ""), (0o644, 12345, "")])
def test_a_pidfile_that_others_may_write_does_not_choose_roots_victim(daemon, mode, group, why):
    """One that belongs to the process's own user may be open to his group: it can name no process but his."""
    pidfile = daemon()
    os.chown(str(pidfile), 0, group)
    pidfile.chmod(mode)
    found = pidfile_service(pidfile).down()
    assert (why in found) if why else found == "", found


# -- commands ----------------------------------------------------------------

def command_service(command, *assignments):
    given = [f"service:app.command={command}", *assignments]
    return deploy.make_service(session_with(*given), "app")


def test_a_command_runs_in_the_release_or_else_in_the_root(tmp_path):
    path = program(tmp_path, "restart", "import os; open('ran', 'w').write(os.environ['DEPLOY_HOOK'])")
    (tmp_path / "release").mkdir()
    context = CONTEXT._replace(root=str(tmp_path), release_path=str(tmp_path / "release"))
    service = command_service(path)
    assert against(service) is None and service.down() == ""
    assert service.act(context).endswith("exited with code 0")
    assert (tmp_path / "release" / "ran").read_text() == "service:app"
    service.act(context._replace(release_path=str(tmp_path / "missing")))
    assert (tmp_path / "ran").exists()


def test_a_command_that_fails_or_hangs_is_a_failure_with_its_output(tmp_path):
    failing = program(tmp_path, "failing", "print('it broke'); raise SystemExit(4)")
    with pytest.raises(deploy.StepFailed) as caught:
        command_service(failing).act(CONTEXT)
    assert caught.value.evidence["output"] == ["it broke"] and caught.value.evidence["exit_code"] == 4
    hanging = program(tmp_path, "hanging", "import time; time.sleep(60)")
    with pytest.raises(deploy.StepFailed, match="timed out"):
        command_service(hanging, "service:app.timeout=300ms").act(CONTEXT)


def test_preflight_looks_for_the_program(tmp_path):
    assert "not found" in against(command_service("no-such-program-here x"))[0]
    assert "not found" in against(command_service(f"{tmp_path}/none"))[0]
    assert against(command_service("bin/restart")) is None, "it comes with the release"
    assert against(command_service("no-such-program-here", "env.PATH=/opt/app/bin")) is None
    assert against(command_service("true")) is None


# -- all of them -------------------------------------------------------------

@pytest.mark.parametrize("assignments, text", [
    (["unit=a.service"], "restart unit a.service"),
    (["unit=a.service", "action=reload"], "reload unit a.service"),
    (["pidfile=/run/a.pid", "signal=USR2"], "send USR2 to the process in /run/a.pid"),
    (["command=bin/restart 'a b'"], "run bin/restart 'a b'"),
])
def test_describe(assignments, text):
    session = session_with(*[f"service:app.{each}" for each in assignments])
    assert deploy.describe_service(session.settings.service["app"]) == text


def order(**after):
    given = [f"service:{name}.command=true" for name in after]
    given += [f"service:{name}.after={chr(10).join(names.split())}" for name, names in after.items() if names]
    return deploy.services_in_order(deploy.load_settings([], {}, given))


def test_services_go_after_those_they_name():
    assert order(a="c", b="", c="b") == ["b", "c", "a"]
    assert order(web="db cache", cache="db", db="") == ["db", "cache", "web"]
    assert order() == []


@pytest.mark.parametrize("after, names", [
    ({"a": "b", "b": "c", "c": "a"}, "a, b, c"), ({"a": "a"}, "a"), ({"z": "x", "x": "y", "y": "x", "w": ""}, "x, y, z"), ({"a": "nosuch"}, "a")])
def test_cycles_and_unknown_names_are_named(after, names):
    with pytest.raises(deploy.UsageError, match=f"wait for each other: {names}$"):
        order(**after)


# -- what is down before the switch, and what stays behind after it -----------------

def sleeper(app, *, directory="/", on_hup="signal.SIG_IGN"):
    """A process with a pidfile, in a directory of its own choice."""
    pidfile = app.directory / "app.pid"
    code = (f"import os, signal, time\nos.chdir({str(directory)!r})\nsignal.signal(signal.SIGHUP, {on_hup})\n"
            f"with open({str(pidfile)!r} + '.new', 'w') as out: out.write(str(os.getpid()))\n"
            f"os.rename({str(pidfile)!r} + '.new', {str(pidfile)!r})\nwhile True: time.sleep(1)")
    process = subprocess.Popen([sys.executable, "-IS", "-c", code])
    wait_until(pidfile.exists)
    return process, pidfile


def with_pidfile(app, path, more=""):
    app.configure(f"durable = no\n[service:app]\npidfile = {path}\nsettle = 300ms\n{more}")


def test_a_first_deployment_needs_no_process_to_signal(app):
    with_pidfile(app, app.directory / "none.pid")
    for command in ("stage", "deploy"):
        app.run(command, app.artifact("1.0"), check=0)
    assert app.version == "1.0"
    process, pidfile = sleeper(app, on_hup="signal.SIG_DFL")
    try:
        (app.root / "current").unlink()
        with_pidfile(app, pidfile)
        steps = {step["name"]: step["detail"] for step in app.deploy("1.1").data["steps"]}
        assert "nothing was live before" in steps["service:app"] and process.poll() is None
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("command", ["rollback", "deploy"])
def test_a_process_that_was_gone_before_is_no_reason_to_go_back(app, command):
    app.configure("durable = no\n")
    app.deploy("1.0")
    app.deploy("1.1")
    gone = subprocess.Popen(["true"])
    gone.wait()
    (app.directory / "app.pid").write_text(str(gone.pid))
    with_pidfile(app, app.directory / "app.pid")
    done = app.run(command, *([app.artifact("1.2")] if command == "deploy" else []), check=0)
    assert app.version == ("1.2" if command == "deploy" else "1.0")
    assert any("is not running: start it" in line for line in done.data["warnings"])


def test_a_process_that_the_new_release_killed_needs_a_person(app):
    app.configure("durable = no\n")
    app.deploy("1.0")
    process, pidfile = sleeper(app, on_hup="signal.SIG_DFL")
    with_pidfile(app, pidfile)
    done = app.run("deploy", app.artifact("1.1"), check=6)
    process.wait()
    assert "is not running: start it" in done.data["error"]["message"] and app.version == "1.0"
    again = app.run("deploy", app.artifact("1.2"), check=0)
    assert app.version == "1.2" and any("start it" in line for line in again.data["warnings"])


@pytest.mark.parametrize("link", ["cwd", "exe"])
def test_a_process_that_stays_in_the_old_release_is_a_failure(app, link):
    app.configure("durable = no\n")
    app.deploy("1.0", {"bin/python": file(Path("/usr/bin/python3").resolve().read_bytes(), 0o755)})
    current = (app.root / "current").resolve()
    if link == "cwd":
        process, pidfile = sleeper(app, directory=current)
    else:
        pidfile = app.directory / "app.pid"
        process = subprocess.Popen([str(current / "bin/python"), "-IS", "-c", "import time; time.sleep(600)"],
                                   env={"PYTHONHOME": "/usr"}, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
        pidfile.write_text(str(process.pid))
    try:
        with_pidfile(app, pidfile)
        error = app.run("deploy", app.artifact("1.1"), check=5).data["error"]
        assert f"still runs from another release: its {link} is {current}" in error["message"] and app.version == "1.0"
        # The word of a probe that asks for the release itself counts.
        with_pidfile(app, pidfile, "[probe:web]\ncommand = cat VERSION\nrelease = body\nsuccesses = 1\n")
        app.run("deploy", app.artifact("1.1"), "--force", check=0)
    finally:
        process.kill()
        process.wait()


def test_reload_of_a_unit_that_does_not_run_is_a_start(app, systemd):
    systemd.now.update(ActiveState="inactive", SubState="dead", MainPID="0", InvocationID="")
    systemd.on = {"start": {"state": {"ActiveState": "active", "SubState": "running", "MainPID": "7"}},
                  "reload": {"code": 1, "say": "Job type reload is not applicable for unit app.service."}}
    systemd.write()
    app.configure("durable = no\n[service:app]\nunit = app.service\naction = reload\nsettle = 0s\n")
    app.run("deploy", app.artifact("1.0"), check=0, env={"PATH": os.environ["PATH"]})
    assert systemd.verbs() == ["reset-failed", "start"]
    app.run("deploy", app.artifact("1.1"), check=6, env={"PATH": os.environ["PATH"]})
    assert "reload" in systemd.verbs(), "it runs now"


def test_a_unit_that_cannot_be_reloaded_is_found_by_preflight(app, systemd):
    systemd.now["CanReload"] = "no"
    systemd.write()
    app.configure("[service:app]\nunit = app.service\naction = reload\n")
    error = app.run("deploy", app.artifact("1.0"), check=3, env={"PATH": os.environ["PATH"]}).data["error"]
    assert "cannot be reloaded" in error["message"] and "action = restart" in error["hint"] and app.releases() == []


def test_a_systemctl_that_takes_too_long_names_the_option(app, systemd):
    systemd.on["restart"]["sleep"] = 60
    systemd.write()
    app.configure("durable = no\n[service:app]\nunit = app.service\nsettle = 0s\ntimeout = 1s\n")
    done = app.run("deploy", app.artifact("1.0"), check=5, env={"PATH": os.environ["PATH"]})
    assert "timed out" in done.data["error"]["message"]
    assert "with `timeout`" in done.data["error"]["hint"]


def test_systemctl_may_be_called_otherwise(app, systemd):
    wrapper = program(systemd.directory, "wrap", "import os, sys; open(sys.argv[1], 'a').write(sys.argv[3] + ' ')\n"
                      "assert os.environ['XDG_RUNTIME_DIR']\nos.execvp(sys.argv[2], sys.argv[2:])")
    systemd.write()
    app.configure(f"durable = no\n[service:app]\nunit = app.service\nsettle = 0s\nsystemctl = {wrapper} {app.directory}/asked systemctl\n")
    app.run("deploy", app.artifact("1.0"), check=0, env={"PATH": os.environ["PATH"]})
    assert (app.directory / "asked").read_text().split().count("restart") == 1
    assert systemd.verbs() == ["reset-failed", "restart"]


# -- probes of what was restarted ----------------------------------------------------

PROBE = "[probe:web]\nperiod = 10ms\nbackoff = 1\nsuccesses = 1\nfailures = 3\n"


@pytest.mark.parametrize("status, action, early", [
    (500, "restart", True), (404, "restart", True), (502, "restart", False), (503, "restart", False), (504, "restart", False),
    (500, "reload", False)])
def test_what_a_restarted_unit_answers_is_the_new_release(app, systemd, server, status, action, early):
    systemd.write()
    server.status = status
    app.configure(f"durable = no\n[service:app]\nunit = app.service\naction = {action}\nsettle = 0s\n{PROBE}url = {server.url}\n"
                  f"deadline = {'600s' if early else '500ms'}\n")
    app.run("deploy", app.artifact("1.0"), check=5, env={"PATH": os.environ["PATH"]})
    evidence = app.history()[-1]["failure"]["evidence"]
    assert (evidence["tries"] == 3) is early and f"status {status}" in evidence["error"]
    assert evidence["journal"] == ["journal of -u app.service -n 10 --no-pager"]


@pytest.mark.parametrize("version, early", [("", True), ("0.9", False)])
def test_what_a_restarted_unit_answers_without_a_version_is_the_new_release(app, systemd, server, version, early):
    """An error page names none; another version is another process's."""
    systemd.write()
    server.status, server.body = 500, json.dumps({"version": version} if version else {}).encode()
    app.configure(f"durable = no\n[service:app]\nunit = app.service\nsettle = 0s\n{PROBE}url = {server.url}\nrelease = json:version\n"
                  f"deadline = {'600s' if early else '500ms'}\n")
    app.run("deploy", app.artifact("1.0"), check=5, env={"PATH": os.environ["PATH"]})
    assert (app.history()[-1]["failure"]["evidence"]["tries"] == 3) is early


def test_a_service_probe_ends_when_its_unit_has_failed(app, systemd):
    systemd.on["restart"]["then"] = [{}, {}, {}, {"ActiveState": "failed", "SubState": "failed", "Result": "exit-code"}]
    systemd.write()
    app.configure(f"durable = no\n[service:app]\nunit = app.service\nsettle = 0s\n{PROBE.replace('successes = 1', 'successes = 100')}"
                  "service = app\ndeadline = 600s\n")
    app.run("deploy", app.artifact("1.0"), check=5, env={"PATH": os.environ["PATH"]})
    failure = app.history()[-1]["failure"]
    assert failure["step"] == "probe:web" and "is failed" in failure["reason"] and failure["evidence"]["tries"] < 10


@pytest.mark.parametrize("more", ["", "soak = 600s\n"])
def test_a_crash_loop_is_found_though_every_look_finds_the_unit_up(app, systemd, more):
    systemd.on["restart"]["then"] = [{}, {}, {}] + [{"NRestarts": str(number // 2)} for number in range(40)]
    systemd.write()
    successes = "successes = 1" if more else "successes = 100"
    app.configure(f"durable = no\n[service:app]\nunit = app.service\nsettle = 0s\n{PROBE.replace('successes = 1', successes)}"
                  f"service = app\ndeadline = 600s\n{more}")
    app.run("deploy", app.artifact("1.0"), check=5, env={"PATH": os.environ["PATH"]})
    assert "service app was restarted 3 times" in app.history()[-1]["failure"]["reason"]


def test_a_service_probe_ends_when_its_unit_has_restarted_too_often(app, systemd):
    loop = {"ActiveState": "activating", "SubState": "auto-restart"}
    systemd.on["restart"]["then"] = [{}, {}, {}] + [dict(loop, NRestarts=str(number // 4)) for number in range(40)]
    systemd.write()
    app.configure(f"durable = no\n[service:app]\nunit = app.service\nsettle = 0s\n{PROBE.replace('successes = 1', 'successes = 100')}"
                  "service = app\ndeadline = 600s\n")
    app.run("deploy", app.artifact("1.0"), check=5, env={"PATH": os.environ["PATH"]})
    failure = app.history()[-1]["failure"]
    assert "auto-restart" in failure["reason"] and 3 < failure["evidence"]["tries"] < 40
