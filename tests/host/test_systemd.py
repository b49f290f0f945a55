"""At home under systemd: credentials and notifications."""

import http.server
import os
import select
import signal
import socket
import threading
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Dict, Iterator, List

import pytest

from support import deep, start_deploy, wait_until

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="ownership is judged when root runs it")


# -- credentials ----------------------------------------------------------------

class Guarded:
    """An HTTP server that is well for whoever knows the password, and remembers what was sent."""

    def __init__(self) -> None:
        self.sent = []  # type: List[str]
        guarded = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                guarded.sent.append(self.headers.get("Authorization", ""))
                self.send_response(200 if guarded.sent[-1] == "Bearer from-systemd-8c1" else 401)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *details: Any) -> None:
                """Keep the tests' output clean."""
        self.http = http.server.HTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, args=(0.05,), daemon=True).start()

    def configuration(self, auth_file: Any) -> str:
        """A hook that tells its environment, and a probe that needs the password."""
        return ("[hooks]\npre_activate = env\n"
                f"[probe:web]\nurl = http://127.0.0.1:{self.http.server_address[1]}/\nsuccesses = 1\ndeadline = 60s\n"
                f"auth_file = {auth_file}\n")


@pytest.fixture
def guarded() -> Iterator[Guarded]:
    """The running server."""
    server = Guarded()
    yield server
    server.http.shutdown()
    server.http.server_close()


def handed_over(directory: Path, text: str = "Bearer from-systemd-8c1\n") -> Dict[str, str]:
    """What systemd makes of LoadCredential=web:...: a directory, and the variable that names it."""
    directory.mkdir()
    (directory / "web").write_text(text)
    (directory / "web").chmod(0o400)
    directory.chmod(0o500)
    return {"CREDENTIALS_DIRECTORY": str(directory)}


def test_a_credential_named_as_the_probe_goes_before_its_auth_file(app, guarded, tmp_path):
    (tmp_path / "auth").write_text("Bearer from-the-file")
    app.configure(guarded.configuration(tmp_path / "auth"))
    result = app.run("deploy", app.artifact("1.0"), "--set", "probe:web.header.X-Note=from-systemd-8c1",
                     env=handed_over(tmp_path / "credentials"), check=0)
    assert guarded.sent == ["Bearer from-systemd-8c1"]
    assert "from-systemd-8c1" not in result.stdout + result.stderr
    told = next(step["output"] for step in result.data["steps"] if step["name"] == "hook:pre_activate")
    assert any(line.startswith("DEPLOY_ID=") for line in told) and not any("CREDENTIALS" in line for line in told)


def test_the_file_itself_need_not_be_there(app, guarded, tmp_path):
    app.configure(guarded.configuration(tmp_path / "none"))
    assert "auth_file" in app.run("preflight", check=3).data["error"]["message"]
    app.run("deploy", app.artifact("1.0"), env=handed_over(tmp_path / "credentials"), check=0)


def test_the_file_is_read_where_no_credential_has_the_probes_name(app, guarded, tmp_path):
    (tmp_path / "auth").write_text("Bearer from-systemd-8c1")
    app.configure(guarded.configuration(tmp_path / "auth"))
    environ = handed_over(tmp_path / "credentials")
    (tmp_path / "credentials" / "web").rename(tmp_path / "credentials" / "other")
    app.run("deploy", app.artifact("1.0"), env=environ, check=0)


def test_a_credential_is_not_used_unasked(app, guarded, tmp_path):
    app.configure(guarded.configuration("") + "status = 401\n")
    app.run("deploy", app.artifact("1.0"), env=handed_over(tmp_path / "credentials"), check=0)
    assert guarded.sent == [""]


@as_root
def test_a_credential_that_others_may_write_is_refused(app, guarded, tmp_path):
    app.configure(guarded.configuration(tmp_path / "none"))
    environ = handed_over(tmp_path / "credentials")
    (tmp_path / "credentials").chmod(0o777)
    refused = app.run("deploy", app.artifact("1.0"), env=environ, check=3)
    assert f"{tmp_path}/credentials is writable by group or others" in refused.data["error"]["message"]


# -- notifications ---------------------------------------------------------------

class Listener:
    """A datagram socket in place of systemd's."""

    def __init__(self, address: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind("\0" + address[1:] if address.startswith("@") else address)
        self.socket.setblocking(False)
        self.env = {"NOTIFY_SOCKET": address}
        self.found = []  # type: List[Dict[str, str]]

    def read(self) -> None:
        """Take what is in the queue."""
        with suppress(BlockingIOError):
            while True:
                data = self.socket.recv(65536)
                self.found.append(dict(line.split("=", 1) for line in data.decode("utf-8").split("\n") if line))

    def told(self) -> List[Dict[str, str]]:
        """Every datagram since the last call, as {variable: value}."""
        self.read()
        found, self.found = self.found, []
        return found

    @contextmanager
    def read_along(self) -> Iterator[None]:
        """Keep the queue short, as systemd does: it may hold no more than ten (net.unix.max_dgram_qlen)."""
        ended = threading.Event()

        def follow() -> None:
            while not ended.is_set():
                select.select([self.socket], [], [], 0.1)
                self.read()

        reader = threading.Thread(target=follow)
        reader.start()
        yield
        ended.set()
        reader.join()


@pytest.fixture(params=["path", "abstract"])
def listener(request, tmp_path) -> Iterator[Listener]:
    """The listening socket, by either kind of address."""
    made = Listener(str(tmp_path / "notify") if request.param == "path" else f"@deploy-test-{os.getpid()}-{tmp_path.name}")
    yield made
    made.socket.close()


def test_each_step_is_told_with_twice_the_time_it_may_take(app, server, listener):
    app.configure(f"[hooks]\ntimeout = 7s\npre_activate = env\n  true\n"
                  f"[service:web]\ncommand = {server.restart_command.path}\ntimeout = 20s\nsettle = 0s\n"
                  f"[probe:web]\nurl = {server.url}\ninitial_delay = 100ms\ndeadline = 30s\nsoak = 1s\nperiod = 10ms\n")
    with listener.read_along():
        result = app.run("deploy", app.artifact("1.0"), env=listener.env, check=0)
    told = listener.told()
    seconds = {words["STATUS"]: int(words["EXTEND_TIMEOUT_USEC"]) / 1e6 for words in told}
    assert seconds["run hook pre_activate: env; true"] == 28
    assert next(seconds[status] for status in seconds if status.startswith("run ") and "restart" in status) == 40
    assert seconds["probe web"] == pytest.approx(62.2)
    assert any(status.startswith("verify and unpack myapp-1.0.tar.gz") for status in seconds)
    assert [words.get("READY") for words in told] == [None] * (len(told) - 1) + ["1"]
    assert told[-1]["STATUS"] == result.data["msg"]
    output = next(step["output"] for step in result.data["steps"] if step["name"] == "hook:pre_activate")
    assert not any("NOTIFY_SOCKET" in line for line in output)


@deep
def test_a_long_probe_tells_its_tries_and_a_failure_is_never_ready(app, listener):
    app.configure("[probe:web]\ntcp = 127.0.0.1:1\nperiod = 300ms\nbackoff = 1\ndeadline = 2s\n")
    with listener.read_along():
        app.run("deploy", app.artifact("1.0"), env=listener.env, check=5)
    told = listener.told()
    assert any(words["STATUS"].startswith("probe:web try ") and "refused" in words["STATUS"] for words in told)
    assert not any("READY" in words for words in told)


def test_a_stop_is_confirmed_and_the_way_back_asks_for_its_time(app, listener):
    app.configure("[probe:web]\ntcp = 127.0.0.1:1\ndeadline = 50s\n[hooks]\ntimeout = 9s\npost_rollback = true\n")
    told = []  # type: List[Dict[str, str]]
    run = start_deploy("deploy", app.artifact("1.0"), config=app.config, env=listener.env)
    wait_until(lambda: told.extend(listener.told()) or any(words["STATUS"] == "probe web" for words in told))
    run.send_signal(signal.SIGTERM)
    assert run.wait(60) == 5
    told += listener.told()
    assert [words["STATUS"] for words in told if words.get("STOPPING") == "1"] == ["interrupted by SIGTERM"]
    assert app.current is None


@pytest.mark.parametrize("address", ["", "/nonexistent/notify", "@nobody-listens", "vsock:2:1234", "/" + "long" * 50, "relative"])
def test_nobody_who_listens_changes_nothing(app, address):
    app.run("deploy", app.artifact("1.0"), env={"NOTIFY_SOCKET": address}, check=0)


def test_a_listener_that_never_reads_holds_nothing_up(app, listener):
    app.configure("[hooks]\npre_activate = " + "\n  ".join(["true"] * 3) + "\n")
    filler = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    filler.setblocking(False)
    filler.connect("\0" + listener.env["NOTIFY_SOCKET"][1:] if "@" in listener.env["NOTIFY_SOCKET"] else listener.env["NOTIFY_SOCKET"])
    with pytest.raises(BlockingIOError):
        while True:
            filler.send(b"STATUS=full")
    app.run("deploy", app.artifact("1.0"), env=listener.env, check=0)
    filler.close()


def test_a_status_is_one_short_line_however_long_and_hostile_the_words(app, listener):
    app.configure("[hooks]\npre_activate = true " + "ä" * 5000 + "\n")
    app.run("deploy", app.artifact("1.0"), env=listener.env, check=0)
    assert max(len(words["STATUS"]) for words in listener.told()) == 256


# -- what a unit is told of -----------------------------------------------------------

def test_two_files_cannot_be_one_credential(app):
    section = "[{}:web]\nurl = http://127.0.0.1/\n{} = /etc/deploy/{}\n"
    app.configure(section.format("probe", "auth_file", "a") + section.format("notify", "token_file", "b"))
    error = app.run("prune", check=2).data["error"]
    assert "would be the same credential, web" in error["message"] and "[notify:web]" in error["message"]
    app.configure(section.format("probe", "auth_file", "a") + section.format("notify", "token_file", "b").replace("web", "chat"))
    assert "the same credential" not in str(app.run("-n", "prune").data["error"])
