"""A sample of what crash_matrix.py tries in full: deploy.py killed, or failing, at its system calls one after the other."""

import sys
from typing import Any, List

import pytest

from crash_scenarios import SCENARIOS, Point, Stage, sample
from crashes import Call, kill_at
from support import deep, needs, sized

# Every how many points one is tried, beside the first of each phase; crash_matrix.py tries them all.
STRIDE = sized(quick=211, whole=37)
# What everything else is made of.
CORE = ["deploy-failing", "deploy-first", "deploy-second", "deploy-slots", "prune", "recover-back", "rollback", "sync"]
# Each Python tries other points.
OFFSET = 13 * sys.version_info[1]
PHASES = {"", "staging", "intent", "switched", "rolling_back", "closed"}


@pytest.fixture(scope="module", params=sized(quick=CORE, whole=sorted(SCENARIOS)))
def stage(request: Any, tmp_path_factory: Any) -> Stage:
    """A scenario, prepared once for all tests."""
    needs("strace")
    return Stage(request.param, tmp_path_factory.mktemp("stage") / "app")


def problems_at(stage: Stage, points: List[Point]) -> str:
    """Try points; what is wrong after each, as one text."""
    assert len(points) >= 2, points
    found = [(point, stage.try_point(point, number)) for number, point in enumerate(points)]
    return "\n".join("\n    ".join([point.describe()] + problems) for point, problems in found if problems)


def test_killed_at_any_call_one_recover_leaves_old_or_new_complete(stage: Stage) -> None:
    assert problems_at(stage, sample(stage.points("kill"), STRIDE, OFFSET)) == ""


@deep
def test_an_error_at_any_call_ends_as_promised(stage: Stage) -> None:
    # A call has five errors on average.
    assert problems_at(stage, sample(stage.points("errno"), 5 * STRIDE, OFFSET)) == ""


@deep
def test_what_cannot_be_read_ends_as_promised(stage: Stage) -> None:
    points = stage.points("read")
    step = min(2 * STRIDE, len(points) // 2)
    assert problems_at(stage, points[OFFSET % step::step]) == ""


@pytest.fixture(scope="module")
def second(tmp_path_factory: Any) -> Stage:
    """A deployment that prunes."""
    needs("strace")
    return Stage("deploy-second", tmp_path_factory.mktemp("second") / "app")


def test_the_matrix_sees_a_run_that_survives(second: Stage) -> None:
    second.saved.restore()
    with pytest.raises(AssertionError, match="was not hit"):
        kill_at(second.app, Call("renameat", 1000, ""), *second.arguments)
    assert second.app.version == "1.2"


def test_the_matrix_sees_what_is_left_in_disorder(second: Stage, monkeypatch: Any) -> None:
    """Something that recovery does not mend, done behind its back."""
    app, restore = second.app, second.saved.restore

    def spoil() -> None:
        restore()
        (app.root / "releases" / str(app.current) / "VERSION").write_text("another\n")

    monkeypatch.setattr(second.saved, "restore", spoil)
    assert "not one of" in problems_at(second, sample(second.points("kill"), 1000)[:2])


def test_the_scenarios_pass_through_every_phase_and_every_kind_of_call(tmp_path: Any) -> None:
    needs("strace")
    seen, names = set(), {}  # type: Any, Dict[str, int]
    for name in ("deploy-first", "deploy-second", "deploy-failing"):
        for call in Stage(name, tmp_path / name).calls:
            seen.add(call.phase)
            names[call.name] = names.get(call.name, 0) + 1
    assert seen == PHASES
    assert {"openat", "write", "fsync", "renameat", "symlinkat", "unlinkat", "mkdirat", "flock"} <= set(names), names
    assert sum(names.values()) > 200
