"""A Python that has deploy.py loaded already and forks a child for each run: most of a short run is starting.

Usage: warm.py PROGRAM

Reads one JSON request a line: {"argv", "env", "cwd", "stdout", "stderr", "stopped", "address_space"}.
Answers each with two lines: the child's process id, at once; and at its end
its exit code (negative for a signal), the milliseconds of processor time and
the KiB of memory that it took at its peak.  With "stopped" the child stops
itself before its first step, so that a tracer can take hold of it; SIGCONT
lets it go on.  "address_space" is a limit in bytes, 0 for none.  The end of the
input is the end of the program.
"""

import importlib
import importlib.util
import json
import os
import resource
import signal
import sys
from contextlib import suppress
from typing import Any, Dict

# What deploy.py imports only when a command needs it.
LATER = ("argparse", "bz2", "configparser", "ctypes", "encodings.utf_8_sig", "hmac", "locale", "lzma", "pwd", "queue", "random",
         "select", "shlex", "shutil", "socket", "struct", "subprocess", "threading", "zlib")


def load(path: str) -> Any:
    """Import the program, source or bytecode, and what it will import."""
    for name in LATER:
        with suppress(ImportError):
            importlib.import_module(name)
    spec = importlib.util.spec_from_file_location("deploy", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["deploy"] = module
    spec.loader.exec_module(module)  # type: ignore
    return module


def become(request: Dict[str, Any]) -> None:
    """Take on what a process of its own would have: a session, three streams, a directory, an environment."""
    os.setsid()
    for number, path in enumerate((os.devnull, request["stdout"], request["stderr"])):
        descriptor = os.open(path, os.O_RDWR)
        os.dup2(descriptor, number)
        os.close(descriptor)
    if request["address_space"]:
        resource.setrlimit(resource.RLIMIT_AS, (request["address_space"], request["address_space"]))
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    sys.argv[1:] = request["argv"]


def run_child(module: Any, request: Dict[str, Any]) -> None:
    """Run the program once and end as it would; never returns."""
    exit_code = 1
    try:
        become(request)
        if request["stopped"]:
            os.kill(os.getpid(), signal.SIGSTOP)
        exit_code = module.main(request["argv"])
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        with suppress(OSError, ValueError):
            sys.stderr.flush()
        os._exit(exit_code)


def rehearse(module: Any) -> None:
    """Run it once here: each child has its regular expressions compiled then, a third of a short run."""
    os.dup2(os.open(os.devnull, os.O_RDWR), 1)
    module.main(["--json", "config"])
    sys.stdout.flush()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def serve(module: Any) -> None:
    """Answer requests until there are no more."""
    answers = os.fdopen(os.dup(1), "w")
    rehearse(module)
    for line in iter(sys.stdin.readline, ""):
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            run_child(module, request)
        if request["stopped"]:
            os.waitpid(pid, os.WUNTRACED)
        answers.write(f"{pid}\n")
        answers.flush()
        _, status, usage = os.wait4(pid, 0)
        exit_code = -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
        answers.write(f"{exit_code} {int(1000 * (usage.ru_utime + usage.ru_stime))} {usage.ru_maxrss}\n")
        answers.flush()


if __name__ == "__main__":
    serve(load(sys.argv[1]))
