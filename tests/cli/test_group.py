"""Several users and one root: a group that deploys, those who may only look, and what the application's user may write."""

import grp
import json
import os
import pwd
import re
import stat
import subprocess
from pathlib import Path
from typing import Any, Dict, Iterator, List

import pytest

from scenes import Gate
from support import DEPLOY, TOP, App, clean_environment, deep, file, needs, open_to_others, snapshot

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
# Groups and a user that every host has; the deployers need no name of their own.
GROUP, OTHER_GROUP, APP_USER = "games", "daemon", "nobody"
ALICE, BOB, CAROL = 61235, 61236, 61237
FILES = {"bin/run": file("#!/bin/sh\n", mode=0o755), "lib/deep/a": "a\n", "closed/b": "b\n"}


@pytest.fixture
def app() -> Iterator[App]:
    """An application in a place that every user may enter."""
    with open_to_others() as found:
        yield found


def argv_of(uid: int, app: App, *words: Any, groups: str = "") -> List[str]:
    """deploy.py as another user; by the system's Python, through stdin: nothing else need be readable to that user."""
    who = [needs("setpriv"), f"--reuid={uid}", f"--regid={uid}", f"--groups={groups}" if groups else "--clear-groups"]
    return who + ["/usr/bin/python3", "-I", "-", "--json", "-c", str(app.config), *map(str, words)]


def run_as(uid: int, app: App, *words: Any, check: int = 0) -> Dict[str, Any]:
    """Run deploy.py as a user; Alice and Bob are of the group, Carol is not."""
    groups = str(grp.getgrnam(GROUP).gr_gid) if uid in (ALICE, BOB) else ""
    done = subprocess.run(argv_of(uid, app, *words, groups=groups), input=DEPLOY.read_bytes(), env={}, cwd="/",
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    result = json.loads(done.stdout.decode("ascii"))  # type: Dict[str, Any]
    assert result["exit_code"] == check, (result["error"], done.stderr.decode())
    return result


def of_group(app: App, text: str = "") -> None:
    """Let the group make the root."""
    app.configure(f"durable = no\ngroup = {GROUP}\n{text}")
    app.root.rmdir()
    app.directory.chmod(0o1777)


def modes(app: App) -> Dict[str, str]:
    """The mode of the root and of what is in it outside releases, the lock beside its kind."""
    state = app.root / ".deploy"
    found = {"/": app.root, "releases": app.root / "releases", "shared": app.root / "shared", ".deploy": state,
             "lock": state / "lock", "history": state / "history.jsonl"}
    found.update({path.name: path for path in state.iterdir() if path.is_dir()})
    found.update({f"{path.parent.name}/": path for path in state.glob("*/*") if path.is_file()})
    return {name: f"{path.stat().st_mode & 0o7777:04o}" for name, path in found.items()}


# -- a group that deploys ---------------------------------------------------------

def test_two_of_a_group_deploy_roll_back_and_prune_what_the_other_made(app: App) -> None:
    of_group(app, "keep_releases = 2\nshared_dirs = log\n[hooks]\npost_stage = mkdir -p made/deep\n"
                  "[template:t]\nsource = lib/deep/a\ntarget = etc/deep/t\n")
    tree = app.artifact("1.0", FILES)
    first = run_as(ALICE, app, "deploy", tree)["release"]
    second = run_as(BOB, app, "deploy", app.artifact("1.1", FILES))["release"]
    assert app.current == second
    run_as(ALICE, app, "rollback")
    assert app.current == first
    run_as(BOB, app, "activate", second)
    run_as(BOB, app, "verify")
    run_as(ALICE, app, "pin", second)
    run_as(BOB, app, "unpin", second)
    pruned = run_as(BOB, app, "deploy", app.artifact("1.2", FILES))
    assert not pruned["warnings"], pruned["warnings"]
    assert first not in app.releases() and not app.leftovers()  # Alice's, by Bob
    pruned = run_as(ALICE, app, "deploy", app.artifact("1.3", FILES))
    assert not pruned["warnings"] and second not in app.releases() and not app.leftovers()
    assert len(run_as(BOB, app, "history", "--verify")["history"]) == 0


def test_a_group_may_write_its_state_and_the_directories_of_releases_and_nobody_else(app: App) -> None:
    of_group(app)
    release = run_as(ALICE, app, "deploy", app.artifact("1.0", dict(FILES, **{"read-only/x": "x"})))["release"]
    assert modes(app) == {"/": "2775", "releases": "2770", "shared": "2775", ".deploy": "2770", "lock": "0660",
                          "history": "0660", "manifests": "2770", "trees": "2770", "trash": "2770",
                          "releases/": "0660", "manifests/": "0660", "trees/": "0660"}
    gid = grp.getgrnam(GROUP).gr_gid
    for path in [app.root, *app.root.rglob("*")]:
        assert path.lstat().st_gid == gid, path
    top = app.root / "releases" / release
    for path in [top, *top.rglob("*")]:
        mode = stat.S_IMODE(path.lstat().st_mode)
        assert path.is_symlink() or mode == (0o2775 if path.is_dir() else 0o755 if path.name == "run" else 0o644), path
    assert (app.root / "releases").stat().st_mode & 0o7777 == 0o2775


def test_what_one_of_a_group_makes_in_shared_is_the_others_to_write(app: App) -> None:
    of_group(app, "shared_dirs = var/lib/one\n")
    run_as(ALICE, app, "deploy", app.artifact("1.0", FILES))
    app.configure(f"durable = no\ngroup = {GROUP}\nshared_dirs = var/lib/two\n")
    run_as(BOB, app, "deploy", app.artifact("1.1", FILES))
    made = [app.root / "shared" / name for name in ("var", "var/lib", "var/lib/one", "var/lib/two")]
    assert [path.stat().st_mode & 0o7777 for path in made] == [0o2775] * 4


def test_what_a_killed_run_made_and_did_not_give_to_the_group_is_given_by_its_next(app: App) -> None:
    of_group(app)
    run_as(ALICE, app, "deploy", app.artifact("1.0", FILES))
    for place in ["releases", ".deploy", *(f".deploy/{name}" for name in ("releases", "manifests", "trees", "trash"))]:
        os.chown(str(app.root / place), ALICE, ALICE)
        (app.root / place).chmod(0o755)
    run_as(BOB, app, "deploy", app.artifact("1.1", FILES), check=1)
    run_as(ALICE, app, "recover")
    run_as(BOB, app, "deploy", app.artifact("1.1", FILES))
    assert app.version == "1.1"


@deep
def test_a_file_for_its_owner_alone_is_named_where_another_of_the_group_cannot_verify_it(app: App) -> None:
    of_group(app)
    made = run_as(ALICE, app, "deploy", app.artifact("1.0", dict(FILES, **{"conf/key": file("x", mode=0o600)})))
    assert "'conf/key'" in made["warnings"][0]
    run_as(ALICE, app, "verify")
    error = run_as(BOB, app, "verify", check=7)["error"]
    assert f"{made['release']} cannot be verified: {BOB} may not read conf/key" in error["message"] and "owner" in error["hint"]
    run_as(BOB, app, "deploy", app.artifact("1.1", FILES))
    error = run_as(BOB, app, "rollback", check=3)["error"]
    assert "conf/key" in error["message"]
    run_as(ALICE, app, "rollback")


def test_a_directory_that_an_artifact_closes_can_still_be_pruned_by_the_others(app: App) -> None:
    of_group(app, "keep_releases = 1\n")
    tree = app.directory / "tree-1.0"
    (tree / "closed" / "deep").mkdir(parents=True)
    (tree / "closed" / "deep" / "x").write_text("x")
    (tree / "closed").chmod(0o555)
    run_as(ALICE, app, "deploy", tree, "--release-version", "1.0")
    for version in ("1.1", "1.2"):
        assert not run_as(BOB, app, "deploy", app.artifact(version, FILES))["warnings"]
    assert len(app.releases()) == 2 and not app.leftovers()


def test_what_one_left_half_done_another_recovers(app: App) -> None:
    gate = Gate(app.directory / "gate")
    of_group(app, f"[hooks]\npost_stage = {gate.command}\n")
    gate.path.chmod(0o644)
    groups = str(grp.getgrnam(GROUP).gr_gid)
    run = subprocess.Popen(argv_of(ALICE, app, "deploy", app.artifact("1.0", FILES), groups=groups), stdin=DEPLOY.open("rb"),
                           env={}, cwd="/", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    gate.wait_for_visitor()
    held = run_as(BOB, app, "status")["status"]["lock"]
    assert held["pid"] == run.pid
    run.kill()
    run.wait()
    gate.open()
    assert run_as(BOB, app, "recover")["changed"]
    assert app.releases() == [] and not app.leftovers()
    assert run_as(BOB, app, "deploy", app.artifact("1.0", FILES))["changed"]


@pytest.mark.parametrize("there", [True, False], ids=["a root", "no root"])
def test_who_is_not_of_the_group_deploys_nothing(there: bool, app: App) -> None:
    of_group(app)
    if there:
        run_as(ALICE, app, "deploy", app.artifact("1.0", FILES))
    artifact = app.artifact("1.0", FILES)
    before = snapshot(app.directory)
    for words in (["deploy", artifact], ["stage", artifact], ["-n", "deploy", artifact]) + (["rollback"], ["prune"]) * there:
        message = run_as(CAROL, app, *words, check=3)["error"]["message"]
        assert f"is not in the group {GROUP}" in message or words[0] == "-n" and "cannot be read" in message
    assert snapshot(app.directory) == before
    if there:
        assert "cannot be read" in run_as(CAROL, app, "status", check=7)["error"]["message"]


@pytest.mark.parametrize("there", [True, False], ids=["a root", "no root"])
def test_root_does_not_deploy_where_the_members_of_a_group_could_change_what_it_believes(there: bool, app: App) -> None:
    of_group(app, f"[preflight]\naccept_risk = {app.root}\n")  # no consent to a path is consent to this
    if there:
        run_as(ALICE, app, "deploy", app.artifact("1.0", FILES))
    artifact = app.artifact("1.1")
    before = {name: what for name, what in snapshot(app.directory).items() if name != app.config.name}
    for words in (["deploy", artifact], ["stage", artifact]) + (["rollback"], ["prune"], ["recover"], ["recover", "--to", "1.0"]) * there:
        assert "could change what root believes" in app.run(*words, check=3).data["error"]["message"]
    rows = {row["name"]: row for row in app.run("preflight", artifact, check=3).data["checks"]}
    assert rows["permissions"]["status"] == "fail" and GROUP in rows["permissions"]["detail"]
    if there:
        # A configuration without the option does not make it trust what they wrote; looking does no harm.
        app.configure("durable = no\n")
        assert "belongs to uid" in app.run("deploy", artifact, check=3).data["error"]["message"]
        app.run("status", check=0)
    assert {name: what for name, what in snapshot(app.directory).items() if name != app.config.name} == before


@pytest.mark.parametrize("place, gid, mode, refused", [
    (".deploy", GROUP, 0o2770, False), (".deploy", GROUP, 0o2777, True), (".deploy", OTHER_GROUP, 0o2770, True),
    (".deploy/releases", OTHER_GROUP, 0o2770, True), (".deploy/trash", GROUP, 0o2772, True),
], ids=["its own", "everybody's", "another group's", "a part is another group's", "a part is everybody's"])
def test_state_that_others_than_the_group_may_write_is_refused(place: str, gid: str, mode: int, refused: bool, app: App) -> None:
    of_group(app)
    run_as(ALICE, app, "deploy", app.artifact("1.0", FILES))
    os.chown(str(app.root / place), -1, grp.getgrnam(gid).gr_gid)
    (app.root / place).chmod(mode)
    result = run_as(ALICE, app, "deploy", app.artifact("1.1"), check=3 if refused else 0)
    assert not refused or "writable by group or others" in result["error"]["message"]


def test_what_the_group_writes_is_no_warning_to_its_members_and_what_others_write_is(app: App) -> None:
    of_group(app, "[hooks]\npre_activate = bin/run\n")
    run_as(ALICE, app, "deploy", app.artifact("1.0", FILES))

    def row() -> str:
        checks = run_as(BOB, app, "preflight", app.artifact("1.1", FILES))["checks"]
        return next(f"{check['status']} {check['detail']}" for check in checks if check["name"] == "permissions")

    assert f"{app.root}" not in row(), row()
    (app.root / "current" / "bin").chmod(0o2777)
    assert f"warn {app.root}/releases" in row()


def test_a_root_of_one_user_is_handed_over_as_the_readme_says(app: App) -> None:
    app.configure("durable = no\n")
    os.chown(str(app.root), ALICE, ALICE)
    first = run_as(ALICE, app, "deploy", app.artifact("1.0", FILES))["release"]
    second = run_as(ALICE, app, "deploy", app.artifact("1.1", FILES))["release"]
    app.configure(f"durable = no\ngroup = {GROUP}\n")
    assert "cannot be read" in run_as(BOB, app, "rollback", check=3)["error"]["message"]
    lines = re.findall(r"(?m)^(ch(?:grp|mod) -R .* /srv/shop.*|find /srv/shop .* chmod .*)$", (TOP / "README.md").read_text())
    assert len(lines) == 3
    words = "\n".join(lines).replace("/srv/shop", str(app.root)).replace("deployers", GROUP)
    subprocess.run([needs("sh"), "-ec", words], check=True)
    run_as(BOB, app, "rollback")
    assert app.current == first
    run_as(ALICE, app, "activate", second)
    third = run_as(BOB, app, "deploy", app.artifact("1.2", FILES))["release"]
    assert third == app.current and modes(app)[".deploy"] == "2770"


def test_a_group_that_is_not_there_is_named(app: App) -> None:
    app.configure("durable = no\ngroup = no-such-group\n")
    error = run_as(ALICE, app, "deploy", app.artifact("1.0"), check=2)["error"]
    assert "no-such-group" in error["message"] and "[deploy] group" in error["hint"]


# -- who may look -----------------------------------------------------------------

LOOKS = (["status"], ["releases"], ["history"], ["history", "--verify"], ["show", "latest"], ["verify"])


@deep
@pytest.mark.parametrize("readable, directory, plain", [("owner", "0700", "0600"), ("group", "0750", "0640"),
                                                        ("all", "0755", "0644")], ids=["owner", "group", "all"])
def test_who_may_look_is_chosen(readable: str, directory: str, plain: str, app: App) -> None:
    app.configure(f"durable = no\nreadable = {readable}\n")
    app.deploy("1.0")
    found = modes(app)
    for name, mode in found.items():
        expected = {"/": "0755", "shared": "0755", "lock": "0600", "history": plain}.get(
            name, plain if name.endswith("/") else directory)
        assert mode == expected, name
    before = snapshot(app.root)
    for words in LOOKS:
        result = run_as(CAROL, app, *words, check=0 if readable == "all" else 7)
        assert readable == "all" or "cannot be read" in result["error"]["message"]
    assert snapshot(app.root) == before
    app.deploy("1.1")  # root does not mind what it made
    rows = {row["name"]: row for row in app.run("preflight").data["checks"]}
    assert ".deploy" not in rows["permissions"]["detail"]


def test_who_may_look_sees_a_run_and_cannot_hold_it_up(app: App) -> None:
    gate = Gate(app.directory / "gate")
    app.configure(f"durable = no\nreadable = all\n[hooks]\npre_activate = {gate.command}\n")
    run = subprocess.Popen(["/usr/bin/python3", "-I", str(DEPLOY), "-c", str(app.config), "deploy", str(app.artifact("1.0"))],
                           env=clean_environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    gate.wait_for_visitor()
    status = run_as(CAROL, app, "status")["status"]
    assert status["lock"] is not None and status["problems"] == []
    lock = app.root / ".deploy" / "lock"
    tried = subprocess.run([needs("setpriv"), f"--reuid={CAROL}", "--clear-groups", needs("flock"), "-n", str(lock), "true"],
                           stderr=subprocess.PIPE)
    assert tried.returncode != 0 and b"ermission" in tried.stderr
    gate.open()
    assert run.wait() == 0
    assert run_as(CAROL, app, "status")["status"]["lock"] is None


def test_a_deploy_directory_more_open_than_is_asked_for_is_refused_by_root(app: App) -> None:
    app.configure("durable = no\nreadable = all\n")
    app.deploy("1.0")
    app.configure("durable = no\nreadable = group\n")
    error = app.run("deploy", app.artifact("1.1"), check=3).data["error"]
    assert "open to others (mode 0755)" in error["message"] and "chmod 0750" in error["hint"]


@deep
def test_who_may_look_beside_a_group(app: App) -> None:
    of_group(app, "readable = all\n")
    run_as(ALICE, app, "deploy", app.artifact("1.0"))
    found = modes(app)
    assert (found[".deploy"], found["history"], found["lock"]) == ("2775", "0664", "0660")
    for words in LOOKS:
        run_as(CAROL, app, *words)


# -- what the application writes --------------------------------------------------

def write_as(user: str, path: Path) -> bool:
    """Whether a user can make or change something."""
    command = f"echo changed >> {path}"
    return subprocess.run([needs("setpriv"), f"--reuid={pwd.getpwnam(user).pw_uid}", "--clear-groups", "sh", "-c", command],
                          stderr=subprocess.DEVNULL).returncode == 0


WRITABLE = f"durable = no\napp_user = {APP_USER}\nwritable = var/cache\n    storage\n"
STORED = dict(FILES, **{"storage/framework/kept": "kept\n", "storage/db": "db\n"})


def test_the_application_writes_where_it_may_and_nowhere_else(app: App) -> None:
    app.configure(WRITABLE)
    app.deploy("1.0", STORED)
    release = app.root / "current"
    for name in ("var/cache/new", "storage/new", "storage/framework/new", "storage/db"):
        assert write_as(APP_USER, release / name), name
    for name in ("new", "var/new", "lib/deep/a", "bin/run", "bin/new", "VERSION"):
        assert not write_as(APP_USER, release / name), name
    uid = pwd.getpwnam(APP_USER).pw_uid
    for path in release.resolve().rglob("*"):
        inside = re.match(r"(var/cache|storage)(/|\Z)", str(path.relative_to(release.resolve())))
        assert path.lstat().st_uid == (uid if inside else 0), path
    assert (release / "var" / "cache").stat().st_mode & 0o7777 == 0o755


def test_what_the_application_writes_there_is_neither_changed_nor_kept(app: App) -> None:
    app.configure(WRITABLE + "keep_releases = 1\n")
    first = app.deploy("1.0", STORED).data["release"]
    release = app.root / "current"
    trees = (app.root / ".deploy" / "trees" / first).read_text()
    assert "var/cache" in trees and APP_USER not in trees
    for name in ("storage/new", "storage/db", "var/cache/x"):
        assert write_as(APP_USER, release / name)
    (release / "storage" / "framework" / "kept").unlink()
    (release / "storage").chmod(0o700)
    verified = app.run("verify", check=0).data
    assert verified["ok"]
    second = app.deploy("1.1", STORED).data
    app.run("rollback", check=0)
    app.run("activate", second["release"], check=0)
    assert not any("did not bring" in warning for warning in second["warnings"])
    app.deploy("1.2", STORED)
    assert first not in app.releases() and not app.leftovers()
    # Beside it the rule is as ever.
    (app.root / "current" / "lib" / "deep" / "a").write_text("other\n")
    app.run("verify", check=7)


def test_a_huge_file_that_the_application_made_there_does_not_hold_up_a_rollback(app: App) -> None:
    app.configure(WRITABLE)
    app.deploy("1.0", STORED)
    os.truncate(str(app.root / "current" / "storage" / "db"), 1 << 42)
    app.deploy("1.1", STORED)
    app.run("rollback", check=0, timeout=60)


def test_nothing_that_the_application_makes_there_holds_up_what_post_stage_is_followed_by(app: App) -> None:
    """The directories are the application's already while the hook runs."""
    app.configure(WRITABLE + "[hooks]\npost_stage = sh -c 'mkfifo storage/pipe; truncate -s 4T storage/huge; echo made > made'\n")
    release = app.run("deploy", app.artifact("1.0", STORED), check=0, timeout=60).data["release"]
    manifest = (app.root / ".deploy" / "manifests" / release).read_text()
    assert "  made\n" in manifest and "storage/" not in manifest
    app.run("verify", check=0, timeout=60)
    (app.root / "current" / "made").write_text("changed")
    assert app.run("verify", check=7).data["differences"]["changed"] == ["made"]


@pytest.mark.parametrize("how", ["reflink", "hardlink"])
def test_what_is_given_away_is_no_hard_link_to_the_live_release(how: str, app: App) -> None:
    app.configure(f"durable = no\nshare_unchanged = {how}\n")
    app.deploy("1.0", STORED)
    live = app.root / "releases" / str(app.current) / "storage" / "db"
    app.configure(WRITABLE + f"share_unchanged = {how}\n")
    app.deploy("1.1", STORED)
    assert live.stat().st_uid == 0 and live.stat().st_nlink == 1
    assert write_as(APP_USER, app.root / "current" / "storage" / "db") and live.read_text() == "db\n"


def test_nothing_is_given_away_through_a_link_of_the_artifact(app: App) -> None:
    outside = app.directory / "outside"
    outside.mkdir()
    (outside / "file").write_text("mine\n")
    app.configure(WRITABLE + "[artifact]\nsymlinks = any\n")
    before = snapshot(outside)
    tree = app.directory / "tree-1.0"
    tree.mkdir()
    (tree / "storage").symlink_to(outside)
    assert "storage is not a directory" in app.run("deploy", tree, check=1).data["error"]["message"]
    (tree / "storage").unlink()
    (tree / "storage").mkdir()
    (tree / "storage" / "link").symlink_to(outside)
    (tree / "storage" / "file").symlink_to(outside / "file")
    app.run("deploy", tree, check=0)
    assert snapshot(outside) == before
    assert outside.stat().st_uid == 0 and (outside / "file").stat().st_uid == 0


def test_only_root_gives_directories_away(app: App) -> None:
    app.configure(WRITABLE)
    os.chown(str(app.root), ALICE, ALICE)
    result = run_as(ALICE, app, "deploy", app.artifact("1.0"), check=3)
    assert "needs root" in result["error"]["message"] and not app.releases()


@pytest.mark.parametrize("text, code, message", [
    ("writable = var", 2, "needs app_user"), ("app_user = no-such-user\nwritable = var", 3, "no-such-user"),
    ("app_user = nobody\nwritable = var/log\nshared_dirs = var", 2, "writable = var/log"),
    ("app_user = nobody\nwritable = ../x", 2, "stays inside"), ("readable = everybody", 2, "readable"),
], ids=["for nobody", "for somebody unknown", "in what is shared", "outside", "who may look"])
def test_what_cannot_be_meant_is_refused(text: str, code: int, message: str, app: App) -> None:
    app.configure(text)
    result = app.run("deploy", app.artifact("1.0"), check=code)
    assert message in result.data["error"]["message"], result.data["error"]
