"""From rows to the forward passes of a run: reading, laying out, weighing.

What the planned forward passes hold: tokens, labels, loss weights, corrupted inputs.
"""

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from siftline.kernels.draws import uniforms
from siftline.rows.published import confirm_inputs
from siftline.training.schedule import (
    IGNORED,
    Schedule,
    budget_schedule,
    epochs_schedule,
    length_schedule,
    phase_schedule,
    tokenize_rows,
)
from siftline.training.sft import FineTune

STAGE = "masked thought"
RAMP = 2 / 3
"""Share of the steps over which the rate of masked thought rises from 0 to its end."""


@dataclass(frozen=True)
class Corruption:
    """Masked thought (arXiv 2403.02178): tokens of the response are swapped in the input alone.

    Attributes:
        rate: Share of response tokens at the end of the ramp.
        vocabulary: Token ids to draw from.
        kept: Token ids never replaced, as the end of sequence.
        seed: Of the draws.
    """

    rate: float
    vocabulary: np.ndarray
    kept: np.ndarray
    seed: int

    def rate_at(self, step: int, steps: int) -> float:
        """The rate at an optimizer step, counted from 0."""
        return self.rate * min(1.0, step / (RAMP * steps))

    def apply(
        self, tokens: np.ndarray, start: int, identity: str, step: int, rate: float
    ) -> np.ndarray:
        """A row's tokens with some from `start` on replaced; the row itself where rate is 0."""
        names = [f"{identity}\x1f{place}" for place in range(start, len(tokens))]
        hit = uniforms(self.seed, STAGE, names, 2 * step) < rate
        hit &= ~np.isin(tokens[start:], self.kept)
        if not hit.any():
            return tokens
        drawn = uniforms(self.seed, STAGE, names, 2 * step + 1) * len(self.vocabulary)
        changed = tokens.copy()
        changed[start:][hit] = self.vocabulary[drawn.astype(np.int64)][hit]
        return changed


def balanced(sources: Sequence[str], tokens: np.ndarray, strength: float) -> np.ndarray:
    """Row weights that even out sources.

    A source with n of N loss tokens weighs (N / n) ** strength, times what makes the mean over all
    loss tokens 1: at strength 1 all sources have equal shares of the loss, at 0 their own.

    Args:
        sources: Source of each row the run sees, repeats included; shape (n,).
        tokens: Loss tokens of each, shape (n,).
        strength: From 0 to 1.

    Returns:
        Weight of each row, shape (n,).
    """
    _, which = np.unique(np.asarray(sources), return_inverse=True)
    shares = np.bincount(which, weights=tokens) / tokens.sum()
    weights = (shares**-strength)[which]
    return weights * (tokens.sum() / (weights * tokens).sum())


@dataclass(frozen=True)
class Passes:
    """The forward passes of a schedule with their loss weights.

    Attributes:
        schedule: The plan.
        row_weights: Loss weight of each of the schedule's rows, shape (n,).
        prompt_weight: Loss weight of prompt tokens; those of the response have 1.
        references: Mean log-probability of each row under the reference models, shape (n,).
        corruption: What is done to the inputs.
    """

    schedule: Schedule
    row_weights: np.ndarray
    prompt_weight: float = 0.0
    references: np.ndarray | None = None
    corruption: Corruption | None = None

    def __len__(self) -> int:
        """Forward passes of the run, over all devices."""
        return len(self.schedule)

    @property
    def parts(self) -> int:
        """Forward passes of an optimizer step, over all devices."""
        return len(self.schedule) // self.schedule.steps

    def step_of(self, number: int) -> int:
        """The optimizer step, from 0, that a pass belongs to."""
        return number // self.parts

    def rate(self, number: int) -> float:
        """The rate of masked thought in a pass."""
        if self.corruption is None:
            return 0.0
        return self.corruption.rate_at(self.step_of(number), self.schedule.steps)

    def row(self, number: int, position: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Input tokens, labels and the weights of the labelled tokens of one row of a pass."""
        rows = self.schedule.rows
        tokens, start = rows.row(position)
        first = 1 if self.prompt_weight else max(start, 1)  # nothing precedes the first token
        labels = tokens.astype(np.int64)
        labels[:first] = IGNORED
        weights = np.full(len(tokens), self.row_weights[position])
        weights[:start] *= self.prompt_weight
        rate = self.rate(number)
        if rate and self.corruption is not None:
            step = self.step_of(number)
            tokens = self.corruption.apply(tokens, start, rows.ids[position], step, rate)
        return tokens.astype(np.int64), labels, weights[first:]

    def denominators(self) -> tuple[np.ndarray, np.ndarray]:
        """Sums of loss weights of every step, over tokens and over rows; shape (steps,) each."""
        rows = self.schedule.rows
        lengths = np.diff(rows.offsets)
        responses = lengths - np.maximum(rows.starts, 1)
        prompts = np.maximum(rows.starts - 1, 0)
        by_token = self.row_weights * (responses + self.prompt_weight * prompts)
        passes = self.schedule.passes
        return tuple(
            np.array([of[part].sum() for part in passes]).reshape(-1, self.parts).sum(axis=1)
            for of in (by_token, self.row_weights)
        )


def references_of(ids: Sequence[str], given: Mapping[str, float]) -> np.ndarray:
    """Reference scores by row id, shape (n,).

    Raises:
        ValueError: if a row has none, or one that is not a log-probability.
    """
    missing = [identity for identity in ids if identity not in given]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(ids)} rows have no reference score ({missing[0]} is one): "
            "score them with the reference models first"
        )
    scores = np.array([given[identity] for identity in ids], dtype=np.float64)
    wrong = ~np.isfinite(scores) | (scores > 0)
    if wrong.any():
        raise ValueError(
            f"reference score {scores[wrong][0]} of row {ids[int(wrong.argmax())]} is not a mean "
            "log-probability: it must be finite, 0 or below"
        )
    return scores


def allowed_tokens(tokenizer: Any) -> np.ndarray:
    """Ids of all ordinary tokens: what masked thought draws from."""
    special = set(tokenizer.all_special_ids)
    return np.array([i for i in range(len(tokenizer)) if i not in special])


logger = logging.getLogger(__name__)

PUBLISHED_SOURCE = "sift_source"
"""What a curated version calls a row's source."""


def read_rows(data: Sequence[Path] | pa.Table, config: FineTune) -> pa.Table:
    """The columns of the data that this configuration needs, from a table or files.

    Parquet with ids and messages is read as it is; whatever else there is, as a recipe's pool reads
    it. Rows that are no conversation, or are labelled bad, are left out with a warning.

    Raises:
        ValueError: if there is no file, one is of no known layout, or ids or messages are of
            another type.
    """
    if isinstance(data, pa.Table):
        return _checked(data, "the data")
    if not data:
        raise ValueError("nothing to train on: give the files of a version's data folder")
    confirm_inputs(data)
    tables = [_published(path, config) for path in data]
    others = [path for path, table in zip(data, tables, strict=True) if table is None]
    found = [table for table in tables if table is not None]
    # One version may have tools or reasoning that another has not.
    if others:
        found.append(_ingested(others, config.weight_column))
    table = pa.concat_tables(found, promote_options="permissive")
    return table if "source" in table.column_names else with_source(table)


def _published(path: Path, config: FineTune) -> pa.Table | None:
    """The rows of a Parquet file with ids and messages, as a version has; None of any other."""
    import pyarrow.parquet as pq

    if path.suffix != ".parquet" or not path.is_file():
        return None
    try:
        names = pq.read_schema(path).names
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path} is not Parquet: give a curated version's folder") from error
    known = ["id", "messages", "tools", "source", PUBLISHED_SOURCE, config.reference_column]
    known += [] if config.weight_column is None else [config.weight_column]
    missing = {"id", "messages"} - set(names)
    if missing and set(names) <= set(known) - {"messages"}:
        raise ValueError(f"{path} has no column {sorted(missing)}: give a curated version")
    if missing:
        return None
    wanted = [name for name in known if name in names]
    return _checked(pq.read_table(path, columns=wanted), str(path))


def _ingested(paths: Sequence[Path], weight: str | None) -> pa.Table:
    """Rows of files of any format, identical ones once, with the largest of their weights.

    Args:
        paths: The files.
        weight: Column of weights, which is in the table if any row has one.
    """
    from siftline.ingest.pool import collapse
    from siftline.ingest.readers import Source, read_sources

    tables, aside, lost, bad = [], 0, 0, 0
    weights: dict[str, float] = {}
    for batch in read_sources([Source(str(path)) for path in paths]):
        good = pa.array([not rejected for rejected in batch.rejected], pa.bool_())
        tables.append(batch.rows.filter(good))
        bad += sum(batch.rejected)
        lost += batch.quarantine.num_rows
        aside += sum(batch.aside.values())
        if weight is not None:
            weights |= _weights_left_over(batch.provenance, weight, weights)
    rows = collapse(pa.concat_tables(tables))
    if not rows.num_rows:
        raise ValueError(f"{paths[0]}: none of its {lost + bad} rows can be trained on")
    again = sum(table.num_rows for table in tables) - rows.num_rows
    if lost or bad or aside or again:
        logger.warning(
            "%d rows to train on; left out: %d that are no conversation, %d labelled bad, %d "
            "identical; %d values stand in columns that are not read",
            rows.num_rows, lost, bad, again, aside,
        )  # fmt: skip
    rows = rows.select(["id", "messages", "tools", "source"])
    if not weights:
        return rows
    column = [weights.get(identity) for identity in rows["id"].to_pylist()]
    return rows.append_column(weight, pa.array(column, pa.float64()))


def _weights_left_over(
    provenance: pa.Table, name: str, before: Mapping[str, float]
) -> dict[str, float]:
    """Numbers of a column that no field of a row used, by id."""
    found: dict[str, float] = {}
    places = provenance.select(["id", "leftover"]).to_pydict()
    for identity, text in zip(places["id"], places["leftover"], strict=True):
        value = json.loads(text).get(name) if text else None
        if value is not None:
            known = found.get(identity, before.get(identity, -math.inf))
            found[identity] = max(known, _weight(value, name, identity))
    return found


def _weight(value: Any, name: str, identity: str) -> float:
    """A row's weight as a number.

    Raises:
        ValueError: if it is none, or not above 0.
    """
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not 0 < number < math.inf:
        raise ValueError(
            f"row {identity} has {name} {value!r}: give a number above 0, or set weight_column to "
            "another column or to null"
        )
    return number


def row_weights(table: pa.Table, ids: Sequence[str], name: str | None) -> np.ndarray:
    """Loss weights of rows by id, 1 where none is given; shape (n,).

    Raises:
        ValueError: if one is not a number above 0.
    """
    if name is None or name not in table.column_names:
        return np.ones(len(ids))
    given = dict(zip(*_columns(table, name), strict=True))
    told = [given[identity] for identity in ids]
    return np.array(
        [1.0 if w is None else _weight(w, name, i) for i, w in zip(ids, told, strict=True)]
    )


def _checked(table: pa.Table, name: str) -> pa.Table:
    """The table, its ids and messages of the types that a curated version has."""
    identity, messages = table.schema.field("id").type, table.schema.field("messages").type
    if not _text(identity):
        raise ValueError(f"{name}: column id is {identity}: ids are strings")
    listed = pa.types.is_list(messages) or pa.types.is_large_list(messages)
    turn = messages.value_type if listed else pa.null()
    parts = {part.name: part.type for part in turn} if pa.types.is_struct(turn) else {}
    if not _text(parts.get("role")) or not _text(parts.get("content")):
        raise ValueError(
            f"{name}: column messages is {messages}: give a list of role and content, as a curated "
            "version has it"
        )
    return table


def _text(kind: pa.DataType | None) -> bool:
    tests = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    return kind is not None and any(test(kind) for test in tests)


def with_source(table: pa.Table) -> pa.Table:
    """A published table whose source column, if it has one, goes by the name it has in a pool."""
    renamed = {PUBLISHED_SOURCE: "source"}
    return table.rename_columns([renamed.get(name, name) for name in table.column_names])


def lay_out(tokenizer: Any, table: pa.Table, config: FineTune, seed: int, devices: int) -> Schedule:
    """Every forward pass of a run; see `schedule`."""
    rows = tokenize_rows(table, tokenizer, config.max_length)
    parts = config.accumulation * devices
    if config.phases:
        of = dict(zip(*_columns(table, "source"), strict=True))
        total = round(config.epochs * int(rows.loss_tokens.sum()))
        return phase_schedule(
            rows,
            [of[identity] or "" for identity in rows.ids],
            config.phases,
            loss_tokens=config.loss_tokens or total,
            steps=config.steps,
            batch_rows=config.batch_rows,
            parts=parts,
            seed=seed,
        )
    if config.loss_tokens is None or config.steps is None:
        return epochs_schedule(
            rows, epochs=config.epochs, batch_rows=config.batch_rows, parts=parts, seed=seed
        )
    return budget_schedule(
        rows, loss_tokens=config.loss_tokens, steps=config.steps, parts=parts, seed=seed
    )


def training_passes(
    schedule: Schedule,
    table: pa.Table,
    tokenizer: Any,
    config: FineTune,
    seed: int,
    references: Mapping[str, float] | None,
) -> Passes:
    """The passes of a run, with what the objective wants to know of each row."""
    ids = schedule.rows.ids
    weights = row_weights(table, ids, config.weight_column)
    if config.source_balance:
        of = dict(zip(*_columns(table, "source"), strict=True))
        seen = np.concatenate(schedule.passes)
        named = np.array([str(of[identity]) for identity in ids])
        # A loss of rows has nothing to do with their tokens.
        by_row = config.objective == "poft"
        tokens = weights * (np.ones(len(ids)) if by_row else schedule.rows.loss_tokens)
        weights[seen] *= balanced(named[seen], tokens[seen], config.source_balance)
    known = None
    if config.objective == "poft":
        if references is None:
            references = _reference_column(table, config.reference_column)
        known = references_of(ids, references)
    corruption = None
    if config.mask_rate:
        corruption = Corruption(
            config.mask_rate,
            allowed_tokens(tokenizer),
            np.array(sorted(set(tokenizer.all_special_ids))),
            seed,
        )
    return Passes(schedule, weights, config.prompt_weight, known, corruption)


def _reference_column(table: pa.Table, name: str) -> dict[str, float]:
    if name not in table.column_names:
        raise ValueError(
            f"the data has no column {name!r}: objective poft needs each row's mean "
            "log-probability under the reference models; write it there, or train the arms of a "
            "recipe, which take it from training.reference"
        )
    return dict(zip(*_columns(table, name), strict=True))


def _columns(table: pa.Table, name: str) -> tuple[list[str], list[Any]]:
    if name not in table.column_names:
        raise ValueError(f"the data has no column {name!r}, which this configuration needs")
    return table.column("id").to_pylist(), table.column(name).to_pylist()


def dev_passes(
    dev: Sequence[Path] | pa.Table | None, tokenizer: Any, config: FineTune, train: Schedule
) -> Passes | None:
    """Dev rows by length, in passes no larger than the largest of training."""
    if dev is None:
        if config.keep == "best":
            raise ValueError("keep is 'best', but there are no dev rows: give them, or keep last")
        return None
    rows = tokenize_rows(read_rows(dev, config), tokenizer, config.max_length)
    lengths = np.diff(train.rows.offsets)
    most = max(int(lengths[part].sum()) for part in train.passes)
    return Passes(length_schedule(rows, most), np.ones(len(rows.ids)))
