"""`make demo` works for a newcomer: with nothing installed, and it leaves nothing behind."""

import subprocess
import sys
from pathlib import Path
from typing import List

from support import TESTS, deep


def command_lines() -> List[str]:
    """The command line of every process there is."""
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            lines.append(path.read_bytes().decode("utf-8", "replace"))
        except OSError:
            continue  # it ended meanwhile
    return lines


@deep
def test_the_demo_runs_in_an_empty_environment_and_leaves_nothing(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-B", str(TESTS / "demo" / "demo.py")], env={"TMPDIR": str(tmp_path)},
                          cwd="/", stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=60)
    output = done.stdout.decode("utf-8", "replace")
    assert done.returncode == 0, output
    assert "The demo showed what it promised." in output
    assert "rolled back" in output
    assert list(tmp_path.iterdir()) == []
    assert not any(str(tmp_path) in line for line in command_lines())
