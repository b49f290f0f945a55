"""What a local user can and cannot do to a run as root: planted modules, files others may write, swapped symlinks."""

import json
import os
import re
import shlex
import shutil
import stat
import struct
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Set, Tuple

import pytest

from crashes import script
from scenes import configure
from support import (DEPLOY, App, Result, clean_environment, described, file, load_deploy, make_tree, needs, open_to_others, run_as_another, sized,
                     run_deploy, snapshot)

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
NOBODY = 65534
ATTACK_SECONDS = sized(quick=1, whole=3, proof=60)


# -- planted modules -------------------------------------------------------------

# Those that deploy.py imports at once, those that it imports on the way, and what they import in turn.
PLANTED = ("json", "argparse", "typing", "errno", "fcntl", "hashlib", "re", "signal", "stat", "types", "collections",
           "contextlib",
           "configparser", "subprocess", "logging", "shlex", "socket", "threading", "select", "pwd", "urllib", "http",
           "itertools",
           "tempfile", "traceback", "difflib", "heapq", "enum", "functools", "copyreg", "struct", "zlib")


@pytest.fixture
def planted(tmp_path: Path) -> Iterator[Path]:
    """A directory of modules, a package and a deploy.ini that leave a mark when they are used; at the end there is none."""
    directory, mark = tmp_path / "planted", tmp_path / "mark"
    directory.mkdir()
    for name in PLANTED:
        plant(directory / f"{name}.py", name, mark)
    for package in ("logging", "urllib", "http"):
        (directory / package).mkdir()
        plant(directory / package / "__init__.py", package + "/", mark)
    (directory / "deploy.ini").write_text(f"[hooks]\npre_stage = /bin/sh -c 'echo deploy.ini >> {mark}'\n")
    yield directory
    assert not mark.exists(), f"used: {mark.read_text()}"


def plant(path: Path, name: str, mark: Path) -> None:
    """Write a module that leaves a mark, and would stop the run."""
    path.write_text(f"open({str(mark)!r}, 'a').write({name!r} + chr(10))\nraise SystemExit(99)\n")


def launch(argv: List[Any], cwd: Path, app: App, env: Optional[Dict[str, Optional[str]]] = None) -> Any:
    """Run a command line with --json deploy ... behind it, as if typed in a directory."""
    words = [str(word) for word in argv] + ["--json", "-c", str(app.config), "--log-file", str(app.directory / "log"),
                                            "deploy",
                                            str(app.artifact("1.0"))]
    return subprocess.run(words, cwd=str(cwd), env=clean_environment(env), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, timeout=60)


PATHS = ["absolute, cwd", "relative, beside", "python3 deploy.py, beside", "./deploy.py, beside", "symlink beside",
         "symlink elsewhere",
         "relative with a detour", "PATH", "stdin"]


@pytest.mark.parametrize("variables", ["none", "all"])
@pytest.mark.parametrize("how", PATHS)
def test_no_planted_module_is_used_however_it_is_started(how: str, variables: str, planted: Path, app: App) -> None:
    """Also with every variable that makes Python look elsewhere or run something first.

    What the interpreter itself imports before the first line of any program
    (encodings, site) is out of the program's reach, and so is `python3 -m`.
    """
    # A probe and a service make it import what only some runs need.
    app.configure("[service:x]\ncommand = true\n[probe:y]\ncommand = true\nsuccesses = 1\n[probe:z]\nurl = "
                  "http://127.0.0.1:9/\n"
                  "deadline = 50ms\nrequired = no\n")
    argv, cwd, env = command_of(how, planted, app)
    if variables == "all":
        for name in imported_at_start():
            if (planted / f"{name}.py").exists():
                (planted / f"{name}.py").unlink()
        startup = planted / "startup.py"
        plant(startup, "PYTHONSTARTUP", planted.parent / "mark")
        env.update(PYTHONPATH=str(planted), PYTHONSTARTUP=str(startup), PYTHONUSERBASE=str(planted), PYTHONINSPECT="",
                   PYTHONBREAKPOINT="json.loads")
    done = launch(argv, cwd, app, env)
    assert done.returncode == 0, done.stderr.decode("utf-8", "replace")
    assert json.loads(done.stdout.decode("ascii"))["ok"] and app.version == "1.0"


def imported_at_start() -> List[str]:
    """The modules that the interpreter has imported before a program begins."""
    words = "import sys; sys.stdout.write(' '.join(sys.modules))"
    return subprocess.check_output([sys.executable, "-c", words], env=clean_environment()).decode("ascii").split()


def command_of(how: str, planted: Path, app: App) -> Tuple[List[Any], Path, Dict[str, Optional[str]]]:
    """The command line, working directory and environment for one way to start it."""
    beside = planted / "deploy.py"
    if "beside" in how and how != "symlink beside" or how in ("relative with a detour", "PATH"):
        shutil.copy(str(DEPLOY), str(beside))
        # The interpreter under test, and not whichever the #! line finds.
        beside.write_text(re.sub(r"\A#!.*", f"#!{sys.executable}", beside.read_text()))
        beside.chmod(0o755)
    if how == "symlink beside":
        beside.symlink_to(DEPLOY)
        return [sys.executable, beside], planted, {}
    if how == "symlink elsewhere":
        target = app.directory / "bin" / "deploy"
        target.parent.mkdir()
        target.symlink_to(DEPLOY)
        return [sys.executable, target], planted, {}
    if how == "stdin":
        return ["/bin/sh", "-c", f'cat {shlex.quote(str(DEPLOY))} | "$0" - "$@"', sys.executable], planted, {}
    return {
        "absolute, cwd": ([sys.executable, DEPLOY], planted, {}),
        "relative, beside": ([sys.executable, "planted/deploy.py"], planted.parent, {}),
        "python3 deploy.py, beside": ([sys.executable, "deploy.py"], planted, {}),
        "./deploy.py, beside": (["./deploy.py"], planted, {}),
        "relative with a detour": ([sys.executable, "../planted//./deploy.py"], planted, {}),
        "PATH": (["deploy.py"], planted, {"PATH": f"{planted}:{os.environ['PATH']}"}),
    }[how]  # type: ignore


def test_a_wrong_pythonhome_is_not_made_worse(planted: Path, app: App) -> None:
    """The interpreter may not start at all; whatever it does, it runs nothing from there."""
    # Only the standard library of this Python, planted: a complete one would be another Python, chosen by who starts it.
    library = planted / "lib" / ("python%d.%d" % sys.version_info[:2])
    library.mkdir(parents=True)
    for name in ("json", "argparse", "typing"):
        plant(library / f"{name}.py", "PYTHONHOME " + name, planted.parent / "mark")
    done = launch([sys.executable, DEPLOY], planted, app, {"PYTHONHOME": str(planted)})
    assert done.returncode != 99 and app.version in (None, "1.0")
    if done.returncode:
        assert app.releases() == [], "it failed half way"


def test_a_configuration_in_the_working_directory_is_found_but_one_that_is_named_wins(planted: Path, app: App) -> None:
    """./deploy.ini is one of the documented places: it is named by `config`, and -c takes it out of play."""
    shown = run_deploy("config", cwd=planted, check=0)
    assert shown.data["config"]["hooks.pre_stage"]["origin"].endswith("deploy.ini")
    assert run_deploy("config", cwd=planted, config=app.config, check=0).data["config"]["hooks.pre_stage"]["value"] == ""


@as_root
@pytest.mark.parametrize("owner, mode", [(NOBODY, 0o644), (0, 0o666)], ids=["another's", "writable"])
def test_a_configuration_that_somebody_left_in_the_working_directory_is_refused(owner: int, mode: int, planted: Path,
                                                                                app: App) -> None:
    """/tmp is such a place: root works there, and everybody may write."""
    shared = app.directory / "tmp"
    shared.mkdir()
    shared.chmod(0o1777)
    left = Path(shutil.move(str(planted / "deploy.ini"), str(shared)))
    os.chown(str(left), owner, owner)
    left.chmod(mode)
    result = run_deploy("deploy", app.artifact("1.0"), root=app.root, cwd=shared, check=3)
    assert str(left) in result.data["error"]["message"] and app.releases() == []


# -- who owns it, who may write it --------------------------------------------------

class Fault(NamedTuple):
    """A path with the wrong owner or mode, and what mends it."""

    path: Path
    owner: int
    mode: int

    def make(self) -> None:
        """Give it the wrong owner and mode."""
        self.path.chmod(self.mode)
        os.chown(str(self.path), self.owner, -1)

    def words(self) -> Tuple[str, str]:
        """What the message and the hint must hold."""
        if self.owner:
            return f"{self.path} belongs to uid {self.owner}", f"chown root {self.path}"
        return f"{self.path} is writable by group or others (mode {self.mode & 0o7777:04o})", f"chmod go-w {self.path}"


class Trusted(NamedTuple):
    """An application in a place that only root could write, and the paths that root believes, by name."""

    app: App
    paths: Dict[str, Path]


@pytest.fixture(scope="module")
def key_pair(tmp_path_factory: Any) -> Path:
    """A directory with a key and its certificate, which takes longer to make than all the rest of a test."""
    place = Path(str(tmp_path_factory.mktemp("tls")))
    subprocess.run([needs("openssl"), "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=x", "-keyout", str(place / "key"),
                    "-out", str(place / "cert")], check=True, stderr=subprocess.DEVNULL)
    return place


@pytest.fixture
def trusted(tmp_path: Path, key_pair: Path) -> Trusted:
    """Everything that is believed, each in a directory of its own."""
    app = App(tmp_path / "place" / "app")
    places = {name: app.directory / name for name in ("conf", "hooks", "service", "probes", "auth", "tls")}
    for place in places.values():
        place.mkdir()
    config = places["conf"] / "deploy.ini"
    hook, service, probe = (script(places[name] / name, "exit 0") for name in ("hooks", "service", "probes"))
    auth, key, certificate, authority = places["auth"] / "auth", *(places["tls"] / name for name in ("key", "cert", "ca"))
    auth.write_text("x:y\n")
    for name, path in (("key", key), ("cert", certificate), ("cert", authority)):
        shutil.copy(str(key_pair / name), str(path))
    for path in (auth, key, certificate, authority):
        path.chmod(0o600)
    config.write_text(f"[deploy]\nroot = {app.root}\napplication = myapp\ndurable = no\n[hooks]\npre_stage = {hook} "
                      f"--option\n"
                      f"[service:web]\ncommand = {service}\n[probe:up]\ncommand = {probe}\nsuccesses = 1\n"
                      f"[probe:web]\nurl = https://127.0.0.1:9/\nrequired = no\ndeadline = 100ms\ntimeout = 50ms\n"
                      f"auth_file = {auth}\n"
                      f"tls_ca = {authority}\ntls_cert = {certificate}\ntls_key = {key}\n")
    app.config = config
    paths = {"configuration": config, "its directory": places["conf"], "hook program": hook,
             "hook's directory": places["hooks"],
             "service command": service, "service's directory": places["service"], "probe command": probe, "auth_file": auth,
             "auth_file's directory": places["auth"], "tls_key": key, "tls_cert": certificate, "tls_ca": authority,
             "root": app.root,
             "parent of all": app.directory, "its parent": app.directory.parent}
    return Trusted(app, paths)


OWN = ("configuration", "its directory", "parent of all", "its parent")
BELIEVED = OWN + ("hook program", "hook's directory", "service command", "service's directory", "probe command", "auth_file",
                  "auth_file's directory", "tls_key", "tls_cert", "tls_ca", "root")
FAULTS = {"another's": (61234, 0o755), "group may write": (0, 0o775), "others may write": (0, 0o757)}


def permissions(result: Result) -> Dict[str, str]:
    """The check of that name."""
    return next(found for found in result.data["checks"] if found["name"] == "permissions")  # type: ignore


@as_root
@pytest.mark.parametrize("name, fault", sorted(
    {(name, sorted(FAULTS)[number % 3]) for number, name in enumerate(BELIEVED)} |
    {(name, fault) for name in ("configuration", "hook's directory") for fault in FAULTS}))
def test_what_others_could_have_written_is_refused_with_its_remedy(name: str, fault: str, trusted: Trusted) -> None:
    app, made = trusted.app, Fault(trusted.paths[name], *FAULTS[fault])
    artifact = app.artifact("1.0")
    made.make()
    before = snapshot(app.root)
    problem, remedy = made.words()
    checked = app.run("preflight", artifact, check=3)
    found = permissions(checked)
    assert found["status"] == "fail" and problem in found["detail"] and remedy in found["hint"], found
    refused = app.run("deploy", artifact, check=3)
    assert problem in refused.data["error"]["message"] and remedy in refused.data["error"]["hint"]
    assert snapshot(app.root) == before
    mend(remedy)
    assert app.run("deploy", artifact, check=0).data["changed"]
    assert permissions(app.run("preflight", check=0))["status"] == "ok"


def mend(remedy: str) -> None:
    """Do as the hint says."""
    subprocess.run(remedy, shell=True, check=True)


@as_root
@pytest.mark.parametrize("command", ["stage", "activate", "rollback", "prune", "pin", "recover", "probe"])
def test_every_command_that_acts_refuses(command: str, trusted: Trusted) -> None:
    app = trusted.app
    for version in ("1.0", "1.1"):
        app.deploy(version)
    words = {"stage": [app.artifact("1.2")], "activate": ["1.0"], "pin": ["1.0"]}.get(command, [])  # type: List[Any]
    Fault(trusted.paths["hook program"], 61234, 0o755).make()
    before = snapshot(app.root)
    refused = app.run(command, *words, check=3)
    assert "belongs to uid 61234" in refused.data["error"]["message"] and snapshot(app.root) == before


@as_root
@pytest.mark.parametrize("place, mode, owner, hint", [
    ("", 0o777, 0, "chmod -R go-w"), ("releases", 0o700, NOBODY, "chown -R root"),
], ids=["open", "a part"])
def test_status_tells_of_a_state_that_every_run_would_refuse(place: str, mode: int, owner: int, hint: str, app: App) -> None:
    app.deploy("1.0")
    path = app.root / ".deploy" / place
    path.chmod(mode)
    os.chown(str(path), owner, owner)
    for words, exit_code in ((["status"], 7), (["rollback"], 3)):
        error = app.run(*words, check=exit_code).data["error"]
        assert str(path) in error["message"] and hint in error["hint"], error


@as_root
def test_root_may_look_at_what_another_user_deploys(app: App) -> None:
    app.deploy("1.0")
    for path in (app.root, *app.root.rglob("*")):
        os.chown(str(path), NOBODY, NOBODY, follow_symlinks=False)
    app.run("status", check=0)
    app.run("rollback", check=3)


@as_root
def test_a_file_of_an_artifact_that_cannot_be_read_is_named() -> None:
    with open_to_others() as app:
        tree = make_tree(app.directory / "tree-1.0", {"a/b/secret": "x", "open": "y"})
        (tree / "a" / "b" / "secret").chmod(0)
        error = run_as_another(app, "deploy", tree, but=tree / "a" / "b" / "secret")["error"]
        assert str(tree) in error["message"] and "'a/b/secret': Permission denied" in error["message"] and "readable" in error["hint"], error


@as_root
@pytest.mark.parametrize("command", ["status", "releases", "history", "verify", "config"])
def test_commands_that_only_look_may_be_used_to_find_out(command: str, trusted: Trusted) -> None:
    trusted.app.deploy("1.0")
    Fault(trusted.paths["configuration"], 0, 0o666).make()
    trusted.app.run(command, check=0)


@as_root
@pytest.mark.parametrize("name", [name for name in BELIEVED if name not in OWN])
def test_a_risk_that_is_accepted_is_a_warning(name: str, trusted: Trusted) -> None:
    app, made = trusted.app, Fault(trusted.paths[name], 61234, 0o777)
    with app.config.open("a") as config:
        config.write(f"[preflight]\naccept_risk =\n  /nowhere\n  {made.path}\n")
    made.make()
    checked = app.run("preflight", app.artifact("1.0"), check=0)
    found = permissions(checked)
    assert found["status"] == "warn" and str(made.path) in found["detail"], found
    app.run("deploy", app.artifact("1.0"), check=0)


@as_root
def test_only_the_path_that_is_listed_is_accepted(trusted: Trusted) -> None:
    app = trusted.app
    for name in ("hook program", "auth_file"):
        Fault(trusted.paths[name], 61234, 0o755).make()
    with app.config.open("a") as config:
        config.write(f"[preflight]\naccept_risk = {trusted.paths['auth_file']}\n")
    refused = app.run("deploy", app.artifact("1.0"), check=3)
    assert str(trusted.paths["hook program"]) in refused.data["error"]["message"]
    assert str(trusted.paths["auth_file"]) not in refused.data["error"]["message"]


@as_root
@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("way", ["file", "another file", "--set", "environment"])
def test_a_configuration_cannot_vouch_for_itself(way: str, name: str, trusted: Trusted) -> None:
    """Who may write it could write that as well; the command line and the environment are the operator's own."""
    app, made = trusted.app, Fault(trusted.paths[name], 61234, 0o777)
    words, env = [], {}  # type: List[Any], Dict[str, Optional[str]]
    if way == "file":
        with app.config.open("a") as config:
            config.write(f"[preflight]\naccept_risk = {made.path}\n")
    elif way == "another file":
        second = app.directory.parent / "second.ini"
        second.write_text(f"[preflight]\naccept_risk = {made.path}\n")
        words = ["-c", second]
    elif way == "--set":
        words = ["--set", f"preflight.accept_risk={made.path}"]
    else:
        env = {"DEPLOY_PREFLIGHT_ACCEPT_RISK": str(made.path)}
    made.make()
    result = app.run("deploy", app.artifact("1.0"), *words, env=env)
    assert result.exit_code == (3 if "file" in way else 0), result.describe()


@as_root
@pytest.mark.parametrize("where", ["configuration", "hook program", "auth_file", "root"])
def test_a_symlink_on_the_way_is_judged_at_both_ends(where: str, trusted: Trusted) -> None:
    """A link in a directory that others may write could be swapped, however safe the file that it leads to."""
    app = trusted.app
    loose = app.directory / "loose"
    loose.mkdir()
    link = loose / "link"
    link.symlink_to(trusted.paths[where])
    text = app.config.read_text().replace(str(trusted.paths[where]), str(link))
    app.config.write_text(text)
    config = link if where == "configuration" else app.config
    loose.chmod(0o777)
    refused = run_deploy("deploy", app.artifact("1.0"), config=config, check=3)
    assert f"chmod go-w {loose}" in refused.data["error"]["hint"], refused.data["error"]


@as_root
def test_a_sticky_directory_is_safe_as_far_as_the_file_in_it_is(trusted: Trusted) -> None:
    """In /tmp nobody can replace what belongs to root; what belongs to another is that other's."""
    trusted.paths["hook's directory"].chmod(0o1777)
    trusted.app.deploy("1.0")
    os.chown(str(trusted.paths["hook program"]), 61234, -1)
    trusted.app.run("deploy", trusted.app.artifact("1.1"), check=3)


@as_root
@pytest.mark.parametrize("name, fault, remedy", [
    ("", (61234, 0o700), "sudo -u '#61234'"), ("", (0, 0o770), "chmod -R go-w"), ("", (0, 0o705), "chmod 0700")] + [
    (name[len(".deploy/"):], (61234, 0o700), "chown -R root") for name in load_deploy().PRIVATE_DIRECTORIES[1:]] + [("manifests", (0, 0o770), "chmod -R go-w")])
def test_state_that_others_could_have_written_is_refused(name: str, fault: Tuple[int, int], remedy: str, trusted: Trusted) -> None:
    app = trusted.app
    app.deploy("1.0")
    Fault(app.root / ".deploy" / name, *fault).make()
    refused = app.run("deploy", app.artifact("1.1"), check=3)
    assert remedy in refused.data["error"]["hint"] and app.version == "1.0", refused.data["error"]


@as_root
@pytest.mark.parametrize("interpreter", ["env", "python"])
def test_what_a_hook_is_told_to_run_is_not_judged_and_therefore_said_here(interpreter: str, trusted: Trusted) -> None:
    """The program of a hook is judged, its arguments are not: `python3 /opt/x.py` with an x.py of others is believed.

    By design: what an argument means is the program's own affair.  The test
    holds on to it, so that a change of it is noticed.
    """
    app = trusted.app
    loose = script(app.directory / "loose", "exit 0")
    os.chown(str(loose), 61234, -1)
    before = f"pre_stage = {trusted.paths['hook program']} --option"
    app.config.write_text(app.config.read_text().replace(before, f"pre_stage = {needs('env')} {loose}"))
    app.run("deploy", app.artifact("1.0"), check=0)


# -- where programs come from ---------------------------------------------------

def runs(app: App, text: str, files: Optional[Dict[str, Any]] = None) -> Path:
    """Configure what is to be run, and build an artifact that brings a program `bin/tool`."""
    configure(app, text)
    return app.artifact("1.0", dict({"bin/tool": executable("#!/bin/sh\n")}, **files or {}))


def executable(text: str) -> Any:
    """A program as a file of an artifact."""
    return file(text, 0o755)


def refused(app: App, artifact: Path, *problems: str) -> None:
    """A deployment is refused before anything, for these reasons; the option that the hint has accepts the risk."""
    before = snapshot(app.root)
    error = app.run("deploy", artifact, check=3).data["error"]
    for problem in problems:
        assert problem in error["message"] + permissions(app.run("preflight", artifact))["detail"], described(error)
    assert snapshot(app.root) == before
    words = shlex.split(error["hint"].rpartition("every such path: ")[2])
    assert words[0] == "--set"
    app.run("-n", "deploy", artifact, *words, check=0)


@as_root
@pytest.mark.parametrize("way", ["found there", "looked for there first", "relative in PATH"])
def test_a_program_that_the_hooks_own_path_finds_is_judged(way: str, app: App) -> None:
    place = app.directory / "theirs" / "bin"
    place.mkdir(parents=True)
    if way == "found there":
        script(place / "tool", "exit 0")
    else:
        script(app.directory / "ours", "exit 0").rename(app.directory / "tool")
    entry = place if way != "relative in PATH" else "../../theirs/bin"
    artifact = runs(app, f"[env]\nPATH = {entry}:{app.directory}:/usr/bin:/bin\n[hooks]\npre_activate = tool\n")
    if way == "relative in PATH":
        (app.root / "theirs").mkdir()
        place = app.root / "theirs"
    app.run("-n", "deploy", artifact, check=0)
    os.chown(str(place), NOBODY, -1)
    refused(app, artifact, f"{place} belongs to uid {NOBODY}, on the way to tool of [hooks] pre_activate")


@as_root
def test_systemctl_is_judged_though_hooks_run_as_somebody_else(app: App) -> None:
    """It is run by root all the same, and a preflight runs it as well."""
    place = app.directory / "theirs"
    place.mkdir()
    script(place / "systemctl", f"touch {app.directory}/ran").chmod(0o777)
    artifact = runs(app, "[hooks]\nrun_as = nobody\n[service:web]\nunit = web.service\n")
    env = {"PATH": f"{place}:/usr/bin:/bin"}  # type: Dict[str, Optional[str]]
    for words in (["deploy", artifact], ["preflight", artifact]):
        result = app.run(*words, env=env, check=3)
        assert f"{place}/systemctl is writable by group or others" in result.data["error"]["message"]
    assert not (app.directory / "ran").exists()


CLIMBING = {
    "a shared directory": ("shared_dirs = bin\n", "bin/tool", "shared/bin"),
    "a shared file": ("shared_files = bin/tool\n", "bin/tool", "shared/bin/tool"),
    "through the release and out": ("shared_dirs = bin\n", "lib/../bin/tool", "shared/bin"),
    "climbing to shared": ("", "../../shared/bin/tool", "shared/bin"),
    "climbing to the root": ("", "../../tools/tool", "tools"),
    "climbing to another release": ("", "../common/tool", "releases/common"),
    "the releases": ("", "bin/tool", "releases"),
}


@as_root
@pytest.mark.parametrize("name, section", [(name, "[hooks]\npost_deploy") for name in sorted(CLIMBING)] + [
    ("a shared directory", section) for section in ("[service:s]\ncommand", "[probe:p]\nsuccesses = 1\ncommand",
                                                  "[notify:n]\ntype = command\ncommand")])
def test_a_relative_program_is_judged_where_it_leads(name: str, section: str, app: App) -> None:
    deploy, program, theirs = CLIMBING[name]
    for place in ("shared/bin", "tools", "releases/common"):
        (app.root / place).mkdir(parents=True)
        script(app.root / place / "tool", "exit 0")
    artifact = runs(app, f"{deploy}{section} = {program}\n")
    os.chown(str(app.root / theirs), NOBODY, -1)
    refused(app, artifact, f"{app.root / theirs} belongs to uid {NOBODY}")
    configure(app, f"{deploy}[hooks]\nrun_as = root\n{section.replace('[hooks]', '')} = {program}\n")
    app.run("-n", "deploy", artifact, check=0)
    configure(app, f"{deploy}{section} = {program}\n")
    os.chown(str(app.root / theirs), 0, -1)
    assert app.run("deploy", artifact, check=0).data["warnings"] == []


@as_root
def test_a_link_that_a_hook_made_is_judged_when_it_is_about_to_be_followed(app: App) -> None:
    """Nothing before the run can know of it; the run stops before the switch, and undoes itself."""
    (app.root / "shared" / "bin").mkdir(parents=True)
    script(app.root / "shared" / "bin" / "more", f"touch {app.directory}/ran")
    os.chown(str(app.root / "shared" / "bin"), NOBODY, -1)
    artifact = runs(app, f"[hooks]\npost_stage = {needs('ln')} -s ../../shared/bin extra\npre_activate = extra/more\n")
    error = app.run("deploy", artifact, check=1).data["error"]
    assert f"{app.root}/shared/bin belongs to uid {NOBODY}, on the way to extra/more" in error["message"]
    assert app.releases() == [] and not (app.directory / "ran").exists()
    app.run("deploy", artifact, "--set", f"preflight.accept_risk={app.root}/shared/bin", check=0)


@as_root
@pytest.mark.parametrize("command", ["activate", "rollback", "deploy"])
def test_a_release_that_was_given_away_runs_nothing_as_root(command: str, app: App) -> None:
    """The programs of the live one are needed for the way back, those of another when it is to go live."""
    runs(app, "[service:s]\ncommand = bin/tool\n")
    for version in ("1.0", "1.1"):
        app.run("deploy", app.artifact(version, {"bin/tool": executable("#!/bin/sh\n")}), check=0)
    given = app.releases()[1 if command == "deploy" else 0]
    os.chown(str(app.root / "releases" / given), NOBODY, -1)
    words = {"activate": ["1.0"], "deploy": [app.artifact("1.2", {"bin/tool": executable("#!/bin/sh\n")})], "rollback": []}
    result = app.run(command, *words[command], check=3 if command == "deploy" else 1)  # type: ignore
    assert f"releases/{given} belongs to uid {NOBODY}" in result.data["error"]["message"] and app.version == "1.1"


@as_root
def test_what_belongs_to_the_application_is_not_minded_where_root_runs_nothing_of_it(app: App) -> None:
    """shared/ is the application's own in every second set-up, and a hook may give it the release."""
    (app.root / "shared" / "bin").mkdir(parents=True)
    os.chown(str(app.root / "shared"), NOBODY, NOBODY)
    os.chown(str(app.root / "shared" / "bin"), NOBODY, NOBODY)
    artifact = runs(app, f"shared_dirs = bin\n[hooks]\npost_stage = {needs('chown')} -R nobody .\n"
                         f"post_deploy = {needs('true')}\npre_activate = env bin/tool\n[service:s]\ncommand = true\n")
    script(app.root / "shared" / "bin" / "tool", "exit 0")
    assert app.run("deploy", artifact, check=0).data["warnings"] == []
    assert app.run("deploy", app.artifact("1.1"), check=0).data["warnings"] == []
    app.run("rollback", check=0)


@as_root
def test_releases_that_others_may_change_are_a_warning_where_root_runs_nothing_of_them(app: App) -> None:
    app.deploy("1.0")
    (app.root / "releases").chmod(0o777)
    result = app.deploy("1.1")
    assert f"{app.root}/releases is writable by group or others" in result.data["warnings"][0]
    assert result.data["warnings"][1:] == []


@as_root
def test_a_root_of_the_applications_user_needs_one_word_of_consent(app: App) -> None:
    """With run_as it is a sensible set-up: the risk of the root covers what stands in it."""
    for place in ("releases", "shared", "."):
        (app.root / place).mkdir(exist_ok=True)
        os.chown(str(app.root / place), NOBODY, NOBODY)
    for path in (app.directory, *app.directory.parents):
        path.chmod(path.stat().st_mode | 0o755)
    artifact = runs(app, "[hooks]\nrun_as = nobody\npre_activate = bin/tool\n[service:s]\ncommand = bin/tool\n")
    app.run("deploy", artifact, check=3)
    app.run("deploy", artifact, "--set", f"preflight.accept_risk={app.root}", check=0)


@as_root
@pytest.mark.parametrize("links", [1, 3])
def test_a_link_in_the_middle_of_the_way_is_judged_as_well(links: int, app: App) -> None:
    """Neither the path as it is written nor where it ends shows it."""
    target = script(app.directory / "end", "exit 0")
    for number in range(links):
        place = app.directory / f"place{number}"
        place.mkdir()
        (place / "link").symlink_to(os.path.relpath(str(target), str(place)) if number % 2 else target)
        target = place / "link"
    (app.directory / "start").symlink_to(target)
    artifact = runs(app, f"[hooks]\npre_stage = {app.directory}/start\n")
    app.run("-n", "deploy", artifact, check=0)
    (app.directory / "place0").chmod(0o777)
    refused(app, artifact, f"{app.directory}/place0 is writable by group or others")


@as_root
def test_links_in_a_circle_are_not_followed_for_ever(app: App) -> None:
    (app.directory / "start").symlink_to("end")
    (app.directory / "end").symlink_to("start")
    artifact = runs(app, f"[hooks]\npre_stage = {app.directory}/start\n")
    assert "start" in app.run("deploy", artifact, check=3).data["error"]["message"]


@as_root
def test_two_dots_behind_a_link_are_judged_as_the_kernel_goes_them(app: App) -> None:
    """It goes up from where the link led; who could lead that elsewhere chooses the program."""
    for name in ("loose", "far/below", "far/bin", "bin"):
        (app.directory / name).mkdir(parents=True)
    for name in ("far/bin", "bin"):
        script(app.directory / name / "hook", "exit 0")
    (app.directory / "loose" / "link").symlink_to(app.directory / "far" / "below")
    (app.directory / "link").symlink_to(app.directory / "loose" / "link")
    (app.directory / "start").symlink_to("link/../bin/hook")
    artifact = runs(app, f"[hooks]\npre_stage = {app.directory}/start\n")
    app.run("-n", "deploy", artifact, check=0)
    (app.directory / "loose").chmod(0o777)
    refused(app, artifact, f"{app.directory}/loose is writable by group or others")


@as_root
@pytest.mark.parametrize("key", ["file = {}", "syslog = {}"])
@pytest.mark.parametrize("command", ["status", "config", "deploy", "preflight"])
def test_root_writes_no_log_for_a_configuration_of_others(command: str, key: str, app: App) -> None:
    """A ./deploy.ini that somebody left, with root's .bashrc as the log file, would be enough."""
    target = app.directory / "bashrc"
    target.write_text("precious\n")
    text = f"[log]\n{key.format(target)}\n"
    left = app.directory / "left"
    left.mkdir()
    (left / "deploy.ini").write_text(text)
    os.chown(str(left / "deploy.ini"), NOBODY, -1)
    result = run_deploy(command, *([app.artifact("1.0")] if command == "deploy" else []), root=app.root, cwd=left)
    assert target.read_text() == "precious\n" and "others could have written" in " ".join(result.data["warnings"])
    if "file" in key:
        run_deploy(command, *([app.artifact("1.0")] if command == "deploy" else []), "--log-file", app.directory / "mine",
                   root=app.root, cwd=left)
        assert target.read_text() == "precious\n" and (app.directory / "mine").exists()


@as_root
def test_a_directory_of_path_that_a_user_may_not_enter_is_no_matter(tmp_path: Path) -> None:
    """Root's own, in the PATH of who became somebody else without a login: nothing can be started from there."""
    with open_to_others() as app:
        configure(app, f"[env]\nPATH = {tmp_path}/bin:/usr/bin:/bin\n[hooks]\npre_activate = true\n")
        tmp_path.chmod(0o700)
        result = run_as_another(app, "deploy", app.artifact("1.0"))
        assert result["exit_code"] == 0, result["error"]


@as_root
def test_what_releases_hands_on_reaches_every_release(app: App) -> None:
    """Its group, its setgid bit and its default ACL, as they reach whatever is made there."""
    configure(app, "shared_dirs = var/uploads\n[template:t]\nsource = t.in\ntarget = etc/t\n")
    releases = app.root / "releases"
    releases.mkdir(parents=True)
    os.chown(str(releases), -1, NOBODY)
    releases.chmod(0o2755)
    entries = [(1, 7, -1), (2, 5, NOBODY), (4, 5, -1), (16, 5, -1), (32, 5, -1)]  # acl(5): user::, user:NOBODY:, group::, mask::, other::
    acl = struct.pack("<I", 2) + b"".join(struct.pack("<HHi", *entry) for entry in entries)
    try:
        os.setxattr(str(releases), "system.posix_acl_default", acl)
    except OSError:
        pytest.skip("this filesystem has no ACLs")
    files = {"t.in": "text\n", "open/deep/x": "x", "tool": file("#!/bin/sh\n", mode=0o755)}
    app.deploy("1.0", files)
    release = releases / str(app.current)
    for path in [release, *release.rglob("*")]:
        assert path.lstat().st_gid == NOBODY, path
        if path.is_dir() and not path.is_symlink():
            assert path.stat().st_mode & 0o7777 == 0o2755, f"{path} has mode {path.stat().st_mode:04o}"
            assert os.getxattr(str(path), "system.posix_acl_default") == acl
    app.run("verify", check=0)
    app.deploy("1.1", files)
    app.run("rollback", check=0)


# -- the attack --------------------------------------------------------------------

ATTACKER = """
import itertools, os, sys, time
root, outside = sys.argv[1:]
targets = [outside, outside + "/file", outside + "/directory", "../../" + os.path.basename(outside), "/", root + "/.deploy"]
places = [root, root + "/shared", root + "/shared/uploads", root + "/shared/other", root + "/shared/other/inner"]
tries = done = 0
for number in itertools.count():
    os.pwrite(1, b"%d %d" % (tries, done), 0)
    try:
        found = sorted(os.listdir(root + "/releases"))
    except OSError:
        found = []
    below = [root + "/releases/" + name + "/open" for name in found]
    for place in places + below:
        target = targets[number % len(targets)]
        for name in ("uploads", "cache", "inner", "deep", "current", ".current.1.aaaaaaaa.tmp", "shared", ".env", "x", "t",
                     "releases", ".deploy"):
            path, aside = place + "/" + name, place + "/aside-" + name
            tries += 1
            try:
                os.rename(path, aside)
            except OSError:
                pass
            try:
                os.symlink(target, path)
                done += 1
            except OSError:
                pass
            try:
                os.unlink(path)
            except OSError:
                pass
            try:
                os.rename(aside, path)
            except OSError:
                pass
        try:
            os.makedirs(place + "/inner/a/b")
        except OSError:
            pass
"""


@contextmanager
def attack(app: App, outside: Path) -> Iterator[List[int]]:
    """A user without rights who swaps symlinks wherever it may write, until the block ends; yields [tries, links] then."""
    report, figures = app.directory / "figures", []  # type: Path, List[int]
    argv = [needs("setpriv"), f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "/usr/bin/python3", "-ISc",
            ATTACKER,
            str(app.root), str(outside)]
    with report.open("wb") as stdout:
        process = subprocess.Popen(argv, stdout=stdout, cwd="/")
    try:
        yield figures
    finally:
        process.kill()
        process.wait()
        figures.extend(int(word) for word in report.read_text().split())


def sentinel(app: App) -> Path:
    """A tree beside the root, of files and directories that root owns and a swapped symlink could reach."""
    outside = app.directory / "outside"
    (outside / "directory" / "below").mkdir(parents=True)
    for path in (outside / "file", outside / "directory" / "file", outside / "directory" / "below" / "file",
                 outside / "VERSION"):
        path.write_text("precious\n")
        path.chmod(0o600)
    (outside / "directory").chmod(0o700)
    return outside


def everything_about(path: Path) -> Any:
    """A snapshot with owners."""
    return snapshot(path), {str(found): (found.lstat().st_uid, found.lstat().st_gid) for found in [path, *path.rglob("*")]}


def open_up(app: App, release: Optional[str], whole_root: bool) -> None:
    """Let the attacker write in a directory of the release, in shared/ and maybe in the root: as the careless do."""
    paths = ([app.root] if whole_root else []) + [app.root / "shared"] + [app.root / "shared" / name for name
                                                                          in ("uploads", "other", "other/inner")]
    paths += [app.root / "releases" / release / "open"] if release else []
    for path in paths:
        try:
            os.chown(str(path), NOBODY, NOBODY, follow_symlinks=False)
        except (FileNotFoundError, NotADirectoryError):
            pass  # it is being swapped just now


@as_root
@pytest.mark.parametrize("where", ["shared and a release", "the root as well"])
def test_swapped_symlinks_lead_nothing_out_of_the_root(where: str, tmp_path: Path) -> None:
    """Deployments, rollbacks and prunes as root, while somebody swaps symlinks in every place that is open to them.

    What must hold is that nothing outside is written, chmod-ed or deleted; that
    a run fails under such conditions is its right.
    """
    for path in (tmp_path, tmp_path.parent, tmp_path.parent.parent):
        path.chmod(0o755)
    app = App(tmp_path / "app")
    app.directory.chmod(0o755)
    outside = sentinel(app)
    configure(app, "keep_releases = 1\nshared_dirs =\n  uploads\n  other/inner/cache\nshared_files = .env\n[template:t]\n"
                   "source = open/t\n"
                   f"target = open/inner/deep/t.out\nmode = 0600\n[preflight]\naccept_risk = {app.root}\n")
    (app.root / "shared").mkdir()
    (app.root / "shared" / ".env").write_text("")
    whole_root = where != "shared and a release"
    codes, messages = {}, set()  # type: Dict[int, int], Set[str]
    before = everything_about(outside)
    with attack(app, outside) as figures:
        ends, number = time.monotonic() + ATTACK_SECONDS, 0
        while time.monotonic() < ends or not codes.get(0) and time.monotonic() < ends + 60:
            number += 1
            for words in (["deploy", app.artifact(f"1.{number}", {"open/t": "text\n", "open/deep/x": "x", "open/x": "x"})],
                          ["rollback"], ["prune"], ["recover"]):
                result = app.run(*words)
                codes[result.exit_code] = codes.get(result.exit_code, 0) + 1
                if result.exit_code:
                    messages.add(re.sub(r"\d+", "N", result.data["error"]["message"])[:150])
                open_up(app, live_release(app), whole_root)
    print(f"{where}: {number} rounds, exit codes {codes}, the attacker's tries and links {figures}, "
          f"{len(app.releases())} releases", *sorted(messages), sep="\n")
    assert everything_about(outside) == before, f"after {figures}: exit codes {codes}"
    assert figures[1] > 100, f"the attacker made {figures[1]} links in {figures[0]} tries: too few to mean anything"
    assert codes.get(0, 0) > 0 and 70 not in codes, codes


def live_release(app: App) -> Optional[str]:
    """The id of the live release; the link itself may be the attacker's just now."""
    try:
        return os.path.basename(os.readlink(str(app.root / "current")))
    except OSError:
        return None


@as_root
@pytest.mark.parametrize("target", ["outside/directory", "outside/file"])
@pytest.mark.parametrize("name", ["releases", ".deploy", ".deploy/manifests", ".deploy/trash", ".deploy/releases",
                                  ".deploy/lock",
                                  ".deploy/history.jsonl", "shared", "shared/uploads"])
def test_a_symlink_in_the_place_of_its_own_directories_and_files_is_never_followed(name: str, target: str, app: App) -> None:
    """The same without a race: the link stands there before the run begins."""
    outside = sentinel(app)
    configure(app, "shared_dirs = uploads/inner\n")
    app.deploy("1.0")
    path = app.root / name
    os.rename(str(path), str(app.directory / "aside"))
    path.symlink_to(app.directory / target)
    before = snapshot(outside)
    for words in (["deploy", app.artifact("1.1")], ["prune"], ["recover"], ["rollback"], ["status"]):
        result = app.run(*words)
        assert result.exit_code != 70 and "Traceback" not in result.stderr, result.describe()
    assert snapshot(outside) == before


@as_root
@pytest.mark.parametrize("umask", ["000", "077"])
def test_what_it_makes_is_everybodys_to_read_and_nobody_elses_to_write(umask: str, app: App) -> None:
    """Under any umask: releases may be read, state is private, nothing is writable by others or runs as its owner."""
    configure(app, "shared_dirs = uploads\n")
    line = f'umask {umask}; exec "$@"'
    argv = [sys.executable, str(DEPLOY), "-c", str(app.config), "--log-file", str(app.directory / "log"), "deploy",
            str(app.artifact("1.0"))]
    subprocess.run(["/bin/sh", "-c", line, "sh"] + argv, env=clean_environment(), check=True, stdout=subprocess.DEVNULL,
                   stderr=subprocess.DEVNULL)
    for path in [app.directory / "log", *app.root.rglob("*")]:
        mode = path.lstat().st_mode
        if not stat.S_ISLNK(mode):
            assert not mode & 0o7022, f"{path} has mode {stat.S_IMODE(mode):04o}"
    for path in (app.root / "releases", *(app.root / "releases").rglob("*")):
        mode, wanted = path.stat().st_mode, 0o055 if path.is_dir() else 0o044
        assert mode & wanted == wanted, f"{path} has mode {stat.S_IMODE(mode):04o}"
    assert (app.root / ".deploy").stat().st_mode & 0o077 == 0
