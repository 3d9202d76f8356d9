"""Lists what the store holds and takes away what nobody asked for in a long time.

A namespace is a model's answers at some version of everything that moves them. Nothing ever leads
back to one whose weights or template are gone, so the store only grows; age tells those from the
ones in use, because every run that looks into a namespace stamps it.

Only what is free is touched: a namespace goes when all its leases could be had at once, and it goes
by one rename, so a process that comes along finds either all of it or none.
"""

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from siftline.locks import holder
from siftline.store.namespace import BUCKETS, InUseError, Namespace, NamespaceFolder

DEFAULT_DAYS = 30.0
DAY = 86400.0
LEFTOVER_SECONDS = 3600.0
"""Age of a temporary file that belongs to no bucket, from which nobody can still be writing it."""
_GONE = ".gone-"


@dataclass(frozen=True)
class Entry:
    """One namespace of the store.

    Attributes:
        name: Its folder.
        namespace: What it stands for; None where that can't be read.
        records: Committed records, sealed and in journals.
        bytes: Size of all its files.
        last_written: When a record was last committed, seconds since 1970.
        last_used: When a run last looked into it or wrote to it.
        journals: Journals that are not sealed yet.
        in_use: Whether a live process holds a lease.
    """

    name: str
    namespace: Namespace | None
    records: int
    bytes: int
    last_written: float
    last_used: float
    journals: int
    in_use: bool


@dataclass(frozen=True)
class Swept:
    """What `collect_garbage` did to one namespace, or would do.

    Attributes:
        name: Its folder.
        scorer: Its scorer; "" where that can't be read.
        what: "removed", "tidied" (journals of dead writers sealed, leftovers deleted), "in use".
        bytes: Bytes that are free now.
        journals: Journals sealed.
        holder: Who holds it, where it is in use.
    """

    name: str
    scorer: str
    what: str
    bytes: int
    journals: int = 0
    holder: str = ""


def list_store(root: Path) -> list[Entry]:
    """Describes every namespace below the store's folder, by name."""
    return [describe(path) for path in _folders(root)]


def describe(path: Path) -> Entry:
    """Describes one namespace."""
    files = NamespaceFolder(path)
    records = 0
    for bucket in range(BUCKETS):
        tables = files.tables(bucket, ["key"])
        records += len({key for table in tables for key in table.column("key").to_pylist()})
    written = last_written(path)
    return Entry(
        name=path.name,
        namespace=_namespace(files),
        records=records,
        bytes=sum(size for _, size, _ in _walk(path)),
        last_written=written,
        last_used=max(written, _mtime(path / "used")),
        journals=sum(len(files.journals(bucket)) for bucket in range(BUCKETS)),
        in_use=any(files.held(bucket) for bucket in range(BUCKETS)),
    )


def last_written(path: Path) -> float:
    """When the newest part or journal of a namespace changed, else when it was made."""
    times = [when for file, _, when in _walk(path) if file.suffix in (".parquet", ".journal")]
    return max(times, default=_mtime(path / "namespace.json"))


def collect_garbage(
    root: Path, older_than: float = DEFAULT_DAYS * DAY, scorer: str | None = None, *, dry: bool
) -> list[Swept]:
    """Removes namespaces out of use, and tidies the others.

    Args:
        root: The store's folder.
        older_than: Seconds since the last use, from which a namespace goes.
        scorer: Looks at this scorer's namespaces alone.
        dry: Says what it would do and does nothing.

    Returns:
        One entry for every namespace where there was something to do, by name.
    """
    swept = []
    for path in _folders(root):
        namespace = _namespace(NamespaceFolder(path))
        name = namespace.scorer if namespace else ""
        if scorer is not None and name != scorer:
            continue
        old = time.time() - max(last_written(path), _mtime(path / "used")) >= older_than
        done = _remove(path, name, older_than, dry) if old else _tidy(path, name, dry)
        if done is not None:
            swept.append(done)
    if not dry and root.is_dir():
        for path in root.iterdir():  # left by a collection that was killed
            if path.name.startswith(_GONE):
                shutil.rmtree(path, ignore_errors=True)
    return swept


def _remove(path: Path, scorer: str, older_than: float, dry: bool) -> Swept | None:
    """Removes a namespace that is old and free."""
    files = NamespaceFolder(path)
    size = sum(size for _, size, _ in _walk(path))
    if dry:
        who = _holder(files)
        return Swept(path.name, scorer, *(("in use", 0, 0, who) if who else ("removed", size)))
    gone = path.with_name(f"{_GONE}{path.name}.{os.getpid()}")
    with ExitStack() as leases:
        try:
            (path / "leases").mkdir(exist_ok=True)
            for bucket in range(BUCKETS):
                leases.enter_context(files.lease(bucket, wait=False))
        except InUseError:
            return Swept(path.name, scorer, "in use", 0, holder=_holder(files, among=leases))
        except FileNotFoundError:  # somebody else collects it
            return None
        used = max(last_written(path), _mtime(path / "used"))
        if time.time() - used < older_than:  # a run came along before the leases were had
            return Swept(path.name, scorer, "in use", 0, holder="a run has just looked into it")
        path.rename(gone)
    shutil.rmtree(gone)
    return Swept(path.name, scorer, "removed", size)


def _holder(files: NamespaceFolder, among: ExitStack | None = None) -> str:
    """Who holds a lease of a namespace; "" where nobody does.

    Args:
        files: The namespace.
        among: This process's own leases, given back first.
    """
    if among is not None:
        among.close()
    held = [bucket for bucket in range(BUCKETS) if files.held(bucket)]
    return holder(files.path / "leases" / f"b{held[0]:02d}.lock") if held else ""


def _tidy(path: Path, scorer: str, dry: bool) -> Swept | None:
    """Seals journals of dead writers and deletes what they left half-written."""
    files = NamespaceFolder(path)
    before = sum(size for _, size, _ in _walk(path))
    sealed, left = 0, 0
    for bucket in range(BUCKETS):
        journals, leftovers = files.journals(bucket), files.leftovers(bucket)
        if not journals and not leftovers:
            continue
        if dry:
            if not files.held(bucket):
                sealed += len(journals)
                left += sum(_size(file) for file in leftovers)
            continue
        try:
            with files.lease(bucket, wait=False):
                sealed += len(files.journals(bucket))
                left += sum(_size(file) for file in files.leftovers(bucket))
                files.seal(bucket)
        except (InUseError, FileNotFoundError):  # being written, or collected by somebody else
            continue
    for file, size, when in _walk(path):
        stale = time.time() - when >= LEFTOVER_SECONDS
        if file.parent == path and file.name.startswith(".") and stale:
            left += size
            if not dry:
                file.unlink(missing_ok=True)
    if not sealed and not left:
        return None
    after = before - left if dry else sum(size for _, size, _ in _walk(path))
    return Swept(path.name, scorer, "tidied", max(0, before - after), sealed)


def as_json(entry: Entry) -> dict[str, Any]:
    """An entry as `siftline cache ls --json` gives it."""
    of = entry.namespace
    return {
        "name": entry.name,
        "scorer": of.scorer if of else None,
        "version": of.version if of else None,
        "parameters": of.parameters if of else None,
        "fingerprint": of.fingerprint[:12] if of else None,
        "records": entry.records,
        "bytes": entry.bytes,
        "last_written": entry.last_written,
        "last_used": entry.last_used,
        "journals": entry.journals,
        "in_use": entry.in_use,
    }


def _folders(root: Path) -> list[Path]:
    if not root.is_dir():
        return []
    return sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))


def _namespace(files: NamespaceFolder) -> Namespace | None:
    try:
        return files.load()
    except ValueError:
        return None


def _walk(path: Path) -> Iterator[tuple[Path, int, float]]:
    """Files below a folder with size and time, but for those that vanish while it looks."""
    for folder, _, names in os.walk(path):
        for name in names:
            file = Path(folder) / name
            try:
                status = file.stat()
            except FileNotFoundError:
                continue
            yield file, status.st_size, status.st_mtime


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _mtime(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0
