"""deploy.py as an Ansible module, without Ansible: a file of JSON goes in, one JSON object comes out.  With Ansible: test_ansible.py."""

import ast
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, Iterator, List

import pytest

import tables
from scenes import Gate, configure
from support import App, DEPLOY, Result, clean_environment, decode_one_object, load_deploy, run_deploy, snapshot, start_deploy

deploy = load_deploy()


class Module:
    """The program in an application's directory, called as Ansible calls it."""

    def __init__(self, app: App) -> None:
        self.app, self.file = app, app.directory / "args"

    def write(self, **parameters: Any) -> Path:
        """Write the file that Ansible would; parameters without a configuration get the application's."""
        parameters.setdefault("config", str(self.app.config))
        self.file.write_text(json.dumps({"_ansible_module_name": "deploy", "_ansible_verbosity": 0, **parameters}))
        return self.file

    def run(self, rc: int = 0, **parameters: Any) -> Dict[str, Any]:
        """Run it; the answer must be one object with this rc, and nothing may stand on stderr."""
        result = run_deploy(self.write(**parameters), json=False, check=rc)
        answer = decode_one_object(result)
        assert answer["rc"] == rc and answer["failed"] is (rc != 0) and result.stderr == "", result.describe()
        return answer


@pytest.fixture
def module(app: App) -> Module:
    """A quick application as a module."""
    configure(app)
    return Module(app)


# -- what comes out -----------------------------------------------------------------

def test_the_answer_is_the_result_of_json_and_what_ansible_looks_for(module: Module) -> None:
    answer = module.run(artifact=str(module.app.artifact("1.0")))
    assert {key for key, _ in tables.result_keys()} | {"rc"} <= set(answer)
    assert (answer["changed"], answer["command"], answer["warnings"]) == (True, "deploy", [])
    assert module.app.version == "1.0"
    again = module.run(artifact=str(module.app.artifact("1.0")))
    assert (again["changed"], again["release"]) == (False, answer["release"])
    for key in ("results", "ansible_facts", "diff", "exception", "invocation"):
        assert key not in answer


def test_every_other_command_runs_as_well(module: Module) -> None:
    first = module.run(command="stage", artifact=str(module.app.artifact("1.0")))["release"]
    assert module.run(command="activate", release=first)["changed"]
    second = module.run(artifact=str(module.app.artifact("2.0")))["release"]
    assert module.run(command="pin", release="2.0")["release"] == second
    assert module.run(command="rollback")["release"] == first
    assert [row["id"] for row in module.run(command="releases")["releases"]] == [second, first]
    assert len(module.run(command="history", limit=2)["history"]) == 2
    assert module.run(command="status")["status"]["current"]["id"] == first


def test_a_failure_says_in_msg_what_to_do(module: Module) -> None:
    answer = module.run(2, command="deploy")
    assert answer["msg"] == f"{answer['error']['message']} (hint: {answer['error']['hint']})"
    assert "ARTIFACT" in answer["msg"]
    broken = module.run(5, artifact=str(module.app.artifact("1.0")), _ansible_diff=True, set={
        "probe:web.command": "false", "probe:web.deadline": "100ms"})
    assert broken["rolled_back"] and "probe web failed" in broken["msg"] and "diff" not in broken
    assert module.run(4, artifact=str(module.app.artifact("1.0")))["changed"] is False
    assert module.run(force=True, artifact=str(module.app.artifact("1.0")))["changed"] is True


# -- what goes in ---------------------------------------------------------------------

def argv(**parameters: Any) -> List[str]:
    """The command line that parameters become, without what every one has."""
    words = deploy.module_argv(dict(parameters, _ansible_module_name="deploy"), deploy.Secrets())
    assert words[0] == "--json"
    return [word for word in words[1:] if word != "--"]


UNDERSTOOD = [
    ({"artifact": "a.tgz"}, ["deploy", "a.tgz"]),
    ({"artifact": "-n"}, ["deploy", "-n"]),
    ({"artifact": "a", "sha256": "0" * 64, "release": None}, ["deploy", f"--sha256={'0' * 64}", "a"]),
    ({"command": "rollback"}, ["rollback"]),
    ({"command": "rollback", "release": "1.10"}, ["rollback", "1.10"]),
    ({"config": "a.ini"}, ["deploy", "--config=a.ini"]),
    ({"config": "a.ini, b.ini"}, ["deploy", "--config=a.ini", "--config=b.ini"]),
    ({"config": ["a,b.ini", "c.ini"]}, ["deploy", "--config=a,b.ini", "--config=c.ini"]),
    ({"root": "/srv/x", "wait_lock": 30, "log_file": "/l", "log_format": "json"},
     ["deploy", "--root=/srv/x", "--wait-lock=30", "--log-file=/l", "--log-format=json"]),
    ({"command": "history", "limit": 3, "verify": "False"}, ["history", "--limit=3"]),
    ({"command": "history", "limit": "3"}, ["history", "--limit=3"]),
    ({"command": "probe", "names": "web,db", "wait": "30s"}, ["probe", "--wait=30s", "web", "db"]),
    ({"command": "probe", "probe_command": "true", "expect": ["body=a,b"]}, ["probe", "--command=true", "--expect=body=a,b"]),
    ({"set": {"deploy.keep_releases": 3, "deploy.durable": False}},
     ["deploy", "--set=deploy.keep_releases=3", "--set=deploy.durable=false"]),
    ({"set": {"probe:web.url": "http://x/?a=b", "probe:web.json.a.b": True, "probe:web.json.n": 3, "probe:web.status": [200, "301"]}},
     ["deploy", "--set=probe:web.url=http://x/?a=b", "--set=probe:web.json.a.b=true", "--set=probe:web.json.n=3",
      "--set=probe:web.status=200\n301"]),
    ({"set": {"hooks.pre_stage": ["a b", "c"]}}, ["deploy", "--set=hooks.pre_stage=a b\nc"]),
    ({"set": "deploy.keep_releases=3, deploy.min_free=1M"}, ["deploy", "--set=deploy.keep_releases=3", "--set=deploy.min_free=1M"]),
    ({"_ansible_check_mode": True, "_ansible_verbosity": 3}, ["deploy", "-n", "--debug"]),
    ({"_ansible_check_mode": False, "_ansible_verbosity": 2, "_ansible_tmpdir": "/t", "_ansible_of_tomorrow": {}}, ["deploy"]),
    *[({"force": value}, ["deploy", "--force"]) for value in (True, 1, "yes", "True", "true", "1")],
    *[({"force": value}, ["deploy"]) for value in (False, 0, "no", "False", "false", "0", None)],
]  # type: List[Any]


@pytest.mark.parametrize("parameters, words", UNDERSTOOD, ids=[json.dumps(parameters)[:60] for parameters, _ in UNDERSTOOD])
def test_parameters_become_a_command_line(parameters: Dict[str, Any], words: List[str]) -> None:
    assert argv(**parameters) == words


REFUSED = [
    ({"release_version": 1.1}, "release_version: expected text, and YAML made of it the float 1.1 (hint: quote it"),
    ({"release": 1, "command": "activate"}, "the int 1 (hint: quote it"),
    ({"sha256": 10 ** 63}, "the int 1000"),
    ({"release": False, "command": "activate"}, "the bool false (hint: quote it"),
    ({"release": ["1.0"], "command": "activate"}, "release: expected text, and YAML made of it the list"),
    ({"artifact": {"a": 1}}, "artifact: expected text, and YAML made of it the dict"),
    ({"artifact": ""}, "ARTIFACT: given, but empty"),
    ({"config": ""}, "-c/--config: given, but empty"),
    ({"config": "a.ini,"}, "-c/--config: given, but empty"),
    ({"config": [1.5]}, "config: expected text"),
    ({"config": {"a": "b"}}, "config: expected text, and YAML made of it the dict"),
    ({"force": "perhaps"}, "force: expected yes or no"),
    ({"force": 2}, "force: expected yes or no"),
    ({"force": [True]}, "force: expected yes or no"),
    ({"limit": 2.5, "command": "history"}, "limit: expected text"),
    ({"limit": "many", "command": "history"}, "--limit: 'many': expected a whole number"),
    ({"aritfact": "a"}, "unknown parameter 'aritfact' of the command deploy (hint: did you mean 'artifact'?)"),
    ({"dry_run": True}, "unknown parameter 'dry_run'"),
    ({"state": "present"}, "(hint: it takes config, set, message, artifact, "),
    ({"command": "rollback", "artifact": "a"}, "unknown parameter 'artifact' of the command rollback (hint: it takes config,"),
    ({"command": "depoly"}, "command: there is no 'depoly' (hint: did you mean 'deploy'?)"),
    ({"command": "help"}, "command: there is no 'help'"),
    ({"command": 7}, "command: there is no 7"),
    ({"log_format": "xml"}, "log"),
    ({"artifact": "a\0b"}, "a parameter holds a character that no argument can have"),
    ({"artifact": "a\ud800b"}, "a parameter holds a character that no argument can have"),
    ({"set": {"deploy.keep_release": 3}}, "--set: unknown key 'keep_release' in [deploy] (hint: did you mean 'keep_releases'?)"),
    ({"set": {"deploi.root": "x"}}, "--set: unknown section [deploi]"),
    ({"set": {"deploy": 3}}, "expected SECTION.KEY=VALUE"),
    ({"set": {"vars": {"version": "1.1"}}}, "set: vars: expected text, and YAML made of it the dict"),
    ({"set": {"vars.version": 1.1}}, "set: vars.version: expected text, and YAML made of it the float 1.1"),
    ({"set": {"template:x.mode": 420}}, "set: template:x.mode: expected text, and YAML made of it the int 420"),
    ({"set": {"artifact.checksum": False}}, "[artifact] checksum = 'false': expected required, if-present, off"),
    ({"set": {"deploy.root": None}}, "set: deploy.root: expected text"),
    ({"set": {"hooks.pre_stage": [["a", "b"]]}}, "set: hooks.pre_stage: expected text"),
    ({"set": {"deploy.keep_releases": "many"}}, "[deploy] keep_releases = 'many': expected a whole number"),
    ({"set": "deploy.keep_releases"}, "expected SECTION.KEY=VALUE"),
    ({"set": ["deploy.keep_releases"]}, "expected SECTION.KEY=VALUE"),
    ({"_ansible_check_mode": "perhaps"}, "_ansible_check_mode: expected yes or no"),
]  # type: List[Any]


def test_what_is_wrong_is_named_and_nothing_is_changed(module: Module) -> None:
    """All in one test: each starts the program."""
    artifact, before = module.app.artifact("1.0"), snapshot(module.app.root)
    for parameters, message in REFUSED:
        if parameters.get("command", "deploy") == "deploy":
            parameters = dict({"artifact": str(artifact)}, **parameters)
        if parameters.get("command") == "history":
            parameters = dict(parameters, root=str(module.app.root))
        (module.app.root / ".deploy").mkdir(exist_ok=True)
        answer = module.run(2, **parameters)
        (module.app.root / ".deploy").rmdir()
        assert message in answer["msg"] and answer["changed"] is False, (parameters, answer["msg"])
    assert set(snapshot(module.app.root)) == set(before)


def plausible(name: str, metavar: str) -> Any:
    """A value that a parameter may have."""
    known = {"sha256": "0" * 64, "action": "on", "listen": "127.0.0.1:8503", "log_format": "text", "format": "csv",
             "set": {"deploy.keep_releases": 3}}
    return known.get(name) or {"": True, "N": 3, "DURATION": 3, "[NAME...]": ["x"]}.get(metavar, "1s")


@pytest.mark.parametrize("command", [name for name in deploy.COMMANDS if name not in deploy.TELLING])
def test_every_parameter_of_a_command_is_understood_by_the_command_line(command: str) -> None:
    values = {name: plausible(name, flag.metavar) for name, flag in deploy.parameters_of(command).items()}
    flags = vars(deploy.parse_command_line(["--json"] + deploy.module_argv(
        dict(values, command=command, _ansible_module_name="deploy"), deploy.Secrets())))
    assert flags["command"] == command
    assert all(flags[name] for name in values)


def test_names_that_are_not_ascii_mean_the_same_under_every_locale(module: Module) -> None:
    artifact = module.app.artifact("1.0", name="myäpp")
    answer = decode_one_object(run_deploy(module.write(artifact=str(artifact)), json=False, env={"LANG": "C"}, check=0))
    assert answer["artifact"]["name"] == artifact.name


# -- check mode and diff mode ---------------------------------------------------------

def test_check_mode_changes_nothing_and_tells_what_would_change(module: Module) -> None:
    module.run(artifact=str(module.app.artifact("1.0")))
    artifact, before = module.app.artifact("2.0"), snapshot(module.app.root)
    answer = module.run(artifact=str(artifact), _ansible_check_mode=True, _ansible_diff=True)
    assert snapshot(module.app.root) == before
    assert answer["changed"] and answer["dry_run"] and answer["plan"]
    diff = answer["diff"]
    assert diff["before"].endswith("-1.0\n") and diff["after"].endswith("-2.0\n")
    assert not module.run(artifact=str(module.app.artifact("1.0")), _ansible_check_mode=True)["changed"]


def test_the_diff_is_what_current_pointed_to_and_points_to(module: Module) -> None:
    first, second = module.app.artifact("1.0"), module.app.artifact("2.0")
    new = module.run(artifact=str(first), _ansible_diff=True)
    assert new["diff"]["before"] == ""
    up = module.run(artifact=str(second), _ansible_diff=True)
    assert up["diff"] == {
        "before": new["diff"]["after"], "before_header": f"{module.app.root}/current", "after_header": f"{module.app.root}/current",
        "after": f"releases/{up['release']}\n"}
    back = module.run(command="rollback", _ansible_diff=True)["diff"]
    assert (back["before"], back["after"]) == (up["diff"]["after"], up["diff"]["before"])


@pytest.mark.parametrize("parameters", [{"command": "stage"}, {}], ids=["stage", "deploy-again"])
def test_there_is_no_difference_where_current_stays(module: Module, parameters: Dict[str, Any]) -> None:
    module.run(artifact=str(module.app.artifact("1.0")))
    version = "2.0" if parameters else "1.0"
    diff = module.run(artifact=str(module.app.artifact(version)), _ansible_diff=True, **parameters)["diff"]
    assert diff["before"] == diff["after"] and "-1.0\n" in diff["before"]


# -- no_log -----------------------------------------------------------------------------

PRIVATE = ["hunter2-and-more", "/to-be-hidden", "word-of-a-hook"]


@pytest.mark.parametrize("hidden", [True, False], ids=["no_log", "without"])
def test_no_log_keeps_arguments_out_of_everything_that_is_kept(module: Module, hidden: bool) -> None:
    app, log = module.app, module.app.directory / "log"
    app.artifact("1.0")
    (app.directory / "artifacts").rename(app.directory / "to-be-hidden")
    options = {"vars.plain": PRIVATE[0], "hooks.pre_activate": f"echo {PRIVATE[2]} {PRIVATE[0]}", "hooks.post_activate": "false"}
    answer = module.run(5, artifact=str(app.directory / "to-be-hidden" / "myapp-1.0.tar.gz"), set=options, log_file=str(log),
                        _ansible_no_log=hidden)
    kept = "".join(path.read_text(errors="replace") for path in [log, *(app.root / ".deploy").rglob("*")] if path.is_file())
    assert answer["deploy_id"] in kept
    for word in PRIVATE:
        assert (word in kept + json.dumps(answer)) is not hidden
    assert app.record(app.releases()[0])["version"] == "1.0"


def test_a_secret_that_stands_in_a_digest_by_chance_breaks_no_record(module: Module) -> None:
    artifact = module.app.artifact("1.0")
    sha256 = Path(f"{artifact}.sha256").read_text().split()[0]
    release = module.run(artifact=str(artifact), set={"vars.password": sha256[8:12]})["release"]
    assert module.app.record(release)["artifact"]["sha256"] == sha256
    assert not module.run(artifact=str(artifact))["changed"]


# -- the lock, signals, defects -----------------------------------------------------------

@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Gate]:
    """A gate that is open at the end, whatever happened."""
    made = Gate(tmp_path / "gates")
    yield made
    made.open()


def start(module: Module, directory: Path, **parameters: Any) -> subprocess.Popen:
    """Start the module and do not wait; its answer goes to `directory`/answer."""
    with open(str(directory / "answer"), "wb") as answer:
        return start_deploy(module.write(**parameters), json=False, stdout=answer)


def test_busy_has_an_answer_of_its_own(module: Module, gate: Gate, tmp_path: Path) -> None:
    holder = start(module, tmp_path, artifact=str(module.app.artifact("1.0")), set={"hooks.pre_activate": gate.command})
    gate.wait_for_visitor()
    answer = module.run(75, artifact=str(module.app.artifact("1.0")))
    assert f"pid {holder.pid}" in answer["msg"] and not answer["changed"]
    gate.open()
    assert holder.wait() == 0
    assert not module.run(artifact=str(module.app.artifact("1.0")))["changed"]


@pytest.mark.parametrize("number, rc", [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["term", "int"])
def test_a_signal_undoes_and_is_answered(module: Module, gate: Gate, tmp_path: Path, number: int, rc: int) -> None:
    process = start(module, tmp_path, artifact=str(module.app.artifact("1.0")), set={"hooks.pre_activate": gate.command})
    gate.wait_for_visitor()
    process.send_signal(number)
    assert process.wait() == rc
    answer = json.loads((tmp_path / "answer").read_text())
    assert (answer["rc"], answer["failed"], module.app.current) == (rc, True, None)


DEFECT = """
import sys
sys.path.insert(0, {directory!r})
import deploy
def broken(call):
    print("stray", flush=True)
    {deed}
deploy.COMMANDS["status"] = broken
sys.exit(deploy.main([{file!r}]))
"""


@pytest.mark.parametrize("deed, verbosity, rc, tells", [
    ("raise RuntimeError('of the test')", 0, 70, "internal error: RuntimeError: of the test"),
    ("raise RuntimeError('of the test')", 3, 70, "internal error: RuntimeError: of the test"),
    ("raise KeyboardInterrupt", 0, 130, "interrupted by SIGINT"),
    ("raise RecursionError", 0, 70, "internal error: RecursionError"),
], ids=["defect", "defect-vvv", "interrupt", "recursion"])
def test_a_defect_is_answered_as_well(module: Module, deed: str, verbosity: int, rc: int, tells: str) -> None:
    """A line that the broken command prints must not stand beside the answer."""
    path = module.write(command="status", _ansible_verbosity=verbosity)
    program = DEFECT.format(directory=str(DEPLOY.parent), deed=deed, file=str(path))
    run = subprocess.run([sys.executable, "-B", "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=clean_environment())
    answer = decode_one_object(Result([], run.returncode, run.stdout.decode(), run.stderr.decode(), None))
    assert (run.returncode, answer["rc"], answer["failed"]) == (rc, rc, True) and tells in answer["msg"]
    assert run.stderr == b"stray\n"
    assert ("exception" in answer) is (rc == 70 or verbosity == 3) and "Traceback" in answer.get("exception", "Traceback")


def test_a_child_that_reaches_for_stdout_finds_something_else(module: Module) -> None:
    hook = "sh -c 'echo {} >> /proc/$PPID/fd/1'"
    path = module.write(artifact=str(module.app.artifact("1.0")), set={"hooks.pre_activate": hook})
    result = run_deploy(path, json=False, check=0)
    assert decode_one_object(result)["changed"] and result.stderr == "{}\n"


@pytest.mark.parametrize("closed, answers", [(">&-", False), ("2>&-", True), ("2>&- >/dev/full", False)], ids=["1", "2", "full"])
def test_a_stream_that_is_closed_or_full_costs_no_more_than_the_answer(module: Module, closed: str, answers: bool) -> None:
    path = module.write(artifact=str(module.app.artifact("1.0")), log_file=str(module.app.directory / "log"))
    run = subprocess.run(["sh", "-c", f'"$@" {closed}', "sh", sys.executable, str(DEPLOY), str(path)], stdout=subprocess.PIPE,
                         env=clean_environment())
    assert run.returncode == 0 and module.app.version == "1.0"
    assert bool(run.stdout) is answers and (not answers or json.loads(run.stdout.decode())["changed"])
    assert "recovered" not in (module.app.directory / "log").read_text()


def test_what_ansible_started_is_known_as_such(module: Module) -> None:
    """By the name that Ansible gives a module; the state has it."""
    copy = module.app.directory / "AnsiballZ_deploy.py"
    shutil.copy(str(DEPLOY), str(copy))
    run = subprocess.run([sys.executable, str(copy), str(module.write(artifact=str(module.app.artifact("1.0"))))],
                         stdout=subprocess.PIPE, env=clean_environment({"INVOCATION_ID": "of-a-session"}))
    assert json.loads(run.stdout.decode())["changed"]
    assert module.app.history()[0]["by"]["trigger"] == "ansible"
    assert sorted(path.name for path in module.app.directory.glob("*.py*")) == [copy.name]


# -- files that are damaged, and files that are not meant -----------------------------------

DAMAGED = {
    "cut-off": b'{"_ansible_module_name": "deploy", "command": "sta',
    "deep": b'{"a": ' + b"[" * 100000, "not-utf-8": b'{"_ansible_module_name": "\xff"}', "two": b'{"_ansible_module_name": 1} {}',
    "brace": b" \n{", "huge-number": b'{"_ansible_module_name": "deploy", "command": ' + b"9" * 5000 + b"}",
}


@pytest.mark.parametrize("data", DAMAGED.values(), ids=DAMAGED.keys())
def test_damaged_parameters_are_answered(module: Module, data: bytes) -> None:
    module.file.write_bytes(data)
    answer = decode_one_object(run_deploy(module.file, json=False, check=2))
    assert answer["failed"] and answer["rc"] == 2 and answer["msg"]


@pytest.mark.parametrize("data", [b"", b"{}", b'{"command": "status"}', b"[1]", b"\x1f\x8b", b"null"])
def test_any_other_file_is_a_mistake_on_a_command_line(module: Module, data: bytes) -> None:
    module.file.write_bytes(data)
    result = run_deploy(module.file, json=False, check=2)
    assert result.stdout == "" and "invalid choice" in result.stderr


def test_a_fifo_or_a_directory_or_nothing_is_not_waited_for(module: Module) -> None:
    os.mkfifo(str(module.file))
    for path in (module.file, module.app.root, module.app.directory / "none"):
        assert run_deploy(path, json=False, check=2).stdout == ""


@pytest.mark.parametrize("name", ["status", "staus"])
def test_a_file_that_lies_about_cannot_become_a_command(module: Module, name: str) -> None:
    """Else whoever may write to the working directory of root could say what `deploy.py status` does."""
    module.file = module.app.directory / name
    module.write(artifact=str(module.app.artifact("1.0")))
    run_deploy(name, json=False, cwd=module.app.directory, env={"DEPLOY_DEPLOY_ROOT": str(module.app.root)})
    assert module.app.current is None
    run_deploy(f"./{name}", json=False, cwd=module.app.directory, check=0)
    assert module.app.version == "1.0"


# -- what stands in the file ----------------------------------------------------------------

def test_the_mark_stands_in_the_file_once() -> None:
    assert DEPLOY.read_text(encoding="utf-8").count("WANT" + "_JSON") == 1


# What Ansible looks for in a module's bytes to decide how it is run; the mark above comes last of them.
OTHER_STYLES = [
    b"from ansible.module_utils", b"import ansible.module_utils.", b"#<<INCLUDE_ANSIBLE_MODULE_COMMON>>", b"<<INCLUDE_ANSIBLE_MODULE_JSON_ARGS>>",
    b"# POWERSHELL_COMMON", b"#Requires -Module", b"#Requires -Version", b"#AnsibleRequires -"]


def test_nothing_in_the_file_makes_it_a_module_of_another_style() -> None:
    data = DEPLOY.read_bytes()
    assert [text for text in OTHER_STYLES if text.lower() in data.lower()] == []
    # Other first lines fail with rc 127 there; control characters would make it a binary module.
    assert data.startswith(b"#!/usr/bin/python3\n")
    assert re.search(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]", data[:1024]) is None


def test_documentation_names_the_main_parameters_and_no_other() -> None:
    named = re.findall(r"(?m)^  (\w+): \{", deploy.DOCUMENTATION.partition("\noptions:\n")[2])
    assert len(named) == len(set(named)) == 10
    assert set(named) <= {"command"}.union(*map(deploy.parameters_of, deploy.COMMANDS))
    assert {"artifact", "release", "config", "root", "sha256", "set", "force", "release_version", "wait_lock"} <= set(named)


def test_ansible_doc_can_read_every_assignment() -> None:
    """It warns of each that has more than one name to the left."""
    tree = ast.parse(DEPLOY.read_text(encoding="utf-8"))
    assert [node.lineno for node in tree.body if isinstance(node, ast.Assign)
            and not all(isinstance(target, ast.Name) for target in node.targets)] == []
