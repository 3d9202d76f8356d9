"""Canaries: what planted defects are, that they change nothing, and that the intervals hold."""

import itertools
import random
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import polars as pl
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from siftline.ingest.pool import Pool
from siftline.recipe.kinds import Stage, kind_of
from siftline.recipe.parse import parse
from siftline.recipe.sections import Canaries
from siftline.rows import schema
from siftline.rows.ledger import StageResult
from siftline.rows.selection import decisions
from siftline.scoring.verifiers import get_verifier
from siftline.stages import canaries, run
from siftline.stages.canaries import DEFECTS, SOUND, _plant, measured, similarity
from siftline.stages.context import Context, HeldRows, StageRun, first
from siftline.stages.decontamination.decide import Decontamination
from siftline.stages.duplicates.decide import Duplicates, against
from siftline.stages.run import outputs, run_stage
from siftline.stages.verify.decide import Verify
from siftline.workspace import Workspace


def quiet(line): ...


def row(prompt, response, answer=None, source="s"):
    messages = [schema.message("user", prompt), schema.message("assistant", response)]
    return schema.make_row(messages, answer=answer, source=source)


def texts(of):
    return of["messages"][-2]["content"], of["messages"][-1]["content"]


# ---- the defects -----------------------------------------------------------------------------

WORDS = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=60)


@given(WORDS, WORDS, WORDS, WORDS, st.sampled_from(sorted(DEFECTS)))
@settings(max_examples=200, deadline=None)
def test_a_defect_differs_in_what_it_says_and_nothing_else(prompt, response, other, reply, kind):
    sound, partner = row(prompt, response, "7"), row(other, reply)
    spoiled = DEFECTS[kind](sound, partner)
    assert spoiled == DEFECTS[kind](sound, partner)
    if spoiled is None:
        return
    assert spoiled["id"] != sound["id"]
    same = ("answer", "answer_from", "source", "conversation_id", "tools")
    assert [spoiled[name] for name in same] == [sound[name] for name in same]
    if kind in ("leaked", "other_question"):
        assert spoiled["messages"][-1] == sound["messages"][-1]
        assert spoiled["prompt_id"] != sound["prompt_id"]
    elif kind != "near_copy":
        assert spoiled["prompt_id"] == sound["prompt_id"]
    if kind == "swapped_answer":
        assert spoiled["messages"][-1] == partner["messages"][-1]
    if kind == "truncated":
        assert texts(sound)[1].startswith(texts(spoiled)[1])
    if kind == "near_copy":
        assert all(
            similarity(a, b) >= 0.85 for a, b in zip(*map(texts, (sound, spoiled)), strict=True)
        )


def test_a_swapped_answer_is_never_the_right_one():
    sound, partner = row("Is it A or B?", "It is A, of course", "A"), row("Which?", "A!", "a")
    swap = DEFECTS["swapped_answer"]
    assert swap(sound, partner) is None
    assert swap(row("1/2?", "0.5", "0.5"), row("2/4?", "one half", "1/2")) is None
    wrong = row("Which?", "B!", "B")
    assert texts(swap(sound, wrong))[1] == "B!"
    assert texts(swap(row("Is it A?", "A, yes"), partner))[1] == "A!"  # nobody knows


def test_numbers_change_once_and_upwards():
    sound = row("Tom has 12 pens and 5 caps.", "12 + 5 = 17\n#### 17", "17")
    wrong = texts(DEFECTS["one_number"](sound, sound))[1]
    pairs = zip(wrong.split(), texts(sound)[1].split(), strict=True)
    changed = [(int(a), int(b)) for a, b in pairs if a != b]
    assert len(changed) == 1
    assert changed[0][0] > changed[0][1]
    asked = texts(DEFECTS["other_question"](sound, sound))[0]
    assert sum(a != b for a, b in zip(asked.split(), texts(sound)[0].split(), strict=True)) == 1


# ---- a new row held against old decisions ----------------------------------------------------


def near_rows(rng, count):
    made = []
    for i in range(count):
        words = [
            rng.choice(["river", "stone", "lamp", "bread", "cloud", "field"]) for _ in range(9)
        ]
        prompt = f"Question {i % 4} about {' '.join(words)}, please."
        made.append(row(prompt, f"It is {' '.join(reversed(words))} indeed.", str(i % 2)))
        if made and rng.random() < 0.5:
            copy = DEFECTS["near_copy"](rng.choice(made), made[0])
            made += [copy] if copy else []
    return list({line["id"]: line for line in made}.values())


def view(rows, priority):
    fields = [f.with_nullable(True) for f in schema.ROW]
    table = pa.Table.from_pylist(rows, schema=pa.schema(fields))
    return schema.text_view(table).with_columns(priority=pl.lit(priority))


def test_an_empty_bucket_takes_no_part():
    gate, rows = Duplicates(), near_rows(random.Random(1), 6)
    states = [gate.summarise(view(rows, 0).clear()), gate.summarise(view(rows, 0))]
    (*_, last) = against(gate.summarise(view(rows[:1], 2)), states, [])
    assert last.rows.height == 1


@given(st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_held_against_earlier_rows_decides_as_all_at_once(seed):
    rng, gate = random.Random(seed), Duplicates()
    rows = near_rows(rng, 24)
    new = [r for r in rows if rng.random() < 0.3]
    old = [r for r in rows if r not in new]
    # Answers that contradict across the cut would change what is asked of the old rows.
    for line in new:
        line["answer"] = line["answer_from"] = None
    if not new or not old:
        return
    states = [gate.summarise(view(half, 0)) for half in (old[::2], old[1::2]) if half]
    gone = set(gate.decide(states).removed["id"])
    fresh = gate.summarise(view(new, 2))
    partial = gate.decide(against(fresh, states, gone)).removed
    whole = gate.decide([*states, fresh]).removed
    ids = [r["id"] for r in new]
    expected = whole.filter(pl.col("id").is_in(ids)).sort("id")
    assert partial.filter(pl.col("id").is_in(ids)).sort("id").equals(expected)
    assert set(partial["id"]) <= set(ids)


# ---- intervals -------------------------------------------------------------------------------


def added(rows):
    fields = pa.schema([f.with_nullable(True) for f in schema.ADDED])
    return pa.Table.from_pylist(rows, schema=fields)


class InMemory:
    """As much of a stage's context as planting sees, over rows in memory."""

    held_rows = None

    def __init__(self, rows, per_kind, seed):
        self.held = {r["id"]: r for r in rows}
        self.recipe = SimpleNamespace(canaries=Canaries(per_kind), seed=seed, budget=None)
        self.stage = Stage("verify", "verify", Verify())
        self.buckets = range(1)
        self.emit = quiet

    def in_play(self, bucket):
        return sorted(self.held)

    def rows(self, bucket):
        return self.rows_of(self.in_play(bucket))

    def rows_of(self, ids):
        return added([self.held[i] for i in ids])

    def judged(self, bucket):
        return None

    def rates(self):
        table = decisions(sorted(self.held), kept=[True] * len(self.held))
        run = measured(self, self.judge, StageRun([StageResult(table)], {}, {}))
        return {line["kind"]: line for line in run.facts["canaries"]}

    def judge(self, planted):
        """A gate with a known blind spot: it only reads the answer's last digit."""
        found = schema.text_view(planted)
        kept = [r.rstrip()[-1:] == a[-1] for r, a in found.select("response", "answer").rows()]
        table = found.select(
            "id",
            kept=pl.Series(kept, dtype=pl.Boolean),
            reason=pl.lit("last_digit"),
            value=pl.lit(None, pl.Float64),
        )
        return table, {}


def test_intervals_cover_what_planting_everywhere_finds():
    """Over 100 seeded pools, each kind; 95 % is promised and 93 asked for."""
    covered = dict.fromkeys(kind_of("verify").planted, 0)
    strict = 0
    for seed in range(100):
        rng = random.Random(seed)
        rows = [
            row(f"Pool {seed}, question {i}?", f"That gives {n}\n#### {n}", str(n))
            for i, n in ((i, rng.randrange(10, 40)) for i in range(150))
        ]
        truth = InMemory(rows, 150, seed).rates()
        sample = InMemory(rows, 30, seed).rates()
        for kind, line in sample.items():
            assert line["planted"] == 30
            covered[kind] += line["low"] <= truth[kind]["share"] <= line["high"]
        strict += 0.5 < truth["swapped_answer"]["share"] < 0.99
    assert strict == 100  # the blind spot is there to be measured
    assert min(covered.values()) >= 93, covered


class RealGate(InMemory):
    """A context that a whole gate runs in, with a pool and an evaluation set in memory."""

    pool = None
    workspace = SimpleNamespace(pool=lambda name: name, root=Path())

    def __init__(self, kind, options, rows):
        super().__init__(rows, 1, 0)
        self.stage = Stage(kind, kind, options)
        self.recipe.sets = {"test": SimpleNamespace(name="held_out")}


def stock(seed):
    """Rows of every length."""
    rng = random.Random(seed)

    def text(least, most):
        words = ("".join(rng.choices("abcdefghij", k=5)) for _ in range(rng.randrange(least, most)))
        return " ".join(words)

    return [row(f"What of {text(2, 18)}?", f"It is {text(8, 36)}.") for _ in range(400)]


@pytest.mark.parametrize(
    ("kind", "planted", "options"),
    [
        ("duplicates", "near_copy", Duplicates(threshold=0.9)),
        ("decontamination", "leaked", Decontamination(near=0.9)),
    ],
)
def test_intervals_cover_what_the_real_gates_do(kind, planted, options, monkeypatch):
    """As above with whole gates, too strict for the shorter texts; 20 pools, 5 draws of each."""
    runs, covered, truths = [], 0, []
    gate = import_module(f"siftline.stages.{kind}.run")
    monkeypatch.setattr(gate, "measured", lambda *run: runs.append(run) or run[2])
    monkeypatch.setattr(canaries, "_kinds", lambda stage: (planted,))
    ours, theirs = stock(1), stock(2)
    for number in range(20):
        rng = random.Random(number)
        held = added(rng.sample(theirs, 120)).select(schema.ROW.names).cast(schema.ROW)
        for module in (gate, canaries):
            pool = SimpleNamespace(all_rows=lambda held=held: held)
            monkeypatch.setattr(module, "Pool", lambda name, pool=pool: pool, raising=False)
        context = RealGate(kind, options, rng.sample(ours, 120 if kind == "duplicates" else 8))
        gate.run(context)

        def share(per_kind, seed, context=context):
            context.recipe.canaries, context.recipe.seed = Canaries(per_kind), seed
            (line,) = measured(context, *runs[-1][1:]).facts["canaries"]
            assert per_kind == 120 or line["planted"] == per_kind
            return line

        truths.append(share(120, 0)["share"])
        for seed in range(5 * number, 5 * number + 5):
            line = share(20, seed)
            covered += line["low"] <= truths[-1] <= line["high"]
    assert min(truths) > 0.3
    assert max(truths) < 0.95
    assert covered >= 93, covered


def test_draws_do_not_depend_on_order_and_few_rows_are_planted_once():
    rows = [row(f"Question {i}?", f"#### {i}", str(i)) for i in range(12)]
    ahead, behind = InMemory(rows, 5, 3), InMemory(rows[::-1], 5, 3)
    assert ahead.rates() == behind.rates()
    assert InMemory(rows, 200, 3).rates()["truncated"]["planted"] <= 12
    none = InMemory([row("Why?", "no", None)], 5, 3).rates()["gold_answer"]
    assert (none["planted"], none["share"], none["low"]) == (0, None, None)


@given(st.integers(0, 10_000), st.integers(1, 40), st.floats(0, 0.6), st.sampled_from([1, 4]))
@settings(max_examples=40, deadline=None)
def test_held_rows_are_the_first_of_all_rows(seed, wanted, removed, buckets):
    rows = sorted((row(f"Is {n} odd?", "Who knows") for n in range(120)), key=lambda r: r["id"])
    held_rows, cut = HeldRows(seed, wanted, len(rows)), len(rows) // buckets
    for bucket in reversed(range(buckets)):
        held_rows.offer(bucket, added(rows[bucket * cut : (bucket + 1) * cut]))
        held_rows.offer(bucket, added(rows[bucket * cut : (bucket + 1) * cut]))
    rng = random.Random(seed)
    kept = [r["id"] for r in rows if rng.random() >= removed]
    count = min(wanted, len(kept))
    found = held_rows.first(kept, count, len(rows))
    if removed == 0 and wanted > 15:
        assert found is not None
    if found is not None:
        assert found["id"].to_pylist() == [kept[i] for i in first(seed, kept, count)]
    assert held_rows.first(kept, count, len(rows) + 1) is None  # a row it was not shown


def test_held_rows_are_few():
    rows = [row(f"Is {n} odd?", "Who knows") for n in range(600)]
    held_rows = HeldRows(0, 20, len(rows))
    held_rows.offer(0, added(rows))
    ids = sorted(r["id"] for r in rows)
    assert held_rows.first(ids, 20, len(rows)).num_rows == 20
    assert held_rows.first(ids, 120, len(rows)) is None


def test_a_canary_that_is_a_row_of_the_pool_is_not_planted():
    """One number changed turns some questions into others that are asked as well."""
    rows = [row(f"Is {n} odd?", "It is a number.", "1") for n in range(60)]
    held_rows = InMemory(rows, 30, 0)
    pairs = list(itertools.pairwise([*rows, rows[0]]))
    planted = _plant("other_question", pairs, 30, sorted(held_rows.held))
    asked = {r["prompt_id"] for r in rows}
    assert planted
    assert all(canary.row["prompt_id"] not in asked for canary in planted)
    truth = _plant("other_question", pairs, 60, [])
    assert len(truth) > len(planted)


# ---- in the chain ----------------------------------------------------------------------------


def test_every_gate_is_measured_and_no_decision_changes(finished, mini, mini_tools, tmp_path):
    root = mini_tools.copy_root(finished.root, tmp_path / "root")
    plain, recipe = mini(), mini("canaries.per_kind=12")
    assert recipe.hash == plain.hash  # the version's name, too, does not know of them
    workspace = Workspace(root)
    before = {stage.name: output for stage, output in outputs(workspace, plain)}
    found = {}
    for stage in itertools.takewhile(lambda s: s.kind != "rejection_sampling", recipe.stages):
        output, _ = run_stage(workspace, recipe, stage.name, quiet)
        assert output.manifest.version == before[stage.name].manifest.version
        assert output.accounting == before[stage.name].accounting
        if not stage.of.planted:
            continue
        lines = {line["kind"]: line for line in output.facts["canaries"]}
        expected = {*stage.of.planted}
        assert set(lines) - {"proven"} == expected
        table = output.table("canaries")
        assert set(table["id"]).isdisjoint(output.all_decisions()["id"])
        for kind, line in lines.items():
            if kind == "proven":
                continue
            mine = table.filter(kind=kind)
            assert line["sound"] == (kind in SOUND)
            assert line["planted"] + line["failed"] == 12, (stage.name, line)
            assert (mine.height, mine["caught"].sum()) == (line["planted"], line["removed"])
            assert mine.filter("caught")["reason"].null_count() == 0
        found[stage.kind] = lines
    share = {(gate, kind): line["share"] for gate, ls in found.items() for kind, line in ls.items()}
    assert share["duplicates", "near_copy"] == 1.0
    assert share["duplicates", "other_question"] == 0.0
    assert share["decontamination", "leaked"] == 1.0
    assert share["verify", "swapped_answer"] > 0.7
    assert share["verify", "truncated"] > 0.7
    assert share["verify", "gold_answer"] == 0.0
    assert found["confidence"]["proven"]["planted"] > 20
    assert 0 < found["confidence"]["proven"]["high"] < 1


def test_rows_that_are_read_again_make_the_same_canaries(
    finished, mini, mini_tools, tmp_path, monkeypatch
):
    recipe, made, read = mini("canaries.per_kind=12"), [], []
    told = Context.rows_of
    monkeypatch.setattr(Context, "rows_of", lambda *asked: read.append(1) or told(*asked))
    for held in (True, False):
        root = mini_tools.copy_root(finished.root, tmp_path / f"root-{held}")
        if not held:
            monkeypatch.setattr(run, "held_rows_of", lambda *gate: None)
        for name in ("duplicates", "decontamination"):
            output, _ = run_stage(Workspace(root), recipe, name, quiet)
            made.append(output.table("canaries"))
        assert len(read) == (0 if held else 2)
    assert made[0].equals(made[2])
    assert made[1].equals(made[3])
    assert made[0].height == made[1].height == 24


def test_the_verify_gate_of_the_chain_is_the_verifier_itself(finished, mini, mini_tools, tmp_path):
    root = mini_tools.copy_root(finished.root, tmp_path / "root")
    workspace, recipe = Workspace(root), mini("canaries.per_kind=12")
    for name in ("duplicates", "decontamination"):
        run_stage(workspace, recipe, name, quiet)
    output, _ = run_stage(workspace, recipe, "verify", quiet)
    table, check = output.table("canaries"), get_verifier("math")
    rows = Pool(workspace.pool("mini")).all_rows().to_pylist()
    rows = {r["id"]: r for r in rows}
    for line in table.filter(kind="one_number").to_dicts():
        source = rows[line["source_id"]]
        spoiled = DEFECTS["one_number"](source, source)
        assert spoiled["id"] == line["id"]
        asked = source["answer"] is not None and source["answer_from"] == "independent"
        right = not asked or check(texts(spoiled)[1], source["answer"]).correct
        assert line["caught"] == (right is not True)


def test_the_recipe_says_what_canaries_may_be():
    base = {
        "name": "r",
        "pool": {"name": "p", "inputs": [{"path": "x.jsonl"}]},
        "models": {"m": {"path": "x"}},
        "stages": ["duplicates"],
        "budget": {"size": 1},
    }
    assert parse(base).canaries is None
    assert parse({**base, "canaries": {"per_kind": 3}}).canaries == Canaries(3)
    with pytest.raises(ValueError, match="per_kind is 0: plant 1 or more"):
        parse({**base, "canaries": {"per_kind": 0}})
