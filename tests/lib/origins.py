"""Where sync fetches from: nginx with TLS, a relay that cuts the wire, raw sockets that lie, a proxy, and hosts of releases."""

import hashlib
import itertools
import json
import os
import re
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Any, Dict, Iterator, List

from support import free_port, make_artifact, needs, sha256_of, wait_until


def make_certificate(directory: Path) -> Path:
    """A certificate for 127.0.0.1 with its key, signed by itself."""
    path, config = directory / "server.pem", directory / "config"
    config.write_text("[req]\ndistinguished_name=dn\nx509_extensions=ext\nprompt=no\n[dn]\nCN=here\n"
                      "[ext]\nsubjectAltName=IP:127.0.0.1\nbasicConstraints=critical,CA:TRUE\n")
    subprocess.run([needs("openssl"), "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-config", str(config),
                    "-keyout", str(directory / "key"), "-out", str(path)], check=True, stderr=subprocess.DEVNULL)
    return path


def server_tls(certificate: Path) -> Any:
    """What a TLS server needs."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS if sys.version_info < (3, 10) else ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(str(certificate), str(certificate.with_name("key")))
    return context


class Nginx:
    """Debian's nginx with TLS, serving a directory, and what it was asked."""

    def __init__(self, directory: Path, certificate: Path) -> None:
        self.files, self.port, self.certificate = directory / "files", free_port(), certificate
        self.files.mkdir()
        self._log, self._read, self._questions = directory / "access", 0, itertools.count()
        config = directory / "nginx.conf"
        config.write_text(
            f"daemon off; master_process off; pid {directory}/pid; error_log {directory}/error;\nevents {{}}\nhttp {{\n"
            f"log_format asked '$request_method $uri $status $body_bytes_sent [$http_range] [$http_if_none_match]';\n"
            f"access_log {self._log} asked; client_body_temp_path {directory}/t; proxy_temp_path {directory}/t;\n"
            f"fastcgi_temp_path {directory}/t; uwsgi_temp_path {directory}/t; scgi_temp_path {directory}/t;\n"
            f"server {{ listen 127.0.0.1:{self.port} ssl; ssl_certificate {certificate};\n"
            f"ssl_certificate_key {certificate.with_name('key')}; root {self.files};\n"
            "location ~ /noetag/ { etag off; } location ~ /private/ { if ($http_authorization != 'Bearer open-sesame') "
            "{ return 401; } } } }\n")
        self._process = subprocess.Popen([needs("nginx"), "-p", str(directory), "-c", str(config)], stderr=subprocess.DEVNULL)
        wait_until(lambda: not socket.socket().connect_ex(("127.0.0.1", self.port)), what="nginx listens")

    def asked(self) -> List[str]:
        """What it was asked since the last time: method, path, status, bytes, [Range], [If-None-Match]."""
        # A request is logged after it was answered: one more, whose line comes last.
        last = f"/asked-{next(self._questions)}"
        with suppress(urllib.error.HTTPError):
            urllib.request.urlopen(f"https://127.0.0.1:{self.port}{last}", context=ssl._create_unverified_context())
        wait_until(lambda: last in self._log.read_text(), what="nginx's log")
        lines = self._log.read_text()[self._read:].splitlines()
        self._read += sum(len(line) + 1 for line in lines)
        return [line for line in lines if "/asked-" not in line]

    def stop(self) -> None:
        """End it."""
        self._process.terminate()
        self._process.wait()


class Source:
    """A directory of artifacts with SHA256SUMS or index.json beside them."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self.sequence = 0

    def add(self, version: str, size_bytes: int = 0) -> Path:
        """Build an artifact, which is not in the index yet."""
        files = {"blob": os.urandom(size_bytes)} if size_bytes else None
        path = make_artifact(self.directory, version, files)
        path.with_name(path.name + ".sha256").unlink()
        return path

    def sums(self, *lines: str) -> None:
        """Write SHA256SUMS of what is there, or of these lines."""
        paths = sorted(self.directory.glob("*.tar.gz"))
        text = "".join(lines) or "".join(f"{sha256_of(path)}  {path.name}\n" for path in paths)
        (self.directory / "SHA256SUMS").write_text(text)

    def release(self, version: str, **changed: Any) -> Dict[str, Any]:
        """A release as index.json tells of it."""
        path = self.directory / f"myapp-{version}.tar.gz"
        return dict({"version": version, "name": path.name, "url": path.name, "sha256": sha256_of(path),
                     "size": path.stat().st_size, "built_at": "2026-01-02T03:04:05Z"}, **changed)

    def index(self, *releases: Dict[str, Any], **changed: Any) -> None:
        """Write index.json, with the next sequence."""
        self.sequence += 1
        (self.directory / "index.json").write_text(json.dumps(dict(
            {"schema": 1, "application": "myapp", "sequence": self.sequence, "channels": {}, "releases": releases}, **changed)))


class Relay:
    """A TCP relay to nginx that hands on so many bytes of its answers, then nothing: the wire was cut."""

    def __init__(self, port: int) -> None:
        self._to, self.left, self.cut = port, -1, threading.Event()
        self._listener = socket.socket()
        self._listener.bind(("127.0.0.1", 0))
        self._listener.listen(20)
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            client = self._listener.accept()[0]
            server = socket.create_connection(("127.0.0.1", self._to))
            for one, other, counts in ((client, server, False), (server, client, True)):
                threading.Thread(target=self._pass, args=(one, other, counts), daemon=True).start()

    def _pass(self, one: Any, other: Any, counts: bool) -> None:
        try:
            while True:
                data = one.recv(4096)
                if counts and self.left >= 0:
                    data = data[:self.left]
                    self.left -= len(data)
                if not data:
                    break
                other.sendall(data)
        except OSError:
            pass
        if counts and self.left == 0:
            self.cut.set()
            return  # hung, not closed
        for end in (one, other):
            try:
                end.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass


class Liar:
    """A raw socket that answers as a case says; what it was asked, and by whom with a token."""

    def __init__(self, case: Any, good: bytes, tls: Any = None) -> None:
        self.case, self.good, self.requests = case, good, []  # type: Any, bytes, List[str]
        self.listener = socket.socket()
        self.listener.bind(("127.0.0.1", 0))
        self.listener.listen(50)
        self.port = self.listener.getsockname()[1]
        self.url = f"http{'s' if tls else ''}://127.0.0.1:{self.port}"
        if tls:
            self.listener = tls.wrap_socket(self.listener, server_side=True)
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection = self.listener.accept()[0]
            except ssl.SSLError:
                continue
            threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: Any) -> None:
        try:
            request, missing = b"", 1
            while missing > 0:
                piece = connection.recv(65536)
                if not piece:
                    return
                request += piece
                if b"\r\n\r\n" in request:
                    length = re.search(rb"(?i)\r\nContent-Length: (\d+)", request)
                    missing = int(length.group(1)) - len(request.partition(b"\r\n\r\n")[2]) if length else 0
            text = request.decode("latin-1")
            self.requests.append(text)
            for piece in self.case(self, text.split()[1], text):
                connection.sendall(piece)
            connection.shutdown(socket.SHUT_WR)
            connection.recv(1)
        except OSError:
            pass
        finally:
            connection.close()


def head(status: Any, length: Any = None, *lines: str) -> bytes:
    """The head of an answer; a Retry-After of 0 keeps the tests short."""
    lines = (f"HTTP/1.1 {status} X", "Retry-After: 0") + lines
    return "\r\n".join(lines + (() if length is None else (f"Content-Length: {length}",)) + ("", "")).encode("latin-1")


def whole(body: bytes, *lines: str, status: int = 200) -> List[bytes]:
    """An honest answer."""
    return [head(status, len(body), *lines), body]


def sha256(data: bytes) -> str:
    """The SHA-256 of bytes."""
    return hashlib.sha256(data).hexdigest()


def drip(data: bytes, seconds: float) -> Iterator[bytes]:
    """A byte at a time."""
    for number in range(len(data)):
        yield data[number:number + 1]
        time.sleep(seconds)


def endless(piece: bytes) -> Iterator[bytes]:
    """The same for ever."""
    while True:
        yield piece


def chunked(data: bytes, end: bytes = b"0\r\n\r\n") -> List[bytes]:
    """A body in chunks."""
    return [head(200, None, "Transfer-Encoding: chunked"), b"%x\r\n" % len(data) + data + b"\r\n" + end]


def redirect(where: str, status: int = 302) -> List[bytes]:
    """Go elsewhere."""
    return [head(status, 0, f"Location: {where}")]


def tunnel(port: int) -> Liar:
    """A proxy that wants a password and leads to a port."""
    class Proxy(Liar):
        def _answer(self, connection: Any) -> None:
            asked = ""
            for data in iter(lambda: connection.recv(65536), b""):  # Python 3.6 sends it line by line
                asked += data.decode("latin-1")
                if "\r\n\r\n" in asked:
                    break
            self.requests.append(asked)
            if "\r\nProxy-Authorization: Basic bWU6c2VjcmV0\r\n" not in asked:
                connection.sendall(head(407, 0))
                connection.close()
                return
            if asked.startswith("CONNECT"):
                connection.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
            server = socket.create_connection(("127.0.0.1", port))
            if not asked.startswith("CONNECT"):
                server.sendall(asked.encode("latin-1"))
            for one, other in ((connection, server), (server, connection)):
                threading.Thread(target=self._pass, args=(one, other), daemon=True).start()

        def _pass(self, one: Any, other: Any) -> None:
            try:
                for data in iter(lambda: one.recv(65536), b""):
                    other.sendall(data)
                other.shutdown(socket.SHUT_WR)
            except OSError:
                pass

    return Proxy(None, b"")


class Host(Liar):
    """A host that keeps files as GitHub, GitLab or S3 do, with an asset host that refuses a token beside its own signature."""

    def __init__(self, kind: str, tls: Any) -> None:
        self.files, self.kind, self.signed = {}, kind, 0  # type: Dict[str, bytes], str, int
        super().__init__(lambda host, path, request: self.answer(path, request), b"", tls)

    def answer(self, path: str, request: str) -> List[bytes]:
        """Answer one request."""
        path, _, query = path.partition("?")
        token = re.search(r"(?m)^(?:Authorization: Bearer|JOB-TOKEN:) (.+)\r$", request)
        if request.startswith("PUT"):
            if not token or token.group(1) != "job":
                return [head(401, 0)]
            self.files[path] = request.partition("\r\n\r\n")[2].encode("latin-1")
            return [head(201, 0)]
        latest = f"/example/shop/releases/download/{self.tag}/" if self.kind == "github" else ""
        if self.kind == "github" and path.startswith("/example/shop/releases/latest/download/"):
            return redirect(latest + path.rpartition("/")[2])
        if self.kind == "gitlab" and not (token and token.group(1) == "read") or query and token:
            return [head(401 if not query else 400, 0)]
        name = path.replace(latest, "/") if latest else path
        if name not in self.files:
            return [head(404, 0)]
        if not query and (self.kind == "github" or name.endswith(".gz")):
            asset = self.assets.url + name if self.kind != "s3" else ""
            return redirect(f"{asset}?sig={self.signed}") if asset else [head(403, 0)]
        return kept(self.files[name], request, with_etag=self.kind != "gitlab")


def kept(data: bytes, request: str, *, with_etag: bool) -> List[bytes]:
    """Answer as a host of files does, ETag and all."""
    etag = f'"{sha256(data)[:32]}"'
    if with_etag and f"\r\nIf-None-Match: {etag}\r\n" in request:
        return [head(304, None, f"ETag: {etag}")]
    return whole(data, *[f"ETag: {etag}"] if with_etag else [])
