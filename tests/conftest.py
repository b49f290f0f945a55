"""Fixtures: a root, an application, a server."""

import os
import re
import shutil
import signal
import sys
from collections import Counter
from pathlib import Path
from typing import Any, Iterator, List

import pytest

sys.dont_write_bytecode = True
os.umask(0o022)

sys.path[:0] = [str(Path(__file__).resolve().parent / name) for name in ("lib", "tools")]

from support import SET, App, Server  # noqa: E402  (no bytecode beside the sources)


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


def pytest_collection_modifyitems(config: Any, items: List[Any]) -> None:
    """Under DEPLOY_TEST_SHARE=1/3 run the second of every three cases."""
    if SET == "quick":
        items[:] = sampled(items)
    number, shares = (int(word) for word in os.environ.get("DEPLOY_TEST_SHARE", "0/1").split("/"))
    # What is prepared once for all tests of a kind stays together.
    units = [(item.fspath, item.callspec.params["stage"]) if "stage" in getattr(item, "fixturenames", ()) else item for item in items]
    places = {unit: place for place, unit in enumerate(dict.fromkeys(units))}
    kept = [item for item, unit in zip(items, units) if places[unit] % shares == number]
    config.hook.pytest_deselected(items=[item for item, unit in zip(items, units) if places[unit] % shares != number])
    items[:] = kept


def sampled(items: List[Any]) -> List[Any]:
    """Of a table of cases every third, of a long one every ninth; each Python takes others.  The rules of source and README stay whole."""
    cases, kept = Counter(), []  # type: Counter[Any], List[Any]
    count = Counter(getattr(item, "function", None) for item in items)
    for item in items:
        function = getattr(item, "function", None)
        stride = 1 if count[function] <= 4 else 3 if count[function] <= 36 else 9
        if function is None or re.search("test_style|test_docs|test_help", str(item.fspath)) or cases[function] % stride == sys.version_info[1] % stride:
            kept.append(item)
        cases[function] += 1
    return kept


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: Any) -> Iterator[None]:
    """Empty a test's own directory once nothing of the test has failed: all of them together take more than a gigabyte."""
    report = (yield).get_result()  # type: ignore
    item.has_failed = getattr(item, "has_failed", False) or report.failed
    directory = (getattr(item, "funcargs", None) or {}).get("tmp_path")
    if report.when == "teardown" and directory and not item.has_failed:
        empty(directory)


def empty(directory: Path) -> None:
    """Remove what is in a directory, as far as that can be, unless something is mounted there; its name stays taken."""
    with open("/proc/self/mounts") as mounts:
        if f" {directory}/" in mounts.read():
            return
    for name in os.listdir(str(directory)):
        path = directory / name
        try:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(str(path), ignore_errors=True)
            else:
                path.unlink()
        except (OSError, RecursionError):
            pass
