"""A host that Capistrano deployed to is taken over: a PHP and a Node application, served by a real process, and what is typed wrongly there."""

import os
import signal
import socket
import stat
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any, Dict, Iterator, List

import pytest

from scenes import configure
from support import App, directory, file, free_port, link, make_tree, needs, sha256_of, snapshot, write_checksum

OLDER, OLD = "20260301101500", "20260302101500"

PHP = """<?php
$version = trim(file_get_contents(__DIR__ . '/../VERSION'));
require __DIR__ . '/../vendor/acme/greet/src/greet.php';
switch (parse_url($_SERVER['REQUEST_URI'], PHP_URL_PATH)) {
    case '/health':
        if (file_exists(__DIR__ . '/../broken')) { http_response_code(500); }
        echo json_encode(['version' => $version, 'greeting' => greet(), 'key' => trim(file_get_contents(__DIR__ . '/../.env'))]);
        break;
    case '/upload':
        file_put_contents(__DIR__ . '/uploads/' . basename($_GET['name']), $version);
        file_put_contents(__DIR__ . '/../var/cache/page.php', '<?php');
}
"""

NODE = """const fs = require('fs'), path = require('path'), semver = require('semver');
const version = fs.readFileSync(path.join(__dirname, 'VERSION'), 'utf8').trim();
require('http').createServer((request, response) => {
    response.statusCode = fs.existsSync(path.join(__dirname, 'broken')) ? 500 : 200;
    response.setHeader('X-Version', semver.clean(version));
    response.end(JSON.stringify({version: version, cwd: process.cwd()}));
}).listen(Number(process.env.PORT), '127.0.0.1');
"""

VENDOR = {"packages/greet/src/greet.php": "<?php function greet() { return 'hello'; }\n", "vendor/acme/greet": link("../../packages/greet/"),
          "vendor/bin/greet": file("#!/usr/bin/env php\n", 0o755), "vendor/autoload.php": "<?php\n"}
# As pnpm lays it out: one real directory for each version, links to it, and programs in .bin.
STORE = "node_modules/.pnpm/semver@7.0.0/node_modules/semver"
PNPM = {STORE + "/package.json": '{"main": "index.js"}', STORE + "/index.js": "exports.clean = text => text;\n",
        STORE + "/bin/semver.js": file("#!/usr/bin/env node\n", 0o755), "node_modules/semver": link(".pnpm/semver@7.0.0/node_modules/semver"),
        "node_modules/.bin/semver": link("../semver/bin/semver.js"), "node_modules/shop": link("../packages/shop"), "packages/shop/index.js": ""}


def php_tree(version: str) -> Dict[str, Any]:
    """A PHP application with what composer installs."""
    return dict(VENDOR, **{"VERSION": version, "public/index.php": PHP, "public/uploads/.gitkeep": "", "var/cache/.gitkeep": ""})


def node_tree(version: str) -> Dict[str, Any]:
    """A Node application with what pnpm installs."""
    return dict(PNPM, **{"VERSION": version, "server.js": NODE})


def left_by_capistrano(root: Path, trees: Dict[str, Dict[str, Any]], linked: List[str]) -> None:
    """Lay a root out as Capistrano 3 leaves it: absolute links, repo/, revisions.log."""
    make_tree(root / "shared", {".env": "k3y", "log": directory(), "public/uploads": directory()})
    make_tree(root / "repo", {"HEAD": "ref: refs/heads/main\n", "objects": directory()})
    log = []
    for name, tree in trees.items():
        make_tree(root / "releases" / name, dict(
            {path: spec for path, spec in tree.items() if not path.startswith("public/uploads")}, REVISION="d86f0cf\n"))
        for path in linked:
            (root / "releases" / name / path).symlink_to(root / "shared" / path)
        log.append(f"Branch main (at d86f0cf) deployed as release {name} by deploy\n")
        with suppress(FileNotFoundError):
            (root / "current").unlink()
        (root / "current").symlink_to(root / "releases" / name)
    (root / "revisions.log").write_text("".join(log))


class Served:
    """An application that a process serves which only a restart brings onto another release."""

    def __init__(self, app: App, command: str) -> None:
        self.app, self.port = app, free_port()
        self.pid_file, self.restart = app.directory / "server.pid", app.directory / "restart"
        self.restart.write_text(
            f"#!/bin/sh\npid=$(cat {self.pid_file} 2> /dev/null) && kill $pid\n"
            "while grep -qs '^State:.[^Z]' /proc/$pid/status; do sleep 0.01; done\n"
            f"cd {app.root}/current || exit 1\nPORT={self.port} exec {command.format(port=self.port)} > {app.directory}/log 2>&1 &\n"
            f"echo $! > {self.pid_file}\n")
        self.restart.chmod(0o755)

    def configure(self, deploy: str, probe: str) -> None:
        """Write deploy.ini."""
        configure(self.app, f"{deploy}[service:web]\ncommand = {self.restart}\n[probe:web]\nurl = http://127.0.0.1:{self.port}/health\n"
                            f"period = 0.05s\nperiod_max = 0.1s\ndeadline = 30s\nfailures = 2\n{probe}\n")

    def ask(self, path: str) -> str:
        """The body of an answer."""
        with socket.create_connection(("127.0.0.1", self.port), 10) as connection:
            connection.sendall(f"GET {path} HTTP/1.0\r\nHost: localhost\r\n\r\n".encode("ascii"))
            data = b"".join(iter(lambda: connection.recv(65536), b""))
        return data.partition(b"\r\n\r\n")[2].decode("utf-8")

    def packed(self, tree: Dict[str, Any]) -> Path:
        """What a build makes of a tree: packed by deploy.py itself."""
        version = str(tree["VERSION"])
        built = make_tree(self.app.directory / f"build-{version}", tree)
        made = self.app.directory / f"shop-{version}.tar.gz"
        self.app.run("pack", built, "-o", made, check=0)
        return made

    def stop(self) -> None:
        """End the process."""
        with suppress(OSError, ValueError):
            os.kill(int(self.pid_file.read_text()), signal.SIGKILL)


@pytest.fixture
def php(app: App) -> Iterator[Served]:
    """A PHP application."""
    served = Served(app, f"{needs('php')} -S 127.0.0.1:{{port}} -t public public/index.php")
    left_by_capistrano(app.root, {OLDER: php_tree("1.3"), OLD: php_tree("1.4")}, ["log", "public/uploads", ".env"])
    served.configure("shared_dirs =\n    log\n    public/uploads\nshared_files = .env\nmutable = var/cache\n", "release = json:version")
    yield served
    served.stop()


@pytest.fixture
def node(app: App) -> Iterator[Served]:
    """A Node application."""
    served = Served(app, f"{needs('node')} server.js")
    left_by_capistrano(app.root, {OLDER: node_tree("1.3"), OLD: node_tree("1.4")}, ["log"])
    served.configure("shared_dirs = log\n", "release = header:X-Version")
    yield served
    served.stop()


# -- from the first look to the last way back --------------------------------------

def test_a_php_application_is_taken_over_deployed_to_and_led_back_to_what_capistrano_left(php: Served) -> None:
    app = php.app
    assert f"adopt {OLD}" in app.run("status", check=7).data["error"]["hint"]
    for name in ("current", OLDER):
        app.run("adopt", name, check=0)
    os.spawnl(os.P_WAIT, str(php.restart), "restart")
    app.run("probe", "--wait", "10s", check=0)
    php.ask("/upload?name=old.jpg")
    done = app.run("deploy", php.packed(php_tree("1.5")), check=0).data
    assert (done["release"], done["previous"], done["warnings"]) == (app.current, OLD, [])
    assert php.ask("/health") == '{"version":"1.5","greeting":"hello","key":"k3y"}'
    php.ask("/upload?name=new.jpg")
    assert sorted(path.name for path in (app.root / "shared/public/uploads").iterdir()) == ["new.jpg", "old.jpg"]
    failed = app.run("deploy", php.packed(dict(php_tree("1.6"), broken="")), check=5).data
    assert failed["rolled_back"] and '"version":"1.5"' in php.ask("/health")
    app.run("deploy", app.directory / "shop-1.6.tar.gz", check=4)
    app.run("verify", check=0)
    for name, version in ((OLD, "1.4"), (OLDER, "1.3")):
        assert app.run("rollback", check=0).data["release"] == name == app.current
        assert f'"version":"{version}"' in php.ask("/health")
    assert app.run("status", check=0).data["status"]["previous"] is None
    assert app.run("history", "--verify", check=0).data["warnings"] == []


def test_the_first_release_after_capistrano_fails_and_what_was_live_comes_back(node: Served) -> None:
    """What was adopted has no version that an answer could name: nobody asks for one on the way back to it."""
    app = node.app
    app.run("adopt", "current", check=0)
    os.spawnl(os.P_WAIT, str(node.restart), "restart")
    app.run("probe", "--wait", "10s", check=0)
    before = snapshot(app.root / "releases" / OLD)
    failed = app.run("deploy", node.packed(dict(node_tree("2.0"), broken="")), check=5).data
    assert failed["rolled_back"] and app.current == OLD and '"version":"1.4"' in node.ask("/")
    app.run("deploy", node.packed(node_tree("2.1")), check=0)
    release = app.root / "releases" / str(app.current)
    assert str(release) in node.ask("/")
    assert [os.readlink(str(release / path)) for path in ("node_modules/semver", "node_modules/.bin/semver", "node_modules/shop")] == [
        ".pnpm/semver@7.0.0/node_modules/semver", "../semver/bin/semver.js", "../packages/shop"]
    assert os.access(str(release / "node_modules/.bin/semver"), os.X_OK)
    app.run("rollback", check=0)
    assert '"version":"1.4"' in node.ask("/") and snapshot(app.root / "releases" / OLD) == before


def test_a_release_that_nobody_adopted_comes_back_as_well_and_can_be_adopted_later(app: App, server: Any) -> None:
    make_tree(app.root / "releases" / OLD, {"VERSION": "1.4"})
    (app.root / "current").symlink_to(app.root / "releases" / OLD)
    probe = f"[service:web]\ncommand = {server.restart_command.path}\n" \
            f"[probe:web]\nurl = {server.url}\nrelease = json:version\nperiod = 0.05s\ndeadline = 10s\n"
    configure(app, probe + "[hooks]\npost_deploy = false\npost_rollback = sh -c 'echo $DEPLOY_VERSION $DEPLOY_RELEASE'\n")
    failed = app.deploy("2.0", check=5).data
    assert app.current == OLD and failed["steps"][-1]["output"] == [f"{OLD} {OLD}"] and server.version == "1.4"
    configure(app, probe)
    app.deploy("2.1")
    assert f"adopt RELEASE: {OLD}" in app.run("rollback", check=3).data["error"]["hint"]
    app.run("adopt", OLD, check=0)
    app.run("rollback", check=0)
    assert app.current == OLD


def test_a_release_whose_version_is_a_digest_can_be_gone_back_to_with_a_probe_that_asks_for_one(app: App, server: Any) -> None:
    configure(app)
    artifact = app.directory / "app.tar.gz"
    app.artifact("1.0").rename(artifact)
    app.run("deploy", artifact, "--sha256", sha256_of(artifact), check=0)
    first, probe = app.current, f"url = {server.url}\nrelease = json:version\nperiod = 0.05s\ndeadline = 10s\n"
    configure(app, f"[service:web]\ncommand = {server.restart_command.path}\n[probe:web]\n{probe}")
    app.deploy("1.1")
    app.run("rollback", check=0)
    assert app.current == first


def test_a_process_that_stays_in_the_old_release_is_found_where_no_version_can_be_asked_for(app: App, tmp_path: Path) -> None:
    """Without a restart that helps, the process keeps the directory it was started in."""
    make_tree(app.root / "releases" / OLD, {"VERSION": "1"})
    (app.root / "current").symlink_to(app.root / "releases" / OLD)
    app.run("adopt", "current", check=0)
    app.deploy("2.0")
    sleeper = os.spawnl(os.P_NOWAIT, "/bin/sh", "sh", "-c", f"trap '' HUP; cd {app.root}/current; echo $$ > {tmp_path}/pid; "
                                                            "while :; do sleep 0.1; done")
    try:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            configure(app, f"[service:web]\npidfile = {tmp_path}/pid\nsettle = 0.1s\n[probe:web]\nrequired = no\nrelease = body\n"
                           f"url = http://127.0.0.1:{listener.getsockname()[1]}/\ndeadline = 0.2s\nperiod = 0.05s\nsuccesses = 1\n")
            assert "still runs from another release" in app.run("rollback", check=6).data["error"]["message"]
    finally:
        os.kill(sleeper, signal.SIGKILL)
        os.waitpid(sleeper, 0)


# -- what is typed there ------------------------------------------------------------

def test_current_may_lead_through_a_link_above_the_root(app: App, tmp_path: Path) -> None:
    """/var/www is often one, and Capistrano writes the path as it was given it."""
    left_by_capistrano(app.root, {OLD: {"VERSION": "1.4"}}, ["log"])
    (tmp_path / "www").symlink_to(app.directory)
    (app.root / "current").unlink()
    (app.root / "current").symlink_to(tmp_path / "www" / "root" / "releases" / OLD)
    app.run("adopt", "current", check=0)
    app.deploy("2.0")
    app.run("rollback", check=0)
    assert os.readlink(str(app.root / "current")) == f"releases/{OLD}"


@pytest.mark.parametrize("words, exit_code", [
    (["releases"], 0), (["activate", OLD], 2), (["adopt", f"releases/{OLD}"], 2), (["verify", OLDER], 2), (["rollback", OLDER], 2)])
def test_whoever_names_what_is_not_known_yet_is_told_to_adopt_it(app: App, words: List[str], exit_code: int) -> None:
    left_by_capistrano(app.root, {OLDER: {"VERSION": "1.3"}, OLD: {"VERSION": "1.4"}}, ["log"])
    (app.root / ".deploy").mkdir(0o700)
    done = app.run(*words, check=exit_code, json=False)
    assert f"adopt RELEASE: {OLDER}, {OLD}" in done.stdout + done.stderr


def test_a_rollback_where_nothing_is_known_names_adopt(app: App) -> None:
    left_by_capistrano(app.root, {OLD: {"VERSION": "1.4"}}, ["log"])
    assert "adopt" in app.run("rollback", check=2).data["error"]["hint"]


@pytest.mark.parametrize("words", [["adopt", "current"], ["adopt", "root"], ["-n", "adopt", "current"]])
def test_a_root_that_was_typed_wrongly_is_not_made_by_adopt(words: List[str], app: App) -> None:
    left_by_capistrano(app.root, {OLD: {"VERSION": "1.4"}}, ["log"])
    for wrong in (app.directory / "rooot", app.directory):
        before = sorted(app.directory.iterdir())
        refused = app.run("--root", wrong, *words, check=2).data["error"]
        assert refused["message"] == f"nothing was ever deployed to {wrong}" and "--root" in refused["hint"]
        assert sorted(app.directory.iterdir()) == before


def test_where_nothing_is_live_current_cannot_be_adopted(app: App) -> None:
    left_by_capistrano(app.root, {OLD: {"VERSION": "1.4"}}, ["log"])
    (app.root / "current").unlink()
    refused = app.run("adopt", "current", check=2).data["error"]
    assert "no release directory 'current' in" in refused["message"] and f"adopt RELEASE: {OLD}" in refused["hint"]


def test_what_was_adopted_and_changed_since_is_adopted_again_and_not_deployed_from_an_artifact_that_is_not_there(app: App) -> None:
    left_by_capistrano(app.root, {OLDER: {"VERSION": "1.3"}, OLD: {"VERSION": "1.4"}}, [])
    for release in (OLDER, OLD):
        app.run("adopt", release, check=0)
    (app.root / "releases" / OLDER / "VERSION").write_text("1.3b")
    hints = [app.run(*words, check=code).data["error"]["hint"] for words, code in ((["verify", OLDER], 7), (["rollback"], 1))]
    (app.root / ".deploy/trees" / OLDER).unlink()
    hints += [app.run(*words, check=7).data["error"]["hint"] for words in (["verify", OLDER], ["status"], ["diff", OLDER])]
    forget = f"rm {app.root}/.deploy/releases/{OLDER}.json"
    for hint in hints:
        assert f"adopt it as it is: {forget} && deploy.py " in hint and f" adopt {OLDER}" in hint and "artifact" not in hint, hint
    subprocess.run(forget, shell=True, check=True)
    app.run("adopt", OLDER, check=0)
    assert app.run("rollback", check=0).data["release"] == OLDER


def test_where_all_is_known_nothing_is_left_to_adopt(app: App) -> None:
    app.deploy("1.0")
    assert "left to adopt" in app.run("adopt", "nope", check=2).data["error"]["hint"]


def test_a_socket_that_the_service_made_stands_in_nobodys_way_where_it_is_mutable(app: App) -> None:
    left_by_capistrano(app.root, {OLD: {"VERSION": "1.4", "tmp/sockets/.keep": ""}}, ["log"])
    os.mknod(str(app.root / "releases" / OLD / "tmp/sockets/puma.sock"), 0o600 | stat.S_IFSOCK)
    refused = app.run("adopt", "current", check=1).data["error"]
    assert refused["message"].endswith("member 'tmp/sockets/puma.sock': it is a socket, which a release cannot hold")
    assert "mutable" in refused["hint"]
    configure(app, "mutable = tmp\n")
    app.run("adopt", "current", check=0)
    assert app.run("verify", check=0).data["differences"]["added"] == []


def test_an_archive_of_rails_is_named_as_it_is(app: App) -> None:
    """`secrets-1.0.tar.gz: 3 files` is no secret and its value."""
    tree = make_tree(app.directory / "secrets", {"a": "a"})
    done = app.run("pack", tree, "-o", app.directory / "secret-token-1.0.tar.gz", json=False, check=0)
    assert f"{app.directory}/secret-token-1.0.tar.gz: 1 file," in done.stdout
    moved = app.directory / "token-1.0.tar.gz"
    app.artifact("1.0").rename(moved)
    write_checksum(moved)
    checks = {check["name"]: check["detail"] for check in app.run("preflight", moved, check=0).data["checks"]}
    assert checks["artifact"].startswith("token-1.0.tar.gz: tar.gz, ")
