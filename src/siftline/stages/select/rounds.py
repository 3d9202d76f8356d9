"""Between the rounds of a selection: a model is trained, answers, and is held against the rows.

All three are found again by content: the model in a folder named by its rows and options, answers
and scores in the store under the model's fingerprint. So a killed stage draws the same rounds
again, which costs nothing, and goes on where it was.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa

from siftline.progress import Progress
from siftline.recipe.parse import Recipe
from siftline.rows import schema
from siftline.rows.verified import content_hash
from siftline.scoring.engines.base import ModelSpec, Sampling
from siftline.scoring.fingerprint import directory_digest
from siftline.scoring.measures.columns import Column
from siftline.scoring.measures.consistency import prompts_of
from siftline.scoring.measures.likelihood import score_likelihood
from siftline.scoring.measures.samples import draw_samples
from siftline.scoring.measures.scorers import models_of, needs_classifier, run_scorer
from siftline.scoring.recorder import Recorder
from siftline.selectors.rounds import PERPLEXITY, KmeansRounds
from siftline.stages.context import Context, by_store_bucket
from siftline.stages.models import named_spec, over_buckets
from siftline.training.finetune import FineTune, finetune

_ROW = pa.schema([f.with_nullable(True) for f in schema.ROW])
Values = tuple[dict[str, float], dict[str, str]]
"""Scores by id, and reasons by id of rows without one."""


def round_options(recipe: Recipe) -> FineTune:
    """How the model of a round is trained: as the recipe's own, for one pass over the rows.

    Reference scores are of arms alone, so a round of a recipe with objective poft learns by sft.
    """
    own = FineTune() if recipe.training is None else recipe.training.options
    if own.objective == "poft":
        own = replace(own, objective="sft")
    # A round may lack a source that a phase names, and has one pass only.
    return replace(
        own,
        epochs=1.0,
        loss_tokens=None,
        steps=None,
        keep="last",
        report_to="none",
        phases=(),
    )


def training_inputs(recipe: Recipe) -> dict[str, Any]:
    """What of a round's training decides its models; how often it is saved does not."""
    return {k: v for k, v in asdict(round_options(recipe)).items() if k != "save_steps"}


@dataclass(frozen=True)
class Teacher:
    """Trains on the rows of a round and says how far its answers fall short of the given ones.

    An answer that is cut at its length is scored as the others are, with an end of turn behind it
    that the model did not write.

    Attributes:
        context: The stage.
        method: Its method.
        lost: Why rows had no difference, by round and id.
    """

    context: Context
    method: KmeansRounds
    lost: dict[str, str] = field(default_factory=dict)

    def __call__(self, number: int, ids: list[str]) -> pl.DataFrame:
        """Columns id and difference of the rows of `ids` that could be scored.

        Raises:
            ValueError: if none could, naming a reason.
        """
        rows = self.context.rows_of(set(ids)).select(schema.ROW.names).cast(_ROW).sort_by("id")
        self._check()
        spec = self._trained(number, rows)
        given, own, failed = self._answered(number, spec, rows)
        self.lost.update({f"{number + 1} {i}": why for i, why in failed.items()})
        lines = {i: given[i] - own[i] for i in sorted(given) if i in own}
        if not lines:
            reason = sorted(failed.items())[0]
            raise ValueError(
                f"round {number + 1}: none of {len(ids)} rows could be scored, first {reason[0]} "
                f"({reason[1]}): raise the model's max_length or lower max_new_tokens"
            )
        return pl.DataFrame(
            {"id": list(lines), "difference": list(lines.values())},
            schema={"id": pl.String, "difference": pl.Float64},
        )

    def _check(self) -> None:
        config = self.context.recipe.scorers.get(self.method.compare)
        if isinstance(config, Column):
            raise ValueError(
                f"scorer {self.method.compare!r} reads a column, which a model's answers have not: "
                "compare by a reward, classifier, rubric, contrast or function"
            )

    def _trained(self, number: int, rows: pa.Table) -> ModelSpec:
        """The model of a round, trained now or found."""
        context = self.context
        spec, options = context.spec("target"), round_options(context.recipe)
        if spec.engine == "server" or spec.adapter is not None:
            raise ValueError(
                f"{context.stage.name}: rounds train the target model, which must be a local one "
                "without an adapter"
            )
        decisive = {k: v for k, v in vars(options).items() if k != "save_steps"}
        base = Path(spec.path)
        key = content_hash(
            [
                rows["id"].to_pylist(),
                decisive,
                self.method.seed,
                directory_digest(base),
                spec.template,
            ]
        )
        name = f"{context.recipe.name}-{context.stage.name}-r{number + 1}-{key[:12]}"
        context.opened.close()  # what other engines hold is memory the training may want
        progress = Progress(f"{context.stage.name} round {number + 1}", 0, context.emit, "steps")
        done = finetune(
            base,
            rows,
            context.workspace.model(name),
            options,
            seed=self.method.seed,
            dataset_version=f"{context.recipe.name}/{context.stage.name} round {number + 1}",
            template=spec.template,
            progress=progress.reach,
        )
        progress.close()
        return replace(spec, path=str(done.model_dir), revision=None)

    def _answered(
        self, number: int, spec: ModelSpec, rows: pa.Table
    ) -> tuple[dict[str, float], dict[str, float], dict[str, str]]:
        """Scores of the given answers and of the model's own by the id of the row, and reasons."""
        own, of_row, failed = self._own(number, spec, rows)
        asked = pa.concat_tables([rows, own]) if own.num_rows else rows
        found, unscored = self._scored(number, spec, _distinct(asked))
        failed |= {i: unscored[i] for i in rows["id"].to_pylist() if i in unscored}
        for identity, answer in of_row.items():
            if answer in unscored:
                failed.setdefault(identity, unscored[answer])
        return (
            {i: found[i] for i in rows["id"].to_pylist() if i in found},
            {i: found[answer] for i, answer in of_row.items() if answer in found},
            failed,
        )

    def _own(
        self, number: int, spec: ModelSpec, rows: pa.Table
    ) -> tuple[pa.Table, dict[str, str], dict[str, str]]:
        """The model's own answers as rows, the id of the answer to each row, and reasons."""
        longest = min(self.method.max_new_tokens, max(1, spec.max_length // 2))
        sampling = Sampling(longest, temperature=0.0)

        def work(recorder: Recorder, bucket: int, part: pa.Table) -> Any:
            tokens, unfit = prompts_of(recorder, part)
            draws = {prompt: range(1) for prompt in tokens}
            drawn, lost = draw_samples(recorder, bucket, tokens, draws, sampling, self.method.seed)
            return dict(drawn.select("prompt_id", "text").iter_rows()), {**unfit, **lost}

        texts: dict[str, str] = {}
        failed: dict[str, str] = {}
        for found, reasons in self._asked(spec, "answers", number, rows, work):
            texts |= found
            failed |= reasons
        made, of_row = {}, {}
        for row in rows.to_pylist():
            text = texts.get(row["prompt_id"])
            if text is not None:
                turn = schema.message("assistant", text)
                answer = schema.make_row([*row["messages"][:-1], turn], tools=row["tools"])
                of_row[row["id"]] = answer["id"]
                made[answer["id"]] = answer
        table = pa.Table.from_pylist([made[i] for i in sorted(made)], schema=_ROW)
        reasons = dict(zip(rows["id"].to_pylist(), rows["prompt_id"].to_pylist(), strict=True))
        return table, of_row, {i: failed[p] for i, p in reasons.items() if p in failed}

    def _scored(self, number: int, spec: ModelSpec, rows: pa.Table) -> Values:
        """Scores of rows: higher is the better answer, or for perplexity the less likely one."""
        values: dict[str, float] = {}
        failed: dict[str, str] = {}
        asked = self._by_scorer if self.method.compare != PERPLEXITY else self._by_perplexity
        for found, reasons in asked(number, spec, rows):
            values |= found
            failed |= reasons
        return values, failed

    def _by_perplexity(self, number: int, spec: ModelSpec, rows: pa.Table) -> Sequence[Values]:
        def work(recorder: Recorder, bucket: int, part: pa.Table) -> Values:
            lines, reasons = score_likelihood(recorder, bucket, part)
            logs = lines.select("id", -pl.col("logprob_mean"))  # the log of the perplexity
            return dict(logs.iter_rows()), reasons

        return self._asked(spec, "perplexities", number, rows, work)

    def _by_scorer(self, number: int, spec: ModelSpec, rows: pa.Table) -> Sequence[Values]:
        context, name = self.context, self.method.compare
        config = context.recipe.scorers[name]
        head = "classifier" if needs_classifier(config) else "causal"
        context.opened.close()  # the trained model has said all it is asked for
        progress = Progress(f"{context.stage.name} {name}", rows.num_rows, context.emit)
        recorders = {
            model: context.opened.recorders(
                named_spec(context.workspace, context.recipe, model),
                context.workspace.store,
                progress.advance,
                head,
            )[0]
            for model in models_of(config)
        }
        out = []
        for bucket, part in by_store_bucket(lambda _: rows, 1):
            lines, reasons = run_scorer(config, recorders, bucket, part)
            out.append((dict(lines.select("id", "value").iter_rows()), reasons))
        progress.close()
        return out

    def _asked(
        self,
        spec: ModelSpec,
        what: str,
        number: int,
        rows: pa.Table,
        work: Callable[[Recorder, int, pa.Table], Any],
    ) -> list[Any]:
        """Asks the model of a round about rows, bucket by bucket, on all its devices."""
        context = self.context
        label = f"{context.stage.name} round {number + 1}"
        progress = Progress(label, rows.num_rows, context.emit, what)
        recorders = context.opened.recorders(spec, context.workspace.store, progress.advance)
        found = over_buckets(recorders, by_store_bucket(lambda _: rows, 1), work)
        answers = [answer for _, answer in found]
        progress.close()
        return answers


def _distinct(rows: pa.Table) -> pa.Table:
    """One row an id: a model may answer just what was given."""
    first = pl.Series(rows["id"].to_pylist(), dtype=pl.String).is_first_distinct()
    return rows.filter(pa.array(first.to_list()))
