"""The documents say what the code does: README, deploy.ini.example, Makefile, the program's own help."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, List, Set, Tuple

import pytest

from support import DEPLOY, TESTS, TOP, compiled, load_deploy, needs, run_deploy, sha256_of, shape
from tables import README, with_tables

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
    assert re.search(rf"(?m)^\|[ `]*(\d+ / )?{code}\b", readme())


@pytest.mark.parametrize("command", COMMANDS)
def test_the_readme_and_the_help_know_every_command(command: str) -> None:
    assert re.search(rf"(?m)^\|[ `]*{command}\b|deploy\.py [^\n]*\b{command}\b", readme())
    assert command in run_deploy(command, "--help", json=False, check=0).stdout
    assert re.search(rf"(?m)^\s+{command}\b", run_deploy("--help", json=False, check=0).stdout)


def test_the_readmes_reference_is_that_of_the_code() -> None:
    assert readme() == with_tables(readme()), "make example writes it again"


def test_the_readme_has_a_place_for_every_page_of_help_and_every_section() -> None:
    assert sorted(re.findall(r"<!-- help (\S+) -->", readme())) == sorted(deploy.HELP)
    assert sorted(re.findall(r"<!-- table \[(\S+)\] -->", readme())) == sorted(name for name, _, _ in deploy.SECTIONS)


def test_every_link_within_the_readme_leads_to_a_heading() -> None:
    anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in re.findall(r"(?m)^#+ (.*)$", readme())}
    links = set(re.findall(r"\]\(#([^)]*)\)", readme()))
    assert links and links <= anchors


def steps_of(heading: str) -> List[Tuple[str, str]]:
    """Each command line of a section of the README, and what it says that this shows."""
    section = readme().split(f"## {heading}")[1].split("\n## ")[0]
    code = "\n".join(line[4:] for line in section.splitlines() if line.startswith("    "))
    steps = [step.partition("\n") for step in re.split(r"(?m)^\$ ", code)[1:]]
    return [(line, shown) for line, _, shown in steps]


def follow(heading: str, root: str, directory: Path) -> None:
    """Run each command line of a section, with its root in a directory of the test's own, and compare what is shown."""
    binaries = directory / "bin"
    binaries.mkdir()
    (binaries / "deploy.py").write_text(f"#!/bin/sh\nexec {sys.executable} {compiled()} \"$@\"\n")
    (binaries / "deploy.py").chmod(0o755)
    environment = {"PATH": f"{binaries}:{os.environ['PATH']}", "HOME": str(directory)}
    own = str(directory / Path(root).name)
    for line, shown in steps_of(heading):
        run = subprocess.run(["bash", "-c", line.replace(root, own)], cwd=str(directory),
                             env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        said = run.stdout.decode().replace(own, root)
        assert run.returncode == 0, f"$ {line}\n{said}"
        assert shape(said) == shape(shown), f"$ {line}"


def test_the_first_steps_of_the_readme_run_and_show_what_it_says(tmp_path: Path) -> None:
    heading = "From nothing to a first rollback"
    assert len(steps_of(heading)) > 8
    follow(heading, "/srv/shop", tmp_path)
    assert (tmp_path / "shop" / "current" / "index.html").read_text() == "<h1>shop 1.4.1</h1>\n"


def test_a_root_of_capistrano_is_taken_over_as_the_readme_says(tmp_path: Path) -> None:
    heading, releases = "Taking over from Capistrano or Deployer", tmp_path / "blog" / "releases"
    for name in ("20251103091500", "20251121101500"):
        (releases / name).mkdir(parents=True)
        (releases / name / "index.html").write_text("<h1>blog 2.4</h1>\n")
    (tmp_path / "blog" / "current").symlink_to(releases / name)
    assert len(steps_of(heading)) > 2
    follow(heading, "/srv/blog", tmp_path)


def fenced_lines() -> List[str]:
    """The lines of every fenced or indented block of the README, prompts taken off."""
    fenced = re.findall(r"(?ms)^```[^\n]*\n(.*?)^```", readme())
    indented = re.findall(r"(?m)^    (.*)$", readme())
    return [re.sub(r"^\$ ", "", line) for line in "\n".join(fenced + indented).splitlines()]


def test_every_make_command_of_the_readme_exists() -> None:
    targets = set(re.findall(r"(?m)^([a-z-]+):", MAKEFILE.read_text()))
    used = {word for line in fenced_lines() if line.startswith("make ")
            for word in line.split("#")[0].split()[1:] if "=" not in word and not word.startswith("-")}
    assert used, "the README shows no make command"
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
    shown = {(section.replace("NAME", "*"), key.replace("NAME", "*")): given.text for (section, key), given in layer.items()}
    assert shown == {(option.section, option.key): option.default for option in OPTIONS}


def test_the_uncommented_plain_sections_still_mean_the_defaults(tmp_path: Path) -> None:
    # [probe:NAME] and its like are left out, which must say what to probe, and keys that the operator names.
    plain = re.sub(r"(?ms)^\[\w+:NAME\].*?(?=^\[|\Z)|^\w+\.NAME =.*?$", "", uncommented())
    path = tmp_path / "deploy.ini"
    path.write_text(plain, encoding="utf-8")
    settings, defaults = deploy.load_settings([str(path)], {}, []), deploy.load_settings([], {}, [])
    for section in {option.section for option in OPTIONS if not option.section.endswith("*") and option.key != "*"}:
        assert getattr(settings, section) == getattr(defaults, section)
