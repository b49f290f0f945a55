"""Slips of a tired operator, each of which once had a surprising answer."""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any, List

import pytest

from archives import entry, tar, zstd
from support import (ANOTHER_UID, DEPLOY, App, clean_environment, deploy_argv, described, make_tree, needs, open_to_others, run_as_another,
                     run_deploy, snapshot, write_checksum)


def test_a_signal_after_the_verdict_does_not_change_the_exit_code(app: App) -> None:
    for number in range(8):
        artifact = app.artifact(f"1.{number}")
        process = subprocess.Popen(deploy_argv("deploy", artifact, config=app.config, json=False), env=clean_environment(),
                                   stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        for line in process.stderr:
            if line.startswith(b"checked "):
                process.send_signal(signal.SIGTERM)
        process.stderr.close()
        assert process.wait(60) == 0 and app.version == f"1.{number}"


def test_too_little_memory_is_no_defect_of_this_program() -> None:
    code = ("import importlib.machinery, sys\n"
            "deploy = importlib.machinery.SourceFileLoader('deploy', sys.argv[1]).load_module()\n"
            "def grow(call): raise MemoryError\n"
            "deploy.COMMANDS['config'] = grow\n"
            "sys.exit(deploy.main(['config', '--json']))")
    run = subprocess.run([sys.executable, "-c", code, str(DEPLOY)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=60)
    assert (run.returncode, json.loads(run.stdout.decode())["error"]["message"]) == (1, "config: out of memory")
    assert b"Traceback" not in run.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="changing the user needs root")
def test_a_limit_of_processes_is_no_defect_of_this_program() -> None:
    """TasksMax=, a container's pids.max or ulimit -u may leave no room for a thread."""
    with open_to_others() as app:
        app.deploy("1.0")
        artifact, uid = app.artifact("1.1"), 61240  # nobody else's: what counts is all that the user runs
        for path in (app.directory, *app.directory.rglob("*")):
            os.chown(str(path), uid, uid, follow_symlinks=False)

        def run(*words: str) -> Any:
            argv = [needs("prlimit"), "--nproc=1", needs("setpriv"), f"--reuid={uid}", f"--regid={uid}", "--clear-groups",
                    "/usr/bin/python3", "-I", "-", "--json", "--root", str(app.root), *words]
            done = subprocess.run(argv, input=DEPLOY.read_bytes(), env={}, cwd="/", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            assert b"Traceback" not in done.stderr, done.stderr
            return json.loads(done.stdout.decode("ascii"))

        failed = run("deploy", str(artifact))
        assert failed["exit_code"] == 1 and "EAGAIN" in failed["msg"] and "TasksMax=" in failed["error"]["hint"], described(failed)
        asked = run("probe", "--tcp", "127.0.0.1:1")
        assert asked["exit_code"] == 7 and "EAGAIN" in asked["msg"], described(asked)
        assert app.version == "1.0"


@pytest.mark.skipif(os.geteuid() != 0, reason="changing the user needs root")
def test_a_user_whose_pipes_are_at_their_limit_can_still_unpack() -> None:
    """Over pipe-user-pages-soft, which everything counts that the user runs, no pipe may grow (pipe(7))."""
    hoard = ("import fcntl, os, sys\n"
             "try:\n"
             "    for _ in range(2000): fcntl.fcntl(os.pipe()[0], 1031, 1 << 20)\n"
             "except PermissionError:\n"
             "    print('at the limit', flush=True)\n"
             "    sys.stdin.read()\n")
    argv = [needs("setpriv"), f"--reuid={ANOTHER_UID}", f"--regid={ANOTHER_UID}", "--clear-groups", "/usr/bin/python3", "-Ic", hoard]
    with open_to_others() as app, subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as hoarder:
        assert hoarder.stdout and hoarder.stdout.readline() == b"at the limit\n"
        app.configure()
        artifact = app.directory / "app-1.0.tar.zst"
        artifact.write_bytes(zstd(tar(entry(b"VERSION", b"1.0\n"), entry(b"large", os.urandom(3 << 20)))))
        result = run_as_another(app, "deploy", artifact, "--sha256", hashlib.sha256(artifact.read_bytes()).hexdigest())
        hoarder.communicate()
        assert result["exit_code"] == 0 and app.version == "1.0", described(result)


@pytest.mark.parametrize("words", [["--root", "relative", "status"], ["-c", "../x.ini", "status"], ["--root", "/x", "deploy", "a.tar.gz"],
                                   ["pack", "directory"]], ids=["root", "configuration", "artifact", "pack"])
def test_a_relative_path_in_a_deleted_directory_leads_nowhere(words: List[str], tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    done = subprocess.run(["/bin/sh", "-c", 'cd "$1" && rmdir "$1" && shift && exec "$@"', "sh", str(gone), sys.executable, str(DEPLOY)] + words,
                          env=clean_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert done.returncode in (2, 4) and b"working directory was deleted" in done.stderr, done.stderr


@pytest.mark.parametrize("words", [["rollback", ""], ["deploy", "--sha256", "", "x"], ["verify", ""], ["recover", "--to", ""],
                                   ["probe", "--url", ""], ["pack", ""], ["stage", "--release-version", "", "x"]], ids=lambda words: words[0])
def test_a_variable_that_was_never_set_is_not_an_option_left_out(words: List[str], app: App) -> None:
    app.deploy("1.0")
    app.deploy("1.1")
    assert "empty" in app.run(*words, check=2).data["error"]["message"]
    assert app.version == "1.1"


def test_status_tells_that_the_link_is_gone_or_was_moved_by_hand(app: App) -> None:
    first, second = app.deploy("1.0").data["release"], app.deploy("1.1").data["release"]
    link = app.root / "current"
    link.unlink()
    assert "missing" in app.run("status", check=7).data["error"]["message"]
    link.symlink_to(f"releases/{first}")
    error = app.run("status", check=7).data["error"]
    assert first in error["message"] and f"activate {second}" in error["hint"]
    app.run("activate", second, check=0)
    app.run("status", check=0)


def test_status_tells_that_link_and_release_are_gone_together(app: App) -> None:
    release = app.deploy("1.0").data["release"]
    shutil.rmtree(str(app.root / "releases" / release))
    (app.root / "current").unlink()
    error = app.run("status", check=7).data["error"]
    assert f"{release} should be live" in error["message"] and "files are gone" in error["message"]
    app.run(error["hint"].split()[-1], check=0)
    app.run("status", check=0)
    app.deploy("1.0")


def test_no_root_lies_inside_another(app: App) -> None:
    app.deploy("1.0")
    (app.root / "linked").symlink_to(".")
    before = snapshot(app.root)
    for place in ("current", "releases", ".deploy", ".deploy/trash", "current/lib", "linked/current", "releases/new"):
        for words in (["status"], ["deploy", app.artifact("1.1")]) if place == "current" else (["status"],):
            error = run_deploy(*words, root=app.root / place, check=2).data["error"]
            assert "inside another" in error["message"] and error["hint"].split("--root ")[1].split()[0] == str(app.root)
    assert snapshot(app.root) == before


def test_a_root_below_a_directory_called_releases_is_like_any_other(tmp_path: Path) -> None:
    app = App(tmp_path / "releases" / "app")
    app.deploy("1.0")
    assert app.version == "1.0"


def test_what_verify_finds_is_mended_by_what_it_hints(app: App) -> None:
    artifact = app.artifact("1.0")
    app.run("deploy", artifact, check=0)
    (app.root / "current" / "VERSION").write_text("else")
    assert "--force" in app.run("verify", check=7).data["error"]["hint"]
    app.run("deploy", "--force", artifact, check=0)
    app.run("verify", check=0)
    # An older one as well, which a rollback refuses.
    (app.root / "current" / "VERSION").write_text("else")
    app.deploy("2.0")
    hint = app.run("rollback", check=1).data["error"]["hint"]
    words = re.search("deploy.py (deploy .*) ARTIFACT", hint).group(1).split()
    assert app.run(*words, artifact, check=0) and app.version == "1.0"


@pytest.mark.parametrize("key, value", [("auth_file", "/nonexistent"), ("tls_ca", "/nonexistent"), ("tls_cert", "/nonexistent")])
def test_a_file_that_a_probe_needs_is_missed_before_anything_changes(key: str, value: str, app: App) -> None:
    app.configure(f"[probe:web]\nurl = https://127.0.0.1:1/\n{key} = {value}\n")
    assert value in app.run("deploy", app.artifact("1.0"), check=3).data["error"]["message"]
    assert app.releases() == []


def test_a_program_that_a_probe_needs_is_missed_before_anything_changes(app: App) -> None:
    app.configure("[probe:web]\ncommand = no-such-program\n")
    assert "no-such-program" in app.run("deploy", app.artifact("1.0"), check=3).data["error"]["message"]


def test_expectations_for_configured_probes_are_refused(app: App) -> None:
    app.configure("[probe:web]\ncommand = true\n")
    app.run("probe", "web", "--expect", "body=x", check=2)


def test_too_many_successes_are_told_as_such(tmp_path: Path) -> None:
    result = run_deploy("probe", "--command", "true", "--wait", "1s", "--expect", "successes=50", "--expect", "period=10ms", check=7)
    assert "answers in a row were healthy" in result.data["error"]["message"]


def test_names_of_a_zip_made_on_unix_are_utf8_without_the_flag(tmp_path: Path) -> None:
    raw = "grüße.txt".encode("utf-8")
    artifact = tmp_path / "app-1.0.zip"
    with zipfile.ZipFile(str(artifact), "w") as archive:
        entry = zipfile.ZipInfo("X" * len(raw))
        entry.create_system, entry.external_attr = 3, 0o100644 << 16
        archive.writestr(entry, "x")
    data = artifact.read_bytes()
    artifact.write_bytes(data.replace(b"X" * len(raw), raw))
    write_checksum(artifact)
    run_deploy("deploy", artifact, root=tmp_path / "root", check=0)
    assert os.listdir(os.fsencode(str(tmp_path / "root" / "current"))) == [raw]


def test_a_short_version_wins_over_the_prefix_of_every_id(app: App) -> None:
    app.deploy("1.0")
    second = app.deploy("2").data["release"]
    assert app.run("pin", "2", check=0).data["release"] == second


@pytest.mark.parametrize("root", ["/", "bad\nname"])
def test_some_directories_cannot_be_a_root(root: str, tmp_path: Path) -> None:
    run_deploy("status", root=root, cwd=tmp_path, check=2)


def test_plain_seconds_are_a_duration_behind_every_flag(app: App) -> None:
    app.run("--wait-lock", "5", "deploy", app.artifact("1.0"), check=0)
    app.run("-n", "prune", "--splay", "5", check=0)
    app.run("probe", "--command", "true", "--wait", "5", check=0)


@pytest.mark.parametrize("words", [
    ["deploy", "x", "--sha256", "xyz"], ["preflight", "--sha256", "xyz"], ["stage", "x", "--release-version", "a/b"],
    ["prune", "--splay", "5x"], ["probe", "--wait", "5x"], ["history", "--limit", "x"], ["history", "--verify", "--limit", "-1"],
], ids=" ".join)
def test_a_flag_is_read_before_anything_is_looked_at(words: List[str], tmp_path: Path) -> None:
    assert words[-2] in str(run_deploy(*words, root=tmp_path / "none", check=2).data["error"])


@pytest.mark.parametrize("words", [["--sha256", "0" * 64, "deploy", "x"], ["-n", "--limit=3", "history"], ["-f", "rollback"]],
                         ids=["sha256", "limit", "force"])
def test_a_flag_before_its_command_is_told_where_it_belongs(words: List[str], tmp_path: Path) -> None:
    error = run_deploy(*words, root=tmp_path / "none", check=2).data["error"]
    assert "behind" in error["hint"]


def test_a_log_is_never_written_through_a_symlink_and_that_is_told(tmp_path: Path) -> None:
    (tmp_path / "log").symlink_to(tmp_path / "other")
    error = run_deploy("status", "--log-file", tmp_path / "log", root=tmp_path, check=2).data["error"]
    assert "symbolic links" in error["message"] and not (tmp_path / "other").exists()


def test_show_knows_the_release_that_is_live_and_says_when_there_is_none(app: App) -> None:
    app.root.mkdir(exist_ok=True)
    assert app.run("show", "current", check=2).data["error"]["hint"].endswith("none was deployed here so far")
    app.deploy("1.0")
    app.deploy("1.1")
    app.run("rollback", check=0)
    (story,) = app.run("show", "current", check=0).data["history"]
    assert (story["operation"], story["release"]) == ("rollback", app.current)


def test_root_may_look_at_the_state_of_a_service_user_but_not_act_on_it(app: App) -> None:
    if os.geteuid():
        pytest.skip("only root may give files away")
    needs("chown")
    app.deploy("1.0")
    subprocess.check_call(["chown", "-R", "65534", str(app.root)])
    for command in ("status", "releases", "history", "verify"):
        app.run(command, check=0)
    assert "sudo -u" in app.run("rollback", check=3).data["error"]["hint"]


@pytest.mark.parametrize("words", [["doctor"], ["frobnicate"], ["status", "doctor"], ["status", "directory"]], ids=" ".join)
def test_a_hint_offers_no_word_that_cannot_stand_there(words: List[str]) -> None:
    assert "did you mean" not in run_deploy(*words, json=False, check=2).stderr


@pytest.mark.parametrize("words, meant", [(["deplyo"], "deploy"), (["status", "--jsno"], "--json"), (["STATUS"], "status"), (["help", "HOOKS"], "hooks")])
def test_a_typing_error_is_answered_with_the_nearest_name(words: List[str], meant: str) -> None:
    assert repr(meant) in run_deploy(*words, json=False, check=2).stderr


def test_a_release_is_no_artifact(app: App) -> None:
    release = app.deploy("1.0").data["release"]
    (app.root / "linked").symlink_to(".")
    for place in (f"releases/{release}", "releases", "current", ".deploy", ".deploy/trash", "current/lib", "linked/current"):
        error = app.run("stage", "--set", "artifact.checksum=off", app.root / place, check=4).data["error"]
        assert "deploy.py's own" in error["message"] and "activate" in error["hint"] and app.releases() == [release]


def test_a_directory_beside_the_releases_is_an_artifact(app: App) -> None:
    app.deploy("1.0")
    for place in (app.root / "build-2.0", app.root / "releases-2.1"):
        make_tree(place, {"VERSION": "2\n"})
        app.run("deploy", "--set", "artifact.checksum=off", place, check=0)


@pytest.mark.parametrize("blocks", [2, 20])
def test_a_tar_without_members_is_told_as_such(blocks: int, app: App) -> None:
    path = app.directory / "myapp-1.0.tar"
    path.write_bytes(bytes(512 * blocks))
    write_checksum(path)
    error = app.run("deploy", path, check=4).data["error"]
    assert "begins with zeros" in error["message"] and error["hint"]


def test_a_pipe_is_no_archive_that_is_still_being_copied(app: App) -> None:
    os.mkfifo(str(app.directory / "myapp-1.0.tar"))
    error = app.run("deploy", app.directory / "myapp-1.0.tar", check=4).data["error"]
    assert "unknown format" in error["message"] and "fully copied" not in error["hint"]
