"""deploy.py driven by real Ansible, the newest ansible-core and the oldest: a fleet of six hosts, each with a program and a probe.

The hosts are local, half of them with Python 3.6, half with the newest; the
playbook is the one that the README shows.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, Iterator, List

import pytest

from run_suite import find_pythons
from scenes import Gate
from support import DEPLOY, App, Server, clean_environment, load_deploy, make_artifact, missing, deep, snapshot, TOP, wait_until
from tables import result_keys, section

deploy = load_deploy()
HOSTS = ["h1", "h2", "h3", "h4", "h5", "h6"]


def page_blocks() -> List[str]:
    """The indented blocks of the page on Ansible."""
    text = section("Ansible")
    return [re.sub("(?m)^    ", "", block) for block in re.findall(r"(?m)((?:^    .*\n|^\n(?=    ))+)", text + "\n")]


ROLLING = next(block for block in page_blocks() if "serial:" in block)


class Ansible:
    """One version of Ansible, with deploy.py in its library."""

    def __init__(self, which: str, directory: Path) -> None:
        self.bin = Path(os.environ.get("DEPLOY_TEST_ANSIBLE") or str(TOP / ".cache")) / f"ansible-{which}" / "bin"
        if not (self.bin / "ansible-playbook").exists():
            missing(f"{self.bin}/ansible-playbook (.ci/run installs it)")
        self.directory = directory
        (directory / "library").mkdir()
        shutil.copy(str(DEPLOY), str(directory / "library" / "deploy.py"))

    def run(self, tool: str, *args: Any, rc: int = 0) -> str:
        """Run one of its tools and return what it says; the test fails for another exit code (not 0: any that is not)."""
        variables = {
            "ANSIBLE_LIBRARY": str(self.directory / "library"), "ANSIBLE_NOCOLOR": "1", "ANSIBLE_FORKS": "6",
            "ANSIBLE_LOCAL_TEMP": str(self.directory / "local"), "ANSIBLE_REMOTE_TMP": str(self.directory / "remote"),
            "ANSIBLE_INVENTORY": str(self.directory / "inventory"), "HOME": str(self.directory), "PYTHONWARNINGS": "ignore",
            "ANSIBLE_LOCALHOST_WARNING": "0", "PATH": f"{self.bin}:{os.environ['PATH']}"}  # type: Dict[str, Any]
        done = subprocess.run([tool if "/" in tool else str(self.bin / tool), *map(str, args)], env=clean_environment(variables),
                              cwd=str(self.directory), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        said = done.stdout.decode("utf-8", "replace")
        assert (done.returncode == 0) is (rc == 0), said
        return said

    def play(self, playbook: str, *args: Any, rc: int = 0) -> str:
        """Run a playbook given as text."""
        (self.directory / "playbook.yml").write_text(playbook)
        return self.run("ansible-playbook", "playbook.yml", *args, rc=rc)


class Fleet:
    """Six hosts, each an application with a program that serves what is live."""

    def __init__(self, ansible: Ansible) -> None:
        self.ansible, top = ansible, ansible.directory
        pythons = find_pythons()
        pythons = {number: pythons.get(number, sys.executable) for number in ((3, 6), max(pythons or [(3, 6)]))}
        lines = ["[shop]"]
        self.apps, self.servers = {}, {}  # type: Dict[str, App], Dict[str, Server]
        for number, name in enumerate(HOSTS):
            self.apps[name] = app = App(top / name)
            self.servers[name] = server = Server(app.root / "current" / "VERSION", top / name / "bin")
            app.configure(f"durable = no\n[service:web]\ncommand = {server.restart_command.path}\nsettle = 0s\n"
                          f"[probe:web]\nurl = {server.url}\nrelease = json:version\nsuccesses = 1\nperiod = 100ms\ndeadline = 5s\n")
            lines.append(f"{name} ansible_connection=local ansible_python_interpreter={sorted(pythons.items())[number % 2][1]}")
        (top / "inventory").write_text("\n".join(lines) + "\n")

    def roll(self, version: str, *args: Any, rc: int = 0) -> str:
        """Run the page's playbook with the paths of this fleet."""
        artifact = make_artifact(self.ansible.directory / "artifacts", version, name="shop")
        config = str(self.ansible.directory / "{{ item | default(inventory_hostname) }}" / "deploy.ini")
        text = ROLLING.replace("/etc/deploy/shop.ini", f'"{config}"')
        return self.ansible.play(re.sub(r"/\S+/shop-[\d.]+\.tar\.gz", str(artifact), text), *args, rc=rc)

    def versions(self) -> List[Any]:
        """What is live, host by host."""
        return [self.apps[name].version for name in HOSTS]

    def results(self, name: str) -> List[str]:
        """What a host's history says of its runs, oldest first."""
        return [entry["result"] for entry in self.apps[name].history()]

    def stop(self) -> None:
        """Stop the programs."""
        for server in self.servers.values():
            server.stop()


@pytest.fixture(scope="module", params=["newest", "oldest"])
def ansible(request: Any, tmp_path_factory: Any) -> Ansible:
    """Each of the two Ansibles."""
    return Ansible(request.param, tmp_path_factory.mktemp(f"ansible-{request.param}"))


@pytest.fixture(scope="module")
def fleet(ansible: Ansible) -> Iterator[Fleet]:
    """The six hosts, with 1.0 live on each."""
    made = Fleet(ansible)
    made.roll("1.0")
    yield made
    made.stop()


def recap(said: str) -> Dict[str, Dict[str, int]]:
    """The numbers at the end of what a playbook says, for each host."""
    return {name: {key: int(number) for key, number in re.findall(r"(\w+)=(\d+)", rest)}
            for name, rest in re.findall(r"(?m)^(h\d) +: (.*)$", said)}


@deep
def test_a_second_run_is_all_ok_and_changes_nothing(fleet: Fleet) -> None:
    assert fleet.versions() == ["1.0"] * 6
    before = [snapshot(fleet.apps[name].root / "releases") for name in HOSTS]
    numbers = recap(fleet.roll("1.0"))
    assert all(numbers[name]["changed"] == numbers[name]["failed"] == 0 and numbers[name]["ok"] == 1 for name in HOSTS)
    assert [snapshot(fleet.apps[name].root / "releases") for name in HOSTS] == before


@deep
def test_check_and_diff_show_what_would_change_and_change_nothing(fleet: Fleet) -> None:
    before = [snapshot(fleet.apps[name].root) for name in HOSTS]
    said = fleet.roll("2.0", "--check", "--diff")
    assert [snapshot(fleet.apps[name].root) for name in HOSTS] == before
    assert all(numbers["changed"] == 1 for numbers in recap(said).values()) and len(recap(said)) == 6
    assert len(re.findall(r"(?m)^-releases/\S+-1\.0\n\+releases/\S+-2\.0$", said)) == 6
    assert f"--- before: {fleet.apps['h1'].root}/current" in said


@deep
def test_a_probe_that_fails_on_the_third_host_stops_the_roll_and_leads_back(fleet: Fleet) -> None:
    well = fleet.servers["h3"].answer
    fleet.servers["h3"].answer = lambda: (503, b"") if fleet.servers["h3"].version == "3.0" else well()  # type: ignore
    untouched = [snapshot(fleet.apps[name].root) for name in ("h5", "h6")]
    said = fleet.roll("3.0", rc=2)
    assert "probe web failed" in said
    assert fleet.versions() == ["1.0"] * 6
    assert [fleet.results(name)[-2:] for name in ("h1", "h2", "h4")] == [["deployed", "rolled_back"]] * 3
    assert fleet.results("h3")[-1] == "rolled_back"
    assert [snapshot(fleet.apps[name].root) for name in ("h5", "h6")] == untouched
    assert all(server.version == "1.0" for server in fleet.servers.values())
    assert fleet.apps["h3"].history()[-1]["by"]["trigger"] == "ansible"


@deep
def test_the_timeout_of_a_task_ends_no_run_and_busy_is_told_apart(fleet: Fleet, tmp_path: Path) -> None:
    gate, app, begun = Gate(tmp_path / "gates"), fleet.apps["h6"], tmp_path / "begun"
    artifact = make_artifact(tmp_path, "4.0", name="shop")
    task = f'deploy: {{config: {app.config}, artifact: {artifact}, set: {{hooks.pre_activate: ["touch {begun}", "{gate.command}"]}}}}'
    play = f"""
- hosts: h6
  gather_facts: no
  tasks:
    - {task}
      timeout: 5
      ignore_errors: yes
    - wait_for: {{path: {begun}, timeout: 60}}
      vars: {{ansible_python_interpreter: "{{{{ ansible_playbook_python }}}}"}}
    - {task}
      timeout: 60
      register: second
      failed_when: second.rc != 75 or second.changed or "pid" not in second.msg
"""
    try:
        said = fleet.ansible.play(play)
        assert re.search("timed? ?out|expected time frame", said, re.IGNORECASE), said
        assert recap(said)["h6"]["ignored"] == 1 and app.version == "1.0"
    finally:
        gate.open()
    wait_until(lambda: app.history()[-1]["version"] == "4.0", 30, "the end of the run that Ansible gave up")
    assert app.version == "4.0" and fleet.results("h6")[-1] == "deployed"


@deep
def test_ad_hoc_arguments_are_texts(fleet: Fleet) -> None:
    app = fleet.apps["h1"]
    said = fleet.ansible.run("ansible", "h1", "-m", "deploy", "-a", f"command=history limit=1 verify=no config={app.config}")
    assert json.loads(said.partition("=>")[2])["history"][0]["result"] == fleet.results("h1")[-1]
    said = fleet.ansible.run("ansible", "h1", "-m", "deploy", "-a", f"command=activate release=9.90 config={app.config}", rc=2)
    assert "9.90" in said
    lines = re.findall(r"`(ansible shop [^`]*)`", section("Ansible"))
    assert lines
    for line in lines:
        said = fleet.ansible.run("/bin/sh", "-c", line.replace("/etc/deploy/shop.ini", str(app.config)))
        assert said.count("SUCCESS") == 6


@deep
def test_a_number_that_yaml_made_of_a_version_is_refused(fleet: Fleet) -> None:
    play = "- hosts: h1\n  gather_facts: no\n  tasks:\n    - deploy: {command: activate, root: /srv/shop, release: 1.10}\n"
    assert "the float 1.1 (hint: quote it" in fleet.ansible.play(play, rc=2)


@deep
def test_a_secret_is_in_nothing_that_ansible_shows(fleet: Fleet) -> None:
    play = (f"- hosts: h1\n  gather_facts: no\n  tasks:\n    - deploy: {{command: status, config: {fleet.apps['h1'].config}, "
            "set: {vars.plain: not-to-be-seen}}\n      no_log: true\n")
    assert "not-to-be-seen" not in fleet.ansible.play(play, "-vvv")


@deep
def test_the_examples_run(ansible: Ansible, fleet: Fleet, tmp_path: Path) -> None:
    app = fleet.apps["h2"]
    artifact = make_artifact(tmp_path, "5.0", name="shop")
    text = re.sub(r"/var/\S+", str(artifact), deploy.EXAMPLES.replace("/etc/deploy/shop.ini", str(app.config)))
    text = text.replace("/srv/shop", str(tmp_path / "shop")).replace("http://127.0.0.1:8080/health", fleet.servers["h2"].url)
    said = ansible.play("- hosts: h2\n  gather_facts: no\n  tasks:\n" + re.sub("(?m)^(?=.)", "    ", text))
    assert recap(said)["h2"]["ok"] == text.count("deploy:") and app.version == "1.0"
    assert (tmp_path / "shop" / "current" / "VERSION").read_text() == "5.0\n"


@deep
def test_ansible_doc_shows_the_main_parameters_and_warns_of_nothing(ansible: Ansible) -> None:
    said = ansible.run("ansible-doc", "-t", "module", "deploy", "-M", ansible.directory / "library")
    assert "WARNING" not in said and "DEPRECATION" not in said
    documented = json.loads(ansible.run("ansible-doc", "-j", "-t", "module", "deploy", "-M", ansible.directory / "library"))["deploy"]
    options = documented["doc"]["options"]
    assert set(options) < {"command"}.union(*map(deploy.parameters_of, deploy.COMMANDS)) and len(options) == 10
    assert options["command"]["default"] == "deploy" and options["config"]["type"] == "list" and options["set"]["type"] == "dict"
    assert all(option["description"] and option["type"] for option in options.values())
    assert {"changed", "rc", "msg"} <= set(documented["return"]) < {key for key, _ in result_keys()} | {"rc", "diff"}
    assert documented["examples"].strip() == deploy.EXAMPLES.strip()
