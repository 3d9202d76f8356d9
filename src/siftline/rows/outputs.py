"""Hashes of what a verb or a trainer wrote, in a list beside it, compared before it is read.

Outputs of verbs are meant to be moved, split and edited. A file that is copied elsewhere has no
list and is an input like any other; one that was changed where it lies is told, and so is how to
keep the change.
"""

from collections.abc import Sequence
from pathlib import Path

from siftline.rows.shards import write_json
from siftline.rows.verified import AlteredError, confirm, file_hash, read_hashed, with_hash

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
