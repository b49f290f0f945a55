"""Run by cron: what it mails and what it does not, its environment, and the share of --splay that a host waits."""

import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any, Dict, List

import pytest

from support import (App, DEPLOY, deploy_argv, in_namespace, load_deploy, needs, deep, run_deploy, snapshot,
                     start_deploy, wait_until)

deploy = load_deploy()


# -- the real daemon ---------------------------------------------------------------------

# `@reboot` is what cron runs when it starts and finds no note in /run that it did so before: nobody waits for the minute.
CRON = """
mkdir {place}/usr-sbin {place}/sbin {place}/mails
mount --bind /usr/sbin {place}/usr-sbin
ln -s {place}/usr-sbin/* {place}/sbin/
rm -f {place}/sbin/sendmail
printf '#!/bin/sh\\ncat > {place}/mails/$$\\n' > {place}/sbin/sendmail
chmod 755 {place}/sbin/sendmail
mount --bind {place}/sbin /usr/sbin
: > {place}/crontab
mount --bind {place}/crontab /etc/crontab
mkdir /var/spool/cron/crontabs
run() {{
    rm -f /run/crond.* /etc/cron.d/*
    printf '%s\\n' MAILTO=ops@example.com "@reboot root $1; echo \\$? > {place}/code.new; mv {place}/code.new {place}/code" > /etc/cron.d/deploy
    /usr/sbin/cron -f &
    daemon=$!
    for i in $(seq 600); do [ -e {place}/code ] && break; sleep 0.05; done
    kill $daemon
    for i in $(seq 600); do grep -qsx cron /proc/[0-9]*/comm || break; sleep 0.05; done
    echo "exit code $(cat {place}/code)"
    rm -f {place}/code
    for mail in $(find {place}/mails -type f); do echo "--- mail"; cat "$mail"; rm "$mail"; done
}}
"""


@deep
def test_cron_mails_nothing_for_a_no_op_and_one_block_for_a_change_or_a_failure(app: App, tmp_path: Path) -> None:
    # Where it is installed, not where PATH leads: that of a test need not hold /usr/sbin.
    needs("/usr/sbin/cron")
    app.configure("[hooks]\npost_activate = test ! -e broken\n")
    artifacts = [app.artifact("1.0"), app.artifact("1.1"), app.artifact("1.2", {"broken": "yes"})]
    app.run("deploy", artifacts[0], check=0)
    lines = "".join(f"echo '=== run'\nrun '{DEPLOY} -c {app.config} -q deploy {artifact}'\n" for artifact in artifacts)
    done = in_namespace(CRON.format(place=tmp_path) + lines, fresh=["/run", "/etc/cron.d", "/var/spool/cron"])
    no_op, change, failure = done.stdout.split("=== run\n")[1:]
    assert no_op == "exit code 0\n", done.stderr
    assert change.startswith("exit code 0\n--- mail\n") and change.count("--- mail") == 1
    assert "To: ops@example.com" in change and f"Subject: Cron <root@{os.uname().nodename}>" in change
    block = change.partition("\n\n")[2].splitlines()
    assert block[0].startswith("  ok      preflight") and f"myapp: {app.current} is live" in block
    assert block[-1].startswith("checked ")
    assert failure.startswith("exit code 5\n--- mail\n") and failure.count("--- mail") == 1
    assert failure.rstrip().splitlines()[-1].startswith("hint: ") and "; rolled back: " in failure
    assert [(entry["result"], entry["by"]["trigger"]) for entry in app.history()[1:]] == [("deployed", "cron"), ("rolled_back", "cron")]


@pytest.mark.parametrize("environ", [{}, {"HOME": "/root", "LOGNAME": "root", "PATH": "/usr/bin:/bin", "SHELL": "/bin/sh"}],
                         ids=["empty", "cron's"])
def test_the_environment_of_cron_is_enough(environ: Dict[str, str], app: App) -> None:
    # In /usr/sbin on Debian, where neither PATH leads.
    app.configure("[preflight]\nrequire_commands = chroot\n[hooks]\npre_activate = /bin/sh -c 'command -v chroot'\n")
    argv = deploy_argv("-q", "deploy", app.artifact("1.0"), config=app.config, json=False)
    done = subprocess.run(argv, env=environ, cwd="/", stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert done.returncode == 0 and b" is live\n" in done.stdout and b"sbin/chroot\n" in done.stderr
    done = subprocess.run(argv, env=environ, cwd="/", stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


# -- splay -------------------------------------------------------------------------------

def test_a_thousand_hosts_are_spread_evenly() -> None:
    shares = sorted(deploy.share_of(f"web{number}.example.com", "shop") for number in range(1000))
    assert 0 <= shares[0] < 0.01 and 0.99 < shares[-1] < 1
    for tenth in range(10):
        assert 70 < sum(tenth <= share * 10 < tenth + 1 for share in shares) < 130
    # No two thousandths of the time without a host, but for chance.
    assert max(after - before for before, after in zip(shares, shares[1:])) < 0.012


def test_a_hosts_share_is_always_the_same_and_its_own_for_each_application() -> None:
    assert deploy.share_of("web1", "shop") == deploy.share_of("web1", "shop") == pytest.approx(0.30096, abs=1e-5)
    assert len({deploy.share_of(host, name) for host in ("web1", "web2") for name in ("shop", "blog")}) == 4


def test_a_dry_run_says_how_long_it_would_wait_and_does_not(app: App) -> None:
    started = time.monotonic()
    runs = [app.run("-n", "deploy", app.artifact("1.0"), "--splay", "100h", json=False, check=0) for _ in range(2)]
    assert time.monotonic() - started < 60
    said = [next(line for line in run.stderr.splitlines() if "--splay" in line) for run in runs]
    share = deploy.format_seconds(360000 * deploy.share_of(os.uname().nodename, "myapp"))
    assert said[0] == said[1] == f"would wait {share} of --splay 100h"


def test_the_run_begins_when_the_share_is_over(app: App) -> None:
    share = deploy.share_of(os.uname().nodename, "myapp")
    started = time.monotonic()
    app.run("deploy", app.artifact("1.0"), "--splay", f"{0.5 / share:.3f}s", check=0)
    assert time.monotonic() - started > 0.5 and app.version == "1.0"


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_wait_and_nothing_is_changed_or_locked(number: Any, code: int, app: App, tmp_path: Path) -> None:
    app.deploy("1.0")
    before = snapshot(app.root)
    with (tmp_path / "stderr").open("w") as stderr:
        waiting = start_deploy("deploy", app.artifact("1.1"), "--splay", "480h", config=app.config, stderr=stderr)
    try:
        wait_until(lambda: "waiting " in (tmp_path / "stderr").read_text(), what="it waits")
        assert snapshot(app.root) == before
        app.run("pin", "1.0", check=0)
        before = snapshot(app.root)
        waiting.send_signal(number)
        assert waiting.wait(60) == code
    finally:
        waiting.kill()
        waiting.wait()
    assert snapshot(app.root) == before and app.version == "1.0"


@pytest.mark.parametrize("words", [["status"], ["preflight"], ["history"], ["probe"], ["config"], ["verify"]], ids=lambda words: words[0])
def test_commands_that_only_look_do_not_wait(words: List[str], app: App) -> None:
    assert "--splay" in app.run(*words, "--splay", "5m", check=2).data["error"]["message"]


def test_a_splay_is_a_duration_and_what_is_wrong_is_told_before_the_wait(app: App, tmp_path: Path) -> None:
    for words, said in ([["rollback", "--splay", "5x"], "--splay: '5x': expected a duration"],
                        [["activate", "1.0", "--splay", "5m", "--set", "hooks.timeout=x"], "[hooks] timeout"]):
        assert said in app.run(*words, check=2).data["error"]["message"]
    assert "no root is given" in run_deploy("prune", "--splay", "480h", cwd=tmp_path, check=2).data["error"]["message"]


def test_every_command_that_writes_a_release_takes_it(app: App) -> None:
    app.deploy("1.0")
    for words in (["stage", app.artifact("1.1")], ["activate", "1.1"], ["rollback"], ["prune"], ["recover"]):
        app.run(*words, "--splay", "1ms", check=0)
    assert app.version == "1.0"
