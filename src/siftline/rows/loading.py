"""Reads the rows of published versions with native messages."""

import json
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from siftline.rows.curated import resolve_latest
from siftline.rows.native import native_messages, native_tools

Form = Literal["messages", "prompt_completion"]
SFT = "default"
"""Name of the config that holds the rows for fine-tuning."""
BATCH = 1024  # rows decoded at once


def version_folder(given: str | Path) -> Path:
    """The folder of a version: the given one, or the newest of a recipe's.

    Raises:
        ValueError: if there is none.
    """
    path = Path(given)
    if (path / "latest").exists():
        return resolve_latest(path)
    if not (path / "data").is_dir():
        raise ValueError(f"{path} is no published version: give curated/<recipe>/<version>")
    return path.resolve()


def config_names(folder: Path) -> list[str]:
    """The configs of a version, `default` first."""
    others = [path.name for path in folder.iterdir() if any(path.glob(f"{path.name}-*.parquet"))]
    return [SFT, *sorted(others)]


def shards(folder: Path, config: str = SFT) -> list[Path]:
    """The Parquet files of a config in order.

    Raises:
        ValueError: if the version has no such config.
    """
    place, stem = ("data", "train") if config == SFT else (config, config)
    found = sorted((folder / place).glob(f"{stem}-*.parquet"))
    if not found:
        raise ValueError(
            f"{folder} has no config {config!r}: it has {', '.join(config_names(folder))}"
        )
    return found


def native_rows(folder: Path, config: str = SFT) -> Iterator[dict[str, Any]]:
    """Every row of a config in order, with conversations native and tools parsed."""
    for path in shards(folder, config):
        chats = _conversations(pq.read_schema(path))
        for batch in pq.ParquetFile(path).iter_batches(BATCH):
            for row in batch.to_pylist():
                for name in chats:
                    row[name] = native_messages(row[name])
                if "tools" in row:
                    row["tools"] = native_tools(row["tools"])
                yield row


def _conversations(schema: pa.Schema) -> list[str]:
    return [
        field.name
        for field in schema
        if pa.types.is_list(field.type)
        and pa.types.is_struct(field.type.value_type)
        and field.type.value_type.get_field_index("role") >= 0
    ]


def load(*folders: str | Path, config: str = SFT, form: Form = "messages") -> Any:
    """Versions as one `datasets.Dataset` whose messages are native, for TRL and its kind.

    A key that a message has no value for is absent, calls and tools are objects. Versions with
    different keys stack; columns that one lacks are null in its rows.

    Args:
        folders: Published versions, or folders of recipes, whose newest version is taken.
        config: `default`, the rows for fine-tuning, or `preferences`, `rlvr`, `removed`.
        form: `messages`; or `prompt_completion`: the messages before the response, and the
            response, which is what trainers then take their loss on under any chat template.

    Raises:
        ValueError: if a folder is no version, has no such config, or the installed `datasets` is
            too old for messages of different keys (4.7 is the first).
    """
    import datasets

    if not folders:
        raise ValueError("no folder to load: give curated/<recipe>/<version>")
    paths = [path for given in folders for path in shards(version_folder(given), config)]
    tables = [pq.read_table(path) for path in paths]
    chats = sorted({name for table in tables for name in _conversations(table.schema)})
    plain = all(_plain(table.schema, chats) for table in tables)
    if not plain and not hasattr(datasets, "Json"):
        raise ValueError(
            f"datasets {datasets.__version__} has no Json feature: install 4.7 or newer"
        )
    if not plain:
        tables = [_with_json(table, chats) for table in tables]
    table = pa.concat_tables(tables, promote_options="default")
    if form == "prompt_completion":
        table = _split(table)
    features = {field.name: _feature(datasets, field.type) for field in table.schema}
    typed = datasets.Features(features)
    return datasets.Dataset(
        table.cast(typed.arrow_schema), info=datasets.DatasetInfo(features=typed)
    )


def _plain(schema: pa.Schema, chats: Sequence[str]) -> bool:
    known = [schema.field(name).type.value_type for name in chats if name in schema.names]
    return "tools" not in schema.names and all(
        {field.name for field in turn} == {"role", "content"} for turn in known
    )


def _json_type() -> pa.DataType:
    return pa.json_(pa.string())


def _with_json(table: pa.Table, chats: Sequence[str]) -> pa.Table:
    """Conversations as lists of JSON objects, and tools as a list of them."""
    rounded = 0
    for name in [*chats, "tools"]:
        if name not in table.column_names:
            continue
        native: Any = native_tools if name == "tools" else native_messages
        texts: list[list[str] | None] = []
        for value in table[name].to_pylist():
            found = native(value)
            lines = None if found is None else [json.dumps(m, ensure_ascii=False) for m in found]
            texts.append(lines)
        rounded += sum(_rounded(text) for found in texts for text in found or [])
        column = pa.array(texts, pa.list_(pa.string())).cast(pa.list_(_json_type()))
        table = table.set_column(table.column_names.index(name), name, column)
    if rounded:
        warnings.warn(
            f"datasets rounds fractions of more than 15 digits in {rounded} messages", stacklevel=3
        )
    return table


def _rounded(text: str) -> bool:
    """Whether `datasets` reads other numbers from a JSON object than it holds.

    Raises:
        ValueError: for a number that it can't read.
    """
    from datasets.utils.json import ujson_loads

    try:
        return bool(ujson_loads(text) != json.loads(text))
    except ValueError as error:
        raise ValueError(f"datasets can't read {text[:80]!r}: {error}") from error


def _split(table: pa.Table) -> pa.Table:
    """`messages` cut before the response."""
    at = table.column_names.index("messages")
    column = table["messages"].combine_chunks()
    kind = column.type
    values = column.to_pylist()
    stored = pa.list_(pa.string()) if isinstance(kind.value_type, pa.JsonType) else kind
    prompt = pa.array([chat[:-1] for chat in values], stored).cast(kind)
    completion = pa.array([chat[-1:] for chat in values], stored).cast(kind)
    table = table.set_column(at, "prompt", prompt)
    return table.add_column(at + 1, "completion", completion)


def _feature(datasets: Any, kind: pa.DataType) -> Any:
    if pa.types.is_list(kind) and isinstance(kind.value_type, pa.JsonType):
        return datasets.List(datasets.Json())
    return datasets.features.features.generate_from_arrow_type(kind)
