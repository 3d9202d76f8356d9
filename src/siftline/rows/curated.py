"""Publishes a selection as an immutable, versioned folder of Parquet that other trainers read.

    root/<version>/README.md                         dataset card with `configs:`
                   data/train-00000-of-000NN.parquet nothing else in this folder
                   removed/removed-00000-of-….parquet left out when nothing was removed
                   <config>/<config>-00000-of-….parquet further configs, if there are any
                   manifest.json                     files, hashes, identity; written last
    root/latest -> <version>                         swapped by one rename
    root/.trials/<recipe hash> -> ../<version>       of a recipe that was changed for one run

The version is a hash of the identity and of every file, so publishing the same content again finds
it there and touches nothing. Rows come in the order of hash(seed, id), which no input order, shard
or worker can change. They are shuffled by that hash into `ranges` ranges on disk and read back
range by range: memory holds one range and about two shards, not the selection.

Every rule on columns and names here avoids a measured trap: `datasets` takes its features from the
first shard only and fails on empty shards and null columns, LLaMA-Factory on any second file type
in `data/`, and TRL changes the task when it sees a column called `prompt` or `text`.
"""

import errno
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from siftline.disk import scratch_folder
from siftline.rows.card import CardInfo
from siftline.rows.card import render as render_card
from siftline.rows.native import messages_type, published
from siftline.rows.published import MANIFEST, REMEDY, read_version, version_of
from siftline.rows.shards import (
    ROW_GROUP_BYTES,
    building,
    point_latest,
    write_json,
    write_parquet,
    write_text,
)
from siftline.rows.shuffle import Shuffled, cut, read_ordered, shuffle
from siftline.rows.verified import AlteredError, canonical_json, confirm, file_hash

FORMAT = 2
"""Raise it when equal rows are published as other bytes. 1 had calls and reasoning under the names
of rows."""
SHARD_BYTES = 480 << 20
"""In-memory bytes of one shard; the Hub's own writer cuts at 500 MB."""

REMOVED = {
    "id": pl.String,
    "stage": pl.String,
    "kind": pl.String,
    "reason": pl.String,
    "value": pl.Float64,
    "threshold": pl.Float64,
    "matched_id": pl.String,
    "prompt": pl.String,
    "response": pl.String,
}
"""Columns of the removed config; further flat columns may follow them."""

FLAT: dict[Any, pa.DataType] = {
    pl.String: pa.string(),
    pl.Boolean: pa.bool_(),
    pl.Int8: pa.int8(),
    pl.Int16: pa.int16(),
    pl.Int32: pa.int32(),
    pl.Int64: pa.int64(),
    pl.UInt8: pa.uint8(),
    pl.UInt16: pa.uint16(),
    pl.UInt32: pa.uint32(),
    pl.UInt64: pa.uint64(),
    pl.Float32: pa.float32(),
    pl.Float64: pa.float64(),
}


@dataclass(frozen=True)
class Published:
    """A curated version on disk.

    Attributes:
        path: Its folder, `root/<version>`.
        version: 12 hex digits, a hash of the content.
        rows: Rows of the training split.
        files: Paths inside the folder, manifest.json excepted.
        manifest: Content of manifest.json.
        new: False when the same content had been published before.
    """

    path: Path
    version: str
    rows: int
    files: tuple[str, ...]
    manifest: dict[str, Any]
    new: bool


@dataclass(frozen=True)
class _Sizes:
    shard: int
    row_group: int


def publish(
    rows: pa.Table | Iterable[pa.Table],
    scores: pl.DataFrame,
    removed: pl.DataFrame,
    *,
    root: Path,
    seed: int,
    identity: dict[str, Any],
    card: CardInfo,
    configs: Mapping[str, pa.Table] | None = None,
    confirm: Callable[[], None] = lambda: None,
    trial: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    row_group_bytes: int = ROW_GROUP_BYTES,
    ranges: int = 64,
) -> Published:
    """Publishes the selected rows and points `root/latest` at them.

    Args:
        rows: The selected rows, tables of `schema.ROW` in any order.
        scores: `id` and flat nullable columns named `sift_…`; rows without scores get nulls.
        removed: Columns of `REMOVED`, then any flat ones; may have no rows.
        root: Folder of all versions of one recipe, on a local or mounted file system.
        seed: The recipe's seed; it fixes the order of the rows.
        identity: What made this, as JSON: recipe, its hash, the pool's manifest hash, version of
            the software. No dates, paths or host names: they would make equal data look different.
        card: What the recipe says about the data.
        configs: Further tables by config name, in their order; those without rows are left out.
        confirm: Called when all is written and nothing is published; it raises to leave it so.
        trial: Hash of the recipe that a run was changed to: `latest` stays where it is, and the
            version is found by `resolve_latest(root, hash)`.
        shard_bytes: Upper bound of one shard in memory; a larger row gets a shard of its own.
        row_group_bytes: Upper bound of one row group in memory.
        ranges: Into how many ranges the rows are shuffled; each must stay under 2 GiB.

    Returns:
        The published version.

    Raises:
        ValueError: for an empty selection, an id that comes twice, a column that is not flat and
            typed, an empty conversation, or a published version that was altered.
    """
    scores, removed = _checked_scores(scores), _checked_removed(removed)
    sizes = _Sizes(shard_bytes, row_group_bytes)
    with scratch_folder(root, "publish") as scratch:
        tables = [rows] if isinstance(rows, pa.Table) else rows
        shuffled = shuffle(tables, scratch / "shuffle", seed, ranges)
        if not shuffled.rows:
            raise ValueError(_empty_message(card))
        schema = _schema(shuffled, scores)
        with building(scratch / "tree") as tree:
            scored = (_with_scores(table, scores, schema) for table in read_ordered(shuffled))
            _write_shards(scored, tree / "data", "train", sizes)
            _write_shards(_removed_tables(removed), tree / "removed", "removed", sizes)
            further = {name: table for name, table in (configs or {}).items() if table.num_rows}
            for name, table in further.items():
                assert name not in ("data", "removed"), name
                _write_shards([table], tree / name, name, sizes)
            counts = {name: table.num_rows for name, table in further.items()}
            text = render_card(
                card, rows=shuffled.rows, schema=schema, removed=removed.height, further=counts
            )
            write_text(tree / "README.md", text)
            manifest = _manifest(tree, schema, shuffled.rows, removed, seed, identity, counts)
            write_json(tree / MANIFEST, manifest)
        path = root / manifest["version"]
        confirm()
        new = _move(scratch / "tree", path, manifest)
    _point(root, manifest, trial)
    files = tuple(file["path"] for file in manifest["files"])
    return Published(path, manifest["version"], shuffled.rows, files, manifest, new)


TRIALS = ".trials"


def _trial_link(root: Path, recipe_hash: str) -> Path:
    return root / TRIALS / (recipe_hash[:12] or "none")


def _point(root: Path, manifest: Mapping[str, Any], trial: str | None) -> None:
    """Points at a new version: `latest`, or beside it; a recipe's trial ends where it is latest."""
    version = manifest["version"]
    if trial is None:
        point_latest(root, version)
        _trial_link(root, manifest["identity"].get("recipe_hash", "")).unlink(missing_ok=True)
        return
    link = _trial_link(root, trial)
    link.parent.mkdir(exist_ok=True)
    point_latest(link.parent, f"../{version}", link.name)


def published_before(
    root: Path, identity: Mapping[str, Any], trial: str | None = None
) -> Published | None:
    """The newest version, where it was made of the same things.

    Args:
        root: Folder of all versions of one recipe.
        identity: What it would be made of.
        trial: As in `publish`.

    Raises:
        AlteredError: if it is that one, and was altered since.
    """
    link = root / "latest" if trial is None else _trial_link(root, trial)
    if not link.exists():
        return None
    path = link.resolve()
    manifest = read_version(path)
    made_of = json.loads(canonical_json(identity))
    if manifest["identity"] != made_of or manifest["format"] != FORMAT:
        return None
    _unaltered(path, manifest)
    _point(root, manifest, trial)
    files = tuple(file["path"] for file in manifest["files"])
    rows = manifest["counts"]["rows"]
    return Published(path, manifest["version"], rows, files, manifest, new=False)


def resolve_latest(root: Path, trial: str | None = None) -> Path:
    """The folder of the newest version of a recipe.

    Read through this and not through the link: a library opens a file more than once (footer, then
    pages), and a swap of the link in between would mix two versions.

    Args:
        root: Folder of all versions of one recipe.
        trial: Hash of a recipe that may have been changed for one run: then the version of that.

    Raises:
        ValueError: if nothing was published under `root`.
        AlteredError: if the version's manifest is not the one it was published with.
    """
    link = root / "latest"
    if trial is not None and (beside := _trial_link(root, trial)).exists():
        link = beside
    if not link.exists():
        raise ValueError(f"{root} has no published version: run the recipe first")
    folder = link.resolve()
    read_version(folder)
    return folder


def _flat_type(name: str, dtype: pl.DataType) -> pa.DataType:
    found = FLAT.get(dtype.base_type())
    if found is None:
        raise ValueError(f"column {name} is {dtype}: cast it to a string, boolean or number")
    return found


def _checked_scores(scores: pl.DataFrame) -> pl.DataFrame:
    if "id" not in scores.columns:
        raise ValueError(f"scores have no column id, only {scores.columns}: add it")
    for name, dtype in scores.schema.items():
        if name != "id" and not name.startswith("sift_"):
            raise ValueError(f"score column {name} may steer a trainer: call it sift_{name}")
        _flat_type(name, dtype)
    twice = scores.filter(pl.col("id").is_duplicated())["id"]
    if len(twice):
        raise ValueError(f"scores name id {min(twice)} more than once: join them by id first")
    return scores


def _checked_removed(removed: pl.DataFrame) -> pl.DataFrame:
    missing = [name for name in REMOVED if name not in removed.columns]
    if missing:
        raise ValueError(f"removed rows lack the columns {missing}: take them from the ledger")
    others = [name for name in removed.columns if name not in REMOVED]
    for name in others:
        _flat_type(name, removed.schema[name])
    typed = removed.select(*(pl.col(n).cast(t) for n, t in REMOVED.items()), *others)
    # All columns take part: the order of equal (id, stage) pairs must not be the input's.
    return typed.sort("id", "stage", *(n for n in typed.columns if n not in ("id", "stage")))


def _empty_message(card: CardInfo) -> str:
    worst = max(card.funnel, key=lambda stage: stage.removed, default=None)
    if worst is None or not worst.removed:
        return "curated: no row was selected, nothing is published: check that the pool has rows"
    return (
        f"curated: no row was selected, nothing is published: stage {worst.stage} removed"
        f" {worst.removed} of {worst.rows_in + worst.added}, loosen it or leave it out"
    )


def _schema(shuffled: Shuffled, scores: pl.DataFrame) -> pa.Schema:
    """The one schema of all shards; everything nullable, as `datasets` would make it anyway."""
    tools = [("tools", pa.string())] if "tools" in shuffled.used else []
    flat = [(n, _flat_type(n, t)) for n, t in scores.schema.items() if n != "id"]
    messages = ("messages", messages_type(shuffled.used))
    return pa.schema([("id", pa.string()), messages, *tools, *flat])


def _with_scores(table: pa.Table, scores: pl.DataFrame, schema: pa.Schema) -> pa.Table:
    ids = pl.DataFrame({"id": table["id"].to_pylist()}, schema={"id": pl.String})
    joined = ids.join(scores, on="id", how="left", maintain_order="left")
    for name in scores.columns:
        if name != "id":
            table = table.append_column(name, joined[name].to_arrow())
    at = table.schema.get_field_index("messages")
    kind = schema.field("messages")
    table = table.set_column(at, kind, published(table["messages"], kind.type))
    return table.select(schema.names).cast(schema)


def _removed_tables(removed: pl.DataFrame) -> Iterator[pa.Table]:
    schema = pa.schema([(name, _flat_type(name, t)) for name, t in removed.schema.items()])
    yield removed.to_arrow().cast(schema)


def _write_shards(tables: Iterable[pa.Table], folder: Path, name: str, sizes: _Sizes) -> None:
    """Writes `name-00000-of-000NN.parquet`; no rows make no folder."""
    written = []
    for number, shard in enumerate(cut(tables, sizes.shard)):
        path = folder / f"{number}.parquet"
        write_parquet(shard, path, row_group_bytes=sizes.row_group)
        written.append(path)
    for number, path in enumerate(written):
        path.rename(folder / f"{name}-{number:05d}-of-{len(written):05d}.parquet")


def _manifest(
    tree: Path,
    schema: pa.Schema,
    rows: int,
    removed: pl.DataFrame,
    seed: int,
    identity: dict[str, Any],
    configs: dict[str, int],
) -> dict[str, Any]:
    files = [
        {
            "path": str(path.relative_to(tree)),
            "bytes": path.stat().st_size,
            "sha256": file_hash(path),
            "rows": pq.read_metadata(path).num_rows if path.suffix == ".parquet" else None,
        }
        for path in sorted(tree.rglob("*"))
        if path.is_file()
    ]
    reasons = removed.group_by("stage", "reason").len().sort("stage", "reason").rows()
    body = {
        "format": FORMAT,
        "identity": identity,
        "seed": seed,
        "files": files,
        "schema": [{"name": field.name, "type": str(field.type)} for field in schema],
        "counts": {
            "rows": rows,
            "removed": removed.height,
            "reasons": [{"stage": s, "reason": r, "rows": n} for s, r, n in reasons],
            "configs": configs,
        },
    }
    # What a reader of the file gets, where identity may hold tuples.
    body = json.loads(canonical_json(body))
    return {"version": version_of(body), **body}


def _move(tree: Path, path: Path, manifest: dict[str, Any]) -> bool:
    """Renames a complete tree to its final name; returns False if that version is there already."""
    try:
        tree.rename(path)
        return True
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
    _unaltered(path, manifest)
    return False


def _unaltered(path: Path, manifest: dict[str, Any]) -> None:
    known = read_version(path)
    files = {file["path"]: file["sha256"] for file in known["files"]}
    found = {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()}
    changed = sorted(found ^ {*files, MANIFEST})
    if known != manifest or changed:
        what = f"{changed[0]} came or went" if changed else "its manifest is another"
        raise AlteredError(f"{path} was altered after it was published ({what}): {REMEDY}")
    for name, sha256 in files.items():
        confirm(path / name, sha256, REMEDY)
