"""The transformers engine against full softmax, by hand and by transformers itself."""

import math
import shutil
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch
from scipy.stats import chisquare
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM

from siftline.rows.schema import ROW, make_row, message
from siftline.scoring.engines.base import DETAILS, Engine, ModelSpec, Sampling, open_engine
from siftline.scoring.engines.transformers_engine import PASS_TOKENS, TransformersEngine
from siftline.scoring.measures.likelihood import score_likelihood
from siftline.scoring.projection import TILES
from siftline.scoring.recorder import Recorder
from siftline.scoring.spans import prompt_tokens, response_span

PROMPT = [{"role": "user", "content": "What is 6 times 7?"}]


@pytest.fixture(scope="module")
def engine(tiny_model):
    engine = TransformersEngine(ModelSpec(str(tiny_model), device="cpu"))
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def reference(tiny_model):
    return AutoModelForCausalLM.from_pretrained(tiny_model).eval()


def random_rows(n, seed=0, low=5, high=40):
    rng = np.random.default_rng(seed)
    return [rng.integers(3, 259, rng.integers(low, high)).tolist() for _ in range(n)]


@torch.inference_mode()
def full_softmax(model, tokens, span):
    probabilities = model(torch.tensor([tokens])).logits[0].double().softmax(dim=1)
    return np.log([float(probabilities[t - 1, tokens[t]]) for t in range(*span)])


@pytest.fixture(scope="module")
def bigram(tiny, tmp_path_factory):
    """A model whose next token depends on the last one alone, by a table written here.

    Attention and MLP outputs are zero, so the final hidden state is the token's normed embedding:
    one-hot embeddings scaled to survive the norm make the head's columns the table of logits.
    """
    folder = tiny.make_model(tmp_path_factory.mktemp("bigram") / "m", hidden=32)
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = tiny.make_tokenizer()
    a, b, c = (tokenizer.encode(letter)[0] for letter in "abc")
    table = {a: {b: 0.5, c: 0.25, a: 0.25}, b: {a: 0.9, 1: 0.1}, c: {c: 0.75, b: 0.25}}
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.norm.weight.fill_(1.0)
        model.model.embed_tokens.weight.zero_()
        model.lm_head.weight.fill_(-1000.0)
        for column, (token, following) in enumerate(table.items()):
            model.model.embed_tokens.weight[token, column] = 100.0  # the norm's epsilon is nothing
            model.lm_head.weight[:, column] = -100.0
            for target, probability in following.items():
                # RMS norm turns a one-hot row of width 32 into sqrt(32).
                model.lm_head.weight[target, column] = math.log(probability) / math.sqrt(32)
    model.save_pretrained(folder)
    engine = TransformersEngine(ModelSpec(str(folder), device="cpu"))
    return engine, (a, b, c)


@pytest.mark.parametrize(
    ("text", "start", "probabilities"),
    [
        ("ab", 1, [0.5]),
        ("aba", 1, [0.5, 0.9]),
        ("abac", 2, [0.9, 0.25]),
        ("accb", 1, [0.25, 0.75, 0.25]),
        ("ab$", 1, [0.5, 0.1]),  # $ stands for end of sequence
        ("aaaa", 3, [0.25]),
    ],
)
def test_bigram_table_by_hand(bigram, text, start, probabilities):
    engine, (a, b, c) = bigram
    tokens = [{"a": a, "b": b, "c": c, "$": 1}[letter] for letter in text]
    (scores,) = engine.score([tokens], [(start, len(tokens))])
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, np.log(probabilities), atol=1e-5)


def test_first_tokens_follow_the_softmax(bigram):
    engine, (a, _, _) = bigram
    draws = engine.generate([[a]], [range(2000)], Sampling(max_new_tokens=1))[0]
    counts = [sum(d.text == letter for d in draws) for letter in "bca"]
    assert sum(counts) == 2000
    assert chisquare(counts, [1000, 500, 500]).pvalue > 0.01
    # At temperature 1/2 probabilities are squared; top_p 0.6 keeps b and one of the 0.25s.
    cold = engine.generate([[a]], [range(2000)], Sampling(max_new_tokens=1, temperature=0.5))[0]
    counts = [sum(d.text == letter for d in cold) for letter in "bca"]
    assert chisquare(counts, [2000 * 4 / 6, 2000 / 6, 2000 / 6]).pvalue > 0.01
    narrow = engine.generate([[a]], [range(300)], Sampling(max_new_tokens=1, top_p=0.4))[0]
    assert {d.text for d in narrow} == {"b"}


def test_end_of_sequence_and_length_end_a_text(bigram):
    engine, (_, b, _) = bigram
    draws = engine.generate([[b]], [range(64)], Sampling(max_new_tokens=4))[0]
    ended = [d for d in draws if d.finish_reason == "stop"]
    assert any(d.text == "" and d.n_tokens == 1 for d in ended)
    assert all(d.text == "" or d.text[0] == "a" for d in draws)
    assert all(d.n_tokens == 4 for d in draws if d.finish_reason == "length")
    assert all(d.n_tokens == len(d.text) + 1 for d in ended)
    assert len(ended) < 64


def test_scores_are_those_of_the_full_softmax(engine, reference):
    rows = random_rows(12)
    spans = [(1 + i % 4, len(row)) for i, row in enumerate(rows)]
    for row, span, scores in zip(rows, spans, engine.score(rows, spans), strict=True):
        assert scores.shape == (span[1] - span[0],)
        np.testing.assert_allclose(scores, full_softmax(reference, row, span), atol=1e-5)


def test_tiles_change_nothing(engine, monkeypatch):
    rows = random_rows(6)
    spans = [(1, len(row)) for row in rows]
    whole = engine.score(rows, spans)
    monkeypatch.setitem(TILES, "cpu", (7, 50))
    for one, other in zip(whole, engine.score(rows, spans), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


def test_prompt_is_excluded_and_end_of_sequence_scored(engine, reference):
    messages = [*PROMPT, {"role": "assistant", "content": "42"}]
    tokens, span = response_span(engine.tokenizer, messages)
    (scores,) = engine.score([tokens], [span])
    assert len(scores) == len(" 42") + 1
    assert tokens[span[1] - 1] == engine.tokenizer.eos_token_id
    expected = full_softmax(reference, tokens, (len(tokens) - 1, len(tokens)))
    np.testing.assert_allclose(scores[-1:], expected, atol=1e-5)


def test_batch_of_one_of_64_and_shuffled_agree(engine):
    rows = random_rows(64, seed=1)
    spans = [(2, len(row)) for row in rows]
    together = engine.score(rows, spans)
    order = np.random.default_rng(2).permutation(64)
    shuffled = engine.score([rows[i] for i in order], [spans[i] for i in order])
    for place, i in enumerate(order):
        alone = engine.score([rows[i]], [spans[i]])[0]
        np.testing.assert_allclose(together[i], alone, atol=1e-5)
        np.testing.assert_allclose(shuffled[place], alone, atol=1e-5)
    again = engine.score(rows, spans)
    assert all(a.tobytes() == b.tobytes() for a, b in zip(together, again, strict=True))


def test_rows_that_do_not_fit_are_refused(tiny_model, engine):
    short = TransformersEngine(ModelSpec(str(tiny_model), device="cpu", max_length=8))
    with pytest.raises(ValueError, match="9 tokens where 1 to 8 fit"):
        short.score([[5] * 9], [(1, 9)])
    with pytest.raises(ValueError, match="8 tokens where 1 to 7 fit"):
        short.generate([[5] * 8], [[0]], Sampling())
    assert short.generate([[5] * 6], [[0]], Sampling())[0][0].n_tokens <= 2
    for span in [(0, 3), (2, 9), (3, 2)]:
        with pytest.raises(ValueError, match="need 1 <= start"):
            engine.score([[5] * 4], [span])


def test_choices_sum_the_continuations(engine, reference):
    prompts = random_rows(3, seed=4)
    for options in ([[10], [20], [30]], [[10, 11], [20]]):
        values = engine.choices(prompts, options)
        assert values.shape == (3, len(options))
        assert values.dtype == np.float32
        for i, prompt in enumerate(prompts):
            for j, option in enumerate(options):
                span = (len(prompt), len(prompt) + len(option))
                expected = full_softmax(reference, [*prompt, *option], span).sum()
                assert values[i, j] == pytest.approx(expected, abs=1e-4)


def test_draws_do_not_depend_on_neighbours(engine):
    prompts = random_rows(10, seed=5)
    seeds = [[100 * i + j for j in range(1 + i % 3)] for i in range(10)]
    sampling = Sampling(max_new_tokens=25, temperature=0.8, top_p=0.95, stop=("e",))
    together = engine.generate(prompts, seeds, sampling)
    assert together == engine.generate(prompts, seeds, sampling)
    assert together[::-1] == engine.generate(prompts[::-1], seeds[::-1], sampling)
    for i in (0, 4, 9):
        alone = [engine.generate([prompts[i]], [[seed]], sampling)[0][0] for seed in seeds[i]]
        assert alone == together[i]
    texts = [draw.text for row in together for draw in row]
    assert len(set(texts)) > len(texts) / 2  # seeds do matter
    assert any(d.finish_reason == "stop" for row in together for d in row)


def test_greedy_text_is_that_of_transformers(engine, reference):
    prompt = prompt_tokens(engine.tokenizer, PROMPT)
    ids = reference.generate(
        torch.tensor([prompt]), do_sample=False, max_new_tokens=30, pad_token_id=0
    )
    expected = engine.tokenizer.decode(ids[0, len(prompt) :], skip_special_tokens=True)
    padded = [*random_rows(1, low=60, high=61), prompt]  # the neighbour forces left padding
    greedy = Sampling(max_new_tokens=30, temperature=0)
    assert engine.generate(padded, [[1], [2]], greedy)[1][0].text == expected


def test_a_stop_string_ends_the_text_before_it(engine):
    prompt = prompt_tokens(engine.tokenizer, PROMPT)
    (free,) = engine.generate([prompt], [[3]], Sampling(max_new_tokens=40))[0]
    stop = next(p for p in (free.text[k : k + 2] for k in range(3, 30)) if p.isascii())
    cut = engine.generate([prompt], [[3]], Sampling(max_new_tokens=40, stop=(stop, "\0")))[0][0]
    assert cut.text == free.text[: free.text.index(stop)]
    assert cut.finish_reason == "stop"
    assert cut.n_tokens <= free.n_tokens


def test_embedding_is_the_position_weighted_mean(engine, reference):
    rows = [random_rows(1, seed=6, low=5, high=6)[0], *random_rows(3, seed=7, low=20)]
    assert len(rows[0]) == 5
    with torch.inference_mode():
        states = reference.model(torch.tensor([rows[0]])).last_hidden_state[0].numpy()
    mean = sum(w / 15 * state for w, state in zip([1, 2, 3, 4, 5], states, strict=True))
    expected = mean / np.linalg.norm(mean)
    alone, padded = engine.embed(rows[:1]), engine.embed(rows)
    assert padded.shape == (4, 32)
    assert padded.dtype == np.float32
    np.testing.assert_allclose(alone[0], expected, atol=1e-5)
    np.testing.assert_allclose(padded[0], expected, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(padded, axis=1), 1, atol=1e-6)


def test_out_of_memory_halves_the_batch_by_rule(tiny_model, monkeypatch):
    engine = TransformersEngine(ModelSpec(str(tiny_model), device="cpu"))
    rows = random_rows(5, seed=8)
    spans = [(1, len(row)) for row in rows]
    expected = engine.score(rows, spans)
    sizes, limit, forward = [], 2, engine.hidden

    def scarce(ids, **options):
        sizes.append(len(ids))
        if len(ids) > limit:
            raise torch.OutOfMemoryError("planted")
        return forward(ids, **options)

    monkeypatch.setattr(engine, "hidden", scarce)
    for one, other in zip(expected, engine.score(rows, spans), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
    assert sizes == [5, 3, 2, 1, 2]
    assert len(engine.generate(rows, [[1]] * 5, Sampling(max_new_tokens=3))) == 5
    limit = 0
    with pytest.raises(RuntimeError, match="single row: lower max_length"):
        engine.score(rows, spans)


@pytest.mark.parametrize("wanted", [(), DETAILS])
def test_no_tensor_of_a_pass_has_the_size_of_tokens_times_vocabulary(engine, wanted, monkeypatch):
    monkeypatch.setitem(TILES, "cpu", (16, 32))
    monkeypatch.setitem(PASS_TOKENS, "cpu", 600)  # one pass, in the thread that is watched
    made = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            made.extend(x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor))
            return out

    rows = random_rows(20, seed=3, low=30, high=31)
    with Sizes():
        engine.inspect(rows, [(1, 30)] * 20, wanted)
    vocabulary = engine.config.vocab_size
    # The widest a pass needs is the MLP: 128 of a token, half of this vocabulary.
    assert max(made) == 20 * 30 * 128
    assert max(made) < 20 * 29 * vocabulary


def test_a_batch_runs_in_passes_of_like_rows_and_answers_in_order(tiny_model, monkeypatch):
    engine = TransformersEngine(ModelSpec(str(tiny_model), device="cpu"))
    rows = random_rows(30, seed=10, low=3, high=60)
    rows.insert(7, random_rows(1, low=150, high=151)[0])  # longer than a pass: alone in one
    spans = [(1, len(row)) for row in rows]
    alone = [engine.score([row], [span])[0] for row, span in zip(rows, spans, strict=True)]
    choices, pooled = engine.choices(rows, [[5], [6]]), engine.embed(rows)
    shapes, forward = [], engine.hidden

    def seen(ids, **options):
        shapes.append(tuple(ids.shape))
        return forward(ids, **options)

    monkeypatch.setattr(engine, "hidden", seen)
    monkeypatch.setitem(PASS_TOKENS, "cpu", 128)
    for one, other in zip(alone, engine.score(rows, spans), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
    assert sum(n for n, _ in shapes) == 31
    assert [n * width for n, width in shapes if n * width > 128] == [150]
    assert len(shapes) < 16
    np.testing.assert_allclose(engine.choices(rows, [[5], [6]]), choices, atol=1e-5)
    np.testing.assert_allclose(engine.embed(rows), pooled, atol=1e-5)


def test_a_model_that_sees_its_padding_is_refused(tiny_model, monkeypatch):
    honest = TransformersEngine.hidden

    def leaky(self, ids, **options):
        return honest(self, ids, **options) + 0.1 * ids.shape[1]

    monkeypatch.setattr(TransformersEngine, "hidden", leaky)
    with pytest.raises(ValueError, match="not a plain causal model"):
        TransformersEngine(ModelSpec(str(tiny_model), device="cpu"))


def test_soft_capped_and_scaled_logits_are_followed(tmp_path, tiny):
    """Gemma 2 caps its logits, Granite divides them: the check at load compares with the model."""
    from transformers import Gemma2Config, Gemma2ForCausalLM, GraniteConfig, GraniteForCausalLM

    shape = {
        "vocab_size": 259,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.5,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": None,
    }
    gemma = Gemma2Config(**shape, head_dim=8, final_logit_softcapping=2.0, sliding_window=16)
    granite = GraniteConfig(**shape, logits_scaling=4.0)
    for config, kind in [(gemma, Gemma2ForCausalLM), (granite, GraniteForCausalLM)]:
        torch.manual_seed(0)
        kind(config).save_pretrained(tmp_path / config.model_type)
        tiny.make_tokenizer().save_pretrained(tmp_path / config.model_type)
        engine = TransformersEngine(ModelSpec(str(tmp_path / config.model_type), device="cpu"))
        model = AutoModelForCausalLM.from_pretrained(tmp_path / config.model_type).eval()
        rows = random_rows(3, seed=9, high=50)
        for row, scores in zip(rows, engine.score(rows, [(1, len(r)) for r in rows]), strict=True):
            expected = full_softmax(model, row, (1, len(row)))
            np.testing.assert_allclose(scores, expected, atol=1e-4)
        greedy = Sampling(max_new_tokens=20, temperature=0)
        together = engine.generate(rows, [[0]] * 3, greedy)
        assert together[0] == engine.generate(rows[:1], [[0]], greedy)[0]


def test_adapter_changes_scores_and_fingerprint(tiny_model, tmp_path, engine):
    from peft import LoraConfig, get_peft_model

    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    lora = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    lora.save_pretrained(tmp_path / "adapter")
    spec = ModelSpec(str(tiny_model), device="cpu", adapter=str(tmp_path / "adapter"))
    adapted = TransformersEngine(spec)
    (row,) = random_rows(1)
    expected = full_softmax(lora.eval(), row, (1, len(row)))
    np.testing.assert_allclose(adapted.score([row], [(1, len(row))])[0], expected, atol=1e-5)
    assert adapted.fingerprint() != engine.fingerprint()


def test_an_adapter_below_home_is_found(tiny_model, tmp_path, monkeypatch, mini):
    from peft import LoraConfig, get_peft_model

    from siftline.stages.models import identity, named_spec
    from siftline.workspace import Workspace

    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    lora = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    lora.save_pretrained(tmp_path / "adapter")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MINE", str(tmp_path))
    spec = ModelSpec(str(tiny_model), device="cpu", adapter=str(tmp_path / "adapter"))
    (row,) = random_rows(1)
    scores = []
    for adapter in (spec.adapter, "~/adapter"):
        adapted = TransformersEngine(replace(spec, adapter=adapter))
        scores.append(adapted.score([row], [(1, len(row))])[0].tolist())
        assert identity(replace(spec, adapter=adapter)) == identity(spec)
    assert scores[0] == scores[1]
    model = f"models.other={{path: '{tiny_model}', adapter: '${{MINE}}/adapter'}}"
    recipe = mini(model, "roles={target: tiny}")
    assert named_spec(Workspace(tmp_path), recipe, "other").adapter == spec.adapter


def test_a_token_without_an_embedding_costs_its_row_and_no_other(tiny_model, tiny, tmp_path):
    """As where a tokenizer was given tokens and the model was not."""
    shutil.copytree(tiny_model, tmp_path / "model")
    grown = tiny.make_tokenizer()
    grown.add_tokens(["<new>"])
    grown.save_pretrained(tmp_path / "model")
    spec = ModelSpec(str(tmp_path / "model"), device="cpu")
    engine = TransformersEngine(spec)
    pairs = [("1+1?", "2"), ("what is <new>?", "a token"), ("2+2?", "4")]
    rows = [make_row([message("user", q), message("assistant", a)]) for q, a in pairs]
    table = pa.Table.from_pylist(rows, schema=ROW)
    frame, failed = score_likelihood(Recorder(engine, spec, tmp_path / "store"), 0, table)
    assert failed == {rows[1]["id"]: "refused"}
    assert frame.height == 2
    for call in (
        lambda: engine.generate([[5, 259]], [[0]], Sampling()),
        lambda: engine.embed([[5, -1]]),
        lambda: engine.choices([[5, 6]], [[7], [259]]),
        lambda: engine.choices([[5, 6]], [[7, 8], [259, 7]]),
    ):
        with pytest.raises(ValueError, match=r"token (259|-1) where the model knows 259"):
            call()
    assert np.isfinite(engine.choices([[5, 6]], [[7], [258]])).all()


def test_half_precision_is_near_full(tiny_model, engine):
    half = TransformersEngine(ModelSpec(str(tiny_model), device="cpu", dtype="bfloat16"))
    (row,) = random_rows(1)
    one, other = (e.score([row], [(1, len(row))])[0] for e in (half, engine))
    assert one.dtype == np.float32
    assert 0 < np.abs(one - other).max() < 0.5


def test_open_engine_names_what_is_wrong(tmp_path, tiny_model):
    with pytest.raises(ValueError, match="no model directory at 'some/hub-name'"):
        open_engine(ModelSpec("some/hub-name"))
    with pytest.raises(ValueError, match=r"no config\.json"):
        open_engine(ModelSpec(str(tmp_path)))
    (tmp_path / "modules.json").write_text("[]")
    with pytest.raises(ValueError, match="only embeds"):
        open_engine(ModelSpec(str(tmp_path), engine="sentence-transformers"))
    with pytest.raises(ValueError, match="dtype is 'int8'"):
        ModelSpec("x", dtype="int8")
    with pytest.raises(ValueError, match="top_p is 0"):
        Sampling(top_p=0)
    engine: Engine = open_engine(ModelSpec(str(tiny_model), device="cpu"))
    engine.close()
    engine.close()
    with pytest.raises(ValueError, match="is closed"):
        engine.score([[5, 6]], [(1, 2)])
