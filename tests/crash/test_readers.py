"""Whoever reads through `current` while it is switched finds every file, and all of one release.

A short form of `python3 tests/tools/readers.py`, which makes 10,000 switches under a
million opens.
"""

import os
from pathlib import Path
from typing import Any, Optional

import pytest

import readers
from scenes import configure
from support import SET, App, load_deploy, wait_until

# Of a switch that is not one rename (remove, then link) a reader notices within the first few hundred.
SWITCHES, OPENS = 1000, 20000


def test_readers_never_miss_a_file_and_never_see_two_releases_in_one_tree(tmp_path: Path) -> None:
    figures = readers.run(str(tmp_path), SWITCHES, OPENS, readers=2, limit_seconds=60)
    assert (figures.tally.missing, figures.tally.mixed) == (0, 0), figures.line()
    assert figures.switches >= SWITCHES and figures.tally.opens >= OPENS, figures.line()
    assert figures.tally.seen == sorted(readers.name_of(number) for number in range(readers.RELEASES)), figures.line()
    assert sorted(os.listdir(str(tmp_path / "root"))) == [".deploy", "current", "releases", "shared"]


def test_the_readers_notice_a_switch_in_two_calls(tmp_path: Path, monkeypatch: Any) -> None:
    """A test of the test: with `rm` and `ln` in place of the rename, files are missing."""
    def in_two_calls(self: Any, expected: Optional[str], target: str) -> None:
        if expected:
            os.unlink("current", dir_fd=self.top.descriptor)
        os.symlink(f"releases/{target}", "current", dir_fd=self.top.descriptor)

    monkeypatch.setattr(load_deploy().Store, "switch", in_two_calls)
    figures = readers.run(str(tmp_path), SWITCHES, OPENS, readers=2, limit_seconds=60)
    assert figures.tally.missing > 0, figures.line()


def test_deploy_activate_and_rollback_from_the_command_line_keep_readers_content(app: App, tmp_path: Path) -> None:
    """Whole runs of the program, not the switch alone: what is read must be of a release that was made live."""
    configure(app)
    files = {name: "1.0" for name in readers.FILES}
    app.deploy("1.0", files)
    processes = readers.start_readers(str(tmp_path), str(app.root / "current"), 2)
    try:
        wait_until(lambda: all(readers.read_report(report).seen for report in processes), what="both have read 1.0")
        app.deploy("1.1", {name: "1.1" for name in readers.FILES})
        for _ in range(2):
            app.run("rollback", check=0)
            app.run("activate", "1.1", check=0)
        wait_until(lambda: "1.1" in readers.total(list(processes)).seen, what="one has read 1.1")
    finally:
        (tmp_path / "stop").write_text("")
        codes = [process.wait(60) for process in processes.values()]
    tally = readers.total(list(processes))
    assert codes == [0, 0] and (tally.missing, tally.mixed, tally.seen) == (0, 0, ["1.0", "1.1"]), tally


@pytest.mark.skipif(SET != "proof", reason="minutes long: make test-crash, or python3 tests/tools/readers.py")
def test_ten_thousand_switches_under_a_million_opens(tmp_path: Path) -> None:
    figures = readers.run(str(tmp_path), 10000, 1000000, readers=3)
    assert (figures.tally.missing, figures.tally.mixed) == (0, 0), figures.line()
