"""The worlds of examples/smollm2, and how benchmarks/value_real.py keeps and compares arms."""

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import polars as pl
import pyarrow as pa
import pytest
import world_inputs
from instructions_inputs import INSTRUCTIONS
from world_inputs import WANTED, choosing, dirt

from siftline.demo.summary import ACCEPTED

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
LABELS = ("yes", "no", "maybe")
SIZES = {"test": 6, "dev": 3, "target": 2}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Files in the forms of the data sets, made here; some texts stand in two tasks."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "natural_instructions").mkdir()
    (folder / "gsm8k").mkdir()
    for task in INSTRUCTIONS:
        shared = 5 if task in ("task1386", "task190") else 0
        texts = [f"shared {i}" for i in range(shared)] + [f"{task} asks {i}." for i in range(60)]
        lines = [
            {"task": task, "input_col": text, "output_col": LABELS[i % 3]}
            for i, text in enumerate(texts)
        ]
        path = folder / "natural_instructions" / f"{task}.jsonl"
        path.write_text("\n".join(map(json.dumps, lines)) + "\n")
    lines = [{"question": f"What is {i} + 1?", "answer": f"#### {i + 1}"} for i in range(30)]
    (folder / "gsm8k" / "train.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    return folder


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("make", [choosing, dirt], ids=lambda f: f.__name__)
def test_same_seed_same_bytes_and_another_seed_other_rows(make, data, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        make(
            tmp_path / name, tmp_path / f"{name}t", seed=seed, data=str(data), per_task=20, **SIZES
        )
    for name in ("pool", "target", "dev", "test"):
        one, two, other = ((tmp_path / x / f"{name}.jsonl").read_bytes() for x in "abc")
        assert one == two != other


@pytest.mark.parametrize("make", [choosing, dirt], ids=lambda f: f.__name__)
def test_what_is_asked_is_in_no_pool_but_for_stated_leaks(make, data, tmp_path):
    make(tmp_path / "in", tmp_path / "truth", seed=0, data=str(data), per_task=60, **SIZES)
    sets = {name: read(tmp_path / "in" / f"{name}.jsonl") for name in ("target", "dev", "test")}
    assert {n: len(rows) for n, rows in sets.items()} == {n: 5 * k for n, k in SIZES.items()}
    for rows in sets.values():
        assert Counter(row["level"] for row in rows) == dict.fromkeys(WANTED, len(rows) // 5)
    texts = [row["question"].split("\n", 1)[1] for rows in sets.values() for row in rows]
    assert len(set(texts)) == len(texts)
    truth = read(tmp_path / "truth" / "rows.jsonl")
    pool = {r["question"].split("\n", 1)[-1] for r in truth if r["defect"] != "leaked_test"}
    assert not pool & set(texts), "not even where another task asks about the same text"


def test_world_one_has_every_task_and_mathematics_and_no_reference(data, tmp_path):
    choosing(tmp_path / "in", tmp_path / "t", seed=0, data=str(data), per_task=20, **SIZES)
    rows = read(tmp_path / "in" / "pool.jsonl")
    assert Counter(row["source"] for row in rows) == dict.fromkeys([*INSTRUCTIONS, "gsm8k"], 20)
    assert {row["answer"] for row in rows} == {None}


def test_dirt_is_what_is_stated_and_stands_in_the_truth_alone(data, tmp_path):
    shares = {"swapped": 0.3, "truncated": 0.2, "off_topic": 0.1, "copies": 0.2, "leaked": 0.5}
    dirt(tmp_path / "in", tmp_path / "t", seed=0, data=str(data), per_task=45, referenced=0.4,
         **shares, **SIZES)  # fmt: skip
    truth = read(tmp_path / "t" / "rows.jsonl")
    questions = [r for r in truth if r["defect"] not in ("near_duplicate", "leaked_test")]
    found = Counter(row["defect"] for row in questions)
    assert len(questions) == 5 * 45
    swapped = found["wrong_vs_reference"] + found["wrong_without_reference"]
    for count, share in ((swapped, 0.3), (found["truncated"], 0.2), (found["off_topic"], 0.1)):
        assert abs(count / len(questions) - share) < 0.09
    assert {*found} - {None} <= set(ACCEPTED)
    by_id = {row["id"]: row for row in truth}
    for row in truth:
        right = row["response"].lower() == row["true_answer"].lower()
        assert right == (row["defect"] in (None, "near_duplicate", "leaked_test")) or (
            row["defect"] == "off_topic"  # another task may have the same label
        )
        assert row["answer"] in (None, row["true_answer"])
        if row["defect"] == "truncated":
            assert row["clean_response"].startswith(row["response"])
        if row["defect"] == "near_duplicate":
            assert row["question"].startswith(by_id[row["twin"]]["question"])
    test = {row["question"] for row in read(tmp_path / "in" / "test.jsonl")}
    leaked = [row for row in truth if row["defect"] == "leaked_test"]
    assert len(leaked) == 15
    assert {row["question"] for row in leaked} <= test
    told = {key for row in read(tmp_path / "in" / "pool.jsonl") for key in row}
    assert not told & {"defect", "twin", "clean_response", "true_answer"}


def test_another_word_of_the_text_where_a_task_has_no_few_labels():
    examples = [
        world_inputs.Example("task039", f"words like river and stone{i}", f"w{i}")
        for i in range(20)
    ]
    dice = world_inputs.Dice(0, "x", "y")
    assert world_inputs._another(examples[0], examples, dice) in (
        "words",
        "like",
        "river",
        "stone0",
    )


def test_missing_files_and_shares_that_leave_nothing_are_said(data, tmp_path):
    with pytest.raises(ValueError, match="is missing: data must be a folder with"):
        choosing(tmp_path / "i", tmp_path / "t", seed=0, data=str(tmp_path))
    with pytest.raises(ValueError, match="leave no sound row"):
        dirt(tmp_path / "i", tmp_path / "t", seed=0, data=str(data), swapped=0.9)
    with pytest.raises(ValueError, match="ask for fewer"):
        dirt(tmp_path / "i", tmp_path / "t", seed=0, data=str(data), test=1000)


# ---- the benchmark ------------------------------------------------------------------------------


@pytest.fixture
def real(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import value_real

    return value_real


def arena(real, tmp_path, world="one", monkeypatch=None):
    """An arena without inputs: of its recipe, with scripted rows and answers."""
    import yaml

    from siftline.recipe.parse import parse

    made = object.__new__(real.Arena)
    made.name = real.WORLDS[world]
    made.data = yaml.safe_load((real.EXAMPLES / "smollm2" / f"{made.name}.yaml").read_text())
    made.recipe = parse(made.data)
    made.results, made.steps, made.chosen = tmp_path, real.STEPS, {}
    made.candidates = real.CANDIDATES
    made.said = []
    made.say = made.said.append
    monkeypatch.setenv("SIFTLINE_SMOLLM2", str(tmp_path))
    monkeypatch.setattr(real, "directory_digest", lambda path: "digest")
    made.rows = lambda arm, seed: (
        None if arm == "zero-shot" else pa.table({"id": [f"{arm} {seed}"], "messages": [None]})
    )
    made.questions = lambda split: pl.DataFrame({"id": ["q1", "q2"]})
    return made


def test_arms_are_every_method_that_applies_and_the_chain_without_each_gate(real):
    import yaml

    for world, gates in (
        ("one", {"duplicates", "decontamination", "likelihood"}),
        ("two", {"duplicates", "decontamination", "verify", "likelihood", "confidence"}),
    ):
        path = real.EXAMPLES / "smollm2" / f"{real.WORLDS[world]}.yaml"
        names, left_out = real.arms_of(yaml.safe_load(path.read_text()), [])
        assert {n.removeprefix(real.WITHOUT) for n in names if n.startswith(real.WITHOUT)} == gates
        assert {"zero-shot", "full", "random", "random_clean", "select balanced_random"} <= {*names}
        assert ("proven rows only" in names) == (world == "two")
        methods = {entry.name for entry in real.selectors()}
        told = {n.removeprefix("select ") for n in names} | {*left_out} | {"random"}
        assert methods <= told, "a method is an arm, or it is said why not"


def test_all_arms_but_full_have_the_same_tokens_and_steps(real, tmp_path, monkeypatch):
    made = arena(real, tmp_path, monkeypatch=monkeypatch)
    options = made.training(learning_rate=1e-4)
    assert (options.loss_tokens, options.steps) == (2000, real.STEPS)
    assert made.cell("random", 1, options).training == options
    full = made.cell("full", 1, options).training
    assert (full.loss_tokens, full.steps, full.epochs) == (None, None, 1.0)
    assert made.cell("zero-shot", 0, options).training is None


def scripted(made, real, right):
    """Cells that answer without a model; counts what was run."""
    ran = []

    def run(cell):
        known = made.answered(cell)
        if known is not None:
            return known
        ran.append((cell.arm, cell.seed, cell.split))
        answers = [{"id": i, "level": "x", "correct": right(cell)} for i in ("q1", "q2")]
        facts = {"arm": cell.arm, "training_seconds": 1.0, "asking_seconds": 1.0}
        file = made.file_of(cell)
        file.write_text(json.dumps({**facts, "answers": answers}))
        made._list(cell, file)
        return made.answered(cell)

    made.run = run
    return ran


def test_a_run_goes_on_where_it_stopped_and_whole_seeds_come_first(real, tmp_path, monkeypatch):
    made = arena(real, tmp_path, monkeypatch=monkeypatch)
    ran = scripted(made, real, lambda cell: True)
    options = made.training()
    names = ["zero-shot", "random", "chain"]
    left = iter([True, True, False])
    real._go_on(made, names, 2, options, lambda: next(left))
    assert ran == [("zero-shot", 0, "test"), ("random", 0, "test")]
    assert made.said[-1].startswith("the time is over")
    assert made.listed("random", 0, options) is not None
    assert made.listed("chain", 0, options) is None
    real._go_on(made, names, 2, options, lambda: True)
    assert ran[2:] == [("chain", 0, "test"), ("random", 1, "test"), ("chain", 1, "test")]
    real._go_on(made, names, 2, options, lambda: True)
    assert len(ran) == 5, "nothing is run twice"
    assert made.listed("random", 0, made.training(learning_rate=0.5)) is None


def test_options_are_chosen_by_dev_accuracy_alone(real, tmp_path, monkeypatch):
    made = arena(real, tmp_path, monkeypatch=monkeypatch)
    best = real.CANDIDATES[1]
    ran = scripted(made, real, lambda c: c.training.learning_rate == best["learning_rate"])
    assert made.tuned(lambda: False) is None
    assert not ran
    options = made.tuned(lambda: True)
    assert (options.method, options.learning_rate) == (best["method"], best["learning_rate"])
    assert {split for _, _, split in ran} == {"dev"}
    assert made.tuned(lambda: False) == options, "what was tried is found"


def test_the_cost_of_shared_scores_is_told_of_every_arm_that_needs_them(
    real, tmp_path, monkeypatch
):
    made = arena(real, tmp_path, monkeypatch=monkeypatch)
    made.note_cost("select perplexity", 100.0)
    made.note_cost("select rds_plus", 50.0)
    made.note_cost("select got_d", 3.0)
    made.note_cost("select got_d", 0.1)  # found in a later piece of the run
    made.note_cost("random", 1.0)
    assert made.cost("select perplexity", 1000) == (100.0, 1000)
    assert made.cost("select rds_plus", 1000) == (150.0, 2000)
    assert made.cost("select got_d", 1000) == (153.0, 2000)
    assert made.cost("random", 1000) == (1.0, 0)
    assert made.cost("select less", 1000) == (0.0, 0), "not there yet"
    assert made.kinds("select less") == ["likelihood", "gradients"]


def test_the_table_pairs_seeds_that_are_in_and_leaves_leaked_questions_out(
    real, tmp_path, monkeypatch
):
    made = arena(real, tmp_path, world="two", monkeypatch=monkeypatch)
    options = made.training()

    def keep(arm, seed, correct):
        cell = made.cell(arm, seed, options)
        answers = [
            {"id": f"q{i}", "level": "leaked" if i == 9 else "x", "correct": bool(c)}
            for i, c in enumerate(correct)
        ]
        file = made.file_of(cell)
        file.write_text(json.dumps({"training_seconds": 2.0, "rows": 7, "answers": answers}))
        made._list(cell, file)

    keep("zero-shot", 0, [0] * 10)
    for seed in (0, 1):
        keep("random_clean", seed, [1, 1, 1, 0, 0, 0, 0, 0, 0, 1])
        keep("chain", seed, [1] * 8 + [0, 1])
    keep("full", 0, [1] * 3 + [0] * 7)
    made.world = SimpleNamespace(draw=None)
    monkeypatch.setattr(made, "pool_tokens", lambda: 1000)
    names = ["zero-shot", "full", "random_clean", "select less", "chain"]
    lines = {line[:34].strip(): line for line in real.table(made, names, 3, options)}
    assert "select less" not in lines, "it has no answers yet"
    assert "88.9" in lines["chain"]
    assert "+55.6" in lines["chain"]
    assert lines["chain"][34:40].strip() == "2"
    assert lines["full"][34:40].strip() == "1"
    assert " 100 " in lines["chain"], "leaked questions stand apart"
    full, zero = "+0.0 (+0.0 to +0.0)", "+33.3 ("
    own = lines["random_clean"].index(full) - lines["random_clean"].index("33.3 (")
    assert own > 27, "its own column is empty"
    assert zero in lines["random_clean"]


def test_a_copy_counts_as_caught_whichever_of_the_pair_went(real, tmp_path, monkeypatch):
    import value_table

    truth = [
        {"id": "a", "defect": None, "twin": None},
        {"id": "b", "defect": "near_duplicate", "twin": "a"},
        {"id": "c", "defect": "wrong_vs_reference", "twin": None},
        {"id": "d", "defect": None, "twin": None},
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, truth)))
    made = arena(real, tmp_path, world="two", monkeypatch=monkeypatch)
    made.workspace = SimpleNamespace(truth=lambda name: tmp_path)

    def done(name, removed):
        decisions = pl.DataFrame({"id": removed, "outcome": ["removed"] * len(removed)})
        return SimpleNamespace(name=name), SimpleNamespace(all_decisions=lambda: decisions)

    stages = [done("duplicates", ["a"]), done("verify", ["c"])]
    monkeypatch.setattr(value_table, "outputs_so_far", lambda workspace, recipe: stages)
    lines = [line.split() for line in value_table.caught(made)]
    assert lines[0] == ["planted", "rows", "duplicates", "verify", "kept"]
    assert lines[1:] == [
        ["near_duplicate", "1", "1", "0", "0"],
        ["sound", "2", "0", "0", "2"],
        ["wrong_vs_reference", "1", "0", "1", "0"],
    ]
