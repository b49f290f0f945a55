"""`deploy.py help` and `--help`: what the program says about itself, whatever else is broken."""

import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest

from support import DEPLOY, load_deploy, run_deploy
from tables import README, result_keys, section

deploy = load_deploy()


@pytest.mark.parametrize("topic", deploy.HELP)
def test_a_page_fits_a_terminal_in_any_locale(topic: str) -> None:
    lines = deploy.HELP[topic].splitlines()
    assert len(lines) <= 30
    assert [line for line in lines if len(line) > 79 and not line.startswith("    ")] == []
    assert [line for line in lines if not re.match(r"[ -~]*\Z", line)] == []


@pytest.mark.parametrize("topic", deploy.HELP)
def test_a_page_is_shown_without_and_with_json_and_named_in_the_readme(topic: str) -> None:
    text = run_deploy("help", topic, json=False, check=0).stdout
    assert run_deploy("help", topic, check=0).data["help"] == {"topic": topic, "text": text}
    assert f"`deploy.py help {topic}`" in README.read_text(encoding="utf-8")


def test_the_page_on_hooks_names_every_variable() -> None:
    context = deploy.Context("shop", "/srv/shop", "r2", "2", "/srv/shop/releases/r2", "r1", "d1")._replace(
        note="why", failed="r3", candidate_port="8081", slot=SimpleNamespace(name="blue", port=8082))
    names = {*context.variables(), "DEPLOY_HOOK", "TRACEPARENT"}
    assert {"DEPLOY_SLOT_PORT", "DEPLOY_FAILED_PATH"} <= names
    assert [name for name in names if f"`{name}`" not in deploy.HELP["hooks"]] == []


def test_without_a_topic_it_says_what_the_program_is_and_which_pages_there_are() -> None:
    text = run_deploy("help", json=False, check=0).stdout
    assert text.startswith(deploy.__doc__.strip())
    assert all(topic in text.splitlines()[-1] for topic in deploy.HELP)
    assert run_deploy("help", check=0).data["help"] == {"topic": None, "text": text}


def test_help_on_a_command_is_the_commands_own() -> None:
    own = run_deploy("pin", "--help", json=False, check=0).stdout
    assert "RELEASE" in own
    assert run_deploy("help", "pin", json=False, check=0).stdout == own
    assert run_deploy("help", "pin", check=0).data["help"]["text"] == own


@pytest.mark.parametrize("name, meant", [("hoks", "hooks"), ("sistemd", "systemd"), ("rolback", "rollback")])
def test_an_unknown_topic_is_an_error_that_suggests_the_nearest(name: str, meant: str) -> None:
    result = run_deploy("help", name, check=2)
    assert name in result.data["error"]["message"]
    assert result.data["error"]["hint"] == f"did you mean {meant!r}?"


def test_an_unknown_topic_that_resembles_none_lists_them_all() -> None:
    hint = run_deploy("help", "xyzzy", check=2).data["error"]["hint"]
    assert all(topic in hint for topic in deploy.HELP)


@pytest.mark.parametrize("way", ["beside", "named", "environment", "value"])
def test_help_reads_no_configuration(way: str, tmp_path: Path) -> None:
    (tmp_path / "deploy.ini").write_text("[nonsense\nroot == =\n")
    environment = {"environment": {"DEPLOY_CONFIG": "deploy.ini"}, "value": {"DEPLOY_DEPLOY_KEEP_RELEASES": "many"}}.get(way, {})
    flags = ["-c", "deploy.ini"] if way == "named" else []
    assert run_deploy("status", *flags, cwd=tmp_path, env=environment, check=2).data["error"]
    result = run_deploy("help", "hooks", *flags, cwd=tmp_path, env=environment, json=False, check=0)
    assert result.stdout == deploy.HELP["hooks"] and result.stderr == ""
    run_deploy("help", "pin", *flags, cwd=tmp_path, env=environment, check=0)


def test_every_result_has_the_keys_that_the_readme_names(tmp_path: Path) -> None:
    assert len(result_keys()) > 15
    for result in (run_deploy("help"), run_deploy("status", root=tmp_path), run_deploy("nonsense"), run_deploy("--help")):
        for key, kinds in result_keys():
            assert result.data[key] is None or isinstance(result.data[key], kinds), key
        assert set(result.data) - {"help", "status"} == {key for key, _ in result_keys()}


# -- --help ------------------------------------------------------------------

def help_of(*words: str) -> str:
    """What --help shows."""
    with pytest.raises(deploy.HelpAsked) as asked:
        deploy.parse_command_line([*words, "--help"])
    return str(asked.value)


@pytest.mark.parametrize("command", ["", *deploy.COMMANDS])
def test_help_fits_a_terminal_and_begins_with_an_example(command: str) -> None:
    text = help_of(command) if command else help_of()
    assert [line for line in text.splitlines() if len(line) > 79 and not line.startswith("  deploy.py ")] == []
    assert text.startswith("usage: deploy.py [global options] ") and text.index("\nexample:\n") < text.index("--version")


@pytest.mark.parametrize("command", deploy.COMMANDS)
def test_the_example_of_a_command_is_a_command_line_of_it(command: str) -> None:
    example = deploy.COMMAND_HELP[command][1]
    assert deploy.parse_command_line(shlex.split(example)).command == command
    assert f"\n  deploy.py {example}\n" in help_of(command)


def test_the_help_of_a_command_tells_its_own_arguments_and_flags_from_the_global_ones() -> None:
    own, everywhere = help_of("pack").split("\nglobal options, before or after the command:\n")
    assert re.search(r"(?m)^  DIRECTORY +directory to pack$", own)
    assert re.search(r"(?m)^  -o(?: FILE)?, --output FILE +file to write", own)
    assert "--json" in everywhere and "--json" not in own and "--output" not in everywhere


@pytest.mark.parametrize("words", [["--root", "status", "--help"], ["-nh"], ["-h", "pin"]], ids=" ".join)
def test_the_help_of_all_lists_every_command(words) -> None:
    text = run_deploy(*words, json=False, check=0).stdout
    assert all(re.search(rf"(?m)^    {name} ", text) for name in deploy.COMMANDS)


def test_every_key_that_a_command_adds_to_the_object_is_named() -> None:
    added = set(re.findall(r"\.extra\[\"(\w+)\"\]", DEPLOY.read_text(encoding="utf-8")))
    assert len(added) > 8
    assert {name for name in added if f"`{name}`" not in section("Exit codes, errors, JSON")} == set()
