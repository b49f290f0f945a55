#!/usr/bin/python3
"""Writes what is made from deploy.py's tables: the README's pages, which are those of `deploy.py help TOPIC`, and what ansible-doc reads.

Usage: python3 tests/tables.py    (make example)

Each page stands between `<!-- topic NAME -->` and `<!-- /topic NAME -->`.  DOCUMENTATION
and RETURN stand in deploy.py itself, as literals: ansible-doc does not run it.
"""

import json
import re
from typing import Any, Dict, List, Sequence

from support import DEPLOY, TOP, load_deploy

README = TOP / "README.md"


def markdown_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, where a terminal gets aligned columns."""
    lines = [headers, ["---"] * len(headers)] + [list(row) for row in rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def with_topics(text: str) -> str:
    """The README's text with every page as the code has it now."""
    deploy = load_deploy()
    for topic in deploy.TOPICS:
        block = f"<!-- topic {topic.name} -->\n{deploy.page(topic, markdown_table)}\n<!-- /topic {topic.name} -->"
        text = re.sub(rf"(?s)<!-- topic {topic.name} -->.*?<!-- /topic {topic.name} -->", lambda found: block, text)
    return text


# -- for ansible-doc ---------------------------------------------------------------

LINE_CHARACTERS = 120
PATHS = ("FILE", "ARTIFACT", "DIR", "DIRECTORY")


def flow(value: Any) -> str:
    """One value of YAML on one line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {flow(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(flow, value)) + "]"
    return value if re.match(r"([a-z_]+|[0-9]+)\Z", value) else json.dumps(value)


def entries(rows: Dict[str, Any], indent: str) -> str:
    """A mapping with one entry a line; one that is too long breaks after a comma."""
    lines = []
    for name, row in rows.items():
        words, line = re.findall(r"[^ ]+ ?", f"{indent}{name}: {flow(row)}"), indent
        for word in words:
            if len(line) + len(word) > LINE_CHARACTERS:
                lines.append(line.rstrip())
                line = indent + "  "
            line += word
        lines.append(line)
    return "\n".join(lines)


def documented(name: str, rows: Sequence[Any]) -> Dict[str, Any]:
    """What ansible-doc shows of one parameter, which may stand for several flags."""
    first = rows[0]
    kind = "path" if first.kind == "str" and first.metavar in PATHS else first.kind
    found = {"type": kind}  # type: Dict[str, Any]
    if kind == "list":
        found["elements"] = "path" if first.metavar in PATHS else "str"
    defaults = {option.flag: option.default for option in load_deploy().OPTIONS if option.flag}
    if first.choices:
        found["choices"] = list(first.choices)
    if first.default or kind == "bool":
        found["default"] = first.default or "no"
    if kind == "dict":
        return dict(found, description='options of the configuration: "section.key": value, or section: {key: value}')
    texts = list(dict.fromkeys(row.help for row in rows))
    needed = [command for row in rows if row.needed for command in row.commands]
    taken = [command for row in rows if not row.needed for command in row.commands]
    texts += [f"needed by {', '.join(needed)}"] if needed else []
    texts += [f"for {', '.join(taken)}"] if taken else []
    texts += [f"default: {defaults[first.word]}, unless configured"] if defaults.get(first.word) else []
    return dict(found, description=texts if len(texts) > 1 else texts[0])


def documentation() -> str:
    """DOCUMENTATION, from the tables."""
    deploy = load_deploy()
    by_name = {}  # type: Dict[str, List[Any]]
    for row in deploy.module_parameters():
        by_name.setdefault(row.name, []).append(row)
    commands = [name for name, _ in deploy.COMMAND_HELP if name not in deploy.NO_TASKS]
    command = {"type": "str", "default": "deploy", "choices": commands, "description": [
        f"{name}: {text}".replace("`", "") for name, text in deploy.COMMAND_HELP if name in commands]}
    first = deploy.__doc__.partition("\n")[0].partition(" - ")[2]
    head = entries({
        "module": "deploy", "short_description": first[0].upper() + first[1:].rstrip("."),
        "description": ["This file is deploy.py itself: what its commands do on a command line, they do here.",
                        "Check mode is a dry run. Another run that holds the lock is a failure with rc 75.",
                        "A value is quoted where YAML would change it, such as a version (1.10) or a file mode (0640)."]}, "")
    rows = dict({"command": command}, **{name: documented(name, found) for name, found in by_name.items()})
    return f"{head}\noptions:\n{entries(rows, '  ')}\n"


def returned() -> str:
    """RETURN, from the table of the JSON result."""
    rows = {key: {"type": kind, "returned": "always", "description": text.replace("`", "")}
            for key, kind, text in load_deploy().RESULT_KEYS}  # type: Dict[str, Any]
    rows["rc"] = {"type": "int", "returned": "always", "description": "the exit code, as exit_code"}
    rows["diff"] = {"type": "dict", "returned": "in diff mode, by what moves current", "description":
                    "release, version and sha256 that current points to: before and after, with headers"}
    return entries(rows, "") + "\n"


def with_documentation(text: str) -> str:
    """deploy.py's text with DOCUMENTATION and RETURN as the tables have it now."""
    for name, literal in (("DOCUMENTATION", documentation()), ("RETURN", returned())):
        quoted = literal.replace("\\", "\\\\")
        text = re.sub(rf'(?ms)^{name} = """.*?"""$', lambda found: f'{name} = """\\\n{quoted}"""', text)
    return text


if __name__ == "__main__":
    DEPLOY.write_text(with_documentation(DEPLOY.read_text(encoding="utf-8")), encoding="utf-8")
    README.write_text(with_topics(README.read_text(encoding="utf-8")), encoding="utf-8")
