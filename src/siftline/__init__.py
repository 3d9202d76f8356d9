"""Siftline: curate instruction data, train on it, account for every row.

    import siftline as sl
    result = sl.dedup("train.jsonl")

What `__all__` names is the promise; everything else may change. A name is imported when it is used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from siftline.api import Result, decontaminate, dedup, quality, verify
    from siftline.rows.loading import load

__version__ = "0.1.0"
__all__ = ["Result", "decontaminate", "dedup", "load", "quality", "verify"]

_PLACES = {"load": "siftline.rows.loading"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'siftline' has no attribute {name!r}")
    found = getattr(import_module(_PLACES.get(name, "siftline.api")), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
