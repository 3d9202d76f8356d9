"""The confidence gate as a stage, on a scripted world in which a fifth of the rows are swapped."""

from types import SimpleNamespace

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from sklearn.metrics import roc_auc_score

from siftline.assets.shared import build
from siftline.kernels.draws import gumbel_top_k, uniforms
from siftline.recipe.kinds import Stage, StageKind
from siftline.recipe.parse import parse
from siftline.rows.ledger import KEPT, StageResult
from siftline.rows.schema import ADDED, bucket_of, make_row, message
from siftline.rows.selection import decisions
from siftline.scoring.engines.base import ModelSpec
from siftline.scoring.measures.consistency import AGAIN, reflections
from siftline.scoring.recorder import Recorder
from siftline.stages import models
from siftline.stages.confidence.decide import BSDETECTOR
from siftline.stages.confidence.options import Confidence
from siftline.stages.confidence.parts import _likelihoods
from siftline.stages.confidence.run import _from_dev
from siftline.stages.context import StageRun
from siftline.stages.reporting import _notes
from siftline.stages.run import models_used, run_stage
from siftline.workspace import Workspace

COLUMNS = {name: name for name in ("question", "response", "answer", "source")}


def quiet(line): ...


def recipe_of(pool, folder, roles=None, stages=None, length=2048, canaries=None, sets=None, **gate):
    return parse(
        {
            "name": "sums",
            "pool": {
                "name": "sums",
                "buckets": 4,
                "inputs": [{"path": str(pool), "layout": "question_answer", "columns": COLUMNS}],
            },
            "models": {
                name: {"path": str(folder), "max_length": length, "device": "cpu"}
                for name in ("base", "cross")
            },
            "roles": {"target": "base", **(roles or {})},
            "stages": stages or [{"confidence": {"reflection": "on", **gate}}],
            **({"canaries": canaries} if canaries else {}),
            **({"sets": sets} if sets else {}),
            "budget": {"size": 10, "unit": "rows"},
        }
    )


@pytest.fixture(scope="module")
def run(scripted, tokenizer, tiny_model, tmp_path_factory):
    """`run(world, **gate)` is the stage's output; the store is shared, so facts are asked once."""
    root = tmp_path_factory.mktemp("confidence")
    engine = scripted.Scripted("base", tokenizer, scripted.noisy_sampler(0.6), scripted.noisy_judge)
    nli = scripted.ScriptedNli(tokenizer)

    def made(world, roles=None, **gate):
        recipe = recipe_of(world.write(root / "in"), tiny_model, roles, **gate)
        patch = pytest.MonkeyPatch()
        patch.setattr(models, "_opened", lambda spec, head: nli if head != "causal" else engine)
        try:
            build(Workspace(root), recipe, "sums", quiet)
            return run_stage(Workspace(root), recipe, "confidence", quiet)[0]
        finally:
            patch.undo()

    made.engine = engine
    return made


@pytest.fixture(scope="module")
def world(scripted):
    return scripted.make_world(80)


def rows_by_id(world):
    found = {}
    for row in world.rows:
        turns = [message("user", row["question"]), message("assistant", row["response"])]
        made = make_row(turns, answer=row["answer"], source=row["source"])
        found[made["id"]] = row
    return found


@pytest.fixture(scope="module")
def plain(run, world):
    return run(world)


def test_the_filter_finds_swapped_rows_and_beats_a_random_half(plain, world):
    rows, table = rows_by_id(world), plain.table("confidence")
    # Rows without an independent answer have one parsed from the response: ids are by question.
    by_prompt = {i[:20]: row for i, row in rows.items()}
    swapped = np.array([by_prompt[i[:20]]["question"] in world.swapped for i in table["id"]])
    assert swapped.sum() == 16
    value = roc_auc_score(~swapped, table["confidence"].to_numpy())
    assert value > 0.85  # agreement 0.6 against hardly any, a verdict that is right on the whole
    decided = plain.all_decisions()
    kept = (decided["outcome"] == KEPT).to_numpy()
    assert decided["id"].to_list() == table["id"].to_list()
    ids = decided["id"].to_list()
    recall = swapped[~kept].sum() / 16
    assert recall > 0.85
    assert swapped[~kept].sum() / (~kept).sum() > 0.3  # half is removed whatever the data: a fifth
    for seed in range(5):
        half = gumbel_top_k(uniforms(seed, "random half", ids), ids, int(kept.sum()))
        assert swapped[kept].sum() < swapped[half].sum()


def test_defaults_are_bsdetectors(plain):
    table = plain.table("confidence")
    assert table.columns == ["id", "agreement", "reflection", "confidence"]
    expected = 0.7 * table["agreement"] + 0.3 * table["reflection"]
    np.testing.assert_allclose(table["confidence"], expected)
    assert plain.facts["weights"] == {"agreement": 0.7, "reflection": pytest.approx(0.3)}
    assert plain.facts["missing"] == {"agreement": 0, "reflection": 0}
    assert plain.facts["threshold"] == np.sort(table["confidence"])[40]


def test_calibration_is_of_the_rows_with_an_independent_answer(plain, world):
    told = plain.facts["calibration"]
    known = {row["question"]: row for row in world.rows if row["answer"] is not None}
    right = [question not in world.swapped for question in known]
    assert (told["rows"], told["right"]) == (len(known), sum(right))
    assert sum(line["rows"] for line in told["bins"]) == len(known)
    assert set(told["auroc"]) == {"confidence", "agreement", "reflection"}
    by_prompt = {i[:20]: row for i, row in rows_by_id(world).items()}
    table = plain.table("confidence")
    mine = [by_prompt[i[:20]]["question"] in known for i in table["id"]]
    labels = [by_prompt[i[:20]]["question"] not in world.swapped for i in table["id"]]
    part = table.with_columns(pl.Series("right", labels)).filter(pl.Series(mine))
    for name, line in told["auroc"].items():
        assert line["value"] == pytest.approx(roc_auc_score(part["right"], part[name]))
        assert line["low"] < line["value"] < line["high"] <= 1
    assert plain.facts["auroc_confidence"] == told["auroc"]["confidence"]["value"]
    assert plain.facts["calibration_error"] == told["error"] > 0


def test_shares_kept_by_source_and_level_add_up(plain, world):
    facts, kept = plain.facts, plain.accounting.kept
    assert {name: f["rows"] for name, f in facts["kept_by_source"].items()} == {
        "even": 40,
        "odd": 40,
    }
    assert sum(f["kept"] for f in facts["kept_by_source"].values()) == kept
    known = sum(row["answer"] is not None for row in world.rows)
    assert sum(f["rows"] for f in facts["kept_by_level"].values()) == known
    assert list(facts["kept_by_level"]) == sorted(facts["kept_by_level"])
    # Rows whose samples hardly ever come to the answer can't agree with them: the easy survive.
    shares = [f["share"] for f in facts["kept_by_level"].values()]
    assert shares[0] > shares[-1]
    table = plain.table("kept_by")
    assert table.filter(by="source")["kept"].sum() == kept


def test_parts_by_name_share_the_samples_and_missing_ones_are_counted(run, world, plain):
    draws = sum("Proposed" not in text for text in run.engine.asked)
    weights = {"agreement": 1, "jaccard": 2, "embedding": 1, "nli": 1}
    output = run(world, {"nli": "cross"}, weights=weights)
    table = output.table("confidence")
    assert table.columns[1:-1] == ["agreement", "jaccard", "embedding", "nli"]
    assert output.facts["missing"] == dict.fromkeys(weights, 0)
    assert output.facts["unanswered"] == 0
    found = (table["agreement"] + 2 * table["jaccard"] + table["embedding"] + table["nli"]) / 5
    np.testing.assert_allclose(table["confidence"], found)
    assert table["agreement"].equals(plain.table("confidence")["agreement"])
    # Contradictions: 0.1 with samples that agree, 0.7 on average with others, 0.6 or 0.8 by length.
    low, high = 0.9 * table["agreement"] + 0.2 * (1 - table["agreement"]), 0.9
    assert (table["nli"] >= low - 1e-6).all()
    assert (table["nli"] <= high + 1e-6).all()
    known = output.facts["calibration"]["auroc"]
    assert known["nli"]["value"] > 0.8
    again = sum("Proposed" not in t and "#### " not in t for t in run.engine.asked)
    assert again == draws, "samples were drawn again"


def test_reflection_alone_draws_no_samples(run, world):
    before = len(run.engine.asked)
    output = run(world, weights={"reflection": 1.0})
    assert len(run.engine.asked) == before  # its verdicts are facts by now
    assert output.table("confidence").columns == ["id", "reflection", "confidence"]
    assert output.facts["kept_by_level"] == {}


def test_a_second_question_is_a_second_turn(scripted, tokenizer, tmp_path):
    def votes(prompt, options):
        if AGAIN in prompt:
            assert options == ["A", "B", "C"]
            return scripted.logs(0.2, 0.2, 0.6)
        return scripted.logs(0.9, 0.1) if "right" in prompt else scripted.logs(0.3, 0.7)

    engine = scripted.Scripted("twice", tokenizer, votes=votes)
    recorder = Recorder(engine, ModelSpec("nowhere"), tmp_path)
    turns = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": ""}]
    asked = {"a": (turns, "right"), "b": (turns, "wrong")}
    once, failed = reflections(recorder, 0, asked)
    assert (once, failed) == ({"a": pytest.approx(0.9), "b": pytest.approx(0.3)}, {})
    assert not any(AGAIN in text for text in engine.asked)
    twice, failed = reflections(recorder, 0, asked, questions=2)
    # The second: 0.2 right, 0.2 wrong, 0.6 worth a half.
    assert (twice, failed) == ({"a": pytest.approx(0.7), "b": pytest.approx(0.4)}, {})
    second = [text for text in engine.asked if AGAIN in text]
    assert len(second) == 2
    assert len(engine.asked) == 4, "the first verdicts were asked again"
    for text in second:
        reply = "A" if "right" in text else "B"
        assert f"(B) no\nAnswer: {reply}<eos>" in text
        assert text.index("Proposed answer") < text.index(AGAIN)


def test_the_perplexity_part_is_the_mean_probability_of_a_token():
    first = pl.DataFrame({"id": ["a", "b"], "logprob_mean": [-0.5, 1e-12]})
    later = pl.DataFrame({"id": ["b", "c"], "logprob_mean": [-2.0, None]})
    tables = [SimpleNamespace(table=lambda name, t=t: t) for t in (None, first, later)]
    found = _likelihoods(SimpleNamespace(before=[(None, output) for output in tables]))
    assert found == {"a": pytest.approx(np.exp(-0.5)), "b": pytest.approx(np.exp(-2.0))}
    only = _likelihoods(SimpleNamespace(before=[(None, tables[1])]))
    assert only["b"] == 1.0


def test_weights_say_which_models_are_asked(tmp_path):
    def of(roles=None, **gate):
        recipe = recipe_of(tmp_path / "x.jsonl", tmp_path, roles, **gate)
        return models_used(recipe, recipe.stage("confidence"))

    # Rows without a final answer are held against their samples by an embedder or a cross-encoder.
    assert of() == ("sampler", "judge", "embedder")
    assert of({"nli": "cross"}) == ("sampler", "judge", "nli")
    assert of({"nli": "cross"}, similarity="off") == ("sampler", "judge")
    assert of({"nli": "cross"}, similarity="embedding") == ("sampler", "judge", "embedder")
    assert of(answers="exact") == ("sampler", "judge")
    assert of(weights={"agreement": 1}) == ("sampler", "judge")
    assert of(weights={"agreement": 1, "embedding": 1}) == ("sampler", "judge", "embedder")
    assert of({"nli": "cross"}, weights={"nli": 1, "embedding": 0}) == ("sampler", "judge", "nli")
    for nli in ({"weights": {"nli": 1}}, {"similarity": "nli"}):
        with pytest.raises(ValueError, match="roles have no nli: name the model"):
            of(**nli)
    with pytest.raises(ValueError, match=r"stages\.confidence: weights: no part 'jacard'"):
        of(weights={"jacard": 1})
    with pytest.raises(ValueError, match=r"stages\.confidence\.weights\.jaccard: expected float"):
        of(weights={"jaccard": "x"})
    with pytest.raises(ValueError, match="questions: 3 is not one of 1, 2"):
        of(questions=3)
    with pytest.raises(ValueError, match=r"stages\.confidence: weights name perplexity.*before it"):
        of(weights={"agreement": 1, "perplexity": 1})
    assert of(weights={"agreement": 1, "perplexity": 0}) == ("sampler", "judge")


def test_perplexity_needs_the_likelihood_stage_before_it(tmp_path):
    gate = {"confidence": {"weights": {"perplexity": 1}}}
    body = {
        "name": "sums",
        "pool": {"name": "sums", "inputs": [{"path": "x.jsonl"}]},
        "models": {"base": {"path": str(tmp_path)}},
        "budget": {"size": 10, "unit": "rows"},
    }
    made = parse({**body, "stages": ["likelihood", gate]})
    assert [stage.kind for stage in made.stages] == ["likelihood", "confidence"]
    with pytest.raises(ValueError, match="put likelihood before it"):
        parse({**body, "stages": [gate, "likelihood"]})


@pytest.mark.parametrize(
    "options",
    [Confidence(weight_consistency=1.0), Confidence(weights={"agreement": 1, "reflection": 0})],
    ids=["weight_consistency", "weights"],
)
def test_reflection_of_no_weight_needs_no_dev_set(options):
    recipe = SimpleNamespace(sets=SimpleNamespace(dev=()))
    context = SimpleNamespace(recipe=recipe, stage=SimpleNamespace(name="confidence"), emit=quiet)
    settled = _from_dev(context, options)
    assert settled.weights == options.weighing
    assert settled.facts["why_no_probability"] == "the recipe has no dev set"
    # Without dev the documented weights are used.
    told = _from_dev(context, Confidence()).weights
    assert told == BSDETECTOR | {"reflection": pytest.approx(0.3)}


# ---- instances for added rows ------------------------------------------------------------------


def adds(*rows):
    """A stage that keeps everything and adds rows."""

    def stage(context):
        results = []
        for bucket in context.buckets:
            here = [r for r in rows if bucket_of(r["id"], context.pool.buckets) == bucket]
            lines = [{**r, "parent_id": r["id"], "origin": context.stage.name} for r in here]
            ids = context.in_play(bucket)
            kept = decisions(ids, kept=[True] * len(ids))
            results.append(StageResult(kept, {}, pa.Table.from_pylist(lines, schema=ADDED)))
        return StageRun(results, {}, {})

    return stage


def test_an_instance_for_added_rows_asks_about_these_alone_by_its_own_line(
    scripted, tokenizer, tiny_model, tmp_path, monkeypatch
):
    def row(question, response):
        return make_row([message("user", question), message("assistant", response)])

    # The judge can't read what `correct` brings; nobody has to ask it.
    unfit = [row(f"What is {i} + 1?", "y" * 900) for i in range(90, 94)]
    fresh = [row(f"What is {i} + 2?", f"It makes {i + 2}.\n#### {i + 2}") for i in range(60, 72)]
    instead, real = {"correct": adds(*unfit), "s3ft": adds(*fresh)}, StageKind.runner
    monkeypatch.setattr(StageKind, "runner", lambda kind: instead.get(kind.name) or real(kind))
    engine = scripted.Scripted("base", tokenizer, votes=scripted.noisy_judge)
    monkeypatch.setattr(models, "_opened", lambda spec, head: engine)
    gate = {"weights": {"reflection": 1}, "reflection": "on", "threshold": "quantile"}
    stages = [
        {"confidence": {**gate, "cut": 0.2}},
        {"confidence": {**gate, "cut": 0.6, "name": "strict"}},
        "correct",
        "s3ft",
    ]
    pool = scripted.make_world(40).write(tmp_path / "in")
    recipe = recipe_of(pool, tiny_model, stages=stages, length=600)
    assert [s.name for s in recipe.stages][4:] == ["confidence_added", "strict_added"]
    workspace = Workspace(tmp_path)
    build(workspace, recipe, "sums", quiet)
    found = {s.name: run_stage(workspace, recipe, s.name, quiet)[0] for s in recipe.stages}
    assert not any("yyyy" in text for text in engine.asked)
    bounds = {name: found[name].facts["threshold"] for name in ("confidence", "strict")}
    assert bounds["confidence"] < bounds["strict"]
    before = set(found["strict"].all_decisions().filter(outcome=KEPT)["id"]) | {
        r["id"] for r in unfit
    }
    new = {r["id"] for r in fresh}
    for name in ("confidence", "strict"):
        output = found[f"{name}_added"]
        assert output.accounting.closes
        assert (output.accounting.failed, output.facts["threshold"]) == (0, bounds[name])
        table, decided = output.table("confidence"), output.all_decisions()
        assert set(table["id"]) == new
        assert set(decided["id"]) == before | new
        kept = set(decided.filter(outcome=KEPT)["id"])
        above = set(table.filter(pl.col("confidence") >= bounds[name])["id"])
        assert kept == before | above
        assert output.facts["below"] == len(new - above)
        new = above
    assert 0 < len(new) < len(fresh)


def test_a_part_that_got_no_answer_is_asked_for_again(
    scripted, tokenizer, tiny_model, tmp_path, monkeypatch
):
    engine = scripted.Scripted("base", tokenizer, scripted.noisy_sampler(0.6), scripted.noisy_judge)
    monkeypatch.setattr(models, "_opened", lambda spec, head: engine)
    world = scripted.make_world(20)
    lost, whole = world.rows[3]["response"], engine.embed

    def refuses(tokens):
        if any(lost in tokenizer.decode(row) for row in tokens):
            raise ValueError("not this one")
        return whole(tokens)

    engine.embed = refuses
    weights = {"agreement": 1, "embedding": 1}
    recipe = recipe_of(world.write(tmp_path / "in"), tiny_model, weights=weights)
    workspace = Workspace(tmp_path)
    build(workspace, recipe, "sums", quiet)
    output, _ = run_stage(workspace, recipe, "confidence", quiet)
    assert output.accounting.failed == 0
    assert output.facts["missing"]["embedding"] == output.facts["unanswered"] == 1
    assert run_stage(workspace, recipe, "confidence", quiet)[1]
    engine.embed = whole
    output, computed = run_stage(workspace, recipe, "confidence", quiet)
    assert (computed, output.facts["missing"]["embedding"]) == (True, 0)
    assert output.facts["unanswered"] == 0
    assert not run_stage(workspace, recipe, "confidence", quiet)[1]


@pytest.mark.parametrize("silent", ["one", "all"])
def test_a_row_without_a_verdict_is_judged_by_its_other_parts(
    scripted, tokenizer, tiny_model, tmp_path, monkeypatch, silent
):
    world = scripted.make_world(20)
    lost = world.rows[3]["question"]

    def votes(prompt, options):
        if not healed and (silent == "all" or lost in prompt):
            return [float("nan")] * len(options)
        return scripted.noisy_judge(prompt, options)

    healed = []
    engine = scripted.Scripted("base", tokenizer, scripted.noisy_sampler(0.6), votes)
    monkeypatch.setattr(models, "_opened", lambda spec, head: engine)
    weights = {"agreement": 1, "reflection": 1}
    recipe = recipe_of(world.write(tmp_path / "in"), tiny_model, weights=weights)
    workspace = Workspace(tmp_path)
    build(workspace, recipe, "sums", quiet)
    output, _ = run_stage(workspace, recipe, "confidence", quiet)
    if silent == "all":  # nothing is decided without the judge
        assert output.accounting.failed == 20
    else:
        assert output.accounting.failed == 0
        assert output.facts["missing"] == {"agreement": 0, "reflection": 1}
        assert output.facts["unanswered"] == 1
    healed.append(True)
    output, computed = run_stage(workspace, recipe, "confidence", quiet)
    assert (computed, output.accounting.failed, output.facts["unanswered"]) == (True, 0, 0)
    assert not run_stage(workspace, recipe, "confidence", quiet)[1]


def test_a_row_with_neither_a_verdict_nor_another_part_fails(
    scripted, tokenizer, tiny_model, tmp_path, monkeypatch
):
    world = scripted.make_world(20)
    lost = world.rows[3]["question"]

    def votes(prompt, options):
        dead = lost in prompt
        return [float("nan")] * len(options) if dead else scripted.noisy_judge(prompt, options)

    engine = scripted.Scripted("base", tokenizer, None, votes)
    monkeypatch.setattr(models, "_opened", lambda spec, head: engine)
    pool = world.write(tmp_path / "in")
    recipe = recipe_of(pool, tiny_model, weights={"reflection": 1})
    build(Workspace(tmp_path), recipe, "sums", quiet)
    output, _ = run_stage(Workspace(tmp_path), recipe, "confidence", quiet)
    assert output.accounting.failed == 1
    assert output.facts["unanswered"] == 0  # the row itself is tried again


def test_a_dev_verdict_that_got_no_answer_is_asked_for_again(
    scripted, tokenizer, tiny_model, tmp_path, monkeypatch
):
    world = scripted.make_world(40, referenced=1.0)
    dev = type(world)(world.rows[20:], world.swapped).write(tmp_path / "dev")
    pool = type(world)(world.rows[:20], world.swapped).write(tmp_path / "in")
    lost = world.rows[30]["question"]

    def votes(prompt, options):
        if lost in prompt and not healed:
            return [float("nan")] * len(options)
        return scripted.noisy_judge(prompt, options)

    healed = []
    engine = scripted.Scripted("base", tokenizer, scripted.noisy_sampler(0.5), votes)
    monkeypatch.setattr(models, "_opened", lambda spec, head: engine)
    spec = {"path": str(dev), "layout": "question_answer", "columns": COLUMNS}
    sets = {"dev": [{"name": "held", "inputs": [spec]}]}
    gate = [{"confidence": {"reflection": "auto"}}]
    recipe = recipe_of(pool, tiny_model, stages=gate, sets=sets)
    workspace = Workspace(tmp_path)
    for name in ("sums", "held"):
        build(workspace, recipe, name, quiet)
    output, _ = run_stage(workspace, recipe, "confidence", quiet)
    assert (output.facts["auroc_rows"], output.facts["unanswered"]) == (38, 2)  # two draws each
    healed.append(True)
    output, computed = run_stage(workspace, recipe, "confidence", quiet)
    assert (computed, output.facts["auroc_rows"], output.facts["unanswered"]) == (True, 40, 0)
    assert not run_stage(workspace, recipe, "confidence", quiet)[1]
    stage = Stage("confidence", "confidence", None, scope="added")
    facts = SimpleNamespace(facts={"unanswered": 2}, accounting=SimpleNamespace(failed=0))
    assert _notes([(stage, facts)], None) == (
        "confidence: 2 questions got no answer, asked again next run.",
    )


def test_canaries_are_judged_by_perplexity_too(scripted, tiny_model, tmp_path):
    stages = ["likelihood", {"confidence": {"weights": {"perplexity": 1}}}]
    pool = scripted.make_world(20).write(tmp_path / "in")
    recipe = recipe_of(pool, tiny_model, stages=stages, canaries={"per_kind": 3})
    workspace = Workspace(tmp_path)
    build(workspace, recipe, "sums", quiet)
    for stage in recipe.stages:
        output, _ = run_stage(workspace, recipe, stage.name, quiet)
    told = {line["kind"]: line for line in output.facts["canaries"]}
    assert told["swapped_answer"]["planted"] == 3
    assert [line["failed"] for line in told.values()] == [0] * len(told)
    planted = output.table("canaries")
    # A swapped answer may be likelier than the row's own, but it is not equally likely.
    real = dict(output.table("confidence").select("id", "confidence").iter_rows())
    swapped = planted.filter(kind="swapped_answer")
    assert swapped["value"].is_between(0, 1, closed="none").all()
    assert all(line["value"] != real[line["source_id"]] for line in swapped.to_dicts())


def test_reflection_off_leaves_the_other_parts():
    assert Confidence(reflection="off").weighing == {"agreement": 1.0}
    assert Confidence(reflection="off", weight_consistency=0.0).weighing == {"agreement": 1.0}
    more = Confidence(reflection="off", weights={"jaccard": 1, "agreement": 3, "reflection": 9})
    assert more.weighing == {"jaccard": 0.25, "agreement": 0.75}
    with pytest.raises(ValueError, match="reflection is the only part"):
        Confidence(reflection="off", weights={"reflection": 1})


# ---- confidence as a probability ---------------------------------------------------------------


@pytest.fixture
def judged(scripted, tokenizer, tiny_model, tmp_path, monkeypatch):
    """`judged(pool, dev, **gate)` is the output of the gate, and the recipe."""
    engine = scripted.Scripted("base", tokenizer, scripted.noisy_sampler(0.6), scripted.noisy_judge)
    monkeypatch.setattr(models, "_opened", lambda spec, head: engine)

    def made(pool, dev=None, **gate):
        sets = None
        if dev is not None:
            spec = {"path": str(dev.write(tmp_path / "dev")), "layout": "question_answer"}
            sets = {"dev": [{"name": "held", "inputs": [{**spec, "columns": COLUMNS}]}]}
        stages = [{"confidence": gate}]
        recipe = recipe_of(pool.write(tmp_path / "in"), tiny_model, stages=stages, sets=sets)
        workspace = Workspace(tmp_path)
        for name in ("sums", *(["held"] if dev is not None else [])):
            build(workspace, recipe, name, quiet)
        return run_stage(workspace, recipe, "confidence", quiet)[0], recipe

    return made


def split_world(scripted, pool, dev):
    """Rows of one world, the first for the pool and the others for dev."""
    world = scripted.make_world(pool + dev, referenced=1.0)
    kind = type(world)
    return kind(world.rows[:pool], world.swapped), kind(world.rows[pool:], world.swapped)


def notes_of(output, recipe):
    return _notes([(recipe.stage("confidence"), output)], None)


def test_a_cut_is_a_probability_where_dev_tells_right_from_wrong(judged, scripted):
    pool, dev = split_world(scripted, 60, 60)  # of 60 dev responses 12 belong to another question
    output, recipe = judged(pool, dev, cut=0.5)
    facts, table = output.facts, output.table("confidence")
    assert facts["confidence_is"] == "probability"
    assert (facts["dev"]["of"], facts["dev"]["known"]) == ("dev responses", 60)
    assert (facts["threshold"], facts["cut_as_quantile"], facts["vacuous"]) == (0.5, 0, False)
    # Another formula of the same parts: the model is scikit-learn's, not BSDetector's weights.
    mean = 0.7 * table["agreement"] + 0.3 * table["reflection"]
    assert (table["confidence"] - mean).abs().max() > 0.05
    assert (table["confidence_low"] <= table["confidence"]).all()
    assert (table["confidence"] <= table["confidence_high"]).all()
    by_prompt = {i[:20]: row["question"] for i, row in rows_by_id(pool).items()}
    wrong = np.array([by_prompt[i[:20]] in pool.swapped for i in table["id"]])
    kept = (table["confidence"] >= 0.5).to_numpy()
    decided = output.all_decisions()
    assert decided.filter(outcome=KEPT)["id"].to_list() == table["id"].filter(kept).to_list()
    expected = facts["expected"]
    for name, share in (
        ("wrong_before", wrong.mean()),
        ("wrong_kept", wrong[kept].mean()),
        ("right_lost", (~wrong & ~kept).sum() / (~wrong).sum()),
    ):
        line = expected[name]
        assert line["low"] - 0.05 <= share <= line["high"] + 0.05, name
    assert expected["wrong_kept"]["high"] < expected["wrong_before"]["value"]
    said = " ".join(notes_of(output, recipe))
    assert "learnt from 48 right and 12 wrong dev responses" in said
    assert "expected share of wrong rows" in said


@pytest.mark.parametrize("weights", [{}, {"agreement": 1.0}, {"jaccard": 1.0, "reflection": 3.0}])
def test_a_cut_means_the_same_whatever_parts_take_part(judged, scripted, weights):
    pool, dev = split_world(scripted, 60, 120)
    output, _ = judged(pool, dev, cut=0.5, weights=weights)
    table = output.table("confidence")
    by_prompt = {i[:20]: row["question"] for i, row in rows_by_id(pool).items()}
    right = np.array([by_prompt[i[:20]] not in pool.swapped for i in table["id"]])
    # On average a probability is the share that is right, whatever it is made of.
    assert table["confidence"].mean() == pytest.approx(right.mean(), abs=0.08)
    assert output.facts["dev"]["error"] < 0.15


def test_a_cut_that_dev_cannot_tell_is_a_quantile_and_counted(judged, scripted):
    pool, dev = split_world(scripted, 40, 20)
    output, recipe = judged(pool, dev, cut=0.25)
    # Of dev's own responses 4 are wrong, of 40 draws for its 20 prompts enough are both.
    assert output.facts["dev"]["of"] == "draws for dev prompts"
    few = type(dev)(dev.rows[:10], dev.swapped)
    for given, why in ((few, "where 10 of each are needed"), (None, "the recipe has no dev set")):
        output, recipe = judged(pool, given, cut=0.25, reflection="on")
        facts, table = output.facts, output.table("confidence")
        assert why in facts["why_no_probability"]
        assert (facts["confidence_is"], facts["vacuous"]) == ("weighted mean", False)
        mean = 0.7 * table["agreement"] + 0.3 * table["reflection"]
        np.testing.assert_allclose(table["confidence"], mean)
        assert output.accounting.removed == 10  # the lowest quarter of 40
        assert facts["cut_as_quantile"] == 40
        said = " ".join(notes_of(output, recipe))
        assert "the cut of 0.25 can't be told as a probability" in said
        assert f"because {facts['why_no_probability']}: it was the quantile" in said
        assert "for 40 rows" in said


def test_who_insists_on_the_weighted_mean_gets_it(judged, scripted):
    pool, dev = split_world(scripted, 20, 60)
    gate = {"join": "weights", "reflection": "off"}
    output, _ = judged(pool, dev, cut=0.5, **gate)
    assert output.facts["cut_as_quantile"] == 0
    table = output.table("confidence")
    assert table["confidence"].equals(table["agreement"].rename("confidence"))
    assert output.accounting.kept == table.filter(pl.col("agreement") >= 0.5).height
    clear, _ = judged(pool, dev, threshold="median", **gate)
    assert clear.facts["threshold"] == np.sort(table["agreement"])[10]


def test_a_response_without_a_final_answer_is_no_disagreement(judged, scripted):
    world = scripted.make_world(40, referenced=1.0)
    free = [{**r, "response": r["response"].split("\n")[0]} for r in world.rows[:6]]
    output, _ = judged(type(world)([*free, *world.rows[6:]], world.swapped), reflection="on")
    table, facts = output.table("confidence"), output.facts
    assert table.columns == ["id", "agreement", "embedding", "reflection", "confidence"]
    bare = table.filter(pl.col("agreement").is_null())
    assert bare.height == facts["missing"]["agreement"] == 6
    assert facts["missing"] == {"agreement": 6, "embedding": 0, "reflection": 0}
    assert facts["weights"]["embedding"] == facts["weights"]["agreement"] == 0.7
    expected = 0.7 * bare["embedding"] + 0.3 * bare["reflection"]
    np.testing.assert_allclose(bare["confidence"], expected)
    assert table.filter(pl.col("agreement").is_not_null())["embedding"].null_count() == 34
    # A cross-encoder that is not asked to stand in is not opened, and reflection is left alone.
    alone, _ = judged(
        type(world)([*free, *world.rows[6:]], world.swapped), reflection="on", similarity="off"
    )
    bare = alone.table("confidence").filter(pl.col("agreement").is_null())
    assert bare["confidence"].equals(bare["reflection"].rename("confidence"))


def test_a_gate_that_removes_nothing_says_so_and_is_not_vacuous(judged, scripted):
    pool, dev = split_world(scripted, 20, 60)
    output, recipe = judged(pool, dev, cut=0.0)
    assert (output.accounting.removed, output.facts["vacuous"]) == (0, False)
    said = " ".join(notes_of(output, recipe))
    assert "all 20 rows stay: none has a confidence below 0." in said
