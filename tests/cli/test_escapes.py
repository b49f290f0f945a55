"""Control characters and terminal escapes in whatever is foreign never reach a terminal, a log or a JSON reader raw."""

import http.server
import json
import os
import re
import shlex
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, Dict, Iterator, List

import pytest

from crashes import script
from support import App, Result, clean_environment, load_deploy, make_tar, member, run_deploy, tree_members, write_checksum

deploy = load_deploy()

# By what they could do: move a cursor, set a title, ring, end a line, hide or turn text around.
HOSTILE = {
    "ESC": "\x1b[2J\x1b[31mred", "OSC": "\x1b]0;title\x07", "DCS": "\x1bPq\x1b\\", "CSI as C1": "\x9b31mred",
    "OSC as C1": "\x9d0;title\x9c",
    "NEL": "\x85forged", "BEL": "\x07", "BS": "password\x08\x08\x08", "CR": "\rdeploy.py: error: forged",
    "VT and FF": "\x0b\x0c", "DEL": "\x7f",
    "shift": "\x0e\x0f", "bidi override": "\u202egpj.exe", "bidi isolate": "\u2066\u2067\u2068\u2069",
    "bidi mark": "\u200e\u200f",
    "Arabic letter mark": "\u061c", "line separator": "\u2028\u2029forged",
}
# Whatever of it is in an output, something acted on it: the newline alone may stand, between lines.
RAW = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")
# Without the one that has a test of its own: where it fails, it would hide what else does.
EVERYTHING = " ".join(f"<{name}>{text}" for name, text in HOSTILE.items() if name != "Arabic letter mark")
# A line break is what every channel has a place for; a forged line must not begin one.
FORGED = re.compile(r"(?m)^(deploy\.py: error: forged|hint: forged|forged|\{\"forged\")")


def raw_in(text: str) -> List[str]:
    """The characters that should have been escaped, with what is around them."""
    found = [f"U+{ord(match.group()):04X} in {text[max(0, match.start() - 30):match.end() + 10]!r}" for match
             in RAW.finditer(text)]
    return found + [f"forged {match.group()!r}" for match in FORGED.finditer(text)]


def judge(app: App, *words: Any, marks: str = "<ESC>", log: bool = True, **options: Any) -> Result:
    """Run as text and as JSON, with a text and a JSON log: nothing may be raw, and `marks` shows that it was said at all."""
    problems, said = [], ""
    for as_json in (True, False):
        path = app.directory / f"log-{'json' if as_json else 'text'}"
        logged = ["--log-file", path, "--log-format", "json" if as_json else "text"] if log else []
        result = run_deploy("-v", *logged, *words, config=app.config, json=as_json, **options)
        problems += [f"{where}: {problem}" for where, text in (("stdout", result.stdout), ("stderr", result.stderr))
                     for problem in raw_in(text)]
        if as_json:
            first = result
            assert result.stdout.count("\n") == 1 and result.stdout.endswith("\n") and all(ord(letter) < 127 for letter
                                                                                           in result.stdout)
        said += result.stdout + result.stderr
        if path.exists():
            text = path.read_bytes().decode("utf-8")
            problems += [f"log: {problem}" for problem in raw_in(text)]
            for line in text.split("\n")[:-1]:
                if as_json:
                    assert all(32 <= ord(letter) < 127 for letter in line) and isinstance(json.loads(line), dict)
                else:
                    assert re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ [A-Z]+ ", line), line
    assert problems == []
    assert not marks or marks in said, said
    assert "Traceback" not in said and first.exit_code != 70, said
    return first


def stored(app: App) -> None:
    """What is kept under .deploy is JSON in ASCII, a line each where it is lines; manifests are as sha256sum writes them."""
    for path in (app.root / ".deploy").rglob("*.json*"):
        text = path.read_bytes().decode("ascii")
        assert not raw_in(text.replace("\n", "")), path
        for line in text.splitlines() if path.suffix == ".jsonl" else [text]:
            json.loads(line)


# -- escape itself -----------------------------------------------------------------

@pytest.mark.parametrize("name", sorted(HOSTILE))
def test_escape_leaves_nothing_that_acts_and_loses_nothing(name: str) -> None:
    shown = deploy.escape("a" + HOSTILE[name] + "b\n")
    assert raw_in(shown) == [] and "\n" not in shown and shown.startswith("a") and "b" in shown


def test_every_control_and_bidirectional_format_character_is_escaped() -> None:
    """As the Unicode database has them, so that none is forgotten."""
    import unicodedata
    raw = [f"U+{code:04X}" for code in range(0x3000) if 0xd800 > code
           and (unicodedata.category(chr(code)) in ("Cc", "Zl", "Zp") or unicodedata.bidirectional(chr(code)) in (
               "LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI") or chr(code) in "\u061c\u200e\u200f")
           and deploy.escape(chr(code)) == chr(code)]
    assert raw == []


def test_ordinary_text_in_any_script_is_left_alone() -> None:
    for text in ("caf\u00e9", "\u0440\u0435\u043b\u0438\u0437", "\u05d0\u05d1", "\u65e5\u672c", "a\u200db", "\U0001f600",
                 "back\\slash"):
        assert deploy.escape(text) == text


# -- what an artifact brings ---------------------------------------------------------

@pytest.mark.parametrize("name", sorted(HOSTILE))
def test_a_member_name_is_refused_or_shown_escaped(name: str, app: App) -> None:
    path = app.directory / "myapp-1.0.tar"
    make_tar(path, tree_members({"VERSION": "1.0\n"}) + [member("x<ESC>" + HOSTILE[name], "x")])
    write_checksum(path)
    result = judge(app, "deploy", path, marks="")
    if result.exit_code == 0:
        live = app.root / "current" / ("x<ESC>" + HOSTILE[name])
        live.write_text("changed")
        judge(app, "verify", marks="<ESC>")
        live.unlink()
        judge(app, "verify", marks="<ESC>")
    else:
        assert result.exit_code == 4, result.describe()
    stored(app)


@pytest.mark.parametrize("name", sorted(HOSTILE))
def test_a_link_target_is_refused_or_shown_escaped(name: str, app: App) -> None:
    path = app.directory / "myapp-1.0.tar"
    make_tar(path, tree_members({"VERSION": "1.0\n"}) + [member("link", type=b"2", linkname="<ESC>" + HOSTILE[name]
                                                                + "/../../..")])
    write_checksum(path)
    assert judge(app, "deploy", path, marks="").exit_code == 4


def test_the_artifacts_own_name_and_its_directory_are_shown_escaped(app: App) -> None:
    directory = app.directory / ("in <ESC>" + HOSTILE["ESC"] + HOSTILE["bidi override"] + "\nforged")
    made = app.artifact("1.0")
    directory.mkdir()
    path = directory / ("myapp<ESC>" + HOSTILE["OSC"] + "-1.0.tar.gz")
    os.rename(str(made), str(path))
    judge(app, "deploy", path)
    write_checksum(path)
    judge(app, "deploy", path, marks="")
    judge(app, "--set", "artifact.checksum=off", "deploy", path, marks="")
    for words in (["releases"], ["show", "1"], ["history"], ["status"]):
        judge(app, *words, marks="")
    stored(app)


@pytest.mark.parametrize("version", ["1.0\x1b[2J", "1.0\nforged", "1.0\u202e", "1.0\x9b31m", "\x07"])
def test_a_version_with_control_characters_is_refused_and_shown_escaped(version: str, app: App) -> None:
    result = judge(app, "deploy", app.artifact("1.0"), "--release-version", version, marks="")
    assert result.exit_code in (2, 4) and app.releases() == [], result.describe()


def test_a_checksum_file_is_not_quoted_raw(app: App) -> None:
    path = app.artifact("1.0")
    (path.parent / (path.name + ".sha256")).write_text(f"<ESC>{EVERYTHING}  {path.name}\n")
    assert judge(app, "deploy", path, marks="").exit_code == 4


def test_a_template_and_what_it_lacks_are_not_quoted_raw(app: App) -> None:
    app.configure("[template:t]\nsource = t\ntarget = out\n")
    assert judge(app, "deploy", app.artifact("1.0", {"t": f"${{MISSING}} {EVERYTHING}"}), marks="MISSING").exit_code == 1


# -- what commands say ---------------------------------------------------------------

def speaks(app: App, name: str, exit_code: int, text: str = EVERYTHING) -> Path:
    """A program that prints everything hostile, on stdout and on stderr, and its argument for `DEPLOY_VERSION` 1.0 well."""
    (app.directory / "said").write_bytes((text + "\n").encode("utf-8", "surrogateescape") + b"\xff\xfe\x9b31m\n")
    return script(app.directory / name, f"cat {app.directory}/said; cat {app.directory}/said >&2\nexit {exit_code}")


@pytest.mark.parametrize("hook, exit_code", [("pre_stage", 1), ("pre_activate", 1), ("post_deploy", 5), ("on_failure", 0)])
def test_the_output_of_a_hook(hook: str, exit_code: int, app: App) -> None:
    app.deploy("0.9")
    app.configure(f"[hooks]\n{hook} = {speaks(app, 'speaks', exit_code)}\n"
                  + ("pre_stage = false\n" if hook == "on_failure" else ""))
    judge(app, "deploy", app.artifact("1.0"), "--force")
    for words in (["history"], ["show", "2"], ["status"]):
        judge(app, *words, marks="")
    stored(app)


def test_the_output_of_a_hook_that_cuts_its_sequences_in_pieces(app: App) -> None:
    """A character that is cut by the end of a read, or of a long line, becomes none."""
    path = app.directory / "said"
    path.write_bytes(b"<ESC>" + b"\xe2\x80\xae" * 30000 + b"\n" + b"x" * 4095 + b"\xe2\x80\xae\n" + b"\x1b[" * 5000
                     + b"\xc2")
    slow = (f"{sys.executable} -ISc 'import os; data = open(\"{path}\", \"rb\").read(); "
            "[os.write(1, data[at:at + 4099]) for at in range(0, len(data), 4099)]'")
    app.configure(f"[hooks]\npre_activate = {slow}\n")
    judge(app, "deploy", app.artifact("1.0"))
    stored(app)


@pytest.mark.parametrize("words", [["rollback"], ["activate", "1.0"]], ids=["rollback", "activate"])
def test_the_output_of_a_service_command_and_of_a_probe_command(words: List[str], app: App) -> None:
    for version in ("1.0", "1.1"):
        app.deploy(version)
    program = speaks(app, "speaks", 1)
    app.configure(f"[service:web]\ncommand = {program}\n")
    judge(app, *words)
    app.configure(f"[probe:web]\ncommand = {program}\ndeadline = 200ms\nperiod = 20ms\n")
    judge(app, "probe")
    judge(app, "deploy", app.artifact("1.2"))
    stored(app)


def test_what_a_systemctl_says(app: App) -> None:
    """The service's own status text and its journal are foreign as well."""
    bin_directory = app.directory / "bin"
    speaks(app, "bin/systemctl", 1)
    speaks(app, "bin/journalctl", 0)
    app.configure("[service:web]\nunit = web.service\n")
    env = {"PATH": f"{bin_directory}:{os.environ['PATH']}"}
    judge(app, "deploy", app.artifact("1.0"), marks="", env=env)


# -- what a network says ---------------------------------------------------------------

class Hostile(http.server.BaseHTTPRequestHandler):
    """Answers with everything hostile in the reason, the headers and the body."""

    def do_GET(self) -> None:
        """Write the bytes as they are: http.server would refuse some of them."""
        body = (json.dumps({"version": "<ESC>" + EVERYTHING}, ensure_ascii=False) + EVERYTHING).encode("utf-8")
        text = EVERYTHING.replace("\r", "").replace("\x0b", "").replace("\x0c", "").encode("utf-8")
        self.wfile.write(b"HTTP/1.1 500 reason<ESC>" + text + b"\r\nX-Version: <ESC>" + text
                         + b"\r\nLocation: http://elsewhere/<ESC>" + text
                         + b"\r\nContent-Length: " + str(len(body)).encode("ascii") + b"\r\n\r\n" + body)

    def log_message(self, *details: Any) -> None:
        """Keep the tests' output clean."""


@pytest.fixture
def port() -> Iterator[int]:
    """The port of a hostile server."""
    server = http.server.HTTPServer(("127.0.0.1", 0), Hostile)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield server.server_address[1]
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("expectation", ["", "status = 500\nbody = nothing like it\n", "status = 500\njson.version = 1.0\n",
                                         "status = 500\nrelease = json:version\n",
                                         "status = 500\nrelease = header:X-Version\n",
                                         "status = 500\nexpect_header.X-Version = ^none$\n",
                                         "redirects = 3\nstatus = 300-399\n"],
                         ids=["status", "body", "json", "release in json", "release in a header", "header", "redirect"])
def test_an_answer_over_http(expectation: str, port: int, app: App) -> None:
    app.deploy("1.0")
    app.configure(f"[probe:web]\nurl = http://127.0.0.1:{port}/\n{expectation}deadline = 50ms\nperiod = 20ms\n")
    judge(app, "probe")
    failed = judge(app, "deploy", app.artifact("1.1"), marks="")  # a busy host may have no answer in time
    # The old release gets the same answer, so the way back fails as well: the longest of all messages.
    assert failed.exit_code == 6, failed.describe()
    judge(app, "show", "2", marks="")
    stored(app)


# -- what the operator or the surroundings bring ------------------------------------------

@pytest.mark.parametrize("section, key", [
    ("env", "MODE"), ("vars", "MODE"), ("deploy", "application"), ("hooks", "pre_stage"), ("probe:x", "url"),
    ("preflight", "require_commands"), ("preflight", "require_env"), ("preflight", "user"), ("hooks", "run_as"),
    ("deploy", "keep_releases"),
    ("service:x", "command"), ("deploy", "shared_files"), ("artifact", "match")])
def test_a_value_of_the_configuration(section: str, key: str, app: App) -> None:
    """Given by --set, as configparser would split some of it into lines."""
    value = "<ESC>" + EVERYTHING.replace("'", "")
    for words in (["config"], ["preflight"], ["-n", "deploy", app.artifact("1.0")], ["deploy", app.artifact("1.0")]):
        judge(app, "--set", f"{section}.{key}={value}", *words, marks="<ESC>" if words == ["config"] else "")


@pytest.mark.parametrize("words", [["--set", "nothing.x=<ESC>{}"], ["--set", "<ESC>{}.x=1"], ["--set", "<ESC>{}"],
                                   ["<ESC>{}"],
                                   ["activate", "<ESC>{}"], ["show", "<ESC>{}"], ["deploy", "/nowhere/<ESC>{}"],
                                   ["-c", "<ESC>{}", "status"],
                                   ["status", "--<ESC>{}"], ["--root", "/nowhere/<ESC>{}", "status"], ["history", "--limit",
                                                                                                       "<ESC>{}"],
                                   ["probe", "--url", "http://<ESC>{}/"], ["probe", "--tcp", "<ESC>{}"],
                                   ["pack", "/nowhere/<ESC>{}"]],
                         ids=lambda words: " ".join(words)[:30].replace("<ESC>{}", "X"))
def test_a_mistake_on_the_command_line(words: List[str], app: App) -> None:
    assert judge(app, *[word.replace("{}", EVERYTHING) for word in words], log=False, marks="").exit_code != 0


def test_a_configuration_file_that_is_not_understood_is_not_quoted_raw(app: App) -> None:
    for text in ("nonsense <ESC>" + EVERYTHING, "[<ESC>" + EVERYTHING.replace("]", "") + "]\n", "[deploy]\n<ESC>"
                 + EVERYTHING + " = 1\n"):
        app.config.write_bytes(text.encode("utf-8"))
        assert judge(app, "status", log=False, marks="").exit_code == 2


def test_names_in_releases_and_in_the_root_that_are_not_ours(app: App) -> None:
    app.deploy("1.0")
    for name in ("releases", ".deploy/trash"):
        (app.root / name / ("<ESC>" + EVERYTHING.replace("/", "")[:60])).mkdir()
    for words in (["status"], ["releases"], ["prune"], ["recover"], ["deploy", app.artifact("1.1")]):
        judge(app, *words, marks="")


@pytest.mark.parametrize("field", ["user", "host", "command", "since", "pid"])
def test_what_stands_in_a_held_lock_is_not_believed_to_be_harmless(field: str, app: App) -> None:
    import fcntl
    app.deploy("1.0")
    holder = {"pid": 1, "user": "root", "host": "here", "command": "deploy", "since": "now"}  # type: Dict[str, Any]
    holder[field] = "<ESC>" + EVERYTHING[:300]
    with (app.root / ".deploy" / "lock").open("r+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write(json.dumps(holder))
        lock.flush()
        assert judge(app, "deploy", app.artifact("1.1")).exit_code == 75
        judge(app, "status")


@pytest.mark.parametrize("name", ["USER", "LANG", "TERM", "HOME", "PATH", "SSH_CONNECTION", "DEPLOY_DEPLOY_APPLICATION",
                                  "DEPLOY_HOOKS_TIMEOUT"])
def test_the_environment(name: str, app: App) -> None:
    value = EVERYTHING.replace("\x00", "") + (":" + os.environ["PATH"] if name == "PATH" else "")
    judge(app, "preflight", app.artifact("1.0"), marks="", env={name: value})


@pytest.mark.parametrize("locale", ["C", "C.UTF-8"])
def test_the_locale_makes_no_difference(locale: str, app: App) -> None:
    app.configure(f"[hooks]\npre_activate = {speaks(app, 'speaks', 1)}\n")
    judge(app, "deploy", app.artifact("1.0"), env={"LC_ALL": locale, "LANG": None})


def test_a_terminal_gets_deploys_own_colours_and_nothing_else_that_acts(app: App) -> None:
    """On a terminal there are escapes that are meant: take those away, and nothing is left."""
    app.configure(f"[hooks]\npre_activate = {speaks(app, 'speaks', 1)}\n")
    words = " ".join(shlex.quote(word) for word in [sys.executable, "-B", str(deploy.__file__), "-c", str(app.config),
                                                    "deploy",
                                                     str(app.artifact("1.0"))])
    done = subprocess.run(["script", "-qec", words, "/dev/null"], env=clean_environment({"TERM": "xterm"}),
                          stdin=subprocess.DEVNULL,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=60)
    text = re.sub(r"\r\n", "\n", done.stdout.decode("utf-8", "replace"))
    assert "\x1b[31" in text and "<ESC>" in text, text
    assert raw_in(re.sub(r"\x1b\[[0-9;]*m|\r\x1b\[K", "", text)) == []
