"""Near duplicates of files and of text columns; called, the function of the API.

`siftline.dedup(data)` and the package `siftline.dedup` share a name, and Python gives one attribute
to both. So the package can be called.
"""

import sys
from types import ModuleType
from typing import Any


class _Called(ModuleType):
    """A package that is also a function."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        from siftline.api import dedup

        return dedup(*arguments, **options)

    @property
    def __signature__(self) -> Any:
        from inspect import signature

        from siftline.api import dedup

        return signature(dedup)


sys.modules[__name__].__class__ = _Called
