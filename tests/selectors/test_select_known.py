"""Known answers, planted data and independent computations, method by method."""

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from siftline.kernels.vectors.kmeans import Clusters
from siftline.selectors.baselines import (
    NO_LOSS,
    BalancedRandom,
    BestFit,
    Ifd,
    Length,
    LossDrop,
    Perplexity,
    Random,
)
from siftline.selectors.deita import Deita
from siftline.selectors.facility_location import FacilityLocation
from siftline.selectors.kmeans_quality import KmeansQuality
from siftline.selectors.lexical import Dsir, NearestWords, bm25, count
from siftline.selectors.linear_rule import LinearRule, fit_rule, next_size
from siftline.selectors.method import select
from siftline.selectors.spending import Budget


def ids(n, prefix=""):
    """Ids in the order of numbers, so that places and ids agree."""
    return [f"{prefix}{i:05d}" for i in range(n)]


def vectors(x, names=None, **columns):
    x = np.asarray(x, dtype=np.float32)
    column = pl.Series("embedding", x, dtype=pl.Array(pl.Float32, x.shape[1]))
    return pl.DataFrame({"id": names or ids(len(x)), **columns}).with_columns(column)


def places(selection):
    """Kept places in the order of their ranks."""
    ranked = selection.decisions.join(selection.tables["ranks"], on="id").filter("kept")
    return [int(i[-5:]) for i in ranked.sort("rank")["id"]]


def cosine_targets(scores):
    """A pool and targets whose cosines are the given matrix, shape (q, n)."""
    scores = np.asarray(scores)
    q = len(scores)
    rest = np.sqrt(np.maximum(0, 1 - (scores**2).sum(axis=0)))
    assert ((scores**2).sum(axis=0) <= 1 + 1e-9).all()
    return vectors(np.vstack([scores, rest]).T), vectors(np.eye(q, q + 1), ids(q, "t"))


def test_random_is_a_fair_draw():
    pool = pl.DataFrame({"id": ids(20)})
    counts = np.zeros(20)
    for seed in range(200):
        counts[places(select(Random(seed), pool, Budget(5)))] += 1
    assert ((counts - 50) ** 2 / 37.5).sum() < 43.8  # 99.9 % of chi-square, 19 degrees of freedom


def test_balanced_random_takes_small_sources_whole_and_shares_the_rest():
    sources = ["a"] * 100 + ["b"] * 30 + ["c"] * 4
    pool = pl.DataFrame({"id": ids(134), "source": sources})
    selection = select(BalancedRandom(), pool, Budget(44))
    table = selection.tables["groups"]
    assert dict(table.select("source", "kept").iter_rows()) == {"a": 20, "b": 20, "c": 4}
    assert table["quota"].to_list() == [20, 20, 4]


def test_length_perplexity_and_ifd_by_hand():
    pool = pl.DataFrame(
        {
            "id": ids(5),
            "n_tokens": [3, 9, 9, 1, 4],
            "perplexity": [5.0, 1.0, 9.0, 7.0, 3.0],
            "ifd_loss_ratio": [0.2, 1.0, 0.9, 1.3, 0.99999],
        }
    )
    assert places(select(Length(), pool, Budget(3))) == [1, 2, 4]
    assert places(select(Length(longest=False), pool, Budget(2))) == [3, 0]
    assert places(select(Perplexity(), pool, Budget(2))) == [2, 3]
    assert places(select(Perplexity("middle"), pool, Budget(3))) == [0, 3, 4]
    found = select(Ifd(), pool, Budget(2))
    assert places(found) == [4, 2]
    reasons = dict(found.removed.select("id", "reason").iter_rows())
    assert reasons == {"00000": "below_cut", "00001": "ifd_mismatch", "00003": "ifd_mismatch"}
    with pytest.raises(ValueError, match=r"can keep 3 \(2 ifd_mismatch\)"):
        select(Ifd(), pool, Budget(4))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(1, 100), min_size=1, max_size=40), st.integers(1, 40))
def test_the_bottom_of_perplexity_is_what_the_top_leaves(values, k):
    pool = pl.DataFrame({"id": ids(len(values)), "perplexity": values})
    k = min(k, len(values))
    kept = places(select(Perplexity("bottom"), pool, Budget(k)))
    assert kept == sorted(range(len(values)), key=lambda i: (values[i], i))[:k]
    rest = Budget(len(values) - k) if k < len(values) else None
    if rest and len(set(values)) == len(values):
        assert set(kept).isdisjoint(places(select(Perplexity("top"), pool, rest)))


def test_broken_rows_stay_out_of_the_bottom_of_perplexity_and_fill_the_top():
    g = np.random.default_rng(0)
    broken = g.random(200) < 0.1
    values = np.where(broken, g.uniform(50, 90, 200), g.uniform(1, 10, 200))
    pool = pl.DataFrame({"id": ids(200), "perplexity": values})
    taken = {p: places(select(Perplexity(p), pool, Budget(20))) for p in ("top", "bottom")}
    assert broken[taken["top"]].mean() > 0.9
    assert not broken[taken["bottom"]].any()


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0, 9), st.floats(0, 9)), min_size=2, max_size=30), st.booleans()
)
def test_the_loss_drop_is_the_share_that_the_warm_up_takes_away(losses, relative):
    before, after = np.array(losses).T
    columns = {"logprob_mean": -before, "logprob_mean_warm": -after}
    pool = pl.DataFrame({"id": ids(len(losses)), **columns})
    found = select(LossDrop(relative=relative), pool, Budget(len(losses) - 1))
    drop = [b - a if not relative else ((b - a) / b if b > NO_LOSS else 0.0) for b, a in losses]
    np.testing.assert_allclose(found.decisions["value"], drop, rtol=1e-12)
    assert places(found) == sorted(range(len(drop)), key=lambda i: (-drop[i], i))[:-1]
    assert found.facts["rows_of_rising_loss"] == sum(d < 0 for d in drop)


def test_rows_of_the_targets_kind_win_by_their_loss_drop_at_any_loss():
    """Planted: their loss falls by a third, others' by a tenth, and losses spread tenfold."""
    g = np.random.default_rng(1)
    kin = g.random(300) < 0.2
    before = g.uniform(0.5, 5, 300)
    after = before * np.where(kin, 0.66, 0.9) * g.uniform(0.97, 1.03, 300)
    pool = pl.DataFrame({"id": ids(300), "logprob_mean": -before, "logprob_mean_warm": -after})
    size = int(kin.sum())
    assert kin[places(select(LossDrop(), pool, Budget(size)))].all()
    assert not kin[places(select(LossDrop(relative=False), pool, Budget(size)))].all()
    with pytest.raises(ValueError, match="name two columns"):
        LossDrop(after="logprob_mean")
    with pytest.raises(ValueError, match="lora_rank is 0"):
        LossDrop(lora_rank=0)


def test_the_two_ratios_called_ifd_order_pairs_differently():
    conditional, alone = np.array([1.0, 3.0]), np.array([2.0, 4.5])
    pool = pl.DataFrame(
        {
            "id": ids(2),
            "ifd_loss_ratio": conditional / alone,
            "ifd_perplexity_ratio": np.exp(conditional - alone),
        }
    )
    np.testing.assert_allclose(pool["ifd_perplexity_ratio"], [0.368, 0.223], atol=5e-4)
    assert places(select(Ifd(), pool, Budget(1))) == [1]
    assert places(select(Ifd("ifd_perplexity_ratio"), pool, Budget(1))) == [0]


def answers():
    return pl.DataFrame(
        {
            "id": ids(8),
            "prompt_id": list("aaabbcdd"),
            "logprob_mean": [-2.0, -1.0, -3.0, -0.5, -0.5, -0.1, -9.0, -8.0],
        }
    )


def test_best_fit_picks_the_likeliest_answer_of_each_prompt():
    found = select(BestFit(), answers(), Budget(3))
    assert sorted(places(found)) == [1, 3, 7]  # the tie of 3 and 4 goes to the smaller id
    lost = {row["id"]: row for row in found.removed.iter_rows(named=True)}
    assert lost["00000"]["matched_id"] == "00001"
    assert lost["00004"]["matched_id"] == "00003"
    assert lost["00005"]["reason"] == "single_answer"
    with pytest.raises(ValueError, match=r"can keep 3 \(4 not_best_fit, 1 single_answer\)"):
        select(BestFit(), answers(), Budget(4))
    assert sorted(places(select(BestFit(singles="keep"), answers(), Budget(4)))) == [1, 3, 5, 7]
    two = BestFit(answers=2, singles="keep")
    assert sorted(places(select(two, answers(), Budget(7)))) == [0, 1, 3, 4, 5, 6, 7]


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.integers(1, 20), min_size=1, max_size=12), st.sampled_from([1, 4, 16]),
    st.integers(1, 60), st.integers(0, 3),
)  # fmt: skip
def test_so_many_answers_a_prompt_are_drawn_whatever_they_say(counts, answers, size, seed):
    """Beside plain counting: all answers of a prompt before the next, or one of each in turn."""
    prompts = [f"p{i:02d}" for i, n in enumerate(counts) for _ in range(n)]
    pool = pl.DataFrame({"id": ids(len(prompts)), "prompt_id": prompts})
    size = min(size, sum(min(n, answers) for n in counts))
    whole = BestFit(answers, singles="keep", fit="random", fill="prompts", seed=seed)
    kept = select(whole, pool, Budget(size))
    held = [prompts[i] for i in places(kept)]
    assert len(held) == size
    order = list(dict.fromkeys(held))
    full = [min(counts[int(p[1:])], answers) for p in order]
    assert [held.count(p) for p in order[:-1]] == full[:-1]  # the last may be cut by the budget
    assert held == sorted(held, key=order.index)
    spread = BestFit(answers, singles="keep", fit="random", seed=seed)
    turns = [prompts[i] for i in places(select(spread, pool, Budget(size)))]
    seen = [turns.count(p) for p in set(turns)]
    assert max(seen) == 1 or len(set(turns)) == len(counts)
    shuffled = pool.sample(fraction=1.0, shuffle=True, seed=seed)
    assert places(select(whole, shuffled, Budget(size))) == places(kept)


def test_likelihood_is_never_compared_across_prompts():
    first = select(BestFit(), answers(), Budget(2))
    lifted = answers().with_columns(
        logprob_mean=pl.col("logprob_mean") - 100 * (pl.col("prompt_id") == "a")
    )
    assert places(select(BestFit(), lifted, Budget(2))) == places(first)


def test_a_further_answer_never_lowers_the_best():
    more = pl.concat(
        [
            answers(),
            pl.DataFrame({"id": ["x"], "prompt_id": ["a"], "logprob_mean": [-1.5]}),
        ]
    )
    for pool in (answers(), more):
        found = select(BestFit(), pool, Budget(3))
        joined = found.decisions.filter("kept").join(pool, on="id")
        assert joined.filter(prompt_id="a")["logprob_mean"].item() == -1.0


def blobs(n=400, k=4, seed=0):
    g = np.random.default_rng(seed)
    truth = g.choice(k, n, p=[0.4, 0.3, 0.2, 0.1])
    return np.eye(k)[truth] * 10 + g.normal(size=(n, k)), truth


def test_clusters_get_their_share_and_silhouette_finds_their_number():
    x, truth = blobs()
    found = select(KmeansQuality(candidates=(2, 4, 9)), vectors(x), Budget(40))
    assert found.facts["clusters"] == 4
    tried = found.facts["silhouettes"]
    assert max(tried, key=tried.get) == "4"
    taken = np.bincount(truth[places(found)])
    np.testing.assert_allclose(taken, np.bincount(truth) / 10, atol=1)
    assert found.tables["clusters"]["quota"].sum() == 40
    equal = select(KmeansQuality(clusters=4, quota="equal"), vectors(x), Budget(40))
    assert np.bincount(truth[places(equal)]).tolist() == [10, 10, 10, 10]


def test_silhouette_is_that_of_sklearn():
    from sklearn.metrics import silhouette_score

    x, _ = blobs(200)
    found = select(KmeansQuality(candidates=(3, 4)), vectors(x), Budget(10))
    for k, score in found.facts["silhouettes"].items():
        only = select(KmeansQuality(clusters=int(k)), vectors(x), Budget(10))
        labels = only.tables["members"].sort("id")["cluster"].to_numpy()
        assert score == pytest.approx(silhouette_score(x.astype(np.float32), labels), abs=1e-3)


def test_quality_weighs_the_draw_inside_a_cluster(monkeypatch):
    from siftline.selectors import kmeans_quality

    def one(x, k, seed, names):
        return Clusters(x[:1], np.zeros(len(x), np.int32), np.zeros(len(x), np.float32))

    monkeypatch.setattr(kmeans_quality, "kmeans", one)
    x, quality, hits = np.ones((20, 3)), np.ones(20), np.zeros(20)
    quality[3], quality[5] = 10.0, 0.0
    for seed in range(150):
        method = KmeansQuality(clusters=1, quality="q", seed=seed)
        hits[places(select(method, vectors(x, q=quality), Budget(1)))] += 1
    assert abs(hits[3] / 150 - 10 / 28) < 0.12
    assert hits[5] == 0
    with pytest.raises(ValueError, match="1 rows have a negative q, first 00003: shift it"):
        select(KmeansQuality(quality="q"), vectors(x, q=-quality * (quality > 5)), Budget(1))


def test_copies_of_one_row_cannot_exceed_an_equal_quota():
    x, _ = blobs(300)
    x[100:] = x[100]
    kept = places(select(KmeansQuality(clusters=4, quota="equal"), vectors(x), Budget(40)))
    assert sum(i >= 100 for i in kept) <= 16


def plain_filter(x, scores, budget, limit):
    unit = x / np.linalg.norm(x, axis=1)[:, None]
    kept = []
    for i in np.lexsort((np.arange(len(x)), -scores)):
        if len(kept) < budget and all(unit[i] @ unit[j] <= limit for j in kept):
            kept.append(int(i))
    return kept


@pytest.mark.parametrize("block", [1, 7, 512])
def test_deita_is_the_sequential_filter_whatever_the_block(block, monkeypatch):
    from siftline.selectors import deita

    monkeypatch.setattr(deita, "BLOCK", block)
    g = np.random.default_rng(0)
    x = g.normal(size=(15, 6))[g.integers(0, 15, 200)] + 0.2 * g.normal(size=(200, 6))
    scores = g.random((2, 200))
    pool = vectors(x, complexity=scores[0], quality=scores[1])
    found = select(Deita(), pool, Budget(15))
    expected = plain_filter(pool["embedding"].to_numpy().astype(float), scores.prod(0), 15, 0.9)
    assert places(found) == expected
    alike = found.removed.filter(reason="too_similar")
    assert alike.height > 10
    wide = {i: v / np.linalg.norm(v) for i, v in zip(pool["id"], x, strict=True)}
    assert all(wide[r["id"]] @ wide[r["matched_id"]] > 0.9 for r in alike.iter_rows(named=True))
    assert set(alike["matched_id"]) <= set(found.kept)


def test_deita_says_when_too_little_is_different():
    pool = vectors(np.ones((9, 3)), complexity=np.arange(9.0), quality=np.ones(9))
    with pytest.raises(ValueError, match=r"can keep 1 \(8 too_similar\)"):
        select(Deita(), pool, Budget(2))
    assert places(select(Deita(similarity=1.0), pool, Budget(2))) == [8, 7]


def test_facility_location_takes_one_row_of_each_cluster():
    x, truth = blobs(240)
    for method in (FacilityLocation(), FacilityLocation(exact=True), FacilityLocation(cover=60)):
        found = select(method, vectors(x), Budget(4), None)
        assert len(set(truth[places(found)])) == 4
        assert found.facts["covered_rows"] == (60 if method.cover == 60 else 240)
    value = select(FacilityLocation(exact=True), vectors(x), Budget(4)).facts["value"]
    assert value > 0.9


def texts(lines, prefix=""):
    return pl.DataFrame({"id": ids(len(lines), prefix), "text": lines})


def test_dsir_weights_are_zero_where_pool_and_target_agree():
    lines = ["the river runs", "a stone lies", "moon over water"]
    found = select(Dsir(), texts(lines), Budget(2), texts(lines, "t"))
    np.testing.assert_allclose(found.decisions["value"], 0, atol=1e-9)


def test_dsir_by_hand_and_a_planted_row_of_the_target_language():
    pool, target = ["a b", "a a", "b"], ["a c"]
    found = select(Dsir(grams=1, smoothing=1e-3), texts(pool), Budget(1), texts(target, "t"))
    a = np.log(1 / 2 + 1e-3) - np.log(3 / 5 + 1e-3)
    b = np.log(1e-3) - np.log(2 / 5 + 1e-3)
    np.testing.assert_allclose(found.decisions["value"], [a + b, 2 * a, b], atol=1e-5)
    english = ["the cat sat on the mat and slept all day long"] * 30
    french = "le chat dort sur le tapis et ne bouge pas"
    target = texts(["le chien mange et le chat dort", "sur le tapis le chat ne bouge pas"], "t")
    for scale in ("sum", "mean"):
        found = select(Dsir(scale=scale), texts([*english, french]), Budget(1), target)
        assert found.decisions.sort("value")["id"][-1] == "00030"


def test_dsir_inclusion_follows_the_softmax_of_its_weights():
    pool, target = texts(["a b", "a a", "b b", "c a"]), texts(["a a a b c"], "t")
    hits = np.zeros(4)
    for seed in range(150):
        found = select(Dsir(grams=1, smoothing=0.1, seed=seed), pool, Budget(1), target)
        hits[places(found)] += 1
    weights = np.exp(found.decisions["value"].to_numpy())
    np.testing.assert_allclose(hits / 150, weights / weights.sum(), atol=0.12)


def test_bm25_by_hand():
    pool = ["a a b", "b c", "c c c c"]
    weights = bm25(count(pool, 1 << 12, 1), 1.2, 0.75)
    query = count(["a"], 1 << 12, 1).sign()
    score = (weights @ query.T).toarray().ravel()
    # df of a is 1 of 3; the document has 3 words as is the average, and holds it twice.
    expected = np.log(1 + 2.5 / 1.5) * 2 * 2.2 / (2 + 1.2)
    np.testing.assert_allclose(score, [expected, 0, 0], rtol=1e-5)


def test_nearest_words_finds_shared_words_by_turns():
    pool = texts(
        ["sum of two numbers", "moon over the river", "two numbers", "nothing here", "moon"]
    )
    target = texts(["add two numbers", "the moon"], "t")
    found = select(NearestWords(), pool, Budget(3), target)
    assert places(found)[:2] == [2, 1]
    assert len(places(found)) == 3


def test_the_published_rule_has_the_known_answers():
    rows = {"reward": 2.0, "understandability": [0.9, 0.5], "naturalness": 0.9, "coherence": 0.9}
    pool = pl.DataFrame(
        {
            "id": ids(2),
            **{k: pl.Series([v] * 2 if isinstance(v, float) else v) for k, v in rows.items()},
        }
    )
    found = select(LinearRule(), pool, Budget(1))
    np.testing.assert_allclose(found.decisions["value"], [-0.0162, -0.1930], atol=5e-5)
    assert places(found) == [1]


def runs(n=129, noise=0.02, seed=0):
    g = np.random.default_rng(seed)
    x = g.normal(size=(n, 3)) * [1, 5, 0.1] + [0, 20, 3]
    log_loss = 0.3 - 0.05 * x[:, 0] + 0.02 * x[:, 1] + noise * g.normal(size=n)
    return pl.DataFrame({"a": x[:, 0], "b": x[:, 1], "c": x[:, 2], "loss": np.exp(log_loss)})


def test_a_rule_is_refitted_on_runs_and_finds_their_coefficients():
    from scipy.stats import linregress

    rule, table, fit = fit_rule(runs(), ["a", "b", "c"])
    assert rule.coefficients["a"] == pytest.approx(-0.05, abs=0.006)
    assert rule.coefficients["b"] == pytest.approx(0.02, abs=0.001)
    inside = table["low"][2] <= 0 <= table["high"][2]  # c says nothing
    assert inside
    assert fit.r_squared > 0.9
    assert table["inflation"].max() < 1.2
    alone, _, single = fit_rule(runs(), ["b"])
    line = linregress(runs()["b"], np.log(runs()["loss"]))
    assert alone.coefficients["b"] == pytest.approx(line.slope)
    assert alone.intercept == pytest.approx(line.intercept)
    assert single.r_squared == pytest.approx(line.rvalue**2)
    predicted = select(alone, runs().with_columns(id=pl.Series(ids(129))), Budget(1)).decisions
    np.testing.assert_allclose(predicted["value"], line.intercept + line.slope * runs()["b"])


def test_intervals_cover_the_truth_as_often_as_they_say():
    covered = 0
    for seed in range(80):
        _, table, fit = fit_rule(runs(40, noise=0.3, seed=seed), ["a", "b"])
        slope = -0.05 * fit.scales[0]
        covered += table["low"][0] <= slope <= table["high"][0]
    assert 69 <= covered <= 79


def test_a_permuted_target_explains_nothing_and_bad_runs_are_refused():
    shuffled = runs().with_columns(pl.col("loss").shuffle(seed=1))
    assert fit_rule(shuffled, ["a", "b", "c"])[2].r_squared < 0.1
    twins = runs().with_columns(d=2 * pl.col("a") + 1)
    for frame, names, said in (
        (twins, ["a", "d"], "determine each other"),
        (runs(4), ["a", "b", "c"], "4 observations for 3 columns"),
        (runs().with_columns(c=1.0), ["a", "c"], "c is the same in all 129 runs: leave it out"),
        (runs().with_columns(loss=-1.0), ["a"], "no loss above 0"),
        (runs().with_columns(a=float("nan")), ["a"], "not finite"),
    ):
        with pytest.raises(ValueError, match=said):
            fit_rule(frame, names)
    near = runs().with_columns(d=pl.col("a") + 0.01 * pl.col("c"))
    assert fit_rule(near, ["a", "d"])[1]["inflation"].min() > 10


@pytest.mark.parametrize(
    "loss",
    [
        lambda n: (np.log(n) - np.log(2600)) ** 2,
        lambda n: np.minimum((np.log(n / 800)) ** 2 + 0.1, (np.log(n / 30_000)) ** 2),
        lambda n: np.minimum((np.log(n / 700)) ** 2, (np.log(n / 30_000)) ** 2 + 0.05),
        lambda n: -np.log(n),
        lambda n: np.log(n),
    ],
)
def test_the_size_of_least_loss_is_found_with_few_trials(loss):
    known, trail = {}, []
    while (n := next_size(known, 100, 100_000)) is not None:
        assert 100 <= n <= 100_000
        assert n not in known
        known[n] = float(loss(n))
        trail.append(n)
    grid = np.geomspace(100, 100_000, 4000)
    best = grid[np.argmin(loss(grid))]
    assert min(known, key=known.get) == pytest.approx(best, rel=0.06)
    assert len(known) < 32
    # It goes on where it was: any beginning leads to the same next trial.
    for i in (0, 5, len(trail) - 1):
        assert next_size({n: known[n] for n in trail[:i]}, 100, 100_000) == trail[i]
    with pytest.raises(ValueError, match="give 1 <= low < high"):
        next_size({}, 5, 5)
