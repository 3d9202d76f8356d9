"""The budget stage: exact budgets, best fit, quotas, shortfall, stability, and what was drawn."""

import dataclasses
import json
import math
from collections import Counter

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from siftline.assets.shared import build
from siftline.ingest.pool import Pool
from siftline.kernels.draws import largest_remainder, uniforms
from siftline.recipe.parse import parse
from siftline.rows.ledger import KEPT
from siftline.rows.schema import digest
from siftline.rows.selection import select
from siftline.scoring.measures.samples import seed_of
from siftline.stages import models
from siftline.stages.allocate import run as spend
from siftline.stages.allocate.decide import AIMED, COLUMNS, Allocate
from siftline.stages.rejection_sampling.difficulty import prop2diff
from siftline.stages.rejection_sampling.options import RejectionSampling
from siftline.stages.reporting import _notes
from siftline.stages.run import run_stage
from siftline.workspace import Workspace


def pool(n=300, answers=4, seed=0, clusters=6):
    """n prompts with 1 to `answers` answers each."""
    g = np.random.default_rng(seed)
    rows = []
    for i in range(n):
        prompt = digest("prompt", i)[:20]
        d = float(np.round(g.random(), 2))
        rows += [
            {
                "id": prompt + digest("row", j)[:20],
                "prompt_id": prompt,
                "cluster": int(prompt[:2], 16) % clusters,
                "difficulty": d,
                "n_tokens": int(g.integers(5, 200)),
                "logprob_mean": float(-g.random() * 3),
                "verified": True,
                "origin": "pool",
            }
            for j in range(int(g.integers(1, answers + 1)))
        ]
    return pl.DataFrame(rows, schema=COLUMNS)


def row(name, prompt="p", **changes):
    base = {
        "id": name,
        "prompt_id": prompt,
        "cluster": 0,
        "difficulty": 0.5,
        "n_tokens": 10,
        "logprob_mean": -1.0,
        "verified": None,
        "origin": "pool",
    }
    return base | changes


def frame(*rows):
    return pl.DataFrame(list(rows), schema=COLUMNS, orient="row")


def reasons(result):
    return dict(result.decisions.select("id", "reason").iter_rows())


def plain(rows, config):
    """The rule in plain Python: dictionaries and one loop over drawn prompts."""
    prompts = {}
    for r in rows:
        prompts.setdefault(r["prompt_id"], []).append(r)
    offers = {
        p: sorted(rs, key=lambda r: (-r["logprob_mean"], r["id"]))[: config.answers]
        for p, rs in prompts.items()
    }
    cluster = {p: rs[0]["cluster"] for p, rs in prompts.items()}
    names = sorted(set(cluster.values()))
    cost = (lambda r: 1) if config.unit == "rows" else (lambda r: r["n_tokens"])
    own = {c: [r for p, o in offers.items() if cluster[p] == c for r in o] for c in names}
    capacity = [sum(map(cost, own[c])) for c in names]
    weights = [
        config.answers * list(cluster.values()).count(c) * capacity[k] / len(own[c])
        for k, c in enumerate(names)
    ]
    quotas = largest_remainder(np.array(weights), config.size, np.array(capacity))
    quota = dict(zip(names, quotas.tolist(), strict=True))
    u = dict(zip(prompts, uniforms(config.seed, "allocate", list(prompts)), strict=True))
    order = [r for p in sorted(prompts, key=lambda p: (u[p], p)) for r in offers[p]]
    used, kept = Counter(), set()
    for r in order:
        used[r["cluster"]] += cost(r)
        if used[r["cluster"]] <= quota[r["cluster"]]:
            kept.add(r["id"])
    room = config.size - sum(cost(r) for r in order if r["id"] in kept)
    for r in order:
        if r["id"] not in kept and cost(r) <= room:
            kept.add(r["id"])
            room -= cost(r)
    return kept


@pytest.mark.parametrize("unit", ["rows", "loss_tokens"])
@pytest.mark.parametrize("answers", [1, 3])
def test_equals_the_rule_in_plain_python(unit, answers):
    table = pool(80)
    config = Allocate(60 if unit == "rows" else 4000, unit=unit, answers=answers, seed=4)
    assert set(select(config, table).kept) == plain(table.to_dicts(), config)


def test_rows_are_met_exactly_and_clusters_proportionally():
    result = select(Allocate(120, unit="rows"), pool())
    assert result.kept.len() == result.facts["spent"] == 120
    assert result.facts["shortfall"] == 0
    assert not result.vacuous
    clusters = result.tables["clusters"]
    assert (clusters["chosen"] == clusters["quota"]).all()
    assert (clusters["chosen"] - clusters["prompts"] * 120 / 300).abs().max() <= 1
    removed = result.removed.filter(pl.col("reason") == "over_budget")
    assert (removed["value"] > removed["threshold"]).all()


def test_best_fit_wins_inside_a_prompt_ties_by_id():
    table = frame(row("a", logprob_mean=-2.0), row("c"), row("b"), row("d", "q", logprob_mean=-9.0))
    result = select(Allocate(2, unit="rows"), table)
    # d is the worst of all rows but the only answer of its prompt: never compared across prompts.
    assert result.kept.to_list() == ["b", "d"]
    lost = {r["id"]: r for r in result.removed.iter_rows(named=True)}
    assert lost["a"]["reason"] == "not_best_fit"
    assert (lost["a"]["value"], lost["a"]["threshold"], lost["a"]["matched_id"]) == (
        -2.0,
        -1.0,
        "b",
    )


def test_only_verified_answers_compete_where_one_is():
    table = frame(
        row("a", verified=True, logprob_mean=-5.0),
        row("b", verified=None),
        row("c", verified=False),
        row("d", "q", verified=None),
    )
    result = select(Allocate(2, unit="rows"), table)
    assert reasons(result) == {"a": None, "b": "not_verified", "c": "not_verified", "d": None}


def test_own_samples_compete_only_when_asked():
    table = frame(
        row("a", logprob_mean=-3.0),
        row("b", origin="target", verified=True),
        row("c", "q", origin="sampler"),
    )
    assert reasons(select(Allocate(2, unit="rows"), table))["b"] == "own_sample_not_asked"
    assert "b" in select(Allocate(2, unit="rows", own_samples=True), table).kept


def test_targets_follow_difficulty():
    rows = []
    for i, d in enumerate([0.0, 0.25, 0.5, 0.75]):
        rows += [row(f"{i}{j}", f"p{i}", difficulty=d) for j in range(8)]
    config = Allocate(100, unit="rows", targets="prop2diff", answers=6, on_shortfall="smaller")
    kept = Counter(i[0] for i in select(config, frame(*rows)).kept)
    assert kept == {"0": 1, "1": 2, "2": 4, "3": 6}
    with pytest.raises(ValueError, match="no difficulty was measured"):
        select(config, frame(row("a", difficulty=None)))


def test_tokens_are_met_within_the_smallest_row_left():
    for size in (500, 2000, 9001):
        table = pool()
        result = select(Allocate(size, answers=2), table)
        kept = table.filter(pl.col("id").is_in(result.kept.to_list()))
        assert kept["n_tokens"].sum() == result.facts["spent"] <= size
        left = table.filter(
            pl.col("id").is_in(
                result.removed.filter(pl.col("reason") == "over_budget")["id"].to_list()
            )
        )
        assert left["n_tokens"].min() > size - result.facts["spent"]


def test_what_quotas_leave_over_buys_a_row_that_just_fits():
    table = frame(*(row(f"{c}{i}", f"{c}{i}", cluster=c) for c in (0, 1) for i in range(5)))
    result = select(Allocate(30), table)  # two quotas of 15 buy one row of 10 each
    assert result.facts["spent"] == 30
    assert result.facts["filled_past_quota"] == 1


def test_shortfall_is_an_error_or_reported_by_cluster_and_level():
    table = frame(
        row("a"), row("b", "q", cluster=1, difficulty=0.9), row("c", "r", cluster=1, verified=False)
    )
    with pytest.raises(
        ValueError, match=r"5 rows is short by 3: 2 rows on offer .*cluster 1, level"
    ):
        select(Allocate(5, unit="rows"), table)
    result = select(Allocate(5, unit="rows", on_shortfall="smaller"), table)
    assert result.kept.to_list() == ["a", "b"]
    assert result.facts["shortfall"] == 3
    levels = result.tables["levels"].select("cluster", "level", "wanted", "offered", "missing")
    assert levels.rows() == [(0, 3, 1, 1, 0), (1, 3, 1, 0, 1), (1, 5, 1, 1, 0)]
    assert result.tables["clusters"]["shortfall"].to_list() == [1, 2]
    empty = select(Allocate(5, on_shortfall="smaller"), frame())
    assert empty.facts["shortfall"] == 5
    with pytest.raises(ValueError, match="no prompt came in"):
        select(Allocate(5), frame())


def test_what_a_poor_cluster_cannot_use_goes_to_the_others():
    rows = [row(f"a{i}", f"a{i}", cluster=0) for i in range(2)]
    rows += [row(f"b{i}", f"b{i}", cluster=1) for i in range(20)]
    result = select(Allocate(12, unit="rows", quota="equal"), frame(*rows))
    assert result.tables["clusters"]["chosen"].to_list() == [2, 10]
    assert result.tables["clusters"]["shortfall"].to_list() == [4, 0]


def test_everything_fits_is_vacuous():
    table = frame(row("a"), row("b", "q"))
    assert select(Allocate(20), table).vacuous
    assert not select(Allocate(10), table).vacuous


def test_a_budget_below_every_row_is_refused():
    with pytest.raises(ValueError, match=r"below the shortest answer on offer \(10\)"):
        select(Allocate(9), frame(row("a"), row("b", "q")))


@pytest.mark.parametrize("fit", ["likelihood", "random"])
def test_shuffled_split_input_gives_the_same_bytes(fit):
    table = pool()
    selector = Allocate(6000, answers=2, targets="prop2diff", fit=fit, seed=9)
    whole = select(selector, table)
    shuffled = table.sample(fraction=1, shuffle=True, seed=2)
    low = pl.col("prompt_id") < "6"
    parts = [shuffled.filter(~low), shuffled.filter(low), shuffled[:0]]
    plan = selector.decide([selector.summarise(part) for part in parts])
    pieces = [selector.apply(part, plan) for part in parts]
    assert pl.concat([p.decisions for p in pieces]).sort("id").equals(whole.decisions)
    assert pieces[0].facts == whole.facts
    assert all(pieces[1].tables[name].equals(whole.tables[name]) for name in whole.tables)


@pytest.mark.parametrize(("unit", "size"), [("rows", 1000), ("loss_tokens", 100_000)])
def test_one_percent_more_prompts_changes_about_one_percent(unit, size):
    config = Allocate(size, unit=unit, answers=2)
    table = pool(4040, seed=3)
    first = pool(4000, seed=3)
    assert first.equals(table[: first.height])
    before, after = set(select(config, first).kept), set(select(config, table).kept)
    assert len(before - after) / len(before) < 0.025


def test_random_fit_needs_no_likelihood_and_differs():
    table = pool(400, answers=4)
    bare = table.with_columns(logprob_mean=pl.lit(None, dtype=pl.Float64))
    drawn = set(select(Allocate(400, unit="rows", fit="random"), bare).kept)
    best = set(select(Allocate(400, unit="rows"), table).kept)
    assert 0.3 < len(drawn & best) / 400 < 0.8
    with pytest.raises(ValueError, match="no finite logprob_mean"):
        select(Allocate(400, unit="rows"), bare)


def test_bad_input_is_refused():
    for bad, match in (
        (frame(row("a"), row("a")), "comes twice"),
        (frame(row("a", n_tokens=0)), "no count of loss tokens"),
        (frame(row("a", origin="moon")), "an origin not in"),
        (frame(row("a"), row("b", cluster=1)), "more than one cluster, first p"),
        (frame(row("a"), row("b", difficulty=0.1)), "more than one difficulty"),
    ):
        with pytest.raises(ValueError, match=match):
            select(Allocate(1, unit="rows"), bad)
    for bad in ({"size": 0}, {"size": 1, "unit": "bytes"}, {"size": 1, "answers": 0}):
        with pytest.raises(ValueError, match=list(bad)[-1]):
            Allocate(**bad)


rows_strategy = st.lists(
    st.tuples(
        st.integers(0, 6),
        st.integers(1, 30),
        st.sampled_from([-1.0, -2.0, -3.0]),
        st.sampled_from([True, False, None]),
        st.sampled_from(["pool", "sampler", "target"]),
    ),
    max_size=40,
)


@settings(max_examples=150, deadline=None)
@given(
    rows_strategy,
    st.integers(30, 400),
    st.sampled_from(["rows", "loss_tokens"]),
    st.integers(1, 3),
    st.sampled_from(["uniform", "prop2diff"]),
)
def test_every_row_is_decided_once_and_budget_and_targets_hold(data, size, unit, answers, targets):
    table = frame(
        *(
            row(
                f"{i:03d}",
                f"p{p}",
                cluster=p % 3,
                difficulty=p / 6,
                n_tokens=n,
                logprob_mean=fit,
                verified=v,
                origin=o,
            )
            for i, (p, n, fit, v, o) in enumerate(data)
        )
    )
    config = Allocate(size, unit=unit, answers=answers, targets=targets, on_shortfall="smaller")
    result = select(config, table)
    assert result.decisions["id"].to_list() == table["id"].to_list()
    kept = table.filter(pl.col("id").is_in(result.kept.to_list()))
    total = kept.height if unit == "rows" else kept["n_tokens"].sum()
    assert total == result.facts["spent"] <= size
    left = result.removed.filter(pl.col("reason") == "over_budget")["id"].to_list()
    waiting = table.filter(pl.col("id").is_in(left))
    if unit == "rows":
        assert waiting.is_empty() or total == size
    else:
        assert waiting.is_empty() or waiting["n_tokens"].min() > size - total
    assert (result.facts["shortfall"] > 0) == (waiting.is_empty() and total < size)
    assert all(len(g) <= answers for _, g in kept.group_by("prompt_id"))
    assert not (kept["origin"] == "target").any()
    assert not (kept["verified"] == False).any()  # noqa: E712
    matched = result.removed["matched_id"].drop_nulls()
    assert set(matched) <= set(result.kept)
    assert result.tables["levels"]["chosen"].sum() == kept.height


# ---- what a sampling stage drew ----------------------------------------------------------------


def drawing(*stages, roles=None, folder="x", size=1000, pool="x.jsonl"):
    columns = {"question": "question", "response": "response", "answer": "answer"}
    source = {"path": str(pool), "layout": "question_answer", "columns": columns}
    model = {"path": str(folder), "max_length": 512, "device": "cpu"}
    return parse(
        {
            "name": "r",
            "pool": {"name": "p", "buckets": 2, "inputs": [source]},
            "models": {"base": model, "big": {**model, "path": f"{folder}/big"}},
            "roles": {"target": "base", **(roles or {})},
            "stages": list(stages),
            "budget": {"size": size, "unit": "rows", "on_shortfall": "smaller"},
        }
    )


SAMPLE = "rejection_sampling"


def taken(*stages, **more):
    o = drawing(*stages, **more).stages[-1].options
    return o.targets, o.answers, o.max_quantile, o.own_samples


def test_the_budget_takes_targets_answers_and_quantile_from_the_draws():
    drawn = RejectionSampling()
    assert taken(SAMPLE, "allocate") == ("prop2diff", drawn.k, drawn.max_quantile, True)
    default = {f.name: f.default for f in dataclasses.fields(Allocate)}
    assert default["max_quantile"] == drawn.max_quantile  # one default, wherever targets are set
    rs = {SAMPLE: {"target": "uniform", "k": 7, "max_quantile": 0.9}}
    assert taken(rs, "allocate") == ("uniform", 7, 0.9, True)
    assert taken(rs, {"allocate": {"targets": "prop2diff", "answers": 9}})[:2] == ("prop2diff", 9)
    assert taken({SAMPLE: {"target": "vanilla", "k": 6}}, "allocate")[:2] == ("uniform", 6)
    more = {SAMPLE: {"name": "more", "k": 2}}
    assert taken(SAMPLE, more, "allocate")[:2] == ("prop2diff", 6)
    assert taken("duplicates", "allocate") == ("uniform", 1, drawn.max_quantile, False)


@pytest.mark.parametrize(
    ("stages", "says"),
    [
        ((SAMPLE, {"allocate": {"own_samples": False}}), r"own_samples is off.*leave own_samples"),
        (
            (SAMPLE, {"allocate": {"answers": 1}}),
            r"answers is 1.*leave answers out, or set.*k to 1",
        ),
        ((SAMPLE, {"allocate": {"mixture": {"web": 1}}}), "mixture leaves out 'sampler'"),
        ((SAMPLE, {"allocate": {"mixture": {"*": 1, "sampler": 0}}}), "mixture leaves out"),
        (("s3ft", {"allocate": {"mixture": {"web": 1}}}), "mixture leaves out 'self'"),
        (
            ("confidence", "correct", {"allocate": {"mixture": {"web": 1}}}),
            "mixture leaves out 'corrected'",
        ),
        (
            ({SAMPLE: {"target": "uniform"}}, {"allocate": {"answers": 2, "fit": "random"}}),
            "answers is 2 of the 4",
        ),
        (({"allocate": {"targets": "scores"}},), "none comes before"),
        ((SAMPLE, {"allocate": {"max_quantile": 0}}), "max_quantile is 0.0"),
        (({SAMPLE: {"max_quantile": 1.5}}, "allocate"), "max_quantile is 1.5"),
    ],
)
def test_draws_that_no_stage_can_use_are_refused_when_the_recipe_is_read(stages, says):
    with pytest.raises(ValueError, match=rf"^stages\.[^\n]*{says}[^\n]*$"):
        drawing(*stages)


def test_draws_that_can_be_used_are_not_refused():
    # Another model's draws are no own samples; k draws may compete for fewer places (GRAPE).
    assert not taken(SAMPLE, {"allocate": {"own_samples": False}}, roles={"sampler": "big"})[3]
    best = {"allocate": {"answers": 1}}
    assert taken({SAMPLE: {"target": "uniform"}}, best)[:2] == ("uniform", 1)
    assert taken(SAMPLE, {"allocate": {"mixture": {"web": 1, "*": 1}}})[1] == 4


@pytest.fixture
def chain(scripted, tokenizer, tiny_model, tmp_path, monkeypatch):
    """`chain(*stages)`: 24 sums that the model gets right with three probabilities."""
    rates = (1.0, 0.6, 0.25)
    sums = [(3 + 7 * i, 5 + 11 * i) for i in range(24)]

    def solves(value, seed):
        return float(uniforms(seed, "draw", [str(value)])[0]) < rates[value // 18 % 3]

    def says(prompt, seed):
        value = scripted.truth(prompt)
        right = solves(value, seed)
        return f"By way {seed % 9973} it is {value + (not right)}.\n#### {value + (not right)}"

    def scored(context):
        """Draws are likelier than the pool's rows, as a model's own are."""
        frames = []
        for bucket in context.buckets:
            rows = context.rows(bucket).select(["id", "origin"]).to_pylist()
            lines = [
                {"id": r["id"], "n_tokens": 5, "logprob_mean": -0.1 if r["origin"] else -2.0}
                for r in rows
            ]
            frames.append(pl.DataFrame(lines))
        return frames, {}

    engine = scripted.Scripted("base", tokenizer, says)
    monkeypatch.setattr(models, "_opened", lambda spec, head: engine)
    monkeypatch.setattr(spend, "likelihoods", scored)
    pool = tmp_path / "pool.jsonl"
    lines = [
        {"question": f"What is {a} + {b}?", "response": f"#### {a + b}", "answer": str(a + b)}
        for a, b in sums
    ]
    pool.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")

    def made(*stages, **more):
        recipe = drawing(*stages, folder=tiny_model, pool=pool, **more)
        workspace = Workspace(tmp_path / "root")
        build(workspace, recipe, "p", lambda line: None)
        done = [run_stage(workspace, recipe, s.name, lambda line: None)[0] for s in recipe.stages]
        return recipe, done[-1], done[0].table("difficulty")

    def darts(k):
        """Targets by prompt id: the formula on four pilot draws, apart from the stage."""
        rows = Pool(Workspace(tmp_path / "root").pool("p")).all_rows(["prompt_id", "answer"])
        fails = {
            row["prompt_id"]: sum(
                not solves(int(row["answer"]), seed_of(0, row["prompt_id"], j)) for j in range(4)
            )
            for row in rows.to_pylist()
        }
        hardest = max(n for n in fails.values() if n < 4)
        return {p: max(1, min(k, math.ceil(k * n / hardest))) for p, n in fails.items()}

    made.darts = darts
    return made


def kept_of(output):
    kept = output.all_decisions().filter(outcome=KEPT)
    return dict(kept.group_by(pl.col("id").str.slice(0, 20)).agg(pl.len()).iter_rows())


def test_the_default_chain_keeps_the_verified_draws_in_darts_proportions(chain):
    recipe, output, difficulty = chain({SAMPLE: {"max_new_tokens": 40}}, "allocate")
    kept, drawn = kept_of(output), dict(difficulty.select("prompt_id", "n_distinct").iter_rows())
    target = dict(difficulty.select("prompt_id", "target").iter_rows())
    assert target == chain.darts(4)
    assert len(set(target.values())) >= 3
    # Every prompt has what was drawn for it, as far as it was found; its pool row fills a gap.
    assert kept == {p: min(t, drawn[p] + 1) for p, t in target.items()}
    draws = output.facts["draws"]
    assert draws["kept"] == sum(min(t, drawn[p]) for p, t in target.items())
    assert draws["kept"] == draws["offered"] > 24
    said = " ".join(_notes([(recipe.stage("allocate"), output)], None))
    assert f"allocate: kept {draws['kept']} of {draws['offered']} draws." in said


def test_who_says_otherwise_gets_otherwise(chain):
    sampling = {SAMPLE: {"max_new_tokens": 40, "target": "uniform"}}
    _, output, _ = chain(sampling, {"allocate": {"answers": 1}})
    assert set(kept_of(output).values()) == {1}
    draws = output.facts["draws"]
    assert draws["removed"] == {"not_best_fit": draws["offered"] - draws["kept"]}
    recipe, output, _ = chain(sampling, "allocate", size=30)
    assert (output.accounting.kept, output.facts["spent"]) == (30, 30)
    assert "over_budget" in " ".join(_notes([(recipe.stage("allocate"), output)], None))


def test_what_was_drawn_for_is_the_target_whatever_difficulty_says():
    table = pool(40, answers=6)
    targets = {p: i % 4 for i, p in enumerate(sorted(table["prompt_id"].unique()))}
    aimed = pl.col("prompt_id").replace_strict(targets, return_dtype=pl.Int64)
    drawn = table.with_columns(pl.when(aimed < 3).then(aimed).alias(AIMED))
    config = Allocate(1000, unit="rows", targets="prop2diff", answers=6, on_shortfall="smaller")
    kept = Counter(i[:20] for i in select(config, drawn).kept)
    have = dict(table.group_by("prompt_id").agg(pl.len()).iter_rows())
    of = dict(table.select("prompt_id", "difficulty").iter_rows())
    rule = dict(zip(of, prop2diff(np.array(list(of.values())), 6), strict=True))
    for prompt, t in targets.items():
        wanted = max(t, 1) if t < 3 else rule[prompt]
        assert kept[prompt] == min(wanted, have[prompt]), (t, prompt)
    # Split and shuffled input gives the same, as without.
    low = pl.col("prompt_id") < "8"
    parts = [drawn.reverse().filter(low), drawn.filter(~low)]
    plan = config.decide([config.summarise(part) for part in parts])
    again = pl.concat([config.apply(part, plan).decisions for part in parts]).sort("id")
    assert again.equals(select(config, drawn).decisions)


def test_a_higher_quantile_is_a_lower_target():
    table = pool(400, answers=6)
    asked = {"unit": "rows", "targets": "prop2diff", "answers": 6, "on_shortfall": "smaller"}
    wide, narrow = (Allocate(5000, max_quantile=q, **asked) for q in (1.0, 0.5))
    more, fewer = (select(c, table).kept.len() for c in (narrow, wide))
    assert more > fewer
