"""An image that holds little more than Python: its own files, deploy.py, and one writable volume.

No shell, no coreutils, no passwd, no locale, no /tmp, no /proc; /dev has null
and urandom.  It is put together from an interpreter's own files by bind mounts
in a mount namespace of its own, read-only but for the volume at /srv.
"""

import os
import re
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Sequence

from support import DEPLOY, Result, checked, compiled, missing, needs

# What is written in C and has libraries of its own.
LINKED = ("_bz2", "_ctypes", "_hashlib", "_lzma", "_ssl", "zlib")
UNKNOWN_UID = 12345
# Where an image has the standard library once more, for a library of links to lead to.
WHOLE = "/whole"


class Python(NamedTuple):
    """An interpreter outside every virtual environment, and where its standard library is."""

    path: str
    library: str

    @classmethod
    def of(cls, executable: str) -> "Python":
        """Ask an interpreter."""
        path = os.path.realpath(executable)
        library = subprocess.check_output([path, "-I", "-c", "import os; print(os.path.dirname(os.__file__))"])
        return cls(path, library.decode().strip())

    def libraries(self) -> List[str]:
        """The shared libraries that the interpreter and the modules of deploy.py load."""
        modules = [str(path) for name in LINKED for path in Path(self.library, "lib-dynload").glob(name + ".*")]
        listed = subprocess.check_output([needs("ldd"), self.path, *modules]).decode()
        return sorted(set(re.findall(r"^\t(?:\S+ => )?(/\S+) \(", listed, re.MULTILINE)))


def library_without(directory: Path, python: Python, patterns: Sequence[str], whole: str = "") -> Path:
    """A standard library of links to an interpreter's own, less the files that match; `whole` is where the links lead."""
    top = directory / "lib" / os.path.basename(python.library)
    for real in (Path(python.library), Path(python.library, "lib-dynload")):
        here = top / real.relative_to(python.library)
        here.mkdir(parents=True)
        for path in real.iterdir():
            if not path.name.endswith(("lib-dynload", "-packages")) and not any(fnmatch(path.name, pattern) for pattern in patterns):
                (here / path.name).symlink_to(Path(whole or python.library) / path.relative_to(python.library))
    return top


def python_without(directory: Path, python: Python, *patterns: str) -> str:
    """An interpreter whose standard library lacks what matches."""
    library_without(directory, python, patterns)
    path = directory / "bin" / "python3"
    path.parent.mkdir()
    shutil.copy(python.path, str(path))
    return str(path)


class Image:
    """A directory tree to be the whole world of a process; `volume` is its /srv, and belongs to `uid`."""

    def __init__(self, directory: Path, python: Python, uid: int = 0, library: Optional[Path] = None) -> None:
        self.python, self.uid, self.top, self.volume = python, uid, directory / "image", directory / "volume"
        self.volume.mkdir(parents=True)
        os.chown(str(self.volume), uid, uid)
        for path in (python.path, *python.libraries()):
            self._add(path)
        # The suite's own Python need not compile it for each run.
        is_own = python.path == os.path.realpath(sys.executable)
        self.program = "/deploy.pyc" if is_own else "/deploy.py"
        self._add(compiled() if is_own else str(DEPLOY), self.program)
        self._mounts = [(self.top, "/", "bind,ro"), (library or Path(python.library), python.library, "bind,ro"),
                        (Path(python.library), WHOLE, "bind,ro"), (self.volume, "/srv", "bind")]
        for device in ("/dev/null", "/dev/urandom"):
            self._add("/dev/null", device)
            self._mounts.append((Path(device), device, "bind"))
        for name in (python.library, WHOLE, "/srv"):
            self.inside(name).mkdir(parents=True, exist_ok=True)
        self._keeper = None  # type: Any

    def inside(self, path: str) -> Path:
        """Where a path of the image is outside of it."""
        return self.top / path.lstrip("/")

    def _add(self, source: str, path: str = "") -> None:
        target = self.inside(path or source)
        target.parent.mkdir(parents=True, exist_ok=True)
        if source == "/dev/null":
            target.touch()
        else:
            shutil.copy(source, str(target))

    def __enter__(self) -> "Image":
        table = self.top.with_name("fstab")
        table.write_text("".join(f"{source} {self.inside(path)} none {options} 0 0\n" for source, path, options in self._mounts))
        self._keeper = subprocess.Popen(
            [needs("unshare"), "-m", "sh", "-c", 'mount -a -T "$1" && echo mounted && exec cat', "sh", str(table)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
        if self._keeper.stdout.readline() != b"mounted\n":
            self.__exit__()
            missing("a mount namespace")
        return self

    def __exit__(self, *details: Any) -> None:
        self._keeper.stdin.close()
        self._keeper.wait()
        self._keeper.stdout.close()

    def argv(self, *args: Any) -> List[str]:
        """The command line that starts Python inside."""
        return [needs("nsenter"), f"--mount=/proc/{self._keeper.pid}/ns/mnt", needs("chroot"),
                f"--userspec={self.uid}:{self.uid}", "--groups=", str(self.top), self.python.path, *map(str, args)]

    def run(self, *args: Any, env: Optional[Dict[str, str]] = None, check: Optional[int] = None, json: bool = True) -> Result:
        """Run deploy.py inside, in an environment that holds nothing unless it is given."""
        argv = self.argv(self.program, *(["--json"] if json else []), *args)
        done = subprocess.run(argv, env=env or {}, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        result = Result(argv, done.returncode, done.stdout.decode("utf-8", "surrogateescape"),
                        done.stderr.decode("utf-8", "surrogateescape"), None)
        return checked(result, json=json, check=check)
