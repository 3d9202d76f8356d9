"""What is read later is not said to be set aside; what a template trims is counted."""

import json

import pytest

from siftline.ingest.pool import Pool, PoolSpec, build_pool, notes_of
from siftline.ingest.source import Source
from siftline.recipe.parse import parse
from siftline.scoring.engines.base import ModelSpec
from siftline.scoring.measures.likelihood import Likelihood
from siftline.scoring.recorder import Recorder
from siftline.stages.scores import TABLE, ScoreTable, score_pool, trimmed_note

RECIPE = {
    "name": "r",
    "pool": {"name": "p", "inputs": [{"path": "p.jsonl"}]},
    "sets": {
        "dev": [{"name": "d", "inputs": [{"path": "d.jsonl"}]}],
        "test": [{"name": "t", "inputs": [{"path": "t.jsonl"}]}],
    },
    "models": {"m": {"path": "m"}},
    "stages": ["verify", "allocate"],
    "budget": {"unit": "rows", "size": 1},
}


@pytest.mark.parametrize(
    ("more", "read"),
    [
        ({}, {}),
        ({"evaluation": {}}, {"t": {"level"}}),
        ({"evaluation": {"level_column": "grade"}}, {"t": {"grade"}}),
        ({"stages": [{"duplicates": {"keep": "score:stars"}}, "allocate"]}, {"p": {"stars"}}),
        ({"stages": [{"duplicates": {"keep": "longest"}}, "allocate"]}, {}),
        ({"scorers": {"s": {"kind": "column", "column": "stars"}}}, {"p": {"stars"}}),
        ({"scorers": {"s": {"kind": "column", "column": "stars", "path": "s.csv"}}}, {}),
    ],
)
def test_a_recipe_names_the_columns_it_reads(more, read):
    recipe = parse(RECIPE | more)
    for name in ("p", "d", "t"):
        assert recipe.columns_read(name) == read.get(name, set()), name


def test_a_column_that_is_read_is_not_said_to_be_set_aside(tmp_path, caplog):
    line = {"question": "q", "answer": "a", "level": 3, "topic": "x", "chosen_by": "me"}
    (tmp_path / "t.jsonl").write_text(json.dumps(line))
    spec = PoolSpec("t", (Source(str(tmp_path / "t.jsonl")),), 1)
    build_pool(tmp_path / "one", spec, read=("level",))
    assert [r.getMessage() for r in caplog.records] == [
        "pool t: set aside, not read: chosen_by (1), topic (1)"
    ]
    caplog.clear()
    build_pool(tmp_path / "two", spec, read=("level", "topic", "chosen_by"))
    assert not caplog.records
    info = Pool(tmp_path / "one").manifest.info
    # The pool is every recipe's: what it keeps does not depend on the one that built it.
    assert info == Pool(tmp_path / "two").manifest.info
    assert notes_of(info) == ["set aside, not read: chosen_by (1), level (1), topic (1)"]
    assert notes_of(info, ("level", "topic", "chosen_by")) == []
    assert Pool(tmp_path / "one").reading(("level",))["set_aside"] == {"chosen_by": 1, "topic": 1}


GEMMA = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] | trim }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


class Engine:
    """Equal numbers for every token."""

    details = frozenset()
    max_length = 60

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def fingerprint(self):
        return "f" * 64

    def inspect(self, tokens, spans, wanted):
        import numpy as np

        from siftline.scoring.engines.base import Inspection

        return [
            Inspection(np.full(end - start, -1, np.float32), None, None, None)
            for start, end in spans
        ]


class Opened:
    """The engines of a run: one."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def recorders(self, spec, store, advance):
        return [Recorder(Engine(self.tokenizer), spec, store)]


def test_what_a_template_trims_is_counted_in_the_score_table(tmp_path, tiny):
    replies = ["x", " x ", "\ty", "x y", " " + "z" * 200]  # the last one is too long
    lines = [{"question": f"q{i}", "answer": reply} for i, reply in enumerate(replies)]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    build_pool(tmp_path / "pool", PoolSpec("p", (Source(str(tmp_path / "p.jsonl")),), 2))
    pool, asked = Pool(tmp_path / "pool"), Likelihood()
    spec = ModelSpec("none", batch_tokens=300, max_length=60, template=GEMMA)
    table = ScoreTable(tmp_path / "scores", TABLE, {})
    opened = Opened(tiny.make_tokenizer())
    manifest, _ = score_pool(table, pool, spec, asked, tmp_path / "store", opened, lambda _: None)
    assert (manifest.info["scored"], manifest.info["failed"]) == (4, 1)
    assert manifest.info["trimmed"] == 2
    assert trimmed_note(manifest.info) == (
        "likelihood: the chat template takes white space off the ends of 2 of 4 responses"
    )
    assert trimmed_note({**manifest.info, "trimmed": 0}) is None
