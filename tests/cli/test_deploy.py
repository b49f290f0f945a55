"""deploy, stage and activate from end to end: what goes live, what is undone, what comes back, and what is said."""

import hashlib
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional

import pytest

from scenes import Gate, configure, deploy_all, fails_for
from support import (App, Server, clean_environment, deploy_argv, fake_command, file, free_port, make_tar,
                     make_tree, needs, run_deploy, sha256_of, snapshot, tree_members, write_checksum)

PROBE = "[probe:web]\nurl = {url}\nrelease = json:version\nsuccesses = 1\nperiod = 50ms\ndeadline = 3s\njitter = 0\n"


@pytest.fixture
def app(app: App) -> App:
    """An application that does not sync the whole filesystem."""
    configure(app)
    return app


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Gate]:
    """A gate that is open at the end, whatever happened."""
    made = Gate(tmp_path / "gates")
    yield made
    made.open()


def statuses(data: Dict[str, Any]) -> Dict[str, str]:
    """How each step ended."""
    return {step["name"]: step["status"] for step in data["steps"]}


# -- what goes live ----------------------------------------------------------

def test_a_deployment_makes_the_artifact_live(app: App) -> None:
    done = app.deploy("1.0").data
    assert app.version == "1.0"
    assert os.readlink(str(app.root / "current")) == f"releases/{done['release']}"
    assert re.match(r"\d{8}T\d{6}Z-1\.0\Z", done["release"])
    assert (app.root / "current" / "bin" / "run").stat().st_mode & 0o777 == 0o755
    assert (app.root / "current" / "data").read_text() == "data of 1.0\n"
    assert (app.root / "current" / "log").is_dir()
    assert app.leftovers() == []


def test_a_deployment_needs_no_configuration_file(tmp_path: Path, app: App) -> None:
    root = tmp_path / "srv" / "shop"
    root.parent.mkdir()
    done = run_deploy("deploy", app.artifact("1.0"), root=root, env={"DEPLOY_DEPLOY_DURABLE": "no"}, check=0)
    assert (root / "current" / "VERSION").read_text() == "1.0\n"
    assert done.data["application"] == "shop", "the root's last component"


def test_the_configured_application_name_is_used(app: App) -> None:
    assert app.deploy("1.0").data["application"] == "myapp"
    renamed = app.run("status", "--set", "deploy.application=billing", check=0)
    assert renamed.data["application"] == "billing"


def test_the_record_says_what_a_rollback_needs(app: App) -> None:
    first, second = deploy_all(app, "1.0", "2.0")
    record = app.record(second)
    assert set(record) >= {"schema", "id", "sequence", "version", "state", "pinned", "artifact", "tree", "created_at",
                           "activated_at", "deactivated_at", "previous", "by", "rollback", "failure"}
    assert (record["state"], record["previous"], record["failure"]) == ("active", first, None)
    assert record["artifact"]["sha256"] == sha256_of(app.directory / "artifacts" / "myapp-2.0.tar.gz")
    assert set(record["artifact"]) >= {"name", "source", "format", "size", "sha256", "signature"}
    assert set(record["tree"]) >= {"files", "directories", "symlinks", "bytes", "manifest_sha256"}
    assert set(record["by"]) >= {"user", "uid", "host", "pid", "trigger"}
    assert record["rollback"]["release"] == first
    assert re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z\Z", record["activated_at"])
    old = app.record(first)
    assert (old["state"], bool(old["deactivated_at"])) == ("retired", True)
    assert record["sequence"] > old["sequence"]
    program, *words = record["rollback"]["command"].split()
    assert program == "deploy.py"
    run_deploy(*words, check=0)
    assert app.current == first


def test_a_directory_can_be_deployed(app: App, tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "build", {"VERSION": "1.0", "bin/run": file("#!/bin/sh\n", 0o755)})
    done = app.run("deploy", tree, "--release-version", "1.0", "--set", "artifact.checksum=off", check=0)
    assert (app.version, done.data["artifact"]["format"]) == ("1.0", "directory")


def test_two_deployments_within_a_second_get_names_of_their_own(app: App) -> None:
    ids = [app.run("deploy", app.artifact("1.0", {"build": str(number)}), check=0).data["release"] for number in range(3)]
    assert len(set(ids)) == 3
    assert [app.record(name)["sequence"] for name in ids] == [1, 2, 3]


# -- stage and activate ------------------------------------------------------

def test_stage_unpacks_and_changes_nothing_live(app: App) -> None:
    app.deploy("1.0")
    staged = app.run("stage", app.artifact("2.0"), check=0).data
    assert (app.version, staged["changed"]) == ("1.0", True)
    assert app.record(staged["release"])["state"] == "staged"
    assert (app.root / "releases" / staged["release"] / "VERSION").read_text() == "2.0\n"


def test_activate_makes_a_staged_release_live(app: App) -> None:
    first = app.deploy("1.0").data["release"]
    staged = app.run("stage", app.artifact("2.0"), check=0).data["release"]
    done = app.run("activate", staged, check=0).data
    assert (app.version, app.current) == ("2.0", staged)
    assert (done["release"], done["previous"], done["changed"]) == (staged, first, True)
    assert "unpack" not in statuses(done)


def test_staging_the_same_artifact_twice_stages_once(app: App) -> None:
    artifact = app.artifact("1.0")
    first = app.run("stage", artifact, check=0).data
    before = app.releases()
    second = app.run("stage", artifact, check=0).data
    assert (second["changed"], second["release"], app.releases()) == (False, first["release"], before)


def test_a_staged_artifact_is_not_unpacked_again_by_deploy(app: App) -> None:
    artifact = app.artifact("1.0")
    staged = app.run("stage", artifact, check=0).data["release"]
    done = app.run("deploy", artifact, check=0).data
    assert (app.current, app.releases()) == (staged, [staged])
    assert "unpack" not in statuses(done)


def test_a_staged_release_that_was_changed_is_staged_again(app: App) -> None:
    artifact = app.artifact("1.0")
    staged = app.run("stage", artifact, check=0).data["release"]
    (app.root / "releases" / staged / "VERSION").write_text("something else\n")
    done = app.run("deploy", artifact, check=0)
    assert (app.version, app.current != staged) == ("1.0", True)
    assert any("changed" in warning for warning in done.data["warnings"])


def test_activate_refuses_a_release_that_was_changed(app: App) -> None:
    app.deploy("1.0")
    staged = app.run("stage", app.artifact("2.0"), check=0).data["release"]
    (app.root / "releases" / staged / "lib" / "nested" / "data.txt").write_text("planted\n")
    refused = app.run("activate", staged, check=1)
    assert app.version == "1.0"
    assert "lib/nested/data.txt" in refused.data["error"]["message"]


def test_a_failure_before_activation_leaves_a_staged_release_staged(app: App) -> None:
    configure(app, "[hooks]\npre_activate = false\n")
    artifact = app.artifact("1.0")
    staged = app.run("stage", artifact, check=0).data["release"]
    for command in (["deploy", artifact], ["activate", staged]):
        app.run(*command, check=1)
        assert (app.current, app.releases(), app.record(staged)["state"]) == (None, [staged], "staged")


# -- doing nothing twice -----------------------------------------------------

@pytest.mark.parametrize("command", ["deploy", "stage", "activate"])
def test_what_is_live_already_changes_nothing(app: App, command: str) -> None:
    artifact = app.artifact("1.0")
    release = app.run("deploy", artifact, check=0).data["release"]
    before = {name: found for name, found in snapshot(app.root).items() if name != ".deploy/lock"}
    again = app.run(command, release if command == "activate" else artifact, "--detailed-exitcode", check=0).data
    assert (again["changed"], again["release"], again["ok"]) == (False, release, True)
    assert {name: found for name, found in snapshot(app.root).items() if name != ".deploy/lock"} == before


def test_what_is_live_is_known_by_its_bytes_also_under_another_version(app: App) -> None:
    artifact = app.artifact("1.0")
    release = app.run("deploy", artifact, "--release-version", "7.7", check=0).data["release"]
    for words in (["deploy", artifact], ["-n", "deploy", artifact], ["preflight", artifact]):
        again = app.run(*words, check=0).data
        assert (again["changed"], again["artifact"]["version"]) == (False, "7.7") and app.current == release
    named = app.run("deploy", artifact, "--release-version", "7.8", check=0).data
    assert named["changed"] and app.current == named["release"] != release, "a version that is asked for is another release"
    staged = app.run("stage", artifact, "--allow-downgrade", check=0).data
    assert staged["changed"] and staged["release"].endswith("-1.0"), "what is not live is staged under its own name"


def test_no_undo_is_offered_that_would_be_refused(app: App) -> None:
    app.deploy("1.0")
    shutil.rmtree(str(app.root / ".deploy"))
    assert "  undo  " not in app.run("deploy", app.artifact("1.1"), json=False, check=0).stdout
    app.run("rollback", check=3)
    assert "  undo  " in app.run("deploy", app.artifact("1.2"), json=False, check=0).stdout
    app.run("rollback", check=0)


def test_no_undo_leads_to_what_failed(app: App) -> None:
    app.configure("auto_rollback = no\n[hooks]\npost_deploy = false\n")
    app.deploy("1.0", check=6)
    app.configure()
    assert "  undo  " not in app.run("deploy", app.artifact("1.1"), json=False, check=0).stdout
    app.run("rollback", check=3)
    app.configure("auto_rollback = no\n[hooks]\npost_deploy = false\n")
    app.deploy("1.2", check=6)
    app.configure()
    assert "  undo  " not in app.run("rollback", json=False, check=0).stdout
    app.run("activate", "1.2", check=4)


@pytest.mark.parametrize("name", ["latest", "current", "previous"])
def test_a_version_is_not_called_like_a_role(app: App, name: str) -> None:
    error = app.run("deploy", app.artifact("1.0"), "--release-version", name, check=2).data["error"]
    assert name in error["message"] and error["hint"] and not (app.root / ".deploy").exists()
    app.configure("[artifact]\nmatch = myapp-@v.tar.gz\n")
    error = app.run("deploy", app.artifact(name), check=4).data["error"]
    assert name in error["message"] and "--release-version" in error["hint"] and not (app.root / ".deploy").exists()


def test_services_that_a_failed_first_deployment_started_are_named(app: App) -> None:
    app.configure("[service:web]\ncommand = true\n[probe:web]\ncommand = false\ndeadline = 200ms\nsuccesses = 1\n")
    first = app.run("deploy", app.artifact("1.0"), check=5).data
    assert any(warning.startswith("service:web may still run what failed") for warning in first["warnings"]), first["warnings"]
    app.configure("[service:web]\ncommand = true\n[hooks]\npost_deploy = false\npre_rollback = /bin/sh -c 'kill -9 $PPID'\n")
    assert app.run("deploy", app.artifact("1.1"), json=False).exit_code < 0
    app.configure()
    recovered = app.run("recover", check=0).data
    assert any(warning.startswith("service:web may still run what failed") for warning in recovered["warnings"]), recovered["warnings"]


def test_where_the_way_back_failed_previous_is_the_other_of_the_two(app: App) -> None:
    first = app.deploy("1.0").data["release"]
    app.configure("[hooks]\npost_deploy = false\n[service:web]\ncommand = sh -c 'test $DEPLOY_VERSION = 1.1'\n")
    failed = app.deploy("1.1", check=6).data
    assert (failed["release"], failed["previous"][-4:]) == (first, "-1.1") and failed["summary"]["failed"] >= 1


def test_the_same_version_with_other_bytes_is_another_release(app: App) -> None:
    first = app.deploy("1.0").data["release"]
    second = app.deploy("1.0", {"extra": "x"}).data
    assert (second["changed"], second["release"] != first) == (True, True)
    assert (app.root / "current" / "extra").exists()


def test_an_artifact_that_was_live_before_is_activated_and_not_unpacked_again(app: App) -> None:
    artifact = app.artifact("1.0")
    first = app.run("deploy", artifact, check=0).data["release"]
    app.deploy("2.0")
    done = app.run("deploy", artifact, "--allow-downgrade", check=0).data
    assert (app.current, done["release"], len(app.releases())) == (first, first, 2)


@pytest.mark.parametrize("code, before", [(10, "nothing"), (0, "the same release")], ids=["changed", "unchanged"])
def test_detailed_exitcode_tells_a_change_from_none(app: App, code: int, before: str) -> None:
    artifact = app.artifact("1.0")
    if before != "nothing":
        app.run("deploy", artifact, check=0)
    app.run("deploy", artifact, "--detailed-exitcode", check=code)


# -- older versions ----------------------------------------------------------

@pytest.mark.parametrize("live, offered, code", [
    ("1.10", "1.9", 4), ("1.0", "1.0-rc.1", 4), ("1.9", "v1.10", 0), ("nightly-b", "nightly-a", 0),
    ("1." + "7" * 60, "1." + "6" * 60, 4),
], ids=lambda value: str(value))
def test_only_what_is_certainly_older_needs_allow_downgrade(app: App, live: str, offered: str, code: int) -> None:
    first = app.run("deploy", app.artifact("x", {"n": live}), "--release-version", live, check=0).data["release"]
    artifact = app.artifact("y", {"n": offered})
    refused = app.run("deploy", artifact, "--release-version", offered, check=code)
    if code:
        assert (app.current, "--allow-downgrade" in refused.data["error"]["hint"]) == (first, True)
        app.run("deploy", artifact, "--release-version", offered, "--allow-downgrade", check=0)
    assert app.current != first


# -- what fails before activation ---------------------------------------------

BEFORE = {
    "pre_stage hook": ("[hooks]\npre_stage = false\n", 1),
    "post_stage hook": ("[hooks]\npost_stage = false\n", 1),
    "pre_activate hook": ("[hooks]\npre_activate = false\n", 1),
    "second command of a hook": ("[hooks]\npre_activate =\n  true\n  false\n", 1),
    "hook out of time": ("[hooks]\npre_activate = sleep 60\ntimeout = 100ms\n", 1),
    "unknown key": ("[hooks]\npre_activat = true\n", 2),
    "bad value": ("keep_releases = many\n", 2),
    "missing command": ("[preflight]\nrequire_commands = no-such-command-here\n", 3),
    "too little space": ("min_free = 900000G\n", 3),
    "missing shared file": ("shared_files = .env\n", 3),
    "unknown program in a hook": ("[hooks]\npost_deploy = no-such-command-here\n", 3),
}


@pytest.mark.parametrize("text, code", list(BEFORE.values()), ids=list(BEFORE))
def test_a_failure_before_activation_changes_nothing(app: App, text: str, code: int) -> None:
    first = app.deploy("1.0").data["release"]
    configure(app, text)
    done = app.run("deploy", app.artifact("2.0"), check=code)
    assert (app.current, app.releases(), app.leftovers()) == (first, [first], [])
    assert (done.data["rolled_back"], done.data["changed"], done.data["failed"]) == (False, False, True)
    assert done.data["error"]["message"] and done.data["error"]["hint"]
    if code == 1:  # nothing of it stands in the way of the next try
        configure(app)
        app.deploy("2.0")
        assert app.version == "2.0"


def test_a_failed_hook_undoes_the_steps_before_it_and_is_in_the_history(app: App) -> None:
    command = fake_command(app.directory / "bin", "migrate", "print('the database is full', file=sys.stderr)\nsys.exit(3)")
    configure(app, f"[hooks]\npre_activate = {command.path}\n")
    done = app.run("deploy", app.artifact("1.0"), check=1).data
    assert statuses(done) == {"unpack": "undone", "publish": "undone", "seal": "undone", "hook:pre_activate": "failed"}
    assert "the database is full" in done["error"]["message"]
    last = app.history()[-1]
    assert (last["result"], last["exit_code"], last["failure"]["step"]) == ("failed", 1, "hook:pre_activate")
    assert last["failure"]["evidence"]["output"] == ["the database is full"]


def refused_artifacts(app: App) -> Dict[str, List[Any]]:
    """Arguments of `deploy` that name an artifact which must not go live."""
    good = app.artifact("2.0")
    cut = app.directory / "artifacts" / "myapp-2.1.tar.gz"
    cut.write_bytes(good.read_bytes()[:-40])
    write_checksum(cut)
    changed = app.artifact("2.2")
    changed.write_bytes(good.read_bytes())
    lonely = app.artifact("2.3")
    lonely.with_name(lonely.name + ".sha256").unlink()
    text = app.directory / "artifacts" / "myapp-2.4.tar.gz"
    text.write_text("<html>404 Not Found</html>")
    write_checksum(text)
    return {
        "missing": [app.directory / "no-such-1.0.tar.gz"], "digest given differs": [good, "--sha256", "0" * 64],
        "digest beside it differs": [changed], "no digest": [lonely], "cut off": [cut], "not an archive": [text],
        "older": [app.artifact("0.9")],
    }


@pytest.mark.parametrize("which", ["missing", "digest given differs", "digest beside it differs", "no digest", "cut off",
                                   "not an archive", "older"])
def test_a_refused_artifact_leaves_everything_as_it_was(app: App, which: str) -> None:
    first = app.deploy("1.0").data["release"]
    refused = app.run("deploy", *refused_artifacts(app)[which], check=4)
    assert (app.current, app.releases(), app.leftovers()) == (first, [first], [])
    assert refused.data["error"]["message"] and refused.data["error"]["hint"]


def test_the_refusal_without_a_digest_shows_the_command_that_makes_one(app: App) -> None:
    artifact = app.artifact("1.0")
    artifact.with_name(artifact.name + ".sha256").unlink()
    hint = app.run("deploy", artifact, check=4).data["error"]["hint"]
    command = re.search(r"\(?cd .*?\.sha256\)?|sha256sum .*?\.sha256", hint)
    assert command, hint
    subprocess.check_call(["sh", "-c", command.group()], cwd=str(artifact.parent))
    app.run("deploy", artifact, check=0)


# -- what fails after activation ----------------------------------------------

def after_failures(app: App) -> Dict[str, str]:
    """A piece of configuration for each way to fail once version 2.0 is live."""
    bad = fails_for(app.directory / "bin", "2.0").path
    probe = "successes = 1\nperiod = 10s\ndeadline = 3s\njitter = 0\n"
    return {
        "hook:post_activate": f"[hooks]\npost_activate = {bad}\n",
        "hook:post_deploy": f"[hooks]\npost_deploy = {bad}\n",
        "service:web": f"[service:web]\ncommand = {bad}\n",
        "probe:web": f"[probe:web]\ncommand = {bad}\n{probe}",
    }


@pytest.mark.parametrize("step", ["hook:post_activate", "hook:post_deploy", "service:web", "probe:web"])
def test_a_failure_after_activation_brings_the_previous_release_back(app: App, step: str) -> None:
    configure(app, after_failures(app)[step])
    first = app.deploy("1.0").data["release"]
    done = app.run("deploy", app.artifact("2.0"), check=5)
    failed = done.data["previous"]
    assert (app.current, app.version, done.data["release"]) == (first, "1.0", first)
    assert (done.data["rolled_back"], done.data["changed"], done.data["failed"]) == (True, True, True)
    assert statuses(done.data)[step] in ("failed", "done")  # a service is asked again on the way back
    assert [found["status"] for found in done.data["steps"] if found["name"] == step][0] == "failed"
    assert "no such table: users" in done.data["error"]["message"], "the evidence stands in the message"
    assert first in done.data["error"]["message"]
    record, last = app.record(failed), app.history()[-1]
    assert (record["state"], app.record(first)["state"]) == ("bad", "active")
    assert (last["result"], last["exit_code"], last["release"]) == ("rolled_back", 5, failed)
    for failure in (record["failure"], last["failure"]):
        assert failure["step"] == step
        assert "no such table: users" in json.dumps(failure["evidence"])
    assert app.leftovers() == []
    app.run("status", check=0)


def test_show_prints_the_evidence_of_a_failure(app: App) -> None:
    configure(app, after_failures(app)["service:web"])
    app.deploy("1.0")
    failed = app.run("deploy", app.artifact("2.0"), check=5).data
    shown = app.run("show", failed["deploy_id"], json=False, check=0).stdout
    assert "no such table: users" in shown and "service:web" in shown and "rolled_back" in shown


def test_show_of_a_release_is_its_deployment_and_not_a_later_pin(app: App) -> None:
    deployed = app.deploy("1.0").data
    app.run("pin", "1.0", check=0)
    app.run("unpin", "1.0", check=0)
    for name in ("current", "1.0", deployed["release"]):
        shown = app.run("show", name, check=0).data
        assert [entry["deploy_id"] for entry in shown["history"]] == [deployed["deploy_id"]]
    assert app.run("show", "latest", check=0).data["history"][0]["operation"] == "unpin"


@pytest.mark.parametrize("status, body, seen", [
    (500, b"Traceback: cannot import name config", "500"),
    (200, b'{"version": "1.0", "status": "starting"}', "1.0"),
], ids=["an error", "another version"])
def test_the_answer_of_a_failed_probe_is_kept_as_evidence(app: App, server: Server, status: int, body: bytes, seen: str) -> None:
    configure(app)
    first = app.deploy("1.0").data["release"]
    server.restart()
    configure(app, f"[service:web]\ncommand = {server.restart_command.path}\n" + PROBE.format(url=server.url))
    server.status, server.body = status, body
    # The same answer also meets the probe on the way back, so the old version is right only where it is named.
    done = app.run("deploy", app.artifact("2.0"), check=5 if status == 200 else 6).data
    assert app.current == first
    failure = app.history()[-1]["failure"]
    assert failure["step"] == "probe:web"
    assert seen in failure["reason"] and body.decode("ascii")[:20] in json.dumps(failure["evidence"]).replace('\\"', '"')
    assert seen in done["error"]["message"]


def test_a_try_cut_off_by_the_deadline_does_not_hide_the_answer_before_it(app: App, gate: Gate) -> None:
    app.deploy("1.0")
    once = app.directory / "once"
    command = fake_command(app.directory / "bin", "check", (
        "if os.environ['DEPLOY_VERSION'] == '2.0':\n"
        f"    if os.path.exists({str(once)!r}):\n        os.execvp('cat', ['cat', {str(gate.path)!r}])\n"
        f"    open({str(once)!r}, 'w').close()\n    print('no such table: users')\n    sys.exit(4)"))
    configure(app, f"[probe:web]\ncommand = {command.path}\nsuccesses = 1\nperiod = 10ms\ntimeout = 10s\ndeadline = 3s\n")
    done = app.run("deploy", app.artifact("2.0"), check=5).data
    assert "no such table: users" in done["error"]["message"]
    assert "no such table: users" in json.dumps(app.history()[-1]["failure"])


def test_the_old_process_that_still_answers_is_a_failure(app: App, server: Server) -> None:
    configure(app)
    first = app.deploy("1.0").data["release"]
    server.restart()
    configure(app, PROBE.format(url=server.url))  # nothing restarts it
    done = app.run("deploy", app.artifact("2.0"), check=5).data
    assert (app.current, done["rolled_back"]) == (first, True)
    assert "1.0" in done["error"]["message"] and "2.0" in done["error"]["message"]
    assert (server.answer()[0], app.record(done["previous"])["state"]) == (200, "bad")


def test_the_new_process_that_answers_is_a_success(app: App, server: Server) -> None:
    configure(app, f"[service:web]\ncommand = {server.restart_command.path}\n" + PROBE.format(url=server.url).replace("3s", "60s"))
    for version in ("1.0", "2.0"):
        done = app.deploy(version).data
        assert (app.version, server.version, statuses(done)["probe:web"]) == (version, version, "done")
    assert server.restarts == 2


def test_a_probe_that_is_not_required_only_warns(app: App) -> None:
    configure(app, f"[probe:extra]\ntcp = 127.0.0.1:{free_port()}\nrequired = no\ndeadline = 100ms\nperiod = 50ms\n")
    done = app.deploy("1.0").data
    assert (app.version, bool(done["warnings"]), done["rolled_back"]) == ("1.0", True, False)


def test_a_first_deployment_that_fails_leaves_nothing_live(app: App) -> None:
    command = fails_for(app.directory / "bin", "1.0")
    configure(app, f"[service:web]\ncommand = {command.path}\n")
    done = app.run("deploy", app.artifact("1.0"), check=5).data
    assert not os.path.lexists(str(app.root / "current"))
    assert (done["release"], done["rolled_back"], app.leftovers()) == (None, True, [])
    assert "nothing is live" in done["error"]["message"]
    app.run("status", check=0)
    assert app.deploy("1.1").data["previous"] is None
    assert app.version == "1.1"


def test_services_and_probes_are_asked_again_on_the_way_back(app: App) -> None:
    command = fails_for(app.directory / "bin", "2.0")
    configure(app, f"[service:web]\ncommand = {command.path}\n")
    app.deploy("1.0")
    app.run("deploy", app.artifact("2.0"), check=5)
    assert [call["env"]["DEPLOY_VERSION"] for call in command.details()] == ["1.0", "2.0", "1.0"]


def test_hooks_around_a_failure_run_in_order(app: App) -> None:
    hook = fake_command(app.directory / "bin", "hook")
    names = ["pre_stage", "post_stage", "pre_activate", "post_activate", "post_deploy", "on_failure", "pre_rollback",
             "post_rollback"]
    configure(app, "[hooks]\n" + "".join(f"{name} = {hook.path}\n" for name in names)
              + f"[service:web]\ncommand = {fails_for(app.directory / 'bin', '2.0').path}\n")
    app.deploy("1.0")
    app.run("deploy", app.artifact("2.0"), check=5)
    seen = [call["env"]["DEPLOY_HOOK"] for call in hook.details()]
    assert seen == ["pre_stage", "post_stage", "pre_activate", "post_activate", "post_deploy",
                    "pre_stage", "post_stage", "pre_activate", "post_activate", "pre_rollback", "post_rollback", "on_failure"]


@pytest.mark.parametrize("hook", ["pre_rollback", "post_rollback", "on_failure"])
def test_a_hook_that_fails_on_the_way_back_does_not_stop_it(app: App, hook: str) -> None:
    configure(app, f"[hooks]\n{hook} = false\n[service:web]\ncommand = {fails_for(app.directory / 'bin', '2.0').path}\n")
    first = app.deploy("1.0").data["release"]
    done = app.run("deploy", app.artifact("2.0"), check=5).data
    assert (app.current, any(hook in warning for warning in done["warnings"])) == (first, True)


# -- where a person is needed ---------------------------------------------------

def test_a_way_back_that_fails_asks_for_a_person(app: App) -> None:
    configure(app)
    first = app.deploy("1.0").data["release"]
    broken = app.directory / "broken"
    broken.write_text("")
    command = fake_command(app.directory / "bin", "ctl", f"sys.exit(7 if os.path.exists({str(broken)!r}) else 0)")
    configure(app, f"[service:web]\ncommand = {command.path}\n")
    done = app.run("deploy", app.artifact("2.0"), check=6).data
    assert app.current == first, "the link went back; only the service did not follow"
    assert "the rollback failed too" in done["error"]["message"] and "recover" in done["error"]["hint"]
    assert done["rolled_back"] is False
    assert app.history()[-1]["result"] == "rollback_failed"
    assert app.run("status").exit_code == 7
    # What the message says works, once the cause is mended; a second time there is nothing to do.
    broken.unlink()
    assert app.run("recover", check=0).data["changed"] is True
    assert (app.current, app.leftovers()) == (first, [])
    app.run("status", check=0)
    assert app.run("recover", check=0).data["changed"] is False


def test_without_auto_rollback_the_failed_release_stays_live(app: App) -> None:
    command = fails_for(app.directory / "bin", "2.0")
    configure(app, f"auto_rollback = no\n[service:web]\ncommand = {command.path}\n")
    first = app.deploy("1.0").data["release"]
    done = app.run("deploy", app.artifact("2.0"), check=6).data
    assert (app.version, done["rolled_back"], app.leftovers()) == ("2.0", False, [])
    assert "no such table: users" in done["error"]["message"]
    assert app.record(str(app.current))["failure"]["step"] == "service:web"
    hinted = re.search(r"deploy\.py (.*)\Z", done["error"]["hint"])
    assert hinted, done["error"]["hint"]
    run_deploy(*hinted.group(1).split(), check=0)
    assert app.current == first
    assert command.details()[-1]["env"]["DEPLOY_VERSION"] == "1.0", "its service follows"


def test_without_auto_rollback_the_failed_release_is_not_taken_for_done(app: App) -> None:
    app.deploy("1.0")
    app.configure("auto_rollback = no\n[hooks]\npost_activate = false")
    app.deploy("1.1", check=6)
    app.configure()
    again = app.run("deploy", app.artifact("1.1"), check=4)
    assert "bad" in again.data["error"]["message"] and "--force" in again.data["error"]["hint"]
    app.run("deploy", app.artifact("1.1"), "--force", check=0)
    assert app.run("status", check=0) and app.version == "1.1"


def test_the_result_names_what_is_live_and_what_a_rollback_goes_to(app: App) -> None:
    first = app.deploy("1.0").data
    second = app.deploy("1.1").data
    assert (second["release"], second["previous"]) == (app.current, first["release"])
    again = app.run("deploy", app.artifact("1.1"), check=0).data
    assert (again["changed"], again["release"], again["previous"]) == (False, second["release"], first["release"])
    refused = app.run("deploy", app.artifact("0.9"), check=4).data
    assert (refused["release"], refused["previous"]) == (second["release"], None)


def test_a_file_of_a_directory_that_is_over_a_limit_is_not_read_first(app: App, tmp_path: Path) -> None:
    huge = make_tree(tmp_path / "app-1.0", {"a": "a"}) / "sparse"
    with open(str(huge), "wb") as stream:
        stream.truncate(2 << 40)
    error = app.run("deploy", huge.parent, check=4, timeout=60).data["error"]
    assert "member 'sparse': it has" in error["message"] and "[limits] max_file" in error["message"]


def test_a_directory_that_holds_its_own_root_is_refused_for_that(app: App) -> None:
    for digest in ((), ("--sha256", "0" * 64)):
        result = app.run("deploy", app.directory, *digest, check=4)
        assert "made inside the artifact" in result.data["error"]["message"], result.describe()
    assert app.leftovers() == []


def test_without_auto_rollback_the_hint_goes_back_to_what_was_live(app: App) -> None:
    ids = deploy_all(app, "1.0", "2.0", "3.0")
    command = fails_for(app.directory / "bin", "1.0")
    configure(app, f"auto_rollback = no\n[service:web]\ncommand = {command.path}\n")
    done = app.run("activate", "1.0", check=6).data
    assert app.current == ids[0]
    hinted = re.search(r"deploy\.py (.*)\Z", done["error"]["hint"])
    assert hinted, done["error"]["hint"]
    run_deploy(*hinted.group(1).split(), check=0)
    assert app.current == ids[2], "3.0 was live before"


def test_without_auto_rollback_a_failed_release_is_no_rollback_target_later(app: App) -> None:
    command = fails_for(app.directory / "bin", "2.0")
    configure(app, f"auto_rollback = no\n[service:web]\ncommand = {command.path}\n")
    first = app.deploy("1.0").data["release"]
    app.run("deploy", app.artifact("2.0"), check=6)
    app.deploy("3.0")
    app.run("rollback", check=0)
    assert app.current == first


# -- what is known to be bad ----------------------------------------------------

def test_a_bad_artifact_is_refused_until_force(app: App) -> None:
    broken = app.directory / "broken"
    broken.write_text("")
    command = fake_command(app.directory / "bin", "ctl", (
        f"sys.exit(os.environ['DEPLOY_VERSION'] == '2.0' and os.path.exists({str(broken)!r}))"))
    configure(app, f"[service:web]\ncommand = {command.path}\n")
    first, artifact = app.deploy("1.0").data["release"], app.artifact("2.0")
    failed = app.run("deploy", artifact, check=5).data["previous"]
    for words in (["deploy", artifact], ["stage", artifact], ["activate", failed], ["rollback", failed]):
        refused = app.run(*words, check=4).data
        assert "bad" in refused["error"]["message"] and "--force" in refused["error"]["hint"]
        assert app.current == first
    # Under another name it is the same artifact.
    other = artifact.with_name("myapp-2.9.tar.gz")
    other.write_bytes(artifact.read_bytes())
    write_checksum(other)
    app.run("deploy", other, check=4)
    app.run("deploy", artifact, "--force", check=5)
    broken.unlink()
    app.run("deploy", artifact, "--force", check=0)
    assert app.version == "2.0"


def test_a_bad_release_can_be_activated_by_force(app: App) -> None:
    broken = app.directory / "broken"
    broken.write_text("")
    command = fake_command(app.directory / "bin", "ctl", (
        f"sys.exit(os.environ['DEPLOY_VERSION'] == '2.0' and os.path.exists({str(broken)!r}))"))
    configure(app, f"[service:web]\ncommand = {command.path}\n")
    app.deploy("1.0")
    failed = app.run("deploy", app.artifact("2.0"), check=5).data["previous"]
    broken.unlink()
    app.run("activate", failed, "--force", check=0)
    assert (app.current, app.record(failed)["state"], app.record(failed)["failure"]) == (failed, "active", None)


def test_an_artifact_that_went_well_by_force_is_bad_no_more(app: App) -> None:
    broken = app.directory / "broken"
    broken.write_text("")
    command = fake_command(app.directory / "bin", "ctl", (
        f"sys.exit(os.environ['DEPLOY_VERSION'] == '2.0' and os.path.exists({str(broken)!r}))"))
    configure(app, f"[service:web]\ncommand = {command.path}\n")
    app.deploy("1.0")
    artifact = app.artifact("2.0")
    app.run("deploy", artifact, check=5)
    broken.unlink()
    app.run("deploy", artifact, "--force", check=0)
    app.run("activate", "1.0", check=0)
    app.run("deploy", artifact, check=0)
    assert app.version == "2.0"


def test_a_bad_artifact_stays_known_after_its_files_are_pruned(app: App) -> None:
    commands = [fails_for(app.directory / "bin", version).path for version in ("2.0", "3.0")]
    configure(app, "[hooks]\npost_activate =\n" + "".join(f"  {command}\n" for command in commands))
    app.deploy("1.0")
    failed = [app.run("deploy", app.artifact(version), check=5).data["previous"] for version in ("2.0", "3.0")]
    app.deploy("4.0")
    assert failed[0] not in app.releases()
    app.run("deploy", app.artifact("2.0"), "--allow-downgrade", check=4)


# -- the JSON result ------------------------------------------------------------

KEYS = {"ok", "changed", "failed", "command", "exit_code", "msg", "application", "root", "release", "previous", "rolled_back",
        "deploy_id", "dry_run", "steps", "checks", "summary", "warnings", "error", "seconds"}
OWN_KEYS = {"releases", "history", "plan", "probes", "config", "differences", "removed", "recovered", "artifact", "status", "total", "chain", "note", "inert"}

COMMANDS = {
    "deploy": (["deploy", "ARTIFACT"], 0), "deploy dry": (["-n", "deploy", "ARTIFACT"], 0),
    "deploy refused": (["deploy", "/nonexistent-1.0.tar.gz"], 4), "stage": (["stage", "ARTIFACT"], 0),
    "activate": (["activate", "previous"], 0), "rollback": (["rollback"], 0), "rollback nowhere": (["rollback", "9.9"], 2),
    "preflight": (["preflight", "ARTIFACT"], 0), "verify": (["verify"], 0), "status": (["status"], 0),
    "releases": (["releases"], 0), "history": (["history"], 0), "show": (["show", "1"], 0), "prune": (["prune"], 0),
    "pin": (["pin", "current"], 0), "unpin": (["unpin", "current"], 0), "recover": (["recover"], 0),
    "config": (["config"], 0), "probe failing": (["probe", "--tcp", "127.0.0.1:1"], 7), "no command": ([], 2),
    "unknown command": (["deplyo"], 2), "unknown flag": (["status", "--al"], 2), "no probe": (["probe"], 2),
    "bad setting": (["status", "--set", "deploy.keep_releases=many"], 2), "no configuration": (["-c", "/nonexistent", "status"], 2),
    "pack": (["pack", "DIRECTORY", "-o", "OUTPUT"], 0),
}


@pytest.fixture(scope="module")
def two_releases(tmp_path_factory: Any) -> App:
    """An application with two releases, for tests that look."""
    made = App(tmp_path_factory.mktemp("two"))
    configure(made)
    deploy_all(made, "1.0", "2.0")
    return made


@pytest.mark.parametrize("words, code", list(COMMANDS.values()), ids=list(COMMANDS))
def test_the_json_result_has_its_keys_whatever_happens(two_releases: App, words: List[str], code: int, tmp_path: Path) -> None:
    app = two_releases
    places = {"ARTIFACT": app.artifact("3.0"), "DIRECTORY": make_tree(tmp_path / "d", {"a": "b"}),
              "OUTPUT": tmp_path / "d.tar.gz"}  # type: Dict[str, Any]
    result = app.run(*[places.get(word, word) for word in words], check=code)
    data = result.data
    assert KEYS <= set(data) <= KEYS | OWN_KEYS
    assert (data["exit_code"], data["ok"], data["failed"]) == (code, code == 0, code != 0)
    assert set(data["summary"]) == {"checked", "changed", "failed", "warnings"}
    assert all(type(data[name]) is bool for name in ("ok", "changed", "failed", "rolled_back", "dry_run"))
    assert all(type(data[name]) is list for name in ("steps", "checks", "warnings"))
    assert all(set(step) == {"name", "status", "seconds", "detail"} for step in data["steps"])
    assert {step["status"] for step in data["steps"]} <= {"done", "skipped", "failed", "undone", "planned"}
    assert all(set(check) == {"name", "status", "detail", "hint"} for check in data["checks"])
    assert {check["status"] for check in data["checks"]} <= {"ok", "warn", "fail", "skip"}
    assert data["dry_run"] == ("-n" in words)
    assert (data["error"] is None) == (code == 0)
    if code:
        assert set(data["error"]) == {"message", "hint"} and data["error"]["hint"]
        assert f"deploy.py: error: {data['error']['message']}" in result.stderr
        assert f"hint: {data['error']['hint']}" in result.stderr
        assert "Traceback" not in result.stderr


def test_the_summary_counts_what_the_result_lists(app: App) -> None:
    configure(app, after_failures(app)["service:web"])
    app.deploy("1.0")
    data = app.run("deploy", app.artifact("2.0"), check=5).data
    assert data["summary"]["checked"] == len(data["checks"]) > 10
    assert data["summary"]["failed"] == 1
    assert data["summary"]["warnings"] == len(data["warnings"])
    assert data["summary"]["changed"] == sum(step["status"] == "done" for step in data["steps"])


# -- options of [deploy] ----------------------------------------------------------

def test_a_hook_finds_the_shared_directory_that_it_is_told_of(app: App) -> None:
    app.configure("[hooks]\npre_activate = sh -c 'echo 1 > \"$DEPLOY_SHARED_PATH/counter\"'\n")
    app.deploy("1.0")
    assert (app.root / "shared" / "counter").read_text() == "1\n"


def test_shared_directories_and_files_outlive_releases(app: App) -> None:
    configure(app, "shared_dirs =\n  log\n  var/uploads\nshared_files = config/.env\n")
    make_tree(app.root / "shared", {"config/.env": "SECRET=1\n"})
    app.deploy("1.0")
    live = app.root / "current"
    assert os.readlink(str(live / "log")) == "../../shared/log"
    assert os.readlink(str(live / "var" / "uploads")) == "../../../shared/var/uploads"
    assert (live / "config" / ".env").read_text() == "SECRET=1\n"
    (live / "var" / "uploads" / "photo").write_text("x")
    app.deploy("2.0")
    assert (live / "var" / "uploads" / "photo").read_text() == "x"
    assert (app.root / "shared" / "log").is_dir()
    app.run("verify", check=0)


@pytest.mark.parametrize("durable", ["yes", "no"])
def test_durable_syncs_before_the_release_gets_its_name(app: App, durable: str, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    argv = [needs("strace"), "-f", "-o", str(trace), "-e", "trace=sync,syncfs,renameat,renameat2"]
    argv += deploy_argv("deploy", app.artifact("1.0"), "--set", f"deploy.durable={durable}", config=app.config)
    subprocess.run(argv, env=clean_environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=60, check=True)
    calls = [re.sub(r"^\d+ +", "", line) for line in trace.read_text().splitlines()]
    published = next(number for number, call in enumerate(calls) if "rename" in call and f'{app.current}"' in call)
    synced = any(re.match(r"sync(fs)?\(", call) for call in calls[:published])
    assert synced == (durable == "yes")


# -- options of [artifact] --------------------------------------------------------

@pytest.mark.parametrize("checksum, beside, code", [
    ("required", "right", 0), ("required", "none", 4), ("required", "wrong", 4),
    ("if-present", "right", 0), ("if-present", "none", 0), ("if-present", "wrong", 4),
    ("off", "none", 0), ("off", "wrong", 0),
], ids=lambda value: str(value))
def test_the_checksum_is_asked_for_as_configured(app: App, checksum: str, beside: str, code: int) -> None:
    artifact = app.artifact("1.0")
    sidecar = artifact.with_name(artifact.name + ".sha256")
    if beside == "none":
        sidecar.unlink()
    elif beside == "wrong":
        sidecar.write_text(f"{'0' * 64}  {artifact.name}\n")
    app.run("deploy", artifact, "--set", f"artifact.checksum={checksum}", check=code)
    assert app.version == (None if code else "1.0")


def test_what_was_verified_before_is_held_against_todays_checksum(app: App) -> None:
    """A build that was replaced, with the checksum of the one before: neither is it that one, nor is that one meant."""
    artifact = app.artifact("1.0", {"build": "1"})
    sidecar = artifact.with_name(artifact.name + ".sha256")
    first = sidecar.read_text()
    app.run("deploy", artifact, check=0)
    second = app.deploy("1.0", {"build": "2"}).data["release"]
    sidecar.write_text(first)
    app.run("deploy", artifact, check=4)
    assert app.current == second


def test_an_artifact_that_was_changed_in_place_is_read_again_though_size_and_time_are_the_same(app: App) -> None:
    """What was verified last is not read again where nothing has changed; who sets the time back cannot set back when he did."""
    artifact = app.artifact("1.0")
    app.run("deploy", artifact, check=0)
    assert app.run("deploy", artifact, check=0).data["changed"] is False
    before, data = artifact.stat(), artifact.read_bytes()
    with open(str(artifact), "r+b") as stream:
        stream.write(data[:-1] + bytes([data[-1] ^ 1]))
    os.utime(str(artifact), ns=(before.st_atime_ns, before.st_mtime_ns))
    assert artifact.stat().st_ino == before.st_ino and artifact.stat().st_size == before.st_size
    app.run("deploy", artifact, check=4)


@pytest.mark.parametrize("pattern, name, version", [
    ("myapp_@v.tar.gz", "myapp_7-beta.tar.gz", "7-beta"), ("@v-myapp.tar.gz", "3.1-myapp.tar.gz", "3.1"),
    ("myapp_@v.tar.gz", "other_7.tar.gz", None), ("myapp_@v.tar.gz", "myapp_.tar.gz", None),
], ids=["suffix", "prefix", "another name", "nothing"])
def test_the_version_comes_from_where_match_says(app: App, pattern: str, name: str, version: Optional[str]) -> None:
    configure(app, f"[artifact]\nmatch = {pattern}\n")
    made = app.artifact("1.0")
    artifact = made.with_name(name)
    made.rename(artifact)
    write_checksum(artifact)
    done = app.run("deploy", artifact, check=4 if version is None else 0)
    if version is None:
        assert "match" in done.data["error"]["message"] and app.current is None
    else:
        assert app.record(str(app.current))["version"] == version


def test_strip_components_drops_leading_directories(app: App) -> None:
    artifact = make_tar(app.directory / "myapp-1.0.tgz", tree_members({"package/VERSION": "1.0\n", "package/lib/a": "a"}))
    write_checksum(artifact)
    configure(app, "[artifact]\nstrip_components = 1\n")
    app.run("deploy", artifact, check=0)
    assert (app.version, (app.root / "current" / "lib" / "a").exists()) == ("1.0", True)


def test_a_release_is_not_reused_under_another_strip_components(app: App) -> None:
    artifact = make_tar(app.directory / "myapp-1.0.tgz", tree_members({"package/VERSION": "1.0\n"}))
    write_checksum(artifact)
    first = app.run("deploy", artifact, check=0).data["release"]
    app.run("deploy", artifact, "--set", "artifact.strip_components=1", check=0)
    assert (app.version, app.current != first) == ("1.0", True)


@pytest.mark.parametrize("symlinks, code", [("inside", 0), ("refuse", 4)])
def test_symlinks_inside_an_artifact_are_taken_or_refused(app: App, symlinks: str, code: int) -> None:
    configure(app, f"[artifact]\nsymlinks = {symlinks}\n")
    done = app.run("deploy", app.artifact("1.0"), check=code)
    assert (app.root / "current" / "data").is_symlink() == (code == 0)
    assert code == 0 or "data" in done.data["error"]["message"]


# -- options of [limits] ----------------------------------------------------------

LIMITS = {
    "max_artifact": ("[limits]\nmax_artifact = 100\n", {}),
    "max_files": ("[limits]\nmax_files = 3\n", {}),
    "max_file": ("[limits]\nmax_file = 64k\n", {"big": b"x" * 65537}),
    "max_expanded": ("[limits]\nmax_expanded = 128k\n", {"one": b"x" * 80000, "two": b"y" * 80000}),
}  # type: Dict[str, Any]


@pytest.mark.parametrize("option, suffix",
                         [(option, ".tar.gz") for option in LIMITS] + [("max_files", ".zip"), ("max_expanded", ".zip")],
                         ids=lambda value: str(value))
def test_an_archive_beyond_a_limit_is_refused_and_zero_is_no_limit(app: App, option: str, suffix: str) -> None:
    text, files = LIMITS[option]
    configure(app, text)
    artifact = app.artifact("1.0", files, suffix=suffix)
    refused = app.run("deploy", artifact, check=4).data
    assert (app.current, app.releases(), app.leftovers()) == (None, [], [])
    assert option in refused["error"]["message"] + refused["error"]["hint"]
    app.run("deploy", artifact, "--set", f"limits.{option}=0", check=0)
    assert app.version == "1.0"


# -- who, why and whose -----------------------------------------------------------

def test_a_message_is_kept_in_record_and_history_and_told_to_hooks(app: App) -> None:
    hook = fake_command(app.directory / "bin", "hook")
    configure(app, f"[hooks]\npost_deploy = {hook.path}\n")
    done = app.run("deploy", app.artifact("1.0"), "-m", "ticket 42: faster checkout", check=0).data
    assert app.record(done["release"])["note"] == app.history()[-1]["note"] == done["note"] == "ticket 42: faster checkout"
    assert "ticket 42" in app.run("show", "latest", json=False, check=0).stdout
    assert hook.details()[0]["env"]["DEPLOY_NOTE"] == "ticket 42: faster checkout"


def test_another_applications_root_is_refused_until_force(app: App) -> None:
    configure(app)
    shop, blog = ("--set", "deploy.application=shop"), ("--set", "deploy.application=blog")
    app.run("deploy", app.artifact("1.0"), *shop, check=0)
    for words in (["deploy", app.artifact("1.1")], ["stage", app.artifact("1.1")]):
        refused = app.run(*words, *blog, check=3).data["error"]
        assert "shop" in refused["message"] and "blog" in refused["message"] and "--force" in refused["hint"]
    app.run("deploy", app.artifact("1.1"), "--force", *blog, check=0)
    app.run("deploy", app.artifact("1.2"), *blog, check=0)
    app.run("rollback", *shop, check=3)


def test_the_head_of_the_historys_chain_is_told(app: App) -> None:
    configure(app)
    told = app.deploy("1.0").data["chain"]
    lines = (app.root / ".deploy" / "history.jsonl").read_bytes().splitlines()
    data = app.run("history", check=0).data
    assert told == hashlib.sha256(lines[-1]).hexdigest() == data["chain"] and data["total"] == 1
    app.configure("[preflight]\nrequire_files = /nonexistent")  # a refusal tells it too, the second time as well
    refused = [app.run("deploy", app.artifact("1.1"), check=3).data["chain"] for _ in range(2)]
    assert set(refused) == {app.run("history", check=0).data["chain"]} != {told}
    assert all(step["started_at"] for step in data["history"][0]["steps"])
