"""Locks on files: who waits says for whom, and a file system that can't lock is told.

A lock (`flock`) belongs to the process, so that of a killed one is free at once. On one machine it
always holds. Between machines it holds on NFS and on SMB where the server lets it, not on most
other network file systems; see `warn_if_shared`.
"""

import errno
import fcntl
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import IO

logger = logging.getLogger(__name__)

# fmt: off
SHARED = ("nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "afs", "beegfs", "ceph", "glusterfs",
          "gpfs", "lustre", "ocfs2", "panfs", "virtiofs")
# fmt: on
"""Types of file systems that other machines may write to at the same time."""
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
LOOK_SECONDS = 1.0


class Held(ValueError):
    """Another process holds a lock."""


@contextmanager
def held(
    path: Path, what: str, *, wait: bool, say: Callable[[str], None] = logger.warning
) -> Iterator[None]:
    """Holds the lock of a file while the body runs.

    Args:
        path: The file; made where it is not there.
        what: What it stands for, as messages name it.
        wait: Whether to wait while somebody else holds it; `say` is told for whom.
        say: Takes a line.

    Raises:
        Held: if somebody else holds it and this is not to wait; it names them.
        ValueError: if the file system has no locks.
    """
    with path.open("a") as handle:
        take(handle, path, what, wait=wait, say=say)
        yield


def take(
    handle: IO[str],
    path: Path,
    what: str,
    *,
    wait: bool,
    say: Callable[[str], None] = logger.warning,
) -> None:
    """Locks an open file until it is closed; see `held`."""
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            who = holder(path)
            if not wait:
                raise Held(f"{what} is being written by another run ({who}): wait for it") from None
            say(f"{what} is being written by another run ({who}): waiting for it")
            fcntl.flock(handle, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        raise ValueError(
            f"{path} is on a file system without locks ({file_system(path)}): put it on a local "
            "disk, or mount that with locks (for Lustre -o flock)"
        ) from error


_whole: set[tuple[Path, int]] = set()
"""Locks of `alone` that a thread of this process holds."""


@contextmanager
def alone(
    path: Path,
    what: str,
    who: str,
    *,
    say: Callable[[str], None],
    look: Callable[[], None] = lambda: None,
) -> Iterator[None]:
    """Holds a lock for long, under a name; waits for it, and says for whom.

    Who holds it already in this thread goes on at once, under the new name.

    Args:
        path: The file; made where it is not there.
        what: What it stands for, as the message names it.
        who: Name of the holder, for those that wait.
        say: Takes a line where somebody else holds it.
        look: Called once a second while it waits; it may raise to give up.

    Raises:
        ValueError: if the file system has no locks.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    mine = (path.resolve(), threading.get_ident())
    if mine in _whole:
        path.write_text(who, encoding="utf-8")
        yield
        return
    with path.open("a") as handle:
        told = False
        while True:
            try:
                take(handle, path, what, wait=False)
                break
            except Held:
                if not told:
                    say(f"waits for {path.read_text(encoding='utf-8') or holder(path)}: {what}")
                told = True
                look()
                time.sleep(LOOK_SECONDS)
        path.write_text(who, encoding="utf-8")
        _whole.add(mine)
        try:
            yield
        finally:
            _whole.remove(mine)
            path.write_text("", encoding="utf-8")


def holder(path: Path) -> str:
    """Who holds the lock of a file, as far as this machine knows."""
    try:
        inode = path.stat().st_ino
        lines = Path("/proc/locks").read_text(encoding="utf-8").splitlines()
    except OSError:
        return "it can't be told whose"
    for line in lines:
        fields = line.split()  # 1: FLOCK ADVISORY WRITE 4242 fd:01:1234 0 EOF
        if fields[1] == "FLOCK" and fields[5].rpartition(":")[2] == str(inode):
            return f"process {fields[4]}{_command(fields[4])}"
    return "it can't be told whose"


def _command(process: str) -> str:
    try:
        raw = Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        return ""
    words = [Path(word).name for word in raw.decode("utf-8", "replace").split("\0") if word]
    return f", {' '.join(' '.join(words).split())[:60]}" if words else ""


def file_system(path: Path) -> str:
    """The type of the file system that a path is on, such as ext4 or nfs4."""
    place = path.absolute().resolve()
    found, longest = "unknown", -1
    try:
        lines = Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines()
    except OSError:
        return found
    for line in lines:
        _, mount, kind, *_ = line.split(" ")
        point = Path(mount.encode().decode("unicode_escape"))  # a space is written \040
        if place.is_relative_to(point) and len(point.parts) >= longest:  # the last mount counts
            found, longest = kind, len(point.parts)
    return found


@cache
def warn_if_shared(folder: Path) -> None:
    """Says once that locks may not hold between machines, where other machines may come."""
    kind = file_system(folder)
    if kind in SHARED or kind.startswith("fuse"):
        logger.warning(
            "%s is on %s: locks may not hold between machines there, nor do SQLite's; let one "
            "machine at a time write to it, or use a local disk",
            folder,
            kind,
        )
