"""`report`: how often it was deployed, how many failed, how long it took to recover and from build to live."""

import csv
import io
import json
import os
from pathlib import Path
from typing import Any, Dict, List
from xml.etree import ElementTree

import pytest

from support import App, load_deploy

deploy = load_deploy()
DAY = "2026-11-0{}T10:00:00Z"


def entry(day: int, operation: str, result: str, release: str, previous: str = "", **fields: Any) -> Any:
    """A line of the history; it went live on that day at nine, and ended at ten."""
    steps = [{"name": "activate", "status": "done", "seconds": 0.1, "started_at": DAY.format(day).replace("10:00", "09:00")}]
    values = dict(
        sequence=day, at=DAY.format(day), deploy_id=f"run{day}", operation=operation, result=result, release=release, version=release,
        previous=previous, exit_code=0, seconds=3600.0, message="", by={"user": "alice"}, steps=steps, failure=None,
        previous_sha256="")  # type: Dict[str, Any]
    return deploy.HistoryEntry(**dict(values, **fields))


def measured(*entries: Any) -> Dict[str, Any]:
    """What the report says of November's first ten days."""
    found = deploy.measure(entries, "2026-11-01T00:00:00Z", "2026-11-11T00:00:00Z")
    assert isinstance(found, dict)
    return found


def test_nothing_is_known_of_no_deployment() -> None:
    found = measured(entry(1, "prune", "pruned", "a"), entry(2, "deploy", "failed", "b"), entry(3, "stage", "staged", "c"))
    assert (found["deployments"], found["failed"], found["runs"]) == (0, 0, [])
    assert [found[key] for key in ("change_fail_rate", "recovery_seconds", "lead_seconds", "rework_rate")] == [None] * 4


def test_one_that_rolled_back_by_itself_failed_and_had_recovered_when_it_ended() -> None:
    found = measured(entry(1, "deploy", "deployed", "a"), entry(2, "deploy", "rolled_back", "b", "a", automatic=True),
                     entry(3, "deploy", "deployed", "c", "a"))
    assert (found["deployments"], found["failed"], found["change_fail_rate"]) == (3, 1, 0.3333)
    assert found["recovery_seconds"] == 3600 and found["per_day"] == 0.3
    assert [run["rework"] for run in found["runs"]] == [False, False, True]


def test_a_line_of_an_earlier_version_has_no_times_of_its_steps() -> None:
    old = entry(1, "deploy", "deployed", "a", steps=[{"name": "activate", "status": "done", "seconds": 0.1, "detail": ""}])
    assert [run["at"] for run in measured(old)["runs"]] == [DAY.format(1)]


def test_one_that_a_person_rolled_back_later_failed_then() -> None:
    found = measured(entry(1, "deploy", "deployed", "a"), entry(2, "deploy", "deployed", "b", "a"),
                     entry(4, "rollback", "rolled_back", "a", "b", automatic=False))
    assert (found["deployments"], found["failed"]) == (2, 1)
    assert found["recovery_seconds"] == 2 * 86400 + 3600


def test_a_rollback_past_an_older_release_fails_nothing_newer() -> None:
    found = measured(entry(1, "deploy", "deployed", "a"), entry(2, "rollback", "rolled_back", "z", "y", automatic=False))
    assert found["failed"] == 0


@pytest.mark.parametrize("result", ["left_live", "rollback_failed"])
def test_one_that_needed_a_person_has_not_recovered_until_something_goes_live(result: str) -> None:
    broken = entry(1, "deploy", result, "a", exit_code=6)
    assert measured(broken)["recovery_seconds"] is None and measured(broken)["failed"] == 1
    assert measured(broken, entry(2, "deploy", "deployed", "b", "a"))["recovery_seconds"] == 86400 + 3600


def test_one_that_a_person_left_after_another_had_failed_is_found_all_the_same() -> None:
    found = measured(entry(1, "deploy", "deployed", "a"), entry(2, "deploy", "rolled_back", "b", "a", automatic=True),
                     entry(3, "rollback", "left_live", "z", "a", exit_code=6), entry(4, "activate", "activated", "y", "z"))
    assert [run["failed"] for run in found["runs"]] == [True, True, False]
    assert [run["recovery_seconds"] for run in found["runs"]] == [3 * 86400 + 3600, 3600, None]


def test_a_rollback_that_was_taken_back_fails_nothing() -> None:
    found = measured(entry(1, "deploy", "deployed", "a"), entry(2, "rollback", "rolled_back", "z", "a", automatic=True, exit_code=5))
    assert found["failed"] == 0


def test_all_that_needed_a_person_have_recovered_together_and_by_no_way_back() -> None:
    broken = [entry(1, "deploy", "left_live", "a"), entry(2, "deploy", "rollback_failed", "b", "a"),
              entry(3, "deploy", "rolled_back", "c", "a", automatic=True)]
    assert [run["well_at"] for run in measured(*broken)["runs"]] == [None, None, DAY.format(3)]
    found = measured(*broken, entry(4, "recover", "recovered", "a"))
    assert [run["well_at"] for run in found["runs"]] == [DAY.format(4), DAY.format(4), DAY.format(3)]


def test_a_run_and_what_a_recovery_made_of_it_are_one_deployment() -> None:
    found = measured(entry(1, "deploy", "rollback_failed", "a"), entry(2, "deploy", "rolled_back", "a", automatic=True, deploy_id="run1"))
    assert (found["deployments"], found["failed"], found["recovery_seconds"]) == (1, 1, 86400 + 3600)


def test_a_build_may_have_ended_within_a_second() -> None:
    assert measured(entry(1, "sync", "synced", "a", built_at=DAY.format(1).replace("10:00:00", "08:00:00.125")))["lead_seconds"] == 3600


def test_lead_time_is_the_median_from_build_to_live() -> None:
    runs = [entry(day, "deploy", "deployed", str(day), built_at=DAY.format(day).replace("10:", hour))
            for day, hour in ((1, "08:"), (2, "07:"), (3, "05:"))]
    assert measured(*runs)["lead_seconds"] == 2 * 3600
    assert measured(*runs[:2])["lead_seconds"] == 1.5 * 3600


def test_what_went_live_before_or_after_is_not_counted() -> None:
    assert deploy.measure([entry(2, "deploy", "deployed", "a")], DAY.format(3), DAY.format(9))["deployments"] == 0


# -- through the command line ------------------------------------------------------

@pytest.fixture
def app(app: App) -> App:
    """An application with two deployments, the second of which failed and was rolled back."""
    app.deploy("1.0")
    app.configure("[hooks]\npost_activate = false")
    app.run("deploy", app.artifact("1.1"), "-m", "a <b>bold</b> try", check=5)
    return app


def test_every_form_says_the_same(app: App, tmp_path: Path) -> None:
    found = app.run("report", check=0).data["report"]
    assert (found["deployments"], found["failed"], len(found["runs"])) == (2, 1, 2)
    printed = app.run("report", "--format", "json", json=False, check=0).stdout
    assert {key: value for key, value in json.loads(printed).items() if key not in ("since", "until")} == {
        key: value for key, value in found.items() if key not in ("since", "until")}
    text = app.run("report", json=False, check=0).stdout
    assert "deployments      2" in text and "change_fail_rate 0.5" in text and "  lead_seconds     -\n" in text
    rows = list(csv.DictReader(io.StringIO(app.run("report", "--format", "csv", json=False, check=0).stdout)))
    assert [(row["version"], row["failed"]) for row in rows] == [("1.0", "False"), ("1.1", "True")]
    assert app.run("report", "--since", "2126-01-01", check=0).data["report"]["deployments"] == 0


def test_the_page_of_an_instant_has_its_run() -> None:
    runs = measured(entry(3, "deploy", "deployed", "a"))["runs"]
    assert 'x="0.0"' in deploy.report_page("shop", runs, {"since": runs[0]["at"], "until": runs[0]["at"]})


def test_the_page_is_whole_by_itself(app: App, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    app.run("-n", "report", "--format", "html", "-o", page, check=0)
    assert not page.exists()
    app.run("report", "--format", "html", "-o", page, check=0)
    text = page.read_text(encoding="utf-8")
    # As strict as XML, but for the two elements that HTML closes by itself.
    body = ElementTree.fromstring(text.partition("\n")[2].replace('charset="utf-8">', 'charset="utf-8"/>').replace(
        'initial-scale=1">', 'initial-scale=1"/>'))
    titles = [found.text for found in body.iter("title")][1:]
    assert len(titles) == 2 and str(titles[1]).endswith("1.1 rolled_back")
    assert [found.get("class") for found in body.iter("rect")] == ["good", "bad"]
    assert "a &lt;b&gt;bold&lt;/b&gt; try" in text and "prefers-color-scheme: dark" in text
    assert not [word for word in ("<script", "http://", "https://", "@import", "url(") if word in text]


@pytest.mark.parametrize("words, said", [
    (["--format", "pdf"], "expected text, csv, json, html"), (["--since", "yesterday"], "expected a time"),
    (["--since", "999999w"], "expected a time"), (["-o", "/nonexistent/report.html"], "/nonexistent: No such file")])
def test_a_report_that_is_mistyped_is_usage(words: List[str], said: str, app: App) -> None:
    assert said in app.run("report", *words, check=2).data["msg"]


def test_a_report_ends_no_device_and_no_link(app: App, tmp_path: Path) -> None:
    link, fifo = tmp_path / "link", tmp_path / "fifo"
    link.symlink_to(fifo)
    os.mkfifo(fifo)
    for path in (link, fifo):
        assert "is no regular file" in app.run("report", "-o", path, check=2).data["msg"]
    assert link.is_symlink() and fifo.is_fifo()
    assert "deployments" in app.run("report", "-o", "-", json=False, check=0).stdout
