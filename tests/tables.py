#!/usr/bin/python3
"""Writes the README's reference from deploy.py's own: the pages that `deploy.py help TOPIC` shows.

Usage: python3 tests/tables.py    (make example)

Each page stands between `<!-- topic NAME -->` and `<!-- /topic NAME -->`.
"""

import re
from typing import Sequence

from support import TOP, load_deploy

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


if __name__ == "__main__":
    README.write_text(with_topics(README.read_text(encoding="utf-8")), encoding="utf-8")
