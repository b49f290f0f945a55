"""Every snippet of the README is one that its reader understands: deploy.py, systemd, cron.

Each block has one kind, told by how it begins; a block of a kind that is not
listed here fails, so that no snippet goes untested by accident.
"""

import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any, List, NamedTuple, Tuple

import pytest

import tables
from support import DEPLOY, load_deploy, needs, deep
from tables import README

deploy = load_deploy()


class Snippet(NamedTuple):
    """One block of code: the heading it stands under, and its text without indentation or fence."""

    heading: str
    text: str


# kind: how such a block begins, comments aside.
SECTIONS = "|".join(sorted({section.partition(":")[0] for section in deploy.OPTIONS}))
KINDS = (
    ("transcript", r"\w*\$ "),
    ("ini", rf"\[({SECTIONS})(:\w+)?\]$"),
    ("unit", r"\[(Unit|Service|Timer|Path|Install)\]$"),
    ("crontab", r"([*/0-9,-]+ ){5}\w+ |[A-Z]+=\S*$"),
    ("commands", r"(sudo |\w+=\S+ )*((/[\w/]+/|\./)?deploy\.py |install )"),
    ("tour", r"mkdir -p ~/tour/shop$"),  # run by test_docs.py
    ("playbook", r"- hosts: "),  # test_ansible.py runs it
    ("image", r"(RUN|HEALTHCHECK) "),  # run by test_near_empty.py
    ("rules", r"groups:$"),  # asked of promtool by test_metrics.py
    ("group", r"chgrp "),  # run by test_group.py
    ("signing", r"minisign |said=\$\(gpgv"),  # other tools' commands; test_signatures.py runs their like
    ("pipeline", r"deploy:$|on: \{push|// Jenkinsfile$"),  # run by test_ci_snippets.py
    ("script", r"python3 deploy\.py pack build "),  # and this
    ("nginx", r"error_page "),  # served by test_maintenance.py
    ("haproxy", r"backend "),  # and this
    ("index", r"\{\"schema\""),  # followed by test_sync.py
    ("publishing", r"(cp|sha256sum) shop-|api=|url="),  # and run by it
    ("proxy", "include /srv/shop/slots/live.conf;$"),  # what test_slots.py asks through
)  # type: Tuple[Tuple[str, str], ...]


def snippets(text: str) -> List[Snippet]:
    """Every fenced or indented block of a Markdown text, in order."""
    found, heading, block, fence = [], "", [], ""  # type: List[Snippet], str, List[str], str
    for line in text.splitlines() + ["end"]:
        if line.startswith("```"):
            fence = "" if fence else line
        elif fence or line.startswith("    ") or block and not line:
            block.append(line if fence else line[4:])
            continue
        if "\n".join(block).strip():
            found.append(Snippet(heading, "\n".join(block).strip("\n")))
        block = []
        heading = line.lstrip("# ") if line.startswith("#") else heading
    return found


def kind_of(snippet: Snippet) -> str:
    """Which of KINDS a block is."""
    first = next((line for line in snippet.text.splitlines() if line.strip() and not line.startswith("#")), "")
    return next((kind for kind, beginning in KINDS if re.match(beginning, first)), "unknown")


SNIPPETS = snippets(README.read_text(encoding="utf-8"))


def all_of(kind: str) -> Any:
    """Parametrize a test by every block of a kind."""
    found = [snippet for snippet in SNIPPETS if kind_of(snippet) == kind]
    return pytest.mark.parametrize("snippet", found, ids=[snippet.heading.replace(" ", "-") for snippet in found])


def command_lines(text: str) -> List[str]:
    """The arguments of every deploy.py that a block starts, its output left out; a backslash joins lines."""
    joined = re.sub(r"\\\n\s*", "", text)
    lines = [line for line in joined.splitlines() if line.startswith("$ ")] if text.startswith("$ ") else joined.splitlines()
    return [found.group(1) for line in lines for found in [re.search(r"(?<![\w.-])deploy\.py (?!\|)([^)|>]*?)(?: 2?>.*)?(?:[)|]|$)", line)]
            if found and not re.search(r"(install|cp) .*deploy\.py", line)]


def test_the_blocks_of_a_text_are_found() -> None:
    text = "# One\n\n    a\n\n    b\ntext\n## Two\n```ini\n[c]\n\n    d\n```\n\n    e\n"
    assert snippets(text) == [("One", "a\n\nb"), ("Two", "[c]\n\n    d"), ("Two", "e")]


@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda snippet: snippet.heading.replace(" ", "-"))
def test_every_snippet_is_of_a_kind_that_is_tested(snippet: Snippet) -> None:
    assert kind_of(snippet) != "unknown", "tell in KINDS what this is, and test it"


def inline() -> List[str]:
    """What stands between backticks in the README's prose."""
    prose = re.sub(r"(?ms)^```.*?^```$|^    .*?$|^\|.*?$", "", README.read_text(encoding="utf-8"))
    return [re.sub(r"\s+", " ", code) for code in re.findall(r"`([^`]+)`", prose)]


def lines_of_prose() -> List[str]:
    """The arguments of every deploy.py in the README's prose."""
    return [code[len("deploy.py "):] for code in inline() if code.startswith("deploy.py ")]


def test_the_prose_has_commands_and_settings_to_be_looked_at() -> None:
    assert len(lines_of_prose()) > 10 and "config --example" in inline() and "action = reload" in inline()


@pytest.mark.parametrize("line", [line for found in SNIPPETS if kind_of(found) != "pipeline" for line in command_lines(found.text)]
                         + lines_of_prose())
def test_every_command_line_is_understood(line: str) -> None:
    words = shlex.split(re.sub(r"\$(\w|{.*?})", "1.4.2", line), comments=True)
    words = words[2:] if words[0] == "--delegate" else words
    if not {"COMMAND", "TOPIC", "*"}.intersection(words):
        try:
            assert deploy.parse_command_line(words).command in deploy.COMMANDS
        except deploy.HelpAsked:
            pass


@pytest.mark.parametrize("code", [code for code in inline() if re.match(r"(\[[\w:]+\] )?[a-z_.]+ = ", code)])
def test_every_setting_in_the_prose_is_one_of_some_section(code: str) -> None:
    section, key = re.match(r"(?:\[([\w:]+)\] )?([a-z_.]+) = ", code).groups()  # type: ignore
    known = {(name.partition(":")[0], key) for name, options in deploy.OPTIONS.items() for key in options}
    assert any(key == name and (section or name_of).partition(":")[0] == name_of for name_of, name in known)


@all_of("ini")
def test_a_configuration_is_understood(snippet: Snippet, tmp_path: Path) -> None:
    path = tmp_path / "deploy.ini"
    # What the page takes for granted: whom its reader lets sign.
    (tmp_path / "signers").write_text("")
    path.write_text(snippet.text.replace("/etc/deploy/signers", "signers"))
    settings = deploy.load_settings([str(path)], {}, [])
    deploy.check_settings(settings)
    assert settings.given


@deep
def test_systemd_understands_the_units(tmp_path: Path) -> None:
    """All of them at once, with the real program in its place, as verify looks for it."""
    blocks = [snippet.text for snippet in SNIPPETS if kind_of(snippet) == "unit"]
    # test_sync.py looks at the drop-in.
    assert set(tables.units()) > {line[2:] for text in blocks for line in text.splitlines()
                                  if line.startswith("# ") and not line.endswith("sync.conf")}
    for path, text in tables.units().items():
        unit = tmp_path / Path(path).relative_to("/etc/systemd/system")
        unit.parent.mkdir(exist_ok=True)
        unit.write_text(text.replace("/usr/local/sbin/deploy.py", str(DEPLOY)))
    run = subprocess.run(
        [needs("systemd-analyze"), "verify", "--man=no", *[str(path) for path in tmp_path.iterdir() if path.is_file()]],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env={"PATH": os.environ["PATH"], "SYSTEMD_UNIT_PATH": f"{tmp_path}:/lib/systemd/system"})
    assert run.returncode == 0 and str(tmp_path).encode() not in run.stdout, run.stdout.decode()


@all_of("crontab")
def test_a_line_for_cron_has_its_form(snippet: Snippet) -> None:
    """Five fields, a user, a command with an absolute path, on one line; % would be a line's end there."""
    field = r"(\*|[0-9]+(-[0-9]+)?)(/[0-9]+)?(,[0-9]+(-[0-9]+)?)*"
    for line in snippet.text.splitlines():
        if not re.match(r"[A-Z]+=\S*\Z|#|\Z", line):
            assert re.match(rf"({field} ){{5}}[a-z]\w* /[^%]+\Z", line), line
            assert command_lines(line)
