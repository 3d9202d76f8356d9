"""Command lines that run a program behind walls: namespaces of its own and a bare file system.

Two ways, by name. `bubblewrap` is taken where it works, else `unshare` (util-linux) with walls of
our own. Inside, either way: no network, no process of the host, no /proc, no home, no /etc; system
folders and the interpreter read-only; one bounded work folder, /tmp. Whoever is root outside
becomes a user that owns no other process, because the limit on processes does not bind root.
"""

import json
import os
import secrets
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

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
