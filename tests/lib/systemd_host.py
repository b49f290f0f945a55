"""A real systemd as PID 1 of namespaces of its own: its units, its journal, and what is run inside.

It sees the host's files (its own /run, /tmp, /var/log and /etc/systemd/system aside) and has a
cgroup of its own.  Ended by killing that PID 1: the kernel then ends the rest.
"""

import os
import shutil
import signal
import subprocess
import tempfile
import uuid
from pathlib import Path
from typing import Any, Dict, Optional

from support import DEPLOY, missing, needs, wait_until

SYSTEMD, JOURNALD = "/lib/systemd/systemd", "/lib/systemd/systemd-journald"

INNER = """set -e
mount --make-rprivate /
mount -t proc proc /proc
umount -R /sys/fs/cgroup 2> /dev/null || umount -l /sys/fs/cgroup
mount -t cgroup2 cgroup2 /sys/fs/cgroup
for place in /run /tmp /var/tmp /var/log; do mount -t tmpfs -o mode=1777 tmpfs $place; done
chmod 0755 /run /var/log
mount -t tmpfs -o mode=0755 tmpfs /etc/systemd/system
if [ -e /etc/machine-id ]; then mount --bind {top}/machine-id /etc/machine-id; fi
exec env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin container=lxc SYSTEMD_UNIT_PATH={top}/units:/etc/systemd/system SYSTEMD_LOG_TARGET=journal \\
    {systemd} --system --unit=multi-user.target
"""

# What a unit with default dependencies asks for, and a journal in memory.
UNITS = {name + ".target": "[Unit]\n" for name in ("shutdown", "basic", "timers", "network-online", "umount", "sockets")}
UNITS.update({
    "sysinit.target": "[Unit]\nRequires=systemd-journald.socket\nAfter=systemd-journald.socket\n",
    "multi-user.target": "[Unit]\nRequires=basic.target timers.target systemd-journald.service\nAfter=systemd-journald.service\n",
    "systemd-journald.socket": "[Unit]\nDefaultDependencies=no\n[Socket]\nListenDatagram=/run/systemd/journal/socket\n"
                               "ListenStream=/run/systemd/journal/stdout\nPassCredentials=yes\nTimestamping=us\n",
    "systemd-journald.service": "[Unit]\nDefaultDependencies=no\nRequires=systemd-journald.socket\n"
                                f"[Service]\nType=notify\nExecStart={JOURNALD}\nStandardOutput=null\n"})


class Host:
    """The running systemd; `top` is a directory under /srv for everything a test puts there."""

    def __init__(self) -> None:
        for tool in ("unshare", "nsenter", "systemctl", "journalctl", "systemd-analyze"):
            needs(tool)
        if not os.access(SYSTEMD, os.X_OK) or os.geteuid() != 0:
            missing(f"{SYSTEMD}, and root to start it,")
        Path("/srv").mkdir(exist_ok=True)
        self.top = Path(tempfile.mkdtemp(prefix="deploy-test-", dir="/srv"))
        self.top.chmod(0o755)
        self.deploy = self.top / "bin" / "deploy.py"
        self.deploy.parent.mkdir()
        shutil.copy(str(DEPLOY), str(self.deploy))
        (self.top / "units").mkdir()
        (self.top / "machine-id").write_text(uuid.uuid4().hex + "\n")
        for name, text in UNITS.items():
            (self.top / "units" / name).write_text(text)
        (self.top / "inner.sh").write_text(INNER.format(top=self.top, systemd=SYSTEMD))
        self.cgroup = Path(cgroup2()) / self.top.name
        self.pid = 0
        try:
            self._boot()
        except BaseException:
            self.stop()
            raise

    def _boot(self) -> None:
        self.cgroup.mkdir()
        script = 'echo $$ > "$1/cgroup.procs" && exec unshare -C -p -f -m -u -i --kill-child /bin/sh "$2/inner.sh"'
        self._log = open(str(self.top / "boot.log"), "wb")
        self._starter = subprocess.Popen(["/bin/sh", "-c", script, "sh", str(self.cgroup), str(self.top)], stdin=subprocess.DEVNULL,
                                         stdout=self._log, stderr=subprocess.STDOUT, start_new_session=True)
        children = Path(f"/proc/{self._starter.pid}/task/{self._starter.pid}/children")

        def is_up() -> bool:
            if self._starter.poll() is not None:
                missing("a systemd that boots in namespaces: " + (self.top / "boot.log").read_text("utf-8", "replace")[-500:])
            found = children.read_text().split() if children.exists() else []
            if not found or os.readlink(f"/proc/{found[0]}/exe") != os.path.realpath(SYSTEMD):
                return False
            self.pid = int(found[0])
            return self.run("systemctl", "is-active", "multi-user.target", check=None).stdout.strip() == "active"
        wait_until(is_up, 60, "systemd is up")

    def run(self, *argv: Any, check: Optional[int] = 0, timeout: float = 60) -> Any:
        """Run a command inside; `check` is the exit code that must come, None for any."""
        done = subprocess.run(["nsenter", "-a", "-t", str(self.pid), *map(str, argv)], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, universal_newlines=True, timeout=timeout, cwd="/",
                              env={"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"})
        assert check is None or done.returncode == check, (argv, done.returncode, done.stdout, done.stderr)
        return done

    def unit(self, name: str, text: str, *, reload: bool = True) -> Path:
        """Write a unit file, and let systemd know."""
        path = self.top / "units" / name
        path.write_text(text)
        if reload:
            self.run("systemctl", "daemon-reload")
        return path

    def properties(self, unit: str, *names: str) -> Dict[str, str]:
        """Some properties of a unit."""
        lines = self.run("systemctl", "show", "-p", ",".join(names), unit).stdout.splitlines()
        return {name: value for name, _, value in (line.partition("=") for line in lines)}

    def journal(self, unit: str) -> str:
        """What a unit wrote."""
        return str(self.run("journalctl", "-u", unit, "-o", "cat", "--no-pager").stdout)

    def stop(self) -> None:
        """Kill the inner PID 1, and with it everything inside."""
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
        if hasattr(self, "_starter"):
            if not self.pid:
                self._starter.kill()
            self._starter.wait()
            self._log.close()
        if self.cgroup.exists():
            for path in sorted((path for path in self.cgroup.rglob("*") if path.is_dir()), reverse=True):
                wait_until(lambda: remove_cgroup(path), what=f"{path} is empty")
            wait_until(lambda: remove_cgroup(self.cgroup), what=f"{self.cgroup} is empty")
        shutil.rmtree(str(self.top))


def cgroup2() -> str:
    """Where the unified hierarchy is mounted."""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        if line.split()[2] == "cgroup2":
            return line.split()[1]
    missing("a cgroup2 mount")
    return ""


def remove_cgroup(path: Path) -> bool:
    """Remove a group once nothing runs in it any more."""
    try:
        path.rmdir()
    except OSError:
        return not path.exists()
    return True
