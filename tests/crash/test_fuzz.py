"""A few thousand mutated archives: each is unpacked or refused.  tests/tools/fuzz.py takes millions."""

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import fuzz
from support import TESTS, clean_environment, deep, sized

SEED = 1
INPUTS = sized(quick=1000, whole=3000)


def test_mutated_archives_are_unpacked_or_refused() -> None:
    argv = [sys.executable, "-B", str(TESTS / "tools" / "fuzz.py"), "--inputs", str(INPUTS), "--seed", str(SEED)]
    done = subprocess.run(argv, env=clean_environment(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, timeout=600 + INPUTS // 10)
    text = done.stdout.decode("utf-8", "replace")
    assert done.returncode == 0, text
    assert " 0 failures" in text.splitlines()[0], text


def test_inputs_depend_on_the_seed_and_the_index_alone(monkeypatch: Any) -> None:
    first = [fuzz.make_input(7, index) for index in range(50)]
    monkeypatch.setattr(time, "time", lambda: 2000000000.0)  # nor on the clock, which gzip writes down
    assert [fuzz.make_input(7, index) for index in range(50)] == first
    assert fuzz.make_input(7, 1) != fuzz.make_input(8, 1)


@deep
def test_many_refusals_and_many_acceptances_are_reached(tmp_path: Path) -> None:
    tally = fuzz.run(1, range(600), str(tmp_path / "ground"))
    assert tally.failures == [] and tally.outcomes["accepted"] > 60 and len(tally.outcomes) > 40


def unchecked_names(monkeypatch: Any) -> None:
    """Names are no longer judged."""
    judge = fuzz.deploy.judge_name
    monkeypatch.setattr(fuzz.deploy, "judge_name", lambda *given: (judge(*given)[0], ""))


def files_above(monkeypatch: Any) -> None:
    """Files are written beside the release."""
    write = fuzz.deploy.write_file

    def write_above(entry: Any, *arguments: Any) -> bytes:
        return bytes(write(entry._replace(name=b"../" + entry.name), *arguments))

    monkeypatch.setattr(fuzz.deploy, "write_file", write_above)


def unchecked_links(monkeypatch: Any) -> None:
    """Symlinks are no longer followed."""
    monkeypatch.setattr(fuzz.deploy.Judge, "_follow", lambda self, name: None)


def wide_modes(monkeypatch: Any) -> None:
    """Modes are kept as they are."""
    admit = fuzz.deploy.Judge.admit

    def admit_as_it_is(judge: Any, member: Any) -> Any:
        return [entry._replace(mode=member.mode & 0o7777 | 0o500) for entry in admit(judge, member)]

    monkeypatch.setattr(fuzz.deploy.Judge, "admit", admit_as_it_is)


def wrong_numbers(monkeypatch: Any) -> None:
    """A number that cannot be read is another error."""
    monkeypatch.setattr(fuzz.deploy, "tar_number", lambda field: int(field.strip(b" \0") or b"0", 8))


@deep
@pytest.mark.parametrize("sabotage,failure", [
    (unchecked_names, "FileExistsError"), (files_above, "written outside"), (unchecked_links, "leads outside"),
    (wide_modes, "Wrong"), (wrong_numbers, "ValueError"),
], ids=["names", "files", "links", "modes", "numbers"])
def test_the_fuzzer_notices(tmp_path: Path, monkeypatch: Any, sabotage: Any, failure: str) -> None:
    sabotage(monkeypatch)
    tally = fuzz.run(1, range(800), str(tmp_path / "ground"))
    assert any(failure in text for _, text in tally.failures), tally.failures[:5]
