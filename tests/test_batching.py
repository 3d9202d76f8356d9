"""Planned batches: limits held, order forgotten."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from siftline.scoring.batching import plan_batches


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
