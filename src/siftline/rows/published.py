"""Reads published versions as they were published: manifest, files, hashes.

A version's name is the hash of its manifest's content, and the manifest holds those of all files.
So a version is either what it was or an error, wherever it is read: by `latest`, by its folder, or
one of its shards as an input file.

Hashes of what a verb or a trainer wrote, in a list beside it, compared before it is read.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from siftline.rows.shards import write_json
from siftline.rows.verified import (
    AlteredError,
    confirm,
    content_hash,
    file_hash,
    read_hashed,
    read_parquet,
    with_hash,
)

MANIFEST = "manifest.json"
REMEDY = "published versions never change; move the folder away and run again, or restore a copy"
_VERSION = re.compile(r"[0-9a-f]{12}")


def is_version(folder: Path) -> bool:
    """Whether a folder looks like a published version: named by a hash, with a data folder."""
    return bool(_VERSION.fullmatch(folder.name)) and (folder / "data").is_dir()


def version_of(body: dict[str, Any]) -> str:
    """The name of a version with this manifest, less its key `version`."""
    return content_hash(body)[:12]


def read_version(folder: Path) -> dict[str, Any]:
    """The manifest of a published version, which has to be the one that named it.

    Raises:
        AlteredError: if it is missing, damaged, or of another version.
    """
    path = folder / MANIFEST
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        body = {key: value for key, value in manifest.items() if key != "version"}
        named, found = manifest["version"], version_of(body)
        if not isinstance(manifest["files"], list):
            raise TypeError("files is no list")
    except FileNotFoundError:
        raise AlteredError(f"{path} is missing: {REMEDY}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        said = str(error) if path.stat().st_size else "it is empty"
        raise AlteredError(f"{path} is not the manifest of a version ({said}): {REMEDY}") from error
    if found != named or (is_version(folder) and named != folder.name):
        said = f"its content is that of {found}, it says {named}"
        raise AlteredError(f"{path} was altered ({said}, its folder is {folder.name}): {REMEDY}")
    return manifest


def read_config(
    folder: Path,
    manifest: dict[str, Any],
    config: str = "data",
    columns: list[str] | None = None,
) -> list[pa.Table]:
    """The Parquet files of one configuration of a version, in order.

    Args:
        folder: The version.
        manifest: What `read_version` gave.
        config: Its folder: data, removed, …
        columns: Those to read; None reads all. A column that no file has is an error.

    Raises:
        AlteredError: if a file is missing or not what was published.
    """
    found = []
    for path, file in config_files(folder, manifest, config):
        table = read_parquet(
            path, file["sha256"], rows=file["rows"], columns=columns, remedy=REMEDY
        )
        assert columns is None or table.column_names == columns, table.column_names
        found.append(table)
    return found


def config_files(
    folder: Path, manifest: dict[str, Any], config: str = "data"
) -> list[tuple[Path, dict[str, Any]]]:
    """Path and manifest entry of every Parquet file of one configuration.

    Raises:
        AlteredError: if the folder holds Parquet files that the version has not.
    """
    listed = {
        folder / file["path"]: file
        for file in manifest["files"]
        if file["path"].startswith(f"{config}/") and file["path"].endswith(".parquet")
    }
    others = sorted(set((folder / config).glob("*.parquet")) - set(listed))
    if others:
        raise AlteredError(f"{others[0]} is no file of this version: {REMEDY}")
    return list(listed.items())


def confirmed_files(folder: Path, config: str = "data") -> list[Path]:
    """The Parquet files of one configuration of a version, each compared with the manifest.

    Raises:
        AlteredError: if one is missing or not what was published.
    """
    files = config_files(folder, read_version(folder), config)
    for path, file in files:
        confirm(path, file["sha256"], REMEDY)
    return [path for path, _ in files]


def confirm_inputs(paths: Sequence[Path]) -> None:
    """Compares files that were written here with what vouches for them: manifests and lists.

    Shards of published versions are held to their version, outputs of verbs to the list beside
    them; other files are the user's.

    Raises:
        AlteredError: if one is not what was written.
    """
    for given in paths:
        path = Path(given).resolve()  # `latest` is a link
        folder = path.parent.parent
        if not is_version(folder):
            confirm_output(path)
            continue
        listed = {folder / file["path"]: file for file in read_version(folder)["files"]}
        if path in listed:
            confirm(path, listed[path]["sha256"], REMEDY)


LISTED = "siftline-files.json"
"""Holds the hashes of the files beside it, and its own; trained models have one as well."""
OUTPUTS = "outputs"
_REMEDY = f"restore it or make it again; if the change is meant, delete {LISTED} beside it"


def record_outputs(folder: Path, names: Sequence[str] = ()) -> None:
    """Lists the hashes of a verb's outputs; the last thing it writes.

    Args:
        folder: Where they lie.
        names: Which of its files and folders; by default all.
    """
    given = [folder / name for name in names] or [folder]
    inside = (p for path in given for p in (path.rglob("*") if path.is_dir() else [path]))
    files = sorted(path for path in inside if path.is_file() and path.name != LISTED)
    listed = {path.relative_to(folder).as_posix(): file_hash(path) for path in files}
    write_json(folder / LISTED, with_hash({OUTPUTS: listed}))


def forget_outputs(folder: Path) -> None:
    """Takes the list away before the files it names change."""
    (folder / LISTED).unlink(missing_ok=True)


def confirm_outputs(folder: Path, remedy: str) -> None:
    """Compares all files that the list in a folder names.

    Raises:
        AlteredError: naming the first that is not what was written, and the remedy.
    """
    listed = read_hashed(folder / LISTED, "a list of files", remedy).get(OUTPUTS)
    if listed is None:
        raise AlteredError(f"{folder / LISTED} is a list of other files: {remedy}")
    for name, sha256 in listed.items():
        confirm(folder / name, sha256, remedy)


def confirm_output(path: Path) -> None:
    """Compares a file with the list beside it, or in the folder above, if there is one.

    Raises:
        AlteredError: if the file or the list is not what was written.
    """
    path = path.resolve()
    for folder in path.parents[:2]:
        if (folder / LISTED).is_file():
            listed = read_hashed(folder / LISTED, "a list of files", _REMEDY).get(OUTPUTS, {})
            name = path.relative_to(folder).as_posix()
            if name in listed:
                confirm(path, listed[name], _REMEDY)
            return
