"""What one pass says of a row: by numbers worked out by hand, and by a plain forward in float64."""

import math
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, PhiConfig, PhiForCausalLM

from siftline.rows.schema import ROW, make_row, message
from siftline.scoring.engines.base import DETAILS, ModelSpec, open_engine, positions
from siftline.scoring.measures.likelihood import Likelihood, score_likelihood
from siftline.scoring.recorder import Recorder

VOCAB = 259
EOS = 1
LN2 = math.log(2)
PLAIN_TEMPLATE = (
    "{% for m in messages %}{{ m.content }}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)
TABLE = {
    "$": {"b": 1 / 16, "a": 1 / 2, "c": 7 / 16},
    "a": {"b": 1 / 2, "c": 1 / 4, "a": 1 / 4},
    "b": {"a": 1 / 2, "c": 1 / 4, "$": 1 / 4},
    "c": {"a": 1 / 2, "b": 1 / 4, "c": 1 / 8, "$": 1 / 8},
    "d": {"a": 1 / 2, "b": 1 / 2},
}
"""Probability of the next letter after each; $ is the end of sequence and stands at the start."""


class Toy(NamedTuple):
    engine: object
    spec: ModelSpec
    ids: dict[str, int]

    def row(self, text):
        return [self.ids[letter] for letter in text]


@pytest.fixture(scope="module")
def toy(tiny, tmp_path_factory):
    """A Llama whose logits are the logarithms of TABLE and whose states are one letter each.

    Attention and MLP add nothing, so the last state is the normed embedding of the token: one-hot
    times sqrt(width). The head divides that out again.
    """
    folder = tiny.make_model(tmp_path_factory.mktemp("toy") / "model", template=PLAIN_TEMPLATE)
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = tiny.make_tokenizer()
    ids = {letter: EOS if letter == "$" else tokenizer.encode(letter)[0] for letter in TABLE}
    width = model.config.hidden_size
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.norm.weight.fill_(1.0)
        model.model.embed_tokens.weight.zero_()
        model.lm_head.weight.fill_(-1e4)  # a weight of -inf would give 0 * -inf
        for column, (letter, following) in enumerate(TABLE.items()):
            model.model.embed_tokens.weight[ids[letter], column] = 100.0  # the epsilon is nothing
            for target, probability in following.items():
                logit = math.log(probability) / math.sqrt(width)
                model.lm_head.weight[ids[target], column] = logit
    model.save_pretrained(folder)
    spec = ModelSpec(str(folder), device="cpu", max_length=64)
    engine = open_engine(spec)
    yield Toy(engine, spec, ids)
    engine.close()


def test_the_toy_model_by_hand(toy):
    # Bits of "abc$": 1, 2 and 3; bits of what stands before each: 1.5, 1.5 and 1.75.
    (found,) = toy.engine.inspect([toy.row("abc$")], [(1, 4)], DETAILS)
    np.testing.assert_allclose(found.logprobs, [-1 * LN2, -2 * LN2, -3 * LN2], atol=1e-5)
    np.testing.assert_allclose(found.entropy, [1.5 * LN2, 1.5 * LN2, 1.75 * LN2], atol=1e-5)
    assert found.top1.tolist() == [True, False, False]
    assert (found.logprobs.dtype, found.entropy.dtype) == (np.float32, np.float32)
    assert found.top1.dtype == bool
    # Each state is one letter: position p adds weight p to it. Squares: 1 + 4 + 9 + 16 = 30.
    columns = [list(TABLE).index(letter) for letter in "abc$"]
    expected = np.zeros(32)
    expected[columns] = np.array([1, 2, 3, 4]) / math.sqrt(30)
    np.testing.assert_allclose(found.pooled, expected, atol=1e-6)


def test_a_letter_that_comes_back_adds_its_weights(toy):
    (found,) = toy.engine.inspect([toy.row("aba")], [(2, 3)], ["pooled"])
    a, b = (list(TABLE).index(letter) for letter in "ab")
    assert found.pooled[a] == pytest.approx(4 / math.sqrt(20), abs=1e-6)  # positions 1 and 3
    assert found.pooled[b] == pytest.approx(2 / math.sqrt(20), abs=1e-6)
    assert (found.entropy, found.top1) == (None, None)


def test_likelihood_table_by_hand(toy, tmp_path):
    rows = [make_row([message("user", "a"), message("assistant", "bc")])]
    rows.append(make_row([message("user", "d"), message("assistant", "a")]))
    table = pa.Table.from_pylist(sorted(rows, key=lambda r: r["id"]), schema=ROW)
    recorder = Recorder(toy.engine, toy.spec, tmp_path)
    frame, failed = score_likelihood(recorder, 0, table, Likelihood(details=DETAILS))
    assert failed == {}
    by_id = {line["id"]: line for line in frame.to_dicts()}
    # "bc$" after "a": 1 + 2 + 3 bits; behind the start token 4 + 2 + 3.
    expected = {
        "n_tokens": 3,
        "logprob_sum": -6 * LN2,
        "logprob_mean": -2 * LN2,
        "logprob_mean_unconditional": -3 * LN2,
        "perplexity": 4.0,
        "ifd_loss_ratio": 2 / 3,
        "ifd_perplexity_ratio": 4 / 8,
        "entropy_mean": (1.5 + 1.5 + 1.75) / 3 * LN2,
        "top1_rate": 1 / 3,
    }
    line = by_id[rows[0]["id"]]
    assert {name: line[name] for name in expected} == pytest.approx(expected, abs=1e-5)
    # "a$" after "d": 1 bit (a tie, which is a hit) and -log2 of a letter that TABLE rules out.
    line = by_id[rows[1]["id"]]
    assert line["logprob_sum"] < -1e4
    assert (line["perplexity"], line["ifd_perplexity_ratio"]) == (math.inf, pytest.approx(1))
    assert line["top1_rate"] == 1 / 2


def test_the_two_ifds_rank_rows_differently(toy, tmp_path):
    # "ab$" after "a" takes 2 + 1 + 2 bits and alone 1 + 1 + 2; "c$" takes 2 + 3 and log2(16/7) + 3.
    rows = {r: make_row([message("user", "a"), message("assistant", r)]) for r in ("ab", "c")}
    table = pa.Table.from_pylist(list(rows.values()), schema=ROW)
    frame, _ = score_likelihood(Recorder(toy.engine, toy.spec, tmp_path), 0, table)
    found = {line["id"]: line for line in frame.to_dicts()}
    long, short = (found[row["id"]] for row in rows.values())
    assert long["ifd_loss_ratio"] == pytest.approx(5 / 4, abs=1e-5)
    assert short["ifd_loss_ratio"] == pytest.approx(5 / (3 + math.log2(16 / 7)), abs=1e-5)
    assert long["ifd_perplexity_ratio"] == pytest.approx(2 ** (1 / 3), abs=1e-5)
    assert short["ifd_perplexity_ratio"] == pytest.approx(math.sqrt(7 / 4), abs=1e-5)
    assert long["ifd_loss_ratio"] > short["ifd_loss_ratio"]
    assert long["ifd_perplexity_ratio"] < short["ifd_perplexity_ratio"]


@pytest.mark.parametrize("target", ["a", "b"])
def test_every_token_of_a_tie_is_a_hit(toy, target):
    (found,) = toy.engine.inspect([toy.row("d" + target)], [(1, 2)], ["top1"])
    assert found.top1.tolist() == [True]
    (found,) = toy.engine.inspect([toy.row("dc")], [(1, 2)], ["top1"])
    assert found.top1.tolist() == [False]


def test_likelihood_of_all_turns_by_hand(toy, tmp_path):
    talk = [message(("user", "assistant")[i % 2], text) for i, text in enumerate("abcb")]
    table = pa.Table.from_pylist([make_row(talk)], schema=ROW)
    both, last = Likelihood(turns="all", details=("top1",)), Likelihood()
    recorder = Recorder(toy.engine, toy.spec, tmp_path)
    # "ab$cb$": b after a 1, $ after b 2, b after c 2, $ after b 2; alone $ b $ b $: 4 + 2 + 4 + 2.
    (line,) = score_likelihood(recorder, 0, table, both)[0].to_dicts()
    assert line["n_tokens"] == 4
    assert line["logprob_sum"] == pytest.approx(-7 * LN2, abs=1e-5)
    assert line["logprob_mean_unconditional"] == pytest.approx(-3 * LN2, abs=1e-5)
    assert line["top1_rate"] == 1 / 4
    (line,) = score_likelihood(recorder, 0, table, last)[0].to_dicts()
    assert line["n_tokens"] == 2
    assert line["logprob_sum"] == pytest.approx(-4 * LN2, abs=1e-5)
    assert line["logprob_mean_unconditional"] == pytest.approx(-3 * LN2, abs=1e-5)


def test_rows_the_model_is_too_short_for_are_too_long_and_not_refused(toy, tmp_path, tiny):
    model = AutoModelForCausalLM.from_pretrained(toy.spec.path)
    model.config.max_position_embeddings = 16
    model.save_pretrained(tmp_path / "short")
    tiny.make_tokenizer(template=PLAIN_TEMPLATE).save_pretrained(tmp_path / "short")
    spec = ModelSpec(str(tmp_path / "short"), device="cpu", max_length=64)
    rows = [make_row([message("user", "a" * n), message("assistant", "b")]) for n in (14, 15)]
    table = pa.Table.from_pylist(rows, schema=ROW)
    recorder = Recorder(open_engine(spec), spec, tmp_path / "store")
    frame, failed = score_likelihood(recorder, 0, table)
    assert frame["id"].to_list() == [rows[0]["id"]]
    assert failed == {rows[1]["id"]: "too_long"}


# Random models against a plain forward


class Naive(NamedTuple):
    """What a plain forward of one unpadded row in float64 says."""

    logprobs: np.ndarray
    entropy: np.ndarray
    gap: np.ndarray  # logit of the token below the largest
    pooled: np.ndarray


@torch.inference_mode()
def naive(model, row, span):
    out = model(torch.tensor([row]), output_hidden_states=True)
    where = positions(span)
    logits = out.logits[0, where - 1]
    logprobs = logits.log_softmax(dim=1)
    target = torch.tensor([row[i] for i in where])[:, None]
    # xlogy knows that 0 log 0 is 0.
    entropy = -torch.special.xlogy(logprobs.exp(), logprobs.exp()).sum(dim=1)
    states = out.hidden_states[-1][0].numpy()
    pooled = sum((i + 1) * state for i, state in enumerate(states))
    return Naive(
        logprobs.gather(1, target)[:, 0].numpy(),
        entropy.numpy(),
        (logits.amax(dim=1) - logits.gather(1, target)[:, 0]).numpy(),
        pooled / np.linalg.norm(pooled),
    )


def assert_agrees(found, expected):
    np.testing.assert_allclose(found.logprobs, expected.logprobs, rtol=0, atol=1e-4)
    np.testing.assert_allclose(found.entropy, expected.entropy, rtol=0, atol=1e-4)
    clear = (expected.gap == 0) | (expected.gap > 1e-4)
    assert (found.top1 == (expected.gap == 0))[clear].all()
    np.testing.assert_allclose(found.pooled, expected.pooled, rtol=0, atol=1e-5)


def random_jobs(n, seed, low=4, high=60):
    """Rows of random tokens, each with two stretches."""
    rng = np.random.default_rng(seed)
    rows = [rng.integers(3, VOCAB, rng.integers(low, high)).tolist() for _ in range(n)]
    return rows, [tuple(np.sort(rng.integers(1, len(r) + 1, 4)).tolist()) for r in rows]


def likely_jobs(model, n, seed):
    """Rows in which every second token is the likeliest one, so that top-1 hits are not rare."""
    rows, _ = random_jobs(n, seed)
    for row in rows:
        for i in range(2, len(row), 2):
            row[i] = int(model(torch.tensor([row[:i]])).logits[0, -1].argmax())
    return rows, [(1, len(row)) for row in rows]


@pytest.fixture(scope="module")
def engine(tiny_model):
    engine = open_engine(ModelSpec(str(tiny_model), device="cpu"))
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def double(tiny_model):
    return AutoModelForCausalLM.from_pretrained(tiny_model).double().eval()


def test_all_details_are_those_of_a_plain_forward(engine, double):
    rows, spans = likely_jobs(double, 12, seed=0)
    found = engine.inspect(rows, spans, DETAILS)
    for row, span, one in zip(rows, spans, found, strict=True):
        assert_agrees(one, naive(double, row, span))
    rate = np.concatenate([one.top1 for one in found]).mean()
    assert 0.3 < rate < 0.9


def test_details_do_not_see_padding(engine, double):
    rows, spans = random_jobs(4, seed=1, high=12)
    long, long_spans = random_jobs(4, seed=2, low=120, high=200)
    together = engine.inspect([*long, *rows], [*long_spans, *spans], DETAILS)[len(long) :]
    for row, span, padded in zip(rows, spans, together, strict=True):
        (alone,) = engine.inspect([row], [span], DETAILS)
        expected = naive(double, row, span)
        assert_agrees(alone, expected)
        assert_agrees(padded, expected)


def test_asking_for_less_changes_no_log_probability(engine):
    rows, spans = random_jobs(10, seed=3)
    plain = engine.score(rows, spans)
    for wanted in ([], *([detail] for detail in DETAILS), DETAILS):
        for one, other in zip(plain, engine.inspect(rows, spans, wanted), strict=True):
            np.testing.assert_allclose(one, other.logprobs, rtol=0, atol=1e-5)
            given = {detail for detail in DETAILS if getattr(other, detail) is not None}
            assert given == set(wanted)
    pooled = [one.pooled for one in engine.inspect(rows, spans, ["pooled"])]
    np.testing.assert_allclose(engine.embed(rows), pooled, atol=1e-6)


JOBS = st.lists(
    st.lists(st.integers(3, VOCAB - 1), min_size=2, max_size=24).flatmap(
        lambda row: st.tuples(
            st.just(row),
            st.lists(st.integers(1, len(row)), min_size=2, max_size=6)
            .filter(lambda cuts: len(cuts) % 2 == 0)
            .map(lambda cuts: tuple(sorted(cuts))),
        )
    ),
    min_size=1,
    max_size=5,
)
quick = settings(
    deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@quick
@given(jobs=JOBS)
def test_entropy_lies_between_nothing_and_the_log_of_the_vocabulary(engine, jobs):
    rows, spans = zip(*jobs, strict=True)
    for span, found in zip(spans, engine.inspect(rows, spans, DETAILS), strict=True):
        shape = (len(positions(span)),)
        assert found.logprobs.shape == found.entropy.shape == found.top1.shape == shape
        assert (found.logprobs <= 1e-6).all()
        assert (found.entropy >= 0).all()
        assert (found.entropy <= math.log(VOCAB) + 1e-5).all()
        # The likeliest token has at least the mean log-probability, which is minus the entropy.
        assert (found.logprobs[found.top1] >= -found.entropy[found.top1] - 1e-5).all()
        assert np.linalg.norm(found.pooled) == pytest.approx(1, abs=1e-5)


@quick
@given(jobs=JOBS, data=st.data())
def test_permuted_rows_give_permuted_answers(engine, jobs, data):
    rows, spans = zip(*jobs, strict=True)
    order = data.draw(st.permutations(range(len(jobs))))
    found = engine.inspect(rows, spans, DETAILS)
    permuted = engine.inspect([rows[i] for i in order], [spans[i] for i in order], DETAILS)
    for place, i in enumerate(order):
        for name in ("logprobs", "entropy", "pooled"):
            one, other = getattr(permuted[place], name), getattr(found[i], name)
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)


@quick
@given(jobs=JOBS)
def test_several_stretches_are_single_ones_in_a_row(engine, jobs):
    rows, spans = zip(*jobs, strict=True)
    for row, span, found in zip(rows, spans, engine.inspect(rows, spans, DETAILS), strict=True):
        pairs = list(zip(span[::2], span[1::2], strict=True))
        single = engine.inspect([row] * len(pairs), pairs, DETAILS)
        for name in ("logprobs", "entropy"):
            expected = np.concatenate([getattr(one, name) for one in single])
            np.testing.assert_allclose(getattr(found, name), expected, rtol=0, atol=1e-5)
        assert len(found.top1) == sum(len(one.top1) for one in single)
        np.testing.assert_allclose(found.pooled, single[0].pooled, atol=1e-5)


def test_empty_spans_and_no_rows_have_nothing_but_the_pooled_state(engine):
    rows = [[5, 6, 7], [8, 9, 10, 11], [12]]
    empty = engine.inspect(rows, [(2, 2), (1, 1, 4, 4), (1, 1)], DETAILS)
    for found in empty:
        assert (len(found.logprobs), len(found.entropy), len(found.top1)) == (0, 0, 0)
    np.testing.assert_allclose([one.pooled for one in empty], engine.embed(rows), atol=1e-6)
    assert engine.inspect([], [], DETAILS) == []
    assert engine.inspect([], [], []) == []
    assert [one.tolist() for one in engine.score(rows[:1], [(1, 1)])] == [[]]


def test_tokens_a_model_rules_out_give_no_nan(tiny, tmp_path):
    """A bias of -inf behind the projection: the one place where weights can say so."""
    ruled_out = slice(100, 150)
    config = PhiConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        pad_token_id=0,
        eos_token_id=EOS,
        bos_token_id=None,
        initializer_range=0.5,
    )
    torch.manual_seed(0)
    model = PhiForCausalLM(config).eval()
    with torch.no_grad():
        model.lm_head.bias[ruled_out] = -math.inf
    model.save_pretrained(tmp_path)
    tiny.make_tokenizer().save_pretrained(tmp_path)
    engine = open_engine(ModelSpec(str(tmp_path), device="cpu"))
    rows, _ = random_jobs(4, seed=5)
    rows = [[t if t < 100 else 20 for t in row] for row in rows]
    rows[0][3] = 120
    spans = [(1, len(row)) for row in rows]
    found = engine.inspect(rows, spans, DETAILS)
    for row, span, one in zip(rows, spans, found, strict=True):
        assert_agrees(one, naive(model.double(), row, span))
        assert np.isfinite(one.entropy).all()
    assert found[0].logprobs[2] == -math.inf
    assert np.isfinite(np.delete(found[0].logprobs, 2)).all()
