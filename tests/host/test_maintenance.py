"""The maintenance flag is there exactly as long as it should be, and `maintenance serve` says so to every visitor."""

import json
import os
import signal
import socket
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional

import pytest

from crash_scenarios import KILL
from scenes import Gate, configure, deploy_all
from support import App, Server, deep, free_port, needs, snapshot, start_deploy, wait_until
from test_snippets import SNIPPETS, kind_of

FLAG_IS = "/bin/sh -c 'echo $DEPLOY_HOOK $(ls $DEPLOY_ROOT | grep -c maintenance) >> $DEPLOY_ROOT/../seen'"


def flag(app: App) -> Optional[Dict[str, Any]]:
    """What the flag file says; None where there is none."""
    path = app.root / "maintenance"
    return json.loads(path.read_text()) if path.exists() else None


def seen(app: App) -> List[str]:
    """Of each command that looked whether the flag was there: its name and 0 or 1."""
    path = app.directory / "seen"
    found = path.read_text().splitlines() if path.exists() else []
    path.write_text("")
    return found


def settle(app: App, during: str, hooks: str = "", more: str = "") -> None:
    """Configure [maintenance], commands that look for the flag wherever one can stand, and other hooks."""
    names = [name for name in ("pre_activate", "post_activate", "post_deploy") if name not in hooks]
    looks = "".join(f"{name} = {FLAG_IS}\n" for name in names)
    configure(app, f"[maintenance]\nduring = {during}\n[hooks]\n{looks}{hooks}\n[service:app]\ncommand = {FLAG_IS}\n{more}")


MIGRATE = "[migrate]\n" + "".join(f"{word} = {FLAG_IS}\n" for word in ("backup", "up", "down"))


# -- by a run ------------------------------------------------------------------

def test_during_the_switch_it_is_there_from_just_before_it_to_the_verdict(app: App) -> None:
    settle(app, "switch", more=MIGRATE)
    done = app.deploy("1.0").data
    assert seen(app) == ["pre_activate 0", "migrate:backup 0", "migrate:up 0", "post_activate 1", "service:app 1", "post_deploy 1"]
    names = [step["name"] for step in done["steps"]]
    assert names.index("maintenance:on") == names.index("activate") - 1 and names[-1] == "maintenance:off"
    assert flag(app) is None


@pytest.mark.parametrize("check", [0, 1])
def test_during_a_migration_it_is_there_only_where_check_asks_for_it(check: int, app: App) -> None:
    settle(app, "migrate", more=f"{MIGRATE}check = sh -c 'exit {check}'\n")
    app.deploy("1.0")
    up = ["migrate:backup 1", "migrate:up 1"] if check else []
    assert seen(app) == ["pre_activate 0", *up, *[f"{name} {check}" for name in ("post_activate", "service:app", "post_deploy")]]
    assert flag(app) is None
    settle(app, "migrate", more=MIGRATE)
    app.deploy("1.1")
    seen(app)
    app.run("rollback", check=0)
    assert seen(app) == ["migrate:down 1", "service:app 1"] and flag(app) is None


@pytest.mark.parametrize("hooks, more, exit_code", [
    ("", "[migrate]\nup = false\n", 1), ("post_deploy = false\n", "", 5), ("pre_activate = false\n", "", 1),
    ("post_deploy = false\n", "[deploy]\nauto_rollback = no\n", 6)], ids=["up", "behind", "before", "left live"])
@pytest.mark.parametrize("during", ["switch", "migrate"])
def test_it_is_gone_after_a_failure_and_there_on_the_way_back(during: str, hooks: str, more: str, exit_code: int, app: App) -> None:
    settle(app, during, more=MIGRATE)
    app.deploy("1.0")
    seen(app)
    settle(app, during, hooks, more if "up" in more else MIGRATE)
    words = ["--set", "deploy.auto_rollback=no"] if "auto" in more else []
    done = app.run("deploy", app.artifact("1.1"), *words, check=exit_code).data
    if exit_code == 5:
        assert seen(app)[-2:] == ["migrate:down 1", "service:app 1"] and done["steps"][-1]["name"] == "maintenance:off"
    assert flag(app) is None


@pytest.mark.parametrize("hook", ["post_activate", "post_deploy"])
def test_it_is_gone_once_a_killed_run_was_recovered(hook: str, app: App) -> None:
    settle(app, "switch")
    app.deploy("1.0")
    settle(app, "switch", f"{hook} = {KILL}\n")
    assert app.run("deploy", app.artifact("1.1"), json=False).exit_code == -signal.SIGKILL
    found = flag(app)
    assert found and found["deploy_id"] and "by" not in found
    told = app.run("status", json=False, check=7)
    assert "maintenance" in told.stdout and found["deploy_id"] in told.stdout
    # Also where nobody configures it any more.
    configure(app)
    assert any("maintenance" in line for line in app.run("recover", check=0).data["recovered"])
    assert flag(app) is None and app.version == "1.1"


def test_what_was_killed_behind_its_verdict_leaves_it_to_the_next_run(app: App) -> None:
    settle(app, "switch")
    app.deploy("1.0")
    (app.root / "maintenance").write_text('{"deploy_id": "20260101T000000Z-000000", "since": "2026-01-01T00:00:00Z"}')
    status = app.run("status", check=7).data
    assert status["status"]["maintenance"]["deploy_id"] and "recover" in status["error"]["hint"]
    assert app.run("-n", "recover", check=0).data["changed"]
    app.run("recover", check=0)
    assert flag(app) is None and app.run("status", check=0)


# -- by hand -------------------------------------------------------------------

def test_on_and_off_say_whose_it_is_and_change_nothing_twice(app: App) -> None:
    deploy_all(app, "1.0")
    before = snapshot(app.root)
    dry = app.run("-n", "maintenance", "on", check=0).data
    assert dry["changed"] and snapshot(app.root) == before
    assert app.run("maintenance", "on", "-m", "new disks", check=0).data["changed"]
    found = flag(app)
    assert set(found) == {"by", "since", "note"} and found["note"] == "new disks" and found["by"]["user"]
    assert os.stat(str(app.root / "maintenance")).st_mode & 0o777 == 0o644
    told = app.run("status", json=False, check=0).stdout
    assert "new disks" in told and found["since"] in told
    assert not app.run("maintenance", "on", check=0).data["changed"] and flag(app) == found
    assert app.run("maintenance", "off", check=0).data["changed"] and flag(app) is None
    assert not app.run("maintenance", "off", "--detailed-exitcode", check=0).data["changed"]
    assert app.run("maintenance", "on", "--detailed-exitcode", check=10)


def test_a_persons_stays_whatever_a_run_does(app: App) -> None:
    settle(app, "switch")
    app.run("maintenance", "on", check=0)
    found = flag(app)
    app.deploy("1.0")
    app.run("recover", check=0)
    assert flag(app) == found
    # One that was made without this program is a person's as well.
    for version, text in ("1.1", ""), ("1.2", "{}"):
        (app.root / "maintenance").write_text(text)
        app.deploy(version)
        assert (app.root / "maintenance").read_text() == text
    assert app.run("maintenance", "off", check=0).data["changed"] and not (app.root / "maintenance").exists()


def test_on_during_a_run_makes_it_the_persons_and_off_needs_no_lock(app: App, tmp_path: Path) -> None:
    gate = Gate(tmp_path / "gate")
    settle(app, "switch", f"post_activate = {gate.command}\n")
    run = start_deploy("deploy", app.artifact("1.0"), config=app.config)
    gate.wait_for_visitor()
    assert "deploy_id" in (flag(app) or {})
    assert app.run("maintenance", "on", check=0).data["changed"]
    gate.open()
    assert run.wait(60) == 0 and "by" in (flag(app) or {})
    gate = Gate(tmp_path / "another")
    app.run("maintenance", "off", check=0)
    settle(app, "switch", f"post_activate = {gate.command}\n")
    run = start_deploy("deploy", app.artifact("1.1"), config=app.config)
    gate.wait_for_visitor()
    app.run("maintenance", "off", check=0)
    assert flag(app) is None
    gate.open()
    assert run.wait(60) == 0 and flag(app) is None


@pytest.mark.parametrize("name", ["current", "releases", "shared", ".deploy", "slots", "a/b", "..", "../x", ".current.1.tmp", "a b", "x" * 300])
def test_a_flag_that_is_no_name_or_one_of_deploy_pys_own_is_a_mistake(name: str, app: App) -> None:
    configure(app, f"[maintenance]\nflag = {name}\n")
    assert "[maintenance] flag" in app.run("maintenance", "on", check=2).data["error"]["message"]


def test_it_may_have_another_name(app: App) -> None:
    settle(app, "switch\nflag = .down-for_2.html")
    app.run("maintenance", "on", check=0)
    assert (app.root / ".down-for_2.html").exists()


# -- serve ---------------------------------------------------------------------

@contextmanager
def serving(app: App, *arguments: Any) -> Iterator[int]:
    """A server on a port; ended by SIGTERM, within a second and with 0."""
    port = free_port()
    process = start_deploy("maintenance", "serve", "--listen", f"127.0.0.1:{port}", *arguments, config=app.config)
    try:
        wait_until(lambda: process.poll() is not None or answers(port), what="it listens")
        yield port
        # A thread for each visitor would stay for good: up to Python 3.9, where libgcc_s is missing.
        assert len(os.listdir(f"/proc/{process.pid}/task")) == 1
        started = time.monotonic()
        process.terminate()
        assert process.wait(60) == 0 and time.monotonic() - started < 1
    finally:
        process.kill()
        process.wait()


def answers(port: int) -> bool:
    """Whether somebody listens."""
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def ask(port: int, text: str) -> str:
    """What a server says to some bytes, up to its end."""
    with socket.create_connection(("127.0.0.1", port), 20) as client:
        client.sendall(text.encode())
        return b"".join(iter(lambda: client.recv(65536), b"")).decode()


def test_everybody_gets_503_with_the_page_and_a_balancer_200(app: App, tmp_path: Path) -> None:
    configure(app, "[maintenance]\nretry_after = 77\n")
    (tmp_path / "page.html").write_text("<h1>zur\u00fcck um 5</h1>\n", encoding="utf-8")
    with serving(app, "--page", tmp_path / "page.html", "--health", "/up") as port:
        before = snapshot(app.root)
        for request in ("GET / HTTP/1.1", "PUT /up HTTP/1.1", "GET /healthz HTTP/1.0", "OPTIONS * HTTP/1.1", "GET /upper HTTP/1.1",
                        "\x16\x03 nonsense"):
            head, _, body = ask(port, f"{request}\r\nHost: x\r\n\r\n").partition("\r\n\r\n")
            assert head.startswith("HTTP/1.1 503 ") and "\r\nRetry-After: 77\r\n" in head and body.startswith("<h1>"), request
            assert f"Content-Length: {len(body.encode())}\r\n" in head and "text/html" in head
        assert ask(port, "GET /up?x=1 HTTP/1.1\r\n\r\n").startswith("HTTP/1.1 200 ")
        for head in ask(port, "HEAD / HTTP/1.1\r\n\r\n"), ask(port, "HEAD /up HTTP/1.1\r\n\r\n"):
            assert head.endswith("\r\n\r\n") and "Content-Length: " in head
        # What the client still sends does not cost it the answer.
        assert ask(port, "POST / HTTP/1.1\r\nContent-Length: 3000000\r\n\r\n" + "x" * 3000000).startswith("HTTP/1.1 503 ")
        assert snapshot(app.root) == before


@deep
def test_slow_clients_keep_nobody_waiting_and_are_cut_off(app: App, monkeypatch: Any) -> None:
    with serving(app) as port:
        slow = [socket.create_connection(("127.0.0.1", port), 30) for _ in range(60)]
        for client in slow[::2]:
            client.sendall(b"GET / HT")
        assert "Retry-After: 120" in ask(port, "GET / HTTP/1.1\n\n")
        # Dripping does not help.
        ends = time.monotonic() + 30
        with slow[0], pytest.raises(OSError):
            slow[0].settimeout(0.2)
            while time.monotonic() < ends:
                slow[0].sendall(b"x")
                try:
                    assert slow[0].recv(100) == b"", "cut off without an answer"
                    raise ConnectionResetError
                except socket.timeout:
                    pass
        for client in slow:
            client.close()


def test_serve_needs_neither_root_nor_lock_and_says_what_is_wrong(app: App, tmp_path: Path) -> None:
    gate = Gate(tmp_path / "gate")
    configure(app, f"[hooks]\npre_activate = {gate.command}\n")
    run = start_deploy("deploy", app.artifact("1.0"), config=app.config)
    gate.wait_for_visitor()
    with serving(app) as port:
        again = app.run("maintenance", "serve", "--listen", f"127.0.0.1:{port}", json=False, check=1)
        assert "EADDRINUSE" in again.stderr and str(port) in again.stderr
    gate.open()
    assert run.wait(60) == 0
    for words in ([], ["--listen", "nowhere"], ["--listen", "127.0.0.1:1,127.0.0.1:2"], ["--listen", "127.0.0.1:1", "--health", "up"], ["--listen", "127.0.0.1:1", "--page", "/no/such"]):
        assert app.run("maintenance", "serve", *words).exit_code in (1, 2), words
    app.run("maintenance", "up", check=2)


# -- real servers in front -------------------------------------------------------

def snippet(kind: str) -> str:
    """What the README shows for a server."""
    return next(found.text for found in SNIPPETS if kind_of(found) == kind and found.heading == "Maintenance")


@contextmanager
def in_front(port: int, *argv: Any) -> Iterator[None]:
    """A server that listens on a port."""
    with subprocess.Popen([str(word) for word in argv], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            wait_until(lambda: process.poll() is not None or answers(port), what="it listens")
            yield
        finally:
            process.kill()


def test_nginx_shows_the_page_as_long_as_the_flag_is_there(app: App, tmp_path: Path) -> None:
    app.deploy("1.0")
    port, conf = free_port(), tmp_path / "nginx.conf"
    (app.root / "shared" / "down.html").write_text("down")
    places = "".join(f"{name}_temp_path {tmp_path}/{name}; " for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
    conf.write_text(f"daemon off; master_process off; pid {tmp_path}/pid; error_log {tmp_path}/error;\nevents {{}}\n"
                    f"http {{ access_log off; {places}\nserver {{ listen 127.0.0.1:{port}; root {app.root}/current;\n"
                    + snippet("nginx").replace("/srv/shop", str(app.root)) + "\n} }\n")
    with in_front(port, needs("nginx"), "-c", conf, "-p", tmp_path):
        asked = "GET /VERSION HTTP/1.0\r\n\r\n"
        assert " 200 " in ask(port, asked)
        app.run("maintenance", "on", check=0)
        answer = ask(port, asked)
        assert " 503 " in answer and "Retry-After: 120" in answer and answer.endswith("down")
        app.run("maintenance", "off", check=0)
        assert " 200 " in ask(port, asked)


@deep
def test_haproxy_turns_to_serve_once_the_application_is_gone(app: App, server: Server, tmp_path: Path) -> None:
    app.deploy("1.0")
    server.restart()
    port, conf = free_port(), tmp_path / "haproxy.cfg"
    with serving(app, "--health", "/health") as other:
        backend = snippet("haproxy").replace("8080", str(server.port)).replace("8503", str(other)).replace("check", "check inter 50ms")
        conf.write_text(f"defaults\n mode http\n timeout connect 5s\n timeout client 5s\n timeout server 5s\n"
                        f"frontend web\n bind 127.0.0.1:{port}\n default_backend shop\n"
                        + backend.replace("httpcheck inter 50ms", "httpchk") + "\n")
        with in_front(port, needs("haproxy"), "-db", "-f", conf):
            asked = "GET / HTTP/1.0\r\n\r\n"
            wait_until(lambda: '"version": "1.0"' in ask(port, asked), what="the application answers")
            server.stop()
            wait_until(lambda: "Retry-After: 120" in ask(port, asked).title(), what="the page")
