"""Preflight: every check made to fail by its real cause, with what to do about it, and nothing changed."""

import fcntl
import json
import os
import pwd
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional

import pytest

from support import (
    DEPLOY, App, Result, Server, clean_environment, described, fake_command, free_port, load_deploy, needs, open_to_others,
    run_as_another, snapshot, start_deploy, wait_until)

deploy = load_deploy()
NAMES = [row[0] for row in deploy.CHECKS]
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


@pytest.fixture(scope="module")
def template(tmp_path_factory: Any) -> App:
    """An application with 1.0 live, to be copied."""
    app = App(tmp_path_factory.mktemp("template") / "app")
    app.deploy("1.0")
    return app


@pytest.fixture
def deployed(template: App, app: App) -> App:
    """An application of one's own with 1.0 live: a copy, which takes no time."""
    app.root.rmdir()
    shutil.copytree(str(template.root), str(app.root), symlinks=True)
    return app


class Broken(NamedTuple):
    """What a case adds to the command line and to the environment, and what it wants closed at the end."""

    args: List[Any] = []
    env: Dict[str, Optional[str]] = {}
    keep: Any = None


def python_hook(code: str) -> str:
    """A hook's command line that runs Python code (without single quotes or newlines)."""
    return f"{sys.executable} -ISc '{code}'"


# -- one function a cause; each gets an application with 1.0 live ------------

def wrong_user(app: App) -> Broken:
    """[preflight] user names somebody else."""
    app.configure("[preflight]\nuser = somebody-else")
    return Broken()


def unknown_run_as(app: App) -> Broken:
    """[hooks] run_as names nobody."""
    app.configure("[hooks]\nrun_as = no-such-user")
    return Broken()


def probe_of_no_service(app: App) -> Broken:
    """A probe asks for a service that is not configured."""
    app.configure("[probe:web]\nservice = web")
    return Broken()


def probe_release_unreadable(app: App) -> Broken:
    """A probe's `release` says nothing."""
    app.configure("[probe:web]\nurl = http://127.0.0.1:1/\nrelease = version")
    return Broken()


def config_writable_by_others(app: App) -> Broken:
    """Anybody may write the configuration."""
    app.config.chmod(0o646)
    return Broken()


def config_directory_writable_by_others(app: App) -> Broken:
    """Anybody may replace the configuration."""
    app.directory.chmod(0o777)
    return Broken()


def config_of_another_user(app: App) -> Broken:
    """The configuration belongs to somebody else."""
    os.chown(str(app.config), 61234, -1)
    return Broken()


def artifact_of_another_user(app: App) -> Broken:
    """Somebody else may write what is to be deployed."""
    os.chown(str(app.directory / "artifacts" / "myapp-1.1.tar.gz"), 61234, -1)
    return Broken()


def state_open_to_others(app: App) -> Broken:
    """.deploy can be read by anybody."""
    (app.root / ".deploy").chmod(0o755)
    return Broken()


def root_without_a_parent(app: App) -> Broken:
    """The root cannot be made."""
    return Broken(["--root", app.directory / "no" / "such" / "root"])


def state_directory_is_a_file(app: App) -> Broken:
    """A file stands where a directory of .deploy/ belongs."""
    os.rename(str(app.root / ".deploy" / "trash"), str(app.root / ".deploy" / "trash.old"))
    (app.root / ".deploy" / "trash").write_text("")
    return Broken()


def current_is_a_directory(app: App) -> Broken:
    """`current` is a real directory with something in it."""
    (app.root / "current").unlink()
    (app.root / "current").mkdir()
    (app.root / "current" / "precious").write_text("data")
    return Broken()


def current_points_outside(app: App) -> Broken:
    """`current` points outside releases/."""
    (app.root / "current").unlink()
    (app.root / "current").symlink_to(app.directory / "artifacts")
    return Broken()


def current_leads_to_itself(app: App) -> Broken:
    """`current` is a circle, and there is a shared directory for which the live release is looked into."""
    (app.root / "current").unlink()
    (app.root / "current").symlink_to("current")
    return Broken(["--set", "deploy.shared_dirs=uploads"])


def current_dangles(app: App) -> Broken:
    """`current` points to a release that is gone."""
    (app.root / "current").unlink()
    (app.root / "current").symlink_to("releases/20200101T000000Z-0.1")
    return Broken()


def damaged_record(app: App) -> Broken:
    """A record was edited by hand."""
    path = app.root / ".deploy" / "releases" / f"{app.current}.json"
    path.write_text(path.read_text().replace('"1.0"', '"1.1"'))
    return Broken()


def another_application(app: App) -> Broken:
    """The root is another application's."""
    app.config.write_text(app.config.read_text().replace("application = myapp", "application = other"))
    return Broken()


def held_lock(app: App) -> Broken:
    """Another process holds the lock."""
    lock = open(str(app.root / ".deploy" / "lock"), "r+")
    fcntl.flock(lock, fcntl.LOCK_EX)
    lock.write(json.dumps({"pid": 1, "user": "me", "host": "here", "command": "deploy", "since": "now"}))
    lock.flush()
    return Broken(keep=lock)


def missing_digest(app: App) -> Broken:
    """The artifact has no digest beside it."""
    (app.directory / "artifacts" / "myapp-1.1.tar.gz.sha256").unlink()
    return Broken()


def unsigned(app: App) -> Broken:
    """Nobody signed the artifact."""
    return Broken(["--set", "signature.verify=required", "--set", "signature.command=/bin/true"])


def wrong_digest(app: App) -> Broken:
    """The digest beside the artifact is another's."""
    (app.directory / "artifacts" / "myapp-1.1.tar.gz.sha256").write_text("0" * 64 + "  myapp-1.1.tar.gz\n")
    return Broken()


def held(app: App) -> Broken:
    """Somebody said that nothing may change what is live."""
    app.run("hold", "-m", "the sale is on", check=0)
    return Broken()


def known_bad(app: App) -> Broken:
    """The artifact failed before."""
    app.run("deploy", app.directory / "artifacts" / "myapp-1.1.tar.gz", "--set", "hooks.post_activate=false", check=5)
    return Broken()


def known_bad_forced(app: App) -> Broken:
    """The artifact failed before, and the operator insists."""
    return known_bad(app)._replace(args=["--force"])


def older(app: App) -> Broken:
    """The version is older than what is live."""
    return Broken(["--release-version", "0.9"])


def older_allowed(app: App) -> Broken:
    """The version is older, and the operator insists."""
    return Broken(["--release-version", "0.9", "--allow-downgrade"])


def no_space(app: App) -> Broken:
    """More than the disk has must stay free."""
    app.configure("min_free = 999T")
    return Broken()


def missing_command(app: App) -> Broken:
    """A required program is not installed."""
    app.configure("[preflight]\nrequire_commands =\n    sh\n    no-such-program")
    return Broken()


def missing_variable(app: App) -> Broken:
    """A required variable is not set, another is empty."""
    app.configure("[preflight]\nrequire_env =\n    PATH\n    NOT_SET\n    EMPTY")
    return Broken(env={"EMPTY": ""})


def missing_file(app: App) -> Broken:
    """A required file is not there."""
    app.configure("[preflight]\nrequire_files =\n    deploy.ini\n    licence.key")
    return Broken()


def missing_shared_file(app: App) -> Broken:
    """A shared file was never put in place."""
    app.configure("shared_files = config/app.env")
    return Broken()


def shared_directory_is_a_file(app: App) -> Broken:
    """A file stands where a shared directory belongs."""
    (app.root / "shared").mkdir(exist_ok=True)
    (app.root / "shared" / "logs").write_text("")
    app.configure("shared_dirs = logs")
    return Broken()


def listening(host: str = "127.0.0.1") -> socket.socket:
    """Somebody who listens on a port."""
    listener = socket.socket()
    listener.bind((host, 0))
    listener.listen(1)
    return listener


def taken_port(app: App) -> Broken:
    """Another process listens on a port that must be free."""
    listener = listening()
    app.configure(f"[preflight]\nfree_ports =\n    127.0.0.1:{free_port()}\n    127.0.0.1:{listener.getsockname()[1]}")
    return Broken(keep=listener)


def taken_port_without_host(app: App) -> Broken:
    """Another process listens on a port on every address."""
    listener = listening("0.0.0.0")
    app.configure(f"[preflight]\nfree_ports = {listener.getsockname()[1]}")
    return Broken(keep=listener)


def taken_port_of_a_candidate(app: App) -> Broken:
    """Another process listens where the candidate is to."""
    listener = listening()
    app.configure(f"[candidate]\ncommand = bin/run\nport = {listener.getsockname()[1]}")
    return Broken(keep=listener)


def candidate_without_its_program(app: App) -> Broken:
    """What starts the candidate is not installed."""
    app.configure("[candidate]\ncommand = no-such-program ${DEPLOY_CANDIDATE_PORT}")
    return Broken()


def unknown_unit(app: App) -> Broken:
    """systemd does not know the unit."""
    fake = fake_command(app.directory.parent / "bin", "systemctl", "print('LoadState=not-found')")
    app.configure("[service:web]\nunit = no-such.service")
    return Broken(env=dict(fake.env))


def slots_without_systemd(app: App) -> Broken:
    """Two slots, and nothing that could start them."""
    app.configure("[slots]\na = 1\nb = 2\nunit = x@${slot}\ninclude = ${port}\nreload = true\nsystemctl = false\n")
    return Broken()


def services_in_a_circle(app: App) -> Broken:
    """Each service wants the other one to go first."""
    app.configure("[service:a]\ncommand = true\nafter = b\n[service:b]\ncommand = true\nafter = a")
    return Broken()


def missing_hook(app: App) -> Broken:
    """A hook's program is not installed."""
    app.configure("[hooks]\npost_deploy = no-such-program --flag\npre_activate = /no/such/program\npost_stage = bin/run\n"
                  "pre_stage = true\npost_activate = true\non_failure = true\npre_rollback = true\npost_rollback = true\ntimeout = 5s")
    return Broken()


def hook_not_executable(app: App) -> Broken:
    """A hook's program is a file that nobody may run."""
    (app.directory / "hook.sh").write_text("true\n")
    app.configure(f"[hooks]\npre_stage = {app.directory}/hook.sh")
    return Broken()


def hook_without_its_directory(app: App) -> Broken:
    """A hook's program comes with the release, and is named as if PATH had it."""
    app.configure("[hooks]\npre_activate = run")
    return Broken()


def port_of_nobody(app: App) -> Broken:
    """The address of a port is none."""
    app.configure("[preflight]\nfree_ports = 256.1.1.1:80")
    return Broken()


def port_of_no_name(app: App) -> Broken:
    """The host of a port cannot be a name."""
    app.configure("[preflight]\nfree_ports = ä..b:80")
    return Broken()


def service_without_pidfile(app: App) -> Broken:
    """The pidfile is not there."""
    app.configure("[service:app]\npidfile = /no/such.pid")
    return Broken()


def sick_before(app: App) -> Broken:
    """What the application needs is down before anything is changed."""
    app.configure(f"[probe:database]\ntcp = 127.0.0.1:{free_port()}\nwhen = before\ndeadline = 100ms\nperiod = 50ms\nrequired = yes")
    return Broken()


def policy(name: str, text: str, *args: str) -> Callable[[App], Broken]:
    """A rule of [policy] that says no."""
    def cause(app: App) -> Broken:
        (app.directory / "signers").write_text("")
        app.configure(f"[policy]\n{text}")
        return Broken(list(args))
    cause.__name__ = name
    return cause


CAUSES = [
    # cause, checks (what the same cause spoils for others included), status of those, what detail and hint say, how deploy ends
    (wrong_user, "configuration", "fail", "somebody-else", "sudo -u somebody-else", 3),
    (unknown_run_as, "configuration", "fail", "no-such-user", "run_as", 3),
    (config_writable_by_others, "permissions", "fail", "deploy.ini", "chmod go-w", 3),
    (config_directory_writable_by_others, "permissions origin", "fail", "writable by", "chmod go-w", 3),
    (config_of_another_user, "permissions", "fail", "61234", "chown", 3),
    (state_open_to_others, "permissions", "fail", "open to others", "chmod 0700", 3),
    (root_without_a_parent, "root space", "fail", "no/such", "mkdir -p", 3),
    (state_directory_is_a_file, "root", "fail", "no directory of", "move it", 3),
    (current_is_a_directory, "state", "fail", "not a symlink", "mv ", 3),
    (current_points_outside, "state", "fail", "outside releases/", "rm ", 3),
    (current_leads_to_itself, "state", "fail", "outside releases/", "rm ", 3),
    (current_dangles, "state", "fail", "does not exist", "rm ", 3),
    (damaged_record, "state", "fail", "checksum", "backup", 3),
    (another_application, "application", "fail", "this root is myapp's", "--force", 3),
    (held, "hold", "fail", "the sale is on", "unhold", 3),
    (held_lock, "lock", "fail", "held by pid", "--wait-lock", 75),
    (missing_digest, "artifact", "fail", "SHA-256", "sha256sum", 4),
    (unsigned, "signature", "fail", "no signature", "sign", 4),
    (wrong_digest, "artifact", "fail", "0000000000", "", 4),
    (artifact_of_another_user, "origin", "fail", "myapp-1.1.tar.gz belongs to uid 61234", "--sha256", 3),
    (known_bad, "artifact", "fail", "marked bad", "--force", 4),
    (known_bad_forced, "artifact", "warn", "tried again", "", 0),
    (older, "artifact", "fail", "older than 1.0", "--allow-downgrade", 4),
    (older_allowed, "artifact", "warn", "older than 1.0", "", 0),
    (no_space, "space", "fail", "kept free", "min_free", 3),
    (missing_command, "required", "fail", "no-such-program", "create no-such-program", 3),
    (missing_variable, "required", "fail", "NOT_SET", "create NOT_SET", 3),
    (missing_file, "required", "fail", "licence.key", "create", 3),
    (missing_shared_file, "shared", "fail", "shared/config/app.env", "put the real file", 3),
    (shared_directory_is_a_file, "shared", "fail", "not a directory", "move", 3),
    (taken_port, "required", "fail", "EADDRINUSE", "ss -ltnp", 3),
    (taken_port_without_host, "required", "fail", "EADDRINUSE", "ss -ltnp", 3),
    (taken_port_of_a_candidate, "programs", "fail", "EADDRINUSE", "ss -ltnp", 3),
    (candidate_without_its_program, "programs", "fail", "no-such-program is not found", "it must be there", 3),
    (unknown_unit, "services", "fail", "no-such.service", "", 3),
    (missing_hook, "programs", "fail", "no-such-program", "it must be there", 3),
    (hook_not_executable, "programs", "fail", "hook.sh is not found or not executable", "be executable (chmod +x)", 3),
    (hook_without_its_directory, "programs", "fail", "run is not found", "./NAME comes with the release", 3),
    (port_of_nobody, "required", "fail", "Name or service not known", "correct free_ports", 3),
    (port_of_no_name, "required", "fail", "port ä..b:80: encoding of hostname failed", "correct free_ports", 3),
    (slots_without_systemd, "slots", "fail", "systemctl show x@a exited with code 1", "without systemd", 3),
    (service_without_pidfile, "services", "warn", "service app: /no/such.pid: No such file or directory (ENOENT)", "start it", 0),
    (policy("closed", "windows = deny # the sale is on"), "windows", "fail", "deny # the sale is on", "wait", 3),
    (policy("unapproved", "approvals = 1\napprovers = signers"), "approvals", "fail", ".approval: No such file", "approve", 3),
    (policy("unpromoted", "promoted_from = staging\nattesters = signers"), "promotion", "fail", ".attestation: No such file", "attest", 3),
    (policy("unlisted", "sbom = yes"), "sbom", "fail", ".spdx.json: No such file", "SHA256SUMS", 3),
    (policy("unproven", "builders = ci"), "provenance", "fail", ".intoto.jsonl: No such file", "builder", 3),
    (policy("overridden", "override = no", "--override", "because"), "override", "fail", "override = no", "without", 3),
    (policy("judged", "judge = sh -c 'echo never; exit 1'"), "judge", "fail", "never", "decide", 3),
    (sick_before, "probes", "fail", "database", "before deploying", 3),
]


def probe_with_a_useless_expectation(app: App) -> Broken:
    app.configure("[probe:web]\ntcp = localhost:80\nstatus = 204\nbody = fine")
    return Broken()


@pytest.mark.parametrize("cause, where, message", [
    (probe_of_no_service, "[probe:web]", "there is no [service:"),
    (probe_release_unreadable, "[probe:web]", "expected json:PATH"),
    (probe_with_a_useless_expectation, "[probe:web]", "status and body mean nothing to a tcp probe"),
    (services_in_a_circle, "", "they wait for each other: a, b"),
], ids=lambda value: getattr(value, "__name__", None))
def test_sections_that_do_not_go_together_are_a_configuration_error(
        cause: Callable[[App], Broken], where: str, message: str, deployed: App) -> None:
    cause(deployed)
    before = snapshot(deployed.directory)
    for command in (("preflight",), ("deploy", deployed.artifact("1.1")), ("rollback",)):
        before = snapshot(deployed.directory)
        result = deployed.run(*command, check=2)
        assert message in result.data["error"]["message"] and result.data["error"]["hint"]
        assert where in result.data["error"]["message"] and (not where or str(deployed.config) in result.stderr)
        assert snapshot(deployed.directory) == before
    assert deployed.run("status").exit_code == 0


@pytest.mark.parametrize("cause,check,status,detail,hint,deploy_exit", CAUSES, ids=[row[0].__name__ for row in CAUSES])
def test_a_check_finds_its_cause_and_stops_a_deployment(
        cause: Callable[[App], Broken], check: str, status: str, detail: str, hint: str, deploy_exit: int, deployed: App) -> None:
    if os.geteuid() != 0 and check.split()[0] in ("permissions", "origin"):
        pytest.skip("needs root")
    artifact = deployed.artifact("1.1", {"conf.in": "${known} ${unknown}\n"})
    broken = cause(deployed)
    options = {"env": broken.env}  # type: Dict[str, Any]
    try:
        before = snapshot(deployed.directory)
        result = deployed.run("preflight", artifact, *broken.args, check=3 if status == "fail" else 0, **options)
        assert_found(result, check, status, detail, hint)
        assert snapshot(deployed.directory) == before
        done = deployed.run("deploy", artifact, *broken.args, check=deploy_exit, **options)
    finally:
        if broken.keep is not None:
            broken.keep.close()
    if deploy_exit:
        after = snapshot(deployed.directory)
        for path in ("root/current", "root/releases/"):  # unpacking touches releases/ itself
            assert {name: what for name, what in after.items() if name.startswith(path)} == {
                name: what for name, what in before.items() if name.startswith(path)}
        assert done.data["error"]["hint"] and "Traceback" not in done.stderr
    else:
        assert done.data["warnings"]


def assert_found(result: Result, check: str, status: str, detail: str, hint: str) -> None:
    """All checks ran, in order, and exactly these are not well; one of them has this status, detail and hint."""
    checks = result.data["checks"]
    assert [found["name"] for found in checks] == NAMES
    unwell = [found for found in checks if found["status"] in ("fail", "warn")]
    assert [found["name"] for found in unwell] == check.split(), result.describe()
    found = next((found for found in unwell if found["status"] == status and detail in found["detail"]), None)
    assert found and hint in found["hint"], unwell
    if status == "fail":
        assert found["hint"] and detail in result.data["error"]["message"] and result.data["error"]["hint"] == found["hint"]
    else:
        assert result.data["warnings"]


def test_every_check_has_a_cause_in_these_tests() -> None:
    text = Path(__file__).read_text(encoding="utf-8")
    covered = {name for row in CAUSES for name in row[1].split()} | set(re.findall(r'found_alone\(\w+, "([a-z-]+)"', text))
    assert set(NAMES) == covered


def found_alone(result: Result, check: str) -> Dict[str, Any]:
    """The one check that is not well."""
    unwell = [found for found in result.data["checks"] if found["status"] in ("fail", "warn")]
    assert [found["name"] for found in unwell] == [check], result.describe()
    return unwell[0]  # type: ignore


# -- all of them -------------------------------------------------------------

def test_all_is_well_on_a_good_host(app: App) -> None:
    result = app.run("preflight", app.artifact("1.0"), check=0)
    assert {found["status"] for found in result.data["checks"]} <= {"ok", "skip"}
    assert result.data["summary"] == {"checked": len(NAMES), "changed": 0, "failed": 0, "warnings": 0}
    assert all(found["detail"] for found in result.data["checks"])


def test_every_check_runs_and_every_failure_is_shown_whatever_fails_first(deployed: App) -> None:
    deployed.configure("min_free = 999T\nshared_files = none\n[preflight]\nuser = somebody-else\nrequire_commands = no-such-program\n"
                  "require_env = NOT_SET\nrequire_files = none\n[hooks]\npre_stage = no-such-program")
    wanted = {"configuration", "space", "required", "shared", "programs", "artifact"}
    for words, exit_code in ((["preflight", "/nonexistent/x.tar.gz"], 3), (["deploy", "/nonexistent/x.tar.gz"], 4)):
        result = deployed.run(*words, check=exit_code)
        assert {found["name"] for found in result.data["checks"] if found["status"] == "fail"} == wanted
        assert result.data["summary"]["failed"] == len(wanted)
        assert all(found["hint"] for found in result.data["checks"] if found["status"] == "fail")


@as_root
def test_a_state_that_this_user_cannot_look_at_is_told_with_its_owner() -> None:
    with open_to_others() as app:
        app.deploy("1.0")
        private, artifact = app.root / ".deploy", app.artifact("1.1")
        for words, exit_code in ((["preflight", artifact], 3), (["deploy", artifact], 3), (["-n", "deploy", artifact], 3),
                                 (["rollback"], 3), (["status"], 7), (["verify"], 7)):
            data = run_as_another(app, *words, but=private)
            assert data["exit_code"] == exit_code and f"{private} cannot be read by" in data["error"]["message"], data
            assert "run it as the owner" in data["error"]["hint"]


def test_people_get_a_table_and_the_hints_of_everything_that_failed(app: App) -> None:
    app.configure("min_free = 999T\n[preflight]\nrequire_commands = no-such-program")
    result = app.run("preflight", json=False, check=3)
    lines = result.stdout.splitlines()
    assert lines[0].split()[:3] == ["STATUS", "CHECK", "FOUND"] and len(lines) >= 1 + len(NAMES)
    assert [line.split()[1] for line in lines if line.startswith("fail")] == ["space", "required"]
    everything = result.stdout + result.stderr
    assert "min_free" in everything and "create no-such-program" in everything


def test_several_problems_of_one_check_are_all_named(app: App) -> None:
    app.configure("[preflight]\nrequire_commands =\n    no-such-1\n    sh\n    no-such-2\nrequire_env =\n    NOT_1\n    NOT_2")
    checks = {found["name"]: found for found in app.run("preflight", check=3).data["checks"]}
    assert all(name in checks["required"]["detail"] for name in ("no-such-1", "no-such-2"))
    assert all(name in checks["required"]["hint"] for name in ("NOT_1", "NOT_2"))


def test_what_is_required_and_there_is_well(app: App) -> None:
    app.configure(f"shared_dirs = var\nshared_files = app.env\n[preflight]\nuser = {deploy.user_name()}\nrequire_commands = sh\n"
                  f"require_env = NEEDED\nrequire_files = deploy.ini\nfree_ports =\n    127.0.0.1:{free_port()}\n    {free_port()}\n"
                  "[service:web]\ncommand = true\n[hooks]\npost_stage = bin/run\n[probe:db]\ncommand = true\nwhen = both\nsuccesses = 1")
    (app.root / "shared").mkdir()
    (app.root / "shared" / "app.env").write_text("A=1")
    result = app.run("preflight", app.artifact("1.0"), env={"NEEDED": "1"}, check=0)
    assert not [found for found in result.data["checks"] if found["status"] in ("fail", "warn")]
    checks = {found["name"]: found["status"] for found in result.data["checks"]}
    assert all(checks[name] == "ok" for name in ("configuration", "required", "shared", "services", "programs", "probes"))
    assert app.run("deploy", app.artifact("1.0"), env={"NEEDED": "1"}, check=0).data["changed"]


def test_the_user_may_be_given_by_number(app: App) -> None:
    app.configure(f"[preflight]\nuser = {os.geteuid()}")
    app.run("preflight", check=0)


def test_a_root_that_will_be_made_is_well(app: App) -> None:
    app.root.rmdir()
    checks = {found["name"]: found for found in app.run("preflight", app.artifact("1.0"), check=0).data["checks"]}
    assert "will be made" in checks["root"]["detail"] and not app.root.exists()


# -- the way back ------------------------------------------------------------

@pytest.mark.parametrize("words", [["rollback"], ["activate", "1.0"]], ids=["rollback", "activate"])
def test_the_way_back_does_not_wait_for_what_only_the_next_release_needs(words: List[str], app: App) -> None:
    app.deploy("1.0")
    app.deploy("1.1")
    app.configure("min_free = 999T\nshared_files = none\n[preflight]\nrequire_commands = no-such-program\nrequire_env = NOT_SET\n"
                  f"[probe:db]\ntcp = 127.0.0.1:{free_port()}\nwhen = before\ndeadline = 100ms")
    app.run(*words, check=0)
    assert app.version == "1.0"


@pytest.mark.parametrize("words", [["rollback"], ["activate", "1.0"]], ids=["rollback", "activate"])
def test_the_way_back_is_guarded_by_what_would_break_it(words: List[str], app: App) -> None:
    app.deploy("1.0")
    app.deploy("1.1")
    app.configure("[preflight]\nuser = somebody-else")
    app.run(*words, check=3)
    assert app.version == "1.1"


# -- current -----------------------------------------------------------------

@pytest.mark.parametrize("words,cause", [
    (["stage", "{artifact}"], current_is_a_directory), (["stage", "{artifact}"], current_points_outside),
    (["activate", "1.0"], current_dangles), (["activate", "1.0"], current_is_a_directory), (["rollback", "1.0"], current_points_outside),
], ids=lambda value: value[0] if isinstance(value, list) else value.__name__)
def test_a_wrong_current_is_left_alone_and_the_mending_command_mends_it(
        words: List[str], cause: Callable[[App], Broken], deployed: App) -> None:
    artifact = deployed.artifact("1.1")
    cause(deployed)
    before = snapshot(deployed.root / "current")
    result = deployed.run(*[word.format(artifact=artifact) for word in words], check=3)
    assert snapshot(deployed.root / "current") == before
    hint = result.data["error"]["hint"]
    if cause is current_dangles:
        deployed.run(*re.search(r"recover --to (?=RELEASE)", hint).group().split(), "1.0", check=0)  # type: ignore
    else:
        found = re.search(r"\b(mv|rm) \S+( \S+\.old)?", hint)
        subprocess.check_call(["/bin/sh", "-c", found.group()], cwd="/")  # type: ignore
        deployed.run("activate", "1.0", check=0)
    assert deployed.version == "1.0"


def test_status_of_a_wrong_current_is_a_problem_with_the_mending_command(deployed: App) -> None:
    current_is_a_directory(deployed)
    result = deployed.run("status", check=7)
    assert "mv " in result.data["error"]["hint"] and (deployed.root / "current" / "precious").read_text() == "data"


# -- recovery ----------------------------------------------------------------

def test_what_a_crash_left_is_a_warning(deployed: App) -> None:
    mark = deployed.directory / "mark"
    deployed.configure("[hooks]\npre_activate = " + python_hook(f'import time; open("{mark}", "w").close(); time.sleep(60)'))
    process = start_deploy("deploy", deployed.artifact("1.1"), config=deployed.config)
    try:
        wait_until(mark.exists, what="the hook to start")
    finally:
        os.killpg(process.pid, 9)
        process.wait()
    deployed.configure()
    result = deployed.run("preflight", check=0)
    found = found_alone(result, "lock")
    assert found["status"] == "warn" and "1.1" in found["detail"] and found["hint"]
    assert any("1.1" in warning for warning in result.data["warnings"])


# -- filesystems -------------------------------------------------------------

def in_a_mount_namespace(app: App, mount: str, *args: Any) -> Result:
    """Run deploy.py in a mount namespace of its own, after a shell command that mounts something."""
    argv = [sys.executable, str(DEPLOY), "--json", "-c", str(app.config)] + [str(arg) for arg in args]
    script = f"mount --make-rprivate / 2>/dev/null; {mount} || exit 99; exec \"$@\""
    done = subprocess.run([needs("unshare"), "-m", "/bin/sh", "-c", script, "sh"] + argv, env=clean_environment(), cwd="/",
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    if done.returncode in (1, 99) and not done.stdout:
        pytest.skip("cannot mount here: " + done.stderr.decode("utf-8", "replace").strip())
    return Result(argv, done.returncode, done.stdout.decode("utf-8"), done.stderr.decode("utf-8"), json.loads(done.stdout.decode("ascii")))


@as_root
@pytest.mark.parametrize("place", ["releases", ".deploy/trash", ".deploy"])
def test_another_filesystem_below_the_root_is_refused(place: str, app: App) -> None:
    for path in ("releases", ".deploy/trash"):
        (app.root / path).mkdir(mode=0o700, parents=True)
    (app.root / ".deploy").chmod(0o700)
    artifact, current = app.artifact("1.0"), app.current
    mount = f"mount -t tmpfs -o mode=0700 none {app.root}/{place}"
    result = in_a_mount_namespace(app, mount, "preflight", artifact)
    assert result.exit_code == 3, result.describe()
    found = found_alone(result, "root")
    assert found["status"] == "fail" and place in found["detail"] and f"{app.root}/{place}" in found["hint"]
    assert in_a_mount_namespace(app, mount, "deploy", artifact).exit_code == 3
    assert app.current == current and app.leftovers() == []


@as_root
def test_too_few_inodes_are_noticed_before_anything_is_unpacked(app: App) -> None:
    mount = f"mount -t tmpfs -o nr_inodes=60 none {app.root}"
    app.configure("min_free = 0")
    result = in_a_mount_namespace(app, mount, "deploy", app.artifact("1.0"))
    assert result.exit_code == 3, result.describe()
    assert "inodes free" in found_alone(result, "space")["detail"]


@as_root
def test_a_small_disk_is_noticed_before_anything_is_unpacked(app: App) -> None:
    app.configure("min_free = 0")
    artifact = app.artifact("1.0", {"big": os.urandom(3 << 20)})
    result = in_a_mount_namespace(app, f"mount -t tmpfs -o size=2m none {app.root}", "deploy", artifact)
    assert result.exit_code == 3, result.describe()
    found = found_alone(result, "space")
    assert "prune" in found["hint"] and "free" in found["detail"]


@as_root
def test_a_read_only_root_is_refused_with_its_reason(app: App) -> None:
    app.deploy("1.0")
    mount = f"mount -t tmpfs none {app.root} && mount -o remount,ro {app.root}"
    result = in_a_mount_namespace(app, mount, "preflight")
    assert result.exit_code == 3 and found_alone(result, "root")["hint"]
    assert in_a_mount_namespace(app, mount, "deploy", app.artifact("1.1")).exit_code == 3


# -- permissions, users ------------------------------------------------------

@as_root
def test_a_user_who_is_not_root_is_only_warned_of_a_writable_configuration() -> None:
    with open_to_others() as app:
        app.config.chmod(0o666)
        data = run_as_another(app, "preflight")
        assert data["exit_code"] == 0, described(data)
        assert [found["name"] for found in data["checks"] if found["status"] == "warn"] == ["permissions"]


@as_root
def test_hooks_run_as_another_user(app: App) -> None:
    try:
        user = pwd.getpwnam("nobody")
    except KeyError:
        pytest.skip("there is no user nobody")
    place = Path("/tmp") / f"deploy-test-run-as-{os.getpid()}"
    app.configure(f"[hooks]\nrun_as = {user.pw_name}\npost_deploy = /bin/sh -c 'id -u > {place}'\ntimeout = 20s")
    try:
        app.run("preflight", check=0)
        app.deploy("1.0")
        assert place.read_text().strip() == str(user.pw_uid)
    finally:
        if place.exists():
            place.unlink()


# -- probes before -----------------------------------------------------------

@pytest.mark.parametrize("when,stopped", [("before", True), ("both", True), ("after", False)])
def test_a_probe_stops_a_deployment_before_anything_changes_only_where_it_says_so(when: str, stopped: bool, app: App) -> None:
    mark = app.directory / "mark"
    app.configure(f"[hooks]\npre_stage = {python_hook(f'''open({str(mark)!r}, chr(119)).close()'''.replace(chr(39), chr(34)))}\n"
                  f"[probe:web]\ncommand = false\nwhen = {when}\ndeadline = 100ms\nperiod = 20ms")
    result = app.deploy("1.0", check=3 if stopped else 5)
    assert mark.exists() is not stopped
    assert app.current is None
    assert "web" in result.data["error"]["message"]


def test_an_optional_probe_before_only_warns(app: App) -> None:
    app.configure("[probe:cache]\ncommand = false\nwhen = before\nrequired = no\ndeadline = 100ms\nperiod = 20ms")
    result = app.run("preflight", app.artifact("1.0"), check=0)
    assert found_alone(result, "probes")["status"] == "warn"
    app.deploy("1.0")


@pytest.mark.parametrize("command", ["preflight", "deploy", "prune"])
@pytest.mark.parametrize("after, why", [("nosuch", "after = nosuch: there is no such"), ("web", "wait for each other: web")])
def test_an_after_that_cannot_be_names_file_section_and_key(command: str, after: str, why: str, app: App) -> None:
    config = app.configure(f"[service:web]\ncommand = true\nafter = {after}\n")
    words = [command, app.artifact("1.0")] if command == "deploy" else command.split()
    message = app.run(*words, check=2).data["error"]["message"]
    assert message.startswith(f"{config}: [service:web] after") and why in message


def test_preflight_tells_what_it_knows_of_the_artifact(app: App) -> None:
    artifact = app.artifact("1.0")
    found = app.run("preflight", artifact, check=0).data["artifact"]
    assert found == app.run("deploy", artifact, check=0).data["artifact"]
    assert "artifact" not in app.run("preflight", check=0).data


def test_a_before_probe_that_fails_tells_its_tries_and_the_answer(app: App, server: Server) -> None:
    server.status, server.body = 503, b"the database is away"
    app.configure(f"[probe:db]\nurl = {server.url}\nwhen = before\ndeadline = 200ms\nperiod = 50ms\n")
    message = app.run("deploy", app.artifact("1.0"), check=3).data["error"]["message"]
    assert re.search(r"probe db failed after \d+ tr", message) and "the answer began: 'the database is away'" in message
