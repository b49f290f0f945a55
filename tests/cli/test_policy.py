"""[policy]: when, by whom and after what a release may go live, with real signatures of ssh-keygen."""

import base64
import calendar
import getpass
import hashlib
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Dict, List

import pytest

from origins import Nginx, Source, make_certificate
from support import DEPLOY, App, clean_environment, deep, load_deploy, make_artifact, needs, sha256_of

deploy = load_deploy()
NEVER = "windows = deny # closed"
PEOPLE = ("alice", "bob", "carol", "web1")


@pytest.fixture(scope="module")
def keys(tmp_path_factory: Any) -> Path:
    """Keys of three people and a host, and `signers`: whose they are; alice has two."""
    place = tmp_path_factory.mktemp("keys")
    lines = []
    for name in (*PEOPLE, "alice2", "anybody", getpass.getuser(), "stranger"):
        subprocess.run([needs("ssh-keygen"), "-q", "-t", "ed25519", "-N", "", "-f", str(place / name)], check=True)
        words = (place / f"{name}.pub").read_text().split()[:2]
        if name != "stranger":
            lines.append(" ".join(["*@example.com" if name == "anybody" else f"{name.rstrip('2')}@example.com", *words]))
    (place / "signers").write_text("# who may sign\n" + "\n".join(lines) + "\n")
    return place


def sign(keys: Path, name: str, path: Path, namespace: str = "deploy-approval", to: str = "") -> Path:
    """Sign a file as `name`, beside it, as `ssh-keygen -Y sign` does from stdin."""
    signature = path.with_name(f"{path.name}{to}.sig")
    with open(str(path), "rb") as text, open(str(signature), "wb") as out:
        subprocess.run(["ssh-keygen", "-q", "-Y", "sign", "-n", namespace, "-f", str(keys / name)], stdin=text, stdout=out, check=True)
    return signature


def write(app: App, artifact: Path, *command: str) -> Path:
    """Save beside the artifact what `approve` or `attest` prints."""
    path = Path(f"{artifact}.{'approval' if command[0] == 'approve' else 'attestation'}")
    path.write_text(app.run(*command, json=False, check=0).stdout)
    return path


def rows(result: Any) -> Dict[str, str]:
    """Each check's status and detail."""
    return {check["name"]: f"{check['status']}: {check['detail']}" for check in result.data["checks"]}


# -- windows -------------------------------------------------------------------

BERLIN, NIGHT, WEEK = "Europe/Berlin", "deny fri 22:00-06:00 # night", "allow mon-fri 09:00-16:00\ndeny wed 12:00-13:00"
WINDOWS = [  # 2026-11-27 is a Friday
    (NIGHT, BERLIN, "2026-11-27T20:59", "ok"), (NIGHT, BERLIN, "2026-11-27T21:00", "fail"), (NIGHT, BERLIN, "2026-11-28T04:59", "fail"),
    (NIGHT, BERLIN, "2026-11-28T05:00", "ok"), (NIGHT, BERLIN, "2026-11-28T22:30", "ok"), (NIGHT, "UTC", "2026-11-27T21:00", "ok"),
    (WEEK, "UTC", "2026-11-27T08:59", "fail"), (WEEK, "UTC", "2026-11-27T09:00", "ok"), (WEEK, "UTC", "2026-11-27T16:00", "fail"),
    (WEEK, "UTC", "2026-11-25T12:30", "fail"), (WEEK, "UTC", "2026-11-28T12:30", "fail"),
    ("deny sat-mon", "UTC", "2026-11-30T23:59", "fail"), ("deny sat-mon", "UTC", "2026-12-01T00:00", "ok"),
    ("deny tue,thu-fri 18:00-24:00", "UTC", "2026-11-27T23:59", "fail"), ("deny tue,thu-fri 18:00-24:00", "UTC", "2026-11-28T00:00", "ok"),
    ("deny 2026-12-18..2027-01-06", "UTC", "2027-01-06T23:59", "fail"), ("deny 2026-12-18..2027-01-06", "UTC", "2027-01-07T00:00", "ok"),
    ("deny 22:00-06:00 2026-12-24..2026-12-24", "UTC", "2026-12-25T05:59", "fail"),
    ("deny 22:00-06:00 2026-12-24..2026-12-24", "UTC", "2026-12-24T05:59", "ok"),
    # 02:30 is there twice on 2026-10-25, and not at all on 2027-03-28.
    ("deny 02:00-03:00", BERLIN, "2026-10-25T00:30", "fail"), ("deny 02:00-03:00", BERLIN, "2026-10-25T01:30", "fail"),
    ("deny 02:00-03:00", BERLIN, "2027-03-28T00:59", "ok"), ("deny 02:00-03:00", BERLIN, "2027-03-28T01:00", "ok"),
]


@pytest.mark.parametrize("lines, zone, at, status", WINDOWS)
def test_a_window_is_judged_by_the_time_on_the_wall(lines: str, zone: str, at: str, status: str, monkeypatch: Any) -> None:
    monkeypatch.setenv("TZ", "America/New_York")
    run = SimpleNamespace(settings=SimpleNamespace(policy=SimpleNamespace(windows=deploy.read_value("windows", lines), timezone=zone)),
                          facts=SimpleNamespace(now_seconds=calendar.timegm(time.strptime(at, "%Y-%m-%dT%H:%M"))))
    try:
        assert deploy.judge_windows(run, None)[0] == status
    except deploy.PreflightFailed:
        assert status == "fail"
    assert deploy.environment("TZ") == "America/New_York" and time.tzname[0] == "EST"


@pytest.mark.parametrize("line", ["permit mon", "allow mon-fr", "allow montue", "deny ,mon", "deny 25:00-26:00", "allow 09:00", "deny 24:00-06:00",
                                  "deny 2027-01-02..2026-12-20", "allow mon-fri, 09:00-16:00", "deny 2027-01-02"])
def test_a_line_that_is_no_window_is_a_mistake_of_the_configuration(app: App, line: str) -> None:
    app.configure(f"[policy]\nwindows =\n    allow\n    {line}")
    assert f"not {line}" in app.run("deploy", app.artifact("1.0"), check=2).data["error"]["message"]


def test_rules_that_miss_their_other_half_are_told_together(app: App) -> None:
    app.configure("[policy]\napprovals = 1\npromoted_after = 1d")
    message = app.run("deploy", app.artifact("1.0"), check=2).data["error"]["message"]
    assert "approvals needs approvers" in message and "promoted_after needs promoted_from" in message


def test_an_unknown_timezone_is_told_and_never_taken_for_utc(app: App) -> None:
    for zone in ("Mars/Olympus", "zone.tab"):  # which is a list of them
        app.configure(f"[policy]\nwindows = allow\ntimezone = {zone}")
        error = app.run("deploy", app.artifact("1.0"), check=3).data["error"]
        assert f"{zone} is unknown" in error["message"] and "tzdata" in error["hint"]


# -- what the rules guard ----------------------------------------------------------

def test_rules_guard_what_goes_live_for_the_first_time_and_no_way_back(app: App) -> None:
    app.deploy("1.0")
    app.deploy("1.1")
    app.configure(f"[policy]\n{NEVER}\njudge = false")
    for words in (["deploy", app.artifact("1.2")], ["-n", "deploy", app.artifact("1.2")], ["preflight", app.artifact("1.2")]):
        result = app.run(*words, check=3)
        assert rows(result)["windows"].endswith("; deny # closed") and rows(result)["judge"].startswith("fail: false exited with code 1")
    assert rows(app.run("preflight", check=3))["judge"].startswith("skip")
    staged = app.run("stage", app.artifact("1.2"), check=0)
    assert [warning.split(":")[0] for warning in staged.data["warnings"]] == ["windows", "judge"]
    app.run("activate", "1.2", check=3)
    app.run("-n", "activate", "1.2", check=3)
    assert rows(app.run("activate", "1.0", check=0))["windows"].startswith("skip")
    app.run("activate", "1.1", check=0)
    app.run("rollback", check=0)
    app.run("recover", check=0)
    assert app.version == "1.0"


def test_the_automatic_way_back_asks_nobody(app: App) -> None:
    app.deploy("1.0")
    app.configure("[policy]\njudge = sh -c 'test ! -e judged; touch judged'\n[probe:web]\ncommand = grep -q 1.0 VERSION\nsuccesses = 1\ndeadline = 1s")
    app.run("deploy", app.artifact("1.1"), check=5)
    assert app.version == "1.0" and (app.root / "judged").exists()


def test_override_passes_what_it_may_is_recorded_and_told(app: App) -> None:
    notifier = f"[notify:me]\ntype = command\ncommand = sh -c 'echo \"$DEPLOY_TEXT\" >> {app.directory}/told'"
    app.configure(f"[policy]\n{NEVER}")
    first, why = app.artifact("1.0"), ["--override", "the shop is down"]
    assert "override = no" in app.run("deploy", first, *why, check=3).data["error"]["message"] + str(rows(app.run("preflight", first, *why, check=3)))
    assert not app.releases()
    app.configure(f"[policy]\n{NEVER}\noverride = yes\njudge = grep -v '\"override\": \"the shop'\n{notifier}")
    error = app.run("deploy", first, *why, check=3).data["error"]
    assert "judge" in error["message"]  # nobody passes the judge
    app.configure(f"[policy]\n{NEVER}\noverride = yes\njudge = grep -q '\"override\": \"the shop'\n{notifier}")
    assert "--override WHY" in app.run("deploy", first, check=3).data["error"]["hint"]
    result = app.run("deploy", first, *why, "-m", "as asked", check=0)
    assert result.data["note"] == app.record(app.current)["note"] == app.history()[-1]["note"] == "as asked; override: the shop is down"
    assert result.data["warnings"][0].startswith("windows: ")
    assert "override: the shop is down" in (app.directory / "told").read_text().splitlines()[-1]
    assert "the shop is down" in app.run("show", json=False, check=0).stdout
    app.run("rollback", *why, check=2)


# -- the judge ---------------------------------------------------------------------

def test_the_judge_is_told_everything_and_its_first_line_is_the_reason(app: App) -> None:
    app.deploy("1.0")
    app.configure("[policy]\nenvironment = production\nwindows = allow\n"
                  f"judge = sh -c 'cat > {app.directory}/asked; echo because; echo more'")
    result = app.run("deploy", app.artifact("1.1"), check=0)
    asked = json.loads((app.directory / "asked").read_text())
    assert rows(result)["judge"] == "ok: because"
    assert set(asked) == {"schema", "operation", "application", "environment", "host", "now", "by", "artifact", "current", "previous",
                          "plan", "checks", "override"}
    assert (asked["operation"], asked["application"], asked["environment"]) == ("deploy", "myapp", "production")
    assert asked["current"]["version"] == "1.0" and asked["previous"] is None and asked["override"] is None
    assert asked["artifact"]["version"] == "1.1" and asked["by"]["user"] == app.history()[-1]["by"]["user"]
    assert [step["name"] for step in asked["plan"]][-1] == "prune" or "activate" in [step["name"] for step in asked["plan"]]
    assert {"name": "windows", "status": "ok"}.items() <= next(check for check in asked["checks"] if check["name"] == "windows").items()


def test_the_judge_is_asked_once_at_a_first_deployment_too(app: App) -> None:
    app.configure(f"[policy]\njudge = sh -c 'echo asked >> {app.directory}/asked'")
    app.run("deploy", app.artifact("1.0"), check=0)
    assert (app.directory / "asked").read_text() == "asked\n"
    app.run("deploy", app.artifact("1.1"), check=0)
    assert (app.directory / "asked").read_text() == "asked\n" * 2


def test_a_judge_is_not_asked_where_nothing_can_be_planned(app: App) -> None:
    app.deploy("1.0")
    (app.root / ".deploy" / "releases" / f"{app.current}.json").write_text("{}")
    app.configure("[policy]\njudge = true")
    for words in (["deploy", app.artifact("1.1")], ["deploy", app.directory / "nothing.tar.gz"], ["preflight", app.directory / "nothing.tar.gz"]):
        result = app.run(*words)
        assert result.exit_code in (3, 4) and rows(result)["judge"].startswith("skip")


@pytest.mark.parametrize("judge, said", [("sh -c 'echo no way; exit 3'", "exited with code 3: no way"), ("/nowhere/judge", "cannot start /nowhere/judge")])
def test_a_judge_that_says_no_or_is_missing_is_a_no(app: App, judge: str, said: str) -> None:
    app.configure(f"[policy]\njudge = {judge}")
    assert said in app.run("deploy", app.artifact("1.0"), check=3).data["error"]["message"]
    assert app.releases() == []


def test_a_judge_who_cannot_be_told_anything_is_a_no(app: App) -> None:
    app.configure("[policy]\njudge = true")
    for command, code in (("deploy", 3), ("stage", 0)):  # no block of 512 bytes for a temporary file
        words = [sys.executable, str(DEPLOY), "-c", str(app.config), "-n", command, str(app.artifact("1.0"))]
        done = subprocess.run(["sh", "-c", 'ulimit -f 0 && exec "$@"', "sh", *words], stderr=subprocess.PIPE, env=clean_environment())
        assert (done.returncode, b"judge: cannot keep in TMPDIR" in done.stderr) == (code, True), done.stderr
        assert code == 0 or b"hint: make room in TMPDIR or /tmp" in done.stderr


def test_a_judge_that_is_late_is_a_no(app: App, tmp_path: Path) -> None:
    hasty = tmp_path / "deploy.py"
    text = DEPLOY.read_text(encoding="utf-8").replace("JUDGE_SECONDS = 30.0", "JUDGE_SECONDS = 0.2")
    hasty.write_text(text, encoding="utf-8")
    app.configure("[policy]\njudge = sleep 60")
    done = subprocess.run([sys.executable, str(hasty), "-c", str(app.config), "deploy", str(app.artifact("1.0"))],
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=20)
    assert done.returncode == 3 and b"sleep 60 timed out" in done.stderr


def test_a_closed_window_is_written_down_once_though_the_days_go_by(app: App, tmp_path: Path) -> None:
    app.deploy("1.0")
    app.configure(f"[policy]\n{NEVER}")
    artifact, text = app.artifact("1.1"), DEPLOY.read_text(encoding="utf-8")
    for day in range(3):
        later = tmp_path / f"deploy{day}.py"
        later.write_text(text.replace("run.flags.command, time.time()", f"run.flags.command, time.time() + {day * 86400}"), encoding="utf-8")
        done = subprocess.run([sys.executable, str(later), "-c", str(app.config), "deploy", str(artifact)], stderr=subprocess.PIPE)
        assert done.returncode == 3 and b"; deny # closed" in done.stderr
    assert [line["result"] for line in app.history()] == ["deployed", "refused"]


# -- approvals ---------------------------------------------------------------------

def test_each_approver_counts_once_and_who_runs_it_does_not(app: App, keys: Path) -> None:
    app.configure(f"[policy]\nenvironment = production\napprovals = 2\napprovers = {keys}/signers")
    artifact = app.artifact("1.0")

    def refused() -> str:
        result = app.run("preflight", artifact, check=3)
        assert app.run("-n", "deploy", artifact, check=3).data["error"]["message"].startswith("preflight: approvals")
        return rows(result)["approvals"]

    assert "approval: No such file" in refused()
    text = write(app, artifact, "approve", str(artifact))
    assert "0 of 2: nobody; not counted: nobody" in refused()
    sign(keys, "alice", text)
    sign(keys, "alice2", text, to=".alice2")
    assert "1 of 2: alice@example.com" in refused()
    sign(keys, getpass.getuser(), text, to=".me")
    assert f"1 of 2: alice@example.com; not counted: {getpass.getuser()}@example.com" in refused()
    sign(keys, "anybody", text, to=".bob")
    assert "1 of 2: alice@example.com; not counted: *@example.com" in refused()
    sign(keys, "bob", text, "deploy-attestation", to=".bob")
    assert "deploy-attestation" in refused()
    sign(keys, "stranger", text, to=".bob")
    assert "allowed_signers does not let" in refused()
    sign(keys, "bob", text, to=".bob")
    assert rows(app.run("deploy", artifact, check=0))["approvals"] == "ok: 2 of 2: alice@example.com, bob@example.com; not counted: " \
        f"{getpass.getuser()}@example.com"


@pytest.mark.parametrize("what", ["application", "environment", "sha256", "expired", "changed", "damaged"])
def test_an_approval_is_of_one_artifact_for_one_place_and_time(app: App, keys: Path, what: str) -> None:
    app.configure(f"[policy]\nenvironment = production\napprovals = 1\napprovers = {keys}/signers")
    artifact, asked = app.artifact("1.0"), []  # type: Any
    other = {"application": "deploy.application=other", "environment": "policy.environment=staging"}.get(what)
    asked = ["--set", other] if other else ["--expires", "2020-01-01"] if what == "expired" else []
    text = write(app, artifact, "approve", str(artifact), *asked)
    signature = sign(keys, "alice", text)
    if what == "sha256":
        make_artifact(artifact.parent, "1.0", {"VERSION": "1.0", "more": "x"})
    elif what == "changed":
        text.write_text(text.read_text().replace("expires 20", "expires 21"))
    elif what == "damaged":
        signature.write_bytes(signature.read_bytes()[:-60])
    said = rows(app.run("preflight", artifact, check=3))["approvals"]
    assert {"expired": "it expired at 2020-01-01T00:00:00Z", "changed": "no known key signed these bytes", "damaged": "0 of 1"}.get(
        what, "it is about something else: ") in said


def test_what_is_signed_is_the_same_in_every_locale_and_stands_under_text(app: App) -> None:
    artifact = Path(shutil.copy(str(app.artifact("1.0")), str(app.directory / "shöp\n-1.0.tar.gz")))
    words = ["--set", "artifact.checksum=off", "approve", artifact, "--expires", "2030-01-01"]
    texts = {app.run(*words, json=False, env={"LANG": locale}, check=0).stdout for locale in ("C", "C.UTF-8")}
    assert texts == {app.run(*words, check=0).data["text"]}
    lines = texts.pop().splitlines()
    assert lines[3] == "artifact sh\\xf6p\\x0a-1.0.tar.gz" and lines[5] == "expires 2030-01-01T00:00:00Z" and len(lines) == 6


def test_damaged_approvers_are_told_with_their_line(app: App, keys: Path) -> None:
    (app.directory / "approvers").write_text("# nobody\nalice\n")
    app.configure("[policy]\napprovals = 1\napprovers = approvers")
    write(app, app.artifact("1.0"), "approve", str(app.artifact("1.0")))
    assert "approvers line 2" in app.run("deploy", app.artifact("1.0"), check=3).data["error"]["message"]


# -- promotion ----------------------------------------------------------------------

def test_what_did_not_run_in_staging_for_long_enough_does_not_run_in_production(tmp_path: Path, keys: Path) -> None:
    staging, production = App(tmp_path / "staging"), App(tmp_path / "production")
    staging.configure("[policy]\nenvironment = staging")
    artifact = staging.artifact("1.0")

    def promoted(after: str, attested: bool = True) -> Any:
        if attested:
            sign(keys, "web1", write(staging, artifact, "attest"), "deploy-attestation")
        production.configure("[policy]\nenvironment = production\npromoted_from = staging\n"
                             f"promoted_after = {after}\npromoted_within = 1d\nattesters = {keys}/signers")
        return production.run("deploy", artifact)

    assert "attestation: No such file" in promoted("1s", attested=False).data["error"]["message"]
    staging.run("deploy", artifact, check=0)
    result = promoted("1h")
    assert result.exit_code == 3 and "promoted_after is longer" in result.data["error"]["message"] and production.releases() == []
    statement = Path(f"{artifact}.attestation")
    for good, bad, said in (("staging", "testing", "environment is testing"), ("myapp", "yours", "application is yours"),
                            ('"attestedAt": "2', '"attestedAt": "1', "promoted_within"), ('"soakedSeconds": ', '"soakedSeconds": NaN, "x": ', "NaN"),
                            (deploy.DEPLOYMENT, "x", "predicateType is x")):
        write(staging, artifact, "attest")
        statement.write_text(statement.read_text().replace(good, bad))
        assert "no known key signed" in promoted("0s", attested=False).data["error"]["message"]
        sign(keys, "web1", statement, "deploy-attestation")
        assert said in promoted("0s", attested=False).data["error"]["message"]
    sign(keys, "stranger", statement, "deploy-attestation")
    assert promoted("0s", attested=False).exit_code == 3
    deadline = time.monotonic() + 20
    while promoted("1s").exit_code == 3 and time.monotonic() < deadline:
        time.sleep(0.2)
    assert production.version == "1.0"
    other = staging.artifact("1.1")
    for suffix in ("", ".sig"):
        shutil.copy(f"{artifact}.attestation{suffix}", f"{other}.attestation{suffix}")
    assert "sha256 is" in production.run("deploy", other, check=3).data["error"]["message"]


def test_an_attestation_is_of_what_ran_well_and_counts_only_its_time(app: App) -> None:
    app.configure("[policy]\nenvironment = staging\n[probe:web]\ncommand = sh -c '! grep -q broken VERSION'\ndeadline = 1s\nsuccesses = 1")
    app.deploy("1.0")
    app.run("stage", app.artifact("1.1"), check=0)
    app.run("attest", "1.1", check=7)
    app.run("deploy", app.artifact("1.2", {"VERSION": "broken"}), check=5)
    assert "1.2 is bad" in app.run("attest", "1.2", check=7).data["error"]["message"]
    app.run("attest", "9.9", check=2)
    app.run("activate", "1.1", check=0)
    records = {record["version"]: record for record in map(app.record, app.releases())}
    first = json.loads(app.run("attest", "1.0", check=0).data["text"])
    made, record = first["predicate"], records["1.0"]
    times = [calendar.timegm(time.strptime(record[name], "%Y-%m-%dT%H:%M:%SZ")) for name in ("activated_at", "deactivated_at")]
    assert made["soakedSeconds"] == times[1] - times[0]
    assert first["subject"] == [{"name": record["artifact"]["name"], "digest": {"sha256": record["artifact"]["sha256"]}}]
    assert set(made) == {"application", "environment", "host", "version", "release", "activatedAt", "attestedAt", "soakedSeconds", "deployId",
                         "result", "manifestSha256", "chain"}
    assert (made["result"], made["deployId"]) == ("deployed", app.history()[0]["deploy_id"])
    assert made["chain"] == app.run("history", check=0).data["chain"]


# -- SBOM and provenance -------------------------------------------------------------

@pytest.fixture(scope="module")
def pem(tmp_path_factory: Any) -> Path:
    """A key of openssl's, as cosign and builders have it, and its public half in `pem.pub`."""
    path = tmp_path_factory.mktemp("pem") / "pem"
    openssl = needs("openssl")
    subprocess.run([openssl, "ecparam", "-genkey", "-noout", "-name", "prime256v1", "-out", str(path)], check=True)
    subprocess.run([openssl, "ec", "-in", str(path), "-pubout", "-out", f"{path}.pub"], check=True, stderr=subprocess.DEVNULL)
    return path


def sign_raw(pem: Path, data: bytes) -> str:
    done = subprocess.run(["openssl", "dgst", "-sha256", "-sign", str(pem)], input=data, stdout=subprocess.PIPE, check=True)
    return base64.b64encode(done.stdout).decode()


def list_signed(pem: Path, *paths: Path) -> None:
    """Write SHA256SUMS of these files beside the first, and its signature."""
    sums = paths[0].with_name("SHA256SUMS")
    sums.write_text("".join(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in paths))
    sums.with_name("SHA256SUMS.sig").write_text(sign_raw(pem, sums.read_bytes()))


def cyclonedx(*parts: Any) -> Dict[str, Any]:
    """A CycloneDX document of (name, version, license or None), each nested in the one before."""
    found = []  # type: List[Any]
    for name, version, license in reversed(parts):
        kind = "expression" if license and " " in license else "id"
        licenses = [{kind: license} if kind == "expression" else {"license": {"id": license}}] if license else []
        found = [{"name": name, "version": version, "purl": f"pkg:npm/{name}@{version}", "licenses": licenses, "components": found}]
    return {"bomFormat": "CycloneDX", "specVersion": "1.5", "components": found}


def spdx(*parts: Any) -> Dict[str, Any]:
    """The same as SPDX 2.3."""
    return {"spdxVersion": "SPDX-2.3", "packages": [
        {"name": name, "versionInfo": version, "licenseConcluded": "NOASSERTION", "licenseDeclared": license or "NONE",
         "externalRefs": [{"referenceType": "purl", "referenceLocator": f"pkg:npm/{name}@{version}"}]} for name, version, license in parts]}


FINE = ("left-pad", "1.3.0", "MIT")
SBOMS = [
    ([FINE], "warn", 0, "1 package"), ([], "warn", 3, "no package"), ([FINE, ("x", "1", "AGPL-3.0-only")], "warn", 3, "x@1 (AGPL-3.0-only)"),
    ([("x", "1", "MIT OR AGPL-3.0-only")], "warn", 0, "ok"), ([("x", "1", "MIT AND AGPL-3.0-only")], "warn", 3, "x@1"),
    ([("x", "1", "AGPL-3.0-only AND (MIT OR Apache-2.0)")], "warn", 3, "x@1"), ([("x", "1", "BSD-2-Clause AND (MIT OR AGPL-3.0-only)")], "warn", 3, "x@1"),
    ([("x", "1", "(MIT OR AGPL-3.0-only)")], "warn", 0, "ok"), ([("x", "1", "(MIT OR AGPL-3.0-only) AND AGPL-3.0-only")], "warn", 3, "x@1"),
    ([("x", "1", "agpl-3.0-only WITH GCC-exception-3.1")], "warn", 3, "x@1"), ([FINE, ("event-stream", "3.3.6", "MIT")], "warn", 3, "event-stream@3.3.6"),
    ([("event-stream", "3.3.5", "MIT")], "warn", 0, "ok"), ([("colors", "2", "MIT")], "warn", 3, "colors"),
    ([FINE, ("y", "2", None)], "warn", 0, "1 license unknown: y@2"), ([FINE, ("y", "2", None)], "deny", 3, "y@2"),
    ([FINE, ("y", "2", None)], "allow", 0, "ok: 2 packages"),
]


@pytest.mark.parametrize("write_sbom", [cyclonedx, spdx], ids=["cdx", "spdx"])
def test_an_sbom_lists_nothing_that_is_denied(app: App, pem: Path, write_sbom: Any) -> None:
    artifact = app.artifact("1.0")
    sbom = Path(f"{artifact}.{'cdx' if write_sbom is cyclonedx else 'spdx'}.json")
    for parts, unknown, code, said in SBOMS:
        app.configure(f"[signature]\nverify = if-present\nkeys = {pem}.pub\n[policy]\ndeny_licenses = AGPL-*\n"
                      f"deny_packages =\n    event-stream@3.3.6\n    pkg:npm/colors@*\nunknown_licenses = {unknown}")
        sbom.write_text(json.dumps(write_sbom(*parts)))
        list_signed(pem, artifact, sbom)
        row = rows(app.run("preflight", artifact, check=code))["sbom"]
        assert said in row, parts
    assert app.run("deploy", artifact, check=0)


def test_an_sbom_counts_only_where_a_signed_list_has_it_and_the_artifact(app: App, pem: Path) -> None:
    app.configure(f"[signature]\nverify = if-present\nkeys = {pem}.pub\n[policy]\nsbom = yes")
    artifact = app.artifact("1.0")
    sbom, sums = Path(f"{artifact}.cdx.json"), artifact.with_name("SHA256SUMS")

    def refused() -> str:
        return rows(app.run("preflight", artifact, check=3))["sbom"]

    assert "spdx.json: No such file" in refused()
    sbom.write_text(json.dumps(cyclonedx(FINE)))
    assert "SHA256SUMS: No such file" in refused()
    list_signed(pem, artifact, sbom)
    app.run("preflight", artifact, check=0)
    sbom.write_text(json.dumps(cyclonedx(FINE, FINE)))
    assert "does not list" in refused()
    list_signed(pem, sbom)
    assert "does not list" in refused()
    list_signed(pem, artifact, sbom)
    sums.write_text(sums.read_text() + "\n")
    assert rows(app.run("preflight", artifact, check=3))["sbom"].startswith("fail: ")
    for text in ("[]", "{", '{"bomFormat": "CycloneDX", "components": 3}', "[" * 5000):
        sbom.write_text(text)
        list_signed(pem, artifact, sbom)
        assert refused().startswith("fail: ")
    app.configure("[policy]\nsbom = yes\noverride = yes")
    assert "sbom" in app.run("deploy", artifact, "--override", "because", check=3).data["error"]["message"]


@pytest.mark.parametrize("write_sbom, at, built_at", [
    (cyclonedx, "2026-11-20T12:30:00.5+02:00", "2026-11-20T10:30:00Z"), (spdx, "2026-11-19T23:30:00-09:30", "2026-11-20T09:00:00Z"), (spdx, "2026-11-20T10:00:00Z", "2026-11-20T10:00:00Z"),
    (spdx, "yesterday", None), (spdx, "2026-99-20T10:00:00Z", None), (cyclonedx, 3, None)])
def test_an_sbom_says_when_it_was_built_where_nothing_better_does(app: App, pem: Path, write_sbom: Any, at: Any, built_at: Any) -> None:
    app.configure(f"[signature]\nkeys = {pem}.pub\n[policy]\nsbom = yes")
    artifact = app.artifact("1.0")
    sbom = Path(f"{artifact}.{'cdx' if write_sbom is cyclonedx else 'spdx'}.json")
    sbom.write_text(json.dumps(dict(write_sbom(FINE), metadata={"timestamp": at}, creationInfo={"created": at})))
    list_signed(pem, artifact, sbom)
    app.run("deploy", artifact, check=0)
    assert app.record(app.current)["built_at"] == app.history()[-1]["built_at"] == built_at


def provenance(artifact: Path, pem: Path, version: str, builder: str, uri: str, **more: Any) -> None:
    """Write signed SLSA provenance beside the artifact."""
    digest = more.get("sha256") or hashlib.sha256(artifact.read_bytes()).hexdigest()
    predicate = {"builder": {"id": builder}, "invocation": {"configSource": {"uri": uri}},
                 "metadata": {"buildFinishedOn": "2026-11-20T10:00:00.123Z"}}  # type: Dict[str, Any]
    if version == "v1":
        predicate = {"buildDefinition": {"externalParameters": {"workflow": {"repository": uri}}, "resolvedDependencies": [{"uri": "git+https://x/y"}]},
                     "runDetails": {"builder": {"id": builder}, "metadata": {"finishedOn": "2026-11-20T10:00:00Z"}}}
    statement = json.dumps({"_type": "https://in-toto.io/Statement/v1", "subject": [{"name": "x", "digest": {"sha256": digest}}],
                            "predicateType": f"https://slsa.dev/provenance/{version}", "predicate": predicate}).encode()
    kind = b"application/vnd.in-toto+json"
    signature = sign_raw(pem, b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(statement), statement))
    Path(f"{artifact}.intoto.jsonl").write_text(json.dumps({
        "payloadType": kind.decode(), "payload": base64.b64encode(statement).decode(), "signatures": [{"sig": more.get("sig", signature)}]}) + "\n")


@pytest.mark.parametrize("version", ["v1", "v0.2"])
def test_provenance_names_a_builder_and_a_source_that_are_allowed(app: App, pem: Path, version: str) -> None:
    builder, source = "https://ci.example.com/build@v2", "https://git.example.com/shop"
    app.configure(f"[signature]\nkeys = {pem}.pub\n[policy]\nbuilders = {builder}\nsources = {source}")
    artifact = app.artifact("1.0")

    def refused() -> str:
        return rows(app.run("preflight", artifact, check=3))["provenance"]

    assert "No such file" in refused()
    uri = f"git+{source}@refs/tags/v1" if version == "v0.2" else source
    for wrong in ((f"{builder}x", uri), (builder, uri.replace("shop", "shopx")), (builder, "git+https://x/y")):
        provenance(artifact, pem, version, *wrong)
        assert "is none of" in refused()
    provenance(artifact, pem, "v9", builder, uri)
    assert "no SLSA provenance" in refused()
    provenance(artifact, pem, version, builder, uri)
    app.run("deploy", artifact, check=0)
    assert app.record(app.current)["built_at"] == app.history()[-1]["built_at"] == "2026-11-20T10:00:00Z"


# -- beside an artifact that sync fetches ------------------------------------------------

@deep
def test_sync_fetches_what_the_policy_asks_for_and_nothing_else(app: App, keys: Path, pem: Path, tmp_path: Path) -> None:
    place, builder = tmp_path / "nginx", "https://ci.example.com/build@v2"
    place.mkdir()
    nginx = Nginx(place, make_certificate(place))
    source = Source(nginx.files / "shop")
    common = (f"[artifact]\nmatch = myapp-@v.tar.gz\n[signature]\nkeys = {pem}.pub\n[source]\nurl = https://127.0.0.1:{nginx.port}/shop\n"
              f"tls_ca = {nginx.certificate}\n[policy]\nenvironment = production\n")
    rules = {"approvals": f"approvals = 2\napprovers = {keys}/signers", "promotion": f"promoted_from = staging\nattesters = {keys}/signers",
             "sbom": "sbom = yes", "provenance": f"builders = {builder}"}
    try:
        artifact = source.add("1.0+a")
        sbom = Path(f"{artifact}.spdx.json")
        sbom.write_text(json.dumps(spdx(FINE)))
        list_signed(pem, artifact, sbom)
        app.configure(common + "\n".join(rules.values()))
        sbom.rename(sbom.with_name("later"))
        told = rows(app.run("sync", check=3))
        assert {name for name in rules if "No such file or directory" in told[name]} == set(rules) and not app.releases()
        sbom.with_name("later").rename(sbom)
        text = write(app, artifact, "approve", str(artifact), "--set", "artifact.checksum=off")
        sign(keys, "alice", text)
        assert rows(app.run("-n", "sync", check=3))["approvals"].startswith("fail: ") and "1 of 2: alice" in rows(app.run("sync", check=3))["approvals"]
        sign(keys, "bob", text, to=".bob")
        staging = App(tmp_path / "staging")
        staging.configure("[policy]\nenvironment = staging")
        staging.run("deploy", artifact, "--set", "artifact.checksum=off", check=0)
        sign(keys, "web1", write(staging, artifact, "attest"), "deploy-attestation")
        provenance(artifact, pem, "v1", builder, "https://git.example.com/shop")
        nginx.asked()
        result = app.run("sync", check=0)
        assert app.version == "1.0+a" and all(rows(result)[name].startswith("ok: ") for name in rules), rows(result)
        paths = [line.split()[1] for line in nginx.asked() if "/SHA256SUMS " not in line]
        assert len(paths) == len(set(paths)), paths
        artifact = source.add("1.1")
        list_signed(pem, artifact)
        app.configure(common + rules["provenance"])
        provenance(artifact, pem, "v1", builder, "https://git.example.com/shop")
        app.run("sync", check=0)
        asked = [line.split()[1] for line in nginx.asked()]
        assert f"/shop/{artifact.name}.intoto.jsonl" in asked and not [path for path in asked if "approv" in path or "attest" in path or ".json" in path[-5:]]
        artifact = source.add("1.20")  # another size: nginx's ETag is of that and the second
        list_signed(pem, artifact)
        Path(f"{artifact}.intoto.jsonl").symlink_to(artifact.name + ".intoto.jsonl")  # a loop
        assert "status 403" in app.run("sync", check=1).data["error"]["message"] and app.version == "1.1"
        Path(f"{artifact}.intoto.jsonl").unlink()
        Path(f"{artifact}.intoto.jsonl").write_bytes(b" " * (17 << 20))
        assert "more than 16.8 MB" in app.run("sync", check=3).data["error"]["message"] and app.version == "1.1"
        # It is called what its URL ends in, whatever the index calls it.
        artifact.rename(source.directory / "shop+.tar.gz")
        artifact = source.directory / "shop+.tar.gz"
        source.index(dict(source.release("1.1"), version="1.3", name="shop-1.3.tar.gz", url="shop%2B.tar.gz", sha256=sha256_of(artifact), size=artifact.stat().st_size))
        Path(f"{artifact}.spdx.json").write_text(json.dumps(spdx(FINE)))
        (source.directory / "index.json.sig").write_text(sign_raw(pem, (source.directory / "index.json").read_bytes()))
        list_signed(pem, artifact, Path(f"{artifact}.spdx.json"))
        app.configure(common.replace("[policy]", "index = index.json\n[policy]").replace("match", "# match") + rules["approvals"].replace("= 2", "= 1") + "\nsbom = yes")
        sign(keys, "bob", write(app, artifact, "approve", str(artifact), "--set", "artifact.checksum=off"), to=".bob")
        app.run("sync", check=0)
        assert app.record(app.current)["version"] == "1.3"
    finally:
        nginx.stop()
