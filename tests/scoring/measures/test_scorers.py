"""Rewards and classifiers on real tiny models, held against a plain transformers loop."""

import math
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch

from siftline.config import build
from siftline.rows.schema import ROW, make_row, message
from siftline.scoring.engines.base import ModelSpec
from siftline.scoring.engines.sequence_classifier import SequenceClassifier
from siftline.scoring.measures.classifiers import Classifier, Reward, open_classifier
from siftline.scoring.measures.scorers import (
    KINDS,
    columns_of,
    models_of,
    needs_classifier,
    run_scorer,
)
from siftline.scoring.recorder import Recorder

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def make_classifier(tiny, folder, labels, *, kind="llama", template=TEMPLATE, seed=0, **options):
    """A seeded random sequence classifier: a Llama, or a BERT whose tokenizer frames the text."""
    import transformers
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny.make_tokenizer(bos=True, template=template)
    base = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,
        "pad_token_id": tokenizer.pad_token_id,
        "id2label": dict(enumerate(labels)),
        "label2id": {label: i for i, label in enumerate(labels)},
    } | options
    if kind == "bert":
        ends = [("<bos>", tokenizer.bos_token_id), ("<eos>", tokenizer.eos_token_id)]
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<bos> $A <eos>", special_tokens=ends
        )
        config = transformers.BertConfig(**base)
    else:
        config = transformers.LlamaConfig(num_key_value_heads=2, **base)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.AutoModelForSequenceClassification.from_config(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def rows_of(*pairs, source="s", **fields):
    rows = [
        make_row([message("user", p), message("assistant", r)], source=source, **fields)
        for p, r in pairs
    ]
    return pa.Table.from_pylist(rows, schema=ROW)


PAIRS = [(f"What is {i} + {i}?", f"It is {2 * i}." + " Yes." * (i % 4)) for i in range(9)]
PLAIN = pa.Table.from_pylist([make_row([message("assistant", "A plain text.")])], schema=ROW)
ROWS = pa.concat_tables([rows_of(*PAIRS), PLAIN])


@pytest.fixture(scope="module")
def bench(tiny, tmp_path_factory):
    """`bench(name)` is (spec, classifier); opened once."""
    root = tmp_path_factory.mktemp("classifiers")
    made = {
        "reward": (["r0"], {}),
        "unpadded": (["r"], {"pad_token_id": None}),
        "edu": (["LABEL_0"], {"kind": "bert", "template": None}),
        "topic": (["code", "prose", "sums"], {"kind": "bert"}),
        "stars": (["1 star", "2 stars", "4 stars"], {"kind": "bert", "template": None}),
        "tags": (["a 1", "b 2"], {"problem_type": "multi_label_classification"}),
    }
    opened = {}

    def get(name):
        if name not in opened:
            labels, options = made[name]
            folder = make_classifier(tiny, root / name, labels, **options)
            spec = ModelSpec(str(folder), device="cpu", batch_tokens=300)
            opened[name] = spec, open_classifier(spec)
        return opened[name]

    yield get
    for _, classifier in opened.values():
        classifier.close()


@pytest.fixture
def score(bench, tmp_path):
    """`score(config, rows)`, with a store that is the test's own."""

    def run(config, rows=ROWS, bucket=0):
        recorders = {
            name: Recorder(engine, spec, tmp_path / "store")
            for name in models_of(config)
            for spec, engine in [bench(name)]
        }
        return run_scorer(config, recorders, bucket, rows)

    return run


def plainly(spec, tokens):
    """Raw outputs row by row, without padding, as a user of transformers would get them."""
    import transformers

    model = transformers.AutoModelForSequenceClassification.from_pretrained(spec.path).eval()
    with torch.no_grad():
        return [model(torch.tensor([row])).logits[0].double().numpy() for row in tokens]


def values(frame):
    return dict(frame.select("id", "value").iter_rows())


# The model


@pytest.mark.parametrize("name", ["reward", "unpadded", "topic", "edu"])
def test_results_do_not_move_with_the_batch(bench, name):
    spec, classifier = bench(name)
    generator = np.random.default_rng(1)
    lengths = [1, 2, 3, 17, 40, 40, 91, 200, 256]
    rows = [[int(t) for t in generator.integers(1, 250, n)] for n in lengths]
    expected = np.stack(plainly(spec, rows))
    together = classifier.classify(rows)
    assert together.shape == (len(rows), len(classifier.labels))
    assert together.dtype == np.float32
    assert np.abs(together - expected).max() < 1e-5
    assert np.abs(classifier.classify(rows[::-1])[::-1] - expected).max() < 1e-5
    assert np.std(expected[:, 0]) > 0.01, "the rows must differ"


def test_a_row_that_ends_in_the_padding_token_is_read_as_transformers_reads_it(bench):
    spec, classifier = bench("reward")
    pad = classifier.tokenizer.pad_token_id
    rows = [[5, 6, 7, pad], [9, pad, 8], [11, 12, 13, 14, 15, 16]]
    assert np.abs(classifier.classify(rows) - np.stack(plainly(spec, rows))).max() < 1e-5


def test_a_batch_that_runs_out_of_memory_is_halved(bench, monkeypatch):
    _, classifier = bench("topic")
    rows = [[i, i + 1, i + 2] for i in range(5, 12)]
    expected = classifier.classify(rows)
    forward, sizes = classifier._forward, []

    def tight(part):
        sizes.append(len(part))
        if len(part) > 2:
            raise torch.OutOfMemoryError("full")
        return forward(part)

    monkeypatch.setattr(classifier, "_forward", tight)
    assert np.abs(classifier.classify(rows) - expected).max() < 1e-5
    assert sizes == [7, 4, 2, 2, 3, 2, 1]

    def none_fits(part):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(classifier, "_forward", none_fits)
    with pytest.raises(RuntimeError, match="lower max_length"):
        classifier.classify(rows)


def test_a_model_without_a_padding_token_is_given_one_that_no_row_holds(bench):
    _, classifier = bench("unpadded")
    assert classifier._pad is None
    assert classifier._padding([[0, 1, 3], [4]]) == 2
    everything = list(range(classifier._vocabulary))
    with pytest.raises(ValueError, match="set pad_token_id"):
        classifier.classify([everything[:200], everything[200:]])


def test_rows_that_cannot_be_read_are_refused(bench):
    _, classifier = bench("topic")
    assert classifier.max_length == 256
    assert classifier.classify([]).shape == (0, 3)
    for row in ([], [5] * 257):
        with pytest.raises(ValueError, match="1 to 256 fit"):
            classifier.classify([[5, 6], row])
    beyond = classifier._vocabulary
    with pytest.raises(ValueError, match=f"token {beyond} where the model knows {beyond}"):
        classifier.classify([[5, 6], [5, beyond]])


def test_a_model_without_a_trained_head_is_refused(tiny_model):
    with pytest.raises(ValueError, match=r"no trained weights for score\.weight"):
        open_classifier(ModelSpec(str(tiny_model), device="cpu"))


def test_other_engines_and_adapters_are_refused(bench):
    spec, _ = bench("topic")
    with pytest.raises(ValueError, match="run on engine transformers"):
        open_classifier(replace(spec, engine="vllm"))
    with pytest.raises(ValueError, match="merge it"):
        open_classifier(replace(spec, adapter=spec.path))


def test_a_model_that_is_not_padding_proof_is_refused(tiny, tmp_path, monkeypatch):
    folder = make_classifier(tiny, tmp_path / "m", ["a", "b"], kind="bert")
    masked = SequenceClassifier._forward

    def unmasked(self, rows):
        real = self._model

        def forgetful(input_ids, attention_mask=None):
            return real(input_ids=input_ids)

        forgetful.config = real.config
        self._model = forgetful
        try:
            return masked(self, rows)
        finally:
            self._model = real

    monkeypatch.setattr(SequenceClassifier, "_forward", unmasked)
    with pytest.raises(ValueError, match="other results padded than alone"):
        open_classifier(ModelSpec(str(folder), device="cpu"))


def test_positions_behind_a_padding_index_shorten_the_rows(tiny, tmp_path):
    import transformers

    tokenizer = tiny.make_tokenizer(bos=True)
    tokenizer.model_max_length = int(1e30)
    config = transformers.RobertaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=66,
        pad_token_id=0,
        num_labels=2,
    )
    transformers.RobertaForSequenceClassification(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    classifier = open_classifier(ModelSpec(str(tmp_path), device="cpu"))
    assert classifier.max_length == 65
    assert classifier.classify([[5] * 65, [5]]).shape == (2, 2)


def test_the_fingerprint_is_of_the_weights_and_not_of_the_place(tiny, bench, tmp_path):
    spec, classifier = bench("reward")
    same = make_classifier(tiny, tmp_path / "copy", ["r0"])
    other = make_classifier(tiny, tmp_path / "other", ["r0"], seed=1)
    prints = [open_classifier(replace(spec, path=str(p))).fingerprint() for p in (same, other)]
    assert prints[0] == classifier.fingerprint() != prints[1]


# Rewards


@pytest.mark.parametrize("name", ["reward", "unpadded"])
def test_rewards_are_the_raw_logits_of_templated_conversations(bench, score, name):
    spec, classifier = bench(name)
    frame, failed = score(Reward(name))
    assert failed == {}
    tokenizer = classifier.tokenizer
    tokens = {}
    for row in ROWS.to_pylist():
        given = [{"role": m["role"], "content": m["content"]} for m in row["messages"]]
        if len(given) == 1:  # plain text
            own = tokenizer(given[0]["content"], add_special_tokens=False)["input_ids"]
            tokens[row["id"]] = [tokenizer.bos_token_id, *own, tokenizer.eos_token_id]
        else:
            text = "".join(f"<{m['role']}>{m['content']}<eos>\n" for m in given)
            tokens[row["id"]] = tokenizer(text, add_special_tokens=False)["input_ids"]
    expected = dict(zip(tokens, plainly(spec, tokens.values()), strict=True))
    assert values(frame) == {i: pytest.approx(v[0], abs=1e-5) for i, v in expected.items()}
    assert frame["value"].n_unique() == ROWS.num_rows


def test_a_reward_model_needs_one_output_and_a_template(score):
    with pytest.raises(ValueError, match=r"'code', 'prose', 'sums'.*kind classifier"):
        score(Reward("topic"))
    with pytest.raises(ValueError, match="no chat template: set template"):
        score(Reward("edu"))


@pytest.mark.parametrize("fault", ["raise_exception('no')", "'a' + 1", "'ab'.no()", "{}.pop('a')"])
def test_a_template_that_refuses_a_row_is_a_reason(bench, tmp_path, fault):
    spec, _ = bench("reward")
    template = f"{{% if '+' not in messages[0].content %}}{{{{ {fault} }}}}{{% endif %}}x"
    refusing = replace(spec, template=template)
    recorder = Recorder(open_classifier(refusing), refusing, tmp_path)
    rows = rows_of(("1 + 1", "2"), ("hello", "you"))
    frame, failed = run_scorer(Reward("m"), {"m": recorder}, 0, rows)
    assert frame.height == 1
    assert list(failed.values()) == ["template_error"]


# Classifiers


@pytest.mark.parametrize("over", ["response", "prompt", "conversation"])
def test_one_output_is_the_value_itself_over_the_text_asked_for(bench, score, over):
    spec, classifier = bench("edu")
    frame, failed = score(Classifier("edu", over=over))
    texts = {}
    for row in ROWS.to_pylist():
        told = [m["content"] for m in row["messages"]]
        parts = {"response": told[-1:], "prompt": told[:-1], "conversation": told}[over]
        texts[row["id"]] = "\n".join(parts)
    empty = {i for i, text in texts.items() if not text}
    assert failed == dict.fromkeys(empty, "no_text")
    assert len(empty) == (over == "prompt")
    kept = {i: text for i, text in texts.items() if text}
    tokens = [classifier.tokenizer(text)["input_ids"] for text in kept.values()]
    assert tokens[0][0] == classifier.tokenizer.bos_token_id, "framed by the tokenizer"
    expected = dict(zip(kept, plainly(spec, tokens), strict=True))
    assert values(frame) == {i: pytest.approx(v[0], abs=1e-5) for i, v in expected.items()}


def test_the_probability_of_a_label_is_the_softmax(bench, score):
    spec, classifier = bench("topic")
    total = np.zeros(ROWS.num_rows)
    for label in classifier.labels:
        total += score(Classifier("topic", label))[0]["value"].to_numpy()
    assert total == pytest.approx(1, abs=1e-6)
    frame, _ = score(Classifier("topic", "prose"))
    first = ROWS.sort_by("id").to_pylist()[0]
    tokens = classifier.tokenizer(first["messages"][-1]["content"])["input_ids"]
    (logits,) = plainly(spec, [tokens])
    expected = np.exp(logits[1]) / np.exp(logits).sum()
    assert frame["value"][0] == pytest.approx(expected, abs=1e-6)


def test_a_conversation_stands_under_the_template_where_there_is_one(bench, score):
    spec, classifier = bench("topic")
    frame, _ = score(Classifier("topic", "code", over="conversation"), rows_of(PAIRS[3]))
    text = f"<user>{PAIRS[3][0]}<eos>\n<assistant>{PAIRS[3][1]}<eos>\n"
    tokens = classifier.tokenizer(text, add_special_tokens=False)["input_ids"]
    (logits,) = plainly(spec, [tokens])
    expected = np.exp(logits[0]) / np.exp(logits).sum()
    assert frame["value"][0] == pytest.approx(expected, abs=1e-6)


def test_the_expected_value_weighs_the_numbers_in_the_labels(score):
    parts = {
        n: values(score(Classifier("stars", label))[0])
        for n, label in [(1, "1 star"), (2, "2 stars"), (4, "4 stars")]
    }
    found = values(score(Classifier("stars", expected=True))[0])
    for identity, value in found.items():
        assert value == pytest.approx(sum(n * part[identity] for n, part in parts.items()))
        assert 1 <= value <= 4


def test_independent_labels_get_a_sigmoid_and_no_expected_value(bench, score):
    spec, classifier = bench("tags")
    frame, _ = score(Classifier("tags", "b 2"), rows_of(PAIRS[0]))
    tokens = classifier.tokenizer(PAIRS[0][1])["input_ids"]
    (logits,) = plainly(spec, [tokens])
    assert frame["value"][0] == pytest.approx(1 / (1 + math.exp(-logits[1])), abs=1e-6)
    with pytest.raises(ValueError, match="no expected value"):
        score(Classifier("tags", expected=True))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (Classifier("topic", "poetry"), r"no single label 'poetry'.*'code', 'prose', 'sums'"),
        (Classifier("topic"), r"has labels 'code', 'prose', 'sums': set label"),
        (Classifier("topic", expected=True), r"labels with one number.*'code', 'prose'"),
        (Classifier("edu", "LABEL_0"), "one output"),
        (Classifier("edu", expected=True), "one output"),
    ],
)
def test_labels_that_do_not_fit_are_refused_by_name(score, config, message):
    with pytest.raises(ValueError, match=message):
        score(config)


def test_too_long_and_not_finite_are_reasons(bench, score, monkeypatch):
    _, classifier = bench("edu")
    rows = rows_of(("a", "x" * 255), ("b", "y" * 254), ("c", "short"))
    ids = {r["messages"][0]["content"]: r["id"] for r in rows.to_pylist()}
    forward = classifier._forward
    monkeypatch.setattr(
        classifier,
        "_forward",
        lambda part: np.where([[len(row) < 10] for row in part], np.nan, forward(part)),
    )
    frame, failed = score(Classifier("edu"), rows)
    assert failed == {ids["a"]: "too_long", ids["c"]: "not_finite"}
    assert frame["id"].to_list() == [ids["b"]]


def test_nothing_is_asked_twice_whatever_the_label_or_the_order(bench, tmp_path):
    spec, classifier = bench("topic")

    def run(config, rows):
        recorder = Recorder(classifier, spec, tmp_path)
        frame, _ = run_scorer(config, {"topic": recorder}, 3, rows)
        return frame, recorder.tally.computed

    first, computed = run(Classifier("topic", "code"), ROWS)
    assert computed == len({r["messages"][-1]["content"] for r in ROWS.to_pylist()})
    backwards = ROWS.take(list(range(ROWS.num_rows))[::-1])
    again, computed = run(Classifier("topic", "code"), backwards)
    assert computed == 0
    assert again.equals(first)
    other, computed = run(Classifier("topic", "sums"), ROWS)
    assert computed == 0
    assert not other.equals(first)
    fresh = Recorder(classifier, spec, tmp_path / "fresh")
    frame, _ = run_scorer(Classifier("topic", "code"), {"topic": fresh}, 3, backwards)
    assert frame.equals(first), "the same bits in another order"


# Configurations


@pytest.mark.parametrize(
    ("kind", "given", "models"),
    [
        ("reward", {"model": "rm"}, ("rm",)),
        ("classifier", {"model": "c", "label": "good", "over": "prompt"}, ("c",)),
        ("rubric", {"model": "judge", "scale": [1, 6]}, ("judge",)),
        ("contrast", {"model": "tuned", "reference": "base", "turns": "all"}, ("tuned", "base")),
        ("column", {"column": "stars"}, ()),
        ("column", {"column": "q", "path": "scores.parquet", "id": "row"}, ()),
        ("function", {"path": "a.b:c", "args": {"x": 1}}, ()),
    ],
)
def test_every_kind_is_built_from_a_mapping(kind, given, models):
    config = build(KINDS[kind], given, f"scorers.{kind}")
    assert models_of(config) == models
    assert needs_classifier(config) == (kind in ("reward", "classifier"))
    assert list(columns_of(config))[:2] == ["id", "value"]


@pytest.mark.parametrize(
    ("kind", "given", "message"),
    [
        ("classifier", {"model": "c", "over": "all"}, "'all' is not one of"),
        ("classifier", {"model": "c", "label": "x", "expected": True}, "one of the two"),
        ("rubric", {"model": "j", "scale": [1, 10]}, r"scale is \[1, 10\]"),
        ("rubric", {"model": "j", "scale": [5, 1]}, r"scale is \[5, 1\]"),
        ("rubric", {"model": "j", "scale": [1, 3, 5]}, r"scale is \[1, 3, 5\]"),
        ("rubric", {"model": "j", "rubric": "Good?"}, "no {response}"),
        ("contrast", {"model": "a", "reference": "a"}, "name two models"),
        ("contrast", {"model": "a", "reference": "b", "turns": "some"}, "not one of"),
        ("column", {"column": "q", "path": "scores.xlsx"}, r"\.csv, \.jsonl"),
        ("function", {"path": "module.function"}, "package.module:function"),
        ("reward", {}, "'model' is missing"),
    ],
)
def test_a_wrong_configuration_is_refused(kind, given, message):
    with pytest.raises(ValueError, match=message):
        build(KINDS[kind], given, f"scorers.{kind}")
