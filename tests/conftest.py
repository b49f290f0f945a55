"""Fixtures: a root, an application, a server."""

import os
import signal
import sys
from pathlib import Path
from typing import Iterator

import pytest

sys.dont_write_bytecode = True
os.umask(0o022)

from support import App, Server  # noqa: E402  (no bytecode beside the sources)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """An empty directory to be the root of an application."""
    path = tmp_path / "root"
    path.mkdir()
    return path


@pytest.fixture
def app(tmp_path: Path) -> App:
    """An application with a root, a deploy.ini and a place for its artifacts."""
    return App(tmp_path / "app")


@pytest.fixture
def server(app: App, tmp_path: Path) -> Iterator[Server]:
    """A running server for `app` that reads current/VERSION whenever it is restarted."""
    running = Server(app.root / "current" / "VERSION", tmp_path / "bin")
    yield running
    running.stop()


def pytest_configure() -> None:
    """Undo what a starter may have ignored (nohup, a background job): deploy.py keeps to that, and tests send signals."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
