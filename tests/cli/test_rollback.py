"""rollback goes to the previous good release, or to the one that is named, and only to one that is whole."""

import json
import os
import re
import subprocess
import sys
from typing import Any, Callable, Dict, List

import pytest

from scenes import configure, deploy_all, fails_for
from support import DEPLOY, App, clean_environment, fake_command, file, make_tree, sha256_of, snapshot


@pytest.fixture
def app(app: App) -> App:
    """An application that does not sync the whole filesystem."""
    configure(app)
    return app


@pytest.fixture(scope="module")
def three(tmp_path_factory: Any) -> App:
    """Versions 1.0, 1.1 and 2.0, for tests that change nothing."""
    made = App(tmp_path_factory.mktemp("three"))
    configure(made)
    deploy_all(made, "1.0", "1.1", "2.0")
    return made


# -- where it goes -------------------------------------------------------------

def test_rollback_goes_to_the_release_that_was_live_before(app: App) -> None:
    first, second = deploy_all(app, "1.0", "2.0")
    done = app.run("rollback", check=0).data
    assert (app.current, app.version) == (first, "1.0")
    assert (done["release"], done["previous"], done["changed"], done["rolled_back"]) == (first, second, True, False)
    assert (app.record(first)["state"], app.record(second)["state"]) == ("active", "retired")
    assert app.history()[-1]["result"] == "rolled_back"
    assert app.releases() == sorted([first, second])


def test_a_second_rollback_goes_further_back_until_there_is_nothing(app: App) -> None:
    ids = deploy_all(app, "1.0", "2.0", "3.0", "4.0")
    for expected in reversed(ids[:-1]):
        assert app.run("status", check=0).data["previous"] == expected
        app.run("rollback", check=0)
        assert app.current == expected
    refused = app.run("rollback", check=3).data
    assert app.current == ids[0]
    assert "no previous good release" in refused["error"]["message"] and ids[1] in refused["error"]["hint"]
    app.run("activate", ids[1], check=0)


def test_the_order_is_the_recorded_one_and_never_that_of_names_or_times(app: App) -> None:
    ids = [app.run("deploy", app.artifact(version), "--allow-downgrade", check=0).data["release"] for version in ("9", "10", "5")]
    for age, name in enumerate(ids):
        os.utime(str(app.root / "releases" / name), (1000000 - age, 1000000 - age))
    listed = [release["id"] for release in app.run("releases", check=0).data["releases"]]
    assert listed == ids[::-1]
    app.run("rollback", check=0)
    assert app.version == "10"
    app.run("rollback", check=0)
    assert app.version == "9"


def test_after_a_rollback_a_new_release_goes_back_to_what_was_live(app: App) -> None:
    first = deploy_all(app, "1.0", "2.0")[0]
    app.run("rollback", check=0)
    app.deploy("3.0")
    app.run("rollback", check=0)
    assert app.current == first, "2.0 had been left by hand"


def test_rollback_never_goes_to_a_bad_release(app: App) -> None:
    configure(app, f"[service:web]\ncommand = {fails_for(app.directory / 'bin', '2.0').path}\n")
    first = app.deploy("1.0").data["release"]
    app.run("deploy", app.artifact("2.0"), check=5)
    assert app.run("status", check=0).data["previous"] is None
    app.run("rollback", check=3)
    assert app.current == first
    third = app.deploy("3.0").data["release"]
    app.run("deploy", app.artifact("2.0"), "--force", "--allow-downgrade", check=5)
    assert app.current == third
    app.run("rollback", check=0)
    assert app.current == first


def test_rollback_never_goes_to_a_release_that_was_only_staged(app: App) -> None:
    app.run("stage", app.artifact("0.9"), check=0)
    app.deploy("1.0")
    app.run("stage", app.artifact("1.1"), check=0)
    app.run("rollback", check=3)
    assert app.version == "1.0"


@pytest.mark.parametrize("force", [[], ["--force"]], ids=["plain", "forced"])
def test_what_was_never_live_is_nothing_to_roll_back_to(force: List[str], app: App) -> None:
    """No way back asks the policy or the hold, so it must not lead forward."""
    first = app.deploy("1.0").data["release"]
    staged = app.run("stage", app.artifact("1.1"), check=0).data["release"]
    error = app.run("rollback", staged, *force, check=2).data["error"]
    assert "never live" in error["message"] and app.current == first
    app.run(*error["hint"].split("deploy.py ")[1].split()[2:], check=0)
    assert app.current == staged


def test_what_was_live_once_can_be_rolled_back_to_however_it_came_there(app: App) -> None:
    """Its link was set by hand; it failed once it was live, and is insisted on."""
    app.deploy("1.0")
    staged = app.run("stage", app.artifact("1.1"), check=0).data["release"]
    (app.root / "current").unlink()
    (app.root / "current").symlink_to(f"releases/{staged}")
    app.deploy("1.2")
    assert app.run("rollback", check=0).data["release"] == staged
    app.run("--set", "hooks.post_activate=false", "deploy", app.artifact("1.3"), check=5)
    app.run("rollback", "1.3", check=4)
    app.run("rollback", "1.3", "--force", check=0)
    assert app.version == "1.3"


def test_rollback_passes_over_a_release_that_is_gone(app: App) -> None:
    ids = deploy_all(app, "1.0", "2.0", "3.0")
    os.rename(str(app.root / "releases" / ids[1]), str(app.directory / "gone"))
    app.run("rollback", check=0)
    assert app.current == ids[0]


def test_rollback_with_nothing_live_has_nowhere_to_go(app: App) -> None:
    app.run("rollback", check=2)  # not even a root
    staged = app.run("stage", app.artifact("1.0"), check=0).data["release"]
    app.run("rollback", check=3)
    assert (app.current, app.releases()) == (None, [staged])


def test_rollback_to_what_is_live_changes_nothing(app: App) -> None:
    second = deploy_all(app, "1.0", "2.0")[1]
    done = app.run("rollback", "current", "--detailed-exitcode", check=0).data
    assert (done["changed"], app.current) == (False, second)


def test_status_names_the_very_release_that_rollback_takes(app: App) -> None:
    deploy_all(app, "1.0", "2.0", "3.0")
    app.run("activate", "1.0", check=0)
    promised = app.run("status", check=0).data["previous"]
    assert app.run("rollback", check=0).data["release"] == promised
    assert app.version == "3.0"


def test_rollback_does_not_undo_a_pin(app: App) -> None:
    first = deploy_all(app, "1.0", "2.0")[0]
    app.run("pin", first, check=0)
    app.run("rollback", check=0)
    assert app.record(first)["pinned"] is True


# -- only what is whole ---------------------------------------------------------

def change_file(release: Any) -> str:
    """Change a file without changing its size or its time."""
    path = release / "lib" / "nested" / "data.txt"
    before = path.stat()
    path.write_text(path.read_text().replace("data", "date"))
    os.utime(str(path), ns=(before.st_atime_ns, before.st_mtime_ns))
    return "lib/nested/data.txt"


def remove_file(release: Any) -> str:
    """Remove a file."""
    (release / "VERSION").unlink()
    return "VERSION"


def turn_link(release: Any) -> str:
    """Let a symlink point elsewhere."""
    (release / "data").unlink()
    (release / "data").symlink_to("/etc/passwd")
    return "data"


def drop_mode(release: Any) -> str:
    """Take away the executable bit."""
    (release / "bin" / "run").chmod(0o644)
    return "bin/run"


@pytest.mark.parametrize("damage", [change_file, remove_file, turn_link, drop_mode], ids=lambda damage: damage.__name__)
def test_a_damaged_release_is_refused_before_anything_changes(app: App, damage: Callable[[Any], str]) -> None:
    first, second = deploy_all(app, "1.0", "2.0")
    hook = fake_command(app.directory / "bin", "hook")
    configure(app, f"[hooks]\npre_rollback = {hook.path}\n")
    name = damage(app.root / "releases" / first)
    refused = app.run("rollback", check=1).data
    assert (app.current, app.record(second)["state"], app.leftovers()) == (second, "active", [])
    assert name in refused["error"]["message"] and "verify" in refused["error"]["hint"]
    assert hook.calls() == [], "the verification comes first"
    found = app.run("verify", first, check=7).data
    named = found["differences"]["changed"] + found["differences"]["missing"]
    assert [entry for entry in named if entry.split(" ")[0] == name]


@pytest.mark.parametrize("what", ["changed", "missing"])
def test_a_release_whose_manifest_is_changed_or_missing_is_refused(app: App, what: str) -> None:
    first, second = deploy_all(app, "1.0", "2.0")
    manifest = app.root / ".deploy" / "manifests" / first
    if what == "missing":
        manifest.unlink()
    else:
        change_file(app.root / "releases" / first)
        data = app.root / "releases" / first / "lib" / "nested" / "data.txt"
        manifest.write_text(re.sub(r"(?m)^[0-9a-f]{64}(  .*data\.txt)$", sha256_of(data) + r"\1", manifest.read_text()))
    refused = app.run("rollback", check=3).data
    assert (app.current, "manifest" in refused["error"]["message"]) == (second, True)


def test_files_that_the_application_added_do_not_stop_a_rollback(app: App) -> None:
    first = deploy_all(app, "1.0", "2.0")[0]
    (app.root / "releases" / first / "log" / "today.log").write_text("x")
    done = app.run("rollback", check=0).data
    assert app.current == first
    assert any("today.log" in warning for warning in done["warnings"])


def test_a_rollback_that_fails_returns_to_a_release_that_was_seen_to_be_healthy(app: App) -> None:
    first, second = deploy_all(app, "1.0", "2.0")
    configure(app, f"[probe:web]\ncommand = {fails_for(app.directory / 'bin', '1.0').path}\nsuccesses = 1\ndeadline = 500ms\n")
    done = app.run("rollback", check=5).data
    assert (app.current, done["release"], done["rolled_back"]) == (second, second, True)
    # It was good once: that it does not start now may have another cause, and no version is condemned for it.
    assert (app.record(first)["state"], app.record(second)["state"]) == ("retired", "active")
    assert app.record(first)["failure"]["step"] == app.history()[-1]["failure"]["step"] == "probe:web"


@pytest.mark.parametrize("asked", ["[probe:web]\ncommand = /bin/false\nsuccesses = 1\ndeadline = 500ms\n", ""],
                         ids=["what is left is broken as well", "nothing can be asked"])
def test_a_rollback_that_fails_puts_nobody_back_on_what_was_not_seen_to_be_healthy(asked: str, app: App) -> None:
    first, second = deploy_all(app, "1.0", "2.0")
    configure(app, f"[service:web]\ncommand = {fails_for(app.directory / 'bin', '1.0').path}\n" + asked)
    done = app.run("rollback", check=6).data
    assert (app.current, done["release"], done["rolled_back"]) == (first, first, False)
    assert app.history()[-1]["result"] == "left_live" and not (app.root / ".deploy" / "journal.json").exists()
    configure(app)
    app.run("deploy", app.artifact("3.0"), check=0)
    assert app.version == "3.0", "the run was closed, and the next one is not held up by it"


def test_a_rollback_met_by_a_killed_deployment_goes_one_release_back_and_asks_nothing(app: App) -> None:
    first, second = deploy_all(app, "1.0", "2.0")
    probe = fake_command(app.directory / "bin", "probe", "import signal\nif os.environ['DEPLOY_VERSION'] == '3.0':\n"
                         "    os.kill(os.getppid(), signal.SIGKILL)")
    configure(app, f"[probe:web]\ncommand = {probe.path}\nsuccesses = 1\n")
    app.run("deploy", app.artifact("3.0"), json=False)
    assert app.version == "3.0" and (app.root / ".deploy" / "journal.json").exists()
    asked = len(probe.calls())
    dry = app.run("-n", "rollback", check=0).data
    planned = dry["release"]
    assert "probe:web" in str(dry["plan"]) and "health" not in str(dry["plan"]), "what is left is asked nothing"
    configure(app)
    done = app.run("rollback", check=0).data
    assert app.current == done["release"] == planned == second
    assert len(probe.calls()) == asked and [entry["result"] for entry in app.history()[-2:]] == ["aborted", "rolled_back"]


def test_a_timer_does_not_undo_a_rollback(app: App) -> None:
    first = deploy_all(app, "1.0", "1.1")[0]
    app.run("rollback", check=0)
    refused = app.run("deploy", app.artifact("1.1"), check=4).data["error"]
    assert "1.1 was rolled back from" in refused["message"] and "activate" in refused["hint"]
    assert app.current == first
    app.run("activate", "1.1", check=0)
    assert app.version == "1.1"
    app.run("rollback", check=0)
    app.run("deploy", app.artifact("1.1"), "--force", check=0)
    assert app.version == "1.1"


def test_a_changed_release_is_gone_back_to_by_force_alone_and_the_differences_are_written_down(app: App) -> None:
    first = deploy_all(app, "1.0", "1.1")[0]
    with open(str(app.root / "releases" / first / "VERSION"), "a") as version:
        version.write("and more\n")
    for words in (["-n", "rollback"], ["rollback"]):
        refused = app.run(*words, check=1).data["error"]
    assert "VERSION" in refused["message"] and "--force" in refused["hint"] and app.version == "1.1"
    done = app.run("rollback", "--force", check=0).data
    assert app.current == first and any("VERSION" in warning for warning in done["warnings"])
    assert done["differences"] == {"changed": ["VERSION"], "missing": [], "added": []}
    assert app.history()[-1]["steps"][0]["output"] == ["changed  VERSION"]


def test_all_that_differs_is_kept_two_hundred_by_name(app: App) -> None:
    files = {f"assets/{number:03}.js": "x" for number in range(250)}
    app.deploy("1.0", files)
    first = app.current
    app.deploy("1.1")
    top = app.root / "releases" / str(first)
    for name in sorted(files)[10:]:
        (top / name).unlink()
    for name in sorted(files)[:10]:
        (top / name).write_text("rewritten")
    (top / "bin" / "run").chmod(0o644)
    (top / "by-hand").write_text("")
    refused = app.run("rollback", check=1).data
    done = app.run("rollback", "--force", check=0).data
    for found in (refused, done):
        assert [len(found["differences"][word]) for word in ("changed", "missing", "added")] == [11, 240, 1]
        kept = next(step["output"] for step in found["steps"] if step["name"] == "verify")
        assert (len(kept), kept[0], kept[10], kept[11], kept[-1]) == (
            200, "changed  assets/000.js", "changed  bin/run  has mode 0644, was 0755", "missing  assets/010.js", "missing  assets/198.js")
    assert app.history()[-1]["steps"][0]["output"] == app.history()[-2]["steps"][0]["output"] == kept
    shown = app.run("show", "latest", json=False, check=0).stdout
    assert [line.strip() for line in shown.splitlines() if line.strip() in kept] == kept


@pytest.mark.parametrize("path, mutable, exit_code", [
    ("lib/__pycache__/m.cpython-36.pyc", "", 0), ("lib/old.pyc", "", 0), ("log/app.log", "log", 0), ("log/app.log", "*.log", 1),
    ("log/app.log", "**/*.log", 0), ("log/app.log", "log/*.log", 0), ("log/app.log", "lo", 1)])
def test_bytecode_and_what_is_mutable_never_count(path: str, mutable: str, exit_code: int, app: App) -> None:
    app.deploy("1.0", {path: "as it came"})
    first = app.current
    app.deploy("1.1")
    (app.root / "releases" / first / path).write_text("rewritten")
    configure(app, f"mutable = {mutable}\n")
    app.run("rollback", check=exit_code)
    assert app.run("verify", first).exit_code == (7 if exit_code else 0)


def test_a_rollback_runs_its_hooks_services_and_probes(app: App) -> None:
    first, second = deploy_all(app, "1.0", "2.0")
    hook = fake_command(app.directory / "bin", "hook")
    configure(app, "[hooks]\n" + "".join(f"{name} = {hook.path} {name}\n" for name in
                                         ("pre_activate", "post_activate", "post_deploy", "pre_rollback", "post_rollback"))
              + f"[service:web]\ncommand = {hook.path} service\n[probe:web]\ncommand = {hook.path} probe\nsuccesses = 1\n")
    app.run("rollback", check=0)
    assert hook.calls() == [["probe"], ["pre_rollback"], ["service"], ["probe"], ["post_rollback"]]
    call = hook.details()[1]
    assert (call["env"]["DEPLOY_RELEASE"], call["env"]["DEPLOY_PREVIOUS_RELEASE"]) == (first, second)
    assert call["cwd"] == str(app.root / "releases" / first)


# -- naming a release -----------------------------------------------------------

NAMES = {
    "id": lambda record: record["id"],
    "unique prefix": lambda record: record["id"][:-1],
    "version": lambda record: record["version"],
    "digest": lambda record: record["artifact"]["sha256"],
    "digest prefix": lambda record: record["artifact"]["sha256"][:8],
    "digest prefix in capitals": lambda record: record["artifact"]["sha256"][:8].upper(),
}  # type: Dict[str, Callable[[Any], str]]


@pytest.mark.parametrize("name", list(NAMES))
def test_a_release_can_be_named_in_many_ways(three: App, name: str) -> None:
    record = next(found for found in three.run("releases", check=0).data["releases"] if found["version"] == "2.0")
    assert three.run("verify", NAMES[name](record), check=0).data["release"] == record["id"]


@pytest.mark.parametrize("role, version", [("current", "2.0"), ("previous", "1.1"), ("latest", "2.0")])
def test_a_release_can_be_named_by_its_role(three: App, role: str, version: str) -> None:
    assert three.record(three.run("verify", role, check=0).data["release"])["version"] == version


def test_latest_is_the_newest_and_not_the_live_one(app: App) -> None:
    first, second = deploy_all(app, "1.0", "2.0")
    app.run("rollback", check=0)
    staged = app.run("stage", app.artifact("3.0"), check=0).data["release"]
    assert app.run("verify", "latest", check=0).data["release"] == staged
    assert app.run("verify", "current", check=0).data["release"] == first


def test_an_ambiguous_name_lists_the_candidates_and_changes_nothing(three: App) -> None:
    before = snapshot(three.root)
    for words in (["rollback", "2"], ["verify", "2"], ["-n", "activate", "20"]):
        refused = three.run(*words, check=2).data
        assert all(name in refused["error"]["message"] for name in three.releases())
    after = snapshot(three.root)
    changed = {name for name in set(before) | set(after) if before.get(name) != after.get(name)}
    assert changed <= {".deploy/lock"}


def test_two_releases_of_one_version_are_ambiguous_by_version(app: App) -> None:
    ids = [app.deploy("1.0", {"build": str(number)}).data["release"] for number in range(2)]
    refused = app.run("activate", "1.0", check=2).data
    assert all(name in refused["error"]["message"] for name in ids)
    app.run("activate", ids[0], check=0)
    assert app.current == ids[0], "an exact id is never ambiguous, even where another one begins with it"


def test_an_unknown_name_says_which_releases_there_are(three: App) -> None:
    refused = three.run("rollback", "7.7", check=2).data
    assert "7.7" in refused["error"]["message"]
    assert all(name in refused["error"]["hint"] for name in three.releases())


@pytest.mark.parametrize("name", ["../etc", "", "/", ".", "..", "*", "2.0\n"], ids=repr)
def test_odd_names_of_releases_are_usage_errors(three: App, name: str) -> None:
    three.run("verify", name, check=2)


def test_a_named_rollback_goes_there(app: App) -> None:
    ids = deploy_all(app, "1.0", "2.0", "3.0")
    done = app.run("rollback", "1.0", check=0).data
    assert (app.current, done["previous"]) == (ids[0], ids[2])
    assert json.loads(json.dumps(done))["release"] == ids[0]


def test_releases_marks_the_current_one(three: App) -> None:
    listed = three.run("releases", json=False, check=0).stdout.splitlines()
    marked = [line for line in listed if line.lstrip().startswith("*")]
    assert len(marked) == 1 and str(three.current) in marked[0]
    versions = [found["version"] for found in three.run("releases", check=0).data["releases"]]
    assert versions == ["2.0", "1.1", "1.0"]


DEFECT = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("deploy", sys.argv.pop(1))
deploy = importlib.util.module_from_spec(spec)
sys.modules["deploy"] = deploy
spec.loader.exec_module(deploy)
hooks, proper = sys.argv.pop(1).split(","), deploy.perform_command
deploy.perform_command = lambda run, context, what, *rest: {}["a defect"] if what[5:] in hooks else proper(run, context, what, *rest)
sys.exit(deploy.main())
"""


@pytest.mark.parametrize("hooks, exit_code", [("pre_rollback", 6), ("post_rollback", 6), ("post_activate,pre_rollback", 70)])
def test_a_defect_of_this_program_on_the_way_back_does_not_leave_what_failed_live(app: App, hooks: str, exit_code: int) -> None:
    first = app.deploy("1.0").data["release"]
    configure(app, "[hooks]\npost_activate = false\npre_rollback = true\npost_rollback = true\n")
    done = subprocess.run([sys.executable, "-B", "-c", DEFECT, str(DEPLOY), hooks, "--json", "-c", str(app.config), "deploy",
                           str(app.artifact("1.1"))], env=clean_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert app.current == first, done.stderr.decode()
    data = json.loads(done.stdout.decode())
    assert done.returncode == exit_code == data["exit_code"] and data["release"] == first
    assert "KeyError" in data["error"]["message"]


# -- what another tool left ------------------------------------------------------

def test_what_capistrano_left_is_adopted_and_gone_back_to(app: App) -> None:
    for name in ("20260101120000", "20260201120000"):
        make_tree(app.root / "releases" / name, {"VERSION": name + "\n", "bin/run": file("#!/bin/sh\n", 0o755)})
        (app.root / "releases" / name / "log").symlink_to(str(app.root / "shared" / "log"))
    (app.root / "shared" / "log").mkdir(parents=True)
    (app.root / "current").symlink_to(str(app.root / "releases" / "20260201120000"))
    before = snapshot(app.root / "releases")
    assert app.run("-n", "adopt", "current", check=0).data["changed"] is True
    app.run("adopt", "20260201120000", "-m", "taken over", check=0)
    app.run("adopt", "20260101120000", check=0)
    assert app.run("adopt", "current", check=0).data["changed"] is False
    assert app.run("history", "--verify", check=0).data["warnings"] == []
    assert snapshot(app.root / "releases") == before and app.run("status", check=0).data["status"]["problems"] == []
    listed = app.run("releases", check=0).data["releases"]
    assert [(one["id"], one["version"], one["state"], one["created_at"]) for one in listed] == [
        ("20260201120000", "20260201120000", "active", "2026-02-01T12:00:00Z"),
        ("20260101120000", "20260101120000", "retired", "2026-01-01T12:00:00Z")]
    app.deploy("2.0")
    app.run("rollback", check=0)
    assert app.current == "20260201120000" and not os.readlink(str(app.root / "current")).startswith("/")
    app.run("rollback", check=0)
    assert app.current == "20260101120000" and app.run("verify", check=0)


def test_status_of_what_another_tool_left_says_how_it_becomes_known(app: App) -> None:
    make_tree(app.root / "releases" / "12", {"VERSION": "12\n"})
    (app.root / "current").symlink_to("releases/12")
    app.deploy("13")
    app.run("activate", "12", check=2)
    os.unlink(str(app.root / "current"))
    (app.root / "current").symlink_to("releases/12")
    hint = app.run("status", check=7).data["error"]["hint"]
    assert "adopt 12" in hint or "adopt 12" in json.dumps(app.run("preflight").data["checks"])
    app.run("adopt", "nothing", check=2)
