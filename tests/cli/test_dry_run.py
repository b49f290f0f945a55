"""--dry-run: it changes nothing at all, and what it prints is what a real run then does."""

import fcntl
import json
import os
import re
import shutil
import signal
import sys
from pathlib import Path
from typing import Any, Callable, Dict, List

import pytest

from support import App, Server, snapshot, start_deploy, wait_until

CAPTURE = ("import os, shutil; state = os.environ[\"DEPLOY_ROOT\"] + \"/.deploy/journal.json\"; "
           "shutil.copy(state, os.environ[\"CAPTURE\"])")


def python_hook(code: str) -> str:
    """A hook's command line that runs Python code (without single quotes or newlines)."""
    return f"{sys.executable} -ISc '{code}'"


def capturing(app: App, more: str = "") -> None:
    """Configure hooks, each of which copies the journal of the run it is part of to journal.json beside the root."""
    hook = python_hook(CAPTURE)
    app.configure(f"keep_releases = 1\n{more}\n[env]\nCAPTURE = {app.directory}/journal.json\n"
                  f"[hooks]\npre_stage = {hook}\npre_activate = {hook}\npre_rollback = {hook}\npost_deploy = true")


def everything(app: App, server: Server) -> None:
    """Configure one of everything that a plan can hold."""
    (app.root / "shared").mkdir(exist_ok=True)
    (app.root / "shared" / "app.env").write_text("A=1\n")
    capturing(app, "shared_dirs = var\nshared_files = app.env\n[template:conf]\nsource = conf.in\ntarget = app.conf\n[vars]\nx = 1\n"
                   f"[service:web]\ncommand = {server.restart_command.path}\n[probe:web]\nurl = {server.url}\nperiod = 10ms\n"
                   "successes = 1\nrelease = json:version\n")


def artifact(app: App, version: str) -> Path:
    """Build an artifact that fits every configuration of this file."""
    return app.artifact(version, {"conf.in": "${x}\n"})


def same_but_for_time(value: Any) -> str:
    """A plan as text, with every time stamp replaced by the same word."""
    return re.sub(r"\d{8}T\d{6}Z", "TIME", json.dumps(value, indent=1, sort_keys=True))


def planned(app: App, *words: Any) -> List[Dict[str, str]]:
    """Dry-run a command; it must plan something and leave everything under the application's directory as it was."""
    before = snapshot(app.directory)
    data = app.run("-n", *words, check=0).data
    assert snapshot(app.directory) == before
    assert data["dry_run"] is True and data["changed"] is True and data["plan"]
    assert [(step["name"], step["status"]) for step in data["steps"]] in (
        [], [(step["name"], "planned") for step in data["plan"]])
    return data["plan"]  # type: ignore


# -- the plan is what a run journals -----------------------------------------

@pytest.fixture(scope="module")
def template(tmp_path_factory: Any) -> App:
    """An application with 1.0 retired and 1.1 live, to be copied."""
    app = App(tmp_path_factory.mktemp("template") / "app")
    two_releases(app)
    return app


@pytest.fixture
def two(template: App, app: App) -> App:
    """An application of one's own with 1.0 retired and 1.1 live: a copy, which takes no time."""
    app.root.rmdir()
    shutil.copytree(str(template.root), str(app.root), symlinks=True)
    artifact(app, "1.1")
    return app


def two_releases(app: App) -> None:
    """1.0 retired, 1.1 live."""
    app.run("deploy", artifact(app, "1.0"), check=0)
    app.run("deploy", artifact(app, "1.1"), check=0)


def staged(app: App) -> None:
    """1.0 and 1.1 retired and live, 1.2 staged."""
    two_releases(app)
    app.run("stage", artifact(app, "1.2"), check=0)


JOURNALED = [
    ("deploy-first", lambda app: None, ["deploy", "1.0"]),
    ("deploy-next-with-pruning", two_releases, ["deploy", "1.2"]),
    ("deploy-what-is-staged", staged, ["deploy", "1.2"]),
    ("stage", two_releases, ["stage", "1.2"]),
    ("activate-staged", staged, ["activate", "1.2"]),
    ("activate-earlier", two_releases, ["activate", "1.0"]),
    ("rollback", two_releases, ["rollback"]),
    ("rollback-to", staged, ["rollback", "1.0"]),
]


@pytest.mark.parametrize("name,prepare,words", JOURNALED, ids=[row[0] for row in JOURNALED])
def test_a_dry_run_changes_nothing_and_its_plan_is_what_the_run_journals(
        name: str, prepare: Callable[[App], None], words: List[str], app: App, server: Server) -> None:
    everything(app, server)
    prepare(app)
    argv = [words[0]] + [artifact(app, word) if words[0] in ("deploy", "stage") else word for word in words[1:]]  # type: List[Any]
    asked, restarts, journal = len(server.requests), server.restarts, app.directory / "journal.json"
    if journal.exists():
        journal.unlink()
    plan = planned(app, *argv)
    assert (len(server.requests), server.restarts) == (asked, restarts)
    done = app.run(*argv, check=0).data
    assert same_but_for_time(json.loads(journal.read_text())["plan"]) == same_but_for_time(plan)
    assert same_but_for_time([step["name"] for step in done["steps"]]) == same_but_for_time([step["name"] for step in plan])


def test_the_plan_of_a_deployment_holds_every_step_in_order(app: App, server: Server) -> None:
    everything(app, server)
    two_releases(app)
    names = [step["name"].partition(":2")[0] for step in planned(app, "deploy", artifact(app, "1.2"))]
    assert names == ["hook:pre_stage", "unpack", "shared", "templates", "publish", "seal", "hook:pre_activate", "activate", "service:web",
                     "probe:web", "hook:post_deploy", "prune"]


def test_the_plan_of_pruning_is_what_pruning_does(app: App) -> None:
    for version in ("1.0", "1.1", "1.2", "1.3"):
        app.run("deploy", artifact(app, version), check=0)
    app.configure("keep_releases = 1")
    plan = planned(app, "prune")
    before = app.run("-n", "prune", check=0).data["removed"]
    done = app.run("prune", check=0).data
    assert [step["name"] for step in done["steps"]] == [step["name"] for step in plan]
    assert done["removed"] == before and len(before) == 2
    assert len(app.releases()) == 2


@pytest.mark.parametrize("words", [["pin", "1.0"], ["unpin", "1.1"]], ids=["pin", "unpin"])
def test_the_plan_of_pinning_is_what_pinning_does(words: List[str], two: App) -> None:
    two.run("pin", "1.1", check=0)
    plan = planned(two, *words)
    done = two.run(*words, check=0).data
    assert [(step["name"], step["description"]) for step in plan] == [(words[0], f"{words[0]} {done['release']}")]
    assert [step["name"] for step in done["steps"]] == [words[0]]


def test_a_dry_run_of_pinning_does_not_say_that_it_is_done(two: App) -> None:
    for command, said in (("pin", "would pin: 1 step"), ("unpin", "nothing to do")):
        assert two.run("-n", command, "1.0", check=0).data["msg"] == said
    two.run("pin", "1.0", check=0)
    for command, said in (("pin", "nothing to do"), ("unpin", "would unpin: 1 step")):
        assert two.run("-n", command, "1.0", check=0).data["msg"] == said


def test_packing_is_planned_without_a_file_being_written(app: App) -> None:
    tree = app.directory / "tree"
    tree.mkdir()
    (tree / "a").write_text("a")
    target = app.directory / "out.tar.gz"
    plan = planned(app, "pack", tree, "-o", target)
    assert str(target) in plan[0]["description"]
    app.run("pack", tree, "-o", target, check=0)
    assert target.exists()


# -- recover -----------------------------------------------------------------

def killed(app: App) -> None:
    """Kill a deployment of 1.1 over 1.0 while its pre_activate hook runs."""
    app.run("deploy", artifact(app, "1.0"), check=0)
    mark = app.directory / "mark"
    app.configure("[hooks]\npre_activate = " + python_hook(f'import time; open("{mark}", "w").close(); time.sleep(60)'))
    process = start_deploy("deploy", artifact(app, "1.1"), config=app.config)
    try:
        wait_until(mark.exists, what="the hook to start")
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    app.configure()


def test_recovery_is_announced_without_being_done(app: App) -> None:
    killed(app)
    before = snapshot(app.directory)
    announced = app.run("-n", "recover", check=0).data
    assert snapshot(app.directory) == before
    assert announced["changed"] is True and "deploy" in announced["msg"] and "1.1" in announced["msg"]
    done = app.run("recover", check=0).data
    assert done["changed"] is True and done["recovered"]
    assert app.run("-n", "recover", check=0).data["changed"] is False


def test_the_plan_of_recovery_names_what_recovery_does(app: App) -> None:
    killed(app)
    plan = app.run("-n", "recover", check=0).data["plan"]
    assert plan and all(step["name"] and step["description"] for step in plan)


def test_recovery_of_leftovers_is_announced_too(app: App) -> None:
    app.run("deploy", artifact(app, "1.0"), check=0)
    leftover = app.root / "releases" / ".new-leftover"
    leftover.mkdir()
    (leftover / "file").write_text("x")
    before = snapshot(app.directory)
    announced = app.run("-n", "recover", check=0).data
    assert snapshot(app.directory) == before
    assert app.run("recover", check=0).data["changed"] is True
    assert announced["changed"] is True


def test_a_dry_run_leaves_an_interrupted_run_for_the_next_real_one(app: App) -> None:
    killed(app)
    before = snapshot(app.directory)
    for words in (["deploy", app.directory / "artifacts" / "myapp-1.1.tar.gz"], ["activate", "1.0"], ["prune"], ["pin", "1.0"]):
        app.run("-n", *words, check=0)
        assert snapshot(app.directory) == before, words


# -- nothing is there yet, nothing to do, something wrong --------------------

@pytest.mark.parametrize("words,exit_code", [
    (["deploy", "{artifact}"], 0), (["stage", "{artifact}"], 0), (["prune"], 2), (["recover"], 0), (["rollback"], 2),
    (["activate", "1.0"], 2), (["pin", "1.0"], 2), (["unpin", "1.0"], 2), (["recover", "--to", "1.0"], 2),
], ids=lambda value: value[0] if isinstance(value, list) else "")
def test_a_missing_root_is_not_made(words: List[str], exit_code: int, app: App) -> None:
    app.root.rmdir()
    path = artifact(app, "1.0")
    before = snapshot(app.directory)
    argv = [word.format(artifact=path) for word in words]
    announced = app.run("-n", *argv, check=exit_code).data
    assert snapshot(app.directory) == before
    assert app.run(*argv, check=exit_code).data["error"] == announced["error"]
    assert snapshot(app.directory) == before or not exit_code


def test_a_run_that_is_refused_before_it_begins_makes_no_root(app: App) -> None:
    app.root.rmdir()
    before = snapshot(app.directory)
    app.run("deploy", app.directory / "no-such-artifact.tar.gz", check=4)
    assert snapshot(app.directory) == before


def test_an_empty_root_stays_empty(app: App) -> None:
    path = artifact(app, "1.0")
    assert [step["name"] for step in planned(app, "deploy", path)] == ["unpack", "publish", "seal", "activate"]
    assert os.listdir(str(app.root)) == []


@pytest.mark.parametrize("words", [["deploy", "{live}"], ["stage", "{live}"], ["activate", "current"], ["unpin", "current"], ["prune"],
                                   ["recover"]], ids=lambda words: words[0])
def test_nothing_to_do_is_an_empty_plan(words: List[str], two: App) -> None:
    live = two.directory / "artifacts" / "myapp-1.1.tar.gz"
    before = snapshot(two.directory)
    data = two.run("-n", *[word.format(live=live) for word in words], check=0).data
    assert data["plan"] == [] and data["changed"] is False
    assert snapshot(two.directory) == before
    assert two.run(*[word.format(live=live) for word in words], check=0).data["changed"] is False


@pytest.mark.parametrize("words,exit_code", [
    (["deploy", "{artifact}", "--set", "deploy.min_free=999T"], 3),
    (["stage", "{artifact}", "--set", "preflight.require_env=NOT_SET"], 3), (["activate", "9.9"], 2), (["deploy", "{older}"], 4),
], ids=["space", "environment", "release", "downgrade"])
def test_a_dry_run_fails_as_the_run_would_and_changes_nothing(words: List[str], exit_code: int, two: App) -> None:
    paths = {"artifact": artifact(two, "1.2"), "older": artifact(two, "0.9")}
    before = snapshot(two.directory)
    argv = [word.format(**paths) for word in words]
    announced = two.run("-n", *argv, check=exit_code).data
    assert snapshot(two.directory) == before
    assert two.run(*argv, check=exit_code).data["error"] == announced["error"]


def test_a_dry_run_notices_a_wrong_digest(app: App) -> None:
    path = artifact(app, "1.0")
    before = snapshot(app.directory)
    app.run("-n", "deploy", path, "--sha256", "0" * 64, check=4)
    assert snapshot(app.directory) == before


def test_a_dry_run_takes_no_lock_and_waits_for_none(two: App) -> None:
    with open(str(two.root / ".deploy" / "lock"), "r+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert planned(two, "pin", "1.0")
        before = snapshot(two.directory)
        result = two.run("-n", "rollback", "--wait-lock", "1h")
        assert snapshot(two.directory) == before
    assert result.exit_code == 75 and "another run holds the lock" in result.data["error"]["message"]
    assert result.data["error"]["hint"].startswith("look again once it has ended"), "--wait-lock was given, and a look does not wait"


def test_a_dry_run_writes_no_log_below_the_root(app: App) -> None:
    app.run("deploy", artifact(app, "1.0"), check=0)
    app.configure(f"[log]\nfile = {app.root}/deploy.log")
    path = artifact(app, "1.1")
    before = snapshot(app.root)
    app.run("-n", "deploy", path, check=0)
    assert snapshot(app.root) == before


def test_the_plan_is_shown_to_people_with_the_way_back(app: App, server: Server) -> None:
    everything(app, server)
    two_releases(app)
    path = artifact(app, "1.2")
    plan = planned(app, "deploy", path)
    shown = app.run("-n", "deploy", path, json=False, check=0).stdout
    for number, step in enumerate(plan, 1):
        assert re.search(rf"(?m)^ +{number}  {re.escape(step['name'].split(':2')[0])}", shown)
    assert "should anything fail after activation" in shown
    assert shown.index("point current at") < shown.rindex("point current at")


def test_no_way_back_is_shown_that_a_run_would_not_take(app: App) -> None:
    two_releases(app)
    stays = "should anything fail after activation: {} stays live"
    assert stays.format(app.releases()[0]) in app.run("-n", "rollback", json=False, check=0).stdout  # nothing could be asked
    path = artifact(app, "1.2")
    assert "(was " in app.run("-n", "deploy", path, json=False, check=0).stdout.split("should anything fail after activation:\n")[1]
    off = app.run("-n", "deploy", path, "--set", "deploy.auto_rollback=no", json=False, check=0).stdout
    assert off.rstrip().endswith("-1.2 stays live")


def test_a_dry_run_masks_secrets_in_the_plan(app: App) -> None:
    app.configure("[env]\nDB_PASSWORD = swordfish-9\n[hooks]\npre_activate = echo --password=swordfish-9")
    for as_json in (True, False):
        result = app.run("-n", "deploy", artifact(app, "1.0"), json=as_json, check=0)
        assert "swordfish-9" not in result.stdout + result.stderr and "[masked]" in result.stdout
