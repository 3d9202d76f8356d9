"""`siftline dedup` on conversations, held against the gate of a recipe and against all pairs."""

import hashlib
import json
import random

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from siftline.cli import main
from siftline.kernels.sets.jaccard import jaccard_reference
from siftline.kernels.text.words import numbers, words
from siftline.rows.schema import canonical_text, make_row, message
from siftline.rows.selection import select
from siftline.stages.duplicates import run as gate
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


def tie(row):
    """The keep order of rows of one source."""
    turns = [message("user", row["p"]), message("assistant", row["r"])]
    prompt = make_row(turns, answer=row["a"])["prompt_id"]
    said = f"{row['r']}\x1f{row['a'] or ''}".encode()
    low = int.from_bytes(hashlib.blake2b(said, digest_size=8).digest(), "little") >> 32
    return int(prompt[:8], 16), low


def in_order(rows):
    """Distinct rows in keep order, each with the numbers of the rows that say the same."""
    same = {}
    for k, row in enumerate(rows):
        same.setdefault((tie(row), row["p"], row["r"], row["a"]), []).append(k)
    return [
        (rows[numbers[0]], numbers) for _, numbers in sorted(same.items(), key=lambda i: i[0][0])
    ]


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


def by_row(found, rows):
    """Decisions about distinct rows as those about all: of identical ones the first stays."""
    numbers = [those for _, those in in_order(rows)]
    every = {}
    for k, those in enumerate(numbers):
        if k in found:
            lost_to, *facts = found[k]
            every |= dict.fromkeys(those, (numbers[lost_to][0], *facts))
        else:
            every |= dict.fromkeys(those[1:], (those[0], 1.0, "exact_duplicate"))
    return every


def matches(out, rows):
    """What the verb removed: row -> (kept row, similarity, reason)."""
    gone = pl.read_parquet(out / "removed" / "*.parquet").to_dicts()
    kept = pl.read_parquet(out / "data" / "*.parquet").to_dicts()
    assert sorted(line["n"] for line in [*gone, *kept]) == list(range(len(rows)))
    return {
        line["n"]: (
            int(line["sift_matched_row"].rpartition(":")[2]) - 1,
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
    distinct = [row for row, _ in in_order(rows)]
    gate = select(Duplicates(numbers=guard), frame(distinct))
    expected = {
        int(line["id"]): (int(line["matched_id"]), line["value"], line["reason"])
        for line in gate.removed.to_dicts()
    }
    found = matches(out, rows)
    assert found == by_row(expected, rows)
    assert len({reason for *_, reason in found.values()}) == 2
    assert said["conflicting_prompts"] == gate.tables["conflicts"].height > 0
    listed = pl.read_parquet(out / "conflicts" / "*.parquet")
    assert listed["sift_prompt_group"].to_list() == gate.tables["conflicts"]["prompt_id"].to_list()
    answers = gate.tables["conflicts"]["answers"].to_list()
    assert [sorted(a) for a in listed["answers"].to_list()] == [sorted(a) for a in answers]
    # Against all pairs: shared numbers and texts may hide a pair from the bands, never add one.
    whole = by_hand(distinct, 0.8, guard == "exact")
    assert set(expected) <= set(whole)
    assert len(expected) >= 0.95 * len(whole) > 10
    assert len(found) > 20


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
    if keep.startswith("score"):
        assert kept["n"].to_list() == [2, 4]
    # One of 41 and 41.0 and one of 42 and $42 stays; what has no answer settles nothing.
    assert [len(set(kept["n"]) & those) for those in ({0, 2}, {1, 4}, {3})] == [1, 1, 0]
    (conflict,) = pl.read_parquet(out / "conflicts" / "*.parquet").to_dicts()
    assert conflict["answers"] == ["41", "42", "41.0", "$42"]
    assert [int(name.rpartition(":")[2]) for name in conflict["sift_rows"]] == [1, 2, 3, 5]
    assert conflict["sift_prompt_group"] == kept["sift_prompt_group"][0]


def test_many_rows_are_decided_about_from_files(call, monkeypatch):
    rows = [{"n": k, **row} for k, row in enumerate(mixed(7))]
    said, out = call(rows, "--answer-column", "a")
    monkeypatch.setattr(gate, "StateFiles", lambda folder: StateFiles(folder, 0))
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


def test_messages_give_what_their_columns_give_and_faults_are_set_apart(call):
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
    assert said["quarantined"] == 3
    kept = pl.read_parquet(other / "data" / "*.parquet")
    assert kept["n"].max() < 80
    assert kept["sift_prompt_group"].null_count() == 0
    lost = pl.read_parquet(other / "quarantine" / "*.parquet")
    assert [name.rpartition(":")[2] for name in lost["sift_row"]] == ["81", "82", "83"]
    assert lost["sift_reason"].to_list() == ["no_response", "unknown_role", "no_response"]


def test_a_second_response_beside_a_conversation_is_not_compared(call):
    chat = [{"role": "user", "content": "Why is it so?"}, {"role": "assistant", "content": "So."}]
    rows = [{"chat": chat, "rejected_response": text} for text in ("No.", "Never.")]
    said, _ = call(rows, columns=("--messages-column", "chat"))
    assert (said["kept"], said["removed"]) == (1, 1)


def test_files_of_faults_alone_and_absent_columns_are_told(call):
    assert "no column 'r2'" in call([{"p": "a", "r": "b"}], "--answer-column", "r2")
    said = call([{"p": "", "r": "a"}, {"p": "", "r": "a"}])
    assert "no readable row among 2" in said
    assert "empty_prompt" in said


def test_a_file_that_holds_conversations_is_seen(call):
    chats = [
        {"n": k, "messages": [{"role": "user", "content": p}, {"role": "assistant", "content": r}]}
        for k, (p, r) in enumerate([("Why?", "So."), ("Why?", "So."), ("Why?", "For no reason.")])
    ]
    said, out = call(chats, columns=())
    assert (said["kept"], said["removed"], said["alternatives"]) == (2, 1, 2)
    assert pl.read_parquet(out / "removed" / "*.parquet")["sift_matched_row"][0].endswith(":1")
    both = [{**chat, "text": f"a rendered template {chat['n']}"} for chat in chats]
    assert call(both, columns=())[0]["kept"] == 2  # as a recipe reads it
    assert call(both, columns=("--text-column", "text"))[0]["kept"] == 3
    assert call([{"text": "a b"}, {"text": "a b"}], columns=())[0]["kept"] == 1


def test_what_does_not_go_together_is_refused_with_the_remedy(call, tmp_path):
    rows = [{"p": "a", "r": "b", "text": "c"}]
    for option in (("--index", tmp_path / "i"), ("--target", 1), ("--unit", "word")):
        assert "for texts, not for conversations: leave it out" in call(rows, *option)
    assert "give one of the two" in call(rows, columns=("--prompt-column", "p"))
    assert "give one of the two" in call(rows, "--messages-column", "p")
    assert "of conversations the first copy stays" in call(rows, "--keep", "none")
    assert "already read as part" in call(rows, "--answer-column", "r")
    assert "no row brings that field" in call(rows, "--keep", "score:likes")
    assert "threshold=2.0" in call(rows, "--threshold", 2)
    assert not list(tmp_path.glob("out*"))
