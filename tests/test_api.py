"""The Python API: forms of data, results, and that it decides as the verbs and a recipe do."""

import doctest
import json
import random
import subprocess
import sys
from pathlib import Path

import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import siftline as sl
from siftline import api
from siftline.cli import main
from siftline.ingest.pool import Pool, build_pool
from siftline.recipe.parse import parse
from siftline.stages.run import run_stage
from siftline.workspace import Workspace

PLACES = ["market", "school", "library", "station", "bakery", "garden", "harbour", "museum"]
THINGS = ["apples", "pencils", "stickers", "marbles", "books", "oranges", "tickets", "candles"]
TOLD = {"answer": "answer"}


def problem(rng):
    thing, place = rng.choice(THINGS), rng.choice(PLACES)
    a, b = rng.randint(30, 99), rng.randint(3, 9)
    prompt = (
        f"On Monday somebody went to the {place} and bought {a} {thing} for the whole class, and "
        f"on the way home gave {b} of the {thing} to a neighbour. How many {thing} were left then?"
    )
    said = a - b if rng.random() < 0.8 else a + b
    response = f"Of the {a} {thing} that were bought {b} went away, so the answer is {said}."
    return {"prompt": prompt, "completion": response, "answer": str(a - b)}


def problems(n, seed=0):
    """Problems with right and wrong answers; copies, near copies of either text, or of both."""
    rng = random.Random(seed)
    rows = [problem(rng)]
    while len(rows) < n:
        row = dict(rng.choice(rows)) if rng.random() < 0.5 else problem(rng)
        kind = rng.randrange(6)
        if kind in (1, 3):
            row["prompt"] = row["prompt"].replace("somebody", "someone")
        if kind in (2, 3):
            row["completion"] = row["completion"].replace("went away", "were given")
        if kind == 4:
            row["completion"] = "I do not know, for nobody counted what was in the bag."
        rows.append(row)
    return [{"extra": f"row {k}", **row} for k, row in enumerate(rows)]


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def verb(*arguments):
    with pytest.raises(SystemExit) as ended:
        main([*map(str, arguments)])
    assert not ended.value.code


def removed_by_verb(out):
    gone = pl.read_parquet(out / "removed" / "*.parquet").select("extra", "^sift_.*$")
    return {row["extra"]: row for row in gone.drop("sift_prompt_group", strict=False).to_dicts()}


def removed_by_api(result):
    names = ("extra", "reason", "value", "threshold", "matched_id", "matched_row", "similarity")
    rows = [
        {k: row.get(f"sift_{k}", row.get(k)) for k in names} for row in result.removed.to_dicts()
    ]
    return {
        row["extra"]: {(k if k == "extra" else f"sift_{k}"): v for k, v in row.items()}
        for row in rows
    }


def removed_by_recipe(root, path, kind, options, columns, test=None):
    """What a recipe's stage removes of a pool: decisions by id, and the ids of the rows."""
    workspace = Workspace(root)
    source = {"path": str(path), "columns": columns}
    recipe = parse(
        {
            "name": "r",
            "pool": {"name": "p", "inputs": [source]},
            "sets": {"test": [{"name": "test", "inputs": [{"path": str(test)}]}] if test else []},
            "models": {"m": {"path": "x"}},
            "stages": [{kind: options}],
            "budget": {"size": 1},
        }
    )
    for spec in (recipe.pool, *(spec for _, spec in recipe.sets.items())):
        build_pool(workspace.pool(spec.name), spec)
    output, _ = run_stage(workspace, recipe, kind, lambda line: None)
    gone = output.all_decisions().filter(outcome="removed")
    pool = Pool(workspace.pool("p"))
    places = pl.concat(
        pl.DataFrame(pl.from_arrow(pool.read("provenance", b))) for b in range(pool.buckets)
    )
    return gone, places


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    rows = problems(160, seed=5)
    rows[20] |= {"completion": "And so it goes on from here to there. " * 30}
    test = [{"prompt": rows[k]["prompt"].upper(), "completion": "A test."} for k in (3, 9)]
    # What can't be read is told apart everywhere.
    lost = {**rows[0], "completion": "", "extra": "no response"}
    return rows, jsonl(folder / "rows.jsonl", [*rows, lost]), jsonl(folder / "test.jsonl", test)


STAGES = {
    "duplicates": ("dedup", {"numbers": "any"}, {}, ["--numbers", "any"]),
    "decontamination": ("decontaminate", {"near": 0.7}, {}, ["--set", "near=0.7"]),
    "verify": ("verify", {"open": "keep"}, TOLD, [
        "--set", "open=keep", "--field", "answer=answer"]),
    "quality_rules": ("filter", {"languages": {"en": {"min_words": 5}}}, {}, [
        "--set", "languages.en.min_words=5"]),
}  # fmt: skip


@pytest.mark.parametrize("kind", STAGES)
def test_api_verb_and_recipe_decide_alike(kind, data, tmp_path, capsys):
    rows, path, test = data
    name, options, columns, arguments = STAGES[kind]
    more = {"against": str(test)} if kind == "decontamination" else {}
    calls = {"dedup": sl.dedup, "filter": sl.quality}
    call = calls.get(name) or getattr(sl, name)
    result = call(str(path), columns=columns, **options, **more)
    against = ["--against", test] if kind == "decontamination" else []
    verb(name, path, *arguments, *against, "--out", tmp_path / "out", "--json")
    said = json.loads(capsys.readouterr().out)
    by_api, by_verb = removed_by_api(result), removed_by_verb(tmp_path / "out")
    assert by_api == by_verb
    assert len(by_api) == said["removed"] > (0 if kind == "quality_rules" else 1)
    summary = result.summary()
    assert {k: said[k] for k in summary if k != "vacuous"} == {
        k: v for k, v in summary.items() if k != "vacuous"
    }
    assert (summary["rows"], summary["quarantined"]) == (161, 1)
    kept = pl.read_parquet(tmp_path / "out" / "data" / "*.parquet")
    assert result.kept["extra"].to_list() == kept["extra"].to_list()
    assert len(kept) + len(by_verb) == 160
    gone, places = removed_by_recipe(tmp_path / "root", path, kind, options, columns, test)
    ids = dict(places.select("line", "id").iter_rows())
    of_extra = {row["extra"]: ids[k] for k, row in enumerate(rows, 1)}
    decided = {row["id"]: row for row in gone.to_dicts()}
    copies = {e for e, row in by_api.items() if row["sift_matched_id"] == of_extra[e]}
    for extra, row in by_api.items():
        if extra in copies:  # identical rows collapse in a recipe's pool
            assert row["sift_reason"] == "exact_duplicate"
            continue
        its = decided[of_extra[extra]]
        for fact in ("reason", "value", "threshold", "matched_id"):
            assert row[f"sift_{fact}"] == its[fact], (extra, fact)
    assert {of_extra[extra] for extra in set(by_api) - copies} == set(decided)


def forms(rows, folder):
    import datasets

    return {
        "list": rows,
        "polars": pl.DataFrame(rows),
        "lazy": pl.LazyFrame(rows),
        "pandas": pd.DataFrame(rows, index=[f"i{k}" for k in range(len(rows))]),
        "pyarrow": pa.Table.from_pylist(rows),
        "dataset": datasets.Dataset.from_list(rows),
        "jsonl": jsonl(folder / "some name.jsonl", rows),
    }


def test_a_thousand_rows_in_any_form_are_decided_alike(tmp_path):
    rows = problems(1000, seed=1)
    found = {}
    for name, form in forms(rows, tmp_path).items():
        result = sl.dedup(form)
        lines = result.decisions.drop("id", "matched_id")
        found[name] = (lines, result.removed, result.kept)
        assert type(result.kept) is type(result.removed)
    lines = found["list"][0]
    assert 100 < lines.filter(outcome="removed").height < 900
    assert lines["reason"].n_unique() == 3
    for name, (other, _, _) in found.items():
        assert other.equals(lines), name
    kept = lines.filter(outcome="kept")["row"].to_list()
    assert found["list"][2] == [rows[k] for k in kept]
    assert type(found["polars"][2]) is type(found["lazy"][2]) is pl.DataFrame
    assert found["pandas"][2].index.tolist() == [f"i{k}" for k in kept]
    assert found["pandas"][2].to_dict("records") == found["list"][2]
    assert found["dataset"][2].to_list() == found["list"][2]
    assert found["pyarrow"][2].to_pylist() == found["list"][2]
    assert found["jsonl"][2].to_dicts() == found["polars"][2].to_dicts() == found["list"][2]
    gone = found["list"][1]
    assert found["polars"][1].to_dicts() == found["dataset"][1].to_list() == gone
    assert found["pandas"][1].to_dict("records") == gone
    assert found["pandas"][1].index.tolist() == [
        f"i{k}" for k in lines.filter(outcome="removed")["row"]
    ]


@given(st.permutations(range(12)))
@settings(max_examples=4)
def test_which_rows_stay_depends_on_no_order_of_theirs(order):
    rows = problems(12, seed=3)
    texts = {row["prompt"] + row["completion"] for row in sl.dedup(rows).kept}
    other = sl.dedup([rows[k] for k in order]).kept
    assert {row["prompt"] + row["completion"] for row in other} == texts


def chat(prompt, response, **more):
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
    return {"messages": turns, **more}


def test_every_row_is_somewhere_and_is_explained():
    rows = [
        chat("What is a pear?", "A fruit of a tree.", n=0),
        chat("What is a pear?", "A fruit of a tree.", n=1),
        {"messages": [{"role": "user", "content": "And a stone?"}], "n": 2},
        {"messages": "no list", "n": 3},
        chat("What is a stone?", "Part of a rock.", n=4),
    ]
    result = sl.dedup(rows)
    assert [row["n"] for row in result.kept] == [0, 4]
    assert [row["n"] for row in result.removed] == [1]
    assert result.decisions["outcome"].to_list() == [
        "kept", "removed", "quarantined", "quarantined", "kept"
    ]  # fmt: skip
    assert result.quarantined["row"].to_list() == ["data:3", "data:4"]
    said = result.explain(1)
    assert "exact_duplicate" in said
    assert "it lost to data:1" in said
    assert said.count("user: What is a pear?") == 2
    assert "no_response" in result.explain(2)
    assert "data:5 was kept" in result.explain(-1)
    with pytest.raises(IndexError, match="there are 5"):
        result.explain(5)
    assert "5 rows, 2 kept, 1 removed, 2 quarantined" in repr(result)


def test_a_notebook_shows_removed_rows_beside_what_they_lost_to_and_no_markup_of_theirs():
    script = "<script>alert(1)</script> and " + "so on " * 200
    shown = sl.dedup([chat("Say it.", script)] * 2)._repr_html_()
    assert "<script>" not in shown
    assert shown.count("&lt;script&gt;") == 2
    assert "exact_duplicate" in shown
    assert "data:1" in shown
    assert len(shown) < 4000


def test_a_saved_result_is_what_the_verb_writes(tmp_path, capsys):
    rows = problems(60, seed=2)
    path = jsonl(tmp_path / "rows.jsonl", rows)
    verb("dedup", path, "--out", tmp_path / "verb", "--json")
    for name, form in forms(rows, tmp_path).items():
        sl.dedup(form).save(tmp_path / name)
        for part in ("data", "removed"):
            mine, its = (
                pl.read_parquet(tmp_path / of / part / "*.parquet").drop(
                    "sift_matched_row", "sift_matched_id", strict=False
                )
                for of in (name, "verb")
            )
            assert mine.equals(its), (name, part)
    with pytest.raises(ValueError, match="is not empty"):
        sl.dedup(rows).save(tmp_path / "verb")


def test_splits_stay_splits(tmp_path):
    import datasets

    rows = problems(40, seed=4)
    parts = {"train": rows[:25], "validation": rows[25:]}
    both = datasets.DatasetDict({k: datasets.Dataset.from_list(v) for k, v in parts.items()})
    result = sl.verify(both)
    assert type(result.kept) is datasets.DatasetDict
    assert result.summary()["removed"] > 2
    for split, those in parts.items():
        alone = sl.verify(those)
        assert result.kept[split].to_list() == alone.kept
        assert [row["extra"] for row in result.removed[split]] == [
            r["extra"] for r in alone.removed
        ]
    assert result.to_datasets() is result.kept
    assert sl.verify(pl.DataFrame(rows)).to_datasets().to_list() == sl.verify(rows).kept


def test_answers_are_found_by_name_and_what_has_none_is_told():
    rows = [
        chat("2 + 2?", "The answer is 4.", gold="4"),
        chat("2 + 2?", "The answer is 5.", gold="4"),
    ]
    assert sl.verify(rows).summary()["reasons"] == {"wrong_answer": 1}
    asked = [{"question": "2 + 2?", "response": "The answer is 5.", "answer": "4"}]
    assert sl.verify(asked).summary()["removed"] == 1
    assert sl.verify([chat("2 + 2?", "The answer is 5.")]).summary()["vacuous"]
    named = [chat("2 + 2?", "The answer is 5.", right="4")]
    assert sl.verify(named, columns={"answer": "right"}).summary()["removed"] == 1


def test_several_sets_by_name_and_rows_of_theirs_are_named():
    rows = [chat(f"What is number {k} of the long list?", f"It is {k}.") for k in range(4)]
    sets = {"easy": pl.DataFrame(rows[1:2]), "hard": rows[3:]}
    result = sl.decontaminate(rows, against=sets)
    assert [row["sift_matched_row"] for row in result.removed] == ["easy:1", "hard:1"]
    assert result.decisions["matched"].to_list() == [None, 0, None, 1]
    assert "number 3" in result.explain(3).partition("--- hard:1")[2]


def test_texts_are_compared_as_the_verb_compares_texts(tmp_path, capsys):
    rng = random.Random(0)
    texts = [" ".join(rng.choice(THINGS + PLACES) for _ in range(40)) for _ in range(40)]
    texts += [text + " more" for text in texts[:10]] + texts[10:15]
    rows = [{"n": k, "text": text, "score": k % 7} for k, text in enumerate(texts)]
    path = jsonl(tmp_path / "t.jsonl", rows)
    for keep in ("first", "longest", "score:score", "none"):
        out = tmp_path / keep.replace(":", "")
        verb("dedup", path, "--keep", keep, "--out", out, "--json")
        gone = pl.read_parquet(out / "removed" / "*.parquet")
        for form in (rows, pd.DataFrame(rows), path):
            result = sl.dedup(form, keep=keep)
            mine = pl.DataFrame(result.removed)
            same = ["n", "sift_reason", "sift_value", "sift_threshold", "sift_similarity"]
            assert mine.select(same).equals(gone.select(same))
            assert mine.height >= 15
    chats = [chat(text, text) for text in texts]
    assert (
        sl.dedup([{"messages": "x", "text": t["text"]} for t in rows], text="text").summary()[
            "removed"
        ]
        == 15
    )
    assert sl.dedup(chats).decisions["id"].null_count() == 0


def test_texts_that_can_not_be_read_are_set_apart(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text('{"text": "a b c"}\n{broken\n{"text": "a b c"}\n{"text": "d"}\n')
    result = sl.dedup(path)
    assert repr(result) == (
        "<duplicates: 4 rows, 2 kept, 1 removed, 1 quarantined (exact_duplicate 1)>"
    )
    assert result.kept["text"].to_list() == ["a b c", "d"]
    assert result.removed["sift_matched_row"].to_list() == [f"{path}:1"]
    assert result.decisions["matched"].to_list() == [None, None, 0, None]
    assert "invalid_json" in result.explain(1)
    assert "{broken" in result.explain(1)
    saved = result.save(tmp_path / "out")
    assert sorted(p.name for p in saved.iterdir()) == ["data", "quarantine", "removed"]


def test_cases_of_leaks(tmp_path):
    cases = Path(__file__).parent / "cases" / "decontamination"
    result = sl.decontaminate(cases / "pool.jsonl", against=cases / "test.jsonl")
    assert result.summary()["rows"] == sum(1 for _ in (cases / "pool.jsonl").open())
    verb("decontaminate", cases / "pool.jsonl", "--against", cases / "test.jsonl",
         "--out", tmp_path / "out")  # fmt: skip
    gone = pl.read_parquet(tmp_path / "out" / "removed" / "*.parquet")
    assert result.removed.equals(gone)
    assert gone["id"].to_list() == ["leak"]


def test_faults_are_named_with_the_remedy(tmp_path):
    rows = [chat("a", "b")]
    with pytest.raises(ValueError, match=r"duplicates: unknown key 'treshold': did you mean"):
        sl.dedup(rows, treshold=0.5)
    with pytest.raises(ValueError, match="no option 'treshold'"):
        sl.dedup([{"text": "a"}], treshold=0.5)
    for wrong in (3, {"a": 1}, None, object()):
        with pytest.raises(ValueError, match="is no table: give"):
            sl.dedup(wrong)
    with pytest.raises(ValueError, match="item 1 of the list is str"):
        sl.verify([*rows, "row"])
    with pytest.raises(ValueError, match="there are no rows"):
        sl.verify([])
    with pytest.raises(ValueError, match="no such file"):
        sl.dedup(tmp_path / "absent.jsonl")
    with pytest.raises(ValueError, match="column sift_reason already"):
        sl.dedup([{**rows[0], "sift_reason": "x"}])
    for call in (sl.verify, sl.dedup):
        with pytest.raises(ValueError, match="no layout fits"):
            call([{"a": 1, "b": 2}])
    with pytest.raises(AttributeError, match="no attribute 'dedupe'"):
        sl.dedupe  # noqa: B018


def test_values_that_no_column_holds_still_come_through():
    """Contents of two kinds in one pandas column, NaN where there is nothing."""
    parts = [{"role": "user", "content": [{"type": "text", "text": "What is it?"}]},
             {"role": "assistant", "content": "A pear."}]  # fmt: skip
    rows = pd.DataFrame({"messages": [parts, chat("What is it?", "A pear.")["messages"]]})
    rows["more"] = [1.5, None]
    assert sl.dedup(rows).summary()["removed"] == 1


def test_columns_that_a_pair_or_a_label_brings():
    pair = {"prompt": "What is it?", "chosen": "A pear.", "rejected": "No idea."}
    bad = {"prompt": "What is it?", "completion": "No idea.", "label": False}
    assert sl.dedup([pair, pair]).summary()["removed"] == 1
    result = sl.dedup([bad, {**bad, "label": True, "completion": "A pear."}])
    assert (result.summary()["kept"], result.summary()["labelled_bad"]) == (2, 1)


def test_examples_in_docstrings_and_pages_run():
    page = Path(__file__).parents[1] / "docs" / "api.md"
    parser, runner = doctest.DocTestParser(), doctest.DocTestRunner()
    examples = {"api.md": page.read_text(encoding="utf-8")}
    examples |= {name: getattr(api, name).__doc__ for name in api.__all__}
    for name, text in examples.items():
        test = parser.get_doctest(text, {}, name, name, 0)
        assert test.examples or name == "Result", name
        runner.run(test)
    assert not runner.failures
    named = set(sl.__all__)
    told = {name for name in named if f"`{name}" in examples["api.md"]}
    assert told == named


START = """
import sys, time
begin = time.perf_counter()
import siftline as sl
took = time.perf_counter() - begin
sorted(sl.__all__) == dir(sl) or None
heavy = {"torch", "polars", "pyarrow", "numpy", "narwhals"} & set(sys.modules)
sl.dedup([{"prompt": "a", "completion": "b"}])
print(took, heavy, {"torch", "transformers", "dagster", "faiss"} & set(sys.modules))
"""


def test_the_package_is_imported_at_once_and_a_call_loads_no_model(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", START], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    took, *loaded = done.stdout.split(" ", 1)
    assert float(took) < 0.3
    assert loaded == ["set() set()\n"]


def test_signatures_are_those_of_the_functions():
    from inspect import signature

    for name in ("dedup", "decontaminate", "quality", "verify"):
        assert signature(getattr(sl, name)) == signature(getattr(api, name))
