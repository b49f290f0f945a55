"""The history as a ledger: what was changed, cut off or taken away is told for ever, and a crash is no false alarm."""

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


def cut(path: Path, lines: int) -> None:
    """Leave so many lines."""
    path.write_bytes(b"".join(path.read_bytes().splitlines(True)[:lines]))


def without_first(path: Path) -> None:
    """Take the first line away."""
    path.write_bytes(b"".join(path.read_bytes().splitlines(True)[1:]))


LOSSES = [
    ("last line", lambda lines, head: cut(lines, 2), "entry 3 is missing, 4 follows"),
    ("all lines", lambda lines, head: cut(lines, 0), "entry 1 is missing, 4 follows"),
    ("first line", lambda lines, head: without_first(lines), "entry 1 is missing, 2 follows"),
    ("history.jsonl", lambda lines, head: lines.unlink(), "entry 1 is missing, 4 follows"),
    ("history.head", lambda lines, head: head.unlink(), "what came before it is not known"),
    ("last line and history.head", lambda lines, head: (cut(lines, 2), head.unlink()), "what came before it is not known"),
    ("all but one, and history.head", lambda lines, head: (cut(lines, 1), head.unlink()), "what came before it is not known"),
    ("history.head damaged", lambda lines, head: head.write_text("{}"), "what came before it is not known"),
    ("history.head a directory", lambda lines, head: (head.unlink(), head.mkdir()), "history.head"),
    ("last line changed", lambda lines, head: lines.write_text(lines.read_text().replace('"1.2"', '"9.9"')), "line 3 is damaged"),
]  # type: List[Tuple[str, Callable[[Path, Path], Any], str]]


@pytest.mark.parametrize("name,lose,said", LOSSES, ids=[row[0] for row in LOSSES])
def test_what_was_lost_is_told_before_and_after_everything_that_follows(
        name: str, lose: Callable[[Path, Path], Any], said: str, three: App) -> None:
    state = three.root / ".deploy"
    lose(state / "history.jsonl", state / "history.head")
    three.run("history", "--verify", check=7)
    for words in (["recover"], ["pin", "1.0"], ["unpin", "1.0"]):
        three.run(*words, check=0)
    error = three.run("history", "--verify", check=7).data["error"]
    assert said in error["message"] + error["hint"], described(error)


def test_a_history_that_was_taken_away_is_missed_and_the_next_entry_notes_it(three: App) -> None:
    state = three.root / ".deploy"
    for name in ("history.jsonl", "history.head"):
        (state / name).unlink()
    error = three.run("history", "--verify", check=7).data["error"]
    assert "missing" in error["message"] and "3 releases" in error["message"]
    three.run("pin", "1.0", check=0)
    assert [line["sequence"] for line in three.history()] == [1]
    three.run("unpin", "1.0", check=0)
    found = three.run("history", "--verify", check=0)
    assert "begins anew" in found.data["msg"] and "begins anew" in found.data["warnings"][0]


def test_moving_both_files_away_is_how_a_person_starts_over(three: App) -> None:
    state = three.root / ".deploy"
    cut(state / "history.jsonl", 1)
    three.run("pin", "1.0", check=0)
    assert "move" in three.run("history", "--verify", check=7).data["error"]["hint"]
    for name in ("history.jsonl", "history.head"):
        (state / name).rename(three.directory / name)
    three.run("unpin", "1.0", check=0)
    assert three.run("history", "--verify", check=0).data["warnings"]


def test_the_only_release_is_enough_to_miss_its_history(app: App) -> None:
    configure(app)
    app.deploy("1.0")
    assert not app.run("history", "--verify", check=0).data["warnings"], "a first history begins, and not anew"
    for name in ("history.jsonl", "history.head"):
        (app.root / ".deploy" / name).unlink()
    app.run("history", "--verify", check=7)
    app.run("pin", "1.0", check=0)
    assert app.run("history", "--verify", check=0).data["warnings"]


@pytest.mark.parametrize("words", [["deploy", "1.3"], ["pin", "1.0"], ["rollback"], ["recover", "--to", "1.0"]], ids=lambda words: words[0])
@pytest.mark.parametrize("lost", ["", "history.head"], ids=["with its head", "without"])
def test_a_history_that_is_no_file_stops_whatever_writes_before_anything_changes(three: App, words: List[str], lost: str) -> None:
    state, before = three.root / ".deploy", three.current
    (state / "history.jsonl").rename(three.directory / "history.jsonl")
    (state / "history.jsonl").mkdir()
    if lost:
        (state / lost).unlink()
    words = [three.artifact("1.3") if word == "1.3" else word for word in words]
    assert "not a regular file" in three.run(*words, check=3).data["error"]["message"]
    assert three.current == before and not (state / "journal.json").exists()
    assert not any(record["pinned"] for record in three.run("releases", check=0).data["releases"])


def test_a_history_that_a_hook_takes_away_does_not_make_a_way_back_something_else(three: App) -> None:
    """What cannot be written down on the way back is a warning: exit 3 said that nothing was changed."""
    before, told = three.current, three.directory / "told"
    lose = f"/bin/sh -c 'cd {three.root}/.deploy; rm history.jsonl; mkdir history.jsonl; exit 1'"
    configure(three, f"[hooks]\npost_activate = {lose}\non_failure = touch {told}\n")
    result = three.run("deploy", three.artifact("1.3"), check=5)
    assert three.current == before and told.exists()
    assert any("the next run recovers it" in warning for warning in result.data["warnings"]), result.describe()
    (three.root / ".deploy" / "history.jsonl").rmdir()
    configure(three)
    three.run("recover", check=0)
    assert three.current == before and not (three.root / ".deploy" / "journal.json").exists()


@pytest.mark.parametrize("lost", ["", "history.jsonl", "history.head", "both"])
def test_a_kill_between_a_line_and_its_head_is_no_alarm_nor_a_second_one(three: App, lost: str) -> None:
    for name in ("history.jsonl", "history.head"):
        if lost in (name, "both"):
            (three.root / ".deploy" / name).unlink()
    saved = Saved(three)
    calls = record_calls(three, "pin", "1.0", check=0)
    saved.restore()
    kill_at(three, find_call(calls, "renameat", r'"history\.head"', after=r"^write\(.*history\.jsonl>"), "pin", "1.0")
    breaks = {"": 0, "history.jsonl": 1, "history.head": 1, "both": 0}[lost]
    for words in ([], ["recover"], ["unpin", "1.0"], ["pin", "1.1"]):
        if words:
            three.run(*words, check=0)
        result = three.run("history", "--verify", check=7 if breaks else 0)
        assert not breaks or "; " not in result.data["error"]["message"], result.describe()


def test_a_head_that_could_not_be_written_for_a_while_is_no_alarm(three: App) -> None:
    """A disk can be so full that a line finds room and a new file does not."""
    head = three.root / ".deploy" / "history.head"
    before = head.read_bytes()
    for words in (["pin", "1.0"], ["pin", "1.1"], ["unpin", "1.0"]):
        three.run(*words, check=0)
    head.write_bytes(before)
    three.run("history", "--verify", check=0)
    assert three.run("recover", check=0).data["recovered"] == ["brought history.head up to date"]
    assert json.loads(head.read_text())["sequence"] == 6
    three.run("unpin", "1.1", check=0)
    three.run("history", "--verify", check=0)


def test_a_run_that_adds_a_line_during_the_look_is_no_alarm(three: App, monkeypatch: Any) -> None:
    """Whoever only looks takes no lock, so that a line may come between any two files that are read."""
    def opened() -> Any:
        return deploy.Store(deploy.Directory.open(str(three.root)), str)

    writer, looking = opened(), opened()
    entry = writer.history(1)[0]
    added = []  # type: List[Any]

    def then_add_a_line(look: Callable[..., Any]) -> Callable[..., Any]:
        def looked(*args: Any) -> Any:
            found = look(*args)
            added.append(writer.append_history(entry))
            return found
        return looked
    for name in ("_read_head", "history_lines"):
        monkeypatch.setattr(looking, name, then_add_a_line(getattr(looking, name)))
    problems, _ = looking.verify_history()
    assert len(added) == 2 and not problems
