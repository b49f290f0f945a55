"""[signature]: which file decides, what it means for releases, the command, and what the configuration may say of it."""

import base64
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Tuple

import pytest

from signers import Signed, openssl_keys, refused, run
from support import DEPLOY, App, clean_environment, make_tree, needs, open_to_others, run_deploy, sha256_of, snapshot


# -- what the configuration says ---------------------------------------------------

@pytest.fixture
def mini(app: App) -> Signed:
    """An artifact signed with minisign."""
    return Signed(app, "minisign")


DAMAGED = {
    "minisign": (r"keys/minisign\.pub line 2: ", lambda keys: spoil(keys / "minisign.pub", 1)),
    "not-base64": (r"keys/minisign\.pub line 2: ", lambda keys: spoil(keys / "minisign.pub", 1, "#")),
    "empty": (r"keys/minisign\.pub line 1: ", lambda keys: (keys / "minisign.pub").write_text("")),
    "gone": (r"keys/minisign\.pub: No such file", lambda keys: (keys / "minisign.pub").unlink()),
    "pem": (r"keys/minisign\.pub line 1: ", lambda keys: openssl_keys(keys, "p256") or spoil(keys / "p256.pem", 2, "A").rename(keys / "minisign.pub")),
    "private": (r"keys/minisign\.pub line 1: ", lambda keys: openssl_keys(keys, "p256") or (keys / "p256.key").rename(keys / "minisign.pub")),
    "rsa-1024": (r"keys/minisign\.pub line 1: ", lambda keys: small_rsa(keys).rename(keys / "minisign.pub")),
}


def spoil(path: Path, line: int, letter: str = "") -> Path:
    """Cut off or replace one letter of a line."""
    lines = path.read_text().split("\n")
    lines[line] = lines[line][:9] + ("B" if letter == lines[line][9] else letter) + lines[line][10:]
    path.write_text("\n".join(lines))
    return path


def small_rsa(keys: Path) -> Path:
    run("openssl", "genpkey", "-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:1024", "-out", keys / "small.key")
    run("openssl", "pkey", "-in", keys / "small.key", "-pubout", "-out", keys / "small.pem")
    return keys / "small.pem"


@pytest.mark.parametrize("name", sorted(DAMAGED))
def test_a_damaged_key_is_a_mistake_with_file_and_line(mini: Signed, name: str) -> None:
    needs("openssl")
    say, damage = DAMAGED[name]
    damage(mini.keys)
    for words in (["deploy", mini.artifact], ["-n", "deploy", mini.artifact], ["preflight"]):
        result = mini.app.run(*words, check=2)
        assert re.search(say, result.data["msg"]), result.describe()


def test_every_mistake_in_the_section_is_told(app: App) -> None:
    for text, say in (("verify = required", "needs keys"), ("verify = if-present", "needs keys"), ("keys = 'x'", "quotes"),
                      ("keys = a, b", "one a line"), ("keys = RW" + "A" * 50, "key RWA"), ("allowed_signers = none", "No such file"),
                      ("command = check && true", "for a shell"), ("key = x", "did you mean 'keys'"), ("legacy = perhaps", "yes or no")):
        app.configure("[signature]\n" + text)
        assert say in str(app.run("deploy", app.artifact("1.0"), check=2).data["error"]), text
    app.configure()
    assert "[signature]" in app.run("deploy", app.artifact("1.0"), "--signature", "x", check=2).data["error"]["hint"]
    for words in (["--set", "signature.namespace=x"], ["--set", "signature.principal=x"], ["--set", "signature.verify=off"]):
        app.run(*words, "deploy", app.artifact("1.0"), check=0)


def test_a_key_may_stand_in_the_file_itself_and_paths_are_relative_to_it(mini: Signed) -> None:
    app, literal = mini.app, (mini.keys / "minisign.pub").read_text().split("\n")[1]
    strange = (app.directory / "strange" / "minisign.pub").read_text().split("\n")[1]
    for keys, code in ((literal, 0), (strange, 4), (f"{strange}\n  {literal}", 0), ("keys/minisign.pub", 0)):
        app.configure(f"[signature]\nkeys = {keys}")
        assert app.run("-n", "deploy", mini.artifact).exit_code == code, keys
    app.configure("[signature]\nverify = off\nkeys = keys/minisign.pub")
    mini.path.write_bytes(b"")
    app.run("-n", "deploy", mini.artifact, check=0)


# -- which file ----------------------------------------------------------------------

def test_the_first_file_that_exists_decides_and_a_bad_one_is_never_passed_over(mini: Signed) -> None:
    app, artifact, good = mini.app, mini.artifact, mini.signature
    sums = artifact.with_name("SHA256SUMS")
    sums.write_text(f"{sha256_of(artifact)}  {artifact.name}\n")
    listed = mini.sign(mini.keys, sums)
    files = [(artifact.with_name(artifact.name + suffix), good) for suffix in (".minisig", ".sig", ".intoto.jsonl")]
    files += [(sums.with_name("SHA256SUMS" + suffix), listed) for suffix in (".minisig", ".sig")]
    elsewhere = app.directory / "elsewhere"
    elsewhere.write_bytes(good)
    for number, (path, signature) in enumerate(files):
        for other, _ in files:
            other.write_bytes(mini.strangers) if other in [later for later, _ in files[number + 1:]] else None
            if other in [earlier for earlier, _ in files[:number]] and other.exists():
                other.unlink()
        path.write_bytes(signature)
        found = app.run("-n", "deploy", artifact, check=0).data["artifact"]["signature"]
        assert found["of"] == ("artifact" if number < 3 else "SHA256SUMS"), path
        path.write_bytes(mini.others)
        app.run("-n", "deploy", artifact, check=4)
        app.run("-n", "deploy", artifact, "--signature", elsewhere, check=0)
        path.unlink()
        path.symlink_to("nowhere")
        app.run("-n", "deploy", artifact, check=4)
        path.unlink()
    assert "no signature" in refused(app, artifact)
    assert "gone" in refused(app, artifact, "--signature", app.directory / "gone")


def test_a_signed_list_names_the_artifact_once_and_agrees_with_every_other_digest(mini: Signed) -> None:
    app, artifact = mini.app, mini.artifact
    mini.path.unlink()
    sums, digest = artifact.with_name("SHA256SUMS"), sha256_of(artifact)
    line, other = f"{digest}  {artifact.name}\n", f"{'0' * 64}  other.tar.gz\n"

    def listed(text: str, *words: Any) -> Any:
        sums.write_text(text)
        sums.with_name("SHA256SUMS.minisig").write_bytes(mini.sign(mini.keys, sums))
        return app.run("-n", "deploy", artifact, *words)

    assert [listed(text).exit_code for text in (line + other, f"{digest} *{artifact.name}\n", f"{digest}  ./dist/{artifact.name}\n")] == [0] * 3
    for text in (other, "", line + line, line + f"{digest}  old/{artifact.name}\n", line.replace(digest, "1" * 64)):
        assert listed(text).exit_code == 4, text
    assert listed(line, "--sha256", digest).exit_code == 0 and listed(line, "--sha256", "1" * 64).exit_code == 4
    artifact.with_name(artifact.name + ".sha256").write_text("2" * 64)
    assert listed(line).exit_code == 4
    artifact.with_name(artifact.name + ".sha256").unlink()
    listed(line)
    app.run("deploy", artifact, check=0)
    assert app.record(app.current or "")["artifact"]["signature"]["of"] == "SHA256SUMS"
    app.run("-n", "--set", "artifact.checksum=off", "deploy", artifact, check=0)
    # Neither a digest nor the list's own takes the place of a signature.
    sums.with_name("SHA256SUMS.minisig").unlink()
    assert "no signature" in refused(app, artifact, "--sha256", digest)


# -- releases --------------------------------------------------------------------------

def test_what_is_staged_or_current_needs_its_signature_all_the_same(mini: Signed) -> None:
    app, artifact = mini.app, mini.artifact
    app.run("stage", artifact, check=0)
    mini.path.write_bytes(mini.others)
    refused(app, artifact)
    refused(app, artifact, "--force")
    mini.path.write_bytes(mini.signature)
    assert app.run("deploy", artifact, check=0).data["changed"] and not app.run("deploy", artifact, check=0).data["changed"]
    mini.path.write_bytes(mini.strangers)
    refused(app, artifact)
    app.run("stage", artifact, check=4)
    assert [entry["result"] for entry in app.history()].count("refused") == 3, "told once for each reason"


def test_a_release_without_a_signature_is_activated_by_force_alone_and_going_back_never_asks(mini: Signed) -> None:
    app, off = mini.app, ["--set", "signature.verify=off"]
    first = app.run("deploy", app.artifact("0.8"), *off, check=0).data["release"]
    second = app.run("stage", app.artifact("0.9"), *off, check=0).data["release"]
    assert "without a signature" in app.run("activate", second, check=4).data["msg"]
    app.run("-n", "activate", second, check=4)
    app.run("activate", second, "--force", check=0)
    app.run("rollback", check=0)
    assert app.current == first and not app.run("activate", first, check=0).data["changed"]
    app.run("activate", second, "--set", "signature.verify=if-present", check=4 if app.record(second)["state"] == "bad" else 0)


def test_where_a_signature_is_taken_if_present_its_absence_after_one_is_a_warning(mini: Signed) -> None:
    app, soft = mini.app, ["--set", "signature.verify=if-present"]
    assert not app.run("deploy", app.artifact("0.9"), *soft, check=0).data["warnings"]
    app.run("deploy", mini.artifact, *soft, check=0)
    assert app.record(app.current or "")["artifact"]["signature"]["scheme"] == "minisign"
    result = app.run("deploy", app.artifact("1.1"), *soft, check=0)
    assert any("no signature" in warning for warning in result.data["warnings"])
    mini.path.with_name("myapp-1.2.tar.gz.minisig").write_bytes(mini.signature)
    assert app.run("deploy", app.artifact("1.2"), *soft, check=4).data
    tree = make_tree(app.directory / "myapp-2.0", {"VERSION": "2.0\n"})
    app.run("deploy", tree, *soft, check=0)
    assert "pack a" in app.run("deploy", tree, "--force", check=4).data["error"]["hint"]


def test_its_row_is_judged_over_the_bytes_whatever_they_hold(mini: Signed) -> None:
    app, artifact = mini.app, mini.artifact

    def row(*words: Any) -> Tuple[str, str]:
        result = app.run(*words)
        found = next(row for row in result.data["checks"] if row["name"] == "signature")
        return found["status"], found["detail"]

    for data in (b"garbage", b"", b"\0" * 1024, b"PK\3\4" + os.urandom(100), artifact.read_bytes() + b"\0"):
        before = snapshot(app.root)
        artifact.write_bytes(data)
        for words in (["preflight", artifact], ["-n", "deploy", artifact]):
            mini.path.write_bytes(mini.signature)
            assert row(*words)[0] == "fail", data
            mini.path.write_bytes(mini.sign(mini.keys, artifact))
            assert row(*words)[0] == "ok" and app.run(*words).exit_code in (3, 4), data
        assert snapshot(app.root) == before
    artifact.with_name(artifact.name + ".sha256").unlink()
    assert row("preflight", artifact)[0] == "ok" and row("preflight")[0] == "skip"


# -- a command -----------------------------------------------------------------------

def test_a_command_is_handed_the_bytes_and_the_signatures_path(app: App) -> None:
    seen, artifact = app.directory / "seen", app.artifact("1.0", {"big": os.urandom(300000)})
    check = app.directory / "check"
    check.write_text(f"#!/bin/sh\ncat > {seen}\necho \"$DEPLOY_SIGNATURE $DEPLOY_HOOK $DEPLOY_APPLICATION\" >> {seen}.words\n"
                     f"grep -q yes \"$DEPLOY_SIGNATURE\" || {{ echo bad key >&2; exit 3; }}\n")
    check.chmod(0o755)
    app.configure(f"[signature]\ncommand = {check}")
    assert "no signature" in refused(app, artifact)
    signature = artifact.with_name(artifact.name + ".sig")
    signature.write_text("no")
    message = refused(app, artifact)
    assert "exited with code 3" in message and "bad key" in message
    signature.write_text("yes")
    app.run("deploy", artifact, check=0)
    assert seen.read_bytes() == artifact.read_bytes() and f"{signature} signature myapp" in (app.directory / "seen.words").read_text()
    assert app.record(app.current or "")["artifact"]["signature"] == {"scheme": "command", "signer": str(check), "key": None, "at": None,
                                                                      "of": "artifact"}
    assert not app.run("deploy", artifact, check=0).data["changed"]
    signature.write_text("no")
    refused(app, artifact)
    signature.unlink()
    sums = artifact.with_name("SHA256SUMS")
    sums.write_text(f"{sha256_of(artifact)}  {artifact.name}\n")
    sums.with_name("SHA256SUMS.sig").write_text("yes")
    for options, code in (["--force"], 0), (["--set", "artifact.match=other-@v.tar"], 4):  # refused, and judged all the same
        seen.unlink()
        app.run("-n", "deploy", artifact, *options, check=code)
        assert seen.read_bytes() == sums.read_bytes()
    # What exits without reading all of it is believed as well.
    app.configure("[signature]\ncommand = true")
    app.run("-n", "deploy", artifact, check=0)


def test_a_command_and_keys_must_both_agree(mini: Signed) -> None:
    app = mini.app
    for command, signature, code in (("true", mini.signature, 0), ("false", mini.signature, 4), ("true", mini.others, 4)):
        app.configure(f"[signature]\nkeys = {mini.keys}/minisign.pub\ncommand = {command}")
        mini.path.write_bytes(signature)
        assert app.run("deploy", mini.artifact).exit_code == code, command
        assert not app.run("-n", "deploy", mini.artifact).exit_code == 0 or code == 0
    # The list as well.
    app.configure(f"[signature]\nkeys = {mini.keys}/minisign.pub\ncommand = false")
    mini.path.unlink()
    sums = mini.artifact.with_name("SHA256SUMS")
    sums.write_text(f"{sha256_of(mini.artifact)}  {mini.artifact.name}\n")
    sums.with_name("SHA256SUMS.sig").write_bytes(mini.sign(mini.keys, sums))
    for words in (["deploy", mini.artifact, "--force"], ["deploy", mini.artifact], ["-n", "deploy", mini.artifact]):
        assert "exited with code 1" in app.run(*words, check=4).data["msg"]
    app.configure(f"[signature]\nkeys = {mini.keys}/minisign.pub\ncommand = /nowhere/check")
    mini.path.write_bytes(mini.signature)
    assert "/nowhere/check" in refused(app, mini.artifact)


@pytest.mark.parametrize("signed", ["app-1.0.tar", "SHA256SUMS"])
def test_a_command_that_cannot_be_asked_approves_of_nothing(app: App, signed: str) -> None:
    artifact = app.artifact("1.0", {"big": os.urandom(3000)})
    app.configure("[signature]\ncommand = false")
    artifact.with_name("SHA256SUMS").write_text(f"{sha256_of(artifact)}  {artifact.name}\n")
    artifact.with_name(signed.replace("app-1.0.tar", artifact.name) + ".sig").write_text("x")
    for blocks in (0, 1):  # of 512 bytes: none for a temporary file, or too few for the artifact
        result = subprocess.run(["sh", "-c", f'ulimit -f {blocks} && exec "$@"', "sh", sys.executable, str(DEPLOY), "-c", str(app.config),
                                 "-n", "deploy", str(artifact)], stderr=subprocess.PIPE, stdout=subprocess.PIPE, env=clean_environment())
        kept = blocks and signed == "SHA256SUMS"
        assert result.returncode == (4 if kept else 1), result.stderr
        assert (b"exited with code 1" if kept else b"cannot keep in TMPDIR") in result.stderr
    assert app.current is None


def test_gpgv_is_asked_as_the_readme_says(app: App) -> None:
    needs("gpgv")
    home, artifact = app.directory / "gnupg", app.artifact("1.0")
    home.mkdir(mode=0o700)
    gpg = [needs("gpg"), "--homedir", str(home), "--batch", "--pinentry-mode", "loopback", "--passphrase", ""]
    run(*gpg, "--quick-generate-key", "builder@example.com", "ed25519", "sign", "never")
    (app.directory / "builder.gpg").write_bytes(run(*gpg, "--export", "builder@example.com"))
    listing = run(*gpg, "--with-colons", "--fingerprint").decode()
    fingerprint = re.findall(r"(?m)^fpr:+([0-9A-F]{40}):", listing)[0]
    readme = (DEPLOY.parent / "README.md").read_text()
    script = re.search(r"(?m)^    (#!/bin/sh\n    # check-gpg(?:.*\n    )*.*)\n", readme).group(1)  # type: ignore
    check = app.directory / "check-gpg"
    check.write_text(script.replace("\n    ", "\n").replace("/etc/deploy/builder.gpg", str(app.directory / "builder.gpg"))
                     .replace("FINGERPRINT", fingerprint) + "\n")
    check.chmod(0o755)
    app.configure(f"[signature]\ncommand = {check}")
    signature = artifact.with_name(artifact.name + ".sig")
    run(*gpg, "--detach-sign", "-o", signature, artifact)
    app.run("deploy", artifact, check=0)
    good = signature.read_bytes()
    for data in (good[:-1] + bytes([good[-1] ^ 1]), good + good, b""):
        signature.write_bytes(data)
        refused(app, artifact, "--force")
    run(*gpg, "--quick-generate-key", "other@example.com", "ed25519", "sign", "never")
    signature.unlink()
    run(*gpg, "-u", "other@example.com", "--detach-sign", "-o", signature, artifact)
    refused(app, artifact, "--force")
    subprocess.run(["gpgconf", "--homedir", str(home), "--kill", "all"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


# -- the host --------------------------------------------------------------------------

@pytest.mark.parametrize("command, programs", [("", 1), ("command = /bin/true", 2)])
def test_no_tool_is_needed_on_the_host_and_the_file_is_read_once(mini: Signed, command: str, programs: int) -> None:
    app, trace = mini.app, mini.app.directory / "trace"
    app.configure(f"[signature]\n{command}" if command else f"[signature]\nkeys = {mini.keys}/minisign.pub")
    app.artifact("1.0", {"big": os.urandom(2000000)})
    mini.path.write_bytes(mini.sign(mini.keys, mini.artifact))
    strace = [needs("strace"), "-f", "-y", "-e", "trace=pread64,execve", "-o", str(trace)]
    for words in (["-n", "deploy"], ["preflight"], ["deploy"]):
        subprocess.run([*strace, sys.executable, str(DEPLOY), "-q", "-c", str(app.config), *words, str(mini.artifact)], check=True,
                       stdout=subprocess.DEVNULL, env=clean_environment({"PATH": "/nowhere"}))
        lines = trace.read_text()
        read = sum(int(size) for size in re.findall(rf"<{re.escape(str(mini.artifact))}>.* = (\d+)\n", lines))
        assert os.path.getsize(str(mini.artifact)) <= read <= os.path.getsize(str(mini.artifact)) + 4096, words
        assert lines.count("execve(") == programs
    assert app.version == "1.0"
    if command:
        # What it does not approve of was unpacked meanwhile, and is nowhere.
        app.configure("[signature]\ncommand = /bin/false")
        assert "exited with code 1" in refused(app, app.artifact("1.1"), "--signature", mini.path)
        assert [path.name for path in (app.root / "releases").iterdir()] == [app.current]


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_a_signature_answers_for_where_an_artifact_comes_from_and_lets_a_delegate_name_it() -> None:
    with open_to_others() as app:
        mini, inbox = Signed(app, "minisign"), app.directory / "inbox"
        place = app.directory / "strange-place"
        place.mkdir()
        artifact = Path(shutil.copy(str(mini.artifact), str(place)))
        shutil.copy(f"{mini.artifact}.sha256", str(place))
        for path in (place, artifact):
            os.chown(str(path), 65534, 65534)
        inbox.mkdir()
        text = f"inbox = {inbox}\ndelegated = deploy\n[signature]\nkeys = {mini.keys}/minisign.pub\n"
        delegated = ["--delegate", app.configure(text), "deploy", artifact]
        assert "inbox" in run_deploy(*delegated, json=False, check=2).stderr and not app.history()
        Path(f"{artifact}.minisig").write_bytes(mini.others)
        run_deploy(*delegated, json=False, check=4)
        for words in (["--signature", mini.path], ["--signature=x"]):
            run_deploy(*delegated, *words, json=False, check=2)
        link = Path(f"{artifact}.minisig")
        link.unlink()
        link.symlink_to(mini.path)
        run_deploy(*delegated, json=False, check=4)
        link.unlink()
        link.write_bytes(mini.signature)
        assert not app.releases()
        run_deploy(*delegated, json=False, check=0)
        assert app.run("preflight", artifact, check=0).data
        # Where no signature is needed, none answers for it.
        app.configure(text + "verify = off\n")
        assert "origin" in app.run("deploy", artifact, "--force", check=3).data["msg"]
        assert "inbox" in run_deploy(*delegated, json=False, check=2).stderr


def test_a_signature_of_another_kind_is_told_from_a_damaged_one(app: App) -> None:
    signed = Signed(app, "openssl-p256")
    for data in (base64.b64decode(signed.signature), b"-----BEGIN PGP SIGNATURE-----\n\niQEz\n-----END PGP SIGNATURE-----\n", b""):
        signed.path.write_bytes(data)
        refused(app, signed.artifact)
        assert "`command` is for other kinds" in app.run("-n", "deploy", signed.artifact, check=4).data["error"]["hint"]


def test_an_unreadable_signature_or_one_that_never_ends_is_refused(mini: Signed) -> None:
    app = mini.app
    for make in (lambda: mini.path.mkdir(), lambda: os.mkfifo(str(mini.path)), lambda: mini.path.write_bytes(b"A" * (2 << 20))):
        mini.path.unlink() if mini.path.is_file() else None
        make()
        assert mini.path.name in refused(app, mini.artifact)
        mini.path.rmdir() if mini.path.is_dir() else mini.path.unlink()


def test_what_goes_wrong_within_the_command_is_told_without_a_trace(mini: Signed) -> None:
    app = mini.app
    app.configure("[signature]\ncommand = sh -c 'kill -9 $$'")
    assert "SIGKILL" in refused(app, mini.artifact)
    app.configure("[signature]\ncommand = sh -c 'echo password=hunter22; exit 1'")
    assert "hunter22" not in refused(app, mini.artifact)
    app.configure("[signature]\ncommand = ./check\n[hooks]\ntimeout = 5s")
    (app.root / "check").write_text("#!/bin/sh\ntest \"$(wc -c)\" = " + str(mini.artifact.stat().st_size))
    assert "./check" in refused(app, mini.artifact)
    (app.root / "check").chmod(0o755)
    app.run("deploy", mini.artifact, check=0)


def test_the_configuration_narrows_whose_signature_counts_and_for_what(app: App) -> None:
    signed = Signed(app, "ssh-ed25519")
    app.configure(f"[signature]\nallowed_signers = {signed.keys}/signers-ed25519\nprincipal =\n  carol\n  bob\n")
    assert app.run("-n", "deploy", signed.artifact, check=0).data["artifact"]["signature"]["signer"] == "bob"
    for narrower in ("signature.principal=carol", "signature.namespace=file", f"signature.allowed_signers={app.directory}/strange/signers-ed25519"):
        refused(app, signed.artifact, "--set", narrower)


def test_minisigns_old_form_needs_a_word(app: App) -> None:
    old = Signed(app, "minisign-legacy")
    assert "legacy = yes" in refused(app, old.artifact, "--set", "signature.legacy=no")
    app.run("-n", "deploy", old.artifact, check=0)
