"""Text rules against datatrove's own verdicts and plain counts; the quality gate as a stage."""

import importlib.util
import json
import os
import random
import re
import sys
from collections import Counter
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from siftline.ingest.pool import PoolSpec, build_pool
from siftline.ingest.readers import Source
from siftline.recipe.kinds import GATES
from siftline.recipe.parse import parse, scorers_read
from siftline.rows.selection import select
from siftline.scoring.measures.degenerate import distinct, letters, probabilities
from siftline.stages.canaries import looped
from siftline.stages.quality_rules.decide import COLUMNS, QualityRules, Rules, ScoreBound
from siftline.stages.quality_rules.run import looker, quality_inputs
from siftline.stages.quality_rules.text_rules import MEASURES, TextRules, WordList
from siftline.stages.run import run_stage
from siftline.workspace import Workspace

LIBRARIES = ("datatrove", "spacy", "py3langid")
MISSING = [name for name in LIBRARIES if importlib.util.find_spec(name) is None]
needs_libraries = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")

WEB = {
    "top_n_grams": {"2": 0.2, "3": 0.18, "4": 0.16},
    "dup_n_grams": {"5": 0.15, "6": 0.14, "7": 0.13, "8": 0.12, "9": 0.11, "10": 0.1},
    "line_punct_thr": 0.12,
    "short_line_thr": 0.67,
    "char_duplicates_ratio": 0.01,
    "new_line_ratio": 0.3,
    "min_avg_word_length": 3.0,
    "max_bullet_lines_ratio": 0.9,
    "max_non_alpha_words_ratio": 0.8,
    "min_stop_words": 2,
}
"""The published thresholds: with them the gate has to agree with datatrove's defaults."""


def quiet(line): ...


# ---- the rules of one text -------------------------------------------------------------------

LINES = st.sampled_from(
    [
        "The cat sat with the dog, and that was the end of it.",
        "- a bullet that has no end",
        "# # # heading",
        "it goes on...",
        "12 + 7 = 19",
        "over and over and over and over",
        "",
        "short",
        "incomprehensibilities unconstitutionally internationalization",
        "One more sentence to have some words of its own in here.",
        "x = y",
    ]
)
TEXTS = st.lists(LINES, min_size=1, max_size=12).map("\n".join)


def datatrove_verdict(text):
    """Default filters in FineWeb2's order, each with a tokenizer of its own."""
    from datatrove.data import Document
    from datatrove.pipeline.filters import (
        FineWebQualityFilter,
        GopherQualityFilter,
        GopherRepetitionFilter,
    )

    gopher = GopherQualityFilter(min_doc_words=None)
    for rule in (GopherRepetitionFilter(), FineWebQualityFilter(), gopher):
        verdict = rule.filter(Document(text=text, id="x"))
        if verdict is not True:
            return verdict[1]
    return None


def plain_values(text):
    """Every rule's number, counted apart from the package."""
    from datatrove.utils.text import PUNCTUATION_SET, TERMINAL_PUNCTUATION, split_into_words

    def repeated(parts):
        return [part for i, part in enumerate(parts) if part in parts[:i]]

    def share(parts, size):
        again = repeated(parts)
        return len(again) / len(parts), len("".join(again)) / size

    words = split_into_words(text, "en")
    said = [w for w in words if not set(w) <= set(PUNCTUATION_SET)]
    lines, full = text.splitlines(), [x for x in text.split("\n") if x.strip()]
    found = {}
    found["dup_line_frac"], found["dup_line_char_frac"] = share(re.split("\n+", text), len(text))
    paragraphs = re.split("\n\n+", text.strip())
    found["dup_para_frac"], found["dup_para_char_frac"] = share(paragraphs, len(text))
    found["line_punct_ratio"] = sum(x[-1] in TERMINAL_PUNCTUATION for x in full) / len(full)
    found["short_line_ratio"] = sum(len(x) < 31 for x in full) / len(full)
    found["char_dup_ratio"] = share(full, len(text.replace("\n", "")))[1]
    found["list_ratio"] = text.count("\n") / len(words)
    found["gopher_above_avg_threshold"] = len("".join(said)) / len(said)
    found["gopher_below_avg_threshold"] = found["gopher_above_avg_threshold"]
    found["gopher_too_many_hashes"] = text.count("#") / len(words)
    found["gopher_too_many_ellipsis"] = text.count("...") / len(words)
    found["gopher_too_many_bullets"] = sum(x.strip()[:1] == "-" for x in lines) / len(lines)
    found["gopher_too_many_end_ellipsis"] = sum(x[-3:] == "..." for x in lines) / len(lines)
    found["gopher_below_alpha_threshold"] = sum(w.lower() != w.upper() for w in words) / len(words)
    stop = {"the", "be", "to", "of", "and", "that", "have", "with"}
    found["gopher_enough_stop_words"] = len(stop & set(words))
    for n in (2, 3, 4):
        grams = Counter(" ".join(words[i : i + n]) for i in range(len(words) - n + 1))
        most = max(grams.values(), default=0)
        # The first of the commonest, as they stand in the text.
        first = next((gram for gram, count in grams.items() if count == most), "")
        found[f"top_{n}_gram"] = len(first) * most / len(text)
    for n in range(5, 11):
        seen, again, i = [], 0, 0
        while i <= len(words) - n:
            gram = "".join(words[i : i + n])
            known = gram in seen
            again += len(gram) * known
            seen += [] if known else [gram]
            i += n if known else 1
        found[f"duplicated_{n}_n_grams"] = again / len(text)
    return found


BELOW = ("line_punct_ratio", "gopher_below_avg_threshold", "gopher_below_alpha_threshold")


@needs_libraries
@given(TEXTS)
@settings(max_examples=30, deadline=None)
def test_the_verdict_is_datatroves_and_the_number_is_on_its_side(text):
    rules = TextRules("en", Rules(min_words=1, **WEB))
    words = rules._words.word_tokenize(text)
    broken = rules.judge(text)
    if not any(map(str.isalnum, text)):
        assert broken is None
        return
    assert (broken.rule if broken else None) == datatrove_verdict(text), words
    if broken:
        assert broken.value == pytest.approx(plain_values(text)[broken.rule]), broken
        if broken.rule in (*BELOW, "gopher_enough_stop_words"):
            assert broken.value < broken.threshold
        else:
            assert broken.value > broken.threshold


@needs_libraries
def test_every_rule_can_be_the_reason():
    """Each rule alone, on a text that breaks it, with the value counted by hand."""
    prose = "The dog and the cat went to the river with a friend of the old miller. "
    other = "Nobody knew that seven boats would have to be found before evening came. "
    texts = {
        "dup_para_frac": (f"{prose}\n\n{prose}\n\n{other}", {"dup_para_frac": 0.3}),
        "dup_para_char_frac": (f"{prose}\n\n{prose}\n\n{other}", {"dup_para_char_frac": 0.3}),
        "dup_line_frac": (f"{prose}\n{prose}\n{other}", {"dup_line_frac": 0.3}),
        "dup_line_char_frac": (f"{prose}\n{prose}\n{other}", {"dup_line_char_frac": 0.3}),
        "top_2_gram": ("so on " * 9, {"top_n_grams": {"2": 0.2}}),
        "duplicated_5_n_grams": (prose * 3, {"dup_n_grams": {"5": 0.2}}),
        "line_punct_ratio": ("no end\n" * 3, {"line_punct_thr": 0.5}),
        "short_line_ratio": (f"{prose}\nshort\nlines", {"short_line_thr": 0.6}),
        "char_dup_ratio": (f"{prose}\n{prose}\n{other}", {"char_duplicates_ratio": 0.1}),
        "list_ratio": ("a\nb\nc\nd", {"new_line_ratio": 0.3}),
        "gopher_short_doc": (prose, {"min_doc_words": 50}),
        "gopher_long_doc": (prose, {"max_doc_words": 5}),
        "gopher_below_avg_threshold": ("a b c d", {"min_avg_word_length": 3.0}),
        "gopher_above_avg_threshold": ("incomprehensibilities", {"max_avg_word_length": 10.0}),
        "gopher_too_many_hashes": ("# a # b", {"max_symbol_word_ratio": 0.1}),
        "gopher_too_many_ellipsis": ("so ... on", {"max_symbol_word_ratio": 0.1}),
        "gopher_too_many_bullets": ("- a\n- b", {"max_bullet_lines_ratio": 0.9}),
        "gopher_too_many_end_ellipsis": ("so on...", {"max_ellipsis_lines_ratio": 0.3}),
        "gopher_below_alpha_threshold": ("1 2 3 four", {"max_non_alpha_words_ratio": 0.8}),
        "gopher_enough_stop_words": ("no such word", {"min_stop_words": 2}),
        "lorem_ipsum": ("Lorem ipsum dolor", {"lorem_ipsum": True}),
        "curly_bracket": ("f() { }", {"curly_bracket": True}),
    }
    off = {name: None for name, default in vars(Rules()).items() if isinstance(default, float)}
    off |= {"max_doc_words": None, "lorem_ipsum": False, "min_words": 1}
    off |= {"top_n_grams": {}, "dup_n_grams": {}}
    grams = {"top_2_gram", "duplicated_5_n_grams"}
    assert set(texts) == {*MEASURES, *grams, "lorem_ipsum", "curly_bracket"}
    for rule, (text, threshold) in texts.items():
        broken = TextRules("en", Rules(**(off | threshold))).judge(text)
        assert broken is not None, rule
        assert broken.rule == rule
        assert TextRules("en", Rules(**off)).judge(text) is None, rule
    half = TextRules("en", Rules(**(off | {"max_non_alpha_words_ratio": 0.8}))).judge("1 2 3 four")
    assert (half.value, half.threshold) == (0.25, 0.8)


@needs_libraries
def test_short_texts_are_held_to_no_rule_about_documents():
    rules = TextRules("en", Rules(**WEB))
    assert rules.judge("42") is None
    assert rules.judge("so on " * 24) is None  # 48 words
    assert rules.judge("so on " * 25).rule == "top_2_gram"
    assert TextRules("en", Rules()).judge("Lorem ipsum.").rule == "lorem_ipsum"


@needs_libraries
def test_languages_are_told_apart_and_numbers_have_none():
    texts = {
        "en": "The old miller went down to the river, because his boat had not come back.",
        "de": "Der alte Müller ging zum Fluss hinunter, weil sein Boot nicht zurückgekommen war.",
        "fr": "Le vieux meunier descendit vers la rivière, car son bateau n'était pas revenu.",
        "zh": "老磨坊主走到河边,因为他的船还没有回来。这条河在春天总是涨得很高。",
    }
    for code, text in texts.items():
        found = probabilities(text)
        assert next(iter(found)) == code
        assert sum(found.values()) == pytest.approx(1, abs=1e-3)
        assert found == probabilities(text)
    assert letters("12 + 7 = 19, so x.") == 3
    assert distinct("yes and\nyes and no") == "yes and no"


# ---- the list of words -----------------------------------------------------------------------

WORDS = st.lists(st.sampled_from(["bad", "word", "very", "fine", "Bad", "x"]), max_size=12)


@given(WORDS, st.lists(st.sampled_from(["bad", "very bad", "word x", "x"]), min_size=1))
@settings(deadline=None)
def test_listed_words_are_counted_as_by_hand(text, listed):
    flat = f" {' '.join(text).lower()} "
    wanted = sum(
        flat.startswith(f" {phrase} ", i) for phrase in set(listed) for i in range(len(flat))
    )
    assert WordList(listed).count(", ".join(text).upper()) == wanted


def test_a_word_list_knows_whole_words_and_characters_of_scripts_without_spaces():
    listed = WordList(["Ass", "", "坏话"])
    assert listed.count("A class of assessments.") == 0
    assert listed.count("What an ASS!") == 1
    assert listed.count("他说坏话。") == 1
    with pytest.raises(ValueError, match="the word list has no word"):
        WordList(["", " ... "])


# ---- the gate: pure --------------------------------------------------------------------------

FACTS = st.lists(
    st.tuples(
        st.sampled_from(["a", "b", None]),
        st.sampled_from(["en", "de", None]),
        st.sampled_from([None, 0.0, 0.01, 0.05, 0.9]),
        st.sampled_from([None, 0, 2]),
        st.sampled_from([(None, None, None), ("dup_line_frac", 0.5, 0.3)]),
        st.sampled_from([None, -1.0, 0.5, 2.0]),
    ),
    max_size=30,
)


def frame_of(rows):
    lines = [(f"{i:03d}", *row[:4], *row[4], row[5]) for i, row in enumerate(rows)]
    schema = {**COLUMNS, "score_toxic": pl.Float64}
    return pl.DataFrame(lines, schema=schema, orient="row")


@given(FACTS, st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_the_first_rule_that_speaks_against_a_row_is_its_reason(rows, seed):
    gate = QualityRules(keep=("en",), scores={"toxic": ScoreBound(min=0.0, max=1.0)})
    frame = frame_of(rows)
    result = select(gate, frame)
    assert result.decisions["id"].to_list() == frame["id"].to_list()
    for row, line in zip(rows, result.decisions.to_dicts(), strict=True):
        _, _, kept, listed, broken, score = row
        expected = [
            ("other_language", kept, 0.05) if kept is not None and kept < 0.05 else None,
            ("listed_words", 2.0, 0.0) if listed else None,
            ("toxic_below", score, 0.0) if score is not None and score < 0 else None,
            ("toxic_above", score, 1.0) if score is not None and score > 1 else None,
            broken if broken[0] else None,
        ]
        first = next((e for e in expected if e), None)
        assert line["kept"] == (first is None)
        if first:
            assert (line["reason"], line["value"], line["threshold"]) == first
    # Any cut and order of the rows decides each alike.
    order = random.Random(seed).sample(range(frame.height), frame.height)
    parts = [frame[order][i::3] for i in range(3)]
    plan = gate.decide([gate.summarise(part) for part in parts])
    pieces = pl.concat([gate.apply(part, plan).decisions for part in parts]).sort("id")
    assert pieces.equals(result.decisions)
    assert plan.facts == result.facts
    assert plan.facts["judged"] == frame.height
    assert sum(plan.facts["removed"].values()) == result.removed.height
    for by in ("source", "language"):
        table = plan.tables[f"mix_{by}"]
        assert table["before"].sum() == frame.height
        assert table["after"].sum() == len(result.kept)
        if frame.height:
            assert table["share_before"].sum() == pytest.approx(1)


def test_bad_options_are_refused():
    for bad, says in (
        ({"min_words": 0}, "min_words is 0"),
        ({"dup_line_frac": 0.0}, "dup_line_frac is 0.0: give a number above 0, or null for off"),
        ({"dup_n_grams": {"x": 0.3}}, "dup_n_grams: 'x': 0.3"),
        ({"top_n_grams": {"2": 1.5}}, "top_n_grams: '2': 1.5"),
        ({"min_doc_words": 20}, "min_doc_words 20 is not above min_words 50"),
    ):
        with pytest.raises(ValueError, match=re.escape(says)):
            Rules(**bad)
    for bad, says in (
        ({"text": "title"}, "text is 'title'"),
        ({"min_language": 0.0}, "min_language is 0.0"),
        ({"identify": False, "keep": ("en",)}, "identify is off"),
        ({"identify": False, "languages": {}}, "identify is off"),
    ):
        with pytest.raises(ValueError, match=re.escape(says)):
            QualityRules(**bad)
    with pytest.raises(ValueError, match="neither min nor max"):
        ScoreBound()
    with pytest.raises(ValueError, match="min 2 is above max 1"):
        ScoreBound(min=2, max=1)


# ---- the gate as a stage ---------------------------------------------------------------------

ENGLISH = (
    "First we count the apples in the {} basket, and then we add those that the miller brought "
    "from the market. There are {} of them in all. So the answer to the question is plain: the "
    "basket of the miller and the one at home have {} apples between them, which is what we were "
    "asked for at the beginning of this little story."
)
GERMAN = (
    "Zuerst zählen wir die Äpfel im Korb, dann kommen die vom Markt dazu. Es sind zusammen {} "
    "Stück, und damit ist die Frage vollständig beantwortet."
)


def pool_lines():
    names = ("red", "old", "blue", "small", "large", "new", "round", "deep", "green", "far")
    good = [
        (f"How many apples are in the {n} basket?", ENGLISH.format(n, i, i + 3), "plain", 0.1)
        for i, n in enumerate(names)
    ]
    return [
        *good,
        ("How many are there?", "42", "plain", 0.1),
        ("Wie viele Äpfel sind es?", GERMAN.format(7), "german", 0.1),
        ("Say it.", "and on it goes " * 40, "loops", 0.1),
        ("Say a word.", f"That is a very Bad word. {ENGLISH.format('w', 1, 2)}", "plain", 0.1),
        ("Be rude.", f"You fool. {ENGLISH.format('z', 8, 9)}", "rude", 0.97),
    ]


@pytest.fixture
def place(tmp_path):
    lines = [{"question": q, "response": r, "source": s, "toxic": t} for q, r, s, t in pool_lines()]
    (tmp_path / "pool.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    (tmp_path / "words.txt").write_text("bad word\n", encoding="utf-8")
    workspace = Workspace(tmp_path / "root")
    columns = {"question": "question", "response": "response", "source": "source"}
    source = Source(path=str(tmp_path / "pool.jsonl"), columns=columns)
    build_pool(workspace.pool("p"), PoolSpec(name="p", inputs=(source,), buckets=2))

    def recipe(*overrides, **options):
        data = {
            "name": "r",
            "pool": {"name": "p", "inputs": [{"path": "x.jsonl"}], "buckets": 2},
            "models": {"m": {"path": "x"}},
            "scorers": {"toxic": {"kind": "column", "column": "toxic"}},
            "stages": [{"quality_rules": options}],
            "budget": {"size": 1},
            "canaries": {"per_kind": 8},
        }
        return parse(data, overrides)

    return workspace, recipe, tmp_path


@needs_libraries
def test_the_stage_says_why_each_row_went(place):
    from siftline.stages.models import engines
    from siftline.stages.scorers import score_quality

    workspace, recipe, folder = place
    asked = recipe(keep=["en"], words=str(folder / "words.txt"), scores={"toxic": {"max": 0.5}})
    assert scorers_read(asked.stages[0]) == ("toxic",)
    with pytest.raises(ValueError, match="no scores of 'toxic'"):
        run_stage(workspace, asked, "quality_rules", quiet)
    with engines() as opened:
        score_quality(workspace, asked, "toxic", opened, quiet)
    output, fresh = run_stage(workspace, asked, "quality_rules", quiet)
    assert fresh
    assert output.accounting.closes
    gone = output.all_decisions().filter(outcome="removed")
    assert dict(Counter(gone["reason"])) == {
        "other_language": 1,
        "listed_words": 1,
        "toxic_above": 1,
        "top_4_gram": 1,
    }
    assert output.facts["removed"] == dict(sorted(Counter(gone["reason"]).items()))
    assert (gone["value"].is_not_null() & gone["threshold"].is_not_null()).all()
    mix = output.table("mix_source")
    rows = {line["source"]: (line["before"], line["after"]) for line in mix.to_dicts()}
    assert rows == {"german": (1, 0), "loops": (1, 0), "plain": (12, 11), "rude": (1, 0)}
    spoken = output.table("mix_language")
    assert {"en", "de"} <= set(spoken["language"])
    caught = {line["kind"]: line for line in output.facts["canaries"]}
    assert caught["looped"]["removed"] == caught["looped"]["planted"] == 8
    assert caught["other_question"]["removed"] == 0
    assert not run_stage(workspace, asked, "quality_rules", quiet)[1]
    (folder / "words.txt").write_text("apples\n", encoding="utf-8")
    changed, fresh = run_stage(workspace, asked, "quality_rules", quiet)
    assert fresh
    assert changed.facts["removed"]["listed_words"] > 10


@needs_libraries
def test_each_text_may_be_judged_and_language_left_alone(place):
    workspace, recipe, _ = place
    looked = {
        text: run_stage(workspace, recipe(text=text), "quality_rules", quiet)[0].facts["removed"]
        for text in ("response", "prompt", "both")
    }
    assert looked["prompt"] == {}
    assert looked["response"] == {"top_4_gram": 1} == looked["both"]
    one = recipe(identify=False)
    output, _ = run_stage(workspace, one, "quality_rules", quiet)
    assert set(output.table("mix_language")["language"]) == {"en"}
    assert output.facts["without_rules"] == 0
    with pytest.raises(ValueError, match="language 'xx' is not known"):
        run_stage(workspace, recipe(keep=["xx"]), "quality_rules", quiet)


def test_the_stage_refuses_without_its_libraries(place, monkeypatch):
    workspace, recipe, folder = place
    for name in ("datatrove", "py3langid"):
        for loaded in [m for m in sys.modules if m.split(".")[0] == name]:
            monkeypatch.delitem(sys.modules, loaded)
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match=r"text rules need datatrove.*siftline\[quality\]"):
        TextRules("en", Rules())
    from siftline.scoring.measures import degenerate as languages

    languages._identifier.cache_clear()
    with pytest.raises(ValueError, match=r"languages need py3langid.*siftline\[quality\]"):
        probabilities("text")
    monkeypatch.setattr("siftline.stages.quality_rules.run.version", _absent)
    with pytest.raises(ValueError, match=r"quality_rules needs datatrove.*siftline\[quality\]"):
        run_stage(workspace, recipe(), "quality_rules", quiet)
    bare = recipe(languages={}, keep=["en"])
    with pytest.raises(ValueError, match=r"quality_rules needs py3langid"):
        run_stage(workspace, bare, "quality_rules", quiet)
    listed = recipe(words=str(folder / "no.txt")).stages[0]
    monkeypatch.setattr("siftline.stages.quality_rules.run.version", lambda name: "1.0")
    with pytest.raises(ValueError, match=r"words: no file '.*no\.txt'"):
        quality_inputs(listed)


def _absent(name):
    from importlib.metadata import PackageNotFoundError

    raise PackageNotFoundError(name)


def test_sampled_rows_are_held_to_the_rules_too():
    assert "quality_rules" in GATES


# ---- real rows -------------------------------------------------------------------------------


@needs_libraries
def test_sound_rows_stay_and_loops_go_on_real_data():
    root = os.environ.get("SIFTLINE_TEST_DATA")
    if not root:
        pytest.skip("SIFTLINE_TEST_DATA is not set")
    lines = (Path(root) / "gsm8k/train.jsonl").read_text(encoding="utf-8").splitlines()[:200]
    rows = [json.loads(line) for line in lines]
    view = pl.DataFrame(
        [
            {"id": f"{i:04d}", "source": "g", "prompt": r["question"], "response": r["answer"]}
            for i, r in enumerate(rows)
        ]
    )
    gate = QualityRules(keep=("en",))
    look = looker(gate)
    assert select(gate, look(view)).removed.height == 0
    looped_texts = [_loop(r["answer"], f"{i:04d}") for i, r in enumerate(rows[:100])]
    spoiled = view[:100].with_columns(response=pl.Series(looped_texts))
    caught = select(gate, look(spoiled)).removed
    assert caught.height >= 99
    assert select(QualityRules(), looker(QualityRules())(spoiled)).removed.height >= 99
    published = QualityRules(languages={"en": Rules(**WEB)})
    assert select(published, looker(published)(view)).removed.height > 50


def _loop(text, identity):
    from siftline.rows import schema

    messages = [schema.message("user", "?"), schema.message("assistant", text)]
    return looped(schema.make_row(messages, source=identity), {})["messages"][-1]["content"]


@needs_libraries
def test_rows_that_were_judged_before_stay_when_samples_are_judged(place):
    from dataclasses import replace

    from siftline.ingest.pool import Pool
    from siftline.stages.context import Context
    from siftline.stages.quality_rules.run import run as quality_rules

    class Before(Context):
        def judged(self, bucket):
            return new & set(self.in_play(bucket))

    workspace, recipe, _ = place
    asked = recipe()
    stage = replace(asked.stages[0], scope="added")
    pool = Pool(workspace.pool("p"))
    rows = pool.all_rows().to_pylist()
    loop = next(row["id"] for row in rows if row["source"] == "loops")
    for new, gone in (({loop}, {loop}), ({row["id"] for row in rows} - {loop}, set())):
        run = quality_rules(Before(workspace, asked, stage, pool, [], None, quiet))
        decided = pl.concat([result.decisions for result in run.results])
        assert set(decided.filter(~pl.col("kept"))["id"]) == gone
        assert decided.height == len(rows)
        assert run.facts["judged"] == len(new)
