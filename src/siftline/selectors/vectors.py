"""Embeddings as selectors read them: fixed-size lists of a frame, checked once."""

import numpy as np
import polars as pl

from siftline.selectors.method import MAX_VALUES

_CHECKED = 1 << 14


def matrix(frame: pl.DataFrame, what: str = "rows") -> np.ndarray:
    """The `embedding` column as a matrix, float16 or float32, shape (n, d).

    Raises:
        ValueError: if it is no fixed-size list, too large, or holds NaN, infinity or nulls.
    """
    dtype = frame.schema["embedding"]
    if not isinstance(dtype, pl.Array) or len(dtype.shape) != 1:
        raise ValueError(f"embedding of {what} is {dtype}: store fixed-size lists (pl.Array)")
    if dtype.inner not in (pl.Float16, pl.Float32):
        raise ValueError(f"embedding of {what} holds {dtype.inner}: store float16 or float32")
    values = frame.height * dtype.shape[0]
    if values > MAX_VALUES:
        raise ValueError(
            f"{frame.height} {what} x {dtype.shape[0]} dimensions is over {MAX_VALUES} values: "
            "draw a part with random first, or embed with fewer dimensions"
        )
    x = frame["embedding"].to_numpy()
    for start in range(0, len(x), _CHECKED):
        bad = np.flatnonzero(~np.isfinite(x[start : start + _CHECKED]).all(axis=1))
        if len(bad):
            identity = frame["id"][int(start + bad[0])]
            raise ValueError(
                f"embeddings of {what} hold NaN or infinity, first {identity}: embed it again, "
                "in float32 where float16 overflows"
            )
    return x


def target_rows(target: pl.DataFrame | None, needed: str) -> pl.DataFrame:
    """The target's rows, sorted by id.

    Raises:
        ValueError: if there are none, one comes twice, or they lack the column `needed`.
    """
    if target is None or target.is_empty():
        raise ValueError("the target set is empty: give rows like those the model shall be good at")
    if needed not in target.columns:
        raise ValueError(f"the target rows have no {needed}: give it for the pool and the target")
    if target["id"].is_duplicated().any():
        twice = target["id"].filter(target["id"].is_duplicated())[0]
        raise ValueError(f"target id {twice} comes twice: give each row once")
    return target.sort("id")


def both(pool: pl.DataFrame, target: pl.DataFrame | None) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings of a pool and of its target, each in the order of ids.

    Raises:
        ValueError: as `matrix` and `target_rows`, or if their widths differ.
    """
    x, y = matrix(pool), matrix(target_rows(target, "embedding"), "target rows")
    if x.shape[1] != y.shape[1]:
        raise ValueError(
            f"embeddings have {x.shape[1]} dimensions in the pool and {y.shape[1]} in the target: "
            "embed both with one model"
        )
    return x, y
