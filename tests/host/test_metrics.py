"""Metrics for Prometheus' node_exporter: after each run, whatever its end, whole, and counted on."""

import fcntl
import os
import re
import signal
import stat
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Dict, Iterator, List, Tuple

import pytest

from scenes import Gate
from support import DEPLOY, App, clean_environment, load_deploy, needs, deep, snapshot, start_deploy
from tables import section

deploy = load_deploy()
Labels = Tuple[Tuple[str, str], ...]


@pytest.fixture
def app(app: App) -> App:
    """An application with a directory for metrics."""
    textfiles(app).mkdir()
    configure(app)
    return app


def configure(app: App, text: str = "", name: str = "myapp") -> None:
    """Write deploy.ini with a directory for metrics; `name` is the application's."""
    app.configure(f"durable = no\napplication = {name}\n[metrics]\ntextfile_dir = {textfiles(app)}\n{text}")
    app.config.write_text(app.config.read_text().replace("application = myapp\n", "", 1))


def textfiles(app: App) -> Path:
    """The directory of the textfile collector."""
    return app.directory / "textfiles"


def prom(app: App) -> Path:
    """The one file there."""
    found = [path for path in textfiles(app).iterdir()]
    assert len(found) == 1 and found[0].suffix == ".prom", found
    return found[0]


def parse(text: str) -> Dict[Tuple[str, Labels], float]:
    """Read the text format strictly: HELP and TYPE once before a metric's samples, which stand together, each once."""
    samples, declared, seen = {}, [], []  # type: Dict[Tuple[str, Labels], float], List[str], List[str]
    assert text.endswith("\n") and "\n\n" not in text
    for line in text[:-1].split("\n"):
        if line.startswith("#"):
            _, word, name, rest = line.split(" ", 3)
            declared.append(f"{word} {name}")
            assert word in ("HELP", "TYPE") and (word == "HELP" or rest == ("counter" if name.endswith("_total") else "gauge"))
            continue
        name, labels, value = re.match(r'([a-z_]+)\{((?:[a-z0-9]+="(?:[^"\\]|\\[\\"n])*",?)+)\} ([0-9.]+)\Z', line).groups()
        assert declared[-2:] == [f"HELP {name}", f"TYPE {name}"]
        pairs = tuple(re.findall(r'([a-z0-9]+)="((?:[^"\\]|\\.)*)"', labels))
        assert pairs[0][0] == "app" and (name, pairs) not in samples
        samples[name, pairs] = float(value)
        seen.append(name)
    assert len(declared) == len(set(declared)) == 2 * len(set(seen))
    return samples


def read(app: App) -> Dict[str, float]:
    """The samples of the application, without the labels `app` and `command`: {`name value value`: number}."""
    return {" ".join([name] + [value for key, value in labels[1:] if key != "command"]): number
            for (name, labels), number in parse(prom(app).read_text()).items()}


def counts(app: App) -> Dict[str, float]:
    """How often each result was counted, where it was."""
    return {key.split()[1]: value for key, value in read(app).items() if key.startswith("deploy_runs_total ") and value}


@contextmanager
def locked(app: App) -> Iterator[None]:
    """The application's lock, held by this process."""
    with open(str(app.root / ".deploy" / "lock")) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


# -- whatever its end ------------------------------------------------------------

def test_a_deployment_tells_what_is_live_and_how_it_came_there(app):
    before = app.deploy("1.0").data
    after = read(app)
    steps = {name: after[f"deploy_step_duration_seconds {name}"] for name in ("unpack", "publish", "seal", "activate")}
    assert steps == {step["name"]: pytest.approx(step["seconds"], abs=0.001) for step in before["steps"]}
    assert after[f"deploy_release_info {app.current} {before['artifact']['sha256']}"] == 1
    assert after["deploy_last_run_success"] == 1 and after["deploy_last_run_exit_code"] == 0
    assert 0 < after["deploy_last_run_duration_seconds"] < 60
    assert after["deploy_last_run_timestamp_seconds"] == after["deploy_last_success_timestamp_seconds"]
    assert prom(app).name == "deploy_myapp.prom" and stat.S_IMODE(prom(app).stat().st_mode) == 0o644
    assert {key.split()[1] for key in after if key.startswith("deploy_runs_total")} == \
        set(deploy.RUN_RESULTS), "what never came counts 0"


def test_no_release_is_a_step_of_its_own(app):
    """Prometheus keeps a series for every value of a label: there must not be one more with every deployment."""
    for number in range(4):
        result = app.run("deploy", app.artifact(f"1.{number}"), "--set", "deploy.keep_releases=1", check=0)
    assert [step["name"] for step in result.data["steps"]][-1].startswith("prune:")
    steps = {key.split()[1] for key in read(app) if key.startswith("deploy_step_duration_seconds")}
    assert steps == {"unpack", "publish", "seal", "activate", "prune"}


def test_counters_go_on_and_every_end_is_counted(app):
    app.deploy("1.0")
    app.deploy("1.0")
    succeeded = read(app)["deploy_last_success_timestamp_seconds"]
    ends = [("[hooks]\npre_activate = false\n", 1, "failed"), ("[preflight]\nrequire_files = /nonexistent\n", 3, "refused"),
            ("[hooks]\npost_activate = false\n", 5, "rolled_back")]
    for number, (text, exit_code, result) in enumerate(ends):
        configure(app, text)
        app.deploy(f"2.{number}", check=exit_code)
        after = read(app)
        assert after["deploy_last_run_exit_code"] == exit_code and after["deploy_last_run_success"] == 0
        assert after["deploy_last_success_timestamp_seconds"] == succeeded < after["deploy_last_run_timestamp_seconds"]
        assert counts(app)[result] == 1
    assert after["deploy_step_duration_seconds activate"] >= 0  # there and back, in one sample
    app.run("deploy", app.artifact("2.2"), check=4)
    assert not any(key.startswith("deploy_step") for key in read(app)), "the steps of the run before are gone"
    configure(app)
    app.run("pin", "1.0", check=0)
    app.run("stage", app.artifact("4.0"), "--detailed-exitcode", check=10)
    assert read(app)["deploy_last_run_success"] == 1 and read(app)["deploy_last_run_exit_code"] == 10
    app.run("prune", check=0)
    app.run("recover", check=0)
    assert counts(app) == {"deployed": 1, "pinned": 1, "staged": 1, "unchanged": 3, "failed": 1, "refused": 2, "rolled_back": 1}
    assert [key.split()[1] for key in read(app) if key.startswith("deploy_release_info")] == [app.current], "live, not staged"


def test_an_interrupted_run_is_counted(app, tmp_path):
    app.deploy("1.0")
    gate = Gate(tmp_path / "gates")
    configure(app, f"[hooks]\npre_activate = {gate.command}\n")
    process = start_deploy("deploy", app.artifact("2.0"), config=app.config)
    try:
        gate.wait_for_visitor()
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 143
    finally:
        gate.open()
    assert counts(app) == {"deployed": 1, "interrupted": 1} and read(app)["deploy_last_run_exit_code"] == 143


DEFECT = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("deploy", sys.argv.pop(1))
deploy = importlib.util.module_from_spec(spec)
sys.modules["deploy"] = deploy
spec.loader.exec_module(deploy)
deploy.COMMANDS["deploy"] = lambda call: {}["a defect"]
sys.exit(deploy.main())
"""


def run_defect(app: App) -> "subprocess.CompletedProcess":
    """A deployment by a deploy.py that has a defect."""
    return subprocess.run([sys.executable, "-B", "-c", DEFECT, str(DEPLOY), "--json", "-c", str(app.config), "deploy", "x"],
                          env=clean_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_a_run_that_meets_a_defect_is_counted(app):
    done = run_defect(app)
    assert done.returncode == 70 and b"Traceback" in done.stderr and b"please report it" in done.stderr
    assert counts(app) == {"internal_error": 1} and read(app)["deploy_last_run_exit_code"] == 70


@pytest.mark.parametrize("arguments", [("-n", "deploy"), ("preflight",), ("status",), ("verify",), ("history",)], ids=" ".join)
def test_what_only_looks_writes_nothing(app, arguments):
    artifact = app.artifact("1.0")
    app.run("deploy", artifact, check=0)
    before = snapshot(textfiles(app))
    app.run(*arguments, *([artifact] if "deploy" in arguments else []))
    assert snapshot(textfiles(app)) == before


def test_what_tells_of_the_last_deployment_stays_until_the_next_one(app):
    """A pin closed the alert of a failed deployment."""
    def last() -> Tuple[str, float]:
        return next((dict(labels)["command"], number) for (name, labels), number in parse(prom(app).read_text()).items()
                    if name == "deploy_last_deployment_success")

    app.deploy("1.0")
    assert last() == ("deploy", 1) and 0 < read(app)["deploy_last_deployment_duration_seconds"] < 60
    activated = read(app)["deploy_release_activated_timestamp_seconds"]
    assert abs(activated - read(app)["deploy_last_deployment_timestamp_seconds"]) < 60
    configure(app, "[hooks]\npost_activate = false\n")
    app.deploy("2.0", check=5)
    failed_at = read(app)["deploy_last_deployment_timestamp_seconds"]
    assert last() == ("deploy", 0)
    configure(app)
    for words in (["pin", "1.0"], ["prune"], ["recover"], ["stage", app.artifact("3.0")]):
        app.run(*words, check=0)
        assert last() == ("deploy", 0) and read(app)["deploy_last_run_success"] == 1
        assert read(app)["deploy_last_deployment_timestamp_seconds"] == failed_at
    app.deploy("2.0", check=4)
    assert last() == ("deploy", 0)
    app.run("activate", "3.0", check=0)
    assert last() == ("activate", 1)
    moved_at = read(app)["deploy_last_deployment_timestamp_seconds"]
    app.run("deploy", app.artifact("3.0"), check=0)
    assert read(app)["deploy_last_deployment_timestamp_seconds"] == moved_at, "it found nothing to do"


def test_that_a_person_is_needed_stays_known_until_it_is_settled(app):
    """A pin closed the alert of a release that was left live although it had failed."""
    app.deploy("1.0")
    configure(app, "[hooks]\npost_activate = false\n")
    app.run("--set", "deploy.auto_rollback=no", "deploy", app.artifact("2.0"), check=6)
    configure(app)
    for words in (["pin", "1.0"], ["recover"], ["prune"], ["stage", app.artifact("3.0")]):
        app.run(*words, check=0)
        assert read(app)["deploy_last_deployment_exit_code"] == 6 and read(app)["deploy_last_run_exit_code"] == 0
    app.run("recover", "--to", "2.0", check=0)
    assert read(app)["deploy_last_deployment_exit_code"] == 0 and read(app)["deploy_last_deployment_success"] == 1
    assert "deploy_last_deployment_exit_code == 6" in section("Monitoring")


# -- several runs ------------------------------------------------------------------

def test_a_run_that_lost_the_lock_or_was_mistyped_is_only_counted(app):
    app.deploy("1.0")
    before = read(app)
    with locked(app):
        app.run("deploy", app.artifact("2.0"), check=75)
    app.run("activate", "9.9", check=2)
    assert read(app) == dict(before, **{"deploy_runs_total busy": 1, "deploy_runs_total usage": 1})


def test_where_no_root_is_named_the_working_directory_is_no_application(app):
    app.config.write_text(app.config.read_text().replace("root = ", "#root = ").replace("application = ", "#application = "))
    assert "no root" in app.run("prune", check=2).data["msg"]
    assert list(textfiles(app).iterdir()) == []


def test_of_runs_that_end_at_once_every_one_is_counted(app):
    app.deploy("1.0")
    with locked(app):
        artifact = app.artifact("2.0")
        runs = [start_deploy("deploy", artifact, config=app.config) for _ in range(4)]  # each waits a second for its turn
        assert [run.wait(60) for run in runs] == [75] * 4
    assert counts(app) == {"deployed": 1, "busy": 4}


def test_a_directory_that_somebody_keeps_locked_costs_a_second_and_no_numbers(app):
    descriptor = os.open(str(textfiles(app)), os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        app.deploy("1.0")
    finally:
        os.close(descriptor)
    assert counts(app) == {"deployed": 1}


# -- what lies there already -----------------------------------------------------------

OLD = {
    "damaged": lambda path, target: path.write_text('deploy_runs_total{app="myapp",result="changed"} 3\ndeploy_ru'),
    "another application's": lambda path, target: path.write_text('deploy_runs_total{app="other",result="changed"} 3\n'),
    "another program's": lambda path, target: path.write_text('node_load1{app="myapp"} 3\n'),
    "two values": lambda path, target: path.write_text('deploy_runs_total{app="myapp",result="changed"} 3 1700000000\n'),
    "no number": lambda path, target: path.write_text('deploy_runs_total{app="myapp",result="changed"} 1.2.3\n'),
    "binary": lambda path, target: path.write_bytes(b"\xff\xfe\x00"),
    "huge": lambda path, target: path.write_bytes(b"#" * (2 << 20)),
    "a symlink": lambda path, target: path.symlink_to(target),
    "a fifo": lambda path, target: os.mkfifo(str(path)),
}


@pytest.mark.parametrize("kind", OLD)
def test_what_is_not_ours_is_neither_kept_nor_followed(app, kind, tmp_path):
    target = tmp_path / "target"
    target.write_text("precious")
    path = textfiles(app) / "deploy_myapp.prom"
    OLD[kind](path, target)
    app.deploy("1.0")
    assert counts(app) == {"deployed": 1, **({"changed": 3} if kind == "damaged" else {})} and target.read_text() == "precious"
    assert stat.S_ISREG(os.lstat(str(path)).st_mode)


@pytest.mark.parametrize("spoil", ["missing", "a file", "a symlink", "a directory in the way"])
def test_metrics_that_cannot_be_written_are_a_warning(app, spoil):
    place = textfiles(app)
    if spoil == "a directory in the way":
        (place / "deploy_myapp.prom").mkdir()
    else:
        place.rename(place.with_name("elsewhere"))
    if spoil == "a file":
        place.write_text("")
    elif spoil == "a symlink":
        place.symlink_to("elsewhere")
    result = app.deploy("1.0")
    assert any(f"metrics: cannot write {place}/deploy_myapp.prom: " in warning for warning in result.data["warnings"])
    assert result.data["summary"]["warnings"] == len(result.data["warnings"])
    if spoil != "a directory in the way":
        assert not list(app.directory.glob("elsewhere/*"))


def test_a_quiet_run_that_changes_nothing_tells_that_metrics_cannot_be_written(app):
    """Cron would never mail it otherwise: most of its runs have nothing to do."""
    app.deploy("1.0")
    artifact = app.artifact("1.0")
    assert app.run("-q", "deploy", artifact, json=False, check=0).stderr == ""
    prom(app).unlink()
    textfiles(app).rmdir()
    assert "metrics: cannot write" in app.run("-q", "deploy", artifact, json=False, check=0).stderr


NAMES = ['a/../b', 'quo"te\\', "naïve", "x" * 300, 'a:../b']


def test_any_application_gets_a_file_of_its_own_that_can_be_read(app):
    artifact = app.artifact("1.0")
    for name in NAMES + ["a_.._b"]:
        configure(app, name=name)
        for _ in range(2):
            assert app.run("stage", artifact, check=0).data["warnings"] == []
    found = {path.name: parse(path.read_text(encoding="utf-8")) for path in textfiles(app).iterdir()}
    assert len(found) == len(NAMES) + 1 and "deploy_a_.._b.prom" in found
    assert all(re.match(r"deploy_[A-Za-z0-9._-]{1,205}\.prom\Z", name) for name in found)
    assert {labels[0][1] for samples in found.values() for _, labels in samples} == \
        {name.replace("\\", "\\\\").replace('"', '\\"') for name in NAMES} | {"a_.._b"}
    assert all(sum(value for (name, _), value in samples.items() if name == "deploy_runs_total") == 2 for samples in found.values())


# -- the real tool -------------------------------------------------------------------------

def promtool(what: str, data: bytes) -> str:
    """What promtool has to say, which is nothing where all is well."""
    argv = [needs("promtool"), "check", what] + ([] if what == "metrics" else ["/dev/stdin"])
    done = subprocess.run(argv, input=data, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    return f"exit code {done.returncode}\n{done.stdout.decode()}"


@deep
def test_promtool_has_nothing_to_say(app):
    app.deploy("1.0")
    configure(app, "[hooks]\npost_activate = false\n")
    app.deploy("2.0", check=5)
    configure(app, name=NAMES[1])
    with locked(app):
        app.run("pin", "1.0", check=75)
    data = b"".join(path.read_bytes() for path in sorted(textfiles(app).iterdir())[:1])
    assert b"deploy_step_duration_seconds" in data
    for path in textfiles(app).iterdir():
        assert promtool("metrics", path.read_bytes()) == "exit code 0\n"
    assert promtool("metrics", data.replace(b" gauge", b" gouge")) != "exit code 0\n"


@deep
def test_promtool_takes_the_rules_of_the_page():
    page = section("Monitoring")
    rules = re.search(r"(?m)^    groups:\n(?:    .*\n)+", page).group()
    assert "SUCCESS: 3 rules found" in promtool("rules", re.sub("(?m)^    ", "", rules).encode("ascii"))
    used = set(re.findall(r"deploy_\w+", rules))
    assert used and used <= {name for name, _, _ in deploy.METRICS}


@deep
def test_the_rules_of_the_page_fire_when_they_should_and_not_before(tmp_path):
    """By promtool's own unit tests, over three hours: a failed deployment that was put right an hour later, one that nobody could
    put right by himself, and a timer that stopped after an hour."""
    rules = re.search(r"(?m)^    groups:\n(?:    .*\n)+", section("Monitoring")).group()
    (tmp_path / "rules.yml").write_text(re.sub("(?m)^    ", "", rules))
    (tmp_path / "tests.yml").write_text("""
rule_files: [rules.yml]
evaluation_interval: 1m
tests:
  - interval: 1m
    input_series:
      - series: 'deploy_last_deployment_success{app="shop",command="deploy"}'
        values: '1x60 0x60 1x60'
      - series: 'deploy_last_deployment_exit_code{app="shop",command="deploy"}'
        values: '0x30 5x30 6x60 0x60'
      - series: 'deploy_last_run_timestamp_seconds{app="shop",command="sync"}'
        values: '0+60x60 3600x120'
    alert_rule_test:
      - {eval_time: 30m, alertname: DeployFailed}
      - eval_time: 90m
        alertname: DeployFailed
        exp_alerts: [{exp_labels: {app: shop, command: deploy}}]
      - {eval_time: 150m, alertname: DeployFailed}
      - {eval_time: 50m, alertname: DeployNeedsAPerson}
      - eval_time: 90m
        alertname: DeployNeedsAPerson
        exp_alerts: [{exp_labels: {app: shop, command: deploy, severity: page}}]
      - {eval_time: 150m, alertname: DeployNeedsAPerson}
      - {eval_time: 115m, alertname: DeployDoesNotRun}
      - eval_time: 125m
        alertname: DeployDoesNotRun
        exp_alerts: [{exp_labels: {app: shop, command: sync}}]
""")
    done = subprocess.run([needs("promtool"), "test", "rules", str(tmp_path / "tests.yml")], stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT)
    assert done.returncode == 0 and b"SUCCESS" in done.stdout, done.stdout.decode()
