"""Archives that other people's tools made: they unpack as system tools unpack them, and stay verifiable.

fetch_artifacts.sh fetches them; a test whose archive is missing is skipped by
name, and fails in CI.
"""

import os
import shutil
import stat
import subprocess
import tarfile
import zipfile
from pathlib import Path
from typing import Any, Callable, Dict, Tuple

import pytest

from support import App, file, link, make_tree, needs, needs_artifact, sha256_of

# These are deployed, verified and damaged.
ARTIFACTS = {
    "npm": "typescript-*.tgz",
    "sdist": "flit_core-*.tar.gz",
    "wheel": "pygments-*.whl",
    "debian": "nano_*.orig.tar.xz",
}

# These are staged and compared: none may be refused.
MORE_ARTIFACTS = {
    "npm-tiny": "is-odd-*.tgz",
    "npm-left-pad": "left-pad-*.tgz",
    "npm-thousand-files": "lodash-*.tgz",
    "npm-express": "express-*.tgz",
    "npm-react": "react-*.tgz",
    "npm-chalk": "chalk-*.tgz",
    "npm-executable": "semver-*.tgz",
    "npm-jquery": "jquery-*.tgz",
    "npm-yargs": "yargs-*.tgz",
    "npm-other-top-directory": "types-node-*.tgz",
    "npm-scoped": "babel-runtime-*.tgz",
    "sdist-pax-six": "six-*.tar.gz",
    "sdist-gnu-docopt": "docopt-*.tar.gz",
    "sdist-pax-toml": "toml-*.tar.gz",
    "sdist-pax-cookiecutter-odd-names": "cookiecutter-*.tar.gz",
    "sdist-symlink-idna": "idna-*.tar.gz",
    "sdist-gnu-requests": "requests-*.tar.gz",
    "sdist-pax-colorama": "colorama-*.tar.gz",
    "wheel-six": "six-*.whl",
    "wheel-requests": "requests-*.whl",
    "wheel-certifi": "certifi-*.whl",
    "wheel-jinja2": "Jinja2-*.whl",
    "wheel-click": "click-*.whl",
    "wheel-setuptools": "setuptools-*.whl",
    "wheel-wheel": "wheel-*.whl",
    "wheel-binary-pyyaml": "PyYAML-*.whl",
    "wheel-binary-markupsafe": "MarkupSafe-*.whl",
    "debian-v7-gz-hello": "hello_*.orig.tar.gz",
    "debian-gnu-bz2-zlib": "zlib_*.orig.tar.bz2",
    "debian-v7-xz-sed": "sed_*.orig.tar.xz",
    "debian-v7-gz-dash": "dash_*.orig.tar.gz",
    "debian-v7-gz-bc": "bc_*.orig.tar.gz",
}


def bring(kind: str, directory: Path) -> Path:
    """Copy a fetched artifact into a directory, with its .sha256."""
    original = needs_artifact(dict(MORE_ARTIFACTS, **ARTIFACTS)[kind])
    directory.mkdir(exist_ok=True)
    shutil.copy(str(original), str(directory))
    return with_checksum(directory / original.name)


def with_checksum(artifact: Path) -> Path:
    """Write the .sha256 as the real sha256sum does; returns the artifact."""
    with open(str(artifact) + ".sha256", "wb") as checksum:
        subprocess.run([needs("sha256sum"), artifact.name], cwd=str(artifact.parent), stdout=checksum, check=True)
    return artifact


def unpack_independently(artifact: Path, directory: Path) -> Path:
    """Unpack with the system's own tool."""
    directory.mkdir()
    if artifact.suffix in (".whl", ".zip"):
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


# -- no false refusals ---------------------------------------------------------

def assert_staged(app: App, artifact: Path, expected: Dict[str, Tuple[str, str, bool]]) -> Path:
    """Stage an artifact: the release holds what is expected, and sha256sum agrees; returns the release."""
    result = app.run("stage", artifact, "--release-version", "1.0.0", check=0)
    release = app.root / "releases" / result.data["release"]
    assert contents(release) == expected
    manifest = app.root / ".deploy" / "manifests" / release.name
    done = subprocess.run([needs("sha256sum"), "-c", "--strict", "--quiet", str(manifest)],
                          cwd=str(release), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert (done.returncode, done.stdout) == (0, b"")
    return release


@pytest.mark.parametrize("kind", sorted(MORE_ARTIFACTS))
def test_a_real_archive_is_staged_as_the_system_tool_unpacks_it(app: App, tmp_path: Path, kind: str) -> None:
    artifact = bring(kind, app.directory / "artifacts")
    expected = contents(unpack_independently(artifact, tmp_path / "expected"))
    assert len([name for name, (type_, _, _) in expected.items() if type_ == "file"]) > 2
    assert_staged(app, artifact, expected)


def test_there_are_enough_real_archives() -> None:
    assert len(set(ARTIFACTS.values()) | set(MORE_ARTIFACTS.values())) == 36


# -- the ordinary shapes, as the usual tools write them ---------------------------

DEEP = "/".join(["a-directory-with-a-rather-long-name"] * 5)


def ordinary_tree(top: Path) -> Path:
    """What releases hold: nested files, executables, symlinks, empty directories, names with spaces and accents."""
    make_tree(top, {
        "VERSION": "1.0.0\n", "bin/run": file("#!/bin/sh\n", 0o755), "lib/a.py": "a = 1\n",
        "lib/large.bin": bytes(range(256)) * 3000,
        "empty-file": "", "empty-directory": None, "with space": "x", "-dash": "x", "#hash": "x",
        "caf\u00e9/na\u00efve.txt": "x",
        "current": link("lib"), "lib/b.py": link("a.py"), "lib/up": link("../bin/run"),
        "bin/around": link("../lib/../VERSION"),
    })
    return top


def with_long_names(top: Path) -> None:
    """Names and link targets for which a plain header has no room."""
    make_tree(top, {f"{DEEP}/file": "deep", "to-the-deep": link(f"{DEEP}/file"), "n" * 200: "long",
                    "d" * 120 + "/" + "e" * 120: "longer"})


def run_in(directory: Path, *argv: Any) -> None:
    """Run a tool."""
    command = [needs(argv[0])] + [str(arg) for arg in argv[1:]]
    subprocess.run(command, cwd=str(directory), check=True, stdout=subprocess.DEVNULL)


def gnu_tar(*options: str, suffix: str = ".tar.gz", long_names: bool = True) -> Callable[[Path, Path], Path]:
    """Tar as GNU tar writes it."""
    def make(top: Path, place: Path) -> Path:
        if long_names:
            with_long_names(top)
        target = place / ("app-1.0.0" + suffix)
        run_in(top, "tar", "-caf", target, *(list(options) + ["."]))
        return target
    return make


def npm_like(top: Path, place: Path) -> Path:
    """Files alone, below `package/`, as npm packs them."""
    names = sorted(str(path.relative_to(top)) for path in top.rglob("*") if path.is_file() and not path.is_symlink())
    run_in(top, "tar", "-czf", place / "app-1.0.0.tgz", "--format=ustar", "--transform", "s,^./,package/,",
           *["./" + name for name in names])
    return place / "app-1.0.0.tgz"


def git_archive(suffix: str) -> Callable[[Path, Path], Path]:
    """What `git archive` writes: in tar the commit is a global pax header."""
    def make(top: Path, place: Path) -> Path:
        with_long_names(top)
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "init.defaultBranch=main"]
        for arguments in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "release"]):
            run_in(top, "git", *(identity + arguments))
        run_in(top, "git", "archive", "--prefix=app-1.0.0/", "-o", place / ("app-1.0.0" + suffix), "HEAD")
        return place / ("app-1.0.0" + suffix)
    return make


def hard_links(top: Path, place: Path) -> Path:
    """One file under several names."""
    make_tree(top, {"shared-data": b"data" * 5000})
    for name in ("bin/same", "lib/same", "z"):
        os.link(str(top / "shared-data"), str(top / name))
    return gnu_tar()(top, place)


def read_only(top: Path, place: Path) -> Path:
    """Directories and files that nobody may write to, as package caches are."""
    make_tree(top, {"ro/deeper/file": "x", "ro/secret": file("x", 0o400)})
    for name in ("ro/deeper/file", "ro/deeper", "ro"):
        os.chmod(str(top / name), 0o555 if name != "ro/deeper/file" else 0o444)
    try:
        return gnu_tar()(top, place)
    finally:
        for name in ("ro", "ro/deeper"):
            os.chmod(str(top / name), 0o755)


def odd_bytes(top: Path, place: Path) -> Path:
    """Names that are Latin-1, not UTF-8."""
    for name in (b"caf\xe9", b"\xfcber/na\xefve"):
        path = os.path.join(os.fsencode(str(top)), name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as stream:
            stream.write(name)
    return gnu_tar("--format=gnu")(top, place)


def odd_times_and_owners(top: Path, place: Path) -> Path:
    """Times before 1970 and after 2242, and owners too large for an octal field."""
    os.utime(str(top / "VERSION"), (-1e9, -1e9))
    os.utime(str(top / "empty-file"), (9e9, 9e9))
    return gnu_tar("--format=gnu", "--owner=someone:3000000", "--group=others:2500000")(top, place)


def appended(top: Path, place: Path) -> Path:
    """An archive to which files were added later."""
    run_in(top, "tar", "-cf", place / "app-1.0.0.tar", "VERSION", "bin")
    rest = sorted(set(os.listdir(str(top))) - {"VERSION", "bin"})
    run_in(top, "tar", "-rf", place / "app-1.0.0.tar", *["./" + name for name in rest])
    return place / "app-1.0.0.tar"


def in_two_streams(top: Path, place: Path) -> Path:
    """Two gzip streams, as parallel compressors and `cat a.gz b.gz` make them."""
    gnu_tar(suffix=".tar")(top, place)
    data = (place / "app-1.0.0.tar").read_bytes()
    target = place / "app-1.0.0.tar.gz"
    with open(str(target), "wb") as stream:
        for piece in (data[:70000], data[70000:]):
            subprocess.run([needs("gzip"), "-c"], input=piece, stdout=stream, check=True)
            stream.flush()
    return target


def python_tar(tar_format: int) -> Callable[[Path, Path], Path]:
    """What Python's tarfile writes."""
    def make(top: Path, place: Path) -> Path:
        with_long_names(top)
        with tarfile.open(str(place / "app-1.0.0.tar.gz"), "w:gz", format=tar_format) as archive:
            archive.add(str(top), "app-1.0.0")
        return place / "app-1.0.0.tar.gz"
    return make


def python_zip(top: Path, place: Path) -> Path:
    """What Python's zipfile writes, which follows symlinks."""
    with zipfile.ZipFile(str(place / "app-1.0.0.zip"), "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(top.rglob("*")):
            # Of a directory Python 3.14 writes the name in code page 437, which the system's tool takes for bytes.
            if not path.is_dir() or max(str(path.relative_to(top))) < "\x80":
                archive.write(str(path), str(path.relative_to(top)))
    return place / "app-1.0.0.zip"


def info_zip(*options: str) -> Callable[[Path, Path], Path]:
    """What Info-ZIP writes; `-y` keeps symlinks."""
    def make(top: Path, place: Path) -> Path:
        with_long_names(top)
        run_in(top, "zip", "-qry", *(list(options) + [place / "app-1.0.0.zip", "."]))
        return place / "app-1.0.0.zip"
    return make


def streamed_zip(top: Path, place: Path) -> Path:
    """A zip written into a pipe: sizes come after the data; symlinks are followed, for those zip cannot stream."""
    with open(str(place / "app-1.0.0.zip"), "wb") as target:
        writer = subprocess.Popen([needs("zip"), "-qr", "-", "."], cwd=str(top), stdout=subprocess.PIPE)
        shutil.copyfileobj(writer.stdout, target)  # type: ignore
    assert writer.wait() == 0
    return place / "app-1.0.0.zip"


SHAPES = {
    "gnu-format": gnu_tar("--format=gnu"),
    "old-gnu-format": gnu_tar("--format=oldgnu"),
    "pax-format": gnu_tar("--format=posix"),
    "pax-format-with-every-time": gnu_tar("--format=posix", "--pax-option=exthdr.name=%d/PaxHeaders/%f"),
    "pax-format-with-a-comment": gnu_tar("--format=posix", "--pax-option=comment=made by CI,globexthdr.name=g"),
    "ustar-format": gnu_tar("--format=ustar", long_names=False),
    "v7-format": gnu_tar("--format=v7", long_names=False),
    "plain": gnu_tar(suffix=".tar"),
    "bzip2": gnu_tar(suffix=".tar.bz2"),
    "xz": gnu_tar(suffix=".tar.xz"),
    "zstd": gnu_tar(suffix=".tar.zst"),
    "one-block-records": gnu_tar("--blocking-factor=1", suffix=".tar"),
    "large-records": gnu_tar("--blocking-factor=2048", suffix=".tar"),
    "reproducible": gnu_tar(
        "--sort=name", "--mtime=@0", "--owner=0", "--group=0", "--numeric-owner", "--pax-option=delete=atime"),
    "dangerous-modes": gnu_tar("--mode=u=rwxs,g=rxs,o=rxt"),
    "extended-attributes-and-acls": gnu_tar("--xattrs", "--acls", "--selinux", "--format=posix"),
    "npm-like": npm_like,
    "git-archive-tar": git_archive(".tar.gz"),
    "git-archive-zip": git_archive(".zip"),
    "hard-links": hard_links,
    "read-only-directories": read_only,
    "latin-1-names": odd_bytes,
    "odd-times-and-owners": odd_times_and_owners,
    "appended": appended,
    "two-gzip-streams": in_two_streams,
    "python-pax": python_tar(tarfile.PAX_FORMAT),
    "python-gnu": python_tar(tarfile.GNU_FORMAT),
    "python-zip": python_zip,
    "info-zip": info_zip(),
    "info-zip-stored": info_zip("-0"),
    "info-zip-without-extra-fields": info_zip("-X"),
    "info-zip-streamed": streamed_zip,
}  # type: Dict[str, Callable[[Path, Path], Path]]


@pytest.mark.parametrize("shape", sorted(SHAPES))
def test_an_ordinary_shape_is_staged_as_the_system_tool_unpacks_it(app: App, tmp_path: Path, shape: str) -> None:
    place = tmp_path / "place"
    place.mkdir()
    artifact = with_checksum(SHAPES[shape](ordinary_tree(tmp_path / "tree"), place))
    expected = contents(unpack_independently(artifact, tmp_path / "expected"))
    assert len(expected) > 8
    assert_staged(app, artifact, expected)
