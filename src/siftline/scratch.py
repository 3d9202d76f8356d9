"""Folders for files of one run that nobody needs afterwards."""

import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4


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
