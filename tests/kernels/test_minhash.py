"""Shingles, signatures, bands and similarities against independent references."""

import numpy as np
import pytest
from datasketch import MinHash
from hypothesis import given, settings
from hypothesis import strategies as st

from siftline.kernels.sets.greedy import Rows, remove_similar, remove_similar_reference
from siftline.kernels.sets.groups import grouped
from siftline.kernels.sets.jaccard import jaccard_pairs, jaccard_reference, required_overlap
from siftline.kernels.sets.lsh import band_keys, choose_banding, recall
from siftline.kernels.sets.shingles import (
    EMPTY,
    Sets,
    char_shingles,
    char_shingles_reference,
    concatenate,
    signatures,
    signatures_reference,
    word_grams,
    word_grams_reference,
)

TEXT = st.text(st.characters(codec="utf-8"), max_size=60)


def sets_of(rows, dtype=np.uint32):
    values = [np.array(sorted(row), dtype) for row in rows]
    offsets = np.cumsum([0, *map(len, values)]).astype(np.int64)
    return Sets(np.concatenate([*values, np.zeros(0, dtype)]), offsets)


def random_pair(rng, size, similarity):
    """Two sets of about `size` hashes with about the Jaccard similarity asked for."""
    same = round(2 * size * similarity / (1 + similarity))
    pool = rng.choice(2**32, 2 * size, replace=False)
    return set(pool[:size].tolist()), set(pool[:same].tolist()) | set(pool[size:][same:].tolist())


@settings(deadline=None, max_examples=60)
@given(st.lists(TEXT, max_size=5), st.integers(1, 6))
def test_shingles_equal_the_set_reference(texts, n):
    characters, grams = char_shingles(texts, n), word_grams(texts, n)
    for i, text in enumerate(texts):
        assert characters.row(i).tolist() == sorted(char_shingles_reference(text, n))
        assert grams.row(i).tolist() == sorted(word_grams_reference(text, n))


def test_a_short_text_is_one_shingle_and_an_empty_one_none():
    sizes = char_shingles(["", "yes", "yes", "yeses", "yesses"], 5).sizes.tolist()
    assert sizes == [0, 1, 1, 1, 2]
    sets = char_shingles(["yes", "yes", "no"], 5)
    assert jaccard_pairs(sets, np.array([0, 0]), np.array([1, 2])).tolist() == [1.0, 0.0]
    # A shorter text is never mistaken for a window of a longer one.
    assert not set(word_grams(["a b"], 3).values) & set(word_grams(["a b c d"], 2).values) - set(
        word_grams(["a b"], 2).values
    )


def test_sets_stack_and_take():
    parts = [char_shingles(["alpha beta", ""], 3), char_shingles(["gamma"], 3)]
    stacked = concatenate(parts)
    taken = stacked.take(np.array([2, 1, 0]))
    assert [taken.row(i).tolist() for i in range(3)] == [stacked.row(i).tolist() for i in (2, 1, 0)]
    assert stacked.row(2).tolist() == parts[1].row(0).tolist()


@pytest.mark.parametrize(("num_perm", "seed"), [(16, 1), (128, 1), (256, 7)])
def test_signatures_equal_datasketch_and_the_numpy_reference(num_perm, seed):
    rng = np.random.default_rng(0)
    rows = [set(rng.integers(0, 2**32, n).tolist()) for n in (0, 1, 2, 50, 700)]
    sets = sets_of([*rows, {0, 2**32 - 1}])
    ours = signatures(sets, num_perm, seed)
    assert ours.dtype == np.uint32
    assert np.array_equal(ours, signatures_reference(sets, num_perm, seed))
    assert (ours[0] == EMPTY).all()
    for i in range(len(sets)):
        sketch = MinHash(num_perm=num_perm, seed=seed, hashfunc=int)
        for value in sets.row(i):
            sketch.update(value)
        assert np.array_equal(ours[i], sketch.hashvalues)


def test_signatures_estimate_similarity_without_bias():
    rng = np.random.default_rng(1)
    for similarity in (0.5, 0.8):
        pairs = [random_pair(rng, 300, similarity) for _ in range(100)]
        ours = signatures(sets_of([s for pair in pairs for s in pair]), 128)
        estimate = (ours[::2] == ours[1::2]).mean(axis=1)
        exact = np.array([jaccard_reference(*pair) for pair in pairs])
        # Standard deviation of one estimate is sqrt(s (1 - s) / 128) = 0.044; of the mean, 0.0044.
        assert abs((estimate - exact).mean()) < 0.016


def test_banding_is_the_most_selective_that_reaches_the_recall():
    for similarity in (0.3, 0.55, 0.75, 0.85, 0.95, 1.0):
        chosen = choose_banding(similarity, 256)
        assert chosen.slots <= 256
        assert chosen.recall == pytest.approx(1 - (1 - similarity**chosen.rows) ** chosen.bands)
        assert chosen.recall >= 0.99
        if chosen.bands > 1:
            assert recall(similarity, chosen.bands - 1, chosen.rows) < 0.99
        if chosen.rows < 256:
            assert recall(similarity, 256 // (chosen.rows + 1), chosen.rows + 1) < 0.99
    with pytest.raises(ValueError, match="raise num_perm"):
        choose_banding(0.2, 8)
    with pytest.raises(ValueError, match="num_perm=4"):
        choose_banding(0.85, 4, min_rows=2)


def test_measured_recall_follows_the_formula():
    rng = np.random.default_rng(2)
    banding = choose_banding(0.85, 128)
    for similarity in (0.6, 0.7, 0.85):
        pairs = [random_pair(rng, 200, similarity) for _ in range(400)]
        sets = sets_of([s for pair in pairs for s in pair])
        keys = band_keys(signatures(sets, banding.slots), banding, np.zeros(len(sets), np.uint64))
        measured = (keys[::2] == keys[1::2]).any(axis=1).mean()
        expected = np.mean(
            [recall(jaccard_reference(*p), banding.bands, banding.rows) for p in pairs]
        )
        assert abs(measured - expected) < 0.08


def test_groups_number_only_shared_keys_and_guards_part_rows():
    keys = np.array([[5, 1], [5, 2], [6, 1], [7, 1], [8, 3], [0, 0], [0, 0]], np.uint64)
    found = grouped(lambda k: keys[:, k], 2, len(keys))
    assert (found.count, found.last) == (2, 1)
    assert found.rows.tolist() == [0, 1, 2, 3]
    lists = np.split(found.numbers, found.lists[1:-1])
    assert [numbers.tolist() for numbers in lists] == [[0, 1], [0], [1], [1]]
    turned = grouped(lambda k: keys[:, k], 2, len(keys), lambda rows: np.argsort(-rows))
    assert turned.rows.tolist() == [3, 2, 1, 0]
    assert [part.tolist() for part in np.split(turned.numbers, turned.lists[1:-1])] == [
        part.tolist() for part in lists[::-1]
    ]
    banding = choose_banding(0.9, 16)
    same = np.zeros((2, 16), np.uint32)
    assert (np.diff(band_keys(same, banding, np.array([3, 3])), axis=0) == 0).all()
    assert (
        band_keys(same, banding, np.array([3, 4]))[0]
        != band_keys(same, banding, np.array([3, 4]))[1]
    ).all()
    assert len(set(band_keys(same, banding, np.array([3, 3]))[0])) == banding.bands


@settings(deadline=None, max_examples=100)
@given(
    st.sets(st.integers(0, 30), max_size=20),
    st.sets(st.integers(0, 30), max_size=20),
    st.sampled_from([0.5, 0.75, 0.8, 1 / 3, 1.0]),
)
def test_jaccard_equals_python_sets(left, right, threshold):
    sets = sets_of([left, right])
    value = jaccard_pairs(sets, np.array([0]), np.array([1]))[0]
    assert value == jaccard_reference(left, right)
    need = required_overlap(len(left), len(right), threshold)
    if left or right:
        assert (value >= threshold) == (len(left & right) >= need)


@settings(deadline=None, max_examples=80)
@given(st.data())
def test_greedy_equals_comparing_all_pairs(data):
    n = data.draw(st.integers(1, 25))
    column = lambda low, high: np.array(  # noqa: E731
        data.draw(st.lists(st.integers(low, high), min_size=n, max_size=n)), np.int64
    )
    sets = [set(range(k, k + 8)) for k in range(5)] + [set()]
    rows = Rows(
        *in_groups(n, 2),  # one group a band: all rows are candidates
        identity=column(-1, min(n - 1, 4)).astype(np.int32),
        texts=np.stack([column(0, 5), column(0, 5)], axis=1).astype(np.int32),
        guard=column(0, 1).astype(np.uint64),
        label=column(-1, 2),
        strict=column(0, 1).astype(bool),
    )
    result = remove_similar(rows, sets_of(sets), 2, 0.6, 10**6)
    assert result.matched.tolist() == remove_similar_reference(rows, sets, 0.6)


def in_groups(n, bands):
    """Lists in which all rows share a group in each band."""
    starts = np.arange(n) * bands
    return starts, starts + bands, np.tile(np.arange(bands, dtype=np.int32), n)


def test_a_thousand_copies_cost_a_thousand_comparisons_and_dissimilar_rows_are_bounded():
    n = 1000
    blank = np.zeros(n, np.int64)
    same = np.zeros((n, 2), np.int32)
    rest = (blank.astype(np.uint64), blank - 1, blank > 0)
    rows = Rows(*in_groups(n, 1), same[:, 0] - 1, same, *rest)
    result = remove_similar(rows, sets_of([{1, 2, 3}]), 1, 0.8, 10**6)
    assert result.pairs == n - 1
    assert (result.matched[1:] == 0).all()
    lone = rows._replace(texts=same + np.arange(n, dtype=np.int32)[:, None])
    apart = sets_of([{k} for k in range(n)])
    with pytest.raises(ValueError, match="candidate pairs"):
        remove_similar(lone, apart, 1, 0.8, 1000)
