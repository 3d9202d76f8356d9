"""Names under which a process writes what is not done yet, and what killed ones left under them."""

import os
import platform
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from siftline.disk import writing


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
