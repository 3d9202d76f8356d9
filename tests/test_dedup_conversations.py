"""`siftline dedup` on conversations, held against the gate of a recipe and against all pairs."""

import json
import random

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from siftline.cli import dedup_conversations, main
from siftline.kernels.sets.jaccard import jaccard_reference
from siftline.kernels.sets.keepers import Keep
from siftline.kernels.text.words import numbers, words
from siftline.rows.schema import canonical_text, make_row, message
from siftline.rows.selection import select
from siftline.stages.duplicates.decide import Duplicates
from siftline.stages.duplicates.state import StateFiles, normal_answer

PLACES = ["market", "school", "library", "station", "bakery", "garden", "harbour", "museum"]
THINGS = ["apples", "pencils", "stickers", "marbles", "books", "oranges", "tickets", "candles"]


@pytest.fixture
def call(tmp_path, capsys):
    """`call(rows, *arguments)` writes rows to a file and runs the verb: its JSON, or its error."""
    count = iter(range(1000))

    def act(rows, *arguments, columns=("--prompt-column", "p", "--response-column", "r")):
        name = f"{next(count)}"
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        out = tmp_path / f"out{name}"
        with pytest.raises(SystemExit) as ended:
            main(["dedup", str(path), *columns, *map(str, arguments), "--out", str(out), "--json"])
        said = capsys.readouterr()
        if ended.value.code:
            (line,) = [line for line in said.err.splitlines() if line.startswith("error: ")]
            return line
        return json.loads(said.out), out

    return act


def problem(rng):
    thing, place, a, b = (
        rng.choice(THINGS),
        rng.choice(PLACES),
        rng.randint(30, 99),
        rng.randint(3, 9),
    )
    prompt = (
        f"On Monday somebody went to the {place} and bought {a} {thing} for the whole class, and "
        f"on the way home gave {b} of the {thing} to a neighbour. How many {thing} were left then?"
    )
    response = f"Of the {a} {thing} that were bought {b} went away, so {a} - {b} = {a - b} remain."
    return {"p": prompt, "r": response, "a": str(a - b)}


def mixed(seed, n=150):
    """Problems with copies: the same, a word other in one text or both, another answer or none."""
    rng = random.Random(seed)
    rows = [problem(rng)]
    while len(rows) < n:
        row = dict(rng.choice(rows)) if rng.random() < 0.6 else problem(rng)
        kind = rng.randrange(8)
        if kind in (1, 3):
            row["p"] = row["p"].replace("somebody", "someone").replace("  ", " ")
        if kind in (2, 3):
            row["r"] = row["r"].replace("went away", "were given").replace("remain", "stay")
        if kind == 4:
            row["r"] = "Count them: " + " ".join(rng.choice(THINGS) for _ in range(8))
        if kind == 5:
            row["a"] = rng.choice([None, f"${row['a']}.0", "7"]) if row["a"] else "7"
        if kind == 6:
            row["p"] = row["p"].replace("bought", f"bought {rng.randint(1, 3)} times")
        if kind == 7:
            row["r"] = "yes"
        rows.append(row)
    return rows


def frame(rows):
    """The rows as a recipe's gate gets them, ids in row order."""
    made = []
    for k, row in enumerate(rows):
        turns = [message("user", row["p"]), message("assistant", row["r"])]
        full = make_row(turns, answer=row["a"])
        texts = [turn["content"] for turn in turns]
        made.append((f"{k:06d}", full["prompt_id"], *texts, full["answer"]))
    names = ["id", "prompt_id", "prompt", "response", "answer"]
    return pl.DataFrame(made, names, orient="row", schema_overrides={"answer": pl.String})


def matches(out, rows):
    """What the verb removed: row -> (kept row, similarity, reason)."""
    gone = pl.read_parquet(out / "removed" / "*.parquet").to_dicts()
    kept = pl.read_parquet(out / "data" / "*.parquet").to_dicts()
    assert sorted(line["n"] for line in [*gone, *kept]) == list(range(len(rows)))
    return {
        line["n"]: (
            int(line["sift_matched_row"].rpartition(":")[2]),
            line["sift_similarity"],
            line["sift_reason"],
        )
        for line in gone
    }


def by_hand(rows, threshold, guard):
    """The same by comparing every row with every kept one, on strings."""

    def shingles(text):
        text = words(text)
        return {text[i : i + 5] for i in range(max(len(text) - 4, 1))} - {""}

    answers = {}
    for row in rows:
        if row["a"]:
            answers.setdefault(canonical_text(row["p"]), set()).add(normal_answer(row["a"]))
    sets = [[shingles(row[k]) for k in "pr"] for row in rows]
    told = [[numbers(words(row[k])) for k in "pr"] for row in rows]
    kept, found = [], {}
    for i, row in enumerate(rows):
        strict = len(answers.get(canonical_text(row["p"]), ())) > 1
        mine = normal_answer(row["a"]) if row["a"] else None

        def allowed(j, mine=mine, strict=strict):
            other = normal_answer(rows[j]["a"]) if rows[j]["a"] else None
            return mine in (other, None) or (other is None and not strict)

        free = [j for j in kept if allowed(j)]
        same = [j for j in free if (rows[j]["p"], rows[j]["r"]) == (row["p"], row["r"])]
        near = [
            j
            for j in free
            if (not guard or told[i] == told[j])
            and all(
                jaccard_reference(*pair) >= threshold for pair in zip(sets[i], sets[j], strict=True)
            )
        ]
        if same or near:
            found[i] = (same or near)[0]
        else:
            kept.append(i)
    return found


@pytest.mark.parametrize(("seed", "guard"), [(1, "exact"), (2, "any"), (3, "exact")])
def test_the_verb_removes_what_the_gate_of_a_recipe_removes(call, seed, guard):
    rows = mixed(seed)
    numbered = [{"n": k, **row} for k, row in enumerate(rows)]
    said, out = call(numbered, "--answer-column", "a", "--numbers", guard)
    gate = select(Duplicates(numbers=guard), frame(rows))
    expected = {
        int(line["id"]): (int(line["matched_id"]), line["value"], line["reason"])
        for line in gate.removed.to_dicts()
    }
    found = matches(out, rows)
    assert found == expected
    assert len({reason for *_, reason in found.values()}) == 2
    assert said["conflicting_prompts"] == gate.tables["conflicts"].height > 0
    listed = pl.read_parquet(out / "conflicts" / "*.parquet")
    assert listed["sift_prompt_group"].to_list() == gate.tables["conflicts"]["prompt_id"].to_list()
    assert listed["answers"].to_list() == gate.tables["conflicts"]["answers"].to_list()
    # Against all pairs: shared numbers and texts may hide a pair from the bands, never add one.
    whole = by_hand(rows, 0.8, guard == "exact")
    assert set(found) <= set(whole)
    assert len(found) >= 0.95 * len(whole) > 20


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 10**6), st.sampled_from([0.6, 0.8, 1.0]))
def test_what_the_gate_removes_is_similar_in_both_texts(seed, threshold):
    """The gate itself, which the verb calls, against similarities on strings."""
    rows = mixed(seed, 40)
    removed = select(Duplicates(threshold), frame(rows)).removed
    kept = set(range(40)) - {int(i) for i in removed["id"]}
    for line in removed.to_dicts():
        i, j = int(line["id"]), int(line["matched_id"])
        assert j in kept
        assert j < i
        for k in "pr":
            a, b = (
                {t[x : x + 5] for x in range(max(len(t) - 4, 1))}
                for t in (words(rows[i][k]), words(rows[j][k]))
            )
            assert jaccard_reference(a, b) >= threshold


def test_alternatives_stay_and_carry_one_group(call):
    row = problem(random.Random(0))
    other = {
        **row,
        "r": "Take one after another away and count what is left in the bag at the end.",
    }
    rows = [{"n": k, **r} for k, r in enumerate([row, other, row, problem(random.Random(9))])]
    said, out = call(rows)
    kept = pl.read_parquet(out / "data" / "*.parquet")
    assert kept["n"].to_list() == [0, 1, 3]
    assert kept["sift_cluster_size"].to_list() == [2, 1, 1]
    groups = kept["sift_prompt_group"].to_list()
    assert groups[0] == groups[1] != groups[2]
    assert (
        pl.read_parquet(out / "removed" / "*.parquet")["sift_prompt_group"].to_list() == groups[:1]
    )
    assert (said["prompts"], said["alternatives"], said["exact"]) == (2, 2, 1)
    assert not (out / "conflicts").exists()
    assert sorted(p.name for p in out.iterdir()) == ["data", "removed"]


@pytest.mark.parametrize("keep", ["first", "longest", "score:q"])
def test_contradicting_answers_are_listed_whatever_is_kept_first(call, keep):
    row = problem(random.Random(0))
    answers = ["41", "42", "41.0", None, "$42"]
    rows = [{"n": k, "q": k, **row, "a": a} for k, a in enumerate(answers)]
    _, out = call(rows, "--answer-column", "a", "--keep", keep)
    kept = pl.read_parquet(out / "data" / "*.parquet")
    last = keep.startswith("score")
    assert kept["n"].to_list() == ([2, 4] if last else [0, 1])
    (conflict,) = pl.read_parquet(out / "conflicts" / "*.parquet").to_dicts()
    assert conflict["answers"] == ["41", "42", "41.0", "$42"]
    assert [int(name.rpartition(":")[2]) for name in conflict["sift_rows"]] == [0, 1, 2, 4]
    assert conflict["sift_prompt_group"] == kept["sift_prompt_group"][0]


def test_many_rows_are_decided_about_from_files(call, monkeypatch):
    rows = [{"n": k, **row} for k, row in enumerate(mixed(7))]
    said, out = call(rows, "--answer-column", "a")
    monkeypatch.setattr(dedup_conversations, "StateFiles", lambda folder: StateFiles(folder, 0))
    again, other = call(rows, "--answer-column", "a")
    assert again["removed"] == said["removed"] > 20
    for name in ("data", "removed", "conflicts"):
        tables = [pl.read_parquet(folder / name / "*.parquet") for folder in (out, other)]
        columns = ["n", "sift_similarity"] if name == "removed" else tables[0].columns[:1]
        assert tables[0].select(columns).equals(tables[1].select(columns))
    assert sorted(p.name for p in other.iterdir()) == ["conflicts", "data", "removed"]


def test_the_same_numbers_are_asked_for_unless_told_otherwise(call):
    row = problem(random.Random(0))
    changed = {**row, "p": row["p"].replace("bought ", "bought 1")}
    rows = [{"n": 0, **row}, {"n": 1, **changed}]
    assert call(rows)[0]["kept"] == 2
    assert call(rows, "--numbers", "any")[0]["kept"] == 1


def test_messages_give_what_their_columns_give_and_faults_are_kept(call):
    rows = mixed(5, 80)
    _, out = call([{"n": k, **row} for k, row in enumerate(rows)], "--answer-column", "a")
    chats = [
        {
            "n": k,
            "chat": [{"from": "human", "value": row["p"]}, {"from": "gpt", "value": row["r"]}],
            "a": row["a"],
        }
        for k, row in enumerate(rows)
    ]
    broken = [
        {"n": 80 + k, "chat": [{"from": who, "value": "?"}]} for k, who in enumerate(["human", "x"])
    ]
    columns = ("--messages-column", "chat", "--answer-column", "a")
    said, other = call([*chats, *broken, *broken[:1]], columns=columns)
    found = pl.read_parquet(other / "removed" / "*.parquet")
    first = pl.read_parquet(out / "removed" / "*.parquet")
    assert found["n"].to_list() == first["n"].to_list()
    assert found["sift_prompt_group"].to_list() == first["sift_prompt_group"].to_list()
    assert said["unreadable"] == {"no_response": 2, "unknown_role": 1}
    assert pl.read_parquet(other / "data" / "*.parquet")["sift_prompt_group"].null_count() == 3


def test_a_second_response_beside_a_conversation_is_not_compared(call):
    chat = [{"role": "user", "content": "Why is it so?"}, {"role": "assistant", "content": "So."}]
    rows = [{"chat": chat, "rejected_response": text} for text in ("No.", "Never.")]
    said, _ = call(rows, columns=("--messages-column", "chat"))
    assert (said["kept"], said["removed"]) == (1, 1)


def test_only_faults_or_nothing_still_give_whole_folders(call):
    assert "no column 'r2'" in call([{"p": "a", "r": "b"}], "--answer-column", "r2")
    said, _ = call([{"p": "", "r": "a"}, {"p": "", "r": "a"}])
    assert (said["kept"], said["unreadable"]) == (2, {"empty_prompt": 2})


def test_what_does_not_go_together_is_refused_with_the_remedy(call, tmp_path):
    rows = [{"p": "a", "r": "b", "text": "c"}]
    for option in (("--index", tmp_path / "i"), ("--target", 1), ("--unit", "word")):
        assert "for texts, not for conversations: leave it out" in call(rows, *option)
    assert "give one of the two" in call(rows, columns=("--prompt-column", "p"))
    assert "give one of the two" in call(rows, "--messages-column", "p")
    assert "of conversations the first copy stays" in call(rows, "--keep", "none")
    assert "already read as part" in call(rows, "--answer-column", "r")
    assert "a score must be a number" in call(rows, "--keep", "score:text")
    assert "threshold=2.0" in call(rows, "--threshold", 2)
    assert not list(tmp_path.glob("out*"))


@settings(deadline=None, max_examples=30)
@given(st.lists(st.floats(allow_nan=True), min_size=1, max_size=20))
def test_priorities_become_integers_of_the_same_order(values):
    import pyarrow as pa

    from siftline.cli.dedup_conversations import _priority

    ids = [f"{k:012d}" for k in range(len(values))]
    view = pl.DataFrame(
        {"id": ids, "prompt": "", "response": ""}, schema_overrides={"id": pl.String}
    )
    keep = Keep.parse("score:q")
    column = pa.array(values, pa.float64())
    found = _priority(keep, view, column, len(values), 0).to_list()
    floats = keep.priority(column, column).tolist()
    for a, x in zip(found, floats, strict=True):
        for b, y in zip(found, floats, strict=True):
            assert (a < b, a == b) == (x < y, x == y)
