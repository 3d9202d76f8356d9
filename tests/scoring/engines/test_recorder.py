"""Scorers through a real tiny model and a store: asked once, right, and never by name or path."""

import math
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from siftline.kernels.draws import hash64
from siftline.rows.schema import ROW, make_row, message
from siftline.scoring.engines.base import Failed, Inspection, ModelSpec, Sampling, open_engine
from siftline.scoring.measures.consistency import (
    VERDICTS,
    final_answer,
    prompts_of,
    reflect,
    sampled_answers,
)
from siftline.scoring.measures.embed import embed_texts
from siftline.scoring.measures.likelihood import COLUMNS, Likelihood, score_likelihood
from siftline.scoring.measures.samples import draw_samples
from siftline.scoring.recorder import Recorder, Tally
from siftline.scoring.spans import response_span, start_token

SAMPLING = Sampling(max_new_tokens=12, temperature=1.0)


class Counting:
    """Passes every call on to an engine and counts the rows it was asked for."""

    def __init__(self, engine):
        self.engine, self.asked = engine, 0
        self.tokenizer, self.max_length = engine.tokenizer, engine.max_length

    def fingerprint(self):
        return self.engine.fingerprint()

    def inspect(self, tokens, spans, wanted):
        self.asked += len(tokens)
        return self.engine.inspect(tokens, spans, wanted)

    def choices(self, prompts, options):
        self.asked += len(prompts)
        return self.engine.choices(prompts, options)

    def generate(self, prompts, seeds, sampling):
        self.asked += sum(map(len, seeds))
        return self.engine.generate(prompts, seeds, sampling)

    def embed(self, tokens):
        self.asked += len(tokens)
        return self.engine.embed(tokens)


@dataclass
class Bench:
    """An engine with a store of its own."""

    spec: ModelSpec
    engine: Counting
    root: Path

    def recorder(self, **changes):
        fields = {"engine": self.engine, "spec": self.spec, "root": self.root} | changes
        return Recorder(**fields, tally=Tally())

    def asked(self, call):
        """Runs `call(recorder)` and says how many rows the model saw."""
        before = self.engine.asked
        recorder = self.recorder()
        result = call(recorder)
        return result, self.engine.asked - before, recorder.tally


@pytest.fixture(scope="module")
def model(tiny, tmp_path_factory):
    folder = tiny.make_model(tmp_path_factory.mktemp("recorder") / "model")
    spec = ModelSpec(str(folder), device="cpu", max_length=160, batch_tokens=600)
    return spec, Counting(open_engine(spec))


@pytest.fixture
def bench(model, tmp_path):
    return Bench(*model, tmp_path / "store")


def rows_of(*pairs, source="s"):
    rows = [
        make_row([message("user", p), message("assistant", r)], source=source) for p, r in pairs
    ]
    return pa.Table.from_pylist(sorted(rows, key=lambda r: r["id"]), schema=ROW)


PAIRS = [(f"What is {i} + {i}?", f"It is {2 * i}." + " Yes." * (i % 3)) for i in range(9)]


def test_likelihood_agrees_with_the_engine_and_its_unconditional_twin(bench):
    frame, failed = score_likelihood(bench.recorder(), 0, rows_of(*PAIRS))
    assert failed == {}
    assert dict(frame.schema) == COLUMNS
    assert frame["id"].to_list() == sorted(frame["id"].to_list())
    tokenizer = bench.engine.tokenizer
    by_id = {r["id"]: r["messages"] for r in rows_of(*PAIRS).to_pylist()}
    for line in frame.to_dicts():
        tokens, (start, end) = response_span(tokenizer, by_id[line["id"]])
        (given,) = bench.engine.engine.score([tokens], [(start, end)])
        response = tokens[start:end]
        alone = [start_token(tokenizer), *response]
        (twin,) = bench.engine.engine.score([alone], [(1, len(alone))])
        assert line["n_tokens"] == len(response)
        assert response[-1] == tokenizer.eos_token_id
        assert line["logprob_sum"] == pytest.approx(float(given.sum()), abs=1e-3)
        assert line["logprob_mean"] == pytest.approx(float(given.mean()), abs=1e-4)
        assert line["logprob_mean_unconditional"] == pytest.approx(float(twin.mean()), abs=1e-4)
        assert line["perplexity"] == pytest.approx(math.exp(-float(given.mean())), rel=1e-3)
        assert abs(float(given.mean()) - float(twin.mean())) > 1e-3, "the prompt changes nothing"


def test_a_second_call_asks_nothing_and_gives_the_same(bench):
    (first, _), asked, tally = bench.asked(lambda r: score_likelihood(r, 0, rows_of(*PAIRS)))
    assert asked == tally.computed == 2 * len(PAIRS)
    (second, _), asked, tally = bench.asked(lambda r: score_likelihood(r, 0, rows_of(*PAIRS)))
    assert (asked, tally.computed, tally.found) == (0, 0, 2 * len(PAIRS))
    assert second.equals(first)


def test_renamed_sources_fixed_answers_and_other_buckets_of_a_pool_share_keys(bench):
    (first, _), _, _ = bench.asked(lambda r: score_likelihood(r, 3, rows_of(*PAIRS)))
    renamed = rows_of(*PAIRS, source="another")
    (second, _), asked, _ = bench.asked(lambda r: score_likelihood(r, 3, renamed))
    assert asked == 0
    assert not set(first["id"]) & set(second["id"])
    assert set(first["key"]) == set(second["key"])
    by_key = dict(zip(first["key"], first["logprob_sum"], strict=True))
    assert [by_key[k] for k in second["key"]] == second["logprob_sum"].to_list()


def test_added_rows_ask_only_themselves(bench):
    bench.asked(lambda r: score_likelihood(r, 0, rows_of(*PAIRS[:5])))
    _, asked, tally = bench.asked(lambda r: score_likelihood(r, 0, rows_of(*PAIRS[:7])))
    assert asked == 4
    assert (tally.computed, tally.found) == (4, 10)


def test_changed_weights_ask_again_and_a_copied_model_does_not(bench, tiny, tmp_path):
    (first, _), _, _ = bench.asked(lambda r: score_likelihood(r, 0, rows_of(*PAIRS)))

    def with_model(folder):
        spec = replace(bench.spec, path=str(folder))
        other = Bench(spec, Counting(open_engine(spec)), bench.root)
        return other.asked(lambda r: score_likelihood(r, 0, rows_of(*PAIRS)))

    shutil.copytree(bench.spec.path, tmp_path / "copy")
    (same, _), asked, _ = with_model(tmp_path / "copy")
    assert asked == 0
    assert same.equals(first)
    (other, _), asked, _ = with_model(tiny.make_model(tmp_path / "other", seed=1))
    assert asked == 2 * len(PAIRS)
    assert other["logprob_sum"].to_list() != first["logprob_sum"].to_list()
    # What the first model said is still there.
    (again, _), asked, _ = bench.asked(lambda r: score_likelihood(r, 0, rows_of(*PAIRS)))
    assert asked == 0
    assert again.equals(first)


def test_input_order_does_not_move_a_bit(model, tmp_path):
    frames = []
    for i, order in enumerate((slice(None), slice(None, None, -1))):
        table = rows_of(*PAIRS).take(list(range(len(PAIRS)))[order])
        bench = Bench(*model, tmp_path / str(i))
        frames.append(score_likelihood(bench.recorder(), 0, table)[0])
    assert frames[0].equals(frames[1])


def test_too_long_and_not_finite_are_reasons_not_scores(bench):
    table = rows_of(("short", "row"), ("long", "x" * 500))
    ids = {r["messages"][0]["content"]: r["id"] for r in table.to_pylist()}
    frame, failed = score_likelihood(bench.recorder(), 0, table)
    assert failed == {ids["long"]: "too_long"}
    assert frame["id"].to_list() == [ids["short"]]

    class Broken(Counting):
        def inspect(self, tokens, spans, wanted):
            return [Inspection(np.full(b - a, np.nan, np.float32)) for a, b in spans]

    broken = bench.recorder(engine=Broken(bench.engine.engine), root=bench.root / "broken")
    frame, failed = score_likelihood(broken, 0, table)
    assert frame.is_empty()
    assert failed == {ids["long"]: "too_long", ids["short"]: "not_finite"}
    assert broken.tally.failed == 2  # conditional and unconditional
    whole = bench.recorder(root=bench.root / "broken")
    assert score_likelihood(whole, 0, table)[0].height == 1  # a failed row is tried again


def test_plain_text_and_no_rows(bench):
    text = make_row([message("assistant", "once upon a time")])
    (frame, failed), asked, _ = bench.asked(
        lambda r: score_likelihood(r, 0, pa.Table.from_pylist([text], schema=ROW))
    )
    assert failed == {}
    assert asked == 1  # without a prompt the twin is the row itself
    assert frame["logprob_mean"].to_list() == frame["logprob_mean_unconditional"].to_list()
    empty, failed = score_likelihood(bench.recorder(), 0, ROW.empty_table())
    assert dict(empty.schema) == COLUMNS
    assert (empty.height, failed) == (0, {})


def test_a_plain_text_without_its_details_is_a_failed_row(bench):
    """With details it is asked twice under one key, and one of the two may fail alone."""

    class Half(Counting):
        def inspect(self, tokens, spans, wanted):
            found = super().inspect(tokens, spans, wanted)
            return [Failed("no_scores")] * len(tokens) if wanted else found

        details = frozenset(("top1",))

    text = make_row([message("assistant", "once upon a time")])
    table, asked = pa.Table.from_pylist([text], schema=ROW), Likelihood(details=("top1",))
    half = bench.recorder(engine=Half(bench.engine.engine))
    frame, failed = score_likelihood(half, 0, table, asked)
    assert frame.is_empty()
    assert failed == {text["id"]: "no_scores"}
    whole = bench.recorder(engine=bench.engine.engine)
    (line,) = score_likelihood(whole, 0, table, asked)[0].to_dicts()
    assert line["top1_rate"] is not None
    assert line["logprob_mean"] == line["logprob_mean_unconditional"]


# Samples


def prompts_for(bench, *texts):
    table = rows_of(*((text, "-") for text in texts))
    tokens, failed = prompts_of(bench.recorder(), table)
    assert failed == {}
    return tokens


def test_a_draw_is_the_same_whoever_asks_and_beside_whichever(bench, model, tmp_path):
    tokens = prompts_for(bench, "a?", "bb?", "ccc?")
    draws = {p: [0, 1, 2] for p in tokens}

    def draw(recorder, wanted, seed=0, sampling=SAMPLING):
        return draw_samples(recorder, 0, tokens, wanted, sampling, seed)[0]

    frame, asked, _ = bench.asked(lambda r: draw(r, draws))
    assert asked == 9
    assert frame.select("prompt_id", "draw").rows() == [
        (p, j) for p in sorted(tokens) for j in range(3)
    ]
    again, asked, _ = bench.asked(lambda r: draw(r, draws))
    assert asked == 0
    assert again.equals(frame)
    one = sorted(tokens)[1]
    more, asked, _ = bench.asked(lambda r: draw(r, {one: [1, 5]}))
    assert asked == 1, "draw 1 was there"
    alone = draw(Bench(*model, tmp_path / "alone").recorder(), {one: [1, 5]})
    assert alone.equals(more)
    assert more.row(0) == frame.row(4)
    seeds = [hash64(0, one, j) for j in (1, 5)]
    (direct,) = bench.engine.engine.generate([tokens[one]], [seeds], SAMPLING)
    assert [g.text for g in direct] == more["text"].to_list()
    _, asked, _ = bench.asked(lambda r: draw(r, draws, seed=1))
    assert asked == 9
    hot = Sampling(max_new_tokens=12, temperature=0.5)
    _, asked, _ = bench.asked(lambda r: draw(r, draws, sampling=hot))
    assert asked == 9
    assert len(set(frame["text"])) > 5, "draws differ"


def test_what_counts_as_too_long_is_what_the_engine_takes(bench):
    allowing = bench.recorder(spec=replace(bench.spec, max_length=4096))
    tokens, failed = prompts_of(allowing, rows_of(("x" * 500, "-")))
    assert tokens == {}
    assert list(failed.values()) == ["too_long"]


def test_prompts_are_asked_once_and_too_long_ones_are_reasons(bench):
    table = rows_of(("q", "one"), ("q", "two"), ("x" * 400, "r"))
    tokens, failed = prompts_of(bench.recorder(), table)
    assert len(tokens) == 1
    assert list(failed.values()) == ["too_long"]
    assert set(tokens) | set(failed) == set(table.column("prompt_id").to_pylist())


def test_sampled_answers_leave_out_what_was_cut(bench):
    frame, _ = draw_samples(bench.recorder(), 0, prompts_for(bench, "q"), {}, SAMPLING, 0)
    assert sampled_answers(frame, "math") == {}
    lines = [
        {"prompt_id": "p", "draw": 0, "text": "#### 4", "n_tokens": 3, "finish_reason": "stop"},
        {"prompt_id": "p", "draw": 1, "text": "#### 4", "n_tokens": 3, "finish_reason": "length"},
        {"prompt_id": "p", "draw": 2, "text": "no idea", "n_tokens": 3, "finish_reason": "stop"},
    ]
    found = sampled_answers(type(frame)(lines, schema=frame.schema), "math")
    assert found == {"p": [final_answer("#### 4.0", "math"), None, None]}
    assert final_answer("  Ja  nein ", "exact") == "ja nein"
    assert final_answer("  ", "exact") is None


# Embeddings


def test_embeddings_are_unit_vectors_asked_once_per_text(bench):
    texts = {"a": "first text", "b": "second", "c": "first text"}
    (vectors, failed), asked, _ = bench.asked(lambda r: embed_texts(r, 0, texts))
    assert failed == {}
    assert asked == 2, "equal texts are one question"
    assert set(vectors) == set(texts)
    assert np.array_equal(vectors["a"], vectors["c"])
    for vector in vectors.values():
        assert vector.dtype == np.float16
        assert np.linalg.norm(vector.astype(np.float64)) == pytest.approx(1, abs=2e-3)
    tokenizer = bench.engine.tokenizer
    tokens = tokenizer("second", add_special_tokens=False)["input_ids"]
    direct = bench.engine.engine.embed([[start_token(tokenizer), *tokens]])[0]
    assert np.abs(vectors["b"].astype(np.float32) - direct).max() < 1e-3
    (again, _), asked, _ = bench.asked(lambda r: embed_texts(r, 0, {"z": "second"}))
    assert asked == 0
    assert np.array_equal(again["z"], vectors["b"])


def test_long_and_empty_texts_are_embedded_too(bench):
    texts = {"long": "y" * 1000, "cut": "y" * bench.spec.max_length, "empty": ""}
    vectors, failed = embed_texts(bench.recorder(), 0, texts)
    assert failed == {}
    assert np.array_equal(vectors["long"], vectors["cut"])
    assert np.isfinite(vectors["empty"].astype(np.float32)).all()


def test_an_embedder_is_asked_by_text(tmp_path):
    class Embedder:
        asked = 0

        def fingerprint(self):
            return "embedder"

        def embed_texts(self, texts):
            self.asked += len(texts)
            raw = np.array([[len(t), 1.0] for t in texts], np.float32)
            return raw / np.linalg.norm(raw, axis=1, keepdims=True)

    engine = Embedder()
    recorder = Recorder(engine, ModelSpec("x"), tmp_path)
    texts = {"a": "one", "b": "other text"}
    for _ in range(2):
        vectors, failed = embed_texts(recorder, 0, texts)
    assert engine.asked == 2
    assert failed == {}
    assert vectors["a"].astype(np.float32)[0] == pytest.approx(3 / math.sqrt(10), abs=1e-3)


# Verdicts


def test_verdicts_are_log_probabilities_of_the_choices(bench):
    asked_rows = {
        "a": ([message("user", "2+2?"), message("assistant", "5")], "4"),
        "b": ([message("user", "2+2?"), message("assistant", "whatever")], "4"),
        "c": ([message("user", "2+2?"), message("assistant", "5")], "5"),
        "long": ([message("user", "x" * 400), message("assistant", "5")], "5"),
    }
    (found, failed), asked, _ = bench.asked(lambda r: reflect(r, 0, asked_rows))
    assert failed == {"long": "too_long"}
    assert asked == 2, "the last message is ignored, so a and b are one question"
    assert found["a"] == found["b"]
    assert found["a"] != found["c"]
    assert all(len(v) == len(VERDICTS) and max(v) < 0 for v in found.values())
    tokenizer = bench.engine.tokenizer
    text = "2+2?\nProposed answer: 4\nIs the proposed answer correct?\n(A) yes\n(B) no"
    for verdict, got in zip(VERDICTS, found["a"], strict=True):
        tokens, (start, end) = response_span(
            tokenizer, [message("user", text), message("assistant", verdict)]
        )
        (logprobs,) = bench.engine.engine.score([tokens], [(start, end - 1)])
        assert got == pytest.approx(float(logprobs.sum()), abs=1e-3)
    _, asked, _ = bench.asked(lambda r: reflect(r, 0, asked_rows))
    assert asked == 0


def test_progress_counts_every_question(bench):
    seen = []
    recorder = bench.recorder(progress=lambda rows, tokens: seen.append((rows, tokens)))
    score_likelihood(recorder, 0, rows_of(*PAIRS))
    assert sum(rows for rows, _ in seen) == 2 * len(PAIRS)
    assert sum(tokens for _, tokens in seen) == recorder.tally.tokens > 0
    assert len(seen) > 1, "several planned batches"
    seen.clear()
    score_likelihood(recorder, 0, rows_of(*PAIRS))
    assert sum(rows for rows, _ in seen) == 2 * len(PAIRS)
    assert sum(tokens for _, tokens in seen) == 0, "nothing was computed"


class Refusing:
    """Answers questions but those that hold a mark, which it refuses with the whole batch."""

    def fingerprint(self):
        return {"engine": "refusing"}

    def answer(self, batch):
        if any("~" in question for question in batch):
            raise ValueError("no ~ here")
        return [{"value": question} for question in batch]


def asked_of(recorder, questions):
    schema = pa.schema([("key", pa.string()), ("value", pa.string())])
    named = {question: (4, question) for question in questions}
    call = recorder.engine.answer
    return recorder.ask("refusing", 1, {}, schema, 0, named, call)


def test_one_refused_row_alone_in_its_bucket_stops_nothing(tmp_path):
    recorder = Recorder(Refusing(), ModelSpec("m", max_length=64), tmp_path)
    _, failed = asked_of(recorder, ["~ in one order", "~ in the other"])
    assert failed == {"~ in one order": "refused", "~ in the other": "refused"}


def test_a_call_that_is_refused_whole_stops_the_run_unless_the_engine_has_answered(tmp_path):
    refused = [f"~ {i}" for i in range(8)]
    recorder = Recorder(Refusing(), ModelSpec("m", max_length=64), tmp_path)
    with pytest.raises(ValueError, match="no ~ here"):
        asked_of(recorder, refused)
    found, failed = asked_of(recorder, ["a", "b"])
    assert sorted(found["value"]) == ["a", "b"]
    assert not failed
    assert set(asked_of(recorder, refused)[1].values()) == {"refused"}
    # A run of its own has the answers in the store, which say as much.
    later = Recorder(Refusing(), ModelSpec("m", max_length=64), tmp_path)
    asked_of(later, ["a"])
    assert set(asked_of(later, refused)[1]) == set(refused)
