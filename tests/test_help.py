"""`deploy.py help`: the reference is in the file, whatever else is broken."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from support import DEPLOY, load_deploy, run_deploy

deploy = load_deploy()


def lines(topic: Any) -> "list":
    """A page's lines as a terminal gets them."""
    return deploy.help_page(topic.name).splitlines()


@pytest.mark.parametrize("topic", deploy.TOPICS, ids=lambda topic: topic.name)
def test_a_page_fits_a_terminal_in_any_locale(topic: Any) -> None:
    assert [line for line in lines(topic) if len(line) > 79 and not line.startswith("    ")] == []
    assert [line for line in lines(topic) if not re.match(r"[ -~]*\Z", line)] == []
    assert not re.search(r"(?m)^#|^\{\{|```", deploy.help_page(topic.name))


@pytest.mark.parametrize("topic", deploy.TOPICS, ids=lambda topic: topic.name)
def test_a_page_is_shown_without_and_with_json(topic: Any) -> None:
    text = deploy.help_page(topic.name)
    assert text.startswith(f"{topic.name}: {topic.about}\n\n")
    assert run_deploy("help", topic.name, check=0).data["help"] == {"topic": topic.name, "text": text}
    if topic is deploy.TOPICS[0]:
        assert run_deploy("help", topic.name, json=False, check=0).stdout == text


def test_without_a_topic_every_page_is_listed_with_what_to_type_next() -> None:
    text = run_deploy("help", json=False, check=0).stdout
    for topic in deploy.TOPICS:
        assert re.search(rf"(?m)^  {topic.name} +{topic.about[:20]}", text)
    assert "deploy.py help TOPIC" in text and "deploy.py help COMMAND" in text
    assert run_deploy("help", check=0).data["help"] == {"topic": None, "text": text}


def test_help_on_a_command_is_the_commands_own() -> None:
    own = run_deploy("pin", "--help", json=False, check=0).stdout
    assert "RELEASE" in own
    assert run_deploy("help", "pin", json=False, check=0).stdout == own
    assert run_deploy("help", "pin", check=0).data["help"]["text"] == own


@pytest.mark.parametrize("name, meant", [("probs", "probes"), ("exitcodes", "exit-codes"), ("rolback", "rollback")])
def test_an_unknown_topic_is_an_error_that_suggests_the_nearest(name: str, meant: str) -> None:
    result = run_deploy("help", name, check=2)
    assert name in result.data["error"]["message"]
    assert result.data["error"]["hint"] == f"did you mean {meant!r}?"


def test_an_unknown_topic_that_resembles_none_lists_them_all() -> None:
    hint = run_deploy("help", "xyzzy", check=2).data["error"]["hint"]
    assert all(topic.name in hint for topic in deploy.TOPICS)


@pytest.mark.parametrize("way", ["beside", "named", "environment", "value"])
def test_help_reads_no_configuration(way: str, tmp_path: Path) -> None:
    (tmp_path / "deploy.ini").write_text("[nonsense\nroot == =\n")
    environment = {"environment": {"DEPLOY_CONFIG": "deploy.ini"}, "value": {"DEPLOY_DEPLOY_KEEP_RELEASES": "many"}}.get(way, {})
    flags = ["-c", "deploy.ini"] if way == "named" else []
    assert run_deploy("status", *flags, cwd=tmp_path, env=environment, check=2).data["error"]
    result = run_deploy("help", "probes", *flags, cwd=tmp_path, env=environment, json=False, check=0)
    assert result.stdout == deploy.help_page("probes") and result.stderr == ""
    run_deploy("help", "pin", *flags, cwd=tmp_path, env=environment, check=0)


def test_every_table_stands_on_a_page() -> None:
    used = [name for topic in deploy.TOPICS for name in re.findall(r"(?m)^\{\{([\w-]+).*\}\}$", topic.text)]
    assert sorted(set(used)) == sorted(["options", *deploy.TABLES])


def test_every_section_stands_on_one_page_with_all_of_its_keys() -> None:
    assert sorted(section for topic in deploy.TOPICS for section in deploy.sections_of(topic)) \
        == sorted({option.section for option in deploy.OPTIONS}) == sorted(section for section, _ in deploy.SECTION_HELP)
    for option in deploy.OPTIONS:
        name = next(topic.name for topic in deploy.TOPICS if option.section in deploy.sections_of(topic))
        section, key = (text.replace("*", "NAME") for text in (option.section, option.key))
        assert re.search(rf"(?ms)^{re.escape(f'[{section}]')}\n\n.*^  {re.escape(key)} ", deploy.help_page(name)), (section, key)
        assert re.search(rf"(?m)^  {re.escape(f'[{section}]')} .* {name}$", deploy.help_page("configuration"))


def test_a_table_for_a_terminal_wraps_within_its_columns() -> None:
    text = deploy.aligned_table(("key", "means"), [("`a`", "word " * 30), ("long-key", "`b`")])
    rows = text.splitlines()
    assert rows[0] == "  KEY       MEANS"
    assert rows[1].startswith("  a         word word") and rows[2].startswith("            word")
    assert rows[-1] == "  long-key  b"
    assert max(map(len, rows)) <= 79


def test_every_result_has_the_keys_that_the_reference_names(tmp_path: Path) -> None:
    kinds = {"bool": bool, "str": str, "int": int, "float": float, "list": list, "dict": dict}
    for result in (run_deploy("help"), run_deploy("status", root=tmp_path), run_deploy("nonsense"), run_deploy("--help")):
        for key, kind, _ in deploy.RESULT_KEYS:
            assert result.data[key] is None or isinstance(result.data[key], kinds[kind]), key
        assert set(result.data) - {"help", "status"} == {key for key, _, _ in deploy.RESULT_KEYS}


# -- --help ------------------------------------------------------------------

@pytest.mark.parametrize("command", ["", *deploy.COMMANDS])
def test_help_fits_a_terminal_and_says_where_to_read_more(command: str) -> None:
    text = deploy.usage_page(command)
    assert [line for line in text.splitlines() if len(line) > 79 and not line.startswith("  deploy.py ")] == []
    assert text.startswith("usage: deploy.py ") and "\nexit codes:\n  0 " in text
    pages = re.findall(r"deploy\.py help ([\w-]+)", text.split("\nmore: ")[1])
    assert {*pages} <= {topic.name for topic in deploy.TOPICS} and (pages or not command)


@pytest.mark.parametrize("command", deploy.COMMANDS)
def test_the_example_of_a_command_is_a_command_line_of_it(command: str) -> None:
    example, codes = deploy.COMMAND_EXAMPLES[command]
    assert deploy.parse_command_line(shlex.split(example)).command == command
    assert f"\n  deploy.py {example}\n" in deploy.usage_page(command)
    assert codes and set(codes) <= set(dict(deploy.EXIT_CODES)) and list(codes) == sorted(codes)


def test_the_help_of_a_command_tells_its_own_arguments_and_flags_apart() -> None:
    text = deploy.usage_page("pack")
    assert re.search(r"(?m)^  DIRECTORY +directory to pack$", text)
    assert re.search(r"(?m)^  -o FILE, --output FILE +file to write", text)
    assert not re.search(r"(?m)^  --json ", text) and " --json " in text


def test_every_key_that_a_command_adds_to_the_object_is_named() -> None:
    added = set(re.findall(r"outcome\.extra\[\"(\w+)\"\]", DEPLOY.read_text(encoding="utf-8")))
    assert len(added) > 8
    assert {name for name in added if f"`{name}`" not in deploy.help_page("exit-codes")} == set()
