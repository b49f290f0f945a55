"""What outlives releases, and what is rendered into them."""

import os
import stat
import subprocess
from typing import Any, Dict

import pytest

from crashes import inconsistencies, content
from support import (App, application_tree, described, directory, file, link, make_tar, open_to_others, run_as_another, tree_members,
                     write_checksum)

# -- shared ------------------------------------------------------------------------

SHARED = ("shared_dirs =\n  uploads\n  var/cache/pages\nshared_files =\n  .env\n  config/secrets.yml\n")


def put_shared_files(app: App) -> None:
    """Make the shared files, as an operator does before the first deployment."""
    for name, text in ((".env", "MODE=live\n"), ("config/secrets.yml", "a: b\n")):
        path = app.root / "shared" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_shared_paths_are_relative_links_that_resolve(app: App) -> None:
    app.configure(SHARED)
    put_shared_files(app)
    app.deploy("1.0")
    for name in ("uploads", "var/cache/pages", ".env", "config/secrets.yml"):
        path, target = app.root / "current" / name, app.root / "shared" / name
        assert path.is_symlink() and not os.path.isabs(os.readlink(str(path)))
        assert path.resolve() == target.resolve() and path.exists()
    assert (app.root / "current" / ".env").read_text() == "MODE=live\n"
    assert (app.root / "shared" / "var" / "cache" / "pages").is_dir()
    # A root that is moved as a whole keeps working.
    app.root.rename(app.directory / "moved")
    assert (app.directory / "moved" / "current" / "config" / "secrets.yml").read_text() == "a: b\n"


def test_shared_links_belong_to_the_release(app: App) -> None:
    app.configure(SHARED)
    put_shared_files(app)
    app.deploy("1.0")
    app.run("verify", check=0)
    (app.root / "current" / "uploads" / "new").write_text("written by the application\n")
    app.run("verify", check=0)
    (app.root / "current" / ".env").unlink()
    (app.root / "current" / ".env").write_text("")
    differences = app.run("verify", check=7).data["differences"]
    assert [text.split(" (")[0] for text in differences["changed"] + differences["missing"]] == [".env"]


@pytest.mark.parametrize("name", [".env", "config/secrets.yml"])
@pytest.mark.parametrize("instead", ["missing", "directory"])
def test_a_shared_file_that_is_not_there_is_refused_and_never_invented(app: App, name: str, instead: str) -> None:
    app.deploy("1.0")
    app.configure(SHARED)
    put_shared_files(app)
    (app.root / "shared" / name).unlink()
    if instead == "directory":
        (app.root / "shared" / name).mkdir()
    before = content(app.root)
    result = app.run("deploy", app.artifact("1.1"), check=3)
    assert f"shared/{name}" in result.data["error"]["message"] and f"shared/{name}" in result.data["error"]["hint"]
    assert "or no file" in result.data["error"]["message"], "a directory is there"
    assert content(app.root) == before


def test_every_missing_shared_file_is_named_at_once(app: App) -> None:
    app.configure(SHARED)
    result = app.run("deploy", app.artifact("1.0"), check=3)
    assert "shared/.env" in result.data["error"]["message"] and "shared/config/secrets.yml" in result.data["error"]["message"]
    assert app.releases() == []


@pytest.mark.parametrize("own", [
    {"uploads/keep": "of the artifact", "uploads/deep/er": "x", ".env": "sample"},
    {"uploads": "a file", ".env": directory(), ".env/x": "x"},
    {"uploads": link("lib"), ".env": link("VERSION")},
    {"uploads": directory(0o555), ".env": file("x", 0o400)},
], ids=["same kinds", "other kinds", "links", "read-only"])
def test_the_artifacts_own_copy_is_replaced(app: App, own: Dict[str, Any]) -> None:
    app.configure(SHARED)
    put_shared_files(app)
    result = app.deploy("1.0", own)
    for name in ("uploads", ".env"):
        assert os.readlink(str(app.root / "current" / name)) == "../../shared/" + name
    assert (app.root / "shared" / ".env").read_text() == "MODE=live\n" and os.listdir(str(app.root / "shared" / "uploads")) == []
    step = [step for step in result.data["steps"] if step["name"] == "shared"][0]
    assert "uploads" in step["detail"] and ".env" in step["detail"], "the operator is not told what was replaced"
    app.run("verify", check=0)
    if isinstance(own.get("uploads"), type(link("x"))) and own["uploads"].link:
        # What the replaced link pointed to is not what was meant.
        assert (app.root / "current" / "lib" / "nested" / "data.txt").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_links_and_templates_may_lie_in_a_directory_that_the_artifact_closes() -> None:
    with open_to_others() as app:
        app.configure("shared_dirs = ro/log\n[vars]\na = b\n[template:conf]\nsource = ro/conf.in\ntarget = ro/conf")
        tree = dict(application_tree("1.0"), **{"ro": directory(0o555), "ro/conf.in": "a is ${a}"})
        artifact = make_tar(app.directory / "myapp-1.0.tar", tree_members(tree))
        write_checksum(artifact)
        data = run_as_another(app, "deploy", artifact)
        assert data["exit_code"] == 0, described(data)
        place = app.root / "current" / "ro"
        assert stat.S_IMODE(place.stat().st_mode) == 0o555 and (place / "conf").read_text() == "a is b"
        assert run_as_another(app, "verify")["exit_code"] == 0
        assert run_as_another(app, "deploy", artifact, "--force")["exit_code"] == 0


def test_rollback_keeps_what_is_shared(app: App) -> None:
    app.configure(SHARED)
    put_shared_files(app)
    app.deploy("1.0")
    app.deploy("1.1")
    (app.root / "current" / "uploads" / "photo").write_text("of a user\n")
    (app.root / "shared" / ".env").write_text("MODE=changed\n")
    app.run("rollback", check=0)
    assert (app.root / "current" / "uploads" / "photo").read_text() == "of a user\n"
    assert (app.root / "current" / ".env").read_text() == "MODE=changed\n"
    app.configure(SHARED + "keep_releases = 1\n")
    for version in ("1.2", "1.3", "1.4"):
        app.deploy(version)
    assert (app.root / "shared" / "uploads" / "photo").read_text() == "of a user\n", "pruning followed a shared link"


def test_a_release_from_before_the_rollback_needs_no_shared_file(app: App) -> None:
    app.deploy("1.0")
    app.configure(SHARED)
    put_shared_files(app)
    app.deploy("1.1")
    (app.root / "shared" / ".env").unlink()
    app.run("rollback", check=0)
    assert app.version == "1.0"


@pytest.mark.parametrize("path", ["../outside", "/etc", "a/../../b", ".", "x/../.."])
def test_a_shared_path_that_leaves_the_release_is_a_usage_error(app: App, path: str) -> None:
    app.configure(f"shared_dirs =\n  ok\n  {path}\n")
    result = app.run("deploy", app.artifact("1.0"))
    assert result.exit_code == 2 and "shared_dirs" in result.data["error"]["message"], result.describe()
    assert not (app.directory / "outside").exists()


@pytest.mark.parametrize("tree", [{"lib": link("bin")}, {"sub/lib": link("../bin")}, {"lib": "a file"}],
                         ids=["a link", "a nested link", "a file"])
@pytest.mark.parametrize("kind", ["shared", "template"])
def test_a_path_through_the_artifacts_own_link_is_refused(app: App, tree: Dict[str, Any], kind: str) -> None:
    app.deploy("1.0")
    where = "sub/lib/deep/target" if "sub/lib" in tree else "lib/deep/target"
    app.configure(f"shared_dirs = {where}\n" if kind == "shared" else f"[template:x]\nsource = VERSION\ntarget = {where}\n")
    base = {"lib/nested/data.txt": None, "data": link("VERSION")}  # type: Dict[str, Any]
    entries = {name: spec for name, spec in application_tree("1.1").items() if not name.startswith("lib/") and name not in base}
    path = app.directory / "artifacts" / "myapp-1.1.tar.gz"
    make_tar(path, tree_members(dict(entries, **tree)))
    write_checksum(path)
    result = app.run("deploy", path)
    assert result.exit_code == 1, result.describe()
    assert where.rpartition("/deep")[0] in result.data["error"]["message"] and result.data["error"]["hint"]
    assert inconsistencies(app, ["1.0"]) == []


# -- templates -----------------------------------------------------------------------

def configure_template(app: App, rest: str = "", mode: str = "") -> None:
    """One template, app.conf.in to etc/app.conf."""
    app.configure(f"[template:conf]\nsource = app.conf.in\ntarget = etc/app.conf\n{mode and 'mode = ' + mode}\n{rest}")


def rendered(app: App) -> str:
    """What became of it."""
    return (app.root / "current" / "etc" / "app.conf").read_text()


def test_placeholders_come_from_vars_the_environment_and_the_deployment(app: App) -> None:
    configure_template(app, "[vars]\nPORT = 8080\nBOTH = of vars\nDEPLOY_ID = of vars\nNAME = with = signs; and ${PORT}\n")
    first = app.run("deploy", app.artifact("0.9", {"app.conf.in": ""}), check=0).data["release"]
    text = ("port ${PORT}\n${BOTH}|${FROM_ENV}|${DEPLOY_ID}|${NAME}\n${DEPLOY_APPLICATION} ${DEPLOY_VERSION} ${DEPLOY_RELEASE}\n"
            "${DEPLOY_ROOT} ${DEPLOY_CURRENT_PATH} ${DEPLOY_SHARED_PATH} ${DEPLOY_RELEASE_PATH} ${DEPLOY_PREVIOUS_RELEASE}\n"
            "$${PORT} $PORT $ $$ ${ ${} $$${PORT} caf\u00e9\r\n")
    result = app.run("deploy", app.artifact("1.0", {"app.conf.in": text}), check=0,
                     env={"FROM_ENV": "of the environment", "BOTH": "of the environment", "PORT": "1", "DEPLOY_VERSION": "of the environment"})
    release = result.data["release"]
    expected = (f"port 8080\nof vars|of the environment|of vars|with = signs; and ${{PORT}}\nmyapp 1.0 {release}\n"
                f"{app.root} {app.root}/current {app.root}/shared {app.root}/releases/{release} {first}\n"
                "${PORT} $PORT $ $$ ${ ${} $${PORT} caf\u00e9\r\n")
    with (app.root / "current" / "etc" / "app.conf").open(encoding="utf-8", newline="") as stream:
        assert stream.read() == expected
    app.run("verify", check=0)
    manifest = (app.root / ".deploy" / "manifests" / release).read_text()
    assert "etc/app.conf" in manifest


@pytest.mark.parametrize("command", ["deploy", "stage"])
def test_unresolved_placeholders_are_all_named_and_nothing_changes(app: App, command: str) -> None:
    app.deploy("1.0")
    configure_template(app, "[vars]\nKNOWN = 1\n")
    before = content(app.root / "releases")
    text = "${ONE}\n${KNOWN} ${TWO}\n$${THREE}\n"
    result = app.run(*(command.split() + [app.artifact("1.1", {"app.conf.in": text})]))
    assert result.exit_code == 1, result.describe()
    message = result.data["error"]["message"]
    assert "${ONE}" in message and "${TWO}" in message and "KNOWN" not in message and "THREE" not in message
    assert "app.conf.in" in message and "[vars]" in result.data["error"]["hint"]
    assert content(app.root / "releases") == before and app.version == "1.0" and app.leftovers() == []


def test_a_template_that_is_not_in_the_artifact_is_refused(app: App) -> None:
    configure_template(app)
    result = app.run("deploy", app.artifact("1.0"))
    assert result.exit_code == 1 and "app.conf.in" in result.data["error"]["message"]
    assert app.releases() == []


@pytest.mark.parametrize("mode", ["0600", "0640", "0644", "0755", "0660", "0664"])
def test_the_result_has_the_configured_mode(app: App, mode: str) -> None:
    configure_template(app, mode=mode)
    app.deploy("1.0", {"app.conf.in": "x\n"})
    found = stat.S_IMODE(os.stat(str(app.root / "current" / "etc" / "app.conf")).st_mode)
    assert f"{found:04o}" == mode
    app.run("verify", check=0)


def test_without_a_mode_the_result_can_be_read_by_the_application(app: App) -> None:
    configure_template(app)
    app.deploy("1.0", {"app.conf.in": file("x\n", 0o600)})
    assert stat.S_IMODE(os.stat(str(app.root / "current" / "etc" / "app.conf")).st_mode) == 0o644


@pytest.mark.parametrize("own", [
    {"etc/app.conf": file("a much longer sample than the result\n", 0o600)},
    {"etc/app.conf": link("../VERSION")},
    {"etc/app.conf": file("read-only\n", 0o400), "etc": directory(0o555)},
], ids=["a file", "a link", "read-only"])
def test_the_target_may_replace_what_the_artifact_brought(app: App, own: Dict[str, Any]) -> None:
    configure_template(app)
    app.deploy("1.0", dict(own, **{"app.conf.in": "new\n"}))
    assert rendered(app) == "new\n" and not (app.root / "current" / "etc" / "app.conf").is_symlink()
    assert (app.root / "current" / "VERSION").read_text() == "1.0\n"
    app.run("verify", check=0)


def test_a_template_may_be_its_own_target_and_a_shared_file_stays_untouched(app: App) -> None:
    app.configure("shared_files = .env\n[template:x]\nsource = VERSION\ntarget = VERSION\n")
    put_shared_files(app)
    app.deploy("1.0", {"VERSION": "${DEPLOY_VERSION}\n"})
    assert app.version == "1.0" and (app.root / "shared" / ".env").read_text() == "MODE=live\n"


def test_a_template_that_targets_a_shared_file_never_writes_through_the_link(app: App) -> None:
    app.configure("shared_files = .env\n[template:x]\nsource = VERSION\ntarget = .env\n")
    put_shared_files(app)
    app.run("deploy", app.artifact("1.0"))
    assert (app.root / "shared" / ".env").read_text() == "MODE=live\n"


def test_values_never_show_in_any_output(app: App) -> None:
    secret = "correct-horse-battery"
    configure_template(app, f"[vars]\nDB_PASSWORD = {secret}\n[hooks]\npre_activate = cat etc/app.conf\npost_activate = false\n", mode="0600")
    artifact = app.artifact("1.0", {"app.conf.in": "password is ${DB_PASSWORD}, ${TOKEN}\n"})
    log = app.directory / "log"
    results = [app.run("-v", "--debug", "--log-file", log, *arguments, env={"TOKEN": "of-the-environment"})
               for arguments in (["preflight", artifact], ["-n", "deploy", artifact], ["deploy", artifact], ["history"], ["config"])]
    assert results[2].exit_code == 5
    kept = [path.read_text(errors="replace") for path in (app.root / ".deploy").rglob("*") if path.is_file()]
    for text in [result.stdout + result.stderr for result in results] + kept + [log.read_text()]:
        assert secret not in text
    assert "password is" in log.read_text()


def test_a_template_that_is_not_utf_8_is_rendered_or_refused_cleanly(app: App) -> None:
    configure_template(app)
    result = app.run("deploy", app.artifact("1.0", {"app.conf.in": b"\xff\xfe binary ${DEPLOY_VERSION}\n"}))
    assert result.exit_code in (0, 1, 3) and "Traceback" not in result.stderr
    if result.exit_code:
        assert "UTF-8" in result.data["error"]["message"] and app.releases() == []


@pytest.mark.parametrize("source, target", [("../../etc/passwd", "x"), ("/etc/passwd", "x"), ("VERSION", "../../x"),
                                            ("VERSION", "/tmp/x"), ("VERSION", "etc/.."), ("VERSION", "")])
def test_a_template_path_that_leaves_the_release_is_a_usage_error(app: App, source: str, target: str) -> None:
    app.configure(f"[template:x]\nsource = {source}\ntarget = {target}\n")
    result = app.run("deploy", app.artifact("1.0"), check=2)
    assert "template:x" in result.data["error"]["message"] and app.releases() == []


def test_a_template_whose_source_is_a_link_is_refused_cleanly(app: App) -> None:
    configure_template(app)
    result = app.run("deploy", app.artifact("1.0", {"app.conf.in": link("VERSION")}))
    assert result.exit_code == 1 and "app.conf.in" in result.data["error"]["message"]
    assert app.releases() == [] and app.leftovers() == []


@pytest.mark.parametrize("place", ["shared", "shared/var", "shared/var/cache"])
@pytest.mark.parametrize("kind", ["symlink", "file"])
def test_a_shared_directory_that_cannot_be_walked_is_found_before_anything_changes(app: App, place: str, kind: str) -> None:
    """No symlink on the way is followed, so one there is told while nothing has been unpacked."""
    app.configure("shared_dirs = var/cache\n")
    path, elsewhere = app.root / place, app.directory / "elsewhere"
    path.parent.mkdir(parents=True, exist_ok=True)
    elsewhere.mkdir()
    path.symlink_to(elsewhere) if kind == "symlink" else path.write_text("")
    error = app.run("deploy", app.artifact("1.0"), check=3).data["error"]
    assert f"{path} is not a directory itself" in error["message"] and str(path) in error["hint"]
    assert app.releases() == [] and list(elsewhere.iterdir()) == []


def test_a_template_does_not_take_the_place_of_a_directory(app: App) -> None:
    app.configure("[template:t]\nsource = t\ntarget = dir\n")
    error = app.run("deploy", app.artifact("1.0", {"t": "x", "dir/a": "precious"}), check=1).data["error"]
    assert "dir is a directory in the artifact" in error["message"] and app.releases() == []


def test_a_rendered_file_with_a_secret_is_not_for_every_user_unless_mode_says_so(app: App) -> None:
    for version, mode, expected in (("1.0", "", 0o640), ("1.1", "mode = 0600\n", 0o600)):
        app.configure("[vars]\ndb_password = s3cret-value\n[template:conf]\nsource = app.conf.in\ntarget = app.conf\n" + mode)
        app.deploy(version, {"app.conf.in": "password=${db_password}\n"})
        assert (app.root / "current" / "app.conf").stat().st_mode & 0o777 == expected


@pytest.mark.parametrize("value, text, expected", [
    ("postgres://shop:s3cret@db/shop", "${where}", 0o640), ("https://shop.example.com/?page=1", "${where}", 0o644),
    ("x", "$${db_password} ${where}", 0o644)], ids=["a password in a URL", "a query", "a name that is kept"])
def test_it_is_the_value_that_is_secret_or_its_name(value: str, text: str, expected: int, app: App) -> None:
    app.configure(f"[vars]\nwhere = {value}\n[template:conf]\nsource = app.conf.in\ntarget = app.conf\n")
    app.deploy("1.0", {"app.conf.in": text})
    assert (app.root / "current" / "app.conf").stat().st_mode & 0o777 == expected


def test_a_new_shared_directory_that_hides_what_is_live_is_told_with_a_copy_command_that_holds_before_and_after(app: App) -> None:
    """By the release's own name: `current` leads to the new one once it is read."""
    first = app.root / "releases" / app.deploy("1.0", {"var/uploads": None}).data["release"]
    (first / "var/uploads/p.jpg").write_text("p")
    app.configure("shared_dirs = var/uploads\n")
    new = app.root / "shared/var/uploads"
    command = f"mkdir -p {new} && cp -a {first}/var/uploads/. {new}/"
    for words in (["preflight"], ["-n", "deploy", app.artifact("1.1")]):
        assert any(command in warning for warning in app.run(*words, check=0).data["warnings"]), words
    assert any(command in warning for warning in app.deploy("1.1").data["warnings"])
    subprocess.run(command, shell=True, check=True)
    assert (app.root / "current/var/uploads/p.jpg").read_text() == "p"
    assert not any("cp -a" in warning for warning in app.deploy("1.2").data["warnings"])
