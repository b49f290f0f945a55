"""Disks that are full, broken or read-only: the right exit code, a clear error, and the old or the new release."""

import os
import re
import subprocess
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple

import pytest

from crashes import Call, Saved, find_call, inconsistencies, inject, record_calls, recover_and_judge, script, under
from support import App, Result, make_tree, needs, snapshot, wait_until


def check_error(result: Result, word: str) -> None:
    """Two lines that name what happened and what to do, and nothing of Python."""
    assert "Traceback" not in result.stderr and result.exit_code not in (70, 1000), result.describe()
    assert re.search(r"^deploy\.py: error: .*\b" + word + r"\b", result.stderr, re.MULTILINE), result.describe()
    assert re.search(r"^hint: \S", result.stderr, re.MULTILINE), result.describe()


def but_what_is_told(app: App) -> Dict[str, Any]:
    """Everything under the root but the lock and the history, in which a refusal is a line."""
    return {name: found for name, found in snapshot(app.root).items() if name not in (".deploy/lock", ".deploy/history.jsonl")}


# -- a disk that is really full ----------------------------------------------------

class SmallDisk:
    """A root on a disk of its own in a mount namespace of its own; `app.root` is the view of it from outside.

    `mount` are the commands that mount it, with `{root}` where that is to be.
    """

    def __init__(self, app: App, mount: str) -> None:
        unshare, self.inside = needs("unshare"), str(app.root)
        ready = app.directory / "ready"
        self.process = subprocess.Popen(
            [unshare, "-m", "sh", "-c", f"{mount.format(root=self.inside)} && touch {ready} && exec sleep 600"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
        wait_until(lambda: ready.exists() or self.process.poll() is not None)
        if not ready.exists():
            pytest.skip("this user may not mount such a disk in a namespace of its own")
        self.app, app.root = app, Path(f"/proc/{self.process.pid}/root{self.inside}")
        self.python = under(app, "in-namespace", needs("nsenter"), "-t", self.process.pid, "-m")

    def configure(self, text: str = "") -> None:
        """Write a configuration in which the root is what it is inside."""
        self.app.config.write_text(f"[deploy]\nroot = {self.inside}\napplication = myapp\nmin_free = 0\n{text}\n")

    def run(self, *arguments: Any, **options: Any) -> Result:
        """Run deploy.py inside."""
        return self.app.run(*arguments, python=self.python, **options)

    def do(self, *argv: str) -> None:
        """Run a command inside."""
        subprocess.run([needs("nsenter"), "-t", str(self.process.pid), "-m"] + list(argv), check=True)

    def close(self) -> None:
        """Let the namespace go."""
        self.process.kill()
        self.process.wait()


def with_release(app: App, mount: str) -> Iterator[SmallDisk]:
    """Mount a disk and make 1.0 live on it."""
    small = SmallDisk(app, mount)
    try:
        small.configure()
        small.run("deploy", app.artifact("1.0"), check=0)
        yield small
    finally:
        small.close()


@pytest.fixture
def disk(app: App) -> Iterator[SmallDisk]:
    """A disk of 1 MB on which 1.0 is live."""
    yield from with_release(app, "mount -t tmpfs -o size=1m,mode=755 tmpfs {root}")


@pytest.fixture
def few_inodes(app: App) -> Iterator[SmallDisk]:
    """A disk with room for 150 files on which 1.0 is live."""
    yield from with_release(app, "mount -t tmpfs -o size=1m,nr_inodes=150,mode=755 tmpfs {root}")


@pytest.fixture
def real_disk(app: App) -> Iterator[SmallDisk]:
    """An ext4 of 8 MB on which 1.0 is live: it can fail as a disk fails, and forgets then what was not synced."""
    image = app.directory / "image"
    with image.open("wb") as stream:
        stream.truncate(8 << 20)
    make = f"{needs('mkfs.ext4')} -q {image}"
    yield from with_release(app, make + f" && mount -o loop {image} {{root}} && rmdir {{root}}/lost+found")


def settle(disk: SmallDisk, *versions: Any) -> None:
    """The disk is well again: one recover brings all into line, a second finds nothing, and the next deployment works."""
    app = disk.app
    disk.configure()
    first = disk.run("recover", check=0)
    assert inconsistencies(app, list(versions)) == [], first.describe()
    assert not disk.run("recover", check=0).data["changed"] and disk.run("status", check=0)
    disk.run("deploy", "--force", app.artifact("1.2"), check=0)
    assert inconsistencies(app, ["1.2"]) == []


def filler(disk: SmallDisk, then: str = "") -> Path:
    """A hook that fills the disk to the last byte."""
    return script(disk.app.directory / "fill", f"dd if=/dev/zero of={disk.inside}/shared-filler bs=4k 2>/dev/null\n{then or 'exit 0'}")


@pytest.mark.parametrize("hook, exit_code, then", [
    ("pre_stage", 1, ""), ("post_stage", 1, ""), ("pre_activate", 5, ""), ("post_activate", 5, ""), ("post_activate", 5, "exit 1"),
    ("post_deploy", 5, ""),
], ids=["before unpacking", "before the manifest", "before the switch", "after the switch", "after the switch, and failing", "at the end"])
def test_a_full_disk_leaves_the_old_release_live(disk: SmallDisk, hook: str, exit_code: int, then: str) -> None:
    app = disk.app
    disk.configure(f"[hooks]\n{hook} = {filler(disk, then)}\n")
    result = disk.run("deploy", app.artifact("1.1", {"big": "x" * 20000}))
    assert app.version == "1.0", result.describe()
    # Where the switch itself finds no room, nothing was activated.
    assert result.exit_code in ((1, 5) if hook == "pre_activate" else (exit_code,)), result.describe()
    if not then:
        check_error(result, "ENOSPC")
    (app.root / "shared-filler").unlink()
    settle(disk, "1.0")


@pytest.mark.parametrize("hook, exit_code, then", [
    ("pre_stage", 1, ""), ("post_stage", 1, ""), ("pre_activate", 1, ""), ("post_activate", 5, ""), ("post_activate", 5, "exit 1"),
    ("post_deploy", 5, ""),
], ids=["before unpacking", "before the manifest", "before the switch", "after the switch", "after the switch, and failing", "at the end"])
def test_a_full_inode_table_leaves_the_old_release_live(few_inodes: SmallDisk, hook: str, exit_code: int, then: str) -> None:
    """The way back needs a link, and no inode is left for one: it was made before."""
    app, names = few_inodes.app, few_inodes.app.root / "shared"
    # `true`, not `:`, whose failed redirection would end the shell.
    full = script(app.directory / "fill",
                  f"cd {few_inodes.inside}/shared; while true > x$i; do i=$((i+1)); done 2>/dev/null; {then or 'exit 0'}")
    few_inodes.configure(f"[hooks]\n{hook} = {full}\n")
    result = few_inodes.run("deploy", app.artifact("1.1"))
    assert len(os.listdir(str(names))) > 20, "the disk was not filled"
    assert result.exit_code == exit_code and app.version == "1.0", result.describe()
    if not then:
        check_error(result, "ENOSPC")
    for name in os.listdir(str(names)):
        (names / name).unlink()
    settle(few_inodes, "1.0")


def test_too_few_inodes_are_refused_before_anything_changes(few_inodes: SmallDisk) -> None:
    app = few_inodes.app
    before = but_what_is_told(app)
    many = {f"many/{number}": "x" for number in range(200)}
    result = few_inodes.run("deploy", app.artifact("1.1", many, suffix=".zip"), check=3)
    assert "inodes" in result.data["error"]["message"], result.describe()
    assert "min_free" not in result.data["error"]["hint"], "lowering it would free no inode"
    # A directory, whatever its digest is from.
    tree = make_tree(app.directory / "app-1.1", many)
    digest = few_inodes.run("deploy", tree, check=3).data["artifact"]["sha256"]
    assert "inodes" in few_inodes.run("deploy", tree, "--sha256", digest, check=3).data["msg"]
    assert but_what_is_told(app) == before


@pytest.fixture
def thin_disk(app: App) -> Iterator[SmallDisk]:
    """A filesystem that promises ten times what is behind it."""
    behind = app.directory / "behind"
    behind.mkdir()
    make = f"truncate -s 300M {behind}/image && {needs('mkfs.ext4')} -q -O ^has_journal {behind}/image"
    yield from with_release(app, f"mount -t tmpfs -o size=30m none {behind} && {make} && mount -o loop {behind}/image {{root}}"
                                 f" && rmdir {{root}}/lost+found")


def test_what_the_disk_could_not_take_is_known_before_the_release_gets_its_name(thin_disk: SmallDisk) -> None:
    """Every write succeeds, and fails on its way to the disk, some of them while others are yet to come."""
    app = thin_disk.app
    noise = {f"noise{number}": os.urandom(4 << 20) for number in range(15)}
    thin_disk.configure()
    result = thin_disk.run("stage", app.artifact("1.1", noise, suffix=".tar"), check=1)
    assert re.search("EIO|ENOSPC", result.data["error"]["message"]), result.describe()
    assert app.version == "1.0" and len(app.releases()) == 1


@pytest.mark.parametrize("hook, exit_code, live", [
    ("pre_stage", 1, ["1.0"]), ("post_stage", 1, ["1.0"]), ("pre_activate", 1, ["1.0"]),
    ("post_activate", 6, ["1.0", "1.1"]), ("post_deploy", 6, ["1.0", "1.1"]),
], ids=["before unpacking", "before the manifest", "before the switch", "after the switch", "at the end"])
def test_a_disk_that_turns_read_only_during_the_run(
        real_disk: SmallDisk, hook: str, exit_code: int, live: List[str]) -> None:
    """As ext4 does by itself after an error of the disk; what was not synced is gone once it is mounted again."""
    app = real_disk.app
    real_disk.configure(f"[hooks]\n{hook} = mount -o remount,abort {real_disk.inside}\n")
    result = real_disk.run("deploy", app.artifact("1.1"))
    assert result.exit_code == exit_code and app.version in live, result.describe()
    check_error(result, "(EROFS|EIO)")
    if exit_code == 6:
        assert "recover" in result.data["error"]["hint"]
    real_disk.do("umount", real_disk.inside)
    real_disk.do("mount", "-o", "loop", str(app.directory / "image"), real_disk.inside)
    settle(real_disk, *live)


def test_an_artifact_that_cannot_fit_is_refused_before_anything_changes(disk: SmallDisk) -> None:
    before = but_what_is_told(disk.app)
    result = disk.run("deploy", disk.app.artifact("1.1", {"big": os.urandom(3000000)}), check=3)
    assert "space" in result.data["error"]["message"] and "free" in result.data["error"]["hint"]
    assert but_what_is_told(disk.app) == before


def test_a_full_disk_can_be_pruned_and_rolled_back(disk: SmallDisk) -> None:
    app = disk.app
    disk.configure("keep_releases = 9\n")
    for version in ("1.1", "1.2"):
        disk.run("deploy", app.artifact(version, {"big": "x" * 20000}), check=0)
    subprocess.run(["dd", "if=/dev/zero", f"of={app.root}/shared-filler", "bs=4k"], stderr=subprocess.DEVNULL)
    disk.configure("keep_releases = 1\n")
    # Deleting must be possible when nothing can be written: it is what the hint says to do.
    result = disk.run("prune")
    assert result.exit_code in (0, 1) and "Traceback" not in result.stderr
    assert not [name for name in app.releases() if name.endswith("-1.0")], result.describe()
    (app.root / "shared-filler").unlink()
    disk.run("recover", check=0)
    assert inconsistencies(app, ["1.2"]) == []


@pytest.fixture
def roomy_disk(app: App) -> Iterator[SmallDisk]:
    """A disk of 24 MB on which 1.0 is live: enough to set something aside."""
    yield from with_release(app, "mount -t tmpfs -o size=24m,mode=755 tmpfs {root}")


@pytest.mark.parametrize("command", ["rollback", "prune", "recover"])
def test_what_was_set_aside_is_given_up_on_a_full_disk_and_set_aside_again(roomy_disk: SmallDisk, command: str) -> None:
    disk, app = roomy_disk, roomy_disk.app
    reserve, filler = app.root / ".deploy" / "reserve", app.root / "shared-filler"
    disk.configure("keep_releases = 9\n")
    for version in ("1.1", "1.2"):
        disk.run("deploy", app.artifact(version), check=0)
    assert reserve.stat().st_size == 1 << 20
    if command == "recover":
        disk.configure("keep_releases = 9\n[hooks]\npre_activate = /bin/sh -c 'kill -9 $PPID'\n")
        disk.run("deploy", app.artifact("1.3"), json=False)
    subprocess.run(["dd", "if=/dev/zero", f"of={filler}", "bs=4k"], stderr=subprocess.DEVNULL)
    disk.configure("keep_releases = 1\n")
    result = disk.run(command, check=0)
    assert not reserve.exists() and not result.data["warnings"], result.describe()
    assert app.version == ("1.1" if command == "rollback" else "1.2")
    filler.unlink()
    disk.run("deploy", app.artifact("1.4"), check=0)
    assert reserve.stat().st_size == 1 << 20
    assert inconsistencies(app, ["1.4"]) == []


def test_a_small_disk_has_nothing_set_aside(disk: SmallDisk) -> None:
    assert not (disk.app.root / ".deploy" / "reserve").exists()


def test_a_release_of_an_images_lower_layer_is_pruned(app: App) -> None:
    """overlayfs renames no directory that lies in a lower layer (EXDEV): it is deleted in place, and a kill can leave half of it."""
    app.configure("keep_releases = 9\n")
    for version in ("1.0", "1.1", "1.2"):
        app.deploy(version)
    above = app.directory / "above"
    for name in ("upper", "work"):
        (above / name).mkdir(parents=True)
    disk = SmallDisk(app, f"mount -t overlay -o lowerdir={{root}},upperdir={above}/upper,workdir={above}/work overlay {{root}}")
    try:
        oldest = app.releases()[0]
        disk.do("rm", f"{disk.inside}/releases/{oldest}/VERSION")
        for command in ("rollback", "activate"):
            assert disk.run(command, oldest).exit_code == 1 and app.version == "1.2"
        disk.configure("keep_releases = 1\n")
        result = disk.run("prune", check=0)
        assert result.data["removed"] == [oldest] and not result.data["warnings"], result.describe()
        disk.run("deploy", app.artifact("1.3"), check=0)
        assert inconsistencies(app, ["1.3"]) == [] and len(app.releases()) == 2
    finally:
        disk.close()


def test_a_read_only_root_is_refused_with_a_reason(disk: SmallDisk) -> None:
    disk.do("mount", "-o", "remount,ro", disk.inside)
    for command in (["deploy", disk.app.artifact("1.1")], ["prune"], ["recover"]):
        result = disk.run(*command)
        assert result.exit_code in (1, 3), result.describe()
        check_error(result, "EROFS")
    assert disk.run("status", check=0) and disk.run("releases", check=0) and disk.app.version == "1.0"


# -- errors at one call --------------------------------------------------------------

class Fault(NamedTuple):
    """A system call that fails: which, with what, and how the run must end."""

    name: str
    pattern: str
    error: str
    exit_code: int
    after: str = ""


SWITCH = r"renameat\(.*\.current\."
FAULTS = {
    "journal cannot be created": Fault("openat", r"\.journal\.json", "EROFS", 1),
    "journal is not synced": Fault("fsync", r"\.journal\.json", "EIO", 1),
    "journal is not renamed": Fault("renameat", r"\.journal\.json", "EIO", 1),
    "staging cannot be made": Fault("mkdirat", r"releases/?>, \"\.new-", "EDQUOT", 1),
    "file cannot be created": Fault("openat", r"\.new-.*\"VERSION\"", "EMFILE", 1),
    "file cannot be written": Fault("write", r"\.new-.*data\.txt", "ENOSPC", 1),
    "link cannot be made": Fault("symlinkat", r"\.new-", "ENOSPC", 1),
    "unpacked files do not reach the disk": Fault("syncfs", r"releases", "EIO", 1),
    "release is not renamed": Fault("renameat", r"\.new-.*releases>", "EIO", 1),
    "releases is not synced": Fault("fsync", r"root/releases>", "EIO", 1),
    "manifest is not written": Fault("write", r"manifests", "ENOSPC", 1),
    "record is not renamed": Fault("renameat", r"\.deploy/releases>", "EIO", 1),
    "intent is not journalled": Fault("write", r"\.journal\.json", "ENOSPC", 1, after=r"manifests>"),
    "current's link cannot be made": Fault("symlinkat", r"\.current\.", "ENOSPC", 1),
    "root is not synced before the switch": Fault("fsync", r"/root>\)", "EIO", 1, after=r"symlinkat\(.*\.current\."),
    "current is not renamed": Fault("renameat", r"\.current\.", "EIO", 1),
    "root is not synced after the switch": Fault("fsync", r"/root>\)", "EIO", 1, after=SWITCH),
    "switch is not journalled": Fault("openat", r"\.journal\.json", "EROFS", 5, after=SWITCH),
    "switch's journal is not synced": Fault("fsync", r"\.journal\.json", "EIO", 5, after=SWITCH),
    "old record is not written": Fault("openat", r"-1\.0\.json", "EMFILE", 5, after=SWITCH),
    "new record is not renamed": Fault("renameat", r"-1\.1\.json", "EIO", 5, after=SWITCH),
    "history is not written": Fault("write", r"history\.jsonl", "ENOSPC", 5, after=SWITCH),
    "history is not synced": Fault("fsync", r"history\.jsonl", "EIO", 5, after=SWITCH),
}  # type: Dict[str, Fault]


class Recorded(NamedTuple):
    """An application of which 1.0 is live, and the calls that deploying 1.1 makes."""

    app: App
    saved: Saved
    artifact: Path
    calls: List[Call]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: Any) -> Recorded:
    """Record once for all faults."""
    app = App(tmp_path_factory.mktemp("recorded"))
    app.deploy("1.0")
    artifact, saved = app.artifact("1.1"), Saved(app)
    return Recorded(app, saved, artifact, record_calls(app, "deploy", artifact, check=0))


@pytest.mark.parametrize("what", sorted(FAULTS))
def test_an_error_at_one_call_ends_in_the_old_release(recorded: Recorded, what: str) -> None:
    fault, app = FAULTS[what], recorded.app
    recorded.saved.restore()
    call = find_call(recorded.calls, fault.name, fault.pattern, fault.after)
    result = inject(app, call, f"error={fault.error}", "deploy", recorded.artifact)
    assert result.exit_code == fault.exit_code, result.describe()
    check_error(result, fault.error)
    assert app.version == "1.0"
    # The error was one call long: everything could be undone, or rolled back, and closed.
    problems = inconsistencies(app, ["1.0"])
    recovered = app.run("recover", check=0)
    assert not problems and not recovered.data["changed"], f"{problems}, {recovered.data['recovered']}\n{result.describe()}"


def test_a_failure_to_prune_is_a_warning_and_the_new_release_stays(app: App) -> None:
    app.deploy("0.9")
    app.deploy("1.0")
    app.configure("keep_releases = 1\n")
    artifact, saved = app.artifact("1.1"), Saved(app)
    calls = record_calls(app, "deploy", artifact, check=0)
    saved.restore()
    result = inject(app, find_call(calls, "renameat", r"trash>"), "error=EIO", "deploy", artifact)
    assert result.exit_code == 0 and "EIO" in result.stderr and "Traceback" not in result.stderr, result.describe()
    assert inconsistencies(app, ["1.1"]) == [] and len(app.releases()) == 3
    app.run("prune", check=0)
    assert inconsistencies(app, ["1.1"]) == [] and len(app.releases()) == 2


def test_a_rollback_that_cannot_switch_leaves_live_what_was_live(app: App) -> None:
    app.deploy("1.0")
    app.deploy("1.1")
    saved = Saved(app)
    calls = record_calls(app, "rollback", check=0)
    saved.restore()
    result = inject(app, find_call(calls, "renameat", r"\.current\."), "error=EIO", "rollback")
    assert result.exit_code == 1
    check_error(result, "EIO")
    assert inconsistencies(app, ["1.1"]) == []


def test_the_journal_that_could_not_note_the_way_back_does_not_bring_the_failed_release_back(disk: SmallDisk) -> None:
    """The disk fills after the switch: the way back is taken but cannot be written down."""
    app = disk.app
    disk.configure(f"[hooks]\npost_activate = {filler(disk, 'exit 1')}\n")
    disk.run("deploy", app.artifact("1.1"), check=5)
    assert app.version == "1.0"
    (app.root / "shared-filler").unlink()
    disk.configure()
    disk.run("recover", check=0)
    states = {record["version"]: record["state"] for record in (app.record(name) for name in app.releases())}
    assert app.version == "1.0" and states["1.0"] == "active" and states.get("1.1") != "active", states
    assert app.history()[-1]["result"] != "deployed", "the history says that the failed release is live"


@pytest.mark.parametrize("files", [10, 16])
def test_too_few_descriptors_end_in_an_error_or_in_success(app: App, files: int) -> None:
    app.deploy("1.0")
    result = app.run("deploy", app.artifact("1.1"), json=False,
                     python=under(app, "few", needs("prlimit"), f"--nofile={files}"))
    assert result.exit_code in (0, 1, 3, 5) and "Traceback" not in result.stderr, result.describe()
    assert recover_and_judge(app, ["1.0", "1.1"]) == []
    assert app.version == ("1.1" if result.exit_code == 0 else "1.0")
