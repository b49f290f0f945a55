#!/usr/bin/python3
"""Writes the README's tables from deploy.py's own.

Usage: python3 tests/tables.py    (make example)

Each table stands between `<!-- NAME -->` and `<!-- /NAME -->`.
"""

import re
from typing import Any, Callable, Dict, List, Sequence

from support import TOP, load_deploy

README = TOP / "README.md"


def table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [headers, ["---"] * len(headers)] + [list(row) for row in rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def usage(deploy: Any, command: str) -> str:
    """`deploy ARTIFACT`, `rollback [RELEASE]`: a command with its arguments."""
    words = [command]
    for flag in deploy.FLAGS:
        if command in flag.commands and not flag.names[0].startswith("-"):
            count = flag.settings.get("nargs", "")
            words.append(f"[{flag.metavar}{'...' if count == '*' else ''}]" if count else flag.metavar)
    return "`" + " ".join(words) + "`"


def own_flags(deploy: Any, command: str) -> str:
    """The flags that only this and a few other commands take."""
    return ", ".join(f"`{' '.join(filter(None, (flag.names[-1], flag.metavar)))}`" for flag in deploy.FLAGS
                     if command in flag.commands and flag.names[0].startswith("-"))


def commands(deploy: Any) -> str:
    """What each command does, and the flags of its own."""
    return table(("command", "does", "flags"),
                 [(usage(deploy, name), text, own_flags(deploy, name)) for name, text in deploy.COMMAND_HELP])


def flags(deploy: Any) -> str:
    """The global options."""
    rows = [(", ".join(f"`{name}{' ' + flag.metavar if flag.metavar else ''}`" for name in flag.names), flag.help)
            for flag in deploy.FLAGS if not flag.commands]
    rows += [(f"`{option.flag} {option.key.upper()}`", option.help) for option in deploy.OPTIONS if option.flag]
    return table(("option", "means"), rows)


def options(deploy: Any) -> str:
    """Every option of the configuration, a table for each section."""
    parts = []  # type: List[str]
    for section, text in deploy.SECTION_HELP:
        rows = [(f"`{option.key.replace('*', 'NAME')}`", deploy.kind_name(option.kind),
                 f"`{option.default}`" if option.default else "", option.help)
                for option in deploy.OPTIONS if option.section == section]
        parts += [f"#### [{section.replace('*', 'NAME')}]: {text}", table(("key", "takes", "default", "means"), rows)]
    return "\n\n".join(parts)


def exit_codes(deploy: Any) -> str:
    """What each exit code promises."""
    return table(("code", "means"), [(str(code), text) for code, text in deploy.EXIT_CODES])


TABLES = {
    "commands": commands, "flags": flags, "options": options, "exit codes": exit_codes}  # type: Dict[str, Callable[[Any], str]]


def with_tables(text: str) -> str:
    """The README's text with every table as the code has it now."""
    deploy = load_deploy()
    for name, make in TABLES.items():
        block = f"<!-- {name} -->\n{make(deploy)}\n<!-- /{name} -->"
        text = re.sub(rf"(?s)<!-- {name} -->.*?<!-- /{name} -->", lambda found: block, text)
    return text


if __name__ == "__main__":
    README.write_text(with_tables(README.read_text(encoding="utf-8")), encoding="utf-8")
