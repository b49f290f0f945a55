"""Who signed it: files of the real tools are taken, whatever was changed is refused before anything is published."""

import base64
import hashlib
import json
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from signers import (SCHEMES, Signed, armor, der, dsse, minisign, minisign_keys, openssl, openssl_keys, refused, ssh, ssh_keys, text_of)
from support import DEPLOY, TESTS, App, clean_environment, load_deploy, needs, write_checksum

deploy = load_deploy()


@pytest.fixture(params=sorted(SCHEMES))
def signed(app: App, request: Any) -> Signed:
    """An artifact signed by each scheme's own tool."""
    return Signed(app, request.param)


def test_what_a_tool_signed_goes_live_and_what_was_changed_in_ten_ways_does_not(signed: Signed) -> None:
    app = signed.app
    for what, data in signed.changed():
        signed.path.write_bytes(data)
        assert refused(app, signed.artifact), what
    signed.path.write_bytes(signed.signature)
    result = app.run("deploy", signed.artifact, check=0)
    found = app.record(app.current or "")["artifact"]["signature"]
    assert found == result.data["artifact"]["signature"] and set(found) == {"scheme", "signer", "key", "at", "of"}
    assert app.record(app.current or "")["built_at"] == app.history()[-1]["built_at"] == found["at"]  # for want of better
    assert (found["scheme"], found["of"]) == (signed.scheme, "artifact") and found["key"].startswith("SHA256:")
    # The bytes, with a digest that agrees with them.
    signed.artifact.write_bytes(signed.artifact.read_bytes() + b"\0")
    write_checksum(signed.artifact)
    assert refused(app, signed.artifact, "--force", say="no known key signed these bytes")
    assert app.run("preflight", signed.artifact, check=3).data


# -- vectors -------------------------------------------------------------------

@pytest.mark.parametrize("name", ["ed25519", "ecdsa_secp256r1_sha256", "rsa_signature_2048_sha256"])
def test_every_vector_has_the_verdict_that_it_should_have(tmp_path: Path, name: str) -> None:
    wrong, pem = [], tmp_path / "key.pem"
    for group in json.loads((TESTS / "lib" / "vectors.json").read_text())[name]:
        pem.write_text(f"-----BEGIN PUBLIC KEY-----\n{group['key']}\n-----END PUBLIC KEY-----\n")
        verifier = deploy.Verifier([deploy.read_key(str(pem))], [], "deploy")
        for number, message, signature, verdict in group["tests"]:
            try:
                verifier.verify(base64.b64decode(message), signature.encode(), "vector")
                found = "valid"
            except deploy.ArtifactRefused:
                found = "invalid"
            if verdict not in (found, "acceptable"):
                wrong.append((number, verdict))
    assert not wrong


def test_numbers_that_claim_to_be_longer_than_any_are_refused(tmp_path: Path) -> None:
    openssl_keys(tmp_path, "p256")
    for first, second in ((255, 255), (255, 1), (1, 255), (127, 127)):
        body = b"\2" + bytes([first]) + b"\1" * first + b"\2" + bytes([second]) + b"\1" * second
        data = base64.b64encode(b"0\x81" + bytes([len(body) % 256]) + body)
        assert verdict(data=b"something", signature=data, keys=[tmp_path / "p256.pem"]).startswith("4 ")


def test_the_readmes_cosign_line_leaves_what_is_taken(app: App) -> None:
    line = next(line for line in (DEPLOY.parent / "README.md").read_text(encoding="utf-8").split("\n") if "cosign sign-blob --key" in line)
    words = line.split()
    signed = Signed(app, "openssl-p256")  # whose key is a PEM of P-256, as cosign's is
    path = signed.artifact.with_name(words[words.index("--output-signature") + 1].replace(words[-1], signed.artifact.name))
    path.write_bytes(signed.signature.strip())  # cosign ends it without a newline
    assert path == signed.path and app.run("deploy", signed.artifact, check=0).data["changed"]


# -- what a scheme invites to ------------------------------------------------------

def verdict(*lines: str, data: bytes, signature: bytes, keys: Any = (), **fields: Any) -> str:
    """Who signed bytes, or why not; `lines` are allowed_signers."""
    signers = Path(fields.pop("place", "/nowhere")) / "signers"
    if lines:
        signers.write_text("\n".join(lines) + "\n")
    given = dict({"namespace": "deploy", "principals": [], "legacy": True}, **fields)
    try:
        known = list(deploy.read_signers(str(signers))) if lines else []
        verifier = deploy.Verifier([deploy.read_key(str(key)) for key in keys], known, **given)
        return str(verifier.verify(data, signature, "it")["signer"])
    except deploy.DeployError as error:
        return f"{error.exit_code} {error.message}"


def test_minisigns_word_for_a_file_or_its_hash_is_signed_by_nobody(tmp_path: Path) -> None:
    minisign_keys(tmp_path)
    data = b"something" * 20
    (tmp_path / "file").write_bytes(data)
    text, keys = minisign(tmp_path, tmp_path / "file"), [tmp_path / "minisign.pub"]
    lines = text.split(b"\n")
    blob = base64.b64decode(lines[1])
    lines[1] = base64.b64encode(b"Ed" + blob[2:])
    digest = hashlib.blake2b(data).digest()
    assert not verdict(data=data, signature=text, keys=keys).startswith("4 ")
    for flipped in (b"\n".join(lines), b"\n".join(lines[:2]) + b"\n"):
        assert verdict(data=digest, signature=flipped, keys=keys).startswith("4 "), "the hash passes for a file"
    old = minisign(tmp_path, tmp_path / "file", "-l")
    assert "legacy = yes" in verdict(data=data, signature=old, keys=keys, legacy=False)
    changed = re.sub(rb"timestamp:\d", b"timestamp:9", text)
    assert "trusted comment" in verdict(data=data, signature=changed, keys=keys)
    assert verdict(data=data, signature=text.replace(b"\n", b"\r\n"), keys=keys) == verdict(data=data, signature=text, keys=keys)


def test_a_python_without_blake2_says_so(app: App) -> None:
    signed = Signed(app, "minisign")
    program = "import hashlib, runpy, sys; del hashlib.blake2b; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    result = subprocess.run([sys.executable, "-c", program, str(DEPLOY), "-c", str(app.config), "deploy", str(signed.artifact)],
                            stderr=subprocess.PIPE, stdout=subprocess.PIPE, universal_newlines=True, env=clean_environment())
    assert result.returncode == 4 and "BLAKE2" in result.stderr and "Traceback" not in result.stderr and not app.releases()


SIGNERS = {
    "plain": ("alice@example.com {}", ""), "several": ("bob,alice@example.com {}", ""), "quoted": ('"alice@example.com" {}', ""),
    "pattern": ("*@example.com {}", ""), "negated": ("!alice@*,*@example.com {}", ""), "negated-later": ("*@example.com,!alice@* {}", ""),
    "one-letter": ("alic?@example.com {}", ""), "other": ("bob {}", ""), "no-regex": ("alice.example.com {}", ""),
    "namespace": ('alice@example.com namespaces="file,deploy" {}', ""), "namespace-pattern": ('alice@example.com namespaces="dep*" {}', ""),
    "no-namespace": ('alice@example.com namespaces="file" {}', ""), "upper": ('alice@example.com NAMESPACES="deploy" {}', ""),
    "valid": ('alice@example.com valid-after="20200101Z",valid-before="203012312359Z" {}', ""),
    "valid-seconds": ('alice@example.com valid-after="20200101000000Z" {}', ""),
    "expired": ('alice@example.com valid-before="20200101Z" {}', ""), "too-early": ('alice@example.com valid-after="20900101Z" {}', ""),
    "indented": ("  alice@example.com   {}  with a comment", ""), "key-in-another-line": ("bob {}\n\n# x\nalice@example.com {}", ""),
    "certificates": ("alice@example.com cert-authority {}", "2"), "local-time": ('alice@example.com valid-before="20300101" {}', "2"),
    "no-such-option": ('alice@example.com verify-required="x" {}', "2"), "no-key": ("alice@example.com", "2"),
    "cut-key": ("alice@example.com {}".format("ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAI"), "2"),
    "dss": ("alice@example.com ssh-dss AAAAB3NzaC1kc3MAAAABAAAAAAEAAAABAA==", "2"),
}


@pytest.mark.parametrize("name", sorted(SIGNERS))
def test_allowed_signers_mean_what_they_mean_to_ssh_keygen(tmp_path: Path, name: str) -> None:
    line, ours = SIGNERS[name]
    ssh_keys(tmp_path, "ed25519")
    key = (tmp_path / "ssh-ed25519.pub").read_text().strip()
    (tmp_path / "file").write_bytes(b"something")
    signature = ssh(tmp_path, tmp_path / "file", "ed25519")
    (tmp_path / "sig").write_bytes(signature)
    found = verdict(line.format(key, key), data=b"something", signature=signature, principals=["alice@example.com"], place=tmp_path)
    if ours:
        assert re.match(rf"{ours} {tmp_path}/signers line 1: ", found), found
        return
    theirs = subprocess.run(["ssh-keygen", "-Y", "verify", "-f", str(tmp_path / "signers"), "-I", "alice@example.com", "-n", "deploy",
                             "-s", str(tmp_path / "sig")], input=b"something", stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert (found == "alice@example.com") == (theirs.returncode == 0), (found, theirs.stdout)


def test_a_signature_for_another_purpose_or_of_old_hashes_is_none(tmp_path: Path) -> None:
    for kind in ("ed25519", "rsa"):
        ssh_keys(tmp_path, kind)
    (tmp_path / "file").write_bytes(b"something")
    line = "alice " + (tmp_path / "ssh-ed25519.pub").read_text()
    for namespace, flags in (("file", ()), ("deploy-approval", ()), ("deploy", ("-Ohashalg=sha256",))):
        signature = ssh(tmp_path, tmp_path / "file", "ed25519", namespace, *flags)
        found = verdict(line, data=b"something", signature=signature, place=tmp_path)
        assert (found == "alice") == (namespace == "deploy"), found
    # ssh-rsa is over SHA-1.
    line = "alice " + (tmp_path / "ssh-rsa.pub").read_text()
    text = ssh(tmp_path, tmp_path / "file", "rsa")
    blob = base64.b64decode(b"".join(text.split(b"\n")[1:-2]))
    assert verdict(line, data=b"something", signature=armor(blob), place=tmp_path) == "alice"
    old = armor(blob.replace(b"\0\0\0\x0crsa-sha2-512", b"\0\0\0\x07ssh-rsa").replace(b"\0\0\1\x14", b"\0\0\1\x0f"))
    assert "ssh-rsa" in verdict(line, data=b"something", signature=old, place=tmp_path)


@pytest.mark.parametrize("kind", ["ed25519", "p256"])
def test_a_security_keys_signature_counts_when_somebody_touched_it(tmp_path: Path, kind: str) -> None:
    openssl_keys(tmp_path, kind)
    point = der((tmp_path / f"{kind}.pem").read_text())[-32 if kind == "ed25519" else -65:]
    name = b"sk-ssh-ed25519@openssh.com" if kind == "ed25519" else b"sk-ecdsa-sha2-nistp256@openssh.com"
    public = text_of(name, *([] if kind == "ed25519" else [b"nistp256"]), point, b"ssh:")
    data, found = b"something", []
    message = b"SSHSIG" + text_of(b"deploy", b"", b"sha512", hashlib.sha512(data).digest())
    for flags in (b"\1", b"\5", b"\0", b"\4"):
        (tmp_path / "signed").write_bytes(hashlib.sha256(b"ssh:").digest() + flags + b"\0\0\0\7" + hashlib.sha256(message).digest())
        value = base64.b64decode(openssl(tmp_path, tmp_path / "signed", kind))
        if kind == "p256":
            r_size = value[3]
            value = text_of(value[4:4 + r_size], value[6 + r_size:])
        inner = text_of(name, value) + flags + b"\0\0\0\7"
        signature = armor(b"SSHSIG\0\0\0\1" + text_of(public, b"deploy", b"", b"sha512", inner))
        line = f"alice {name.decode()} {base64.b64encode(public).decode()}"
        found.append(verdict(line, data=data, signature=signature, place=tmp_path))
        (tmp_path / "sig").write_bytes(signature)
        theirs = subprocess.run([needs("ssh-keygen"), "-Y", "verify", "-f", str(tmp_path / "signers"), "-I", "alice", "-n", "deploy", "-s",
                                 str(tmp_path / "sig")], input=data, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        assert theirs.returncode == 0, theirs.stdout  # it does not look at the flags
    assert found[:2] == ["alice", "alice"] and all("nobody touched" in other for other in found[2:]), found


def test_a_statement_speaks_for_its_subjects_and_only_once_it_is_verified(tmp_path: Path) -> None:
    openssl_keys(tmp_path, "p256")
    path, keys = tmp_path / "file", [tmp_path / "p256.pem"]
    path.write_bytes(b"something")
    good = dsse(tmp_path, path)
    assert verdict(data=b"something", signature=b"\n" + good + good, keys=keys).startswith("4 ")  # a file that begins otherwise
    assert verdict(data=b"something", signature=good + good, keys=keys).startswith("SHA256:")
    assert verdict(data=b"something else", signature=good, keys=keys).startswith("4 ")
    for bad in (dsse(tmp_path, path, "text/plain"), dsse(tmp_path, path, subject=[]), dsse(tmp_path, path, subject=[{"name": "x"}]),
                dsse(tmp_path, path, subject=None), b"{}", b"{" * 100000, b'{"payload": 1}', b'{"payloadType": "a", "payload": "", "signatures": 1}'):
        assert verdict(data=b"something", signature=bad, keys=keys).startswith("4 "), bad[:80]


def test_noise_is_refused_and_never_more(tmp_path: Path) -> None:
    for make in (minisign_keys, lambda place: ssh_keys(place, "p256"), lambda place: openssl_keys(place, "p256")):
        make(tmp_path)
    path = tmp_path / "file"
    path.write_bytes(b"something")
    line = "alice " + (tmp_path / "ssh-p256.pub").read_text()
    keys, dice = [tmp_path / "minisign.pub", tmp_path / "p256.pem"], random.Random(1)
    for sign in (minisign, lambda place, path: ssh(place, path, "p256"), lambda place, path: openssl(place, path, "p256"), dsse):
        text = sign(tmp_path, path)
        for _ in range(60):
            at, data = dice.randrange(len(text)), bytearray(text)
            del data[at:at + dice.choice((0, 1, 4, 40))]
            data[at:at] = bytes(dice.randrange(256) for _ in range(dice.choice((1, 4))))
            found = verdict(line, data=b"something else", signature=bytes(data), keys=keys, place=tmp_path)
            assert found.startswith("4 "), (found, bytes(data))
