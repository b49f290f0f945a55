"""The measurements run; what they say is for people, not for the suite."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, List

from support import TESTS, compiled, needs, deep

# What a host may lack: the right to mount, the programs that make these filesystems, a deploy.py that shares files.
MAY_BE_LEFT_OUT = r"second release | on (ext4|xfs|btrfs)\Z"


def bench(*arguments: Any) -> str:
    """Run the measurements of the compiled program; returns what they print."""
    argv = [sys.executable, str(TESTS / "tools" / "bench.py"), "--program", compiled()] + [str(argument) for argument in arguments]
    return subprocess.run(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, check=True).stdout.decode("utf-8")


def names() -> List[str]:
    """The rows that there are."""
    return bench("--list").splitlines()


@deep
def test_every_row_is_measured_and_written_as_json(tmp_path: Path) -> None:
    for tool in ("tar", "gzip", "xz", "zstd", "unzip", "sha256sum", "sync"):
        needs(tool)
    report = tmp_path / "bench.json"
    printed = bench("--scale", 0.0004, "--rounds", 1, "--cache", tmp_path / "cache", "--json", report)
    data = json.loads(report.read_text())
    assert data["scale"] == 0.0004 and data["rounds"] == 1 and data["program"] == compiled()
    assert [row["row"] for row in data["rows"]] == names()
    for row in data["rows"]:
        assert f"\n{row['row']}  (" in printed and len(row["load"]) == 2
        if row["left_out"]:
            assert re.search(MAY_BE_LEFT_OUT, row["row"]) and row["left_out"] in printed, row
            continue
        assert row["figures"] and row["figures"][0]["values"], row
        for figure in row["figures"]:
            assert figure["name"] in printed and bool(figure["values"]) != bool(figure["note"]), row
            assert figure["unit"] not in ("s", "MiB") or figure["median"] is None or figure["median"] > 0 \
                or figure["name"] in ("fixed start-up", "compile only"), row
