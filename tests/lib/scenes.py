"""Scenes that several tests play: a quick configuration, a hook that waits, a command that fails for one version."""

import errno
import os
from pathlib import Path
from typing import Any, List, Optional

from support import App, FakeCommand, fake_command, wait_until


def configure(app: App, text: str = "") -> Path:
    """Write deploy.ini without the sync of the whole filesystem, which costs more than all the rest of a tiny release."""
    return app.configure("durable = no\n" + text)


def deploy_all(app: App, *versions: str) -> List[str]:
    """Deploy versions one after the other; returns their ids."""
    return [app.deploy(version).data["release"] for version in versions]


class Gate:
    """A place where a hook waits until the test lets it go on, without a sleep at either end: a FIFO.

    `command` is the hook.  Once open, the gate stays open.
    """

    def __init__(self, directory: Any) -> None:
        top = Path(str(directory))
        top.mkdir(parents=True, exist_ok=True)
        self.path, self._through = top / "gate", top / "gate.open"
        os.mkfifo(str(self.path))
        self.command = f"cat {self.path}"
        self._writer = None  # type: Optional[int]

    def wait_for_visitor(self, timeout: float = 60) -> None:
        """Return once a hook stands before the gate."""
        self._writer = wait_until(self._try_open, timeout, "a hook that waits at the gate")

    def _try_open(self) -> Optional[int]:
        try:
            return os.open(str(self.path), os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            return None

    def open(self) -> None:
        """Let everybody through, now and later."""
        if self._through.exists():
            return
        reader = os.open(str(self.path), os.O_RDONLY | os.O_NONBLOCK)
        writer = os.open(str(self.path), os.O_WRONLY | os.O_NONBLOCK)
        self._through.write_text("")
        os.rename(str(self._through), str(self.path))
        self._through.write_text("")
        for descriptor in (reader, writer, self._writer):
            if descriptor is not None:
                os.close(descriptor)


def fails_for(directory: Any, version: str, say: str = "no such table: users") -> FakeCommand:
    """A command that fails while one version is being made live, and says why; for the others it is well."""
    return fake_command(directory, f"fails-for-{version}", (
        f"if os.environ.get('DEPLOY_VERSION') == {version!r}:\n"
        f"    print({say!r})\n"
        "    sys.exit(4)"))


def alive(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
