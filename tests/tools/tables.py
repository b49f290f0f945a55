#!/usr/bin/python3
"""Writes what the README shows of deploy.py: tables of its options, flags and commands, and the pages of `deploy.py help`.

Usage: python3 tests/tools/tables.py    (make example)

Each stands between `<!-- table NAME -->` and `<!-- /table -->`, or `<!-- help NAME -->` and `<!-- /help -->`.
"""

import os
import re
import sys
from typing import Any, Dict, List, Sequence, Tuple

sys.path.insert(0, os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "lib"))

from support import TOP, load_deploy  # noqa: E402

README = TOP / "README.md"
EXIT_CODES = {
    0: "done, or nothing to do",
    1: "failed before activation (a hook, a step, the disk); `current` is as before",
    2: "usage, configuration, or a Python without a module that is needed; nothing was changed",
    3: "preflight failed; nothing was changed",
    4: "artifact refused: missing, checksum, unsafe or damaged archive, known bad, rolled back from",
    5: "failed after activation and rolled back; the previous release is live again",
    6: "failed after activation and not rolled back: a person is needed, the message says what to do",
    7: "a read-only command found a problem (probe, verify, status, history --verify)",
    10: "something changed (only with --detailed-exitcode)",
    70: "an internal error; a traceback is shown",
    75: "another run holds the lock",
    130: "interrupted by SIGINT before activation; everything undone (143: by SIGTERM or SIGHUP)",
}


def markdown_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [headers, ["---"] * len(headers)] + [list(row) for row in rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def spelled(names: Sequence[str], metavar: str) -> str:
    """A flag's names with what it takes: `-c FILE`, `--config FILE`."""
    return ", ".join(f"`{name} {metavar}`".replace(" `", "`") for name in names)


def commands_table(deploy: Any) -> str:
    """What each command does, and its flags."""
    rows = []
    for name, (text, _) in deploy.COMMAND_HELP.items():
        flags = [flag for flag in deploy.FLAGS if name in flag.commands]
        own = [spelled(flag.names[-1:], flag.metavar.replace("...", "")) for flag in flags if not flag.is_argument]
        usage = " ".join([name] + [flag.metavar for flag in flags if flag.is_argument])
        rows.append((f"`{usage}`", text, ", ".join(own)))
    return markdown_table(("command", "does", "flags"), rows)


def flags_table(deploy: Any) -> str:
    """The global options, as argparse has them."""
    group = next(group for group in deploy.build_parser([])._action_groups if group.title.startswith("global"))
    rows = [(spelled(action.option_strings, action.metavar or ""), action.help) for action in group._group_actions]
    return markdown_table(("option", "means"), rows)


def options_table(deploy: Any, wanted: str) -> str:
    """The options of one section."""
    for section, text, options in deploy.SECTIONS:
        if section == wanted:
            rows = [(f"`{option.key.replace('*', 'NAME')}`", option.takes,
                     f"`{option.default}`" if option.default else "", option.help)
                    for option in options.values()]
            return f"### [{section.replace('*', 'NAME')}]: {text}\n" + markdown_table(("key", "takes", "default", "means"), rows)
    raise KeyError(wanted)


def table(deploy: Any, name: str) -> str:
    """One table by its name."""
    plain = {
        "exit-codes": (("code", "means"), [(str(code), text) for code, text in EXIT_CODES.items()]),
        "events": (("event", "MESSAGE_ID"), [(f"`{name}`", f"`{found}`") for name, found in deploy.EVENTS.items()]),
        "metrics": (("metric", "means"), [(f"`{name}`", text) for name, _, text in deploy.METRICS]),
        "notify-events": (("event", "means"), [(f"`{name}`", text) for name, text in deploy.NOTIFY_EVENTS]),
    }  # type: Dict[str, Tuple[Sequence[str], List[Tuple[str, str]]]]
    if name in plain:
        return markdown_table(*plain[name])
    if name.startswith("["):
        return options_table(deploy, name.strip("[]"))
    return {"commands": commands_table, "flags": flags_table}[name](deploy)


def with_tables(text: str) -> str:
    """The README's text with every table and page as the code has it now."""
    deploy = load_deploy()

    def block(found: Any) -> str:
        kind, name = found.group(1), found.group(2)
        made = table(deploy, name) if kind == "table" else deploy.HELP[name].rstrip("\n")
        return f"<!-- {kind} {name} -->\n{made}\n<!-- /{kind} -->"
    return re.sub(r"(?ms)^<!-- (table|help) (\S+) -->$.*?^<!-- /\1 -->$", block, text)


def section(heading: str) -> str:
    """The text under one heading of the README, up to the next of its rank."""
    return re.split(r"(?m)^## ", README.read_text(encoding="utf-8").partition(f"\n## {heading}\n")[2])[0]


def units() -> Dict[str, str]:
    """The unit files that the README shows, by the path that stands above each."""
    text = section("No visitor notices") + section("systemd")
    code = "\n".join(line[4:] for line in text.splitlines() if line.startswith("    "))
    parts = re.split(r"(?m)^# (/etc/systemd/system/\S+)$\n", code)
    return dict(zip(parts[1::2], parts[2::2]))


def result_keys() -> List[Tuple[str, str]]:
    """(key, type) of the object of --json, as the README's table has them."""
    return re.findall(r"(?m)^\| `(\w+)` \| (bool|str|int|float|list|dict) \|", section("Exit codes, errors, JSON"))


if __name__ == "__main__":
    README.write_text(with_tables(README.read_text(encoding="utf-8")), encoding="utf-8")
