"""The artifact: digests, versions, manifests, judging, unpacking, comparing and packing."""

import gzip
import hashlib
import io
import os
import shutil
import socket
import stat
import subprocess
import sys
import tarfile
import threading
import zipfile
from typing import Any, Dict, List, NamedTuple

import pytest

from archives import FORMATS, entry, folder, link, make_zip, pax, tar, zip_info, zstd
from support import deep, load_deploy, needs, wait_until

deploy = load_deploy()


# -- unpacking -----------------------------------------------------------------

def settings(**values):
    return deploy.Settings({tuple(key.split("__")): (str(value), "test") for key, value in values.items()}, [])


def nothing(done_bytes):
    """Watch, and do nothing."""


def opened(path, **values):
    """Open an artifact under the default limits, or others."""
    return deploy.Artifact(path, settings(**values).limits)


class Unpacked(NamedTuple):
    """What came of an artifact."""

    manifest: Any
    sha256: str
    counts: Dict[str, int]
    notes: List[str]


def cost_of(artifact):
    """What an artifact will take on disk: bytes and files, 0 where that is not known beforehand."""
    artifact.identify(settings(artifact__checksum="off"), nothing)
    return artifact.expanded_bytes, artifact.files


class Bench:
    """A directory to unpack into and to keep artifacts in."""

    def __init__(self, path):
        self.path, self.number = str(path), 0

    def artifact(self, data, name="app-1.0.tar"):
        path = os.path.join(self.path, name)
        with open(path, "wb") as stream:
            stream.write(data)
        return path

    def unpack(self, source, expected="", **values):
        path = self.artifact(source) if isinstance(source, bytes) else source
        self.number += 1
        self.release = os.path.join(self.path, f"release{self.number}")
        os.mkdir(self.release, 0o700)
        chosen = settings(**values)
        with deploy.Artifact(path, chosen.limits) as artifact, deploy.Directory(self.release) as destination:
            artifact.sha256 = expected
            manifest, notes = deploy.unpack(artifact, destination, chosen, nothing)
            return Unpacked(manifest, artifact.read_sha256, deploy.count_members(manifest), notes)

    def read(self, name):
        with open(os.path.join(self.release, name), "rb") as stream:
            return stream.read()

    def mode(self, name):
        return stat.S_IMODE(os.lstat(os.path.join(self.release, name)).st_mode)


@pytest.fixture
def bench(tmp_path):
    before = set(threading.enumerate())
    yield Bench(tmp_path)
    for thread in set(threading.enumerate()) - before:
        thread.join(2)  # one that is done may not have ended yet
    assert set(threading.enumerate()) <= before


PLAIN = tar(folder(b"bin/"), entry(b"bin/run", b"#!/bin/sh\n", mode=0o755), entry(b"README", b"hello\n" * 1000), link(b"go", b"bin/run"))


# -- formats -------------------------------------------------------------------

HALF = len(PLAIN) // 2


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_is_told_by_content_and_unpacks(bench, kind):
    data = FORMATS[kind](PLAIN)
    path = bench.artifact(data, "misnamed.bin")
    with opened(path) as artifact:
        assert artifact.format == kind
    unpacked = bench.unpack(path)
    assert unpacked.sha256 == hashlib.sha256(data).hexdigest()
    assert bench.read("README") == b"hello\n" * 1000 and os.readlink(bench.release + "/go") == "bin/run"
    assert bench.mode("bin/run") == 0o755 and bench.mode("README") == 0o644
    assert unpacked.counts == {"files": 2, "directories": 1, "symlinks": 1, "bytes": 6010}


@pytest.mark.parametrize("kind", [kind for kind in FORMATS if kind != "tar"])
def test_streams_one_after_another_are_one_archive(bench, kind):
    data = FORMATS[kind](PLAIN[:HALF]) + FORMATS[kind](PLAIN[HALF:])
    assert bench.unpack(data).sha256 == hashlib.sha256(data).hexdigest()
    assert bench.read("README") == b"hello\n" * 1000


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("keep", [0.3, 0.9])
def test_a_truncated_archive_is_refused(bench, kind, keep):
    data = FORMATS[kind](tar(entry(b"a", os.urandom(20000)), entry(b"b", os.urandom(20000)), end=0))
    with pytest.raises(deploy.ArtifactRefused):
        bench.unpack(data[:int(len(data) * keep)])


@pytest.mark.parametrize("kind", [kind for kind in FORMATS if kind != "tar"])
def test_flipped_bits_are_refused(bench, kind):
    data = bytearray(FORMATS[kind](tar(entry(b"a", os.urandom(5000)))))
    data[len(data) // 2] ^= 0xff
    with pytest.raises(deploy.ArtifactRefused):
        bench.unpack(bytes(data))


def test_what_trails_is_hashed(bench):
    data = PLAIN + bytes(9000) + b"trailing"
    assert bench.unpack(data).sha256 == hashlib.sha256(data).hexdigest()


def test_a_large_file_crosses_many_blocks(bench):
    content = os.urandom(3 << 20) + b"tail"
    bench.unpack(gzip.compress(tar(entry(b"before", b"1"), entry(b"large", content), entry(b"after", b"2")), 1))
    assert bench.read("large") == content and bench.read("after") == b"2"


@pytest.mark.parametrize("data,why", [
    (b"", "is empty"), (b"hello, world", "unknown format"), (bytes(2048), "zeros"), (bytes(2000), "zeros"), (b"MZ" + bytes(600), "format"),
], ids=["empty", "text", "zeros", "zeros that are no blocks", "exe"])
def test_an_unknown_format_is_refused(bench, data, why):
    with pytest.raises(deploy.ArtifactRefused, match=why) as refusal:
        opened(bench.artifact(data))
    assert refusal.value.hint


def test_missing_and_special_files_are_refused(bench):
    with pytest.raises(deploy.ArtifactRefused, match="does not exist"):
        opened(bench.path + "/nothing")
    os.mkfifo(bench.path + "/fifo")
    with pytest.raises(deploy.ArtifactRefused, match="unknown format"):
        opened(bench.path + "/fifo")


def test_a_symlink_to_an_artifact_is_resolved_once(bench):
    path = bench.artifact(PLAIN)
    os.symlink("app-1.0.tar", bench.path + "/latest")
    with opened(bench.path + "/latest") as artifact:
        assert (artifact.path, artifact.name) == (path, "app-1.0.tar")
        assert artifact.identity["size"] == len(PLAIN)


# -- tar -----------------------------------------------------------------------

LONG = b"/".join([b"d" * 60] * 4) + b"/file"
GOOD = {
    "dot-slash": (tar(folder(b"./", 0o700), folder(b"./a/"), entry(b"./a/b", b"x")), {"a/b": b"x"}),
    "git-archive": (tar(pax([(b"comment", b"0" * 40)], b"g"), entry(b"a", b"x")), {"a": b"x"}),
    "pax-path": (tar(pax([(b"path", LONG), (b"mtime", b"1.5")]), entry(b"short", b"x")), {LONG.decode(): b"x"}),
    "gnu-long": (tar(entry(b"././@LongLink", LONG + b"\0", b"L"), entry(b"short", b"x", magic=b"ustar  \0")), {LONG.decode(): b"x"}),
    "prefix": (tar(entry(b"file", b"x", prefix=b"very/long")), {"very/long/file": b"x"}),
    "v7": (tar(entry(b"a", b"x", b"\0", magic=b"\0" * 8)), {"a": b"x"}),
    "v7-directory": (tar(entry(b"d/", b"", b"\0"), entry(b"d/a", b"x")), {"d/a": b"x"}),
    "hard-link": (tar(entry(b"a", b"x"), entry(b"d/b", b"", b"1", b"a")), {"a": b"x", "d/b": b"x"}),
    "utf-8": (tar(entry("é/ü".encode(), b"x")), {"é/ü": b"x"}),
    "latin-1": (tar(entry(b"\xe9", b"x")), {os.fsdecode(b"\xe9"): b"x"}),
    "base-256": (tar(entry(b"a", b"x", size_field=b"\x80" + bytes(10) + b"\x01")), {"a": b"x"}),
    "directory-twice": (tar(folder(b"d/"), entry(b"d/a", b"x"), folder(b"d/")), {"d/a": b"x"}),
    "one-zero-block": (tar(entry(b"a", b"x"), end=512), {"a": b"x"}),
    "empty-file": (tar(entry(b"a", b"")), {"a": b""}),
}


@pytest.mark.parametrize("case", GOOD)
def test_ordinary_tars_pass(bench, case):
    data, files = GOOD[case]
    unpacked = bench.unpack(data)
    assert {os.fsdecode(name) for name in unpacked.manifest if unpacked.manifest[name].kind == "file"} == set(files)
    for name, content in files.items():
        assert bench.read(name) == content


@pytest.mark.parametrize("values,why", [
    (dict(limits__max_files=3), "max_files"), (dict(limits__max_file=999), "max_file"),
    (dict(limits__max_expanded=3000), "max_expanded"), (dict(limits__max_artifact=100), "max_artifact"),
])
def test_limits_are_kept(bench, values, why):
    with pytest.raises(deploy.ArtifactRefused, match=why):
        bench.unpack(gzip.compress(tar(*[entry(b"f%d" % number, b"x" * 1000) for number in range(5)])), **values)


FIVE = tar(*[entry(b"f%d" % number, b"x" * 1000) for number in range(5)])


def test_reading_that_is_given_up_leaves_no_thread_behind(bench):
    """The fixture looks for the thread, which has more to hand over than the queue holds."""
    with opened(bench.artifact(tar(entry(b"large", bytes(8 << 20))))) as artifact:
        blocks = deploy.pump(artifact, (1 << 30, "max_expanded"), nothing)
        next(blocks)
        wait_until(lambda: artifact.read_bytes > deploy.QUEUE_BLOCKS * deploy.BLOCK_BYTES, what="a queue that is full")
        blocks.close()


@pytest.mark.parametrize("limit, met", [("max_files", 5), ("max_file", 1000), ("max_artifact", len(FIVE))])
def test_a_limit_may_be_met_and_not_passed(bench, limit, met):
    assert bench.unpack(FIVE, **{f"limits__{limit}": met}).counts["files"] == 5
    with pytest.raises(deploy.ArtifactRefused, match=f" that .limits. {limit} allows"):
        bench.unpack(FIVE, **{f"limits__{limit}": met - 1})


def test_symlinks_are_followed_for_so_many_steps_and_no_further(bench, monkeypatch):
    """Each may be short enough and lead straight inside; all of them together cost time."""
    monkeypatch.setattr(deploy, "MAX_LINK_STEPS", 1000)
    fifty_steps = [link(b"l%d" % number, b"./" * 49 + b"f") for number in range(21)]
    assert bench.unpack(tar(entry(b"f", b"x"), *fifty_steps[:20])).counts["symlinks"] == 20
    with pytest.raises(deploy.ArtifactRefused, match=r"'l\d+': the archive's symlinks are too many and too long to follow"):
        bench.unpack(tar(entry(b"f", b"x"), *fifty_steps))


def test_an_artifact_that_is_cut_off_while_it_is_read_is_told(bench):
    path = bench.artifact(FIVE)
    with opened(path) as artifact:
        os.truncate(path, len(FIVE) - 1)
        with pytest.raises(deploy.ArtifactRefused, match="became shorter while it was read"):
            artifact.hash(settings(), nothing)


def test_a_bomb_is_refused_by_its_ratio(bench, monkeypatch):
    monkeypatch.setattr(deploy, "RATIO_FLOOR_BYTES", 1 << 20)
    with pytest.raises(deploy.ArtifactRefused, match="max_ratio"):
        bench.unpack(gzip.compress(tar(entry(b"a", bytes(30 << 20)))))
    assert bench.unpack(gzip.compress(tar(entry(b"a", bytes(30 << 20)))), limits__max_ratio=0).counts["files"] == 1


def test_modes_are_kept_but_for_the_dangerous_bits(bench):
    unpacked = bench.unpack(tar(folder(b"d/", 0o7777), entry(b"d/s", b"x", mode=0o6777), folder(b"ro/", 0o555),
                                entry(b"ro/f", b"x", mode=0o444), folder(b"closed/", 0), entry(b"closed/f", b"x", mode=0)))
    assert {os.fsdecode(name): member.mode for name, member in unpacked.manifest.items()} == {
        "d": 0o755, "d/s": 0o755, "ro": 0o555, "ro/f": 0o444, "closed": 0o500, "closed/f": 0o400}
    assert [bench.mode(name) for name in ("d/s", "ro/f", "closed/f")] == [0o755, 0o444, 0o400]


def test_modes_do_not_depend_on_the_umask(bench):
    before = os.umask(0o077)
    try:
        bench.unpack(PLAIN)
        assert os.umask(0o077) == 0o077
    finally:
        os.umask(before)
    assert bench.mode("README") == 0o644 and bench.mode("bin") == 0o755


def test_hard_links_become_independent_copies(bench):
    bench.unpack(tar(entry(b"a", b"x" * 2000000, mode=0o755), entry(b"b", b"", b"1", b"./a")))
    assert bench.read("b") == b"x" * 2000000 and os.lstat(bench.release + "/a").st_nlink == 1 and bench.mode("b") == 0o755


@pytest.mark.parametrize("entries", [
    [link(b"a", b"b"), entry(b"b", b"x")], [folder(b"d/"), link(b"d/up", b"..")], [link(b"log", b"missing/later")],
    [entry(b"d/e/f", b"x"), link(b"s", b"d/e"), link(b"t", b"s/../e/f")],
], ids=["forward", "to-top", "dangling", "through"])
def test_symlinks_that_stay_inside_pass_unless_refused_by_setting(bench, entries):
    assert bench.unpack(tar(*entries)).counts["symlinks"]
    with pytest.raises(deploy.ArtifactRefused, match="symlinks = refuse"):
        bench.unpack(tar(*entries), artifact__symlinks="refuse")


def test_strip_components(bench):
    data = tar(folder(b"./pkg/"), entry(b"./pkg/a", b"x"), link(b"pkg/l", b"a"), entry(b"pkg/h", b"", b"1", b"./pkg/a"))
    assert bench.unpack(data).notes == ["everything lies under 'pkg': strip_components = 1 would drop it"]
    unpacked = bench.unpack(data, artifact__strip_components=1)
    assert sorted(os.listdir(bench.release)) == ["a", "h", "l"] and unpacked.notes == []
    with pytest.raises(deploy.ArtifactRefused, match="no name"):
        bench.unpack(data, artifact__strip_components=2)
    with pytest.raises(deploy.ArtifactRefused, match="climbs"):
        bench.unpack(tar(entry(b"../a", b"x")), artifact__strip_components=1)


def test_names_that_collide_elsewhere_are_noted(bench):
    unpacked = bench.unpack(tar(entry(b"readme", b"x"), entry(b"README", b"x"), entry("e\u0301".encode(), b"x"),
                                entry("\u00e9".encode(), b"x"), entry(b"Single", b"x")))
    assert len(unpacked.notes) == 1 and all(name in unpacked.notes[0] for name in ("README", "'e\u0301'"))


def test_a_wrong_digest_is_refused_and_says_both(bench):
    for data in (PLAIN, gzip.compress(PLAIN)[:-9]):
        with pytest.raises(deploy.ArtifactRefused, match="checksum mismatch") as refusal:
            bench.unpack(data, "a" * 64)
        assert hashlib.sha256(data).hexdigest() in refusal.value.message and "a" * 64 in refusal.value.message
    bench.unpack(PLAIN, hashlib.sha256(PLAIN).hexdigest())


def test_a_full_disk_is_not_swallowed(bench, monkeypatch):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device")
    real = os.write
    monkeypatch.setattr(deploy.os, "write", full)
    try:
        os.mkdir(bench.path + "/r")
        with deploy.Directory(bench.path + "/r") as place, opened(bench.artifact(PLAIN)) as artifact:
            with pytest.raises(OSError) as failure:
                deploy.unpack(artifact, place, settings(), nothing)
    finally:
        monkeypatch.setattr(deploy.os, "write", real)
    assert failure.value.errno == 28


def test_stopping_early_leaves_no_thread_and_no_child(bench):
    data = zstd(tar(entry(b"a/../b", b"x"), *[entry(b"f%d" % n, os.urandom(1 << 20)) for n in range(30)]))
    with pytest.raises(deploy.ArtifactRefused):
        bench.unpack(data)
    children = subprocess.run(["ps", "--ppid", str(os.getpid()), "-o", "comm="], stdout=subprocess.PIPE).stdout
    assert b"zstd" not in children


@deep
def test_memory_is_64_mib_and_half_a_kilobyte_for_each_member(bench):
    script = ("import sys; sys.path.insert(0, sys.argv[1]); import deploy\n"
              "d = deploy.Directory(sys.argv[3]); s = deploy.Settings({}, []); a = deploy.Artifact(sys.argv[2], s.limits)\n"
              "u = deploy.unpack(a, d, s, lambda n: None)\n"
              "print([line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')][0])")
    path = bench.path + "/many.tar"
    with open(path, "wb") as stream:
        for number in range(50000):
            stream.write(entry(b"node_modules/some-package-%d/lib/internal/file%d.js" % (number // 50, number), b"x"))
        stream.write(bytes(1024))
    os.mkdir(bench.path + "/r")
    done = subprocess.run([sys.executable, "-c", script, os.path.dirname(deploy.__file__), path, bench.path + "/r"],
                          stdout=subprocess.PIPE, check=True)
    assert int(done.stdout) < (64 << 10) + 50000 // 2


@pytest.mark.parametrize("seed", range(60))
def test_damaged_bytes_never_raise_anything_but_a_refusal(bench, seed):
    import random
    chance = random.Random(seed)
    kind = chance.choice(["tar", "tar", "zip", "zip", "tar.gz", "tar.xz", "tar.bz2"])
    data = bytearray(make_zip(("a/b", b"x" * 999), ("c", b"y")) if kind == "zip" else FORMATS[kind](
        tar(pax([(b"path", b"p/q")]), entry(b"a", b"x" * 700), link(b"l", b"a"))))
    for _ in range(chance.randrange(1, 9)):
        data[chance.randrange(len(data))] = chance.randrange(256)
    try:
        with opened(bench.artifact(bytes(data))) as artifact:
            cost_of(artifact)
        bench.unpack(bytes(data))
    except deploy.ArtifactRefused as refusal:
        assert refusal.message


# -- zip -----------------------------------------------------------------------

def test_zip_keeps_executables_symlinks_and_names(bench):
    data = make_zip(("plain", b"x" * 100000), (zip_info("bin/run", 0o100755), b"#!"), (zip_info("l", 0o120777), b"bin/run"),
                    (zip_info("d/", 0o40755), b""), ("é", b"u"), (zip_info("w", 0, 0), b"w"))
    unpacked = bench.unpack(data)
    assert unpacked.sha256 == hashlib.sha256(data).hexdigest()
    assert bench.mode("bin/run") == 0o755 and os.readlink(bench.release + "/l") == "bin/run" and os.path.isdir(bench.release + "/d")
    assert bench.read("é") == b"u" and bench.read("plain") == b"x" * 100000 and bench.mode("w") == 0o644


class Unseekable(io.RawIOBase):
    """Makes zipfile write data descriptors."""

    def __init__(self):
        self.data = bytearray()

    def writable(self):
        return True

    def write(self, data):
        self.data += data
        return len(data)


def streamed_zip(force64):
    target = Unseekable()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in (("a", b"x" * 5000), ("empty", b""), ("b", b"y")):
            with archive.open(zipfile.ZipInfo(name), "w", force_zip64=force64) as member:
                member.write(data)
    return bytes(target.data)


@pytest.mark.parametrize("force64", [False, True])
def test_streamed_zips_with_data_descriptors_pass(bench, force64):
    bench.unpack(streamed_zip(force64))
    assert bench.read("a") == b"x" * 5000 and bench.read("b") == b"y" and bench.read("empty") == b""


def test_zip_written_by_infozip_passes(bench):
    if not shutil.which("zip"):
        pytest.skip("zip is not installed")
    os.makedirs(bench.path + "/t/d")
    with open(bench.path + "/t/d/a", "wb") as stream:
        stream.write(b"x" * 999)
    subprocess.run(["zip", "-qry", "../z.zip", "."], cwd=bench.path + "/t", check=True)
    bench.unpack(bench.path + "/z.zip")
    assert bench.read("d/a") == b"x" * 999


@deep
def test_zip64_end_records_are_read(bench):
    data = make_zip(*[("f%05d" % number, b"") for number in range(66000)])
    assert bench.unpack(data).counts["files"] == 66000


# -- directories ---------------------------------------------------------------

@pytest.fixture
def tree(bench):
    root = bench.path + "/myapp-1.2"
    os.makedirs(root + "/bin")
    for name, data, mode in (("bin/run", b"#!", 0o775), ("data", b"x" * 700000, 0o664)):
        with open(os.path.join(root, name), "wb") as stream:
            stream.write(data)
        os.chmod(os.path.join(root, name), mode)
    os.symlink("bin/run", root + "/go")
    return root


def test_a_directory_is_copied_and_has_a_tree_digest(bench, tree):
    unpacked = bench.unpack(tree)
    assert bench.mode("bin/run") == 0o755 and bench.mode("data") == 0o644 and os.readlink(bench.release + "/go") == "bin/run"
    with opened(tree + "/") as artifact:
        assert artifact.hash(settings(), nothing) == unpacked.sha256 == deploy.tree_digest(unpacked.manifest)
        assert cost_of(artifact) == (700002, 4)
    with deploy.Directory(bench.release) as release:
        assert deploy.tree_digest(deploy.scan_tree(release, nothing)) == unpacked.sha256


def test_the_tree_digest_is_that_of_what_is_left_after_stripping(bench):
    os.makedirs(bench.path + "/t/pkg")
    with open(bench.path + "/t/pkg/a", "w") as stream:
        stream.write("x")
    stripped = bench.unpack(bench.path + "/t", artifact__strip_components=1)
    assert os.listdir(bench.release) == ["a"]
    with opened(bench.path + "/t/pkg") as artifact:
        assert artifact.hash(settings(), nothing) == stripped.sha256


def test_sockets_and_fifos_in_a_directory_are_refused(bench, tree):
    os.mkfifo(tree + "/pipe")
    with pytest.raises(deploy.ArtifactRefused, match="FIFO"):
        bench.unpack(tree)
    os.unlink(tree + "/pipe")
    with socket.socket(socket.AF_UNIX) as listener:
        before = os.getcwd()
        os.chdir(tree)
        try:
            listener.bind("sock")
        finally:
            os.chdir(before)
        with pytest.raises(deploy.ArtifactRefused, match="socket"):
            bench.unpack(tree)


def test_a_directory_that_holds_the_release_is_refused(bench, tree):
    with pytest.raises(deploy.ArtifactRefused, match="inside the artifact"):
        bench.unpack(bench.path)


def test_a_directory_that_changes_after_it_was_identified_is_refused(bench, tree):
    with opened(tree) as artifact:
        artifact.identify(settings(), nothing)
        with open(tree + "/data", "ab") as stream:
            stream.write(b"more")
        os.mkdir(bench.path + "/place")
        with deploy.Directory(bench.path + "/place") as place, pytest.raises(deploy.ArtifactRefused, match="mismatch"):
            deploy.unpack(artifact, place, settings(), nothing)


# -- digests -------------------------------------------------------------------

HEX, OTHER = "a1" * 32, "b2" * 32
SIDECARS = {
    "text": f"{HEX}  app.tar\n", "binary": f"{HEX} *app.tar\n", "bsd": f"SHA256 (app.tar) = {HEX}\n", "openssl": f"SHA2-256(app.tar)= {HEX}\n",
    "crlf": f"{HEX}  app.tar\r\n", "upper": f"{HEX.upper()}  app.tar\n", "comment": f"# made by CI\n\n{HEX}  app.tar\n",
    "bare": f"{HEX}\n", "directory": f"{HEX}  dist/app.tar\n", "dot": f"{HEX}  ./app.tar\n", "same-twice": f"{HEX}  app.tar\n" * 2,
    "others": f"{OTHER}  other.tar\n{HEX}  app.tar\n", "no-newline": f"{HEX}  app.tar",
}


def digest_for(bench, policy="required", given="", name="app.tar", **files):
    path = bench.artifact(PLAIN, name)
    for suffix, text in files.items():
        target = bench.path + "/SHA256SUMS" if suffix == "sums" else path + ".sha256"
        with open(target, "wb") as stream:
            stream.write(text.encode() if isinstance(text, str) else text)
    with opened(path) as artifact:
        artifact.identify(settings(artifact__checksum=policy), nothing, given)
        return artifact.sha256, artifact.sha256_source


@pytest.mark.parametrize("case", SIDECARS)
def test_every_form_of_sidecar_is_read(bench, case):
    assert digest_for(bench, own=SIDECARS[case]) == (HEX, "app.tar.sha256")


@pytest.mark.parametrize("case", [case for case in SIDECARS if case != "bare"])
def test_every_form_is_read_in_sha256sums(bench, case):
    assert digest_for(bench, sums=SIDECARS[case]) == (HEX, "SHA256SUMS")


@pytest.mark.parametrize("name", ["with\\backslash", "with\nnewline", "with space", "*star"])
def test_real_sha256sum_writes_what_we_read(bench, name):
    path = bench.artifact(PLAIN, name)
    for flags in ([], ["--tag"], ["-b"]):
        made = subprocess.run(["sha256sum"] + flags + [name], cwd=bench.path, stdout=subprocess.PIPE, check=True).stdout
        assert digest_for(bench, name=name, own=made)[0] == hashlib.sha256(PLAIN).hexdigest(), path


@pytest.mark.parametrize("text,why", [
    (f"{OTHER}  other.tar\n", "no entry"), (f"{HEX}  app.tar\n{OTHER}  app.tar\n", "ambiguous"), ("garbage\n", "no entry"), ("", "no entry"),
    (f"{HEX}\n{OTHER}\n", "ambiguous"), (f"{HEX}  a/app.tar\n{OTHER}  b/app.tar\n", "ambiguous"), ("#" * (2 << 20), "EFBIG"),
], ids=["other-name", "ambiguous", "garbage", "empty", "two-bare", "two-directories", "too-large"])
@pytest.mark.parametrize("policy", ["required", "if-present"])
def test_a_sidecar_that_does_not_help_is_refused(bench, text, why, policy):
    with pytest.raises(deploy.ArtifactRefused, match=why) as refusal:
        digest_for(bench, policy, own=text)
    assert refusal.value.hint


def test_policies(bench):
    with pytest.raises(deploy.ArtifactRefused) as refusal:
        digest_for(bench)
    assert f"cd {bench.path} && sha256sum app.tar > app.tar.sha256" in refusal.value.hint
    computed = hashlib.sha256(PLAIN).hexdigest(), "computed"
    assert digest_for(bench, "if-present") == computed
    assert digest_for(bench, "if-present", sums=f"{OTHER}  other\n") == computed
    with pytest.raises(deploy.ArtifactRefused):
        digest_for(bench, "required", sums=f"{OTHER}  other\n")
    assert digest_for(bench, "off", own="garbage") == computed
    assert digest_for(bench, "off", HEX.upper(), own="garbage") == (HEX, "--sha256")


def test_a_directory_needs_no_digest_but_honours_one(bench, tree):
    with opened(tree) as artifact:
        artifact.identify(settings(), nothing)
        assert (artifact.sha256, artifact.sha256_source) == (artifact.hash(settings(), nothing), "computed")
        with open(tree + ".sha256", "w") as stream:
            stream.write(HEX)
    with opened(tree) as artifact:
        artifact.identify(settings(), nothing)
        assert artifact.sha256 == HEX


def test_the_sidecar_itself_may_be_no_fifo(bench):
    os.mkfifo(bench.path + "/app.tar.sha256")
    with pytest.raises(deploy.ArtifactRefused, match="not a regular file"):
        digest_for(bench)


# -- versions ------------------------------------------------------------------

@pytest.mark.parametrize("name,pattern,version", [
    ("myapp-1.4.2.tar.gz", "", "1.4.2"), ("myapp_1.4.2", "", "1.4.2"), ("requests-2.31.0-py3-none-any.whl", "", "2.31.0"),
    ("foo-1.0.0-rc.1.tgz", "", "1.0.0-rc.1"), ("v1.2.3.tar.gz", "", "1.2.3"), ("1.2.3.zip", "", "1.2.3"), ("app.tar.gz", "", "f" * 12),
    ("node-v20.1.0-linux-x64.tar.xz", "", "20.1.0"), ("tool_1.4.2_linux_amd64.tar.gz", "", "1.4.2"), ("hello_2.10.orig.tar.gz", "", "2.10"),
    ("app-20240131.tar.zst", "", "20240131"), ("app-2024-01-31.tar.bz2", "", "2024-01-31"), ("app-main-3f2a1b9.tar.gz", "", "f" * 12),
    ("python3-app-2.0.tar", "", "2.0"), ("app2.tar", "", "f" * 12), ("app-1.0 beta.tar", "", "f" * 12), ("app-1.0+git~1.tar", "", "1.0+git~1"),
    ("myapp_7.tar.gz", "myapp_@v.tar.gz", "7"), ("myapp_1.0-rc.tar.gz", "myapp_@v.tar.gz", "1.0-rc"),
])
def test_the_version_is_what_an_operator_expects(name, pattern, version):
    assert deploy.find_version(name, pattern, "f" * 64) == version


def test_a_name_that_does_not_fit_the_pattern_is_refused():
    for name in ("other.tar.gz", "myapp_.tar.gz", "myapp_a b.tar.gz"):
        with pytest.raises(deploy.ArtifactRefused):
            deploy.find_version(name, "myapp_@v.tar.gz", "f" * 64)


@pytest.mark.parametrize("text", ["", ".1", "-1", "1/2", "a b", "1\n", "x" * 101, "é"])
def test_a_bad_version_is_a_usage_error(text):
    with pytest.raises(ValueError):
        deploy.read_value("version", text)
    assert deploy.read_value("version", "1.0+a~b_c-d") == "1.0+a~b_c-d"


# -- the manifest --------------------------------------------------------------

@pytest.fixture
def odd_release(bench):
    root = bench.path + "/odd"
    os.makedirs(root + "/sub/empty")
    for name in (b"plain", b"new\nline", b"back\\slash", b"cr\rx", b"#hash", b"*star", b" space", b"-dash", b"\xff\xfe", b"sub/x", b"lang\xc3\xa9"):
        with open(os.path.join(os.fsencode(root), name), "wb") as stream:
            stream.write(name)
    os.chmod(root + "/plain", 0o755)
    os.symlink("plain", root + "/link")
    return root


@pytest.mark.parametrize("flags", [[], ["--strict"], ["--quiet", "--strict", "--warn"]])
def test_real_sha256sum_accepts_the_manifest(odd_release, flags):
    with deploy.Directory(odd_release) as directory:
        manifest = deploy.scan_tree(directory, nothing)
    done = subprocess.run(["sha256sum", "-c"] + flags + ["-"], cwd=odd_release, input=b"".join(deploy.digest_lines(manifest)),
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (0, b"")
    if not flags:
        assert done.stdout.count(b": OK") == 11


def test_the_manifest_reads_back(odd_release):
    with deploy.Directory(odd_release) as directory:
        manifest = deploy.scan_tree(directory, nothing)
        texts = list(deploy.digest_lines(manifest)), list(deploy.tree_lines(manifest))
        again = deploy.read_manifest(*texts)
        assert (list(deploy.digest_lines(again)), list(deploy.tree_lines(again))) == texts
        assert deploy.tree_digest(again) == deploy.tree_digest(manifest) == hashlib.sha256(b"".join(texts[0] + texts[1])).hexdigest()
        assert deploy.differences(again, deploy.scan_tree(directory, nothing, known=again)) == {"changed": {}, "missing": {}, "added": {}}
    assert again[b"plain"] == deploy.Member(b"plain", "file", 0o755, 0, None, hashlib.sha256(b"plain").digest())
    assert [name for name in again if again[name].kind == "symlink"] == [b"link"] and again[b"link"].content == b"plain"


def test_the_same_tree_gives_the_same_manifest():
    first, second = {}, {}
    for manifest, order in ((first, 1), (second, -1)):
        for name in [b"b", b"a/x", b"a.y"][::order]:
            deploy.add_member(manifest, deploy.Member(name, "file", 0o644, 1, None, hashlib.sha256(name).digest()))
    assert list(deploy.digest_lines(first)) == list(deploy.digest_lines(second))
    assert deploy.count_members(first) == {"files": 3, "directories": 1, "symlinks": 0, "bytes": 3}


def test_what_is_put_in_its_place_forgets_all_below():
    manifest = {}
    for name in (b"log/a", b"log/b/c", b"logs", b"x"):
        deploy.add_member(manifest, deploy.Member(name, "file", 0o644))
    deploy.add_member(manifest, deploy.Member(b"log", "symlink", 0o777, content=b"../../shared/log"))
    assert [(name, manifest[name].kind) for name in sorted(manifest)] == [(b"log", "symlink"), (b"logs", "file"), (b"x", "file")]


@pytest.mark.parametrize("data, tree", [
    (b"garbage\n", b""), (b"a" * 64, b""), (b"xyz  a\n", b""), (b"a" * 64 + b"  \n", b""), (b"g" * 64 + b"  a\n", b""),
    (b"\\" + b"a" * 64 + b"  a\\qb\n", b""), (b"", b"nonsense\n"), (b"", b'["odd", "a", "b"]\n'),
    (b"", b'["mode", "absent", "0755"]\n'), (b"", b'["directory", "a", 7]\n'), (b"", b"[1, 2, 3]\n"),
    (b"", b'["directory", "a", "0755"]')])
def test_a_malformed_manifest_is_a_value_error(data, tree):
    with pytest.raises(ValueError):
        deploy.read_manifest(io.BytesIO(data), io.BytesIO(tree))


@pytest.mark.parametrize("reader", [["sha256sum", "-c"], ["busybox", "sha256sum", "-c"]], ids=["coreutils", "busybox"])
def test_a_manifest_is_read_by(reader, bench):
    needs(reader[0])
    root = bench.path + "/tree"
    os.makedirs(root + "/sub/empty")
    for name in ("plain", "sub/with space", "\u00e9"):
        with open(os.path.join(root, name), "w") as stream:
            stream.write(name)
    with deploy.Directory(root) as directory:
        manifest = deploy.scan_tree(directory, nothing)
    with open(bench.path + "/manifest", "wb") as stream:
        stream.writelines(deploy.digest_lines(manifest))
    done = subprocess.run(reader + [bench.path + "/manifest"], cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (0, b"") and done.stdout.count(b": OK") == 3


def test_every_difference_is_named(bench, monkeypatch):
    unpacked = bench.unpack(tar(entry(b"same", b"x"), entry(b"edited", b"x"), entry(b"grown", b"x"), entry(b"bin/run", b"x", mode=0o755),
                                entry(b"gone", b"x"), link(b"l", b"same"), entry(b"was-file", b"x"), folder(b"d/")))
    monkeypatch.chdir(bench.release)
    for name, data in (("edited", "y"), ("grown", "xx"), ("new", "n")):
        with open(name, "w") as stream:
            stream.write(data)
    os.chmod("bin/run", 0o644)
    os.chmod("d", 0o700)
    os.unlink("gone"), os.unlink("l"), os.symlink("edited", "l"), os.unlink("was-file"), os.mkdir("was-file"), os.mkfifo("fifo")
    with deploy.Directory(bench.release) as release:
        found = deploy.differences(unpacked.manifest, deploy.scan_tree(release, nothing, known=unpacked.manifest))
    assert found == {"changed": {"bin/run": "has mode 0644, was 0755", "d": "has mode 0700, was 0755", "edited": "", "grown": "",
                                 "l": "led to same", "was-file": "is a directory, was a file"},
                     "missing": {"gone": ""}, "added": {"fifo": "", "new": ""}}
    assert list(found["changed"]) == ["bin/run", "d", "edited", "grown", "l", "was-file"]


# -- members, cost, pack -------------------------------------------------------

@pytest.mark.parametrize("kind", ["tar", "tar.gz", "tar.bz2"])
def test_the_cost_is_what_gzip_says_and_else_unknown(bench, kind):
    data = tar(entry(b"a", os.urandom(300000)))
    with opened(bench.artifact(FORMATS[kind](data))) as artifact:
        assert cost_of(artifact) == (len(data) if kind == "tar.gz" else 0, 0)


def test_the_cost_of_a_zip_is_exact(bench):
    with opened(bench.artifact(make_zip(("a", b"x" * 5000), ("b", b"y")))) as artifact:
        assert cost_of(artifact) == (5001, 2)


def test_packing_is_reproducible_and_deploys(bench, odd_release):
    for name in os.listdir(os.fsencode(odd_release)):
        if any(byte < 32 or byte == 92 for byte in name):
            os.unlink(os.path.join(os.fsencode(odd_release), name))
    deep = odd_release + "/" + "/".join(["d" * 60] * 4)
    os.makedirs(deep)
    with open(deep + "/long", "w") as stream:
        stream.write("x")
    os.symlink("/".join(["d" * 60] * 4) + "/long", odd_release + "/longlink")
    targets = [bench.path + "/one-1.0.tar.gz", odd_release + "/two-1.0.tar.gz"]
    results = [deploy.pack(odd_release, target, settings(), nothing) for target in targets]
    os.utime(odd_release + "/plain", (1, 1))
    os.umask(0o077)
    results.append(deploy.pack(odd_release, targets[1], settings(), nothing))
    os.umask(0o022)
    contents = []
    for target in targets:
        with open(target, "rb") as stream:
            contents.append(stream.read())
    assert contents[0] == contents[1] and results[0] == results[1] == results[2]
    assert (results[0][0]["sha256"], results[0][0]["size"]) == (hashlib.sha256(contents[0]).hexdigest(), len(contents[0]))
    assert subprocess.run(["sha256sum", "-c", "--strict", "--quiet", "one-1.0.tar.gz.sha256"], cwd=bench.path).returncode == 0
    os.unlink(targets[1]), os.unlink(targets[1] + ".sha256")
    unpacked = bench.unpack(targets[0])
    with deploy.Directory(odd_release) as source:
        assert deploy.differences(unpacked.manifest, deploy.scan_tree(source, nothing, known=unpacked.manifest)) == {"changed": {}, "missing": {}, "added": {}}
    listing = subprocess.run(["tar", "-tvzf", targets[0]], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert listing.returncode == 0 and listing.stderr == b"" and b"root/root" in listing.stdout
    with tarfile.open(targets[0]) as archive:
        assert {member.mtime for member in archive} == {315532800}


def test_pack_refuses_what_could_not_be_deployed(bench, tree):
    os.symlink("/etc", tree + "/out")
    with pytest.raises(deploy.ArtifactRefused, match="leaves"):
        deploy.pack(tree, bench.path + "/x.tar.gz", settings(), nothing)
    assert not [name for name in os.listdir(bench.path) if "x.tar.gz" in name]


def test_a_zip_directory_that_changes_after_it_was_judged_is_not_read_again(bench):
    data = make_zip((zip_info("b", 0o100644), b"1"), (zip_info("a", 0o100644), b"2"))
    path = bench.artifact(data, "app.zip")
    with opened(path) as artifact:
        with open(path, "r+b") as stream:
            stream.seek(data.index(b"PK\1\2") + 38)
            stream.write((0o100755 << 16).to_bytes(4, "little"))
        place = os.path.join(bench.path, "place")
        os.mkdir(place)
        with deploy.Directory(place) as destination:
            manifest, _ = deploy.unpack(artifact, destination, settings(), nothing)
        assert manifest[b"b"].mode == 0o644 and artifact.read_sha256 == hashlib.sha256(data).hexdigest()


MANY = {f"d{number % 7}/f{number}": str(number) for number in range(2010)}


@pytest.fixture
def many(tmp_path):
    for name, text in MANY.items():
        path = tmp_path / "many" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    with deploy.Directory(str(tmp_path / "many")) as directory:
        yield directory, deploy.scan_tree(directory, nothing)


def test_every_difference_in_a_large_tree_is_named(many, tmp_path):
    directory, manifest = many
    top = tmp_path / "many"
    assert deploy.differences(manifest, deploy.scan_tree(directory, nothing, known=manifest)) == {"changed": {}, "missing": {}, "added": {}}
    changed = sorted(MANY)[::300]
    for name in changed:
        with open(os.path.join(str(top), name), "a") as stream:
            stream.write("x")
    os.unlink(os.path.join(str(top), "d0/f7"))
    os.mkdir(os.path.join(str(top), "d0/f7"))
    for name in ("d0/f7/x", "added"):
        with open(os.path.join(str(top), name), "w"):
            pass
    os.unlink(os.path.join(str(top), "d1/f8"))
    found = deploy.differences(manifest, deploy.scan_tree(directory, nothing, known=manifest))
    assert set(found["changed"]) == set(changed) - {"d1/f8"} | {"d0/f7"} and list(found["missing"]) == ["d1/f8"]
    assert list(found["added"]) == ["added", "d0/f7/x"] and found["changed"]["d0/f7"] == "is a directory, was a file"
