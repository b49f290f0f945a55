"""The README's pipelines: their YAML is YAML, and their shell hands a signed artifact over to a host that takes it."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Dict, List

import pytest

from support import DEPLOY, TOP, deep, fake_command, missing, needs
from tables import blocks as indented_blocks, section

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="what sudo delegates is root's")


def blocks(language: str) -> List[str]:
    """The README's code blocks of a language under From CI."""
    return re.findall(rf"(?ms)^```{language}\n(.*?)^```", section("From CI"))


def scripts() -> Dict[str, str]:
    """The shell of each pipeline, by whose it is."""
    gitlab, github = blocks("yaml")
    [jenkins] = blocks("groovy")
    return {
        "gitlab": re.search(r"(?m)^    - (sh .*)$", gitlab).group(1),  # type: ignore
        "github": re.search(r"(?ms)- run: \|\n(.*)", github).group(1),  # type: ignore
        "jenkins": re.search(r"sh '(.*)'\n", jenkins).group(1)}  # type: ignore


def hand_over() -> str:
    """The script that all of them call."""
    [text] = [block for block in indented_blocks() if "# hand-over.sh" in block]
    return text


@deep
@pytest.mark.parametrize("whose", ["gitlab", "github", "jenkins"])
def test_a_pipeline_hands_a_signed_artifact_over(whose: str, tmp_path: Path) -> None:
    needs("ssh-keygen")
    job, host, tools = tmp_path / "job", tmp_path / "host", tmp_path / "bin"
    (job / "build").mkdir(parents=True)
    (job / "build" / "index.html").write_text("shop")
    shutil.copy(str(DEPLOY), str(job / "deploy.py"))
    key = tmp_path / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "ci", "-f", str(key)], check=True)
    inbox = host / "inbox"
    inbox.mkdir(parents=True)
    signers = host / "signers"
    signers.write_text("ci@example.com " + key.with_suffix(".pub").read_text())
    config = host / "shop.ini"
    config.write_text(f"[deploy]\nroot = {host}/root\ninbox = {inbox}\ndelegated = deploy\n[signature]\nallowed_signers = {signers}\n")
    # The network and sudo, which are no part of this: what is copied lies on this host, and what is run is run here.
    fake_command(tools, "scp", "import shutil\nfor path in sys.argv[1:-1]:\n    shutil.copy(path, sys.argv[-1].partition(':')[2])")
    fake_command(tools, "ssh", "os.execvp('sh', ['sh', '-c', ' '.join(sys.argv[2:])])")
    (tools / "sudo").write_text(f"#!/bin/sh\nexec env -i PATH=/usr/bin:/bin {sys.executable} \"$@\"\n")
    (tools / "sudo").chmod(0o755)
    shared = hand_over().replace("/srv/inbox", str(inbox)).replace("/etc/deploy/shop.ini", str(config)).replace(
        "/usr/local/sbin/deploy.py", str(DEPLOY))
    (job / "hand-over.sh").write_text(shared)
    version = {name: "1.4.2" for name in ("CI_COMMIT_TAG", "GITHUB_REF_NAME", "TAG_NAME")}
    url = {name: "https://ci.example.com/shop/actions/runs/7" for name in ("CI_PIPELINE_URL", "BUILD_URL")}
    url.update(GITHUB_SERVER_URL="https://ci.example.com", GITHUB_REPOSITORY="shop", GITHUB_RUN_ID="7")
    env = dict(os.environ, PATH=f"{tools}:{os.environ['PATH']}", TARGET="shop.example.com",
               SIGNING_KEY=key.read_text() if whose == "github" else str(key), **version, **url)
    done = subprocess.run(["sh", "-eu", "-c", scripts()[whose]], cwd=str(job), env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0, done.stdout.decode("utf-8", "replace")
    [record] = [json.loads(path.read_text()) for path in (host / "root" / ".deploy" / "releases").iterdir()]
    assert record["version"] == "1.4.2" and record["note"] == "https://ci.example.com/shop/actions/runs/7"
    assert record["artifact"]["signature"]["signer"] == "ci@example.com"


def test_the_yaml_of_the_pipelines_is_yaml() -> None:
    python = TOP / ".cache" / "ansible-newest" / "bin" / "python"
    if not python.exists():
        missing("PyYAML, which comes with Ansible")
    for text in blocks("yaml"):
        done = subprocess.run([str(python), "-c", "import json, sys, yaml; print(json.dumps(yaml.safe_load(sys.stdin), default=str))"],
                              input=text.encode("utf-8"), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert done.returncode == 0, done.stderr.decode("utf-8", "replace")
        found = json.loads(done.stdout)
        assert "script" in found.get("deploy", {}) or "hand-over.sh" in found["jobs"]["deploy"]["steps"][1]["run"]
