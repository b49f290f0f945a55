#!/usr/bin/python3
"""A deployment from end to end, with a real web application, in a temporary directory.

Usage: python3 tests/demo/demo.py

Packs three versions of tests/demo/app, the last one broken, deploys them,
lets the broken one roll back by itself, rolls back by hand, and looks at what
deploy.py recorded.  Everything shown is real output, and checked: a demo that
shows something wrong ends with an error.
"""

import http.client
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from typing import Dict, List, Tuple

HERE = os.path.dirname(os.path.abspath(__file__))
DEPLOY = os.path.abspath(os.path.join(HERE, "..", "..", "deploy.py"))
# Started with an empty environment, Python may not know where it lives.
PYTHON = sys.executable or os.path.realpath("/proc/self/exe")

CONFIGURATION = """\
[deploy]
application = shop
root = shop

[artifact]
match = shop-@v.tar.gz

[service:web]
command = {python} -B restart.py {port} {state}

[probe:web]
url = http://127.0.0.1:{port}/health
json.status = ok
release = json:version
period = 200ms
deadline = 5s
"""


def show(text: str) -> None:
    """Print, whatever the locale can encode."""
    sys.stdout.flush()
    sys.stdout.buffer.write((text + "\n").encode("utf-8", "surrogateescape"))
    sys.stdout.buffer.flush()


def expect(what: str, found: object, wanted: object) -> None:
    """End the demo when what it shows is not what it says."""
    if found != wanted:
        raise SystemExit(f"demo: {what}: expected {wanted!r}, found {found!r}")


class Demo:
    """A temporary host: one directory, one port, one application."""

    def __init__(self, directory: str) -> None:
        self.directory = directory
        self.current = os.path.join(directory, "shop", "current")
        self.environment = {"PATH": os.environ.get("PATH", os.defpath), "HOME": directory, "LANG": "C.UTF-8"}
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]  # type: int

    def write_sources(self, version: str, files: Dict[str, str]) -> None:
        """Write the source directory of one version."""
        source = os.path.join(self.directory, f"shop-{version}")
        shutil.copytree(os.path.join(HERE, "app"), source, ignore=shutil.ignore_patterns("__pycache__"))
        for name, text in dict(files, VERSION=version + "\n").items():
            with open(os.path.join(source, name), "w") as stream:
                stream.write(text)

    def write_configuration(self) -> None:
        """Write deploy.ini, which deploy.py finds in its working directory."""
        with open(os.path.join(self.directory, "deploy.ini"), "w") as stream:
            stream.write(CONFIGURATION.format(
                python=shlex.quote(PYTHON), port=self.port, state=shlex.quote(self.directory)))

    def run(self, *args: str, exit_code: int = 0) -> str:
        """Show a command and its real output; its exit code must be the one expected."""
        show("\n$ deploy.py " + " ".join(shlex.quote(arg) for arg in args))
        done = subprocess.run([PYTHON, DEPLOY] + list(args), cwd=self.directory, env=self.environment,
                              stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=60)
        output = done.stdout.decode("utf-8", "surrogateescape").rstrip("\n")
        show(output)
        if exit_code:
            show(f"(exit code {done.returncode})")
        expect(f"exit code of {args[0]}", done.returncode, exit_code)
        return output

    def ask(self) -> Tuple[int, str]:
        """Ask the running server for its health: (HTTP status, version)."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        try:
            connection.request("GET", "/health")
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read().decode("utf-8"))["version"]
        finally:
            connection.close()

    def expect_live(self, version: str) -> None:
        """Check that the link, the files and the running process all say one version."""
        target = os.readlink(self.current)
        expect("target of current", (os.path.dirname(target), target.endswith("-" + version)), ("releases", True))
        with open(os.path.join(self.current, "VERSION")) as stream:
            expect("current/VERSION", stream.read().strip(), version)
        expect("the running server's answer", self.ask(), (200, version))
        show(f"=> current -> {target}, and the server answers {version}")

    def stop_server(self) -> None:
        """Stop the server, if one runs."""
        subprocess.run([PYTHON, "-B", os.path.join(HERE, "app", "restart.py"), "--stop", self.directory],
                       timeout=30, check=True)

    def play(self) -> None:
        """Pack, deploy, fail, roll back, look."""
        show("Three versions of a small web application; 1.2.0 is broken: its /health answers 500.")
        for version, files in (("1.0.0", {}), ("1.1.0", {}), ("1.2.0", {"BROKEN": "yes\n"})):
            self.write_sources(version, files)
            self.run("pack", f"shop-{version}")
            expect("the packed artifact exists", self.packed(version), [True, True])
        self.write_configuration()
        self.run("deploy", "shop-1.0.0.tar.gz")
        self.expect_live("1.0.0")
        self.run("deploy", "shop-1.1.0.tar.gz")
        self.expect_live("1.1.0")
        show("\nThe broken version goes live, fails its probe, and the one before comes back by itself:")
        self.run("deploy", "shop-1.2.0.tar.gz", exit_code=5)
        self.expect_live("1.1.0")
        show("\nBack to the first one, by hand:")
        self.run("rollback")
        self.expect_live("1.0.0")
        self.look()

    def packed(self, version: str) -> List[bool]:
        """Whether the artifact and its checksum are there."""
        name = os.path.join(self.directory, f"shop-{version}.tar.gz")
        return [os.path.exists(name), os.path.exists(name + ".sha256")]

    def look(self) -> None:
        """Show what deploy.py knows about all this."""
        expect("status names the live version", "1.0.0" in self.run("status"), True)
        releases = self.run("releases")
        expect("releases lists them all", [version in releases for version in ("1.0.0", "1.1.0", "1.2.0")], [True] * 3)
        expect("releases marks the bad one", "bad" in releases, True)
        expect("history names the failure", "1.2.0" in self.run("history"), True)
        self.run("verify")


def main() -> None:
    """Play the demo, and clean up whatever happens."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))
    directory = tempfile.mkdtemp(prefix="deploy-demo-")
    demo = Demo(directory)
    try:
        demo.play()
    finally:
        demo.stop_server()
        shutil.rmtree(directory)
    show("\nThe demo showed what it promised.")


if __name__ == "__main__":
    main()
