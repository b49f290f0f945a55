"""The tests' own tools do what they say: a tool that lies makes every test that uses it lie."""

import json
import os
import subprocess
import sys
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import pytest

import conftest
import support
from support import (TESTS, Server, clean_environment, free_port, link, make_tree, needs, run_deploy, snapshot, wait_until)


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


def ask(server: Server) -> dict:
    """The server's answer, decoded."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(server.url, timeout=5) as answer:
        return json.loads(answer.read().decode("ascii"))


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
