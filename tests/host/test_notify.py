"""Notifications: each kind against a real receiver on loopback; whatever a receiver does, the run ends as it would have."""

import contextlib
import fcntl
import gzip
import http.server
import json
import os
import re
import shutil
import signal
import socket
import socketserver
import ssl
import subprocess
import sys
import threading
import time
from email import message_from_bytes
from pathlib import Path
from typing import Any, Dict, Iterator, List

import pytest

import origins
from archives import entry, tar
from scenes import Gate
from support import App, deep, described, fake_command, file, free_port, load_deploy, missing, sha256_of, snapshot, start_deploy
from tables import blocks, section
from test_metrics import run_defect

deploy = load_deploy()
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="ownership is judged when root runs it")
CANARY = "canary-of-a-token-77c1"


# -- receivers -----------------------------------------------------------------

class Receiver:
    """An HTTP server that remembers every POST: its path, headers and decoded JSON."""

    def __init__(self, status: int = 200, answer: bytes = b"ok", tls: Any = None) -> None:
        self.posts = []  # type: List[Dict[str, Any]]
        receiver = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])).decode("ascii"))
                receiver.posts.append({"path": self.path, "headers": dict(self.headers.items()), "body": body})
                self.send_response(status)
                self.send_header("Location", "/elsewhere")
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *details: Any) -> None:
                """Keep the tests' output clean."""
        self.http = http.server.HTTPServer(("127.0.0.1", 0), Handler)
        if tls is not None:
            self.http.socket = tls.wrap_socket(self.http.socket, server_side=True, do_handshake_on_connect=False)
        self.url = f"http{'s' if tls else ''}://127.0.0.1:{self.http.server_address[1]}"
        threading.Thread(target=self.http.serve_forever, args=(0.05,), daemon=True).start()

    @property
    def events(self) -> List[str]:
        """The events so far."""
        return [post["body"]["event"] for post in self.posts]

    def stop(self) -> None:
        """Stop listening."""
        self.http.shutdown()
        self.http.server_close()


class MailServer(socketserver.ThreadingTCPServer):
    """A mail server (RFC 5321) that remembers every mail; addresses at refused.example are refused."""

    daemon_threads, allow_reuse_address = True, True

    def __init__(self, greeting: bytes = b"220 here") -> None:
        self.mails = []  # type: List[Dict[str, Any]]
        self.greeting, self.hangs_at_the_end = greeting, False
        super().__init__(("127.0.0.1", 0), MailHandler)
        self.address = f"127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()


class MailHandler(socketserver.StreamRequestHandler):
    """One conversation."""

    def handle(self) -> None:
        server, mail = self.server, {"to": []}  # type: Any, Dict[str, Any]
        self.wfile.write(server.greeting + b"\r\n")
        for line in self.rfile:
            verb, answer = line[:4].upper(), b"250 well"
            if verb == b"QUIT" and server.hangs_at_the_end:
                self.rfile.read()
            if verb == b"MAIL":
                mail["from"] = line
            elif verb == b"RCPT":
                refused = b"refused.example" in line
                mail["to"] += [] if refused else [line]
                answer = b"550 not here" if refused else answer
            elif verb == b"DATA":
                self.wfile.write(b"354 go on\r\n")
                lines = iter(self.rfile.readline, b".\r\n")
                mail["message"] = b"".join(line[line.startswith(b"."):] for line in lines)
                server.mails.append(mail)
            self.wfile.write(answer + b"\r\n")


@pytest.fixture
def receive() -> Iterator[Any]:
    """Start receivers; they are stopped at the end."""
    started = []  # type: List[Receiver]

    def start(*args: Any, **options: Any) -> Receiver:
        started.append(Receiver(*args, **options))
        return started[-1]
    yield start
    for receiver in started:
        receiver.stop()


@pytest.fixture
def mail_server() -> Iterator[MailServer]:
    """A running mail server."""
    server = MailServer()
    yield server
    server.shutdown()
    server.server_close()


@contextlib.contextmanager
def silent_port(answer: bytes = b"") -> Iterator[Any]:
    """A port that accepts and then drips `answer` without end, or says nothing; yields (port, met)."""
    listener, met, done = socket.socket(), threading.Event(), threading.Event()
    listener.bind(("127.0.0.1", 0))
    listener.listen(5)

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection = listener.accept()[0]
                met.set()
                threading.Thread(target=drip, args=(connection,), daemon=True).start()

    def drip(connection: socket.socket) -> None:
        with contextlib.suppress(OSError), connection:
            while not done.wait(0.2):
                connection.sendall(answer)

    threading.Thread(target=serve, daemon=True).start()
    yield listener.getsockname()[1], met
    done.set()
    with contextlib.suppress(OSError):
        listener.shutdown(socket.SHUT_RDWR)
    listener.close()


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: Any) -> Path:
    """A certificate for 127.0.0.1 with its key, signed by itself."""
    if not shutil.which("openssl"):
        missing("openssl")
    path = tmp_path_factory.mktemp("tls") / "server.pem"
    config = path.with_name("config")
    config.write_text("[req]\ndistinguished_name=dn\nx509_extensions=ext\nprompt=no\n[dn]\nCN=here\n"
                      "[ext]\nsubjectAltName=IP:127.0.0.1\nbasicConstraints=critical,CA:TRUE\n")
    subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-config", str(config),
                    "-keyout", str(path.with_name("key")), "-out", str(path)], check=True, stderr=subprocess.DEVNULL)
    return path


def tls(certificate: Path) -> Any:
    """What a TLS server needs."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS if sys.version_info < (3, 10) else ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(str(certificate), str(certificate.with_name("key")))
    return context


def configure(app: App, *notifiers: str, before: str = "") -> None:
    """Write deploy.ini; each notifier is the text of a section, the first named n0, the next n1, ..."""
    sections = "".join(f"[notify:n{number}]\n{text}\n" for number, text in enumerate(notifiers))
    app.configure(f"durable = no\n{before}\n{sections}")


def private(path: Path, text: str) -> Path:
    """A key file."""
    path.write_text(text + "\n")
    path.chmod(0o600)
    return path


# -- each kind -----------------------------------------------------------------

def test_a_webhook_gets_the_event_the_text_and_the_whole_result(app, receive, tmp_path):
    receiver = receive()
    token = private(tmp_path / "token", CANARY)
    configure(app, f"url = {receiver.url}/hook?site=a b\n".replace(" b", "%20b") + f"token_file={token}\nheader.X-Team = shop\n"
              "text = ${application} ${version} after ${previous_version}: ${exit_code} ${deploy_id} ${DEPLOY_ROOT} $${kept}",
              before=f"[metrics]\ntextfile_dir = {tmp_path}/none")
    app.deploy("1.0")
    result = app.deploy("1.1")
    post = receiver.posts[1]
    assert post["path"] == "/hook?site=a%20b" and post["headers"]["Authorization"] == f"Bearer {CANARY}"
    assert post["headers"]["X-Team"] == "shop" and post["headers"]["Content-Type"] == "application/json"
    assert post["body"]["event"] == "deployed"
    assert post["body"]["text"] == f"myapp 1.1 after 1.0: 0 {result.data['deploy_id']} {app.root} ${{kept}}"
    seconds = ("seconds",)
    assert {key: value for key, value in post["body"]["result"].items() if key not in seconds} == \
        {key: value for key, value in result.data.items() if key not in seconds}
    assert result.data["summary"]["warnings"] == len(result.data["warnings"]) == 1 and CANARY not in result.stdout + result.stderr


def test_slack_gets_a_text_in_which_a_value_calls_nobody(app, receive, tmp_path):
    receiver = receive()
    url = private(tmp_path / "url", f"{receiver.url}/services/T0/B0/{CANARY}")
    hook = fake_command(tmp_path, "hook", "print('<!channel> & co'); sys.exit(1)")
    configure(app, f"type = slack\nurl_file={url}\ntext = <https://wiki|how> ${{message}}", before=f"[hooks]\npre_stage = {hook.path}")
    failed = app.deploy("1.0", check=1)
    assert receiver.posts[0]["path"] == f"/services/T0/B0/{CANARY}" and set(receiver.posts[0]["body"]) == {"text"}
    text = receiver.posts[0]["body"]["text"]
    assert text.startswith("<https://wiki|how> hook pre_stage failed") and "&lt;!channel&gt; &amp; co" in text
    assert failed.data["warnings"] == []
    configure(app, f"type = slack\nurl_file={url}")
    app.run("deploy", app.artifact("1.1"), "-m", "<!here> for the sale", check=0)
    assert receiver.posts[-1]["body"]["text"].endswith("; &lt;!here&gt; for the sale")


def test_mail_is_handed_to_the_mail_server(app, mail_server):
    configure(app, f"type = email\nsmtp={mail_server.address}\nto =\n ops@example.org\n root\nfrom=deploy@example.org\n"
              "text = ${application} is at ${version}, naïve\n .\n and more")
    app.deploy("1.0")
    mail = mail_server.mails[0]
    assert b"<deploy@example.org>" in mail["from"] and [line.split(b":")[1].strip() for line in mail["to"]] == [b"<ops@example.org>", b"<root>"]
    message = message_from_bytes(mail["message"])
    assert message["Subject"] == f"myapp on {os.uname().nodename}: deployed" and message["To"] == "ops@example.org, root"
    assert message["Date"] and message["Message-ID"] and message["Auto-Submitted"] == "auto-generated"
    text = message.get_payload(decode=True).decode("utf-8")
    assert text.split() == ["myapp", "is", "at", "1.0,", "naïve", ".", "and", "more"]


def test_a_mail_server_that_refuses_is_a_warning(app, mail_server):
    address = f"type = email\nsmtp={mail_server.address}\nto = nobody@refused.example"
    configure(app, address, address + "\n ops@example.org")
    warnings = app.deploy("1.0").data["warnings"]
    assert len(warnings) == 2 and all("not told of deployed" in text and "nobody@refused.example" in text for text in warnings)
    assert len(mail_server.mails) == 1, "the other one gets it"
    mail_server.greeting = b"554 go away"
    assert "554" in app.deploy("1.1").data["warnings"][0]


def test_a_mail_that_was_taken_is_told_however_the_server_says_farewell(app, mail_server):
    mail_server.hangs_at_the_end = True
    configure(app, f"type = email\nsmtp={mail_server.address}\nto = ops")
    assert app.deploy("1.0").data["warnings"] == [] and len(mail_server.mails) == 1


@as_root
def test_a_program_that_the_run_gave_away_is_not_run_by_root(app, tmp_path):
    page = fake_command(tmp_path, "page")
    configure(app, "type = command\ncommand = bin/page", before="[hooks]\npost_deploy = chown 65534 bin/page")
    files = {"bin/page": file(page.path.read_text(), 0o755)}
    warning, = app.deploy("1.0", files).data["warnings"]
    assert "bin/page belongs to uid 65534" in warning and page.details() == []


def test_a_command_runs_under_the_rules_for_hooks(app, tmp_path):
    page = fake_command(tmp_path, "page")
    configure(app, f"type = command\ncommand = {page.path} 'two words'\n", before="[env]\nTEAM = shop")
    app.deploy("1.0")
    call = page.details()[0]
    assert call["argv"] == ["two words"] and call["cwd"] == f"{app.root}/releases/{app.current}"
    environ = call["env"]
    assert environ["DEPLOY_EVENT"] == "deployed" and environ["DEPLOY_HOOK"] == "notify:n0" and environ["TEAM"] == "shop"
    assert environ["DEPLOY_TEXT"] == f"myapp on {os.uname().nodename}: deployed: {app.current} is live"
    assert environ["DEPLOY_RELEASE"] == app.current and "PYTHONPATH" not in environ


def test_a_proxy_counts_where_it_is_chosen(app, receive, certificate):
    plain, secure = receive(), receive(tls=tls(certificate))
    ways = [(origins.tunnel(peer.http.server_address[1]), peer, kind) for peer, kind in ((plain, "http"), (secure, "https"))]
    for choice, more, through in (("environment", {}, True), ("environment", {"no_proxy": "127.0.0.1"}, False), ("none", {}, False)):
        configure(app, *(f"proxy={choice}\nurl = {peer.url}/a\ntls_ca = {certificate}" for _, peer, _ in ways))
        env = {f"{kind}_proxy": proxy.url.replace("http://", "me:secret@") for proxy, _, kind in ways}
        before = [len(proxy.requests) for proxy, _, _ in ways]
        told = [len(peer.posts) for _, peer, _ in ways]
        data = app.run("deploy", app.artifact(f"1.{len(app.history())}"), env={**env, **more}, check=0).data
        assert not data["warnings"] and "secret" not in json.dumps(data)
        assert [len(proxy.requests) - count for (proxy, _, _), count in zip(ways, before)] == [int(through)] * 2
        assert [len(peer.posts) - count for (_, peer, _), count in zip(ways, told)] == [1, 1]
    assert ways[0][0].requests[0].startswith(f"POST {plain.url}/a HTTP/1.1") and ways[1][0].requests[0].startswith("CONNECT ")


def test_a_proxy_that_speaks_no_http_is_told_without_its_password(app):
    configure(app, "url = http://127.0.0.1:9/\nproxy = environment")
    data = app.run("deploy", app.artifact("1.0"), env={"http_proxy": "socks5://me:canary-9@127.0.0.1:9"}, check=0).data
    assert "the proxy is none that is spoken to in HTTP" in data["warnings"][0] and "canary-9" not in json.dumps(data)


def test_a_certificate_is_verified(app, receive, certificate):
    good = receive(tls=tls(certificate))
    elsewhere = good.url.replace("127.0.0.1", "localhost")
    configure(app, f"url = {good.url}/a\ntls_ca = {certificate}", f"url = {good.url}/b", f"url = {elsewhere}/c\ntls_ca = {certificate}")
    warnings = app.deploy("1.0").data["warnings"]
    assert [post["path"] for post in good.posts] == ["/a"]
    assert len(warnings) == 2 and all(re.search("certificate verify failed|doesn't match", text) for text in warnings), warnings


# -- what is told ----------------------------------------------------------------

def test_every_end_is_its_event_and_what_changed_nothing_is_none(app, receive, tmp_path):
    receiver = receive()
    section = f"url = {receiver.url}\ntext = ${{event}} ${{version}} ${{previous_version}} ${{exit_code}}"

    def told(*arguments: Any, check: int, before: str = "", extra: str = section) -> List[str]:
        configure(app, extra, before=before)
        seen = len(receiver.posts)
        app.run(*arguments, check=check)
        return [post["body"]["text"] for post in receiver.posts[seen:]]

    one, two = app.artifact("1.0"), app.artifact("2.0")
    bad = {"before": "[hooks]\npost_activate = false"}
    assert told("deploy", one, check=0) == ["deployed 1.0  0"]
    assert told("deploy", one, check=0) == told("-n", "deploy", two, check=0) == told("pin", "1.0", check=0) == []
    assert told("deploy", "/nonexistent", check=4) == ["refused  1.0 4"]
    assert told("deploy", two, check=1, before="[hooks]\npre_activate = false") == ["failed 2.0 1.0 1"]
    assert told("deploy", two, check=3, before="[preflight]\nuser = nobody-else") == ["refused 2.0 1.0 3"]
    assert told("stage", two, check=0) == told("status", check=0) == told("activate", "9.9", check=2) == []
    assert told("activate", "2.0", check=0) == ["activated 2.0 1.0 0"]
    assert told("rollback", check=0) == ["rolled_back 1.0 2.0 0"]
    assert told("activate", "2.0", check=5, **bad) == ["rolled_back 2.0 1.0 5"]
    assert told("activate", "2.0", check=6, before="auto_rollback = no\n" + bad["before"]) == ["left_live 2.0 1.0 6"]
    only = section + "\nevents=recovered, rollback_failed"
    assert told("rollback", check=0, extra=only) == []
    rare = section + "\nevents = staged, pruned"
    assert told("stage", app.artifact("3.0"), check=0, extra=rare) == ["staged 3.0 1.0 0"]
    with open(str(app.root / ".deploy" / "lock")) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert told("deploy", two, "--force", check=75) == []


def test_a_refusal_is_told_and_written_once_until_another_release_goes_live(app, receive):
    """A timer meets a known-bad artifact at every tick: 240 messages a day helped nobody."""
    receiver, one, two = receive(), app.artifact("1.0"), app.artifact("2.0")
    section = f"url = {receiver.url}"
    configure(app, section)
    app.run("deploy", one, check=0)
    configure(app, section, before="[hooks]\npost_activate = false")
    app.run("deploy", two, check=5)
    configure(app, section)
    for _ in range(3):
        assert "marked bad" in app.run("deploy", two, check=4).data["error"]["message"]
    app.run("pin", "1.0", check=0)
    # Nor does cron, which mails what is printed; the log has it.
    quiet = app.run("-q", "--log-file", app.directory / "log", "deploy", two, check=4, json=False)
    assert (quiet.stdout, quiet.stderr) == ("", "") and "marked bad" in (app.directory / "log").read_text()
    assert "marked bad" in app.run("deploy", two, check=4, json=False).stderr
    assert receiver.events == ["deployed", "rolled_back", "refused"]
    history = [(entry["result"], entry["automatic"], entry["exit_code"]) for entry in app.history()]
    assert history == [("deployed", None, 0), ("rolled_back", True, 5), ("refused", None, 4), ("pinned", None, 0)]
    refused = app.history()[2]
    assert refused["artifact_sha256"] == app.history()[1]["artifact_sha256"] and "marked bad" in refused["message"]
    configure(app, section, before="min_free = 999T")
    for _ in range(2):  # what is free meanwhile is another number
        app.run("deploy", app.artifact("3.0"), check=3)
        (app.root / "filler").write_bytes(os.urandom(3 << 20))
    for _ in range(2):
        app.run("deploy", app.artifact("4.0"), check=3)
    assert receiver.events[3:] == ["refused", "refused"], "once for each artifact"
    configure(app, section)
    app.deploy("5.0")
    for _ in range(2):
        app.run("deploy", two, check=4)
    assert receiver.events[5:] == ["deployed", "refused"]


def test_a_person_is_called_when_it_fails_and_not_at_every_tick_after_that(app, receive):
    """After two recoveries that failed nothing is tried any more: the next run says so, and calls nobody again."""
    receiver = receive()
    down = app.directory / "down"
    configure(app, f"url = {receiver.url}", before=f"[service:web]\ncommand = test ! -e {down}")
    app.run("deploy", app.artifact("1.0"), check=0)
    down.write_text("")
    artifact = app.artifact("2.0")
    for _ in range(5):
        quiet = app.run("-q", "deploy", artifact, check=6, json=False)
        assert "recover --to" in quiet.stderr
    assert receiver.events == ["deployed"] + ["rollback_failed"] * 3
    down.unlink()
    app.run("recover", "--to", "1.0", check=0)
    down.write_text("")
    app.run("deploy", app.artifact("3.0"), check=6)
    assert receiver.events[4:] == ["recovered", "rollback_failed"]


def test_a_refusal_without_a_digest_is_told_once_a_day(app, receive):
    receiver = receive()
    configure(app, f"url = {receiver.url}")
    app.deploy("1.0")
    for name in ("a", "a", "b"):
        app.run("deploy", f"/nonexistent/{name}.tar.gz", "-m", "by the timer", check=4)
    assert receiver.events == ["deployed", "refused", "refused"]
    assert [entry["note"] for entry in app.history()] == [None, "by the timer", "by the timer"]


def test_a_refusal_before_there_is_a_root_is_told_to_nobody_as_nothing_would_remember_it(app, receive):
    receiver = receive()
    told = f"[notify:x]\nurl = {receiver.url}\n"
    app.root.rmdir()
    app.configure(f"{told}[preflight]\nuser = nobody-else\n")
    for _ in range(2):
        app.run("deploy", app.artifact("1.0"), check=3)
    app.configure(told)
    app.run("deploy", "/nonexistent", check=4)
    assert receiver.events == [] and not app.root.exists()
    app.run("deploy", app.artifact("1.0"), check=0)
    app.run("deploy", "/nonexistent", check=4)
    assert receiver.events == ["deployed", "refused"]


def test_an_archive_that_is_refused_while_it_is_unpacked_is_told_once(app, receive):
    receiver = receive()
    configure(app, f"url = {receiver.url}")
    artifact = app.directory / "artifacts" / "myapp-1.0.tar.gz"
    artifact.parent.mkdir(exist_ok=True)
    artifact.write_bytes(gzip.compress(tar(entry(b"a", b"1"), entry(b"../evil", b"2"))))
    for _ in range(3):
        refused = app.run("deploy", artifact, "--sha256", sha256_of(artifact), check=4)
    assert [step["name"] for step in refused.data["steps"]] == ["unpack"]
    assert receiver.events == ["refused"] and [entry["result"] for entry in app.history()] == ["refused"]


def test_a_recovery_is_told_beside_what_the_run_itself_did(app, receive, tmp_path):
    receiver, gates = receive(), [Gate(tmp_path / version) for version in ("2.0", "2.5")]
    app.deploy("1.0")
    section = f"url = {receiver.url}\ntext = ${{event}} ${{version}}: ${{message}}"
    for gate, arguments in zip(gates, (["recover"], ["deploy", app.artifact("3.0")])):
        configure(app, before=f"[hooks]\npre_activate = {gate.command}")
        process = start_deploy("deploy", app.artifact(gate.path.parent.name), config=app.config)
        gate.wait_for_visitor()
        process.kill()
        process.wait()
        configure(app, section)
        app.run(*arguments, check=0)
        gate.open()
    texts = sorted(post["body"]["text"] for post in receiver.posts)  # two of one run come in any order
    assert [text.partition(":")[0] for text in texts] == ["deployed 3.0", "recovered 1.0", "recovered 3.0"]
    assert all("deploy of" in text and "was not finished" in text for text in texts[1:])


def test_what_a_person_settled_by_hand_is_told_as_a_recovery(app, receive):
    receiver = receive()
    configure(app, f"url = {receiver.url}\ntext = ${{event}} ${{version}}: ${{message}}")
    app.deploy("1.0")
    (app.root / "current").unlink()
    msg = app.run("recover", "--to", "1.0", check=0).data["msg"]
    assert [post["body"]["text"] for post in receiver.posts[1:]] == [f"recovered 1.0: {msg}"]


def test_the_lock_is_free_when_it_is_told(app, tmp_path):
    script = f"import fcntl\nfcntl.flock(open({str(app.root / '.deploy' / 'lock')!r}), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    configure(app, f"type = command\ncommand = {fake_command(tmp_path, 'page', script).path}")
    assert app.deploy("1.0").data["warnings"] == []


def test_an_interrupted_run_is_told(app, receive, tmp_path):
    receiver, gate = receive(), Gate(tmp_path / "gates")
    configure(app, f"url = {receiver.url}", before=f"[hooks]\npre_activate = {gate.command}")
    process = start_deploy("deploy", app.artifact("1.0"), config=app.config)
    try:
        gate.wait_for_visitor()
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 143
    finally:
        gate.open()
    assert receiver.events == ["failed"] and "interrupted by SIGTERM" in receiver.posts[0]["body"]["text"]


def test_a_defect_is_told(app, receive):
    receiver = receive()
    configure(app, f"url = {receiver.url}")
    assert run_defect(app).returncode == 70
    assert receiver.events == ["failed"] and "internal error: KeyError" in receiver.posts[0]["body"]["text"]


def test_a_signal_while_it_is_told_changes_nothing(app):
    with silent_port() as (port, met):
        configure(app, f"url = http://127.0.0.1:{port}/")
        process = start_deploy("deploy", app.artifact("1.0"), config=app.config)
        assert met.wait(60)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    assert app.version == "1.0"


# -- whatever a receiver does ------------------------------------------------------

@deep
def test_receivers_that_fail_are_warnings_and_cost_three_seconds_together(app, receive, tmp_path):
    stubborn = fake_command(tmp_path, "stubborn", (
        "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\ntime.sleep(600)"))
    with silent_port() as (silent, _), silent_port(b"H") as (dripping, _), silent_port(b"220-x\r\n") as (chatty, _):
        ways = [
            (f"url = http://127.0.0.1:{silent}/", "no answer within 3.00s, it was still waiting for the head of the answer"),
            (f"url = http://127.0.0.1:{dripping}/", "no answer within 3.00s"),
            (f"url = https://127.0.0.1:{silent}/", "no answer within 3.00s, it was still in the TLS handshake"),
            (f"type = email\nto = ops\nsmtp=127.0.0.1:{silent}", "no answer within 3.00s, it was still talking to the mail server"),
            (f"type = email\nto = ops\nsmtp=127.0.0.1:{chatty}", "no answer within 3.00s"),
            (f"type = command\ncommand = {stubborn.path}", "timed out after "),
            (f"url = http://127.0.0.1:{free_port()}/", "Connection refused"),
            ("url = http://nothing.invalid/", "not told of deployed: connecting to nothing.invalid:80: |no answer within 3.00s"),
            (f"url = {receive(500, b'the database is on fire').url}/", "status 500: the database is on fire"),
            (f"url = {receive(302).url}/", "status 302"),
            ("type = command\ncommand = /nonexistent/program", "cannot start /nonexistent/program: No such file"),
            ("type = command\ncommand = sh -c 'echo no pager here; exit 4'", "exited with code 4: no pager here"),
            (f"url = {receive().url}/\ntoken_file={tmp_path}/none", "reading token_file: No such file or directory"),
            (f"type = slack\nurl_file={private(tmp_path / 'url', 'nonsense')}", "url_file|url holds no https"),
            (f"url = {receive().url}/\ntoken_file={private(tmp_path / 'empty', '')}", "token_file is empty"),
        ]
        good = receive()
        configure(app, *[section for section, _ in ways], f"url = {good.url}")
        started = time.monotonic()
        result = app.deploy("1.0")
        assert time.monotonic() - started < 14, "five that wait for three seconds each would take longer one after the other"
    assert good.events == ["deployed"] and result.data["ok"]
    found = {int(re.search(r"notify n(\d+)", text).group(1)): text for text in result.data["warnings"] if text.startswith("notify ")}
    assert sorted(found) == list(range(len(ways)))
    for number, (_, expected) in enumerate(ways):
        assert re.search(expected, found[number]), found[number]
    with pytest.raises(OSError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


# -- what is wrong in the configuration ----------------------------------------------

@pytest.mark.parametrize("key", ["ab\ncd", "canary-\udcff\udcfe\x01\nof-random-bytes"])
def test_a_key_that_cannot_be_sent_is_not_shown_instead(app, receive, tmp_path, key):
    """http.client puts the value into its error, spelled in a way that no mask knows."""
    token = private(tmp_path / "token", "")
    token.write_bytes(os.fsencode(key))
    receiver = receive()
    configure(app, f"url = {receiver.url}/\ntoken_file={token}")
    result = app.deploy("1.0")
    told = "sending the request: ValueError: the value of header.Authorization holds a line break or a control character"
    assert result.data["warnings"][-1] == f"notify n0: not told of deployed: {told}" and receiver.posts == []
    token.write_bytes(b"Basic " + os.fsencode(key))
    configure(app, before=f"[probe:p]\nurl = {receiver.url}/\nauth_file={token}")
    probed = app.run("probe", check=7)
    assert told in probed.data["probes"][0]["detail"]
    for text in (result.stdout, result.stderr, probed.stdout, probed.stderr):
        assert not re.search(r"ab\W+n?cd|canary|random", text)


@pytest.mark.parametrize("section, message", [
    ("type = pigeon", "type = 'pigeon': expected webhook, slack, teams, discord, email, command"),
    ("url = http://x/\nevents=deployed, gone", "events = 'deployed, gone': expected some of deployed, synced, activated, rolled_back, failed, "
     "left_live, rollback_failed, refused, recovered, staged, pruned"),
    ("url = http://x/\nevents =", "expected some of deployed"),
    ("events = failed", "type = webhook needs url"),
    ("type = slack", "type = slack needs url or url_file"),
    ("type = slack\nurl = http://x/\nurl_file=y", "type = slack needs url or url_file"),
    ("type = email", "type = email needs to"),
    ("type = command", "type = command needs command"),
    ("url = http://x/\nto = a@b", "to means nothing to type = webhook"),
    ("type = slack\nurl = http://x/\ntoken_file=y\nheader.A = b", "token_file and header mean nothing to type = slack"),
    ("url = ftp://x/", "url: expected http://HOST/... or https://HOST/..."),
    ("url = http://user:geheim77@x/", "url: expected no user and password in it"),
    ("type = email\nto = a@b\nsmtp=mail", "smtp: expected host:port"),
    ("url = http://x/\ntext = ${verson}", "text: no value for ${verson}"),
    ("url = http://x/\ntext = ${PATH}", "text: no value for ${PATH}"),
])
def test_what_is_wrong_is_told_before_anything_happens(app, section, message):
    configure(app, section)
    before = snapshot(app.root)
    error = app.run("deploy", app.artifact("1.0"), check=2).data["error"]
    assert f"{app.config}: [notify:n0]" in error["message"] and message in error["message"], described(error)
    assert snapshot(app.root) == before


def test_the_configuration_of_the_page_is_a_proper_one(app):
    page = section("Monitoring")
    [block] = [block for block in blocks() if block.startswith("[notify:")]
    # What the page tells of in a sentence.
    inline = "[notify:t]\ntype = teams\nurl_file = u\n[notify:d]\ntype = discord\nurl_file = u\n[notify:m]\ntype = email\nto = ops\n" \
        "[notify:c]\ntype = command\ncommand = /bin/page\n"
    assert set(re.findall(r"type = \w+", inline)) <= set(re.findall(r"`(type = \w+)`", page))
    app.configure(block + inline + "".join(f"[{name}]\n{rest}\n" for name, rest in re.findall(r"`\[(metrics|trace)\] ([^`]*)`", page)))
    settings = deploy.load_settings([str(app.config)], {}, [])
    assert {notifier.type for notifier in settings.notify.values()} == set(deploy.NOTIFIERS)
    assert [deploy.check_notifier(notifier) for notifier in settings.notify.values()] == [""] * len(settings.notify)
    assert settings.metrics.textfile_dir == "/var/lib/prometheus/node-exporter"
    words = set(re.findall(r"\$\{(\w+)\}", page.split("In `text` stand")[1].split("\n\n")[0]))
    assert words == set(deploy.NOTE_WORDS)


def test_every_kind_that_can_be_chosen_is_there():
    assert deploy.OPTIONS["notify:*"]["type"].kind.split("|") == list(deploy.NOTIFIERS)


def test_a_credential_is_the_token_of_one_section_only(app, receive, tmp_path):
    receiver, credentials = receive(), tmp_path / "credentials"
    credentials.mkdir()
    private(credentials / "n0", CANARY)
    configure(app, f"url = {receiver.url}\ntoken_file=/nonexistent")
    assert app.run("deploy", app.artifact("1.0"), env={"CREDENTIALS_DIRECTORY": str(credentials)}, check=0).data["warnings"] == []
    assert receiver.posts[0]["headers"]["Authorization"] == f"Bearer {CANARY}"
    configure(app, f"url = {receiver.url}\ntoken_file=/nonexistent", before="[probe:n0]\nurl = http://127.0.0.1:1/\nauth_file = /nonexistent")
    assert "would be the same credential, n0" in app.run("deploy", app.artifact("1.1"), check=2).data["error"]["message"]


@as_root
def test_under_a_configuration_that_is_not_believed_nobody_is_told(app, receive, tmp_path):
    receiver, page = receive(), fake_command(tmp_path, "page")
    page.path.chmod(0o777)
    (tmp_path / "metrics").mkdir()
    configure(app, f"url = {receiver.url}", f"type = command\ncommand = {page.path}", before=f"[metrics]\ntextfile_dir = {tmp_path}/metrics")
    refused = app.run("deploy", app.artifact("1.0"), check=3)
    assert f"{page.path} is writable by group or others" in refused.data["error"]["message"]
    assert receiver.posts == page.calls() == os.listdir(str(tmp_path / "metrics")) == []


# -- secrets ---------------------------------------------------------------------------

def test_no_secret_is_told_shown_or_logged(app, receive, mail_server, tmp_path):
    canaries = {name: f"canary-{name}-5b1f-9d3e" for name in ("token", "slack", "query", "path", "header", "env", "printed")}
    broken, good = receive(500, f"no: {canaries['token']} {canaries['header']}".encode()), receive()
    hook = fake_command(tmp_path, "hook", f"print(os.environ['DB_PASSWORD'], 'password={canaries['printed']}', 'bell\\a'); sys.exit(1)")
    page, log = fake_command(tmp_path, "page"), tmp_path / "log"
    configure(
        app, f"url = {broken.url}/{canaries['path']}?key={canaries['query']}\nheader.X-Api-Key = {canaries['header']}\n"
             f"token_file={private(tmp_path / 'token', canaries['token'])}",
        f"type = slack\nurl_file={private(tmp_path / 'url', good.url + '/' + canaries['slack'])}",
        f"type = email\nto = ops\nsmtp={mail_server.address}", f"type = command\ncommand = {page.path}", f"url = {good.url}",
        before=f"[env]\nDB_PASSWORD = {canaries['env']}\n[hooks]\npre_stage = {hook.path} {canaries['env']}")
    failed = app.run("deploy", app.artifact("1.0"), "-v", "--log-file", log, check=1)
    shown = app.run("config", check=0)
    call = page.details()[0]["env"]
    message = message_from_bytes(mail_server.mails[0]["message"])
    texts = [post["body"].get("text") for post in good.posts + broken.posts] + [call["DEPLOY_TEXT"], message.get_payload(decode=True).decode()]
    assert len(texts) == 5 and all("password=[masked]" in text for text in texts), texts
    assert not any("\a" in text for text in texts), "control characters are escaped"
    posted = json.dumps([post["body"] for post in good.posts + broken.posts])
    everything = "\n".join([failed.stdout, failed.stderr, shown.stdout, posted, log.read_text(), *texts])
    assert [name for name, value in canaries.items() if value in everything] == []
    assert "status 500: no: [masked] [masked]" in failed.data["warnings"][0]
    assert broken.posts[0]["path"] == f"/{canaries['path']}?key={canaries['query']}", "it did get there"


# -- chats and receivers of one's own ---------------------------------------------

@pytest.fixture
def receiver() -> Iterator[Receiver]:
    """A receiver that takes everything."""
    made = Receiver()
    yield made
    made.stop()


def test_discord_mentions_nobody_and_gets_what_it_takes(app: App, receiver: Receiver) -> None:
    app.configure(f"[notify:chat]\ntype = discord\nurl = {receiver.url}\ntext = ${{note}} {'x' * 3000}")
    app.run("deploy", app.artifact("1.0"), "-m", "@everyone look", check=0)
    body = receiver.posts[0]["body"]
    assert set(body) == {"content", "allowed_mentions"} and body["allowed_mentions"] == {"parse": []}
    assert body["content"].startswith("@everyone look x") and len(body["content"]) == 2000


def test_teams_gets_an_adaptive_card(app: App, receiver: Receiver) -> None:
    app.configure(f"[notify:chat]\ntype = teams\nurl = {receiver.url}\ntext = ${{application}} is ${{event}}")
    app.deploy("1.0")
    body = receiver.posts[0]["body"]
    [attachment] = body["attachments"]
    assert body["type"] == "message" and attachment["contentType"] == "application/vnd.microsoft.card.adaptive"
    card = attachment["content"]
    assert (card["type"], card["version"]) == ("AdaptiveCard", "1.4")
    assert card["body"] == [{"type": "TextBlock", "text": "myapp is deployed", "wrap": True}]


def test_a_body_of_ones_own_is_escaped_as_json_and_headers_are_templates(app: App, receiver: Receiver) -> None:
    app.configure(f"""[notify:events]
url = {receiver.url}
header.ce-type = dev.cdevents.service.${{event}}.0.2.0
header.ce-id = ${{deploy_id}}
header.Content-Type = application/cloudevents+json
body = {{"title": "${{application}}", "what": ["${{note}}", "$${{literal}}"],
    "severity": "error"}}""")
    done = app.run("deploy", app.artifact("1.0"), "-m", 'a "quoted" \\ backslash', check=0)
    [post] = receiver.posts
    assert post["body"] == {"title": "myapp", "what": ['a "quoted" \\ backslash', "${literal}"], "severity": "error"}
    headers = {name.lower(): value for name, value in post["headers"].items()}
    assert headers["ce-type"] == "dev.cdevents.service.deployed.0.2.0" and headers["ce-id"] == done.data["deploy_id"]
    assert headers["content-type"] == "application/cloudevents+json"


@pytest.mark.parametrize("text, said", [
    ('body = {"title": ${event}', "body: Expecting"), ("body = ${evnt}", "body: no value for ${evnt}"),
    ("header.x-a = ${evnt}", "header.x-a: no value for ${evnt}"), ("type = discord\nbody = x", "body means nothing to type = discord")])
def test_a_body_that_cannot_be_right_is_usage(text: str, said: str, app: App) -> None:
    app.configure(f"[notify:own]\nurl = http://127.0.0.1:9/\n{text}")
    assert said in app.run("deploy", app.artifact("1.0"), check=2).data["msg"]
