"""Real tools that sign, what each is called by, and an artifact that one of them signed."""

import base64
import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any, Dict, Iterator, Tuple

from support import App, needs, sha256_of


def run(*words: Any, **options: Any) -> bytes:
    """A tool's output."""
    return subprocess.run([str(word) for word in words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, check=True, **options).stdout


def der(pem: str) -> bytes:
    """What a PEM holds."""
    return base64.b64decode("".join(pem.strip().split("\n")[1:-1]))


# -- the tools: how each makes its keys, and signs ---------------------------------

def minisign_keys(place: Path) -> None:
    run(needs("minisign"), "-G", "-W", "-p", place / "minisign.pub", "-s", place / "minisign.key")


def minisign(place: Path, path: Path, *flags: str) -> bytes:
    run("minisign", "-S", *flags, "-s", place / "minisign.key", "-m", path, "-x", place / "made")
    return (place / "made").read_bytes()


def signify_keys(place: Path) -> None:
    run(needs("signify-openbsd"), "-G", "-n", "-p", place / "signify.pub", "-s", place / "signify.sec")


def signify(place: Path, path: Path) -> bytes:
    run("signify-openbsd", "-S", "-s", place / "signify.sec", "-m", path, "-x", place / "made")
    return (place / "made").read_bytes()


SSH = {"ed25519": "-t ed25519", "p256": "-t ecdsa -b 256", "p384": "-t ecdsa -b 384", "p521": "-t ecdsa -b 521", "rsa": "-t rsa -b 2048"}


def ssh_keys(place: Path, kind: str) -> None:
    run(needs("ssh-keygen"), "-q", *SSH[kind].split(), "-N", "", "-C", "", "-f", place / f"ssh-{kind}")
    key = (place / f"ssh-{kind}.pub").read_text()
    (place / f"signers-{kind}").write_text(f'# who\n\nalice@example.com,bob namespaces="deploy" {key}')


def ssh(place: Path, path: Path, kind: str, namespace: str = "deploy", *flags: str) -> bytes:
    with path.open("rb") as stream:
        return run("ssh-keygen", "-q", "-Y", "sign", *flags, "-f", place / f"ssh-{kind}", "-n", namespace, stdin=stream)


OPENSSL = {"p256": "-algorithm EC -pkeyopt ec_paramgen_curve:P-256", "p384": "-algorithm EC -pkeyopt ec_paramgen_curve:P-384",
           "p521": "-algorithm EC -pkeyopt ec_paramgen_curve:P-521", "rsa": "-algorithm RSA -pkeyopt rsa_keygen_bits:2048",
           "ed25519": "-algorithm ed25519"}
HASHES = {"p256": "sha256", "p384": "sha384", "p521": "sha512", "rsa": "sha256"}


def openssl_keys(place: Path, kind: str) -> None:
    run(needs("openssl"), "genpkey", *OPENSSL[kind].split(), "-out", place / f"{kind}.key")
    run("openssl", "pkey", "-in", place / f"{kind}.key", "-pubout", "-out", place / f"{kind}.pem")


def openssl(place: Path, path: Path, kind: str) -> bytes:
    if kind == "ed25519":
        return base64.b64encode(run("openssl", "pkeyutl", "-sign", "-rawin", "-in", path, "-inkey", place / "ed25519.key"))
    return base64.b64encode(run("openssl", "dgst", f"-{HASHES[kind]}", "-sign", place / f"{kind}.key", path)) + b"\n"


def statement(path: Path, **fields: Any) -> Dict[str, Any]:
    """An in-toto statement about a file."""
    return dict({"_type": "https://in-toto.io/Statement/v1", "predicateType": "https://slsa.dev/provenance/v1", "predicate": {},
                 "subject": [{"name": "other", "digest": {"sha256": "0" * 64}}, {"name": path.name, "digest": {"sha256": sha256_of(path)}}]},
                **fields)


def dsse(place: Path, path: Path, payload_type: str = "application/vnd.in-toto+json", **fields: Any) -> bytes:
    payload = json.dumps(statement(path, **fields)).encode()
    (place / "pae").write_bytes(b"DSSEv1 %d %s %d %s" % (len(payload_type), payload_type.encode(), len(payload), payload))
    signature = base64.b64encode(run("openssl", "dgst", "-sha256", "-sign", place / "p256.key", place / "pae")).decode()
    return json.dumps({"payloadType": payload_type, "payload": base64.b64encode(payload).decode(),
                       "signatures": [{"keyid": "", "sig": signature}]}).encode() + b"\n"


# name -> (what makes its keys, how it signs a file, its file's suffix, the scheme, [signature])
SCHEMES = {
    "minisign": (minisign_keys, minisign, ".minisig", "minisign", "keys = {}/minisign.pub"),
    "minisign-legacy": (minisign_keys, lambda place, path: minisign(place, path, "-l"), ".minisig", "minisign",
                        "keys = {}/minisign.pub\nlegacy = yes"),
    "signify": (signify_keys, signify, ".sig", "signify", "keys = {}/signify.pub"),
    "dsse": (lambda place: openssl_keys(place, "p256"), dsse, ".intoto.jsonl", "dsse", "keys = {}/p256.pem"),
}  # type: Dict[str, Tuple[Any, Any, str, str, str]]
for _kind in SSH:
    SCHEMES[f"ssh-{_kind}"] = (lambda place, kind=_kind: ssh_keys(place, kind), lambda place, path, kind=_kind: ssh(place, path, kind),
                               ".sig", "ssh", f"allowed_signers = {{}}/signers-{_kind}")
    SCHEMES[f"openssl-{_kind}"] = (lambda place, kind=_kind: openssl_keys(place, kind),
                                   lambda place, path, kind=_kind: openssl(place, path, kind), ".sig", "cosign", f"keys = {{}}/{_kind}.pem")


class Signed:
    """An application that believes one key of a scheme, an artifact, and what else the tool makes of it."""

    def __init__(self, app: App, scheme: str) -> None:
        make_keys, sign, suffix, self.scheme, options = SCHEMES[scheme]
        self.app, self.artifact = app, app.artifact("1.0")
        self.keys, strange = app.directory / "keys", app.directory / "strange"
        for place in (self.keys, strange):
            place.mkdir()
            make_keys(place)
        self.path = self.artifact.with_name(self.artifact.name + suffix)
        self.signature = sign(self.keys, self.artifact)
        other = app.directory / "other"
        other.write_bytes(self.artifact.read_bytes() + b"\0")
        self.others, self.strangers = sign(self.keys, other), sign(strange, self.artifact)
        self.path.write_bytes(self.signature)
        self.sign = sign
        app.configure("[signature]\n" + options.format(self.keys))

    def changed(self) -> Iterator[Tuple[str, bytes]]:
        """The signature's file, changed in ten ways."""
        # What is signed, or signs, is the longest run of base64.
        text = self.signature
        lines = sorted(re.finditer(rb"[A-Za-z0-9+/]{20,}=*", text), key=lambda found: len(found.group()))
        start, end = lines[-1].span()
        first, last = lines[0].span() if b"payload" in text else (start, end)
        for at in (first + 8, (first + last) // 2, last - 6):
            yield f"byte {at}", text[:at] + (b"A" if text[at:at + 1] != b"A" else b"B") + text[at + 1:]
        yield "cut", text[:end - 8] + text[end:]
        yield "longer", text[:end] + b"AAAA" + text[end:]
        yield "doubled", text.strip() + text
        yield "empty", b""
        yield "noise", os.urandom(len(text))
        yield "of other bytes", self.others
        yield "by another key", self.strangers


def text_of(*parts: bytes) -> bytes:
    """Strings as SSH writes them."""
    return b"".join(len(part).to_bytes(4, "big") + part for part in parts)


def armor(blob: bytes) -> bytes:
    return b"-----BEGIN SSH SIGNATURE-----\n" + base64.encodebytes(blob) + b"-----END SSH SIGNATURE-----\n"


def refused(app: App, *words: Any, say: str = "") -> str:
    """A deployment that ends in 4 with nothing published; its message."""
    before = app.releases(), app.current
    result = app.run("deploy", *words, check=4)
    assert (app.releases(), app.current) == before and not app.leftovers(), result.describe()
    assert say in result.data["msg"], result.describe()
    return str(result.data["msg"])
