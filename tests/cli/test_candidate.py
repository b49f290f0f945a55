"""A candidate: the new release answers on a port of its own before anybody sees it, and nothing of it stays."""

import os
import pwd
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from contextlib import closing
from pathlib import Path
from typing import Any, Dict, Iterator, List

import pytest

from crashes import holder_pid, is_running, script, wait_gone
from scenes import Gate, alive, configure
from support import App, deep, described, file, free_port, needs, open_to_others, start_deploy, wait_until

# What the release brings: it listens where it is told to and answers with its version, in a way that its file `how` names.
SERVE = """#!{python} -IS
import os, signal, socket, sys, time
here = os.path.dirname(os.path.abspath(__file__))
how = open(here + "/how").read().split()
port = int(sys.argv[1])
assert os.environ["DEPLOY_CANDIDATE_PORT"] == sys.argv[1] and os.environ["DEPLOY_HOOK"] == "candidate", os.environ
def note(**more):
    with open({pids!r}, "a") as pids:
        pids.write(str(os.getpid()) + "\\n")
def fork(session=False):
    if os.fork():
        os._exit(0)
    session and os.setsid()
    note()
print("starts in", os.getcwd(), "as", os.getuid(), flush=True)
note()
if "ignores" in how:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if "ends" in how:
    sys.exit("no such table: users")
if "silent" in how:
    time.sleep(600)
if "leaves" in how:  # a child that never listens
    fork()
    time.sleep(600)
if "forks" in how:
    fork()
if "daemon" in how:
    fork(session=True)
    fork(session=True)
listener = socket.socket()
listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
listener.bind(("127.0.0.1", port + ("wrong" in how)))
listener.listen(5)
status = how[-1] if how[-1].isdigit() else "200"
answers = 0
while "killed" not in how or answers < 1:
    peer = listener.accept()[0]
    if peer.recv(65536):
        version = "0.9" if "old" in how else os.environ["DEPLOY_VERSION"]
        head = "HTTP/1.1 %s X\\r\\n" % status + ("" if "mute" in how else "X-Version: %s\\r\\n" % version)
        peer.sendall((head + "Content-Length: 0\\r\\n\\r\\n").encode())
        answers += 1
    peer.close()
os.kill(os.getpid(), 9)
"""
PROBE = "[probe:new]\nwhen = candidate\nurl = http://127.0.0.1:${DEPLOY_CANDIDATE_PORT}/health\nrelease = header:X-Version\n"
QUICK = "period = 20ms\nbackoff = 1\njitter = 0\nsuccesses = 2\n"


class Shop(App):
    """An application whose releases bring a program that is started as the candidate."""

    def __init__(self, directory: Any) -> None:
        super().__init__(directory)
        self.pids = self.directory / "pids"
        self.candidate()

    def candidate(self, more: str = "", probe: str = PROBE + QUICK) -> None:
        """Configure it."""
        configure(self, f"[candidate]\ncommand = bin/serve ${{DEPLOY_CANDIDATE_PORT}}\n{more}\n{probe}")

    def files(self, how: str, python: str = sys.executable) -> Dict[str, Any]:
        """The release's own program, and how it behaves."""
        serve = SERVE.format(python=python, pids=str(self.pids))
        return {"bin/serve": file(serve, 0o755), "bin/how": how + " \n"}

    def try_out(self, version: str, how: str = "well", check: int = 0, **options: Any) -> Any:
        """Deploy a version; nothing that it started is left, however it went."""
        result = self.run("deploy", self.artifact(version, self.files(how)), check=check, **options)
        assert self.started() or "-n" in result.argv
        assert [pid for pid in self.started() if alive(pid)] == []
        return result

    def started(self) -> List[int]:
        """Every process that was a candidate's."""
        return [int(word) for word in self.pids.read_text().split()] if self.pids.exists() else []

    def failure(self) -> Dict[str, Any]:
        """What the history says of the last failure."""
        return self.history()[-1]["failure"]


@pytest.fixture
def shop(tmp_path: Path) -> Iterator[Shop]:
    """Such an application."""
    made = Shop(tmp_path / "shop")
    yield made
    for pid in made.started():
        if is_running(pid):
            os.kill(pid, signal.SIGKILL)


# -- its verdict -----------------------------------------------------------------

@pytest.mark.parametrize("how", ["well", "forks", "daemon", "ignores"])
def test_a_candidate_that_answers_goes_live_and_is_ended(shop: Shop, how: str) -> None:
    result = shop.try_out("1.0", how)
    assert shop.version == "1.0"
    step, = [step for step in result.data["steps"] if step["name"] == "candidate"]
    assert step["status"] == "done" and re.match(r"status 200 \(\d+ tries\)\Z", step["detail"]), step
    assert step["output"] == [f"starts in {os.path.realpath(str(shop.root / 'current'))} as {os.getuid()}"]


@pytest.mark.parametrize("how, why", [
    ("ends", "the candidate exited with code 1: no such table: users"), ("silent", "not healthy within 0.60s"),
    ("leaves", "the candidate exited with code 0"), ("wrong", "Connection refused"), ("old", "answered with version 0.9, expected 1.1"),
    ("mute 500", "the new release itself failed: status 500"), ("500", "the new release itself failed: status 500"),
    ("killed", "the candidate was killed by SIGKILL"), ("daemon wrong", "the candidate exited with code 0")])
def test_a_candidate_that_fails_makes_its_artifact_bad_and_switches_nothing(shop: Shop, how: str, why: str) -> None:
    """By its silence at the deadline, by its end and its own answers long before it."""
    shop.try_out("1.0")
    shop.candidate(probe=PROBE + QUICK + f"deadline = {'600ms' if how in ('silent', 'old', 'wrong') else '300s'}\n")
    live = shop.current
    error = shop.try_out("1.1", how, check=1).data["error"]
    assert re.search(why, error["message"]), error
    assert shop.current == live and shop.leftovers() == []
    bad, = set(shop.releases()) - {live}
    assert shop.record(bad)["state"] == "bad" and shop.record(bad)["deactivated_at"] is None
    entry = shop.history()[-1]
    assert entry["result"] == "failed" and entry["failure"]["step"] == "candidate"
    assert entry["failure"]["evidence"]["output"][0].startswith("starts in")
    refused = shop.run("deploy", shop.artifact("1.1", shop.files(how)), check=4)
    assert "marked bad" in refused.data["error"]["message"]


def test_without_a_probe_the_port_must_take_a_connection(shop: Shop) -> None:
    shop.candidate(probe="")
    shop.try_out("1.0")
    shop.candidate("timeout = 700ms", probe="")
    error = shop.try_out("1.1", "wrong", check=1).data["error"]
    assert "Connection refused" in error["message"] and shop.version == "1.0"


@deep
@pytest.mark.parametrize("probe", ["soak = 600s", "initial_delay = 600s", "deadline = 600s\nsuccesses = 10000"])
def test_its_timeout_bounds_all_that_its_probes_want(shop: Shop, probe: str) -> None:
    shop.candidate("timeout = 500ms", PROBE + QUICK.replace("successes = 2", "") + probe + "\n")
    error = shop.try_out("1.0", check=1).data["error"]
    assert re.search("was not healthy in time|not healthy within 0.[45]", error["message"]), error
    assert shop.current is None


def test_a_probe_that_is_not_required_only_warns(shop: Shop) -> None:
    shop.candidate(probe=PROBE + QUICK + "required = no\nstatus = 204\n")
    warning, = shop.try_out("1.0").data["warnings"]
    assert re.match(r"probe new failed after \d+ tries: the new release itself failed", warning) and shop.version == "1.0"
    assert "exited with code 1" in shop.try_out("1.1", "ends", check=1).data["error"]["message"]


def test_a_command_that_cannot_be_started_makes_nothing_bad(shop: Shop) -> None:
    shop.run("deploy", shop.artifact("1.0", {"bin/serve": "not executable\n"}), check=1)
    assert "cannot start bin/serve: Permission denied (EACCES)" in shop.history()[-1]["message"]
    shop.run("deploy", shop.artifact("1.0", {"bin/serve": "not executable\n"}), check=1)


@deep
def test_output_without_end_neither_holds_it_up_nor_fills_memory(shop: Shop) -> None:
    flood = "#!/bin/sh\nyes flood | head -c 3000000\nexec bin/real $1\n"
    files = shop.files("well")
    shop.run("deploy", shop.artifact("1.0", dict(files, **{"bin/real": files["bin/serve"], "bin/serve": file(flood, 0o755)})), check=0)
    assert 0 < len(shop.history()[-1]["steps"][-2]["output"]) <= 40
    wait_gone(shop.started())


def test_what_was_migrated_for_it_is_taken_back_when_it_fails(shop: Shop) -> None:
    """It asks the data as they will be; `down` runs in the release, which stays."""
    data = shop.directory / "data"
    shop.candidate(probe=PROBE + QUICK + f"[migrate]\nup = {script(shop.directory / 'up', f'echo $PWD > {data}')}\n"
                   f"down = {script(shop.directory / 'down', f'grep -qx $PWD {data} && rm {data}')}\n")
    shop.try_out("1.0", "ends", check=1)
    bad, = shop.releases()
    assert not data.exists() and shop.current is None and shop.leftovers() == []
    assert shop.record(bad)["state"] == "bad" and shop.record(bad)["migrated"] is False
    shop.try_out("1.1")
    assert data.read_text().strip().endswith("-1.1")


# -- when, and with what -----------------------------------------------------------

def test_deploy_and_activate_start_one_and_nothing_else_does(shop: Shop) -> None:
    first = shop.try_out("1.0")
    begun = len(shop.started())
    shown = shop.run("-n", "deploy", shop.artifact("1.1", shop.files("well")), check=0).data["plan"]
    assert {"name": "candidate", "description": "start bin/serve ${DEPLOY_CANDIDATE_PORT} on port auto, probe it there, end it"} in shown
    shop.run("deploy", shop.artifact("1.0", shop.files("well")), check=0)
    shop.run("stage", shop.artifact("1.1", shop.files("well")), check=0)
    shop.run("probe", check=2)
    assert "url" in shop.run("probe", "new", check=2).data["error"]["message"]
    assert len(shop.started()) == begun
    shop.run("activate", "1.1", check=0)
    assert len(shop.started()) == begun + 1 and shop.version == "1.1"
    shop.run("rollback", check=0)
    shop.run("recover", check=0)
    assert len(shop.started()) == begun + 1 and shop.current == first.data["release"]
    wait_gone(shop.started())


def test_activate_makes_a_staged_release_bad_and_leaves_an_earlier_one_what_it_was(shop: Shop) -> None:
    ids = [shop.try_out(version).data["release"] for version in ("1.0", "1.1")]
    ids.append(shop.run("stage", shop.artifact("1.2", shop.files("ends")), check=0).data["release"])
    shop.run("activate", "1.2", check=1)
    shop.candidate(probe=PROBE + QUICK + "status = 204\n")
    shop.run("activate", "1.0", check=1)
    assert [shop.record(release)["state"] for release in ids] == ["retired", "active", "bad"]
    assert shop.run("activate", "1.2", check=4) and shop.current == ids[1]


def test_the_port_is_known_to_the_candidate_and_its_probes_alone(shop: Shop) -> None:
    noted = shop.directory / "noted"
    note = script(shop.directory / "note", f'echo "$DEPLOY_HOOK ${{DEPLOY_CANDIDATE_PORT:-none}} $*" >> {noted}')
    port = free_port()
    shop.candidate(f"port = {port}", PROBE + QUICK + "[probe:asks]\nwhen = candidate\nsuccesses = 1\n"
                   f"command = {note} \"${{DEPLOY_CANDIDATE_PORT}}\"\n[probe:after]\nsuccesses = 1\ncommand = {note}\n"
                   f"[hooks]\npre_activate = {note}\npost_activate = {note}\n")
    shop.try_out("1.0")
    assert noted.read_text().splitlines() == ["pre_activate none ", f"probe:asks {port} {port}", "post_activate none ", "probe:after none "]
    # What is started for a candidate and calls deploy.py does not configure it by that.
    shop.run("status", env={"DEPLOY_CANDIDATE_PORT": "none", "DEPLOY_HOOK": "probe:asks"}, check=0)
    shop.run("status", env={"DEPLOY_CANDIDATE_PORT": "none"}, check=2)


def test_a_fixed_port_that_is_taken_fails_preflight_of_what_would_start_one(shop: Shop) -> None:
    shop.try_out("1.0")
    shop.try_out("1.1")
    with closing(socket.socket()) as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(1)
        shop.candidate(f"port = {listener.getsockname()[1]}")
        begun = shop.started()
        refused = shop.run("deploy", shop.artifact("1.2", shop.files("well")), check=3).data["error"]
        assert "preflight: programs: port" in refused["message"] and "ss -ltnp" in refused["hint"]
        shop.run("activate", "1.0", check=3)
        shop.run("stage", shop.artifact("1.2", shop.files("well")), check=0)
        shop.run("rollback", check=0)
    assert shop.started() == begun and shop.version == "1.0"
    shop.run("activate", "1.2", check=0)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_it_runs_as_the_user_of_the_hooks_and_is_ended_all_the_same() -> None:
    with open_to_others() as app:
        shop = Shop(app.directory / "shop")
        shop.candidate(probe=PROBE + QUICK + "[hooks]\nrun_as = nobody\n")
        shop.pids.write_text("")
        os.chown(str(shop.pids), pwd.getpwnam("nobody").pw_uid, -1)
        shop.run("deploy", shop.artifact("1.0", shop.files("daemon ignores", "/usr/bin/python3")), check=0)
        assert shop.history()[-1]["steps"][-2]["output"][0].endswith(f" as {pwd.getpwnam('nobody').pw_uid}")
        assert len(shop.started()) == 3 and not any(map(alive, shop.started()))


@pytest.mark.parametrize("text, message", [
    (PROBE, "when = candidate needs a [candidate] with its command"),
    ("[candidate]\nport = 8000\n", "[candidate] needs command, and has none"),
    ("[candidate]\ncommand = a\nport = 0\n", "[candidate] port"), ("[candidate]\ncommand = a\ntimeout = 0s\n", "[candidate] timeout"),
    ("[candidate]\ncommand = a ${PORT}\n", "is for a shell"), ("[hooks]\npre_stage = a ${DEPLOY_CANDIDATE_PORT}\n", "is for a shell"),
    ("[probe:x]\nurl = http://a:${DEPLOY_CANDIDATE_PORT}/\n", "[probe:x] url: "),
    ("[probe:x]\ncommand = true ${DEPLOY_CANDIDATE_PORT}\n", "known while a candidate is asked"),
    ("[candidate]\ncommand = a\n[service:s]\nunit = s\n[probe:x]\nservice = s\nwhen = candidate\n", "a candidate is no service")])
def test_what_does_not_go_together_is_told_at_once(app: App, text: str, message: str) -> None:
    app.configure(text)
    assert message in app.run("deploy", app.artifact("1.0"), check=2).data["error"]["message"]


# -- it never outlives the run -------------------------------------------------------

@pytest.mark.parametrize("how, whom", [("daemon ignores", "run"), ("silent", "group"), ("daemon", "term")])
def test_a_run_that_is_killed_takes_the_candidate_with_it_and_blames_nobody(shop: Shop, how: str, whom: str) -> None:
    shop.try_out("1.0")
    begun, gate = len(shop.started()), Gate(shop.directory / "gate")
    shop.candidate(probe=f"[probe:waits]\nwhen = candidate\ncommand = {gate.command}\ntimeout = 60s\n")
    artifact = shop.artifact("1.1", shop.files(how))
    process = start_deploy("deploy", artifact, config=shop.config)
    gate.wait_for_visitor()
    wait_until(lambda: len(shop.started()) == begun + (3 if "daemon" in how else 1))
    assert any(map(alive, shop.started()[begun:]))
    if whom == "group":
        os.killpg(process.pid, signal.SIGKILL)
    else:
        process.send_signal(signal.SIGKILL if whom == "run" else signal.SIGTERM)
    assert process.wait(60) == (143 if whom == "term" else -signal.SIGKILL)
    # At once: what ends the candidate, and may take two seconds for it, does not hold the lock.
    shop.run("recover", check=0)
    wait_gone(shop.started())
    assert shop.version == "1.0" and shop.leftovers() == [] and shop.run("status", check=0)
    gate.open()
    shop.candidate()
    shop.try_out("1.1")
    assert shop.version == "1.1" and shop.history()[-2]["result"] == ("failed" if whom == "term" else "aborted")


def test_whoever_kills_its_guard_ends_the_deployment_and_makes_nothing_bad(shop: Shop) -> None:
    gate = Gate(shop.directory / "gate")
    shop.candidate(probe=f"[probe:waits]\nwhen = candidate\ncommand = {gate.command}\ntimeout = 60s\n")
    artifact = shop.artifact("1.0", shop.files("silent"))
    process = start_deploy("deploy", artifact, config=shop.config)
    gate.wait_for_visitor()
    pid, = wait_until(shop.started)
    guard = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    assert guard not in (process.pid, 1) and holder_pid(shop) == process.pid
    os.kill(guard, signal.SIGKILL)
    gate.open()
    assert process.wait(60) == 1 and "lost its guard" in shop.history()[-1]["message"]
    assert shop.current is None and not [name for name in shop.releases() if shop.record(name)["state"] == "bad"]


def test_nobody_sees_a_bad_release_behind_a_front(shop: Shop, tmp_path: Path) -> None:
    """nginx before the live one, which a hook starts anew, under clients that keep asking."""
    live, front = free_port(), free_port()
    conf = tmp_path / "nginx.conf"
    conf.write_text(f"daemon off; master_process off; pid {tmp_path}/nginx.pid; error_log {tmp_path}/error.log; events {{}}\n"
                    f"http {{ access_log off; server {{ listen 127.0.0.1:{front}; location / {{ proxy_pass http://127.0.0.1:{live};\n"
                    "proxy_next_upstream error timeout; } } }\n")
    start = script(tmp_path / "start", f"test -e {tmp_path}/pid && kill $(cat {tmp_path}/pid)\nDEPLOY_HOOK=candidate DEPLOY_CANDIDATE_PORT={live} "
                   f"setsid bin/serve {live} > /dev/null 2>&1 < /dev/null &\necho $! > {tmp_path}/pid")
    shop.candidate(probe=PROBE + QUICK + f"[service:web]\ncommand = {start}\n[probe:live]\nurl = http://127.0.0.1:{live}/\n"
                   "release = header:X-Version\n" + QUICK)
    shop.run("deploy", shop.artifact("1.0", shop.files("well")), check=0)
    nginx = subprocess.Popen([needs("nginx"), "-e", "stderr", "-c", str(conf)], stderr=subprocess.DEVNULL)
    seen, over = [], threading.Event()  # type: List[str], threading.Event
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def keep_asking() -> None:
        while not over.is_set():
            try:
                with opener.open(f"http://127.0.0.1:{front}/", timeout=30) as answer:
                    seen.append(answer.headers["X-Version"])
            except OSError as error:
                seen.append(str(error))
    clients = [threading.Thread(target=keep_asking) for _ in range(4)]
    try:
        wait_until(lambda: socket.socket().connect_ex(("127.0.0.1", front)) == 0)
        for client in clients:
            client.start()
        for number, how in enumerate(["ends", "500", "mute 404"], 1):
            shop.run("deploy", shop.artifact(f"1.{number}", shop.files(how)), check=1)
        wait_until(lambda: len(seen) > 100)
    finally:
        over.set()
        for client in clients:
            client.join()
        nginx.kill()
        nginx.wait()
        os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)
    assert set(seen) == {"1.0"}, described(set(seen))
