"""Similarity with samples: by words, vectors and entailment, each against a plain computation."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from siftline.scoring.engines.base import ModelSpec, open_engine
from siftline.scoring.measures.classifiers import open_classifier
from siftline.scoring.measures.consistency import Held, agreements, cosines, overlaps, word_overlap
from siftline.scoring.recorder import Recorder
from siftline.scoring.spans import encode, start_token

QUESTION = "What is 3 + 4?"
HELD = {
    "right": Held(QUESTION, "It is 7.\n#### 7", ("#### 7", "I say 7.\n#### 7", "#### 9")),
    "wrong": Held(QUESTION, "It is 9.\n#### 9", ("#### 7", "I say 7.\n#### 7", "#### 9")),
    "alone": Held(QUESTION, "It is 7.", ()),
}


# ---- words -----------------------------------------------------------------------------------

texts = st.lists(st.sampled_from(["one", "Two", "three", "4", "five."]), max_size=6).map(" ".join)


@settings(max_examples=80, deadline=None)
@given(texts, texts)
def test_word_overlap_is_jaccard_of_words(left, right):
    a, b = (set(re.sub(r"[^\w ]", " ", text).lower().split()) for text in (left, right))
    assert word_overlap(left, right) == (len(a & b) / len(a | b) if a | b else 1.0)
    assert word_overlap(left, right) == word_overlap(right, left)
    assert word_overlap(left, left.upper()) == 1.0


def test_every_answer_is_held_against_the_same_samples():
    found = overlaps(HELD)
    assert set(found) == {"right", "wrong"}
    words = [{"7"}, {"i", "say", "7"}, {"9"}]
    for name, own in (("right", {"it", "is", "7"}), ("wrong", {"it", "is", "9"})):
        plain = np.mean([len(own & other) / len(own | other) for other in words])
        assert found[name] == pytest.approx(plain)


# ---- vectors ---------------------------------------------------------------------------------


def test_cosines_are_clipped_and_asked_once_a_text(tiny_model, tmp_path):
    spec = ModelSpec(str(tiny_model), device="cpu", max_length=256)
    engine = open_engine(spec)
    recorder = Recorder(engine, spec, tmp_path / "store")
    found, lost = cosines(recorder, 0, HELD)
    assert (set(found), lost) == ({"right", "wrong"}, {})
    assert recorder.tally.computed == 5  # two responses, three samples; a row alone has no pair
    for name in found:
        own, *others = (
            engine.embed([[start_token(engine.tokenizer), *encode(engine.tokenizer, t)]])[0]
            for t in (HELD[name].own, *HELD[name].samples)
        )
        plain = np.mean([max(0.0, float(own @ other)) for other in others])
        assert found[name] == pytest.approx(plain, abs=2e-3)
    assert cosines(recorder, 0, HELD) == (found, {})
    assert recorder.tally.computed == 5

    class Opposed:
        def fingerprint(self):
            return "opposed"

        def embed_texts(self, asked):
            sign = {"a": 1.0, "b": -1.0}
            return np.array([[sign[text], 0.0] for text in asked], np.float32)

    opposed = Recorder(Opposed(), spec, tmp_path / "store")
    pairs = {"x": Held("", "a", ("b", "a")), "y": Held("", "b", ("a",))}
    assert cosines(opposed, 0, pairs) == ({"x": 0.5, "y": 0.0}, {})


def test_a_text_without_a_vector_is_told_with_its_reason(tmp_path):
    class Picky:
        def fingerprint(self):
            return "picky"

        def embed_texts(self, asked):
            if "b" in asked:
                raise ValueError("not this one")
            return np.array([[1.0, 0.0]] * len(asked), np.float32)

    recorder = Recorder(Picky(), ModelSpec("nowhere"), tmp_path / "store")
    held = {"x": Held("", "a", ("b", "c")), "y": Held("", "a", ("c",)), "z": Held("", "b", ())}
    assert cosines(recorder, 0, held) == ({"y": 1.0}, {"x": "refused"})


# ---- entailment ------------------------------------------------------------------------------


def test_entailment_asks_both_orders_with_the_prompt_before_both(
    scripted, tiny, tiny_model, tmp_path
):
    engine = scripted.ScriptedNli(tiny.make_tokenizer())
    recorder = Recorder(engine, ModelSpec(str(tiny_model)), tmp_path / "store")
    found, lost = agreements(recorder, 0, HELD)
    assert (set(found), lost) == ({"right", "wrong"}, {})
    for name, held in HELD.items():
        if not held.samples:
            continue
        own = f"{QUESTION}\n{held.own}"
        others = [f"{QUESTION}\n{text}" for text in held.samples]
        plain = [1 - (engine.against(own, o) + engine.against(o, own)) / 2 for o in others]
        assert found[name] == pytest.approx(np.mean(plain), abs=1e-6)
    assert found["right"] > found["wrong"]
    assert all(part.startswith(QUESTION) for pair in engine.asked for part in pair)
    assert len(engine.asked) == 12
    assert agreements(recorder, 0, HELD) == (found, {})
    assert len(engine.asked) == 12


def make_nli(tiny, folder, labels=("contradiction", "neutral", "entailment"), **options):
    import transformers
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny.make_tokenizer(bos=True)
    ends = [(name, tokenizer.convert_tokens_to_ids(name)) for name in ("<bos>", "<eos>")]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A <eos>", pair="<bos> $A <eos> <eos> $B <eos>", special_tokens=ends
    )
    config = transformers.RobertaConfig(
        **{
            "vocab_size": len(tokenizer),
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 130,
            "initializer_range": 0.3,
            "type_vocab_size": 1,
            "pad_token_id": tokenizer.pad_token_id,
            "id2label": dict(enumerate(labels)),
            "label2id": {label: i for i, label in enumerate(labels)},
        }
        | options
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = transformers.RobertaForSequenceClassification(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return ModelSpec(str(folder), device="cpu")


def test_a_cross_encoder_agrees_with_its_pipeline(tiny, tmp_path):
    import transformers

    spec = make_nli(tiny, tmp_path / "nli")
    recorder = Recorder(open_classifier(spec), spec, tmp_path / "store")
    long = Held(QUESTION, "y" * 200, ("#### 7",))
    found, lost = agreements(recorder, 0, {**HELD, "long": long})
    assert set(found) == {"right", "wrong"}
    assert lost == {"long": "too_long"}  # no part for a pair that does not fit
    tokenizer = transformers.AutoTokenizer.from_pretrained(spec.path)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(spec.path).eval()

    @torch.inference_mode()
    def against(first, second):
        logits = model(**tokenizer(first, second, return_tensors="pt")).logits[0]
        return float(torch.softmax(logits, -1)[0])

    own = f"{QUESTION}\n{HELD['right'].own}"
    others = [f"{QUESTION}\n{text}" for text in HELD["right"].samples]
    plain = np.mean([1 - (against(own, o) + against(o, own)) / 2 for o in others])
    assert found["right"] == pytest.approx(plain, abs=1e-4)
    assert abs(found["right"] - found["wrong"]) > 1e-4


def test_models_that_can_not_be_asked_are_refused(tiny, tmp_path):
    for options, says in (
        ({"labels": ("yes", "no", "maybe")}, "one label 'contradiction'"),
        ({"type_vocab_size": 2}, "segment ids, which are not passed on"),
        ({"problem_type": "multi_label_classification"}, "one label 'contradiction'"),
    ):
        spec = make_nli(tiny, tmp_path / str(len(says)), **options)
        recorder = Recorder(open_classifier(spec), replace(spec), tmp_path / "store")
        with pytest.raises(ValueError, match=says):
            agreements(recorder, 0, HELD)
