"""Responses without their prompts are asked once, whatever rows and buckets they are of."""

import hashlib

import numpy as np
import polars as pl
import pyarrow as pa
import pytest

from siftline.rows.schema import ROW, bucket_of, make_row, message
from siftline.scoring.engines.base import Inspection, ModelSpec
from siftline.scoring.measures.likelihood import (
    COLUMNS,
    PLAIN,
    RECORD,
    Likelihood,
    _question,
    _scorer,
    alone_bucket,
    score_likelihood,
)
from siftline.scoring.recorder import Recorder
from siftline.scoring.spans import unconditional
from siftline.stages.context import by_store_bucket
from siftline.stages.scores import score_buckets
from siftline.store.store import BUCKETS, score_key

REPLIES = ("It is 2.", "Yes.", "No, it never was.")


def table_of(rows=60, plain=2):
    """Rows that share three responses, some that share none, and texts without a prompt."""
    made = []
    for i in range(rows):
        reply = REPLIES[i % 3] if i % 4 else f"Only here, {i}."
        made.append(make_row([message("user", f"Question {i}?"), message("assistant", reply)]))
    made += [make_row([message("assistant", f"Text {i}.")]) for i in range(plain)]
    return pa.Table.from_pylist(sorted(made, key=lambda row: row["id"]), schema=ROW)


class Engine:
    """Numbers made of the tokens alone; remembers what it was asked."""

    details = frozenset(["top1"])
    max_length = 400

    def __init__(self, tokenizer):
        self.tokenizer, self.asked = tokenizer, []

    def fingerprint(self):
        return "f" * 64

    def inspect(self, tokens, spans, wanted):
        found = []
        for row, (start, end) in zip(tokens, spans, strict=True):
            self.asked.append((tuple(row), start, end))
            seed = int.from_bytes(hashlib.blake2b(repr(row).encode(), digest_size=4).digest())
            logprobs = -np.random.default_rng(seed).random(end - start).astype(np.float32)
            top1 = logprobs > -0.5 if "top1" in wanted else None
            found.append(Inspection(logprobs, None, top1, None))
        return found


@pytest.fixture
def recorder(tokenizer, tmp_path):
    def make(name="store"):
        spec = ModelSpec("none", batch_tokens=300, max_length=400)
        return Recorder(Engine(tokenizer), spec, tmp_path / name)

    return make


def scored(recorders, table, asked=PLAIN, advance=lambda rows: None):
    buckets = by_store_bucket(lambda _: table, 1)
    parts = list(score_buckets(recorders, buckets, asked, advance))
    failed = {i: reason for _, (_, reasons) in parts for i, reason in reasons.items()}
    return pl.concat([pl.DataFrame(schema=COLUMNS), *(lines for _, (lines, _) in parts)]), failed


def by_bucket(one, table, asked=PLAIN):
    frames = [pl.DataFrame(schema=COLUMNS)]
    for bucket, rows in by_store_bucket(lambda _: table, 1):
        lines, failed = score_likelihood(one, bucket, rows, asked)
        assert not failed
        frames.append(lines)
    return pl.concat(frames)


def keys_of(recorder, table):
    """Keys of all questions: with prompts by row, and without."""
    given, alone = {}, {}
    for row in table.to_pylist():
        question = _question(recorder, row, PLAIN)
        twin = unconditional(recorder.engine.tokenizer, *question)
        given[row["id"]] = score_key(question[0], *question[1]), question
        alone[row["id"]] = score_key(twin[0], *twin[1]), twin
    return given, alone


@pytest.mark.parametrize("details", [(), ("top1",)])
def test_equal_responses_are_computed_once(recorder, details):
    table, asked = table_of(), Likelihood(details=details)
    one, reported = recorder(), []
    frame, failed = scored([one], table, asked, reported.append)
    given, alone = keys_of(one, table)
    homes = {}
    for row, (key, _) in alone.items():
        homes.setdefault(key, set()).add(bucket_of(row, BUCKETS))
    assert sorted(map(len, homes.values()))[-3] > 4, "shared by few buckets: nothing is shown"
    distinct = len({key for key, _ in given.values()}), len({key for key, _ in alone.values()})
    # A text without a prompt is the same question both ways, unless one of them has details.
    asked_for = sum(distinct) - (0 if details else 2)
    assert len(one.engine.asked) == one.tally.computed == asked_for
    assert details or len(set(one.engine.asked)) == asked_for
    assert (failed, frame.height) == ({}, table.num_rows)
    again, _ = scored([one], table, asked)
    assert len(one.engine.asked) == asked_for
    assert again.equals(frame)


def test_progress_counts_every_row_twice(recorder, tokenizer, tmp_path):
    table, reported = table_of(), []
    spec = ModelSpec("none", batch_tokens=300, max_length=400)
    one = Recorder(Engine(tokenizer), spec, tmp_path, lambda rows, _: reported.append(rows))
    for _ in range(2):
        reported.clear()
        scored([one], table, advance=reported.append)
        assert sum(reported) == 2 * table.num_rows
        assert min(reported) >= 0


def test_one_device_or_two_or_bucket_by_bucket_say_the_same(recorder):
    table = table_of()
    one, two, alone = recorder("one"), recorder("two"), recorder("alone")
    frame, _ = scored([one], table)
    other, _ = scored([two, recorder("two")], table)
    assert other.equals(frame)
    assert by_bucket(alone, table).equals(frame)
    assert len(alone.engine.asked) == len(one.engine.asked)


def test_records_lie_in_the_bucket_of_their_own_key(recorder):
    table, one = table_of(), recorder()
    scored([one], table)
    given, alone = keys_of(one, table)
    (folder,) = one.root.glob("likelihood-*")
    from siftline.store.namespace import NamespaceFolder

    files = NamespaceFolder(folder)
    lying = {b: {k for t in files.tables(b, ["key"]) for k in t["key"].to_pylist()}
             for b in range(BUCKETS)}  # fmt: skip
    for row, (key, _) in given.items():
        assert key in lying[bucket_of(row, BUCKETS)]
    prompted = {key for key, _ in given.values()}
    for key, _ in alone.values():
        homes = [b for b in lying if key in lying[b]]
        assert homes == [alone_bucket(key)] or key in prompted
    assert not list(one.root.glob(".responses*"))


def test_what_earlier_versions_recorded_is_found(recorder):
    """They kept a response in the bucket of each row that ends in it."""
    table, one = table_of(), recorder()
    given, alone = keys_of(one, table)
    for bucket, rows in by_store_bucket(lambda _: table, 1):
        questions = {}
        for row in rows["id"].to_pylist():
            for key, question in (given[row], alone[row]):
                questions[key] = (len(question[0]), question)
        one.ask("likelihood", 1, {}, RECORD, bucket, questions, _scorer(one.engine, ()))
    before = len(one.engine.asked)
    frame, failed = scored([one], table)
    assert (len(one.engine.asked), failed) == (before, {})
    assert one.tally.found > table.num_rows
    fresh, _ = scored([recorder("fresh")], table)
    assert fresh.equals(frame)


def test_a_response_without_an_answer_fails_all_its_rows(recorder):
    class Losing(Engine):
        def inspect(self, tokens, spans, wanted):
            found = super().inspect(tokens, spans, wanted)
            lost = [
                start < 3 and len(row) < 30 for row, (start, _) in zip(tokens, spans, strict=True)
            ]
            return [
                Inspection(np.array([np.nan]), None, None, None) if gone else one
                for gone, one in zip(lost, found, strict=True)
            ]

    table, one = table_of(plain=0), recorder()
    losing = Recorder(Losing(one.engine.tokenizer), one.spec, one.root)
    frame, failed = scored([losing], table)
    assert failed
    assert set(failed.values()) == {"not_finite"}
    assert set(failed) | set(frame["id"]) == set(table["id"].to_pylist())
    healed, none = scored([one], table)  # nothing of the failure is recorded
    assert (healed.height, none) == (table.num_rows, {})
