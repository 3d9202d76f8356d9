"""`siftline cache`: what the store holds, and taking away what is out of use."""

import json
import re
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click

from siftline.cli.options import json_option, root_option
from siftline.workspace import Workspace

if TYPE_CHECKING:
    from siftline.store.cache import Entry

_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 7 * 86400.0}


@click.group()
def cache() -> None:
    """List or clean the store, where every answer of a model is kept."""


@cache.command("ls")
@root_option
@json_option
def list_namespaces(root: Path, as_json: bool) -> None:
    """Show one line per namespace of ROOT's store: scorer, model, records, bytes, last use."""
    _list(_store(root), as_json)


def _list(store: Path, wanted_json: bool) -> None:
    from siftline.store.cache import as_json, list_store

    entries = list_store(store)
    if wanted_json:
        lines = [
            as_json(entry)
            | {name: _when(getattr(entry, name)) for name in ("last_written", "last_used")}
            for entry in entries
        ]
        total = sum(entry.bytes for entry in entries)
        click.echo(json.dumps({"store": str(store), "bytes": total, "namespaces": lines}))
        return
    for entry in entries:
        click.echo(_line(entry))


def _line(entry: "Entry") -> str:
    from siftline.rows.verified import canonical_json

    of = entry.namespace
    what = (
        f"{of.scorer} v{of.version} {of.fingerprint[:12]}" if of else f"{entry.name} (unreadable)"
    )
    said = [
        what,
        f"{entry.records:,} records",
        f"{size_text(entry.bytes)}",
        f"written {_when(entry.last_written)}",
    ]
    if entry.journals:
        said.append(f"{entry.journals} open journals")
    if entry.in_use:
        said.append("in use")
    if of and of.parameters:
        said.append(canonical_json(of.parameters))
    return "  ".join(said)


@cache.command("gc")
@root_option
@click.option(
    "--older-than", default="30d", show_default=True, metavar="AGE",
    help="Remove namespaces that no run wrote to or looked into for so long: 30d, 12h, 2w.",
)  # fmt: skip
@click.option("--scorer", help="Only this scorer's namespaces.")
@click.option("--dry-run", is_flag=True, help="Say what would go, and change nothing.")
@json_option
def collect(root: Path, older_than: str, scorer: str | None, dry_run: bool, as_json: bool) -> None:
    """Remove namespaces out of use from ROOT's store, and what killed runs left behind.

    Journals of dead runs are sealed, so nothing committed is lost unless its namespace goes. What a
    running process writes is never touched.
    """
    from siftline.store.cache import collect_garbage

    store = _store(root)
    swept = collect_garbage(store, seconds(older_than), scorer, dry=dry_run)
    total = sum(one.bytes for one in swept)
    if as_json:
        lines = [asdict(one) for one in swept]
        said = {"store": str(store), "dry_run": dry_run, "bytes": total, "namespaces": lines}
        click.echo(json.dumps(said))
        return
    for one in swept:
        sealed = f", {one.journals} journals sealed" if one.journals else ""
        by = f" by {one.holder}" if one.holder else ""
        click.echo(f"{one.name}: {one.what}{by}, {size_text(one.bytes)}{sealed}")
    click.echo(f"{size_text(total)} {'would be freed' if dry_run else 'freed'}")


def seconds(age: str) -> float:
    """An age such as 30d or 12h in seconds.

    Raises:
        ValueError: if it is none.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smhdw])", age.strip())
    if found is None:
        raise ValueError(f"age {age!r}: give a number and one of s, m, h, d, w, such as 30d")
    return float(found[1]) * _UNITS[found[2]]


def size_text(size: int) -> str:
    """Bytes as people read them."""
    value, units = float(size), ["bytes", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1024 and len(units) > 1:
        value /= 1024
        units.pop(0)
    return f"{value:,.0f} {units[0]}" if units[0] == "bytes" else f"{value:,.1f} {units[0]}"


def _when(stamp: float) -> str:
    return datetime.fromtimestamp(stamp, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _store(root: Path) -> Path:
    """The store below a root.

    Raises:
        ValueError: if there is none.
    """
    store = Workspace(root.absolute()).store
    if not store.is_dir():
        raise ValueError(f"no store at {store}: name another --root")
    return store
