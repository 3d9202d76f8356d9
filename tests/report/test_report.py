"""The report and its pictures."""

import io
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import polars as pl
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from siftline.report import plots
from siftline.report.page import (
    ACCURACY,
    EXAMPLES,
    PLANTED,
    Histogram,
    Report,
    pick_examples,
    render,
)
from siftline.rows.card import StageCount

PARTS = ("scores", "clusters", "difficulty", "curves", "accuracy", "planted", "examples", "notes")
HOSTILE = "<script>alert(\"1\")</script> 'q' & </style> {{ 7 * 7 }}"


def make_report(seed=0):
    rng = np.random.default_rng(seed)
    funnel = (
        StageCount("pool", "pool", 9124, 0, 9124, 0, 0),
        StageCount("duplicates", "gate", 9124, 0, 8310, 814, 0,
                   (("near_duplicate", 640), ("exact_duplicate", 174))),
        StageCount("decontamination", "gate", 8310, 0, 8249, 61, 0, (("ngram_overlap_test", 61),)),
        StageCount("likelihood", "gate", 8249, 0, 8160, 77, 12,
                   (("perplexity_outlier", 77), ("too_long", 12))),
        StageCount("diversity", "shortlist", 8160, 0, 3200, 4960, 0,
                   (("not_drawn_in_cluster", 4960),)),
        StageCount("rejection sampling", "adds", 3200, 1410, 4610, 0, 0),
        StageCount("allocate", "budget", 4610, 0, 1000, 3610, 0,
                   (("over_prompt_quota", 2110), ("over_cluster_quota", 1500))),
    )  # fmt: skip
    group = rng.integers(0, 14, 6000)
    clusters = pl.DataFrame(
        {
            "x": rng.normal(size=6000) * 0.7 + 3 * np.cos(group * 2.4) * np.sqrt(group),
            "y": rng.normal(size=6000) * 0.7 + 2 * np.sin(group * 2.4) * np.sqrt(group),
            "cluster": group,
            "chosen": rng.random(6000) < 0.15,
        }
    )
    levels = ["level 1", "level 2", "level 3", "all"]
    arms = ["base", "random", "full pool", "curated"]
    accuracy = [
        (arm, level, m, m - 0.03, m + 0.03, 400)
        for a, arm in enumerate(arms)
        for b, level in enumerate(levels)
        for m in [0.3 + 0.08 * a - 0.06 * (b % 3)]
    ]
    curves = pl.concat(
        pl.DataFrame(
            {
                "arm": arm,
                "step": np.arange(200),
                "loss": 2 * np.exp(-np.arange(200) / (60 - 9 * i)) + 0.6 + rng.random(200) / 9,
            }
        )
        for i, arm in enumerate(arms[1:])
    )
    examples = [
        ("ab" * 20, "duplicates", "near_duplicate", 0.93, 0.8,
         "Natalia sold clips to 48 friends in April.", "She sold 72 clips.\n#### 72", "cd" * 20,
         "Natalia sold clips to 48 of her friends in April.", "72 clips in total.\n#### 72"),
        ("ef" * 20, "likelihood", "perplexity_outlier", -6.214, -5.03,
         "What is 3 + 4?", "zxq vv 9 9 9", None, None, None),
    ]  # fmt: skip
    return Report(
        recipe="gsm8k_small",
        version="631df4df561f",
        model="tiny-base",
        ran=(("engine", "transformers 5.16, float32, CPU"), ("near duplicates", "numba"),
             ("seed", "17")),
        funnel=funnel,
        scores=(
            Histogram("mean log-probability", "likelihood",
                      np.append(rng.normal(-2, 0.8, 8000), np.nan), (-4.1, -0.2)),
            Histogram("jaccard to the nearest row", "duplicates", rng.beta(2, 5, 9000), (0.8,)),
        ),
        clusters=clusters,
        difficulty=pl.DataFrame({"level": levels[:3], "before": [500, 300, 90],
                                 "after": [200, 400, 400]}),
        curves=curves,
        accuracy=pl.DataFrame(accuracy, schema=ACCURACY, orient="row"),
        planted=pl.DataFrame([("swapped answer", "verify", 40, 38, 2)], schema=PLANTED,
                             orient="row"),
        examples=pl.DataFrame(examples, schema=EXAMPLES, orient="row"),
        notes=("The reflection weight is 0: its AUROC interval includes 0.5.",),
    )  # fmt: skip


@pytest.fixture
def blank_pictures(monkeypatch):
    """Spares the drawing where only the page is looked at."""
    monkeypatch.setattr(plots, "_draw", lambda paint, **options: b"png")


class Page(HTMLParser):
    """Collects tags, addresses and texts; checks that tags nest."""

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.links, self.texts = [], [], [], []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [v for k, v in attrs if k in ("src", "href", "srcset", "action")]
        assert not [k for k, _ in attrs if k.startswith("on")]
        if tag not in ("meta", "img", "source"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.texts.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())


def test_every_part_is_there(blank_pictures):
    page = Page(render(make_report()))
    for text in (
        "gsm8k_small", "631df4df561f", "tiny-base", "transformers 5.16, float32, CPU", "numba",
        "near_duplicate 640", "9,124", "1,410", "mean log-probability", "1 without a value",
        "6,000 prompts in 14 clusters", "0.93 against 0.8", "-6.214 against -5.03", "cd" * 20,
        "95.0 %", "swapped answer", "51.0 % to 57.0 %, n 400", "AUROC interval includes 0.5",
        "72 clips in total.",
    ):  # fmt: skip
        assert text in page.text, text
    assert page.tags.count("img") == page.tags.count("source") == 6
    assert "has no stage" not in page.text


def test_it_needs_nothing_but_itself(blank_pictures):
    html = render(make_report())
    page = Page(html)
    assert all(a.startswith(("data:image/png;base64,", "#")) for a in page.links)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    targets = {a[1:] for a in page.links if a.startswith("#")}
    assert targets == set(re.findall('id="([a-z]+)"', html)) - {"notes"}


def test_equal_reports_give_equal_bytes():
    again = make_report()
    again = replace(again, clusters=again.clusters.sample(fraction=1, shuffle=True))
    assert render(again) == render(make_report())


def hostile_report():
    swap = pl.when(pl.col(pl.String).is_not_null()).then(pl.lit(HOSTILE)).name.keep()
    given = make_report()
    frames = ("planted", "examples", "accuracy", "difficulty", "curves")
    return replace(
        given,
        recipe=HOSTILE,
        version=HOSTILE,
        model=HOSTILE,
        ran=((HOSTILE, HOSTILE),),
        notes=(HOSTILE,),
        funnel=(StageCount(HOSTILE, HOSTILE, 2, 0, 1, 1, 0, ((HOSTILE, 1),)),),
        scores=(Histogram(HOSTILE, HOSTILE, np.arange(9.0)),),
        **{name: getattr(given, name).with_columns(swap) for name in frames},
    )


def test_hostile_text_stays_text(blank_pictures):
    html = render(hostile_report())
    page = Page(html)
    assert "script" not in page.tags
    assert html.count("</style>") == 1
    assert "49" not in re.sub('base64,[^"]*', "", html).replace("d1495b", "")
    assert page.text.count("<script>alert(\"1\")</script> 'q' & </style> {{ 7 * 7 }}") >= 14


@pytest.mark.parametrize("part", PARTS)
def test_a_missing_part_is_named(part, blank_pictures):
    given = make_report()
    html = render(replace(given, **{part: () if part in ("scores", "notes") else None}))
    lines = re.findall(r'class="absent">(.*?)</p>', html, re.DOTALL)
    assert len(lines) == (0 if part == "notes" else 1)
    ran = {"scores", "clusters", "difficulty"}  # stages that stand in the funnel
    assert all(("left nothing" in line) == (part in ran) for line in lines)
    Page(html)


def test_an_empty_report_renders():
    page = Page(render(Report("r", "v", "m")))
    assert page.text.count("No ") == 8
    assert "has no stage diversity" in page.text
    assert "img" not in page.tags


def test_a_frame_without_its_columns_is_refused():
    with pytest.raises(ValueError, match=r"curves lack the columns \['loss'\]"):
        Report("r", "v", "m", curves=pl.DataFrame({"arm": ["a"], "step": [1]}))


def test_examples_are_drawn_by_id():
    stages = ["near", "near", "verify"] * 10
    removed = pl.DataFrame(
        {
            "id": [f"{i:040x}" for i in range(30)],
            "stage": stages,
            "reason": ["r"] * 30,
            "value": 0.9,
            "threshold": 0.8,
            "matched_id": [f"{99:040x}"] * 29 + [None],
            "prompt": "p",
            "response": "r",
        }
    )
    matched = pl.DataFrame({"id": [f"{99:040x}"], "prompt": ["P"], "response": ["R"]})
    drawn = pick_examples(removed, matched, seed=3, per_reason=4)
    again = pick_examples(removed.sample(fraction=1, shuffle=True), matched, seed=3, per_reason=4)
    assert drawn.equals(again)
    assert drawn["stage"].to_list() == ["near"] * 4 + ["verify"] * 4
    lost = drawn.filter(pl.col("matched_id").is_not_null())
    assert set(lost["matched_response"]) == {"R"}
    fewer = pick_examples(removed.filter(pl.col("id") != drawn["id"][1]), matched, seed=3,
                          per_reason=4)  # fmt: skip
    assert len(set(fewer["id"]) & set(drawn["id"])) >= 7
    none = pick_examples(removed.clear(), matched, seed=3)
    assert dict(none.schema) == EXAMPLES
    assert "No row was removed" in render(Report("r", "v", "m", examples=none))


def worst_pictures(dark):
    rng = np.random.default_rng(0)
    n = 50_000
    names = [f"arm number {i}" for i in range(8)]
    noise = {name: (np.arange(3000), rng.normal(size=3000)) for name in names}
    points = {name: tuple(rng.random((3, 9)) * [[1], [0.1], [1.1]]) for name in names}
    points = {k: (m, m - 0.05, m + 0.05) for k, (m, _, _) in points.items()}
    levels = [f"level {i}" for i in range(9)]
    counts = rng.integers(0, 1000, (3, 9))
    group, chosen = rng.integers(0, 40, n), rng.random(n) < 0.5
    yield plots.clusters(rng.random(n), rng.random(n), group, chosen, dark=dark)
    yield plots.histogram(rng.normal(size=n), (-1.0, 2.0), label="x", dark=dark)
    yield plots.curves(noise, dark=dark)
    yield plots.accuracy(levels, points, dark=dark)
    yield plots.difficulty(levels, counts[0], counts[1], dark=dark)
    yield plots.funnel(levels, *counts, dark=dark)


@pytest.mark.parametrize("dark", [False, True])
def test_pictures_are_small_png(dark):
    for png in worst_pictures(dark):
        assert len(png) < 100_000
        picture = Image.open(io.BytesIO(png))
        assert picture.format == "PNG"
        assert picture.info.keys() <= {"dpi", "gamma"}  # no date, no software
        corner = np.array(picture.convert("RGB"))[0, 0].astype(int)
        paper = (plots.DARK if dark else plots.LIGHT).paper
        wanted = [int(paper[i : i + 2], 16) for i in (1, 3, 5)]
        assert np.abs(corner - wanted).max() <= 2


def test_pictures_ignore_the_users_style():
    import matplotlib

    values = np.linspace(0, 1, 50)
    plain = plots.histogram(values)
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red"}):
        assert plots.histogram(values) == plain
        assert matplotlib.rcParams["font.size"] == 30


def bar_heights(png):
    """Blue pixels per column: the bars of a histogram."""
    pixels = np.array(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)
    return ((pixels[:, :, 2] - pixels[:, :, 0]) > 100).sum(axis=0)


def test_a_histogram_shows_its_values():
    lopsided = np.concatenate([np.zeros(900), np.ones(100)])
    heights = bar_heights(plots.histogram(lopsided, bins=2))
    tall, low = heights.max(), heights[heights > 0].min()
    assert tall / low == pytest.approx(9, rel=0.1)


def test_an_arm_has_one_colour(monkeypatch):
    orders = []
    blank = lambda *a, order, dark: orders.append(list(order)) or b"png"  # noqa: E731
    monkeypatch.setattr(plots, "curves", blank)
    monkeypatch.setattr(plots, "accuracy", blank)
    given = make_report()
    render(Report("r", "v", "m", curves=given.curves, accuracy=given.accuracy))
    assert orders == [["base", "random", "full pool", "curated"]] * 4


@settings(max_examples=6, deadline=None)
@example([140737488355328.0])
@given(st.lists(st.floats(allow_nan=True, allow_infinity=True, width=32), max_size=20))
def test_any_score_can_be_drawn(values):
    assert plots.histogram(np.array(values, dtype=float), (0.5,)).startswith(b"\x89PNG")


def test_markdown_is_one_image():
    text = plots.as_markdown(b"png", alt="a](x) <b>\n")
    assert text == "![a  x   b  ](data:image/png;base64,cG5n)"
