"""A few thousand mutated archives: each is unpacked or refused.  tests/tools/fuzz.py takes millions."""

import subprocess
import sys
from pathlib import Path
from typing import Any


import fuzz
from support import TESTS, clean_environment, deep, sized

SEED = 1
INPUTS = sized(quick=1000, whole=3000)


@deep
def test_mutated_archives_are_unpacked_or_refused() -> None:
    argv = [sys.executable, "-B", str(TESTS / "tools" / "fuzz.py"), "--inputs", str(INPUTS), "--seed", str(SEED)]
    done = subprocess.run(argv, env=clean_environment(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, timeout=600 + INPUTS // 10)
    text = done.stdout.decode("utf-8", "replace")
    assert done.returncode == 0, text
    assert " 0 failures" in text.splitlines()[0], text


@deep
def test_many_refusals_and_many_acceptances_are_reached(tmp_path: Path) -> None:
    tally = fuzz.run(1, range(600), str(tmp_path / "ground"))
    assert tally.failures == [] and tally.outcomes["accepted"] > 60 and len(tally.outcomes) > 40


def unchecked_links(monkeypatch: Any) -> None:
    """Symlinks are no longer followed."""
    monkeypatch.setattr(fuzz.deploy.Judge, "_follow", lambda self, name: None)


@deep
def test_the_fuzzer_notices_what_leads_outside(tmp_path: Path, monkeypatch: Any) -> None:
    unchecked_links(monkeypatch)
    tally = fuzz.run(1, range(800), str(tmp_path / "ground"))
    assert any("leads outside" in text for _, text in tally.failures), tally.failures[:5]
