"""Every bit of what deploy.py believes, a sample: flipped or cut off, it is refused or recovered; tests/tools/damage.py tries them all."""

import shutil
from typing import Any

import pytest

import damage
import replay
from damage import COMMANDS, SCENES, STRIDE, TARGETS, Damage, damages, set_scenes, try_damage
from replay import FastApp
from support import needs


@pytest.fixture(scope="module", autouse=True)
def scenes(tmp_path_factory: Any) -> None:
    """The scenes, played once."""
    needs("strace")
    set_scenes(tmp_path_factory.mktemp("scenes"))


@pytest.mark.parametrize("command", COMMANDS)
def test_no_flipped_bit_and_no_cut_leads_to_a_wrong_switch(command: str) -> None:
    items = damages(STRIDE, [command])
    assert {item.target for item in items} >= {"history", "history with a journal"}
    problems = replay.in_children(try_damage, items, 1, chunk=1 + len(items))
    assert not problems, f"{len(problems)} problems\n" + "\n\n".join(problems[:5])


@pytest.mark.parametrize("command", COMMANDS)
def test_the_judge_lets_an_undamaged_root_pass(command: str) -> None:
    """Without damage every command ends well: the problems above can only come from the damage."""
    for scene in SCENES.values():
        app = FastApp(scene.directory + "-undamaged", scene.directory + "/deploy.ini")
        shutil.rmtree(str(app.directory), ignore_errors=True)
        shutil.copytree(scene.directory + "/root", str(app.root), symlinks=True)
        arguments = {"deploy": ["deploy", scene.artifact], "verify-history": ["history", "--verify"]}
        result = app.run(*arguments.get(command, [command]))
        assert result.exit_code in (0, 7 if command == "status" else 0), result.describe()
        assert app.version == scene.ends[command]


def test_the_judge_sees_a_file_that_is_believed(monkeypatch: Any) -> None:
    target = TARGETS["record of current"]
    change = Damage(target.name, "rollback", None, len(target.data) - 1)
    assert try_damage(change) == [], "a missing last newline changes nothing"
    monkeypatch.setattr(damage, "same_meaning", lambda *_: False)
    assert ["believed" in problem for problem in try_damage(change)] == [True]
