"""Configuration: where each value comes from, and what is said about a wrong one."""

import gzip
import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import pytest

from archives import header
from support import (
    App, DEPLOY, Result, described, file, free_port, load_deploy, make_artifact, make_tar, needs, run_deploy, tree_members, write_checksum)

deploy = load_deploy()


def write(path: Path, text: str) -> Path:
    """Write a configuration file, making its directory."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def config_of(*args: Any, **options: Any) -> Dict[str, Dict[str, str]]:
    """What `deploy.py config` shows: {"section.key": {"value", "origin"}}."""
    found = run_deploy("config", *args, check=0, **options).data["config"]
    assert found
    return found


def refused(text: str, tmp_path: Path, **options: Any) -> Result:
    """Run with a configuration that must be refused; the error names the file."""
    path = write(tmp_path / "wrong.ini", text)
    result = run_deploy("config", config=path, check=2, **options)
    assert str(path) in result.data["error"]["message"]
    assert result.data["error"]["hint"]
    assert result.stderr.startswith("deploy.py: error: ")
    assert "Traceback" not in result.stderr
    return result


def refusal(text: str, tmp_path: Path) -> Any:
    """The error that a configuration is refused with; it names the file and has a hint."""
    path = write(tmp_path / "wrong.ini", text)
    with pytest.raises(deploy.UsageError) as caught:
        deploy.load_settings([str(path)], {}, [])
    assert str(path) in caught.value.message and caught.value.hint
    return caught.value


# -- precedence and origins --------------------------------------------------

LAYERS = [
    # id, in the first file, in the second file, environment, --set, flag, what wins, its origin
    ("default", None, None, None, None, None, "0s", "default"),
    ("file", "1s", None, None, None, None, "1s", "{first}"),
    ("later-file", "1s", "2s", None, None, None, "2s", "{second}"),
    ("environment-over-files", "1s", "2s", "3s", None, None, "3s", "environment DEPLOY_DEPLOY_LOCK_WAIT"),
    ("set-over-environment", "1s", "2s", "3s", "4s", None, "4s", "command line (--set)"),
    ("flag-over-environment", "1s", "2s", "3s", None, "5s", "5s", "command line"),
    ("environment-over-default", None, None, "3s", None, None, "3s", "environment DEPLOY_DEPLOY_LOCK_WAIT"),
    ("flag-over-file", "1s", None, None, None, "5s", "5s", "command line"),
]


@pytest.mark.parametrize("name,first,second,env,assigned,flag,value,origin", LAYERS, ids=[layer[0] for layer in LAYERS])
def test_a_later_layer_wins_and_config_says_which(
        name: str, first: Optional[str], second: Optional[str], env: Optional[str], assigned: Optional[str],
        flag: Optional[str], value: str, origin: str, tmp_path: Path) -> None:
    paths = {}
    args = []  # type: List[Any]
    for which, text in (("first", first), ("second", second)):
        paths[which] = write(tmp_path / f"{which}.ini", f"[deploy]\nlock_wait = {text}\n" if text else "[deploy]\n")
        args += ["-c", paths[which]]
    args += ["--set", f"deploy.lock_wait={assigned}"] if assigned else []
    args += ["--wait-lock", flag] if flag else []
    found = config_of(*args, env={"DEPLOY_DEPLOY_LOCK_WAIT": env})["deploy.lock_wait"]
    assert found == {"value": value, "origin": origin.format(**paths)}


def test_files_are_merged_key_by_key(tmp_path: Path) -> None:
    first = write(tmp_path / "a.ini", "[deploy]\nkeep_releases = 3\nmin_free = 1M\n[env]\nA = 1\nB = 1\n")
    second = write(tmp_path / "b.ini", "[deploy]\nkeep_releases = 4\n[env]\nB = 2\n")
    found = config_of("-c", first, "-c", second)
    assert found["deploy.keep_releases"] == {"value": "4", "origin": str(second)}
    assert found["deploy.min_free"] == {"value": "1M", "origin": str(first)}
    assert (found["env.A"]["value"], found["env.B"]["value"]) == ("1", "2")


@pytest.mark.parametrize("argv", [
    ["-c", "{a}", "config", "-c", "{b}"], ["config", "-c", "{a}", "-c", "{b}"], ["-c", "{a}", "-c", "{b}", "config"],
    ["--config", "{a}", "config", "--config={b}"], ["--config={a}", "config", "-c", "{b}"], ["-c{a}", "config", "-c{b}"],
], ids=lambda argv: " ".join(argv))
def test_config_files_count_before_and_after_the_command(argv: List[str], tmp_path: Path) -> None:
    paths = {"a": str(write(tmp_path / "a.ini", "[deploy]\nkeep_releases = 3\nmin_free = 1M\n")),
             "b": str(write(tmp_path / "b.ini", "[deploy]\nkeep_releases = 4\n"))}
    found = run_deploy(*[word.format(**paths) for word in argv], check=0).data["config"]
    assert (found["deploy.keep_releases"]["value"], found["deploy.min_free"]["value"]) == ("4", "1M")


def test_the_last_set_wins_wherever_it_stands() -> None:
    found = run_deploy("--set", "deploy.keep_releases=7", "config", "--set", "deploy.keep_releases=8",
                       "--set=deploy.min_free=1M", check=0).data["config"]
    assert found["deploy.keep_releases"]["value"] == "8"
    assert found["deploy.min_free"]["value"] == "1M"


def test_a_winning_layer_hides_a_bad_value_below_it(tmp_path: Path) -> None:
    path = write(tmp_path / "a.ini", "[deploy]\nkeep_releases = many\n")
    run_deploy("config", config=path, check=2)
    assert config_of("--set", "deploy.keep_releases=2", config=path)["deploy.keep_releases"]["value"] == "2"


def test_what_config_shows_is_what_a_run_uses(app: App) -> None:
    app.configure("keep_releases = 9")
    for version in ("1.0", "1.1", "1.2"):
        app.deploy(version)
    shown = app.run("config", env={"DEPLOY_DEPLOY_KEEP_RELEASES": "1"}, check=0).data["config"]["deploy.keep_releases"]
    assert shown["value"] == "1"
    done = app.run("prune", env={"DEPLOY_DEPLOY_KEEP_RELEASES": "1"}, check=0).data
    assert len(done["removed"]) == 1


# -- discovery ---------------------------------------------------------------

def test_deploy_config_is_found_before_a_file_in_the_working_directory(tmp_path: Path) -> None:
    named = write(tmp_path / "named.ini", "[deploy]\nkeep_releases = 3\n")
    write(tmp_path / "here" / "deploy.ini", "[deploy]\nkeep_releases = 4\n")
    here = tmp_path / "here"
    assert config_of(cwd=here, env={"DEPLOY_CONFIG": str(named)})["deploy.keep_releases"]["value"] == "3"
    assert config_of(cwd=here)["deploy.keep_releases"]["value"] == "4"
    assert config_of("-c", named, cwd=here)["deploy.keep_releases"]["value"] == "3"


def test_a_named_file_switches_discovery_off(tmp_path: Path) -> None:
    named = write(tmp_path / "named.ini", "[deploy]\nmin_free = 1M\n")
    write(tmp_path / "deploy.ini", "[deploy]\nkeep_releases = 4\n")
    found = config_of("-c", named, cwd=tmp_path, env={"DEPLOY_CONFIG": str(tmp_path / "missing.ini")})
    assert found["deploy.keep_releases"]["origin"] == "default"


def test_a_deploy_config_that_is_missing_is_an_error(tmp_path: Path) -> None:
    missing = tmp_path / "missing.ini"
    result = run_deploy("config", env={"DEPLOY_CONFIG": str(missing)}, check=2)
    assert str(missing) in result.data["msg"]


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_etc_deploy_is_the_last_place_and_only_one_file_counts(tmp_path: Path) -> None:
    unshare = needs("unshare")
    etc, here = tmp_path / "etc", tmp_path / "here"
    write(etc / "deploy.ini", "[deploy]\nkeep_releases = 7\n")
    here.mkdir()
    fresh = not os.path.isdir("/etc/deploy")
    script = ('mount -t tmpfs none /mnt && mkdir -p /mnt/up /mnt/work /mnt/up/deploy && cp "$1/deploy.ini" /mnt/up/deploy/ && '
              'mount -t overlay none -o lowerdir=/etc,upperdir=/mnt/up,workdir=/mnt/work /etc && cd "$2" && '
              'exec "$3" "$4" --json config')

    def keep() -> Tuple[str, str]:
        done = subprocess.run([unshare, "-m", "sh", "-c", script, "sh", str(etc), str(here), sys.executable, str(DEPLOY)],
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        if done.returncode:
            pytest.skip("no overlay mount here: " + done.stderr.decode("utf-8", "replace").strip()[-120:])
        found = json.loads(done.stdout.decode("ascii"))["config"]["deploy.keep_releases"]
        return found["value"], found["origin"]

    assert keep() == ("7", "/etc/deploy/deploy.ini")
    write(here / "deploy.ini", "[deploy]\nmin_free = 1M\n")
    assert keep() == ("5", "default")
    assert fresh == (not os.path.isdir("/etc/deploy"))


def test_no_configuration_at_all_is_fine() -> None:
    found = config_of()
    assert {row["origin"] for row in found.values()} == {"default"}
    assert found["artifact.checksum"]["value"] == "required"


# -- unknown names -----------------------------------------------------------

UNKNOWN = [
    ("key", "[deploy]\nkeep_release = 3\n", "'keep_release'", "keep_releases"),
    ("section", "[artefact]\nchecksum = off\n", "[artefact]", "artifact"),
    ("case-of-key", "[deploy]\nKeep_Releases = 3\n", "'Keep_Releases'", "keep_releases"),
    ("case-of-section", "[Deploy]\nkeep_releases = 3\n", "[Deploy]", "deploy"),
    ("key-of-a-named-section", "[probe:web]\nurl = http://x/\nexpect_status = 200\n", "'expect_status'", "status"),
    ("named-section", "[probes:web]\nurl = http://x/\n", "[probes:web]", "probe"),
    ("name-missing", "[probe]\nurl = http://x/\n", "[probe]", "probe:"),
    ("empty-name", "[probe:]\nurl = http://x/\n", "[probe:]", "probe:"),
    ("star-for-a-name", "[probe:*]\nurl = http://x/\n", "[probe:*]", "probe:NAME"),
    ("empty-section", "[hook]\n", "[hook]", "hooks"),
    ("prefix-alone", "[probe:web]\nurl = http://x/\njson. = ok\n", "'json.'", "json"),
    ("name-where-none-belongs", "[deploy:web]\nroot = x\n", "[deploy:web]", "deploy"),
]


@pytest.mark.parametrize("name,text,wrong,meant", UNKNOWN, ids=[row[0] for row in UNKNOWN])
def test_an_unknown_name_is_refused_and_the_nearest_one_suggested(
        name: str, text: str, wrong: str, meant: str, tmp_path: Path) -> None:
    error = refusal(text, tmp_path)
    assert wrong in error.message
    assert re.search(rf"did you mean '{meant}", error.hint) or meant in error.hint


def test_a_name_unlike_any_other_gets_the_whole_list(tmp_path: Path) -> None:
    assert "keep_releases" in refusal("[deploy]\nxyzzy = 3\n", tmp_path).hint
    assert "artifact" in refusal("[xyzzy]\na = 3\n", tmp_path).hint


# -- bad values --------------------------------------------------------------

BAD_VALUES = [
    ("int", "deploy", "keep_releases", "many"), ("int-negative", "deploy", "keep_releases", "-1"),
    ("int-fraction", "deploy", "keep_releases", "1.5"), ("int-empty", "deploy", "keep_releases", ""),
    ("bool", "deploy", "auto_rollback", "maybe"), ("bool-empty", "deploy", "durable", ""),
    ("duration-no-unit", "deploy", "lock_wait", "30"), ("duration-unit", "deploy", "lock_wait", "3 d"),
    ("duration-negative", "hooks", "timeout", "-3s"), ("duration-word", "hooks", "timeout", "forever"),
    ("size-unit", "deploy", "min_free", "10X"), ("size-word", "limits", "max_file", "lots"),
    ("size-fraction", "limits", "max_expanded", "1.5G"), ("choice", "artifact", "checksum", "sometimes"),
    ("choice-empty", "artifact", "symlinks", ""), ("choice-case", "log", "format", "JSON"),
    ("relative-absolute", "deploy", "shared_dirs", "/var/log"), ("relative-out", "deploy", "shared_files", "../x"),
    ("relative-hidden-out", "deploy", "shared_dirs", "a/../../x"), ("relative-dot", "deploy", "shared_dirs", "."),
    ("relative-name", "deploy", "shared_dirs", "a/" + 256 * "x"), ("relative-long", "deploy", "shared_files", "x/" * 512 + "x"),
    ("port-word", "preflight", "free_ports", "http"), ("port-big", "preflight", "free_ports", "70000"),
    ("port-zero", "preflight", "free_ports", "0"), ("quotes", "hooks", "pre_stage", "echo 'open"),
    ("float", "probe:web", "backoff", "fast"), ("backwards", "probe:web", "backoff", "0.5"), ("more-than-all", "probe:web", "jitter", "2"),
    ("no-success", "probe:web", "successes", "0"), ("no-failure", "probe:web", "failures", "0"), ("status", "probe:web", "status", "ok"),
    ("status-range", "probe:web", "status", "200-99"), ("status-backwards", "probe:web", "status", "299-200"),
    ("regex", "probe:web", "body", "(open"), ("regex-negated", "probe:web", "body", "!(open"),
    ("header-regex", "probe:web", "expect_header.X", "[z"), ("when", "probe:web", "when", "during"),
    ("mode", "template:t", "mode", "0999"), ("mode-letters", "template:t", "mode", "rw-r--r--"),
    ("source-absolute", "template:t", "source", "/etc/passwd"), ("target-out", "template:t", "target", "../../x"),
    ("no-time-for-hooks", "hooks", "timeout", "0s"), ("no-time-for-a-service", "service:web", "timeout", "0ms"),
    ("no-time-for-a-try", "probe:web", "timeout", "0s"), ("no-deadline", "probe:web", "deadline", "0h"),
    ("too-long", "probe:web", "timeout", "481h"), ("for-ever", "deploy", "lock_wait", "999999999h"),
    ("regex-too-deep", "probe:web", "body", "(" * 5000), ("regex-too-often", "probe:web", "body", "a{99999999999}"),
    ("match-without-@v", "artifact", "match", "myapp.tar.gz"),
    *[("signal " + name, "service:web", "signal", name) for name in ("NOSUCH", "SIG", "9", "_DFL", "SIG_IGN", "HUP;", "")],
    *[("unit " + name, "service:web", "unit", name) for name in ("-H root@other", "../x", "--help", "*.service")],
    ("action", "service:web", "action", "bounce"), ("service-command", "service:web", "command", "sh -c 'x"),
]
UNFIT = {"url": "url = x\n", "connect": "url = http://a/\nconnect = x\n", "tcp": "tcp = a\n", "release": "command = true\nrelease = foo\n"}


@pytest.mark.parametrize("key", sorted(UNFIT))
def test_config_refuses_what_a_deployment_would_and_shows_it_all_the_same(key: str, tmp_path: Path) -> None:
    (tmp_path / "deploy.ini").write_text("[probe:web]\n" + UNFIT[key])
    result = run_deploy("-c", tmp_path / "deploy.ini", "config", check=2)
    assert "deploy.ini: [probe:web] " + key in result.data["error"]["message"]
    assert result.data["config"]["deploy.keep_releases"]["value"] == "5"


NEEDED = {"probe:web": {"url": "http://127.0.0.1/"}, "template:t": {"source": "a", "target": "b"},
          "service:web": {"command": "true"}}  # type: Dict[str, Dict[str, str]]


@pytest.mark.parametrize("name,section,key,value", BAD_VALUES, ids=[row[0] for row in BAD_VALUES])
def test_a_bad_value_is_named_with_file_section_and_key(
        name: str, section: str, key: str, value: str, tmp_path: Path) -> None:
    keys = dict(NEEDED.get(section, {}), **{key: value})
    error = refusal(f"[{section}]\n" + "".join(f"{one} = {other}\n" for one, other in keys.items()), tmp_path)
    assert f"[{section}] {key}" in error.message


@pytest.mark.parametrize("name,text,wanted", [
    ("value", "[deploy]\nkeep_releases = many\n", "[deploy] keep_releases"), ("section", "[artefact]\nx = 1\n", "[artefact]"),
    ("key", "[deploy]\nkeep = 1\n", "'keep'"), ("default", "[DEFAULT]\nroot = x\n", "DEFAULT"),
    ("syntax", "[deploy]\nroot\n", "line"), ("group", "[probe:web]\ntimeout = 3s\n", "[probe:web]"),
], ids=["value", "section", "key", "default", "syntax", "group"])
def test_a_wrong_file_ends_the_run_with_two_lines_and_exit_code_2(name: str, text: str, wanted: str, tmp_path: Path) -> None:
    assert wanted in refused(text, tmp_path).data["error"]["message"]


@pytest.mark.parametrize("how,options,origin", [
    ("set", {"args": ["--set", "deploy.min_free=x"]}, "--set"),
    ("flag", {"args": ["--wait-lock", "soon"]}, "command line"),
    ("environment", {"env": {"DEPLOY_DEPLOY_MIN_FREE": "x"}}, "DEPLOY_DEPLOY_MIN_FREE"),
    ("log-format", {"args": ["--log-format", "xml"]}, "--log-format"),
], ids=["set", "flag", "environment", "log-format"])
def test_a_bad_value_from_elsewhere_is_named_with_its_origin(how: str, options: Dict[str, Any], origin: str) -> None:
    result = run_deploy("config", *options.get("args", []), env=options.get("env"), check=2)
    assert origin in result.data["error"]["message"]
    assert result.data["error"]["hint"]


TOGETHER = {
    "header line": ("probe:web", "url = http://a/\nheader.A =\n  1\n  2"),
    "template over shared": ("template:t", "source = t\ntarget = .env\n[deploy]\nshared_files = .env"),
    "template round shared": ("template:t", "source = t\ntarget = a\n[deploy]\nshared_dirs = a/b"),
    "templates in one place": ("template:u", "source = t\ntarget = x\n[template:t]\nsource = u\ntarget = x"),
    "template in template": ("template:u", "source = t\ntarget = x/y\n[template:t]\nsource = u\ntarget = x"),
    "notify": ("notify:web", "url = http://a/\nheader.A =\n  1\n  2"),
}


@pytest.mark.parametrize("name", sorted(TOGETHER))
def test_what_could_only_fail_later_is_refused_before_anything(name: str, app: App) -> None:
    section, text = TOGETHER[name]
    app.config.write_text(f"[{section}]\n{text}\n")
    error = app.run("deploy", app.artifact("1.0"), "--root", app.root, check=2).data["error"]
    assert f"{app.config}: [{section}]" in error["message"] and app.releases() == [], described(error)


def test_what_is_just_small_enough_is_handed_over(app: App) -> None:
    size = 32 * os.sysconf("SC_PAGE_SIZE") - 1
    hook = app.directory / "hook"
    hook.write_text(f"#!{sys.executable}\nimport os, sys\nassert len(os.environ['A']) == {size - 2} and len(sys.argv[1]) == {size}\n")
    hook.chmod(0o755)
    app.configure(f"durable = no\n[env]\nA = {'x' * (size - 2)}\n[hooks]\npre_stage = {hook} {'y' * size}\n")
    app.run("deploy", app.artifact("1.0"), check=0)


GROUPS = [
    ("probe-none", "[probe:web]\ntimeout = 3s\n", "[probe:web]"),
    ("probe-two", "[probe:web]\nurl = http://x/\ntcp = x:1\n", "[probe:web]"),
    ("probe-empty", "[probe:web]\n", "[probe:web] needs exactly one of url, tcp, command, service, and has none"),
    ("service-empty", "[service:web]\n", "[service:web] needs exactly one of"),
    ("template-empty", "[template:t]\n", "[template:t] needs source"),
    ("service-none", "[service:web]\naction = restart\n", "[service:web]"),
    ("service-two", "[service:web]\nunit = a.service\ncommand = true\n", "[service:web]"),
    ("template-no-source", "[template:t]\ntarget = a\n", "source"),
    ("template-no-target", "[template:t]\nsource = a\n", "target"),
]


@pytest.mark.parametrize("name,text,wanted", GROUPS, ids=[row[0] for row in GROUPS])
def test_exactly_one_of_a_group_must_be_given(name: str, text: str, wanted: str, tmp_path: Path) -> None:
    assert wanted in refusal(text, tmp_path).message


@pytest.mark.parametrize("text, told", [
    ("tcp = x:1\ncommand = true\nbody = ok\nstatus = 200\n", [f"needs exactly one of {', '.join(deploy.PROBE_KINDS)}, and has tcp and command"]),
    ("url = x:/\nconnect = x\nheader.A = a\n  b\n", ["the value of header.A", "url: the URL must", "connect: expected host:port"])])
def test_all_that_is_wrong_with_a_probe_is_told_and_nothing_else(app: App, text: str, told: List[str]) -> None:
    app.config.write_text(f"[probe:web]\n{text}")
    message = app.run("config", check=2).data["error"]["message"]
    assert message.count("[probe:web] ") == len(told) and all(f"[probe:web] {part}" in message for part in told), message


# -- habits of other formats ---------------------------------------------------

HABITS = [
    ("comment", "deploy", "root", "/srv/x   # the shop", "a comment needs a line of its own, and quotes or brackets would be part of it; write /srv/x"),
    ("semicolon", "service:web", "unit", "web.service ; the web", "write web.service"),
    ("comment-on-a-name", "deploy", "application", "shop # mine", "write shop"),
    ("commas", "deploy", "shared_dirs", "log, tmp", "expected one a line; write log and tmp on a line of its own each"),
    ("commas-in-names", "preflight", "require_commands", "git,curl", "write git and curl"),
    ("yaml", "deploy", "shared_dirs", "\n    - log\n    - tmp", "expected one a line; write log on a line of its own"),
    ("spaces-in-names", "service:web", "after", "a b", "write a and b"),
    ("brackets", "preflight", "require_files", "[/a, /b]", "write /a and /b"),
    ("bracket", "deploy", "shared_files", "['.env']", "write .env"),
    ("quotes", "deploy", "root", '"/srv/my shop"', "write /srv/my shop"),
    ("quoted-unit", "service:web", "unit", "'web.service'", "write web.service"),
    ("two-units", "service:web", "unit", "a.service, b.service", "one unit"),
    ("tilde", "deploy", "root", "~/shop", "write the path in full"), ("variable", "log", "file", "$HOME/log", "write the path in full"),
    ("variable-in-a-list", "preflight", "require_files", "/a\n  ${HOME}/b", "write the path in full"),
    ("variable-in-a-template", "template:t", "target", "$HOME/x", "write the path in full"),
    ("tilde-in-a-glob", "artifact", "allow_links", "~/.cache/*", "write the path in full"),
    ("comment-on-a-syslog", "log", "syslog", "/dev/log # here", "write /dev/log"),
    ("lines", "deploy", "root", "/srv/a\n  /srv/b", "expected one line"),
]


@pytest.mark.parametrize("name,section,key,value,right", HABITS, ids=[row[0] for row in HABITS])
def test_what_another_format_would_take_is_refused_with_the_right_form(
        name: str, section: str, key: str, value: str, right: str, tmp_path: Path) -> None:
    error = refusal(f"[{section}]\n{key} = {value}\n", tmp_path)
    assert f"[{section}] {key} = " in error.message and right in error.message


@pytest.mark.parametrize("section,right", [
    ("[probe:web]\ntcp = unix:/run/web.sock # the web", "write /run/web.sock"),
    ("[probe:web]\nurl = http://web/\nconnect = unix:/run/$NAME", "write the path in full"),
    ("[source]\nindex = i.json\nurl = /srv/outbox # the source", "write /srv/outbox"),
    ("[source]\nindex = i.json\nurl = ~/outbox", "write the path in full")])
def test_a_path_is_held_to_the_same_where_something_else_may_stand(app: App, section: str, right: str) -> None:
    app.configure(section)
    assert right in app.run("config", check=2).data["error"]["message"]


def test_an_expression_a_url_and_a_command_may_hold_what_a_path_may_not(tmp_path: Path) -> None:
    path = write(tmp_path / "a.ini", "[probe:web]\nurl = http://127.0.0.1/~me/[1],2;#x\nbody = [a, b] # ~/x; $HOME\n"
                                     "[probe:own]\ncommand = 'test # ;' [a, b] ~x\n[vars]\nx = [1, 2] # y\n")
    assert config_of(config=path)["probe:web.body"]["value"] == "[a, b] # ~/x; $HOME"


def test_all_that_is_wrong_is_told_at_once(app: App) -> None:
    more = write(app.directory / "more.ini", "[artefact]\nx = 1\n[deploy]\nkeep_release = 3\nmin_free = lots\n")
    app.configure("[service:web]\nunit = a # b\n[service:db]\ncommand = true\nafter = nosuch\n[probe:one]\nurl = x\n[probe:two]\ntcp = a\n"
                  "[template:t]\nsource = a\ntarget = log\n[deploy:x]\n")
    app.config.write_text(app.config.read_text().replace("[deploy]\n", "[deploy]\nshared_dirs = log\n"))
    for command in (["deploy", app.artifact("1.0")], ["config"]):
        error = app.run(*command, "-c", more, "--set", "limits.max_file=x", "--set", "nonsense", check=2).data["error"]
        for part in (f"{more}: unknown section [artefact] [did you mean 'artifact'?]", f"{more}: unknown key 'keep_release' in [deploy]",
                     f"{more}: [deploy] min_free = 'lots': expected a size", f"{app.config}: [service:web] unit = 'a # b': a comment",
                     f"{app.config}: unknown section [deploy:x]", "[limits] max_file = 'x': expected a size", "--set 'nonsense': expected",
                     "[service:db] after = nosuch: there is no such", "[probe:one] url", "[probe:two] tcp",
                     "[template:t] target = log: it meets log"):
            assert part in error["message"], part
        assert error["message"].startswith("11 mistakes in the configuration: (1) ")
    assert app.releases() == []


def test_a_value_that_is_wrong_makes_no_second_mistake(tmp_path: Path) -> None:
    error = refusal("[probe:web]\ncommand = cd x\nstatus = 200\n", tmp_path)
    assert "cd is no program" in error.message and "mistakes" not in error.message
    for text in ("[probe:web]\ncommand = cd x\nstatus = 200\n", "[probe:web]\nservice = a # b\n",
                 "[notify:ops]\ntype = slack\nurl_file = a # b\n", "[policy]\napprovals = x\n",
                 "[template:t]\nsource = a\n[deploy]\nshared_dirs = log\n",
                 "[deploy]\nwritable = cache\napp_user = a # b\n", "[source]\nindex = a # b\nurl = https://h/\nchannel = x\n",
                 "[slots]\nblue = x\nunit = a@${slot}\ninclude = ${port}\nreload = true\n[probe:web]\nurl = http://h:${port}/\n"):
        found = every_mistake(text, tmp_path)
        assert "mistakes" not in found, found


def every_mistake(text: str, tmp_path: Path) -> str:
    return run_deploy("config", config=write(tmp_path / "wrong.ini", text), check=2).data["error"]["message"]


def test_a_section_with_a_wrong_value_is_looked_at_for_all_else(tmp_path: Path) -> None:
    found = every_mistake("[deploy]\nkeep_releases = x\nwritable = cache\n[policy]\nwindows = never\napprovals = 2\n"
                          "[probe:web]\ntcp = a:1\nperiod = x\nstatus = 204\nheader.X = a\n  b\n[notify:ops]\ntype = slack\nevents = nothing\n"
                          "[source]\ntimeout = x\nurl = https://h/\nchannel = a\n", tmp_path)
    for part in ("[deploy] keep_releases = 'x'", "[deploy] writable = cache needs app_user", "[policy] windows = 'never'",
                 "[policy] approvals needs approvers", "[probe:web] period = 'x'", "[probe:web] status and header mean nothing",
                 "[probe:web] the value of header.X holds a line break", "[notify:ops] events = 'nothing'", "[notify:ops] type = slack needs",
                 "[source] timeout = 'x'", "[source] channel needs"):
        assert part in found, (part, found)


# -- the file itself ---------------------------------------------------------

FILES = [
    ("default-section", "[DEFAULT]\nroot = /srv/x\n", "DEFAULT"),
    ("duplicate-key", "[deploy]\nroot = a\nroot = b\n", "root"),
    ("duplicate-section", "[deploy]\nroot = a\n[deploy]\nmin_free = 1M\n", "deploy"),
    ("no-section", "root = /srv/x\n", "line 1"),
    ("no-equals", "[deploy]\nroot\n", "line"),
    ("colon", "[deploy]\nroot: /srv/x\n", "line"),
    ("nul", "[env]\nA = x\0y\n", "NUL"), ("nul-name", "[env]\nA\0B = x\n", "NUL"),
]


@pytest.mark.parametrize("name,text,wanted", FILES, ids=[row[0] for row in FILES])
def test_a_file_that_is_not_understood_is_refused(name: str, text: str, wanted: str, tmp_path: Path) -> None:
    assert wanted in refusal(text, tmp_path).message


def test_a_file_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "latin.ini"
    path.write_bytes(b"[deploy]\napplication = caf\xe9\n")
    error = run_deploy("config", config=path, check=2).data["error"]
    assert str(path) in error["message"] and "utf-8" in error["message"]


def test_a_byte_order_mark_and_carriage_returns_are_accepted(tmp_path: Path) -> None:
    path = tmp_path / "windows.ini"
    path.write_bytes(b"\xef\xbb\xbf[deploy]\r\nkeep_releases = 3\r\n")
    assert config_of(config=path)["deploy.keep_releases"]["value"] == "3"


def test_a_missing_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    error = run_deploy("config", config=tmp_path / "none.ini", check=2).data["error"]
    assert str(tmp_path / "none.ini") in error["message"] and "ENOENT" in error["message"]


def test_a_directory_or_a_fifo_in_place_of_a_file_is_an_error_and_no_hang(tmp_path: Path) -> None:
    assert str(tmp_path) in run_deploy("config", config=tmp_path, check=2).data["error"]["message"]
    os.mkfifo(str(tmp_path / "fifo"))
    assert "fifo" in run_deploy("config", config=tmp_path / "fifo", check=2).data["error"]["message"]


def test_an_enormous_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "huge.ini"
    path.write_text("[deploy]\n" + "# padding\n" * 200000)
    assert str(path) in run_deploy("config", config=path, check=2).data["error"]["message"]


@pytest.mark.skipif(os.geteuid() != 0, reason="giving up root needs root")
def test_a_file_without_permission_is_an_error_that_says_so(tmp_path: Path) -> None:
    path = write(tmp_path / "secret.ini", "[deploy]\n")
    path.chmod(0o600)
    os.chmod(str(tmp_path), 0o755)
    # From stdin: this checkout may lie where others cannot go.
    done = subprocess.run([needs("setpriv"), "--reuid=65534", "--regid=65534", "--clear-groups", "/usr/bin/python3", "-I", "-",
                           "--json", "-c", str(path), "config"], input=DEPLOY.read_bytes(),
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd="/")
    data = json.loads(done.stdout.decode("ascii"))
    assert data["exit_code"] == 2 and "secret.ini" in data["error"]["message"]


# -- paths -------------------------------------------------------------------

def test_relative_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    config = write(tmp_path / "etc" / "my.ini", "[deploy]\nroot = ../srv\n[log]\nfile = run.log\n")
    artifact = make_artifact(tmp_path / "in", "1.0")
    (tmp_path / "elsewhere").mkdir()
    result = run_deploy("deploy", artifact, config=config, cwd=tmp_path / "elsewhere", check=0)
    assert result.data["root"] == str(tmp_path / "srv")
    assert (tmp_path / "srv" / "current" / "VERSION").read_text() == "1.0\n"
    assert (tmp_path / "etc" / "run.log").exists()
    assert os.listdir(str(tmp_path / "elsewhere")) == []


def test_a_relative_file_name_does_not_change_what_its_paths_mean(tmp_path: Path) -> None:
    write(tmp_path / "etc" / "my.ini", "[deploy]\nroot = ../srv\n")
    result = run_deploy("status", "-c", "etc/my.ini", cwd=tmp_path, check=2)
    assert result.data["root"] == str(tmp_path / "srv")


def test_each_files_paths_are_relative_to_that_file(tmp_path: Path) -> None:
    first = write(tmp_path / "a" / "x.ini", "[deploy]\nroot = srv\n")
    second = write(tmp_path / "b" / "y.ini", "[preflight]\nrequire_files =\n    one\n    two\n")
    (tmp_path / "b" / "one").write_text("1")
    (tmp_path / "b" / "two").write_text("2")
    result = run_deploy("preflight", "-c", first, "-c", second, check=0)
    assert result.data["root"] == str(tmp_path / "a" / "srv")


def test_relative_paths_on_the_command_line_and_in_the_environment_are_relative_to_the_working_directory(
        tmp_path: Path) -> None:
    config = write(tmp_path / "etc" / "my.ini", "[deploy]\nroot = srv\n")
    here = tmp_path / "here"
    here.mkdir()
    for args, env in ((["--root", "r"], {}), (["--set", "deploy.root=r"], {}), ([], {"DEPLOY_DEPLOY_ROOT": "r"})):
        assert run_deploy("status", "-c", config, *args, cwd=here, env=env, check=2).data["root"] == str(here / "r")


# -- --set -------------------------------------------------------------------

def test_set_reaches_named_sections_and_dotted_keys(tmp_path: Path) -> None:
    found = config_of("--set", "probe:web.url=http://127.0.0.1:1/a=b", "--set", "probe:web.json.data.status=ok",
                      "--set", "probe:web.header.X-One.Two=1.5", "--set", "env.A=x=y", "--set", "vars.a.b=c d ")
    assert found["probe:web.url"]["value"] == "http://127.0.0.1:1/a=b"
    assert found["probe:web.json.data.status"]["value"] == "ok"
    assert found["probe:web.header.X-One.Two"]["value"] == "1.5"
    assert found["env.A"]["value"] == "x=y"
    assert found["vars.a.b"]["value"] == "c d"


@pytest.mark.parametrize("text", ["deploy", "deploy.root", "=x", "root=x", "", ".=x"])
def test_a_malformed_set_is_refused_with_an_example(text: str) -> None:
    error = run_deploy("config", "--set", text, check=2).data["error"]
    assert error["hint"]


@pytest.mark.parametrize("text,meant", [("deploy.keep_release=3", "keep_releases"), ("artefact.checksum=off", "artifact"),
                                        ("probe:web.utl=x", "url")])
def test_an_unknown_name_in_set_is_refused_and_the_nearest_one_suggested(text: str, meant: str) -> None:
    error = run_deploy("config", "--set", text, check=2).data["error"]
    assert "--set" in error["message"] and meant in error["hint"]


# -- the environment ---------------------------------------------------------

def test_a_section_without_keys_is_declared_all_the_same(app: App) -> None:
    app.configure("[notify:ops]\n")
    message = app.run("deploy", app.artifact("1.0"), check=2).data["error"]["message"]
    assert message == f"{app.config}: [notify:ops] type = webhook needs url or url_file"
    path = write(app.directory / "more.ini", "[probe:web]\n")
    found = config_of(config=path, env={"DEPLOY_PROBE_WEB_URL": "http://127.0.0.1:1/"})
    assert found["probe:web.url"]["origin"] == "environment DEPLOY_PROBE_WEB_URL"
    assert config_of("-c", path, "--set", "probe:web.tcp=a:1")["probe:web.tcp"]["value"] == "a:1"


def test_the_environment_reaches_declared_named_sections_and_chosen_keys(tmp_path: Path) -> None:
    path = write(tmp_path / "a.ini", "[probe:web-1]\nurl = http://127.0.0.1:1/\n")
    found = config_of(config=path, env={"DEPLOY_PROBE_WEB_1_TIMEOUT": "9s", "DEPLOY_ENV_MyName": "a",
                                        "DEPLOY_VARS_Other": "b", "DEPLOY_LIMITS_MAX_FILES": "12"})
    assert found["probe:web-1.timeout"] == {"value": "9s", "origin": "environment DEPLOY_PROBE_WEB_1_TIMEOUT"}
    assert (found["env.MyName"]["value"], found["vars.Other"]["value"]) == ("a", "b")
    assert found["limits.max_files"]["value"] == "12"


def test_variables_that_hooks_are_given_are_no_options(app: App) -> None:
    # A hook that calls deploy.py again passes these on.
    env = {name: "x" for name in ("DEPLOY_ROOT", "DEPLOY_APPLICATION", "DEPLOY_RELEASE", "DEPLOY_ID", "DEPLOY_HOOK")}
    found = app.run("config", env=env, check=0).data
    assert found["root"] == str(app.root) and found["application"] == "myapp"


# -- texts -------------------------------------------------------------------

def test_the_case_of_keys_is_kept(tmp_path: Path) -> None:
    path = write(tmp_path / "a.ini", "[env]\nPath_To = 1\nPATH_TO = 2\npath_to = 3\n")
    found = config_of(config=path)
    assert [found[f"env.{key}"]["value"] for key in ("Path_To", "PATH_TO", "path_to")] == ["1", "2", "3"]


PLAIN = ["100%", "%(root)s", "${HOME}", "$HOME", "${deploy:root}", "a # b", "a ; b", "a = b : c", "'quoted'", "C:\\x"]


def test_a_value_is_taken_as_it_stands(tmp_path: Path) -> None:
    path = write(tmp_path / "a.ini", "[vars]\n" + "".join(f"X{number} = {value}\n" for number, value in enumerate(PLAIN)))
    found = config_of(config=path)
    assert [found[f"vars.X{number}"]["value"] for number in range(len(PLAIN))] == PLAIN


def test_a_value_reaches_a_hook_as_it_stands(app: App) -> None:
    app.configure("[env]\nODD = 100% ${HOME} $HOME `id` caf\u00e9\nMixedCase = yes\n[hooks]\n"
                  f"pre_activate = {sys.executable} -c \"import os; open('{app.directory}/out', 'wb').write("
                  "os.environb[b'ODD'] + b'|' + os.environb[b'MixedCase'])\"")
    app.deploy("1.0")
    assert (app.directory / "out").read_bytes().decode("utf-8") == "100% ${HOME} $HOME `id` caf\u00e9|yes"


def test_lists_take_one_item_a_line(app: App) -> None:
    (app.root / "shared").mkdir()
    (app.root / "shared" / "a b.txt").write_text("shared")
    app.configure("shared_dirs =\n    logs\n    var/my data\nshared_files = a b.txt")
    app.deploy("1.0")
    assert os.readlink(str(app.root / "current" / "logs")) == "../../shared/logs"
    assert os.path.isdir(str(app.root / "current" / "var" / "my data"))
    assert (app.root / "current" / "a b.txt").read_text() == "shared"


def test_an_item_of_a_list_can_be_commented_out(tmp_path: Path) -> None:
    path = write(tmp_path / "a.ini", "[preflight]\nrequire_commands =\n    one\n    # two\n#   three\n    four\n")
    assert config_of(config=path)["preflight.require_commands"]["value"].split(" | ") == ["one", "four"]


DURATIONS = [("500ms", True), ("3s", True), ("2m", True), ("1h", True), ("1.5s", True), ("0s", True), ("", False), ("3", False),
             ("3S", False), ("480h", True), ("481h", False), ("28800001s", False), ("s", False), ("1e3s", False), ("3 s", False), ("1h30m", False), ("\u00b2s", False)]


@pytest.mark.parametrize("text,fine", DURATIONS, ids=[row[0] or "empty" for row in DURATIONS])
def test_durations(text: str, fine: bool) -> None:
    if fine:
        assert deploy.read_value("duration", text) >= 0
    else:
        with pytest.raises(ValueError):
            deploy.read_value("duration", text)


SIZES = [("0", True), ("123", True), ("64k", True), ("64K", True), ("10M", True), ("2G", True), ("1T", True),
         ("10MB", False), ("1.5G", False), ("-1", False), ("10 M", False), ("", False)]


@pytest.mark.parametrize("text,fine", SIZES, ids=[row[0] or "empty" for row in SIZES])
def test_sizes(text: str, fine: bool) -> None:
    if fine:
        assert deploy.read_value("size", text) >= 0
    else:
        with pytest.raises(ValueError):
            deploy.read_value("size", text)


@pytest.mark.parametrize("option,beyond,within", [
    ("max_artifact", "10", "1M"), ("max_files", "3", "100"), ("max_file", "64", "1G"),
    ("max_expanded", "1k", "1G"),
])
def test_sizes_and_numbers_mean_what_they_say(option: str, beyond: str, within: str, app: App) -> None:
    artifact = app.artifact("1.0", {"big.txt": "0" * 2048})
    result = app.run("stage", artifact, "--set", f"limits.{option}={beyond}", check=4)
    assert option in result.data["error"]["message"]
    app.run("stage", artifact, "--set", f"limits.{option}={within}", check=0)


def test_the_ratio_counts_beyond_the_size_that_its_help_names(app: App) -> None:
    floor = deploy.read_value("size", re.search(r"beyond (\w+)", deploy.OPTIONS["limits"]["max_ratio"].help).group(1))  # type: ignore
    app.run("stage", app.artifact("below", {"big.txt": "0" * (32 << 20)}), "--set", "limits.max_ratio=1", check=0)
    zeros = gzip.compress(bytes(1 << 20), 9)
    data = gzip.compress(header(b"big", floor + (8 << 20))) + zeros * ((floor >> 20) + 8) + gzip.compress(bytes(1024))
    above = app.directory / "above-1.0.tar.gz"
    above.write_bytes(data)
    digest = hashlib.sha256(data).hexdigest()
    result = app.run("stage", above, "--sha256", digest, "--set", "limits.max_ratio=2", check=4)
    assert re.search("more than the .* that .limits. max_ratio allows", result.data["error"]["message"])
    app.run("stage", above, "--sha256", digest, "-n", "--set", "limits.max_ratio=200", check=0)


def test_0_is_no_limit(app: App) -> None:
    names = ("max_artifact", "max_files", "max_file", "max_expanded", "max_ratio")
    app.configure("[limits]\n" + "".join(f"{name} = 0\n" for name in names))
    app.deploy("1.0", {"big.txt": "0" * (8 << 20)})


@pytest.mark.parametrize("text,value", [("yes", True), ("no", False), ("True", True), ("off", False), ("1", True), ("0", False)])
def test_booleans(text: str, value: bool, app: App) -> None:
    artifact = app.artifact("1.0")
    plan = app.run("stage", "-n", artifact, "--set", f"deploy.durable={text}", check=0).data["plan"]
    assert any("synced to disk" in step["description"] for step in plan) is value


# -- options that are seen in what a run does --------------------------------

def test_match_says_where_the_version_stands(app: App) -> None:
    app.configure("[artifact]\nmatch = myapp-@v.tar.gz")
    assert app.deploy("2026.1-beta").data["artifact"]["version"] == "2026.1-beta"
    other = make_artifact(app.directory / "in", "3.0", name="other")
    assert "match" in app.run("deploy", other, check=4).data["error"]["message"]


def test_strip_components_drops_leading_directories(app: App) -> None:
    app.configure("[artifact]\nstrip_components = 1")
    artifact = make_tar(app.directory / "myapp-1.0.tar.gz", tree_members({"top/inner.txt": "x", "top/bin/run": file("y", 0o755)}))
    write_checksum(artifact)
    app.run("deploy", artifact, check=0)
    assert (app.root / "current" / "inner.txt").read_text() == "x"
    assert (app.root / "current" / "bin" / "run").read_text() == "y"


def test_symlinks_can_be_refused(app: App) -> None:
    app.configure("[artifact]\nsymlinks = refuse")
    assert "data" in app.deploy("1.0", check=4).data["error"]["message"]


def test_checksum_off_and_if_present_do_without_a_digest(app: App) -> None:
    artifact = app.artifact("1.0")
    artifact.with_name(artifact.name + ".sha256").unlink()
    app.run("stage", artifact, check=4)
    app.run("stage", artifact, "--set", "artifact.checksum=if-present", "--release-version", "1", check=0)
    artifact.with_name(artifact.name + ".sha256").write_text("0" * 64 + "  " + artifact.name + "\n")
    app.run("stage", artifact, "--set", "artifact.checksum=if-present", "--release-version", "2", check=4)
    app.run("stage", artifact, "--set", "artifact.checksum=off", "--release-version", "3", check=0)


def test_a_template_is_rendered_with_vars_environment_and_deploy_variables(app: App) -> None:
    app.configure("[vars]\nport = 8080\nname.with.dots = d\n[template:conf]\nsource = conf.in\ntarget = etc/app.conf\nmode = 0640")
    app.deploy("1.0", {"conf.in": "${port} ${name.with.dots} ${FROM_ENV} ${DEPLOY_VERSION} $${kept} $x"}, check=1)
    app.run("deploy", app.directory / "artifacts" / "myapp-1.0.tar.gz", env={"FROM_ENV": "env"}, check=0)
    target = app.root / "current" / "etc" / "app.conf"
    assert target.read_text() == "8080 d env 1.0 ${kept} $x"
    assert target.stat().st_mode & 0o777 == 0o640


def test_without_auto_rollback_a_failed_release_stays_live(app: App) -> None:
    app.deploy("1.0")
    app.configure("auto_rollback = no\n[hooks]\npost_activate = false")
    result = app.deploy("1.1", check=6)
    assert app.version == "1.1" and "rollback" in result.data["error"]["hint"]


def test_a_configured_port_application_and_log_are_used(app: App) -> None:
    app.configure(f"[preflight]\nfree_ports = 127.0.0.1:{free_port()}\n[log]\nfile = deploy.log\nformat = json")
    result = app.deploy("1.0")
    assert result.data["application"] == "myapp"
    lines = [json.loads(line) for line in (app.directory / "deploy.log").read_text().splitlines()]
    assert lines and all({"time", "level", "message"} <= set(line) for line in lines)


# -- secrets -----------------------------------------------------------------

SECRETS = [("env", "DB_PASSWORD"), ("env", "API_TOKEN"), ("vars", "secret"), ("vars", "SENTRY_DSN"), ("env", "AWS_SECRET_ACCESS_KEY")]


@pytest.mark.parametrize("value", ["swordfish-1", "xyz"], ids=["long", "short"])
@pytest.mark.parametrize("as_json", [True, False], ids=["json", "table"])
def test_config_masks_secrets(value: str, as_json: bool, tmp_path: Path) -> None:
    path = write(tmp_path / "a.ini", "".join(
        f"[{section}]\nPLAIN = shown-value\n" + "".join(f"{key} = {value}\n" for where, key in SECRETS if where == section)
        for section in ("env", "vars")))
    result = run_deploy("config", config=path, check=0, json=as_json)
    assert value not in result.stdout + result.stderr
    assert result.stdout.count("shown-value") == 2 and result.stdout.count("[masked]") == len(SECRETS)
    assert all(key in result.stdout for _, key in SECRETS)


def test_config_masks_what_a_url_and_a_header_carry(tmp_path: Path) -> None:
    path = write(tmp_path / "a.ini", "[probe:web]\nurl = http://me:swordfish@127.0.0.1/x?key=swordfish\n"
                                     "header.Authorization = Bearer swordfish\nheader.Accept = text/html\n")
    shown = run_deploy("config", config=path, check=0, json=False).stdout
    assert "swordfish" not in shown and "127.0.0.1/x" in shown and "text/html" in shown


def test_a_secret_in_the_environment_is_masked_wherever_it_turns_up(app: App) -> None:
    app.configure("[vars]\nURL = http://127.0.0.1/hunter22/x")
    shown = app.run("config", env={"MY_TOKEN": "hunter22"}, check=0)
    assert "hunter22" not in shown.stdout + shown.stderr


# -- what it prints ----------------------------------------------------------

def test_config_shows_section_key_value_and_origin_as_a_table(tmp_path: Path) -> None:
    path = write(tmp_path / "a.ini", "[deploy]\nkeep_releases = 3\n")
    lines = run_deploy("config", config=path, json=False, check=0).stdout.splitlines()
    assert lines[0].split() == ["SECTION", "KEY", "VALUE", "FROM"]
    assert ["deploy", "keep_releases", "3", str(path)] in [line.split() for line in lines]


def test_an_example_written_to_a_file_is_accepted(tmp_path: Path) -> None:
    text = run_deploy("config", "--example", json=False, check=0).stdout
    path = write(tmp_path / "example.ini", text)
    assert config_of(config=path).keys() == config_of().keys()
