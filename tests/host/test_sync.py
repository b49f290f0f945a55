"""sync: a real nginx with TLS, an origin that lies by raw sockets, indexes that go back, and a timer that never tires."""

import json
import os
import re
import signal
import ssl
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional

import pytest

from origins import (Host, Liar, Nginx, Relay, Source, chunked, drip, endless, head, make_certificate, redirect, server_tls, sha256,
                     tunnel, whole)
from scenes import configure
from support import (DEPLOY, TOP, App, Result, clean_environment, compiled, deep, deploy_argv, fake_command, load_deploy, make_artifact, needs, sha256_of, sized, snapshot, start_deploy,
                     wait_until)
from tables import section

SUMS = "[artifact]\nmatch = myapp-@v.tar.gz\n"


# -- a source -----------------------------------------------------------------

@pytest.fixture(scope="module")
def certificate(tmp_path_factory: Any) -> Path:
    """A certificate for 127.0.0.1, its key beside it."""
    return make_certificate(tmp_path_factory.mktemp("tls"))


@pytest.fixture(scope="module")
def nginx(tmp_path_factory: Any, certificate: Path) -> Iterator[Nginx]:
    """One nginx for all tests; each has a directory of its own there."""
    running = Nginx(tmp_path_factory.mktemp("nginx"), certificate)
    yield running
    running.stop()


def follow(app: App, url: Any, text: str = "", more: str = SUMS) -> None:
    """Configure a source."""
    configure(app, f"{more}\n[source]\nurl = {url}\n{text}\n")


@pytest.fixture
def origin(nginx: Nginx, app: App, tmp_path: Path) -> Source:
    """A source behind nginx, which the application follows."""
    source = Source(nginx.files / tmp_path.name)
    source.url = f"https://127.0.0.1:{nginx.port}/{tmp_path.name}"  # type: ignore
    follow(app, source.url, f"tls_ca = {nginx.certificate}")  # type: ignore
    nginx.asked()
    return source


@pytest.fixture
def beside(app: App, tmp_path: Path) -> Source:
    """A source that is a directory, which the application follows."""
    source = Source(tmp_path / "source")
    follow(app, source.directory)
    return source


def cache(app: App) -> List[str]:
    """What lies in the cache."""
    return sorted(path.name for path in (app.root / ".deploy" / "cache").glob("*"))


# -- nginx ----------------------------------------------------------------------

def test_the_first_the_same_and_the_next_release(app: App, origin: Source, nginx: Nginx) -> None:
    artifact = origin.add("1.0")
    origin.sums()
    assert "1.0 is new" in app.run("sync", "--check", check=7).data["msg"] and not (app.root / ".deploy").exists()
    nginx.asked()
    result = app.run("sync", check=0)
    assert app.version == "1.0" and result.data["changed"] and cache(app) == []
    record, line = app.record(app.current), app.history()[-1]
    assert record["artifact"]["name"] == artifact.name and record["artifact"]["source"].endswith(f"/{artifact.name}")
    assert (line["operation"], line["result"], line["artifact_sha256"]) == ("sync", "synced", sha256_of(artifact))
    assert [line.split()[2] for line in nginx.asked()] == ["200", "200"]
    for word in ([], ["-q"], ["--check"]):
        quiet = app.run(*word, "sync", check=0, json=False) if word != ["--check"] else app.run("sync", "--check", check=0)
        assert word != ["-q"] or quiet.stdout + quiet.stderr == ""
    asked = nginx.asked()
    assert [line.split()[2:4] for line in asked] == [["304", "0"]] * 2 + [["304", "0"]], asked
    origin.add("1.1")
    origin.sums()
    before = snapshot(app.root)
    assert "1.1" in app.run("-n", "sync", json=False, check=0).stdout and snapshot(app.root) == before
    app.run("sync", check=0)
    assert app.version == "1.1" and len(app.history()) == 2


@pytest.fixture
def relayed(app: App, origin: Source, nginx: Nginx) -> Relay:
    """The source behind a relay."""
    relay = Relay(nginx.port)
    follow(app, origin.url.replace(str(nginx.port), str(relay.port)), f"tls_ca = {nginx.certificate}")  # type: ignore
    return relay


def cut_and_kill(app: App, relay: Relay, size_bytes: int) -> None:
    """Let so much of all answers through, and kill the run once no more comes."""
    relay.left, _ = size_bytes, relay.cut.clear()
    process = start_deploy("sync", config=app.config)
    assert relay.cut.wait(30)
    part = app.root / ".deploy" / "cache"
    wait_until(lambda: part.exists() and any(path.stat().st_size for path in part.glob("*.part")), what="a part")
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    relay.left = -1


@deep
def test_a_download_that_was_cut_at_any_tenth_is_gone_on_with(app: App, origin: Source, nginx: Nginx, relayed: Relay) -> None:
    size_bytes = 400000
    for tenth in range(1, 10):
        artifact = origin.add(f"1.{tenth}", size_bytes)
        origin.sums()
        cut_and_kill(app, relayed, size_bytes * tenth // 10 + 9000)
        assert app.version == (f"1.{tenth - 1}" if tenth > 1 else None)
        kept, = (app.root / ".deploy" / "cache").glob("*.part")
        begin = kept.stat().st_size
        assert 0 < begin < artifact.stat().st_size and kept.name.startswith(sha256_of(artifact))
        nginx.asked()
        app.run("sync", check=0)
        line = [line for line in nginx.asked() if artifact.name in line][-1].split()
        assert line[2:5] == ["206", str(artifact.stat().st_size - begin), f"[bytes={begin}-]"]
        assert app.version == f"1.{tenth}" and cache(app) == []


def test_what_was_changed_or_lost_its_etag_meanwhile_starts_over(app: App, origin: Source, nginx: Nginx, relayed: Relay) -> None:
    artifact = origin.add("1.0", 400000)
    origin.sums()
    cut_and_kill(app, relayed, 200000)
    os.utime(str(artifact), (1, 1))  # nginx's ETag is of time and size
    nginx.asked()
    app.run("sync", check=0)
    assert [line.split()[2] for line in nginx.asked()] == ["304", "200"] and app.version == "1.0"
    # Without an ETag nothing can be gone on with.
    source = Source(nginx.files / "noetag" / origin.directory.name)
    follow(app, relayed_url(nginx, relayed, f"noetag/{origin.directory.name}"), f"tls_ca = {nginx.certificate}")
    source.add("1.1", 400000)
    source.sums()
    cut_and_kill(app, relayed, 200000)
    nginx.asked()
    app.run("sync", check=0)
    assert [line.split()[2:3] + line.split()[4:5] for line in nginx.asked()] == [["200", "[-]"], ["200", "[-]"]]
    assert app.version == "1.1"


def relayed_url(nginx: Nginx, relay: Relay, path: str) -> str:
    """A directory of nginx's, through the relay."""
    return f"https://127.0.0.1:{relay.port}/{path}"


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -9)], ids=["TERM", "INT", "KILL"])
def test_a_signal_ends_a_download_at_once_and_its_part_stays(number: int, code: int, app: App, origin: Source, relayed: Relay) -> None:
    origin.add("1.0", 400000)
    origin.sums()
    relayed.left = 200000
    process = start_deploy("sync", config=app.config)
    assert relayed.cut.wait(30)
    wait_until(lambda: any(path.stat().st_size for path in (app.root / ".deploy" / "cache").glob("*.part")), what="a part")
    assert app.run("rollback", check=75).data["error"]
    began = time.monotonic()
    os.kill(process.pid, number)  # not the process that asks for it
    assert process.wait() == code and time.monotonic() - began < 5
    relayed.left = -1
    app.run("sync", check=0)
    assert app.version == "1.0" and cache(app) == []


def test_a_wire_that_breaks_is_picked_up_in_the_same_run(app: App, origin: Source, nginx: Nginx, relayed: Relay) -> None:
    origin.add("1.0", 400000)
    origin.sums()
    follow(app, origin.url.replace(str(nginx.port), str(relayed.port)),  # type: ignore
           f"tls_ca = {nginx.certificate}\ntimeout = 1s\nmin_rate = 10k")
    relayed.left = 200000
    threading.Thread(target=lambda: (relayed.cut.wait(), setattr(relayed, "left", -1)), daemon=True).start()
    result = app.run("sync", check=0, json=False)
    assert "again in 1 s" in result.stderr and app.version == "1.0"
    assert [line.split()[2] for line in nginx.asked()][-1] == "206"


# -- an origin that lies ----------------------------------------------------------

def index_of(liar: Liar, **changed: Any) -> bytes:
    """An index in JSON that promises the good artifact."""
    release = {"version": "1.0", "name": "myapp-1.0.tar.gz", "url": "a", "sha256": sha256(liar.good), "size": len(liar.good)}
    return json.dumps({"schema": 1, "sequence": 1, "releases": [dict(release, **changed)]}).encode("ascii")


def for_index(answer: Callable[[Liar], Any]) -> Any:
    """A case whose index is the lie."""
    return lambda liar, path, request: answer(liar)


def for_artifact(answer: Callable[[Liar, str], Any], **changed: Any) -> Any:
    """A case whose artifact is the lie."""
    return lambda liar, path, request: whole(index_of(liar, **changed)) if "index" in path else answer(liar, request)


def after_half(answer: Callable[[Liar, str], List[bytes]]) -> Any:
    """A case that sends half of the artifact with an ETag, and then lies when it is asked for the rest."""
    def artifact(liar: Liar, request: str) -> List[bytes]:
        if "\r\nRange: " in request:
            return answer(liar, request)
        if sum("\r\nRange: " not in asked and " /a " in asked for asked in liar.requests) > 1:
            return [head(404, 0)]  # it asked for all of it
        return [head(200, len(liar.good), 'ETag: "x"'), liar.good[:len(liar.good) // 2]]
    return for_artifact(artifact)


def part(liar: Liar, begin: int = 0, etag: str = '"x"', total: Optional[int] = None, body: Optional[bytes] = None) -> List[bytes]:
    """A 206 that begins so far from the right place."""
    begin += len(liar.good) // 2
    body = liar.good[begin:] if body is None else body
    total = len(liar.good) if total is None else total
    return [head(206, len(body), f"Content-Range: bytes {begin}-{len(liar.good) - 1}/{total}", f"ETag: {etag}"), body]


BIG = b"x" * 100000
CASES = {
    # the index
    "honest": (for_artifact(lambda liar, request: whole(liar.good)), 0),
    "honest-chunks": (for_artifact(lambda liar, request: chunked(liar.good)), 0),
    "index-404": (for_index(lambda liar: [head(404, 0)]), 1),
    "index-403": (for_index(lambda liar: [head(403, 0)]), 1),
    "index-500": (for_index(lambda liar: [head(500, 0)]), 1),
    "index-429": (for_index(lambda liar: [head(429, 0)]), 1),
    "index-304-unasked": (for_index(lambda liar: [head(304)]), 1),
    "index-206-unasked": (for_index(lambda liar: whole(index_of(liar), "Content-Range: bytes 0-9/10", status=206)), 1),
    "index-204": (for_index(lambda liar: [head(204)]), 1),
    "index-empty": (for_index(lambda liar: whole(b"")), 4),
    "index-no-json": (for_index(lambda liar: whole(b"<html>log in</html>")), 4),
    "index-gzip": (for_index(lambda liar: whole(b"\x1f\x8b\x08" + b"z" * 99, "Content-Encoding: gzip")), 4),
    "index-deep": (for_index(lambda liar: whole(b"[" * 100000)), 4),
    "index-no-sha256": (for_artifact(lambda liar, request: whole(liar.good), sha256="x"), 4),
    "index-odd-version": (for_artifact(lambda liar, request: whole(liar.good), version="../../etc"), 4),
    "index-numbers": (for_index(lambda liar: whole(b'{"schema": 1, "releases": [{"version": 1, "name": 2, "sha256": 3}]}')), 4),
    "index-of-a-file": (for_artifact(lambda liar, request: whole(liar.good), url="file:///etc/passwd"), 1),
    "index-too-large": (for_index(lambda liar: [head(200, 1 << 40), *[BIG] * 60]), 4),
    "index-endless-chunks": (for_index(lambda liar: [head(200, None, "Transfer-Encoding: chunked"), *[b"186a0\r\n" + BIG + b"\r\n"] * 60]), 4),
    "index-without-length": (for_index(lambda liar: [head(200), index_of(liar)]), 1),
    "index-short": (for_index(lambda liar: [head(200, 5000), index_of(liar)]), 1),
    "no-answer": (for_index(lambda liar: []), 1),
    "no-http": (for_index(lambda liar: [b"SSH-2.0-OpenSSH_9.2\r\n"]), 1),
    "headers-endless": (for_index(lambda liar: [b"HTTP/1.1 200 OK\r\n", *[b"X: y\r\n"] * 5000]), 1),
    "header-endless": (for_index(lambda liar: [b"HTTP/1.1 200 OK\r\nX: ", *[BIG] * 5]), 1),
    "continue-endless": (for_index(lambda liar: endless(b"HTTP/1.1 100 Continue\r\n\r\n" * 100)), 1),
    "head-drips": (for_index(lambda liar: drip(b"HTTP/1.1 200 OK\r\n" * 99, 0.1)), 1),
    "body-drips": (for_index(lambda liar: [head(200, 5000), *drip(b"x" * 60, 0.1)]), 1),
    "body-hangs": (for_index(lambda liar: iter(lambda: time.sleep(3) or b"", None)), 1),
    # redirects
    "to-file": (for_index(lambda liar: redirect("file:///etc/passwd")), 1),
    "to-ftp": (for_index(lambda liar: redirect("ftp://127.0.0.1/x")), 1),
    "to-itself": (for_index(lambda liar: redirect("/index.json")), 1),
    "to-nowhere": (for_index(lambda liar: redirect("http://")), 1),
    "to-control": (for_index(lambda liar: redirect("/a b\x01")), 1),
    "without-place": (for_index(lambda liar: [head(302, 0)]), 1),
    # the artifact
    "artifact-404": (for_artifact(lambda liar, request: [head(404, 0)]), 1),
    "artifact-503": (for_artifact(lambda liar, request: [head(503, 0)]), 1),
    "artifact-other-bytes": (for_artifact(lambda liar, request: whole(liar.good[:-1] + b"?")), 4),
    "artifact-shorter": (for_artifact(lambda liar, request: whole(liar.good[:-1])), 4),
    "artifact-longer": (for_artifact(lambda liar, request: whole(liar.good + b"?")), 4),
    "artifact-length-too-small": (for_artifact(lambda liar, request: [head(200, 10), liar.good]), 4),
    "artifact-length-too-large": (for_artifact(lambda liar, request: [head(200, len(liar.good) + 10), liar.good]), 1),
    "artifact-two-lengths": (for_artifact(lambda liar, request: [head(200, 10, "Content-Length: 20"), liar.good[:20]]), 4),
    "artifact-length-negative": (for_artifact(lambda liar, request: [head(200, -5), liar.good]), 1),
    "artifact-length-absurd": (for_artifact(lambda liar, request: [head(200, "9" * 5000), liar.good]), 1),
    "artifact-gzipped": (for_artifact(lambda liar, request: whole(b"\x1f\x8b" + liar.good, "Content-Encoding: gzip")), 4),
    "artifact-chunks-cut": (for_artifact(lambda liar, request: chunked(liar.good, b"")), 1),
    "artifact-chunk-size-odd": (for_artifact(lambda liar, request: [chunked(b"")[0], b"zz\r\n" + liar.good]), 1),
    "artifact-chunk-size-negative": (for_artifact(lambda liar, request: [chunked(b"")[0], b"-5\r\n" + liar.good]), 1),
    "artifact-chunks-endless": (for_artifact(lambda liar, request: [chunked(b"")[0], *[b"186a0\r\n" + BIG + b"\r\n"] * 9]), 4),
    "artifact-content-range": (for_artifact(lambda liar, request: whole(liar.good, "Content-Range: bytes 0-9/10")), 1),
    "artifact-206-unasked": (for_artifact(lambda liar, request: whole(liar.good, "Content-Range: bytes 0-9/10", status=206)), 1),
    "artifact-416-unasked": (for_artifact(lambda liar, request: [head(416, 0)]), 1),
    "artifact-no-archive": (for_artifact(lambda liar, request: whole(b"hello"), sha256=sha256(b"hello"), size=5), 4),
    "rest-from-elsewhere": (after_half(lambda liar, request: part(liar, begin=-7)), 1),
    "rest-of-another": (after_half(lambda liar, request: part(liar, etag='"y"')), 1),
    "rest-without-etag": (after_half(lambda liar, request: part(liar, etag="")), 1),
    "rest-416": (after_half(lambda liar, request: [head(416, 0)]), 1),
    "rest-too-long": (after_half(lambda liar, request: part(liar, total=1 << 50, body=BIG)), 1),
    "rest-other-bytes": (after_half(lambda liar, request: part(liar, body=b"?" * (len(liar.good) - len(liar.good) // 2))), 1),
    "rest-whole": (after_half(lambda liar, request: whole(liar.good, 'ETag: "z"')), 0),
    "rest-honest": (after_half(lambda liar, request: part(liar)), 0),
}  # type: Dict[str, Any]


MEASURE = """
import os, sys
pid = os.fork()
if not pid:
    os.execv(sys.argv[2], sys.argv[2:])
status, usage = os.wait4(pid, 0)[1:]
with open(sys.argv[1], "w") as file:
    file.write(str(usage.ru_maxrss))
sys.exit(os.WEXITSTATUS(status) if os.WIFEXITED(status) else 255)
"""


# How often the source is asked before it is given up.
TRIED = {4: ["index-500", "index-429", "index-short"], 6: ["to-itself"],
         1: ["index-403", "no-http", "index-without-length", "to-file", "headers-endless", "index-of-a-file"]}

AT_MOST_FOUR = ["no-answer", "head-drips"]  # the time may be over before


class Told:
    """How a run against a liar ended."""

    def __init__(self, liar: Liar, app: App, result: Result, seconds: float, memory_kib: int) -> None:
        self.liar, self.app, self.result = liar, app, result
        self.seconds, self.memory_kib = seconds, memory_kib


@pytest.fixture(scope="module")
def told(request: Any, tmp_path_factory: Any) -> Dict[str, Told]:
    """The cases that are run here, several at once: most of the time is waiting."""
    from concurrent.futures import ThreadPoolExecutor
    top = tmp_path_factory.mktemp("liars")
    good = make_artifact(top, "1.0").read_bytes()

    def tell(name: str) -> Told:
        liar, app = Liar(CASES[name][0], good), App(top / name)
        follow(app, liar.url, "index = index.json\ninsecure = yes\ntimeout = 1s\nmin_rate = 10k\nproxy = none", more="")
        with open(str(app.directory / "stdout"), "w+b") as stdout, open(str(app.directory / "stderr"), "w+b") as stderr:
            began = time.monotonic()
            # By a small process between: whoever is forked begins with the memory of the one that forked it.
            process = subprocess.Popen(
                [sys.executable, "-c", MEASURE, str(app.directory / "memory"), *deploy_argv("sync", config=app.config)],
                stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr, env=clean_environment(), cwd="/")
            code = process.wait()
            texts = [(stream.seek(0), stream.read().decode())[1] for stream in (stdout, stderr)]
        memory_kib = int((app.directory / "memory").read_text())
        result = Result([name], code, texts[0], texts[1], json.loads(texts[0] or "{}"))
        return Told(liar, app, result, time.monotonic() - began, memory_kib)

    compiled()
    wanted = {item.callspec.params["name"] for item in request.session.items if item.name.startswith("test_an_origin_that_lies")}
    if any(item.name == "test_what_may_pass_is_tried_four_times_and_what_may_not_once" for item in request.session.items):
        wanted.update(*TRIED.values(), AT_MOST_FOUR)
    slow = sorted(wanted, key=lambda name: not re.search("drips|hangs|endless|no-answer", name))
    with ThreadPoolExecutor(4) as pool:
        return dict(zip(slow, pool.map(tell, slow)))


@pytest.mark.parametrize("name", CASES)
def test_an_origin_that_lies_gets_its_exit_code_and_leaves_nothing(name: str, told: Dict[str, Told]) -> None:
    found, expected = told[name], CASES[name][1]
    result, app = found.result, found.app
    assert result.exit_code == expected, result.describe()
    assert "Traceback" not in result.stderr and (expected == 0) == (app.version == "1.0")
    assert found.memory_kib < 120000 and found.seconds < 45
    if expected:
        assert re.search(r"(?m)^deploy\.py: error: .+\nhint: \S", result.stderr), result.describe()
        left = [kept for kept in cache(app) if not kept.endswith(".etag")] if (app.root / ".deploy").exists() else []
        # What came and may yet be right is kept; so is what is right, and no archive.
        assert app.releases() == [] and app.leftovers() == []
        assert len(left) <= (expected == 1 or name == "artifact-no-archive"), left
    assert len(found.liar.requests) <= 12


def test_what_may_pass_is_tried_four_times_and_what_may_not_once(told: Dict[str, Told]) -> None:
    for tries, names in TRIED.items():
        assert {name: len(told[name].liar.requests) for name in names} == dict.fromkeys(names, tries)
    assert all(len(told[name].liar.requests) <= 4 for name in AT_MOST_FOUR)
    for name in ("to-file", "index-of-a-file"):
        assert "its address: ValueError" in told[name].result.data["msg"], told[name].result.describe()


def test_a_token_goes_to_the_sources_own_host_alone_and_never_to_http(app: App, tmp_path: Path, certificate: Path) -> None:
    good = make_artifact(tmp_path / "a", "1.0").read_bytes()
    other = Liar(lambda liar, path, request: whole(good), good)
    own = Liar(lambda liar, path, request: whole(index_of(liar)) if "index" in path else redirect(f"{other.url}/x"), good)
    (tmp_path / "token").write_text("open-sesame\n")
    secure = f"index = index.json\ninsecure = yes\ntoken_file = {tmp_path}/token\nheader.X-Own = mine"
    follow(app, own.url, secure, more="")
    app.run("sync", check=0)
    assert all("\r\nAuthorization: Bearer open-sesame\r\n" in asked and "\r\nX-Own: mine\r\n" in asked for asked in own.requests)
    assert len(own.requests) == 2 and len(other.requests) == 1 and not re.search("open-sesame|X-Own", other.requests[0])
    (tmp_path / "source").write_text("from-systemd\n")
    app.run("sync", env={"CREDENTIALS_DIRECTORY": str(tmp_path)}, check=0)
    assert "\r\nAuthorization: Bearer from-systemd\r\n" in own.requests.pop()
    (tmp_path / "source").write_text("\n")
    app.run("sync", env={"CREDENTIALS_DIRECTORY": str(tmp_path)}, check=0)
    assert "Authorization" not in own.requests.pop(), "an empty one is none"
    assert "open-sesame" not in (app.root / ".deploy" / "history.jsonl").read_text() + (app.root / ".deploy" / "source.json").read_text()


def test_https_is_never_left_for_http_even_where_http_is_allowed(app: App, nginx: Nginx, tmp_path: Path) -> None:
    plain = Liar(lambda liar, path, request: whole(b"x"), b"")
    source = Source(nginx.files / tmp_path.name)
    source.add("1.0")
    source.index(source.release("1.0", url=f"{plain.url}/x"))
    for text, code, what in (("", 1, "is not https"), ("insecure = yes\n", 4, "checksum")):
        follow(app, f"https://127.0.0.1:{nginx.port}/{tmp_path.name}", f"{text}index = index.json\ntls_ca = {nginx.certificate}", more="")
        assert what in app.run("sync", check=code).data["msg"]
    context = server_tls(nginx.certificate)
    leading = Liar(lambda liar, path, request: redirect(f"{plain.url}/index.json"), b"", context)
    follow(app, leading.url, f"insecure = yes\nindex = index.json\ntls_ca = {nginx.certificate}", more="")
    assert "is not https" in app.run("sync", check=1).data["msg"] and len(leading.requests) == 1 and len(plain.requests) == 1


def test_a_server_that_asks_for_a_certificate_gets_the_clients(app: App, certificate: Path, tmp_path: Path) -> None:
    context = server_tls(certificate)
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(str(certificate))
    liar = Liar(for_artifact(lambda liar, request: whole(liar.good)), make_artifact(tmp_path / "a", "1.0").read_bytes(), context)
    (tmp_path / "token").write_text("open-sesame\n")
    for own, code in ((str(certificate), 0), ("", 1)):
        configure(app, f"[source]\nurl = {liar.url}\nindex = index.json\nchannel =\norder = semver\ntoken_file = {tmp_path}/token\n"
                       f"header.X-Own = mine\nproxy = none\ntimeout = 5s\nmin_rate = 1k\ntls_ca = {certificate}\n"
                       f"tls_cert = {own}\ntls_key = {own and certificate.with_name('key')}\n")
        app.run("sync", check=code)
    assert all("\r\nX-Own: mine\r\n" in asked for asked in liar.requests) and len(liar.requests) == 2


def test_a_certificate_that_is_not_trusted_is_final(app: App, origin: Source, nginx: Nginx) -> None:
    follow(app, origin.url)  # type: ignore
    began = time.monotonic()
    result = app.run("sync", check=1)
    assert "certificate" in result.data["msg"] and nginx.asked() == [] and time.monotonic() - began < 5


@pytest.mark.parametrize("text, problem", [
    ("url = http://h/", "https"), ("url = https://h/\nchannel = stable", "channel"), ("url = ftp://h/", "http"),
    ("url = https://h/\nheader.X = a\x07b", "control"), ("url = https://h/\nproxy = socks://h", "http"),
    ("url = https://h/", "match")], ids=lambda text: text.split("\n")[-1] if "url" in text else "")
def test_a_source_that_cannot_be_is_exit_2(app: App, text: str, problem: str) -> None:
    configure(app, f"{'' if problem == 'match' else SUMS}\n[source]\n{text}\n")
    assert problem in app.run("sync", check=2).data["msg"]


def test_insecure_counts_in_a_file_alone(app: App, beside: Source) -> None:
    assert "file" in app.run("--set", "source.insecure=yes", "sync", check=2).data["msg"]


def test_without_a_source_sync_says_what_to_name(app: App) -> None:
    assert "[source]" in app.run("sync", check=2).data["error"]["hint"]


# -- proxies ------------------------------------------------------------------------

def test_a_proxy_is_used_where_it_is_chosen(app: App, origin: Source, nginx: Nginx, tmp_path: Path) -> None:
    origin.add("1.0")
    origin.sums()
    proxy = tunnel(nginx.port)
    address = proxy.url.replace("http://", "http://me:secret@")
    secure = f"tls_ca = {nginx.certificate}\nproxy = "
    for choice, env, asked in ((address, {}, 1), ("environment", {"https_proxy": address}, 1), ("none", {"https_proxy": address}, 0),
                               ("environment", {"https_proxy": address, "no_proxy": "127.0.0.1"}, 0), ("environment", {}, 0)):
        follow(app, origin.url, secure + choice)  # type: ignore
        before = len(proxy.requests)
        result = app.run("sync", "--check", env=env, check=7)
        assert (len(proxy.requests) - before > 0) == bool(asked), (choice, env)
        assert "secret" not in result.stdout + result.stderr
    assert all(asked.startswith(f"CONNECT 127.0.0.1:{nginx.port} ") for asked in proxy.requests)
    liar = Liar(for_artifact(lambda liar, request: whole(liar.good)), (origin.directory / "myapp-1.0.tar.gz").read_bytes())
    plain = tunnel(liar.port)
    follow(app, liar.url, f"index = index.json\ninsecure = yes\nproxy = {plain.url.replace('//', '//me:secret@')}", more="")
    app.run("sync", check=0)
    follow(app, liar.url, f"index = index.json\ninsecure = yes\nproxy = {plain.url}", more="")
    assert "407" in app.run("sync", check=1).data["msg"] and plain.requests.pop()
    assert [asked.split()[1] for asked in plain.requests] == [f"{liar.url}/index.json", f"{liar.url}/a"]
    assert "secret" not in (app.root / ".deploy" / "source.json").read_text()


# -- which release ---------------------------------------------------------------------

def test_the_index_of_a_directory_and_what_is_no_candidate(app: App, beside: Source) -> None:
    for version in ("1.9", "1.10", "2.0-rc.1", "nightly"):
        beside.add(version)
    beside.sums()
    result = app.run("sync", json=False, check=0)
    assert app.version == "1.10" and "myapp-nightly.tar.gz: nightly" in result.stderr
    assert app.record(app.current)["artifact"]["source"] == f"{beside.directory}/myapp-1.10.tar.gz"
    assert app.run("--set", "source.prereleases=yes", "sync", "--check", check=7)
    assert "9.9" in app.run("sync", "--version", "9.9", check=4).data["msg"]
    assert "older" in app.run("sync", "--version", "1.9", check=4).data["msg"]
    app.run("sync", "--version", "1.9", "--allow-downgrade", check=0)
    assert app.version == "1.9" and app.run("sync", check=0).data["changed"] and app.version == "1.10"
    assert [line["result"] for line in app.history()] == ["synced", "refused", "refused", "synced", "synced"]


@pytest.mark.parametrize("order, versions, newest", [
    ("semver", ["1.0", "1.0.1-beta", "1.0.1"], "1.0.1"), ("uapi", ["1.4.2", "1.4.2-rc.1"], "1.4.2-rc.1"),
    ("uapi", ["1.4", "1.4~rc1", "1.3a"], "1.4"), ("uapi", ["1", "1-1", "1.1", "1a"], "1a"), ("uapi", ["9", "10"], "10")])
def test_versions_have_an_order(app: App, beside: Source, order: str, versions: List[str], newest: str) -> None:
    follow(app, beside.directory, f"order = {order}\nprereleases = {'yes' if order == 'uapi' else 'no'}")
    for version in versions:
        beside.add(version)
    beside.sums()
    app.run("sync", check=0)
    assert app.version == newest


def test_a_channel_may_point_back_and_a_withdrawn_release_is_passed_over(app: App, beside: Source) -> None:
    follow(app, beside.directory, "index = index.json\nchannel = stable", more="")
    beside.index()
    assert "has no stable that fits" in app.run("sync", check=4).data["msg"]
    for version in ("1.0", "1.1", "1.2"):
        beside.add(version)
    releases = [beside.release(version) for version in ("1.0", "1.1", "1.2")]
    for stable in ("1.1", "1.2", "1.1"):
        beside.index(*releases, channels={"stable": stable})
        app.run("sync", check=0)
        assert app.version == stable
    assert app.record(app.current)["built_at"] == app.history()[-1]["built_at"] == "2026-01-02T03:04:05Z"
    configure(app, f"[source]\nurl = {beside.directory}\nindex = index.json\nmax_age = 480h\n")
    assert "unknown time" in app.run("sync", check=4).data["msg"]  # it is not signed
    follow(app, beside.directory, "index = index.json", more="")
    beside.index(releases[0], releases[1], dict(releases[2], withdrawn=True))
    assert not app.run("sync", check=0).data["changed"]
    beside.index(releases[0], dict(releases[1], withdrawn=True), dict(releases[2], withdrawn=True))
    app.run("sync", check=0)
    assert app.version == "1.0"


def refused_once(app: App, *arguments: str) -> str:
    """Sync three times: refused with 4 each time, and told of once, to the history and to whoever is notified."""
    before = len(app.history())
    told = [app.run("sync", *arguments, check=4).data["msg"] for _ in range(3)]
    assert len(set(told)) == 1 and [line["result"] for line in app.history()[before:]] == ["refused"]
    return told[0]


OLD = "2020-01-01T00:00:00Z"
GOING_BACK = {  # what is changed in the index of 1.0 and 1.1, once that was seen
    "rollback": (lambda source: source.index(source.release("1.0"), sequence=1), "lower sequence"),
    "freeze": (lambda source: source.index(source.release("1.1"), expires=OLD), "expired"),
    "mix-up": (lambda source: source.index(source.release("1.1"), application="another"), "of another"),
    "other-bytes": (lambda source: source.index(source.release("1.1", sha256="0" * 64)), "other bytes"),
    "two-digests": (lambda source: source.index(source.release("1.1"), source.release("1.1", sha256="0" * 64)), "two digests"),
    "nothing": (lambda source: source.index(), "no release"),
    "no-sequence": (lambda source: source.index(sequence="9"), "damaged"),
    "no-such-day": (lambda source: source.index(source.release("1.1", built_at="0000-00-00T00:00:00Z")), "damaged"),
    "schema": (lambda source: source.index(source.release("1.1"), schema=2), "damaged"),
    "no-digest": (lambda source: source.index(source.release("1.1", sha256=None)), "damaged: sha256 None of 'myapp-1.1.tar.gz'"),
}  # type: Dict[str, Any]


@pytest.mark.parametrize("attack", GOING_BACK)
def test_an_index_that_goes_back_is_refused_and_told_once(app: App, beside: Source, attack: str, tmp_path: Path) -> None:
    tells = f"[notify:me]\ntype = command\ncommand = sh -c 'echo $DEPLOY_EVENT >> {tmp_path}/told'\n"
    follow(app, beside.directory, f"index = index.json\n{tells}", more="")
    beside.add("1.0"), beside.add("1.1")
    beside.index(beside.release("1.0"))
    beside.index(beside.release("1.0"), beside.release("1.1"))
    app.run("sync", check=0)
    (tmp_path / "told").unlink()
    spoil, problem = GOING_BACK[attack]
    spoil(beside)
    assert problem in refused_once(app)
    assert (tmp_path / "told").read_text() == "refused\n" and app.version == "1.1"
    beside.sequence = 50
    beside.index(beside.release("1.1"))
    assert not app.run("sync", check=0).data["changed"]


@pytest.mark.parametrize("lines, problem", [
    (["{0}  myapp-1.0.tar.gz\n"], "newest"), (["{1}  myapp-1.1.tar.gz\n", "{0}  myapp-1.1.tar.gz\n"], "two digests"),
    (["{0}  myapp-1.0.tar.gz\n", "{1}  myapp-1.1.tar.gz"], "cut off|no end"), (["{0}  myapp-1.1.tar.gz\n"], "other bytes"),
    (["{1}  myapp-1.1.tar.gz\n", "0" * 64 + "  BEST-BEFORE-2020-01-01\n"], "expired"), (["\n"], "no release"),
    (["{1}  myapp-1.1.tar.gz\n", "0" * 64 + "  BEST-BEFORE-31.12.2120\n"], "damaged: .* is no time")])
def test_a_list_that_goes_back_is_refused_and_told_once(app: App, beside: Source, lines: List[str], problem: str) -> None:
    digests = [sha256_of(beside.add(version)) for version in ("1.0", "1.1")]
    beside.sums()
    app.run("sync", check=0)
    beside.sums(*[line.format(*digests) for line in lines])
    assert re.search(problem, refused_once(app))
    (app.root / ".deploy" / "source.json").unlink()  # what the hint says
    beside.sums("0" * 64 + "  BEST-BEFORE-2120-01-01\n", f"{digests[0]}  myapp-1.0.tar.gz\n")
    assert "older" in app.run("sync", check=4).data["msg"]  # than what is live


def test_another_source_begins_anew(app: App, beside: Source) -> None:
    beside.add("1.1")
    beside.sums()
    app.run("sync", check=0)
    other = Source(beside.directory.with_name("other"))
    other.add("1.0")
    other.sums()
    follow(app, other.directory)
    app.run("sync", "--allow-downgrade", check=0)
    assert app.version == "1.0"


def test_wrong_bytes_are_not_fetched_again_before_the_index_changes(app: App, origin: Source, nginx: Nginx) -> None:
    artifact = origin.add("1.0")
    origin.sums()
    good = artifact.read_bytes()
    artifact.write_bytes(good + b"\n")
    assert "checksum" in refused_once(app)
    assert sum("myapp" in line for line in nginx.asked()) == 1 and cache(app) == []
    state = json.loads((app.root / ".deploy" / "source.json").read_text())
    assert state["refused"]["sha256"] == state["newest"]["sha256"] and state["checked_at"] and state["etag"]
    artifact.write_bytes(good)
    app.run("sync", "--force", check=0)
    assert app.version == "1.0"


def test_what_failed_and_what_a_person_left_is_not_taken_again(app: App, beside: Source) -> None:
    beside.add("1.0")
    beside.sums()
    app.run("sync", check=0)
    beside.add("1.1")
    beside.sums()
    app.run("sync", check=0)
    app.run("rollback", check=0)
    assert "rolled back from" in refused_once(app) and app.run("sync", "--check", check=4)
    app.run("sync", "--force", check=0)
    beside.add("1.2")
    beside.sums()
    follow(app, beside.directory, "[probe:sick]\ncommand = sh -c 'test $DEPLOY_VERSION != 1.2'\ndeadline = 300ms\nsuccesses = 1")
    assert app.run("sync", check=5).data["rolled_back"] and app.version == "1.1"
    assert "marked bad" in refused_once(app)


def test_a_hold_stops_it_before_anything_is_fetched(app: App, origin: Source, nginx: Nginx) -> None:
    app.deploy("0.9")
    origin.add("1.0")
    origin.sums()
    app.run("hold", "-m", "the sale is on", check=0)
    nginx.asked()
    assert "the sale is on" in app.run("sync", check=3).data["msg"]
    assert not any("myapp" in line for line in nginx.asked())
    app.run("unhold", check=0)
    app.run("sync", check=0)


def test_what_does_not_go_live_for_the_hosts_sake_is_not_fetched_twice(app: App, origin: Source, nginx: Nginx) -> None:
    origin.add("1.0")
    origin.sums()
    hooked = "[hooks]\npre_activate = false\n"
    follow(app, origin.url, f"tls_ca = {nginx.certificate}\n{hooked}")  # type: ignore
    app.run("sync", check=1)
    app.run("sync", check=1)
    assert sum("myapp" in line for line in nginx.asked()) == 1 and len(cache(app)) == 2
    # Another release is newer now: what is here stays for as long as the index has it.
    origin.add("1.1")
    origin.sums()
    app.run("sync", check=1)
    assert len(cache(app)) == 4
    origin.sums(f"{sha256_of(origin.directory / 'myapp-1.1.tar.gz')}  myapp-1.1.tar.gz\n")
    app.run("sync", check=1)
    assert len(cache(app)) == 2
    follow(app, origin.url, f"tls_ca = {nginx.certificate}")  # type: ignore
    app.run("sync", check=0)
    assert cache(app) == [] and app.version == "1.1"


def test_damaged_notes_of_the_source_are_begun_anew(app: App, beside: Source) -> None:
    beside.add("1.0")
    beside.sums()
    app.run("sync", check=0)
    path = app.root / ".deploy" / "source.json"
    for text in (path.read_text().replace('"newest": {', '"newest": [], "x": {'), "[]", "{", ""):
        path.write_text(text)
        assert app.run("sync").exit_code in (0, 3)


def test_recovery_keeps_what_was_fetched_and_nothing_else(app: App) -> None:
    app.deploy("1.0")
    place = app.root / ".deploy" / "cache"
    place.mkdir()
    for name in ("a" * 64 + ".part", "a" * 64 + ".etag", "b" * 63 + ".part", ".x.tmp", "index"):
        (place / name).write_text("x")
    app.run("recover", check=0)
    assert cache(app) == ["a" * 64 + ".etag", "a" * 64 + ".part"]


# -- signatures ---------------------------------------------------------------------------

@pytest.fixture(scope="module")
def keys(tmp_path_factory: Any) -> Path:
    """Keys of minisign and ssh."""
    place = tmp_path_factory.mktemp("keys")
    for name in ("one", "two"):
        subprocess.run([needs("minisign"), "-G", "-W", "-p", f"{name}.pub", "-s", f"{name}.key"], cwd=str(place), check=True,
                       stdout=subprocess.DEVNULL)
    subprocess.run([needs("ssh-keygen"), "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", str(place / "ssh")], check=True)
    (place / "signers").write_text(f"me@example.org {(place / 'ssh.pub').read_text()}")
    return place


def sign(keys: Path, path: Path, name: str = "one", comment: str = "") -> None:
    """Sign a file with minisign."""
    subprocess.run(["minisign", "-S", "-s", str(keys / f"{name}.key"), "-m", str(path), *(["-t", comment] if comment else [])],
                   check=True, stdout=subprocess.DEVNULL)


def signed(keys: Path, *names: str) -> str:
    """A [signature] with keys of minisign."""
    return "[signature]\nkeys =\n" + "".join(f"    {(keys / name).with_suffix('.pub')}\n" for name in names)


def test_a_signed_index_speaks_for_its_artifacts(app: App, origin: Source, nginx: Nginx, keys: Path) -> None:
    text = f"tls_ca = {nginx.certificate}\n"
    follow(app, origin.url, text + signed(keys, "one"))  # type: ignore
    origin.add("1.0")
    origin.sums()
    index = origin.directory / "SHA256SUMS"
    told = app.run("sync", check=1).data["msg"]
    assert "on its way" in told and app.version is None
    assert len(nginx.asked()) == 6  # the index, and two signatures that are not there; all of it once more
    assert "sign" in refused_once(app)
    sign(keys, index)
    app.run("sync", check=0)
    found = app.record(app.current)["artifact"]["signature"]
    assert found["scheme"] == "minisign" and found["at"] and found["of"] == "SHA256SUMS"
    nginx.asked()
    assert not app.run("sync", check=0).data["changed"] and [line.split()[2] for line in nginx.asked()] == ["304"]
    # The key is another one now: what is kept does not count any more.
    follow(app, origin.url, text + signed(keys, "two"))  # type: ignore
    app.run("sync", check=1)
    sign(keys, index, "two")
    app.run("sync", check=0)
    origin.add("1.1")
    origin.sums()
    app.run("sync", check=1)
    sign(keys, index, "two")
    app.run("sync", check=0)
    assert app.version == "1.1"
    # A signature that is older than the last one, and one that is too old.
    index.write_text(index.read_text() + "0" * 64 + "  BEST-BEFORE-2120-01-01\n")
    sign(keys, index, "two", "timestamp:1600000000\tfile:SHA256SUMS\thashed")
    assert "signed before" in refused_once(app)
    follow(app, origin.url, text + "max_age = 1h\n" + signed(keys, "two"))  # type: ignore
    (app.root / ".deploy" / "source.json").unlink()
    assert "max_age" in refused_once(app)


def test_a_sequence_that_a_stolen_key_ran_ahead_with_is_forgotten_with_the_key(app: App, beside: Source, keys: Path) -> None:
    index = beside.directory / "index.json"

    def publish(name: str, **changed: Any) -> None:
        beside.index(beside.release("1.1"), **changed)
        sign(keys, index, name)

    follow(app, beside.directory, "index = index.json\n" + signed(keys, "one"), more="")
    beside.add("1.1")
    publish("one", sequence=10 ** 15)
    app.run("sync", check=0)
    publish("one")
    assert "lower sequence" in refused_once(app)
    publish("two")  # which nobody trusts yet: what was seen stays
    assert [app.run("sync").exit_code for _ in range(2)] == [1, 4]
    publish("one")
    assert "lower sequence" in app.run("sync", check=4).data["msg"]
    follow(app, beside.directory, "index = index.json\n" + signed(keys, "two"), more="")
    publish("two")
    app.run("sync", check=0)
    publish("two", sequence=2)
    assert "lower sequence" in app.run("sync", check=4).data["msg"]


def test_an_index_may_be_unsigned_where_signatures_are_for_those_who_have_one(app: App, beside: Source, keys: Path) -> None:
    follow(app, beside.directory, signed(keys, "one") + "verify = if-present\n")
    beside.add("1.0")
    beside.sums()
    app.run("sync", check=0)
    assert app.record(app.current)["artifact"]["signature"] is None
    sign(keys, beside.directory / "SHA256SUMS", "two")
    app.run("sync", check=1)


def test_an_index_of_ssh_in_json(app: App, beside: Source, keys: Path) -> None:
    follow(app, beside.directory, f"index = index.json\n[signature]\nallowed_signers = {keys}/signers\nnamespace = file\n", more="")
    beside.add("1.0")
    beside.index(beside.release("1.0"))
    subprocess.run(["ssh-keygen", "-q", "-Y", "sign", "-n", "file", "-f", str(keys / "ssh"), str(beside.directory / "index.json")],
                   check=True, stderr=subprocess.DEVNULL)
    app.run("sync", check=0)
    found = app.record(app.current)["artifact"]["signature"]
    assert (found["scheme"], found["signer"], found["of"]) == ("ssh", "me@example.org", "index.json")
    assert app.run("sync", "--check", check=0)


def test_as_root_a_directory_that_others_write_is_refused_unless_it_is_signed(app: App, beside: Source, keys: Path) -> None:
    if os.geteuid():
        pytest.skip("root alone believes nobody")
    beside.add("1.0")
    beside.sums()
    sign(keys, beside.directory / "SHA256SUMS")
    os.chown(str(beside.directory / "SHA256SUMS"), 61234, 61234)
    assert "61234" in app.run("sync", check=3).data["msg"]
    follow(app, beside.directory, signed(keys, "one"))
    app.run("sync", check=0)


def test_the_nginx_of_the_readme(app: App, nginx: Nginx, keys: Path, tmp_path: Path) -> None:
    text, shell = example("A directory of nginx")
    work = tmp_path / "work"
    artifact = make_artifact(work, "1.4.2", name="shop")
    (nginx.files / "shop").mkdir()
    public = (keys / "one.pub").read_text().split("\n")[1]
    text = re.sub("RWQ.*", public, text).replace("https://releases.example.com", f"https://127.0.0.1:{nginx.port}")
    configure(app, text.replace("[source]\n", f"[source]\ntls_ca = {nginx.certificate}\n"))
    shell = shell.replace("/srv/releases", str(nginx.files)).replace("~/shop.key", str(keys / "one.key"))
    subprocess.run(["bash", "-ec", shell], cwd=str(work), check=True, stdout=subprocess.DEVNULL)
    app.run("sync", check=0)
    assert app.version == "1.4.2" and app.record(app.current)["artifact"]["sha256"] == sha256_of(artifact)


@pytest.mark.parametrize("kind", ["https", "git"])
def test_the_judge_is_asked_once_though_it_is_fetched_in_between(kind: str, app: App, origin: Source, nginx: Nginx, tmp_path: Path) -> None:
    judge = f"[policy]\njudge = sh -c 'echo asked >> {app.directory}/asked'"
    origin.add("1.0")
    origin.sums()
    follow(app, origin.url, f"tls_ca = {nginx.certificate}\n{judge}")  # type: ignore
    if kind == "git":
        committed(tmp_path / "repository", "1.0")
        configure(app, f"[source]\ngit = {tmp_path / 'repository'}\n{judge}")
    app.run("sync", check=0)
    assert (app.directory / "asked").read_text() == "asked\n" and app.version == "1.0"


# -- a fleet ------------------------------------------------------------------------------

def test_a_tick_of_every_host_costs_one_small_request(app: App, origin: Source, nginx: Nginx, tmp_path: Path) -> None:
    hosts = sized(quick=10, whole=10, proof=200)
    origin.add("1.0", 100000)
    origin.sums()
    app.run("sync", check=0)
    import shutil
    for host in range(hosts):
        shutil.copytree(str(app.root), str(tmp_path / f"host-{host}"), symlinks=True)
    nginx.asked()
    for host in range(hosts):
        quiet = app.run("-q", "--root", tmp_path / f"host-{host}", "sync", json=False, check=0)
        assert quiet.stdout + quiet.stderr == ""
    asked = [line.split() for line in nginx.asked()]
    assert len(asked) == hosts and {(line[2], line[3]) for line in asked} == {("304", "0")}


# -- git ----------------------------------------------------------------------------------

def committed(repository: Path, version: str, *tag: str) -> str:
    """Commit a version, and tag it; returns the commit."""
    def git(*words: str) -> str:
        own = ["-c", "user.name=me", "-c", "user.email=me@example.org", "-c", "init.defaultBranch=main"]
        return subprocess.run([needs("git"), "-C", str(repository), *own, *words], check=True, stdout=subprocess.PIPE,
                              universal_newlines=True).stdout.strip()

    if not repository.exists():
        repository.mkdir()
        git("init", "-q")
    (repository / "VERSION").write_text(version + "\n")
    (repository / ".gitattributes").write_text("*.txt eol=crlf\n")
    git("add", "-A")
    git("commit", "-q", "-m", version)
    for words in tag:
        git("tag", *words.split())
    return git("rev-parse", "HEAD")


def test_a_branch_of_a_repository_and_the_same_digest_on_every_host(app: App, tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    follow = f"[source]\ngit = {repository}\n"
    configure(app, follow)
    assert "does not appear to be a git repository" in app.run("sync", check=1).data["msg"]
    commit = committed(repository, "1.0")
    assert commit[:12] in app.run("-n", "sync", json=False, check=0).stdout
    app.run("sync", check=0)
    record = app.record(app.current)
    assert app.version == "1.0" and record["version"] == commit[:12] and record["built_at"].endswith("Z") and cache(app) == []
    assert record["artifact"]["source"] == f"{repository}#{commit}"
    assert app.run("sync", check=0).data["changed"] is False and app.run("sync", "--check", check=0)
    other = App(tmp_path / "other")
    configure(other, follow)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / ".gitconfig").write_text("[core]\nautocrlf = true\n[tar]\numask = 0077\n")
    other.run("sync", env={"HOME": str(tmp_path / "home")}, check=0)
    assert other.record(other.current)["artifact"]["sha256"] == record["artifact"]["sha256"]
    committed(repository, "1.1")
    app.run("sync", check=0)
    app.run("rollback", check=0)
    assert "rolled back from" in refused_once(app)


@pytest.mark.parametrize("seconds", ["9999999999999", "99999999999999999999999", "-5"])
def test_a_commit_may_claim_any_time(seconds: str, app: App, tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    configure(app, f"[source]\ngit = {repository}\n")
    committed(repository, "1.0")
    git = ["git", "-C", str(repository)]
    text = subprocess.run([*git, "cat-file", "commit", "HEAD"], check=True, stdout=subprocess.PIPE).stdout.decode("ascii")
    claimed = re.sub(r"(?m)^(committer .*>) .*", rf"\1 {seconds} +0000", text)
    commit = subprocess.run([*git, "hash-object", "-t", "commit", "-w", "--stdin", "--literally"], input=claimed.encode("ascii"), check=True,
                            stdout=subprocess.PIPE).stdout.decode("ascii").strip()
    subprocess.run([*git, "update-ref", "refs/heads/main", commit], check=True)
    app.run("sync", check=0)
    assert app.version == "1.0" and app.record(app.current)["built_at"] is None
    app.run("report", check=0)


def test_the_newest_tag_of_a_repository(app: App, tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    configure(app, f"[source]\ngit = {repository}\nref = refs/tags/v*\n")
    committed(repository, "1.9", "v1.9", "other-9", "v2.0-rc.1", "vx")
    committed(repository, "1.10", "-a v1.10 -m ten")
    app.run("sync", check=0)
    assert app.version == "1.10" and app.record(app.current)["version"] == "v1.10"
    subprocess.run(["git", "-C", str(repository), "tag", "-f", "v1.10", "v1.9"], check=True, stdout=subprocess.DEVNULL)
    assert "other bytes" in refused_once(app)


@pytest.mark.parametrize("ref", ["main", "refs/tags/v*"])
def test_a_commit_or_tag_must_be_signed_where_signatures_are_asked_for(ref: str, app: App, keys: Path, tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    configure(app, f"[source]\ngit = {repository}\nref = {ref}\n[signature]\nallowed_signers = {keys}/signers\n")
    committed(repository, "1.0", "-a v1.0 -m one")
    assert "not signed" in refused_once(app) and cache(app) == []
    for name, value in (("gpg.format", "ssh"), ("user.signingkey", str(keys / "ssh.pub")), ("commit.gpgsign", "true"),
                        ("tag.gpgsign", "true")):
        subprocess.run(["git", "-C", str(repository), "config", name, value], check=True)
    committed(repository, "1.1", "-a v1.1 -m two")
    app.run("sync", check=0)
    found = app.record(app.current)["artifact"]["signature"]
    assert (found["scheme"], found["signer"], found["of"]) == ("ssh", "me@example.org", "tag" if "tags" in ref else "commit")
    configure(app, f"[source]\ngit = {repository}\nref = {ref}\n[signature]\nallowed_signers = {keys}/signers\nprincipal = you@example.org\n")
    committed(repository, "1.2", "-a v1.2 -m three")
    app.run("sync", check=4)


# -- what the README shows ------------------------------------------------------------------

def example(start: str) -> List[str]:
    """The configuration and the shell commands of a paragraph of the README; where it has no block, its `key = value` are [source]'s."""
    text = "\n" + section("Sources that were tried")
    part = re.split(r"\n(?=A |GitHub|GitLab|S3)", text[text.index(f"\n{start}") + 1:])[0] + "\n"
    shell = "".join(re.findall(r"(?m)^    (.*\n)", part))
    ini = re.findall(r"(?ms)^```ini\n(.*?)^```", part)
    return [ini[0] if ini else "[source]\n" + "".join(f"{line}\n" for line in re.findall(r"`(\w+ = [^`]*)`", part)), shell]


@deep
@pytest.mark.parametrize("kind, start, url", [
    ("github", "GitHub's releases", "https://github.com"), ("gitlab", "GitLab's", "https://gitlab.example.com"),
    ("s3", "S3,", "https://shop-releases.s3.eu-central-1.amazonaws.com")], ids=["github", "gitlab", "s3"])
def test_a_source_of_the_readme(kind: str, start: str, url: str, app: App, certificate: Path, tmp_path: Path) -> None:
    needs("curl"), needs("jq")
    text, shell = example(start)
    tls, work, bin_ = server_tls(certificate), tmp_path / "work", tmp_path / "bin"
    host = Host(kind, tls)
    host.assets, host.tag = Host("assets", tls), ""  # type: ignore
    (tmp_path / "token").write_text("read\n")
    text = text.replace(url, host.url).replace("/etc/deploy/shop.token", str(tmp_path / "token"))
    configure(app, text.replace("[source]\n", f"[artifact]\nmatch = shop-@v.tar.gz\n[source]\ntls_ca = {certificate}\n"))
    release = "import shutil; [shutil.copy(name, os.environ['UP']) for name in sys.argv[4:]]"
    presign = f"print('{host.url}/shop-1.4.2.tar.gz?X-Amz-Signature=abc') if sys.argv[2] == 'presign' else " \
              "__import__('shutil').copy('shop-1.4.2.tar.gz', os.environ['UP']) and __import__('shutil').copy(sys.argv[3], os.environ['UP'])"
    (tmp_path / "up").mkdir()
    env = dict(os.environ, PATH=f"{bin_}:{os.environ['PATH']}", UP=str(tmp_path / "up"), CI_JOB_TOKEN="job", CURL_CA_BUNDLE=str(certificate))
    fake_command(bin_, "gh", release), fake_command(bin_, "aws", presign)
    for version in ("1.4.2", "1.4.3"):
        artifact = make_artifact(work, version, name="shop")
        index = {"schema": 1, "application": "myapp", "sequence": int(version[-1]), "channels": {"stable": version}, "releases": [
            {"version": version, "name": artifact.name, "sha256": sha256_of(artifact), "url": f"../{version}/{artifact.name}"}]}
        (work / "index.json").write_text(json.dumps(index))
        commands = shell.replace("1.4.2", version).replace(url, host.url)
        fake_command(bin_, "aws", presign.replace("1.4.2", version))
        done = subprocess.run(["bash", "-ec", commands], cwd=str(work), env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        assert done.returncode == 0, done.stdout.decode()
        host.tag = f"v{version}"  # type: ignore
        host.files.update({f"/{path.name}": path.read_bytes() for path in (tmp_path / "up").iterdir()})
        host.assets.files = host.files  # type: ignore
        app.run("sync", check=0)
        assert app.version == version and cache(app) == []
        before = len(host.requests)
        assert app.run("-q", "sync", json=False, check=0).stdout == "" and len(host.requests) - before == (2 if kind == "github" else 1)


def test_the_index_of_the_readme(app: App, tmp_path: Path) -> None:
    text = (TOP / "README.md").read_text(encoding="utf-8").split("```json\n")[1].split("```")[0]
    artifact = make_artifact(tmp_path / "1.4.2", "1.4.2")
    artifact.rename(artifact.with_name("shop.tar.gz"))
    (tmp_path / "index.json").write_text(text.replace("b1946ac92492d2347c6235b4d2611184" * 2, sha256_of(artifact.with_name("shop.tar.gz"))))
    configure(app, f"[source]\nurl = {tmp_path}\nindex = index.json\nchannel = stable\n")
    assert "is of shop" in app.run("sync", check=4).data["msg"]
    app.config.write_text(app.config.read_text().replace("application = myapp", "application = shop"))
    app.run("sync", check=0)
    assert app.version == "1.4.2" and app.record(app.current)["artifact"]["name"] == "shop-1.4.2.tar.gz"


def test_the_timer_of_the_readme_is_one_that_systemd_takes(tmp_path: Path) -> None:
    needs("systemd-analyze")
    units = load_deploy().HELP["systemd"].split("# /etc/systemd/system/")
    (tmp_path / "deploy@.service.d").mkdir()
    service = "\n".join(line.strip() for line in units[1].splitlines()[1:])
    for name, text in (("deploy@.service", service), ("deploy@.service.d/sync.conf", example("A timer")[0])):
        (tmp_path / name).write_text(text.replace("/usr/local/sbin/deploy.py", str(DEPLOY)))
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", str(tmp_path / "deploy@shop.service")], stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, env=dict(os.environ, SYSTEMD_UNIT_PATH=f"{tmp_path}:"))
    assert done.returncode == 0 and "sync.conf" not in done.stdout.decode(), done.stdout.decode()
