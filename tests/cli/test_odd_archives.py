"""Archives that real tools write and nobody expects: what is meant is taken, and what is odd is told."""

import bz2
import compileall
import gzip
import hashlib
import io
import lzma
import os
import struct
import subprocess
import tarfile
import zipfile
import zlib
from pathlib import Path
from typing import Any, Dict, List, Tuple

import pytest

from archives import RawEntry, entry, folder, hard_link, link, pax, raw_zip, tar, zstd
from support import App, make_tree, needs, run_deploy

SECONDS = 1700000000


def stage(app: App, data: bytes, *options: str, name: str = "app-1.0.bin", check: int = 0) -> Any:
    """Stage an archive with its own digest; returns what --json says."""
    path = app.directory / name
    path.write_bytes(data)
    return app.run("stage", path, "--sha256", hashlib.sha256(data).hexdigest(), *options, check=check).data


def staged(app: App, data: bytes, *options: str, name: str = "app-1.0.bin") -> Tuple[Path, List[str]]:
    """Stage an archive that passes; returns the release, and the warnings."""
    found = stage(app, data, *options, name=name)
    return app.root / "releases" / found["release"], found["warnings"]


def refused(app: App, data: bytes, *options: str) -> str:
    """Stage an archive that is refused; returns message and hint."""
    error = stage(app, data, *options, check=4)["error"]
    return f"{error['message']}\nhint: {error['hint']}"


# -- times -----------------------------------------------------------------------

def timed_tar(**fields: Any) -> bytes:
    """One file with a time."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=fields.pop("form", tarfile.PAX_FORMAT)) as archive:
        info = tarfile.TarInfo("f")
        info.size, info.mtime = 1, fields.pop("mtime")
        archive.addfile(info, io.BytesIO(b"x"))
    return stream.getvalue()


@pytest.mark.parametrize("data, time_ns", [
    (timed_tar(mtime=SECONDS, form=tarfile.USTAR_FORMAT), SECONDS * 10 ** 9),
    (timed_tar(mtime=SECONDS + 0.25), SECONDS * 10 ** 9 + 250000000),
    (tar(pax([(b"mtime", b"1700000000.123456789")]), entry(b"f", b"x")), 1700000000123456789),
    (tar(pax([(b"mtime", b"-1.5")]), entry(b"f", b"x")), -1500000000),
    (timed_tar(mtime=-1, form=tarfile.GNU_FORMAT), -10 ** 9),
    (timed_tar(mtime=9 << 30, form=tarfile.GNU_FORMAT), (9 << 30) * 10 ** 9),
], ids=["ustar", "pax", "pax nanoseconds", "pax before 1970", "gnu before 1970", "gnu far ahead"])
def test_files_keep_the_time_that_a_tar_gives_them(app: App, data: bytes, time_ns: int) -> None:
    release, _ = staged(app, data)
    assert (release / "f").stat().st_mtime_ns == time_ns


def test_files_keep_the_time_that_a_zip_gives_them(app: App) -> None:
    extended = struct.pack("<HHBi", 0x5455, 5, 1, SECONDS)
    dos = {"date": (2023 - 1980) << 9 | 11 << 5 | 14, "time": 22 << 11 | 13 << 5 | 10}
    release, _ = staged(app, raw_zip([
        RawEntry(b"dos", b"x", **dos), RawEntry(b"unix", b"x", **dos).but("central", extra=extended),
        RawEntry(b"none", b"x", date=0)]))
    assert (release / "dos").stat().st_mtime == SECONDS  # 2023-11-14 22:13:20
    assert (release / "unix").stat().st_mtime == SECONDS
    assert (release / "none").stat().st_mtime > SECONDS


def test_a_directory_keeps_its_files_times_and_is_the_same_artifact_whatever_they_are(app: App) -> None:
    top = make_tree(app.directory / "tree", {"f": "x", "d/g": "y"})
    os.utime(str(top / "f"), ns=(SECONDS, SECONDS * 10 ** 9 + 5))
    app.run("deploy", top, "--release-version", "1", check=0)
    assert (app.root / "current" / "f").stat().st_mtime_ns == SECONDS * 10 ** 9 + 5
    os.utime(str(top / "f"), (SECONDS, SECONDS))
    assert app.run("deploy", top, check=0).data["changed"] is False


def bytecode(app: App) -> Any:
    """What a compiler would have changed; not when it was read last."""
    found = next((app.root / "current" / "__pycache__").iterdir()).stat()
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def test_bytecode_stays_valid_so_that_a_release_can_be_rolled_back_to(app: App) -> None:
    top = make_tree(app.directory / "tree", {"m.py": "x = 1\n"})
    os.utime(str(top / "m.py"), (SECONDS, SECONDS))
    compileall.compile_dir(str(top), quiet=1)
    for version in ("1.0", "2.0"):
        artifact = app.directory / f"py-{version}.tar.gz"
        subprocess.run([needs("tar"), "-czf", str(artifact), "-C", str(top), "."], check=True)
        app.run("deploy", artifact, "--sha256", hashlib.sha256(artifact.read_bytes()).hexdigest(), check=0)
        before = bytecode(app)
        subprocess.run([os.sys.executable, "-c", "import m"], cwd=str(app.root / "current"), check=True)  # type: ignore
        assert bytecode(app) == before
        (top / "other").write_text(version)
    app.run("rollback", check=0)


def test_a_hard_linked_copy_has_its_files_time(app: App) -> None:
    release, _ = staged(app, tar(pax([(b"mtime", b"1700000000.5")]), entry(b"a", b"x"), hard_link(b"b", b"a")))
    assert (release / "b").stat().st_mtime == SECONDS + 0.5


@pytest.mark.parametrize("moved", [False, True])
def test_a_file_of_another_time_is_not_shared_as_a_hard_link(app: App, moved: bool) -> None:
    app.configure("share_unchanged = hardlink")
    for version, time in (("1.0", SECONDS), ("1.1", SECONDS + moved)):
        data = tar(pax([(b"mtime", b"%d" % time)]), entry(b"f", b"same"), entry(b"VERSION", version.encode()))
        path = app.directory / f"app-{version}.tar"
        path.write_bytes(data)
        app.run("deploy", path, "--sha256", hashlib.sha256(data).hexdigest(), check=0)
    status = (app.root / "current" / "f").stat()
    assert (status.st_mtime, status.st_nlink) == (SECONDS + moved, 1 if moved else 2)


# -- pack --------------------------------------------------------------------------

def pack(top: Path, *options: str, **variables: str) -> Tuple[Dict[str, float], List[str]]:
    """Pack a directory; returns each file's time, and the warnings."""
    target = top.parent / "packed-1.0.tar.gz"
    warnings = run_deploy("pack", top, "-o", target, *options, env=variables, check=0).data["warnings"]
    with tarfile.open(str(target)) as archive:
        return {member.name: member.mtime for member in archive}, warnings


def test_pack_writes_one_time_or_keeps_the_files_own(tmp_path: Path) -> None:
    top = make_tree(tmp_path / "top", {"f": "x"})
    os.utime(str(top / "f"), ns=(0, SECONDS * 10 ** 9 + 500000000))
    assert pack(top)[0] == {"f": 315532800}
    assert pack(top, SOURCE_DATE_EPOCH="1234567890")[0] == {"f": 1234567890}
    assert pack(top, "--keep-mtimes")[0] == {"f": SECONDS + 0.5}
    failed = run_deploy("pack", top, "-o", tmp_path / "x.tar.gz", env={"SOURCE_DATE_EPOCH": "today"}, check=2)
    assert "SOURCE_DATE_EPOCH" in failed.data["error"]["message"]


def test_pack_warns_of_bytecode_that_the_fixed_time_makes_stale(tmp_path: Path) -> None:
    top = make_tree(tmp_path / "top", {"m.py": "x = 1\n"})
    compileall.compile_dir(str(top), quiet=1)
    stale = [warning for warning in pack(top)[1] if "stale" in warning]
    assert len(stale) == 1 and "m.cpython" in stale[0] and "--keep-mtimes" in stale[0]
    assert pack(top, "--keep-mtimes")[1] == []


def test_pack_warns_of_what_a_deployment_would_and_of_files_that_it_opens_to_all(tmp_path: Path) -> None:
    top = make_tree(tmp_path / "top", {"m.py": "x = 1\n", "key": "x", ".git/config": "x"})
    (top / "key").chmod(0o600)
    git, private = sorted(pack(top)[1])
    assert "'.git'" in git and "Git" in git
    assert "'key': 1 file" in private and "pack opens them to all" in private and "shared/" in private


# -- links -------------------------------------------------------------------------

OUTSIDE = tar(link(b"bin/python3", b"/usr/bin/python3.11"), link(b"etc", b"/etc"), link(b"d/up", b"../../x"), entry(b"f", b"x"))


def test_all_links_that_lead_outside_are_told_at_once_with_the_way(app: App) -> None:
    text = refused(app, OUTSIDE)
    assert all(name in text for name in ("3 members", "'bin/python3'", "'etc'", "'d/up'"))
    assert all(word in text for word in ("allow_links", "venv --copies", "post_stage"))


def test_a_link_that_leads_outside_by_another_is_told_with_what_to_allow(app: App) -> None:
    data = tar(link(b"bin/python3", b"/opt/lib/../py/3.11"), link(b"bin/python", b"python3"), entry(b"f", b"x"))
    text = refused(app, data)
    for name, target in (("bin/python3", "/opt/lib/../py/3.11"), ("bin/python", "python3")):
        assert f"'{name}': it is a symlink to '{target}', which leaves the release for '/opt/py/3.11'" in text
    staged(app, data, "--set", "artifact.allow_links=/opt/py/3.11")


def test_twenty_offenders_are_named_and_the_others_counted(app: App) -> None:
    text = refused(app, tar(*[entry(b"../%02d" % number, b"x") for number in range(25)]))
    assert "25 members" in text and "'../19'" in text and "'../20'" not in text and "and 5 more" in text


def test_targets_that_are_meant_are_allowed_by_globs(app: App) -> None:
    release = staged(app, tar(link(b"bin/python3", b"/usr/bin/python3.11"), link(b"bin/python", b"python3"), entry(b"f", b"x")),
                     "--set", "artifact.allow_links=/usr/bin/python3*")[0]
    assert os.readlink(str(release / "bin" / "python3")) == "/usr/bin/python3.11"
    for target in (b"/usr/bin/python3/../../../etc/passwd", b"/usr/bin/python3x/y", b"/usr/bin/perl", b"../../usr/bin/python3"):
        assert "'l'" in refused(app, tar(link(b"l", target), entry(b"f", b"x")), "--set", "artifact.allow_links=/usr/bin/python3*")
    staged(app, tar(link(b"l", b"/opt/a/b/c"), entry(b"f", b"y")), "--set", "artifact.allow_links=/opt/**")


def test_links_into_this_root_s_shared_and_current_are_allowed(app: App) -> None:
    root = os.fsencode(str(app.root))
    staged(app, tar(link(b"storage", root + b"/shared/storage"), link(b"d/up", b"../../../shared/x"), link(b"c", root + b"/current"),
                    entry(b"f", b"x")))
    for target in (root + b"/releases/1", root + b"/.deploy/lock", root + b"/sharedx", root + b"/shared/../.deploy", b"../other"):
        assert "'l'" in refused(app, tar(link(b"l", target), entry(b"f", b"x")))


def test_symlinks_any_allows_all_and_still_writes_through_none(app: App) -> None:
    app.configure("[artifact]\nsymlinks = any\nallow_links =\n")
    assert os.readlink(str(staged(app, OUTSIDE)[0] / "etc")) == "/etc"
    assert "below" in refused(app, tar(link(b"etc", b"/etc"), entry(b"etc/evil", b"x")))


def test_circles_and_chains_of_links_stay(app: App) -> None:
    chain = [link(b"l%d" % number, b"l%d" % (number + 1)) for number in range(100)]
    release, _ = staged(app, tar(link(b"a", b"b"), link(b"b", b"a"), link(b"c", b"c"), *chain))
    assert os.readlink(str(release / "l99")) == "l100"


def test_a_hard_link_to_a_symlink_is_that_symlink(app: App) -> None:
    release, _ = staged(app, tar(entry(b"f", b"x"), link(b"a", b"f"), hard_link(b"b", b"a")))
    assert os.readlink(str(release / "b")) == "f"


# -- names ---------------------------------------------------------------------------

def test_dots_and_empty_components_of_a_name_are_dropped(app: App) -> None:
    zipped = raw_zip([RawEntry(b"app/.", mode=0o040755).but("central", name=b"app/./").but("local", name=b"app/./"),
                      RawEntry(b"a//b", b"x"), RawEntry(b"./c/./d", b"y")])
    for data in (tar(folder(b"app/."), entry(b"a//b", b"x"), entry(b"./c/./d", b"y")), zipped):
        release, _ = staged(app, data)
        assert sorted(str(path.relative_to(release)) for path in release.rglob("*")) == ["a", "a/b", "app", "c", "c/d"]
    assert "climbs" in refused(app, tar(entry(b"a//../b", b"x")))


def test_maven_s_directories_are_directories(app: App) -> None:
    release, _ = staged(app, raw_zip([RawEntry(b"META-INF/maven/", mode=0o177777), RawEntry(b"x/", mode=0o100644),
                                      RawEntry(b"META-INF/maven/pom.xml", b"x")]))
    assert (release / "META-INF" / "maven").is_dir() and (release / "x").stat().st_mode & 0o777 == 0o755
    assert "has data" in refused(app, raw_zip([RawEntry(b"d/", b"x", mode=0o177777)]))


def unicode_path(raw: bytes, name: bytes, crc: int = -1) -> bytes:
    """The Unicode path field, made for a name."""
    return struct.pack("<HHBI", 0x7075, 5 + len(name), 1, zlib.crc32(raw) if crc < 0 else crc) + name


def test_a_zip_s_unicode_path_field_names_the_file(app: App) -> None:
    raw, name = b"caf\x82", "caf\u00e9".encode()
    field = unicode_path(raw, name)
    release, warnings = staged(app, raw_zip([RawEntry(raw, b"x", flags=0).but("central", extra=field, system=0).but("local", extra=field)]))
    assert os.listdir(os.fsencode(str(release))) == [name] and warnings == []
    old = unicode_path(raw, b"other", crc=1)  # the name was changed since
    release, warnings = staged(app, raw_zip([RawEntry(b"f", b"y", flags=0).but("central", extra=old)]))
    assert os.listdir(str(release)) == ["f"]


def test_a_zip_s_unicode_path_field_is_judged_and_must_agree(app: App) -> None:
    evil = unicode_path(b"good.txt", b"../../evil")
    assert "climbs" in refused(app, raw_zip([RawEntry(b"good.txt", b"x", flags=0).but("central", extra=evil).but("local", extra=evil)]))
    assert "disagree" in refused(app, raw_zip([RawEntry(b"good.txt", b"x", flags=0).but("local", extra=evil)]))
    other = unicode_path(b"good.txt", b"other.txt")
    assert "another name" in refused(app, raw_zip([RawEntry(b"good.txt", b"x").but("central", extra=other)]))


def test_names_of_unknown_encoding_are_told(app: App) -> None:
    _, warnings = staged(app, raw_zip([RawEntry(b"caf\x82", b"x", flags=0).but("central", system=0), RawEntry(b"f", b"x")]))
    assert len(warnings) == 1 and "cp437" in warnings[0] and "caf\u00e9" in warnings[0]


def test_a_backslash_says_how_to_zip_on_windows(app: App) -> None:
    text = refused(app, raw_zip([RawEntry(b"a\\b", b"x"), RawEntry(b"a\\c", b"x")]))
    assert "2 members" in text and text.count("made on Windows") == 1 and "7-Zip" in text


def test_a_backslash_in_a_tar_is_not_put_down_to_windows(app: App) -> None:
    text = refused(app, tar(entry(b"system/system-shop\\x2dworker.slice", b"[Slice]\n")))
    assert "backslash" in text and "Windows" not in text and "without it" in text


def test_a_hard_link_without_its_file_is_refused(app: App) -> None:
    # As GNU tar --format=ustar makes them: it cuts a link's target of over 100 bytes off.
    text = refused(app, tar(entry(b"d" * 99 + b"/f", b"x"), hard_link(b"g", b"d" * 99 + b"/")))
    assert "no earlier file" in text


@pytest.mark.parametrize("options", [[], ["--format=posix"]], ids=["gnu", "posix"])
def test_an_incremental_archive_is_no_release_and_says_how_to_pack_one(options: List[str], app: App) -> None:
    """The second one holds what has changed since the first, and nothing more."""
    make_tree(app.directory / "tree", {"VERSION": "1.0", "lib/x": "x"})
    argv = [needs("tar"), *options, "-g", str(app.directory / "snapshot"), "-cf", "-", "-C", str(app.directory / "tree"), "."]
    for _ in range(2):
        text = refused(app, subprocess.run(argv, stdout=subprocess.PIPE, check=True).stdout)
        assert "part of an incremental archive" in text and "-g" in text


def test_a_name_in_a_message_is_legible_and_short(app: App) -> None:
    text = refused(app, tar(entry(b"../caf\x8b", b"x")))
    assert r"'../caf\x8b'" in text and "udc" not in text
    assert len(refused(app, tar(pax([(b"path", b"n" * 100000), (b"linkpath", b"m" * 100000)]), link(b"a", b"b")))) < 1500


# -- sizes and streams -----------------------------------------------------------------

def test_a_small_archive_of_similar_files_may_have_any_ratio(app: App) -> None:
    data = gzip.compress(tar(*[entry(b"f%d" % number, bytes(200000)) for number in range(100)]), 9)
    assert 20000000 // len(data) > 300
    staged(app, data)


def test_a_gzip_whose_first_bytes_add_up_to_nothing_is_no_tar(app: App) -> None:
    # Where a tar's first header would have its checksum is 0, and signed bytes with 8 blanks there make 0.
    head = b"\x1f\x8b\x08\x04" + bytes(6) + struct.pack("<H", 500)
    field = bytes(500 - 171) + b"\xff" * 171
    assert sum(struct.unpack("512b", head + field)) + 8 * ord(" ") == 0
    data = head + field + gzip.compress(tar(entry(b"f", b"x")))[10:]
    release, _ = staged(app, data)
    assert os.listdir(str(release)) == ["f"]


def test_zeros_behind_a_zip_s_end_are_padding(app: App) -> None:
    staged(app, raw_zip([RawEntry(b"f", b"x")]) + bytes(9000))


@pytest.mark.parametrize("data, words", [
    (gzip.compress(gzip.compress(tar(entry(b"f", b"x")))), ["a tar.gz and no tar", "compressed once"]),
    (gzip.compress(lzma.compress(tar(entry(b"f", b"x")))), ["a tar.xz and no tar", "compressed once"]),
    (bz2.compress(b"#!/bin/sh\necho hello\n" * 50), ["no tar", "tar -czf"]),
    (gzip.compress(b"{}\n"), ["no tar"]), (gzip.compress(b""), ["no tar"]),
], ids=["gzip in gzip", "xz in gzip", "a script", "next to nothing", "nothing"])
def test_what_is_compressed_and_no_tar_is_called_what_it_is(app: App, data: bytes, words: List[str]) -> None:
    text = refused(app, data)
    assert all(word in text for word in words) and "checksum" not in text
    assert "echo" not in text and "{}" not in text, "what it holds may be private"


def test_too_many_streams_and_too_large_dictionaries_say_how_to_pack(app: App) -> None:
    assert "gzip, not bgzip" in refused(app, gzip.compress(tar(entry(b"f", b"x"))) + gzip.compress(b"") * 100001)
    data = bytearray(lzma.compress(tar(entry(b"f", b"x")), check=lzma.CHECK_NONE))
    data[data.index(b"\x21\x01") + 2] = 31  # 192 MiB
    size = (data[12] + 1) * 4
    data[12 + size - 4:12 + size] = struct.pack("<I", zlib.crc32(bytes(data[12:12 + size - 4])))
    text = refused(app, bytes(data))
    assert "134.2 MB" in text and "xz -9" in text and "damaged" not in text


def test_frames_of_another_kind_in_a_zst_are_refused(app: App) -> None:
    whole = tar(entry(b"a", b"x"), entry(b"b", b"y" * 200000))
    for other in (gzip.compress, lzma.compress):
        assert "damaged" in refused(app, zstd(whole[:700]) + other(whole[700:]))
    skippable = b"\x50\x2a\x4d\x18" + struct.pack("<I", 5) + b"notes"
    staged(app, skippable + zstd(whole[:700]) + skippable + zstd(whole[700:], "-19", "--check"))


def test_a_zst_with_the_largest_window_unpacks_within_its_memory(app: App) -> None:
    release, _ = staged(app, zstd(tar(entry(b"a", os.urandom(1 << 20) * 2)), "--long=27", "--no-content-size"))
    assert (release / "a").stat().st_size == 2 << 20
    assert "memory" in refused(app, zstd(tar(entry(b"a", os.urandom(1 << 20) * 2)), "--ultra", "--long=31", "--no-content-size"))


# -- what goes live without being meant ---------------------------------------------------

@pytest.mark.parametrize("names, words", [
    (["app-1.0.tar.gz"], ["app-1.0.tar.gz", "stays packed"]),
    (["f", "._f", "d/.DS_Store", "__MACOSX/x"], ["macOS", "COPYFILE_DISABLE", "'._f'"]),
    (["f", ".git/config", ".gitignore"], ["Git", "'.git'"]),
    (["\u03b1\u0345\u0301", "\u1fb4"], ["ignore case or Unicode form"]),  # one name, its marks in another order
], ids=["a zip that holds a tar", "macOS", "git", "Unicode form"])
def test_what_was_hardly_meant_is_told(app: App, names: List[str], words: List[str]) -> None:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name in names:
            archive.writestr(name, "x")
    for data in (stream.getvalue().replace(b"\x80\x01\0\0", b"\xa4\x81\0\0"), tar(*[entry(name.encode(), b"x") for name in names])):
        warnings = [warning for warning in staged(app, data)[1] if "only the owner" not in warning]
        assert len(warnings) == 1 and all(word in warnings[0] for word in words), warnings


def test_files_that_only_their_owner_may_read_are_told(app: App) -> None:
    _, warnings = staged(app, tar(entry(b"a", b"x", mode=0o600), entry(b"b", b"x", mode=0o700), entry(b"c", b"x")))
    assert len(warnings) == 1 and "2 files" in warnings[0] and "umask 077" in warnings[0]


def test_bytes_behind_the_end_of_a_tar_are_told_unless_they_are_zeros(app: App) -> None:
    assert staged(app, tar(entry(b"a", b"x")) + bytes(20000))[1] == []
    warnings = staged(app, tar(entry(b"a", b"y")) + bytes(1000) + b"more" + bytes(20000))[1]
    assert len(warnings) == 1 and "behind the end" in warnings[0]
