"""From a recipe's paths to the files behind them: what they are, what they are called, their hash.

Provenance names a file relative to the folder or glob it came from, never by an absolute path, so a
pool has the same bytes wherever its inputs lie. Where two different files would get one name, the
names grow leftwards by parent folders until they differ, as editors do with tabs.
"""

import gzip
import hashlib
import io
import json
import logging
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any, cast

import pyarrow as pa

from siftline.ingest.source import Source, file_format, read_name
from siftline.rows.published import confirm_inputs

logger = logging.getLogger(__name__)

VERSION = 2
"""Part of the fingerprint: raise it when the same files would become other rows."""
_MAGIC = "*?["
_BUFFER = 1 << 20


@dataclass(frozen=True)
class InputFile:
    """One file of a source, or a whole `datasets` split.

    Attributes:
        source: The source it belongs to.
        fs: Its fsspec file system; None for `datasets`.
        path: Its path on that file system.
        parts: The protocol and the path's parts, from which names are made.
        depth: How many parts, from the right, the name takes.
        format: How it is read; never `auto`.
        saved: Name of the folder that `datasets` saved it in, which says more than its own.
    """

    source: Source
    fs: Any
    path: str
    parts: tuple[str, ...]
    depth: int
    format: str
    saved: str | None = None

    @property
    def name(self) -> str:
        """The name provenance and quarantine give it."""
        return "/".join(self.parts[-self.depth :])

    @property
    def stem(self) -> str:
        """The source name of its rows when the recipe gives none."""
        if self.saved is not None:
            return self.saved
        name = self.source.dataset_name()[0] if self.fs is None else self.path
        return name.rstrip("/").rpartition("/")[2] if self.fs is None else read_name(name).stem

    def open(self) -> IO[bytes]:
        """Opens its bytes as stored, seekable where the file system allows."""
        return cast(IO[bytes], self.fs.open(self.path, "rb"))

    def open_text(self) -> IO[bytes]:
        """Opens its bytes decompressed, buffered, to be read forward."""
        raw: Any = self.open()
        compression = read_name(self.path).compression
        if compression == "gzip":
            raw = gzip.GzipFile(fileobj=raw, mode="rb")
        elif compression == "zstd":
            raw = pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), "zstd")
        return io.BufferedReader(raw, _BUFFER)


def source_files(source: Source) -> list[str]:
    """The paths of a source's files, resolved and sorted; a `datasets` source gives its own path.

    Raises:
        ValueError: if nothing matches, or an ending is unknown.
    """
    return [f.path for f in _find(source)]


def input_files(sources: Sequence[Source]) -> list[InputFile]:
    """Every file of every source, each under a name no other file has.

    Files come source by source as given, sorted inside each; the names don't depend on that order.

    Raises:
        ValueError: as `source_files`, or if one file is read twice with the same mapping.
    """
    files = [file for source in sources for file in _find(source)]
    seen: set[str] = set()
    for file in files:
        key = json.dumps([file.parts, _mapping(file.source)])
        if key in seen:
            raise ValueError(f"{file.path}: two sources read it with the same mapping; remove one")
        seen.add(key)
    return _distinct(files)


def fingerprint(sources: Sequence[Source]) -> str:
    """Hashes what ingestion reads: every file's bytes and name, and its mapping.

    The same for any order of the sources and wherever the files lie.

    Returns:
        64 hex digits (SHA-256).
    """
    lines = sorted(
        json.dumps([file.name, _content_hash(file), _mapping(file.source)], sort_keys=True)
        for file in input_files(sources)
    )
    return hashlib.sha256("\n".join([f"ingest {VERSION}", *lines]).encode()).hexdigest()


def file_states(sources: Sequence[Source]) -> list[tuple[str, int | None, str]]:
    """What can be told of every file without reading it.

    A store's listing is asked for anew: a file system that keeps listings would never see a change.

    Returns:
        Path with its protocol, size, and the store's own mark (ETag) or else the time of the last
        change; sorted. A `datasets` source is its path alone.

    Raises:
        ValueError: as `source_files`.
    """
    from fsspec.core import url_to_fs

    found: list[tuple[str, int | None, str]] = []
    for source in sources:
        if not source.is_dataset and "://" in source.path:
            url_to_fs(source.path)[0].invalidate_cache()
        for file in _find(source):
            if file.fs is None:
                found.append((file.path, None, ""))
                continue
            info = file.fs.info(file.path)
            marks = (info.get(k) for k in ("ETag", "etag", "mtime", "LastModified", "created"))
            mark = next((str(m) for m in marks if m is not None), "")
            found.append((file.fs.unstrip_protocol(file.path), info.get("size"), mark))
    return sorted(found, key=str)


def load_dataset(source: Source) -> Any:
    """Loads one split through the `datasets` library, its batches as Arrow tables.

    Raises:
        ValueError: if the package is missing or can't load it.
    """
    name, config = source.dataset_name()
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            f"{source.path}: needs the datasets package; pip install 'siftline[datasets]'"
        ) from error
    try:
        if (Path(name) / "state.json").exists() or (Path(name) / "dataset_dict.json").exists():
            saved = datasets.load_from_disk(name)
            split = saved[source.split] if isinstance(saved, datasets.DatasetDict) else saved
        else:
            split = datasets.load_dataset(name, config, split=source.split)
    # The library raises whatever its loaders and its network client do; all mean the same here.
    except Exception as error:
        what = f"name {name!r}, config {config!r}, split {source.split!r}"
        raise ValueError(f"{source.path}: datasets could not load {what}: {error}") from error
    return split.with_format("arrow")


def _find(source: Source) -> list[InputFile]:
    if source.is_dataset:
        name, config = source.dataset_name()
        parts = ("datasets", *name.strip("/").split("/"), *filter(None, [config]), source.split)
        # A local folder is called by its last part; a hub name keeps its owner.
        hidden = len(name.strip("/").split("/")) - 1 if name.startswith(("/", ".", "~")) else 0
        return [InputFile(source, None, source.path, parts, len(parts) - 1 - hidden, "datasets")]
    from fsspec.core import url_to_fs

    try:
        fs, path = url_to_fs(source.path)
    except (ImportError, ValueError) as error:
        raise ValueError(f"{source.path}: no file system for it: {error}") from error
    saved = _saved(fs, path, source) if fs.isdir(path) else None
    root, paths = (path, saved) if saved is not None else _match(fs, path, source)
    folder = path.rstrip("/").rpartition("/")[2] if saved is not None else None
    protocol = fs.protocol if isinstance(fs.protocol, str) else fs.protocol[0]
    files = []
    for found in sorted(paths):
        depth = len(_parts(found)) - len(_parts(root))
        parts = (protocol, *_parts(found))
        form = file_format(source, found)
        files.append(InputFile(source, fs, found, parts, depth, form, folder))
    return files


_SAVED = ("dataset_info.json", "state.json")
"""What `Dataset.save_to_disk` writes beside its Arrow files."""


def _saved(fs: Any, path: str, source: Source) -> list[str] | None:
    """The Arrow files of a folder that `datasets` saved; None of any other folder.

    Raises:
        ValueError: if it has several splits and none is the source's, or is damaged.
    """
    folder = path.rstrip("/")
    try:
        if fs.exists(f"{folder}/dataset_dict.json"):
            splits = json.loads(fs.cat_file(f"{folder}/dataset_dict.json"))["splits"]
            if source.split not in splits:
                raise ValueError(
                    f"{source.path}: has the splits {', '.join(splits)}, not {source.split!r}; "
                    "state split, or name the folder of one"
                )
            folder = f"{folder}/{source.split}"
        if not all(fs.exists(f"{folder}/{name}") for name in _SAVED):
            return None
        state = json.loads(fs.cat_file(f"{folder}/state.json"))
        found = [f"{folder}/{line['filename']}" for line in state["_data_files"]]
    except (KeyError, TypeError, OSError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{source.path}: no whole saved dataset ({error}); save it again"
        ) from error
    if not found:
        raise ValueError(f"{source.path}: empty, it has no rows; remove it from the source")
    return found


def _without_notes(paths: list[str]) -> list[str]:
    """Leaves out what `save_to_disk` notes about the datasets below a folder."""
    of: dict[str, set[str]] = defaultdict(set)
    for path in paths:
        folder, _, name = path.rpartition("/")
        of[folder].add(name)
    saved = {folder for folder, names in of.items() if names >= set(_SAVED)}
    notes = {f"{folder}/{name}" for folder in saved for name in _SAVED}
    notes |= {p for p in paths if p.rpartition("/")[2] == "dataset_dict.json"}
    return [path for path in paths if path not in notes]


def _match(fs: Any, path: str, source: Source) -> tuple[str, list[str]]:
    """The folder names are relative to, and the files a path, folder or glob stands for."""
    # Before the glob test: a real file's name may hold brackets.
    if fs.isfile(path):
        return path.rstrip("/").rpartition("/")[0], [path]
    if fs.isdir(path):
        found = _without_notes([p for p in fs.find(path) if not _is_hidden(p, path)])
        known = [p for p in found if _is_wanted(p, source)]
        for skipped in sorted(set(found) - set(known)):
            logger.warning("%s: left out, its ending tells no format this source reads", skipped)
        if not known:
            raise ValueError(f"{source.path}: no readable file in this folder; try a glob")
        return path, known
    if not any(c in path for c in _MAGIC):
        raise ValueError(f"{source.path}: no such file or folder")
    parts = path.split("/")
    fixed = next(i for i, part in enumerate(parts) if any(c in part for c in _MAGIC))
    root = "/".join(parts[:fixed])
    found = [p for p, info in fs.glob(path, detail=True).items() if info["type"] == "file"]
    found = [p for p in found if not _is_hidden(p, root)]
    if not found:
        raise ValueError(f"{source.path}: no file matches")
    return root, found


def _parts(path: str) -> tuple[str, ...]:
    return tuple(part for part in path.split("/") if part)


def _is_hidden(path: str, root: str) -> bool:
    # Half-built outputs live under dot names.
    return any(part.startswith(".") for part in _parts(path)[len(_parts(root)) :])


def _is_wanted(path: str, source: Source) -> bool:
    form = read_name(path).format
    return form is not None and source.format in ("auto", form)


def _distinct(files: Sequence[InputFile]) -> list[InputFile]:
    """Lengthens names until no two files share one; what a name becomes knows no order."""
    depths: dict[tuple[str, ...], int] = {}
    for file in files:
        depths[file.parts] = max(file.depth, depths.get(file.parts, 0))
    while True:
        named = defaultdict(list)
        for parts, depth in depths.items():
            named[parts[-depth:]].append(parts)
        clashing = [parts for group in named.values() if len(group) > 1 for parts in group]
        if not clashing:
            return [replace(file, depth=depths[file.parts]) for file in files]
        for parts in clashing:
            depths[parts] = min(depths[parts] + 1, len(parts))


def _mapping(source: Source) -> dict[str, Any]:
    return {k: v for k, v in asdict(source).items() if k != "path"}


def _content_hash(file: InputFile) -> str:
    sha = hashlib.sha256()
    if file.format == "datasets":
        for table in load_dataset(file.source).iter(batch_size=1000):
            sink = pa.BufferOutputStream()
            with pa.ipc.new_stream(sink, table.schema) as writer:
                writer.write_table(table)
            sha.update(sink.getvalue())
        return sha.hexdigest()
    try:
        if file.parts[0] == "file":
            confirm_inputs([Path(file.path)])
        with file.open() as stream:
            while block := stream.read(_BUFFER):
                sha.update(block)
    except OSError as error:
        raise ValueError(f"{file.path}: can't be read: {error}") from error
    return sha.hexdigest()
