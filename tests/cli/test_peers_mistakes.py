"""What other tools got wrong, each with its test: RELIABILITY.md lists them in this order."""

import json
import os
import re
import signal
import subprocess
from pathlib import Path
from typing import Any, Dict, Iterator, List

import pytest

from crashes import Saved, wait_gone
from scenes import Gate, configure, deploy_all, fails_for
from support import (App, clean_environment, deploy_argv, fake_command, make_tree, needs, snapshot, start_deploy)


@pytest.fixture
def app(app: App) -> App:
    """An application that does not sync the whole filesystem."""
    configure(app)
    return app


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Gate]:
    """A gate that is open at the end, whatever happened."""
    made = Gate(tmp_path / "gates")
    yield made
    made.open()


# 1
def test_a_link_left_by_a_crash_does_not_catch_the_next_deployment(app: App, gate: Gate) -> None:
    first = app.deploy("1.0").data["release"]
    configure(app, f"[hooks]\npre_activate = {gate.command}\n")
    killed = start_deploy("deploy", app.artifact("1.1"), config=app.config)
    gate.wait_for_visitor()
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    # The links of a crash between ln and mv, deploy.py's own and those of other tools.
    (app.root / ".current.4711.0badcafe.tmp").symlink_to(f"releases/{first}")
    (app.root / "releases" / "current").symlink_to(first)
    (app.root / "current.tmp").symlink_to(f"releases/{first}")
    before = snapshot(app.root / "releases" / first)
    configure(app)
    second = app.deploy("2.0").data["release"]
    assert os.readlink(str(app.root / "current")) == f"releases/{second}"
    assert snapshot(app.root / "releases" / first) == before, "nothing landed inside the old release"
    assert not (app.root / ".current.4711.0badcafe.tmp").is_symlink()
    app.run("verify", check=0)


# 2
def test_pruning_after_a_rollback_keeps_what_is_live(app: App) -> None:
    configure(app, "keep_releases = 1\n")
    first, second = deploy_all(app, "1.0", "2.0")
    app.run("rollback", check=0)
    for name, when in ((first, 1000), (second, 2000000000)):
        os.utime(str(app.root / "releases" / name), (when, when))
    app.run("prune", check=0)
    assert (app.current, app.version) == (first, "1.0")
    third = app.deploy("3.0").data["release"]
    assert (app.current, app.version, first in app.releases()) == (third, "3.0", True)


# 3
def test_a_rollback_with_a_single_release_leaves_it_alone(app: App) -> None:
    only = app.deploy("1.0").data["release"]
    app.run("rollback", check=3)
    app.run("rollback", "previous", check=2)
    app.run("prune", "--set", "deploy.keep_releases=0", check=0)
    assert (app.current, app.version, app.releases()) == (only, "1.0", [only])


# 4
@pytest.mark.parametrize("what, command", [
    ("directory", "deploy"), ("directory", "activate"), ("directory", "rollback"), ("directory", "stage"), ("directory", "recover"),
    ("file", "deploy"), ("link outside", "deploy")])
def test_a_current_that_is_no_link_to_a_release_is_refused_with_the_command_that_mends_it(
        app: App, tmp_path: Path, what: str, command: str) -> None:
    staged = app.run("stage", app.artifact("1.0"), check=0).data["release"]
    current, outside = app.root / "current", make_tree(tmp_path / "outside", {"index.php": "<?php"})
    if what == "directory":
        make_tree(current, {"index.php": "<?php"})
    elif what == "file":
        current.write_text("not a link")
    else:
        current.symlink_to(str(outside))
    before = snapshot(app.root / "current"), snapshot(outside), app.releases()
    words = {"deploy": ["deploy", app.artifact("2.0")], "stage": ["stage", app.artifact("2.0")],
             "activate": ["activate", staged]}.get(command, [command])  # type: List[Any]
    done = app.run(*words)
    if command != "recover":
        assert done.exit_code == 3, done.describe()
        hint = done.data["error"]["hint"]
        mend = re.search(r"(mv \S+ \S+|rm \S+)\Z", hint)
        assert mend and str(current) in mend.group(), hint
    assert (snapshot(app.root / "current"), snapshot(outside), app.releases()) == before
    if command == "deploy":
        subprocess.check_call(mend.group().split())  # type: ignore
        app.run(*words, check=0)
        assert app.version == "2.0"


# 5
def test_a_release_is_not_called_good_before_it_was_asked(app: App) -> None:
    seen = fake_command(app.directory / "bin", "probe", (
        "import glob\n"
        "for path in glob.glob(os.environ['DEPLOY_ROOT'] + '/.deploy/releases/*.json'):\n"
        "    record = json.load(open(path))\n"
        "    print(record['version'], record['state'])\n"
        f"with open({str(app.directory / 'seen')!r}, 'w') as out:\n"
        "    record = json.load(open(os.environ['DEPLOY_ROOT'] + '/.deploy/releases/' + os.environ['DEPLOY_RELEASE'] + '.json'))\n"
        "    history = os.environ['DEPLOY_ROOT'] + '/.deploy/history.jsonl'\n"
        "    json.dump([record['state'], sum(1 for line in open(history))], out)"))
    configure(app)
    app.deploy("1.0")
    configure(app, f"[probe:web]\ncommand = {seen.path}\nsuccesses = 1\n")
    app.deploy("2.0")
    assert json.loads((app.directory / "seen").read_text()) == ["staged", 1]
    assert app.record(str(app.current))["state"] == "active"


# 6
def test_the_lock_is_held_until_pruning_is_over(app: App, tmp_path: Path) -> None:
    configure(app, "keep_releases = 1\n")
    deploy_all(app, "1.0", "2.0")
    trace = tmp_path / "trace"
    argv = [needs("strace"), "-f", "-y", "-o", str(trace), "-e", "trace=close,flock,renameat,renameat2,unlinkat,unlink"]
    subprocess.run(argv + deploy_argv("deploy", app.artifact("3.0"), config=app.config), env=clean_environment(),
                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=60, check=True)
    calls = trace.read_text().splitlines()
    lock = f"{app.root}/.deploy/lock"
    locked = [number for number, call in enumerate(calls) if "flock(" in call and lock in call and "LOCK_EX" in call]
    freed = [number for number, call in enumerate(calls) if "close(" in call and lock in call or "LOCK_UN" in call]
    changes = [number for number, call in enumerate(calls) if "rename" in call or "unlink" in call and str(app.root) in call]
    assert any(".deploy/trash" in calls[number] for number in changes), "something was pruned"
    assert locked[0] < changes[0] and changes[-1] < freed[-1] and len(freed) == 1
    assert not any("unlink" in call and '"lock"' in call for call in calls)


def test_the_lock_of_a_run_that_died_long_ago_stops_nobody(app: App) -> None:
    app.deploy("1.0")
    (app.root / ".deploy" / "lock").write_text(json.dumps({"pid": 1, "since": "2020-01-01T00:00:00Z"}))
    app.deploy("2.0")
    assert app.version == "2.0"


# 7
def test_failed_deployments_do_not_push_out_good_ones_and_no_rollback_meets_them(app: App) -> None:
    command = fake_command(app.directory / "bin", "check", "sys.exit(os.environ['DEPLOY_VERSION'].endswith('bad'))")
    configure(app, f"keep_releases = 2\n[hooks]\npost_activate = {command.path}\n")
    good = deploy_all(app, "1.0", "2.0")
    for version in ("3.0-bad", "4.0-bad", "5.0-bad"):
        app.run("deploy", app.artifact(version), check=5)
    assert set(good) <= set(app.releases())
    good.append(app.deploy("6.0").data["release"])
    app.run("rollback", check=0)
    assert app.current == good[1]
    app.run("rollback", check=3)
    assert app.current == good[1], "the rest was good and pruned, or bad"


# 8
def test_a_missing_shared_file_is_reported_and_not_invented(app: App) -> None:
    configure(app, "shared_files = .env\n")
    refused = app.run("deploy", app.artifact("1.0", {".env": "FROM=artifact\n"}), check=3).data
    assert f"{app.root}/shared/.env" in refused["error"]["message"] and f"{app.root}/shared/.env" in refused["error"]["hint"]
    assert not os.path.lexists(str(app.root / "shared" / ".env"))
    make_tree(app.root / "shared", {".env": "REAL=1\n"})
    app.deploy("1.0")
    assert (app.root / "current" / ".env").read_text() == "REAL=1\n"


# 9
@pytest.mark.parametrize("where", ["hooks.post_activate", "service:web.command", "probe:web.command"])
def test_a_background_process_that_holds_stdout_does_not_hang_the_run(app: App, gate: Gate, where: str) -> None:
    section, _, key = where.partition(".")
    script = fake_command(app.directory / "bin", "daemon", (
        "import subprocess, sys\nprint('started')\nsys.stdout.flush()\n"
        f"subprocess.Popen(['cat', {str(gate.path)!r}])"))
    configure(app, f"[{section}]\n{key} = {script.path}\ntimeout = 100s\n"
              + ("successes = 1\n" if section.startswith("probe") else ""))
    app.run("deploy", app.artifact("1.0"), timeout=60, check=0)
    assert app.version == "1.0"


def test_the_time_limit_of_a_hook_also_ends_its_children(app: App, gate: Gate) -> None:
    pid_file = app.directory / "pid"
    script = fake_command(app.directory / "bin", "daemon", (
        f"import subprocess\nchild = subprocess.Popen(['cat', {str(gate.path)!r}])\n"
        f"open({str(pid_file)!r}, 'w').write(str(child.pid))\nchild.wait()"))
    for seconds in (1, 10):
        configure(app, f"[hooks]\npre_activate = {script.path}\ntimeout = {seconds}s\n")
        failed = app.run("deploy", app.artifact("1.0"), check=1).data
        assert "timed out" in failed["error"]["message"]
        if pid_file.exists():
            break  # else the host was so busy that the hook had not come to it
    wait_gone([int(pid_file.read_text())])


# 10: test_the_old_process_that_still_answers_is_a_failure, in test_deploy.py


# 11
def test_a_timer_does_not_deploy_the_same_broken_version_again_and_again(app: App) -> None:
    command = fails_for(app.directory / "bin", "2.0")
    configure(app, f"[service:web]\ncommand = {command.path}\n")
    first = app.deploy("1.0").data["release"]
    artifact = app.artifact("2.0")
    app.run("deploy", artifact, check=5)
    calls, releases = len(command.calls()), app.releases()
    for _ in range(3):
        app.run("deploy", artifact, check=4)
    assert (len(command.calls()), app.releases(), app.current) == (calls, releases, first)


# 12
def test_a_failure_to_prune_is_a_warning_and_the_release_stays_live(app: App) -> None:
    configure(app, "keep_releases = 1\n")
    deploy_all(app, "1.0", "2.0")
    argv = [needs("strace"), "-f", "-o", "/dev/null", "-P", str(app.root / ".deploy" / "trash"),
            "-e", "trace=renameat,renameat2", "-e", "inject=renameat,renameat2:error=EBUSY"]
    done = subprocess.run(argv + deploy_argv("deploy", app.artifact("3.0"), config=app.config), env=clean_environment(),
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=60)
    data = json.loads(done.stdout.decode())  # type: Dict[str, Any]
    assert (done.returncode, data["ok"], app.version) == (0, True, "3.0")
    assert any("prune" in warning and "EBUSY" in warning for warning in data["warnings"])
    assert app.history()[-1]["result"] == "deployed"
    assert len(app.releases()) == 3
    assert len(app.run("prune", check=0).data["removed"]) == 1


def test_what_could_not_be_pruned_does_not_stop_later_runs(app: App) -> None:
    configure(app, "keep_releases = 1\n")
    deploy_all(app, "1.0", "2.0")
    # What was moved to the trash cannot be removed there: an immutable file, a mount, a damaged directory.
    argv = [needs("strace"), "-f", "-o", "/dev/null", "-P", str(app.root / ".deploy" / "trash"),
            "-e", "trace=unlinkat", "-e", "inject=unlinkat:error=EBUSY"]
    for words, version in ((["deploy", app.artifact("3.0")], "3.0"), (["deploy", app.artifact("4.0")], "4.0"),
                           (["rollback"], "3.0"), (["recover"], "3.0")):
        done = subprocess.run(argv + deploy_argv(*words, config=app.config), env=clean_environment(),
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=60)
        assert (done.returncode, app.version) == (0, version), done.stderr.decode()
        assert any("EBUSY" in warning for warning in json.loads(done.stdout.decode())["warnings"])


def deep_directory(path: Path, levels: int) -> None:
    """Make a directory with so many below it that no path leads to the last."""
    here = os.open(str(path), os.O_RDONLY)
    for _ in range(levels):
        os.mkdir("d", dir_fd=here)
        below = os.open("d", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(here)


def test_what_an_application_left_in_an_old_release_does_not_fail_the_next_deployment(app: App) -> None:
    configure(app, "keep_releases = 1\n")
    first = app.deploy("1.0").data["release"]
    deep_directory(app.root / "releases" / first / "log", 1500)
    try:
        app.deploy("2.0")
        done = app.deploy("3.0").data
        assert (app.version, done["ok"]) == ("3.0", True)
        app.run("rollback", check=0)  # nor any later run
    finally:
        subprocess.call(["rm", "-rf", str(app.root)])


def test_what_an_application_left_in_an_old_release_does_not_stop_a_rollback(app: App) -> None:
    first = deploy_all(app, "1.0", "2.0")[0]
    deep_directory(app.root / "releases" / first / "log", 1500)
    try:
        app.run("rollback", check=0)
        assert app.current == first
    finally:
        subprocess.call(["rm", "-rf", str(app.root)])


# 13
def everything(app: App) -> str:
    """Configuration with every kind of step."""
    command = fake_command(app.directory / "bin", "step")
    hooks = ["pre_stage", "post_stage", "pre_activate", "post_activate", "post_deploy", "pre_rollback", "post_rollback"]
    make_tree(app.root / "shared", {".env": "A=1\n"})
    return ("keep_releases = 1\nshared_dirs = log\nshared_files = .env\n[hooks]\n"
            + "".join(f"{name} = {command.path} {name}\n" for name in hooks)
            + "[template:run]\nsource = run.in\ntarget = etc/run.conf\n[vars]\nport = 8080\n"
            + f"[service:web]\ncommand = {command.path} service\n[probe:web]\ncommand = {command.path} probe\nsuccesses = 1\n")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: Any) -> Saved:
    """An application with every kind of step and four releases, of which prune would take some, to be put back for each case."""
    made = App(tmp_path_factory.mktemp("rich"))
    configure(made, everything(made).replace("keep_releases = 1", "keep_releases = 9"))
    for version in ("0.8", "0.9", "1.0", "2.0"):
        made.deploy(version, {"run.in": "port=${port}\n"})
    configure(made, everything(made))
    return Saved(made)


@pytest.fixture
def rich(prepared: Saved) -> App:
    """That application, as it was made."""
    prepared.restore()
    return prepared.app


@pytest.mark.parametrize("earlier, words", [
    ([], ["pin", "1.0"]), ([], ["stage", "2.9"]), ([], ["rollback"]), (["rollback"], ["activate", "2.0"]), ([], ["prune"]),
    ([], ["deploy", "3.0"]), (["deploy", "3.0"], ["deploy", "3.0"]), (["pin", "1.0"], ["unpin", "1.0"])], ids=" ".join)
def test_a_dry_run_shows_what_the_real_run_does_and_changes_nothing(rich: App, earlier: List[str], words: List[str]) -> None:
    def argv_of(words: List[str]) -> List[Any]:
        made = words[0] in ("stage", "deploy")
        return [words[0], rich.artifact(words[1], {"run.in": "port=${port}\n"})] if made else words
    if earlier:
        rich.run(*argv_of(earlier), check=0)
    argv, before = argv_of(words), snapshot(rich.root)
    dry = rich.run("-n", *argv, check=0).data
    assert snapshot(rich.root) == before
    assert {step["status"] for step in dry["steps"]} <= {"planned"} and dry["dry_run"] is True
    assert [step["name"] for step in dry["plan"]] == [step["name"] for step in dry["steps"]]
    real = rich.run(*argv, check=0).data
    assert [step["name"] for step in dry["steps"]] == [step["name"] for step in real["steps"]]
    assert (dry["changed"], dry["previous"]) == (real["changed"], real["previous"])
