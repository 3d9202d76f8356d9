# ruff: noqa: RUF001
"""Deduplication of a text column: against sets in plain Python, datasketch, and planted copies."""

from itertools import combinations

import numpy as np
import pyarrow as pa
import pytest
from datasketch import MinHash, MinHashLSH
from hypothesis import given, settings
from hypothesis import strategies as st

from siftline.deduplication.arrow import texts_of
from siftline.deduplication.engine import Engine, Settings, deduplicate
from siftline.kernels.sets import keepers
from siftline.kernels.sets.groups import shared, shared_reference
from siftline.kernels.sets.jaccard import jaccard_reference
from siftline.kernels.sets.rows import sign
from siftline.kernels.sets.shingles import permutations
from siftline.kernels.text.codepoints import FRONT, fold_bytes, fold_points, tables
from siftline.kernels.text.folding import fold
from siftline.kernels.text.textgrams import character_units, shingles_reference, windows
from siftline.kernels.text.texts import buffers
from siftline.kernels.text.tokens import word_units, write_words

ODD = [
    "",
    "   ",
    "!?",
    "Hello, World! don't stop_now 123abc",
    "abcdefgh ijklmnop abcdefghi",
    "a" * 100 + " " + "b" * 16,
    "你好世界，我 love Python3 很多",
    "ﾊﾛｰ・ワールド Ａｂｃ ひらがな",
    "สวัสดีครับ ยินดี",
    "مَرْحَبًا بالعالم",
    "🙂🙂❤️👨\u200d👩\u200d👧 ok",
    "naïve Straße ÉCOLE ǅ İ \u212a",
    "“quoted” – dash’s end\u00a0x\u200by soft\u00adhyphen",
    "नमस्ते दुनिया",
    "\U000e0041 \U0010ffff \ue000 \x00 \x1f",
]
TEXT = st.text(st.characters(codec="utf-8"), max_size=40) | st.sampled_from(ODD)


def kernel_shingles(text, n, characters=False):
    raw = text.encode()
    data = np.frombuffer(raw, np.uint8) if raw else np.zeros(0, np.uint8)
    data.flags.writeable = False
    folded = np.empty(fold_bytes(len(raw)), np.uint8)
    end = fold(data, 0, len(raw), folded, tables(), np.empty(fold_points(len(raw)), np.uint32))
    units = np.empty(2 * end + 2, np.uint64)
    out = np.empty(2 * end + 2, np.uint32)
    if characters:
        words = np.empty(2 * end + 16, np.uint8)
        count = character_units(words, 0, write_words(folded, end, words, 0), units)
    else:
        count = word_units(folded, end, units)
    return out[: windows(units, count, n, out)].tolist()


def document(rng, words=120):
    return [f"w{k}" for k in rng.integers(0, 5000, words)]


def planted(rng, documents=60, copies=4):
    """Documents, and copies of them with a word changed here and there; ends say what of."""
    rows = []
    for _ in range(documents):
        original = [*document(rng), f"end{len(rows)}"]
        rows.append(" ".join(original))
        for edits in range(copies):
            copy = list(original)
            for at in rng.integers(0, len(copy) - 1, edits):
                copy[at] = f"x{rng.integers(10**6)}"
            rows.append(" ".join(copy))
    return [rows[k] for k in rng.permutation(len(rows))]


# ---- words and shingles ----------------------------------------------------------------------


@pytest.mark.parametrize("characters", [False, True])
@pytest.mark.parametrize("n", [1, 2, 5])
def test_odd_texts_give_the_shingles_of_the_reference(n, characters):
    for text in ODD:
        assert kernel_shingles(text, n, characters) == shingles_reference(text, n, characters)


@settings(deadline=None, max_examples=150)
@given(TEXT, st.integers(1, 6), st.booleans())
def test_any_text_gives_the_shingles_of_the_reference(text, n, characters):
    assert kernel_shingles(text, n, characters) == shingles_reference(text, n, characters)


def test_bytes_that_are_not_utf8_part_words():
    raw = b"ab\xffcd \xe4\xbd\xa0 \xf0\x9f x\xc3"
    data = np.frombuffer(raw, np.uint8)
    folded, words = np.empty(fold_bytes(len(raw)), np.uint8), np.empty(99, np.uint8)
    end = fold(data, 0, len(raw), folded, tables(), np.empty(fold_points(len(raw)), np.uint32))
    assert bytes(words[: write_words(folded, end, words, 0)]).decode() == "ab cd 你 x"
    assert (folded[:FRONT] == 32).all()
    assert (folded[end : end + 64] == 32).all()
    assert word_units(folded, end, np.empty(99, np.uint64)) == 4


def test_a_short_text_is_one_shingle():
    assert len(shingles_reference("one two", 5)) == 1
    assert shingles_reference("one two", 5) != shingles_reference("one two", 1)[:1]
    assert set(shingles_reference("a b", 3)).isdisjoint(shingles_reference("a b c d", 3))


# ---- signatures, groups, decisions -----------------------------------------------------------


@pytest.mark.parametrize(("num_perm", "seed"), [(16, 1), (128, 7)])
def test_signatures_equal_datasketch(num_perm, seed):
    rng = np.random.default_rng(0)
    texts = [*ODD, " ".join(document(rng, 700)), " ".join(document(rng, 13))]
    with Engine(Settings(seed=seed), workers=1) as engine:
        ours = np.empty((len(texts), num_perm), np.uint32)
        table = permutations(num_perm, seed)
        room = buffers(max(len(text.encode()) for text in texts), False)
        sign(texts_of(pa.array(texts)), engine.shingling, *table, ours, room)
    for text, signature in zip(texts, ours, strict=True):
        sketch = MinHash(num_perm=num_perm, seed=seed, scheme="affine32", hashfunc=int)
        for value in shingles_reference(text, 5):
            sketch.update(value)
        assert np.array_equal(signature, sketch.hashvalues), text


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 12), max_size=60), st.integers(0, 63))
def test_groups_equal_a_dictionary(keys, shift):
    spread = [key << shift & (2**64 - 1) for key in keys]
    rows, groups, count = shared(np.array(spread, np.uint64))
    found = {}
    for row, group in zip(rows.tolist(), groups.tolist(), strict=True):
        assert 0 <= group < count
        found.setdefault(group, []).append(row)
    assert all(members == sorted(members) for members in found.values())
    assert {frozenset(members) for members in found.values()} == shared_reference(spread)


def test_many_keys_are_grouped_in_ranges():
    rng = np.random.default_rng(3)
    keys = rng.integers(1, 2**63, 30_000, dtype=np.uint64) * np.uint64(2)
    keys[rng.permutation(30_000)[:6000]] = keys[rng.permutation(30_000)[:6000]]
    rows, groups, _ = shared(keys)
    found = {}
    for row, group in zip(rows.tolist(), groups.tolist(), strict=True):
        found.setdefault(group, set()).add(row)
    assert {frozenset(m) for m in found.values()} == shared_reference(keys.tolist())


def candidates(sets):
    """Rows that are all in one group, or in two."""
    m = len(sets)
    values = [np.array(sorted(s), np.uint32) for s in sets]
    sizes = np.array([len(v) for v in values], np.int32)
    starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    flat = np.concatenate([*values, np.zeros(0, np.uint32)])
    return keepers.Candidates(
        np.arange(m + 1, dtype=np.int64) * 2,
        np.tile(np.array([1, 0], np.int32), m),
        np.zeros(m, np.uint64),
        flat,
        starts[:-1],
        sizes,
    )


SETS = st.lists(st.integers(0, 8).map(lambda k: set(range(k, k + 9 - k % 3))), max_size=25)


@settings(deadline=None, max_examples=60)
@given(SETS, st.sampled_from([0.4, 0.6, 0.8, 1.0]), st.data())
def test_decisions_equal_comparing_all_pairs_and_later_rows_change_nothing_else(
    sets, threshold, data
):
    m = len(sets)
    rows = candidates(sets)
    fresh = keepers.Decisions(np.full(m, keepers.NEW, np.int32), np.zeros(m))
    whole, pairs = keepers.keep_first(rows, 2, threshold, 10**6, fresh)
    assert whole.matched.tolist() == keepers.keep_first_reference(sets, threshold)
    dropped, _ = keepers.drop_all(rows, 2, threshold, 10**6)
    assert dropped.matched.tolist() == keepers.drop_all_reference(sets, threshold)
    # Some rows were decided before the others came, wherever these stand in keep order.
    old = np.flatnonzero(
        data.draw(st.lists(st.booleans(), min_size=m, max_size=m)) if m else np.zeros(0, bool)
    )
    first, _ = keepers.keep_first(
        candidates([sets[k] for k in old]),
        2,
        threshold,
        10**6,
        keepers.Decisions(np.full(len(old), keepers.NEW, np.int32), np.zeros(len(old))),
    )
    before = keepers.Decisions(np.full(m, keepers.NEW, np.int32), np.zeros(m))
    before.matched[old] = np.where(first.matched < 0, keepers.KEPT, old[first.matched])
    before.value[old] = first.value
    again, fewer = keepers.keep_first(rows, 2, threshold, 10**6, before)
    assert again.matched.tolist() == whole.matched.tolist()
    assert again.value.tolist() == whole.value.tolist()
    if len(old) == m:
        assert fewer == 0
    assert len(old) or fewer == pairs


# ---- the whole -------------------------------------------------------------------------------


def shingle_set(text, how):
    return set(shingles_reference(text, how.ngram, how.unit == "char"))


@pytest.mark.parametrize("unit", ["word", "char"])
@pytest.mark.parametrize("threshold", [0.6, 0.8])
def test_planted_copies_are_found_and_every_removal_holds(unit, threshold):
    rng = np.random.default_rng(5)
    texts = planted(rng)
    how = Settings(threshold=threshold, unit=unit)
    result = deduplicate(pa.array(texts), how)
    sets = [shingle_set(text, how) for text in texts]
    for i in np.flatnonzero(~result.kept):
        j = result.matched[i]
        assert result.kept[j]
        assert j < i
        assert result.similarity[i] == jaccard_reference(sets[i], sets[j]) >= threshold
        assert result.exact[i] == (texts[i] == texts[j])
    # Kept pairs 0.05 above the threshold are what the bands missed.
    families = {}
    for i, text in enumerate(texts):
        families.setdefault(text.split()[-1], []).append(i)
    near = [
        pair
        for family in families.values()
        for pair in combinations(family, 2)
        if jaccard_reference(*(sets[i] for i in pair)) >= threshold + 0.05
    ]
    missed = sum(bool(result.kept[i] and result.kept[j]) for i, j in near)
    assert len(near) > 200
    assert missed <= 0.01 * len(near)
    assert result.cluster_size.sum() == len(texts)
    assert result.clusters == len(set(result.matched[~result.kept].tolist()))


def test_bands_reach_the_recall_with_the_fewest_candidates_and_datasketch_has_its_own():
    ours = Settings().banding()
    assert (ours.bands, ours.rows) == (15, 8)
    assert ours.recall >= 0.99
    theirs = Settings(bands="datasketch").banding()
    lsh = MinHashLSH(threshold=0.8, num_perm=128)
    assert (theirs.bands, theirs.rows) == (lsh.b, lsh.r) == (9, 13)
    assert theirs.recall < 0.75


@pytest.mark.parametrize("keep", ["first", "longest"])
def test_chunks_workers_and_types_change_nothing(keep):
    texts = planted(np.random.default_rng(6), 60)
    texts[7:7] = [None, "", "!", "!", "?", None, ""]
    column = pa.array(texts)
    priority = None
    if keep == "longest":
        priority = np.array([-len(text or "") for text in texts], np.float64)
    whole = deduplicate(column, priority=priority)
    forms = [
        pa.chunked_array([column[:50], column[50:51], column[51:51], column[51:]]),
        column.cast(pa.large_string()),
        column.cast(pa.string_view()),
        column.dictionary_encode(),
        pa.concat_arrays([pa.array(["zzz"]), column])[1:],
    ]
    for form in forms:
        for workers in (1, 3):
            other = deduplicate(form, priority=priority, workers=workers)
            assert np.array_equal(other.matched, whole.matched)
            assert np.array_equal(other.similarity, whole.similarity)
            assert other.pairs == whole.pairs


def test_the_best_by_priority_stays_whatever_the_row_order():
    rng = np.random.default_rng(8)
    texts = [f"{text} end{k}" for k, text in enumerate(planted(rng, 60))]
    score = rng.permutation(len(texts)).astype(np.float64)
    whole = deduplicate(pa.array(texts), priority=score)
    order = rng.permutation(len(texts))
    moved = deduplicate(pa.array([texts[k] for k in order]), priority=score[order])
    assert np.array_equal(moved.kept, whole.kept[order])
    gone = np.flatnonzero(~moved.kept)
    assert len(gone) > 50
    assert np.array_equal(order[moved.matched[gone]], whole.matched[order[gone]])
    assert (score[whole.matched[~whole.kept]] < score[~whole.kept]).all()


def test_texts_without_words_go_only_for_the_same_bytes():
    texts = ["", "!", None, "", "?", "!", None, "a b", "A  b!"]
    result = deduplicate(pa.array(texts))
    assert result.matched.tolist() == [-1, -1, -1, 0, -1, 1, -1, -1, 7]
    assert result.exact.tolist() == [False, False, False, True, False, True, False, False, False]
    assert result.similarity[8] == 1.0


def test_drop_all_leaves_no_copy():
    texts = ["a b c d e f", "unique thing", "A b c d e f", "a b c d e f", "other one"]
    result = deduplicate(pa.array(texts), drop_all=True)
    assert result.kept.tolist() == [False, True, False, False, True]
    assert result.clusters == 1
    assert result.matched.tolist() == [2, -1, 0, 0, -1]


@settings(deadline=None, max_examples=40)
@given(st.lists(TEXT | st.none(), max_size=12), st.booleans())
def test_any_texts_are_decided_as_all_pairs_would(texts, drop):
    how = Settings(ngram=2)
    result = deduplicate(pa.array(texts, pa.string()), how, drop_all=drop, workers=1)
    for i in np.flatnonzero(~result.kept):
        j = result.matched[i]
        mine, other = shingle_set(texts[i], how), shingle_set(texts[j], how)
        assert jaccard_reference(mine, other) == result.similarity[i] >= how.threshold
    copies = {text: texts.index(text) for text in texts if text is not None}
    for text, first in copies.items():
        rows = [k for k, other in enumerate(texts) if other == text]
        assert all(not result.kept[k] for k in rows if k != first or (drop and len(rows) > 1))


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"threshold": 0.0}, "threshold=0.0"),
        ({"threshold": 1.5}, "threshold=1.5"),
        ({"ngram": 0}, "at least 1"),
        ({"unit": "line"}, "unit='line'"),
        ({"bands": "all"}, "bands='all'"),
        ({"threshold": 0.1, "num_perm": 8}, "raise num_perm"),
    ],
)
def test_wrong_settings_are_refused(wrong, says):
    with pytest.raises(ValueError, match=says):
        Settings(**wrong)


def test_a_column_of_numbers_and_too_many_pairs_are_refused():
    with pytest.raises(ValueError, match="int64 is not text"):
        deduplicate(pa.array([1, 2]))
    texts = planted(np.random.default_rng(9), 10)
    with pytest.raises(ValueError, match="more than 3 candidate pairs"):
        deduplicate(pa.array(texts), Settings(max_pairs=3))
