"""Under a real systemd: its timer starts deployments, its limits and stops are kept to, and its services' troubles are found and told."""

import json
import os
import re
import shutil
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Tuple

import pytest

import tables
from support import deep, file, free_port, make_artifact, make_tar, member, shape, wait_until, write_checksum
from systemd_host import Host

# A service that answers with the release it was started in, for whoever knows the password.
SERVICE = """#!/usr/bin/python3 -I
import http.server, os, sys
release = os.path.basename(os.path.realpath("."))
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        known = self.headers.get("Authorization") == "Bearer told-by-systemd"
        self.send_response(200 if known else 401)
        self.end_headers()
        self.wfile.write(release.encode())
print("serving", release, flush=True)
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""
GOOD = {"bin/run": file(SERVICE, 0o755)}
CRASHING = {"bin/run": file("#!/bin/sh\necho cannot find my database >&2\nexit 3\n", 0o755)}


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    """One systemd for all tests of this file."""
    running = Host()
    yield running
    running.stop()


class Shop:
    """An application on that host: a root of its own, its configuration, and the units that its tests need."""

    def __init__(self, host: Host, name: str) -> None:
        self.host, self.name, self.directory = host, name, host.top / name
        self.root, self.config, self.unit = self.directory / "root", self.directory / "shop.ini", f"{name}.service"
        self.root.mkdir(parents=True)

    def configure(self, text: str = "", service: str = "settle = 700ms") -> None:
        """Write the configuration: the service and whatever else."""
        self.config.write_text(f"[deploy]\nroot = {self.root}\napplication = {self.name}\n"
                               f"[service:web]\nunit = {self.unit}\n{service}\n{text}")

    def serve(self, exec_start: str = "", more: str = "Restart=always\nRestartSec=100ms\n", *, reload: bool = True) -> None:
        """Write the service's unit file; without a command it runs what is live."""
        exec_start = exec_start or f"{self.root}/current/bin/run {self.port}"
        self.host.unit(self.unit, f"[Service]\nWorkingDirectory=-{self.root}/current\nExecStart={exec_start}\n{more}", reload=reload)

    @property
    def port(self) -> int:
        """A port of its own."""
        if not hasattr(self, "_port"):
            self._port = free_port()
        return self._port

    def artifact(self, version: str, files: Optional[Dict[str, Any]] = None) -> Path:
        """Build an artifact."""
        return make_artifact(self.directory, version, GOOD if files is None else files)

    def deploy(self, version: str, files: Optional[Dict[str, Any]] = None, check: int = 0, *flags: str, path: str = "") -> Any:
        """Deploy a version by hand, inside; returns the JSON result."""
        before = ["env", f"PATH={path}:/usr/bin:/bin"] if path else []
        done = self.host.run(*before, self.host.deploy, "--json", "-c", self.config, *flags, "deploy", self.artifact(version, files),
                             check=check)
        return json.loads(done.stdout)

    def units(self, *words: Any, drop_in: str = "", timer: str = "") -> str:
        """Have the units that the README shows run a command of this shop, with drop-ins; returns the service's name."""
        place = self.host.top / "units"
        for path, text in tables.units().items():
            unit = place / Path(path).relative_to("/etc/systemd/system")
            unit.parent.mkdir(exist_ok=True)
            unit.write_text(text)
        command = " ".join(map(str, (self.host.deploy, "-c", self.config, *words)))
        drop_in = f"ExecStart=\nExecStart={command}\nReadWritePaths=\nReadWritePaths={self.root}\n{drop_in}"
        for kind, text in (("service", drop_in), ("timer", timer)):
            directory = place / f"deploy@{self.name}.{kind}.d"
            directory.mkdir(exist_ok=True)
            (directory / "test.conf").write_text(f"[{kind.title()}]\n{text}\n")
        self.host.run("systemctl", "daemon-reload")
        return f"deploy@{self.name}.service"

    def wait_for(self, unit: str, status: str) -> None:
        """Wait until a run's StatusText begins so."""
        wait_until(lambda: self.host.properties(unit, "StatusText")["StatusText"].startswith(status), what=f"{unit}: {status}")

    @property
    def version(self) -> str:
        """What is live."""
        path = self.root / "current" / "VERSION"
        return path.read_text().strip() if path.exists() else ""

    def history(self) -> List[str]:
        """How each run ended."""
        path = self.root / ".deploy" / "history.jsonl"
        return [json.loads(line)["result"] for line in path.read_text().splitlines()] if path.exists() else []

    def leftovers(self) -> List[str]:
        """What no run may leave."""
        state = self.root / ".deploy"
        found = [path.name for path in [*(self.root / "releases").glob(".new-*"), *(state / "trash").glob("*")]]
        return found + ["journal"] * (state / "journal.json").exists()


@pytest.fixture
def shop(host: Host, request: Any) -> Shop:
    """An application named as its test."""
    return Shop(host, f"shop{zlib.crc32(request.node.name.encode()):08x}")


# -- the README's service -----------------------------------------------------------

@deep
def test_the_real_service_of_the_readme_goes_live(shop: Shop, host: Host) -> None:
    """Its two files and its commands, word for word, but for where they lie and whose they are."""
    top, port = host.top / shop.name, str(shop.port)
    places = [("/srv/shop", str(shop.root)), ("/etc/deploy", str(top)), ("/usr/local/sbin", str(top)), ("/var/lib/artifacts", str(top / "in")),
              ("User=shop", "User=nobody"), ("8080", port), ("--quiet shop", f"--quiet {shop.name}"), ("shop.service", shop.unit)]

    def here(text: str) -> str:
        for written, place in places:
            text = text.replace(written, place)
        return text
    text = tables.section("A real service")
    config = re.search(r"(?ms)^```ini\n(.*?)^```$", text).group(1)  # type: ignore
    steps = [step.partition("\n") for step in re.split(r"(?m)^    \$ ", text)[1:]]
    lines = [line for line, _, _ in steps]
    assert config.startswith("# /etc/deploy/shop.ini\n") and lines[2] == "useradd --system shop" and len(lines) == 8
    host.unit(shop.unit, here(tables.units()["/etc/systemd/system/shop.service"]))
    shop.config.write_text(here(config))
    work = top / "work"
    (work / "shop").mkdir(parents=True)
    shutil.copy(str(host.deploy), str(work))
    (work / "shop" / "health.json").write_text('{"status": "ok", "version": "1.0"}\n')
    subprocess.run([sys.executable, "deploy.py", "pack", "shop", "--release-version", "1.0"], cwd=str(work), check=True, stdout=subprocess.DEVNULL)
    words = here("\n".join(lines[:2] + lines[3:]) + "\n").replace("\ndeploy.py", f"\n{top}/deploy.py")
    said = host.run("/bin/sh", "-ec", f"cd {work}\n{words}").stdout
    shown = here("".join(re.findall(r"(?m)^    (.*\n)", steps[-1][2])))
    assert "is live" in shown and shape(said) == shape(shown)
    assert host.properties(shop.unit, "ActiveState", "UnitFileState") == {"ActiveState": "active", "UnitFileState": "enabled"}
    assert os.readlink(str(shop.root / "current" / ".env")) == "../../shared/.env"


# -- a deployment that a timer starts ---------------------------------------------

@deep
def test_a_timer_deploys_a_real_service_and_goes_back_from_one_that_crashes(shop: Shop, host: Host) -> None:
    (shop.directory / "token").write_text("Bearer told-by-systemd\n")
    (shop.directory / "token").chmod(0o600)
    (shop.directory / "log").mkdir()
    shop.configure(f"[probe:web]\nurl = http://127.0.0.1:{shop.port}/\nbody = ^2\nperiod = 200ms\nauth_file = token\n"
                   f"[log]\nfile = log/deploy.log\n"
                   f"[hooks]\nrun_as = nobody\npost_activate = id -un\n"
                   f"pre_activate = sh -c 'touch {shop.directory}/outside; env'\n")
    shop.serve()
    incoming = shop.directory / "incoming.tar.gz"

    def arrive(version: str, files: Optional[Dict[str, Any]] = None) -> None:
        artifact = shop.artifact(version, files)
        os.rename(str(artifact), str(incoming))
        write_checksum(incoming)
    service = shop.units("deploy", incoming, timer="RandomizedDelaySec=0\nOnCalendar=\nOnCalendar=*:*:*\nAccuracySec=10ms",
                         drop_in=f"ReadWritePaths={shop.directory}/log\nLoadCredential=web:{shop.directory}/token")
    timer = service.replace(".service", ".timer")

    def tick(result: str) -> None:
        before = host.properties(service, "InvocationID")["InvocationID"]
        host.run("systemctl", "start", timer)
        wait_until(lambda: host.properties(service, "InvocationID")["InvocationID"] != before)
        host.run("systemctl", "stop", timer)
        wait_until(lambda: host.properties(service, "ActiveState")["ActiveState"] in ("inactive", "failed"))
        state = host.properties(service, "ExecMainStatus", "StatusText")
        assert state["ExecMainStatus"] == result, (state, host.journal(service))

    arrive("1.0")
    tick("0")
    assert shop.version == "1.0" and host.properties(shop.unit, "SubState")["SubState"] == "running"
    told = (shop.directory / "log" / "deploy.log").read_text()
    assert "nobody" in told and "DEPLOY_ID=" in told
    assert "CREDENTIALS" not in told and "NOTIFY_SOCKET" not in told and "told-by-systemd" not in told
    # ProtectSystem=strict: nothing but the root and the log's directory can be written.
    assert not (shop.directory / "outside").exists()
    tick("0")
    assert shop.history() == ["deployed"]

    arrive("2.0", CRASHING)
    tick("5")
    assert shop.version == "1.0" and shop.history() == ["deployed", "rolled_back"]
    assert host.properties(shop.unit, "SubState")["SubState"] == "running"
    assert "cannot find my database" in (shop.root / ".deploy" / "history.jsonl").read_text()
    tick("4")
    assert shop.version == "1.0" and "is marked bad" in host.journal(service), host.journal(service)


@deep
def test_the_units_journal_holds_the_end_of_each_step_once_and_with_its_fields(shop: Shop, host: Host) -> None:
    shop.configure("[hooks]\npre_activate = echo from the hook")
    shop.serve()
    service = shop.units("deploy", shop.artifact("1.0"))
    host.run("systemctl", "start", service)
    host.run("journalctl", "--sync")
    run = json.loads((shop.root / ".deploy" / "history.jsonl").read_text())
    entries = [json.loads(line) for line in host.run("journalctl", "-u", service, "-o", "json", "--no-pager").stdout.splitlines()]
    events = [entry for entry in entries if entry.get("DEPLOY_ID") == run["deploy_id"]]
    assert [entry.get("DEPLOY_STEP") for entry in events] == [step["name"] for step in run["steps"]] + [None]
    assert (events[-1]["DEPLOY_RESULT"], events[-1]["DEPLOY_APP"]) == ("deployed", shop.name)
    told = [entry["MESSAGE"] for entry in entries]
    assert sum(line.strip() == "| from the hook" for line in told) == 1 and not any(line.startswith("<") for line in told)
    assert {entry["SYSLOG_IDENTIFIER"] for entry in events} & {entry["SYSLOG_IDENTIFIER"] for entry in entries if "| from" in entry["MESSAGE"]}


@deep
def test_the_sandbox_of_the_readme_is_ok(host: Host) -> None:
    units = tables.units()
    whole = host.top / "whole.service"
    whole.write_text(units["/etc/systemd/system/deploy@.service"] + units["/etc/systemd/system/deploy@.service.d/sandbox.conf"])
    overall = host.run("systemd-analyze", "security", "--offline=true", whole).stdout.splitlines()[-1]
    assert float(overall.split(":")[1].split()[0]) < 3.5 and " OK " in overall


@deep
def test_what_a_power_cut_left_is_recovered_at_boot(shop: Shop, host: Host) -> None:
    shop.configure(service="action = none")
    shop.serve()
    shop.deploy("1.0")
    shop.configure("[hooks]\npre_activate = sh -c 'kill -9 $PPID'\n", service="action = none")
    host.run(host.deploy, "-c", shop.config, "deploy", shop.artifact("2.0"), check=None)
    assert shop.leftovers()
    shop.units("status")
    (host.top / "units" / f"deploy-recover@{shop.name}.service.d").mkdir()
    host.unit(f"deploy-recover@{shop.name}.service.d/test.conf", "[Service]\nExecStart=\n"
              f"ExecStart={host.deploy} -c {shop.config} recover\nReadWritePaths=\nReadWritePaths={shop.root}\n")
    host.run("systemctl", "start", f"deploy-recover@{shop.name}.service")
    assert shop.leftovers() == [] and shop.version == "1.0"


SERVER = """import http.server, os, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(open("VERSION", "rb").read())
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


@deep
def test_two_slots_run_the_readmes_unit(shop: Shop, host: Host) -> None:
    """Started from the README's own sandbox: a second release, one that crashes in its slot, and the way back by hand."""
    blue, green = free_port(), free_port()
    for slot, port in (("blue", blue), ("green", green)):
        (shop.directory / f"{slot}.env").write_text(f"PORT={port}\n")
    unit = tables.units()["/etc/systemd/system/shop@.service"]
    host.unit(f"{shop.name}@.service", unit.replace("/etc/shop", str(shop.directory)).replace("/srv/shop", str(shop.root)))
    shop.config.write_text(
        f"[deploy]\nroot = {shop.root}\napplication = {shop.name}\n"
        f"[slots]\nblue = {blue}\ngreen = {green}\nunit = {shop.name}@${{slot}}.service\ninclude = to ${{port}}\n"
        "reload = true\ndrain = 2s\nsettle = 400ms\ntimeout = 30s\nsystemctl = systemctl\n"
        "[probe:slot]\nurl = http://127.0.0.1:${port}/\nrelease = body\nperiod = 100ms\n")

    def run(*words: Any, code: str = "0") -> None:
        service = shop.units(*words)
        host.run("systemctl", "start", service, check=None)
        assert host.properties(service, "ExecMainStatus")["ExecMainStatus"] == code, host.journal(service)

    def states() -> List[Tuple[str, str]]:
        found = [host.properties(f"{shop.name}@{slot}.service", "ActiveState", "UnitFileState") for slot in ("blue", "green")]
        return [(state["ActiveState"], state["UnitFileState"]) for state in found]

    on, off = ("active", "enabled"), ("inactive", "disabled")
    run("deploy", shop.artifact("1.0", {"server.py": SERVER}))
    assert states() == [on, off] and shop.version == "1.0"
    run("deploy", shop.artifact("1.1", {"server.py": SERVER}))
    assert states() == [off, on] and shop.version == "1.1"
    run("deploy", shop.artifact("1.2", {"server.py": "raise SystemExit('no database')"}), code="1")
    assert states() == [off, on] and shop.version == "1.1" and shop.leftovers() == []
    assert "no database" in (shop.root / ".deploy" / "history.jsonl").read_text()
    run("rollback")
    assert states() == [on, off] and shop.version == "1.0"
    assert (shop.root / "slots" / "live.conf").read_text() == f"to {blue}\n"


# -- its limits and its stops ---------------------------------------------------------

@deep
def test_a_run_outlasts_its_limit_because_it_asks_for_time(shop: Shop, host: Host) -> None:
    shop.configure("[hooks]\npre_stage = sleep 6\n", service="action = none")
    shop.serve()
    service = shop.units("deploy", shop.artifact("1.0"), drop_in="TimeoutStartSec=4")
    host.run("systemctl", "start", "--no-block", service)
    shop.wait_for(service, "hook pre_stage: sleep 6")
    wait_until(lambda: host.properties(service, "ActiveState")["ActiveState"] in ("inactive", "failed"))
    assert host.properties(service, "Result")["Result"] == "success" and shop.version == "1.0"
    # The same where systemd does not listen.
    shop.units("deploy", shop.artifact("2.0"), drop_in="TimeoutStartSec=4\nNotifyAccess=none")
    host.run("systemctl", "start", service, check=1)
    assert host.properties(service, "Result")["Result"] == "timeout"
    assert shop.version == "1.0" and shop.leftovers() == [] and shop.history() == ["deployed", "failed"]


@deep
def test_a_stop_while_unpacking_leaves_nothing(shop: Shop, host: Host) -> None:
    shop.configure()
    shop.serve()
    shop.deploy("1.0")
    artifact = make_tar(shop.directory / "big-2.0.tar", [member(f"file{number}", b"x" * 2000) for number in range(40000)])
    write_checksum(artifact)
    service = shop.units("deploy", artifact)
    host.run("systemctl", "start", "--no-block", service)
    shop.wait_for(service, "verify and unpack")
    host.run("systemctl", "stop", service)
    state = host.properties(service, "ActiveState", "Result", "ExecMainStatus")
    assert state == {"ActiveState": "failed", "Result": "exit-code", "ExecMainStatus": "143"}
    assert shop.version == "1.0" and shop.leftovers() == [] and len(os.listdir(str(shop.root / "releases"))) == 1


@deep
def test_a_stop_while_probing_brings_the_old_release_back(shop: Shop, host: Host) -> None:
    shop.configure()
    shop.serve()
    shop.deploy("1.0")
    shop.configure("[probe:first]\ncommand = grep -q 1.0 VERSION\nsuccesses = 1\n")
    service = shop.units("deploy", shop.artifact("2.0"))
    host.run("systemctl", "start", "--no-block", service)
    shop.wait_for(service, "probe")
    assert shop.version == "2.0"
    host.run("systemctl", "stop", service)
    assert host.properties(service, "ExecMainStatus")["ExecMainStatus"] == "5"
    assert shop.version == "1.0" and shop.leftovers() == []
    pid = host.properties(shop.unit, "MainPID")["MainPID"]
    # Inside, processes are numbered anew.
    assert "1.0" in host.run("readlink", f"/proc/{pid}/cwd").stdout


@deep
def test_a_notify_unit_is_started_when_the_deployment_is_done_and_not_when_it_failed(shop: Shop, host: Host) -> None:
    shop.configure(service="action = none")
    shop.serve()
    for version, hook, check in (("1.0", "true", 0), ("2.0", "false", 1)):
        shop.configure(f"[hooks]\npre_activate = {hook}\n", service="action = none")
        service = shop.units("deploy", shop.artifact(version), drop_in="Type=notify")
        host.run("systemctl", "start", service, check=check)
        wait_until(lambda: host.properties(service, "ActiveState")["ActiveState"] in ("inactive", "failed"))
        assert host.properties(service, "Result")["Result"] == ("success", "exit-code")[check]


@deep
def test_from_inside_the_sandbox_a_release_in_use_by_a_service_of_another_user_is_seen(shop: Shop, host: Host) -> None:
    shop.configure(service="action = none")
    shop.serve()
    shop.deploy("1.0")
    host.unit(f"{shop.name}-worker.service", f"[Service]\nUser=nobody\nWorkingDirectory={shop.root}/current\nExecStart=/bin/sleep 1000\n")
    host.run("systemctl", "start", f"{shop.name}-worker.service")
    shop.deploy("2.0")
    shop.deploy("3.0")
    # Any user could keep a release for ever: what counts is what is configured.
    shop.configure(f"[service:worker]\nunit = {shop.name}-worker.service\naction = none\n", service="action = none")
    shop.deploy("4.0")
    service = shop.units("--set", "deploy.keep_releases=1", "prune")
    host.run("systemctl", "start", service)
    assert [name.split("-")[1] for name in sorted(os.listdir(str(shop.root / "releases")))] == ["1.0", "3.0", "4.0"]
    host.run("systemctl", "stop", f"{shop.name}-worker.service")
    host.run("systemctl", "start", service)
    assert [name.split("-")[1] for name in sorted(os.listdir(str(shop.root / "releases")))] == ["3.0", "4.0"]


# -- a service's troubles ----------------------------------------------------------------

def failure(result: Any) -> str:
    """What failed in the service's step, and the journal lines that came with it."""
    step = next(step for step in result["steps"] if step["status"] == "failed")
    return str(step["detail"])


def evidence(shop: Shop) -> str:
    """The unit's journal lines in the last run's history."""
    lines = (shop.root / ".deploy" / "history.jsonl").read_text().splitlines()
    return "\n".join(json.loads(lines[-1])["failure"]["evidence"]["journal"])


@deep
def test_a_crash_loop_is_found_although_it_is_often_active(shop: Shop, host: Host) -> None:
    shop.configure()
    shop.serve()
    shop.deploy("1.0")
    late = {"bin/run": file("#!/bin/sh\necho going down\nsleep 0.4\nexit 1\n", 0o755)}
    told = failure(shop.deploy("2.0", late, check=5))
    assert "did not stay up" in told or "auto-restart" in told
    assert "going down" in evidence(shop)
    assert shop.version == "1.0"


@deep
@pytest.mark.parametrize("kind", ["simple", "exec"])
def test_a_missing_binary_is_found(shop: Shop, host: Host, kind: str) -> None:
    shop.configure()
    shop.serve(more=f"Type={kind}\n")
    shop.deploy("1.0")
    told = failure(shop.deploy("2.0", {"bin/other": "x", "bin/run": None}, check=5))
    assert ("result exit-code 203" if kind == "simple" else "exited with code 1") in told
    assert "203/EXEC" in evidence(shop)
    assert shop.version == "1.0"


@deep
def test_a_unit_that_was_not_restarted_is_found(shop: Shop, host: Host) -> None:
    shop.configure()
    shop.serve()
    shop.deploy("1.0")
    # The real one but for a restart that does nothing, as one that was refused by a job in the queue.
    wrapper = shop.directory / "bin" / "systemctl"
    wrapper.parent.mkdir()
    wrapper.write_text(f'#!/bin/sh\n[ "$1" = restart ] && exit 0\nexec {shutil.which("systemctl")} "$@"\n')
    wrapper.chmod(0o755)
    told = failure(shop.deploy("2.0", None, 6, path=str(wrapper.parent)))
    assert "InvocationID is the one from before" in told


@deep
def test_many_deployments_in_a_row_never_meet_the_start_limit_and_a_loop_that_does_is_told(shop: Shop, host: Host) -> None:
    shop.configure(service="settle = 0s")
    shop.serve(more="Restart=on-failure\nRestartSec=0\n[Unit]\nStartLimitBurst=2\nStartLimitIntervalSec=60\n")
    for number in range(4):
        shop.deploy(f"1.{number}")
    shop.configure(service="settle = 3s")
    told = failure(shop.deploy("2.0", CRASHING, check=5))
    assert "is failed" in told or "did not stay up" in told or "auto-restart" in told
    assert "cannot find my database" in evidence(shop)
    assert "Start request repeated too quickly" in evidence(shop)
    assert shop.version == "1.3"


@deep
def test_a_changed_unit_file_is_loaded_first(shop: Shop, host: Host) -> None:
    shop.configure()
    shop.serve("/bin/sleep 1000")
    shop.deploy("1.0")
    shop.serve("/bin/sleep 2000", reload=False)
    assert host.properties(shop.unit, "NeedDaemonReload")["NeedDaemonReload"] == "yes"
    shop.deploy("2.0")
    pid = host.properties(shop.unit, "MainPID")["MainPID"]
    assert "2000" in host.run("cat", f"/proc/{pid}/cmdline").stdout


@deep
def test_a_unit_that_is_not_there_or_masked_is_found_before_anything_changes(shop: Shop, host: Host) -> None:
    shop.configure()
    error = shop.deploy("1.0", check=3)["error"]
    assert f"unit {shop.unit} is not loaded (LoadState=not-found)" in error["message"] and "daemon-reload" in error["hint"]
    (host.top / "units" / shop.unit).symlink_to("/dev/null")
    host.run("systemctl", "daemon-reload")
    assert f"systemctl unmask {shop.unit}" in shop.deploy("1.0", check=3)["error"]["hint"]


@deep
def test_the_unit_that_deploys_never_restarts_itself(shop: Shop, host: Host) -> None:
    shop.unit = f"deploy@{shop.name}.service"
    shop.configure()
    service = shop.units("deploy", shop.artifact("1.0"))
    host.run("systemctl", "start", service, check=1)
    assert host.properties(service, "ExecMainStatus")["ExecMainStatus"] == "3"
    assert "would be killed by its own restart" in host.journal(service)
