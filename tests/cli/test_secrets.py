"""A canary in every place where a secret can enter: it comes out nowhere, whether the run ends well, badly or not at all."""

import base64
import http.server
import json
import re
import signal
import sys
import threading
from pathlib import Path
from typing import Any, Dict, Iterator, List

import pytest

from support import App, Result, Server, make_artifact, run_deploy

# One word each, so that no encoding on the way makes another of it.
CANARIES = {name: f"canary{index:02d}{name.replace(' ', '')}9f3a" for index, name in enumerate((
    "env", "environment", "auth file", "userinfo", "query", "header", "authorization", "vars", "set", "key line one",
    "key line two",
    "printed assignment", "printed bearer", "printed url", "printed query", "body assignment"))}
# What [env] hands to hooks on purpose.
GIVEN = ("env", "set", "key line one", "key line two")


class Echo:
    """An HTTP server that answers, where the live version ends in `bad`, with an error that repeats all it was told."""

    def __init__(self, version_file: Path) -> None:
        self.version_file, self.always_bad = version_file, False
        self.server = http.server.HTTPServer(("127.0.0.1", 0), self.handler())
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def handler(self) -> Any:
        """A handler class that knows this object."""
        echo = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                words = {"password": CANARIES["body assignment"], "request": self.requestline}
                body = f"{json.dumps(words)}\n{self.headers}".encode("ascii")
                self.send_response(500 if echo.bad() else 200)
                self.send_header("Set-Cookie", "session=" + CANARIES["body assignment"])
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *details: Any) -> None:
                """Keep the tests' output clean."""
        return Handler

    def bad(self) -> bool:
        """Whether what is live is ill."""
        return self.always_bad or self.version_file.exists() and self.version_file.read_text().strip().endswith("bad")


LEAK = """#!{python} -IS
import glob, json, os, signal, sys
version, hook, top = os.environ["DEPLOY_VERSION"], os.environ["DEPLOY_HOOK"], {top!r}
processes = {{}}
for path in glob.glob("/proc/[0-9]*/cmdline"):
    try:
        processes[path] = open(path, "rb").read().decode("latin-1").replace(chr(0), " ")
    except OSError:
        pass
# The starter typed the canary of --set itself, and the tests' own processes quote it.
parent = "/proc/%d/cmdline" % os.getppid()
mine = {{path: words for path, words in processes.items() if {top!r} in words and path != parent}}
seen = {{"hook": hook, "env": dict(os.environ), "processes": mine}}
try:
    seen["journal"] = open({root!r} + "/.deploy/journal.json").read()
except OSError:
    seen["journal"] = ""
with open(top + "/seen", "a") as log:
    log.write(json.dumps(seen) + chr(10))
for name in ("DB_PASSWORD", "SET_TOKEN", "TLS_PRIVATE_KEY"):
    print("given:", os.environ[name])
print("the password=" + {assignment!r})
print("> Authorization: Bearer " + {bearer!r})
print("cloning https://me:" + {url!r} + "@example.org/x.git?sig=" + {query!r}, file=sys.stderr)
sys.stdout.flush()
if version.endswith("crash") and hook == "post_activate" and not os.path.exists(top + "/killed"):
    open(top + "/killed", "w").close()
    os.kill(os.getppid(), signal.SIGKILL)
sys.exit(3 if version.endswith(hook) else 0)
"""


class Scene:
    """An application whose configuration holds every canary, of which 1.0 is live."""

    def __init__(self, app: App) -> None:
        self.app, self.echo = app, Echo(app.root / "current" / "VERSION")
        leak, auth = app.directory / "leak", app.directory / "auth"
        leak.write_text(LEAK.format(
            python=sys.executable, top=str(app.directory), root=str(app.root), assignment=CANARIES["printed assignment"],
            bearer=CANARIES["printed bearer"], url=CANARIES["printed url"], query=CANARIES["printed query"]))
        leak.chmod(0o755)
        auth.write_text(f"robot:{CANARIES['auth file']}\n")
        auth.chmod(0o600)
        hooks = "".join(f"{name} = {leak}\n" for name in ("pre_stage", "post_stage", "pre_activate", "post_activate",
                                                          "post_deploy",
                                                          "on_failure", "pre_rollback", "post_rollback"))
        base = "successes = 1\nperiod = 20ms\ndeadline = 3s\n"
        app.configure(
            f"durable = no\n[env]\nDB_PASSWORD = {CANARIES['env']}\nTLS_PRIVATE_KEY =\n  {CANARIES['key line one']}\n"
            f"  {CANARIES['key line two']}\n[hooks]\n{hooks}[vars]\nDB_PASSWORD = {CANARIES['vars']}\n"
            f"[template:t]\nsource = t\ntarget = rendered\nmode = 0600\n[service:s]\ncommand = {leak}\n"
            f"[probe:file]\nurl = http://127.0.0.1:{self.echo.port}/\nauth_file = {auth}\n"
            f"header.X-Api-Key = {CANARIES['header']}\n{base}"
            f"[probe:header]\nurl = http://127.0.0.1:{self.echo.port}/\nheader.Authorization = Bearer "
            f"{CANARIES['authorization']}\n{base}"
            f"[probe:url]\nurl = http://me:{CANARIES['userinfo']}@127.0.0.1:{self.echo.port}/?k={CANARIES['query']}\n{base}"
            f"[probe:command]\ncommand = {leak}\n{base}")
        self.outputs = []  # type: List[str]
        self.run("deploy", self.artifact("1.0"), exit_code=0)

    def artifact(self, version: str) -> Path:
        """An artifact with a template."""
        return self.app.artifact(version, {"t": "password ${DB_PASSWORD}\n"})

    def run(self, *words: Any, exit_code: int) -> None:
        """Run with -v, a log and two more canaries; everything it says is kept, once as text and once as JSON."""
        for index, log_format in enumerate(("json", "text") if words[0] in LOOKS
                                           else ("json" if len(self.outputs) % 2 else "text",)):
            result = run_deploy(
                "-v", "--debug", "--set", f"env.SET_TOKEN={CANARIES['set']}", "--log-file",
                self.app.directory / f"log.{log_format}",
                "--log-format", log_format, *words, config=self.app.config, env={"API_TOKEN": CANARIES["environment"]},
                json=exit_code >= 0 and not index)
            self.outputs.append(f"{words}: {result.stdout}\n{result.stderr}")
            assert result.exit_code == exit_code, result.describe()

    def seen(self) -> List[Dict[str, Any]]:
        """What the hooks saw."""
        return [json.loads(line) for line in (self.app.directory / "seen").read_text().splitlines()]

    def texts(self) -> Dict[str, str]:
        """Everything that could show a canary, by where it stands."""
        state = self.app.root / ".deploy"
        found = {str(path): path.read_bytes().decode("utf-8", "replace") for path in state.rglob("*") if path.is_file()}
        found.update({str(path): path.read_text() for path in self.app.directory.glob("log.*")})
        found.update({f"output {number}": text for number, text in enumerate(self.outputs)})
        for call in self.seen():
            found[f"journal in {call['hook']}"] = call["journal"]
            found[f"processes in {call['hook']}"] = json.dumps(call["processes"])
        return found


LOOKS = ("status", "releases", "history", "show", "config", "verify", "preflight", "probe")


@pytest.fixture
def scene(app: App) -> Iterator[Scene]:
    """A scene whose server stops at the end."""
    made = Scene(app)
    yield made
    made.echo.server.shutdown()
    made.echo.server.server_close()


def leaks(scene: Scene) -> List[str]:
    """Which canary stands where, with what is around it."""
    needles = dict(CANARIES)
    for user, name in (("robot", "auth file"), ("me", "userinfo")):
        needles[name + ", encoded"] = base64.b64encode(f"{user}:{CANARIES[name]}".encode("ascii")).decode("ascii")
    found = []
    for where, text in scene.texts().items():
        for name, needle in needles.items():
            position = text.find(needle)
            if position >= 0:
                found.append(f"{name} in {where}: ...{text[max(0, position - 60):position + 40]!r}")
    return found


def succeeds(scene: Scene) -> None:
    """All is well; then everything that looks, and a dry run."""
    scene.run("deploy", scene.artifact("1.1"), exit_code=0)
    scene.run("-n", "deploy", scene.artifact("1.2"), exit_code=0)
    scene.run("rollback", exit_code=0)


def hook_fails(scene: Scene) -> None:
    """Before activation."""
    scene.run("deploy", scene.artifact("1.1-pre_activate"), exit_code=1)


def hook_fails_late(scene: Scene) -> None:
    """After activation."""
    scene.run("deploy", scene.artifact("1.1-post_deploy"), exit_code=5)


def probe_fails(scene: Scene) -> None:
    """The answer of the new release repeats every secret; the old one is well again."""
    scene.run("deploy", scene.artifact("1.1-bad"), exit_code=5)


def artifact_is_refused(scene: Scene) -> None:
    """It is not what its checksum says."""
    path = scene.artifact("1.1")
    (path.parent / (path.name + ".sha256")).write_text("0" * 64 + "  " + path.name + "\n")
    scene.run("deploy", path, exit_code=4)


def crash_and_recovery(scene: Scene) -> None:
    """Killed after the switch; the journal stays, is read, and the recovery asks the services."""
    scene.run("deploy", scene.artifact("1.1-crash"), exit_code=-signal.SIGKILL)
    assert (scene.app.root / ".deploy" / "journal.json").exists() and leaks(scene) == []
    scene.run("status", exit_code=7)
    scene.run("recover", exit_code=0)


def rollback_fails(scene: Scene) -> None:
    """Neither release is well."""
    scene.echo.always_bad = True
    soon = [word for name in ("file", "header", "url", "command") for word in ("--set", f"probe:{name}.deadline=700ms")]
    scene.run("deploy", scene.artifact("1.1"), *soon, exit_code=6)


ENDS = [succeeds, hook_fails, hook_fails_late, probe_fails, artifact_is_refused, crash_and_recovery, rollback_fails]


@pytest.mark.parametrize("end", ENDS, ids=[end.__name__ for end in ENDS])
def test_no_canary_comes_out_however_the_run_ends(end: Any, scene: Scene) -> None:
    end(scene)
    broken = end is rollback_fails
    for words in (["releases"], ["history"], ["show", "2" if end is not artifact_is_refused else "1"], ["config"],
                  *([] if broken else [["status"], ["verify"], ["probe"], ["preflight"]])):
        scene.run(*words, exit_code=0)
    assert leaks(scene) == []
    text = "".join(scene.texts().values())
    assert "given: [masked]" in text and "password=[masked]" in text, "the hooks did print them"


def test_hooks_get_only_the_secrets_that_the_configuration_gives_them(scene: Scene) -> None:
    scene.run("deploy", scene.artifact("1.1-bad"), exit_code=5)
    calls = scene.seen()
    assert {"pre_stage", "post_activate", "pre_rollback", "on_failure", "probe:command"} <= {call["hook"] for call in calls}
    for call in calls:
        values = "\n".join(call["env"].values())
        got = sorted(name for name, canary in CANARIES.items() if canary in values)
        assert got == sorted(GIVEN), f"{call['hook']} was given {got}"


def test_rendered_secrets_are_where_they_belong_and_only_there(scene: Scene) -> None:
    rendered = scene.app.root / "current" / "rendered"
    assert rendered.read_text() == f"password {CANARIES['vars']}\n" and rendered.stat().st_mode & 0o777 == 0o600


def test_files_that_may_hold_something_private_are_ours_alone(scene: Scene) -> None:
    state = scene.app.root / ".deploy"
    for path in [state, *state.rglob("*")]:
        assert not path.stat().st_mode & 0o077, path
    assert not (scene.app.directory / "log.text").stat().st_mode & 0o027


# -- names, cuts and encodings ---------------------------------------------------------

def say(app: App, line: str, **options: Any) -> Result:
    """Deploy with a hook that prints a line, and fails."""
    path = app.directory / "line"
    path.write_text(line)
    app.configure(f"durable = no\n[env]\nDB_PASSWORD = {CANARIES['env']}\n[hooks]\npre_activate = /bin/sh -c 'cat {path}; "
                  f"exit 1'\n")
    return app.run("deploy", app.artifact("1.0"), "--log-file", app.directory / "log", check=1, **options)


def everything(app: App, result: Result) -> str:
    """All that a run left and said."""
    kept = [path.read_text(errors="replace") for path in (app.root / ".deploy").rglob("*") if path.is_file()]
    return "\n".join([result.stdout, result.stderr, (app.directory / "log").read_text()] + kept)


NAMES = ["PASSWORD", "db_password", "PGPASSWORD", "passwd", "API_TOKEN", "client_secret", "AWS_SECRET_ACCESS_KEY",
         "api-key", "apikey",
         "credentials", "DB_PASS", "DB_PWD", "SENTRY_DSN", "SSH_PRIVATE_KEY", "SESSION_COOKIE", "SIGNING_KEY"]


@pytest.mark.parametrize("name, form", [(name, "{}={}") for name in NAMES] + [
    ("DB_PASSWORD", form) for form in ('"{}": "{}"', "{}: {}", "export {}='{}'", "--{}={}")])
def test_what_is_assigned_to_a_name_that_looks_secret_is_masked_in_output(name: str, form: str, app: App) -> None:
    """The same names whose values are private in [env]; the value itself was never told to deploy.py."""
    result = say(app, "before " + form.format(name, "unheard0fcanary") + "\n")
    assert "unheard0fcanary" not in everything(app, result), everything(app, result).splitlines()[:3]


@pytest.mark.parametrize("line", [
    "curl --token unheard0fcanary https://x", "psql --db-password 'unheard0f canary'", "mysql -u root -punheard0fcanary shop",
    "sshpass -p unheard0fcanary ssh x", "login -punheard0fcanary", "APP_KEY=base64:unheard0fcanary",
    "got eyJhbGciOiJIUzI1NiJ9.eyJ1bmhlYXJkMGYiOjF9.unheard0fcanary", "auth: unheard0fcanary"])
def test_what_commands_are_given_as_secret_and_web_tokens_are_masked(line: str, app: App) -> None:
    text = everything(app, say(app, line + "\n"))
    assert "unheard0f" not in text and "eyJhbGc" not in text, text


def test_the_words_of_a_command_are_masked_where_they_are_kept_one_by_one(app: App) -> None:
    app.configure("durable = no\n[hooks]\npre_activate = false --token unheard0fcanary -punheard0f1 --token-file /x --verbose\n")
    result = app.run("deploy", app.artifact("1.0"), "--log-file", app.directory / "log", check=1)
    assert "unheard0f" not in everything(app, result)
    assert app.history()[-1]["failure"]["evidence"]["argv"] == \
        ["false", "--token", "[masked]", "-p[masked]", "--token-file", "/x", "--verbose"]


@pytest.mark.parametrize("line", [
    "tests_pass: 12", '"checks-pass": 3', "cat: /etc/secret.txt: No such file or directory", "secret.txt: no such file",
    "open token: permission denied", "reading tls_ca, tls_cert and tls_key: TLS: no certificate", "[probe:x] tls_key: /etc/x.pem is missing",
    "--token is required", "use --password-file /x/y", "docker run -p8080:80", "find . -print0", "author: me", "PASS: test_x", "private: true"])
def test_what_only_looks_like_an_assignment_is_shown(line: str, app: App) -> None:
    assert line in say(app, line + "\n", json=False).stderr


@pytest.mark.parametrize("line", ["tests_pass: unheard0f", "db_pass: 1234unheard0f", "tests_pass: 9unheard0f", "secret.txt:unheard0f",
                                  "token: nosuchunheard0f", "token.py: unheard0f", "token:   \"no such fileunheard0f\""])
def test_what_might_be_an_assignment_is_masked_all_the_same(line: str, app: App) -> None:
    assert "unheard0f" not in everything(app, say(app, line + "\n"))


def test_a_quoted_value_with_spaces_is_masked_to_its_end(app: App) -> None:
    result = say(app, 'config {"password": "correct horse battery", "user": "me"}\n')
    assert not re.search("horse|battery", everything(app, result))


@pytest.mark.parametrize("before", [4096 - 8, 65536 - 8])
@pytest.mark.parametrize("end", ["\n", " and more\n" + "y" * 5000], ids=["a line", "more lines"])
def test_a_known_secret_that_the_cutting_of_long_lines_cuts_in_two_is_masked(before: int, end: str, app: App) -> None:
    """Its beginning would stand at the end of one piece, and its rest at the beginning of the next."""
    result = say(app, "x" * before + CANARIES["env"] + end)
    text = everything(app, result)
    parts = [CANARIES["env"][start:start + 7] for start in range(len(CANARIES["env"]) - 6)]
    assert not [part for part in parts if part in text]


def test_a_known_secret_at_the_end_of_the_evidence_of_an_answer_is_masked(app: App) -> None:
    """An answer's start is kept as evidence; the cut may go through a secret."""
    for before in range(280, 300, 4):
        line = app.directory / "answer"
        line.write_text("x" * before + " " + CANARIES["env"])
        app.configure(f"durable = no\n[env]\nDB_PASSWORD = {CANARIES['env']}\n[probe:x]\ncommand = /bin/sh -c 'cat {line}; "
                      f"exit 1'\n"
                      "deadline = 50ms\nperiod = 20ms\n")
        result = app.run("deploy", app.artifact("1.0"), "--force", "--log-file", app.directory / "log", check=5)
        assert CANARIES["env"][:8] not in everything(app, result), f"{before} characters before it"


@pytest.mark.parametrize("rolls_back", [True, False], ids=["rolled back", "left live"])
def test_a_known_secret_in_an_answer_a_command_or_a_path_is_kept_nowhere(rolls_back: bool, app: App, server: Server) -> None:
    server.body = json.dumps({"status": CANARIES["env"]}).encode()
    app.deploy("1.0")
    artifact = make_artifact(app.directory / CANARIES["env"], "1.1")
    for deadline in ("500ms", "10s"):
        app.configure(f"durable = no\nauto_rollback = {'yes' if rolls_back else 'no'}\n[env]\nDB_PASSWORD = {CANARIES['env']}\n"
                      f"[probe:x]\nurl = {server.url}\njson.status = ok\nsuccesses = 1\nperiod = 20ms\ndeadline = {deadline}\n"
                      f"[hooks]\npost_deploy = true {CANARIES['env']}\n"
                      f"pre_rollback = cp {app.root}/.deploy/journal.json {app.directory}/journal\n")
        result = app.run("deploy", artifact, "--force", "--log-file", app.directory / "log", check=6)
        text = everything(app, result) + ((app.directory / "journal").read_text() if rolls_back else "")
        if "json status is" in text:
            break  # else the host was so busy that no answer came in time
    assert CANARIES["env"] not in text and "json status is '[masked]'" in text


def test_what_a_probe_is_going_to_send_is_masked_before_it_has_been_sent(app: App) -> None:
    """A hook that runs before any probe may print it: `curl -v` does."""
    auth = app.directory / "auth"
    auth.write_text(f"Bearer {CANARIES['auth file']}\n")
    auth.chmod(0o600)
    app.configure(f"durable = no\n[hooks]\npre_activate = /bin/sh -c 'cat {auth}; echo user {CANARIES['userinfo']}; echo "
                  f"sent {CANARIES['query']}; "
                  f"exit 1'\n[probe:x]\nurl = http://127.0.0.1:9/\nauth_file = {auth}\n"
                  f"[probe:y]\nurl = http://me:{CANARIES['userinfo']}@127.0.0.1:9/?k={CANARIES['query']}\n")
    result = app.run("deploy", app.artifact("1.0"), "--log-file", app.directory / "log", check=1)
    text = everything(app, result)
    assert [name for name in ("auth file", "userinfo", "query") if CANARIES[name] in text] == []


@pytest.mark.parametrize("text", [
    "[env]\nDB_PASSWORD {}\n", "[env]\nDB_PASSWORD = x\n {} [\n=\n", "DB_PASSWORD = {}\n[env]\n",
    "[env]\nDB_PASSWORD = a\nDB_PASSWORD = {}\n",
    "[env]\nDB_PASSWORD = {}\n[nonsense]\nx = 1\n", "[env]\nDB_PASSWORD = {}\n[hooks]\ntimeout = soon\n",
    "[probe:x]\nurl = http://u:{}@h:port:/\n", "[probe:x]\nurl = http://u:{}@h/\nheader.Authorization = Bearer {}\nstatus "
                                               "= nonsense\n"],
    ids=["no =", "no = in a continuation", "no section", "twice", "unknown section", "a bad value", "a bad url",
         "a bad status"])
@pytest.mark.parametrize("words", [["status"], ["deploy", "/nowhere.tar.gz"]], ids=["status", "deploy"])
def test_a_mistake_in_the_configuration_does_not_show_the_secret_beside_it(words: List[str], text: str, app: App) -> None:
    app.configure("")
    with app.config.open("a") as config:
        config.write(text.format(*[CANARIES["env"]] * text.count("{}")))
    for json_wanted in (True, False):
        result = run_deploy("--debug", *words, config=app.config, json=json_wanted)
        shown = result.stdout + result.stderr
        assert CANARIES["env"] not in shown, shown[:500]


@pytest.mark.parametrize("words", [
    ["--sett", "env.DB_PASSWORD={}", "status"], ["status", "--set=env.DB_PASSWORD={}", "--bogus"],
    ["status", "--set", "nothing.DB_PASSWORD={}"],
    ["status", "--set", "env.DB_PASSWORD:{}"], ["deploy", "https://u:{}@h/a.tar.gz?sig={}"],
    ["probe", "--url", "http://u:{}@127.0.0.1:9/?k={}"]],
    ids=lambda words: " ".join(words)[:30])
def test_a_mistake_on_the_command_line_does_not_show_the_secret_in_it(words: List[str], app: App) -> None:
    for json_wanted in (True, False):
        result = run_deploy("--debug", *[word.replace("{}", CANARIES["set"]) for word in words], root=app.root,
                            json=json_wanted)
        shown = result.stdout + result.stderr
        assert result.exit_code != 0 and CANARIES["set"] not in shown, shown[:500]


@pytest.mark.parametrize("name, shown", [("PLAIN", True), ("DB_PASSWORD", False)],
                         ids=["unmarked, by design not masked", "marked"])
def test_only_what_is_marked_as_secret_can_be_masked_in_a_hooks_output(name: str, shown: bool, app: App) -> None:
    """A value whose name says nothing and that is printed bare is not known to be private: by design it is shown."""
    app.configure(f"durable = no\n[env]\n{name} = bare0value\n[hooks]\npre_activate = /bin/sh -c 'echo it is ${name}; exit "
                  f"1'\n")
    result = app.run("deploy", app.artifact("1.0"), "--log-file", app.directory / "log", check=1)
    assert ("bare0value" in everything(app, result)) is shown


def test_a_secret_of_fewer_than_four_characters_is_by_design_not_masked_by_value(app: App) -> None:
    """It would blot out half of every sentence; its name still masks it where it is assigned."""
    app.configure("durable = no\n[env]\nDB_PASSWORD = q7z\n[hooks]\npre_activate = /bin/sh -c 'echo bare q7z; echo "
                  "password=q7z; exit 1'\n")
    text = everything(app, app.run("deploy", app.artifact("1.0"), "--log-file", app.directory / "log", check=1))
    assert "bare q7z" in text and "password=q7z" not in text


@pytest.mark.parametrize("line", [
    "token." * 4000, "_key-" * 4000, "a-" * 8000, "x" * 20000 + "http://a?b=c", "eyJ" * 10000, "eyJ." * 8000, "mysql " * 5000,
    " -p1a" * 6000, "--token " * 4000], ids=["names", "half names", "dashes", "scheme", "web tokens", "half web tokens", "mysql", "-p", "options"])
def test_a_long_line_that_looks_like_secrets_takes_no_time(line: str, app: App) -> None:
    path = app.directory / "line"
    path.write_text(line + "\n")
    app.configure(f"[hooks]\npre_activate = cat {path}\ntimeout = 5s\n")
    app.run("deploy", app.artifact("1.0"), check=0, timeout=20)


def test_half_a_secret_is_not_shown_where_characters_take_several_bytes(app: App) -> None:
    script = app.directory / "say"
    script.write_text(f"#!{sys.executable}\nimport sys, time\nout = sys.stdout.buffer\nout.write('{chr(0x20ac)}'.encode('utf-8') "
                      "* 2726 + b' SuperSecretVal'); out.flush(); time.sleep(0.3); out.write(b'ue123\\n'); sys.exit(1)\n")
    script.chmod(0o755)
    app.configure(f"durable = no\n[env]\nAPI_TOKEN = SuperSecretValue123\n[hooks]\npre_activate = {script}\n")
    text = everything(app, app.run("deploy", app.artifact("1.0"), "--log-file", app.directory / "log", check=1))
    assert "SuperSecret" not in text


def test_the_decoded_form_of_a_query_value_is_masked_as_well(app: App) -> None:
    app.configure("durable = no\n[probe:p]\nurl = http://me:p%40ssw0rd@127.0.0.1:9/?sig=ab%2Bcd%2Fef0123\ndeadline = 100ms\n"
                  "[hooks]\npre_activate = /bin/sh -c 'echo ab+cd/ef0123 p@ssw0rd; exit 1'\n")
    text = everything(app, app.run("deploy", app.artifact("1.0"), "--log-file", app.directory / "log", check=1))
    assert "ab+cd/ef0123" not in text.replace("echo ab+cd/ef0123", "") and "[masked] [masked]" in text


def test_the_path_of_a_probe_is_shown_also_beside_a_notifier_of_its_name(app: App) -> None:
    app.configure("[probe:web]\nurl = http://127.0.0.1:1/a-long-health-path\n"
                  "[notify:web]\ntype = slack\nurl = https://127.0.0.1:1/a-long-secret-path")
    shown = app.run("config", check=0).data["config"]
    assert shown["probe:web.url"]["value"] == "http://127.0.0.1:1/a-long-health-path"
    assert "secret" not in shown["notify:web.url"]["value"]
