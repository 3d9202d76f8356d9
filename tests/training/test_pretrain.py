"""Pretraining a tiny model: packing, tokenizers, learning, bytes."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from siftline.scoring.templates import QUESTION_ANSWER
from siftline.training.pretrain import (
    CORE,
    Pretrain,
    bpe_tokenizer,
    char_tokenizer,
    encode_documents,
    learning_rate,
    pretrain,
    read_texts,
    windows,
)

SMALL = Pretrain(
    hidden=32, layers=1, heads=2, context=32, batch_tokens=256, steps=60, lr=1e-2, vocab=80
)
TEXTS = [f"Question: {i}+1?\nAnswer: {i + 1}" for i in range(40)]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return pretrain(TEXTS, SMALL, tmp_path_factory.mktemp("pretrain") / "model")


def test_the_loss_falls_and_the_counts_are_right(made):
    assert made.curve.height == 60
    assert made.curve["loss"][0] > 3.5  # near log(64): nothing known
    assert made.curve["loss"][-5:].mean() < 0.6 * made.curve["loss"][0]
    assert made.tokens == 60 * 256
    assert made.epochs == pytest.approx(made.tokens / sum(len(text) + 2 for text in TEXTS))


def test_it_is_a_model_directory_every_loader_takes(made):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(made.model_dir)
    model = AutoModelForCausalLM.from_pretrained(made.model_dir)
    assert tokenizer.chat_template == QUESTION_ANSWER
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert made.parameters == sum(p.numel() for p in model.parameters())
    ids = torch.tensor([tokenizer("<bos>" + TEXTS[3] + "<eos>").input_ids])
    assert ids.shape[1] == len(TEXTS[3]) + 2
    with torch.no_grad():
        loss = float(model(ids, labels=ids).loss)
    assert loss == pytest.approx(
        made.curve["loss"][-1], abs=0.5
    )  # what was saved is what was trained


def test_the_same_seed_gives_the_same_bytes_whatever_the_order(made, tmp_path):
    again = pretrain(reversed(TEXTS), SMALL, tmp_path / "again")
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        assert (again.model_dir / name).read_bytes() == (made.model_dir / name).read_bytes()
    assert again.curve.equals(made.curve)
    short = {**SMALL.__dict__, "steps": 2}
    weights = [
        pretrain(TEXTS, Pretrain(**{**short, "seed": seed}), tmp_path / str(seed)).model_dir
        for seed in (0, 1)
    ]
    assert len({(folder / "model.safetensors").read_bytes() for folder in weights}) == 2


@settings(max_examples=60)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=12), st.integers(2, 12))
def test_windows_hold_every_token_and_start_at_documents(lengths, size):
    # Token = 100 * document + position, so a window shows what it is made of.
    documents = [np.arange(n) + 100 * d for d, n in enumerate(lengths)]
    keys = [f"d{d}" for d in range(len(lengths))]
    made = list(itertools.islice(windows(documents, keys, 0, size), 4 * sum(lengths) + 4))
    assert all(len(window) == size for window in made)
    assert {int(t) for window in made for t in window} == {int(t) for d in documents for t in d}
    for window in made:
        if window[0] % 100 and lengths[int(window[0] // 100)] <= size:
            raise AssertionError(f"{window} starts inside a document that fits")


def test_each_epoch_has_its_own_order_and_input_order_has_no_say():
    documents = [np.full(4, d) for d in range(30)]
    keys = [f"d{d}" for d in range(30)]
    first = [int(w[0]) for w in itertools.islice(windows(documents, keys, 0, 4), 60)]
    assert sorted(first[:30]) == sorted(first[30:]) == list(range(30))
    assert first[:30] != first[30:]
    turned = windows(documents[::-1], keys[::-1], 0, 4)
    assert [int(w[0]) for w in itertools.islice(turned, 60)] == first


@given(st.text(alphabet=st.characters(codec="utf-8", exclude_categories=("Cs",)), max_size=40))
def test_bpe_writes_any_text_and_splits_digits(text):
    tokenizer = BPE
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert len(tokenizer("1234567").input_ids) == 7


BPE = bpe_tokenizer(TEXTS, 300, 64)


def test_bpe_learns_the_same_whatever_the_order():
    turned = bpe_tokenizer(TEXTS[::-1], 300, 64)
    assert turned.backend_tokenizer.to_str() == BPE.backend_tokenizer.to_str()
    assert len(BPE("Question").input_ids) < len("Question")
    assert len(BPE) <= 300


def test_characters_are_tokens_and_rare_ones_unknown():
    tokenizer = char_tokenizer(["abba é", "ab"], len(CORE) + 4 + 2, 64)
    assert len(tokenizer) == len(CORE) + 6
    ids = tokenizer("ab 12é").input_ids
    assert len(ids) == 6
    assert ids[-1] == tokenizer.unk_token_id
    assert tokenizer.decode(ids[:-1]) == "ab 12"
    assert tokenizer.convert_ids_to_tokens(ids[:2]) == ["a", "b"]


def test_documents_begin_and_end_as_the_template_would(tmp_path):
    tokenizer = char_tokenizer(TEXTS, 80, 64)
    turns = [{"role": "user", "content": "3+1?"}, {"role": "assistant", "content": "4"}]
    templated = tokenizer.apply_chat_template(turns, tokenize=False)
    document = encode_documents(tokenizer, [TEXTS[3]])[0]
    assert tokenizer.decode(document) == templated
    assert document.tolist() == tokenizer(templated, add_special_tokens=False).input_ids


def test_the_rate_rises_then_falls_to_a_tenth():
    config = Pretrain(steps=100, lr=1.0, warmup=0.1)
    rates = [learning_rate(config, step) for step in range(100)]
    assert rates[:10] == pytest.approx(np.arange(1, 11) / 10)
    assert max(rates) == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(0.1, abs=1e-3)


def test_files_are_read_and_bad_lines_named(tmp_path):
    good, bad = tmp_path / "good.jsonl", tmp_path / "bad.jsonl"
    good.write_text('{"text": "one\\ntwo"}\n{"text": "é"}\n')
    bad.write_text('{"text": "one"}\n{"txt": 1}\n')
    assert list(read_texts([good])) == ["one\ntwo", "é"]
    with pytest.raises(ValueError, match=r"bad\.jsonl line 2"):
        list(read_texts([bad]))


def test_refusals(made, tmp_path):
    with pytest.raises(ValueError, match="already holds a model"):
        pretrain(TEXTS, SMALL, made.model_dir)
    with pytest.raises(ValueError, match="no text"):
        pretrain([""], SMALL, tmp_path / "m")
    with pytest.raises(ValueError, match="vocab is 10"):
        char_tokenizer(TEXTS, 10, 64)
    with pytest.raises(ValueError, match="vocab is 10"):
        bpe_tokenizer(TEXTS, 10, 64)
    with pytest.raises(ValueError, match="hidden 30"):
        Pretrain(hidden=30, heads=4)
    with pytest.raises(ValueError, match="context is 8192"):
        Pretrain(context=8192)
