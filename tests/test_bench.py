"""The measurements run; what they say is for people, not for the suite."""

import json
import subprocess
import sys
from pathlib import Path

from support import TESTS, needs


def test_every_row_is_measured_and_written_as_json(tmp_path: Path) -> None:
    for tool in ("tar", "sha256sum", "sync"):
        needs(tool)
    report = tmp_path / "bench.json"
    done = subprocess.run([sys.executable, str(TESTS / "bench.py"), "--scale", "0.0004", "--rounds", "1", "--cache", str(tmp_path),
                           "--json", str(report)], stdout=subprocess.PIPE, check=True)
    rows = json.loads(report.read_text())["rows"]
    assert [row["row"].split()[0] for row in rows] == ["stage", "verify", "status", "deploy", "stage", "stage"]
    for row in rows:
        assert row["row"] in done.stdout.decode() and all(median > 0 for median in row["medians"].values())
