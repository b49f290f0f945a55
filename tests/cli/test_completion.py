"""`deploy.py completion SHELL`: what bash and zsh themselves make of the script."""

import os
import pty
import re
import select
import shlex
import signal
import subprocess
import time
from pathlib import Path
from typing import Any, Dict, List, Set

import pytest

from support import load_deploy, needs, deep, run_deploy

deploy = load_deploy()

COMMANDS = set(deploy.COMMANDS)
GLOBAL = {"--help", "--version"} | {name for flag in deploy.FLAGS if not flag.commands for name in flag.names if name[1] == "-"}
SHELLS = ("bash", "zsh")
FILES = ("shop-1.4.1.tar.gz", "shop.ini", "with space.ini")
DIRECTORIES = ("apps", "var")

# What is typed, and every word that may be offered for the last of it.
LINES = {
    "deploy.py ": COMMANDS,
    "deploy.py ro": {"rollback"},
    "deploy.py -c shop.ini ro": {"rollback"},
    "deploy.py -n --set deploy.application=deploy st": {"stage", "status"},
    "deploy.py --root=deploy ro": {"rollback"},
    "deploy.py --wait-lock deploy ro": {"rollback"},
    "deploy.py deploy --al": {"--allow-downgrade"},
    "deploy.py deploy shop.ini --al": {"--allow-downgrade"},
    "deploy.py --root apps stage --sh": {"--sha256"},
    "deploy.py --al": set(),
    "deploy.py pin --al": set(),
    "deploy.py --": GLOBAL,
    "deploy.py pin 1.4.1 --": GLOBAL,
    "deploy.py --dr": {"--dry-run"},
    "deploy.py pin --dr": {"--dry-run"},
    "deploy.py -c ": {*FILES, *DIRECTORIES},
    "deploy.py -c with": {"with space.ini"},
    "deploy.py deploy shop-": {"shop-1.4.1.tar.gz"},
    "deploy.py preflight shop-": {"shop-1.4.1.tar.gz"},
    "deploy.py pack ap": {"apps"},
    "deploy.py pack -o sho": {"shop-1.4.1.tar.gz", "shop.ini"},
}  # type: Dict[str, Set[str]]

# Each shell gets a program that shows its arguments, and a key, ^T, that puts in every word on offer.
BASH_RC = r"""
PS1='READY> '
bind 'set enable-bracketed-paste off' 'set completion-ignore-case off'
bind '"\C-t": insert-completions'
deploy.py() { printf '<%s>' "$@"; printf '<end>\n'; }
source ../script
"""
ZSH_RC = r"""
PS1='READY> '
unsetopt prompt_sp prompt_cr zle_bracketed_paste beep
unset zle_bracketed_paste
autoload -Uz compinit && compinit -D -u
zle -C every complete-word _generic
zstyle ':completion:every:*' insert yes
zstyle ':completion:every::::' completer _all_matches _complete
bindkey '^T' every
deploy.py() { printf '<%s>' "$@"; printf '<end>\n'; }
eval "$(<../script)"
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: Any) -> Path:
    """A directory with files and directories to be offered."""
    place = tmp_path_factory.mktemp("completion")
    for name in FILES:
        (place / name).write_text("")
    for name in DIRECTORIES:
        (place / name).mkdir()
    return place


def talk(argv: List[str], directory: Path, environment: Dict[str, str]) -> Dict[str, List[str]]:
    """Type every line into an interactive shell, with ^T for its last word: the arguments that the program then gets."""
    master, slave = pty.openpty()
    shell = subprocess.Popen(argv, stdin=slave, stdout=slave, stderr=slave, cwd=str(directory), env=environment, close_fds=True,
                             start_new_session=True)
    os.close(slave)
    seen, answers = "", {}  # type: str, Dict[str, List[str]]
    try:
        seen = read_until(master, "READY> ", "")
        for line in LINES:
            os.write(master, line.encode() + b"\x14\r")
            seen = read_until(master, "READY> ", read_until(master, "<end>", "", line), line)
            answers[line] = re.findall(r"<([^<>]*)>", seen)[:-1]
    finally:
        os.close(master)
        os.killpg(shell.pid, signal.SIGKILL)
        shell.wait()
    return answers


def read_until(descriptor: int, wanted: str, text: str, line: str = "") -> str:
    """Read until a text has come; the test fails after a minute."""
    deadline = time.monotonic() + 60
    while wanted not in text:
        ready, _, _ = select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            pytest.fail(f"no {wanted!r} after {line!r}: {text!r}")
        text += os.read(descriptor, 65536).decode("utf-8", "replace")
    return text


def offered(line: str, arguments: List[str]) -> Set[str]:
    """What was put in for the last word of a line, however the shell wrote it."""
    typed = shlex.split(line + "|")[1:]
    last = typed[-1][:-1]
    words = {word.rstrip("/") for word in arguments[len(typed) - 1:]}
    return words - {last.rpartition("=")[2], last, ""}


def ask_bash(place: Path) -> Dict[str, Set[str]]:
    """What bash offers for each line."""
    rc = place.with_name("bashrc")
    rc.write_text(BASH_RC)
    argv = [needs("bash"), "--noprofile", "--rcfile", str(rc), "-i"]
    answers = talk(argv, place, {"PATH": os.environ["PATH"], "HOME": str(place), "TERM": "dumb", "LANG": "C.UTF-8"})
    return {line: offered(line, arguments) for line, arguments in answers.items()}


def ask_zsh(place: Path) -> Dict[str, Set[str]]:
    """What zsh offers for each line."""
    place.with_name(".zshrc").write_text(ZSH_RC)
    answers = talk([needs("zsh"), "-d", "-i"], place, {
        "PATH": os.environ["PATH"], "HOME": str(place), "ZDOTDIR": str(place.parent), "TERM": "dumb", "LANG": "C.UTF-8"})
    return {line: offered(line, arguments) for line, arguments in answers.items()}


@deep
@pytest.mark.parametrize("shell, ask", [
    ("bash", ask_bash), ("zsh", ask_zsh)], ids=SHELLS)
def test_a_shell_offers_what_may_stand_there_and_nothing_else(shell: str, ask: Any, place: Path) -> None:
    needs(shell)
    place.with_name("script").write_text(run_deploy("completion", shell, json=False, check=0).stdout)
    assert ask(place) == LINES


@pytest.mark.parametrize("shell", SHELLS)
def test_the_script_has_every_command_and_flag(shell: str, tmp_path: Path) -> None:
    (tmp_path / "deploy.ini").write_text("[nonsense\n")
    script = run_deploy("completion", shell, json=False, check=0, cwd=tmp_path).stdout
    words = set(re.findall(r"[\w.=-]+", script))
    flags = {name for flag in deploy.FLAGS for name in flag.names if name.startswith("--")}
    assert COMMANDS <= words and flags <= words
    assert not re.search("@[A-Z]+@", script)


def test_the_object_of_json_holds_the_script() -> None:
    result = run_deploy("completion", "bash", check=0)
    assert result.data["completion"] == run_deploy("completion", "bash", json=False, check=0).stdout
    assert result.data["changed"] is False


def test_an_unknown_shell_is_an_error_that_names_those_that_are_known() -> None:
    error = run_deploy("completion", "ksh", check=2).data["error"]
    assert "ksh" in error["message"] and "bash, zsh" in error["message"]
