"""Auto-Correct: fine-tuned models propose, a judge compares, what wins takes a response's place.

The rows in play are what the confidence gate kept. Fold models are trained on them and kept in the
workspace by what decides their weights; candidates and verdicts are recorded facts. So a run that
is killed goes on, and a rerun decides the same.

Memory: the judged responses and their candidates are held as text until the side table is written,
and so are the rows that one fold's model is trained on.

The models that propose corrections: trained on folds, found again by name.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa

from siftline.progress import Progress
from siftline.rows import schema
from siftline.rows.ledger import REMOVED, StageResult
from siftline.rows.selection import decisions
from siftline.rows.verified import content_hash
from siftline.scoring.engines.base import ModelSpec
from siftline.scoring.measures.consistency import prompts_of
from siftline.scoring.measures.pairwise import Preference, prefer
from siftline.scoring.measures.samples import draw_samples
from siftline.scoring.recorder import REFUSED, Recorder, unanswered
from siftline.scoring.verifiers import get_verifier
from siftline.stages.context import Context, StageRun, by_store_bucket
from siftline.stages.correct.decide import ADOPTED, PROPOSALS, fold_of, judged_facts
from siftline.stages.correct.options import Correct
from siftline.stages.models import engines, over_buckets
from siftline.training.finetune import TrainResult, finetune

TOLD = ("save_steps", "report_to")
"""Training options that decide no weight."""


def proposer_name(options: Correct, spec: ModelSpec, rows: pa.Table) -> str:
    """Folder name of the model that these rows make, by everything that decides its weights.

    Args:
        options: The stage's.
        spec: The base model.
        rows: Training rows, column id.
    """
    from siftline.scoring.fingerprint import directory_digest

    decisive = {k: v for k, v in vars(options.training).items() if k not in TOLD}
    base = directory_digest(Path(spec.path))
    ids = sorted(rows.column("id").to_pylist())
    return f"correct-{content_hash([base, spec.template, ids, decisive, options.seed])[:16]}"


def train_proposer(
    options: Correct,
    spec: ModelSpec,
    rows: pa.Table,
    folder: Path,
    dataset_version: str,
    progress: Callable[[int, int], None],
) -> TrainResult:
    """Fine-tunes the base model of `spec` on rows, or finds that it was done.

    Args:
        options: The stage's.
        spec: The base model, in a local directory.
        rows: Columns id, messages, tools, source.
        folder: Where the model goes; see `proposer_name`.
        dataset_version: For the model card.
        progress: Called with (steps done, steps in all).

    Raises:
        ValueError: if the base is no local directory of its own weights; or see `finetune`.
    """
    if spec.engine == "server" or spec.adapter is not None:
        what = "runs at a server" if spec.engine == "server" else f"has adapter {spec.adapter!r}"
        raise ValueError(
            f"correct fine-tunes the target model, which {what}: name a local directory with the "
            "merged weights"
        )
    return finetune(
        Path(spec.path),
        rows.sort_by("id"),
        folder,
        options.training,
        seed=options.seed,
        dataset_version=dataset_version,
        template=spec.template,
        progress=progress,
    )


COLUMNS = ["id", "messages", "tools", "source"]
CORRECTIONS = {
    "id": pl.String,
    "prompt_id": pl.String,
    "in_play": pl.Boolean,
    "fold": pl.Int64,
    "original": pl.String,
    "candidate": pl.String,
    "new_id": pl.String,  # the row that the candidate is or would be
    "barred": pl.String,
    "verdict": pl.String,
    "confidence": pl.Float64,
    "as_second": pl.Float64,  # probability of the candidate where it is shown second
    "as_first": pl.Float64,
    "outcome": pl.String,
}
"""One line per response that the confidence gate judged; see `stages.correct.decide`."""


@dataclass(frozen=True)
class _Judged:
    """Responses that the confidence gate judged: those in play, and those it removed."""

    context: Context
    removed: Sequence[tuple[Context, frozenset[str]]]

    def rows(self, bucket: int) -> pa.Table:
        """Their rows in one bucket of the pool, sorted by id."""
        parts = [self.context.rows(bucket)]
        for before, ids in self.removed:
            rows, wanted = before.rows(bucket), pa.array(sorted(ids), pa.string())
            parts.append(rows.filter(pa.compute.is_in(rows["id"], wanted)))
        return pa.concat_tables(parts).sort_by("id")


def _judged(context: Context) -> _Judged:
    removed = []
    rescued: set[str] = set()  # by an instance before this one
    for _, output in context.before:
        table = output.table("corrections")
        if table is not None:
            rescued |= set(table.filter(pl.col("outcome") == ADOPTED[1])["id"].to_list())
    for i, (stage, output) in enumerate(context.before):
        if stage.kind != "confidence":
            continue
        low = (pl.col("outcome") == REMOVED) & (pl.col("reason") == "low_confidence")
        gone = frozenset(output.all_decisions().filter(low)["id"].to_list()) - rescued
        # What was in play before the gate holds the rows that it removed.
        removed.append((replace(context, before=context.before[:i]), gone))
    return _Judged(context, removed)


def run(context: Context) -> StageRun:
    """Takes candidates that a judge prefers; corrected responses go, all others stay."""
    options = context.stage.options
    assert isinstance(options, Correct)
    judged = _judged(context)
    candidates, folds = _propose(context, judged, options)
    lines, silent = _judge(context, judged, candidates, options)
    _check_judge(context, lines, silent)
    frame = pl.DataFrame(lines, schema={k: v for k, v in CORRECTIONS.items() if k != "outcome"})
    frame = _bar_known(context, frame.sort("id"))
    frame = frame.with_columns(options.rule.outcomes(frame.select(list(PROPOSALS))))
    results = [_result(context, judged, frame, bucket, options) for bucket in context.buckets]
    counts = dict(sorted(Counter(frame["outcome"].to_list()).items()))
    adopted = {name: counts.get(name, 0) for name in ADOPTED}
    facts = {
        "responses": frame.height,
        "in_play": int(frame["in_play"].sum()),
        **adopted,
        "outcomes": counts,
        "judge": judged_facts(frame),
        "no_candidate": dict(sorted(Counter(_lost(candidates)).items())),
        "no_verdict": dict(sorted(Counter(silent).items())),
        "unanswered": unanswered([*_lost(candidates), *silent]),
        "folds": folds,
        "vacuous": not any(adopted.values()),
    }
    said = ", ".join(f"{count} {name}" for name, count in counts.items())
    context.emit(f"{context.stage.name}: {said}")
    return StageRun(results, {"corrections": frame.select(list(CORRECTIONS))}, facts)


# ---- candidates ------------------------------------------------------------------------------

Candidates = Mapping[str, tuple[int, str | None, str | None]]
"""By prompt id: the fold, the candidate's text, and why there is none."""


def _lost(candidates: Candidates) -> list[str]:
    return [why for _, _, why in candidates.values() if why is not None]


def _of_folds(rows: pa.Table, folds: Iterable[int], options: Correct) -> pa.Table:
    of = fold_of(rows.column("prompt_id").to_pylist(), options.folds, options.seed)
    return rows.filter(pa.compute.is_in(pa.array(of), pa.array(list(folds), pa.int64())))


def _propose(
    context: Context, judged: _Judged, options: Correct
) -> tuple[Candidates, list[dict[str, Any]]]:
    """One candidate per prompt, and what is to be said of each fold."""
    candidates: dict[str, tuple[int, str | None, str | None]] = {}
    facts = []
    for fold in range(options.folds):
        others = [other for other in range(options.folds) if other != fold or options.folds == 1]
        rows = pa.concat_tables(
            _of_folds(context.rows(b), others, options) for b in context.buckets
        )
        prompts = _generate(context, judged, rows, fold, options, candidates)
        trained = rows.num_rows if prompts else 0  # a fold without prompts needs no model
        facts.append({"fold": fold, "trained_on": trained, "prompts": prompts})
    return candidates, facts


def _generate(
    context: Context,
    judged: _Judged,
    rows: pa.Table,
    fold: int,
    options: Correct,
    candidates: dict[str, tuple[int, str | None, str | None]],
) -> int:
    """Trains the model of one fold and lets it answer; says how many prompts there were."""

    def asked(bucket: int) -> pa.Table:
        return _of_folds(judged.rows(bucket), [fold], options)

    if not any(asked(bucket).num_rows for bucket in context.buckets):
        return 0
    if not rows.num_rows:
        raise ValueError(
            f"{context.stage.name}: no row is left to train the model of fold {fold} on: lower "
            f"folds ({options.folds}) or loosen the confidence gate"
        )
    name, spec = context.stage.name, context.spec("target")
    progress = Progress(f"{name} training fold {fold}", 0, context.emit, "steps")
    folder = context.workspace.model(proposer_name(options, spec, rows))
    version = f"{context.recipe.name}/{name} fold {fold} of {options.folds}"
    made = train_proposer(options, spec, rows.select(COLUMNS), folder, version, progress.reach)
    progress.close()
    progress = Progress(f"{name} candidates fold {fold}", 0, context.emit, "prompts")
    before = len(candidates)
    # Freed before the next fold's model is trained: both may not fit the card.
    with engines() as opened:
        proposer = replace(spec, path=str(made.model_dir))
        seats = opened.recorders(proposer, context.workspace.store, progress.advance)

        def work(recorder: Recorder, bucket: int, rows: pa.Table) -> dict[str, Any]:
            return _answers(recorder, bucket, rows, fold, options)

        buckets = by_store_bucket(asked, context.pool.buckets)
        for _, found in over_buckets(seats, buckets, work):
            candidates.update(found)
    progress.close()
    return len(candidates) - before


def _answers(
    recorder: Recorder, bucket: int, rows: pa.Table, fold: int, options: Correct
) -> dict[str, tuple[int, str | None, str | None]]:
    """One greedy answer per prompt; one that is cut at its length or empty is none."""
    tokens, unfit = prompts_of(recorder, rows)
    wanted = {prompt: range(1) for prompt in tokens}
    drawn, lost = draw_samples(recorder, bucket, tokens, wanted, options.sampling, options.seed)
    found: dict[str, tuple[int, str | None, str | None]] = {
        prompt: (fold, None, why) for prompt, why in {**unfit, **lost}.items()
    }
    for line in drawn.to_dicts():
        text = schema.canonical_text(line["text"])
        why = None if line["finish_reason"] == "stop" and text else "cut" if text else "empty"
        found[line["prompt_id"]] = (fold, None if why else text, why)
    return found


# ---- verdicts --------------------------------------------------------------------------------

Verdicts = tuple[list[dict[str, Any]], list[str]]
"""Lines of `CORRECTIONS` without their outcome, and the reasons of those the judge failed on."""


def _judge(
    context: Context, judged: _Judged, candidates: Candidates, options: Correct
) -> tuple[list[dict[str, Any]], list[str]]:
    """Lines of `CORRECTIONS` without their outcome, one per judged response; why verdicts lack."""
    progress = Progress(f"{context.stage.name} verdicts", 0, context.emit, "questions")
    playing = {i for bucket in context.buckets for i in context.in_play(bucket)}
    lines: list[dict[str, Any]] = []
    silent: list[str] = []

    def work(recorder: Recorder, bucket: int, rows: pa.Table) -> Verdicts:
        return _verdicts(recorder, bucket, rows, candidates, playing, options)

    buckets = by_store_bucket(judged.rows, context.pool.buckets)
    for _, found in over_buckets(context.recorders("judge", progress), buckets, work):
        lines += found[0]
        silent += found[1]
    progress.close()
    return lines, silent


def _check_judge(context: Context, lines: Sequence[dict[str, Any]], silent: Sequence[str]) -> None:
    """Refuses a judge that refused every pair: then the call is wrong, not a pair."""
    asked = sum(line["as_second"] is not None for line in lines) + len(silent)
    if asked > 1 and silent.count(REFUSED) == asked:
        raise ValueError(
            f"{context.stage.name}: the judge refused all {asked} pairs, the log says why: give "
            "the role judge a model that scores its prompts"
        )


def _verdicts(
    recorder: Recorder,
    bucket: int,
    rows: pa.Table,
    candidates: Candidates,
    playing: set[str],
    options: Correct,
) -> Verdicts:
    check = get_verifier(options.verifier) if options.verifier else None
    lines, asked = [], {}
    for row in rows.to_pylist():
        fold, text, _ = candidates[row["prompt_id"]]
        own = row["messages"][-1]["content"]
        barred, new = None, None
        if text is None:
            barred = "no_candidate"
        elif " ".join(text.lower().split()) == " ".join(own.lower().split()):
            barred = "same_answer"
        else:
            new = _row(row, text)["id"]
            proven = row["answer"] is not None and row["answer_from"] == "independent"
            if check and proven and not check(text, row["answer"]).correct:
                barred = "failed_check"
            else:
                asked[row["id"]] = (row["messages"], own, text)
        lines.append(
            {
                "id": row["id"],
                "prompt_id": row["prompt_id"],
                "in_play": row["id"] in playing,
                "fold": fold,
                "original": own,
                "candidate": text,
                "new_id": new,
                "barred": barred,
            }
        )
    told = prefer(recorder, bucket, asked)
    nothing = Preference(None, None, None, None)
    silent = []
    for line in lines:
        said = told.get(line["id"], nothing)
        names = ("verdict", "confidence", "as_second", "as_first")
        line |= {name: getattr(said, name) for name in names}
        if said.reason is not None:
            line["barred"] = "judge_failed"
            silent.append(said.reason)
    return lines, silent


def _row(parent: Mapping[str, Any], text: str) -> dict[str, Any]:
    """The row that a candidate makes; an answer parsed from the old response is not its own."""
    independent = parent["answer_from"] == "independent"
    return schema.make_row(
        [*parent["messages"][:-1], schema.message("assistant", text)],
        answer=parent["answer"] if independent else None,
        answer_from="independent",
        source="corrected",
        conversation_id=parent["conversation_id"],
        tools=parent["tools"],
    )


def _bar_known(context: Context, frame: pl.DataFrame) -> pl.DataFrame:
    """Bars candidates that are a row some stage turned away before, or that there is by now."""
    turned_away: set[str] = set()
    there: set[str] = set()
    wanted = set(frame["new_id"].drop_nulls().to_list())
    for bucket in context.buckets:
        known = set(context.pool.rows(bucket, ["id"]).column("id").to_pylist())
        for _, output in context.before:
            known |= set(output.added(bucket).column("id").to_pylist())
        playing = set(context.in_play(bucket))
        turned_away |= (known & wanted) - playing
        there |= playing & wanted
    new = pl.col("new_id")
    barred = (
        pl.when(pl.col("barred").is_not_null())
        .then("barred")
        .when(new.is_in(list(turned_away)))
        .then(pl.lit("turned_away"))
        .when(new.is_in(list(there)) & ~pl.col("in_play"))
        .then(pl.lit("already_there"))
    )
    return frame.with_columns(barred.alias("barred"))


# ---- decisions -------------------------------------------------------------------------------


def _result(
    context: Context, judged: _Judged, frame: pl.DataFrame, bucket: int, options: Correct
) -> StageResult:
    """Decisions about the rows in play of one bucket, and the rows that are added to it."""
    ids = context.in_play(bucket)
    parents = {row["id"]: row for row in judged.rows(bucket).to_pylist()}
    here = frame.filter(pl.col("id").is_in(list(parents)) & pl.col("outcome").is_in(list(ADOPTED)))
    taken = {line["id"]: line for line in here.to_dicts()}
    nothing: dict[str, Any] = {}
    gone = [taken.get(i, nothing) for i in ids]
    decided = decisions(
        ids,
        kept=[not line for line in gone],
        reason=["corrected" if line else None for line in gone],
        value=[line.get("confidence") for line in gone],
        threshold=[options.confidence if line else None for line in gone],
        matched_id=[line.get("new_id") for line in gone],
    )
    added: dict[str, dict[str, Any]] = {}
    playing = set(ids)
    for identity, line in sorted(taken.items()):  # of several parents the smallest is named
        if line["new_id"] not in playing:
            row = _row(parents[identity], line["candidate"])
            origin = f"{context.stage.name} fold {line['fold']}"
            added.setdefault(row["id"], {**row, "parent_id": identity, "origin": origin})
    table = pa.Table.from_pylist(list(added.values()), schema=schema.ADDED)
    return StageResult(decided, {}, table)
