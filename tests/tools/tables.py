#!/usr/bin/python3
"""Writes what the README shows of deploy.py: its commands, options, exit codes, metrics and events.

Usage: python3 tests/tools/tables.py    (make example)

Each stands between `<!-- table NAME -->` and `<!-- /table -->`.
"""

import os
import re
import sys
import textwrap
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

GROUPS = {
    "going live": ["deploy", "stage", "activate", "rollback", "sync", "recover"],
    "asking before and after": ["preflight", "probe", "verify", "approve", "attest"],
    "looking": ["status", "releases", "history", "show", "diff", "logs", "report"],
    "day two": ["hold", "unhold", "flags", "maintenance", "pin", "unpin", "prune", "adopt"],
    "making and learning": ["pack", "config", "help", "completion"],
}


def markdown_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [headers, ["---"] * len(headers)] + [list(row) for row in rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def spelled(names: Sequence[str], metavar: str) -> str:
    """A flag's names with what it takes: `-c FILE`, `--config FILE`."""
    return ", ".join(f"`{name} {metavar}`".replace(" `", "`") for name in names)


def commands_table(deploy: Any) -> str:
    """What each command does, and its flags, by what it is for; and the global options."""
    names = [name for names in GROUPS.values() for name in names]
    assert sorted(names) == sorted(deploy.COMMAND_HELP), "each command has its place in GROUPS"

    def text(name: str) -> str:
        flags = [flag for flag in deploy.FLAGS if name in flag.commands]
        own = [spelled(flag.names[-1:], flag.metavar.replace("...", "")) for flag in flags if not flag.is_argument]
        usage = " ".join([name] + [flag.metavar for flag in flags if flag.is_argument])
        return f"`{usage}`: {deploy.COMMAND_HELP[name][0]}" + (f" ({', '.join(own)})" if own else "")
    rows = [(group, "<br>".join(map(text, names))) for group, names in GROUPS.items()]
    rows.append(("everywhere, before or after the command", "<br>".join(
        f"{spelled(flag.names, flag.metavar.replace('...', ''))}: {flag.help}" for flag in deploy.FLAGS if not flag.commands)))
    return markdown_table(("for", "commands and options"), rows)


def run_on(parts: Sequence[str]) -> str:
    """Parts as one paragraph, its lines cut between words, not in code."""
    kept = [re.sub(r"`[^`]*`", lambda found: found.group().replace(" ", "\0"), part) for part in parts]
    text = textwrap.fill(". ".join(kept) + ".", 160, break_long_words=False, break_on_hyphens=False)
    return text.replace("\0", " ")


def key_text(option: Any) -> str:
    """A key with its default, and with the words it takes where these are few."""
    key = option.key.replace("*", "NAME")
    text = f"`{key} = {option.default}`" if option.default else f"`{key}`"
    words = [word for word in option.kind.split("|") if word != option.default]
    if "|" not in option.kind or len(words) > 5:
        return text
    return f"{text} ({'or ' if option.default else ''}{', '.join(words)})"


def options_table(deploy: Any) -> str:
    """The options, a row for each section; those that have one key share the last."""
    sections = [(f"`[{section.replace('*', 'NAME')}]` {text}", [key_text(option) for option in options.values()])
                for section, text, options in deploy.SECTIONS]
    rows = [(text, ", ".join(keys)) for text, keys in sections if len(keys) > 1]
    rows.append(tuple("<br>".join(column) for column in zip(*((text, keys[0]) for text, keys in sections if len(keys) == 1))))
    return markdown_table(("section", "keys, with their defaults"), rows)


def table(deploy: Any, name: str) -> str:
    """One table or list by its name."""
    if name == "exit-codes":
        cells = [(str(code), text) for code, text in EXIT_CODES.items()]
        half = (len(cells) + 1) // 2
        return markdown_table(("code", "means") * 2, [left + right for left, right in zip(cells[:half], cells[half:])])
    lists = {
        "metrics": [f"`{metric}`" + "".join(re.findall(r" \[.*?\]", text)) for metric, _, text in deploy.METRICS],
        "notify-events": [f"`{event}`: {text}" for event, text in deploy.NOTIFY_EVENTS],
    }
    if name in lists:
        return run_on(lists[name])
    return {"commands": commands_table, "options": options_table}[name](deploy)


def with_tables(text: str) -> str:
    """The README's text with every table as the code has it now."""
    deploy = load_deploy()

    def block(found: Any) -> str:
        return f"<!-- table {found.group(1)} -->\n{table(deploy, found.group(1))}\n<!-- /table -->"
    return re.sub(r"(?ms)^<!-- table (\S+) -->$.*?^<!-- /table -->$", block, text)


def section(heading: str) -> str:
    """The text under one heading of the README, up to the next of its rank or above."""
    text = README.read_text(encoding="utf-8")
    rank, _, rest = re.search(rf"(?ms)^(##+) ({re.escape(heading)})\n(.*)", text).groups()  # type: ignore
    return re.split(rf"(?m)^##{{1,{len(rank) - 1}}} ", rest)[0]


def blocks() -> List[str]:
    """Every indented block of the README, without its indentation."""
    text = re.sub(r"(?ms)^```.*?^```$", "```", README.read_text(encoding="utf-8"))
    return [re.sub("(?m)^    ", "", block.lstrip("\n")) for block in re.findall(r"(?m)^(?:    .*\n|\n(?=    ))+", text)]


def units() -> Dict[str, str]:
    """The unit files that the README and the page on systemd show, by the path that stands above each."""
    page = re.sub("(?m)^    ", "", load_deploy().HELP["systemd"])
    found = {}  # type: Dict[str, str]
    for text in blocks() + [page]:
        parts = re.split(r"(?m)^# (/etc/systemd/system/\S+)$\n", text)
        found.update(zip(parts[1::2], parts[2::2]))
    sandbox = re.search(r"(?ms)^- A deployment bears a harder sandbox.*?\n(?!  )", section("systemd and cron")).group()  # type: ignore
    given, switches = re.split(r"`=yes` for\s", sandbox)
    lines = re.findall(r"`(\w+=[^`]*)`", given) + [f"{name}=yes" for name in re.findall(r"`(\w+)`", switches)]
    boot = ["[Unit]", "Wants=network-online.target", "After=network-online.target", "[Service]"]
    hardening = re.search(r"(?ms)^ProtectSystem=.*", found["/etc/systemd/system/deploy@.service"]).group()  # type: ignore
    found["/etc/systemd/system/deploy-recover@.service.d/boot.conf"] = "\n".join([*boot, hardening])
    found["/etc/systemd/system/deploy@.service.d/sandbox.conf"] = "\n".join(["[Service]", *lines, ""])
    return found


def result_keys() -> List[Tuple[str, Tuple[type, ...]]]:
    """(key, types) of the object of --json, as the README's table has them."""
    kinds = {"bool": (bool,), "str": (str,), "number": (int, float), "list": (list,), "dict": (dict,)}  # type: Dict[str, Tuple[type, ...]]
    rows = re.findall(r"(?m)^\| (bool|str|number|list|dict) \| (.*) \|$", section("Exit codes, errors, JSON"))
    return [(key, kinds[kind]) for kind, text in rows for key in re.findall(r"`(\w+)`(?=[:,;])", text)]


if __name__ == "__main__":
    README.write_text(with_tables(README.read_text(encoding="utf-8")), encoding="utf-8")
