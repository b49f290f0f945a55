"""Two slots: the idle one starts the new release, a proxy is led there, the other one drains; and every way back."""

import os
import signal
import socket
import textwrap
import threading
import time
from pathlib import Path
from typing import Any, Dict, Iterator, List

import pytest

from crashes import unchanged_part
from scenes import Gate, alive
from slots import Asked, Client, Proxy, Shop
from support import SET, App, fake_command, deep, start_deploy, wait_until

# Fails for the version that stands in the file `sick`, once that is live, or to be.
JUDGE = "sh -c 'test \"$DEPLOY_VERSION\" != \"$(cat {})\"'"


@pytest.fixture
def shop(app: App) -> Iterator[Shop]:
    """An application in two slots, whose proxy is a file that `reload` writes."""
    shop = Shop(app)
    shop.configure()
    yield shop
    shop.stop()


def live(shop: Shop) -> Dict[str, Any]:
    """Everything that says what is live, which must be one release in one slot; its name, version and process."""
    name = {f"to {port}\n": name for name, port in shop.ports.items()}[str(shop.live_conf())]
    release = str(shop.app.current)
    assert shop.links()[name] == release and shop.app.record(release)["slot"] == name
    assert shop.running() == {name: release}
    boots = {slot: shop.boot(slot) for slot in shop.ports}
    assert [slot for slot, boot in boots.items() if boot == "enabled"] == [name], boots
    status = shop.app.run("status", check=0).data["status"]["slots"]
    assert status[name] == {"port": shop.ports[name], "release": release, "live": True}
    assert not shop.app.leftovers()
    return {"slot": name, "version": shop.app.version, "pid": shop.pid(name)}


def test_logs_are_those_of_the_live_slots_unit_or_of_the_slot_that_is_named(shop: Shop, tmp_path: Path) -> None:
    journal = fake_command(tmp_path / "bin", "journalctl", "print('started')")
    shop.deploy("1.0")
    for words in ([], ["green"]):
        data = shop.app.run("logs", *words, env={"PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}, check=0).data
        assert data["logs"] == ["started"]
    assert [call[-2:] for call in journal.calls()] == [["-u", "shop@blue.service"], ["-u", "shop@green.service"]]


def test_each_release_starts_in_the_idle_slot_and_the_other_one_stops(shop: Shop, tmp_path: Path) -> None:
    reload = fake_command(tmp_path, "reload")
    shop.configure(reload=str(reload.path))
    for version, slot in (("1.0", "blue"), ("1.1", "green"), ("1.2", "blue")):
        before, seen = shop.app.current, len(shop.verbs()) if shop.app.current else 0
        result = shop.deploy(version)
        assert live(shop) == {"slot": slot, "version": version, "pid": shop.pid(slot)}
        other = {"blue": "green", "green": "blue"}[slot]
        stops = [f"stop shop@{other}.service", f"reset-failed shop@{other}.service", f"disable shop@{other}.service"]
        assert shop.verbs()[seen:] == [f"reset-failed shop@{slot}.service", f"restart shop@{slot}.service",
                                    f"enable shop@{slot}.service"] + (stops if before else [])
        steps = [step["name"] for step in result.data["steps"]][3:]
        assert steps == [f"slot:{slot}", "probe:slot", "proxy", "activate"] + ([f"drain:{other}"] if before else [])
        called = reload.details()[-1]
        assert called["cwd"] == str(shop.app.root) and called["env"]["DEPLOY_HOOK"] == "reload"
        assert (called["env"]["DEPLOY_SLOT"], called["env"]["DEPLOY_SLOT_PORT"]) == (slot, str(shop.ports[slot]))
        assert called["env"]["DEPLOY_RELEASE"] == shop.app.current
    conf = shop.slots / "live.conf"
    assert conf.stat().st_mode & 0o777 == 0o644 and conf.read_bytes() == b"to %d\n" % shop.ports["blue"]
    assert os.readlink(str(shop.slots / "green")) == f"../releases/{shop.app.record(str(shop.app.current))['previous']}"


@pytest.mark.parametrize("sick", ["slot", "start"])
def test_what_fails_in_the_idle_slot_was_never_asked(shop: Shop, sick: str) -> None:
    for version in ("1.0", "1.1"):
        shop.deploy(version)
    before, links, conf = live(shop), shop.links(), shop.live_conf()
    shop.configure(settle="300ms")
    result = shop.deploy("1.2", sick, check=1)
    assert live(shop) == before and shop.links() == links and shop.live_conf() == conf
    assert not [step for step in result.data["steps"] if step["name"] == "proxy"]
    assert shop.deploy("1.3").exit_code == 0 and live(shop)["version"] == "1.3"


def test_a_signal_before_the_switch_undoes_all(shop: Shop, tmp_path: Path) -> None:
    shop.deploy("1.0")
    before, gate = live(shop), Gate(tmp_path / "gate")
    shop.configure(f"[probe:gate]\ncommand = sh -c '{gate.command}' ${{port}}\ntimeout = 60s\n")
    process = start_deploy("deploy", shop.artifact("1.1"), config=shop.app.config)
    gate.wait_for_visitor()
    assert set(shop.running()) == {"blue", "green"}
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 143
    shop.configure()
    assert live(shop) == before and list(shop.links()) == ["blue"]


def test_what_fails_behind_the_proxy_is_left_by_one_reload(shop: Shop, tmp_path: Path) -> None:
    sick = tmp_path / "sick"
    sick.write_text("1.1")
    shop.configure(f"[probe:web]\ncommand = {JUDGE.format(sick)}\nperiod = 50ms\nsuccesses = 1\ndeadline = 200ms\n")
    shop.deploy("1.0")
    before = live(shop)
    result = shop.deploy("1.1", check=5)
    assert live(shop) == before, "the old process went on"
    steps = [step["name"] for step in result.data["steps"]]
    assert steps[-5:] == ["proxy", "activate", "probe:slot", "probe:web", "drain:green"]
    assert shop.links()["green"] != shop.links()["blue"] and shop.app.version == "1.0"


def test_a_first_release_that_fails_leaves_no_live_conf(shop: Shop, tmp_path: Path) -> None:
    sick = tmp_path / "sick"
    sick.write_text("1.0")
    shop.configure(f"[probe:web]\ncommand = {JUDGE.format(sick)}\nsuccesses = 1\ndeadline = 50ms\n",
                   reload="sh -c 'test -e slots/live.conf'")  # as nginx, which cannot do without it
    result = shop.deploy("1.0", check=5)
    assert shop.live_conf() is None and shop.app.current is None and shop.running() == {} and not shop.app.leftovers()
    assert any("reload" in warning for warning in result.data["warnings"])
    sick.write_text("")
    shop.app.run("deploy", "--force", shop.artifact("1.0"), check=0)
    assert live(shop)["slot"] == "blue"


def test_a_reload_that_fails_leaves_all_as_it_was(shop: Shop, tmp_path: Path) -> None:
    failures = tmp_path / "failures"
    failures.write_text("0")
    reload = fake_command(tmp_path, "reload", f"left = int(open({str(failures)!r}).read())\n"
                          f"open({str(failures)!r}, 'w').write(str(max(0, left - 1)))\nsys.exit(1 if left else 0)")
    shop.configure(reload=str(reload.path))
    shop.deploy("1.0")
    before, conf = live(shop), shop.live_conf()
    failures.write_text("1")
    shop.deploy("1.1", check=1)
    assert live(shop) == before and shop.live_conf() == conf
    assert [call["env"]["DEPLOY_SLOT"] for call in reload.details()][-2:] == ["green", "blue"]
    failures.write_text("2")
    result = shop.deploy("1.1", check=6)
    assert shop.live_conf() == conf and shop.app.version == "1.0" and shop.running() == {"blue": shop.app.current}
    assert "recover" in result.data["error"]["hint"] and shop.app.run("status").exit_code == 7
    shop.app.run("recover", check=0)
    assert live(shop) == before and reload.details()[-1]["env"]["DEPLOY_SLOT"] == "blue"


def test_a_rollback_that_is_a_killed_deployments_verdict_is_undone_as_well(shop: Shop, tmp_path: Path) -> None:
    shop.deploy("1.0")
    shop.configure("[hooks]\npost_activate = /bin/sh -c 'kill -9 $PPID'\n")
    assert shop.app.run("deploy", shop.artifact("1.1"), json=False).exit_code == -signal.SIGKILL
    reload = fake_command(tmp_path, "reload", f"sys.exit(os.environ['DEPLOY_SLOT'] == 'blue' and not os.path.exists({str(tmp_path / 'ok')!r}))")
    shop.configure(reload=str(reload.path))
    shop.app.run("rollback", check=1)
    assert shop.app.version == "1.1" and shop.live_conf() == f"to {shop.ports['green']}\n" and shop.pid("green")
    (tmp_path / "ok").write_text("")
    assert shop.app.run("status").exit_code == 0
    shop.app.run("rollback", check=0)
    assert live(shop)["version"] == "1.0"


def test_rollback_starts_what_has_stopped_and_only_leads_back_to_what_still_runs(shop: Shop, tmp_path: Path) -> None:
    sick = tmp_path / "sick"
    sick.write_text("none")
    shop.configure(f"[probe:web]\ncommand = {JUDGE.format(sick)}\nsuccesses = 1\ndeadline = 50ms\n")
    for version in ("1.0", "1.1"):
        shop.deploy(version)
    shop.app.run("rollback", check=0)
    back = live(shop)
    assert (back["slot"], back["version"]) == ("blue", "1.0")
    sick.write_text("1.2")
    shop.app.run("--set", "deploy.auto_rollback=no", "deploy", shop.artifact("1.2"), check=6)
    assert shop.app.version == "1.2" and set(shop.running()) == {"blue", "green"}
    shop.app.run("rollback", check=0)
    assert live(shop) == back, "the process that ran all the time is live again"


class Visitor:
    """A connection to a slot that stays established."""

    def __init__(self, shop: Shop, slot: str) -> None:
        self.socket = socket.create_connection(("127.0.0.1", shop.ports[slot]), 20)
        self.socket.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert self.socket.recv(1)


def start(shop: Shop, version: str) -> Any:
    """Begin a deployment, and return once its release is live and the slot that is left drains."""
    process = start_deploy("deploy", shop.artifact(version), config=shop.app.config)
    wait_until(lambda: version in (shop.app.version, process.poll()) and shop.app.history()
               and shop.app.history()[-1]["version"] == version, 60, "it drains")
    return process


@pytest.mark.parametrize("end", ["closed", "time", "signal"])
def test_the_slot_that_is_left_runs_until_its_last_connection_the_time_or_a_signal(shop: Shop, end: str) -> None:
    shop.configure(drain="2s" if end == "time" else "60s")
    shop.deploy("1.0")
    visitor, began = Visitor(shop, "blue"), time.monotonic()
    process = start(shop, "1.1")
    assert shop.pid("blue") and process.poll() is None
    if end == "closed":
        visitor.socket.close()
    elif end == "signal":
        process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0, "what was reached stands"
    assert live(shop)["version"] == "1.1"
    assert end != "time" or time.monotonic() - began >= 2


@deep
@pytest.mark.parametrize("how", ["recover", "deploy"])
def test_a_run_that_was_killed_while_it_drained_is_finished(shop: Shop, how: str) -> None:
    shop.configure(drain="60s")
    shop.deploy("1.0")
    visitor = Visitor(shop, "blue")
    process = start(shop, "1.1")
    process.kill()
    process.wait()
    visitor.socket.close()
    assert shop.pid("blue") and shop.app.run("status").exit_code == 7
    shop.app.run(*(["recover"] if how == "recover" else ["deploy", shop.artifact("1.2")]), check=0)
    assert live(shop)["version"] == ("1.1" if how == "recover" else "1.2")
    assert [entry["result"] for entry in shop.app.history()][:2] == ["deployed", "deployed"]


@pytest.mark.parametrize("kill_at, command, version", [(1, "recover", "1.2"), (1, "rollback", "1.1"), (2, "recover", "1.1")])
def test_a_live_conf_that_was_renamed_counts_as_switched(shop: Shop, tmp_path: Path, kill_at: int, command: str, version: str) -> None:
    """Killed by its own reload, behind the rename and before `current`: on the way forward, or back."""
    for earlier in ("1.0", "1.1"):
        shop.deploy(earlier)
    left, sick = tmp_path / "left", tmp_path / "sick"
    left.write_text(str(kill_at))
    sick.write_text("1.2" if kill_at == 2 else "none")
    reload = fake_command(tmp_path, "reload", f"left = int(open({str(left)!r}).read()) - 1\nopen({str(left)!r}, 'w').write(str(left))\n"
                          "if not left:\n    os.kill(os.getppid(), 9)")
    shop.configure(f"[probe:web]\ncommand = {JUDGE.format(sick)}\nsuccesses = 1\ndeadline = 50ms\n", reload=str(reload.path))
    assert shop.app.run("deploy", shop.artifact("1.2"), json=False).exit_code == -signal.SIGKILL
    calls = len(reload.calls())
    shop.app.run("-n", command, check=0)
    shop.app.run(command, check=0)
    assert live(shop)["version"] == version
    told = reload.details()[calls:]
    assert told and told[-1]["env"]["DEPLOY_SLOT"] == live(shop)["slot"], "the proxy is told once more"


@deep
@pytest.mark.parametrize("how", ["before", "after"])
@pytest.mark.parametrize("ends", ["well", "back"])
def test_killed_at_any_call_of_systemctl_one_recover_leaves_one_slot_that_runs(shop: Shop, tmp_path: Path, how: str, ends: str) -> None:
    """Real processes: the killed run's systemctl is still carried out, or is not."""
    sick, killed = tmp_path / "sick", 0
    shop.configure(f"[probe:web]\ncommand = {JUDGE.format(sick)}\nsuccesses = 1\ndeadline = 50ms\n", drain="0s")
    sick.write_text("none")
    shop.deploy("1.0")
    for number in range(1 if SET == "proof" else {"before": 2, "after": 5}[how], 60, 1 if SET == "proof" else 6):
        version = f"1.{number}"
        sick.write_text(version if ends == "back" else "none")
        (shop.directory / "kill").write_text(f"{number} {how}\n")
        code = shop.app.run("deploy", shop.artifact(version), json=False).exit_code
        (shop.directory / "kill").unlink()
        if code != -signal.SIGKILL:
            assert code == {"well": 0, "back": 5}[ends] and killed >= (12 if SET == "proof" else 2)
            return
        killed += 1
        shop.app.run("recover", check=0)
        assert live(shop)["version"] != version or ends == "well", number
    raise AssertionError("it has no end")


@pytest.mark.parametrize("spoiled", ["another text", "no live.conf", "the other slot", "a link", "current"])
def test_what_does_not_agree_is_told_and_settled_by_hand(shop: Shop, spoiled: str) -> None:
    for version in ("1.0", "1.1"):
        shop.deploy(version)
    conf, old, new = shop.slots / "live.conf", shop.links()["blue"], shop.links()["green"]
    if spoiled in ("a link", "current"):
        path = {"a link": shop.slots / "green", "current": shop.app.root / "current"}[spoiled]
        target = os.readlink(str(path)).replace(new, old)
        path.unlink()
        path.symlink_to(target)
    else:
        conf.unlink()
    if spoiled in ("another text", "the other slot"):
        conf.write_text({"another text": "elsewhere\n", "the other slot": f"server 127.0.0.1:{shop.ports['blue']};\n"}[spoiled])
    status = shop.app.run("status", check=7).data["status"]
    assert any("slots/live.conf names" in problem for problem in status["problems"])
    for command in (["activate", old if spoiled != "current" else new], ["deploy", shop.artifact("1.2")]):
        assert "slots/live.conf names" in shop.app.run(*command, check=3).data["error"]["message"]
    hint = [check["hint"] for check in shop.app.run("preflight", check=3).data["checks"] if check["name"] == "slots"][0]
    assert hint.endswith(f"recover --to {old if spoiled == 'current' else new}")
    shop.app.run("recover", "--to", new, check=0)
    assert live(shop)["version"] == "1.1"


def test_a_changed_include_is_no_disagreement(shop: Shop) -> None:
    shop.deploy("1.0")
    shop.configure(include="now to ${slot} at ${port}")
    shop.deploy("1.1")
    assert shop.live_conf() == f"now to green at {shop.ports['green']}\n"


def test_whoever_listens_on_the_idle_port_is_named(shop: Shop) -> None:
    shop.deploy("1.0")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", shop.ports["green"]))
        listener.listen(1)
        error = shop.deploy("1.1", check=3).data["error"]["message"]
    assert f"port {shop.ports['green']} of slot green is taken by process {os.getpid()}," in error


def test_a_release_from_before_slots_is_left_alone_and_told(shop: Shop) -> None:
    shop.app.configure("durable = no\n")
    shop.app.run("deploy", shop.artifact("1.0"), check=0)
    shop.configure()
    result = shop.deploy("1.1")
    assert any("is live in no slot" in warning for warning in result.data["warnings"]) and live(shop)["slot"] == "blue"
    shop.app.run("rollback", check=0)
    assert live(shop) == {"slot": "green", "version": "1.0", "pid": shop.pid("green")}


def test_what_a_slot_names_is_not_pruned(shop: Shop) -> None:
    kept = shop.deploy("1.0").data["release"]
    shop.deploy("1.1")
    for version in ("1.2", "1.3"):
        shop.app.run("stage", shop.artifact(version), check=0)
    shop.app.run("--set", "deploy.keep_releases=1", "prune", check=0)
    assert kept in shop.app.releases() and shop.links()["blue"] == kept


def test_a_probe_asks_the_live_slot(shop: Shop) -> None:
    none = shop.app.run("probe", check=7)
    assert "none is live" in none.data["error"]["message"]
    for version in ("1.0", "1.1"):
        shop.deploy(version)
        assert "status 200" in shop.app.run("probe", check=0).data["probes"][0]["detail"]
    os.kill(shop.pid("green"), signal.SIGKILL)
    wait_until(lambda: not shop.pid("green"))
    assert "refused" in shop.app.run("probe", check=7).data["error"]["message"]


def test_without_a_probe_of_a_slot_its_unit_decides_and_preflight_warns(shop: Shop) -> None:
    shop.app.config.write_text(shop.app.config.read_text().replace("settle = 0s", "settle = 300ms").partition("[probe:slot]")[0])
    assert any("its unit alone decides" in warning for warning in shop.deploy("1.0").data["warnings"])
    shop.deploy("1.1", "start", check=1)
    assert live(shop)["version"] == "1.0"


def test_a_dry_run_names_every_step_and_changes_nothing(shop: Shop) -> None:
    shop.deploy("1.0")
    before, seen = unchanged_part(shop.app.root), len(shop.verbs())
    plan = [step["name"] for step in shop.app.run("-n", "deploy", shop.artifact("1.1"), check=0).data["plan"]]
    assert plan == ["unpack", "publish", "seal", "slot:green", "probe:slot", "proxy", "activate", "drain:blue"]
    assert unchanged_part(shop.app.root) == before and len(shop.verbs()) == seen


MISTAKES = {
    "three names": ({"red": "9000"}, "", "exactly two names"),
    "one name": ({"green": ""}, "", "exactly two names"),
    "a name of more than a word": ({"green": "", "live.conf": "9001"}, "", "exactly two names"),
    "one port": ({"blue": "9000", "green": "9000"}, "", "port is the same"),
    "no port": ({"green": "http"}, "", "expected a port"),
    "one unit": ({"unit": "shop.service"}, "", "unit is the same"),
    "one text": ({"include": "server 127.0.0.1:9000;"}, "", "include is the same"),
    "no reload": ({"reload": ""}, "", "needs reload"),
    "a slot's unit": ({}, "[service:web]\nunit = shop@green\n", "has the unit of a slot"),
    "before": ({}, "[probe:early]\ntcp = 127.0.0.1:${port}\nwhen = before\n", "when = after"),
    "a hook": ({}, "[hooks]\npost_deploy = echo ${port}\n", "is for a shell"),
}


@pytest.mark.parametrize("keys, text, message", list(MISTAKES.values()), ids=list(MISTAKES))
def test_what_does_not_go_together_is_a_mistake(shop: Shop, keys: Dict[str, str], text: str, message: str) -> None:
    shop.configure(text, **keys)
    found = shop.app.run("deploy", shop.artifact("1.0"), check=2).data["error"]["message"]
    assert message in found and "None" not in found


def test_the_environment_gives_keys_and_slots(shop: Shop) -> None:
    shown = shop.app.run("config", env={"DEPLOY_SLOTS_DRAIN": "7s", "DEPLOY_SLOTS_blue": "9009"}, check=0).data["config"]
    assert (shown["slots.drain"]["value"], shown["slots.blue"]["value"]) == ("7s", "9009")


def test_a_reload_that_is_not_there_and_a_live_conf_that_is_no_file_are_found_before(shop: Shop) -> None:
    shop.configure(reload="/nonexistent/reload now")
    assert "[slots] reload: /nonexistent/reload" in shop.deploy("1.0", check=3).data["error"]["message"]
    shop.configure()
    shop.deploy("1.0")
    (shop.slots / "live.conf").unlink()
    (shop.slots / "live.conf").mkdir()
    assert "names no slot" in shop.app.run("status", check=7).data["error"]["message"]


def test_places_of_a_slot_need_slots(app: App) -> None:
    app.configure("[probe:web]\nurl = http://127.0.0.1:${port}/\n")
    assert "need [slots]" in app.run("deploy", app.artifact("1.0"), check=2).data["error"]["message"]


# -- real proxies -------------------------------------------------------------------

def problems_of(answers: List[Asked], reported: List[Any]) -> List[str]:
    """Requests that failed, and those that were answered by another version than the one that was reported live before and until after."""
    problems = [f"failed: {asked}" for asked in answers if asked.error]
    for since, until, version in reported:
        problems += [f"not {version}: {asked}" for asked in answers
                     if not asked.error and asked.began >= since and asked.ended <= until and asked.version != version]
    return problems


@pytest.mark.parametrize("name", ["nginx", "haproxy"])
@deep
def test_no_visitor_notices(app: App, tmp_path: Path, name: str, record_property: Any) -> None:
    """Good deployments, bad ones of both kinds, and rollbacks, under clients that never stop asking."""
    numbers, clients = (range(1, 41), 20) if SET == "proof" else ((3, 4), 4)
    shop = Shop(app)
    proxy = Proxy(name, shop, tmp_path / name)
    shop.configure(f"[probe:web]\nurl = http://127.0.0.1:{proxy.port}/health\nrelease = body\nperiod = 50ms\ndeadline = 10s\n",
                   include="\n" + textwrap.indent(proxy.include, "  "), reload=str(proxy.reload.path), drain="30s")
    askers, reported, codes = [], [], []  # type: List[Client], List[Any], List[int]
    try:
        shop.deploy("1.0")
        askers = [Client(proxy.port) for _ in range(clients)]
        since, version = time.monotonic(), "1.0"
        for number in numbers:
            steps = [("deploy", f"1.{number}", "" if number % 4 else "proxy" if number % 8 else "slot")]
            steps += [("rollback", "", "")] if number % 10 == 3 else []
            for command, wanted, sick in steps:
                words = [command] + ([shop.artifact(wanted, sick)] if wanted else [])
                reported.append((since, time.monotonic(), version))
                result = app.run(*words, check={"proxy": 5, "slot": 1}.get(sick, 0))
                since, version = time.monotonic(), str(app.version)
                codes.append(result.exit_code)
                assert sick or not wanted or version == wanted
        wait_until(lambda: all(asker.answers[-1].began > since for asker in askers), 30, "everybody has asked once more")
    finally:
        for asker in askers:
            asker.end()
        proxy.stop()
        shop.stop()
    reported.append((since, time.monotonic(), version))
    answers = [asked for asker in askers for asked in asker.answers]
    figures = (f"{name}: {len(codes)} runs (exit 0: {codes.count(0)}, 1: {codes.count(1)}, 5: {codes.count(5)}), {len(answers)} answers, "
               f"{sum(asker.reopened for asker in askers)} connections opened again, {len({a.version for a in answers})} versions seen")
    record_property("figures", figures)
    print(figures)
    assert len(answers) > 50 * clients and threading.active_count() < 10
    assert problems_of(answers, reported) == [], figures
    wait_until(lambda: not any(alive(pid) for pid in (shop.pid("blue"), shop.pid("green")) if pid), 30, "both slots have ended")


def test_the_judge_of_answers_sees_a_failure_and_a_wrong_version() -> None:
    answers = [Asked(1.0, 1.1, "1.0", ""), Asked(2.0, 2.1, "1.0", ""), Asked(2.0, 2.2, "", "reset")]
    assert problems_of(answers[:1], [(0.0, 1.5, "1.0"), (1.9, 3.0, "1.1")]) == []
    assert len(problems_of(answers, [(0.0, 1.5, "1.0"), (1.9, 3.0, "1.1")])) == 2
