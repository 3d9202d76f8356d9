"""Planned batches: limits held, order forgotten; what does not fit runs in halves."""

import gc
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from siftline.scoring.engines.batching import in_halves, plan_batches, ran_out_of_memory


def test_rows_share_a_batch_while_its_padded_tokens_fit():
    lengths, ids = [9, 3, 4, 3, 20, 4], list("abcdef")
    assert plan_batches(lengths, ids, 12, 3) == [[1, 3, 2], [5], [0], [4]]
    assert plan_batches([], [], 12, 3) == []
    with pytest.raises(ValueError, match="max_rows 0"):
        plan_batches(lengths, ids, 12, 0)
    with pytest.raises(ValueError, match="6 lengths for 5 ids"):
        plan_batches(lengths, ids[:5], 12, 3)


@given(
    st.lists(
        st.tuples(st.integers(1, 50), st.uuids().map(str)), max_size=40, unique_by=lambda r: r[1]
    ),
    st.integers(1, 200),
    st.integers(1, 10),
    st.randoms(),
)
def test_batches_hold_their_limits_whatever_the_order(rows, max_tokens, max_rows, random):
    def plan(rows):
        lengths, ids = [n for n, _ in rows], [i for _, i in rows]
        return [[rows[p] for p in b] for b in plan_batches(lengths, ids, max_tokens, max_rows)]

    batches = plan(rows)
    assert [row for batch in batches for row in batch] == sorted(rows)
    for batch in batches:
        padded = max(n for n, _ in batch) * len(batch)
        assert len(batch) <= max_rows
        assert padded <= max_tokens or len(batch) == 1
    shuffled = list(rows)
    random.shuffle(shuffled)
    assert plan(shuffled) == batches


def real_cpu_error():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(10**15)  # 4 PB
    return caught.value


def real_numpy_error():
    with pytest.raises(MemoryError) as caught:
        np.empty(10**16)
    return caught.value


def wrapped(error):
    try:
        try:
            raise error
        except type(error) as inner:
            raise ValueError("the kernel failed") from inner
    except ValueError as outer:
        return outer


SPENT = [
    torch.OutOfMemoryError("planted"),
    MemoryError(),
    real_cpu_error(),
    real_numpy_error(),
    RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported later"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    wrapped(torch.OutOfMemoryError("planted")),
    wrapped(RuntimeError("CUDA error: out of memory")),
]
BROKEN = [
    RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
    ValueError("a row ran out of memory lanes"),
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    wrapped(KeyError("x")),
]


@pytest.mark.parametrize("error", SPENT, ids=repr)
def test_whatever_says_that_memory_ran_out_halves_the_batch(error):
    assert ran_out_of_memory(error)
    ran, told = [], []

    def run(items):
        ran.append(list(items))
        if len(items) > 2:
            raise error
        return [2 * item for item in items]

    assert in_halves(run, range(7), told.append, "help") == [0, 2, 4, 6, 8, 10, 12]
    assert ran == [[*range(7)], [0, 1, 2, 3], [0, 1], [2, 3], [4, 5, 6], [4, 5], [6]]
    assert told == [7, 4, 3]


@pytest.mark.parametrize("error", BROKEN, ids=repr)
def test_any_other_failure_is_not_tried_again(error):
    ran = []

    def run(items):
        ran.append(len(items))
        raise error

    with pytest.raises(type(error)) as caught:
        in_halves(run, range(4), ran.append, "help")
    assert caught.value is error
    assert ran == [4]


def test_one_row_too_many_ends_with_the_remedy():
    def run(items):
        raise MemoryError

    with pytest.raises(RuntimeError, match="single row: buy some") as caught:
        in_halves(run, [1, 2], lambda rows: None, "buy some")
    assert isinstance(caught.value.__cause__, MemoryError)
    assert in_halves(run, [], lambda rows: None, "buy some") == []


def test_the_failed_batch_is_let_go_before_its_halves_run():
    class Held: ...

    alive = []

    def run(items):
        gc.collect()
        assert not any(reference() for reference in alive)
        held = Held()
        alive.append(weakref.ref(held))
        if len(items) > 1:
            raise MemoryError
        return [held is None]

    assert in_halves(run, [1, 2, 3], lambda rows: None, "help") == [False] * 3
