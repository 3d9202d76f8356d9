"""Files are read only where they are what was written: their hash, their rows, their columns.

A manifest, or a file's own name, says what its bytes hash to. Readers of such a file go through
here: SHA-256 first, then rows are counted and columns compared by name, and only then may a cast
change how nullable they are.

A file is hashed once in a process, as long as its device, inode, size and both times stay. The time
of change can't be set from outside, so a copy that keeps the time of modification is noticed. Two
things are not trusted. A file that changed a moment ago is hashed at every read: another change
could leave the same times. And after `TRUSTED_SECONDS` any file is hashed again: a
disk goes bad without a change of times.
"""

import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

FINE_STEP, COARSE_STEP = 0.05, 2.0
"""Seconds within which a file system may give two changes one time: usual, and coarsest (FAT)."""
TRUSTED_SECONDS = 3600.0
RERUN = "delete it and run again"
"""What helps where a missing file is made again."""
SELF = "sha256"
"""Key under which a JSON file holds the hash of the rest of it."""

_GONE = "is missing though its manifest names it"

Identity = tuple[int, int, int, int, int]
_hashed: dict[Identity, tuple[str, float]] = {}


class AlteredError(ValueError):
    """A file is not what was written: damaged, replaced, or gone."""


class SchemaError(ValueError):
    """A file is whole and holds other columns than its reader knows."""


class UnhashedError(ValueError):
    """A JSON file of a version that wrote no hash into it; its owner may make it again."""


def canonical_json(value: Any) -> str:
    """JSON text with sorted keys and no spaces: equal values give equal bytes."""
    return json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":"))


def content_hash(value: Any) -> str:
    """sha256 of the canonical JSON of `value`, 64 hex digits."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def _identity(status: os.stat_result) -> Identity:
    times = status.st_mtime_ns, status.st_ctime_ns
    return (status.st_dev, status.st_ino, status.st_size, *times)


def _digest(path: Path) -> tuple[str, Identity]:
    with path.open("rb") as handle:
        seen = _identity(os.fstat(handle.fileno()))
        known = _hashed.get(seen)
        if known is not None and time.monotonic() - known[1] < TRUSTED_SECONDS:
            return known[0], seen
        began, clock = time.time(), time.monotonic()
        digest = hashlib.file_digest(handle, "sha256").hexdigest()
        if _settled(seen, began):
            _hashed[seen] = digest, clock
    return digest, seen


def _settled(seen: Identity, now: float) -> bool:
    """Whether a change after `now` would show in a file's times."""
    changed = seen[3:]
    # Times without a fraction come from a file system that counts whole seconds.
    step = FINE_STEP if any(when % 1_000_000_000 for when in changed) else COARSE_STEP
    return now - max(changed) / 1e9 >= step


def file_hash(path: Path) -> str:
    """sha256 of a file's bytes, 64 hex digits; see the module's docstring for what is cached."""
    return _digest(path)[0]


def confirm(path: Path, sha256: str, remedy: str = RERUN) -> Identity:
    """Makes sure that a file has the bytes that were written.

    Args:
        path: The file.
        sha256: Hex digits of its hash; a name holds the first ones only.
        remedy: What helps, for the message.

    Returns:
        What the file looked like; the same later, it is the same file.

    Raises:
        AlteredError: naming the file, where it is missing or has other bytes.
    """
    try:
        found, seen = _digest(path)
    except FileNotFoundError:
        raise _missing(path, remedy) from None
    except OSError as error:
        raise _unreadable(path, error, remedy) from error
    if not sha256 or found[: len(sha256)] != sha256:
        raise AlteredError(
            f"{path} is corrupt or was replaced (sha256 {found[:12]}…, {seen[2]:,} bytes; "
            f"{sha256[:12]}… was written): {remedy}"
        )
    return seen


def _missing(path: Path, remedy: str) -> AlteredError:
    helps = "run again" if remedy == RERUN else remedy
    return AlteredError(f"{path} {_GONE}: {helps}")


def _unreadable(path: Path, error: OSError, remedy: str) -> AlteredError:
    helps = "make it readable" if isinstance(error, PermissionError) else remedy
    return AlteredError(f"{path} can't be read ({error.strerror or error}): {helps}")


def named_hash(path: Path) -> str:
    """The hash that a content-named file carries: `b03-0123456789abcdef.parquet`.

    Raises:
        AlteredError: if the name carries none.
    """
    digits = path.stem.rpartition("-")[2]
    if len(digits) != NAMED or not set(digits) <= set("0123456789abcdef"):
        raise AlteredError(f"{path} has no hash in its name, as written files have: move it away")
    return digits


NAMED = 16
"""Hex digits of the hash in a file's name: 64 bits."""


def read_parquet(
    path: Path,
    sha256: str,
    *,
    rows: int | None = None,
    schema: pa.Schema | None = None,
    columns: list[str] | None = None,
    remedy: str = RERUN,
) -> pa.Table:
    """Reads one Parquet file that has the bytes, rows and columns that were written.

    Args:
        path: The file.
        sha256: Its hash, or the first digits of it.
        rows: How many rows it has, where somebody says.
        schema: Its columns; None takes them as they are.
        columns: Those to read; None reads all.
        remedy: What helps, for the message.

    Raises:
        AlteredError: naming the file, what differs and what helps.
        SchemaError: if the file is whole and has other columns.
    """
    while True:
        seen = confirm(path, sha256, remedy)
        try:
            with pq.ParquetFile(path) as file:
                table = file.read(columns)  # a name it has not is left out
            still = _identity(path.stat()) == seen
        except FileNotFoundError:
            raise _missing(path, remedy) from None
        except (OSError, KeyError, pa.ArrowException) as error:
            detail = str(error).splitlines()[0]
            raise AlteredError(f"{path} is corrupt ({detail}): {remedy}") from error
        if still:  # what was read is what was hashed
            break
    if rows is not None and table.num_rows != rows:
        said = f"{table.num_rows:,} rows, its manifest says {rows:,}"
        raise AlteredError(f"{path} is corrupt or was replaced ({said}): {remedy}")
    if schema is None:
        return table if columns is None else table.select(columns)
    wanted = schema if columns is None else pa.schema([schema.field(name) for name in columns])
    return conform(table, wanted, path, remedy)


def conform(table: pa.Table, schema: pa.Schema, path: Path, remedy: str = RERUN) -> pa.Table:
    """A table under a schema that has the same names and types; only nullability may change.

    A cast matches fields of structs by name and fills those it does not find with nulls, so names
    are compared before.

    Raises:
        SchemaError: naming the first difference.
    """
    differs = _difference(pa.struct(list(table.schema)), pa.struct(list(schema)), "")
    if differs:
        raise SchemaError(f"{path} has other columns than expected ({differs}): {remedy}")
    return table.select(schema.names).cast(schema)


def _difference(found: pa.DataType, wanted: pa.DataType, where: str) -> str:
    """Says where two types differ besides nullability; "" where they don't."""
    if pa.types.is_struct(found) and pa.types.is_struct(wanted):
        mine, theirs = ({field.name: field.type for field in kind} for kind in (found, wanted))
        at = where or "columns"
        if lacking := sorted(set(theirs) - set(mine)):
            return f"{at}: {lacking[0]} is not there"
        if more := sorted(set(mine) - set(theirs)):
            return f"{at}: {more[0]} is not known"
        if where and list(mine) != list(theirs):
            return f"{at}: fields in another order"
        inner = (_difference(mine[n], theirs[n], f"{where}.{n}".lstrip(".")) for n in theirs)
        return next((said for said in inner if said), "")
    if _listed(found) and _listed(wanted) and type(found) is type(wanted):
        return _difference(found.value_type, wanted.value_type, f"{where}[]")
    return "" if found == wanted else f"{where} is {found}, not {wanted}"


def _listed(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind)


def plain(value: Any) -> Any:
    """A JSON value as a reader of the file gets it: no tuples, and keys are strings."""
    return json.loads(canonical_json(value))


def with_hash(value: dict[str, Any]) -> dict[str, Any]:
    """A JSON object with the hash of its content under `SELF`."""
    assert SELF not in value, value
    body = plain(value)
    return {**body, SELF: content_hash(body)}


def read_hashed(path: Path, what: str, remedy: str = RERUN) -> dict[str, Any]:
    """Reads a JSON object that holds its own hash, without the hash.

    Args:
        path: The file.
        what: What it is, with an article: "a manifest".
        remedy: What helps, for the message.

    Raises:
        AlteredError: naming the file, where it is missing, cut, of something else, or altered.
        UnhashedError: if it holds no hash.
    """
    try:
        raw = path.read_text(encoding="utf-8")
        if not raw.strip():
            raise ValueError("it is empty")
        value = json.loads(raw)
        if not isinstance(value, dict):
            raise ValueError(f"it holds a {type(value).__name__}")
    except FileNotFoundError:
        raise AlteredError(f"{path} is missing: run again") from None
    except OSError as error:
        raise _unreadable(path, error, remedy) from error
    except (ValueError, RecursionError) as error:
        raise AlteredError(f"{path} is not {what} ({error}): {remedy}") from error
    said = value.pop(SELF, None)
    if said is None:
        raise UnhashedError(f"{path} is not {what} with its own hash ({SELF}): {remedy}")
    found = content_hash(value)
    if found != said:
        raise AlteredError(
            f"{path} is not {what} as it was written (sha256 {found[:12]}…, it says "
            f"{str(said)[:12]}…): {remedy}"
        )
    return value
