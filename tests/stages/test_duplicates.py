"""The duplicates gate on planted and real data, against similarities computed on strings."""

import json
import os
import random
import re
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from siftline.ingest.pool import Pool, PoolSpec, build_pool
from siftline.ingest.readers import Source
from siftline.kernels.sets.jaccard import jaccard_reference
from siftline.kernels.sets.keepers import Keep, as_integers
from siftline.kernels.text.words import numbers, words
from siftline.recipe.parse import parse
from siftline.rows.schema import make_row, message
from siftline.rows.selection import select
from siftline.stages.duplicates import run as gate
from siftline.stages.duplicates.decide import Duplicates
from siftline.stages.duplicates.run import LAST, keep_order
from siftline.stages.duplicates.state import StateFiles, normal_answer
from siftline.stages.run import run_stage
from siftline.workspace import Workspace

NAMES = ["Ann", "Bob", "Carla", "Dmitri", "Eve", "Farid", "Grace", "Hugo", "Ines", "Jonas", "Kira"]
THINGS = ["apples", "pencils", "stickers", "marbles", "books", "oranges", "tickets", "candles"]
PLACES = ["market", "school", "library", "station", "bakery", "garden", "harbour", "museum"]


def frame(rows):
    """Rows of (prompt, response, answer, source, priority) with the ids the schema makes."""
    made = []
    for prompt, response, answer, source, priority in rows:
        turns = [message("user", prompt)] if prompt else []
        row = make_row([*turns, message("assistant", response)], answer=answer, source=source)
        made.append((row["id"], row["prompt_id"], prompt, response, answer, source, priority))
    names = ["id", "prompt_id", "prompt", "response", "answer", "source", "priority"]
    return pl.DataFrame(made, schema=names, orient="row", schema_overrides={"answer": pl.String})


def rows_of(*pairs):
    return frame([(p, r, a, s, 0) for p, r, a, s in pairs])


def shingles(text):
    text = words(text)
    return {text[i : i + 5] for i in range(max(len(text) - 4, 1))} - {""}


def similarity(left, right):
    """The smaller of the two Jaccard similarities, on strings."""
    return min(
        jaccard_reference(shingles(left[k]), shingles(right[k])) for k in ("prompt", "response")
    )


def same_numbers(left, right):
    return all(numbers(words(left[k])) == numbers(words(right[k])) for k in ("prompt", "response"))


def problem(rng):
    name, thing, place = rng.choice(NAMES), rng.choice(THINGS), rng.choice(PLACES)
    a, b, c = rng.randint(3, 999), rng.randint(3, 99), rng.randint(2, 9)
    prompt = (
        f"{name} went to the {place} on Monday and bought {a} {thing} for the whole class. On the "
        f"way home {name} gave {b} of the {thing} to a neighbour, and then packed the rest evenly "
        f"into {c} wooden boxes. How many {thing} are in each of the boxes, rounded down?"
    )
    left = a - b
    response = (
        f"{name} bought {a} {thing} and gave away {b}, which leaves {a} - {b} = {left} {thing}. "
        f"Packed evenly into {c} boxes that makes {left} / {c} = {left // c} in each box."
    )
    return prompt, response, str(left // c)


def edited(text, rng, kind):
    """Changes one word, the punctuation, or the spelling of one word; never a number."""
    if kind == "punctuation":
        return text.replace(",", " -", 1).rstrip(".?") + "!"
    parts = text.split(" ")
    spots = [i for i, w in enumerate(parts) if len(w) > 4 and w.isalpha()]
    spot = rng.choice(spots)
    word = parts[spot]
    parts[spot] = word[:2] + word[3:] if kind == "spelling" else "quickly"
    return " ".join(parts)


@pytest.fixture(scope="module")
def planted():
    """600 instances of one template; 200 of them copied exactly or nearly, 100 with one number
    changed in the prompt.
    """
    rng = random.Random(5)
    seeds = [problem(rng) for _ in range(600)]
    rows = [(*seed, "first", 0) for seed in seeds]
    for k, (prompt, response, answer) in enumerate(seeds[:200]):
        kind = ("exact", "word", "punctuation", "spelling")[k % 4]
        if kind != "exact":
            prompt = edited(prompt, rng, kind)
            response = edited(response, rng, kind) if k % 8 > 3 else response
        rows.append((prompt, response, answer, "second", 1))
    for prompt, response, answer in seeds[200:300]:
        changed = re.sub(r"bought (\d+)", lambda m: f"bought {int(m[1]) + 1000}", prompt)
        rows.append((changed, response, answer, "changed", 1))
    return frame(rows)


def test_planted_copies_are_found_and_nothing_else_is_removed(planted):
    selection = select(Duplicates(), planted)
    texts = {line["id"]: line for line in planted.to_dicts()}
    kept = set(selection.kept)
    for line in selection.removed.to_dicts():
        row, other = texts[line["id"]], texts[line["matched_id"]]
        assert line["matched_id"] in kept
        assert same_numbers(row, other)
        assert similarity(row, other) == pytest.approx(line["value"], abs=1e-12)
        assert line["value"] >= line["threshold"] - 1e-12
        exact = (row["prompt_id"], row["response"]) == (other["prompt_id"], other["response"])
        assert line["reason"] == ("exact_duplicate" if exact else "near_duplicate")
    copies = [texts[i] for i in planted.filter(source="second")["id"]]
    originals = [texts[i] for i in planted.filter(source="first")["id"]]
    should = [
        copy["id"]
        for copy in copies
        if any(same_numbers(copy, o) and similarity(copy, o) >= 0.85 for o in originals)
    ]
    assert len(should) > 150
    removed = set(selection.removed["id"])
    assert len(removed & set(should)) >= 0.99 * len(should)
    assert selection.facts["exact_duplicates"] == 50


def test_the_number_guard_is_what_saves_template_instances(planted):
    changed = planted.filter(source="changed")
    exact = select(Duplicates(), planted).removed.join(changed, on="id")
    loose = select(Duplicates(numbers="any"), planted).removed.join(changed, on="id")
    assert exact.is_empty()
    assert loose.height == 100


def run_in_parts(selector, parts):
    plan = selector.decide([selector.summarise(part) for part in parts])
    return [selector.apply(part, plan) for part in parts]


@pytest.mark.parametrize("buckets", [4, 16])
def test_decisions_do_not_depend_on_buckets_or_order(planted, buckets):
    whole = select(Duplicates(), planted)
    shuffled = planted.sample(fraction=1.0, shuffle=True, seed=buckets)
    parts = [shuffled[k::buckets] for k in range(buckets)]
    selections = run_in_parts(Duplicates(), parts)
    joined = pl.concat([s.decisions for s in selections]).sort("id")
    assert joined.equals(whole.decisions)
    clusters = pl.concat([s.tables["clusters"] for s in selections]).sort("id")
    assert clusters.equals(whole.tables["clusters"])
    assert selections[0].facts == whole.facts


WORDS = st.lists(st.sampled_from(["red", "blue", "green", "three", "7"]), max_size=6).map(" ".join)


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.tuples(WORDS, WORDS, st.sampled_from([None, "1", "2"])), max_size=20, min_size=1)
)
def test_a_removed_row_lost_to_a_kept_row_that_is_similar(drawn):
    rows = frame([(p, r, a, f"s{k}", k % 3) for k, (p, r, a) in enumerate(drawn)])
    selection = select(Duplicates(threshold=0.6), rows)
    texts = {line["id"]: line for line in rows.to_dicts()}
    kept = set(selection.kept)
    for line in selection.removed.to_dicts():
        row, other = texts[line["id"]], texts[line["matched_id"]]
        assert line["matched_id"] in kept
        assert similarity(row, other) >= 0.6
        assert same_numbers(row, other)
        assert (other["priority"], other["id"]) < (row["priority"], row["id"])
        assert None in (row["answer"], other["answer"]) or row["answer"] == other["answer"]
    again = select(Duplicates(threshold=0.6), rows.reverse())
    assert again.decisions.equals(selection.decisions)


def test_exact_copies_across_sources_keep_the_first_in_keep_order():
    rows = frame(
        [("What is up?", "The sky.", None, s, p) for s, p in (("a", 2), ("b", 1), ("c", 1))]
    )
    first = rows.sort("priority", "id")["id"][0]
    selection = select(Duplicates(), rows)
    assert selection.kept.to_list() == [first]
    assert selection.removed["matched_id"].to_list() == [first, first]
    assert selection.removed["reason"].unique().to_list() == ["exact_duplicate"]
    assert selection.removed["value"].to_list() == [1.0, 1.0]
    assert selection.tables["clusters"].rows() == [(first, 3)]
    assert selection.facts["cluster_sizes"] == {"3": 1}
    by_id = select(Duplicates(), rows.drop("priority"))
    assert by_id.kept.to_list() == [rows["id"].min()]


def test_alternatives_and_equal_short_responses_stay():
    rows = rows_of(
        (
            "Is the sky blue at noon in summer?",
            "Yes, the scattering of light makes it so.",
            None,
            "a",
        ),
        (
            "Is the sky blue at noon in summer?",
            "It is; short waves scatter the most of all.",
            None,
            "a",
        ),
        ("Do cats purr when they are content?", "yes", None, "a"),
        ("Can a whale breathe air at the surface?", "yes", None, "a"),
    )
    assert select(Duplicates(), rows).removed.is_empty()


def test_a_chain_is_not_a_cluster():
    # a ~ b and b ~ c but not a ~ c: b goes for a, c stays although b resembled it.
    base = (
        "one long sentence about the weather in the northern hills during a late and windy autumn"
    )
    texts = [
        base,
        base.replace("weather", "harvest"),
        base.replace("weather", "harvest").replace("windy", "quiet"),
    ]
    scores = [
        similarity({"prompt": "", "response": a}, {"prompt": "", "response": b})
        for a, b in ((texts[0], texts[1]), (texts[1], texts[2]), (texts[0], texts[2]))
    ]
    threshold = (min(scores[:2]) + scores[2]) / 2
    assert scores[2] < threshold < min(scores[:2])
    rows = frame([("", text, None, "a", k) for k, text in enumerate(texts)])
    selection = select(Duplicates(threshold=threshold), rows)
    assert selection.removed["matched_id"].to_list() == [rows["id"][0]]
    assert selection.removed["id"].to_list() == [rows["id"][1]]


def test_plain_text_short_and_empty_texts_are_defined():
    text = "Plain text has no prompt, only this long sentence that somebody wrote down once"
    rows = rows_of(
        ("", text, None, "a"),
        ("", text + ".", None, "a"),
        ("", "no", None, "a"),
        ("", "on", None, "a"),
        ("", "NO", None, "b"),
        ("q", "", None, "a"),
        ("q", "", None, "b"),
    )
    selection = select(Duplicates(), rows)
    lost = rows.join(selection.removed, on="id")["response"].to_list()
    # One of the two long texts and one of the two spellings of "no"; "on" is another text.
    assert sorted(lost, key=len)[0].lower() == "no"
    assert sorted(lost, key=len)[1].startswith("Plain text")
    assert len(lost) == 2
    assert selection.facts["empty_responses"] == 2
    assert rows.filter(response="").join(selection.removed, on="id").is_empty()


def test_contradicting_answers_are_listed_and_settle_nothing():
    rows = frame(
        [
            ("How many legs has an ant?", "An ant has six legs in total.", "6", "a", 1),
            ("How many legs has an ant?", "An ant has six legs in total.", "8", "b", 2),
            ("How many legs has an ant?", "An ant has six legs in total.", "6.0", "c", 3),
            ("How many legs has an ant?", "An ant has six legs in total.", None, "d", 0),
            ("How many legs has a spider?", "A spider has eight legs.", "8", "a", 0),
            ("How many legs has a spider?", "A spider has eight legs.", None, "b", 1),
        ]
    )
    selection = select(Duplicates(), rows)
    matched = dict(selection.removed.select("id", "matched_id").rows())
    ids = rows["id"].to_list()
    # 6.0 repeats 6; neither 6 nor 8 is removed for the row without an answer.
    assert matched == {ids[2]: ids[0], ids[5]: ids[4]}
    conflicts = selection.tables["conflicts"].to_dicts()
    assert len(conflicts) == 1
    assert conflicts[0]["prompt_id"] == rows["prompt_id"][0]
    assert sorted(zip(conflicts[0]["ids"], conflicts[0]["answers"], strict=True)) == sorted(
        [(ids[0], "6"), (ids[1], "8"), (ids[2], "6.0")]
    )
    # An answer read from the response proves nothing, so it contradicts nothing.
    parsed = rows.with_columns(answer_from=pl.lit("response"))
    assert select(Duplicates(), parsed).tables["conflicts"].is_empty()


def test_answers_are_normalised_simply():
    assert normal_answer(" $1,200.00. ") == normal_answer("1200")
    assert normal_answer("Paris.") == normal_answer("paris")
    assert normal_answer("1/2") != normal_answer("2")
    assert normal_answer("-3") != normal_answer("3")


def test_many_alternatives_and_equal_answers_stay_affordable():
    rng = random.Random(3)
    letters = "abcdefghijklmnopqrstuvwxyz     "

    def noise():
        return "".join(rng.choices(letters, k=120))

    rows = [
        ("Write a random sentence, please, and make it long.", noise(), None, "a", 0)
        for _ in range(1500)
    ]
    rows += [(noise(), "yes", None, "a", 0) for _ in range(1500)]
    rows += [
        ("Tell me what the weather is.", "It rains today.", None, f"s{k}", 0) for k in range(1500)
    ]
    facts = select(Duplicates(), frame(rows)).facts
    assert facts["exact_duplicates"] == 1499
    assert facts["candidate_pairs"] < 3000


def test_refusals_name_the_value_and_the_remedy():
    rows = rows_of(("a", "b", None, "x"), ("a", "c", None, "x"))
    with pytest.raises(ValueError, match="max_rows=1"):
        select(Duplicates(max_rows=1), rows)
    with pytest.raises(ValueError, match="occurs twice"):
        select(Duplicates(), pl.concat([rows, rows]))
    with pytest.raises(ValueError, match="raise num_perm"):
        Duplicates(num_perm=4)
    for wrong in ({"threshold": 0.0}, {"threshold": 1.1}, {"ngram": 0}, {"numbers": "none"}):
        with pytest.raises(ValueError, match="must be"):
            Duplicates(**wrong)
    empty = select(Duplicates(), rows.clear())
    assert empty.decisions.is_empty()


# ---- which copy stays, in a recipe -------------------------------------------------------------

QUESTION = "Ann has four apples and buys five more at the market. How many apples has she now?"
REPLY = "She starts with four apples, buys five more at the market, and so she has nine apples now."
COPIES = [  # of one conversation: its end, source, stars
    ("", "web", 2),
    (" Indeed.", "book", -1.5),
    ("!", "book", 3),
    (" ", "forum", None),
]


@pytest.fixture
def place(tmp_path):
    lines = [
        {"question": QUESTION + " " * k, "response": REPLY + end, "source": source, "stars": stars}
        for k, (end, source, stars) in enumerate(COPIES)
    ]
    lines.append({"question": "And what is a pear?", "response": "A fruit.", "source": "web"})
    (tmp_path / "pool.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    workspace = Workspace(tmp_path / "root")
    columns = {"question": "question", "response": "response", "source": "source"}
    source = Source(path=str(tmp_path / "pool.jsonl"), columns=columns)
    build_pool(workspace.pool("p"), PoolSpec(name="p", inputs=(source,), buckets=2))

    def kept(**options):
        recipe = parse(
            {
                "name": "r",
                "pool": {"name": "p", "inputs": [{"path": "x.jsonl"}], "buckets": 2},
                "models": {"m": {"path": "x"}},
                "stages": [{"duplicates": {"threshold": 0.6, **options}}],
                "budget": {"size": 1},
                "canaries": {"per_kind": 1},
            }
        )
        output, _ = run_stage(workspace, recipe, "duplicates", lambda line: None)
        rows = Pool(workspace.pool("p")).all_rows().to_pylist()
        stays = set(output.all_decisions().filter(outcome="kept")["id"])
        found = [r for r in rows if r["id"] in stays]
        assert len(found) == 2
        (one,) = [r for r in found if r["messages"][0]["content"].strip() == QUESTION]
        (line,) = [
            line for line in output.table("canaries").to_dicts() if line["kind"] == "near_copy"
        ]
        assert line["caught"]
        first = min(r["id"] for r in rows if r["messages"][0]["content"].strip() == QUESTION)
        return one["messages"][-1]["content"].removeprefix(REPLY), one["source"], one["id"] == first

    return kept


def test_a_policy_decides_which_copy_stays_in_a_recipe(place):
    assert place()[2]
    assert place(keep="first") == place()
    assert place(keep="longest")[:2] == (" Indeed.", "book")
    assert place(keep="score:stars")[:2] == ("!", "book")
    assert place(keep="source:source=forum,book")[1] == "forum"
    assert place(keep="source:source=nobody,web,book")[1] == "web"


def test_a_recipe_decides_from_files_and_leaves_none(place, tmp_path, monkeypatch):
    folders = []

    def states(folder):
        folders.append(folder)
        return StateFiles(folder, 0)

    monkeypatch.setattr(gate, "StateFiles", states)
    assert place(keep="longest")[:2] == (" Indeed.", "book")
    assert folders[0].parent == tmp_path / "root"
    assert not folders[0].exists()


def test_policies_that_a_gate_cannot_follow_are_refused(place):
    for wrong, said in (
        ("none", "keeps one copy"),
        ("best", "give first, longest"),
        ("source:origin=a", "give source:source=A,B"),
    ):
        with pytest.raises(ValueError, match=f"keep='{wrong}.*{said}"):
            Duplicates(keep=wrong)
    with pytest.raises(ValueError, match="keep='score:likes': no row brings that field"):
        place(keep="score:likes")


@given(st.lists(st.floats(allow_nan=False), min_size=2, max_size=30))
@settings(deadline=None, max_examples=50)
def test_scores_as_integers_keep_their_order_and_added_rows_come_last(values):
    scores = pa.array(values, pa.float64())
    names = [f"{k:040d}" for k in range(len(values))]
    line = [json.dumps({"stars": v}) for v in values]
    rows = pa.table({"id": names, "origin": pa.array([None] * len(values), pa.string())})

    class Held:
        def read(self, table, bucket):
            return pa.table({"id": names, "leftover": line})

    view = pl.DataFrame({"id": names, "prompt": names, "response": names})
    keep = Keep.parse("score:stars")
    order, known = keep_order(Held(), 0, rows, view, keep)
    finite = np.isfinite(values)
    assert known == finite.sum()
    wanted = np.where(finite, -np.array(values), np.inf)
    assert (np.diff(order.to_numpy()[np.argsort(wanted, kind="stable")]) >= 0).all()
    rough = as_integers(keep.priority(scores, scores))
    assert (np.argsort(rough, kind="stable") == np.argsort(-np.array(values), kind="stable")).all()
    added = rows.set_column(1, "origin", pa.array(["made"] * len(values)))
    later, _ = keep_order(Held(), 0, added, view, keep)
    assert order.max() < later.min()
    assert later.max() < LAST


def test_gsm8k_has_no_duplicates_and_shows_planted_ones():
    root = os.environ.get("SIFTLINE_TEST_DATA")
    path = Path(root or ".") / "gsm8k" / "train.jsonl"
    if root is None or not path.exists():
        pytest.skip("SIFTLINE_TEST_DATA does not hold gsm8k/train.jsonl")
    rng = random.Random(11)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    rows = [(d["question"], d["answer"], d["answer"].split("####")[-1], "gsm8k", 0) for d in lines]
    picked = [r for r in rows if len(r[0]) > 150 and len(r[1]) > 150][::20]
    copies = [
        (edited(q, rng, "spelling"), edited(r, rng, "punctuation"), a, "copy", 1)
        for q, r, a, _, _ in picked
    ]
    table = frame(rows + copies)
    texts = {line["id"]: line for line in table.to_dicts()}
    selection = select(Duplicates(), table)
    removed = selection.removed.to_dicts()
    for line in removed:
        assert similarity(texts[line["id"]], texts[line["matched_id"]]) >= 0.8
    found = {line["id"] for line in removed if texts[line["id"]]["source"] == "copy"}
    assert len(found) == len(removed)
    originals = frame(picked)["id"].to_list()
    copied = frame(copies)["id"].to_list()
    should = [
        c
        for o, c in zip(originals, copied, strict=True)
        if same_numbers(texts[o], texts[c]) and similarity(texts[o], texts[c]) >= 0.85
    ]
    assert len(should) > 100
    assert len(found & set(should)) >= 0.99 * len(should)
