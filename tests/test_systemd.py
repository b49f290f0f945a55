"""At home under systemd: credentials, notifications, unit files, and services of a real systemd that is PID 1 of a namespace."""

import http.server
import os
import threading
from pathlib import Path
from typing import Any, Dict, Iterator, List

import pytest


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
                f"[probe:web]\nurl = http://127.0.0.1:{self.http.server_address[1]}/\nsuccesses = 1\ndeadline = 500ms\n"
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
