"""Hooks and templates, called as the steps call them."""

import json
import os
import pwd
import signal
import sys
import threading
import time
from types import SimpleNamespace

import pytest

from support import load_deploy

deploy = load_deploy()


@pytest.fixture
def place(tmp_path):
    """A release directory, and a context that names it."""
    release = tmp_path / "releases" / "r1"
    release.mkdir(parents=True)
    return deploy.Context("myapp", str(tmp_path), "r1", "1.1", str(release), "r0", "d1")


def session_with(*assignments):
    settings = deploy.load_settings([], {}, list(assignments))
    console = deploy.Console()
    console.lines = []
    console.output = console.lines.append
    return deploy.Run(settings, console, deploy.Interrupts(), SimpleNamespace(command="deploy"))


def script(context, name, code):
    path = os.path.join(context.release_path, name)
    with open(path, "w") as stream:
        stream.write(f"#!{sys.executable} -IS\n{code}\n")
    os.chmod(path, 0o755)
    return path


def run_hook(session, name, context):
    """Each command's result, of a hook as its step runs it."""
    hooks = session.settings.hooks
    return [deploy.perform_command(session, context, f"hook {name}", argv, hooks.timeout) for argv in getattr(hooks, name)]


def run(context, commands, *assignments, name="pre_activate"):
    session = session_with(f"hooks.{name}={commands}", *assignments)
    return session, run_hook(session, name, context)


SHOW = "import json, os; print(json.dumps([os.getcwd(), dict(os.environ)]))"


def test_a_hook_gets_its_environment_and_nothing_of_ours(place, monkeypatch):
    monkeypatch.setenv("OUR_SECRET", "x")
    script(place, "show", SHOW)
    session, results = run(place, "./show", "env.MODE=blue ä", "env.LANG=C")
    directory, environ = json.loads(results[0].tail[0])
    environ.pop("LC_CTYPE", None)
    assert directory == place.release_path
    assert set(environ) == {"PATH", "HOME", "LANG", "MODE", "DEPLOY_HOOK", *place.variables()}
    assert (environ["DEPLOY_HOOK"], environ["DEPLOY_VERSION"], environ["LANG"]) == ("pre_activate", "1.1", "C")
    assert environ["MODE"].encode("utf-8", "surrogateescape").decode() == "blue ä"
    assert session.console.lines == results[0].tail


@pytest.mark.parametrize("lines", [5, 60, 2000])
def test_a_flood_of_lines_is_shown_up_to_a_limit_and_at_its_end(place, lines, monkeypatch):
    """Else ten minutes of `yes` fill the disk with log, and memory with what -q holds back."""
    monkeypatch.setattr(deploy, "SHOWN_BYTES", 10 * (deploy.SHOWN_LINE_BYTES + 4))
    script(place, "flood", f"for number in range({lines}): print('%04d' % number)")
    session, results = run(place, "./flood")
    said = session.console.lines
    assert said[:5] == ["0000", "0001", "0002", "0003", "0004"] and said[-1] == f"{lines - 1:04d}"
    assert len(said) == (lines if lines < 10 else 10 + 1 + deploy.OUTPUT_TAIL_LINES)
    assert lines < 10 or said[10] == "... too much output: here is its end ..."
    assert results[0].tail[-1] == said[-1]


def test_commands_run_in_order_until_one_fails(place):
    script(place, "note", "import sys; open('notes', 'a').write(sys.argv[1]); print('said', sys.argv[1]); sys.exit(int(sys.argv[2]))")
    with pytest.raises(deploy.StepFailed) as caught:
        run(place, "./note a 0\n./note 'b b' 3\n./note c 0")
    with open(place.release_path + "/notes") as stream:
        assert stream.read() == "ab b"
    failed = caught.value
    assert failed.message == (f"hook pre_activate failed: ./note 'b b' 3 exited with code 3 in {place.release_path}: said b b")
    assert failed.evidence["exit_code"] == 3 and failed.evidence["output"] == ["said b b"] and failed.hint


def test_a_hook_without_commands_does_nothing(place):
    assert run(place, "")[1] == []


def test_a_hook_that_hangs_is_killed(place):
    script(place, "hang", "import time; print('waiting', flush=True); time.sleep(60)")
    started = time.monotonic()
    with pytest.raises(deploy.StepFailed, match="timed out") as caught:
        run(place, "./hang", "hooks.timeout=1s")
    assert time.monotonic() - started < 50
    # A slow interpreter may not get as far as its first word.
    assert caught.value.evidence["output"] in (["waiting"], []) and caught.value.evidence["timed_out"]
    assert "timeout" in caught.value.hint


@pytest.mark.parametrize("command", ["./none", "no-such-program-here", "/etc/passwd", "./unknown"])
def test_a_program_that_cannot_start_says_why(place, command):
    script(place, "unknown", "")
    with open(place.release_path + "/unknown", "w") as stream:
        stream.write("#!/no/such/interpreter\n")
    with pytest.raises(deploy.StepFailed, match="cannot start") as caught:
        run(place, command)
    assert caught.value.evidence["exit_code"] == 127 and "chmod +x" in caught.value.hint


def test_a_signal_interrupts_a_hook(place):
    script(place, "hang", "import time; print('up', flush=True); time.sleep(60)")
    session = session_with("hooks.pre_stage=./hang")
    up = threading.Event()
    session.console.output = lambda line: up.set()
    handlers = {number: signal.getsignal(number) for number in session.interrupts.SIGNALS}
    session.interrupts.install()
    threading.Thread(target=lambda: (up.wait(50), os.kill(os.getpid(), signal.SIGTERM)), daemon=True).start()
    try:
        with pytest.raises(deploy.Interrupted):
            run_hook(session, "pre_stage", place)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can run a hook as somebody else")
def test_run_as_changes_the_user_and_its_home(place):
    nobody = pwd.getpwnam("nobody")
    if not os.access("/usr/bin/env", os.X_OK):
        pytest.skip("env is not here")
    session = session_with("hooks.pre_activate=/usr/bin/env\n/usr/bin/id -u", "hooks.run_as=nobody")
    # Not in the release: pytest's own directories are closed to others.
    environ, uid = run_hook(session, "pre_activate", place)
    assert f"HOME={nobody.pw_dir}" in environ.tail and uid.tail == [str(nobody.pw_uid)]


def test_run_as_an_unknown_user_is_a_usage_error(place):
    with pytest.raises(deploy.UsageError, match="nosuchuserhere"):
        run(place, "true", "hooks.run_as=nosuchuserhere")


# -- templates ---------------------------------------------------------------

VALUES = {"a": "1", "name.with-dots": "2", "loop": "${a}", "_x9": "3"}


@pytest.mark.parametrize("text, expected", [
    ("${a}", "1"), ("x${a}y${a}z", "x1y1z"), ("${name.with-dots}", "2"), ("${_x9}", "3"), ("${loop}", "${a}"),
    ("$${a}", "${a}"), ("$${nosuch}", "${nosuch}"), ("$$${a}", "$${a}"), ("$", "$"), ("$a $1 $$ $(a)", "$a $1 $$ $(a)"),
    ("${}", "${}"), ("${ a }", "${ a }"), ("${1}", "${1}"), ("${a", "${a"), ("${a:-b}", "${a:-b}"), ("", ""),
    ("\\1 \\g<0>", "\\1 \\g<0>"),
])
def test_render_template(text, expected):
    assert deploy.render_template(text, VALUES, "t") == expected


def test_every_unresolved_name_is_told():
    with pytest.raises(deploy.StepFailed) as caught:
        deploy.render_template("${no1}\n${a}\n${no2} $${no3}\n${no1}", VALUES, "app.conf")
    assert caught.value.message == "app.conf: no value for ${no1}, ${no2}"
    assert "$${name}" in caught.value.hint


