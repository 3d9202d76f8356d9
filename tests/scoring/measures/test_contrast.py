"""Novelty between two models: planted rows come out newest, clusters are stable and named."""

from dataclasses import replace

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from siftline.rows.schema import ROW, digest, make_row, message
from siftline.scoring.engines.base import ModelSpec, open_engine
from siftline.scoring.measures.contrast import CLUSTERS, NOVELTY, Contrast, novel_clusters
from siftline.scoring.measures.likelihood import score_likelihood
from siftline.scoring.measures.scorers import columns_of, run_scorer
from siftline.scoring.recorder import Recorder
from siftline.scoring.spans import response_span

ANIMALS = ("cat", "dog", "cow", "hen", "fox", "owl")
ORDINARY = [(f"What is {i} + {j}?", f"The sum is {i + j}.") for i in range(8) for j in range(8)]
NOVEL = [(f"Sing about the {a}.", f"oh {a} la la {a} hey") for a in ANIMALS]


def rows_of(pairs):
    rows = [make_row([message("user", p), message("assistant", r)]) for p, r in pairs]
    return pa.Table.from_pylist(rows, schema=ROW)


POOL = rows_of([*ORDINARY, *NOVEL])
PLANTED = set(rows_of(NOVEL).column("id").to_pylist())


def train(source, folder, pairs, steps):
    """Fine-tunes a tiny model on whole conversations."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    model = transformers.AutoModelForCausalLM.from_pretrained(source)
    rows = [response_span(tokenizer, row["messages"]) for row in rows_of(pairs).to_pylist()]
    longest = max(len(tokens) for tokens, _ in rows)
    ids = torch.zeros((len(rows), longest), dtype=torch.long)
    labels = torch.full_like(ids, -100)
    for i, (tokens, (start, end)) in enumerate(rows):
        ids[i, : len(tokens)] = torch.tensor(tokens)
        labels[i, start:end] = ids[i, start:end]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        batch = torch.randperm(len(rows), generator=generator)[:16]
        model(input_ids=ids[batch], labels=labels[batch]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def models(tiny, tmp_path_factory):
    """Specs and engines of a base that knows sums, and of one tuned on sums and a few songs."""
    root = tmp_path_factory.mktemp("contrast")
    raw = tiny.make_model(root / "raw")
    base = train(raw, root / "base", ORDINARY, 60)
    tuned = train(base, root / "tuned", [*ORDINARY[::4], *NOVEL[:4]], 40)
    found = {}
    for name, folder in (("base", base), ("tuned", tuned)):
        spec = ModelSpec(str(folder), device="cpu", max_length=120)
        found[name] = spec, open_engine(spec)
    yield found
    for _, engine in found.values():
        engine.close()


@pytest.fixture
def recorders(models, tmp_path):
    return {n: Recorder(engine, spec, tmp_path / "s") for n, (spec, engine) in models.items()}


def test_the_contrast_is_the_difference_of_the_means(recorders):
    config = Contrast("tuned", "base")
    frame, failed = run_scorer(config, recorders, 0, POOL)
    assert failed == {}
    assert dict(frame.schema) == columns_of(config)
    means = {
        name: dict(score_likelihood(r, 0, POOL)[0].select("id", "logprob_mean").iter_rows())
        for name, r in recorders.items()
    }
    for line in frame.to_dicts():
        tuned, base = (means[name][line["id"]] for name in ("tuned", "base"))
        assert line["logprob_mean"] == tuned
        assert line["logprob_mean_reference"] == base
        assert line["value"] == tuned - base


def test_swapping_the_models_turns_the_sign(recorders):
    forth, _ = run_scorer(Contrast("tuned", "base"), recorders, 0, POOL)
    back, _ = run_scorer(Contrast("base", "tuned"), recorders, 0, POOL)
    assert back["id"].equals(forth["id"])
    assert (forth["value"] + back["value"]).abs().max() == 0
    assert forth["value"].abs().min() > 0


def test_what_the_model_was_tuned_on_is_newest_and_clustered_by_name(recorders):
    """Songs are the tuned model's news, those it has not seen in training included."""
    frame, _ = run_scorer(Contrast("tuned", "base"), recorders, 0, POOL)
    contrasts = frame.select("id", pl.col("value").alias("contrast"))
    is_song = [i in PLANTED for i in contrasts["id"]]
    assert roc_auc_score(is_song, contrasts["contrast"]) == 1
    texts = {r["id"]: r["messages"][-1]["content"] for r in POOL.to_pylist()}
    table, clusters = novel_clusters(contrasts, texts, top=len(NOVEL) / len(texts), k=1)
    newest = table.filter(pl.col("novelty_rank") <= len(NOVEL))
    assert set(newest["id"]) == PLANTED
    (line,) = clusters.to_dicts()
    assert set(line["name"].split(", ")) == {"la", "oh", "hey"}
    assert line["rows"] == len(NOVEL)
    assert set(line["exemplars"]) < PLANTED


def test_rows_that_one_model_cannot_score_fail(models, tmp_path):
    spec, engine = models["base"]
    short = replace(spec, max_length=40)
    narrow = Recorder(open_engine(short), short, tmp_path)
    rows = rows_of([("What is 1 + 1?", "The sum is 2."), ("a", "b")])
    both = {"a": Recorder(engine, spec, tmp_path), "b": narrow}
    ids = {r["messages"][0]["content"]: r["id"] for r in rows.to_pylist()}
    for config in (Contrast("a", "b"), Contrast("b", "a")):
        frame, failed = run_scorer(config, both, 0, rows)
        assert failed == {ids["What is 1 + 1?"]: "too_long"}
        assert frame["id"].to_list() == [ids["a"]]


def test_models_that_see_other_tokens_are_refused(models, tmp_path):
    spec, engine = models["base"]
    other = replace(spec, template="{% for m in messages %}[{{ m.content }}]{% endfor %}")
    both = {
        "a": Recorder(engine, spec, tmp_path),
        "b": Recorder(open_engine(other), other, tmp_path),
    }
    with pytest.raises(ValueError, match=r"see other tokens in row .*same template"):
        run_scorer(Contrast("a", "b"), both, 0, POOL)


def test_all_turns_count_where_asked(recorders):
    turns = [("user", "1 + 1?"), ("assistant", "2"), ("user", "And 2 + 2?"), ("assistant", "4")]
    rows = pa.Table.from_pylist([make_row([message(*turn) for turn in turns])], schema=ROW)
    last, _ = run_scorer(Contrast("tuned", "base"), recorders, 0, rows)
    everything, _ = run_scorer(Contrast("tuned", "base", "all"), recorders, 0, rows)
    assert last["value"][0] != everything["value"][0]


# Clusters

TOPICS = {
    "code": ["def", "return", "import", "lambda"],
    "cook": ["onion", "butter", "simmer", "garlic"],
    "sail": ["mast", "rudder", "anchor", "keel"],
}


def planted(ordinary=300, each=6):
    """Ordinary rows with low contrast, and three topics with high ones."""
    generator = np.random.default_rng(0)
    common = ["the", "a", "is", "sum", "of", "number", "answer", "and"]
    texts, contrasts, topics = {}, {}, {}
    for i in range(ordinary):
        identity = digest("row", i)
        texts[identity] = " ".join(generator.choice(common, 12))
        contrasts[identity] = float(generator.normal())
    for height, (topic, words) in enumerate(TOPICS.items()):
        for i in range(each):
            identity = digest(topic, i)
            drawn = [*generator.permutation(words)[:3], *generator.choice(common, 4)]
            texts[identity] = " ".join(generator.permutation(drawn))
            contrasts[identity] = 20.0 - 3 * height + float(generator.normal() / 10)
            topics[identity] = topic
    frame = pl.DataFrame({"id": list(contrasts), "contrast": list(contrasts.values())})
    return frame, texts, topics


def test_planted_topics_become_clusters_named_by_their_words():
    frame, texts, topics = planted()
    table, clusters = novel_clusters(frame, texts, top=len(topics) / len(texts), k=3)
    assert dict(table.schema) == NOVELTY
    assert dict(clusters.schema) == CLUSTERS
    assert clusters["rows"].to_list() == [6, 6, 6]
    for line, words in zip(clusters.to_dicts(), TOPICS.values(), strict=True):
        assert set(line["name"].split(", ")) < set(words), "the newest topic is cluster 0"
    found = table.filter(pl.col("novelty_cluster").is_not_null())
    assert {i: list(TOPICS)[c] for i, c in found.select("id", "novelty_cluster").iter_rows()} == (
        topics
    )
    ranks = dict(table.select("id", "novelty_rank").iter_rows())
    assert sorted(ranks.values()) == list(range(1, len(texts) + 1))
    for line in clusters.to_dicts():
        assert len(line["exemplars"]) == 5
        assert [ranks[i] for i in line["exemplars"]] == sorted(ranks[i] for i in line["exemplars"])


def test_embeddings_are_clustered_where_given():
    frame, texts, topics = planted()
    generator = np.random.default_rng(1)
    corner = {"code": [5.0, 0, 0], "cook": [5.0, 0, 0.1], "sail": [0, 5.0, 0]}
    vectors = {i: np.array(corner[t]) + generator.normal(size=3) * 0.01 for i, t in topics.items()}
    share = len(topics) / len(texts)
    table, clusters = novel_clusters(frame, texts, vectors, top=share, k=2, seed=3)
    found = dict(table.select("id", "novelty_cluster").iter_rows())
    assert {t: {found[i] for i in topics if topics[i] == t} for t in TOPICS} == {
        "code": {0},
        "cook": {0},
        "sail": {1},
    }
    assert clusters["rows"].to_list() == [12, 6]


@settings(max_examples=10, deadline=None)
@given(st.randoms(use_true_random=False), st.integers(0, 3), st.booleans())
def test_the_order_of_rows_and_texts_changes_nothing(rng, seed, embedded):
    frame, texts, topics = planted(ordinary=60)
    vectors = {i: np.eye(3)[list(TOPICS).index(t)] * 3 for i, t in topics.items()}
    options = {"top": 0.2, "k": 3, "seed": seed}
    given_vectors = vectors if embedded else None
    if embedded:
        options["top"] = len(topics) / len(texts)
    expected = novel_clusters(frame, texts, given_vectors, **options)
    order = list(range(frame.height))
    rng.shuffle(order)
    keys = list(texts)
    rng.shuffle(keys)
    shuffled = {i: texts[i] for i in keys}
    found = novel_clusters(frame[order], shuffled, given_vectors, **options)
    assert found[0].equals(expected[0])
    assert found[1].equals(expected[1])


def test_ties_go_by_id_and_the_share_is_rounded_up():
    ids = [digest(i) for i in range(11)]
    frame = pl.DataFrame({"id": ids, "contrast": [1.0] * 11})
    texts = {i: f"text {n}" for n, i in enumerate(ids)}
    table, clusters = novel_clusters(frame, texts, top=0.1, k=5)
    assert table["id"].to_list() == sorted(ids)
    assert table["novelty_rank"].to_list() == list(range(1, 12))
    assert clusters["exemplars"].to_list() == [[sorted(ids)[0]], [sorted(ids)[1]]]
    ten, _ = novel_clusters(frame[:10], texts, top=0.1)
    assert ten["novelty_cluster"].is_not_null().sum() == 1


def test_words_that_stand_everywhere_name_nothing():
    common = "the " * 20
    texts = {digest(i): f"{common} {'onion' if i < 5 else 'sum'}" for i in range(10)}
    frame = pl.DataFrame({"id": list(texts), "contrast": [float(-i) for i in range(10)]})
    _, clusters = novel_clusters(frame, texts, top=0.5, k=1)
    assert clusters["name"].to_list() == ["onion"]


def test_ranks_number_the_clusters_and_do_not_draw_them():
    """The same newest rows in another order of novelty fall into the same clusters."""
    generator = np.random.default_rng(5)
    words = [f"word{i}" for i in range(30)]
    texts = {digest(i): " ".join(generator.choice(words, 6)) for i in range(60)}
    partitions = set()
    for _ in range(5):
        contrasts = generator.permutation(60).astype(float)
        frame = pl.DataFrame({"id": list(texts), "contrast": contrasts})
        table, _ = novel_clusters(frame, texts, top=1.0, k=6)
        groups = table.group_by("novelty_cluster").agg("id")["id"].to_list()
        partitions.add(frozenset(frozenset(group) for group in groups))
        assert table.sort("novelty_rank")["novelty_cluster"][0] == 0
    assert len(partitions) == 1


def test_equal_texts_make_one_cluster_and_signs_name_what_has_no_words():
    ids = [digest(i) for i in range(4)]
    frame = pl.DataFrame({"id": ids, "contrast": [3.0, 2.0, 1.0, 0.0]})
    texts = dict.fromkeys(ids, "{ } ;")
    _, clusters = novel_clusters(frame, texts, top=1.0, k=3)
    assert clusters["rows"].to_list() == [4]
    assert set(clusters["name"][0].split(", ")) == {"{", "}", ";"}


def test_no_rows_have_no_clusters():
    empty = pl.DataFrame(schema={"id": pl.String, "contrast": pl.Float64})
    table, clusters = novel_clusters(empty, {})
    assert (table.height, clusters.height) == (0, 0)
    assert dict(table.schema) == NOVELTY


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"top": 0.0}, "top is 0.0"),
        ({"top": 1.5}, "top is 1.5"),
        ({"k": 0}, "k is 0"),
        ({"texts": {}}, "no text or vector"),
        ({"embeddings": {}}, "no text or vector"),
    ],
)
def test_wrong_arguments_are_refused(change, message):
    frame, texts, _ = planted(ordinary=5)
    with pytest.raises(ValueError, match=message):
        novel_clusters(**({"contrasts": frame, "texts": texts} | change))


@pytest.mark.parametrize("value", [None, float("nan"), float("inf")])
def test_a_row_without_a_finite_contrast_is_refused(value):
    frame = pl.DataFrame({"id": ["a", "b"], "contrast": [1.0, value]})
    with pytest.raises(ValueError, match="row b has no finite contrast"):
        novel_clusters(frame, {"a": "x", "b": "y"})


def test_a_row_that_stands_twice_is_refused():
    frame = pl.DataFrame({"id": ["a", "a"], "contrast": [1.0, 2.0]})
    with pytest.raises(ValueError, match="row a stands twice"):
        novel_clusters(frame, {"a": "x"})
