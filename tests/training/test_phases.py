"""Phases of a run: composition, order, and that a trainer is fed as planned."""

import json
import re
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from siftline.config import build
from siftline.kernels.draws import uniforms
from siftline.rows import schema
from siftline.stages import arms
from siftline.training.finetune import FineTune, finetune
from siftline.training.material import lay_out
from siftline.training.schedule import Phase, epoch_order, rows_for_phases
from siftline.workspace import Workspace

DUAL = (Phase({"math": 1.0}, share=0.4), Phase({"*": 0.9, "math": 0.1}, share=0.6))


def data(counts, seed=0):
    """Ids, sizes and sources; `counts` says how many rows of each source."""
    g = np.random.default_rng(seed)
    sources = [name for name, n in counts.items() for _ in range(n)]
    ids = [schema.digest(name, i) for i, name in enumerate(sources)]
    return ids, g.integers(3, 40, len(ids)), sources


def plain(ids, sizes, sources, phases, budget, seed):
    """The rule in plain Python, for weights that split the budget without remainder."""
    named = {name for phase in phases for name in phase.sources} - {"*"}
    place = {identity: i for i, identity in enumerate(ids)}
    group = {i: s if s in named else "*" for i, s in zip(ids, sources, strict=True)}
    queues, sequence, left = {}, [], 0
    total = sum(phase.share for phase in phases)
    for phase in phases:
        mine = []
        whole = sum(phase.sources.values())
        for name in sorted(n for n, w in phase.sources.items() if w):
            own = [i for i in ids if group[i] == name]
            left += round(budget * phase.share / total * phase.sources[name] / whole)
            queue = queues.setdefault(name, [])
            while True:
                if not queue:
                    epoch = queues.setdefault((name, "epoch"), 0)
                    queue += [(own[k], epoch) for k in epoch_order(own, seed, epoch)]
                    queues[name, "epoch"] += 1
                if sizes[place[queue[0][0]]] > left:
                    break
                left -= sizes[place[queue[0][0]]]
                mine.append(queue.pop(0))
        key = {row: uniforms(seed, "phase order", [row[0]], row[1])[0] for row in mine}
        sequence += [row[0] for row in sorted(mine, key=lambda row: (key[row], *row))]
    return sequence


def test_the_dual_stage_holds_what_it_says():
    ids, sizes, sources = data({"math": 60, "talk": 200, "code": 40})
    size = dict(zip(ids, sizes.tolist(), strict=True))
    of = dict(zip(ids, sources, strict=True))
    run = rows_for_phases(ids, sizes, sources, DUAL, 4000, seed=0)
    first = next(i for i, identity in enumerate(run.ids) if of[identity] != "math")
    spent = np.cumsum([size[i] for i in run.ids])
    assert 1600 - 40 < spent[first - 1] < 1600 + 200  # a few of math may begin the second phase
    table = {(line["phase"], line["source"]): line for line in run.composition}
    assert list(table) == [(1, "math"), (2, "*"), (2, "math")]
    assert [line["wanted"] for line in run.composition] == [1600, 2160, 240]
    for line in run.composition:
        assert abs(line["loss_tokens"] - line["wanted"]) < 40
    second = run.ids[table[1, "math"]["rows"] :]
    assert Counter("math" if of[i] == "math" else "*" for i in second) == {
        "*": table[2, "*"]["rows"],
        "math": table[2, "math"]["rows"],
    }
    # Special rows are spread over the second phase, not at one end of it.
    where = [i / len(second) for i, identity in enumerate(second) if of[identity] == "math"]
    assert min(where) < 0.4
    assert max(where) > 0.6
    assert 4000 - 40 < sum(size[i] for i in run.ids) <= 4000


PHASES = st.lists(
    st.builds(
        Phase,
        st.dictionaries(st.sampled_from(["a", "b", "*"]), st.sampled_from([1.0, 3.0]), min_size=1),
        st.sampled_from([1.0, 3.0]),
    ),
    min_size=1,
    max_size=3,
)


@given(PHASES, st.integers(1, 2), st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_it_is_the_rule_in_plain_python_and_no_order_of_rows_changes_it(phases, size, seed):
    ids, sizes, sources = data({"a": 5, "b": 3, "c": 7, "d": 2}, seed)
    # Phases of 1 to 9 parts, sources of 1 to 7: this divides by every product of two.
    budget = 48 * 7 * 7 * 5 * 3 * size
    run = rows_for_phases(ids, sizes, sources, phases, budget, seed)
    assert run.ids == plain(ids, sizes, sources, phases, budget, seed)
    held = sum(int(sizes[ids.index(i)]) for i in run.ids)
    assert budget - sizes.max() < held <= budget
    assert held == sum(line["loss_tokens"] for line in run.composition)
    assert len(run.ids) == sum(line["rows"] for line in run.composition)
    order = np.random.default_rng(seed).permutation(len(ids))
    again = rows_for_phases(
        [ids[i] for i in order], sizes[order], [sources[i] for i in order], phases, budget, seed
    )
    assert again == run
    # No row comes again before all others of its source were seen.
    names = {name for phase in phases for name in phase.sources} - {"*"}
    group = {i: s if s in names else "*" for i, s in zip(ids, sources, strict=True)}
    counts = Counter(run.ids)
    for name in set(group.values()):
        seen = [counts[i] for i in ids if group[i] == name]
        assert max(seen) - min(seen) <= 1


def test_another_seed_is_another_order():
    ids, sizes, sources = data({"math": 30, "talk": 60})
    runs = [rows_for_phases(ids, sizes, sources, DUAL, 1500, seed).ids for seed in (0, 0, 1)]
    assert runs[0] == runs[1] != runs[2]


def test_what_can_not_be_laid_out_is_refused():
    ids, sizes, sources = data({"math": 3, "talk": 3})
    code = (Phase({"code": 1.0}),)
    with pytest.raises(ValueError, match=r"phase 1 asks source 'code', of which there is no row"):
        rows_for_phases(ids, sizes, sources, code, 100, 0)
    with pytest.raises(ValueError, match="the budget of 2 loss tokens holds no row"):
        rows_for_phases(ids, sizes, sources, DUAL, 2, 0)
    for bad, says in (
        ({"share": 0.0}, "share is 0.0: give a number above 0"),
        ({"sources": {}}, "sources: no source has a weight above 0"),
        ({"sources": {"a": -1.0}}, "the weight of 'a' is -1.0"),
    ):
        with pytest.raises(ValueError, match=re.escape(says)):
            Phase(**bad)
    with pytest.raises(ValueError, match=r"training.phases\[0\]: unknown key 'shar'"):
        build(FineTune, {"phases": [{"shar": 1}]}, "training")


# ---- training --------------------------------------------------------------------------------


def rows(n=24):
    lines = []
    for i in range(n):
        turns = [
            schema.message("user", f"{i}+{i}?"),
            schema.message("assistant", f"It is {2 * i}"),
        ]
        lines.append(schema.make_row(turns) | {"source": "math" if i % 3 == 0 else "talk"})
    return pa.Table.from_pylist(lines, schema=schema.ROW)


CONFIG = FineTune(learning_rate=3e-3, epochs=2, batch_rows=4, max_length=64, phases=DUAL)


def test_the_forward_passes_follow_the_phases(tiny):
    of = dict(zip(rows()["id"].to_pylist(), rows()["source"].to_pylist(), strict=True))
    schedule = lay_out(tiny.make_tokenizer(), rows(), CONFIG, 0, 1)
    fed = [schedule.rows.ids[i] for part in schedule.passes for i in part]
    wanted = rows_for_phases(
        schedule.rows.ids,
        schedule.rows.loss_tokens,
        [of[i] for i in schedule.rows.ids],
        DUAL,
        2 * int(schedule.rows.loss_tokens.sum()),
        0,
    )
    assert fed == wanted.ids
    assert schedule.steps == -(-len(fed) // 4)
    assert schedule.composition == wanted.composition
    specials = [of[i] == "math" for i in fed]
    assert all(specials[: len(fed) // 3])
    fixed = replace(CONFIG, loss_tokens=300, steps=6)
    short = lay_out(tiny.make_tokenizer(), rows(), fixed, 0, 1)
    assert short.steps == 6
    assert 280 < short.tokens_by_step().sum() <= 300


def test_a_run_in_phases_trains_and_says_what_they_held(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr("siftline.training.finetune.draw_curve", lambda *_: None)
    result = finetune(
        tiny_model, rows(), tmp_path / "m", CONFIG, seed=0, dataset_version="demo-0123456789ab"
    )
    told = json.loads((tmp_path / "m/training.json").read_text(encoding="utf-8"))["facts"]
    assert [line["phase"] for line in told["phases"]] == [1, 2, 2]
    assert sum(line["loss_tokens"] for line in told["phases"]) == result.loss_tokens
    mixed = finetune(
        tiny_model,
        rows(),
        tmp_path / "mixed",
        replace(CONFIG, phases=()),
        seed=0,
        dataset_version="demo-0123456789ab",
    )
    assert "phases" not in mixed.facts
    assert mixed.facts["run"] != result.facts["run"]


def test_an_arm_with_phases_has_a_folder_of_its_own(tiny_model, tmp_path):
    rows = pa.table({"id": ["b", "a"]})
    recipe = SimpleNamespace(name="mine")
    options = FineTune()
    phased = replace(options, phases=DUAL)
    found = [
        arms.arm_folder(
            Workspace(tmp_path), recipe, "curated", 0, rows, each, str(tiny_model), None, None, None
        )
        for each in (options, phased)
    ]
    assert found[0] != found[1]
