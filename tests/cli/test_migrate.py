"""[migrate]: the data of a real SQLite database go forward and back with the release, whatever fails or is killed."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any, List, Optional

import pytest

from crashes import recover_and_judge
from scenes import Gate, alive, deploy_all
from support import App, Result, file, load_deploy, snapshot, start_deploy

# What a release brings: each version makes a table of its own, and notes it.  It tells what ran where, and what was live then.
PROGRAM = f"""#!{sys.executable} -I
import json, os, sqlite3, sys
word, version, live = sys.argv[1], os.environ["DEPLOY_VERSION"], os.environ["DEPLOY_CURRENT_PATH"] + "/VERSION"
live = open(live).read().strip() if os.path.exists(live) else "-"
own = open("VERSION").read().strip()
with open(os.environ["CALLS"], "a") as calls:
    calls.write(f"{{word}} {{version}} in {{own}}, live {{live}}\\n")
fails = f"{{word}} {{version}}" in os.environ.get("FAILS", "")
data = sqlite3.connect(os.environ["DATA"])
done = {{row[0] for row in data.execute("SELECT version FROM migrations")}}
if word == "backup" and not fails:
    with open(os.environ["DATA"] + "." + version, "w") as backup:
        backup.write("\\n".join(data.iterdump()))
    print("saved", backup.name)
if word == "up":
    noted = json.load(open(os.environ["DEPLOY_ROOT"] + "/.deploy/journal.json"))["migration"]
    assert noted["up"] and noted["group"] == os.getpgrp(), "noted before it starts"
    data.execute(f'CREATE TABLE "of {{version}}" (id INTEGER)')
    data.commit()
    if "HANGS" in os.environ:
        print(os.getpgrp(), flush=True)
        open(os.environ["HANGS"]).read()
    if not fails:
        data.execute("INSERT INTO migrations VALUES (?)", [version])
if word == "down" and not fails:
    data.execute(f'DROP TABLE IF EXISTS "of {{version}}"')
    data.execute("DELETE FROM migrations WHERE version = ?", [version])
data.commit()
if fails:
    print(word, "fails")
    sys.exit(3)
sys.exit(int(word == "check" and version not in done))
"""
WORDS = ("[migrate]\ncheck = bin/migrate check\nbackup = bin/migrate backup\nup = bin/migrate up\ndown = bin/migrate down\n"
         "timeout = 20s\n")


class Migrating(App):
    """An application with a database."""

    def __init__(self, directory: Any) -> None:
        super().__init__(directory)
        self.data, self.log = self.directory / "shop.db", self.directory / "calls"
        self.data_connection().executescript("CREATE TABLE migrations (version TEXT); CREATE TABLE users (name TEXT);"
                                             "INSERT INTO users VALUES ('ada');")
        self.settle()

    def data_connection(self) -> sqlite3.Connection:
        """The database."""
        return sqlite3.connect(str(self.data), isolation_level=None)

    def settle(self, migrate: str = WORDS, env: str = "", more: str = "") -> None:
        """Configure [migrate], the environment of its program, and a service that tells when it is restarted."""
        restart = f"/bin/sh -c 'echo restart of $(cat {self.root}/current/VERSION) >> {self.log}'"
        self.configure(f"durable = no\n[env]\nDATA = {self.data}\nCALLS = {self.log}\n{env}\n{migrate}\n"
                       f"[service:app]\ncommand = {restart}\n{more}")

    def artifact(self, version: str, files: Optional[Any] = None, **options: Any) -> Path:
        """An artifact with the program in it."""
        return super().artifact(version, dict({"bin/migrate": file(PROGRAM, 0o755)}, **(files or {})), **options)

    def calls(self) -> List[str]:
        """What ran since the last look."""
        found = self.log.read_text().splitlines() if self.log.exists() else []
        self.log.write_text("")
        return found

    def tables(self) -> List[str]:
        """The versions whose table there is, and which are noted: both or it is half done."""
        rows = self.data_connection().execute("SELECT name FROM sqlite_master WHERE name LIKE 'of %'")
        noted = {row[0] for row in self.data_connection().execute("SELECT version FROM migrations")}
        made = {row[0][3:] for row in rows}
        return sorted(made) if made == noted else ["half done"]

    def migrated(self) -> List[str]:
        """The versions whose record says that they have migrated."""
        records = [self.record(path.name[:-5]) for path in (self.root / ".deploy" / "releases").glob("*.json")]
        return sorted(record["version"] for record in records if record["migrated"])


@pytest.fixture
def app(tmp_path: Path) -> Migrating:
    """An application of which 1.0 is live, and has migrated."""
    made = Migrating(tmp_path / "app")
    made.deploy("1.0")
    made.calls()
    return made


def statuses(result: Result) -> List[str]:
    """What became of the steps of [migrate]."""
    return [f"{step['name'][8:]} {step['status']}" for step in result.data["steps"] if step["name"].startswith("migrate:")]


FORWARD = ["check 1.1 in 1.1, live 1.0", "backup 1.1 in 1.1, live 1.0", "up 1.1 in 1.1, live 1.0"]


# -- forward -------------------------------------------------------------------

def test_the_new_release_migrates_before_the_switch_once_the_data_are_saved(app: Migrating) -> None:
    done = app.deploy("1.1")
    assert app.calls() == FORWARD + ["restart of 1.1"]
    assert statuses(done) == ["check done", "backup done", "up done"]
    assert (app.tables(), app.migrated()) == (["1.0", "1.1"], ["1.0", "1.1"])
    restored = sqlite3.connect(":memory:")
    restored.executescript(Path(f"{app.data}.1.1").read_text())
    assert restored.execute("SELECT version FROM migrations").fetchall() == [("1.0",)]
    assert restored.execute("SELECT name FROM users").fetchall() == [("ada",)]
    kept = {step["name"]: step for step in app.history()[-1]["steps"]}
    assert kept["migrate:backup"]["output"] == [f"saved {app.data}.1.1"] == [kept["migrate:backup"]["detail"]]


def test_where_check_finds_nothing_neither_backup_nor_up_run(app: Migrating) -> None:
    app.data_connection().executescript("INSERT INTO migrations VALUES ('1.1'); CREATE TABLE \"of 1.1\" (id)")
    done = app.deploy("1.1")
    assert app.calls() == [FORWARD[0], "restart of 1.1"]
    assert statuses(done) == ["check done", "backup skipped", "up skipped"] and app.migrated() == ["1.0"]
    # On the way back nothing is undone that was not done.
    app.settle(more="[hooks]\npost_deploy = false\n")
    app.data_connection().executescript("INSERT INTO migrations VALUES ('1.2'); CREATE TABLE \"of 1.2\" (id)")
    assert "down skipped" in statuses(app.deploy("1.2", check=5))
    assert [call for call in app.calls() if "down" in call] == [] and "1.2" in app.tables()


def test_without_check_it_migrates_each_time(app: Migrating) -> None:
    app.settle("[migrate]\nup = bin/migrate up\n")
    app.deploy("1.1")
    assert app.calls() == [FORWARD[2], "restart of 1.1"] and app.migrated() == ["1.0", "1.1"]


def test_a_dry_run_shows_the_commands_and_runs_none(app: Migrating) -> None:
    before = snapshot(app.root)
    plan = app.run("-n", "deploy", app.artifact("1.1"), check=0).data["plan"]
    assert [step["description"].rpartition(" in ")[0] for step in plan if step["name"].startswith("migrate:")] == \
        ["run bin/migrate check", "run bin/migrate backup", "run bin/migrate up"]
    assert app.calls() == [] and snapshot(app.root) == before


@pytest.mark.parametrize("migrate, env, calls", [
    (WORDS, "FAILS = check 1.1", FORWARD[:1]), (WORDS, "FAILS = backup 1.1", FORWARD[:2]),
    (WORDS, "FAILS = up 1.1", FORWARD + ["down 1.1 in 1.1, live 1.0"]),
    (WORDS.replace("bin/migrate check", "sh -c 'kill $$'"), "", []), (WORDS.replace("bin/migrate check", "sh -c 'exit 2'"), "", []),
    (WORDS.replace("bin/migrate check", "no/such"), "", []),
    (WORDS.replace("bin/migrate backup", "sleep 60").replace("20s", "300ms"), "", FORWARD[:1]),
    (WORDS + "[hooks]\npost_activate = false\n", "", None)], ids=[
        "check", "backup", "up", "check by a signal", "check by another code", "no check", "backup in time", "behind the switch"])
def test_what_fails_is_undone_and_leaves_data_and_release_as_they_were(migrate: str, env: str, calls: Any, app: Migrating) -> None:
    app.settle(migrate, env)
    failed = app.deploy("1.1", check=1 if calls is not None else 5)
    assert app.calls() == (calls if calls is not None else
                           FORWARD + ["down 1.1 in 1.1, live 1.0", "restart of 1.0"])
    assert (app.version, app.tables(), app.migrated()) == ("1.0", ["1.0"], ["1.0"])
    assert "migrate" in failed.data["error"]["message"] or calls is None
    assert app.leftovers() == [] and app.run("status").exit_code == 0


def test_a_signal_in_up_undoes_it(app: Migrating, tmp_path: Path) -> None:
    gate = Gate(tmp_path / "gate")
    app.settle(env=f"HANGS = {gate.path}")
    run = start_deploy("deploy", app.artifact("1.1"), config=app.config)
    gate.wait_for_visitor()
    run.send_signal(signal.SIGTERM)
    assert run.wait(60) == 143
    assert app.calls() == FORWARD + ["down 1.1 in 1.1, live 1.0"] and app.tables() == ["1.0"]


# -- down that fails -----------------------------------------------------------

def test_a_down_that_fails_on_the_way_back_does_not_stop_it_and_wants_a_person(app: Migrating) -> None:
    app.settle(env="FAILS = down 1.1", more="[hooks]\npost_deploy = false\n")
    error = app.deploy("1.1", check=6).data["error"]
    assert app.calls() == FORWARD + ["restart of 1.1", "down 1.1 in 1.1, live 1.0", "restart of 1.0"]
    assert "bin/migrate down" in error["message"] and f"saved {app.data}.1.1" in error["message"] and "recover" in error["hint"]
    assert (app.version, app.migrated()) == ("1.0", ["1.0", "1.1"])
    app.settle()
    app.run("recover", check=0)
    assert (app.version, app.tables(), app.migrated()) == ("1.0", ["1.0"], ["1.0"])


def test_a_down_that_fails_before_the_switch_keeps_the_release_until_it_went_well(app: Migrating) -> None:
    app.settle(env="FAILS = up 1.1, down 1.1")
    error = app.deploy("1.1", check=6).data["error"]
    assert "bin/migrate up" in error["message"] and "bin/migrate down" in error["message"] and f"saved {app.data}" in error["message"]
    assert app.version == "1.0" and len(app.releases()) == 2
    for _ in range(2):
        app.run("recover", check=6)
    app.calls()
    assert "--to" in app.run("recover", check=6).data["error"]["hint"] and app.calls() == []
    app.run("recover", "--to", "1.0", check=0)
    assert app.version == "1.0" and app.run("status").exit_code == 0


# -- killed --------------------------------------------------------------------

@pytest.mark.parametrize("settle", [["recover"], ["recover", "--to", "1.0"]], ids=" ".join)
def test_killed_in_up_its_group_is_ended_and_its_work_undone(settle: List[str], app: Migrating, tmp_path: Path) -> None:
    gate = Gate(tmp_path / "gate")
    app.settle(env=f"HANGS = {gate.path}")
    run = start_deploy("deploy", app.artifact("1.1"), config=app.config)
    gate.wait_for_visitor()
    journal = json.loads((app.root / ".deploy" / "journal.json").read_text())
    group = journal["migration"]["group"]
    assert os.getpgid(group) == group and b"bin/migrate" in Path(f"/proc/{group}/cmdline").read_bytes()
    run.kill()
    run.wait()
    assert alive(group)
    app.run(*settle, check=0)
    assert not alive(group)
    assert app.calls() == FORWARD + (["down 1.1 in 1.1, live 1.0"] if len(settle) == 1 else ["restart of 1.0"])
    if len(settle) == 1:
        assert (app.tables(), app.migrated()) == (["1.0"], ["1.0"])
        app.settle()
        app.run("activate", "1.1", check=0)
        assert app.tables() == ["1.0", "1.1"]
    assert recover_and_judge(app, [app.version]) == []


def test_what_has_only_the_number_of_a_group_is_left_alone(monkeypatch: Any) -> None:
    deploy = load_deploy()
    monkeypatch.setattr(deploy, "KILL_AFTER_SECONDS", 0.2)
    script = ["sh", "-c", "trap '' TERM; echo; while :; do sleep 0.1; done"]
    process = subprocess.Popen(script, env={"PATH": os.environ["PATH"], "DEPLOY_ID": "mine"}, start_new_session=True, stdout=-1)
    process.stdout.readline()
    deploy.end_group(process.pid, "another")
    assert process.poll() is None
    deploy.end_group(process.pid, "mine")
    assert process.wait(60) == -signal.SIGKILL
    process.stdout.close()


@pytest.mark.parametrize("command, version", [("deploy", "1.0"), ("rollback", "1.0")])
def test_killed_in_down_it_is_run_again(command: str, version: str, app: Migrating, tmp_path: Path) -> None:
    if command == "rollback":
        app.deploy("1.1")
    app.calls()
    once = f"sh -c 'bin/migrate down; mkdir {tmp_path}/killed && kill -9 $PPID; exit 0'"
    app.settle(WORDS.replace("bin/migrate down", once), more="[hooks]\npost_deploy = false\n")
    arguments = ["deploy", app.artifact("1.1")] if command == "deploy" else ["rollback"]
    assert app.run(*arguments, json=False).exit_code == -signal.SIGKILL
    app.run("recover", check=0)
    assert [call for call in app.calls() if "down" in call] == ["down 1.1 in 1.1, live 1.0"] * 2
    assert (app.version, app.tables(), app.migrated()) == (version, ["1.0"], ["1.0"])
    assert recover_and_judge(app, [version]) == []


# -- back by hand --------------------------------------------------------------

@pytest.mark.parametrize("command", ["rollback", "activate"])
def test_back_across_several_releases_each_undoes_its_own_newest_first(command: str, app: Migrating) -> None:
    deploy_all(app, "1.1", "1.2")
    app.calls()
    app.run(command, "1.0", check=0)
    assert app.calls() == ["down 1.2 in 1.2, live 1.0", "down 1.1 in 1.1, live 1.0", "restart of 1.0"]
    assert (app.version, app.tables(), app.migrated()) == ("1.0", ["1.0"], ["1.0"])
    app.run("activate", "1.2", check=0)
    assert app.calls() == ["check 1.2 in 1.2, live 1.0", "backup 1.2 in 1.2, live 1.0", "up 1.2 in 1.2, live 1.0", "restart of 1.2"]
    assert app.migrated() == ["1.0", "1.2"]


def test_with_on_rollback_keep_the_data_stay(app: Migrating) -> None:
    deploy_all(app, "1.1", "1.2")
    app.calls()
    app.run("rollback", "1.0", "--set", "migrate.on_rollback=keep", check=0)
    assert app.calls() == ["restart of 1.0"] and app.tables() == app.migrated() == ["1.0", "1.1", "1.2"]


@pytest.mark.parametrize("how", ["pruned", "deleted"])
def test_a_release_that_migrated_and_is_gone_is_a_preflight_failure(how: str, app: Migrating) -> None:
    app.run("pin", "1.0", check=0)
    second, *_ = deploy_all(app, "1.1", "1.2", "1.3")
    if how == "pruned":
        app.run("--set", "deploy.keep_releases=1", "prune", check=0)
    else:
        subprocess.run(["rm", "-r", str(app.root / "releases" / second)], check=True)
    assert second not in app.releases()
    app.calls()
    for dry in [], ["-n"]:
        error = app.run(*dry, "rollback", "1.0", check=3).data["error"]
        assert second in error["message"]
    assert app.calls() == [] and app.version == "1.3"
    app.run("rollback", "1.0", *error["hint"].split(": ")[-1].split(), check=0)
    assert app.version == "1.0" and app.calls() == ["restart of 1.0"]


def test_a_down_that_fails_in_a_rollback_stops_what_is_older_and_not_the_rollback(app: Migrating) -> None:
    deploy_all(app, "1.1", "1.2")
    app.settle(env="FAILS = down 1.2")
    app.calls()
    failed = app.run("rollback", "1.0", check=6).data
    assert app.calls() == ["down 1.2 in 1.2, live 1.0", "restart of 1.0"] and app.version == "1.0"
    assert "bin/migrate down" in failed["error"]["message"] and "bin/migrate backup" in failed["error"]["message"]
    assert "`down` has begun" in failed["error"]["message"] and "healthy" not in failed["error"]["message"]
    assert app.migrated() == ["1.0", "1.1", "1.2"] and app.history()[-1]["result"] == "left_live"


def test_once_the_data_are_undone_nobody_is_put_back_on_what_needs_them(app: Migrating) -> None:
    app.deploy("1.1")
    app.settle(more="[probe:app]\ncommand = sh -c 'test $DEPLOY_VERSION != 1.0'\ndeadline = 100ms\nsuccesses = 1\n")
    failed = app.run("activate", "1.0", check=6).data
    assert app.version == "1.0" and app.tables() == ["1.0"] and not failed["rolled_back"]


# -- configuration -------------------------------------------------------------

def test_commands_without_up_are_a_mistake(app: Migrating) -> None:
    app.settle("[migrate]\ncheck = true\ndown = true\n")
    assert "[migrate] needs up" in app.run("deploy", app.artifact("1.1"), check=2).data["error"]["message"]
