"""Looking: status, releases, history, show, verify, ad-hoc probes; and packing what will be looked at."""

import json
import os
import re
import shutil
import socket
import subprocess
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable, Dict, List, Tuple

import pytest

from scenes import Gate
from support import (
    App, Server, file, free_port, link, load_deploy, make_tree, needs, run_deploy, sha256_of, snapshot, start_deploy)

deploy = load_deploy()


@pytest.fixture(scope="module")
def busy(tmp_path_factory: Any) -> App:
    """An application with a past: 1.0 and 1.1 deployed, 1.2 failed and rolled back, 1.3 staged, 1.0 pinned; only looked at."""
    app = App(tmp_path_factory.mktemp("busy") / "app")
    app.deploy("1.0")
    app.deploy("1.1")
    app.configure("[probe:web]\ncommand = /bin/sh -c 'if grep -q 1.2 VERSION; then echo the database is away; exit 3; fi'\n"
                  "deadline = 2s\nperiod = 5s\nsuccesses = 1")
    app.deploy("1.2", check=5)
    app.configure()
    app.run("stage", app.artifact("1.3"), check=0)
    app.run("pin", "1.0", check=0)
    return app


@pytest.fixture(scope="module")
def template(tmp_path_factory: Any) -> App:
    """An application with 1.0 live, to be copied."""
    app = App(tmp_path_factory.mktemp("template") / "app")
    app.deploy("1.0")
    return app


@pytest.fixture
def deployed(template: App, app: App) -> App:
    """An application of one's own with 1.0 live: a copy, which takes no time."""
    app.root.rmdir()
    shutil.copytree(str(template.root), str(app.root), symlinks=True)
    return app


def release(app: App, version: str) -> str:
    """The id of the release of a version."""
    return next(name for name in app.releases() if name.endswith("-" + version))


LOOKING = [["status"], ["releases"], ["history"], ["history", "--verify"], ["show", "1"], ["verify"], ["preflight"], ["config"],
           ["probe", "--command", "true"]]


@pytest.mark.parametrize("words", LOOKING, ids=" ".join)
def test_looking_changes_nothing(words: List[str], busy: App) -> None:
    before = snapshot(busy.root)
    assert busy.run(*words, check=0).data["changed"] is False
    assert snapshot(busy.root) == before


# -- status and releases -----------------------------------------------------

def test_status_names_current_previous_lock_and_state(busy: App) -> None:
    data = busy.run("status", check=0).data
    assert data["release"] == release(busy, "1.1") == busy.current and data["previous"] == release(busy, "1.0")
    status = data["status"]
    assert status["current"]["version"] == "1.1" and status["previous"]["version"] == "1.0"
    assert (status["lock"], status["journal"], status["problems"]) == (None, None, [])
    shown = busy.run("status", json=False, check=0).stdout
    for pattern in (rf"current +{busy.current}", rf"previous +{release(busy, '1.0')}", r"state +ok", rf"root +{busy.root}"):
        assert re.search(pattern, shown), shown


def test_status_of_a_root_where_nothing_is_live(app: App) -> None:
    data = app.run("status", check=0).data
    assert data["release"] is None and data["previous"] is None and "nothing" in data["msg"]


STATE_PROBLEMS = [
    ("manifest-gone", lambda app: (app.root / ".deploy" / "manifests" / str(app.current)).unlink(), "manifest"),
    ("record-gone", lambda app: (app.root / ".deploy" / "releases" / f"{app.current}.json").unlink(), "record"),
    ("record-damaged", lambda app: (app.root / ".deploy" / "releases" / f"{app.current}.json").write_text("{}"), "damaged"),
    ("journal-damaged", lambda app: (app.root / ".deploy" / "journal.json").write_text("{"), "journal"),
    ("dangling", lambda app: shutil.rmtree(str(app.root / "releases" / str(app.current))), "does not exist"),
]  # type: List[Tuple[str, Callable[[App], Any], str]]


@pytest.mark.parametrize("name,damage,said", STATE_PROBLEMS, ids=[row[0] for row in STATE_PROBLEMS])
def test_status_of_a_broken_state_is_a_problem_with_a_hint(name: str, damage: Callable[[App], Any], said: str, deployed: App) -> None:
    damage(deployed)
    error = deployed.run("status", check=7).data["error"]
    assert said in error["message"] and error["hint"]


@pytest.mark.parametrize("path", ["manifests", "trees"])
@pytest.mark.parametrize("role", ["current", "previous"])
def test_status_tells_a_manifest_that_is_gone(role: str, path: str, deployed: App) -> None:
    deployed.deploy("1.1")
    name = release(deployed, "1.1" if role == "current" else "1.0")
    manifest = deployed.root / ".deploy" / path / name
    manifest.unlink()
    error = deployed.run("status", check=7).data["error"]
    assert name in error["message"] and "manifest is missing" in error["message"] and error["hint"]


def test_status_of_what_was_switched_and_not_settled_does_not_invent_a_time(deployed: App) -> None:
    deployed.deploy("1.1")
    for version in ("1.2", "1.0"):
        deployed.configure("[hooks]\npost_activate = /bin/sh -c 'kill -9 $PPID'\n")
        deployed.run(*(["deploy", deployed.artifact(version)] if version == "1.2" else ["activate", version]), json=False)
        shown = deployed.run("status", json=False, check=7).stdout
        assert re.search(rf"current +\S+  {version}  (staged|retired)", shown) and "None" not in shown
        deployed.configure()
        deployed.run("recover", check=0)
        assert re.search(r"current .*  active  20", deployed.run("status", json=False, check=0).stdout)


RUNNING = [(["recover"], 75), (["prune"], 0), (["pin", "1.0"], 0), (["recover", "--to", "1.0"], 0), (["deploy", "{artifact}"], 75), (["rollback"], 75)]


def test_a_dry_run_beside_a_running_deployment_says_who_runs(deployed: App) -> None:
    gate = Gate(deployed.directory / "gate")
    deployed.configure(f"[hooks]\npost_activate = {gate.command}\n")
    process = start_deploy("deploy", deployed.artifact("1.1"), config=deployed.config)
    try:
        gate.wait_for_visitor()
        deployed.artifact("1.2")
        for words, exit_code in RUNNING:
            artifact = deployed.directory / "artifacts" / "myapp-1.2.tar.gz"
            result = deployed.run("-n", *[word.format(artifact=artifact) for word in words], check=exit_code)
            said = result.data["error"]["message"] if exit_code else result.data["warnings"][0]
            assert f"pid {process.pid} " in said and "interrupted" not in result.stderr, result.describe()
            assert exit_code or "the plan may be another" in said, result.describe()
        deployed.run("status", check=0)
    finally:
        gate.open()
        process.wait(60)


@pytest.mark.parametrize("name", ["current", "records", "load", "names"])
def test_a_look_during_which_a_run_ends_sees_one_state(name: str, deployed: App, monkeypatch: Any) -> None:
    """Whoever only looks takes no lock: a whole run may lie between any two of its looks."""
    settings = deploy.Settings({("deploy", "root"): (str(deployed.root), "--root")}, [])
    store = deploy.Store.open(settings)
    look, runs = getattr(store, name), []  # type: Any, List[Any]

    def then_run(*args: Any) -> Any:
        found = look(*args)
        if not runs and (name != "load" or deploy.Journal in args):
            runs.append(deployed.deploy("2.0"))
        return found
    monkeypatch.setattr(store, name, then_run)
    run = SimpleNamespace(settings=settings, store=store, facts=None, offer=None, outcome=SimpleNamespace(), flags=SimpleNamespace(command="status"), deploy_id="", note="", application="", place=str(deployed.root))
    facts = deploy.observe(run, locked=False)
    assert list(deploy.status_problems(run, None)) == [] and facts.release(facts.current.release).version == "2.0"
    assert len(runs) == 1


def test_releases_come_newest_first_with_a_star_on_the_current_one(busy: App) -> None:
    found = busy.run("releases", check=0).data["releases"]
    assert [(one["version"], one["state"], one["current"], one["pinned"]) for one in found] == [
        ("1.3", "staged", False, False), ("1.2", "bad", False, False), ("1.1", "active", True, False), ("1.0", "retired", False, True)]
    lines = busy.run("releases", json=False, check=0).stdout.splitlines()
    assert [line.split()[0] == "*" for line in lines[1:]] == [False, False, True, False]
    assert "retired, pinned" in lines[4] and release(busy, "1.3") in lines[1]


def test_releases_does_not_count_what_it_does_not_know(deployed: App) -> None:
    (deployed.root / "releases" / "by-hand").mkdir()
    assert [one["version"] for one in deployed.run("releases", check=0).data["releases"]] == ["1.0"]
    assert deployed.run("status", check=0).data["status"]["releases"] == 1


# -- history -----------------------------------------------------------------

RESULTS = ["deployed", "deployed", "rolled_back", "staged"]


def test_history_lists_every_run_oldest_first(busy: App) -> None:
    entries = busy.run("history", check=0).data["history"]
    assert [entry["result"] for entry in entries][:4] == RESULTS
    assert [entry["sequence"] for entry in entries] == list(range(1, len(entries) + 1))
    assert all(entry["deploy_id"] and entry["by"]["user"] and entry["by"]["host"] for entry in entries)
    lines = busy.run("history", json=False, check=0).stdout.splitlines()
    assert lines[0].split()[:3] == ["TIME", "ID", "OPERATION"] and len(lines) == 1 + len(entries)


def test_history_limit_takes_the_newest_and_0_takes_all(busy: App) -> None:
    every = busy.run("history", "--limit", "0", check=0).data["history"]
    assert busy.run("history", "--limit", "2", check=0).data["history"] == every[-2:]
    assert busy.run("history", "--limit", "999", check=0).data["history"] == every
    for wrong in ("-1", "few", ""):
        busy.run("history", f"--limit={wrong}", check=2)


def test_history_of_an_untouched_root_is_empty_and_whole(app: App) -> None:
    assert app.run("history", check=0).data["history"] == []
    assert "0 entries" in app.run("history", "--verify", check=0).data["msg"]


def edit(text: str, old: str, new: str) -> str:
    """Replace, once, what must be there."""
    assert old in text
    return text.replace(old, new, 1)


TAMPERING = [
    ("changed", lambda lines: [lines[0], edit(lines[1], '"1.1"', '"9.9"'), lines[2]], "line 2"),
    ("changed-with-its-checksum", lambda lines: [lines[0], json.dumps(deploy.seal(dict(json.loads(lines[1]), version="9.9"))), lines[2]], "line 3"),
    ("first-changed", lambda lines: [edit(lines[0], "deployed", "activated"), lines[1], lines[2]], "line 1"),
    ("middle-removed", lambda lines: [lines[0], lines[2]], "2"),
    ("first-removed", lambda lines: lines[1:], "1"),
    ("all-removed", lambda lines: [], "missing"),
    ("swapped", lambda lines: [lines[1], lines[0], lines[2]], "line"),
    ("doubled", lambda lines: [lines[0], lines[1], lines[1], lines[2]], "line 3"),
    ("cut-off", lambda lines: [lines[0], lines[1], lines[2][:-20]], ""),
    ("rubbish", lambda lines: [lines[0], "rubbish", lines[2]], "line 2"),
    ("deep", lambda lines: [lines[0], "[" * 100000, lines[2]], "line 2"),
]  # type: List[Tuple[str, Callable[[List[str]], List[str]], str]]


@pytest.fixture(scope="module")
def three(tmp_path_factory: Any) -> App:
    """An application with three deployments."""
    app = App(tmp_path_factory.mktemp("three") / "app")
    for version in ("1.0", "1.1", "1.2"):
        app.deploy(version)
    app.run("history", "--verify", check=0)
    return app


@pytest.mark.parametrize("name,tamper,said", TAMPERING, ids=[row[0] for row in TAMPERING])
def test_history_verify_finds_what_was_done_to_it(name: str, tamper: Callable[[List[str]], List[str]], said: str, three: App) -> None:
    path = three.root / ".deploy" / "history.jsonl"
    before = path.read_text()
    try:
        path.write_text("".join(line + "\n" for line in tamper(before.splitlines())))
        error = three.run("history", "--verify", check=7).data["error"]
        assert said in error["message"] and error["hint"]
    finally:
        path.write_text(before)


# -- show --------------------------------------------------------------------

def test_show_has_a_timeline_with_every_step(busy: App) -> None:
    shown = busy.run("show", "1.1", json=False, check=0).stdout
    for word in ("unpack", "publish", "seal", "activate"):
        assert re.search(rf" {word}  done  \d+\.\d+s  \S", shown), shown
    assert busy.current in shown and "deployed" in shown  # type: ignore


def test_show_of_a_failure_has_its_evidence(busy: App) -> None:
    failed = next(entry for entry in busy.history() if entry["result"] == "rolled_back")
    data = busy.run("show", failed["deploy_id"], check=0).data
    assert data["history"][0]["failure"]["step"] == "probe:web"
    assert "the database is away" in json.dumps(data["history"][0]["failure"])
    shown = busy.run("show", failed["deploy_id"], json=False, check=0).stdout
    assert "reason" in shown and "the database is away" in shown and "probe:web  failed" in shown


@pytest.mark.parametrize("text", ["2", "1.1", "{id}", "{prefix}", "{release}"])
def test_show_takes_a_number_a_version_an_id_or_a_release(text: str, busy: App) -> None:
    entry = busy.history()[1]
    words = {"id": entry["deploy_id"], "prefix": entry["deploy_id"][:-2], "release": entry["release"]}
    assert busy.run("show", text.format(**words), check=0).data["history"][0]["sequence"] == 2


def test_show_of_a_release_is_not_that_of_another_whose_name_goes_on(deployed: App) -> None:
    """Two releases of one version in one second differ by a number behind the name."""
    for number in range(50):
        first, second = [deployed.run("stage", deployed.artifact(f"2.{number}", {"n": name}), check=0).data["release"] for name in "ab"]
        if second == first + ".2":
            break
    else:
        pytest.fail("no two of a hundred runs were in one second")
    for name in (first, second):
        assert deployed.run("show", name, check=0).data["release"] == name


def test_show_of_a_recovered_run_has_its_own_timeline_too(deployed: App) -> None:
    deployed.configure("auto_rollback = yes\n[hooks]\npost_activate = false\npre_rollback = /bin/sh -c 'rm -r $DEPLOY_ROOT/releases/*-1.0'\n")
    failed = deployed.run("deploy", deployed.artifact("1.1"), check=6).data
    deployed.configure()
    deployed.run("recover", "--to", "1.1", check=0)
    entries = [entry for entry in deployed.history() if entry["deploy_id"] == failed["deploy_id"]]
    assert [entry["result"] for entry in entries] == ["rollback_failed", "recovered"]
    for name in (failed["deploy_id"], str(entries[0]["sequence"]), "1.1"):
        shown = deployed.run("show", name, check=0).data["history"]
        assert [entry["sequence"] for entry in shown] == [entry["sequence"] for entry in entries]
    shown = deployed.run("show", failed["deploy_id"], json=False, check=0).stdout
    for line in ("rollback_failed", "recovered", "unpack  done", "hook:post_activate  failed"):
        assert line in shown, shown


def test_show_of_something_unknown_or_ambiguous_lists_ids(busy: App) -> None:
    for text in ("nothing", "20"):
        error = busy.run("show", text, check=2).data["error"]
        assert busy.history()[-1]["deploy_id"] in error["hint"]


# -- verify ------------------------------------------------------------------

def rewrite(path: Path, text: str) -> None:
    """Write a file again with the same size, mode and mtime."""
    found = path.stat()
    path.write_text(text)
    os.utime(str(path), ns=(found.st_atime_ns, found.st_mtime_ns))


def relink(path: Path, target: str) -> None:
    """Point a symlink elsewhere."""
    path.unlink()
    path.symlink_to(target)


def replace_by_a_directory(path: Path) -> None:
    """Put a directory where a file was."""
    path.unlink()
    path.mkdir()


DIFFERENCES = [
    ("changed-bytes", lambda top: rewrite(top / "VERSION", "9.9\n"), "changed", "VERSION"),
    ("appended", lambda top: rewrite(top / "lib" / "nested" / "data.txt", "data of 1.0\nmore"), "changed", "lib/nested/data.txt"),
    ("truncated", lambda top: rewrite(top / "VERSION", ""), "changed", "VERSION"),
    ("missing-file", lambda top: (top / "VERSION").unlink(), "missing", "VERSION"),
    ("missing-directory", lambda top: (top / "log").rmdir(), "missing", "log"),
    ("missing-symlink", lambda top: (top / "data").unlink(), "missing", "data"),
    ("added-file", lambda top: (top / "lib" / "new.txt").write_text("x"), "added", "lib/new.txt"),
    ("added-directory", lambda top: (top / "cache").mkdir(), "added", "cache"),
    ("added-symlink", lambda top: (top / "evil").symlink_to("/etc"), "added", "evil"),
    ("changed-symlink", lambda top: relink(top / "data", "VERSION"), "changed", "data"),
    ("file-became-symlink", lambda top: relink(top / "VERSION", "bin/run"), "changed", "VERSION"),
    ("symlink-became-file", lambda top: ((top / "data").unlink(), (top / "data").write_text("data of 1.0\n")), "changed", "data"),
    ("file-became-directory", lambda top: replace_by_a_directory(top / "VERSION"), "changed", "VERSION"),
    ("file-became-fifo", lambda top: ((top / "VERSION").unlink(), os.mkfifo(str(top / "VERSION"))), "changed", "VERSION"),
    ("mode-of-a-file", lambda top: (top / "bin" / "run").chmod(0o644), "changed", "bin/run"),
    ("mode-setuid", lambda top: (top / "bin" / "run").chmod(0o4755), "changed", "bin/run"),
    ("mode-of-a-directory", lambda top: (top / "log").chmod(0o777), "changed", "log"),
]  # type: List[Tuple[str, Callable[[Path], Any], str, str]]


@pytest.mark.parametrize("name,change,kind,path", DIFFERENCES, ids=[row[0] for row in DIFFERENCES])
def test_verify_names_what_is_different(name: str, change: Callable[[Path], Any], kind: str, path: str, deployed: App) -> None:
    change(deployed.root / "current")
    result = deployed.run("verify", check=7)
    differences = result.data["differences"]
    assert [len(differences[other]) for other in ("changed", "missing", "added") if other != kind] == [0, 0]
    assert [found.split(" ")[0] for found in differences[kind]] == [path]
    assert path in result.data["error"]["message"] and result.data["error"]["hint"]


def test_a_directory_made_for_what_is_mutable_is_no_difference(app: App) -> None:
    app.configure("mutable =\n  cache/**/*.php\n  log/*.txt\n")
    app.deploy("1.0")
    top = app.root / "current"
    (top / "cache" / "deep" / "er").mkdir(parents=True)
    for name in ("cache/deep/er/a.php", "log/x.txt"):
        (top / name).write_text("x")
    assert app.run("verify", check=0).data["differences"] == {"changed": [], "missing": [], "added": []}
    (top / "cache" / "deep" / "b.html").write_text("x")
    (top / "cache" / "empty").mkdir()
    (top / "log").chmod(0o700)
    found = app.run("verify", check=7).data["differences"]
    assert (found["added"], found["changed"]) == (["cache/deep/b.html", "cache/empty"], ["log"])


def test_verify_finds_nothing_on_a_release_as_staged(app: App) -> None:
    app.configure("shared_dirs = log\n[template:v]\nsource = VERSION\ntarget = etc/v\nmode = 0600")
    app.deploy("1.0")
    assert app.run("verify", check=0).data["differences"] == {"changed": [], "missing": [], "added": []}
    done = subprocess.run([needs("sha256sum"), "-c", "--quiet", str(app.root / ".deploy" / "manifests" / str(app.current))],
                          cwd=str(app.root / "current"))
    assert done.returncode == 0


def test_verify_of_a_changed_or_missing_manifest_is_a_problem(deployed: App) -> None:
    manifest = deployed.root / ".deploy" / "manifests" / str(deployed.current)
    manifest.write_bytes(manifest.read_bytes() + b"# more\n")
    assert "was changed" in deployed.run("verify", check=7).data["error"]["message"]
    manifest.unlink()
    assert "missing" in deployed.run("verify", check=7).data["error"]["message"]


def test_verify_names_several_differences_one_a_line(deployed: App) -> None:
    top = deployed.root / "current"
    (top / "VERSION").unlink()
    (top / "bin" / "run").write_text("changed")
    (top / "new").write_text("new")
    lines = deployed.run("verify", json=False, check=7).stdout.splitlines()
    assert [line.split() for line in lines[:3]] == [["changed", "bin/run"], ["missing", "VERSION"], ["added", "new"]]


# -- probe, ad hoc -----------------------------------------------------------

def test_an_ad_hoc_url_probe_needs_neither_configuration_nor_root(server: Server, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    server.body = b'{"status": "ok", "version": "7"}'
    result = run_deploy("probe", "--url", server.url, "--expect", "json.status=ok", "--expect", "status=200", cwd=tmp_path / "empty",
                        env={"http_proxy": "http://127.0.0.1:1"}, check=0)
    assert [(probe["ok"], probe["tries"]) for probe in result.data["probes"]] == [(True, 1)]
    assert result.data["root"] is None and os.listdir(str(tmp_path / "empty")) == []
    error = run_deploy("probe", "--url", server.url, "--expect", "json.status=failing", check=7).data["error"]
    assert "ok" in error["message"]


@pytest.mark.parametrize("words,exit_code,said", [
    (["--command", "true"], 0, ""), (["--command", "sh -c 'echo why; exit 4'"], 7, "4"),
    (["--command", "sh -c 'echo ready'", "--expect", "body=ready"], 0, ""),
    (["--command", "sh -c 'echo ready'", "--expect", "body=!ready"], 7, "body"),
    (["--command", "sleep 60", "--expect", "timeout=100ms"], 7, "0.1"),
], ids=["ok", "fails", "body", "body-negated", "timeout"])
def test_an_ad_hoc_command_probe(words: List[str], exit_code: int, said: str) -> None:
    result = run_deploy("probe", *words, check=exit_code)
    assert said in result.data["msg"] and len(result.data["probes"]) == 1


def test_an_ad_hoc_tcp_probe_of_a_port_and_of_a_unix_socket(tmp_path: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(1)
        run_deploy("probe", "--tcp", f"127.0.0.1:{listener.getsockname()[1]}", check=0)
    # A socket's path must be short.
    path = f"/tmp/deploy-test-{os.getpid()}.sock"
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path)
            listener.listen(1)
            run_deploy("probe", "--tcp", f"unix:{path}", check=0)
    finally:
        os.unlink(path)
    assert "ECONNREFUSED" in run_deploy("probe", "--tcp", f"127.0.0.1:{free_port()}", check=7).stdout


def test_a_probe_tries_once_unless_it_is_told_to_wait(tmp_path: Path) -> None:
    port = free_port()
    assert run_deploy("probe", "--tcp", f"127.0.0.1:{port}", check=7).data["probes"][0]["tries"] == 1
    waited = run_deploy("probe", "--tcp", f"127.0.0.1:{port}", "--wait", "300ms", "--expect", "period=50ms", check=7).data["probes"][0]
    assert waited["tries"] > 1 and waited["seconds"] >= 0.2


def test_probe_of_what_is_live_expects_its_version(app: App, server: Server) -> None:
    app.configure(f"[service:web]\ncommand = {server.restart_command.path}\n[probe:web]\nurl = {server.url}\nrelease = json:version\n"
                  "period = 10ms\nsuccesses = 1\n[probe:other]\ncommand = true\nsuccesses = 1")
    app.deploy("1.0")
    assert {probe["name"] for probe in app.run("probe", check=0).data["probes"]} == {"web", "other"}
    server.version = "0.9"
    assert "0.9" in app.run("probe", "web", check=7).data["error"]["message"]
    app.run("probe", "other", check=0)
    assert "web" in app.run("probe", "wob", check=2).data["error"]["hint"]


# -- pack --------------------------------------------------------------------

TREE = {"VERSION": "1.0\n", "bin/run": file("#!/bin/sh\n", 0o755), "lib/a/b.txt": "b", "lib/a.txt": "a", "data": link("lib/a.txt"),
        "empty": None, "caf\u00e9/x y": "odd", "n" * 90 + "/" + "m" * 90: "long"}  # type: Dict[str, Any]


def pack(source: Path, target: Path, *args: Any, **options: Any) -> str:
    """Pack a directory; returns the archive's digest."""
    data = run_deploy("pack", source, "-o", target, *args, check=0, **options).data
    assert data["artifact"]["sha256"] == sha256_of(target)
    return str(data["artifact"]["sha256"])


def test_packing_gives_the_same_bytes_whatever_the_order_times_modes_and_umask(tmp_path: Path) -> None:
    make_tree(tmp_path / "one", TREE)
    umask = os.umask(0o077)
    try:
        make_tree(tmp_path / "two", {name: TREE[name] for name in reversed(list(TREE))})
    finally:
        os.umask(umask)
    for top, below, names in os.walk(str(tmp_path / "two")):
        for name in below + names:
            os.utime(os.path.join(top, name), (1, 1), follow_symlinks=False)
    (tmp_path / "two" / "VERSION").chmod(0o600)
    (tmp_path / "two" / "bin" / "run").chmod(0o700)
    os.chmod(str(tmp_path / "two" / "empty"), 0o700)
    first = pack(tmp_path / "one", tmp_path / "first.tar.gz")
    assert pack(tmp_path / "two", tmp_path / "second.tar.gz", env={"LC_ALL": "C", "TZ": "Asia/Tokyo"}) == first
    assert pack(tmp_path / "one", tmp_path / "first.tar.gz") == first


def test_sha256sum_accepts_the_digest_beside_the_archive(tmp_path: Path) -> None:
    make_tree(tmp_path / "app", TREE)
    for name in ("app.tar.gz", "with space.tar.gz", os.fsdecode(b"\xff.tar.gz")):
        pack(tmp_path / "app", tmp_path / name)
        subprocess.check_call([needs("sha256sum"), "-c", "--strict", "--quiet", name + ".sha256"], cwd=str(tmp_path))


def test_what_is_packed_is_what_tar_unpacks_and_what_can_be_deployed(tmp_path: Path) -> None:
    make_tree(tmp_path / "app", TREE)
    pack(tmp_path / "app", tmp_path / "app-1.0.tar.gz")
    (tmp_path / "out").mkdir()
    subprocess.check_call([needs("tar"), "-xzf", str(tmp_path / "app-1.0.tar.gz"), "-C", str(tmp_path / "out")])
    expected = {name: (kind, content) for name, (kind, _, _, _, content) in snapshot(tmp_path / "app").items()}
    assert {name: (kind, content) for name, (kind, _, _, _, content) in snapshot(tmp_path / "out").items()} == expected
    run_deploy("deploy", tmp_path / "app-1.0.tar.gz", root=tmp_path / "root", check=0)
    live = os.path.realpath(str(tmp_path / "root" / "current"))
    assert {name: (kind, content) for name, (kind, _, _, _, content) in snapshot(live).items()} == expected
    with tarfile.open(str(tmp_path / "app-1.0.tar.gz")) as archive:
        members = archive.getmembers()
    assert {(one.uid, one.gid, one.mtime) for one in members} == {(0, 0, 315532800)}
    assert {one.mode for one in members if one.isreg()} == {0o644, 0o755}
    assert sorted(one.name for one in members) == sorted(set(expected) - {"."}), "each once"


def test_the_default_name_is_the_directorys_with_the_version_in_the_working_directory(tmp_path: Path) -> None:
    make_tree(tmp_path / "myapp", TREE)
    (tmp_path / "here").mkdir()
    run_deploy("pack", tmp_path / "myapp", "--release-version", "2.1", cwd=tmp_path / "here", check=0)
    assert sorted(os.listdir(str(tmp_path / "here"))) == ["myapp-2.1.tar.gz", "myapp-2.1.tar.gz.sha256"]
    run_deploy("pack", tmp_path / "myapp", cwd=tmp_path / "here", check=0)
    assert (tmp_path / "here" / "myapp.tar.gz").exists()


def test_an_archive_inside_the_directory_does_not_become_part_of_itself(tmp_path: Path) -> None:
    make_tree(tmp_path / "app", TREE)
    first = pack(tmp_path / "app", tmp_path / "app" / "out.tar.gz")
    assert pack(tmp_path / "app", tmp_path / "app" / "out.tar.gz") == first


def test_packing_says_what_it_makes_readable_for_all(tmp_path: Path) -> None:
    secrets = {f"key{number}.pem": file("private", 0o600 if number else 0o640) for number in range(5)}
    warning, = run_deploy("pack", make_tree(tmp_path / "app", dict(TREE, **secrets)), "-o", tmp_path / "x.tar.gz", check=0).data["warnings"]
    assert "4 files" in warning and "'key1.pem', 'key2.pem'" in warning and "shared/" in warning
    assert run_deploy("pack", make_tree(tmp_path / "open", TREE), "-o", tmp_path / "y.tar.gz", check=0).data["warnings"] == []


def fifo_inside(top: Path) -> None:
    """A fifo, which nobody writes to."""
    os.mkfifo(str(top / "fifo"))


UNPACKABLE = [
    ("fifo", fifo_inside, "fifo"), ("symlink-outside", lambda top: (top / "evil").symlink_to("../../etc"), "evil"),
    ("absolute-symlink", lambda top: (top / "evil").symlink_to("/etc/passwd"), "evil"),
    ("control-character", lambda top: (top / "a\nb").write_text("x"), "a\\nb"),
]  # type: List[Tuple[str, Callable[[Path], Any], str]]


@pytest.mark.parametrize("name,spoil,said", UNPACKABLE, ids=[row[0] for row in UNPACKABLE])
def test_what_could_not_be_deployed_is_not_packed_and_nothing_is_left(
        name: str, spoil: Callable[[Path], Any], said: str, tmp_path: Path) -> None:
    top = make_tree(tmp_path / "in" / "app", TREE)
    spoil(top)
    (tmp_path / "out").mkdir()
    data = run_deploy("pack", top, "-o", tmp_path / "out" / "x.tar.gz", check=4).data
    assert said in data["error"]["message"] and data["error"]["hint"]
    assert data["changed"] is False
    assert os.listdir(str(tmp_path / "out")) == []


def test_a_failed_packing_leaves_the_earlier_archive(tmp_path: Path) -> None:
    top = make_tree(tmp_path / "app", TREE)
    first = pack(top, tmp_path / "x.tar.gz")
    fifo_inside(top)
    run_deploy("pack", top, "-o", tmp_path / "x.tar.gz", check=4)
    assert sha256_of(tmp_path / "x.tar.gz") == first
    assert sorted(os.listdir(str(tmp_path))) == ["app", "x.tar.gz", "x.tar.gz.sha256"]


@pytest.mark.parametrize("words,exit_code", [
    (["/nonexistent"], 2), (["/etc/passwd"], 2), (["{top}", "--release-version", "a/b"], 2), (["{top}", "-o", "/nonexistent/x"], 1),
    (["{top}", "-o", "{top}"], 2), ([], 2),
], ids=["missing", "file", "version", "no-directory", "target-is-a-directory", "nothing"])
def test_mistakes_in_packing(words: List[str], exit_code: int, tmp_path: Path) -> None:
    top = make_tree(tmp_path / "app", {"a": "a"})
    before = snapshot(tmp_path)
    result = run_deploy("pack", *[word.format(top=top) for word in words], cwd=tmp_path, check=exit_code)
    assert result.data["error"]["hint"] and "Traceback" not in result.stderr
    assert {name: found for name, found in snapshot(tmp_path).items() if found[0] != "directory"} == {
        name: found for name, found in before.items() if found[0] != "directory"}


@pytest.mark.parametrize("suffix", ["", ".sha256"])
@pytest.mark.parametrize("kind", ["fifo", "link"])
def test_packing_never_puts_a_file_in_the_place_of_something_else(kind: str, suffix: str, tmp_path: Path) -> None:
    """As root, -o /dev/null would have made the device a file."""
    top, other = make_tree(tmp_path / "app", {"a": "a"}), tmp_path / ("x" + suffix)
    if kind == "fifo":
        os.mkfifo(str(other))
    else:
        other.symlink_to(os.devnull)
    before = snapshot(tmp_path)
    for words in (["-n"], []):
        result = run_deploy("pack", top, "-o", tmp_path / "x", *words, check=2)
        assert f"{other} is no regular file" in result.data["error"]["message"]
    assert snapshot(tmp_path) == before


def test_packing_a_large_tree_and_deploying_it_keeps_every_byte(tmp_path: Path) -> None:
    top = make_tree(tmp_path / "app", {f"d{number % 7}/f{number}": os.urandom(number * 50) for number in range(200)})
    pack(top, tmp_path / "app-1.tar.gz")
    run_deploy("stage", tmp_path / "app-1.tar.gz", root=tmp_path / "root", check=0)
    assert run_deploy("verify", "1", root=tmp_path / "root", check=0).data["differences"] == {"changed": [], "missing": [], "added": []}
