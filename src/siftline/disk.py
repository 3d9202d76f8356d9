"""What a disk refuses, in one line with the file and the remedy; and whether there is room at all.

Every library says it in its own way: an `OSError` with a number, one with the number in its text,
SQLite's sentences, or nothing but a failed check. `explained` knows them all; `writing` puts it
around a writer, and the command line around everything.

Names under which a process writes what is not done yet, and what killed ones left under them.
"""

import errno
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any
from uuid import uuid4

ALMOST_NOTHING = 64 << 10
"""Free bytes below which a writer that fails without a word has failed for want of them."""
ROOT_BYTES = 32 << 20
"""Free bytes that a run needs at least: Dagster's databases, journals, small tables."""
_REMEDIES = {
    errno.ENOSPC: "No space left for {path}{free}: free some and run again; what was committed is "
    "kept",
    errno.EROFS: "{path} is on a read-only file system: mount it for writing, or name another "
    "folder",
    errno.EACCES: "no permission for {path}: change its permissions, or name another folder",
    errno.EFBIG: "{path} is larger than files may be here: raise the limit (ulimit -f) and run "
    "again",
    errno.EIO: "the disk of {path} fails to read or write (I/O error): check the disk, then run "
    "again",
}
_SAME = {errno.EDQUOT: errno.ENOSPC, errno.EPERM: errno.EACCES}
_SAID = (
    (
        errno.ENOSPC,
        r"no space left|not enough free space|os error 28\b|disk is full|quota exceeded",
    ),
    (errno.EROFS, r"read-only file system|os error 30\b|readonly database"),
    (errno.EACCES, r"permission denied|os error 13\b"),
    (errno.EFBIG, r"file too large|os error 27\b"),
    (errno.EIO, r"input/output error|disk i/o error|os error 5\b"),
)
"""What libraries write, in lower case."""


def explained(error: BaseException, path: Path | None = None) -> OSError | None:
    """An error of the disk in one line, or None for any other error.

    Args:
        error: What a writer raised; the errors it came from are looked at, too.
        path: What was being written, if the error does not name it.
    """
    if isinstance(error, ValueError):  # it has its own line, whatever it came from
        return None
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        here = waiting.pop()
        if here is None or id(here) in seen:
            continue
        if isinstance(here, OSError) and here.errno in _REMEDIES and here.strerror is None:
            return here  # explained further inside
        code = _code(here)
        if code is not None and isinstance(here, OSError) and _is_ours(here):
            told = OSError(here.strerror)
            told.errno = code
            return told
        if code is not None:
            name = getattr(here, "filename", None) or getattr(here, "filename2", None)
            return _told(code, Path(os.fsdecode(name)) if isinstance(name, str | bytes) else path)
        seen.add(id(here))
        waiting += [here.__context__, here.__cause__]  # the cause first
    # A database that could not be made on a full disk says later that it has no tables.
    library = type(error).__module__.partition(".")[0] in _LIBRARIES
    if path is not None and (library or isinstance(error, RuntimeError | OSError)):
        left = free_bytes(path)
        if left is not None and left < ALMOST_NOTHING:
            return _told(errno.ENOSPC, path)
    return None


def refused_database(said: str, path: Path) -> OSError | None:
    """What a disk refused SQLite, where only the sentence of the error is left; None for others.

    Args:
        said: The message of an error that came from another process or an event log.
        path: The folder of the database.
    """
    code = _worded(said) if "(sqlite3." in said else None
    return None if code is None else _told(code, path)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Has whatever the disk refuses inside said in one line.

    Args:
        path: The file or folder that is written.

    Raises:
        OSError: naming the file and the remedy; other errors pass as they are.
    """
    try:
        yield
    except Exception as error:
        told = explained(error, path)
        if told is None or told is error:
            raise
        raise told from error


class Sink:
    """A file for pyarrow's Parquet writer, which must never see a write fail.

    With content-defined chunking it aborts the whole process then (a failed check in its C++). So
    the first failure is kept for `check` and for the end of the body, and what comes after it is
    let go.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._error: OSError | None = None
        self._at = 0

    def write(self, data: Any) -> int:
        """Takes bytes, as a file does."""
        size = memoryview(data).nbytes
        if self._error is None:
            try:
                self._file.write(data)
            except OSError as error:
                self._error = error
        self._at += size
        return size

    def check(self) -> None:
        """Raises what went wrong so far, if anything did."""
        if self._error is None:
            try:
                self._file.flush()
            except OSError as error:
                self._error = error
        if self._error is not None:
            raise self._error

    def tell(self) -> int:
        """Bytes taken so far."""
        return self._at

    def flush(self) -> None:
        """Leaves that to `check`."""

    @property
    def closed(self) -> bool:
        """Whether it takes no more."""
        return self._file.closed

    def __enter__(self) -> "Sink":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
        if kind is None and self._error is not None:
            raise self._error

    def close(self) -> None:
        """Closes the file; a failure by now is told when the body ends."""
        try:
            self._file.close()
        except OSError as error:
            self._error = self._error or error


def need(path: Path, least: int, what: str) -> None:
    """Refuses to begin what can't end for want of space.

    Args:
        path: Where it will be written; need not be there yet.
        least: Bytes that it takes at the very least.
        what: What needs them.

    Raises:
        OSError: naming the folder, what is free and what is needed.
    """
    left = free_bytes(path)
    if left is not None and left < least:
        told = OSError(
            f"{path} has {_size(left)} free and {what} needs at least {_size(least)}: free some, "
            "or name another folder"
        )
        told.errno = errno.ENOSPC
        raise told


def check_folder(path: Path) -> None:
    """Refuses a folder that can't be made or written.

    Raises:
        OSError: naming it and the remedy.
        ValueError: if something else is there.
    """
    there = _nearest(path)
    if not there.is_dir():
        raise ValueError(f"{there} is no folder: name another one")
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)
        # Asked by writing: permissions alone tell nothing of a read-only disk, or of root.
        with tempfile.NamedTemporaryFile(dir=path, prefix=".siftline-"):
            pass


def check_temporary() -> None:
    """Refuses a TMPDIR that can't be used; Python takes another folder without a word.

    Raises:
        ValueError: naming it.
        OSError: if it, or where no TMPDIR is set every usual folder, can't be written.
    """
    named = os.environ.get("TMPDIR")
    if named is not None and not Path(named).is_dir():
        raise ValueError(f"TMPDIR is {named!r}, which is no folder: make it, or unset TMPDIR")
    if named is not None:
        check_folder(Path(named))


def free_bytes(path: Path) -> int | None:
    """Free bytes where `path` is or will be; None where that can't be told."""
    try:
        return shutil.disk_usage(_nearest(path)).free
    except OSError:
        return None


def _nearest(path: Path) -> Path:
    """The path, or the nearest folder above it that is there."""
    here = path.absolute()
    while not os.path.lexists(here) and here != here.parent:
        here = here.parent
    return here


def _is_ours(error: OSError) -> bool:
    """Whether an error of this package has named the file already."""
    return type(error).__module__.partition(".")[0] == __package__


def _code(error: BaseException) -> int | None:
    """What the disk refused, as an error number; None for an error of another kind."""
    if isinstance(error, FileNotFoundError | FileExistsError | ConnectionError | BlockingIOError):
        return None
    if isinstance(error, OSError) and error.errno is not None:
        code = _SAME.get(error.errno, error.errno)
        return code if code in _REMEDIES else None
    # Not of errors in general: a row may hold such words.
    library = type(error).__module__.partition(".")[0]
    if not isinstance(error, OSError | RuntimeError) and library not in _LIBRARIES:
        return None
    return _worded(str(error))


def _worded(said: str) -> int | None:
    return next((code for code, words in _SAID if re.search(words, said.lower())), None)


_LIBRARIES = ("polars", "pyarrow", "safetensors", "safetensors_rust", "sqlite3", "sqlalchemy")


def _told(code: int, path: Path | None) -> OSError:
    free = None if path is None or code != errno.ENOSPC else free_bytes(path)
    shown = "" if free is None else f" ({_size(free)} free on its disk)"
    name = "a file" if path is None else path
    told = OSError(_REMEDIES[code].format(path=name, free=shown))
    told.errno = code
    return told


def _size(count: float) -> str:
    for unit in ("bytes", "KB", "MB", "GB"):
        if count < 1000:
            return (
                f"{count:.0f} {unit}" if count >= 10 or unit == "bytes" else f"{count:.1f} {unit}"
            )
        count /= 1000
    return f"{count:.1f} TB"


def unfinished(name: str) -> str:
    """A dot-name that tells whose it is; see `sweep`."""
    return f".{name}.{platform.node()}.{os.getpid()}"


def sweep(root: Path) -> int:
    """Removes what killed processes of this machine left under names of `unfinished`.

    Args:
        root: A folder; all below it is looked at.

    Returns:
        Number of files and folders removed.
    """
    ours = re.compile(rf"\..*\.{re.escape(platform.node())}\.(\d+)(\.|$)")
    removed = 0
    for folder, folders, files in os.walk(root):
        for name in (*folders, *files):
            found = ours.match(name)
            if found is None or _alive(int(found[1])):
                continue
            path = Path(folder) / name
            if name in folders:
                folders.remove(name)
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
            removed += 1
    return removed


@contextmanager
def scratch_folder(root: Path, name: str) -> Iterator[Path]:
    """A dot-named folder in `root`, so on its file system: files are moved from it, not copied.

    What a killed process of this machine left behind under the name is removed first.

    Args:
        root: Where; made if it is not there.
        name: What the files are for.
    """
    root.mkdir(parents=True, exist_ok=True)
    prefix = f".{name}.{platform.node()}."
    for left in root.glob(f"{prefix}*"):
        if not _alive(int(left.name.removeprefix(prefix).partition(".")[0])):
            shutil.rmtree(left, ignore_errors=True)  # another run may be at it, too
    folder = root / f"{prefix}{os.getpid()}.{uuid4().hex}"
    with writing(root):  # not every writer names its file
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it runs, as another user
        return True
    return True
