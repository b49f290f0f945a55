"""[policy]: when, and by whose leave a release may go live."""

import calendar
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Dict

import pytest

from support import DEPLOY, App, load_deploy

deploy = load_deploy()
NEVER = "windows = deny # closed"


def rows(result: Any) -> Dict[str, str]:
    """Each check's status and detail."""
    return {check["name"]: f"{check['status']}: {check['detail']}" for check in result.data["checks"]}


# -- windows -------------------------------------------------------------------

BERLIN, NIGHT, WEEK = "Europe/Berlin", "deny fri 22:00-06:00 # night", "allow mon-fri 09:00-16:00\ndeny wed 12:00-13:00"
WINDOWS = [  # 2026-11-27 is a Friday
    (NIGHT, BERLIN, "2026-11-27T20:59", "ok"), (NIGHT, BERLIN, "2026-11-27T21:00", "fail"), (NIGHT, BERLIN, "2026-11-28T04:59", "fail"),
    (NIGHT, BERLIN, "2026-11-28T05:00", "ok"), (NIGHT, BERLIN, "2026-11-28T22:30", "ok"), (NIGHT, "UTC", "2026-11-27T21:00", "ok"),
    (WEEK, "UTC", "2026-11-27T08:59", "fail"), (WEEK, "UTC", "2026-11-27T09:00", "ok"), (WEEK, "UTC", "2026-11-27T16:00", "fail"),
    (WEEK, "UTC", "2026-11-25T12:30", "fail"), (WEEK, "UTC", "2026-11-28T12:30", "fail"),
    ("deny sat-mon", "UTC", "2026-11-30T23:59", "fail"), ("deny sat-mon", "UTC", "2026-12-01T00:00", "ok"),
    ("deny tue,thu-fri 18:00-24:00", "UTC", "2026-11-27T23:59", "fail"), ("deny tue,thu-fri 18:00-24:00", "UTC", "2026-11-28T00:00", "ok"),
    ("deny 2026-12-18..2027-01-06", "UTC", "2027-01-06T23:59", "fail"), ("deny 2026-12-18..2027-01-06", "UTC", "2027-01-07T00:00", "ok"),
    ("deny 22:00-06:00 2026-12-24..2026-12-24", "UTC", "2026-12-25T05:59", "fail"),
    ("deny 22:00-06:00 2026-12-24..2026-12-24", "UTC", "2026-12-24T05:59", "ok"),
    # 02:30 is there twice on 2026-10-25, and not at all on 2027-03-28.
    ("deny 02:00-03:00", BERLIN, "2026-10-25T00:30", "fail"), ("deny 02:00-03:00", BERLIN, "2026-10-25T01:30", "fail"),
    ("deny 02:00-03:00", BERLIN, "2027-03-28T00:59", "ok"), ("deny 02:00-03:00", BERLIN, "2027-03-28T01:00", "ok"),
]


@pytest.mark.parametrize("lines, zone, at, status", WINDOWS)
def test_a_window_is_judged_by_the_time_on_the_wall(lines: str, zone: str, at: str, status: str, monkeypatch: Any) -> None:
    monkeypatch.setenv("TZ", "America/New_York")
    run = SimpleNamespace(settings=SimpleNamespace(policy=SimpleNamespace(windows=deploy.read_value("windows", lines), timezone=zone)),
                          facts=SimpleNamespace(now_seconds=calendar.timegm(time.strptime(at, "%Y-%m-%dT%H:%M"))))
    try:
        assert deploy.judge_windows(run, None)[0] == status
    except deploy.PreflightFailed:
        assert status == "fail"
    assert deploy.environment("TZ") == "America/New_York" and time.tzname[0] == "EST"


@pytest.mark.parametrize("line", ["permit mon", "allow mon-fr", "allow montue", "deny ,mon", "deny 25:00-26:00", "allow 09:00", "deny 24:00-06:00",
                                  "deny 2027-01-02..2026-12-20", "allow mon-fri, 09:00-16:00", "deny 2027-01-02"])
def test_a_line_that_is_no_window_is_a_mistake_of_the_configuration(app: App, line: str) -> None:
    app.configure(f"[policy]\nwindows =\n    allow\n    {line}")
    message = app.run("deploy", app.artifact("1.0"), check=2).data["error"]["message"]
    assert f"not {line}" in message


def test_an_unknown_timezone_is_told_and_never_taken_for_utc(app: App) -> None:
    app.configure("[policy]\nwindows = allow\ntimezone = Mars/Olympus")
    error = app.run("deploy", app.artifact("1.0"), check=3).data["error"]
    assert "Mars/Olympus is unknown" in error["message"] and "tzdata" in error["hint"]
    app.configure("[policy]\nwindows = allow\ntimezone = zone.tab")
    app.run("deploy", app.artifact("1.0"), check=3)


# -- what the rules guard ----------------------------------------------------------

def test_rules_guard_what_goes_live_for_the_first_time_and_no_way_back(app: App) -> None:
    app.deploy("1.0")
    app.deploy("1.1")
    app.configure(f"[policy]\n{NEVER}\njudge = false")
    for words in (["deploy", app.artifact("1.2")], ["-n", "deploy", app.artifact("1.2")], ["preflight", app.artifact("1.2")]):
        result = app.run(*words, check=3)
        assert rows(result)["windows"].endswith("; deny # closed") and rows(result)["judge"].startswith("fail: false exited with code 1")
    assert rows(app.run("preflight", check=3))["judge"].startswith("skip")
    staged = app.run("stage", app.artifact("1.2"), check=0)
    assert [warning.split(":")[0] for warning in staged.data["warnings"]] == ["windows", "judge"]
    app.run("activate", "1.2", check=3)
    app.run("-n", "activate", "1.2", check=3)
    assert rows(app.run("activate", "1.0", check=0))["windows"].startswith("skip")
    app.run("activate", "1.1", check=0)
    app.run("rollback", check=0)
    app.run("recover", check=0)
    assert app.version == "1.0"


def test_the_automatic_way_back_asks_nobody(app: App) -> None:
    app.deploy("1.0")
    app.configure("[policy]\njudge = sh -c 'test ! -e judged; touch judged'\n[probe:web]\ncommand = grep -q 1.0 VERSION\nsuccesses = 1\ndeadline = 1s")
    app.run("deploy", app.artifact("1.1"), check=5)
    assert app.version == "1.0" and (app.root / "judged").exists()


def test_override_passes_what_it_may_is_recorded_and_told(app: App) -> None:
    notifier = f"[notify:me]\ntype = command\ncommand = sh -c 'echo \"$DEPLOY_TEXT\" >> {app.directory}/told'"
    app.configure(f"[policy]\n{NEVER}")
    first, why = app.artifact("1.0"), ["--override", "the shop is down"]
    assert "override = no" in app.run("deploy", first, *why, check=3).data["error"]["message"] + str(rows(app.run("preflight", first, *why, check=3)))
    assert not app.releases()
    app.configure(f"[policy]\n{NEVER}\noverride = yes\njudge = grep -v '\"override\": \"the shop'\n{notifier}")
    error = app.run("deploy", first, *why, check=3).data["error"]
    assert "judge" in error["message"]  # nobody passes the judge
    app.configure(f"[policy]\n{NEVER}\noverride = yes\njudge = grep -q '\"override\": \"the shop'\n{notifier}")
    assert "--override WHY" in app.run("deploy", first, check=3).data["error"]["hint"]
    result = app.run("deploy", first, *why, "-m", "as asked", check=0)
    assert result.data["note"] == app.record(app.current)["note"] == app.history()[-1]["note"] == "as asked; override: the shop is down"
    assert result.data["warnings"][0].startswith("windows: ")
    assert "override: the shop is down" in (app.directory / "told").read_text().splitlines()[-1]
    assert "the shop is down" in app.run("show", json=False, check=0).stdout
    app.run("rollback", *why, check=2)


def test_without_a_policy_nothing_of_it_is_entered(app: App) -> None:
    names = {"do_unpack", "local_time", *[name for name in dir(deploy) if name.startswith("judge_")]} - {"judge_name"}
    script = (f"import os, runpy, sys\nsys.argv[:1] = []\nnames = {names}\n"
              "def note(frame, event, argument):\n    if frame.f_code.co_name in names: os.write(2, f'<{frame.f_code.co_name}>'.encode())\n"
              "sys.setprofile(note)\nrunpy.run_path(sys.argv[0], run_name='__main__')")
    for policy, entered in (("", set()), ("[policy]\nwindows = allow", {"judge_windows", "local_time"})):
        app.configure(policy)
        done = subprocess.run([sys.executable, "-c", script, str(DEPLOY), "-c", str(app.config), "deploy", "-f", str(app.artifact("1.0"))],
                              stderr=subprocess.PIPE, stdout=subprocess.PIPE)
        assert set(re.findall(r"<(\w+)>", done.stderr.decode())) == entered | {"do_unpack"}


# -- the judge ---------------------------------------------------------------------

def test_the_judge_is_told_everything_and_its_first_line_is_the_reason(app: App) -> None:
    app.deploy("1.0")
    app.configure("[policy]\nenvironment = production\nwindows = allow\n"
                  f"judge = sh -c 'cat > {app.directory}/asked; echo because; echo more'")
    result = app.run("deploy", app.artifact("1.1"), check=0)
    asked = json.loads((app.directory / "asked").read_text())
    assert rows(result)["judge"] == "ok: because"
    assert set(asked) == {"schema", "operation", "application", "environment", "host", "now", "by", "artifact", "current", "previous",
                          "plan", "checks", "override"}
    assert (asked["operation"], asked["application"], asked["environment"]) == ("deploy", "myapp", "production")
    assert asked["current"]["version"] == "1.0" and asked["previous"] is None and asked["override"] is None
    assert asked["artifact"]["version"] == "1.1" and asked["by"]["user"] == app.history()[-1]["by"]["user"]
    assert [step["name"] for step in asked["plan"]][-1] == "prune" or "activate" in [step["name"] for step in asked["plan"]]
    assert {"name": "windows", "status": "ok"}.items() <= next(check for check in asked["checks"] if check["name"] == "windows").items()


@pytest.mark.parametrize("judge, said", [("sh -c 'echo no way; exit 3'", "exited with code 3: no way"), ("/nowhere/judge", "cannot start /nowhere/judge")])
def test_a_judge_that_says_no_or_is_missing_is_a_no(app: App, judge: str, said: str) -> None:
    app.configure(f"[policy]\njudge = {judge}")
    assert said in app.run("deploy", app.artifact("1.0"), check=3).data["error"]["message"]
    assert app.releases() == []


def test_a_judge_that_is_late_is_a_no(app: App, tmp_path: Path) -> None:
    hasty = tmp_path / "deploy.py"
    text = DEPLOY.read_text(encoding="utf-8").replace("JUDGE_SECONDS = 30.0", "JUDGE_SECONDS = 0.2")
    hasty.write_text(text, encoding="utf-8")
    app.configure("[policy]\njudge = sleep 60")
    done = subprocess.run([sys.executable, str(hasty), "-c", str(app.config), "deploy", str(app.artifact("1.0"))],
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=20)
    assert done.returncode == 3 and b"sleep 60 timed out" in done.stderr
