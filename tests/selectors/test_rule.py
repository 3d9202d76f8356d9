"""`siftline rule`: indicators by hand and by reference, planted runs, the search by trials."""

import json
import math
import re
from fractions import Fraction
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from siftline.cli import main
from siftline.kernels.text.words import mtld
from siftline.kernels.text.words import mtld_words as words_of
from siftline.kernels.vectors import topk as neighbours
from siftline.kernels.vectors.topk import kth_distances

# ---- lexical diversity ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("", None),
        ("a a", 2),  # 1 of 2 ends a factor
        ("a b a b", 4),  # 2 of 3 does, and the last word begins one
        ("of the people, by the people, for the people", 9),
        ("a b c a", 4 / (0.25 / 0.28)),  # no factor, and 3 of 4 are a part of one
        ("a b b a a c a", 3.5),  # two factors, and the last word begins a third
        ("a b a c d e c", (7 / (1 + 0.25 / 0.28) + 7 / 1) / 2),
        ("a b c", 3),  # no word twice: one factor
    ],
)
def test_mtld_by_hand(text, value):
    found = mtld(words_of(text))
    assert found == (None if value is None else pytest.approx(value, rel=1e-12))


def test_a_share_of_exactly_72_hundredths_ends_a_factor():
    words = [str(i) for i in range(18)]
    assert mtld([*words, *words[:7]]) == 25  # 18 of 25, in both directions
    assert mtld([*words, *words[:6]]) == pytest.approx(24 / (0.25 / 0.28))


def test_words_are_lower_case_without_marks():
    said = "Don't stop: ÉCOLE, x_1; 3.5% \u201cthe cat\u2019s\u201d --- don't"
    assert words_of(said) == [
        "don't", "stop", "école", "x_1", "3", "5", "the", "cat\u2019s", "don't",
    ]  # fmt: skip


def by_definition(words):
    """One direction over all prefixes, in exact fractions."""
    factors, start, n = Fraction(0), 0, len(words)
    while start < n:
        shares = [Fraction(len(set(words[start : e + 1])), e + 1 - start) for e in range(start, n)]
        ends = [e for e, share in enumerate(shares) if share <= Fraction(72, 100)]
        if not ends:
            factors += (1 - shares[-1]) / Fraction(28, 100)
            break
        factors, start = factors + 1, start + ends[0] + 1
    return float(n / factors) if factors else float(n)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 12), min_size=1, max_size=60), st.permutations(range(13)))
def test_mtld_is_its_definition_in_both_directions(numbers, names):
    words = [str(i) for i in numbers]
    found = mtld(words)
    mean = (by_definition(words) + by_definition(words[::-1])) / 2
    assert found == pytest.approx(mean, rel=1e-12)
    assert mtld(words[::-1]) == pytest.approx(found, rel=1e-12)
    assert mtld([str(names[i]) for i in numbers]) == found  # what words are called says nothing


# ---- neighbours ----------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 40), st.integers(1, 5), st.integers(1, 9), st.integers(0, 999))
def test_the_kth_neighbour_is_that_of_all_pairs(n, d, k, seed):
    g = np.random.default_rng(seed)
    x = g.normal(size=(n, d)).astype(np.float32)
    x[g.integers(0, n, n // 3)] = x[0]  # equal ones
    k = min(k, n - 1)
    u = x.astype(np.float64) / np.linalg.norm(x.astype(np.float64), axis=1)[:, None]
    apart = np.linalg.norm(u[:, None] - u[None], axis=2)
    np.fill_diagonal(apart, np.inf)
    np.testing.assert_allclose(kth_distances(x, k), np.sort(apart, axis=1)[:, k - 1], atol=1e-3)


def test_equal_rows_are_0_apart_whatever_the_blocks(monkeypatch):
    x = np.repeat(np.random.default_rng(0).normal(size=(3, 40)), [8, 1, 1], axis=0)
    whole = kth_distances(x.astype(np.float16), 6)
    assert whole[:8].tolist() == [0.0] * 8
    assert whole[8:].min() > 1
    steps = []
    monkeypatch.setattr(neighbours, "QUERIES", 3)
    assert kth_distances(x.astype(np.float16), 6, steps.append).tolist() == whole.tolist()
    assert steps == [3, 3, 3, 1]
    with pytest.raises(ValueError, match="asked for is 10, and there are 10 vectors: give 1 to 9"):
        kth_distances(x, 10)


# ---- the command line ----------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def few_buckets(monkeypatch):
    monkeypatch.setattr("siftline.cli.select_run.BUCKETS", 2)
    monkeypatch.setattr("siftline.cli.score_tables.BUCKETS", 2)


@pytest.fixture
def call(capsys):
    """`call(line)` runs a command: its JSON, or its one line of error."""

    def run(*words, plain=False):
        with pytest.raises(SystemExit) as ended:
            main([*map(str, words), *([] if plain else ["--json"])])
        said = capsys.readouterr()
        if ended.value.code:
            (error,) = [x for x in said.err.splitlines() if x.startswith("error: ")]
            return error
        return said.out if plain else json.loads(said.out)

    return run


ROWS = 40


@pytest.fixture
def data(tmp_path, monkeypatch):
    """`data.jsonl` in the current folder: rows that get longer, and rewards of their own."""
    monkeypatch.chdir(tmp_path)
    lines = [
        {"prompt": f"What is {i}?", "completion": " ".join(["so", "much", *["more"] * (i % 8)])}
        for i in range(ROWS)
    ]
    Path("data.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines), encoding="utf-8")
    return lines


def table_of(folder):
    return pl.read_parquet(Path(folder) / "scores.parquet")


def score_table(folder, ids, **columns):
    Path(folder).mkdir()
    pl.DataFrame({"id": ids, **columns}).write_parquet(Path(folder) / "scores.parquet")


def test_indicators_of_plain_files(data, call):
    said = call("rule", "indicators", "data.jsonl", "--out", "plain")
    table = table_of("plain")
    assert table.columns == ["id", "file", "row", "n_words", "n_chars", "n_prompt_words", "mtld"]
    assert table["row"].to_list() == list(range(1, ROWS + 1))
    answers = [line["completion"] for line in data]
    assert table["n_words"].to_list() == [len(a.split()) for a in answers]
    assert table["n_chars"].to_list() == [len(a) for a in answers]
    assert set(table["n_prompt_words"]) == {3}
    assert table["mtld"].to_list() == [mtld(a.split()) for a in answers]
    assert said["indicators"]["n_words"] == {"rows": ROWS, "mean": 5.5}
    written = ["scores.parquet", "siftline-files.json"]
    assert sorted(p.name for p in Path("plain").iterdir()) == written
    g = np.random.default_rng(0)
    x = g.normal(size=(ROWS - 1, 4)).astype(np.float32)  # the last row has no vector
    Path("vectors").mkdir()
    ids = table["id"][: ROWS - 1]
    pl.DataFrame({"id": ids, "embedding": x}).write_parquet("vectors/e.parquet")
    score_table("scored", table["id"], perplexity=g.random(ROWS), n_words=[0] * ROWS)
    asked = ["--embeddings", "vectors", "--neighbour", 2, "--scores", "scored"]
    call("rule", "indicators", "data.jsonl", *asked, "--out", "more")
    more = table_of("more")
    assert more.columns == [*table.columns, "knn_2", "perplexity"]
    np.testing.assert_array_equal(more["knn_2"][:-1], kth_distances(x[np.argsort(ids)], 2)[
        np.argsort(np.argsort(ids))
    ])  # fmt: skip
    assert more["knn_2"][-1] is None
    assert more["n_words"].equals(table["n_words"])
    backwards = Path("data.jsonl").read_text().splitlines()[::-1]
    Path("back").mkdir()
    Path("back/data.jsonl").write_text("\n".join(backwards), encoding="utf-8")
    call("rule", "indicators", "back/data.jsonl", *asked, "--out", "turned")
    assert table_of("turned").drop("file", "row").sort("id").equals(
        more.drop("file", "row").sort("id")
    )  # fmt: skip


def test_rows_are_embedded_here(data, call, tiny_model):
    call("rule", "indicators", "data.jsonl", "--embedder", tiny_model, "--out", "out")
    vectors = pl.read_parquet("out/embeddings.parquet").sort("id")
    values = kth_distances(vectors["embedding"].to_numpy(), 6)
    assert table_of("out").sort("id")["knn_6"].to_list() == values.tolist()
    assert (values < 2).all()


def documented():
    """The commands of the documentation's section, as lists of words."""
    text = (Path(__file__).parents[2] / "docs" / "selectors.md").read_text(encoding="utf-8")
    section = text.partition("### linear_rule")[2].partition("\n### ")[0]
    lines = re.findall(r"^    siftline (.*)$", section, flags=re.M)
    return [line.partition("#")[0].split() for line in lines]


def test_the_documented_commands_find_planted_rows(data, call):
    """Twelve runs whose log-loss is linear in two indicators: the rule ranks rows by them."""
    lines = documented()
    assert [line[:2] for line in lines] == [
        ["score", "data.jsonl"], ["rule", "indicators"], ["select", "random"], ["rule", "fit"],
        ["select", "linear_rule"], ["rule", "next-size"],
    ]  # fmt: skip
    _, indicators, draw, fit, choose, search = lines
    call("rule", "indicators", "data.jsonl", "--out", "ids")
    perplexity = 1 + 9 * np.random.default_rng(0).random(ROWS)
    score_table("scored", table_of("ids")["id"], perplexity=perplexity)
    call(*indicators)
    table = table_of("indicators")
    assert fit[fit.index("--indicators") + 1] == "n_words,perplexity"
    runs = []
    for seed in range(12):
        words = {"1000": "8", "1": str(seed), "set_1": f"set_{seed}"}
        call(*(words.get(word, word) for word in draw))
        kept = pl.read_parquet(f"set_{seed}/selection.parquet").filter("kept")
        means = table.filter(pl.col("id").is_in(kept["id"].to_list())).mean()
        loss = math.exp(0.1 + 0.05 * means["n_words"][0] - 0.02 * means["perplexity"][0])
        runs.append({"folder": f"set_{seed}", "loss": loss})
    pl.DataFrame(runs).write_csv("runs.csv")
    said = call(*fit)
    assert said["coefficients"] == pytest.approx({"n_words": 0.05, "perplexity": -0.02})
    assert said["intercept"] == pytest.approx(0.1)
    assert (said["runs"], said["r_squared"]) == (12, pytest.approx(1))
    for line in said["table"]:
        assert line["low"] <= line["coefficient"] <= line["high"]
        assert line["inflation"] >= 1
    assert json.loads(Path("rule.json").read_text())["coefficients"] == said["coefficients"]
    call(*("5" if word == "N" else word for word in choose))
    best = np.argsort(0.05 * table["n_words"].to_numpy() - 0.02 * perplexity)[:5] + 1
    chosen = pl.read_parquet("chosen/selection.parquet").filter("kept").sort("rank")
    assert chosen["row"].to_list() == best.tolist()
    assert chosen["value"][0] == pytest.approx(
        0.1 + 0.05 * table["n_words"][int(best[0] - 1)] - 0.02 * perplexity[best[0] - 1]
    )
    pl.DataFrame({"size": [1000, 20000], "loss": [1.0, 1.1]}).write_csv("sizes.csv")
    assert call(*search) == {"next": 1454, "best": 1000, "loss": 1.0}  # 1000 x 20^(1/8)


def test_means_may_be_given_and_a_tied_pair_is_named(data, call):
    g = np.random.default_rng(1)
    a = g.random(20)
    runs = pl.DataFrame({"a": a, "b": a + 0.01 * g.random(20), "loss": np.exp(a + g.random(20))})
    runs.write_parquet("runs.parquet")
    text = call("rule", "fit", "runs.parquet", "--indicators", "a,b", "--out", "r.json", plain=True)
    assert len(re.findall(r"^beware: \w is inflated \d+ times", text, flags=re.M)) == 2
    held = json.loads(Path("r.json").read_text())
    assert [line["indicator"] for line in held["table"]] == ["a", "b"]
    said = call("rule", "fit", "runs.parquet", "--indicators", "a", "--out", "one.json")
    x = np.stack([np.ones(20), a], axis=1)
    expected = np.linalg.lstsq(x, np.log(runs["loss"].to_numpy()), rcond=None)[0]
    assert [said["intercept"], said["coefficients"]["a"]] == pytest.approx(expected.tolist())


def test_the_search_goes_on_with_what_is_known(data, call):
    def asked(*lines):
        Path("t.csv").write_text("size,loss\n" + "".join(f"{x}\n" for x in lines), "utf-8")
        return call("rule", "next-size", "t.csv", "--low", 100, "--high", 1000, "--grid", 3)

    assert asked() == {"next": 100, "best": None, "loss": None}
    assert asked("100,1.0", "100,3.0") == {"next": 316, "best": 100, "loss": 2.0}
    known, steps = {}, 0
    while (found := asked(*(f"{n},{v}" for n, v in known.items())))["next"] is not None:
        known[found["next"]] = abs(math.log(found["next"] / 400))
        steps += 1
        assert steps < 30
    assert abs(found["best"] / 400 - 1) < 0.05
    line = call("rule", "next-size", "t.csv", "--low", 100, "--high", 1000, "--grid", 3, plain=True)
    assert line == f"done: {found['best']}, loss {known[found['best']]:.5g}\n"


def test_what_cannot_be_is_refused_in_one_line(data, call):
    Path("runs.csv").write_text("a,b,loss\n1,2,1\n2,2,1.5\n3,2,x\n4,2,2\n", encoding="utf-8")
    Path("few.csv").write_text("a,loss\n1,1\n2,1.5\n", encoding="utf-8")
    Path("zero.csv").write_text("a,loss\n1,1\n2,1.5\n3,0\n", encoding="utf-8")
    Path("folders.csv").write_text("folder,loss\nnone,1\n", encoding="utf-8")
    Path("sizes.csv").write_text("size,loss\n1.5,1\n", encoding="utf-8")
    Path("no.json").write_text("{}", encoding="utf-8")
    call("rule", "indicators", "data.jsonl", "--out", "ind")
    fit = ["rule", "fit", "--out", "rule.json"]
    choose = ["select", "linear_rule", "data.jsonl", "--budget", 3, "--out", "chosen"]
    search = ["rule", "next-size", "--low", 100, "--high", 1000]
    for words, said in (
        ([*fit, "runs.csv", "--indicators", "a"], "loss of line 3 is 'x': give a number"),
        ([*fit, "runs.csv", "--indicators", "c"], "no column 'c'"),
        ([*fit, "few.csv", "--indicators", "a"], "2 observations for 1 columns"),
        ([*fit, "few.csv", "--indicators", "a", "--loss", "los"], "did you mean 'loss'"),
        ([*fit, "few.csv", "--indicators", "a,a"], "'a' is named twice"),
        ([*fit, "few.csv", "--indicators", ","], "--indicators is empty"),
        ([*fit, "zero.csv", "--indicators", "a"], "1 runs have no loss above 0"),
        ([*fit, "none.csv", "--indicators", "a"], "none.csv is not there"),
        ([*fit, "few.csv", "--indicators", "a", "--scores", "ind"], "has no column 'folder'"),
        ([*fit, "folders.csv", "--indicators", "mtdl", "--scores", "ind"], "did you mean 'mtld'"),
        ([*fit, "folders.csv", "--indicators", "mtld", "--scores", "ind"],
         "none/selection.parquet is not there"),
        ([*choose, "--rule", "no.json"], "no.json has no coefficients"),
        ([*choose, "--rule", "none.json"], "none.json is not there"),
        ([*choose, "--rule", "runs.csv"], "runs.csv is no JSON"),
        (["select", "random", *choose[2:], "--rule", "no.json"], "--rule is for linear_rule"),
        ([*search, "sizes.csv"], "a size is no whole number above 0"),
        ([*search[:4], "--high", 10, "few.csv", "--size", "a"], "give 1 <= low < high"),
        (["rule", "indicators", "no.jsonl", "--out", "x"], "no such file or folder"),
        (["rule", "indicators", "data.jsonl", "--out", "ind"], "exists"),
        (["rule", "indicators", "data.jsonl", "--embedder", "m", "--embeddings", "e", "--out", "x"],
         "exclude each other"),
    ):  # fmt: skip
        assert said in call(*words)
    Path("same.csv").write_text("a,b,loss\n1,2,1\n2,2,1.5\n3,2,1\n4,2,2\n", encoding="utf-8")
    assert "b is the same in all 4 runs" in call(*fit, "same.csv", "--indicators", "a,b")
    assert not Path("rule.json").exists()
    assert not Path("x").exists()
    Path("rule.json").write_text("{}", encoding="utf-8")
    assert "rule.json exists" in call(*fit, "few.csv", "--indicators", "a")
