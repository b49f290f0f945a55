"""Archives that other people's tools made: they unpack as system tools unpack them, and stay verifiable.

fetch_artifacts.sh fetches them; a test whose archive is missing is skipped by
name, and fails in CI.
"""

import os
import shutil
import stat
import subprocess
from pathlib import Path
from typing import Dict, Tuple

import pytest

from support import App, needs, needs_artifact, sha256_of

ARTIFACTS = {
    "npm": "typescript-*.tgz",
    "sdist": "flit_core-*.tar.gz",
    "wheel": "pygments-*.whl",
    "debian": "nano_*.orig.tar.xz",
}


def bring(kind: str, directory: Path) -> Path:
    """Copy a fetched artifact into a directory, with the .sha256 that the real sha256sum writes."""
    original = needs_artifact(ARTIFACTS[kind])
    directory.mkdir(exist_ok=True)
    shutil.copy(str(original), str(directory))
    with open(str(directory / (original.name + ".sha256")), "wb") as checksum:
        subprocess.run([needs("sha256sum"), original.name], cwd=str(directory), stdout=checksum, check=True)
    return directory / original.name


def unpack_independently(artifact: Path, directory: Path) -> Path:
    """Unpack with the system's own tool."""
    directory.mkdir()
    if artifact.suffix == ".whl":
        argv = [needs("unzip"), "-q", str(artifact), "-d", str(directory)]
    else:
        argv = [needs("tar"), "--no-same-owner", "-xf", str(artifact), "-C", str(directory)]
    subprocess.run(argv, check=True)
    return directory


def contents(top: Path) -> Dict[str, Tuple[str, str, bool]]:
    """{path: (type, SHA-256 or link target, whether its owner may execute it)}, mtimes and owners left out."""
    found = {}
    for path in top.rglob("*"):
        mode = path.lstat().st_mode
        name = str(path.relative_to(top))
        if stat.S_ISLNK(mode):
            found[name] = ("symlink", os.readlink(str(path)), False)
        elif stat.S_ISDIR(mode):
            found[name] = ("directory", "", False)
        else:
            found[name] = ("file", sha256_of(path), bool(mode & stat.S_IXUSR))
    return found


def deploy(app: App, kind: str, version: str) -> str:
    """Deploy a fetched artifact under a version of our choosing; returns the release."""
    artifact = bring(kind, app.directory / "artifacts")
    result = app.run("deploy", artifact, "--release-version", version, check=0)
    assert result.data["release"] == app.current
    return str(app.current)


@pytest.mark.parametrize("kind", sorted(ARTIFACTS))
def test_a_release_holds_what_the_system_tool_unpacks(app: App, tmp_path: Path, kind: str) -> None:
    deploy(app, kind, "1.0.0")
    expected = contents(unpack_independently(bring(kind, tmp_path), tmp_path / "expected"))
    assert len(expected) > 20
    assert contents((app.root / "current").resolve()) == expected


@pytest.mark.parametrize("kind", sorted(ARTIFACTS))
def test_sha256sum_and_verify_agree_on_a_release(app: App, kind: str) -> None:
    release = deploy(app, kind, "1.0.0")
    manifest = app.root / ".deploy" / "manifests" / release
    done = subprocess.run([needs("sha256sum"), "-c", "--strict", "--quiet", str(manifest)],
                          cwd=str(app.root / "current"), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert (done.returncode, done.stdout) == (0, b"")
    files = [name for name, (type_, _, _) in contents((app.root / "current").resolve()).items() if type_ == "file"]
    assert len(manifest.read_bytes().splitlines()) == len(files)
    assert app.run("verify", check=0).data["ok"] is True


@pytest.mark.parametrize("kind", sorted(ARTIFACTS))
def test_verify_names_a_changed_a_missing_and_an_added_file(app: App, kind: str) -> None:
    deploy(app, kind, "1.0.0")
    top = (app.root / "current").resolve()
    changed, missing = sorted(name for name, (type_, _, _) in contents(top).items() if type_ == "file")[:2]
    with open(str(top / changed), "ab") as stream:
        stream.write(b"tampered")
    (top / missing).unlink()
    (top / "added.txt").write_text("not in the artifact\n")
    result = app.run("verify", check=7)
    assert result.data["differences"] == {"changed": [changed], "missing": [missing], "added": ["added.txt"]}


def test_real_artifacts_take_turns_and_pruning_keeps_the_live_one(app: App) -> None:
    first, second = deploy(app, "sdist", "1.0.0"), deploy(app, "npm", "2.0.0")
    third = deploy(app, "debian", "3.0.0")
    app.run("rollback", check=0)
    assert app.current == second
    removed = app.run("--set", "deploy.keep_releases=1", "prune", check=0).data["removed"]
    assert app.current == second and second not in removed
    assert set(app.releases()) == {first, second, third} - set(removed)
    app.run("verify", check=0)
    assert app.leftovers() == []


def test_a_damaged_real_artifact_is_refused(app: App) -> None:
    artifact = bring("npm", app.directory / "artifacts")
    data = bytearray(artifact.read_bytes())
    data[len(data) // 2] ^= 1
    artifact.write_bytes(bytes(data))
    app.run("deploy", artifact, "--release-version", "1.0.0", check=4)
    assert app.current is None and app.releases() == []
