"""[deploy] share_unchanged: files that are the same in the live release take no space again, and nothing else changes."""

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any, Dict, Iterator, List

import pytest

from crashes import inconsistencies
from support import App, deep, file, link, load_deploy, make_tar, make_zip, needs, sha256_of, tree_members, write_checksum

BIG = os.urandom(1500000)
TREE = {"VERSION": "1.0\n", "bin/run": file("#!/bin/sh\n", 0o755), "lib/big": BIG, "lib/small": "small",
        "lib/empty": "", "static/a/b": "b" * 5000}  # type: Dict[str, Any]


def artifact(app: App, version: str, tree: Dict[str, Any], suffix: str = ".tar.gz") -> Path:
    """Pack a tree as a version of its own."""
    path = app.directory / f"shared-{version}{suffix}"
    if suffix == ".zip":
        make_zip(path, tree)
    else:
        make_tar(path, tree_members(tree))
    write_checksum(path)
    return path


def deploy(app: App, version: str, tree: Dict[str, Any], suffix: str = ".tar.gz") -> str:
    """Deploy a tree; returns what the step that unpacked it said."""
    done = app.run("deploy", artifact(app, version, dict(tree, VERSION=version + "\n"), suffix), check=0)
    app.run("verify", check=0)
    return next(step["detail"] for step in done.data["steps"] if step["name"] == "unpack")


def inode(app: App, release: str, name: str) -> int:
    """The inode of a file of a release."""
    return (app.root / "releases" / release / name).lstat().st_ino


def shared(app: App, first: str, second: str) -> List[str]:
    """The files of two releases that are one inode."""
    return [name for name in TREE if (app.root / "releases" / second / name).is_file()
            and inode(app, first, name) == inode(app, second, name)]


@pytest.fixture
def linked(app: App) -> App:
    """An application whose releases share by hard links, with one release live."""
    app.configure("share_unchanged = hardlink")
    deploy(app, "1.0", TREE)
    return app


@pytest.mark.parametrize("suffix", [".tar.gz", ".tar", ".zip"])
def test_unchanged_files_become_hard_links_by_choice(linked: App, suffix: str) -> None:
    first = str(linked.current)
    assert "shared with " + first in deploy(linked, "1.1", TREE, suffix)
    assert shared(linked, first, str(linked.current)) == ["bin/run", "lib/big", "lib/small", "static/a/b"]
    assert linked.version == "1.1"


def test_a_directory_shares_as_well(linked: App) -> None:
    first, top = str(linked.current), linked.directory / "tree"
    make_tar(linked.directory / "t.tar", tree_members(dict(TREE, VERSION="1.1\n")))
    shutil.unpack_archive(str(linked.directory / "t.tar"), str(top))
    linked.run("deploy", top, "--release-version", "1.1", check=0)
    assert shared(linked, first, str(linked.current)) == ["bin/run", "lib/big", "lib/small", "static/a/b"]


def test_without_the_choice_there_are_no_hard_links(app: App) -> None:
    deploy(app, "1.0", TREE)
    first = str(app.current)
    deploy(app, "1.1", TREE)
    assert shared(app, first, str(app.current)) == []


@pytest.mark.parametrize("name, now", [
    ("lib/big", BIG[:-1] + bytes([BIG[-1] ^ 1])), ("lib/big", bytes([BIG[0] ^ 1]) + BIG[1:]), ("lib/big", BIG + b"x"),
    ("lib/big", BIG[:700000] + bytes([BIG[700000] ^ 1]) + BIG[700001:]), ("lib/small", "SMALL"), ("bin/run", file("#!/bin/sh\n", 0o644)),
    ("lib/small", link("big")), ("static/a/b", None),
], ids=["last byte", "first byte", "longer", "in the middle", "content", "mode", "now a link", "gone"])
def test_a_file_that_changed_is_written_anew(linked: App, name: str, now: Any) -> None:
    first = str(linked.current)
    tree = {key: value for key, value in TREE.items() if key != name}
    deploy(linked, "1.1", dict(tree, **({name: now} if now is not None else {})))
    assert name not in shared(linked, first, str(linked.current)) and shared(linked, first, str(linked.current))
    path = linked.root / "current" / name
    if isinstance(now, bytes):
        assert path.read_bytes() == now
    assert inconsistent(linked) == []


def inconsistent(app: App) -> List[str]:
    """What does not fit together, but for the contents that only the usual application has."""
    return [problem for problem in inconsistencies(app, ["1.0", "1.1"]) if "is not whole" not in problem]


def test_a_live_file_that_was_changed_by_hand_is_not_shared(linked: App) -> None:
    first = str(linked.current)
    path = linked.root / "current" / "lib" / "small"
    path.write_text("SMALL")
    deploy(linked, "1.1", TREE)
    assert (linked.root / "current" / "lib" / "small").read_text() == "small" and path.exists()
    assert "lib/small" not in shared(linked, first, str(linked.current))


def test_no_link_in_the_live_release_is_followed(linked: App, tmp_path: Path) -> None:
    first = str(linked.current)
    outside = tmp_path / "outside"
    shutil.move(str(linked.root / "releases" / first / "static" / "a"), str(outside))
    (linked.root / "releases" / first / "static" / "a").symlink_to(outside)
    (linked.root / "releases" / first / "lib" / "small").unlink()
    (outside / "small").write_text("small")
    (linked.root / "releases" / first / "lib" / "small").symlink_to(outside / "small")
    deploy(linked, "1.1", TREE)
    for name in ("static/a/b", "lib/small"):
        assert (linked.root / "current" / name).lstat().st_nlink == 1
    assert (outside / "b").stat().st_nlink == 1 and (outside / "small").stat().st_nlink == 1


def test_pruning_the_older_release_leaves_the_newer_one_whole(linked: App) -> None:
    for version in ("1.1", "1.2", "1.3"):
        deploy(linked, version, TREE)
    linked.configure("share_unchanged = hardlink\nkeep_releases = 1")
    linked.run("prune", check=0)
    assert len(linked.releases()) == 2
    linked.run("verify", check=0)
    linked.run("rollback", check=0)
    linked.run("verify", check=0)


# -- reflinks ------------------------------------------------------------------

@pytest.fixture(params=["xfs", "btrfs"])
def cloning(request: Any, app: App) -> Iterator[App]:
    """An application on a filesystem that can share blocks."""
    make = needs("mkfs." + request.param)
    image = app.directory / "image"
    with open(str(image), "wb") as stream:
        stream.truncate(400 << 20)
    subprocess.check_call([make, "-q", str(image)])
    mounted = subprocess.run(["mount", "-o", "loop", str(image), str(app.root)], stderr=subprocess.PIPE)
    if mounted.returncode:
        if os.environ.get("CI"):
            pytest.fail(f"cannot mount {request.param}: {mounted.stderr.decode()}")
        pytest.skip(f"cannot mount {request.param}: {mounted.stderr.decode()}")
    try:
        app.configure("min_free = 0")
        yield app
    finally:
        subprocess.check_call(["umount", str(app.root)])


def used_bytes(app: App) -> int:
    """What is taken on the application's filesystem, once everything is on disk."""
    subprocess.check_call(["sync", "-f", str(app.root)])
    found = os.statvfs(str(app.root))
    return (found.f_blocks - found.f_bfree) * found.f_frsize


@deep
def test_unchanged_files_share_their_blocks_where_the_filesystem_can(cloning: App) -> None:
    tree = dict(TREE, **{f"data/{number}": os.urandom(200000) for number in range(100)})
    deploy(cloning, "1.0", tree)
    first, before = str(cloning.current), used_bytes(cloning)
    assert "shared with " + first in deploy(cloning, "1.1", dict(tree, **{"data/7": os.urandom(200000)}))
    assert used_bytes(cloning) - before < 2 << 20
    assert shared(cloning, first, str(cloning.current)) == []
    path = cloning.root / "current" / "lib" / "big"
    with open(str(path), "r+b") as stream:
        stream.write(b"changed")
    assert sha256_of(cloning.root / "releases" / first / "lib" / "big") != sha256_of(path)
    cloning.run("rollback", check=0)


@deep
@pytest.mark.parametrize("size_bytes", [5000, 1500000], ids=["small", "large"])
def test_a_live_file_that_changes_just_before_it_is_cloned_gives_none_of_it(cloning: App, monkeypatch: Any, size_bytes: int) -> None:
    """As somebody who holds it mapped can change it: no time of the file tells."""
    program, live, new = load_deploy(), cloning.root / "live", cloning.root / "new"
    live.mkdir()
    new.mkdir()
    (live / "f").write_bytes(b"a" * size_bytes)
    clone, calls = program.fcntl.ioctl, []

    def change_and_clone(*arguments: Any) -> Any:
        calls.append(arguments)
        with open(str(live / "f"), "r+b") as stream:
            stream.write(b"EVIL")
        return clone(*arguments)

    monkeypatch.setattr(program.fcntl, "ioctl", change_and_clone)
    with program.Directory(str(live)) as release, program.Directory(str(new)) as place, program.Sharer(release, "reflink") as sharer:
        program.write_file(program.Member(b"f", program.FILE, 0o644, size_bytes), iter([b"a" * size_bytes]), place.descriptor, sharer)
    assert calls and (new / "f").read_bytes() == b"a" * size_bytes and os.listdir(str(new)) == ["f"]


# -- a live release that changes meanwhile --------------------------------------

def unpack_while(app: App, pieces: List[bytes], between: Any, how: str) -> Any:
    """Unpack one file `f` whose data come in pieces, with something done to the live release before the second."""
    live, new = app.directory / "live", app.directory / "new"
    new.mkdir()
    program = load_deploy()

    def data() -> Iterator[bytes]:
        for number, piece in enumerate(pieces):
            if number:
                between(live / "f")
            yield piece

    with program.Directory(str(live)) as release, program.Directory(str(new)) as place, \
            program.Sharer(release, how) as sharer:
        program.write_file(program.Member(b"f", program.FILE, 0o644, sum(map(len, pieces))), data(), place.descriptor, sharer)
    return new / "f"


def overwrite(path: Path) -> None:
    """Change the beginning in place."""
    with open(str(path), "r+b") as stream:
        stream.write(b"EVIL")


def replace(path: Path) -> None:
    """Put another file of the same size there."""
    other = path.parent / "other"
    other.write_bytes(b"e" * path.stat().st_size)
    other.rename(path)


@pytest.mark.parametrize("change, last, how", [(overwrite, b"different", "reflink"), (overwrite, b"b" * 9, "hardlink"),
                                               (replace, b"b" * 9, "hardlink")])
def test_what_changes_in_the_live_release_meanwhile_is_never_taken_over(app: App, change: Any, last: bytes, how: str) -> None:
    live = app.directory / "live"
    live.mkdir()
    (live / "f").write_bytes(b"a" * 100000 + b"b" * 9)
    (live / "f").chmod(0o644)
    new = unpack_while(app, [b"a" * 100000, last], change, how)
    assert new.read_bytes() == b"a" * 100000 + last and new.stat().st_nlink == 1
    assert os.listdir(str(new.parent)) == ["f"]


def test_a_post_stage_hook_cannot_reach_the_live_release_through_hard_links(linked: App) -> None:
    linked.configure("share_unchanged = hardlink\n[hooks]\npost_stage = /bin/sh -c 'echo added >> lib/small'")
    linked.run("stage", artifact(linked, "1.1", dict(TREE, VERSION="1.1\n")), check=0)
    linked.run("verify", "current", check=0)
    assert (linked.root / "current" / "lib" / "small").read_text() == "small"


def test_a_file_with_attributes_of_its_own_is_not_linked(linked: App) -> None:
    first = str(linked.current)
    try:
        os.setxattr(str(linked.root / "current" / "lib" / "small"), "trusted.test", b"1")
    except OSError as error:
        pytest.skip(f"this filesystem has no such attributes: {error}")
    deploy(linked, "1.1", TREE)
    assert "lib/small" not in shared(linked, first, str(linked.current))
    assert os.listxattr(str(linked.root / "current" / "lib" / "small")) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files away")
def test_a_file_that_was_given_away_is_not_linked(linked: App) -> None:
    """Its owner could change what is in both releases."""
    first = str(linked.current)
    os.chown(str(linked.root / "current" / "lib" / "small"), 65534, 65534)
    deploy(linked, "1.1", TREE)
    assert "lib/small" not in shared(linked, first, str(linked.current))
    assert (linked.root / "current" / "lib" / "small").stat().st_uid == 0
