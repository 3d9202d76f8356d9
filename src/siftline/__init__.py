"""Siftline: curate instruction data, train on it, account for every row."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

__version__ = "0.1.0"
__all__ = ["load"]


def load(*folders: "str | Path", **options: Any) -> Any:
    """Published versions as one `datasets.Dataset` with native messages; see `loading.load`."""
    from siftline.rows.loading import load as read

    return read(*folders, **options)
