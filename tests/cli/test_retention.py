"""What pruning takes and what it never takes, and that nothing grows without end."""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Dict, List

import pytest

from crashes import script
from scenes import configure, deploy_all
from support import DEPLOY, App, clean_environment, deploy_argv, fake_command, load_deploy, make_tree, needs, deep, snapshot


deploy = load_deploy()


@pytest.fixture
def app(app: App) -> App:
    """An application that keeps two releases and does not sync the whole filesystem."""
    configure(app, "keep_releases = 2\n")
    return app


def records(app: App) -> List[str]:
    """The ids that have a record."""
    return sorted(path.name[:-5] for path in (app.root / ".deploy" / "releases").glob("*.json"))


def manifests(app: App) -> List[str]:
    """The ids that have a manifest."""
    return sorted(os.listdir(str(app.root / ".deploy" / "manifests")))


# -- how many are kept ------------------------------------------------------------

@pytest.mark.parametrize("keep", [1, 3])
def test_the_newest_good_releases_are_kept(app: App, keep: int) -> None:
    configure(app, f"keep_releases = {keep}\n")
    ids = deploy_all(app, *[f"1.{number}" for number in range(5)])
    # What was live before comes on top: a rollback must always be possible.
    assert app.releases() == sorted(ids[-max(keep, 2):])
    assert app.current == ids[-1]
    assert records(app) == manifests(app) == app.releases()
    assert app.leftovers() == []
    app.run("rollback", check=0)
    assert app.current == ids[-2]


def test_the_default_keeps_five(app: App) -> None:
    configure(app)
    ids = deploy_all(app, *[f"1.{number}" for number in range(7)])
    assert app.releases() == sorted(ids[-5:])


def test_the_result_says_what_was_pruned(app: App) -> None:
    ids = deploy_all(app, "1.0", "2.0", "3.0")
    steps = app.deploy("4.0").data["steps"]
    assert [step["name"] for step in steps if step["name"].startswith("prune:")] == [f"prune:{ids[1]}"]


def test_prune_deletes_at_once_what_a_smaller_number_no_longer_keeps(app: App) -> None:
    configure(app, "keep_releases = 9\n")
    ids = deploy_all(app, "1.0", "2.0", "3.0", "4.0")
    configure(app, "keep_releases = 2\n")
    planned = app.run("-n", "prune", check=0).data
    assert (planned["removed"], app.releases()) == ([ids[1], ids[0]], sorted(ids))
    done = app.run("prune", check=0).data
    assert (sorted(done["removed"]), done["changed"], app.releases()) == (sorted(ids[:2]), True, sorted(ids[2:]))
    again = app.run("prune", "--detailed-exitcode", check=0).data
    assert (again["removed"], again["changed"]) == ([], False)


# -- what is never deleted ----------------------------------------------------------

def test_current_and_previous_stay_after_a_rollback(app: App) -> None:
    configure(app, "keep_releases = 9\n")
    ids = deploy_all(app, "1.0", "2.0", "3.0", "4.0")
    app.run("rollback", "2.0", check=0)
    app.run("prune", "--set", "deploy.keep_releases=1", check=0)
    assert app.current == ids[1] and app.version == "2.0"
    assert ids[0] in app.releases(), "where the next rollback goes"
    app.run("rollback", check=0)
    assert app.current == ids[0]


def test_pinned_releases_stay_until_they_are_unpinned(app: App) -> None:
    ids = deploy_all(app, "1.0")
    pinned = app.run("pin", "1.0", check=0).data
    assert (pinned["changed"], app.record(ids[0])["pinned"]) == (True, True)
    assert app.run("pin", "1.0", check=0).data["changed"] is False
    ids += deploy_all(app, "2.0", "3.0", "4.0")
    assert app.releases() == sorted([ids[0]] + ids[2:])
    assert "pinned" in app.run("releases", json=False, check=0).stdout
    assert app.run("prune", check=0).data["removed"] == []
    assert app.run("unpin", "1.0", check=0).data["changed"] is True
    assert app.run("unpin", "1.0", check=0).data["changed"] is False
    assert app.run("prune", check=0).data["removed"] == [ids[0]]


def live_in(release: Path, how: str) -> subprocess.Popen:
    """Start a process that has its working directory or its program inside a release."""
    argv, cwd = ["sleep", "300"], str(release / "lib" / "nested")
    if how == "exe":
        shutil.copy(needs("sleep"), str(release / "log" / "worker"))
        argv, cwd = [str(release / "log" / "worker"), "300"], "/"
    return subprocess.Popen(argv, cwd=cwd, stdin=subprocess.DEVNULL)


@pytest.mark.parametrize("how", ["cwd", "exe"])
def test_a_release_that_a_process_runs_from_stays_until_it_ends(app: App, how: str) -> None:
    ids = deploy_all(app, "1.0")
    process = live_in(app.root / "releases" / ids[0], how)
    try:
        ids += deploy_all(app, "2.0", "3.0", "4.0")
        assert app.releases() == sorted([ids[0]] + ids[2:])
        done = app.run("prune", check=0).data
        assert done["removed"] == done["warnings"] == []
        told = f"{ids[0]} is in use by pid {process.pid} of {deploy.user_name()}, and stays"
        assert told in app.run("prune", json=False, check=0).stderr
    finally:
        process.kill()
        process.wait()
    assert app.run("prune", "--force", check=0).data["removed"] == [ids[0]]


def test_a_process_that_begins_while_it_is_deployed_keeps_the_release_that_it_runs_from(app: App) -> None:
    ids, pid = deploy_all(app, "1.0", "2.0"), app.directory / "pid"
    lives = script(app.directory / "lives", f"cd {app.root}/releases/{ids[0]}/lib\nsleep 300 > /dev/null 2>&1 &\necho $! > {pid}")
    configure(app, f"keep_releases = 2\n[hooks]\npost_activate = {lives}\n")
    try:
        warnings = app.deploy("3.0").data["warnings"]
    finally:
        os.kill(int(pid.read_text()), signal.SIGKILL)
    assert len(app.releases()) == 3 and ids[0] in app.releases()
    assert any(f"{ids[0]} is in use by pid " in text for text in warnings), warnings


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
@pytest.mark.parametrize("whose, stays", [("any user's", False), ("the owner's", True), ("a service's", True), ("its child", True)])
def test_only_processes_of_root_of_the_owner_or_of_a_service_keep_a_release(app: App, whose: str, stays: bool) -> None:
    """Any user of the host could stop pruning otherwise."""
    ids, nobody = deploy_all(app, "1.0"), 65534
    release = app.root / "releases" / ids[0]
    if whose == "the owner's":
        os.chown(str(release), nobody, nobody)

    def become_nobody() -> None:
        os.setgid(nobody)
        os.setuid(nobody)
    argv = ["sh", "-c", "sleep 300 & echo $! && wait"] if whose == "its child" else ["sh", "-c", "echo $$; exec sleep 300"]
    process = subprocess.Popen(argv, cwd=str(release), preexec_fn=become_nobody, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    pid = process.stdout.readline().decode().strip()  # type: ignore
    try:
        if whose in ("a service's", "its child"):
            pidfile = app.directory / "worker.pid"
            pidfile.write_text(f"{process.pid}\n")
            configure(app, f"[service:worker]\npidfile = {pidfile}\naction = none\n")
        ids += deploy_all(app, "2.0", "3.0", "4.0")
        assert (ids[0] in app.releases()) is stays
        if stays:
            said = app.run("prune", json=False, check=0).stderr
            assert re.search(rf"{re.escape(ids[0])} is in use by pid ({pid}|{process.pid}) of ", said), said
    finally:
        for number in (int(pid), process.pid):
            try:
                os.kill(number, signal.SIGKILL)
            except ProcessLookupError:
                pass
        process.wait()
        process.stdout.close()  # type: ignore


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount")
def test_what_is_mounted_in_a_release_is_not_emptied_with_it(app: App) -> None:
    """rm -rf goes on into what is mounted below, and an application's uploads are gone."""
    configure(app, "mutable = uploads")
    first, *_ = deploy_all(app, "1.0", "1.1", "1.2", "1.3")
    uploads, kept = app.root / "releases" / first / "uploads", app.directory / "kept"
    for place in (uploads, kept):
        place.mkdir()
    (kept / "photo").write_text("one of a kind")
    script = f'mount --bind {kept} {uploads} && exec "$@"'
    argv = [needs("unshare"), "-m", "sh", "-c", script, "sh", *deploy_argv("--set", "deploy.keep_releases=2", "prune", config=app.config)]
    done = subprocess.run(argv, env=clean_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert (kept / "photo").read_text() == "one of a kind", done.stderr
    assert "EBUSY" in done.stderr.decode()
    app.run("recover", check=0)
    assert (kept / "photo").exists() and not list((app.root / ".deploy" / "trash").iterdir())


def test_unknown_names_in_releases_are_left_alone_and_not_counted(app: App) -> None:
    deploy_all(app, "1.0")
    releases = app.root / "releases"
    make_tree(releases / "20200101T000000Z-0.1", {"file": "made by hand"})
    make_tree(releases / "backup", {"file": "precious"})
    (releases / "README").write_text("a note")
    (releases / "latest").symlink_to(app.releases()[0])
    unknown = {name: found for name, found in snapshot(releases).items()
               if name.split("/")[0] in ("20200101T000000Z-0.1", "backup", "README", "latest")}
    ids = deploy_all(app, "2.0", "3.0", "4.0")
    app.run("prune", check=0)
    assert app.releases() == sorted(ids[1:] + ["20200101T000000Z-0.1", "backup", "README", "latest"])
    assert {name: found for name, found in snapshot(releases).items() if name in unknown} == unknown
    assert len(app.run("releases", check=0).data["releases"]) == 2
    assert app.run("status", check=0).data["status"]["releases"] == 2


# -- bad ones -------------------------------------------------------------------

def failing(app: App) -> str:
    """Configuration in which every 2.x fails after activation."""
    command = fake_command(app.directory / "bin", "check", "sys.exit(os.environ['DEPLOY_VERSION'].startswith('2.'))")
    return f"keep_releases = 3\n[hooks]\npost_activate = {command.path}\n"


def test_bad_releases_do_not_take_the_place_of_good_ones(app: App) -> None:
    configure(app, failing(app))
    good = deploy_all(app, "1.0", "1.1", "1.2")
    bad = [app.run("deploy", app.artifact(f"2.{number}"), check=5).data["previous"] for number in range(4)]
    assert set(good) <= set(app.releases())
    good.append(app.deploy("3.0").data["release"])
    assert app.releases() == sorted(good[1:] + [bad[-1]]), "one bad release is kept to be looked at"


def test_an_artifact_that_was_good_in_a_second_try_is_not_bad_again_once_pruned(app: App) -> None:
    app.deploy("1.0")
    configure(app, "keep_releases = 1\n[hooks]\npost_activate = false\n")
    app.deploy("1.1", check=5)
    configure(app, "keep_releases = 1\n")
    app.run("deploy", app.artifact("1.1"), "--force", check=0)
    configure(app, "keep_releases = 1\n[hooks]\npost_activate = false\n")
    app.deploy("1.2", check=5)  # one bad release is kept: the older one is pruned
    configure(app, "keep_releases = 1\n")
    for version in ("1.3", "1.4", "1.5"):
        app.deploy(version)
    assert "1.1" not in [record["version"] for record in map(app.record, app.releases())]
    app.run("deploy", app.artifact("1.1"), "--allow-downgrade", check=0)


def test_deployments_that_fail_one_after_the_other_do_not_fill_the_disk(app: App) -> None:
    configure(app, failing(app))
    app.deploy("1.0")
    for number in range(5):
        app.run("deploy", app.artifact(f"2.{number}"), check=5)
    # One bad one is kept; the newest may wait for the next run.
    assert len(app.releases()) <= 3


# -- two hundred in a row -----------------------------------------------------------

def system_calls(app: App, trace: Path, *words: str) -> int:
    """How many system calls a command makes that open or read."""
    argv = [needs("strace"), "-f", "-o", str(trace), "-e", "trace=open,openat,read,pread64,getdents64"]
    subprocess.run(argv + deploy_argv(*words, config=app.config), env=clean_environment(), timeout=60, check=True,
                   stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return len([line for line in trace.read_text().splitlines() if str(app.root) in line or "json" in line or "read" in line])


DEPLOY_EACH = """
import argparse, configparser, importlib.util, json, os, pwd, subprocess, sys
spec = importlib.util.spec_from_file_location("deploy", sys.argv[1])
deploy = importlib.util.module_from_spec(spec)
spec.loader.exec_module(deploy)
for artifact in sys.argv[3:]:
    child = os.fork()
    if not child:
        os._exit(deploy.main(["--json", "-c", sys.argv[2], "deploy", artifact]))
    if os.waitpid(child, 0)[1]:
        sys.exit("failed: " + artifact)
"""


def deploy_each(app: App, artifacts: List[Path]) -> None:
    """Deploy many artifacts, a process and a whole command line for each, but read the program only once."""
    argv = [sys.executable, "-B", "-c", DEPLOY_EACH, str(DEPLOY), str(app.config)] + [str(path) for path in artifacts]
    done = subprocess.run(argv, env=clean_environment(), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                          timeout=300)
    assert done.returncode == 0, done.stderr.decode()[-2000:]


def disk_use(app: App) -> Dict[str, int]:
    """Bytes under the root, apart from the history: files and directories alike."""
    return {name: found[2] for name, found in snapshot(app.root).items() if not name.startswith(".deploy/history")}


@deep
def test_two_hundred_deployments_leave_no_more_than_a_few(app: App, tmp_path: Path) -> None:
    configure(app, "keep_releases = 3\n")
    builds = [app.artifact(f"1.{number}", {"noise": os.urandom(100)}, suffix=".tar") for number in range(200)]
    deploy_each(app, builds[:10])
    early, early_calls = disk_use(app), system_calls(app, tmp_path / "early", "status")
    deploy_each(app, builds[10:])
    late, late_calls = disk_use(app), system_calls(app, tmp_path / "late", "status")
    assert len(app.releases()) == 3
    assert records(app) == manifests(app) == app.releases()
    assert app.leftovers() == []
    assert len(late) == len(early)
    assert sum(late.values()) <= sum(early.values()) + 4096
    assert late_calls <= early_calls + 20, "status must not read more and more"
    history = app.history()
    assert [entry["sequence"] for entry in history] == list(range(1, 201))
    assert app.record(str(app.current))["sequence"] == 200
    app.run("history", "--verify", check=0)
    app.run("verify", check=0)


def test_sequence_numbers_are_never_given_twice(app: App) -> None:
    ids = deploy_all(app, "1.0", "2.0", "3.0")
    seen = [app.record(name)["sequence"] for name in ids[1:]]
    app.run("rollback", check=0)
    app.run("prune", "--set", "deploy.keep_releases=1", check=0)
    newest = app.deploy("4.0").data["release"]
    assert app.record(newest)["sequence"] > max(seen)


def test_what_an_application_wrote_into_a_release_is_told_and_not_thrown_away_unseen(app: App) -> None:
    configure(app, "keep_releases = 1\n")
    first = app.deploy("1.0", {"uploads": None}).data["release"]
    (app.root / "current" / "uploads" / "p.jpg").write_text("p")
    assert any("uploads/p.jpg" in warning and "shared_dirs" in warning for warning in app.deploy("1.1").data["warnings"])
    assert any("uploads/p.jpg" in warning and "--force" in warning for warning in app.deploy("1.2").data["warnings"])
    app.deploy("1.3")
    assert (app.root / "releases" / first / "uploads" / "p.jpg").exists(), "kept, however many deployments follow"
    for words, told in (([], True), (["--force"], False)):
        warnings = app.run("-n", "prune", *words, check=0).data["warnings"]
        assert any(f"{first} holds 1 file" in warning and "it is kept" in warning for warning in warnings) == told
    assert app.run("prune", "--force", check=0).data["removed"] == [first]


def test_what_is_mutable_and_bytecode_keep_no_release(app: App) -> None:
    configure(app, "keep_releases = 1\nmutable = uploads\n")
    first = app.deploy("1.0", {"uploads": None, "lib/m.py": "m = 1\n"}).data["release"]
    (app.root / "current" / "uploads" / "p.jpg").write_text("p")
    (app.root / "current" / "lib" / "__pycache__").mkdir()
    (app.root / "current" / "lib" / "__pycache__" / "m.cpython-36.pyc").write_text("m")
    assert app.deploy("1.1").data["warnings"] == []
    app.deploy("1.2")
    assert first not in app.releases()
