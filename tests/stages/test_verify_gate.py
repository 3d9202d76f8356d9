"""The verify gate on rows with a list of instructions: outcomes, counts, notes."""

import json
from types import SimpleNamespace

import pyarrow as pa
import pytest

from siftline.recipe.kinds import Stage
from siftline.rows import schema
from siftline.stages.verify import notes
from siftline.stages.verify.decide import Verify
from siftline.stages.verify.run import run as verify


def surroundings(rows, **options):
    table = pa.Table.from_pylist(rows, schema=schema.ROW)
    blank = pa.nulls(table.num_rows, pa.string())
    table = table.append_column("parent_id", blank).append_column("origin", blank).sort_by("id")
    return SimpleNamespace(
        stage=Stage("verify", "verify", Verify(**options)),
        recipe=SimpleNamespace(canaries=None), buckets=range(1), held_rows=None,
        in_play=lambda bucket: table.column("id").to_pylist(), rows=lambda bucket: table,
        emit=lambda line: None, judged=lambda bucket: None,
    )  # fmt: skip


def row(name, response, *asked):
    constraints = json.dumps([{"id": one, "num_words": 3} for one in asked])
    messages = [schema.message("user", name), schema.message("assistant", response)]
    return schema.make_row(messages, answer=constraints)


WORDS, COMMA = "length_constraints:number_words", "punctuation:no_comma"
ROWS = {
    "good": row("good", "one two three four", WORDS),
    "thought": row("thought", "<think>a, b</think>one two three", WORDS, COMMA),
    "short": row("short", "one", WORDS),
    "both": row("both", "one, two", COMMA, WORDS),
    "unknown": row("unknown", "one two three", "detectable_format:rhyme"),
    "silent": row("silent", "<think>one two three", WORDS),
}


@pytest.mark.parametrize("kept_open", [False, True])
def test_the_gate_has_three_outcomes_and_counts_them(kept_open):
    options = {"open": "keep"} if kept_open else {}
    run = verify(surroundings(ROWS.values(), verifier="instructions", **options))
    names = {r["id"]: name for name, r in ROWS.items()}
    decided = {names[d["id"]]: d["reason"] for d in run.results[0].decisions.to_dicts()}
    assert decided == {
        "good": None, "thought": None, "short": "wrong_answer", "both": "wrong_answer",
        "unknown": None if kept_open else "unreadable", "silent": "no_final_answer",
    }  # fmt: skip
    assert run.results[0].failed == {}
    assert run.facts["not_followed"] == {WORDS: 2, COMMA: 1}
    assert run.facts["checked"] == 6
    assert run.facts["kept_open"] == ({"unreadable": 1} if kept_open else {})
    assert notes(Stage("verify", "verify", None), run.facts) == [
        f"verify: of 6 rows checked, 1 can't be read ({'kept' if kept_open else 'removed'}), "
        "1 have no final answer (removed): open verdicts."
    ]
