"""The documents say what the code does: README, deploy.ini.example, Makefile, the program's own help."""

import os
import re
import shutil
import subprocess
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any, Dict, List, Set, Tuple

import pytest

from support import DEPLOY, TESTS, TOP, deep, free_port, load_deploy, needs, run_deploy, sha256_of, shape
from tables import README, section, with_tables

EXAMPLE, MAKEFILE = TOP / "deploy.ini.example", TOP / "Makefile"

deploy = load_deploy()
OPTIONS = [option for _, _, options in deploy.SECTIONS for option in options.values()]
COMMANDS = tuple(deploy.COMMANDS)


def option_id(option: Any) -> str:
    """`probe:*.url`, for the tests' names."""
    return f"{option.section}.{option.key}"


def spellings(name: str) -> Set[str]:
    """How a document may write a name with a star: `probe:*`, `probe:NAME`, `json.PATH`."""
    return {name} | {name.replace("*", word) for word in ("NAME", "PATH")}


# -- README ------------------------------------------------------------------

def readme() -> str:
    """The text of the README."""
    return README.read_text(encoding="utf-8")


def table_words() -> List[Set[str]]:
    """For each row of a table in the README: its words, and those of the heading above it."""
    rows, heading = [], set()  # type: List[Set[str]], Set[str]
    for line in readme().splitlines():
        words = set(re.findall(r"[\w.:*-]+", line))
        if line.startswith("#"):
            heading = words
        elif line.startswith("|"):
            rows.append(words | heading)
    return rows


@pytest.mark.parametrize("option", OPTIONS, ids=option_id)
def test_the_readme_has_a_row_for_every_option(option: Any) -> None:
    sections, keys = spellings(option.section), spellings(option.key)
    joined = {f"{section}.{key}" for section in sections for key in keys}
    assert any(words & joined or (words & sections and words & keys) for words in table_words())


@pytest.mark.parametrize("code", sorted({130} | {code for name, code in vars(deploy).items() if name.startswith("EXIT_")}))
def test_the_readme_has_a_row_for_every_exit_code(code: int) -> None:
    assert re.search(rf"(?m)^\|.*\| {code} \||^\| {code} \|", readme())


@pytest.mark.parametrize("command", COMMANDS)
def test_the_readme_and_the_help_know_every_command(command: str) -> None:
    assert re.search(rf"(?m)^\|.*[ >]`{command}[ `]", readme())
    assert command in run_deploy(command, "--help", json=False, check=0).stdout
    assert re.search(rf"(?m)^\s+{command}\b", run_deploy("--help", json=False, check=0).stdout)


def test_the_readmes_reference_is_that_of_the_code() -> None:
    assert readme() == with_tables(readme()), "make example writes it again"


def test_the_readmes_reference_is_whole() -> None:
    assert sorted(re.findall(r"(?m)^<!-- table (\S+) -->$", readme())) == ["commands", "exit-codes", "metrics", "notify-events", "options"]


def test_the_readme_is_short_enough_to_be_read() -> None:
    """Rows of tables and what programs print are as long as they are."""
    lines = readme().splitlines()
    assert len(lines) < 700
    assert [line for line in lines if len(line) > 160 and not line.startswith(("|", "    "))] == []


def test_every_link_within_the_readme_leads_to_a_heading() -> None:
    anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in re.findall(r"(?m)^#+ (.*)$", readme())}
    links = set(re.findall(r"\]\(#([^)]*)\)", readme()))
    assert links and links <= anchors


def tour() -> List[Tuple[str, str]]:
    """Each command of the README's first five minutes, and what it says that this shows."""
    text = section("Five minutes")
    setup = re.search(r"(?ms)^```sh\n(.*?)^```$", text).group(1)  # type: ignore
    transcripts = "".join(line[4:] + "\n" for line in text.splitlines() if line.startswith("    "))
    steps = [step.partition("\n") for step in re.split(r"(?m)^\$ ", transcripts)[1:]]
    return [(setup, "")] + [(line, shown) for line, _, shown in steps]


@deep
def test_the_first_five_minutes_of_the_readme_run_and_show_what_it_says(tmp_path: Path) -> None:
    """One shell runs all of it where deploy.py lies, with a home directory and a port of the test's own."""
    assert len(tour()) == 7
    binaries, clone, home, port = tmp_path / "bin", tmp_path / "clone", tmp_path / "home", str(free_port())
    for directory in (binaries, clone, home):
        directory.mkdir()
    shutil.copy(str(DEPLOY), str(clone))
    (binaries / "python3").write_text(f"#!/bin/sh\nexec {sys.executable} \"$@\"\n")
    (binaries / "python3").chmod(0o755)
    script = "".join(f"{{\n{line}\n}} > {tmp_path}/{number} 2>&1\necho $? >> {tmp_path}/codes\n" for number, (line, _) in enumerate(tour()))
    subprocess.run(["bash", "-c", script.replace("8080", port)], cwd=str(clone),
                   env={"PATH": f"{binaries}:{os.environ['PATH']}", "HOME": str(home)}, stdin=subprocess.DEVNULL, check=True)
    assert (tmp_path / "codes").read_text().split() == ["0", "0", "0", "5", "0", "0", "0"]
    for number, (line, shown) in list(enumerate(tour()))[1:]:
        said = (tmp_path / str(number)).read_text().replace(str(home), "/home/me")
        assert shape(said) == shape(shown), f"$ {line}"
    assert (home / "tour" / "srv" / "current" / "health.json").read_text() == '{"status": "ok", "version": "1.0"}\n'


def test_every_make_command_of_the_readme_exists() -> None:
    targets = set(re.findall(r"(?m)^([a-z-]+):", MAKEFILE.read_text()))
    used = set(re.findall(r"`make ([a-z-]+)`", readme()))
    assert used > {"demo", "test"}
    assert used <= targets


def test_make_release_writes_the_digest_and_says_how_to_sign_and_check_it(tmp_path: Path) -> None:
    for path in (MAKEFILE, DEPLOY):
        shutil.copy(str(path), str(tmp_path))

    def run(*argv: str) -> str:
        return subprocess.run(argv, cwd=str(tmp_path), stdout=subprocess.PIPE, check=True, universal_newlines=True).stdout

    said = run(needs("make"), "-s", "release")
    assert f"{sha256_of(DEPLOY)}  deploy.py\n" == (tmp_path / "deploy.py.sha256").read_text() and f"v{deploy.VERSION}," in said
    run(needs("minisign"), "-G", "-W", "-p", "minisign.pub", "-s", "minisign.key")
    for word in ("sign", "check"):
        shown = re.search(rf"(?m)^{word}: +(.*)$", said).group(1)  # type: ignore
        checked = run("/bin/sh", "-ec", shown.replace("minisign -S", "minisign -S -W"))
    assert "deploy.py: OK" in checked


# -- options and tests -------------------------------------------------------

@lru_cache()
def other_tests() -> str:
    """The text of every test but this one, with `\\n` in literals taken for a line's end."""
    paths = [path for path in sorted(TESTS.glob("*/test_*.py")) if path.name != Path(__file__).name]
    return "\n".join(path.read_text(encoding="utf-8") for path in paths).replace("\\n", "\n")


@pytest.mark.parametrize("option", OPTIONS, ids=option_id)
def test_every_option_is_used_by_a_test(option: Any) -> None:
    section = re.escape(option.section).replace(r"\*", r"\w+")
    key = re.escape(option.key).replace(r"\*", r"[\w.-]+")
    ways = [rf"\b{section}\.{key}\b", rf"\[{section}\][^\[]*?(?<![\w.-]){key}\s*="]
    ways.append(rf"\bDEPLOY_{section.upper()}_{key.upper()}\b")
    if option.section.endswith("*"):
        ways.append(rf"(?<![\w.-]){key}=|[\"']{key}[\"']:")  # KEY=VALUE texts, keyword arguments and dictionaries
    ways += [rf"{flag.names[0]}\b" for flag in deploy.FLAGS if flag.option == option_id(option)]
    if option.section == "deploy":
        ways.append(rf"(?<![\w.-]){key}\s*=")  # App.configure() has opened the section already
    assert re.search("|".join(ways), other_tests(), re.DOTALL)


# -- deploy.ini.example ------------------------------------------------------

def uncommented() -> str:
    """The example with every `#key = value` and every `#[section]` in force."""
    return re.sub(r"(?m)^#(?=\[|[\w.]+ =)", "", EXAMPLE.read_text(encoding="utf-8"))


def values(settings: Any) -> Dict[Tuple[str, str], str]:
    """The text of every plain option."""
    return {(section, key): text for section, key, text, _ in settings.rows if "NAME" not in section + key}


def test_the_example_is_what_config_prints() -> None:
    assert EXAMPLE.read_text(encoding="utf-8") == run_deploy("config", "--example", json=False, check=0).stdout


def test_the_example_as_it_stands_means_the_defaults() -> None:
    settings = deploy.load_settings([str(EXAMPLE)], {}, [])
    assert values(settings) == values(deploy.load_settings([], {}, []))


def test_the_example_shows_every_option_with_its_default(tmp_path: Path) -> None:
    path = tmp_path / "deploy.ini"
    path.write_text(uncommented(), encoding="utf-8")
    layer = {}  # type: Dict[Tuple[str, str], Any]
    deploy.read_ini(str(path), layer, [])
    shown = {(section.replace("NAME", "*"), key.replace("NAME", "*")): text for (section, key), (text, _) in layer.items() if key}
    assert shown == {(option.section, option.key): option.default for option in OPTIONS}


def test_the_uncommented_plain_sections_still_mean_the_defaults(tmp_path: Path) -> None:
    # [probe:NAME] and its like are left out, which must say what to probe, and keys that the operator names.
    plain = re.sub(r"(?ms)^\[\w+:NAME\].*?(?=^\[|\Z)|^\w+\.NAME =.*?$", "", uncommented())
    path = tmp_path / "deploy.ini"
    path.write_text(plain, encoding="utf-8")
    settings, defaults = deploy.load_settings([str(path)], {}, []), deploy.load_settings([], {}, [])
    for section in {option.section for option in OPTIONS if not option.section.endswith("*") and option.key != "*"}:
        assert getattr(settings, section) == getattr(defaults, section)
