"""Quality scorers in the chain: tables of the pool, weights of the shortlist, published columns."""

import json
import shutil

import dagster as dg
import polars as pl
import pytest

from siftline import scoring as versions
from siftline.assets.shared import score
from siftline.ingest.pool import Pool
from siftline.recipe.parse import load
from siftline.rows.curated import resolve_latest
from siftline.scoring.measures import likelihood
from siftline.stages.models import engines, named_spec
from siftline.stages.scorers import prompt_weights, quality, score_quality, scorer_table
from siftline.stages.scores import likelihood_table
from siftline.workspace import Workspace

BRIEF = "scorers.brief={kind: function, path: 'mini_inputs:brevity'}"
TEXT = "'{prompt} {response} Is it right, from 1 to 3?'"
RUBRIC = f"scorers.rated={{kind: rubric, model: tiny, rubric: {TEXT}, scale: [1, 3]}}"


def quiet(line): ...


def scored(root, recipe, name, **options):
    with engines() as opened:
        return score_quality(Workspace(root), recipe, name, opened, quiet, **options)


def frame_of(root, recipe, name):
    read = scorer_table(Workspace(root), recipe, name).reader()
    assert read is not None
    buckets = Pool(Workspace(root).pool(recipe.pool.name)).buckets
    return pl.concat([read(bucket) for bucket in range(buckets)])


@pytest.fixture(scope="module")
def copied(finished, mini_tools, tmp_path_factory):
    """The finished root without what a stage decided."""
    root = tmp_path_factory.mktemp("quality") / "root"
    return mini_tools.copy_root(finished.root, root, "inputs", "models", "pool", "store", "scores")


@pytest.fixture
def root(copied, tmp_path):
    shutil.copytree(copied, tmp_path / "root", symlinks=True)
    return tmp_path / "root"


def test_a_function_scores_every_row_and_a_second_run_none(root, mini):
    recipe, observed = mini(BRIEF), {}
    first = scored(root, recipe, "brief", observe=observed.__setitem__)
    rows = Pool(Workspace(root).pool("mini")).all_rows(["id", "messages"]).to_pylist()
    expected = {row["id"]: 1 / (1 + len(row["messages"][-1]["content"])) for row in rows}
    assert dict(frame_of(root, recipe, "brief").iter_rows()) == expected
    assert first.fresh
    assert sum(n["scored"] for n in observed.values()) == len(rows)
    again = scored(root, recipe, "brief")
    assert not again.fresh
    assert again.manifest.version == first.manifest.version


def test_rows_without_a_score_fail_with_their_reason_and_are_tried_again(root, mini):
    recipe = mini("scorers.brief={kind: function, path: 'mini_inputs:brevity', args: {least: 25}}")
    first = scored(root, recipe, "brief")
    assert first.manifest.info["failed"] > 0
    assert scored(root, recipe, "brief").fresh


def test_a_changed_option_meets_no_old_table(root, mini):
    scored(root, mini(BRIEF), "brief")
    other = mini("scorers.brief={kind: function, path: 'mini_inputs:brevity', args: {least: 1}}")
    assert scorer_table(Workspace(root), other, "brief").reader() is None


def test_a_function_counts_by_its_source(root, mini, tmp_path, monkeypatch):
    source = "def length(rows):\n    return [float(len(row['id'])) for row in rows]\n"
    (tmp_path / "own_lengths.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    recipe = mini("scorers.own={kind: function, path: 'own_lengths:length'}")
    assert scored(root, recipe, "own").fresh
    assert not scored(root, recipe, "own").fresh
    (tmp_path / "own_lengths.py").write_text(source.replace("row in", "row in  "))
    assert scored(root, recipe, "own").fresh


def test_tables_go_stale_with_the_versions_of_what_made_them(root, mini, monkeypatch):
    recipe, workspace = mini(BRIEF, RUBRIC), Workspace(root)
    spec = named_spec(workspace, recipe, "tiny")
    pool = Pool(workspace.pool("mini"))

    def made_of():
        table = likelihood_table(root, pool, spec, recipe.likelihood)
        return [dict(table.inputs), dict(scorer_table(workspace, recipe, "rated").inputs)]

    seen = [made_of()]
    monkeypatch.setattr(likelihood, "VERSION", 100)
    seen.append(made_of())
    monkeypatch.setitem(versions.ENGINES, "transformers", {"scores": 100})
    seen.append(made_of())
    assert seen[0][0] != seen[1][0] != seen[2][0]
    assert seen[0][1] == seen[1][1] != seen[2][1]


def test_rows_that_no_question_is_asked_for_count_as_done(root, mini):
    recipe, said = mini("models.tiny.max_length=90"), []
    manifest, fresh = score(Workspace(root), recipe, said.append)
    rows = Pool(Workspace(root).pool("mini")).manifest.rows("rows")
    assert fresh
    assert 0 < manifest.info["failed"] < rows
    assert said[-1].startswith(f"likelihood {2 * rows:,} forward rows in")


def test_a_file_counts_by_its_content(root, mini, tmp_path):
    ids = Pool(Workspace(root).pool("mini")).all_rows(["id"]).column("id").to_pylist()
    file = tmp_path / "scores.parquet"
    pl.DataFrame({"id": ids, "stars": [float(i) for i in range(len(ids))]}).write_parquet(file)
    recipe = mini(f"scorers.stars={{kind: column, column: stars, path: '{file}'}}")
    first = scored(root, recipe, "stars")
    moved = tmp_path / "elsewhere.parquet"
    file.rename(moved)
    same = mini(f"scorers.stars={{kind: column, column: stars, path: '{moved}'}}")
    assert scorer_table(Workspace(root), same, "stars").found() is not None
    pl.DataFrame({"id": ids, "stars": [0.5] * len(ids)}).write_parquet(moved)
    changed = scored(root, same, "stars")
    assert changed.fresh
    assert changed.manifest.version != first.manifest.version


def test_a_rubric_asks_the_judge_once_a_prompt_and_stays_within_its_scale(root, mini, forwards):
    recipe = mini(RUBRIC)
    first = scored(root, recipe, "rated")
    assert forwards["choices"] == first.manifest.info["computed"] > 0
    values = frame_of(root, recipe, "rated")
    assert values["value"].is_between(1, 3).all()
    assert values["value"].n_unique() > 10
    (Workspace(root).scores("mini", "tiny", "rated") / "manifest.json").unlink()
    forwards.clear()
    again = scored(root, recipe, "rated")
    assert forwards == {}, "found in the store"
    assert again.manifest.version == first.manifest.version


def test_weights_steer_the_shortlist_and_columns_are_published(root, mini, mini_tools):
    recipe = mini(BRIEF, "stages.diversity.weight=brief", "stages.diversity.size=30")
    with pytest.raises(
        ValueError, match=r"no scores of 'brief'.*materialize scores/mini/rows/brief"
    ):
        mini_tools.run_chain(root, recipe)
    scored(root, recipe, "brief")
    mini_tools.run_chain(root, recipe)
    from siftline.stages.publish import final_context
    from siftline.stages.run import outputs

    done = outputs(Workspace(root), recipe)
    context = final_context(Workspace(root), recipe, done[:5])
    weights = prompt_weights(context, "brief")
    assert weights["weight"].is_between(0, 1).all()
    table = done[4][1].table("clusters")
    assert table is not None
    before = final_context(Workspace(root), recipe, done[:4])
    everyone = prompt_weights(before, "brief")
    assert weights.height == 30 < everyone.height
    ranked = everyone.with_columns(kept=pl.col("prompt_id").is_in(weights["prompt_id"].to_list()))
    means = dict(ranked.group_by("kept").agg(pl.col("weight").mean()).iter_rows())
    assert means[True] > means[False] + 0.05, "short answers were asked for"
    folder = resolve_latest(Workspace(root).curated("mini"))
    published = pl.read_parquet(folder / "data" / "*.parquet")
    known = dict(quality(final_context(Workspace(root), recipe, done), "brief").iter_rows())
    for line in published.select("id", "sift_origin", "sift_score_brief").to_dicts():
        assert line["sift_score_brief"] == known.get(line["id"])
        assert (line["sift_score_brief"] is None) == (line["sift_origin"] is not None)
    assert r"sift\_score\_brief" in (folder / "README.md").read_text()


def test_what_a_tuned_model_finds_new_is_clustered_and_named_in_the_report(
    root, mini, mini_tools, tmp_path
):
    """The tuned model likes one planted word; the rows that have it are the newest."""
    from safetensors.torch import load_file, save_file
    from transformers import AutoTokenizer

    from siftline.stages.publish import final_context
    from siftline.stages.reporting import novelty
    from siftline.stages.run import outputs

    recipe = mini()
    mini_tools.run_chain(root, recipe)
    base = next((root / "models").glob("tiny-*"))
    tuned = tmp_path / "tuned"
    shutil.copytree(base, tuned, ignore=shutil.ignore_patterns("siftline-files.json"))
    weights = load_file(tuned / "model.safetensors")
    name = next(k for k in ("lm_head.weight", "model.embed_tokens.weight") if k in weights)
    sign = AutoTokenizer.from_pretrained(tuned).convert_tokens_to_ids("*")
    weights[name] = weights[name].clone()
    weights[name][sign] *= 3
    save_file(weights, tuned / "model.safetensors", metadata={"format": "pt"})
    contrast = mini(
        f"models.tuned={{path: '{tuned}', max_length: 384}}",
        "roles={target: tiny}",
        "scorers.novel={kind: contrast, model: tuned, reference: tiny}",
    )
    said = []
    with engines() as opened:
        score_quality(Workspace(root), contrast, "novel", opened, said.append)
    questions = 4 * Pool(Workspace(root).pool("mini")).manifest.rows("rows")
    assert said[-1].startswith(f"novel {questions:,} forward rows in")
    table = frame_of(root, contrast, "novel")
    difference = table["logprob_mean"] - table["logprob_mean_reference"]
    assert (table["value"] - difference).abs().max() < 1e-9
    context = final_context(Workspace(root), contrast, outputs(Workspace(root), contrast))
    clusters = novelty(context)
    assert clusters is not None
    assert clusters["rows"].sum() == 20
    assert clusters["contrast"].is_sorted(descending=True) or clusters.height > 1
    assert all(name for name in clusters["name"].to_list())


def test_definitions_have_an_asset_for_each_scorer_with_a_blocking_check(mini_tools, tmp_path):
    from siftline.assets import step as keys
    from siftline.assets.outcome import curated_asset
    from siftline.assets.shared import likelihood_asset, scorer_asset
    from siftline.assets.stages import stage_asset

    recipe = load(mini_tools.RECIPES / "mini.yaml", [BRIEF, "stages.diversity.weight=brief"])
    key = keys.scorer(recipe, "brief")
    assert key == dg.AssetKey(["scores", "mini", "rows", "brief"])
    for asset in (scorer_asset(recipe, "brief"), likelihood_asset(recipe)):
        (check,) = asset.check_specs
        assert (check.name, check.blocking) == ("failed_rows", True)
    shortlist = stage_asset(recipe, recipe.stage("diversity"))
    assert key in shortlist.dependency_keys
    assert key in curated_asset(recipe).dependency_keys


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("scorers.x={kind: rewrad, model: tiny}", "did you mean 'reward'"),
        ("scorers.x={kind: reward, model: tinny}", "no model 'tinny': did you mean 'tiny'"),
        ("scorers.likelihood={kind: reward, model: tiny}", "likelihood and uniform are taken"),
        ("scorers.x={kind: rubric, model: tiny, scale: [1]}", "scorers.x"),
        ("stages.diversity.weight=quality", "no scorer 'quality'"),
        ("likelihood.turns=both", "'both' is not one of"),
        ("likelihood.details=[entropie]", "entropie"),
    ],
)
def test_a_wrong_scorer_is_one_line_that_says_what_instead(mini, change, said):
    with pytest.raises(ValueError, match=r"^mini\.yaml: ") as error:
        mini(change)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_details_asked_for_in_a_recipe_stand_in_the_table(root, mini):
    from siftline.assets.shared import score

    plain, _ = score(Workspace(root), mini(), quiet)
    recipe = mini("likelihood.details=[entropy, top1]")
    manifest, fresh = score(Workspace(root), recipe, quiet)
    assert fresh
    part = next(p for p in manifest.parts if p.table == "scores")
    frame = pl.read_parquet(Workspace(root).scores("mini", "tiny", "likelihood") / part.file)
    assert frame["entropy_mean"].is_between(0, 6).all()
    assert frame["top1_rate"].is_between(0, 1).all()
    assert frame["pooled"].is_null().all()
    assert manifest.info["scored"] == plain.info["scored"]
    assert json.dumps(manifest.info["inputs"]).count("entropy") == 1


@pytest.mark.parametrize(("bound", "green"), [(0.0, False), (0.9, True)])
def test_rows_that_always_fail_turn_the_run_red_above_the_rate(root, mini, bound, green, tmp_path):
    from siftline.assets.shared import scorer_asset
    from siftline.assets.step import Siftline

    config = "scorers.brief={kind: function, path: 'mini_inputs:brevity', args: {least: 25}}"
    changes = [config, f"bounds.max_failed={bound}"]
    result = dg.materialize(
        [scorer_asset(mini(*changes), "brief")],
        resources={"siftline": Siftline(root=str(root), overrides=changes)},
        raise_on_error=False,
    )
    assert result.success is green
    (check,) = result.get_asset_check_evaluations()
    assert check.passed is green
    assert check.metadata["share"].value > 0
    (made,) = result.get_asset_materialization_events()
    metadata = made.materialization.metadata
    assert metadata["failed_reasons"].value == {"no_score": metadata["failed"].value}


def test_every_finished_bucket_is_an_observation_of_the_score_table(finished):
    """Written by the real run's step process into the real instance."""
    with dg.DagsterInstance.from_config(str(finished.root / ".dagster")) as instance:
        key = dg.AssetKey(["scores", "mini", "tiny", "likelihood"])
        records = instance.fetch_observations(key, limit=100).records
    shown = [record.asset_observation.metadata for record in records]
    assert len({m["bucket"].value for m in shown}) == len(shown) > 4
    rows = Pool(Workspace(finished.root).pool("mini")).manifest.rows("rows")
    assert sum(m["scored"].value + m["failed"].value for m in shown) == rows
    assert max(m["rows_so_far"].value for m in shown) == rows
