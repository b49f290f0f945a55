"""A run that was killed: what recovery makes of it, row by row of the crash table.

test_crash_matrix.py goes call by call.
"""

import json
import os
import shutil
from typing import Any, Callable, Dict, List, Optional

import pytest

from crash_scenarios import KILL, killed
from crashes import (Saved, content, find_call, inconsistencies, kill_at, record_calls, recover_and_judge, script,
                     unchanged_part)
from support import App, Result, load_deploy, snapshot


def journal(app: App) -> Dict[str, Any]:
    """The journal on disk."""
    return json.loads((app.root / ".deploy" / "journal.json").read_text())


def state_of(app: App, version: str) -> Optional[str]:
    """What the newest record of a version says of it."""
    records = [app.record(path.name[:-5]) for path in (app.root / ".deploy" / "releases").glob("*.json")]
    found = sorted((record["sequence"], record["state"]) for record in records if record["version"] == version)
    return found[-1][1] if found else None


@pytest.fixture
def live(app: App) -> App:
    """An application of which 1.0 is live."""
    app.deploy("1.0")
    return app


# -- the crash table -----------------------------------------------------------

def test_killed_while_unpacking_leaves_the_old_release_alone(live: App) -> None:
    artifact, saved = live.artifact("1.1"), Saved(live)
    calls = record_calls(live, "deploy", artifact, check=0)
    saved.restore()
    kill_at(live, find_call(calls, "symlinkat", r"\.new-.*\"data\""), "deploy", artifact)
    assert len(os.listdir(str(live.root / "releases"))) == 2, "nothing was left: the kill came elsewhere"
    assert recover_and_judge(live, ["1.0"]) == []
    assert state_of(live, "1.1") is None and len(live.releases()) == 1


def test_killed_in_pre_stage_leaves_nothing(live: App) -> None:
    live.configure(f"[hooks]\npre_stage = {KILL}\n")
    killed(live, "deploy", live.artifact("1.1"))
    live.configure()
    assert recover_and_judge(live, ["1.0"]) == []
    assert state_of(live, "1.1") is None


def test_killed_in_post_stage_takes_the_unsealed_release_away(live: App) -> None:
    live.configure(f"[hooks]\npost_stage = {KILL}\n")
    killed(live, "deploy", live.artifact("1.1"))
    assert journal(live)["phase"] == "staging" and len(live.releases()) == 2
    live.configure()
    assert recover_and_judge(live, ["1.0"]) == []


def test_a_staged_release_without_a_journal_stays_staged(live: App) -> None:
    live.run("stage", live.artifact("1.1"), check=0)
    assert recover_and_judge(live, ["1.0"]) == []
    assert state_of(live, "1.1") == "staged" and len(live.releases()) == 2


def test_stage_killed_before_its_verdict_keeps_the_sealed_release(live: App) -> None:
    artifact, saved = live.artifact("1.1"), Saved(live)
    calls = record_calls(live, "stage", artifact, check=0)
    saved.restore()
    kill_at(live, find_call(calls, "openat", "history.jsonl.*O_APPEND"), "stage", artifact)

    def says_so(result: Result) -> None:
        assert "stays staged" in result.data["msg"] and "undone" not in result.data["msg"]

    assert recover_and_judge(live, ["1.0"], says_so) == []
    assert state_of(live, "1.1") == "staged"
    assert live.run("activate", "1.1", check=0).data["changed"] and live.version == "1.1"


def test_killed_with_the_intent_journalled_is_closed_as_aborted_and_may_be_tried_again(live: App) -> None:
    live.configure(f"[hooks]\npre_activate = {KILL}\n")
    killed(live, "deploy", live.artifact("1.1"))
    assert journal(live)["phase"] == "intent" and live.version == "1.0"
    live.configure()
    assert recover_and_judge(live, ["1.0"]) == []
    assert live.history()[-1]["result"] == "aborted" and state_of(live, "1.1") == "staged"
    again = live.run("deploy", live.artifact("1.1"), check=0)
    assert "unpack" not in [step["name"] for step in again.data["steps"]] and live.version == "1.1"


def test_killed_before_the_rename_of_current_leaves_no_temporary_link(live: App) -> None:
    artifact, saved = live.artifact("1.1"), Saved(live)
    calls = record_calls(live, "deploy", artifact, check=0)
    saved.restore()
    kill_at(live, find_call(calls, "renameat", r"\.current\..*\"current\""), "deploy", artifact)
    assert [name for name in os.listdir(str(live.root)) if name.startswith(".current.")] and live.version == "1.0"
    assert recover_and_judge(live, ["1.0"]) == []
    assert live.history()[-1]["result"] == "aborted"


def test_killed_between_the_switch_and_its_note_counts_as_switched(live: App) -> None:
    artifact, saved = live.artifact("1.1"), Saved(live)
    calls = record_calls(live, "deploy", artifact, check=0)
    saved.restore()
    kill_at(live, find_call(calls, "openat", r"\.journal\.json", after=r"\.current\..*\"current\""), "deploy", artifact)
    assert journal(live)["phase"] == "intent" and live.version == "1.1"
    assert recover_and_judge(live, ["1.1"]) == []
    assert (state_of(live, "1.1"), state_of(live, "1.0")) == ("active", "retired")
    assert live.run("rollback", check=0).data["release"] and live.version == "1.0"


@pytest.mark.parametrize("again", [False, True], ids=["once", "killed once more"])
def test_a_way_back_that_nobody_could_note_does_not_make_the_release_bad(again: bool, live: App) -> None:
    """A full disk may take the note and leave the switch: of what failed nothing is known."""
    artifact = live.artifact("1.1")
    live.configure(f"[hooks]\npost_activate = {KILL}\n")
    killed(live, "deploy", artifact)
    os.unlink(str(live.root / "current"))
    os.symlink(next(f"releases/{name}" for name in live.releases() if name.endswith("-1.0")), str(live.root / "current"))
    if again:
        live.configure(f"[hooks]\npre_rollback = {KILL}\n")
        killed(live, "recover")
    live.configure()
    assert recover_and_judge(live, ["1.0"]) == []
    assert (state_of(live, "1.0"), state_of(live, "1.1"), live.history()[-1]["result"]) == ("active", "staged", "rolled_back")
    live.run("deploy", artifact, check=0)


@pytest.mark.parametrize("place", ["elsewhere", "gone"])
def test_where_only_a_person_can_decide_everything_says_so_at_once(live: App, place: str) -> None:
    live.deploy("1.1")
    live.configure(f"[hooks]\npost_activate = {KILL}\n")
    killed(live, "deploy", live.artifact("1.2"))
    live.configure()
    os.unlink(str(live.root / "current"))
    if place == "elsewhere":
        os.symlink(next(f"releases/{name}" for name in live.releases() if name.endswith("-1.0")), str(live.root / "current"))
    for words, exit_code in ((["status"], 7), (["-n", "recover"], 3), (["recover"], 3), (["deploy", live.artifact("1.3")], 3)):
        assert "recover --to RELEASE" in live.run(*words, check=exit_code).data["error"]["hint"], words
    live.run("recover", "--to", "1.1", check=0)
    assert recover_and_judge(live, ["1.1"]) == []


def test_what_came_to_its_end_needs_no_person_wherever_current_went_since(live: App) -> None:
    artifact, saved = live.artifact("1.1"), Saved(live)
    calls = record_calls(live, "stage", artifact, check=0)
    saved.restore()
    kill_at(live, find_call(calls, "unlinkat", r"journal\.json"), "stage", artifact)
    os.unlink(str(live.root / "current"))
    os.symlink(next(f"releases/{name}" for name in live.releases() if name.endswith("-1.1")), str(live.root / "current"))
    assert "--to" not in live.run("status", check=7).data["error"]["hint"]
    live.run("recover", check=0)


def test_no_release_that_is_as_it_was_is_no_dead_end(app: App) -> None:
    """Recovery fails, and the application has written into every release: what the hint says must be taken."""
    broken = "--set", "service:x.command=false"
    live = app.deploy("1.0").data["release"]
    app.run(*broken, "deploy", app.artifact("1.1"), check=6)
    for _ in range(2):
        app.run(*broken, "recover", check=6)
    for release in app.releases():
        (app.root / "releases" / release / "VERSION").write_text("written by the application")
    assert "--force" in app.run("recover", "--to", live, check=1).data["error"]["hint"]
    app.run("recover", "--to", live, "--force", check=0)
    assert app.current == live and app.run("status", check=0)


def test_that_current_is_gone_is_told_until_a_release_is_live_again(live: App) -> None:
    """What should be live stands in its record alone; a command that is refused must not forget it."""
    live.deploy("1.1")
    should = live.current
    os.unlink(str(live.root / "current"))
    for words, exit_code in ((["status"], 7), (["rollback"], 3), (["-n", "rollback"], 3), (["deploy", "/nonexistent.tar.gz"], 4),
                             (["pin", "1.0"], 0), (["prune"], 0), (["recover"], 3), (["-n", "recover"], 3), (["status"], 7)):
        result = live.run(*words, check=exit_code)
        if exit_code in (3, 7):
            assert f"{should} should be live, but current is missing" in result.data["error"]["message"], words
            assert f"recover --to {should}" in result.data["error"]["hint"]
    live.run("recover", "--to", should, check=0)
    assert live.current == should and live.run("status", check=0)
    assert recover_and_judge(live, ["1.1"]) == []
    live.run("rollback", check=0)
    assert live.version == "1.0", "the way back is as it was"


def test_what_should_be_live_and_is_gone_as_well_is_forgotten(live: App) -> None:
    shutil.rmtree(str(live.root / "releases" / live.current))
    os.unlink(str(live.root / "current"))
    for words, exit_code in ((["status"], 7), (["-n", "recover"], 0), (["recover"], 0), (["status"], 0)):
        live.run(*words, check=exit_code)


def test_a_failure_of_before_the_switch_is_not_told_for_one_behind_it(live: App) -> None:
    """What could not be undone leaves its reason in the journal; where `current` moved all the same, the run goes on."""
    move = script(live.directory / "move", "ln -sfn releases/$DEPLOY_RELEASE $DEPLOY_CURRENT_PATH; rmdir $DEPLOY_ROOT/.deploy/trash; exit 1")
    live.configure(f"durable = no\n[hooks]\npre_activate = {move}\n")
    live.run("deploy", live.artifact("1.1"), check=1)
    assert journal(live)["failure"]["step"] == "hook:pre_activate"
    live.configure("[hooks]\npost_activate = false\n")
    live.run("recover")
    failure = live.history()[-1]["failure"]
    assert failure["step"] == "hook:post_activate" and "post_activate" in failure["reason"], failure
    assert live.version == "1.0"


def test_what_should_be_live_is_not_pruned_nor_what_was_before_it(live: App) -> None:
    for version in ("1.1", "1.2"):
        live.deploy(version, check=0)
    live.run("rollback", check=0)
    live.configure("keep_releases = 1\n")
    os.unlink(str(live.root / "current"))
    live.run("prune", check=0)
    assert {name.rpartition("-")[2] for name in live.releases()} >= {"1.0", "1.1"}
    live.run("recover", "--to", "1.1", check=0)
    live.run("rollback", check=0)
    assert live.version == "1.0"


@pytest.mark.parametrize("command, version, states", [
    ("true", "1.1", ("retired", "active")), ("false", "1.0", ("active", "bad")),
], ids=["well", "not well"])
def test_killed_after_the_switch_probes_once_more_and_decides(live: App, command: str, version: str, states: Any) -> None:
    probe = f"[probe:well]\ncommand = %s\ndeadline = {'60s' if command == 'true' else '5s'}\nperiod = 20ms\nsuccesses = 1\n"
    # Only the new release can be unwell: the old one is probed as well on the way back.
    well = script(live.directory / "well", f'test "$DEPLOY_VERSION" = 1.0 || {command}')
    live.configure(f"[hooks]\npost_activate = {KILL}\n" + probe % well)
    killed(live, "deploy", live.artifact("1.1"))
    assert journal(live)["phase"] == "switched" and live.version == "1.1"
    live.configure(probe % well)
    assert recover_and_judge(live, [version]) == []
    assert (state_of(live, "1.0"), state_of(live, "1.1")) == states
    assert len([line for line in live.history() if line["release"] == live.history()[-1]["release"]]) == 1
    if version == "1.0":
        assert live.run("deploy", live.artifact("1.1")).exit_code == 4, "a bad release must not be tried again unasked"


@pytest.mark.parametrize("where", ["in its probe", "in its service"])
def test_killed_by_what_the_new_release_needs_is_decided_by_the_next_deploy(live: App, where: str) -> None:
    kind = "probe:x]\ncommand" if where == "in its probe" else "service:x]\ncommand"
    live.configure(f"[{kind} = {KILL}\n")
    killed(live, "deploy", live.artifact("1.1"))
    assert live.version == "1.1"
    live.configure()
    live.run("deploy", live.artifact("1.2"), check=0)
    assert inconsistencies(live, ["1.2"]) == []
    assert (state_of(live, "1.1"), state_of(live, "1.2")) == ("retired", "active")


@pytest.mark.parametrize("way_back, linked", [
    (f"[hooks]\npre_rollback = {KILL}\n", "1.1"),
    ("[service:x]\ncommand = {killer}\n", "1.0"),
    (f"[hooks]\npost_rollback = {KILL}\n", "1.0"),
], ids=["before the switch back", "after the switch back", "at the end"])
def test_killed_while_rolling_back_goes_on_rolling_back(live: App, way_back: str, linked: str) -> None:
    killer = script(live.directory / "restart", 'test "$DEPLOY_VERSION" = 1.1 || kill -9 $PPID')
    probe = "[probe:sick]\ncommand = /bin/sh -c 'test $DEPLOY_VERSION = 1.0'\ndeadline = 2s\nperiod = 20ms\nsuccesses = 1\n"
    live.configure(way_back.replace("{killer}", str(killer)) + probe)
    killed(live, "deploy", live.artifact("1.1"))
    assert journal(live)["phase"] == "rolling_back" and live.version == linked
    live.configure(probe)
    assert recover_and_judge(live, ["1.0"]) == []
    assert (state_of(live, "1.0"), state_of(live, "1.1")) == ("active", "bad")
    assert "probe sick" in live.history()[-1]["failure"]["reason"], "the reason of the failure was lost in the crash"


def test_killed_before_the_journal_goes_only_the_journal_is_removed(live: App) -> None:
    artifact, saved = live.artifact("1.1"), Saved(live)
    calls = record_calls(live, "deploy", artifact, check=0)
    saved.restore()
    kill_at(live, find_call(calls, "unlinkat", '"journal.json"'), "deploy", artifact)
    history, before = live.history(), content(live.root)
    before.pop(".deploy/journal.json")
    assert recover_and_judge(live, ["1.1"]) == []
    assert live.history() == history and content(live.root) == before


def test_a_hook_that_ended_is_not_run_again_by_a_recovery(live: App) -> None:
    runs = script(live.directory / "runs", f"echo $DEPLOY_HOOK >> {live.directory}/ran")
    live.configure(f"[hooks]\npost_activate = {runs}\npost_deploy = {KILL}\n")
    killed(live, "deploy", live.artifact("1.1"))
    live.configure(f"[hooks]\npost_activate = {runs}\npost_deploy = {runs}\n")
    assert recover_and_judge(live, ["1.1"]) == []
    assert (live.directory / "ran").read_text().split() == ["post_activate", "post_deploy"]


def test_a_sweep_takes_nothing_of_others_from_the_root(live: App) -> None:
    names = [".mine.4711.0badcafe.tmp", ".current.4711.0badcafe.tmp"]
    for name in names:
        (live.root / name).write_text("")
    live.run("recover", check=0)
    assert [(live.root / name).exists() for name in names] == [True, False]


def test_after_the_verdict_current_stays_where_somebody_pointed_it(live: App) -> None:
    """Killed before the journal went, and then somebody pointed `current` back by hand: the link is the truth, whatever the history says."""
    artifact, saved = live.artifact("1.1"), Saved(live)
    before = os.readlink(str(live.root / "current"))
    calls = record_calls(live, "deploy", artifact, check=0)
    saved.restore()
    kill_at(live, find_call(calls, "unlinkat", '"journal.json"'), "deploy", artifact)
    assert live.history()[-1]["result"] == "deployed" and live.version == "1.1"
    (live.root / "current").unlink()
    (live.root / "current").symlink_to(before)
    live.run("recover", check=0)
    assert live.version == "1.0" and inconsistencies(live, ["1.0"]) == []


def test_the_first_deployment_killed_after_the_switch_and_failing_leaves_nothing_live(app: App) -> None:
    probe = "[probe:x]\ncommand = %s\ndeadline = 50ms\nperiod = 20ms\n"
    app.configure(probe % KILL)
    killed(app, "deploy", app.artifact("1.0"))
    assert app.version == "1.0"
    app.configure(probe % "false")
    assert recover_and_judge(app, [None]) == []
    assert not os.path.lexists(str(app.root / "current")) and state_of(app, "1.0") == "bad"


def test_recovery_says_what_it_did_and_reports_a_change(live: App) -> None:
    live.configure(f"[hooks]\npre_activate = {KILL}\n")
    killed(live, "deploy", live.artifact("1.1"))
    live.configure()
    status = live.run("status", check=7)
    assert "recover" in status.data["error"]["hint"] and "1.1" in status.data["error"]["message"]
    before = unchanged_part(live.root)
    assert live.run("-n", "recover", check=0).data["changed"] and unchanged_part(live.root) == before
    done = live.run("recover", check=0)
    assert done.data["changed"] and any("1.1" in line for line in done.data["recovered"])
    assert live.run("--detailed-exitcode", "recover").exit_code == 0


# -- refusals ------------------------------------------------------------------

def kill_after_switch(app: App) -> None:
    """Leave 1.1 switched, with 1.0 as where it came from and 0.9 beside."""
    app.deploy("0.9")
    app.deploy("1.0")
    app.configure(f"[hooks]\npost_activate = {KILL}\n")
    killed(app, "deploy", app.artifact("1.1"))
    app.configure()


@pytest.mark.parametrize("words, plans", [(["prune"], False), (["pin", "current"], True), (["rollback"], True)])
def test_a_dry_run_says_that_a_real_one_would_recover_first(words: List[str], plans: bool, app: App) -> None:
    """`-n prune` said "nothing to do", where a prune would first have run hooks and probes, and perhaps gone back."""
    kill_after_switch(app)
    before = snapshot(app.root)
    data = app.run("-n", *words, check=0).data
    assert [("was interrupted" in warning) for warning in data["warnings"]] == [True]
    assert data["changed"] and bool(data["plan"]) is plans and snapshot(app.root) == before
    app.run("recover", check=0)
    assert app.run("-n", *words, check=0).data["warnings"] == []


def point(app: App, target: str) -> None:
    """Let somebody else point `current` elsewhere."""
    (app.root / "current").unlink()
    (app.root / "current").symlink_to(target)


def to_third(app: App) -> None:
    """`current` at a release that the journal does not know."""
    point(app, "releases/" + [name for name in app.releases() if name.endswith("-0.9")][0])


def to_missing(app: App) -> None:
    """`current` at nothing."""
    point(app, "releases/20200101T000000Z-0.1")


def to_outside(app: App) -> None:
    """`current` outside releases/."""
    point(app, "/etc")


def to_directory(app: App) -> None:
    """`current` is a directory."""
    (app.root / "current").unlink()
    (app.root / "current").mkdir()


@pytest.mark.parametrize("change", [to_third, to_missing, to_outside, to_directory], ids=lambda change: change.__name__)
@pytest.mark.parametrize("command", ["recover", "deploy"])
def test_current_neither_old_nor_new_is_refused_and_nothing_changes(
        app: App, command: str, change: Callable[[App], None]) -> None:
    kill_after_switch(app)
    change(app)
    before = unchanged_part(app.root)
    result = app.run(command, *([app.artifact("1.2")] if command == "deploy" else []))
    assert result.exit_code == 3, result.describe()
    assert "current" in result.data["error"]["message"] and result.data["error"]["hint"]
    assert unchanged_part(app.root) == before
    assert app.run("status").exit_code == 7


@pytest.mark.parametrize("command", ["recover", "prune", "deploy"])
def test_a_missing_target_of_current_is_refused_and_nothing_changes_without_a_journal_either(live: App, command: str) -> None:
    release = live.root / "releases" / str(live.current)
    release.rename(live.directory / "taken away")
    before = unchanged_part(live.root)
    result = live.run(command, *([live.artifact("1.1")] if command == "deploy" else []))
    assert result.exit_code == 3, result.describe()
    assert "current" in result.data["error"]["message"]
    assert unchanged_part(live.root) == before
    # The release is found again: nothing that belongs to it may have been thrown away.
    (live.directory / "taken away").rename(release)
    assert recover_and_judge(live, ["1.0"]) == []


DAMAGES = {
    "empty": lambda data: b"",
    "cut off": lambda data: data[:len(data) // 2],
    "another value": lambda data: data.replace(b'"switched"', b'"intent"'),
    "not JSON": lambda data: b"\x00\xff" * 40,
    "another type": lambda data: b"[]",
    "deep": lambda data: b"[" * 100000,
}  # type: Dict[str, Callable[[bytes], bytes]]


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_a_record_that_cannot_be_read_does_not_pass_for_none_in_a_recovery(app: App, version: str) -> None:
    kill_after_switch(app)
    record = app.root / ".deploy" / "releases" / f"{next(name for name in app.releases() if name.endswith(version))}.json"
    whole = record.read_bytes()
    record.write_bytes(whole[:-20])
    before = unchanged_part(app.root)
    error = app.run("recover", check=3).data["error"]
    assert "cannot recover the deploy of" in error["message"] and str(record) in error["message"] and "recover --to" in error["hint"]
    assert unchanged_part(app.root) == before
    record.write_bytes(whole)
    assert recover_and_judge(app, ["1.0", "1.1"]) == []


@pytest.mark.parametrize("damage", ["empty", "cut off", "another value", "deep"])
def test_a_damaged_journal_is_refused_with_what_to_do_and_settled_by_hand(app: App, damage: str) -> None:
    kill_after_switch(app)
    path = app.root / ".deploy" / "journal.json"
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    before = unchanged_part(app.root)
    # Only one damage is shown to every command; the way there is the same.
    commands = [["recover"]] + ([["deploy", app.artifact("1.2")], ["rollback"], ["prune"]] if damage == "cut off" else [])
    for command in commands:
        result = app.run(*command)
        assert result.exit_code == 3, result.describe()
        assert "journal" in result.data["error"]["message"] and "recover --to" in result.data["error"]["hint"]
        assert unchanged_part(app.root) == before
    assert app.run("status").exit_code == 7
    app.run("recover", "--to", "1.0", check=0)
    assert recover_and_judge(app, ["1.0"]) == []
    app.deploy("1.2")
    assert inconsistencies(app, ["1.2"]) == []


@pytest.mark.parametrize("version", ["0.9", "1.0", "1.1"])
def test_recover_to_settles_on_the_release_that_a_person_names(app: App, version: str) -> None:
    kill_after_switch(app)
    app.run("recover", "--to", version, check=0)
    assert recover_and_judge(app, [version]) == []
    assert app.history()[-1]["result"] == "recovered" and state_of(app, version) == "active"


@pytest.mark.parametrize("under_way", [False, True], ids=["at rest", "under way"])
def test_recover_to_is_the_one_command_that_mends_a_dangling_current(app: App, under_way: bool) -> None:
    if under_way:
        kill_after_switch(app)
        to_missing(app)
    else:
        app.deploy("1.0")
        shutil.rmtree(str(app.root / "releases" / app.deploy("1.1").data["release"]))
    before = unchanged_part(app.root)
    for command in (["recover"], ["-n", "recover"]):
        assert "recover --to" in app.run(*command, check=3).data["error"]["hint"]
    assert "recover --to" in app.run("status", check=7).data["error"]["hint"]
    assert [step["name"] for step in app.run("-n", "recover", "--to", "1.0", check=0).data["plan"]] == ["verify", "activate", "sweep"]
    assert unchanged_part(app.root) == before
    app.run("recover", "--to", "1.0", check=0)
    assert app.version == "1.0" and app.history()[-1]["result"] == "recovered"
    # What had lost its files is forgotten by the next run.
    app.run("recover", check=0)
    assert recover_and_judge(app, ["1.0"]) == []


@pytest.mark.parametrize("change", [to_outside, to_directory], ids=lambda change: change.__name__)
def test_recover_to_replaces_no_current_that_leads_elsewhere(app: App, change: Callable[[App], None]) -> None:
    kill_after_switch(app)
    change(app)
    before = unchanged_part(app.root)
    error = app.run("recover", "--to", "1.0", check=3).data["error"]
    assert str(app.root / "current") in error["hint"] and unchanged_part(app.root) == before


def test_recover_to_a_damaged_release_is_refused(app: App) -> None:
    kill_after_switch(app)
    release = [name for name in app.releases() if name.endswith("-1.0")][0]
    (app.root / "releases" / release / "VERSION").write_text("tampered\n")
    before = unchanged_part(app.root)
    result = app.run("recover", "--to", "1.0")
    assert result.exit_code not in (0, 70), "a release that is not what was staged went live\n" + result.describe()
    assert unchanged_part(app.root) == before


def test_two_automatic_recoveries_that_fail_stop_with_exit_6(live: App) -> None:
    tries = live.directory / "tries"
    # The service cannot be brought onto any release: neither forward nor back.
    service = f"[service:x]\ncommand = {script(live.directory / 'broken', f'echo x >> {tries}; exit 1')}\n"
    live.configure(f"[hooks]\npost_activate = {KILL}\n")
    killed(live, "deploy", live.artifact("1.1"))
    live.configure(service)
    for _ in range(2):
        assert live.run("recover").exit_code == 6
    tried, before = tries.read_text(), unchanged_part(live.root)
    stopped = live.run("recover")
    assert stopped.exit_code == 6 and "recover --to" in stopped.data["error"]["hint"]
    assert live.run("deploy", live.artifact("1.2")).exit_code == 6
    assert tries.read_text() == tried, "a third recovery was tried"
    assert unchanged_part(live.root) == before
    live.configure()
    live.run("recover", "--to", "1.0", check=0)
    assert recover_and_judge(live, ["1.0"]) == []


def test_two_recoveries_that_are_killed_stop_with_exit_6(live: App) -> None:
    live.configure(f"[service:x]\ncommand = {KILL}\n")
    killed(live, "deploy", live.artifact("1.1"))
    for _ in range(2):
        killed(live, "recover")
    assert live.run("recover").exit_code == 6
    live.configure()
    live.run("recover", "--to", "1.1", check=0)
    assert recover_and_judge(live, ["1.1"]) == []


@pytest.mark.parametrize("damage", ["cut off", "another type"])
def test_a_release_is_not_thrown_away_because_its_record_cannot_be_read(live: App, damage: str) -> None:
    """An earlier release is deployed again, killed before the switch, and its record is damaged: recovery asks a person."""
    old, artifact = live.current, live.artifact("1.0")
    live.deploy("1.1")
    live.configure(f"[hooks]\npre_activate = {KILL}\n")
    killed(live, "deploy", "--allow-downgrade", artifact)
    live.configure()
    path = live.root / ".deploy" / "releases" / f"{old}.json"
    whole = path.read_bytes()
    path.write_bytes(DAMAGES[damage](whole))
    result = live.run("recover")
    assert old in live.releases(), f"the rollback's target was deleted\n{result.describe()}"
    assert result.exit_code == 3 and path.name in result.stderr, result.describe()
    path.write_bytes(whole)
    assert recover_and_judge(live, ["1.1"]) == []
    assert live.run("rollback", check=0) and live.version == "1.0"


# -- damaged files -------------------------------------------------------------

def test_a_torn_last_line_of_the_history_is_cut_off_by_the_next_run(live: App) -> None:
    path = live.root / ".deploy" / "history.jsonl"
    with path.open("ab") as stream:
        stream.write(b'{"sequence": 2, "at": "20')
    assert live.run("history", check=0).data["history"][-1]["version"] == "1.0"
    assert live.run("status", check=0)
    live.deploy("1.1")
    assert [line["version"] for line in live.history()] == ["1.0", "1.1"]
    assert inconsistencies(live, ["1.1"]) == [] and live.run("history", "--verify", check=0)


def test_a_history_that_is_only_a_torn_line_starts_over(live: App) -> None:
    (live.root / ".deploy" / "history.jsonl").write_bytes(b'{"seq')
    live.deploy("1.1")
    assert [line["version"] for line in live.history()] == ["1.1"]


@pytest.mark.parametrize("damage", ["cut off", "another type"])
def test_a_damaged_record_is_named_and_nothing_is_changed(live: App, damage: str) -> None:
    live.deploy("1.1")
    path = live.root / ".deploy" / "releases" / f"{live.current}.json"
    whole = path.read_bytes()
    path.write_bytes(DAMAGES[damage](whole))
    before = unchanged_part(live.root)
    status = live.run("status", check=7)
    assert path.name in status.data["error"]["message"] and status.data["error"]["hint"]
    commands = [["deploy", live.artifact("1.2")], ["rollback"], ["prune"], ["-n", "recover"]] if damage == "cut off" else [["rollback"]]
    for command in commands + [["recover"]]:
        result = live.run(*command)
        assert result.exit_code == 3 and path.name in result.stderr, result.describe()
        assert unchanged_part(live.root) == before
    path.write_bytes(whole)
    assert live.run("rollback", check=0) and inconsistencies(live, ["1.0"]) == []


@pytest.mark.parametrize("words,exit_code", [
    (["recover", "--to", "1.0"], 3), (["verify", "1.0"], 7), (["activate", "1.0"], 3), (["pin", "1.0"], 3), (["-n", "recover", "--to", "1.0"], 3)],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "")
@pytest.mark.parametrize("how", ["cut off", "a directory"])
def test_a_release_whose_record_cannot_be_read_is_not_said_to_be_missing(live: App, words: List[str], exit_code: int, how: str) -> None:
    path = live.root / ".deploy" / "releases" / f"{live.current}.json"
    live.deploy("1.1")
    whole = path.read_bytes()
    path.unlink()
    if how == "cut off":
        path.write_bytes(whole[:100])
    else:
        path.mkdir()
    error = live.run(*words, check=exit_code).data["error"]
    assert path.name in error["message"] and error["hint"] and live.version == "1.1"


def test_a_recovery_that_had_something_to_do_tells_the_damaged_record_as_well(live: App) -> None:
    live.deploy("1.1")
    path = live.root / ".deploy" / "releases" / f"{live.releases()[0]}.json"
    live.configure(f"[hooks]\npre_activate = {KILL}\n")
    killed(live, "deploy", live.artifact("1.2"))
    live.configure()
    whole = path.read_bytes()
    path.write_bytes(whole[:100])
    result = live.run("recover", check=3)
    assert path.name in result.data["error"]["message"] and "was not finished" in result.data["recovered"][0]
    path.write_bytes(whole)
    assert recover_and_judge(live, ["1.1"]) == []


@pytest.mark.parametrize("command", ["recover", "rollback", "prune", "deploy"])
def test_a_history_line_too_deep_to_be_read_stops_nothing(live: App, command: str) -> None:
    live.deploy("1.1")
    (live.root / ".deploy" / "history.jsonl").write_text("[" * 100000 + "\n")
    result = live.run(command, *([live.artifact("1.2")] if command == "deploy" else []))
    assert result.exit_code == 0 and "Traceback" not in result.stderr, result.describe()
    assert live.run("history", "--verify").exit_code == 7


INSTEAD = {"a directory": lambda path: path.mkdir(), "a link": lambda path: path.symlink_to("elsewhere"),
           "a fifo": lambda path: os.mkfifo(str(path)), "a file": lambda path: path.write_text("")}  # type: Dict[str, Callable[[Any], Any]]


@pytest.mark.parametrize("name,what", [
    (".deploy/history.jsonl", "a directory"), (".deploy/history.jsonl", "a link"), (".deploy/history.jsonl", "a fifo"),
    (".deploy", "a link"), ("releases", "a file"), (".deploy/manifests", "a file")])
def test_something_else_in_the_place_of_the_state_is_named_and_refused(live: App, name: str, what: str) -> None:
    path = live.root / name
    path.rename(live.directory / "away")
    INSTEAD[what](path)
    before = unchanged_part(live.root)
    artifact = live.artifact("1.1")
    for words in (["status"], ["history"], ["show", "1"], ["verify"], ["recover"], ["deploy", artifact], ["pin", "1.0"]):
        result = live.run(*words)
        if result.exit_code == 0 and words[0] in ("status", "history", "show", "verify"):
            continue  # it did not need it
        assert result.exit_code == (7 if words[0] in ("status", "history", "show", "verify") else 3), result.describe()
        assert path.name in result.data["error"]["message"] and str(live.root) in result.data["error"]["message"], result.describe()
    assert unchanged_part(live.root) == before
    path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
    (live.directory / "away").rename(path)
    live.run("history", "--verify", check=0)
    assert recover_and_judge(live, ["1.0"]) == []


@pytest.mark.parametrize("path,key,value", [
    ("releases/{release}.json", "tree", {"bytes": "many"}), ("releases/{release}.json", "tree", []), ("releases/{release}.json", "artifact", []),
    ("releases/{release}.json", "sequence", "1"), ("releases/{release}.json", "state", 1), ("releases/{release}.json", "by", None),
    ("journal.json", "plan", None), ("journal.json", "recoveries", "x"), ("journal.json", "to", 3)], ids=str)
def test_what_was_edited_by_hand_and_sealed_again_is_no_traceback(live: App, path: str, key: str, value: Any) -> None:
    live.configure(f"[hooks]\npost_activate = {KILL}\n")
    killed(live, "deploy", live.artifact("1.1"))
    live.configure()
    edited = live.root / ".deploy" / path.format(release=live.current)
    data = dict(json.loads(edited.read_text()), **{key: value})
    edited.write_text(json.dumps(load_deploy().seal(data)))
    for words in (["status"], ["releases"], ["recover"], ["-n", "recover"], ["rollback"]):
        result = live.run(*words)
        assert result.exit_code in (3, 7) and "proper" in result.stderr or words == ["releases"] and result.exit_code == 0, result.describe()


def test_a_choice_by_hand_of_what_is_live_and_damaged_changes_nothing(app: App) -> None:
    app.configure("durable = no\n")
    live = app.deploy("1.0").data["release"]
    next(path for path in (app.root / "releases" / live).iterdir() if path.is_file()).write_text("changed")
    assert app.run("recover", "--to", "1.0", check=1).data["release"] == app.current == live


def test_a_choice_by_hand_that_is_refused_names_what_is_live(app: App) -> None:
    app.configure("durable = no\n")
    first, second = app.deploy("1.0").data["release"], app.deploy("1.1").data["release"]
    next(path for path in (app.root / "releases" / first).iterdir() if path.is_file()).write_text("changed")
    result = app.run("recover", "--to", "1.0", check=1)
    assert result.data["release"] == app.current == second, "what is live, not what was chosen"


def test_a_choice_by_hand_that_cannot_be_noted_is_no_failure_before_the_switch(app: App) -> None:
    """Exit 1 promises that `current` is as before."""
    app.configure("durable = no\n")
    first, _ = app.deploy("1.0").data["release"], app.deploy("1.1")
    app.configure("durable = no\n[service:x]\ncommand = /bin/sh -c 'rm -r $DEPLOY_ROOT/.deploy/releases'\n")
    result = app.run("recover", "--to", "1.0", check=6)
    assert result.data["release"] == app.current == first
    assert f"{first} is live" in result.data["error"]["message"] and "recover --to" in result.data["error"]["hint"]
