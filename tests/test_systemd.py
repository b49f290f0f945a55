"""At home under systemd: credentials, notifications, unit files, and services of a real systemd that is PID 1 of a namespace."""

import http.server
import os
import shutil
import signal
import socket
import stat
import subprocess
import threading
from pathlib import Path
from typing import Any, Dict, Iterator, List

import pytest

from support import DEPLOY, load_deploy, needs, run_deploy, start_deploy, wait_until, write_checksum

deploy = load_deploy()
# Not the bytecode that the suite runs otherwise: the unit names the file itself.
SYSTEM_PYTHON = "/usr/bin/python3"

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

    def told(self) -> List[Dict[str, str]]:
        """Every datagram so far, as {variable: value}."""
        found = []
        while True:
            try:
                data = self.socket.recv(65536)
            except BlockingIOError:
                return found
            found.append(dict(line.split("=", 1) for line in data.decode("utf-8").split("\n") if line))


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


def test_a_long_probe_tells_its_tries_and_a_failure_is_never_ready(app, listener):
    app.configure("[probe:web]\ntcp = 127.0.0.1:1\nperiod = 300ms\nbackoff = 1\ndeadline = 2s\n")
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


# -- unit files --------------------------------------------------------------------

def unit_lines(app: Any, *words: Any, **options: Any) -> List[str]:
    """The service that `deploy.py unit` prints, as lines."""
    text = app.run("unit", *words, json=False, check=0, python=SYSTEM_PYTHON, **options).stdout
    return text.split("# /etc/systemd/system/deploy-myapp.timer")[0].splitlines()


def value(lines: List[str], key: str) -> str:
    """What stands behind one key."""
    return next(line.partition("=")[2] for line in lines if line.startswith(key + "="))


def test_the_page_shows_what_the_command_prints(tmp_path):
    config = tmp_path / "shop.ini"
    config.write_text("[deploy]\nroot = /srv/shop\n[service:web]\nunit = shop.service\n"
                      "[probe:web]\nurl = http://127.0.0.1:8080/health\nauth_file = health.token\n")
    text = run_deploy("unit", "deploy", "/var/lib/artifacts/shop.tar.gz", config=config, json=False, check=0, python=SYSTEM_PYTHON).stdout
    text = text.replace(str(config), "/etc/deploy/shop.ini").replace(f"{tmp_path}/", "/etc/deploy/").replace(str(DEPLOY), "/usr/local/sbin/deploy.py")
    # The page's example lies where systems keep such things, and not in /tmp.
    text = text.replace("ProtectHome=yes\n", "ProtectHome=yes\nPrivateTmp=yes\n").replace("PrivateTmp=yes\nPrivateTmp=yes\n", "PrivateTmp=yes\n")
    page = run_deploy("help", "systemd", json=False, check=0).stdout
    assert "".join("    " + line if line.strip() else line for line in text.splitlines(keepends=True)) in page


def test_the_command_of_a_unit_holds_in_any_directory(app):
    artifact = app.artifact("1.0")
    lines = unit_lines(app, "--set", "vars.A=50% of $HOME", "deploy", artifact.name, "--force", "--wait-lock", "90", "-q",
                       cwd=artifact.parent)
    assert value(lines, "ExecStart") == (f'{DEPLOY} -c {app.config} --wait-lock 90s --set "vars.A=50%% of $$HOME" '
                                         f"deploy {artifact} --force -q")
    assert value(lines, "TimeoutStartSec") == str(90 + 300 + 5)
    root = run_deploy("unit", "prune", "--root", ".", cwd=app.root, json=False, check=0, python=SYSTEM_PYTHON).stdout
    assert f"deploy.py --root {app.root} prune\n" in root and "# /etc/systemd/system/deploy-root-prune.timer" in root


def test_the_root_is_in_the_unit_wherever_it_was_named_and_other_variables_are_missed(app):
    result = run_deploy("unit", "prune", env={"DEPLOY_DEPLOY_ROOT": str(app.root), "DEPLOY_HOOKS_TIMEOUT": "1m"}, check=0)
    assert f" --root {app.root} prune\n" in result.data["units"]["deploy-root-prune.service"]
    assert result.data["warnings"] == ["DEPLOY_HOOKS_TIMEOUT is not in the unit: put it into the configuration"]


def test_the_end_of_printing_is_told_in_one_line(app):
    assert app.run("unit", "prune", check=0).data["msg"] == "printed deploy-myapp-prune.service and deploy-myapp-prune.timer"


@pytest.mark.parametrize("option", ["env.DB_PASSWORD=geheim77", "probe:w.header.Authorization=Bearer geheim77", "vars.api_token=geheim77"])
def test_a_secret_of_the_command_line_is_not_written_where_everybody_reads(app, tmp_path, option):
    app.configure("[probe:w]\nurl = http://127.0.0.1:1/\n")
    result = app.run("--set", option, "unit", "-o", tmp_path, "prune", check=2)
    assert option.partition("=")[0] in result.data["error"]["message"] and result.data["error"]["hint"] == "put it into the configuration"
    assert "geheim77" not in result.stdout + result.stderr and list(tmp_path.glob("*.service")) == []


def test_the_limits_are_those_of_the_configuration(app):
    app.configure("lock_wait = 1m\n[hooks]\ntimeout = 10s\npre_stage = true\n  true\npre_rollback = true\n"
                  "[service:a]\ncommand = true\ntimeout = 20s\nsettle = 1s\n"
                  "[probe:p]\ncommand = true\ninitial_delay = 2s\ndeadline = 30s\nsoak = 7s\n")
    lines = unit_lines(app, "deploy", "x.tar.gz")
    way, back = 21 + 39, 5 + 21 + 39 + 10
    assert value(lines, "TimeoutStartSec") == str(60 + 300 + 30 + way + back)
    assert value(lines, "TimeoutStopSec") == str(back + 60)


@pytest.mark.parametrize("log, written", [
    ("{root}/log/deploy.log", ["{root}"]), ("{top}/log/deploy.log", ["{root}", "{top}/log"]), ("{top}/deploy.log", ["{root}", "{top}"]),
    ("{root}-log/deploy.log", ["{root}", "{root}-log"])])
def test_no_directory_inside_the_root_is_a_mount_of_its_own(app, log, written):
    places = {"root": app.root, "top": app.directory}
    path = Path(log.format(**places))
    path.parent.mkdir(exist_ok=True)
    lines = unit_lines(app, "deploy", "x.tar.gz", "--log-file", path)
    assert value(lines, "ReadWritePaths") == " ".join(place.format(**places) for place in written)


def test_homes_and_temporary_files_are_out_of_reach_unless_they_are_needed(tmp_path):
    def reach(*words: Any) -> List[str]:
        units = deploy.load_settings([], {}, ["deploy.root=/srv/shop", "deploy.application=shop", *words])
        return [line for line in deploy.unit_access(units, ["/usr/local/sbin/deploy.py"]).splitlines() if "Write" not in line]
    assert reach() == ["ProtectHome=yes", "PrivateTmp=yes"]
    assert reach("hooks.pre_stage=/home/shop/check") == ["ProtectHome=read-only", "PrivateTmp=yes"]
    assert reach("deploy.root=/var/tmp/shop") == ["ProtectHome=yes"]
    assert reach("preflight.user=shop")[0] == "User=shop" and reach("preflight.user=root") == reach()
    assert reach("probe:a.url=http://a/", "probe:a.auth_file=/etc/50% of it")[0] == "LoadCredential=a:/etc/50%% of it"


def test_hostile_names_are_quoted_as_systemd_reads_them(tmp_path):
    analyze = needs("systemd-analyze")
    place = tmp_path / 'a "b" \\c $d %i \'e'
    place.mkdir()
    copy = place / "deploy me.py"
    shutil.copy(str(DEPLOY), str(copy))
    (place / "root").mkdir()
    (place / "shop.ini").write_text(f"[deploy]\nroot = {place}/root\napplication = 100% käse; \\ \"\n"
                                    "[probe:p]\nurl = http://127.0.0.1/\nauth_file = token\n")
    subprocess.run(["/usr/bin/python3", str(copy), "-c", str(place / "shop.ini"), "unit", "-o", str(tmp_path), "deploy", str(place / "x y.tar.gz")],
                   check=True, stdout=subprocess.DEVNULL)
    units = sorted(path for path in tmp_path.iterdir() if path.suffix in (".service", ".timer"))
    assert [path.name for path in units] == [f"deploy-100\\x25\\x20k\\xc3\\xa4se\\x3b\\x20\\x5c\\x20\\x22{kind}" for kind in (".service", ".timer")]
    for path in units:
        said = subprocess.run([analyze, "verify", str(path)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        assert (said.returncode, said.stdout) == (0, b"")


@pytest.mark.parametrize("words, told", [
    (["unit"], "no command is given"), (["unit", "deploy"], "required: ARTIFACT"), (["unit", "nonsense"], "invalid choice"),
    (["unit", "unit", "deploy", "x"], "cannot run `unit`"),
    (["unit", "deploy", "x\n[Install]"], "cannot stand in a unit file"), (["unit", "deploy", "x", "--nonsense"], "unrecognized"),
    (["unit", "-o", "/nonexistent", "prune"], "ENOENT"),
    (["unit", "--", "-c", "/etc/deploy/other.ini", "prune"], "-c stands before the command"),
    (["unit", "pack", "x"], "cannot run `pack`"), (["unit", "help", "x"], "cannot run `help`"), (["unit", "status", "--set"], "--set"),
    (["unit", "probe", "--wait", "5x"], "--wait '5x': expected a duration"), (["unit", "probe", "nonesuch"], "no probe 'nonesuch'"),
    (["unit", "probe"], "no probe to run"), (["unit", "probe", "--url", "x"], "the URL must begin"),
    (["unit", "probe", "--url", "http://x", "--expect", "foo=1"], "unknown key 'foo'"), (["unit", "history", "--limit", "x"], "--limit 'x'"),
    (["unit", "deploy", "x", "--sha256", "xyz"], "is not a SHA-256"), (["unit", "deploy", "x", "--release-version", "a/b"], "cannot be a version"),
    (["unit", "prune", "--splay", "99x"], "--splay '99x': expected a duration"), (["unit", "prune", "--splay="], "--splay is given, but empty"),
])
def test_what_makes_no_unit_is_refused(app, words, told):
    error = app.run(*words).data["error"]
    assert told in error["message"] and error["hint"]


@pytest.mark.parametrize("section, key", [("preflight", "user"), ("probe:p", "auth_file"), ("metrics", "textfile_dir"), ("deploy", "application")])
@pytest.mark.parametrize("value", ["x\n  ExecStartPre=/bin/false", "x\\"], ids=["a line of its own", "a line that goes on"])
def test_no_value_of_the_configuration_becomes_another_line_of_the_unit(app, section, key, value):
    """A line more is a command for root; a backslash at the end takes the next line in, ReadWritePaths for one."""
    app.config.write_text(f"[{section}]\n{key} = {value}\n" + "url = http://127.0.0.1:1/\n" * (section == "probe:p"))
    result = app.run("--root", app.root, "unit", "prune")
    if result.exit_code:
        assert result.exit_code == 2 and "cannot stand in a unit file" in result.data["msg"]
        return
    for text in result.data["units"].values():
        assert not [line for line in text.splitlines() if line.endswith("\\") or line.startswith("ExecStartPre")]


def test_a_time_that_systemd_cannot_read_is_refused(app):
    needs("systemd-analyze")
    for calendar in ("nonsense", "--version"):
        assert f"--timer {calendar!r}: Failed to parse" in app.run("unit", f"--timer={calendar}", "prune", check=2).data["error"]["message"]


def test_two_dashes_end_the_flags_with_and_without_a_unit(app):
    artifact = app.directory / "-1.0.tar.gz"
    app.artifact("1.0").rename(artifact)
    write_checksum(artifact)
    app.run("deploy", "--", artifact.name, cwd=app.directory, check=0)
    assert value(unit_lines(app, "deploy", "--", artifact.name, cwd=app.directory), "ExecStart").endswith(f" deploy -- {artifact}")
    assert value(unit_lines(app, "--", "prune"), "ExecStart").endswith(f"{app.config} prune")
    assert "unit" in run_deploy("--root", "unit", "pin", "x", cwd=app.directory, check=2).data["error"]["message"]


def test_two_files_cannot_be_one_credential(app):
    section = "[{}:web]\nurl = http://127.0.0.1/\n{} = /etc/deploy/{}\n"
    app.configure(section.format("probe", "auth_file", "a") + section.format("notify", "token_file", "b"))
    error = app.run("unit", "prune", check=2).data["error"]
    assert "would be the same credential, web" in error["message"] and "[notify:web]" in error["message"]
    app.configure(section.format("probe", "auth_file", "a") + section.format("notify", "token_file", "b").replace("web", "chat"))
    assert [line for line in unit_lines(app, "prune") if line.startswith("LoadCredential")] == [
        "LoadCredential=chat:/etc/deploy/b", "LoadCredential=web:/etc/deploy/a"]


def test_the_directories_that_are_written_beside_the_root_are_in_the_unit(app):
    (app.directory / "textfiles").mkdir()
    app.configure(f"[metrics]\ntextfile_dir = {app.directory}/textfiles\n")
    assert value(unit_lines(app, "prune"), "ReadWritePaths") == f"{app.root} {app.directory}/textfiles"


def test_units_are_written_where_they_are_wanted_and_not_in_a_dry_run(app, tmp_path):
    (tmp_path / "units").mkdir()
    assert app.run("-n", "unit", "-o", tmp_path / "units", "deploy", "x.tar.gz", check=0).data["changed"]
    assert list((tmp_path / "units").iterdir()) == []
    result = app.run("unit", "-o", tmp_path / "units", "deploy", "x.tar.gz", check=0)
    for name, text in result.data["units"].items():
        assert (tmp_path / "units" / name).read_text() == text
        assert stat.S_IMODE((tmp_path / "units" / name).stat().st_mode) == 0o644
    assert sorted(os.listdir(str(tmp_path / "units"))) == sorted(result.data["units"])


def test_a_directory_that_is_not_there_yet_is_told(app):
    """systemd starts no service whose ReadWritePaths is missing."""
    app.configure(f"[metrics]\ntextfile_dir = {app.directory}/new\n")
    assert app.run("unit", "prune", check=0).data["warnings"] == [
        f"{app.directory}/new does not exist: make it, or systemd cannot start the service"]


def test_a_root_that_is_not_there_yet_is_told(tmp_path):
    result = run_deploy("unit", "deploy", "x.tar.gz", root=tmp_path / "new", check=0)
    assert result.data["warnings"] == [f"{tmp_path}/new does not exist: make it, or systemd cannot start the service"]
    assert not (tmp_path / "new").exists()
