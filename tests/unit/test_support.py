"""The tests' own tools do what they say: a tool that lies makes every test that uses it lie."""

import json
import os
import subprocess
import sys
import tarfile
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import pytest

import conftest
import support
from support import (TESTS, Server, clean_environment, compress, directory, fake_command, file, free_port, link, make_artifact,
                     make_tar, make_tree, make_zip, member, needs, pax_global, run_deploy, sha256_of, snapshot, tar_bytes, wait_until)


def test_make_tree_writes_files_links_and_directories_with_modes(tmp_path: Path) -> None:
    top = make_tree(tmp_path / "tree", {"a/b": "text", "run": file(b"x", 0o750), "l": link("a/b"), "e": None,
                                        "sealed": directory(0o555), "sealed/file": "in a read-only directory"})
    assert (top / "a" / "b").read_text() == "text"
    assert (top / "run").stat().st_mode & 0o777 == 0o750
    assert os.readlink(str(top / "l")) == "a/b" and (top / "e").is_dir()
    assert (top / "sealed").stat().st_mode & 0o777 == 0o555 and (top / "sealed" / "file").exists()


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz"])
def test_an_artifact_is_readable_reproducible_and_has_its_checksum(tmp_path: Path, suffix: str) -> None:
    first = make_artifact(tmp_path / "one", "1.0.0", suffix=suffix)
    second = make_artifact(tmp_path / "two", "1.0.0", suffix=suffix)
    assert first.read_bytes() == second.read_bytes()
    with tarfile.open(str(first)) as archive:
        names = archive.getnames()
    assert names == ["VERSION", "bin", "bin/run", "data", "lib", "lib/nested", "lib/nested/data.txt", "log"]
    checksum = (first.parent / (first.name + ".sha256")).read_text()
    assert checksum == f"{sha256_of(first)}  {first.name}\n"


def test_make_tar_writes_hostile_members_as_told(tmp_path: Path) -> None:
    path = make_tar(tmp_path / "evil.tar", [
        pax_global(comment="x"), member("../evil", "x"), member("/abs", "y"), member("fifo", type=tarfile.FIFOTYPE),
        member("hard", type=tarfile.LNKTYPE, linkname="../evil"), member("suid", mode=0o6755),
        member("pax", "z", pax_headers={"path": "../renamed"})])
    with tarfile.open(str(path)) as archive:
        members = archive.getmembers()
    assert [found.name for found in members] == ["../evil", "/abs", "fifo", "hard", "suid", "../renamed"]
    assert members[2].isfifo() and members[3].linkname == "../evil" and members[4].mode == 0o6755


def test_a_member_may_lie_about_its_size() -> None:
    negative = tar_bytes([member("x", size=-512)], tarfile.GNU_FORMAT)
    assert tarfile.TarInfo.frombuf(negative[:512], "utf-8", "strict").size == -512
    assert len(tar_bytes([member("x", "short", size=1 << 40)], tarfile.GNU_FORMAT)) == 4 * 512


def test_zstd_and_zip_are_what_the_system_reads(tmp_path: Path) -> None:
    packed = compress(b"data" * 1000, "zst")
    assert subprocess.run([needs("zstd"), "-d", "-c"], input=packed, stdout=subprocess.PIPE).stdout == b"data" * 1000
    path = make_zip(tmp_path / "a.zip", {"run": file("#!", 0o755), "l": link("run"), "e": None})
    subprocess.run([needs("unzip"), "-q", str(path), "-d", str(tmp_path)], check=True)
    assert os.access(str(tmp_path / "run"), os.X_OK) and (tmp_path / "l").is_symlink() and (tmp_path / "e").is_dir()


def test_a_fake_command_logs_its_calls_and_runs_its_script(tmp_path: Path) -> None:
    command = fake_command(tmp_path / "bin", "systemctl", "sys.exit(3)")
    assert command.calls() == []
    done = subprocess.run(["systemctl", "restart", "a b"], env=clean_environment(dict(command.env, EXTRA="1")))  # type: ignore
    assert done.returncode == 3
    assert command.calls() == [["restart", "a b"]]
    assert command.details()[0]["env"]["EXTRA"] == "1"


def test_a_snapshot_sees_every_kind_of_change(tmp_path: Path) -> None:
    top = make_tree(tmp_path / "tree", {"file": "a", "dir/below": "b", "link": link("file")})
    seen = [snapshot(top)]
    assert set(seen[0]) == {".", "file", "dir", "dir/below", "link"}
    for change in (lambda: (top / "file").chmod(0o600), lambda: os.utime(str(top / "file"), (1, 1)),
                   lambda: (top / "dir" / "below").write_text("c"), lambda: (top / "new").mkdir(),
                   lambda: (top / "link").unlink()):
        change()
        seen.append(snapshot(top))
    assert all(before != after for before, after in zip(seen, seen[1:]))
    assert snapshot(top) == seen[-1] and snapshot(tmp_path / "nothing") == {}


def stand_in(monkeypatch: pytest.MonkeyPatch, directory: Path, program: str) -> None:
    """Let run_deploy run a program of ours."""
    path = directory / "stand_in.py"
    path.write_text(program)
    monkeypatch.setattr(support, "DEPLOY", path)
    monkeypatch.setattr(support, "WARM", 0)


def test_run_deploy_gives_a_clean_environment_and_decodes_the_object(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, tmp_path, "import json, os, sys; print(json.dumps([sys.argv[1:], sorted(os.environ)]).join(['{\"a\":', '}']))")
    result = run_deploy("status", root="/r", config="/c", env={"EXTRA": "1", "LANG": None}, check=0)
    argv, names = result.data["a"]
    assert argv == ["--json", "--root", "/r", "-c", "/c", "status"]
    assert set(names) - {"LC_CTYPE"} == {"EXTRA", "HOME", "PATH"}  # Python 3.7 and later set LC_CTYPE themselves


@pytest.mark.parametrize("program, message", [
    ("print('{}'); print('{}')", "not one JSON value"),
    ("print('[]')", "not a JSON object"),
    ("import sys; print('{}'); sys.exit('whole stderr')", "expected exit code 0\n[^$]*[$] .*\nexit code 1\n(.*\n)*whole stderr"),
    ("import time; time.sleep(60)", "still running"),
], ids=["two-objects", "list", "exit-code", "hang"])
def test_run_deploy_fails_with_everything_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str, message: str) -> None:
    stand_in(monkeypatch, tmp_path, program)
    with pytest.raises(pytest.fail.Exception, match=message):
        run_deploy("status", timeout=1, check=0)


def test_a_background_child_that_keeps_stdout_does_not_hold_run_deploy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, tmp_path, "import subprocess; subprocess.Popen(['sleep', '90']); print('{}', flush=True)")
    run_deploy("status", check=0)


def ask(server: Server) -> dict:
    """The server's answer, decoded."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(server.url, timeout=5) as answer:
        return json.loads(answer.read().decode("ascii"))


def test_a_server_answers_its_old_version_until_it_is_restarted(tmp_path: Path) -> None:
    version = tmp_path / "VERSION"
    version.write_text("1.0.0\n")
    server = Server(version, tmp_path / "bin")
    try:
        version.write_text("2.0.0\n")
        assert ask(server) == {"status": "ok", "version": "1.0.0"}
        subprocess.run([str(server.restart_command.path)], check=True)
        assert ask(server) == {"status": "ok", "version": "2.0.0"}
    finally:
        server.stop()


def test_a_missing_tool_skips_here_and_fails_in_ci(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "")
    with pytest.raises(pytest.skip.Exception, match="no-such-tool"):
        needs("no-such-tool")
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="no-such-tool"):
        needs("no-such-tool")


def test_waiting_ends_with_the_value_or_a_failure() -> None:
    assert wait_until(lambda: "done") == "done"
    with pytest.raises(pytest.fail.Exception, match="the port"):
        wait_until(lambda: False, timeout=0.1, what="the port")
    assert 1024 <= free_port() < 65536


@pytest.mark.parametrize("share, kept", [("0/1", "abcdefg"), ("0/3", "adg"), ("1/3", "be"), ("2/3", "cf")])
def test_shares_of_the_suite_are_all_of_it_together(monkeypatch, share, kept):
    items, left_out = list("abcdefg"), []
    config = SimpleNamespace(hook=SimpleNamespace(pytest_deselected=lambda items: left_out.extend(items)))
    monkeypatch.setenv("DEPLOY_TEST_SHARE", share)
    conftest.pytest_collection_modifyitems(config, items)
    assert "".join(items) == kept and sorted(items + left_out) == list("abcdefg")


TESTS_OF_A_SUITE = """
import pytest

@pytest.fixture
def broken(tmp_path):
    yield
    assert False

def write(tmp_path):
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path.parent)

def test_passes(tmp_path):
    write(tmp_path)

def test_fails(tmp_path):
    write(tmp_path)
    assert False

def test_fails_at_its_end(broken, tmp_path):
    write(tmp_path)
"""


def test_of_the_tests_own_directories_only_those_of_failures_are_left(tmp_path):
    make_tree(tmp_path / "suite", {"test_suite.py": TESTS_OF_A_SUITE})
    argv = [sys.executable, "-B", "-m", "pytest", "-p", "conftest", "-p", "no:cacheprovider", "--basetemp", str(tmp_path / "left"), "suite"]
    done = subprocess.run(argv, cwd=str(tmp_path), env=clean_environment({"PYTHONPATH": f"{TESTS}:{TESTS}/lib"}), stdout=subprocess.PIPE)
    assert b"1 failed, 2 passed, 1 error" in done.stdout, done.stdout.decode()
    left = {path.parent.name for path in (tmp_path / "left").glob("*0/below")}
    assert left == {"test_fails0", "test_fails_at_its_end0"} and (tmp_path / "left" / "test_passes0").is_dir()
