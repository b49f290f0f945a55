"""Probes against real peers: HTTP, TLS and unix-socket servers that misbehave in earnest."""

import contextlib
import json
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest

from support import Server, described, load_deploy, needs, run_deploy, start_deploy, wait_until

deploy = load_deploy()


# -- support -----------------------------------------------------------------

class Server:
    """A listening socket whose connections each go to a function in a thread of its own."""

    def __init__(self, answer, address=("127.0.0.1", 0), family=socket.AF_INET, tls=None):
        self.answer, self.tls = answer, tls
        self.requests, self.times = [], []
        self.listener = socket.socket(family, socket.SOCK_STREAM)
        self.listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.listener.bind(address)
        self.listener.listen(20)
        self.stopping = threading.Event()
        self.hung_up = threading.Event()
        self.port = self.listener.getsockname()[1] if family != socket.AF_UNIX else 0
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        while True:
            try:
                connection = self.listener.accept()[0]
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection):
        try:
            if self.tls:
                connection = self.tls.wrap_socket(connection, server_side=True)
            request = b""
            while b"\r\n\r\n" not in request:
                piece = connection.recv(65536)
                if not piece:
                    return
                request += piece
            self.requests.append(request.decode("latin-1"))
            self.times.append(time.monotonic())
            self.answer(connection, len(self.requests))
        except OSError:
            self.hung_up.set()
        finally:
            connection.close()

    def close(self):
        self.stopping.set()
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()


@pytest.fixture
def serve():
    servers = []

    def start(answer, **options):
        if not callable(answer):
            data = answer
            answer = lambda connection, number: connection.sendall(data)  # noqa: E731
        servers.append(Server(answer, **options))
        return servers[-1]
    yield start
    for server in servers:
        server.close()


def http(status=200, body=b"", *headers):
    head = [f"HTTP/1.1 {status} X", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join(head).encode() + b"\r\n\r\n" + body


def drip(data, server, seconds=0.05):
    """Send a byte at a time until the peer hangs up."""
    def answer(connection, number):
        for position in range(len(data)):
            if server[0].stopping.wait(seconds):
                return
            connection.sendall(data[position:position + 1])
    return answer


def session_with(*assignments):
    settings = deploy.load_settings([], {}, list(assignments))
    return deploy.Run(settings, deploy.Console(), deploy.Interrupts(), SimpleNamespace(command="probe"))


CONTEXT = deploy.Context("myapp", "/nonexistent/root", "20260101T000000Z-1.1", "1.1", "/nonexistent/release", "", "id")


def ask(kind, target, *assignments, context=CONTEXT, once=True, expect_release=False, session=None, progress=None):
    """Probe; a single try has time enough on a busy host, unless the test is of its timeout."""
    session = session or session_with()
    patience = ["timeout=60s"] if once and not any(text.startswith("timeout=") for text in assignments) else []
    probe = deploy.adhoc_probe(kind, target, patience + list(assignments))
    return deploy.run_probe(session, probe, context, expect_release=expect_release, once=once, progress=progress)


def ask_longer(key, is_shown, *words, **options):
    """Probe with a short time limit, and with a longer one where a busy host had not come to what is to be shown."""
    for limit in ("400ms", "4s", "40s"):
        result = ask(*words, f"{key}={limit}", **options)
        if is_shown(result):
            break
    return result


def url_of(server, path="/", scheme="http", host="127.0.0.1"):
    return f"{scheme}://{host}:{server.port}{path}"


# -- what an answer is held against ------------------------------------------

JSON_BODY = json.dumps({
    "status": "ok", "version": "1.1", "n": 3, "x": 1.5, "yes": True, "no": False, "none": None,
    "checks": [{"name": "db", "ok": True}], "dotted.key": 1}).encode()


@pytest.mark.parametrize("assignment, detail", [
    ("status=200", ""),
    ("status=201, 200-204", ""),
    ("status=500-599", "status 200, expected 500-599"),
    ("body=\"status\": \"ok\"", ""),
    ("body=!fatal", ""),
    ("body=fatal", "does not match body = fatal"),
    ("body=!status", "does not match body = !status"),
    ("json.status=ok", ""),
    ("json.n=3", ""),
    ("json.x=1.5", ""),
    ("json.yes=true", ""),
    ("json.no=false", ""),
    ("json.none=null", ""),
    ("json.checks.0.name=db", ""),
    ("json.checks.0={\"name\": \"db\", \"ok\": true}", ""),
    ("json.status=bad", "json status is 'ok', expected 'bad'"),
    ("json.missing=1", "JSON has no 'missing'"),
    ("json.status.deeper=1", "JSON has no 'status.deeper'"),
    ("json.checks.1.name=db", "JSON has no 'checks.1.name'"),
    ("json.checks.-1.name=db", "JSON has no 'checks.-1.name'"),
    ("json.checks.x=db", "JSON has no 'checks.x'"),
    ("json.checks.99999999999999999999=db", "JSON has no"),
    ("expect_header.X-Kind=^web$", ""),
    ("expect_header.x-kind=!db", ""),
    ("expect_header.X-Kind=db", "header X-Kind is web, expected db"),
    ("expect_header.X-None=a", "header X-None is missing"),
    ("expect_header.X-None=!a", ""),
])
def test_an_answer_is_held_against_every_expectation(serve, assignment, detail):
    server = serve(http(200, JSON_BODY, "X-Kind: web"))
    result = ask("url", url_of(server), assignment)
    assert result.ok == (not detail), described(result)
    assert detail in result.detail
    assert result.evidence["status"] == 200
    assert result.evidence["tries"] == result.tries == 1


@pytest.mark.parametrize("where, header, body, ok", [
    ("json:version", "", b'{"version": "1.1"}', True),
    ("json:a.0.v", "", b'{"a": [{"v": 1.1}]}', True),
    ("json:version", "", b'{"version": "20260101T000000Z-1.1"}', True),
    ("json:version", "", b'{"version": "1.0"}', False),
    ("json:version", "", b'{"version": "1.1.2"}', False),
    ("json:other", "", b'{"version": "1.1"}', False),
    ("json:version", "", b"not json", False),
    ("header:X-Version", "X-Version: 1.1", b"", True),
    ("header:X-Version", "X-Version: 1.0", b"", False),
    ("header:X-Version", "X-Other: 1.1", b"", False),
    ("body", "", b"running 1.1 now", True),
    ("body", "", b"v1.1", True),
    ("body", "", b"1.1", True),
    ("body", "", b"<b>1.1</b>", True),
    ("body", "", b"version=1.1.", True),
    ("body", "", b"myapp-1.1", True),
    ("body", "", b"20260101T000000Z-1.1", True),
    ("body", "", b"1.1.2", False),
    ("body", "", b"11.1", False),
    ("body", "", b"2.1.1", False),
    ("body", "", b"1.1-rc1", False),
    ("body", "", b"1.1+5", False),
    ("body", "", b"1.1~rc", False),
    ("body", "", b"1.1b", False),
    ("body", "", b"1x1", False),
    ("body", "", b"3-1.1", False),
    ("body", "", b"1.10", False),
    ("body", "", b"", False),
])
def test_the_answer_must_name_the_new_release(serve, where, header, body, ok):
    server = serve(http(200, body, *([header] if header else [])))
    result = ask("url", url_of(server), f"release={where}", expect_release=True)
    assert result.ok is ok, described(result)
    assert ask("url", url_of(server), f"release={where}").ok, "not asked for, so not checked"


def test_an_old_version_is_named_in_the_failure(serve):
    server = serve(http(200, b'{"version": "1.0"}'))
    result = ask("url", url_of(server), "release=json:version", expect_release=True)
    assert result.detail == "answered with version 1.0, expected 1.1: the old process may still be running"


# -- the request -------------------------------------------------------------

def header_of(request, name):
    found = [line.partition(":")[2].strip() for line in request.split("\r\n")[1:]
             if line.lower().startswith(name.lower() + ":")]
    return found


def test_the_request_says_who_asks_and_asks_for_plain_bytes(serve):
    server = serve(http())
    assert ask("url", url_of(server, "/a?b=c%20d")).ok
    request = server.requests[0]
    assert request.startswith("GET /a?b=c%20d HTTP/1.1\r\n")
    assert header_of(request, "Host") == [f"127.0.0.1:{server.port}"]
    assert header_of(request, "User-Agent") == [f"deploy.py/{deploy.VERSION}"]
    assert header_of(request, "Accept-Encoding") == ["identity"]
    assert header_of(request, "Connection") == ["close"]
    assert header_of(request, "Authorization") == []


def test_headers_and_method_are_the_operators(serve):
    server = serve(http())
    assert ask("url", url_of(server), "method=POST", "header.host=example.org", "header.X-A=ä", "header.User-Agent=me").ok
    request = server.requests[0]
    assert request.startswith("POST / HTTP/1.1")
    assert header_of(request, "Host") == ["example.org"]
    assert header_of(request, "User-Agent") == ["me"]
    assert header_of(request, "X-A") == ["ä".encode().decode("latin-1")]
    assert header_of(request, "Content-Length") == ["0"]


def test_head_has_no_body(serve):
    server = serve(b"HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\n")
    assert ask("url", url_of(server), "method=HEAD").ok


def test_a_non_ascii_path_is_encoded(serve):
    server = serve(http())
    assert ask("url", url_of(server, "/ä")).ok
    assert server.requests[0].startswith("GET /%C3%A4 ")


@pytest.mark.parametrize("content, expected", [
    ("user:pass word", "user:pass word"),
    ("user:password\n", "Basic dXNlcjpwYXNzd29yZA=="),
    ("Bearer abcdefgh\n", "Bearer abcdefgh"),
])
def test_auth_file(serve, tmp_path, content, expected):
    server = serve(http())
    (tmp_path / "auth").write_text(content)
    session = session_with()
    assert ask("url", url_of(server), f"auth_file={tmp_path}/auth", session=session).ok
    assert header_of(server.requests[0], "Authorization") == [expected]
    assert expected.split()[-1] not in session.console.clean(f"x {expected.split()[-1]} y")


def test_a_missing_auth_file_fails_the_probe(serve, tmp_path):
    result = ask("url", url_of(serve(http())), f"auth_file={tmp_path}/none")
    assert not result.ok and "reading auth_file: No such file" in result.detail


def test_userinfo_in_the_url_is_basic_auth_and_stays_private(serve):
    server = serve(http(401))
    session = session_with()
    result = ask("url", f"http://me:s%20cret@127.0.0.1:{server.port}/", session=session)
    assert header_of(server.requests[0], "Authorization") == ["Basic bWU6cyBjcmV0"]
    assert header_of(server.requests[0], "Host") == [f"127.0.0.1:{server.port}"]
    assert "cret" not in result.detail
    assert session.console.clean("s cret") == deploy.MASK


def test_proxies_from_the_environment_are_never_used(serve, monkeypatch):
    server, proxy = serve(http()), serve(http(500))
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, url_of(proxy))
    assert ask("url", url_of(server)).ok
    assert not proxy.requests


def test_connect_goes_elsewhere_with_the_urls_host(serve):
    server = serve(http())
    assert ask("url", "http://www.example.org/x", f"connect=127.0.0.1:{server.port}").ok
    assert header_of(server.requests[0], "Host") == ["www.example.org"]


def test_connect_over_a_unix_socket(serve, tmp_path):
    path = str(tmp_path / "s")
    server = serve(http(200, b"over unix"), address=path, family=socket.AF_UNIX)
    assert ask("url", "http://app/", f"connect=unix:{path}", "body=over unix").ok
    assert header_of(server.requests[0], "Host") == ["app"]
    assert ask("tcp", f"unix:{path}").ok


def test_ipv6_literal(serve):
    try:
        server = serve(http(), address=("::1", 0), family=socket.AF_INET6)
    except OSError:
        pytest.skip("no IPv6 here")
    assert ask("url", url_of(server, host="[::1]")).ok
    assert header_of(server.requests[0], "Host") == [f"[::1]:{server.port}"]
    assert ask("tcp", f"[::1]:{server.port}").ok


# -- redirects ---------------------------------------------------------------

def redirecting(*locations):
    def answer(connection, number):
        if number <= len(locations):
            connection.sendall(http(302, b"", f"Location: {locations[number - 1]}"))
        else:
            connection.sendall(http(200, b"there"))
    return answer


def test_redirects_are_not_followed_by_default(serve):
    server = serve(redirecting("/there"))
    result = ask("url", url_of(server))
    assert not result.ok and "status 302" in result.detail
    assert ask("url", url_of(serve(redirecting("/there"))), "status=302").ok


def test_redirects_within_the_origin_are_followed(serve):
    server = serve(redirecting("/a", "b?c=d"))
    assert ask("url", url_of(server), "redirects=2", "body=there").ok
    assert [request.split()[1] for request in server.requests] == ["/", "/a", "/b?c=d"]


def test_a_connection_is_closed_before_its_redirect_is_followed(serve):
    closed = threading.Event()

    def answer(connection, number):
        connection.sendall(http(302, b"hop", "Location: /there") if number == 1 else http(200 if closed.wait(1) else 508))
        if number == 1 and connection.recv(1) == b"":
            closed.set()
    server = serve(answer)
    run_deploy("probe", "--url", url_of(server), "--expect", "redirects=1", check=0)
    assert len(server.requests) == 2


def test_too_many_redirects_fail(serve):
    server = serve(redirecting(*["/"] * 9))
    result = ask("url", url_of(server), "redirects=2")
    assert not result.ok and "more than 2 redirects" in result.detail
    assert len(server.requests) == 3


@pytest.mark.parametrize("location", [
    "http://localhost:{port}/", "https://127.0.0.1:{port}/", "http://127.0.0.1:1/", "file:///etc/passwd",
    "//other/x", "ftp://127.0.0.1/", "http://[", "http://a b/", "gopher:", "http://:0/"])
def test_redirects_elsewhere_are_refused(serve, location):
    server = serve(lambda connection, number: connection.sendall(
        http(302, b"", "Location: " + location.format(port=server.port))))
    result = ask("url", url_of(server), "redirects=3")
    assert not result.ok
    assert len(server.requests) == 1


# -- servers that misbehave --------------------------------------------------

def test_a_huge_body_is_read_no_further_than_max_body(serve):
    def flood(connection, number):
        connection.sendall(b"HTTP/1.1 200 OK\r\n\r\nstart ")
        while not server.stopping.is_set():
            connection.sendall(b"x" * 65536)
    server = serve(flood)
    assert ask("url", url_of(server), "max_body=1k", "body=start").ok
    assert server.hung_up.wait(60), "the connection is closed"


@pytest.mark.parametrize("head", [
    b"HTTP/1.1 200 OK\r\nX: " + b"y" * 400,
    b"HTTP/1.1 200 OK\r\nContent-Length: 400\r\n\r\n" + b"z" * 400,
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1\r\nz\r\n" * 100,
    b"HTTP/1.1 100 Continue\r\n\r\n" * 20,
    b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 80,
], ids=["header", "body", "chunks", "continue", "headers"])
def test_a_dripping_answer_is_cut_off_in_time(serve, head):
    holder = []
    server = serve(drip(head, holder))
    holder.append(server)
    started = time.monotonic()
    result = ask("url", url_of(server), "timeout=400ms")
    assert not result.ok and "no answer within 0.40s" in result.detail
    assert time.monotonic() - started < 15, "all of it takes 20 s and more"
    assert server.hung_up.wait(60), "the socket is shut down, not left to the thread"


def test_a_first_try_has_all_of_its_time_to_ask(serve):
    server = serve(lambda connection, number: server.stopping.wait(60))
    done = run_deploy("probe", "--url", url_of(server), "--expect", "timeout=400ms", check=7)
    assert "no answer within 0.40s" in done.data["msg"], "what it took to get ready is no part of it"


def test_evidence_of_a_dripping_body_holds_what_came(serve):
    def answer(connection, number):
        connection.sendall(b"HTTP/1.1 503 X\r\nTransfer-Encoding: chunked\r\n\r\n")
        server.stopping.wait(60)
    server = serve(answer)
    result = ask_longer("timeout", lambda result: result.evidence["status"], "url", url_of(server))
    assert result.evidence["status"] == 503 and "still reading the answer" in result.detail


def test_a_server_that_accepts_and_says_nothing(serve):
    server = serve(lambda connection, number: server.stopping.wait(60))
    stage = "still waiting for the head of the answer"
    assert stage in ask_longer("timeout", lambda result: stage in result.detail, "url", url_of(server)).detail


def test_a_full_backlog_does_not_hang():
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(0)  # the kernel queues one or two, and drops the rest
    clients = []
    try:
        for _ in range(4):
            client = socket.socket()
            client.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                client.connect(listener.getsockname())
            clients.append(client)
        started = time.monotonic()
        result = ask("url", f"http://127.0.0.1:{listener.getsockname()[1]}/", "timeout=300ms")
        assert not result.ok and time.monotonic() - started < 30, "not as long as the kernel goes on trying"
    finally:
        for client in clients + [listener]:
            client.close()


@pytest.mark.parametrize("assignments, ok", [([], False), (["max_body=3"], True), (["max_body=0"], True), (["method=HEAD"], True)], ids=str)
def test_an_answer_that_ends_before_its_length_is_not_well(serve, assignments, ok):
    server = serve(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nabc")
    result = ask("url", url_of(server), *assignments)
    assert result.ok is ok
    assert ok or result.detail == "reading the answer: ConnectionError: it ended before its Content-Length"


@pytest.mark.parametrize("port", ["0", "65536", "x", "-1"])
def test_a_url_has_a_port_that_somebody_can_listen_on(port):
    """Port 0 was taken for none, and 80 asked instead."""
    error = run_deploy("probe", "--url", f"http://127.0.0.1:{port}/", check=2).data["error"]
    assert "port" in error["message"].lower() or "int()" in error["message"]  # so 3.6 says it


def test_hanging_name_resolution_is_cut_off(monkeypatch):
    release = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: release.wait(60) and [])
    started = time.monotonic()
    result = ask("url", "http://example.org/", "timeout=200ms")
    release.set()
    assert not result.ok and "still connecting to example.org:80" in result.detail
    assert time.monotonic() - started < 30


@pytest.mark.parametrize("data", [
    b"", b"\r\n\r\n", b"junk\r\n\r\n", b"HTTP/9.9 200 OK\r\n\r\n", b"HTTP/1.1 999 X\r\n\r\n", b"HTTP/1.1 abc X\r\n\r\n",
    b"HTTP/1.1 -20 X\r\n\r\n", b"SSH-2.0-OpenSSH_9\r\n", b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 200 + b"\r\n",
    b"HTTP/1.1 200 OK\r\nA: " + b"b" * 70000 + b"\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-5\r\nabc",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab",
    b"\x16\x03\x01\x02\x00\x01" * 20, b"\x00" * 500,
])
def test_nonsense_fails_the_probe_and_never_raises(serve, data):
    result = ask("url", url_of(serve(data)), "status=200")
    assert not result.ok and result.detail


@pytest.mark.parametrize("body", [
    b"[" * 60000, b'{"a":' * 10000, b"\xff\xfe\x00", b"1" * 6000, b"NaN", b"", b"\xef\xbb\xbf{}", b'"\\ud800"',
    b'{"a": 1e999}', b'{"a": {"a": {}}}',
])
def test_hostile_json_fails_the_probe_and_never_raises(serve, body):
    result = ask("url", url_of(serve(http(200, body))), "json.a.b.c=1")
    assert not result.ok and "json" in result.detail.lower()


@pytest.mark.parametrize("headers", [
    ["Content-Length: -5"], ["Content-Length: junk"], ["Content-Length: 99999999999999999999"], ["broken line"],
    [": empty"], ["A: \xff\x00\x1b[31m"], ["Content-Type: text/html; charset=\"nonsense"], ["Transfer-Encoding: gzip"],
    ["Content-Length: 3", "Content-Length: 4"], ["Transfer-Encoding: CHUNKED", "Content-Length: 3"]])
def test_odd_headers_never_raise(serve, headers):
    data = b"HTTP/1.1 200 OK\r\n" + "\r\n".join(headers).encode("latin-1") + b"\r\n\r\nabc"
    result = ask("url", url_of(serve(data)), "expect_header.A=!zzz", "timeout=1s")
    json.dumps(result.to_json())


def test_refused_connection_says_so():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for kind, target in (("url", f"http://127.0.0.1:{port}/"), ("tcp", f"127.0.0.1:{port}")):
        result = ask(kind, target)
        assert f"connecting to 127.0.0.1:{port}: Connection refused (ECONNREFUSED)" in result.detail
        assert result.evidence == {"status": None, "body": "", "error": result.detail, "tries": 1}


def test_evidence_holds_status_and_the_start_of_the_body(serve):
    result = ask("url", url_of(serve(http(500, b"trace " + b"x" * 1000))))
    assert result.evidence["status"] == 500
    assert result.evidence["body"] == ("trace " + "x" * 1000)[:300]
    assert result.evidence["error"] == "status 500, expected 200-299"
    assert json.loads(json.dumps(result.to_json()))["required"] is True


def test_no_half_of_a_secret_stands_at_the_end_of_the_evidence(serve):
    session = session_with()
    session.console.secrets.add("swordfish-of-the-answer")
    for before in range(deploy.EVIDENCE_CHARACTERS - 20, deploy.EVIDENCE_CHARACTERS, 5):
        result = ask("url", url_of(serve(http(500, b"x" * before + b"swordfish-of-the-answer"))), session=session)
        assert result.evidence["body"].startswith("x" * before) and "sw" not in result.evidence["body"], before


# -- TLS ---------------------------------------------------------------------

@pytest.fixture(scope="session")
def certificates(tmp_path_factory):
    needs("openssl")
    directory = tmp_path_factory.mktemp("tls")

    def make(name, host):
        config = directory / f"{name}.cnf"
        config.write_text(f"[req]\ndistinguished_name=dn\nx509_extensions=ext\nprompt=no\n[dn]\nCN={name}\n"
                          f"[ext]\nsubjectAltName={host}\nbasicConstraints=critical,CA:TRUE\n")
        subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-config", str(config),
                        "-keyout", str(directory / f"{name}.key"), "-out", str(directory / f"{name}.pem")],
                       check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    make("server", "DNS:app.test,IP:127.0.0.1")
    make("client", "DNS:client.test")
    subprocess.run(["openssl", "rsa", "-aes256", "-passout", "pass:abcd", "-in", str(directory / "client.key"),
                    "-out", str(directory / "locked.key")], check=True, stderr=subprocess.DEVNULL)
    return directory


def tls_context(directory, client=False):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS if sys.version_info < (3, 10) else ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(str(directory / "server.pem"), str(directory / "server.key"))
    if client:
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(str(directory / "client.pem"))
    return context


def test_tls_certificates_are_verified_unless_told_otherwise(serve, certificates):
    server = serve(http(), tls=tls_context(certificates))
    url = url_of(server, scheme="https")
    refused = ask("url", url)
    assert not refused.ok and "certificate verify failed" in refused.detail
    assert ask("url", url, "tls_verify=no").ok
    assert ask("url", url, f"tls_ca={certificates}/server.pem").ok
    assert not ask("url", url, f"tls_ca={certificates}/client.pem").ok
    missing = ask("url", url, f"tls_ca={certificates}/none.pem")
    assert not missing.ok and "reading tls_ca" in missing.detail


def test_the_certificates_name_is_the_urls_also_with_connect(serve, certificates):
    server = serve(http(), tls=tls_context(certificates))
    connect, authority = f"connect=127.0.0.1:{server.port}", f"tls_ca={certificates}/server.pem"
    assert ask("url", "https://app.test/", connect, authority).ok
    wrong = ask("url", "https://other.test/", connect, authority)
    assert not wrong.ok and "other.test" in wrong.detail


def test_sni_is_the_urls_host(serve, certificates):
    names, context = [], tls_context(certificates)
    context.set_servername_callback(lambda connection, name, _: names.append(name))
    server = serve(http(), tls=context)
    assert ask("url", "https://app.test/", f"connect=127.0.0.1:{server.port}", "tls_verify=no").ok
    assert names == ["app.test"]


def test_client_certificates(serve, certificates):
    server = serve(http(), tls=tls_context(certificates, client=True))
    url, authority = url_of(server, scheme="https"), f"tls_ca={certificates}/server.pem"
    assert not ask("url", url, authority).ok
    pair = [f"tls_cert={certificates}/client.pem", f"tls_key={certificates}/client.key"]
    assert ask("url", url, authority, *pair).ok


@pytest.mark.parametrize("keys, problem", [
    ("tls_ca = {d}/empty", "no certificate"), ("tls_ca = {d}/server.key", "no certificate"),
    ("tls_cert = {d}/client.pem\ntls_key = {d}/server.key", "values mismatch"), ("tls_cert = {d}/client.pem", "TLS: "),
    ("tls_cert = {d}/client.pem\ntls_key = {d}/locked.key", "TLS: "),
    ("auth_file = {d}/lines", "holds a line break")], ids=["empty", "no certificate", "another's key", "no key", "locked", "lines"])
def test_key_files_that_cannot_serve_are_found_by_preflight(keys, problem, certificates, app):
    """All that can be known before the switch."""
    (certificates / "empty").write_text("")
    (certificates / "lines").write_text("Bearer abc\nX: y\n")
    for path in certificates.iterdir():
        path.chmod(0o600)
    app.configure("".join(f"[probe:{name}]\nurl = https://127.0.0.1:9/\n{keys.format(d=certificates)}\n" for name in "xy"))
    error = app.run("deploy", app.artifact("1.0"), check=3).data["error"]
    assert error["message"].startswith("preflight: configuration: [probe:x]") and problem in error["message"], described(error)
    assert str(certificates) in error["message"] and error["hint"] and app.releases() == []
    assert "; [probe:y]" in error["message"], "all are told at once"


def test_an_encrypted_key_fails_and_asks_nobody(serve, certificates):
    server = serve(http(), tls=tls_context(certificates))
    result = ask("url", url_of(server, scheme="https"),
                 f"tls_cert={certificates}/client.pem", f"tls_key={certificates}/locked.key")
    assert not result.ok and "reading tls_ca, tls_cert and tls_key" in result.detail
    assert "no answer within" not in result.detail


def test_plain_http_where_tls_is_expected_and_the_reverse(serve, certificates):
    assert "in the TLS handshake" in ask("url", url_of(serve(http(400)), scheme="https"), "timeout=1s").detail
    assert not ask("url", url_of(serve(http(), tls=tls_context(certificates))), "timeout=1s").ok


def test_a_hanging_handshake_is_cut_off():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(5)
        url, stage = f"https://127.0.0.1:{listener.getsockname()[1]}/", "still in the TLS handshake"
        assert stage in ask_longer("timeout", lambda result: stage in result.detail, "url", url).detail


def test_a_dripping_body_over_tls_is_cut_off(serve, certificates):
    holder = []
    server = serve(drip(b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * 500, holder), tls=tls_context(certificates))
    holder.append(server)
    started = time.monotonic()
    assert not ask("url", url_of(server, scheme="https"), "tls_verify=no", "timeout=500ms").ok
    assert time.monotonic() - started < 15, "all of it takes 25 s"
    assert server.hung_up.wait(60)


# -- timing ------------------------------------------------------------------

FAST = ("period=20ms", "jitter=0", "backoff=1")


def flapping(pattern):
    """Answer 200 for each `+` and 503 for each `-`; the last goes on for ever."""
    def answer(connection, number):
        good = pattern[min(number, len(pattern)) - 1] == "+"
        connection.sendall(http(200 if good else 503))
    return answer


@pytest.mark.parametrize("pattern, successes, tries", [
    ("+", 1, 1), ("+", 2, 2), ("---+", 2, 5), ("+-+-++", 2, 6), ("-+++", 3, 4)])
def test_successes_in_a_row_are_needed(serve, pattern, successes, tries):
    server = serve(flapping(pattern))
    result = ask("url", url_of(server), f"successes={successes}", *FAST, once=False)
    assert result.ok and result.tries == tries == len(server.requests)


def test_the_deadline_ends_it_and_the_last_failure_is_told(serve):
    server = serve(flapping("-"))
    result = ask_longer("deadline", lambda result: result.tries > 3, "url", url_of(server), *FAST, once=False)
    limit, _, told = result.detail.partition(": ")
    assert not result.ok and told == "status 503, expected 200-299" and result.tries > 3 and result.evidence["status"] == 503
    seconds = float(re.match(r"not healthy within ([\d.]+)s\Z", limit).group(1))
    assert seconds - 0.1 < result.seconds < seconds + 30


def test_a_flapping_service_is_not_well(serve):
    server = serve(lambda connection, number: connection.sendall(http(200 if number % 2 else 503)))
    result = ask_longer("deadline", lambda result: result.tries > 3, "url", url_of(server), *FAST, once=False)
    assert not result.ok and "status 503" in result.detail and result.tries > 3


def test_each_try_is_capped_by_what_is_left_of_the_deadline(serve):
    server = serve(lambda connection, number: server.stopping.wait(60))
    result = ask("url", url_of(server), "deadline=500ms", "timeout=60s", once=False)
    assert not result.ok and result.tries == 1 and 0.5 <= result.seconds < 30


@pytest.fixture
def waits(monkeypatch):
    """How long a probe waits before each try but the first; it does not have to."""
    seconds, real = [], deploy.Interrupts.wait

    def wait(interrupts, wait_seconds, *descriptors):
        if descriptors:
            return real(interrupts, wait_seconds, *descriptors)
        seconds.append(wait_seconds)
        return []
    monkeypatch.setattr(deploy.Interrupts, "wait", wait)
    yield seconds
    assert seconds and seconds[0] == 0, "initial_delay"


def test_waits_grow_up_to_period_max_and_start_anew_after_a_success(serve, waits):
    server = serve(flapping("----+---++"))
    result = ask("url", url_of(server), "period=50ms", "backoff=2", "period_max=150ms", "jitter=0", once=False)
    assert result.ok
    assert waits[1:] == pytest.approx([0.05, 0.1, 0.15, 0.15, 0.05, 0.05, 0.1, 0.15, 0.05])


@pytest.mark.parametrize("pattern", ["+", "-+"])
def test_a_deadline_shorter_than_the_period_still_gives_a_second_chance(serve, pattern):
    result = ask_longer("deadline", lambda result: result.ok, "url", url_of(serve(flapping(pattern))), "period=100s",
                        "period_max=100s", once=False)
    assert result.ok, described(result)


def test_jitter_spreads_the_waits(serve, waits):
    server = serve(flapping("-" * 30 + "+"))
    assert ask("url", url_of(server), "period=40ms", "jitter=1", "backoff=1", "successes=1", once=False).ok
    assert len(waits) == 31 and 0.02 <= min(waits[1:]) < 0.03 and 0.06 < max(waits) <= 0.08


def test_initial_delay_comes_before_the_first_try(serve):
    server = serve(http())
    started = time.monotonic()
    assert ask("url", url_of(server), "initial_delay=200ms", "successes=1", once=False).ok
    assert server.times[0] - started >= 0.2


def test_once_is_one_try_without_delay(serve):
    server = serve(http(500))
    result = ask("url", url_of(server), "initial_delay=90s", "soak=90s")
    assert not result.ok and result.tries == 1 and result.seconds < 60


def test_soak_tolerates_fewer_failures_in_a_row(serve):
    server = serve(flapping("++--+--+"))
    assert ask("url", url_of(server), "soak=400ms", "failures=3", *FAST, once=False).ok


def test_soak_fails_after_failures_in_a_row(serve):
    server = serve(flapping("++-+---"))
    result = ask("url", url_of(server), "soak=30s", "failures=3", *FAST, once=False)
    assert not result.ok and result.tries == 7
    assert result.detail == "failed 3 times in a row after it was healthy: status 503, expected 200-299"


def test_soak_does_not_end_on_a_failure(serve):
    server = serve(flapping("++-"))
    result = ask("url", url_of(server), "soak=50ms", "failures=5", *FAST, once=False)
    assert not result.ok and result.tries == 7


def test_soak_outlasts_the_deadline(serve):
    server = serve(http())
    started = time.monotonic()
    assert ask("url", url_of(server), "deadline=300ms", "soak=500ms", *FAST, once=False).ok
    assert time.monotonic() - started >= 0.5


def test_progress_is_told_of_each_try(serve):
    lines = []
    ask("url", url_of(serve(flapping("-++"))), *FAST, once=False, progress=lambda *told: lines.append(told))
    assert lines == [(1, "try 1: status 503, expected 200-299"), (2, "try 2: status 200"), (3, "try 3: status 200")]


@pytest.mark.parametrize("waiting", ["period=60s", "timeout=60s"])
def test_a_signal_interrupts_the_waiting(serve, waiting):
    asked = threading.Event()

    def answer(connection, number):
        asked.set()
        if waiting.startswith("timeout"):
            server.stopping.wait(60)
        connection.sendall(http(503))
    server = serve(answer)
    session = session_with()
    before = signal.getsignal(signal.SIGTERM)
    session.interrupts.install()
    threading.Thread(target=lambda: (asked.wait(60), os.kill(os.getpid(), signal.SIGTERM)), daemon=True).start()
    try:
        started = time.monotonic()
        with pytest.raises(deploy.Interrupted):
            ask("url", url_of(server), "deadline=100s", "period_max=60s", waiting, once=False, session=session)
        assert time.monotonic() - started < 50
    finally:
        for number in session.interrupts.SIGNALS:
            signal.signal(number, before if number == signal.SIGTERM else signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)


# -- expectations that take for ever --------------------------------------------

ENDLESS, BAIT = "(a+)+$", b"a" * 60 + b"b"  # more steps than there are atoms


@pytest.mark.parametrize("kind, assignment", [
    ("url", f"body={ENDLESS}"), ("url", f"body=!{ENDLESS}"), ("url", f"expect_header.X-Bait={ENDLESS}"), ("command", f"body={ENDLESS}")])
def test_a_regular_expression_without_end_is_cut_off_with_its_try(serve, tmp_path, kind, assignment):
    server = serve(http(200, BAIT, "X-Bait: " + BAIT.decode("ascii")))
    target = url_of(server) if kind == "url" else script(tmp_path, f"print({BAIT.decode('ascii')!r})")
    result = ask_longer("timeout", lambda result: "still comparing" in result.detail, kind, target, assignment)
    assert not result.ok and re.search(r"no answer within [\d.]+s, it was still comparing", result.detail), described(result)
    assert result.evidence["body"].startswith("aaa") and result.evidence["status"] == {"url": 200, "command": 0}[kind], described(result)


def test_a_regular_expression_without_end_does_not_outlast_the_deadline(serve):
    result = ask("url", url_of(serve(http(200, BAIT))), f"body={ENDLESS}", "timeout=60s", "deadline=600ms", once=False)
    assert not result.ok and result.tries == 1 and result.seconds < 50


def children_of(process):
    """The ids of its child processes."""
    with contextlib.suppress(OSError):
        with open(f"/proc/{process.pid}/task/{process.pid}/children") as stream:
            return [int(word) for word in stream.read().split()]
    return []


def comparing(app, serve):
    """Start a deployment and return it, and the process beside it that searches without end."""
    server = serve(http(200, BAIT))
    app.configure(f"durable = no\n[probe:x]\nurl = {url_of(server)}\nbody = {ENDLESS}\ntimeout = 600s\ndeadline = 600s\n")
    process = start_deploy("deploy", app.artifact("1.0"), config=app.config)
    return process, wait_until(lambda: children_of(process), 60, "the process that compares")[0]


@pytest.mark.parametrize("to_group", [False, True], ids=["to it alone", "to its group"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_regular_expression_without_end(number, to_group, app, serve):
    process, helper = comparing(app, serve)
    (os.killpg if to_group else os.kill)(process.pid, number)
    assert process.wait(60) == 5 and app.version is None, "rolled back, once"
    assert not os.path.exists(f"/proc/{helper}")
    assert [line["result"] for line in app.history()] == ["rolled_back"] and app.leftovers() == []


def test_who_compares_does_not_keep_the_lock_of_a_run_that_was_killed(app, serve):
    process, helper = comparing(app, serve)
    process.kill()
    process.wait(60)
    try:
        app.configure("durable = no\n")
        app.run("recover", check=0)
    finally:
        os.kill(helper, signal.SIGKILL)


# -- tcp, command, service ---------------------------------------------------

def test_tcp(serve):
    server = serve(http())
    result = ask("tcp", f"127.0.0.1:{server.port}")
    assert result.ok and result.detail == f"127.0.0.1:{server.port} accepts connections (1 try)"
    missing = ask("tcp", "unix:/nonexistent/s")
    assert not missing.ok and "No such file" in missing.detail
    assert not ask("tcp", "unix:/" + "x" * 200).ok


def test_tcp_never_raises_where_the_peer_resets_at_once():
    import struct
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(5)

        def reset():
            with contextlib.suppress(OSError):
                while True:
                    connection = listener.accept()[0]
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    connection.close()
        threading.Thread(target=reset, daemon=True).start()
        for _ in range(20):
            result = ask("tcp", f"127.0.0.1:{listener.getsockname()[1]}")
            assert result.ok or "reset by peer" in result.detail
        listener.shutdown(socket.SHUT_RDWR)


def script(tmp_path, text):
    path = tmp_path / "check"
    path.write_text(f"#!{sys.executable}\n{text}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize("code, assignment, detail", [
    ("print('up 1.1')", "body=up", ""),
    ("print('up 1.1')", "release=body", ""),
    ("print('up 1.0')", "release=body", "names no version by body"),
    ("print('{\"a\": 1}')", "json.a=1", ""),
    ("print('up')", "body=!up", "does not match"),
    ("print('broken'); raise SystemExit(3)", "body=", "exited with code 3: broken"),
    ("import os; os.kill(os.getpid(), 9)", "body=", "was killed by SIGKILL"),
    ("import time; time.sleep(90)", "timeout=300ms", "timed out after"),
])
def test_command(tmp_path, code, assignment, detail):
    result = ask("command", script(tmp_path, code), "timeout=60s", assignment, expect_release=True)
    assert result.ok == (not detail), described(result)
    assert detail in result.detail


def test_command_that_does_not_exist():
    result = ask("command", "/nonexistent/check --now")
    assert not result.ok and "cannot start /nonexistent/check" in result.detail
    assert result.evidence["status"] == 127


def is_zombie(pid):
    with contextlib.suppress(OSError):
        with open(f"/proc/{pid}/stat") as stream:
            return stream.read().rpartition(")")[2].split()[0] == "Z"
    return False


def test_a_command_and_its_children_end_with_the_try(tmp_path):
    program = script(tmp_path, "import os, sys, time\n"
                     "os.fork()\nopen('%s/pid%%d' %% os.getpid(), 'w').close()\ntime.sleep(60)" % tmp_path)
    def pids():
        return [int(name[3:]) for name in os.listdir(str(tmp_path)) if name.startswith("pid")]
    result = ask_longer("timeout", lambda result: len(pids()) > 1, "command", program)
    assert not result.ok and len(pids()) > 1
    # A killed process takes a moment to be gone.
    wait_until(lambda: not any(deploy.process_is_alive(pid) and not is_zombie(pid) for pid in pids()))


def test_command_sees_the_release_and_is_run_there(tmp_path):
    (tmp_path / "bin").mkdir()
    program = script(tmp_path / "bin", "import os; print(os.getcwd(), os.environ['DEPLOY_HOOK'], os.environ['DEPLOY_VERSION'])")
    context = CONTEXT._replace(release_path=str(tmp_path))
    result = ask("command", "bin/check", f"body=^{tmp_path} probe:ad-hoc 1.1$", context=context)
    assert result.ok, (result, program)


def test_command_as_an_unknown_user_fails_the_probe(tmp_path):
    session = session_with("hooks.run_as=nosuchuserhere")
    result = ask("command", "true", session=session)
    assert not result.ok and "nosuchuserhere" in result.detail


def test_service(tmp_path):
    pidfile = tmp_path / "pid"
    session = session_with(f"service:app.pidfile={pidfile}", "probe:up.service=app")
    down = deploy.run_probe(session, session.settings.probe["up"], CONTEXT, expect_release=False, once=True)
    assert not down.ok and "No such file" in down.detail
    pidfile.write_text(str(os.getpid()))
    up = deploy.run_probe(session, session.settings.probe["up"], CONTEXT, expect_release=False, once=True)
    assert up.ok and "is up" in up.detail


# -- probe_mistakes and adhoc_probe ------------------------------------------

@pytest.mark.parametrize("kind, target, assignments, message", [
    ("url", "http://a/", [], ""),
    ("url", "https://a:8443/x?y", ["connect=unix:/run/a", "release=json:a.b"], ""),
    ("url", "http://[::1]:80/", ["connect=[::1]:80", "release=header:X-Version"], ""),
    ("url", "ftp://a/", [], "must begin with http"),
    ("url", "file:///etc/passwd", [], "must begin with http"),
    ("url", "a/b", [], "must begin with http"),
    ("url", "http:///x", [], "no host"),
    ("url", "http://a:99999/", [], "ort"),
    ("url", "http://[::1/", [], "IPv6"),
    ("url", "http://a/x y", [], "spaces"),
    ("url", "http://bücher/", [], "ASCII"),
    ("url", "http://a/", ["connect=b"], "expected host:port"),
    ("url", "http://a/", ["connect=unix:relative"], "expected host:port"),
    ("url", "http://a/", ["release=json:"], "expected json:PATH"),
    ("url", "http://a/", ["release=cookie:x"], "expected json:PATH"),
    ("url", "http://a/", ["successes=3", "deadline=100ms", "timeout=50ms", "period=10ms"], ""),
    ("url", "http://a/", ["release=header:X-V", "max_body=0"], ""),
    ("url", "http://a/", ["expect_header.X-V=1", "method=HEAD"], ""),
    ("url", "http://a/", ["header.X=a\nEvil: b"], "the value of header.X holds a line break"),
    ("url", "http://a/", ["header.X=a\tb \u00e4"], ""),
    ("url", "https://a/", ["tls_cert=/c", "tls_verify=no"], ""),
    ("tcp", "unix:/a", [], ""),
    ("tcp", "a:80", [], ""),
    ("tcp", "a", [], "expected host:port"),
    ("tcp", ":80", [], "expected host:port"),
    ("tcp", "::1:80", [], "[IPv6 address]"),
    ("tcp", "a:0", [], "expected host:port"),
    ("tcp", "http://a:80", [], "expected host:port"),
    ("tcp", "a:80", ["release=body"], "release means nothing to a tcp probe"),
    ("tcp", "a:80", ["expect_header.Server=x", "tls_verify=no"], "expect_header and tls_verify mean nothing"),
    ("command", "true", ["status=204"], "status means nothing to a command probe"),
    ("command", "true", ["release=header:X"], "no headers"),
    ("command", "true", ["body=x", "release=body"], ""),
    ("service", "app", [], "there is no [service:app]"),
])
def test_probe_mistakes(kind, target, assignments, message):
    probe = deploy.adhoc_probe(kind, target, assignments)
    found = deploy.probe_mistakes(session_with().settings, probe)
    assert (message in found[0] and len(found) == 1) if message else found == [], found


def test_adhoc_probe_has_the_tables_defaults_and_reports_mistakes():
    probe = deploy.adhoc_probe("url", "http://a/?b=c", ["status=200,404", "json.a.b=x=y", "header.X=1"])
    assert (probe.name, probe.url, probe.status, probe.period) == ("ad-hoc", "http://a/?b=c", [(200, 200), (404, 404)], 2.0)
    assert (probe.json, probe.header) == ({"a.b": "x=y"}, {"X": "1"})
    for text in ("nonsense=1", "status=abc", "status", "tcp=a:1", "timeout=0s", "deadline=0s", "deadline=481h",
                 "body=" + 5000 * "(", "body=a{99999999999}"):
        with pytest.raises(deploy.UsageError):
            deploy.adhoc_probe("url", "http://a/", [text])


def test_a_release_that_nothing_is_live_to_compare_with_is_refused(server, tmp_path):
    for words in ([], ["--root", tmp_path / "none"]):
        for where in ("json:nope", "header:X-Nope", "body"):
            result = run_deploy(*words, "probe", "--url", server.url, "--expect", "release=" + where, check=2)
            assert "no release is known to be live" in result.data["error"]["message"] and "--root" in result.data["error"]["hint"]



def test_the_command_tells_the_tries_and_how_the_answer_began(server: Server) -> None:
    server.status, server.body = 500, b"cannot import name config"
    data = run_deploy("probe", "--url", server.url, check=7).data
    assert data["error"]["message"] == \
        "probe ad-hoc failed after 1 try: status 500, expected 200-299; the answer began: 'cannot import name config'"


# -- failing early ------------------------------------------------------------------

QUICK = "period = 10ms\nbackoff = 1\njitter = 0\nfailures = 3\nsuccesses = 1\n"


def verdict(app, text, deadline, check=5, version="1.0"):
    """The failed probe of a deployment: what was said, and after how many tries."""
    app.configure(f"durable = no\n[probe:x]\n{QUICK}deadline = {deadline}\n{text}")
    app.run("deploy", app.artifact(version), check=check)
    evidence = app.history()[-1]["failure"]["evidence"]
    return evidence["error"], evidence["tries"]


@pytest.mark.parametrize("status, more, early", [
    (500, "expect", True), (404, "expect", True), (502, "expect", True), (503, "expect", False), (500, "other", False)])
def test_the_releases_own_answers_end_a_probe_before_its_deadline(app, serve, status, more, early):
    server = serve(http(status, b"", f"X-Version: {'1.0' if more == 'expect' else '0.9'}"))
    why, tries = verdict(app, f"url = {url_of(server)}\nrelease = header:X-Version\n", "600s" if early else "500ms")
    assert (tries == 3) is early and ("the new release itself failed" in why) is early, why
    assert f"status {status}" in why


def test_an_answer_of_nobody_known_leaves_the_deadline_its_time(app, serve):
    """Nothing was restarted, and the answer does not say whose it is."""
    why, tries = verdict(app, f"url = {url_of(serve(http(500)))}\n", "500ms")
    assert tries > 3 and "not healthy within 0.50s" in why


def test_answers_in_a_row_are_counted(app, serve):
    def answer(connection, number):
        connection.sendall(http(200 if number > 5 else 500 if number % 3 else 503, b"", "X-Version: 1.0"))
    app.configure(f"durable = no\n[probe:x]\n{QUICK}url = {url_of(serve(answer))}\nrelease = header:X-Version\n")
    app.run("deploy", app.artifact("1.0"), check=0)


@pytest.mark.parametrize("names, early", [("$DEPLOY_VERSION", True), ("0.9", False)])
def test_a_command_fails_early_where_its_output_names_the_release(app, names, early):
    command = f"command = sh -c 'echo {names}; exit 1'\nrelease = body\n"
    why, tries = verdict(app, command, "600s" if early else "500ms")
    assert (tries == 3) is early and "exited with code 1" in why


def test_a_closed_port_is_silence(app):
    why, tries = verdict(app, "tcp = 127.0.0.1:1\n", "300ms")
    assert tries > 3 and "not healthy within" in why


# -- which release ------------------------------------------------------------------

@pytest.mark.parametrize("version, answer", [("v1.0", "1.0"), ("1.0", "v1.0"), ("v1.0", "v1.0"), ("V1.0", "v1.0")])
@pytest.mark.parametrize("where", ["json:version", "header:X-V", "body"])
def test_one_leading_v_makes_no_other_version(app, serve, version, answer, where):
    server = serve(http(200, json.dumps({"version": answer}).encode(), f"X-V: {answer}"))
    app.configure(f"durable = no\n[probe:x]\n{QUICK}url = {url_of(server)}\nrelease = {where}\n")
    app.run("deploy", app.artifact("1"), "--release-version", version, check=0)


def test_a_version_is_not_another_for_its_v(app, serve):
    why, _ = verdict(app, f"url = {url_of(serve(http(200, b'', 'X-V: vv1.0')))}\nrelease = header:X-V\n", "200ms")
    assert "answered with version vv1.0, expected 1.0" in why


def test_a_version_that_no_answer_can_name_is_found_before_anything(app, serve):
    """Where neither name nor flag gives a version, it is the start of the digest."""
    app.configure(f"[probe:x]\nurl = {url_of(serve(http()))}\nrelease = body\n")
    artifact = app.artifact("1.0")
    unnamed = artifact.with_name("latest.tar.gz")
    artifact.rename(unnamed)
    artifact.with_name(artifact.name + ".sha256").rename(unnamed.with_name("latest.tar.gz.sha256"))
    text = unnamed.with_name("latest.tar.gz.sha256").read_text()
    unnamed.with_name("latest.tar.gz.sha256").write_text(text.replace(artifact.name, unnamed.name))
    error = app.run("deploy", unnamed, check=3).data["error"]
    assert "[probe:x] release: no answer can name" in error["message"] and "--release-version" in error["hint"]
    assert app.releases() == []


# -- what a failure says ----------------------------------------------------------------

@pytest.mark.parametrize("status, headers, hint", [
    (301, ["Location: /x"], "redirects = 1"), (401, [], "auth_file"), (403, [], "auth_file"),
    (500, [], "the service's own log")])
def test_the_hint_goes_with_the_answer(serve, status, headers, hint):
    done = run_deploy("probe", "--url", url_of(serve(http(status, b"", *headers))), check=7)
    assert hint in done.data["error"]["hint"]


def test_the_hint_names_what_tls_needs(serve, certificates):
    done = run_deploy("probe", "--url", url_of(serve(http(), tls=tls_context(certificates)), scheme="https"), check=7)
    assert "TLS: " in done.data["error"]["message"] and "tls_ca" in done.data["error"]["hint"]


def test_show_prints_of_a_failed_probe_what_is_known(app):
    verdict(app, "tcp = 127.0.0.1:1\n", "300ms")
    shown = app.run("show", app.history()[-1]["deploy_id"], json=False, check=0).stdout
    assert "Connection refused" in shown and "tries" in shown and "None" not in shown


@pytest.mark.parametrize("flood", ["seq 1 300000", "yes ''"])
def test_a_command_with_much_output_costs_no_more_than_reading_it(tmp_path, flood):
    started = time.monotonic()
    result = ask("command", f"sh -c '{flood} | head -n 300000'", "body=!nothing of that", "timeout=60s")
    assert result.ok, described(result)
    assert time.monotonic() - started < 30, "it was 6 s for a tenth of it, and more than that for ten times as much"
