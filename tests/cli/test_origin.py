"""Where an artifact comes from: as root, one that somebody else could have written is refused, unless something vouches for it."""

import os
import shlex
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable, Dict, List

import pytest

from scenes import configure
from support import App, file, load_deploy, make_tree, open_to_others, run_as_another, sha256_of, snapshot

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
NOBODY = 65534
deploy = load_deploy()


def origin(app: App, *words: Any, check: int = 0, **options: Any) -> Dict[str, Any]:
    """The check of that name."""
    found = app.run("preflight", *words, check=check, **options).data["checks"]
    return next(row for row in found if row["name"] == "origin")  # type: ignore


def own_place(app: App) -> Path:
    """An artifact in a directory of its own, deeper than what is believed anyway."""
    artifact = app.artifact("1.0")
    place = app.directory / "up" / "in"
    place.mkdir(parents=True)
    for name in (artifact.name, artifact.name + ".sha256"):
        (artifact.parent / name).rename(place / name)
    return place / artifact.name


def listed(artifact: Path) -> Path:
    """A SHA256SUMS beside it."""
    path = artifact.with_name("SHA256SUMS")
    path.write_text(f"{sha256_of(artifact)}  {artifact.name}\n")
    return path


def linked(artifact: Path) -> Path:
    """A link to it in another's directory, which could lead elsewhere tomorrow."""
    place = artifact.parents[1] / "loose"
    place.mkdir()
    (place / artifact.name).symlink_to(artifact)
    return place


# What of it is somebody else's to change.
SPOILT = {
    "the artifact": lambda artifact: artifact,
    "its digest": lambda artifact: artifact.with_name(artifact.name + ".sha256"),
    "the list": listed,
    "its directory": lambda artifact: artifact.parent,
    "a directory above": lambda artifact: artifact.parents[1],
    "a link's directory": linked,
}  # type: Dict[str, Callable[[Path], Path]]
FAULTS = {"another's": (61234, 0, 0o755), "a group's": (0, NOBODY, 0o775), "everybody's": (0, 0, 0o757)}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("what", SPOILT)
def test_what_somebody_else_could_have_written_is_refused_until_the_hint_is_taken(what: str, fault: str, app: App) -> None:
    configure(app)
    artifact = own_place(app)
    path = SPOILT[what](artifact)
    given = path / artifact.name if what.startswith("a link") else artifact
    owner, group, mode = FAULTS[fault]
    assert origin(app, given)["status"] == "ok"
    path.chmod(mode)
    os.chown(str(path), owner, group)
    before = snapshot(app.root)
    error = app.run("deploy", given, check=3).data["error"]
    assert f"origin: {path} " in error["message"] and snapshot(app.root) == before, error
    found = origin(app, given, check=3)
    assert found["status"] == "fail" and found["hint"] == error["hint"]
    words = shlex.split(error["hint"].split("every such path: ")[1])
    assert words[0] == "--set" and origin(app, given, *words)["status"] == "warn"
    configure(app, f"[preflight]\naccept_risk = {path}\n")
    assert str(path) in app.run("deploy", given, check=0).data["warnings"][0]


def test_a_digest_on_the_command_line_and_the_inbox_vouch_for_it(app: App) -> None:
    configure(app)
    artifact = own_place(app)
    os.chown(str(artifact), NOBODY, -1)
    assert origin(app, artifact, "--sha256", sha256_of(artifact))["status"] == "ok"
    app.run("deploy", artifact, "--sha256", "0" * 64, check=4)
    configure(app, f"inbox = {artifact.parent}\n")
    app.run("deploy", artifact, check=0)
    configure(app, f"inbox = {artifact.parent.parent}\n")
    origin(app, artifact, check=3)


def test_a_link_in_the_inbox_vouches_for_nothing(app: App) -> None:
    """Who may write there may bring an artifact, not choose among root's own."""
    artifact, inbox = own_place(app), app.directory / "inbox"
    inbox.mkdir()
    (inbox / artifact.name).symlink_to(artifact)
    os.chown(str(inbox), NOBODY, -1)
    configure(app, f"inbox = {inbox}\n")
    assert str(inbox) in origin(app, inbox / artifact.name, check=3)["detail"]


def test_roots_own_group_may_write_it_but_nobody_by_an_access_list(app: App) -> None:
    configure(app)
    artifact = own_place(app)
    artifact.chmod(0o664)
    artifact.parent.chmod(0o775)
    assert origin(app, artifact)["status"] == "ok"
    entries = [(1, 6, -1), (2, 6, NOBODY), (4, 6, -1), (16, 6, -1), (32, 4, -1)]  # acl(5): user::, user:NOBODY:, group::, mask::, other::
    try:
        os.setxattr(str(artifact), "system.posix_acl_access", struct.pack("<I", 2) + b"".join(
            struct.pack("<HHi", *entry) for entry in entries))
    except OSError:
        pytest.skip("this filesystem has no access lists")
    assert artifact.stat().st_mode & 0o777 == 0o664
    assert str(artifact) in origin(app, artifact, check=3)["detail"]


def test_in_a_sticky_directory_a_file_of_roots_is_as_good_as_elsewhere(app: App) -> None:
    configure(app)
    artifact = own_place(app)
    artifact.parent.chmod(0o1777)
    assert origin(app, artifact)["status"] == "ok"
    (artifact.parent / "SHA256SUMS").write_text("")
    os.chown(str(artifact.parent / "SHA256SUMS"), NOBODY, -1)
    origin(app, artifact, check=3)


def test_a_directory_is_judged_with_what_it_holds(app: App) -> None:
    configure(app)
    tree = make_tree(app.directory / "tree-1.0", {"a/b/c": "x", "d": file("y", 0o644)})
    assert origin(app, tree)["status"] == "ok"
    (tree / "a" / "b" / "c").chmod(0o666)
    assert f"{tree}: {tree}/a/b/c is writable by group or others" in origin(app, tree, check=3)["detail"]
    assert origin(app, tree, "--set", f"preflight.accept_risk={tree}")["status"] == "warn"
    digest = app.run("-n", "deploy", tree, "--set", f"preflight.accept_risk={tree}").data["artifact"]["sha256"]
    app.run("deploy", tree, "--sha256", digest, check=0)


@pytest.mark.parametrize("words", [["rollback"], ["activate", "1.0"]], ids=" ".join)
def test_a_way_back_asks_for_no_origin(words: List[str], app: App) -> None:
    configure(app)
    for version in ("1.0", "1.1"):
        app.deploy(version)
    os.chown(str(app.directory / "artifacts"), NOBODY, -1)
    app.run(*words, check=0)


def test_a_refusal_is_written_down_once(app: App) -> None:
    app.deploy("0.9")
    artifact = own_place(app)
    os.chown(str(artifact), NOBODY, -1)
    for _ in range(3):
        app.run("deploy", artifact, check=3)
    assert [entry["result"] for entry in app.history()] == ["deployed", "refused"]


def test_whoever_is_not_root_may_deploy_what_is_another_users() -> None:
    with open_to_others() as app:
        artifact = app.artifact("1.0")
        result = run_as_another(app, "deploy", artifact, but=artifact)
        assert result["exit_code"] == 0, result["error"]


@pytest.mark.parametrize("then", ["gone", "another of root's"])
def test_a_link_that_is_changed_once_it_was_followed_is_found_out(then: str, app: App) -> None:
    """Somebody's in /tmp: no look at a path can say afterwards whose it was."""
    real, shared = own_place(app), app.directory / "tmp"
    shared.mkdir()
    shared.chmod(0o1777)
    link = shared / real.name
    link.symlink_to(real)
    settings = deploy.load_settings([], {}, [])
    with deploy.Artifact(str(link), settings.limits) as artifact:
        run = SimpleNamespace(facts=SimpleNamespace(artifact=artifact), flags=SimpleNamespace(sha256=None), settings=settings,
                              offer=None)
        assert list(deploy.check_origin(run)) == []
        link.unlink()
        if then == "gone":
            with pytest.raises(FileNotFoundError):
                list(deploy.check_origin(run))
        else:
            link.symlink_to(app.artifact("1.1"))
            assert "was replaced" in list(deploy.check_origin(run))[0][1]
