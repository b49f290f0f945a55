#!/usr/bin/python3
"""Check what a linter would, with the standard library alone.

Usage: python3 -W error tests/tools/lint.py

deploy.py and the tests compile without a warning, their syntax is that of
Python 3.6, and the repository's top level holds only what it may.
"""

import ast
import glob
import os
import py_compile
import subprocess
import sys
import tempfile
import warnings
from typing import List

TOP = os.path.abspath(os.path.join(os.path.dirname(__file__), "..", ".."))
PERMITTED = {"deploy.py", "tests", "deploy.ini.example", "Makefile", "README.md"}


def sources() -> List[str]:
    """deploy.py and every Python file of the tests."""
    return [os.path.join(TOP, "deploy.py")] + sorted(
        glob.glob(os.path.join(TOP, "tests", "**", "*.py"), recursive=True))


def compile_problems(path: str) -> List[str]:
    """What Python says while it compiles a file; warnings count."""
    with tempfile.TemporaryDirectory() as directory:
        try:
            py_compile.compile(path, cfile=os.path.join(directory, "compiled.pyc"), doraise=True)
        except (py_compile.PyCompileError, Warning) as error:
            return [f"{path}: {error}"]
    return []


def syntax_problems(path: str) -> List[str]:
    """What is newer than Python 3.6; Pythons before 3.8 cannot tell."""
    if sys.version_info < (3, 8):
        return []
    with open(path, encoding="utf-8") as stream:
        try:
            ast.parse(stream.read(), path, feature_version=(3, 6))
        except SyntaxError as error:
            return [f"{path}:{error.lineno}: not Python 3.6: {error.msg}"]
    return []


def top_level_problems() -> List[str]:
    """Which names at the top level, known to git, may not be there."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=TOP, stdout=subprocess.PIPE, check=True)
    names = {os.fsdecode(name).split("/")[0] for name in listed.stdout.split(b"\0") if name}
    return [f"{name}: not permitted at the top level"
            for name in sorted(names - PERMITTED) if not name.startswith(".")]


def main() -> int:
    """Print every problem; 1 when there is one."""
    warnings.simplefilter("error")
    problems = top_level_problems()
    for path in sources():
        problems += compile_problems(path) + syntax_problems(path)
    print("\n".join(problems) if problems else f"lint: {len(sources())} files are well")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
