"""The curated version: rows that every stage kept, with their scores and the whole ledger.

Preference pairs and verifiable prompts: from the draws of rejection sampling, and from labels.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from siftline import __version__
from siftline.ingest.pool import PROVENANCE, REJECTED, Pool
from siftline.kernels.draws import uniforms
from siftline.recipe.kinds import Stage
from siftline.recipe.parse import Recipe
from siftline.rows import schema
from siftline.rows.card import CardInfo, StageCount
from siftline.rows.curated import Published, publish, published_before, resolve_latest
from siftline.rows.ledger import KEPT, REMOVED, StageOutput, reasons
from siftline.rows.published import read_version
from siftline.stages.context import Context
from siftline.stages.models import Engines
from siftline.stages.rejection_sampling.options import JUDGE, NONE, RejectionSampling
from siftline.stages.run import outputs
from siftline.stages.scorers import quality, score_versions
from siftline.workspace import Workspace

PREFERENCES = "preferences"
RLVR = "rlvr"
MEANINGS = {
    PREFERENCES: "pairs of a good and a bad answer to one prompt, verified and refuted or labelled "
    "so, for preference training",
    RLVR: "prompts that the sampler solves sometimes but not always, with answer and verifier, for "
    "reinforcement learning",
}


def sample_bank(context: Context) -> dict[str, pa.Table]:
    """Preference pairs and verifiable prompts of a recipe, by config name.

    A chosen answer passed every gate after it was drawn; that the budget left it out is no fault. A
    rejected answer was whole and sound, and its final answer is another than the reference; no gate
    reads it beside its prompt's. A prompt whose row a later gate removed is left out. Of labelled
    responses the good one stayed to the end, or went for the budget alone.

    Args:
        context: After the last stage.

    Returns:
        Tables in the order of hash(seed, id), both without rows where nothing was sampled or
        labelled. Columns of preferences: id, prompt, chosen, rejected, sift_prompt_id, sift_answer,
        sift_chosen_id, sift_rejected_id (of labelled ones), sift_rejected_draw, sift_first_error,
        sift_last_right (of draws). Of rlvr: id, prompt, answer, verifier, pass_rate, n_trials.
    """
    seed = context.recipe.seed
    pairs, prompts = list(_labelled(context)), []
    for i, (stage, output) in enumerate(context.before):
        if stage.kind == "rejection_sampling":
            spoiled = _spoiled(context.before[i + 1 :], context)
            pairs += list(_pairs(context, output, spoiled))
            if stage.options.verifier not in (JUDGE, NONE):
                prompts += list(_verifiable(context, stage, output, spoiled))
    return {PREFERENCES: _table(pairs, _PAIR, seed), RLVR: _table(prompts, _PROMPT, seed)}


_MESSAGES = pa.list_(pa.struct([(name, pa.string()) for name in ("role", "content")]))
_PAIR = pa.schema(
    [
        ("id", pa.string()),
        ("prompt", _MESSAGES),
        ("chosen", _MESSAGES),
        ("rejected", _MESSAGES),
        ("sift_prompt_id", pa.string()),
        ("sift_answer", pa.string()),
        ("sift_chosen_id", pa.string()),
        ("sift_rejected_id", pa.string()),
        ("sift_rejected_draw", pa.int64()),
        ("sift_first_error", pa.int64()),
        ("sift_last_right", pa.string()),
    ]
)
_PROMPT = pa.schema(
    [
        ("id", pa.string()),
        ("prompt", _MESSAGES),
        ("answer", pa.string()),
        ("verifier", pa.string()),
        ("pass_rate", pa.float64()),
        ("n_trials", pa.int64()),
    ]
)


def _spoiled(later: Sequence[tuple[Stage, StageOutput]], context: Context) -> set[str]:
    """Ids of rows that a gate behind the draws removed, or could not judge."""
    gone: set[str] = set()
    for stage, output in later:
        if stage.of.role == "gate":
            for bucket in context.buckets:
                decided = output.decisions(bucket)
                gone |= set(decided.filter(pl.col("outcome") != KEPT)["id"].to_list())
    return gone


def _labelled(context: Context) -> Iterator[dict[str, Any]]:
    """Responses labelled bad, each against a good one to its prompt that stayed.

    Halves of one input line belong together; what is left on either side meets in order of id.
    """
    for bucket in context.buckets:
        bad = context.pool.read(REJECTED, bucket)
        if not bad.num_rows:
            continue
        of: dict[str, list[dict[str, Any]]] = {}
        for row in bad.to_pylist():
            of.setdefault(row["prompt_id"], []).append(row)
        good: dict[str, list[dict[str, Any]]] = {}
        for row in context.everything(bucket, _stayed(context, bucket)).to_pylist():
            if row["prompt_id"] in of and row["origin"] is None:
                good.setdefault(row["prompt_id"], []).append(row)
        places: dict[str, set[tuple[str, int]]] = {}
        for line in context.pool.read(PROVENANCE, bucket, ["id", "file", "line"]).to_pylist():
            places.setdefault(line["id"], set()).add((line["file"], line["line"]))
        for prompt, rows in sorted(good.items()):
            for row, worse in _matched(rows, of[prompt], places):
                if not _calls_tools(row) and not _calls_tools(worse):
                    yield {
                        "id": schema.digest("pair", row["id"], worse["id"]),
                        "prompt": _plain(row["messages"][:-1]),
                        "chosen": _plain(row["messages"][-1:]),
                        "rejected": _plain(worse["messages"][-1:]),
                        "sift_prompt_id": prompt,
                        "sift_answer": row["answer"],
                        "sift_chosen_id": row["id"],
                        "sift_rejected_id": worse["id"],
                        "sift_rejected_draw": None,
                        "sift_first_error": None,
                        "sift_last_right": None,
                    }


def _stayed(context: Context, bucket: int) -> list[str]:
    """Ids of one bucket that no stage removed but for the budget."""
    ids = set(context.known(bucket))
    for stage, output in context.before:
        decided = output.decisions(bucket).filter(pl.col("outcome") != KEPT)
        if stage.of.role != "budget":
            ids -= set(decided["id"].to_list())
    return sorted(ids)


def _matched(
    good: Sequence[dict[str, Any]],
    bad: Sequence[dict[str, Any]],
    places: dict[str, set[tuple[str, int]]],
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    left = {row["id"]: row for row in good}
    alone = []
    for worse in bad:
        here = places.get(worse["id"], set())
        same = next((row for i, row in left.items() if here & places.get(i, set())), None)
        if same is None:
            alone.append(worse)
        else:
            yield left.pop(same["id"]), worse
    yield from zip(left.values(), alone, strict=False)


def _pairs(context: Context, output: StageOutput, spoiled: set[str]) -> Iterator[dict[str, Any]]:
    """The i-th good draw of a prompt against its i-th refuted one, in draw order."""
    refuted: dict[str, list[dict[str, Any]]] = {}
    negatives = output.table("negatives")
    if negatives is None:  # a table without lines is not written
        return
    for line in negatives.sort("prompt_id", "draw").to_dicts():
        refuted.setdefault(line["prompt_id"], []).append(line)
    for bucket in context.buckets:
        good: dict[str, list[dict[str, Any]]] = {}
        for row in output.added(bucket).to_pylist():
            if row["id"] not in spoiled and not _calls_tools(row):
                good.setdefault(row["prompt_id"], []).append(row)
        for prompt, rows in good.items():
            rows.sort(key=lambda row: int(row["origin"].rsplit(" ", 1)[1]))
            for row, bad in zip(rows, refuted.get(prompt, []), strict=False):
                yield {
                    "id": schema.digest("pair", row["id"], bad["text"]),
                    "prompt": _plain(row["messages"][:-1]),
                    "chosen": _plain(row["messages"][-1:]),
                    "rejected": [{"role": "assistant", "content": bad["text"]}],
                    "sift_prompt_id": prompt,
                    "sift_answer": row["answer"],
                    "sift_chosen_id": row["id"],
                    "sift_rejected_id": None,
                    "sift_rejected_draw": bad["draw"],
                    "sift_first_error": bad["first_error"],
                    "sift_last_right": bad["last_right"],
                }


def _verifiable(
    context: Context, stage: Stage, output: StageOutput, spoiled: set[str]
) -> Iterator[dict[str, Any]]:
    assert isinstance(stage.options, RejectionSampling)
    rates = output.table("difficulty")
    if rates is None:
        return
    # By the value that is published, so that none is 0 or 1 whatever it was corrected for.
    sometimes = (pl.col("sampler_difficulty") > 0) & (pl.col("sampler_difficulty") < 1)
    some = rates.filter(sometimes & ~pl.col("parent_id").is_in(list(spoiled)))
    parents = {line["parent_id"]: line for line in some.to_dicts()}
    for bucket in context.buckets:
        here = [i for i in parents if schema.bucket_of(i, context.pool.buckets) == bucket]
        for row in context.everything(bucket, here).to_pylist():
            if not _calls_tools(row):
                line = parents[row["id"]]
                yield {
                    "id": line["prompt_id"],
                    "prompt": _plain(row["messages"][:-1]),
                    "answer": row["answer"],
                    "verifier": stage.options.verifier,
                    "pass_rate": 1 - line["sampler_difficulty"],
                    "n_trials": line["n_trials"],
                }


def _calls_tools(row: dict[str, Any]) -> bool:
    """Rows whose conversation is more than text stay out: the trainers' formats have no place."""
    return bool(row["tools"]) or any(m["tool_calls"] or m["reasoning"] for m in row["messages"])


def _plain(messages: list[dict[str, Any]]) -> list[dict[str, str]]:
    return [{"role": m["role"], "content": m["content"] or ""} for m in messages]


def _table(lines: list[dict[str, Any]], columns: pa.Schema, seed: int) -> pa.Table:
    unique = {line["id"]: line for line in lines}
    ids = sorted(unique)
    draws = uniforms(seed, "sample bank", ids)
    ordered = [unique[i] for _, i in sorted(zip(draws.tolist(), ids, strict=True))]
    return pa.Table.from_pylist(ordered, schema=columns)


EXCERPT = 240
"""Characters of prompt and response that a removed row is shown with."""

COLUMNS = {
    "sift_prompt_id": "hash of everything before the response; equal for alternatives",
    "sift_source": "where the row came from",
    "sift_origin": "null for pool rows, else the stage and the draw or fold that made the row",
    "sift_parent_id": "row that an added row descends from",
    "sift_answer": "reference answer the response was held against",
    "sift_copies": "identical input rows that collapsed into this one",
    "sift_n_tokens": "loss tokens of the response under the target model's tokenizer",
    "sift_logprob_mean": "mean log-probability of the response under the target model, nats",
    "sift_perplexity": "exp(-sift_logprob_mean)",
    "sift_confidence": "probability of a right answer, or the weighted mean of the parts of "
    "confidence where dev could not tell it; null for corrected rows",
    "sift_cluster": "cluster of the prompt",
    "sift_difficulty": "1 - pass rate on the prompt, of the model that set its target",
}


def final_context(
    workspace: Workspace, recipe: Recipe, done: list[tuple[Stage, StageOutput]]
) -> Context:
    """A context after the last stage, to read the rows that stayed."""
    pool = Pool(workspace.pool(recipe.pool.name))
    return Context(workspace, recipe, done[-1][0], pool, done, Engines(), lambda line: None)


def publish_curated(
    workspace: Workspace,
    recipe: Recipe,
    confirm: Callable[[], None] = lambda: None,
    *,
    trial: bool = False,
) -> Published:
    """Publishes the rows that every stage kept; the same rows again touch nothing.

    Args:
        workspace: The root.
        recipe: The recipe.
        confirm: Called when all is written and nothing is published; it raises to leave it so.
        trial: Whether the recipe was changed for one run: it publishes beside `latest`.
    """
    beside = recipe.hash if trial else None
    done = outputs(workspace, recipe)
    context = final_context(workspace, recipe, done)
    identity = {
        "recipe": recipe.name,
        "recipe_hash": recipe.hash,
        "pool": context.pool.version,
        "stages": {stage.name: output.manifest.version for stage, output in done},
        "scores": score_versions(workspace, recipe),
        "siftline": __version__,
    }
    found = published_before(workspace.curated(recipe.name), identity, beside)
    if found is not None:
        return found
    card = CardInfo(
        name=recipe.name,
        license=recipe.card.license,
        description=recipe.card.description,
        language=recipe.card.language,
        tags=recipe.card.tags,
        how=tuple(f"{stage.name}: {stage.kind}, seed {recipe.seed}" for stage, _ in done),
        columns=tuple(published_columns(recipe).items()),
        funnel=tuple(stage_count(stage, output) for stage, output in done),
        configs=tuple(MEANINGS.items()),
    )
    return publish(
        (kept_rows(context, bucket) for bucket in context.buckets),
        scores(context),
        removed_rows(context),
        root=workspace.curated(recipe.name),
        seed=recipe.seed,
        identity=identity,
        card=card,
        configs=sample_bank(context),
        confirm=confirm,
        trial=beside,
    )


def newest(workspace: Workspace, recipe: Recipe) -> Path:
    """The newest version of these settings where they are a trial's, else the newest of all.

    Raises:
        ValueError: if nothing was published.
    """
    return resolve_latest(workspace.curated(recipe.name), recipe.hash)


def parent_of(workspace: Workspace, recipe: Recipe) -> Path | None:
    """The version that `latest` points at, against which the next one is held."""
    root = workspace.curated(recipe.name)
    return resolve_latest(root) if (root / "latest").exists() else None


def keeps_latest(workspace: Workspace, recipe: Recipe) -> bool:
    """Whether `latest` is a version of other settings, so that a changed run publishes beside it.

    Where nothing is published yet, and where `latest` was made with the same changes, there is no
    other version that readers rely on.
    """
    parent = parent_of(workspace, recipe)
    if parent is None:
        return False
    return bool(read_version(parent)["identity"].get("recipe_hash") != recipe.hash)


def _ids(version: Path) -> pl.LazyFrame:
    return pl.scan_parquet(sorted((version / "data").glob("*.parquet"))).select("id")


def came_and_went(parent: Path, version: Path) -> tuple[int, int]:
    """Rows of a version that its parent has not, and the other way round."""
    before, after = _ids(parent), _ids(version)
    came = after.join(before, on="id", how="anti").select(pl.len()).collect().item()
    went = before.join(after, on="id", how="anti").select(pl.len()).collect().item()
    return came, went


def as_read(published: Published) -> tuple[int, int, list[str]]:
    """What a reader of a version's files finds.

    Returns:
        Rows, distinct ids, and the files whose columns are not the version's.
    """
    names = [line["name"] for line in published.manifest["schema"]]
    files = sorted((published.path / "data").glob("*.parquet"))
    odd = [file.name for file in files if pq.read_schema(file).names != names]
    counted = _ids(published.path).select(pl.len(), pl.col("id").n_unique().alias("distinct"))
    rows, distinct = counted.collect().row(0)
    return rows, distinct, odd


def published_columns(recipe: Recipe) -> dict[str, str]:
    """What the columns of a version mean, those of the recipe's quality scorers included."""
    scorers = {
        f"sift_score_{name}": f"{type(config).__name__.lower()} score; null for added rows"
        for name, config in recipe.scorers.items()
    }
    return {**COLUMNS, **scorers}


def stage_count(stage: Stage, output: StageOutput) -> StageCount:
    """One line of the funnel."""
    counts = output.accounting
    return StageCount(
        stage=stage.name,
        kind=stage.of.role,
        rows_in=counts.rows_in,
        added=counts.added,
        kept=counts.kept,
        removed=counts.removed,
        failed=counts.failed,
        reasons=tuple(reasons(output.all_decisions()).items()),
        vacuous=bool(output.facts.get("vacuous")),
    )


def kept_rows(context: Context, bucket: int) -> pa.Table:
    """Rows of one bucket that every stage kept, columns of `schema.ROW`."""
    return context.rows(bucket).select(schema.ROW.names).cast(schema.ROW)


def scores(context: Context) -> pl.DataFrame:
    """The `sift_` columns of the rows that stayed."""
    narrow = []
    for bucket in context.buckets:
        names = ["id", "prompt_id", "source", "origin", "parent_id", "answer", "copies"]
        frame = pl.from_arrow(context.rows(bucket).select(names))
        assert isinstance(frame, pl.DataFrame)
        narrow.append(frame)
    frame = pl.concat(narrow)
    likelihood = context.side_table("likelihood")
    if likelihood is not None:
        likelihood = _all_likelihoods(context)
        frame = frame.join(likelihood, on="id", how="left")
    confidence = _stacked(context, "confidence", ["id", "confidence"])
    if confidence is not None:
        frame = frame.join(confidence, on="id", how="left")
    diversity = context.output("diversity")
    clusters = diversity.table("clusters") if diversity else None
    for table, name in ((clusters, "cluster"), (context.side_table("difficulty"), "difficulty")):
        if table is not None:
            frame = frame.join(table.select("prompt_id", name), on="prompt_id", how="left")
    for name in context.recipe.scorers:
        values = quality(context, name).select("id", pl.col("value").alias(f"score_{name}"))
        frame = frame.join(values, on="id", how="left")
    return frame.rename({name: f"sift_{name}" for name in frame.columns if name != "id"})


def _stacked(context: Context, name: str, columns: list[str]) -> pl.DataFrame | None:
    """The newest line per id over all side tables of a name."""
    tables = [output.table(name) for _, output in context.before]
    found = [table.select(columns) for table in tables if table is not None]
    if not found:
        return None
    return pl.concat(found).unique("id", keep="last", maintain_order=True)


def _all_likelihoods(context: Context) -> pl.DataFrame:
    stacked = _stacked(context, "likelihood", ["id", "n_tokens", "logprob_mean", "perplexity"])
    assert stacked is not None
    return stacked


def removed_rows(context: Context) -> pl.DataFrame:
    """Every row that a stage removed, with the reason and excerpts."""
    frames = []
    for bucket in context.buckets:
        texts = _texts(context, bucket)
        for stage, output in context.before:
            gone = output.decisions(bucket).filter(pl.col("outcome") == REMOVED)
            marked = gone.with_columns(
                pl.lit(stage.name).alias("stage"), pl.lit(stage.kind).alias("kind")
            )
            frames.append(marked.join(texts, on="id", how="left"))
    columns = ["id", "stage", "kind", "reason", "value", "threshold", "matched_id"]
    return pl.concat(frames).select([*columns, "prompt", "response"])


def _texts(context: Context, bucket: int) -> pl.DataFrame:
    """Excerpts of all rows of one bucket, kept or not."""
    tables = [context.pool.rows(bucket)]
    tables += [
        output.added(bucket).select(schema.ROW.names).cast(schema.ROW)
        for _, output in context.before
    ]
    view = schema.text_view(pa.concat_tables(tables))
    return view.select("id", *(pl.col(c).str.slice(0, EXCERPT) for c in ("prompt", "response")))


def funnel(done: list[tuple[Stage, StageOutput]]) -> dict[str, dict[str, Any]]:
    """Row counts of every stage under its name, as the last line of a run shows them."""
    return {stage.name: output.accounting.as_json() for stage, output in done}
