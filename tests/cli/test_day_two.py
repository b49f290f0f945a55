"""What an operator asks the day after: what differs, what it logged, who holds it, which flags are set, which root this is."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from support import DEPLOY, App, fake_command, in_namespace, needs, run_deploy, snapshot


CHANGED = ["VERSION", "bin/run", "lib/nested/data.txt"]
NEW = {"new.txt": "new", "same.txt": "same"}


@pytest.fixture
def app(app: App) -> App:
    """An application with 1.0 retired and 1.1 live, which differ in three ways."""
    app.deploy("1.0", {"old.txt": "old", "same.txt": "same"})
    app.deploy("1.1", NEW)
    return app


# -- diff and logs --------------------------------------------------------------

def test_diff_names_what_was_added_is_missing_and_changed(app: App) -> None:
    data = app.run("diff", "previous", check=0).data
    assert data["differences"] == {"added": ["new.txt"], "missing": ["old.txt"], "changed": CHANGED}
    back = app.run("diff", "1.1", "1.0", check=0).data["differences"]
    assert back == {"added": ["old.txt"], "missing": ["new.txt"], "changed": CHANGED}
    assert app.run("diff", "current", check=0).data["differences"] == {"added": [], "missing": [], "changed": []}
    assert "added    new.txt" in app.run("diff", "1.0", json=False, check=0).stdout


def test_diff_changes_nothing_and_names_what_there_is_for_a_slip(app: App) -> None:
    before = snapshot(app.root)
    assert "there is no release '9.9'" in app.run("diff", "9.9", check=2).data["msg"]
    assert snapshot(app.root) == before


def test_logs_asks_the_journal_for_the_units_since_the_release_went_live(app: App, tmp_path: Path) -> None:
    journal = fake_command(tmp_path / "bin", "journalctl", "print('started web'); print('token=hunter2hunter2')")
    env = {"PATH": f"{journal.path.parent}:{os.environ['PATH']}"}
    app.configure("[service:web]\nunit = web.service")
    data = app.run("logs", env=env, check=0).data
    assert data["logs"][0] == "started web" and "hunter2" not in json.dumps(data)
    [asked] = journal.calls()
    assert asked[-2:] == ["-u", "web.service"] and "--no-pager" in asked
    assert app.run("logs", "web", json=False, env=env, check=0).stdout.startswith("started web")
    app.configure("[service:web]\nunit = web.service\naction = none\nsystemctl = systemctl --user")
    app.run("logs", env=env, check=0)
    assert journal.calls()[-1][0] == "--user"
    assert "did you mean 'web'?" in app.run("logs", "wbe", env=env, check=2).data["error"]["hint"]
    app.configure("[service:web]\ncommand = true")
    assert "journals of systemd units" in app.run("logs", "web", env=env, check=2).data["msg"]


def test_logs_follow_ends_with_its_caller(app: App, tmp_path: Path) -> None:
    journal = fake_command(tmp_path / "bin", "journalctl", "import time; print('first', flush=True); time.sleep(60)")
    app.configure("[service:web]\nunit = web.service")
    process = subprocess.Popen(
        [sys.executable, str(DEPLOY), "-c", str(app.config), "--root", str(app.root), "logs", "-f"], stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, env={"PATH": f"{journal.path.parent}:{os.environ['PATH']}"})
    assert process.stdout is not None and process.stdout.readline() == b"first\n"
    process.terminate()
    process.communicate(timeout=30)
    assert process.returncode == 143


# -- hold -------------------------------------------------------------------------

def test_a_hold_lets_only_rollback_change_what_is_live(app: App) -> None:
    artifact = app.artifact("1.2")
    app.run("hold", "-m", "the sale is on", check=0)
    for words in (["deploy", artifact], ["deploy", artifact, "--force"], ["activate", "1.0"]):
        data = app.run(*words, check=3).data
        assert "the sale is on" in data["msg"] and "unhold" in data["error"]["hint"], data
    assert app.version == "1.1"
    app.run("stage", artifact, check=0)
    app.run("deploy", app.artifact("1.1", NEW), check=0)  # it is live: nothing to do
    assert app.run("status", check=0).data["status"]["hold"]["note"] == "the sale is on"
    app.run("rollback", check=0)
    assert app.version == "1.0"
    app.run("unhold", check=0)
    assert app.run("unhold", check=0).data["changed"] is False
    app.run("activate", "1.2", check=0)
    assert [entry["result"] for entry in app.history()].count("held") == 1


def test_a_hold_needs_a_reason_ends_by_itself_and_is_told_once(app: App) -> None:
    assert "reason" in app.run("hold", check=2).data["msg"]
    assert "reason" in app.run("hold", "-m", " ", check=2).data["msg"]
    assert "is past" in app.run("hold", "-m", "why", "--until", "2020-01-01", check=2).data["msg"]
    assert "expected a time" in app.run("hold", "-m", "why", "--until", "tomorrow", check=2).data["msg"]
    app.run("hold", "-m", "lunch", "--until", "1h", check=0)
    for _ in range(2):
        app.run("deploy", app.artifact("1.2"), check=3)
    assert [entry["result"] for entry in app.history()].count("refused") == 1
    hold = app.root / ".deploy" / "hold.json"
    data = json.loads(hold.read_text())
    assert data["until"] > data["since"]
    hold.write_text(json.dumps(dict(data, until="2020-01-01T00:00:00Z")))
    app.run("deploy", app.artifact("1.2"), check=0)


def test_a_hold_that_is_damaged_stops_deployments_and_no_rollback(app: App) -> None:
    for text in ("{", "[]", '{"by": 3}', '{"by": {}, "until": 5}', '{"until": "2020-01-01T00:00:00Z"}'):
        (app.root / ".deploy" / "hold.json").write_text(text)
        assert "hold.json cannot be read" in app.run("deploy", app.artifact("1.2"), check=3).data["msg"], text
        assert "hold.json cannot be read" in app.run("status", check=7).data["msg"], text
    app.run("rollback", check=0)


# -- flags ------------------------------------------------------------------------

def test_flags_are_set_at_once_and_each_change_is_in_the_history(app: App) -> None:
    assert app.run("flags", check=0).data["flags"] == {}
    app.run("flags", "checkout=on", "search=25%", "banner=Hello", "old=off", check=0)
    path = app.root / "shared" / "flags.json"
    assert json.loads(path.read_text()) == {"checkout": True, "search": {"percent": 25}, "banner": "Hello", "old": False}
    assert path.stat().st_mode & 0o777 == 0o644
    app.run("flags", "old=", "search=50%", "-m", "half of them", check=0)
    assert app.run("flags", check=0).data["flags"] == {"checkout": True, "search": {"percent": 50}, "banner": "Hello"}
    last = app.history()[-1]
    assert (last["operation"], last["result"], last["note"]) == ("flags", "flagged", "half of them")
    assert last["steps"][0]["detail"] == "set old= search=50%"
    assert "search    50%" in app.run("flags", json=False, check=0).stdout


def test_a_flag_that_is_set_already_is_no_change(app: App) -> None:
    app.run("flags", "checkout=on", "search=25%", check=0)
    lines = len(app.history())
    planned = app.run("-n", "flags", "checkout=off", "search=25%", check=0).data
    assert planned["plan"][0]["description"] == "set checkout=off search=25%" and planned["flags"]["checkout"] is True
    assert app.run("flags", "checkout=on", "gone=", check=0).data["changed"] is False
    assert app.run("-q", "flags", "checkout=on", json=False, check=0).stdout == ""
    assert len(app.history()) == lines


def test_flags_that_somebody_else_wrote_are_shown_and_kept(app: App) -> None:
    path = app.root / "shared" / "flags.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text('{"list": [1, {"a": 2}], "odd": {"percent": 5, "of": "eu"}, "one": 1, "none": null}')
    shown = app.run("flags", json=False, check=0).stdout
    assert 'list  [1, {"a": 2}]' in shown and 'odd   {"percent": 5, "of": "eu"}' in shown and "one   1\n" in shown
    app.run("flags", "one=on", check=0)
    assert json.loads(path.read_text()) == {"list": [1, {"a": 2}], "odd": {"percent": 5, "of": "eu"}, "one": True, "none": None}


def test_a_flag_is_utf8_text_whatever_the_locale(app: App) -> None:
    for value, code in ((b"\xc3\xa9", 0), (b"\xff", 2)):
        done = subprocess.run([sys.executable, str(DEPLOY), "--root", str(app.root), "flags", b"name=" + value],
                              env={"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
        assert done.returncode == code, done.stderr
    assert json.loads((app.root / "shared" / "flags.json").read_text()) == {"name": "\u00e9"}


@pytest.mark.parametrize("word", ["search", "search=101%", "a b=on", "=on"])
def test_a_flag_that_is_mistyped_changes_nothing(word: str, app: App) -> None:
    before = snapshot(app.root / "shared")
    app.run("flags", "good=on", word, check=2)
    app.run("-n", "flags", "good=on", check=0)
    assert snapshot(app.root / "shared") == before


def test_flags_follow_no_link_that_the_application_put_there(app: App, tmp_path: Path) -> None:
    secret = tmp_path / "secret.json"
    secret.write_text('{"password": "hunter2"}')
    (app.root / "shared" / "flags.json").symlink_to(secret)
    assert "hunter2" not in app.run("flags", check=7).stdout
    assert "cannot be read" in app.run("flags", "a=on", check=3).data["msg"]
    assert "hunter2" in secret.read_text()


def test_what_a_kill_leaves_of_flags_is_swept_and_nothing_else_there(app: App) -> None:
    shared = app.root / "shared"
    shared.mkdir(exist_ok=True)
    for name in (".flags.json.12.0123abcd.tmp", ".x.json.12.0123abcd.tmp"):
        (shared / name).touch()
    assert "removed shared/.flags.json.12.0123abcd.tmp" in app.run("recover", check=0).data["recovered"]
    assert [path.name for path in shared.iterdir()] == [".x.json.12.0123abcd.tmp"]
    shared.rename(app.root / "elsewhere")
    shared.symlink_to("elsewhere")  # deploy.py has no business there
    app.run("pin", "1.0", check=0)


# -- history, show, status ----------------------------------------------------------

def test_history_is_filtered_and_says_how_many_there_are(app: App) -> None:
    app.run("pin", "1.0", check=0)
    app.configure("[hooks]\npre_activate = false")
    app.deploy("1.2", check=1)
    everything = app.run("history", check=0).data
    assert everything["total"] == 4
    failed = app.run("history", "--failed", check=0).data
    assert [entry["version"] for entry in failed["history"]] == ["1.2"] and failed["total"] == 1
    assert app.run("history", "--operation", "pin", check=0).data["total"] == 1
    assert app.run("history", "--since", "1h", check=0).data["total"] == 4
    assert app.run("history", "--since", "2126-01-01", check=0).data["total"] == 0
    for no_time in "2026-13-45", "2026-02-30", "2026-11-30T25:00:00Z":
        assert "expected a time such as" in app.run("history", "--since", no_time, check=2).data["error"]["message"]
    assert app.run("history", "--operation", "sync", json=False, check=0).stdout == "nothing like that in the history\n"
    assert "did you mean 'deploy'?" in app.run("history", "--operation", "deplyo", check=2).data["error"]["hint"]
    assert "4 entries, the newest 1 of them shown" in app.run("history", "--limit", "1", json=False, check=0).stderr


def test_show_without_an_id_is_the_last_run(app: App) -> None:
    assert app.run("show", check=0).data["history"][-1]["release"] == app.current


def test_status_names_the_configuration_it_used(app: App) -> None:
    assert app.run("status", check=0).data["status"]["configuration"] == [str(app.config)]


HOST = """
mount -t tmpfs none /mnt && mkdir -p /mnt/up/deploy /mnt/work
mount -t overlay none -o lowerdir=/etc,upperdir=/mnt/up,workdir=/mnt/work /etc
mount --bind {there} /etc/deploy
cd {directory} && {python} {deploy} --json {words}
"""


def on_host(there: Path, directory: Any, words: str) -> Any:
    """The one JSON object of a run on a host whose /etc/deploy holds the configurations that lie `there`, and no other."""
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    needs("unshare")
    done = in_namespace(HOST.format(there=there, directory=directory, python=sys.executable, deploy=DEPLOY, words=words))
    if not done.stdout.strip():
        pytest.skip("no overlay mount here: " + str(done.stderr)[-120:])
    return json.loads(done.stdout)


def test_status_all_goes_over_every_configuration(app: App, tmp_path: Path) -> None:
    there = tmp_path / "there"
    there.mkdir()
    (there / "good.ini").write_text(f"[deploy]\nroot = {app.root}\n")
    assert on_host(there, "/", "status --all")["roots"] == [{
        "configuration": "/etc/deploy/good.ini", "application": app.root.name, "root": str(app.root), "problem": "",
        "release": app.current, "ok": True}]
    (there / "none.ini").write_text("[deploy]\nroot = /nonexistent/root\n")
    (there / "typo.ini").write_text("[deploy]\nrot = /srv\n")
    found = on_host(there, "/", "status --all")
    assert found["exit_code"] == 7 and [root["ok"] for root in found["roots"]] == [True, False, False]
    assert "does not exist" in found["roots"][1]["problem"] and "unknown key 'rot'" in found["roots"][2]["problem"]


def test_a_working_directory_inside_a_root_is_that_root(app: App, tmp_path: Path) -> None:
    inside = app.root / "releases" / str(app.current)
    data = run_deploy("status", cwd=inside, check=0).data
    assert data["root"] == str(app.root) and data["release"] == app.current
    there = tmp_path / "there"
    there.mkdir()
    (there / "deploy.ini").write_text("[deploy]\nroot = /srv/another\n")
    (there / "own.ini").write_text(f"[deploy]\nroot = {app.root}\napplication = myapp\nkeep_releases = 9\n")
    assert on_host(there, inside, "status")["status"]["configuration"] == ["/etc/deploy/own.ini"]
    assert on_host(there, inside, f"--root {app.root} status")["status"]["configuration"] == ["/etc/deploy/own.ini"]
    # Another root that is named is not served with the configuration of this one.
    other = on_host(there, inside, f"--root {tmp_path}/other -n deploy {app.artifact('2.0')}")
    assert other["application"] == "other" and other["root"] == f"{tmp_path}/other"
    for named in f"--root {tmp_path}/other", f"--set deploy.root={tmp_path}/other":
        assert on_host(there, inside, f"{named} config")["config"]["deploy.keep_releases"]["value"] == "5"


def test_a_minimal_configuration_is_one_that_works(app: App, tmp_path: Path) -> None:
    text = app.run("config", "--minimal", "--unit", "web.service", "--url", "http://127.0.0.1:8080/health", json=False, check=0).stdout
    path = tmp_path / "minimal.ini"
    path.write_text(text)
    assert len(text.splitlines()) <= 11 and f"root = {app.root}" in text
    config = run_deploy("config", config=path, check=0).data["config"]
    found = {key: row["value"] for key, row in config.items() if row["origin"] == str(path)}
    assert found["deploy.application"] == "myapp" and "web.service" in found.values()
    plain = run_deploy("config", "--minimal", json=False, check=0).stdout
    assert "#[service:shop]" in plain
