"""deploy.py stays readable: its shape, its sizes, and what each section may know.

Each rule is a function from a parsed source to a list of offenders.  The rules
are held to deploy.py, and each one to a few lines that break it.
"""

import ast
import functools
import re
import symtable
import sys
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Set, Tuple

import pytest

from support import DEPLOY

LONGEST = 60
# What the whole file may have: lowered as it shrinks.  A feature raises them by what it needs, in its own commit, and
# nothing else does; the README has a ceiling as well (test_docs.py).
CEILINGS = {"lines": 11630, "bytes": 595600, "columns": 100, "functions": 564, "classes": 57,
            "nodes": 100010}
MOST_POSITIONAL = 5
DRY_RUN_SECTIONS = {5, 16, 17, 18}
FORBIDDEN_TEXTS = [
    # What ansible takes for a module of another kind.
    "from ansible.module" + "_utils", "import ansible.module" + "_utils.", "#<<INCLUDE_ANSIBLE" + "_MODULE_COMMON>>",
    "<<INCLUDE_ANSIBLE_MODULE" + "_JSON_ARGS>>", "# POWERSHELL" + "_COMMON", "#Requires" + " -Module",
    "#Requires" + " -Version", "#Ansible" + "Requires -",
    "TODO", "FIXME",
]

Function = Any  # ast.FunctionDef or ast.AsyncFunctionDef


# -- the source and its sections ---------------------------------------------

class Section(NamedTuple):
    """A numbered banner and the lines from it to the next one; 0 is what stands above the first."""

    number: int
    name: str
    first_line: int
    last_line: int


class Source:
    """A program's text, its syntax tree and its sections."""

    def __init__(self, text: str) -> None:
        self.text, self.lines, self.tree = text, text.split("\n"), ast.parse(text)
        self.sections = self._find_sections()

    def _find_sections(self) -> List[Section]:
        banners = [(0, "above the first banner", 1)]
        for index, line in enumerate(self.lines):
            found = re.match(r"#\s+(\d+)\s+(\S.*)\Z", line)
            if found and index and re.match(r"# ={20,}\Z", self.lines[index - 1]):
                banners.append((int(found.group(1)), found.group(2).strip(), index + 1))
        ends = [first - 1 for _, _, first in banners[1:]] + [len(self.lines)]
        return [Section(number, name, first, end) for (number, name, first), end in zip(banners, ends)]

    def section_at(self, line: int) -> int:
        """The number of the section a line stands in."""
        return next(section.number for section in reversed(self.sections) if line >= section.first_line)

    def map(self) -> List[Tuple[int, str]]:
        """The sections that the module docstring lists, by number: two columns under a line that opens with `Sections`."""
        docstring = ast.get_docstring(self.tree) or ""
        block = re.search(r"^Sections\b.*\n((?:\s+\d+ .*\n?)+)", docstring, re.MULTILINE)
        found = re.findall(r"(\d+) (\S.*?)(?=\s{2,}\d+ |\s*$)", block.group(1) if block else "", re.MULTILINE)
        return sorted((int(number), name) for number, name in found)

    def functions(self) -> Iterator[Tuple[Function, str, bool, bool]]:
        """Every function: (node, qualified name, whether it is a method, whether it is public)."""
        yield from self._functions_in(self.tree, "", in_class=False, public=True)

    def _functions_in(self, parent: Any, prefix: str, *, in_class: bool, public: bool) -> Iterator[Tuple[Function, str, bool, bool]]:
        for node in ast.iter_child_nodes(parent):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                yield node, prefix + node.name, in_class, public and not node.name.startswith("_")
                # What stands inside a function is its own affair.
                yield from self._functions_in(node, f"{prefix}{node.name}.", in_class=False, public=False)
            elif isinstance(node, ast.ClassDef):
                here = public and not node.name.startswith("_")
                yield from self._functions_in(node, f"{prefix}{node.name}.", in_class=True, public=here)
            else:
                yield from self._functions_in(node, prefix, in_class=in_class, public=public)


def end_line(node: Any) -> int:
    """The last line of a node; before Python 3.8 the last line that any part of it names."""
    known = getattr(node, "end_lineno", None)
    return int(known or max(getattr(below, "lineno", 0) for below in ast.walk(node)))


def length(node: Function) -> int:
    """A function's lines, from `def` to its end."""
    return end_line(node) - int(node.lineno) + 1


def constant(node: Any) -> Any:
    """The value of a constant: Constant since 3.8, NameConstant before; None for anything else."""
    return getattr(node, "value", None) if type(node).__name__ in ("Constant", "NameConstant") else None


# -- the rules ---------------------------------------------------------------

def shebang_and_first_bytes(source: Source) -> List[str]:
    """The shebang is exact, and no control character stands in the first 1,024 characters."""
    offenders = [] if source.lines[0] == "#!/usr/bin/python3" else [f"line 1: {source.lines[0]!r}"]
    return offenders + [f"control character {found!r}" for found in re.findall(r"[^\n -~]", source.text[:1024])]


def map_matches_banners(source: Source) -> List[str]:
    """The docstring's list of sections is the list of banners, in order, numbered from 1."""
    banners = [(section.number, section.name) for section in source.sections[1:]]
    offenders = [f"the map says {there}, the banners {here}" for there, here in zip(source.map(), banners) if there != here]
    if len(source.map()) != len(banners):
        offenders.append(f"{len(source.map())} in the map, {len(banners)} banners")
    if [number for number, _ in banners] != list(range(1, len(banners) + 1)):
        offenders.append(f"numbers are {[number for number, _ in banners]}")
    return offenders


def banners_have_a_purpose(source: Source) -> List[str]:
    """No section is a drawer, and each banner says in a line or more what it may use or guarantees."""
    offenders = [f"{name}: not a purpose" for _, name, _, _ in source.sections
                 if re.search(r"\b(utils?|misc|miscellaneous|helpers?|common|various)\b", name, re.IGNORECASE)]
    return offenders + [f"{section.name}: the banner says nothing more" for section in source.sections[1:]
                        if not re.match(r"#    \S", source.lines[section.first_line])]


def functions_are_short(source: Source) -> List[str]:
    """None is longer than what a reader keeps in view."""
    return [f"{name}: {length(node)} lines" for node, name, _, _ in source.functions() if length(node) > LONGEST]


def sizes_stay_below_the_ceilings(source: Source) -> List[str]:
    """Lines, bytes, columns, functions, classes and syntax nodes: what a reader reads, and what every start compiles."""
    nodes = list(ast.walk(source.tree))
    found = {"lines": len(source.text.splitlines()), "bytes": len(source.text.encode("utf-8")),
             "columns": max(map(len, source.lines)), "functions": len(list(source.functions())),
             "classes": sum(isinstance(node, ast.ClassDef) for node in nodes), "nodes": len(nodes)}
    if sys.version_info < (3, 9):
        del found["nodes"]  # an Index around each subscript comes on top
    return [f"{found[name]} {name}, at most {most}" for name, most in CEILINGS.items() if found.get(name, 0) > most]


def positional_parameters(node: Function, *, is_method: bool) -> List[Any]:
    """The parameters that can be given by position, without self and cls."""
    every = list(getattr(node.args, "posonlyargs", [])) + list(node.args.args)
    static = any(getattr(decorator, "id", "") == "staticmethod" for decorator in node.decorator_list)
    return every[1:] if is_method and not static else every


def few_positional_parameters(source: Source) -> List[str]:
    """At most five, self and cls not counted."""
    return [f"{name}: {len(positional_parameters(node, is_method=is_method))} positional parameters"
            for node, name, is_method, _ in source.functions()
            if len(positional_parameters(node, is_method=is_method)) > MOST_POSITIONAL]


def booleans_are_keyword_only(source: Source) -> List[str]:
    """`f(True)` says nothing: a parameter annotated bool, or with True or False for a default, is given by name."""
    offenders = []
    for node, name, is_method, _ in source.functions():
        parameters = positional_parameters(node, is_method=is_method)
        defaults = [None] * len(parameters) + list(node.args.defaults)
        for parameter, default in zip(parameters, defaults[len(defaults) - len(parameters):]):
            if getattr(parameter.annotation, "id", "") == "bool" or isinstance(constant(default), bool):
                offenders.append(f"{name}({parameter.arg})")
    return offenders


def everything_is_annotated(source: Source) -> List[str]:
    """Every parameter but self and cls, and every result."""
    offenders = []
    for node, name, is_method, _ in source.functions():
        parameters = positional_parameters(node, is_method=is_method) + node.args.kwonlyargs
        parameters += [found for found in (node.args.vararg, node.args.kwarg) if found]
        offenders += [f"{name}({parameter.arg})" for parameter in parameters if parameter.annotation is None]
        offenders += [f"{name}: no result type"] if node.returns is None else []
    return offenders


def everything_public_is_documented(source: Source) -> List[str]:
    """A docstring on every class, every public function, and every public method of a public class."""
    offenders = [f"class {node.name}" for node in ast.walk(source.tree)
                 if isinstance(node, ast.ClassDef) and not ast.get_docstring(node)]
    return offenders + [name for node, name, _, public in source.functions() if public and not ast.get_docstring(node)]


def _mentions(node: Any) -> Set[str]:
    """Which of the things that belong in one section a node uses."""
    if isinstance(node, ast.Import):
        return {"subprocess"} if any(alias.name == "subprocess" for alias in node.names) else set()
    if isinstance(node, ast.ImportFrom):
        return {"subprocess"} if node.module == "subprocess" else set()
    if isinstance(node, ast.Name):
        return {node.id} & {"subprocess"}
    if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print":
        return {"print"}
    if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "os":
        return {"os.environ"} if node.attr in ("environ", "environb", "getenv", "putenv", "unsetenv") else set()
    return set()


def one_section_each(source: Source) -> List[str]:
    """subprocess, print and os.environ each appear in one section at the most."""
    where = {}  # type: Dict[str, Set[int]]
    for node in ast.walk(source.tree):
        for thing in _mentions(node):
            where.setdefault(thing, set()).add(source.section_at(node.lineno))
    return [f"{thing} in sections {sorted(sections)}" for thing, sections in sorted(where.items()) if len(sections) > 1]


def no_banned_syntax(source: Source) -> List[str]:
    """No global, assert, bare except, walrus, shell=True or import from __future__."""
    banned = {"Global": "global", "Assert": "assert", "NamedExpr": "walrus"}
    offenders = []
    for node in ast.walk(source.tree):
        line = f"line {getattr(node, 'lineno', 0)}"
        if type(node).__name__ in banned:
            offenders.append(f"{line}: {banned[type(node).__name__]}")
        elif isinstance(node, ast.ExceptHandler) and node.type is None:
            offenders.append(f"{line}: bare except")
        elif isinstance(node, ast.ImportFrom) and node.module == "__future__":
            offenders.append(f"{line}: from __future__")
        elif isinstance(node, ast.Call):
            offenders += [f"{line}: shell=" for word in node.keywords if word.arg == "shell" and constant(word.value) is not False]
    return offenders


def _identifiers(node: Any) -> Set[str]:
    return {value for field in ("id", "attr", "arg", "name") for value in [getattr(node, field, None)] if isinstance(value, str)}


def dry_run_is_known_to_few(source: Source) -> List[str]:
    """The identifier dry_run occurs where options, commands and the command line are, and nowhere else."""
    places, line = [], 0
    for node in ast.walk(source.tree):
        line = getattr(node, "lineno", line)
        if "dry_run" in _identifiers(node):
            # A keyword has no line of its own before 3.9; its value has.
            line = getattr(node, "lineno", None) or getattr(getattr(node, "value", None), "lineno", line)
            places.append(line)
    return [f"line {line}, section {source.section_at(line)}" for line in places
            if source.section_at(line) not in DRY_RUN_SECTIONS]


def no_forbidden_text(source: Source) -> List[str]:
    """Nothing that ansible takes for another kind of module; nothing left to do."""
    return [text for text in FORBIDDEN_TEXTS if text in source.text]


def _top_level_names(source: Source) -> Dict[str, int]:
    """Every name that the module itself defines, and the section that does it first."""
    names = {}  # type: Dict[str, int]
    for node in source.tree.body:
        section = source.section_at(node.lineno)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.setdefault(node.name, section)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for found in [below for target in targets for below in ast.walk(target) if isinstance(below, ast.Name)]:
                names.setdefault(found.id, section)
    return names


def sections_use_only_what_stands_above(source: Source) -> List[str]:
    """No function or class uses a module's name that a later section defines."""
    defined, offenders = _top_level_names(source), []
    pending = list(symtable.symtable(source.text, "deploy.py", "exec").get_children())
    while pending:
        table = pending.pop()
        pending += table.get_children()
        if table.get_name() == "__annotate__":
            continue  # Python 3.14 has all of the module's annotations in one function
        here = source.section_at(table.get_lineno())
        offenders += [f"{table.get_name()} (section {here}) uses {symbol.get_name()} (section {defined[symbol.get_name()]})"
                      for symbol in table.get_symbols()
                      if symbol.is_global() and symbol.is_referenced() and defined.get(symbol.get_name(), 0) > here]
    return sorted(offenders)


RULES = [
    shebang_and_first_bytes, map_matches_banners, banners_have_a_purpose, functions_are_short, sizes_stay_below_the_ceilings,
    few_positional_parameters, booleans_are_keyword_only, everything_is_annotated, everything_public_is_documented,
    one_section_each, no_banned_syntax, dry_run_is_known_to_few, no_forbidden_text,
    sections_use_only_what_stands_above,
]  # type: List[Callable[[Source], List[str]]]


@functools.lru_cache(maxsize=1)
def parsed(text: str) -> Source:
    """Parsed once for all rules."""
    return Source(text)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_deploy_py_keeps_the_rule(rule: Callable[[Source], List[str]]) -> None:
    offenders = rule(parsed(DEPLOY.read_text(encoding="utf-8")))
    assert not offenders, f"{rule.__doc__}\n" + "\n".join(offenders)


# -- the rules themselves ----------------------------------------------------

WELL = '''\
#!/usr/bin/python3
"""A program.

Sections, each using only what stands above it
     1 Words        2 Deeds
"""

# ============================================================================
# 1  Words
#    Uses nothing.
# ============================================================================

class Word:
    """A word."""

    def say(self, *, loud: bool = False) -> str:
        """Say it."""
        return "word"


# ============================================================================
# 2  Deeds
#    Uses words.
# ============================================================================

def act(word: Word) -> None:
    """Act."""
    return None
'''

BREACHES = [
    ("shebang", shebang_and_first_bytes, WELL.replace("/usr/bin/python3", "/usr/bin/env python3")),
    ("control", shebang_and_first_bytes, WELL.replace("A program", "A \x1b program")),
    ("map-name", map_matches_banners, WELL.replace("2 Deeds", "2 Acts")),
    ("map-short", map_matches_banners, WELL.replace("        2 Deeds", "")),
    ("numbers", map_matches_banners, WELL.replace("2 Deeds", "3 Deeds").replace("2  Deeds", "3  Deeds")),
    ("drawer", banners_have_a_purpose, WELL.replace("Deeds", "Misc deeds")),
    ("terse", banners_have_a_purpose, WELL.replace("#    Uses words.\n", "")),
    ("long", functions_are_short, WELL + "    x = 1\n" * 60),
    ("wide", sizes_stay_below_the_ceilings, WELL + "#" * 200 + "\n"),
    ("positional", few_positional_parameters, WELL.replace("word: Word", "a: int, b: int, c: int, d: int, e: int, f: int")),
    ("bool", booleans_are_keyword_only, WELL.replace("word: Word", "word: bool")),
    ("default", booleans_are_keyword_only, WELL.replace("*, loud: bool = False", "a: int, loud: object = False")),
    ("parameter", everything_is_annotated, WELL.replace("word: Word", "word")),
    ("star", everything_is_annotated, WELL.replace("word: Word", "*words")),
    ("result", everything_is_annotated, WELL.replace(") -> None", ")")),
    ("class", everything_public_is_documented, WELL.replace('"""A word."""', "pass")),
    ("method", everything_public_is_documented, WELL.replace('"""Say it."""', "pass")),
    ("function", everything_public_is_documented, WELL.replace('"""Act."""', "pass")),
    ("print", one_section_each, WELL.replace('"""Say it."""', "print(1)").replace('"""Act."""', "print(1)")),
    ("environ", one_section_each, WELL.replace('"""Say it."""', "os.getenv(1)").replace('"""Act."""', "os.environ")),
    ("subprocess", one_section_each, WELL.replace('"""Say it."""', "import subprocess").replace('"""Act."""', "subprocess.run")),
    ("global", no_banned_syntax, WELL + "    global x\n"),
    ("assert", no_banned_syntax, WELL + "    assert word\n"),
    ("bare", no_banned_syntax, WELL + "    try:\n        act()\n    except:\n        pass\n"),
    ("shell", no_banned_syntax, WELL + "    run('x', shell=True)\n"),
    ("future", no_banned_syntax, "from __future__ import annotations\n"),
    ("dry-run-name", dry_run_is_known_to_few, WELL + "    return dry_run\n"),
    ("dry-run-attribute", dry_run_is_known_to_few, WELL + "    return word.dry_run\n"),
    ("dry-run-keyword", dry_run_is_known_to_few, WELL + "    return act(dry_run=1)\n"),
    ("dry-run-parameter", dry_run_is_known_to_few, WELL.replace("word: Word", "dry_run: Word")),
    ("text", no_forbidden_text, WELL + "# FIX" + "ME\n"),
    ("upward", sections_use_only_what_stands_above, WELL.replace('return "word"', "return act(self)")),
    ("constant", sections_use_only_what_stands_above, WELL.replace('return "word"', "return LATER") + "\n\nLATER = 1\n"),
]

if sys.version_info >= (3, 8):  # older ones cannot parse it
    BREACHES.append(("walrus", no_banned_syntax, WELL + "    if (x := word): return None\n"))


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_a_well_shaped_program_breaks_no_rule(rule: Callable[[Source], List[str]]) -> None:
    assert rule(Source(WELL)) == []


@pytest.mark.parametrize("rule, text", [breach[1:] for breach in BREACHES], ids=[breach[0] for breach in BREACHES])
def test_a_rule_finds_what_breaks_it(rule: Callable[[Source], List[str]], text: str) -> None:
    assert rule(Source(text))


def test_a_local_name_is_not_taken_for_a_later_definition() -> None:
    text = WELL.replace('return "word"', "act = 1\n        return act")
    assert sections_use_only_what_stands_above(Source(text)) == []


@pytest.mark.parametrize("module", ["argparse", "configparser", "pathlib", "subprocess", "hashlib", "socket", "logging"])
def test_it_is_built_on_the_library(module: str) -> None:
    assert re.search(rf"(?m)^ +(?:import {module}|from {module} import .*)$", DEPLOY.read_text(encoding="utf-8")), f"{module} is not used"
