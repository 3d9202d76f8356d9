"""Fast paths of deduplication: vector steps on bytes, kept shingles, and sorting by ranges."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import njit

from siftline.deduplication import engine as engines
from siftline.deduplication.arrow import texts_of
from siftline.deduplication.engine import Engine, Settings, deduplicate
from siftline.kernels.sets.rows import least
from siftline.kernels.sets.shingles import write_distinct
from siftline.kernels.text import bits
from siftline.kernels.text.codepoints import FRONT, fold_bytes, fold_points, tables
from siftline.kernels.text.folding import fold
from siftline.kernels.text.roles import ALWAYS, SMALL, role
from siftline.kernels.text.signs import marked
from siftline.kernels.text.textgrams import shingles_reference, windows
from siftline.kernels.text.tokens import word_units

SETS = {
    "letters64": set(b"abcdefghijklmnopqrstuvwxyz"),
    "digits64": set(b"0123456789"),
    "known64": {*b"abcdefghijklmnopqrstuvwxyz0123456789", *range(0x80, 0x100)},
    "joints64": set(b".,':;"),
    "rare64": set(range(0x21, 0x80)) - set(b"abcdefghijklmnopqrstuvwxyz0123456789.,':;\"?"),
    "dots64": set(b"."),
    "quotes64": set(b"'"),
    "separators64": set(b",;"),
    "colons64": set(b":"),
    "underscores64": set(b"_"),
    "hyphens64": set(b"-"),
    "bangs64": set(b"!"),
    "backslashes64": set(b"\\"),
    "opening64": set(b"([{"),
    "closing64": set(b")]}"),
    "round_opening64": set(b"("),
    "round_closing64": set(b")"),
    "square_opening64": set(b"["),
    "square_closing64": set(b"]"),
    "beside64": set(b"!$),.:;=?"),
    "signs64": set(b"#$%&*+/<=>@\\^|~"),
    "operators64": set(b"%&*+/<=>^|~"),
    "spaces64": set(range(1, 33)),
    "zeros64": {0},
}
NAMES = tuple(SETS)
CALLS = ", ".join(f"bits.{name}(data, at)" for name in NAMES)
marks_of = njit(eval(f"lambda data, at: ({CALLS})", {"bits": bits}))  # as many as there are


@njit
def vector_steps(data, at, out):
    bits.lower32(data, at, out, 0)
    return bits.high32(data, at), bits.same64(data, at)


@settings(deadline=None, max_examples=60)
@given(
    st.binary(min_size=64, max_size=64) | st.text(max_size=64).map(str.encode), st.integers(1, 9)
)
def test_vector_steps_equal_byte_by_byte(raw, at):
    raw = (raw + b"\0" * 64)[:64]
    data = np.frombuffer(b"\0" * at + raw, np.uint8).copy()
    out = np.full(40, 7, np.uint8)
    high, same = vector_steps(data, at, out)
    assert int(high) == sum((byte >> 7) << k for k, byte in enumerate(raw[:32]))
    before = b"\0" + raw
    assert int(same) == sum((byte == before[k]) << k for k, byte in enumerate(raw))
    for name, found in zip(NAMES, marks_of(data, at), strict=True):
        assert int(found) == sum((byte in SETS[name]) << k for k, byte in enumerate(raw)), name
    for byte, folded in zip(raw[:32], out.tolist(), strict=False):
        assert byte >= 0x80 or folded == ord(chr(byte).lower())
    assert (out[32:] == 7).all()


SIGNED = st.text("abn1 .,;-'!_([)]+=\\éα∞\n", min_size=1, max_size=200)


@settings(deadline=None, max_examples=500)
@given(SIGNED)
def test_roles_by_bits_are_those_by_bytes(text):
    """What 64 bytes at once are taken for is what each is by itself, wherever a step ends."""
    raw = np.frombuffer(text.encode(), np.uint8)
    folded = np.empty(fold_bytes(len(raw)), np.uint8)
    points = np.empty(fold_points(len(raw)), np.uint32)
    end = fold(raw, 0, len(raw), folded, tables(), points)
    base, words, marks = FRONT, [], []
    while base < end:
        in_word, sign, _, size = marked(folded, base)
        assert max(int(in_word), int(sign)) < 1 << size
        words += [base + k for k in range(size) if int(in_word) >> k & 1]
        marks += [base + k for k in range(size) if int(sign) >> k & 1]
        base += size
    roles = {k: role(folded, k) for k in range(FRONT, base)}
    assert words == [k for k, kind in roles.items() if kind == SMALL]
    assert marks == [k for k, kind in roles.items() if kind == ALWAYS]


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 70),
    st.integers(1, 60),
    st.integers(0, 2**32 - 1),
)
def test_signatures_of_any_width_are_least_values(slots, count, seed):
    """Blocks of 32 and 8 slots, and what is left over, against whole numbers of Python."""
    draw = np.random.default_rng(seed)
    a, b, mixed = (draw.integers(0, 2**32, n, np.uint32) for n in (slots, slots, count))
    out = np.full(slots + 1, 7, np.uint32)
    least(mixed, count, a, b, out[:slots])
    pairs = zip(a.tolist(), b.tolist(), strict=True)
    lowest = [min((x * h + y) % 2**32 for h in mixed.tolist()) for x, y in pairs]
    assert out.tolist() == [*lowest, 7]


@pytest.mark.parametrize(
    "odd", ["é", "你好", "©a©", "\u0301", "\u00ad", "🙂", "--", "Z9", "+", "(=", "=)", ".a", "d'e"]
)
def test_what_is_not_ascii_may_stand_anywhere_in_a_block(odd):
    """Every place of a step of 32, 8 and fewer bytes, before and behind it."""
    for before in range(40):
        text = ("Ab1 cde-" * 5)[:before] + odd + ("xY z0" * 20)[: (7 * before) % 75]
        raw = np.frombuffer(text.encode(), np.uint8)
        folded = np.empty(fold_bytes(len(raw)), np.uint8)
        units, out = np.empty(len(raw) + 2, np.uint64), np.empty(len(raw) + 2, np.uint32)
        end = fold(raw, 0, len(raw), folded, tables(), np.empty(fold_points(len(raw)), np.uint32))
        count = word_units(folded, end, units)
        assert out[: windows(units, count, 2, out)].tolist() == shingles_reference(text, 2)


@settings(deadline=None, max_examples=80)
@given(
    st.lists(st.integers(0, 2**32 - 1) | st.integers(0, 3) | st.integers(7 << 20, (7 << 20) + 9))
)
def test_distinct_equals_a_sorted_set(values):
    given_ = np.array(values, np.uint32)
    out = np.full(len(values) + 9, 7, np.uint32)
    ends = np.full(2 * len(values) + 3, -1, np.int32)
    found = write_distinct(given_, len(values), out, 4, ends)
    assert out[4 : 4 + found].tolist() == sorted(set(values))
    assert (out[:4] == 7).all()
    assert (out[4 + len(values) :] == 7).all()


def texts():
    """Copies with a word other, rows that hold nothing, and words shorter than room is made for."""
    rng = np.random.default_rng(3)
    words = np.array(["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta"])
    rows = [" ".join(words[rng.integers(0, 8, 40)]) for _ in range(60)]
    rows += [row.replace("alpha", "iota", 1) for row in rows[:30]] + rows[:10]
    dense = ["©a" * 30 + str(k % 5) for k in range(15)] + ["a b c d e f g h i " * 9] * 4
    rows = [*rows, None, "", *dense, None]
    return [rows[k] for k in rng.permutation(len(rows))]


@pytest.mark.parametrize("unit", ["word", "char"])
@pytest.mark.parametrize("workers", [1, 2])
def test_decisions_are_the_same_whatever_part_of_the_shingles_is_kept(monkeypatch, unit, workers):
    monkeypatch.setattr(engines, "_TASK_BYTES", 900)
    rows = texts()
    column = pa.chunked_array([pa.array(rows[:37]), pa.array(rows[37:])])
    found = {}
    for limit in (0, 4 * 150, 4 * 1000, 128 << 20):
        monkeypatch.setattr(engines, "HELD", limit)
        result = deduplicate(column, Settings(unit=unit), workers=workers)
        lists = (result.matched.tolist(), result.similarity.tolist(), result.exact.tolist())
        found[limit] = (*lists, result.pairs)
    assert len({str(each) for each in found.values()}) == 1
    assert 20 < sum(k >= 0 for k in found[0][0]) < 90


def test_what_is_kept_is_what_the_row_has_and_the_rest_is_marked(monkeypatch):
    monkeypatch.setattr(engines, "_TASK_BYTES", 900)
    rows = texts()
    part = texts_of(pa.array(rows))
    with Engine(Settings(), 1) as engine:
        out = engine.empty(len(rows))
        held = engine.held(part, 4 * 1200)
        engine.summarise(part, out, 0, held)
    kept = [k for k in range(len(rows)) if held.starts[k] >= 0]
    assert 20 < len(kept) < 100
    assert all(held.starts[k] == -1 for k in range(len(rows)) if rows[k] is None)
    for k in kept:
        begin = held.starts[k]
        mine = held.values[begin : begin + out.counts[k]].tolist()
        assert mine == shingles_reference(rows[k], 5)
