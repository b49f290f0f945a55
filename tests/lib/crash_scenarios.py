"""The commands that are stopped at every system call: how to get there, what may be left, and what a failing call may do.

crash_matrix.py tries every point, the suite a sample of them.
"""

import json
import re
import signal
import sys
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple

from crashes import (Call, QuickApp, Saved, damaged_files, find_call, inject, kill_at, record_calls, recover_and_judge,
                     script, unchanged_part)
from support import FAILURES, App, Result, sha256_of

KILL = "/bin/sh -c 'kill -9 $PPID'"
FAILS_FOR_1_2 = "/bin/sh -c 'test $DEPLOY_VERSION != 1.2'"
SICK = f"keep_releases = 1\n[service:sick]\ncommand = {FAILS_FOR_1_2}\n"
# It hangs until its deadline, so that it is asked once: every run must make the same calls.
HANGS = ("keep_releases = 1\n[probe:hangs]\ncommand = /bin/sh -c 'test $DEPLOY_VERSION != 1.2 || exec sleep 9'\n"
         "deadline = 800ms\nsuccesses = 1\n")
NEXT = "9.9"


class Scenario(NamedTuple):
    """One command to be stopped again and again.

    `before` is the version that is live when it begins, `after` those that may be live once one `recover` was run, the
    first of them where nothing stops the command; `tried` is one that may be live only until then, `given_up` one that
    may be live where a call fails: a recovery that meets an error goes back.  `judge` says what else is wrong then.
    """

    prepare: Callable[[App], List[Any]]
    before: Optional[str]
    after: List[Optional[str]]
    exit_code: int = 0
    tried: Optional[str] = None
    given_up: Optional[str] = None
    judge: Callable[[App], List[str]] = lambda app: []


def killed(app: App, *arguments: Any) -> Result:
    """Run deploy.py with a configuration in which something kills it."""
    result = app.run(*arguments, json=False)
    assert result.exit_code == -signal.SIGKILL, f"was not killed\n{result.describe()}"
    return result


# -- how to get there ------------------------------------------------------------

def first(app: App) -> List[Any]:
    """A first deployment: nothing is there yet, not even the root."""
    app.root.rmdir()
    return ["deploy", app.artifact("1.0")]


def first_failing(app: App) -> List[Any]:
    """A first deployment whose service does not start, so that nothing is live again."""
    app.configure(SICK)
    return ["deploy", app.artifact("1.2")]


def second(app: App) -> List[Any]:
    """A deployment that prunes 1.0."""
    app.deploy("1.0")
    app.deploy("1.1")
    app.configure("keep_releases = 1\n")
    return ["deploy", app.artifact("1.2")]


def failing(app: App) -> List[Any]:
    """A deployment whose probe fails, so that 1.1 comes back."""
    app.deploy("1.1")
    app.configure(HANGS)
    return ["deploy", app.artifact("1.2")]


def undone(app: App) -> List[Any]:
    """A deployment that fails before activation and is undone."""
    app.deploy("1.1")
    app.configure(f"[hooks]\npre_activate = {FAILS_FOR_1_2}\n")
    return ["deploy", app.artifact("1.2")]


def everything(app: App) -> List[Any]:
    """A deployment with all that a release can have: shared directories, a template, hooks, a service, a probe."""
    made = script(app.directory / "make", 'echo made > "$DEPLOY_RELEASE_PATH/lib/made"')
    app.configure(
        "shared_dirs =\n    log\n    var/cache\n[vars]\ncolour = blue\n"
        "[template:app]\nsource = app.tmpl\ntarget = etc/app.conf\n"
        f"[hooks]\npre_stage = true\npost_stage = {made}\npre_activate = true\npost_activate = true\npost_deploy = true\n"
        "[service:app]\ncommand = true\n[probe:app]\ncommand = true\nsuccesses = 1\n")
    template = {"app.tmpl": "colour = ${colour}\n"}
    app.deploy("1.1", template)
    app.artifact(NEXT, template)
    return ["deploy", app.artifact("1.2", template)]


DATA = "/bin/sh -c 'cd $DEPLOY_SHARED_PATH && "
MIGRATE = (f"[migrate]\ncheck = {DATA}test ! -e data-$DEPLOY_VERSION || exit 0; exit 1'\nbackup = true\n"
           f"up = {DATA}mkdir data-$DEPLOY_VERSION'\ndown = {DATA}rm -rf data-$DEPLOY_VERSION'\n[maintenance]\nduring = migrate\n")


def migrating(app: App) -> List[Any]:
    """A deployment that migrates the data, with the maintenance flag up."""
    app.configure(MIGRATE)
    app.deploy("1.1")
    return ["deploy", app.artifact("1.2")]


def migrating_back(app: App) -> List[Any]:
    """One whose service does not start, so that 1.1 and its data come back."""
    migrating(app)
    app.configure(MIGRATE + SICK.partition("\n")[2])
    return ["deploy", app.artifact("1.2")]


def rollback_of_data(app: App) -> List[Any]:
    """A rollback by hand over two releases that migrated the data."""
    app.configure(MIGRATE)
    for version in ("1.0", "1.1", "1.2"):
        app.deploy(version)
    return ["rollback", "1.0"]


def wrong_data(app: App) -> List[str]:
    """Whether the data are those of the releases whose record says that they have migrated them."""
    records = [json.loads(path.read_text()) for path in (app.root / ".deploy" / "releases").glob("*.json")]
    migrated = {f"data-{record['version']}" for record in records if record["migrated"]}
    found = {path.name for path in (app.root / "shared").iterdir()}
    # A person was told where no record could be written, and `down` may run once more.
    is_told = app.history()[-1]["result"] == "left_live" and found < migrated
    if (migrated == found or is_told) and f"data-{app.version}" in found:
        return []
    return [f"{app.version} is live, {sorted(migrated)} migrated, found are {sorted(found)}"]


def candidate(app: App) -> List[Any]:
    """A deployment that starts its release on a port of its own first."""
    app.deploy("1.1")
    listen = script(app.directory / "listen", f"""exec {sys.executable} -IS -c 'import socket, sys
listener = socket.socket()
listener.bind(("127.0.0.1", int(sys.argv[1])))
listener.listen(5)
while True: listener.accept()' $1""")
    app.configure(f"[candidate]\ncommand = {listen} ${{DEPLOY_CANDIDATE_PORT}}\n")
    return ["deploy", app.artifact("1.2")]


def candidate_failing(app: App) -> List[Any]:
    """A deployment whose release ends at once there: it stays, and is bad."""
    candidate(app)
    refuse = script(app.directory / "refuse", f"test $DEPLOY_VERSION != 1.2 && exec {app.directory}/listen $1")
    app.configure(f"keep_releases = 1\n[candidate]\ncommand = {refuse} ${{DEPLOY_CANDIDATE_PORT}}\n")
    return ["deploy", app.artifact("1.2")]


def slots(app: App) -> List[Any]:
    """A deployment into the idle one of two slots, whose units are always up."""
    systemctl = script(app.directory / "systemctl", "printf '%s\\n' LoadState=loaded UnitFileState=static "
                       "ActiveState=active SubState=running Type=simple Result=success")
    app.configure(f"keep_releases = 1\n[slots]\nblue = 1\ngreen = 2\nunit = x@${{slot}}\ninclude = to ${{port}}\nreload = true\n"
                  f"drain = 0s\nsettle = 0s\nsystemctl = {systemctl}\n[service:sick]\ncommand = {FAILS_FOR_1_2}\n")
    for version in ("1.0", "1.1"):
        app.deploy(version)
    app.config.write_text(app.config.read_text().partition("[service:sick]")[0])
    return ["deploy", app.artifact("1.2")]


def slots_failing(app: App) -> List[Any]:
    """The same with a service that fails behind the switch."""
    arguments = slots(app)
    app.config.write_text(app.config.read_text() + f"[service:sick]\ncommand = {FAILS_FOR_1_2}\n")
    return arguments


def recover_slots(app: App) -> List[Any]:
    """The recovery of one that was killed by its own reload: live.conf is the new one, `current` is not."""
    arguments, text = slots(app), app.config.read_text()
    app.config.write_text(text.replace("reload = true", f"reload = {KILL}"))
    killed(app, *arguments)
    app.config.write_text(text)
    return ["recover"]


def stage(app: App) -> List[Any]:
    """A release is staged beside the live one."""
    app.deploy("1.1")
    return ["stage", app.artifact("1.2")]


def sync(app: App) -> List[Any]:
    """A release is found in a directory with an index, where an older one was seen."""
    app.artifact("1.1")
    follow = f"[artifact]\nmatch = myapp-@v.tar.gz\n[source]\nurl = {app.directory / 'artifacts'}\n"
    app.configure(follow)
    for versions in (["1.1"], ["1.1", "1.2"]):
        lines = [f"{sha256_of(app.artifact(version))}  myapp-{version}.tar.gz\n" for version in versions]
        (app.directory / "artifacts" / "SHA256SUMS").write_text("".join(lines))
        if versions == ["1.1"]:
            app.run("sync", check=0)
    return ["sync"]


def activate(app: App) -> List[Any]:
    """A staged release goes live."""
    app.deploy("1.1")
    app.run("stage", app.artifact("1.2"), check=0)
    return ["activate", "1.2"]


def rollback(app: App) -> List[Any]:
    """A rollback by hand."""
    app.deploy("1.0")
    app.deploy("1.1")
    return ["rollback"]


def prune(app: App) -> List[Any]:
    """Three releases to be pruned."""
    for version in ("1.0", "1.1", "1.2", "1.3"):
        app.deploy(version)
    app.configure("keep_releases = 1\n")
    return ["prune"]


def pin(app: App) -> List[Any]:
    """The live release is pinned."""
    app.deploy("1.1")
    return ["pin", "1.1"]


def recover_undo(app: App) -> List[Any]:
    """The recovery of a deployment that was killed while it unpacked, with a torn line in the history beside."""
    app.deploy("1.1")
    artifact, saved = app.artifact("1.2"), Saved(app)
    calls = record_calls(app, "deploy", artifact, check=0)
    saved.restore()
    kill_at(app, find_call(calls, "symlinkat", r"\.new-.*\"data\""), "deploy", artifact)
    with (app.root / ".deploy" / "history.jsonl").open("ab") as stream:
        stream.write(b'{"sequence": 2, "at": "20')
    return ["recover"]


def recover_published(app: App) -> List[Any]:
    """The recovery of a deployment that was killed when its release had its name and no record yet."""
    app.deploy("1.1")
    app.configure(f"[hooks]\npost_stage = {KILL}\n")
    killed(app, "deploy", app.artifact("1.2"))
    app.configure()
    return ["recover"]


def recover_forward(app: App) -> List[Any]:
    """The recovery of a deployment that was killed after the switch and is well."""
    app.deploy("1.1")
    app.configure(f"[hooks]\npost_activate = {KILL}\n")
    killed(app, "deploy", app.artifact("1.2"))
    app.configure()
    return ["recover"]


def recover_back(app: App) -> List[Any]:
    """The recovery of a deployment that must go back."""
    app.deploy("1.1")
    app.configure(SICK + f"[hooks]\npost_activate = {KILL}\n")
    killed(app, "deploy", app.artifact("1.2"))
    app.configure(SICK)
    return ["recover"]


def recover_by_hand(app: App) -> List[Any]:
    """A person settles on the old release after a kill behind the switch."""
    recover_forward(app)
    return ["recover", "--to", "1.1"]


SCENARIOS = {
    "deploy-first": Scenario(first, None, ["1.0", None]),
    "deploy-second": Scenario(second, "1.1", ["1.2", "1.1"]),
    "deploy-everything": Scenario(everything, "1.1", ["1.2", "1.1"]),
    "deploy-migrating": Scenario(migrating, "1.1", ["1.2", "1.1"], judge=wrong_data),
    "deploy-migrating-back": Scenario(migrating_back, "1.1", ["1.1"], 5, "1.2", judge=wrong_data),
    "rollback-of-data": Scenario(rollback_of_data, "1.2", ["1.0", "1.2"], judge=wrong_data),
    "deploy-undone": Scenario(undone, "1.1", ["1.1"], 1),
    "deploy-failing": Scenario(failing, "1.1", ["1.1"], 5, "1.2"),
    "deploy-candidate": Scenario(candidate, "1.1", ["1.2", "1.1"]),
    "deploy-candidate-failing": Scenario(candidate_failing, "1.1", ["1.1"], 1),
    "deploy-first-failing": Scenario(first_failing, None, [None], 5, "1.2"),
    "deploy-slots": Scenario(slots, "1.1", ["1.2", "1.1"]),
    "deploy-slots-failing": Scenario(slots_failing, "1.1", ["1.1"], 5, "1.2"),
    "recover-slots": Scenario(recover_slots, "1.1", ["1.2"], given_up="1.1"),
    "stage": Scenario(stage, "1.1", ["1.1"]),
    "sync": Scenario(sync, "1.1", ["1.2", "1.1"]),
    "activate": Scenario(activate, "1.1", ["1.2", "1.1"]),
    "rollback": Scenario(rollback, "1.1", ["1.0", "1.1"]),
    "prune": Scenario(prune, "1.3", ["1.3"]),
    "pin": Scenario(pin, "1.1", ["1.1"]),
    "recover-undo": Scenario(recover_undo, "1.1", ["1.1"]),
    "recover-published": Scenario(recover_published, "1.1", ["1.1"]),
    "recover-forward": Scenario(recover_forward, "1.2", ["1.2"], given_up="1.1"),
    "recover-back": Scenario(recover_back, "1.2", ["1.1"]),
    "recover-by-hand": Scenario(recover_by_hand, "1.2", ["1.1", "1.2"]),
}  # type: Dict[str, Scenario]

# What a call can fail with.  A new name needs space, a descriptor and the right to it; data needs space and a disk.
NAMING = ("ENOSPC", "EIO", "EDQUOT", "EROFS", "EMFILE", "EACCES")
DATA = ("ENOSPC", "EIO", "EDQUOT")
ERRORS = {"write": DATA, "pwrite64": DATA, "fsync": DATA, "syncfs": DATA, "ftruncate": DATA, "flock": ("ENOLCK",),
          "fchmod": ("EIO", "EROFS", "EACCES"), "fchmodat": ("EIO", "EROFS", "EACCES")}

READING = {"getdents64": ("EIO",), "open": ("EIO", "EMFILE", "EACCES"), "openat": ("EIO", "EMFILE", "EACCES")}

# Which exit codes a failing call may lead to, by how far the run is; once the verdict is in, it is the run's own.
BY_PHASE = {"": (1, 3), "staging": (1,), "intent": (1,), "switched": (5,), "rolling_back": (5, 6)}
# What is said of commands that need no journal, or find one.
ANY = (0, 1, 3, 5, 6)
BY_COMMAND = {"prune": (0, 1, 3), "pin": (1, 3), "recover": (0, 1, 3, 6)}
# What only makes the next run faster, or is made anew by it: nobody need be told that it could not be written.
SILENT = re.compile(r"\.reserve\.|after reserve|(ftruncate|write)\(.*\.deploy/lock>")


class Point(NamedTuple):
    """One call of a scenario: the run is killed there (`error` is empty), or the call fails with an error."""

    call: Call
    error: str = ""

    @property
    def reads(self) -> bool:
        """Whether the call changes nothing: the run may do without what it would have read."""
        return self.call.name == "getdents64" or "O_RDONLY" in self.call.text

    @property
    def silent(self) -> bool:
        """Whether nobody need be told."""
        return bool(SILENT.search(self.call.text))

    def describe(self) -> str:
        """What was done where."""
        return f"{self.error or 'killed'} at {self.call.name} {self.call.number} ({self.call.phase or 'no journal'}): " \
               f"{self.call.text[:300]}"


class Stage:
    """A scenario that was prepared in a directory, ready to be played again and again."""

    def __init__(self, name: str, directory: Any) -> None:
        self.scenario, self.app = SCENARIOS[name], QuickApp(directory)
        self.arguments = self.scenario.prepare(self.app)
        self.next = self.app.directory / "artifacts" / f"myapp-{NEXT}.tar.gz"
        if not self.next.exists():
            self.app.artifact(NEXT)
        self.saved = Saved(self.app)
        self.calls = record_calls(self.app, *self.arguments, check=self.scenario.exit_code)
        assert len(self.calls) > 10, self.calls
        assert self.app.version == self.scenario.after[0], f"undisturbed, it ends with {self.app.version} live"

    def points(self, what: str) -> List[Point]:
        """Every point: `kill`, `errno`, or `read`, where it is the reading calls that fail."""
        if what == "kill":
            return [Point(call) for call in self.calls]
        if what == "read":
            self.saved.restore()
            calls = record_calls(self.app, *self.arguments, reading=True)
            return [Point(call, error) for call in calls for error in READING[call.name]]
        return [Point(call, error) for call in self.calls for error in ERRORS.get(call.name, NAMING)]

    def try_point(self, point: Point, number: int = 0) -> List[str]:
        """Stop the command there: what is not as it must be afterwards.  Every third time the next deployment recovers."""
        for _ in range(5):
            problems = self._try_once(point, number)
            # A run that waits for another process makes some of its calls more often than it did when they were counted.
            if not any("instead of" in problem or "was not hit" in problem for problem in problems):
                break
        return problems

    def _try_once(self, point: Point, number: int) -> List[str]:
        self.saved.restore()
        try:
            if point.error:
                return self._fail(point) + self._recovered(self._possible())
            kill_at(self.app, point.call, *self.arguments)
            problems = self._judge_at_rest([self.scenario.before, self.scenario.tried] + self.scenario.after)
            return problems + (self._deployed_over() if number % 3 == 2 else self._recovered(self.scenario.after))
        except FAILURES as failure:
            return [str(failure)]

    def _possible(self) -> List[Optional[str]]:
        """What may be live after a call that failed."""
        return self.scenario.after + ([self.scenario.given_up] if self.scenario.given_up else [])

    def _judge_at_rest(self, versions: List[Optional[str]]) -> List[str]:
        """Before anything is recovered: `current` is the old or the new release, complete."""
        app = self.app
        if app.version not in versions:
            return [f"before recovery, live is {app.version} ({app.current}), not one of {versions}"]
        return damaged_files(app, str(app.current)) if app.current else []

    def _recovered(self, versions: List[Optional[str]]) -> List[str]:
        if not (self.app.root / ".deploy").exists():
            return self._never_begun()
        return recover_and_judge(self.app, versions) + self._asked() + self.scenario.judge(self.app)

    def _never_begun(self) -> List[str]:
        """Nothing was made yet, or little more than the root: recover says so and changes nothing."""
        before, found = unchanged_part(self.app.root), self.app.run("recover")
        wrong = found.exit_code not in (0, 2) or self.app.releases() or unchanged_part(self.app.root) != before
        return [f"nothing was deployed, but: {found.describe()}"] if wrong else []

    def _deployed_over(self) -> List[str]:
        """The next deployment does what `recover` would have done."""
        result = self.app.run("deploy", self.next)
        problems = [] if result.exit_code == 0 else [f"the next deployment: {result.describe()}"]
        return problems + recover_and_judge(self.app, [NEXT], lambda found: unchanged(found, problems)) + self._asked() \
            + self.scenario.judge(self.app)

    def _asked(self) -> List[str]:
        """What deploy.py itself finds wrong."""
        asked = [["history", "--verify"]] + ([["verify"]] if self.app.current else [])
        results = [self.app.run(*command) for command in asked]
        return [result.describe() for result in results if result.exit_code]

    def _fail(self, point: Point) -> List[str]:
        """Let the call fail: whether exit code, words and what is live fit together."""
        result, scenario = inject(self.app, point.call, f"error={point.error}", *self.arguments), self.scenario
        # Only a way back that failed too may leave the release that it was to leave.
        left = [scenario.tried] if result.exit_code == 6 else []
        problems = self._judge_at_rest([scenario.before] + self._possible() + left)
        expected = self._expected(point)
        if result.exit_code not in expected:
            problems.append(f"exit code {result.exit_code}, not one of {expected}")
        if self.app.version not in self._live_after(result.exit_code):
            problems.append(f"exit code {result.exit_code}, but live is {self.app.version}")
        return [f"{problem}\n{result.describe()}" for problem in problems + self._judge_words(point, result)]

    def _live_after(self, exit_code: int) -> List[Optional[str]]:
        """What an exit code says of `current`."""
        if self.arguments[0] == "recover" or exit_code == 6:
            return [self.scenario.before, self.scenario.tried] + self._possible()
        return [self.scenario.before] if exit_code else [self.scenario.after[0]]

    def _expected(self, point: Point) -> Tuple[int, ...]:
        if point.reads:
            return ANY
        if point.silent:
            return (self.scenario.exit_code,)
        by_phase = dict(BY_PHASE, closed=(self.scenario.exit_code,))
        if self.arguments[0] == "rollback":
            by_phase["switched"] = (6,)  # what it leaves was not seen to be healthy: it stays where it was to go
        return BY_COMMAND.get(self.arguments[0]) or by_phase[point.call.phase]

    def _judge_words(self, point: Point, result: Result) -> List[str]:
        """An error is one line that says what failed, with a hint; a success says which error it lived with."""
        text, problems = result.stderr, []
        if result.exit_code == 70 or "Traceback" in text:
            problems.append("an internal error")
        if result.exit_code and not re.search(r"^deploy\.py: error: .+\nhint: \S", text, re.MULTILINE):
            problems.append("no error with a hint")
        may_be_silent = point.reads and result.exit_code == self.scenario.exit_code or point.silent
        if point.error not in text and not may_be_silent:
            problems.append(f"{point.error} is not told")
        if result.exit_code == 6 and not re.search("recover|activate", text.rpartition("hint: ")[2]):
            problems.append("exit code 6 without what to do")
        return problems


def unchanged(result: Result, problems: List[str]) -> None:
    """Note it where a recovery found something to do."""
    if result.data["changed"]:
        problems.append(f"a deployment left something to recover: {result.describe()}")


def sample(points: List[Point], stride: int, offset: int = 0) -> List[Point]:
    """Every so many points from an offset on, and the first of each phase."""
    seen, chosen = set(), []
    for number, point in enumerate(points):
        if number % stride == offset % stride or point.call.phase not in seen:
            chosen.append(point)
        seen.add(point.call.phase)
    return chosen
