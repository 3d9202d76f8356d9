"""What the duplicates gate keeps in files, and its decisions against plain references."""

import random

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from siftline.kernels.draws import hash64
from siftline.kernels.sets.greedy import GAP, copy_sets, told_apart
from siftline.kernels.sets.groups import among
from siftline.kernels.sets.jaccard import jaccard_reference
from siftline.kernels.sets.lsh import band_keys
from siftline.kernels.sets.shingles import Sets, char_shingles_reference, signatures_reference
from siftline.kernels.sets.spill import Shelved, values_room
from siftline.kernels.sets.spill import shelved as on_shelf
from siftline.kernels.text.words import numbers, words
from siftline.stages.duplicates.decide import Duplicates, against
from siftline.stages.duplicates.state import StateFiles, _mixed, normal_answer

WORDS = [
    *["red", "blue", "three", "half", "7", "1,200", "5%", "-", "no", "on", "yes", "YES", "x2"],
    *["long-winded", "caf\u00e9", "\u6f22\u5b57", "\u0663", "\u2019", "\ufb01ne", "twice."],
    *["\U0001f600", "elephants", "promenade"],
]


def odd_rows(seed, n=30):
    """Rows of few short and odd texts, copied, changed and answered at random."""
    rng = random.Random(seed)
    text = lambda: " ".join(rng.choices(WORDS, k=rng.choice([0, 1, 2, 5, 12])))  # noqa: E731
    base = [(text(), text()) for _ in range(rng.randint(1, 12))]
    rows = []
    for k in range(n):
        prompt, response = rng.choice(base)
        kind = rng.randrange(8)
        response += {1: " more", 2: "!", 3: " "}.get(kind, "")
        prompt = {4: prompt.upper(), 5: f" {prompt}"}.get(kind, prompt)
        response = rng.choice(["", "yes"]) if kind == 6 else response
        # Now and then rows go by one prompt_id whose prompts are not the same.
        group = "same" if rng.random() < 0.1 else words(prompt)
        answer = rng.choice([None, None, "1", "1.0", "2"])
        name = f"{rng.randrange(10**6):06d}{k:03d}"
        rows.append((name, group, prompt, response, answer, rng.randrange(3)))
    names = ["id", "prompt_id", "prompt", "response", "answer", "priority"]
    return pl.DataFrame(rows, names, orient="row", schema_overrides={"answer": pl.String})


def in_parts(frame, count):
    return [frame[k::count] for k in range(count)]


def on_disk(gate, parts, folder):
    """State files that holds nothing in memory."""
    files = StateFiles(folder, 0)
    for part in parts:
        files.add(gate.summarise(part))
    assert all(isinstance(state.bands, Shelved) for state in files.states)
    return files


def plain_bands(gate, line):
    """Band keys of one row from Python sets and `lsh.band_keys`."""
    banding = gate.banding()
    texts = [words(line[side]) for side in ("prompt", "response")]
    sets = [char_shingles_reference(text, gate.ngram) for text in texts]
    tiny = [len(found) / (len(found) + 1) < gate.threshold for found in sets]
    values = np.concatenate([np.array(sorted(found), np.uint32) for found in sets])
    ends = np.cumsum([0, *map(len, sets)])
    first, second = signatures_reference(Sets(values, ends), banding.slots, gate.seed)
    half = np.arange(banding.slots) % banding.rows < banding.rows // 2
    slots = np.where((half & (not tiny[0])) | tiny[1], first, second)
    exact = gate.numbers == "exact"
    mixed = [np.array([hash64(*numbers(t)) if exact else 0], np.uint64) for t in texts]
    guard = _mixed(*mixed)
    for text, small in zip(texts, tiny, strict=True):
        guard = _mixed(guard, np.array([hash64(text) if small else 0], np.uint64))
    return band_keys(slots[None, :], banding, guard)[0]


def by_hand(gate, frame):
    """Removals by holding every row against every kept one that shares a band, by id."""
    rows = frame.sort("priority", "id").to_dicts()
    answers = {}
    for row in rows:
        row["bands"] = plain_bands(gate, row)
        row["label"] = normal_answer(row["answer"]) if row["answer"] else None
        row["told"] = [numbers(words(row[side])) for side in ("prompt", "response")]
        texts = [words(row[side]) for side in ("prompt", "response")]
        row["sets"] = [char_shingles_reference(text, gate.ngram) for text in texts]
        answers.setdefault(row["prompt_id"], set()).update({row["label"]} - {None})
    kept, found = [], {}
    for row in rows:
        strict = len(answers[row["prompt_id"]]) > 1
        labels = [other["label"] for other in kept]
        free = [
            other
            for other, label in zip(kept, labels, strict=True)
            if row["label"] in (label, None) or (label is None and not strict)
        ]
        twins = [o for o in free if all(o[c] == row[c] for c in ("prompt_id", "response"))]
        near = []
        for other in free:
            pairs = zip(row["sets"], other["sets"], strict=True)
            value = min(jaccard_reference(*pair) for pair in pairs)
            told = gate.numbers == "any" or row["told"] == other["told"]
            if (row["bands"] == other["bands"]).any() and told and value >= gate.threshold:
                near.append((other["id"], value, "near_duplicate"))
        lost = [(twin["id"], 1.0, "exact_duplicate") for twin in twins] or near
        if row["response"] and lost:
            found[row["id"]] = lost[0]
        elif row["response"]:
            kept.append(row)
    return found


@settings(deadline=None, max_examples=12)
@given(
    st.integers(0, 10**6),
    st.sampled_from([0.5, 0.8, 1.0]),
    st.sampled_from(["exact", "any"]),
    st.integers(1, 4),
)
def test_decisions_on_odd_texts_are_those_of_all_pairs(seed, threshold, guard, count):
    frame = odd_rows(seed)
    gate = Duplicates(threshold, numbers=guard)
    plan = gate.decide([gate.summarise(part) for part in in_parts(frame, count)])
    removed = {
        line["id"]: (line["matched_id"], line["value"], line["reason"])
        for line in plan.removed.to_dicts()
    }
    assert removed == by_hand(gate, frame)


def test_odd_texts_do_contradict_repeat_and_resemble_each_other():
    facts = [
        Duplicates(0.5).decide([Duplicates(0.5).summarise(odd_rows(k))]).facts for k in range(6)
    ]
    for name in ("exact_duplicates", "near_duplicates", "conflicting_prompts", "empty_responses"):
        assert sum(fact[name] for fact in facts) > 2, name


@pytest.mark.parametrize("count", [1, 3, 8])
def test_shelved_states_decide_as_those_in_memory_whatever_the_buckets(tmp_path, count):
    gate, frame = (
        Duplicates(0.6),
        pl.concat([odd_rows(k).with_columns(pl.col("id") + f"-{k}") for k in range(4)]),
    )
    whole = gate.decide([gate.summarise(frame)])
    files = on_disk(gate, [*in_parts(frame, count), frame.clear()], tmp_path)
    plan = gate.decide(files.states, lambda size: values_room(size, tmp_path, 0))
    assert (tmp_path / "sets.bin").stat().st_size > 0
    assert plan.removed.sort("id").equals(whole.removed.sort("id"))
    assert plan.clusters.equals(whole.clusters)
    assert plan.facts == whole.facts
    assert whole.removed.height > 20


@pytest.mark.parametrize("seed", range(4))
def test_a_new_row_is_held_against_shelved_rows_as_against_those_in_memory(tmp_path, seed):
    gate, frame = Duplicates(0.6), odd_rows(seed, 60)
    old = in_parts(frame[:40], 3)
    fresh = gate.summarise(frame[40:].with_columns(priority=pl.lit(9)))
    states = [gate.summarise(part) for part in old]
    stored = on_disk(gate, old, tmp_path).states
    removed = gate.decide(states).removed
    expected = gate.decide(against(fresh, states, set(removed["id"]))).removed
    found = gate.decide(against(fresh, stored, removed["id"])).removed
    assert found.equals(expected)
    assert found.height > 2
    gone = set(removed["id"])
    for part in against(fresh, stored, removed["id"])[:-1]:
        assert not gone & set(part.rows["id"])


def test_rows_of_one_prompt_id_and_response_are_twins_without_a_shared_band():
    names = ["id", "prompt_id", "prompt", "response", "answer"]
    rows = [("1", "p", "a first question", "yes", None), ("2", "p", "quite another", "yes", None)]
    frame = pl.DataFrame(rows, names, orient="row", schema_overrides={"answer": pl.String})
    gate = Duplicates()
    state = gate.summarise(frame)
    assert not (state.bands[:, 0] == state.bands[:, 1]).any()
    assert gate.decide([state]).removed.select("id", "reason").rows() == [("2", "exact_duplicate")]


def test_only_what_is_over_the_limit_goes_to_files(tmp_path):
    gate, frame = Duplicates(), odd_rows(3)
    state = gate.summarise(frame)
    size = state.bands.nbytes + state.values.nbytes
    files = StateFiles(tmp_path / "deep" / "down", 2 * size)
    for _ in range(4):
        files.add(state)
    kinds = [isinstance(state.values, Shelved) for state in files.states]
    assert kinds == [False, False, True, True]
    assert len(list((tmp_path / "deep" / "down").iterdir())) == 2
    assert np.array_equal(files.states[3].values[:], state.values)
    assert len(files.make_room(10)) == 10


# ---- on disk -------------------------------------------------------------------------------------


def test_a_shelved_array_is_read_like_one_in_memory(tmp_path):
    for array in (np.arange(24, dtype=np.uint64).reshape(4, 6), np.arange(9, dtype=np.uint32)):
        stored = on_shelf(array, tmp_path / "a" / f"{array.ndim}.bin")
        assert len(stored) == len(array)
        assert np.array_equal(stored[1], array[1])
        for part in (slice(None), slice(1, 3), slice(2, 2), slice(3, 99)):
            assert np.array_equal(stored[part], array[part])
    wide = np.arange(40, dtype=np.uint64).reshape(4, 10)[:, 2:5]
    assert np.array_equal(on_shelf(wide, tmp_path / "wide.bin")[:], wide)
    none = on_shelf(np.zeros((3, 0), np.uint64), tmp_path / "none.bin")
    assert none[2].shape == (0,)


def test_sets_are_copied_from_near_and_far_places(tmp_path):
    rng = np.random.default_rng(0)
    sizes = rng.choice([0, 3, 40, 2 * GAP], 60)
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    values = rng.integers(0, 2**32, offsets[-1], dtype=np.uint32)
    stored = on_shelf(values, tmp_path / "values.bin")
    for wanted in (np.arange(60), np.flatnonzero(rng.random(60) < 0.2), np.zeros(0, np.int64)):
        ends = np.concatenate([[0], np.cumsum(sizes[wanted])])
        out = np.zeros(ends[-1], np.uint32)
        copy_sets(stored, offsets, wanted, out, ends[:-1])
        parts = [values[offsets[k] : offsets[k + 1]] for k in wanted]
        assert np.array_equal(out, np.concatenate([np.zeros(0, np.uint32), *parts]))


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 2**64 - 1) | st.integers(0, 40)), st.sets(st.integers(0, 40)))
def test_among_is_membership_but_for_zero(keys, wanted):
    found = among(np.array(keys, np.uint64), np.array(sorted(wanted), np.uint64))
    assert found.tolist() == [key in wanted and key != 0 for key in keys]


def test_only_texts_that_differ_from_others_of_a_group_are_read():
    # Group 0: rows 0 and 1, of one prompt and two responses; group 1: rows 2 and 3, alike.
    lists = np.arange(4)
    numbers_ = np.array([0, 0, 1, 1], np.int32)
    texts = np.array([[0, 1], [0, 2], [3, 4], [3, 4]], np.int32)
    assert told_apart(lists, lists + 1, numbers_, texts, 2, 5).tolist() == [
        False,
        True,
        True,
        False,
        False,
    ]
