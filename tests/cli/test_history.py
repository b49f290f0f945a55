"""The history as a ledger: what was changed or taken away is told for ever, and a crash is no false alarm."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any, Callable, List, Tuple

import pytest

from crashes import Saved, find_call, kill_at, record_calls
from scenes import configure, deploy_all
from support import App, described, load_deploy

deploy = load_deploy()


@pytest.fixture(scope="module")
def template(tmp_path_factory: Any) -> App:
    """An application with three deployments, to be copied."""
    app = App(tmp_path_factory.mktemp("template") / "app")
    configure(app)
    deploy_all(app, "1.0", "1.1", "1.2")
    app.run("history", "--verify", check=0)
    return app


@pytest.fixture
def three(template: App, app: App) -> App:
    """An application of one's own with three deployments."""
    app.root.rmdir()
    shutil.copytree(str(template.root), str(app.root), symlinks=True)
    return app


def history_of(app: App) -> Path:
    """The file."""
    return app.root / ".deploy" / "history.jsonl"


def without(path: Path, number: int) -> None:
    """Take one line away."""
    lines = path.read_bytes().splitlines(True)
    path.write_bytes(b"".join(lines[:number - 1] + lines[number:]))


LOSSES = [
    ("first line", lambda path: without(path, 1), "line 1: the line before it"),
    ("second line", lambda path: without(path, 2), "line 2: the line before it"),
    ("last line changed", lambda path: path.write_text(path.read_text().replace('"1.2"', '"9.9"')), "line 3 is damaged"),
    ("last line rubbish", lambda path: path.write_text(path.read_text() + "rubbish\n"), "line 4 is damaged"),
]  # type: List[Tuple[str, Callable[[Path], Any], str]]


@pytest.mark.parametrize("name,lose,said", LOSSES, ids=[row[0] for row in LOSSES])
def test_what_was_lost_is_told_before_and_after_everything_that_follows(
        name: str, lose: Callable[[Path], Any], said: str, three: App) -> None:
    lose(history_of(three))
    three.run("history", "--verify", check=7)
    for words in (["recover"], ["pin", "1.0"], ["unpin", "1.0"]):
        three.run(*words, check=0)
    error = three.run("history", "--verify", check=7).data["error"]
    assert said in error["message"] and "; " not in error["message"], described(error)


@pytest.mark.parametrize("how", ["gone", "empty"])
def test_a_history_that_was_taken_away_is_missed(how: str, three: App) -> None:
    if how == "gone":
        history_of(three).unlink()
    else:
        history_of(three).write_bytes(b"")
    error = three.run("history", "--verify", check=7).data["error"]
    assert "missing" in error["message"] and "3 releases" in error["message"]
    three.run("pin", "1.0", check=0)
    assert [line["sequence"] for line in three.history()] == [1]
    three.run("unpin", "1.0", check=0)
    three.run("history", "--verify", check=0)


def test_moving_the_file_away_is_how_a_person_starts_over(three: App) -> None:
    without(history_of(three), 2)
    three.run("pin", "1.0", check=0)
    assert "move" in three.run("history", "--verify", check=7).data["error"]["hint"]
    history_of(three).rename(three.directory / "history.jsonl")
    three.run("unpin", "1.0", check=0)
    three.run("history", "--verify", check=0)


@pytest.mark.parametrize("command", ["deploy", "stage"])
def test_the_only_release_is_enough_to_miss_its_history(command: str, app: App) -> None:
    configure(app)
    app.run(command, app.artifact("1.0"), check=0)
    app.run("history", "--verify", check=0)
    history_of(app).unlink()
    app.run("history", "--verify", check=7)


@pytest.mark.parametrize("words", [["deploy", "1.3"], ["pin", "1.0"], ["rollback"], ["recover", "--to", "1.0"]], ids=lambda words: words[0])
def test_a_history_that_is_no_file_stops_whatever_writes_before_anything_changes(three: App, words: List[str]) -> None:
    before = three.current
    history_of(three).rename(three.directory / "history.jsonl")
    history_of(three).mkdir()
    words = [three.artifact("1.3") if word == "1.3" else word for word in words]
    assert "not a regular file" in three.run(*words, check=3).data["error"]["message"]
    assert three.current == before and not (three.root / ".deploy" / "journal.json").exists()
    assert not any(record["pinned"] for record in three.run("releases", check=0).data["releases"])


def test_a_history_that_a_hook_takes_away_does_not_make_a_way_back_something_else(three: App) -> None:
    """What cannot be written down on the way back is a warning: exit 3 said that nothing was changed."""
    before, told = three.current, three.directory / "told"
    lose = f"/bin/sh -c 'cd {three.root}/.deploy; rm history.jsonl; mkdir history.jsonl; exit 1'"
    configure(three, f"[hooks]\npost_activate = {lose}\non_failure = touch {told}\n")
    result = three.run("deploy", three.artifact("1.3"), check=5)
    assert three.current == before and told.exists()
    assert any("the next run recovers it" in warning for warning in result.data["warnings"]), result.describe()
    history_of(three).rmdir()
    configure(three)
    three.run("recover", check=0)
    assert three.current == before and not (three.root / ".deploy" / "journal.json").exists()


def test_a_line_that_was_cut_off_is_told_until_the_next_run_takes_it_away(three: App) -> None:
    """A crash leaves it; whatever writes next cuts it off, and the chain goes on from the line before."""
    with history_of(three).open("ab") as stream:
        stream.write(b'{"sequence": 4, "at": "20')
    assert "line 4 is cut off" in three.run("history", "--verify", check=7).data["error"]["message"]
    assert len(three.run("history", check=0).data["history"]) == 3
    assert three.run("recover", check=0).data["recovered"] == ["cut off a torn line of the history"]
    three.run("history", "--verify", check=0)
    with history_of(three).open("ab") as stream:
        stream.write(b'{"sequence"')
    three.run("pin", "1.0", check=0)
    three.run("history", "--verify", check=0)
    assert [line["sequence"] for line in three.history()] == [1, 2, 3, 4]


@pytest.mark.parametrize("call", ["write", "fsync"])
def test_a_kill_at_a_line_is_no_alarm_once_it_is_recovered(three: App, call: str) -> None:
    saved = Saved(three)
    calls = record_calls(three, "pin", "1.0", check=0)
    saved.restore()
    kill_at(three, find_call(calls, call, r"history\.jsonl>"), "pin", "1.0")
    for words in (["recover"], ["unpin", "1.0"], ["pin", "1.1"]):
        three.run(*words, check=0)
        three.run("history", "--verify", check=0)


def test_the_journal_holds_where_the_history_ended_before(three: App) -> None:
    """Kept elsewhere, the digest of the last line tells later whether all up to there is what it was."""
    kept = three.directory / "kept"
    configure(three, f"[hooks]\npre_activate = cp {three.root}/.deploy/journal.json {kept}\n")
    last = history_of(three).read_bytes().splitlines()[-1]
    three.deploy("1.3")
    assert json.loads(kept.read_text())["chain"] == hashlib.sha256(last).hexdigest() == three.history()[-1]["previous_sha256"]


def test_a_run_that_adds_a_line_during_the_look_is_no_alarm(three: App, monkeypatch: Any) -> None:
    """Whoever only looks takes no lock, so that a line may come between any two files that are read."""
    def opened() -> Any:
        return deploy.Store(str(three.root), deploy.load_settings([], {}, []))

    writer, looking = opened(), opened()
    entry, look = writer.history(1)[0], looking.read_history

    def then_add_a_line() -> Any:
        found = look()
        writer.append_history(entry)
        return found
    monkeypatch.setattr(looking, "read_history", then_add_a_line)
    assert looking.verify_history() == [] and len(three.history()) == 4


def test_the_state_of_an_earlier_version_is_read_and_what_it_needs_no_more_is_swept(three: App) -> None:
    """Version 1.0.0 had a deadline in its journal, the end of the history in a file, and a place to unpack of its own."""
    state = three.root / ".deploy"
    configure(three, "[hooks]\npost_activate = /bin/sh -c 'kill -9 $PPID'\n")
    three.run("deploy", three.artifact("1.3"), json=False)
    for path, drop, more in [(state / "journal.json", ["chain"], {"deadline": "2026-01-01T00:00:00Z"})] + [
            (path, ["note", "application", "built_at", "slot", "migrated"], {}) for path in (state / "releases").glob("*.json")]:
        data = {key: value for key, value in json.loads(path.read_text()).items() if key not in drop}
        path.write_text(json.dumps(deploy.seal(dict(data, **more))))
    lines, before = [], b""
    for entry in three.history():
        for key in ("artifact_sha256", "built_at", "note", "automatic"):
            del entry[key]
        entry["previous_sha256"] = hashlib.sha256(before).hexdigest() if before else ""
        before = json.dumps(deploy.seal(entry)).encode("ascii")
        lines.append(before + b"\n")
    history_of(three).write_bytes(b"".join(lines))
    (state / "history.head").write_text("{}")
    (state / "staging" / ".staging.1.aaaaaaaa.tmp" / "below").mkdir(parents=True)
    configure(three)
    done = three.run("recover", check=0).data["recovered"]
    assert any("was finished: it is live" in text for text in done), done
    assert {"removed .deploy/history.head", "removed .deploy/staging"} <= set(done)
    assert three.version == "1.3" and not three.run("recover", check=0).data["changed"]
    three.run("history", "--verify", check=0)
    three.run("rollback", check=0)
    assert three.version == "1.2" and three.run("status", check=0)
