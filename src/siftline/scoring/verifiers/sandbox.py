"""Runs a response's code and its tests behind walls, within limits, and says how that went.

Command lines that run a program behind walls: namespaces of its own and a bare file system.
"""

import contextlib
import json
import logging
import os
import secrets
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

HERE = Path(__file__).parent
PROGRAM = "/run/sandboxed.py"
SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32")
ENVIRONMENT = {
    "PATH": "/usr/bin:/bin",
    "HOME": "/tmp",
    "TMPDIR": "/tmp",
    "LANG": "C.UTF-8",
    "PYTHONHASHSEED": "0",  # the order of a set of strings is no matter of luck
    "PYTHONUTF8": "1",
}
REMEDY = "apt-get install bubblewrap (Debian), and allow user namespaces where not root"


@dataclass(frozen=True)
class Confinement:
    """What the walls enclose, beside the system's folders.

    Attributes:
        work_bytes: Size of /tmp.
        work_files: Files and folders in it, where `unshare` builds the walls.
        seconds: After so long everything inside ends, even if whoever started it is gone.
    """

    work_bytes: int
    work_files: int
    seconds: float


def python() -> list[str]:
    """The interpreter under this one's virtual environment, with no packages and no settings."""
    return [os.path.realpath(sys.executable), "-B", "-s", "-S", "-P"]


def _binds() -> dict[str, str]:
    """Folders and files by their place inside; links of the system's folders stay links."""
    found = {place: place for place in SYSTEM if Path(place).is_dir() and not os.path.islink(place)}
    for prefix in (sys.base_prefix, sys.base_exec_prefix, str(Path(python()[0]).parent)):
        place = os.path.realpath(prefix)
        if not any(Path(place).is_relative_to(known) for known in found):
            found[place] = place
    if os.path.exists("/etc/ld.so.cache"):
        found["/etc/ld.so.cache"] = "/etc/ld.so.cache"
    return found | {PROGRAM: str(HERE / "sandboxed.py")}


def _links() -> dict[str, str]:
    return {place: os.readlink(place) for place in SYSTEM if os.path.islink(place)}


def lonely_user() -> int | None:
    """A user id without a process, for root to become; None where we are no root.

    It is taken from the top of the ids that are mapped here, at random.
    """
    if os.geteuid() != 0:
        return None
    ranges = [line.split() for line in Path("/proc/self/uid_map").read_text().splitlines()]
    highest = max(int(inside) + int(count) for inside, _, count in ranges) - 2
    return highest - secrets.randbelow(max(1, min(highest // 10, 10**6)))


def bubblewrap(confinement: Confinement, program: Sequence[str]) -> list[str]:
    """The program behind bubblewrap's walls.

    Raises:
        ValueError: if bubblewrap is not installed.
    """
    line = [_found("bwrap"), "--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts",
            "--unshare-cgroup-try", "--die-with-parent", "--new-session"]  # fmt: skip
    if os.geteuid() == 0:
        # The program gives these two up itself, with its user.
        line += ["--cap-drop", "ALL", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    else:
        line += ["--unshare-user", "--uid", "65534", "--gid", "65534"]
    binds = _binds()
    above = {str(parent) for place in binds for parent in Path(place).parents} - {"/"}
    for place in sorted(above - set(binds)):
        line += ["--perms", "0755", "--dir", place]  # bubblewrap itself would close them to others
    for inside, source in binds.items():
        line += ["--ro-bind", source, inside]
    for inside, target in _links().items():
        line += ["--symlink", target, inside]
    line += ["--dev", "/dev", "--remount-ro", "/dev"]
    line += ["--perms", "1777", "--size", str(confinement.work_bytes), "--tmpfs", "/tmp"]
    return [*line, "--remount-ro", "/", "--chdir", "/tmp", "--", *program]


def unshare(confinement: Confinement, program: Sequence[str]) -> list[str]:
    """The program behind walls of our own, in namespaces that util-linux's `unshare` makes.

    Raises:
        ValueError: if it is not installed.
    """
    line = [_found("unshare"), "--mount", "--pid", "--fork", "--kill-child", "--net", "--ipc",
            "--uts", "--cgroup"]  # fmt: skip
    if os.geteuid() != 0:
        line += ["--user", "--map-root-user"]
    walls = {
        "binds": _binds(),
        "links": _links(),
        "work_bytes": confinement.work_bytes,
        "work_files": confinement.work_files,
        "seconds": confinement.seconds,
    }
    return [*line, "--", *python(), str(HERE / "namespaces.py"), json.dumps(walls), *program]


def _found(program: str) -> str:
    path = shutil.which(program)
    if path is None:
        raise ValueError(f"{program} is not installed")
    return path


WAYS = {"bubblewrap": bubblewrap, "unshare": unshare}
"""Isolation by name, in the order of preference."""


logger = logging.getLogger(__name__)

_REPORTS = 1 << 16
"""Bytes of reports beyond which somebody else is writing them."""
_PATIENCE = 4
"""How many times its seconds a run may wait for a processor."""
_KILLED = (128 + signal.SIGKILL, 128 + signal.SIGXCPU, 128 + signal.SIGALRM)


@dataclass(frozen=True)
class Limits:
    """What a run may use; whatever goes beyond ends it.

    Attributes:
        seconds: Of wall time, starting the interpreter included, without the time that its
            processes waited for a processor (up to four times as much): a loaded machine changes
            no verdict. It ends what sleeps; what computes is ended by `cpu_seconds`.
        cpu_seconds: Of each process.
        example_seconds: Of processor, for each statement of a response that is an example of use.
        memory: Bytes of address space of each process.
        processes: Processes and threads at one time; times memory is the most a run can hold.
        open_files: Of each process.
        file_bytes: Size of one file.
        work_bytes: Size of all files in /tmp, the only place that can be written.
        work_files: Number of files in /tmp under `unshare`; bubblewrap has no such option.
        output_bytes: What may be printed.
    """

    seconds: float = 10.0
    cpu_seconds: int = 5
    example_seconds: float = 1.0
    memory: int = 512 << 20
    processes: int = 8
    open_files: int = 64
    file_bytes: int = 16 << 20
    work_bytes: int = 32 << 20
    work_files: int = 4096
    output_bytes: int = 1 << 20

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise ValueError(f"{name} must be positive, not {value}")

    def resources(self) -> dict[str, tuple[int, int]]:
        """Soft and hard resource limits by name, as setrlimit takes them."""
        return {
            "CPU": (self.cpu_seconds, self.cpu_seconds + 1),
            "AS": (self.memory, self.memory),
            "NPROC": (self.processes, self.processes),
            "NOFILE": (self.open_files, self.open_files),
            "FSIZE": (self.file_bytes, self.file_bytes),
            "CORE": (0, 0),
            "MEMLOCK": (0, 0),
        }


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        status: `passed`; `failed`, the code's own fault; `unusable`, the tests' fault; `stopped`
            before anybody knew, by a limit of time or from outside.
        detail: One line about it.
        open: Why a failure proves nothing about the code; empty if it does.
    """

    status: Literal["passed", "failed", "unusable", "stopped"]
    detail: str = ""
    open: str = ""


class Sandbox:
    """Runs code with tests; every run has new walls. Safe to call from several threads.

    Attributes:
        isolation: The name of the walls in use, see `WAYS`.
        limits: What a run may use.
    """

    def __init__(self, limits: Limits | None = None, isolation: str | None = None) -> None:
        """Finds walls that hold on this machine.

        Args:
            limits: What a run may use.
            isolation: Take these walls alone; by default the first that work.

        Raises:
            ValueError: if there are none: code is never run without them.
        """
        self.limits = limits or Limits()
        problems = []
        for name in WAYS if isolation is None else (isolation,):
            if name not in WAYS:
                raise ValueError(f"isolation must be {' or '.join(WAYS)}, not {name!r}")
            self.isolation = name
            try:
                tried = self.run("import os\nif not os.fork(): os._exit(0)", "assert 1 + 1 == 2")
            except (ValueError, OSError) as error:
                problems.append(f"{name}: {error}")
                continue
            if tried.status == "passed":
                logger.info("responses' code runs behind %s", name)
                return
            problems.append(f"{name}: {tried.detail}")
        raise ValueError(f"no sandbox for code ({'; '.join(problems)}): {REMEDY}")

    def run(self, code: str | Sequence[tuple[str, str]], tests: str) -> Outcome:
        """Runs code as a module, then tests with its names.

        Args:
            code: One program, which must not raise; or the parts of a response, each with its kind
                (see `code.Part`), of which only some must not.
            tests: Python statements.
        """
        heard, report = os.pipe()
        limits = self.limits
        settings = {"uid": lonely_user(), "limits": limits.resources(), "report": report}
        confinement = Confinement(
            limits.work_bytes, limits.work_files, limits.seconds * (1 + _PATIENCE) + 1
        )
        started = time.monotonic()
        try:
            process = subprocess.Popen(
                WAYS[self.isolation](confinement, [*python(), PROGRAM, json.dumps(settings)]),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=(report,),
                env=ENVIRONMENT,
                start_new_session=True,
                bufsize=0,
            )
        except BaseException:
            os.close(heard)
            raise
        finally:
            os.close(report)
        job = {"code": code, "seconds": limits.example_seconds}
        watch = _Watch(process, heard, limits, json.dumps(job), tests)
        try:
            return watch.until(started + limits.seconds)
        finally:
            watch.close()


def waited(pid: int) -> float:
    """Seconds that the process under `pid` that waited longest was ready without a processor.

    Zero where the kernel does not count that.
    """
    longest, left = 0.0, [pid]
    while left and len(left) < 1000:
        folder = f"/proc/{left.pop()}"
        with contextlib.suppress(OSError, IndexError, ValueError):
            longest = max(longest, int(Path(folder, "schedstat").read_text().split()[1]) / 1e9)
        with contextlib.suppress(OSError):
            for task in Path(folder, "task").iterdir():
                left += map(int, (task / "children").read_text().split())
    return longest


def _framed(text: str) -> bytes:
    body = text.encode("utf-8", "surrogatepass")
    return f"{len(body):010d}".encode() + body


class _Watch:
    """One run seen from outside: feeds it, listens to it, ends it."""

    def __init__(
        self, process: "subprocess.Popen[bytes]", heard: int, limits: Limits, job: str, tests: str
    ) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self.process, self.heard, self.limits = process, heard, limits
        self.stdin, self.stdout = process.stdin.fileno(), process.stdout.fileno()
        os.set_blocking(self.stdin, False)
        self.secret = secrets.token_hex(16)
        self.unsent = _framed(job)
        self.second = self.secret.encode() + _framed(tests)
        self.reports = b""
        self.printed, self.tail = 0, b""
        self.begun = self.ready = False
        self.open = ""
        self.poll = select.poll()
        self.poll.register(heard, select.POLLIN)
        self.poll.register(self.stdout, select.POLLIN)
        self.poll.register(self.stdin, select.POLLOUT)

    def until(self, deadline: float) -> Outcome:
        """Waits for the end, or makes one at the deadline."""
        while (left := self._left(deadline)) > 0:
            # What is dead says no more, so what it said is read after that was asked.
            dead = self.process.poll() is not None
            ready = self.poll.poll(0 if dead else min(1000 * left, 50))
            for descriptor, _ in ready:
                outcome = self._attend(descriptor)
                if outcome is not None:
                    return outcome
            if dead and not ready:
                return self._ended(self.process.returncode)
        return Outcome("stopped", f"timeout after {self.limits.seconds:g} s")

    def _left(self, deadline: float) -> float:
        left = deadline - time.monotonic()
        if left > 0:
            return left
        return left + min(waited(self.process.pid), self.limits.seconds * _PATIENCE)

    def _attend(self, descriptor: int) -> Outcome | None:
        if descriptor == self.stdin:
            self._send()
            return None
        read = os.read(descriptor, 1 << 16)
        if not read:
            self.poll.unregister(descriptor)
            return None
        if descriptor == self.heard:
            return self._listen(read)
        self.printed += len(read)
        self.tail = (self.tail + read)[-500:]
        if self.printed > self.limits.output_bytes:
            return Outcome("failed", f"printed more than {self.limits.output_bytes} bytes")
        return None

    def _send(self) -> None:
        try:
            self.unsent = self.unsent[os.write(self.stdin, self.unsent[: 1 << 16]) :]
        except BlockingIOError:
            return
        except BrokenPipeError:
            self.unsent = b""
        if not self.unsent:
            self.poll.unregister(self.stdin)

    def _listen(self, read: bytes) -> Outcome | None:
        self.reports += read
        if len(self.reports) > _REPORTS:
            return Outcome("failed", "wrote into the reports")
        *lines, self.reports = self.reports.split(b"\n")
        for line in lines:
            try:
                said = json.loads(line)
                (what, value), = said.items()  # fmt: skip
            except (ValueError, AttributeError):
                return Outcome("failed", "wrote into the reports")
            if what == "begun":
                self.begun = True
            elif what == "ready" and not self.ready:
                self.ready, self.unsent = True, self.second
                self.poll.register(self.stdin, select.POLLOUT)
            elif what == "passed" and self.ready and value == self.secret:
                return Outcome("passed")
            elif what == "open":
                self.open = str(value)
            elif what in ("failed", "unusable"):
                return Outcome(what, str(value), self.open)
            else:
                return Outcome("failed", "wrote into the reports")
        return None

    def _ended(self, code: int) -> Outcome:
        words = self.tail.decode(errors="replace").strip().splitlines()
        if not self.begun:
            return Outcome("stopped", f"no walls, code {code}: {words[-1] if words else 'no word'}")
        if code in _KILLED or code < 0:
            return Outcome("stopped", f"killed, code {code}")
        return Outcome("failed", f"ended with code {code} before its tests were through")

    def close(self) -> None:
        """Ends everything inside: with the first process the kernel ends the namespace's others."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        os.close(self.heard)
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()
