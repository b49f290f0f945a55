"""What a person whom sudo lets run `deploy.py --delegate FILE` can do, and cannot: by real sudo, under the README's own line."""

import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Tuple

import pytest

from support import App, compiled, load_deploy, make_artifact, needs, open_to_others, run_deploy, sha256_of, snapshot, start_deploy, wait_until
from tables import section

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
NOBODY = 65534
deploy = load_deploy()


class Desk(NamedTuple):
    """A host on which nobody, who is in nogroup, may deploy by sudo: the application, and what nobody types."""

    app: App
    inbox: Path
    desk: Path  # nobody's working directory
    program: Path
    sudoers: Path

    def sudo(self, *words: Any, cwd: Any = None, env: Tuple[str, ...] = (), before: Tuple[str, ...] = ()) -> Any:
        """What nobody gets for `sudo deploy.py --delegate FILE words`: the finished process, with its object as `data`."""
        mounted = 'mount --bind "$1" /etc/sudoers; shift; exec "$@"'
        argv = [needs("unshare"), "-m", "/bin/sh", "-ec", mounted, "sh", str(self.sudoers), needs("setpriv"), f"--reuid={NOBODY}",
                f"--regid={NOBODY}", "--clear-groups", "/usr/bin/env", "-i", "PATH=/usr/bin:/bin", *env, needs("sudo"), "-n", str(self.program),
                *before, "--delegate", str(self.app.config), *map(str, words)]
        done = subprocess.run(argv, cwd=str(cwd or self.desk), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                              universal_newlines=True, timeout=60)
        done.data = json.loads(done.stdout) if done.stdout.startswith("{") else None  # type: ignore
        return done


@pytest.fixture(scope="module")
def desk() -> Iterator[Desk]:
    """An application with 1.0 live, made by root, 1.1 in the inbox, and whatever nobody could think of."""
    with open_to_others() as app:
        inbox, place, program = app.directory / "inbox", app.directory / "desk", app.directory / "deploy.py"
        inbox.mkdir()
        place.mkdir()
        app.configure(f"durable = no\ninbox = {inbox}\ndelegated =\n  deploy\n  stage\n  rollback\n  status\n  probe\n  recover\n[hooks]\npost_activate = env\n")
        app.deploy("1.0")
        # As the #! line does, but for the interpreter, which is the one under test.
        program.write_text(f"#!/bin/sh\nexec {sys.executable} {compiled()} \"$@\"\n")
        program.chmod(0o755)
        line = re.search(r"`(%deployers [^`]*)`", section("sudo")).group(1)  # type: ignore
        for written, here in (("%deployers", "%nogroup"), ("/usr/local/sbin/deploy.py", program), ("/etc/deploy/shop.ini", app.config)):
            assert written in line
            line = line.replace(written, str(here))
        sudoers = app.directory / "sudoers"
        # The variables are kept as no operator should, so that deploy.py gets to see them.
        sudoers.write_text(f'Defaults env_reset, secure_path="/usr/sbin:/usr/bin:/sbin:/bin", env_keep += "DEPLOY_* HOME CREDENTIALS_DIRECTORY"\n{line}\n')
        sudoers.chmod(0o440)
        make_artifact(inbox, "1.1")
        secret = make_artifact(app.directory / "secret", "6.6")  # root's own, and for nobody to see
        secret.parent.chmod(0o700)
        (inbox / "link-1.2.tar.gz").symlink_to(secret)
        os.link(str(secret), str(inbox / "hard-1.2.tar.gz"))
        os.mkfifo(str(inbox / "fifo-1.2.tar.gz"))
        make_artifact(inbox / "sub", "1.2")
        make_artifact(place, "1.2")
        (place / "inbox").symlink_to(inbox)
        (place / "task.json").write_text(json.dumps({"_ansible_module_name": "deploy", "command": "status"}))
        (place / "args").write_text("--force\n")
        (place / "deploy.ini").write_text(f"[hooks]\npre_stage = touch {place}/ran\n")
        for path in (inbox, place, *inbox.rglob("*"), *place.rglob("*")):
            if path.name != "hard-1.2.tar.gz":
                os.chown(str(path), NOBODY, NOBODY, follow_symlinks=False)
        yield Desk(app, inbox, place, program, sudoers)


# -- what it allows -----------------------------------------------------------------

def test_what_is_delegated_works_by_sudo_and_is_the_persons_deed(desk: Desk) -> None:
    artifact = desk.inbox / "myapp-1.1.tar.gz"
    planned = desk.sudo("--json", "deploy", artifact, "-n", "-v")
    assert planned.returncode == 0 and planned.data["plan"] and desk.app.version == "1.0", planned.stderr
    done = desk.sudo("-q", "--json", "deploy", artifact.name, "-m", "as asked = in 4711", "--sha256", sha256_of(artifact),
                     "--release-version", "1.1", "--wait-lock", "5s", cwd=desk.inbox)
    assert done.returncode == 0 and desk.app.version == "1.1", done.stderr
    entry = desk.app.history()[-1]
    assert (entry["by"]["user"], entry["by"]["as"], entry["note"]) == ("nobody", "root", "as asked = in 4711")
    said = desk.sudo("deploy", artifact)
    assert said.returncode == 0 and "nothing to do" in said.stdout, said.stderr
    assert desk.sudo("rollback", "1.0").returncode == 0 and desk.app.version == "1.0"
    assert "--delegate" not in desk.sudo("status").stderr
    assert not (desk.desk / "ran").exists(), "a deploy.ini of the person's was read"


def test_no_variable_of_the_persons_reaches_what_root_runs(desk: Desk) -> None:
    planted = f"{desk.desk}/planted"
    # A version of its own: 1.1 may have been rolled back from by now.
    done = desk.sudo("deploy", make_artifact(desk.inbox, "1.8"), env=(f"HOME={planted}", f"CREDENTIALS_DIRECTORY={planted}", f"TRACEPARENT=00-{'1' * 32}-{'2' * 16}-01"))
    assert done.returncode == 0 and "DEPLOY_HOOK=post_activate" in done.stderr, done.stderr
    assert planted not in done.stderr and re.search(r"HOME=/$", done.stderr, re.MULTILINE)
    done = desk.sudo("deploy", make_artifact(desk.inbox, "1.9"))
    assert re.search(f"HOME={os.path.expanduser('~root')}$", done.stderr, re.MULTILINE), done.stderr
    desk.app.run("activate", "1.0", check=0)


def test_what_to_type_next_is_what_may_be_typed(desk: Desk) -> None:
    make_artifact(desk.inbox, "1.3")
    said = desk.sudo("deploy", desk.inbox / "myapp-1.3.tar.gz")
    assert re.search(f" undo +sudo deploy.py --delegate {desk.app.config} rollback\\n", said.stdout), said.stdout + said.stderr
    desk.app.run("activate", "1.0", check=0)


# -- the ways out -------------------------------------------------------------------

ARTIFACT = "{inbox}/myapp-1.1.tar.gz"
ATTEMPTS = [line.split() for line in """
-c deploy.ini deploy ARTIFACT
deploy ARTIFACT -c deploy.ini
deploy ARTIFACT --config deploy.ini
--config=deploy.ini deploy ARTIFACT
--conf deploy.ini deploy ARTIFACT
-cdeploy.ini deploy ARTIFACT
-nc deploy.ini deploy ARTIFACT
--root {desk} deploy ARTIFACT
deploy ARTIFACT --root={desk}
--set hooks.pre_stage=/bin/id deploy ARTIFACT
deploy --set=hooks.pre_stage=/bin/id ARTIFACT
--log-file {desk}/log status
--log-format json status
--debug status
status --debug
--no-color status
--detailed-exitcode deploy ARTIFACT
deploy ARTIFACT --force
deploy ARTIFACT -f
deploy ARTIFACT -nf
deploy ARTIFACT --allow-downgrade
deploy ARTIFACT --splay 1h
deploy ARTIFACT --sha256=HEX
deploy ARTIFACT --sha HEX
deploy ARTIFACT --release-version=9
--dry deploy ARTIFACT
--json=yes status
--wait-lock=5s status
--delegate {desk}/deploy.ini deploy ARTIFACT
deploy ARTIFACT --delegate {desk}/deploy.ini
--delegate={desk}/deploy.ini status
-- deploy ARTIFACT
deploy -- ARTIFACT
@args deploy ARTIFACT
deploy @args ARTIFACT
deploy ARTIFACT @{desk}/args
deploy ARTIFACT -m @args
{{"_ansible_module_name":"deploy"}}
deploy {{"artifact":"x"}}
{desk}/task.json
-h
--help
deploy --help
--version
-nh
help
help config
completion bash
config
activate 1.0
prune
adopt current
pack /etc
pack {secret}
recover --to 1.0
probe --command /bin/id
probe --url http://127.0.0.1:9/
probe --tcp 127.0.0.1:9
probe --expect status=200
status deploy ARTIFACT
status extra
deploy
deploy {desk}/myapp-1.2.tar.gz
deploy myapp-1.2.tar.gz
deploy ./myapp-1.2.tar.gz
deploy {desk}/inbox/myapp-1.1.tar.gz
deploy {inbox}/../desk/myapp-1.2.tar.gz
deploy {inbox}/../inbox/myapp-1.1.tar.gz
deploy {inbox}/sub/../myapp-1.1.tar.gz
deploy {inbox}/sub/myapp-1.2.tar.gz
deploy {inbox}/sub
deploy {inbox}
deploy {inbox}/
deploy {inbox}/fifo-1.2.tar.gz
deploy {inbox}/link-1.2.tar.gz
stage {inbox}/link-1.2.tar.gz
deploy {inbox}/hard-1.2.tar.gz
deploy {inbox}/none-1.2.tar.gz
deploy {secret}
deploy /dev/zero
deploy /etc/shadow
deploy https://example.org/myapp-1.2.tar.gz
DEPLOY_CONFIG={desk}/deploy.ini deploy ARTIFACT
DEPLOY_DEPLOY_ROOT={desk} deploy ARTIFACT
DEPLOY_HOOKS_PRE_STAGE=/bin/id deploy ARTIFACT
DEPLOY_PREFLIGHT_ACCEPT_RISK=/ status
DEPLOY_ANYTHING=1 status
""".replace("ARTIFACT", ARTIFACT).strip().splitlines()]


@pytest.mark.parametrize("words", ATTEMPTS, ids=" ".join)
def test_there_is_no_way_out(words: List[str], desk: Desk) -> None:
    words = [word.format(inbox=desk.inbox, desk=desk.desk, secret=desk.app.directory / "secret" / "myapp-6.6.tar.gz") for word in words]
    variables = tuple(word for word in words if word.startswith("DEPLOY_"))
    before = snapshot(desk.app.directory)
    done = desk.sudo(*words[len(variables):], env=variables)
    assert done.returncode == 2 and "\nhint: " in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert not done.stdout and snapshot(desk.app.directory) == before, done.stdout


def test_sudo_itself_lets_nothing_stand_before(desk: Desk) -> None:
    before = snapshot(desk.app.directory)
    for words in (("-n",), ("--json",), ("status", "-c")):
        assert desk.sudo("status", before=words).returncode == 1
    assert snapshot(desk.app.directory) == before


# -- the file -----------------------------------------------------------------------

def given_away(config: Path) -> None:
    """It belongs to somebody else."""
    os.chown(str(config), NOBODY, -1)


def group_writes(config: Path) -> None:
    """Root's group may write it: there may be people in it."""
    config.chmod(0o664)


def open_directory(config: Path) -> None:
    """Anybody may replace it."""
    config.parent.chmod(0o777)


def swappable_link(config: Path) -> None:
    """It is somebody's link to a file of root's."""
    config.rename(config.with_name("real.ini"))
    config.symlink_to("real.ini")
    os.chown(str(config), NOBODY, -1, follow_symlinks=False)


def no_configuration(config: Path) -> None:
    """It is no INI file, and may be a secret."""
    config.write_text("root:$y$j9T$secret:19000\n")


def gone(config: Path) -> None:
    """There is none."""
    config.unlink()


def no_command(config: Path) -> None:
    """What it delegates is none."""
    config.write_text(config.read_text().replace("delegated = status", "delegated =\n  status\n  pack"))


@pytest.mark.parametrize("spoil", [given_away, group_writes, open_directory, swappable_link, no_configuration, gone, no_command],
                         ids=lambda spoil: spoil.__name__)
def test_a_file_that_is_not_roots_alone_delegates_nothing(spoil: Callable[[Path], None], app: App) -> None:
    app.deploy("1.0")
    app.configure("durable = no\ndelegated = status\n")
    words = ["--delegate", app.config, "prune" if spoil is no_command else "status"]
    spoil(app.config)
    before = snapshot(app.root)
    refused = run_deploy(*words, json=False, check=2)
    assert str(app.config) in refused.stderr and "secret" not in refused.stderr and snapshot(app.root) == before


@pytest.mark.parametrize("words", ["", "FILE", "-n --delegate FILE status", "status --delegate FILE", "--delegate=FILE status",
                                   "--delegate --delegate FILE status"])
def test_it_stands_first_with_a_file_and_a_command(words: str, app: App) -> None:
    app.configure("delegated = status\n")
    given = [str(app.config) if word == "FILE" else word for word in words.split()]
    run_deploy(*(given if "--delegate" in words else ["--delegate", *given]), json=False, check=2)


def test_help_is_told_where_it_can_be_had(app: App) -> None:
    app.configure("delegated = status\n")
    assert "without sudo" in run_deploy("--delegate", app.config, "help", json=False, check=2).stderr


# -- what lies in the inbox -----------------------------------------------------------

def test_a_link_that_is_swapped_in_while_the_run_waits_is_not_followed(desk: Desk) -> None:
    """It was looked at before the lock was taken, and is opened after it."""
    artifact = make_artifact(desk.inbox, "1.4")
    argv = ["--delegate", desk.app.config, "--wait-lock", "60s", "deploy", artifact]
    with (desk.app.root / ".deploy" / "lock").open("r+") as lock, (desk.app.directory / "said").open("wb") as said:
        fcntl.flock(lock, fcntl.LOCK_EX)
        process = start_deploy(*argv, json=False, stderr=said)
        opened = Path(f"/proc/{process.pid}/fd")
        wait_until(lambda: any(os.path.realpath(str(path)) == lock.name for path in opened.glob("*")), what="a run that waits for the lock")
        artifact.unlink()
        artifact.symlink_to(desk.app.directory / "secret" / "myapp-6.6.tar.gz")
        fcntl.flock(lock, fcntl.LOCK_UN)
        assert process.wait(60) == 2
    assert "no regular file" in (desk.app.directory / "said").read_text()
    assert desk.app.version == "1.0" and not [name for name in desk.app.releases() if name.endswith("1.4")]


def test_a_digest_that_is_a_link_is_not_read(desk: Desk) -> None:
    artifact = make_artifact(desk.inbox, "1.5")
    secret = desk.app.directory / "secret" / "SHA256SUMS"
    secret.write_text(f"{'0' * 64}  private-name.tar.gz\n")
    beside = artifact.with_name(artifact.name + ".sha256")
    beside.unlink()
    beside.symlink_to(secret)
    done = desk.sudo("deploy", artifact)
    assert done.returncode == 4 and "private-name" not in done.stderr and "ELOOP" in done.stderr, done.stderr


def test_an_approval_that_is_a_link_is_not_read(desk: Desk) -> None:
    """Who may write into the inbox would be shown what only root may read."""
    artifact, config = make_artifact(desk.inbox, "1.6"), desk.app.config.read_text()
    secret = desk.app.directory / "secret" / "password"
    secret.write_text("root:$6$private:20000:0:99999:7:::\n")
    signers = desk.app.directory / "signers"
    signers.write_text("")
    artifact.with_name(artifact.name + ".approval").symlink_to(secret)
    try:
        desk.app.config.write_text(f"{config}\n[policy]\napprovals = 1\napprovers = {signers}\n")
        done = desk.sudo("deploy", artifact)
    finally:
        desk.app.config.write_text(config)
    assert done.returncode == 3 and "ELOOP" in done.stderr and "private" not in done.stdout + done.stderr, done.stderr


@pytest.mark.parametrize("way", ["delegated", "sudo", "root"])
def test_of_a_file_of_unknown_format_only_its_name_is_told_to_who_may_not_read_it(way: str, desk: Desk) -> None:
    path = desk.inbox / "shadow-1.tar.gz"
    path.write_text("root:secret\n")
    if way == "delegated":
        said, code = desk.sudo("deploy", path, "--sha256", sha256_of(path)), 4
        assert said.returncode == code
    else:
        env = {"SUDO_USER": "nobody"} if way == "sudo" else {}  # type: Dict[str, Any]
        said = desk.app.run("deploy", path, env=env, json=False, check=4)
    login = Path("/proc/self/loginuid")
    if way == "root" and login.exists() and login.read_text() not in ("4294967295", "0"):
        pytest.skip("somebody has logged in")
    assert path.name in said.stderr and "root:sec" not in said.stderr, said.stderr


def test_the_inbox_itself_may_be_no_link(desk: Desk) -> None:
    """Whoever may write beside it could lead it elsewhere."""
    other = desk.app.directory / "other"
    other.symlink_to(desk.inbox)
    config = desk.app.directory / "other.ini"
    config.write_text(desk.app.config.read_text().replace(str(desk.inbox), str(other)))
    shutil.copy(str(desk.app.config), str(desk.app.directory / "kept.ini"))
    run_deploy("--delegate", config, "deploy", other / "myapp-1.1.tar.gz", json=False, check=2)
