"""What is not configured does nothing: no function of a section's is entered by a run whose configuration has none of it."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, Iterator, List, Set, Tuple

import pytest

from support import DEPLOY, App, clean_environment, load_deploy, run_deploy

deploy = load_deploy()
ALWAYS = {"deploy", "artifact", "limits"}
SECTIONS = sorted({name.partition(":")[0] for name, _, _ in deploy.SECTIONS} - ALWAYS)

# A section's functions are those with its name in theirs, and those under the headings of deploy.py that have it.  What goes by another name:
STEMS = {"notify": "notif", "maintenance": "maintenance|flag_up|flag_down", "metrics": "metric", "slots": "slot", "migrate": "migrat", "signature": "_signature|signatures|verifier", "template": "template_|templates",
         "service": "services?_|_service|services", "probe": "probe|asking over the network|work that can be killed", "trace": "otlp|send_trace|traces", "log": "logfile|syslog|the log",
         # These two are read by whatever runs a command or renders a template; [preflight] is a list of checks by other names.
         "env": r"\Z.", "vars": r"\Z.", "hooks": "do_hook|make_hook|missing_programs", "preflight": "check_required|check_ports"}
# What another section asks for as well, or every run looks at: whether there is anything to do.
# A person's flag of maintenance needs no configuration, so `status` looks whether there is one.
SHARED = {"releases_in_use", "maintenance"}

TRACER = """
import importlib.util, json, os, sys
path, argv = sys.argv[1], json.loads(sys.argv[2])
spec = importlib.util.spec_from_file_location("deploy", path)
module = sys.modules["deploy"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
entered, sys.argv[1:] = set(), argv

def note(frame, event, argument):
    if event == "call" and frame.f_code.co_filename == path:
        entered.add((frame.f_code.co_firstlineno, frame.f_code.co_name))

sys.setprofile(note)
code = module.main(argv)
sys.setprofile(None)
sys.stderr.write("\\n" + json.dumps([code, sorted(entered)]))
"""


def entered(*words: Any) -> Set[Tuple[int, str]]:
    """Run deploy.py: (line, name) of each of its functions that was entered."""
    done = subprocess.run([sys.executable, "-I", "-c", TRACER, str(DEPLOY), json.dumps([str(word) for word in words])], cwd="/",
                          env=clean_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True)
    code, found = json.loads(done.stderr.rpartition("\n")[2])
    assert code == 0, done.stderr
    return {(line, name) for line, name in found}


def places() -> Iterator[Tuple[int, str]]:
    """(line, "section / heading in it") of every heading of deploy.py; a section of many things has no name here."""
    section = ""
    for number, line in enumerate(DEPLOY.read_text(encoding="utf-8").splitlines(), 1):
        found = re.match(r"# -- (.*?) -+$|#\s+\d+  (\S.*)$", line)
        if found and found.group(2):
            section = "" if "," in line or " and " in line else found.group(2)
        if found:
            yield number, f"{section} / {found.group(1) or ''}"


def functions_of(section: str, among: Set[Tuple[int, str]]) -> List[str]:
    """Those that are a section's own, by their name or by where they stand."""
    stem, headings = re.compile(STEMS.get(section, section), re.IGNORECASE), list(places())[::-1]
    where = {line: next(heading for number, heading in headings if number < line) for line, _ in among}
    return sorted(f"{name} ({where[line]})" for line, name in among
                  if name not in SHARED and (stem.search(name) or stem.search(where[line])))


@pytest.fixture(scope="module")
def run(tmp_path_factory: Any) -> Set[Tuple[int, str]]:
    """What two deployments, a rollback, a look and a prune enter, without any configuration but the root."""
    app = App(Path(str(tmp_path_factory.mktemp("inert"))) / "app")
    found = set()  # type: Set[Tuple[int, str]]
    for words in (["deploy", app.artifact("1.0")], ["deploy", app.artifact("1.1")], ["rollback"], ["status"], ["prune"]):
        found |= entered("--root", app.root, *words)
    return found


@pytest.mark.parametrize("section", SECTIONS)
def test_a_run_without_a_section_enters_no_function_of_it(section: str, run: Set[Tuple[int, str]]) -> None:
    assert len(run) > 150
    assert functions_of(section, run) == []


CONFIGURED = {
    "metrics": "[metrics]\ntextfile_dir = {0}\n", "notify": "[notify:x]\ntype = command\ncommand = true\n",
    "service": "[service:x]\ncommand = true\n", "probe": "[probe:x]\ncommand = true\nsuccesses = 1\n",
    "signature": "[signature]\nverify = if-present\ncommand = true\n",
    "policy": "[policy]\nwindows = allow 00:00-24:00\n", "trace": "[trace]\notlp = http://127.0.0.1:9\n", "template": "[template:x]\nsource = VERSION\ntarget = made\n", "log": "[log]\nfile = {0}/log\n", "hooks": "[hooks]\npre_stage = true\n",
    "preflight": "[preflight]\nuser = {1}\n", "migrate": "[migrate]\nup = true\n", "maintenance": "[maintenance]\nduring = switch\n",
}  # type: Dict[str, str]


@pytest.mark.parametrize("section", sorted(CONFIGURED))
def test_a_run_with_a_section_enters_functions_of_it(section: str, app: App) -> None:
    """Or the test above would prove nothing."""
    app.configure("durable = no\n" + CONFIGURED[section].format(app.directory, deploy.user_name()))
    assert functions_of(section, entered("-c", app.config, "deploy", app.artifact("1.0")))


def test_config_names_what_is_inert(app: App) -> None:
    app.configure("[metrics]\ntextfile_dir = /x\n[probe:web]\ntcp = 127.0.0.1:9\n")
    inert = app.run("config", check=0).data["inert"]
    assert "notify:NAME" in inert and not {"metrics", "probe:NAME", *ALWAYS}.intersection(inert)
    assert {name.partition(":")[0] for name in run_deploy("config", check=0).data["inert"]} == set(SECTIONS)
    assert app.run("config", json=False, check=0).stdout.endswith("\nNOT CONFIGURED: NOTHING OF IT RUNS\n" + ", ".join(inert) + "\n")
